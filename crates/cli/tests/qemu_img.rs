//! `diskplane qemu-img` beside the installed qemu-img: the same command lines in two directories, and the same exit
//! codes, output and errors, byte for byte. What is left out of the comparison is what cannot be the same: space on the
//! host, the length of an image's own file, dates and random numbers.

use std::path::Path;
use std::process::Command;

/// What a command line printed, both streams, and its exit code.
fn outcome(program: &[&str], dir: &Path, line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut command = match words.next() {
        Some("qemu-img") => {
            let mut command = Command::new(program[0]);
            command.args(&program[1..]);
            command
        }
        other => Command::new(other.unwrap()),
    };
    let words = words.map(|word| match word {
        // A space within a word.
        word if word.contains("_") && word.starts_with("write_") => word.replace("_", " "),
        "''" => String::new(),
        word => word.replace("DIR", &dir.display().to_string()),
    });
    let output = command.args(words).current_dir(dir).output().unwrap();
    let text = format!(
        "{}{}code {:?}\n",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        output.status.code()
    );
    normal(&text.replace(&dir.display().to_string(), "DIR"))
}

/// `text` without what differs from run to run, or between hosts.
fn normal(text: &str) -> String {
    // A name, and what its value is replaced by.
    let varying = [
        "disk size: ",
        "file length: ",
        "\"actual-size\": ",
        "\"date-sec\": ",
        "\"date-nsec\": ",
        "uuid: ",
        "iters: ",
        " ops; ",
        "Run completed in ",
    ];
    let mut in_file = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        // The length of the file below an image is its writer's business.
        in_file |= line.contains("\"name\": \"file\"");
        let mut line = line.replace("/usr/bin/qemu-img", "qemu-img");
        for name in varying {
            if let Some(at) = line.find(name) {
                line.truncate(at + name.len());
            }
        }
        if in_file && line.contains("\"virtual-size\": ") {
            in_file = false;
            line.truncate(line.find(':').unwrap());
        }
        // The row of a snapshot: up to its date.
        if let (true, Some(at)) = (line.ends_with("          0"), line.find(" 20")) {
            line.truncate(at);
        }
        lines.push(line);
    }
    lines.join("\n")
}

/// Runs each of `lines` with both, and says where they part.
fn same(lines: &[&str]) {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut wrong = String::new();
    for line in lines {
        let want = outcome(&["qemu-img"], theirs.path(), line);
        let found = outcome(
            &[env!("CARGO_BIN_EXE_diskplane"), "qemu-img"],
            ours.path(),
            line,
        );
        if want != found {
            wrong.push_str(&format!(
                "=== {line}\n--- qemu-img\n{want}\n--- diskplane qemu-img\n{found}\n"
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

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
