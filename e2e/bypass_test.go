// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestBypass goes around the proxy by process, address, port and network, each beside something that does not.
func TestBypass(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	s := l.Dante(t, 1080, true)
	m := l.Mprox(t)
	with := func(bypass string) string { return globalConfig(s, `"bypass": { `+bypass+` },`) }
	m.UpConfig(with(`"process": "curl"`))
	// What the origin says to a connection by curl, and by another program.
	greeting := func(program string, v6 bool) string {
		if program == "curl" {
			return mustCurl(t, l, originURL(v6, "/"))
		}
		script := fmt.Sprintf(`import urllib.request; print(urllib.request.urlopen(%q, timeout=10).read().decode())`, originURL(v6, "/"))
		return lab.Exec(t, l.Client.Command("python3", "-c", script)).Stdout
	}
	type who struct {
		program string
		v6      bool
	}
	for _, tt := range []struct {
		bypass string
		direct map[who]bool
	}{
		{`"process": "curl"`, map[who]bool{{"curl", false}: true, {"curl", true}: true}},
		{`"address": "198.51.100.80"`, map[who]bool{{"curl", false}: true, {"python3", false}: true}},
		{`"address": "2001:db8:3::/64"`, map[who]bool{{"curl", true}: true, {"python3", true}: true}},
		{`"address": ["private", "local"], "port": 81, "network": "icmp"`, nil},
		{`"port": "79-80"`, map[who]bool{{"curl", false}: true, {"python3", false}: true, {"curl", true}: true, {"python3", true}: true}},
		{`"network": "tcp"`, map[who]bool{{"curl", false}: true, {"python3", false}: true, {"curl", true}: true, {"python3", true}: true}},
		{`"process": ["python3.11", "nobody"], "network": "udp"`, map[who]bool{{"python3", false}: true, {"python3", true}: true}},
	} {
		bypass := strings.ReplaceAll(tt.bypass, "python3.11", pythonName(t, l))
		m.WriteConfig(with(bypass))
		must(t, m, "reload")
		for _, w := range []who{{"curl", false}, {"curl", true}, {"python3", false}, {"python3", true}} {
			got := greeting(w.program, w.v6)
			if !strings.Contains(got, "hello ") || fromProxy(got) == tt.direct[w] {
				t.Errorf("bypass %s: %+v: %q", bypass, w, got)
			}
		}
	}
	m.WriteConfig(with(`"protocol": "http"`))
	if r := m.CLI("reload"); r.Code == 0 || !strings.Contains(r.Stderr, "bypass.protocol") {
		t.Errorf("bypass by protocol, which is not supported yet: %v", r)
	}
}

// pythonName is the file name of python3's executable.
func pythonName(t *testing.T, l *lab.Lab) string {
	t.Helper()
	out, err := l.Client.Output(t.Context(), "python3", "-c", "import os, sys; print(os.path.basename(os.path.realpath(sys.executable)))")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}
