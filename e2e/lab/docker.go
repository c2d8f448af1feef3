// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Docker is a dockerd of its own on the client, with everything it has in the lab's directory and namespaces.
type Docker struct {
	lab    *Lab
	host   string
	proc   *Proc
	images string
}

// Docker starts a dockerd, and removes all it has made at the end.
func (l *Lab) Docker(t *testing.T) *Docker {
	t.Helper()
	for _, p := range []string{"dockerd", "docker", "docker-compose", "iptables"} {
		_, err := exec.LookPath(p)
		Require(t, err == nil, p)
	}
	dir := filepath.Join(l.Dir, "d")
	d := &Docker{lab: l, host: "unix://" + dir + "/s", images: dir}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.Client.Sysctl(map[string]string{"net/ipv4/ip_forward": "1"}); err != nil {
		t.Fatal(err)
	}
	d.proc = Start(t, "dockerd", l.Client.Command("dockerd", "--data-root", dir+"/data", "--exec-root", dir+"/exec", "-H", d.host, "-p", dir+"/pid",
		"--bip", "172.30.0.1/24", "--dns", LANV4.String(), "--default-address-pool", "base=172.31.0.0/16,size=24"))
	t.Cleanup(func() {
		if r := d.Run(t, "docker", "ps", "-aq"); strings.TrimSpace(r.Stdout) != "" {
			d.Run(t, append([]string{"docker", "rm", "-f"}, strings.Fields(r.Stdout)...)...)
		}
		d.proc.Stop()
	})
	Eventually(t, 30*time.Second, "dockerd answers", func() bool { return d.Run(t, "docker", "version").Code == 0 })
	return d
}

// Host is what DOCKER_HOST is for this daemon.
func (d *Docker) Host() string { return d.host }

// Run runs docker, docker-compose or anything else against this daemon.
func (d *Docker) Run(t *testing.T, args ...string) Result {
	t.Helper()
	return d.RunEnv(t, nil, args...)
}

// RunEnv is Run with more environment.
func (d *Docker) RunEnv(t *testing.T, env []string, args ...string) Result {
	t.Helper()
	cmd := d.lab.Client.Command(args...)
	// Another client that lies before Debian's on the path would do as well: the API is the same.
	cmd.Env = append(append(os.Environ(), "DOCKER_HOST="+d.host, "DOCKER_CONFIG="+d.images), env...)
	return Exec(t, cmd)
}

// Must is RunEnv that ends the test on failure, and returns what was printed.
func (d *Docker) Must(t *testing.T, env []string, args ...string) string {
	t.Helper()
	r := d.RunEnv(t, env, args...)
	if r.Code != 0 {
		t.Fatalf("%s: %v", strings.Join(args, " "), r)
	}
	return strings.TrimSpace(r.Stdout)
}

// Image builds the image of packaging/Dockerfile from the tested binary.
func (d *Docker) Image(t *testing.T, name string) {
	t.Helper()
	b, err := os.ReadFile(Binary(t))
	if err != nil {
		t.Fatal(err)
	}
	context := filepath.Join(d.images, "image")
	if err := os.MkdirAll(context, 0o755); err != nil {
		t.Fatal(err)
	}
	for file, data := range map[string][]byte{"mprox": b, "ca-certificates.crt": []byte("# none\n")} {
		if err := os.WriteFile(filepath.Join(context, file), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	dockerfile, err := filepath.Abs("../packaging/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	d.Must(t, nil, "docker", "build", "-q", "-t", name, "-f", dockerfile, context)
}

// ImageOf makes an image of programs of this machine with the libraries that they need.
func (d *Docker) ImageOf(t *testing.T, name string, programs ...string) {
	t.Helper()
	script := fmt.Sprintf(`set -e
files=""
for p in %s; do p=$(command -v $p); files="$files $p $(ldd $p | grep -o '/[^ ]*' || true)"; done
tar -chf - --ignore-failed-read $(for f in $files; do readlink -m / >/dev/null; echo $f; done | sort -u) 2>/dev/null | docker import -c 'ENV PATH=/usr/bin:/bin' - %s`,
		strings.Join(programs, " "), name)
	d.Must(t, nil, "bash", "-c", script)
}
