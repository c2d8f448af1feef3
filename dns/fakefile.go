// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	// maxFakeLines bounds what is read at start: more than rewriting ever leaves.
	maxFakeLines = 3 * maxFakes
	// maxDirty bounds the changes that wait for the writer; with more of them the whole file is written anew instead.
	maxDirty = 4096
	// rewriteRetry is how long the mapping lives in memory only after a write has failed (disk full).
	rewriteRetry = 10 * time.Second
)

var errFakeFile = errors.New("not a mapping of these fake ranges")

// fakeFile keeps a fakePool on disk, so that a name has the same address after a restart. The file is a header line and one line a
// change: CRC-32 of the rest, slot, name. A change is appended at once and not synced: it survives the death of this process, and a
// machine that crashes takes the applications that knew the address with it. When half of the lines are outdated the file is written
// anew beside itself and renamed. One goroutine writes.
type fakeFile struct {
	path string
	pool *fakePool
	log  *zap.Logger

	mu      sync.Mutex
	dirty   []int32 // at most maxDirty
	rewrite bool    // dirty is not all there is to write

	wake chan struct{} // room for one
	quit chan struct{}
	done chan struct{}

	// The writer's own.
	file    *os.File // nil after an error
	lines   int
	retryAt time.Time
}

// openFakeFile restores the pool from path and starts to keep it there. A file that cannot be understood is replaced with a warning: the
// names get new addresses. The error is about a file that cannot be written at all.
func openFakeFile(path string, pool *fakePool, log *zap.Logger) (*fakeFile, error) {
	w := &fakeFile{
		path: path, pool: pool, log: log,
		wake: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}),
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("fake ip mapping: %w", err)
	}
	f, err := lockFile(path, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, fmt.Errorf("fake ip mapping: %w", err)
	}
	defer f.Close() // the lock passes to the file that replaces it
	rs, err := parseFakeFile(f, pool)
	if err != nil {
		log.Warn("the stored fake ip mapping is unusable: starting with an empty one", zap.String("file", path), zap.Error(err))
	} else {
		pool.restore(rs)
	}
	if err := w.write(); err != nil {
		return nil, fmt.Errorf("fake ip mapping: %w", err)
	}
	pool.mu.Lock()
	pool.noted = w.note
	pool.mu.Unlock()
	go w.run()
	return w, nil
}

// lockFile opens a file that no other process has open through lockFile.
func lockFile(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s (is it another context's?): %w", path, err)
	}
	return f, nil
}

// note records that a slot has a new name. It is called with the pool locked and never waits for the disk.
func (w *fakeFile) note(slot int32) {
	w.mu.Lock()
	if len(w.dirty) < maxDirty {
		w.dirty = append(w.dirty, slot)
	} else {
		w.dirty, w.rewrite = w.dirty[:0], true
	}
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *fakeFile) run() {
	defer close(w.done)
	var batch []int32
	for {
		select {
		case <-w.wake:
			batch = w.flush(batch)
		case <-w.quit:
			w.retryAt = time.Time{}
			w.flush(batch)
			if w.file != nil {
				if err := w.file.Sync(); err != nil {
					w.log.Warn("the fake ip mapping may not be on disk", zap.String("file", w.path), zap.Error(err))
				}
				w.file.Close()
			}
			return
		}
	}
}

// close writes what is pending and waits for the writer.
func (w *fakeFile) close() {
	close(w.quit)
	<-w.done
}

// flush writes the pending changes. It returns the buffer it was given, for the next call.
func (w *fakeFile) flush(batch []int32) []int32 {
	w.mu.Lock()
	batch, w.dirty = w.dirty, batch[:0]
	rewrite := w.rewrite
	w.rewrite = false
	w.mu.Unlock()

	var err error
	switch {
	case w.file != nil && !rewrite && w.lines+len(batch) <= 2*w.pool.len()+1024:
		err = w.append(batch)
	case w.file != nil || !time.Now().Before(w.retryAt):
		err = w.write()
	}
	if err != nil {
		w.log.Warn("the fake ip mapping is in memory only for now", zap.String("file", w.path), zap.Error(err))
		if w.file != nil {
			w.file.Close()
			w.file = nil // what is missing is written with the whole, once there is room
		}
		w.retryAt = time.Now().Add(rewriteRetry)
	}
	return batch
}

func (w *fakeFile) append(slots []int32) error {
	var b []byte
	for _, slot := range slots {
		if name := w.pool.slots[slot].name.Load(); name != nil {
			b = appendFakeRecord(b, fakeRecord{slot, *name})
			w.lines++
		}
	}
	_, err := w.file.Write(b)
	return err
}

// write replaces the file with the pool as it is now; it is on disk when the old one goes.
func (w *fakeFile) write() error {
	tmp := w.path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := lockFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND)
	if err != nil {
		return err
	}
	rs := w.pool.snapshot()
	err = writeFakeFile(f, w.pool, rs)
	if len(rs) > 0 { // of an empty one there is nothing to lose
		err = errors.Join(err, f.Sync())
	}
	if err != nil {
		f.Close()
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Rename(tmp, w.path); err != nil {
		f.Close()
		return errors.Join(err, os.Remove(tmp))
	}
	if w.file != nil {
		w.file.Close()
	}
	w.file, w.lines = f, len(rs)
	if len(rs) == 0 {
		return nil
	}
	if dir, err := os.Open(filepath.Dir(w.path)); err == nil {
		_ = dir.Sync() // not every file system can; the old name of the file is as good
		dir.Close()
	}
	return nil
}

// fakeHeader is the first line: a mapping belongs to the ranges it was made for.
func fakeHeader(p *fakePool) string {
	return fmt.Sprintf("mprox fake ip mapping 1 %s %s", p.v4, p.v6)
}

func writeFakeFile(to io.Writer, p *fakePool, rs []fakeRecord) error {
	b := bufio.NewWriterSize(to, 1<<16)
	fmt.Fprintln(b, fakeHeader(p))
	var line []byte
	for _, r := range rs {
		line = appendFakeRecord(line[:0], r)
		if _, err := b.Write(line); err != nil {
			return err
		}
	}
	return b.Flush()
}

func appendFakeRecord(b []byte, r fakeRecord) []byte {
	body := strconv.AppendInt(nil, int64(r.slot), 10)
	body = append(append(body, ' '), r.name...)
	b = fmt.Appendf(b, "%08x ", crc32.ChecksumIEEE(body))
	return append(append(b, body...), '\n')
}

// parseFakeFile reads a stored mapping. An empty file is an empty mapping; a last line without its end was being written when the
// machine died and is left out; anything else that is not as appendFakeRecord writes it makes the whole file unusable.
func parseFakeFile(from io.Reader, p *fakePool) ([]fakeRecord, error) {
	r := bufio.NewReaderSize(from, 512) // longer than any line
	header, err := r.ReadSlice('\n')
	if errors.Is(err, io.EOF) && len(header) == 0 {
		return nil, nil
	}
	if string(bytes.TrimSuffix(header, []byte("\n"))) != fakeHeader(p) {
		return nil, errFakeFile
	}
	var rs []fakeRecord
	for n := 2; ; n++ {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return rs, nil
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		rec, ok := parseFakeRecord(line[:len(line)-1])
		if !ok || int(rec.slot) >= len(p.slots) || n > maxFakeLines {
			return nil, fmt.Errorf("line %d: %w", n, errFakeFile)
		}
		rs = append(rs, rec)
	}
}

func parseFakeRecord(line []byte) (rec fakeRecord, ok bool) {
	sum, body, ok := bytes.Cut(line, []byte(" "))
	if !ok || len(sum) != 8 {
		return rec, false
	}
	if want, err := strconv.ParseUint(string(sum), 16, 32); err != nil || uint32(want) != crc32.ChecksumIEEE(body) {
		return rec, false
	}
	slot, name, ok := bytes.Cut(body, []byte(" "))
	if !ok || !isHostname(string(name)) {
		return rec, false
	}
	n, err := strconv.ParseUint(string(slot), 10, 31)
	return fakeRecord{int32(n), string(name)}, err == nil
}
