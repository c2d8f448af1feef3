// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// maxChain bounds how many CNAMEs an answer may go through.
const maxChain = 16

var (
	errMismatch  = errors.New("reply does not belong to the query")
	errMalformed = errors.New("malformed reply")
)

// parseReply reads a server's reply to q, sent with id. Nothing of it is believed that does not belong to the question: in the answer only
// the CNAME chain from the name asked and what was asked for at its end; in the authority section only zones above those names;
// additional only addresses of hosts that the answer names. errMismatch means that the bytes may come from someone else.
func parseReply(q question, id uint16, wire []byte) (*dns.Msg, error) {
	if len(wire) < headerSize || binary.BigEndian.Uint16(wire) != id || wire[2]&0x80 == 0 {
		return nil, errMismatch
	}
	if wire[2]&2 != 0 { // TC: asked again by TCP. What there is is not used, and may end anywhere
		if _, off, err := dns.UnpackDomainName(wire, headerSize); err == nil && off+4 <= len(wire) {
			wire = slices.Concat(wire[:6], make([]byte, 6), wire[headerSize:off+4])
		}
	}
	m, err := unpack(wire)
	if err != nil {
		return nil, err
	}
	if m.Opcode != dns.OpcodeQuery {
		return nil, errMismatch
	}
	if len(m.Question) == 0 && m.Rcode != dns.RcodeSuccess { // some servers refuse without repeating the question
		return &dns.Msg{MsgHdr: m.MsgHdr}, nil
	}
	if len(m.Question) != 1 || m.Question[0].Qtype != q.qtype || m.Question[0].Qclass != dns.ClassINET ||
		!strings.EqualFold(m.Question[0].Name, q.name) {
		return nil, errMismatch
	}
	if m.Truncated {
		return m, nil
	}
	names := chain(q.name, m.Answer)
	m.Answer = slices.DeleteFunc(m.Answer, func(rr dns.RR) bool { return !answers(q, rr, names) })
	m.Ns = slices.DeleteFunc(m.Ns, func(rr dns.RR) bool { return !aboveAny(rr, names) })
	targets := targetsOf(m.Answer)
	m.Extra = slices.DeleteFunc(m.Extra, func(rr dns.RR) bool {
		t := rr.Header().Rrtype
		return t != dns.TypeA && t != dns.TypeAAAA || rr.Header().Class != dns.ClassINET || !targets[strings.ToLower(rr.Header().Name)]
	})
	return m, nil
}

// chain returns the names an answer leads through, from the one asked.
func chain(name string, rrs []dns.RR) []string {
	names := []string{name}
	for len(names) <= maxChain {
		i := slices.IndexFunc(rrs, func(rr dns.RR) bool {
			c, ok := rr.(*dns.CNAME)
			return ok && strings.EqualFold(c.Hdr.Name, names[len(names)-1]) && !containsFold(names, c.Target)
		})
		if i < 0 {
			return names
		}
		names = append(names, rrs[i].(*dns.CNAME).Target)
	}
	return names
}

// answers reports whether a record of the answer section is part of the answer to q.
func answers(q question, rr dns.RR, names []string) bool {
	h := rr.Header()
	if h.Class != dns.ClassINET {
		return false
	}
	switch h.Rrtype {
	case q.qtype, dns.TypeCNAME:
		return containsFold(names, h.Name)
	case dns.TypeDNAME: // the CNAME made from it is there too (RFC 6672 section 3.1)
		return slices.ContainsFunc(names, func(n string) bool { return dns.IsSubDomain(h.Name, n) })
	case dns.TypeRRSIG:
		return q.do && (containsFold(names, h.Name) || rr.(*dns.RRSIG).TypeCovered == dns.TypeDNAME)
	}
	return false
}

// aboveAny reports whether a record of the authority section is of a zone above one of the names. NSEC records are between names and are
// taken by their zone's signature alone, which the client checks.
func aboveAny(rr dns.RR, names []string) bool {
	h := rr.Header()
	if h.Class != dns.ClassINET {
		return false
	}
	switch h.Rrtype {
	case dns.TypeSOA, dns.TypeNS, dns.TypeDS:
		return slices.ContainsFunc(names, func(n string) bool { return dns.IsSubDomain(h.Name, n) })
	case dns.TypeNSEC, dns.TypeNSEC3, dns.TypeRRSIG:
		return true
	}
	return false
}

// targetsOf returns the host names that records point to, in lower case.
func targetsOf(rrs []dns.RR) map[string]bool {
	t := make(map[string]bool)
	for _, rr := range rrs {
		switch rr := rr.(type) {
		case *dns.MX:
			t[strings.ToLower(rr.Mx)] = true
		case *dns.SRV:
			t[strings.ToLower(rr.Target)] = true
		case *dns.NS:
			t[strings.ToLower(rr.Ns)] = true
		case *dns.SVCB:
			t[strings.ToLower(rr.Target)] = true
		case *dns.HTTPS:
			t[strings.ToLower(rr.Target)] = true
		}
	}
	return t
}

func containsFold(names []string, name string) bool {
	return slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, name) })
}
