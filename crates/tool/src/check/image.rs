//! What a check keeps of an image in memory: header, refcount table, where the L1 tables are.
//! At most 8 MiB of refcount table and 1 MiB for 65536 snapshots.

use super::FINDINGS_MAX;
use super::source::Source;
use super::tally::{Severity, Tally};
use block::{Context, Error, ErrorKind, Result};
use image::qcow2::check::{
    Block, Layout, SNAPSHOT_BYTES, SNAPSHOT_EXTRA_BYTES, SNAPSHOT_EXTRA_BYTES_MAX,
    SNAPSHOT_TABLE_BYTES_MAX, Snapshot, block_at,
};
use image::qcow2::{Header, L1_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX, SNAPSHOTS_MAX, extensions};

/// Largest file, in clusters (QEMU's limit): 128 TiB with 64 KiB clusters.
const CLUSTERS_MAX: u64 = i32::MAX as u64;
/// Bytes that all L1 tables of snapshots may have together, on top of the file's length. More than
/// the file's length only fits if they lie over each other.
const L1_BYTES_SUM_MAX: u64 = 16 << 30;
/// Largest LUKS header; real ones have some MiB.
const CRYPTO_HEADER_BYTES_MAX: u64 = 64 << 20;
const HEADER_BYTES_MAX: u64 = 2 << 20;

/// An L1 table. Several snapshots that have the very same are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct L1 {
    /// Where it is.
    pub offset: u64,
    /// Its entries.
    pub entries: u32,
    /// How many refer to it.
    pub weight: u32,
    /// It is the active one.
    pub active: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Image {
    /// Its header.
    pub header: Header,
    /// The constants of its tables.
    pub layout: Layout,
    /// Bytes of the file as QEMU counts them, in whole sectors.
    pub file_len: u64,
    /// Bytes of the file.
    pub end: u64,
    /// Bytes of its external data file, in whole sectors, where it has one and that is known.
    pub data_len: Option<u64>,
    /// Clusters of the file, the last perhaps not whole.
    pub clusters: u64,
    /// The refcount table; empty where it cannot be found.
    pub table: Vec<u64>,
    /// Some entry of the refcount table is [`Block::Lost`].
    pub lost: bool,
    /// The active L1 table, then those of the snapshots.
    pub l1s: Vec<L1>,
    /// Bytes of the snapshot table.
    pub snapshots_len: u64,
    /// Snapshots that the table keeps: fewer than the header says when it has too many.
    pub snapshots: u32,
    /// The snapshot table has an entry so large that what follows is in doubt: only a repair of all,
    /// which cuts it, may act on what it says.
    pub cut: bool,
    /// The snapshot table has to be written anew.
    pub rewrite_snapshots: bool,
    /// Corruptions of the snapshot table that say nothing about references.
    pub snapshot_faults: u64,
    /// What was wrong already.
    pub tally: Tally,
}

impl Image {
    /// Reads the image in `source`. With `truncate` a snapshot table that is too large is cut, as a
    /// repair does; without, it is an error.
    pub fn load(source: &dyn Source, truncate: bool) -> Result<Self> {
        let name = || source.name();
        let mut bytes = vec![0; source.len().min(HEADER_BYTES_MAX) as usize];
        source.read(0, &mut bytes)?;
        let header = Header::parse_repairable(&bytes).context(name)?;
        header.check_known().context(name)?;
        drop(bytes);
        let layout = Layout::of(&header);
        let file_len = source.len().next_multiple_of(512);
        let clusters = file_len.div_ceil(layout.cluster());
        if clusters > CLUSTERS_MAX {
            return Err(Error::unsupported(format!(
                "{}: {clusters} clusters are too many to check, the most are {CLUSTERS_MAX}",
                name()
            )));
        }
        let mut image = Self {
            layout,
            file_len,
            end: source.len(),
            data_len: source
                .data_file_len()
                .filter(|_| layout.data_file)
                .map(|len| len.next_multiple_of(512)),
            clusters,
            table: Vec::new(),
            lost: false,
            l1s: vec![L1 {
                offset: header.l1_table_offset,
                entries: header.l1_size,
                weight: 1,
                active: true,
            }],
            snapshots_len: 0,
            snapshots: 0,
            cut: false,
            rewrite_snapshots: false,
            snapshot_faults: 0,
            tally: Tally::default(),
            header,
        };
        image.load_snapshots(source, truncate).context(name)?;
        image.load_table(source)?;
        Ok(image)
    }

    /// Has the file end after `clusters`, as it will.
    pub fn extend(&mut self, clusters: u64) {
        self.clusters = clusters;
        self.file_len = clusters << self.layout.cluster_bits;
        self.end = self.file_len;
    }

    /// Where the file ends in which clusters of the disk lie; the last byte that there can be, where that is not known.
    pub fn data_end(&self) -> u64 {
        match self.layout.data_file {
            true => self.data_len.unwrap_or(u64::MAX),
            false => self.file_len,
        }
    }

    /// Whether [`data_end`](Self::data_end) cuts cluster `guest` of the disk, which is at `offset`, and of which the first `used` bytes are
    /// data. Of the disk's last one no more need be there than the disk has. (One that is wholly behind the end of the image's own
    /// file is told as that.)
    #[cold]
    pub fn cuts(&self, guest: u64, offset: u64, used: u64) -> bool {
        let before = guest.saturating_mul(self.layout.cluster());
        let needed = used.min(self.header.size.saturating_sub(before));
        let there = self.data_end().saturating_sub(offset);
        let least = u64::from(!self.layout.data_file);
        (least..needed).contains(&there)
    }

    /// The block of the refcount table's entry `index`.
    pub fn block(&self, index: u64) -> Block {
        let index = usize::try_from(index).ok();
        match index.and_then(|index| self.table.get(index)) {
            Some(raw) => block_at(&self.layout, *raw).0,
            None => Block::None,
        }
    }

    /// Place and bytes of the refcount table; `Err` says what is wrong with the header's fields.
    pub fn refcount_table(&self) -> Result<(u64, u64)> {
        let (header, cluster) = (&self.header, self.layout.cluster());
        let len = u64::from(header.refcount_table_clusters) * cluster;
        // The header is a place like any other; its words make no table.
        let at_header = header.refcount_table_offset == 0
            && (cluster..=REFCOUNT_TABLE_BYTES_MAX.max(cluster)).contains(&len);
        match header.validate_refcount_table() {
            Err(error) if !at_header => Err(error),
            _ => Ok((header.refcount_table_offset, len)),
        }
    }

    /// The first [`FINDINGS_MAX`] clusters that the refcount table and its blocks are in, in order.
    pub fn refcount_clusters(&self) -> Vec<u64> {
        let bits = self.layout.cluster_bits;
        let (at, len) = self.refcount_table().unwrap_or((0, 0));
        let table = at >> bits
            ..at.saturating_add(len)
                .min(self.file_len)
                .div_ceil(1 << bits);
        let blocks = self
            .table
            .iter()
            .filter_map(|raw| match block_at(&self.layout, *raw).0 {
                Block::At(offset) => Some(offset >> bits),
                _ => None,
            });
        let mut clusters: Vec<u64> = table.chain(blocks).take(FINDINGS_MAX).collect();
        clusters.sort_unstable();
        clusters
    }

    fn load_table(&mut self, source: &dyn Source) -> Result<()> {
        let place = self.refcount_table();
        if let Err(error) = &place {
            // Without a table all refcounts are 0, which counts for itself.
            let (severity, times) = match self.header.refcount_table_clusters {
                0 => (Severity::Corruption, 0),
                _ => (Severity::CheckError, 1),
            };
            self.tally.found(severity, times, || error.to_string());
            self.tally.rebuild = true;
            return Ok(());
        }
        let (offset, len) = place?;
        // At most 8 MiB; what lies behind the file's end is zeros and needs no memory.
        let there = len.min(self.file_len.saturating_sub(offset));
        let mut chunk = vec![0; there.min(1 << 20) as usize];
        let mut at = 0;
        while at < there {
            let part = chunk.len().min((there - at) as usize);
            let Some(part) = chunk.get_mut(..part) else {
                break;
            };
            source.read(offset + at, part)?;
            let words = part.chunks_exact(8).filter_map(|b| b.try_into().ok());
            self.table.extend(words.map(u64::from_be_bytes));
            at += part.len() as u64;
        }
        let used = self.table.iter().rposition(|raw| *raw != 0);
        self.table.truncate(used.map_or(0, |last| last + 1));
        self.table.shrink_to_fit();
        let layout = self.layout;
        let lost = |raw: &u64| block_at(&layout, *raw).0 == Block::Lost;
        self.lost = self.table.iter().any(lost);
        Ok(())
    }

    fn load_snapshots(&mut self, source: &dyn Source, truncate: bool) -> Result<()> {
        let mut count = self.header.nb_snapshots;
        if count > SNAPSHOTS_MAX && truncate {
            let over = u64::from(count - SNAPSHOTS_MAX);
            self.tally.found(Severity::Corruption, over, || {
                format!("snapshot table: {over} snapshots more than {SNAPSHOTS_MAX}")
            });
            count = SNAPSHOTS_MAX;
            self.header.nb_snapshots = count;
            self.rewrite_snapshots = true;
        }
        self.header.validate_snapshots()?;
        let (start, mut at) = (self.header.snapshots_offset, 0u64);
        if count == 0 && self.layout.within(start) != 0 {
            self.tally.found(Severity::CheckError, 1, || {
                format!("header: snapshots_offset at byte 64 is {start:#x}, between clusters")
            });
        }
        let mut found: Vec<L1> = Vec::new();
        for nth in 0..count {
            let mut fixed = [0; SNAPSHOT_BYTES];
            let entry = at.next_multiple_of(8);
            source.read(start.saturating_add(entry), &mut fixed)?;
            let Some(snapshot) = Snapshot::parse(&fixed) else {
                break;
            };
            let kept = u64::from(snapshot.extra_len.min(SNAPSHOT_EXTRA_BYTES_MAX));
            let kept_end = entry + snapshot.len() - u64::from(snapshot.extra_len) + kept;
            if kept_end > SNAPSHOT_TABLE_BYTES_MAX {
                let over = u64::from(count - nth);
                if !truncate {
                    return Err(Error::corrupt(format!(
                        "snapshot table: entry {nth} ends behind {SNAPSHOT_TABLE_BYTES_MAX} bytes; \
                         a repair of all drops it and the {} behind it",
                        over - 1
                    )));
                }
                self.tally.found(Severity::Corruption, over, || {
                    format!("snapshot table: too large, the last {over} entries are dropped")
                });
                self.rewrite_snapshots = true;
                break;
            }
            at = entry + snapshot.len();
            self.snapshots += 1;
            if let Some(l1) = self.judge_snapshot(nth, &snapshot, truncate) {
                found.push(l1);
            }
        }
        self.snapshots_len = at;
        found.sort_unstable();
        found.dedup_by(|next, kept| {
            let same = (next.offset, next.entries) == (kept.offset, kept.entries);
            kept.weight += u32::from(same);
            same
        });
        let sum: u64 = found.iter().map(|l1| u64::from(l1.entries) * 8).sum();
        if sum > self.file_len.saturating_add(L1_BYTES_SUM_MAX) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "snapshot table: its L1 tables have {sum} bytes together, more than the file \
                     and {L1_BYTES_SUM_MAX}"
                ),
            ));
        }
        self.l1s.append(&mut found);
        Ok(())
    }

    /// Counts what is wrong with a snapshot, and says where its L1 table is unless that is nonsense.
    fn judge_snapshot(&mut self, nth: u32, snapshot: &Snapshot, truncate: bool) -> Option<L1> {
        let mut wrong = |severity: Severity, what: String| {
            let text = || format!("snapshot table: entry {nth} {what}");
            self.tally.found(severity, 1, text);
        };
        if nth == 0 && self.layout.data_file {
            let what = "is one, but data are in an external file";
            wrong(Severity::Corruption, what.into());
        }
        if snapshot.extra_len > SNAPSHOT_EXTRA_BYTES_MAX {
            // Unless it is cut, what follows cannot be trusted.
            let severity = match truncate {
                true => Severity::Corruption,
                false => Severity::CheckError,
            };
            let what = format!(
                "has {} bytes of extra data, the most are {SNAPSHOT_EXTRA_BYTES_MAX}: \
                 a repair of all cuts them",
                snapshot.extra_len
            );
            wrong(severity, what);
            self.rewrite_snapshots = true;
            self.snapshot_faults += 1;
            // What follows may be anywhere.
            self.cut = true;
        } else if snapshot.extra_len < SNAPSHOT_EXTRA_BYTES && self.header.version >= 3 {
            wrong(Severity::Corruption, "lacks the disk's size".into());
            self.rewrite_snapshots = true;
            self.snapshot_faults += 1;
        }
        let mut wrong = |what: String| {
            let text = || format!("snapshot table: entry {nth} {what}");
            self.tally.found(Severity::Corruption, 1, text);
        };
        let offset = snapshot.l1_offset;
        if self.layout.within(offset) != 0 {
            wrong(format!("has its L1 table at {offset:#x}, between clusters"));
            None
        } else if u64::from(snapshot.l1_size) * 8 > L1_BYTES_MAX {
            wrong(format!(
                "has an L1 table of {} entries, the most are {}",
                snapshot.l1_size,
                L1_BYTES_MAX / 8
            ));
            None
        } else {
            Some(L1 {
                offset,
                entries: snapshot.l1_size,
                weight: 1,
                active: false,
            })
        }
    }

    /// Place and bytes of the LUKS header; `None` without one, `Err` where it should be and is not.
    pub fn crypto_header(&self) -> Option<Result<(u64, u64), &'static str>> {
        const LUKS: u32 = 2;
        let data = match self.header.extension(extensions::CRYPTO_HEADER) {
            Some(data) => data,
            None if self.header.crypt_method == LUKS => return Some(Err("is missing")),
            None => return None,
        };
        let (offset, len) = data.split_at(data.len().min(8));
        Some(match (offset.try_into(), len.try_into()) {
            (Ok(offset), Ok(len)) => {
                let (offset, len) = (u64::from_be_bytes(offset), u64::from_be_bytes(len));
                if self.layout.within(offset) != 0 {
                    Err("points between clusters")
                } else if len > CRYPTO_HEADER_BYTES_MAX {
                    Err("says that it has more than 64 MiB")
                } else {
                    Ok((offset, len))
                }
            }
            _ => Err("is not 16 bytes long"),
        })
    }
}
