#!/usr/bin/env bash
# Crash enumeration with one seed after the other, for MINUTES (10): every workload on every image, with more states than
# `make test` looks at, and every operation failing. Seeds are printed; a failure says how to see it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec "${CARGO:-cargo}" run --quiet --locked --release -p crash -- soak --minutes "${MINUTES:-10}" "$@"
