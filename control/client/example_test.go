// SPDX-License-Identifier: GPL-3.0-or-later

package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/control/controltest"
)

// daemon stands for a running mprox, so that the examples run anywhere: with a real one, socket is client.DefaultSocket.
func daemon() (fake *controltest.Fake, socket string, stop func()) {
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	fake = controltest.New()
	socket = filepath.Join(dir, "m.sock")
	server := control.NewServer(control.Config{Socket: socket, Backend: fake, Now: controltest.Epoch})
	if err := server.Start(); err != nil {
		log.Fatal(err)
	}
	return fake, socket, func() {
		_ = server.Close()
		_ = os.RemoveAll(dir)
	}
}

// within bounds an example, as every call to a daemon should be.
func within() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 10*time.Second)
}

func ExampleNew() {
	c := client.New("/run/mprox/no-such.sock")
	defer c.Close()
	_, err := c.Status(context.Background())
	fmt.Println(errors.Is(err, client.ErrUnreachable))
	// Output: true
}

func ExampleClient_Status() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	st, err := c.Status(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(st.Version, st.Guard.Active)
	for _, x := range st.Contexts {
		fmt.Println(x.Name, x.Mode, x.TUN, x.FlowsActive)
	}
	// Output:
	// v1.2.3 true
	// default global mprox0 2
}

func ExampleClient_Health() {
	fake, socket, stop := daemon()
	defer stop()
	fake.Checks = append(fake.Checks, client.Check{Name: "upstream:berlin", Message: "connection refused"})
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	h, err := c.Health(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(h.Healthy)
	for _, check := range h.Checks {
		if !check.OK {
			fmt.Println(check.Name, check.Message)
		}
	}
	// Output:
	// false
	// upstream:berlin connection refused
}

func ExampleClient_Flows() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	flows, err := c.Flows(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, f := range flows {
		fmt.Println(f.ID, f.Network, f.Host, f.Dst, f.Upstream, f.State)
	}
	// Output:
	// 1 tcp example.com 198.18.0.5:443 paris established
	// 2 udp  [2001:db8::35]:443 berlin closing
}

func ExampleClient_WatchFlows() {
	fake, socket, stop := daemon()
	defer stop()
	closed := fake.FlowList[1]
	closed.State = "closed"
	fake.Changes = append(fake.Changes, closed)
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	for f, err := range c.WatchFlows(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(f.ID, f.State)
		if f.State == "closed" {
			break
		}
	}
	// Output:
	// 1 established
	// 2 closing
	// 1 closed
}

func ExampleClient_KillFlow() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	fmt.Println(c.KillFlow(ctx, 1))
	fmt.Println(client.Code(c.KillFlow(ctx, 99)))
	// Output:
	// <nil>
	// not_found
}

func ExampleClient_Contexts() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	contexts, err := c.Contexts(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, x := range contexts {
		fmt.Println(x.Name, x.Default, x.BytesDown)
	}
	// Output: default eu 5242880
}

func ExampleClient_Upstreams() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	upstreams, err := c.Upstreams(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, u := range upstreams {
		fmt.Println(u.Name, u.URL, u.Up)
	}
	// Output:
	// berlin https://bob:***@proxy.example:8443 false
	// paris socks5h://alice:***@203.0.113.10:1080 true
}

func ExampleClient_Explain() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	e, err := c.Explain(ctx, client.ExplainRequest{Network: "tcp", Dest: "example.com:443", UID: new(int64(1000))})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(e.Upstream, e.Rule)
	for _, cond := range e.Conditions {
		fmt.Println(cond.Rule, cond.Key, cond.Result, cond.Reason)
	}
	// Output:
	// eu default
	// rules[0] domain_suffix false example.com does not end in it
}

func ExampleClient_Stats() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	s, err := c.Stats(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(s.Total.FlowsTotal, s.DNS.Queries)
	// Output: 17 10
}

func ExampleClient_StatsCSV() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	data, err := c.StatsCSV(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, line := range strings.Split(string(data), "\n")[:4] {
		fmt.Println(line)
	}
	// Output:
	// scope,name,metric,value
	// daemon,,time,2026-03-01T12:00:00Z
	// daemon,,uptime_seconds,93784.5
	// total,,flows_active,2
}

func ExampleClient_QueryDNS() {
	fake, socket, stop := daemon()
	defer stop()
	fake.ExchangeFunc = func(query []byte) ([]byte, error) {
		var m dns.Msg
		if err := m.Unpack(query); err != nil {
			return nil, err
		}
		rr, err := dns.NewRR("example.com. 1 IN A 198.18.0.5")
		if err != nil {
			return nil, err
		}
		r := new(dns.Msg).SetReply(&m)
		r.Answer = []dns.RR{rr}
		return r.Pack()
	}
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	a, err := c.QueryDNS(ctx, client.DNSRequest{Name: "example.com", Type: "A"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(a.Rcode)
	for _, r := range a.Answers {
		fmt.Println(r.Name, r.TTL, r.Type, r.Data)
	}
	// Output:
	// NOERROR
	// example.com. 1 A 198.18.0.5
}

func ExampleClient_Reload() {
	fake, socket, stop := daemon()
	defer stop()
	fake.ReloadErr = config.Errors{{File: "config.json", Line: 3, Column: 9, Path: "$.pools.eu", Msg: "no such member"}}
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	err := c.Reload(ctx)
	if e, ok := errors.AsType[*client.Error](err); ok {
		fmt.Println(e.Code, e.Path)
		fmt.Println(e.Message)
	}
	// Output:
	// config_invalid $.pools.eu
	// config.json:3:9: $.pools.eu: no such member
}

func ExampleClient_Events() {
	_, socket, stop := daemon()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	// With a real daemon this goes on until ctx ends.
	stop()
	for _, err := range c.Events(ctx) {
		fmt.Println(errors.Is(err, client.ErrUnreachable))
	}
	// Output: true
}

func ExampleClient_Lease() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	lease, err := c.Lease(ctx, client.LeaseRequest{Proxies: []string{"socks5h://192.0.2.10:1080"}})
	if err != nil {
		log.Fatal(err)
	}
	defer lease.Close() // and so does the end of this process, however it comes
	fmt.Println(lease.Context, lease.Cgroup)
	// Output: lease-1 /sys/fs/cgroup/mprox/lease-1
}

func ExampleClient_Shutdown() {
	fake, socket, stop := daemon()
	stopped := make(chan struct{})
	fake.OnStop = func() {
		go func() {
			defer close(stopped)
			stop()
		}()
	}
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	fmt.Println(c.Shutdown(ctx))
	<-stopped
	_, err := c.Status(ctx)
	fmt.Println(errors.Is(err, client.ErrUnreachable))
	// Output:
	// <nil>
	// true
}

func ExampleClient_Alive() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	fmt.Println(c.Alive(ctx))
	// Output: <nil>
}

func ExampleClient_PID() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	pid, err := c.PID(ctx)
	fmt.Println(pid == os.Getpid(), err)
	// Output: true <nil>
}

func ExampleClient_Kill() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	if err := c.Alive(ctx); errors.Is(err, client.ErrSilent) {
		fmt.Println(c.Kill(ctx, 2*time.Second))
	}
	// Output:
}

func ExampleClient_OpenAPI() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	data, err := c.OpenAPI(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(strings.Split(string(data), "\n")[1])
	// Output: openapi: 3.0.3
}

func ExampleClient_DrainUpstream() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	if err := c.DrainUpstream(ctx, "paris"); err != nil {
		log.Fatal(err)
	}
	upstreams, err := c.Upstreams(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(upstreams[1].Name, upstreams[1].State)
	// Output: paris draining
}

func ExampleClient_DisableUpstream() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	if err := c.DisableUpstream(ctx, "paris"); err != nil {
		log.Fatal(err)
	}
	upstreams, err := c.Upstreams(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(upstreams[1].Name, upstreams[1].State)
	// Output: paris disabled
}

func ExampleClient_EnableUpstream() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	if err := c.EnableUpstream(ctx, "paris"); err != nil {
		log.Fatal(err)
	}
	upstreams, err := c.Upstreams(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(upstreams[1].Name, upstreams[1].State)
	// Output: paris enabled
}

func ExampleClient_TestUpstream() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	t, err := c.TestUpstream(ctx, "berlin", "")
	if err != nil {
		log.Fatal(err)
	}
	for _, s := range t.Steps {
		fmt.Println(s.Step, s.OK, s.Says)
	}
	// Output:
	// resolve true 203.0.113.10
	// connect true 203.0.113.10:1080
	// authentication false refused
}
