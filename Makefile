# SPDX-License-Identifier: GPL-3.0-or-later
# `make demo` shows the main job, `make test` runs every test, `make check` is what CI runs.
.DEFAULT_GOAL := build
SHELL := /bin/bash -o pipefail

export CGO_ENABLED ?= 0
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
TOOL    := go tool -modfile=.ci/tools.mod
PREFIX  ?= /usr/local
FUZZTIME ?= 20s
# Of the Go benchmarks: benchstat wants ten runs.
BENCHTIME ?= 0.2s
BENCHCOUNT ?= 10
# The main job over TCP, run a second time where the kernel refuses to adopt flows.
OFFTESTS := TestTCPMatrix|TestBackpressure|TestFlowTableFull|TestKeepAlive|TestRealClients|TestOffloadPath|TestOffloadOff|TestOffloadModes|TestSYNIsHeld

.PHONY: build cross demo test unit race e2e interop soak fallbacks fuzz bench microbench microbench-baseline profile lint fmt fmt-check check image install clean

build: ## the static binary, ./mprox
	go build -trimpath -ldflags '$(LDFLAGS)' -o mprox ./cmd/mprox

cross: ## both supported architectures, into ./dist
	GOOS=linux GOARCH=amd64 go build -trimpath -ldflags '$(LDFLAGS)' -o dist/mprox-linux-amd64 ./cmd/mprox
	GOOS=linux GOARCH=arm64 go build -trimpath -ldflags '$(LDFLAGS)' -o dist/mprox-linux-arm64 ./cmd/mprox

demo: build ## the main job, self-contained: private namespaces, nothing left behind (needs root)
	./mprox demo

test: unit e2e ## every test (needs root; installs the servers it needs)

unit: ## tests that need no root
	go test -count=1 $$(go list ./... | grep -v /e2e)

race:
	CGO_ENABLED=1 go test -race -count=1 $$(go list ./... | grep -v /e2e)

e2e: build ## black-box tests in namespaces against real servers (needs root)
	bash e2e/setup.sh
	MPROX_BIN=$(CURDIR)/mprox go test -count=1 -timeout 25m -v ./e2e/...
	MPROX_E2E_OFFLOAD=off MPROX_BIN=$(CURDIR)/mprox go test -count=1 -timeout 10m -v -run '$(OFFTESTS)' ./e2e

interop: build ## every proxy server through mprox; writes the table of docs/interop.md (needs root; installs the servers)
	bash e2e/setup.sh
	MPROX_INTEROP=write MPROX_BIN=$(CURDIR)/mprox go test -count=1 -v -run '^TestInterop$$' ./e2e/

# The tests of the main job: everything that a packet's way through the device can break.
MAINJOB := ^Test(TCP|UDP|Ping|DNS|Up|Pool|Dead|Actions|SYN|Lossy|Backpressure|Many|RealClients|Keep|Malformed|Hostile|Leak|Gateway|Offload)

fallbacks: build ## the main job's tests with each of the techniques of the device taken away (needs root)
	bash e2e/setup.sh
	for off in no-uso none no-header; do \
		MPROX_TUN_OFFLOADS=$$off MPROX_BIN=$(CURDIR)/mprox go test -count=1 -timeout 25m -run '$(MAINJOB)' ./e2e || exit 1; \
	done
	MPROX_TUN_QUEUES=4 MPROX_BIN=$(CURDIR)/mprox go test -count=1 -timeout 25m -run '$(MAINJOB)' ./e2e

soak: build ## the long versions of e2e tests (needs root): 10,000 connections ten times and idle, a million short ones, 200 kills, a minute of mixed load under the race detector
	CGO_ENABLED=1 go build -race -o dist/mprox-race ./cmd/mprox
	ulimit -n $$(ulimit -Hn) && MPROX_SOAK=1 MPROX_BIN=$(CURDIR)/dist/mprox-race go test -count=1 -timeout 15m -v -run 'TestMixedLoad' ./e2e
	ulimit -n $$(ulimit -Hn) && MPROX_SOAK=1 MPROX_SHORT=1000000 MPROX_IDLE=10000 MPROX_KILLS=200 MPROX_BIN=$(CURDIR)/mprox \
	  go test -count=1 -timeout 90m -v -run 'TestChurn|TestStalledReader|TestShortConnections|TestIdleFlows|TestOffloadKilled|TestBurst$$' ./e2e

fuzz: ## each fuzz target for FUZZTIME
	bash .ci/fuzz $(FUZZTIME)

bench: ## the engine against what is possible, in namespaces (needs root): table, e2e/bench/results.json; docs/benchmarks.md
	go run ./e2e/bench $(BENCHFLAGS)

microbench: ## Go benchmarks of the packages, compared with the figures kept in e2e/bench/baseline
	mkdir -p dist
	go test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) -count $(BENCHCOUNT) $$(go list ./... | grep -v /e2e) | tee dist/microbench.txt
	$(TOOL) benchstat e2e/bench/baseline/micro.txt dist/microbench.txt

microbench-baseline: ## keep the figures of the last microbench: commit them with the machine they are from
	grep -E '^(goos|goarch|cpu|pkg|Benchmark)' dist/microbench.txt > e2e/bench/baseline/micro.txt

profile: ## CPU and allocation profiles of the engine under each load, into ./dist/profile (needs root)
	go run ./e2e/bench -profile dist/profile $(BENCHFLAGS)

lint:
	CGO_ENABLED=0 $(TOOL) golangci-lint run ./...
	GOARCH=arm64 go vet ./...

fmt:
	$(TOOL) golangci-lint fmt ./...

fmt-check:
	$(TOOL) golangci-lint fmt --diff ./...

check: fmt-check lint race cross e2e ## what .ci/run runs

IMAGE ?= mprox
CA_BUNDLE ?= /etc/ssl/certs/ca-certificates.crt
image: build ## the container image, FROM scratch (needs docker)
	install -D -m 0755 mprox dist/image/mprox
	install -D -m 0644 $(CA_BUNDLE) dist/image/ca-certificates.crt
	docker build -q -t $(IMAGE) -f packaging/Dockerfile dist/image

install: build
	install -D -m 0755 mprox $(DESTDIR)$(PREFIX)/bin/mprox

clean:
	rm -rf mprox dist
