// SPDX-License-Identifier: GPL-3.0-or-later

package lab

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// FTP is an FTP server on the origin, port 21, both families, anonymous.
type FTP struct {
	Dir string // what it serves; file "big" is there, directory "in" takes uploads
	Sum [32]byte
}

// VSFTPD starts an FTP server that insists on PORT naming the client's own address, with a file of size random bytes.
func (l *Lab) VSFTPD(t *testing.T, size int) *FTP {
	t.Helper()
	dir := filepath.Join(l.Dir, "ftp")
	in := filepath.Join(dir, "in")
	empty := filepath.Join(l.Dir, "ftp-empty")
	for _, d := range []string{dir, in, empty} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(in, 0o777); err != nil { // past the umask
		t.Fatal(err)
	}
	if err := os.Chmod(l.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	big := make([]byte, size)
	_, _ = rand.Read(big)
	if err := os.WriteFile(filepath.Join(dir, "big"), big, 0o644); err != nil {
		t.Fatal(err)
	}
	conf := l.File("vsftpd.conf", fmt.Sprintf(`listen=NO
listen_ipv6=YES
background=NO
anonymous_enable=YES
local_enable=NO
write_enable=YES
anon_upload_enable=YES
anon_mkdir_write_enable=NO
anon_umask=022
no_anon_password=YES
anon_root=%s
secure_chroot_dir=%s
nopriv_user=nobody
connect_from_port_20=YES
port_promiscuous=NO
seccomp_sandbox=NO
xferlog_enable=NO
`, dir, empty))
	p := Start(t, "vsftpd", l.OriginNS.Command(program(t, "vsftpd"), conf))
	Eventually(t, 15*time.Second, "vsftpd listens", func() bool {
		if p.Exited() {
			t.Fatalf("vsftpd ended at once:\n%s", p.Log)
		}
		c, err := l.OriginNS.Dial("tcp", OriginV4.String()+":21", time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return &FTP{Dir: dir, Sum: sha256.Sum256(big)}
}

// Upload returns the checksum of a file that was uploaded into "in".
func (f *FTP) Upload(t *testing.T, name string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(f.Dir, "in", name))
	if err != nil {
		t.Error(err)
	}
	return sha256.Sum256(b)
}
