//! External data files: which are opened, and what is refused by name.

use crate::peer;

use disk::ChainOptions;
use disk::blocking::CutOff;
use peer::{check, open_chain, qemu_img, qemu_io};
use std::{fs, os::unix::fs::symlink, path::Path};

fn reading() -> ChainOptions {
    ChainOptions {
        read_only: true,
        ..ChainOptions::default()
    }
}

/// Makes `own/disk`, which stores `name` for its data file.
fn naming(dir: &Path, name: &str) {
    let own = dir.join("own");
    fs::create_dir_all(&own).unwrap();
    let _ = fs::remove_file(own.join("disk"));
    let file = io::File::create_new(&own.join("disk"), &io::OpenOptions::default()).unwrap();
    let options = image::qcow2::CreateOptions {
        size: 1 << 20,
        data_file: Some(name.to_owned()),
        ..image::qcow2::CreateOptions::default()
    };
    image::qcow2::create(&*file, &options).unwrap();
}

/// `disk` of 1 MiB, full, with its data in `data`.
fn make_full(dir: &Path) {
    qemu_img(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "data_file=data",
            "disk",
            "1M",
        ],
    );
    qemu_io(dir, "qcow2", "disk", "write -q -P 7 0 1M\n");
}

#[test]
fn only_allowed_names_of_files_are_opened() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    fs::create_dir_all(dir.join("own/directory")).unwrap();
    fs::create_dir_all(dir.join("other")).unwrap();
    for file in ["own/data", "own/short", "other/data"] {
        fs::write(dir.join(file), vec![7; 1 << 20]).unwrap();
    }
    fs::write(dir.join("own/short"), [7; 1000]).unwrap();
    symlink("../other/data", dir.join("own/link")).unwrap();
    symlink("disk", dir.join("own/itself")).unwrap();
    fs::hard_link(dir.join("other/data"), dir.join("own/hard")).unwrap();
    for (name, says) in [
        ("data", ""),
        ("./data", ""),
        ("short", ""),
        ("hard", ""),
        ("absent", "No such file"),
        ("directory", "neither a file nor a block device"),
        ("disk", "in the chain already"),
        ("itself", "in the chain already"),
        ("link", "--allow-backing"),
        ("../other/data", "--allow-backing"),
        ("/etc/hostname", "--allow-backing"),
        ("/dev/zero", "--allow-backing"),
        ("nbd://localhost/disk", "has a protocol"),
        ("json:{\"driver\":\"null-co\"}", "has a protocol"),
        ("fd:3", "has a protocol"),
    ] {
        naming(dir, name);
        let opened = open_chain(&dir.join("own/disk"), &reading());
        match opened {
            Ok(chain) => {
                assert_eq!(says, "", "{name} was opened");
                assert_eq!(chain.layers[0].files.len(), 2);
            }
            Err(error) => {
                let text = error.to_string();
                assert!(!says.is_empty() && text.contains(says), "{name}: {text}");
                assert!(text.contains("own/disk: data file"), "{name}: {text}");
            }
        }
    }
    naming(dir, "../other/data");
    let allowed = ChainOptions {
        allow_backing: vec![dir.join("other")],
        ..reading()
    };
    assert!(open_chain(&dir.join("own/disk"), &allowed).is_ok());
    // What the user says needs no leave, but must not be the image itself.
    naming(dir, "nbd://localhost/disk");
    for (said, opened) in [("other/data", true), ("own/disk", false), ("own", false)] {
        let options = ChainOptions {
            data_file: Some(dir.join(said)),
            ..reading()
        };
        let result = open_chain(&dir.join("own/disk"), &options);
        assert_eq!(result.is_ok(), opened, "{said}");
    }
    let alone = ChainOptions {
        without_backing: true,
        ..reading()
    };
    let chain = open_chain(&dir.join("own/disk"), &alone).unwrap();
    assert_eq!(chain.layers[0].files.len(), 1);
    // An image without one must not be given one.
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "plain", "1M"]);
    let options = ChainOptions {
        data_file: Some(dir.join("other/data")),
        ..reading()
    };
    let error = open_chain(&dir.join("plain"), &options).unwrap_err();
    assert!(error.to_string().contains("has no external"), "{error}");
}

#[test]
fn a_short_data_file_reads_as_zeros_and_grows() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    make_full(dir);
    let data = fs::OpenOptions::new().write(true).open(dir.join("data"));
    data.unwrap().set_len(100 << 10).unwrap();
    let mut bytes = vec![1; 1 << 20];
    let chain = open_chain(&dir.join("disk"), &ChainOptions::default()).unwrap();
    let error = chain.driver().unwrap().read(0, &mut bytes).unwrap_err();
    assert!(
        error.to_string().contains("guest offset 0x19000"),
        "{error}"
    );
    drop(chain);
    // Where that is asked for, as in QEMU.
    let options = ChainOptions {
        cut_off: CutOff::Zeros,
        ..ChainOptions::default()
    };
    let chain = open_chain(&dir.join("disk"), &options).unwrap();
    let mut driver = chain.driver().unwrap();
    driver.read(0, &mut bytes).unwrap();
    assert!(bytes[..100 << 10].iter().all(|b| *b == 7));
    assert!(bytes[100 << 10..].iter().all(|b| *b == 0));
    driver.write(500 << 10, &[9; 512]).unwrap();
    driver.close().unwrap();
    drop(chain);
    check(dir, "disk");
    qemu_io(
        dir,
        "qcow2",
        "disk",
        "read -q -P 7 0 100k\nread -q -P 0 100k 400k\nread -q -P 9 500k 512\n",
    );
}

/// What a damaged table says is refused where it is used, as QEMU does, and never reaches another place.
#[test]
fn entries_must_point_at_their_own_place() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    make_full(dir);
    let good = fs::read(dir.join("disk")).unwrap();
    let l2 = 0x4_0000;
    const COPIED: u64 = 1 << 63;
    for (index, entry, says) in [
        (3usize, COPIED | 0x4_0000, "another place"),
        (3, COPIED, "another place"),
        (0, COPIED | 0x1_0000, "another place"),
        (3, COPIED | 1 | 0x4_0000, "another place"),
        (3, 1 << 62 | 0x3_0000, "compressed"),
    ] {
        let mut bytes = good.clone();
        let at = l2 + index * 8;
        bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
        fs::write(dir.join("disk"), &bytes).unwrap();
        for read_only in [true, false] {
            let options = ChainOptions {
                read_only,
                ..ChainOptions::default()
            };
            let chain = open_chain(&dir.join("disk"), &options).unwrap();
            let mut driver = chain.driver().unwrap();
            let at = index as u64 * 65536;
            let error = driver.read(at, &mut [0; 512]).unwrap_err();
            assert!(error.to_string().contains(says), "{entry:#x}: {error}");
            if !read_only {
                assert!(driver.write(at, &[1; 512]).is_err());
            }
            driver.read(8 * 65536, &mut [0; 512]).unwrap();
        }
    }
    // Cluster 0 is at 0; without the flag it is not there.
    let mut bytes = good.clone();
    bytes[l2..l2 + 8].fill(0);
    fs::write(dir.join("disk"), &bytes).unwrap();
    let mut driver = open_chain(&dir.join("disk"), &reading())
        .unwrap()
        .driver()
        .unwrap();
    let mut read = [1; 512];
    driver.read(0, &mut read).unwrap();
    assert_eq!(read, [0; 512]);
    // The raw flag and a backing file contradict each other.
    let mut bytes = good;
    bytes[95] |= 2;
    let name = b"base";
    let end = 0x1000;
    bytes[end..end + 4].copy_from_slice(name);
    bytes[8..16].copy_from_slice(&(end as u64).to_be_bytes());
    bytes[16..20].copy_from_slice(&4u32.to_be_bytes());
    fs::write(dir.join("disk"), &bytes).unwrap();
    let error = open_chain(&dir.join("disk"), &reading()).unwrap_err();
    assert!(error.to_string().contains("exclude each other"), "{error}");
}
