// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"crypto/md5" //nolint:gosec // the format of the password files of Digest
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
)

// realm is the realm of the servers that ask for Basic or Digest.
const realm = "lab"

// passwordFiles writes the password files of Basic (htpasswd) and Digest (htdigest).
func (l *Lab) passwordFiles(t *testing.T) (basic, digest string) {
	t.Helper()
	hash, err := exec.Command("openssl", "passwd", "-apr1", "-salt", "mprox", Password).Output()
	if err != nil {
		t.Fatal(err)
	}
	return l.File("htpasswd", User+":"+string(hash)), l.File("htdigest", fmt.Sprintf("%s:%s:%s\n", User, realm, HA1()))
}

// HA1 is what a server with Digest keeps in place of the password: who knows it can log in there.
func HA1() string {
	return fmt.Sprintf("%x", md5.Sum([]byte(User+":"+realm+":"+Password))) //nolint:gosec // RFC 7616 section 3.4.2
}

// Shadowsocks starts ss-server and, in front of it, ss-local: a SOCKS5 server that says "succeeded" before it has tried.
func (l *Lab) Shadowsocks(t *testing.T, port uint16) *Server {
	t.Helper()
	const key, method, remote = "lab-key", "chacha20-ietf-poly1305", "8388"
	// -6: a name with addresses of both families leads to the IPv6 one, as with the other servers.
	Start(t, "ss-server", l.Proxy.Command(program(t, "ss-server"), "-s", "127.0.0.1", "-p", remote, "-k", key, "-m", method, "-u", "-6",
		"-d", OriginV4.String()))
	return l.serve(t, &Server{
		Name: "ss-local", Scheme: "socks5h", Addr: netip.AddrPortFrom(ProxyV4, port), UDP: true, IPv6: true,
	}, program(t, "ss-local"), "-s", "127.0.0.1", "-p", remote, "-b", ProxyV4.String(), "-l", fmt.Sprint(port), "-k", key, "-m", method, "-u")
}

// PKI is the certificates of the servers that speak TLS: for the name TLSName alone, so that a client must ask for it, and a client's.
type PKI struct {
	CA, Cert, Key                   string
	ClientCA, ClientCert, ClientKey string
}

// TLSName is the name in the servers' certificate.
const TLSName = "proxy.lab"

// PKI makes the certificates.
func (l *Lab) PKI(t *testing.T) PKI {
	t.Helper()
	var p PKI
	p.CA, p.Cert, p.Key = l.Certificate(t, []string{TLSName})
	p.ClientCA, p.ClientCert, p.ClientKey = l.Certificate(t, []string{"client.lab"})
	return p
}

// Options returns the options of a proxy URL that trust the servers.
func (p PKI) Options() string { return "ca=" + p.CA + "&sni=" + TLSName }

// ClientOptions returns Options and those that show the client's certificate.
func (p PKI) ClientOptions() string {
	return p.Options() + "&cert=" + p.ClientCert + "&key=" + p.ClientKey
}

// Stunnel starts a SOCKS server inside TLS on port, and one that wants a client certificate on the next port.
func (l *Lab) Stunnel(t *testing.T, port uint16, p PKI) *Server {
	t.Helper()
	var b strings.Builder
	b.WriteString("foreground = yes\npid =\nsyslog = no\nTIMEOUTconnect = 2\n")
	for i, verify := range []string{"", "verifyPeer = yes\nCAfile = " + p.ClientCA + "\n"} {
		fmt.Fprintf(&b, "[socks%d]\nprotocol = socks\naccept = %s:%d\ncert = %s\nkey = %s\n%s", i, ProxyV4, port+uint16(i), p.Cert, p.Key, verify)
	}
	conf := l.File("stunnel.conf", b.String())
	return l.serve(t, &Server{
		Name: "stunnel", Scheme: "socks5s", Addr: netip.AddrPortFrom(ProxyV4, port), IPv6: true, Options: p.Options(),
	}, program(t, "stunnel4"), conf)
}

// Nghttpx starts an HTTP/2 proxy inside TLS that passes on to an HTTP/1.1 proxy, whose password is needed.
func (l *Lab) Nghttpx(t *testing.T, port uint16, p PKI, behind *Server) *Server {
	t.Helper()
	return l.serve(t, &Server{
		Name: "nghttpx", Scheme: "https", Addr: netip.AddrPortFrom(ProxyV4, port), Pass: behind.Pass, IPv6: true, Options: p.Options(),
	}, program(t, "nghttpx"), "--conf=/dev/null", "--http2-proxy", "--workers=1", "--no-ocsp", "--backend-connections-per-host=1000", "--errorlog-file=/dev/stderr", "--log-level=WARN",
		fmt.Sprintf("--frontend=%s,%d", ProxyV4, port), fmt.Sprintf("--backend=%s,%d", behind.Addr.Addr(), behind.Addr.Port()), p.Key, p.Cert)
}

// SquidDigest starts an HTTP proxy that asks for Digest.
func (l *Lab) SquidDigest(t *testing.T, port uint16) *Server {
	t.Helper()
	_, digest := l.passwordFiles(t)
	auth := fmt.Sprintf("auth_param digest program %s -c %s\nauth_param digest children 2\nauth_param digest realm %s\n",
		program(t, "digest_file_auth"), digest, realm)
	return l.squid(t, &Server{Name: "squid-digest", Scheme: "http", Pass: Password}, port, fmt.Sprintf("http_port %s:%d\n", ProxyV4, port)+auth)
}

// SquidTLS starts an HTTP proxy inside TLS that asks for Basic on port, and wants a client certificate on the next port.
func (l *Lab) SquidTLS(t *testing.T, port uint16, p PKI) *Server {
	t.Helper()
	ports := fmt.Sprintf("https_port %s:%d tls-cert=%s tls-key=%s\nhttps_port %s:%d tls-cert=%s tls-key=%s clientca=%s\n",
		ProxyV4, port, p.Cert, p.Key, ProxyV4, port+1, p.Cert, p.Key, p.ClientCA)
	return l.squid(t, &Server{Name: "squid-tls", Scheme: "https", Pass: Password, Options: p.Options()}, port, ports+l.squidBasic(t))
}

// squidBasic is what makes squid ask for Basic.
func (l *Lab) squidBasic(t *testing.T) string {
	t.Helper()
	basic, _ := l.passwordFiles(t)
	return fmt.Sprintf("auth_param basic program %s %s\nauth_param basic children 2\nauth_param basic realm %s\n",
		program(t, "basic_ncsa_auth"), basic, realm)
}

// squid starts squid under a name of its own: its shared memory is named after it.
func (l *Lab) squid(t *testing.T, s *Server, port uint16, head string) *Server {
	t.Helper()
	conf := l.File(s.Name+".conf", head+strings.NewReplacer("DIR", l.Dir, "ORIGIN", OriginV4.String()).Replace(`
acl known proxy_auth REQUIRED
http_access deny !known
http_access allow all
cache deny all
cache_mem 8 MB
access_log none
cache_log /dev/null
cache_store_log none
pid_filename none
coredump_dir DIR
shutdown_lifetime 0 seconds
connect_timeout 5 seconds
dns_nameservers ORIGIN
visible_hostname proxy.lab
netdb_filename none
workers 1
`))
	s.Addr, s.IPv6 = netip.AddrPortFrom(ProxyV4, port), true
	return l.serve(t, s, program(t, "squid"), "-N", "-n", strings.ReplaceAll(s.Name, "-", ""), "-f", conf)
}

// Apache starts Apache as an HTTP proxy that asks for Basic on port, for Digest on the next, for Basic inside TLS on the one after, and
// there wants a client certificate on the last. It returns the first three.
func (l *Lab) Apache(t *testing.T, port uint16, p PKI) (basic, digest, tls *Server) {
	t.Helper()
	bfile, dfile := l.passwordFiles(t)
	var b strings.Builder
	fmt.Fprintf(&b, "ServerRoot %s\nServerName proxy.lab\nPidFile %s/apache.pid\nErrorLog /dev/stderr\nLogLevel error\n", l.Dir, l.Dir)
	b.WriteString("DefaultRuntimeDir /run\nUser nobody\nGroup nogroup\nStartServers 1\nServerLimit 2\nThreadsPerChild 64\nMaxRequestWorkers 128\nMutex posixsem\n")
	for _, m := range []string{
		"mpm_event", "authn_core", "authn_file", "authz_core", "authz_user", "auth_basic", "auth_digest", "proxy", "proxy_connect", "ssl", "socache_shmcb",
	} {
		fmt.Fprintf(&b, "LoadModule %s_module /usr/lib/apache2/modules/mod_%s.so\n", m, m)
	}
	b.WriteString("ProxyRequests On\nProxyVia Off\nAllowCONNECT 1-65535\n")
	auth := "<Proxy \"*\">\nAuthType %s\nAuthName " + realm + "\nAuthUserFile %s\nRequire valid-user\n</Proxy>\n"
	ssl := fmt.Sprintf("SSLEngine on\nSSLCertificateFile %s\nSSLCertificateKeyFile %s\n", p.Cert, p.Key)
	for i, part := range []string{
		fmt.Sprintf(auth, "Basic", bfile),
		fmt.Sprintf(auth+"AuthDigestProvider file\n", "Digest", dfile),
		fmt.Sprintf(auth, "Basic", bfile) + ssl,
		fmt.Sprintf(auth, "Basic", bfile) + ssl + "SSLVerifyClient require\nSSLVerifyDepth 1\nSSLCACertificateFile " + p.ClientCA + "\n",
	} {
		fmt.Fprintf(&b, "Listen %s:%d\n<VirtualHost %s:%d>\n%s</VirtualHost>\n", ProxyV4, int(port)+i, ProxyV4, int(port)+i, part)
	}
	conf := l.File("apache.conf", strings.Replace(b.String(), "</Proxy>\nAuthDigestProvider file\n", "AuthDigestProvider file\n</Proxy>\n", 1))
	at := func(i uint16) netip.AddrPort { return netip.AddrPortFrom(ProxyV4, port+i) }
	basic = l.serve(t, &Server{Name: "apache", Scheme: "http", Addr: at(0), Pass: Password, IPv6: true}, program(t, "apache2"), "-D", "FOREGROUND", "-f", conf)
	digest = &Server{Proc: basic.Proc, Name: "apache-digest", Scheme: "http", Addr: at(1), Pass: Password, IPv6: true}
	tls = &Server{Proc: basic.Proc, Name: "apache-tls", Scheme: "https", Addr: at(2), Pass: Password, IPv6: true, Options: p.Options()}
	return basic, digest, tls
}

// Privoxy starts an HTTP proxy that asks for no credentials.
func (l *Lab) Privoxy(t *testing.T, port uint16) *Server {
	t.Helper()
	conf := l.File("privoxy.conf", fmt.Sprintf("confdir %s\nlisten-address %s:%d\ntoggle 0\nenable-remote-toggle 0\nenable-edit-actions 0\nkeep-alive-timeout 5\n",
		l.Dir, ProxyV4, port))
	return l.serve(t, &Server{
		Name: "privoxy", Scheme: "http", Addr: netip.AddrPortFrom(ProxyV4, port), IPv6: true,
	}, program(t, "privoxy"), "--no-daemon", conf)
}

// Serve starts `mprox serve` on the proxy host.
func (l *Lab) Serve(t *testing.T, port uint16, args ...string) *Server {
	t.Helper()
	at := netip.AddrPortFrom(ProxyV4, port)
	return l.serve(t, &Server{
		Name: fmt.Sprintf("serve-%d", port), Scheme: "socks5h", Addr: at, UDP: true, IPv6: true, HalfClose: true,
	}, append([]string{Binary(t), "serve", "--listen", at.String()}, args...)...)
}
