//! What `diskplane qemu-img` says of command lines that fail, and leaves behind, beside the installed qemu-img: scripts look
//! for these words and codes.

use crate::beside;

use beside::same;

const SETUP: &[&str] = &[
    "truncate -s 1M r",
    "qemu-img create -q -f qcow2 q 1M",
    "qemu-img create -q -f qcow2 small 512k",
    "qemu-img create -q -f qcow2 -b q -F qcow2 ov",
    "qemu-img create -q -f qcow2 -o compat=0.10 old 1M",
    "qemu-img create -q -f vmdk vm 1M",
    "qemu-img create -q -f vdi vd 1M",
    "qemu-img create -q -f vhdx vx 4M",
    "qemu-img create -q -f vpc vp 1M",
    "qemu-img create -q -f qed qe 1M",
    "qemu-img create -q --object secret,id=s,data=abc -f qcow2 -o \
     encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 enc 1M",
    "qemu-img snapshot -c s1 q",
    "qemu-img bitmap --add q b0",
    "truncate -s 100 short",
    "mkdir dir",
];

#[track_caller]
fn fail(lines: &[&str]) {
    let lines: Vec<String> = lines
        .iter()
        .map(|line| format!("qemu-img {line}"))
        .collect();
    let lines = lines.iter().map(String::as_str);
    let all: Vec<&str> = SETUP.iter().copied().chain(lines).chain(["ls"]).collect();
    same(&all);
}

#[test]
fn what_cannot_be_opened_is_told_as_by_qemu_img() {
    fail(&[
        "info nosuch",
        "info dir",
        "map dir",
        "compare q dir",
        "info -f qcow2 r",
        "info -f foo q",
        "info --image-opts file.filename=q,size=1M",
        "info --image-opts file.filename=r,size=1M",
        "info --image-opts driver=raw,file.driver=host_device,file.filename=r",
        "info --image-opts driver=host_device,filename=r",
        "info --image-opts driver=qcow2,file.driver=host_device,file.filename=q",
        "info --image-opts driver=raw,file.driver=file,file.filename=dir",
        "info --image-opts driver=file,filename=dir",
        "info --image-opts driver=raw,file.filename=",
        "info --image-opts driver=qcow2,file.driver=file,file.filename=q,backing.driver=raw,backing.file.filename=r",
        "info --image-opts driver=qcow2,file.filename=q,backing.file.filename=r",
        "info --image-opts driver=qcow2,file.filename=q,backing=",
        "info --image-opts driver=qcow2,file.filename=ov,backing.driver=qcow2,backing.file.filename=q",
        "map --image-opts driver=qcow2,file.filename=ov,backing=",
        "amend --image-opts -o lazy_refcounts=off driver=qcow2,file.filename=ov,backing.driver=qcow2,backing.file.filename=q",
        "check --image-opts driver=qcow2,file.filename=ov,backing.driver=qcow2,backing.file.filename=q",
        "info -T foo q",
        "-T foo info short",
        "-T enable=foo info short",
        "-T enable=foo* info short",
        "info --output=foo q",
        "measure nosuch",
        "dd if=nosuch of=x",
        "bench nosuch",
    ]);
}

#[test]
fn a_key_that_is_lacking_bars_what_works_on_tables_alone_too() {
    fail(&[
        "check enc",
        "snapshot -l enc",
        "snapshot -c s2 enc",
        "snapshot -a s1 enc",
        "snapshot -d s1 enc",
        "bitmap --add enc b1",
        "bitmap --remove enc b1",
        "rebase -u -b '' enc",
        "rebase -b '' enc",
        "resize enc 2M",
        "convert -O raw enc x",
        "compare enc q",
        "map enc",
    ]);
}

#[test]
fn what_is_not_there_is_named_as_by_qemu_img() {
    fail(&[
        "bitmap --add q ''",
        "bitmap --add q b0",
        "bitmap --add -g 3 q b1",
        "bitmap --remove q nosuch",
        "bitmap --clear q nosuch",
        "bitmap --enable q nosuch",
        "bitmap --disable q nosuch",
        "bitmap --merge nosuch q b0",
        "bitmap --merge b0 q nosuch",
        "bitmap --merge b0 -b small -F qcow2 q b0",
        "bitmap --merge b0 -b r -F raw q b0",
        "bitmap --merge b0 -b nosuch -F qcow2 q b0",
        "snapshot -a nosuch q",
        "snapshot -d nosuch q",
        // A name, not an id.
        "snapshot -d 1 q",
        "snapshot -d s1 q",
        "snapshot -d s1 q",
        "convert -l nosuch -O raw q x",
        "snapshot -c s2 vm",
        "snapshot -c '' r -f raw",
        "check -r all vd",
        "check -r leaks vm",
        "check -r all vp",
        "check vm",
        "check vx",
        "check --output=json vm",
        "check --output=json vx",
        "check --output=json vd",
        "rebase -b q -F raw vm",
        "rebase -b nosuch -F qcow2 ov",
        "rebase -b q ov",
        "rebase -b '' -f raw r",
        "commit q",
        "resize q 8E",
        "resize q -2M",
        "resize q 512k",
        "resize vm 2M",
        "resize qe 512k",
    ]);
}

#[test]
fn values_that_cannot_be_are_refused_in_qemus_words() {
    fail(&[
        "create -f foo x 1M",
        "create -f qcow2 x",
        "create -f qcow2 x foo",
        "create -f qcow2 x -1",
        "create -f qcow2 x 16E",
        "create -f qcow2 -o foo=bar x 1M",
        "create -f qcow2 -o cluster_size=3 x 1M",
        "create -f qcow2 -o preallocation=foo x 1M",
        "create -f qcow2 -o refcount_bits=3 x 1M",
        "create -f qcow2 -o encrypt.format=foo x 1M",
        "create -f qcow2 -o encrypt.format=luks x 1M",
        "create -f qcow2 -b nosuch -F qcow2 x",
        "create -f qcow2 -b r -F qcow2 x",
        "create -f qcow2 -b q x",
        "create -f qcow2 dir 1M",
        "create -f qcow2 nodir/x 1M",
        "create -f vmdk -o subformat=foo x 1M",
        "measure -O qcow2 -o cluster_size=3 q",
        "measure -O qcow2 -o cluster_size=4M --size 1M",
        "measure -O foo q",
        "convert -O foo q x",
        "convert -m 17 -O raw q x",
        "convert -S 3 -O raw q x",
        "convert --image-opts -f qcow2 driver=qcow2,file.filename=q x",
        "convert -n -O qcow2 q nosuch",
        "amend -o compat=0.9 q",
        "amend -o foo=bar q",
        "dd if=q of=x bs=0",
        "bench -c 0 q",
    ]);
    // QEMU leaves an empty file of these.
    let lines = [
        "create -f vhdx -o block_size=3M x 1M",
        "create -f vhdx -o subformat=foo x 1M",
        "create -f vpc -o subformat=foo x 1M",
        "create -f vpc x 3T",
        "create -f qed -o cluster_size=3k x 1M",
        "create -f qed -o table_size=3 x 1M",
    ];
    same(
        &lines
            .map(|line| format!("qemu-img {line}"))
            .each_ref()
            .map(|line| line.as_str()),
    );
}

#[test]
fn words_and_codes_are_those_of_qemu_img_also_where_nothing_is_opened() {
    fail(&[
        "create -f vhd x 1M",
        "convert -O vhd q x",
        "info -f vhd vp",
        "measure -O vhd q",
        "amend -f vhd -o help",
        "dd -O vhd if=q of=x",
        "snapshot -a nope q",
        "snapshot -d nope q",
        "convert --target-i q x",
        "convert -n -O raw --target-image-opts q driver=raw,file.filename=r",
        "check vp",
    ]);
}

#[test]
fn a_vhd_image_that_cannot_be_opened_is_no_format_without_checks() {
    let dir = testkit::TempDir::new();
    let file = dir.path("v");
    testkit::qemu::create("vpc", &file, "10M");
    let code = || {
        let output = crate::common::diskplane(dir.root(), &["qemu-img", "check", "-f", "vpc", "v"]);
        output.status.code()
    };
    assert_eq!(code(), Some(63));
    let cut = std::fs::OpenOptions::new().write(true).open(&file);
    cut.and_then(|file| file.set_len(1000)).unwrap();
    assert_eq!(code(), Some(1));
}
