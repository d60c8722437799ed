//! Which chains open, and why the others do not.

use crate::peer;

use block::ErrorKind;
use disk::{Chain, ChainOptions};
use image::Format;
use peer::{open_chain, qemu_img, qemu_io};
use std::{fs, os::unix::fs::symlink, path::Path};

fn reading() -> ChainOptions {
    ChainOptions {
        read_only: true,
        ..ChainOptions::default()
    }
}

/// Makes `name` an overlay that stores `base` and `format`, whatever they are.
fn overlay(dir: &Path, name: &str, base: &str, format: Option<&str>) {
    qemu_img(dir, &["create", "-q", "-f", "qcow2", name, "1M"]);
    let stored = format.unwrap_or("raw");
    qemu_img(
        dir,
        &[
            "rebase", "-u", "-f", "qcow2", "-b", base, "-F", stored, name,
        ],
    );
    if format.is_none() {
        // QEMU does not leave the format out any more: make its extension one that nobody knows.
        let mut bytes = fs::read(dir.join(name)).unwrap();
        let kind = 0xe279_2aca_u32.to_be_bytes();
        let at = bytes.windows(4).position(|four| four == kind).unwrap();
        bytes[at..at + 4].copy_from_slice(b"none");
        fs::write(dir.join(name), bytes).unwrap();
    }
}

#[test]
fn opens_what_the_policy_allows() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    for sub in ["own/deep", "other"] {
        fs::create_dir_all(dir.join(sub)).unwrap();
    }
    fs::write(dir.join("other/base.raw"), [7; 4096]).unwrap();
    fs::write(dir.join("own/deep/base.raw"), [8; 4096]).unwrap();
    let own = dir.join("own");
    overlay(&own, "middle.qcow2", "deep/base.raw", Some("raw"));
    overlay(&own, "top.qcow2", "middle.qcow2", Some("qcow2"));
    overlay(&own, "out.qcow2", "../other/base.raw", Some("raw"));
    let top = own.join("top.qcow2");
    let chain = open_chain(&top, &ChainOptions::default()).unwrap();
    let formats: Vec<Format> = chain.layers.iter().map(|l| l.format).collect();
    assert_eq!(formats, [Format::Qcow2, Format::Qcow2, Format::Raw]);
    assert_eq!(
        chain.layers[2].path,
        fs::canonicalize(dir.join("own/deep/base.raw")).unwrap()
    );
    assert!(chain.layers[1].files[0].read_only());
    let mut buf = [0; 2];
    chain.driver().unwrap().read(4095, &mut buf).unwrap();
    assert_eq!(buf, [8, 0]);
    // The same base below two overlays at once.
    let second = Chain::open(own.join("middle.qcow2").to_str().unwrap(), &reading());
    assert_eq!(second.unwrap().layers.len(), 2);
    drop(chain);

    let out = own.join("out.qcow2");
    let error = open_chain(&out, &reading()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    let text = error.to_string();
    assert!(text.contains("out.qcow2: backing file:"), "{text}");
    assert!(text.contains("--allow-backing"), "{text}");
    let allowed = ChainOptions {
        allow_backing: vec![dir.join("other")],
        ..reading()
    };
    assert_eq!(open_chain(&out, &allowed).unwrap().layers.len(), 2);
    // What `info` does: the image alone, wherever its base is.
    let alone = ChainOptions {
        without_backing: true,
        ..reading()
    };
    assert_eq!(open_chain(&out, &alone).unwrap().layers.len(), 1);
}

#[test]
fn refuses_names_that_are_no_files_below() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("own");
    fs::create_dir(&dir).unwrap();
    fs::write(scratch.path().join("key"), [1; 512]).unwrap();
    fs::write(dir.join("base.raw"), [1; 512]).unwrap();
    symlink("../key", dir.join("link")).unwrap();
    for (base, format, kind, says) in [
        ("base.raw", None, ErrorKind::Denied, "not recorded"),
        (
            "base.raw",
            Some("qcow2"),
            ErrorKind::Corrupt,
            "not a qcow2 image",
        ),
        (
            "base.raw",
            Some("vvfat"),
            ErrorKind::Unsupported,
            "'vvfat' is not supported",
        ),
        (
            "link",
            Some("raw"),
            ErrorKind::Denied,
            "outside the image's own directory",
        ),
        ("/etc/hostname", Some("raw"), ErrorKind::Denied, "outside"),
        ("/dev/null", Some("raw"), ErrorKind::Denied, "outside"),
        (
            ".",
            Some("raw"),
            ErrorKind::Invalid,
            "neither a file nor a block device",
        ),
        ("absent", Some("raw"), ErrorKind::NotFound, "'absent'"),
        (
            "nbd://localhost/x",
            Some("raw"),
            ErrorKind::Denied,
            "protocol",
        ),
        ("json:{}", Some("raw"), ErrorKind::Denied, "protocol"),
        ("file:base.raw", Some("raw"), ErrorKind::Denied, "protocol"),
    ] {
        overlay(&dir, "top.qcow2", base, format);
        let before = fs::read(dir.join("top.qcow2")).unwrap();
        let error = open_chain(&dir.join("top.qcow2"), &ChainOptions::default()).unwrap_err();
        assert_eq!(error.kind(), kind, "{base}: {error}");
        let text = error.to_string();
        assert!(
            text.contains(says) && text.contains("top.qcow2"),
            "{base}: {text}"
        );
        assert!(fs::read(dir.join("top.qcow2")).unwrap() == before, "{base}");
    }
}

#[test]
fn refuses_loops_and_endless_chains() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    overlay(dir, "a.qcow2", "b.qcow2", Some("qcow2"));
    overlay(dir, "b.qcow2", "c.qcow2", Some("qcow2"));
    overlay(dir, "c.qcow2", "a.qcow2", Some("qcow2"));
    // Another name for the same file is the same file.
    overlay(dir, "self.qcow2", "again.qcow2", Some("qcow2"));
    fs::hard_link(dir.join("self.qcow2"), dir.join("again.qcow2")).unwrap();
    for top in ["a.qcow2", "b.qcow2", "self.qcow2"] {
        let error = open_chain(&dir.join(top), &ChainOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("loop"), "{error}");
    }
    // Longer than the limit: each stores the next one's name.
    let longest = block::limits::CHAIN_LENGTH_MAX;
    let mut options = image::qcow2::CreateOptions {
        size: 1 << 20,
        ..image::qcow2::CreateOptions::default()
    };
    for index in 0..=longest {
        options.backing =
            (index < longest).then(|| (format!("{}.qcow2", index + 1), "qcow2".into()));
        let path = dir.join(format!("{index}.qcow2"));
        let unsafe_cache = io::OpenOptions {
            cache: io::Cache::Unsafe,
            ..io::OpenOptions::default()
        };
        let file = io::File::create_new(&path, &unsafe_cache).unwrap();
        image::qcow2::create(&*file, &options).unwrap();
    }
    let error = open_chain(&dir.join("0.qcow2"), &reading()).unwrap_err();
    assert!(error.to_string().contains("longer than 200"), "{error}");
    let chain = open_chain(&dir.join("1.qcow2"), &reading()).unwrap();
    assert_eq!(chain.layers.len(), longest);
    let mut buf = [1; 4096];
    chain.driver().unwrap().read(65_000, &mut buf).unwrap();
    assert_eq!(buf, [0; 4096]);
}

#[test]
fn a_format_is_probed_only_where_that_is_safe() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    fs::write(dir.join("disk"), [0; 4096]).unwrap();
    let error = open_chain(&dir.join("disk"), &ChainOptions::default()).unwrap_err();
    assert!(error.to_string().contains("say -f raw"), "{error}");
    let formats = |path: &str, options: &ChainOptions| {
        open_chain(&dir.join(path), options).map(|chain| {
            let format = chain.layers[0].format;
            drop(chain);
            format
        })
    };
    assert_eq!(formats("disk", &reading()).unwrap(), Format::Raw);
    let raw = ChainOptions {
        format: Some(Format::Raw),
        ..ChainOptions::default()
    };
    assert_eq!(formats("disk", &raw).unwrap(), Format::Raw);
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "disk.qcow2", "1M"]);
    assert_eq!(
        formats("disk.qcow2", &ChainOptions::default()).unwrap(),
        Format::Qcow2
    );
    assert_eq!(formats("disk.qcow2", &raw).unwrap(), Format::Raw);
    let null = Chain::open("null:1G", &ChainOptions::default()).unwrap();
    assert_eq!(null.driver().unwrap().size(), 1 << 30);
    assert!(Chain::open("null:1Q", &ChainOptions::default()).is_err());
}

#[test]
fn images_that_may_not_be_written_open_for_reading() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "disk.qcow2", "1M"]);
    qemu_io(dir, "qcow2", "disk.qcow2", "write -q -P 5 0 64k\n");
    let path = dir.join("disk.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    // The corrupt bit.
    bytes[79] |= 2;
    std::fs::write(&path, bytes).unwrap();
    let error = open_chain(&path, &ChainOptions::default()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("--read-only: it is marked corrupt"), "{text}");
    let mut buf = [0; 512];
    let chain = open_chain(&path, &reading()).unwrap();
    chain.driver().unwrap().read(0, &mut buf).unwrap();
    assert_eq!(buf, [5; 512]);
}

#[test]
fn an_image_in_use_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "disk.qcow2", "1M"]);
    let path = dir.join("disk.qcow2");
    let _held = open_chain(&path, &ChainOptions::default()).unwrap();
    for options in [ChainOptions::default(), reading()] {
        let error = Chain::open(path.to_str().unwrap(), &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    }
    let shared = ChainOptions {
        force_share: true,
        ..reading()
    };
    assert!(open_chain(&path, &shared).is_ok());
    let contradiction = ChainOptions {
        force_share: true,
        ..ChainOptions::default()
    };
    assert!(open_chain(&path, &contradiction).is_err());
}
