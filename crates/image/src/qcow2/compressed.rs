//! Compressed clusters of an image that is open (specification: "Compressed Clusters Descriptor"). A new image in one go
//! is made by `compress_image`.
//!
//! ```text
//!   │◀──── host cluster ────▶│◀──── host cluster ────▶│
//!   │ a │ b  │ c │   d   │ e │  e │ f │▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒│     ▒ the tail: what comes next goes there
//!     refcount 5: a to e          refcount 2: e and f
//! ```
//!
//! Bytes get their place behind those that were placed last, in what is left of their host cluster, and go on in the
//! next where that is free. Each cluster that they touch is counted when they get their place: a flush may
//! write the count before anything refers to it, which a crash leaves as a leak. The entry follows with the commit, after the
//! bytes; so a flush writes it after a barrier for both, as any entry. What the guest's cluster was before is
//! dereferenced. Bytes that are given up are, too: the flush that lowers their count is the next but one.
//!
//! What is left of a host cluster when the image was opened is not found again.

use super::alloc::Piece;
use super::entry::{HOST_END_MAX, compressed_end, compressed_entry, refcount_max};
use super::header::HOST_OFFSET_END;
use super::pending::Pending;
use super::state::{Ask, Deref, Halt, State};
use super::subcluster::{Bitmap, Cluster};
use super::{Compressor, Qcow2};
use crate::metadata::{Walk, key_of};
use crate::{FileId, Pack, PackedPlace};
use block::{Error, ErrorKind, GuestOffset, HostOffset, Result};
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// What packs clusters for [`Qcow2::plan_compressed`].
    pub(super) fn new_packer(&self) -> Result<Box<dyn Pack>> {
        let why = match (&self.data_file, &self.encryption) {
            (Some(_), _) => "its data are in an external file, which has no compressed clusters",
            (_, Some(_)) => "it is encrypted: compressed clusters would not be",
            _ => return Ok(Box::new(Compressor::new(self.compression)?)),
        };
        let name = &self.name;
        Err(Error::unsupported(format!("{name}: {why}")))
    }

    /// A place for the guest's cluster at `at`, which was packed into `len` bytes.
    pub(super) fn plan_compressed(
        &self,
        st: &mut State,
        at: GuestOffset,
        len: u64,
    ) -> Ask<PackedPlace> {
        let g = &self.geometry;
        let cluster = at.0 >> g.cluster_bits;
        if self.data_file.is_some() || self.encryption.is_some() {
            return Err(Halt::Fail(Error::unsupported(format!(
                "{}: takes no compressed clusters",
                self.name
            ))));
        }
        if at.0 & (g.cluster() - 1) != 0 || len == 0 || len >= g.cluster() {
            return Err(Halt::Fail(Error::invalid(format!(
                "{}: {len} bytes are no packed cluster at guest offset {:#x}",
                self.name, at.0
            ))));
        }
        let unit_bits = g.cluster_unit_bits();
        let (start, count) = (cluster << unit_bits, 1 << unit_bits);
        if let Some(key) = st.tickets.busy_within(start, start + count) {
            return Err(Halt::Wait(key));
        }
        let (place, l2_frame) = self.pinned_slice(st, cluster)?;
        let old = self.held_by(l2_frame, place.index, cluster);
        let given = old.and_then(|old| self.give_bytes(st, old, len).map(|given| (old, given)));
        let (old, (offset, new)) = match given {
            Ok(given) => given,
            Err(halt) => {
                st.cache.unpin(l2_frame);
                return Err(halt);
            }
        };
        let pending = Pending {
            start,
            count,
            host: new.first,
            clusters: new.count,
            l2_frame,
            part: false,
            ref_frame: None,
            counted: true,
            independent: false,
            old,
            packed: Some(compressed_entry(g.cluster_bits, offset, len)),
        };
        let Some(ticket) = st.tickets.add(pending) else {
            // `is_full` was asked under the same lock.
            debug_assert!(false, "the table of allocations overflowed");
            return Err(Halt::Busy);
        };
        Ok(PackedPlace {
            ticket,
            key: key_of(ticket),
            file: FileId::IMAGE,
            offset: HostOffset(offset),
        })
    }

    /// The host clusters that the guest's cluster of an entry refers to.
    fn held_by(&self, frame: u32, index: usize, cluster: u64) -> Ask<Option<Deref>> {
        if self.geometry.extended() {
            return Ok(match self.cluster_at(frame, index, cluster)? {
                Cluster::Standard { host, .. } => {
                    host.map(|host| self.compressed_clusters(host, 1))
                }
                Cluster::Compressed { offset, len } => Some(self.compressed_clusters(offset, len)),
            });
        }
        let entry = (self.geometry)
            .decode(self.l2_raw(frame, index))
            .map_err(|bad| self.bad_l2(cluster, bad))?;
        Ok(self.clusters_of(entry))
    }

    /// Finds `len` bytes, and counts the host clusters that they touch. Their refcounts and those of `old` are pinned.
    fn give_bytes(&self, st: &mut State, old: Option<Deref>, len: u64) -> Ask<(u64, Deref)> {
        if let Some(old) = old {
            self.pin_old(st, old)?;
        }
        let given = self.bytes_at_tail(st, len);
        if let (Err(_), Some(old)) = (&given, old) {
            self.unpin_old(st, old);
        }
        given
    }

    fn bytes_at_tail(&self, st: &mut State, len: u64) -> Ask<(u64, Deref)> {
        let g = &self.geometry;
        let host_of = |offset: u64| offset >> g.cluster_bits;
        let mut tail = st.tail;
        if let Some(at) = tail
            && !self.may_count_once_more(st, host_of(at))?
        {
            tail = None;
        }
        let shared = tail.map(|tail| Deref {
            first: host_of(tail),
            count: 1,
        });
        if let Some(shared) = shared {
            self.pin_old(st, shared)?;
        }
        if let (Some(tail), Some(shared)) = (tail, shared)
            && host_of(tail + len - 1) == shared.first
        {
            self.count_once_more(st, shared.first);
            return Ok((self.set_tail(st, tail, len), shared));
        }
        let piece = match self.alloc(st, 1) {
            Ok(piece) => piece,
            Err(halt) => {
                if let Some(shared) = shared {
                    self.unpin_old(st, shared);
                }
                return Err(halt);
            }
        };
        // From here on nothing halts but for want of room.
        let joins = shared.filter(|shared| shared.first + 1 == piece.first);
        let offset = match (joins, tail) {
            (Some(_), Some(tail)) => tail,
            _ => piece.first << g.cluster_bits,
        };
        let end = compressed_end(g.cluster_bits);
        if offset + len > end.min(HOST_OFFSET_END).min(HOST_END_MAX) {
            self.take_back(st, piece);
            if let Some(shared) = shared {
                self.unpin_old(st, shared);
            }
            return Err(Halt::Fail(Error::new(
                ErrorKind::NoSpace,
                format!("{}: the file passes what an entry can point at", self.name),
            )));
        }
        self.count_first(st, &piece);
        let new = match joins {
            Some(shared) => {
                self.count_once_more(st, shared.first);
                Deref {
                    first: shared.first,
                    count: 2,
                }
            }
            None => {
                if let Some(shared) = shared {
                    self.unpin_old(st, shared);
                }
                Deref {
                    first: piece.first,
                    count: 1,
                }
            }
        };
        Ok((self.set_tail(st, offset, len), new))
    }

    /// Counts a cluster that was just taken, and pins its refcount.
    fn count_first(&self, st: &mut State, piece: &Piece) {
        if !piece.counted {
            self.set_refcount(st, piece.frame, piece.first, 1);
        }
        st.cache.pin(piece.frame);
    }

    /// Whether the refcount of `host` can be raised, and is not 0.
    fn may_count_once_more(&self, st: &mut State, host: u64) -> Ask<bool> {
        let most = refcount_max(self.geometry.refcount_order);
        let count = self.refcount_of(st, host)?;
        Ok(count > 0 && count < most)
    }

    /// Raises the refcount of `host`, which is pinned.
    fn count_once_more(&self, st: &mut State, host: u64) {
        let owner = super::cache::Owner::Ref(self.ref_slice_of(host));
        if let Some(frame) = st.cache.find(&self.tables, owner) {
            let count = self.refcount(frame, host);
            self.set_refcount(st, frame, host, count + 1);
        }
    }

    /// Notes what is left behind `len` bytes at `offset`, which it returns.
    fn set_tail(&self, st: &mut State, offset: u64, len: u64) -> u64 {
        let end = offset + len;
        st.tail = (end & (self.geometry.cluster() - 1) != 0).then_some(end);
        offset
    }

    /// Nothing goes into host cluster `host` any more: it is free.
    pub(super) fn forget_tail(&self, st: &mut State, host: u64) {
        let bits = self.geometry.cluster_bits;
        st.tail = st.tail.filter(|tail| tail >> bits != host);
    }

    /// Ends the allocation of a compressed cluster.
    pub(super) fn end_compressed(&self, st: &mut State, pending: &Pending, raw: u64, commit: bool) {
        let new = Deref {
            first: pending.host,
            count: pending.clusters,
        };
        let cluster = pending.start >> self.geometry.cluster_unit_bits();
        if commit {
            let index = self.place(cluster).index;
            self.put_entry(st, pending.l2_frame, index, raw, Bitmap::NONE);
            st.ordered = true;
            if st.flush_soon() {
                self.ahead.store(true, Ordering::Relaxed);
            }
            self.unpin_old(st, new);
        } else {
            self.dereference(st, new);
        }
        match pending.old {
            Some(old) if commit => self.dereference(st, old),
            Some(old) => self.unpin_old(st, old),
            None => {}
        }
        st.cache.unpin(pending.l2_frame);
    }
}
