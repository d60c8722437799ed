//! `qemu-img`, for scripts that were written for it: the command line, the output and the exit codes of qemu-img 10,
//! under that name or as `diskplane qemu-img`.
//!
//! The work is done by what diskplane's own commands call. What differs is the trust: an image's backing file is opened
//! wherever it is, and an existing file is written over, as such scripts expect.

mod amend;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod create_options;
mod dd;
mod info;
mod line;
mod map;
mod measure;
mod open;
mod progress;
mod rebase;
mod refused;
mod resize;
mod snapshot;
mod spec;
mod value;

use crate::secret::{Objects, Wrong};
use anyhow::{Error, Result};
use clap::{Args, FromArgMatches};
use line::{Parsed, Usage, usage};
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

/// The commands: name, what it does.
const COMMANDS: [(&str, &str); 15] = [
    ("amend", "Update format-specific options of the image"),
    ("bench", "Run simple image benchmark"),
    (
        "bitmap",
        "Perform modifications of the persistent bitmap in the image",
    ),
    ("check", "Check basic image integrity"),
    ("commit", "Commit image to its backing file"),
    ("compare", "Check if two images have the same contents"),
    (
        "convert",
        "Copy one or more images to another with optional format conversion",
    ),
    ("create", "Create and format a new image file"),
    ("dd", "Copy input to output with optional format conversion"),
    ("info", "Display information about the image"),
    ("map", "Dump image metadata"),
    (
        "measure",
        "Calculate the file size required for a new image",
    ),
    ("rebase", "Change the backing file of the image"),
    ("resize", "Resize the image"),
    ("snapshot", "List or manipulate snapshots within image"),
];

/// The drivers that images are opened by, one behind the other as QEMU lists its own: scripts look there for theirs.
const FORMATS: &str = "bochs cloop dmg file host_device luks nbd null-aio null-co parallels qcow qcow2 qed raw vdi vhdx vmdk vpc";

/// Whether a program of that name is to be `qemu-img`.
pub fn is_name(program: &OsStr) -> bool {
    Path::new(program).file_name() == Some(OsStr::new("qemu-img"))
}

/// What stands before the command.
#[derive(Args, Debug)]
struct Standard {
    /// Show the version
    #[arg(short = 'V', long)]
    version: bool,
    /// Accepted for scripts: nothing is traced
    #[arg(short = 'T', long, value_name = "TRACE")]
    trace: Option<String>,
}

/// Does what the arguments (without the program's name) say.
pub fn run(arguments: &[OsString]) -> ExitCode {
    let outcome = match begin(arguments) {
        Ok((name, rest)) => dispatch(&name, rest).map_err(|error| (Some(name), error)),
        Err(Ended::Now(code)) => return code,
        Err(Ended::Wrong(error)) => Err((None, error)),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err((name, error)) => {
            if crate::was_stopped(&error) {
                crate::signals::die_if_stopped();
            }
            complain(&error);
            if error.is::<Usage>() {
                let name = name.map_or(String::new(), |name| format!("{name} "));
                eprintln!("Try 'qemu-img {name}--help' for more info");
            }
            ExitCode::FAILURE
        }
    }
}

/// Says what is wrong; each line of several stands for itself.
fn complain(error: &Error) {
    // It may have names in it that somebody else made, of files too.
    let text = format!("{error:#}");
    let text = own_words(&text);
    let lines: Vec<String> = text.lines().map(block::plain).collect();
    crate::say(&format!(
        "qemu-img: {}\n",
        open::without_number(&lines.join("\n"))
    ));
}

/// `text` with qemu-img's commands and options in place of diskplane's own, which are not to be had under this name.
fn own_words(text: &str) -> String {
    let known = [
        ("diskplane check --repair ", "qemu-img check -r "),
        ("run diskplane ", "run qemu-img "),
        ("use diskplane ", "use qemu-img "),
        ("(diskplane ", "(qemu-img "),
        ("with diskplane ", "with qemu-img "),
        (
            ": give its passphrase with --key-file FILE",
            ": give its passphrase with --object secret,… and --image-opts",
        ),
        (
            "can only be opened with --read-only: ",
            "can only be opened for reading: ",
        ),
    ];
    let mut text = text.to_owned();
    for (ours, theirs) in known {
        text = text.replace(ours, theirs);
    }
    text
}

/// Why there is no command to do.
enum Ended {
    /// All is said.
    Now(ExitCode),
    /// The command line is wrong.
    Wrong(Error),
}

/// Does what stands before the command. Returns its name and arguments.
fn begin(arguments: &[OsString]) -> Result<(String, &[OsString]), Ended> {
    // The first that is no option, nor the value of one.
    let mut at = 0;
    while let Some(argument) = arguments.get(at) {
        let text = argument.to_string_lossy();
        let takes_value = matches!(text.as_ref(), "-T" | "--trace");
        match text.starts_with('-') && text != "-" && text != "--" {
            true => at += if takes_value { 2 } else { 1 },
            false => break,
        }
    }
    let (before, rest) = arguments.split_at(at.min(arguments.len()));
    let standard = match line::parse::<Standard>("", before) {
        Parsed::Go(standard) => standard,
        Parsed::Help(_) => {
            let _ = crate::print(&help());
            return Err(Ended::Now(ExitCode::SUCCESS));
        }
        Parsed::Wrong(text) => {
            eprintln!("{}", text.replacen("qemu-img : ", "qemu-img: ", 1));
            eprintln!("Try 'qemu-img --help' for more info");
            return Err(Ended::Now(ExitCode::FAILURE));
        }
    };
    if standard.version {
        let _ = crate::print(&version());
        return Err(Ended::Now(ExitCode::SUCCESS));
    }
    if let Some(trace) = &standard.trace {
        look_at_trace(trace).map_err(Ended::Wrong)?;
    }
    match rest.split_first() {
        Some((name, rest)) => Ok((name.to_string_lossy().into_owned(), rest)),
        None => Err(Ended::Wrong(usage("Not enough arguments"))),
    }
}

/// Says that nothing is traced, as QEMU does of an event that it does not have. What a pattern finds it does not say either.
fn warn_of_event(name: &str) {
    let name = name.strip_prefix('-').unwrap_or(name);
    if !name.contains(['*', '?']) {
        let name = block::plain(name);
        eprintln!("qemu-img: warning: trace event '{name}' does not exist");
    }
}

/// Looks at what is to be traced, as far as QEMU refuses it: the names of its events are its own.
fn look_at_trace(said: &str) -> Result<()> {
    for (nth, piece) in crate::options::split(said).iter().enumerate() {
        match piece.split_once('=') {
            None if nth == 0 => warn_of_event(piece),
            Some(("enable", pattern)) => warn_of_event(pattern),
            Some(("file", _)) | None => {}
            Some(("events", file)) => {
                std::fs::metadata(file).map_err(|error| anyhow::anyhow!("{file}: {error}"))?;
            }
            Some((key, _)) => anyhow::bail!("Invalid parameter '{key}'"),
        }
    }
    Ok(())
}

/// The version of qemu-img whose ways these are, and ours.
fn version() -> String {
    format!(
        "qemu-img version 10.0.2 (diskplane {})\n",
        env!("CARGO_PKG_VERSION")
    )
}

fn help() -> String {
    let mut text = version();
    text.push_str(
        "QEMU disk image utility, as diskplane does it.  Usage:\n\n  qemu-img [standard options] COMMAND [--help | \
         command options]\n\nStandard options:\n  -h, --help\n     display this help and exit\n  -V, --version\n     \
         display version info and exit\n  -T,--trace TRACE\n     accepted, nothing is traced\n\nRecognized commands \
         (run qemu-img COMMAND --help for command-specific help):\n\n",
    );
    for (name, what) in COMMANDS {
        text.push_str(&format!("  {name} - {what}\n"));
    }
    text.push_str("\nSupported image formats:\n  ");
    text.push_str(FORMATS);
    text.push('\n');
    text
}

/// Runs the command `name`.
fn dispatch(name: &str, arguments: &[OsString]) -> Result<u8> {
    match name {
        "amend" => with("amend", arguments, |a| &a.image.spec.objects, amend::run),
        "bench" => with("bench", arguments, |a| &a.image.spec.objects, bench::run),
        "bitmap" => with("bitmap", arguments, |a| &a.spec.objects, bitmap::run),
        "check" => with("check", arguments, |a| &a.image.spec.objects, check::run),
        "commit" => with("commit", arguments, |a| &a.image.spec.objects, commit::run),
        "compare" => with("compare", arguments, |a| &a.objects, compare::run),
        "convert" => with("convert", arguments, |a| &a.objects, convert::run),
        "create" => with("create", arguments, |a| &a.objects, create::run),
        "dd" => with("dd", arguments, |a| &a.spec.objects, dd::run),
        "info" => with("info", arguments, |a| &a.image.spec.objects, info::run),
        "map" => with("map", arguments, |a| &a.image.spec.objects, map::run),
        "measure" => with("measure", arguments, |a| &a.spec.objects, measure::run),
        "rebase" => with("rebase", arguments, |a| &a.image.spec.objects, rebase::run),
        "resize" => {
            let arguments = resize::with_size_last(arguments);
            with("resize", &arguments, |a| &a.spec.objects, resize::run)
        }
        "snapshot" => with(
            "snapshot",
            arguments,
            |a| &a.image.spec.objects,
            snapshot::run,
        ),
        _ => {
            complain(&anyhow::anyhow!("Command not found: {name}"));
            eprintln!("Try 'qemu-img --help' for more info");
            Ok(1)
        }
    }
}

/// Parses the arguments of the command `name`, reads its objects, and runs it.
fn with<T: Args + FromArgMatches>(
    name: &'static str,
    arguments: &[OsString],
    objects: impl FnOnce(&T) -> &Objects,
    run: impl FnOnce(&T) -> Result<u8>,
) -> Result<u8> {
    match line::parse::<T>(name, arguments) {
        Parsed::Go(parsed) => match objects(&parsed).read_all() {
            Ok(()) => run(&parsed),
            Err(error) => {
                complain(&wrong_object(&error));
                Ok(if name == "compare" { 2 } else { 1 })
            }
        },
        Parsed::Help(text) => {
            crate::print(&text)?;
            Ok(0)
        }
        Parsed::Wrong(text) => {
            eprintln!("{text}\nTry 'qemu-img {name} --help' for more info");
            Ok(1)
        }
    }
}

/// What is wrong with an object, as QEMU says it.
fn wrong_object(error: &Error) -> Error {
    let Some(wrong) = error.downcast_ref::<Wrong>() else {
        let text = format!("{error:#}");
        let file = text
            .split_once("': ")
            .map_or(text.as_str(), |(_, file)| file);
        return match file.split_once(": ") {
            Some((path, why)) if why.contains("(os error") => anyhow::anyhow!(
                "Unable to read {path}: Failed to open file \u{201c}{path}\u{201d}: {why}"
            ),
            _ => anyhow::anyhow!("{text}"),
        };
    };
    anyhow::anyhow!(match wrong {
        Wrong::Kind(kind) if kind.is_empty() => "Parameter 'qom-type' is missing".to_owned(),
        Wrong::Kind(kind) => format!("Parameter 'qom-type' does not accept value '{kind}'"),
        Wrong::NoId => "Parameter 'id' is missing".to_owned(),
        Wrong::BadId => "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, '-', '.', '_', \
                         starting with a letter."
            .to_owned(),
        Wrong::Empty => "Either 'file' or 'data' must be provided".to_owned(),
        Wrong::Both => "'file' and 'data' are mutually exclusive".to_owned(),
        Wrong::NoPair(Some(key)) => format!("Expected '=' after parameter '{key}'"),
        Wrong::Key(key) => format!("Parameter '{key}' is unexpected"),
        Wrong::Form(word) => format!("Parameter 'format' does not accept value '{word}'"),
        Wrong::Twice(id) =>
            format!("attempt to add duplicate property '{id}' to object (type 'container')"),
        Wrong::Json(why) => why.clone(),
        Wrong::NoPair(None) | Wrong::Encrypted(_) => wrong.to_string(),
    })
}
