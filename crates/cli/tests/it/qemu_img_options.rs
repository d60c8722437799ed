//! Options of `diskplane qemu-img` beside those of the installed qemu-img: what they take, and what they say of what they
//! do not take.

use crate::beside;

use beside::same;

#[test]
fn options_that_name_an_image_are_looked_at_as_by_qemu_img() {
    let q = "driver=qcow2,file.filename=a.qcow2";
    let mut lines = vec![
        "qemu-img create -q -f qcow2 a.qcow2 1M".to_owned(),
        "qemu-img create -q -f raw a.raw 1M".to_owned(),
    ];
    for more in [
        "lazy-refcounts=foo",
        "lazy-refcounts=yes",
        "lazy-refcounts",
        "read-only=y",
        "l2-cache-size=foo",
        "l2-cache-size=1M",
        "cache-size=1M,l2-cache-size=2M",
        "cache-size=4M,l2-cache-size=1M,refcount-cache-size=1M",
        "cache-clean-interval=x",
        "overlap-check=foo",
        "overlap-check=all",
        "overlap-check.template=all,overlap-check.main-header=off",
        "overlap-check.foo=on",
        "discard=foo",
        "detect-zeroes=foo",
        "detect-zeroes=unmap",
        "discard=unmap,detect-zeroes=unmap",
        "node-name=1",
        "node-name=n",
        "cache.direct=foo",
        "cache.foo=on",
        "file.aio=foo",
        "file.aio=threads",
        "file.locking=foo",
        "file.foo=1",
        "file.driver=foo",
        "filename=b",
        "offset=1M",
        "driver=foo",
    ] {
        lines.push(format!("qemu-img check --image-opts {q},{more}"));
    }
    for name in [
        "--image-opts ''",
        "--image-opts filename=a.qcow2",
        "--image-opts file=a.qcow2",
        "--image-opts driver=qcow2",
        "--image-opts driver=qcow2,file.driver=file",
        "--image-opts driver=qcow2,file.driver=raw,file.file.filename=a.qcow2",
        "--image-opts driver=raw,file.filename=a.qcow2,size=1000",
        "--image-opts driver=raw,file.filename=a.raw,offset=1G",
        "--image-opts driver=raw,file.filename=a.raw,offset=512,size=1G",
        "json:",
        "json:{",
        "json:[1]",
        "json:3",
        "json:{'driver':'qcow2','driver':'raw','file':{'filename':'a.qcow2'}}",
        "json:{'driver':'qcow2','lazy-refcounts':1,'file':{'filename':'a.qcow2'}}",
        "json:{'driver':'qcow2','lazy-refcounts':true,'file':{'filename':'a.qcow2'}}",
        "foo:a.qcow2",
        "file:a.qcow2",
    ] {
        lines.push(format!("qemu-img map {name}"));
    }
    lines.extend(
        [
            // A part, and a name that says more than a file, are shown as they are said.
            "qemu-img info --image-opts driver=raw,size=512,file.filename=a.qcow2",
            "qemu-img info file:./a.qcow2",
            "qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2",
            "qemu-img commit --image-opts driver=qcow2,file.filename=o.qcow2,backing.driver=qcow2,backing.file.filename=a.qcow2,\
             backing.file.read-only=on",
            "qemu-img commit --image-opts driver=qcow2,file.filename=o.qcow2,backing.driver=qcow2,backing.file.filename=a.qcow2,\
             backing.read-only=on",
        ]
        .map(str::to_owned),
    );
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn names_with_a_protocol_are_no_files() {
    same(&[
        "qemu-img create -q -f raw a.raw 1M",
        "qemu-img create foo:bar 1M",
        "qemu-img create -f qcow2 foo:bar 1M",
        "qemu-img create -q -f raw ./foo:bar 1M",
        "qemu-img info -f raw foo:bar",
        "qemu-img compare -f raw a.raw ./foo:bar",
        "qemu-img convert a.raw foo:baz",
        "qemu-img convert -n -O raw a.raw foo:bar",
        "qemu-img convert -f raw foo:bar x",
        "qemu-img dd if=a.raw of=foo:baz",
        "qemu-img compare -f raw foo:bar a.raw",
        "qemu-img create -f qcow2 -b foo:bar -F raw x",
        "qemu-img create -f qcow2 -b foo:bar -F raw x 1M",
        "qemu-img create -q -f qcow2 -u -b foo:bar -F raw x 1M",
        "qemu-img rebase -b foo:bar -F raw x",
        "qemu-img resize -f raw foo:bar 1M",
        "qemu-img create -q -f qcow2 file:one:two 1M",
        "qemu-img check file:one:two",
        "qemu-img compare -f raw ./foo:bar file:foo:bar",
        "ls",
    ]);
}

#[test]
fn keys_are_amended_as_by_qemu_img() {
    let s = "--object secret,id=s,data=abc";
    let n = "--object secret,id=n,data=new";
    let mut lines = vec![
        format!("qemu-img create -q -f luks {s} -o key-secret=s,iter-time=1 a.luks 1M"),
        format!(
            "qemu-img create -q -f qcow2 {s} -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1 a.qcow2 1M"
        ),
        "qemu-img create -q -f qcow2 plain.qcow2 1M".to_owned(),
        "qemu-img amend -f luks -o help".to_owned(),
        "qemu-img amend -f raw -o help".to_owned(),
        "qemu-img amend -f luks -o state=active a.luks".to_owned(),
        format!("qemu-img amend {s} -o encrypt.state=inactive,encrypt.old-secret=s plain.qcow2"),
        "qemu-img amend -o lazy_refcounts=foo plain.qcow2".to_owned(),
        "qemu-img amend -o cluster_size=4k plain.qcow2".to_owned(),
        "qemu-img amend -o refcount_bits=7 plain.qcow2".to_owned(),
        "qemu-img amend -o compat=2 plain.qcow2".to_owned(),
        "qemu-img amend -o data_file=x plain.qcow2".to_owned(),
        "qemu-img amend -p -o size=2M plain.qcow2".to_owned(),
        "qemu-img amend -o size=1M plain.qcow2".to_owned(),
        "qemu-img amend -o compat=0.10 plain.qcow2".to_owned(),
        "qemu-img amend -o lazy_refcounts=on plain.qcow2".to_owned(),
        "qemu-img amend -o refcount_bits=8 plain.qcow2".to_owned(),
        "qemu-img info plain.qcow2".to_owned(),
    ];
    for (driver, prefix, file) in [("luks", "", "a.luks"), ("qcow2", "encrypt.", "a.qcow2")] {
        for (options, force) in [
            // Each key that is added costs qemu-img a second or two.
            ("state=active,new-secret=n,iter-time=1", ""),
            ("state=active,new-secret=n,keyslot=1,iter-time=1", ""),
            ("state=active,new-secret=n,keyslot=8,iter-time=1", ""),
            ("state=inactive,keyslot=5", ""),
            ("state=inactive,keyslot=7", ""),
            ("state=inactive,keyslot=7", "--force "),
            ("state=inactive,old-secret=n", ""),
            ("state=inactive,old-secret=n", ""),
            ("state=inactive,old-secret=s", ""),
            ("state=inactive,keyslot=0", ""),
            ("state=inactive,old-secret=nix", ""),
            ("state=inactive", ""),
            ("state=inactive,new-secret=s", ""),
            ("state=inactive,iter-time=1,keyslot=1", ""),
            ("state=active", ""),
            ("state=foo", ""),
            ("new-secret=s", ""),
            ("foo=1", ""),
            ("key-secret=s", ""),
            ("keyslot=x", ""),
            ("state=active,new-secret=nix", ""),
            ("state=inactive,keyslot=0", "--force "),
        ] {
            // One of each kind shows that both take the same way.
            let again = [
                "new-secret=n,iter-time=1",
                "state=inactive,old-secret=n",
                "old-secret=s",
            ];
            if driver == "qcow2" && !again.iter().any(|end| options.ends_with(end)) {
                continue;
            }
            let options = format!("{prefix}{}", options.replace(',', &format!(",{prefix}")));
            lines.push(format!(
                "qemu-img amend {force}{s} {n} -o {options} --image-opts driver={driver},{prefix}key-secret=s,file.filename={file}"
            ));
        }
        lines.push(format!("qemu-img info {file}"));
    }
    // Which keys there are then is in what info prints; what varies of it is random.
    same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn facts_of_vmdk_images_are_those_of_qemu_img() {
    same(&[
        "qemu-img create -q -f vmdk a.vmdk 1M",
        "qemu-img info a.vmdk",
        "qemu-img info --output=json a.vmdk",
        "qemu-img create -q -f vmdk -o subformat=monolithicFlat f.vmdk 1M",
        "qemu-img info f.vmdk",
        "qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse s.vmdk 3G",
        "qemu-img info s.vmdk",
        "qemu-img create -q -f vmdk -b a.vmdk -F vmdk o.vmdk",
        "qemu-img info --backing-chain o.vmdk",
    ]);
}

#[test]
fn what_goes_together_is_told_as_by_qemu_img() {
    same(&[
        "qemu-img create -q -f raw a.raw 1M",
        "qemu-img map --output=json -f raw a.raw",
        "qemu-img create -q -f qcow2 a.qcow2 1M",
        "qemu-img convert --bitmaps -O raw a.qcow2 x",
        "qemu-img convert --bitmaps -O qcow2 -o compat=0.10 a.qcow2 x",
        "qemu-img convert -l snapshot.foo=2 -O qcow2 a.qcow2 x",
        "qemu-img convert -F qcow2 -O qcow2 a.qcow2 x",
        "qemu-img convert -r -1 -O qcow2 a.raw x",
        "qemu-img convert -O qcow2 a.raw .",
        "qemu-img snapshot -U -c s a.qcow2",
        "qemu-img snapshot -a s -f raw a.raw",
        "qemu-img snapshot -d s -f raw a.raw",
        "qemu-img snapshot -l a.qcow2",
        "qemu-img resize a.qcow2 x",
        "qemu-img resize a.qcow2 1M 2M",
        "qemu-img info --output a.qcow2",
        "qemu-img measure --size 1M -O luks",
        "qemu-img measure --size 1M -O luks -o key-secret=s",
        "qemu-img measure --size 1M -O qcow2 -o encrypt.format=luks",
        "qemu-img dd bs=-1 if=a.raw of=x",
        "qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 1M",
        "qemu-img snapshot -c s old.qcow2",
        "qemu-img resize old.qcow2 2M",
        "qemu-img snapshot -d 1 old.qcow2",
        "qemu-img snapshot -d s old.qcow2",
        "qemu-img create -f qcow2 -F raw y 1M",
        "qemu-img create -f qcow2 -F nofmt y 1M",
        "qemu-img create -f qed -F nofmt y 1M",
        "qemu-img create -f vmdk -F raw y 1M",
        "qemu-img create -f qcow2 y +5M",
        "qemu-img create -f qcow2 y .5M",
        "qemu-img create -f qcow2 y ++5M",
        "qemu-img create -f qcow2 y .M",
        "qemu-img create -f bochs x 1M",
        "qemu-img convert -O bochs a.raw x",
        "qemu-img measure -O bochs --size 1M",
        "qemu-img amend -f bochs -o help",
    ]);
}
