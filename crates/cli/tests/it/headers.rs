//! What of a header nobody here knows stays as it is, whichever command rewrites the header: fields behind the known
//! ones, header extensions, compatible feature bits, the table of features' names. The headers are taken apart
//! and put together here, from the specification, and not by the code under test.

use crate::common;

use common::{binary, good, refused as bad, run};
use std::fs;
use std::path::Path;
use testkit::{Serve, TempDir, qemu};

const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
/// A type that nobody has taken.
const UNKNOWN: u32 = 0xabcd_1234;
/// Compatible bits that nobody has taken.
const COMPATIBLE: u64 = 1 << 63 | 1 << 5 | 1 << 1;
const SIZE: u64 = 4 << 20;

fn qemu_img(dir: &Path, args: &[&str]) -> (bool, String) {
    let output = run("qemu-img", dir, args);
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text.into_owned())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Header extensions: type and data of each.
type Extensions = Vec<(u32, Vec<u8>)>;

/// A header, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    version: u32,
    /// The first 104 bytes, or 72.
    fields: Vec<u8>,
    /// What follows up to the header's length.
    rest: Vec<u8>,
    extensions: Extensions,
    backing: Vec<u8>,
}

impl Header {
    fn read(path: &Path) -> Self {
        let file = fs::read(path).unwrap();
        let bytes = &file[..1 << u32_at(&file, 20)];
        let version = u32_at(bytes, 4);
        let (known, len) = match version {
            2 => (72, 72),
            _ => (104, u32_at(bytes, 100) as usize),
        };
        let (name_at, name_len) = (u64_at(bytes, 8) as usize, u32_at(bytes, 16) as usize);
        let end = if name_at == 0 { bytes.len() } else { name_at };
        let (mut extensions, mut at) = (Vec::new(), len);
        while at + 8 <= end && u32_at(bytes, at) != 0 {
            let data = at + 8..at + 8 + u32_at(bytes, at + 4) as usize;
            at = data.end.next_multiple_of(8);
            extensions.push((u32_at(bytes, data.start - 8), bytes[data].to_vec()));
        }
        Self {
            version,
            fields: bytes[..known].to_vec(),
            rest: bytes[known..len].to_vec(),
            extensions,
            backing: bytes[name_at..][..if name_at == 0 { 0 } else { name_len }].to_vec(),
        }
    }

    fn write(&self, path: &Path) {
        let mut file = fs::read(path).unwrap();
        let mut out = [&self.fields[..], &self.rest].concat();
        let len = out.len() as u32;
        if self.version == 3 {
            out[100..104].copy_from_slice(&len.to_be_bytes());
        }
        for (kind, data) in &self.extensions {
            out.extend(kind.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            // Nobody says what is in the padding.
            out.resize(out.len().next_multiple_of(8), 0xee);
        }
        let cluster = 1 << u32_at(&file, 20);
        if out.len() < cluster {
            out.extend([0; 8]);
        }
        if !self.backing.is_empty() {
            let at = out.len() as u64;
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out.extend(&self.backing);
        }
        assert!(out.len() <= cluster, "{} bytes", out.len());
        out.resize(cluster, 0);
        file[..cluster].copy_from_slice(&out);
        fs::write(path, file).unwrap();
    }

    fn compatible(&self) -> u64 {
        u64_at(&self.fields, 80)
    }

    /// Extensions that are nobody's to change here.
    fn kept(&self) -> Extensions {
        let mut kept = self.extensions.clone();
        kept.retain(|(kind, _)| ![FEATURE_NAMES, BITMAPS].contains(kind));
        // The order is nobody's: QEMU turns it round.
        kept.sort();
        kept
    }

    /// What everybody keeps.
    fn foreign(&self) -> (Vec<u8>, Extensions, u64) {
        (self.rest.clone(), self.kept(), self.compatible() & !1)
    }

    fn names(&self) -> Option<&Vec<u8>> {
        let found = self
            .extensions
            .iter()
            .find(|(kind, _)| *kind == FEATURE_NAMES);
        found.map(|(_, data)| data)
    }
}

/// Makes `a.qcow2` with a header of `len` bytes and unknown extensions of these lengths; and `a.raw`, the same.
fn make(dir: &Path, options: &str, backed: bool, len: usize, extensions: &[usize]) {
    let image = dir.join("a.qcow2");
    fs::write(dir.join("base"), vec![7; 1 << 20]).unwrap();
    let options = match backed {
        true => format!("backing_file=base,backing_fmt=raw,{options}"),
        false => options.to_owned(),
    };
    qemu::create_with("qcow2", &image, &SIZE.to_string(), &options);
    qemu::io(
        "qcow2",
        &image,
        &["write -P 1 100k 600k", "write -P 2 2M 64k"],
    );
    let mut header = Header::read(&image);
    let fields = (104..len).map(|at| match at {
        104..112 => header.rest.get(at - 104).copied().unwrap_or(0),
        _ => (at * 7 + 1) as u8,
    });
    header.rest = fields.collect();
    if 104 + header.rest.len() + 400 > 1 << u32_at(&header.fields, 20) {
        // No room for names.
        header.extensions.retain(|(kind, _)| *kind != FEATURE_NAMES);
    }
    let compatible = header.compatible() | COMPATIBLE;
    header.fields[80..88].copy_from_slice(&compatible.to_be_bytes());
    for (nth, len) in extensions.iter().enumerate() {
        // Some have the same type.
        let kind = UNKNOWN + (nth / 2) as u32;
        header
            .extensions
            .push((kind, (0..*len).map(|i| (i * 3 + nth) as u8 | 1).collect()));
    }
    header.write(&image);
    assert_eq!(Header::read(&image).foreign(), header.foreign());
    let _ = fs::remove_file(dir.join("a.raw"));
    assert!(qemu_img(dir, &["convert", "-O", "raw", "a.qcow2", "a.raw"]).0);
}

/// Lets a server write.
fn serve(dir: &Path) {
    let socket = dir.join("sock");
    let program = binary();
    let server = Serve::new(program, dir.join("a.qcow2"))
        .nbd_unix(&socket)
        .start();
    let uri = qemu::nbd_unix_uri(&socket);
    qemu::io(
        "raw",
        &uri,
        &["write -P 8 1M 700k", "discard 3M 64k", "flush"],
    );
    qemu::io("raw", dir.join("a.raw"), &["write -P 8 1M 700k"]);
    server.stop();
}

#[test]
fn what_nobody_knows_is_kept_by_every_change() {
    for (options, backed, len, extensions) in [
        ("cluster_size=64k", false, 104, &[0, 1, 7, 8, 9, 300][..]),
        ("cluster_size=4096,lazy_refcounts=on", true, 112, &[1000, 3]),
        ("cluster_size=64k,compression_type=zstd", true, 120, &[5]),
        ("cluster_size=4096", true, 512, &[17]),
        ("cluster_size=2048,refcount_bits=1", false, 1536, &[11]),
        ("cluster_size=512", true, 304, &[6]),
        ("extended_l2=on,cluster_size=16k", true, 8192, &[4000, 2, 1]),
    ] {
        let dir = TempDir::new();
        let dir = dir.root();
        make(dir, options, backed, len, extensions);
        let image = dir.join("a.qcow2");
        let before = Header::read(&image);
        let is = |what: &[&str]| {
            let now = Header::read(&image);
            assert_eq!(
                now.foreign(),
                before.foreign(),
                "{options}, {len}: {what:?}"
            );
            assert_eq!(now.backing, before.backing, "{what:?}");
            // QEMU puts its own in its place, which is the same.
            let names = before.names().is_none() || now.names() == before.names();
            assert!(names || len < 512, "{what:?}: the names of features");
            qemu::check("qcow2", &image);
            qemu::compare("qcow2", &image, "raw", dir.join("a.raw"));
        };
        serve(dir);
        is(&["serve"]);
        let grow = fs::File::options().write(true).open(dir.join("a.raw"));
        let grow = grow.unwrap();
        let small = options.contains("refcount_bits=1");
        let changes: [&[&str]; 13] = [
            &["amend", "-o", "lazy_refcounts=on", "a.qcow2"],
            &["amend", "-o", "refcount_bits=64", "a.qcow2"],
            &["amend", "-o", "lazy_refcounts=off", "a.qcow2"],
            &["snapshot", "-c", "s", "a.qcow2"],
            &["snapshot", "-a", "s", "a.qcow2"],
            &["snapshot", "-d", "s", "a.qcow2"],
            &["bitmap", "--add", "a.qcow2", "b"],
            &["bitmap", "--disable", "a.qcow2", "b"],
            &["bitmap", "--remove", "a.qcow2", "b"],
            &["check", "--repair", "all", "a.qcow2"],
            &["resize", "a.qcow2", "+1M"],
            &["resize", "--shrink", "a.qcow2", "4M"],
            &["amend", "-o", "refcount_bits=16", "a.qcow2"],
        ];
        for change in changes {
            if change[0] == "check" {
                // The repair has something to write.
                let mut dirty = Header::read(&image);
                dirty.fields[79] |= 1;
                dirty.write(&image);
            }
            good(dir, change);
            let bytes = match change[0] {
                "resize" if change[1] == "a.qcow2" => SIZE + (1 << 20),
                _ => SIZE,
            };
            grow.set_len(bytes).unwrap();
            is(change);
        }
        assert!(!small || Header::read(&image).fields[99] == 4);
        // And it is QEMU's to keep, too.
        assert!(qemu_img(dir, &["snapshot", "-c", "q", "a.qcow2"]).0);
        is(&["qemu-img snapshot"]);
    }
}

#[test]
fn a_header_that_fills_its_cluster_has_no_room_for_more() {
    let dir = TempDir::new();
    let dir = dir.root();
    for len in [4096, 4088] {
        make(dir, "cluster_size=4096", false, len, &[]);
        let image = dir.join("a.qcow2");
        let before = Header::read(&image);
        assert_eq!(before.rest.len(), len - 104);
        // What needs an extension fails, and has changed nothing.
        let bytes = fs::read(&image).unwrap();
        let text = bad(dir, &["bitmap", "--add", "a.qcow2", "b"]);
        assert!(text.contains("more than a cluster of 4096"), "{text}");
        assert!(fs::read(&image).unwrap() == bytes);
        // The rest works.
        serve(dir);
        good(dir, &["amend", "-o", "lazy_refcounts=on", "a.qcow2"]);
        good(dir, &["amend", "-o", "refcount_bits=32", "a.qcow2"]);
        good(dir, &["snapshot", "-c", "s", "a.qcow2"]);
        good(dir, &["snapshot", "-d", "s", "a.qcow2"]);
        good(dir, &["resize", "a.qcow2", "5M"]);
        good(dir, &["resize", "--shrink", "a.qcow2", "4M"]);
        assert_eq!(Header::read(&image).foreign(), before.foreign());
        qemu::check("qcow2", &image);
        qemu::compare("qcow2", &image, "raw", dir.join("a.raw"));
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn versions_change_with_what_is_in_the_header() {
    let dir = TempDir::new();
    let dir = dir.root();
    for (backed, cluster) in [(false, "64k"), (true, "4096"), (true, "512")] {
        let create = format!("compat=0.10,cluster_size={cluster}");
        let image = dir.join("a.qcow2");
        let options = match backed {
            true => format!("backing_file=base,backing_fmt=raw,{create}"),
            false => create,
        };
        fs::write(dir.join("base"), vec![7; 1 << 20]).unwrap();
        qemu::create_with("qcow2", &image, &SIZE.to_string(), &options);
        qemu::io("qcow2", &image, &["write -P 1 100k 600k"]);
        let mut before = Header::read(&image);
        assert_eq!((before.version, before.rest.len()), (2, 0));
        before.extensions.push((UNKNOWN, vec![9; 13]));
        before.write(&image);
        let before = Header::read(&image);
        assert!(qemu_img(dir, &["convert", "-O", "raw", "a.qcow2", "a.raw"]).0);
        let is = |version: u32| {
            let now = Header::read(&image);
            assert_eq!(now.version, version);
            assert_eq!(now.kept(), before.kept());
            assert_eq!(now.backing, before.backing);
            qemu::check("qcow2", &image);
            qemu::compare("qcow2", &image, "raw", dir.join("a.raw"));
            now
        };
        good(
            dir,
            &["amend", "-o", "compat=1.1,lazy_refcounts=on", "a.qcow2"],
        );
        let now = is(3);
        assert_eq!((now.rest.len(), now.compatible()), (8, 1));
        assert!(now.rest.iter().all(|byte| *byte == 0));
        // Names of features, as QEMU writes them, where there is room.
        assert_eq!(now.names().is_some(), cluster != "512");
        if let Some(names) = now.names() {
            let other = dir.join("q.qcow2");
            qemu::create("qcow2", &other, "1M");
            let theirs = Header::read(&other).names().unwrap().clone();
            assert!(
                names
                    .chunks(48)
                    .all(|name| theirs.chunks(48).any(|n| n == name))
            );
            assert_eq!(names.len(), theirs.len());
        }
        serve(dir);
        is(3);
        good(dir, &["amend", "-o", "compat=0.10", "a.qcow2"]);
        let now = is(2);
        assert!(now.names().is_none());
        assert_eq!(
            qemu_img(dir, &["amend", "-o", "compat=1.1", "a.qcow2"]),
            (true, String::new())
        );
        is(3);
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn a_downgrade_drops_what_version_2_has_no_place_for() {
    // As qemu-img does: compatible bits are nobody's need.
    let dir = TempDir::new();
    let dir = dir.root();
    make(
        dir,
        "cluster_size=4096,lazy_refcounts=on",
        true,
        112,
        &[3, 5],
    );
    let image = dir.join("a.qcow2");
    let before = Header::read(&image);
    good(dir, &["amend", "-o", "compat=0.10", "a.qcow2"]);
    let now = Header::read(&image);
    assert_eq!(now.version, 2);
    assert_eq!(now.kept(), before.kept());
    qemu::check("qcow2", &image);
    qemu::compare("qcow2", &image, "raw", dir.join("a.raw"));
    // What would be lost is refused, by both.
    for options in [
        "extended_l2=on",
        "refcount_bits=8",
        "compression_type=zstd",
        // QEMU takes a relative name from where it runs.
        &format!("data_file={}", dir.join("data").display()),
    ] {
        qemu::create_with("qcow2", dir.join("b.qcow2"), "1M", options);
        if options.contains("zstd") {
            // Only where it has clusters that are compressed so.
            let made = [
                "convert", "-c", "-O", "qcow2", "-o", options, "a.raw", "b.qcow2",
            ];
            assert!(qemu_img(dir, &made).0);
        }
        let text = bad(dir, &["amend", "-o", "compat=0.10", "b.qcow2"]);
        assert!(text.contains("compat"), "{text}");
        assert!(
            !qemu_img(dir, &["amend", "-o", "compat=0.10", "b.qcow2"]).0,
            "{options}"
        );
    }
}

#[test]
fn incompatible_features_are_refused_by_name_or_number() {
    let dir = TempDir::new();
    let dir = dir.root();
    make(dir, "cluster_size=4096", false, 112, &[2]);
    let image = dir.join("a.qcow2");
    let sound = Header::read(&image);
    let mut named = sound.clone();
    // QEMU has written no names there.
    assert!(named.names().is_none());
    let mut names = vec![0; 96];
    (names[0], names[1]) = (1, 40);
    names[2..7].copy_from_slice(b"other");
    names[49] = 40;
    names[50..54].copy_from_slice(b"warp");
    named.extensions.push((FEATURE_NAMES, names));
    for (header, bits, says) in [
        (&sound, 1u64 << 5, &["unknown feature bit 5"][..]),
        (&named, 1 << 40, &["'warp' (bit 40)"]),
        (
            &named,
            1 << 40 | 1 << 63,
            &["'warp' (bit 40)", "unknown feature bit 63"],
        ),
    ] {
        let mut header = header.clone();
        header.fields[72..80].copy_from_slice(&bits.to_be_bytes());
        header.write(&image);
        let bytes = fs::read(&image).unwrap();
        for command in [
            &["info", "a.qcow2"][..],
            &["map", "a.qcow2"],
            &["check", "a.qcow2"],
            &["check", "--repair", "all", "a.qcow2"],
            &["amend", "-o", "lazy_refcounts=on", "a.qcow2"],
            &["resize", "a.qcow2", "5M"],
            &["snapshot", "-c", "s", "a.qcow2"],
            &["bitmap", "--add", "a.qcow2", "b"],
            &["convert", "-O", "raw", "a.qcow2", "b.raw"],
            &["serve", "--nbd", "unix:sock", "a.qcow2"],
        ] {
            let text = bad(dir, command);
            assert!(
                says.iter().all(|name| text.contains(name)),
                "{command:?}: {text}"
            );
            assert!(fs::read(&image).unwrap() == bytes, "{command:?}");
        }
        let (done, text) = qemu_img(dir, &["info", "a.qcow2"]);
        assert!(!done && text.contains("Unsupported"), "{text}");
    }
    named.write(&image);
    serve(dir);
    good(dir, &["amend", "-o", "refcount_bits=8", "a.qcow2"]);
    assert_eq!(Header::read(&image).names(), named.names());
}
