//! What a disk may read as: which version of each sector was written, and which a flush covers.
//!
//! A sector's bytes name the sector and the version, in each word, so that one read tells what it is, that all of it
//! is of one version, and whose it is.

use std::collections::HashMap;
use std::fmt;

pub const SECTOR: usize = 512;

/// What a sector reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeros.
    Zero,
    /// The bytes of [`fill`].
    Version(u32),
}

/// The bytes of `version` for the sectors from `first` on.
pub fn fill(bytes: &mut [u8], first: u64, version: u32) {
    for (sector, bytes) in (first..).zip(bytes.chunks_mut(SECTOR)) {
        let head = u64::from(version) << 32 | sector;
        for (i, word) in (0u64..).zip(bytes.chunks_mut(8)) {
            // The first word is the head itself; the others differ from each other.
            let mixed = head ^ i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&mixed.to_le_bytes()[..word.len()]);
        }
    }
}

/// What the bytes of `sector` are, if they are anything whole that belongs there.
pub fn decode(bytes: &[u8], sector: u64) -> Option<Content> {
    if bytes == [0; SECTOR] {
        return Some(Content::Zero);
    }
    let head = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let version = (head >> 32) as u32;
    let mut expected = [0; SECTOR];
    fill(&mut expected, sector, version);
    (bytes == expected).then_some(Content::Version(version))
}

/// Something that was done to a sector.
#[derive(Clone, Copy, Debug)]
struct Change {
    /// Number of the request.
    request: u32,
    content: Content,
    /// A discard promises nothing: what was there may stay.
    only_may: bool,
}

/// A request that changes the disk.
#[derive(Clone, Copy, Debug)]
struct Written {
    first: u64,
    sectors: u64,
}

/// The record of one disk, over any number of crashes.
///
/// Requests in flight never touch the same sector ([`Record::free`]), so that the order of a sector's changes is
/// that of their numbers.
pub struct Record {
    /// What each sector was when the server started.
    base: Vec<Content>,
    /// What has been done to it since the newest change that a flush covers, that one included.
    changes: HashMap<u64, Vec<Change>>,
    /// Sectors of requests in flight.
    busy: Vec<bool>,
    /// Completed, and no flush was sent since.
    completed: Vec<(u32, Written)>,
    open: HashMap<u32, Written>,
    /// What the flushes in flight cover, by their numbers.
    flushing: HashMap<u32, Vec<(u32, Written)>>,
    next: u32,
    /// Changes that a completed flush covered.
    pub covered: u64,
}

impl Record {
    pub fn new(base: Vec<Content>, first_version: u32) -> Self {
        Self {
            busy: vec![false; base.len()],
            base,
            changes: HashMap::new(),
            completed: Vec::new(),
            open: HashMap::new(),
            flushing: HashMap::new(),
            next: first_version,
            covered: 0,
        }
    }

    pub fn sectors(&self) -> u64 {
        self.base.len() as u64
    }

    /// Whether no request in flight touches the range.
    pub fn free(&self, first: u64, sectors: u64) -> bool {
        !self.busy[first as usize..(first + sectors) as usize].contains(&true)
    }

    pub fn hold(&mut self, first: u64, sectors: u64, busy: bool) {
        self.busy[first as usize..(first + sectors) as usize].fill(busy);
    }

    /// The number of the next request: for a write also its version.
    pub fn number(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    /// Notes that request `request` is about to change a range; `content` is `None` for a discard.
    pub fn begin(&mut self, request: u32, first: u64, sectors: u64, content: Option<Content>) {
        self.hold(first, sectors, true);
        self.open.insert(request, Written { first, sectors });
        for sector in first..first + sectors {
            self.changes.entry(sector).or_default().push(Change {
                request,
                content: content.unwrap_or(Content::Zero),
                only_may: content.is_none(),
            });
        }
    }

    /// Notes that a change has been completed.
    pub fn end(&mut self, request: u32) {
        let written = self.open.remove(&request).expect("a request in flight");
        self.hold(written.first, written.sectors, false);
        self.completed.push((request, written));
    }

    /// Notes that a flush is about to be sent: it covers what has been completed by now.
    pub fn flush(&mut self, request: u32) {
        let covers = std::mem::take(&mut self.completed);
        self.flushing.insert(request, covers);
    }

    /// Notes that a flush has been completed.
    pub fn flushed(&mut self, request: u32) {
        for (request, written) in self.flushing.remove(&request).expect("a flush in flight") {
            self.covered += 1;
            for sector in written.first..written.first + written.sectors {
                let Some(changes) = self.changes.get_mut(&sector) else {
                    continue;
                };
                let at = changes.iter().position(|change| change.request == request);
                // Not there: a flush that was sent later covered something newer.
                if let Some(at) = at.filter(|at| !changes[*at].only_may) {
                    changes.drain(..at);
                }
            }
        }
    }

    /// Whether `found` is what a sector without a request in flight reads as, in a server that runs.
    pub fn reads_as(&self, sector: u64, found: Content) -> bool {
        let changes = self.changes.get(&sector).map_or(&[][..], Vec::as_slice);
        let last = changes.iter().rposition(|change| !change.only_may);
        let since = &changes[last.unwrap_or(0)..];
        since.iter().any(|change| change.content == found)
            || last.is_none() && self.base[sector as usize] == found
    }

    /// Judges the whole disk after a crash, of which `bytes` are the sectors from `first` on.
    pub fn judge(&self, first: u64, bytes: &[u8]) -> Result<Vec<Content>, Loss> {
        let mut found = Vec::new();
        for (sector, bytes) in (first..).zip(bytes.chunks(SECTOR)) {
            let changes = self.changes.get(&sector).map_or(&[][..], Vec::as_slice);
            let covered = changes.first().is_some_and(|first| self.is_covered(first));
            let content = decode(bytes, sector);
            let may = changes.iter().any(|change| Some(change.content) == content)
                || !covered && Some(self.base[sector as usize]) == content;
            match content.filter(|_| may) {
                Some(content) => found.push(content),
                None => {
                    return Err(Loss {
                        sector,
                        found: content,
                        starts: bytes[..16].to_vec(),
                        base: (!covered).then(|| self.base[sector as usize]),
                        changes: changes.to_vec(),
                    });
                }
            }
        }
        Ok(found)
    }

    /// Whether a completed flush covers the change: then it is no longer in any list of those that none covers.
    fn is_covered(&self, change: &Change) -> bool {
        let waits = |list: &[(u32, Written)]| list.iter().any(|(r, _)| *r == change.request);
        !change.only_may
            && !self.open.contains_key(&change.request)
            && !waits(&self.completed)
            && !self.flushing.values().any(|list| waits(list))
    }

    /// Starts over with what was found after a crash.
    pub fn restart(&mut self, found: Vec<Content>) {
        *self = Self {
            covered: self.covered,
            ..Self::new(found, self.next)
        };
    }
}

/// A sector that reads as what it may not.
#[derive(Debug)]
pub struct Loss {
    sector: u64,
    found: Option<Content>,
    starts: Vec<u8>,
    /// What it was before, where that would do.
    base: Option<Content>,
    changes: Vec<Change>,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "sector {} reads as {:?} (it starts with {:02x?}); before the start it was {:?}, since then {:?}",
            self.sector, self.found, self.starts, self.base, self.changes
        )
    }
}

#[test]
fn losses_and_strangers_are_noticed() {
    let mut bytes = vec![0; 4 * SECTOR];
    let judge = |record: &Record, bytes: &[u8]| record.judge(0, bytes).is_ok();
    let mut record = Record::new(vec![Content::Zero; 4], 7);
    assert!(judge(&record, &bytes));
    // Written, not flushed: old or new, whole.
    let write = record.number();
    record.begin(write, 1, 2, Some(Content::Version(write)));
    assert!(judge(&record, &bytes));
    fill(&mut bytes[SECTOR..2 * SECTOR], 1, write);
    assert!(judge(&record, &bytes));
    bytes[SECTOR + 100] ^= 1;
    assert!(!judge(&record, &bytes), "torn within a sector");
    fill(&mut bytes[SECTOR..2 * SECTOR], 2, write);
    assert!(!judge(&record, &bytes), "another sector's bytes");
    fill(&mut bytes[SECTOR..3 * SECTOR], 1, write);
    // A flush that was sent before the write ended covers nothing.
    let early = record.number();
    record.flush(early);
    record.end(write);
    record.flushed(early);
    bytes[SECTOR..2 * SECTOR].fill(0);
    assert!(judge(&record, &bytes));
    let flush = record.number();
    record.flush(flush);
    assert!(judge(&record, &bytes));
    record.flushed(flush);
    assert!(!judge(&record, &bytes), "what a flush covered is lost");
    assert!(!record.reads_as(1, Content::Zero));
    fill(&mut bytes[SECTOR..2 * SECTOR], 1, write);
    assert!(judge(&record, &bytes));
    // A discard may do something or nothing.
    let discard = record.number();
    record.begin(discard, 1, 1, None);
    record.end(discard);
    assert!(record.reads_as(1, Content::Zero) && record.reads_as(1, Content::Version(write)));
    record.flush(99);
    record.flushed(99);
    assert!(judge(&record, &bytes));
    bytes[SECTOR..2 * SECTOR].fill(0);
    assert!(judge(&record, &bytes));
    fill(&mut bytes[3 * SECTOR..], 3, write);
    assert!(!judge(&record, &bytes), "a version that nobody wrote there");
}
