// SPDX-License-Identifier: GPL-3.0-or-later

package dns

import (
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// local answers what must not be asked of any server: names that mean this machine or nothing at all (RFC 6761), the reverse zones of the
// fake ranges, and the questions by which software finds out how to go round its resolver. served: someone else can answer.
func (s *Server) local(r *request, host string, served bool) (answer, bool) {
	noName := answer{rcode: dns.RcodeNameError, ns: soa(), result: resultLocal}
	noData := answer{ns: soa(), result: resultLocal}
	switch {
	case r.qtype == dns.TypeANY: // RFC 8482 section 4.2: the answer to ANY is up to the responder
		hdr := dns.RR_Header{Name: r.asked, Rrtype: dns.TypeHINFO, Class: dns.ClassINET, Ttl: fakeTTL}
		return answer{rrs: []dns.RR{&dns.HINFO{Hdr: hdr, Cpu: "RFC8482"}}, result: resultLocal}, true
	case isLocalhost(host):
		return r.addresses(loopback(), hostsTTL, resultLocal), true
	case below(host, "invalid"):
		return noName, true
	case below(host, "use-application-dns.net"): // asked by Firefox: does the network mind if I use my own resolver?
		return noName, true
	case below(host, "resolver.arpa"): // RFC 9462: which encrypted resolvers are there?
		return noData, true
	case host == "ipv4only.arpa": // RFC 8880 section 7.1: an AAAA would mean that there is a NAT64 here
		return r.addresses([]netip.Addr{netip.AddrFrom4([4]byte{192, 0, 0, 170}), netip.AddrFrom4([4]byte{192, 0, 0, 171})}, hostsTTL, resultLocal), true
	case below(host, "local") && !served: // multicast DNS only (RFC 6762 section 22.1)
		return noName, true
	case !below(host, "arpa"):
		return answer{}, false
	}
	ip, ok := arpaAddr(r.name)
	switch {
	case !ok:
		return answer{}, false
	case ip.IsLoopback():
		return r.pointer("localhost."), true
	case !s.IsFake(ip):
		return answer{}, false
	}
	name, _, ok := s.HostOf(ip)
	if !ok {
		return noName, true
	}
	return r.pointer(name + "."), true
}

// pointer answers a PTR query with a name, and other types with no data.
func (r *request) pointer(name string) answer {
	if r.qtype != dns.TypePTR {
		return answer{ns: soa(), result: resultLocal}
	}
	hdr := dns.RR_Header{Name: r.asked, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: fakeTTL}
	return answer{rrs: []dns.RR{&dns.PTR{Hdr: hdr, Ptr: name}}, result: resultLocal}
}

// below reports whether host is zone or a name in it.
func below(host, zone string) bool {
	rest, ok := strings.CutSuffix(host, zone)
	return ok && (rest == "" || rest[len(rest)-1] == '.')
}

func isLocalhost(host string) bool { return below(host, "localhost") }

func loopback() []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
}
