//! What `diskplane qemu-img` says, in qemu-img's words: of drivers that are no formats, abbreviated options, values as they were
//! said, and of nothing that is only to be had under diskplane's own name.

use crate::beside::{same, same_in};
use crate::common::{binary, diskplane, failure, good};
use testkit::TempDir;
use testkit::server::Serve;

#[test]
fn a_file_that_is_named_as_such_is_shown_as_one() {
    same(&[
        "qemu-img create -q -f raw a 1M",
        "qemu-img info --image-opts driver=file,filename=a",
        "qemu-img info --output=json --image-opts driver=file,filename=a",
        "qemu-img info --backing-chain --image-opts driver=file,filename=a",
        "qemu-img info json:{\"driver\":\"file\",\"filename\":\"a\"}",
        "qemu-img info --image-opts driver=raw,file.filename=a",
        "qemu-img info --image-opts driver=file,filename=nix",
        "qemu-img check --image-opts driver=file,filename=a",
        "qemu-img map --image-opts driver=file,filename=a",
        "qemu-img commit --image-opts driver=file,filename=a",
        "qemu-img rebase -u -b '' --image-opts driver=file,filename=a",
        "qemu-img info --image-opts driver=file,filename=a,foo=1",
        "qemu-img info --image-opts driver=raw,file.filename=a,file.foo=1",
        "qemu-img info --image-opts driver=raw,foo.bar=1,file.filename=a",
        "qemu-img info --image-opts filename=a",
    ]);
}

#[test]
fn so_is_an_export() {
    let (theirs, ours, serves) = (TempDir::new(), TempDir::new(), TempDir::new());
    good(serves.root(), &["create", "-f", "raw", "disk", "1M"]);
    let socket = serves.path("sock");
    let server = Serve::new(binary(), serves.path("disk"))
        .format("raw")
        .read_only()
        .nbd_unix(&socket)
        .start();
    let options = format!(
        "driver=nbd,server.type=unix,server.path={}",
        socket.display()
    );
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let lines = [
        format!("qemu-img info --image-opts {options}"),
        format!("qemu-img info --output=json --image-opts {options}"),
        format!(
            "qemu-img info --image-opts driver=raw,file.{}",
            options.replace(",s", ",file.s")
        ),
        format!("qemu-img info {uri}"),
    ];
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    same_in(theirs.root(), ours.root(), &lines);
    server.stop();
}

#[test]
fn options_are_abbreviated_as_qemu_img_has_them() {
    let words = [
        "--targ",
        "--target",
        "--target-",
        "--target-i",
        "--target-f",
        "--target-fo",
        "--target-o",
        "--target-c",
        "--t",
        "--so",
        "--source",
        "--source-f",
        "--source-s",
        "--s",
        "--o",
        "--out",
        "--output-f",
        "--opt",
        "--c",
        "--copy",
        "--comp",
        "--no",
        "--no-c",
        "--fo",
        "--format",
        "--sn",
        "--r",
        "--b",
        "--sa",
        "--sp",
        "--i",
    ];
    let lines: Vec<String> = (words.iter())
        .map(|word| format!("qemu-img convert {word}"))
        .collect();
    let mut lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    lines.extend([
        "qemu-img create -q -f raw a 1M",
        "qemu-img convert -f raw --output-format qcow2 --options cluster_size=4k a b",
        "qemu-img convert --output-cache none --snapshot none a c",
        "qemu-img compare --left-format raw --right-format qcow2 a b",
        "qemu-img compare --a-format raw --b-format qcow2 a b",
    ]);
    same(&lines);
}

#[test]
fn values_are_shown_as_they_were_said() {
    same(&[
        "qemu-img create -f qcow2 -o lazy_refcounts=yes a 1M",
        "qemu-img create -f qcow2 -o lazy_refcounts=true b 1M",
        "qemu-img create -f qcow2 -o lazy_refcounts=no,extended_l2=y c 1M",
        "qemu-img create -f qcow2 -o lazy_refcounts=1 d 1M",
        "qemu-img create -f qcow2 -o lazy_refcounts d 1M",
        "qemu-img create -f vpc -o force_size e 1M",
        "qemu-img create -f vdi -o static=yes f 1M",
        "qemu-img create -f vmdk -o compat6=true g 1M",
        "qemu-img info a",
        "qemu-img info c",
        "qemu-img amend -o lazy_refcounts=false a",
        "qemu-img amend -o compat=0.10 a",
        "qemu-img info a",
    ]);
}

#[test]
fn only_what_qemu_img_has_is_named() {
    same(&[
        "qemu-img create -q -f qcow2 a 1M",
        "qemu-img bench -i native -c 1 a",
        "qemu-img bench -n -c 1 a",
        "qemu-img bench -t writeback -i native -c 1 a",
        "qemu-img bench -i sync -c 1 a",
    ]);
    // Where its own words are others, they lead to what there is under this name.
    let dir = TempDir::new();
    let root = dir.root();
    good(root, &["create", "-f", "qcow2", "a", "1M"]);
    let mut bytes = std::fs::read(dir.path("a")).unwrap();
    // The corrupt bit.
    bytes[79] |= 2;
    std::fs::write(dir.path("a"), bytes).unwrap();
    for args in [
        &["qemu-img", "resize", "a", "2M"][..],
        &["qemu-img", "snapshot", "-c", "one", "a"],
        &["qemu-img", "bench", "-w", "-c", "1", "a"],
    ] {
        let said = failure(args, &diskplane(root, args), 1);
        assert!(!said.contains("diskplane"), "{said}");
        assert!(!said.contains("--repair"), "{said}");
    }
}
