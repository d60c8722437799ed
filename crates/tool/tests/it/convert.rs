//! What `convert` writes: QEMU finds it sound and reads the same bytes, its size is that of QEMU's own, and it does
//! not depend on the number of workers.

use block::{Result, Storage};
use disk::blocking::{Driver, Member};
use disk::{Chain, ChainOptions};
use image::Format;
use image::qcow2::{Compression, CreateOptions, ImageWriter};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use testkit::memory::Memory;
use testkit::{TempDir, qemu};
use tool::convert::{ConvertOptions, Report, Target, convert};
use tool::source::Source;
use tool::work::{Stop, Work};

const MIB: usize = 1 << 20;

/// Bytes of every kind: text that packs well, records, noise, and zeros between.
fn disk(len: usize, seed: u64) -> Vec<u8> {
    let mut random = seed;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut bytes = vec![0; len];
    let words = [
        "disk", "plane", "image", "cluster", "queue", " the ", "of", "\n",
    ];
    for (nth, part) in bytes.chunks_mut(37_000).enumerate() {
        match nth % 5 {
            0 => {
                let mut at = 0;
                while at < part.len() {
                    let word = words[(next() % 8) as usize].as_bytes();
                    let n = word.len().min(part.len() - at);
                    part[at..at + n].copy_from_slice(&word[..n]);
                    at += n;
                }
            }
            1 => part.iter_mut().for_each(|b| *b = next() as u8),
            2 => {
                for (n, record) in part.chunks_mut(16).enumerate() {
                    record.fill((n / 7) as u8);
                    record[0] = next() as u8;
                }
            }
            3 => {}
            _ => part.iter_mut().for_each(|b| *b = (next() % 11) as u8),
        }
    }
    bytes
}

pub(super) fn chain(path: &Path, read_only: bool, format: Format) -> Chain {
    let options = ChainOptions {
        format: Some(format),
        read_only,
        faults: None,
        cache: io::Cache::Unsafe,
        ..ChainOptions::default()
    };
    io::wait_for_lock(|| Chain::open(path.to_str().unwrap(), &options)).unwrap()
}

fn run(source: &Chain, target: Target<'_>, options: &ConvertOptions<'_>) -> Result<Report> {
    let mut progress = |_| {};
    let mut work = Work::new(Stop::default(), &mut progress);
    convert(Source::new(source)?, target, options, &mut work)
}

fn pack(
    source: &Path,
    target: &Path,
    options: &CreateOptions,
    workers: usize,
    base: Option<&Path>,
) -> Report {
    let source = chain(source, true, Format::Raw);
    let base = base.map(|base| chain(base, true, Format::Raw));
    let open = io::OpenOptions {
        cache: io::Cache::Unsafe,
        ..io::OpenOptions::default()
    };
    let file = io::File::create_new(target, &open).unwrap();
    let target = Target::Compressed {
        writer: Box::new(ImageWriter::new(&*file, options).unwrap()),
    };
    let options = ConvertOptions {
        base: base.as_ref(),
        workers,
        ..ConvertOptions::default()
    };
    let mut last = 0;
    let mut progress = |done| {
        assert!(done >= last, "progress goes on");
        last = done;
    };
    let mut work = Work::new(Stop::default(), &mut progress);
    let source = Source::new(&source).unwrap();
    let report = convert(source, target, &options, &mut work).unwrap();
    assert_eq!(last, report.size);
    report
}

fn options(size: usize, cluster_size: u64, compression: Compression) -> CreateOptions {
    CreateOptions {
        size: size as u64,
        cluster_size,
        compression,
        ..CreateOptions::default()
    }
}

#[test]
fn compressed_images_are_as_qemu_makes_them() {
    let dir = TempDir::new();
    for (cluster_size, compression) in [
        (512, Compression::Zlib),
        (4096, Compression::Zlib),
        (4096, Compression::Zstd),
        (65536, Compression::Zlib),
        (65536, Compression::Zstd),
        (2 << 20, Compression::Zstd),
    ] {
        // Not a whole number of clusters.
        let len = if cluster_size == 512 {
            MIB + 512
        } else {
            3 * MIB + 1536
        };
        let raw = dir.path("raw");
        fs::write(&raw, disk(len, cluster_size)).unwrap();
        let (one, four, theirs) = (dir.path("one"), dir.path("four"), dir.path("theirs"));
        let options = options(len, cluster_size, compression);
        let report = pack(&raw, &one, &options, 1, None);
        assert!(report.compressed_clusters > 0, "{cluster_size}");
        pack(&raw, &four, &options, 4, None);
        assert!(
            fs::read(&one).unwrap() == fs::read(&four).unwrap(),
            "{cluster_size}"
        );
        qemu::check("qcow2", &one);
        qemu::compare("raw", &raw, "qcow2", &one);
        let name = match compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        };
        let settings = format!("cluster_size={cluster_size},compression_type={name}");
        testkit::command::run(
            Command::new("qemu-img")
                .args(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &settings])
                .args([&raw, &theirs]),
        );
        // QEMU cuts the file within its last cluster.
        let (ours, theirs_len) = (
            fs::metadata(&one).unwrap().len(),
            fs::metadata(&theirs).unwrap().len(),
        );
        assert!(
            ours * 100 <= (theirs_len + cluster_size) * 102,
            "{cluster_size} {name}: {ours}, QEMU {theirs_len}"
        );
        // What QEMU packed reads the same, and is packed once more from there.
        let again = chain(&theirs, true, Format::Qcow2);
        let mut driver = again.driver().unwrap();
        let mut bytes = vec![1; len];
        driver.read(0, &mut bytes).unwrap();
        assert!(bytes == fs::read(&raw).unwrap(), "{cluster_size} {name}");
        for file in [one, four, theirs] {
            fs::remove_file(file).unwrap();
        }
    }
}

#[test]
fn refcounts_of_every_width_count_what_shares_a_cluster() {
    let dir = TempDir::new();
    let raw = dir.path("raw");
    let len = MIB + 400_000;
    fs::write(&raw, disk(len, 5)).unwrap();
    for (refcount_bits, extended_l2) in [
        (1, false),
        (2, true),
        (4, false),
        (8, false),
        (16, true),
        (32, false),
        (64, false),
    ] {
        for cluster_size in [512, 16384] {
            let packed = dir.path("packed");
            let options = CreateOptions {
                refcount_bits,
                extended_l2: extended_l2 && cluster_size >= 16384,
                ..options(len, cluster_size, Compression::Zstd)
            };
            pack(&raw, &packed, &options, 2, None);
            qemu::check("qcow2", &packed);
            qemu::compare("raw", &raw, "qcow2", &packed);
            // Written to while it is in use: packed clusters become plain, their space is given back.
            let mut model = fs::read(&raw).unwrap();
            let image = chain(&packed, false, Format::Qcow2);
            let mut driver = image.driver().unwrap();
            for (at, len, byte) in [(700, 3000, 7), (100_000, 70_000, 8), (1 << 20, 512, 9)] {
                driver.write(at as u64, &vec![byte; len]).unwrap();
                model[at..at + len].fill(byte);
            }
            driver.write_zeroes(300_000, 50_000, true).unwrap();
            model[300_000..350_000].fill(0);
            driver.close().unwrap();
            drop(image);
            qemu::check("qcow2", &packed);
            fs::write(dir.path("model"), &model).unwrap();
            qemu::compare("raw", dir.path("model"), "qcow2", &packed);
            fs::remove_file(packed).unwrap();
        }
    }
}

#[test]
fn overlays_have_only_what_differs() {
    let dir = TempDir::new();
    let (base, raw) = (dir.path("base"), dir.path("raw"));
    let below = disk(2 * MIB, 9);
    fs::write(&base, &below).unwrap();
    // Longer than its base; zeros over data; a few clusters changed.
    let mut above = below.clone();
    above.resize(3 * MIB, 0);
    above[MIB..MIB + 200_000].fill(0);
    above[70_000..70_100].fill(1);
    above[5 * MIB / 2..5 * MIB / 2 + 10].fill(2);
    fs::write(&raw, &above).unwrap();
    for (version, extended_l2) in [(3, false), (3, true), (2, false)] {
        let packed = dir.path("packed");
        let options = CreateOptions {
            version,
            extended_l2,
            backing: Some(("base".into(), "raw".into())),
            ..options(above.len(), 65536, Compression::Zlib)
        };
        let report = pack(&raw, &packed, &options, 3, Some(&base));
        assert_eq!(report.written, 2 * 65536, "{report:?}");
        assert_eq!(
            report.same + report.written + report.zero,
            above.len() as u64
        );
        qemu::check("qcow2", &packed);
        qemu::compare("raw", &raw, "qcow2", &packed);
        fs::remove_file(&packed).unwrap();
        // The same without compression, into an image that is there.
        let file = io::File::create_new(&packed, &io::OpenOptions::default()).unwrap();
        image::qcow2::create(&*file, &options).unwrap();
        drop(file);
        let source = chain(&raw, true, Format::Raw);
        let base = chain(&base, true, Format::Raw);
        let target = chain(&packed, false, Format::Qcow2);
        let mut driver = target.driver().unwrap();
        let image = Target::Image {
            driver: &mut driver,
            blank: true,
            cluster_size: 65536,
            packs: false,
            resume: false,
        };
        let options = ConvertOptions {
            base: Some(&base),
            workers: 1,
            ..ConvertOptions::default()
        };
        let plain = run(&source, image, &options).unwrap();
        assert_eq!(plain.written, report.written);
        driver.close().unwrap();
        drop(target);
        qemu::check("qcow2", &packed);
        qemu::compare("raw", &raw, "qcow2", &packed);
        fs::remove_file(&packed).unwrap();
    }
}

/// A disk that is nearly all holes takes no time, and memory does not grow with it.
#[test]
fn holes_are_not_read() {
    let dir = TempDir::new();
    let raw = dir.path("raw");
    let file = fs::File::create(&raw).unwrap();
    file.set_len(8 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], 5 << 40).unwrap();
    let packed = dir.path("packed");
    let options = CreateOptions {
        size: 8 << 40,
        ..options(0, 2 << 20, Compression::Zlib)
    };
    let report = pack(&raw, &packed, &options, 2, None);
    assert!(report.read <= 2 << 20, "{report:?}");
    assert_eq!(report.compressed_clusters, 1);
    qemu::check("qcow2", &packed);
    qemu::io("qcow2", &packed, &["read -P 7 5T 4k", "read -P 0 6T 4k"]);
}

/// A new raw disk gets the room of a run before its bytes; nothing that stays a hole gets any.
#[test]
fn long_runs_of_a_new_disk_get_their_room_at_once() {
    let dir = TempDir::new();
    let raw = dir.path("raw");
    let mut bytes = vec![0; 8 * MIB];
    bytes[MIB..2 * MIB].fill(7);
    bytes[3 * MIB..3 * MIB + 4096].fill(8);
    bytes[5 * MIB + 4096..5 * MIB + 4096 + (64 << 10)].fill(9);
    fs::write(&raw, &bytes).unwrap();
    let source = chain(&raw, true, Format::Raw);
    for (blank, cluster_size, allocated) in [
        (true, 1, MIB + (64 << 10)),
        // It may have what is written; its format sees to it.
        (false, 1, 0),
        (true, 65536, 0),
    ] {
        let file = Arc::new(Memory::new(&[], 64 << 20, 10_000));
        file.set_len(bytes.len() as u64).unwrap();
        let member = Member {
            image: Arc::new(image::Raw::open(&*file).unwrap()),
            files: vec![file.clone()],
        };
        let mut driver = Driver::new(vec![member], false).unwrap();
        let target = Target::Image {
            driver: &mut driver,
            blank,
            cluster_size,
            resume: false,
            packs: false,
        };
        run(&source, target, &ConvertOptions::default()).unwrap();
        let done = file.done();
        assert_eq!(done.allocated, allocated as u64, "{blank} {cluster_size}");
        let mut found = vec![1; bytes.len()];
        file.read_at(0, &mut found).unwrap();
        assert!(found == bytes);
    }
}

#[test]
fn a_target_that_fails_is_no_image() {
    let dir = TempDir::new();
    let raw = dir.path("raw");
    fs::write(&raw, disk(MIB, 3)).unwrap();
    let source = chain(&raw, true, Format::Raw);
    // Too small for it.
    let target = dir.path("small");
    let file = io::File::create_new(&target, &io::OpenOptions::default()).unwrap();
    let image = Target::Compressed {
        writer: Box::new(
            ImageWriter::new(&*file, &options(MIB / 2, 65536, Compression::Zlib)).unwrap(),
        ),
    };
    let options = ConvertOptions {
        base: None,
        workers: 2,
        ..ConvertOptions::default()
    };
    let error = run(&source, image, &options).unwrap_err();
    assert!(
        error.to_string().contains("less than the source's"),
        "{error}"
    );
    // The source ends while it is read: what was written before is no image.
    let cut = fs::OpenOptions::new().write(true).open(&raw).unwrap();
    let full = CreateOptions {
        size: MIB as u64,
        ..CreateOptions::default()
    };
    let packed = dir.path("qcow2");
    qemu::create("qcow2", &packed, "1M");
    qemu::io("qcow2", &packed, &["write -P 5 0 1M"]);
    cut.set_len(0).unwrap();
    let mut bytes = fs::read(&packed).unwrap();
    // An entry of the L2 table that is not sound.
    bytes[0x4_0000 + 9 * 8 + 7] = 0x22;
    fs::write(&packed, bytes).unwrap();
    let source = chain(&packed, true, Format::Qcow2);
    let target = dir.path("half");
    let file = io::File::create_new(&target, &io::OpenOptions::default()).unwrap();
    let image = Target::Compressed {
        writer: Box::new(ImageWriter::new(&*file, &full).unwrap()),
    };
    let error = run(&source, image, &options).unwrap_err();
    assert!(error.to_string().contains("L2 entry"), "{error}");
    let start = fs::read(&target).unwrap();
    assert!(start.get(..4) != Some(b"QFI\xfb"), "it shows a format");
}

/// An Apple disk image that says of most of its disk that nobody can read it: told in a few runs, however large that is.
#[test]
fn what_a_format_says_that_cannot_be_read_is_skipped() {
    const LARGE: u64 = 1 << 40;
    let dir = TempDir::new();
    let path = dir.path("lying.dmg");
    let raw = |byte| (testkit::dmg::RAW, 1, vec![byte; 512]);
    let chunks = [
        raw(5),
        (testkit::dmg::LZFSE, LARGE, vec![1; 99]),
        raw(6),
        // It does not unpack.
        (testkit::dmg::ZLIB, 4096, vec![9; 3000]),
        raw(7),
    ];
    fs::write(
        &path,
        testkit::dmg::image(&chunks, testkit::dmg::Tables::Fork),
    )
    .expect("writes");
    let options = ChainOptions {
        format: Some(Format::Dmg),
        read_only: true,
        ..ChainOptions::default()
    };
    let chain = Chain::open(path.to_str().expect("UTF-8"), &options).expect("opens");
    let mut source = Source::new(&chain).expect("a source").salvaging(true);
    let (mut at, mut runs) = (0, Vec::new());
    while at < source.size() {
        let run = source.run(at, u64::MAX).expect("a run");
        runs.push((run.len, run.zero));
        at += run.len;
    }
    let packed = 4096 * 512;
    let want = [
        (512, false),
        (LARGE * 512, true),
        (512, false),
        (packed, false),
        (512, false),
    ];
    assert_eq!(runs, want);
    // Asked once more it is noted once.
    source.run(4096, 512).expect("a run");
    let mut bytes = vec![1; packed as usize + 1024];
    source
        .read((1 + LARGE) * 512, &mut bytes)
        .expect("salvaged");
    let (first, rest) = bytes.split_at(512);
    let (lost, last) = rest.split_at(packed as usize);
    assert!(first == [6; 512] && last == [7; 512] && lost.iter().all(|byte| *byte == 0));
    let damage = source.damage();
    let places: Vec<_> = damage
        .unreadable
        .iter()
        .map(|lost| (lost.at, lost.len))
        .collect();
    assert_eq!(places, [(512, LARGE * 512), ((2 + LARGE) * 512, packed)]);
    assert_eq!(damage.unreadable_bytes, LARGE * 512 + packed);
}
