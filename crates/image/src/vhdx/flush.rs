//! The order of what a flush writes, and what a close leaves.
//!
//! ```text
//!   first write after an open   an entry in the log that says nothing                    barrier
//!                               the other header: new GUIDs for file, data and log       barrier
//!   changes of the table        data · what the last entry says, in its place            barrier
//!                               an entry in the log's other half                         barrier
//!   close                       what the last entry says, in its place · headers: no log · the file is cut
//! ```
//!
//! The specification wants the headers changed before anything else (2.2.2), so no write is planned before that flush. The
//! header names no log before there is an entry, so that a log that counts is never without one; and it does from the first
//! write on, so that whoever opens the image after a crash knows of it, and cuts off what was reserved.
//!
//! An entry is written when what it refers to is durable, and put into its place when it is: the next flush's first
//! barrier does for that, so that a flush has two. Each entry is a sequence of itself (its tail is where it is), which
//! counts from its barrier on; what the one before said is in place by then.
//!
//! **A crash** leaves the entry before or the new one, whole: what a flush said is in the log or in its place. The next writer
//! puts the entry in place ([`super::mend`]); who reads sees it so ([`super::log`]).

use super::header::Headers;
use super::log::{NewEntry, SECTOR};
use super::state::{Running, State};
use super::{Guid, MIB, Vhdx};
use crate::metadata::{carry_out, extend};
use crate::{FileId, FlushRun};
use block::{Error, ErrorKind, HostOffset, Result, Storage, align_down};
use std::sync::atomic::Ordering;

/// Flushes that a close may need: one is enough.
const FLUSHES_MAX: u32 = 4;

impl Vhdx {
    pub(super) fn begin_flush(&self, st: &mut State, run: &mut FlushRun) {
        run.clear();
        st.header_before = (st.headers.current.clone(), st.headers.index);
        let announced = self.announced.load(Ordering::Acquire);
        if st.wants_announcing && !announced {
            st.running = Running::Announcement;
            st.logging.clear();
            self.put_entry(st, run);
            run.seal();
            let [file, data, log] = st.guids;
            let (at, bytes) = st.headers.turn(|header| {
                (header.file_write, header.data_write, header.log) = (file, data, log);
            });
            run.push(FileId::IMAGE, HostOffset(at), &bytes);
            run.seal();
            return;
        }
        if !st.is_dirty() {
            run.barrier_only();
            st.running = Running::Barrier;
            return;
        }
        st.running = Running::Entry;
        let State { logging, uses, .. } = st;
        logging.clear();
        for frame in uses.dirty() {
            let Some((page, offset)) = uses
                .holds(*frame)
                .and_then(|(page, _)| Some((page, self.page_offset(page)?)))
            else {
                continue;
            };
            let _ = page;
            logging.push((offset, self.bitmaps.page(*frame)));
        }
        st.take_dirty();
        let State {
            logging, flushing, ..
        } = st;
        let table = self.layout.regions.bat.start;
        for sector in flushing.iter().copied().map(u64::from) {
            logging.push((table + sector * SECTOR as u64, self.bat.sector(sector)));
        }
        for (at, bytes) in &st.logged {
            run.push(FileId::IMAGE, HostOffset(*at), bytes);
        }
        if st.header_lags {
            let (at, bytes) = st.headers.turn(|_| {});
            run.push(FileId::IMAGE, HostOffset(at), &bytes);
        }
        run.seal();
        self.put_entry(st, run);
        run.seal();
    }

    /// Appends the log's next entry, with what is to be logged.
    fn put_entry(&self, st: &State, run: &mut FlushRun) {
        let header = &self.layout.headers.current;
        let flushed = align_down(st.space.file_bytes, MIB);
        let entry = NewEntry {
            guid: st.guids[2],
            sequence: st.sequence,
            at: st.half * (header.log_bytes / 2),
            flushed,
            last: st.space.next.min(flushed),
        };
        let start = run.bytes.len();
        entry.put(&st.logging, &mut run.bytes);
        extend(
            run,
            FileId::IMAGE,
            header.log_offset + u64::from(entry.at),
            start,
        );
    }

    pub(super) fn finish_flush(&self, st: &mut State, ok: bool) {
        let running = std::mem::replace(&mut st.running, Running::Barrier);
        if running == Running::Entry {
            st.end_dirty(ok);
        }
        if running != Running::Barrier {
            // Also one that failed may be there.
            st.sequence += 1;
        }
        if !ok {
            // Which of the two headers is sound for sure is the one that counted before.
            let sequence = st.headers.current.sequence;
            (st.headers.current, st.headers.index) = st.header_before.clone();
            st.headers.current.sequence = sequence;
            return;
        }
        match running {
            Running::Barrier => {}
            Running::Announcement => {
                st.header_lags = true;
                st.half ^= 1;
                self.announced.store(true, Ordering::Release);
            }
            Running::Entry => {
                st.header_lags = false;
                st.half ^= 1;
                std::mem::swap(&mut st.logged, &mut st.logging);
            }
        }
    }

    pub(super) fn close_blocking(&self, file: &dyn Storage) -> Result<()> {
        if self.read_only || !self.announced.load(Ordering::Acquire) {
            return Ok(());
        }
        self.flush_blocking(file)?;
        let st = &mut *self.lock();
        for (at, bytes) in &st.logged {
            file.write_at(*at, bytes)?;
        }
        file.sync()?;
        end_log(&mut st.headers, file)?;
        st.logged.clear();
        // Space that was reserved and not used.
        if st.space.end > st.space.next {
            file.set_len(st.space.next)?;
            st.space.end = st.space.next;
            st.space.file_bytes = st.space.next;
            file.sync()?;
        }
        Ok(())
    }

    /// Flushes until nothing is dirty.
    fn flush_blocking(&self, storage: &dyn Storage) -> Result<()> {
        let mut run = FlushRun::default();
        for _ in 0..FLUSHES_MAX {
            let mut st = self.lock();
            if !st.is_dirty() {
                return Ok(());
            }
            self.begin_flush(&mut st, &mut run);
            drop(st);
            let written = carry_out(&[storage], &run);
            self.finish_flush(&mut self.lock(), written.is_ok());
            written?;
        }
        let text = format!("{}: metadata stays dirty", self.name);
        Err(Error::new(ErrorKind::Io, text))
    }
}

/// Makes both headers say that nothing in the log counts. All of it is in place, durably.
pub(super) fn end_log(headers: &mut Headers, file: &dyn Storage) -> Result<()> {
    headers.update(file, |header| header.log = Guid::NONE)
}
