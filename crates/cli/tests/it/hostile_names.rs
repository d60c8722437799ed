//! Images that name other files: what the user did not allow is refused by every command, and no name makes one hang
//! (CVE-2024-4467 and its kind).

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use testkit::TempDir;
use testkit::forge::{Bitmap, Forge, Shape, Snapshot, extension, field};

/// Runs a command that must end by itself, in `dir`.
fn diskplane(dir: &Path, args: &[&str]) -> Output {
    let output = Command::new("timeout")
        .args(["--signal=KILL", "30"])
        .arg(testkit::diskplane(env!("CARGO_BIN_EXE_diskplane")))
        .args(args)
        .current_dir(dir)
        .env_remove("NOTIFY_SOCKET")
        .output()
        .unwrap();
    let code = output.status.code();
    assert!(code.is_some_and(|code| code < 100), "{args:?}: {output:?}");
    output
}

/// What each command that follows the names says when it refuses the image.
fn refusals(dir: &Path, image: &str) -> Vec<(&'static str, String)> {
    let commands: [(&str, &[&str]); 4] = [
        ("info", &["info", "--backing-chain", image]),
        ("map", &["map", image]),
        ("serve", &["serve", image, "--nbd", "unix:sock"]),
        (
            "serve --read-only",
            &["serve", image, "--read-only", "--vhost-user", "sock"],
        ),
    ];
    let refusal = |(what, args): (&'static str, &[&str])| {
        let output = diskplane(dir, args);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{image}: {what}: {text}");
        assert!(
            output.stdout.is_empty(),
            "{image}: {what} printed something"
        );
        assert!(text.contains(image), "{what} does not name {image}: {text}");
        assert!(
            !text.contains('\x1b'),
            "{what} lets {image} talk to the terminal"
        );
        (what, text)
    };
    commands.map(refusal).to_vec()
}

fn own(dir: &TempDir) -> std::path::PathBuf {
    let own = dir.path("own");
    fs::create_dir(&own).unwrap();
    fs::write(dir.path("secret"), [7; 4096]).unwrap();
    own
}

/// A path in `dir` that nothing but a process at the other end answers.
fn fifo(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(made.success());
}

const PROTOCOL: &str = "has a protocol";
const OUTSIDE: &str = "--allow-backing";

#[test]
fn cve_2024_4467_backing_names_lead_nowhere_else() {
    let dir = TempDir::new();
    let own = own(&dir);
    fifo(&own.join("fifo"));
    let _socket = UnixListener::bind(own.join("socket")).unwrap();
    fs::create_dir(own.join("folder")).unwrap();
    symlink("../secret", own.join("link")).unwrap();
    symlink("/dev/zero", own.join("device")).unwrap();
    symlink("round", own.join("round")).unwrap();
    let absolute = dir.path("secret").display().to_string();
    for (name, says) in [
        (
            r#"json:{"driver":"raw","file":{"driver":"file","filename":"/etc/hostname"}}"#,
            PROTOCOL,
        ),
        (r#"json:{"file.filename":"../secret"}"#, PROTOCOL),
        ("nbd://127.0.0.1:1/", PROTOCOL),
        ("nbd:unix:socket", PROTOCOL),
        ("ssh://127.0.0.1/secret", PROTOCOL),
        ("https://127.0.0.1:1/secret", PROTOCOL),
        ("fat:rw:folder", PROTOCOL),
        ("blkdebug::../secret", PROTOCOL),
        ("file:../secret", PROTOCOL),
        ("host_device:/dev/zero", PROTOCOL),
        (&absolute, OUTSIDE),
        ("../secret", OUTSIDE),
        ("./folder/../../secret", OUTSIDE),
        ("link", OUTSIDE),
        ("/etc/hostname", OUTSIDE),
        ("/dev/zero", OUTSIDE),
        ("device", OUTSIDE),
        ("/dev/stdin", ""),
        ("/proc/self/environ", ""),
        ("/proc/self/fd/0", ""),
        ("fifo", "neither a file nor a block device"),
        ("socket", "neither a file nor a block device"),
        ("folder", "neither a file nor a block device"),
        (".", ""),
        ("..", OUTSIDE),
        ("round", "symbolic links"),
        ("absent", "No such file"),
        ("\x1b[2Jabsent", "\\u{1b}[2J"),
        ("ab\nsent", "\\n"),
        ("image", "loop"),
        ("./folder/../image", "loop"),
    ] {
        let forge = Forge::new(Shape::default()).backing(name.as_bytes(), "raw");
        fs::write(own.join("image"), forge.bytes).unwrap();
        for (what, text) in refusals(&own, "image") {
            assert!(text.contains(says), "{name}: {what}: {text}");
        }
        // The image itself is sound; who asks for no chain gets to see the name, made harmless.
        let info = diskplane(&own, &["info", "image"]);
        assert!(
            info.status.success() && !info.stdout.contains(&0x1b),
            "{name}"
        );
        assert!(
            diskplane(&own, &["check", "image"]).status.success(),
            "{name}"
        );
    }
}

#[test]
fn formats_of_backing_files_are_not_guessed() {
    let dir = TempDir::new();
    let own = own(&dir);
    fs::write(own.join("base"), [0; 4096]).unwrap();
    for (format, says) in [
        ("", "not recorded"),
        ("udif", "not supported"),
        ("null", "not supported"),
        ("\x1b[2J", "not supported"),
        ("json", "not supported"),
    ] {
        let forge = Forge::new(Shape::default()).backing(b"base", format);
        fs::write(own.join("image"), forge.bytes).unwrap();
        for (what, text) in refusals(&own, "image") {
            assert!(text.contains(says), "{format}: {what}: {text}");
        }
    }
}

#[test]
fn chains_end() {
    let dir = TempDir::new();
    let own = own(&dir);
    let overlay = |name: &str, backing: &str| {
        let forge = Forge::new(Shape::default()).backing(backing.as_bytes(), "qcow2");
        fs::write(own.join(name), forge.bytes).unwrap();
    };
    // Three that follow each other, under a name of the same file the last time.
    overlay("a", "b");
    overlay("b", "c");
    overlay("c", "also-a");
    fs::hard_link(own.join("a"), own.join("also-a")).unwrap();
    for (what, text) in refusals(&own, "a") {
        assert!(text.contains("loop"), "{what}: {text}");
    }
    // The longest that is allowed, and one more.
    for nth in 0..201 {
        overlay(&format!("{nth}"), &format!("{}", nth + 1));
    }
    fs::write(own.join("201"), Forge::new(Shape::default()).bytes).unwrap();
    for (what, text) in refusals(&own, "1") {
        assert!(text.contains("longer than 200 images"), "{what}: {text}");
    }
    let chain = diskplane(&own, &["map", "2"]);
    assert!(chain.status.success(), "{chain:?}");
}

#[test]
fn cve_2024_4467_data_files_are_no_way_out() {
    let dir = TempDir::new();
    let own = own(&dir);
    fifo(&own.join("fifo"));
    symlink("../secret", own.join("link")).unwrap();
    let absolute = dir.path("secret").display().to_string();
    for name in [
        r#"json:{"driver":"file","filename":"/etc/hostname"}"#,
        "nbd://127.0.0.1:1/",
        "file:../secret",
        &absolute,
        "../secret",
        "link",
        "/dev/zero",
        "/dev/stdin",
        "fifo",
        ".",
        "image",
        "",
        "a\0b",
        "\u{1b}[2J",
    ] {
        let forge = Forge::new(Shape::default())
            .put_u64(field::INCOMPATIBLE, 4)
            .extension(extension::DATA_FILE, name.as_bytes());
        fs::write(own.join("image"), forge.bytes).unwrap();
        refusals(&own, "image");
    }
    assert_eq!(fs::read(dir.path("secret")).unwrap(), [7; 4096]);
}

/// No control character but the ends of lines that we mean; nothing that turns the text around.
fn harmless(output: &Output, what: &str) {
    for text in [&output.stdout, &output.stderr] {
        let text = std::str::from_utf8(text).unwrap_or_else(|error| panic!("{what}: {error}"));
        let steers = |c: char| c != '\n' && c.is_control() || c == '\u{202e}';
        assert!(!text.contains(steers), "{what}: {text:?}");
        assert!(!text.lines().any(|line| line == "FORGED"), "{what}: {text}");
    }
}

#[test]
fn no_name_in_an_image_steers_the_terminal() {
    let dir = TempDir::new();
    let own = own(&dir);
    const EVIL: &[u8] = b"e\x1b[2J\r\x07\nFORGED\n\xe2\x80\xae\xff\xc2\x9bx";
    let text = String::from_utf8_lossy(EVIL);
    let mut forge = Forge::new(Shape::default()).data(0, 1);
    let (l1_offset, table) = (forge.allocate(1), forge.allocate(1));
    let snapshot = Snapshot {
        l1_offset,
        l1_size: 2,
        name: EVIL.to_vec(),
        ..Snapshot::default()
    };
    // One that is too large to be entered: the error names it.
    let large = Snapshot {
        extra: [0u64.to_be_bytes(), (!511u64 >> 1).to_be_bytes()].concat(),
        name: [EVIL, b"large"].concat(),
        ..snapshot.clone()
    };
    let bitmap = |name: &[u8], flags| Bitmap {
        table,
        flags,
        name: name.to_vec(),
        ..Bitmap::default()
    };
    let feature = [&[0, 60][..], EVIL, &[0; 46][EVIL.len()..]].concat();
    let forge = forge
        .snapshots(&[snapshot, large])
        .bitmaps(&[bitmap(EVIL, 1), bitmap(b"b", 2)])
        .extension(extension::FEATURE_NAMES, &feature)
        .backing(text.as_bytes(), &text);
    fs::write(own.join("image"), &forge.bytes).unwrap();
    let lacking = forge.put_u64(field::INCOMPATIBLE, 1 << 60);
    fs::write(own.join("lacking"), lacking.bytes).unwrap();
    // A backing file that is there, by that name, and is no qcow2 image.
    fs::write(own.join(&*text), [0; 4096]).unwrap();
    let above = Forge::new(Shape::default()).backing(text.as_bytes(), "qcow2");
    fs::write(own.join("above"), above.bytes).unwrap();
    let large = format!("{text}large");
    let commands: &[&[&str]] = &[
        &["info", "image"],
        &["info", "image", "--json"],
        &["info", "image", "--backing-chain"],
        &["info", "image", "--snapshot", "nothing"],
        &["info", "image", "--snapshot", &large],
        &["info", "lacking"],
        &["info", "above", "--backing-chain"],
        &["map", "above"],
        &["check", "image"],
        &["check", "image", "--json"],
        &["check", "lacking"],
        &["snapshot", "image"],
        &["snapshot", "image", "--json"],
        &["snapshot", "image", "--delete", "nothing"],
        &["snapshot", "image", "--apply", &large],
        &["bitmap", "image"],
        &["bitmap", "image", "--json"],
        &["bitmap", "image", "--remove", "nothing"],
        &["bitmap", "image", "--clear", &text],
        &["convert", "above", "out"],
        &["resize", "image", "8M"],
        &["amend", "image", "-o", "compat=0.10"],
        &["amend", "lacking", "-o", "compat=0.10"],
        &["serve", "above", "--nbd", "unix:sock"],
        &["serve", "lacking", "--nbd", "unix:sock"],
    ];
    for args in commands {
        let output = diskplane(&own, args);
        let what = args.join(" ");
        harmless(&output, &what);
        if args.contains(&"--json") {
            serde_json::from_slice::<serde_json::Value>(&output.stdout)
                .unwrap_or_else(|error| panic!("{what}: {error}: {output:?}"));
        }
    }
}
