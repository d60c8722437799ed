//! Disks of a Linux guest: FFSB's scenarios inside, on ext4 on the whole disk, or fio on the disk as it is.
//!
//! ```text
//!   guest    diskplane bench ffsb /mnt          this program itself, in the initramfs            (guest/init: bench)
//!            ext4 · virtio_blk or ata_piix
//!         or fio --filename=/dev/vda            the host's, in the initramfs                     (guest/init: fio)
//!            virtio_blk or ata_piix
//!   QEMU     vhost-user-blk │ virtio-blk-pci or ide-hd on NBD │ the same on QEMU's own block layer
//!            our server, qemu-storage-daemon │ our server, qemu-nbd │ –
//!   image
//! ```
//!
//! The guest prints its records, or fio's report, and what its kernel counted on a serial port. What servers, QEMU and this machine did is
//! looked at here, from the line with which the load begins to the one with which it ends.

use super::{
    plan::{Bus, Cell, Files, Side},
    runner::Runner,
};
use crate::{
    fio,
    load::{
        Report, Spec, Target,
        usage::{self, Watched},
    },
    machine::{
        device::Device,
        initrd,
        interrupts::Sources,
        others::{self, Watch},
        process::Process,
    },
    metric::{Metric, Metrics},
    peer,
    record::{Record, Sample},
    sampling::{self, Subject},
    versus::cell::Server,
};
use ::guest::{Boot, Guest as Linux};
use block::{Context, Error, Result};
use serde_json::json;
use std::{
    collections::BTreeSet,
    fmt::Write,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// How long a guest may take besides what it measures: ten times what it takes under emulation.
const LIMIT: Duration = Duration::from_secs(360);
/// How often its lines are looked at.
const LOOK: Duration = Duration::from_millis(2);
/// MiB of its files at most: under emulation they are written slowly.
const FILES_MIB_MAX: u64 = 256;
/// Characters of its console that an error repeats.
const WORDS_MAX: usize = 400;

/// A guest at work.
struct Guest {
    qemu: Process,
    results: PathBuf,
    console: PathBuf,
    until: Instant,
    /// Guests take the machine for themselves one at a time; those of the tests too.
    _turn: File,
}

impl Guest {
    /// The whole lines that it printed so far, without what they all begin with.
    fn lines(&self) -> Vec<String> {
        let text = fs::read(&self.results).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).replace('\r', "");
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = whole.lines().filter_map(|line| line.strip_prefix("DP "));
        lines.map(str::to_owned).collect()
    }

    /// Waits until it prints `line`.
    fn wait_for(&mut self, line: &str) -> Result<()> {
        loop {
            let lines = self.lines();
            if lines.iter().any(|own| own == line) {
                return Ok(());
            }
            let failed = lines.iter().find(|own| own.starts_with("result=fail"));
            if let Some(failed) = failed {
                return Err(self.failed(&format!("failed ({failed})")));
            }
            if !self.qemu.runs()? {
                return Err(self.failed(&format!("ended before it said {line}")));
            }
            if Instant::now() >= self.until {
                return Err(self.failed(&format!("did not say {line} in time")));
            }
            thread::sleep(LOOK);
        }
    }

    fn failed(&self, what: &str) -> Error {
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console).replace('\r', "");
        let console = console.trim();
        let start = console.ceil_char_boundary(console.len().saturating_sub(WORDS_MAX));
        let last: Vec<&str> = console[start..].lines().collect();
        self.qemu
            .failed(&format!("{what}; its console: {}", last.join("; ")))
    }
}

/// What its kernel had counted at a moment.
struct Counted {
    seconds: f64,
    busy_s: f64,
    /// In user mode, and in the kernel.
    modes_s: (f64, f64),
    interrupts: Sources,
}

impl Counted {
    /// From the files that it handed out.
    fn at(lines: &[String], when: &str) -> Self {
        let of = |what: &str| file(lines, &format!("{what}.{when}"));
        let seconds = of("uptime");
        Self {
            seconds: seconds
                .split(' ')
                .next()
                .and_then(|s| s.parse().ok())
                .unwrap_or_default(),
            busy_s: others::busy_s(&of("stat")),
            modes_s: others::modes_s(&of("stat")),
            interrupts: Sources::parse(&of("interrupts")),
        }
    }
}

/// A file that it handed out.
fn file(lines: &[String], name: &str) -> String {
    let prefix = format!("file.{name} ");
    let own = lines.iter().filter_map(|line| line.strip_prefix(&prefix));
    own.fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "{line}");
        text
    })
}

/// The record of its load.
fn sample(lines: &[String]) -> Option<(Sample, Report)> {
    let records = file(lines, "records");
    let mut records = records
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    let sample = records.find_map(|record| match record {
        Record::Sample(sample) => Some(*sample),
        _ => None,
    })?;
    let report = serde_json::from_value(sample.detail["reports"][0].clone()).ok()?;
    let report = Report {
        histogram: sample.latency.clone(),
        timeline: sample.timeline.clone(),
        ..report
    };
    Some((sample, report))
}

/// What fio said of its load.
fn of_fio(lines: &[String], spec: &Spec) -> Option<(Sample, Report)> {
    let mut jobs = fio::parse(&file(lines, "fio"))?;
    let report = jobs.pop().filter(|_| jobs.is_empty())?.report;
    let detail = json!({ "specs": [spec] });
    let told = Sample {
        detail,
        ..Sample::default()
    };
    Some((told, report))
}

/// What a guest is to do.
enum Asked {
    /// A scenario on files of so many MiB together.
    Files(Files, u64),
    /// A load on the disk.
    Disk(Box<Spec>),
}

impl Runner<'_> {
    /// What a side's guest is to do in a cell.
    fn asked(&self, cell: &Cell, side: &Side, bus: Bus, seed: u64) -> Asked {
        if let Some(files) = cell.files {
            let spec = self.files_spec(files, side, Path::new("/mnt"), seed);
            return Asked::Files(files, (spec.space_bytes >> 20).clamp(16, FILES_MIB_MAX));
        }
        let disk = Target::File {
            path: bus.device().into(),
            engine: "native".to_owned(),
            direct: true,
        };
        Asked::Disk(Box::new(Spec {
            duration: self.options.duration,
            range_bytes: Some(self.lab.bytes(side.image)),
            seed,
            ..cell.load.spec(disk, side.queues)
        }))
    }

    /// Takes a sample of a load on a file system in a guest.
    pub(super) fn guest(
        &mut self,
        cell: &Cell,
        side: &Side,
        (bus, server): (Bus, Option<Server>),
        images: &[PathBuf],
        seed: u64,
        notes: &mut BTreeSet<String>,
    ) -> Result<Sample> {
        let [image] = images else {
            return Err(Error::invalid(format!("{}: not one disk", cell.name)));
        };
        let work = self.lab.work().to_owned();
        // The guest makes a file system of its own on it.
        self.lab.formatted.remove(image);
        let server =
            server.map(|server| self.start(side, server, images, (true, false), &work, notes));
        let server = server.transpose()?;
        let asked = self.asked(cell, side, bus, seed);
        let targets = server.as_ref().map(|(s, _)| &s.targets[..]);
        let mut guest = self.boot(&asked, side, bus, targets, image, seed)?;
        guest.wait_for("bench=begin")?;
        let pids: Vec<u32> = server.iter().map(|(running, _)| running.pid()).collect();
        let control = server.iter().find_map(|(running, _)| running.control_of(0));
        let mut watched = Watched::pids(&pids, control.as_deref());
        let (before, began) = (watched.begin()?, Instant::now());
        let qemu_before = usage::cpu(guest.qemu.pid())?;
        let watch = Watch::begin(&[&pids[..], &[guest.qemu.pid()]].concat());
        let device = Device::below(&self.lab.device_below(side.image)).watch();
        guest.wait_for("bench=end")?;
        let (used, seconds) = (watched.end()?.since(&before), began.elapsed().as_secs_f64());
        let qemu_s = usage::cpu(guest.qemu.pid())?
            .saturating_sub(qemu_before)
            .as_secs_f64();
        let activity = watch.since();
        let mut of_device = Metrics::new();
        device.add_to(&mut of_device);
        guest.wait_for("result=ok")?;
        let lines = guest.lines();
        let told = match &asked {
            Asked::Files(..) => sample(&lines),
            Asked::Disk(spec) => of_fio(&lines, spec),
        };
        let Some((told, mut report)) = told else {
            return Err(guest.failed("handed out no record that can be read"));
        };
        guest.qemu.wait(LIMIT)?;
        // The load's CPU is what it used inside.
        let client = (report.client_cpu_us_per_io, report.client_user_us_per_io);
        let ios = (report.reads + report.writes).max(1) as f64;
        used.tell(&pids, ios, ios, &mut report)?;
        (report.client_cpu_us_per_io, report.client_user_us_per_io) = client;
        let mut measured = sampling::figures(&[report], &pids)?;
        measured.meanwhile(&activity);
        measured.metrics.extend(of_device);
        let (earlier, later) = (Counted::at(&lines, "before"), Counted::at(&lines, "after"));
        let inside_s = (later.seconds - earlier.seconds).max(1e-2);
        let interrupts = later.interrupts.since(&earlier.interrupts);
        let percent =
            |of: fn(&Counted) -> f64| (of(&later) - of(&earlier)).max(0.0) / inside_s * 100.0;
        let busy = percent(|counted| counted.busy_s);
        let mb_s = measured
            .metrics
            .get(&Metric::MbS)
            .filter(|mb_s| **mb_s > 0.0);
        let per_mb = mb_s.map(|mb_s| (Metric::GuestPercentPerMb, busy / mb_s));
        measured.metrics.extend(per_mb);
        measured.metrics.extend([
            (Metric::GuestPercent, busy),
            (
                Metric::GuestUserPercent,
                percent(|counted| counted.modes_s.0),
            ),
            (
                Metric::GuestSystemPercent,
                percent(|counted| counted.modes_s.1),
            ),
            (Metric::EmulatorPercent, qemu_s / seconds.max(1e-3) * 100.0),
            (Metric::GuestInterrupts, interrupts.all() as f64 / ios),
        ]);
        let subject = Subject {
            specs: Vec::new(),
            servers: server.into_iter().collect(),
        };
        let mut sample = subject.finish(Ok(measured))?;
        sample.guest_interrupts = interrupts.rates(inside_s);
        sample.detail["specs"] = told.detail["specs"].clone();
        sample.detail["files"] = told.detail["files"].clone();
        let kernel = lines.iter().find_map(|line| line.strip_prefix("kernel="));
        sample.detail["guest"] = json!({ "kernel": kernel });
        Ok(sample)
    }

    /// Boots a guest with one disk that does what is asked.
    fn boot(
        &self,
        asked: &Asked,
        side: &Side,
        bus: Bus,
        targets: Option<&[Target]>,
        image: &Path,
        seed: u64,
    ) -> Result<Guest> {
        let Some(folder) = &self.options.guest else {
            return Err(Error::unsupported(
                "needs a guest: give --guest DIR, the folder that scripts/guest-build.sh prints",
            ));
        };
        let guest = Linux::at(folder)?;
        let turn = guest.take_turn(LIMIT)?;
        let work = self.lab.work();
        let initramfs = self.initramfs(&guest)?;
        let device = bus.device();
        let run = match asked {
            Asked::Files(files, mib) => format!(
                "dp.run=bench:{device} dp.ffsb={} dp.threads={} dp.mb={mib} dp.seconds={} dp.seed={seed}",
                files.scenario.name(),
                files.threads,
                self.options.duration.as_secs_f64()
            ),
            Asked::Disk(spec) => {
                let options = fio::arguments(spec)?;
                let options: Vec<_> = options.iter().map(|word| word.to_string_lossy()).collect();
                format!("dp.run=fio:{device} dp.fio={}", options.join(","))
            }
        };
        let (console, results) = (work.join("guest.console"), work.join("guest.results"));
        for port in [&console, &results] {
            let _ = fs::remove_file(port);
        }
        let mut command = guest.command(&Boot {
            // It has both buses.
            machine: "pc",
            cpus: None,
            memory_mib: 1024,
            initramfs: Some(&initramfs),
            console: &console,
            results: &results,
            parameters: &run,
        });
        attach(
            &mut command,
            bus,
            targets,
            side,
            image,
            self.lab.programs().direct,
        )?;
        let qemu = Process::start("guest", &mut command, work)?;
        Ok(Guest {
            qemu,
            results,
            console,
            until: Instant::now() + LIMIT + self.options.duration,
            _turn: turn,
        })
    }

    /// The guest's initramfs with this program in it, which is made once.
    fn initramfs(&self, guest: &Linux) -> Result<PathBuf> {
        let work = self.lab.work();
        let out = work.join("guest.initramfs");
        if out.exists() {
            return Ok(out);
        }
        // Without what only debuggers read, where there is a tool to leave it out.
        let program = work.join("guest.diskplane");
        let mut strip = Command::new("strip");
        strip
            .args(["--strip-debug", "-o"])
            .arg(&program)
            .arg(&self.options.diskplane);
        if !strip.output().is_ok_and(|output| output.status.success()) {
            fs::copy(&self.options.diskplane, &program)
                .context(|| self.options.diskplane.display().to_string())?;
        }
        let libraries = libraries();
        let libraries = libraries
            .iter()
            .filter_map(|path| Some((path.file_name()?.to_str()?, path.as_path())));
        let mut files: Vec<(&str, &Path)> = vec![("diskplane", &program)];
        files.extend(libraries);
        let part = work.join("guest.initramfs.part");
        initrd::with_files(&guest.initramfs(), &part, "dp", &files)?;
        fs::rename(&part, &out).context(|| out.display().to_string())?;
        Ok(out)
    }
}

/// The shared libraries of this process, which is the program that goes into the guest.
fn libraries() -> BTreeSet<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let paths = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]));
    let is_library = |path: &&str| path.contains(".so") && !path.contains("/ld-linux");
    paths.filter(is_library).map(PathBuf::from).collect()
}

/// Gives QEMU the disk: a socket's, or the image itself.
fn attach(
    command: &mut Command,
    bus: Bus,
    targets: Option<&[Target]>,
    side: &Side,
    image: &Path,
    direct: bool,
) -> Result<()> {
    match targets {
        Some([Target::VhostUser(socket), ..]) if bus == Bus::Virtio => {
            command
                .arg("-chardev")
                .arg(peer::joined(&[&"socket,id=c0,path=", &peer::value(socket)]))
                .args(["-device", "vhost-user-blk-pci,chardev=c0,num-queues=1"]);
            return Ok(());
        }
        Some([Target::Nbd(socket), ..]) => {
            let socket = Path::new(socket.trim_start_matches("unix:"));
            command.arg("-blockdev").arg(peer::joined(&[
                &"driver=nbd,node-name=d0,server.type=unix,server.path=",
                &peer::value(socket),
            ]));
        }
        Some(_) => {
            return Err(Error::unsupported(
                "a server of vhost-user-blk has no IDE disk",
            ));
        }
        None => {
            let direct = if side.direct && direct { "on" } else { "off" };
            let options = format!(
                "driver=file,node-name=f0,cache.direct={direct},aio={},filename=",
                side.engine
            );
            command
                .arg("-blockdev")
                .arg(peer::joined(&[&options, &peer::value(image)]))
                .arg("-blockdev")
                .arg(format!(
                    "driver={},node-name=d0,file=f0",
                    side.image.format.of_qemu()
                ));
        }
    }
    command.args(["-device", bus.model()]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_hands_out_is_read() {
        let told = Sample {
            cell: "random-reads-4".to_owned(),
            detail: json!({ "reports": [Report { reads: 7, iops: 3.5, ..Report::default() }] }),
            ..Sample::default()
        };
        let run = Record::Run(Box::default());
        let mut lines = vec!["boot_s=9.57".to_owned()];
        for record in [run, Record::Sample(Box::new(told))] {
            lines.push(format!(
                "file.records {}",
                serde_json::to_string(&record).unwrap()
            ));
        }
        for (when, seconds, busy, disk) in
            [("before", "10.50", 300, 5), ("after", "12.50", 500, 25)]
        {
            lines.push(format!("file.uptime.{when} {seconds} 3.00"));
            lines.push(format!("file.stat.{when} cpu  {busy} 0 0 77 0 0 0 0 0 0"));
            lines.push(format!("file.interrupts.{when}            CPU0"));
            lines.push(format!(
                "file.interrupts.{when}  14: {disk}  IO-APIC 14-edge ata_piix"
            ));
        }
        let (sample, report) = sample(&lines).unwrap();
        assert_eq!((&sample.cell[..], report.reads), ("random-reads-4", 7));
        let (before, after) = (Counted::at(&lines, "before"), Counted::at(&lines, "after"));
        assert_eq!(
            (after.seconds - before.seconds, after.busy_s - before.busy_s),
            (2.0, 2.0)
        );
        let user_s = after.modes_s.0 - before.modes_s.0;
        assert_eq!((user_s, after.modes_s.1), (2.0, 0.0));
        let interrupts = after.interrupts.since(&before.interrupts);
        assert_eq!(interrupts.all(), 20);
        assert_eq!(
            interrupts.rates(2.0),
            [("ata_piix".to_owned(), 10.0)].into()
        );
        assert!(super::sample(&lines[..2]).is_none());
    }

    #[test]
    fn what_fio_said_in_a_guest_is_read() {
        let report = r#"{"jobs": [{"jobname": "load", "error": 0, "usr_cpu": 10.0, "sys_cpu": 10.0, "sync": {},
"read": {"total_ios": 500, "io_bytes": 2048000, "iops": 250.0, "bw_bytes": 1024000, "runtime": 2000,
"lat_ns": {"bins": {"4000000": 500}}},
"write": {"total_ios": 0, "io_bytes": 0, "iops": 0.0, "bw_bytes": 0, "runtime": 0}}]}"#;
        let handed: Vec<String> = report
            .lines()
            .map(|line| format!("file.fio {line}"))
            .collect();
        let spec = Spec::new(Target::Nbd("x".into()));
        let (told, report) = of_fio(&handed, &spec).unwrap();
        assert_eq!(
            (report.reads, report.iops, report.seconds),
            (500, 250.0, 2.0)
        );
        assert_eq!(
            (
                report.latency.count,
                (report.latency.p50_us / 100.0).round()
            ),
            (500, 40.0)
        );
        // 20 % of a core for 4 ms a read.
        assert!((report.client_cpu_us_per_io - 800.0).abs() < 1e-6);
        assert_eq!(told.detail["specs"][0]["depth"], 32);
        assert!(of_fio(&handed[1..], &spec).is_none());
    }

    #[test]
    fn this_program_has_libraries_or_is_static() {
        assert!(libraries().iter().all(|path| path.is_file()));
    }
}
