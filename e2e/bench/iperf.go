// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Bulk TCP is iperf3's. Where the load itself is to ask the SOCKS5 server, proxychains makes it: it replaces connect, and stays out of the
// way of the data.

// startIperf starts the server, which serves one client at a time, and writes the configuration of proxychains.
func (l *lab) startIperf() error {
	p, err := l.spawn(l.far, nil, "iperf3", "-s", "-p", strconv.Itoa(portIperf))
	if err != nil {
		return err
	}
	l.servers = append(l.servers, p)
	conf := fmt.Sprintf("strict_chain\nquiet_mode\ntcp_connect_time_out 8000\ntcp_read_time_out 15000\n[ProxyList]\nsocks5 %s %d\n", proxyV4, socksPort)
	return os.WriteFile(l.proxychains(), []byte(conf), 0o600)
}

func (l *lab) proxychains() string { return filepath.Join(l.dir, "proxychains.conf") }

// iperf is what iperf3 -J prints, as far as we need it. Bytes are those that have arrived.
type iperf struct {
	Error string `json:"error"`
	End   struct {
		Streams []struct {
			Receiver struct {
				Bytes float64 `json:"bytes"`
			} `json:"receiver"`
		} `json:"streams"`
		Received struct {
			Bytes   float64 `json:"bytes"`
			Seconds float64 `json:"seconds"`
		} `json:"sum_received"`
	} `json:"end"`
}

// bulk moves as much as the subject can, up or down, over a number of connections. The server may be busy with the end of the last test, and
// does not listen for a moment after it.
func (l *lab) bulk(ctx context.Context, s *subject, spec loadSpec) (r loadResult, err error) {
	uerr := until(startTimeout, "iperf3's server is free", func() bool {
		if err = l.listening(originV4, portIperf); err != nil {
			return true
		}
		r, err = l.bulkOnce(ctx, s, spec)
		return !errors.Is(err, errBusy)
	})
	return r, errors.Join(err, uerr)
}

var errBusy = errors.New("the server is busy")

func (l *lab) bulkOnce(ctx context.Context, s *subject, spec loadSpec) (loadResult, error) {
	var args []string
	if s.socks != "" {
		args = append(args, "proxychains4", "-q", "-f", l.proxychains())
	}
	args = append(args, "iperf3", "-c", originOf(spec.V6).String(), "-p", strconv.Itoa(portIperf), "-J",
		"-t", strconv.Itoa(int(math.Ceil(spec.Seconds))), "-P", strconv.Itoa(spec.Streams), "-l", strconv.Itoa(bulkBuffer))
	if spec.Kind == kindDown {
		args = append(args, "-R")
	}
	cmd := inNS(s.ns, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		return loadResult{}, err
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	werr := cmd.Wait()
	r, err := parseIperf(stdout.Bytes())
	if err = errors.Join(werr, err); err != nil {
		return r, fmt.Errorf("iperf3 through %s: %w: %s", s.name, err, stderr.Bytes())
	}
	return r, nil
}

func parseIperf(b []byte) (loadResult, error) {
	var out iperf
	if err := json.Unmarshal(b, &out); err != nil {
		return loadResult{}, err
	}
	if strings.Contains(out.Error, errBusy.Error()) {
		return loadResult{}, errBusy
	}
	if out.Error != "" {
		return loadResult{}, errors.New(out.Error)
	}
	r := loadResult{Seconds: out.End.Received.Seconds, Bytes: uint64(out.End.Received.Bytes)}
	if r.Seconds <= 0 {
		return r, errors.New("nothing was measured")
	}
	for _, s := range out.End.Streams {
		r.Streams = append(r.Streams, s.Receiver.Bytes)
	}
	return r, nil
}
