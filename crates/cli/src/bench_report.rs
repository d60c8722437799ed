//! `diskplane bench report`: pages, charts and a summary of a run's records.

use crate::{partial, print};
use anyhow::{Context, Result};
use bench::{
    breakdown::Answer,
    record::{self, Set},
    report::{Model, chart::svg::standalone, html, terminal},
};
use clap::Args;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// `bench report`.
#[derive(Args, Debug)]
#[command(
    after_help = "Runs are files of records (versus-….jsonl, records.jsonl) or the folders that hold them."
)]
pub struct ReportArgs {
    /// Where the page goes [default: report.html beside the records]
    #[arg(short, long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Also write each chart as a file into this folder
    #[arg(long, value_name = "DIR")]
    pub svg: Option<PathBuf>,
    /// Also show a breakdown that trace breakdown --json printed into FILE; may be given many times
    #[arg(long, value_name = "FILE")]
    pub breakdown: Vec<PathBuf>,
    /// Print no summary
    #[arg(short, long)]
    pub quiet: bool,
    /// A file of records, or the folder that holds it
    pub run: PathBuf,
}

/// Reports on a run.
pub fn run(args: &ReportArgs) -> Result<()> {
    let set = record::read(&args.run)?;
    let answers: block::Result<Vec<Answer>> = args
        .breakdown
        .iter()
        .map(|path| Answer::read(path))
        .collect();
    let model = Model::of(&set).with(answers?);
    write_report(
        &set,
        &model,
        args.out.as_deref(),
        args.svg.as_deref(),
        args.quiet,
    )
}

/// Writes the page and the charts of some records, and prints a summary of them.
pub fn report(set: &Set, out: Option<&Path>, svg: Option<&Path>, quiet: bool) -> Result<()> {
    write_report(set, &Model::of(set), out, svg, quiet)
}

fn write_report(
    set: &Set,
    model: &Model,
    out: Option<&Path>,
    svg: Option<&Path>,
    quiet: bool,
) -> Result<()> {
    let (page, charts) = html(model)?;
    let beside = set.path.with_file_name("report.html");
    let out = out.unwrap_or(&beside);
    partial::write(out, &page)?;
    if let Some(folder) = svg {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        for chart in &charts {
            let path = folder.join(format!("{}.svg", chart.name));
            partial::write(&path, &standalone(&chart.svg))?;
        }
    }
    if quiet {
        return Ok(());
    }
    let text = format!(
        "{}records: {}\nreport: {}\n",
        terminal(model),
        set.path.display(),
        out.display()
    );
    // Names in it may be of somebody else's making.
    let lines: Vec<String> = text.split('\n').map(block::plain).collect();
    print(&lines.join("\n"))
}
