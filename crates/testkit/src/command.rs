//! Running a program to its end.

use std::ffi::OsStr;
use std::fmt;
use std::process::{Command, ExitStatus, Stdio};

/// What a program printed that ended well.
#[derive(Debug, Clone)]
pub struct Output {
    /// Standard output, with what is no UTF-8 replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
}

/// Why something that a test started did not end well: readable as it is, with everything that was printed.
#[derive(Clone)]
pub struct Failure {
    message: String,
}

impl Failure {
    /// A failure with this description.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
        }
    }

    /// Whether the description, which contains all that was printed, has `text` in it.
    pub fn contains(&self, text: &str) -> bool {
        self.message.contains(text)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// As [`fmt::Display`], so that the `expect` of a test prints lines and not escapes.
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Failure {}

/// A command line for the eye: quotes only where a shell would need them.
pub(crate) fn display(command: &Command) -> String {
    let quote = |word: &OsStr| {
        let word = word.to_string_lossy().into_owned();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,%+@".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    };
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(quote)
        .collect();
    words.join(" ")
}

/// Why a program could not be started, with the way out when it is not installed.
pub(crate) fn cannot_start(command: &Command, error: &std::io::Error) -> Failure {
    let hint = match error.kind() {
        std::io::ErrorKind::NotFound => " (is it installed? `make setup` does that)",
        _ => "",
    };
    Failure::new(format!(
        "cannot start {}: {error}{hint}",
        command.get_program().to_string_lossy()
    ))
}

/// A description of a program that ended the wrong way.
pub(crate) fn ended(what: &str, status: ExitStatus, stdout: &str, stderr: &str) -> Failure {
    Failure::new(format!(
        "{what}\n  {status}\n  stdout: {}\n  stderr: {}",
        stdout.trim_end(),
        stderr.trim_end()
    ))
}

/// Runs a command to its end; anything but exit status 0 is a failure.
pub fn try_run(command: &mut Command) -> Result<Output, Failure> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| cannot_start(command, &e))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        Ok(Output { stdout, stderr })
    } else {
        Err(ended(&display(command), output.status, &stdout, &stderr))
    }
}

/// As [`try_run`]; a failure ends the test.
#[track_caller]
pub fn run(command: &mut Command) -> Output {
    match try_run(command) {
        Ok(output) => output,
        Err(failure) => panic!("{failure}"),
    }
}

/// A command with its arguments, where all of them are of one type.
pub fn command<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = A>,
) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_command_status_and_output() {
        let failure =
            try_run(&mut command("sh", ["-c", "echo out; echo err >&2; exit 3"])).unwrap_err();
        for part in [
            "sh -c 'echo out; echo err >&2; exit 3'",
            "exit status: 3",
            "stdout: out",
            "stderr: err",
        ] {
            assert!(failure.contains(part), "{part:?} is not in: {failure}");
        }
    }

    #[test]
    fn a_missing_program_names_the_way_out() {
        let failure = try_run(&mut command("no-such-program", [""; 0])).unwrap_err();
        assert!(failure.contains("make setup"), "{failure}");
    }

    #[test]
    fn output_of_both_streams_is_returned() {
        let output = run(&mut command("sh", ["-c", "echo out; echo err >&2"]));
        assert_eq!(
            (output.stdout.as_str(), output.stderr.as_str()),
            ("out\n", "err\n")
        );
    }
}
