//! Many random requests in flight at once.

use super::{Random, Rig, model::Model};
use block::Op;
use std::collections::HashMap;

/// A request in flight and what it does to the model.
enum Effect {
    Read(u64, u64),
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
}

impl Effect {
    fn range(&self) -> (u64, u64) {
        match self {
            Effect::Read(at, len) | Effect::Zero(at, len) | Effect::Discard(at, len) => (*at, *len),
            Effect::Write(at, data) => (*at, data.len() as u64),
            Effect::Flush => (0, 0),
        }
    }

    /// What it makes of the disk, and where.
    fn change(&self) -> Option<(u64, Vec<u8>)> {
        match self {
            Effect::Write(at, data) => Some((*at, data.clone())),
            Effect::Zero(at, len) | Effect::Discard(at, len) => Some((*at, vec![0; *len as usize])),
            Effect::Read(..) | Effect::Flush => None,
        }
    }
}

/// A thread's share of a disk: every `of`th unit, so that several meet in one cluster.
#[derive(Clone, Copy)]
pub struct Stripe {
    pub unit: u64,
    pub of: u64,
    pub index: u64,
}

impl Stripe {
    /// All of the disk.
    pub const WHOLE: Stripe = Stripe {
        unit: u64::MAX,
        of: 1,
        index: 0,
    };

    /// Where on the disk byte `at` of the share is.
    pub fn place(self, at: u64) -> u64 {
        if self.of == 1 {
            return at;
        }
        (at / self.unit * self.of + self.index) * self.unit + at % self.unit
    }

    /// Bytes from `at` to the end of its unit.
    fn left(self, at: u64) -> u64 {
        self.unit - at % self.unit
    }
}

/// A burst of random requests.
pub struct Storm {
    pub stripe: Stripe,
    pub seed: u64,
    /// Requests in all, and in flight at most.
    pub count: u32,
    pub depth: usize,
    /// Bytes of a request at most.
    pub len_max: u64,
    /// Whether requests may fail.
    pub faults: bool,
    /// Whether there are flushes and forced writes among them.
    pub flushes: bool,
}

impl Default for Storm {
    fn default() -> Self {
        Self {
            stripe: Stripe::WHOLE,
            seed: 1,
            count: 300,
            depth: 24,
            len_max: 64 << 10,
            faults: false,
            flushes: true,
        }
    }
}

impl Storm {
    /// Runs it; `model` is what the disk holds. Requests in flight never overlap.
    pub fn run(&self, rig: &mut Rig, model: &mut Model) {
        let size = model.len();
        let mut random = Random(self.seed);
        let mut running: HashMap<u64, Effect> = HashMap::new();
        let mut begun = 0;
        while begun < self.count || !running.is_empty() {
            let mut tries = 0;
            while begun < self.count && running.len() < self.depth && tries < 20 {
                tries += 1;
                let at = random.below(size / 512) * 512;
                let len = ((1 + random.below(self.len_max / 512)) * 512)
                    .min(size - at)
                    .min(self.stripe.left(at));
                let overlaps = running.values().any(|e| {
                    let (a, l) = e.range();
                    at < a + l && a < at + len
                });
                if !overlaps {
                    let (tag, effect) = self.begin(rig, &mut random, at, len);
                    running.insert(tag, effect);
                    begun += 1;
                }
            }
            for ended in rig.some() {
                let effect = running.remove(&ended.tag).expect("ours");
                let failed = ended.result.is_err();
                assert!(!failed || self.faults, "{:?}", ended.result);
                match &effect {
                    Effect::Read(at, len) if !failed => {
                        let differs = model.differs(*at, &ended.buffer);
                        let seed = self.seed;
                        assert_eq!(differs, None, "read of {len:#x} at {at:#x}, seed {seed}");
                    }
                    Effect::Write(at, data) if !failed => model.write(*at, data),
                    Effect::Zero(at, len) if !failed => model.write(*at, &vec![0; *len as usize]),
                    _ => {}
                }
                if let Some((at, data)) = effect.change()
                    && (failed || matches!(effect, Effect::Discard(..)))
                {
                    model.perhaps(at, &data);
                }
            }
        }
    }

    fn begin(&self, rig: &mut Rig, random: &mut Random, at: u64, len: u64) -> (u64, Effect) {
        let place = self.stripe.place(at);
        let cut = [random.below(len) as usize];
        let kinds = if self.flushes { 20 } else { 19 };
        match random.below(kinds) {
            0..7 => (
                rig.submit(Op::Read, place, vec![], len, &cut),
                Effect::Read(at, len),
            ),
            7..15 => {
                let byte = 1 + random.below(255) as u8;
                let data: Vec<u8> = (0..len).map(|i| byte ^ (i / 512) as u8).collect();
                let fua = self.flushes && random.below(10) == 0;
                let op = Op::Write { fua };
                let tag = rig.submit(op, place, data.clone(), len, &cut);
                (tag, Effect::Write(at, data))
            }
            15 | 16 => {
                let op = Op::WriteZeroes {
                    unmap: random.below(2) == 0,
                    fast: false,
                    fua: false,
                };
                let tag = rig.submit(op, place, vec![], len, &[]);
                (tag, Effect::Zero(at, len))
            }
            17 | 18 => (
                rig.submit(Op::Discard, place, vec![], len, &[]),
                Effect::Discard(at, len),
            ),
            _ => (rig.submit(Op::Flush, 0, vec![], 0, &[]), Effect::Flush),
        }
    }
}
