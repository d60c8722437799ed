//! New refcount structures, and a new snapshot table where the old one is broken.
//!
//! ```text
//!   … file as it was │ snapshot table │ refcount table │ refcount block │ refcount block …
//! ```
//!
//! They go behind the file's end, where nothing can be that some broken table still meant; on a
//! device, which has no room there, into clusters that nothing refers to. The old structures stay
//! untouched until one write of the header's first sector puts the new ones in force.

use super::counts::Counts;
use super::image::Image;
use super::repair::patch_header;
use super::source::{FileSource, Source};
use super::walk::Manner;
use super::windows;
use ::image::qcow2::REFCOUNT_TABLE_BYTES_MAX;
use ::image::qcow2::check::{SNAPSHOT_BYTES, SNAPSHOT_EXTRA_BYTES_MAX, Snapshot, set_refcount};
use block::{Error, ErrorKind, Result, Storage};

const MANNER: Manner = Manner {
    fix: None,
    replacing: true,
};

/// Rounds of laying out that references behind the file's end may cost.
const ROUNDS_MAX: u32 = 16;

/// Puts new structures in place of `image`'s, which is the old one no more.
pub(super) fn rebuild(storage: &dyn Storage, image: &mut Image, budget: u64) -> Result<()> {
    let source = FileSource::new(storage)?;
    let snapshots = match image.rewrite_snapshots {
        true => Some(snapshot_table(&source, image)?),
        false => None,
    };
    let snapshots_len = snapshots.as_ref().map_or(0, Vec::len) as u64;
    let (file_len, clusters) = (image.file_len, image.clusters);
    let mut wanted = Wanted::new(image);
    wanted.walk(&source, image, budget)?;
    let end = wanted.end;
    let mut inside = wanted.plan.clone();
    let mut rounds = 0;
    let mut plan = loop {
        let plan = wanted.lay_out(snapshots_len, &mut Room::behind(end, &wanted.beyond))?;
        let reach = plan.end().max(end);
        if wanted.beyond.first().is_none_or(|first| *first >= reach) {
            break plan;
        }
        // What referred to nothing refers to clusters of zeros once the file is longer, and has
        // to be counted.
        image.extend(reach);
        let before = wanted.plan.pending.len();
        wanted.walk(&source, image, budget)?;
        if wanted.plan.pending.len() == before {
            break plan;
        }
        rounds += 1;
        if rounds == ROUNDS_MAX {
            return Err(Error::unsupported(format!(
                "{}: too many references behind the file's end to rebuild its refcounts",
                storage.name()
            )));
        }
    };
    if let Err(error) = plan.reserve(storage) {
        (image.file_len, image.clusters) = (file_len, clusters);
        let gaps = gaps(&source, image, budget, plan.taken.len() as u64 * 2)?;
        inside.pending.reverse();
        plan = inside;
        plan.lay_out(snapshots_len, &mut Room::within(gaps))
            // Then the host's reason is the one to tell.
            .map_err(|_| error)?;
    }
    write(storage, &source, image, budget, &plan, snapshots.as_deref())
}

/// What new structures have to count.
struct Wanted {
    /// Needs its blocks, has no place for them.
    plan: Plan,
    /// The end of what is in use.
    end: u64,
    /// Clusters behind the file's end that something refers to, in order.
    beyond: Vec<u64>,
}

impl Wanted {
    fn new(image: &Image) -> Self {
        Self {
            plan: Plan::new(image),
            end: image.clusters,
            beyond: Vec::new(),
        }
    }

    fn walk(&mut self, source: &dyn Source, image: &Image, budget: u64) -> Result<()> {
        windows(source, image, MANNER, budget, |walk| {
            for found in walk.counts.referred() {
                self.plan.need(found.cluster);
                self.end = self.end.max(found.cluster + 1);
            }
            self.beyond.extend(walk.beyond());
            Ok(())
        })?;
        self.beyond.sort_unstable();
        self.beyond.dedup();
        Ok(())
    }

    fn lay_out(&self, snapshots_len: u64, room: &mut Room) -> Result<Plan> {
        let mut plan = self.plan.clone();
        // In the order of the file.
        plan.pending
            .sort_unstable_by_key(|index| std::cmp::Reverse(*index));
        plan.lay_out(snapshots_len, room)?;
        Ok(plan)
    }
}

/// Where the new structures go.
#[derive(Clone)]
struct Plan {
    cluster_bits: u32,
    block_bits: u32,
    /// For each block whether it is needed, and where it goes: 0 is nowhere yet.
    blocks: Vec<Option<u64>>,
    table: u64,
    table_clusters: u64,
    snapshots: u64,
    /// All new clusters, in order.
    taken: Vec<u64>,
    /// Blocks that are needed and have no place.
    pending: Vec<usize>,
}

impl Plan {
    fn new(image: &Image) -> Self {
        Self {
            cluster_bits: image.layout.cluster_bits,
            block_bits: image.layout.block_bits(),
            blocks: Vec::new(),
            table: 0,
            table_clusters: 0,
            snapshots: 0,
            taken: Vec::new(),
            pending: Vec::new(),
        }
    }

    /// A block for `cluster` is needed.
    fn need(&mut self, cluster: u64) {
        let index = (cluster >> self.block_bits) as usize;
        if index >= self.blocks.len() {
            self.blocks.resize(index + 1, None);
        }
        if let Some(block @ None) = self.blocks.get_mut(index) {
            *block = Some(0);
            self.pending.push(index);
        }
    }

    fn take(&mut self, clusters: u64, room: &mut Room) -> Result<u64> {
        let first = room.take(clusters).ok_or_else(|| {
            Error::new(
                ErrorKind::NoSpace,
                "no room for new refcount structures in the file",
            )
        })?;
        for cluster in first..first + clusters {
            self.need(cluster);
            self.taken.push(cluster);
        }
        Ok(first)
    }

    fn lay_out(&mut self, snapshots_len: u64, room: &mut Room) -> Result<()> {
        let clusters = |bytes: u64| bytes.div_ceil(1 << self.cluster_bits);
        let snapshot_clusters = clusters(snapshots_len);
        if snapshot_clusters > 0 {
            self.snapshots = self.take(snapshot_clusters, room)?;
        }
        loop {
            // Blocks need blocks, but a block counts far more clusters than one: this ends.
            while let Some(index) = self.pending.pop() {
                let at = self.take(1, room)?;
                if let Some(block) = self.blocks.get_mut(index) {
                    *block = Some(at);
                }
            }
            let bytes = self.blocks.len() as u64 * 8;
            let table = bytes.div_ceil(1 << self.cluster_bits);
            if bytes > REFCOUNT_TABLE_BYTES_MAX {
                return Err(Error::unsupported(format!(
                    "a refcount table of {bytes} bytes, which the file needs, is more than \
                     {REFCOUNT_TABLE_BYTES_MAX}"
                )));
            }
            if table <= self.table_clusters && self.pending.is_empty() {
                break;
            }
            if table > self.table_clusters {
                // One that is too small stays free.
                let (old, len) = (self.table, self.table_clusters);
                self.taken.retain(|c| !(old..old + len).contains(c));
                self.table = self.take(table, room)?;
                self.table_clusters = table;
            }
        }
        self.taken.sort_unstable();
        Ok(())
    }

    /// Where the last of the new clusters ends.
    fn end(&self) -> u64 {
        self.taken.last().map_or(0, |last| last + 1)
    }

    /// Has the host reserve space for the new clusters.
    fn reserve(&self, storage: &dyn Storage) -> Result<()> {
        for run in self.taken.chunk_by(|a, b| a + 1 == *b) {
            let from = run.first().map_or(0, |first| first << self.cluster_bits);
            storage.allocate(from, (run.len() as u64) << self.cluster_bits)?;
        }
        Ok(())
    }
}

/// Clusters to take.
struct Room {
    runs: Vec<(u64, u64)>,
}

impl Room {
    /// Everything behind the file's end but for `used`, which are in order.
    fn behind(end: u64, used: &[u64]) -> Self {
        let mut runs = Vec::new();
        let mut from = end;
        for cluster in used.iter().copied().filter(|cluster| *cluster >= end) {
            if cluster > from {
                runs.push((from, cluster - from));
            }
            from = cluster + 1;
        }
        runs.push((from, u64::MAX - from));
        Self { runs }
    }

    /// Runs of free clusters: first and length.
    fn within(runs: Vec<(u64, u64)>) -> Self {
        Self { runs }
    }

    fn take(&mut self, clusters: u64) -> Option<u64> {
        let run = self.runs.iter_mut().find(|run| run.1 >= clusters)?;
        let first = run.0;
        *run = (run.0 + clusters, run.1 - clusters);
        Some(first)
    }
}

/// Runs of clusters that nothing refers to, `wanted` clusters or all there are.
fn gaps(source: &dyn Source, image: &Image, budget: u64, wanted: u64) -> Result<Vec<(u64, u64)>> {
    let whole = image.file_len >> image.layout.cluster_bits;
    let (mut from, mut runs, mut sum) = (0, Vec::<(u64, u64)>::new(), 0);
    let mut add = |counts: &Counts| {
        while from < whole && counts.holds(from) {
            if sum < wanted && counts.is_free(from) {
                sum += 1;
                match runs.last_mut() {
                    Some((first, len)) if *first + *len == from => *len += 1,
                    _ => runs.push((from, 1)),
                }
            }
            from += 1;
        }
    };
    windows(source, image, MANNER, budget, |walk| {
        add(&walk.counts);
        Ok(())
    })?;
    Ok(runs)
}

fn write(
    storage: &dyn Storage,
    source: &dyn Source,
    image: &Image,
    budget: u64,
    plan: &Plan,
    snapshots: Option<&[u8]>,
) -> Result<()> {
    let layout = image.layout;
    let cluster = layout.cluster() as usize;
    let padded = |bytes: &[u8]| {
        let mut out = bytes.to_vec();
        out.resize(bytes.len().next_multiple_of(cluster), 0);
        out
    };
    if let Some(bytes) = snapshots {
        storage.write_at(plan.snapshots << layout.cluster_bits, &padded(bytes))?;
    }
    // The windows of the walks cover all blocks for clusters of the file, in order.
    let mut block = vec![0; cluster];
    let mut next = 0;
    let mut write_block = |index: u64, counts: Option<&Counts>| -> Result<()> {
        let first = index << layout.block_bits();
        let Some(Some(at)) = plan.blocks.get(index as usize) else {
            return Ok(());
        };
        block.fill(0);
        let count = 1u64 << layout.block_bits();
        if let Some(counts) = counts {
            for found in counts.referred_in(first..first + count) {
                set_refcount(&layout, &mut block, found.cluster - first, found.references);
            }
        }
        let start = plan.taken.partition_point(|taken| *taken < first);
        let taken = plan.taken.iter().skip(start);
        for taken in taken.take_while(|taken| **taken < first + count) {
            set_refcount(&layout, &mut block, taken - first, 1);
        }
        storage.write_at(at << layout.cluster_bits, &block)
    };
    windows(source, image, MANNER, budget, |walk| {
        while walk.counts.holds(next << layout.block_bits()) {
            write_block(next, Some(&walk.counts))?;
            next += 1;
        }
        Ok(())
    })?;
    for index in next..plan.blocks.len() as u64 {
        write_block(index, None)?;
    }
    let mut table = Vec::new();
    for at in &plan.blocks {
        let offset = at.unwrap_or(0) << layout.cluster_bits;
        table.extend_from_slice(&offset.to_be_bytes());
    }
    table.resize((plan.table_clusters as usize) * cluster, 0);
    storage.write_at(plan.table << layout.cluster_bits, &table)?;
    storage.sync()?;

    let clusters = u32::try_from(plan.table_clusters)
        .map_err(|_| Error::unsupported("a refcount table of 2^32 clusters"))?;
    patch_header(storage, |sector| {
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = sector.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        put(48, &(plan.table << layout.cluster_bits).to_be_bytes());
        put(56, &clusters.to_be_bytes());
        if snapshots.is_some() {
            put(60, &image.snapshots.to_be_bytes());
            put(64, &(plan.snapshots << layout.cluster_bits).to_be_bytes());
        }
    })
}

/// The snapshot table with all its entries made sound. At most 64 MiB, as the check let pass.
fn snapshot_table(source: &dyn Source, image: &Image) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut at = 0u64;
    for _ in 0..image.snapshots {
        at = at.next_multiple_of(8);
        let offset = image.header.snapshots_offset.saturating_add(at);
        let mut fixed = [0; SNAPSHOT_BYTES];
        source.read(offset, &mut fixed)?;
        let Some(snapshot) = Snapshot::parse(&fixed) else {
            break;
        };
        // What is cut off is not read.
        let extra = snapshot.extra_len.min(SNAPSHOT_EXTRA_BYTES_MAX);
        let kept = Snapshot {
            extra_len: extra,
            ..snapshot
        };
        let strings = usize::from(snapshot.id_len) + usize::from(snapshot.name_len);
        let mut bytes = vec![0; kept.len() as usize];
        let (head, tail) = bytes.split_at_mut(kept.len() as usize - strings);
        source.read(offset, head)?;
        source.read(offset + snapshot.len() - strings as u64, tail)?;
        kept.rewrite(&bytes, image.header.size, &mut out);
        at += snapshot.len();
    }
    Ok(out)
}
