//! Reading the map of an image with subclusters.

use super::super::Qcow2;
use super::super::entry::{Bad, COPIED, Entry};
use super::super::tables::Entries;
use super::{Cluster, Kind};
use crate::Plan;
use crate::metadata::{Growing, STEPS_MAX, Walk};
use block::{GuestOffset, HostOffset};

impl Qcow2 {
    /// The extents of a slice of extended entries, from `run.next()` on. `true` when the
    /// run may go on behind the slice.
    pub(in super::super) fn feed_extended(
        &self,
        run: &mut Growing,
        entries: Entries<'_>,
    ) -> Result<bool, Bad> {
        let g = &self.geometry;
        let first = (run.next() >> g.cluster_bits) as usize & (g.slice_entries() - 1);
        for at in first..g.slice_entries() {
            let (raw, bitmap) = entries.pair(at);
            let cluster = match g.decode_extended(raw, bitmap) {
                Ok(cluster) => cluster,
                Err(bad) if run.len() == 0 => return Err(bad),
                Err(_) => return Ok(false),
            };
            let end = (run.next() | (g.cluster() - 1)) + 1;
            while run.next() < end {
                let skip = run.next() & (g.cluster() - 1);
                let mut room = g.cluster() - skip;
                let entry = match cluster {
                    Cluster::Compressed { offset, len } => Entry::Compressed { offset, len },
                    Cluster::Standard { host, copied, bits } => {
                        let first = g.subcluster(skip);
                        let (kind, count) = bits.run(first);
                        room = (u64::from(first + count) << g.unit_bits) - skip;
                        match (kind, host) {
                            (Kind::Zero, host) => Entry::Zero { host, copied },
                            (Kind::Allocated, Some(host)) => Entry::Data { host, copied },
                            _ => Entry::Unallocated,
                        }
                    }
                };
                let room = room.min(run.left());
                if !run.feed(self.extent_kind(entry, skip), room) || run.left() == 0 {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// As `plan_in_place`, for subclusters that are allocated in clusters of the guest's own.
    pub(in super::super) fn plan_in_place_extended(
        &self,
        at: GuestOffset,
        len: u64,
    ) -> Option<Plan> {
        let g = &self.geometry;
        let mut host = 0;
        let mut done = 0;
        for _ in 0..STEPS_MAX {
            let place = self.place((at.0 + done) >> g.cluster_bits);
            if place.raw & COPIED == 0 {
                break;
            }
            let start = done;
            let seen = self.tables.read(place.slice, |entries| {
                done = start;
                for index in place.index..g.slice_entries() {
                    let (raw, bitmap) = entries.pair(index);
                    let Ok(Cluster::Standard {
                        host: Some(cluster),
                        copied: true,
                        bits,
                    }) = g.decode_extended(raw, bitmap)
                    else {
                        return false;
                    };
                    let skip = (at.0 + done) & (g.cluster() - 1);
                    let first = g.subcluster(skip);
                    let (Kind::Allocated, count) = bits.run(first) else {
                        return false;
                    };
                    if done == 0 {
                        host = cluster + skip;
                    } else if host + done != cluster + skip {
                        return false;
                    }
                    let room = (u64::from(first + count) << g.unit_bits) - skip;
                    done += room.min(len - done);
                    if done == len || skip + room < g.cluster() {
                        return false;
                    }
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
        (done > 0).then_some(Plan::InPlace {
            file: g.guest_file(),
            offset: HostOffset(host),
            len: done,
        })
    }
}
