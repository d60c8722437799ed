//! Checking a VMDK image: what `qemu-img check` looks at (whether each grain is in its file), and more.
//!
//! Each entry of each grain table: the grain lies behind header and descriptor, in the file, and on no other grain or
//! table; a compressed one has a marker that names its place on the disk. The redundant grain tables are compared with the
//! others, and the extents' sizes with the descriptor.
//!
//! A redundant table that differs counts as a leak: nobody reads it, and a crash may leave one so. A repair writes it from
//! the other one, unless there are errors: it might lie on something that is needed. Nothing else can be repaired without a
//! guess.
//!
//! # Memory
//!
//! 4 bytes for each grain that is there, at most the budget, and the grain directories.

use super::tally::{Severity, Tally};
use super::{CheckOptions, Repair, Report};
use block::{Context, Error, Result, Storage};
use image::vmdk::{ExtentLine, Parts, Tables};

const SECTOR: u64 = 512;
/// Bytes of tables that are read at once.
const WINDOW_BYTES: u64 = 1 << 20;

/// Checks the image of `parts`, and repairs it as `options` say. `files` by `image::FileId`.
///
/// # Errors
///
/// `Corrupt` and `Unsupported` where headers do not say what the image is, and for one that takes more memory than it
/// may; what reading and writing fails with.
pub fn check(parts: &Parts, files: &[&dyn Storage], options: &CheckOptions) -> Result<Report> {
    let mut checking = Checking {
        tally: Tally::default(),
        clusters: 0,
        end: 0,
        repair: options.repair != Repair::No,
        fixed: 0,
        budget: options.budget_bytes / 4,
    };
    for (line, id) in parts.extents() {
        let file = files.get(usize::from(id.0)).copied();
        let file = file.ok_or_else(|| Error::invalid("an image without all of its files"))?;
        let Some(tables) =
            Tables::read(&line, parts.header.as_ref(), file).context(|| file.name())?
        else {
            continue;
        };
        checking
            .extent(&line, &tables, file)
            .context(|| file.name())?;
    }
    let Checking {
        tally,
        clusters,
        end,
        fixed,
        ..
    } = checking;
    let mut report = Report {
        corruptions: tally.errors(),
        leaks: tally.leaks.saturating_sub(fixed),
        leaks_fixed: fixed,
        check_errors: tally.check_errors,
        overlaps: tally.overlaps,
        image_end_offset: end,
        total_clusters: clusters,
        allocated_clusters: tally.allocated,
        fragmented_clusters: tally.fragmented,
        compressed_clusters: tally.compressed,
        walks: 1,
        ..Report::default()
    };
    report.findings = tally.findings;
    report.findings_left_out = tally.findings_left_out;
    Ok(report)
}

struct Checking {
    tally: Tally,
    clusters: u64,
    /// Where the last grain of the first file ends.
    end: u64,
    repair: bool,
    fixed: u64,
    /// Grains that there is memory for.
    budget: u64,
}

/// What of a file was read last.
struct Window<'a> {
    file: &'a dyn Storage,
    file_bytes: u64,
    at: u64,
    bytes: Vec<u8>,
}

impl<'a> Window<'a> {
    fn new(file: &'a dyn Storage) -> Result<Self> {
        Ok(Self {
            file,
            file_bytes: file.len()?,
            at: 0,
            bytes: Vec::new(),
        })
    }

    /// `len` bytes at `at`, at most [`WINDOW_BYTES`]; zeros behind the end of the file.
    fn get(&mut self, at: u64, len: u64) -> Result<&[u8]> {
        if at < self.at || at + len > self.at + self.bytes.len() as u64 {
            self.bytes.clear();
            self.bytes.resize(WINDOW_BYTES.max(len) as usize, 0);
            self.at = at;
            // At most the window's.
            let there = self
                .file_bytes
                .saturating_sub(at)
                .min(self.bytes.len() as u64) as usize;
            if let Some(part) = self.bytes.get_mut(..there).filter(|part| !part.is_empty()) {
                self.file.read_at(at, part)?;
            }
        }
        let from = (at - self.at) as usize;
        Ok(self
            .bytes
            .get(from..from + len as usize)
            .unwrap_or_default())
    }
}

impl Checking {
    fn extent(&mut self, line: &ExtentLine, tables: &Tables, file: &dyn Storage) -> Result<()> {
        if line.sectors != tables.capacity {
            self.tally.found(Severity::Corruption, 1, || {
                format!(
                    "{}: the descriptor gives it {} sectors, its header {}",
                    file.name(),
                    line.sectors,
                    tables.capacity
                )
            });
        }
        let errors = self.tally.errors();
        if let Some(overlap) = &tables.overlap {
            self.tally.overlaps += 1;
            self.tally.found(Severity::Corruption, 1, || {
                format!("{}: {overlap}", file.name())
            });
        }
        let grains = tables.capacity.div_ceil(tables.grain);
        self.clusters += grains;
        let len = file.len()?;
        let bytes = tables.table_bytes();
        let mut first = Window::new(file)?;
        let mut second = Window::new(file)?;
        let mut entries = Vec::new();
        let mut starts: Vec<u32> = Vec::new();
        let mut last_end = None;
        let mut stale = Vec::new();
        for (nth, table) in tables.l1.iter().copied().enumerate() {
            if table == 0 {
                continue;
            }
            let end = table.checked_add(bytes);
            if !table.is_multiple_of(SECTOR)
                || end.is_none_or(|end| end > len.next_multiple_of(SECTOR))
            {
                self.tally.found(Severity::Corruption, 1, || {
                    format!("grain directory entry {nth}: its table at byte {table:#x} is not in the file")
                });
                continue;
            }
            let raw = first.get(table, bytes)?;
            tables.entries(raw, &mut entries);
            if let Some(copy) = tables.copies.get(nth).copied().filter(|copy| *copy != 0)
                && self.differs(nth, raw, copy, &mut second)?
            {
                stale.push((table, copy));
            }
            let base = nth as u64 * tables.table_entries;
            let left = grains.saturating_sub(base).min(tables.table_entries) as usize;
            for (index, at) in entries.iter().copied().enumerate() {
                // Nobody reads those behind the end of the disk; of an extent that is written they must be sound too.
                if at == 0 || at == 1 || index >= left && !tables.is_plain() {
                    continue;
                }
                let guest = (base + index as u64) * tables.grain * SECTOR;
                let sector = self.grain((at, guest), tables, len);
                let Some(sector) = sector.filter(|_| index < left) else {
                    continue;
                };
                if starts.len() as u64 >= self.budget {
                    return Err(Error::unsupported(format!(
                        "{} bytes of memory do not suffice to check it: give it more memory",
                        self.budget * 4
                    )));
                }
                starts.push(sector);
                self.tally.allocated += 1;
                if tables.compressed {
                    self.tally.compressed += 1;
                } else {
                    if last_end.is_some_and(|end| end != at) {
                        self.tally.fragmented += 1;
                    }
                    last_end = Some(at + tables.grain * SECTOR);
                }
            }
        }
        self.overlaps(tables, file, starts, len)?;
        // Where anything lies on anything else a table is written over something that is needed, perhaps.
        if !self.repair || self.tally.errors() > errors {
            return Ok(());
        }
        for (table, copy) in stale {
            if copy.is_multiple_of(SECTOR) && copy + bytes <= len {
                let raw = first.get(table, bytes)?;
                file.write_at(copy, raw)?;
                self.fixed += 1;
            }
        }
        match self.fixed {
            0 => Ok(()),
            _ => file.sync(),
        }
    }

    /// Judges a grain at byte `at` of the file. Its sector, where it is one in the file.
    fn grain(&mut self, (at, guest): (u64, u64), tables: &Tables, len: u64) -> Option<u32> {
        let place = || format!("guest offset {guest:#x}: its grain table entry says byte {at:#x}");
        // Of the disk's last grain no more need be there than the disk has.
        let grain = (tables.grain * SECTOR).min((tables.capacity * SECTOR).saturating_sub(guest));
        let sector = u32::try_from(at / SECTOR)
            .ok()
            .filter(|_| at.is_multiple_of(SECTOR));
        if sector.is_none() {
            self.tally.found(Severity::Corruption, 1, || {
                format!("{}, which is no sector", place())
            });
        } else if at < tables.head_end {
            self.tally.overlaps += 1;
            self.tally.found(Severity::Corruption, 1, || {
                format!("{}, where header, descriptor and tables are", place())
            });
        } else if at >= len {
            self.tally.found(Severity::Corruption, 1, || {
                format!("{}, behind the end of the file, {len:#x}", place())
            });
        } else {
            // What is there of it may lie on another one, whatever is wrong with it.
            if tables.is_plain() && at + grain > len.next_multiple_of(SECTOR) {
                self.tally.found(Severity::Corruption, 1, || {
                    format!(
                        "{}, and the file ends within the grain, at {len:#x}",
                        place()
                    )
                });
            }
            return sector;
        }
        None
    }

    /// Whether a table differs from its copy.
    fn differs(
        &mut self,
        nth: usize,
        raw: &[u8],
        copy: u64,
        window: &mut Window<'_>,
    ) -> Result<bool> {
        let there = window.get(copy, raw.len() as u64)?;
        let differ = raw
            .chunks(4)
            .zip(there.chunks(4))
            .filter(|(a, b)| a != b)
            .count();
        if differ > 0 {
            self.tally.found(Severity::Leak, 1, || {
                format!("redundant grain table {nth} at byte {copy:#x} differs from the other in {differ} entries")
            });
        }
        Ok(differ > 0)
    }

    /// Looks for grains that share bytes with each other or with tables.
    fn overlaps(
        &mut self,
        tables: &Tables,
        file: &dyn Storage,
        mut starts: Vec<u32>,
        len: u64,
    ) -> Result<()> {
        starts.sort_unstable();
        let mut window = Window::new(file)?;
        let table_sectors = tables.table_bytes() / SECTOR;
        let mut meta: Vec<u64> = tables.l1.iter().chain(&tables.copies).copied().collect();
        meta.retain(|at| *at != 0);
        meta.sort_unstable();
        let mut last: Option<(u32, u64)> = None;
        for start in starts {
            let at = u64::from(start);
            let sectors = match (tables.compressed, tables.markers) {
                (false, _) => tables.grain,
                // Its end is not known.
                (true, false) => 1,
                (true, true) => {
                    let marker = window.get(at * SECTOR, 12)?;
                    let field = |range| marker.get(range).and_then(|b: &[u8]| b.try_into().ok());
                    let bytes = u64::from(field(8..12).map_or(0, u32::from_le_bytes));
                    if bytes == 0 || at * SECTOR + 12 + bytes > len {
                        self.tally.found(Severity::Corruption, 1, || {
                            format!("the marker at sector {start} says {bytes} bytes of a compressed grain")
                        });
                        continue;
                    }
                    (bytes + 12).div_ceil(SECTOR)
                }
            };
            if let Some((before, _)) = last.filter(|(_, end)| at < *end) {
                self.tally.overlaps += 1;
                self.tally.found(Severity::Corruption, 1, || {
                    format!("grains at sectors {before} and {start} overlap")
                });
            }
            let first = meta.partition_point(|table| table / SECTOR + table_sectors <= at);
            if let Some(table) = meta
                .get(first)
                .filter(|table| **table / SECTOR < at + sectors)
            {
                self.tally.overlaps += 1;
                self.tally.found(Severity::Corruption, 1, || {
                    format!("the grain at sector {start} lies on a grain table, at byte {table:#x}")
                });
            }
            last = Some((start, at + sectors));
        }
        if let Some((_, end)) = last {
            self.end = self.end.max(end * SECTOR);
        }
        Ok(())
    }
}
