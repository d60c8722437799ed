//! Disks as file systems: what FFSB's scenarios run on.
//!
//! ```text
//!   DIR/work/client        ext4 or XFS                 the load's files
//!   /dev/loopN             O_DIRECT below it
//!   DIR/work/nbd/nbd       nbdfuse (libnbd), the same client for every server; without a server: the file itself
//!   unix socket            diskplane serve --nbd | qemu-nbd
//!   image
//! ```

use super::{
    plan::{Cell, Client, Files, Side, State, System},
    runner::Runner,
};
use crate::{
    ffsb,
    load::Target,
    machine::{device::Device, mount, others::Watch, process::Process},
    peer::{Running, Seen},
    record::Sample,
    sampling::{self, Subject},
    versus::cell::Server,
};
use block::{Context, Error, Result};
use serde_json::json;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// How long `nbdfuse` may take to end when its mount is gone.
const END: Duration = Duration::from_secs(30);

/// A disk as a file system. Dropping it undoes it.
#[derive(Debug)]
struct Stack {
    point: PathBuf,
    mounted: bool,
    device: Option<PathBuf>,
    fuse: Option<(Process, PathBuf)>,
    server: Option<(Running, Seen)>,
}

impl Stack {
    /// Attaches a file, and mounts what is on it; with `fresh` a new file system.
    fn mount(&mut self, file: &Path, client: Client, fresh: bool) -> Result<()> {
        let kind = match client.system {
            System::Xfs => "xfs",
            _ => "ext4",
        };
        let device = mount::attach(file)?;
        self.device = Some(device.clone());
        if let Some(scheduler) = client.scheduler {
            mount::schedule(&device, scheduler)?;
        }
        if fresh {
            mount::make(&device, kind)?;
        }
        mount::mount(&device, kind, &self.point, client.barriers)?;
        self.mounted = true;
        Ok(())
    }

    /// Has a server's disk appear as a file.
    fn fuse(&mut self, work: &Path) -> Result<PathBuf> {
        let target = self
            .server
            .as_ref()
            .and_then(|(server, _)| server.targets.first());
        let Some(Target::Nbd(socket)) = target else {
            return Err(Error::invalid("not an NBD server"));
        };
        let point = work.join("nbd");
        fs::create_dir_all(&point).context(|| point.display().to_string())?;
        let ready = work.join("nbdfuse.pid");
        let _ = fs::remove_file(&ready);
        let mut command = Command::new("nbdfuse");
        command.arg("--pidfile").arg(&ready).arg(&point);
        command.args(["--unix", socket.trim_start_matches("unix:")]);
        let process = Process::start("nbdfuse", &mut command, work)?;
        let (process, point) = self.fuse.insert((process, point));
        // It writes its number when requests are answered; without a newline.
        process.wait_ready(|_| fs::read_to_string(&ready).is_ok_and(|text| !text.is_empty()))?;
        Ok(point.join("nbd"))
    }

    /// Undoes all but the server.
    fn down(&mut self) -> Result<()> {
        if std::mem::take(&mut self.mounted) {
            mount::unmount(&self.point)?;
        }
        if let Some(device) = self.device.take() {
            mount::detach(&device)?;
        }
        if let Some((mut process, point)) = self.fuse.take() {
            mount::unmount(&point)?;
            let status = process.wait(END)?;
            if !status.success() {
                return Err(process.failed(&format!("ended badly ({status})")));
            }
        }
        Ok(())
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if let Err(error) = self.down() {
            // What is left goes with the run's folder.
            tracing::warn!("{}: {error}", self.point.display());
        }
    }
}

impl Runner<'_> {
    /// What a scenario is asked for in a cell, on a side.
    pub(super) fn files_spec(
        &self,
        files: Files,
        side: &Side,
        point: &Path,
        seed: u64,
    ) -> ffsb::Spec {
        // A file system has less than its disk, and what is created needs room beside the set.
        let bytes = match side.image.state {
            State::Full | State::Falloc | State::Filled | State::Zeroed => {
                self.lab.bytes(side.image)
            }
            // An image may not grow by more in a sample.
            _ => self.lab.bytes(side.image).min(self.lab.growth),
        };
        let creates = files.scenario.creates();
        let grows = side.image.state == State::Growing || side.image.state == State::Hollow;
        ffsb::Spec {
            duration: self.options.duration,
            ramp: self.options.ramp,
            // What is read must be there: holes cost nothing.
            sparse: grows && files.scenario == ffsb::Scenario::RandomWrites,
            pristine: side.image.state == State::Overlay,
            seed,
            // What scenarios of one kind of files have in common is made once.
            ..ffsb::Spec::new(
                point.to_owned(),
                files.scenario,
                files.threads,
                if creates { bytes / 2 } else { bytes / 4 },
            )
        }
    }

    /// Takes a sample of a load on a file system.
    pub(super) fn mounted(
        &mut self,
        cell: &Cell,
        side: &Side,
        server: Option<Server>,
        images: &[PathBuf],
        seed: u64,
        notes: &mut BTreeSet<String>,
    ) -> Result<Sample> {
        let (Some(files), [image]) = (cell.files, images) else {
            return Err(Error::invalid(format!(
                "{}: not one disk with files",
                cell.name
            )));
        };
        let work = self.lab.work().to_owned();
        let new = || Stack {
            point: work.join("client"),
            mounted: false,
            device: None,
            fuse: None,
            server: None,
        };
        let mut stack = new();
        let spec = self.files_spec(files, side, &stack.point, seed);
        let mut fresh = !self.lab.formatted.contains(image);
        if side.image.state == State::Overlay
            && let Some(base) = self.lab.base(side.image)
        {
            // The overlay was made a moment ago, and is empty: what is below it may still change.
            let mut below = new();
            below.mount(&base, side.client, !self.lab.formatted.contains(&base))?;
            self.lab.formatted.insert(base);
            ffsb::prepare(&spec)?;
            below.down()?;
            fresh = false;
        }
        let file = match server {
            None => image.clone(),
            Some(server) => {
                stack.server =
                    Some(self.start(side, server, images, (true, false), &work, notes)?);
                stack.fuse(&work)?
            }
        };
        stack.mount(&file, side.client, fresh)?;
        self.lab.formatted.insert(image.clone());
        let pid = stack.server.as_ref().map(|(server, _)| server.pid());
        let control = stack.server.as_ref().and_then(|(s, _)| s.control_of(0));
        let spec = ffsb::Spec {
            server_pids: pid.into_iter().collect(),
            control,
            ..spec
        };
        let prepared = ffsb::prepare(&spec)?;
        let device = Device::below(&self.lab.device_below(side.image)).watch();
        let fuse = stack.fuse.as_ref().map(|(process, _)| process.pid());
        let watch = Watch::begin(&pid.into_iter().chain(fuse).collect::<Vec<_>>());
        let outcome = prepared.run()?;
        let reports = [outcome.report.clone()];
        let mut measured = sampling::figures(&reports, &spec.server_pids)?;
        if server.is_none() {
            measured.is_of_the_client();
        }
        measured.meanwhile(&watch.since());
        device.add_to(&mut measured.metrics);
        stack.down()?;
        let subject = Subject {
            specs: Vec::new(),
            servers: stack.server.take().into_iter().collect(),
        };
        let mut sample = subject.finish(Ok(measured))?;
        sample.detail["specs"] = json!([spec]);
        sample.detail["files"] = json!(outcome.counts);
        Ok(sample)
    }
}
