#!/usr/bin/env bash
# Our load generators beside independent ones, in turns on the same file and the same servers: do they say the same?
#
#   scripts/generators.sh [FOLDER]
#
#   FOLDER      where three files of 256 MiB lie while it runs (default: target/generators)
#   ROUNDS      how often each has its turn (default 9)
#   SECONDS_EACH  how long a turn is (default 2)
#   DISKPLANE   the program (default: target/release/diskplane)
#   VHOST_PEER  the independent driver of vhost-user-blk (default: target/release/examples/vhost_peer, which
#               cargo build --release -p bench --example vhost_peer makes)
#
# Prints a table: medians of the rounds, and the ratio of ours to theirs, taken round by round: its median, and as an interval its
# second smallest and second largest value, which of 9 rounds holds the median with a certainty of 96 %. Needs fio with its nbd
# engine, qemu-nbd and qemu-img; a row whose program is not there is left out.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$root/target/generators}
rounds=${ROUNDS:-9}
each=${SECONDS_EACH:-2}
diskplane=${DISKPLANE:-$root/target/release/diskplane}
vhost_peer=${VHOST_PEER:-$root/target/release/examples/vhost_peer}
script=${0##*/}
die() { printf '%s: %s\n' "$script" "$*" >&2; exit 1; }
[[ -x $diskplane ]] || die "$diskplane is not there: cargo build --release, or name one by DISKPLANE"
[[ $rounds -ge 3 ]] || die "ROUNDS=$rounds: an interval takes 3 at least"

work=$(mkdir -p "$folder" && mktemp -d "$folder/run.XXXXXX")
servers=()
end() {
    for pid in "${servers[@]}"; do kill "$pid" 2>/dev/null || true; done
    rm -rf "$work"
}
trap end EXIT
trap 'exit 130' INT TERM

file=$work/disk.raw
dd if=/dev/urandom of="$file" bs=1M count=256 conv=fsync status=none

# Waits for a socket, for 20 seconds at most.
await() {
    for _ in $(seq 200); do [[ -S $1 ]] && return; sleep 0.1; done
    die "$1: nobody listens"
}
# Servers lock what they serve.
cp --sparse=never "$file" "$work/served.raw"
"$diskplane" serve -f raw "$work/served.raw" --cache none --nbd "unix:$work/ours" >"$work/ours.log" 2>&1 &
servers+=($!)
await "$work/ours"
if command -v qemu-nbd >/dev/null; then
    cp --sparse=never "$file" "$work/other.raw"
    qemu-nbd -t -f raw --cache=none --aio=io_uring -e 4 -k "$work/theirs" "$work/other.raw" >"$work/theirs.log" 2>&1 &
    servers+=($!)
    await "$work/theirs"
fi
# A disk for vhost-user-blk alone, to which both generators come in turns.
if [[ -x $vhost_peer ]]; then
    cp --sparse=never "$file" "$work/guest.raw"
    "$diskplane" serve -f raw "$work/guest.raw" --cache none --vhost-user "$work/guest" >"$work/guest.log" 2>&1 &
    servers+=($!)
    await "$work/guest"
fi
uri() { printf 'nbd+unix:///?socket=%s' "$work/$1"; }

# IOPS of a report of ours: its only line that says so.
iops() { sed -n 's/^ *"iops": *\([0-9.]*\),*$/\1/p' | head -1; }
ours() { "$diskplane" bench load --json --seconds "$each" "$@" | iops; }
fios() { "$diskplane" bench load --json --seconds "$each" --engine fio "$@" | iops; }
# Requests of 4 KiB one behind the other, until so many are over: qemu-img bench knows no time.
images() { # uri requests
    local said
    said=$(qemu-img bench -f raw -c "$2" -d 32 -s 4096 "$1" | sed -n 's/^Run completed in \([0-9.]*\) seconds.*/\1/p')
    awk -v n="$2" -v s="$said" 'BEGIN { printf "%.1f\n", n / s }'
}

# A row: our command and theirs, by turns, the first of each round by turns too.
row() { # name ours… -- theirs…
    local name=$1 own=() other=() own_all=() other_all=()
    shift
    while [[ $1 != -- ]]; do own+=("$1"); shift; done
    shift
    other=("$@")
    local a b
    for round in $(seq "$rounds"); do
        if ((round % 2)); then
            a=$("${own[@]}"); b=$("${other[@]}")
        else
            b=$("${other[@]}"); a=$("${own[@]}")
        fi
        own_all+=("$a") other_all+=("$b")
    done
    paste <(printf '%s\n' "${own_all[@]}") <(printf '%s\n' "${other_all[@]}") | awk -v name="$name" '
        function sorted(from, to,   i, j, t) {
            for (i = 1; i <= NR; i++) to[i] = from[i]
            for (i = 2; i <= NR; i++) for (j = i; j > 1 && to[j - 1] > to[j]; j--) { t = to[j]; to[j] = to[j - 1]; to[j - 1] = t }
        }
        function median(s) { return NR % 2 ? s[(NR + 1) / 2] : (s[NR / 2] + s[NR / 2 + 1]) / 2 }
        { a[NR] = $1; b[NR] = $2; r[NR] = $1 / $2 }
        END {
            sorted(a, sa); sorted(b, sb); sorted(r, sr)
            edge = NR >= 6 ? 2 : 1
            printf "| %s | %.0f | %.0f | %.2f | %.2f–%.2f |\n", name, median(sa), median(sb), median(sr), sr[edge], sr[NR + 1 - edge]
        }'
}

printf '| load | ours, IOPS | theirs, IOPS | ratio | interval |\n|---|---|---|---|---|\n'
if command -v fio >/dev/null; then
    for rw in randread randwrite; do
        row "file, io_uring, O_DIRECT: $rw 4 KiB, depth 32, beside fio" \
            ours --file "$file" --engine io_uring --rw $rw -- fios --file "$file" --rw $rw
    done
    row "file, io_uring, O_DIRECT: randread 4 KiB, depth 1, beside fio" \
        ours --file "$file" --engine io_uring --rw randread --depth 1 -- fios --file "$file" --rw randread --depth 1
    for server in ours theirs; do
        [[ -S $work/$server ]] || continue
        [[ $server = ours ]] && of=diskplane || of=qemu-nbd
        row "NBD, $of: randread 4 KiB, depth 32, beside fio (nbd)" \
            ours --nbd "$(uri $server)" --rw randread -- fios --nbd "$(uri $server)" --rw randread
    done
fi
if [[ -x $vhost_peer ]]; then
    # The crate knows no indirect descriptors.
    for load in 'randread 32' 'randwrite 32' 'randread 1' 'randwrite 1'; do
        read -r rw depth <<<"$load"
        row "vhost-user-blk, diskplane: $rw 4 KiB, depth $depth, beside the crate virtio-driver" \
            ours --vhost-user "$work/guest" --no-indirect --rw "$rw" --depth "$depth" -- \
            "$vhost_peer" "$work/guest" "$rw" "$depth" "$each"
    done
fi
if command -v qemu-img >/dev/null; then
    requests=$(awk -v s="$each" 'BEGIN { printf "%d", s * 20000 }')
    for server in ours theirs; do
        [[ -S $work/$server ]] || continue
        [[ $server = ours ]] && of=diskplane || of=qemu-nbd
        row "NBD, $of: read 4 KiB, depth 32, beside qemu-img bench" \
            ours --nbd "$(uri $server)" --rw read -- images "$(uri $server)" "$requests"
    done
fi
