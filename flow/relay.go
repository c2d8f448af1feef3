// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// halfIdle ends a flow whose one direction has ended and whose other has moved nothing for so long. An established flow has no such
	// limit (idle ssh sessions and database pools live for days; keep-alive finds the dead ones), but of half-closed ones the keep-alive
	// of a peer that has forgotten to close says "alive" for ever. Linux waits a minute in FIN-WAIT-2 for orphans; an hour leaves room for
	// "send the query, shut down, compute, answer".
	halfIdle = time.Hour
	// lingerTime is how long what one side has sent before it failed may take to reach the other.
	lingerTime = 5 * time.Second
	// discardFast bounds the bytes of a side that nobody listens to which are read as fast as they come: more than two kernels hold of an
	// answer's end. Who sends more is not about to end, and would, for as long as we linger, cost as much as a download that somebody wants.
	// From then on a buffer is read each discardPace: often enough to see the end, and the sender's window does the rest.
	discardFast = 1 << 20
	discardPace = 20 * time.Millisecond
)

// relaying is one flow being relayed.
type relaying struct {
	app, up Conn
	e       *entry
	buffers *bufferPool
	crew    *crew
	fast    bool // app moves and counts the bytes itself
	// pacing ends with the flow; nil = its bandwidth was not limited when it began.
	pacing context.Context //nolint:containedctx // of the waits in both directions
	hurry  context.CancelFunc
	head   []byte

	uploading sync.WaitGroup

	mu     sync.Mutex
	timer  *time.Timer // of a half-closed flow
	half   bool        // one direction has come to its end of file
	failed error       // what broke the flow, nil if nothing has
	over   bool
	lost   losses
}

// relay moves bytes both ways until both directions have ended, or ctx has, and closes both. head is sent to up first.
//
// An end of file on one side becomes a FIN on the other, while the opposite direction goes on. A side that breaks (reset) is answered by a
// reset of the other. A side that no longer takes bytes, but has sent some, gets them through before the flow ends.
//
// Backpressure is the conns' own: a direction reads only what the other side has taken. A flow holds one buffer a direction while it runs,
// and none at all if app moves the bytes by itself, from and to the socket of up.
//
// The caller's goroutine downloads. The upload has one of the crew's, if app is a Parker only while there is something to send.
func relay(ctx context.Context, app, up Conn, head []byte, e *entry, buffers *bufferPool, crew *crew) error {
	r := &relaying{app: app, up: up, e: e, buffers: buffers, crew: crew, head: head}
	if e.t.paced() {
		r.pacing, r.hurry = context.WithCancel(ctx)
		defer r.hurry()
	}
	if s, ok := app.(Splicer); ok && len(head) == 0 && r.pacing == nil {
		if sock, ok := up.(Socket); ok && r.spliced(ctx, s, sock) {
			return r.close()
		}
	}
	_, wt := app.(io.WriterTo)
	_, rf := app.(io.ReaderFrom)
	if c, ok := app.(Counted); ok && wt && rf && r.pacing == nil {
		c.SetCounters(&e.up, &e.down)
		r.fast = true
	}
	aborted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(aborted)
		r.abort(context.Cause(ctx))
	})
	r.uploading.Add(1)
	r.startUpload()
	r.direction(up, app, r.download)
	r.uploading.Wait()
	if !stop() {
		<-aborted
	}
	return r.close()
}

// startUpload has the upload run whenever there is something to send.
func (r *relaying) startUpload() {
	run := func() {
		if r.direction(r.app, r.up, r.upload) {
			r.uploading.Done()
		}
	}
	if p, ok := r.app.(Parker); ok && r.fast && len(r.head) == 0 {
		p.Park(func() { r.crew.run(run) })
		return
	}
	r.crew.run(run)
}

// upload moves application → upstream until the application's end of file (nil), an error, or ErrParked.
func (r *relaying) upload() error {
	if len(r.head) > 0 {
		if _, err := r.up.Write(r.head); err != nil {
			return &WriteError{err}
		}
		r.e.up.Add(uint64(len(r.head)))
		r.head = nil
	}
	if r.fast {
		_, err := r.app.(io.WriterTo).WriteTo(r.up)
		return err
	}
	return r.copy(r.up, r.app, true)
}

// download moves upstream → application.
func (r *relaying) download() error {
	if r.fast {
		_, err := r.app.(io.ReaderFrom).ReadFrom(r.up)
		return err
	}
	return r.copy(r.app, r.up, false)
}

// spliced leaves the bytes to app, waits for the end of both directions, and reports whether that could be done. Who waits is the flow's own
// goroutine, the only one it has.
func (r *relaying) spliced(ctx context.Context, app Splicer, up Socket) bool {
	var running sync.WaitGroup
	running.Add(2)
	far, begin, err := app.Splice(up, &r.e.up, &r.e.down, func(upload bool, err error) {
		src, dst := r.app, r.up
		if !upload {
			src, dst = dst, src
		}
		if isWriteError(err) { // src is read until it ends
			r.lost.note(r.app == dst, err) // before the worker comes to what dst has sent
			go func() {
				defer running.Done()
				r.settle(src, dst, err)
			}()
			return
		}
		r.settle(src, dst, err)
		running.Done()
	})
	if err != nil {
		return false
	}
	r.up = far
	aborted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(aborted)
		r.abort(context.Cause(ctx))
	})
	if err := begin(); err != nil {
		r.abort(err)
	}
	running.Wait()
	if !stop() {
		<-aborted
	}
	return true
}

// direction runs one direction to its end and passes that end on. False if it has been parked before.
func (r *relaying) direction(src, dst Conn, move func() error) bool {
	err := move()
	if errors.Is(err, ErrParked) {
		return false
	}
	r.settle(src, dst, err)
	return true
}

// settle passes the end of a direction on.
func (r *relaying) settle(src, dst Conn, err error) {
	if err == nil {
		err = r.lost.behind(r.app == src, src)
	}
	switch {
	case err == nil:
		r.lost.finish(r.app == dst)
		_ = dst.CloseWrite() // if it fails, dst is gone, which the other direction finds out by reading from it
		r.ended(dst)
	case isWriteError(err):
		// dst takes no more, but what it sent before may still be on its way to src: let the other direction come to its own end. Meanwhile
		// src is read and its bytes thrown away, because unread bytes in a socket make closing it a reset of what is queued towards it.
		r.lost.note(r.app == dst, err)
		r.deaf(src, err)
		if err := r.discard(src); err != nil {
			src.Abort()
		}
	default:
		r.abort(err)
	}
}

// ended notes that dst has been sent all there is for it.
func (r *relaying) ended(dst Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.half = true
	if r.failed != nil {
		lingerLocked(dst)
	}
	r.closingLocked()
}

// deaf notes that nobody listens to src any more.
func (r *relaying) deaf(src Conn, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.brokenLocked(err)
	if r.half {
		lingerLocked(src)
	}
}

// lingerLocked gives c, which has been sent everything and is not listened to, the time to take it. It is reset after.
func lingerLocked(c Conn) {
	_ = c.SetReadDeadline(time.Now().Add(lingerTime))
}

// brokenLocked notes the first error.
func (r *relaying) brokenLocked(err error) {
	if r.failed == nil {
		r.failed = err
	}
	r.closingLocked()
}

// closingLocked starts the limit on how long a flow may be idle with one direction ended.
func (r *relaying) closingLocked() {
	if r.timer == nil && !r.over {
		r.e.setState(StateClosing)
		r.timer = time.AfterFunc(halfIdle, r.checkIdle)
	}
}

// checkIdle ends a half-closed flow that has been idle for halfIdle, else looks again when it could have been.
func (r *relaying) checkIdle() {
	idle := time.Duration(r.e.t.clock() - r.e.last())
	if idle >= halfIdle {
		r.abort(ErrIdle)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.over {
		r.timer.Reset(halfIdle - idle)
	}
}

// abort resets both sides, which ends both directions. The first error is the flow's.
func (r *relaying) abort(err error) {
	r.mu.Lock()
	r.brokenLocked(err)
	r.mu.Unlock()
	if r.hurry != nil {
		r.hurry()
	}
	r.app.Abort()
	r.up.Abort()
}

// close ends the flow after both directions have.
func (r *relaying) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over = true
	if r.timer != nil {
		r.timer.Stop()
	}
	r.app.Close()
	r.up.Close()
	return r.failed
}

// isWriteError reports whether it was the destination of a copy that failed.
func isWriteError(err error) bool {
	var we *WriteError
	var oe *net.OpError
	return errors.As(err, &we) || errors.As(err, &oe) && oe.Op == "write"
}

// copy moves src → dst until src's end of file (nil) or an error, counting as it goes.
func (r *relaying) copy(dst io.Writer, src io.Reader, upload bool) error {
	c, size := &r.e.down, bufferSize
	if upload {
		c = &r.e.up
	}
	buf := r.buffers.get()
	defer r.buffers.put(buf)
	for {
		if r.pacing != nil {
			size = r.e.t.turn()
		}
		n, err := src.Read(buf[:size])
		if n > 0 {
			if r.pacing != nil {
				if werr := r.e.t.wait(r.pacing, upload, n); werr != nil {
					return werr
				}
			}
			if _, werr := dst.Write(buf[:n]); werr != nil {
				return &WriteError{werr}
			}
			c.Add(uint64(n))
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read: %w", err)
		}
	}
}

// discard reads src to its end of file (nil) or an error.
func (r *relaying) discard(src io.Reader) error {
	buf := r.buffers.get()
	defer r.buffers.put(buf)
	var pace *time.Ticker
	for total := 0; ; {
		n, err := src.Read(buf[:])
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		if total += n; total <= discardFast {
			continue
		}
		if pace == nil {
			pace = time.NewTicker(discardPace)
			defer pace.Stop()
		}
		<-pace.C
	}
}
