#!/usr/bin/env bash
# Test suites of others that call qemu-img: first with the installed one, then with `diskplane qemu-img` in its place.
#
#   scripts/foreign.sh CHECKOUT [PYTEST_ARGUMENT…]
#
# CHECKOUT is a folder with the suite's sources, ready to run its tests by pytest; nothing is fetched. PYTHON names the
# Python that has what it needs (python3). Without arguments the tests are run that call qemu-img, of
#   ovirt-imageio   test/               (built in place: python setup.py build_ext --build-lib .)
#   vdsm            tests/storage/qemuimg_test.py
#   oslo.utils      oslo_utils/tests/imageutils
# DISKPLANE names the program to try; without it one is built. The script fails where a test passes with the installed
# qemu-img and not with diskplane. FOREIGN_DIR keeps what the tests said.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 1; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "$1" && pwd)
shift
python=${PYTHON:-python3}

if [ -z "${DISKPLANE:-}" ]; then
    (cd "$here/.." && cargo build --profile quick -p diskplane --locked)
    DISKPLANE=${CARGO_TARGET_DIR:-$here/../target}/quick/diskplane
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=${FOREIGN_DIR:-$work}
mkdir -p "$out" "$work/theirs" "$work/ours"
ln -s "$(command -v qemu-img)" "$work/theirs/qemu-img"
ln -s "$(realpath "$DISKPLANE")" "$work/ours/qemu-img"

folder=.
if [ $# -gt 0 ]; then
    :
elif [ -d "$checkout/ovirt_imageio" ]; then
    set -- -m 'not benchmark' test
elif [ -d "$checkout/lib/vdsm" ]; then
    folder=tests
    set -- storage/qemuimg_test.py
elif [ -d "$checkout/oslo_utils" ]; then
    set -- oslo_utils/tests/imageutils
else
    echo "$checkout: no suite that is known: name its tests" >&2
    exit 1
fi

# vdsm calls qemu-img by its whole path.
cat >"$work/qemu_img_by_path.py" <<'PLUGIN'
import shutil

try:
    from vdsm.common.cmdutils import CommandPath
    from vdsm.storage import qemuimg
except ImportError:
    pass
else:
    qemuimg._qemuimg = CommandPath("qemu-img", shutil.which("qemu-img"))
PLUGIN

# Runs the tests with the qemu-img in $work/$1, and prints the names of those that pass.
passing() {
    local who=$1
    shift
    (cd "$checkout/$folder" &&
        PATH=$work/$who:$PATH PYTHONPATH=$work:$checkout/lib:$checkout${PYTHONPATH:+:$PYTHONPATH} \
            "$python" -m pytest -q -rA -p no:cacheprovider -p qemu_img_by_path -o timeout=600 --basetemp "$work/$who.tmp" \
            --color=no --continue-on-collection-errors "$@" </dev/null >"$out/$who.log" 2>&1 || true)
    # Names that are made of memory's addresses are new each time.
    sed -n 's/^PASSED \([^ ]*\).*/\1/p' "$out/$who.log" | sed 's/0x[0-9a-f]*/ADDRESS/g' | sort -u
}

passing theirs "$@" >"$work/theirs.passing"
[ -s "$work/theirs.passing" ] || { tail -20 "$out/theirs.log"; echo "no test passes here with the installed qemu-img"; exit 1; }
passing ours "$@" >"$work/ours.passing"
comm -23 "$work/theirs.passing" "$work/ours.passing" >"$work/differ"
both=$(comm -12 "$work/theirs.passing" "$work/ours.passing" | wc -l)
echo "$(basename "$checkout"): $(wc -l <"$work/theirs.passing") pass with qemu-img, $both of these with diskplane qemu-img"
sed "s/^/DIFFERS: /" "$work/differ"
[ ! -s "$work/differ" ]
