// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"encoding/xml"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestStatistics(t *testing.T) {
	if m := median([]float64{3, 1, 2}); m != 2 {
		t.Errorf("median %v", m)
	}
	if m := median([]float64{4, 1, 2, 3}); m != 2.5 {
		t.Errorf("median of four %v", m)
	}
	if s := spread([]float64{9, 10, 12}); s != .15 {
		t.Errorf("spread %v", s)
	}
	if r := ratio([]float64{1, 2, 30}, []float64{2, 4, 10}); r != .5 {
		t.Errorf("ratio %v", r)
	}
	if d := difference([]float64{5, 7}, []float64{1, 1, 1}); d != 5 {
		t.Errorf("difference %v", d)
	}
	if median(nil) != 0 || spread(nil) != 0 || ratio(nil, nil) != 0 {
		t.Error("figures of nothing")
	}
}

func sample() *report {
	r := &report{Server: "mprox", Reps: 2, Seconds: 1}
	for subject, value := range map[string]float64{subUpstream: 20, subSplice: 10, subFloor: 8, subEngine: 9} {
		c := r.cell("tcp-up-1", "Gbit/s", "CPU-s/GB", subject)
		c.Value = []float64{value, value}
		c.Cost = []float64{value / 20}
	}
	c := r.cell("udp-64", "k echoes/s", "µs/echo", subEngine)
	c.Value, c.Errors, c.Error = []float64{5}, 3, "lost"
	return r
}

func TestVerdicts(t *testing.T) {
	got := map[string]string{}
	for _, v := range sample().verdicts()[1:] {
		got[v[0]] = v[len(v)-1]
	}
	for what, want := range map[string]string{
		"tcp-up-1: CPU": "aim", // .45 of .50
		"tcp-up-1: CPU against the copying floor":        "aim", // 1.125 of 1.2
		"tcp-up-1: throughput against REDIRECT + splice": "yes", // .9 of .85 and 1
		"tcp-down-1: CPU": "",
		"udp-64: echoes against the upstream alone":       "",
		"tcp-up-1: CPU against the copying floor, absent": "",
	} {
		if got[what] != want {
			t.Errorf("%s: %q, want %q", what, got[what], want)
		}
	}
}

func TestDoc(t *testing.T) {
	dir := t.TempDir()
	page, figures := filepath.Join(dir, "b.md"), filepath.Join(dir, "r.json")
	if err := sample().save(figures); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(page, []byte("before\n"+docBegin+"\nold\n"+docEnd+"\nafter\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var first string
	for range 2 { // the second time changes nothing
		if err := writeDoc(page, figures); err != nil {
			t.Fatal(err)
		}
		b, _ := os.ReadFile(page)
		s := string(b)
		if !strings.HasPrefix(s, "before\n") || !strings.HasSuffix(s, docEnd+"\nafter\n") || strings.Contains(s, "old") || !strings.Contains(s, "3 lost") {
			t.Errorf("page:\n%s", s)
		}
		if first != "" && first != s {
			t.Error("not the same the second time")
		}
		first = s
	}
	svg, err := os.ReadFile(filepath.Join(dir, "b.svg"))
	if err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(strings.NewReader(string(svg))); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("chart: %v\n%s", err, svg)
		}
	}
	if err := os.WriteFile(page, []byte("no place"), 0o600); err != nil {
		t.Fatal(err)
	}
	if writeDoc(page, figures) == nil {
		t.Error("a page without a place was accepted")
	}
}

func TestSOCKS(t *testing.T) {
	for _, dst := range []string{"192.0.2.1:9003", "[2001:db8::1]:9003"} {
		client, server := net.Pipe()
		got := make(chan []byte, 1)
		go func() {
			buf := make([]byte, 64)
			_, _ = io.ReadFull(server, buf[:3])
			_, _ = server.Write([]byte{5, 0})
			n, _ := server.Read(buf)
			got <- buf[:n]
			_, _ = server.Write(appendAddr([]byte{5, 0, 0}, netip.MustParseAddrPort("198.51.100.7:80")))
			server.Close()
		}()
		bound, err := socksHandshake(client, 1, netip.MustParseAddrPort(dst))
		if err != nil || bound.String() != "198.51.100.7:80" {
			t.Errorf("%v %v", bound, err)
		}
		if want := appendAddr([]byte{5, 1, 0}, netip.MustParseAddrPort(dst)); string(<-got) != string(want) {
			t.Errorf("request of %s", dst)
		}
		client.Close()
	}
}

func TestSelected(t *testing.T) {
	for name, want := range map[string]bool{"tcp-up-1": true, "tcp6-up-1": false, "udp-64": true, "conns": false} {
		if selected(split("tcp-,udp"), name) != want {
			t.Error(name)
		}
	}
	if !selected(nil, "anything") {
		t.Error("an empty list is everything")
	}
}

func TestParseIperf(t *testing.T) {
	r, err := parseIperf([]byte(`{"end":{"streams":[{"receiver":{"bytes":10}},{"receiver":{"bytes":30}}],"sum_received":{"bytes":40,"seconds":2}}}`))
	if err != nil || r.Bytes != 40 || r.Seconds != 2 || len(r.Streams) != 2 || r.Streams[1] != 30 {
		t.Errorf("%+v %v", r, err)
	}
	for _, bad := range []string{"", "{}", `{"error":"unable to connect"}`} {
		if r, err := parseIperf([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, r)
		}
	}
}
