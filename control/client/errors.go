// SPDX-License-Identifier: GPL-3.0-or-later

package client

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrUnreachable is wrapped by every error that means that no daemon answered on the socket.
var ErrUnreachable = errors.New("daemon not reachable")

// The codes of an API error. The set may grow: treat an unknown code as CodeInternal.
const (
	CodeBadRequest    = "bad_request"        // the request cannot be understood
	CodeForbidden     = "forbidden"          // the caller's uid and groups do not allow it
	CodeNotFound      = "not_found"          // no such flow, context, path
	CodeMethod        = "method_not_allowed" // the path exists, the method does not
	CodeConflict      = "conflict"           // a name, mark or table is taken
	CodeTooLarge      = "too_large"          // the request exceeds its limit
	CodeTooMany       = "too_many"           // a limit on leases, streams or connections is reached
	CodeConfigInvalid = "config_invalid"     // Path says where in the configuration
	CodePrivilege     = "privilege"          // the daemon lacks a privilege or a kernel feature
	CodeUnsupported   = "unsupported"        // a valid request that this daemon cannot serve
	CodeTimeout       = "timeout"            // the daemon did not finish in time
	CodeUnavailable   = "unavailable"        // the daemon is starting or stopping
	CodeInternal      = "internal"           // anything else
)

// Error is an error the daemon answered with: {"error":{"code","message","path"}}.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Path    string `json:"path"` // JSON path in the configuration or the request; "" when it does not apply
}

// Error returns the message, with the path in front when there is one that the message does not name itself.
func (e *Error) Error() string {
	if e.Path != "" && !strings.Contains(e.Message, e.Path+":") {
		return e.Path + ": " + e.Message
	}
	return e.Message
}

// Code returns the API code that err carries, "" if none.
func Code(err error) string {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return ""
}

// dialError turns a failed connect into ErrUnreachable and says which of the usual causes it was.
func dialError(socket string, err error) error {
	why := err
	switch {
	case errors.Is(err, fs.ErrNotExist):
		why = errors.New("there is no such socket")
	case errors.Is(err, unix.ECONNREFUSED):
		why = errors.New("nothing listens on it")
	case errors.Is(err, fs.ErrPermission):
		why = errors.New("permission denied")
	}
	return fmt.Errorf("%w at %s: %w", ErrUnreachable, socket, why)
}
