//! L1, L2 and refcount tables, and compressed clusters.

use super::{judge, plain};
use image::qcow2::downgrade;
use testkit::forge::{COMPRESSED, COPIED, Forge, Shape, field};
use testkit::memory::Memory;

/// The first L1 entry leads to `at`.
fn l1_to(image: Forge, at: u64) -> Forge {
    let l1 = image.l1();
    image.put_u64(l1, at | COPIED)
}

fn subclusters() -> Forge {
    Forge::new(Shape {
        extended_l2: true,
        cluster_bits: 14,
        ..Shape::default()
    })
}

fn narrow() -> Forge {
    Forge::new(Shape {
        refcount_order: 0,
        ..Shape::default()
    })
    .data(0, 1)
}

#[test]
fn cve_2014_0223_l1_entries_that_lead_astray() {
    judge(&[
        ("L2 table on the header", || l1_to(plain(), 0), "", ""),
        (
            "L2 table on the refcount table",
            || l1_to(plain(), 4096),
            "overlaps other metadata",
            "",
        ),
        (
            "L2 table on a refcount block",
            || {
                let i = plain();
                let at = i.refcount_block();
                l1_to(i, at)
            },
            "overlaps other metadata",
            "",
        ),
        (
            "L2 table on the L1 table",
            || {
                let i = plain();
                let at = i.l1();
                l1_to(i, at)
            },
            "overlaps other metadata",
            "",
        ),
        (
            "L2 table for two L1 entries",
            || {
                let mut i = plain();
                let (l1, at) = (i.l1(), i.l2(0));
                i.put_u64(l1 + 8, at | COPIED)
            },
            "overlaps other metadata",
            "",
        ),
        (
            "L2 table between clusters",
            || {
                let mut i = plain();
                let at = i.l2(0) + 512;
                l1_to(i, at)
            },
            "L1",
            "",
        ),
        (
            "L2 table behind the end",
            || l1_to(plain(), 1 << 40),
            "",
            "",
        ),
        (
            "L2 table at the highest offset",
            || l1_to(plain(), 0x00ff_ffff_ffff_f000),
            "",
            "",
        ),
        (
            "reserved bits of an L1 entry",
            || {
                let i = plain();
                let (l1, raw) = (i.l1(), i.word(i.l1()));
                i.put_u64(l1, raw | 1)
            },
            "L1",
            "",
        ),
        (
            "all bits of an L1 entry",
            || {
                let i = plain();
                let l1 = i.l1();
                i.put_u64(l1, !0)
            },
            "L1",
            "",
        ),
        (
            "a table of ones",
            || {
                let i = plain();
                let l1 = i.l1();
                i.put(l1, &[0xff; 4096])
            },
            "L1",
            "",
        ),
    ]);
}

#[test]
fn l2_entries_that_lead_astray() {
    judge(&[
        ("data on the header", || plain().map(0, COPIED), "", ""),
        (
            "data on the refcount table",
            || plain().map(0, 4096 | COPIED),
            "",
            "",
        ),
        (
            "data on a refcount block",
            || {
                let i = plain();
                let at = i.refcount_block();
                i.map(0, at | COPIED)
            },
            "",
            "",
        ),
        (
            "data on the L1 table",
            || {
                let i = plain();
                let at = i.l1();
                i.map(0, at | COPIED)
            },
            "",
            "",
        ),
        (
            "data on their own L2 table",
            || {
                let mut i = plain();
                let at = i.l2(0);
                i.map(0, at | COPIED)
            },
            "",
            "",
        ),
        (
            "two entries for a cluster",
            || {
                let mut i = plain();
                let at = i.entry(0);
                let raw = i.word(at);
                i.map(1, raw)
            },
            "",
            "",
        ),
        (
            "data between clusters",
            || plain().map(0, 4096 * 5 + 512),
            "L2",
            "",
        ),
        (
            "data behind the end",
            || plain().map(0, 1 << 40 | COPIED),
            "",
            "",
        ),
        (
            "data at the highest offset",
            || plain().map(0, 0x00ff_ffff_ffff_f000 | COPIED),
            "",
            "",
        ),
        (
            "reserved bits",
            || plain().map(0, (4096 * 5) | 0x3e),
            "L2",
            "",
        ),
        ("all bits", || plain().map(0, !0), "", ""),
        (
            "all bits but compressed",
            || plain().map(0, !COMPRESSED),
            "L2",
            "",
        ),
        (
            "zero flag in version 2",
            || {
                Forge::new(Shape {
                    version: 2,
                    ..Shape::default()
                })
                .map(0, 1)
            },
            "L2",
            "",
        ),
        (
            "subclusters both there and zero",
            || subclusters().data(0, 1).subclusters(0, !0),
            "",
            "",
        ),
        (
            "subclusters there without a cluster",
            || subclusters().map(0, 0).subclusters(0, 1),
            "",
            "",
        ),
        (
            "subclusters of a compressed cluster",
            || subclusters().compressed(0, &[3, 0]).subclusters(0, 1),
            "",
            "",
        ),
        (
            "zero flag with subclusters",
            || subclusters().map(0, 1),
            "L2",
            "",
        ),
    ]);
}

#[test]
fn refcount_structures_that_lead_astray() {
    /// The first refcount table entry leads to `at`.
    fn block_at(at: u64) -> Forge {
        plain().put_u64(4096, at)
    }
    judge(&[
        ("refcount block on the header", || block_at(1 << 63), "", ""),
        (
            "refcount block on the table",
            || block_at(4096),
            "overlaps other metadata",
            "",
        ),
        (
            "refcount block on the L1 table",
            || {
                let at = plain().l1();
                block_at(at)
            },
            "overlaps other metadata",
            "",
        ),
        (
            "refcount block on an L2 table",
            || {
                let at = plain().l2(0);
                block_at(at)
            },
            "overlaps other metadata",
            "",
        ),
        (
            "refcount block on data",
            || {
                let mut i = plain();
                let at = i.entry(0);
                let at = i.word(at) & !COPIED;
                i.put_u64(4096, at)
            },
            "",
            "",
        ),
        (
            "refcount block between clusters",
            || block_at(4096 * 2 + 512),
            "refcount table entry 0",
            "",
        ),
        (
            "refcount block behind the end",
            || block_at(1 << 40),
            "",
            "",
        ),
        (
            "refcount block at the highest offset",
            || block_at(0xffff_ffff_ffff_f000),
            "",
            "",
        ),
        ("no refcount block", || block_at(0), "", ""),
        (
            "one block for all",
            || {
                let i = plain();
                let at = i.refcount_block();
                (0..512).fold(i, |i, n| i.put_u64(4096 + 8 * n, at))
            },
            "overlaps other metadata",
            "",
        ),
        (
            "a refcount table of ones",
            || plain().put(4096, &[0xff; 4096]),
            "",
            "",
        ),
        (
            "refcounts of nothing",
            || {
                let i = plain();
                let at = i.refcount_block();
                i.put(at, &[0; 4096])
            },
            "",
            "",
        ),
        (
            "refcounts as high as can be",
            || {
                let i = plain();
                let at = i.refcount_block();
                i.put(at, &[0xff; 4096])
            },
            "",
            "",
        ),
        (
            "narrow refcounts as high as can be",
            || {
                let i = narrow();
                let at = i.refcount_block();
                i.put(at, &[0xff; 4096])
            },
            "",
            "",
        ),
        (
            "a refcount that cannot be counted",
            || {
                let mut i = narrow();
                let at = i.entry(0);
                let raw = i.word(at) & !COPIED;
                (1..400).fold(i, |i, n| i.map(n, raw))
            },
            "",
            "",
        ),
        (
            "refcounts of 64 bits, all ones",
            || {
                let i = Forge::new(Shape {
                    refcount_order: 6,
                    ..Shape::default()
                })
                .data(0, 1);
                let at = i.refcount_block();
                i.put(at, &[0xff; 4096])
            },
            "",
            "",
        ),
        (
            "a refcount table that counts itself away",
            || {
                let mut i = plain();
                i.set_refcount(1, 0);
                i
            },
            "",
            "",
        ),
    ]);
}

#[test]
fn compressed_clusters_that_lie() {
    fn zstd(packed: &[u8]) -> Forge {
        Forge::new(Shape::default())
            .put_u64(field::INCOMPATIBLE, 8)
            .put(field::COMPRESSION_TYPE, &[1])
            .compressed(0, packed)
    }
    fn wild(raw: u64) -> Forge {
        plain().map(1, raw)
    }
    judge(&[
        ("no data", || plain().compressed(1, &[]), "compressed", "ok"),
        (
            "garbage",
            || plain().compressed(1, &[0xff; 300]),
            "compressed",
            "ok",
        ),
        (
            "an empty stream",
            || plain().compressed(1, &[3, 0]),
            "unpacks to 0 bytes",
            "ok",
        ),
        // A stored block that says 65535 bytes and has 4.
        (
            "a stored block that ends early",
            || plain().compressed(1, &[1, 0xff, 0xff, 0, 0, 1, 2, 3, 4]),
            "compressed",
            "ok",
        ),
        (
            "a distance before the start",
            || plain().compressed(1, &[0x4b, 0x04, 0xfe, 0xff, 0xff]),
            "",
            "ok",
        ),
        // 650 KiB out of 4 KiB.
        ("a bomb", || plain().compressed(1, &bomb()), "", "ok"),
        (
            "a bomb in clusters of 64 KiB",
            || {
                Forge::new(Shape {
                    cluster_bits: 16,
                    size: 64 << 20,
                    ..Shape::default()
                })
                .compressed(0, &bomb())
            },
            "",
            "ok",
        ),
        (
            "descriptor behind the end",
            || wild(COMPRESSED | 1 << 50),
            "compressed",
            "",
        ),
        ("descriptor of ones", || wild(!COPIED), "", ""),
        ("descriptor with COPIED", || wild(!0), "", ""),
        (
            "descriptor over the end",
            || {
                let i = plain();
                let raw = i.descriptor(i.bytes.len() as u64 - 512, 7);
                i.map(1, raw)
            },
            "",
            "",
        ),
        (
            "descriptor of the L1 table",
            || {
                let i = plain();
                let raw = i.descriptor(i.l1(), 7);
                i.map(1, raw)
            },
            "",
            "",
        ),
        ("zstd: no frame", || zstd(&[0; 600]), "compressed", "ok"),
        (
            "zstd: a frame's start",
            || zstd(&[0x28, 0xb5, 0x2f, 0xfd]),
            "compressed",
            "ok",
        ),
        // Window descriptor 0xff: 3.75 TiB.
        (
            "zstd: a window of 3 TiB",
            || zstd(&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff, 0x03, 0, 0]),
            "compressed",
            "ok",
        ),
        // A content size of 2^64-1 with a single segment: the window is as large.
        (
            "zstd: content of 2^64-1 bytes",
            || {
                zstd(
                    &[
                        &[0x28, 0xb5, 0x2f, 0xfd, 0xe0][..],
                        &[0xff; 8],
                        &[0x03, 0, 0],
                    ]
                    .concat(),
                )
            },
            "compressed",
            "ok",
        ),
        // Blocks of type "RLE" that are not the last, 2^21-1 bytes each.
        (
            "zstd: a bomb of runs",
            || {
                zstd(
                    &[
                        &[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58][..],
                        &[0x02, 0x00, 0x10, 0xaa].repeat(800),
                    ]
                    .concat(),
                )
            },
            "",
            "ok",
        ),
        (
            "zstd: empty blocks without end",
            || zstd(&[&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58][..], &[0; 3000]].concat()),
            "compressed",
            "ok",
        ),
        (
            "zstd: skippable frames only",
            || zstd(&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0].repeat(60)),
            "compressed",
            "ok",
        ),
        (
            "zstd: a skippable frame of 4 GiB",
            || zstd(&[0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff]),
            "compressed",
            "ok",
        ),
    ]);
}

/// Raw deflate, fixed codes: a zero, then matches of 258 bytes at distance 1, without an end.
fn bomb() -> Vec<u8> {
    // Bits from the lowest: final 1, type 01, literal 0 (00110000), then 11000101 (length 258) 00000 (distance 1).
    let mut bits = vec![1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0];
    for _ in 0..2500 {
        bits.extend([1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0]);
    }
    let byte = |bits: &[u8]| bits.iter().rev().fold(0, |byte, bit| byte << 1 | bit);
    bits.chunks(8).map(byte).collect()
}

#[test]
fn a_downgrade_zeroes_no_metadata() {
    const ZERO: u64 = 1;
    type Place = fn(&mut Forge) -> u64;
    let cases: [(&str, Place); 5] = [
        ("the L1 table", |image| image.l1()),
        ("the L2 table", |image| image.l2(0)),
        ("a refcount block", |image| image.refcount_block()),
        ("the refcount table", |image| image.refcount_table()),
        ("half a cluster", |image| image.l1() + 512),
    ];
    for (name, at) in cases {
        let mut image = plain();
        let host = at(&mut image);
        let image = image.map(5, host | ZERO | COPIED);
        let storage = Memory::new(&image.bytes, 1 << 20, 10_000);
        let error = downgrade(&storage, "memory").expect_err(name).to_string();
        assert!(error.contains("entry 5 is"), "{name}: {error}");
        assert!(error.contains("diskplane check"), "{name}: {error}");
        assert_eq!(storage.done().changes, 0, "{name}: written");
    }
}
