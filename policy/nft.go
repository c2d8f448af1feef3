// SPDX-License-Identifier: GPL-3.0-or-later

package policy

// NFTable is one nftables table.
type NFTable struct{ Name string }
