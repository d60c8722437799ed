//! The header, its extensions and names.

use super::{judge, plain};
use testkit::forge::{Forge, Shape, extension, field, luks};

fn v2() -> Forge {
    Forge::new(Shape {
        version: 2,
        ..Shape::default()
    })
    .data(0, 1)
}

fn large_clusters() -> Forge {
    Forge::new(Shape {
        cluster_bits: 16,
        size: 64 << 20,
        ..Shape::default()
    })
}

/// A feature name table's entry.
fn feature_name(bit: u8, name: &[u8]) -> Vec<u8> {
    let mut entry = vec![0, bit];
    entry.extend(name);
    entry.resize(48, 0);
    entry
}

#[test]
fn cve_2014_0144_header_fields_out_of_range() {
    judge(&[
        (
            "cluster_bits 0",
            || plain().put_u32(field::CLUSTER_BITS, 0),
            "cluster_bits at byte 20",
            "cluster_bits at byte 20",
        ),
        (
            "cluster_bits 8",
            || plain().put_u32(field::CLUSTER_BITS, 8),
            "allowed are 9 to 21",
            "allowed are 9 to 21",
        ),
        (
            "cluster_bits 22",
            || plain().put_u32(field::CLUSTER_BITS, 22),
            "cluster_bits at byte 20",
            "cluster_bits",
        ),
        (
            "cluster_bits 63",
            || plain().put_u32(field::CLUSTER_BITS, 63),
            "cluster_bits at byte 20",
            "cluster_bits",
        ),
        (
            "cluster_bits 64",
            || plain().put_u32(field::CLUSTER_BITS, 64),
            "cluster_bits at byte 20",
            "cluster_bits",
        ),
        (
            "cluster_bits 2^32-1",
            || plain().put_u32(field::CLUSTER_BITS, !0),
            "cluster_bits at byte 20",
            "cluster_bits",
        ),
        (
            "cluster_bits of others",
            || plain().put_u32(field::CLUSTER_BITS, 9),
            "",
            "",
        ),
        (
            "version 0",
            || plain().put_u32(field::VERSION, 0),
            "version at byte 4",
            "version at byte 4",
        ),
        (
            "version 2^32-1",
            || plain().put_u32(field::VERSION, !0),
            "version at byte 4",
            "version at byte 4",
        ),
        (
            "version 2 as 3",
            || v2().put_u32(field::VERSION, 3),
            "header_length at byte 100",
            "header_length",
        ),
        (
            "version 3 as 2",
            || plain().put_u32(field::VERSION, 2),
            "",
            "",
        ),
        (
            "header_length 0",
            || plain().put_u32(field::HEADER_LENGTH, 0),
            "header_length at byte 100",
            "header_length",
        ),
        (
            "header_length 103",
            || plain().put_u32(field::HEADER_LENGTH, 103),
            "header_length at byte 100",
            "header_length",
        ),
        (
            "header_length odd",
            || plain().put_u32(field::HEADER_LENGTH, 113),
            "multiple of 8",
            "multiple of 8",
        ),
        (
            "header_length a cluster",
            || plain().put_u32(field::HEADER_LENGTH, 4096),
            "",
            "",
        ),
        (
            "header_length over a cluster",
            || plain().put_u32(field::HEADER_LENGTH, 4104),
            "more than a cluster",
            "more than a cluster",
        ),
        (
            "header_length 2^32-8",
            || plain().put_u32(field::HEADER_LENGTH, !7),
            "header_length at byte 100",
            "header_length",
        ),
        (
            "refcount_order 7",
            || plain().put_u32(field::REFCOUNT_ORDER, 7),
            "refcount_order at byte 96",
            "the highest is 6",
        ),
        (
            "refcount_order 64",
            || plain().put_u32(field::REFCOUNT_ORDER, 64),
            "refcount_order at byte 96",
            "refcount_order",
        ),
        (
            "refcount_order 2^32-1",
            || plain().put_u32(field::REFCOUNT_ORDER, !0),
            "refcount_order at byte 96",
            "refcount_order",
        ),
        (
            "refcount_order of others",
            || plain().put_u32(field::REFCOUNT_ORDER, 6),
            "",
            "",
        ),
        (
            "crypt_method 3",
            || plain().put_u32(field::CRYPT_METHOD, 3),
            "crypt_method at byte 32",
            "crypt_method",
        ),
        (
            "compression_type 255",
            || plain().put(field::COMPRESSION_TYPE, &[255]),
            "compression_type at byte 104",
            "compression_type",
        ),
        (
            "compression_type 2 with its bit",
            || {
                plain()
                    .put(field::COMPRESSION_TYPE, &[2])
                    .put_u64(field::INCOMPATIBLE, 8)
            },
            "compression_type at byte 104",
            "",
        ),
        (
            "compression bit without a type",
            || plain().put_u64(field::INCOMPATIBLE, 8),
            "compression_type at byte 104",
            "compression_type",
        ),
        (
            "all incompatible bits",
            || plain().put_u64(field::INCOMPATIBLE, !0),
            "",
            "",
        ),
        (
            "unknown incompatible bit",
            || plain().put_u64(field::INCOMPATIBLE, 1 << 63),
            "unknown feature bit 63",
            "unknown feature bit 63",
        ),
        (
            "all compatible bits",
            || plain().put_u64(field::COMPATIBLE, !0),
            "",
            "",
        ),
        (
            "all autoclear bits",
            || plain().put_u64(field::AUTOCLEAR, !0),
            "",
            "",
        ),
        (
            "extended L2 with small clusters",
            || plain().put_u64(field::INCOMPATIBLE, 16),
            "cluster_bits at byte 20",
            "cluster_bits",
        ),
    ]);
}

#[test]
fn cve_2014_0147_disk_sizes_that_overflow() {
    judge(&[
        (
            "size 2^64-1",
            || plain().put_u64(field::SIZE, !0),
            "size at byte 24",
            "size at byte 24",
        ),
        (
            "size 2^63",
            || plain().put_u64(field::SIZE, 1 << 63),
            "size at byte 24",
            "size at byte 24",
        ),
        (
            "size 2^63-512",
            || plain().put_u64(field::SIZE, (1 << 63) - 512),
            "l1_size at byte 36",
            "l1_size",
        ),
        (
            "size 2^56",
            || plain().put_u64(field::SIZE, 1 << 56),
            "l1_size at byte 36",
            "l1_size",
        ),
        (
            "size beyond the L1 table",
            || plain().put_u64(field::SIZE, (4 << 20) + 1),
            "the disk's size needs 3",
            "l1_size",
        ),
        (
            "size not of sectors",
            || plain().put_u64(field::SIZE, (4 << 20) - 1),
            "ok",
            "ok",
        ),
        ("size 0", || plain().put_u64(field::SIZE, 0), "", ""),
        ("size 1", || plain().put_u64(field::SIZE, 1), "", ""),
        // 8192 L2 tables that are not there.
        (
            "size 2^46 that fits",
            || {
                Forge::new(Shape {
                    cluster_bits: 18,
                    size: 1 << 46,
                    ..Shape::default()
                })
            },
            "ok",
            "ok",
        ),
    ]);
}

#[test]
fn cve_2014_0144_l1_and_refcount_tables_that_are_nowhere() {
    judge(&[
        (
            "l1_size 0",
            || plain().put_u32(field::L1_SIZE, 0),
            "l1_size at byte 36",
            "l1_size",
        ),
        (
            "l1_size 2^32-1",
            || plain().put_u32(field::L1_SIZE, !0),
            "l1_size at byte 36 is 4294967295, the highest is 4194304",
            "l1_size",
        ),
        (
            "l1_size 2^29",
            || plain().put_u32(field::L1_SIZE, 1 << 29),
            "l1_size at byte 36",
            "l1_size",
        ),
        (
            "l1_size 2^22",
            || plain().put_u32(field::L1_SIZE, 1 << 22),
            "behind the file's end",
            "",
        ),
        (
            "l1_table_offset 0",
            || plain().put_u64(field::L1_TABLE_OFFSET, 0),
            "l1_table_offset at byte 40",
            "l1_table_offset",
        ),
        (
            "l1_table_offset odd",
            || plain().put_u64(field::L1_TABLE_OFFSET, 513),
            "l1_table_offset at byte 40",
            "l1_table_offset",
        ),
        (
            "l1_table_offset 2^63",
            || plain().put_u64(field::L1_TABLE_OFFSET, 1 << 63),
            "l1_table_offset at byte 40",
            "l1_table_offset",
        ),
        (
            "l1_table_offset wraps",
            || plain().put_u64(field::L1_TABLE_OFFSET, !0xfff),
            "l1_table_offset at byte 40",
            "l1_table_offset",
        ),
        (
            "l1_table_offset 2^55",
            || plain().put_u64(field::L1_TABLE_OFFSET, 1 << 55),
            "behind the file's end",
            "",
        ),
        (
            "L1 table on the refcount table",
            || plain().put_u64(field::L1_TABLE_OFFSET, 4096),
            "overlaps",
            "",
        ),
        (
            "refcount_table_offset 0",
            || plain().put_u64(field::REFCOUNT_TABLE_OFFSET, 0),
            "refcount_table_offset at byte 48",
            "reserved bits set",
        ),
        (
            "refcount_table_offset odd",
            || plain().put_u64(field::REFCOUNT_TABLE_OFFSET, 4097),
            "refcount_table_offset at byte 48",
            "refcount_table_offset",
        ),
        (
            "refcount_table_offset 2^64-4096",
            || plain().put_u64(field::REFCOUNT_TABLE_OFFSET, !0xfff),
            "refcount_table_offset at byte 48",
            "refcount_table_offset",
        ),
        (
            "refcount_table_offset 2^55",
            || plain().put_u64(field::REFCOUNT_TABLE_OFFSET, 1 << 55),
            "refcount table",
            "",
        ),
        (
            "refcount table on the L1 table",
            || {
                let i = plain();
                let at = i.l1();
                i.put_u64(field::REFCOUNT_TABLE_OFFSET, at)
            },
            "overlaps",
            "",
        ),
        (
            "refcount_table_clusters 0",
            || plain().put_u32(field::REFCOUNT_TABLE_CLUSTERS, 0),
            "refcount_table_clusters at byte 56",
            "refcount_table_clusters",
        ),
        (
            "refcount_table_clusters 2^32-1",
            || plain().put_u32(field::REFCOUNT_TABLE_CLUSTERS, !0),
            "at most 8 MiB",
            "refcount_table_clusters",
        ),
        (
            "refcount_table_clusters 8 MiB",
            || plain().put_u32(field::REFCOUNT_TABLE_CLUSTERS, 2048),
            "",
            "",
        ),
        (
            "refcount_table_clusters 8 MiB and one",
            || plain().put_u32(field::REFCOUNT_TABLE_CLUSTERS, 2049),
            "refcount_table_clusters at byte 56",
            "refcount_table_clusters",
        ),
        (
            "refcount table wraps with 64 KiB clusters",
            || large_clusters().put_u32(field::REFCOUNT_TABLE_CLUSTERS, 1 << 31),
            "refcount_table_clusters at byte 56",
            "refcount_table_clusters",
        ),
    ]);
}

#[test]
fn cve_2014_0144_extension_lengths() {
    judge(&[
        (
            "extension of 2^32-1 bytes",
            || plain().put_u32(112, 7).put_u32(116, !0),
            "run out of the header",
            "run out",
        ),
        (
            "extension of 2^31-1 bytes",
            || plain().put_u32(112, 7).put_u32(116, !0 >> 1),
            "run out of the header",
            "run out",
        ),
        (
            "extension that wraps when rounded",
            || plain().put_u32(112, 7).put_u32(116, !6),
            "run out of the header",
            "run out",
        ),
        (
            "extension up to the cluster's end",
            || plain().put_u32(112, 7).put_u32(116, 4096 - 120),
            "ok",
            "ok",
        ),
        (
            "extension one byte too long",
            || plain().put_u32(112, 7).put_u32(116, 4096 - 119),
            "run out of the header",
            "run out",
        ),
        (
            "feature names twice",
            || {
                plain()
                    .extension(extension::FEATURE_NAMES, &[0; 48])
                    .extension(extension::FEATURE_NAMES, &[0; 48])
            },
            "ok",
            "ok",
        ),
        (
            "extension twice",
            || {
                plain()
                    .extension(extension::BITMAPS, &[0; 24])
                    .extension(extension::BITMAPS, &[0; 24])
            },
            "a second time",
            "a second time",
        ),
        (
            "feature names without end",
            || {
                plain()
                    .extension(extension::FEATURE_NAMES, &[0xff; 47])
                    .put_u64(field::INCOMPATIBLE, 1 << 40)
            },
            "unknown feature bit 40",
            "unknown feature",
        ),
        (
            "feature name that commands the terminal",
            || {
                plain()
                    .extension(
                        extension::FEATURE_NAMES,
                        &feature_name(40, b"\x1b]0;owned\x07\n\xff"),
                    )
                    .put_u64(field::INCOMPATIBLE, 1 << 40)
            },
            "?]0;owned??",
            "?]0;owned??",
        ),
        (
            "64 KiB of empty extensions",
            || (0..8100).fold(large_clusters(), |image, _| image.extension(7, &[])),
            "ok",
            "ok",
        ),
        (
            "backing format of 2000 bytes",
            || plain().backing(b"base", &"x".repeat(2000)),
            "",
            "",
        ),
    ]);
}

#[test]
fn cve_2014_0146_backing_names_outside_the_header() {
    judge(&[
        (
            "backing_file_offset 2^64-1",
            || {
                plain()
                    .put_u64(field::BACKING_FILE_OFFSET, !0)
                    .put_u32(field::BACKING_FILE_SIZE, 1)
            },
            "backing_file_offset at byte 8",
            "backing_file_offset",
        ),
        (
            "backing_file_offset 2^63",
            || {
                plain()
                    .put_u64(field::BACKING_FILE_OFFSET, 1 << 63)
                    .put_u32(field::BACKING_FILE_SIZE, 4)
            },
            "backing_file_offset at byte 8",
            "backing_file_offset",
        ),
        (
            "backing_file_offset in the header",
            || {
                plain()
                    .put_u64(field::BACKING_FILE_OFFSET, 8)
                    .put_u32(field::BACKING_FILE_SIZE, 4)
            },
            "backing_file_offset at byte 8",
            "backing_file_offset",
        ),
        (
            "backing_file_offset at the cluster's end",
            || {
                plain()
                    .put_u64(field::BACKING_FILE_OFFSET, 4096)
                    .put_u32(field::BACKING_FILE_SIZE, 1)
            },
            "backing_file_offset at byte 8",
            "backing_file_offset",
        ),
        (
            "backing_file_size 0",
            || plain().put_u64(field::BACKING_FILE_OFFSET, 400),
            "backing_file_size at byte 16",
            "backing_file_size",
        ),
        (
            "backing_file_size 1024",
            || plain().backing(&[b'x'; 1024], "raw"),
            "allowed are 1 to 1023",
            "backing_file_size",
        ),
        (
            "backing_file_size 1023",
            || plain().backing(&[b'x'; 1023], "raw"),
            "ok",
            "ok",
        ),
        (
            "backing_file_size 2^32-1",
            || {
                plain()
                    .backing(b"base", "raw")
                    .put_u32(field::BACKING_FILE_SIZE, !0)
            },
            "backing_file_size at byte 16",
            "backing_file_size",
        ),
        (
            "backing file's name over the cluster's end",
            || {
                plain()
                    .put_u64(field::BACKING_FILE_OFFSET, 4090)
                    .put_u32(field::BACKING_FILE_SIZE, 7)
            },
            "backing_file_offset at byte 8",
            "backing_file_offset",
        ),
        (
            "backing file's name with a zero",
            || plain().backing(b"ba\0se", "raw"),
            "zero byte",
            "zero byte",
        ),
        (
            "backing file's name in front of the header",
            || {
                plain()
                    .put_u64(field::BACKING_FILE_OFFSET, 111)
                    .put_u32(field::BACKING_FILE_SIZE, 1)
            },
            "backing_file_offset at byte 8",
            "",
        ),
    ]);
}

#[test]
fn encryption_headers_of_any_size() {
    fn crypto(at: u64, len: u64) -> Forge {
        plain().put_u32(field::CRYPT_METHOD, 2).extension(
            extension::CRYPTO_HEADER,
            &[at.to_be_bytes(), len.to_be_bytes()].concat(),
        )
    }
    judge(&[
        (
            "LUKS without a header",
            || plain().put_u32(field::CRYPT_METHOD, 2),
            "",
            "",
        ),
        (
            "LUKS header between clusters",
            || crypto(4097, 4096),
            "",
            "between clusters",
        ),
        (
            "LUKS header of 2^64-1 bytes",
            || crypto(4096, !0),
            "",
            "64 MiB",
        ),
        (
            "LUKS header of 64 MiB and one",
            || crypto(4096, (64 << 20) + 1),
            "",
            "64 MiB",
        ),
        ("LUKS header of no bytes", || crypto(4096, 0), "", ""),
        ("LUKS header at 2^64-4096", || crypto(!0xfff, 4096), "", ""),
        (
            "LUKS header behind the end",
            || crypto(1 << 40, 4096),
            "",
            "",
        ),
        ("LUKS header on the image's", || crypto(0, 4096), "", ""),
        (
            "LUKS extension of 15 bytes",
            || {
                plain()
                    .put_u32(field::CRYPT_METHOD, 2)
                    .extension(extension::CRYPTO_HEADER, &[0; 15])
            },
            "",
            "16 bytes",
        ),
        (
            "LUKS extension without LUKS",
            || crypto(4096, 4096).put_u32(field::CRYPT_METHOD, 0),
            "",
            "",
        ),
    ]);
}

#[test]
fn luks_headers_that_ask_for_too_much() {
    /// An encrypted image whose LUKS header has these bytes at `at`.
    fn with(at: u64, bytes: &[u8]) -> Forge {
        let mut image = plain().put_u32(field::CRYPT_METHOD, 2);
        let len = 513 * 4096u64;
        let header = image.allocate(len / 4096);
        let data = [header.to_be_bytes(), len.to_be_bytes()].concat();
        let image = image.extension(extension::CRYPTO_HEADER, &data);
        image.put(header, &luks()).put(header + at, bytes)
    }
    judge(&[
        ("as it should be", || with(0, b"L"), "", "ok"),
        ("no LUKS", || with(0, b"X"), "magic at byte 0", ""),
        ("version 2", || with(7, &[2]), "version at byte 6 is 2", ""),
        (
            "no end of the cipher's name",
            || with(8, &[b'a'; 32]),
            "cipher name at byte 8",
            "",
        ),
        ("an unknown cipher", || with(8, b"rot"), "LUKS header", ""),
        (
            "a mode that is no text",
            || with(40, &[0xff; 31]),
            "cipher mode at byte 40",
            "",
        ),
        (
            "keys of 2^32-1 bytes",
            || with(108, &[0xff; 4]),
            "LUKS header",
            "",
        ),
        ("keys of no bytes", || with(108, &[0; 4]), "LUKS header", ""),
        (
            "payload in the header",
            || with(104, &[0; 4]),
            "payload offset at byte 104",
            "",
        ),
        (
            "no iterations",
            || with(164, &[0; 4]),
            "master key iterations at byte 164",
            "",
        ),
        (
            "2^32-1 iterations in each slot",
            || {
                (0..8).fold(with(164, &[0xff; 4]), |image, slot| {
                    let at = image
                        .bytes
                        .windows(6)
                        .position(|w| w == b"LUKS\xba\xbe")
                        .unwrap() as u64;
                    image
                        .put_u32(at + 208 + 48 * slot, 0x00ac_71f3)
                        .put_u32(at + 212 + 48 * slot, !0)
                })
            },
            "iterations of PBKDF2, the most is",
            "",
        ),
        (
            "a slot neither active nor not",
            || with(208, &[1]),
            "key slot 0: state at byte 208",
            "",
        ),
        (
            "2^32-1 stripes",
            || with(252, &[0xff; 4]),
            "key slot 0: stripes at byte 252",
            "",
        ),
        (
            "a material in the header",
            || with(248, &[0; 4]),
            "key slot 0: material's offset at byte 248",
            "",
        ),
        (
            "a material at 2 TiB",
            || with(248, &[0xff; 4]),
            "key slot 0: material's offset at byte 248",
            "",
        ),
        (
            "materials over each other",
            || with(248 + 48, &8u32.to_be_bytes()),
            "overlaps that of key slot 0",
            "",
        ),
    ]);
}
