# Thin over cargo. `make help` lists the targets.
PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
HOST := $(or $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p'),$(shell uname -m)-unknown-linux-gnu)
# Directory of binaries to install as they are, without building.
BUILT ?=
BINARIES := $(or $(BUILT),target/$(HOST)/release)
WORKERS := casemate-fetch casemate-index casemate-unpack casemate-tree casemate-init casemate-sudo
LIBEXEC := $(PREFIX)/libexec/casemate
SHARE := $(PREFIX)/share
# Not share/casemate: with PREFIX=~/.local that is the user's store.
DATA := $(PREFIX)/lib/casemate
BASH_COMPLETION := bash-completion/completions/casemate
ZSH_COMPLETION := zsh/site-functions/_casemate
FISH_COMPLETION := fish/vendor_completions.d/casemate.fish
DOC := $(SHARE)/doc/casemate
# Beneath share, which is where both the bus and systemd look whether PREFIX is /usr, /usr/local or ~/.local.
SERVICE := dbus-1/services/org.casemate.Casemate1.service
BUS_POLICY := dbus-1/session.d/org.casemate.Casemate1.conf
UNIT := systemd/user/casemated.service
ENVIRONMENT_UNIT := systemd/user/casemate-environment@.service

.PHONY: help setup build demo test test-vm soak bench lint interfaces install uninstall clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: ## Install what building and testing need (Debian, Ubuntu)
	@scripts/setup

build: ## Build everything
	$(CARGO) build --release --workspace

demo: ## Fetch a release, build an environment, run a command in it
	@scripts/demo

test: ## Run the whole suite, as an ordinary user
	@scripts/test

test-vm: ## The cases that need systemd, cgroup v2 or another kernel, in a virtual machine (SUITE=trixie: its kernel)
	@scripts/setup
	@tests/vm/test $(or $(SUITE),bookworm)

soak: ## The suite with full counts
	@CASEMATE_SOAK=1 scripts/test

bench: ## Measure beside bubblewrap, crun and tar; ONLY="exec import snapshots list idle" chooses
	@scripts/bench $(ONLY)

lint: ## Clippy and rustfmt, warnings denied; cargo deny and shellcheck where installed
	@scripts/lint

interfaces: ## Generate the proxies from interfaces/*.xml
	CASEMATE_WRITE_PROXIES=1 $(CARGO) test --release -p casemate-interfaces --test proxies

# Through sudo, cargo may be another or none: what the user built is installed.
install: $(if $(BUILT)$(SUDO_UID),,build) ## Build and install into $(DESTDIR)$(PREFIX)
	@test -x $(BINARIES)/casemated || { echo "make install: nothing is built in $(BINARIES); run \`make build\` first" >&2; exit 1; }
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(LIBEXEC) $(DESTDIR)$(SHARE)/man/man1
	install -m 755 $(BINARIES)/casemate $(DESTDIR)$(PREFIX)/bin/casemate
	install -m 755 $(BINARIES)/casemated $(addprefix $(BINARIES)/,$(WORKERS)) $(DESTDIR)$(LIBEXEC)
	install -D -m 644 -t $(DESTDIR)$(DATA)/sources.d sources.d/*.toml
	install -D -m 644 -t $(DESTDIR)$(DATA)/keys/debian keys/debian/*.asc
	install -D -m 644 -t $(DESTDIR)$(DATA) policy.toml
	install -D -m 644 -t $(DESTDIR)$(DOC) README.md SECURITY.md CHANGELOG.md examples/demo/casemate.toml
	install -D -m 644 dbus-policy/org.casemate.Casemate1.service.in $(DESTDIR)$(SHARE)/$(SERVICE)
	install -D -m 644 systemd/casemated.service.in $(DESTDIR)$(SHARE)/$(UNIT)
	install -D -m 644 systemd/casemate-environment@.service.in $(DESTDIR)$(SHARE)/$(ENVIRONMENT_UNIT)
	sed -i 's|@LIBEXECDIR@|$(LIBEXEC)|; s|@BINDIR@|$(PREFIX)/bin|' $(addprefix $(DESTDIR)$(SHARE)/,$(SERVICE) $(UNIT) $(ENVIRONMENT_UNIT))
	install -D -m 644 dbus-policy/org.casemate.Casemate1.conf $(DESTDIR)$(SHARE)/$(BUS_POLICY)
	install -d $(dir $(addprefix $(DESTDIR)$(SHARE)/,$(BASH_COMPLETION) $(ZSH_COMPLETION) $(FISH_COMPLETION)))
	$(BINARIES)/casemate completions bash > $(DESTDIR)$(SHARE)/$(BASH_COMPLETION)
	$(BINARIES)/casemate completions zsh > $(DESTDIR)$(SHARE)/$(ZSH_COMPLETION)
	$(BINARIES)/casemate completions fish > $(DESTDIR)$(SHARE)/$(FISH_COMPLETION)
	$(BINARIES)/casemate man $(DESTDIR)$(SHARE)/man/man1

# Directories that are left empty go too, as far as Debian has none of them of its own.
uninstall: ## Remove what install installed; stores stay (`casemate purge` before it removes one's own)
	rm -rf $(DESTDIR)$(PREFIX)/bin/casemate $(DESTDIR)$(LIBEXEC) $(DESTDIR)$(DATA) $(DESTDIR)$(DOC) $(DESTDIR)$(SHARE)/man/man1/casemate*.1
	cd $(DESTDIR)$(SHARE) && rm -f $(SERVICE) $(BUS_POLICY) $(UNIT) $(ENVIRONMENT_UNIT) $(BASH_COMPLETION) $(ZSH_COMPLETION) $(FISH_COMPLETION)
	cd $(DESTDIR)$(SHARE) && for directory in $(dir $(SERVICE) $(BUS_POLICY) $(UNIT) $(BASH_COMPLETION) $(ZSH_COMPLETION) $(FISH_COMPLETION)) doc man/man1 ../lib ../libexec; do \
		if [ -d $$directory ]; then rmdir -p --ignore-fail-on-non-empty $$directory; fi; done

clean: ## Remove what was built
	$(CARGO) clean
