// SPDX-License-Identifier: GPL-3.0-or-later

package demo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// What the origin serves, at originV4 and originV6.
const (
	originName = "shop.example"
	sumHeader  = "X-Sha256"
	fileSize   = 1 << 20
	bannerPort = "2222"
	banner     = "220 origin speaks first\r\n"
	echoPort   = "7"
	closedPort = "9"
)

// origin is the far end of the demo's flows.
type origin struct {
	http *http.Server
	open []io.Closer
	wg   sync.WaitGroup
}

// startOrigin listens in the calling process's namespace.
func startOrigin(ctx context.Context) (*origin, error) {
	mux := http.NewServeMux()
	mux.HandleFunc("/file", func(w http.ResponseWriter, _ *http.Request) {
		body := pattern(fileSize)
		sum := sha256.Sum256(body)
		w.Header().Set(sumHeader, hex.EncodeToString(sum[:]))
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = w.Write(body)
	})
	mux.HandleFunc("/bulk", func(w http.ResponseWriter, _ *http.Request) {
		chunk := make([]byte, 256<<10)
		for {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	o := &origin{http: &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}}
	for _, host := range []string{hostOf(originV4), hostOf(originV6)} {
		if err := o.listen(ctx, host); err != nil {
			o.Close()
			return nil, err
		}
	}
	return o, nil
}

func (o *origin) listen(ctx context.Context, host string) error {
	var lc net.ListenConfig
	web, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, "80"))
	if err != nil {
		return err
	}
	o.wg.Go(func() { _ = o.http.Serve(web) })
	first, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, bannerPort))
	if err != nil {
		return err
	}
	o.open = append(o.open, first)
	o.wg.Go(func() { greet(first) })
	udp, err := lc.ListenPacket(ctx, "udp", net.JoinHostPort(host, echoPort))
	if err != nil {
		return err
	}
	o.open = append(o.open, udp)
	o.wg.Go(func() { echo(udp) })
	return nil
}

func greet(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, banner)
		c.Close()
	}
}

func echo(pc net.PacketConn) {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := pc.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = pc.WriteTo(buf[:n], from)
		}
	}
}

// Close ends the servers and waits for them.
func (o *origin) Close() {
	_ = o.http.Close()
	for _, c := range o.open {
		c.Close()
	}
	o.wg.Wait()
}
