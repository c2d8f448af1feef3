// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"cmp"
	"slices"

	"github.com/mutex-proxy/mutex/control/client"
)

// getApps adds up the caller's live flows by process; those whose process is not known are one.
func getApps(c *call) (any, error) { return appsOf(c.visibleFlows()), nil }

func appsOf(flows []Flow) []client.AppUsage {
	out := []client.AppUsage{}
	at := map[client.App]int{}
	for i := range flows {
		f := &flows[i]
		n, ok := at[f.App]
		if !ok {
			n = len(out)
			at[f.App] = n
			out = append(out, client.AppUsage{App: f.App})
		}
		out[n].Flows++
		out[n].BytesUp += f.BytesUp
		out[n].BytesDown += f.BytesDown
	}
	slices.SortStableFunc(out, func(a, b client.AppUsage) int {
		return cmp.Or(cmp.Compare(b.BytesUp+b.BytesDown, a.BytesUp+a.BytesDown), cmp.Compare(b.Flows, a.Flows), cmp.Compare(a.App.PID, b.App.PID))
	})
	return out
}
