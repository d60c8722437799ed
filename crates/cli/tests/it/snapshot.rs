//! `diskplane snapshot`, beside `qemu-img snapshot` on the same image.

use crate::common;

use common::{diskplane, good, json, qemu_img};
use testkit::{TempDir, qemu};

#[test]
fn snapshots_are_those_of_qemu_img() {
    let dir = TempDir::new();
    let image = dir.path("i");
    qemu::create("qcow2", &image, "8M");
    let dir = dir.root();
    let ours = |args: &[&str]| good(dir, &[&["snapshot"], args].concat());
    let theirs = |args: &[&str]| qemu_img(dir, args);

    assert_eq!(ours(&["i"]), "");
    assert_eq!(ours(&["-l", "--json", "i"]), "[]\n");
    qemu::io("qcow2", &image, &["write -P 1 1M 64k"]);
    assert_eq!(
        ours(&["-c", "first", "i"]),
        "created snapshot first (id 1)\n"
    );
    qemu::io("qcow2", &image, &["write -P 2 1M 64k"]);
    theirs(&["snapshot", "-c", "second", "i"]);
    let made = json(&ours(&["--create", "third", "--json", "i"]));
    assert_eq!(
        (made["id"].as_str(), made["name"].as_str()),
        (Some("3"), Some("third"))
    );
    assert!(made["date-sec"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(made["disk-size"], 8 << 20);

    // What both say of each snapshot is the same.
    let listed = json(&ours(&["-l", "--json", "i"]));
    let info = json(&theirs(&["info", "--output=json", "i"]));
    let snapshots = info["snapshots"].as_array().unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 3);
    for (nth, theirs) in snapshots.iter().enumerate() {
        for (field, value) in theirs.as_object().unwrap() {
            assert_eq!(&listed[nth][field], value, "{nth}: {field}");
        }
    }
    let shown = json(&good(dir, &["info", "--json", "i"]));
    assert_eq!(shown["snapshots"], listed);
    let table = ours(&["-U", "i"]);
    let columns: Vec<&str> = table.lines().nth(3).unwrap().split_whitespace().collect();
    assert_eq!(columns[..4], ["3", "third", "0", "B"]);
    assert!(good(dir, &["info", "i"]).ends_with(&format!("snapshots\n{table}")));

    // A snapshot is read as it was, and never written to.
    let map = |args: &[&str]| good(dir, &[&["map", "--json"], args].concat());
    qemu::io("qcow2", &image, &["write -P 3 2M 64k"]);
    let then = map(&["--snapshot", "first", "i"]);
    assert!(map(&["i"]) != then && then == map(&["--snapshot", "1", "i"]));
    let info = ["info", "--json", "--snapshot", "3", "i"];
    let info = json(&good(dir, &info));
    assert_eq!(info["read-only-because"], "it is a snapshot");
    let gone = diskplane(dir, &["map", "--snapshot", "gone", "i"]);
    let said = String::from_utf8(gone.stderr).unwrap();
    assert!(said.contains("it has first, second, third"), "{said}");

    assert_eq!(
        ours(&["-a", "first", "i"]),
        "applied snapshot first (id 1)\n"
    );
    qemu::io("qcow2", &image, &["read -P 1 1M 64k"]);
    theirs(&["snapshot", "-a", "third", "i"]);
    qemu::io("qcow2", &image, &["read -P 2 1M 64k"]);
    assert_eq!(ours(&["-d", "2", "i"]), "deleted snapshot second (id 2)\n");
    theirs(&["snapshot", "-d", "first", "i"]);
    let deleted = json(&ours(&["--delete", "third", "--json", "i"]));
    assert_eq!(deleted["id"], "3");
    qemu::check("qcow2", &image);
    qemu::io("qcow2", &image, &["read -P 2 1M 64k"]);
}

#[test]
fn what_is_wrong_is_said() {
    let dir = TempDir::new();
    qemu::create("qcow2", dir.path("i"), "8M");
    qemu::create("raw", dir.path("r"), "8M");
    let bad = |args: &[&str], code: i32| {
        let output = diskplane(dir.root(), &[&["snapshot"], args].concat());
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        assert!(output.stdout.is_empty());
        String::from_utf8(output.stderr).unwrap()
    };
    let said = bad(&["-a", "gone", "i"], 1);
    assert_eq!(
        said,
        "diskplane: i: there is no snapshot 'gone': it has none\n"
    );
    assert!(bad(&["-c", "n", "r"], 1).contains("a raw image has no internal snapshots"));
    bad(&["-c", "n", "-d", "m", "i"], 1);
    bad(&["-U", "-c", "n", "i"], 1);
    qemu::check("qcow2", dir.path("i"));
}
