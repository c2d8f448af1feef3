// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// probeStagger is the head start of one probe over the next: a round trip to a near server. Of servers that speak several protocols,
	// the one that is asked for first wins.
	probeStagger = 300 * time.Millisecond
	// probeLimit bounds finding out, within the time that the flow has.
	probeLimit = 8 * time.Second
	// reprobe is the least time between two attempts to find out: a server that is down must not be asked three questions a flow.
	reprobe = 5 * time.Second
)

// Auto is an upstream whose protocol is found out: SOCKS5, HTTP CONNECT or SOCKS4a, tried in this order, each on a connection of its own. The
// questions carry neither credentials nor a destination. What has answered is remembered, and asked again after the upstream has failed.
// TLS is not tried: https and socks5s have to be named.
type Auto struct {
	upstream
	known atomic.Pointer[speaker]

	mu      sync.Mutex
	doubted bool          // the upstream has failed since it was found out
	asked   time.Time     // when that ended
	err     error         // and how, if nothing answered
	running chan struct{} // closed when it ends; nil while nobody asks
	ended   bool          // Close was called
}

// speaker is the upstream as it was found to be.
type speaker struct {
	scheme string
	flow.Dialer
}

func newAuto(name string, s Spec, n *Net) *Auto {
	a := new(Auto)
	a.init(name, s, n)
	a.most = 0 // what is found counts its own flows
	return a
}

// Status is that of the protocol that was found. URL is as in the configuration.
func (a *Auto) Status() Status {
	st := a.status()
	if k := a.known.Load(); k != nil {
		failed := st
		st = StatusOf(k.Dialer)
		st.URL, st.State, st.Total, st.Errors = failed.URL, failed.State, st.Total+failed.Total, st.Errors+failed.Errors
		st.Up = st.Up && failed.Up
	}
	return st
}

// SetState switches what was found too: what is open is open through that.
func (a *Auto) SetState(s State) {
	a.gate.SetState(s)
	if k := a.known.Load(); k != nil {
		SetState(k.Dialer, s)
	}
}

// Close ends the connections that are kept ready (upstream.Close).
func (a *Auto) Close() error {
	a.mu.Lock()
	a.ended = true
	k := a.known.Load()
	a.mu.Unlock()
	return k.close()
}

// close is Close of what was found; nil has none.
func (k *speaker) close() error {
	if k == nil {
		return nil
	}
	return k.Dialer.(io.Closer).Close()
}

// Protocol returns what the upstream was found to speak: socks5h, http or socks4a, and "" as long as it is not known.
func (a *Auto) Protocol() string {
	if k := a.known.Load(); k != nil {
		return k.scheme
	}
	return ""
}

func (a *Auto) full() bool {
	k := a.known.Load()
	return k != nil && k.Dialer.(limited).full()
}

func (a *Auto) gauge(now int64) (active, latency int64) {
	if k := a.known.Load(); k != nil {
		return k.Dialer.(gauged).gauge(now)
	}
	return a.stats.gauge(now)
}

// takesNames is true: whatever is found is used in the form that is sent names.
func (a *Auto) takesNames() bool { return true }

// DialContext is Dial for golang.org/x/net/proxy.
func (a *Auto) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return dialContext(ctx, a, network, address)
}

// Dial asks the upstream for a connection to dst.
func (a *Auto) Dial(ctx context.Context, dst flow.Addr) (flow.Conn, error) {
	if a.off() {
		return nil, a.wrap("connect", errOff)
	}
	d, err := a.find(ctx)
	if err != nil {
		return nil, err
	}
	c, err := d.Dial(ctx, dst)
	a.judge(err)
	return c, err
}

// ListenPacket opens an association if the upstream is a SOCKS5 server.
func (a *Auto) ListenPacket(ctx context.Context, f *flow.Flow) (flow.PacketConn, error) {
	if a.off() {
		return nil, a.wrap("udp", errOff)
	}
	d, err := a.find(ctx)
	if err != nil {
		return nil, err
	}
	pc, err := d.ListenPacket(ctx, f)
	a.judge(err)
	return pc, err
}

// Bind asks for a connection if the upstream is a SOCKS server.
func (a *Auto) Bind(ctx context.Context, peer flow.Addr) (flow.Binding, error) {
	if a.off() {
		return nil, a.wrap("bind", errOff)
	}
	d, err := a.find(ctx)
	if err != nil {
		return nil, err
	}
	binder, ok := d.Dialer.(Binder)
	if !ok {
		return nil, a.wrap("bind", errors.ErrUnsupported)
	}
	b, err := binder.Bind(ctx, peer)
	a.judge(err)
	return b, err
}

// judge notes that the upstream may not be what it was.
func (a *Auto) judge(err error) {
	if errors.Is(err, flow.ErrUpstream) && !errors.Is(err, errOff) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.doubted = true
	}
}

// find returns the upstream as what it speaks. Of several callers one asks and the others wait.
func (a *Auto) find(ctx context.Context) (*speaker, error) {
	a.mu.Lock()
	for a.running != nil {
		wait := a.running
		a.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, a.wrap("detect", context.Cause(ctx))
		}
		a.mu.Lock()
	}
	known, recent := a.known.Load(), !a.asked.IsZero() && a.net.cfg.Now().Sub(a.asked) < reprobe
	if known != nil && (!a.doubted || recent) || recent && a.err != nil {
		defer a.mu.Unlock()
		if known == nil {
			return nil, a.err
		}
		return known, nil
	}
	running := make(chan struct{})
	a.running = running
	a.mu.Unlock()

	scheme, err := a.detect(ctx)
	a.done(err)
	if err == nil && (known == nil || known.scheme != scheme) {
		_ = known.close()
		known = a.become(scheme)
		a.net.cfg.Log.Info("upstream found out", zap.String("upstream", a.name), zap.String("protocol", scheme))
	}

	a.mu.Lock()
	defer a.mu.Unlock()
	a.running = nil
	close(running)
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		return nil, err // this caller has gone; the next one asks
	}
	a.asked, a.err, a.doubted = a.net.cfg.Now(), err, false
	if err != nil {
		a.doubted = true
		return nil, err
	}
	a.known.Store(known)
	if a.ended {
		_ = known.close()
	}
	SetState(known.Dialer, a.State()) // it may have been switched meanwhile
	return known, nil
}

// become returns the dialer for a protocol. The server's addresses are shared with it.
func (a *Auto) become(scheme string) *speaker {
	s := a.spec
	s.Scheme = scheme
	k := &speaker{scheme: scheme}
	switch scheme {
	case SchemeSOCKS5h:
		d := newSOCKS5(a.name, s, a.net)
		d.host, k.Dialer = a.host, d
	case SchemeHTTP:
		d := newHTTP(a.name, s, a.net)
		d.host, k.Dialer = a.host, d
	default:
		d := newSOCKS4(a.name, s, a.net)
		d.host, k.Dialer = a.host, d
	}
	return k
}

// detect asks the server what it is.
func (a *Auto) detect(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, probeLimit, flow.ErrTimeout)
	defer cancel()
	probes := []struct {
		scheme, says string
		heard        func([]byte) bool
	}{
		// RFC 1928 section 3: the methods none and user/password. Whatever the choice, the version is the answer.
		{SchemeSOCKS5h, "\x05\x02\x00\x02", func(b []byte) bool { return len(b) >= 2 && b[0] == socksVersion }},
		// A request about the server itself, which every HTTP server answers in some way, and which ends the connection.
		{SchemeHTTP, "OPTIONS * HTTP/1.1\r\nHost: " + a.spec.Server() + "\r\nConnection: close\r\n\r\n", func(b []byte) bool { return len(b) >= 7 && string(b[:7]) == "HTTP/1." }},
		// A connection to nowhere, which can only be refused: the one question that asks the server to do something, so it comes last.
		{SchemeSOCKS4a, "\x04\x01\x00\x00\x00\x00\x00\x00\x00", func(b []byte) bool {
			return len(b) >= 2 && (b[0] == 0 || b[0] == socks4Version) && b[1] >= socks4Granted && b[1] <= socks4Ident
		}},
	}
	scheme, errs := race(ctx, len(probes), probeStagger, func(ctx context.Context, i int) (string, error) {
		p := probes[i]
		c, err := a.knock(ctx)
		if err != nil {
			return "", err
		}
		defer c.Abort()
		err = handshake(ctx, c, func() error { return probe(c, p.says, p.heard) })
		if err != nil {
			return "", a.fault(ctx, "no "+p.scheme, err)
		}
		return p.scheme, nil
	}, func(error) bool { return true }, func(string) {})
	if scheme == "" {
		return "", a.wrap("detect", joined(errs))
	}
	return scheme, nil
}

// joined is errors on one line.
type joined []error

func (j joined) Error() string {
	texts := make([]string, len(j))
	for i, err := range j {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

func (j joined) Unwrap() []error { return j }

// probe sends a question and reads until the answer is known: seven bytes at most.
func probe(c io.ReadWriter, says string, heard func([]byte) bool) error {
	if _, err := io.WriteString(c, says); err != nil {
		return err
	}
	var buf [7]byte
	for n := 0; n < len(buf); {
		k, err := c.Read(buf[n:])
		if n += k; heard(buf[:n]) {
			return nil
		}
		if err != nil {
			return noEOF(err)
		}
	}
	return fmt.Errorf("it says %q", buf)
}
