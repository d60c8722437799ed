//! `diskplane qemu-img` beside the installed qemu-img: the same command lines in two directories, and the same exit
//! codes, output and errors, byte for byte. What is left out of the comparison is what cannot be the same: space on the
//! host, the length of an image's own file, dates and random numbers.

use crate::beside;

use beside::{outcome, same};
use std::process::Command;

#[test]
fn images_are_made_and_shown_as_by_qemu_img() {
    same(&[
        "qemu-img create -f raw a.raw 10M",
        "qemu-img create -f qcow2 a.qcow2 10M",
        "qemu-img create -f qed a.qed 10M",
        "qemu-img create -f vpc a.vpc 10M",
        "qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2",
        "qemu-img create -f qcow2 -o compat=0.10 v2.qcow2 1M",
        "qemu-img create -f qcow2 -o data_file=DIR/d.raw,data_file_raw=on d.qcow2 1M",
        "qemu-img info a.raw",
        "qemu-img info --output=json a.raw",
        "qemu-img info a.qcow2",
        "qemu-img info --out json a.qcow2",
        "qemu-img info a.qed",
        "qemu-img info -f vpc a.vpc",
        "qemu-img info v2.qcow2",
        "qemu-img info d.qcow2",
        "qemu-img info --backing-chain b.qcow2",
        "qemu-img info --output=json --backing-chain b.qcow2",
        "qemu-img bitmap --add a.qcow2 bm",
        "qemu-img info --output=json a.qcow2",
        "qemu-img snapshot -c one b.qcow2",
        "qemu-img snapshot -l b.qcow2",
        "qemu-img info --output=json b.qcow2",
        "qemu-img create -f qcow2 -o help x",
        "qemu-img create -f raw -o help",
        "qemu-img amend -f qcow2 -o help",
    ]);
}

#[test]
fn what_is_wrong_is_said_as_by_qemu_img() {
    same(&[
        "qemu-img",
        "qemu-img foo",
        "qemu-img create",
        "qemu-img create -Z x",
        "qemu-img create -f",
        "qemu-img create -f foo x 1M",
        "qemu-img create -f qcow2 x",
        "qemu-img create -f qcow2 x 1b0",
        "qemu-img create -f raw x 9E",
        "qemu-img create -f raw x 1M 2M",
        "qemu-img create -f raw /nowhere/x 1M",
        "qemu-img create -f qcow2 -o foo=1 x 1M",
        "qemu-img create -f qcow2 -o cluster_size=3 x 1M",
        "qemu-img create -f qcow2 -o cluster_size=a x 1M",
        "qemu-img create -f qcow2 -o refcount_bits=7 x 1M",
        "qemu-img create -f qcow2 -o compat=0.10,lazy_refcounts=on x 1M",
        "qemu-img create -f qcow2 -b nix -F raw x",
        "qemu-img create -f qcow2 -b a.raw x",
        "qemu-img create -q -f raw a.raw 1M",
        "qemu-img create -f qcow2 -b a.raw x",
        "qemu-img create -f raw -b a.raw x",
        "qemu-img info nix",
        "qemu-img info -f qcow2 a.raw",
        "qemu-img info a.raw b.raw",
        "qemu-img check a.raw",
        "qemu-img check -r foo a.raw",
        "qemu-img check --output foo a.raw",
        "qemu-img convert a.raw",
        "qemu-img convert -S 1 a.raw x",
        "qemu-img convert -m 17 a.raw x",
        "qemu-img convert -O foo a.raw x",
        "qemu-img convert -c -O raw a.raw x",
        "qemu-img convert --target-is-zero a.raw x",
        "qemu-img compare a.raw",
        "qemu-img compare a.raw nix",
        "qemu-img commit -f raw a.raw",
        "qemu-img rebase a.raw",
        "qemu-img snapshot -l -c x a.raw",
        "qemu-img resize a.raw",
        "qemu-img resize -f raw a.raw -512k",
        "qemu-img resize -f raw --preallocation=foo a.raw 2M",
        "qemu-img bitmap a.raw b",
        "qemu-img measure",
        "qemu-img measure a.raw --size 1M",
        "qemu-img amend a.raw",
        "qemu-img dd if=a.raw",
        "qemu-img dd if=a.raw of=x foo=1",
    ]);
}

#[test]
fn disks_are_changed_and_compared_as_by_qemu_img() {
    same(&[
        "qemu-img create -q -f raw a.raw 10M",
        "qemu-io -f raw -c write_-P_1_1M_64k a.raw",
        "qemu-img convert -O qcow2 a.raw a.qcow2",
        "qemu-img compare a.raw a.qcow2",
        "qemu-img compare -s a.raw a.qcow2",
        "qemu-img check a.qcow2",
        "qemu-img map a.qcow2",
        "qemu-img map --output=json a.qcow2",
        "qemu-img measure -O qcow2 a.qcow2",
        "qemu-img measure --output=json -O qcow2 --size 1G",
        "qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2",
        "qemu-io -c write_-P_2_0_64k b.qcow2",
        "qemu-img map --output=json b.qcow2",
        "qemu-img map b.qcow2",
        "qemu-img compare a.qcow2 b.qcow2",
        "qemu-img compare -q a.qcow2 b.qcow2",
        "qemu-img rebase -b a.raw -F raw b.qcow2",
        "qemu-img rebase -u -b a.qcow2 -F qcow2 b.qcow2",
        // What an image on nothing reads as zeros stays so on a base with data.
        "qemu-img create -q -f qcow2 alone.qcow2 10M",
        "qemu-img create -q -f raw zeros.raw 10M",
        "qemu-img rebase -b a.raw -F raw alone.qcow2",
        "qemu-img compare zeros.raw alone.qcow2",
        "qemu-img commit b.qcow2",
        "qemu-img map --output=json b.qcow2",
        "qemu-img resize a.qcow2 +1M",
        "qemu-img resize --shrink a.qcow2 -2M",
        "qemu-img resize -q -f raw a.raw 12M",
        "qemu-img compare a.raw a.qcow2",
        "qemu-img convert -O qcow2 -B a.qcow2 -F qcow2 b.qcow2 c.qcow2",
        "qemu-img map --output=json c.qcow2",
        // What there is already knows its base's format.
        "qemu-img convert -O qcow2 -B a.qcow2 b.qcow2 d.qcow2",
        "qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 d.qcow2",
        "qemu-io -c write_-P_3_2M_64k b.qcow2",
        "qemu-img convert -n -f qcow2 -O qcow2 -B a.qcow2 b.qcow2 d.qcow2",
        "qemu-img map --output=json d.qcow2",
        "qemu-img compare b.qcow2 d.qcow2",
        "qemu-img dd bs=1M count=2 skip=1 if=a.raw of=part",
        "qemu-img info part",
        "qemu-img compare part a.raw",
        "qemu-img compare --image-opts driver=raw,file.filename=a.raw,offset=1M,size=1M driver=raw,file.filename=part",
        "qemu-img info --image-opts driver=qcow2,file.driver=file,file.filename=b.qcow2",
        "qemu-img info json:{'driver':'raw','file':{'driver':'file','filename':'part'}}",
        "qemu-img info --image-opts driver=raw,file.filename=part,foo=1",
        "qemu-img bench -q -c 100 -f raw part",
        "qemu-img bench -q -w -c 20 -d 4 -s 64k --flush-interval 4 --pattern 9 -f raw part",
        "qemu-img compare part a.raw",
        "qemu-img amend -o lazy_refcounts=on a.qcow2",
        "qemu-img info a.qcow2",
        "qemu-img convert -c -O qcow2 a.raw z.qcow2",
        "qemu-img compare z.qcow2 a.raw",
    ]);
}

#[test]
fn a_part_of_a_file_is_committed_into_where_it_is() {
    let base = "{'driver':'raw','offset':1048576,'size':1048576,'file':{'driver':'file','filename':'s.img'}}";
    let recorded = format!("qemu-img create -q -f qcow2 -b json:{base} -F raw q.qcow2 1M");
    let large = format!("qemu-img create -q -f qcow2 -b json:{base} -F raw l.qcow2 2M");
    let said = "driver=qcow2,file.filename=o.qcow2,backing.driver=raw,backing.offset=1M,backing.size=1M,\
                backing.file.filename=s.img";
    let commit = format!("qemu-img commit --image-opts {said}");
    same(&[
        "qemu-img create -q -f raw s.img 8M",
        "qemu-io -f raw -c write_-P_1_0_8M s.img",
        &recorded,
        "qemu-io -f qcow2 -c write_-P_5_0_64k q.qcow2",
        "qemu-img commit q.qcow2",
        "qemu-io -f raw -c read_-P_1_0_1M -c read_-P_5_1M_64k -c read_-P_1_1114112_7274496 s.img",
        "qemu-img create -q -f qcow2 o.qcow2 1M",
        "qemu-io -f qcow2 -c write_-P_6_64k_64k o.qcow2",
        &commit,
        "qemu-io -f raw -c read_-P_1_0_1M -c read_-P_6_1M_1M s.img",
        "qemu-io -f raw -c read_-P_0_1M_64k -c read_-P_6_1114112_64k -c read_-P_0_1179648_64k s.img",
    ]);
    // An overlay that is larger than the part.
    let dir = tempfile::tempdir().unwrap();
    let ours = [env!("CARGO_BIN_EXE_diskplane"), "qemu-img"];
    for line in [
        "qemu-img create -q -f raw s.img 8M",
        &large,
        "qemu-io -f qcow2 -c write_-P_5_1M_64k l.qcow2",
    ] {
        let text = outcome(&ours, dir.path(), line);
        assert!(text.contains("code Some(0)"), "{text}");
    }
    let text = outcome(&ours, dir.path(), "qemu-img commit l.qcow2");
    assert!(
        text.contains("a part of a file does not grow") && text.contains("code Some(1)"),
        "{text}"
    );
    let data = std::fs::read(dir.path().join("s.img")).unwrap();
    assert!(data.len() == 8 << 20 && data.iter().all(|byte| *byte == 0));
    let text = outcome(
        &ours,
        dir.path(),
        "qemu-io -f qcow2 -c read_-P_5_1M_64k l.qcow2",
    );
    assert!(!text.contains("Pattern"), "{text}");
}

/// A disk as it lies in an archive.
#[test]
fn images_in_a_part_of_a_file_are_read() {
    const INNER: &str = "json:{'file':{'driver':'raw','offset':1536,'size':393216,'file':{'driver':'file',\
                         'filename':'ova'}}}";
    same(&[
        "qemu-img create -q -f qcow2 a.qcow2 4M",
        "qemu-io -f qcow2 -c write_-P_3_64k_64k a.qcow2",
        "truncate -s 1M ova",
        "dd if=a.qcow2 of=ova bs=512 seek=3 count=768 conv=notrunc status=none",
        &format!("qemu-img info {INNER}"),
        &format!("qemu-img info --output=json {INNER}"),
        &format!("qemu-img map --output=json {INNER}"),
        &format!("qemu-img measure -O qcow2 {INNER}"),
        &format!("qemu-img convert -O raw {INNER} out.raw"),
        "qemu-img compare -f raw out.raw a.qcow2",
        &format!("qemu-img compare {INNER} a.qcow2"),
        "qemu-img measure -O raw json:{'file':{'driver':'raw','offset':512,'size':1024,'file':{'filename':'ova'}}}",
        "qemu-img convert -O raw --image-opts driver=qcow2,file.driver=raw,file.offset=1536,file.file.filename=ova o2.raw",
        "qemu-img compare -f raw -F raw out.raw o2.raw",
        "qemu-img measure -O raw --image-opts driver=qcow2,file.driver=raw,file.offset=512,file.file.filename=ova",
    ]);
}

#[test]
fn what_is_for_reading_only_is_not_written() {
    let mut lines = vec![
        "qemu-img create -q -f qcow2 a.qcow2 4M".to_owned(),
        "qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2".to_owned(),
        "qemu-img create -q -f raw s.img 4M".to_owned(),
    ];
    for read_only in ["read-only=on", "file.read-only=on"] {
        let name = format!("driver=qcow2,{read_only},file.filename=a.qcow2");
        let overlay = format!("driver=qcow2,{read_only},file.filename=o.qcow2");
        lines.extend([
            format!("qemu-img resize --image-opts {name} 16M"),
            format!("qemu-img convert -n -f raw s.img --target-image-opts {name}"),
            format!("qemu-img commit --image-opts {overlay}"),
            format!("qemu-img snapshot -c s --image-opts {name}"),
            format!("qemu-img bitmap --add --image-opts {name} b"),
            format!("qemu-img amend -o compat=1.1 --image-opts {name}"),
            format!("qemu-img rebase -u -b '' --image-opts {overlay}"),
            format!("qemu-img rebase -b s.img -F raw --image-opts {overlay}"),
            format!("qemu-img bench -w -c 1 --image-opts {name}"),
            format!("qemu-img check -r all --image-opts {name}"),
            format!("qemu-img check --image-opts {name}"),
        ]);
    }
    lines.extend(
        [
            "qemu-img resize json:{'driver':'qcow2','read-only':true,'file':{'driver':'file','filename':'a.qcow2'}} 16M",
            "qemu-img compare -f raw s.img json:{'driver':'qcow2','read-only':true,'file':{'driver':'file','filename':'a.qcow2'}}",
            "qemu-img resize --image-opts driver=qcow2,read-only=off,file.filename=a.qcow2 5M",
            "qemu-img resize --image-opts driver=qcow2,read-only=1,file.filename=a.qcow2 5M",
            "qemu-img check -U -r all a.qcow2",
            "qemu-img check -r all --image-opts driver=qcow2,force-share=on,file.filename=a.qcow2",
            "qemu-img info a.qcow2",
            // A name that is said for the image itself starts at the image.
            "mkdir sub",
            "qemu-img create -q -f qcow2 sub/o.qcow2 4M",
            "qemu-img create -q -f raw sub/b.raw 4M",
            "qemu-img rebase -b b.raw -F raw --image-opts driver=qcow2,file.filename=sub/o.qcow2",
            "qemu-img rebase -b b.raw -F raw json:{'driver':'qcow2','file':{'driver':'file','filename':'sub/o.qcow2'}}",
            "qemu-img info sub/o.qcow2",
        ]
        .map(str::to_owned),
    );
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    same(&lines);
}

#[test]
fn images_are_made_where_links_lead_and_never_in_their_data_files() {
    same(&[
        "ln -s new.img l",
        "qemu-img create -f raw l 1M",
        "qemu-img info new.img",
        "ln -s new.qcow2 m",
        "ln -s l3 l2",
        "ln -s new.raw l3",
        "qemu-img create -f qcow2 -o data_file=l2 m 1M",
        "qemu-img check new.qcow2",
        "qemu-img info new.raw",
        "ln -s c.qcow2 c",
        "qemu-img convert -c -f raw -O qcow2 new.img c",
        "qemu-img compare c.qcow2 new.img",
        "ln -s v.vmdk v",
        "qemu-img convert -f raw -O vmdk new.img v",
        "qemu-img compare v.vmdk new.img",
        "ln -s no/new.img n",
        "qemu-img create -f raw n 1M",
    ]);
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let ours = [env!("CARGO_BIN_EXE_diskplane"), "qemu-img"];
    let own = [env!("CARGO_BIN_EXE_diskplane")];
    std::fs::write(at.join("s.img"), vec![7; 1 << 20]).unwrap();
    std::fs::write(at.join("x.qcow2"), "precious").unwrap();
    std::fs::hard_link(at.join("x.qcow2"), at.join("hard")).unwrap();
    std::os::unix::fs::symlink("x.qcow2", at.join("soft")).unwrap();
    std::os::unix::fs::symlink("d.qcow2", at.join("none")).unwrap();
    std::fs::create_dir(at.join("sub")).unwrap();
    let known = std::fs::read_dir(at).unwrap().count();
    for (program, line) in [
        (
            &ours[..],
            "qemu-img create -f qcow2 -o data_file=d.qcow2 d.qcow2 4M",
        ),
        (
            &ours[..],
            "qemu-img create -f qcow2 -o data_file=none d.qcow2 4M",
        ),
        (
            &ours[..],
            "qemu-img create -f qcow2 -o data_file=d.qcow2 none 4M",
        ),
        (
            &ours[..],
            "qemu-img create -f qcow2 -o data_file=DIR/sub/../d.qcow2 d.qcow2 4M",
        ),
        (
            &ours[..],
            "qemu-img create -f qcow2 -o data_file=soft x.qcow2 4M",
        ),
        (
            &ours[..],
            "qemu-img create -f qcow2 -o data_file=x.qcow2 hard 4M",
        ),
        (
            &ours[..],
            "qemu-img convert -f raw -O qcow2 -o data_file=x.qcow2 s.img x.qcow2",
        ),
        (
            &ours[..],
            "qemu-img convert -c -f raw -O qcow2 -o data_file=x.qcow2 s.img x.qcow2",
        ),
        (
            &own[..],
            "qemu-img create -f qcow2 -o data_file=d.qcow2 d.qcow2 4M",
        ),
        (
            &own[..],
            "qemu-img convert -f raw -O qcow2 -o data_file=DIR/d.qcow2 s.img d.qcow2",
        ),
    ] {
        let text = outcome(program, at, line);
        assert!(text.contains("code Some(1)"), "{line}: {text}");
        assert!(
            line.contains("-c ") || text.contains("is the image itself"),
            "{line}: {text}"
        );
        assert_eq!(
            std::fs::read(at.join("x.qcow2")).unwrap(),
            b"precious",
            "{line}"
        );
        assert_eq!(std::fs::read_dir(at).unwrap().count(), known, "{line}");
    }
}

#[test]
fn who_is_locked_out_hears_of_the_lock_that_qemu_names() {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let program = [env!("CARGO_BIN_EXE_diskplane"), "qemu-img"];
    let mut held = Vec::new();
    for dir in [&theirs, &ours] {
        for line in [
            "qemu-img create -q -f qcow2 a.qcow2 1M",
            "qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2",
            "qemu-img create -q -f raw a.raw 1M",
            "qemu-img create -q -f qcow2 -b a.raw -F raw r.qcow2",
        ] {
            outcome(&["qemu-img"], dir.path(), line);
        }
        let options = io::OpenOptions {
            lock: io::Lock::Write,
            ..io::OpenOptions::default()
        };
        for name in ["a.qcow2", "a.raw"] {
            held.push(io::File::open(&dir.path().join(name), &options).unwrap());
        }
    }
    // A raw image is read while others write it, but not copied.
    for line in [
        "qemu-img info -f raw a.raw",
        "qemu-img map --output=json a.raw",
        "qemu-img compare a.raw r.qcow2",
        "qemu-img convert -O raw a.raw b.raw",
        "qemu-img info --backing-chain r.qcow2",
    ] {
        let want = outcome(&["qemu-img"], theirs.path(), line);
        let found = outcome(&program, ours.path(), line).replace("[DIR/", "[");
        assert_eq!(found, want, "{line}");
    }
    for line in [
        "qemu-img info a.qcow2",
        "qemu-img check a.qcow2",
        "qemu-img map o.qcow2",
        "qemu-img resize a.qcow2 2M",
        "qemu-img check -r all a.qcow2",
        "qemu-img commit o.qcow2",
    ] {
        let want = outcome(&["qemu-img"], theirs.path(), line);
        assert!(want.contains("Failed to get"), "{line}: {want}");
        // A backing file is opened under the name that is resolved.
        let found = outcome(&program, ours.path(), line).replace("[DIR/", "[");
        assert_eq!(found, want, "{line}");
    }
}

#[test]
fn encrypted_targets_are_written_with_the_key_they_were_made_with() {
    let secret = "--object secret,id=s,data=abc";
    let inner = "-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let opened = "driver=qcow2,encrypt.key-secret=s,file.filename=a.qcow2";
    let volume = "driver=luks,key-secret=s,file.filename=a.luks";
    let plain = "driver=raw,file.filename=a.raw";
    let lines = [
        "qemu-img create -q -f raw a.raw 1M",
        "qemu-io -f raw -c write_-P_7_64k_64k a.raw",
        &format!("qemu-img convert {secret} -O qcow2 {inner} a.raw a.qcow2"),
        &format!("env qemu-img compare {secret} --image-opts {opened} {plain}"),
        &format!("qemu-img convert {secret} -O luks -o key-secret=s,iter-time=10 a.raw a.luks"),
        &format!("env qemu-img compare {secret} --image-opts {volume} {plain}"),
        // Without a key nothing is made, and an image that is there not opened.
        "qemu-img map a.qcow2",
        "qemu-img check a.qcow2",
        "qemu-img measure -O raw a.qcow2",
        "qemu-img map -f luks a.luks",
        "qemu-img check -f luks a.luks",
        "qemu-img measure -O raw -f luks a.luks",
        "qemu-img convert -O qcow2 -o encrypt.format=luks a.raw n",
        "qemu-img convert -O luks a.raw n",
        "qemu-img convert -O qcow2 -o encrypt.format=luks,encrypt.key-secret=t a.raw n",
        "qemu-img dd -O luks if=a.raw of=n",
        "qemu-img create -f luks -o key-secret=t n 1M",
        "qemu-img convert -n -O qcow2 a.raw a.qcow2",
        "qemu-img convert -O raw a.luks b.raw",
        // What it is can be seen without.
        &format!("qemu-img info --image-opts {opened}"),
        &format!("qemu-img map --image-opts {opened}"),
    ];
    same(&lines);
}

#[test]
fn sizes_are_what_was_asked_for() {
    same(&[
        "qemu-img create -q -f raw a.raw 5000001",
        "qemu-img resize -f raw a.raw +100",
        // Data up to an end within a sector.
        "truncate -s 1048575 end.raw",
        "qemu-io -f raw -c write_-P_7_983040_65024 end.raw",
        "dd if=/dev/urandom of=end.raw bs=1 seek=1048000 count=575 conv=notrunc status=none",
        "qemu-img map --output=json -f raw end.raw",
        "stat -c %s a.raw",
        "qemu-img resize -f raw a.raw --shrink -- -100",
        "stat -c %s a.raw",
        "qemu-img resize -f raw a.raw -512K --shrink",
        "stat -c %s a.raw",
        "qemu-img resize -f raw a.raw -512K -q",
        "qemu-img resize -f raw -512K --shrink a.raw",
        "qemu-img resize -f raw a.raw 5000003 --preallocation=full",
        "stat -c %s a.raw",
        "qemu-img create -q -f qcow2 a.qcow2 1M",
        "qemu-img resize a.qcow2 +1",
        "qemu-img create -q -f qed a.qed 1M",
        "qemu-img resize a.qed +1",
        // A copy is as large as its source, whatever is said.
        "qemu-img create -q -f raw b.raw 1M",
        "qemu-img convert -O qcow2 -o size=512k b.raw b.qcow2",
        "qemu-img compare b.raw b.qcow2",
        "qemu-img convert -O raw -o size=4M b.raw c.raw",
        "stat -c %s c.raw",
        // Of nothing there is a map too.
        "qemu-img map --output=json -s 2M b.qcow2",
        "qemu-img map --output=json -l 0 b.qcow2",
        "qemu-img map -l 0 b.qcow2",
        "qemu-img create -q -f raw none 0",
        "qemu-img map --output=json none",
        "qemu-img create -q -f vdi -o preallocation=metadata a.vdi 1M",
    ]);
}

#[test]
fn names_lead_to_files_as_in_qemu_img() {
    let (t, u) = (
        "driver=qcow2,file.filename=t.qcow2",
        "driver=qcow2,file.filename=sub/u.qcow2",
    );
    let json = "json:{'driver':'qcow2','file':{'driver':'file','filename':'sub/u.qcow2'}}";
    let lines = [
        // Links that lead to nothing yet.
        "ln -s raw.img l1",
        "qemu-img create -f raw l1 1M",
        "ln -s l3 l2",
        "ln -s sub/x.qcow2 l3",
        "mkdir sub",
        "qemu-img convert -f raw -O qcow2 raw.img l2",
        "qemu-img info sub/x.qcow2",
        "ln -s data.img l4",
        "qemu-img create -q -f qcow2 -o data_file=l4 d.qcow2 1M",
        "ln -s c.qcow2 l5",
        "qemu-img convert -c -f raw -O qcow2 raw.img l5",
        "qemu-img create -q -f vmdk -o subformat=monolithicFlat m.vmdk 1M",
        "find . -type l",
        "stat -c %s raw.img data.img m-flat.vmdk",
        // Targets that options name, and their bitmaps.
        "qemu-img create -q -f qcow2 s.qcow2 1M",
        "qemu-img bitmap --add s.qcow2 b0",
        "qemu-img create -q -f qcow2 t.qcow2 1M",
        "qemu-img create -q -f qcow2 sub/u.qcow2 1M",
        &format!("qemu-img convert -n --bitmaps --target-image-opts s.qcow2 {t}"),
        &format!("qemu-img convert -n --bitmaps -O qcow2 s.qcow2 {json}"),
        "qemu-img info t.qcow2",
        "qemu-img info sub/u.qcow2",
        "qemu-img convert -n --bitmaps --target-image-opts s.qcow2 driver=raw,file.filename=raw.img",
        // A backing file's name begins where the overlay is, however that is named.
        "qemu-img create -q -f raw sub/base 1M",
        &format!("qemu-img rebase -b base -F raw --image-opts {u}"),
        "qemu-img info sub/u.qcow2",
        "qemu-img rebase -u -b '' sub/u.qcow2",
        &format!("qemu-img rebase -b base -F raw {json}"),
        "qemu-img info sub/u.qcow2",
        // What others may be writing is not repaired.
        "qemu-img check -U -r all t.qcow2",
        "qemu-img check -r leaks --image-opts driver=qcow2,force-share=on,file.filename=t.qcow2",
        "qemu-img check -q -U t.qcow2",
    ];
    same(&lines);
}

#[test]
fn what_is_refused_leaves_the_target_alone() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.raw"), [7; 4096]).unwrap();
    std::fs::write(dir.path().join("a.qcow2"), "something else").unwrap();
    let line = "qemu-img convert -c -f raw -O qcow2 -o data_file=d a.raw a.qcow2";
    let program = [env!("CARGO_BIN_EXE_diskplane"), "qemu-img"];
    let text = outcome(&program, dir.path(), line);
    assert!(text.contains("an external data file"), "{text}");
    let line = "qemu-img convert -f raw -O luks a.raw a.qcow2";
    let text = outcome(&program, dir.path(), line);
    assert!(text.contains("'key-secret' is required"), "{text}");
    let left = std::fs::read(dir.path().join("a.qcow2")).unwrap();
    assert_eq!(left, b"something else");
    assert!(!dir.path().join("d").exists());
    let help = outcome(&program, dir.path(), "qemu-img compare --help");
    assert!(help.starts_with("Check if two images"), "{help}");
}

#[test]
fn every_object_is_read_whether_it_is_used_or_not() {
    let objects = [
        "secret,id=a,file=nothere",
        "secret,id=a,data=a --object secret,id=a,data=b",
        "bogus,id=a,data=a",
        "secret,data=a",
        "secret,id=a",
        "secret,id=1,data=a",
        "secret,id=a,data=a,file=b",
        "secret,id=a,data=a,foo=1",
        "secret,id=a,data",
        "secret,id=a,data=a,format=hex",
        "{\"qom-type\":\"secret\",\"id\":\"a\"}",
        "{\"qom-type\":\"secret\"",
        "{\"qom-type\":\"secret\",\"id\":\"a\",\"data\":\"x\"}",
        "secret,id=a,data=a --object secret,id=b,data=x",
    ];
    let mut lines = vec!["qemu-img create -q -f raw a 1M".to_owned()];
    for object in objects {
        lines.push(format!(
            "qemu-img create -q -f raw new 1M --object {object}"
        ));
        lines.push(format!("qemu-img compare -f raw a new --object {object}"));
    }
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    let dir = tempfile::tempdir().unwrap();
    let ours = [env!("CARGO_BIN_EXE_diskplane"), "qemu-img"];
    std::fs::write(dir.path().join("key"), "sesame").unwrap();
    // What comes through a pipe comes once.
    let script = format!(
        "set -e; D='{} qemu-img'; $D create -q -f luks --object secret,id=s,file=key -o key-secret=s a.luks 1M; \
         cat key | $D compare --object secret,id=s,file=/dev/stdin --image-opts \
         driver=luks,key-secret=s,file.filename=a.luks driver=luks,key-secret=s,file.filename=a.luks",
        ours[0]
    );
    let done = Command::new("sh")
        .args(["-c", &script])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
}

#[test]
fn clusters_are_compressed_into_images_that_are_there() {
    same(&[
        "qemu-img create -q -f raw a.raw 3M",
        "qemu-io -f raw -c write_-P_1_0_1M -c write_-P_3_1536k_300k a.raw",
        "qemu-img create -q -f qcow2 t.qcow2 3M",
        "qemu-img convert -n -c -O qcow2 a.raw t.qcow2",
        "qemu-img compare a.raw t.qcow2",
        "qemu-img check t.qcow2",
        "qemu-img create -q -f raw b.raw 3M",
        "qemu-img convert -n -c a.raw b.raw",
        "qemu-img convert -n -c --target-image-opts a.raw driver=raw,file.filename=b.raw",
        "qemu-img create -q -f qcow2 t.qcow2 3M",
        "qemu-img convert -n -c --target-is-zero --target-image-opts a.raw driver=qcow2,file.filename=t.qcow2",
        "qemu-img map --output=json t.qcow2",
        "qemu-img create -q -f qcow2 -b a.raw -F raw o.qcow2",
        "qemu-io -c write_-P_9_64k_64k o.qcow2",
        "qemu-img rebase -c -b b.raw -F raw o.qcow2",
        "qemu-img map --output=json o.qcow2",
        "qemu-img check o.qcow2",
        "qemu-img rebase -c -b '' o.qcow2",
        "qemu-img map --output=json o.qcow2",
        "qemu-img rebase -c -u -b a.raw -F raw o.qcow2",
        "qemu-img create -q -f qed -b a.raw -F raw o.qed",
        "qemu-img rebase -c -b b.raw -F raw o.qed",
        "qemu-img rebase -c -u -b b.raw -F raw o.qed",
    ]);
}

#[test]
fn disks_of_nothing_are_named_as_by_qemu_img() {
    same(&[
        "qemu-img info null-co://",
        "qemu-img info --output=json null-aio://",
        "qemu-img info --image-opts driver=null-co,size=1M",
        "qemu-img map null-co://",
        "qemu-img map --output=json null-co://",
        "qemu-img info null-co://foo",
        "qemu-img info -f qcow2 null-co://",
        "qemu-img measure -O qcow2 null-co://",
        "qemu-img create -q -f raw z.raw 1M",
        "qemu-img compare --image-opts driver=null-co,size=1M,read-zeroes=on driver=raw,file.filename=z.raw",
        "qemu-img convert --image-opts -O raw driver=raw,file.driver=null-co,file.size=1M,file.read-zeroes=on y.raw",
        "qemu-img compare -f raw -F raw z.raw y.raw",
        "qemu-img create -q -f qcow2 -b null-co:// -F raw o.qcow2",
        "qemu-img info o.qcow2",
        "qemu-img map o.qcow2",
        "qemu-img -T foo=1 info z.raw",
    ]);
}

#[test]
fn sizes_of_vhd_images_and_extents_of_vmdk_images_are_told_as_by_qemu_img() {
    let (q, force) = ("driver=vpc,file.filename", "force_size_calc");
    same(&[
        "qemu-img create -q -f vpc a.vhd 10M",
        "qemu-img create -q -f vpc -o force_size b.vhd 10M",
        &format!("qemu-img measure -O raw --image-opts {q}=a.vhd,{force}=chs"),
        &format!("qemu-img measure -O raw --image-opts {q}=a.vhd,{force}=current_size"),
        &format!("qemu-img measure -O raw --image-opts {q}=b.vhd,{force}=chs"),
        &format!("qemu-img measure -O raw --image-opts {q}=b.vhd,{force}=foo"),
        "qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse s.vmdk 3G",
        "qemu-io -f vmdk -c write_-P_1_0_64k -c write_-P_2_2304M_64k s.vmdk",
        "qemu-img map s.vmdk",
        "qemu-img create -q -f vmdk -o subformat=monolithicFlat f.vmdk 1M",
        "qemu-io -f vmdk -c write_-P_1_0_64k f.vmdk",
        "qemu-img map f.vmdk",
        "qemu-img map DIR/f.vmdk",
        "qemu-img resize f.vmdk 2M",
    ]);
}

#[test]
fn what_qemu_img_does_not_do_is_not_done_in_its_place() {
    let mut lines = Vec::new();
    for (format, name) in [("vpc", "a.vhd"), ("vdi", "a.vdi"), ("vhdx", "a.vhdx")] {
        lines.push(format!("qemu-img create -q -f {format} {name} 8M"));
        lines.push(format!("qemu-img resize -f {format} {name} 16M"));
    }
    lines.push("qemu-img check a.vhd".to_owned());
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}
