#!/usr/bin/env bash
# QEMU's own tests of qemu-img (tests/qemu-iotests), first with the installed qemu-img, then those that pass with it
# once more with `diskplane qemu-img` in its place.
#
#   scripts/iotests.sh QEMU_CHECKOUT [FORMAT] [TEST…]
#
# QEMU_CHECKOUT is a folder with QEMU's sources of the version that is installed; nothing is fetched. FORMAT as after
# ./check (qcow2, raw, qed, vpc, …), qcow2 where none is said. The other programs of QEMU are the installed ones; where
# they lack the accelerator qtest, guests are emulated that halt at once. DISKPLANE names the program to try; without it
# one is built. IOTESTS_DIR keeps what the tests said. Tests in scripts/iotests.differs, format and name in a line with
# the reason behind, are expected to differ; the script fails where another does.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 1; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tests=$(cd "$1/tests/qemu-iotests" && pwd)
format=${2:-qcow2}
shift $(($# > 1 ? 2 : 1))

if [ -z "${DISKPLANE:-}" ]; then
    (cd "$here/.." && cargo build --profile quick -p diskplane --locked)
    DISKPLANE=${CARGO_TARGET_DIR:-$here/../target}/quick/diskplane
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=${IOTESTS_DIR:-$work}
mkdir -p "$out"
ln -s "$(realpath "$DISKPLANE")" "$work/qemu-img"

program() { command -v "$1" || { echo "$1 is not installed" >&2; exit 1; }; }
QEMU_PROG=$(program qemu-system-x86_64)
QEMU_IO_PROG=$(program qemu-io)
QEMU_NBD_PROG=$(program qemu-nbd)
QSD_PROG=$(program qemu-storage-daemon)
if ! "$QEMU_PROG" -accel help | grep -qx qtest; then
    # What runs from the reset vector on: cli; hlt; and again.
    head -c 65536 /dev/zero >"$work/halt.bin"
    printf '\372\364\353\375' | dd of="$work/halt.bin" bs=1 seek=65520 conv=notrunc status=none
    printf '#!/usr/bin/env bash\nexec %q "${@/#qtest/tcg}" -bios %q\n' "$QEMU_PROG" "$work/halt.bin" >"$work/qemu"
    chmod +x "$work/qemu"
    QEMU_PROG=$work/qemu
fi
export QEMU_PROG QEMU_IO_PROG QEMU_NBD_PROG QSD_PROG

# Runs tests with the qemu-img $1, and prints the names of those that pass.
passing() {
    local name=$2
    shift
    shift
    mkdir -p "$work/$name"
    (cd "$tests" && QEMU_IMG_PROG=$program TEST_DIR=$work/$name SOCK_DIR=$work/$name.sock \
        python3 ./check --color off "-$format" -tap "$@" </dev/null 2>/dev/null || true) |
        tee "$out/$format.$name.tap" | sed -n "/# SKIP/d; s/^ok $format //p" | sort
}

program=$(program qemu-img)
if [ $# -gt 0 ]; then
    passing "$program" theirs "$@" >"$work/theirs.passing"
else
    passing "$program" theirs -x slow >"$work/theirs.passing"
fi
program=$work/qemu-img
mapfile -t both <"$work/theirs.passing"
[ ${#both[@]} -gt 0 ] || { echo "no test passes here with the installed qemu-img"; exit 1; }
passing "$program" ours "${both[@]}" >"$work/ours.passing"

comm -23 "$work/theirs.passing" "$work/ours.passing" >"$work/differ"
sed -n "s/^$format \([^ ]*\).*/\1/p" "$here/iotests.differs" | sort >"$work/known"
echo "$format: ${#both[@]} pass with qemu-img, $(wc -l <"$work/ours.passing") of these with diskplane qemu-img"
comm -12 "$work/differ" "$work/known" | sed "s/^/differs, as known: /"
comm -13 "$work/differ" "$work/known" | sed "s/^/known to differ, but did not (or did not run): /"
comm -23 "$work/differ" "$work/known" >"$work/new"
sed "s/^/DIFFERS: /" "$work/new"
[ ! -s "$work/new" ]
