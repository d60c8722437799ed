#!/usr/bin/env bash
# The long part of the tests that kill the server: 50 kills of each kind of image behind each export, of a seed that
# is new each time and that a failure names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export DISKPLANE_KILL_ROUNDS=${DISKPLANE_KILL_ROUNDS:-50}
export DISKPLANE_KILL_SEED=${DISKPLANE_KILL_SEED:-$RANDOM}
exec "${CARGO:-cargo}" test --locked -p diskplane --test killed "$@"
