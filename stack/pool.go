// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import "sync"

// pool keeps buffers of one size that are not in use. The garbage collector empties it.
type pool struct {
	size int
	p    sync.Pool
}

func (p *pool) get() *[]byte {
	if b, ok := p.p.Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, p.size)
	return &b
}

func (p *pool) put(b *[]byte) { p.p.Put(b) }
