// SPDX-License-Identifier: GPL-3.0-or-later

// Package e2e tests the program as its users see it: closed networks of namespaces, real servers, real clients, and a capture of what
// leaves. The lab they run in is package lab. They need root; what they need besides is installed by setup.sh.
package e2e

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

func TestMain(m *testing.M) {
	lab.Helper()
	code := m.Run()
	lab.RemoveBinary()
	os.Exit(code)
}

// curl runs curl in the client's namespace and returns what it printed and its exit status.
func curl(t *testing.T, l *lab.Lab, args ...string) lab.Result {
	t.Helper()
	return lab.Exec(t, l.Client.Command(append([]string{"curl", "-sS", "-m", "15"}, args...)...))
}

// mustCurl fetches from the origin and fails the test if that fails.
func mustCurl(t *testing.T, l *lab.Lab, args ...string) string {
	t.Helper()
	r := curl(t, l, args...)
	if r.Code != 0 {
		t.Errorf("curl %s: %v", strings.Join(args, " "), r)
	}
	return r.Stdout
}

// originURL is a URL at the origin.
func originURL(v6 bool, path string) string {
	if v6 {
		return fmt.Sprintf("http://[%s]%s", lab.OriginV6, path)
	}
	return fmt.Sprintf("http://%s%s", lab.OriginV4, path)
}

// ofSocket calls f with the descriptor of a connection.
func ofSocket(t *testing.T, c syscall.Conn, f func(fd int) error) {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var ferr error
	if err := errors.Join(rc.Control(func(fd uintptr) { ferr = f(int(fd)) }), ferr); err != nil {
		t.Fatal(err)
	}
}

// within runs f and fails the test if it takes longer than d.
func within(t *testing.T, d time.Duration, what string, f func()) {
	t.Helper()
	started := time.Now()
	f()
	if took := time.Since(started); took > d {
		t.Errorf("%s took %v, more than %v", what, took, d)
	}
}
