// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"encoding/binary"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	headerSize = 12
	// ednsSize is the datagram size we announce: fits one packet on any path (DNS flag day 2020).
	ednsSize = 1232
)

// question is what is asked for, and the key of everything that is shared between those who ask the same.
type question struct {
	name  string // lower case, fully qualified, with the final dot
	qtype uint16
	do    bool // DNSSEC records wanted (RFC 3225)
	cd    bool // the client validates itself (RFC 4035 section 3.2.2)
	// local restricts the servers to those given by address. Resolve sets it for the servers' own names: a dialer that needs an address
	// to reach such a server would ask us for it, for ever.
	local bool
}

// host returns the name without the final dot; "" for the root.
func (q question) host() string { return strings.TrimSuffix(q.name, ".") }

// request is a query that keeps the rules of the protocol.
type request struct {
	question
	asked  string // the name exactly as the client wrote it: some compare letter case (0x20)
	class  uint16 // and the class: a reply to another question is not heard
	id     uint16
	opcode int
	rd, ad bool
	edns   bool
	size   int // the largest reply the client takes
}

// answer is what a request gets.
type answer struct {
	rcode          int
	ad             bool
	rrs, ns, extra []dns.RR
	ede            uint16 // extended error (RFC 8914), sent if text is not empty
	text           string
	result         string // LogEntry.Result
}

// The values of LogEntry.Result.
const (
	resultLocal     = "local"
	resultHosts     = "hosts"
	resultBlock     = "block"
	resultFake      = "fake"
	resultCache     = "cache"
	resultStale     = "stale"
	resultUpstream  = "upstream"
	resultFailure   = "failure"
	resultMalformed = "malformed"
)

// parse reads a query. It returns ErrNotDNS for what deserves no answer, or a request and the rcode to refuse it with (0 = none); for some
// of the refused ones only the request's id is known.
func parse(query []byte, network flow.Network) (*request, int, error) {
	if len(query) < headerSize || query[2]&0x80 != 0 { // shorter than a header, or a response
		return nil, 0, ErrNotDNS
	}
	r := &request{id: binary.BigEndian.Uint16(query), opcode: int(query[2] >> 3 & 0xf), rd: query[2]&1 != 0, size: dns.MaxMsgSize}
	if network == flow.UDP {
		r.size = dns.MinMsgSize
	}
	if r.opcode != dns.OpcodeQuery {
		return r, dns.RcodeNotImplemented, nil
	}
	// Exactly one question (RFC 9619); answers in a query are for zone transfers, which are not for us.
	counts := query[4:]
	if binary.BigEndian.Uint16(counts) != 1 || binary.BigEndian.Uint16(counts[2:]) != 0 || binary.BigEndian.Uint16(counts[4:]) != 0 {
		return r, dns.RcodeFormatError, nil
	}
	if _, off, err := dns.UnpackDomainName(query, headerSize); err != nil || off+4 > len(query) {
		return nil, 0, ErrNotDNS
	}
	m, err := unpack(query)
	if err != nil || len(m.Question) != 1 {
		return r, dns.RcodeFormatError, nil
	}
	q := m.Question[0]
	r.asked, r.class, r.ad = q.Name, q.Qclass, m.AuthenticatedData
	r.question = question{name: strings.ToLower(q.Name), qtype: q.Qtype, cd: m.CheckingDisabled}
	opts := 0
	for _, rr := range m.Extra {
		opt, ok := rr.(*dns.OPT)
		if !ok {
			continue
		}
		if opts++; opts > 1 || opt.Hdr.Name != "." {
			return r, dns.RcodeFormatError, nil // RFC 6891 section 6.1.1
		}
		r.edns, r.do = true, opt.Do()
		if network == flow.UDP {
			r.size = max(dns.MinMsgSize, int(opt.UDPSize()))
		}
		if opt.Version() != 0 {
			return r, dns.RcodeBadVers, nil
		}
	}
	switch {
	case q.Qclass != dns.ClassINET:
		return r, dns.RcodeRefused, nil
	case q.Qtype == dns.TypeOPT, q.Qtype == dns.TypeNone, q.Qtype >= 128 && q.Qtype < 255: // meta types, transfers, transactions
		return r, dns.RcodeNotImplemented, nil
	}
	return r, dns.RcodeSuccess, nil
}

// unpack reads a message of at least a header. It is stricter than the library, which takes a message that ends early for a whole one.
func unpack(wire []byte) (*dns.Msg, error) {
	m := &dns.Msg{}
	if err := m.Unpack(wire); err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	for i, have := range []int{len(m.Question), len(m.Answer), len(m.Ns), len(m.Extra)} {
		if int(binary.BigEndian.Uint16(wire[4+2*i:])) != have {
			return nil, fmt.Errorf("%w: shorter than it says", errMalformed)
		}
	}
	return m, nil
}

// reply packs the answer, cut with the TC bit to what the client takes.
func (r *request) reply(a answer) []byte {
	m := &dns.Msg{}
	m.Id, m.Opcode, m.Response, m.RecursionDesired, m.RecursionAvailable = r.id, r.opcode, true, r.rd, true
	m.CheckingDisabled = r.cd
	m.AuthenticatedData = a.ad && (r.ad || r.do) // RFC 6840 section 5.8
	m.Rcode = a.rcode
	if r.asked != "" {
		m.Question = []dns.Question{{Name: r.asked, Qtype: r.qtype, Qclass: r.class}}
	}
	for _, rr := range a.rrs {
		if h := rr.Header(); h.Name != r.asked && strings.EqualFold(h.Name, r.asked) {
			h.Name = r.asked
		}
	}
	m.Answer, m.Ns, m.Extra = a.rrs, a.ns, a.extra
	if r.edns {
		opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		opt.SetUDPSize(ednsSize)
		opt.SetDo(r.do)
		if a.text != "" {
			opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: a.ede, ExtraText: a.text})
		}
		m.Extra = append(slices.Clip(m.Extra), opt)
	}
	m.Truncate(r.size)
	if b, err := m.Pack(); err == nil && len(b) <= r.size {
		return b
	}
	return r.header(dns.RcodeServerFailure)
}

// header is the shortest reply there is, for answers that cannot be packed.
func (r *request) header(rcode int) []byte {
	b := make([]byte, headerSize)
	binary.BigEndian.PutUint16(b, r.id)
	b[2], b[3] = 0x80|byte(r.opcode<<3), 0x80|byte(rcode&0xf)
	if r.rd {
		b[2] |= 1
	}
	return b
}

// pack returns the query to send to a server: nothing of the client's own options (cookies, client subnet), and padded where the
// transport is encrypted (RFC 8467: to a multiple of 128 bytes).
func (q question) pack(id uint16, pad bool) ([]byte, error) {
	m := &dns.Msg{Question: []dns.Question{{Name: q.name, Qtype: q.qtype, Qclass: dns.ClassINET}}}
	m.Id, m.RecursionDesired, m.CheckingDisabled = id, true, q.cd
	opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	opt.SetUDPSize(ednsSize)
	opt.SetDo(q.do)
	m.Extra = []dns.RR{opt}
	if pad {
		const optionHeader = 4
		n := m.Len() + optionHeader
		opt.Option = []dns.EDNS0{&dns.EDNS0_PADDING{Padding: make([]byte, (128-n%128)%128)}}
	}
	return m.Pack()
}

// soa is what synthesised negative answers carry, so that they are cached for a second and no longer (RFC 2308 section 3).
func soa() []dns.RR {
	return []dns.RR{&dns.SOA{
		Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 1},
		Ns:  "localhost.", Mbox: "nobody.invalid.", Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: 1,
	}}
}

// addressRR returns the A or AAAA record of an address.
func addressRR(name string, ip netip.Addr, ttl uint32) dns.RR {
	if ip.Is4() {
		return &dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: ttl}, A: ip.AsSlice()}
	}
	return &dns.AAAA{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeAAAA, Class: dns.ClassINET, Ttl: ttl}, AAAA: ip.AsSlice()}
}

// addresses are those a record gives: of A and AAAA, and the hints of SVCB and HTTPS.
func addresses(rr dns.RR) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		switch rr := rr.(type) {
		case *dns.A:
			if ip, ok := netip.AddrFromSlice(rr.A); ok {
				yield(ip.Unmap())
			}
		case *dns.AAAA:
			if ip, ok := netip.AddrFromSlice(rr.AAAA); ok {
				yield(ip.Unmap())
			}
		case *dns.SVCB:
			hints(rr, yield)
		case *dns.HTTPS:
			hints(&rr.SVCB, yield)
		}
	}
}

func hints(rr *dns.SVCB, yield func(netip.Addr) bool) {
	for _, kv := range rr.Value {
		switch kv := kv.(type) {
		case *dns.SVCBIPv4Hint:
			for _, b := range kv.Hint {
				if ip, ok := netip.AddrFromSlice(b); ok && !yield(ip.Unmap()) {
					return
				}
			}
		case *dns.SVCBIPv6Hint:
			for _, b := range kv.Hint {
				if ip, ok := netip.AddrFromSlice(b); ok && !yield(ip.Unmap()) {
					return
				}
			}
		}
	}
}

// arpaAddr returns the address a name of the reverse zones stands for (RFC 1035 section 3.5, RFC 3596 section 2.5).
func arpaAddr(name string) (netip.Addr, bool) {
	if s, ok := strings.CutSuffix(name, ".in-addr.arpa."); ok {
		labels := strings.Split(s, ".")
		if len(labels) != 4 {
			return netip.Addr{}, false
		}
		ip, err := netip.ParseAddr(labels[3] + "." + labels[2] + "." + labels[1] + "." + labels[0])
		return ip, err == nil
	}
	s, ok := strings.CutSuffix(name, ".ip6.arpa.")
	if !ok || len(s) != 63 {
		return netip.Addr{}, false
	}
	var b [16]byte
	for i := range 32 {
		if i > 0 && s[2*i-1] != '.' {
			return netip.Addr{}, false
		}
		v := strings.IndexByte("0123456789abcdef", s[2*i])
		if v < 0 {
			return netip.Addr{}, false
		}
		b[15-i/2] |= byte(v) << (i % 2 * 4)
	}
	return netip.AddrFrom16(b), true
}
