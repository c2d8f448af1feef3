// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

const (
	// maxPassword is what SOCKS5 can carry of a user name and of a password (RFC 1929).
	maxPassword = 255
	// maxUsers bounds a file of users: each authentication compares with all of them.
	maxUsers = 4096
	// maxUserFile holds that many users with names and passwords of full length.
	maxUserFile = maxUsers * (2*maxPassword + 3)
)

// readUsers reads a file of passwords. With a user, its first line is that user's password; without, each line is USER:PASSWORD, and empty
// lines and those that begin with # do not count. A file that others may write is refused: they could let themselves in. readable
// reports that others may read it. Errors never repeat what is in it.
func readUsers(path, user string) (users map[string]string, readable bool, err error) {
	if len(user) > maxPassword || strings.Contains(user, ":") {
		return nil, false, fmt.Errorf("--user has at most %d bytes and no colon", maxPassword)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, false, fmt.Errorf("--password-file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, false, fmt.Errorf("--password-file: %w", err)
	}
	if info.Mode().IsRegular() && info.Mode().Perm()&0o022 != 0 {
		return nil, false, fmt.Errorf("--password-file %s: others than its owner may write it (run: chmod 600 %s)", path, path)
	}
	readable = info.Mode().IsRegular() && info.Mode().Perm()&0o004 != 0
	data, err := io.ReadAll(io.LimitReader(f, maxUserFile+1))
	if err == nil && len(data) > maxUserFile {
		err = errors.New("too large")
	}
	if err == nil && user != "" {
		line, _, _ := strings.Cut(string(data), "\n")
		users = make(map[string]string)
		err = addUser(users, user, strings.TrimSuffix(line, "\r"), 1)
	} else if err == nil {
		users, err = parseUsers(string(data))
	}
	if err != nil {
		return nil, false, fmt.Errorf("--password-file %s: %w", path, err)
	}
	return users, readable, nil
}

func parseUsers(text string) (map[string]string, error) {
	users := make(map[string]string)
	n := 0
	for line := range strings.SplitSeq(text, "\n") {
		n++
		line = strings.TrimSuffix(line, "\r")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, password, ok := strings.Cut(line, ":")
		if !ok {
			return nil, fmt.Errorf("line %d: not USER:PASSWORD (a file with one password alone goes with --user)", n)
		}
		if err := addUser(users, name, password, n); err != nil {
			return nil, err
		}
	}
	if len(users) == 0 {
		return nil, errors.New("no user in it")
	}
	return users, nil
}

func addUser(users map[string]string, name, password string, line int) error {
	_, known := users[name]
	switch {
	case name == "" || len(name) > maxPassword:
		return fmt.Errorf("line %d: a user name has 1 to %d bytes", line, maxPassword)
	case password == "" || len(password) > maxPassword:
		return fmt.Errorf("line %d: a password has 1 to %d bytes", line, maxPassword)
	case known:
		return fmt.Errorf("line %d: the user is there already", line)
	case len(users) >= maxUsers:
		return fmt.Errorf("more than %d users", maxUsers)
	}
	users[name] = password
	return nil
}
