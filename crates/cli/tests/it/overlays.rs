//! Overlays in formats that know their backing file by what it holds: rebased, committed and made whole, beside QEMU where
//! that reads them (of VHD and VHDX it knows no overlays; of VMDK it checks the CID that an overlay has of its parent).

use crate::common;

use common::{diskplane, good, json, qemu_img, refused};
use std::fs;
use std::path::Path;
use testkit::TempDir;

const SIZE: usize = 6 << 20;

/// Two disks that differ here and there: (name in the command line, in QEMU's, options of an image).
const FORMATS: [(&str, &str, &str); 3] = [
    ("vhd", "vpc", "force_size=on,block_size=64K"),
    ("vhdx", "vhdx", "block_size=1M"),
    ("vmdk", "vmdk", "subformat=monolithicSparse"),
];

fn disks() -> [Vec<u8>; 2] {
    let one: Vec<u8> = (0..SIZE)
        .map(|i| [1u8, 0, 2][(i >> 19) % 3].wrapping_mul((i >> 9) as u8))
        .collect();
    let mut other = one.clone();
    other[100_000..170_000].fill(0xee);
    other[2 << 20..(2 << 20) + 512].fill(0xdd);
    other[4 << 20..5 << 20].fill(0);
    other[SIZE - 4096..].fill(0xcc);
    [one, other]
}

/// What an image, with all that is below it, reads as.
fn content(root: &Path, image: &str) -> Vec<u8> {
    good(root, &["convert", "-O", "raw", image, "read.raw"]);
    let bytes = fs::read(root.join("read.raw")).unwrap();
    fs::remove_file(root.join("read.raw")).unwrap();
    bytes
}

#[test]
fn overlays_are_rebased_committed_and_made_whole() {
    let [one, other] = disks();
    for (format, qemu, options) in FORMATS {
        let dir = TempDir::new();
        let root = dir.root();
        let name = |stem: &str| format!("{stem}.{format}");
        let [a, b, top, sub] = ["a", "b", "top", "sub/b"].map(name);
        fs::write(dir.path("a.raw"), &one).unwrap();
        fs::write(dir.path("b.raw"), &other).unwrap();
        fs::create_dir(dir.path("sub")).unwrap();
        for (raw, image) in [("a.raw", &a), ("b.raw", &b), ("b.raw", &sub)] {
            let convert = ["convert", "-f", "raw", "-O", format, "-o", options];
            good(root, &[&convert[..], &[raw, image]].concat());
        }
        good(
            root,
            &["create", "-f", format, "-b", &a, "-F", format, &top],
        );
        let alone = fs::read(dir.path(&top)).unwrap();
        // In qemu-img's place, and by our own name.
        let on_b = ["-b", &b, "-F"];
        good(
            root,
            &[
                &["qemu-img", "rebase", "-f", qemu][..],
                &on_b,
                &[qemu, &top],
            ]
            .concat(),
        );
        assert!(content(root, &top) == one, "{format}");
        let info = good(root, &["info", "--json", &top]);
        let backing = json(&info)["backing-filename"].as_str().unwrap().to_owned();
        assert!(backing.ends_with(&b), "{info}");
        good(root, &["check", &top]);
        if format == "vmdk" {
            qemu_img(root, &["check", "-q", &top]);
            qemu_img(root, &["compare", "-f", "vmdk", "-F", "raw", &top, "a.raw"]);
        }
        let map = json(&good(root, &["map", "--json", &top]));
        assert!(
            map.as_array().unwrap().iter().any(|e| e["depth"] == 1),
            "{map}"
        );
        // The same in another directory, without a look at it.
        good(root, &["rebase", "-u", "-b", &sub, "-F", format, &top]);
        assert!(content(root, &top) == one, "{format}");
        // What of the base is read over is not lost, and the chain stays one.
        good(root, &["commit", "-d", &top]);
        assert!(
            content(root, &top) == one && content(root, &sub) == one,
            "{format}"
        );
        let json_ = json(&good(root, &["commit", "--json", &top]));
        assert_eq!(
            (&json_["emptied"], &json_["virtual-size"]),
            (&true.into(), &SIZE.into())
        );
        assert!(content(root, &top) == one, "{format}");
        let map = json(&good(root, &["map", "--json", &top]));
        assert!(
            map.as_array().unwrap().iter().all(|e| e["depth"] == 1),
            "{map}"
        );
        let len = |image: &str| fs::metadata(dir.path(image)).unwrap().len();
        assert!(
            len(&top) <= alone.len() as u64 + 8192,
            "{format}: {} bytes",
            len(&top)
        );
        qemu_img(root, &["compare", "-f", qemu, "-F", "raw", &sub, "a.raw"]);
        for image in [&top, &sub] {
            good(root, &["check", image]);
        }
        if format == "vmdk" {
            qemu_img(root, &["compare", "-f", "vmdk", "-F", "raw", &top, "a.raw"]);
        }
        // On nothing it has all, and every program reads it.
        good(root, &["rebase", "-b", "", &top]);
        assert!(content(root, &top) == one, "{format}");
        let info = json(&good(root, &["info", "--json", &top]));
        assert!(info.get("backing-filename").is_none(), "{info}");
        qemu_img(root, &["compare", "-f", qemu, "-F", "raw", &top, "a.raw"]);
        good(root, &["check", &top]);
        // And from there over another one again.
        good(root, &["rebase", "-b", &b, "-F", format, &top]);
        assert!(content(root, &top) == one, "{format}");
        good(root, &["check", &top]);
        // What is no parent for it is refused, and the image stays.
        let before = fs::read(dir.path(&top)).unwrap();
        for (base, said) in [("a.raw", "raw"), ("absent", format)] {
            if (format, said) != ("vhd", "raw") {
                refused(root, &["rebase", "-u", "-b", base, "-F", said, &top]);
            }
        }
        assert!(fs::read(dir.path(&top)).unwrap() == before, "{format}");
    }
}

/// An overlay that is partly there in blocks, and an image in between, committed into the lowest image.
#[test]
fn a_chain_is_committed_into_its_lowest_image() {
    let [one, other] = disks();
    for (format, qemu, options) in FORMATS {
        let dir = TempDir::new();
        let root = dir.root();
        let name = |stem: &str| format!("{stem}.{format}");
        let [base, aside, middle, top] = ["base", "aside", "middle", "top"].map(name);
        fs::write(dir.path("a.raw"), &one).unwrap();
        fs::write(dir.path("b.raw"), &other).unwrap();
        for (raw, image) in [("b.raw", &base), ("a.raw", &aside)] {
            let convert = ["convert", "-f", "raw", "-O", format, "-o", options];
            good(root, &[&convert[..], &[raw, image]].concat());
        }
        let over = |below: &str, image: &str| {
            good(
                root,
                &["create", "-f", format, "-b", below, "-F", format, image],
            );
        };
        over(&base, &middle);
        over(&aside, &top);
        good(root, &["rebase", "-b", &middle, "-F", format, &top]);
        let told = good(root, &["commit", "-b", &base, &top]);
        assert!(told.contains("committed"), "{told}");
        for image in [&top, &base] {
            assert!(content(root, image) == one, "{format}: {image}");
        }
        qemu_img(root, &["compare", "-f", qemu, "-F", "raw", &base, "a.raw"]);
        let refusal = diskplane(
            root,
            &[
                "qemu-img", "rebase", "-f", qemu, "-b", "absent", "-F", qemu, &top,
            ],
        );
        assert_eq!(refusal.status.code(), Some(1));
    }
}
