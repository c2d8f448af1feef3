// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Crowd is a process in the client's namespace that has many connections to the origin's echo port: with descriptors of its own, and without
// the change of namespaces that each Dial of the test's process takes.
type Crowd struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Reader
}

// CrowdTask is one thing that a Crowd does.
type CrowdTask struct {
	Conns   int
	Workers int    // how many at a time are between the dial and the echo
	Hold    bool   // keep them until Leave; else each is closed once it is used
	Leave   bool   // close those that are held, each third by a reset
	Via     string // ask this SOCKS5 server oneself, with Pass; "" = connect
	Pass    string // "" = none
}

// CrowdResult is what came of it.
type CrowdResult struct {
	Failed  int
	Error   string // one of the failures
	Took    time.Duration
	Slowest time.Duration
}

// crowdTimeout bounds each step of one connection: a SYN that is lost is repeated after 1, 3 and 7 s.
const crowdTimeout = 30 * time.Second

// Crowd starts one; it ends with the test.
func (l *Lab) Crowd(t *testing.T) *Crowd {
	t.Helper()
	args, err := HelperCommand("crowd")
	if err != nil {
		t.Fatal(err)
	}
	cmd := l.Client.Command(args...)
	r, w := io.Pipe()
	cmd.Stdout = w
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p := Start(t, "crowd", cmd)
	go func() { <-p.Done(); w.Close() }()
	return &Crowd{t, in, bufio.NewReader(r)}
}

// Do has the crowd do something and fails the test if there is no answer.
func (c *Crowd) Do(task CrowdTask) CrowdResult {
	c.t.Helper()
	if err := json.NewEncoder(c.in).Encode(task); err != nil {
		c.t.Fatalf("crowd: %v", err)
	}
	line, err := c.out.ReadString('\n')
	var r CrowdResult
	if err = errors.Join(err, json.Unmarshal([]byte(line), &r)); err != nil {
		c.t.Fatalf("crowd: %v", err)
	}
	return r
}

// Must is Do of which nothing may fail.
func (c *Crowd) Must(task CrowdTask) CrowdResult {
	c.t.Helper()
	r := c.Do(task)
	if r.Failed > 0 {
		c.t.Errorf("%d of %d connections failed: %s", r.Failed, task.Conns, r.Error)
	}
	return r
}

// crowd is the process.
func crowd() {
	var held []net.Conn
	tasks := json.NewDecoder(os.Stdin)
	for {
		var task CrowdTask
		if tasks.Decode(&task) != nil {
			return
		}
		var r CrowdResult
		if task.Leave {
			for i, c := range held {
				if i%3 == 0 {
					_ = c.(*net.TCPConn).SetLinger(0)
				}
				c.Close()
			}
			held = nil
		} else {
			r = task.run(&held)
		}
		_ = json.NewEncoder(os.Stdout).Encode(r)
	}
}

func (task *CrowdTask) run(held *[]net.Conn) CrowdResult {
	var r CrowdResult
	var mu sync.Mutex
	var next atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for range task.Workers {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(task.Conns); i = next.Add(1) - 1 {
				started := time.Now()
				c, err := task.once(i)
				mu.Lock()
				switch {
				case err != nil:
					r.Failed++
					r.Error = err.Error()
				case task.Hold:
					*held = append(*held, c)
				default:
					c.Close()
				}
				r.Slowest = max(r.Slowest, time.Since(started))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	r.Took = time.Since(begin)
	return r
}

// once opens a connection and uses it.
func (task *CrowdTask) once(i int64) (net.Conn, error) {
	a := OriginV4
	if i%2 == 1 {
		a = OriginV6
	}
	dst := netip.AddrPortFrom(a, PortEcho)
	at := dst.String()
	if task.Via != "" {
		at = task.Via
	}
	c, err := net.DialTimeout("tcp", at, crowdTimeout)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(crowdTimeout))
	word := fmt.Sprintf("connection %d\n", i)
	got := make([]byte, len(word))
	if task.Via != "" {
		err = (&Server{Name: "upstream", Pass: task.Pass}).handshake(c, dst)
	}
	if err == nil {
		_, err = io.WriteString(c, word)
	}
	if err == nil {
		_, err = io.ReadFull(c, got)
	}
	if err == nil && string(got) != word {
		err = fmt.Errorf("%q came back as %q", strings.TrimSpace(word), got)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}
