// SPDX-License-Identifier: GPL-3.0-or-later

package flow

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestParsePort(t *testing.T) {
	for _, tt := range []struct {
		verb, arg, want string // "" = malformed
	}{
		{"PORT", "192,0,2,7,4,210", "192.0.2.7:1234"},
		{"PORT", " 192,0,2,7,0,21 ", "192.0.2.7:21"},
		{"PORT", "192,0,2,256,4,210", ""},
		{"PORT", "192,0,2,7,4", ""},
		{"PORT", "192,0,2,7,4,210,1", ""},
		{"PORT", "", ""},
		{"PORT", "+1,0,2,7,4,210", ""},
		{"EPRT", "|1|192.0.2.7|1234|", "192.0.2.7:1234"},
		{"EPRT", "|2|2001:db8::7|1234|", "[2001:db8::7]:1234"},
		{"EPRT", "!2!2001:db8::7!1234!", "[2001:db8::7]:1234"},
		{"EPRT", "|2|192.0.2.7|1234|", ""},
		{"EPRT", "|1|2001:db8::7|1234|", ""},
		{"EPRT", "|3|192.0.2.7|1234|", ""},
		{"EPRT", "|2|fe80::1%eth0|1234|", ""},
		{"EPRT", "|1|192.0.2.7|65536|", ""},
		{"EPRT", "|1|192.0.2.7|1234", ""},
		{"EPRT", "x|1|192.0.2.7|1234|", ""},
		{"EPRT", "|", ""},
		{"EPRT", "", ""},
	} {
		parse := parsePort
		if tt.verb == "EPRT" {
			parse = parseEprt
		}
		got, err := parse(tt.arg)
		switch {
		case tt.want == "" && err == nil:
			t.Errorf("%s %q was read as %v", tt.verb, tt.arg, got)
		case tt.want != "" && (err != nil || got.String() != tt.want):
			t.Errorf("%s %q: %v, %v", tt.verb, tt.arg, got, err)
		}
	}
}

// script is a Conn that yields the given pieces, one a Read, and keeps what is written.
type script struct {
	net.Conn
	pieces []string
}

func (s *script) Read(b []byte) (int, error) {
	if len(s.pieces) == 0 {
		return 0, io.EOF
	}
	n := copy(b, s.pieces[0])
	if s.pieces[0] = s.pieces[0][n:]; s.pieces[0] == "" {
		s.pieces = s.pieces[1:]
	}
	return n, nil
}

func (*script) CloseWrite() error { return nil }
func (*script) Abort()            {}

// bindable says where a data connection can go, and brings one.
type bindable struct {
	script
	at   string
	err  error
	data Conn
	peer string // "" = 198.51.100.1:20
	flat bool   // it is direct
	open bool   // anybody may connect

	mu    sync.Mutex
	binds int
}

func (b *bindable) Direct() bool { return b.flat }

func (b *bindable) Bind(context.Context) (Binding, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.binds++
	if b.err != nil {
		return nil, b.err
	}
	return boundAt{netip.MustParseAddrPort(b.at), b.data, netip.MustParseAddrPort(cmp.Or(b.peer, "198.51.100.1:20")), b.open}, nil
}

type boundAt struct {
	at   netip.AddrPort
	data Conn
	peer netip.AddrPort
	open bool
}

func (b boundAt) Anybody() bool        { return b.open }
func (b boundAt) Addr() netip.AddrPort { return b.at }
func (boundAt) Close() error           { return nil }
func (b boundAt) Accept(ctx context.Context) (Conn, netip.AddrPort, error) {
	if b.data != nil {
		return b.data, b.peer, nil
	}
	<-ctx.Done()
	return nil, netip.AddrPort{}, ctx.Err()
}

// callable is an application that can be connected to.
type callable struct {
	script
	called chan [2]netip.AddrPort
	conn   Conn
}

func (c *callable) Call(_ context.Context, from, to netip.AddrPort) (Conn, error) {
	c.called <- [2]netip.AddrPort{from, to}
	if c.conn == nil {
		return nil, ErrRefused
	}
	return c.conn, nil
}

func TestFTPCommands(t *testing.T) {
	const greeting = "220 ready\r\n"
	for _, tt := range []struct {
		name           string
		mode           FTPMode
		server, client []string
		at             string
		err            error
		want           string
		binds          int
	}{
		{"refused", FTPRefuse, []string{greeting}, []string{"USER a\r\nPORT 192,0,2,1,4,1\r\n", "EPRT |1|192.0.2.1|1025|\r\nPASV\r\n"}, "", nil, "USER a\r\nPORT\r\nEPRT\r\nPASV\r\n", 0},
		{"served", FTPActive, []string{greeting}, []string{"port 192,0,2,1,4,1\r\n"}, "203.0.113.10:258", nil, "PORT 203,0,113,10,1,2\r\n", 1},
		{"split anywhere", FTPActive, []string{"2", "20 x\r\n"}, strings.SplitAfter("EPRT |1|192.0.2.1|1025|\r\n", ""), "203.0.113.10:258", nil, "EPRT |1|203.0.113.10|258|\r\n", 1},
		{"over IPv6", FTPActive, []string{greeting}, []string{"PORT 192,0,2,1,4,1\n"}, "[2001:db8::a]:258", nil, "EPRT |2|2001:db8::a|258|\r\n", 1},
		{"of somebody else", FTPActive, []string{greeting}, []string{"PORT 192,0,2,9,4,1\r\n"}, "203.0.113.10:258", nil, "PORT\r\n", 0},
		{"port 0", FTPActive, []string{greeting}, []string{"PORT 192,0,2,1,0,0\r\n"}, "203.0.113.10:258", nil, "PORT\r\n", 0},
		{"a service", FTPActive, []string{greeting}, []string{"PORT 192,0,2,1,0,22\r\n"}, "203.0.113.10:258", nil, "PORT\r\n", 0},
		{"malformed", FTPActive, []string{greeting}, []string{"PORT 192,0,2,1\r\n"}, "203.0.113.10:258", nil, "PORT\r\n", 0},
		{"refused by the upstream", FTPActive, []string{greeting}, []string{"PORT 192,0,2,1,4,1\r\n"}, "", errors.ErrUnsupported, "PORT\r\n", 1},
		{"one after another", FTPActive, []string{greeting}, []string{strings.Repeat("PORT 192,0,2,1,4,1\r\n", 3)}, "203.0.113.10:258", nil, strings.Repeat("PORT 203,0,113,10,1,2\r\n", 3), 3},
		{"after TLS began", FTPActive, []string{greeting, "234 go\r\n"}, []string{"AUTH TLS\r\n", "\x16\x03\x01PORT 192,0,2,1,4,1\r\n"}, "203.0.113.10:258", nil, "AUTH TLS\r\n\x16\x03\x01PORT 192,0,2,1,4,1\r\n", 0},
		{"after TLS was refused", FTPActive, []string{greeting, "500 no\r\n"}, []string{"AUTH TLS\r\n", "PORT 192,0,2,1,4,1\r\n"}, "203.0.113.10:258", nil, "AUTH TLS\r\nPORT 203,0,113,10,1,2\r\n", 1},
		{"not FTP", FTPRefuse, []string{"SSH-2.0-x\r\n"}, []string{"PORT 192,0,2,1,4,1\r\n"}, "", nil, "PORT 192,0,2,1,4,1\r\n", 0},
		{"binary", FTPRefuse, []string{greeting}, []string{strings.Repeat("x", ftpLine+1), "PORT 1\r\n"}, "", nil, strings.Repeat("x", ftpLine+1) + "PORT 1\r\n", 0},
		{"unfinished", FTPActive, []string{greeting}, []string{"QUIT"}, "", nil, "QUIT", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := NewHandler(HandlerConfig{Context: "default"})
			defer h.Close()
			app := &callable{script: script{pieces: tt.client}}
			up := &bindable{script: script{pieces: tt.server}, at: tt.at, err: tt.err}
			f := &Flow{Network: TCP, Src: netip.MustParseAddrPort("192.0.2.1:40000"), Orig: netip.MustParseAddrPort("198.51.100.1:21")}
			c, s, done := h.watchFTP(t.Context(), f, Decision{FTP: tt.mode, Action: Forward}, app, up)
			defer done()
			buf := make([]byte, 1<<16)
			if _, err := s.Read(buf); err != nil { // the greeting
				t.Fatal(err)
			}
			var got bytes.Buffer
			for {
				n, err := c.Read(buf)
				got.Write(buf[:n])
				if bytes.Contains(buf[:n], []byte("AUTH")) || n > 0 && len(tt.server) > 1 {
					_, _ = s.Read(buf)
				}
				if err != nil {
					break
				}
			}
			if got.String() != tt.want || up.binds != tt.binds {
				t.Errorf("server gets %.80q, want %.80q; %d bindings, want %d", got.String(), tt.want, up.binds, tt.binds)
			}
		})
	}
}

// TestFTPTransfer: what the upstream accepts reaches the application, from the server's address, as a flow of its own.
func TestFTPTransfer(t *testing.T) {
	h := NewHandler(HandlerConfig{Context: "default"})
	defer h.Close()
	near, app := net.Pipe()
	far, server := net.Pipe()
	client := &callable{script: script{pieces: []string{"PORT 192,0,2,1,4,1\r\n"}}, called: make(chan [2]netip.AddrPort, 1), conn: pipeConn{near}}
	up := &bindable{script: script{pieces: []string{"220 x\r\n"}}, at: "203.0.113.10:258", data: pipeConn{far}}
	f := &Flow{Network: TCP, Src: netip.MustParseAddrPort("192.0.2.1:40000"), Orig: netip.MustParseAddrPort("198.18.0.5:21"), Dst: Addr{Host: "ftp.example", Port: 21}}
	c, s, done := h.watchFTP(t.Context(), f, Decision{FTP: FTPActive, Action: Forward, Via: &dialer{name: "eu"}}, client, up)
	defer done()
	buf := make([]byte, 1<<10)
	if _, err := s.Read(buf); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(buf); err != nil {
		t.Fatal(err)
	}
	if got := <-client.called; got[0].String() != "198.18.0.5:20" || got[1].String() != "192.0.2.1:1025" {
		t.Errorf("called %v", got)
	}
	flows := h.table.Snapshot()
	if len(flows) != 1 {
		t.Fatalf("%d flows", len(flows))
	}
	for _, i := range flows { // new rules are asked about the control connection: nobody writes rules for port 20
		if i.Ruled() != f || i.Orig.Port() != ftpDataPort {
			t.Errorf("rules decide about %+v", i.Ruled())
		}
	}
	go func() {
		_, _ = server.Write([]byte("listing"))
		server.Close()
	}()
	_ = app.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := io.ReadFull(app, buf[:7]); err != nil || string(buf[:n]) != "listing" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	app.Close()
}

// TestFTPStranger: whoever connects in the server's place gets nothing, also if the upstream does not say who it is.
func TestFTPStranger(t *testing.T) {
	for _, peer := range []string{"203.0.113.9:20", "0.0.0.0:0", "[2001:db8::9]:20"} {
		t.Run(peer, func(t *testing.T) { testFTPStranger(t, peer) })
	}
}

func testFTPStranger(t *testing.T, peer string) {
	t.Helper()
	h := NewHandler(HandlerConfig{Context: "default"})
	defer h.Close()
	far, stranger := net.Pipe()
	client := &callable{script: script{pieces: []string{"PORT 192,0,2,1,4,1\r\n"}}, called: make(chan [2]netip.AddrPort, 1)}
	up := &bindable{script: script{pieces: []string{"220 x\r\n"}}, at: "203.0.113.10:258", data: pipeConn{far}, peer: peer}
	f := &Flow{Network: TCP, Src: netip.MustParseAddrPort("192.0.2.1:40000"), Orig: netip.MustParseAddrPort("198.51.100.1:21"), Dst: AddrFrom(netip.MustParseAddrPort("198.51.100.1:21"))}
	c, s, done := h.watchFTP(t.Context(), f, Decision{FTP: FTPActive, Action: Forward, Via: &dialer{name: "eu"}}, client, up)
	defer done()
	buf := make([]byte, 1<<10)
	for _, r := range []io.Reader{s, c} {
		if _, err := r.Read(buf); err != nil {
			t.Fatal(err)
		}
	}
	_ = stranger.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := stranger.Read(buf); !errors.Is(err, io.EOF) {
		t.Errorf("the connection stands: %v", err)
	}
	if len(client.called) != 0 {
		t.Error("the application was connected to")
	}
}

// TestFTPOpen: where the upstream lets anybody connect, a server known by name is told from others by the addresses of its name, if there are
// DNS servers to ask. Not to be told is to be refused.
func TestFTPOpen(t *testing.T) {
	for _, tt := range []struct {
		name  string
		open  bool
		addrs []string
		err   error
		want  bool
	}{
		{"the server", true, []string{"2001:db8::1", "198.51.100.1"}, nil, true},
		{"a stranger", true, []string{"198.51.100.2"}, nil, false},
		{"dns fails", true, nil, ErrTimeout, false},
		{"no dns servers", true, nil, ErrNoServers, true},
		{"chosen by the upstream", false, nil, ErrTimeout, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := NewHandler(HandlerConfig{Context: "default", Names: &names{resolve: func(_ context.Context, host string) (ips []netip.Addr, err error) {
				for _, s := range tt.addrs {
					ips = append(ips, netip.MustParseAddr(s))
				}
				if host != "ftp.example" {
					t.Errorf("asked for %q", host)
				}
				return ips, tt.err
			}}})
			defer h.Close()
			c := &ftp{h: h, f: &Flow{Dst: Addr{Host: "ftp.example", Port: 21}}}
			if got := c.isServer(t.Context(), called{from: netip.MustParseAddrPort("198.51.100.1:20"), anybody: tt.open}); got != tt.want {
				t.Errorf("%v", got)
			}
		})
	}
}

// TestFTPWatched: only what can be a control connection through an upstream is watched.
func TestFTPWatched(t *testing.T) {
	for _, tt := range []struct {
		name string
		mode FTPMode
		port uint16
		up   Conn
		want bool
	}{
		{"port 21", FTPRefuse, 21, &bindable{}, true},
		{"port 21, an upstream without BIND", FTPRefuse, 21, &script{}, true},
		{"another port", FTPRefuse, 2121, &bindable{}, false},
		{"another port, by rule", FTPActive, 2121, &bindable{}, true},
		{"ignored", FTPIgnore, 21, &bindable{}, false},
		{"direct", FTPRefuse, 21, &bindable{flat: true}, false},
		{"direct, by rule", FTPActive, 21, &bindable{flat: true}, false},
	} {
		if got := isFTP(&Flow{Dst: Addr{Port: tt.port}}, Decision{FTP: tt.mode}, tt.up); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

// TestFTPOtherProtocol: a client that speaks first, and not in lines, is not kept waiting for the end of one.
func TestFTPOtherProtocol(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHandler(HandlerConfig{Context: "default"})
		defer h.Close()
		near, app := memPipe()
		defer near.Close()
		c, _, done := h.watchFTP(t.Context(), &Flow{}, Decision{FTP: FTPActive}, near, &script{})
		defer done()
		mustWrite(t, app, "\x16\x03\x01\x02\x00")
		begin := time.Now()
		_ = near.SetReadDeadline(begin.Add(time.Second)) // in the bubble, it passes if the bytes are kept
		mustRead(t, c, "\x16\x03\x01\x02\x00")
		if took := time.Since(begin); took != 0 {
			t.Errorf("kept for %v", took)
		}
	})
}

// TestFTPPassive: a transfer in passive mode waits for nothing, though a connection was prepared before it.
func TestFTPPassive(t *testing.T) {
	for _, verb := range []string{"PASV", "EPSV"} {
		synctest.Test(t, func(t *testing.T) {
			h := NewHandler(HandlerConfig{Context: "default"})
			defer h.Close()
			app := &callable{script: script{pieces: []string{"PORT 192,0,2,1,4,1\r\n", verb + "\r\n"}}}
			replies := []string{"220 x\r\n", "150 here\r\n", "226 done\r\n"}
			up := &bindable{script: script{pieces: slices.Clone(replies)}, at: "203.0.113.10:258"}
			f := &Flow{Network: TCP, Src: netip.MustParseAddrPort("192.0.2.1:40000"), Orig: netip.MustParseAddrPort("198.51.100.1:21")}
			c, s, done := h.watchFTP(t.Context(), f, Decision{FTP: FTPActive, Action: Forward}, app, up)
			defer done()
			begin := time.Now()
			buf := make([]byte, 1<<10)
			for _, r := range []io.Reader{c, c, s, s, s} {
				if _, err := r.Read(buf); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
			if took := time.Since(begin); took != 0 || len(h.table.Snapshot()) != 0 {
				t.Errorf("%v, %v", took, h.table.Snapshot())
			}
		})
	}
}

// TestFTPOvertaken: the end of a transfer waits for its data connection to reach the application, a while; other replies do not.
func TestFTPOvertaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHandler(HandlerConfig{Context: "default"})
		defer h.Close()
		app := &callable{script: script{pieces: []string{"PORT 192,0,2,1,4,1\r\n"}}}
		replies := []string{"220 x\r\n", "200 ok\r\n", "250 there\r\n", "150 here\r\n", "226 done\r\n", "226 more\r\n"}
		up := &bindable{script: script{pieces: slices.Clone(replies)}, at: "203.0.113.10:258"}
		f := &Flow{Network: TCP, Src: netip.MustParseAddrPort("192.0.2.1:40000"), Orig: netip.MustParseAddrPort("198.51.100.1:21")}
		c, s, done := h.watchFTP(t.Context(), f, Decision{FTP: FTPActive, Action: Forward}, app, up)
		defer done()
		buf := make([]byte, 1<<10)
		if _, err := c.Read(buf); err != nil {
			t.Fatal(err)
		}
		for _, want := range replies {
			begin := time.Now()
			n, err := s.Read(buf)
			if err != nil || string(buf[:n]) != want {
				t.Fatalf("%q, %v", buf[:n], err)
			}
			if took := time.Since(begin); (took == ftpLate) != (want == "226 done\r\n") {
				t.Errorf("%q came after %v", want, took)
			}
		}
	})
}

// pipeConn is a net.Pipe as a flow sees it: its half-close is a whole one.
type pipeConn struct{ net.Conn }

func (p pipeConn) CloseWrite() error { return p.Close() }
func (p pipeConn) Abort()            { p.Close() }

func FuzzFTPClient(f *testing.F) {
	for _, s := range []string{"USER a\r\nPORT 192,0,2,1,4,1\r\n", "EPRT |2|2001:db8::1|1|\r\n", "AUTH TLS\r\n\x16", "\xff\xf4\xf2ABOR\r\n", "\n\n", "PORT"} {
		f.Add([]byte(s), 3)
	}
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		h := NewHandler(HandlerConfig{Context: "default"})
		defer h.Close()
		size = max(1, size%64)
		app := &script{}
		for rest := string(in); rest != ""; {
			n := min(size, len(rest))
			app.pieces = append(app.pieces, rest[:n])
			rest = rest[n:]
		}
		up := &bindable{err: errors.ErrUnsupported}
		fl := &Flow{Src: netip.MustParseAddrPort("192.0.2.1:40000")}
		c, _, done := h.watchFTP(t.Context(), fl, Decision{FTP: FTPIgnore}, app, up)
		defer done()
		out, err := io.ReadAll(c)
		if err != nil {
			t.Fatal(err)
		}
		// Without PORT and EPRT nothing may change; with them, only their arguments may go.
		upper := bytes.ToUpper(in)
		if !bytes.Contains(upper, []byte("PORT")) && !bytes.Contains(upper, []byte("EPRT")) && !bytes.Equal(in, out) {
			t.Errorf("%q became %q", in, out)
		}
		if len(out) > len(in)+2*bytes.Count(in, []byte("\n")) {
			t.Errorf("%d bytes became %d", len(in), len(out))
		}
	})
}
