//! The images of a run: made when first needed, new ones for each sample where writes make them grow.

use super::{
    cell::Image,
    half,
    process::{Folder, Process, remove_file},
    scattered::{self, Scattered},
    table::{SCATTER, SPARSE_SCATTER},
};
use crate::{
    load::Target,
    machine::{device::settle, file::preallocate},
    sampling,
};
use block::{Context, Error, ErrorKind, Result, size};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Bytes that must stay free on the host.
pub(super) const SPARE: u64 = 2 << 30;
const TOOL_LIMIT: Duration = Duration::from_secs(120);

/// Sizes of the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Sizes {
    /// Bytes of the full raw file and of the full qcow2 image.
    pub full: u64,
    /// Bytes of the base of overlays.
    pub base: u64,
    /// Bytes of each of several disks.
    pub several: u64,
    /// Bytes by which an image may grow in a sample.
    pub growth: u64,
    /// Bytes of the disk that is converted, half of which are data.
    pub half: u64,
    /// Bytes of the disk that is compressed, half of which are data.
    pub pack: u64,
    /// Virtual size of the image whose tables commands read, every 64th cluster of which is allocated.
    pub sparse: u64,
}

/// Virtual size of an image that grows.
pub const GROWING: u64 = 64 << 30;
/// Bytes of each of many small disks.
const SMALL: u64 = 1 << 20;

const SCATTERED: Scattered = Scattered {
    virtual_bytes: 1 << 40,
    cluster_bytes: 64 << 10,
    every: SCATTER,
};

impl Sizes {
    /// Of a full run.
    pub const FULL: Self = Self {
        full: 4 << 30,
        base: 8 << 30,
        several: 256 << 20,
        growth: 4 << 30,
        half: 8 << 30,
        pack: 1 << 30,
        sparse: 1 << 40,
    };
    /// Of a quick one.
    pub const QUICK: Self = Self {
        full: 1 << 30,
        base: 2 << 30,
        several: 64 << 20,
        growth: 1 << 30,
        half: 1 << 30,
        pack: 128 << 20,
        sparse: 64 << 30,
    };
}

impl Image {
    /// Its format.
    pub fn format(self) -> &'static str {
        match self {
            Self::Qcow2
            | Self::Growing
            | Self::Overlay
            | Self::Subclusters
            | Self::Scattered
            | Self::HalfQcow2
            | Self::Sparse => "qcow2",
            _ => "raw",
        }
    }

    /// Whether each sample gets a new one.
    pub fn fresh(self) -> bool {
        matches!(
            self,
            Self::Growing | Self::Unwritten | Self::Overlay | Self::Subclusters
        )
    }

    /// Disks that it is.
    pub fn disks(self) -> usize {
        match self {
            Self::Several(n) | Self::Many(n) => usize::from(n),
            _ => 1,
        }
    }

    /// The image whose files it needs; itself where it has its own.
    fn files(self) -> Self {
        match self {
            Self::ScatteredFile => Self::Scattered,
            other => other,
        }
    }

    /// Whether it may be kept for the next run.
    fn reusable(self) -> bool {
        matches!(self, Self::Raw | Self::Qcow2 | Self::Base)
    }

    /// What has to be there besides it.
    pub fn needs(self) -> Vec<Self> {
        match self {
            Self::Null => Vec::new(),
            Self::Overlay | Self::Subclusters => vec![Self::Base, self],
            Self::HalfQcow2 => vec![Self::HalfRaw, self],
            other => vec![other.files()],
        }
    }

    /// Bytes of the host that it takes.
    pub fn host_bytes(self, sizes: &Sizes) -> u64 {
        match self {
            Self::Null => 0,
            Self::Raw | Self::Qcow2 => sizes.full + (sizes.full >> 8),
            Self::Base => sizes.base,
            Self::Several(n) => u64::from(n) * sizes.several,
            Self::Many(n) => u64::from(n) * SMALL,
            Self::Scattered | Self::ScatteredFile | Self::Sparse => scattered::DATA,
            Self::HalfRaw | Self::HalfQcow2 => sizes.half / 2 + (64 << 20),
            Self::PackRaw => sizes.pack,
            // Reservations ahead and metadata on top of what is written.
            Self::Growing | Self::Unwritten | Self::Overlay | Self::Subclusters => {
                sizes.growth + (256 << 20)
            }
        }
    }

    /// First byte and length of the range that a load uses; without one, all of the disk.
    pub fn range(self, sizes: &Sizes) -> (u64, Option<u64>) {
        match self {
            Self::ScatteredFile => (scattered::DATA, None),
            Self::Base => (0, Some(sizes.full)),
            _ => (0, None),
        }
    }
}

/// The images that are there.
#[derive(Debug)]
pub(super) struct Images {
    diskplane: PathBuf,
    sizes: Sizes,
    /// Kept ones.
    dir: PathBuf,
    keep: bool,
    work: Folder,
}

impl Images {
    pub(super) fn new(diskplane: &Path, dir: &Path, keep: bool, sizes: Sizes) -> Result<Self> {
        Ok(Self {
            diskplane: diskplane.to_owned(),
            sizes,
            dir: dir.to_owned(),
            keep,
            work: Folder::create(dir.join("work"))?,
        })
    }

    pub(super) fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// Where everything temporary lies.
    pub(super) fn work(&self) -> &Path {
        self.work.path()
    }

    fn folder(&self, image: Image) -> &Path {
        if self.keep && image.reusable() {
            &self.dir
        } else {
            self.work.path()
        }
    }

    /// The files of an image.
    pub(super) fn paths(&self, image: Image) -> Vec<PathBuf> {
        let folder = self.folder(image);
        let one = |name: &str| vec![folder.join(name)];
        match image.files() {
            Image::Null => Vec::new(),
            Image::Raw => one(&format!("full-{}.raw", self.sizes.full)),
            Image::Qcow2 => one(&format!("full-{}.qcow2", self.sizes.full)),
            Image::Base => one(&format!("base-{}.raw", self.sizes.base)),
            Image::Growing => one("growing.qcow2"),
            Image::Unwritten => one("unwritten.raw"),
            Image::Overlay => one("overlay.qcow2"),
            Image::Subclusters => one("subclusters.qcow2"),
            Image::Scattered | Image::ScatteredFile => one("scattered.qcow2"),
            Image::Sparse => one("sparse.qcow2"),
            Image::HalfRaw => one("half.raw"),
            Image::PackRaw => one("pack.raw"),
            Image::HalfQcow2 => one("half.qcow2"),
            Image::Several(_) => (0..image.disks())
                .map(|n| folder.join(format!("disk-{n}.raw")))
                .collect(),
            Image::Many(_) => (0..image.disks())
                .map(|n| folder.join(format!("small-{n}.raw")))
                .collect(),
        }
    }

    /// Makes what a cell needs and is not there yet. An error of the kind [`ErrorKind::NoSpace`] when the host has
    /// no room for it.
    pub(super) fn prepare(&self, images: &[Image], mut say: impl FnMut(&str)) -> Result<()> {
        let missing: Vec<Image> = images
            .iter()
            .copied()
            .filter(|image| image.fresh() || !self.paths(*image).iter().all(|path| path.exists()))
            .collect();
        // Of the fresh ones, one is there at a time.
        let lasting = missing.iter().filter(|image| !image.fresh());
        let lasting: u64 = lasting.map(|image| image.host_bytes(&self.sizes)).sum();
        let passing = missing.iter().filter(|image| image.fresh());
        let passing = passing.map(|image| image.host_bytes(&self.sizes)).max();
        let need = lasting + passing.unwrap_or(0) + SPARE;
        let free = self.free()?;
        if free < need {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "{} has {} free, this needs {}",
                    self.dir.display(),
                    size::human(free),
                    size::human(need)
                ),
            ));
        }
        for image in missing.into_iter().filter(|image| !image.fresh()) {
            let name = serde_json::to_value(image).unwrap_or_default();
            say(&format!("making the image {name}"));
            self.make(image)?;
        }
        Ok(())
    }

    pub(super) fn free(&self) -> Result<u64> {
        let stat = rustix::fs::statvfs(self.work.path())
            .map_err(std::io::Error::from)
            .context(|| self.dir.display().to_string())?;
        Ok(stat.f_bavail * stat.f_frsize)
    }

    /// Waits until the device has digested what came before, so that no sample pays for the one before it.
    pub(super) fn settle(&self) -> Result<()> {
        settle(self.work.path())
    }

    /// Removes an image's files, unless they are to be kept.
    pub(super) fn remove(&self, image: Image) {
        if self.keep && image.reusable() {
            return;
        }
        for path in self.paths(image) {
            if let Err(error) = remove_file(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!("{}: cannot be removed: {error}", path.display());
            }
        }
    }

    /// Makes a new image for a sample, or finds the one that is there.
    pub(super) fn files(&self, image: Image) -> Result<Vec<PathBuf>> {
        let paths = self.paths(image);
        if image.fresh() {
            self.remove(image);
            let path = &paths[0];
            match image {
                Image::Growing => self.create(path, &["-f", "qcow2"], Some(GROWING))?,
                Image::Unwritten => preallocate(path, self.sizes.growth)?,
                Image::Overlay => self.create_overlay(path, false)?,
                _ => self.create_overlay(path, true)?,
            }
        }
        Ok(paths)
    }

    /// The base of an overlay, for those that have to be told.
    pub(super) fn base(&self) -> PathBuf {
        self.paths(Image::Base).swap_remove(0)
    }

    fn create_overlay(&self, path: &Path, subclusters: bool) -> Result<()> {
        let base = self.base();
        let base = base.to_string_lossy();
        let backing = ["-f", "qcow2", "-b", &base, "-F", "raw"];
        let can = self.run(&["create", "-f", "qcow2", "-o", "help"], path)?;
        let options: &[&str] = match (subclusters, can.contains("extended_l2")) {
            (true, true) => &["-o", "extended_l2=on"],
            (true, false) => {
                return Err(Error::unsupported("diskplane has no subclusters yet"));
            }
            (false, true) => &["-o", "extended_l2=off,cluster_size=64K"],
            (false, false) => &["-o", "cluster_size=64K"],
        };
        self.create(path, &[&backing[..], options].concat(), None)
    }

    fn create(&self, path: &Path, options: &[&str], size: Option<u64>) -> Result<()> {
        let mut args = vec!["create"];
        args.extend(options);
        let size = size.map(|size| size.to_string());
        let mut command = Command::new(&self.diskplane);
        command.args(args).arg(path).args(size);
        self.finish("create", command).map(drop)
    }

    fn run(&self, args: &[&str], path: &Path) -> Result<String> {
        let mut command = Command::new(&self.diskplane);
        command.args(args).arg(path);
        self.finish("diskplane", command)
    }

    fn finish(&self, name: &str, mut command: Command) -> Result<String> {
        let mut process = Process::start(name, &mut command, self.work.path())?;
        let status = process.wait(TOOL_LIMIT)?;
        if !status.success() {
            return Err(process.failed(&format!("failed ({status})")));
        }
        Ok(process.stdout())
    }

    fn make(&self, image: Image) -> Result<()> {
        match image {
            Image::Raw => self.make_raw(&self.paths(image)[0], self.sizes.full),
            Image::Base => self.make_raw(&self.paths(image)[0], self.sizes.base),
            Image::Several(_) => self
                .paths(image)
                .iter()
                .try_for_each(|path| self.make_raw(path, self.sizes.several)),
            Image::Many(_) => self
                .paths(image)
                .iter()
                .try_for_each(|path| self.make_raw(path, SMALL)),
            Image::Qcow2 => self.make_qcow2(&self.paths(image)[0]),
            Image::Scattered | Image::ScatteredFile => {
                SCATTERED.create(&self.paths(Image::Scattered)[0])
            }
            Image::Sparse => {
                let shape = Scattered {
                    virtual_bytes: self.sizes.sparse,
                    every: SPARSE_SCATTER,
                    ..SCATTERED
                };
                shape.create(&self.paths(image)[0])
            }
            Image::HalfRaw => half::create(&self.paths(image)[0], self.sizes.half),
            Image::PackRaw => half::create(&self.paths(image)[0], self.sizes.pack),
            Image::HalfQcow2 => {
                let source = self.paths(Image::HalfRaw).swap_remove(0);
                let source = source.to_string_lossy();
                let args = ["convert", "-q", "-f", "raw", "-O", "qcow2", &source];
                self.run(&args, &self.paths(image)[0]).map(drop)
            }
            Image::Null
            | Image::Growing
            | Image::Unwritten
            | Image::Overlay
            | Image::Subclusters => Ok(()),
        }
    }

    /// A file that is written from end to end: no hole, no block that was allocated but never written.
    fn make_raw(&self, path: &Path, bytes: u64) -> Result<()> {
        let part = self.part(path);
        let named = || part.display().to_string();
        preallocate(&part, bytes)?;
        let target = Target::File {
            path: part.clone(),
            engine: "io_uring".into(),
            direct: true,
        };
        sampling::fill(&target, bytes).or_else(|_| {
            // Where the file system has no O_DIRECT, or the kernel no io_uring.
            let target = Target::File {
                path: part.clone(),
                engine: "threads".into(),
                direct: false,
            };
            sampling::fill(&target, bytes)
        })?;
        fs::rename(&part, path).context(named)
    }

    /// A qcow2 image that diskplane wrote from end to end.
    fn make_qcow2(&self, path: &Path) -> Result<()> {
        let part = self.part(path);
        if part.exists() {
            remove_file(&part).context(|| part.display().to_string())?;
        }
        self.create(&part, &["-f", "qcow2"], Some(self.sizes.full))?;
        let socket = self.work.path().join("fill.sock");
        let mut command = Command::new(&self.diskplane);
        command
            .arg("serve")
            .arg(&part)
            .args(["--cache", "none", "--vhost-user"])
            .arg(&socket);
        let mut server = Process::start("fill", &mut command, self.work.path())?;
        server.wait_ready(|server| server.stdout().ends_with('\n'))?;
        sampling::fill(&Target::VhostUser(socket), self.sizes.full)?;
        server.stop()?;
        fs::rename(&part, path).context(|| part.display().to_string())
    }

    /// A file under work has another name until it is whole.
    fn part(&self, path: &Path) -> PathBuf {
        path.file_name().map_or_else(PathBuf::new, |name| {
            self.work.path().join(name).with_extension("part")
        })
    }
}
