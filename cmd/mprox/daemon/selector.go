// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"errors"
	"fmt"
	"os/user"
	"slices"
	"strconv"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/policy"
	"github.com/mutex-proxy/mutex/routing"
)

// selection is who a context captures beside its leases, and whom it leaves out.
type selection struct {
	chosen, excluded []policy.Selector
	guests, spared   []string // containers, by name or process
}

// buildSelection looks users up, and refuses what nothing implements: a selector that is ignored would leave traffic uncaptured. In mode
// global select has no effect, which config warns about.
func buildSelection(cfg *config.Config, name string) (selection, error) {
	c := cfg.Contexts[name]
	path := configPath("contexts", name)
	var out selection
	var errs []error
	build := func(key string, in []config.Selector, containers *[]string) []policy.Selector {
		var sels []policy.Selector
		for i, s := range in {
			if *containers = append(*containers, s.Container...); len(s.Container) > 0 {
				continue // alone in its entry
			}
			sel, err := buildSelector(fmt.Sprintf("%s.%s[%d]", path, key, i), s)
			errs = append(errs, err)
			sels = append(sels, sel)
		}
		return sels
	}
	out.chosen, out.excluded = build("select", c.Select, &out.guests), build("exclude", c.Exclude, &out.spared)
	if c.Mode == "gateway" && len(c.Select) == 0 {
		errs = append(errs, &routing.PathError{Path: path, Err: errors.New("select is missing: mode gateway captures whom it names by interface or source_cidr")})
	}
	if c.Mode == "global" {
		out.chosen = nil
	}
	return out, errors.Join(errs...)
}

// buildSelector turns one entry of select or exclude into the kernel's terms.
func buildSelector(path string, s config.Selector) (policy.Selector, error) {
	var errs []error
	refuse := func(key string, err error) {
		errs = append(errs, &routing.PathError{Path: path + "." + key, Err: err})
	}
	out := policy.Selector{Exes: slices.Clone(s.Exe), Scope: policyScope(s.Scope), UIDs: slices.Clone(s.UID), GIDs: slices.Clone(s.GID), Cgroups: slices.Clone(s.Cgroup), Units: slices.Clone(s.Unit), PIDs: slices.Clone(s.PID)}
	out.Interfaces, out.Sources = slices.Clone(s.Interface), slices.Clone(s.SourceCIDR)
	if slices.Contains(s.PID, 1) {
		refuse("pid", errors.New("all processes descend from process 1: that is mode global"))
	}
	for i, e := range s.Exe {
		if err := policy.CheckExe(e); err != nil {
			refuse(fmt.Sprintf("exe[%d]", i), err)
		}
	}
	if len(s.Exe) > 0 && out.Scope > policy.ScopeCurrent {
		refuse("scope", fmt.Errorf("%s goes with pid, not with exe: with exe say tree or current", out.Scope))
	}
	for i, u := range s.Unit {
		if err := policy.CheckUnit(u); err != nil {
			refuse(fmt.Sprintf("unit[%d]", i), err)
		}
	}
	var users []uint32
	for i, name := range s.User {
		uid, err := lookupUser(name)
		if err != nil {
			refuse(fmt.Sprintf("user[%d]", i), err)
			continue
		}
		users = append(users, uid)
	}
	if len(s.User) > 0 && len(errs) == 0 {
		if len(s.UID) > 0 { // both must match
			users = slices.DeleteFunc(users, func(u uint32) bool { return !slices.Contains(s.UID, u) })
			if len(users) == 0 {
				refuse("user", errors.New("none of the users has one of the uids: nobody would match"))
			}
		}
		out.UIDs = users
	}
	return out, errors.Join(errs...)
}

func policyScope(s string) policy.Scope {
	switch s {
	case "current":
		return policy.ScopeCurrent
	case "session":
		return policy.ScopeSession
	case "group":
		return policy.ScopeGroup
	}
	return policy.ScopeTree
}

// lookupUser reads /etc/passwd: the binary is static, so the directories behind NSS (LDAP) are not asked.
func lookupUser(name string) (uint32, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return 0, fmt.Errorf("%w: give the uid of a user who is not in /etc/passwd", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	return uint32(uid), err
}
