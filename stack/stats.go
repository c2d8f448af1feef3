// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import "sync/atomic"

// drop is why a packet went no further. Nothing is lost without one being counted.
type drop uint8

const (
	dropMalformed  drop = iota // too short, wrong lengths or version
	dropChecksum               // wrong IP header or UDP checksum
	dropMulticast              // to a multicast or broadcast address: a proxy carries none
	dropMartian                // from or to an address that must not appear on a link
	dropOffload                // a virtio-net header that does not fit its packet
	dropWrite                  // the kernel did not take a packet: link down, no memory
	dropSYNFlood               // too many unanswered connection requests
	dropSYNSource              // too many of them from one source
	dropUDPQueue               // an application socket sends faster than its flow takes
	dropUDPMemory              // all those queues together are full
	dropUDPSockets             // too many application sockets
	dropUDPClosed              // came while the socket's flow was ending
	dropUDPRoom                // longer than the buffer its flow offered
	dropUDPReply               // a reply that cannot be sent: too large, or of the other address family
	dropEchoLimit              // echo requests over the rate, or too many unanswered
	dropEchoRepeat             // an echo request that is being answered already
	numDrops
)

// String returns the label of metrics.
func (d drop) String() string {
	return [numDrops]string{
		"malformed", "checksum", "multicast", "martian", "offload", "write", "syn_flood", "syn_source", "udp_queue", "udp_memory",
		"udp_sockets", "udp_closed", "udp_room", "udp_reply", "echo_limit", "echo_repeat",
	}[d]
}

// counters are updated by every queue's reader and every writer.
type counters struct {
	packetsIn, bytesIn   atomic.Uint64
	packetsOut, bytesOut atomic.Uint64
	drops                [numDrops]atomic.Uint64
}

func (c *counters) drop(d drop) { c.drops[d].Add(1) }

// Stats is a snapshot of a Stack's counters since Start. In is what came from applications, Out what went to them; a train of segments
// counts as one packet, and bytes are those of IP packets.
type Stats struct {
	PacketsIn, BytesIn   uint64
	PacketsOut, BytesOut uint64
	PendingTCP           int // connection requests not answered yet
	OpenTCP              int // accepted and not closed yet
	UDPSockets           int // application sockets with a session
	// Drops counts packets that went no further, by reason; reasons that never occurred are present with 0.
	Drops map[string]uint64
}

// Stats returns the counters. It is for a status page or a scrape: it allocates.
func (s *Stack) Stats() Stats {
	st := Stats{
		PacketsIn: s.count.packetsIn.Load(), BytesIn: s.count.bytesIn.Load(),
		PacketsOut: s.count.packetsOut.Load(), BytesOut: s.count.bytesOut.Load(),
		PendingTCP: s.tcp.pendingCount(), OpenTCP: int(s.tcp.open.Load()), UDPSockets: s.udp.count(),
		Drops: make(map[string]uint64, numDrops+8),
	}
	for d := range numDrops {
		st.Drops[d.String()] = s.count.drops[d].Load()
	}
	s.mu.Lock()
	netstack := s.ns
	s.mu.Unlock()
	if netstack != nil { // what it found wrong with the packets it was given
		ns := netstack.Stats()
		st.Drops["netstack_ip_malformed"] = ns.IP.MalformedPacketsReceived.Value()
		st.Drops["netstack_ip_fragment"] = ns.IP.MalformedFragmentsReceived.Value()
		st.Drops["netstack_ip_address"] = ns.IP.InvalidDestinationAddressesReceived.Value() + ns.IP.InvalidSourceAddressesReceived.Value()
		st.Drops["netstack_tcp_invalid"] = ns.TCP.InvalidSegmentsReceived.Value()
		st.Drops["netstack_tcp_checksum"] = ns.TCP.ChecksumErrors.Value()
		st.Drops["netstack_icmp_invalid"] = ns.ICMP.V4.PacketsReceived.Invalid.Value() + ns.ICMP.V6.PacketsReceived.Invalid.Value()
	}
	return st
}
