# Thin over cargo. `make help` lists the targets.
PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
TARGET := target/$(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')/release
WORKERS := casemate-fetch casemate-index casemate-unpack casemate-tree casemate-init
LIBEXEC := $(PREFIX)/libexec/casemate
SHARE := $(PREFIX)/share

.PHONY: help setup build demo test soak lint interfaces install uninstall clean

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

soak: ## The suite with full counts
	@CASEMATE_SOAK=1 scripts/test

lint: ## Format and clippy, warnings denied; cargo deny where it is installed
	@scripts/lint

interfaces: ## Generate the proxies from interfaces/*.xml
	CASEMATE_WRITE_PROXIES=1 $(CARGO) test --release -p casemate-interfaces --test proxies

install: build ## Install into $(DESTDIR)$(PREFIX)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(LIBEXEC) $(DESTDIR)$(SHARE)/casemate/sources.d $(DESTDIR)$(SHARE)/casemate/keys/debian
	install -d $(DESTDIR)$(SHARE)/dbus-1/services $(DESTDIR)$(SHARE)/dbus-1/session.d $(DESTDIR)$(PREFIX)/lib/systemd/user $(DESTDIR)$(SHARE)/man/man1
	install -m 755 $(TARGET)/casemate $(DESTDIR)$(PREFIX)/bin/casemate
	install -m 755 $(TARGET)/casemated $(addprefix $(TARGET)/,$(WORKERS)) $(DESTDIR)$(LIBEXEC)
	install -m 644 sources.d/*.toml $(DESTDIR)$(SHARE)/casemate/sources.d
	install -m 644 keys/debian/*.asc $(DESTDIR)$(SHARE)/casemate/keys/debian
	install -m 644 policy.toml $(DESTDIR)$(SHARE)/casemate/policy.toml
	sed 's|@LIBEXECDIR@|$(LIBEXEC)|' dbus-policy/org.casemate.Casemate1.service.in > $(DESTDIR)$(SHARE)/dbus-1/services/org.casemate.Casemate1.service
	install -m 644 dbus-policy/org.casemate.Casemate1.conf $(DESTDIR)$(SHARE)/dbus-1/session.d
	sed 's|@LIBEXECDIR@|$(LIBEXEC)|' systemd/casemated.service.in > $(DESTDIR)$(PREFIX)/lib/systemd/user/casemated.service
	$(TARGET)/casemate man $(DESTDIR)$(SHARE)/man/man1

uninstall: ## Remove what install installed
	rm -rf $(DESTDIR)$(PREFIX)/bin/casemate $(DESTDIR)$(LIBEXEC) $(DESTDIR)$(SHARE)/casemate
	rm -f $(DESTDIR)$(SHARE)/dbus-1/services/org.casemate.Casemate1.service $(DESTDIR)$(SHARE)/dbus-1/session.d/org.casemate.Casemate1.conf
	rm -f $(DESTDIR)$(PREFIX)/lib/systemd/user/casemated.service $(DESTDIR)$(SHARE)/man/man1/casemate*.1

clean: ## Remove what was built
	$(CARGO) clean
