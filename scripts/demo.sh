#!/usr/bin/env bash
# Shows diskplane at work, from nothing: a base image with a real file system, an overlay on it that
# diskplane makes and serves, a Linux guest that uses it, and QEMU's tools that check what is left.
#
#   scripts/demo.sh          (or: make demo)
#
#   DISKPLANE_BIN=PATH       show this binary instead of building one
#   DEMO_BASE=raw|qcow2      the format of the base image (default raw)
#   DEMO_QUEUES=N            virtqueues and I/O threads (default 2)
#   DEMO_SECONDS=N           how long each figure is measured (default 4)
#   DEMO_KEEP=1              keep the images as well
#
# Everything is made in a temporary folder and removed; after a failure the logs stay in target/demo-logs.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
base_format=${DEMO_BASE:-raw}
queues=${DEMO_QUEUES:-2}
seconds=${DEMO_SECONDS:-4}
guest_limit_s=300
logs=$root/target/demo-logs

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '==> %s\n' "$*"; }

work=
server_pid=
finished=no

# Whatever ends this script: no process stays, no temporary file stays, and after a failure the logs do.
clean_up() {
    local status=$?
    trap - EXIT
    if [[ -n $server_pid ]]; then
        kill -9 "$server_pid" 2>/dev/null || true
    fi
    if [[ -n $work ]]; then
        if [[ $finished != yes ]]; then
            rm -rf "$logs"
            mkdir -p "$logs"
            cp "$work"/*.log "$logs"/ 2>/dev/null || true
            printf 'demo: the logs are in %s\n' "$logs" >&2
        fi
        if [[ ${DEMO_KEEP:-} == 1 ]]; then
            printf 'demo: the images are in %s\n' "$work" >&2
        else
            rm -rf "$work"
        fi
    fi
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

die() { # message [log to show the end of]
    printf 'demo: %s\n' "$1" >&2
    if [[ -n ${2:-} && -s $2 ]]; then
        tail -n 25 "$2" | sed 's/^/    /' >&2
    fi
    exit 1
}

# Runs a command with its output in a log, and shows the log when it fails.
logged() { # name command…
    local name=$1
    shift
    "$@" >"$work/$name.log" 2>&1 || die "this failed: $*" "$work/$name.log"
}

# --- What it takes --------------------------------------------------------------------------------------

scripts/setup.sh demo
guest=$(scripts/guest-build.sh)
if [[ -n ${DISKPLANE_BIN:-} ]]; then
    diskplane=$DISKPLANE_BIN
else
    say 'building diskplane'
    "${CARGO:-cargo}" build --release --locked -p diskplane
    diskplane=${CARGO_TARGET_DIR:-$root/target}/release/diskplane
fi
[[ -x $diskplane ]] || die "no program $diskplane"

# --- Images ---------------------------------------------------------------------------------------------

work=$(mktemp -d "${TMPDIR:-/tmp}/diskplane-demo.XXXXXX")

say "making a $base_format base image with an ext4 file system"
tree=$work/tree
mkdir -p "$tree/base/text"
# Text that is there in any checkout, and data that does not compress.
find crates guest scripts -type f -size -200k -print0 | xargs -0 cp --parents -t "$tree/base/text"
for kb in 4 100 5000; do
    head -c "${kb}K" /dev/urandom >"$tree/base/random-$kb"
done
(cd "$tree" && find base -type f -printf '%P\0' | (cd base && xargs -0 sha256sum) >SHA256SUMS)
mv "$tree/SHA256SUMS" "$tree/base/"
truncate -s 1G "$work/base.raw"
logged mkfs mkfs.ext4 -q -d "$tree" "$work/base.raw"
base=$work/base.$base_format
if [[ $base_format != raw ]]; then
    logged convert qemu-img convert -f raw -O "$base_format" "$work/base.raw" "$base"
    rm "$work/base.raw"
fi
base_sum=$(sha256sum <"$base")

say 'making an overlay on it: diskplane create'
overlay=$work/overlay.qcow2
logged create "$diskplane" create -f qcow2 -b "$base" -F "$base_format" "$overlay"

# --- The server -----------------------------------------------------------------------------------------

# Starts a server in the background and waits for the line with which it says that its sockets listen.
start_server() { # name command…
    local name=$1 tick
    shift
    "$@" >"$work/$name.out.log" 2>"$work/$name.log" &
    server_pid=$!
    for ((tick = 0; tick < 300; tick++)); do
        grep -q '^ready' "$work/$name.out.log" && return
        kill -0 "$server_pid" 2>/dev/null || { server_pid=; die "the server ended at once: $*" "$work/$name.log"; }
        sleep 0.1
    done
    die "the server did not become ready within 30 s: $*" "$work/$name.log"
}

stop_server() { # name
    local status=0 pid=$server_pid
    kill -TERM "$pid" 2>/dev/null || true
    wait "$pid" || status=$?
    server_pid=
    [[ $status -eq 0 ]] || die "the server ended with status $status at SIGTERM" "$work/$1.log"
}

say "serving it: diskplane serve --vhost-user, $queues queues on $queues I/O threads"
start_server serve "$diskplane" serve "$overlay" --vhost-user "$work/vm.sock" \
    --queues "$queues" --io-threads "$queues" --stats

# --- The guest ------------------------------------------------------------------------------------------

if [[ $(<"$guest/accel") == kvm && -r /dev/kvm && -w /dev/kvm ]]; then
    accel=kvm
    accel_args=(-accel kvm -cpu host)
else
    accel='TCG (emulated)'
    accel_args=(-accel 'tcg,thread=multi' -cpu max)
fi

say "booting a Linux guest on it with $accel"
status=0
timeout "$guest_limit_s" qemu-system-x86_64 -machine q35,memory-backend=mem "${accel_args[@]}" \
    -smp 2 -m 1024 -object memory-backend-memfd,id=mem,size=1024M,share=on \
    -nodefaults -display none -no-reboot \
    -serial "file:$work/console.log" -serial "file:$work/results.log" \
    -kernel "$guest/vmlinuz" -initrd "$guest/initramfs.img" \
    -append "console=ttyS0 panic=-1 quiet mitigations=off dp.run=demo dp.seconds=$seconds" \
    -chardev "socket,id=disk,path=$work/vm.sock" \
    -device "vhost-user-blk-pci,chardev=disk,num-queues=$queues" \
    >"$work/qemu.log" 2>&1 </dev/null || status=$?
case $status in
    0)   ;;
    124) die "the guest was not through after $guest_limit_s s" "$work/console.log" ;;
    *)   die "QEMU ended with status $status" "$work/qemu.log" ;;
esac

figure() { # name
    sed -n "s/^DP $1=\(.*\)/\1/p" "$work/results.log" | tr -d '\r' | tail -n 1
}
result=$(figure result)
[[ $result == ok ]] || die "the guest found something wrong: ${result:-no result}" "$work/console.log"

say 'stopping the server: SIGTERM'
stop_server serve

# --- What is left ---------------------------------------------------------------------------------------

say 'checking the image: qemu-img check'
logged check qemu-img check -f qcow2 "$overlay"

say 'comparing what diskplane serves over NBD with what QEMU reads: qemu-img compare'
start_server nbd "$diskplane" serve "$overlay" --read-only --nbd "unix:$work/nbd.sock"
logged compare qemu-img compare -f qcow2 "$overlay" -F raw "nbd+unix:///?socket=$work/nbd.sock"
stop_server nbd

[[ $(sha256sum <"$base") == "$base_sum" ]] || die 'the base image was written to'

finished=yes
kb=$(figure verified_kb)
trimmed=$(figure trimmed_bytes)
size=$(stat -c '%b %B' "$overlay" | awk '{ print $1 * $2 }')
row() { printf '  %-22s %s\n' "$1" "$2"; }
printf '\n'
row 'boot'               "$(figure boot_s) s to user space, Linux $(figure kernel), $accel"
row 'virtio-blk'         "$(figure vda.nr_queues) queues, $(figure vda.write_cache), discard up to $(numfmt --to=iec "$(figure vda.discard_max_bytes)")"
row 'guest I/O verified' "$((kb / 1024)) MiB by SHA-256 and CRC-32C, fsck clean"
row 'trimmed'            "$(numfmt --to=iec "$trimmed")"
row 'requests'           "$(figure vda.read_ios) reads, $(figure vda.write_ios) writes, $(figure vda.flush_ios) flushes, $(figure vda.discard_ios) discards"
row '4 KiB random read'  "$(figure fio_read_iops) IOPS in the guest, depth 16"
row '4 KiB random write' "$(figure fio_write_iops) IOPS in the guest, depth 16"
row 'image'              "qemu-img check: no errors; compare: identical; $(numfmt --to=iec "$size") on disk"
row 'base image'         'unchanged'
