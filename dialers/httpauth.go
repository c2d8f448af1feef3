// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/flow"
)

const (
	// maxRounds is how many challenges one flow answers: one it expected, one that came because a nonce was stale, one to spare.
	maxRounds = 3
	// maxDropped bounds the body of a 407 that is read to keep its connection: a new connection costs less than a longer one.
	maxDropped = 32 << 10
)

// errReconnect asks for another connection to go on with: the proxy wants credentials, and does not keep the connection.
var errReconnect = errors.New("the proxy closed the connection after asking for credentials")

// login is how far one flow has come with its credentials, over all its connections.
type login struct {
	challenge *digestChallenge // what is answered; nil = none yet
	nc        uint32           // which use of its nonce this is
	fresh     bool             // it came in an answer to this flow
	rounds    int
}

// request is converse for a flow that has not been asked for anything yet.
func (h *HTTP) request(c io.ReadWriter, head headReader, dst flow.Addr) error {
	return h.converse(c, head, dst, new(login))
}

// asker asks a proxy, on what there is between us.
type asker interface {
	// ask sends one request with the credentials of l and returns the reply, and what of the request must never be shown.
	ask(l *login) (*response, []string, error)
	// again prepares another request after a reply. errReconnect: not here.
	again(r *response) error
	// body returns the first bytes of the reply's body.
	body() []byte
}

// converse sends CONNECT and reads the reply up to the end of its header. A 407 is answered on the same connection if the proxy keeps it.
func (h *HTTP) converse(c io.ReadWriter, head headReader, dst flow.Addr, l *login) error {
	return h.logIn(&h1Asker{h: h, c: c, head: head, dst: dst}, l)
}

// logIn asks until the answer is yes, or no.
func (h *HTTP) logIn(a asker, l *login) error {
	if l.challenge == nil && h.wantsDigest() {
		l.challenge, l.nc = h.digest.take()
	}
	for {
		r, secrets, err := a.ask(l)
		if err == nil && r.status == 407 {
			h.auth.asked(r.challenges)
		}
		switch {
		case err != nil:
			return err
		case r.status/100 == 2:
			h.auth.took(h.sends(l))
			if l.challenge != nil && (l.fresh || r.nextnonce != "") {
				h.digest.accepted(l.challenge, r.nextnonce)
			}
			return nil
		case r.status == 407 && h.answer(l, r):
			if err := a.again(r); err != nil {
				return err
			}
			continue
		}
		var body []byte
		if r.length != 0 {
			body = a.body()
		}
		text := r.describe(body)
		if r.status == 407 && h.spec.Auth == "digest" && l.challenge == nil {
			text += ", " + errNoDigest.Error()
		}
		return &statusError{cause: r.meaning(), text: quote(text, secrets...)}
	}
}

// wantsDigest reports whether credentials are sent as Digest, so that a password in the clear is never sent to who only wants that.
func (h *HTTP) wantsDigest() bool {
	if h.spec.Auth == "digest" {
		return true
	}
	h.digest.mu.Lock()
	defer h.digest.mu.Unlock()
	return h.digest.always && h.spec.Auth == ""
}

// answer prepares the next request after a 407 and reports whether there is one. Basic that was refused is followed by Digest only where
// Basic is not what the proxy wants, and where nothing else was asked for.
func (h *HTTP) answer(l *login, r *response) bool {
	if !h.spec.HasUser || h.spec.Auth == "basic" || h.spec.Auth == "bearer" || l.rounds >= maxRounds {
		return false
	}
	next, err := strongest(r.challenges)
	if l.challenge != nil {
		h.digest.refused(l.challenge)
	}
	switch {
	case err != nil:
		return false
	case l.fresh && !next.stale:
		return false // the nonce was good: it is the user or the password
	case l.challenge == nil && h.spec.Auth == "" && offers(r.challenges, "basic"):
		return false
	}
	next.nc = 1
	l.challenge, l.nc, l.fresh = next, 1, true
	l.rounds++
	return true
}

func offers(fields []string, scheme string) bool {
	for _, f := range fields {
		for _, c := range ParseChallenges(f) {
			if c.Scheme == scheme {
				return true
			}
		}
	}
	return false
}

// h1Asker asks on a connection of one's own.
type h1Asker struct {
	h      *HTTP
	c      io.ReadWriter
	head   headReader
	dst    flow.Addr
	reused bool // it has been asked on before
}

func (a *h1Asker) body() []byte { return a.head.body() }

func (a *h1Asker) again(r *response) error {
	if !r.keeps() || a.head.drop(r.length) != nil {
		return errReconnect
	}
	a.reused = true
	return nil
}

// ask sends one request and reads the header of its reply.
func (a *h1Asker) ask(l *login) (*response, []string, error) {
	req, secrets := a.h.head(a.dst, l)
	_, err := a.c.Write(req)
	clear(req)
	if err != nil {
		if a.reused && !timedOut(err) {
			return nil, nil, errReconnect
		}
		return nil, nil, fmt.Errorf("request: %w: %w", flow.ErrUpstream, err)
	}
	lastQuestion(a.c)
	raw, err := readHead(a.head)
	if err != nil {
		switch {
		case timedOut(err):
			// Whether the proxy hangs or the destination does cannot be told apart.
			return nil, nil, fmt.Errorf("%w: no reply", flow.ErrTimeout)
		case len(raw) == 0 && a.reused && (errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET)):
			return nil, nil, errReconnect
		case len(raw) == 0 && errors.Is(err, io.EOF):
			return nil, nil, fmt.Errorf("%w: %w", flow.ErrHostUnreachable, errNoReply)
		}
		return nil, nil, fmt.Errorf("reply: %w: %w", flow.ErrUpstream, noEOF(err))
	}
	r, err := parseHead(raw)
	if err != nil {
		return nil, nil, fmt.Errorf("reply: %w: %w", flow.ErrUpstream, err)
	}
	return &r, secrets, nil
}

// head returns the request, and what of it must never be shown again.
func (h *HTTP) head(dst flow.Addr, l *login) (req []byte, secrets []string) {
	target := requestTarget(dst)
	req = append(req, "CONNECT "+target+" HTTP/1.1\r\nHost: "+target+"\r\n"...)
	secrets = h.fields(target, l, func(name, value string) { req = append(req, name+": "+value+"\r\n"...) })
	return append(req, "\r\n"...), secrets
}

// fields adds what a request has besides its target, and returns what of that must never be shown again.
func (h *HTTP) fields(target string, l *login, add func(name, value string)) (secrets []string) {
	cred, secrets := h.credentials(target, l)
	for _, f := range h.spec.Headers {
		add(f.Name, f.Value.Reveal())
		secrets = append(secrets, f.Value.Reveal())
	}
	if cred != "" {
		add("Proxy-Authorization", cred)
	}
	return secrets
}

// requestTarget is a destination in authority form (RFC 9112 section 3.2.3). A zone means nothing elsewhere.
func requestTarget(dst flow.Addr) string {
	dst.IP = dst.IP.Unmap().WithZone("")
	return dst.String()
}

// sends returns the scheme of the credentials that a request has.
func (h *HTTP) sends(l *login) string {
	switch {
	case h.spec.Auth == authBearer || !h.spec.Token.IsZero():
		return authBearer
	case l.challenge != nil:
		return authDigest
	case !h.spec.HasUser || h.wantsDigest():
		return authNone
	}
	return authBasic
}

func (h *HTTP) credentials(target string, l *login) (cred string, secrets []string) {
	switch token := h.spec.Token; {
	case h.spec.Auth == "bearer" && token.IsZero():
		token = h.spec.Password
		fallthrough
	case !token.IsZero():
		return "Bearer " + token.Reveal(), []string{token.Reveal()}
	case !h.spec.HasUser:
		return "", nil
	case l.challenge != nil:
		cred, response := l.challenge.authorization(h.spec.Username, h.spec.Password, target, l.nc)
		return cred, []string{strings.TrimPrefix(cred, "Digest "), response, h.spec.Password.Reveal()}
	case h.wantsDigest():
		return "", nil // the challenge comes first
	}
	plain := h.spec.Username + ":" + h.spec.Password.Reveal()
	code := base64.StdEncoding.EncodeToString([]byte(plain))
	return "Basic " + code, []string{code, h.spec.Password.Reveal()}
}
