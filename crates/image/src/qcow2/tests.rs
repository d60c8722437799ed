//! Random runs against a model, judged by `qemu-img` at the end.

use super::testing::{Change, Checked, Driver, MemFile, Rng, apply, check, run};
use super::{Compression, CreateOptions, Header, ImageWriter, OpenOptions, create};
use crate::ZeroMode;
use std::fs;
use std::path::Path;

fn options(size: u64, cluster_bits: u32, order: u32, version: u32) -> CreateOptions {
    CreateOptions {
        size,
        version,
        cluster_size: 1 << cluster_bits,
        refcount_bits: 1 << order,
        lazy_refcounts: false,
        backing: None,
        compression: Compression::Zlib,
        extended_l2: false,
        ..CreateOptions::default()
    }
}

/// The smallest cache there is: eviction all the time.
fn small() -> OpenOptions {
    OpenOptions {
        cache_bytes: Some(0),
        ..OpenOptions::default()
    }
}

fn pattern(rng: &mut Rng, len: u64) -> Vec<u8> {
    let byte = rng.next();
    (0..len)
        .map(|i| (byte.rotate_left((i / 512) as u32) ^ (i / 512)) as u8 | 1)
        .collect()
}

/// Does random things to `driver` and the same to `model`.
fn storm(driver: &mut Driver, model: &mut [u8], rng: &mut Rng, steps: u32, len_max: u64) {
    let size = model.len() as u64;
    let unit = if rng.below(2) == 0 { 1 } else { 512 };
    for _ in 0..steps {
        let at = rng.below(size) / unit * unit;
        let mut len = (1 + rng.below(len_max))
            .next_multiple_of(unit)
            .min(size - at);
        let range = |len: u64| at as usize..(at + len) as usize;
        match rng.below(20) {
            0..8 => {
                let data = pattern(rng, len);
                driver.write(at, &data).unwrap();
                model[range(len)].copy_from_slice(&data);
            }
            8..10 => {
                driver
                    .zero(at, len, ZeroMode::Zero { unmap: true })
                    .unwrap();
                model[range(len)].fill(0);
            }
            10..12 => {
                driver
                    .zero(at, len, ZeroMode::Zero { unmap: false })
                    .unwrap();
                model[range(len)].fill(0);
            }
            12..14 => {
                len = (len * 4).min(size - at);
                driver.zero(at, len, ZeroMode::Discard).unwrap();
                let now = driver.read(at, len).unwrap();
                for (now, old) in now.iter().zip(&mut model[range(len)]) {
                    assert!(
                        *now == 0 || now == old,
                        "a discard gives old bytes or zeros"
                    );
                    *old = *now;
                }
            }
            14..18 => assert!(driver.read(at, len).unwrap() == model[range(len)]),
            _ => driver.flush().unwrap(),
        }
    }
}

fn judge(directory: &Path, image: &[u8], model: &[u8], what: &str) {
    let (disk, raw) = (directory.join("disk.qcow2"), directory.join("model.raw"));
    fs::write(&disk, image).unwrap();
    fs::write(&raw, model).unwrap();
    assert_eq!(check(&disk), Checked::Clean, "{what}");
    let (disk, raw) = (disk.to_str().unwrap(), raw.to_str().unwrap());
    run(
        "qemu-img",
        &["compare", "-f", "qcow2", "-F", "raw", disk, raw],
    );
}

fn one_run(seed: u64, cluster_bits: u32, order: u32, version: u32, with_backing: bool) {
    let options = options(0, cluster_bits, order, version);
    run_with(seed, options, with_backing);
}

fn run_with(seed: u64, mut options: CreateOptions, with_backing: bool) {
    let what = format!("seed {seed} backing {with_backing} {options:?}");
    let cluster_bits = options.cluster_size.trailing_zeros();
    println!("{what}");
    let mut rng = Rng(seed);
    let directory = tempfile::tempdir().unwrap();
    // Some tables' worth, but no more than goes fast.
    let size = (rng.below(40 << cluster_bits) + (300 << cluster_bits)).min(6 << 20) / 512 * 512;
    options.size = size;
    let mut backing = Vec::new();
    if with_backing {
        backing = pattern(&mut rng, size * 3 / 4 / 512 * 512);
        let base = directory.path().join("base.raw");
        fs::write(&base, &backing).unwrap();
        options.backing = Some(("base.raw".into(), "raw".into()));
    }
    let mut model = backing.clone();
    model.resize(size as usize, 0);
    let open = if rng.below(2) == 0 {
        small()
    } else {
        OpenOptions::default()
    };
    let mut driver = Driver::create(&options, &open);
    for round in 0..2 {
        driver.backing = backing.clone();
        driver.punch = rng.below(2) == 0;
        driver.zeroed = rng.below(2) == 0;
        storm(
            &mut driver,
            &mut model,
            &mut rng,
            120,
            3 << cluster_bits.min(17),
        );
        let bytes = driver.close();
        judge(
            directory.path(),
            &bytes,
            &model,
            &format!("{what} round {round}"),
        );
        driver = Driver::open(MemFile::of(bytes), &open);
    }
}

/// One cluster size with some of the refcount widths, with and without a backing file.
fn runs(cluster_bits: u32, orders: [u32; 2]) {
    let seed = u64::from(cluster_bits) * 100;
    one_run(seed, cluster_bits, orders[0], 3, false);
    one_run(seed + 1, cluster_bits, orders[1], 3, true);
    one_run(seed + 2, cluster_bits, 4, 2, seed % 200 == 0);
}

#[test]
fn random_runs_with_512_byte_clusters() {
    runs(9, [6, 0]);
}

#[test]
fn random_runs_with_1_kib_clusters() {
    runs(10, [5, 2]);
}

#[test]
fn random_runs_with_4_kib_clusters() {
    runs(12, [3, 1]);
    runs(12, [4, 4]);
}

#[test]
fn random_runs_with_64_kib_clusters() {
    runs(16, [4, 6]);
    runs(16, [0, 4]);
}

#[test]
fn random_runs_with_2_mib_clusters() {
    runs(21, [1, 4]);
}

#[test]
fn random_runs_with_subclusters() {
    for (seed, cluster_bits, order, backing) in [
        (5000, 14, 4, false),
        (5001, 14, 0, true),
        (5002, 14, 4, true),
        (5003, 16, 4, false),
        (5004, 16, 6, true),
        (5005, 17, 3, true),
        (5006, 21, 4, false),
        (5007, 21, 1, true),
    ] {
        let options = CreateOptions {
            extended_l2: true,
            ..options(0, cluster_bits, order, 3)
        };
        run_with(seed, options, backing);
    }
}

/// 512-byte clusters with 64-bit refcounts: a cluster of refcount table serves 2 MiB of file.
#[test]
fn the_refcount_table_grows_and_moves() {
    for (order, zeroed) in [(6, true), (4, false)] {
        let size = 24 << 20;
        let mut driver = Driver::create(&options(size, 9, order, 3), &small());
        driver.zeroed = zeroed;
        let clusters = driver.image.header().refcount_table_clusters;
        let mut rng = Rng(7);
        let mut model = vec![0; size as usize];
        for at in (0..size).step_by(1 << 20) {
            let data = pattern(&mut rng, 1 << 20);
            driver.write(at, &data).unwrap();
            model[at as usize..at as usize + data.len()].copy_from_slice(&data);
            if at % (4 << 20) == 0 {
                driver.flush().unwrap();
            }
        }
        let bytes = driver.close();
        let driver = Driver::open(MemFile::of(bytes.clone()), &small());
        assert!(driver.image.header().refcount_table_clusters > clusters);
        let directory = tempfile::tempdir().unwrap();
        judge(directory.path(), &bytes, &model, "table growth");
    }
}

#[test]
fn what_is_begun_anew_never_shows_under_its_old_header() {
    let old = CreateOptions {
        size: 1 << 20,
        cluster_size: 4096,
        ..CreateOptions::default()
    };
    let new = CreateOptions {
        size: 2 << 20,
        ..old.clone()
    };
    type Make = fn(&MemFile, &CreateOptions);
    let makers: [Make; 2] = [
        |file, options| create(file, options).unwrap(),
        |file, options| {
            let mut writer = ImageWriter::new(file, options).unwrap();
            for guest in 0..300 {
                writer.put_data(guest, &[9; 4096]).unwrap();
            }
            writer.finish().unwrap();
        },
    ];
    for make in makers {
        let mut driver = Driver::create(&old, &OpenOptions::default());
        driver.write(0, &[7; 900 << 10]).unwrap();
        let file = MemFile::of(driver.close());
        let before = file.bytes();
        file.record();
        make(&file, &new);
        let after = file.bytes();
        let journal = file.journal();
        let mut shown = Vec::new();
        for end in 0..=journal.len() {
            // All is there but what no barrier has followed and comes first.
            let begun = journal[..end].iter();
            let late = !begun.clone().any(|change| matches!(change, Change::Sync));
            let mut bytes = before.clone();
            begun
                .skip(usize::from(late))
                .for_each(|change| apply(&mut bytes, change));
            let size = Header::parse(&bytes).ok().map(|header| header.size);
            let whole = match size {
                Some(size) if size == old.size => &before,
                Some(_) => &after,
                None => &bytes,
            };
            assert!(bytes[4096..] == whole[4096..], "{end}: {size:?}");
            shown.push(size);
        }
        shown.dedup();
        assert_eq!(shown, [Some(old.size), None, Some(new.size)]);
    }
}
