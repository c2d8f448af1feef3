// SPDX-License-Identifier: GPL-3.0-or-later

package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

// bulkTime is how long the throughput figure is taken over: long enough for TCP to reach its pace, short enough for a demo.
const bulkTime = 2 * time.Second

// Client runs one of the client's sets of checks (checks, bulk, blocked) and writes one JSON line a check. It is an ordinary program: what it
// does is captured because of the namespace it runs in.
func Client(ctx context.Context, set string) error {
	switch set {
	case "checks":
		return runClient(ctx, os.Stdout, clientChecks())
	case "bulk":
		return runClient(ctx, os.Stdout, []check{{"download, one connection", bulk}})
	case "blocked":
		return runClient(ctx, os.Stdout, blockedChecks())
	}
	return fmt.Errorf("demo: no set of checks is called %q", set)
}

// bulk downloads by name for bulkTime.
func bulk(ctx context.Context) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+originName+"/bulk", nil)
	if err != nil {
		return "", err
	}
	tr := &http.Transport{DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	begin := time.Now()
	buf := make([]byte, 256<<10)
	var n int64
	for time.Since(begin) < bulkTime {
		m, err := resp.Body.Read(buf)
		n += int64(m)
		if err != nil {
			return "", errors.Join(err, io.ErrUnexpectedEOF)
		}
	}
	took := time.Since(begin)
	return fmt.Sprintf("%.1f Gbit/s, %d MiB (client, engine, proxy and origin share this machine)", float64(n)*8/1e9/took.Seconds(), n>>20), nil
}
