//! What the disks of a machine may hold after it lost power.
//!
//! Between two barriers everything that no barrier covers may be there or not. Of what is possible at any moment
//! between them, everything is possible at the last one, right before the next barrier ends:
//! what had not begun at the earlier moment is not there. So the states of all moments are those of each
//! barrier's, and of the end.

use crate::random::Random;
use crate::spec::Spec;
use image::Format;
use io::{Change, Keep, Outage, SimDisk};
use std::sync::Arc;

/// How many states to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Where no more sectors than this are open, every subset of them is a state; where no more
    /// operations are, every subset of those.
    pub exhaustive: u32,
    /// Other states of one barrier: each operation alone, each left out, random subsets, torn ones.
    pub each: usize,
    /// States of a run: where there would be more, barriers are left out at random.
    pub all: usize,
}

impl Bounds {
    /// For `make test`.
    pub const FAST: Bounds = Bounds {
        exhaustive: 4,
        each: 14,
        all: 48,
    };
    /// For runs that are many: one for each operation that may fail.
    pub const FEW: Bounds = Bounds {
        exhaustive: 3,
        each: 6,
        all: 16,
    };
    /// For `make soak`.
    pub const LONG: Bounds = Bounds {
        exhaustive: 8,
        each: 120,
        all: 4000,
    };

    /// Those that have names.
    const NAMED: [(&str, Bounds); 3] = [
        ("fast", Self::FAST),
        ("few", Self::FEW),
        ("long", Self::LONG),
    ];

    /// Fewer where each takes longer: tables are as large as clusters, and keys are made slowly.
    pub fn for_image(self, spec: &Spec) -> Self {
        let mut all = self.all / (spec.create.cluster_size >> 18).max(1) as usize;
        match (spec.format(), &spec.create.encryption) {
            // Few moments, of which each may be one of a key's: all are looked at.
            (Format::Luks, _) => all *= 8,
            (_, Some(_)) => all /= 3,
            _ => {}
        }
        Self { all, ..self }
    }
}

impl std::fmt::Display for Bounds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = Self::NAMED.iter().find(|(_, bounds)| bounds == self);
        f.write_str(name.map_or("unnamed", |(name, _)| name))
    }
}

impl std::str::FromStr for Bounds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::NAMED.iter().find(|(name, _)| *name == text);
        let found = found.map(|(_, bounds)| *bounds);
        found.ok_or(format!("'{text}': bounds are fast, few or long"))
    }
}

/// Names a state of a run: the barrier, and which of its states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateId {
    /// The moment's number.
    pub moment: usize,
    /// The state's number there.
    pub state: usize,
}

impl std::fmt::Display for StateId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.moment, self.state)
    }
}

impl std::str::FromStr for StateId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('.');
        let parsed = parts.and_then(|(m, s)| Some((m.parse().ok()?, s.parse().ok()?)));
        let (moment, state) = parsed.ok_or(format!("'{text}' is no state: 12.3 would be one"))?;
        Ok(Self { moment, state })
    }
}

/// The moments to lose power at: right before each barrier ends, and after all.
pub fn moments(disks: &[Arc<SimDisk>]) -> Vec<u64> {
    let logs = disks.iter().flat_map(|disk| disk.log());
    let syncs = logs.filter(|e| matches!(e.change, Change::Sync | Change::FailedSync));
    let mut at: Vec<u64> = syncs.map(|e| e.ended).collect();
    at.push(disks.iter().map(|d| d.clock().now()).max().unwrap_or(0) + 1);
    at.sort_unstable();
    at
}

/// What may be on all disks at a moment.
pub struct Moment {
    outages: Vec<Outage>,
    /// How many sectors each open operation of each disk touches, one list for all.
    sectors: Vec<u64>,
}

impl Moment {
    /// The disks of one machine when it loses power at `at`.
    pub fn new(disks: &[Arc<SimDisk>], at: u64) -> Self {
        let outages: Vec<Outage> = disks.iter().map(|d| d.outage(at)).collect();
        let open = outages.iter().flat_map(|o| o.open().map(Outage::sectors));
        let sectors = open.collect();
        Self { outages, sectors }
    }

    /// Disks with so much of each open operation there.
    pub fn disks(&self, keep: &[Keep]) -> Vec<Arc<SimDisk>> {
        let mut keep = keep;
        let disks = self.outages.iter().map(|outage| {
            let (own, rest) = keep.split_at(outage.open().len());
            keep = rest;
            outage.state(own)
        });
        disks.collect()
    }

    /// The open operations, for messages: those that are there.
    pub fn describe(&self, keep: &[Keep]) -> String {
        let open = self.outages.iter().flat_map(|o| o.open());
        let lines = open.zip(keep).map(|(entry, keep)| {
            let what = match &entry.change {
                Change::Write { offset, data } => {
                    format!("write {:#x}+{:#x}", offset, data.len())
                }
                Change::Zero { offset, len } => format!("zero {offset:#x}+{len:#x}"),
                other => format!("{other:?}"),
            };
            format!("  event {}: {what}: {keep:?}\n", entry.begun)
        });
        lines.collect()
    }

    /// The states to look at.
    pub fn states(&self, bounds: &Bounds, random: &mut Random) -> Vec<Vec<Keep>> {
        let n = self.sectors.len();
        let total: u64 = self.sectors.iter().sum();
        if total <= u64::from(bounds.exhaustive) {
            return (0..1u64 << total).map(|mask| self.masked(mask)).collect();
        }
        let mut states = Vec::new();
        let whole = |there: &mut dyn FnMut(usize) -> bool| -> Vec<Keep> {
            let keep = (0..n).map(|i| if there(i) { Keep::All } else { Keep::Nothing });
            keep.collect()
        };
        if n <= bounds.exhaustive as usize {
            states.extend((0..1u64 << n).map(|mask| whole(&mut |i| mask >> i & 1 == 1)));
        } else {
            states.push(whole(&mut |_| false));
            states.push(whole(&mut |_| true));
            // Each alone and each left out: half of the rest, in a random order.
            let mut ones: Vec<(usize, bool)> = (0..2 * n).map(|i| (i / 2, i % 2 == 0)).collect();
            for i in (1..ones.len()).rev() {
                ones.swap(i, random.below(i as u64 + 1) as usize);
            }
            for (one, alone) in ones.into_iter().take(bounds.each / 2) {
                states.push(whole(&mut |i| (i == one) == alone));
            }
            for _ in 0..bounds.each / 4 {
                let part = 1 + random.below(7);
                states.push(whole(&mut |_| random.below(8) < part));
            }
        }
        for _ in 0..(bounds.each / 4).max(1) {
            let part = random.below(8);
            let torn = (0..n).map(|_| match random.below(8) {
                lot if lot < part => Keep::All,
                7 => Keep::Nothing,
                _ => Keep::Torn(random.next()),
            });
            states.push(torn.collect());
        }
        states
    }

    fn masked(&self, mut mask: u64) -> Vec<Keep> {
        let keep = self.sectors.iter().map(|sectors| {
            let own = mask & ((1 << sectors) - 1);
            mask >>= sectors;
            Keep::Mask(own)
        });
        keep.collect()
    }
}
