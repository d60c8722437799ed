//! Random operations on qcow2 images, carried out by the blocking driver and by QEMU in turns, on all cluster
//! sizes and refcount widths, with and without backing images: both must read what a model says, and
//! `qemu-img check` must find neither errors nor leaks.

use crate::peer;

use crypto::{Passphrase, luks};
use disk::{ChainOptions, blocking::Driver};
use image::{
    Format,
    qcow2::{Compression, CreateOptions},
};
use peer::{Model, Op, Random, check_as, qemu_img, qemu_io, qemu_reads};
use std::{path::Path, sync::Arc};

/// What lies below the image under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    None,
    RawShorter,
    RawLonger,
    Qcow2Shorter,
    Qcow2Compressed,
    /// qcow2 on qcow2 on raw, each shorter than the one above.
    Deep,
}

const BASES: [Base; 6] = [
    Base::None,
    Base::RawShorter,
    Base::RawLonger,
    Base::Qcow2Shorter,
    Base::Qcow2Compressed,
    Base::Deep,
];

#[derive(Clone, Copy, Debug)]
struct Case {
    version: u32,
    cluster_bits: u32,
    refcount_bits: u32,
    base: Base,
    seed: u64,
    extended_l2: bool,
    outside: Outside,
    encrypted: Encrypted,
}

/// Whether the guest's data are in a file of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outside {
    No,
    Data,
    /// It must be the disk's raw image too.
    Raw,
}

/// Which images of the case are encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Encrypted {
    disk: bool,
    base: bool,
}

impl Case {
    /// What QEMU's tools are told of the image under test.
    fn format(&self) -> &'static str {
        match (self.encrypted.disk, self.encrypted.base) {
            (false, false) => "qcow2",
            (true, false) => peer::LUKS,
            (false, true) => peer::QCOW2_ON_LUKS,
            (true, true) => peer::LUKS_ON_LUKS,
        }
    }
}

fn passphrase() -> Passphrase {
    Passphrase::new(peer::PASSPHRASE.as_bytes().to_vec().into()).unwrap()
}

fn open(dir: &Path, name: &str, read_only: bool) -> Driver {
    let path = dir.join(name);
    let options = ChainOptions {
        format: Some(Format::Qcow2),
        read_only,
        // Nothing crashes here: syncs only cost time.
        cache: io::Cache::Unsafe,
        // Small: blocks must come and go.
        cache_bytes: Some(64 << 10),
        passphrases: vec![Arc::new(passphrase())],
        ..ChainOptions::default()
    };
    let chain = peer::open_chain(&path, &options).unwrap_or_else(|e| panic!("{e}"));
    chain.driver().unwrap()
}

fn close(driver: Driver) -> Result<(), String> {
    driver.close().map_err(|e| format!("close: {e}"))
}

fn apply(driver: &mut Driver, op: Op, model: &mut Model) -> Result<(), String> {
    let failed = |e: block::Error| format!("{op:?}: {e}");
    match op {
        Op::Write { at, len, pattern } => driver
            .write(at, &vec![pattern; len as usize])
            .map_err(failed)?,
        Op::Zero { at, len, unmap } => driver.write_zeroes(at, len, unmap).map_err(failed)?,
        Op::Discard { at, len } => driver.discard(at, len).map_err(failed)?,
        Op::Read { at, len } => {
            let mut buf = vec![0xa5; len as usize];
            driver.read(at, &mut buf).map_err(failed)?;
            return model.check(at, &buf).map_err(|e| format!("{op:?}: {e}"));
        }
        Op::Flush => driver.flush().map_err(failed)?,
    }
    model.apply(op);
    Ok(())
}

/// Has qemu-img create an encrypted image.
const QEMU_LUKS: [&str; 6] = [
    "--object",
    peer::SECRET,
    "-f",
    "qcow2",
    "-o",
    "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1",
];

/// Writes the base images; returns the name and format to store, and what they read as.
fn make_base(dir: &Path, case: &Case, size: u64, random: &mut Random) -> Option<(String, Model)> {
    let cluster = 1 << case.cluster_bits;
    let fill = |name: &str, format: &str, model: &mut Model, random: &mut Random| {
        let mut script = String::new();
        for _ in 0..12 {
            let op = peer::random_op(random, model.bytes.len() as u64, cluster, 512);
            peer::as_qemu_io(op, model, &mut script);
        }
        qemu_io(dir, format, name, &script);
        qemu_reads(dir, format, name, model);
    };
    let create = |name: &str, format: &str, size: u64, on: Option<(&str, &str)>| {
        let size = size.to_string();
        let mut args = vec!["create", "-q"];
        match format {
            peer::LUKS => args.extend(QEMU_LUKS),
            _ => args.extend(["-f", format]),
        }
        if let Some((base, format)) = on {
            args.extend(["-b", base, "-F", format]);
        }
        args.extend([name, &size]);
        qemu_img(dir, &args);
    };
    let shorter = (size * 2 / 3) & !511;
    let (kind, bytes) = match case.base {
        Base::None => return None,
        Base::RawShorter => ("raw", shorter),
        Base::RawLonger => ("raw", size + 5 * cluster + 1024),
        Base::Qcow2Shorter if case.encrypted.base => (peer::LUKS, shorter),
        Base::Qcow2Shorter | Base::Deep => ("qcow2", shorter),
        Base::Qcow2Compressed => ("qcow2", size),
    };
    let mut model = Model::new(bytes);
    if case.base == Base::Deep {
        let bytes = (shorter / 2) & !511;
        let mut bottom = Model::new(bytes);
        create("bottom.raw", "raw", bytes, None);
        fill("bottom.raw", "raw", &mut bottom, random);
        create("base", kind, shorter, Some(("bottom.raw", "raw")));
        model = Model::over(&bottom, shorter);
    } else {
        create("base", kind, bytes, None);
    }
    fill("base", kind, &mut model, random);
    if case.base == Base::Qcow2Compressed {
        let packed = ["compression_type=zlib", "compression_type=zstd"];
        let packed = packed[(case.seed % 2) as usize];
        qemu_img(
            dir,
            &[
                "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", packed, "base", "packed",
            ],
        );
        std::fs::rename(dir.join("packed"), dir.join("base")).unwrap();
    }
    let kind = if kind == "raw" { kind } else { "qcow2" };
    Some((kind.to_owned(), model))
}

fn create(dir: &Path, case: &Case, size: u64, backing: Option<&str>, by_us: bool) {
    let compression = match case.version {
        3 if case.seed.is_multiple_of(3) => Compression::Zstd,
        _ => Compression::Zlib,
    };
    let options = CreateOptions {
        size,
        version: case.version,
        cluster_size: 1 << case.cluster_bits,
        refcount_bits: case.refcount_bits,
        lazy_refcounts: case.version == 3 && case.seed.is_multiple_of(5),
        backing: backing.map(|format| ("base".to_owned(), format.to_owned())),
        compression,
        extended_l2: case.extended_l2,
        data_file: (case.outside != Outside::No).then(|| "data".to_owned()),
        preallocated: false,
        data_file_raw: case.outside == Outside::Raw,
        encryption: case.encrypted.disk.then(|| {
            let options = luks::FormatOptions {
                iter_time_ms: 1,
                ..luks::FormatOptions::default()
            };
            luks::Volume::format(&options, &passphrase()).unwrap()
        }),
    };
    if by_us {
        let file = io::File::create_new(&dir.join("disk"), &io::OpenOptions::default()).unwrap();
        image::qcow2::create(&*file, &options).unwrap();
        if options.data_file.is_some() {
            let data = std::fs::File::create_new(dir.join("data")).unwrap();
            data.set_len(size).unwrap();
        }
        return;
    }
    let mut settings = format!(
        "compat={},cluster_size={},refcount_bits={},lazy_refcounts={},extended_l2={}",
        if case.version == 2 { "0.10" } else { "1.1" },
        options.cluster_size,
        options.refcount_bits,
        if options.lazy_refcounts { "on" } else { "off" },
        if options.extended_l2 { "on" } else { "off" },
    );
    match case.outside {
        Outside::No => {}
        Outside::Data => settings.push_str(",data_file=data"),
        Outside::Raw => settings.push_str(",data_file=data,data_file_raw=on"),
    }
    let size = size.to_string();
    // Without a look at the backing image, whose passphrase nobody asks for.
    let mut args = vec!["create", "-q", "-u", "-f", "qcow2", "-o", &settings];
    if case.encrypted.disk {
        args.extend(QEMU_LUKS);
    }
    if let Some(format) = backing {
        args.extend(["-b", "base", "-F", format]);
    }
    args.extend(["disk", &size]);
    qemu_img(dir, &args);
}

fn run(case: &Case) -> Result<(), String> {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let mut random = Random::new(case.seed);
    let cluster = 1u64 << case.cluster_bits;
    // Sixteen clusters (four of the largest) and a part of one, but enough for several L2 tables of small clusters.
    let size = ((cluster * 16).clamp(192 << 10, 8 << 20) + 512 * (1 + random.below(9))) & !511;
    let base = make_base(dir, case, size, &mut random);
    let kind = base.as_ref().map(|(kind, _)| kind.as_str());
    let by_us = !case.seed.is_multiple_of(4);
    create(dir, case, size, kind, by_us);
    check_as(dir, case.format(), "disk");
    let mut model = match &base {
        Some((_, base)) => Model::over(base, size),
        None => Model::new(size),
    };
    for round in 0..2 {
        let mut driver = open(dir, "disk", false);
        for step in 0..40 {
            // Our requests may have any alignment.
            let align = if random.below(4) == 0 { 1 } else { 512 };
            let op = peer::random_op(&mut random, size, cluster, align);
            apply(&mut driver, op, &mut model).map_err(|e| format!("{round}.{step}: {e}"))?;
            if step == 20 {
                close(driver)?;
                driver = open(dir, "disk", false);
            }
        }
        close(driver)?;
        check_as(dir, case.format(), "disk");
        qemu_reads(dir, case.format(), "disk", &mut model);
        if case.outside == Outside::Raw {
            let mut raw = std::fs::read(dir.join("data")).unwrap();
            // QEMU makes whole clusters or subclusters of it; we leave its size as it is.
            assert!(
                raw.len() as u64 == size || !by_us || round > 0,
                "{case:?}: {}",
                raw.len()
            );
            raw.truncate(size as usize);
            let same = model.check(0, &raw);
            same.map_err(|e| format!("{round}: the raw file: {e}"))?;
        }
        let mut script = String::new();
        for _ in 0..25 {
            let op = peer::random_op(&mut random, size, cluster, 512);
            peer::as_qemu_io(op, &mut model, &mut script);
        }
        qemu_io(dir, case.format(), "disk", &script);
        let mut all = vec![0xa5; size as usize];
        let mut driver = open(dir, "disk", true);
        driver
            .read(0, &mut all)
            .map_err(|e| format!("read all: {e}"))?;
        close(driver)?;
        model
            .check(0, &all)
            .map_err(|e| format!("{round}: after QEMU: {e}"))?;
    }
    Ok(())
}

fn run_all(cases: impl Iterator<Item = Case>) {
    for case in cases {
        run(&case).unwrap_or_else(|e| panic!("{case:?}: {e}"));
    }
}

/// Version 3 cases: each cluster size in `bits` with three refcount widths, so that every width meets
/// every class of cluster size.
fn version_3(bits: std::ops::RangeInclusive<u32>) -> impl Iterator<Item = Case> {
    bits.flat_map(|cluster_bits| {
        (0..3).map(move |turn| {
            let index = cluster_bits * 3 + turn;
            Case {
                version: 3,
                cluster_bits,
                refcount_bits: 1 << (index % 7),
                base: BASES[(index % 6) as usize],
                seed: u64::from(index) + 1000,
                extended_l2: false,
                outside: Outside::No,
                encrypted: Encrypted::default(),
            }
        })
    })
}

#[test]
fn small_clusters() {
    run_all(version_3(9..=11));
}

#[test]
fn medium_clusters() {
    run_all(version_3(12..=16));
}

#[test]
fn large_clusters() {
    run_all(version_3(17..=21));
}

#[test]
fn version_2() {
    run_all((9..=21).map(|cluster_bits| Case {
        version: 2,
        cluster_bits,
        refcount_bits: 16,
        base: BASES[(cluster_bits % 6) as usize],
        seed: u64::from(cluster_bits) + 2000,
        extended_l2: false,
        outside: Outside::No,
        encrypted: Encrypted::default(),
    }));
}

/// Every kind of base at the default cluster size, where most images are.
#[test]
fn every_base() {
    run_all((0..6).map(|index| Case {
        version: 3,
        cluster_bits: 16,
        refcount_bits: 16,
        base: BASES[index as usize],
        seed: index + 3000,
        extended_l2: false,
        outside: Outside::No,
        encrypted: Encrypted::default(),
    }));
}

/// Subclusters of 512 bytes to 64 KiB, with every kind of base.
#[test]
fn subclusters() {
    run_all([14, 16, 17, 21].into_iter().flat_map(|cluster_bits| {
        // The largest clusters cost most: every other base.
        let step = if cluster_bits == 21 { 2 } else { 1 };
        (0..6).step_by(step).map(move |index| Case {
            version: 3,
            cluster_bits,
            refcount_bits: 1 << (index % 7),
            base: BASES[index as usize],
            seed: u64::from(cluster_bits) * 10 + index + 4000,
            extended_l2: true,
            outside: Outside::No,
            encrypted: Encrypted::default(),
        })
    }));
}

/// Data in a file of their own, with every kind of base, and such files that must be raw images.
#[test]
fn external_data_files() {
    run_all([9, 12, 16, 21].into_iter().flat_map(|cluster_bits| {
        // The largest clusters cost most.
        (0..if cluster_bits == 21 { 2 } else { 4 }).map(move |turn| {
            let index = cluster_bits * 4 + turn;
            let outside = if turn == 0 {
                Outside::Raw
            } else {
                Outside::Data
            };
            Case {
                version: 3,
                cluster_bits,
                refcount_bits: 1 << (index % 7),
                base: match outside {
                    Outside::Raw => Base::None,
                    _ => BASES[(index % 6) as usize],
                },
                seed: u64::from(index) + 5000 + u64::from(cluster_bits),
                extended_l2: cluster_bits >= 14 && turn % 2 == 0,
                outside,
                encrypted: Encrypted::default(),
            }
        })
    }));
}

/// The image or its base encrypted, or both, with and without subclusters.
#[test]
fn encrypted() {
    let cases = [
        (2, 9, false, Base::None, true, false),
        (3, 12, false, Base::Qcow2Shorter, true, true),
        (3, 16, false, Base::RawLonger, true, false),
        (3, 16, false, Base::Qcow2Shorter, false, true),
        (3, 16, true, Base::Qcow2Compressed, true, false),
        (3, 17, true, Base::None, true, false),
    ];
    run_all((5000..).zip(cases).map(|(seed, case)| {
        let (version, cluster_bits, extended_l2, base, disk, below) = case;
        Case {
            version,
            cluster_bits,
            refcount_bits: 16,
            base,
            seed,
            extended_l2,
            outside: Outside::No,
            encrypted: Encrypted { disk, base: below },
        }
    }));
}
