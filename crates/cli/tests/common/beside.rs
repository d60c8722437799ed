//! Command lines of qemu-img, done by the installed one and by `diskplane qemu-img` beside each other.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::Path;
use std::process::Command;

/// `word` with the bytes that it writes as `\xNN`.
fn bytes(word: &str) -> OsString {
    let mut pieces = word.split("\\x");
    let mut bytes = pieces.next().unwrap().as_bytes().to_vec();
    for piece in pieces {
        bytes.push(u8::from_str_radix(&piece[..2], 16).unwrap());
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    OsString::from_vec(bytes)
}

/// What was printed, with what is no UTF-8 as `\xNN`.
fn text(printed: &[u8]) -> String {
    let chunks = printed.utf8_chunks();
    chunks
        .map(|chunk| format!("{}{}", chunk.valid(), chunk.invalid().escape_ascii()))
        .collect()
}

/// What a command line printed, both streams, and its exit code.
pub fn outcome(program: &[&str], dir: &Path, line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut command = match words.next() {
        Some("qemu-img") => {
            let mut command = Command::new(program[0]);
            command.args(&program[1..]);
            command
        }
        other => Command::new(other.unwrap()),
    };
    let words = words.map(|word| match word {
        // A space within a word.
        word if word.starts_with("write_") || word.starts_with("read_") => word.replace("_", " "),
        "''" => String::new(),
        word => word.replace("DIR", &dir.display().to_string()),
    });
    let words = words.map(|word| bytes(&word));
    let output = command.args(words).current_dir(dir).output().unwrap();
    let text = format!(
        "{}{}code {:?}\n",
        text(&output.stdout),
        text(&output.stderr),
        output.status.code()
    );
    normal(&text.replace(&dir.display().to_string(), "DIR"))
}

/// `text` without what differs from run to run, or between hosts.
fn normal(text: &str) -> String {
    // A name, and what its value is replaced by.
    let varying = [
        "disk size: ",
        "file length: ",
        "\"actual-size\": ",
        "\"date-sec\": ",
        "\"date-nsec\": ",
        "uuid: ",
        "cid: ",
        "cid\": ",
        "iters: ",
        " ops; ",
        "Run completed in ",
    ];
    let mut in_file = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        // The length of the file below an image is its writer's business.
        in_file |= line.contains("\"name\": \"file\"");
        let mut line = line.replace("/usr/bin/qemu-img", "qemu-img");
        for name in varying {
            if let Some(at) = line.find(name) {
                line.truncate(at + name.len());
            }
        }
        if in_file && line.contains("\"virtual-size\": ") {
            in_file = false;
            line.truncate(line.find(':').unwrap());
        }
        // The row of a snapshot: up to its date.
        if let (true, Some(at)) = (line.ends_with("          0"), line.find(" 20")) {
            line.truncate(at);
        }
        lines.push(line);
    }
    lines.join("\n")
}

/// Runs each of `lines` with both, and says where they part.
#[track_caller]
pub fn same(lines: &[&str]) {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    same_in(theirs.path(), ours.path(), lines);
}

/// As [`same`], in folders in which there is the same.
#[track_caller]
pub fn same_in(theirs: &Path, ours: &Path, lines: &[&str]) {
    let mut wrong = String::new();
    for line in lines {
        let want = outcome(&["qemu-img"], theirs, line);
        let found = outcome(&[env!("CARGO_BIN_EXE_diskplane"), "qemu-img"], ours, line);
        if want != found {
            wrong.push_str(&format!(
                "=== {line}\n--- qemu-img\n{want}\n--- diskplane qemu-img\n{found}\n"
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}
