//! The log ([MS-VHDX] 2.3): a ring of sectors of 4 KiB with entries that say what other sectors shall hold.
//!
//! ```text
//!   entry   header and descriptors, whole sectors │ a sector for each data descriptor │ perhaps padding
//!
//!   header      0 "loge"  4 checksum  8 bytes of the entry  12 tail  16 sequence number  24 descriptors
//!               32 LogGuid  48 FlushedFileOffset  56 LastFileOffset
//!   descriptor  0 "desc"  4 last 4 bytes  8 first 8 bytes  16 offset  24 sequence number
//!               0 "zero"                  8 bytes          16 offset  24 sequence number
//!   sector      0 "data"  4 sequence number, high half  8 bytes 8 to 4091  4092 its low half
//! ```
//!
//! Entries that follow one another, with sequence numbers that do, are a sequence; its last one says where what is not
//! yet in its place begins (the tail). Of several the one with the highest number counts.
//!
//! Nothing in the log is believed before all of it is seen to be sound: entries hold no sector that begins like
//! another entry, so that a search takes time in proportion to the log, whatever it holds.
//!
//! What the log says is put in place before anybody writes ([`super::mend`]). Who only reads sees it through a
//! [`View`].

use super::crc::{self, Crc};
use super::guid::Guid;
use super::header::{HEADERS_AT, Header};
use super::{FILE_BYTES_MAX, KIB, MIB};
use crate::metadata::read_short;
use crate::words::{read_u32_le, read_u64_le};
use block::{Error, Result, Storage};
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of a sector of the log.
pub(super) const SECTOR: usize = 4096;

/// Bytes of an entry's header.
const HEADER: usize = 64;

/// Bytes of a descriptor.
const DESCRIPTOR: usize = 32;

/// Sectors that an entry can say with one sector of descriptors.
pub(super) const SECTORS_MAX: usize = (SECTOR - HEADER) / DESCRIPTOR;

/// Bytes of the log that are read at a time.
const BUFFER: usize = 256 << 10;

/// Bytes and ranges of a log that are kept in memory for those who only read.
const KEPT_BYTES_MAX: usize = 64 << 20;
const KEPT_ZEROS_MAX: usize = 4096;

/// Where no descriptor may lead: identifier and headers are not changed through the log.
const HEADERS_END: u64 = HEADERS_AT[1] + 64 * KIB;

/// The ring.
struct Ring<'a> {
    file: &'a dyn Storage,
    range: Range<u64>,
    guid: Guid,
    buffer: Vec<u8>,
    /// Where in the ring the buffer's bytes are from.
    from: Option<u64>,
}

/// A sound entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// Its first sector.
    at: u64,
    sectors: u64,
    /// The first sector of the sequence that it ends.
    tail: u64,
    sequence: u64,
    descriptors: u32,
    flushed: u64,
    last: u64,
}

impl Entry {
    fn descriptor_sectors(&self) -> u64 {
        // Less than 2^32 descriptors.
        (HEADER as u64 + u64::from(self.descriptors) * DESCRIPTOR as u64).div_ceil(SECTOR as u64)
    }
}

/// A change that an entry says.
enum Change<'a> {
    Data(u64, &'a [u8; SECTOR]),
    Zeros(Range<u64>),
}

/// A descriptor.
#[derive(Clone, Copy, Debug)]
enum Descriptor {
    Data {
        at: u64,
        first: [u8; 8],
        last: [u8; 4],
    },
    Zeros {
        at: u64,
        len: u64,
    },
}

impl Descriptor {
    fn parse(bytes: &[u8], sequence: u64) -> Option<Self> {
        if read_u64_le(bytes, 24)? != sequence {
            return None;
        }
        let at = read_u64_le(bytes, 16).filter(|at| at.is_multiple_of(SECTOR as u64))?;
        match bytes.get(..4)? {
            b"desc" => Some(Self::Data {
                at,
                first: bytes.get(8..16)?.try_into().ok()?,
                last: bytes.get(4..8)?.try_into().ok()?,
            }),
            b"zero" => {
                let len = read_u64_le(bytes, 8).filter(|len| len.is_multiple_of(SECTOR as u64))?;
                Some(Self::Zeros { at, len })
            }
            _ => None,
        }
    }
}

impl<'a> Ring<'a> {
    fn new(file: &'a dyn Storage, range: Range<u64>, guid: Guid) -> Self {
        Self {
            file,
            range,
            guid,
            buffer: Vec::new(),
            from: None,
        }
    }

    fn sectors(&self) -> u64 {
        (self.range.end - self.range.start) / SECTOR as u64
    }

    /// Sector `index`, counted round.
    fn sector(&mut self, index: u64) -> Result<&[u8; SECTOR]> {
        let at = index % self.sectors().max(1) * SECTOR as u64;
        let from = at / BUFFER as u64 * BUFFER as u64;
        if self.from != Some(from) {
            self.from = None;
            let len = (self.range.end - self.range.start - from).min(BUFFER as u64) as usize;
            self.buffer.resize(len, 0);
            self.file
                .read_at(self.range.start + from, &mut self.buffer)?;
            self.from = Some(from);
        }
        let within = (at - from) as usize;
        let sector = self.buffer.get(within..within + SECTOR);
        sector
            .and_then(|s| s.try_into().ok())
            .ok_or_else(|| Error::corrupt("the log ends within a sector"))
    }

    /// The entry that begins at sector `at`, where there is one and all of it is sound.
    fn entry(&mut self, at: u64) -> Result<Option<Entry>> {
        let (sectors, guid) = (self.sectors(), self.guid);
        let first = *self.sector(at)?;
        let u32_at = |at| read_u32_le(&first, at).unwrap_or(0);
        let u64_at = |at| read_u64_le(&first, at).unwrap_or(0);
        let (bytes, tail) = (u64::from(u32_at(8)), u64::from(u32_at(12)));
        let entry = Entry {
            at: at % sectors.max(1),
            sectors: bytes / SECTOR as u64,
            tail: tail / SECTOR as u64,
            sequence: u64_at(16),
            descriptors: u32_at(24),
            flushed: u64_at(48),
            last: u64_at(56),
        };
        let sound = first.starts_with(b"loge")
            && bytes.is_multiple_of(SECTOR as u64)
            && (1..=sectors).contains(&entry.sectors)
            && tail.is_multiple_of(SECTOR as u64)
            && entry.tail < sectors
            && entry.sequence > 0
            && entry.descriptor_sectors() <= entry.sectors
            && Guid::at(&first, 32) == guid;
        if !sound {
            return Ok(None);
        }
        let mut sum = Crc::new();
        sum.add(&first[..4]);
        sum.add(&[0; 4]);
        sum.add(&first[8..]);
        let mut left = entry.descriptors;
        let mut data = 0;
        for index in 0..entry.sectors {
            let sector = self.sector(at + index)?;
            if index > 0 {
                if sector.starts_with(b"loge") {
                    return Ok(None);
                }
                sum.add(sector);
            }
            if index < entry.descriptor_sectors() {
                let start = if index == 0 { HEADER } else { 0 };
                let places = sector
                    .get(start..)
                    .unwrap_or_default()
                    .as_chunks::<DESCRIPTOR>()
                    .0;
                for bytes in places.iter().take(left as usize) {
                    match Descriptor::parse(bytes, entry.sequence) {
                        Some(Descriptor::Data { .. }) => data += 1,
                        Some(Descriptor::Zeros { .. }) => {}
                        None => return Ok(None),
                    }
                    left -= 1;
                }
            } else if index < entry.descriptor_sectors() + data {
                let high = u64::from(read_u32_le(sector, 4).unwrap_or(0));
                let low = u64::from(read_u32_le(sector, SECTOR - 4).unwrap_or(0));
                if !sector.starts_with(b"data") || high << 32 | low != entry.sequence {
                    return Ok(None);
                }
            }
        }
        let whole = entry.descriptor_sectors() + data <= entry.sectors;
        Ok((whole && sum.value() == u32_at(4)).then_some(entry))
    }

    /// The sequence that counts.
    fn active(&mut self) -> Result<Vec<Entry>> {
        let sectors = self.sectors();
        let mut best: Vec<Entry> = Vec::new();
        let mut start = 0;
        while start < sectors {
            let mut found: Vec<Entry> = Vec::new();
            let mut covered = 0;
            while covered < sectors
                && let Some(entry) = self.entry(start + covered)?
                && covered + entry.sectors <= sectors
                && found
                    .last()
                    .is_none_or(|last| last.sequence.checked_add(1) == Some(entry.sequence))
            {
                covered += entry.sectors;
                found.push(entry);
            }
            start += covered.max(1);
            let Some(head) = found.last().copied() else {
                continue;
            };
            let tail = found.iter().position(|entry| entry.at == head.tail);
            let newer = best.last().is_none_or(|best| best.sequence < head.sequence);
            if let (Some(tail), true) = (tail, newer) {
                best = found.split_off(tail);
            }
        }
        Ok(best)
    }

    /// Hands out all that an entry says, in order.
    fn changes(
        &mut self,
        entry: &Entry,
        mut each: impl FnMut(Change<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut data = entry.at + entry.descriptor_sectors();
        let mut bytes = [0; SECTOR];
        for index in 0..entry.descriptors as usize {
            let place = HEADER + index * DESCRIPTOR;
            let sector = self.sector(entry.at + (place / SECTOR) as u64)?;
            let place = place % SECTOR;
            let place = sector.get(place..place + DESCRIPTOR).unwrap_or_default();
            match Descriptor::parse(place, entry.sequence) {
                Some(Descriptor::Data { at, first, last }) => {
                    bytes = *self.sector(data)?;
                    bytes[..8].copy_from_slice(&first);
                    bytes[SECTOR - 4..].copy_from_slice(&last);
                    data += 1;
                    each(Change::Data(at, &bytes))?;
                }
                Some(Descriptor::Zeros { at, len }) => {
                    let end = at.checked_add(len).ok_or_else(|| {
                        Error::corrupt(format!(
                            "log: {len} bytes of zeros at byte {at:#x} are too many"
                        ))
                    })?;
                    each(Change::Zeros(at..end))?;
                }
                None => return Err(Error::corrupt("log: it changes while it is read")),
            }
        }
        let _ = bytes;
        Ok(())
    }
}

/// What the log of a file has that is not in its place.
pub(super) struct Log<'a> {
    ring: Ring<'a>,
    entries: Vec<Entry>,
    file_bytes: u64,
}

impl<'a> Log<'a> {
    /// Looks for it. A log without a sound entry has nothing (QEMU makes it such before it writes the first one).
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for a place that cannot be, for entries that lead where they must not, and where
    /// the file is shorter than its entries were written for.
    pub(super) fn read(file: &'a dyn Storage, header: &Header) -> Result<Self> {
        let file_bytes = file.len()?;
        let range = header.log_range(file_bytes)?;
        let mut ring = Ring::new(file, range, header.log);
        let entries = match header.log == Guid::NONE || ring.sectors() == 0 {
            true => Vec::new(),
            false => ring.active()?,
        };
        let mut log = Self {
            ring,
            entries,
            file_bytes,
        };
        log.judge()?;
        Ok(log)
    }

    /// Whether nothing is to be done.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many entries there are.
    pub(super) fn entries(&self) -> usize {
        self.entries.len()
    }

    /// How long the file has to be, at least.
    pub(super) fn end(&self) -> u64 {
        self.entries.last().map_or(0, |head| head.last)
    }

    fn judge(&mut self) -> Result<()> {
        let Some(head) = self.entries.last().copied() else {
            return Ok(());
        };
        if head.flushed > self.file_bytes {
            return Err(Error::corrupt(format!(
                "log: its last entry was written when the file had {} bytes; now it has {}: it was cut off",
                head.flushed, self.file_bytes
            )));
        }
        if head.last > FILE_BYTES_MAX {
            return Err(Error::corrupt(format!(
                "log: its last entry says that the file has {} bytes: the most is {FILE_BYTES_MAX}",
                head.last
            )));
        }
        let (own, end) = (self.ring.range.clone(), self.file_bytes.max(head.last));
        for entry in &self.entries {
            self.ring.changes(entry, |change| {
                let range = match &change {
                    Change::Data(at, _) => *at..at.saturating_add(SECTOR as u64),
                    Change::Zeros(range) => range.clone(),
                };
                let on_log = range.start < own.end && own.start < range.end;
                match range.start < HEADERS_END || on_log || range.end > end {
                    false => Ok(()),
                    true => Err(Error::corrupt(format!(
                        "log: entry {} changes bytes {:#x} to {:#x}: they are headers, the log itself, or behind the \
                         file's end",
                        entry.sequence, range.start, range.end
                    ))),
                }
            })?;
        }
        Ok(())
    }

    /// Puts everything in its place, durably.
    ///
    /// # Errors
    ///
    /// What writing fails with: the log counts still then.
    pub(super) fn apply(&mut self, file: &dyn Storage) -> Result<()> {
        let end = self.end().next_multiple_of(MIB);
        if file.len()? < end && !self.is_empty() {
            file.set_len(end)?;
        }
        for entry in &self.entries {
            self.ring.changes(entry, |change| match change {
                Change::Data(at, bytes) => file.write_at(at, bytes),
                Change::Zeros(range) => {
                    file.write_zeroes(range.start, range.end - range.start, false)
                }
            })?;
        }
        file.sync()
    }

    /// Keeps it in memory, for who only reads.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Unsupported`] for more than is kept.
    pub(super) fn keep(&mut self) -> Result<Overlay> {
        let mut overlay = Overlay {
            end: self.end(),
            ..Overlay::default()
        };
        for entry in &self.entries {
            self.ring.changes(entry, |change| overlay.add(change))?;
        }
        Ok(overlay)
    }
}

/// What a log says, in memory.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    /// Before `zeros`.
    sectors: BTreeMap<u64, Box<[u8; SECTOR]>>,
    zeros: Vec<Range<u64>>,
    /// How long the file is with it.
    end: u64,
}

impl Overlay {
    fn add(&mut self, change: Change<'_>) -> Result<()> {
        match change {
            Change::Data(at, bytes) => {
                self.sectors.insert(at, Box::new(*bytes));
            }
            Change::Zeros(range) => {
                self.sectors.retain(|at, _| !range.contains(at));
                self.zeros.push(range);
            }
        }
        if self.sectors.len() * SECTOR > KEPT_BYTES_MAX || self.zeros.len() > KEPT_ZEROS_MAX {
            return Err(Error::unsupported(format!(
                "its log must be replayed, and has more than {KEPT_BYTES_MAX} bytes, or {KEPT_ZEROS_MAX} ranges of zeros, \
                 which is too much to do in memory: run diskplane check --repair all"
            )));
        }
        Ok(())
    }

    /// The ranges that it changes.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let sectors = self.sectors.keys().map(|at| *at..at + SECTOR as u64);
        sectors.chain(self.zeros.iter().cloned())
    }

    /// Puts what it says into `bytes`, which were read at `offset`.
    pub(super) fn patch(&self, offset: u64, bytes: &mut [u8]) {
        let end = offset + bytes.len() as u64;
        for zeros in &self.zeros {
            let (from, to) = (zeros.start.max(offset), zeros.end.min(end));
            if from < to
                && let Some(part) = bytes.get_mut((from - offset) as usize..(to - offset) as usize)
            {
                part.fill(0);
            }
        }
        let first = offset.saturating_sub(SECTOR as u64 - 1);
        for (at, sector) in self.sectors.range(first..end) {
            let (from, to) = ((*at).max(offset), (at + SECTOR as u64).min(end));
            let part = bytes.get_mut((from - offset) as usize..(to - offset) as usize);
            let new = sector.get((from - at) as usize..(to - at) as usize);
            if let (Some(part), Some(new)) = (part, new) {
                part.copy_from_slice(new);
            }
        }
    }
}

/// A file as it is when its log is in place.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    pub(super) file: &'a dyn Storage,
    pub(super) overlay: &'a Overlay,
    /// Bytes of the file itself.
    pub(super) file_bytes: u64,
}

impl View<'_> {
    /// Bytes of the file.
    pub(super) fn end(&self) -> u64 {
        self.file_bytes.max(self.overlay.end)
    }

    /// Fills `bytes` from `offset`; what is behind the end is zeros.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let read = read_short(self.file, offset, bytes.len())?;
        bytes.copy_from_slice(&read);
        self.overlay.patch(offset, bytes);
        Ok(())
    }
}

/// An entry to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewEntry {
    pub(super) guid: Guid,
    pub(super) sequence: u64,
    /// Where in the log it will be: it ends a sequence of itself.
    pub(super) at: u32,
    /// The length that the file surely has, and the one that all of it needs.
    pub(super) flushed: u64,
    pub(super) last: u64,
}

impl NewEntry {
    /// Appends the entry for `sectors`: [`SECTORS_MAX`] at most, places in the file and bytes.
    pub(super) fn put(&self, sectors: &[(u64, [u8; SECTOR])], out: &mut Vec<u8>) {
        debug_assert!(sectors.len() <= SECTORS_MAX);
        let start = out.len();
        out.resize(start + SECTOR, 0);
        for (_, bytes) in sectors {
            let at = out.len();
            out.extend_from_slice(bytes);
            if let Some(sector) = out.get_mut(at..) {
                sector[..4].copy_from_slice(b"data");
                sector[4..8].copy_from_slice(&((self.sequence >> 32) as u32).to_le_bytes());
                sector[SECTOR - 4..].copy_from_slice(&(self.sequence as u32).to_le_bytes());
            }
        }
        // At most 127 sectors.
        let len = (out.len() - start) as u32;
        let Some(entry) = out.get_mut(start..) else {
            return;
        };
        let mut put = |at: usize, field: &[u8]| entry[at..at + field.len()].copy_from_slice(field);
        put(0, b"loge");
        put(8, &len.to_le_bytes());
        put(12, &self.at.to_le_bytes());
        put(16, &self.sequence.to_le_bytes());
        put(24, &(sectors.len() as u32).to_le_bytes());
        put(32, &self.guid.0);
        put(48, &self.flushed.to_le_bytes());
        put(56, &self.last.to_le_bytes());
        for (index, (at, bytes)) in sectors.iter().enumerate() {
            let place = HEADER + index * DESCRIPTOR;
            put(place, b"desc");
            put(place + 4, &bytes[SECTOR - 4..]);
            put(place + 8, &bytes[..8]);
            put(place + 16, &at.to_le_bytes());
            put(place + 24, &self.sequence.to_le_bytes());
        }
        crc::seal(entry);
    }
}
