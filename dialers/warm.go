// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// maxWarm bounds the warm connections of one upstream: they are the server's descriptors too.
	maxWarm = 64
	// warmIdle is how long a connection waits for a flow, less up to warmJitter percent, so that not all are made again at once. Servers end clients
	// that say nothing: HAProxy as usually set up after 10 s, apache after 20 s, dante after 30 s.
	warmIdle   = 8 * time.Second
	warmJitter = 40
	// warmRest is how long after its last flow an upstream is still kept warm.
	warmRest = 30 * time.Second
	// warmDial bounds the making of one.
	warmDial = 10 * time.Second
	// warmPause is how long none is made after one has failed or was ended by the server, doubled up to maxWarmPause: a server that wants no
	// idle clients is left alone.
	warmPause    = time.Second
	maxWarmPause = time.Minute
	// warmLost is how long the server's machine may take to acknowledge a request on a connection that has been idle (TCP_USER_TIMEOUT): a
	// machine that has lost it, or a NAT between, is silent, and the flow has the rest of its time for a new connection. It counts where there
	// is no place for a second one at the same time (max_flows).
	warmLost = 2 * time.Second
	// warmPercentile of the answers over such connections come in the usual time. A new one is asked beside one that takes longer: its kernel
	// acknowledges what a process that hangs never reads. warmPatience is that time as long as it is not known, and minWarmPatience its least:
	// below, destinations that are a little slow would be asked for twice. The most is maxStagger.
	warmPercentile  = 95
	warmPatience    = time.Second
	minWarmPatience = 100 * time.Millisecond
)

// warmConn is a connection to the server that has gone as far as it can before a destination is known.
type warmConn struct {
	tcp   *TCPConn
	conn  flow.Conn     // tcp, or TLS over it
	taken bool          // by a flow; guarded by warm.mu
	alive bool          // to be read after done
	done  chan struct{} // closed when nobody reads from it any more
}

// warm keeps connections ready, so that a flow does not wait for their making. It makes some when a flow comes, and none when no flow has come for a
// while. One goroutine makes a connection and then reads from it: an end, or a word, that comes before the request is the end of it at once.
type warm struct {
	most    int
	prepare func(context.Context) (*TCPConn, flow.Conn, error)
	room    func() int // for how many connections that wait there is room
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	idleTime, rest, first time.Duration // warmIdle, warmRest, warmPatience
	times                 quantile      // of the answers

	mu     sync.Mutex
	idle   []*warmConn // the oldest first; with making at most most
	making int
	usedAt time.Time
	pause  time.Duration // the last one; 0 = the last connection was good
	until  time.Time     // of the pause
	closed bool
}

// keepWarm begins with warm connections if the URL asks for them. prepare makes one.
func (u *upstream) keepWarm(prepare func(context.Context, *TCPConn) (flow.Conn, error)) {
	if u.spec.Warm == 0 {
		return
	}
	w := &warm{most: min(u.spec.Warm, maxWarm), room: u.room, idleTime: warmIdle, rest: warmRest, first: warmPatience}
	w.prepare = func(ctx context.Context) (*TCPConn, flow.Conn, error) {
		tcp, err := u.knock(ctx)
		if err != nil {
			return nil, nil, err
		}
		var c flow.Conn
		err = handshake(ctx, tcp, func() (err error) {
			c, err = prepare(ctx, tcp)
			return err
		})
		if err != nil {
			tcp.Abort()
			return nil, nil, err
		}
		return tcp, c, nil
	}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	u.warm = w
}

// warmed returns a connection that is ready, with a place at the upstream; nil if there is none.
func (u *upstream) warmed() *warmConn {
	if u.warm == nil || u.off() || u.take() != nil {
		return nil
	}
	c := u.warm.take()
	if c == nil {
		u.leave()
		return nil
	}
	c.tcp.leave = u.leave
	return c
}

// room is how many connections may wait: none while the upstream takes no flows, and with those that have one no more than max_flows.
func (u *upstream) room() int {
	switch {
	case u.off():
		return 0
	case u.most == 0:
		return maxWarm
	}
	return int(max(0, u.most-u.taken.Load()))
}

// Close ends the connections that are kept ready, and waits for who keeps them. Flows are not touched. It is idempotent.
func (u *upstream) Close() error {
	if u.warm != nil {
		u.warm.close()
	}
	return nil
}

// SetState switches. What takes no flows keeps no connections ready.
func (u *upstream) SetState(s State) {
	u.gate.SetState(s)
	if u.warm != nil && s != Enabled {
		u.warm.drop(0)
	}
}

// take returns the youngest connection that lives, or nil, and has new ones made.
func (w *warm) take() *warmConn {
	w.mu.Lock()
	w.usedAt = time.Now()
	w.mu.Unlock()
	defer w.fill()
	for {
		w.mu.Lock()
		n := len(w.idle)
		if n == 0 {
			w.mu.Unlock()
			return nil
		}
		c := w.idle[n-1]
		w.idle, c.taken = w.idle[:n-1], true
		w.mu.Unlock()
		_ = c.conn.SetReadDeadline(time.Unix(1, 0))
		<-c.done
		if c.alive {
			_ = c.conn.SetReadDeadline(time.Time{})
			return c
		}
		c.tcp.Abort()
	}
}

// fill begins to make what is missing, and ends what there is no room for.
func (w *warm) fill() {
	room := w.room()
	w.drop(room)
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if w.closed || now.Sub(w.usedAt) > w.rest || now.Before(w.until) {
		return
	}
	for most := min(w.most, room); len(w.idle)+w.making < most; w.making++ {
		w.wg.Go(w.keep)
	}
}

// keep makes one connection and watches it until a flow takes it, the server ends it, or it is too old.
func (w *warm) keep() {
	ctx, cancel := context.WithTimeout(w.ctx, warmDial)
	tcp, conn, err := w.prepare(ctx)
	cancel()
	w.mu.Lock()
	w.making--
	if err != nil || w.closed || w.room() <= len(w.idle) {
		if err != nil {
			w.failedLocked()
		}
		w.mu.Unlock()
		if err == nil {
			tcp.Abort()
		}
		return
	}
	c := &warmConn{tcp: tcp, conn: conn, done: make(chan struct{})}
	_ = tcp.userTimeout(warmLost)
	_ = conn.SetReadDeadline(time.Now().Add(w.idleTime - rand.N(w.idleTime*warmJitter/100)))
	w.idle = append(w.idle, c)
	w.mu.Unlock()

	var word [1]byte
	n, err := conn.Read(word[:])
	w.mu.Lock()
	c.alive = n == 0 && errors.Is(err, os.ErrDeadlineExceeded)
	if c.taken {
		w.mu.Unlock()
		close(c.done)
		return
	}
	w.idle = slices.DeleteFunc(w.idle, func(other *warmConn) bool { return other == c })
	if !c.alive {
		w.failedLocked()
	}
	w.mu.Unlock()
	close(c.done)
	_ = conn.Close()
	w.fill()
}

func (w *warm) failedLocked() {
	if time.Now().Before(w.until) {
		return // many that end together are one reason
	}
	w.pause = min(max(2*w.pause, warmPause), maxWarmPause)
	w.until = time.Now().Add(w.pause)
}

// worked notes that a connection was as good as a new one, and how long its answer took.
func (w *warm) worked(took time.Duration) {
	w.times.add(took)
	w.mu.Lock()
	w.pause = 0
	w.mu.Unlock()
}

// hung notes that a connection was silent until a new one had been made and had answered. Those of the same age are not tried.
func (w *warm) hung() {
	w.mu.Lock()
	w.failedLocked()
	w.mu.Unlock()
	w.drop(0)
}

// patience is how long an answer may take before a new connection is asked too.
func (w *warm) patience() time.Duration {
	usual, ok := w.times.at(warmPercentile)
	if !ok {
		return w.first
	}
	return min(max(usual, minWarmPatience), maxStagger)
}

// drop ends the oldest connections until no more than n wait.
func (w *warm) drop(n int) {
	w.mu.Lock()
	k := max(0, len(w.idle)-n)
	old := slices.Clone(w.idle[:k])
	w.idle = slices.Delete(w.idle, 0, k)
	for _, c := range old {
		c.taken = true
	}
	w.mu.Unlock()
	for _, c := range old {
		_ = c.conn.SetReadDeadline(time.Unix(1, 0))
		<-c.done
		_ = c.conn.Close()
	}
}

// waiting returns how many connections are ready.
func (w *warm) waiting() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.idle)
}

func (w *warm) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.cancel()
	w.drop(0)
	w.wg.Wait()
}

// overWarm asks on a connection that is ready, and with fresh on a new one when that is no good or takes longer than usual. The first answer
// counts, also one that says no; the other attempt is given up, and what it may have got is discarded.
func overWarm[T any](
	ctx context.Context, u *upstream, op string, c *warmConn, ask func() (T, error), fresh func(context.Context) (T, error), discard func(T),
) (T, error) {
	racing, answered := context.WithCancelCause(ctx)
	defer answered(nil)
	won, errs := race(racing, 2, u.warm.patience(), func(racing context.Context, i int) (v T, err error) {
		if i > 0 {
			v, err = fresh(racing)
		} else if err = u.askWarm(racing, c, func() (err error) { v, err = ask(); return err }); err != nil {
			if err = u.ended(racing, op, err); racing.Err() != nil && ctx.Err() == nil {
				u.warm.hung()
			}
		}
		if isAnswer(err) {
			answered(errLost)
		}
		return v, err
	}, func(err error) bool { return !isAnswer(err) }, discard)
	if len(errs) == 0 {
		return won, nil
	}
	if i := slices.IndexFunc(errs, isAnswer); i >= 0 {
		return won, errs[i]
	}
	return won, errs[len(errs)-1]
}

// askWarm asks on a connection that is ready, and ends it if it has no answer, or no for one.
func (u *upstream) askWarm(ctx context.Context, c *warmConn, ask func() error) error {
	begin := time.Now()
	err := handshake(ctx, c.tcp, ask)
	if err == nil {
		u.warm.worked(time.Since(begin))
		err = c.tcp.userTimeout(0)
	}
	if err != nil {
		c.tcp.Abort()
	}
	return err
}

// isAnswer reports whether an error is what the server has said about the destination.
func isAnswer(err error) bool {
	var rep replyError
	var rep4 reply4Error
	var status *statusError
	return errors.As(err, &rep) || errors.As(err, &rep4) || errors.As(err, &status)
}
