//! `diskplane bench compare` and `diskplane bench csv`: what to do with the records of runs.

use crate::{json, print};
use anyhow::{Result, bail};
use bench::{
    compare::{compare, text},
    metric::Metric,
    record,
};
use clap::Args;
use std::path::PathBuf;

/// `bench compare`.
#[derive(Args, Debug)]
#[command(
    after_help = "Runs are files of records (versus-….jsonl, records.jsonl) or the folders that hold them. Changes are \
                  ratios of medians; those whose 95 % interval has 1 in it are not shown without --all."
)]
pub struct Compare {
    /// Also show what did not change, or cannot be told
    #[arg(long)]
    pub all: bool,
    /// Only this figure (iops, cpu-us, p99-us, …); may be given many times [default: all that say how good a side is]
    #[arg(long = "figure", value_name = "NAME", value_parser = metric)]
    pub figures: Vec<Metric>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The earlier run
    #[arg(value_name = "A")]
    pub before: PathBuf,
    /// The later run
    #[arg(value_name = "B")]
    pub after: PathBuf,
}

/// `bench csv`.
#[derive(Args, Debug)]
pub struct Csv {
    /// A file of records, or the folder that holds it
    pub run: PathBuf,
}

fn metric(text: &str) -> Result<Metric> {
    match serde_json::from_value(text.into()) {
        Ok(metric) => Ok(metric),
        Err(error) => bail!("'{text}' is no figure: {error}"),
    }
}

/// Compares two runs.
pub fn run(args: &Compare) -> Result<()> {
    let (before, after) = (record::read(&args.before)?, record::read(&args.after)?);
    let comparison = compare(&before, &after, &args.figures);
    match args.json {
        true => print(&json(&comparison)?),
        false => {
            // Names in it may be of somebody else's making.
            let lines = text(&comparison, args.all);
            let lines: Vec<String> = lines.split('\n').map(block::plain).collect();
            print(&lines.join("\n"))
        }
    }
}

/// Prints a run's samples as CSV.
pub fn table(args: &Csv) -> Result<()> {
    print(&record::csv(&record::read(&args.run)?))
}
