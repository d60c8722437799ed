//! What a simulated disk holds: pages that copies share until one changes them.

use std::collections::BTreeMap;
use std::sync::Arc;

const PAGE: u64 = 4096;

/// Bytes; pages that were never written are zeros.
#[derive(Clone, Debug, Default)]
pub(crate) struct Content {
    pages: BTreeMap<u64, Arc<[u8; PAGE as usize]>>,
    pub(crate) size: u64,
}

impl Content {
    fn each(offset: u64, len: usize, mut f: impl FnMut(u64, usize, usize, usize)) {
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let n = (len - done).min(PAGE as usize - within);
            f(at / PAGE, within, done, n);
            done += n;
        }
    }

    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let n = (self.size.saturating_sub(offset)).min(buf.len() as u64) as usize;
        Self::each(offset, n, |page, within, done, n| {
            match self.pages.get(&page) {
                Some(bytes) => buf[done..done + n].copy_from_slice(&bytes[within..within + n]),
                None => buf[done..done + n].fill(0),
            }
        });
        n
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        Self::each(offset, data.len(), |page, within, done, n| {
            let bytes = self
                .pages
                .entry(page)
                .or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(bytes)[within..within + n].copy_from_slice(&data[done..done + n]);
        });
        self.size = self.size.max(offset + data.len() as u64);
    }

    pub(crate) fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let touched: Vec<u64> = self
            .pages
            .range(offset / PAGE..end.div_ceil(PAGE))
            .map(|(page, _)| *page)
            .collect();
        for page in touched {
            let start = page * PAGE;
            if offset <= start && start + PAGE <= end {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                let from = offset.saturating_sub(start) as usize;
                let to = (end - start).min(PAGE) as usize;
                Arc::make_mut(bytes)[from..to].fill(0);
            }
        }
    }

    pub(crate) fn resize(&mut self, len: u64) {
        if len < self.size {
            self.zero(len, self.size - len);
        }
        self.size = len;
    }

    /// The run of data or hole at `offset`, up to `len` at most: where it ends, and whether it is data.
    pub(crate) fn sparse_run(&self, offset: u64, len: u64) -> (u64, bool) {
        let there = |page: u64| self.pages.contains_key(&page);
        let first = offset / PAGE;
        let data = there(first);
        let end = if data {
            (first..).find(|p| !there(*p)).unwrap_or(first + 1) * PAGE
        } else {
            let next = self.pages.range(first..).next();
            next.map_or(len, |(page, _)| page * PAGE)
        };
        (end.min(len), data)
    }
}
