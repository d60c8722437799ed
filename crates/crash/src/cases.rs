//! Workloads × images × ways to drive them.

use crate::judge::{Judge, Look};
use crate::model::When;
use crate::mutant::Mutant;
use crate::random::Random;
use crate::run::{Outcome, Plan, run};
use crate::script;
use crate::spec::Spec;
use crate::states::{Bounds, Moment, StateId, moments};
use io::{Fault, FaultOp};
use std::fmt;

/// A workload and the images that it is run on.
struct Workload {
    name: &'static str,
    /// See [`script`].
    script: &'static str,
    /// See [`Spec`].
    images: &'static [&'static str],
    /// How it is driven: numbers of queues, 0 for the blocking driver.
    queues: &'static [usize],
}

const WORKLOADS: &[Workload] = &[
    Workload {
        name: "allocate",
        script: "storm 30 discard=0 unmap=0; flush; storm 20; kill; storm 20 flush=3",
        images: &[
            "cluster_size=64k size=4M",
            "cluster_size=4k",
            "cluster_size=512 size=512k refcount_bits=64",
            "cluster_size=4k compat=0.10",
            "cluster_size=2M size=8M",
            "cluster_size=16k extended_l2",
            "cluster_size=4k junk=256k",
            "cluster_size=4k lazy_refcounts",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "refcounts",
        script: "storm 40 flush=4 len=16k; discard 0 256k; flush; storm 30 flush=4",
        images: &[
            "cluster_size=1k size=512k refcount_bits=1",
            "cluster_size=1k size=512k refcount_bits=2",
            "cluster_size=1k size=512k refcount_bits=4",
            "cluster_size=1k size=512k refcount_bits=8",
            "cluster_size=1k size=512k refcount_bits=32",
            "cluster_size=512 size=512k refcount_bits=64",
        ],
        queues: &[0, 3],
    },
    Workload {
        name: "overwrite",
        script: "write 0 256k; flush; storm 60 discard=0 unmap=0 zero=0 fua=4 flush=4 len=8k",
        images: &["cluster_size=4k size=256k", "cluster_size=64k size=256k"],
        queues: &[0, 2],
    },
    Workload {
        name: "copy-on-write",
        script: "storm 60 flush=3; close; storm 30",
        images: &[
            "cluster_size=4k backing",
            "cluster_size=64k backing",
            "cluster_size=512 size=512k backing",
            "cluster_size=16k extended_l2 backing",
            "cluster_size=2M extended_l2 size=4M backing",
            "cluster_size=4k backing junk=512k",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "discard",
        script: "write 0 256k; flush; storm 80 discard=6 unmap=6 flush=4 len=64k; discard 0 256k; storm 20",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=16k extended_l2",
            "cluster_size=4k size=512k backing",
            "cluster_size=1k size=256k refcount_bits=1",
        ],
        queues: &[0, 3],
    },
    Workload {
        name: "zeroes",
        script: "storm 70 zero=6 unmap=4 flush=3 len=48k",
        images: &[
            "cluster_size=4k backing",
            "cluster_size=64k extended_l2 backing",
            "cluster_size=16k compat=0.10 backing",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "lazy",
        script: "storm 30 discard=3 flush=3; kill; storm 20 flush=3; close; storm 20 unmap=3; discard 0 128k; flush; storm 10",
        images: &[
            "cluster_size=4k lazy_refcounts",
            "cluster_size=512 size=512k refcount_bits=64 lazy_refcounts",
            "cluster_size=64k lazy_refcounts backing",
            "cluster_size=16k extended_l2 lazy_refcounts",
            "cluster_size=4k lazy_refcounts data_file",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "lazy-growth",
        script: "write 0 1536k; flush; storm 10 write=20 flush=4 len=128k; write 1536k 1M; flush; discard 0 1M; flush; storm 20",
        images: &["cluster_size=512 size=4M refcount_bits=64 lazy_refcounts"],
        queues: &[0],
    },
    Workload {
        name: "data-file",
        script: "storm 50 flush=3; kill; storm 30",
        images: &[
            "cluster_size=4k data_file",
            "cluster_size=16k extended_l2 data_file backing",
            "cluster_size=64k data_file_raw",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "encrypted",
        script: "storm 40 flush=3; kill; storm 20",
        images: &[
            "cluster_size=16k size=512k luks",
            "cluster_size=4k size=512k luks backing",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "snapshots",
        script: "storm 25; snapshot-create a; storm 25; snapshot-create b; storm 15; snapshot-apply a; storm 20; \
                 snapshot-delete b; storm 10; snapshot-delete a; storm 10",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=512 size=256k refcount_bits=64",
            "cluster_size=4k size=512k refcount_bits=4 backing",
            "cluster_size=4k size=512k lazy_refcounts",
            "cluster_size=16k extended_l2",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "resize",
        script: "storm 30; resize 1M; storm 20; resize 300k; storm 20; resize 5M; storm 20 len=128k; resize 512k; storm 10",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=512 size=512k refcount_bits=64",
            "cluster_size=4k size=512k backing",
            "cluster_size=16k size=512k extended_l2",
            "cluster_size=4k size=512k lazy_refcounts backing",
            "cluster_size=4k size=512k data_file",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "amend",
        script: "storm 30; amend refcount_bits 64; storm 10; amend refcount_bits 1; storm 10; amend refcount_bits 16; \
                 storm 10; downgrade; storm 10; amend compat 3; storm 10",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=512 size=256k backing",
        ],
        queues: &[0],
    },
    Workload {
        name: "bitmaps",
        script: "storm 10; bitmap-add a; storm 20; close; storm 10; bitmap-add b; storm 10; bitmap-disable a; \
                 storm 10; bitmap-merge b a; kill; storm 10; bitmap-remove a; storm 5",
        images: &[
            "cluster_size=4k size=512k",
            "cluster_size=4k size=512k lazy_refcounts",
            "cluster_size=16k extended_l2 backing",
        ],
        queues: &[0, 2],
    },
    Workload {
        name: "table-growth",
        // 64 refcounts in a block, 64 blocks in a cluster of the table: it moves at 2 MiB.
        script: "write 0 1536k; flush; storm 20 write=20 flush=6 len=128k; write 1536k 1M; flush; storm 20 flush=4",
        images: &["cluster_size=512 size=4M refcount_bits=64"],
        queues: &[0, 2],
    },
];

/// One workload on one image, driven in one way.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    workload: &'static str,
    image: &'static str,
    script: &'static str,
    queues: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let image = self.image.replace("cluster_size=", "").replace(' ', ",");
        let drive = match self.queues {
            0 => "blocking".to_owned(),
            n => format!("{n}-queues"),
        };
        write!(f, "{}/{image}/{drive}", self.workload)
    }
}

/// What a case went through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Looked {
    /// Moments at which power was lost.
    pub moments: usize,
    /// States that were judged.
    pub states: usize,
    /// Those that qemu judged too.
    pub peer: usize,
}

impl Case {
    /// All of them.
    pub fn all() -> Vec<Case> {
        let mut cases = Vec::new();
        for workload in WORKLOADS {
            for image in workload.images {
                let with = |queues: &usize| Case {
                    workload: workload.name,
                    image,
                    script: workload.script,
                    queues: *queues,
                };
                cases.extend(workload.queues.iter().map(with));
            }
        }
        cases
    }

    /// The cases of a workload.
    ///
    /// # Panics
    ///
    /// When there is none of that name.
    pub fn of(workload: &str) -> Vec<Case> {
        let cases: Vec<Case> = Self::all()
            .into_iter()
            .filter(|case| case.workload == workload)
            .collect();
        assert!(!cases.is_empty(), "no workload is called {workload}");
        cases
    }

    /// The workload's name.
    pub fn workload(&self) -> &'static str {
        self.workload
    }

    /// Queues that drive it.
    pub fn queues(&self) -> usize {
        self.queues
    }

    /// How to carry it out.
    pub fn plan(&self, seed: u64) -> Plan {
        Plan {
            spec: Spec::parse(self.image).expect("images of the table can be read"),
            steps: script::parse(self.script).expect("scripts of the table can be read"),
            queues: self.queues,
            seed,
            mutant: None,
            fault: None,
        }
    }

    /// The command that shows a failure again.
    pub fn replay(&self, seed: u64, state: Option<StateId>) -> String {
        let state = state.map_or(String::new(), |s| format!(" --state {s}"));
        format!("cargo run -q -p crash -- replay '{self}' --seed {seed}{state}")
    }

    /// Runs it with `seed`, and judges what crashes leave of it.
    ///
    /// # Errors
    ///
    /// What is wrong, and how to see it again.
    pub fn enumerate(&self, seed: u64, bounds: &Bounds, judge: &Judge) -> Result<Looked, String> {
        self.enumerate_plan(&self.plan(seed), bounds, judge, None)
    }

    /// As [`Case::enumerate`], with a rule broken.
    ///
    /// # Errors
    ///
    /// As [`Case::enumerate`].
    pub fn enumerate_mutant(
        &self,
        seed: u64,
        mutant: Mutant,
        bounds: &Bounds,
        judge: &Judge,
    ) -> Result<Looked, String> {
        let plan = Plan {
            mutant: Some(mutant),
            ..self.plan(seed)
        };
        self.enumerate_plan(&plan, bounds, judge, None)
    }

    /// Judges one state again, as closely as possible.
    ///
    /// # Errors
    ///
    /// As [`Case::enumerate`].
    pub fn again(
        &self,
        seed: u64,
        state: StateId,
        bounds: &Bounds,
        judge: &Judge,
    ) -> Result<Looked, String> {
        self.enumerate_plan(&self.plan(seed), bounds, judge, Some(state))
    }

    fn enumerate_plan(
        &self,
        plan: &Plan,
        bounds: &Bounds,
        judge: &Judge,
        only: Option<StateId>,
    ) -> Result<Looked, String> {
        let bounds = &bounds.for_clusters_of(plan.spec.create.cluster_size);
        let wrong = |what, state| {
            let again = self.replay(plan.seed, state);
            format!(
                "{self}, seed {}: {what}\nto see it again: {again}",
                plan.seed
            )
        };
        let outcome = run(plan).map_err(|what| wrong(what, None))?;
        look(&outcome, plan.seed, bounds, judge, only)
            .map_err(|(state, what)| wrong(format!("crash state {state}: {what}"), Some(state)))
    }

    /// Runs it with the nth operation that changes the image's file failing, and judges what that left and
    /// what crashes leave of it. `None` when there are fewer operations.
    ///
    /// # Errors
    ///
    /// As [`Case::enumerate`].
    pub fn fail_nth(
        &self,
        seed: u64,
        fault: Fault,
        mutant: Option<Mutant>,
        bounds: &Bounds,
        judge: &Judge,
    ) -> Result<Option<Looked>, String> {
        let what = format!("{:?} {} fails with {}", fault.op, fault.skip, fault.errno);
        let told = fault.op == FaultOp::Sync && !fault.lie;
        let plan = Plan {
            mutant,
            fault: Some(fault),
            ..self.plan(seed)
        };
        let wrong = |error| format!("{self}, seed {seed}, {what}: {error}");
        let outcome = run(&plan).map_err(wrong)?;
        if !outcome.world.image().faulted() {
            return Ok(None);
        }
        if told && mutant.is_none() && outcome.errors.is_empty() {
            return Err(wrong("nobody was told".to_owned()));
        }
        let bounds = bounds.for_clusters_of(plan.spec.create.cluster_size);
        look(&outcome, seed, &bounds, judge, None)
            .map(Some)
            .map_err(|(state, error)| wrong(format!("crash state {state}: {error}")))
    }
}

/// Judges crash states of a run.
///
/// # Errors
///
/// The first state that is not sound, and why.
pub fn look(
    outcome: &Outcome,
    seed: u64,
    bounds: &Bounds,
    judge: &Judge,
    only: Option<StateId>,
) -> Result<Looked, (StateId, String)> {
    let Outcome { world, model, .. } = outcome;
    let moments = moments(&world.disks);
    let mut looked = Looked {
        moments: moments.len(),
        ..Looked::default()
    };
    let mut choose = Random::new(seed, 2);
    // What the rest of the moments may take of the bound, spread evenly.
    for (number, at) in moments.iter().enumerate() {
        let mut random = Random::new(seed, 1000 + number as u64);
        let left = moments.len() - number;
        let most = bounds.all.saturating_sub(looked.states).div_ceil(left);
        let skipped = match only {
            Some(only) => only.moment != number,
            None => most < bounds.each && choose.below(bounds.each as u64) >= most as u64,
        };
        if skipped {
            continue;
        }
        let moment = Moment::new(&world.disks, *at);
        let allowed = model.allowed(When::Crash(*at));
        let states = moment.states(bounds, &mut random);
        for (nth, keep) in states.iter().enumerate() {
            let state = StateId {
                moment: number,
                state: nth,
            };
            let lot = random.below(256);
            let look = match (only, lot) {
                (Some(only), _) if only != state => continue,
                (Some(_), _) | (None, 0) => Look::Close,
                (None, 1..8) => Look::Peer,
                _ => Look::Quick,
            };
            looked.states += 1;
            looked.peer += usize::from(look != Look::Quick);
            let crashed = world.on(moment.disks(keep));
            judge
                .judge(&crashed, model, &allowed, look)
                .map_err(|what| {
                    let there = moment.describe(keep);
                    (state, format!("event {at}: {what}\nopen then:\n{there}"))
                })?;
        }
    }
    Ok(looked)
}
