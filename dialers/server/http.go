// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"bufio"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// maxHead bounds a request's header, and maxFields its number of lines.
	maxHead   = 32 << 10
	maxFields = 128
	// maxTries is how many requests without the right credentials one connection may send.
	maxTries = 3
)

// request is what matters of an HTTP request's header.
type request struct {
	method, target, version string
	auth                    string // Proxy-Authorization
	fields                  string // the others that an origin is to get, as they came
	body                    bool   // a body is announced: nothing that follows can be told apart from it
}

// http serves CONNECT (RFC 9110 section 9.3.6), and requests for http:// URLs. Clients may send payload without waiting for the reply.
func (c *session) http() error {
	for range maxTries {
		r, err := readHTTP(c.in)
		if err != nil {
			if errors.Is(err, errMalformed) {
				c.refuse(httpReply(400, "Bad Request", "", "Connection: close\r\n"))
			}
			return fmt.Errorf("http: %w", err)
		}
		ok, stale := c.authorized(&r)
		if ok {
			return c.connect(r)
		}
		ask := "Proxy-Authenticate: Basic realm=\"mprox\", charset=\"UTF-8\"\r\n"
		if c.s.digest != nil {
			ask = c.s.digest.challenge(time.Now(), stale) + ask // the stronger first (RFC 7616 section 3.7)
		}
		if r.body {
			c.refuse(httpReply(407, "Proxy Authentication Required", "", ask+"Connection: close\r\n"))
			return errAuth
		}
		if _, err := c.conn.Write(httpReply(407, "Proxy Authentication Required", "", ask)); err != nil {
			return err
		}
	}
	c.refuse(nil)
	return fmt.Errorf("http: %w", errAuth)
}

// authorized checks a request's credentials. stale means that they would be right with a newer nonce.
func (c *session) authorized(r *request) (ok, stale bool) {
	if c.s.auth == nil {
		return true, false
	}
	if scheme, _, _ := strings.Cut(r.auth, " "); c.s.digest == nil || !strings.EqualFold(scheme, "digest") {
		return c.basic(r.auth), false
	}
	user, stale := c.s.digest.check(time.Now(), r)
	if user == "" {
		return false, stale
	}
	c.user = user
	return true, false
}

// basic checks credentials (RFC 7617).
func (c *session) basic(field string) bool {
	scheme, code, _ := strings.Cut(field, " ")
	plain, err := base64.StdEncoding.DecodeString(strings.TrimSpace(code))
	user, password, ok := strings.Cut(string(plain), ":")
	if !strings.EqualFold(scheme, "basic") || err != nil || !ok || !c.s.auth(user, password) {
		return false
	}
	c.user = user
	return true
}

func (c *session) connect(r request) error {
	if r.method != "CONNECT" && strings.HasPrefix(strings.ToLower(r.target), "http://") {
		return c.forward(r)
	}
	if r.method != "CONNECT" {
		c.refuse(httpReply(405, "Method Not Allowed", "", "Allow: CONNECT\r\nConnection: close\r\n"))
		return fmt.Errorf("http: method %q: %w", r.method, errors.ErrUnsupported)
	}
	dst, err := parseTarget(r.target)
	if err != nil {
		c.refuse(httpReply(400, "Bad Request", "", "Connection: close\r\n"))
		return fmt.Errorf("http: %w", err)
	}
	granted := []byte("HTTP/1.1 200 Connection established\r\n\r\n")
	if isOverTCP(dst) {
		return c.overTCP(dst, granted, httpRefused)
	}
	out, err := c.reach(dst)
	if err != nil {
		return err
	}
	return c.relay(out, granted)
}

// reach connects to a destination, or tells the client why not.
func (c *session) reach(dst flow.Addr) (flow.Conn, error) {
	c.dst = dst.String()
	out, err := c.dial(dst)
	if err != nil {
		c.refuse(httpRefused(err))
	}
	return out, err
}

func httpRefused(err error) []byte {
	status, text, why := statusOf(err)
	return httpReply(status, text, why, "Connection: close\r\n")
}

// forward passes on a request in absolute form, as clients send it for http:// (RFC 9112 section 3.2.2): one a connection, which the
// origin is asked to close. What follows the header is the body, and goes to the origin as it is.
func (c *session) forward(r request) error {
	authority, path, _ := strings.Cut(r.target[len("http://"):], "/")
	if i := strings.IndexAny(authority, "?#@"); i >= 0 {
		authority = "" // user names are obsolete here, and a query without a path is nothing that clients send
	}
	at := authority
	if i := strings.LastIndexByte(at, ':'); i < 0 || strings.HasSuffix(at, "]") {
		at += ":80"
	}
	dst, err := parseTarget(at)
	if err != nil {
		c.refuse(httpReply(400, "Bad Request", "", "Connection: close\r\n"))
		return fmt.Errorf("http: %w", err)
	}
	out, err := c.reach(dst)
	if err != nil {
		return err
	}
	head := fmt.Sprintf("%s /%s %s\r\nHost: %s\r\n%sVia: 1.1 mprox\r\nConnection: close\r\n\r\n", r.method, path, r.version, authority, r.fields)
	_ = out.SetWriteDeadline(time.Now().Add(c.s.cfg.DialTimeout))
	if _, err := io.WriteString(out, head); err != nil {
		out.Abort()
		return err
	}
	_ = out.SetWriteDeadline(time.Time{})
	return c.relay(out, nil)
}

// parseTarget reads the authority form: host:port.
func parseTarget(target string) (flow.Addr, error) {
	host, port, err := net.SplitHostPort(target)
	if err != nil {
		return flow.Addr{}, errMalformed
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return flow.Addr{}, errMalformed
	}
	dst, err := nameAddr(host)
	if dst.Port = uint16(n); n == 0 && !isOverTCP(dst) {
		err = errMalformed
	}
	return dst, err
}

// statusOf maps a dial error to a status, and to the error of Proxy-Status (RFC 9209 section 2.3) that says it exactly: HTTP has one
// status for "refused" and "unreachable".
func statusOf(err error) (status int, text, why string) {
	if errors.Is(err, flow.ErrUpstream) {
		return 502, "Bad Gateway", "destination_unavailable"
	}
	switch flow.ReasonOf(err) {
	case flow.ReasonRefused:
		return 502, "Bad Gateway", "connection_refused"
	case flow.ReasonNetUnreachable:
		return 502, "Bad Gateway", "destination_ip_unroutable"
	case flow.ReasonTimeout:
		return 504, "Gateway Timeout", "connection_timeout"
	case flow.ReasonProhibited:
		return 403, "Forbidden", "destination_ip_prohibited"
	}
	return 502, "Bad Gateway", "destination_unavailable"
}

func httpReply(status int, text, why, fields string) []byte {
	if why != "" {
		fields += "Proxy-Status: mprox; error=" + why + "\r\n"
	}
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\n%sContent-Length: 0\r\n\r\n", status, text, fields)
}

var errMalformed = errors.New("malformed request")

// readHTTP reads the header of a request (RFC 9112 sections 2 to 5) and not a byte of what follows it.
func readHTTP(in *bufio.Reader) (request, error) {
	var r request
	line, size, err := readLine(in, 0)
	if err != nil {
		return r, err
	}
	var ok1, ok2 bool
	r.method, line, ok1 = strings.Cut(line, " ")
	r.target, r.version, ok2 = strings.Cut(line, " ")
	if strings.ContainsFunc(r.target, unicode.IsControl) {
		return r, errMalformed
	}
	if !ok1 || !ok2 || r.method == "" || r.target == "" || r.version != "HTTP/1.1" && r.version != "HTTP/1.0" {
		return r, errMalformed
	}
	var fields strings.Builder
	for range maxFields {
		if line, size, err = readLine(in, size); err != nil || line == "" {
			r.fields = fields.String()
			return r, err
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok || name == "" || strings.ContainsAny(name, " \t") { // RFC 9112 section 5.1: no space before the colon, no folding
			return r, errMalformed
		}
		switch value = strings.Trim(value, " \t"); strings.ToLower(name) {
		case "proxy-authorization":
			r.auth = value
		case "host", "connection", "proxy-connection", "keep-alive", "te", "upgrade", "via": // for this hop, or ours to say
		case "content-length", "transfer-encoding":
			r.body = r.body || value != "0"
			fallthrough
		default:
			fields.WriteString(line + "\r\n")
		}
	}
	return r, errMalformed
}

// readLine reads a line without its end. size is the size of the header so far.
func readLine(in *bufio.Reader, size int) (string, int, error) {
	line, err := in.ReadSlice('\n')
	if size += len(line); errors.Is(err, bufio.ErrBufferFull) || size > maxHead {
		return "", size, errMalformed
	}
	if errors.Is(err, io.EOF) && size > 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return "", size, err
	}
	text := strings.TrimSuffix(strings.TrimSuffix(string(line), "\n"), "\r")
	if strings.ContainsAny(text, "\r\x00") { // RFC 9110 section 5.5, RFC 9112 section 2.2: others may take them for the end of something
		return "", size, errMalformed
	}
	return text, size, nil
}
