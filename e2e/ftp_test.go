// SPDX-License-Identifier: GPL-3.0-or-later

package e2e

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mutex-proxy/mutex/e2e/lab"
)

// TestFTPActive lists, downloads and uploads in active mode, through BIND at real servers, over PORT and EPRT; and shows that without the rule
// the client learns at once that active mode is not to be had, and that passive mode is not touched.
func TestFTPActive(t *testing.T) {
	t.Parallel()
	l := lab.New(t, lab.Options{})
	const size = 5 << 20
	l.Unbound(t)
	ftp := l.VSFTPD(t, size)
	l.Dante(t, 1080, false)
	serveOwn(t, l, 1081)
	for i, c := range []struct {
		name, url string
		origin    string
	}{
		{"dante", "socks5://203.0.113.10:1080", lab.OriginV4.String()},
		{"dante-socks4", "socks4://203.0.113.10:1080", lab.OriginV4.String()},
		{"dante-name", "socks5h://203.0.113.10:1080", "v4.example.test"},
		{"dante-both", "socks5h://203.0.113.10:1080", "www.example.test"},
		{"dante-auto", "auto://203.0.113.10:1080", "www.example.test"},
		{"serve", "socks5h://203.0.113.10:1081", lab.OriginV4.String()},
		{"serve-name", "socks4a://203.0.113.10:1081", "www.example.test"},
		{"serve-both", "socks5h://203.0.113.10:1081", "www.example.test"},
		{"serve-v6", "socks5h://203.0.113.10:1081", "[" + lab.OriginV6.String() + "]"},
		{"pool", "pool", lab.OriginV4.String()},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := l.Mprox(t)
			m.UpConfig(ftpConfig(c.url, "active"))
			defer m.Stop()
			base := "ftp://" + c.origin
			// curl prefers EPRT; --disable-eprt makes it PORT.
			for _, args := range [][]string{{}, {"--disable-eprt"}} {
				if strings.HasPrefix(c.origin, "[") && len(args) > 0 {
					continue // PORT has no IPv6
				}
				active := append([]string{"--ftp-port", "-"}, args...)
				if out := mustCurl(t, l, append(active, base+"/")...); !strings.Contains(out, "big") {
					t.Errorf("list: %q", out)
				}
				file := filepath.Join(l.Dir, fmt.Sprintf("down-%d-%d", i, len(args)))
				mustCurl(t, l, append(active, "-o", file, base+"/big")...)
				b, err := os.ReadFile(file)
				if err != nil || sha256.Sum256(b) != ftp.Sum {
					t.Errorf("downloaded %d bytes of %d: %v", len(b), size, err)
				}
				name := fmt.Sprintf("up-%d-%d", i, len(args))
				mustCurl(t, l, append(active, "-T", file, base+"/in/"+name)...)
				if ftp.Upload(t, name) != ftp.Sum {
					t.Error("the upload is not what was sent")
				}
			}
			mustCurl(t, l, "-o", "/dev/null", base+"/big") // passive
			if r := lab.Exec(t, l.Client.Command("lftp", "-c", "set ftp:passive-mode off; set net:max-retries 1; set net:timeout 10; open "+base+"; ls; get /big -o "+filepath.Join(l.Dir, fmt.Sprintf("lftp-%d", i)))); r.Code != 0 || !strings.Contains(r.Stdout, "big") {
				t.Errorf("lftp: %v", r)
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		m := l.Mprox(t)
		m.UpConfig(ftpConfig("socks5://203.0.113.10:1080", "refuse"))
		defer m.Stop()
		base := "ftp://" + lab.OriginV4.String()
		if r := curl(t, l, "--ftp-port", "-", base+"/big"); r.Code != 30 { // CURLE_FTP_PORT_FAILED
			t.Errorf("active: %v", r)
		}
		mustCurl(t, l, "-o", "/dev/null", base+"/big")
	})
	t.Run("no BIND", func(t *testing.T) {
		micro := l.Microsocks(t, 1082)
		m := l.Mprox(t)
		m.UpConfig(ftpConfig(micro.URL(), "active"))
		defer m.Stop()
		if r := curl(t, l, "--ftp-port", "-", "ftp://"+lab.OriginV4.String()+"/big"); r.Code != 30 {
			t.Errorf("active: %v", r)
		}
	})
}

// ftpConfig captures everything, with active mode as given on port 21. As "pool", two servers take turns.
func ftpConfig(url, mode string) string {
	ups := fmt.Sprintf(`"up": {"url": %q}`, url)
	pools := ""
	if url == "pool" {
		ups = `"a": {"url": "socks5://203.0.113.10:1080"}, "b": {"url": "socks5://203.0.113.10:1081"}`
		pools = `"pools": {"up": {"members": ["a", "b"], "strategy": "round-robin"}},`
	}
	return fmt.Sprintf(`{"upstreams": {%s}, %s "contexts": {"default": {"mode": "global", "default": "up",
		"rules": [{"port": 21, "upstream": "up", "ftp": %q}]}}}`, ups, pools, mode)
}
