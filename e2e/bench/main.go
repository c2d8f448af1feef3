// SPDX-License-Identifier: GPL-3.0-or-later

// Program bench measures the engine against what it could be at best: no proxy at all, the same proxy server asked by the application
// itself, and two relays without a network stack of their own. Everything runs in namespaces it makes and removes; it needs root.
//
//	go run ./e2e/bench                        all rows, table on standard output, e2e/bench/results.json
//	go run ./e2e/bench -quick                 one short repetition: does it still work?
//	go run ./e2e/bench -rows tcp,udp -reps 9
//	go run ./e2e/bench -doc docs/benchmarks.md        put results.json into the page
//	go run ./e2e/bench -profile DIR           CPU and allocation profiles of the engine under each row
//
// BENCH_PEER='command' measures another program too: one that creates a TUN device and uses the SOCKS5 server at $SOCKS (host:port).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options is what the flags say.
type options struct {
	binary  string // of the engine; "" = built
	other   string // of another build of it, to compare with; "" = none
	rows    []string
	skip    []string // subjects
	reps    int
	seconds float64
	warm    bool
	server  string // SOCKS5 server: danted, microsocks, mprox
	out     string
	doc     string
	profile string
	peer    string
}

func main() {
	if len(os.Args) > 1 {
		if role, ok := roles()[os.Args[1]]; ok {
			exit(role(os.Args[2:]))
		}
	}
	o, err := parseFlags(os.Args[1:], os.Stderr)
	if err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return
		}
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch {
	case o.doc != "":
		err = writeDoc(o.doc, o.out)
	case o.profile != "":
		err = runProfile(ctx, o)
	default:
		err = runBench(ctx, o)
	}
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func parseFlags(args []string, w io.Writer) (options, error) {
	o := options{peer: os.Getenv("BENCH_PEER")}
	var rows, skip string
	var quick bool
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(w)
	fs.StringVar(&o.binary, "mprox", "", "`path` of the engine; default: built from this tree")
	fs.StringVar(&o.other, "other", "", "`path` of another build of mprox, measured in turns with the first")
	fs.StringVar(&rows, "rows", "", "comma list of rows, or of beginnings of their names: "+strings.Join(rowNames(), " "))
	fs.StringVar(&skip, "skip", "", "comma list of subjects to leave out: plain upstream floor splice tproxy mprox netstack other peer")
	fs.IntVar(&o.reps, "reps", 5, "repetitions of each row")
	fs.Float64Var(&o.seconds, "seconds", 2, "length of one measurement")
	fs.BoolVar(&quick, "quick", false, "one repetition of half a second, no waiting for memory to be given back")
	fs.StringVar(&o.server, "server", "danted", "SOCKS5 server: danted, microsocks (no UDP), mprox (mprox serve)")
	fs.StringVar(&o.out, "json", "e2e/bench/results.json", "`file` of the figures; - = none")
	fs.StringVar(&o.doc, "doc", "", "measure nothing: put the figures of -json into this markdown `file`, and a chart beside it")
	fs.StringVar(&o.profile, "profile", "", "profile the engine instead, into this `directory`")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	o.rows, o.skip, o.warm = split(rows), split(skip), !quick
	if quick {
		o.reps, o.seconds = 1, 0.5
	}
	if o.reps < 1 || o.seconds < 0.1 || o.seconds > 60 {
		err := errors.New("-reps must be at least 1, -seconds between 0.1 and 60")
		fmt.Fprintln(w, err)
		return o, err
	}
	return o, nil
}

func split(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

// selected says whether a name, or a beginning of it, is in the list; everything is in an empty one.
func selected(list []string, name string) bool {
	for _, l := range list {
		if strings.HasPrefix(name, l) {
			return true
		}
	}
	return len(list) == 0
}

// runBench measures everything that was asked for.
func runBench(ctx context.Context, o options) error {
	if os.Geteuid() != 0 {
		return errors.New("namespaces need root")
	}
	rep := &report{Server: o.server, Reps: o.reps, Seconds: o.seconds, Time: time.Now().UTC().Truncate(time.Minute)}
	var err error
	for _, link := range linkNames() {
		if err = measureLink(ctx, o, link, rep); err != nil {
			break
		}
	}
	rep.print(os.Stdout) // what was measured before an error, or Ctrl-C, too
	if o.out == "-" {
		return err
	}
	return errors.Join(err, rep.save(o.out))
}

// measureLink measures the rows of one link in a lab of its own.
func measureLink(ctx context.Context, o options, link string, rep *report) error {
	var wanted []row
	for _, r := range rows() {
		if r.link == link && selected(o.rows, r.name) {
			wanted = append(wanted, r)
		}
	}
	if len(wanted) == 0 {
		return nil
	}
	if link != "" { // what goes on in the kernel of one machine says nothing there
		o.skip = append(slices.Clone(o.skip), subPlain, subSplice, subTPROXY, subFloor)
	}
	l, err := newLab(ctx, o, slowLinks()[link])
	defer l.close()
	if err != nil {
		return err
	}
	rep.Host = hostOf(l)
	return l.measure(ctx, wanted, rep)
}
