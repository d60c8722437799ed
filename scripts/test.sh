#!/usr/bin/env bash
# Runs every test of the workspace, with nextest where it is installed. Arguments go to the runner.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The tools of file systems are in folders that a user's PATH on Debian has not.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# What a test says when it fails names its place; the frames above it would only bury that.
export RUST_BACKTRACE=0

cargo=${CARGO:-cargo}
if "$cargo" nextest --version >/dev/null 2>&1; then
    # nextest leaves out the examples in the documentation. They go first, so that what is read last is
    # the summary of the tests.
    "$cargo" test --workspace --locked --doc --quiet
    "$cargo" nextest run --config-file scripts/nextest.toml --workspace --locked --no-fail-fast "$@"
else
    "$cargo" test --workspace --locked --no-fail-fast "$@"
fi
