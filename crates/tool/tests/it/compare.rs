//! What `compare` finds is what one finds who reads from the beginning, however many read.

use super::convert::chain;
use image::Format;
use std::fs;
use testkit::TempDir;
use tool::compare::{Difference, Failure, Outcome, compare};
use tool::source::Source;
use tool::work::{Stop, Work};

const MIB: usize = 1 << 20;
const LEN: usize = 16 * MIB;

struct Disks {
    dir: TempDir,
    bytes: Vec<u8>,
}

impl Disks {
    /// Two disks of the same bytes, none of them zero.
    fn new() -> Self {
        let dir = TempDir::new();
        let bytes: Vec<u8> = (0..LEN).map(|i| (i / 512 % 250) as u8 + 1).collect();
        fs::write(dir.path("a"), &bytes).unwrap();
        fs::write(dir.path("b"), &bytes).unwrap();
        Self { dir, bytes }
    }

    fn change(&mut self, places: impl Iterator<Item = usize>) {
        for at in places {
            self.bytes[at] ^= 0xff;
        }
        fs::write(self.dir.path("b"), &self.bytes).unwrap();
    }

    fn compare(&self, stop: &Stop) -> Result<Outcome, Failure> {
        let [a, b] = ["a", "b"].map(|name| chain(&self.dir.path(name), true, Format::Raw));
        let mut last = 0;
        let mut progress = |at| {
            assert!(at >= last, "{at} after {last}");
            last = at;
        };
        let mut work = Work::new(stop.clone(), &mut progress);
        let (a, b) = (Source::new(&a).unwrap(), Source::new(&b).unwrap());
        let found = compare(a, b, false, &mut work);
        if matches!(&found, Ok(outcome) if outcome.difference.is_none()) {
            assert_eq!(last, LEN as u64);
        }
        found
    }
}

#[test]
fn of_many_differences_the_first_counts() {
    let mut disks = Disks::new();
    let same = disks.compare(&Stop::default()).unwrap();
    assert_eq!((same.difference, same.read), (None, 2 * LEN as u64));
    // In every piece behind the first MiB one, and late in the first of them: whoever has a later piece is done before.
    let first = MIB + 127 * 1024;
    disks.change((first..LEN).step_by(64 * 1024));
    for _ in 0..200 {
        let found = disks.compare(&Stop::default()).unwrap();
        let at = first as u64;
        assert_eq!(found.difference, Some(Difference::Content { at }));
        assert!(
            found.read < 2 * LEN as u64,
            "it reads on behind what it found"
        );
    }
}

#[test]
fn a_wish_to_stop_ends_it() {
    let stop = Stop::default();
    stop.request();
    let ended = Disks::new().compare(&stop);
    let Err(Failure::Stopped(error)) = ended else {
        panic!("{ended:?}");
    };
    assert_eq!(error.kind(), block::ErrorKind::Interrupted);
}
