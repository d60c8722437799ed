//! Opening: read and judge everything that stays in memory.

use super::Qed;
use super::header::{Header, words_of};
use super::map::L1_UNSOUND;
use super::space::Space;
use super::state::{Covered, Places, State};
use crate::metadata::cache::Cache;
use crate::metadata::tables::{FRAMES_MAX, Tables};
use crate::metadata::{
    CACHE_BYTES_DEFAULT, CACHE_BYTES_MAX, FRESH, FRESH_ZEROED, Layout, Sectors, Tickets, read_short,
};
use block::{Context, Result, Storage};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Frames that a cache has at least. Half of them may be pinned by allocations in flight. A slice has 4 KiB as a rule, 4 MiB
/// at most: of disks near 2^63 bytes.
const FRAMES_MIN: u64 = 16;

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Never write to it.
    pub read_only: bool,
    /// Upper bound of the metadata cache in bytes; 64 MiB when not given. Less is used where less covers the
    /// disk, a little more where it is too little to work.
    pub cache_bytes: Option<u64>,
    /// Open it as a disk of so many bytes, not less than it has, that its tables have room for.
    pub size: Option<u64>,
}

impl Qed {
    /// Opens the image in `storage`, reading header and L1 table.
    ///
    /// Fails with `Corrupt` (naming file, field and offset), `Unsupported` (naming the feature), or what
    /// reading failed with. Opened for writing, autoclear features (of which this code knows none) are
    /// cleared at once. An image that can be read but must not be written opens; its
    /// description says why, and writes to it fail with `ReadOnly`.
    pub fn open(storage: &dyn Storage, options: &OpenOptions) -> Result<Self> {
        let name = storage.name();
        Self::open_unnamed(storage, options, &name).context(|| name)
    }

    fn open_unnamed(storage: &dyn Storage, options: &OpenOptions, name: &str) -> Result<Self> {
        let mut header = Header::read_unnamed(storage)?;
        let file_len = storage.len()?;
        let on_disk = header.image_size;
        if let Some(size) = options.size {
            header.image_size = size;
            header.validate(file_len)?;
        }
        let bits = header.cluster_size.trailing_zeros();
        let table_bits = bits + header.table_size.trailing_zeros();
        let layout = Layout::new(header.image_size, bits, table_bits, false);
        // Of what the table has, what the disk needs: at most 16 MiB, whatever the sizes, since a disk ends at 2^63.
        let tables = layout.guest_clusters().div_ceil(1 << layout.l2_bits());
        let entries = (tables as usize).next_multiple_of(64);
        let bytes = read_short(storage, header.l1_table_offset, entries * 8)?;
        let l1: Vec<u64> = words_of(&bytes).collect();

        let mut lacks = header.needs_check().then(|| {
            "it was not closed cleanly (need-check bit): run diskplane check --repair all"
                .to_owned()
        });
        let mut places = Places {
            table_size: u64::from(header.table_size),
            l1: header.l1_table_offset >> bits,
            ..Places::default()
        };
        if !options.read_only
            && let Err(what) = claim(&mut places, &header, &l1[..tables as usize], file_len)
        {
            let why = || format!("it is damaged ({what}): run diskplane check");
            lacks.get_or_insert_with(why);
        }
        let read_only = lacks
            .clone()
            .or_else(|| options.read_only.then(String::new));
        if read_only.is_none() && header.autoclear_features != 0 {
            // Before anything else is written: what they say may not be true any more then.
            header.autoclear_features = 0;
            let cleared = Header {
                image_size: on_disk,
                ..header.clone()
            };
            super::resize::write_header(storage, &cleared)?;
        }

        let budget = options.cache_bytes.unwrap_or(CACHE_BYTES_DEFAULT);
        let slices = layout.l2_slices();
        let frames = slices.min(budget.min(CACHE_BYTES_MAX) >> layout.slice_bits);
        let frames = frames.clamp(FRAMES_MIN, FRAMES_MAX) as usize;
        let sectors = l1.len() / 64;
        // Bits 0 and 1 are our marks: an entry that has them in the file is made unsound by bit 2 too.
        let marks = FRESH | FRESH_ZEROED;
        let l1 = l1
            .into_iter()
            .map(|raw| {
                if raw & marks != 0 {
                    raw | L1_UNSOUND
                } else {
                    raw
                }
            })
            .map(AtomicU64::new)
            .collect();
        let end = file_len.div_ceil(layout.cluster());
        let judged = match read_only {
            // At most 2 MiB.
            None => vec![0; slices.div_ceil(64) as usize],
            Some(_) => Vec::new(),
        };
        Ok(Self {
            name: name.to_owned(),
            read_only,
            lacks,
            tables: Tables::new(&layout, l1, frames),
            // A cluster that the file has a part of is not one (as in QEMU).
            end: AtomicU64::new(file_len & !(layout.cluster() - 1)),
            end_at_open: file_len & !(layout.cluster() - 1),
            state: Mutex::new(State {
                cache: Cache::new(frames, &layout),
                space: Space::new(end, layout.size),
                tickets: Tickets::new(),
                places,
                l1_changed: Sectors::new(sectors),
                fresh_tables: Vec::new(),
                ordered: false,
                covered: Covered::default(),
                scratch: Vec::with_capacity(frames),
                words: Vec::with_capacity(layout.slice_words()),
                covers: frames as u64 >= slices,
                judged,
            }),
            ahead: AtomicBool::new(false),
            damaged: AtomicBool::new(false),
            layout,
            header,
        })
    }
}

/// Notes where the L2 tables are, each of which must be sound and have its clusters for itself.
fn claim(places: &mut Places, header: &Header, l1: &[u64], file_len: u64) -> Result<(), String> {
    let cluster = u64::from(header.cluster_size);
    let head = u64::from(header.header_size) * cluster;
    let end = file_len & !(cluster - 1);
    let size = places.table_size;
    for (index, raw) in l1.iter().copied().enumerate().filter(|(_, raw)| *raw != 0) {
        let table_end = raw.checked_add(header.table_bytes());
        if !raw.is_multiple_of(cluster) || raw < head || table_end.is_none_or(|e| e > end) {
            return Err(format!("L1 entry {index} is {raw:#x}"));
        }
        let first = raw / cluster;
        let near = places.tables.range(..first + size).next_back();
        let taken = near.is_some_and(|other| other + size > first);
        if taken || (places.l1 < first + size && first < places.l1 + size) {
            return Err(format!(
                "L1 entry {index}: the L2 table at {raw:#x} overlaps another table"
            ));
        }
        places.tables.insert(first);
    }
    Ok(())
}
