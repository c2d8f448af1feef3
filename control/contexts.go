// SPDX-License-Identifier: GPL-3.0-or-later

package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.uber.org/zap"

	"github.com/mutex-proxy/mutex/control/client"
)

// postContext makes a context. Who may call it may do everything, so its proxies may name files and its text anything a file may.
func postContext(c *call) (any, error) {
	r, err := decodeContext(c.body)
	if err != nil {
		return nil, err
	}
	if err := c.cfg.Backend.AddContext(c.ctx, r); err != nil {
		return nil, err
	}
	c.changed("context_added", r.Name, "context added")
	list := c.visible().Contexts
	i := slices.IndexFunc(list, func(s ContextStatus) bool { return s.Name == r.Name })
	if i < 0 {
		return nil, &Error{Code: client.CodeConflict, Message: fmt.Sprintf("context %q has been removed meanwhile", r.Name)}
	}
	return list[i], nil
}

// decodeContext reads the body of a request for a context, strictly.
func decodeContext(body []byte) (ContextRequest, error) {
	var r ContextRequest
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		if ute, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
			return r, badRequest("$."+ute.Field, "a JSON %s cannot be used here", ute.Value)
		}
		return r, badRequest("$", "the body is not a request for a context: %v", err)
	}
	switch {
	case d.More():
		return r, badRequest("$", "there is more after the request")
	case r.Name == "" || len(r.Name) > maxLeaseTag || strings.ContainsFunc(r.Name, notNameRune):
		return r, badRequest("$.name", "a name has 1 to %d letters, digits, - and _", maxLeaseTag)
	case len(r.Context) == 0 && len(r.Proxies) == 0:
		return r, badRequest("$.proxies", "give at least one proxy, or a context with a default")
	case len(r.Proxies) > maxProxies:
		return r, badRequest("$.proxies", "more than %d", maxProxies)
	}
	return r, nil
}

func deleteContext(c *call) (any, error) {
	name := c.r.PathValue("name")
	if err := noBody(c); err != nil {
		return nil, err
	}
	if err := c.cfg.Backend.RemoveContext(c.ctx, name); err != nil {
		return nil, err
	}
	c.changed("context_removed", name, "context removed")
	return nil, nil
}

func postContextState(on bool) func(*call) (any, error) {
	kind := map[bool]string{true: "enabled", false: "disabled"}[on]
	return func(c *call) (any, error) {
		name := c.r.PathValue("name")
		if err := noBody(c); err != nil {
			return nil, err
		}
		if err := c.cfg.Backend.EnableContext(c.ctx, name, on); err != nil {
			return nil, err
		}
		c.changed("context_"+kind, name, "context "+kind)
		return nil, nil
	}
}

func postSelector(kind string, do func(Backend, context.Context, string, []byte) error) func(*call) (any, error) {
	return func(c *call) (any, error) {
		name := c.r.PathValue("name")
		if err := do(c.cfg.Backend, c.ctx, name, c.body); err != nil {
			return nil, err
		}
		var text bytes.Buffer
		_ = json.Compact(&text, c.body) // it has just been parsed; with comments it stays empty
		c.changed("selector_"+kind, name, text.String())
		return nil, nil
	}
}

// changed tells the log and those who watch.
func (c *call) changed(kind, name, what string) {
	c.audit(strings.ReplaceAll(kind, "_", " "), zap.String("context", name), zap.String("what", what))
	c.Publish(Event{Kind: kind, Context: name, UID: int64(c.peer.UID), Message: what})
}

func getProcess(c *call) (any, error) {
	text := c.r.PathValue("pid")
	pid, err := strconv.ParseUint(text, 10, 31)
	if err != nil || pid == 0 {
		return nil, badRequest("pid", "%q is not a process id", text)
	}
	out, err := c.cfg.Backend.Whose(c.ctx, int(pid))
	if err != nil {
		return nil, err
	}
	out.Verdicts = orEmpty(out.Verdicts)
	return out, nil
}
