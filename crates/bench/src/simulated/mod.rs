//! Block devices that are models: a rotating disk, a flash drive with a known service time, and RAID0 over several of
//! either. A model says when a request ends; the bytes lie in files.
//!
//! ```text
//!   diskplane · QEMU · fio · losetup      any program, O_DIRECT or not
//!      │  read, write, fsync
//!   DIR/device/mount/disk                 one file of a FUSE file system         (fuse)
//!      │                                  bytes move at once, the answer waits   (clock)
//!   Array                                 RAID0: whose piece is it               (array)
//!      │
//!   Spindle | Flash                       when does it end                       (spindle, flash)
//! ```
//!
//! The models know neither threads nor clocks: they are told the time ([`Nanos`] since they began) and say when something
//! happens next, so that tests run them in virtual time. What is written is as durable as the page cache of the host: such a
//! device is for measuring.

mod array;
mod clock;
mod drive;
mod flash;
mod fuse;
mod mounted;
mod spindle;
mod write_cache;

pub use array::{Array, Pieces};
pub use clock::Kept;
pub use drive::Drive;
pub use flash::Flash;
pub use mounted::Mounted;
pub use spindle::Spindle;

use block::{Error, Result};
use std::time::Duration;

/// Nanoseconds since a device began.
pub type Nanos = u64;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Bytes come from the device.
    Read,
    /// Bytes go to it.
    Write,
    /// All that was acknowledged before becomes durable.
    Flush,
}

/// A request to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// By which its end is told.
    pub id: u64,
    /// What it does.
    pub op: Op,
    /// First byte.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// A request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Done {
    /// When.
    pub at: Nanos,
    /// Which.
    pub id: u64,
}

/// One device.
#[derive(Debug)]
pub enum Device {
    /// A rotating disk.
    Spindle(Box<Spindle>),
    /// A flash drive.
    Flash(Flash),
}

impl Device {
    /// Takes a request at `now`, which is not before any time that it was told.
    pub fn submit(&mut self, now: Nanos, request: Request) {
        match self {
            Self::Spindle(device) => device.submit(now, request),
            Self::Flash(device) => device.submit(now, request),
        }
    }

    /// When something happens next, if nothing is submitted until then.
    pub fn next(&self) -> Option<Nanos> {
        match self {
            Self::Spindle(device) => device.next(),
            Self::Flash(device) => device.next(),
        }
    }

    /// Lets the time become `now`; what ended until then is added to `done`, in the order of its ends.
    pub fn advance(&mut self, now: Nanos, done: &mut Vec<Done>) {
        match self {
            Self::Spindle(device) => device.advance(now, done),
            Self::Flash(device) => device.advance(now, done),
        }
    }
}

/// Which model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Model {
    /// A rotating disk.
    Spindle(Drive),
    /// A flash drive: time of a read and of a write, and how many it does at a time.
    Flash {
        /// A read takes this long.
        read: Duration,
        /// A write takes this long.
        write: Duration,
        /// Requests at a time.
        channels: usize,
    },
}

/// What is simulated.
#[derive(Clone, Debug, PartialEq)]
pub struct Setup {
    /// Each device.
    pub model: Model,
    /// Devices: 1, or RAID0 over more.
    pub members: usize,
    /// Bytes of a RAID0 chunk.
    pub chunk: u64,
    /// Bytes of the whole.
    pub bytes: u64,
    /// A file instead of a device: as long as what it has in its one member, it becomes longer by writes, and what `set_len`
    /// says, up to `bytes`.
    pub grows: bool,
}

/// Devices in an array at most.
pub const MEMBERS_MAX: usize = 64;
/// Sizes and chunks are multiples of this.
pub const GRAIN: u64 = 4 << 10;

impl Setup {
    /// One 7200 rpm disk of so many bytes.
    pub fn new(bytes: u64) -> Self {
        Self {
            model: Model::Spindle(Drive::default()),
            members: 1,
            chunk: 64 << 10,
            bytes,
            grows: false,
        }
    }

    /// Bytes of each device.
    pub fn member_bytes(&self) -> u64 {
        self.bytes / self.members.max(1) as u64
    }

    /// The devices, at time 0.
    ///
    /// # Errors
    ///
    /// Something does not go together: which, and what would.
    pub fn build(&self) -> Result<Array> {
        if !(1..=MEMBERS_MAX).contains(&self.members) {
            return Err(Error::invalid(format!(
                "{} devices: it must be 1 to {MEMBERS_MAX}",
                self.members
            )));
        }
        if self.chunk == 0 || !self.chunk.is_multiple_of(GRAIN) {
            return Err(Error::invalid(format!(
                "chunks of {} bytes: it must be a multiple of {GRAIN}",
                self.chunk
            )));
        }
        let row = match self.members {
            1 => GRAIN,
            members => self.chunk.saturating_mul(members as u64),
        };
        if self.bytes == 0 || !self.bytes.is_multiple_of(row) {
            return Err(Error::invalid(format!(
                "a size of {} bytes: it must be a multiple of {row} (a chunk of each device)",
                self.bytes
            )));
        }
        if self.grows && self.members > 1 {
            return Err(Error::invalid("a file that grows lies on one device"));
        }
        let one = || match self.model {
            Model::Spindle(drive) => {
                Spindle::new(drive, self.member_bytes()).map(|s| Device::Spindle(Box::new(s)))
            }
            Model::Flash {
                read,
                write,
                channels,
            } => Flash::new(read, write, channels).map(Device::Flash),
        };
        let devices: Result<Vec<Device>> = (0..self.members).map(|_| one()).collect();
        Ok(Array::new(devices?, self.chunk))
    }
}

fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Virtual time: keeps `depth` requests in flight for `seconds`; how many ended a second.
    pub(super) fn rate(
        array: &mut Array,
        depth: u64,
        seconds: u64,
        mut next: impl FnMut() -> Request,
    ) -> f64 {
        let end = seconds * 1_000_000_000;
        let (mut now, mut ended, mut done) = (0, 0_u64, Vec::new());
        for _ in 0..depth {
            array.submit(0, next());
        }
        while let Some(at) = array.next().filter(|at| *at <= end) {
            assert!(at >= now, "time goes back from {now} to {at}");
            now = at;
            array.advance(now, &mut done);
            for one in done.drain(..) {
                assert!(one.at <= now);
                ended += 1;
                array.submit(now, next());
            }
        }
        ended as f64 / seconds as f64
    }

    #[test]
    fn what_does_not_go_together_is_named() {
        let good = Setup::new(1 << 30);
        good.build().unwrap();
        for (setup, says) in [
            (
                Setup {
                    members: 0,
                    ..good.clone()
                },
                "0 devices",
            ),
            (
                Setup {
                    chunk: 1000,
                    ..good.clone()
                },
                "chunks of 1000",
            ),
            (
                Setup {
                    members: 3,
                    ..good.clone()
                },
                "multiple of 196608",
            ),
            (
                Setup {
                    bytes: 0,
                    ..good.clone()
                },
                "a size of 0",
            ),
        ] {
            let error = setup.build().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_file_may_grow_where_it_is_no_device() {
        use std::{
            fs::{self, OpenOptions},
            os::unix::fs::FileExt as _,
        };
        let dir = testkit::TempDir::new();
        let member = dir.path("member");
        fs::write(&member, b"some bytes").unwrap();
        let setup = Setup {
            model: Model::Flash {
                read: Duration::ZERO,
                write: Duration::ZERO,
                channels: 4,
            },
            grows: true,
            ..Setup::new(1 << 20)
        };
        let mounted = Mounted::start(dir.root(), setup, std::slice::from_ref(&member)).unwrap();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(mounted.path())
            .unwrap();
        let len = || {
            (
                file.metadata().unwrap().len(),
                fs::metadata(&member).unwrap().len(),
            )
        };
        assert_eq!(len(), (10, 10));
        file.write_all_at(b"more", 8).unwrap();
        file.sync_all().unwrap();
        assert_eq!(len(), (12, 12));
        assert_eq!(fs::read(mounted.path()).unwrap(), b"some bytmore");
        file.set_len(4).unwrap();
        file.set_len(6).unwrap();
        assert_eq!(len(), (6, 6));
        assert_eq!(fs::read(mounted.path()).unwrap(), b"some\0\0");
        // Up to its limit, and no further.
        file.write_all_at(b"end", (1 << 20) - 3).unwrap();
        file.sync_all().unwrap();
        assert_eq!(len().1, 1 << 20);
        let full = |error: std::io::Error| error.raw_os_error();
        assert_eq!(
            file.set_len((1 << 20) + 1).map_err(full),
            Err(Some(libc::EFBIG))
        );
        let beyond = file
            .write_all_at(b"x", 1 << 20)
            .and_then(|()| file.sync_all());
        assert_eq!(beyond.map_err(full), Err(Some(libc::ENOSPC)));
    }

    #[test]
    fn arrays_are_as_fast_as_their_devices_together() {
        let iops = |model, members| {
            let setup = Setup {
                model,
                members,
                ..Setup::new(1 << 30)
            };
            let mut array = setup.build().unwrap();
            let (mut id, mut random) = (0, fastrand(7));
            rate(&mut array, 64, 20, move || {
                id += 1;
                Request {
                    id,
                    op: Op::Read,
                    offset: random() % (1 << 18) * 4096,
                    bytes: 4096,
                }
            })
        };
        let flash = Model::Flash {
            read: Duration::from_micros(250),
            write: Duration::from_micros(250),
            channels: 1,
        };
        for model in [Setup::new(0).model, flash] {
            let one = iops(model, 1);
            let (two, four) = (iops(model, 2) / one, iops(model, 4) / one);
            // Less where a device has a shorter queue to choose from.
            assert!((1.5..2.2).contains(&two), "{model:?}: {two}");
            assert!((2.4..4.4).contains(&four), "{model:?}: {four}");
        }
        assert!((3990.0..4001.0).contains(&iops(flash, 1)));
    }

    /// xorshift64, for tests.
    pub(super) fn fastrand(seed: u64) -> impl FnMut() -> u64 {
        let mut state = seed.max(1);
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state >> 11
        }
    }
}
