//! A disk that is read from its beginning to its end: one chain of images, part of one, or several one behind the
//! other.
//!
//! What is zeros is known from the formats' maps, and from the holes of files whose holes are zeros, without
//! reading it. Where a run of bytes lies in a file as it is, [`Run::place`] says where: what two disks have in the
//! same place is the same, and can be copied from file to file.

use block::{Error, Result, Storage};
use disk::{
    Chain,
    blocking::{Driver, Fragment},
};
use image::{ExtentKind, Format};
use std::sync::Arc;

/// Bytes of what cannot be read that are given up at once, where a smaller part is not known.
const SECTOR: u64 = 512;
/// Places of unreadable bytes that are kept, the first ones of the disk; of more only the number of bytes.
pub const UNREADABLE_MAX: usize = 100;

/// What an error begins with where a disk's map fails, before the first byte of what was asked about.
pub const UNMAPPED: &str = "it cannot be found out what the disk has at byte";

/// Bytes that could not be read, and read as zeros instead; or of which it could not be found out what they are made of, and
/// that were read all the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// First byte on the disk.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Why.
    pub error: String,
    /// What the host said, where it was that.
    pub errno: Option<i32>,
}

impl Unreadable {
    fn new(at: u64, len: u64, error: &Error) -> Self {
        Self {
            at,
            len,
            error: error.to_string(),
            errno: error.os_errno(),
        }
    }
}

/// What of a disk was not as it should be, and is known only with [`Source::salvaging`]. At most [`UNREADABLE_MAX`] places of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// What could not be read.
    pub unreadable: Vec<Unreadable>,
    /// How many bytes that was in all.
    pub unreadable_bytes: u64,
    /// What it could not be found out of what it is made of.
    pub unmapped: Vec<Unreadable>,
}

/// Where bytes of a disk are, as the guest reads them.
#[derive(Clone, Debug)]
pub struct Place {
    /// The file.
    pub file: Arc<dyn Storage>,
    /// Device and inode of the file.
    pub identity: (u64, u64),
    /// Where in it.
    pub offset: u64,
}

/// What a part of a disk is made of.
#[derive(Clone, Debug)]
pub struct Run {
    /// Bytes, at least 1.
    pub len: u64,
    /// It is known to read as zeros.
    pub zero: bool,
    /// Some image has it: data, or zeros that it says are there.
    pub allocated: bool,
    /// Bytes are stored for it.
    pub data: bool,
    /// Its file is cut off before it: reading it fails.
    pub lost: bool,
    /// It is a part of what is packed.
    pub packed: bool,
    /// Where its bytes are in one piece, where they are as the guest reads them.
    pub place: Option<Place>,
}

impl Run {
    fn nothing(len: u64) -> Self {
        Self {
            zero: true,
            allocated: false,
            data: false,
            ..Self::data(len)
        }
    }

    /// Something that has to be read.
    fn data(len: u64) -> Self {
        Self {
            len,
            zero: false,
            allocated: true,
            data: true,
            lost: false,
            packed: false,
            place: None,
        }
    }
}

/// A chain that is part of a disk.
#[derive(Debug)]
struct Part<'a> {
    chain: &'a Chain,
    driver: Driver,
    /// Device and inode of each file of each layer, where it has them.
    identities: Vec<Vec<Option<(u64, u64)>>>,
    /// Where it begins on the disk.
    begin: u64,
    /// The first byte of it that counts.
    skip: u64,
    /// Bytes.
    len: u64,
}

/// A disk to read.
#[derive(Debug)]
pub struct Source<'a> {
    parts: Vec<Part<'a>>,
    size: u64,
    /// What cannot be read counts as zeros.
    salvage: bool,
    damage: Damage,
    /// The map failed for the smallest part that was asked about last.
    fails: bool,
    /// Up to where it was noted what the map says that cannot be read.
    skipped: u64,
}

impl<'a> Source<'a> {
    /// The disk that `chains` make, one behind the other.
    ///
    /// # Errors
    ///
    /// `Invalid` for more bytes than a disk can have.
    pub fn join(chains: &[&'a Chain]) -> Result<Self> {
        let mut source = Self {
            parts: Vec::new(),
            size: 0,
            salvage: false,
            damage: Damage::default(),
            fails: false,
            skipped: 0,
        };
        for chain in chains {
            source.push(chain, 0, u64::MAX)?;
        }
        Ok(source)
    }

    /// All of the disk of `chain`.
    ///
    /// # Errors
    ///
    /// A chain without an image.
    pub fn new(chain: &'a Chain) -> Result<Self> {
        Self::join(&[chain])
    }

    /// At most `len` bytes of the disk of `chain`, from `skip` on.
    ///
    /// # Errors
    ///
    /// A chain without an image.
    pub fn window(chain: &'a Chain, skip: u64, len: u64) -> Result<Self> {
        let mut source = Self::join(&[])?;
        source.push(chain, skip, len)?;
        Ok(source)
    }

    fn push(&mut self, chain: &'a Chain, skip: u64, len: u64) -> Result<()> {
        let driver = chain.driver()?;
        let identities = chain.layers.iter().map(|layer| {
            let files = layer.files.iter();
            files.map(|file| file.identity().ok()).collect()
        });
        let identities = identities.collect();
        let len = len.min(driver.size().saturating_sub(skip));
        let begin = self.size;
        self.size = begin
            .checked_add(len)
            .filter(|size| *size <= block::limits::DISK_BYTES_MAX)
            .ok_or_else(|| {
                Error::invalid(format!(
                    "all sources together are larger than a disk can be: {} bytes",
                    block::limits::DISK_BYTES_MAX
                ))
            })?;
        self.parts.push(Part {
            chain,
            driver,
            identities,
            begin,
            skip,
            len,
        });
        Ok(())
    }

    /// Takes what cannot be read for zeros from now on, and notes where that was.
    #[must_use]
    pub fn salvaging(mut self, salvage: bool) -> Self {
        self.salvage = salvage;
        self
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What was not as it should be so far.
    pub fn damage(self) -> Damage {
        self.damage
    }

    /// The part with the byte at `at`, where in its chain that is, and how many bytes of it follow.
    fn part(&mut self, at: u64) -> Option<(&mut Part<'a>, u64, u64)> {
        let nth = self
            .parts
            .partition_point(|part| part.begin + part.len <= at);
        let part = self.parts.get_mut(nth)?;
        let within = at - part.begin;
        let (here, left) = (part.skip + within, part.len - within);
        Some((part, here, left))
    }

    /// What is at `at`, at most `most` bytes. Behind the end there is nothing.
    ///
    /// # Errors
    ///
    /// What reading the format's tables, or asking the host, fails with, after [`UNMAPPED`].
    pub fn run(&mut self, at: u64, most: u64) -> Result<Run> {
        let (salvage, failed) = (self.salvage, self.fails);
        let Some((part, here, left)) = self.part(at) else {
            return Ok(Run::nothing(most));
        };
        let most = most.min(left);
        let unit = part.unit_left(here).min(most);
        // Where one part failed the next is likely to.
        let mut asked = if failed { unit } else { most };
        let mut found = part.run(here, asked);
        // Of a smaller part it may be known.
        while found.is_err() && salvage && asked > SECTOR {
            asked = match failed {
                true => SECTOR,
                false => asked.div_ceil(4).next_multiple_of(SECTOR),
            };
            found = part.run(here, asked);
        }
        let unreadable = match found {
            Err(_) if salvage => part.unreadable(here),
            _ => None,
        };
        self.fails = found.is_err();
        match found {
            Err(error) if let Some(len) = unreadable => {
                // Nobody needs to read it: what a format says of it may be longer than anybody could.
                let len = len.min(most);
                self.skip(at, len, &error);
                Ok(Run {
                    zero: true,
                    data: false,
                    ..Run::data(len)
                })
            }
            Err(error) if salvage => {
                // Whoever reads it finds out whether it is lost.
                put(&mut self.damage.unmapped, Unreadable::new(at, unit, &error));
                Ok(Run::data(unit))
            }
            found => found.map_err(|error| error.within(format!("{UNMAPPED} {at}"))),
        }
    }

    /// How many of `most` bytes from `at` on are known to be zeros.
    ///
    /// # Errors
    ///
    /// As [`Source::run`].
    pub fn zeros(&mut self, at: u64, most: u64) -> Result<u64> {
        let mut done = 0;
        while done < most {
            let run = self.run(at + done, most - done)?;
            if !run.zero {
                break;
            }
            done += run.len;
        }
        Ok(done)
    }

    /// Fills `buf`; behind the end with zeros.
    ///
    /// # Errors
    ///
    /// What reading fails with.
    pub fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let salvage = self.salvage;
            let Some((part, here, left)) = self.part(at) else {
                rest.fill(0);
                break;
            };
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            if let Err(error) = part.driver.read(here, now) {
                if !salvage {
                    return Err(error);
                }
                let mut lost = Vec::new();
                part.salvage(here, now, &mut lost);
                let begin = at - here;
                for found in lost {
                    self.note(Unreadable {
                        at: found.at.wrapping_add(begin),
                        ..found
                    });
                }
            }
            at += len as u64;
            rest = later;
        }
        Ok(())
    }

    /// Appends to `into` where `len` bytes at `at` are read from, all of them within the disk.
    ///
    /// # Errors
    ///
    /// What reading the formats' tables fails with.
    pub fn locate(&mut self, at: u64, len: u64, into: &mut Vec<Fragment>) -> Result<()> {
        let mut done = 0;
        while done < len {
            let Some((part, here, left)) = self.part(at + done) else {
                return Err(Error::invalid(
                    "a source ends before the bytes that are looked for",
                ));
            };
            let now = left.min(len - done);
            part.driver.locate(here, now, into)?;
            done += now;
        }
        Ok(())
    }

    /// Whether what cannot be read counts as zeros.
    pub fn salvages(&self) -> bool {
        self.salvage
    }

    /// Notes that `len` bytes at `at` cannot be read, once.
    fn skip(&mut self, at: u64, len: u64, error: &Error) {
        let (from, end) = (at.max(self.skipped), at + len);
        if from < end {
            self.skipped = end;
            self.note(Unreadable::new(from, end - from, error));
        }
    }

    fn note(&mut self, found: Unreadable) {
        self.damage.unreadable_bytes += found.len;
        let places = &mut self.damage.unreadable;
        put(places, found);
        places.dedup_by(|next, before| {
            let goes_on = before.at + before.len == next.at;
            before.len += if goes_on { next.len } else { 0 };
            goes_on
        });
    }
}

/// Puts a place that is not known yet among the first ones. Copiers come by in any order.
fn put(places: &mut Vec<Unreadable>, found: Unreadable) {
    let nth = places.partition_point(|place| place.at < found.at);
    if places.get(nth).is_none_or(|place| place.at != found.at) {
        places.insert(nth, found);
        places.truncate(UNREADABLE_MAX);
    }
}

/// Puts zeros in place of what cannot be read, and notes that behind what is lost before it.
fn lose(at: u64, part: &mut [u8], error: &Error, lost: &mut Vec<Unreadable>) {
    part.fill(0);
    let len = part.len() as u64;
    match lost.last_mut() {
        Some(last) if last.at + last.len == at => last.len += len,
        _ => lost.push(Unreadable::new(at, len, error)),
    }
}

impl Part<'_> {
    fn run(&mut self, at: u64, most: u64) -> Result<Run> {
        let found = self.driver.extent_at(at, most)?;
        let mut run = Run::data(found.len);
        let (file, offset) = match found.kind {
            ExtentKind::Zero { .. } => {
                (run.zero, run.data) = (true, false);
                return Ok(run);
            }
            ExtentKind::Unallocated => return Ok(Run::nothing(found.len)),
            ExtentKind::Data { file, offset } => (file, offset),
            // Nothing is there, but nobody knows what it reads as.
            ExtentKind::Untouched => {
                (run.allocated, run.data) = (false, false);
                return Ok(run);
            }
            ExtentKind::Compressed(_) => {
                run.packed = true;
                return Ok(run);
            }
        };
        let Some(layer) = self.chain.layers.get(found.depth) else {
            return Ok(run);
        };
        let Some(storage) = layer.files.get(usize::from(file.0)) else {
            return Ok(run);
        };
        match self.driver.readable(found.depth, file, offset, run.len)? {
            0 => {
                run.lost = true;
                return Ok(run);
            }
            readable => run.len = readable,
        }
        if layer.image.encryption().is_none() {
            let files = self.identities.get(found.depth);
            let identity = files.and_then(|files| files.get(usize::from(file.0)));
            run.place = identity.copied().flatten().map(|identity| Place {
                file: Arc::clone(storage) as Arc<dyn Storage>,
                identity,
                offset: offset.0,
            });
        }
        if layer.holes_are_zeros(file) {
            match storage.range_at(offset.0)? {
                None => {
                    run.zero = true;
                    // A raw disk ends with its file, but for the rest of a sector: nothing is cut off there.
                    if layer.format == Format::Raw {
                        run.place = None;
                    }
                }
                Some(range) => {
                    run.len = run.len.min(range.len.max(1));
                    run.zero = range.kind.is_zero();
                }
            }
            run.data = !run.zero;
        }
        Ok(run)
    }

    /// Bytes from `at` on to the end of its cluster: how much is lost where a table cannot be read.
    fn unit_left(&self, at: u64) -> u64 {
        let first = self.chain.layers.first();
        let cluster = first.map_or(1, |layer| layer.image.describe().cluster_size);
        let unit = cluster.max(SECTOR);
        unit - at % unit
    }

    /// How much from `at` on the format says that cannot be read. An image over it may have something in between.
    fn unreadable(&self, at: u64) -> Option<u64> {
        match &self.chain.layers[..] {
            [layer] => layer.image.unreadable(block::GuestOffset(at)),
            _ => None,
        }
    }

    /// Reads what can be read of `buf`, by sectors, and puts zeros in place of the rest. What is packed can be read as a whole or
    /// not at all.
    fn salvage(&mut self, at: u64, buf: &mut [u8], lost: &mut Vec<Unreadable>) {
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let asked = rest.len() as u64;
            let (len, in_parts) = match self.run(at, asked) {
                // Nothing of it is there.
                Ok(run) => (run.len, !run.lost && !run.packed),
                Err(_) => {
                    let len = self.unreadable(at).unwrap_or(self.unit_left(at));
                    let len = len.min(asked);
                    // No table: nothing of the cluster.
                    (len, self.driver.is_mapped(at, len))
                }
            };
            // At most the buffer's.
            let (now, later) = rest.split_at_mut(len as usize);
            match self.driver.read(at, now) {
                Ok(()) => {}
                Err(_) if in_parts => {
                    let parts = now.chunks_mut(SECTOR as usize);
                    for (here, part) in (at..).step_by(SECTOR as usize).zip(parts) {
                        if let Err(error) = self.driver.read(here, part) {
                            lose(here, part, &error, lost);
                        }
                    }
                }
                Err(error) => lose(at, now, &error, lost),
            }
            at += len;
            rest = later;
        }
    }
}
