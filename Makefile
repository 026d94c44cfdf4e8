# Every command of the project. Each installs what it lacks (scripts/requirements.sh, scripts/cargo-tool.sh).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.ONESHELL:
.SILENT:

PG_CONFIG ?= pg_config
PREFIX    ?= /usr/local

# `make test` is whole on the first and runs the tests of src/pg on the second; `make test-all` is whole on all.
first  := 15
second := 18
majors := 15 16 17 18

build_packages := gcc libc6-dev make pkg-config libssl-dev clang-14 libclang-14-dev
# Where root runs the tests: servers run as the OS user postgres, to whom pgrx-tests changes by sudo.
test_packages  := gnupg strace $(if $(filter 0,$(shell id -u)),sudo postgresql-common)

bench_packages := python3 zstd strace pgbackrest diffutils

.PHONY: help install demo bench test test-all test-core test-s3 test-s3-garage test-interop lint

help:
	echo 'make install PG_CONFIG=... [PREFIX=/usr/local]   build and install the extension and the program'
	echo 'make demo [KEEP=1] [STORAGE=s3]                  archive, lose a table, restore, compare; in a throw-away cluster'
	echo 'make test | test-all                             every test on PostgreSQL $(first) and $(second) | on $(majors)'
	echo 'make test-core | test-interop                    those without a server | with the real Barman'
	echo 'make test-s3 | test-s3-garage                    those on real S3 servers | on one more, slow to build'
	echo 'make test-pg-MAJOR | test-server-MAJOR           those inside backends | on real clusters'
	echo 'make bench [ROUNDS=7] [SEGMENTS=64] [ONLY="..."] side by side with other archivers, and with the limit'
	echo 'make lint                                        format, clippy, licences, scripts'

install:
	pg_config=$$(command -v '$(PG_CONFIG)') || {
		echo 'make install: there is no program "$(PG_CONFIG)"; say which PostgreSQL is meant, for example:' >&2
		echo 'make install PG_CONFIG=/usr/lib/postgresql/15/bin/pg_config' >&2
		exit 1
	}
	scripts/requirements.sh $(build_packages)
	scripts/install.sh "$$pg_config" '$(PREFIX)/bin' --release

demo:
	scripts/requirements.sh $(build_packages)
	pg_config=$$(scripts/postgresql.sh $(first))
	bindir=$$(scripts/prefix.sh $$pg_config)
	scripts/install.sh $$bindir/pg_config $$bindir --release
	$(if $(filter s3,$(STORAGE)),scripts/with-s3.sh ceph --) scripts/demo.sh $$bindir

# Reads ROUNDS, SEGMENTS, SWITCHES, FOREGROUND_SECONDS, and ONLY: sections (drain, fsyncs, latency, foreground) and
# contestants by name, as ONLY='drain archiver* limit-zstd'.
bench:
	scripts/requirements.sh $(build_packages) $(bench_packages)
	pg_config=$$(scripts/postgresql.sh $(first))
	bindir=$$(scripts/prefix.sh $$pg_config)
	scripts/install.sh $$bindir/pg_config $$bindir --release
	cargo build --locked --release -p archiver_benches
	ARCHIVER_BENCH_BARMAN=$$(scripts/barman.sh)
	export ARCHIVER_BENCH_BARMAN
	scripts/with-s3.sh ceph -- /usr/bin/python3 -B benches/side_by_side \
		$$bindir $${CARGO_TARGET_DIR:-target}/release benches/results

test: test-core test-s3 test-interop test-pg-$(first) test-server-$(first) test-server-$(second)

test-all: test-core test-s3-garage test-interop $(majors:%=test-pg-%) $(majors:%=test-server-%)

test-core:
	scripts/requirements.sh $(build_packages) gnupg pigz procps
	cargo test -p archiver_core -p archiver_cli
	cargo test -p archiver_tests --lib --test storage --test archive

test-s3 test-s3-garage: test-s3%:
	scripts/requirements.sh $(build_packages) gnupg
	cargo test -p archiver_tests --test s3 --no-run
	scripts/with-s3.sh ceph moto $(patsubst -%,%,$*) -- cargo test -p archiver_tests --test s3

test-interop:
	scripts/requirements.sh $(build_packages) gnupg pigz
	bindir=$$(scripts/barman.sh)
	cargo test -p archiver_tests --test interop --no-run
	scripts/with-s3.sh ceph -- env ARCHIVER_TEST_BARMAN=$$bindir cargo test -p archiver_tests --test interop

test-pg-%:
	scripts/requirements.sh $(build_packages) $(test_packages)
	pg_config=$$(scripts/postgresql.sh $*)
	bindir=$$(scripts/prefix.sh $$pg_config)
	scripts/test-pg.sh $$bindir

test-server-%:
	scripts/requirements.sh $(build_packages) $(test_packages)
	pg_config=$$(scripts/postgresql.sh $*)
	bindir=$$(scripts/prefix.sh $$pg_config)
	scripts/install.sh $$bindir/pg_config $$bindir
	cargo test -p archiver_tests --test server --no-run
	export ARCHIVER_TEST_BINDIR=$$bindir
	scripts/with-s3.sh ceph -- cargo test -p archiver_tests --test server -- --test-threads=4

lint:
	scripts/requirements.sh $(build_packages) shellcheck pyflakes3
	shellcheck scripts/*.sh .ci/run
	pyflakes3 benches/side_by_side/*.py
	cargo fmt --all --check
	for major in $(first) $(second); do
		PGRX_PG_CONFIG_PATH=$$(scripts/postgresql.sh $$major)
		export PGRX_PG_CONFIG_PATH
		cargo clippy --locked --workspace --all-targets \
			--no-default-features --features pg$$major -- -D warnings
	done
	scripts/cargo-tool.sh deny check bans licenses sources
