// SPDX-License-Identifier: GPL-3.0-or-later

package client_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"log"

	"github.com/mutex-proxy/mutex/control/client"
)

func ExampleClient_AddContext() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	st, err := c.AddContext(ctx, client.ContextRequest{
		Name:    "work",
		Proxies: []string{"socks5h://192.0.2.10:1080"},
		Context: json.RawMessage(`{ "mode": "process", "select": [ { "uid": 1000 } ] }`),
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(st.Name, st.Mode, st.Enabled)
	// Output: work process true
}

func ExampleClient_RemoveContext() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	fmt.Println(c.RemoveContext(ctx, "default"))
	fmt.Println(client.Code(c.RemoveContext(ctx, "default")))
	// Output:
	// <nil>
	// not_found
}

func ExampleClient_DisableContext() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	if err := c.DisableContext(ctx, "default"); err != nil {
		log.Fatal(err)
	}
	list, err := c.Contexts(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(list[0].Name, list[0].Enabled)
	// Output: default false
}

func ExampleClient_EnableContext() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	if err := c.EnableContext(ctx, "default"); err != nil {
		log.Fatal(err)
	}
	list, err := c.Contexts(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(list[0].Name, list[0].Enabled)
	// Output: default true
}

func ExampleClient_Attach() {
	fake, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	// The shell with this PID, and whatever it starts.
	if err := c.Attach(ctx, "default", client.Selector{PID: []int{4242}, Scope: "tree"}); err != nil {
		log.Fatal(err)
	}
	fmt.Println(fake.Selectors())
	// Output: [{"pid":[4242],"scope":"tree"}]
}

func ExampleClient_Detach() {
	fake, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	nginx := client.Selector{Unit: []string{"nginx.service"}}
	for _, err := range []error{c.Attach(ctx, "default", nginx), c.Detach(ctx, "default", nginx)} {
		if err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(len(fake.Selectors()))
	// Output: 0
}

func ExampleClient_Process() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	for _, pid := range []int{77, 78} {
		p, err := c.Process(ctx, pid)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s: %q, %s\n", p.Name, p.Context, p.Reason)
	}
	// Output:
	// curl: "default", global: everything that no other context selects
	// curl: "", no context selects it
}

func ExampleClient_ShutdownClosed() {
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
	fmt.Println(c.ShutdownClosed(ctx))
	<-stopped
	_, err := c.Status(ctx)
	fmt.Println(errors.Is(err, client.ErrUnreachable))
	// Output:
	// <nil>
	// true
}

func ExampleClient_Apps() {
	_, socket, stop := daemon()
	defer stop()
	ctx, cancel := within()
	defer cancel()

	c := client.New(socket)
	defer c.Close()
	apps, err := c.Apps(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, a := range apps {
		if a.App.PID != 0 {
			fmt.Println(a.App.Exe, a.Flows)
		}
	}
	// Output:
	// /usr/bin/curl 1
}
