#!/usr/bin/env bash
# An experiment's cells in a Linux guest, on virtio-blk and IDE, through diskplane and its peers: some minutes under
# emulation. Needs `make setup`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec "${CARGO:-cargo}" test --locked -p diskplane --test guest_experiment "$@"
