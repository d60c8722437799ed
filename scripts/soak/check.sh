#!/usr/bin/env bash
# The long comparison of `check` with qemu-img: CHECK_ROUNDS damaged images of each kind of image (or of those whose name
# contains CHECK_KIND), from seed CHECK_SEED on, which is new each time. A failure names the kind and the seed: that
# seed's last six digits as CHECK_SEED and CHECK_ROUNDS=1 replay it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export CHECK_ROUNDS=${CHECK_ROUNDS:-100}
export CHECK_SEED=${CHECK_SEED:-$((RANDOM * 30))}
# The images are small and written often.
[[ -n "${TMPDIR:-}" || ! -d /dev/shm ]] || export TMPDIR=/dev/shm
exec "${CARGO:-cargo}" test --release --locked -p tool --test it differential::damaged -- --nocapture "$@"
