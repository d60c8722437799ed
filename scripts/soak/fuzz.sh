#!/usr/bin/env bash
# Fuzzes all that parses bytes from outside, with the address sanitizer:
#
#   scripts/soak/fuzz.sh [TARGET…]          (default: all)
#
# FUZZ_SECONDS (60) is the time for each target. The corpora grow in the target folder from one run to the next; what
# they begin with is made here. An input that fails is left in fuzz/artifacts, and how to run it again is said.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

scripts/setup.sh soak
cargo=${CARGO:-cargo}
target=${CARGO_TARGET_DIR:-$PWD/target}
corpora=$target/fuzz-corpus
targets=("$@")
[[ $# -gt 0 ]] || targets=(qcow2_open qcow2_check qcow2_edit qcow2_meddled other_images nbd vhost_user)

"$cargo" run --quiet --locked -p testkit --example fuzz_seeds -- "$corpora"
# What the threads of a server hold at the end is no leak; one that grows meets the limit of memory.
export ASAN_OPTIONS=detect_leaks=0
# Sanitizers are unstable options, which the one toolchain that is there takes with this.
export RUSTC_BOOTSTRAP=1
for name in "${targets[@]}"; do
    "$cargo" fuzz run --fuzz-dir fuzz --target-dir "$target/fuzz" "$name" "$corpora/$name" -- \
        -max_total_time="${FUZZ_SECONDS:-60}" -timeout=60 -rss_limit_mb=2048 -max_len=65536 -print_final_stats=1
done
