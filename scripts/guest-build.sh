#!/usr/bin/env bash
# Makes the guest that the tests and the demo boot: a Debian kernel and a small initramfs.
#
#   scripts/guest-build.sh          builds what is missing or out of date, prints the folder
#
#   FOLDER/vmlinuz                  the kernel
#   FOLDER/initramfs.img            busybox, kernel modules, file system tools, fio, guest/init
#   FOLDER/accel                    "kvm" where a guest really boots with it, otherwise "tcg"
#   FOLDER/stamp                    what it was made from; the same again is not built again
#
# FOLDER is target/guest in the repository, or what DISKPLANE_GUEST_DIR names. The kernel package is
# downloaded and unpacked there and never installed; programs and libraries are copies of this machine's.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${DISKPLANE_GUEST_DIR:-$root/target/guest}
script=${0##*/}

# What the init script calls beside busybox's applets.
programs=(mkfs.ext4 e2fsck mkfs.xfs xfs_repair blkdiscard fstrim fio)
# Those that the kernel has built in are left out.
modules=(virtio_blk ext4 xfs ata_piix sd_mod)

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '%s: %s\n' "$script" "$*" >&2; }
die() { printf '%s: %s\n' "$script" "$*" >&2; exit 1; }

program_paths=()
for program in "${programs[@]}"; do
    program_paths+=("$(command -v "$program")") || die "$program is missing: run make setup"
done
busybox=$(command -v busybox) || die 'busybox is missing: run make setup'

kvm=no
[[ -r /dev/kvm && -w /dev/kvm ]] && kvm=yes

# Sizes and times of the programs stand for their contents: reading 80 MB at each call would take longer.
stamp=$(
    sha256sum <"$root/guest/init"
    sha256sum <"$root/scripts/guest-build.sh"
    stat -L -c '%n %s %Y' "$busybox" "${program_paths[@]}"
    printf 'kvm %s\n' "$kvm"
)
if [[ -s $folder/vmlinuz && -s $folder/initramfs.img && -e $folder/stamp && $(<"$folder/stamp") == "$stamp" ]]; then
    printf '%s\n' "$folder"
    exit 0
fi

mkdir -p "$folder"
# Two builds at once would get into each other's way; the second finds everything made.
exec 9>"$folder/lock"
flock 9
if [[ -e $folder/stamp && $(<"$folder/stamp") == "$stamp" ]]; then
    printf '%s\n' "$folder"
    exit 0
fi
work=$(mktemp -d "$folder/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
started=$SECONDS

# --- The kernel -----------------------------------------------------------------------------------------

# Prints the name and version of the real package behind linux-image-cloud-amd64: the newest there is,
# of backports too, whose kernel has virtio_pci and ext4 built in and boots a second faster.
newest_kernel() {
    apt-cache show linux-image-cloud-amd64 2>/dev/null \
        | sed -n 's/^Depends: *\(linux-image-[^ ,]*\) (= *\([^)]*\)).*/\1 \2/p' \
        | sort -u -t' ' -k2,2V | tail -n 1
}

fetch_kernel() {
    local name version
    command -v apt-get >/dev/null || die 'no apt-get here to download the Debian kernel with'
    read -r name version < <(newest_kernel) || true
    if [[ -z ${version:-} ]]; then
        [[ $(id -u) -eq 0 ]] && apt-get -q update >"$work/update.log" 2>&1
        read -r name version < <(newest_kernel) || true
    fi
    [[ -n ${version:-} ]] || die 'apt knows no linux-image-cloud-amd64: run apt-get update as root'
    say "downloading $name $version"
    # A stale package list names a version that is gone; one update and another look mend that.
    if ! (cd "$work" && apt-get -q download "$name=$version") >"$work/download.log" 2>&1; then
        if [[ $(id -u) -eq 0 ]]; then
            apt-get -q update >>"$work/download.log" 2>&1 || true
            read -r name version < <(newest_kernel) || true
        fi
        (cd "$work" && apt-get -q download "$name=$version") >>"$work/download.log" 2>&1 || {
            cat "$work/download.log" >&2
            die "could not download $name $version"
        }
    fi
    rm -rf "$folder/kernel"
    mkdir "$work/kernel"
    dpkg -x "$work/$name"_*.deb "$work/kernel"
    rm -f "$work/$name"_*.deb
    mv "$work/kernel" "$folder/kernel"
}

shopt -s nullglob
kernels=("$folder"/kernel/boot/vmlinuz-*)
if [[ ${#kernels[@]} -ne 1 ]]; then
    fetch_kernel
    kernels=("$folder"/kernel/boot/vmlinuz-*)
fi
[[ ${#kernels[@]} -eq 1 ]] || die "the kernel package holds no kernel: see $folder/kernel"
release=${kernels[0]##*/vmlinuz-}
# depmod wants lib/modules below its base folder; merged-/usr packages have it below usr.
base=$folder/kernel
[[ -d $base/lib/modules/$release ]] || base=$folder/kernel/usr
depmod -b "$base" "$release"

# --- The initramfs --------------------------------------------------------------------------------------

tree=$work/tree
mkdir -p "$tree"/{bin,dev,proc,sys,tmp,mnt,run,etc,lib/modules,usr/bin,usr/sbin,usr/lib}

install -m 755 "$root/guest/init" "$tree/init"
install -m 755 "$busybox" "$tree/bin/busybox"
# A link for each applet, so that those called by another program (mount helpers) are found too.
while read -r applet; do
    ln -s busybox "$tree/bin/$applet" 2>/dev/null || true
done < <("$busybox" --list)

unpack_module() { # path target
    case $1 in
        *.xz)  xz -dc "$1" ;;
        *.zst) zstd -qdc "$1" ;;
        *.gz)  gzip -dc "$1" ;;
        *)     cat "$1" ;;
    esac >"$2"
}

: >"$tree/etc/modules"
for module in "${modules[@]}"; do
    line=$module
    while read -r kind path _; do
        [[ $kind == insmod ]] || continue
        file=${path##*/}
        file=${file%%.ko*}.ko
        [[ -e $tree/lib/modules/$file ]] || unpack_module "$path" "$tree/lib/modules/$file"
        line+=" $file"
    done < <(modprobe -d "$base" -S "$release" --show-depends "$module" 2>/dev/null || true)
    [[ $line == "$module" ]] || printf '%s\n' "$line" >>"$tree/etc/modules"
done
[[ -e $tree/lib/modules/virtio_blk.ko ]] || grep -q '/virtio_blk\.ko' "$base/lib/modules/$release/modules.builtin" \
    || die "the kernel $release has no virtio_blk"

# Debian's fio is linked with the clients of Ceph, Gluster, NBD, RDMA and persistent memory: 80 MB of
# libraries that no scenario calls, but that the loader would map and relocate at each start, which takes
# longer than the job itself under emulation. Stand-ins with the same names, versions and symbols, whose
# functions do nothing, take their place.
stand_in_for='libgfapi librados librbd libnbd libibverbs librdmacm libpmem libpmemblk'

make_stand_in() { # soname real-library
    local soname=$1 real=$2 c=$work/stub.c map=$work/stub.map
    # name@version of all that fio wants and this library defines
    comm -12 "$work/fio.wants" <(nm -D --defined-only --with-symbol-versions "$real" \
        | awk '{ sub(/@@/, "@", $3); print $3 }' | sort -u) >"$work/stub.symbols"
    awk -F@ '{ print "void " $1 "(void) {}" }' "$work/stub.symbols" >"$c"
    awk -F@ 'NF == 2 { symbols[$2] = symbols[$2] " " $1 ";" }
        END { for (version in symbols) print version " {" symbols[version] " };" }' "$work/stub.symbols" >"$map"
    # A library without symbol versions would make an empty map, which the linker refuses.
    [[ -s $map ]] || printf '{ global: *; };\n' >"$map"
    gcc -w -shared -nostdlib -fno-builtin -Wl,-soname,"$soname" -Wl,--version-script="$map" \
        -o "$work/stand-ins/$soname" "$c"
}

make_stand_ins() { # fio
    local name path
    mkdir "$work/stand-ins"
    nm -D --undefined-only --with-symbol-versions "$1" | awk '{ print $2 }' | sort -u >"$work/fio.wants"
    while read -r name path; do
        case " $stand_in_for " in
            *" ${name%%.so*} "*) make_stand_in "$name" "$path" || return 1 ;;
        esac
    done < <(ldd "$1" | sed -n 's/^[[:space:]]*\([^ ]*\) => \(\/[^ ]*\).*/\1 \2/p')
    LD_LIBRARY_PATH=$work/stand-ins "$1" --version >/dev/null
}

# Prints the paths of the libraries that a program loads.
libraries_of() { # program
    LD_LIBRARY_PATH=$work/stand-ins ldd "$1" \
        | sed -n -e 's/.*=> \(\/[^ ]*\).*/\1/p' -e 's/^[[:space:]]*\(\/[^ ]*\) (.*/\1/p'
}

copy_library() { # path
    local target=$tree$1
    case $1 in
        "$work"/stand-ins/*) target=$tree/usr/lib/${1##*/} ;;
    esac
    [[ -e $target ]] && return
    mkdir -p "${target%/*}"
    cp -L "$1" "$target"
}

if ! make_stand_ins "$(command -v fio)" 2>"$work/stand-ins.log"; then
    cat "$work/stand-ins.log" >&2
    say 'no stand-ins for the libraries of fio could be made; the initramfs gets all of them'
    rm -rf "$work/stand-ins"
fi

for path in "${program_paths[@]}"; do
    name=${path##*/}
    case $name in
        fio) target=$tree/usr/bin/$name ;;
        *)   target=$tree/usr/sbin/$name ;;
    esac
    cp -L "$path" "$target"
    while read -r library; do
        copy_library "$library"
    done < <(libraries_of "$path")
done
cp /etc/ld.so.conf "$tree/etc/" && cp -r /etc/ld.so.conf.d "$tree/etc/"
ldconfig -r "$tree" 2>/dev/null || true

(cd "$tree" && find . -print0 | cpio --null --quiet -o -H newc -R 0:0) >"$work/initramfs.img"

# --- KVM or emulation -----------------------------------------------------------------------------------

# A /dev/kvm that opens may still be of no use: in a virtual machine without proper nesting the first
# instructions of the kernel end in "KVM internal error" and QEMU stops there for ever. Only a boot tells.
kvm_boots() {
    local log=$work/kvm.log pid tick
    [[ $kvm == yes ]] || return 1
    qemu-system-x86_64 -machine q35 -accel kvm -cpu host -m 512 -nodefaults -display none -serial stdio -no-reboot \
        -kernel "${kernels[0]}" -initrd "$work/initramfs.img" -append 'console=ttyS0 panic=-1 quiet dp.run=probe' \
        >"$log" 2>&1 </dev/null &
    pid=$!
    for ((tick = 0; tick < 80; tick++)); do
        sleep 0.1
        grep -q 'KVM internal error' "$log" && break
        kill -0 "$pid" 2>/dev/null || break
    done
    kill -9 "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    grep -q '^DP result=ok' "$log"
}

accel=tcg
if kvm_boots; then
    accel=kvm
fi
printf '%s\n' "$accel" >"$folder/accel"

install -m 644 "${kernels[0]}" "$folder/vmlinuz"
mv "$work/initramfs.img" "$folder/initramfs.img"
printf '%s\n' "$stamp" >"$folder/stamp"
say "built the guest in $((SECONDS - started)) s: kernel $release, initramfs $(($(stat -c %s "$folder/initramfs.img") >> 20)) MiB, $accel"
printf '%s\n' "$folder"
