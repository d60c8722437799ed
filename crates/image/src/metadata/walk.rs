//! The way from a guest range through L1 table and L2 slices to what is there, for all formats that have them.

use super::tables::{Entries, Tables};
use super::{Growing, Layout, STEPS_MAX};
use crate::{Extent, ExtentKind, Step};
use block::{Error, GuestOffset, Result};
use std::sync::atomic::Ordering;

/// Where a guest cluster is looked up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Index into the L1 table.
    pub(crate) l1: usize,
    /// The raw L1 entry; 0 behind the table's end.
    pub(crate) raw: u64,
    /// The L2 slice, counted over the whole disk.
    pub(crate) slice: u64,
    /// The entry within the slice.
    pub(crate) index: usize,
}

/// An image whose clusters are found through an L1 table in memory and L2 slices in frames.
pub(crate) trait Walk {
    /// Why an entry is not sound.
    type Bad;

    /// The image's name in errors.
    fn name(&self) -> &str;

    /// Clusters and tables.
    fn layout(&self) -> &Layout;

    /// What is read without the lock.
    fn tables(&self) -> &Tables;

    /// The L2 table's offset in an L1 entry, 0 for none.
    fn decode_l1(&self, raw: u64) -> Result<u64, Self::Bad>;

    /// The extents of a slice, from `run.next()` on. `true` when the run may go on behind the slice. An unsound entry is
    /// an error at the run's beginning, and ends it later.
    fn feed_slice(&self, run: &mut Growing, entries: Entries<'_>) -> Result<bool, Self::Bad>;

    /// The same for the slice of `place`, whose table exists, under the lock; or what is lacking of it.
    fn feed_locked(
        &self,
        run: &mut Growing,
        place: &Place,
    ) -> Result<Step<Result<bool, Self::Bad>>>;

    /// An error that names an unsound L1 entry.
    fn bad_l1(&self, index: usize, bad: Self::Bad) -> Error;

    /// An error that names the unsound L2 entry of a guest cluster.
    fn bad_l2(&self, cluster: u64, bad: Self::Bad) -> Error;

    /// Where guest cluster `cluster` is looked up.
    #[inline]
    fn place(&self, cluster: u64) -> Place {
        let g = self.layout();
        // Less than 2^27 entries (qed; qcow2: 4 Mi).
        let l1 = (cluster >> g.l2_bits()) as usize;
        Place {
            l1,
            raw: self
                .tables()
                .l1
                .get(l1)
                .map_or(0, |e| e.load(Ordering::Acquire)),
            slice: cluster >> g.slice_entry_bits(),
            index: cluster as usize & (g.slice_entries() - 1),
        }
    }

    /// Refuses a range that is empty or not within the disk.
    fn check_range(&self, at: GuestOffset, len: u64) -> Result<()> {
        let end = at.0.checked_add(len);
        if len == 0 || end.is_none_or(|end| end > self.layout().size) {
            return Err(Error::invalid(format!(
                "{}: {len} bytes at {at} are not within the disk",
                self.name()
            )));
        }
        Ok(())
    }

    /// See [`crate::Image::expect`]: `at` may be anything.
    #[inline]
    fn expect_at(&self, at: GuestOffset) {
        let g = self.layout();
        if at.0 < g.size {
            let place = self.place(at.0 >> g.cluster_bits);
            self.tables().expect(place.slice, place.index);
        }
    }

    /// See [`crate::Image::map`].
    #[inline]
    fn map_extent(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        self.check_range(at, len)?;
        let g = self.layout();
        let mut run = Growing::new(at.0, len);
        for _ in 0..STEPS_MAX {
            let place = self.place(run.next() >> g.cluster_bits);
            let more = match self.decode_l1(place.raw) {
                Err(_) if run.len() > 0 => false,
                Err(bad) => return Err(self.bad_l1(place.l1, bad)),
                Ok(0) => {
                    let covers = 1 << (g.l2_bits() + g.cluster_bits);
                    let room = covers - (run.next() & (covers - 1));
                    run.feed(ExtentKind::Unallocated, room.min(run.left()))
                }
                Ok(_) => {
                    let start = run;
                    let seen = self.tables().read(place.slice, |entries| {
                        run = start;
                        self.feed_slice(&mut run, entries)
                    });
                    let seen = match seen {
                        Some(seen) => seen,
                        None => {
                            // A reader that gave up may have left half a slice in the run.
                            run = start;
                            if run.len() > 0 {
                                break;
                            }
                            match self.feed_locked(&mut run, &place)? {
                                Step::Done(seen) => seen,
                                Step::Need(need) => return Ok(Step::Need(need)),
                                Step::Wait(key) => return Ok(Step::Wait(key)),
                            }
                        }
                    };
                    match seen {
                        Ok(more) => more,
                        Err(bad) => return Err(self.bad_l2(run.next() >> g.cluster_bits, bad)),
                    }
                }
            };
            if !more || run.left() == 0 {
                break;
            }
        }
        Ok(Step::Done(run.extent()))
    }
}
