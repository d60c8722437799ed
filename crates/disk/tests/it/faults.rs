//! Every single operation on the host fails once, each in a run of its own: the request (or flush) that needed it
//! fails, the next try succeeds, and the image is what it would have been without the failure.

use crate::peer;

use block::{Error, ErrorKind, Range, RangeKind, Result, Storage, Zeroed};
use disk::blocking::{Driver, Member};
use image::{
    Raw,
    qcow2::{CreateOptions, OpenOptions, Qcow2, create},
};
use peer::{Model, Op, Random, check, qemu_reads, random_op};
use std::{
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

/// A file in memory whose `fails_at`th call fails.
#[derive(Debug)]
struct Faulty {
    bytes: Mutex<Vec<u8>>,
    calls: AtomicU64,
    fails_at: AtomicU64,
    /// What the failed call was.
    failed: Mutex<Option<&'static str>>,
}

impl Faulty {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            calls: AtomicU64::new(0),
            fails_at: AtomicU64::new(u64::MAX),
            failed: Mutex::new(None),
        })
    }

    fn call(&self, what: &'static str) -> Result<()> {
        if self.calls.fetch_add(1, Ordering::Relaxed) != self.fails_at.load(Ordering::Relaxed) {
            return Ok(());
        }
        *self.failed.lock().unwrap() = Some(what);
        let kind = match what {
            "allocate" | "write" => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Err(Error::new(kind, format!("injected: {what}")))
    }
}

impl Storage for Faulty {
    fn name(&self) -> String {
        "faulty".into()
    }
    fn len(&self) -> Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.call("read")?;
        let at = offset as usize;
        let bytes = self.bytes.lock().unwrap();
        let part = bytes.get(at..at + buf.len());
        buf.copy_from_slice(part.ok_or_else(|| Error::corrupt("the file ends before"))?);
        Ok(())
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let failed = self.call("write");
        // Half of what fails is there all the same.
        let buf = match failed {
            Ok(()) => buf,
            Err(_) => &buf[..buf.len() / 2],
        };
        let mut bytes = self.bytes.lock().unwrap();
        let end = offset as usize + buf.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(buf);
        failed
    }
    fn sync(&self) -> Result<()> {
        self.call("sync")
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.call("set_len")?;
        self.bytes.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }
    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroed> {
        self.call("allocate")?;
        let mut bytes = self.bytes.lock().unwrap();
        let end = (offset + len) as usize;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        Ok(Zeroed::Yes)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Result<()> {
        self.call("write_zeroes")?;
        let mut bytes = self.bytes.lock().unwrap();
        let end = bytes.len().min((offset + len) as usize);
        if let Some(part) = bytes.get_mut(offset as usize..end) {
            part.fill(0);
        }
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.call("discard")?;
        // Not needed means that it may hold anything.
        let mut bytes = self.bytes.lock().unwrap();
        let end = bytes.len().min((offset + len) as usize);
        if let Some(part) = bytes.get_mut(offset as usize..end) {
            part.fill(0xdd);
        }
        Ok(())
    }
    fn range_at(&self, offset: u64) -> Result<Option<Range>> {
        let len = self.len()?.saturating_sub(offset);
        let kind = RangeKind::Data;
        Ok((len > 0).then_some(Range { offset, len, kind }))
    }
}

const BASE_BYTES: u64 = 100 << 10;
const DISK_BYTES: u64 = 150 << 10;

/// Seeds of images with subclusters.
const EXTENDED: [u64; 3] = [7, 8, 10];

fn options(seed: u64, backing: bool) -> CreateOptions {
    if EXTENDED.contains(&seed) {
        return CreateOptions {
            size: DISK_BYTES,
            cluster_size: if seed == 8 { 64 << 10 } else { 16 << 10 },
            extended_l2: true,
            backing: backing.then(|| ("base".into(), "raw".into())),
            ..CreateOptions::default()
        };
    }
    CreateOptions {
        size: DISK_BYTES,
        version: if seed.is_multiple_of(3) { 2 } else { 3 },
        cluster_size: [512, 1024, 4096][(seed % 3) as usize],
        backing: backing.then(|| ("base".into(), "raw".into())),
        ..CreateOptions::default()
    }
}

/// The same operations each time, each again when it failed. How often it failed, and what is in the file then.
fn run(seed: u64, backing: bool, fails_at: u64, model: &mut Model) -> (Vec<u8>, u64, Arc<Faulty>) {
    let mut random = Random::new(seed);
    let created = Faulty::new(Vec::new());
    create(&*created, &options(seed, backing)).unwrap();
    let file = Faulty::new(created.bytes.lock().unwrap().clone());
    let image = Qcow2::open(&*file, &OpenOptions::default()).unwrap();
    // Opening is not what is tested: it would just fail.
    file.calls.store(0, Ordering::Relaxed);
    file.fails_at.store(fails_at, Ordering::Relaxed);
    let mut members = vec![Member {
        image: Arc::new(image),
        files: vec![file.clone()],
    }];
    if backing {
        let base = Faulty::new(base_bytes());
        members.push(Member {
            image: Arc::new(Raw::open(&*base).unwrap()),
            files: vec![base],
        });
    }
    let mut driver = Driver::new(members, false).unwrap();
    let mut failures = 0;
    for _ in 0..60 {
        let cluster = options(seed, backing).cluster_size;
        let op = random_op(&mut random, DISK_BYTES, cluster, 512);
        let mut once = |driver: &mut Driver| match op {
            Op::Write { at, len, pattern } => driver.write(at, &vec![pattern; len as usize]),
            Op::Zero { at, len, unmap } => driver.write_zeroes(at, len, unmap),
            Op::Discard { at, len } => driver.discard(at, len),
            Op::Read { at, len } => {
                let mut buf = vec![0xa5; len as usize];
                driver.read(at, &mut buf).map(|()| {
                    model
                        .check(at, &buf)
                        .unwrap_or_else(|e| panic!("{op:?}: {e}"))
                })
            }
            Op::Flush => driver.flush(),
        };
        if let Err(error) = once(&mut driver) {
            failures += 1;
            assert!(error.to_string().contains("injected"), "{op:?}: {error}");
            once(&mut driver).unwrap_or_else(|e| panic!("{op:?} again: {e}"));
        }
        model.apply(op);
    }
    if let Err(error) = driver.flush() {
        failures += 1;
        assert!(error.to_string().contains("injected"), "flush: {error}");
        driver.flush().unwrap();
    }
    let before_close = file.calls.load(Ordering::Relaxed);
    if let Err(error) = driver.close() {
        // Closing again is a matter of opening again: the image must be good as it is, leaks aside.
        failures += 1;
        assert!(error.to_string().contains("injected"), "close: {error}");
    }
    if file.failed.lock().unwrap().is_some() && before_close > fails_at {
        // Holes may be missing without anybody being told, and where there is not so much room less may do; nothing else.
        let what = file.failed.lock().unwrap().unwrap();
        assert!(
            failures == 1 || matches!(what, "write_zeroes" | "allocate"),
            "{what} was swallowed"
        );
    }
    let bytes = file.bytes.lock().unwrap().clone();
    (bytes, before_close, file)
}

fn base_bytes() -> Vec<u8> {
    (0..BASE_BYTES)
        .map(|at| (at / 512 % 251) as u8 + 1)
        .collect()
}

fn every_call_fails_once(seed: u64, backing: bool) {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    fs::write(dir.join("base"), base_bytes()).unwrap();
    let start = || {
        let mut model = Model::new(DISK_BYTES);
        if backing {
            model.bytes[..BASE_BYTES as usize].copy_from_slice(&base_bytes());
        }
        model
    };
    let (_, _, file) = run(seed, backing, u64::MAX, &mut start());
    let calls = file.calls.load(Ordering::Relaxed);
    assert!(calls > 40, "{calls}");
    let mut kinds = std::collections::BTreeSet::new();
    for fails_at in 0..calls {
        let mut model = start();
        let (bytes, before_close, file) = run(seed, backing, fails_at, &mut model);
        let failed = file.failed.lock().unwrap().unwrap();
        kinds.insert(failed);
        // In memory the check is cheap: QEMU looks at some of them only, and at all kinds.
        if fails_at % 5 == seed % 5 || fails_at >= before_close {
            fs::write(dir.join("disk"), bytes).unwrap();
            if fails_at < before_close {
                check(dir, "disk");
            } else {
                peer::check_allowing_leaks(dir, "disk");
            }
            qemu_reads(dir, "qcow2", "disk", &mut model);
        }
    }
    for kind in ["write", "sync", "allocate"] {
        assert!(kinds.contains(kind), "no {kind} failed: {kinds:?}");
    }
}

#[test]
fn alone() {
    for seed in 0..3 {
        every_call_fails_once(seed, false);
    }
}

#[test]
fn on_a_base() {
    for seed in 3..6 {
        every_call_fails_once(seed, true);
    }
}

#[test]
fn with_subclusters() {
    for (seed, backing) in EXTENDED.into_iter().zip([false, true, true]) {
        every_call_fails_once(seed, backing);
    }
}
