//! Reading the map: where a guest range's bytes are.

use super::Qcow2;
use super::cache::Owner;
use super::entry::{Bad, Entry, FRESH, OFFSET_MASK};
use super::state::{Ask, Halt, State};
use super::tables::{Entries, Slot, Tables};
use crate::metadata::{Growing, Layout, Place, STEPS_MAX, Walk};
use crate::{Compressed, ExtentKind, FileId, Need, Plan, Step};
use block::{Error, GuestOffset, HostOffset, Result};

impl Walk for Qcow2 {
    type Bad = Bad;

    fn name(&self) -> &str {
        &self.name
    }

    #[inline]
    fn layout(&self) -> &Layout {
        &self.geometry
    }

    #[inline]
    fn tables(&self) -> &Tables {
        &self.tables
    }

    #[inline]
    fn decode_l1(&self, raw: u64) -> Result<u64, Bad> {
        self.geometry.decode_l1(raw)
    }

    #[inline]
    fn feed_slice(&self, run: &mut Growing, entries: Entries<'_>) -> Result<bool, Bad> {
        let g = &self.geometry;
        if g.extended() {
            return self.feed_extended(run, entries);
        }
        let mut at = (run.next() >> g.cluster_bits) as usize & (g.slice_entries() - 1);
        while at < g.slice_entries() {
            let skip = run.next() & (g.cluster() - 1);
            let left = run.left();
            // Clusters that the rest touches, one at least.
            let most = ((skip + left - 1) >> g.cluster_bits) + 1;
            let (raw, count) = entries.run(at, most.min(g.slice_entries() as u64) as usize);
            if count == 0 {
                return Ok(false);
            }
            let room = (((count as u64) << g.cluster_bits) - skip).min(left);
            let entry = match g.decode(raw) {
                Ok(entry) => entry,
                Err(bad) if run.len() == 0 => return Err(bad),
                Err(_) => return Ok(false),
            };
            if !run.feed(self.extent_kind(entry, skip), room) {
                return Ok(false);
            }
            if run.left() == 0 {
                return Ok(false);
            }
            at += count;
        }
        Ok(true)
    }

    fn feed_locked(&self, run: &mut Growing, place: &Place) -> Result<Step<Result<bool, Bad>>> {
        let mut st = self.lock();
        let seen = self
            .l2_entries(&mut st, place)
            .map(|entries| self.feed_slice(run, entries));
        st.step(seen)
    }

    #[cold]
    fn bad_l1(&self, index: usize, bad: Bad) -> Error {
        Error::corrupt(format!(
            "{}: L1 entry {index} at {:#x} {}",
            self.name,
            self.header.l1_table_offset + index as u64 * 8,
            bad.text()
        ))
    }

    #[cold]
    fn bad_l2(&self, cluster: u64, bad: Bad) -> Error {
        let place = self.place(cluster);
        let g = &self.geometry;
        let index = cluster & ((1 << g.l2_bits()) - 1);
        let at = (place.raw & OFFSET_MASK) + (index << (3 + g.entry_word_bits()));
        let (what, at) = match bad.in_bitmap() {
            true => ("subcluster bitmap", at + 8),
            false => ("L2 entry", at),
        };
        Error::corrupt(format!(
            "{}: {what} at {at:#x} (guest offset {:#x}) {}",
            self.name,
            cluster << g.cluster_bits,
            bad.text()
        ))
    }
}

impl Qcow2 {
    /// Where the bytes are that are `skip` bytes into the cluster of `entry`.
    #[inline]
    pub(super) fn extent_kind(&self, entry: Entry, skip: u64) -> ExtentKind {
        let file = self.geometry.guest_file();
        match entry {
            Entry::Unallocated => ExtentKind::Unallocated,
            Entry::Zero { host, .. } => ExtentKind::Zero {
                host: host.map(|host| (file, HostOffset(host + skip))),
            },
            Entry::Data { host, .. } => ExtentKind::Data {
                file,
                offset: HostOffset(host + skip),
            },
            Entry::Compressed { offset, len } => ExtentKind::Compressed(Compressed {
                file: FileId::IMAGE,
                offset: HostOffset(offset),
                // At most two clusters of 2 MiB; skips are below one.
                len: len as u32,
                unpacked_len: self.geometry.cluster() as u32,
                skip: skip as u32,
                packing: 0,
                lasting: false,
            }),
        }
    }

    /// The entries of an L2 slice whose table exists.
    fn l2_entries(&self, st: &mut State, place: &Place) -> Ask<Entries<'_>> {
        if let Some(entries) = self.tables.entries(place.slice) {
            return Ok(entries);
        }
        let g = &self.geometry;
        let span = place.slice & !(g.span_slices() - 1);
        let owner = Owner::L2(span);
        if st.cache.is_loading(owner) {
            return Err(Halt::Wait(owner.key()));
        }
        // All of the span while nothing has to leave for it.
        let (first, count) = match st.cache.vacant() as u64 > g.span_slices() {
            // At most 64.
            true => (span, g.span_slices() as u32),
            false => (place.slice, 1),
        };
        let (host, raw) = self.l2_host(first, place)?;
        let table = raw & OFFSET_MASK;
        let host = host - table + st.copies.source(place.l1, table);
        if raw & FRESH != 0 {
            // What is not in the cache was never written.
            st.cache.move_slot(&self.tables, place.slice, Slot::Empty);
            return self.tables.entries(place.slice).ok_or(Halt::Busy);
        }
        st.cache
            .start_span(&self.tables, g, span, place.slice, (first, count), host)?;
        Err(Halt::Need(Need::Load(self.load(owner, host, count))))
    }

    /// Where a slice of the table of `place` is in the file, and its table's L1 entry. Under the
    /// lock: a flush may have ended since `place` was made.
    fn l2_host(&self, slice: u64, place: &Place) -> Ask<(u64, u64)> {
        let g = &self.geometry;
        let raw = self.place(slice << g.slice_entry_bits()).raw;
        let table = g.decode_l1(raw).map_err(|bad| self.bad_l1(place.l1, bad))?;
        let within = slice & ((1 << g.slices_per_table_bits()) - 1);
        Ok((table + (within << g.slice_bits), raw))
    }

    /// The frame of an L2 slice whose table exists, to change it there.
    pub(super) fn l2_frame(&self, st: &mut State, place: &Place) -> Ask<u32> {
        if let Some(frame) = st.cache.find(&self.tables, Owner::L2(place.slice)) {
            return Ok(frame);
        }
        self.l2_entries(st, place)?;
        if let Some(frame) = st.cache.find(&self.tables, Owner::L2(place.slice)) {
            return Ok(frame);
        }
        let (host, _) = self.l2_host(place.slice, place)?;
        st.cache
            .unpack(&self.tables, &self.geometry, place.slice, host)
    }

    /// The plan for a write into clusters that are the guest's alone already. `None` when the first
    /// is not, or not in memory.
    #[inline]
    pub(super) fn plan_in_place(&self, at: GuestOffset, len: u64) -> Result<Option<Plan>> {
        self.check_range(at, len)?;
        let g = &self.geometry;
        if g.extended() {
            return Ok(self.plan_in_place_extended(at, len));
        }
        let mut host = 0;
        let mut done = 0;
        for _ in 0..STEPS_MAX {
            let place = self.place((at.0 + done) >> g.cluster_bits);
            if place.raw & super::entry::COPIED == 0 {
                break;
            }
            let start = done;
            let seen = self.tables.read(place.slice, |entries| {
                done = start;
                let mut index = place.index;
                while index < g.slice_entries() {
                    let skip = (at.0 + done) & (g.cluster() - 1);
                    let most = ((skip + len - done - 1) >> g.cluster_bits) + 1;
                    let (raw, count) =
                        entries.run(index, most.min(g.slice_entries() as u64) as usize);
                    let Ok(Entry::Data {
                        host: cluster,
                        copied: true,
                    }) = g.decode(raw)
                    else {
                        return false;
                    };
                    if count == 0 {
                        return false;
                    }
                    if done == 0 {
                        host = cluster + skip;
                    } else if host + done != cluster + skip {
                        return false;
                    }
                    done += (((count as u64) << g.cluster_bits) - skip).min(len - done);
                    if done == len {
                        return false;
                    }
                    index += count;
                }
                true
            });
            match seen {
                Some(true) => {}
                Some(false) => break,
                None => {
                    done = start;
                    break;
                }
            }
        }
        Ok((done > 0).then_some(Plan::InPlace {
            file: g.guest_file(),
            offset: HostOffset(host),
            len: done,
        }))
    }
}
