#!/usr/bin/env bash
# The long part of the exchange of images with QEMU: 200 images of all kinds, each changed by both in turns, from a seed
# that is new each time and that a failure names with the command that shows it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export DISKPLANE_EXCHANGE_ROUNDS=${DISKPLANE_EXCHANGE_ROUNDS:-200}
export DISKPLANE_EXCHANGE_SEED=${DISKPLANE_EXCHANGE_SEED:-$((RANDOM * 1000))}
export DISKPLANE_EXCHANGE_STEPS=${DISKPLANE_EXCHANGE_STEPS:-10}
echo "exchange: seeds from $DISKPLANE_EXCHANGE_SEED on"
exec "${CARGO:-cargo}" test --locked -p diskplane --test exchange "$@"
