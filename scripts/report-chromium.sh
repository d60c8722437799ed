#!/usr/bin/env bash
# Opens a report or a picture of one (a chart, a flame graph) in headless Chromium and says whether it is what its data say.
#
#   scripts/report-chromium.sh REPORT.html|PICTURE.svg [SEEN.png]
#
# Checks that the page loads without a console error or a request to anywhere, that its own script found every number
# on it equal to the embedded data, and that its charts take room; of a picture, that it is sound XML and has bars or frames.
# With SEEN it also stores what is seen.
# Needs Chromium (Debian: apt-get install chromium); exits 77 where there is none.
set -euo pipefail

page=${1:?a report}
picture=${2:-}
script=${0##*/}
die() { printf '%s: %s\n' "$script" "$*" >&2; exit 1; }

chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
[[ -n $chromium ]] || { printf '%s: no chromium\n' "$script" >&2; exit 77; }
[[ -f $page ]] || die "$page: no such file"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# No network at all: a page that needs some would show it as an error.
options=(--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --user-data-dir="$work/profile"
    --host-resolver-rules='MAP * ~NOTFOUND' --enable-logging=stderr --v=0 --hide-scrollbars)
url=file://$(realpath "$page")

timeout 120 "$chromium" "${options[@]}" --dump-dom "$url" >"$work/dom" 2>"$work/log" || die "chromium failed: $(tail -3 "$work/log")"
if grep -E 'CONSOLE.*(Error|error|Refused|Failed)' "$work/log"; then
    die "$page: errors on the console"
fi
if [[ $page == *.svg ]]; then
    # Chromium shows what it could read of a broken one below this.
    ! grep -q '<parsererror' "$work/dom" || die "$page: broken: $(grep -o 'error on line[^<]*' "$work/dom" | head -1)"
    drawn=$(grep -oE '<(rect|path|line|circle)[ />]' "$work/dom" | wc -l)
    [[ $drawn -gt 0 ]] || die "$page: nothing is drawn"
    said="$drawn shapes"
else
    checked=$(grep -o 'data-checked="[^"]*"' "$work/dom" | head -1)
    case $checked in
        data-checked=\"ok\ 0\") die "$page: there is no number on it" ;;
        data-checked=\"ok*) ;;
        *) die "$page: numbers differ from the data, or were not looked at: ${checked:-no data-checked}" ;;
    esac
    charts=$(grep -o '<svg ' "$work/dom" | wc -l)
    [[ $charts -gt 0 ]] || die "$page: no charts"
    said="$checked, $charts charts"
fi
if [[ -n $picture ]]; then
    timeout 120 "$chromium" "${options[@]}" --window-size=1100,5000 --screenshot="$(realpath -m "$picture")" "$url" \
        >/dev/null 2>&1 || die "no picture"
fi
printf '%s: %s\n' "$page" "$said"
