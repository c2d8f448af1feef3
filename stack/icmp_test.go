// SPDX-License-Identifier: GPL-3.0-or-later

package stack

import (
	"bytes"
	"context"
	"encoding/binary"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"

	"github.com/mutex-proxy/mutex/flow"
	"github.com/mutex-proxy/mutex/tun"
)

// echoMessage makes the ICMP message of an echo request.
func echoMessage(v variant, seq uint16, payload []byte) []byte {
	b := append(make([]byte, 8), payload...)
	b[0] = 8
	sum := uint16(0)
	if v.v6 {
		b[0] = 128
		sum = pseudoSum(58, v.app(), v.dst(0).Addr(), len(b))
	}
	binary.BigEndian.PutUint16(b[4:], 77)
	binary.BigEndian.PutUint16(b[6:], seq)
	binary.BigEndian.PutUint16(b[2:], ^checksum.Checksum(b, sum))
	return b
}

func (v variant) icmp() byte {
	if v.v6 {
		return 58
	}
	return 1
}

func TestEcho(t *testing.T) {
	for _, v := range variants()[:2] {
		for _, size := range []int{0, 56, 1452, 9000} {
			t.Run(v.name, func(t *testing.T) {
				_, dev := startStack(t, &handler{echo: func(_ context.Context, src, dst netip.Addr) (bool, flow.Reason) {
					return src == v.app() && dst == v.dst(0).Addr(), flow.ReasonDrop
				}}, v.offload, nil)
				a := startApp(t, v, dev)
				payload := randomBytes(size)
				msg := echoMessage(v, 1, payload)
				if size <= 1452 {
					sendRaw(t, dev, tun.Header{}, ip(v.app(), v.dst(0).Addr(), v.icmp(), msg))
				} else {
					for _, f := range fragments(v, v.app(), v.dst(0).Addr(), msg, 1400, 9) {
						if v.v6 {
							f[40] = 58
						} else {
							f[9] = 1
							f[10], f[11] = 0, 0
							binary.BigEndian.PutUint16(f[10:], ^checksum.Checksum(f[:20], 0))
						}
						sendRaw(t, dev, tun.Header{}, f)
					}
				}
				// Of a large reply the first fragment must do; that it is put together right is TestUDPSizes' matter.
				a.packet(t, func(b []byte) bool {
					at := 20
					if v.v6 {
						at = 40
						if b[6] == 44 {
							at = 48
						}
					}
					return (b[at] == 0 || b[at] == 129) && b[at+5] == 77 && bytes.HasPrefix(payload, b[at+8:])
				})
			})
		}
	}
}

func TestEchoDead(t *testing.T) {
	for _, v := range variants()[:2] {
		t.Run(v.name, func(t *testing.T) {
			_, dev := startStack(t, &handler{}, v.offload, nil)
			a := startApp(t, v, dev)
			msg := echoMessage(v, 1, []byte("payload"))
			sendRaw(t, dev, tun.Header{}, ip(v.app(), v.dst(0).Addr(), v.icmp(), msg))
			a.packet(t, func(b []byte) bool {
				if v.v6 {
					return b[40] == 1 && b[41] == 3 && bytes.HasSuffix(b, msg)
				}
				return b[20] == 3 && b[21] == 1 && bytes.HasSuffix(b, msg)
			})
		})
	}
}

// TestEchoBounds: a repeated request is not asked again, a flood is cut, a wrong checksum and anything but a request gets nothing.
func TestEchoBounds(t *testing.T) {
	for _, v := range variants()[:2] {
		t.Run(v.name, func(t *testing.T) {
			answer := make(chan struct{})
			s, dev := startStack(t, &handler{echo: func(ctx context.Context, _, _ netip.Addr) (bool, flow.Reason) {
				select {
				case <-answer:
				case <-ctx.Done():
				}
				return false, flow.ReasonDrop
			}}, v.offload, nil)
			send := func(msg []byte) {
				sendRaw(t, dev, tun.Header{}, ip(v.app(), v.dst(0).Addr(), v.icmp(), msg))
			}
			broken := echoMessage(v, 0, []byte("x"))
			broken[8]++
			send(broken)
			reply := echoMessage(v, 0, nil)
			reply[0]++ // 9 and 129: not a request; the checksum is off by that too
			send(reply)
			send(echoMessage(v, 1, nil))
			send(echoMessage(v, 1, nil))
			for i := range uint16(2 * echoBurst) {
				send(echoMessage(v, 2+i, nil))
			}
			eventually(t, func() bool {
				d := s.Stats().Drops
				return d["echo_repeat"] == 1 && d["echo_limit"] > 0
			})
			s.echo.mu.Lock()
			n := len(s.echo.waiting)
			s.echo.mu.Unlock()
			if n > echoWaiting {
				t.Errorf("%d wait", n)
			}
			if s.Stats().PacketsOut != 0 {
				t.Error("something was answered")
			}
			close(answer)
			eventually(t, func() bool {
				s.echo.mu.Lock()
				defer s.echo.mu.Unlock()
				return len(s.echo.waiting) == 0
			})
		})
	}
}
