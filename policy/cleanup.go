// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Report says what Cleanup did.
type Report struct {
	Removed []string // one line an object
	Skipped string   // why nothing was done: the owner lives, or the journal is of another network namespace
}

// Cleanup removes, without a daemon, what a crash of the instance left behind, and restores the sysctls. It does nothing when the owner of
// the journal lives. A damaged journal is an error (ErrJournal), after everything that carries our marks has been removed.
func Cleanup(ctx context.Context, cfg Config, in Instance) (Report, error) {
	cfg = cfg.withDefaults()
	l, err := lockInstance(cfg.LockDir, in, cfg.Host.Netns())
	if errors.Is(err, ErrConflict) {
		return Report{Skipped: strings.TrimPrefix(err.Error(), ErrConflict.Error()+": ")}, nil
	}
	if err != nil {
		return Report{}, err
	}
	defer l.close()
	j, err := readJournal(in.Journal)
	switch {
	case err == nil && j.Netns.Boot != cfg.Host.Netns().Boot:
		return Report{Removed: []string{"journal of an earlier boot"}}, os.Remove(in.Journal)
	case err == nil && j.Netns != cfg.Host.Netns():
		return Report{Skipped: fmt.Sprintf("%s is of network namespace %d, this is %d: run it there (nsenter, ip netns exec)",
			in.Journal, j.Netns.Inode, cfg.Host.Netns().Inode)}, nil
	case err == nil:
		t := teardown{host: cfg.Host, log: cfg.Log, journal: j}
		if err := t.run(ctx); err != nil {
			return Report{Removed: t.removed}, err
		}
		return Report{Removed: t.removed}, os.Remove(in.Journal)
	case in.Run && errors.Is(err, os.ErrNotExist):
		return Report{}, nil
	case !errors.Is(err, os.ErrNotExist) && !errors.Is(err, ErrJournal):
		return Report{}, err
	}
	r, serr := sweep(ctx, cfg, in, l)
	if errors.Is(err, os.ErrNotExist) {
		return r, serr
	}
	if serr == nil {
		serr = os.Rename(in.Journal, in.Journal+".damaged")
	}
	return r, errors.Join(err, serr)
}

// sweep removes what carries our protocol number and name where no journal says what was changed: the blocks of all slots that nobody holds,
// at their default places.
func sweep(ctx context.Context, cfg Config, in Instance, l *locks) (Report, error) {
	j := newJournal(Spec{Instance: in}.withDefaults(), cfg.Host.Netns())
	taken := otherSlots(in.Journal, cfg.Host.Netns())
	mode := ModeCgroup
	if !in.Run {
		mode = ModeGlobal // one of them owns the rules of the global block, whichever it was
	}
	for slot := range MaxContexts {
		ok, err := l.slot(slot)
		if err != nil {
			return Report{}, err
		}
		if ok && !taken[slot] {
			j.Contexts = append(j.Contexts, journalContext{Name: fmt.Sprint(slot), Slot: slot, Mode: mode})
			mode = ModeCgroup
		}
	}
	t := teardown{host: cfg.Host, log: cfg.Log, journal: j}
	err := t.run(ctx)
	return Report{Removed: t.removed}, err
}

// otherSlots are those that journals of the namespace beside this one hold: survivors of a killed run are blocked by them.
func otherSlots(journal string, ns Netns) map[int]bool {
	taken := map[int]bool{}
	entries, err := os.ReadDir(filepath.Dir(journal))
	if err != nil {
		return taken
	}
	for _, e := range entries {
		file := filepath.Join(filepath.Dir(journal), e.Name())
		if file == journal || !strings.HasSuffix(file, "state.json") {
			continue
		}
		if j, err := readJournal(file); err == nil && j.Netns == ns {
			for _, c := range j.Contexts {
				taken[c.Slot] = true
			}
		}
	}
	return taken
}
