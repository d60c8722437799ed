//! The tables of snapshots and bitmaps.

use super::{judge, plain};
use testkit::forge::{Bitmap, Forge, Snapshot, bitmaps_extension, extension, field};

/// An image with one snapshot.
fn one(change: fn(&mut Snapshot)) -> Forge {
    let mut image = plain();
    let l1_offset = image.allocate(1);
    let mut snapshot = Snapshot {
        l1_offset,
        l1_size: 2,
        ..Snapshot::default()
    };
    change(&mut snapshot);
    image.snapshots(&[snapshot])
}

/// An image with one bitmap.
fn bitmap(change: fn(&mut Bitmap)) -> Forge {
    let mut image = plain();
    let table = image.allocate(1);
    let mut bitmap = Bitmap {
        table,
        ..Bitmap::default()
    };
    change(&mut bitmap);
    image.bitmaps(&[bitmap])
}

/// An image whose bitmap has this table entry.
fn bits(raw: u64) -> Forge {
    let mut image = plain();
    let table = image.allocate(1);
    image.put_u64(table, raw).bitmaps(&[Bitmap {
        table,
        ..Bitmap::default()
    }])
}

fn directory(count: u32, len: u64, offset: u64) -> Forge {
    plain()
        .put_u64(field::AUTOCLEAR, 1)
        .extension(extension::BITMAPS, &bitmaps_extension(count, len, offset))
}

#[test]
fn cve_2014_0143_and_0145_snapshot_tables() {
    judge(&[
        ("one snapshot", || one(|_| {}), "", "ok"),
        (
            "nb_snapshots 2^32-1",
            || one(|_| {}).put_u32(field::NB_SNAPSHOTS, !0),
            "the highest is 65536",
            "nb_snapshots",
        ),
        (
            "snapshots_offset 0",
            || one(|_| {}).put_u64(field::SNAPSHOTS_OFFSET, 0),
            "",
            "",
        ),
        (
            "snapshots_offset odd",
            || one(|_| {}).put_u64(field::SNAPSHOTS_OFFSET, 4097),
            "snapshots_offset at byte 64",
            "snapshots_offset",
        ),
        (
            "snapshots_offset 2^63",
            || one(|_| {}).put_u64(field::SNAPSHOTS_OFFSET, 1 << 63),
            "snapshots_offset at byte 64",
            "snapshots_offset",
        ),
        (
            "snapshots_offset wraps",
            || one(|_| {}).put_u64(field::SNAPSHOTS_OFFSET, !0xfff),
            "snapshots_offset at byte 64",
            "snapshots_offset",
        ),
        (
            "snapshots_offset behind the end",
            || one(|_| {}).put_u64(field::SNAPSHOTS_OFFSET, 1 << 50),
            "",
            "",
        ),
        (
            "l1_size 2^32-1",
            || one(|s| s.l1_size = !0),
            "",
            "the most are",
        ),
        (
            "l1_size 2^22 behind the end",
            || one(|s| s.l1_size = 1 << 22),
            "",
            "",
        ),
        ("l1_size 0", || one(|s| s.l1_size = 0), "", ""),
        (
            "L1 table between clusters",
            || one(|s| s.l1_offset += 512),
            "",
            "between clusters",
        ),
        (
            "L1 table at 2^64-4096",
            || one(|s| s.l1_offset = !0xfff),
            "",
            "",
        ),
        (
            "L1 table on the header",
            || one(|s| s.l1_offset = 0),
            "",
            "",
        ),
        (
            "L1 table on the active one",
            || {
                let at = plain().l1();
                let mut i = one(|_| {});
                let table = i.word(field::SNAPSHOTS_OFFSET);
                let _ = i.l2(0);
                i.put_u64(table, at)
            },
            "",
            "",
        ),
        (
            "extra data of 2^32-1 bytes",
            || one(|s| s.extra_len = Some(!0)),
            "",
            "",
        ),
        (
            "extra data of 1025 bytes",
            || one(|s| s.extra = vec![0; 1025]),
            "",
            "the most are 1024",
        ),
        (
            "no extra data",
            || one(|s| s.extra.clear()),
            "",
            "lacks the disk's size",
        ),
        (
            "id and name of 65535 bytes",
            || one(|s| s.lengths = Some((!0, !0))),
            "",
            "",
        ),
        (
            "VM state of 2^64-1 bytes",
            || one(|s| s.extra[..8].fill(0xff)),
            "",
            "",
        ),
        (
            "disk of 2^64-1 bytes",
            || one(|s| s.extra[8..].fill(0xff)),
            "",
            "",
        ),
        (
            "a name that commands the terminal",
            || one(|s| s.name = b"\x1b[2J\0\n\xff".to_vec()),
            "",
            "",
        ),
        (
            "1000 snapshots of one L1 table",
            || {
                let mut i = plain();
                let l1_offset = i.allocate(1);
                i.snapshots(&vec![
                    Snapshot {
                        l1_offset,
                        l1_size: 2,
                        ..Snapshot::default()
                    };
                    1000
                ])
            },
            "",
            "",
        ),
    ]);
}

#[test]
fn bitmap_directories_of_any_size() {
    judge(&[
        ("one bitmap", || bitmap(|_| {}), "", "ok"),
        ("no bitmaps", || directory(0, 32, 4096), "", "65535"),
        ("2^32-1 bitmaps", || directory(!0, 32, 4096), "", "65535"),
        (
            "directory of no bytes",
            || directory(1, 0, 4096),
            "",
            "too many bytes",
        ),
        (
            "directory of 2^64-1 bytes",
            || directory(1, !0, 4096),
            "",
            "too many bytes",
        ),
        (
            "directory as large as allowed, behind the end",
            || directory(65535, 65535 * 1048, 1 << 40),
            "",
            "",
        ),
        (
            "directory at 2^64-4096",
            || directory(1, 32, !0xfff),
            "",
            "",
        ),
        (
            "directory between clusters",
            || directory(1, 32, 4100),
            "",
            "between clusters",
        ),
        (
            "directory on the header",
            || directory(1, 32, 0),
            "",
            "between clusters",
        ),
        (
            "directory on the refcount table",
            || directory(1, 32, 4096),
            "",
            "",
        ),
        (
            "extension of 23 bytes",
            || {
                plain()
                    .put_u64(field::AUTOCLEAR, 1)
                    .extension(extension::BITMAPS, &[0; 23])
            },
            "",
            "24 bytes",
        ),
        (
            "extension without its bit",
            || directory(!0, !0, !0).put_u64(field::AUTOCLEAR, 0),
            "",
            "",
        ),
        (
            "bit without its extension",
            || plain().put_u64(field::AUTOCLEAR, 1),
            "",
            "",
        ),
        (
            "reserved field",
            || {
                let mut data = bitmaps_extension(1, 32, 4096);
                data[7] = 1;
                plain()
                    .put_u64(field::AUTOCLEAR, 1)
                    .extension(extension::BITMAPS, &data)
            },
            "",
            "reserved",
        ),
        (
            "more bitmaps than entries",
            || {
                let i = bitmap(|_| {});
                let at = i.extensions_end() - 24;
                i.put_u32(at, 9)
            },
            "",
            "",
        ),
        (
            "table of 2^32-1 entries",
            || bitmap(|b| b.entries = !0),
            "",
            "too many entries",
        ),
        (
            "table of no entries",
            || bitmap(|b| b.entries = 0),
            "",
            "too many entries",
        ),
        (
            "table larger than the file",
            // Of one in use QEMU does not look whether it fits its bits.
            || bitmap(|b| (b.entries, b.flags) = (1 << 17, 1)),
            "",
            "larger than the file",
        ),
        (
            "table between clusters",
            || bitmap(|b| b.table += 1),
            "",
            "not at a cluster",
        ),
        (
            "table behind the end",
            || bitmap(|b| b.table = 1 << 50),
            "",
            "",
        ),
        (
            "table on the header",
            || bitmap(|b| b.table = 0),
            "",
            "not at a cluster",
        ),
        (
            "table on the refcount table",
            || bitmap(|b| b.table = 4096),
            "",
            "",
        ),
        (
            "granularity 0",
            || bitmap(|b| b.granularity_bits = 0),
            "",
            "granularity",
        ),
        (
            "granularity 64",
            || bitmap(|b| b.granularity_bits = 64),
            "",
            "granularity",
        ),
        (
            "granularity 255",
            || bitmap(|b| b.granularity_bits = 255),
            "",
            "granularity",
        ),
        ("type 0", || bitmap(|b| b.kind = 0), "", "unknown type"),
        (
            "reserved flags",
            || bitmap(|b| b.flags = !3),
            "",
            "reserved flags",
        ),
        (
            "name of 65535 bytes",
            || bitmap(|b| b.name_len = Some(!0)),
            "",
            "too long a name",
        ),
        (
            "name longer than the directory",
            || bitmap(|b| b.name_len = Some(1023)),
            "",
            "behind the directory",
        ),
        (
            "extra data of 2^32-1 bytes",
            || bitmap(|b| b.extra_len = !0),
            "",
            "extra data",
        ),
        ("bits on the header", || bits(1 << 9), "", "not sound"),
        ("bits on the refcount table", || bits(4096), "", ""),
        ("bits behind the end", || bits(1 << 50), "", ""),
        (
            "bits both somewhere and ones",
            || bits((4096 * 5) | 1),
            "",
            "not sound",
        ),
        ("bits with reserved bits", || bits(!0), "", "not sound"),
    ]);
}
