//! Discarding and zeroing.
//!
//! | the cluster is | discard | zero |
//! |---|---|---|
//! | data | punched in place | zeroed in place |
//! | zeros, or unallocated without a backing file | as it is | as it is |
//! | compressed | as it is | zeros are written |
//! | unallocated, backing file | as it is | entry 1; of a part, or without such entries: zeros are written |
//!
//! A cluster of data keeps its place: the format could not note that it is free.

use super::Appended;
use super::map::Entry;
use super::state::State;
use crate::metadata::{Ask, Halt, Walk, ZERO};
use crate::{ZeroMode, ZeroPlan};
use block::{GuestOffset, HostOffset};

/// Unit of changes in place.
const SECTOR: u64 = 512;

/// What is to be done with a cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Keep,
    /// Its entry becomes 1.
    Mark,
    /// Zeros are written, which allocates it.
    Write,
    /// At this place of the file.
    Host(u64),
}

impl Appended {
    pub(super) fn plan_zeroes(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
        mode: ZeroMode,
    ) -> Ask<ZeroPlan> {
        // Since the caller asked, a load may have shown the damage.
        self.check_writable()?;
        let g = &self.layout;
        let cluster = at.0 >> g.cluster_bits;
        let place = self.place(cluster);
        let slice_end = (cluster - place.index as u64 + g.slice_entries() as u64) << g.cluster_bits;
        let end = (at.0 + len).min(slice_end);
        let end_cluster = ((end - 1) >> g.cluster_bits) + 1;
        if let Some(key) = st.tickets.busy(cluster) {
            return Err(Halt::Wait(key));
        }
        let end_cluster = end_cluster.min(st.tickets.next_start(cluster));
        let reads_zeros = mode == ZeroMode::Discard || !self.has_backing;
        let table = self
            .decode_l1(place.raw)
            .map_err(|bad| self.bad_l1(place.l1, bad))?;
        if table == 0 && reads_zeros {
            let covers = 1u64 << (g.l2_bits() + g.cluster_bits);
            let room = covers - (at.0 & (covers - 1));
            return Ok(ZeroPlan::Skip { len: len.min(room) });
        }
        // What of the caller's bytes is in a cluster.
        let part = |c: u64| {
            let from = at.0.max(c << g.cluster_bits);
            (from, end.min((c + 1) << g.cluster_bits) - from)
        };
        let whole = |c: u64| {
            let (from, len) = part(c);
            from == c << g.cluster_bits && (len == g.cluster() || from + len == g.size)
        };
        if table == 0 && !(whole(cluster) && self.form.has_zeros()) {
            return Ok(ZeroPlan::Write {
                len: part(cluster).1,
            });
        }
        st.admit()?;
        self.make_table(st, &place)?;
        let place = self.place(cluster);
        let frame = self.l2_frame(st, &place)?;
        let change = |c: u64| {
            let index = place.index + (c - cluster) as usize;
            Ok(match self.entry_in(frame, index, c)? {
                Entry::Zero => Change::Keep,
                Entry::Unallocated if reads_zeros => Change::Keep,
                Entry::Unallocated if whole(c) && self.form.has_zeros() => Change::Mark,
                Entry::Compressed { .. } if mode == ZeroMode::Discard => Change::Keep,
                Entry::Unallocated | Entry::Compressed { .. } => Change::Write,
                Entry::Data(host) => {
                    let (from, len) = part(c);
                    let place = host + (from & (g.cluster() - 1));
                    match (place | len).is_multiple_of(SECTOR) {
                        true => Change::Host(place),
                        false if mode == ZeroMode::Discard => Change::Keep,
                        false => Change::Write,
                    }
                }
            })
        };
        let first: Change = change(cluster)?;
        // As far as the same is to be done; what is wrong with a later entry concerns a later call.
        let mut done = part(cluster).1;
        let mut next = cluster + 1;
        while next < end_cluster {
            let same = match (first, change(next)) {
                (Change::Host(a), Ok(Change::Host(b))) => a + done == b,
                (_, Err(Halt::Fail(_))) => false,
                (a, Ok(b)) => a == b,
                _ => false,
            };
            if !same {
                break;
            }
            done += part(next).1;
            next += 1;
        }
        Ok(match first {
            Change::Keep => ZeroPlan::Skip { len: done },
            Change::Write => ZeroPlan::Write { len: done },
            Change::Host(offset) => ZeroPlan::Host {
                file: self.file,
                offset: HostOffset(offset),
                len: done,
            },
            Change::Mark => {
                for c in cluster..next {
                    let index = place.index + (c - cluster) as usize;
                    self.put_entry(st, frame, index, ZERO);
                }
                ZeroPlan::Done { len: done }
            }
        })
    }
}
