// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// pysocks speaks TCP by each protocol, and UDP, through a server, with Debian's python3-socks.
const pysocks = `
import socket, socks, sys
host, port, user, password = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
origin, name, closed = sys.argv[5], sys.argv[6], 9099
def proxied(kind, typ=socket.SOCK_STREAM, rdns=True):
    s = socks.socksocket(socket.AF_INET, typ)
    s.settimeout(10)
    auth = {} if kind == socks.SOCKS4 else dict(username=user, password=password)
    s.set_proxy(kind, host, port, rdns, **auth)
    return s
for kind in ([socks.SOCKS5, socks.HTTP] if user else [socks.SOCKS5, socks.SOCKS4, socks.HTTP]):
    for dst in (origin, name):
        s = proxied(kind)
        s.connect((dst, 7))
        s.sendall(b"x" * 200000)
        s.shutdown(socket.SHUT_WR)
        n = 0
        while True:
            b = s.recv(65536)
            if not b: break
            n += len(b)
        assert n == 200000, n
    s = proxied(kind)
    try:
        s.connect((origin, closed))
        raise SystemExit("connected to a closed port")
    except socks.ProxyError as e:
        print("closed:", e)
s = proxied(socks.SOCKS5, socket.SOCK_DGRAM)
for dst in (origin, name):
    s.sendto(b"datagram", (dst, 7))
    b, who = s.recvfrom(2000)
    assert b == b"datagram", b
print("ok")
`

// TestServeClients drives `mprox serve` with the clients that people have.
func TestServeClients(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	l.Unbound(t)
	open := l.Serve(t, 1086)
	users := l.File("users", "# who may\nbob:hunter2\n"+lab.User+":"+lab.Password+"\n")
	if err := os.Chmod(users, 0o600); err != nil {
		t.Fatal(err)
	}
	closed := l.Serve(t, 1087, "--password-file", users)
	closed.Pass = lab.Password
	ssh := l.SSHD(t, l.OriginNS, netip.AddrPortFrom(lab.OriginV4, 22))

	t.Run("curl", func(t *testing.T) { serveCurl(t, l, open, closed) })
	t.Run("ssh", func(t *testing.T) { serveSSH(t, l, ssh) })
	t.Run("pysocks", func(t *testing.T) {
		for _, s := range []*lab.Server{open, closed} {
			user := ""
			if s.Pass != "" {
				user = lab.User
			}
			r := lab.Exec(t, l.Client.Command("/usr/bin/python3", "-c", pysocks, s.Addr.Addr().String(), fmt.Sprint(s.Addr.Port()), user, s.Pass,
				lab.OriginV4.String(), "v4.example.test"))
			if r.Code != 0 || !strings.HasSuffix(r.Stdout, "ok\n") || !strings.Contains(r.Stdout, "refused") {
				t.Errorf("%s: %v", s.Name, r)
			}
		}
	})
	t.Run("chromium", func(t *testing.T) { serveChromium(t, l) })
	if bad := l.Origin.AllFrom(lab.ExitV4, lab.ExitV6); len(bad) > 0 {
		t.Errorf("reached the origin without the proxy: %v", bad)
	}
	for _, s := range []*lab.Server{open, closed} {
		if strings.Contains(s.Log.String(), lab.Password) || strings.Contains(s.Log.String(), url.QueryEscape(lab.Password)) {
			t.Errorf("%s: the password is in the log", s.Name)
		}
		s.Stop()
		if code := s.Wait(0); code != 0 {
			t.Errorf("%s: exit %d", s.Name, code)
		}
	}
}

// serveCurl uses every scheme of curl's -x, with and without users.
func serveCurl(t *testing.T, l *lab.Lab, open, closed *lab.Server) {
	t.Helper()
	for _, scheme := range []string{"socks4", "socks4a", "socks5", "socks5h", "http"} {
		for _, host := range []string{lab.OriginV4.String(), "[" + lab.OriginV6.String() + "]", "www.example.test"} {
			byName := scheme == "socks4a" || scheme == "socks5h" || scheme == "http"
			if strings.HasPrefix(scheme, "socks4") && host[0] == '[' || host == "www.example.test" && !byName {
				continue // SOCKS4 has no IPv6; and the client's own resolver knows no names
			}
			for _, s := range []*lab.Server{open, closed} {
				args := []string{"-x", s.URLAs(scheme), "http://" + host + "/bytes/1000000"}
				if scheme == "http" { // once without a tunnel, as clients do it for http://
					if r := curl(t, l, args...); len(r.Stdout) != 1_000_000 {
						t.Errorf("%s %s %s: exit %d, %d bytes, %s", s.Name, scheme, host, r.Code, len(r.Stdout), r.Stderr)
					}
					args = append(args, "-p")
				}
				r := curl(t, l, args...)
				if s == closed && strings.HasPrefix(scheme, "socks4") {
					if r.Code == 0 {
						t.Errorf("%s %s: SOCKS4 gets past the password", scheme, host)
					}
					continue
				}
				if r.Code != 0 || len(r.Stdout) != 1_000_000 {
					t.Errorf("%s %s %s: exit %d, %d bytes, %s", s.Name, scheme, host, r.Code, len(r.Stdout), r.Stderr)
				}
			}
		}
		if r := curl(t, l, "-p", "-x", scheme+"://alice:wrong@"+closed.Addr.String(), originURL(false, "/")); r.Code == 0 {
			t.Errorf("%s: a wrong password is taken", scheme)
		}
		for _, dst := range []string{"127.0.0.1:1086", "0.0.0.0:1086", "169.254.169.254:80"} { // the proxy host's own services
			if r := curl(t, l, "-p", "-x", open.URLAs(scheme), "http://"+dst+"/"); r.Code == 0 || r.Code == 28 {
				t.Errorf("%s reaches %s: %v", scheme, dst, r)
			}
		}
	}
	for _, how := range []string{"--proxy-basic", "--proxy-digest", "--proxy-anyauth"} {
		for range 2 {
			if r := curl(t, l, how, "-p", "-x", closed.URLAs("http"), originURL(true, "/bytes/10")); len(r.Stdout) != 10 {
				t.Errorf("%s: %v", how, r)
			}
		}
	}
	if r := curl(t, l, "-p", "-x", "http://bob:hunter2@"+closed.Addr.String(), originURL(false, "/bytes/10")); len(r.Stdout) != 10 {
		t.Errorf("the other user: %v", r)
	}
}

// serveSSH reaches the origin's sshd through each of the usual ProxyCommands. Not ncat with a password over HTTP: it takes the first Digest
// that is offered, which is SHA-256, and knows MD5 alone.
func serveSSH(t *testing.T, l *lab.Lab, ssh []string) {
	t.Helper()
	at := netip.AddrPortFrom(lab.ProxyV4, 1086)
	for _, command := range []string{
		"nc.openbsd -X 5 -x " + at.String() + " %h %p", "nc.openbsd -X 4 -x " + at.String() + " %h %p", "nc.openbsd -X connect -x " + at.String() + " %h %p",
		"ncat --proxy " + at.String() + " --proxy-type socks5 %h %p", "ncat --proxy " + at.String() + " --proxy-type socks4 %h %p",
		"ncat --proxy " + at.String() + " --proxy-type http %h %p",
		"ncat --proxy 203.0.113.10:1087 --proxy-type socks5 --proxy-auth bob:hunter2 %h %p",
		"connect-proxy -S " + at.String() + " %h %p", "connect-proxy -4 -S " + at.String() + " %h %p", "connect-proxy -H " + at.String() + " %h %p",
		"socat - SOCKS4A:203.0.113.10:%h:%p,socksport=1086", "socat - PROXY:203.0.113.10:%h:%p,proxyport=1086",
		"socat - PROXY:203.0.113.10:%h:%p,proxyport=1087,proxyauth=bob:hunter2",
	} {
		args := append(append([]string{}, ssh...), "-o", "ConnectTimeout=10", "-o", "ProxyCommand="+command, "root@"+lab.OriginV4.String(),
			"head -c 300000 /dev/zero | wc -c")
		if r := lab.Exec(t, l.Client.Command(args...)); r.Code != 0 || strings.TrimSpace(r.Stdout) != "300000" {
			t.Errorf("%s: %v", command, r)
		}
	}
}

// serveChromium loads a page with a browser.
func serveChromium(t *testing.T, l *lab.Lab) {
	t.Helper()
	for _, scheme := range []string{"socks5", "socks4", "http"} {
		host := "www.example.test"
		if scheme == "socks4" {
			host = lab.OriginV4.String()
		}
		dir := filepath.Join(l.Dir, "chromium-"+scheme)
		cmd := l.Client.Command("timeout", "40", "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
			"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--user-data-dir="+dir,
			"--proxy-server="+scheme+"://203.0.113.10:1086", "--dump-dom", "http://"+host+"/page")
		begin := time.Now()
		if r := lab.Exec(t, cmd); r.Code != 0 || !strings.Contains(r.Stdout, "this is "+host) {
			t.Errorf("%s: %v", scheme, r)
		}
		t.Logf("chromium %s: %v", scheme, time.Since(begin).Round(time.Millisecond))
	}
}
