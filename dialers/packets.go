// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

var (
	_ flow.UDPNamer = (*SOCKS5)(nil)
	_ flow.UDPNamer = (*Direct)(nil)
	_ flow.UDPNamer = (*resolving)(nil)
	_ flow.UDPNamer = (*Pool)(nil)

	_ flow.Waiter = (*association)(nil)
	_ flow.Waiter = (*plainUDP)(nil)
	_ flow.Waiter = (*namedPackets)(nil)
)

// UDPNames reports whether associations can be given names; one that there is none of cannot go wrong.
func (s *SOCKS5) UDPNames() bool { return s.names || s.spec.UDP == UDPOff }

// UDPNames reports that a direct socket sends to addresses only.
func (d *Direct) UDPNames() bool { return false }

// UDPNames is the upstream's own: resolving for it means the same DNS that flow has just asked in vain.
func (r *resolving) UDPNames() bool {
	n, ok := r.Dialer.(flow.UDPNamer)
	return ok && n.UDPNames()
}

// UDPNames reports whether every member takes names: which one will carry an association is not known before. Members that carry no UDP
// (HTTP, SOCKS4) do not say, and do not count.
func (p *Pool) UDPNames() bool {
	for _, d := range p.via {
		if n, ok := d.(flow.UDPNamer); ok && !n.UDPNames() {
			return false
		}
	}
	return true
}

// WaitRead waits until there is something to read, for readers that hold no buffer meanwhile (flow.Waiter). The one goroutine that calls
// ReadBatch calls it.
func (c *batchConn) WaitRead() error {
	c.rd.asked = false
	return c.raw.Read(c.rd.readable)
}

// readable reports whether the socket has a datagram or an error; false waits for one. It asks the kernel only before it waits: what comes after
// that, the poller says by itself. Should it be wrong, ReadBatch waits.
func (c *batchConn) readable(fd uintptr) bool {
	if c.rd.asked {
		if c.rd.n > 1 { // of the last batch: a single datagram is not to wait
			c.rd.pause.take()
		}
		return true
	}
	c.rd.asked = true
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		// Raw, as in mmsg: it returns at once.
		n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p[0])), 1, uintptr(unsafe.Pointer(&unix.Timespec{})), 0, 0, 0)
		if errno != unix.EINTR {
			return n != 0 // with any other error, reading says what is wrong
		}
	}
}

// pause lets whoever is sending to a reader that was just woken up go on before it reads: the reader then finds a batch instead of a datagram or two,
// and is woken up for one of three. It costs a fifth less CPU a datagram where sender and reader share processors, and nothing where they do not.
//
// Others may be waiting for the processor too, and for longer: after a pause of more than pauseLong there is none for pauseRest, which bounds what
// they take from the reader to less than a hundredth.
type pause struct {
	rest time.Time // none before
}

const (
	pauseLong = 1500 * time.Microsecond // a slice of the scheduler is 3 ms, what a sender does at a time some 100 µs
	pauseRest = 500 * time.Millisecond
)

func (p *pause) take() {
	begin := time.Now()
	if p.resting(begin) {
		return
	}
	_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	end := time.Now()
	p.after(end, end.Sub(begin))
}

func (p *pause) resting(now time.Time) bool { return now.Before(p.rest) }

// after is told how long a pause has been.
func (p *pause) after(now time.Time, d time.Duration) {
	if d > pauseLong {
		p.rest = now.Add(pauseRest)
	}
}

// WaitRead is batchConn's, with the association's reasons.
func (a *association) WaitRead() error { return a.why(a.batchConn.WaitRead()) }

// WaitRead is batchConn's.
func (p *plainUDP) WaitRead() error { return closedErr(p.batchConn.WaitRead()) }

// WaitRead waits if the association below can.
func (n *namedPackets) WaitRead() error {
	if w, ok := n.PacketConn.(flow.Waiter); ok {
		return w.WaitRead()
	}
	return nil
}
