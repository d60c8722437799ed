#!/usr/bin/env bash
# Runs the long tests, which are the scripts in soak/, one after the other, and says at the end how each went and how
# long it took. An argument picks those whose names contain it. MINUTES is the time for crash enumeration; each
# script says what else may be set.
set -uo pipefail
shopt -s nullglob
cd "$(dirname "${BASH_SOURCE[0]}")/.."

summary=() failed=0
for script in scripts/soak/*"${1:-}"*.sh; do
    echo "== $script"
    began=$SECONDS result=passed
    "$script" || result=FAILED failed=1
    summary+=("$(printf '%-8s %6d s  %s' "$result" $((SECONDS - began)) "$script")")
done
if [[ ${#summary[@]} -eq 0 ]]; then
    echo "no script in scripts/soak has '${1:-}' in its name" >&2
    exit 2
fi
echo "== summary"
printf '%s\n' "${summary[@]}"
exit $failed
