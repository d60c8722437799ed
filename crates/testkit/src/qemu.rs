//! QEMU's tools as the other opinion: what they make we must read, what we make they must find right.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use crate::command::{Failure, Output, run, try_run};

/// `qemu-img` with these arguments.
fn qemu_img<const N: usize>(args: [OsString; N]) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(args);
    command
}

/// Makes an image with QEMU's defaults. `size` is in qemu-img's notation (`1G`).
#[track_caller]
pub fn create(format: &str, image: impl AsRef<Path>, size: &str) {
    create_with(format, image, size, "");
}

/// Makes an image with format options (`cluster_size=4096,lazy_refcounts=on`; empty for none).
#[track_caller]
pub fn create_with(format: &str, image: impl AsRef<Path>, size: &str, options: &str) {
    let mut command = qemu_img(["create".into(), "-q".into(), "-f".into(), format.into()]);
    if !options.is_empty() {
        command.args(["-o", options]);
    }
    run(command.arg(image.as_ref()).arg(size));
}

/// Makes an overlay of `backing`, which is named in the image just as it is given here.
#[track_caller]
pub fn create_overlay(image: impl AsRef<Path>, backing: impl AsRef<Path>, backing_format: &str) {
    let mut command = qemu_img(["create".into(), "-q".into(), "-f".into(), "qcow2".into()]);
    run(command
        .arg("-b")
        .arg(backing.as_ref())
        .args(["-F", backing_format])
        .arg(image.as_ref()));
}

/// Converts an image to another format, holes kept as holes.
#[track_caller]
pub fn convert(from_format: &str, from: impl AsRef<Path>, to_format: &str, to: impl AsRef<Path>) {
    let mut command = qemu_img([
        "convert".into(),
        "-f".into(),
        from_format.into(),
        "-O".into(),
        to_format.into(),
    ]);
    run(command.arg(from.as_ref()).arg(to.as_ref()));
}

/// `qemu-img check`: neither errors nor leaks may be in the image.
#[track_caller]
pub fn check(format: &str, image: impl AsRef<Path>) {
    if let Err(failure) = try_check(format, image) {
        panic!("{failure}");
    }
}

/// `qemu-img check`; leaked clusters (status 3) are a failure as errors (status 2) are.
pub fn try_check(format: &str, image: impl AsRef<Path>) -> Result<Output, Failure> {
    try_run(qemu_img(["check".into(), "-f".into(), format.into()]).arg(image.as_ref()))
}

/// `qemu-img check` after a crash: leaks are allowed, errors are not. Returns what was printed.
#[track_caller]
pub fn check_allowing_leaks(format: &str, image: impl AsRef<Path>) -> String {
    let image = image.as_ref().display().to_string();
    // Status 3 is "leaks, but no errors".
    let script = "qemu-img check -f \"$1\" \"$2\"; status=$?; [ $status = 3 ] || exit $status";
    run(Command::new("sh").args(["-c", script, "sh", format, &image])).stdout
}

/// `qemu-img compare`: a guest must see the same bytes in both. A name may be a file or a URI
/// (`nbd+unix:///?socket=…`, whose format is `raw`).
#[track_caller]
pub fn compare(format_a: &str, a: impl AsRef<Path>, format_b: &str, b: impl AsRef<Path>) {
    let mut command = qemu_img([
        "compare".into(),
        "-f".into(),
        format_a.into(),
        "-F".into(),
        format_b.into(),
    ]);
    run(command.arg(a.as_ref()).arg(b.as_ref()));
}

/// The URI of an NBD server on a Unix socket, as QEMU and libnbd understand it.
pub fn nbd_unix_uri(socket: impl AsRef<Path>) -> String {
    format!("nbd+unix:///?socket={}", socket.as_ref().display())
}

/// Runs `qemu-io` commands (`write -P 7 0 64k`) on an image, one after the other, and returns what it
/// printed. qemu-io's status tells little about its commands, so its complaints are looked for as well.
#[track_caller]
pub fn io(format: &str, image: impl AsRef<Path>, commands: &[&str]) -> String {
    match try_io(format, image, commands) {
        Ok(printed) => printed,
        Err(failure) => panic!("{failure}"),
    }
}

/// As [`io`], with the failure returned.
pub fn try_io(format: &str, image: impl AsRef<Path>, commands: &[&str]) -> Result<String, Failure> {
    let mut command = Command::new("qemu-io");
    command.args(["-f", format]);
    for one in commands {
        command.args(["-c", one]);
    }
    let output = try_run(command.arg(image.as_ref()))?;
    let printed = output.stdout + &output.stderr;
    // "Pattern verification failed at offset …", "write failed: Input/output error", "command not found".
    if ["failed", "not found", "error"]
        .iter()
        .any(|sign| printed.contains(sign))
    {
        return Err(Failure::new(format!(
            "{}\n  {}",
            crate::command::display(&command),
            printed.trim_end()
        )));
    }
    Ok(printed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TempDir;

    #[test]
    fn qemu_io_complains_about_a_wrong_pattern() {
        let dir = TempDir::new();
        let image = dir.path("a.qcow2");
        create("qcow2", &image, "1M");
        io("qcow2", &image, &["write -P 7 0 64k", "read -P 7 0 64k"]);
        let failure = try_io("qcow2", &image, &["read -P 8 0 64k"]).unwrap_err();
        assert!(failure.contains("Pattern verification failed"), "{failure}");
    }

    #[test]
    fn images_are_made_checked_converted_and_compared() {
        let dir = TempDir::new();
        let (base, top, flat) = (
            dir.path("base.raw"),
            dir.path("top.qcow2"),
            dir.path("flat.raw"),
        );
        create("raw", &base, "2M");
        io("raw", &base, &["write -P 3 0 1M"]);
        create_overlay(&top, &base, "raw");
        io("qcow2", &top, &["write -P 4 512k 1M"]);
        check("qcow2", &top);
        assert!(check_allowing_leaks("qcow2", &top).contains("No errors"));
        convert("qcow2", &top, "raw", &flat);
        compare("qcow2", &top, "raw", &flat);
    }
}
