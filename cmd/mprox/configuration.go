// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/mutex-proxy/mutex/cmd/mprox/daemon"
	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control/client"
)

func newReloadCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Apply the changed configuration",
		Long: `Makes the daemon read its configuration again and apply it, as SIGHUP does. Flows that the new rules allow live on. A configuration with
an error, or one that changes what is fixed at the start, is refused, and the old one stays in force.`,
		Example: examples("mprox check && mprox reload"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.ask(cmd, changeTimeout, func(ctx context.Context, c *client.Client) error { return c.Reload(ctx) })
		},
	}
}

// finding is one error or warning of check, for machines.
type finding struct {
	File    string `json:"file"`
	Line    int    `json:"line"`
	Column  int    `json:"column"`
	Path    string `json:"path"`
	Message string `json:"message"`
	Hint    string `json:"hint"`
}

func newCheckCommand(g *globals) *cobra.Command {
	var env string
	cmd := &cobra.Command{
		Use:   "check [FILE]",
		Short: "Find everything that is wrong with a configuration",
		Long: `Reads a configuration as "up" would, and reports all errors at once: file, line, column, JSON path, and what was probably meant. It touches
nothing and needs no daemon. Exit code 3 means that there are errors. What "up" refuses because it is not supported yet is an error here too:
ignoring it could let traffic go where it should not.`,
		Example: examples("mprox check", "mprox check ./candidate.json", "mprox check --env prod -o json"),
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := g.fileOf(args)
			cfg, err := config.Load(path, env, daemon.Check)
			if err == nil {
				for _, w := range cfg.Warnings() {
					fmt.Fprintln(cmd.ErrOrStderr(), "warning:", printable(w.Error()))
				}
			}
			if g.output == "table" {
				if err == nil {
					fmt.Fprintln(cmd.OutOrStdout(), printable(path)+": ok")
				}
				return err
			}
			found, err := findings(err)
			if err != nil {
				return err
			}
			if err := writeFindings(g, cmd.OutOrStdout(), found); err != nil {
				return err
			}
			if len(found) > 0 {
				return exitError{exitConfig, fmt.Errorf("%s: %d errors, listed on standard output; mend them and check again", path, len(found))}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&env, "env", "", "merge config.`NAME`.json over the configuration")
	return cmd
}

// findings returns the parts of a configuration error; an error of another kind is returned as it is.
func findings(err error) ([]finding, error) {
	list := []finding{}
	es, ok := errors.AsType[config.Errors](err)
	if !ok {
		return list, err
	}
	for _, e := range es {
		list = append(list, finding{File: e.File, Line: e.Line, Column: e.Column, Path: e.Path, Message: e.Msg, Hint: e.Hint})
	}
	return list, nil
}

func writeFindings(g *globals, w io.Writer, list []finding) error {
	if g.output == "csv" {
		return writeCSV(w, list)
	}
	return writeJSON(w, struct {
		Valid  bool      `json:"valid"`
		Errors []finding `json:"errors"`
	}{len(list) == 0, list})
}

// fileOf is the configuration a command was given as its argument, else that of -c.
func (g *globals) fileOf(args []string) string {
	if len(args) > 0 {
		return args[0]
	}
	return g.config
}

func newFmtCommand(g *globals) *cobra.Command {
	var write bool
	cmd := &cobra.Command{
		Use:     "fmt [FILE]",
		Short:   "Format a configuration, keeping its comments",
		Long:    "Prints the configuration in its standard form. FILE \"-\" is standard input. With -w the file is replaced, in one step, if it changes.",
		Example: examples("mprox fmt", "mprox fmt -w ./config.json", "mprox fmt - < config.json"),
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := g.fileOf(args)
			if path == "-" {
				if write {
					return usageError("-w cannot replace standard input")
				}
				data, err := io.ReadAll(io.LimitReader(cmd.InOrStdin(), config.MaxSize+1))
				if err != nil {
					return err
				}
				return printFormatted(cmd.OutOrStdout(), data)
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return exitError{exitConfig, err}
			}
			if !write {
				return printFormatted(cmd.OutOrStdout(), data)
			}
			formatted, err := config.Format(data)
			if err != nil {
				return err
			}
			if bytes.Equal(data, formatted) {
				return nil
			}
			return replaceFile(path, formatted)
		},
	}
	cmd.Flags().BoolVarP(&write, "write", "w", false, "replace the file instead of printing")
	return cmd
}

func printFormatted(w io.Writer, data []byte) error {
	formatted, err := config.Format(data)
	if err != nil {
		return err
	}
	_, err = w.Write(formatted)
	return err
}

// replaceFile gives a file a new content in one step, with its mode and owner: a crash leaves the old or the new, never half of it. A
// symbolic link stays one.
func replaceFile(path string, data []byte) (err error) {
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".mprox-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	_, err = tmp.Write(data)
	err = errors.Join(err, keepOwner(tmp, info), tmp.Chmod(info.Mode().Perm()), tmp.Sync(), tmp.Close())
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

func newSchemaCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "schema",
		Short:   "Print the JSON schema of the configuration",
		Example: examples("mprox schema > /etc/mprox/schema.json"),
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(config.Schema())
			return err
		},
	}
}

func newInitCommand(g *globals) *cobra.Command {
	var template string
	var force bool
	cmd := &cobra.Command{
		Use:   "init [FILE]",
		Short: "Write a configuration to begin with",
		Long: `Writes a commented configuration made from a template: minimal, desktop, server, sidecar, gateway. Without FILE and -c it is printed. A file
that exists is not overwritten unless --force is given. The file is readable by its owner alone, because it will hold passwords.`,
		Example: examples("mprox init --template minimal", "sudo mprox init --template desktop /etc/mprox/config.json"),
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			data, err := config.Template(template)
			if err != nil {
				return usageError("--template: %w", err)
			}
			if len(args) == 0 && !g.configGiven {
				_, err := cmd.OutOrStdout().Write(data)
				return err
			}
			return writeNew(g.fileOf(args), data, force)
		},
	}
	cmd.Flags().StringVar(&template, "template", "minimal", "`name`: minimal, desktop, server, sidecar, gateway")
	cmd.Flags().BoolVar(&force, "force", false, "overwrite a file that exists")
	return cmd
}

// writeNew writes a file that does not exist yet, or, by force, instead of one that does.
func writeNew(path string, data []byte, force bool) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		if force {
			return replaceFile(path, data)
		}
		return exitError{exitConflict, fmt.Errorf("%s exists: choose another name, or overwrite it with --force", path)}
	}
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}
