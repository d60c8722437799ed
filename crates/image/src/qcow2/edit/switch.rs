//! Replacing the header.
//!
//! Its first sector is written whole or not at all, and has all fields and, as a rule, the extensions. Where
//! something behind that sector changes too, it is brought there while nothing refers to it:
//!
//! ```text
//!   1  the backing file's name, once more, at the cluster's end    ⎫ only if the old header goes beyond the
//!   2  first sector: the old header without feature names, and     ⎬ sector; names of features are for
//!      with that copy of the name                                  ⎭ people, and can be missed
//!   3  what the new header has behind the first sector
//!   4  first sector: the new header
//!   5  zeros, where something old is left
//! ```
//!
//! A barrier follows each. Only a header whose fields and indispensable extensions alone pass 512 bytes (a very
//! long name of a data file, many fields that nobody knows) is written in one piece, as QEMU does always.

use super::Editor;
use crate::qcow2::extensions::{self, Extension};
use crate::qcow2::header::Header;
use block::{Error, Result};
use std::ops::Range;

const SECTOR: usize = 512;

/// A piece of the first cluster to write, and where. Durable before the next is written.
pub(super) type Piece = (usize, Vec<u8>);

impl Editor<'_> {
    /// Fails where `header` does not fit its cluster.
    pub(super) fn check_fits(&self, header: &Header) -> Result<()> {
        match rest(&self.current) == rest(header) {
            // It stays where it is.
            true => Ok(()),
            false => place(header).map(drop),
        }
    }

    /// Puts `self.header` in place of the file's.
    pub(super) fn switch(&mut self) -> Result<()> {
        for (at, bytes) in pieces(&self.first, &self.current, &self.header)? {
            self.storage.write_at(at as u64, &bytes)?;
            self.storage.sync()?;
            let end = at + bytes.len();
            if self.first.len() < end {
                self.first.resize(end, 0);
            }
            self.first.splice(at..end, bytes);
        }
        Ok(())
    }
}

/// What is to be written, in order, so that a first cluster of `first`, with the header `old`, has `new`.
pub(super) fn pieces(first: &[u8], old: &Header, new: &Header) -> Result<Vec<Piece>> {
    if old == new {
        return Ok(Vec::new());
    }
    if rest(old) == rest(new) {
        // Only fields of the first sector. Where the name is stays as it is.
        let name_at = crate::qcow2::read_u64(first, 8).unwrap_or(0);
        let mut bytes = first.to_vec();
        put(&mut bytes, 0, &new.encode_fields(name_at));
        bytes.truncate(SECTOR);
        return Ok(vec![(0, bytes)]);
    }
    let cluster = old.cluster_size() as usize;
    let mut now = first.to_vec();
    now.resize(cluster, 0);
    let mut target = place(new)?;
    let mut pieces = Vec::new();
    let whole = |target: &Cluster| Ok(vec![(0, target.bytes.clone())]);
    if now.get(SECTOR..) == target.bytes.get(SECTOR..) {
        target.bytes.truncate(SECTOR);
        return Ok(vec![(0, target.bytes)]);
    }
    // What must stay as it is until the switch.
    let mut kept = 0..0;
    if used(&now, old) > SECTOR {
        let Some(lean) = retreat(&now, old) else {
            return whole(&target);
        };
        kept = lean.name.clone();
        if now.get(kept.clone()) != lean.bytes.get(kept.clone()) {
            let name = lean.bytes.get(kept.clone()).unwrap_or_default().to_vec();
            put(&mut now, kept.start, &name);
            pieces.push((kept.start, name));
        }
        let sector = lean.bytes.get(..SECTOR).unwrap_or_default().to_vec();
        put(&mut now, 0, &sector);
        pieces.push((0, sector));
        if target.bytes.get(kept.clone()) != now.get(kept.clone()) {
            // Not over the old name.
            match beside(new, kept.start) {
                Some(other) => target = other,
                None => return whole(&target),
            }
        }
    }
    let mut tail = target.bytes.clone();
    put(&mut tail, kept.start, now.get(kept).unwrap_or_default());
    tail.drain(..SECTOR);
    let left_over = target.bytes.get(SECTOR..) != Some(tail.as_slice());
    pieces.push((SECTOR, tail));
    let sector = target.bytes.get(..SECTOR).unwrap_or_default().to_vec();
    pieces.push((0, sector));
    if left_over {
        let tail = target.bytes.get(SECTOR..).unwrap_or_default().to_vec();
        pieces.push((SECTOR, tail));
    }
    Ok(pieces)
}

/// All of a header that is not a field with a fixed place in the first 112 bytes.
fn rest(header: &Header) -> (u32, u32, &[u8], &[Extension], Option<&str>) {
    (
        header.version,
        header.header_length,
        &header.unknown_fields,
        &header.extensions,
        header.backing.as_deref(),
    )
}

/// A first cluster.
struct Cluster {
    bytes: Vec<u8>,
    /// Where the backing file's name is.
    name: Range<usize>,
    /// Where fields and extensions end.
    front: usize,
}

impl Cluster {
    /// `header` with its name at `name_at`, or right behind the rest. `None` where that does not fit.
    fn of(header: &Header, name_at: Option<usize>) -> Option<Self> {
        let name = header.backing_bytes();
        let mut bytes = header.encode_fields(0);
        extensions::encode(&header.extensions, &mut bytes).ok()?;
        let front = bytes.len();
        let at = match name.is_empty() {
            true => 0,
            false => name_at.unwrap_or(front),
        };
        let end = at + name.len();
        let cluster = header.cluster_size() as usize;
        if front > cluster || end > cluster || (!name.is_empty() && at < front) {
            return None;
        }
        put(&mut bytes, 0, &header.encode_fields(at as u64));
        bytes.resize(cluster, 0);
        put(&mut bytes, at, &name);
        Some(Self {
            bytes,
            name: at..end,
            front,
        })
    }
}

fn is_names(extension: &Extension) -> bool {
    extension.kind == extensions::FEATURE_NAMES
}

/// Where a name goes that is in nobody's way.
fn at_end(header: &Header) -> usize {
    let name = header.backing_bytes();
    (header.cluster_size() as usize).saturating_sub(name.len()) & !7
}

/// The first cluster with `header`: feature names last, and left out where there is no room for them.
fn place(header: &Header) -> Result<Cluster> {
    let mut header = header.clone();
    header.extensions.sort_by_key(is_names);
    let mut lean = header.clone();
    lean.extensions.retain(|e| !is_names(e));
    for candidate in [&header, &lean] {
        for name_at in [Some(at_end(candidate)), None] {
            if let Some(cluster) = Cluster::of(candidate, name_at) {
                return Ok(cluster);
            }
        }
    }
    Err(Error::invalid(format!(
        "header, extensions and backing file's name take more than a cluster of {} bytes",
        header.cluster_size()
    )))
}

/// The same with the name before `end`.
fn beside(header: &Header, end: usize) -> Option<Cluster> {
    let mut header = header.clone();
    header.extensions.sort_by_key(is_names);
    let name = header.backing_bytes();
    let at = end.saturating_sub(name.len()) & !7;
    Cluster::of(&header, Some(at)).filter(|cluster| cluster.front <= end)
}

/// Where the part of `now` ends that its header, `old`, refers to.
fn used(now: &[u8], old: &Header) -> usize {
    let mut front = old.encode_fields(0);
    // The end mark is not there when the name follows at once; it is zeros anyway.
    let front = match extensions::encode(&old.extensions, &mut front) {
        Ok(()) => front.len() - 8,
        Err(_) => now.len(),
    };
    match &old.backing {
        None => front + 8,
        Some(name) => {
            let at = crate::qcow2::read_u64(now, 8).unwrap_or(0);
            let at = usize::try_from(at).unwrap_or(now.len());
            front.max(at.saturating_add(block::name::len(name)))
        }
    }
}

/// The header that says what `old` says, but for the names of features, and needs nothing between its first sector
/// and the backing file's name, for which there is a place that `old` does not use.
fn retreat(now: &[u8], old: &Header) -> Option<Cluster> {
    let mut lean = old.clone();
    lean.extensions.retain(|e| !is_names(e));
    let slot = at_end(&lean);
    let cluster = Cluster::of(&lean, Some(slot))?;
    let same = now.get(cluster.name.clone()) == cluster.bytes.get(cluster.name.clone());
    let free = cluster.name.is_empty() || slot >= used(now, old) || same;
    (free && cluster.front <= SECTOR && (cluster.name.is_empty() || slot >= SECTOR))
        .then_some(cluster)
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    if let Some(there) = bytes.get_mut(at..at + part.len()) {
        there.copy_from_slice(part);
    }
}
