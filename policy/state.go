// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// journalVersion changes when an older cleanup could not undo what a newer one has written.
const journalVersion = 1

// maxJournal bounds what is read: 160 contexts with all their cgroups and 65,536 connections fit.
const maxJournal = 32 << 20

// cgroupPrefix starts the name of every cgroup directory that we make, so that a journal cannot make us remove anything else.
const cgroupPrefix = "mprox-"

// journal is state.json: what this instance changes in the kernel, written and synced before the change. Rules and routes are not listed
// one by one: they are all those with our protocol number in the blocks of the slots.
type journal struct {
	Version      int               `json:"version"`
	Socket       string            `json:"socket"`
	PID          int               `json:"pid"`
	Netns        Netns             `json:"netns"`
	Mask         uint32            `json:"mask"`
	TableBase    int               `json:"table_base"`
	RulePriority int               `json:"rule_priority"`
	NFT          string            `json:"nft"` // table; the redirects are in NFT-dns
	Contexts     []journalContext  `json:"contexts"`
	Sysctls      map[string]string `json:"sysctls,omitempty"` // values before us
	Cgroups      []string          `json:"cgroups,omitempty"` // made by us
	Moved        []movedProcess    `json:"moved,omitempty"`
	Sockets      Sockets           `json:"sockets"`
	Reopen       *Spec             `json:"reopen,omitempty"` // what stays closed after a crash, unless that is everything
	BPF          *journalBPF       `json:"bpf,omitempty"`
}

// journalContext is one slot in use.
type journalContext struct {
	Name    string      `json:"name"`
	Slot    int         `json:"slot"`
	Mode    Mode        `json:"mode"`
	Cgroups []CgroupRef `json:"cgroups,omitempty"`
}

// movedProcess is a process in a cgroup of ours that goes back where it was.
type movedProcess struct {
	PID  int    `json:"pid"`
	From string `json:"from"`
	To   string `json:"to"`
}

func newJournal(s Spec, id Netns) journal {
	return journal{
		Version: journalVersion, Socket: s.Instance.Socket, PID: os.Getpid(), Netns: id, Mask: s.Mask, TableBase: s.TableBase,
		RulePriority: s.RulePriority, NFT: s.Instance.tableName(), Sysctls: map[string]string{},
	}
}

// addContexts records the slots of a spec beside those that are there.
func (j *journal) addContexts(cs []ContextSpec) {
	for _, c := range cs {
		jc := journalContext{Name: c.Name, Slot: c.Slot, Mode: c.Mode, Cgroups: slices.Clone(c.Cgroups)}
		if i := slices.IndexFunc(j.Contexts, func(x journalContext) bool { return x.Slot == c.Slot }); i >= 0 {
			j.Contexts[i] = jc
		} else {
			j.Contexts = append(j.Contexts, jc)
		}
	}
}

// spec is a Spec that owns what the journal lists, without any device.
func (j *journal) spec() Spec {
	s := Spec{Instance: Instance{Socket: j.Socket}, Mask: j.Mask, TableBase: j.TableBase, RulePriority: j.RulePriority}
	for _, c := range j.Contexts {
		s.Contexts = append(s.Contexts, ContextSpec{Name: c.Name, Slot: c.Slot, Mode: c.Mode, Cgroups: c.Cgroups})
	}
	return s
}

// parseJournal reads what may have been cut off, edited or written by somebody else: nothing in it may make us touch what is not ours.
func parseJournal(b []byte) (journal, error) {
	var j journal
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&j); err != nil {
		return journal{}, fmt.Errorf("%w: %w", ErrJournal, err)
	}
	if d.More() {
		return journal{}, fmt.Errorf("%w: something follows it", ErrJournal)
	}
	if j.Version != journalVersion {
		return journal{}, fmt.Errorf("%w: version %d, this mprox writes version %d", ErrJournal, j.Version, journalVersion)
	}
	if err := j.check(); err != nil {
		return journal{}, fmt.Errorf("%w: %w", ErrJournal, err)
	}
	return j, nil
}

func (j *journal) check() error {
	s := j.spec()
	s = s.withDefaults()
	if err := s.validate(); err != nil {
		return err
	}
	j.Mask, j.TableBase, j.RulePriority = s.Mask, s.TableBase, s.RulePriority
	if j.NFT != "mprox" && !strings.HasPrefix(j.NFT, "mprox-") {
		return fmt.Errorf("nftables table %q is not ours", j.NFT)
	}
	if r := j.Reopen; r != nil {
		if err := r.validate(); err != nil {
			return err
		}
		if r.Mask != j.Mask || r.TableBase != j.TableBase || r.RulePriority != j.RulePriority {
			return errors.New("what stays closed has other settings than the rest")
		}
	}
	for key, value := range j.Sysctls {
		if !ownSysctl(key) {
			return fmt.Errorf("sysctl %q is not one that mprox sets", key)
		}
		if _, err := strconv.Atoi(value); err != nil {
			return fmt.Errorf("sysctl %s: value %q", key, value)
		}
	}
	for _, c := range j.Cgroups {
		if !ownCgroup(c) {
			return fmt.Errorf("cgroup %q is not ours", c)
		}
	}
	if j.BPF != nil && !ownPins(j.BPF.Dir) {
		return fmt.Errorf("bpf pins %q are not ours", j.BPF.Dir)
	}
	for _, m := range j.Moved {
		if m.PID <= 0 || !ownCgroup(m.To) || path.Clean(m.From) != m.From || !strings.HasPrefix(m.From, "/") {
			return fmt.Errorf("moved process %d", m.PID)
		}
	}
	return nil
}

func ownCgroup(p string) bool {
	return strings.HasPrefix(p, "/") && path.Clean(p) == p && strings.HasPrefix(path.Base(p), cgroupPrefix)
}

// ownSysctl reports whether it is one of the machine's settings that a plan can hold.
func ownSysctl(key string) bool {
	dev, ok := strings.CutPrefix(key, "net/ipv4/conf/")
	if !ok {
		return key == "net/ipv4/tcp_fwmark_accept" || key == sysctlForward4 || key == sysctlForward6
	}
	dev, ok = strings.CutSuffix(dev, "/src_valid_mark")
	return ok && dev != "" && dev != "." && dev != ".." && !strings.Contains(dev, "/")
}

// readJournal returns os.ErrNotExist when there is none, and ErrJournal when it is damaged.
func readJournal(file string) (journal, error) {
	f, err := os.Open(file)
	if err != nil {
		return journal{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxJournal+1))
	if err != nil {
		return journal{}, fmt.Errorf("%w: %s: %w", ErrJournal, file, err)
	}
	if len(b) > maxJournal {
		return journal{}, fmt.Errorf("%w: %s is larger than %d bytes", ErrJournal, file, maxJournal)
	}
	j, err := parseJournal(b)
	if err != nil {
		return journal{}, fmt.Errorf("%s: %w", file, err)
	}
	return j, nil
}

// write replaces the file in one step. It is not forced to the disk, which takes milliseconds and is done several times a start: what the
// journal stands for ends with the kernel that it is in, and so with anything that could lose the file.
func (j *journal) write(file string) (err error) {
	b, err := json.MarshalIndent(j, "", "\t")
	if err != nil {
		return err
	}
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, filepath.Base(file)+".*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	if _, err := f.Write(append(b, '\n')); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return err
	}
	return f.Close()
}
