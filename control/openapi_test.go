// SPDX-License-Identifier: GPL-3.0-or-later

package control_test

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/mutex-proxy/mutex/control"
	"github.com/mutex-proxy/mutex/control/client"
)

type spec struct {
	Paths      map[string]map[string]any `yaml:"paths"`
	Components struct {
		Schemas map[string]struct {
			Required   []string       `yaml:"required"`
			Properties map[string]any `yaml:"properties"`
		} `yaml:"schemas"`
	} `yaml:"components"`
}

func loadSpec(t *testing.T) (s spec) {
	t.Helper()
	data, err := start(t).client.OpenAPI(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestRoutesAndDescriptionAgree(t *testing.T) {
	var described, served []string
	for path, methods := range loadSpec(t).Paths {
		for method := range methods {
			described = append(described, strings.ToUpper(method)+" "+path)
		}
	}
	for _, r := range control.Routes(control.NewServer(control.Config{})) {
		method, path := r.RouteOf()
		served = append(served, method+" "+path)
	}
	slices.Sort(described)
	slices.Sort(served)
	if diff := cmp.Diff(described, served); diff != "" {
		t.Errorf("(-described +served):\n%s", diff)
	}
}

func TestTypesAndDescriptionAgree(t *testing.T) {
	schemas := loadSpec(t).Components.Schemas
	types := map[string]any{
		"Error": client.Error{}, "Status": client.Status{}, "ConfigStatus": client.ConfigStatus{}, "ContextStatus": client.ContextStatus{},
		"UpstreamStatus": client.UpstreamStatus{}, "UpstreamTest": client.UpstreamTest{}, "TestStep": client.TestStep{},
		"GuardStatus": client.GuardStatus{}, "DNSStatus": client.DNSStatus{}, "Flow": client.Flow{},
		"App": client.App{}, "AppUsage": client.AppUsage{}, "Explanation": client.Explanation{}, "Condition": client.Condition{}, "KernelPath": client.KernelPath{},
		"Stats": client.Stats{}, "Totals": client.Totals{}, "Health": client.Health{}, "Check": client.Check{}, "DNSAnswer": client.DNSAnswer{},
		"DNSRecord": client.DNSRecord{}, "Event": client.Event{}, "LeaseRequest": client.LeaseRequest{}, "Lease": client.Lease{},
		"ContextRequest": client.ContextRequest{}, "Selector": client.Selector{}, "Capture": client.Capture{}, "Verdict": client.Verdict{},
	}
	for name, v := range types {
		var fields, required []string
		for field := range reflect.TypeOf(v).Fields() {
			tag, options, _ := strings.Cut(field.Tag.Get("json"), ",")
			fields = append(fields, tag)
			if options == "" {
				required = append(required, tag)
			}
		}
		schema, ok := schemas[name]
		if !ok {
			t.Errorf("%s is not described", name)
			continue
		}
		slices.Sort(fields)
		if diff := cmp.Diff(fields, slices.Sorted(maps.Keys(schema.Properties))); diff != "" {
			t.Errorf("%s (-type +description):\n%s", name, diff)
		}
		if diff := cmp.Diff(required, schema.Required); diff != "" {
			t.Errorf("%s: required (-type +description):\n%s", name, diff)
		}
	}
	for name := range schemas {
		if _, ok := types[name]; !ok && name != "ErrorAnswer" {
			t.Errorf("%s is described and does not exist", name)
		}
	}
}

func TestReferencesOfTheDescriptionExist(t *testing.T) {
	data := string(control.OpenAPI)
	schemas := loadSpec(t).Components.Schemas
	for rest := data; ; {
		_, after, ok := strings.Cut(rest, "#/components/schemas/")
		if !ok {
			break
		}
		name, _, _ := strings.Cut(after, `"`)
		if _, ok := schemas[name]; !ok {
			t.Error(fmt.Sprint("dangling reference to ", name))
		}
		rest = after
	}
}
