//! `make soak`'s part of crash enumeration, and replays.

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use crash::judge::Judge;
use crash::states::{Bounds, StateId};
use crash::{Case, Injection, Random};
use io::FaultOp;
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
        /// An operation that fails, as the failure names it: DISK:OP:SKIP:ERRNO[:torn][:lie].
        #[arg(long)]
        fault: Option<Injection>,
        /// How many states are looked at, as the failure names it: fast, few or long.
        #[arg(long, default_value_t = Bounds::FAST)]
        bounds: Bounds,
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
            fault,
            bounds,
        } => replay(&case, seed, fault, state, &bounds),
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
                Err(what) => bail!("{what}"),
            }
            // And one operation that fails.
            let mut random = Random::new(seed, case.queues() as u64 + 77);
            let fault = injection(&mut random, case.disks());
            match case.fail(seed, fault, None, &Bounds::FAST, &judge) {
                Ok(looked) => {
                    let looked = looked.unwrap_or_default();
                    states += looked.states;
                    peer += looked.peer;
                }
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

/// Something that fails, on one of so many disks.
fn injection(random: &mut Random, disks: usize) -> Injection {
    let ops = [
        FaultOp::Read,
        FaultOp::Write,
        FaultOp::Sync,
        FaultOp::Range,
        FaultOp::Resize,
        FaultOp::Change,
    ];
    let op = ops[random.below(6) as usize];
    // What is rare is failed nearer to the beginning.
    let most = [200, 20][random.below(2) as usize];
    let disk = random.below(disks as u64) as usize;
    let errno = [5, 28][random.below(2) as usize];
    let mut injection = Injection::once(disk, op, random.below(most), errno);
    injection.fault.torn = random.once_in(2);
    if random.once_in(4) {
        injection.fault.count = 1 + random.below(9);
    }
    injection
}

fn replay(
    name: &str,
    seed: u64,
    fault: Option<Injection>,
    state: Option<StateId>,
    bounds: &Bounds,
) -> Result<()> {
    let case = Case::all().into_iter().find(|c| c.to_string() == name);
    let case = case.with_context(|| format!("no case is called '{name}': see crash list"))?;
    let looked = case.again(seed, fault, state, bounds, &Judge::default());
    match looked {
        Ok(Some(looked)) => {
            println!("{case}, seed {seed}: {looked:?}: sound");
            Ok(())
        }
        Ok(None) => {
            println!("{case}, seed {seed}: nothing failed, the run has fewer operations");
            Ok(())
        }
        Err(what) => bail!("{what}"),
    }
}
