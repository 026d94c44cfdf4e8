# Every command of the project. Each installs what it lacks (scripts/requirements.sh, scripts/cargo-tool.sh).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.ONESHELL:
.SILENT:

PG_CONFIG ?= pg_config
PREFIX    ?= /usr/local

build_packages  := gcc libc6-dev make pkg-config libssl-dev clang-14 libclang-14-dev
server_packages := postgresql-15 postgresql-server-dev-15
# pgrx-tests changes to the OS user postgres by sudo, which root may lack.
test_packages   := strace $(if $(filter 0,$(shell id -u)),sudo)

.PHONY: help install demo test test-core test-interop test-pg test-server lint

help:
	echo 'make install PG_CONFIG=... [PREFIX=/usr/local]   build and install the extension and the program'
	echo 'make demo [KEEP=1]                               archive, lose a table, restore, compare; in a throw-away cluster'
	echo 'make test | test-core | test-pg | test-server    every test | without a server | inside backends | real clusters'
	echo 'make test-interop                                those with the real Barman'
	echo 'make lint                                        format, clippy, licences, shell scripts'

install:
	pg_config=$$(command -v '$(PG_CONFIG)') || {
		echo 'make install: there is no program "$(PG_CONFIG)"; say which PostgreSQL is meant, for example:' >&2
		echo 'make install PG_CONFIG=/usr/lib/postgresql/15/bin/pg_config' >&2
		exit 1
	}
	scripts/requirements.sh $(build_packages)
	scripts/install.sh "$$pg_config" '$(PREFIX)/bin' --release

demo:
	scripts/requirements.sh $(build_packages) $(server_packages)
	bindir=$$(scripts/prefix.sh)
	scripts/install.sh $$bindir/pg_config $$bindir --release
	scripts/demo.sh $$bindir

test: test-core test-interop test-pg test-server

test-core:
	scripts/requirements.sh $(build_packages)
	cargo test -p archiver_core -p archiver_cli
	cargo test -p archiver_tests --test storage --test archive

test-interop:
	scripts/requirements.sh $(build_packages)
	bindir=$$(scripts/barman.sh)
	ARCHIVER_TEST_BARMAN=$$bindir cargo test -p archiver_tests --test interop

test-pg:
	scripts/requirements.sh $(build_packages) $(server_packages) $(test_packages)
	bindir=$$(scripts/prefix.sh)
	scripts/test-pg.sh $$bindir

test-server:
	scripts/requirements.sh $(build_packages) $(server_packages) $(test_packages)
	bindir=$$(scripts/prefix.sh)
	scripts/install.sh $$bindir/pg_config $$bindir
	ARCHIVER_TEST_BINDIR=$$bindir cargo test -p archiver_tests --test server -- --test-threads=4

lint:
	scripts/requirements.sh $(build_packages) $(server_packages) shellcheck
	shellcheck scripts/*.sh .ci/run
	cargo fmt --all --check
	bindir=$$(scripts/prefix.sh)
	PGRX_PG_CONFIG_PATH=$$bindir/pg_config cargo clippy --locked --workspace --all-targets -- -D warnings
	scripts/cargo-tool.sh deny check bans licenses sources
