//! What is done to the image, by the one or the other.

use crate::choice::{Base, Choice, Cipher, Data};
use crate::model::{Bitmap, line};
use crate::peer::Op;
use crate::world::{SECRETS, Snapshot, World};
use testkit::{Serve, qemu};

/// Operations in a row.
const OPS: u64 = 12;

impl World {
    /// One random step. Returns whether anything was done.
    pub fn step(&mut self) -> bool {
        let by_us = self.choice.writable() && self.random.below(2) == 0;
        match self.random.below(22) {
            0..5 => self.operations(by_us),
            5..7 => self.served(),
            7..11 => self.snapshot(by_us),
            11..14 => self.bitmap(by_us),
            14..16 => self.resize(by_us),
            16..18 => self.amend(by_us),
            18 => self.keys(by_us),
            19 => self.rebase(),
            20 => self.convert(by_us),
            _ => self.compressed_write(),
        }
    }

    /// Notes an operation in the model and the bitmaps.
    fn apply(&mut self, place: usize, op: Op) {
        self.content.apply(place, op);
        for bitmap in &mut self.bitmaps {
            bitmap.note(op);
        }
    }

    fn script(&mut self) -> String {
        let mut script = String::new();
        for _ in 0..OPS {
            let (place, op) = self
                .content
                .op(&mut self.random, self.choice.cluster(), 512);
            self.apply(place, op);
            script.push_str(&line(op));
        }
        script
    }

    fn operations(&mut self, by_us: bool) -> bool {
        if !by_us {
            let (opts, script) = (self.opts(""), self.script());
            self.qemu_io_on(&opts, &script);
            return true;
        }
        let mut driver = self.driver(false, None);
        for _ in 0..OPS {
            let align = if self.random.below(4) == 0 { 1 } else { 512 };
            let (place, op) = self
                .content
                .op(&mut self.random, self.choice.cluster(), align);
            self.log.push(format!("ours: {op:?}"));
            let done = match op {
                Op::Write { at, len, pattern } => driver.write(at, &vec![pattern; len as usize]),
                Op::Zero { at, len, unmap } => driver.write_zeroes(at, len, unmap),
                Op::Discard { at, len } => driver.discard(at, len),
                Op::Read { at, len } => driver.read(at, &mut vec![0; len as usize]),
                Op::Flush => driver.flush(),
            };
            done.unwrap_or_else(|e| panic!("{op:?}: {e}"));
            self.apply(place, op);
        }
        driver.close().unwrap_or_else(|e| panic!("close: {e}"));
        true
    }

    /// By QEMU as our client.
    fn served(&mut self) -> bool {
        if !self.choice.writable() {
            return false;
        }
        let socket = self.dir.path("sock");
        let program = testkit::diskplane(env!("CARGO_BIN_EXE_diskplane"));
        let mut serve = Serve::new(program, self.dir.path("disk")).nbd_unix(&socket);
        if self.choice.data != Data::Inside {
            serve = serve.arg("--data-file").arg(self.dir.path(&self.data));
        }
        for arg in self.key_args() {
            let path = self.dir.path(arg);
            serve = match SECRETS.contains(&arg) {
                true => serve.arg(path),
                false => serve.arg(arg),
            };
        }
        let engines = [
            ("io_uring", "writeback"),
            ("threads", "writethrough"),
            ("native", "none"),
            ("io_uring", "none"),
        ];
        let (engine, cache) = engines[self.random.below(4) as usize];
        let text = format!("diskplane serve --aio {engine} --cache {cache}");
        self.log.push(text);
        let server = serve.aio(engine).cache(cache).start();
        let script = self.script();
        let uri = qemu::nbd_unix_uri(&socket);
        let opts = format!(
            "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={}",
            socket.display()
        );
        self.log.push(format!("{uri}\n{script}"));
        let done = self.try_qemu_io(&opts, &script);
        done.unwrap_or_else(|e| panic!("{e}"));
        server.stop();
        true
    }

    fn snapshot(&mut self, by_us: bool) -> bool {
        let most = ((1u64 << self.choice.refcount_bits.min(8)) - 1).min(4) - 1;
        if self.choice.data != Data::Inside {
            return self.refused_snapshot();
        }
        let name = |world: &Self, index: usize| world.snapshots[index].name.clone();
        let count = self.snapshots.len() as u64;
        let which = self.random.below(count) as usize;
        match self.random.below(5) {
            0..2 if count < most => {
                self.count += 1;
                let name = format!("snap{}", self.count);
                self.run_snapshot(by_us, "-c", &name);
                let content = self.content.clone();
                self.snapshots.push(Snapshot { name, content });
            }
            // QEMU refuses it while there are bitmaps.
            2..4 if count > 0 && self.bitmaps.is_empty() => {
                let name = name(self, which);
                self.run_snapshot(by_us, "-a", &name);
                self.content = self.snapshots[which].content.clone();
            }
            4 if count > 0 => {
                let name = name(self, which);
                self.run_snapshot(by_us, "-d", &name);
                self.snapshots.remove(which);
            }
            _ => return false,
        }
        true
    }

    fn run_snapshot(&mut self, by_us: bool, option: &str, name: &str) {
        match by_us {
            true => self.diskplane(&["snapshot", option, name, "disk"]),
            false => self.on_disk("snapshot", &[option, name], &[]),
        };
    }

    /// Neither makes snapshots of data outside.
    fn refused_snapshot(&mut self) -> bool {
        let theirs = self.try_on_disk("snapshot", &["-c", "s"], &[]);
        assert!(theirs.is_err_and(|e| e.contains("not supported")));
        let ours = self.try_diskplane(&["snapshot", "-c", "s", "disk"]);
        assert!(ours.is_err_and(|e| e.contains("external file")));
        false
    }

    fn bitmap(&mut self, by_us: bool) -> bool {
        if self.choice.version == 2 {
            return false;
        }
        let count = self.bitmaps.len() as u64;
        let which = self.random.below(count) as usize;
        let options: Vec<&str>;
        let (granularity, mut source) = (
            match self.content.is_whole() {
                true => 512 << self.random.below(9),
                false => 65536 << self.random.below(6),
            },
            String::new(),
        );
        let text = granularity.to_string();
        let action = self.random.below(7);
        let mut name = self.bitmaps.get(which).map(|b| b.name.clone());
        match (action, name.is_some()) {
            (0..2, _) if count < 3 => {
                self.count += 1;
                name = Some(format!("bits{}", self.count));
                options = vec!["--add", "-g", &text];
                self.bitmaps.push(Bitmap {
                    name: name.clone().unwrap(),
                    granularity,
                    enabled: true,
                    must: Vec::new(),
                    may: Vec::new(),
                });
            }
            (2, true) => {
                options = vec!["--remove"];
                self.bitmaps.remove(which);
            }
            (3, true) => {
                options = vec!["--clear"];
                (self.bitmaps[which].must, self.bitmaps[which].may) = Default::default();
            }
            (4, true) => {
                options = vec!["--disable"];
                self.bitmaps[which].enabled = false;
            }
            (5, true) => {
                options = vec!["--enable"];
                self.bitmaps[which].enabled = true;
            }
            (6, true) if count > 1 => {
                let from = self.bitmaps[(which + 1) % count as usize].clone();
                source = from.name;
                // Each of its bits becomes all the bits that it touches.
                let widened = |ranges: &[(u64, u64)]| -> Vec<_> {
                    let grain = from.granularity;
                    let wide = |(a, b): &(u64, u64)| (a / grain * grain, b.next_multiple_of(grain));
                    ranges.iter().map(wide).collect()
                };
                let (must, may) = (widened(&from.must), widened(&from.may));
                self.bitmaps[which].must.extend(must);
                self.bitmaps[which].may.extend(may);
                options = vec!["--merge"];
            }
            _ => return false,
        }
        let mut options = options;
        if !source.is_empty() {
            options.push(&source);
        }
        let name = name.unwrap();
        match by_us {
            true => self.diskplane(&[&["bitmap"], &options[..], &["disk", &name]].concat()),
            false => {
                // Of the image alone.
                let base = std::mem::replace(&mut self.choice.base, Base::None);
                self.on_disk("bitmap", &options, &[&name]);
                self.choice.base = base;
                String::new()
            }
        };
        true
    }

    fn resize(&mut self, by_us: bool) -> bool {
        let size = self.content.size;
        let most = if self.content.is_whole() {
            6 << 20
        } else {
            size + (4 << 20)
        };
        let by = 512 * (1 + self.random.below(2000));
        let shrink = self.random.below(2) == 0;
        if !self.snapshots.is_empty() && (shrink || self.choice.version == 2) {
            return false;
        }
        let new = if shrink {
            size.saturating_sub(by)
        } else {
            size + by
        };
        if new < 64 << 10 || new > most {
            return false;
        }
        let modes = ["off", "off", "metadata", "falloc", "full"];
        let mut mode = modes[self.random.below(5) as usize];
        // What QEMU preallocates in an encrypted image reads as noise.
        if shrink
            || (!by_us && self.choice.cipher != Cipher::None)
            || self.choice.version == 2 && self.choice.cipher != Cipher::None
        {
            mode = "off";
        }
        // QEMU preallocates over the end of a compressed cluster, whose data are lost.
        if !by_us && self.compressed {
            mode = "off";
        }
        let preallocation = format!("--preallocation={mode}");
        let mut options: Vec<&str> = if shrink { vec!["--shrink"] } else { Vec::new() };
        if mode != "off" {
            options.push(&preallocation);
        }
        let text = new.to_string();
        if by_us {
            let keys = self.key_args();
            self.diskplane(&[&["resize"], &keys[..], &options, &["disk", &text]].concat());
        } else {
            options.push("-q");
            self.on_disk("resize", &options, &[&text]);
        }
        if !by_us && new > size {
            // After it was shrunk, QEMU lets what is left in the last cluster come back.
            self.loose = size..size.next_multiple_of(self.choice.cluster()).min(new);
        }
        self.content.resize(new);
        for bitmap in &mut self.bitmaps {
            bitmap.resize(size, new);
        }
        true
    }

    fn amend(&mut self, by_us: bool) -> bool {
        let mut next = self.choice;
        let option = match self.random.below(4) {
            0 if self.choice.version == 2 => {
                next.version = 3;
                "compat=1.1".to_owned()
            }
            0 if self.may_downgrade() => {
                (next.version, next.lazy) = (2, false);
                "compat=0.10".to_owned()
            }
            1 if self.choice.version == 3 => {
                next.lazy = !next.lazy;
                format!("lazy_refcounts={}", if next.lazy { "on" } else { "off" })
            }
            2..4 if self.choice.version == 3 => {
                let snapshots = self.snapshots.len() as u64;
                next.refcount_bits = 1 << self.random.below(7);
                if next.refcount_bits < 8 && snapshots + 2 > (1 << next.refcount_bits) - 1 {
                    return false;
                }
                // Compressed clusters share a cluster of the file.
                if next.refcount_bits < 16 && (!self.snapshots.is_empty() || self.compressed) {
                    return false;
                }
                format!("refcount_bits={}", next.refcount_bits)
            }
            _ => return false,
        };
        // Zero clusters become data: QEMU writes zeros, where they would have to be encrypted.
        let by_us = by_us || next.version == 2 && self.choice.cipher != Cipher::None;
        // QEMU counts for minutes where a refcount block covers very much or very little.
        let bits = u64::from(next.refcount_bits.min(self.choice.refcount_bits));
        let slow = self.choice.cluster_bits < 12 || self.choice.cluster() * 8 / bits > 1 << 16;
        let by_us = by_us || slow && next.refcount_bits != self.choice.refcount_bits;
        if by_us && !self.choice.writable() {
            return false;
        }
        match by_us {
            true => {
                let keys = self.key_args();
                self.diskplane(&[&["amend", "-o", &option], &keys[..], &["disk"]].concat())
            }
            false => self.on_disk("amend", &["-q", "-o", &option], &[]),
        };
        self.choice = next;
        true
    }

    fn may_downgrade(&self) -> bool {
        let choice = self.choice;
        choice.version == 3
            && choice.refcount_bits == 16
            && !choice.extended
            && !choice.zstd
            && choice.data == Data::Inside
            && self.bitmaps.is_empty()
            && self
                .snapshots
                .iter()
                .all(|s| s.content.size == self.content.size)
    }

    /// A key slot more, or one less.
    fn keys(&mut self, by_us: bool) -> bool {
        if !matches!(self.choice.cipher, Cipher::Luks(_)) {
            return false;
        }
        let mut keys = self.keys.clone();
        let options = match keys.len() {
            1 => {
                let new = if keys[0] == 0 { 2 } else { 0 };
                keys.push(new);
                format!(
                    "encrypt.state=active,encrypt.new-secret={},encrypt.iter-time=1",
                    SECRETS[new]
                )
            }
            _ => {
                let old = keys.remove(self.random.below(2) as usize);
                format!("encrypt.state=inactive,encrypt.old-secret={}", SECRETS[old])
            }
        };
        if by_us {
            let objects = self.objects();
            let secret = SECRETS[self.keys[0]];
            let args = ["-o", &options, "--key-secret", secret, "disk"];
            self.diskplane(&[&["amend"], &objects[..], &args].concat());
        } else {
            self.on_disk("amend", &["-q", "-o", &options], &[]);
        }
        self.keys = keys;
        true
    }

    /// The same base again; or none, its content in the image itself.
    fn rebase(&mut self) -> bool {
        if self.choice.base == Base::None {
            return false;
        }
        let format = self.base_format();
        if self.random.below(3) > 0
            || self.choice.base == Base::Encrypted
            || !self.snapshots.is_empty()
        {
            // Of the image alone.
            let base = std::mem::replace(&mut self.choice.base, Base::None);
            self.on_disk("rebase", &["-u", "-b", "base", "-F", format], &[]);
            self.choice.base = base;
            return true;
        }
        self.on_disk("rebase", &["-b", ""], &[]);
        self.choice.base = Base::None;
        let size = self.content.size;
        for bitmap in &mut self.bitmaps {
            if bitmap.enabled {
                bitmap.may.push((0, size));
            }
        }
        true
    }

    /// Into a new image of any kind, which takes its place.
    fn convert(&mut self, by_us: bool) -> bool {
        let choice = Choice::copy(&mut self.random, self.choice.huge);
        let compress = choice.data == Data::Inside
            && choice.cipher == Cipher::None
            && choice.preallocation == "off"
            && self.random.below(2) == 0;
        self.count += 1;
        let old = std::mem::replace(&mut self.data, format!("data{}", self.count));
        let encryption = choice.encryption(SECRETS[0]);
        let mut options = choice.options(&self.data);
        if !encryption.is_empty() {
            options = format!("{options},{encryption}");
        }
        let mut args = self.objects();
        args.extend(["-O", "qcow2", "-o", &options]);
        if compress {
            args.push("-c");
        }
        if by_us {
            let keys = self.key_args();
            self.diskplane(&[&["convert"], &args[..], &keys, &["disk", "copy"]].concat());
        } else {
            let opts = self.opts("");
            let image = ["--image-opts", &opts, "copy"];
            self.qemu_img(&[&["convert"], &args[..], &image].concat());
        }
        std::fs::rename(self.dir.path("copy"), self.dir.path("disk")).unwrap();
        let _ = std::fs::remove_file(self.dir.path(old));
        self.choice = choice;
        (self.snapshots, self.bitmaps) = Default::default();
        (self.keys, self.compressed) = (vec![0], compress);
        true
    }

    /// Clusters that QEMU compresses one by one. It refuses those that are there already.
    fn compressed_write(&mut self) -> bool {
        if self.choice.data != Data::Inside
            || self.choice.cipher != Cipher::None
            || self.choice.refcount_bits < 16
        {
            return false;
        }
        let cluster = self.choice.cluster();
        let mut wrote = false;
        for _ in 0..3 {
            let place = self.random.below(self.content.places.len() as u64) as usize;
            let (base, model) = &self.content.places[place];
            let clusters = model.bytes.len() as u64 / cluster;
            let at = base.next_multiple_of(cluster) + self.random.below(clusters) * cluster;
            if at + cluster > base + model.bytes.len() as u64 {
                continue;
            }
            let pattern = 1 + self.random.below(255) as u8;
            let script = format!("write -q -c -P {pattern} {at} {cluster}\n");
            let opts = self.opts("");
            let done = self.try_qemu_io(&opts, &script);
            self.log.push(format!("{script}{done:?}"));
            let op = Op::Write {
                at,
                len: cluster,
                pattern,
            };
            match done {
                Ok(()) => {
                    self.apply(place, op);
                    (wrote, self.compressed) = (true, true);
                }
                // It may be noted all the same.
                Err(_) => {
                    let range = (at, at + cluster);
                    self.bitmaps.iter_mut().for_each(|b| b.may.push(range));
                }
            }
        }
        wrote
    }
}
