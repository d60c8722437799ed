//! `diskplane advise`: how to keep and serve images, and on what each piece of advice rests.
//!
//! With `--json` an array with an object for each image: `file`, `facts` ([`facts::Facts`]), `measured` ([`measure::Measured`], with
//! `--measure` or `--write-test`) and `advice`, an array of objects with `topic`, `do`, `because` and `rests-on` (`image`,
//! `file-system`, `device`, `kernel` or `measurement`).

mod facts;
mod measure;
mod rules;

use crate::{args::format, print, table};
use anyhow::{Context, Result};
use clap::Args;
use image::Format;
use serde::Serialize;
use std::{fmt::Write as _, path::PathBuf, time::Duration};

/// `advise`.
#[derive(Args, Debug)]
pub struct Advise {
    /// Format of the images: needed for raw, known by its magic otherwise
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Also open backing and data files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Read the images for a while, by each engine and in each cache mode, to find out which is best. Writes nothing
    #[arg(long)]
    pub measure: bool,
    /// With --measure or --write-test: seconds that all measurements together may take
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub seconds: u64,
    /// Make a file in DIR, write to it, and remove it: what allocating, punching holes and flushing cost there
    #[arg(long, value_name = "DIR")]
    pub write_test: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Images to look at
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<String>,
}

/// A piece of advice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Advice {
    /// What it is about.
    pub topic: &'static str,
    /// What to do.
    #[serde(rename = "do")]
    pub what: String,
    /// The fact or figure.
    pub because: String,
    /// Where that comes from.
    pub rests_on: Basis,
}

/// Where a fact comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Basis {
    Image,
    FileSystem,
    Device,
    Kernel,
    Measurement,
}

impl Basis {
    fn name(self) -> &'static str {
        match self {
            Basis::Image => "image",
            Basis::FileSystem => "file system",
            Basis::Device => "device",
            Basis::Kernel => "kernel",
            Basis::Measurement => "measurement",
        }
    }
}

/// What is said of an image.
#[derive(Debug, Serialize)]
struct Answer {
    file: String,
    facts: facts::Facts,
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<measure::Measured>,
    advice: Vec<Advice>,
}

/// Looks at images and says what to do.
pub fn run(args: &Advise) -> Result<()> {
    let share = Duration::from_secs(args.seconds) / args.files.len().max(1) as u32;
    let mut answers = Vec::new();
    for file in &args.files {
        let facts = facts::of(args, file)?;
        let measured = measure::of(args, &facts, share).with_context(|| file.clone())?;
        answers.push(Answer {
            file: file.clone(),
            advice: rules::advice(&facts, measured.as_ref()),
            facts,
            measured,
        });
    }
    if args.json {
        return print(&crate::json(&answers)?);
    }
    let texts: Vec<String> = answers.iter().map(text).collect();
    print(&texts.join("\n"))
}

fn text(answer: &Answer) -> String {
    let mut text = format!("{}: {}\n", block::plain(&answer.file), answer.facts.line());
    if let Some(measured) = &answer.measured {
        for line in measured.lines() {
            let _ = writeln!(text, "  measured: {line}");
        }
    }
    let mut table = table::headed(&["about", "do", "because", "rests on"], 4);
    for advice in &answer.advice {
        table.add_row([
            advice.topic.to_owned(),
            block::plain(&advice.what),
            block::plain(&advice.because),
            advice.rests_on.name().to_owned(),
        ]);
    }
    text + &table::indented(&table)
}
