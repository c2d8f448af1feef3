// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// pemFiles writes a certificate and its key, each into a file, and both into a third.
func pemFiles(t *testing.T, c tls.Certificate) (cert, key, both string) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	c1 := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
	k1 := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	write := func(name string, b []byte) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write("cert", c1), write("key", k1), write("both", append(c1, k1...))
}

func TestClientCertificate(t *testing.T) {
	server, _ := certificate(t, "proxy.example")
	client, clients := certificate(t, "client.example")
	ca, _, _ := pemFiles(t, server)
	cert, key, both := pemFiles(t, client)
	s := dialertest.Start(t, func(c *dialertest.Conv) error {
		tc := tls.Server(c.TCPConn, &tls.Config{
			Certificates: []tls.Certificate{server}, MinVersion: tls.VersionTLS12, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients,
		})
		var head []byte
		for b := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, b[0]) {
			if _, err := io.ReadFull(tc, b); err != nil {
				return err
			}
		}
		if _, err := io.WriteString(tc, ok200); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, tc)
		return err
	})
	for options, ok := range map[string]bool{
		"&ca=" + ca + "&cert=" + cert + "&key=" + key: true, "&ca=" + ca + "&cert=" + both: true,
		"&ca=" + ca: false, "&cert=" + both: false, "&insecure=1&cert=" + both: true,
	} {
		p := spec(t, fmt.Sprintf("https://%s?sni=proxy.example%s", s.Addr, options))
		if _, err := New("up", p, NewNet(NetConfig{})); err == nil {
			t.Error("certificates that nobody has read")
		}
		if err := p.ReadSecrets(); err != nil {
			t.Fatal(err)
		}
		d, err := New("up", p, NewNet(NetConfig{}))
		if err != nil {
			t.Fatal(err)
		}
		c, err := d.Dial(testContext(t), addr(t, "example.com:443"))
		if (err == nil) != ok {
			t.Errorf("%s: %v", options, err)
		}
		if err == nil {
			c.Close()
		} else if !errors.Is(err, flow.ErrUpstream) {
			t.Errorf("%s: %v", options, err)
		}
	}
	for _, bad := range []string{"ca=/nonexistent", "ca=" + key, "cert=" + cert, "cert=" + cert + "&key=" + ca, "ca=/dev/zero"} {
		p := spec(t, "https://h?"+bad)
		if err := p.ReadSecrets(); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}

func TestHeaders(t *testing.T) {
	s := dialertest.Start(t, dialertest.Expect("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nX-One: a b\r\nX-Two: hush\r\n\r\n"), dialertest.Send("HTTP/1.1 502 hush\r\n\r\n"))
	d := dialer(t, "http://"+s.Addr.String()+"?header=X-One:%20a%20b&header=X-Two:hush")
	_, err := d.Dial(testContext(t), addr(t, "a:1"))
	if err == nil || strings.Contains(err.Error(), "hush") || !strings.Contains(err.Error(), redacted) {
		t.Errorf("%v", err)
	}
	if text := fmt.Sprintf("%v %+v %s", d.(*HTTP).Spec(), d.(*HTTP).spec.Headers, StatusOf(d).URL); strings.Contains(text, "hush") {
		t.Error(text)
	}
	for _, bad := range []string{
		"http://h?header=a", "http://h?header=:b", "http://h?header=a%20b:c", "http://h?header=a:b%0d%0ac:d", "http://h?header=a%0d:b", "http://h?header=host:b",
		"http://h?header=proxy-authorization:hush", "http://h?header=a:%zzhush", "socks5://h?header=a:b", "http://h?" + strings.Repeat("&header=a:b", maxHeaders+1),
		"http://h?ca=x", "socks5://h?cert=x", "https://h?key=x", "https://h?ca=x&insecure=1", "https://h?ca=", "auto://h?ca=x",
	} {
		if _, err := ParseURL(bad); err == nil || strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
