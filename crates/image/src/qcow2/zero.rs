//! Discarding and zeroing.
//!
//! | the cluster is | discard | zero, unmap | zero, keep |
//! |---|---|---|---|
//! | data | free | free | zero flag over the cluster |
//! | compressed, shared | free | free | free |
//! | zero over a cluster | free | free | as it is |
//! | unallocated, no backing file | as it is | as it is | as it is |
//! | unallocated, backing file | as it is | zero flag | zero flag |
//!
//! *Free* leaves the zero flag where there is a backing file, since its bytes must not show again, and
//! nothing otherwise. Version 2 has no zero flag: with a backing file a discard does nothing
//! and zeros are written. With an external data file what has data is zeroed there (`data`).

use super::Qcow2;
use super::entry::{COPIED, Entry, OFFSET_MASK, SECTOR, ZERO};
use super::state::{Ask, Deref, Halt, State};
use super::subcluster::Bitmap;
use crate::metadata::Walk;
use crate::{ZeroMode, ZeroPlan};
use block::{GuestOffset, HostOffset};

/// What becomes of one whole cluster.
pub(super) enum Change {
    /// Nothing: it is as wanted.
    Keep,
    /// The entry becomes this (the bitmap is for an extended one), and the old clusters are dereferenced.
    To(u64, Bitmap, Option<Deref>),
    /// The answer is another than a change of the table.
    Other(ZeroPlan),
}

impl Qcow2 {
    pub(super) fn plan_zeroes(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
        mode: ZeroMode,
    ) -> Ask<ZeroPlan> {
        let g = &self.geometry;
        let cluster = at.0 >> g.cluster_bits;
        let end = at.0 + len;
        let cluster_end = ((cluster + 1) << g.cluster_bits).min(g.size);
        let whole = at.0 == cluster << g.cluster_bits && end >= cluster_end;
        let busy_end = ((end.min(cluster_end) - 1) >> g.unit_bits) + 1;
        if let Some(key) = st.tickets.busy_within(at.0 >> g.unit_bits, busy_end) {
            return Err(Halt::Wait(key));
        }
        let discard = mode == ZeroMode::Discard;
        let place = self.place(cluster);
        let table = g
            .decode_l1(place.raw)
            .map_err(|bad| self.bad_l1(place.l1, bad))?;
        if table == 0 && !g.data_raw && (discard || !g.has_backing) {
            let covers = 1u64 << (g.l2_bits() + g.cluster_bits);
            let room = covers - (at.0 & (covers - 1));
            return Ok(ZeroPlan::Skip { len: len.min(room) });
        }
        if g.data_file
            && let Some(plan) = self.zero_outside(st, at, len, mode, table != 0)?
        {
            return Ok(plan);
        }
        if !whole {
            let part = len.min(cluster_end - at.0);
            if discard {
                return Ok(ZeroPlan::Skip { len: part });
            }
            if g.extended() {
                return self.zero_subclusters(st, at, part, table != 0);
            }
            if table == 0 {
                return Ok(ZeroPlan::Write { len: part });
            }
            return self.zero_part(st, at, part);
        }
        st.admit()?;
        if table == 0 && g.version < 3 {
            // Backing file, no zero flag.
            return Ok(ZeroPlan::Write {
                len: cluster_end - at.0,
            });
        }
        self.writable_table(st, &place)?;
        self.zero_clusters(st, at, len, mode)
    }

    /// Zeroes `len` bytes within one cluster whose table exists.
    fn zero_part(&self, st: &mut State, at: GuestOffset, len: u64) -> Ask<ZeroPlan> {
        let g = &self.geometry;
        let cluster = at.0 >> g.cluster_bits;
        let place = self.place(cluster);
        let frame = self.l2_frame(st, &place)?;
        let entry = g
            .decode(self.l2_raw(frame, place.index))
            .map_err(|bad| self.bad_l2(cluster, bad))?;
        Ok(match entry {
            Entry::Zero { .. } => ZeroPlan::Skip { len },
            Entry::Unallocated if !g.has_backing => ZeroPlan::Skip { len },
            Entry::Data { host, copied: true } if place.raw & COPIED != 0 => {
                self.zero_in_place(host + (at.0 & (g.cluster() - 1)), len)
            }
            _ => ZeroPlan::Write { len },
        })
    }

    /// The plan for zeroing bytes that are the guest's own at `offset`.
    pub(super) fn zero_in_place(&self, offset: u64, len: u64) -> ZeroPlan {
        match (offset | len).is_multiple_of(SECTOR) {
            true => ZeroPlan::Host {
                file: self.geometry.guest_file(),
                offset: HostOffset(offset),
                len,
            },
            false => ZeroPlan::Write { len },
        }
    }

    fn change(&self, entry: Entry, raw: u64, mode: ZeroMode, len: u64) -> Change {
        let g = &self.geometry;
        let discard = mode == ZeroMode::Discard;
        let keep = mode == ZeroMode::Zero { unmap: false };
        let flag = g.version >= 3;
        let old = match entry {
            // In a data file, what has data is zeroed there: see `data`.
            Entry::Data { host, .. } if g.data_file => {
                return Change::Other(self.zero_in_place(host, len));
            }
            Entry::Zero { .. } if g.data_file => return Change::Keep,
            Entry::Unallocated if discard || !g.has_backing => return Change::Keep,
            Entry::Zero { host: None, .. } => return Change::Keep,
            Entry::Zero { host: Some(_), .. } if keep => return Change::Keep,
            Entry::Data { copied: true, .. } if keep && flag => {
                return Change::To(raw | ZERO, Bitmap::NONE, None);
            }
            Entry::Data { host, copied: true } if !flag && (keep || g.has_backing && !discard) => {
                return Change::Other(self.zero_in_place(host, len));
            }
            entry => self.clusters_of(entry),
        };
        match (g.has_backing, flag) {
            (false, _) => Change::To(0, Bitmap::NONE, old),
            (true, true) => Change::To(ZERO, Bitmap::NONE, old),
            (true, false) if discard => Change::Keep,
            (true, false) => Change::Other(ZeroPlan::Write { len }),
        }
    }

    /// Zeroes or discards whole clusters from `at` on, within one slice of a table that exists.
    fn zero_clusters(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
        mode: ZeroMode,
    ) -> Ask<ZeroPlan> {
        let g = &self.geometry;
        let first = at.0 >> g.cluster_bits;
        let place = self.place(first);
        let frame = self.l2_frame(st, &place)?;
        // Loads of refcounts must not evict it.
        st.cache.pin(frame);
        let end = at.0 + len;
        // Whole clusters; the last one is whole when it reaches the disk's end.
        let clusters = match end == g.size {
            true => g.guest_clusters() - first,
            false => (end >> g.cluster_bits) - first,
        };
        let free = st.tickets.next_start(at.0 >> g.unit_bits) >> g.cluster_unit_bits();
        let clusters = clusters
            .min((g.slice_entries() - place.index) as u64)
            .min(free - first);
        let mut changed = false;
        let mut done = 0;
        let mut answer = None;
        while done < clusters {
            let index = place.index + done as usize;
            let start = (first + done) << g.cluster_bits;
            let bytes = (end - start).min(g.cluster());
            let change = if g.extended() {
                let cluster = self.cluster_at(frame, index, first + done);
                cluster.map(|cluster| self.change_extended(cluster, mode))
            } else {
                let raw = self.l2_raw(frame, index);
                g.decode(raw)
                    .map(|entry| self.change(entry, raw, mode, bytes))
                    .map_err(|bad| Halt::Fail(self.bad_l2(first + done, bad)))
            };
            let change = match change {
                Ok(change) => change,
                Err(halt) => {
                    answer = Some(Err(halt));
                    break;
                }
            };
            match change {
                Change::Keep => {}
                Change::To(to, bits, old) => {
                    if let Some(old) = old {
                        if let Err(halt) = st.admit().and_then(|()| self.pin_old(st, old)) {
                            answer = Some(Err(halt));
                            break;
                        }
                        self.dereference(st, old);
                    }
                    debug_assert!(to & OFFSET_MASK == 0 || to & COPIED != 0);
                    self.put_entry(st, frame, index, to, bits);
                    changed = true;
                }
                Change::Other(plan) => {
                    answer = Some(Ok(plan));
                    break;
                }
            }
            done += 1;
        }
        st.cache.unpin(frame);
        let len = (done << g.cluster_bits).min(len);
        match answer {
            // What was found in the way concerns the next call.
            Some(answer) if done == 0 => answer,
            Some(Err(Halt::Need(crate::Need::Load(load)))) => {
                // Nobody would carry out this need: give it up, to be asked for again.
                self.drop_load(st, &load);
                Ok(Self::zeroed(changed, len))
            }
            _ => Ok(Self::zeroed(changed, len)),
        }
    }

    pub(super) fn zeroed(changed: bool, len: u64) -> ZeroPlan {
        match changed {
            true => ZeroPlan::Done { len },
            false => ZeroPlan::Skip { len },
        }
    }
}
