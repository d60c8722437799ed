//! Images as QEMU makes them, damage to their metadata, and QEMU's opinion of the result.

use block::Storage;
use image::qcow2::check::Layout;
use image::qcow2::{Header, extensions, features};
use io::{File, OpenOptions};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use testkit::TempDir;
use testkit::command::run;
use testkit::qemu;
use tool::check::Report;

/// A small generator of numbers: the same for the same seed, everywhere.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end.max(1)
    }
}

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
}

const PLAIN: Kind = Kind {
    name: "plain",
    options: "",
    size: 64,
    snapshots: 0,
    bitmaps: 0,
    compressed: false,
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
];

/// Makes an image of this kind with some content. The same seed gives the same content.
pub fn make(dir: &TempDir, kind: &Kind, seed: u64) -> PathBuf {
    let image = dir.path("made.qcow2");
    let _ = fs::remove_file(&image);
    let size = format!("{}M", kind.size);
    let mut rng = Rng::new(seed);
    if kind.compressed {
        // convert -c compresses all; what is written later lies beside.
        let raw = dir.path("made.raw");
        qemu::create("raw", &raw, &size);
        write(&raw, "raw", kind, &mut rng);
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-c", "-f", "raw", "-O", "qcow2"]);
        if !kind.options.is_empty() {
            convert.args(["-o", kind.options]);
        }
        run(convert.arg(&raw).arg(&image));
    } else {
        qemu::create_with("qcow2", &image, &size, kind.options);
    }
    write(&image, "qcow2", kind, &mut rng);
    for nth in 0..kind.snapshots {
        let name = format!("snapshot{nth}");
        run(Command::new("qemu-img")
            .args(["snapshot", "-c", &name])
            .arg(&image));
        if nth < 3 {
            write(&image, "qcow2", kind, &mut rng);
        }
    }
    for nth in 0..kind.bitmaps {
        let name = format!("bitmap{nth}");
        let mut add = Command::new("qemu-img");
        add.args(["bitmap", "--add", "-g", "512"]);
        run(add.arg(&image).arg(&name));
        write(&image, "qcow2", kind, &mut rng);
    }
    image
}

fn write(image: &Path, format: &str, kind: &Kind, rng: &mut Rng) {
    let mut commands = Vec::new();
    for _ in 0..6 {
        let at = rng.below(kind.size << 11) << 9;
        let len = (rng.below(600) + 1) << 9;
        let len = len.min((kind.size << 20) - at);
        let pattern = 1 + rng.below(255);
        commands.push(match rng.below(6) {
            0 if format == "qcow2" => format!("write -z {at} {len}"),
            1 if format == "qcow2" => format!("discard {at} {len}"),
            _ => format!("write -P {pattern} {at} {len}"),
        });
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu::io(format, image, &commands);
}

/// Where an image's metadata are: what they are, first byte, bytes.
pub fn places(bytes: &[u8]) -> Vec<(&'static str, u64, u64)> {
    let header = Header::parse(bytes).expect("a header");
    let layout = Layout::of(&header);
    let cluster = layout.cluster();
    let word = |at: u64| {
        let at = at as usize;
        let field = bytes
            .get(at..at + 8)
            .map(|b| b.try_into().expect("8 bytes"));
        u64::from_be_bytes(field.unwrap_or([0; 8]))
    };
    let mask = 0x00ff_ffff_ffff_fe00;
    let mut places = vec![
        (
            "L1 table",
            header.l1_table_offset,
            u64::from(header.l1_size) * 8,
        ),
        (
            "refcount table",
            header.refcount_table_offset,
            64.min(cluster * u64::from(header.refcount_table_clusters)),
        ),
    ];
    let mut l1s = vec![(header.l1_table_offset, header.l1_size)];
    if header.nb_snapshots > 0 {
        let at = header.snapshots_offset;
        places.push(("snapshot table", at, 64 * u64::from(header.nb_snapshots)));
        let l1 = word(at);
        places.push(("snapshot's L1 table", l1, u64::from(header.l1_size) * 8));
        l1s.push((l1, header.l1_size));
    }
    for (at, size) in l1s {
        for index in 0..u64::from(size) {
            match word(at + index * 8) & mask {
                0 => {}
                table => places.push(("L2 table", table, cluster)),
            }
        }
    }
    for index in 0..cluster / 8 {
        match word(header.refcount_table_offset + index * 8) {
            0 => {}
            block => places.push(("refcount block", block, cluster)),
        }
    }
    if let Some(bitmaps) = header.extension(extensions::BITMAPS)
        && header.autoclear & features::BITMAPS != 0
    {
        let field =
            |at: usize| u64::from_be_bytes(bitmaps[at..at + 8].try_into().expect("8 bytes"));
        places.push(("bitmap directory", field(16), field(8)));
        places.push(("bitmap table", word(field(16)), 8));
    }
    places
}

/// Damages metadata in one place, and says how.
pub fn damage(bytes: &mut [u8], rng: &mut Rng) -> String {
    // As often an L1 as an L2 table, however many there are of each.
    let mut kinds: Vec<&str> = places(bytes).iter().map(|p| p.0).collect();
    kinds.dedup();
    let kind = kinds[rng.below(kinds.len() as u64) as usize];
    damage_of(bytes, rng, kind)
}

/// Damages metadata of one kind in one place, and says how.
pub fn damage_of(bytes: &mut [u8], rng: &mut Rng, kind: &str) -> String {
    let places = places(bytes);
    let of_kind: Vec<_> = places.iter().filter(|p| p.0 == kind).collect();
    let (_, start, len) = *of_kind[rng.below(of_kind.len() as u64) as usize];
    let words = (len / 8).max(1);
    // Mostly an entry that is in use.
    let mut at = start + rng.below(words) * 8;
    for _ in 0..200 {
        let field = bytes.get(at as usize..at as usize + 8);
        if field.is_none_or(|f| f != [0; 8]) {
            break;
        }
        at = start + rng.below(words) * 8;
    }
    let Some(field) = bytes.get(at as usize..at as usize + 8) else {
        return format!("nothing at {at:#x}");
    };
    let old = u64::from_be_bytes(field.try_into().expect("8 bytes"));
    let cluster = Layout::of(&Header::parse(bytes).expect("a header")).cluster();
    let clusters = bytes.len() as u64 / cluster;
    let new = match rng.below(8) {
        0 => 0,
        1 => old & !(1 << 63),
        2 => old | 1 << 63,
        3 => (1 << 63) | (rng.below(clusters + 2) * cluster),
        4 => rng.next(),
        _ => old ^ 1 << rng.below(64),
    };
    bytes[at as usize..at as usize + 8].copy_from_slice(&new.to_be_bytes());
    format!("{kind} at {start:#x}: word at {at:#x} from {old:#x} to {new:#x}")
}

/// What `qemu-img check` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub status: i32,
    pub corruptions: u64,
    pub leaks: u64,
    pub check_errors: u64,
    pub corruptions_fixed: u64,
    pub leaks_fixed: u64,
    /// Image end, total, allocated, fragmented, compressed clusters.
    pub facts: [u64; 5],
    pub messages: String,
}

/// `qemu-img check`, with `-r WHAT` unless that is empty. `None` when it crashed or did not end.
pub fn qemu_check(image: &Path, repair: &str) -> Option<Verdict> {
    let mut command = Command::new("timeout");
    command.args(["20", "qemu-img", "check", "-f", "qcow2", "--output=json"]);
    if !repair.is_empty() {
        command.args(["-r", repair]);
    }
    let output = command.arg(image).output().expect("qemu-img runs");
    let messages = String::from_utf8_lossy(&output.stderr).into_owned();
    let status = output.status.code().filter(|code| *code < 100)?;
    let json: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    let number = |name: &str| json.get(name).and_then(Value::as_u64).unwrap_or(0);
    Some(Verdict {
        status,
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        check_errors: number("check-errors"),
        corruptions_fixed: number("corruptions-fixed"),
        leaks_fixed: number("leaks-fixed"),
        facts: [
            number("image-end-offset"),
            number("total-clusters"),
            number("allocated-clusters"),
            number("fragmented-clusters"),
            number("compressed-clusters"),
        ],
        messages,
    })
}

/// Our report in the same form.
pub fn verdict(report: &Report) -> Verdict {
    Verdict {
        status: match report {
            Report {
                check_errors: 1.., ..
            } => 1,
            Report {
                corruptions: 1.., ..
            } => 2,
            Report { leaks: 1.., .. } => 3,
            _ => 0,
        },
        corruptions: report.corruptions,
        leaks: report.leaks,
        check_errors: report.check_errors,
        corruptions_fixed: report.corruptions_fixed,
        leaks_fixed: report.leaks_fixed,
        facts: [
            report.image_end_offset,
            report.total_clusters,
            report.allocated_clusters,
            report.fragmented_clusters,
            report.compressed_clusters,
        ],
        messages: String::new(),
    }
}

/// An image file, to be written to.
pub fn open(path: &Path) -> Arc<File> {
    File::open(path, &OpenOptions::default()).expect("opens")
}

pub fn check_with(storage: &dyn Storage, repair: tool::check::Repair) -> block::Result<Report> {
    let options = tool::check::CheckOptions {
        repair,
        ..Default::default()
    };
    tool::check::check(storage, &options)
}
