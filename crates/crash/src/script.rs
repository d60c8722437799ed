//! A workload in words.
//!
//! Steps are separated by `;`. Places and lengths are in bytes, with `k` and `M`.
//!
//! | step | what it does |
//! |---|---|
//! | `write AT LEN` | writes; `fua AT LEN` durably |
//! | `zero AT LEN` | writes zeros; `unmap AT LEN` gives space back |
//! | `discard AT LEN` | discards |
//! | `flush` | flushes |
//! | `storm N [KIND=WEIGHT …] [len=LEN] [in=LEN]` | N random requests of the kinds above and reads (`read`), `len` bytes at most, in the first `in` bytes of the disk |
//! | `pairs N [KIND=WEIGHT …] [len=LEN] [in=LEN]` | as a storm, one after the other, mostly to one queue and with a flush after each of most of them: what a client does whose flushes are expected |
//! | `close` | closes the image and opens it again |
//! | `kill` | opens it again without closing it, as after the end of a process |
//! | `crash` | opens what a power failure in the step before may have left |
//! | anything else | an operation on the closed image, see [`crate::whole`] |

use crate::random::Random;
use crate::spec::bytes;

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Write, durably perhaps.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Write zeros.
    Zero {
        /// Space may be given back.
        unmap: bool,
    },
    /// Discard.
    Discard,
    /// Flush.
    Flush,
    /// Read.
    Read,
}

/// A guest's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it asks for.
    pub ask: Ask,
    /// First byte, of a sector.
    pub at: u64,
    /// Bytes, whole sectors.
    pub len: u64,
}

/// Kinds of a storm's requests by their names, with usual weights.
const KINDS: [(&str, Ask, u64); 7] = [
    ("write", Ask::Write { fua: false }, 10),
    ("fua", Ask::Write { fua: true }, 1),
    ("zero", Ask::Zero { unmap: false }, 1),
    ("unmap", Ask::Zero { unmap: true }, 1),
    ("discard", Ask::Discard, 1),
    ("flush", Ask::Flush, 1),
    ("read", Ask::Read, 1),
];

/// Many random requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storm {
    /// How many.
    pub count: u64,
    /// Weights of [`KINDS`].
    weights: [u64; KINDS.len()],
    /// Bytes of a request at most.
    len_max: u64,
    /// The part of the disk that they are for, in bytes.
    within: u64,
}

impl Storm {
    /// A request on a disk of `size` bytes.
    pub fn draw(&self, random: &mut Random, size: u64) -> Request {
        let mut lot = random.below(self.weights.iter().sum());
        let kinds = KINDS.iter().zip(self.weights);
        let ask =
            kinds
                .into_iter()
                .find_map(|((_, ask, _), weight)| match lot.checked_sub(weight) {
                    Some(rest) => {
                        lot = rest;
                        None
                    }
                    None => Some(*ask),
                });
        let size = size.min(self.within);
        let at = random.below(size / 512) * 512;
        let len = (1 + random.below(self.len_max / 512)) * 512;
        Request {
            ask: ask.unwrap_or(Ask::Flush),
            at,
            len: len.min(size - at),
        }
    }
}

/// One step of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A request, waited for.
    One(Request),
    /// Many at once.
    Storm(Storm),
    /// One after the other, each with a flush after it.
    Pairs(Storm),
    /// Close and open again.
    Close,
    /// Open again.
    Kill,
    /// Lose power, and open what is left.
    Crash,
    /// A whole-image operation and its arguments.
    Whole(Vec<String>),
}

/// Reads a workload.
///
/// # Errors
///
/// The step that cannot be read.
pub fn parse(text: &str) -> Result<Vec<Step>, String> {
    let steps = text.split([';', '\n']).map(str::trim);
    let steps = steps.filter(|step| !step.is_empty());
    steps.map(step).collect()
}

fn step(text: &str) -> Result<Step, String> {
    let wrong = || format!("step '{text}' cannot be read");
    let words: Vec<&str> = text.split_whitespace().collect();
    let kind = KINDS.iter().find(|(name, ..)| words[0] == *name);
    let whole = || Step::Whole(words.iter().map(|w| w.to_string()).collect());
    match (words.as_slice(), kind) {
        (["close"], _) => Ok(Step::Close),
        (["kill"], _) => Ok(Step::Kill),
        (["crash"], _) => Ok(Step::Crash),
        (["storm" | "pairs", count, rest @ ..], _) => {
            let mut storm = Storm {
                count: bytes(count).ok_or_else(wrong)?,
                weights: KINDS.map(|(.., weight)| weight),
                len_max: 32 << 10,
                within: u64::MAX,
            };
            for word in rest {
                let (key, value) = word.split_once('=').ok_or_else(wrong)?;
                let value = bytes(value).ok_or_else(wrong)?;
                match KINDS.iter().position(|(name, ..)| *name == key) {
                    Some(kind) => storm.weights[kind] = value,
                    None if key == "len" => storm.len_max = value.max(512),
                    None if key == "in" => storm.within = value.max(512),
                    None => return Err(wrong()),
                }
            }
            if words[0] == "storm" {
                return Ok(Step::Storm(storm));
            }
            // Their flushes have places of their own.
            let flush = KINDS.iter().position(|(_, ask, _)| *ask == Ask::Flush);
            storm.weights[flush.ok_or_else(wrong)?] = 0;
            Ok(Step::Pairs(storm))
        }
        (["flush"], _) => Ok(Step::One(Request {
            ask: Ask::Flush,
            at: 0,
            len: 0,
        })),
        ([_, at, len], Some((_, ask, _))) => Ok(Step::One(Request {
            ask: *ask,
            at: bytes(at).ok_or_else(wrong)?,
            len: bytes(len).ok_or_else(wrong)?,
        })),
        (_, Some(_)) => Err(wrong()),
        (["storm" | "pairs"], _) => Err(wrong()),
        (_, None) => Ok(whole()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read() {
        let steps = parse("write 4k 512; flush; storm 9 flush=0 len=4k\n close; grow 2M").unwrap();
        assert_eq!(steps.len(), 5);
        assert_eq!(
            steps[0],
            Step::One(Request {
                ask: Ask::Write { fua: false },
                at: 4096,
                len: 512
            })
        );
        assert_eq!(steps[4], Step::Whole(vec!["grow".into(), "2M".into()]));
        for wrong in [
            "write 1",
            "storm",
            "pairs",
            "storm 5 x=1",
            "storm x",
            "zero a b",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_storm_asks_for_what_has_weight() {
        let Step::Storm(storm) =
            step("storm 5 fua=0 zero=0 unmap=0 discard=0 flush=0 read=0 len=8k in=64k").unwrap()
        else {
            panic!("a storm");
        };
        let mut random = Random::new(1, 2);
        for _ in 0..1000 {
            let request = storm.draw(&mut random, 1 << 20);
            assert_eq!(request.ask, Ask::Write { fua: false });
            assert!(request.len > 0 && request.len <= 8192 && request.at + request.len <= 64 << 10);
        }
    }
}
