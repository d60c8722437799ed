//! What an experiment works with: places, and the images in them. All of it lies below `DIR/work` and is gone afterwards.

use super::plan::{Format, Image, Place, State};
use crate::{
    machine::{
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
    disk_bytes: u64,
    /// Bytes by which an image may grow in a sample.
    pub growth: u64,
    /// What there is to put on each place at a time.
    needs: BTreeMap<Place, u64>,
    ready: BTreeSet<Place>,
    made: BTreeSet<Image>,
}

impl Lab {
    /// In `dir/work`; what an earlier run left there is removed, mounts and loop devices too.
    pub fn new(
        programs: &Programs,
        dir: &Path,
        disk_bytes: u64,
        growth: u64,
        images: &BTreeSet<Image>,
    ) -> Result<Self> {
        let mut lab = Self {
            programs: programs.clone(),
            work: Folder::create(dir.join("work"))?,
            disk_bytes,
            growth,
            needs: BTreeMap::new(),
            ready: BTreeSet::new(),
            made: BTreeSet::new(),
        };
        for image in images {
            *lab.needs.entry(image.place).or_default() += lab.host_bytes(*image);
        }
        Ok(lab)
    }

    pub fn work(&self) -> &Path {
        self.work.path()
    }

    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The folder of a place.
    pub fn folder(&self, place: Place) -> PathBuf {
        match place {
            Place::Here => self.work().to_owned(),
            Place::Ext4 => self.work().join("ext4"),
            Place::Xfs => self.work().join("xfs"),
        }
    }

    fn bytes(&self, image: Image) -> u64 {
        self.disk_bytes / u64::from(image.disks.max(1))
    }

    fn host_bytes(&self, image: Image) -> u64 {
        match image.state {
            // Random writes touch each of its blocks of 2 MiB before long.
            State::Growing if image.format == Format::Vhd => self.disk_bytes + (64 << 20),
            State::Growing => self.growth + (256 << 20),
            _ => self.disk_bytes + (self.disk_bytes >> 8) + (64 << 20),
        }
    }

    /// The files of an image; a growing one is made anew, others when they are first asked for.
    pub fn files(&mut self, image: Image, say: &mut dyn FnMut(&str)) -> Result<Vec<PathBuf>> {
        self.settle_place(image.place, say)?;
        let folder = self.folder(image.place);
        let name = format!(
            "{}-{:?}-{}",
            image.format.name(),
            image.state,
            image.disks.max(1)
        )
        .to_lowercase();
        let paths: Vec<PathBuf> = (0..image.disks.max(1))
            .map(|n| folder.join(format!("{name}-{n}.img")))
            .collect();
        let fresh = image.state == State::Growing;
        if self.made.contains(&image) && !fresh {
            return Ok(paths);
        }
        if !self.made.contains(&image) {
            self.room(&folder, self.host_bytes(image))?;
        }
        say(&format!(
            "making {} ({:?}) of {}",
            image.format.name(),
            image.state,
            size::human(self.bytes(image))
        ));
        for path in &paths {
            if path.exists() {
                remove_file(path).context(|| path.display().to_string())?;
            }
            self.make(image, path)?;
        }
        self.made.insert(image);
        Ok(paths)
    }

    /// Removes images that are not needed any more.
    pub fn keep_only(&mut self, later: &BTreeSet<Image>) {
        let gone: Vec<Image> = self.made.difference(later).copied().collect();
        for image in gone {
            self.made.remove(&image);
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
                    "{} has {} free, this needs {}",
                    folder.display(),
                    size::human(free),
                    size::human(need + spare)
                ),
            ));
        }
        Ok(())
    }

    /// Has a place's file system made and mounted.
    fn settle_place(&mut self, place: Place, say: &mut dyn FnMut(&str)) -> Result<()> {
        let kind = match place {
            Place::Here => return Ok(()),
            Place::Ext4 => "ext4",
            Place::Xfs => "xfs",
        };
        if self.ready.contains(&place) {
            return Ok(());
        }
        let bytes = self.needs.get(&place).copied().unwrap_or_default() + FILE_SYSTEM;
        self.room(self.work(), bytes)?;
        say(&format!(
            "making {kind} of {} on a loop device",
            size::human(bytes)
        ));
        let file = self.work().join(format!("{kind}.loop"));
        let named = || file.display().to_string();
        let loop_file = File::create(&file).context(named)?;
        // Blocks that are there: else each write of a sample would have the host's file system find some first.
        rustix::fs::fallocate(
            &loop_file,
            rustix::fs::FallocateFlags::empty(),
            0,
            bytes.next_multiple_of(1 << 20),
        )
        .map_err(std::io::Error::from)
        .context(named)?;
        drop(loop_file);
        let device = mount::attach(&file)?;
        mount::mount_new(&device, kind, &self.folder(place))?;
        self.ready.insert(place);
        Ok(())
    }

    fn make(&self, image: Image, path: &Path) -> Result<()> {
        let bytes = self.bytes(image);
        let format = image.format.name();
        let mut options: Vec<&str> = vec!["create", "-q", "-f", format];
        match (image.format, image.state) {
            // It has no such option; a growing file is the nearest thing.
            (Format::Vhd | Format::Qed, State::Falloc | State::Zeroed) => {
                return Err(Error::unsupported(format!(
                    "{format} images cannot be preallocated"
                )));
            }
            (_, State::Falloc) => options.extend(["-o", "preallocation=falloc"]),
            (_, State::Zeroed) => options.extend(["-o", "preallocation=full"]),
            _ => {}
        }
        let mut command = Command::new(&self.programs.diskplane);
        command.args(options).arg(path).arg(bytes.to_string());
        let mut process = Process::start("create", &mut command, self.work())?;
        let status = process.wait(LIMIT)?;
        if !status.success() {
            return Err(process.failed(&format!("failed ({status})")));
        }
        if image.state != State::Full {
            return Ok(());
        }
        // Through diskplane, so that an image's clusters lie in order.
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
