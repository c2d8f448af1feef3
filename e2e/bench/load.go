// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// The kinds of load.
const (
	kindUp    = "up"    // bulk towards the origin
	kindDown  = "down"  // bulk from the origin
	kindUDP   = "udp"   // echo, a number of datagrams outstanding on each flow
	kindConns = "conns" // connect, echo, close, by a number of workers
	kindFirst = "first" // one connection after the other: connect until the first byte is back
	kindRR    = "rr"    // request and response on one connection
	kindIdle  = "idle"  // open many connections, use each once, keep them until told to close
	kindWho   = "who"   // wait until the origin sees the proxy, not the client
)

// loadSpec is one load. It is given to a process of its own, in the client's namespace.
type loadSpec struct {
	Kind        string
	V6          bool
	SOCKS       string  // ask this server oneself; "" = connect
	Streams     int     // connections, flows or workers
	Seconds     float64 // for how long
	Size        int     // bytes of a datagram or request
	Outstanding int     // datagrams of a flow on their way
	Train       int     // datagrams sent as one, by UDP_SEGMENT; 0 = one a system call
	RTT         float64 // of the link to the server, in seconds
}

// loadResult is what came of it.
type loadResult struct {
	Seconds float64
	Bytes   uint64
	Count   uint64 // echoes, connections
	Errors  uint64
	Error   string    // one of them
	P50     float64   // µs
	P99     float64   // µs
	Streams []float64 // bytes of each
}

// load runs a load in the subject's namespace: bulk by iperf3, the rest by this program.
func (l *lab) load(ctx context.Context, s *subject, spec loadSpec) (loadResult, error) {
	if spec.Kind == kindUp || spec.Kind == kindDown {
		return l.bulk(ctx, s, spec)
	}
	var r loadResult
	cmd, err := l.loadCommand(s, spec)
	if err != nil {
		return r, err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		return r, err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	if err := cmd.Wait(); err != nil {
		return r, fmt.Errorf("load %s through %s: %w: %s", spec.Kind, s.name, err, stderr.Bytes())
	}
	return r, json.Unmarshal(stdout.Bytes(), &r)
}

func (l *lab) loadCommand(s *subject, spec loadSpec) (*exec.Cmd, error) {
	spec.SOCKS, spec.RTT = s.socks, 2*l.link.Delay.Seconds()
	arg, err := json.Marshal(spec)
	return inNS(s.ns, l.self, "load", string(arg)), err
}

// loader is the running load.
type loader struct {
	loadSpec
	origin  netip.Addr
	results loadResult
	count   atomic.Uint64
	mu      sync.Mutex
}

// runLoad is the process that makes a load.
func runLoad(args []string) error {
	var l loader
	if err := json.Unmarshal([]byte(args[0]), &l.loadSpec); err != nil {
		return err
	}
	l.origin = originOf(l.V6)
	var err error
	switch l.Kind {
	case kindUDP:
		err = l.udp()
	case kindConns:
		l.conns()
	case kindFirst:
		l.first()
	case kindRR:
		err = l.rr()
	case kindIdle:
		err = l.idle()
	case kindWho:
		l.who()
	default:
		err = fmt.Errorf("no load %q", l.Kind)
	}
	if err != nil {
		return err
	}
	l.results.Count += l.count.Load()
	return json.NewEncoder(os.Stdout).Encode(l.results)
}

func (l *loader) length() time.Duration { return time.Duration(l.Seconds * float64(time.Second)) }

// dialTimeout is how long a connection may take: a lost SYN is repeated after a second.
const dialTimeout = 10 * time.Second

func (l *loader) dial(port uint16) (*net.TCPConn, error) {
	dst := netip.AddrPortFrom(l.origin, port)
	if l.SOCKS != "" {
		return dialSOCKS(l.SOCKS, dst)
	}
	c, err := (&net.Dialer{Timeout: dialTimeout}).Dial("tcp", dst.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func (l *loader) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.results.Errors++
	l.results.Error = err.Error()
}

// conns opens, uses and closes connections.
func (l *loader) conns() {
	begin := time.Now()
	end := begin.Add(l.length())
	var wg sync.WaitGroup
	var all []time.Duration
	for range l.Streams {
		wg.Go(func() {
			var took []time.Duration
			for now := time.Now(); now.Before(end); {
				if err := l.once(64); err != nil {
					l.fail(err)
				} else {
					l.count.Add(1)
				}
				then := time.Now()
				took = append(took, then.Sub(now))
				now = then
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			all = append(all, took...)
		})
	}
	wg.Wait()
	l.results.Seconds = time.Since(begin).Seconds()
	l.percentiles(all)
}

// once is connect, echo, close.
func (l *loader) once(size int) error {
	c, err := l.dial(portEcho)
	if err != nil {
		return err
	}
	defer c.Close()
	return exchange(c, make([]byte, size))
}

func exchange(c *net.TCPConn, buf []byte) error {
	_ = c.SetDeadline(time.Now().Add(dialTimeout))
	if _, err := c.Write(buf); err != nil {
		return err
	}
	_, err := io.ReadFull(c, buf)
	return err
}

// first measures how long a new connection takes to bring its first byte.
func (l *loader) first() {
	var took []time.Duration
	begin := time.Now()
	for end := begin.Add(l.length()); time.Now().Before(end); {
		start := time.Now()
		if err := l.once(1); err != nil {
			l.fail(err)
			continue
		}
		took = append(took, time.Since(start))
	}
	l.results.Seconds = time.Since(begin).Seconds()
	l.results.Count = uint64(len(took))
	l.percentiles(took)
}

// rr measures a round trip on a connection that is open.
func (l *loader) rr() error {
	c, err := l.dial(portEcho)
	if err != nil {
		return err
	}
	defer c.Close()
	var took []time.Duration
	buf := make([]byte, 64)
	begin := time.Now()
	for end := begin.Add(l.length()); time.Now().Before(end); {
		start := time.Now()
		if err := exchange(c, buf); err != nil {
			return err
		}
		took = append(took, time.Since(start))
	}
	l.results.Seconds = time.Since(begin).Seconds()
	l.results.Count = uint64(len(took))
	l.percentiles(took)
	return nil
}

func (l *loader) percentiles(d []time.Duration) {
	if len(d) == 0 {
		return
	}
	slices.Sort(d)
	l.results.P50 = float64(d[len(d)/2]) / float64(time.Microsecond)
	l.results.P99 = float64(d[len(d)*99/100]) / float64(time.Microsecond)
}

// idle opens connections, says so in a line, and closes them when its standard input does.
func (l *loader) idle() error {
	conns := make([]*net.TCPConn, l.Streams)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(conns)); i = next.Add(1) - 1 {
				c, err := l.dial(portEcho)
				if err == nil {
					err = exchange(c, make([]byte, 64))
				}
				if err != nil {
					l.fail(err)
					continue
				}
				conns[i] = c
				l.count.Add(1)
			}
		})
	}
	wg.Wait()
	fmt.Println("open")
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
	for _, c := range conns {
		if c != nil {
			c.Close()
		}
	}
	return nil
}

// who asks the origin again and again who is asking, until that is no longer the client. A SYN may fall between two stools while an
// engine starts, and a first connection may be slow, so that none is waited for: the next is on its way after a few milliseconds.
func (l *loader) who() {
	const (
		pace = 3 * time.Millisecond // a busy loop would take a core from the engine that starts
		most = 64                   // asking at the same time
	)
	begin := time.Now()
	ctx, stop := context.WithTimeout(context.Background(), l.length())
	defer stop()
	var proxied atomic.Bool
	var asking sync.WaitGroup
	next := time.NewTicker(pace)
	defer next.Stop()
	for places := make(chan struct{}, most); ctx.Err() == nil; {
		select {
		case places <- struct{}{}:
			asking.Go(func() {
				defer func() { <-places }()
				if l.asProxy(ctx) {
					proxied.Store(true)
					stop()
				}
			})
		default:
		}
		select {
		case <-next.C:
		case <-ctx.Done():
		}
	}
	l.results.Seconds = time.Since(begin).Seconds()
	asking.Wait()
	if proxied.Load() {
		l.results.Count = 1
	}
}

// asProxy reports whether the origin sees somebody else than the client.
func (l *loader) asProxy(ctx context.Context) bool {
	ctx, stop := context.WithTimeout(ctx, 300*time.Millisecond+5*time.Duration(l.RTT*float64(time.Second)))
	defer stop()
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", netip.AddrPortFrom(l.origin, portWho).String())
	if err != nil {
		return false
	}
	defer context.AfterFunc(ctx, func() { c.Close() })()
	defer c.Close()
	name, _ := io.ReadAll(c)
	a, err := netip.ParseAddr(string(name))
	return err == nil && !a.IsPrivate()
}
