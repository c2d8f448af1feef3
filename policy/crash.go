// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
)

// opening is what the lock says while a watcher works: whoever starts then waits for it.
const opening = "opening after a crash"

// staysClosed is the part of a Spec that a crash leaves closed; nil when that is all of it.
func staysClosed(s Spec) *Spec {
	out := closedSpec(s)
	out.Contexts = slices.DeleteFunc(out.Contexts, func(c ContextSpec) bool { return c.OnCrash == OnEndOpen })
	if len(out.Contexts) == len(s.Contexts) {
		return nil
	}
	return &out
}

// sameClosed compares what the journal says with what it should say.
func sameClosed(a, b *Spec) bool {
	return a == nil && b == nil || a != nil && b != nil && reflect.DeepEqual(*a, *b)
}

// OpenAfterCrash lets go what the contexts with OnCrash OnEndOpen of a dead instance have captured; what others have stays closed. It does
// nothing when the instance lives, or lives again, and when it has ended in order. The watcher of a daemon calls it, which outlives it.
func OpenAfterCrash(ctx context.Context, cfg Config, in Instance) error {
	cfg = cfg.withDefaults()
	in.opening = true
	l, err := lockInstance(cfg.LockDir, in, cfg.Host.Netns())
	if errors.Is(err, ErrConflict) {
		return nil
	}
	if err != nil {
		return err
	}
	j, err := readJournal(in.Journal)
	if err != nil || j.Netns != cfg.Host.Netns() || j.Reopen == nil {
		l.close()
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	if len(j.Reopen.Contexts) == 0 {
		defer l.close()
		t := teardown{host: cfg.Host, log: cfg.Log, journal: j}
		if err := t.run(ctx); err != nil {
			return err
		}
		return os.Remove(in.Journal)
	}
	l.close()
	m := NewManager(cfg)
	spec := *j.Reopen
	spec.Instance = in
	if err := m.Prepare(ctx, spec); err != nil {
		if errors.Is(err, ErrConflict) {
			return nil // a new daemon was faster, and has adopted everything
		}
		return err
	}
	return m.Close(ctx, StopBlock)
}

// GuardState is what an instance has closed, with or without a daemon.
type GuardState struct {
	Instance Instance
	Owner    string // who holds the instance's lock; "" = nobody, it is dead or has never been
	Contexts []GuardContext
	Tables   []string // nftables of ours that are there
	Rules    int      // ip rules and routes of ours
	Routes   int
	Dropped  uint64 // packets, since the tables were made
	Other    string // why nothing of it is here: the journal is of another network namespace or boot
}

// GuardContext is one context in the journal.
type GuardContext struct {
	Name string
	Mode Mode
	Slot int
	Open bool // a crash opens it
}

// Active reports whether anything is closed.
func (s *GuardState) Active() bool { return len(s.Contexts) > 0 && len(s.Tables) > 0 }

// Guard reads what an instance has closed. It changes nothing.
func Guard(ctx context.Context, cfg Config, in Instance) (GuardState, error) {
	cfg = cfg.withDefaults()
	out := GuardState{Instance: in}
	l, err := lockInstance(cfg.LockDir, in, cfg.Host.Netns())
	if errors.Is(err, ErrConflict) {
		out.Owner = lockHolder(in, cfg)
	} else if err != nil {
		return out, err
	} else {
		defer l.close()
	}
	j, err := readJournal(in.Journal)
	switch {
	case errors.Is(err, os.ErrNotExist):
		j = newJournal(Spec{Instance: in}.withDefaults(), cfg.Host.Netns())
	case err != nil:
		return out, err
	case j.Netns != cfg.Host.Netns():
		out.Other = fmt.Sprintf("%s is of network namespace %d, this is %d, or of an earlier boot", in.Journal, j.Netns.Inode, cfg.Host.Netns().Inode)
		return out, nil
	}
	for _, c := range j.Contexts {
		open := j.Reopen != nil && !slices.ContainsFunc(j.Reopen.Contexts, inSlot(c.Slot))
		out.Contexts = append(out.Contexts, GuardContext{Name: c.Name, Mode: c.Mode, Slot: c.Slot, Open: open})
	}
	snap, err := cfg.Host.Snapshot(ctx, j.TableBase)
	if err != nil {
		return out, err
	}
	own := ownsOf(j.spec())
	for _, r := range snap.Rules {
		if own.rule(r) {
			out.Rules++
		}
	}
	for _, r := range snap.Routes {
		if own.route(r) {
			out.Routes++
		}
	}
	there, err := cfg.Host.NFTables(j.NFT)
	if err != nil {
		return out, err
	}
	for _, name := range tableNames(j.NFT) {
		if _, ok := there[name]; !ok {
			continue
		}
		out.Tables = append(out.Tables, name)
		if n, err := cfg.Host.NFCounter(name, guardCounter); err == nil {
			out.Dropped += n
		}
	}
	return out, nil
}

// lockHolder reads who has an instance's lock, without waiting for it.
func lockHolder(in Instance, cfg Config) string {
	for _, name := range []string{in.Journal + ".lock", daemonLock(cfg.LockDir, cfg.Host.Netns())} {
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		who := holder(f)
		f.Close()
		return who
	}
	return "starting"
}
