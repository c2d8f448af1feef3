// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mutex-proxy/mutex/control/client"
)

func newDNSCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "dns",
		Short:   "Ask the DNS module",
		Example: examples("mprox dns query example.com", "mprox dns query example.com MX"),
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var contextName string
	query := &cobra.Command{
		Use:   "query NAME [TYPE]",
		Short: "Ask what a captured process would be told",
		Long: `Asks the DNS module of a context one question and prints the answer, as a process captured by that context would get it: fake addresses
included. TYPE is A unless given. Exit code 1 means that the answer was a failure.`,
		Example: examples("mprox dns query example.com", "mprox dns query example.com AAAA --context work", "mprox dns query example.com MX -o json"),
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			r := client.DNSRequest{Context: contextName, Name: args[0]}
			if len(args) > 1 {
				r.Type = strings.ToUpper(args[1])
			}
			return g.ask(cmd, callTimeout, func(ctx context.Context, c *client.Client) error {
				a, err := c.QueryDNS(ctx, r)
				if err != nil {
					return err
				}
				return writeAnswer(g, cmd.OutOrStdout(), &a)
			})
		},
	}
	query.Flags().StringVar(&contextName, "context", "", "`name` of the context (default: the only one, or the one named default)")
	g.completeContextFlag(query)
	cmd.AddCommand(query)
	return cmd
}

func writeAnswer(g *globals, w io.Writer, a *client.DNSAnswer) error {
	var err error
	switch g.output {
	case "json":
		err = writeJSON(w, a)
	case "csv":
		err = writeCSV(w, a.Answers)
	default:
		t := &table{head: []string{"NAME", "TTL", "TYPE", "DATA"}}
		for _, r := range a.Answers {
			t.add(text(r.Name), number(uint64(r.TTL)), text(r.Type), text(r.Data))
		}
		err = t.write(w)
	}
	if err == nil && a.Rcode != "NOERROR" {
		err = fmt.Errorf("%s %s: %s; see the daemon's log, and dns.servers in its configuration", a.Name, a.Type, a.Rcode)
	}
	return err
}
