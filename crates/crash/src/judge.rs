//! Whether what a crash left is sound.

use crate::model::{Allowed, Model};
use crate::spec::BACKING;
use crate::world::World;
use block::Storage;
use image::qcow2::{Header, features};
use std::path::Path;
use std::process::Command;
use testkit::TempDir;
use tool::check::{CheckOptions, Repair, Report};

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
        let header = Header::read(&**world.image()).map_err(|e| format!("header: {e}"))?;
        if header.incompatible & features::DIRTY != 0 {
            // Refcounts are behind the tables: the image says so itself.
            check(&**world.image(), Repair::All)?;
        }
        check(&**world.image(), Repair::No)?;
        let bytes = world.content().map_err(|e| e.to_string())?;
        model.judge(allowed, &bytes)?;
        if look != Look::Quick {
            self.peer(world)?;
        }
        if look == Look::Close {
            self.peer_reads(&bytes)?;
            go_on(world, model, allowed)?;
        }
        Ok(())
    }

    /// The image as `qemu-img check` finds it: no errors, but leaks perhaps.
    fn peer(&self, world: &World) -> Result<(), String> {
        let path = self.dir.path("image.qcow2");
        let write =
            |path: &Path, bytes: &[u8]| std::fs::write(path, bytes).map_err(|e| e.to_string());
        write(&path, &world.image().bytes())?;
        if let Some(backing) = world.disks.get(1) {
            write(&self.dir.path(BACKING), &backing.bytes())?;
        }
        let output = Command::new("qemu-img")
            .args(["check", "-f", "qcow2"])
            .arg(&path)
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
    fn peer_reads(&self, bytes: &[u8]) -> Result<(), String> {
        let (image, raw) = (self.dir.path("image.qcow2"), self.dir.path("image.raw"));
        testkit::qemu::convert("qcow2", &image, "raw", &raw);
        let read = std::fs::read(&raw).map_err(|e| e.to_string())?;
        match read == bytes {
            true => Ok(()),
            false => Err("qemu-img convert reads other bytes than we do".to_owned()),
        }
    }
}

/// The crashed image can be used: what is written next is there, and the rest stays.
fn go_on(world: &World, model: &Model, allowed: &Allowed) -> Result<(), String> {
    let disks = world.disks.iter().map(|disk| disk.copy()).collect();
    let world = world.on(disks);
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
    let after = |what| format!("after going on: {what}");
    model.judge(allowed, &bytes).map_err(after)?;
    check(&**world.image(), Repair::No)
        .map(|_| ())
        .map_err(after)
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
