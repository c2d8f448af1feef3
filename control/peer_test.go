// SPDX-License-Identifier: GPL-3.0-or-later

package control_test

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/control/controltest"
)

// startUntrusted serves callers who have no authority.
func startUntrusted(t *testing.T) *daemon {
	t.Helper()
	d := &daemon{Fake: controltest.New(), socket: filepath.Join(t.TempDir(), "m.sock")}
	d.server = control.NewServerWithoutAuthority(control.Config{UserLeases: 16, Socket: d.socket, Group: "0", Backend: d.Fake, Now: controltest.Epoch})
	if err := d.server.Start(); err != nil {
		t.Fatal(err)
	}
	d.client = client.New(d.socket)
	t.Cleanup(func() { d.client.Close(); d.server.Close() })
	return d
}

func TestWithoutAuthority(t *testing.T) {
	d := startUntrusted(t)
	for _, path := range []string{
		"/v1/reload", "/v1/shutdown", "/v1/upstreams/paris/test", "/v1/upstreams/paris/enable", "/v1/upstreams/paris/disable", "/v1/upstreams/paris/drain",
	} {
		if status, body := d.do(t, "POST", path, ""); status != http.StatusForbidden || !strings.Contains(body, "group 0") {
			t.Errorf("%s: got %d %s", path, status, body)
		}
	}
	for _, path := range []string{"/v1/events", "/v1/dns/query?name=a.example", "/v1/explain?network=tcp&dest=a:1", "/v1/explain?network=tcp&dest=a:1&context=default"} {
		if status, body := d.do(t, "GET", path, ""); status != http.StatusForbidden {
			t.Errorf("%s: got %d %s", path, status, body)
		}
	}
	if status, body := d.do(t, "DELETE", "/v1/flows/1", ""); status != http.StatusNotFound {
		t.Errorf("someone else's flow: got %d %s", status, body)
	}
	st, err := d.client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(st.Contexts) != 0 || len(st.Upstreams) != 0 || st.Config.Path != "" || st.DNS != (control.DNSStatus{}) || st.Version == "" {
		t.Errorf("sees too much, or no version: %+v", st)
	}
	if d.Reloads() != 0 || len(d.Killed()) != 0 {
		t.Error("the backend was called all the same")
	}
}

func TestOwnLeaseWithoutAuthority(t *testing.T) {
	d := startUntrusted(t)
	d.StatusValue.Contexts = append(d.StatusValue.Contexts, control.ContextStatus{Name: "mine", Lease: true})
	mine := controltest.Flows()[1]
	mine.ID, mine.Context = 9, "mine"
	d.FlowList = append(d.FlowList, mine)
	flows := func() int {
		list, err := d.client.Flows(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	if n := flows(); n != 0 {
		t.Errorf("%d flows are seen before there is a lease", n)
	}
	l, err := d.client.Lease(t.Context(), client.LeaseRequest{Name: "mine", Proxies: []string{"socks5h://u:p@192.0.2.1:1080?udp=off&weight=2"}})
	if err != nil {
		t.Fatal(err)
	}
	if n := flows(); n != 1 {
		t.Errorf("%d flows are seen, want the own one", n)
	}
	if st, err := d.client.Status(t.Context()); err != nil || len(st.Contexts) != 1 || st.Contexts[0].Name != "mine" {
		t.Errorf("got %+v %v", st.Contexts, err)
	}
	if err := d.client.KillFlow(t.Context(), 9); err != nil {
		t.Error(err)
	}
	if _, err := d.client.Explain(t.Context(), client.ExplainRequest{Context: "mine", Network: "tcp", Dest: "a:1"}); err != nil {
		t.Error(err)
	}
	l.Close()
	<-d.Leases()[0].Closed()
}

func TestLeaseWithoutAuthorityNamesNoFiles(t *testing.T) {
	d := startUntrusted(t)
	for _, r := range []client.LeaseRequest{
		{Context: "default"},
		{Proxies: []string{"socks5h://192.0.2.1:1080?password_file=/etc/shadow"}},
		{Proxies: []string{"http://192.0.2.1:1080?token_file=/etc/shadow#x"}},
		{Proxies: []string{"https://192.0.2.1:1080?ca=/etc/shadow"}},
		{Proxies: []string{"socks5h://192.0.2.1:1080?name=a&%70assword_file=/etc/shadow"}},
		{Proxies: []string{"socks5h://192.0.2.1:1080?a;b"}},
		{Proxies: []string{"direct://", "socks5h://x:${SECRET}@192.0.2.1:1080"}},
	} {
		if _, err := d.client.Lease(t.Context(), r); client.Code(err) != client.CodeForbidden {
			t.Errorf("%v: got %v, want forbidden", r, err)
		}
	}
	if n := len(d.Leases()); n != 0 {
		t.Errorf("%d leases were made", n)
	}
}

func TestLeasesOfOneUserAreBounded(t *testing.T) {
	d := startUntrusted(t)
	for {
		l, err := d.client.Lease(t.Context(), client.LeaseRequest{Proxies: []string{"direct://"}})
		if client.Code(err) == client.CodeTooMany {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if len(d.Leases()) > 100 {
			t.Fatal("no bound in sight")
		}
	}
	if n := len(d.Leases()); n != 16 {
		t.Errorf("%d leases, want 16", n)
	}
}

func TestConnectionsOfOneUserAreBounded(t *testing.T) {
	d := startUntrusted(t)
	var conns []net.Conn
	// served opens one more connection and reports whether it is answered; it stays open.
	served := func() bool {
		conn, err := new(net.Dialer).DialContext(t.Context(), "unix", d.socket)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		fmt.Fprint(conn, "GET /v1/status HTTP/1.1\r\nHost: m\r\n\r\n")
		_, err = conn.Read(make([]byte, 8))
		return err == nil
	}
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	n := 0
	for served() {
		if n++; n > 100 {
			t.Fatal("no bound in sight")
		}
	}
	if n != 64 {
		t.Errorf("%d connections are served, want 64", n)
	}
	// A place is free again when the server has noticed the end of a connection, a moment later.
	conns[0].Close()
	for !served() {
		if t.Context().Err() != nil {
			t.Fatal("a closed connection keeps its place")
		}
	}
}

func TestGroup(t *testing.T) {
	for name, want := range map[string]bool{"": false, "0": true, "root": true, "no-such-group-anywhere": false, "4294967296": false} {
		if gid, ok := control.GroupID(name); ok != want || gid != 0 {
			t.Errorf("GroupID(%q) = %d, %v", name, gid, ok)
		}
	}
	p := control.Peer{UID: 1000, GID: 5, Groups: []uint32{7, 9}}
	for gid, want := range map[uint32]bool{5: true, 7: true, 9: true, 0: false, 1000: false} {
		if p.In(gid) != want {
			t.Errorf("In(%d) = %v", gid, !want)
		}
	}
}

func TestPeerGroupsAreThoseOfTheProcess(t *testing.T) {
	want, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	d := start(t)
	l, err := d.client.Lease(t.Context(), client.LeaseRequest{Context: "default"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got := d.Leases()[0].Peer.Groups; len(got) != len(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
