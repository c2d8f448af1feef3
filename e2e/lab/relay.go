// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/mutex-proxy/mutex/e2e/delay"
)

// newRelay joins two namespaces by a pair of TUN devices of the same name between which every packet takes its time, and a fraction of them
// is lost.
func newRelay(t *testing.T, a, b *NS, name string, oneWay time.Duration, loss float64, configure func() error) error {
	t.Helper()
	var ends []*os.File
	for _, n := range []*NS{a, b} {
		err := n.Do(func() error {
			f, err := delay.OpenTUN(name, false)
			if err == nil {
				ends = append(ends, f)
			}
			return err
		})
		if err != nil {
			for _, f := range ends {
				f.Close()
			}
			return err
		}
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		for _, f := range ends {
			f.Close()
		}
		wg.Wait()
	})
	if err := errors.Join(configure(), a.ip("link set "+name+" txqueuelen 10000"), b.ip("link set "+name+" txqueuelen 10000")); err != nil {
		return err
	}
	wg.Go(func() { delay.Link{Delay: oneWay, Loss: loss}.Join(ends[0], ends[1]) })
	return nil
}
