// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// User and Password are what the servers with authentication want. The password has characters that must be percent-encoded in a URL.
const (
	User     = "alice"
	Password = "p@ss:w/rd#1"
)

// Server is a running proxy server.
type Server struct {
	*Proc
	Name   string
	Scheme string // for URLs
	Addr   netip.AddrPort
	Pass   string // of User; "" = the server asks for none
	UDP    bool   // it carries UDP
	IPv6   bool   // it reaches IPv6 destinations
	// HalfClose: it carries the end of one direction and keeps the other; TestServers shows which do.
	HalfClose bool
	Options   string // of the URL, after the ?
	start     func() *Proc
}

// URL is the proxy URL of the server.
func (s *Server) URL() string {
	u := url.URL{Scheme: s.Scheme, Host: s.Addr.String()}
	if s.Pass != "" {
		u.User = url.UserPassword(User, s.Pass)
	}
	if s.Options != "" {
		return u.String() + "?" + s.Options
	}
	return u.String()
}

// URLAs is the URL with another scheme, e.g. socks5 instead of socks5h.
func (s *Server) URLAs(scheme string) string {
	c := *s
	c.Scheme = scheme
	return c.URL()
}

// Restart starts the server anew, after it was killed.
func (s *Server) Restart() { s.Proc = s.start() }

// Connect opens a connection to dst through the server, from a namespace, by a client of a few lines: to find out what a server does.
func (s *Server) Connect(n *NS, dst netip.AddrPort) (net.Conn, error) {
	c, err := n.Dial("tcp", s.Addr.String(), 5*time.Second)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if err := s.handshake(c, dst); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (s *Server) handshake(c net.Conn, dst netip.AddrPort) error {
	if s.Scheme == "http" {
		auth := base64.StdEncoding.EncodeToString([]byte(User + ":" + s.Pass))
		fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\nProxy-Authorization: Basic %s\r\n\r\n", dst, dst, auth)
		head := ""
		for b := make([]byte, 1); !strings.HasSuffix(head, "\r\n\r\n"); head += string(b) {
			if _, err := io.ReadFull(c, b); err != nil {
				return err
			}
		}
		if !strings.Contains(head, " 200 ") {
			return fmt.Errorf("%s: %q", s.Name, head)
		}
		return nil
	}
	method, greeting := byte(0), []byte{5, 1, 0}
	if s.Pass != "" {
		method, greeting = 2, []byte{5, 1, 2}
	}
	b := make([]byte, 64)
	_, _ = c.Write(greeting)
	if _, err := io.ReadFull(c, b[:2]); err != nil || b[1] != method {
		return fmt.Errorf("%s: method %v %w", s.Name, b[:2], err)
	}
	if s.Pass != "" {
		_, _ = c.Write(append(append([]byte{1, byte(len(User))}, User...), append([]byte{byte(len(s.Pass))}, s.Pass...)...))
		if _, err := io.ReadFull(c, b[:2]); err != nil || b[1] != 0 {
			return fmt.Errorf("%s: authentication %v %w", s.Name, b[:2], err)
		}
	}
	atyp := byte(1)
	if dst.Addr().Is6() {
		atyp = 4
	}
	req := append([]byte{5, 1, 0, atyp}, dst.Addr().AsSlice()...)
	_, _ = c.Write(append(req, byte(dst.Port()>>8), byte(dst.Port())))
	if _, err := io.ReadFull(c, b[:4]); err != nil || b[1] != 0 {
		return fmt.Errorf("%s: reply %v %w", s.Name, b[:4], err)
	}
	rest := map[byte]int{1: 6, 4: 18}[b[3]]
	_, err := io.ReadFull(c, b[:rest])
	return err
}

// accounts returns /etc/passwd and /etc/shadow for the proxy host: the machine's, and the user that dante and sshd know.
func accounts() (passwd, shadow string) {
	pw, _ := os.ReadFile("/etc/passwd")
	hash, err := exec.Command("openssl", "passwd", "-6", "-salt", "mprox", Password).Output()
	if err != nil {
		hash = []byte("*\n")
	}
	keep := func(b []byte) string {
		var out []string
		for line := range strings.SplitSeq(strings.TrimSpace(string(b)), "\n") {
			if !strings.HasPrefix(line, User+":") {
				out = append(out, line)
			}
		}
		return strings.Join(out, "\n") + "\n"
	}
	sh, _ := os.ReadFile("/etc/shadow")
	passwd = keep(pw) + User + ":x:64001:65534::/nonexistent:/bin/sh\n"
	shadow = keep(sh) + User + ":" + strings.TrimSpace(string(hash)) + ":19000:0:99999:7:::\n"
	return passwd, shadow
}

// program returns the path of a server of the distribution.
func program(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range []string{"/usr/sbin", "/usr/bin", "/usr/lib/squid", "/sbin", "/bin"} {
		p := filepath.Join(dir, name)
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	t.Fatalf("%s is not installed: run e2e/setup.sh", name)
	return ""
}

// serve starts a server on the proxy host and waits until its port answers.
func (l *Lab) serve(t *testing.T, s *Server, args ...string) *Server {
	t.Helper()
	s.start = func() *Proc {
		t.Helper()
		p := Start(t, s.Name, l.Proxy.Command(args...))
		Eventually(t, 15*time.Second, s.Name+" listens on "+s.Addr.String(), func() bool {
			if p.Exited() {
				t.Fatalf("%s ended at once:\n%s", s.Name, p.Log)
			}
			return answers(l.Proxy, s.Addr)
		})
		return p
	}
	s.Proc = s.start()
	return s
}

func answers(n *NS, a netip.AddrPort) bool {
	c, err := n.Dial("tcp", a.String(), time.Second)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

// Dante starts a SOCKS5 server that carries TCP and UDP over both families.
func (l *Lab) Dante(t *testing.T, port uint16, auth bool) *Server {
	t.Helper()
	return l.DanteVia(t, port, auth, "eth1")
}

// DanteVia is Dante with an external interface or address of its own: an IPv4 address alone makes an upstream without IPv6.
func (l *Lab) DanteVia(t *testing.T, port uint16, auth bool, external string) *Server {
	t.Helper()
	return l.dante(t, netip.AddrPortFrom(ProxyV4, port), auth, external)
}

// DanteAt is Dante at another address of the proxy host.
func (l *Lab) DanteAt(t *testing.T, at netip.AddrPort) *Server {
	t.Helper()
	return l.dante(t, at, false, "eth1")
}

func (l *Lab) dante(t *testing.T, at netip.AddrPort, auth bool, external string) *Server {
	t.Helper()
	method, pass := "none", ""
	if auth {
		method, pass = "username", Password
	}
	var b strings.Builder
	fmt.Fprintf(&b, "logoutput: stderr\ninternal: %s port = %d\nexternal: %s\nsocksmethod: %s\nclientmethod: none\n", at.Addr(), at.Port(), external, method)
	b.WriteString("user.privileged: root\nuser.unprivileged: nobody\ntimeout.connect: 5\n")
	for _, fam := range []string{"0.0.0.0/0", "::/0"} {
		fmt.Fprintf(&b, "client pass {\n from: %s to: 0.0.0.0/0\n log: error\n}\n", fam)
		fmt.Fprintf(&b, "client pass {\n from: %s to: ::/0\n log: error\n}\n", fam)
	}
	for _, from := range []string{"0.0.0.0/0", "::/0"} {
		for _, to := range []string{"0.0.0.0/0", "::/0"} {
			fmt.Fprintf(&b, "socks pass {\n from: %s to: %s\n command: bind connect udpassociate\n log: error\n}\n", from, to)
			fmt.Fprintf(&b, "socks pass {\n from: %s to: %s\n command: bindreply udpreply\n log: error\n}\n", from, to)
		}
	}
	name := fmt.Sprintf("dante-%s-%d", at.Addr(), at.Port())
	conf := l.File(name+".conf", b.String())
	return l.serve(t, &Server{
		Name: name, Scheme: "socks5h", Addr: at, Pass: pass, UDP: true, IPv6: true, HalfClose: true,
	}, program(t, "danted"), "-f", conf, "-N", "2", "-p", filepath.Join(l.Dir, name+".pid"))
}

// Microsocks starts a SOCKS5 server with user and password, TCP only.
func (l *Lab) Microsocks(t *testing.T, port uint16) *Server {
	t.Helper()
	return l.serve(t, &Server{
		Name: "microsocks", Scheme: "socks5h", Addr: netip.AddrPortFrom(ProxyV4, port), Pass: Password, IPv6: true,
	}, program(t, "microsocks"), "-i", ProxyV4.String(), "-p", fmt.Sprint(port), "-u", User, "-P", Password)
}

// Squid starts an HTTP proxy with Basic authentication.
func (l *Lab) Squid(t *testing.T, port uint16) *Server {
	t.Helper()
	return l.squid(t, &Server{Name: "squid", Scheme: "http", Pass: Password}, port, fmt.Sprintf("http_port 0.0.0.0:%d\n", port)+l.squidBasic(t))
}

// Tinyproxy starts an HTTP proxy with Basic authentication.
func (l *Lab) Tinyproxy(t *testing.T, port uint16) *Server {
	t.Helper()
	conf := l.File("tinyproxy.conf", fmt.Sprintf("Port %d\nListen %s\nTimeout 600\nMaxClients 100\nBasicAuth %s %s\nLogLevel Warning\nUser nobody\n",
		port, ProxyV4, User, tinyPassword))
	return l.serve(t, &Server{
		Name: "tinyproxy", Scheme: "http", Addr: netip.AddrPortFrom(ProxyV4, port), Pass: tinyPassword, IPv6: true,
	}, program(t, "tinyproxy"), "-d", "-c", conf)
}

// tinyPassword is what tinyproxy's configuration grammar can express of a password.
const tinyPassword = "p4ssw0rd"

// SSHD starts an ssh server on the proxy host and returns what a client needs: arguments for ssh(1) up to the destination.
func (l *Lab) SSHD(t *testing.T, ns *NS, addr netip.AddrPort) []string {
	t.Helper()
	host, client := filepath.Join(l.Dir, "ssh-host-"+ns.Name), filepath.Join(l.Dir, "ssh-client-"+ns.Name)
	for _, k := range []string{host, client} {
		if err := run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", k); err != nil {
			t.Fatal(err)
		}
	}
	conf := l.File("sshd-"+ns.Name+".conf", fmt.Sprintf("ListenAddress %s\nPort %d\nHostKey %s\nAuthorizedKeysFile %s.pub\n"+
		"StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\nAllowTcpForwarding yes\nUseDNS no\nSubsystem sftp internal-sftp\n",
		bracketed(addr.Addr()), addr.Port(), host, client))
	sh := "mkdir -p /run/sshd && exec " + program(t, "sshd") + " -D -e -f " + conf
	p := Start(t, "sshd", ns.Command("sh", "-c", sh))
	Eventually(t, 15*time.Second, "sshd listens", func() bool {
		if p.Exited() {
			t.Fatalf("sshd ended at once:\n%s", p.Log)
		}
		return answers(ns, addr)
	})
	return []string{
		"ssh", "-F", "none", "-i", client, "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
		"-o", "LogLevel=ERROR", "-p", fmt.Sprint(addr.Port()),
	}
}

func bracketed(a netip.Addr) string {
	if a.Is6() {
		return "[" + a.String() + "]"
	}
	return a.String()
}

// SSHDynamic starts `ssh -D` on the client's loopback to a server on the proxy host: an upstream on loopback.
func (l *Lab) SSHDynamic(t *testing.T, port uint16) *Server {
	t.Helper()
	ssh := l.SSHD(t, l.Proxy, netip.AddrPortFrom(ProxyV4, 22))
	s := &Server{Name: "ssh -D", Scheme: "socks5h", Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), IPv6: true, HalfClose: true}
	s.start = func() *Proc {
		p := Start(t, "ssh -D", l.Client.Command(append(ssh, "-N", "-D", s.Addr.String(), "-o", "ExitOnForwardFailure=yes",
			"-o", "ServerAliveInterval=0", "root@"+ProxyV4.String())...))
		Eventually(t, 15*time.Second, "ssh -D listens", func() bool { return answers(l.Client, s.Addr) })
		return p
	}
	s.Proc = s.start()
	return s
}

// Certificate makes a CA and a certificate, for servers and clients, of the given names and addresses; it returns the files.
func (l *Lab) Certificate(t *testing.T, names []string, ips ...netip.Addr) (ca, cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: names[0]}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true, DNSNames: names,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, ip := range ips {
		tmpl.IPAddresses = append(tmpl.IPAddresses, net.IP(ip.AsSlice()))
	}
	der, err := x509.CreateCertificate(crand.Reader, tmpl, tmpl, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	cert = l.File(names[0]+"-cert.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	key = l.File(names[0]+"-key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder})))
	return cert, cert, key
}

// Unbound starts a resolver on the origin: authoritative for example.test, over UDP and TCP on port 53 and DoH on 8443. It returns the CA.
func (l *Lab) Unbound(t *testing.T) (ca string) {
	t.Helper()
	ca, cert, key := l.Certificate(t, []string{"dns.example.test"}, OriginV4, OriginV6)
	conf := l.File("unbound.conf", strings.NewReplacer("V4", OriginV4.String(), "V6", OriginV6.String(), "DIR", l.Dir, "KEY", key, "CERT", cert).Replace(`
server:
  username: ""
  chroot: ""
  directory: "DIR"
  pidfile: ""
  use-syslog: no
  log-queries: yes
  do-daemonize: no
  num-threads: 1
  module-config: "iterator"
  interface: V4@53
  interface: V6@53
  interface: V4@8443
  interface: V6@8443
  https-port: 8443
  tls-service-key: "KEY"
  tls-service-pem: "CERT"
  access-control: 0.0.0.0/0 allow
  access-control: ::/0 allow
  local-zone: "example.test." static
  local-data: "www.example.test. 60 A V4"
  local-data: "www.example.test. 60 AAAA V6"
  local-data: "proxy.example.test. 60 A 203.0.113.10"
  local-data: "v4.example.test. 60 A V4"
  local-data: "v6.example.test. 60 AAAA V6"
  local-data: "example.test. 60 MX 10 mail.example.test."
  local-data: "txt.example.test. 60 TXT hello"
  local-data: "_xmpp._tcp.example.test. 60 SRV 0 0 5222 www.example.test."
  local-data: "closed.example.test. 60 A V4"
  local-data: "80.100.51.198.in-addr.arpa. 60 PTR www.example.test."
  local-zone: "broken.test." always_refuse
remote-control:
  control-enable: no
`))
	p := Start(t, "unbound", l.OriginNS.Command(program(t, "unbound"), "-d", "-p", "-c", conf))
	Eventually(t, 15*time.Second, "unbound listens", func() bool {
		if p.Exited() {
			t.Fatalf("unbound ended at once:\n%s", p.Log)
		}
		return answers(l.OriginNS, netip.AddrPortFrom(OriginV4, 53)) && answers(l.OriginNS, netip.AddrPortFrom(OriginV6, 8443))
	})
	return ca
}
