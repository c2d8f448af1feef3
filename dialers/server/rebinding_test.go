// SPDX-License-Identifier: GPL-3.0-or-later

package server

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// flipping is the name server of a domain whose owner wants others to reach what they may not: the name leads to an allowed address first, and to
// a denied one from then on.
type flipping struct {
	at      netip.AddrPort
	asked   atomic.Int32
	flipped atomic.Bool
	both    atomic.Bool // one answer has both
}

const (
	allowed = "127.0.0.2" // stands for a public address
	denied  = "127.0.0.1"
)

func startFlipping(t *testing.T) *flipping {
	t.Helper()
	pc, err := net.ListenPacket("udp", denied+":0")
	if err != nil {
		t.Fatal(err)
	}
	f := &flipping{at: pc.LocalAddr().(*net.UDPAddr).AddrPort()}
	up, done := make(chan struct{}), make(chan struct{})
	s := &dns.Server{PacketConn: pc, NotifyStartedFunc: func() { close(up) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
		r := new(dns.Msg)
		r.SetReply(m)
		if q := m.Question[0]; q.Qtype == dns.TypeA {
			f.asked.Add(1)
			to := []string{allowed}
			if f.flipped.Load() {
				to = []string{denied}
			}
			if f.both.Load() {
				to = []string{allowed, denied}
			}
			for _, ip := range to {
				rr, err := dns.NewRR(q.Name + " 0 IN A " + ip)
				if err != nil {
					t.Error(err)
				}
				r.Answer = append(r.Answer, rr)
			}
		}
		_ = w.WriteMsg(r)
	})}
	go func() {
		defer close(done)
		_ = s.ActivateAndServe()
	}()
	<-up
	t.Cleanup(func() {
		_ = s.Shutdown()
		<-done
	})
	return f
}

// TestRebinding: what a name leads to is looked at when it is used, each time, and what has been looked at is what is used.
func TestRebinding(t *testing.T) {
	f := startFlipping(t)
	allow, err := Destinations([]string{allowed}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var hours atomic.Int64 // no answer is remembered for as long
	begin := time.Now()
	n := dialers.NewNet(dialers.NetConfig{
		Nameservers: []netip.AddrPort{f.at}, HostsFile: t.TempDir() + "/hosts",
		Now: func() time.Time { return begin.Add(time.Duration(hours.Add(1)) * time.Hour) },
	})
	_, at := start(t, Config{Net: n, Allow: allow})
	inside := dialertest.Start(t, dialertest.Send("inside"))
	outside, err := n.ListenTCP(t.Context(), netip.AddrPortFrom(netip.MustParseAddr(allowed), inside.Addr.Port()))
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	name := flow.Addr{Host: "flip.example", Port: inside.Addr.Port()}
	dial := func(raw string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		c, err := dialer(t, raw+at.String()).Dial(ctx, name)
		if err == nil {
			c.Abort()
		}
		return err
	}
	udpInside := echoUDP(t, denied+":0")
	udpOutside := echoUDP(t, netip.AddrPortFrom(netip.MustParseAddr(allowed), udpInside.Port()).String())
	datagrams := flow.Addr{Host: name.Host, Port: udpOutside.Port()}

	// While the name leads where it may, it is followed.
	for _, raw := range []string{"socks5h://", "socks4a://", "http://"} {
		if err := dial(raw); err != nil {
			t.Errorf("%s: %v", raw, err)
		}
	}
	if got := exchange(t, listen(t, "socks5h://"+at.String()), datagrams, []byte("x")); got.Addr.IP.String() != allowed {
		t.Errorf("an answer from %v", got.Addr)
	}
	b, err := bind(t, "socks5h://"+at.String(), "flip.example:1")
	if err != nil {
		t.Fatal(err)
	}
	// A BIND that waits is for the address the name had.
	f.flipped.Store(true)
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(denied)}, Timeout: 5 * time.Second}
	if stranger, err := d.DialContext(t.Context(), "tcp", b.Addr().String()); err == nil { // the reset may come before it knows that it is connected
		_ = stranger.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := stranger.Read(make([]byte, 1)); err == nil {
			t.Error("a stranger is served")
		}
		stranger.Close()
	}
	friend := knock(t, allowed, b.Addr())
	if c, from, err := b.Accept(t.Context()); err != nil || from.Addr().String() != allowed {
		t.Errorf("%v, %v", from, err)
	} else {
		c.Abort()
	}
	friend.Close()

	// From now on it leads to loopback, or to both.
	for _, both := range []bool{false, true} {
		f.both.Store(both)
		for _, raw := range []string{"socks5h://", "socks4a://", "http://"} {
			if err := dial(raw); (err == nil) != both {
				t.Errorf("both %v, %s: %v", both, raw, err)
			}
		}
	}
	_ = outside.Close() // and now the allowed one of both refuses: the other is not tried instead
	for _, raw := range []string{"socks5h://", "socks4a://", "http://"} {
		if err := dial(raw); err == nil {
			t.Errorf("%s reaches what is denied", raw)
		}
	}
	f.both.Store(false)
	if _, err := bind(t, "socks5h://"+at.String(), "flip.example:1"); err == nil {
		t.Error("a BIND for loopback")
	}
	for _, url := range []string{"socks5h://" + at.String(), "socks5h://" + at.String() + "?udp=over-tcp"} {
		pc := listen(t, url)
		asked := f.asked.Load()
		if _, err := pc.WriteBatch([]flow.Datagram{{Addr: datagrams, Buf: []byte("x")}}); err != nil {
			t.Fatal(err)
		}
		for f.asked.Load() == asked { // the name has been looked up, so that silence means something
			<-time.After(time.Millisecond)
		}
		_ = pc.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		ds := []flow.Datagram{{Buf: make([]byte, maxDatagram)}}
		if k, err := pc.ReadBatch(ds); err == nil && k > 0 {
			t.Errorf("%s: an answer from %v", url, ds[0].Addr)
		}
	}
	if inside.Accepted() != 0 {
		t.Errorf("%d connections to what is denied", inside.Accepted())
	}
}
