//! `diskplane advise`: how to keep and serve images, and on what each piece of advice rests.
//!
//! With `--json` an array with an object for each image: `file`, `facts` ([`facts::Facts`]), `measured` ([`measure::Measured`], with
//! `--measure` or `--write-test`) and `advice`, an array of objects with `topic`, `do`, `because` and `rests-on` (`image`,
//! `file-system`, `device`, `kernel` or `measurement`).

mod durable;
mod facts;
mod measure;
mod rules;

use crate::{args::format, print, table};
use anyhow::{Context, Result};
use clap::Args;
use image::Format;
use serde::Serialize;
use std::{
    fmt::Write as _,
    path::PathBuf,
    time::{Duration, Instant},
};

/// `advise`.
#[derive(Args, Debug)]
pub struct Advise {
    /// Format of the images: needed for raw, known by its magic otherwise
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Also open backing and data files below DIR, not only below each image's own directory
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// Read the images for a while, one read at a time and many, by each engine, on one thread and on two, all in turns. Writes nothing
    #[arg(long)]
    pub measure: bool,
    /// With --measure or --write-test: seconds that all measurements together may take
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub seconds: u64,
    /// Make a file in DIR and write to it, past the page cache and through it, into holes, into allocated space and over data: what
    /// preallocation and the cache are worth there. The file is gone afterwards
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
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let mut answers = Vec::new();
    let mut failed = Vec::new();
    for (nth, file) in args.files.iter().enumerate() {
        // What others did not need is for those that follow.
        let left = end.saturating_duration_since(Instant::now());
        let share = left / (args.files.len() - nth).max(1) as u32;
        match answer(args, file, share) {
            Ok(answer) => answers.push(answer),
            Err(error) => failed.push(error),
        }
    }
    if !answers.is_empty() {
        show(args, &answers)?;
    }
    // Who asked about several images gets what there is to say of the others, and hears of each that there is none of.
    let last = failed.pop();
    failed.iter().for_each(crate::complain);
    last.map_or(Ok(()), Err)
}

fn answer(args: &Advise, file: &str, share: Duration) -> Result<Answer> {
    let facts = facts::of(args, file)?;
    let deadline = Instant::now() + share;
    let measured = measure::of(args, &facts, deadline).with_context(|| file.to_owned())?;
    Ok(Answer {
        file: file.to_owned(),
        advice: rules::advice(&facts, measured.as_ref()),
        facts,
        measured,
    })
}

fn show(args: &Advise, answers: &[Answer]) -> Result<()> {
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
    if answer.advice.is_empty() {
        return text + "  nothing to advise\n";
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
