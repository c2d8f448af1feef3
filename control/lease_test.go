// SPDX-License-Identifier: GPL-3.0-or-later

package control_test

import (
	"fmt"
	"net"
	"os"
	"testing"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control/client"
)

func TestLeaseLivesAsLongAsItsConnection(t *testing.T) {
	d := start(t)
	l, err := d.client.Lease(t.Context(), client.LeaseRequest{Proxies: []string{"socks5h://192.0.2.1:1080"}})
	if err != nil {
		t.Fatal(err)
	}
	if l.Context != "lease-1" || l.TUN != "mprox7" || l.Table != 19761 {
		t.Errorf("got %+v", l.Lease)
	}
	fake := d.Leases()[0]
	if fake.Peer.PID != os.Getpid() || fake.Peer.UID != uint32(os.Getuid()) || fake.Request.Proxies[0] != "socks5h://192.0.2.1:1080" {
		t.Errorf("the backend saw %+v from %+v", fake.Request, fake.Peer)
	}
	select {
	case <-fake.Closed():
		t.Fatal("closed while its connection is open")
	default:
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	<-fake.Closed()
	<-l.Done()
}

func TestLeaseEndsThoughTheCallerHasSentTooMuch(t *testing.T) {
	d := start(t)
	conn, err := new(net.Dialer).DialContext(t.Context(), "unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	body := `{"context":"default"}`
	fmt.Fprintf(conn, "POST /v1/leases HTTP/1.1\r\nHost: m\r\nContent-Length: %d\r\n\r\n%sGET / HTTP/1.1\r\n\r\n", len(body), body)
	if _, err := conn.Read(make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	<-d.Leases()[0].Closed()
}

func TestLeaseEndsWithADisregardedFlood(t *testing.T) {
	d := start(t)
	conn, err := new(net.Dialer).DialContext(t.Context(), "unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	body := `{"context":"default"}`
	fmt.Fprintf(conn, "POST /v1/leases HTTP/1.1\r\nHost: m\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	if _, err := conn.Read(make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
	_, _ = conn.Write(make([]byte, 1<<20)) // may fail half way, which is the point
	<-d.Leases()[0].Closed()
}

func TestLeaseRevokedByTheDaemon(t *testing.T) {
	d := start(t)
	l, err := d.client.Lease(t.Context(), client.LeaseRequest{Context: "default"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d.Leases()[0].Revoke()
	<-l.Done()
	<-d.Leases()[0].Closed()
}

func TestServerCloseEndsLeases(t *testing.T) {
	d := start(t)
	l, err := d.client.Lease(t.Context(), client.LeaseRequest{Context: "default"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := d.server.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Leases()[0].Closed(): // Close has waited for it
	default:
		t.Error("the lease has outlived the server")
	}
	<-l.Done()
}

func TestLeaseRefusedByTheBackend(t *testing.T) {
	d := start(t)
	d.LeaseErr = &client.Error{Code: client.CodeConflict, Message: "no mark is free", Path: ""}
	if _, err := d.client.Lease(t.Context(), client.LeaseRequest{Context: "default"}); client.Code(err) != client.CodeConflict {
		t.Errorf("got %v, want a conflict", err)
	}
	d.LeaseErr = config.Errors{{Path: "--proxy", Msg: "unknown scheme"}}
	if _, err := d.client.Lease(t.Context(), client.LeaseRequest{Proxies: []string{"gopher://x"}}); client.Code(err) != client.CodeBadRequest {
		t.Errorf("got %v, want a bad request", err)
	}
}
