//! Images as QEMU makes them: all of its features, in small.

use super::Rng;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::TempDir;
use testkit::command::run;
use testkit::qemu;

/// A kind of image.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub name: &'static str,
    /// `-o` of `qemu-img create`.
    pub options: &'static str,
    /// MiB of the disk.
    pub size: u64,
    pub snapshots: u32,
    pub bitmaps: u32,
    pub compressed: bool,
    /// Encrypted: a LUKS header lies in the file.
    pub luks: bool,
    /// Guest data lie in another file.
    pub data_file: bool,
    /// It lies over another image.
    pub backing: bool,
    /// The snapshots are of a running machine: their L1 tables go on behind the disk's end.
    pub vm_state: bool,
}

const PLAIN: Kind = Kind {
    name: "plain",
    options: "",
    size: 64,
    snapshots: 0,
    bitmaps: 0,
    compressed: false,
    luks: false,
    data_file: false,
    backing: false,
    vm_state: false,
};

/// All that QEMU can make, in small.
pub const KINDS: &[Kind] = &[
    PLAIN,
    Kind {
        name: "512",
        options: "cluster_size=512",
        size: 2,
        snapshots: 1,
        ..PLAIN
    },
    Kind {
        name: "4k",
        options: "cluster_size=4k",
        size: 16,
        snapshots: 2,
        ..PLAIN
    },
    Kind {
        name: "2M",
        options: "cluster_size=2M",
        size: 64,
        ..PLAIN
    },
    Kind {
        name: "refcounts of 1 bit",
        options: "refcount_bits=1,cluster_size=4k",
        size: 16,
        ..PLAIN
    },
    Kind {
        name: "refcounts of 2 bits",
        options: "refcount_bits=2,cluster_size=4k",
        size: 16,
        snapshots: 2,
        ..PLAIN
    },
    Kind {
        name: "refcounts of 4 bits",
        options: "refcount_bits=4,cluster_size=1k",
        size: 8,
        snapshots: 1,
        ..PLAIN
    },
    Kind {
        name: "refcounts of 8 bits",
        options: "refcount_bits=8",
        snapshots: 9,
        ..PLAIN
    },
    Kind {
        name: "refcounts of 32 bits",
        options: "refcount_bits=32,cluster_size=16k",
        snapshots: 1,
        ..PLAIN
    },
    Kind {
        name: "refcounts of 64 bits",
        options: "refcount_bits=64,cluster_size=512",
        size: 2,
        ..PLAIN
    },
    Kind {
        name: "version 2",
        options: "compat=0.10,cluster_size=4k",
        size: 16,
        snapshots: 2,
        ..PLAIN
    },
    Kind {
        name: "snapshots",
        options: "",
        snapshots: 3,
        ..PLAIN
    },
    Kind {
        name: "bitmaps",
        options: "cluster_size=4k",
        size: 32,
        bitmaps: 3,
        ..PLAIN
    },
    Kind {
        name: "compressed",
        options: "cluster_size=16k",
        compressed: true,
        ..PLAIN
    },
    Kind {
        name: "zstd",
        options: "compression_type=zstd",
        compressed: true,
        snapshots: 1,
        ..PLAIN
    },
    Kind {
        name: "subclusters",
        options: "extended_l2=on,cluster_size=16k",
        size: 32,
        snapshots: 1,
        ..PLAIN
    },
    Kind {
        name: "subclusters, compressed",
        options: "extended_l2=on",
        compressed: true,
        ..PLAIN
    },
    Kind {
        name: "lazy",
        options: "lazy_refcounts=on,cluster_size=4k",
        size: 16,
        ..PLAIN
    },
    Kind {
        name: "everything",
        options: "extended_l2=on,cluster_size=32k,refcount_bits=32,compression_type=zstd",
        snapshots: 2,
        bitmaps: 2,
        compressed: true,
        ..PLAIN
    },
    Kind {
        name: "LUKS",
        options: "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,cluster_size=16k",
        size: 4,
        snapshots: 1,
        luks: true,
        ..PLAIN
    },
    Kind {
        name: "data file",
        options: "cluster_size=4k",
        size: 16,
        data_file: true,
        ..PLAIN
    },
    Kind {
        name: "raw data file, bitmaps",
        options: "data_file_raw=on,cluster_size=4k",
        size: 16,
        bitmaps: 1,
        data_file: true,
        ..PLAIN
    },
    Kind {
        name: "subclusters, data file",
        options: "extended_l2=on,cluster_size=16k",
        size: 16,
        data_file: true,
        ..PLAIN
    },
    Kind {
        name: "overlay",
        options: "cluster_size=4k",
        size: 8,
        snapshots: 1,
        backing: true,
        ..PLAIN
    },
    Kind {
        name: "VM states",
        options: "cluster_size=1k",
        size: 4,
        snapshots: 2,
        vm_state: true,
        ..PLAIN
    },
    Kind {
        name: "preallocated",
        options: "preallocation=metadata,cluster_size=4k",
        size: 8,
        snapshots: 1,
        ..PLAIN
    },
    Kind {
        name: "subclusters, 1 bit",
        options: "extended_l2=on,cluster_size=16k,refcount_bits=1",
        size: 16,
        ..PLAIN
    },
    Kind {
        name: "512, 1 bit",
        options: "cluster_size=512,refcount_bits=1",
        size: 1,
        ..PLAIN
    },
    Kind {
        name: "version 2, compressed",
        options: "compat=0.10,cluster_size=512",
        size: 2,
        compressed: true,
        snapshots: 1,
        ..PLAIN
    },
    Kind {
        name: "2M, subclusters",
        options: "extended_l2=on,cluster_size=2M",
        size: 128,
        ..PLAIN
    },
    Kind {
        name: "bitmaps, 512",
        options: "cluster_size=512,refcount_bits=8",
        size: 4,
        bitmaps: 4,
        ..PLAIN
    },
];

/// The passphrase of encrypted kinds.
const SECRET: [&str; 2] = ["--object", "secret,id=s,data=x"];

/// How QEMU's tools are told of the image at `path`: arguments that say its format, and its name.
pub fn named(kind: &Kind, path: &Path) -> Vec<String> {
    let shown = path.display();
    match kind.luks {
        false => ["-f", "qcow2", &shown.to_string()]
            .map(String::from)
            .to_vec(),
        true => {
            let options = format!("driver=qcow2,file.filename={shown},encrypt.key-secret=s");
            [SECRET[0], SECRET[1], "--image-opts", &options]
                .map(String::from)
                .to_vec()
        }
    }
}

/// Makes an image of this kind with some content. The same seed gives the same content.
pub fn make(dir: &TempDir, kind: &Kind, seed: u64) -> PathBuf {
    let image = dir.path("made.qcow2");
    let _ = fs::remove_file(&image);
    let size = format!("{}M", kind.size + u64::from(kind.vm_state));
    let mut rng = Rng::new(seed);
    let mut options = kind.options.to_owned();
    let mut add = |option: String| {
        options += if options.is_empty() { "" } else { "," };
        options += &option;
    };
    if kind.data_file {
        let data = dir.path("made.data");
        let _ = fs::remove_file(&data);
        add(format!("data_file={}", data.display()));
    }
    if kind.backing {
        let base = dir.path("made.base");
        qemu::create("raw", &base, &size);
        qemu::io("raw", &base, &["write -P 77 0 4M"]);
        add(format!("backing_file={},backing_fmt=raw", base.display()));
    }
    if kind.compressed {
        // convert -c compresses all; what is written later lies beside.
        let raw = dir.path("made.raw");
        qemu::create("raw", &raw, &size);
        write(&raw, kind, true, &mut rng);
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-c", "-f", "raw", "-O", "qcow2"]);
        if !options.is_empty() {
            convert.args(["-o", &options]);
        }
        run(convert.arg(&raw).arg(&image));
    } else {
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q"]).args(SECRET);
        if !options.is_empty() {
            create.args(["-o", &options]);
        }
        run(create.args(["-f", "qcow2"]).arg(&image).arg(&size));
    }
    write(&image, kind, false, &mut rng);
    for nth in 0..kind.snapshots {
        if kind.vm_state {
            let at = (kind.size << 20) + rng.below(512) * 1024;
            io(&image, kind, false, &[format!("write -P 99 {at} 64k")]);
        }
        let name = format!("snapshot{nth}");
        let mut snapshot = Command::new("qemu-img");
        snapshot.args(["snapshot", "-c", &name]);
        match kind.luks {
            // -f would be taken for the name of a file.
            false => run(snapshot.arg(&image)),
            true => run(snapshot.args(named(kind, &image))),
        };
        if nth < 3 {
            write(&image, kind, false, &mut rng);
        }
    }
    for nth in 0..kind.bitmaps {
        let name = format!("bitmap{nth}");
        let mut add = Command::new("qemu-img");
        let granularity = (512 << (3 * nth)).to_string();
        add.args(["bitmap", "--add", "-g", &granularity]);
        add.arg(if nth == 1 { "--disable" } else { "--enable" });
        run(add.arg(&image).arg(&name));
        write(&image, kind, false, &mut rng);
    }
    if kind.vm_state {
        // The disk ends where the machine's state began.
        let mut bytes = fs::read(&image).expect("reads");
        bytes[24..32].copy_from_slice(&(kind.size << 20).to_be_bytes());
        fs::write(&image, bytes).expect("writes");
    }
    image
}

fn write(image: &Path, kind: &Kind, raw: bool, rng: &mut Rng) {
    let mut commands = Vec::new();
    for _ in 0..6 {
        let at = rng.below(kind.size << 11) << 9;
        let len = (rng.below(600) + 1) << 9;
        let len = len.min((kind.size << 20) - at);
        let pattern = 1 + rng.below(255);
        commands.push(match rng.below(6) {
            0 if !raw => format!("write -z {at} {len}"),
            1 if !raw => format!("discard {at} {len}"),
            _ => format!("write -P {pattern} {at} {len}"),
        });
    }
    io(image, kind, raw, &commands);
}

fn io(image: &Path, kind: &Kind, raw: bool, commands: &[String]) {
    if !kind.luks {
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        qemu::io(if raw { "raw" } else { "qcow2" }, image, &commands);
        return;
    }
    let mut io = Command::new("qemu-io");
    for command in commands {
        io.args(["-c", command]);
    }
    run(io.args(named(kind, image)));
}
