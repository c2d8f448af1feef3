// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// MakeCgroup makes a cgroup of the machine, given by its path below the mount, and returns its directory. It goes with the test.
func (l *Lab) MakeCgroup(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(cgroupRoot(), name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		Eventually(t, 5*time.Second, "the cgroup is empty", func() bool { err := os.Remove(dir); return err == nil || os.IsNotExist(err) })
	})
	return dir
}

// InCgroup returns a command that will run in the client's namespace and in a cgroup, given by its directory, from its first instruction on.
func (l *Lab) InCgroup(dir string, args ...string) *exec.Cmd {
	return l.Client.Command(append([]string{"sh", "-c", `echo $$ > "$0/cgroup.procs" && exec "$@"`, dir}, args...)...)
}

// cgroupRoot finds the mount of cgroup v2: it is not everywhere the same.
func cgroupRoot() string {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		if fields := strings.Fields(before); ok && len(fields) > 4 && strings.HasPrefix(after, "cgroup2 ") {
			return fields[4]
		}
	}
	return ""
}
