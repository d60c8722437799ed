//! Opening: read and judge everything that stays in memory.

use super::ahead::Ahead;
use super::alloc::Space;
use super::cache::Cache;
use super::crypt;
use super::entry::{Geometry, OFFSET_MASK};
use super::features;
use super::header::{Header, REFCOUNT_TABLE_BYTES_MAX};
use super::lazy::Lazy;
use super::pending::Births;
use super::refcount::RefTable;
use super::snapshot;
use super::state::{Covered, Places, Sectors, State};
use super::tables::{FRAMES_MAX, Tables};
use super::{Qcow2, bitmap, damaged};
use crate::head;
pub use crate::metadata::{CACHE_BYTES_DEFAULT, CACHE_BYTES_MAX};
use crate::metadata::{FRAMES_MIN, Tickets};
use block::{Context, Error, ErrorKind, Result, Storage};
use crypto::{Passphrase, SectorCipher};
use std::collections::HashSet;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

/// Clusters with tables of snapshots that are kept from being overwritten if refcounts are wrong.
const SNAPSHOT_CLUSTERS_MAX: usize = 65536;

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Never write to it.
    pub read_only: bool,
    /// Upper bound of the metadata cache in bytes; [`CACHE_BYTES_DEFAULT`] when not given. Less
    /// is used where less covers the disk, a little more where it is too little to work.
    pub cache_bytes: Option<u64>,
    /// Unlocks an encrypted image. Without it such an image opens, but its data stay encrypted.
    pub passphrase: Option<Arc<Passphrase>>,
    /// The cipher of the same image opened before, in place of a passphrase: nothing has to be computed again.
    pub cipher: Option<Arc<SectorCipher>>,
    /// Open it as a disk of so many bytes, which its L1 table has room for: see [`super::resize`].
    pub size: Option<u64>,
    /// Open the internal snapshot of that id, or else name, instead of the disk; for reading only.
    pub snapshot: Option<String>,
}

impl Qcow2 {
    /// Opens the image in `storage`, reading header, L1 table and refcount table.
    ///
    /// Fails with `Corrupt` (naming file, field and offset), `Unsupported` (naming the feature), or what
    /// reading failed with. Opened for writing, autoclear features that this code does not know are
    /// cleared at once. An image that can be read but must not be written opens; its
    /// description says why, and writes to it fail with `ReadOnly`.
    pub fn open(storage: &dyn Storage, options: &OpenOptions) -> Result<Self> {
        let name = storage.name();
        Self::open_unnamed(storage, options, &name).context(|| name)
    }

    fn open_unnamed(storage: &dyn Storage, options: &OpenOptions, name: &str) -> Result<Self> {
        let mut header = Header::read_unnamed(storage)?;
        header.check_features()?;
        if let Some(which) = &options.snapshot {
            snapshot::enter(storage, &mut header, which)?;
        }
        let data_file = header.data_file()?;
        if let Some(size) = options.size {
            header.size = size;
            header.validate()?;
        }
        let compression = header.compression()?;
        let encryption = crypt::open(storage, &header, options)?;
        let geometry = Geometry::of(&header);
        let file_len = storage.len()?;
        let mut first_sector = [0; 512];
        let mut lacks = header
            .read_only_because()
            .or_else(|| encryption.as_ref()?.read_only_because());
        if file_len < 512 {
            return Err(head::cut_off());
        }
        storage.read_at(0, &mut first_sector)?;
        let mut damage = |what: String| {
            lacks.get_or_insert_with(|| format!("it is damaged ({what}): run diskplane check"));
        };

        let l1 = read_l1(storage, &header, file_len)?;
        let cluster = geometry.cluster();
        let bits = geometry.cluster_bits;
        let l1_clusters = (u64::from(header.l1_size) * 8).div_ceil(cluster).max(1);
        let l1_first = header.l1_table_offset >> bits;
        let header_cluster = 0..1;
        let mut fixed = Vec::from([header_cluster]);
        if header.l1_size > 0 {
            fixed.push(l1_first..l1_first + l1_clusters);
        }
        let table_first = header.refcount_table_offset >> bits;
        let table_clusters = u64::from(header.refcount_table_clusters);
        let table = table_first..table_first + table_clusters;
        if l1_first == 0 && header.l1_size > 0 {
            return Err(Error::corrupt(
                "header: l1_table_offset at byte 40 lies in the header's cluster",
            ));
        }
        if table.contains(&0)
            || header.l1_size > 0 && table.start < l1_first + l1_clusters && l1_first < table.end
        {
            return Err(Error::corrupt(
                "header: refcount_table_offset at byte 48 overlaps header or L1 table",
            ));
        }

        fixed.push(table);
        if let Some((offset, len)) = crypt::luks_range(&header)? {
            fixed.push(offset >> bits..(offset + len).div_ceil(cluster));
        }

        // What a writer needs beyond: every place that holds metadata.
        let mut blocks = HashSet::new();
        let mut refs = RefTable::new(Vec::new(), table_first, table_clusters);
        if !options.read_only && options.snapshot.is_none() && lacks_nothing(&header) {
            let entries = read_ref_table(storage, &header, file_len)?;
            let mut claim = |what: &str, index: usize, offset: u64| {
                let at = offset >> bits;
                if fixed.iter().any(|r| r.contains(&at)) || !blocks.insert(at) {
                    damage(format!(
                        "{what} {index} at {offset:#x} overlaps other metadata"
                    ));
                }
            };
            let mut unsound = None;
            // Where a table is missing, what a writer appends would come to lie, and be read as that table.
            let cut_off = |offset: u64, what: &str, index: usize| {
                (offset.saturating_add(cluster) > file_len).then(|| {
                    format!("{what} {index} at {offset:#x} ends behind the end of the file ({file_len:#x}), which is cut off")
                })
            };
            for (index, raw) in entries.iter().enumerate() {
                match geometry.decode_ref(*raw) {
                    Ok(0) => {}
                    Ok(offset) => {
                        unsound = unsound.or_else(|| cut_off(offset, "refcount block", index));
                        claim("refcount block", index, offset);
                    }
                    Err(bad) => {
                        unsound
                            .get_or_insert(format!("refcount table entry {index} {}", bad.text()));
                    }
                }
            }
            for (index, raw) in l1.iter().enumerate().take(header.l1_size as usize) {
                match raw & OFFSET_MASK {
                    _ if !geometry.l1_sound(*raw) => {
                        unsound.get_or_insert(format!("L1 entry {index} is {raw:#x}"));
                    }
                    0 => {}
                    offset => {
                        unsound = unsound.or_else(|| cut_off(offset, "L2 table", index));
                        claim("L2 table", index, offset);
                    }
                }
            }
            match snapshot::tables(storage, &header) {
                Ok(tables) => {
                    let places = tables.iter().flat_map(|(at, bytes)| {
                        let end = at.saturating_add(*bytes);
                        (*at..end).step_by(cluster as usize)
                    });
                    for (index, at) in places.take(SNAPSHOT_CLUSTERS_MAX).enumerate() {
                        claim("cluster of snapshot tables", index, at);
                    }
                }
                Err(error) => drop(unsound.get_or_insert(error.to_string())),
            }
            if let Some(what) = unsound {
                damage(what);
            }
            refs = RefTable::new(entries, table_first, table_clusters);
        }

        let budget = options.cache_bytes.unwrap_or(CACHE_BYTES_DEFAULT);
        let frames = frame_count(&geometry, budget.min(CACHE_BYTES_MAX));
        let l1_sectors = l1.len() / 64;
        // Bits 0 and 1 are our marks: an entry that has them in the file is made unsound by bit 2 too.
        let l1 = l1
            .into_iter()
            .map(|raw| AtomicU64::new(if raw & 3 != 0 { raw | 4 } else { raw }))
            .collect();
        let end = file_len.div_ceil(cluster);
        let holed = {
            let last = end.saturating_sub(1) >> geometry.block_refcount_bits();
            let last = usize::try_from(last).unwrap_or(usize::MAX);
            refs.entries.get(last).is_none_or(|entry| *entry == 0)
        };
        if options.snapshot.is_some() {
            lacks = Some("it is a snapshot".into());
        }
        let places = Places { blocks, fixed };
        let mut bitmaps = None;
        // Under another size than its own nothing is written that they would note: see `resize`.
        if !options.read_only && options.size.is_none() && lacks.is_none() {
            match bitmap::Tracker::load(storage, &header, |cluster| places.holds(cluster)) {
                Ok(found) => bitmaps = found,
                Err(error) => lacks = Some(error.to_string()),
            }
        }
        let read_only = lacks
            .clone()
            .or_else(|| options.read_only.then(String::new));
        if read_only.is_none() && header.autoclear & !features::AUTOCLEAR_KNOWN != 0 {
            // Before anything else is written: what they say may not be true any more then.
            header.autoclear &= features::AUTOCLEAR_KNOWN;
            let field = header.autoclear.to_be_bytes();
            for (to, from) in first_sector.iter_mut().skip(88).zip(field) {
                *to = from;
            }
            storage.write_at(0, &first_sector)?;
            storage.sync()?;
        }
        let barred = damaged::barred(read_only.is_some());
        let lazy = read_only.is_none()
            && header.version >= 3
            && header.compatible & features::LAZY_REFCOUNTS != 0;
        Ok(Self {
            name: name.to_owned(),
            data_file,
            compression,
            encryption,
            read_only,
            lacks,
            first_sector,
            opened_len: file_len,
            tables: Tables::new(&geometry, l1, frames),
            state: Mutex::new(State {
                cache: Cache::new(frames, &geometry),
                refs,
                space: Space::new(end, space_bytes(&geometry), holed),
                ahead: Ahead::default(),
                tickets: Tickets::new(),
                births: Births::default(),
                places,
                copies: super::shared::Copies::default(),
                l1_changed: Sectors::new(l1_sectors),
                fresh_tables: Vec::new(),
                derefs: Vec::new(),
                ordered: false,
                lazy: Lazy::new(lazy),
                failed: false,
                covered: Covered::default(),
                tail: None,
                scratch: Vec::with_capacity(frames),
                words: Vec::with_capacity(geometry.slice_words()),
                covers: frames as u64 >= geometry.l2_slices(),
            }),
            ahead: std::sync::atomic::AtomicBool::new(false),
            barred,
            bitmaps,
            geometry,
            header,
        })
    }
}

/// Incompatible features that a writer here knows.
const WRITABLE: u64 = features::COMPRESSION | features::EXTENDED_L2 | features::DATA_FILE;

/// Whether the header alone allows writing.
fn lacks_nothing(header: &Header) -> bool {
    header.read_only_because().is_none() && header.incompatible & !WRITABLE == 0
}

/// The L1 table, padded to whole sectors with what the file has there.
fn read_l1(storage: &dyn Storage, header: &Header, file_len: u64) -> Result<Vec<u64>> {
    let len = u64::from(header.l1_size) * 8;
    let end = header.l1_table_offset + len;
    if header.l1_size > 0 && end > file_len {
        return Err(Error::corrupt(format!(
            "header: L1 table at {:#x} with {} entries ends behind the file's end ({file_len:#x})",
            header.l1_table_offset, header.l1_size
        )));
    }
    // At most 32 MiB, and the file has them.
    let mut bytes = vec![0; len.next_multiple_of(512) as usize];
    let there = (file_len - header.l1_table_offset.min(file_len)).min(bytes.len() as u64) as usize;
    if let Some(part) = bytes.get_mut(..there).filter(|p| !p.is_empty() && len > 0) {
        storage.read_at(header.l1_table_offset, part)?;
    }
    Ok(words_of(&bytes))
}

fn read_ref_table(storage: &dyn Storage, header: &Header, file_len: u64) -> Result<Vec<u64>> {
    let len = u64::from(header.refcount_table_clusters) << header.cluster_bits;
    if header.refcount_table_offset + len > file_len {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "header: refcount table at {:#x} of {len:#x} bytes ends behind the file's end ({file_len:#x})",
                header.refcount_table_offset
            ),
        ));
    }
    // At most 8 MiB.
    let mut bytes = vec![0; len as usize];
    storage.read_at(header.refcount_table_offset, &mut bytes)?;
    Ok(words_of(&bytes))
}

/// Big-endian 64-bit words.
pub(super) fn words_of(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(word_of).collect()
}

/// One big-endian word; fewer bytes are padded with zeros.
pub(super) fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    for (to, from) in word.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_be_bytes(word)
}

/// Bytes that the image file may grow by, roughly: the disk's, or those of its L2 tables where data are
/// in a file of their own.
fn space_bytes(geometry: &Geometry) -> u64 {
    match geometry.data_file {
        true => geometry.l2_slices() << geometry.slice_bits,
        false => geometry.size,
    }
}

/// How many frames the cache gets.
fn frame_count(geometry: &Geometry, budget: u64) -> usize {
    let l2 = geometry.l2_slices();
    // Refcounts for as many clusters as the disk has, and some for metadata.
    let refs = (geometry.guest_clusters() >> geometry.slice_refcount_bits()) + 16;
    let needed = l2.saturating_add(refs);
    // When the refcount table moves, the refcounts of its clusters are in memory at once.
    let table = REFCOUNT_TABLE_BYTES_MAX >> geometry.cluster_bits;
    let min = FRAMES_MIN + 2 * (table >> geometry.slice_refcount_bits());
    let frames = needed.min(budget >> geometry.slice_bits).max(min);
    frames.min(FRAMES_MAX) as usize
}
