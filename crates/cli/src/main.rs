//! The `diskplane` command.
//!
//! Exit codes: 0 done, 1 failed or wrong usage (stderr says what, where and what to do); `check` and `compare` have
//! more, see their help. 2 is its "errors were found", as of `qemu-img check`, and so nothing else's.

#![deny(unsafe_op_in_unsafe_fn)]

mod advise;
mod amend;
mod args;
mod at_work;
mod bench_clear;
mod bench_compare;
mod bench_device;
mod bench_ffsb;
mod bench_image;
mod bench_load;
mod bench_report;
mod bench_run;
mod bench_versus;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod disks;
mod encrypt;
mod hint;
mod image_opts;
mod info;
mod keys;
mod map;
mod measure;
mod open;
mod options;
mod partial;
mod qemu_img;
mod rebase;
mod resize;
mod secret;
mod serve;
mod signals;
mod snapshot;
mod systemd;
mod table;
mod trace;

use args::{BenchCommand, Cli, Command};
use clap::Parser;
use std::{
    fmt::Write as _,
    io::{ErrorKind, IsTerminal as _, Write},
    process::ExitCode,
    time::Duration,
};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    signals::hold_progress();
    let mut arguments = std::env::args_os();
    if arguments
        .next()
        .is_some_and(|name| qemu_img::is_name(&name))
    {
        log("error");
        return qemu_img::run(&arguments.collect::<Vec<_>>());
    }
    let mut cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // Help and version go to stdout.
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    cli.command.settle();
    let silence = Duration::from_secs(cli.nbd_timeout.into());
    open::set_nbd_timeout((!silence.is_zero()).then_some(silence));
    // What qemu-img does not say, scripts do not expect.
    log(match &cli.command {
        Command::QemuImg(_) => "error",
        // FUSE's library warns of what programs may well ask for and nobody needs.
        _ => "warn,fuser=error",
    });
    let outcome = match &cli.command {
        Command::Create(args) => done(create::run(args)),
        Command::Info(args) => done(info::run(args)),
        Command::Map(args) => done(map::run(args)),
        Command::Check(args) => check::run(args),
        Command::Convert(args) => done(convert::run(args)),
        Command::Dd(args) => done(dd::run(args)),
        Command::Compare(args) => compare::run(args),
        Command::Commit(args) => done(commit::run(args)),
        Command::Rebase(args) => done(rebase::run(args)),
        Command::Measure(args) => done(measure::run(args)),
        Command::Snapshot(args) => done(snapshot::run(args)),
        Command::Bitmap(args) => done(bitmap::run(args)),
        Command::Amend(args) => done(amend::run(args)),
        Command::Resize(args) => done(resize::run(args)),
        Command::Serve(args) => done(serve::run(args)),
        Command::Trace(args) => done(trace::run(args)),
        Command::Advise(args) => done(advise::run(args)),
        Command::QemuImg(args) => return qemu_img::run(&args.arguments),
        Command::Bench(args) => match &args.what {
            BenchCommand::Image(args) => done(bench_image::run(args)),
            BenchCommand::Load(args) => done(bench_load::run(args)),
            BenchCommand::Ffsb(args) => done(bench_ffsb::run(args)),
            BenchCommand::Device(args) => done(bench_device::run(args)),
            BenchCommand::Versus(args) => done(bench_versus::run(args)),
            BenchCommand::Run(args) => done(bench_run::run(args)),
            BenchCommand::Clear(args) => done(bench_clear::run(args)),
            BenchCommand::Report(args) => done(bench_report::run(args)),
            BenchCommand::Compare(args) => done(bench_compare::run(args)),
            BenchCommand::Csv(args) => done(bench_compare::table(args)),
        },
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            if was_stopped(&error) {
                say("diskplane: stopped by a signal\n");
                signals::die_if_stopped();
            }
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

/// Has shown, on stderr, what is as bad as `default`, or what DISKPLANE_LOG says.
fn log(default: &str) {
    // DISKPLANE_LOG=debug, or per module as tracing-subscriber describes.
    let filter = EnvFilter::try_from_env("DISKPLANE_LOG").unwrap_or_else(|_| default.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Colours are for people, not for log files.
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
}

/// Says why a command failed.
fn complain(error: &anyhow::Error) {
    // It may have names in it that somebody else made, of files too.
    let text = format!("{error:#}");
    let hint = hint::of(&text).map_or(String::new(), |hint| format!(": {hint}"));
    say(&format!(
        "diskplane: {}{}\n",
        block::plain(&text),
        block::plain(&hint)
    ));
}

/// Whether a command failed since a signal stopped its work.
fn was_stopped(error: &anyhow::Error) -> bool {
    let ours = error.downcast_ref::<block::Error>();
    ours.is_some_and(|error| error.kind() == block::ErrorKind::Interrupted)
}

/// The code of a command that either did its work or failed.
fn done(outcome: anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    outcome.map(|()| ExitCode::SUCCESS)
}

/// `value` as JSON, for a program or a terminal: `serde_json` escapes what is ASCII of the characters that steer one.
fn json(value: &impl serde::Serialize) -> anyhow::Result<String> {
    let plain = serde_json::to_string_pretty(value)?;
    let plain = block::name::shown(&plain);
    let mut text = String::with_capacity(plain.len() + 1);
    for c in plain.chars() {
        match c != '\n' && block::steers(c) {
            // They are in strings only, and none needs more than four digits.
            true => write!(text, "\\u{:04x}", u32::from(c))?,
            false => text.push(c),
        }
    }
    text.push('\n');
    Ok(text)
}

/// Says something to whoever still listens: a terminal that was closed gives errors, and they are no reason to end otherwise than
/// asked for.
fn say(text: &str) {
    let _ = std::io::stderr()
        .lock()
        .write_all(&block::name::bytes(text));
}

/// Prints `text`; a reader that has gone (`diskplane map … | head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    print_on(text).map(|_| ())
}

/// [`print`], for who would go on and on: whether anybody still reads.
fn print_on(text: &str) -> anyhow::Result<bool> {
    let mut out = std::io::stdout().lock();
    match out
        .write_all(&block::name::bytes(text))
        .and_then(|()| out.flush())
    {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("standard output"))
        }
        printed => Ok(printed.is_ok()),
    }
}
