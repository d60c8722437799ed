//! Accesses that fail on purpose (`blkdebug`), beside the installed qemu-img.

use crate::beside::{same, same_in};
use crate::common::{diskplane, good, json, refused};
use std::fs;

/// A qcow2 image over another, and rules for their files.
fn same_with(rules: &[(&str, &str)], lines: &[&str]) {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in [theirs.path(), ours.path()] {
        for (name, text) in rules {
            fs::write(dir.join(name), text).unwrap();
        }
    }
    let setup = [
        "qemu-img create -q -f qcow2 base 1M",
        "qemu-img create -q -f qcow2 -b base -F qcow2 over",
        "qemu-io -c write_-P_7_64k_64k over",
        "qemu-img create -q -f raw flat 1M",
        "qemu-io -f raw -c write_-P_7_0_64k flat",
        "qemu-img create -q -f raw other 1M",
    ];
    let all: Vec<&str> = setup.iter().chain(lines).copied().collect();
    same_in(theirs.path(), ours.path(), &all);
}

#[test]
fn what_fails_is_told_as_by_qemu_img() {
    let read = "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\nonce =\"off\"\n";
    let any = "# all\n[inject-error]\nevent = \"none\"\niotype = \"read\"\n";
    same_with(
        &[
            ("read", read),
            ("any", any),
            ("broken", "[inject-error]\nevent=none\n"),
        ],
        &[
            "qemu-img compare blkdebug:read:over base",
            "qemu-img compare blkdebug::over over",
            "qemu-img compare -f raw blkdebug:any:flat other",
            "qemu-img compare --image-opts driver=qcow2,file.driver=blkdebug,file.config=read,file.image.filename=over \
             driver=qcow2,file.filename=base",
            // The state that rules are for.
            "qemu-img compare --image-opts driver=raw,file.driver=blkdebug,file.image.filename=flat,\
             file.set-state.0.event=none,file.set-state.0.new_state=2,file.inject-error.0.event=read_aio,\
             file.inject-error.0.state=1,file.inject-error.0.errno=28 driver=raw,file.filename=other",
            "qemu-img compare --image-opts driver=raw,file.driver=blkdebug,file.image.filename=flat,\
             file.set-state.0.event=none,file.set-state.0.new_state=2,file.inject-error.0.event=read_aio,\
             file.inject-error.0.state=2,file.inject-error.0.errno=28 driver=raw,file.filename=other",
            // Over the format: the guest's accesses.
            "qemu-img compare --image-opts driver=blkdebug,image.driver=qcow2,image.file.filename=over,\
             inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.sector=128 driver=qcow2,file.filename=base",
            "qemu-img map --image-opts driver=blkdebug,align=4k,image.driver=qcow2,image.file.driver=file,\
             image.file.filename=over",
            "qemu-img info blkdebug:nosuch:over",
            "qemu-img info blkdebug:over",
            "qemu-img info blkdebug::nosuch",
            "qemu-img map --image-opts driver=blkdebug,align=3k,image.driver=raw,image.file.filename=flat",
            "qemu-img map --image-opts driver=blkdebug,align=4k,max-transfer=512,image.driver=raw,image.file.filename=flat",
            "qemu-img map --image-opts driver=blkdebug,image.driver=raw,image.file.filename=flat,inject-error.0.errno=5",
        ],
    );
}

/// What a disk is made of cannot be found out (QEMU's test 251).
#[test]
fn a_map_that_fails_is_told_as_by_qemu_img() {
    let above = "json:{'driver':'blkdebug','image':{'driver':'qcow2','file':{'driver':'file','filename':'over'}},\
                 'inject-error':[{'event':'none','iotype':'block-status','sector':129},\
                 {'event':'none','iotype':'block-status','sector':300},\
                 {'event':'none','iotype':'read','sector':129},{'event':'none','iotype':'read','sector':200},\
                 {'event':'none','iotype':'read','sector':201}]}";
    let below = "json:{'driver':'raw','file':{'driver':'blkdebug','image':{'driver':'file','filename':'flat'},\
                 'inject-error':[{'event':'none','iotype':'block-status'}]}}";
    let lines: Vec<String> = [above, below]
        .iter()
        .flat_map(|image| {
            [
                format!("qemu-img convert {image} -O raw copy"),
                format!("qemu-img map {image}"),
                format!("qemu-img measure -O raw {image}"),
                format!("qemu-img measure -O qcow2 {image}"),
                format!("qemu-img compare {image} base"),
                format!("qemu-img compare base {image}"),
            ]
        })
        .chain([
            format!("qemu-img convert -m 1 --salvage {above} -O raw saved"),
            format!("qemu-img convert -q --salvage {above} -O raw quiet"),
            "qemu-img compare -f raw -F raw saved quiet".to_owned(),
            "qemu-img compare -F raw over saved".to_owned(),
        ])
        .collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    same_with(&[], &lines);
}

#[test]
fn our_own_convert_tells_of_it_too() {
    let dir = testkit::TempDir::new();
    let root = dir.root();
    fs::write(root.join("a.raw"), [7; 65536]).unwrap();
    let image = "driver=blkdebug,image.driver=raw,image.file.filename=a.raw,inject-error.0.event=none,\
                 inject-error.0.iotype=block-status,inject-error.0.sector=3";
    let convert = ["convert", "--image-opts", image, "b.qcow2"];
    let error = refused(root, &convert);
    assert!(
        error.contains("it cannot be found out what the disk has at byte 0"),
        "{error}"
    );
    let convert = [
        "convert",
        "--salvage",
        "--json",
        "--image-opts",
        image,
        "b.qcow2",
    ];
    let report = json(&good(root, &convert));
    assert_eq!(report["unreadable-bytes"], 0, "{report}");
    assert_eq!(report["unmapped"][0]["offset"], 3 * 512, "{report}");
    assert_eq!(report["unmapped"].as_array().unwrap().len(), 1, "{report}");
    good(root, &["compare", "-f", "raw", "a.raw", "b.qcow2"]);
}

#[test]
fn a_commit_that_fails_loses_nothing() {
    same(&[
        "qemu-img create -q -f qcow2 base 1M",
        "qemu-img create -q -F qcow2 -b \
         json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"blkdebug\",\"inject-error\":[{\"event\":\"write_aio\",\
         \"errno\":28,\"once\":true}],\"image\":{\"driver\":\"file\",\"filename\":\"base\"}}} -f qcow2 over",
        "qemu-io -c write_-P_7_64k_64k over",
        "qemu-img commit over",
        "qemu-io -c read_-P_7_64k_64k over",
        "qemu-img check base",
        "qemu-img check over",
    ]);
}

#[test]
fn our_own_commands_take_them_and_name_what_there_is() {
    let dir = testkit::TempDir::new();
    let root = dir.root();
    good(root, &["create", "-f", "qcow2", "a.qcow2", "1M"]);
    let with = |rule: &str| {
        format!("driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2,{rule}")
    };
    let fails = with("file.inject-error.0.event=none,file.inject-error.0.errno=5");
    for command in ["check", "map"] {
        let error = refused(root, &[command, "--image-opts", &fails]);
        assert!(error.contains("Input/output error"), "{command}: {error}");
    }
    let unknown = with("file.inject-error.0.event=l1_update");
    let error = refused(root, &["map", "--image-opts", &unknown]);
    assert!(
        error.contains("event 'l1_update'") && error.contains("read_aio, "),
        "{error}"
    );
    // Requests through queues meet the faults of the file; over its format there are none for them.
    let args = |spec| ["bench", "image", "-c", "1", "--image-opts", spec];
    let output = diskplane(root, &args(&fails));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && text.contains("Input/output error"),
        "{text}"
    );
    let above = "driver=blkdebug,image.driver=qcow2,image.file.filename=a.qcow2";
    let error = refused(root, &args(above));
    assert!(
        error.contains("blkdebug over the image's format"),
        "{error}"
    );
}
