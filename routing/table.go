// SPDX-License-Identifier: GPL-3.0-or-later

package routing

import "github.com/mutex-proxy/mutex/flow"

// Table is the compiled rules of one context. It is immutable and safe for concurrent use.
type Table struct{}

var _ flow.Decider = (*Table)(nil)

// Compile checks and compiles the rules. The error joins one *PathError for each thing that is wrong.
func Compile(Input) (*Table, error) { return &Table{}, nil }

// Decide returns what to do with the flow. It does not allocate.
func (t *Table) Decide(*flow.Flow) flow.Decision { return flow.Decision{} }

// Needs returns what the rules that can still match need to know. It does not allocate.
func (t *Table) Needs(*flow.Flow) flow.Needs { return 0 }

// Explain returns the conditions that were looked at, in order, up to the one that decided.
func (t *Table) Explain(*flow.Flow) []Condition { return nil }
