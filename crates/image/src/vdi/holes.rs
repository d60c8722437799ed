//! Numbers of blocks that nothing refers to, below the highest in use: a bit for each, at most 4 MiB.

/// A set of numbers of blocks.
#[derive(Debug, Default)]
pub(super) struct Holes {
    words: Vec<u64>,
    /// How many there are.
    count: u32,
    /// No word before this one has a bit.
    from: usize,
}

impl Holes {
    /// Those below `end` that have no bit in `used`, the word 0 of which has the numbers below 64.
    pub(super) fn not_in(mut used: Vec<u64>, end: u32) -> Self {
        used.truncate(end.div_ceil(64) as usize);
        for word in &mut used {
            *word = !*word;
        }
        if !end.is_multiple_of(64)
            && let Some(word) = used.last_mut()
        {
            *word &= (1 << (end % 64)) - 1;
        }
        Self {
            count: used.iter().map(|word| word.count_ones()).sum(),
            words: used,
            from: 0,
        }
    }

    /// The lowest.
    pub(super) fn lowest(&mut self) -> Option<u32> {
        if self.count == 0 {
            return None;
        }
        while self.words.get(self.from) == Some(&0) {
            self.from += 1;
        }
        let bit = self.words.get(self.from)?.trailing_zeros();
        // There are fewer than 2^32.
        Some(self.from as u32 * 64 + bit)
    }

    /// Takes one out.
    pub(super) fn remove(&mut self, number: u32) {
        let word = self.words.get_mut((number / 64) as usize);
        if let Some(word) = word.filter(|word| **word >> (number % 64) & 1 == 1) {
            *word &= !(1 << (number % 64));
            self.count -= 1;
        }
    }

    /// Puts one back in.
    pub(super) fn insert(&mut self, number: u32) {
        let at = (number / 64) as usize;
        if at >= self.words.len() {
            self.words.resize(at + 1, 0);
        }
        if let Some(word) = self
            .words
            .get_mut(at)
            .filter(|w| **w >> (number % 64) & 1 == 0)
        {
            *word |= 1 << (number % 64);
            self.count += 1;
            self.from = self.from.min(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_comes_first_and_what_is_put_back_comes_again() {
        // 0 to 69 but for 3, 64 and 69 are in use.
        let mut used = vec![!(1 << 3), !(1 << 0 | 1 << 5)];
        used.push(0);
        let mut holes = Holes::not_in(used, 70);
        assert_eq!(holes.count, 3);
        let take = |holes: &mut Holes| {
            let lowest = holes.lowest();
            lowest.inspect(|number| holes.remove(*number))
        };
        assert_eq!(take(&mut holes), Some(3));
        assert_eq!(take(&mut holes), Some(64));
        holes.insert(3);
        holes.insert(200);
        let rest: Vec<_> = std::iter::from_fn(|| take(&mut holes)).collect();
        assert_eq!(rest, [3, 69, 200]);
        assert_eq!(holes.count, 0);
        assert_eq!(Holes::not_in(vec![], 0).lowest(), None);
        assert_eq!(Holes::not_in(vec![!0, 0], 64).lowest(), None);
    }
}
