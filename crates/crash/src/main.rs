//! `make soak`'s part of crash enumeration, and replays.

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use crash::judge::Judge;
use crash::states::{Bounds, StateId};
use crash::{Case, Random};
use io::{Fault, FaultOp};
use std::time::{Duration, Instant};

/// Enumerates what crashes leave of disks.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the cases.
    List,
    /// Run cases with one seed after the other.
    Soak {
        /// For how long.
        #[arg(long, default_value_t = 10.0)]
        minutes: f64,
        /// The first seed; from the clock when not given.
        #[arg(long)]
        seed: Option<u64>,
        /// Only cases whose names contain this.
        #[arg(default_value = "")]
        filter: String,
    },
    /// Run one case with one seed again, and judge all its states, or one.
    Replay {
        /// The case, as `list` names it.
        case: String,
        /// The seed.
        #[arg(long)]
        seed: u64,
        /// A state, as the failure names it.
        #[arg(long)]
        state: Option<StateId>,
        /// With the bounds of the soak, which number states otherwise.
        #[arg(long)]
        long: bool,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::List => {
            for case in Case::all() {
                println!("{case}");
            }
            Ok(())
        }
        Command::Soak {
            minutes,
            seed,
            filter,
        } => soak(minutes, seed, &filter),
        Command::Replay {
            case,
            seed,
            state,
            long,
        } => replay(&case, seed, state, long),
    }
}

fn soak(minutes: f64, seed: Option<u64>, filter: &str) -> Result<()> {
    let end = Instant::now() + Duration::try_from_secs_f64(minutes * 60.0)?;
    let mut seed = match seed {
        Some(seed) => seed,
        None => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .context("the clock")?
            .as_secs(),
    };
    let judge = Judge::default();
    let cases: Vec<Case> = Case::all()
        .into_iter()
        .filter(|case| case.to_string().contains(filter))
        .collect();
    if cases.is_empty() {
        bail!("no case contains '{filter}': see crash list");
    }
    loop {
        let (mut states, mut peer) = (0, 0);
        for case in &cases {
            match case.enumerate(seed, &Bounds::LONG, &judge) {
                Ok(looked) => {
                    states += looked.states;
                    peer += looked.peer;
                }
                Err(what) => bail!("{what} --long"),
            }
            // And one operation that fails.
            let mut random = Random::new(seed, case.queues() as u64 + 77);
            let ops = [
                FaultOp::Write,
                FaultOp::Sync,
                FaultOp::Range,
                FaultOp::Resize,
            ];
            let fault = Fault {
                skip: random.below(200),
                count: 1,
                torn: random.once_in(2),
                ..Fault::always(
                    ops[random.below(4) as usize],
                    [5, 28][random.below(2) as usize],
                )
            };
            match case.fail_nth(seed, fault, None, &Bounds::FAST, &judge) {
                Ok(looked) => states += looked.unwrap_or_default().states,
                Err(what) => bail!("{what}"),
            }
            if Instant::now() >= end {
                println!("seed {seed}: {states} states are sound, {peer} to qemu too; time is up");
                return Ok(());
            }
        }
        println!("seed {seed}: {states} states are sound, {peer} to qemu too");
        seed += 1;
    }
}

fn replay(name: &str, seed: u64, state: Option<StateId>, long: bool) -> Result<()> {
    let bounds = if long { Bounds::LONG } else { Bounds::FAST };
    let case = Case::all().into_iter().find(|c| c.to_string() == name);
    let case = case.with_context(|| format!("no case is called '{name}': see crash list"))?;
    let judge = Judge::default();
    let looked = match state {
        Some(state) => case.again(seed, state, &bounds, &judge),
        None => case.enumerate(seed, &bounds, &judge),
    };
    match looked {
        Ok(looked) => {
            println!("{case}, seed {seed}: {looked:?}: sound");
            Ok(())
        }
        Err(what) => bail!("{what}"),
    }
}
