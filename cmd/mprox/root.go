// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/tailscale/hujson"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/policy"
)

const (
	defaultConfig   = "/etc/mprox/config.json"
	defaultStateDir = "/var/lib/mprox"
	// callTimeout bounds a question to the daemon. Answers take milliseconds; a daemon that needs longer is not well.
	callTimeout = 10 * time.Second
	// changeTimeout bounds a reload and a stop: upstreams may have to be resolved, flows ended and the kernel put back.
	changeTimeout = 60 * time.Second
)

// globals are the flags that every command has, and the two ways out of this process that tests replace.
type globals struct {
	config      string
	configGiven bool
	socket      string
	stateDir    string
	output      string
	logLevel    string
	level       zap.AtomicLevel // of the log, once there is one

	cleanup func(context.Context, policy.Instance) (policy.Report, error)
	started bool // a command has begun: from here on errors are not about usage
}

func newGlobals() *globals { return &globals{cleanup: cleanupInstance, level: zap.NewAtomicLevel()} }

// newRootCommand returns the whole command line. Every command that exists is listed here, and none that does not.
func newRootCommand(g *globals) *cobra.Command {
	root := &cobra.Command{
		Use:   "mprox",
		Short: "Send a host's or a command's whole traffic through a proxy",
		Long: `mprox captures the traffic of a host, or of one command and all it starts, and sends it through SOCKS5 and HTTP proxies: TCP, UDP and DNS,
IPv4 and IPv6, without the applications knowing. What cannot go through the proxy is refused at once; nothing goes around it.

Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 invalid configuration, 4 missing privilege or kernel feature, 5 daemon not reachable,
6 conflict with another instance, 7 a check failed. "run" exits as its command does; 125 means that mprox itself failed.`,
		Example: `  mprox up --proxy socks5h://user:password@192.0.2.10:1080
  mprox run --proxy socks5h://192.0.2.10:1080 -- curl https://example.com/
  mprox status
  mprox demo`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return flagError(err) })
	fl := root.PersistentFlags()
	fl.StringVarP(&g.config, "config", "c", defaultConfig, "configuration `file`")
	fl.StringVar(&g.socket, "socket", "", "control `socket` of the instance (default \""+client.DefaultSocket+"\", or what the given configuration says)")
	fl.StringVarP(&g.stateDir, "state-dir", "D", defaultStateDir, "`directory` for what outlives the daemon, such as fake IPs")
	fl.StringVarP(&g.output, "output", "o", "table", "`format` of what is printed: table, json, csv")
	fl.StringVar(&g.logLevel, "log-level", "", "least severe message that is logged: debug, info, warn, error (default: the configuration's)")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		g.configGiven = cmd.Flags().Changed("config")
		return g.checkFlags()
	}
	root.AddCommand(
		newUpCommand(g), newDownCommand(g), newCleanupCommand(g), newRunCommand(g), newAttachCommand(g), newDetachCommand(g), newReloadCommand(g),
		newStatusCommand(g), newFlowsCommand(g), newAppsCommand(g), newContextsCommand(g), newUpstreamsCommand(g), newStatsCommand(g), newExplainCommand(g), newDNSCommand(g),
		newCheckCommand(g), newFmtCommand(g), newSchemaCommand(), newInitCommand(g), newHealthcheckCommand(g), newGuardCommand(g), newLeaktestCommand(g),
		newServeCommand(g), newHoldCommand(), newForwardCommand(g), newDemoCommand(),
		newCompletionCommand(), newManCommand(), newVersionCommand(g),
	)
	root.InitDefaultHelpCmd()
	g.markUsage(root)
	return root
}

// markUsage makes every error before a command begins one about usage, and notes when it begins.
func (g *globals) markUsage(cmd *cobra.Command) {
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			g.started = true
			return run(cmd, args)
		}
	}
	for _, c := range cmd.Commands() {
		g.markUsage(c)
	}
}

func (g *globals) checkFlags() error {
	switch g.output {
	case "table", "json", "csv":
	default:
		return usageError("--output %q is none of table, json, csv", g.output)
	}
	switch g.logLevel {
	case "", "debug", "info", "warn", "error":
	default:
		return usageError("--log-level %q is none of debug, info, warn, error", g.logLevel)
	}
	return nil
}

// flagError is the error of a flag, without the name of the function that has not understood its value.
func flagError(err error) error {
	var num *strconv.NumError
	if !errors.As(err, &num) {
		return err
	}
	return errors.New(strings.Replace(err.Error(), num.Error(), num.Err.Error(), 1))
}

// execute runs one command line and returns the exit code, having told stderr of an error.
func execute(g *globals, args []string, stdout, stderr io.Writer) int {
	root := newRootCommand(g)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(context.Background())
	if err == nil {
		return exitOK
	}
	code := exitCode(err)
	if !g.started {
		code = max(code, exitUsage)
		if cmd.Name() == "run" {
			code = exitRunFailed
		}
	}
	report(stderr, cmd, err, code, !g.started)
	return code
}

// instance returns the control socket of the daemon that is meant: --socket, else what a configuration given by -c says, else the default.
// A configuration that cannot be read is an error: to stop another daemon than the one that is meant is worse than to stop none.
func (g *globals) instance() (string, error) {
	if g.socket != "" || !g.configGiven {
		return cmp.Or(g.socket, client.DefaultSocket), nil
	}
	data, err := os.ReadFile(g.config)
	if err != nil {
		return "", exitError{exitConfig, fmt.Errorf("%w; it would say where the daemon listens: give --socket instead", err)}
	}
	// Not config.Parse: what the daemon was given besides (its environment, files of root) need not be there for the caller.
	var cfg struct {
		Control struct {
			Socket string `json:"socket"`
		} `json:"control"`
	}
	plain, err := hujson.Standardize(data)
	if err == nil {
		err = json.Unmarshal(plain, &cfg)
	}
	if err != nil {
		return "", exitError{exitConfig, fmt.Errorf("%s: %w; it would say where the daemon listens: give --socket instead", g.config, err)}
	}
	return cmp.Or(cfg.Control.Socket, client.DefaultSocket), nil
}

// socketPath is instance for those who can do without a daemon.
func (g *globals) socketPath() string {
	socket, err := g.instance()
	if err != nil {
		return client.DefaultSocket
	}
	return socket
}

// socketOf returns where a daemon with this configuration shall listen.
func (g *globals) socketOf(cfg *config.Config) string {
	if g.socket != "" {
		return g.socket
	}
	return cfg.Control.Socket
}

// ask calls the daemon, with a bound on the time it may take, and a shorter one if it shows no sign of life.
func (g *globals) ask(cmd *cobra.Command, limit time.Duration, call func(context.Context, *client.Client) error) error {
	socket, err := g.instance()
	if err != nil {
		return err
	}
	c := client.New(socket)
	defer c.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), limit)
	defer cancel()
	return attended(ctx, c, call)
}

// watch calls the daemon until Ctrl-C, which ends ctx.
func (g *globals) watch(cmd *cobra.Command, call func(ctx context.Context, c *client.Client) error) error {
	socket, err := g.instance()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	c := client.New(socket)
	defer c.Close()
	return attended(ctx, c, call)
}

// examples indents the lines of an Example as cobra expects them.
func examples(lines ...string) string { return "  " + strings.Join(lines, "\n  ") }
