//! What a commit needs to know of an allocation in flight. *Units* are clusters, or subclusters where the image
//! has them.
//!
//! Allocations of different subclusters of one new cluster share its host cluster, the
//! [`Birth`]: the first commit makes it the guest's, and the last abort gives it back.

use super::state::Deref;
use crate::metadata::Span;

/// One allocation between its plan and its commit or abort.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    /// First unit.
    pub(super) start: u64,
    /// Units.
    pub(super) count: u64,
    /// First host cluster.
    pub(super) host: u64,
    /// Host clusters.
    pub(super) clusters: u64,
    /// The L2 slice's frame, pinned.
    pub(super) l2_frame: u32,
    /// A part of a cluster with subclusters: nothing but bits to change, and perhaps a birth to end.
    pub(super) part: bool,
    /// The frame with the new clusters' refcounts, pinned; `None` when the clusters were the
    /// guest's already (a preallocated zero cluster), when their birth has it, or when they are in a data file.
    pub(super) ref_frame: Option<u32>,
    /// The new clusters were counted ahead.
    pub(super) counted: bool,
    /// Besides, the guest read zeros there: the data need not be durable before what refers to them.
    pub(super) independent: bool,
    /// What the guest's clusters referred to before; its refcounts are pinned.
    pub(super) old: Option<Deref>,
    /// The entry of a compressed cluster, whose host clusters are counted already and whose refcounts are pinned.
    pub(super) packed: Option<u64>,
}

/// A new cluster of which allocations in flight write parts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Birth {
    /// Guest cluster.
    pub(super) cluster: u64,
    /// Host cluster.
    pub(super) host: u64,
    /// The frame with its refcount, pinned; none in a data file.
    pub(super) ref_frame: Option<u32>,
    /// It was counted ahead.
    pub(super) counted: bool,
    /// It reads as zeros where nobody wrote.
    pub(super) zeroed: bool,
    /// Allocations that write parts of it.
    pub(super) users: u32,
}

impl Span for Pending {
    fn units(&self) -> (u64, u64) {
        (self.start, self.count)
    }
}

/// New clusters of which allocations in flight write parts, sorted by guest cluster.
#[derive(Debug, Default)]
pub(super) struct Births(Vec<Birth>);

impl Births {
    fn birth_at(&self, cluster: u64) -> Result<usize, usize> {
        self.0.binary_search_by_key(&cluster, |b| b.cluster)
    }

    /// The new cluster that becomes guest cluster `cluster`.
    pub(super) fn birth(&mut self, cluster: u64) -> Option<&mut Birth> {
        let at = self.birth_at(cluster).ok()?;
        self.0.get_mut(at)
    }

    /// Notes a new cluster. The caller has checked that there is none yet.
    pub(super) fn add_birth(&mut self, birth: Birth) {
        match self.birth_at(birth.cluster) {
            Ok(_) => debug_assert!(false, "two new clusters for one"),
            Err(at) => self.0.insert(at, birth),
        }
    }

    /// Ends the birth of guest cluster `cluster`.
    pub(super) fn take_birth(&mut self, cluster: u64) -> Option<Birth> {
        let at = self.birth_at(cluster).ok()?;
        Some(self.0.remove(at))
    }
}
