//! What the tests against QEMU share: its tools, a model of a disk, random operations from a seed.

#![allow(dead_code)]

use crypto::Passphrase;
use disk::{Chain, ChainOptions, blocking::Driver};
use image::Format;
use std::{
    fmt::Write as _,
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

/// Tries `action` again while it fails because an image is locked, for two seconds.
///
/// A process that another test is just making has copies of all descriptors until it executes its program,
/// and even a moment longer than the making takes; an image's lock lasts as long as any copy. So a file that
/// was closed may stay locked for a moment, and nothing tells when that is over.
pub fn patiently<T, E>(
    locked: impl Fn(&E) -> bool,
    mut action: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    for _ in 0..200 {
        match action() {
            Err(error) if locked(&error) => std::thread::sleep(Duration::from_millis(10)),
            done => return done,
        }
    }
    action()
}

/// Opens a chain, patiently.
pub fn open_chain(path: &Path, options: &ChainOptions) -> Result<Chain, block::Error> {
    let locked = |error: &block::Error| error.kind() == block::ErrorKind::Locked;
    patiently(locked, || Chain::open(path.to_str().unwrap(), options))
}

/// Runs `name` with `input` in `dir`; its output, where it failed as an error.
fn try_tool(dir: &Path, name: &str, args: &[&str], input: &str) -> Result<String, String> {
    let mut child = Command::new(name)
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{name} (package qemu-utils): {e}"));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    // The pipe holds less than the answers may be: feed it from beside. A tool that has
    // failed does not read on.
    let feeder = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().unwrap();
    let _ = feeder.join().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => Ok(text + &errors),
        false => Err(format!(
            "{name} {args:?}: {}\n{text}{errors}",
            output.status
        )),
    }
}

fn is_locked<S: AsRef<str>>(failure: &S) -> bool {
    failure
        .as_ref()
        .contains("Is another process using the image")
}

/// `qemu-img` in `dir`; panics with what it said when it fails.
pub fn qemu_img(dir: &Path, args: &[&str]) -> String {
    patiently(is_locked, || try_tool(dir, "qemu-img", args, "")).unwrap_or_else(|e| panic!("{e}"))
}

/// What `qemu_args` calls a LUKS volume.
pub const VOLUME: &str = "luks";
/// What `qemu_args` calls an encrypted qcow2 image, with any unencrypted backing image.
pub const LUKS: &str = "qcow2 with luks";
/// An encrypted qcow2 image on an encrypted qcow2 image.
pub const LUKS_ON_LUKS: &str = "luks on luks";
/// A qcow2 image on an encrypted qcow2 image.
pub const QCOW2_ON_LUKS: &str = "qcow2 on luks";
/// The passphrase of them all.
pub const PASSPHRASE: &str = "open, sesame";
/// The passphrase as an object for QEMU's tools.
pub const SECRET: &str = "secret,id=key,data=open,, sesame";

/// How QEMU's tools are told of `image`: a format, or one of the names above.
pub fn qemu_args(format: &str, image: &str) -> Vec<String> {
    let key = ",encrypt.key-secret=key";
    let below = ",backing.driver=qcow2,backing.file.filename=base,backing.encrypt.key-secret=key";
    let (key, below) = match format {
        VOLUME => {
            let opts = format!("driver=luks,file.filename={image},key-secret=key");
            let args = ["--object", SECRET, "--image-opts", &opts];
            return args.map(str::to_owned).to_vec();
        }
        LUKS => (key, ""),
        LUKS_ON_LUKS => (key, below),
        QCOW2_ON_LUKS => ("", below),
        _ => return ["-f", format, image].map(str::to_owned).to_vec(),
    };
    let opts = format!("driver=qcow2,file.filename={image}{key}{below}");
    ["--object", SECRET, "--image-opts", &opts]
        .map(str::to_owned)
        .to_vec()
}

/// Has one `qemu-io` carry out all `commands` (one a line) on `image`; panics when one failed.
pub fn qemu_io(dir: &Path, format: &str, image: &str, commands: &str) -> String {
    // Unmapping must be asked for, or discards are ignored. Nothing crashes here: syncs only cost time.
    let image_args = qemu_args(format, image);
    let mut args = vec!["-d", "unmap", "-t", "unsafe"];
    args.extend(image_args.iter().map(String::as_str));
    let text = patiently(is_locked, || try_tool(dir, "qemu-io", &args, commands));
    let text = text.unwrap_or_else(|e| panic!("{e}\n{commands}"));
    let bad = ["failed", "rror", "verification", "Invalid", "not found"];
    assert!(
        !bad.iter().any(|word| text.contains(word)),
        "qemu-io {image}:\n{commands}\n{text}"
    );
    text
}

/// `qemu-img check`: neither errors nor leaks.
pub fn check(dir: &Path, image: &str) {
    check_as(dir, "qcow2", image);
}

/// As [`check`], for a `format` of [`qemu_args`].
pub fn check_as(dir: &Path, format: &str, image: &str) {
    let image_args = qemu_args(format, image);
    let mut args = vec!["check", "-q"];
    args.extend(image_args.iter().map(String::as_str));
    qemu_img(dir, &args);
}

/// `qemu-img check`: no errors; clusters that nobody uses are no harm.
pub fn check_allowing_leaks(dir: &Path, image: &str) {
    let args = ["check", "-q", "-f", "qcow2", image];
    match patiently(is_locked, || try_tool(dir, "qemu-img", &args, "")) {
        // 3: leaks, but no errors (qemu-img(1)).
        Err(failure) if !failure.contains("exit status: 3") => panic!("{failure}"),
        _ => {}
    }
}

/// A seeded stream of numbers (SplitMix64).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of `seed`. `DISKPLANE_TEST_SEED` in the environment moves all seeds, to look
    /// further than the ones that every run tries.
    pub fn new(seed: u64) -> Self {
        let moved = std::env::var("DISKPLANE_TEST_SEED").ok();
        let moved = moved.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        Self(seed.wrapping_add(moved << 32))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// A random operation. Patterns are bytes, as `qemu-io -P` has them.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Write { at: u64, len: u64, pattern: u8 },
    Zero { at: u64, len: u64, unmap: bool },
    Discard { at: u64, len: u64 },
    Read { at: u64, len: u64 },
    Flush,
}

/// An operation on a disk of `size` bytes: as often small as large against `cluster`, often on its edges.
pub fn random_op(random: &mut Random, size: u64, cluster: u64, align: u64) -> Op {
    let sectors = size / align;
    let unit = (cluster / align).max(1);
    let mut at = random.below(sectors);
    if random.below(3) == 0 {
        at -= at % unit;
    }
    let most = match random.below(4) {
        0 => unit.min(8),
        1 => unit,
        2 => unit * 3,
        _ => (unit * 8).max(16),
    };
    let mut len = 1 + random.below(most);
    if random.below(3) == 0 {
        len = len.next_multiple_of(unit);
    }
    let (at, len) = (at * align, len.min(sectors - at) * align);
    match random.below(16) {
        0..=6 => Op::Write {
            at,
            len,
            pattern: 1 + random.below(255) as u8,
        },
        7..=9 => Op::Zero {
            at,
            len,
            unmap: random.below(2) == 0,
        },
        10..=11 => Op::Discard { at, len },
        12..=14 => Op::Read { at, len },
        _ => Op::Flush,
    }
}

/// What a disk must read as.
#[derive(Clone, Debug)]
pub struct Model {
    pub bytes: Vec<u8>,
    /// Whether the byte was discarded and may as well read as zero.
    maybe: Vec<bool>,
}

impl Model {
    pub fn new(size: u64) -> Self {
        Self {
            bytes: vec![0; size as usize],
            maybe: vec![false; size as usize],
        }
    }

    /// A disk that reads as `bytes`.
    pub fn of(bytes: Vec<u8>) -> Self {
        let maybe = vec![false; bytes.len()];
        Self { bytes, maybe }
    }

    /// A disk of `size` bytes over a base that reads as `base`.
    pub fn over(base: &Model, size: u64) -> Self {
        let mut model = Self::new(size);
        let len = model.bytes.len().min(base.bytes.len());
        model.bytes[..len].copy_from_slice(&base.bytes[..len]);
        model
    }

    pub fn apply(&mut self, op: Op) {
        let range = |at: u64, len: u64| at as usize..(at + len) as usize;
        match op {
            Op::Write { at, len, pattern } => {
                self.bytes[range(at, len)].fill(pattern);
                self.maybe[range(at, len)].fill(false);
            }
            Op::Zero { at, len, .. } => {
                self.bytes[range(at, len)].fill(0);
                self.maybe[range(at, len)].fill(false);
            }
            Op::Discard { at, len } => self.maybe[range(at, len)].fill(true),
            Op::Read { .. } | Op::Flush => {}
        }
    }

    /// Compares what was read at `at`. Where a discard left it open, what was read counts from now on.
    pub fn check(&mut self, at: u64, read: &[u8]) -> Result<(), String> {
        let at = at as usize;
        let range = at..at + read.len();
        if self.bytes[range.clone()] == *read {
            self.maybe[range].fill(false);
            return Ok(());
        }
        for (index, byte) in read.iter().enumerate() {
            let want = &mut self.bytes[at + index];
            let open = &mut self.maybe[at + index];
            if *byte != *want && !(*open && *byte == 0) {
                return Err(format!(
                    "byte {:#x} is {byte:#04x}, must be {want:#04x}{}",
                    at + index,
                    if *open { " or 0" } else { "" }
                ));
            }
            (*want, *open) = (*byte, false);
        }
        Ok(())
    }
}

/// The operation as `qemu-io` commands, and `model` after it. Reads are verified where the model is
/// one pattern and settled.
pub fn as_qemu_io(op: Op, model: &mut Model, script: &mut String) {
    let _ = match op {
        Op::Write { at, len, pattern } => writeln!(script, "write -q -P {pattern} {at} {len}"),
        Op::Zero { at, len, unmap } => {
            let unmap = if unmap { "-u " } else { "" };
            writeln!(script, "write -q -z {unmap}{at} {len}")
        }
        Op::Discard { at, len } => writeln!(script, "discard -q {at} {len}"),
        Op::Read { at, len } => {
            let range = at as usize..(at + len) as usize;
            let first = model.bytes[range.start];
            let even = model.bytes[range.clone()].iter().all(|b| *b == first);
            let settled = !model.maybe[range].iter().any(|open| *open);
            match even && settled {
                true => writeln!(script, "read -q -P {first} {at} {len}"),
                false => writeln!(script, "read -q {at} {len}"),
            }
        }
        Op::Flush => writeln!(script, "flush"),
    };
    model.apply(op);
}

/// Whether `image` reads as `model` to QEMU.
pub fn qemu_reads(dir: &Path, format: &str, image: &str, model: &mut Model) {
    let image_args = qemu_args(format, image);
    let mut args = vec!["convert", "-O", "raw"];
    args.extend(image_args.iter().map(String::as_str));
    args.push("as-qemu.raw");
    qemu_img(dir, &args);
    let read = fs::read(dir.join("as-qemu.raw")).unwrap();
    assert_eq!(read.len(), model.bytes.len(), "{image}: size");
    model
        .check(0, &read)
        .unwrap_or_else(|e| panic!("{image} read by QEMU: {e}"));
}

/// Carries `op` out on `driver` and on `model`; what is read must be what the model says.
pub fn apply(driver: &mut Driver, op: Op, model: &mut Model) {
    match op {
        Op::Write { at, len, pattern } => driver.write(at, &vec![pattern; len as usize]),
        Op::Zero { at, len, unmap } => driver.write_zeroes(at, len, unmap),
        Op::Discard { at, len } => driver.discard(at, len),
        Op::Read { at, len } => {
            let mut buf = vec![0xa5; len as usize];
            driver.read(at, &mut buf).unwrap();
            return model
                .check(at, &buf)
                .unwrap_or_else(|e| panic!("{op:?}: {e}"));
        }
        Op::Flush => driver.flush(),
    }
    .unwrap_or_else(|e| panic!("{op:?}: {e}"));
    model.apply(op);
}

/// [`PASSPHRASE`], for us.
pub fn passphrase() -> Arc<Passphrase> {
    Arc::new(Passphrase::new(PASSPHRASE.as_bytes().to_vec().into()).unwrap())
}

/// A new image of zeros, to be changed by us and by QEMU in turns.
#[derive(Debug)]
pub struct Turns<'a> {
    /// Where it is.
    pub dir: &'a Path,
    /// Its file's name there.
    pub image: &'a str,
    /// Its format.
    pub format: Format,
    /// Bytes of its disk.
    pub size: u64,
    /// Bytes that it allocates at once.
    pub unit: u64,
    /// Of what is done to it.
    pub seed: u64,
}

impl Turns<'_> {
    fn open(&self, read_only: bool) -> Driver {
        let options = ChainOptions {
            format: Some(self.format),
            read_only,
            // Nothing crashes here: syncs only cost time.
            cache: io::Cache::Unsafe,
            // As little metadata in memory as there may be.
            cache_bytes: Some(0),
            passphrases: vec![passphrase()],
            ..ChainOptions::default()
        };
        let chain =
            open_chain(&self.dir.join(self.image), &options).unwrap_or_else(|e| panic!("{e}"));
        chain.driver().unwrap()
    }

    /// Two turns each; both must read what a model says after each.
    pub fn take(&self) {
        let (size, unit) = (self.size, self.unit);
        let format = self.format.qemu_name();
        let mut model = Model::new(size);
        let mut random = Random::new(self.seed);
        for turn in 0..2 {
            let mut driver = self.open(false);
            assert_eq!(driver.size(), size);
            if turn == 0 && driver.is_encrypted() {
                // What was never written reads as random bytes.
                driver.write_zeroes(0, size, false).unwrap();
            }
            our_turn(&mut driver, &mut model, &mut random, 30, unit);
            driver.close().unwrap();
            qemu_reads(self.dir, format, self.image, &mut model);
            their_turn(
                (self.dir, format, self.image),
                &mut model,
                &mut random,
                20,
                unit,
            );
        }
        let mut all = vec![0; size as usize];
        self.open(true).read(0, &mut all).unwrap();
        model.check(0, &all).unwrap();
    }
}

/// So many operations, and a write that is no whole sectors; then all must read as the model says.
pub fn our_turn(
    driver: &mut Driver,
    model: &mut Model,
    random: &mut Random,
    ops: usize,
    unit: u64,
) {
    let size = driver.size();
    for _ in 0..ops {
        apply(driver, random_op(random, size, unit, 512), model);
    }
    let odd = Op::Write {
        at: random.below(size - 2000),
        len: 1 + random.below(1999),
        pattern: 7,
    };
    apply(driver, odd, model);
    let mut all = vec![0; size as usize];
    driver.read(0, &mut all).unwrap();
    model.check(0, &all).unwrap();
}

/// So many operations by qemu-io, on an image in a directory: its format and name.
pub fn their_turn(
    (dir, format, image): (&Path, &str, &str),
    model: &mut Model,
    random: &mut Random,
    ops: usize,
    unit: u64,
) {
    let size = model.bytes.len() as u64;
    let mut script = String::new();
    for _ in 0..ops {
        as_qemu_io(random_op(random, size, unit, 512), model, &mut script);
    }
    qemu_io(dir, format, image, &script);
}
