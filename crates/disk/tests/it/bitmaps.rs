//! Persistent bitmaps of a disk whose queues write at the same time, and whose writes join allocations.

use crate::common;

use block::Op;
use common::{Rig, arg, open, pattern, qemu_create, run};
use disk::DiskOptions;
use image::{
    Format,
    qcow2::bitmap::{Bits, list, load},
};
use io::{EngineKind, File, OpenOptions};
use std::sync::Arc;

const SIZE: u64 = 8 << 20;
const SECTOR: u64 = 512;

fn runs(bits: &Bits) -> Vec<(u64, u64)> {
    let mut at = 0;
    let next = || {
        let run = bits.next_dirty(at)?;
        at = run.1;
        Some(run)
    };
    std::iter::from_fn(next).collect()
}

#[test]
fn every_change_of_every_queue_is_noted_and_no_other() {
    let dir = common::dir();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, pattern(SIZE as usize, 1)).unwrap();
    for options in ["", "cluster_size=4096", "extended_l2=on"] {
        let path = dir.path().join(format!("top{}.qcow2", options.len()));
        qemu_create(&path, options, Some((&base, "raw")), SIZE);
        run(
            "qemu-img",
            &["bitmap", "--add", "-g", "512", arg(&path), "b"],
        );
        let disk = open(&path, Format::Qcow2, DiskOptions::default());
        let want = Arc::new(Bits::new(SIZE, 9).unwrap());
        let threads: Vec<_> = (0..2u64)
            .map(|thread| {
                let (disk, want) = (Arc::clone(&disk), Arc::clone(&want));
                std::thread::spawn(move || {
                    let mut rig = Rig::new(&disk, EngineKind::Threads, 64);
                    let mut random = common::Random(100 + thread);
                    for _ in 0..30 {
                        let near = random.below(SIZE / SECTOR - 600);
                        for _ in 0..12 {
                            // Neighbours that arrive together join one allocation.
                            let at = (near + random.below(256)) * SECTOR;
                            let len = (1 + random.below(4)) * SECTOR;
                            let op = match random.below(8) {
                                0 => Op::Discard,
                                1 => Op::WriteZeroes {
                                    unmap: true,
                                    fast: false,
                                    fua: false,
                                },
                                2 => Op::Read,
                                _ => Op::Write { fua: false },
                            };
                            let data = match op {
                                Op::Write { .. } => pattern(len as usize, at),
                                _ => Vec::new(),
                            };
                            rig.submit(op, at, data, len, &[]);
                            if op != Op::Read {
                                want.mark(at, len);
                            }
                        }
                        assert!(rig.drain().iter().all(|ended| ended.result.is_ok()));
                    }
                    rig.detach();
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(disk.statistics().joins > 10, "{}", disk.statistics().joins);
        disk.close().unwrap();
        drop(disk);
        let file = File::open(
            &path,
            &OpenOptions {
                read_only: true,
                ..OpenOptions::default()
            },
        );
        let file = file.unwrap();
        assert!(!list(&*file).unwrap()[0].in_use());
        let found = load(&*file, b"b").unwrap();
        assert_eq!(runs(&found), runs(&want), "{options}");
        drop(file);
        run("qemu-img", &["check", "-q", "-f", "qcow2", arg(&path)]);
    }
}
