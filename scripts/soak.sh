#!/usr/bin/env bash
# Runs the long tests, which are the scripts in soak/, one after the other, and says which failed. An argument picks
# those whose names contain it. MINUTES is the time for crash enumeration; each script says what else may be set.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

failed=()
for script in scripts/soak/*"${1:-}"*.sh; do
    echo "== $script"
    "$script" || failed+=("$script")
done
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
