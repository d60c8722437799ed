//! Refcounts of another width (`amend -o refcount_bits=`).
//!
//! ```text
//!   1  room for new structures, by an edit: counted, and nothing refers to it      a crash leaves leaks
//!   2  new blocks and table are written there: the counts as they are, less those
//!      of the old structures themselves; a barrier                                 likewise
//!   3  header's first sector: table and width at once; a barrier
//! ```
//!
//! Memory: the old table and the new one, at most 8 MiB each, and two blocks.

use super::check::{Block, Layout, block_at, each_refcount, set_refcount};
use super::close::read_short;
use super::edit::Editor;
use super::header::{Header, REFCOUNT_TABLE_BYTES_MAX};
use super::open::words_of;
use block::{Context, Error, Result, Storage, size};

/// Gives the image in `storage` refcounts of `bits` bits; nothing to do where it has them.
///
/// # Errors
///
/// `Unsupported` for a refcount that would not fit, naming its cluster, and for a table that would
/// pass its limit; what [`Editor::open`] refuses, and what the host fails with.
pub(super) fn change(storage: &dyn Storage, name: &str, bits: u32) -> Result<()> {
    let order = bits.trailing_zeros();
    if Header::read(storage)?.refcount_order == order {
        return Ok(());
    }
    let mut room = Room::default();
    {
        let mut editor = Editor::open(storage, name)?;
        let old = Counts::load(storage, editor.header()).context(|| name)?;
        old.check_fits(order).context(|| name)?;
        let mut want = old.plan(order, old.end, &room);
        // Room has refcounts too, perhaps in further blocks: each turn adds less.
        for _ in 0..16 {
            room.grow(&mut editor, want).context(|| name)?;
            let now = Counts::load(storage, editor.header()).context(|| name)?;
            want = now.plan(order, now.end, &room);
            if want == (0, 0) {
                break;
            }
        }
    }
    let old = Counts::load(storage, &Header::read(storage)?).context(|| name)?;
    if old.plan(order, old.end, &room) != (0, 0) {
        return Err(Error::invalid(format!(
            "{name}: no room for refcounts of {bits} bits"
        )));
    }
    old.rewrite(order, room).context(|| name)
}

/// Clusters for the new structures, all counted.
#[derive(Debug, Default)]
struct Room {
    /// Where the table goes, and its clusters.
    table: (u64, u64),
    /// Offsets of clusters for blocks.
    blocks: Vec<u64>,
    /// Clusters that will not be used.
    surplus: Vec<(u64, u64)>,
}

impl Room {
    /// Takes room for `blocks` more blocks and, if that is not 0, for a table of `table` clusters.
    fn grow(&mut self, editor: &mut Editor, (blocks, table): (u64, u64)) -> Result<()> {
        let cluster = editor.layout().cluster();
        if blocks > 0 {
            let at = editor.allocate(blocks)?;
            self.blocks.extend((0..blocks).map(|n| at + n * cluster));
        }
        if table > 0 {
            if self.table.1 > 0 {
                self.surplus.push(self.table);
            }
            self.table = (editor.allocate(table)?, table);
        }
        editor.commit()
    }
}

/// The refcounts of an image as the file has them.
#[derive(Debug)]
struct Counts<'a> {
    storage: &'a dyn Storage,
    layout: Layout,
    header: Header,
    /// Offsets of the blocks, 0 for none.
    table: Vec<u64>,
    /// Behind the last cluster whose block exists.
    end: u64,
}

impl<'a> Counts<'a> {
    fn load(storage: &'a dyn Storage, header: &Header) -> Result<Self> {
        let layout = Layout::of(header);
        // At most 8 MiB.
        let len = u64::from(header.refcount_table_clusters) << layout.cluster_bits;
        let bytes = read_short(storage, header.refcount_table_offset, len as usize)?;
        let mut table = Vec::with_capacity(bytes.len() / 8);
        for (index, raw) in words_of(&bytes).into_iter().enumerate() {
            table.push(match block_at(&layout, raw) {
                (Block::None, None) => 0,
                (Block::At(at), None) => at,
                _ => {
                    return Err(Error::corrupt(format!(
                        "refcount table: entry {index} is {raw:#x}, no cluster: run diskplane check"
                    )));
                }
            });
        }
        let used = table.iter().rposition(|at| *at != 0).map_or(0, |i| i + 1);
        table.truncate(used);
        let mut counts = Self {
            storage,
            layout,
            header: header.clone(),
            table,
            end: 0,
        };
        let per_block = 1u64 << layout.block_bits();
        for index in (0..used as u64).rev() {
            let mut last = None;
            let block = counts.block(index)?;
            each_refcount(layout.refcount_order, &block, per_block, |at, _| {
                last = Some(at);
            });
            if let Some(last) = last {
                counts.end = index * per_block + last + 1;
                break;
            }
        }
        Ok(counts)
    }

    fn block(&self, index: u64) -> Result<Vec<u8>> {
        let cluster = self.layout.cluster() as usize;
        match self.table.get(index as usize) {
            Some(0) | None => Ok(vec![0; cluster]),
            Some(at) => read_short(self.storage, *at, cluster),
        }
    }

    fn check_fits(&self, order: u32) -> Result<()> {
        let most = Layout {
            refcount_order: order,
            ..self.layout
        }
        .refcount_max();
        if most >= self.layout.refcount_max() {
            return Ok(());
        }
        let per_block = 1u64 << self.layout.block_bits();
        for index in 0..self.table.len() as u64 {
            let block = self.block(index)?;
            let mut over = None;
            each_refcount(
                self.layout.refcount_order,
                &block,
                per_block,
                |at, count| {
                    if count > most && over.is_none() {
                        over = Some((at, count));
                    }
                },
            );
            if let Some((at, count)) = over {
                return Err(Error::unsupported(format!(
                    "the cluster at {:#x} is referred to {count} times, but refcount_bits={} hold {most} \
                     at most",
                    (index * per_block + at) << self.layout.cluster_bits,
                    1u32 << order
                )));
            }
        }
        Ok(())
    }

    /// What `room` lacks for counting `end` clusters: blocks, and clusters of a table if it is too small.
    fn plan(&self, order: u32, end: u64, room: &Room) -> (u64, u64) {
        let block_bits = self.layout.cluster_bits + 3 - order;
        let needed = end.div_ceil(1 << block_bits).max(1);
        let have = room.blocks.len() as u64;
        let table = (needed * 8).div_ceil(self.layout.cluster());
        let blocks = needed.saturating_sub(have);
        (blocks, if table > room.table.1 { table } else { 0 })
    }

    /// Writes the counts with another width into `room`, and puts them in force.
    fn rewrite(&self, order: u32, mut room: Room) -> Result<()> {
        let old = self.layout;
        let new = Layout {
            refcount_order: order,
            ..old
        };
        let table_bytes = room.table.1 << old.cluster_bits;
        if table_bytes > REFCOUNT_TABLE_BYTES_MAX.max(old.cluster()) {
            return Err(Error::unsupported(format!(
                "refcounts of {} bits would need a refcount table of {}: the most are {}",
                1u32 << order,
                size::human(table_bytes),
                size::human(REFCOUNT_TABLE_BYTES_MAX)
            )));
        }
        let needed = self.end.div_ceil(1 << new.block_bits()).max(1) as usize;
        let spare = room.blocks.split_off(needed.min(room.blocks.len()));
        let cluster = old.cluster();
        room.surplus.extend(spare.iter().map(|at| (*at, 1)));
        // Clusters that nothing refers to any more, once this is in force.
        let mut gone = self.old_places();
        for (at, clusters) in &room.surplus {
            gone.extend((0..*clusters).map(|n| at + n * cluster));
        }
        gone.sort_unstable();
        let mut last: Option<(u64, Vec<u8>)> = None;
        for (index, at) in (0u64..).zip(&room.blocks) {
            let first = index << new.block_bits();
            let until = first + (1 << new.block_bits());
            let mut block = vec![0; cluster as usize];
            let mut from = first;
            while from < until {
                let source = from >> old.block_bits();
                let base = source << old.block_bits();
                let end = until.min(base + (1 << old.block_bits()));
                if last.as_ref().is_none_or(|l| l.0 != source) {
                    last = Some((source, self.block(source)?));
                }
                let bytes = last.as_ref().map(|l| l.1.as_slice()).unwrap_or_default();
                each_refcount(old.refcount_order, bytes, end - base, |at, count| {
                    let cluster = base + at;
                    if cluster >= from {
                        let host = cluster << old.cluster_bits;
                        let less = u64::from(gone.binary_search(&host).is_ok());
                        set_refcount(&new, &mut block, cluster - first, count - less);
                    }
                });
                from = end;
            }
            self.storage.write_at(*at, &block)?;
        }
        let mut table: Vec<u8> = room.blocks.iter().flat_map(|at| at.to_be_bytes()).collect();
        table.resize(table_bytes as usize, 0);
        self.storage.write_at(room.table.0, &table)?;
        self.storage.sync()?;

        let mut sector = read_short(self.storage, 0, 512)?;
        // At most 8 MiB of clusters.
        let clusters = room.table.1 as u32;
        for (at, field) in [
            (48, &room.table.0.to_be_bytes()[..]),
            (56, &clusters.to_be_bytes()),
            (96, &order.to_be_bytes()),
        ] {
            if let Some(there) = sector.get_mut(at..at + field.len()) {
                there.copy_from_slice(field);
            }
        }
        self.storage.write_at(0, &sector)?;
        self.storage.sync()?;
        self.give_back(&gone)
    }

    /// Offsets of the clusters of table and blocks.
    fn old_places(&self) -> Vec<u64> {
        let table = (0..u64::from(self.header.refcount_table_clusters))
            .map(|n| self.header.refcount_table_offset + (n << self.layout.cluster_bits));
        let blocks = self.table.iter().copied().filter(|at| *at != 0);
        table.chain(blocks).collect()
    }

    /// Tells the host what it may take back; that it does not want it is no failure.
    fn give_back(&self, gone: &[u64]) -> Result<()> {
        let cluster = self.layout.cluster();
        let mut run = (0, 0);
        for at in gone.iter().copied().chain([u64::MAX]) {
            if run.1 > 0 && run.0 + run.1 == at {
                run.1 += cluster;
                continue;
            }
            if run.1 > 0
                && let Err(error) = self.storage.discard(run.0, run.1)
            {
                tracing::warn!(image = self.storage.name(), %error, "unused space was not given back");
                break;
            }
            run = (at, cluster);
        }
        Ok(())
    }
}
