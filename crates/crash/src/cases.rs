//! Workloads × images × ways to drive them.

use crate::injection::Injection;
use crate::judge::{Judge, Look};
use crate::model::When;
use crate::mutant::Mutant;
use crate::random::Random;
use crate::run::{Era, Outcome, Plan, run};
use crate::script;
use crate::spec::Spec;
use crate::states::{Bounds, Moment, StateId, moments};
use crate::workloads::WORKLOADS;
use std::fmt;

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

    /// Disks that its image and what it refers to lie on.
    pub fn disks(&self) -> usize {
        let spec = self.plan(0).spec;
        spec.chain().map(|image| 1 + image.parts().len()).sum()
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
    pub fn replay(&self, plan: &Plan, bounds: &Bounds, state: Option<StateId>) -> String {
        let seed = plan.seed;
        let mut command = format!("cargo run -q -p crash -- replay '{self}' --seed {seed}");
        if let Some(fault) = &plan.fault {
            command += &format!(" --fault {fault}");
        }
        if *bounds != Bounds::FAST {
            command += &format!(" --bounds {bounds}");
        }
        if let Some(state) = state {
            command += &format!(" --state {state}");
        }
        command
    }

    /// Runs it with `seed`, and judges what crashes leave of it.
    ///
    /// # Errors
    ///
    /// What is wrong, and how to see it again.
    pub fn enumerate(&self, seed: u64, bounds: &Bounds, judge: &Judge) -> Result<Looked, String> {
        let looked = self.enumerate_plan(&self.plan(seed), bounds, judge, None)?;
        Ok(looked.unwrap_or_default())
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
        let looked = self.enumerate_plan(&plan, bounds, judge, None)?;
        Ok(looked.unwrap_or_default())
    }

    /// As [`Case::enumerate`] or [`Case::fail`], or judges one state of that again, as closely as possible.
    ///
    /// # Errors
    ///
    /// As [`Case::enumerate`].
    pub fn again(
        &self,
        seed: u64,
        fault: Option<Injection>,
        state: Option<StateId>,
        bounds: &Bounds,
        judge: &Judge,
    ) -> Result<Option<Looked>, String> {
        let plan = Plan {
            fault,
            ..self.plan(seed)
        };
        self.enumerate_plan(&plan, bounds, judge, state)
    }

    fn enumerate_plan(
        &self,
        plan: &Plan,
        bounds: &Bounds,
        judge: &Judge,
        only: Option<StateId>,
    ) -> Result<Option<Looked>, String> {
        let wrong = |what, state| {
            let again = self.replay(plan, bounds, state);
            format!(
                "{self}, seed {}: {what}\nto see it again: {again}",
                plan.seed
            )
        };
        let outcome = run(plan).map_err(|what| wrong(what, None))?;
        if let Some(injection) = &plan.fault {
            if !outcome.faulted() {
                return Ok(None);
            }
            if injection.must_be_told() && plan.mutant.is_none() && outcome.errors.is_empty() {
                return Err(wrong(
                    "nobody was told that a barrier failed".to_owned(),
                    None,
                ));
            }
        }
        let few = bounds.for_image(&plan.spec);
        look(&outcome, plan.seed, &few, judge, only)
            .map(Some)
            .map_err(|(state, what)| wrong(format!("crash state {state}: {what}"), Some(state)))
    }

    /// Runs it with an operation failing, and judges what that left and what crashes leave of it. `None` when
    /// there are fewer operations.
    ///
    /// # Errors
    ///
    /// As [`Case::enumerate`].
    pub fn fail(
        &self,
        seed: u64,
        injection: Injection,
        mutant: Option<Mutant>,
        bounds: &Bounds,
        judge: &Judge,
    ) -> Result<Option<Looked>, String> {
        let plan = Plan {
            mutant,
            fault: Some(injection),
            ..self.plan(seed)
        };
        self.enumerate_plan(&plan, bounds, judge, None)
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
    let eras = outcome.eras.iter();
    let moments: Vec<(&Era, u64)> = eras
        .flat_map(|era| {
            moments(&era.world.disks)
                .into_iter()
                .map(move |at| (era, at))
        })
        .collect();
    let mut looked = Looked {
        moments: moments.len(),
        ..Looked::default()
    };
    let mut choose = Random::new(seed, 2);
    // What the rest of the moments may take of the bound, spread evenly.
    for (number, (Era { world, model }, at)) in moments.iter().enumerate() {
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
