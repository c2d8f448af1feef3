// SPDX-License-Identifier: GPL-3.0-or-later

package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
)

// maxSecret is the largest password or token file in bytes.
const maxSecret = 64 << 10

// Load reads the configuration file at path, merges config.ENV.json over it if env is not empty (JSON Merge Patch, RFC 7396), checks the
// whole and reads the files that hold passwords and tokens. The error is an Errors that holds everything that is wrong; it wraps
// fs.ErrNotExist if the file does not exist. The checks of other packages run together with config's own.
func Load(path, env string, checks ...Check) (*Config, error) {
	modes := make(map[string]fs.FileMode)
	tree, errs := loadTree(path, modes)
	if env != "" {
		patchPath, err := envPath(path, env)
		if err != nil {
			return nil, append(errs, &Error{File: path, Msg: err.Error()})
		}
		patch, patchErrs := loadTree(patchPath, modes)
		errs = append(errs, patchErrs...)
		if tree != nil && patch != nil {
			tree = merge(tree, patch)
		}
	}
	if tree == nil || env != "" && len(modes) < 2 {
		return nil, errs.sorted()
	}
	c, d := decode(tree, os.LookupEnv)
	errs = append(errs, d.errs...)
	errs = append(errs, checkModes(d.secrets, modes)...)
	errs = append(errs, c.readSecrets()...)
	errs = c.checkAll(errs, checks)
	if err := errs.errorOrNil(); err != nil {
		return nil, err
	}
	return c, nil
}

// Parse checks one text; name is used in error messages. ${NAME} is expanded from the environment of this process, so the text must come
// from someone who may know it. Files that hold passwords are not read: Load does that. The error is an Errors.
func Parse(name string, data []byte, checks ...Check) (*Config, error) {
	return parse(name, data, os.LookupEnv, checks)
}

func parse(name string, data []byte, getenv func(string) (string, bool), checks []Check) (*Config, error) {
	tree, errs := parseTree(newSource(name, data))
	if tree == nil {
		return nil, errs
	}
	c, d := decode(tree, getenv)
	errs = c.checkAll(append(errs, d.errs...), checks)
	if err := errs.errorOrNil(); err != nil {
		return nil, err
	}
	return c, nil
}

// checkAll adds the errors of the later stages to those of decoding.
func (c *Config) checkAll(errs Errors, checks []Check) Errors {
	errs = append(errs, c.validate().without(errs)...)
	for _, check := range checks {
		errs = append(errs, Errors(check(c)).without(errs)...)
	}
	return errs
}

func decode(tree *node, getenv func(string) (string, bool)) (*Config, *decoder) {
	c := &Config{tree: tree}
	d := &decoder{getenv: getenv}
	d.object("$", tree, reflect.ValueOf(c).Elem())
	c.nameDevices()
	return c, d
}

// loadTree reads and parses one file, and notes its mode.
func loadTree(path string, modes map[string]fs.FileMode) (*node, Errors) {
	f, err := os.Open(path)
	if err != nil {
		return nil, Errors{fileError(path, err)}
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, Errors{fileError(path, err)}
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, Errors{fileError(path, err)}
	}
	modes[path] = info.Mode()
	return parseTree(newSource(path, data))
}

// fileError says what cannot be done with a file, naming the file once.
func fileError(path string, err error) *Error {
	e := &Error{File: path, Msg: err.Error(), cause: err}
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		e.Msg = pe.Err.Error()
	}
	return e
}

// envPath returns the path of the file that is merged over path: config.json and prod make config.prod.json.
func envPath(path, env string) (string, error) {
	if ok, err := regexp.MatchString(`^[A-Za-z0-9][A-Za-z0-9_-]*$`, env); err != nil || !ok {
		return "", fmt.Errorf("environment %q: use letters, digits, - and _", env)
	}
	ext := filepath.Ext(path)
	return strings.TrimSuffix(path, ext) + "." + env + ext, nil
}

// checkModes refuses secrets in clear text inside files that everyone on the machine can read.
func checkModes(secrets []*node, modes map[string]fs.FileMode) Errors {
	var errs Errors
	for _, n := range secrets {
		if modes[n.src.name].Perm()&0o004 == 0 {
			continue
		}
		line, col := n.src.position(n.off)
		errs = append(errs, &Error{
			File: n.src.name, Line: line, Column: col,
			Msg: "a secret in a file that everyone can read", Hint: "run: chmod 600 " + n.src.name,
		})
	}
	return errs
}

// readSecrets fills Password and Token from their files, so that nothing after Load needs to read them.
func (c *Config) readSecrets() Errors {
	var errs Errors
	read := func(path, file string, into *Secret) {
		if file == "" || *into != "" {
			return // validate reports what is given twice
		}
		s, err := readSecret(file)
		if err != nil {
			errs = append(errs, c.errorAt(path, fmt.Sprintf("%s: %v", file, err), ""))
			return
		}
		*into = s
	}
	for _, name := range slices.Sorted(maps.Keys(c.Upstreams)) {
		u := c.Upstreams[name]
		at := joinKey("$.upstreams", name) + ".auth"
		u.Auth.fromFile = u.Auth.Password == "" && u.Auth.Token == ""
		read(at+".password_file", u.Auth.PasswordFile, &u.Auth.Password)
		read(at+".token_file", u.Auth.TokenFile, &u.Auth.Token)
		c.Upstreams[name] = u
	}
	return errs
}

// readSecret returns the first line of a file.
func readSecret(path string) (Secret, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fileError("", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	switch {
	case err != nil:
		return "", fileError("", err)
	case len(data) > maxSecret:
		return "", fmt.Errorf("larger than %d KiB", maxSecret>>10)
	}
	line, _, _ := strings.Cut(string(data), "\n")
	line = strings.TrimSuffix(line, "\r")
	if line == "" {
		return "", errors.New("the first line is empty")
	}
	return Secret(line), nil
}

// ErrorAt gives an error that another package found at a JSON path its position in the text. hint may be empty.
func (c *Config) ErrorAt(path string, err error, hint string) *Error {
	e := c.errorAt(path, err.Error(), hint)
	e.cause = err
	return e
}

func (c *Config) errorAt(path, msg, hint string) *Error {
	e := &Error{Path: path, Msg: msg, Hint: hint}
	if c.flags {
		e.Path = flagOf(path)
	}
	if c.tree == nil {
		return e
	}
	n, _ := c.tree.find(path)
	e.File = n.src.name
	e.Line, e.Column = n.src.position(n.off)
	return e
}

// errorAtKey is errorAt with the position of the key instead of the value.
func (c *Config) errorAtKey(path, msg, hint string) *Error {
	e := c.errorAt(path, msg, hint)
	if c.tree == nil {
		return e
	}
	if _, m := c.tree.find(path); m != nil {
		e.File = m.keySrc.name
		e.Line, e.Column = m.keySrc.position(m.keyOff)
	}
	return e
}
