// SPDX-License-Identifier: GPL-3.0-or-later

package policy

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv("POLICY_TEST_HELPER") != "" {
		helperMain()
		return
	}
	goleak.VerifyTestMain(m)
}
