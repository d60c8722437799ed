//! What a disk reads as, at the places of it that are used.

use crate::peer::{Model, Op, Random, random_op};

/// A disk's content. Everything outside the places reads as zeros, or as the base does.
#[derive(Clone)]
pub struct Content {
    pub size: u64,
    /// Where each begins, and what it reads as.
    pub places: Vec<(u64, Model)>,
}

impl Content {
    /// All of a disk.
    pub fn whole(model: Model) -> Self {
        Self {
            size: model.bytes.len() as u64,
            places: vec![(0, model)],
        }
    }

    /// A few places of a disk of `size` bytes, far from each other.
    pub fn sparse(size: u64, places: &[(u64, u64)]) -> Self {
        let place = |(at, len): &(u64, u64)| (*at, Model::new(*len));
        Self {
            size,
            places: places.iter().map(place).collect(),
        }
    }

    /// Whether there is nothing but its places.
    pub fn is_whole(&self) -> bool {
        self.places.len() == 1 && self.places[0].1.bytes.len() as u64 == self.size
    }

    /// A random operation, and the place that it is in. Its offset is the disk's.
    pub fn op(&self, random: &mut Random, cluster: u64, align: u64) -> (usize, Op) {
        let index = random.below(self.places.len() as u64) as usize;
        let (base, model) = &self.places[index];
        let len = model.bytes.len() as u64;
        (index, moved(random_op(random, len, cluster, align), *base))
    }

    pub fn apply(&mut self, index: usize, op: Op) {
        let (base, model) = &mut self.places[index];
        model.apply(moved(op, base.wrapping_neg()));
    }

    /// What becomes of it when the disk gets another size: what is new reads as zeros.
    pub fn resize(&mut self, size: u64) {
        if self.is_whole() {
            *self = Self::whole(Model::over(&self.places[0].1, size));
            return;
        }
        let old = std::mem::replace(&mut self.size, size);
        if size > old {
            let len = (size - old).min(128 << 10);
            self.places.push((old, Model::new(len)));
        }
        self.places.retain(|(at, _)| *at < size);
        for (at, model) in &mut self.places {
            let len = (model.bytes.len() as u64).min(size - *at);
            *model = Model::over(model, len);
        }
    }
}

fn moved(op: Op, by: u64) -> Op {
    let to = |at: u64| at.wrapping_add(by);
    match op {
        Op::Write { at, len, pattern } => Op::Write {
            at: to(at),
            len,
            pattern,
        },
        Op::Zero { at, len, unmap } => Op::Zero {
            at: to(at),
            len,
            unmap,
        },
        Op::Discard { at, len } => Op::Discard { at: to(at), len },
        Op::Read { at, len } => Op::Read { at: to(at), len },
        Op::Flush => Op::Flush,
    }
}

/// The operation as a line for `qemu-io`.
pub fn line(op: Op) -> String {
    match op {
        Op::Write { at, len, pattern } => format!("write -q -P {pattern} {at} {len}\n"),
        Op::Zero { at, len, unmap } => {
            format!("write -q -z {}{at} {len}\n", if unmap { "-u " } else { "" })
        }
        Op::Discard { at, len } => format!("discard -q {at} {len}\n"),
        Op::Read { at, len } => format!("read -q {at} {len}\n"),
        Op::Flush => "flush\n".to_owned(),
    }
}

/// A persistent bitmap.
#[derive(Clone, Debug)]
pub struct Bitmap {
    pub name: String,
    pub granularity: u64,
    pub enabled: bool,
    /// Ranges that were changed: dirty.
    pub must: Vec<(u64, u64)>,
    /// Ranges that may be dirty besides: a discard that did nothing is noted or not.
    pub may: Vec<(u64, u64)>,
}

impl Bitmap {
    /// Notes an operation.
    pub fn note(&mut self, op: Op) {
        if !self.enabled {
            return;
        }
        match op {
            Op::Write { at, len, .. } | Op::Zero { at, len, .. } if len > 0 => {
                self.must.push((at, at + len));
            }
            Op::Discard { at, len } => self.may.push((at, at + len)),
            _ => {}
        }
    }

    /// The disk gets another size. What is new may be noted: zeros were written over a longer base.
    pub fn resize(&mut self, old: u64, new: u64) {
        // The bit that the new end is in stays, also where only what is behind the end was changed.
        let last = new / self.granularity * self.granularity;
        if self
            .must
            .iter()
            .chain(&self.may)
            .any(|(_, end)| *end > last && last < new)
        {
            self.may.push((last, new));
        }
        let cut = |ranges: &mut Vec<(u64, u64)>| {
            ranges.retain(|(start, _)| *start < new);
            ranges
                .iter_mut()
                .for_each(|(_, end)| *end = (*end).min(new));
        };
        cut(&mut self.must);
        cut(&mut self.may);
        if self.enabled && new > old {
            self.may.push((old, new));
        }
    }

    /// Compares with what is dirty (in order, apart from each other).
    pub fn check(&self, dirty: &[(u64, u64)], size: u64) -> Result<(), String> {
        let bits = |ranges: &[(u64, u64)]| {
            let mut bits = std::collections::BTreeSet::new();
            for (start, end) in ranges {
                let end = (*end).min(size);
                if *start < end {
                    bits.extend(*start / self.granularity..end.div_ceil(self.granularity));
                }
            }
            bits
        };
        let (must, may, dirty) = (bits(&self.must), bits(&self.may), bits(dirty));
        if let Some(bit) = must.difference(&dirty).next() {
            return Err(format!("{self:?}: bit {bit} is lacking"));
        }
        if let Some(bit) = dirty
            .iter()
            .find(|bit| !must.contains(bit) && !may.contains(bit))
        {
            return Err(format!("{self:?}: bit {bit} is too much"));
        }
        Ok(())
    }
}
