# Everything that a person or the integration machine runs. `make` alone explains itself.

CARGO ?= cargo

.DEFAULT_GOAL := help
.PHONY: help setup build lint test soak demo bench clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install missing system packages (as root; otherwise name them) and make the test guest
	@scripts/setup.sh test
	@scripts/guest-build.sh >/dev/null

build: ## build the release binary, target/release/diskplane
	@scripts/setup.sh build
	$(CARGO) build --release --locked -p diskplane

lint: ## check the format and run clippy, warnings denied; and that fuzz/Cargo.lock is up to date
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@$(CARGO) metadata --quiet --locked --format-version 1 --manifest-path fuzz/Cargo.toml >/dev/null || \
		{ echo 'fuzz/Cargo.lock is behind: cargo update --workspace --manifest-path fuzz/Cargo.toml' >&2; exit 1; }

# The recipe is one sequence, not prerequisites: with -j they would compete for the build lock and the cores.
test: ## all the set-up it needs, lint, and every test
	@$(MAKE) --no-print-directory setup
	@$(MAKE) --no-print-directory lint
	@scripts/test.sh

soak: ## the long tests: crash enumeration for MINUTES (10), 50 kills, fuzzing, check beside qemu-img, an experiment in a guest (ARGS=crash for one)
	@$(MAKE) --no-print-directory setup
	@scripts/soak.sh $(ARGS)

demo: ## boot a Linux guest on an overlay that diskplane serves, and check what is left
	@scripts/demo.sh

bench: ## compare with the peers, cell by cell (an hour, 16 GiB; ARGS=--quick for less)
	@scripts/setup.sh bench
	@$(MAKE) --no-print-directory build
	$${CARGO_TARGET_DIR:-target}/release/diskplane bench versus --dir $${CARGO_TARGET_DIR:-target}/versus \
		--markdown $${CARGO_TARGET_DIR:-target}/versus.md $(ARGS)

clean: ## remove all that was built
	$(CARGO) clean
	rm -rf target
