// SPDX-License-Identifier: GPL-3.0-or-later

package demo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// check is one thing an application does in the client's namespace. It knows nothing of a proxy.
type check struct {
	Name string
	run  func(ctx context.Context) (string, error)
}

// result is what a check tells the demo, one JSON line each.
type result struct {
	Name   string        `json:"name"`
	OK     bool          `json:"ok"`
	Detail string        `json:"detail"`
	Took   time.Duration `json:"took"`
}

// clientChecks are the flows shown, in order. Each fails unless the far side's own answer arrived unchanged.
func clientChecks() []check {
	v4, v6 := hostOf(originV4), hostOf(originV6)
	return []check{
		{"http by name (" + originName + ")", httpCheck("http://" + originName + "/file")},
		{"http to an IPv4 address", httpCheck("http://" + v4 + "/file")},
		{"http to an IPv6 address", httpCheck("http://[" + v6 + "]/file")},
		{"server speaks first", bannerCheck(net.JoinHostPort(v4, bannerPort))},
		{"udp, 32 bytes", echoCheck(net.JoinHostPort(v4, echoPort), 32)},
		{"udp, 9,000 bytes (fragments)", echoCheck(net.JoinHostPort(v6, echoPort), 9000)},
		{"a closed port is refused", errnoCheck(net.JoinHostPort(v4, closedPort), unix.ECONNREFUSED)},
		{"an unreachable host is unreachable", errnoCheck("203.0.113.99:80", unix.EHOSTUNREACH, unix.ENETUNREACH)},
	}
}

// blockedChecks run when the engine is dead: the direct way exists, and nothing may take it.
func blockedChecks() []check {
	blocked := func(network, addr string) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) {
			c, err := dial(ctx, network, addr)
			if err == nil {
				_, err = c.Write([]byte("x"))
				c.Close()
			}
			if err == nil {
				return "", errors.New("it went out")
			}
			return errnoText(err), nil
		}
	}
	return []check{
		{"tcp, IPv4", blocked("tcp", net.JoinHostPort(hostOf(originV4), "80"))},
		{"tcp, IPv6", blocked("tcp", net.JoinHostPort(hostOf(originV6), "80"))},
		{"udp", blocked("udp", net.JoinHostPort(hostOf(originV4), echoPort))},
	}
}

// runClient runs the checks and writes a result each.
func runClient(ctx context.Context, w io.Writer, checks []check) error {
	enc := json.NewEncoder(w)
	for _, c := range checks {
		cctx, cancel := context.WithTimeout(ctx, 8*time.Second)
		start := time.Now()
		detail, err := c.run(cctx)
		cancel()
		r := result{Name: c.Name, OK: err == nil, Detail: detail, Took: time.Since(start)}
		if err != nil {
			r.Detail = err.Error()
		}
		if err := enc.Encode(r); err != nil {
			return err
		}
	}
	return nil
}

func httpCheck(url string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return "", err
		}
		tr := &http.Transport{DisableKeepAlives: true} // no ProxyFromEnvironment: the client is not configured
		defer tr.CloseIdleConnections()
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		h := sha256.New()
		n, err := io.Copy(h, resp.Body)
		if err != nil {
			return "", err
		}
		if got, want := hex.EncodeToString(h.Sum(nil)), resp.Header.Get(sumHeader); got != want || n == 0 {
			return "", fmt.Errorf("sha256 of %d bytes is %s, the origin sent %s", n, got, want)
		}
		return fmt.Sprintf("%s, %d KiB, sha256 as sent", resp.Status, n>>10), nil
	}
}

func bannerCheck(addr string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		c, err := dial(ctx, "tcp", addr)
		if err != nil {
			return "", err
		}
		defer c.Close()
		b, err := io.ReadAll(io.LimitReader(c, int64(len(banner))))
		if err != nil {
			return "", err
		}
		if string(b) != banner {
			return "", fmt.Errorf("banner is %q", b)
		}
		return strings.TrimSpace(banner), nil
	}
}

func echoCheck(addr string, size int) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		c, err := dial(ctx, "udp", addr)
		if err != nil {
			return "", err
		}
		defer c.Close()
		out, in := pattern(size), make([]byte, size+1)
		if _, err := c.Write(out); err != nil {
			return "", err
		}
		n, err := c.Read(in)
		if err != nil {
			return "", err
		}
		if string(in[:n]) != string(out) {
			return "", fmt.Errorf("%d other bytes came back", n)
		}
		return "the same bytes came back", nil
	}
}

func errnoCheck(addr string, want ...unix.Errno) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		c, err := dial(ctx, "tcp", addr)
		if err == nil {
			c.Close()
			return "", errors.New("connected to something that is not there")
		}
		for _, e := range want {
			if errors.Is(err, e) {
				return errnoText(err), nil
			}
		}
		return "", err
	}
}

// dial opens an application's socket, with the context's deadline on everything that follows.
func dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, network, addr) //nolint:forbidigo // plays an application: it must be captured
	if err != nil {
		return nil, err
	}
	if t, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(t); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

func errnoText(err error) string {
	if e, ok := errors.AsType[unix.Errno](err); ok {
		return unix.ErrnoName(e)
	}
	return err.Error()
}

// pattern is n bytes that a shifted or cut copy does not equal.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// hostOf is the address of a CIDR.
func hostOf(cidr string) string {
	host, _, _ := strings.Cut(cidr, "/")
	return host
}
