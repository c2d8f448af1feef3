// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
	"github.com/mutex-proxy/mutex/dialers"
	"github.com/mutex-proxy/mutex/policy"
)

// NotCaptured stands for the rule of what no context captures.
const NotCaptured = "not captured"

// Explain asks the rules of a configuration that need not be in force. Nothing is resolved, and there is no way through the kernel yet.
func Explain(cfg *config.Config, r control.ExplainRequest) (control.Explanation, error) {
	var whose []control.Condition
	if r.Context == "" {
		var spec policy.Spec
		for _, name := range slices.Sorted(maps.Keys(cfg.Contexts)) { // as Daemon.live
			who, err := buildSelection(cfg, name)
			if err != nil {
				return control.Explanation{}, config.Errors(locate(cfg, err))
			}
			spec.Contexts = append(spec.Contexts, policy.ContextSpec{
				Name: name, Mode: policyMode(cfg.Contexts[name].Mode), Select: who.chosen, Exclude: who.excluded,
			})
		}
		var done bool
		var err error
		if whose, done, err = chooseContext(&r, slices.Sorted(maps.Keys(cfg.Contexts)), policy.WhoseImagined(spec, factsOf(r))); err != nil || done {
			return uncaptured(whose), err
		}
	}
	if _, ok := cfg.Contexts[r.Context]; !ok {
		return control.Explanation{}, noContext(cfg, r.Context, "$.context")
	}
	ups, err := buildUpstreams(cfg, dialers.NewNet(dialers.NetConfig{}), nil)
	if err != nil {
		return control.Explanation{}, err
	}
	rules, err := buildRules(cfg, r.Context, ups, plain)
	if err != nil {
		return control.Explanation{}, config.Errors(locate(cfg, err))
	}
	x, err := explain(r.Context, rules, nil, r)
	x.Conditions = append(whose, x.Conditions...)
	return x, err
}

// whoseFlow chooses the context of a request that names none, and fills in what it leaves open about a process that exists; done when no context
// captures it. A process that does not exist is taken as the request describes it.
func (b backend) whoseFlow(ctx context.Context, r *control.ExplainRequest, out *[]control.Condition) (done bool, err error) {
	if r.PID != 0 {
		c, err := b.Whose(ctx, r.PID)
		if err == nil {
			*out = verdicts(c.Verdicts, "pid", strconv.Itoa(r.PID), c.Reason)
			r.Context = c.Context
			if r.UID == nil {
				r.UID = &c.UID
			}
			if r.GID == nil {
				r.GID = &c.GID
			}
			r.Exe, r.Cgroup = cmp.Or(r.Exe, c.Exe), cmp.Or(r.Cgroup, c.Cgroup)
			return c.Context == "", nil
		}
		if client.Code(err) != client.CodeNotFound {
			return false, err
		}
	}
	c, err := b.manager.WhoseImagined(factsOf(*r))
	if err != nil {
		return false, apiError(err)
	}
	var names []string
	for _, l := range b.live() {
		names = append(names, l.name)
	}
	*out, done, err = chooseContext(r, names, c)
	return done, err
}

// chooseContext puts the context that would capture what the request describes into it, and says why; done when there is none. Where nothing at
// all is said of the process and no context is global, the request is about the rules: those of the only context, or of the one called default.
func chooseContext(r *control.ExplainRequest, names []string, c policy.Capture) (why []control.Condition, done bool, err error) {
	who := described(*r)
	if who == "" && len(names) == 1 {
		r.Context = names[0]
		return nil, false, nil
	}
	var list []control.Verdict
	for _, v := range c.Verdicts {
		list = append(list, control.Verdict(v))
	}
	r.Context = c.Context
	if who != "" || r.Context != "" {
		return verdicts(list, "process", who, c.Reason), r.Context == "", nil
	}
	if !slices.Contains(names, defaultContext) {
		return nil, false, &control.Error{
			Code: client.CodeNotFound, Path: "$.context",
			Message: fmt.Sprintf("no context is global, and none is called %q: say whose flow it is by uid, gid, pid, exe or cgroup, or name the context", defaultContext),
		}
	}
	r.Context = defaultContext
	return []control.Condition{{
		Rule: "context " + defaultContext, Key: "process", Result: true, Reason: "nothing is said of the process, and no context is global",
	}}, false, nil
}

// verdicts shows what the contexts say about a process, or why none was asked.
func verdicts(list []control.Verdict, key, value, reason string) (out []control.Condition) {
	for _, v := range list {
		out = append(out, control.Condition{Rule: "context " + v.Context, Key: key, Value: value, Result: v.Matched, Reason: v.Reason})
	}
	if len(list) == 0 {
		out = append(out, control.Condition{Rule: "context", Key: key, Value: value, Reason: reason})
	}
	return out
}

// factsOf is the process that a request describes.
func factsOf(r control.ExplainRequest) policy.ProcessFacts {
	p := policy.ProcessFacts{PID: r.PID, Exe: r.Exe, Cgroup: r.Cgroup, NoUID: r.UID == nil, NoGID: r.GID == nil}
	if r.UID != nil {
		p.UID = uint32(*r.UID)
	}
	if r.GID != nil {
		p.GID = uint32(*r.GID)
	}
	if r.PID != 0 {
		p.Lineage = []int{r.PID}
	}
	return p
}

// described is what a request says of the process, "" if nothing.
func described(r control.ExplainRequest) string {
	var parts []string
	if r.PID != 0 {
		parts = append(parts, "pid "+strconv.Itoa(r.PID))
	}
	if r.UID != nil {
		parts = append(parts, fmt.Sprintf("uid %d", *r.UID))
	}
	if r.GID != nil {
		parts = append(parts, fmt.Sprintf("gid %d", *r.GID))
	}
	if r.Exe != "" {
		parts = append(parts, "exe "+r.Exe)
	}
	if r.Cgroup != "" {
		parts = append(parts, "cgroup "+r.Cgroup)
	}
	return strings.Join(parts, ", ")
}

// uncaptured explains what no context captures.
func uncaptured(whose []control.Condition) control.Explanation {
	return control.Explanation{Upstream: direct, Rule: NotCaptured, Conditions: whose}
}
