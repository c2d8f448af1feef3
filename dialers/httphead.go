// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

// response is the header of a reply to CONNECT, as far as it matters.
type response struct {
	status int
	reason string
	squid  string // X-Squid-Error: a name and the errno of connect(2)
	proxy  string // Proxy-Status (RFC 9209)

	challenges []string // Proxy-Authenticate
	nextnonce  string   // of Proxy-Authentication-Info (RFC 7616 section 3.5)
	old        bool     // HTTP/1.0
	connection string   // Connection and Proxy-Connection
	length     int64    // of the body; -1 = until the connection ends, or not known without reading it
}

// parseHead reads a header (RFC 9112 section 4). Fields that do not matter are not looked at: a proxy with a malformed one still works.
func parseHead(raw []byte) (response, error) {
	line, rest, _ := bytes.Cut(raw, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	// HTTP/1.x SP 3DIGIT [SP reason]
	if len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.")) || line[8] != ' ' || len(line) > 12 && line[12] != ' ' {
		return response{}, errors.New("not an HTTP/1 server: " + strconv.Quote(quote(string(line))))
	}
	status, err := strconv.Atoi(string(line[9:12]))
	if err != nil || status < 100 {
		return response{}, errors.New("invalid status " + strconv.Quote(quote(string(line))))
	}
	r := response{status: status, reason: strings.TrimSpace(string(line[12:])), old: line[7] == '0', length: -1}
	chunked := false
	for f := range bytes.SplitSeq(rest, []byte("\n")) {
		name, value, ok := strings.Cut(string(f), ":")
		if !ok {
			continue
		}
		value = strings.TrimSpace(value)
		switch strings.ToLower(name) {
		case "x-squid-error":
			r.squid = value
		case "proxy-status":
			r.proxy = value
		case "proxy-authenticate":
			if len(r.challenges) < maxChallenges {
				r.challenges = append(r.challenges, value)
			}
		case "proxy-authentication-info":
			r.nextnonce = nextNonce(value)
		case "connection", "proxy-connection":
			r.connection += "," + strings.ToLower(value)
		case "content-length":
			if n, err := strconv.ParseUint(value, 10, 63); err == nil {
				r.length = int64(n)
			}
		case "transfer-encoding":
			chunked = true
		}
	}
	if chunked {
		r.length = -1
	}
	return r, nil
}

// nextNonce reads Proxy-Authentication-Info (RFC 7616 section 3.5): "" = the nonce stays.
func nextNonce(info string) string {
	c := ParseChallenges("info " + info)
	if len(c) != 1 {
		return ""
	}
	return c[0].Params["nextnonce"]
}

// keeps reports whether another request can follow on the same connection (RFC 9112 section 9.3).
func (r *response) keeps() bool {
	alive, closes := false, r.old
	for option := range strings.SplitSeq(r.connection, ",") {
		switch strings.TrimSpace(option) {
		case "keep-alive":
			alive = true
		case "close":
			return false
		}
	}
	return (alive || !closes) && r.length >= 0 && r.length <= maxDropped
}

// hasStatus reports whether raw starts with the status.
func hasStatus(raw []byte, status string) bool {
	return len(raw) >= 12 && string(raw[9:12]) == status
}

// describe says in words what the reply says: the status line, squid's error, the first line of text of the body.
func (r *response) describe(body []byte) string {
	text := strconv.Itoa(r.status)
	for _, s := range []string{r.reason, r.squid, firstText(body)} {
		if s != "" && !strings.HasSuffix(text, s) {
			text += ", " + s
		}
	}
	return text
}

// firstText returns the first line of a page that has text outside tags: of HTML pages, mostly the title.
func firstText(page []byte) string {
	var b strings.Builder
	tag := false
	for _, c := range page {
		switch {
		case c == '<':
			tag = true
		case c == '>' && tag:
			tag = false
			if strings.TrimSpace(b.String()) != "" {
				return strings.TrimSpace(b.String())
			}
		case tag:
		case c == '\n':
			if strings.TrimSpace(b.String()) != "" {
				return strings.TrimSpace(b.String())
			}
			b.Reset()
		default:
			b.WriteByte(c)
		}
	}
	if tag {
		return "" // cut in a tag, or not a page
	}
	return strings.TrimSpace(b.String())
}

// meaning maps a reply that is not 2xx to the sentinel of flow that comes nearest. HTTP has one status for "refused" and "unreachable"
// (502, or squid's 503), so what proxies add is looked at first.
func (r *response) meaning() error {
	if err := r.proxyStatus(); err != nil {
		return err
	}
	if err := r.squidError(); err != nil {
		return err
	}
	switch r.status {
	case 403, 405: // RFC 9110: the method, or the destination, is not allowed
		return flow.ErrProhibited
	case 408, 504:
		return flow.ErrTimeout
	case 404, 410, 500, 502, 503: // tinyproxy 500, privoxy 404 for unknown names
		return flow.ErrHostUnreachable
	}
	// 407 wrong credentials; 1xx, 3xx and the others: not a proxy, or not one for us.
	return flow.ErrUpstream
}

// squidError reads "ERR_CONNECT_FAIL 111".
func (r *response) squidError() error {
	name, code, _ := strings.Cut(r.squid, " ")
	switch name {
	case "ERR_CONNECT_FAIL", "ERR_CANNOT_FORWARD":
		errno, _ := strconv.Atoi(strings.TrimSpace(code))
		switch unix.Errno(errno) {
		case unix.ECONNREFUSED:
			return flow.ErrRefused
		case unix.ENETUNREACH, unix.EAFNOSUPPORT, unix.EADDRNOTAVAIL:
			return flow.ErrNetUnreachable
		case unix.ETIMEDOUT:
			return flow.ErrTimeout
		}
		return flow.ErrHostUnreachable
	case "ERR_DNS_FAIL":
		return flow.ErrHostUnreachable
	case "ERR_ACCESS_DENIED":
		return flow.ErrProhibited
	case "ERR_CACHE_ACCESS_DENIED", "ERR_CACHE_MGR_ACCESS_DENIED":
		return flow.ErrUpstream // 407
	}
	return nil
}

// proxyStatus reads the error parameter of Proxy-Status (RFC 9209 section 2.3).
func (r *response) proxyStatus() error {
	_, rest, ok := strings.Cut(r.proxy, "error=")
	if !ok {
		return nil
	}
	name, _, _ := strings.Cut(rest, ";")
	name, _, _ = strings.Cut(name, ",")
	switch strings.TrimSpace(name) {
	case "connection_refused":
		return flow.ErrRefused
	case "destination_ip_unroutable":
		return flow.ErrNetUnreachable
	case "dns_error", "destination_not_found", "destination_unavailable", "connection_terminated":
		return flow.ErrHostUnreachable
	case "connection_timeout", "dns_timeout", "connection_read_timeout", "connection_write_timeout":
		return flow.ErrTimeout
	case "destination_ip_prohibited", "http_request_denied":
		return flow.ErrProhibited
	case "proxy_internal_error", "proxy_configuration_error", "connection_limit_reached":
		return flow.ErrUpstream
	}
	return nil
}

// statusError is a reply other than 2xx.
type statusError struct {
	cause error
	text  string // safe to show
}

// Error returns what the server said.
func (e *statusError) Error() string { return fmt.Sprintf("%v: server says: %s", e.cause, e.text) }

// Unwrap returns the sentinel of flow.
func (e *statusError) Unwrap() error { return e.cause }
