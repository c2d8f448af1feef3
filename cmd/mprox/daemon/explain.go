// SPDX-License-Identifier: GPL-3.0-or-later

package daemon

import (
	"maps"
	"slices"

	"github.com/mutex-proxy/mutex/config"
	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/dialers"
)

// Explain asks the rules of a configuration that need not be in force. Nothing is resolved, and there is no way through the kernel yet.
func Explain(cfg *config.Config, r control.ExplainRequest) (control.Explanation, error) {
	name := r.Context
	if names := slices.Sorted(maps.Keys(cfg.Contexts)); name == "" {
		name = defaultContext
		if len(names) == 1 {
			name = names[0]
		}
	}
	if _, ok := cfg.Contexts[name]; !ok {
		return control.Explanation{}, noContext(cfg, name, "$.context")
	}
	ups, err := buildUpstreams(cfg, dialers.NewNet(dialers.NetConfig{}), nil)
	if err != nil {
		return control.Explanation{}, err
	}
	rules, err := buildRules(cfg, name, ups, plain)
	if err != nil {
		return control.Explanation{}, config.Errors(locate(cfg, err))
	}
	return explain(name, rules, nil, r)
}
