//! Whether what a crash left is sound.

use crate::model::{Allowed, Model, SECTOR};
use crate::spec::{Spec, second_passphrase};
use crate::vmdk;
use crate::world::World;
use block::{ErrorKind, Storage};
use image::qcow2::{Header, bitmap, features, snapshot};
use image::{Format, qed, vdi};
use io::{SimDisk, SimOptions};
use std::process::Command;
use std::sync::Arc;
use testkit::TempDir;
use testkit::command::run;
use tool::check::{CheckOptions, Repair, Report, mend_dirty};

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Our check, and our reading.
    Quick,
    /// And `qemu-img check`.
    Peer,
    /// And qemu's reading, and going on to write.
    Close,
}

/// Judges crashed images.
pub struct Judge {
    dir: TempDir,
}

impl Default for Judge {
    fn default() -> Self {
        Self {
            dir: TempDir::new(),
        }
    }
}

/// A check of a format, which says what is wrong.
type Sound = fn(&World) -> Result<(), String>;

impl Judge {
    /// What is wrong with a crashed image, if the guest may find what `allowed` says.
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn judge(
        &self,
        world: &World,
        model: &Model,
        allowed: &Allowed,
        look: Look,
    ) -> Result<(), String> {
        let format = world.spec.format();
        if look != Look::Quick {
            check_below(world)?;
        }
        if matches!(
            format,
            Format::Vhd | Format::Vhdx | Format::Vdi | Format::Vmdk
        ) {
            return self.judge_growing(world, model, allowed, look);
        }
        if matches!(format, Format::Qed | Format::Qcow) {
            return self.judge_appended(world, model, allowed, look);
        }
        if format == Format::Luks {
            return judge_luks(world, model, allowed, look);
        }
        if allowed.absent && Header::read(&**world.image()).is_err() {
            return Ok(());
        }
        // qemu-img would need the passphrase.
        let peer = world.spec.create.encryption.is_none();
        let dirty = is_dirty(&**world.image()).map_err(|e| format!("header: {e}"))?;
        if dirty || allowed.damaged {
            // Refcounts are behind the tables: the image says so itself, or the workload has seen to it.
            let before = world.content().map_err(|e| e.to_string())?;
            model.judge(allowed, &before)?;
            if look == Look::Close && dirty && peer {
                self.peer_mends(world, &before)?;
            }
            match allowed.damaged {
                true => check(&**world.image(), Repair::All).map(|_| ())?,
                false => mend_dirty(&**world.image())
                    .map(|_| ())
                    .map_err(|e| e.to_string())?,
            }
        }
        check(&**world.image(), Repair::No)?;
        let bytes = world.content().map_err(|e| e.to_string())?;
        model.judge(allowed, &bytes)?;
        if look != Look::Quick {
            if peer {
                self.peer(world, format)?;
            }
            snapshots(world, model)?;
            bitmaps(world, model, &bytes)?;
        }
        if look == Look::Close {
            if peer {
                self.peer_reads(&bytes, format)?;
            }
            go_on(world, model, allowed)?;
        }
        Ok(())
    }

    /// qemu brings an image with the dirty bit in order, and it reads as before then.
    fn peer_mends(&self, world: &World, before: &[u8]) -> Result<(), String> {
        let path = self.dir.path("dirty.qcow2");
        self.write_files(world, "dirty.qcow2")?;
        run(Command::new("qemu-img")
            .args(["check", "-q", "-f", "qcow2", "-r", "all", "dirty.qcow2"])
            .current_dir(self.dir.root()));
        let bytes = std::fs::read(&path).map_err(|e| e.to_string())?;
        let mut disks: Vec<_> = world.disks.iter().map(|disk| disk.copy()).collect();
        disks[0] = SimDisk::from_bytes(SimOptions::default(), &bytes);
        let mended = world.on(disks);
        check(&**mended.image(), Repair::No).map_err(|e| format!("mended by qemu: {e}"))?;
        match mended.content().map_err(|e| e.to_string())? == before {
            true => Ok(()),
            false => Err("mended by qemu, it reads otherwise".to_owned()),
        }
    }

    /// A QED or qcow image is sound without a repair, the former without the need-check bit, reads as it may, by QEMU too, and can be
    /// written to.
    fn judge_appended(
        &self,
        world: &World,
        model: &Model,
        allowed: &Allowed,
        look: Look,
    ) -> Result<(), String> {
        let format = world.spec.format();
        let (sound, peer): (Sound, bool) = match format {
            Format::Qed => {
                let header = qed::Header::read(&**world.image()).map_err(|e| e.to_string())?;
                if header.needs_check() {
                    return Err("the need-check bit is set".to_owned());
                }
                // QEMU opens no image with tables of one cluster.
                (check_qed, header.table_size > 1)
            }
            _ => (check_qcow, true),
        };
        sound(world)?;
        let bytes = world.content().map_err(|e| e.to_string())?;
        model.judge(allowed, &bytes)?;
        if look != Look::Quick && peer {
            match format {
                Format::Qed => self.peer(world, format)?,
                // Which qemu-img cannot check.
                _ => self.write_files(world, "image.qcow2")?,
            }
            if look == Look::Close || format == Format::Qcow {
                self.peer_reads(&bytes, format)?;
            }
        }
        if look == Look::Close {
            let world = go_on_writing(world, model, allowed)?;
            sound(&world).map_err(|what| format!("after going on: {what}"))?;
        }
        Ok(())
    }

    /// A VHD, VHDX, VDI or VMDK image is sound as it is; QEMU reads it, but knows of no parents of VHD images, and of VDI images
    /// only those with blocks of 1 MiB.
    fn judge_growing(
        &self,
        world: &World,
        model: &Model,
        allowed: &Allowed,
        look: Look,
    ) -> Result<(), String> {
        check_growing(world, Repair::No)?;
        let bytes = world.content().map_err(|e| e.to_string())?;
        model.judge(allowed, &bytes)?;
        let format = world.spec.format();
        let peer = match format {
            Format::Vdi => world.spec.create.cluster_size == u64::from(vdi::BLOCK_BYTES),
            Format::Vmdk => true,
            _ => world.spec.below.is_none(),
        };
        if look != Look::Quick && peer {
            match format {
                Format::Vmdk => self.peer(world, format)?,
                _ => self.write_files(world, "image.qcow2")?,
            }
            if format == Format::Vhdx {
                // It only reads what has no log.
                run(Command::new("qemu-img")
                    .args([
                        "check",
                        "-q",
                        "-T",
                        "unsafe",
                        "-f",
                        "vhdx",
                        "-r",
                        "all",
                        "image.qcow2",
                    ])
                    .current_dir(self.dir.root()));
            }
            self.peer_reads(&bytes, format)?;
        }
        if look == Look::Close {
            let after = |what| format!("after going on: {what}");
            let mended = world.copy();
            check_growing(&mended, Repair::Leaks).map_err(after)?;
            let read = mended.content().map_err(|e| after(e.to_string()))?;
            if read != bytes {
                return Err("mended, it reads otherwise".to_owned());
            }
            // Holes between the blocks of a VDI image are left to new blocks; nobody reads the redundant tables of a VMDK one.
            let leaks = |world: &World| match (format, check_growing(world, Repair::No)?) {
                (_, 0) => Ok(()),
                (_, leaks) => Err(format!("{leaks} leaks")),
            };
            leaks(&mended).map_err(after)?;
            let world = go_on_writing(world, model, allowed)?;
            let copy = world.copy();
            if matches!(format, Format::Vdi | Format::Vmdk) {
                check_growing(&copy, Repair::Leaks).map_err(after)?;
            }
            leaks(&copy).map_err(after)?;
        }
        Ok(())
    }

    /// The files for qemu, the image's first under that name.
    fn write_files(&self, world: &World, first: &str) -> Result<(), String> {
        let first = (first.to_owned(), world.image());
        for (name, disk) in std::iter::once(first).chain(world.others()) {
            std::fs::write(self.dir.path(&name), disk.bytes()).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// The image as `qemu-img check` finds it: no errors, but leaks perhaps.
    fn peer(&self, world: &World, format: Format) -> Result<(), String> {
        self.write_files(world, "image.qcow2")?;
        let output = Command::new("qemu-img")
            .args(["check", "-f", format.name()])
            // A data file's name starts where qemu-img is run.
            .arg("image.qcow2")
            .current_dir(self.dir.root())
            .output()
            .map_err(|e| format!("qemu-img: {e}"))?;
        // 3 is leaked clusters, nothing worse.
        match output.status.code() {
            Some(0 | 3) => Ok(()),
            _ => Err(format!(
                "qemu-img check: {}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )),
        }
    }

    /// qemu reads the image, written before, as we do.
    fn peer_reads(&self, bytes: &[u8], format: Format) -> Result<(), String> {
        let raw = self.dir.path("image.raw");
        run(Command::new("qemu-img")
            .args([
                "convert",
                "-f",
                format.qemu_name(),
                "-O",
                "raw",
                "image.qcow2",
                "image.raw",
            ])
            .current_dir(self.dir.root()));
        let read = std::fs::read(&raw).map_err(|e| e.to_string())?;
        let differs = read
            .iter()
            .zip(bytes)
            .position(|(theirs, ours)| theirs != ours);
        match read == bytes {
            true => Ok(()),
            false => Err(format!(
                "qemu-img convert reads other bytes than we do, from {:#x} on: {:x?}, we {:x?}",
                differs.unwrap_or(read.len().min(bytes.len())),
                differs.map(|at| &read[at..read.len().min(at + 16)]),
                differs.map(|at| &bytes[at..bytes.len().min(at + 16)]),
            )),
        }
    }
}

/// A LUKS volume opens with the key that nobody changes, and reads as it may. Each slot that is active opens with one of the
/// passphrases: none is left half written.
fn judge_luks(world: &World, model: &Model, allowed: &Allowed, look: Look) -> Result<(), String> {
    let file: &dyn Storage = &**world.image();
    let header = image::luks::header(file).map_err(|e| e.to_string())?;
    let bytes = world.content().map_err(|e| e.to_string())?;
    model.judge(allowed, &bytes)?;
    let second = header.unlock(file, 0, &second_passphrase());
    match (header.active_slots(), second) {
        (1, Err(error)) if error.kind() == ErrorKind::Denied => {}
        (2, Ok((1, _))) => {}
        (slots, found) => {
            let found = found.map(|(slot, _)| slot);
            return Err(format!("{slots} active slots, the second key: {found:?}"));
        }
    }
    if look == Look::Close {
        go_on_writing(world, model, allowed)?;
    }
    Ok(())
}

/// The crashed image can be used: what is written next is there, and the rest stays.
fn go_on_writing(world: &World, model: &Model, allowed: &Allowed) -> Result<World, String> {
    let after = |what| format!("after going on: {what}");
    let world = world.copy();
    let written = || -> block::Result<Vec<u8>> {
        let mut driver = world.open(false, None)?.driver()?;
        let mut bytes = vec![0; driver.size() as usize];
        driver.read(0, &mut bytes)?;
        for at in (0..bytes.len()).step_by(bytes.len() / 3 + 512) {
            let at = at / 512 * 512;
            // What is there, which is any of what is allowed: the model need not know of it.
            let again = bytes[at..(at + 1024).min(bytes.len())].to_vec();
            driver.write(at as u64, &again)?;
        }
        driver.close()?;
        world.content()
    };
    let bytes = written().map_err(|e| format!("going on after the crash: {e}"))?;
    model.judge(allowed, &bytes).map_err(after)?;
    Ok(world)
}

/// The same, and what the crash leaked can be given back.
fn go_on(world: &World, model: &Model, allowed: &Allowed) -> Result<(), String> {
    let after = |what| format!("after going on: {what}");
    let world = go_on_writing(world, model, allowed)?;
    check(&**world.image(), Repair::No).map_err(after)?;
    // What the crash leaked can be given back, and nothing else goes with it.
    let report = check(&**world.image(), Repair::Leaks).map_err(after)?;
    let bytes = world.content().map_err(|e| after(e.to_string()))?;
    model.judge(allowed, &bytes).map_err(after)?;
    let again = check(&**world.image(), Repair::No).map_err(after)?;
    match report.leaks + again.leaks {
        0 => Ok(()),
        leaks => Err(format!("{leaks} clusters are leaked after their repair")),
    }
}

/// The images below are sound, which most workloads do not touch.
fn check_below(world: &World) -> Result<(), String> {
    for (spec, disks) in world.images().skip(1) {
        let file: &dyn Storage = &*disks[0];
        let options = CheckOptions::default();
        let dirty = |file| is_dirty(file).map_err(|e| e.to_string());
        if spec.raw || spec.format() == Format::Qcow2 && dirty(file)? {
            continue;
        }
        let report = check_image(spec, disks, &options);
        let report = report.map_err(|e| format!("below: {e}"))?;
        if report.corruptions + report.check_errors > 0 {
            return Err(format!("below: {:?}", report.findings));
        }
    }
    Ok(())
}

/// Every snapshot of the image is what the disk was when it was made.
fn snapshots(world: &World, model: &Model) -> Result<(), String> {
    let found = snapshot::list(&**world.image()).map_err(|e| e.to_string())?;
    for found in found {
        let name = found.shown_name();
        let saved = model.saved(&name).ok_or(format!("a snapshot {name}"))?;
        let copy = world.copy();
        let applied = snapshot::apply(&**copy.image(), &name);
        let read = applied.and_then(|_| copy.content());
        let bytes = read.map_err(|e| format!("snapshot {name}: {e}"))?;
        if stamps(&bytes) != saved {
            return Err(format!(
                "snapshot {name} holds other bytes than the disk did"
            ));
        }
        check(&**copy.image(), Repair::No).map_err(|e| format!("snapshot {name} applied: {e}"))?;
    }
    Ok(())
}

/// Every enabled bitmap that says it can be trusted knows of all that has changed since it was made.
fn bitmaps(world: &World, model: &Model, bytes: &[u8]) -> Result<(), String> {
    let found = bitmap::list(&**world.image()).map_err(|e| e.to_string())?;
    let now = stamps(bytes);
    for found in found.iter().filter(|b| b.auto() && !b.in_use()) {
        let name = found.name();
        let saved = model.saved(&name).ok_or(format!("a bitmap {name}"))?;
        let bits = bitmap::load(&**world.image(), found.raw_name());
        let bits = bits.map_err(|e| format!("bitmap {name}: {e}"))?;
        let mut sectors = (0..).zip(now.iter().zip(saved));
        let missed = sectors.find(|(sector, (now, then))| {
            let at = sector * SECTOR;
            now != then && bits.next_dirty(at).is_none_or(|(start, _)| start > at)
        });
        if let Some((sector, _)) = missed {
            return Err(format!(
                "bitmap {name} does not know that sector {sector} has changed"
            ));
        }
    }
    Ok(())
}

/// The stamps of a disk's sectors.
pub fn stamps(bytes: &[u8]) -> Vec<u64> {
    let sectors = bytes.chunks(SECTOR as usize);
    let stamps = sectors.map(|s| s.first_chunk().map_or(0, |w| u64::from_le_bytes(*w)));
    stamps.collect()
}

/// Whether the image says that its refcounts are behind.
///
/// # Errors
///
/// What reading its header fails with.
pub fn is_dirty(storage: &dyn Storage) -> block::Result<bool> {
    Ok(Header::read(storage)?.incompatible & features::DIRTY != 0)
}

/// Our check of the image `spec`, whose files come first in `disks`.
///
/// # Errors
///
/// What the check fails with.
pub fn check_image(
    spec: &Spec,
    disks: &[Arc<SimDisk>],
    options: &CheckOptions,
) -> block::Result<Report> {
    let file: &dyn Storage = &*disks[0];
    match spec.format() {
        // There is none.
        Format::Qcow => Ok(Report::default()),
        Format::Qed => tool::check::qed::check(file, options),
        Format::Vhd => tool::check::vhd::check(file, options),
        Format::Vhdx => tool::check::vhdx::check(file, options),
        Format::Vdi => tool::check::vdi::check(file, options),
        Format::Vmdk => {
            let own = disks.iter().take(1 + spec.parts().len());
            let files: Vec<&dyn Storage> = own.map(|disk| &**disk as _).collect();
            vmdk::check(&files, options)
        }
        _ => tool::check::check(file, options),
    }
}

/// Our check of a VHD, VHDX, VDI or VMDK image: no errors, but leaks perhaps. How many.
fn check_growing(world: &World, repair: Repair) -> Result<u64, String> {
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    let report = check_image(&world.spec, &world.disks, &options);
    let report = report.map_err(|e| format!("check: {e}"))?;
    match report.corruptions + report.check_errors {
        0 => Ok(report.leaks),
        _ => Err(format!("check: {:?}", report.findings)),
    }
}

/// Our check of a QED image: no errors, but leaks perhaps.
fn check_qed(world: &World) -> Result<(), String> {
    let report = tool::check::qed::check(&**world.image(), &CheckOptions::default());
    let report = report.map_err(|e| format!("check: {e}"))?;
    match report.corruptions + report.check_errors {
        0 => Ok(()),
        _ => Err(format!("check: {:?}", report.findings)),
    }
}

/// No entry of a qcow image leads to no place, or to one that another has.
fn check_qcow(world: &World) -> Result<(), String> {
    match testkit::qcow::check(&world.image().bytes()) {
        Some(found) if found == testkit::qcow::Found::default() => Ok(()),
        found => Err(format!("check: {found:?}")),
    }
}

/// Our check: no errors, but leaks perhaps.
fn check(storage: &dyn Storage, repair: Repair) -> Result<Report, String> {
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    let report = tool::check::check(storage, &options).map_err(|e| format!("check: {e}"))?;
    match report.corruptions + report.check_errors {
        0 => Ok(report),
        _ => {
            let texts: Vec<&str> = report.findings.iter().map(|f| f.text.as_str()).collect();
            Err(format!("check: {}", texts.join("; ")))
        }
    }
}
