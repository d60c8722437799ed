//! A file in memory.

use block::{Error, ErrorKind, Range, RangeKind, Result, Storage, Zeroed};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

const PAGE: u64 = 4096;

/// What was done to a [`Memory`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Calls of any kind.
    pub calls: u64,
    /// Calls that may change it.
    pub changes: u64,
    /// Bytes that room was reserved for.
    pub allocated: u64,
    /// Times that it was made durable.
    pub syncs: u64,
}

/// What somebody else does to a [`Memory`] while it is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meddling {
    /// Overwrites 8 bytes at this offset.
    Write(u64, [u8; 8]),
    /// Cuts the file, or makes it longer.
    SetLen(u64),
}

#[derive(Clone, Debug, Default)]
struct Inner {
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
    len: u64,
}

/// A sparse file in memory, on a disk that has only so much space. It may be of any length.
#[derive(Debug)]
pub struct Memory {
    inner: Mutex<Inner>,
    space: u64,
    calls: AtomicU64,
    changes: AtomicU64,
    allocated: AtomicU64,
    syncs: AtomicU64,
    calls_max: u64,
    /// What happens before which call.
    meddling: Option<(u64, Meddling)>,
}

impl Memory {
    /// A file with these bytes. Of its pages that are not zeros `space` bytes may come on top before
    /// [`ErrorKind::NoSpace`]; whoever calls more than `calls_max` times is taken to hang, and panics.
    pub fn new(bytes: &[u8], space: u64, calls_max: u64) -> Self {
        let mut inner = Inner::default();
        inner.write(0, bytes);
        inner.len = bytes.len() as u64;
        Self {
            space: space + inner.pages.len() as u64 * PAGE,
            inner: Mutex::new(inner),
            calls: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            allocated: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
            calls_max,
            meddling: None,
        }
    }

    /// The same, but before the call number `call` (from 1 on) somebody else changes the file.
    pub fn meddled(self, call: u64, meddling: Meddling) -> Self {
        Self {
            meddling: Some((call, meddling)),
            ..self
        }
    }

    /// What was done to it until now.
    pub fn done(&self) -> Done {
        Done {
            calls: self.calls.load(Ordering::Relaxed),
            changes: self.changes.load(Ordering::Relaxed),
            allocated: self.allocated.load(Ordering::Relaxed),
            syncs: self.syncs.load(Ordering::Relaxed),
        }
    }

    fn inner(&self, changes: bool) -> MutexGuard<'_, Inner> {
        let calls = 1 + self.calls.fetch_add(1, Ordering::Relaxed);
        assert!(
            calls <= self.calls_max,
            "more than {} calls",
            self.calls_max
        );
        if changes {
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        match self.meddling {
            Some((at, Meddling::Write(offset, bytes))) if at == calls => {
                inner.write(offset, &bytes);
            }
            Some((at, Meddling::SetLen(len))) if at == calls => {
                inner.set_len(len);
            }
            _ => {}
        }
        inner
    }

    fn end(offset: u64, len: u64) -> Result<u64> {
        // As the system: offsets are signed.
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= i64::MAX as u64);
        end.ok_or_else(|| Error::invalid(format!("memory: {len} bytes at {offset:#x}")))
    }
}

impl Inner {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let within = (at % PAGE) as usize;
            let (part, later) = rest.split_at(rest.len().min(PAGE as usize - within));
            let there = self.pages.contains_key(&(at / PAGE));
            if there || part != &[0; PAGE as usize][..part.len()] {
                let page = self.pages.entry(at / PAGE);
                let page = page.or_insert_with(|| Box::new([0; PAGE as usize]));
                page[within..within + part.len()].copy_from_slice(part);
            }
            at += part.len() as u64;
            rest = later;
        }
        self.len = self.len.max(at);
    }

    fn set_len(&mut self, len: u64) {
        self.zero(len, self.len);
        self.len = len;
    }

    fn zero(&mut self, offset: u64, end: u64) {
        let end = end.min(self.len);
        if end <= offset {
            return;
        }
        let touched = offset / PAGE..end.div_ceil(PAGE);
        let pages: Vec<u64> = self.pages.range(touched).map(|(page, _)| *page).collect();
        for page in pages {
            let (from, to) = (offset.max(page * PAGE), end.min((page + 1) * PAGE));
            if to - from == PAGE {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[(from - page * PAGE) as usize..(to - page * PAGE) as usize].fill(0);
            }
        }
    }
}

impl Storage for Memory {
    fn name(&self) -> String {
        "memory".into()
    }

    fn len(&self) -> Result<u64> {
        Ok(self.inner(false).len)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let inner = self.inner(false);
        if !buf.is_empty() && Self::end(offset, buf.len() as u64)? > inner.len {
            return Err(Error::corrupt(format!("memory: ends before {offset:#x}")));
        }
        buf.fill(0);
        let end = offset + buf.len() as u64;
        for (page, bytes) in inner.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = (offset.max(page * PAGE), end.min((page + 1) * PAGE));
            let part = &bytes[(from - page * PAGE) as usize..(to - page * PAGE) as usize];
            buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(part);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        Self::end(offset, buf.len() as u64)?;
        let mut inner = self.inner(true);
        if inner.pages.len() as u64 * PAGE + buf.len() as u64 > self.space {
            return Err(Error::new(ErrorKind::NoSpace, "memory: full"));
        }
        inner.write(offset, buf);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        drop(self.inner(false));
        self.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        Self::end(len, 0)?;
        self.inner(true).set_len(len);
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroed> {
        let end = Self::end(offset, len)?;
        let mut inner = self.inner(true);
        if inner.pages.len() as u64 * PAGE + len > self.space {
            return Err(Error::new(ErrorKind::NoSpace, "memory: full"));
        }
        inner.len = inner.len.max(end);
        self.allocated.fetch_add(len, Ordering::Relaxed);
        Ok(Zeroed::Yes)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<()> {
        let end = Self::end(offset, len)?;
        self.inner(true).zero(offset, end);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn range_at(&self, offset: u64) -> Result<Option<Range>> {
        let inner = self.inner(false);
        if offset >= inner.len {
            return Ok(None);
        }
        let (first, last) = (offset / PAGE, inner.len.div_ceil(PAGE));
        let there = |page: u64| inner.pages.contains_key(&page);
        let (kind, page) = match there(first) {
            true => (RangeKind::Data, (first..last).find(|page| !there(*page))),
            false => {
                let next = inner.pages.range(first..).next();
                (RangeKind::Hole, next.map(|(page, _)| *page))
            }
        };
        let end = page.map_or(inner.len, |page| (page * PAGE).min(inner.len));
        let len = end - offset;
        Ok(Some(Range { offset, len, kind }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparse_file_is_a_file() {
        let file = Memory::new(&[7; 5000], 1 << 20, 100);
        assert_eq!(file.len().unwrap(), 5000);
        file.write_at(1 << 50, b"far").unwrap();
        let mut buf = [1; 6];
        file.read_at((1 << 50) - 3, &mut buf).unwrap();
        assert_eq!(&buf, b"\0\0\0far");
        let hole = file.range_at(8192).unwrap().unwrap();
        assert_eq!((hole.kind, hole.len), (RangeKind::Hole, (1 << 50) - 8192));
        file.write_zeroes(10, 4990, true).unwrap();
        let mut buf = [1; 5001];
        file.read_at(0, &mut buf).unwrap();
        assert!(buf[..10] == [7; 10] && buf[10..].iter().all(|byte| *byte == 0));
        file.set_len(5).unwrap();
        file.set_len(100).unwrap();
        file.read_at(0, &mut buf[..100]).unwrap();
        assert!(buf[..5] == [7; 5] && buf[5..100] == [0; 95]);
        assert!(file.read_at(50, &mut buf[..51]).is_err());
        let full = file.write_at(0, &vec![1; 2 << 20]).unwrap_err();
        assert_eq!(full.kind(), ErrorKind::NoSpace);
        assert_eq!(file.done().changes, 5);
    }
}
