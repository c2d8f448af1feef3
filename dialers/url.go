// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
)

// The schemes of a proxy URL.
const (
	SchemeSOCKS4  = "socks4"
	SchemeSOCKS4a = "socks4a"
	SchemeSOCKS5  = "socks5"  // the address is sent
	SchemeSOCKS5h = "socks5h" // the name is sent
	SchemeSOCKS5s = "socks5s" // SOCKS5 inside TLS, the name is sent
	SchemeHTTP    = "http"
	SchemeHTTPS   = "https" // HTTP CONNECT inside TLS
	SchemeAuto    = "auto"
	SchemeDirect  = "direct"
	SchemeReject  = "reject" // an action of routing: New refuses it
	SchemeDrop    = "drop"   // an action of routing: New refuses it
)

// The values of the option udp.
const (
	UDPAuto = "auto" // tried, and what the server says is remembered for a while
	UDPOn   = "on"   // tried every time
	UDPOff  = "off"
	// UDPOverTCP carries datagrams in a stream, as SagerNet's UDP over TCP version 2 has it; UDPOverTCP1 is version 1.
	UDPOverTCP  = "over-tcp"
	UDPOverTCP1 = "over-tcp-v1"
)

// maxURL bounds a proxy URL; anything longer is a mistake.
const maxURL = 4096

// maxSecretFile bounds a password or token file.
const maxSecretFile = 64 << 10

// Spec is a proxy URL, taken apart. The zero value of an option means it was not given.
type Spec struct {
	Scheme      string
	Host        string // of the proxy: lower-case name or IP literal without brackets; "" for direct, reject and drop
	Port        uint16
	HasUser     bool // userinfo was given, even if empty
	Username    string
	Password    Secret
	HasPassword bool // a password was given, even if empty
	Token       Secret

	Name         string // option name
	Weight       int    // option weight, at least 1 when given
	Priority     int    // option priority
	MaxFlows     int    // option max_flows: connections and associations at a time; 0 = no bound
	Warm         int    // option warm: connections that are kept ready, at most 64; 0 = none
	UDP          string // option udp: auto (the default) | on | off | over-tcp | over-tcp-v1
	Auth         string // option auth: basic | digest | bearer
	HTTP         string // option http: 1.1 or 2 = only that is offered to an https proxy
	SNI          string // option sni: the name asked for in TLS instead of Host
	Insecure     bool   // option insecure=1: the proxy's certificate is not verified
	Pipeline     bool   // option pipeline=1: the SOCKS5 request is sent without waiting for the answer to the greeting
	PasswordFile string // option password_file
	TokenFile    string // option token_file
	CAFile       string // option ca: certificates that the proxy's must lead to, instead of the system's
	CertFile     string // option cert: our certificate for the proxy, with its chain
	KeyFile      string // option key: its key; "" = it is in CertFile
	Headers      []Header

	tls *tlsFiles // what is in CAFile and CertFile, once they have been read
}

// URLError says which part of a proxy URL is wrong. It never contains the userinfo.
type URLError struct {
	Part string // scheme, userinfo, host, port, path, or the name of an option
	Msg  string
}

// Error returns the part and what is wrong with it.
func (e *URLError) Error() string { return "proxy url: " + e.Part + ": " + e.Msg }

func urlErr(part, format string, args ...any) error {
	return &URLError{Part: part, Msg: fmt.Sprintf(format, args...)}
}

// ParseURL reads a proxy URL with curl's meaning: without a scheme it is http, the port defaults to 1080 (443 for https), userinfo is
// percent-encoded, an empty password is legal, and the last @ ends the userinfo. Errors are *URLError.
//
// net/url is not used: its errors repeat the URL, password included.
func ParseURL(raw string) (Spec, error) {
	if len(raw) > maxURL {
		return Spec{}, urlErr("url", "longer than %d bytes", maxURL)
	}
	if i := strings.IndexFunc(raw, func(r rune) bool { return r <= ' ' || r == 0x7f }); i >= 0 {
		return Spec{}, urlErr("url", "white space or control character at byte %d: percent-encode it", i)
	}
	s := Spec{Scheme: SchemeHTTP}
	rest := raw
	if scheme, after, ok := strings.Cut(raw, "://"); ok && !strings.ContainsAny(scheme, "@/?#") {
		s.Scheme, rest = strings.ToLower(scheme), after
	}
	if !slices.Contains(schemes(), s.Scheme) {
		return Spec{}, urlErr("scheme", "unknown scheme: use one of %s", strings.Join(schemes(), " "))
	}
	rest, query, _ := strings.Cut(rest, "?")
	authority, path, _ := strings.Cut(rest, "/")
	if path != "" {
		return Spec{}, urlErr("path", "a proxy URL has none; a / in a password is written %%2F, a ? %%3F")
	}
	if strings.Contains(authority, "#") || strings.Contains(query, "#") {
		return Spec{}, urlErr("fragment", "a proxy URL has none; a # in a password is written %%23")
	}
	if i := strings.LastIndexByte(authority, '@'); i >= 0 {
		if err := s.parseUserinfo(authority[:i]); err != nil {
			return Spec{}, err
		}
		authority = authority[i+1:]
	}
	if err := s.parseHost(authority); err != nil {
		return Spec{}, err
	}
	if err := s.parseOptions(query); err != nil {
		return Spec{}, err
	}
	return s, s.check()
}

func schemes() []string {
	return []string{
		SchemeSOCKS4, SchemeSOCKS4a, SchemeSOCKS5, SchemeSOCKS5h, SchemeSOCKS5s, SchemeHTTP, SchemeHTTPS, SchemeAuto, SchemeDirect,
		SchemeReject, SchemeDrop,
	}
}

func (s *Spec) parseUserinfo(info string) error {
	user, pass, has := strings.Cut(info, ":")
	var err error
	if s.Username, err = url.PathUnescape(user); err != nil {
		return urlErr("userinfo", "user name: invalid percent-encoding: a %% is written %%25")
	}
	plain, err := url.PathUnescape(pass)
	if err != nil {
		return urlErr("userinfo", "password: invalid percent-encoding: a %% is written %%25")
	}
	s.HasUser, s.HasPassword, s.Password = true, has, NewSecret(plain)
	return nil
}

func (s *Spec) parseHost(authority string) error {
	if s.builtin() {
		if authority != "" || s.HasUser {
			return urlErr("host", "%s:// takes none", s.Scheme)
		}
		return nil
	}
	host, port := authority, ""
	if strings.HasPrefix(authority, "[") {
		end := strings.IndexByte(authority, ']')
		if end < 0 {
			return urlErr("host", "missing ] after an IPv6 address")
		}
		host, port = authority[1:end], authority[end+1:]
		if port != "" && port[0] != ':' {
			return urlErr("host", "only :port may follow ]")
		}
		host = strings.Replace(host, "%25", "%", 1) // RFC 6874
		ip, err := netip.ParseAddr(host)
		if err != nil || !ip.Is6() {
			return urlErr("host", "not an IPv6 address inside [ ]")
		}
		s.Host = ip.String()
	} else {
		if strings.Count(authority, ":") > 1 {
			return urlErr("host", "an IPv6 address is written [address]:port")
		}
		if i := strings.IndexByte(authority, ':'); i >= 0 {
			host, port = authority[:i], authority[i:]
		}
		s.Host = strings.ToLower(strings.TrimSuffix(host, "."))
		if err := checkHost(s.Host); err != nil {
			return err
		}
	}
	s.Port = 1080
	if s.Scheme == SchemeHTTPS {
		s.Port = 443
	}
	if port == "" || port == ":" {
		return nil
	}
	n, err := strconv.ParseUint(port[1:], 10, 16)
	if err != nil || n == 0 {
		return urlErr("port", "not a number from 1 to 65535")
	}
	s.Port = uint16(n)
	return nil
}

// checkHost accepts IPv4 literals and DNS names (RFC 1123, and the underscore that real names use).
func checkHost(host string) error {
	if host == "" {
		return urlErr("host", "missing")
	}
	if ip, err := netip.ParseAddr(host); err == nil && ip.Is4() {
		return nil
	}
	if len(host) > 253 {
		return urlErr("host", "name longer than 253 bytes")
	}
	var last string
	for label := range strings.SplitSeq(host, ".") {
		if last = label; label == "" || len(label) > 63 {
			return urlErr("host", "a part of the name is empty or longer than 63 bytes")
		}
		for _, c := range []byte(label) {
			if c >= 0x80 {
				return urlErr("host", "international names are written in punycode (xn--...)")
			}
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return urlErr("host", "invalid character in the name")
			}
		}
	}
	if strings.Trim(last, "0123456789") == "" {
		return urlErr("host", "not an IPv4 address, and no name ends in digits alone")
	}
	return nil
}

func (s *Spec) parseOptions(query string) error {
	seen := make(map[string]bool)
	for opt := range strings.SplitSeq(query, "&") {
		if opt == "" {
			continue
		}
		if rest, ok := strings.CutPrefix(opt, "header="); ok {
			if err := s.addHeader(rest); err != nil {
				return err
			}
			continue
		}
		key, raw, _ := strings.Cut(opt, "=")
		value, err := url.PathUnescape(raw)
		if err != nil {
			return urlErr("option", "invalid percent-encoding in the value of an option")
		}
		if seen[key] {
			return urlErr(key, "given twice")
		}
		seen[key] = true
		if err := s.setOption(key, value); err != nil {
			return err
		}
	}
	return nil
}

// setOption never repeats key or value of an unknown option: it may be the tail of a password with a ? in it.
func (s *Spec) setOption(key, value string) (err error) {
	switch key {
	case "weight":
		s.Weight, err = number(key, value, 1)
	case "priority":
		s.Priority, err = number(key, value, 0)
	case "max_flows":
		s.MaxFlows, err = number(key, value, 1)
	case "warm":
		if s.Warm, err = number(key, value, 1); err == nil && s.Warm > maxWarm {
			err = urlErr(key, "not a number from 1 to %d", maxWarm)
		}
	case "udp":
		s.UDP = value
		return oneOf(key, value, UDPAuto, UDPOn, UDPOff, UDPOverTCP, UDPOverTCP1)
	case "auth":
		s.Auth = value
		return oneOf(key, value, "basic", "digest", "bearer")
	case "http":
		s.HTTP = value
		return oneOf(key, value, "1.1", "2")
	case "sni":
		if s.SNI = strings.ToLower(value); checkHost(s.SNI) != nil {
			return urlErr(key, "not a host name")
		}
	case "insecure":
		s.Insecure, err = boolean(key, value)
	case "pipeline":
		s.Pipeline, err = boolean(key, value)
	case "name":
		if s.Name = value; value == "" {
			return urlErr(key, "empty")
		}
	case "password_file":
		return file(&s.PasswordFile, key, value)
	case "token_file":
		return file(&s.TokenFile, key, value)
	case "ca":
		return file(&s.CAFile, key, value)
	case "cert":
		return file(&s.CertFile, key, value)
	case "key":
		return file(&s.KeyFile, key, value)
	default:
		return urlErr("option", "unknown: use weight priority max_flows warm udp auth http sni insecure pipeline name password_file token_file ca cert key header")
	}
	return err
}

func file(to *string, key, value string) error {
	if *to = value; value == "" {
		return urlErr(key, "empty")
	}
	return nil
}

func number(key, value string, least int) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil || n < least || n > 1_000_000 {
		return 0, urlErr(key, "not a number from %d to 1000000", least)
	}
	return n, nil
}

func boolean(key, value string) (bool, error) {
	if value != "0" && value != "1" {
		return false, urlErr(key, "use 0 or 1")
	}
	return value == "1", nil
}

func oneOf(key, value string, allowed ...string) error {
	if !slices.Contains(allowed, value) {
		return urlErr(key, "use one of %s", strings.Join(allowed, " "))
	}
	return nil
}

// check refuses what cannot be sent, or would be ignored in silence.
func (s *Spec) check() error {
	switch {
	case !strings.HasPrefix(s.Scheme, "socks") && strings.Contains(s.Username, ":"):
		return urlErr("userinfo", "a user name with a colon cannot be sent over HTTP (RFC 7617)")
	case s.HasPassword && s.PasswordFile != "":
		return urlErr("password_file", "a password is given already")
	case s.Auth == "bearer" && s.TokenFile == "" && s.Password.IsZero() && s.PasswordFile == "":
		return urlErr("auth", "bearer needs token_file, or the token as the password")
	case s.Insecure && s.Scheme != SchemeHTTPS && s.Scheme != SchemeSOCKS5s && s.Scheme != SchemeAuto:
		return urlErr("insecure", "only for a proxy reached over TLS")
	case (s.CAFile != "" || s.CertFile != "" || s.KeyFile != "") && s.Scheme != SchemeHTTPS && s.Scheme != SchemeSOCKS5s:
		return urlErr("ca, cert, key", "only for a proxy reached over TLS")
	case s.HTTP != "" && s.Scheme != SchemeHTTPS:
		return urlErr("http", "only for https: which protocol it is is settled by TLS")
	case s.CAFile != "" && s.Insecure:
		return urlErr("ca", "insecure=1 would make it worth nothing")
	case s.KeyFile != "" && s.CertFile == "":
		return urlErr("key", "needs cert")
	case s.Warm > 0 && s.builtin():
		return urlErr("warm", "only for a proxy")
	case s.Warm > 0 && s.Scheme == SchemeHTTPS && s.HTTP != "1.1":
		return urlErr("warm", "streams of HTTP/2 share connections that are warm already: give http=1.1 for a proxy without HTTP/2")
	case s.overTCP() && (s.builtin() || s.Scheme == SchemeSOCKS4 || s.Scheme == SchemeSOCKS5):
		return urlErr("udp", "%s asks for a stream to a name: use socks5h, socks5s, socks4a, http or https", s.UDP)
	case len(s.Headers) > 0 && s.Scheme != SchemeHTTP && s.Scheme != SchemeHTTPS && s.Scheme != SchemeAuto:
		return urlErr("header", "only for a proxy asked by HTTP")
	}
	return s.checkLengths()
}

func (s *Spec) checkLengths() error {
	if strings.HasPrefix(s.Scheme, "socks") && (len(s.Username) > 255 || len(s.Password.bytes()) > 255) {
		return urlErr("userinfo", "SOCKS carries at most 255 bytes of user name and of password (RFC 1929)")
	}
	return nil
}

// overTCP reports whether datagrams are to travel in a stream.
func (s *Spec) overTCP() bool { return s.UDP == UDPOverTCP || s.UDP == UDPOverTCP1 }

// builtin reports whether the upstream is one of our own: no server.
func (s *Spec) builtin() bool {
	return s.Scheme == SchemeDirect || s.Scheme == SchemeReject || s.Scheme == SchemeDrop
}

// Server returns the proxy's host:port, with IPv6 addresses in brackets.
func (s *Spec) Server() string { return net.JoinHostPort(s.Host, strconv.Itoa(int(s.Port))) }

// String returns the URL with its password as ***. It is what logs, errors and the API may show.
func (s Spec) String() string {
	if s.builtin() {
		return s.Scheme + "://"
	}
	user := ""
	if s.HasUser {
		user = url.User(s.Username).String()
		if s.HasPassword {
			user += ":" + redacted
		}
		user += "@"
	}
	return s.Scheme + "://" + user + s.Server()
}

// ReadSecrets reads the files that the Spec names: password_file and token_file into Password and Token, where one trailing line break is
// not part of the secret, and the certificates.
func (s *Spec) ReadSecrets() error {
	if s.PasswordFile != "" {
		secret, err := readSecret("password_file", s.PasswordFile)
		if err != nil {
			return err
		}
		s.Password, s.HasPassword, s.HasUser = secret, true, true
	}
	if s.TokenFile != "" {
		secret, err := readSecret("token_file", s.TokenFile)
		if err != nil {
			return err
		}
		s.Token = secret
	}
	if err := s.readTLS(); err != nil {
		return err
	}
	return s.checkLengths()
}

func readSecret(key, path string) (Secret, error) {
	f, err := os.Open(path)
	if err != nil {
		return Secret{}, fmt.Errorf("%s: %w", key, err)
	}
	defer f.Close()
	buf := make([]byte, maxSecretFile)
	n, err := io.ReadFull(f, buf)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return Secret{}, fmt.Errorf("%s: %w", key, err)
	}
	if n == len(buf) {
		return Secret{}, fmt.Errorf("%s: %w", key, errors.New("file too large for a secret"))
	}
	text := strings.TrimSuffix(strings.TrimSuffix(string(buf[:n]), "\n"), "\r")
	clear(buf)
	return NewSecret(text), nil
}
