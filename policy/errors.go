// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"errors"
	"fmt"
)

// What callers branch on. The text around them is one line that names what is missing, or who is in the way, and what to do.
var (
	// ErrConflict: another instance, or someone else's marks, tables or priorities (exit 6).
	ErrConflict = errors.New("conflict")
	// ErrPrivilege: a capability is missing (exit 4).
	ErrPrivilege = errors.New("missing privilege")
	// ErrFeature: the kernel lacks something, or a file system is not there (exit 4).
	ErrFeature = errors.New("missing kernel feature")
	// ErrJournal: the journal cannot be read. Cleanup still removes what carries our marks.
	ErrJournal = errors.New("journal is damaged")
	// ErrClosed: the Manager is closed.
	ErrClosed = errors.New("policy manager is closed")
)

// DeviceGoneError says that a device that the Spec names does not exist. What is captured stays unreachable.
type DeviceGoneError struct {
	Device string
	Err    error
}

// Error implements error.
func (e *DeviceGoneError) Error() string { return fmt.Sprintf("device %s: %v", e.Device, e.Err) }

// Unwrap returns what the kernel said.
func (e *DeviceGoneError) Unwrap() error { return e.Err }
