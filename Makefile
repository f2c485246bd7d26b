# What can be done here. The work is in `cargo xtask`; this file finds Rust and a linker, without which that cannot start.
.DEFAULT_GOAL := help
.PHONY: help run test test-lab check bench fmt lint dev build release rust

help: ## Show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

run: build ## Build, boot Debian in a microVM, and show its /etc/os-release
	target/debug/hutch run --embedded --timings debian-base -- cat /etc/os-release

# As root, test machines run as users of their own, who must be able to reach the programs under test: from a checkout
# below a closed directory, such as /root, these are built elsewhere.
ifeq ($(shell id -u),0)
ifneq ($(shell setpriv --reuid 65534 --regid 65534 --clear-groups test -r '$(CURDIR)/Makefile' && echo reachable),reachable)
test test-lab bench: export CARGO_TARGET_DIR ?= /var/cache/hutch/target
endif
endif

test: rust ## Install what is missing and run every test
	cargo xtask test

test-lab: rust ## Run the tests of real guests where KVM is real: in an emulated machine
	cargo xtask lab

check: rust ## Format, lints, dependencies, house rules
	cargo xtask check

bench: rust ## Measure boots, exec, memory, snapshots, networks of machines and the ways into them
	cargo xtask bench boot
	cargo xtask bench snapshot
	cargo xtask bench net

fmt: rust ## Format the sources
	cargo fmt --all

lint: check ## The same as check

dev: rust ## Rebuild and restart `hutch serve` on every change
	cargo xtask dev

build: rust ## Build hutch and the guest's agent for development
	cargo xtask setup
	cargo xtask build

release: rust ## Build hutch and the guest's agent as they are shipped
	cargo xtask setup
	cargo xtask build --release

rust:
	@command -v cargo >/dev/null || { echo 'Rust is missing. Install it from https://rustup.rs, then try again.' >&2; exit 1; }
	@command -v cc >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo 'A C compiler is missing and is installed now.' >&2; \
	    apt-get -qq update && apt-get -qq install --no-install-recommends gcc libc6-dev; \
	  else \
	    echo 'A C compiler is missing. Install it: sudo apt-get install gcc libc6-dev' >&2; exit 1; \
	  fi; }
