//! Images that are truncated, corrupt or made to harm: an error that names file and field, no panic, no
//! write to the file, and bounded memory and time.

use crate::peer;

use block::ErrorKind;
use disk::ChainOptions;
use image::Format;
use peer::{Random, qemu_img, qemu_io};
use std::{fs, path::Path};

const CLUSTER: usize = 4096;
const DISK_BYTES: u64 = 1 << 20;

/// A good image: data, zero and compressed clusters, an extension, a backing file's name.
fn sample(dir: &Path) -> Vec<u8> {
    qemu_img(dir, &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    qemu_img(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=4096",
            "-b",
            "base.raw",
            "-F",
            "raw",
            "good",
            "1M",
        ],
    );
    let script = "write -q -P 1 0 64k\nwrite -q -P 2 512k 40k\nwrite -q -z 128k 32k\n\
                  write -q -c -P 3 768k 4k\nwrite -q -c -P 4 772k 4k\n";
    qemu_io(dir, "qcow2", "good", script);
    fs::read(dir.join("good")).unwrap()
}

fn u64_at(bytes: &[u8], at: usize) -> usize {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Opens the image for writing and reads all of it; the first thing that goes wrong.
fn use_it(path: &Path, read_only: bool) -> Result<(), block::Error> {
    let options = ChainOptions {
        format: Some(Format::Qcow2),
        read_only,
        cache: io::Cache::Unsafe,
        ..ChainOptions::default()
    };
    let chain = peer::open_chain(path, &options)?;
    let mut driver = chain.driver()?;
    let mut buf = vec![0; 64 << 10];
    let mut failed = None;
    let mut at = 0;
    // Sizes are the image's claim: look at a part only.
    while at < driver.size().min(2 * DISK_BYTES) {
        let len = (driver.size() - at).min(buf.len() as u64) as usize;
        if let Err(error) = driver.read(at, &mut buf[..len]) {
            failed.get_or_insert(error);
        }
        at += len as u64;
    }
    failed.map_or(Ok(()), Err)
}

type Damage = fn(&mut Vec<u8>);

/// What is done to the image, and what the error must say (`""`: it may as well be read).
const TABLE: &[(&str, Damage, &str)] = &[
    ("empty", |b| b.clear(), "header: the first 4 bytes"),
    ("3 bytes", |b| b.truncate(3), "header: the first 4 bytes"),
    ("ends in the header", |b| b.truncate(71), "ends inside"),
    (
        "ends in version 3's part",
        |b| b.truncate(103),
        "ends inside",
    ),
    (
        "ends before the tables",
        |b| b.truncate(CLUSTER),
        "L1 table",
    ),
    (
        "version 1",
        |b| put(b, 4, &1u32.to_be_bytes()),
        "version at byte 4",
    ),
    (
        "version 4",
        |b| put(b, 4, &4u32.to_be_bytes()),
        "version at byte 4",
    ),
    (
        "cluster_bits 8",
        |b| put(b, 20, &8u32.to_be_bytes()),
        "cluster_bits at byte 20",
    ),
    (
        "cluster_bits 22",
        |b| put(b, 20, &22u32.to_be_bytes()),
        "cluster_bits at byte 20",
    ),
    (
        "cluster_bits -1",
        |b| put(b, 20, &[0xff; 4]),
        "cluster_bits at byte 20",
    ),
    ("size 2^64-1", |b| put(b, 24, &[0xff; 8]), "size at byte 24"),
    (
        "size 2^60",
        |b| put(b, 24, &(1u64 << 60).to_be_bytes()),
        "l1_size at byte 36",
    ),
    (
        "crypt_method 2",
        |b| put(b, 32, &2u32.to_be_bytes()),
        "(LUKS header): it is missing",
    ),
    (
        "crypt_method 3",
        |b| put(b, 32, &3u32.to_be_bytes()),
        "crypt_method at byte 32",
    ),
    ("l1_size 0", |b| put(b, 36, &[0; 4]), "l1_size at byte 36"),
    (
        "l1_size 2^32-1",
        |b| put(b, 36, &[0xff; 4]),
        "l1_size at byte 36",
    ),
    (
        "l1_table_offset 0",
        |b| put(b, 40, &[0; 8]),
        "l1_table_offset at byte 40",
    ),
    (
        "l1_table_offset odd",
        |b| b[47] = 1,
        "l1_table_offset at byte 40",
    ),
    (
        "l1_table_offset 2^64-1",
        |b| put(b, 40, &[0xff; 8]),
        "l1_table_offset at byte 40",
    ),
    (
        "l1 behind the end",
        |b| put(b, 40, &(1u64 << 40).to_be_bytes()),
        "L1 table",
    ),
    (
        "refcount_table_offset 0",
        |b| put(b, 48, &[0; 8]),
        "refcount_table_offset at byte 48",
    ),
    (
        "refcount table behind the end",
        |b| put(b, 48, &(1u64 << 40).to_be_bytes()),
        "refcount table",
    ),
    (
        "refcount_table_clusters 0",
        |b| put(b, 56, &[0; 4]),
        "refcount_table_clusters at byte 56",
    ),
    (
        "refcount_table_clusters -1",
        |b| put(b, 56, &[0xff; 4]),
        "refcount_table_clusters at byte 56",
    ),
    (
        "nb_snapshots -1",
        |b| put(b, 60, &[0xff; 4]),
        "nb_snapshots at byte 60",
    ),
    ("external data file", |b| b[79] |= 4, "say --data-file"),
    ("extended L2", |b| b[79] |= 16, "extended L2"),
    ("unknown feature", |b| b[74] |= 1, "unknown feature bit 40"),
    ("dirty", |b| b[79] |= 1, "dirty bit"),
    ("corrupt", |b| b[79] |= 2, "marked corrupt"),
    (
        "refcount_order 7",
        |b| put(b, 96, &7u32.to_be_bytes()),
        "refcount_order at byte 96",
    ),
    (
        "header_length 0",
        |b| put(b, 100, &[0; 4]),
        "header_length at byte 100",
    ),
    (
        "header_length 8192",
        |b| put(b, 100, &8192u32.to_be_bytes()),
        "header_length at byte 100",
    ),
    (
        "compression_type 1",
        |b| b[104] = 1,
        "compression_type at byte 104",
    ),
    (
        "compression_type 9",
        |b| (b[104], b[79]) = (9, b[79] | 8),
        "compression_type at byte 104",
    ),
    (
        "backing_file_offset",
        |b| put(b, 8, &(1u64 << 40).to_be_bytes()),
        "backing_file_offset at byte 8",
    ),
    (
        "backing_file_size",
        |b| put(b, 16, &[0xff; 4]),
        "backing_file_size at byte 16",
    ),
    (
        "extension length",
        |b| put(b, 116, &[0xff; 4]),
        "header extension",
    ),
    (
        "extended by itself",
        |b| {
            let (at, len) = (u64_at(b, 8), 4);
            put(b, at, &b"good"[..len]);
            put(b, 16, &(len as u32).to_be_bytes());
            put(b, 120, b"qcow");
            put(b, 116, &5u32.to_be_bytes());
            put(b, 124, b"2\0\0\0");
        },
        "loop",
    ),
    (
        "L1 entry odd",
        |b| {
            let l1 = u64_at(b, 40);
            b[l1 + 6] |= 2
        },
        "L1",
    ),
    (
        "L1 entry behind the end",
        |b| {
            let l1 = u64_at(b, 40);
            b[l1 + 2] = 1
        },
        "",
    ),
    (
        "L1 entry on the header",
        |b| {
            let l1 = u64_at(b, 40);
            put(b, l1, &(1u64 << 63).to_be_bytes())
        },
        "",
    ),
    (
        "L1 entry on the L1 table",
        |b| {
            let l1 = u64_at(b, 40);
            put(b, l1, &(1u64 << 63 | l1 as u64).to_be_bytes());
        },
        "",
    ),
    (
        "L2 entry odd",
        |b| {
            let l2 = l2(b);
            b[l2 + 6] |= 2
        },
        "L2",
    ),
    (
        "L2 entry behind the end",
        |b| {
            let l2 = l2(b);
            b[l2 + 2] = 1
        },
        "",
    ),
    (
        "L2 entry on the refcount table",
        |b| {
            let (l2, table) = (l2(b), u64_at(b, 48));
            put(b, l2, &(1u64 << 63 | table as u64).to_be_bytes());
        },
        "",
    ),
    (
        "compressed garbage",
        |b| {
            // Whatever the entry says, its cluster is the file's first bytes.
            let l2 = l2(b);
            put(b, l2 + 192 * 8, &(1u64 << 62).to_be_bytes());
        },
        "compressed",
    ),
    (
        "compressed behind the end",
        |b| {
            let l2 = l2(b);
            put(b, l2 + 192 * 8, &(1u64 << 62 | 1 << 50).to_be_bytes());
        },
        "compressed",
    ),
];

/// Where the first L2 table is.
fn l2(bytes: &[u8]) -> usize {
    u64_at(bytes, u64_at(bytes, 40)) & 0x00ff_ffff_ffff_fe00
}

#[test]
fn every_kind_of_damage_is_named() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let good = sample(dir);
    use_it(&dir.join("good"), false).unwrap();
    for (what, damage, says) in TABLE {
        let mut bytes = good.clone();
        damage(&mut bytes);
        assert_ne!(bytes, good, "{what}");
        let path = dir.join("good");
        fs::write(&path, &bytes).unwrap();
        let error = match use_it(&path, false) {
            Ok(()) => {
                assert!(says.is_empty(), "{what}: accepted");
                continue;
            }
            Err(error) => error,
        };
        let text = error.to_string();
        assert!(text.contains(says), "{what}: {text}");
        if !says.is_empty() {
            assert!(
                text.contains("good"),
                "{what} does not name the file: {text}"
            );
        }
        let kinds = [ErrorKind::Corrupt, ErrorKind::Unsupported];
        assert!(kinds.contains(&error.kind()), "{what}: {error:?}");
        assert!(
            fs::read(&path).unwrap() == bytes,
            "{what}: the file changed"
        );
    }
}

/// Random damage in the metadata: nothing that is read or written may panic, hang or take more than a
/// bounded cache, and reading leaves the file alone.
#[test]
fn random_damage_is_survived() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let good = sample(dir);
    let path = dir.join("good");
    let mut opened = 0;
    for seed in 0..400 {
        let mut random = Random::new(seed);
        let mut bytes = good.clone();
        for _ in 0..=random.below(4) {
            // Mostly where the tables are.
            let end = match random.below(4) {
                0 => 160,
                1 => CLUSTER,
                _ => bytes.len().min(16 * CLUSTER),
            };
            let at = random.below(end as u64) as usize;
            match random.below(3) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = random.next() as u8,
                _ => {
                    let at = at & !7;
                    put(&mut bytes, at, &random.next().to_be_bytes());
                }
            }
        }
        fs::write(&path, &bytes).unwrap();
        let read = use_it(&path, true);
        assert!(
            fs::read(&path).unwrap() == bytes,
            "{seed}: reading wrote ({read:?})"
        );
        let options = ChainOptions {
            format: Some(Format::Qcow2),
            cache: io::Cache::Unsafe,
            ..ChainOptions::default()
        };
        let Ok(chain) = peer::open_chain(&path, &options) else {
            continue;
        };
        opened += 1;
        let mut driver = chain.driver().unwrap();
        let size = driver.size().min(2 * DISK_BYTES);
        for _ in 0..20 {
            let at = random.below(size);
            let len = random.below(20_000).min(size - at);
            // Refusals are as good as success here.
            let _ = match random.below(4) {
                0 => driver.discard(at, len),
                1 => driver.write_zeroes(at, len, true),
                2 => driver.flush(),
                _ => driver.write(at, &vec![9; len as usize]),
            };
        }
        let _ = driver.close();
        assert!(
            fs::metadata(&path).unwrap().len() < 64 << 20,
            "{seed}: the file grew without measure"
        );
    }
    assert!(
        opened > 50,
        "the damage was too much to test anything: {opened}"
    );
}
