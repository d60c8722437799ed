//! What checks and repairs of damaged images say, beside the installed qemu-img.

use crate::beside::same_in;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// An image that the installed qemu-img made: clusters 0 header, 1 refcount table, 2 block, 3 L1, 4 L2, 5 and 6 data.
fn image(path: &Path) {
    for line in [
        &["qemu-img", "create", "-q", "-f", "qcow2", "a", "1M"][..],
        &["qemu-io", "-c", "write 0 128k", "a"],
    ] {
        let dir = path.parent().unwrap();
        let mut command = std::process::Command::new(line[0]);
        let output = command.args(&line[1..]).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

/// Where both programs repair the image with these bytes at these places, they say and do the same.
fn damaged(changes: &[(u64, &[u8])], lines: &[&str]) {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in [theirs.path(), ours.path()] {
        let path = dir.join("a");
        image(&path);
        let file = fs::File::options().write(true).open(path).unwrap();
        for (at, bytes) in changes {
            file.write_all_at(bytes, *at).unwrap();
        }
    }
    same_in(theirs.path(), ours.path(), lines);
    let features = |dir: &Path| fs::read(dir.join("a")).unwrap()[72..96].to_vec();
    assert_eq!(features(ours.path()), features(theirs.path()));
}

const CLUSTER: u64 = 65536;
const BLOCK: u64 = 2 * CLUSTER;
const L2: u64 = 4 * CLUSTER;
const REPAIRS: &[&str] = &[
    "qemu-img check a",
    "qemu-img check -r leaks a",
    "qemu-img check -r all a",
    "qemu-img check a",
];

#[test]
fn repairs_are_told_as_by_qemu_img() {
    // Leaked: a cluster that nothing refers to, one that is referred to once.
    damaged(
        &[(BLOCK + 7 * 2, &[0, 1]), (BLOCK + 5 * 2, &[0, 2])],
        REPAIRS,
    );
    // Too few references: the flag is wrong once the refcount is right.
    damaged(
        &[(L2 + 8, &[0x80, 0, 0, 0, 0, 5, 0, 0])],
        &[
            "qemu-img check a",
            "qemu-img check -r all a",
            "qemu-img check a",
        ],
    );
    // None: the refcounts are made anew, which frees the old ones.
    damaged(
        &[(BLOCK + 5 * 2, &[0, 0])],
        &[
            "qemu-img check a",
            "qemu-img check -r all a",
            "qemu-img check a",
        ],
    );
    // The flag alone.
    damaged(&[(L2, &[0])], REPAIRS);
    // Far behind the file's end.
    damaged(&[(L2 + 8, &[0x80, 0, 0, 0x70])], &["qemu-img check a"]);
}

#[test]
fn a_writer_repairs_a_dirty_image_and_says_so() {
    // The dirty bit, and a cluster that was not counted yet.
    let dirty: &[(u64, &[u8])] = &[(79, &[1]), (BLOCK + 6 * 2, &[0, 0])];
    damaged(
        dirty,
        &["qemu-img amend -o lazy_refcounts=on a", "qemu-img check a"],
    );
    damaged(dirty, &["qemu-img snapshot -c s a"]);
}

#[test]
fn names_that_stand_twice_or_are_cut_off_are_read_as_by_qemu_img() {
    // In the place of the feature names: the backing file's format, twice; the last one counts.
    let extension = |kind: u32, text: &[u8]| {
        let mut bytes = [kind.to_be_bytes(), (text.len() as u32).to_be_bytes()].concat();
        bytes.extend_from_slice(text);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    };
    let format = 0xe279_2aca;
    let twice = [
        extension(format, b"raw"),
        extension(format, b"qcow2"),
        vec![0; 8],
    ]
    .concat();
    damaged(&[(112, &twice)], &["qemu-img info a"]);
    // A feature that nobody knows, whose name lacks its padding; and bits that a writer clears.
    let named = [extension(0x6803_f857, b"\x00\x3fTest feature"), vec![0; 8]].concat();
    damaged(
        &[(112, &named), (72, &[0x80])],
        &["qemu-img info a", "qemu-img check a"],
    );
    damaged(&[(88, &[0x80])], &["qemu-img check -r leaks a"]);
}
