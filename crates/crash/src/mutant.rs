//! Images that break the rules that keep a crash harmless, to see that the enumeration catches them.
//!
//! A mutant is the true image behind a layer that does one thing wrong, as a careless build of the flush planner or
//! of the disk layer would. Nothing of it is in any crate that is shipped. Mutants of what works on
//! closed images (repairs, edits) are barriers that [`io::Fault::lie`] leaves out.

use block::{GuestOffset, Result, Storage, Zeroed};
use image::{
    Compressed, Description, Encryption, Extent, Fill, FlushRun, Foreseen, Freed, Image, Load,
    MetaWrite, Plan, Prewrite, Reserve, Stage, Step, Ticket, ZeroMode, ZeroPlan,
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// A flush has one barrier, at its end.
    BarrierLeftOut,
    /// The stages of a flush go in the wrong order.
    OrderSwapped,
    /// What the first of several stages writes (refcounts, new tables) is written by the next flush.
    RefcountsLate,
    /// What the last stage writes (entries) is written by the next flush.
    EntriesLate,
    /// A flush with nothing but entries has no barrier.
    NoBarrier,
    /// The header names the refcount table's new place before the table is there.
    HeaderFirst,
    /// The bit that says that refcounts are behind is set after the first tables were written, not before.
    DirtyBitLate,
    /// New clusters become the guest's before their data are written.
    CommitBeforeData,
    /// Freed space is given out again before the flush that freed it is durable.
    ReusedEarly,
    /// What a write leaves of a new cluster is not zeroed.
    RestNotZeroed,
    /// What a write leaves of a new cluster is not copied from below.
    RestNotCopied,
    /// A flush that failed counts as one that succeeded.
    FailureForgotten,
    /// A write that failed makes its cluster the guest's nevertheless.
    FailureCommitted,
}

impl Mutant {
    /// All of them.
    pub const ALL: [Mutant; 13] = [
        Mutant::BarrierLeftOut,
        Mutant::OrderSwapped,
        Mutant::RefcountsLate,
        Mutant::EntriesLate,
        Mutant::NoBarrier,
        Mutant::HeaderFirst,
        Mutant::DirtyBitLate,
        Mutant::CommitBeforeData,
        Mutant::ReusedEarly,
        Mutant::RestNotZeroed,
        Mutant::RestNotCopied,
        Mutant::FailureForgotten,
        Mutant::FailureCommitted,
    ];
}

/// `image`, or a mutant of it.
pub fn wrap(image: Arc<dyn Image>, mutant: Option<Mutant>) -> Arc<dyn Image> {
    match mutant {
        None => image,
        Some(mutant) => Arc::new(Mutated {
            image,
            mutant,
            state: Mutex::default(),
        }),
    }
}

#[derive(Debug)]
struct Mutated {
    image: Arc<dyn Image>,
    mutant: Mutant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Writes that the next flush makes.
    late: Vec<(MetaWrite, Vec<u8>)>,
    /// Tickets that were committed early.
    committed: Vec<Ticket>,
    /// The run has been ended early.
    ended: bool,
}

/// The writes of a stage with their bytes.
type Writes = Vec<(MetaWrite, Vec<u8>)>;

fn stages_of(run: &FlushRun) -> Vec<Writes> {
    let stage = |stage: &Stage| {
        let writes = run.writes[stage.first..stage.end].iter();
        writes
            .map(|w| (*w, run.bytes[w.start..w.start + w.len].to_vec()))
            .collect()
    };
    run.stages.iter().map(stage).collect()
}

fn refill(run: &mut FlushRun, stages: Vec<Writes>) {
    let cookie = run.cookie;
    run.clear();
    run.cookie = cookie;
    for stage in stages {
        for (write, bytes) in stage {
            run.push(write.file, write.offset, &bytes);
        }
        run.seal();
    }
}

impl Mutated {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn break_run(&self, run: &mut FlushRun) {
        let mut stages = stages_of(run);
        let several = stages.len() > 1;
        match self.mutant {
            Mutant::BarrierLeftOut if several => stages = vec![stages.concat()],
            Mutant::OrderSwapped if several => stages.reverse(),
            Mutant::RefcountsLate | Mutant::EntriesLate
                if several || !self.state().late.is_empty() =>
            {
                let late = match self.mutant {
                    _ if !several => Vec::new(),
                    Mutant::RefcountsLate => std::mem::take(&mut stages[0]),
                    _ => stages.pop().unwrap_or_default(),
                };
                let before = std::mem::replace(&mut self.state().late, late);
                stages[0].splice(0..0, before);
            }
            Mutant::NoBarrier if !several => {
                // A run without stages ends without a barrier; its writes go with the next one.
                let before = std::mem::replace(&mut self.state().late, stages.concat());
                stages = Vec::new();
                if !before.is_empty() {
                    self.state().late.splice(0..0, before);
                }
            }
            Mutant::NoBarrier => {
                let before = std::mem::take(&mut self.state().late);
                stages[0].splice(0..0, before);
            }
            Mutant::HeaderFirst => {
                let is_header = |stage: &Writes| stage.iter().any(|(w, _)| w.offset.0 == 0);
                if let Some(at) = stages.iter().position(is_header) {
                    let header = stages.remove(at);
                    stages.insert(0, header);
                }
            }
            Mutant::DirtyBitLate => {
                let is_header = |stage: &Writes| stage.iter().any(|(w, _)| w.offset.0 == 0);
                if several && is_header(&stages[0]) {
                    stages.rotate_left(1);
                }
            }
            _ => return,
        }
        refill(run, stages);
    }
}

impl Image for Mutated {
    fn describe(&self) -> Description {
        self.image.describe()
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        self.image.map(at, len)
    }

    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        let mut step = self.image.plan_write(at, len)?;
        if let Step::Done(Plan::Allocate(allocation)) = &mut step {
            match (self.mutant, allocation.fill) {
                (Mutant::CommitBeforeData, _) => {
                    self.image.commit(allocation.ticket);
                    self.state().committed.push(allocation.ticket);
                }
                (Mutant::RestNotZeroed, Fill::Zero) => allocation.zeroed = true,
                (Mutant::RestNotCopied, Fill::Existing) => {
                    allocation.fill = Fill::Nothing;
                }
                _ => {}
            }
        }
        Ok(step)
    }

    fn foresee(&self) -> Option<Foreseen> {
        self.image.foresee()
    }

    fn joined(&self, at: GuestOffset, len: u64) {
        self.image.joined(at, len);
    }

    fn encryption(&self) -> Option<&Encryption> {
        self.image.encryption()
    }

    fn commit(&self, ticket: Ticket) {
        let mut state = self.state();
        match state.committed.iter().position(|t| *t == ticket) {
            Some(at) => {
                state.committed.swap_remove(at);
            }
            None => self.image.commit(ticket),
        }
    }

    fn abort(&self, ticket: Ticket) {
        match self.mutant {
            Mutant::FailureCommitted => self.image.commit(ticket),
            Mutant::CommitBeforeData => self.commit(ticket),
            _ => self.image.abort(ticket),
        }
    }

    fn plan_zero(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Result<Step<ZeroPlan>> {
        self.image.plan_zero(at, len, mode)
    }

    fn loaded(&self, load: &Load, bytes: &[u8]) -> Result<()> {
        self.image.loaded(load, bytes)
    }

    fn load_failed(&self, load: &Load) {
        self.image.load_failed(load);
    }

    fn reserved(&self, reserve: &Reserve, zeroed: Zeroed) {
        self.image.reserved(reserve, zeroed);
    }

    fn reserve_failed(&self, reserve: &Reserve) {
        self.image.reserve_failed(reserve);
    }

    fn prewrite(&self, on: bool) {
        self.image.prewrite(on);
    }

    fn prewritten(&self, prewrite: &Prewrite, ok: bool) {
        self.image.prewritten(prewrite, ok);
    }

    fn decompress(&self, cluster: &Compressed, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.image.decompress(cluster, input, output)
    }

    fn flush_begin(&self, run: &mut FlushRun) -> Result<()> {
        self.image.flush_begin(run)?;
        if self.mutant == Mutant::ReusedEarly {
            self.image.flush_end(run, true);
            self.state().ended = true;
            let mut freed = Vec::new();
            self.image.take_freed(&mut freed);
            for freed in freed {
                self.image.release(&freed, Zeroed::No);
            }
        }
        self.break_run(run);
        Ok(())
    }

    fn flush_end(&self, run: &mut FlushRun, ok: bool) {
        if !std::mem::take(&mut self.state().ended) {
            let ok = ok || self.mutant == Mutant::FailureForgotten;
            self.image.flush_end(run, ok);
        }
    }

    fn is_dirty(&self) -> bool {
        self.image.is_dirty()
    }

    fn take_freed(&self, out: &mut Vec<Freed>) {
        self.image.take_freed(out);
    }

    fn release(&self, freed: &Freed, zeroed: Zeroed) {
        self.image.release(freed, zeroed);
    }

    fn close(&self, files: &[&dyn Storage]) -> Result<()> {
        for (write, bytes) in std::mem::take(&mut self.state().late) {
            files[usize::from(write.file.0)].write_at(write.offset.0, &bytes)?;
        }
        self.image.close(files)
    }
}
