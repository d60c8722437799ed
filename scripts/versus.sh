#!/usr/bin/env bash
# Compares diskplane with qemu-storage-daemon over vhost-user-blk: the same O_DIRECT file, the same load,
# in turn (A B A B …), and prints medians and ratios.
#
#   scripts/versus.sh [raw|qcow2] [samples] [seconds]        (default: raw, 5 samples of 2 seconds)
#
# Environment: RW="randread randwrite", BS=4K, DEPTH=32, QUEUES=1, SIZE=2G, ENGINES="native io_uring" (of
# qemu-storage-daemon; the best one counts), AIO=auto (of diskplane), DIR=target/versus.
# The machine should be idle. Files are fully allocated, so that neither side grows them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

format=${1:-raw} samples=${2:-5} seconds=${3:-2}
read -ra rws <<<"${RW:-randread randwrite}"
read -ra engines <<<"${ENGINES:-native io_uring}"
bs=${BS:-4K} depth=${DEPTH:-32} queues=${QUEUES:-1} size=${SIZE:-2G} aio=${AIO:-auto}
dir=${DIR:-target/versus}
target=${CARGO_TARGET_DIR:-target}
server=$target/release/diskplane
[[ -x $server ]] || cargo build --release --locked -p diskplane

mkdir -p "$dir"
work=$(mktemp -d)
pid=
stop() {
    if [[ -n $pid ]]; then
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
        pid=
    fi
}
trap 'stop; rm -rf "$work"' EXIT

image=$dir/versus.$format
if [[ ! -e $image ]]; then
    qemu-img create -q -f "$format" -o preallocation=full "$image" "$size"
    # Written once, so that no block is an unwritten extent.
    qemu-img bench -q -w -c $(($(numfmt --from=iec "$size") / 1048576)) -d 8 -s 1M -f "$format" "$image" >/dev/null
fi

# Starts a server on $work/socket and waits until it listens.
start() { # diskplane | engine of qemu-storage-daemon
    rm -f "$work/socket"
    if [[ $1 == diskplane ]]; then
        "$server" serve -f "$format" "$image" --vhost-user "$work/socket" --queues "$queues" \
            --cache none --aio "$aio" >"$work/log" 2>&1 &
    else
        local blockdev="driver=file,node-name=f,filename=$image,cache.direct=on,aio=$1" node=f
        local extra=()
        if [[ $format == qcow2 ]]; then
            extra=(--blockdev "driver=qcow2,node-name=q,file=f")
            node=q
        fi
        qemu-storage-daemon --blockdev "$blockdev" "${extra[@]}" \
            --export "type=vhost-user-blk,id=e,node-name=$node,addr.type=unix,addr.path=$work/socket,writable=on,num-queues=$queues" \
            >"$work/log" 2>&1 &
    fi
    pid=$!
    until [[ -S $work/socket ]]; do
        kill -0 "$pid" || { cat "$work/log" >&2; exit 1; }
    done
}

median() { sort -g | awk '{ v[NR] = $1 } END { print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }

for rw in "${rws[@]}"; do
    for ((i = 0; i < samples; i++)); do
        for who in diskplane "${engines[@]}"; do
            start "$who"
            "$server" bench load --vhost-user "$work/socket" --rw "$rw" --bs "$bs" --depth "$depth" \
                --queues "$queues" --seconds "$seconds" --pid "$pid" >"$work/out"
            stop
            # IOPS and microseconds of server CPU per I/O.
            sed -n 's/.*: *\([0-9]*\) IOPS .*/\1/p' "$work/out" >>"$work/$who.$rw.iops"
            sed -n 's/^CPU per I\/O:.* server \([0-9.]*\) .*/\1/p' "$work/out" >>"$work/$who.$rw.cpu"
        done
    done
    for who in diskplane "${engines[@]}"; do
        printf '%s %s %s depth %s: %-10s %9.0f IOPS  %6.2f us CPU per I/O (medians of %s)\n' "$format" "$rw" "$bs" "$depth" \
            "$who" "$(median <"$work/$who.$rw.iops")" "$(median <"$work/$who.$rw.cpu")" "$samples"
    done
done
