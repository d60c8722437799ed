//! An image, what it must be, and the tools on both sides.

use crate::choice::{Base, Choice, Cipher, Data};
use crate::model::{Bitmap, Content};
use crate::peer::{Model, Random, patiently};
use disk::{ChainOptions, blocking::Driver};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use testkit::TempDir;

/// Objects with the passphrases of the image, of its base, and of key slots that come and go.
pub const SECRETS: [&str; 3] = ["top", "below", "other"];

/// An internal snapshot.
pub struct Snapshot {
    pub name: String,
    pub content: Content,
}

/// An image and what it must be.
pub struct World {
    pub dir: TempDir,
    pub seed: u64,
    pub random: Random,
    pub choice: Choice,
    pub content: Content,
    pub snapshots: Vec<Snapshot>,
    pub bitmaps: Vec<Bitmap>,
    /// Which secrets open the image, by their numbers; the first is used.
    pub keys: Vec<usize>,
    /// The name of the external data file.
    pub data: String,
    /// Whether there may be compressed clusters.
    pub compressed: bool,
    /// Bytes that may read as anything, from now on as they do.
    pub loose: std::ops::Range<u64>,
    /// For names that are new.
    pub count: u32,
    /// How many steps there are to be.
    pub steps: u64,
    /// What was done until now, told when the test fails.
    pub log: Vec<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{:?}\n{}", self.choice, self.log.join("\n"));
            eprintln!(
                "again: DISKPLANE_EXCHANGE_SEED={} DISKPLANE_EXCHANGE_ROUNDS=1 DISKPLANE_EXCHANGE_STEPS={} \
                 cargo test -p diskplane --test exchange",
                self.seed, self.steps
            );
        }
    }
}

fn binary() -> PathBuf {
    testkit::diskplane(env!("CARGO_BIN_EXE_diskplane"))
}

impl World {
    /// Makes the image of `seed`, and its base.
    pub fn new(seed: u64, steps: u64) -> Self {
        let mut random = Random::new(seed.wrapping_mul(0x9e37_79b9_97f4_a7c1));
        let choice = Choice::any(&mut random, seed);
        let cluster = choice.cluster();
        let whole = ((cluster * 16).clamp(192 << 10, 4 << 20) + 512 * random.below(300)) & !511;
        let content = match choice.huge {
            true => {
                // The first L2 table ends there.
                let entry = if choice.extended { 16 } else { 8 };
                let table = cluster * (cluster / entry);
                let size = (1 << 40) + 512 * random.below(99);
                let places = [
                    (0, 128 << 10),
                    (table - (64 << 10), 128 << 10),
                    (size - (100 << 10), 100 << 10),
                ];
                Content::sparse(size, &places)
            }
            false => Content::whole(Model::new(whole)),
        };
        let mut world = Self {
            dir: TempDir::new(),
            seed,
            random,
            choice,
            content,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            keys: vec![0],
            data: "data".to_owned(),
            compressed: false,
            loose: 0..0,
            count: 0,
            steps,
            log: Vec::new(),
        };
        for secret in SECRETS {
            std::fs::write(world.dir.path(secret), format!("{secret}, sesame")).unwrap();
        }
        world.make_base();
        // QEMU measures for seconds what a key slot is to cost.
        let odds = if matches!(choice.cipher, Cipher::Luks(_)) {
            8
        } else {
            2
        };
        let by_us = choice.writable() && world.random.below(odds) != 1;
        world.create("disk", &choice, by_us);
        world
    }

    fn make_base(&mut self) {
        let size = match self.choice.huge {
            true => 192 << 10,
            false => self.content.size,
        };
        let shorter = (size * 2 / 3) & !511;
        let (bytes, encrypted) = match self.choice.base {
            Base::None => return,
            Base::RawShorter | Base::Shorter | Base::Deep => (shorter, false),
            Base::RawLonger | Base::Longer => (size + 300 * 1024, false),
            Base::Compressed => (size, false),
            Base::Encrypted => (shorter, true),
        };
        let length = bytes.to_string();
        let format = self.base_format().to_owned();
        let options = match encrypted {
            true => "encrypt.format=luks,encrypt.key-secret=below,encrypt.iter-time=1",
            false if format == "raw" => "preallocation=off",
            false => "cluster_size=4096",
        };
        let mut model = Model::new(bytes);
        if self.choice.base == Base::Deep {
            std::fs::write(self.dir.path("bottom"), vec![0x5a; shorter as usize / 2]).unwrap();
            model = Model::over(&Model::of(vec![0x5a; shorter as usize / 2]), bytes);
            let args = ["-f", "qcow2", "-b", "bottom", "-F", "raw", "base", &length];
            self.qemu_img(&[&["create", "-q"], &args[..]].concat());
        } else {
            let args = ["-f", &format, "-o", options, "base", &length];
            match encrypted {
                // QEMU would measure for seconds what its key slots are to cost.
                true => self.diskplane(&[&["create"], &self.objects()[..], &args].concat()),
                false => self.qemu_img(&[&["create", "-q"], &args[..]].concat()),
            };
        }
        let mut below = Content::whole(model);
        let mut script = String::new();
        for _ in 0..10 {
            let (index, op) = below.op(&mut self.random, 4096, 512);
            // What a discard left open would be open in the image on top.
            if !matches!(op, crate::peer::Op::Discard { .. }) {
                below.apply(index, op);
                script.push_str(&crate::model::line(op));
            }
        }
        let opts = self.base_opts("");
        self.qemu_io_on(&opts, &script);
        if self.choice.base == Base::Compressed {
            let kind = ["compression_type=zlib", "compression_type=zstd"][self.seed as usize % 2];
            self.qemu_img(&[
                "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", kind, "base", "b",
            ]);
            std::fs::rename(self.dir.path("b"), self.dir.path("base")).unwrap();
        }
        let bytes = &below.places[0].1;
        for (at, model) in &mut self.content.places {
            let at = (*at).min(bytes.bytes.len() as u64) as usize;
            let rest = Model::of(bytes.bytes[at..].to_vec());
            *model = Model::over(&rest, model.bytes.len() as u64);
        }
    }

    pub fn base_format(&self) -> &'static str {
        match self.choice.base {
            Base::RawShorter | Base::RawLonger => "raw",
            _ => "qcow2",
        }
    }

    fn base_opts(&self, prefix: &str) -> String {
        let format = self.base_format();
        let mut opts = format!("{prefix}driver={format},{prefix}file.filename=base");
        if self.choice.base == Base::Encrypted {
            opts.push_str(&format!(",{prefix}encrypt.key-secret=below"));
        }
        opts
    }

    /// Makes an image without its base's passphrase, as both can.
    pub fn create(&mut self, name: &str, choice: &Choice, by_us: bool) {
        let mut options = choice.options(&self.data);
        let encryption = choice.encryption(SECRETS[0]);
        if !encryption.is_empty() {
            options = format!("{options},{encryption}");
        }
        let size = self.content.size.to_string();
        let backing: &[&str] = match choice.base {
            Base::None => &[],
            _ => &["-b", "base", "-F", self.base_format()],
        };
        let tail = [name, &size];
        let args = [&["-f", "qcow2", "-o", &options], backing, &tail].concat();
        if by_us {
            self.diskplane(&[&["create"], &self.objects()[..], &args].concat());
        } else {
            self.qemu_img(&[&["create", "-q", "-u"], &self.objects()[..], &args].concat());
        }
    }

    /// All secrets.
    pub fn objects(&self) -> Vec<&'static str> {
        vec![
            "--object",
            "secret,id=top,file=top",
            "--object",
            "secret,id=below,file=below",
            "--object",
            "secret,id=other,file=other",
        ]
    }

    /// How QEMU is told of the image; each option with `prefix` before it.
    pub fn opts(&self, prefix: &str) -> String {
        let mut opts = format!("{prefix}driver=qcow2,{prefix}file.filename=disk");
        if self.choice.cipher != Cipher::None {
            let secret = SECRETS[self.keys[0]];
            opts.push_str(&format!(",{prefix}encrypt.key-secret={secret}"));
        }
        if self.choice.base == Base::Encrypted {
            opts.push(',');
            opts.push_str(&self.base_opts(&format!("{prefix}backing.")));
        }
        opts
    }

    /// The passphrases of the chain, for diskplane.
    pub fn key_args(&self) -> Vec<&'static str> {
        let mut args = Vec::new();
        if self.choice.cipher != Cipher::None {
            args.extend(["--key-file", SECRETS[self.keys[0]]]);
        }
        if self.choice.base == Base::Encrypted {
            args.extend(["--key-file", SECRETS[1]]);
        }
        args
    }

    fn run(&self, program: &Path, args: &[&str]) -> Result<String, String> {
        let locked = |failure: &String| {
            failure.contains("Is another process using") || failure.contains("is in use")
        };
        patiently(locked, || {
            // What hangs is ended.
            let mut command = Command::new("timeout");
            command.args(["-s", "KILL", "60"]).arg(program).args(args);
            let output = command.current_dir(self.dir.root()).output();
            let output = output.unwrap_or_else(|e| panic!("{}: {e}", program.display()));
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            match output.status.success() {
                true => Ok(text),
                false => {
                    let errors = String::from_utf8_lossy(&output.stderr);
                    Err(format!(
                        "{} {}: {}\n{text}{errors}",
                        program.display(),
                        args.join(" "),
                        output.status
                    ))
                }
            }
        })
    }

    pub fn try_diskplane(&mut self, args: &[&str]) -> Result<String, String> {
        self.log.push(format!("diskplane {}", args.join(" ")));
        self.run(&binary(), args)
    }

    pub fn diskplane(&mut self, args: &[&str]) -> String {
        let done = self.try_diskplane(args);
        done.unwrap_or_else(|e| panic!("{e}"))
    }

    pub fn try_qemu_img(&mut self, args: &[&str]) -> Result<String, String> {
        self.log.push(format!("qemu-img {}", args.join(" ")));
        self.run(Path::new("qemu-img"), args)
    }

    pub fn qemu_img(&mut self, args: &[&str]) -> String {
        let done = self.try_qemu_img(args);
        done.unwrap_or_else(|e| panic!("{e}"))
    }

    /// `qemu-img COMMAND [OPTIONS] IMAGE [REST]`.
    pub fn on_disk(&mut self, command: &str, options: &[&str], rest: &[&str]) -> String {
        let done = self.try_on_disk(command, options, rest);
        done.unwrap_or_else(|e| panic!("{e}"))
    }

    pub fn try_on_disk(
        &mut self,
        command: &str,
        options: &[&str],
        rest: &[&str],
    ) -> Result<String, String> {
        let opts = self.opts("");
        let objects = self.objects();
        let image = ["--image-opts", &opts];
        self.try_qemu_img(&[&[command], &objects[..], options, &image, rest].concat())
    }

    /// A script of lines for `qemu-io`, one process for all of them.
    pub fn qemu_io_on(&mut self, opts: &str, script: &str) {
        self.log.push(format!("qemu-io {opts}\n{script}"));
        if let Err(failure) = self.try_qemu_io(opts, script) {
            panic!("{failure}");
        }
    }

    pub fn try_qemu_io(&self, opts: &str, script: &str) -> Result<(), String> {
        let mut args = self.objects();
        // Unmapping must be asked for, or discards are ignored. Nothing crashes here: syncs only cost time.
        args.extend(["-d", "unmap", "-t", "unsafe", "--image-opts", opts]);
        for line in script.lines() {
            args.extend(["-c", line]);
        }
        let text = self.run(Path::new("qemu-io"), &args)?;
        let bad = ["failed", "rror", "verification", "Invalid", "not found"];
        match bad.iter().any(|word| text.contains(word)) {
            true => Err(text),
            false => Ok(()),
        }
    }

    /// The image, driven by diskplane's library.
    pub fn driver(&self, read_only: bool, snapshot: Option<&str>) -> Driver {
        let words = |secret: &str| {
            let bytes = std::fs::read(self.dir.path(secret)).unwrap();
            Arc::new(crypto::Passphrase::new(bytes.into()).unwrap())
        };
        let keys = self.key_args();
        let options = ChainOptions {
            format: Some(image::Format::Qcow2),
            read_only,
            snapshot: snapshot.map(str::to_owned),
            cache: io::Cache::Unsafe,
            // Small: blocks must come and go.
            cache_bytes: Some(64 << 10),
            passphrases: keys.chunks(2).map(|pair| words(pair[1])).collect(),
            data_file: (self.choice.data != Data::Inside).then(|| self.dir.path(&self.data)),
            ..ChainOptions::default()
        };
        let chain = crate::peer::open_chain(&self.dir.path("disk"), &options);
        chain.unwrap_or_else(|e| panic!("{e}")).driver().unwrap()
    }
}
