//! What an experiment works with: places, and the images in them. All of it lies below `DIR/work` and is gone afterwards.

use super::plan::{Format, Image, Medium, Place, State, System};
use crate::{
    machine::{
        file::preallocate,
        given::Given,
        mount,
        process::{Folder, Process, remove_file},
    },
    peer::{self, Programs, Setup},
    sampling,
    versus::cell::{Polling, Server},
};
use block::{Context, Error, ErrorKind, Result, size};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// What simulated flash does: slow enough that the devices are what limits, on any host.
const FLASH: [&str; 8] = [
    "--model",
    "flash",
    "--read-us",
    "500",
    "--write-us",
    "500",
    "--channels",
    "1",
];
/// The rotating disk: with so small a write cache that a sample of half a second sees the platter.
const ROTATING: [&str; 4] = ["--model", "hdd-7200", "--write-cache", "1M"];
/// Sizes of devices: a chunk of each of eight.
const DEVICE_GRAIN: u64 = 1 << 20;
/// Bytes that stay free on the host.
const SPARE: u64 = 2 << 30;
/// How long making an image may take.
const LIMIT: Duration = Duration::from_secs(900);
/// What a file system on a loop device needs for itself.
const FILE_SYSTEM: u64 = 512 << 20;

/// Places and images.
#[derive(Debug)]
pub(super) struct Lab {
    programs: Programs,
    work: Folder,
    /// Simulated devices, by place; after the folder, whose end unmounts them.
    devices: BTreeMap<Place, Process>,
    /// What the user gave instead of files of ours below file systems, and what is on it now.
    given: Option<(Given, Option<Place>)>,
    /// The block device of [`System::Device`].
    bare: Option<PathBuf>,
    /// Parts of devices that several disks are, as loop devices, by the image.
    parts: BTreeMap<Image, Vec<PathBuf>>,
    disk_bytes: u64,
    /// Bytes by which an image may grow in a sample.
    pub growth: u64,
    /// What there is to put on each place at a time.
    needs: BTreeMap<Place, u64>,
    ready: BTreeSet<Place>,
    /// File systems that were made in images, by the image's file.
    pub formatted: BTreeSet<PathBuf>,
    made: BTreeSet<Image>,
}

impl Lab {
    /// In `dir/work`; what an earlier run left there is removed, mounts and loop devices too. `images` are those of each cell.
    pub fn new(
        programs: &Programs,
        dir: &Path,
        (disk_bytes, growth): (u64, u64),
        images: &[BTreeSet<Image>],
        given: Option<Given>,
    ) -> Result<Self> {
        let mut lab = Self {
            programs: programs.clone(),
            work: Folder::create(dir.join("work"))?,
            devices: BTreeMap::new(),
            given: given.map(|given| (given, None)),
            bare: None,
            parts: BTreeMap::new(),
            disk_bytes,
            growth,
            needs: BTreeMap::new(),
            ready: BTreeSet::new(),
            formatted: BTreeSet::new(),
            made: BTreeSet::new(),
        };
        lab.needs = lab.most(images);
        Ok(lab)
    }

    /// The most that lies on each place at a time: an image from the first cell that has it to the last one.
    fn most(&self, cells: &[BTreeSet<Image>]) -> BTreeMap<Place, u64> {
        let mut most: BTreeMap<Place, u64> = BTreeMap::new();
        for n in 0..cells.len() {
            let (before, later) = (cells[..=n].iter().flatten(), cells[n..].iter().flatten());
            let later: BTreeSet<Image> = later.copied().collect();
            let there: BTreeSet<Image> = before.copied().filter(|i| later.contains(i)).collect();
            let mut now: BTreeMap<Place, u64> = BTreeMap::new();
            for image in there {
                *now.entry(image.place).or_default() += self.host_bytes(image);
            }
            for (place, bytes) in now {
                let own = most.entry(place).or_default();
                *own = bytes.max(*own);
            }
        }
        most
    }

    pub fn work(&self) -> &Path {
        self.work.path()
    }

    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The folder of a place, or the block device that it is.
    pub fn folder(&self, place: Place) -> PathBuf {
        match (place.medium, place.system) {
            (_, System::Device) => self.bare.clone().unwrap_or_else(|| self.work().to_owned()),
            (Medium::Own, System::None) => self.work().to_owned(),
            (_, System::None) => self.device_folder(place).join("device/mount"),
            _ => self.work().join(place.name()),
        }
    }

    fn device_folder(&self, place: Place) -> PathBuf {
        self.work().join(format!("{}.device", place.name()))
    }

    /// Bytes of each disk of an image.
    pub fn bytes(&self, image: Image) -> u64 {
        self.disk_bytes / u64::from(image.disks.max(1))
    }

    /// Whether the file is there already, since it is the device.
    pub fn is_device(place: Place) -> bool {
        place.system == System::Device
            || place.medium != Medium::Own && place.system == System::None
    }

    fn host_bytes(&self, image: Image) -> u64 {
        match image.state {
            _ if image.format == Format::Null => 0,
            // Random writes touch each of its blocks of 2 MiB before long.
            State::Growing if image.format == Format::Vhd => self.disk_bytes + (64 << 20),
            // All of a disk of the device's size.
            _ if Self::is_device(image.place) => self.disk_bytes,
            State::Growing | State::Hollow => self.growth + (256 << 20),
            State::Overlay => self.growth + self.disk_bytes + (256 << 20),
            _ => self.disk_bytes + (self.disk_bytes >> 8) + (64 << 20),
        }
    }

    /// The files of an image; a growing one is made anew, others when they are first asked for.
    pub fn files(&mut self, image: Image, say: &mut dyn FnMut(&str)) -> Result<Vec<PathBuf>> {
        if image.format == Format::Null {
            return Ok(Vec::new());
        }
        self.settle_place(image.place, say)?;
        let folder = self.folder(image.place);
        let name = format!(
            "{}-{:?}-{}",
            image.format.name(),
            image.state,
            image.disks.max(1)
        )
        .to_lowercase();
        let paths: Vec<PathBuf> = match image.place.system {
            _ if image.disks > 1 && Self::is_device(image.place) => self.parts(image)?,
            System::Device => vec![folder.clone()],
            _ if Self::is_device(image.place) => vec![folder.join("disk")],
            _ => (0..image.disks.max(1))
                .map(|n| folder.join(format!("{name}-{n}.img")))
                .collect(),
        };
        if self.made.contains(&image) && image.stays() {
            return Ok(paths);
        }
        // A device is as large as it is.
        if !self.made.contains(&image) && !Self::is_device(image.place) {
            self.room(&folder, self.host_bytes(image))?;
        }
        say(&format!(
            "making {} ({:?}) of {}",
            image.format.name(),
            image.state,
            size::human(self.bytes(image))
        ));
        for path in &paths {
            if !Self::is_device(image.place) && path.exists() {
                remove_file(path).context(|| path.display().to_string())?;
            }
            self.formatted.remove(path);
            self.make(image, path)?;
        }
        self.made.insert(image);
        Ok(paths)
    }

    /// Each disk's part of a device. They end with the folder, for what they are attached to lies in it.
    fn parts(&mut self, image: Image) -> Result<Vec<PathBuf>> {
        if let Some(parts) = self.parts.get(&image) {
            return Ok(parts.clone());
        }
        let file = match image.place.medium {
            Medium::Own if self.given.is_some() => {
                return Err(Error::unsupported(
                    "--device is one disk here: without it, files in --out stand for several",
                ));
            }
            Medium::Own => self.loop_file(&image.place.name()),
            _ => self.folder(image.place).join("disk"),
        };
        let bytes = self.bytes(image);
        let mut parts = Vec::new();
        for n in 0..u64::from(image.disks) {
            match mount::attach_part(&file, Some((n * bytes, bytes))) {
                Ok(part) => parts.push(part),
                Err(error) => {
                    for part in parts {
                        let detached = mount::detach(&part);
                        tracing::debug!("{}: {detached:?}", part.display());
                    }
                    return Err(error);
                }
            }
        }
        self.parts.insert(image, parts.clone());
        Ok(parts)
    }

    /// What is looked at for the work of the device below an image: of parts of a device of ours, what its file lies on.
    pub fn device_below(&self, image: Image) -> PathBuf {
        match (image.place.medium, image.place.system) {
            (Medium::Own, System::Device) if image.disks > 1 => self.work().to_owned(),
            _ => self.folder(image.place),
        }
    }

    /// Whether an image is there, and stays.
    pub fn has(&self, image: Image) -> bool {
        image.format == Format::Null || image.stays() && self.made.contains(&image)
    }

    /// Removes images that are not needed any more.
    pub fn keep_only(&mut self, later: &BTreeSet<Image>) {
        let gone: Vec<Image> = self.made.difference(later).copied().collect();
        for image in gone {
            self.made.remove(&image);
            if Self::is_device(image.place) {
                continue;
            }
            let prefix = format!(
                "{}-{:?}-{}-",
                image.format.name(),
                image.state,
                image.disks.max(1)
            )
            .to_lowercase();
            for entry in fs::read_dir(self.folder(image.place))
                .into_iter()
                .flatten()
                .flatten()
            {
                if entry.file_name().to_string_lossy().starts_with(&prefix)
                    && let Err(error) = remove_file(&entry.path())
                {
                    tracing::warn!("{}: cannot be removed: {error}", entry.path().display());
                }
            }
        }
    }

    fn room(&self, folder: &Path, need: u64) -> Result<()> {
        let stat = rustix::fs::statvfs(folder)
            .map_err(std::io::Error::from)
            .context(|| folder.display().to_string())?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        let spare = match folder == self.work() {
            true => SPARE,
            false => 0,
        };
        if free < need + spare {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "{} has {} free, this needs {}: give --out a folder with more, or a smaller --disk",
                    folder.display(),
                    size::human(free),
                    size::human(need + spare)
                ),
            ));
        }
        Ok(())
    }

    /// Has a place's device and file system made and mounted.
    fn settle_place(&mut self, place: Place, say: &mut dyn FnMut(&str)) -> Result<()> {
        if place == Place::HERE || self.ready.contains(&place) {
            return Ok(());
        }
        let kind = match place.system {
            System::NfsExt4 | System::NfsXfs => return Err(without_nfs()),
            System::Ext4 => "ext4",
            System::Xfs => "xfs",
            System::None | System::Device => "",
        };
        let own = if kind.is_empty() { 0 } else { FILE_SYSTEM };
        let bytes = self.needs.get(&place).copied().unwrap_or_default() + own;
        let bytes = bytes.next_multiple_of(DEVICE_GRAIN);
        if let Some((given, _)) = &self.given
            && place.medium == Medium::Own
        {
            given.has_room(bytes)?;
            let path = given.path.clone();
            say(&format!("making {} on {}", place.name(), path.display()));
            self.vacate()?;
            if let Some((given, there)) = &mut self.given {
                given.is_written()?;
                *there = Some(place);
                if !kind.is_empty() {
                    given.lend();
                }
            }
            return self.occupy(place, kind, path);
        }
        self.room(self.work(), bytes)?;
        say(&format!(
            "making {} of {}",
            place.name(),
            size::human(bytes)
        ));
        let file = match place.medium {
            Medium::Own => self.preallocated(&place.name(), bytes)?,
            medium => self.device(place, medium, bytes)?,
        };
        let device = match place.system {
            System::None => file,
            _ => mount::attach(&file)?,
        };
        self.occupy(place, kind, device)
    }

    /// Makes a place of a device: a file system on it, where there is to be one.
    fn occupy(&mut self, place: Place, kind: &str, device: PathBuf) -> Result<()> {
        if !kind.is_empty() {
            mount::make(&device, kind)?;
            mount::mount(&device, kind, &self.folder(place), true)?;
        } else if place.system == System::Device {
            self.bare = Some(device);
        }
        self.ready.insert(place);
        Ok(())
    }

    /// Takes away what is on the given device.
    fn vacate(&mut self) -> Result<()> {
        let Some((_, Some(place))) = self.given else {
            return Ok(());
        };
        let folder = self.folder(place);
        self.ready.remove(&place);
        self.made.retain(|image| image.place != place);
        self.formatted.retain(|file| !file.starts_with(&folder));
        if place.system != System::Device {
            // It may not have come to that.
            let mounted = mount::unmount(&folder);
            tracing::debug!("{}: {mounted:?}", folder.display());
        }
        match &mut self.given {
            // What could not be taken away is tried again, before the next place and at the end.
            Some((given, there)) => {
                given.take_back()?;
                *there = None;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// A file whose blocks are there: else each write of a sample would have the host's file system find some first.
    fn preallocated(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.loop_file(name);
        preallocate(&path, bytes)?;
        Ok(path)
    }

    fn loop_file(&self, name: &str) -> PathBuf {
        self.work().join(format!("{name}.loop"))
    }

    /// A simulated device: a process of its own, whose CPU time is not the server's nor the load's.
    fn device(&mut self, place: Place, medium: Medium, bytes: u64) -> Result<PathBuf> {
        let mut command = Command::new(&self.programs.diskplane);
        command.args(["bench", "device", "--size", &bytes.to_string()]);
        match medium {
            Medium::Striped(members) => command
                .args(["--members", &members.to_string()])
                .args(FLASH),
            _ => command.args(ROTATING),
        };
        command.arg(self.device_folder(place));
        let name = format!("device-{}", place.name());
        let mut process = Process::start(&name, &mut command, self.work())?;
        process.wait_ready(|process| process.stdout().ends_with('\n'))?;
        self.devices.insert(place, process);
        Ok(self.device_folder(place).join("device/mount/disk"))
    }

    fn make(&self, image: Image, path: &Path) -> Result<()> {
        let bytes = self.bytes(image);
        let format = image.format.name();
        if Self::is_device(image.place) {
            return match (image.format, image.state) {
                (Format::Raw, State::Full) => self.fill(path, "raw", bytes),
                _ => Err(Error::unsupported(format!(
                    "a device without a file system has no {format} image"
                ))),
            };
        }
        let mut options: Vec<&str> = vec!["create", "-q", "-f", format];
        match (image.format, image.state) {
            // It has no such option; a growing file is the nearest thing.
            (Format::Vhd | Format::Qed, State::Falloc | State::Filled | State::Zeroed) => {
                return Err(Error::unsupported(format!(
                    "{format} images cannot be preallocated"
                )));
            }
            (_, State::Falloc | State::Filled) => options.extend(["-o", "preallocation=falloc"]),
            (_, State::Zeroed) => options.extend(["-o", "preallocation=full"]),
            _ => {}
        }
        let mut command = Command::new(&self.programs.diskplane);
        command.args(options);
        if let Some(base) = self.base(image) {
            if !base.exists() {
                let file = File::create(&base).context(|| base.display().to_string())?;
                file.set_len(bytes).context(|| base.display().to_string())?;
                if image.state == State::Overlay {
                    self.fill(&base, "raw", bytes)?;
                }
            }
            command.arg("-b").arg(base).args(["-F", "raw"]);
        }
        command.arg(path).arg(bytes.to_string());
        let mut process = Process::start("create", &mut command, self.work())?;
        let status = process.wait(LIMIT)?;
        if !status.success() {
            return Err(process.failed(&format!("failed ({status})")));
        }
        if !matches!(image.state, State::Full | State::Filled) {
            return Ok(());
        }
        self.fill(path, format, bytes)
    }

    /// The raw file below an overlay.
    pub fn base(&self, image: Image) -> Option<PathBuf> {
        let name = match image.state {
            State::Overlay => "base-full.raw",
            State::Hollow => "base-empty.raw",
            _ => return None,
        };
        Some(self.folder(image.place).join(name))
    }

    /// Writes all of it through diskplane, so that an image's clusters lie in order.
    fn fill(&self, path: &Path, format: &str, bytes: u64) -> Result<()> {
        let files = [path.to_owned()];
        let setup = Setup {
            server: Server::Diskplane,
            files: &files,
            format,
            backing: None,
            engine: "auto",
            queues: 1,
            io_threads: 1,
            polling: Polling::Default,
            direct: self.programs.direct,
            drops_flushes: false,
            writethrough: false,
            read_only: false,
            shared: false,
            table_cache: None,
            table_entry: None,
        };
        let server = peer::start(&self.programs, self.work(), &setup)?;
        let Some(target) = server.targets.first() else {
            return Err(Error::invalid("no target"));
        };
        let filled = sampling::fill(target, bytes);
        if let Err(error) = filled {
            return Err(server.failed(&error));
        }
        server.stop().map(drop)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.vacate() {
            tracing::warn!("{error}");
        }
    }
}

/// Why there are no rows on NFS.
fn without_nfs() -> Error {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let known = known.lines().any(|line| line.trim().ends_with("nfs4"));
    Error::unsupported(match known {
        false => {
            "not here: this kernel has no NFS; a client in user space (libnfs through FUSE) has neither O_DIRECT nor the request sizes of the \
             kernel's, which the rows are about"
        }
        true => {
            "not here: NFS servers are not set up by diskplane; mount one, and give --out a folder on it for the rows without it"
        }
    })
}
