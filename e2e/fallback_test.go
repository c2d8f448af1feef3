// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// device is a TUN as `ip -d -j link` shows it.
type device struct {
	LinkInfo struct {
		Data struct {
			Header bool `json:"vnet_hdr"`
			Multi  bool `json:"multi_queue"`
			Queues int  `json:"numqueues"`
		} `json:"info_data"`
	} `json:"linkinfo"`
}

// TestFallbacks does the main job on a device without each of the techniques that make it fast: as on an old kernel, or one that has less.
// `make fallbacks` runs the whole of the main job's tests under each.
func TestFallbacks(t *testing.T) {
	for _, c := range []struct {
		tun    string
		device string // what the device must be
		train  int    // the most bytes that one packet of an upload has
	}{
		{`"offloads": "no-uso"`, "header", 65535},
		{`"offloads": "none"`, "header", 1500},
		{`"offloads": "no-header"`, "", 1500},
		{`"queues": 4`, "header queues", 65535},
	} {
		t.Run(c.tun, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t, lab.Options{})
			l.Unbound(t)
			s := l.Dante(t, 1080, false)
			m := l.Mprox(t)
			m.UpConfig(fmt.Sprintf(`{ "upstreams": { "p": { "url": %q } }, "contexts": { "default": { "mode": "global", "default": "p", "offload": "off",
  "dns": { "mode": "fakeip" }, "tun": { "name": "mprox0", %s } } } }`, strings.Replace(s.URL(), "socks5:", "socks5h:", 1), c.tun))
			if got := deviceKind(t, l, "mprox0"); got != c.device {
				t.Errorf("the device is %q, want %q", got, c.device)
			}
			packets := sentPackets(t, l, "mprox0")
			tcpUpload(t, l, lab.OriginV4)
			if mean := bulk / float64(sentPackets(t, l, "mprox0")-packets); mean > float64(c.train) {
				t.Errorf("packets of the upload have %.0f bytes, want %d at most", mean, c.train)
			} else if c.train > 1500 && mean < 1500 {
				t.Errorf("packets of the upload have %.0f bytes: no trains", mean)
			}
			for _, a := range []netip.Addr{lab.OriginV4, lab.OriginV6} {
				tcpHalfClose(t, l, a, true)
				tcpBanner(t, l, a)
				tcpReset(t, l, a)
				udpTrain(t, l, a)
				if r := ping(t, l, a.String(), "-c", "1", "-s", "4000", "-W", "8"); r.Code != 0 {
					t.Errorf("ping: %v", r)
				}
			}
			tcpBulk(t, l, lab.OriginV4)
			tcpBulk(t, l, lab.OriginV6)
			tcpRefused(t, l, s)
			tcpNames(t, l)
			udpSizes(t, l, m)
		})
	}
}

func deviceKind(t *testing.T, l *lab.Lab, name string) string {
	t.Helper()
	r := lab.Exec(t, l.Client.Command("ip", "-d", "-j", "link", "show", name))
	var d []device
	if err := json.Unmarshal([]byte(r.Stdout), &d); err != nil || len(d) != 1 {
		t.Fatalf("%v: %v", err, r)
	}
	var kind []string
	if d[0].LinkInfo.Data.Header {
		kind = append(kind, "header")
	}
	if d[0].LinkInfo.Data.Multi {
		kind = append(kind, "queues")
	}
	return strings.Join(kind, " ")
}

// tcpUpload sends bulk bytes, and learns that they have come.
func tcpUpload(t *testing.T, l *lab.Lab, a netip.Addr) {
	t.Helper()
	c := dialOrigin(t, l, a, lab.PortCount)
	if _, err := io.Copy(c, lab.DataReader(bulk)); err != nil {
		t.Error(err)
	}
	_ = c.CloseWrite()
	if b, err := io.ReadAll(c); string(b) != fmt.Sprintf("%d\n", bulk) || err != nil {
		t.Errorf("upload: %q %v", b, err)
	}
}

// sentPackets is how many packets the kernel has given to the device; a train is one.
func sentPackets(t *testing.T, l *lab.Lab, name string) int {
	t.Helper()
	r := lab.Exec(t, l.Client.Command("cat", "/proc/net/dev"))
	_, line, _ := strings.Cut(r.Stdout, name+":")
	f := strings.Fields(line)
	if len(f) < 10 {
		t.Fatalf("no %s: %v", name, r)
	}
	n, err := strconv.Atoi(f[9])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// udpTrain sends a train of datagrams as one (UDP_SEGMENT): the kernel splits it, or we do; each is answered.
func udpTrain(t *testing.T, l *lab.Lab, a netip.Addr) {
	t.Helper()
	const size, n = 1000, 12
	c := udpSocket(t, l, a)
	ofSocket(t, c, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, size) })
	seen := map[string]bool{}
	buf := make([]byte, 1<<16)
	for try := 0; try < 3 && len(seen) < n; try++ { // loss is not an error of UDP
		if _, err := c.WriteToUDPAddrPort(lab.Block(size*n), netip.AddrPortFrom(a, lab.PortEcho)); err != nil {
			t.Fatal(err)
		}
		for range n {
			_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
			k, _, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				break
			}
			seen[string(buf[:k])] = true
		}
	}
	for i := range n {
		if !seen[string(lab.Block(size * n)[i*size:(i+1)*size])] {
			t.Errorf("%v: datagram %d of a train did not come back", a, i)
		}
	}
	if len(seen) > n {
		t.Errorf("%v: %d different datagrams came back of %d", a, len(seen), n)
	}
}
