// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/mutex-proxy/mutex/cmd/mprox/daemon"
	"github.com/mutex-proxy/mutex/config"
)

// upFlags are the flags of `up` beside the global ones.
type upFlags struct {
	config.OneLiner
	env string
}

func newUpCommand(g *globals) *cobra.Command {
	var f upFlags
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Capture this host's traffic and send it through a proxy",
		Long: `Runs the daemon in the foreground until Ctrl-C, SIGTERM or "mprox down", and then undoes everything it has changed.

Configured by a file (-c, or /etc/mprox/config.json), or by --proxy and the flags beside it. SIGHUP reads the file again.
When the daemon is killed, captured traffic stays blocked until the next "mprox up" or "mprox cleanup".

In containers, where no flag says it: MPROX_PROXY (comma list = a pool) or MPROX_CONFIG, MPROX_DNS, MPROX_BYPASS, MPROX_TUN, MPROX_MTU,
MPROX_INPUT_PORTS, MPROX_ALLOW_LAN=on|PREFIXES, MPROX_KILLSWITCH=on|off, MPROX_LOG_LEVEL, MPROX_HTTP_LISTEN; each also as NAME_FILE. PROXY, TUN
and MTU are the same as with MPROX_.`,
		Example: `  mprox up --proxy socks5h://user:password@192.0.2.10:1080
  mprox up --proxy socks5h://a.example:1080 --proxy http://b.example:3128 --strategy failover
  mprox up --proxy socks5h://192.0.2.10:1080 --dns tcp://192.0.2.53 --bypass 198.51.100.0/24
  mprox up -c /etc/mprox/config.json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return up(cmd, g, f) },
	}
	fl := cmd.Flags()
	fl.StringArrayVar(&f.Proxy, "proxy", nil, "proxy `URL`; repeated, the proxies are a pool")
	fl.StringVar(&f.Mode, "mode", "", "who is captured: global, cgroup, process, disabled")
	fl.StringArrayVar(&f.DNS, "dns", nil, "DNS `server` asked through the proxy: tcp://, udp://, tls://, https://; repeatable")
	fl.StringArrayVar(&f.Bypass, "bypass", nil, "address, prefix or class that stays direct; repeatable")
	fl.StringVar(&f.TUN, "tun", "", "`name` of the TUN device")
	fl.IntVar(&f.MTU, "mtu", 0, "MTU of the TUN device in bytes")
	fl.StringVar(&f.Strategy, "strategy", "", "how a proxy of the pool is chosen: round-robin, failover")
	fl.StringVar(&f.env, "env", "", "merge config.`NAME`.json over the configuration")
	return cmd
}

func up(cmd *cobra.Command, g *globals, f upFlags) error {
	e, err := readEnvironment(os.LookupEnv)
	if err != nil {
		return err
	}
	e.fill(g, &f)
	load := f.loader(g, &e)
	cfg, digest, err := load()
	if err != nil {
		return err
	}
	log, err := g.logger(cfg.Log)
	if err != nil {
		return err
	}
	opt := daemon.Options{
		Config: cfg, Digest: digest, Socket: g.socketOf(cfg), StateDir: g.stateDir, Version: version, Log: log,
		SetLevel: g.setLevel, DockerHost: os.Getenv("DOCKER_HOST"),
	}
	if len(f.Proxy) == 0 {
		opt.ConfigPath, opt.Load = g.config, load
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	return serveDaemon(ctx, daemon.New(opt), cfg.Warnings(), log)
}

// serveDaemon runs d, reloads it on SIGHUP and keeps systemd informed.
func serveDaemon(ctx context.Context, d *daemon.Daemon, warnings []*config.Error, log *zap.Logger) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, unix.SIGHUP)
	defer signal.Stop(hup)
	over := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-hup:
				notify("RELOADING=1\nMONOTONIC_USEC=" + monotonic())
				if err := d.Reload(ctx); err != nil {
					log.Error("configuration not reloaded, the old one stays in force", zap.Error(err))
				}
				notify("READY=1")
			case <-over:
				return
			}
		}
	}()
	defer reapOrphans(d.Own)()
	err := d.Run(ctx, func() {
		notify("READY=1")
		for _, w := range warnings {
			log.Warn("configuration: " + w.Error())
		}
		log.Info("capturing")
	})
	notify("STOPPING=1")
	close(over)
	<-done
	return err
}

// loader returns what reads the configuration: the flags, or the file.
func (f upFlags) loader(g *globals, e *environment) daemon.Loader {
	if len(f.Proxy) > 0 {
		return func() (*config.Config, string, error) {
			cfg, err := config.FromFlags(f.OneLiner, daemon.Check)
			if err == nil {
				e.over(cfg)
			}
			return cfg, "", err
		}
	}
	return func() (*config.Config, string, error) {
		cfg, err := config.Load(g.config, f.env, daemon.Check)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) && !g.configGiven {
				return nil, "", usageError("no proxy and no %s: give --proxy URL, or write one with: mprox init --template minimal", g.config)
			}
			return nil, "", err
		}
		data, err := os.ReadFile(g.config)
		if err != nil {
			return nil, "", err
		}
		e.over(cfg)
		sum := sha256.Sum256(data)
		return cfg, hex.EncodeToString(sum[:]), nil
	}
}

// notify tells systemd about the daemon's state (sd_notify(3)), where it asks for it. There is nobody to tell of a failure.
func notify(state string) {
	addr := os.Getenv("NOTIFY_SOCKET")
	if addr == "" {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: addr, Net: "unixgram"}) //nolint:forbidigo // a unix socket: nothing leaves
	if err != nil {
		return
	}
	_, _ = c.Write([]byte(state))
	_ = c.Close()
}

// monotonic is CLOCK_MONOTONIC in microseconds, as sd_notify(3) wants it.
func monotonic() string {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return "0"
	}
	return fmt.Sprint(time.Duration(ts.Nano()).Microseconds())
}
