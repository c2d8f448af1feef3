// SPDX-License-Identifier: GPL-3.0-or-later

package dns

// lru is a map of at most max entries that forgets the least recently used one. It is not safe for concurrent use.
type lru[K comparable, V any] struct {
	max  int
	m    map[K]*lruNode[K, V]
	root lruNode[K, V] // sentinel of a ring: next is the newest, prev the oldest
}

type lruNode[K comparable, V any] struct {
	prev, next *lruNode[K, V]
	key        K
	value      V
}

func newLRU[K comparable, V any](limit int) *lru[K, V] {
	l := &lru[K, V]{max: limit}
	l.clear()
	return l
}

func (l *lru[K, V]) len() int { return len(l.m) }

// get returns the value and makes it the newest.
func (l *lru[K, V]) get(k K) (v V, ok bool) {
	n, ok := l.m[k]
	if !ok {
		return v, false
	}
	l.unlink(n)
	l.pushFront(n)
	return n.value, true
}

// peek returns the value and changes nothing, so that a read lock is enough.
func (l *lru[K, V]) peek(k K) (v V, ok bool) {
	n, ok := l.m[k]
	if !ok {
		return v, false
	}
	return n.value, true
}

// put stores the value as the newest and forgets the oldest if there are too many.
func (l *lru[K, V]) put(k K, v V) {
	if l.max <= 0 {
		return
	}
	if n, ok := l.m[k]; ok {
		n.value = v
		l.unlink(n)
		l.pushFront(n)
		return
	}
	if len(l.m) >= l.max {
		l.remove(l.root.prev.key)
	}
	n := &lruNode[K, V]{key: k, value: v}
	l.m[k] = n
	l.pushFront(n)
}

func (l *lru[K, V]) remove(k K) {
	if n, ok := l.m[k]; ok {
		l.unlink(n)
		delete(l.m, k)
	}
}

func (l *lru[K, V]) clear() {
	l.m = make(map[K]*lruNode[K, V])
	l.root.prev, l.root.next = &l.root, &l.root
}

func (l *lru[K, V]) unlink(n *lruNode[K, V]) {
	n.prev.next, n.next.prev = n.next, n.prev
}

func (l *lru[K, V]) pushFront(n *lruNode[K, V]) {
	n.prev, n.next = &l.root, l.root.next
	n.prev.next, n.next.prev = n, n
}
