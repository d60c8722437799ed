//! Where the next request begins, and how long it is: sequences, chance and several files.
//!
//! Files lie behind each other as one space: file `n` begins at `n` times [`Places::span`].

use super::{
    Kind, Random, Spec,
    plan::Places,
    shape::{Runs, Service, Shape, Sizes},
    zipf::Zipf,
};

/// How often a size is drawn that may not fit before the end.
const DRAWS_MAX: usize = 32;

/// See the module.
#[derive(Debug)]
pub(super) struct Walk {
    places: Places,
    shape: Shape,
    sequential: bool,
    block: u64,
    zipf: Option<Zipf>,
    files: Vec<File>,
    /// The file of the last request, and how many more it is for.
    current: (usize, u64),
    /// What is left of a run.
    run_left: u64,
}

/// Where a file's sequences are, in bytes from the range's start.
#[derive(Clone, Debug, Default)]
struct File {
    /// Where the last read or write began, and where it ended.
    last: [(u64, u64); 2],
    /// Its range was asked for once, in sequence.
    over: bool,
    order: Option<Order>,
}

impl Walk {
    /// `first` is the place at which sequences begin.
    pub(super) fn new(spec: &Spec, places: Places, first: u64, random: &mut Random) -> Self {
        let shape = spec.shape.clone();
        let start = places.at(first) - places.at(0);
        let plain = spec.zipf.is_none() && shape.align_bytes.is_none() && !spec.sizes_differ();
        let mut file = || File {
            last: [(start, start); 2],
            over: false,
            order: (shape.once && plain).then(|| Order::new(places.count(), random.next())),
        };
        let files = (0..=shape.more_files.len()).map(|_| file()).collect();
        Self {
            places,
            sequential: !spec.pattern.is_random(),
            block: spec.block_bytes,
            zipf: spec.zipf.map(|theta| Zipf::new(places.count(), theta)),
            files,
            current: (usize::MAX, 0),
            run_left: 0,
            shape,
        }
    }

    /// Offset and bytes of the next request of a kind.
    pub(super) fn next(&mut self, kind: Kind, random: &mut Random) -> (u64, u64) {
        let file = self.file(random);
        let at_random = !self.sequential && self.is_random(random);
        let own = usize::from(kind == Kind::Write);
        let again =
            !at_random && matches!(self.shape.runs, Some(Runs::Identical(_))) && !self.sequential;
        let (began, end) = self.files[file].last[own];
        let (at, bytes) = match (at_random, again) {
            (true, _) => self.random(file, kind, random),
            // Of a kind, or in a file, that has had none there is nothing to do again.
            (_, true) if end > began => (began, end - began),
            _ => self.follow(file, kind, random),
        };
        self.files[file].last[own] = (at, at + bytes);
        (
            file as u64 * self.places.span() + self.places.at(0) + at,
            bytes,
        )
    }

    /// Where the file of a request begins in the space of all.
    pub(super) fn starts(&self) -> impl Iterator<Item = u64> + use<> {
        let span = self.places.span();
        (0..self.files.len() as u64).map(move |file| file * span)
    }

    /// Whose turn it is.
    fn file(&mut self, random: &mut Random) -> usize {
        let count = self.files.len();
        if count == 1 {
            return 0;
        }
        let mut file = self.current.0;
        let (turn, by_chance) = match self.shape.service {
            Service::RoundRobin(turn) => (turn, false),
            Service::Random(turn) => (turn, true),
            Service::Sequential => (u64::MAX, false),
        };
        if self.files.iter().all(|file| file.over) {
            self.files.iter_mut().for_each(|file| file.over = false);
            // From the first one on.
            file = count - 1;
            self.current = (file, 0);
        }
        if self.current.1 == 0 || self.files[file].over {
            file = match by_chance {
                true => random.below(count as u64) as usize,
                false => file.wrapping_add(1) % count,
            };
            while self.files[file].over {
                file = (file + 1) % count;
            }
            self.current = (file, turn);
        }
        self.current.1 -= 1;
        file
    }

    /// Whether a request of a random pattern is at random.
    fn is_random(&mut self, random: &mut Random) -> bool {
        if let Some(Runs::Sequential(length) | Runs::Identical(length)) = self.shape.runs {
            if self.run_left > 0 {
                self.run_left -= 1;
                return false;
            }
            self.run_left = length - 1;
            return true;
        }
        match self.shape.random_percent {
            Some(percent) => random.below(100) < percent.into(),
            None => true,
        }
    }

    /// Bytes of a request of a kind that has so much room; nothing where the least has none.
    fn bytes(&self, kind: Kind, room: u64, random: &mut Random) -> Option<u64> {
        let Some(sizes) = self.shape.sizes(kind) else {
            return (self.block <= room).then_some(self.block);
        };
        let least = sizes.bounds().0;
        (0..DRAWS_MAX)
            .map(|_| sizes.draw(random))
            .find(|bytes| *bytes <= room)
            .or((least <= room).then_some(least))
    }

    fn random(&mut self, file: usize, kind: Kind, random: &mut Random) -> (u64, u64) {
        let range = self.places.range();
        let least = self.shape.sizes(kind).map_or(self.block, |s| s.bounds().0);
        let (step, count) = match (self.shape.align_bytes, self.shape.sizes(kind)) {
            (None, None) => (self.places.stride(), self.places.count()),
            (align, sizes) => {
                let step = align.or(sizes.map(|_| least)).unwrap_or(least);
                (step, (range - least) / step + 1)
            }
        };
        let index = match (&mut self.files[file].order, self.zipf) {
            (Some(order), _) => {
                let index = order.next(random);
                self.files[file].over = order.is_over();
                index
            }
            // 53 bits are what a float keeps.
            (_, Some(zipf)) => zipf.draw(|| random.part()) % count,
            _ => random.below(count),
        };
        let at = index * step;
        (at, self.bytes(kind, range - at, random).unwrap_or(least))
    }

    /// Behind the last request of this kind, or from the range's start again.
    fn follow(&mut self, file: usize, kind: Kind, random: &mut Random) -> (u64, u64) {
        let range = self.places.range();
        let (began, end) = self.files[file].last[usize::from(kind == Kind::Write)];
        let skip = self.shape.skip_bytes;
        let fixed = self.shape.sizes(kind).is_none() && skip == 0;
        let next = match fixed {
            // The first one is at the start.
            _ if end == began => Some(end),
            // A stride may be more or less than a block.
            true => Some(began + self.places.stride()),
            false => end.checked_add_signed(skip),
        };
        let there = next.filter(|at| *at < range);
        let found = there.and_then(|at| Some((at, self.bytes(kind, range - at, random)?)));
        let found = found.unwrap_or_else(|| {
            let at = match skip {
                // Room for a request, where less is skipped than that.
                ..0 => range.saturating_sub(skip.unsigned_abs().max(self.least(kind))),
                _ => 0,
            };
            let bytes = self.bytes(kind, range - at, random);
            (at, bytes.unwrap_or_else(|| self.least(kind)))
        });
        let behind = match (fixed, skip) {
            (true, _) => Some(found.0 + self.places.stride()),
            _ => (found.0 + found.1).checked_add_signed(skip),
        };
        let least = self.least(kind);
        let goes_on =
            behind.is_some_and(|at| at.checked_add(least).is_some_and(|end| end <= range));
        // One that is read backwards has no end to come to.
        self.files[file].over = !goes_on && skip >= 0;
        found
    }

    fn least(&self, kind: Kind) -> u64 {
        self.shape
            .sizes(kind)
            .map_or(self.block, |s: &Sizes| s.bounds().0)
    }
}

/// The numbers below a count, each once, in an order of chance; then again in another. Without a map of them: a Feistel network
/// permutes a power of four that is not much more, and what is outside is permuted again.
#[derive(Clone, Debug)]
struct Order {
    count: u64,
    next: u64,
    key: u64,
    /// Bits of a half.
    half: u32,
}

impl Order {
    const ROUNDS: u64 = 6;

    fn new(count: u64, key: u64) -> Self {
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        Self {
            count,
            next: 0,
            key,
            half: bits.div_ceil(2).max(1),
        }
    }

    fn next(&mut self, random: &mut Random) -> u64 {
        if self.is_over() {
            self.next = 0;
            self.key = random.next();
        }
        let mut number = self.permuted(self.next);
        self.next += 1;
        while number >= self.count {
            number = self.permuted(number);
        }
        number
    }

    /// Whether all have come.
    fn is_over(&self) -> bool {
        self.next == self.count
    }

    fn permuted(&self, number: u64) -> u64 {
        let mask = (1 << self.half) - 1;
        let (mut left, mut right) = (number >> self.half, number & mask);
        for round in 0..Self::ROUNDS {
            let mixed =
                Random::new(self.key ^ right.wrapping_mul(Self::ROUNDS + 1) ^ round << 56).next();
            (left, right) = (right, left ^ mixed & mask);
        }
        left << self.half | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Pattern, Target, plan::DISK};

    /// The first requests of a load, of `kinds` in turn.
    fn walk(spec: &Spec, kinds: &[Kind], count: usize) -> Vec<(u64, u64)> {
        spec.check().unwrap();
        let mut random = Random::new(spec.seed);
        let places = Places::new(spec, &DISK).unwrap();
        let mut walk = Walk::new(spec, places, 0, &mut random);
        let kinds = kinds.iter().cycle().take(count);
        kinds.map(|kind| walk.next(*kind, &mut random)).collect()
    }

    fn spec(pattern: Pattern, blocks: u64, shape: Shape) -> Spec {
        Spec {
            pattern,
            shape,
            range_bytes: Some(blocks * 4096),
            ..Spec::new(Target::Nbd("x".into()))
        }
    }

    /// Numbers of blocks.
    fn blocks(spec: &Spec, kinds: &[Kind], count: usize) -> Vec<u64> {
        walk(spec, kinds, count)
            .iter()
            .map(|(at, _)| at / 4096)
            .collect()
    }

    #[test]
    fn reads_and_writes_have_sequences_of_their_own() {
        let spec = spec(Pattern::Rw, 3, Shape::default());
        let kinds = [Kind::Read, Kind::Read, Kind::Write];
        assert_eq!(blocks(&spec, &kinds, 9), [0, 1, 0, 2, 0, 1, 1, 2, 2]);
    }

    #[test]
    fn requests_stay_within_their_range_and_have_bytes() {
        let sized = |skip_bytes| Shape {
            skip_bytes,
            ..Shape::default()
        };
        // Less is skipped than a request has.
        for skip in [-512, -3584, -4096, -4608] {
            let spec = spec(Pattern::Write, 4, sized(skip));
            for (at, bytes) in walk(&spec, &[Kind::Write], 100) {
                assert!(at + bytes <= 4 * 4096, "{skip}: {at} {bytes}");
            }
        }
        let same = Shape {
            runs: Some(Runs::Identical(5)),
            ..Shape::default()
        };
        let spec = spec(Pattern::RandRw, 16, same);
        let all = walk(&spec, &[Kind::Read, Kind::Write], 100);
        assert!(all.iter().all(|(_, bytes)| *bytes == 4096));
    }

    #[test]
    fn sequences_have_holes_and_go_backwards() {
        let hole = Shape {
            skip_bytes: 4096,
            ..Shape::default()
        };
        assert_eq!(
            blocks(&spec(Pattern::Read, 5, hole), &[Kind::Read], 4),
            [0, 2, 4, 0]
        );
        // As fio goes for rw=read:-8k: the first one at the start, all others from the end on.
        let back = Shape {
            skip_bytes: -8192,
            ..Shape::default()
        };
        assert_eq!(
            blocks(&spec(Pattern::Read, 4, back), &[Kind::Read], 5),
            [0, 2, 1, 0, 2]
        );
    }

    #[test]
    fn a_random_place_comes_again_when_all_have_come() {
        for count in [1, 2, 3, 17, 64, 100] {
            let once = Shape {
                once: true,
                ..Shape::default()
            };
            let all = blocks(
                &spec(Pattern::RandWrite, count, once),
                &[Kind::Write],
                3 * count as usize,
            );
            let mut orders = std::collections::BTreeSet::new();
            for pass in all.chunks(count as usize) {
                let mut sorted = pass.to_vec();
                sorted.sort_unstable();
                assert!(sorted.into_iter().eq(0..count), "{count}: {pass:?}");
                orders.insert(pass.to_vec());
            }
            assert!(
                count < 17
                    || orders.len() == 3 && !orders.contains(&(0..count).collect::<Vec<_>>())
            );
        }
    }

    #[test]
    fn random_requests_come_in_runs_and_in_part() {
        let follows = |shape: Shape, by: u64| {
            let all = blocks(&spec(Pattern::RandRead, 256, shape), &[Kind::Read], 4000);
            all.windows(2)
                .filter(|two| two[1] == (two[0] + by) % 256)
                .count()
        };
        let runs = |runs| Shape {
            runs: Some(runs),
            ..Shape::default()
        };
        assert!((2950..3100).contains(&follows(runs(Runs::Sequential(4)), 1)));
        assert!((2950..3100).contains(&follows(runs(Runs::Identical(4)), 0)));
        let part = Shape {
            random_percent: Some(25),
            ..Shape::default()
        };
        assert!((2850..3150).contains(&follows(part, 1)));
    }

    #[test]
    fn sizes_differ_and_fit() {
        let split = Sizes::Split(vec![(4096, 50), (32768, 50)]);
        for pattern in [Pattern::Read, Pattern::RandRead] {
            let shape = Shape {
                reads: Some(split.clone()),
                ..Shape::default()
            };
            let spec = Spec {
                block_bytes: 32768,
                ..spec(pattern, 9, shape)
            };
            let all = walk(&spec, &[Kind::Read], 300);
            assert!(
                all.iter()
                    .all(|(at, bytes)| at + bytes <= 9 * 4096 && at % 4096 == 0)
            );
            assert!(all.iter().any(|r| r.1 == 4096) && all.iter().any(|r| r.1 == 32768));
            if pattern == Pattern::Read {
                assert!(
                    all.windows(2)
                        .all(|two| two[1].0 == 0 || two[1].0 == two[0].0 + two[0].1)
                );
                // All of the range, again and again.
                let ends = all
                    .windows(2)
                    .filter(|two| two[1].0 == 0)
                    .map(|two| two[0].0 + two[0].1);
                assert!(ends.clone().count() > 10);
                assert!({ ends }.all(|end| end == 9 * 4096));
            }
        }
    }

    #[test]
    fn files_are_asked_in_turn() {
        let of = |service, count| {
            let shape = Shape {
                more_files: vec!["b".into(), "c".into()],
                service,
                ..Shape::default()
            };
            let spec = spec(Pattern::Write, 2, shape);
            // Files lie at multiples of their range.
            blocks(&spec, &[Kind::Write], count)
                .iter()
                .map(|n| (n / 2, n % 2))
                .collect::<Vec<_>>()
        };
        let round = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 0)];
        assert_eq!(of(Service::RoundRobin(1), 7), round);
        let whole = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (0, 0)];
        assert_eq!(of(Service::Sequential, 7), whole);
        assert_eq!(of(Service::RoundRobin(2), 7), whole);
        for pass in of(Service::Random(1), 60).chunks(6) {
            let mut sorted = pass.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]);
        }
    }
}
