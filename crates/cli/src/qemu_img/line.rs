//! The command line: `getopt_long`'s habits over clap, and what qemu-img says of a wrong one.

use anyhow::{Error, Result, anyhow};
use block::size;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Args, Command, FromArgMatches};
use std::ffi::OsString;
use std::fmt;

/// A command line that makes no sense: after the message comes where help is.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A [`Usage`] error.
pub fn usage(message: impl Into<String>) -> Error {
    Error::new(Usage(message.into()))
}

/// What becomes of a command line.
pub enum Parsed<T> {
    /// It is one.
    Go(T),
    /// It asked for this text.
    Help(String),
    /// This is wrong with it, with the name of the command before it.
    Wrong(String),
}

/// Parses the arguments of the command `name` (without it): short options in bundles, long ones abbreviated, options
/// behind operands, the last one counts where one is repeated, and a value may begin with a dash.
pub fn parse<T: Args + FromArgMatches>(name: &'static str, arguments: &[OsString]) -> Parsed<T> {
    let command = Command::new(name)
        .bin_name(format!("qemu-img {name}"))
        .no_binary_name(true)
        .infer_long_args(true)
        .args_override_self(true)
        .disable_version_flag(true);
    let known = super::COMMANDS.iter().find(|(known, _)| *known == name);
    // In place of what the code says of the arguments.
    let about = known.map_or("", |(_, what)| *what);
    let command = T::augment_args(command).about(about).mut_args(|arg| {
        let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
        match takes_value && !arg.is_positional() && arg.get_num_args() != Some(0.into()) {
            true => arg.allow_hyphen_values(true),
            false => arg,
        }
    });
    let long = command.get_arguments().filter_map(Arg::get_long);
    let long: Vec<String> = long.map(|name| format!("--{name}")).collect();
    // From here on names are text, whatever their bytes.
    let arguments: Vec<String> = arguments.iter().map(block::name::text).collect();
    let parsed = command
        .try_get_matches_from(&arguments)
        .and_then(|matches| T::from_arg_matches(&matches));
    match parsed {
        Ok(parsed) => Parsed::Go(parsed),
        Err(error) if !error.use_stderr() => Parsed::Help(error.render().to_string()),
        Err(error) => {
            let last = arguments.last().map_or("", String::as_str);
            Parsed::Wrong(format!("qemu-img {name}: {}", wrong(&error, &long, last)))
        }
    }
}

/// What `getopt_long` says, where `long` are the long options; `last` is the last argument, where a value can be missing.
fn wrong(error: &clap::Error, long: &[String], last: &str) -> String {
    let named = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(named)) => named.split([' ', '=']).next().unwrap_or_default(),
        Some(ContextValue::Strings(named)) => named.first().map_or("", String::as_str),
        _ => "",
    };
    let value = match error.get(ContextKind::InvalidValue) {
        Some(ContextValue::String(value)) => value.as_str(),
        _ => "",
    };
    let short = |named: &str| {
        let letter = named.strip_prefix('-').filter(|l| !l.starts_with('-'));
        letter.and_then(|letter| letter.chars().next())
    };
    match error.kind() {
        ErrorKind::UnknownArgument => match short(named) {
            Some(letter) => format!("invalid option -- '{letter}'"),
            None => {
                let fits: Vec<_> = long.iter().filter(|o| o.starts_with(named)).collect();
                match fits.as_slice() {
                    [_, _, ..] => {
                        let fits: Vec<String> = fits.iter().map(|o| format!("'{o}'")).collect();
                        let fits = fits.join(" ");
                        format!("option '{named}' is ambiguous; possibilities: {fits}")
                    }
                    _ => format!("unrecognized option '{named}'"),
                }
            }
        },
        // clap names the long form, whichever was given.
        ErrorKind::InvalidValue if value.is_empty() => match last.starts_with("--") {
            false => {
                let letter = last.chars().next_back().unwrap_or('-');
                format!("option requires an argument -- '{letter}'")
            }
            true => format!("option '{named}' requires an argument"),
        },
        ErrorKind::TooManyValues => format!("option '{named}' doesn't allow an argument"),
        _ => {
            let text = error.render().to_string();
            let line = text.lines().next().unwrap_or_default();
            line.trim_start_matches("error: ").to_owned()
        }
    }
}

/// The one operand that a command has.
pub fn one<'a>(files: &'a [String], lacking: &str) -> Result<&'a str> {
    match files {
        [file] => Ok(file),
        _ => Err(usage(lacking)),
    }
}

/// A size: decimal, perhaps with a fraction, and a suffix from `b` to `E`; or hexadecimal.
pub fn size_of(text: &str) -> Option<u64> {
    let text = text.trim_start();
    let text = text.strip_prefix('+').unwrap_or(text);
    let hexadecimal = text.strip_prefix("0x").or(text.strip_prefix("0X"));
    match hexadecimal {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None if text.ends_with("iB") || text.starts_with('+') => None,
        // `.5M`, of which only the whole part is missing.
        None if text
            .strip_prefix('.')
            .is_some_and(|t| t.starts_with(|c: char| c.is_ascii_digit())) =>
        {
            size::parse(&format!("0{text}")).ok()
        }
        None => size::parse(text).ok(),
    }
}

/// Whether `text` is a size that only is too large.
fn is_too_large(text: &str) -> bool {
    let digits = text.trim_end_matches(|c: char| "bBkKmMgGtTpPeE".contains(c));
    !digits.is_empty()
        && text.len() - digits.len() <= 1
        && digits.parse::<f64>().is_ok_and(|n| n >= 0.0)
}

/// The value of the option or operand `what`, from `min` to `max`.
pub fn number(what: &str, text: &str, min: u64, max: u64) -> Result<u64> {
    let range = || anyhow!("Invalid {what} specified. Must be between {min} and {max}.");
    let negative = text.trim_start().strip_prefix('-');
    if negative.is_some_and(|digits| !digits.contains('.') && size_of(digits).is_some()) {
        return Err(range());
    }
    match size_of(text) {
        Some(found) if (min..=max).contains(&found) => Ok(found),
        Some(_) => Err(range()),
        None if is_too_large(text) && !text.contains('.') => Err(range()),
        None => Err(anyhow!("Invalid {what} specified: '{text}'.")),
    }
}

/// As [`number`], for what has no bound of its own.
pub fn bytes(what: &str, text: &str) -> Result<u64> {
    number(what, text, 0, i64::MAX as u64)
}

/// Whether `--output` asks for JSON.
pub fn is_json(output: Option<&str>) -> Result<bool> {
    match output {
        None | Some("human") => Ok(false),
        Some("json") => Ok(true),
        Some(other) => Err(usage(format!(
            "--output expects 'human' or 'json' not '{other}'"
        ))),
    }
}

/// What `-o`, given several times, says: all of it in one list.
///
/// # Errors
///
/// Where a list begins with a comma or ends with a single one: together they would mean something else.
pub fn joined(lists: &[String]) -> Result<String> {
    for list in lists {
        let end = list.len() - list.trim_end_matches(',').len();
        if list.is_empty() || list.starts_with(',') || end % 2 == 1 {
            return Err(anyhow!("Invalid option list: {list}"));
        }
    }
    Ok(lists.join(","))
}

/// Whether a list of options asks what there is.
pub fn wants_help(list: &str) -> bool {
    crate::options::split(list)
        .iter()
        .any(|piece| piece == "help" || piece == "?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Args, Debug, Default, PartialEq)]
    struct Example {
        #[arg(short, long)]
        format: Option<String>,
        #[arg(short)]
        options: Vec<String>,
        #[arg(short, long)]
        quiet: bool,
        #[arg(short = 'p')]
        progress: bool,
        #[arg(long)]
        force_share: bool,
        files: Vec<String>,
    }

    fn parse_all(text: &str) -> Result<Example, String> {
        let arguments: Vec<OsString> = text.split(' ').map(Into::into).collect();
        match parse("x", &arguments) {
            Parsed::Go(found) => Ok(found),
            Parsed::Help(_) => Err("help".into()),
            Parsed::Wrong(text) => Err(text),
        }
    }

    #[test]
    fn options_are_taken_as_getopt_takes_them() {
        let found = parse_all("a -qpf raw --forc b -o x=1 -q -o -y -fqcow2 -- -c").unwrap();
        let want = Example {
            format: Some("qcow2".into()),
            options: vec!["x=1".into(), "-y".into()],
            quiet: true,
            progress: true,
            force_share: true,
            files: vec!["a".into(), "b".into(), "-c".into()],
        };
        assert_eq!(found, want);
        for (text, why) in [
            ("-Z", "qemu-img x: invalid option -- 'Z'"),
            ("-qZ", "qemu-img x: invalid option -- 'Z'"),
            ("--zoo", "qemu-img x: unrecognized option '--zoo'"),
            ("-f", "qemu-img x: option requires an argument -- 'f'"),
            (
                "--form",
                "qemu-img x: option '--format' requires an argument",
            ),
            ("--help", "help"),
        ] {
            let found = parse_all(text).unwrap_err();
            assert_eq!(found, why, "{text}");
        }
    }

    #[test]
    fn numbers_are_sizes() {
        for (text, want) in [
            ("0x1000", Ok(4096)),
            ("1.5k", Ok(1536)),
            ("7b", Ok(7)),
            ("1KiB", Err("Invalid n specified: '1KiB'.")),
            (
                "-1",
                Err("Invalid n specified. Must be between 0 and 9223372036854775807."),
            ),
            ("-0.5", Err("Invalid n specified: '-0.5'.")),
            (
                "9E",
                Err("Invalid n specified. Must be between 0 and 9223372036854775807."),
            ),
            (
                "99E",
                Err("Invalid n specified. Must be between 0 and 9223372036854775807."),
            ),
            ("", Err("Invalid n specified: ''.")),
        ] {
            let found = bytes("n", text).map_err(|e| e.to_string());
            assert_eq!(found, want.map_err(str::to_owned), "{text}");
        }
    }
}
