// SPDX-License-Identifier: GPL-3.0-or-later

package tun

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestExplain(t *testing.T) {
	for errno, want := range map[unix.Errno]error{
		unix.ENOENT: ErrNoDevice, unix.ENODEV: ErrNoDevice, unix.ENXIO: ErrNoDevice,
		unix.EPERM: ErrNoPermission, unix.EACCES: ErrNoPermission, unix.EBUSY: ErrBusy,
	} {
		err := explain("mprox0", errno)
		if !errors.Is(err, want) || !errors.Is(err, errno) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v: %v", errno, err)
		}
	}
	if err := explain("mprox0", unix.EINVAL); !errors.Is(err, unix.EINVAL) {
		t.Error(err)
	}
}
