// SPDX-License-Identifier: GPL-3.0-or-later

//go:build !race

package routing

// raceEnabled: the race detector makes sync.Pool, and so every regexp, forget at random.
const raceEnabled = false
