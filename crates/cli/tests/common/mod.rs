//! Running commands in a folder: ours and QEMU's.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs a program to its end.
pub fn run(program: impl AsRef<OsStr>, dir: &Path, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .current_dir(dir)
        .env_remove("NOTIFY_SOCKET")
        .output()
        .unwrap()
}

/// The program under test.
pub fn binary() -> PathBuf {
    testkit::diskplane(env!("CARGO_BIN_EXE_diskplane"))
}

/// Runs `diskplane`.
pub fn diskplane(dir: &Path, args: &[&str]) -> Output {
    run(binary(), dir, args)
}

/// What a command printed that must have succeeded.
#[track_caller]
fn text(args: &[&str], output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command of diskplane that must succeed; what it printed.
#[track_caller]
pub fn good(dir: &Path, args: &[&str]) -> String {
    text(args, diskplane(dir, args))
}

/// What a command said that must have failed with `code`.
#[track_caller]
pub fn failure(args: &[&str], output: &Output, code: i32) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    stderr
}

/// Runs a command of diskplane that must fail with one line; the line.
#[track_caller]
pub fn refused(dir: &Path, args: &[&str]) -> String {
    let line = failure(args, &diskplane(dir, args), 1);
    assert_eq!(line.lines().count(), 1, "{line}");
    line
}

/// Runs `qemu-img`, which must succeed; what it printed.
#[track_caller]
pub fn qemu_img(dir: &Path, args: &[&str]) -> String {
    text(args, run("qemu-img", dir, args))
}

/// Parses what must be JSON.
#[track_caller]
pub fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}
