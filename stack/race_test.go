// SPDX-License-Identifier: GPL-3.0-or-later

//go:build race

package stack

// race: the race detector makes sync.Pool lose things at random, so that allocations cannot be counted.
const race = true
