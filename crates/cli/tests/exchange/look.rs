//! What both sides say of the image must agree, and be what it must be.

use crate::choice::{Cipher, Data};
use crate::model::Content;
use crate::world::World;
use image::qcow2::bitmap;
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

impl World {
    /// Everything that can be told of the image.
    pub fn look(&mut self) {
        self.on_disk("check", &["-q"], &[]);
        self.diskplane(&["check", "disk"]);
        self.contents();
        self.snapshot_contents();
        self.infos();
        self.maps();
        self.bitmap_contents();
    }

    /// QEMU's reading settles what a discard left open; then diskplane must read the same.
    fn contents(&mut self) {
        let mut content = self.content.clone();
        for (at, model) in &mut content.places {
            let base = *at;
            let read = self.read_by_qemu(*at, model.bytes.len() as u64, None);
            for at in self.loose.clone().filter(|byte| *byte >= *at) {
                let index = (at - base) as usize;
                if let (Some(to), Some(from)) = (model.bytes.get_mut(index), read.get(index)) {
                    *to = *from;
                }
            }
            model
                .check(0, &read)
                .unwrap_or_else(|e| panic!("read by QEMU at {at:#x}: {e}"));
        }
        if self.choice.data == Data::Raw {
            let raw = std::fs::read(self.dir.path(&self.data)).unwrap();
            let model = &mut content.places[0].1;
            assert!(raw.len() >= model.bytes.len(), "{}", raw.len());
            let raw = &raw[..model.bytes.len()];
            let same = model.check(0, raw);
            same.unwrap_or_else(|e| panic!("the raw data file: {e}"));
        }
        self.read_by_us(&mut content, None);
        self.content = content;
        self.loose = 0..0;
    }

    fn read_by_us(&self, content: &mut Content, snapshot: Option<&str>) {
        let mut driver = self.driver(true, snapshot);
        assert_eq!(driver.size(), content.size, "size, snapshot {snapshot:?}");
        for (at, model) in &mut content.places {
            let mut read = vec![0xa5; model.bytes.len()];
            driver.read(*at, &mut read).unwrap();
            let same = model.check(0, &read);
            same.unwrap_or_else(|e| panic!("read by us at {at:#x}, snapshot {snapshot:?}: {e}"));
        }
        driver.close().unwrap();
    }

    fn read_by_qemu(&mut self, at: u64, len: u64, snapshot: Option<&str>) -> Vec<u8> {
        let opts = match snapshot.is_some() || self.content.is_whole() {
            true => self.opts(""),
            false => format!("driver=raw,offset={at},size={len},{}", self.opts("file.")),
        };
        let snapshot = snapshot.map(|name| format!("snapshot.name={name}"));
        let mut args = vec!["convert"];
        args.extend(self.objects());
        if let Some(snapshot) = &snapshot {
            args.extend(["-l", snapshot]);
        }
        args.extend(["-O", "raw", "--image-opts", &opts, "flat"]);
        self.qemu_img(&args);
        self.log.pop();
        let read = std::fs::read(self.dir.path("flat")).unwrap();
        std::fs::remove_file(self.dir.path("flat")).unwrap();
        read
    }

    fn snapshot_contents(&mut self) {
        let mut snapshots = std::mem::take(&mut self.snapshots);
        // One by QEMU, all by us.
        let one = self.random.below(snapshots.len() as u64) as usize;
        for (index, snapshot) in snapshots.iter_mut().enumerate() {
            let content = &mut snapshot.content;
            if index == one && content.is_whole() && self.content.is_whole() {
                let read = self.read_by_qemu(0, content.size, Some(&snapshot.name));
                // It makes the copy as long as the disk is now.
                let len = read.len().min(content.places[0].1.bytes.len());
                let same = content.places[0].1.check(0, &read[..len]);
                same.unwrap_or_else(|e| panic!("snapshot {} by QEMU: {e}", snapshot.name));
            }
            self.read_by_us(content, Some(&snapshot.name));
        }
        self.snapshots = snapshots;
    }

    fn infos(&mut self) {
        let ours = json(&self.diskplane(&["info", "--json", "disk"]));
        let theirs = json(&self.qemu_img(&["info", "--output=json", "disk"]));
        self.log.truncate(self.log.len() - 2);
        let (own, specific) = (&ours["format-specific"], &theirs["format-specific"]["data"]);
        for field in [
            "virtual-size",
            "cluster-size",
            "format",
            "backing-filename",
            "backing-filename-format",
            "filename",
        ] {
            assert_eq!(ours[field], theirs[field], "{field}");
        }
        assert_eq!(ours["virtual-size"], self.content.size);
        assert_eq!(
            ours["encrypted"],
            theirs.get("encrypted").is_some_and(|e| e == true)
        );
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let compat = if own["version"] == "2" { "0.10" } else { "1.1" };
        assert_eq!(specific["compat"], compat);
        assert_eq!(
            specific["compat"],
            if self.choice.version == 2 {
                "0.10"
            } else {
                "1.1"
            }
        );
        for (field, fact) in [
            ("refcount-bits", "refcount bits"),
            ("lazy-refcounts", "lazy refcounts"),
            ("compression-type", "compression"),
            ("extended-l2", "extended l2"),
            ("data-file", "data file"),
            ("data-file-raw", "data file raw"),
        ] {
            // What version 2 cannot have is not told of it by the one or the other.
            if let (Some(a), Some(b)) = (own.get(fact), specific.get(field)) {
                assert_eq!(text(a), text(b), "{field}");
            }
        }
        assert_eq!(specific["refcount-bits"], self.choice.refcount_bits);
        if self.choice.cipher != Cipher::None {
            assert_eq!(ours["encrypt"], specific["encrypt"]);
        }
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let (ours, theirs) = (
            (&ours["snapshots"], &ours["bitmaps"]),
            (&theirs["snapshots"], &specific["bitmaps"]),
        );
        let names: Vec<_> = self.snapshots.iter().map(|s| s.name.clone()).collect();
        for snapshots in [list(ours.0), list(theirs.0)] {
            let found: Vec<_> = snapshots.iter().map(|s| text(&s["name"])).collect();
            assert_eq!(found, names, "snapshots");
        }
        for (a, b) in list(ours.0).iter().zip(list(theirs.0)) {
            for field in ["id", "vm-state-size", "date-sec", "date-nsec"] {
                assert_eq!(a[field], b[field], "snapshot's {field}");
            }
        }
        let sorted = |mut list: Vec<Value>| {
            list.sort_by_key(|b| text(&b["name"]));
            list
        };
        assert_eq!(sorted(list(ours.1)), sorted(list(theirs.1)), "bitmaps");
    }

    /// Which bytes of the disk are data, where, and which are known to be zeros.
    fn maps(&mut self) {
        let keys = self.key_args();
        let ours = json(&self.diskplane(&[&["map", "--json"], &keys[..], &["disk"]].concat()));
        let theirs = json(&self.on_disk("map", &["--output=json"], &[]));
        self.log.truncate(self.log.len() - 2);
        // QEMU does not always ask a data file for its holes.
        let outside = self.choice.data != Data::Inside;
        let (ours, theirs) = (runs(&ours, outside), runs(&theirs, outside));
        if ours != theirs {
            let pair = ours.iter().zip(&theirs).find(|(a, b)| a != b);
            panic!("map: {pair:#?}\nours: {ours:?}\ntheirs: {theirs:?}");
        }
    }

    fn bitmap_contents(&mut self) {
        if self.bitmaps.is_empty() {
            return;
        }
        let path = self.dir.path("disk");
        let options = io::OpenOptions {
            read_only: true,
            ..io::OpenOptions::default()
        };
        let file = crate::peer::patiently(
            |e: &block::Error| e.kind() == block::ErrorKind::Locked,
            || io::File::open(&path, &options),
        );
        let file = file.unwrap();
        for wanted in &self.bitmaps {
            let bits = bitmap::load(&*file, wanted.name.as_bytes()).unwrap();
            let mut at = 0;
            let dirty: Vec<_> = std::iter::from_fn(|| {
                let run = bits.next_dirty(at)?;
                at = run.1;
                Some(run)
            })
            .collect();
            let right = wanted.check(&dirty, self.content.size);
            right.unwrap_or_else(|e| panic!("{e}"));
        }
    }
}

/// A run of bytes that are alike: start, end, kind, and where they are.
type Run = (u64, u64, &'static str, u64, Option<u64>);

fn runs(map: &Value, outside: bool) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for entry in map.as_array().unwrap() {
        let number = |field: &str| entry[field].as_u64();
        let flag = |field: &str| entry[field] == true;
        let (start, len) = (number("start").unwrap(), number("length").unwrap());
        let kind = match (flag("compressed"), flag("data"), flag("present")) {
            (true, ..) => "compressed",
            (_, true, _) => "data",
            (_, _, true) => "zero",
            _ => "nothing",
        };
        // QEMU tells of preallocated clusters that they are holes of the file.
        let zero = matches!(kind, "zero" | "nothing");
        assert!(flag("zero") || !zero, "{entry}");
        let depth = number("depth").filter(|_| kind != "nothing").unwrap_or(0);
        let kind = match kind {
            "data" | "zero" if outside && depth == 0 => "there",
            kind => kind,
        };
        // Where nothing is stored, QEMU names places that it kept, or not.
        let offset = number("offset").filter(|_| kind == "data");
        match runs.last_mut() {
            Some(last)
                if last.2 == kind
                    && last.3 == depth
                    && last.4.map(|at| at + (last.1 - last.0)) == offset =>
            {
                last.1 = start + len;
            }
            _ => runs.push((start, start + len, kind, depth, offset)),
        }
    }
    runs
}
