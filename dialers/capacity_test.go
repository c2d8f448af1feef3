// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/dialers/dialertest"
	"github.com/mutex-proxy/mutex/flow"
)

// says5 answers one SOCKS5 CONNECT with yes, and then waits.
func says5() []dialertest.Step {
	return []dialertest.Step{dialertest.Read(3), dialertest.Send(greet5), dialertest.Read(10), dialertest.Send("\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"), dialertest.Silent()}
}

// TestMaxFlows: no more than the maximum, places come back however a flow ends, and it is nobody's fault.
func TestMaxFlows(t *testing.T) {
	s := dialertest.Start(t, says5()...)
	d := dialer(t, "socks5://"+s.Addr.String()+"?max_flows=3")
	var open []flow.Conn
	for range 3 {
		c, err := d.Dial(testContext(t), addr(t, "192.0.2.1:80"))
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	if _, err := d.Dial(testContext(t), addr(t, "192.0.2.1:80")); !errors.Is(err, errFull) || !strings.Contains(err.Error(), "max_flows") {
		t.Errorf("a fourth: %v", err)
	}
	if st := StatusOf(d); st.Total != 3 || st.Errors != 0 || !st.Up {
		t.Errorf("%+v", st)
	}
	open[0].Abort()
	open[0].Close()
	open[1].Close()
	for range 2 {
		c, err := d.Dial(testContext(t), addr(t, "192.0.2.1:80"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	open[2].Close()
	// Attempts that fail give their place back too.
	s.Close()
	for range 5 {
		if _, err := d.Dial(testContext(t), addr(t, "192.0.2.1:80")); errors.Is(err, errFull) {
			t.Fatal(err)
		}
	}
}

// TestMaxFlowsRace: many at once never get more than the maximum.
func TestMaxFlowsRace(t *testing.T) {
	s := dialertest.Start(t, says5()...)
	d := dialer(t, "socks5://"+s.Addr.String()+"?max_flows=4")
	var wg sync.WaitGroup
	var got atomic.Int32
	for range 32 {
		wg.Go(func() {
			c, err := d.Dial(testContext(t), addr(t, "192.0.2.1:80"))
			if err == nil {
				got.Add(1)
				t.Cleanup(func() { c.Close() })
			} else if !errors.Is(err, errFull) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got.Load() != 4 {
		t.Errorf("%d flows", got.Load())
	}
}

// TestPoolMaxFlows: a full member is passed over, and comes back.
func TestPoolMaxFlows(t *testing.T) {
	a, b := dialertest.Start(t, says5()...), dialertest.Start(t, says5()...)
	for _, strategy := range strategies() {
		t.Run(strategy, func(t *testing.T) {
			first := dialer(t, "socks5://"+a.Addr.String()+"?max_flows=1&priority=0")
			second, err := New("second", spec(t, "socks5://"+b.Addr.String()+"?max_flows=2&priority=1"), NewNet(NetConfig{}))
			if err != nil {
				t.Fatal(err)
			}
			p, err := NewPool("eu", strategy, []flow.Dialer{first, second}, PoolConfig{})
			if err != nil {
				t.Fatal(err)
			}
			var open []flow.Conn
			for i := range 3 {
				c, err := p.Dial(testContext(t), addr(t, "192.0.2.1:80"))
				if err != nil {
					t.Fatalf("flow %d: %v", i, err)
				}
				open = append(open, c)
			}
			if _, err := p.Dial(testContext(t), addr(t, "192.0.2.1:80")); !errors.Is(err, errFull) {
				t.Errorf("one more than all may have: %v", err)
			}
			for _, st := range p.(*Pool).Members() {
				if !st.Up {
					t.Errorf("a full member was held against: %+v", st)
				}
			}
			for _, c := range open {
				c.Close()
			}
			c, err := p.Dial(testContext(t), addr(t, "192.0.2.1:80"))
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		})
	}
}

// packets is a PacketConn whose answers a test makes; silent is a member whose UDP is dead while its TCP is not.
type packets struct {
	silent bool
	closed chan struct{}
	once   sync.Once
	asked  chan []byte
	until  atomic.Int64
}

func (p *packets) WriteBatch(ds []flow.Datagram) (int, error) {
	select {
	case p.asked <- append([]byte(nil), ds[0].Buf...):
	default:
	}
	return len(ds), nil
}

func (p *packets) ReadBatch(ds []flow.Datagram) (int, error) {
	asked := p.asked
	if p.silent {
		asked = nil
	}
	timer := time.NewTimer(time.Until(time.Unix(0, p.until.Load())))
	defer timer.Stop()
	select {
	case q := <-asked:
		var m dns.Msg
		if err := m.Unpack(q); err != nil {
			return 0, err
		}
		reply, err := new(dns.Msg).SetReply(&m).Pack()
		ds[0].Buf = append(ds[0].Buf[:0], reply...)
		return 1, err
	case <-timer.C:
		return 0, context.DeadlineExceeded
	case <-p.closed:
		return 0, net.ErrClosed
	}
}

func (p *packets) SetReadDeadline(t time.Time) error {
	p.until.Store(t.UnixNano())
	return nil
}

func (p *packets) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

// udpMember carries UDP as long as it is alive.
type udpMember struct {
	name   string
	silent atomic.Bool
	opened atomic.Int32
}

func (m *udpMember) Name() string { return m.name }
func (m *udpMember) Dial(context.Context, flow.Addr) (flow.Conn, error) {
	return nil, flow.ErrRefused // it lives
}

func (m *udpMember) ListenPacket(context.Context, *flow.Flow) (flow.PacketConn, error) {
	m.opened.Add(1)
	return &packets{silent: m.silent.Load(), closed: make(chan struct{}), asked: make(chan []byte, 8)}, nil
}

// TestUDPHealth: a member whose UDP is dead is passed over for UDP alone, and is back when it answers.
func TestUDPHealth(t *testing.T) {
	a, b := &udpMember{name: "a"}, &udpMember{name: "b"}
	a.silent.Store(true)
	d, err := NewPool("eu", Failover, []flow.Dialer{a, b}, PoolConfig{
		Failures: 2, Eject: 50 * time.Millisecond, Settle: time.Millisecond,
		Health: HealthConfig{UDPTarget: "192.0.2.53", Interval: 10 * time.Millisecond, Timeout: 30 * time.Millisecond},
	})
	if err != nil {
		t.Fatal(err)
	}
	p := d.(*Pool)
	p.Start()
	defer p.Close()
	out := func(by carriage) bool { return p.members[0].conditions[by].ejectedUntil.Load() != 0 }
	waitFor(t, "the ejection for UDP", func() bool { return out(byUDP) })
	if out(byTCP) {
		t.Error("ejected for TCP too")
	}
	if got := p.Members()[0]; got.UDP != no || !got.Up {
		t.Errorf("%+v", got)
	}
	if i := p.choose(byTCP, 0, nil); i != 0 {
		t.Errorf("TCP goes to member %d", i)
	}
	a.silent.Store(false)
	waitFor(t, "the return", func() bool { return !out(byUDP) && p.choose(byUDP, 0, nil) == 0 })
}

func TestUDPTarget(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.53": "192.0.2.53:53", "192.0.2.53:5353": "192.0.2.53:5353", "[2001:db8::53]": "[2001:db8::53]:53", "[2001:db8::53]:1": "[2001:db8::53]:1",
		"dns.example": "", "": "", "192.0.2.53:x": "",
	} {
		got, err := parseUDPTarget(in)
		if want == "" && err == nil || want != "" && (err != nil || got.String() != want) {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
}
