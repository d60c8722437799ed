//! `diskplane bench versus`.

use crate::{
    partial, print,
    signals::{Signal, Signals},
};
use anyhow::{Context, Result, bail, ensure};
use bench::{
    machine::process::Stopped,
    versus::{self, Event, Options, Run, Sizes, report},
};
use clap::Args;
use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    io::{IsTerminal, Write as _},
    path::{Path, PathBuf},
    process, thread,
    time::Duration,
};

/// Exit status after SIGINT, as a shell counts it.
pub(crate) const INTERRUPTED: i32 = 130;

/// `bench versus`.
#[derive(Args, Debug)]
pub struct Versus {
    /// Fewer and shorter samples on smaller images: a few minutes instead of half an hour
    #[arg(long)]
    pub quick: bool,
    /// Only this cell; may be given many times [default: all]
    #[arg(long = "cell", value_name = "NAME")]
    pub cells: Vec<String>,
    /// Samples of each side [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub samples: Option<u16>,
    /// Seconds that each sample measures [default: 2, with --quick 0.5]
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub seconds: Option<Duration>,
    /// Where images (up to 14 GiB, gone afterwards) and results go
    #[arg(long, value_name = "DIR", default_value = "versus")]
    pub dir: PathBuf,
    /// Keep the full raw file, the full qcow2 image and the base of overlays for the next run
    #[arg(long)]
    pub keep: bool,
    /// Also write the results as a table in Markdown, in a FILE that is there between its lines
    /// "<!-- versus: begin -->" and "<!-- versus: end -->": not where results of other cells would be lost
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
    /// Print every sample and result as a line of JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// Show the cells and their bars, and do nothing
    #[arg(long)]
    pub list: bool,
}

pub(crate) fn seconds(text: &str) -> Result<Duration> {
    let seconds: f64 = text.parse()?;
    if !(0.01..=3600.0).contains(&seconds) {
        bail!("it must be 0.01 to 3600");
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Compares, prints, stores.
pub fn run(args: &Versus) -> Result<()> {
    let cells = versus::select(&args.cells)?;
    if args.list {
        return print(&report::list(&cells));
    }
    if let Some(path) = &args.markdown {
        page(path, &cells)?;
    }
    // Before anything starts a thread, so that all of them leave these signals to the one that waits for them.
    stop_on_signals(Signals::block()?)?;
    let options = options(args)?;
    if !args.json {
        print(&report::head())?;
    }
    let terminal = std::io::stderr().is_terminal();
    let mut printed = Ok(());
    let run = versus::run(&options, &mut |event| {
        let result = match event {
            Event::Status(what) if terminal => {
                let mut err = std::io::stderr().lock();
                // A status line that cannot be shown is no reason to stop.
                let _ = write!(err, "\r\x1b[K{what}").and_then(|()| err.flush());
                Ok(())
            }
            Event::Status(what) => {
                tracing::info!("{what}");
                Ok(())
            }
            Event::Record(record) if args.json => print(&format!("{record}\n")),
            Event::Cell(_, outcome) if !args.json => {
                if terminal {
                    crate::say("\r\x1b[K");
                }
                print(&report::text(outcome))
            }
            _ => Ok(()),
        };
        if printed.is_ok() {
            printed = result;
        }
    })?;
    printed?;
    if !args.json {
        let lines = run.host.lines().join("\n");
        print(&format!(
            "\n{lines}\nall samples: {}\n",
            run.results.display()
        ))?;
    }
    if let Some(path) = &args.markdown {
        let page = insert(&page(path, &cells)?, &markdown(args, &options, &run)?);
        partial::write(path, &page)?;
    }
    let measured = run.outcomes.iter().any(|outcome| outcome.failed.is_none());
    ensure!(measured, "nothing could be measured: each cell says why");
    Ok(())
}

/// Ends the process on SIGINT, SIGTERM or SIGHUP, after everything that runs or lies around on its behalf.
fn stop_on_signals(signals: Signals) -> Result<()> {
    end_on_signals(signals, |stopped| {
        stopped_text(
            &stayed(stopped.remove()),
            "samples that were taken are in the results",
        )
    })
}

/// What is said of folders that stay.
pub(crate) fn stayed(stay: Vec<(PathBuf, std::io::Error)>) -> Vec<String> {
    let said = stay.into_iter().map(|(folder, why)| {
        let folder = folder.display();
        format!("{folder}: cannot be removed: {why}; the next run there tries again")
    });
    said.collect()
}

/// What is said of a run that was stopped, and of what stays of it.
pub(crate) fn stopped_text(stay: &[String], then: &str) -> String {
    let gone = match stay.is_empty() {
        true => "servers and images",
        false => "servers",
    };
    let mut text = format!("\ndiskplane: stopped; {gone} of the run are gone; {then}\n");
    for why in stay {
        text.push_str(&format!("diskplane: {why}\n"));
    }
    text
}

/// Stops the run on SIGINT, SIGTERM or SIGHUP, and ends the process after `end`, whose words are said.
pub(crate) fn end_on_signals(
    mut signals: Signals,
    end: impl FnOnce(Stopped) -> String + Send + 'static,
) -> Result<()> {
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while matches!(signals.wait(), Ok(Signal::Statistics)) {}
            let stopped = bench::machine::process::stop();
            // Files in the making go too.
            let _held = partial::abandon();
            crate::say(&end(stopped));
            process::exit(INTERRUPTED);
        })
        .context("start a thread for signals")?;
    Ok(())
}

fn options(args: &Versus) -> Result<Options> {
    let (samples, duration, ramp, sizes) = if args.quick {
        (
            5,
            Duration::from_millis(500),
            Duration::from_millis(150),
            Sizes::QUICK,
        )
    } else {
        (
            5,
            Duration::from_secs(2),
            Duration::from_millis(400),
            Sizes::FULL,
        )
    };
    let duration = args.seconds.unwrap_or(duration);
    Ok(Options {
        diskplane: std::env::current_exe().context("find this executable")?,
        dir: args.dir.clone(),
        cells: args.cells.clone(),
        samples: args.samples.map_or(samples, usize::from),
        duration,
        ramp: ramp.min(duration),
        sizes,
        keep: args.keep,
        command: command(args),
    })
}

/// The command line, without where things lie on this machine.
fn command(args: &Versus) -> String {
    let mut text = "diskplane bench versus".to_owned();
    if args.quick {
        text.push_str(" --quick");
    }
    for cell in &args.cells {
        let _ = write!(text, " --cell {cell}");
    }
    if let Some(samples) = args.samples {
        let _ = write!(text, " --samples {samples}");
    }
    if let Some(seconds) = args.seconds {
        let _ = write!(text, " --seconds {}", seconds.as_secs_f64());
    }
    text
}

fn markdown(args: &Versus, options: &Options, run: &Run) -> Result<String> {
    let cells = versus::select(&args.cells)?;
    let mut text = format!(
        "`{}`: {} samples of {} s of each side, in turn.\n\n",
        command(args),
        options.samples,
        options.duration.as_secs_f64()
    );
    for line in run.host.lines() {
        let _ = writeln!(text, "- {line}");
    }
    let _ = write!(text, "\n{}", report::markdown(&cells, &run.outcomes));
    Ok(text)
}

/// What surrounds results in a page.
const BEGIN: &str = "<!-- versus: begin -->\n";
const END: &str = "<!-- versus: end -->";

/// The page that results of `cells` go into; empty where it is not there.
///
/// # Errors
///
/// It cannot be read; something of it would be lost: text without marks, or results of other cells, which are of a run of their own and
/// have no place among those of this one.
fn page(path: &Path, cells: &[&versus::Cell]) -> Result<String> {
    let named = || path.display().to_string();
    let page = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        page => page.with_context(named)?,
    };
    let Some((_, results, _)) = parts(&page) else {
        ensure!(
            page.trim().is_empty(),
            "--markdown {}: it has no lines {} and {END}, and would be lost: put them where the results are to be, or give a new file",
            named(),
            BEGIN.trim_end()
        );
        return Ok(page);
    };
    let rows = results.lines().filter_map(|line| line.strip_prefix("| `"));
    let rows = rows.filter_map(|row| Some(row.split_once('`')?.0));
    let lost: BTreeSet<&str> = rows
        .filter(|row| cells.iter().all(|cell| cell.name != *row))
        .collect();
    ensure!(
        lost.is_empty(),
        "--markdown {}: it has results of {} cells that this run leaves out ({}), which would be lost: leave out --cell, or give another file",
        named(),
        lost.len(),
        lost.into_iter().collect::<Vec<_>>().join(", ")
    );
    Ok(page)
}

/// What stands before the results of a page, these, and what stands behind them.
fn parts(page: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (results, after) = rest.split_once(END)?;
    Some((before, results, after))
}

/// `page` with `results` between its marks; without marks, the results alone, between such.
fn insert(page: &str, results: &str) -> String {
    let (before, _, after) = parts(page).unwrap_or(("", "", "\n"));
    format!("{before}{BEGIN}{results}{END}{after}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_go_between_the_marks() {
        let page = "# B\n<!-- versus: begin -->\nold\n<!-- versus: end -->\nmore\n";
        let once = insert(page, "new\n");
        assert_eq!(
            once,
            "# B\n<!-- versus: begin -->\nnew\n<!-- versus: end -->\nmore\n"
        );
        assert_eq!(insert(&once, "new\n"), once);
        let new = "<!-- versus: begin -->\nnew\n<!-- versus: end -->\n";
        assert_eq!(insert("", "new\n"), new);
    }

    #[test]
    fn nothing_of_a_page_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("page.md");
        let two = ["null".to_owned(), "seq-read".to_owned()];
        let both = versus::select(&two).unwrap();
        let one = versus::select(&two[..1]).unwrap();
        assert_eq!(page(&path, &one).unwrap(), "");
        let text = insert(
            "",
            "| cell |\n|---|\n| `null` | x |\n| | y |\n| `seq-read` | z |\n",
        );
        fs::write(&path, &text).unwrap();
        assert_eq!(page(&path, &both).unwrap(), text);
        let error = page(&path, &one).unwrap_err().to_string();
        assert!(
            error.contains("results of 1 cells that this run leaves out (seq-read)"),
            "{error}"
        );
        fs::write(&path, "A thesis.\n").unwrap();
        let error = page(&path, &both).unwrap_err().to_string();
        assert!(error.contains("would be lost"), "{error}");
    }

    #[test]
    fn durations_are_sane() {
        assert_eq!(seconds("0.2").unwrap(), Duration::from_millis(200));
        for wrong in ["", "0", "-1", "nan", "inf", "1e9", "2s"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
