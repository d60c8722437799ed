//! VMDK images, driven by the blocking driver and by QEMU in turns: both must read what a model says.

use crate::peer;

use block::ErrorKind;
use disk::{Chain, ChainOptions, blocking::Driver};
use image::Format;
use image::vmdk::{CreateOptions, GD_AT_END, Header, Parts, StreamWriter, Subformat};
use io::{File, OpenOptions};
use peer::{
    Model, Op, Random, apply, our_turn, qemu_img, qemu_io, qemu_reads, random_op, their_turn,
};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

const DISK: &str = "disk.vmdk";
const GRAIN: u64 = 64 << 10;

fn options(read_only: bool) -> ChainOptions {
    ChainOptions {
        format: Some(Format::Vmdk),
        read_only,
        // Nothing crashes here: syncs only cost time.
        cache: io::Cache::Unsafe,
        // As few tables as there may be.
        cache_bytes: Some(0),
        ..ChainOptions::default()
    }
}

fn chain(dir: &Path, name: &str, read_only: bool) -> block::Result<Chain> {
    peer::open_chain(&dir.join(name), &options(read_only))
}

fn open(dir: &Path, read_only: bool) -> Driver {
    let chain = chain(dir, DISK, read_only).unwrap_or_else(|e| panic!("{e}"));
    chain.driver().unwrap()
}

fn new_file(path: &Path) -> Arc<File> {
    File::create_new(path, &OpenOptions::default()).unwrap()
}

fn create(dir: &Path, new: &CreateOptions) {
    for extent in new.files() {
        extent.write(&*new_file(&dir.join(&extent.name))).unwrap();
    }
    new.write(&*new_file(&dir.join(&new.name))).unwrap();
}

fn new(name: &str, size: u64, subformat: Subformat) -> CreateOptions {
    CreateOptions {
        size,
        subformat,
        name: name.to_owned(),
        ..CreateOptions::default()
    }
}

/// A disk of four extents, of which the sparse ones have so many sectors.
fn create_mixed(dir: &Path, first: u64, second: u64) -> u64 {
    for (name, sectors) in [("a.vmdk", first), ("b.vmdk", second)] {
        let part = new(name, sectors * 512, Subformat::TwoGbMaxExtentSparse);
        let file = &part.files()[0];
        file.write(&*new_file(&dir.join(name))).unwrap();
    }
    for name in ["flat", "other"] {
        fs::write(dir.join(name), vec![0; 600 * 512]).unwrap();
    }
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=abc\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentSparse\"\n\
         RW {first} SPARSE \"a.vmdk\"\nRW 300 FLAT \"flat\" 300\nRW {second} SPARSE \"b.vmdk\"\n\
         RW 100 FLAT \"other\" 7\n"
    );
    fs::write(dir.join(DISK), text).unwrap();
    (first + 300 + second + 100) * 512
}

/// One image, changed by us and by QEMU in turns, or by us alone.
fn in_turns(dir: &Path, size: u64, seed: u64, with_qemu: bool) {
    let mut model = Model::new(size);
    let mut random = Random::new(seed);
    for _ in 0..2 {
        let before = cid(dir, DISK);
        let mut driver = open(dir, false);
        assert_eq!(driver.size(), size);
        our_turn(&mut driver, &mut model, &mut random, 40, GRAIN);
        driver.close().unwrap();
        assert_ne!(
            cid(dir, DISK),
            before,
            "a disk that was written has another CID"
        );
        if !with_qemu {
            continue;
        }
        qemu_reads(dir, "vmdk", DISK, &mut model);
        qemu_img(dir, &["check", "-q", "-f", "vmdk", DISK]);
        their_turn((dir, "vmdk", DISK), &mut model, &mut random, 20, GRAIN);
    }
    let before = cid(dir, DISK);
    let mut all = vec![0; size as usize];
    open(dir, true).read(0, &mut all).unwrap();
    model.check(0, &all).unwrap();
    let mut driver = open(dir, false);
    driver.flush().unwrap();
    driver.close().unwrap();
    assert_eq!(cid(dir, DISK), before, "nothing was written");
}

fn cid(dir: &Path, name: &str) -> u32 {
    let file = File::open(
        &dir.join(name),
        &OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        },
    );
    Parts::read(&*file.unwrap()).unwrap().descriptor.cid
}

#[test]
fn sparse_images_are_changed_in_turns_with_qemu() {
    for (seed, zeroed_grain) in [(1, false), (2, true)] {
        let temp = tempfile::tempdir().unwrap();
        let size = (1 << 20) + 37 * 512;
        let new = CreateOptions {
            zeroed_grain,
            ..new(DISK, size, Subformat::MonolithicSparse)
        };
        create(temp.path(), &new);
        in_turns(temp.path(), size, seed, true);
    }
}

#[test]
fn images_of_several_files_are_changed_in_turns_with_qemu() {
    let temp = tempfile::tempdir().unwrap();
    let size = create_mixed(temp.path(), 512, 896);
    in_turns(temp.path(), size, 3, true);
    // Of an extent that ends within a grain QEMU takes the next one's bytes for that grain's.
    let temp = tempfile::tempdir().unwrap();
    let size = create_mixed(temp.path(), 513, 900);
    in_turns(temp.path(), size, 6, false);
    let temp = tempfile::tempdir().unwrap();
    create(temp.path(), &new(DISK, 1 << 20, Subformat::MonolithicFlat));
    in_turns(temp.path(), 1 << 20, 4, true);
}

/// New images are QEMU's, byte for byte, but for the CID.
#[test]
fn new_images_are_those_of_qemu() {
    let temp = tempfile::tempdir().unwrap();
    let (ours, theirs) = (temp.path().join("ours"), temp.path().join("theirs"));
    fs::create_dir(&ours).unwrap();
    fs::create_dir(&theirs).unwrap();
    for (number, (subformat, size, words)) in [
        (Subformat::MonolithicSparse, 5 << 30, "compat6=on"),
        (
            Subformat::MonolithicSparse,
            512,
            "zeroed_grain=on,toolsversion=7",
        ),
        (
            Subformat::TwoGbMaxExtentSparse,
            (5 << 30) + 512,
            "adapter_type=lsilogic",
        ),
        (Subformat::MonolithicFlat, 3 << 20, "adapter_type=legacyESX"),
        (Subformat::TwoGbMaxExtentFlat, 5 << 30, "hwversion=11"),
        (
            Subformat::StreamOptimized,
            70 << 20,
            "adapter_type=buslogic",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{number}.vmdk");
        let mut new = new(&name, size, subformat);
        for (key, value) in words.split(',').filter_map(|word| word.split_once('=')) {
            match key {
                "compat6" => new.compat6 = true,
                "zeroed_grain" => new.zeroed_grain = true,
                "toolsversion" => new.tools_version = Some(value.to_owned()),
                "hwversion" => new.hw_version = Some(value.to_owned()),
                _ => new.adapter = image::vmdk::AdapterType::of_name(value).unwrap(),
            }
        }
        create(&ours, &new);
        let words = format!("subformat={},{words}", subformat.name());
        qemu_img(
            &theirs,
            &[
                "create",
                "-q",
                "-f",
                "vmdk",
                "-o",
                &words,
                &name,
                &size.to_string(),
            ],
        );
    }
    let mut names: Vec<_> = fs::read_dir(&theirs)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names.len(), fs::read_dir(&ours).unwrap().count());
    for name in names {
        let read = |dir: &Path| {
            let path = dir.join(&name);
            let len = fs::metadata(&path).unwrap().len();
            // All that is no hole lies there.
            let mut bytes = vec![0; len.min(1 << 20) as usize];
            use std::os::unix::fs::FileExt;
            fs::File::open(&path)
                .unwrap()
                .read_exact_at(&mut bytes, 0)
                .unwrap();
            // A CID of QEMU's may have fewer digits, so that what follows begins before.
            let text = match bytes.starts_with(b"KDMV") {
                true => bytes.drain(512..21 * 512).collect(),
                false => std::mem::take(&mut bytes),
            };
            let text = String::from_utf8_lossy(&text);
            let lines = text.trim_end_matches('\0').lines();
            let lines = lines.map(|line| match line.starts_with("CID=") {
                true => "CID",
                false => line,
            });
            let text: Vec<&str> = lines.collect();
            bytes.extend(text.join("\n").into_bytes());
            (bytes, len & !511)
        };
        let (a, b) = (read(&ours), read(&theirs));
        assert_eq!(a.1, b.1, "{name:?}");
        let differ = a.0.iter().zip(&b.0).position(|(a, b)| a != b);
        assert!(
            a.0 == b.0,
            "{name:?}: {} {} {differ:?}",
            a.0.len(),
            b.0.len()
        );
    }
}

/// A compressed image of ours, and one with a footer as VMware writes it.
#[test]
fn compressed_images_are_read_as_qemu_reads_them() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let size = (40u64 << 20) + 512 * 5;
    let grains = size.div_ceil(GRAIN);
    let mut random = Random::new(9);
    let stream = new("s.vmdk", size, Subformat::StreamOptimized);
    let file = new_file(&dir.join("s.vmdk"));
    let mut writer = StreamWriter::new(&*file, &stream).unwrap();
    for guest in 0..grains {
        let wanted = guest < 4 || guest + 3 > grains || random.below(40) == 0;
        if wanted {
            // One that gets larger when packed, too.
            let noisy = random.below(2) == 0;
            let mut state = guest;
            let bytes: Vec<u8> = (0..GRAIN)
                .map(|i| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    if noisy {
                        (state >> 33) as u8
                    } else {
                        (i >> 9) as u8
                    }
                })
                .collect();
            writer.put_data(guest, &bytes).unwrap();
        }
    }
    let error = writer.put_data(3, &vec![0; GRAIN as usize]).unwrap_err();
    assert!(error.to_string().contains("out of order"), "{error}");
    writer.finish().unwrap();
    drop(file);
    // The footer takes the header's place.
    let mut bytes = fs::read(dir.join("s.vmdk")).unwrap();
    let header = Header::parse(&bytes).unwrap();
    let marker = |kind: u32| {
        let mut sector = vec![0; 512];
        sector[12..16].copy_from_slice(&kind.to_le_bytes());
        sector
    };
    bytes.extend(marker(3));
    bytes.extend(header.to_bytes());
    bytes.extend(marker(0));
    let at_end = Header {
        directory: GD_AT_END,
        flags: header.flags & !2,
        ..header
    };
    bytes[..512].copy_from_slice(&at_end.to_bytes());
    fs::write(dir.join("f.vmdk"), &bytes).unwrap();
    let mut first = Vec::new();
    for name in ["s.vmdk", "f.vmdk"] {
        qemu_img(dir, &["check", "-q", "-f", "vmdk", name]);
        qemu_img(
            dir,
            &["convert", "-f", "vmdk", "-O", "raw", name, "out.raw"],
        );
        let theirs = fs::read(dir.join("out.raw")).unwrap();
        let chain = chain(dir, name, true).unwrap();
        let mut driver = chain.driver().unwrap();
        let mut ours = vec![1; size as usize];
        driver.read(0, &mut ours).unwrap();
        assert!(ours == theirs, "{name}");
        // Of a grain that another one follows no more is read than it has.
        let extent = driver.extent_at(0, 512).unwrap();
        let image::ExtentKind::Compressed(grain) = extent.kind else {
            panic!("{extent:?}");
        };
        assert!(
            grain.len % 512 == 0 && u64::from(grain.len) < 2 * GRAIN,
            "{grain:?}"
        );
        if first.is_empty() {
            first = ours;
        }
        assert!(first == theirs);
        drop((driver, chain));
        let error = self::chain(dir, name, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("streamOptimized"), "{error}");
    }
    // And QEMU's.
    let words = "subformat=streamOptimized";
    qemu_img(
        dir,
        &[
            "convert", "-f", "raw", "-O", "vmdk", "-o", words, "out.raw", "q.vmdk",
        ],
    );
    let mut ours = vec![1; size as usize];
    let chain = chain(dir, "q.vmdk", true).unwrap();
    chain.driver().unwrap().read(0, &mut ours).unwrap();
    assert!(first == ours);
    // Cut off, it is no image.
    fs::write(dir.join("cut.vmdk"), &bytes[..bytes.len() - 512]).unwrap();
    let error = self::chain(dir, "cut.vmdk", true).unwrap_err();
    assert!(error.to_string().contains("footer"), "{error}");
}

/// An overlay is one only of the base as it was.
#[test]
fn an_overlay_needs_its_base_unchanged() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    create(dir, &new("base.vmdk", 1 << 20, Subformat::MonolithicSparse));
    qemu_io(dir, "vmdk", "base.vmdk", "write -P 5 0 512k\n");
    for zeroed_grain in [false, true] {
        let _ = fs::remove_file(dir.join(DISK));
        let over = CreateOptions {
            parent: Some(("base.vmdk".to_owned(), cid(dir, "base.vmdk"))),
            zeroed_grain,
            ..new(DISK, 1 << 20, Subformat::MonolithicSparse)
        };
        create(dir, &over);
        let mut model = Model::new(1 << 20);
        model.apply(Op::Write {
            at: 0,
            len: 512 << 10,
            pattern: 5,
        });
        let mut driver = open(dir, false);
        let mut random = Random::new(5);
        for _ in 0..40 {
            let op = random_op(&mut random, 1 << 20, GRAIN, 512);
            apply(&mut driver, op, &mut model);
        }
        driver.close().unwrap();
        qemu_reads(dir, "vmdk", DISK, &mut model);
        their_turn((dir, "vmdk", DISK), &mut model, &mut random, 20, GRAIN);
        let mut all = vec![0; 1 << 20];
        open(dir, true).read(0, &mut all).unwrap();
        model.check(0, &all).unwrap();
    }
    let chain = chain(dir, "base.vmdk", false).unwrap();
    let mut driver = chain.driver().unwrap();
    driver.write(0, &[1; 512]).unwrap();
    driver.close().unwrap();
    drop(chain);
    let error = self::chain(dir, DISK, true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("(CID)"), "{error}");
}

/// Extents are opened where backing files may be, each once, and are as large as the descriptor says.
#[test]
fn what_a_descriptor_may_name() {
    let temp = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(temp.path()).unwrap();
    let dir = root.join("own");
    fs::create_dir(&dir).unwrap();
    fs::write(root.join("secret"), [7; 4096]).unwrap();
    fs::write(dir.join("flat"), [1; 4096]).unwrap();
    let sparse = new("sparse.vmdk", 1 << 20, Subformat::TwoGbMaxExtentSparse);
    sparse.files()[0]
        .write(&*new_file(&dir.join("sparse.vmdk")))
        .unwrap();
    symlink(root.join("secret"), dir.join("link")).unwrap();
    symlink(dir.join("flat"), dir.join("flat-link")).unwrap();
    let secret = root.join("secret").display().to_string();
    let good = "RW 8 FLAT \"flat\" 0\n";
    for (lines, kind, why) in [
        (
            format!("RW 8 FLAT \"{secret}\" 0\n"),
            ErrorKind::Denied,
            "outside",
        ),
        (
            "RW 8 FLAT \"../secret\" 0\n".into(),
            ErrorKind::Denied,
            "outside",
        ),
        (
            "RW 8 FLAT \"link\" 0\n".into(),
            ErrorKind::Denied,
            "outside",
        ),
        (
            "RW 8 FLAT \"nbd:localhost:1\" 0\n".into(),
            ErrorKind::Denied,
            "protocol",
        ),
        (
            "RW 8 FLAT \"absent\" 0\n".into(),
            ErrorKind::NotFound,
            "absent",
        ),
        (
            "RW 8 FLAT \"disk.vmdk\" 0\n".into(),
            ErrorKind::Corrupt,
            "already",
        ),
        (
            format!("{good}RW 8 FLAT \"flat-link\" 0\n"),
            ErrorKind::Corrupt,
            "already",
        ),
        (
            format!("{good}RW 1 FLAT \"flat\" 7\n"),
            ErrorKind::Corrupt,
            "overlap",
        ),
        (
            "RW 8 FLAT \"flat\" 1\n".into(),
            ErrorKind::Corrupt,
            "ends at byte 0x1000",
        ),
        ("RW 8 SPARSE \"flat\"\n".into(), ErrorKind::Corrupt, "KDMV"),
        (
            "RW 8 SESPARSE \"flat\"\n".into(),
            ErrorKind::Corrupt,
            "SESPARSE",
        ),
        (
            "NOACCESS 8 FLAT \"flat\" 0\n".into(),
            ErrorKind::Unsupported,
            "NOACCESS",
        ),
        (
            "RDONLY 8 FLAT \"flat\" 0\n".into(),
            ErrorKind::Unsupported,
            "RDONLY",
        ),
        (format!("{good}RW 8 ZERO\n"), ErrorKind::Unsupported, "ZERO"),
        (
            "RW 2048 SPARSE \"sparse.vmdk\"\nRW 2048 SPARSE \"sparse.vmdk\"\n".into(),
            ErrorKind::Corrupt,
            "two extents",
        ),
        (String::new(), ErrorKind::Corrupt, "no extents"),
    ] {
        let head = "# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n";
        fs::write(dir.join(DISK), format!("{head}{lines}")).unwrap();
        let error = chain(&dir, DISK, false).unwrap_err();
        assert_eq!(error.kind(), kind, "{lines}: {error}");
        assert!(error.to_string().contains(why), "{lines}: {error}");
    }
    let head = "# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n";
    let allowed = ChainOptions {
        allow_backing: vec![root.clone()],
        ..options(true)
    };
    fs::write(
        dir.join(DISK),
        format!("{head}RW 8 FLAT \"../secret\" 0\nRW 16 ZERO\n{good}"),
    )
    .unwrap();
    let chain = peer::open_chain(&dir.join(DISK), &allowed).unwrap();
    let mut bytes = vec![9; 32 * 512];
    chain.driver().unwrap().read(0, &mut bytes).unwrap();
    assert!(bytes[..4096].iter().all(|b| *b == 7));
    assert!(bytes[4096..12288].iter().all(|b| *b == 0));
    assert!(bytes[12288..].iter().all(|b| *b == 1));
}
