//! What a client does after a write of which it has waited for the end: whether a flush follows.
//!
//! A client that writes, waits, flushes and waits (a database's log, a journal's commit record) leaves the device idle while the
//! answer to its write travels to it and its flush to us. Where that is its habit, the commit that the flush will ask for begins in
//! that time (see [`crate::flush`]).
//!
//! Learned as processors learn branches (T.-Y. Yeh, Y. Patt: Two-Level Adaptive Training Branch Prediction, 1991): what came after the
//! last few such writes selects a counter of how often a flush came next. So a journal's "blocks, record, flush" is known as
//! well as "write, flush".

/// Writes that are looked back at.
const HISTORY: u32 = 4;
/// After so many flushes in a row at a place of the pattern the next one is expected; one that does not come starts anew. So at most one
/// commit of so many and one is for nothing.
const SURE: u8 = 7;

/// The habit of one queue's client.
#[derive(Debug, Default)]
pub(crate) struct Habit {
    /// What came after the last writes, the latest in the lowest bit; 1: a flush.
    history: u8,
    counts: [u8; 1 << HISTORY],
    /// A write has ended by itself, and nothing came since.
    open: bool,
}

impl Habit {
    /// A write ended, and nothing else is in flight. Returns whether a flush is to be expected.
    pub fn wrote(&mut self) -> bool {
        self.open = true;
        self.counts[usize::from(self.history)] >= SURE
    }

    /// A request came, a flush or another.
    #[inline]
    pub fn came(&mut self, flush: bool) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let count = &mut self.counts[usize::from(self.history)];
        *count = if flush { SURE.min(*count + 1) } else { 0 };
        self.history = (self.history << 1 | u8::from(flush)) & (self.counts.len() - 1) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `rounds` rounds of `pattern` (whether a flush follows each write): flushes that were expected, and those expected that
    /// did not come.
    fn learn(habit: &mut Habit, pattern: &[bool], rounds: usize) -> (usize, usize) {
        let (mut met, mut wasted) = (0, 0);
        for flush in pattern.iter().copied().cycle().take(rounds * pattern.len()) {
            let expected = habit.wrote();
            habit.came(flush);
            met += usize::from(expected && flush);
            wasted += usize::from(expected && !flush);
        }
        (met, wasted)
    }

    #[test]
    fn a_flush_after_each_write_is_learned() {
        // Four writes until the history is the same each time, then the counter.
        assert_eq!(learn(&mut Habit::default(), &[true], 100), (100 - 4 - 7, 0));
    }

    #[test]
    fn a_journals_pattern_is_learned() {
        let (met, wasted) = learn(&mut Habit::default(), &[false, true, true], 100);
        assert!(met >= 200 - 20, "{met}");
        assert_eq!(wasted, 0);
    }

    #[test]
    fn who_never_flushes_is_never_expected_to() {
        assert_eq!(learn(&mut Habit::default(), &[false], 100), (0, 0));
    }

    #[test]
    fn of_eight_commits_one_at_most_is_for_nothing() {
        // The worst there is: a flush does not come whenever it is expected.
        let (mut habit, mut flushes, mut wasted) = (Habit::default(), 0, 0);
        for _ in 0..10_000 {
            let expected = habit.wrote();
            habit.came(!expected);
            wasted += usize::from(expected);
            flushes += usize::from(!expected);
        }
        assert!(
            wasted > 0 && wasted * usize::from(SURE) <= flushes,
            "{wasted} of {flushes}"
        );
    }

    #[test]
    fn only_what_follows_a_write_counts() {
        let mut habit = Habit::default();
        learn(&mut habit, &[true], 20);
        // Reads that come at another time.
        habit.came(false);
        assert!(habit.wrote());
    }
}
