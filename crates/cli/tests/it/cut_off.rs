//! Files that end before what their images say: nobody gets zeros for what is lost, unless he asks for it (`--salvage`), or
//! calls diskplane by qemu-img's name.

use crate::beside::same_in;
use crate::common::{diskplane, failure, good, json, qemu_img, refused};
use std::fs;
use std::path::Path;
use testkit::{TempDir, qemu};

/// Makes the file `len` bytes long.
fn cut(path: &Path, len: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    assert!(len < file.metadata().unwrap().len());
    file.set_len(len).unwrap();
}

fn len(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

/// Bytes that the file lacks in these tests: not whole clusters.
const LOST: u64 = (1 << 20) + 4096;

/// A qcow2 image of 4 MiB, all of it data, whose file lacks its end; and `whole`, which does not.
fn cut_off(dir: &Path) {
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "whole", "4M"]);
    qemu::io("qcow2", dir.join("whole"), &["write -P 7 0 4M"]);
    fs::copy(dir.join("whole"), dir.join("short")).unwrap();
    cut(&dir.join("short"), len(&dir.join("short")) - LOST);
}

#[test]
fn whatever_reads_a_cut_off_image_refuses_it() {
    let dir = TempDir::new();
    let dir = dir.root();
    cut_off(dir);
    // Of several copiers the one that comes first says where on the disk it was.
    let file = format!("the file ends at {:#x}", len(&dir.join("short")));
    let is_told = |line: &str| {
        for words in [
            "short: ",
            "guest offset 0x",
            &file,
            "cut off",
            "diskplane check",
            "--salvage",
        ] {
            assert!(line.contains(words), "{words}: {line}");
        }
    };
    for command in [
        &["convert", "short", "copy.raw"][..],
        &["convert", "-S", "0", "short", "copy.raw"],
        &["convert", "-c", "-O", "qcow2", "short", "copy.raw"],
        &["dd", "if=short", "of=copy.raw"],
        &["dd", "if=short", "of=copy.raw", "bs=1M", "skip=2"],
    ] {
        is_told(&refused(dir, command));
        assert!(!dir.join("copy.raw").exists(), "{command:?}");
    }
    for (command, code) in [
        (&["compare", "whole", "short"][..], 4),
        (&["compare", "short", "whole"], 4),
    ] {
        is_told(&failure(command, &diskplane(dir, command), code));
    }
    let line = refused(dir, &["measure", "-O", "qcow2", "short"]);
    assert!(line.contains("cut off"), "{line}");
    // What does not need what is lost goes on.
    good(dir, &["dd", "if=short", "of=front.raw", "bs=1M", "count=2"]);
    qemu_img(
        dir,
        &[
            "create", "-q", "-f", "qcow2", "-b", "short", "-F", "qcow2", "over",
        ],
    );
    is_told(&refused(
        dir,
        &["rebase", "-b", "whole", "-F", "qcow2", "over"],
    ));
    // The overlay is what is cut off: nothing of it is lost in its base.
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "base", "4M"]);
    good(dir, &["rebase", "-u", "-b", "base", "-F", "qcow2", "short"]);
    let before = fs::read(dir.join("short")).unwrap();
    changes_are_refused(dir, "short", &["commit", "short"]);
    let after = fs::read(dir.join("short")).unwrap();
    assert_eq!(before.len(), after.len());
    assert!(before[65536..] == after[65536..], "the overlay was changed");
}

/// Whatever would make the file longer, and so hide what is lost: `others` and what is done to any image.
fn changes_are_refused(dir: &Path, name: &str, others: &[&str]) {
    for command in [
        others,
        &["snapshot", "-c", "one", name],
        &["bitmap", "--add", name, "bits"],
        &["resize", name, "+1M"],
        &["amend", "-o", "lazy_refcounts=on", name],
    ] {
        let before = fs::read(dir.join(name)).unwrap();
        let line = refused(dir, command);
        for words in [name, "cut off", "diskplane check", "convert --salvage"] {
            assert!(line.contains(words), "{command:?}: {words}: {line}");
        }
        assert!(fs::read(dir.join(name)).unwrap() == before, "{command:?}");
    }
    let check = diskplane(dir, &["check", "--json", name]);
    assert_eq!(check.status.code(), Some(2), "{check:?}");
    let report = json(&String::from_utf8(check.stdout).unwrap());
    assert!(report["cut-off"].as_u64() > Some(0), "{report}");
}

/// The rest of a table is not empty because the file ends before.
#[test]
fn a_table_that_is_not_whole_is_refused() {
    const LEFT: u64 = 4096;
    let dir = TempDir::new();
    let dir = dir.root();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "a", "1G"]);
    // The last entries of the first table, which comes before the data.
    qemu::io("qcow2", dir.join("a"), &["write -P 7 511M 1M"]);
    let bytes = fs::read(dir.join("a")).unwrap();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let table = word(word(40) as usize) & 0x00ff_ffff_ffff_fe00;
    cut(&dir.join("a"), table + LEFT);
    let line = refused(dir, &["convert", "a", "copy.raw"]);
    assert!(
        line.contains(&format!("at {table:#x}, of which the file has {LEFT}"))
            && line.contains("cut off"),
        "{line}"
    );
    let report = json(&good(
        dir,
        &["convert", "--salvage", "--json", "a", "copy.raw"],
    ));
    // What the part that is there says nothing of.
    assert!(
        report["unreadable-bytes"].as_u64() >= Some(1 << 20),
        "{report}"
    );
    changes_are_refused(dir, "a", &["snapshot", "-c", "two", "a"]);
    // A guest must not write to it, either.
    let line = refused(dir, &["serve", "a", "--nbd", "unix:sock"]);
    assert!(line.contains("cut off"), "{line}");
}

#[test]
fn as_qemu_img_it_reads_zeros() {
    let (theirs, ours) = (TempDir::new(), TempDir::new());
    for dir in [theirs.root(), ours.root()] {
        cut_off(dir);
    }
    let lines = [
        "qemu-img convert -O raw short copy",
        "qemu-img compare short whole",
        "qemu-img compare -f qcow2 -F raw short copy",
        "qemu-img convert --salvage -O raw short salvaged",
        "qemu-img compare -f raw -F raw copy salvaged",
        "qemu-img measure -O qcow2 short",
        "qemu-img map --output=json short",
        "qemu-img dd if=short of=part bs=1M skip=3",
    ];
    same_in(theirs.root(), ours.root(), &lines);
    for name in ["copy", "part"] {
        let [theirs, ours] = [&theirs, &ours].map(|dir| fs::read(dir.path(name)).unwrap());
        assert!(theirs == ours, "{name}");
    }
}

#[test]
fn tables_that_are_missing_are_not_empty_ones() {
    let dir = TempDir::new();
    let dir = dir.root();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "a", "1M"]);
    qemu::io("qcow2", dir.join("a"), &["write -P 7 0 64k"]);
    let mut bytes = fs::read(dir.join("a")).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let behind = (len(&dir.join("a")) + 65536).next_multiple_of(65536);
    bytes[l1..l1 + 8].copy_from_slice(&(1 << 63 | behind).to_be_bytes());
    fs::write(dir.join("a"), bytes).unwrap();
    let line = refused(dir, &["convert", "a", "copy.raw"]);
    assert!(
        line.contains(&format!(
            "a table of the image are at {behind:#x}, of which the file has 0"
        )),
        "{line}"
    );
    assert!(!dir.join("copy.raw").exists());
    let report = good(dir, &["convert", "--salvage", "--json", "a", "copy.raw"]);
    assert_eq!(json(&report)["unreadable-bytes"], 1 << 20, "{report}");
}

#[test]
fn a_packed_cluster_that_is_missing_is_told() {
    let dir = TempDir::new();
    let dir = dir.root();
    let text: Vec<u8> = (0..1 << 20).map(|n: u64| ((n * n) >> 7) as u8).collect();
    fs::write(dir.join("a.raw"), text).unwrap();
    // There clusters come last.
    let convert = [
        "convert", "-f", "raw", "-c", "-O", "qcow2", "a.raw", "a.qcow2",
    ];
    qemu_img(dir, &convert);
    cut(&dir.join("a.qcow2"), len(&dir.join("a.qcow2")) - 65536);
    let line = refused(dir, &["convert", "a.qcow2", "b.raw"]);
    assert!(
        line.contains("compressed cluster at") && line.contains("cut off"),
        "{line}"
    );
}

/// What of each format QEMU makes, cut off within its data: a copy is refused, and with --salvage what is there is copied.
#[test]
fn no_format_gives_zeros_for_what_is_lost() {
    for (format, options, file) in [
        ("qcow2", "", "a"),
        ("qcow2", "extended_l2=on", "a"),
        ("qcow2", "data_file=data", "data"),
        ("qcow2", "data_file=data,data_file_raw=on", "data"),
        ("qcow", "", "a"),
        ("qed", "", "a"),
        ("vpc", "", "a"),
        ("vhdx", "", "a"),
        ("vdi", "", "a"),
        ("vmdk", "", "a"),
        ("vmdk", "subformat=monolithicFlat", "a-flat.vmdk"),
        ("parallels", "", "a"),
    ] {
        let case = format!("{format} {options}");
        let dir = TempDir::new();
        let dir = dir.root();
        let name = if file == "a-flat.vmdk" { "a.vmdk" } else { "a" };
        // QEMU takes a relative name from where it runs.
        let options = options.replace("=data", &format!("={}", dir.join("data").display()));
        let mut create = vec!["create", "-q", "-f", format];
        if !options.is_empty() {
            create.extend(["-o", &options]);
        }
        create.extend([name, "8M"]);
        qemu_img(dir, &create);
        qemu::io(format, dir.join(name), &["write -P 7 0 8M"]);
        // A footer, and a reserve behind the data, go with it.
        let short = len(&dir.join(file)).min(9 << 20) - (3 << 20);
        cut(&dir.join(file), short);
        let args = ["convert", "-f", format, "-O", "raw", name, "copy.raw"];
        let line = refused(dir, &args);
        assert!(line.contains(file), "{case}: {line}");
        assert!(!dir.join("copy.raw").exists(), "{case}");
        if matches!(format, "vhdx" | "vpc") || file == "a-flat.vmdk" {
            // Which is not opened at all.
            continue;
        }
        let args = [
            "convert",
            "--salvage",
            "--json",
            "-f",
            format,
            "-O",
            "raw",
            name,
            "copy.raw",
        ];
        let report = json(&good(dir, &args));
        let lost = report["unreadable-bytes"].as_u64().unwrap();
        let disk = fs::read(dir.join("copy.raw")).unwrap();
        let there = disk.iter().filter(|byte| **byte == 7).count() as u64;
        assert!(lost >= 1 << 20, "{case}: {report}");
        assert_eq!(
            there + lost,
            report["virtual-size"].as_u64().unwrap(),
            "{case}"
        );
    }
}

/// The last cluster of a file need not be whole where the disk ends within it.
#[test]
fn files_that_end_with_their_disk_are_whole() {
    for options in [
        "preallocation=off",
        "preallocation=metadata",
        "preallocation=falloc",
        "data_file=data",
        "data_file=data,data_file_raw=on",
        "extended_l2=on",
    ] {
        let dir = TempDir::new();
        let dir = dir.root();
        let options = options.replace("=data", &format!("={}", dir.join("data").display()));
        let size = ((1 << 20) + 512).to_string();
        let create = ["create", "-q", "-f", "qcow2", "-o", &options, "a", &size];
        qemu_img(dir, &create);
        let convert = |to| good(dir, &["convert", "-O", "raw", "a", to]);
        convert("empty");
        qemu::io("qcow2", dir.join("a"), &["write -P 7 1M 512"]);
        convert("last");
        qemu::io("qcow2", dir.join("a"), &["write -P 7 0 1049088"]);
        convert("full");
        for name in ["empty", "last", "full"] {
            assert_eq!(len(&dir.join(name)), (1 << 20) + 512, "{options} {name}");
        }
        for command in [&["check", "a"][..], &["snapshot", "-c", "one", "a"]] {
            // Which images with an external data file cannot have.
            if !(options.starts_with("data_file") && command[0] == "snapshot") {
                good(dir, command);
            }
        }
        qemu::compare("qcow2", dir.join("a"), "raw", dir.join("full"));
    }
    // The last cluster of the file has no data in its last subclusters.
    let dir = TempDir::new();
    let dir = dir.root();
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "extended_l2=on",
        "a",
        "2M",
    ];
    qemu_img(dir, &create);
    qemu::io("qcow2", dir.join("a"), &["write -P 7 1900k 64k"]);
    assert_ne!(len(&dir.join("a")) % 65536, 0);
    for command in [
        &["convert", "a", "b.raw"][..],
        &["check", "a"],
        &["snapshot", "-c", "one", "a"],
    ] {
        good(dir, command);
    }
    // A raw disk ends within a sector.
    let dir = TempDir::new();
    let dir = dir.root();
    fs::write(dir.join("odd.raw"), [7; 1000]).unwrap();
    good(dir, &["convert", "-f", "raw", "odd.raw", "odd.qcow2"]);
    good(
        dir,
        &[
            "convert", "-f", "raw", "-S", "0", "-O", "raw", "odd.raw", "copy.raw",
        ],
    );
    let mut want = [7; 1024];
    want[1000..].fill(0);
    assert_eq!(fs::read(dir.join("copy.raw")).unwrap(), want);
}

/// Data in another file are looked for there.
#[test]
fn an_external_data_file_that_is_cut_off_is_told_and_left_alone() {
    let dir = TempDir::new();
    let dir = dir.root();
    // QEMU looks for a relative name where it runs.
    let option = format!("data_file={}", dir.join("data").display());
    let create = ["create", "-q", "-f", "qcow2", "-o", &option, "a", "4100K"];
    qemu_img(dir, &create);
    qemu::io(
        "qcow2",
        dir.join("a"),
        &["write -P 7 1M 1M", "write -P 8 4M 4K"],
    );
    let overlay = [
        "create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "over",
    ];
    qemu_img(dir, &overlay);
    good(dir, &["check", "a"]);
    let whole = fs::read(dir.join("data")).unwrap();
    // The last cluster, of which the disk has 4 KiB.
    cut(&dir.join("data"), (4 << 20) + 2048);
    let seen = |name| fs::read(dir.join(name)).unwrap();
    let (image, data) = (seen("a"), seen("data"));
    for command in [
        &["resize", "a", "8M"][..],
        &["commit", "over"],
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "null:4100K",
            "a",
        ],
        &["rebase", "-b", "", "a"],
    ] {
        let line = refused(dir, command);
        for words in [
            "data: ",
            "cut off",
            "0x400000 of the data file, which ends at 0x400800",
        ] {
            assert!(line.contains(words), "{command:?}: {words}: {line}");
        }
        assert!(seen("a") == image && seen("data") == data, "{command:?}");
    }
    let check = |code| {
        let args = ["check", "--json", "a"];
        let output = diskplane(dir, &args);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let report = json(&String::from_utf8(output.stdout).unwrap());
        (
            report["cut-off"].as_u64(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    assert_eq!(check(2).0, Some(1));
    // Whole clusters of it are gone, and the half of one.
    cut(&dir.join("data"), (1 << 20) + 65536 / 2);
    assert_eq!(check(2).0, Some(17));
    // Its tables are sound: nothing is repaired, and it is still cut off.
    let repaired = diskplane(dir, &["check", "--repair", "all", "a"]);
    assert_eq!(repaired.status.code(), Some(2), "{repaired:?}");
    assert!(seen("a") == image);
    fs::rename(dir.join("data"), dir.join("elsewhere")).unwrap();
    let (cut_off, told) = check(0);
    assert_eq!(cut_off, None);
    assert!(
        told.contains("whether its data file is whole is not known"),
        "{told}"
    );
    let args = ["check", "--data-file", "elsewhere", "a"];
    failure(&args, &diskplane(dir, &args), 2);
    fs::write(dir.join("data"), &whole).unwrap();
    for command in [
        &["check", "a"][..],
        &["resize", "a", "8M"],
        &["commit", "over"],
    ] {
        good(dir, command);
    }
}
