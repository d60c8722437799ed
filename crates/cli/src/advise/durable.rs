//! What writes cost that are made durable one by one, in a file that is made for it (`--write-test`): into a hole, into space that
//! was allocated, over what was written, and past the page cache or through it.

use anyhow::{Context, Result};
use io::memory::AlignedBuf;
use rustix::fs::{FallocateFlags, OFlags, fallocate};
use serde::Serialize;
use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    time::{Duration, Instant},
};

/// Bytes of a write.
const WRITE_BYTES: usize = 4096;
/// Writes of each kind at most.
const WRITES: usize = 100;
/// Bytes of the file that each kind of write has for itself.
const PART_BYTES: u64 = 4 << 20;
/// Bytes of the file.
const FILE_BYTES: u64 = 4 * PART_BYTES;

/// What was measured: medians in microseconds of a write of 4 KiB and its `fdatasync`.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Durable {
    /// Space can be allocated without writing it.
    pub fallocate: bool,
    /// Holes can be punched.
    pub punch: bool,
    /// The first three are past the page cache (O_DIRECT); else all are through it.
    pub direct: bool,
    /// Writes of each kind that ended in the time.
    pub writes: usize,
    /// Into a hole.
    pub hole_us: Option<f64>,
    /// Into space that is allocated and was never written.
    pub allocated_us: Option<f64>,
    /// Over what was written before.
    pub written_us: Option<f64>,
    /// That, through the page cache; nothing where all are.
    pub cached_us: Option<f64>,
}

/// Where a kind of write goes.
struct Kind<'a> {
    file: &'a File,
    begin: u64,
    times: Vec<Duration>,
}

/// Makes a file in `folder`, writes to it until `deadline` or until there is enough, and leaves nothing: the file has no name any more
/// when it is written to.
///
/// # Errors
///
/// No file can be made or written there.
pub(super) fn measure(folder: &Path, deadline: Instant) -> Result<Durable> {
    let path = folder.join(format!("diskplane-advise-{}", std::process::id()));
    let named = || path.display().to_string();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .with_context(named)?;
    let direct = OpenOptions::new()
        .write(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(&path);
    // Whatever ends this process, nothing stays.
    fs::remove_file(&path).with_context(named)?;
    file.set_len(FILE_BYTES).with_context(named)?;
    let allocated = |at| fallocate(&file, FallocateFlags::empty(), at, PART_BYTES).is_ok();
    let can_allocate = allocated(PART_BYTES);
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let punch = fallocate(&file, hole, 0, PART_BYTES).is_ok();
    for at in [2, 3] {
        let part = vec![0xa5; PART_BYTES as usize];
        file.write_all_at(&part, at * PART_BYTES)
            .with_context(named)?;
    }
    file.sync_all().with_context(named)?;
    let mut data = AlignedBuf::new(WRITE_BYTES, WRITE_BYTES);
    data.fill(0x5a);
    // Some file systems take the flag and refuse the write.
    let direct = direct
        .ok()
        .filter(|direct| direct.write_all_at(&data, 2 * PART_BYTES).is_ok());
    let plain = direct.as_ref().unwrap_or(&file);
    let kind = |file, part| Kind {
        file,
        begin: part * PART_BYTES,
        times: Vec::with_capacity(WRITES),
    };
    let mut kinds = vec![kind(plain, 0), kind(plain, 1), kind(plain, 2)];
    if direct.is_some() {
        kinds.push(kind(&file, 3));
    }
    // In turns: what else happens on the device happens to all.
    'all: for nth in 0..WRITES as u64 {
        for kind in &mut kinds {
            if Instant::now() >= deadline {
                break 'all;
            }
            let since = Instant::now();
            let at = kind.begin + nth * WRITE_BYTES as u64;
            kind.file.write_all_at(&data, at).with_context(named)?;
            kind.file.sync_data().with_context(named)?;
            kind.times.push(since.elapsed());
        }
    }
    let writes = kinds.iter().map(|kind| kind.times.len()).min();
    let mut medians = kinds.into_iter().map(|kind| median_us(kind.times));
    let mut next = || medians.next().flatten();
    Ok(Durable {
        fallocate: can_allocate,
        punch,
        direct: direct.is_some(),
        writes: writes.unwrap_or(0),
        hole_us: next(),
        allocated_us: next().filter(|_| can_allocate),
        written_us: next(),
        cached_us: next(),
    })
}

fn median_us(mut times: Vec<Duration>) -> Option<f64> {
    times.sort_unstable();
    times
        .get(times.len() / 2)
        .map(|time| time.as_secs_f64() * 1e6)
}

impl Durable {
    /// For people.
    pub(super) fn line(&self) -> String {
        let works = |works| if works { "works" } else { "does not work" };
        let mut line = format!(
            "allocating space {}, punching holes {}",
            works(self.fallocate),
            works(self.punch)
        );
        let kinds = [
            ("into a hole", self.hole_us),
            ("into allocated space", self.allocated_us),
            ("over written data", self.written_us),
            ("the same through the page cache", self.cached_us),
        ];
        let mut lead = "; a durable write of 4 KiB ";
        for (what, us) in kinds {
            if let Some(us) = us {
                line.push_str(&format!("{lead}{what} {us:.0} µs"));
                lead = ", ";
            }
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kinds_are_measured_and_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let soon = Instant::now() + Duration::from_secs(30);
        let found = measure(dir.path(), soon).unwrap();
        assert_eq!(found.writes, WRITES);
        assert!(found.hole_us.is_some() && found.written_us.is_some());
        assert_eq!(found.allocated_us.is_some(), found.fallocate);
        assert_eq!(found.cached_us.is_some(), found.direct);
        assert!(found.line().contains("into a hole"), "{}", found.line());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        // Too late for any write.
        let late = measure(dir.path(), Instant::now()).unwrap();
        assert_eq!((late.writes, late.hole_us), (0, None));
        let missing = measure(&dir.path().join("none"), soon).unwrap_err();
        assert!(missing.to_string().contains("none/diskplane-advise"));
    }
}
