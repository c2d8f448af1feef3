// SPDX-License-Identifier: GPL-3.0-or-later

package main

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"
)

// printable replaces what a terminal would act on: names of hosts, programs and cgroups come from anyone.
func printable(s string) string {
	if strings.IndexFunc(s, unprintable) < 0 && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if unprintable(r) {
			fmt.Fprintf(&b, `\u%04x`, r)
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }

// colour is an SGR sequence; "" is none.
type colour string

const (
	plain colour = ""
	red   colour = "\x1b[31m"
	green colour = "\x1b[32m"
	bold  colour = "\x1b[1m"
	reset        = "\x1b[0m"
)

// colours reports whether w is a terminal whose user has not asked for none (https://no-color.org).
func colours(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && term.IsTerminal(int(f.Fd()))
}

// cell is one field of a table. Numbers are aligned to the right.
type cell struct {
	text   string
	colour colour
	right  bool
}

func text(s string) cell { return cell{text: printable(s)} }

// orDash shows that there is nothing, instead of nothing.
func orDash(s string) cell {
	if s == "" {
		return cell{text: "-"}
	}
	return text(s)
}

func number[T uint64 | int](n T) cell { return cell{text: fmt.Sprint(n), right: true} }

func bytesCell(n uint64) cell { return cell{text: size(n), right: true} }

func yesNo(b bool) cell {
	if b {
		return cell{text: "yes", colour: green}
	}
	return cell{text: "no", colour: red}
}

// table is what people read. Its widths are those of its content.
type table struct {
	head []string
	rows [][]cell
}

func (t *table) add(cells ...cell) { t.rows = append(t.rows, cells) }

func (t *table) write(w io.Writer) error {
	paint := colours(w)
	widths := make([]int, len(t.head))
	for i, h := range t.head {
		widths[i] = utf8.RuneCountInString(h)
	}
	for _, r := range t.rows {
		for i, c := range r {
			widths[i] = max(widths[i], utf8.RuneCountInString(c.text))
		}
	}
	head := make([]cell, len(t.head))
	for i, h := range t.head {
		head[i] = cell{text: h, colour: bold, right: len(t.rows) > 0 && t.rows[0][i].right}
	}
	for _, r := range append([][]cell{head}, t.rows...) {
		var b strings.Builder
		for i, c := range r {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text))
			shown := c.text
			if paint && c.colour != plain {
				shown = string(c.colour) + c.text + reset
			}
			if c.right {
				shown = pad + shown
			} else {
				shown += pad
			}
			if i > 0 {
				b.WriteString("  ")
			}
			b.WriteString(shown)
		}
		if _, err := fmt.Fprintln(w, strings.TrimRight(b.String(), " ")); err != nil {
			return err
		}
	}
	return nil
}

// size shows bytes with binary prefixes.
func size(n uint64) string {
	if n < 1024 {
		return strconv.FormatUint(n, 10) + " B"
	}
	v, unit := float64(n)/1024, 0
	for v >= 999.95 && unit < 4 {
		v /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGTP"[unit])
}

// span shows a duration with its two largest units.
func span(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	switch {
	case d > 0 && d < 10*time.Millisecond:
		return fmt.Sprintf("%.1fms", seconds*1000)
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
}

// writeJSON writes one value, indented for people who read it all the same.
func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// writeCSV writes a slice of structs: a line with the names of the fields as in JSON, nested ones joined by an underscore, and a line each.
func writeCSV[T any](w io.Writer, list []T) error {
	out := csv.NewWriter(w)
	var head []string
	csvFields(reflect.ValueOf(new(T)).Elem(), "", func(name, _ string) { head = append(head, name) })
	if err := out.Write(head); err != nil {
		return err
	}
	for i := range list {
		var row []string
		csvFields(reflect.ValueOf(&list[i]).Elem(), "", func(_, value string) { row = append(row, value) })
		if err := out.Write(row); err != nil {
			return err
		}
	}
	out.Flush()
	return out.Error()
}

func csvFields(v reflect.Value, prefix string, each func(name, value string)) {
	for field, value := range v.Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		name = prefix + name
		switch x := value.Interface().(type) {
		case time.Time:
			each(name, x.Format(time.RFC3339Nano))
		case float64:
			each(name, strconv.FormatFloat(x, 'f', -1, 64))
		default:
			if value.Kind() == reflect.Struct {
				csvFields(value, name+"_", each)
				continue
			}
			each(name, fmt.Sprint(x))
		}
	}
}

// show prints a list in the format of --output.
func show[T any](g *globals, w io.Writer, list []T, asTable func([]T) *table) error {
	switch g.output {
	case "json":
		return writeJSON(w, list)
	case "csv":
		return writeCSV(w, list)
	}
	return asTable(list).write(w)
}
