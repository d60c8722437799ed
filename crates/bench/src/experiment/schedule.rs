//! Which samples a run takes still, and how many rounds there is time for.

use super::plan::{Cell, Image};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// What a sample costs besides its load, before the first was seen.
const AROUND: Duration = Duration::from_millis(450);

/// Of a run's time, what rounds more than were asked for leave: a round may take longer than was thought.
const SPARE: Duration = Duration::from_secs(30);

/// The samples of a run: those that are there, those that are to come, and the time for them.
#[derive(Debug)]
pub(super) struct Schedule<'a> {
    began: Instant,
    /// All of the run takes so long at most.
    limit: Option<Duration>,
    /// Rounds that were asked for.
    rounds: usize,
    /// So many are run while there is any time: the last of them is the first in which something lacked when the run began.
    least: usize,
    /// Cells that are to come, from the one at work on.
    cells: &'a [&'a Cell],
    /// What is there: cell, side, round.
    taken: BTreeSet<(String, String, usize)>,
    /// Sides (with their cells) that are given up.
    given_up: BTreeSet<(String, String)>,
    /// What a sample takes that was not measured yet.
    expected: Duration,
    /// Samples that this run took or tried, and how long they took.
    costs: (u32, Duration),
    /// Images that are there for the rest of the run.
    images: BTreeSet<Image>,
    /// Images of that kind that this run made, and how long that took.
    makings: (u32, Duration),
}

impl<'a> Schedule<'a> {
    /// Of `rounds` rounds of all `cells`, whose samples measure for `load`, ramp included.
    pub(super) fn new(
        cells: &'a [&'a Cell],
        rounds: usize,
        load: Duration,
        limit: Option<Duration>,
        began: Instant,
    ) -> Self {
        Self {
            began,
            limit,
            rounds,
            least: 1,
            cells,
            taken: BTreeSet::new(),
            given_up: BTreeSet::new(),
            expected: load + AROUND,
            costs: (0, Duration::ZERO),
            images: BTreeSet::new(),
            makings: (0, Duration::ZERO),
        }
    }

    /// A sample is there: this run took it, or one before.
    pub(super) fn has(&mut self, cell: &str, side: &str, round: usize) {
        self.taken.insert((cell.to_owned(), side.to_owned(), round));
    }

    /// All that is there was told: the run goes on with the first round that lacks something. Those before it take no time, so there
    /// would always be time for them alone, and the run would end without a sample where another round does not fit.
    pub(super) fn go_on(&mut self) {
        let next = (1..=self.rounds).find(|rounds| self.left(*rounds) > 0);
        self.least = next.unwrap_or(1);
    }

    /// All cells have had their rounds: these get more of them, `rounds` in all, as far as there is time.
    pub(super) fn again(&mut self, cells: &'a [&'a Cell], rounds: usize) {
        (self.cells, self.rounds, self.least) = (cells, rounds, 1);
        // What is not needed is not worth a run that takes longer than was said.
        self.limit = self.limit.map(|limit| limit.saturating_sub(SPARE));
        // They went with the last cell that needed them.
        self.images.clear();
    }

    /// Rounds that each cell is to have, where there is time.
    pub(super) fn wanted(&self) -> usize {
        self.rounds
    }

    /// A side of a cell is not measured any more.
    pub(super) fn give_up(&mut self, cell: &str, side: &str) {
        self.given_up.insert((cell.to_owned(), side.to_owned()));
    }

    /// `samples` were tried, and took so long together.
    pub(super) fn spent(&mut self, samples: usize, time: Duration) {
        self.costs.0 = self
            .costs
            .0
            .saturating_add(u32::try_from(samples).unwrap_or(u32::MAX));
        self.costs.1 += time;
    }

    /// An image was made that stays.
    pub(super) fn made(&mut self, image: Image, time: Duration) {
        self.images.insert(image);
        self.makings.0 += 1;
        self.makings.1 += time;
    }

    /// A cell has ended.
    pub(super) fn ended(&mut self) {
        self.cells = self.cells.get(1..).unwrap_or_default();
    }

    /// Samples that are there.
    pub(super) fn done(&self) -> usize {
        self.taken.len()
    }

    /// Whether a sample is to be taken: it is not there, and its side not given up.
    pub(super) fn lacks(&self, cell: &str, side: &str, round: usize) -> bool {
        let side = (cell.to_owned(), side.to_owned());
        if self.given_up.contains(&side) {
            return false;
        }
        !self.taken.contains(&(side.0, side.1, round))
    }

    /// Whether the time is over.
    pub(super) fn is_over(&self) -> bool {
        self.limit
            .is_some_and(|limit| self.began.elapsed() >= limit)
    }

    /// How many rounds there is time for, if all cells from the one at work on get as many; none when the time is over.
    pub(super) fn rounds(&self) -> usize {
        let Some(limit) = self.limit else {
            return self.rounds;
        };
        let left = limit.saturating_sub(self.began.elapsed());
        self.rounds_in(left)
    }

    fn rounds_in(&self, time: Duration) -> usize {
        if time.is_zero() {
            return 0;
        }
        let enough = |rounds: &usize| self.time_for(*rounds) <= time;
        let fit = (1..=self.rounds).rev().find(enough).unwrap_or(1);
        fit.max(self.least)
    }

    /// Samples that are to come when there are so many rounds of each cell.
    pub(super) fn left(&self, rounds: usize) -> usize {
        let sides = self.cells.iter().flat_map(|cell| {
            let named = |side: &'a super::plan::Side| (&cell.name, &side.name);
            cell.sides.iter().map(named)
        });
        let lacking = |(cell, side): (&String, &String)| {
            (0..rounds)
                .filter(|round| self.lacks(cell, side, *round))
                .count()
        };
        sides.map(lacking).sum()
    }

    /// How long so many rounds of the cells that are to come take, with their images, by what samples and images took so far.
    pub(super) fn time_for(&self, rounds: usize) -> Duration {
        let each = match self.costs {
            (0, _) => self.expected,
            (samples, time) => time / samples,
        };
        let many = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let (makings, time) = self.makings;
        let image = time.checked_div(makings).unwrap_or_default();
        let sides = self.cells.iter().flat_map(|cell| {
            let named = |side: &'a super::plan::Side| (&cell.name, side);
            cell.sides.iter().map(named)
        });
        // Nobody makes the image of a side that has all its samples, or gets no more.
        let lacking = sides
            .filter(|(cell, side)| (0..rounds).any(|round| self.lacks(cell, &side.name, round)));
        let stay = lacking
            .map(|(_, side)| side.image)
            .filter(|image| image.stays());
        let unmade = stay
            .collect::<BTreeSet<_>>()
            .difference(&self.images)
            .count();
        each.saturating_mul(many(self.left(rounds)))
            .saturating_add(image.saturating_mul(many(unmade)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::{find, run::cells};

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn rounds_are_as_many_as_there_is_time_for() {
        let e3 = find("E3").unwrap();
        let cells = cells(&e3, true, Some("read-*k")).unwrap();
        let sides: usize = cells.iter().map(|cell| cell.sides.len()).sum();
        let side = u32::try_from(sides).unwrap();
        let load = S - AROUND;
        let mut schedule = Schedule::new(&cells, 5, load, Some(S), Instant::now());
        // A round takes as many seconds as there are sides.
        for (time, expected) in [
            (5 * side * S, 5),
            (5 * side * S - S, 4),
            (2 * side * S, 2),
            (S, 1),
            (Duration::ZERO, 0),
        ] {
            assert_eq!(schedule.rounds_in(time), expected, "{time:?}");
        }
        assert_eq!(schedule.left(5), 5 * sides);
        // What is there costs nothing, nor does what is given up, and cells that have ended.
        let (first, second) = (&cells[0], &cells[1]);
        for round in 0..5 {
            schedule.has(&first.name, &first.sides[0].name, round);
        }
        schedule.has(&second.name, &second.sides[1].name, 4);
        schedule.give_up(&second.name, &second.sides[0].name);
        assert_eq!(
            (schedule.left(5), schedule.left(4)),
            (5 * sides - 11, 4 * sides - 8)
        );
        assert_eq!(schedule.done(), 6);
        assert!(!schedule.lacks(&first.name, &first.sides[0].name, 4));
        assert!(schedule.lacks(&first.name, &first.sides[1].name, 4));
        // Samples that take longer than was expected leave time for fewer.
        assert_eq!(schedule.rounds_in(4 * side * S), 4);
        schedule.spent(10, 20 * S);
        assert_eq!(schedule.rounds_in(4 * side * S), 2);
        // And what is done besides, which is no sample of its own.
        schedule.spent(0, 20 * S);
        assert_eq!(schedule.rounds_in(4 * side * S), 1);
        // So do images that are to be made: a raw file is there, a qcow2 image is not.
        let before = schedule.time_for(1);
        schedule.made(first.sides[0].image, 7 * S);
        assert_eq!(schedule.time_for(1), before + 7 * S);
        schedule.ended();
        assert_eq!(schedule.left(1), sides - first.sides.len() - 1);
        for _ in &cells {
            schedule.ended();
        }
        assert_eq!((schedule.left(5), schedule.rounds_in(S)), (0, 5));
    }

    #[test]
    fn a_run_that_goes_on_takes_the_next_round_and_makes_its_images_only() {
        let e3 = find("E3").unwrap();
        let cells = cells(&e3, true, Some("read-*k")).unwrap();
        let mut schedule = Schedule::new(&cells, 5, S - AROUND, Some(S), Instant::now());
        schedule.go_on();
        assert_eq!(schedule.rounds_in(S), 1);
        for round in 0..2 {
            for cell in &cells {
                for side in &cell.sides {
                    schedule.has(&cell.name, &side.name, round);
                }
            }
        }
        schedule.go_on();
        // Too little for all of the third; what there is time for is taken.
        assert_eq!((schedule.left(2), schedule.rounds_in(S)), (0, 3));
        assert_eq!(schedule.rounds_in(Duration::ZERO), 0);
        let raw = cells[0].sides[0].image;
        let mut images = cells.iter().flat_map(|cell| &cell.sides);
        let other = images.find(|side| side.image.stays() && side.image != raw);
        assert!(other.is_some());
        schedule.made(raw, 7 * S);
        assert_eq!(schedule.time_for(2), Duration::ZERO);
        let third = schedule.left(3);
        assert!(schedule.time_for(3) >= u32::try_from(third).unwrap() * S + 7 * S);
        for cell in &cells {
            for side in cell.sides.iter().filter(|side| side.image != raw) {
                schedule.give_up(&cell.name, &side.name);
            }
        }
        let third = schedule.left(3);
        assert_eq!(schedule.time_for(3), u32::try_from(third).unwrap() * S);
    }

    #[test]
    fn cells_that_get_more_rounds_get_as_many_as_there_is_time_for() {
        let e3 = find("E3").unwrap();
        let cells = cells(&e3, true, Some("read-*k")).unwrap();
        let mut schedule = Schedule::new(&cells, 5, S - AROUND, Some(S), Instant::now());
        for cell in &cells {
            for side in &cell.sides {
                for round in 0..5 {
                    schedule.has(&cell.name, &side.name, round);
                }
            }
        }
        for _ in &cells {
            schedule.ended();
        }
        let raw = cells[0].sides[0].image;
        schedule.made(raw, 7 * S);
        let some = &cells[..2];
        schedule.again(some, 20);
        assert_eq!(schedule.wanted(), 20);
        let sides: usize = some.iter().map(|cell| cell.sides.len()).sum();
        let round = u32::try_from(sides).unwrap() * S;
        assert_eq!((schedule.left(5), schedule.left(8)), (0, 3 * sides));
        // Their images are made anew.
        let images = schedule.time_for(6) - round;
        assert!(images >= 7 * S, "{images:?}");
        assert_eq!(schedule.rounds_in(images + 3 * round), 8);
        // None is begun that there is no time for.
        assert_eq!(schedule.rounds_in(images + round - S), 5);
    }

    #[test]
    fn a_run_without_a_limit_has_all_its_rounds() {
        let schedule = Schedule::new(&[], 7, S, None, Instant::now());
        assert!(schedule.rounds() == 7 && !schedule.is_over());
        let schedule = Schedule::new(&[], 7, S, Some(Duration::ZERO), Instant::now());
        assert!(schedule.rounds() == 0 && schedule.is_over());
    }
}
