//! VMDK images through the commands, beside QEMU's.

use crate::common;

use common::{diskplane, failure, good, json, qemu_img, refused};
use std::fs;
use std::os::unix::fs::FileExt;
use testkit::TempDir;

#[test]
fn images_are_converted_and_checked() {
    let dir = TempDir::new();
    let root = dir.root();
    let mut state = 1u32;
    let bytes: Vec<u8> = (0..(3u32 << 20) + 512 * 7)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Zeros, something that packs well, and something that does not.
            match (i >> 18) % 3 {
                0 => 0,
                1 => (i >> 12) as u8,
                _ => (state >> 24) as u8,
            }
        })
        .collect();
    fs::write(dir.path("in.raw"), &bytes).unwrap();
    for (subformat, options, files) in [
        ("monolithicSparse", "", 1),
        ("monolithicSparse", ",zeroed_grain=on", 1),
        ("monolithicFlat", "", 2),
        ("twoGbMaxExtentSparse", ",adapter_type=lsilogic", 2),
        ("twoGbMaxExtentFlat", "", 2),
        ("streamOptimized", "", 1),
    ] {
        let options = format!("subformat={subformat}{options}");
        good(
            root,
            &["convert", "-f", "raw", "-o", &options, "in.raw", "a.vmdk"],
        );
        let compare = ["compare", "-f", "vmdk", "-F", "raw", "a.vmdk", "in.raw"];
        qemu_img(root, &compare);
        qemu_img(root, &["check", "-q", "a.vmdk"]);
        assert!(good(root, &["check", "a.vmdk"]).contains("No errors"));
        let info = json(&good(root, &["info", "--json", "a.vmdk"]));
        assert_eq!(info["virtual-size"], bytes.len());
        assert_eq!(info["format"], "vmdk");
        assert_eq!(info["format-specific"]["create type"], subformat);
        let theirs = json(&qemu_img(root, &["info", "--output=json", "a.vmdk"]));
        let cid = theirs["format-specific"]["data"]["cid"].as_u64().unwrap();
        assert_eq!(info["format-specific"]["cid"], format!("{cid:08x}"));
        good(root, &compare);
        qemu_img(
            root,
            &[
                "convert", "-f", "raw", "-O", "vmdk", "-o", &options, "in.raw", "q.vmdk",
            ],
        );
        good(
            root,
            &["compare", "-f", "vmdk", "-F", "raw", "q.vmdk", "in.raw"],
        );
        assert!(good(root, &["check", "q.vmdk"]).contains("No errors"));
        if subformat == "streamOptimized" {
            let line = refused(
                root,
                &[
                    "convert", "-n", "-f", "raw", "-O", "vmdk", "in.raw", "q.vmdk",
                ],
            );
            assert!(line.contains("streamOptimized"), "{line}");
            let map = json(&good(root, &["map", "--json", "q.vmdk"]));
            assert!(
                map.as_array()
                    .unwrap()
                    .iter()
                    .any(|e| e["compressed"] == true)
            );
        }
        let mut made = 0;
        for entry in fs::read_dir(root).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            made += u32::from(name.starts_with('a'));
            if name.ends_with(".vmdk") {
                fs::remove_file(path).unwrap();
            }
        }
        assert_eq!(made, files, "{options}");
    }
}

/// Nothing is left of an image of several files that was not finished, and nothing is taken that was there.
#[test]
fn extents_that_are_there_already_stay() {
    let dir = TempDir::new();
    let root = dir.root();
    fs::write(dir.path("a-flat.vmdk"), "mine").unwrap();
    let flat = ["-o", "subformat=monolithicFlat", "a.vmdk"];
    let line = refused(root, &[&["create"][..], &flat, &["1M"]].concat());
    assert!(line.contains("a-flat.vmdk"), "{line}");
    fs::write(dir.path("in.raw"), [1; 4096]).unwrap();
    let line = refused(
        root,
        &[
            "convert",
            "-f",
            "raw",
            "-o",
            "subformat=monolithicFlat",
            "in.raw",
            "a.vmdk",
        ],
    );
    assert!(line.contains("a-flat.vmdk"), "{line}");
    assert_eq!(fs::read(dir.path("a-flat.vmdk")).unwrap(), b"mine");
    assert!(!dir.path("a.vmdk").exists());
    assert_eq!(fs::read_dir(root).unwrap().count(), 2);
}

/// What `check` finds: each kind of damage, and the one that is repaired.
#[test]
fn checks_say_what_is_wrong() {
    let dir = TempDir::new();
    let root = dir.root();
    fs::write(dir.path("in.raw"), vec![7; 1 << 20]).unwrap();
    good(root, &["convert", "-f", "raw", "in.raw", "good.vmdk"]);
    let sound = fs::read(dir.path("good.vmdk")).unwrap();
    let word = |at: usize| u32::from_le_bytes(sound[at..at + 4].try_into().unwrap());
    // Redundant directory at sector 21, then its table; the other directory, and its table.
    let redundant = word(21 * 512) as usize * 512;
    let table = word(26 * 512) as usize * 512;
    assert_eq!(sound[redundant..redundant + 64], sound[table..table + 64]);
    for (at, entry, code, says) in [
        (table, 0x00ff_0000, 2, "behind the end of the file"),
        (table, 3, 2, "where header, descriptor and tables are"),
        (table, word(table + 4), 2, "overlap"),
        (table, 30, 2, "where header, descriptor and tables are"),
        (26 * 512, 0x00ff_0000, 2, "is not in the file"),
        (redundant, 0, 3, "differs from the other in 1 entries"),
    ] {
        fs::write(dir.path("bad.vmdk"), &sound).unwrap();
        let file = fs::OpenOptions::new()
            .write(true)
            .open(dir.path("bad.vmdk"))
            .unwrap();
        file.write_all_at(&u32::to_le_bytes(entry), at as u64)
            .unwrap();
        let args = ["check", "bad.vmdk"];
        let text = failure(&args, &diskplane(root, &args), code);
        assert!(text.contains(says), "{entry:#x}: {text}");
        if code == 3 {
            good(root, &["check", "--repair", "leaks", "bad.vmdk"]);
            assert!(fs::read(dir.path("bad.vmdk")).unwrap() == sound);
        }
    }
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let dir = TempDir::new();
    let root = dir.root();
    good(root, &["create", "a.vmdk", "1M"]);
    good(root, &["create", "-b", "a.vmdk", "-F", "vmdk", "o.vmdk"]);
    good(root, &["create", "-f", "qcow2", "q.qcow2", "1M"]);
    let over = json(&qemu_img(root, &["info", "--output=json", "o.vmdk"]));
    assert_eq!(over["backing-filename"], "a.vmdk");
    for (args, said) in [
        (&["snapshot", "-l", "a.vmdk"][..], "no internal snapshots"),
        (&["bitmap", "a.vmdk"], "no bitmaps"),
        (&["amend", "-o", "size=2M", "a.vmdk"], "no options to amend"),
        (&["resize", "a.vmdk", "2M"], "cannot be resized"),
        (
            &["measure", "-O", "vmdk", "--size", "1M"],
            "cannot be measured",
        ),
        (
            &["rebase", "-u", "-b", "q.qcow2", "-F", "qcow2", "o.vmdk"],
            "lies over vmdk",
        ),
        (
            &[
                "create",
                "-o",
                "subformat=monolithicFlat",
                "-b",
                "a.vmdk",
                "-F",
                "vmdk",
                "b.vmdk",
            ],
            "Flat image can't have backing file",
        ),
        (
            &[
                "create",
                "-o",
                "subformat=monolithicFlat,zeroed_grain=on",
                "b.vmdk",
                "1M",
            ],
            "Flat image can't enable zeroed grain",
        ),
        (
            &["create", "-o", "compat6=on,hwversion=7", "b.vmdk", "1M"],
            "compat6 cannot be enabled with hwversion set",
        ),
        (
            &["create", "-b", "q.qcow2", "-F", "qcow2", "b.vmdk"],
            "lies over vmdk",
        ),
        (
            &["create", "-o", "subformat=flat", "b.vmdk", "1M"],
            "monolithicFlat",
        ),
        (&["create", "b.vmdk", "0"], "1 to"),
        (
            &[
                "create",
                "-o",
                "subformat=twoGbMaxExtentFlat",
                "b.vmdk",
                "3T",
            ],
            "the most is 1024",
        ),
        (
            &[
                "convert", "-c", "-f", "vmdk", "-O", "vmdk", "a.vmdk", "b.vmdk",
            ],
            "subformat=streamOptimized",
        ),
    ] {
        let error = refused(root, args);
        assert!(error.contains(said), "{args:?}: {error}");
    }
    assert!(!dir.path("b.vmdk").exists());
}

/// The extent of an ESX redo log, laid out by hand: grains of 4 KiB, the numbered ones filled with their byte.
fn cowd(sectors: u32, grains: &[(usize, u8)]) -> Vec<u8> {
    let mut bytes = vec![0; 64 * 512];
    let words = [0x4457_4f43, 1, 3, sectors, 8, 4, 1];
    for (at, word) in (0..).step_by(4).zip(words) {
        bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(word));
    }
    bytes[4 * 512..4 * 512 + 4].copy_from_slice(&8u32.to_le_bytes());
    for (grain, fill) in grains {
        let at = 8 * 512 + grain * 4;
        let sector = (bytes.len() / 512) as u32;
        bytes[at..at + 4].copy_from_slice(&sector.to_le_bytes());
        bytes.resize(bytes.len() + 4096, *fill);
    }
    bytes
}

/// An extent of a space-efficient disk, as QEMU's sources describe it. Besides, grains 100 and 101 are zeros: unmapped, and
/// written so.
fn se_sparse(sectors: u64, grains: &[(usize, u8)]) -> Vec<u8> {
    const VOLATILE: u64 = 1;
    const DIRECTORY: u64 = 8;
    const TABLES: u64 = 16;
    const GRAINS: u64 = 128;
    let mut bytes = vec![0; GRAINS as usize * 512];
    let mut put = |at: usize, word: u64| bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    let fields = [
        (0, 0xcafe_babe),
        (1, 0x2_0000_0001),
        (2, sectors),
        (3, 8),
        (4, 64),
        (10, VOLATILE),
        (11, 1),
        (16, DIRECTORY),
        (17, 1),
        (18, TABLES),
        (19, 64),
        (24, GRAINS),
        (25, 8 * grains.len() as u64),
    ];
    for (nth, word) in fields {
        put(nth * 8, word);
    }
    put(VOLATILE as usize * 512, 0xcafe_cafe);
    put(DIRECTORY as usize * 512, 0x1000_0000_0000_0000);
    for (nth, (grain, _)) in grains.iter().enumerate() {
        // The low 12 bits of the number come before the high ones.
        let word = 0x3000_0000_0000_0000 | (nth as u64) << 48;
        put(TABLES as usize * 512 + grain * 8, word);
    }
    put(TABLES as usize * 512 + 100 * 8, 0x1000_0000_0000_0000);
    put(TABLES as usize * 512 + 101 * 8, 0x2000_0000_0000_0000);
    for (_, fill) in grains {
        bytes.resize(bytes.len() + 4096, *fill);
    }
    bytes
}

/// ESX's extents over a parent read as QEMU reads them, and are not written.
#[test]
fn extents_of_esx_read_as_qemu_reads_them() {
    let dir = TempDir::new();
    let root = dir.root();
    fs::write(dir.path("base.raw"), vec![0xbb; 4 << 20]).unwrap();
    good(root, &["convert", "-f", "raw", "base.raw", "base.vmdk"]);
    let base = fs::read(dir.path("base.vmdk")).unwrap();
    let text = String::from_utf8_lossy(&base[512..1024]).into_owned();
    let cid = text
        .lines()
        .find_map(|line| line.strip_prefix("CID="))
        .unwrap();
    // 2 MiB of each: 512 grains.
    let last = 511;
    fs::write(
        dir.path("cow.vmdk"),
        cowd(4096, &[(0, 1), (5, 2), (6, 3), (last, 4)]),
    )
    .unwrap();
    fs::write(
        dir.path("se.vmdk"),
        se_sparse(4096, &[(1, 5), (7, 6), (last, 7)]),
    )
    .unwrap();
    for (parent, hint) in [
        ("ffffffff", ""),
        (cid, "parentFileNameHint=\"base.vmdk\"\n"),
    ] {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={parent}\ncreateType=\"vmfsSparse\"\n{hint}\
             RW 4096 VMFSSPARSE \"cow.vmdk\"\nRW 4096 SESPARSE \"se.vmdk\"\n"
        );
        fs::write(dir.path("esx.vmdk"), text).unwrap();
        let theirs = [
            "convert",
            "-f",
            "vmdk",
            "-O",
            "raw",
            "esx.vmdk",
            "theirs.raw",
        ];
        qemu_img(root, &theirs);
        good(root, &["convert", "-O", "raw", "esx.vmdk", "ours.raw"]);
        let (ours, theirs) = (
            fs::read(dir.path("ours.raw")),
            fs::read(dir.path("theirs.raw")),
        );
        let ours = ours.unwrap();
        assert!(ours == theirs.unwrap(), "{hint}");
        let below = if hint.is_empty() { 0 } else { 0xbb };
        let grain = |nth: usize| ours[nth * 4096];
        assert_eq!([0, 1, 5, 6, last].map(grain), [1, below, 2, 3, 4]);
        let se = |nth: usize| grain(512 + nth);
        assert_eq!([0, 1, 7, 100, 101, last].map(se), [below, 5, 6, 0, 0, 7]);
        fs::remove_file(dir.path("ours.raw")).unwrap();
        for args in [
            &["commit", "esx.vmdk"][..],
            &["rebase", "-b", "", "esx.vmdk"],
        ] {
            let error = refused(root, args);
            let said = ["read only", "has no backing file"];
            assert!(
                said.iter().any(|said| error.contains(said)),
                "{args:?}: {error}"
            );
        }
    }
    // What a table leads behind the file's end is no data.
    let mut cut = cowd(4096, &[(0, 1)]);
    cut.truncate(64 * 512);
    fs::write(dir.path("cow.vmdk"), cut).unwrap();
    refused(root, &["convert", "-O", "raw", "esx.vmdk", "ours.raw"]);
}
