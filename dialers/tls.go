// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strings"
)

const (
	// maxCertificates bounds a file of certificates: the system's own, of 150 authorities, has 220 KB.
	maxCertificates = 1 << 20
	// maxHeaders bounds the header options of one URL.
	maxHeaders = 16
)

// Header is a field that is sent with each request to an HTTP proxy. Its value may be a secret, and so prints as one.
type Header struct {
	Name  string
	Value Secret
}

// addHeader reads the value of an option header=Name:value, percent-encoded. Errors never repeat it.
func (s *Spec) addHeader(raw string) error {
	text, err := url.PathUnescape(raw)
	if err != nil {
		return urlErr("header", "invalid percent-encoding")
	}
	name, value, ok := strings.Cut(text, ":")
	value = strings.Trim(value, " \t")
	p := params{rest: name}
	switch {
	case !ok || name == "" || p.token() != name:
		return urlErr("header", "write Name:value")
	case slices.ContainsFunc(ownHeaders(), func(h string) bool { return strings.EqualFold(h, name) }):
		return urlErr("header", "one of %s: mprox sends it itself, or it would change what a request is", strings.Join(ownHeaders(), " "))
	case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
		return urlErr("header", "a control character in the value")
	case len(s.Headers) >= maxHeaders:
		return urlErr("header", "more than %d", maxHeaders)
	}
	s.Headers = append(s.Headers, Header{name, NewSecret(value)})
	return nil
}

func ownHeaders() []string {
	return []string{"Host", "Proxy-Authorization", "Connection", "Proxy-Connection", "Content-Length", "Transfer-Encoding", "Upgrade", "TE", "Trailer", "Expect"}
}

// tlsFiles is what was read from files for TLS to a proxy.
type tlsFiles struct {
	roots *x509.CertPool // nil = the system's
	certs []tls.Certificate
}

// readTLS reads the certificates. Without any named it does nothing.
func (s *Spec) readTLS() error {
	if s.CAFile == "" && s.CertFile == "" {
		return nil
	}
	f := new(tlsFiles)
	if s.CAFile != "" {
		pem, err := readCertificates("ca", s.CAFile)
		if err != nil {
			return err
		}
		f.roots = x509.NewCertPool()
		if !f.roots.AppendCertsFromPEM(pem) {
			return fmt.Errorf("ca: %s: no certificate in it (PEM)", s.CAFile)
		}
	}
	if s.CertFile != "" {
		cert, err := readCertificates("cert", s.CertFile)
		if err != nil {
			return err
		}
		key := cert
		if s.KeyFile != "" {
			if key, err = readCertificates("key", s.KeyFile); err != nil {
				return err
			}
		}
		pair, err := tls.X509KeyPair(cert, key)
		clear(key)
		if err != nil {
			return fmt.Errorf("cert, key: %w", err)
		}
		f.certs = []tls.Certificate{pair}
	}
	s.tls = f
	return nil
}

func readCertificates(option, path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", option, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxCertificates+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", option, err)
	}
	if len(b) > maxCertificates {
		return nil, fmt.Errorf("%s: %w", option, errors.New("file too large for certificates"))
	}
	return b, nil
}

// tlsConfig is how a proxy is reached over TLS.
func tlsConfig(s *Spec, protos ...string) *tls.Config {
	name := s.SNI
	if name == "" {
		name = s.Host
	}
	cfg := &tls.Config{
		ServerName: name, MinVersion: tls.VersionTLS12, InsecureSkipVerify: s.Insecure, NextProtos: protos,
		ClientSessionCache: tls.NewLRUClientSessionCache(8), // a resumed handshake is one round trip shorter and has no certificate to check
	}
	if s.tls != nil {
		cfg.RootCAs, cfg.Certificates = s.tls.roots, s.tls.certs
	}
	return cfg
}
