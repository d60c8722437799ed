//! A side of a cell under load: who is started, what is asked of it, and what is looked at besides.

use super::{
    lab::Lab,
    plan::{Cell, Format, How, Medium, Side, State},
    runner::Runner,
};
use crate::{
    breakdown::{self, Protocol},
    load::{Spec, Target},
    machine::process,
    peer::{self, Running, Seen, Setup},
    record::Sample,
    report::chart::file_name,
    sampling::{self, Measured, Subject},
    turns::Company,
    versus::cell::Server,
};
use block::{Context, Result};
use serde_json::json;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use trace::Breakdown;

impl Runner<'_> {
    /// Whether all sides of a cell can be up at the same time: on files that are there, that no two of them lock, and that lie
    /// on a device which answers many times in a turn.
    pub(super) fn can_take_turns(cell: &Cell) -> bool {
        let load = &cell.load;
        let mut company = Company::new();
        let mut alike = |side: &Side| {
            let image = side.image;
            let own = image.place.medium == Medium::Own && !side.server_each;
            let fits = match side.how {
                How::Bare => true,
                How::Served(server) => {
                    company.takes(server, image, image.format.name(), load.writes())
                }
                How::Mounted(_) | How::Guest(..) => false,
            };
            image.stays() && own && fits
        };
        let sleeps = !load.poll && !load.idle && load.warm == 0.0;
        cell.files.is_none() && sleeps && cell.sides.len() > 1 && cell.sides.iter().all(&mut alike)
    }

    fn spec(&self, cell: &Cell, side: &Side, target: Target, seed: u64) -> Spec {
        let load = &cell.load;
        let grows = match side.image.state {
            State::Growing | State::Overlay | State::Hollow if side.image.format != Format::Vhd => {
                load.block.max(64 << 10)
            }
            _ => 0,
        };
        let driver = side.driver;
        Spec {
            depth: driver.depth.unwrap_or(load.depth),
            packed: driver.packed,
            // A device that was given may be larger than what was written.
            range_bytes: Lab::is_device(side.image.place).then(|| self.lab.bytes(side.image)),
            indirect: driver.indirect,
            misalign_bytes: driver.misalign.into(),
            duration: self.options.duration,
            ramp: self.options.ramp + Duration::from_secs_f64(load.warm),
            ios_max: (grows > 0).then(|| self.lab.growth / grows),
            seed,
            ..load.spec(target, side.queues)
        }
    }

    /// Starts what a side needs, its sockets in `work`; the load is left to begin.
    pub(super) fn begin(
        &self,
        cell: &Cell,
        side: &Side,
        files: &[PathBuf],
        seed: u64,
        work: &Path,
        notes: &mut BTreeSet<String>,
    ) -> Result<Subject> {
        let How::Served(server) = side.how else {
            let of_file = |(n, path): (u64, &PathBuf)| {
                let target = Target::File {
                    path: path.clone(),
                    engine: side.engine.to_owned(),
                    direct: side.direct && self.lab.programs().direct,
                };
                self.spec(cell, side, target, seed + n)
            };
            return Ok(Subject {
                specs: (0..).zip(files).map(of_file).collect(),
                servers: Vec::new(),
            });
        };
        // Sixteen virtual machines have a server each, or one has sixteen disks.
        let groups: Vec<&[PathBuf]> = match side.server_each {
            true => files.chunks(1).collect(),
            false => vec![files],
        };
        let shared = Self::can_take_turns(cell);
        let mut servers = Vec::new();
        for (n, files) in groups.into_iter().enumerate() {
            let work = match n {
                0 => work.to_owned(),
                n => work.join(format!("server-{n}")),
            };
            fs::create_dir_all(&work).context(|| work.display().to_string())?;
            let writes = cell.load.writes();
            servers.push(self.start(side, server, files, (writes, shared), &work, notes)?);
        }
        let targets = servers.iter().flat_map(|(running, _)| {
            let targets = (0..).zip(&running.targets);
            targets.map(move |(n, target)| (running.pid(), running.control_of(n), target))
        });
        let specs = (0..).zip(targets).map(|(n, (pid, control, target))| Spec {
            server_pids: vec![pid],
            control,
            ..self.spec(cell, side, target.clone(), seed + n)
        });
        Ok(Subject {
            specs: specs.collect(),
            servers,
        })
    }

    /// Looks at what the load does not tell, and ends it.
    pub(super) fn complete(
        &self,
        cell: &Cell,
        side: &Side,
        subject: Subject,
        mut measured: Result<Measured>,
        round: usize,
        notes: &mut BTreeSet<String>,
    ) -> Result<Sample> {
        let bare = subject.servers.is_empty();
        let (mut drawn, mut breakdown) = (None, None);
        if let Ok(measured) = &mut measured {
            if bare {
                measured.is_of_the_client();
            }
            if round == 0 {
                let own = |spec: &Spec| match bare {
                    true => Spec {
                        server_pids: vec![std::process::id()],
                        ..spec.clone()
                    },
                    false => spec.clone(),
                };
                let specs: Vec<Spec> = subject.specs.iter().map(own).collect();
                measured.metrics.extend(sampling::syscalls(&specs)?);
                drawn = self.flame(cell, side, &subject, notes);
                breakdown = broken_down(cell, side, &subject, notes);
            }
        }
        let specs = json!(subject.specs);
        let mut sample = subject.finish(measured)?;
        sample.detail["specs"] = specs;
        sample.flamegraph = drawn;
        sample.breakdown = breakdown;
        Ok(sample)
    }

    /// Draws where a side's servers spend CPU, where that is asked for; the picture's name in the run's folder.
    fn flame(
        &self,
        cell: &Cell,
        side: &Side,
        subject: &Subject,
        notes: &mut BTreeSet<String>,
    ) -> Option<String> {
        if !self.options.flamegraphs || subject.servers.is_empty() {
            return None;
        }
        let name = format!("flame/{}.svg", file_name(&[&cell.name, &side.name]));
        let title = format!("{}, {}", cell.name, side.name);
        let out = self.options.dir.join(&name);
        match sampling::flame(&subject.specs, &subject.pids(), &out, &title) {
            Ok(drawn) => drawn.then_some(name),
            Err(error) => {
                process::goes_on();
                notes.insert(format!("{}: no flame graph: {error}", side.name));
                None
            }
        }
    }

    /// Starts a side's server on files that it writes to, and that others have open too, and looks at it.
    pub(super) fn start(
        &self,
        side: &Side,
        server: Server,
        files: &[PathBuf],
        (writes, shared): (bool, bool),
        work: &Path,
        notes: &mut BTreeSet<String>,
    ) -> Result<(Running, Seen)> {
        let setup = Setup {
            read_only: !writes,
            shared,
            ..self.setup(side, server, files)
        };
        let running = peer::start(self.lab.programs(), work, &setup)?;
        let seen = running.seen(files, side.queues)?;
        if seen.direct != setup.direct {
            notes.insert(format!(
                "not as asked for: {} has O_DIRECT {}",
                side.name,
                if seen.direct { "on" } else { "off" }
            ));
        }
        Ok((running, seen))
    }

    /// How a side's server is started on files that it writes to alone.
    pub(super) fn setup<'b>(&self, side: &Side, server: Server, files: &'b [PathBuf]) -> Setup<'b> {
        let of_qemu = matches!(server, Server::Qsd | Server::QemuNbd);
        Setup {
            server,
            files,
            format: match of_qemu {
                true => side.image.format.of_qemu(),
                false => side.image.format.name(),
            },
            // QEMU finds it by the image; we open only what is allowed.
            backing: match of_qemu {
                true => None,
                false => self.lab.base(side.image),
            },
            engine: side.engine,
            queues: side.queues,
            io_threads: side.io_threads,
            polling: side.polling,
            direct: side.direct && self.lab.programs().direct,
            drops_flushes: side.drops_flushes,
            writethrough: side.writethrough,
            read_only: false,
            shared: false,
            table_cache: side.table_cache,
            table_entry: side.table_entry,
        }
    }
}

/// Bytes of requests whose time is broken down at most: eleven hundred are made.
const BROKEN_DOWN_MAX: u64 = 1 << 20;

/// Where the time of single reads goes at a side's server, by the study's protocol, where the cell has one read at a time and the
/// server tells.
fn broken_down(
    cell: &Cell,
    side: &Side,
    subject: &Subject,
    notes: &mut BTreeSet<String>,
) -> Option<Breakdown> {
    let load = &cell.load;
    let single = load.depth == 1 && !load.writes() && load.block <= BROKEN_DOWN_MAX;
    let ([spec], true) = (&subject.specs[..], single && !load.poll) else {
        return None;
    };
    let control = spec.control.as_deref()?;
    let protocol = Protocol {
        random: load.pattern.is_random(),
        block_bytes: load.block,
        ..Protocol::default()
    };
    match breakdown::of_server(&spec.target, control, &protocol) {
        Ok(breakdown) => Some(breakdown),
        Err(error) => {
            process::goes_on();
            notes.insert(format!("{}: no breakdown: {error}", side.name));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::{all, plan::Experiment};

    #[test]
    fn files_that_are_there_and_that_no_two_lock_have_turns() {
        let turns = |experiment: &Experiment| -> Vec<String> {
            let quick = experiment.cells.iter().filter(|cell| cell.quick);
            let those = quick.filter(|cell| Runner::can_take_turns(cell));
            those.map(|cell| cell.name.clone()).collect()
        };
        let expected: [&[&str]; 4] = [
            // Two servers do not write one qcow2 image.
            &["ioping", "randread"],
            &[
                "read-raw-ext4",
                "randread-raw-ext4",
                "read-qcow2-ext4",
                "randread-qcow2-ext4",
                "read-qcow2-falloc-ext4",
                "randread-qcow2-falloc-ext4",
                "read-raw-xfs",
                "randread-raw-xfs",
            ],
            // File systems are mounted by one at a time.
            &[],
            &[
                "read-4k",
                "read-16k",
                "read-64k",
                "read-256k",
                "read-1m",
                "read-4m",
                "disks-4",
                "queues",
                "rings-null",
                "rings-full",
                "copy-4k",
                "copy-1m",
            ],
        ];
        for (experiment, expected) in all().iter().zip(expected) {
            assert_eq!(turns(experiment), expected, "{}", experiment.name);
        }
    }
}
