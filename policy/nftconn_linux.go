// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Not in x/sys/unix.
const (
	tableFlagOwner  = 2 // NFT_TABLE_F_OWNER, kernel 5.12
	nfEgress        = 1 // NF_NETDEV_EGRESS
	nftaHookNum     = unix.NFTA_HOOK_HOOKNUM
	maxSetBatch     = 500 // elements a message: a netlink attribute holds 64 KiB
	nftReplyTimeout = 5 * time.Second
	nftBuffer       = 4 << 20 // a whole transaction is one sendmsg
)

// nftConn speaks to nf_tables. Expressions are google/nftables', transactions our own: its tables cannot have the owner flag, and it asks
// for an acknowledgement of every message, which a plan of 100 contexts overflows.
type nftConn struct {
	mu    sync.Mutex
	batch *netlink.Conn   // kept open: tables with the owner flag belong to it
	owned map[string]bool // the tables that do; bounded by the tables of a plan
	dump  *netlink.Conn
	seq   uint32 // of the last request by dump
	buf   []byte // for its answers

	generation uint32            // of the rule set, when prints were read; 0 = never
	prints     map[string]string // fingerprints by table; bounded by the tables of ours

	track *netlink.Conn // of ForgetConnection
}

func newNFTConn(netns int) (*nftConn, error) {
	// Asked first, since netlink.Dial panics where the kernel does not know the protocol.
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, fmt.Errorf("%w: nftables: load or build the kernel module nf_tables (CONFIG_NF_TABLES)", ErrFeature)
	}
	if err != nil {
		return nil, fmt.Errorf("netfilter netlink socket: %w", err)
	}
	_ = unix.Close(fd)
	open := func() (*netlink.Conn, error) {
		c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
		if err != nil {
			return nil, fmt.Errorf("netfilter netlink socket: %w", err)
		}
		_ = c.SetReadBuffer(nftBuffer) // smaller than wanted is still tried
		_ = c.SetWriteBuffer(nftBuffer)
		return c, nil
	}
	batch, err := open()
	if err != nil {
		return nil, err
	}
	dump, err := open()
	if err != nil {
		closeQuietly(batch)
		return nil, err
	}
	track, err := open()
	if err != nil {
		closeQuietly(batch)
		closeQuietly(dump)
		return nil, err
	}
	return &nftConn{batch: batch, dump: dump, track: track, owned: make(map[string]bool)}, nil
}

func (n *nftConn) Close() error { return errors.Join(n.batch.Close(), n.dump.Close(), n.track.Close()) }

// apply replaces and removes tables in one transaction.
func (n *nftConn) apply(replace []NFTable, remove []string) error {
	var msgs []netlink.Message
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, name := range remove {
		// Created if it is missing, so that it can be deleted. The kernel refuses to "create" one of ours with other flags than it has.
		flags := uint32(0)
		if n.owned[name] {
			flags = tableFlagOwner
		}
		msgs = append(msgs, tableMsg(unix.NFT_MSG_NEWTABLE, name, flags), tableMsg(unix.NFT_MSG_DELTABLE, name, 0))
	}
	for _, t := range replace {
		m, err := tableMsgs(t)
		if err != nil {
			return err
		}
		msgs = append(msgs, m...)
	}
	if len(msgs) == 0 {
		return nil
	}
	if err := n.transactLocked(msgs); err != nil {
		return err
	}
	for _, name := range remove {
		delete(n.owned, name)
	}
	for _, t := range replace {
		if t.owner {
			n.owned[t.Name] = true
		}
	}
	return nil
}

// probe finds out whether the kernel can make a table, in a transaction that leaves nothing.
func (n *nftConn) probe(t NFTable) error {
	msgs, err := tableMsgs(t)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.transactLocked(append(msgs, tableMsg(unix.NFT_MSG_DELTABLE, t.Name, 0)))
}

func (n *nftConn) transactLocked(msgs []netlink.Message) error {
	// Errors are always reported; success only where it is asked for, and the last message is enough.
	msgs[len(msgs)-1].Header.Flags |= netlink.Acknowledge
	all := slices.Concat([]netlink.Message{batchMsg(unix.NFNL_MSG_BATCH_BEGIN)}, msgs, []netlink.Message{batchMsg(unix.NFNL_MSG_BATCH_END)})
	sent, err := n.batch.SendMessages(all)
	if err != nil {
		return fmt.Errorf("nftables transaction: %w", err)
	}
	last := sent[len(sent)-2].Header.Sequence
	if err := n.batch.SetReadDeadline(time.Now().Add(nftReplyTimeout)); err != nil {
		return err
	}
	for {
		replies, err := n.batch.Receive()
		if err != nil {
			n.drainLocked()
			return nftError(err)
		}
		for _, r := range replies {
			if r.Header.Sequence == last {
				return nil
			}
		}
	}
}

// drainLocked throws away what else was reported about a failed transaction, so that the next one does not read it as its own.
func (n *nftConn) drainLocked() {
	for {
		_ = n.batch.SetReadDeadline(time.Now().Add(5 * time.Millisecond)) // replies are queued before sendmsg returns
		if _, err := n.batch.Receive(); errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
	}
}

func nftError(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: nftables needs CAP_NET_ADMIN: run as root, in a container with cap_add: NET_ADMIN", ErrPrivilege)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		return fmt.Errorf("%w: nftables in the kernel (nf_tables, families inet and bridge): %w", ErrFeature, err)
	}
	return fmt.Errorf("nftables: %w", err)
}

func batchMsg(typ uint16) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES},
	}
}

// familyOf is the protocol family of one of our tables.
func familyOf(table string) byte {
	switch {
	case ofNetdev(table):
		return nfDev
	case ofBridge(table):
		return nfPort
	}
	return nfInet
}

func nftMsg(family byte, typ uint16, flags netlink.HeaderFlags, attrs []byte) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ), Flags: netlink.Request | flags},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, attrs...),
	}
}

func tableMsg(typ uint16, name string, flags uint32) netlink.Message {
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	e.String(unix.NFTA_TABLE_NAME, name)
	create := netlink.HeaderFlags(0)
	if typ == unix.NFT_MSG_NEWTABLE {
		e.Uint32(unix.NFTA_TABLE_FLAGS, flags)
		create = netlink.Create
	}
	b, _ := e.Encode() // a name and a number cannot fail
	return nftMsg(familyOf(name), typ, create, b)
}

// tableMsgs makes a table from nothing: created if it is missing, so that it can be deleted, so that it can be created as wanted.
func tableMsgs(t NFTable) ([]netlink.Message, error) {
	flags := uint32(0)
	if t.owner {
		flags = tableFlagOwner
	}
	msgs := []netlink.Message{
		tableMsg(unix.NFT_MSG_NEWTABLE, t.Name, flags), tableMsg(unix.NFT_MSG_DELTABLE, t.Name, 0), tableMsg(unix.NFT_MSG_NEWTABLE, t.Name, flags),
	}
	var errs error
	add := func(typ uint16, flags netlink.HeaderFlags, fill func(*netlink.AttributeEncoder) error) {
		e := netlink.NewAttributeEncoder()
		e.ByteOrder = binary.BigEndian
		errs = errors.Join(errs, fill(e))
		b, err := e.Encode()
		errs = errors.Join(errs, err)
		msgs = append(msgs, nftMsg(familyOf(t.Name), typ, netlink.Create|flags, b))
	}
	for _, c := range t.counters {
		add(unix.NFT_MSG_NEWOBJ, 0, func(e *netlink.AttributeEncoder) error {
			e.String(unix.NFTA_OBJ_TABLE, t.Name)
			e.String(unix.NFTA_OBJ_NAME, c)
			e.Uint32(unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_COUNTER)
			e.Nested(unix.NFTA_OBJ_DATA, func(*netlink.AttributeEncoder) error { return nil })
			return nil
		})
	}
	for i, s := range t.sets {
		add(unix.NFT_MSG_NEWSET, 0, func(e *netlink.AttributeEncoder) error { return encodeSet(e, t.Name, s, uint32(i+1)) })
		for chunk := range slices.Chunk(s.elements(), maxSetBatch) {
			add(unix.NFT_MSG_NEWSETELEM, 0, func(e *netlink.AttributeEncoder) error { return encodeElements(e, t.Name, s.name, chunk) })
		}
	}
	for _, c := range t.chains {
		add(unix.NFT_MSG_NEWCHAIN, 0, func(e *netlink.AttributeEncoder) error { return encodeChain(e, t.Name, c) })
	}
	for _, c := range t.chains {
		for _, r := range c.rules {
			add(unix.NFT_MSG_NEWRULE, netlink.Append, func(e *netlink.AttributeEncoder) error { return encodeRule(e, t.Name, c.name, r) })
		}
	}
	return msgs, errs
}

func encodeChain(e *netlink.AttributeEncoder, table string, c nfChain) error {
	e.String(unix.NFTA_CHAIN_TABLE, table)
	e.String(unix.NFTA_CHAIN_NAME, c.name)
	if c.hook == "" {
		return nil
	}
	hook, ok := map[string]uint32{
		"prerouting": unix.NF_INET_PRE_ROUTING, "forward": unix.NF_INET_FORWARD, "output": unix.NF_INET_LOCAL_OUT, "postrouting": unix.NF_INET_POST_ROUTING, "egress": nfEgress,
	}[c.hook]
	if !ok {
		return fmt.Errorf("nft hook %q", c.hook)
	}
	e.Nested(unix.NFTA_CHAIN_HOOK, func(e *netlink.AttributeEncoder) error {
		e.Uint32(nftaHookNum, hook)
		e.Uint32(unix.NFTA_HOOK_PRIORITY, uint32(c.priority))
		if c.device != "" {
			e.String(unix.NFTA_HOOK_DEV, c.device)
		}
		return nil
	})
	e.Uint32(unix.NFTA_CHAIN_POLICY, 1) // NF_ACCEPT
	e.String(unix.NFTA_CHAIN_TYPE, c.typ)
	return nil
}

func encodeRule(e *netlink.AttributeEncoder, table, chain string, r nfRule) error {
	es, err := exprs(r)
	if err != nil {
		return err
	}
	e.String(unix.NFTA_RULE_TABLE, table)
	e.String(unix.NFTA_RULE_CHAIN, chain)
	e.Nested(unix.NFTA_RULE_EXPRESSIONS, func(e *netlink.AttributeEncoder) error {
		for _, x := range es {
			b, err := expr.Marshal(familyOf(table), x)
			if err != nil {
				return err
			}
			e.Bytes(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, b)
		}
		return nil
	})
	return nil
}

func encodeSet(e *netlink.AttributeEncoder, table string, s nfSet, id uint32) error {
	typ, size, interval := setKey(s.kind)
	flags := uint32(0)
	if interval {
		flags = unix.NFT_SET_INTERVAL
	}
	e.String(unix.NFTA_SET_TABLE, table)
	e.String(unix.NFTA_SET_NAME, s.name)
	e.Uint32(unix.NFTA_SET_FLAGS, flags)
	e.Uint32(unix.NFTA_SET_KEY_TYPE, typ)
	e.Uint32(unix.NFTA_SET_KEY_LEN, size)
	e.Uint32(unix.NFTA_SET_ID, id)
	// nft(8) reads the byte order of the key from here when it lists the set: NFTNL_UDATA_SET_KEYBYTEORDER, big endian or the machine's own.
	order := uint32(2)
	if s.kind == kindIndex || s.kind == kindName {
		order = 1
	}
	e.Bytes(unix.NFTA_SET_USERDATA, append([]byte{0, 4}, native32(order)...))
	return nil
}

func encodeElements(e *netlink.AttributeEncoder, table, set string, els []element) error {
	e.String(unix.NFTA_SET_ELEM_LIST_TABLE, table)
	e.String(unix.NFTA_SET_ELEM_LIST_SET, set)
	e.Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(e *netlink.AttributeEncoder) error {
		for _, el := range els {
			e.Nested(unix.NFTA_LIST_ELEM, func(e *netlink.AttributeEncoder) error {
				if el.end {
					e.Uint32(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
				}
				e.Nested(unix.NFTA_SET_ELEM_KEY, func(e *netlink.AttributeEncoder) error {
					e.Bytes(unix.NFTA_DATA_VALUE, el.key)
					return nil
				})
				return nil
			})
		}
		return nil
	})
	return nil
}

// fingerprintLocked hashes what a table holds: chains with their hooks, rules in order, sets with their elements.
func (n *nftConn) fingerprintLocked(table string) (string, error) {
	byTable := func(e *netlink.AttributeEncoder) { e.String(1, table) } // NFTA_*_TABLE is 1 everywhere
	h := sha256.New()
	for _, kind := range []struct {
		get  uint16
		keep []uint16
	}{
		{unix.NFT_MSG_GETCHAIN, []uint16{unix.NFTA_CHAIN_NAME, unix.NFTA_CHAIN_HOOK, unix.NFTA_CHAIN_POLICY}},
		{unix.NFT_MSG_GETRULE, []uint16{unix.NFTA_RULE_CHAIN, unix.NFTA_RULE_EXPRESSIONS}},
		{unix.NFT_MSG_GETSET, []uint16{unix.NFTA_SET_NAME, unix.NFTA_SET_FLAGS, unix.NFTA_SET_KEY_LEN}},
	} {
		list, err := n.listLocked(familyOf(table), kind.get, byTable)
		if err != nil {
			return "", err
		}
		for _, m := range list {
			if m[0] != familyOf(table) || attrString(m, 1) != table {
				continue
			}
			_, _ = h.Write(attrBytes(m, kind.keep)) // a hash takes everything
			if kind.get != unix.NFT_MSG_GETSET {
				continue
			}
			els, err := n.elementsLocked(table, attrString(m, unix.NFTA_SET_NAME))
			if err != nil {
				return "", err
			}
			_, _ = h.Write(els)
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// elementsLocked returns the keys of a set in an order of their own: the kernel's is not fixed.
func (n *nftConn) elementsLocked(table, set string) ([]byte, error) {
	list, err := n.listLocked(familyOf(table), unix.NFT_MSG_GETSETELEM, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_SET_ELEM_LIST_TABLE, table)
		e.String(unix.NFTA_SET_ELEM_LIST_SET, set)
	})
	if err != nil {
		return nil, err
	}
	var keys [][]byte
	for _, m := range list {
		for _, raw := range attrs(m[4:]) {
			if raw.typ != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				continue
			}
			for _, el := range attrs(raw.data) {
				keys = append(keys, attrBytes(append(make([]byte, 4), el.data...), []uint16{unix.NFTA_SET_ELEM_KEY, unix.NFTA_SET_ELEM_FLAGS}))
			}
		}
	}
	slices.SortFunc(keys, bytes.Compare)
	return bytes.Join(keys, nil), nil
}

// counter reads a named counter's packets.
func (n *nftConn) counter(table, name string) (uint64, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	list, err := n.listLocked(familyOf(table), unix.NFT_MSG_GETOBJ, func(e *netlink.AttributeEncoder) { e.String(unix.NFTA_OBJ_TABLE, table) })
	if err != nil {
		return 0, err
	}
	for _, m := range list {
		if m[0] != familyOf(table) || attrString(m, unix.NFTA_OBJ_TABLE) != table || attrString(m, unix.NFTA_OBJ_NAME) != name {
			continue
		}
		for _, a := range attrs(m[4:]) {
			if a.typ != unix.NFTA_OBJ_DATA {
				continue
			}
			for _, c := range attrs(a.data) {
				if c.typ == unix.NFTA_COUNTER_PACKETS && len(c.data) == 8 {
					return binary.BigEndian.Uint64(c.data), nil
				}
			}
		}
	}
	return 0, fmt.Errorf("nftables counter %s %s: %w", table, name, os.ErrNotExist)
}
