// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"context"
	"errors"
	"os"
)

// WaitSurvivors returns when the last process has gone from the cgroups that an instance has left behind with its journal: until then
// their marks and guard block them, from then on Cleanup takes nothing from anybody. It returns at once where there is no journal.
func WaitSurvivors(ctx context.Context, cfg Config, in Instance) error {
	j, err := readJournal(in.Journal)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, path := range j.Cgroups {
		if err := cfg.Host.WaitCgroupEmpty(ctx, path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
