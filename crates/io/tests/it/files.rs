//! Opening: what is accepted, what is refused and how.

use crate::common;

use block::{ErrorKind, RangeKind, Storage, Zeroed};
use common::{Rig, options, pattern, scratch};
use io::{Cache, EngineKind, File, FileKind, IoOp, Lock, OpenOptions};
use std::{path::Path, process::Command};

#[test]
fn refuses_what_is_no_disk() {
    let dir = scratch();
    let open = |path: &Path| File::open(path, &OpenOptions::reading()).unwrap_err();
    assert_eq!(open(dir.path()).kind(), ErrorKind::Invalid);
    assert_eq!(open(Path::new("/dev/urandom")).kind(), ErrorKind::Invalid);
    // Empty disks to QEMU; but nothing can be written to them durably.
    for name in ["/dev/null", "/dev/zero", "/dev/full"] {
        let file = File::open(Path::new(name), &OpenOptions::reading()).unwrap();
        assert_eq!(
            (file.kind(), file.len().unwrap()),
            (FileKind::BlockDevice, 0)
        );
        let error = File::open(Path::new(name), &OpenOptions::default()).unwrap_err();
        assert!(error.to_string().contains("character device"), "{error}");
    }
    let missing = open(&dir.path().join("missing"));
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(missing.to_string().contains("missing"), "{missing}");
    let fifo = dir.path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    // Neither blocks, though nobody has the other end.
    assert!(open(&fifo).to_string().contains("pipe"));
    let error = File::open(&fifo, &OpenOptions::default()).unwrap_err();
    assert!(error.to_string().contains("pipe"));
}

#[test]
fn direct_is_in_effect_where_asked_for() {
    let dir = scratch();
    let file = File::create_new(&dir.path().join("f"), &options(Cache::None)).unwrap();
    assert!(file.direct() && file.alignment().offset >= 512);
    assert_eq!((file.kind(), file.fallback()), (FileKind::Regular, None));
    let again = File::open(&dir.path().join("f"), &options(Cache::Writeback)).unwrap();
    assert!(!again.direct());
    assert_eq!(again.alignment(), io::Alignment::NONE);
}

#[test]
fn whether_a_first_write_changes_the_file_systems_records() {
    let dir = scratch();
    let path = dir.path().join("f");
    std::fs::write(&path, [0; 4096]).unwrap();
    let open = |cache| File::open(&path, &options(cache)).unwrap();
    let unwritten = |cache| open(cache).has_unwritten_extents();
    let mut stat = Command::new("stat");
    let stat = stat.args(["-f", "-c", "%T"]).arg(&path).output().unwrap();
    let said = String::from_utf8(stat.stdout).unwrap();
    let there = ["ext2/ext3", "xfs"].contains(&said.trim());
    assert_eq!(unwritten(Cache::None), there, "{said}");
    assert_eq!(unwritten(Cache::Directsync), there, "{said}");
    // Through the page cache zeros would be one more thing to wait for.
    assert!(!unwritten(Cache::Writeback));
    // These wait for nothing.
    assert!(!unwritten(Cache::DirectUnsafe));
}

/// procfs refuses O_DIRECT on every kernel.
#[test]
fn refused_direct_is_said_or_noted() {
    let path = Path::new("/proc/self/status");
    let mut options = OpenOptions {
        cache: Cache::None,
        lock: Lock::None,
        ..OpenOptions::reading()
    };
    let error = File::open(path, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("O_DIRECT"), "{error}");
    options.direct_fallback = true;
    let file = File::open(path, &options).unwrap();
    assert!(!file.direct() && file.fallback().is_some());
    assert_eq!(file.cache(), Cache::None);
}

#[test]
fn sparse_maps_and_allocation() {
    let dir = scratch();
    let file = File::create_new(&dir.path().join("f"), &options(Cache::Writeback)).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_at(256 << 10, &[1; 4096]).unwrap();
    let mut runs = Vec::new();
    let mut at = 0;
    while let Some(run) = file.range_at(at).unwrap() {
        runs.push((run.offset, run.len, run.kind));
        at += run.len;
    }
    assert_eq!(
        runs,
        [
            (0, 256 << 10, RangeKind::Hole),
            (256 << 10, 4096, RangeKind::Data),
            (260 << 10, 764 << 10, RangeKind::Hole)
        ]
    );
    assert_eq!(file.allocate(1 << 20, 65536).unwrap(), Zeroed::Yes);
    assert_eq!(file.len().unwrap(), (1 << 20) + 65536);
    file.write_zeroes(256 << 10, 1 << 30, true).unwrap();
    assert_eq!(file.len().unwrap(), (1 << 20) + 65536, "does not grow");
    let mut bytes = [1; 4096];
    file.read_at(256 << 10, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4096]);
}

/// `Zero` and `Allocate` grow the file to the end of the range and report zeroed space.
#[test]
fn engines_grow_files() {
    for setup in common::SETUPS {
        let dir = scratch();
        let file = setup.file(dir.path(), 3);
        let mut rig = Rig::new(setup.kind);
        let slot = rig.engine.attach(&file).unwrap();
        for (op, end) in [
            (IoOp::Allocate, 10_000u64),
            (
                IoOp::Zero {
                    unmap: true,
                    fast: false,
                },
                20_000,
            ),
            (
                IoOp::Zero {
                    unmap: false,
                    fast: true,
                },
                30_000,
            ),
        ] {
            rig.other(slot, op, end - 10_000, 10_000);
            let ends = rig.finish();
            assert_eq!(ends[0].errno, 0, "{setup:?} {op:?}");
            assert!(op != IoOp::Allocate || ends[0].zeroed);
            assert_eq!(file.len().unwrap(), end, "{setup:?} {op:?}");
        }
        // A discard behind the end changes nothing.
        rig.other(slot, IoOp::Discard, 25_000, 1 << 20);
        rig.finish_ok();
        assert_eq!(file.len().unwrap(), 30_000, "{setup:?}");
    }
}

/// A loop device with 4096-byte sectors, detached when dropped.
struct Loop(String);

impl Loop {
    fn new(path: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", "4096"])
            .arg(path)
            .output();
        match output {
            Ok(output) if output.status.success() => Some(Self(
                String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            )),
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr);
                eprintln!("skipped: no loop device here: {}", why.trim());
                None
            }
            Err(e) => {
                eprintln!("skipped: losetup: {e}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn block_devices_with_large_sectors() {
    let dir = scratch();
    let backing = dir.path().join("backing");
    std::fs::write(&backing, vec![0u8; 16 << 20]).unwrap();
    let Some(device) = Loop::new(&backing) else {
        return;
    };
    for kind in [EngineKind::Threads, EngineKind::Native, EngineKind::IoUring] {
        let file = File::open(Path::new(&device.0), &options(Cache::None)).unwrap();
        assert_eq!(file.kind(), FileKind::BlockDevice);
        assert_eq!(file.len().unwrap(), 16 << 20);
        assert_eq!(file.alignment().offset, 4096);
        let mut rig = Rig::new(kind);
        let slot = rig.engine.attach(&file).unwrap();
        let data = pattern(5, 1 << 20);
        rig.write(slot, 0, &data);
        rig.finish_ok();
        // Small writes into one block, all at once.
        for i in 0..64u64 {
            rig.write(slot, 8192 + i * 64, &[i as u8; 64]);
        }
        let zero = IoOp::Zero {
            unmap: true,
            fast: false,
        };
        rig.other(slot, zero, 100_000, 50_000);
        rig.other(slot, IoOp::Discard, 300_000, 50_000);
        rig.other(slot, IoOp::Allocate, 0, 1 << 20);
        for c in rig.finish() {
            assert_eq!(c.errno, 0, "{kind}");
            assert!(!c.zeroed, "a device promises nothing about old space");
        }
        let back = rig.read(slot, 0, 300_000);
        rig.finish_ok();
        let back = rig.take(back);
        let mut expected = data[..300_000].to_vec();
        for i in 0..64 {
            expected[8192 + i * 64..8256 + i * 64].fill(i as u8);
        }
        expected[100_000..150_000].fill(0);
        assert!(back == expected, "{kind}");
        rig.other(slot, IoOp::Allocate, 16 << 20, 1);
        assert_eq!(rig.finish()[0].errno, libc::ENOSPC);
        assert!(file.set_len(17 << 20).is_err());
    }
}
