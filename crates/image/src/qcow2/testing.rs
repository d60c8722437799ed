//! What the tests of this module share: a file in memory that can crash, and the plainest driver.

use super::close::read_short;
use super::{CreateOptions, OpenOptions, Qcow2, create};
use crate::{
    Allocation, ExtentKind, Fill, FlushRun, Foreseen, Freed, Image, Need, Plan, Step, Ticket,
    ZeroMode, ZeroPlan,
};
use block::{Error, GuestOffset, Range, RangeKind, Result, Storage, Zeroed};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

/// One change of a [`MemFile`] that a crash may undo until the next barrier.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Write(u64, Vec<u8>),
    Len(u64),
    Sync,
}

#[derive(Debug, Default)]
struct Inner {
    bytes: Vec<u8>,
    journal: Option<Vec<Change>>,
    writes_left: Option<u32>,
}

/// Where a [`MemFile`] is full.
const LEN_MAX: u64 = 256 << 20;

/// A file in memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemFile(Arc<Mutex<Inner>>);

impl MemFile {
    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        let file = Self::default();
        file.0.lock().unwrap().bytes = bytes;
        file
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().bytes.clone()
    }

    pub(crate) fn patch(&self, at: usize, bytes: &[u8]) {
        self.0.lock().unwrap().bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn word(&self, at: u64) -> u64 {
        super::open::word_of(&self.0.lock().unwrap().bytes[at as usize..at as usize + 8])
    }

    /// Notes all changes from here on.
    pub(crate) fn record(&self) {
        self.0.lock().unwrap().journal = Some(Vec::new());
    }

    pub(crate) fn journal(&self) -> Vec<Change> {
        self.0.lock().unwrap().journal.clone().unwrap_or_default()
    }

    /// Lets so many writes succeed, then none.
    pub(crate) fn fail_after(&self, writes: Option<u32>) {
        self.0.lock().unwrap().writes_left = writes;
    }

    fn change(&self, change: Change) -> Result<()> {
        let mut inner = self.0.lock().unwrap();
        let end = match &change {
            Change::Write(at, data) => at.saturating_add(data.len() as u64),
            Change::Len(len) => *len,
            Change::Sync => 0,
        };
        if end > LEN_MAX {
            return Err(Error::new(block::ErrorKind::NoSpace, "the file is full"));
        }
        if let Some(left) = &mut inner.writes_left {
            *left = left
                .checked_sub(1)
                .ok_or_else(|| Error::new(block::ErrorKind::Io, "injected"))?;
        }
        apply(&mut inner.bytes, &change);
        if let Some(journal) = &mut inner.journal {
            journal.push(change);
        }
        Ok(())
    }
}

/// Carries `change` out on `bytes`.
pub(crate) fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(at, data) => {
            let end = *at as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[end - data.len()..end].copy_from_slice(data);
        }
        Change::Len(len) => bytes.resize(*len as usize, 0),
        Change::Sync => {}
    }
}

impl Storage for MemFile {
    fn name(&self) -> String {
        "test.qcow2".into()
    }

    fn len(&self) -> Result<u64> {
        Ok(self.0.lock().unwrap().bytes.len() as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let inner = self.0.lock().unwrap();
        let at = offset as usize;
        let from = inner.bytes.get(at..at + buf.len());
        buf.copy_from_slice(from.ok_or_else(|| Error::corrupt("the file ends before"))?);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.change(Change::Write(offset, buf.to_vec()))
    }

    fn sync(&self) -> Result<()> {
        self.change(Change::Sync)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(Change::Len(len))
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroed> {
        if self.len()? < offset + len {
            self.change(Change::Len(offset + len))?;
        }
        Ok(Zeroed::Yes)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<()> {
        let len = len.min(self.len()?.saturating_sub(offset));
        self.change(Change::Write(offset, vec![0; len as usize]))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn range_at(&self, offset: u64) -> Result<Option<Range>> {
        let len = self.len()?.saturating_sub(offset);
        Ok((len > 0).then_some(Range {
            offset,
            len,
            kind: RangeKind::Data,
        }))
    }
}

/// A small generator with a seed: the same runs again on every machine.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// Bytes that differ from sector to sector, the first of which are not zeros.
    pub(crate) fn bytes(&mut self, len: u64) -> Vec<u8> {
        let value = self.below(255) as u8 + 1;
        (0..len).map(|i| value ^ (i >> 9) as u8).collect()
    }
}

/// An image on a [`MemFile`], driven call by call.
#[derive(Debug)]
pub(crate) struct Driver<I = Qcow2> {
    pub(crate) file: MemFile,
    pub(crate) image: I,
    pub(crate) backing: Vec<u8>,
    /// Whether freed space is punched, so that it reads as zeros.
    pub(crate) punch: bool,
    /// Whether new space at the end of the file is known to read as zeros.
    pub(crate) zeroed: bool,
    /// Barriers of flushes so far.
    pub(crate) barriers: usize,
    run: FlushRun,
}

impl Driver {
    pub(crate) fn create(options: &CreateOptions, open: &OpenOptions) -> Self {
        let file = MemFile::default();
        create(&file, options).unwrap();
        Self::open(file, open)
    }

    pub(crate) fn open(file: MemFile, open: &OpenOptions) -> Self {
        let image = Qcow2::open(&file, open).unwrap();
        Self::of(file, image)
    }
}

impl<I: Image> Driver<I> {
    pub(crate) fn of(file: MemFile, image: I) -> Self {
        Self {
            file,
            image,
            backing: Vec::new(),
            punch: true,
            zeroed: true,
            barriers: 0,
            run: FlushRun::default(),
        }
    }

    pub(crate) fn need(&mut self, need: Need) -> Result<()> {
        match need {
            Need::Load(load) => {
                let bytes = read_short(&self.file, load.offset.0, load.len as usize);
                match bytes {
                    Ok(bytes) => self.image.loaded(&load, &bytes),
                    Err(error) => {
                        self.image.load_failed(&load);
                        Err(error)
                    }
                }
            }
            Need::Reserve(reserve) => match self.file.allocate(reserve.offset.0, reserve.len) {
                Ok(_) => {
                    let zeroed = if self.zeroed { Zeroed::Yes } else { Zeroed::No };
                    if !self.zeroed {
                        // What is not known to be zeros is not: old bytes of a device, say.
                        let junk = vec![0xa5; reserve.len as usize];
                        self.file.write_at(reserve.offset.0, &junk)?;
                    }
                    self.image.reserved(&reserve, zeroed);
                    Ok(())
                }
                Err(error) => {
                    self.image.reserve_failed(&reserve);
                    Err(error)
                }
            },
            Need::Commit => self.flush(),
        }
    }

    /// Does what the image asks for before it is lacking.
    pub(crate) fn foreseen(&mut self, soon: Foreseen) -> Result<()> {
        match soon {
            Foreseen::Reserve(reserve) => self.need(Need::Reserve(reserve)),
            Foreseen::Commit => self.flush(),
            Foreseen::Prewrite(prewrite) => {
                let zeros = vec![0; prewrite.len as usize];
                let written = self.file.write_at(prewrite.offset.0, &zeros);
                self.image.prewritten(&prewrite, written.is_ok());
                written
            }
        }
    }

    /// Asks until the image answers.
    pub(crate) fn ask<T>(&mut self, ask: impl Fn(&I) -> Result<Step<T>>) -> Result<T> {
        for _ in 0..10_000 {
            match ask(&self.image)? {
                Step::Done(answer) => return Ok(answer),
                Step::Need(need) => self.need(need)?,
                Step::Wait(key) => panic!("waits for {key:?}, but nothing is in flight"),
            }
        }
        panic!("asks without an end");
    }

    pub(crate) fn read(&mut self, at: u64, len: u64) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        while (out.len() as u64) < len {
            let pos = at + out.len() as u64;
            let left = len - out.len() as u64;
            let extent = self.ask(|i| i.map(GuestOffset(pos), left))?;
            assert!(extent.len > 0 && extent.len <= left, "{extent:?}");
            let n = extent.len as usize;
            match extent.kind {
                ExtentKind::Data { offset, .. } => {
                    out.extend(read_short(&self.file, offset.0, n)?);
                }
                ExtentKind::Untouched => panic!("formats have no such extents"),
                ExtentKind::Zero { .. } => out.resize(out.len() + n, 0),
                ExtentKind::Unallocated => {
                    let from = (pos as usize).min(self.backing.len());
                    let end = (pos as usize + n).min(self.backing.len());
                    out.extend(&self.backing[from..end]);
                    out.resize(out.len() + n - (end - from), 0);
                }
                ExtentKind::Compressed(c) => {
                    let input = read_short(&self.file, c.offset.0, c.len as usize)?;
                    let mut unpacked = vec![0; c.unpacked_len as usize];
                    self.image.decompress(&c, &input, &mut unpacked)?;
                    out.extend(&unpacked[c.skip as usize..c.skip as usize + n]);
                }
            }
        }
        Ok(out)
    }

    /// Plans the first part of a write, and writes its data and fill; not committed.
    pub(crate) fn start_write(&mut self, at: u64, data: &[u8]) -> Result<(u64, Option<Ticket>)> {
        let plan = self.ask(|i| i.plan_write(GuestOffset(at), data.len() as u64))?;
        match plan {
            Plan::InPlace { offset, len, .. } => {
                self.file.write_at(offset.0, &data[..len as usize])?;
                Ok((len, None))
            }
            Plan::Allocate(a) => {
                let written = self.fill(at, data, &a);
                if let Err(error) = written {
                    self.image.abort(a.ticket);
                    return Err(error);
                }
                Ok((a.write_len, Some(a.ticket)))
            }
            Plan::Drop { .. } => unreachable!("formats keep what is written"),
        }
    }

    fn fill(&mut self, at: u64, data: &[u8], a: &Allocation) -> Result<()> {
        let (start, end) = (a.start.0, a.start.0 + a.len);
        let data_end = at + a.write_len;
        assert!(start <= at && a.write_len >= 1 && data_end <= end);
        let size = self.image.size();
        for (from, to) in [(start, at), (data_end, end)] {
            let bytes = match a.fill {
                _ if from == to => continue,
                Fill::Nothing => continue,
                Fill::Zero if a.zeroed => continue,
                Fill::Zero => vec![0; (to - from) as usize],
                Fill::Existing => {
                    let there = to.min(size).saturating_sub(from);
                    let mut bytes = self.read(from, there)?;
                    bytes.resize((to - from) as usize, 0);
                    bytes
                }
            };
            self.file.write_at(a.host.0 + (from - start), &bytes)?;
        }
        let data = &data[..a.write_len as usize];
        self.file.write_at(a.host.0 + (at - start), data)
    }

    pub(crate) fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < data.len() {
            let (len, ticket) = self.start_write(at + done as u64, &data[done..])?;
            if let Some(ticket) = ticket {
                self.image.commit(ticket);
            }
            done += len as usize;
        }
        Ok(())
    }

    /// A random change, of up to `len_max` bytes, of the disk and of `model`, which has its bytes.
    pub(crate) fn change(&mut self, model: &mut [u8], rng: &mut Rng, len_max: u64) {
        let sectors = model.len() as u64 / 512;
        let first = rng.below(sectors);
        let count = (1 + rng.below(len_max / 512)).min(sectors - first);
        let (at, len) = (first * 512, count * 512);
        let part = &mut model[at as usize..(at + len) as usize];
        match rng.below(8) {
            0 => {
                self.zero(at, len, ZeroMode::Zero { unmap: true }).unwrap();
                part.fill(0);
            }
            1 => {
                self.zero(at, len, ZeroMode::Discard).unwrap();
                // It may be zeros now, or what it was.
                let now = self.read(at, len).unwrap();
                for (new, old) in now.chunks(512).zip(part.chunks(512)) {
                    assert!(new == old || new.iter().all(|b| *b == 0));
                }
                part.copy_from_slice(&now);
            }
            2 => self.flush().unwrap(),
            _ => {
                let data = rng.bytes(len);
                self.write(at, &data).unwrap();
                part.copy_from_slice(&data);
            }
        }
    }

    pub(crate) fn zero(&mut self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let mut done = 0;
        while done < len {
            let pos = at + done;
            let plan = self.ask(|i| i.plan_zero(GuestOffset(pos), len - done, mode))?;
            done += match plan {
                ZeroPlan::Done { len } | ZeroPlan::Skip { len } => len,
                ZeroPlan::Host { offset, len, .. } => {
                    self.file.write_at(offset.0, &vec![0; len as usize])?;
                    len
                }
                ZeroPlan::Write { len } => {
                    self.write(pos, &vec![0; len as usize])?;
                    len
                }
            };
            assert!(done <= len, "{plan:?}");
        }
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        let mut run = std::mem::take(&mut self.run);
        self.image.flush_begin(&mut run)?;
        assert!(!run.stages.is_empty());
        self.barriers += run.stages.len();
        let written = run.stages.iter().try_for_each(|stage| {
            for w in &run.writes[stage.first..stage.end] {
                assert!(w.offset.0 % 512 == 0 && w.len % 512 == 0 && w.len > 0);
                self.file
                    .write_at(w.offset.0, &run.bytes[w.start..w.start + w.len])?;
            }
            self.file.sync()
        });
        self.image.flush_end(&mut run, written.is_ok());
        self.run = run;
        written?;
        self.recycle()
    }

    fn recycle(&mut self) -> Result<()> {
        let mut freed: Vec<Freed> = Vec::new();
        self.image.take_freed(&mut freed);
        for f in freed {
            let zeroed = if self.punch {
                self.file.discard(f.offset.0, f.len)?;
                Zeroed::Yes
            } else {
                Zeroed::No
            };
            self.image.release(&f, zeroed);
        }
        Ok(())
    }

    pub(crate) fn close(mut self) -> Vec<u8> {
        self.flush().unwrap();
        self.image.close(&[&self.file]).unwrap();
        assert!(!self.image.is_dirty());
        self.file.bytes()
    }
}

/// Every file that a crash may leave: the writes up to some point, of those since the last barrier some subset,
/// one of them torn.
pub(crate) fn crashes(before: &[u8], journal: &[Change], mut each: impl FnMut(&[u8])) {
    let mut rng = Rng(5);
    let mut durable = before.to_vec();
    let mut since: Vec<&Change> = Vec::new();
    for change in journal {
        if matches!(change, Change::Sync) {
            for change in since.drain(..) {
                apply(&mut durable, change);
            }
            each(&durable);
            continue;
        }
        since.push(change);
        let mut some = durable.clone();
        for change in &since {
            match (rng.below(3), change) {
                (0, _) => {}
                (1, Change::Write(at, data)) => {
                    // Torn between two sectors.
                    let sectors = data.len().div_ceil(512) as u64;
                    let kept = (rng.below(sectors + 1) as usize * 512).min(data.len());
                    apply(&mut some, &Change::Write(*at, data[..kept].to_vec()));
                }
                _ => apply(&mut some, change),
            }
        }
        each(&some);
    }
}

/// What `qemu-img check` says of an image.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Checked {
    Clean,
    Leaks,
    Errors(String),
}

pub(crate) fn check(path: &Path) -> Checked {
    check_as("qcow2", path)
}

/// What `qemu-img check` says of an image of some format.
pub(crate) fn check_as(format: &str, path: &Path) -> Checked {
    let out = Command::new("qemu-img")
        .args(["check", "-f", format])
        .arg(path)
        .output()
        .expect("qemu-img runs");
    match out.status.code() {
        Some(0) => Checked::Clean,
        Some(3) => Checked::Leaks,
        code => Checked::Errors(format!(
            "{code:?}: {}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        )),
    }
}

/// Runs a tool that must succeed.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().expect(program);
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(out.status.success(), "{program} {args:?}: {text}");
    text
}

/// What QEMU reads of the image of `format` in `bytes`, which lies over nothing.
pub(crate) fn by_qemu(format: &str, bytes: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let [from, to] = ["image", "out.raw"].map(|name| dir.path().join(name));
    std::fs::write(&from, bytes).unwrap();
    let paths = [from.to_str().unwrap(), to.to_str().unwrap()];
    let args = ["convert", "-f", format, "-O", "raw", paths[0], paths[1]];
    run("qemu-img", &args);
    std::fs::read(&to).unwrap()
}
