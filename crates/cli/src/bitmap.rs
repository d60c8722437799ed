//! `diskplane bitmap`.
//!
//! Actions are those of `qemu-img bitmap`, but that all of them are in force afterwards, or none. Without one the
//! bitmaps are shown. With `--json` an object; fields:
//!
//! | field | |
//! |---|---|
//! | `filename`, `format` | as given; `qcow2` |
//! | `bitmaps` | array of objects, in the image's order |
//! | `name`, `granularity`, `flags` | as in `qemu-img info`: flags are `in-use` (inconsistent) and `auto` (enabled) |
//! | `count` | bytes of the disk that are dirty, as in QMP; absent where the bitmap cannot be used |

use crate::args::{bytes, format};
use crate::open::{self, Access};
use crate::print;
use crate::secret::Objects;
use crate::table;
use anyhow::{Result, bail};
use block::{Storage, size};
use clap::{Arg, ArgAction, ArgMatches, Args, Command};
use image::Format;
use image::qcow2::bitmap::Entry;
use io::File;
use serde::Serialize;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tool::bitmap::{Action, Listed};

/// `bitmap`.
#[derive(Args, Debug)]
#[command(
    after_help = "Without an action the bitmaps are shown. Actions are done in their order, all of them or \
                        none; --clear --merge OTHER, say. An inconsistent bitmap (the image was not \
                        closed) can only be removed."
)]
pub struct Bitmap {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub actions: Actions,
    /// Bytes that a bit of an added bitmap stands for: a power of two from 512 to 2G [default: the
    /// cluster size, from 4K to 64K]
    #[arg(short, long, value_name = "SIZE", value_parser = bytes, requires = "add")]
    pub granularity: Option<u64>,
    /// Merge from bitmaps of this image [default: FILE itself]
    #[arg(short = 'b', long, value_name = "IMAGE", requires = "merge")]
    pub source_file: Option<PathBuf>,
    /// Format of the image to merge from
    #[arg(short = 'F', long, value_name = "FMT", value_parser = format, requires = "source_file")]
    pub source_format: Option<Format>,
    /// Format of the image [default: known by its magic]
    #[arg(short, long, value_name = "FMT", value_parser = format)]
    pub format: Option<Format>,
    /// Print the bitmaps (as they are then) as JSON
    #[arg(long)]
    pub json: bool,
    /// Show the bitmaps even while another process writes the image
    #[arg(short = 'U', long, conflicts_with = "bitmap")]
    pub force_share: bool,
    /// FILE is key=value,…, as in qemu-img, rather than a file's name: driver=qcow2,file.filename=PATH
    #[arg(long)]
    pub image_opts: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub objects: Objects,
    /// Image
    pub file: PathBuf,
    /// Name of the bitmap to change
    pub bitmap: Option<OsString>,
}

/// The actions of the command line, in its order. `--disabled` counts as an action that follows `--add`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actions(pub Vec<Action>);

/// Actions without a value, with their help.
const PLAIN: [(&str, &str, Action); 6] = [
    (
        "add",
        "Add the bitmap, enabled and without a bit set",
        Action::Add { granularity: None },
    ),
    (
        "disabled",
        "Add it disabled: as --add --disable",
        Action::Disable,
    ),
    (
        "remove",
        "Remove the bitmap, an inconsistent one as well",
        Action::Remove,
    ),
    ("clear", "Clear all its bits", Action::Clear),
    (
        "enable",
        "Note the disk's changes in it from now on",
        Action::Enable,
    ),
    (
        "disable",
        "Note the disk's changes in it no more",
        Action::Disable,
    ),
];

impl Args for Actions {
    fn augment_args(command: Command) -> Command {
        let flag = |(name, help, _): &(&'static str, &'static str, Action)| {
            let flag = Arg::new(*name).long(*name).help(*help);
            // Each time that it is given has its place.
            let flag = flag.action(ArgAction::Append).num_args(0);
            let flag = flag.value_parser(clap::value_parser!(bool));
            let flag = flag.default_missing_value("true");
            match *name {
                "disabled" => flag.requires("add"),
                _ => flag,
            }
        };
        let merge = Arg::new("merge")
            .long("merge")
            .value_name("SOURCE")
            .help("Set the bits that bitmap SOURCE has set, whatever its granularity")
            .action(ArgAction::Append)
            .value_parser(clap::value_parser!(OsString));
        command.args(PLAIN.iter().map(flag)).arg(merge)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found = Vec::new();
        for (name, _, action) in &PLAIN {
            // The default has no place on the command line.
            for at in matches.indices_of(name).into_iter().flatten() {
                found.push((at, action.clone()));
            }
        }
        let at = matches.indices_of("merge").into_iter().flatten();
        let sources = matches.get_many::<OsString>("merge").into_iter().flatten();
        for (at, source) in at.zip(sources) {
            let source = source.as_encoded_bytes().to_vec();
            found.push((at, Action::Merge { source }));
        }
        found.sort_by_key(|(at, _)| *at);
        Ok(Self(found.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// One bitmap, as `info --json` has it too.
#[derive(Debug, Serialize)]
pub struct Json {
    name: String,
    granularity: u64,
    flags: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
}

impl Json {
    /// What the directory says of a bitmap.
    pub fn of(entry: &Entry) -> Self {
        let flags = [(entry.in_use(), "in-use"), (entry.auto(), "auto")];
        let flags = flags.into_iter().filter(|(set, _)| *set);
        Self {
            name: entry.name(),
            granularity: entry.granularity(),
            flags: flags.map(|(_, flag)| flag).collect(),
            count: None,
        }
    }
}

/// The bitmaps of a qcow2 image, for `info`. An image whose directory is damaged is worth a look too: then a
/// warning says what is wrong.
pub fn entries(storage: &dyn Storage) -> Vec<Entry> {
    image::qcow2::bitmap::list(storage).unwrap_or_else(|error| {
        tracing::warn!(%error, "its bitmaps cannot be listed");
        Vec::new()
    })
}

/// What a bitmap is, for people.
pub fn describe(entry: &Entry) -> String {
    let state = match (entry.in_use(), entry.incompatible(), entry.auto()) {
        (true, _, _) => "inconsistent",
        (_, true, _) => "has unknown extra data",
        (_, _, true) => "enabled",
        (_, _, false) => "disabled",
    };
    format!("{state}, granularity {}", size::human(entry.granularity()))
}

#[derive(Debug, Serialize)]
struct Output {
    filename: String,
    format: &'static str,
    bitmaps: Vec<Json>,
}

/// Does the actions, or shows the bitmaps.
pub fn run(args: &Bitmap) -> Result<()> {
    let Actions(mut actions) = args.actions.clone();
    for action in &mut actions {
        if let Action::Add { granularity } = action {
            *granularity = args.granularity;
        }
    }
    let name = match (&args.bitmap, actions.is_empty()) {
        (Some(name), false) => Some(name.as_encoded_bytes()),
        (None, true) => None,
        (Some(_), true) => bail!(
            "say what to do with the bitmap: --add, --remove, --clear, --enable, --disable or --merge SOURCE"
        ),
        (None, false) => bail!("say which bitmap: diskplane bitmap ACTION… FILE BITMAP"),
    };
    let access = match name {
        Some(_) => Access::Write,
        None => Access::reading(args.force_share),
    };
    let image = open::alone(
        &args.file,
        args.image_opts,
        &args.objects,
        args.format,
        access,
    )?;
    let file = qcow2(&args.file, (image.file, image.format))?;
    if let Some(name) = name {
        let read = |path: &Path| qcow2(path, open::image(path, args.source_format, Access::Read)?);
        let source = args.source_file.as_deref().map(read).transpose()?;
        let source = source.as_deref().map(|file| file as &dyn Storage);
        crate::check::prepare(&*file, Format::Qcow2)?;
        tool::bitmap::apply(&*file, name, &actions, source)?;
    }
    if name.is_some() && !args.json {
        return Ok(());
    }
    let bitmaps = tool::bitmap::list(&*file)?;
    match args.json {
        true => print(&json(args, &bitmaps)?),
        false => print(&table(&bitmaps)),
    }
}

/// The file of a qcow2 image; `path` names what was opened.
fn qcow2(path: &Path, opened: (Arc<File>, Format)) -> Result<Arc<File>> {
    match opened {
        (file, Format::Qcow2) => Ok(file),
        (_, format) => bail!(
            "{}: a {format} image has no bitmaps: only qcow2 has",
            path.display()
        ),
    }
}

fn json(args: &Bitmap, bitmaps: &[Listed]) -> Result<String> {
    let output = Output {
        filename: args.file.display().to_string(),
        format: Format::Qcow2.name(),
        bitmaps: bitmaps
            .iter()
            .map(|listed| Json {
                count: listed.dirty_bytes,
                ..Json::of(&listed.entry)
            })
            .collect(),
    };
    crate::json(&output)
}

fn table(bitmaps: &[Listed]) -> String {
    if bitmaps.is_empty() {
        return "no bitmaps\n".into();
    }
    let mut table = table::bare();
    for Listed { entry, dirty_bytes } in bitmaps {
        let dirty = dirty_bytes.map_or(String::new(), |n| format!("{} dirty", size::human(n)));
        table.add_row([entry.name(), describe(entry), dirty]);
    }
    table::text(&table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;
    use clap::Parser;

    fn parse(args: &[&str]) -> Result<Bitmap, clap::Error> {
        let cli = Cli::try_parse_from([&["diskplane", "bitmap"], args].concat())?;
        match cli.command {
            crate::args::Command::Bitmap(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn actions_keep_their_order() {
        let merge = |name: &str| Action::Merge {
            source: name.into(),
        };
        let add = Action::Add { granularity: None };
        for (args, want) in [
            (vec!["f"], vec![]),
            (
                vec!["--clear", "--merge", "a", "f", "b"],
                vec![Action::Clear, merge("a")],
            ),
            (
                vec!["--merge", "a", "--clear", "f", "b"],
                vec![merge("a"), Action::Clear],
            ),
            (
                vec![
                    "--add",
                    "--merge",
                    "a",
                    "f",
                    "--disable",
                    "--merge",
                    "c",
                    "b",
                    "--disable",
                ],
                vec![
                    add.clone(),
                    merge("a"),
                    Action::Disable,
                    merge("c"),
                    Action::Disable,
                ],
            ),
            (
                vec!["--add", "--disabled", "f", "b"],
                vec![add, Action::Disable],
            ),
        ] {
            assert_eq!(parse(&args).unwrap().actions.0, want, "{args:?}");
        }
        for args in [
            &["-g", "4k", "f", "b"][..],
            &["--disabled", "f", "b"],
            &["--clear", "-b", "o", "f", "b"],
            &["--merge", "a", "-F", "qcow2", "f", "b"],
        ] {
            assert!(parse(args).is_err(), "{args:?}");
        }
    }
}
