// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control/client"
)

func badRequest(path, format string, args ...any) error {
	return &Error{Code: client.CodeBadRequest, Path: path, Message: fmt.Sprintf(format, args...)}
}

// statusOf is the HTTP status of an API code.
func statusOf(code string) int {
	switch code {
	case client.CodeBadRequest:
		return http.StatusBadRequest
	case client.CodeForbidden:
		return http.StatusForbidden
	case client.CodeNotFound:
		return http.StatusNotFound
	case client.CodeMethod:
		return http.StatusMethodNotAllowed
	case client.CodeConflict:
		return http.StatusConflict
	case client.CodeTooLarge:
		return http.StatusRequestEntityTooLarge
	case client.CodeTooMany:
		return http.StatusTooManyRequests
	case client.CodeConfigInvalid:
		return http.StatusUnprocessableEntity
	case client.CodeUnsupported:
		return http.StatusNotImplemented
	case client.CodeTimeout:
		return http.StatusGatewayTimeout
	case client.CodeUnavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// toError gives an error the shape of the API.
func toError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	if es, ok := errors.AsType[config.Errors](err); ok && len(es) > 0 {
		lines := make([]string, len(es))
		for i := range es {
			lines[i] = es[i].Error()
		}
		return &Error{Code: client.CodeConfigInvalid, Path: es[0].Path, Message: strings.Join(lines, "\n")}
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return &Error{Code: client.CodeTooLarge, Message: fmt.Sprintf("the request body is larger than %d bytes", maxBody)}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return &Error{Code: client.CodeTimeout, Message: "not finished in time: " + err.Error()}
	}
	return &Error{Code: client.CodeInternal, Message: err.Error()}
}

func writeError(w http.ResponseWriter, err error) {
	e := toError(err)
	// An Error holds strings only, which always encode.
	data, _ := json.Marshal(struct {
		Error *Error `json:"error"`
	}{e})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(statusOf(e.Code))
	_, _ = w.Write(append(data, '\n'))
}
