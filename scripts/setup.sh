#!/usr/bin/env bash
# Installs what diskplane's build, tests, demo and benchmark need on a Debian machine.
#
#   scripts/setup.sh [build|test|demo|bench|soak] (default: test)
#
# As root it installs what is missing; as anyone else it names what is missing and exits 1. When nothing
# is missing it does nothing and takes well under a second, so every make target may call it.
#
# The Rust toolchain is the one thing that it expects to find.
set -euo pipefail

purpose=${1:-test}
script=${0##*/}

# Debian 12's own QEMU is 7.2, and installing it would take a newer qemu-utils away. This is the oldest
# major version that the tests are meant for; on Debian 12 only the backports suite has it.
qemu_major_min=8

say() { printf '%s: %s\n' "$script" "$*"; }
die() { printf '%s: %s\n' "$script" "$*" >&2; exit 1; }

# One line for each thing: how to notice that it is there (a command, or with a slash a file), and the
# package that brings it.
needs_build='
gcc                             gcc
/usr/include/stdio.h            libc6-dev
pkg-config                      pkg-config
'
needs_run='
qemu-system-x86_64              qemu-system-x86
qemu-img                        qemu-utils
qemu-io                         qemu-utils
qemu-nbd                        qemu-utils
qemu-storage-daemon             qemu-utils
nbdinfo                         libnbd-bin
nbdcopy                         libnbd-bin
nbdkit                          nbdkit
fio                             fio
mkfs.ext4                       e2fsprogs
e2fsck                          e2fsprogs
debugfs                         e2fsprogs
mkfs.xfs                        xfsprogs
xfs_repair                      xfsprogs
blkdiscard                      util-linux
fstrim                          util-linux
cpio                            cpio
modinfo                         kmod
xz                              xz-utils
flock                           util-linux
'
needs_bench='
qemu-nbd                        qemu-utils
qemu-storage-daemon             qemu-utils
nbdkit                          nbdkit
fio                             fio
'
# cargo-fuzz builds libFuzzer, which is C++.
needs_soak='
g++                             g++
'
needs_guest='
/bin/busybox                    busybox-static
'

case $purpose in
    build)     needs=$needs_build ;;
    test|demo) needs=$needs_build$needs_run$needs_guest ;;
    bench)     needs=$needs_build$needs_bench ;;
    soak)      needs=$needs_build$needs_run$needs_guest$needs_soak ;;
    *)         die "unknown purpose '$purpose' (build, test, demo, bench or soak)" ;;
esac

# A user's PATH on Debian has no sbin, and that is where mkfs and blkdiscard are.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

have() {
    case $1 in
        */*) [[ -e $1 ]] ;;
        *)   command -v "$1" >/dev/null ;;
    esac
}

qemu_is_new_enough() { # command
    local version major
    version=$("$1" --version 2>/dev/null | sed -n '1s/.*version \([0-9.]*\).*/\1/p')
    major=${version%%.*}
    [[ -n $major && $major -ge $qemu_major_min ]]
}

missing=()
add_missing() {
    local package
    for package in "${missing[@]}"; do
        [[ $package == "$1" ]] && return
    done
    missing+=("$1")
}

find_missing() {
    local probe package
    missing=()
    while read -r probe package; do
        [[ -n $probe ]] || continue
        have "$probe" || add_missing "$package"
    done <<<"$needs"
    if [[ $purpose != build ]]; then
        if have qemu-system-x86_64; then
            qemu_is_new_enough qemu-system-x86_64 || add_missing qemu-system-x86
        fi
        if have qemu-img; then
            qemu_is_new_enough qemu-img || add_missing qemu-utils
        fi
        # busybox-static and busybox both own /bin/busybox; only the static one runs in an initramfs.
        if have /bin/busybox && ldd /bin/busybox >/dev/null 2>&1; then
            add_missing busybox-static
        fi
    fi
}

# shellcheck source=/dev/null
codename() { (. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}"); }

# Prints a deb822 source file for SUITE-backports, made from the stanzas of "$@" that carry SUITE itself.
backports_from_deb822() { # suite file…
    local suite=$1
    shift
    awk -v suite="$suite" '
        function flush_stanza() {
            if (is_deb && has_suite && !disabled) printf "%s\n", stanza
            stanza = ""; is_deb = has_suite = disabled = 0
        }
        FNR == 1 { flush_stanza() }
        /^[ \t]*$/ { flush_stanza(); next }
        /^#/ { next }
        tolower($1) == "types:" {
            for (i = 2; i <= NF; i++) if ($i == "deb") is_deb = 1
            stanza = stanza "Types: deb\n"; next
        }
        tolower($1) == "suites:" {
            for (i = 2; i <= NF; i++) if ($i == suite) has_suite = 1
            stanza = stanza "Suites: " suite "-backports\n"; next
        }
        tolower($1) == "enabled:" { if (tolower($2) == "no") disabled = 1; next }
        { stanza = stanza $0 "\n" }
        END { flush_stanza() }
    ' "$@"
}

# The same for files in the one-line style: "deb [options] URI suite component…".
backports_from_lines() { # suite file…
    local suite=$1
    shift
    awk -v suite="$suite" '
        $1 == "deb" {
            for (i = 2; i <= NF; i++) if ($i == suite) {
                $i = suite "-backports"; print; next
            }
        }
    ' "$@"
}

backports_added=
add_backports() {
    local suite=$1 folder=/etc/apt/sources.list.d text
    local -a sources lists
    shopt -s nullglob
    sources=("$folder"/*.sources)
    lists=("$folder"/*.list)
    shopt -u nullglob
    [[ -e /etc/apt/sources.list ]] && lists+=(/etc/apt/sources.list)

    if grep -hqsE "^[^#]*[[:space:]]$suite-backports([[:space:]]|\$)" "${sources[@]}" "${lists[@]}" /dev/null; then
        return
    fi
    if [[ ${#sources[@]} -gt 0 ]]; then
        text=$(backports_from_deb822 "$suite" "${sources[@]}")
        if [[ -n $text ]]; then
            backports_added=$folder/diskplane-backports.sources
            printf '%s\n' "$text" >"$backports_added"
            return
        fi
    fi
    if [[ ${#lists[@]} -gt 0 ]]; then
        text=$(backports_from_lines "$suite" "${lists[@]}")
        if [[ -n $text ]]; then
            backports_added=$folder/diskplane-backports.list
            printf '%s\n' "$text" >"$backports_added"
            return
        fi
    fi
    die "no package source for '$suite' is configured, so none for '$suite-backports' can be derived"
}

# Everything that apt-get prints goes to a log: a user wants to see it only when it went wrong.
apt_quietly() {
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1 </dev/null; then
        cat "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

install_missing() {
    local suite package
    local -a target=() from_backports=() from_suite=()
    suite=$(codename)
    for package in "${missing[@]}"; do
        case $suite:$package in
            bookworm:qemu-*) from_backports+=("$package") ;;
            *)               from_suite+=("$package") ;;
        esac
    done
    # The guest's kernel comes from backports too, so the source is wanted whenever a guest is.
    if [[ $suite == bookworm && $purpose != build ]]; then
        add_backports "$suite"
    fi
    say "installing ${missing[*]}"
    if ! apt_quietly update; then
        [[ -n $backports_added ]] && rm -f "$backports_added"
        die 'apt-get update failed (see above)'
    fi
    if [[ ${#from_backports[@]} -gt 0 ]]; then
        # Both halves of QEMU in one transaction: they must stay of one version.
        target=(-t "$suite-backports")
        apt_quietly install --no-install-recommends "${target[@]}" qemu-utils "${from_backports[@]}" \
            || die "apt-get could not install ${from_backports[*]}"
    fi
    if [[ ${#from_suite[@]} -gt 0 ]]; then
        apt_quietly install --no-install-recommends "${from_suite[@]}" \
            || die "apt-get could not install ${from_suite[*]}"
    fi
}

command -v cargo >/dev/null || die 'cargo is not in PATH: install the Rust toolchain first (rust-toolchain.toml names the version)'

# From the registry, not from Debian, and so for everyone who has cargo.
if [[ $purpose == soak ]] && ! cargo fuzz --version >/dev/null 2>&1; then
    say 'installing cargo-fuzz'
    cargo install --quiet --locked cargo-fuzz@0.13.2 || die 'cargo could not install cargo-fuzz'
fi

find_missing
if [[ ${#missing[@]} -eq 0 ]]; then
    exit 0
fi
command -v apt-get >/dev/null || die "missing, and this is no Debian: what the packages ${missing[*]} bring"
if [[ $(id -u) -ne 0 ]]; then
    printf '%s: missing packages: %s\n' "$script" "${missing[*]}" >&2
    printf '%s: run it as root to install them (on Debian 12 QEMU has to come from bookworm-backports)\n' "$script" >&2
    exit 1
fi
install_missing
find_missing
[[ ${#missing[@]} -eq 0 ]] || die "still missing after the installation: ${missing[*]}"
say 'everything is there'
