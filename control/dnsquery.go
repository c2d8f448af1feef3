// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/control/client"
)

// getDNSQuery asks the DNS module one question and shows the answer section.
func getDNSQuery(c *call) (any, error) {
	question, err := parseQuestion(c.query.Get("name"), c.query.Get("type"))
	if err != nil {
		return nil, err
	}
	query, err := question.Pack()
	if err != nil {
		return nil, badRequest("name", "%v", err)
	}
	start := time.Now()
	raw, err := c.cfg.Backend.ExchangeDNS(c.ctx, c.query.Get("context"), query)
	if err != nil {
		return nil, err
	}
	var reply dns.Msg
	if err := reply.Unpack(raw); err != nil {
		return nil, &Error{Code: client.CodeInternal, Message: "the DNS module answered what is no DNS message: " + err.Error()}
	}
	answer := DNSAnswer{
		Context:         c.query.Get("context"),
		Name:            question.Question[0].Name,
		Type:            dns.TypeToString[question.Question[0].Qtype],
		Rcode:           dns.RcodeToString[reply.Rcode],
		Answers:         []DNSRecord{},
		DurationSeconds: time.Since(start).Seconds(),
	}
	for _, rr := range reply.Answer {
		h := rr.Header()
		answer.Answers = append(answer.Answers, DNSRecord{
			Name: h.Name, Type: dns.TypeToString[h.Rrtype], TTL: h.Ttl, Data: strings.TrimPrefix(rr.String(), h.String()),
		})
	}
	return answer, nil
}

// parseQuestion builds a query from a name and the name of a type.
func parseQuestion(name, kind string) (*dns.Msg, error) {
	if name == "" {
		return nil, badRequest("name", "missing")
	}
	if kind == "" {
		kind = "A"
	}
	qtype, ok := dns.StringToType[strings.ToUpper(kind)]
	if !ok {
		return nil, badRequest("type", "%q is no type of DNS record", kind)
	}
	if _, ok := dns.IsDomainName(name); !ok {
		return nil, badRequest("name", "%q is no domain name", name)
	}
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
	m.SetEdns0(1232, false) // what fits into any path (DNS flag day 2020)
	return m, nil
}
