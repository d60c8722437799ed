//! Of the whole format, against a model and against the installed QEMU. What a crash leaves: crate `crash`.

use super::header::Header;
use super::{CreateOptions, ImageWriter, OpenOptions, Qcow, create, empty};
use crate::qcow2::testing::{Driver, MemFile, Rng, run};
use crate::qcow2::{Compression, Compressor};
use crate::{ExtentKind, Image, ZeroMode};
use block::{ErrorKind, Storage};
use std::fs;
use std::path::Path;

/// log2 of the bytes of a cluster and of the entries of an L2 table: QEMU's, and the ends of what it takes.
const KINDS: [(u32, u32); 6] = [(12, 9), (9, 12), (9, 6), (16, 6), (16, 13), (12, 7)];

/// An image with clusters and tables that nobody makes but us, and a name that makes the L1 table begin anywhere.
fn made(size: u64, (cluster_bits, l2_bits): (u32, u32), backing: Option<&str>) -> MemFile {
    let file = MemFile::default();
    let mut header = CreateOptions {
        size,
        backing: backing.map(str::to_owned),
    }
    .header();
    (header.size, header.cluster_bits, header.l2_bits) = (size, cluster_bits, l2_bits);
    super::create::begin(&file, &header).unwrap();
    super::create::seal(&file, &header).unwrap();
    file
}

fn open(file: &MemFile) -> Driver<Qcow> {
    let image = Qcow::open(file, &OpenOptions::default()).unwrap();
    Driver::of(file.clone(), image)
}

/// What cannot be compressed.
fn noise(rng: &mut Rng, len: u64) -> Vec<u8> {
    (0..len).map(|_| (rng.next() >> 20) as u8).collect()
}

/// What QEMU reads of the image in `bytes`, over `backing`.
fn by_qemu(dir: &Path, bytes: &[u8], backing: &[u8]) -> Vec<u8> {
    fs::write(dir.join("base.raw"), backing).unwrap();
    let [from, to] = ["image.qcow", "out.raw"].map(|name| dir.join(name));
    fs::write(&from, bytes).unwrap();
    let paths = [from.to_str().unwrap(), to.to_str().unwrap()];
    let args = ["convert", "-f", "qcow", "-O", "raw", paths[0], paths[1]];
    run("qemu-img", &args);
    fs::read(&to).unwrap()
}

#[test]
fn behaves_as_the_model_and_qemu_reads_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, kind) in (0u64..).zip(KINDS) {
        for backing_name in [None, Some("base.raw")] {
            let mut rng = Rng(seed);
            let size = (40 << kind.0).min(1 << 20) + 512;
            let backing = match backing_name {
                Some(_) => rng.bytes(size - 1024),
                None => Vec::new(),
            };
            let mut model = backing.clone();
            model.resize(size as usize, 0);
            // Half a sector more is none of the disk.
            let file = made(size + 256, kind, backing_name);
            let mut driver = open(&file);
            driver.backing.clone_from(&backing);
            for turn in 0..60 {
                driver.change(&mut model, &mut rng, 3 << kind.0);
                if turn % 20 == 19 {
                    assert!(driver.read(0, size).unwrap() == model, "{kind:?}");
                    driver.close();
                    driver = open(&file);
                    driver.backing.clone_from(&backing);
                }
            }
            let file = driver.close();
            let theirs = by_qemu(dir.path(), &file, &backing);
            assert!(theirs == model, "{kind:?} {backing_name:?}");
        }
    }
}

/// Guest clusters of a disk, each of which may be zeros, all one byte, or noise.
fn content(rng: &mut Rng, clusters: u64, cluster: u64) -> Vec<Option<Vec<u8>>> {
    (0..clusters)
        .map(|_| match rng.below(5) {
            0 => None,
            1 => Some(vec![0; cluster as usize]),
            2 => Some(noise(rng, cluster)),
            _ => Some(rng.bytes(cluster)),
        })
        .collect()
}

/// Writes them in order, and tells what the disk reads as.
fn written(
    options: &CreateOptions,
    clusters: &[Option<Vec<u8>>],
    backing: &[u8],
) -> (MemFile, Vec<u8>) {
    let file = MemFile::default();
    let mut writer = ImageWriter::new(&file, options).unwrap();
    let cluster = writer.cluster_size() as usize;
    let mut packer = Compressor::new(Compression::Zlib).unwrap();
    let mut packed = Vec::new();
    let mut model = Vec::new();
    for (guest, bytes) in clusters.iter().enumerate() {
        let below = backing.iter().skip(guest * cluster).copied();
        let below = below.chain(std::iter::repeat(0)).take(cluster);
        match bytes {
            None => model.extend(below),
            Some(bytes) => {
                model.extend_from_slice(bytes);
                let guest = guest as u64;
                match packer.pack(bytes, &mut packed) {
                    _ if bytes.iter().all(|b| *b == 0) => writer.put_zero(guest).unwrap(),
                    true => writer.put_compressed(guest, &packed).unwrap(),
                    false => writer.put_data(guest, bytes).unwrap(),
                }
            }
        }
    }
    writer.finish().unwrap();
    model.truncate(options.size as usize);
    (file, model)
}

#[test]
fn compressed_images_are_what_qemu_reads_and_may_be_written_to() {
    let dir = tempfile::tempdir().unwrap();
    for backing_name in [None, Some("base.raw".to_owned())] {
        let mut rng = Rng(3);
        // More than two L2 tables, and an end within a cluster.
        let options = CreateOptions {
            size: (4 << 20) + 35 * 512,
            backing: backing_name.clone(),
        };
        let backing = match backing_name {
            Some(_) => noise(&mut rng, 3 << 20),
            None => Vec::new(),
        };
        let cluster = options.cluster_size();
        let content = content(&mut rng, options.size.div_ceil(cluster), cluster);
        let (file, mut model) = written(&options, &content, &backing);
        assert!(by_qemu(dir.path(), &file.bytes(), &backing) == model);
        let mut driver = open(&file);
        driver.backing.clone_from(&backing);
        assert!(driver.read(0, options.size).unwrap() == model);
        let compressed = (0..options.size)
            .step_by(cluster as usize)
            .filter(|at| {
                let at = block::GuestOffset(*at);
                let extent = driver.ask(|image| image.map(at, 1)).unwrap();
                matches!(extent.kind, ExtentKind::Compressed(_))
            })
            .count();
        assert!(compressed > content.len() / 3, "{compressed}");
        for _ in 0..100 {
            driver.change(&mut model, &mut rng, 3 * cluster);
        }
        assert!(driver.read(0, options.size).unwrap() == model);
        let bytes = driver.close();
        assert!(by_qemu(dir.path(), &bytes, &backing) == model);
    }
}

#[test]
fn what_qemu_writes_reads_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng(9);
    let mut disk = rng.bytes(3 << 20);
    disk[1 << 20..(1 << 20) + 70_000].fill(0);
    let part = noise(&mut rng, 100_000);
    disk[2_000_000..2_100_000].copy_from_slice(&part);
    disk.extend_from_slice(&[7; 512]);
    let [raw, qcow] = ["disk.raw", "disk.qcow"].map(|name| dir.path().join(name));
    fs::write(&raw, &disk).unwrap();
    let [raw, qcow] = [&raw, &qcow].map(|path| path.to_str().unwrap());
    for packed in [false, true] {
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow", raw, qcow];
        if packed {
            args.insert(1, "-c");
        }
        // With -c version 10 makes the image, and fails silently at its end.
        let out = std::process::Command::new("qemu-img")
            .args(&args)
            .output()
            .unwrap();
        assert!(packed || out.status.success(), "{out:?}");
        let script = ["write -P 3 5000 70000", "write -P 4 1050000 512"];
        run(
            "qemu-io",
            &["-f", "qcow", "-c", script[0], "-c", script[1], qcow],
        );
        let mut model = disk.clone();
        model[5000..75_000].fill(3);
        model[1_050_000..1_050_512].fill(4);
        let file = MemFile::of(fs::read(qcow).unwrap());
        let mut driver = open(&file);
        assert!(
            driver.read(0, model.len() as u64).unwrap() == model,
            "{packed}"
        );
        let data = noise(&mut rng, 20_480);
        driver.write(512, &data).unwrap();
        model[512..20_992].copy_from_slice(&data);
        let bytes = driver.close();
        assert!(by_qemu(dir.path(), &bytes, &[]) == model, "{packed}");
    }
}

/// The L1 table shares sectors with the header and the name, and after a commit with compressed bytes behind it.
#[test]
fn what_shares_a_sector_with_the_l1_table_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    for len in [1, 8, 100, 470, 500, 1023] {
        let name = "n".repeat(len);
        let file = MemFile::default();
        let options = CreateOptions {
            size: 8 << 20,
            backing: Some(name.clone()),
        };
        create(&file, &options).unwrap();
        let header = Header::read(&file).unwrap();
        // What QEMU puts behind an emptied table.
        empty(&file).unwrap();
        assert_eq!(file.len().unwrap(), header.l1_table_offset + 4 * 8);
        let end = file.len().unwrap();
        file.write_at(end, b"compressed bytes").unwrap();
        let mut driver = open(&file);
        for at in [0, 2 << 20, 6 << 20] {
            driver.write(at, &[at as u8 + 1; 1024]).unwrap();
        }
        driver.flush().unwrap();
        driver.close();
        assert_eq!(Header::read(&file).unwrap(), header);
        assert_eq!(header.backing.as_deref(), Some(&name[..]));
        let bytes = file.bytes();
        assert!(bytes[end as usize..].starts_with(b"compressed bytes"));
        if len < 256 {
            fs::write(dir.path().join(&name), []).unwrap();
            let theirs = by_qemu(dir.path(), &bytes, &[]);
            assert!(theirs[2 << 20..(2 << 20) + 1024].iter().all(|b| *b == 1));
        }
    }
}

#[test]
fn an_emptied_image_reads_as_its_backing_file() {
    let file = made(1 << 20, (9, 12), Some("base.raw"));
    let mut driver = open(&file);
    driver.write(0, &[1; 4096]).unwrap();
    driver.close();
    let full = file.len().unwrap();
    empty(&file).unwrap();
    assert!(file.len().unwrap() < full - 4096);
    let mut driver = open(&file);
    driver.backing = vec![5; 1 << 20];
    assert!(driver.read(0, 1 << 20).unwrap() == driver.backing);
}

/// In an image without a backing file a flush is one barrier, but for the first; copies of a backing file's bytes are to
/// be durable before the entries.
#[test]
fn flushes_are_one_barrier_or_two() {
    for (backing, barriers) in [(Vec::new(), 9), (vec![7; 1 << 20], 18)] {
        let name = (!backing.is_empty()).then_some("base.raw");
        let mut driver = open(&made(64 << 20, (12, 9), name));
        driver.backing = backing;
        driver.write(0, &[1; 512]).unwrap();
        driver.flush().unwrap();
        assert_eq!(driver.barriers, 2);
        for i in 1..10u64 {
            driver.write(i * 4096, &[i as u8; 512]).unwrap();
            driver.flush().unwrap();
        }
        assert_eq!(driver.barriers - 2, barriers);
    }
}

/// Headers that cannot be: each is refused with the field's name, and nothing is allocated for it.
#[test]
fn wrong_headers_are_refused_by_field() {
    let max = u64::MAX.to_be_bytes();
    for (at, bytes, field) in [
        (0, &b"QFJ\xfb"[..], "not a qcow image"),
        (4, &[0, 0, 0, 2], "version at byte 4 is 2"),
        (8, &max, "backing_file_offset"),
        (8, &4096u64.to_be_bytes()[..], "backing_file_offset"),
        (16, &1024u32.to_be_bytes()[..], "backing_file_size"),
        (24, &[0; 8], "size at byte 24 is 0"),
        (24, &1u64.to_be_bytes()[..], "size at byte 24 is 1"),
        (24, &max, "size at byte 24"),
        (24, &(1u64 << 62).to_be_bytes()[..], "8388608 are the most"),
        (24, &(1u64 << 40).to_be_bytes()[..], "it is cut off"),
        (32, &[8], "cluster_bits"),
        (32, &[17], "cluster_bits"),
        (32, &[255], "cluster_bits"),
        (33, &[5], "l2_bits"),
        (33, &[14], "l2_bits"),
        (36, &[0, 0, 0, 2], "crypt_method"),
        (40, &[0; 8], "l1_table_offset"),
        (40, &47u64.to_be_bytes()[..], "l1_table_offset"),
        (40, &(1u64 << 20).to_be_bytes()[..], "l1_table_offset"),
        (40, &max, "l1_table_offset"),
        (40, &(u64::MAX - 7).to_be_bytes()[..], "l1_table_offset"),
    ] {
        let file = made(1 << 20, (12, 9), Some("base"));
        file.patch(at, bytes);
        let error = Qcow::open(&file, &OpenOptions::default()).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(field), "{field} {bytes:x?}: {error}");
    }
    for len in [0, 4, 47, 48, 55] {
        let file = made(1 << 20, (12, 9), None);
        file.set_len(len).unwrap();
        assert!(Qcow::open(&file, &OpenOptions::default()).is_err(), "{len}");
    }
}

/// Entries that no sound image has: reads fail, writes fail, and nothing of the file is harmed.
#[test]
fn wrong_entries_are_errors() {
    let file = made(16 << 20, (12, 9), None);
    let mut driver = open(&file);
    driver.write(0, &[1; 8192]).unwrap();
    driver.close();
    let (sound, len) = (file.bytes(), file.len().unwrap());
    let l2 = crate::words::read_u64(&sound, 48).unwrap();
    let compressed = |len: u64, at: u64| 1 << 63 | len << 51 | at;
    for entry in [
        1,
        2,
        513,
        l2,
        4096 - 512,
        len,
        len + 4096,
        1 << 62,
        u64::MAX,
        compressed(0, 4096),
        compressed(100, len),
        compressed(100, len - 99),
        compressed(4095, (1 << 51) - 1),
    ] {
        let file = MemFile::of(sound.clone());
        file.patch(l2 as usize, &entry.to_be_bytes());
        let mut driver = open(&file);
        let error = driver.write(0, &[2; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry:#x}: {error}");
        assert!(driver.read(0, 512).is_err(), "{entry:#x}");
        assert!(driver.zero(0, 4096, ZeroMode::Discard).is_err());
        // Its neighbour can be read; and where the entry must not come to refer to what the file gets, nothing is written.
        assert_eq!(driver.read(4096, 512).unwrap(), [1; 512]);
        let behind = entry >= len && entry.is_multiple_of(512) || entry >= 1 << 62;
        let nothing = entry == compressed(0, 4096);
        match driver.write(8192, &[3; 512]) {
            Ok(()) => assert!(!behind || nothing, "{entry:#x}"),
            Err(error) => {
                assert!(behind && !nothing, "{entry:#x}: {error}");
                assert!(error.to_string().contains("not written to"), "{error}");
            }
        }
        driver.close();
        let after = &file.bytes()[l2 as usize..l2 as usize + 8];
        let kept = if entry == 1 { 2u64 } else { entry };
        assert_eq!(after, kept.to_be_bytes(), "{entry:#x}");
    }
    // L1 entries: nothing is written then.
    for entry in [1, 512, 0x800, len, len - 512, u64::MAX - 511, 1 << 63] {
        let file = MemFile::of(sound.clone());
        file.patch(56, &entry.to_be_bytes());
        let mut driver = open(&file);
        assert_eq!(driver.read(0, 512).unwrap(), [1; 512]);
        let error = driver.write(0, &[2; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly, "{entry:#x}: {error}");
        assert!(error.to_string().contains("L1 entry 1 is"), "{error}");
        driver.image.close(&[&file]).unwrap();
        assert!(file.bytes()[..48] == sound[..48]);
    }
}

/// The mark of an entry whose cluster shares bytes with a table is never written; where the file has its bit already, nothing
/// is written at all.
#[test]
fn marks_of_entries_stay_in_memory() {
    let file = made(16 << 20, (12, 9), None);
    let mut driver = open(&file);
    driver.write(0, &[1; 8192]).unwrap();
    driver.write(2 << 20, &[1; 4096]).unwrap();
    driver.close();
    let sound = file.bytes();
    let [first, second] = [48, 56].map(|at| crate::words::read_u64(&sound, at).unwrap());
    for (entry, changes) in [
        (second, true),
        (second + 512, true),
        // Only the last bytes of the cluster are the table's.
        (second - 512, true),
        (second | 4, false),
        (second - 508, false),
    ] {
        let file = MemFile::of(sound.clone());
        file.patch(first as usize, &entry.to_be_bytes());
        let mut driver = open(&file);
        assert!(driver.read(0, 512).is_err(), "{entry:#x}");
        // Its neighbour in the table's first sector.
        assert_eq!(driver.write(8192, &[3; 512]).is_ok(), changes, "{entry:#x}");
        driver.close();
        let after = &file.bytes()[first as usize..first as usize + 8];
        assert_eq!(after, entry.to_be_bytes(), "{entry:#x}");
    }
}

#[test]
fn new_images_are_those_of_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let theirs = dir.path().join("theirs");
    let theirs = theirs.to_str().unwrap();
    for (size, backing) in [
        (512, None),
        (1_000_000, None),
        (3 << 30, None),
        (1 << 30, Some("base")),
        (5 << 20, Some("a longer name of 36 bytes, not of 40")),
    ] {
        let text = size.to_string();
        let mut args = vec!["create", "-q", "-u", "-f", "qcow", theirs, &text];
        if let Some(name) = backing {
            args.splice(5..5, ["-F", "raw", "-b", name]);
        }
        run("qemu-img", &args);
        let ours = MemFile::default();
        let options = CreateOptions {
            size,
            backing: backing.map(str::to_owned),
        };
        create(&ours, &options).unwrap();
        assert!(
            ours.bytes() == fs::read(theirs).unwrap(),
            "{size} {backing:?}"
        );
    }
    for (options, why) in [
        (CreateOptions::default(), "1 sector"),
        (
            CreateOptions {
                size: (16 << 40) + 1,
                backing: None,
            },
            "the most is 16 TiB",
        ),
        (
            CreateOptions {
                size: 512,
                backing: Some("n".repeat(1024)),
            },
            "1 to 1023",
        ),
    ] {
        let error = create(&MemFile::default(), &options)
            .unwrap_err()
            .to_string();
        assert!(error.contains(why), "{error}");
    }
}
