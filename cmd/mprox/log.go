// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"cmp"
	"fmt"
	"os"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/mutex-proxy/mutex/config"
)

// logger returns the log of a command that runs on, to stderr: as the configuration says, with --log-level over it.
func (g *globals) logger(c config.Log) (*zap.Logger, error) {
	level, err := zapcore.ParseLevel(cmp.Or(g.logLevel, c.Level, "info"))
	if err != nil {
		return nil, fmt.Errorf("log level: %w", err)
	}
	enc := zap.NewProductionEncoderConfig()
	enc.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	enc.EncodeDuration = zapcore.SecondsDurationEncoder
	encoder := zapcore.NewJSONEncoder(enc)
	if c.Format != "json" {
		enc.EncodeTime = zapcore.TimeEncoderOfLayout("2006-01-02T15:04:05.000Z07:00")
		enc.EncodeLevel = zapcore.CapitalLevelEncoder
		enc.EncodeDuration = zapcore.StringDurationEncoder
		enc.ConsoleSeparator = " "
		encoder = zapcore.NewConsoleEncoder(enc)
	}
	g.level.SetLevel(level)
	core := zapcore.NewCore(encoder, zapcore.Lock(zapcore.AddSync(os.Stderr)), g.level)
	return zap.New(core, zap.ErrorOutput(zapcore.Lock(os.Stderr))), nil
}

// setLevel follows the configuration of a reload, unless --log-level says otherwise.
func (g *globals) setLevel(c config.Log) {
	if level, err := zapcore.ParseLevel(c.Level); err == nil && g.logLevel == "" {
		g.level.SetLevel(level)
	}
}
