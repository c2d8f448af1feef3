// SPDX-License-Identifier: GPL-3.0-or-later

package dialers

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"

	"go.uber.org/zap"
)

// timedOut reports whether an error is a deadline that passed, of ours or of a socket.
func timedOut(err error) bool {
	var ne net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &ne) && ne.Timeout()
}

func logServer(ap netip.AddrPort) zap.Field { return zap.Stringer("server", ap) }

func logErr(err error) zap.Field { return zap.Error(err) }

// maxQuote bounds what an error repeats of a server's words.
const maxQuote = 120

// quote makes a server's words fit for an error: one line, printable ASCII, bounded, and with every one of the secrets (which a server may
// echo) replaced.
func quote(text string, secrets ...string) string {
	for _, s := range secrets {
		if s != "" {
			text = strings.ReplaceAll(text, s, redacted)
		}
	}
	var b strings.Builder
	for _, c := range []byte(strings.TrimSpace(text)) {
		if b.Len() >= maxQuote {
			b.WriteString("...")
			break
		}
		if c < ' ' || c >= 0x7f {
			c = '.'
		}
		b.WriteByte(c)
	}
	return b.String()
}
