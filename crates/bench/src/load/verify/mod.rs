//! Verify mode: each block says where it belongs and when it was written, and every read is compared with what must be there.
//!
//! - `stamp`: what a sector carries;
//! - `ledger`: what each block must hold; no two requests are at a block at a time, so that this is known at any depth;
//! - `state`: the same in a file, for a load after a restart of the server; kept while the load runs, so that it is there whoever is
//!   killed.
//!
//! ```text
//!   state there?  read all that it knows          what a restart or a crash has left
//!   the load      writes carry stamps, reads are compared; each queue flushes at its end
//!   read all that is known                        what was lost, misplaced or torn since
//!   close the state
//! ```

mod ledger;
mod mapped;
mod stamp;
mod state;

pub(crate) use ledger::Ledger;

use super::{
    Against, By, Flushes, Pattern, Report, Shape, Spec,
    drive::Client,
    plan::{Kind as RequestKind, Request},
};
use block::Result;
use serde::{Deserialize, Serialize};
use state::State;
use std::{
    fmt,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Faults that are described one by one; all of them are counted.
pub const FAULTS_MAX: usize = 100;
/// What a read's memory holds before, so that a server which brings nothing is seen to.
const POISON: u8 = 0xa5;

/// How a load verifies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verify {
    /// Where what is known of the disk is kept from load to load. What a file that is there knows is read first.
    pub state: Option<PathBuf>,
}

/// What is wrong with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Something that never belonged there, or that changed.
    Wrong,
    /// All of it is from before the last write: that was lost.
    Stale,
    /// A part of it is from before the last write.
    Torn,
}

/// A block that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Where it begins on the disk.
    pub offset: u64,
    /// Its first sector that is not as it must be.
    pub sector: u64,
    /// What is wrong.
    pub kind: Kind,
    /// So many of its sectors…
    pub sectors: u32,
    /// … of so many.
    pub of: u32,
    /// What must be there.
    pub expected: String,
    /// What is there.
    pub found: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Wrong => "wrong",
            Kind::Stale => "stale",
            Kind::Torn => "torn",
        };
        write!(
            f,
            "{kind}: at {}, in {} of {} sectors from {} on: {} was expected, {} is there",
            self.offset, self.sectors, self.of, self.sector, self.expected, self.found
        )
    }
}

/// What verifying has found, in the reads of the load and in those before and behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Blocks that were written.
    pub written: u64,
    /// Blocks that were compared.
    pub checked: u64,
    /// Of these, those of which nothing was known: the load had not written there.
    pub unknown: u64,
    /// Blocks that hold what never belonged there.
    pub wrong: u64,
    /// Blocks whose last write is lost.
    pub stale: u64,
    /// Blocks that have a part of their last write.
    pub torn: u64,
    /// Requests that failed before and behind the load itself.
    pub unread: u64,
    /// The first [`FAULTS_MAX`] of them.
    pub faults: Vec<Fault>,
}

impl Verified {
    /// Blocks that are not as they must be, and those that could not be read to see.
    pub fn bad(&self) -> u64 {
        self.wrong + self.stale + self.torn + self.unread
    }
}

/// Runs a load that verifies.
///
/// # Errors
///
/// Those of a load, and those of the state. Where the load fails the state knows all that may be on the disk then, as it does where
/// this process is killed.
pub(super) fn run(spec: &Spec, options: &Verify, by: By<'_>) -> Result<Report> {
    let (state, known) = match &options.state {
        Some(path) => {
            let (state, known) = State::open(path, spec)?;
            (Some(state), known)
        }
        None => (None, None),
    };
    let run = known.as_ref().map_or_else(new_run, |known| known.run);
    let ledger = Ledger::new(run, spec.block_bytes);
    if let Some(known) = &known {
        ledger.restore(known);
        if known.interrupted {
            tracing::info!(
                "the last load with this --state did not come to its end: what no flush had covered may be old or new"
            );
        }
    }
    if let Some(state) = state {
        ledger.keep_in(state);
    }
    let report = load(spec, &ledger, known.is_some(), by.locked)?;
    ledger.close()?;
    Ok(report)
}

fn load(spec: &Spec, ledger: &Ledger, goes_on: bool, locked: bool) -> Result<Report> {
    let mut unread = 0;
    if goes_on {
        unread += sweep(spec, ledger, locked)?;
    }
    let against = Against {
        ledger: Some(ledger),
        list: None,
    };
    let by = By {
        against,
        locked,
        ..By::default()
    };
    let mut report = super::run_on(spec, by)?;
    if ledger.lock().written > 0 {
        unread += sweep(spec, ledger, locked)?;
    }
    let inner = ledger.lock();
    let [wrong, stale, torn] = inner.counts;
    report.verify = Some(Verified {
        written: inner.written,
        checked: inner.checked,
        unknown: inner.unknown,
        wrong,
        stale,
        torn,
        unread,
        faults: inner.faults.clone(),
    });
    Ok(report)
}

/// Reads all blocks of which something is known; how many could not be read.
fn sweep(spec: &Spec, ledger: &Ledger, locked: bool) -> Result<u64> {
    let known = ledger.known();
    if known.is_empty() {
        return Ok(0);
    }
    let reads = Spec {
        pattern: Pattern::Read,
        flushes: Flushes::Never,
        ios_max: Some(known.len() as u64),
        duration: Duration::ZERO,
        ramp: Duration::ZERO,
        think: Duration::ZERO,
        rate: None,
        zipf: None,
        shape: Shape::default(),
        count_syscalls: false,
        control: None,
        ..spec.clone()
    };
    let against = Against {
        ledger: Some(ledger),
        list: Some(&known),
    };
    let by = By {
        against,
        locked,
        ..By::default()
    };
    Ok(super::run_on(&reads, by)?.errors)
}

/// A number that no other load has had, most likely.
fn new_run() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let ns = since.map_or(0, |since| since.as_nanos() as u64);
    (ns ^ u64::from(std::process::id()).rotate_left(48)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// What a slot's request is at.
#[derive(Clone, Copy, Debug, Default)]
enum At {
    #[default]
    Nothing,
    Read {
        index: u64,
        offset: u64,
    },
    Write(u64),
    Flush(u32),
}

/// One queue's part.
#[derive(Debug)]
pub(crate) struct Verifier<'a> {
    ledger: &'a Ledger,
    buffer: Vec<u8>,
    slots: Vec<At>,
}

impl<'a> Verifier<'a> {
    pub(crate) fn new(ledger: &'a Ledger, block: usize, depth: usize) -> Self {
        Self {
            ledger,
            buffer: vec![0; block],
            slots: vec![At::Nothing; depth],
        }
    }

    /// A request begins: it may be moved to a block that nobody is at, and its data are put in place.
    pub(crate) fn begin(
        &mut self,
        client: &mut impl Client,
        slot: usize,
        mut request: Request,
    ) -> Result<Request> {
        self.slots[slot] = match request.kind {
            RequestKind::Flush => At::Flush(self.ledger.flush()),
            kind => {
                let write = kind == RequestKind::Write;
                let (index, offset, generation) = self.ledger.take(request.offset, write)?;
                request.offset = offset;
                match write {
                    true => self.ledger.stamp(offset, generation, &mut self.buffer),
                    false => self.buffer.fill(POISON),
                }
                client.put(slot, &self.buffer);
                match write {
                    true => At::Write(index),
                    false => At::Read { index, offset },
                }
            }
        };
        Ok(request)
    }

    /// It ended.
    pub(crate) fn end(&mut self, client: &mut impl Client, slot: usize, ok: bool) {
        match std::mem::take(&mut self.slots[slot]) {
            At::Nothing => {}
            At::Read { index, .. } if !ok => self.ledger.let_go(index),
            At::Read { index, offset } => {
                client.get(slot, &mut self.buffer);
                self.ledger.check(index, offset, &self.buffer);
            }
            At::Write(index) => self.ledger.wrote(index, ok),
            At::Flush(number) if ok => self.ledger.flushed(number),
            At::Flush(_) => {}
        }
    }
}
