//! From version 3 to 2 (`amend -o compat=0.10`).
//!
//! Version 2 knows no zero clusters. Of those without a cluster under them, and without a backing file, nothing
//! is left; the others become data. Of an encrypted disk, for which zeros in the file are noise, nothing is left of any,
//! and with a backing file that is refused:
//!
//! ```text
//!   1  new clusters by an edit: zeros, counted, referred to by nothing          a crash leaves leaks
//!   2  zeros into clusters that lie under zero clusters; a barrier              nobody reads them
//!   3  L2 entries, in place: each reads the same before and after; a barrier
//!   4  references that were given up, by an edit                                leaks
//! ```
//!
//! for as many L2 tables at a time as [`HELD_BYTES`] hold. The header comes last. An L2 table that snapshots
//! share is changed once, for all of them.

use super::check::{Layout, SNAPSHOT_BYTES, SNAPSHOT_TABLE_BYTES_MAX, Snapshot};
use super::edit::Editor;
use super::entry::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use super::extensions;
use super::features::{self, FeatureKind};
use super::header::{Header, L1_BYTES_MAX, V2_LEN};
use super::open::words_of;
use super::read_u64;
use block::{Context, Error, Result, Storage};
use std::ops::Range;

/// Bytes of L2 tables that change in one go.
const HELD_BYTES: usize = 8 << 20;
/// L1 entries of all tables together, the snapshots' included: 32 MiB to remember which L2 tables there are.
const TABLES_MAX: usize = 4 << 20;

/// Refuses what version 2 lacks, as far as the header tells.
pub(super) fn check(header: &Header) -> Result<()> {
    let refused = |text: String| {
        Err(Error::unsupported(format!(
            "cannot become compat=0.10: {text}"
        )))
    };
    if header.refcount_order != 4 {
        return refused(format!(
            "it has refcount_bits={}, and needs 16",
            header.refcount_bits()
        ));
    }
    let left = header.incompatible & !(features::COMPRESSION | features::DIRTY);
    if left != 0 {
        let table = header.extension(extensions::FEATURE_NAMES);
        return refused(features::names(FeatureKind::Incompatible, left, table));
    }
    if header.extension(extensions::BITMAPS).is_some() {
        return refused("it has persistent bitmaps: remove them first".into());
    }
    Ok(())
}

/// Makes a version 3 image one of version 2, which knows no zero clusters: they become data or unallocated
/// ones. Nothing to do for a version 2 image.
///
/// # Errors
///
/// `Unsupported` for what version 2 lacks; otherwise as [`super::amend`](fn@super::amend).
pub fn downgrade(storage: &dyn Storage, name: &str) -> Result<()> {
    let mut editor = Editor::open(storage, name)?;
    if editor.header().version < 3 {
        return Ok(());
    }
    let mut work = Work::new(&mut editor).context(|| name)?;
    work.run().context(|| name)?;
    let mut header = editor.header().clone();
    header.version = 2;
    header.header_length = V2_LEN;
    header.unknown_fields.clear();
    header.incompatible = 0;
    header.compatible = 0;
    header.autoclear = 0;
    header.compression_type = 0;
    header
        .extensions
        .retain(|e| e.kind != extensions::FEATURE_NAMES);
    editor.set_header(header)?;
    editor.commit()
}

/// An L1 table.
#[derive(Clone, Copy)]
struct L1 {
    offset: u64,
    entries: u32,
}

struct Work<'e, 'a> {
    editor: &'e mut Editor<'a>,
    layout: Layout,
    has_backing: bool,
    encrypted: bool,
    zstd: bool,
    l1s: Vec<L1>,
    /// The snapshot table's bytes in the file.
    snapshots: Range<u64>,
    /// L2 tables that change: where, and their new bytes.
    held: Vec<(u64, Vec<u8>)>,
    /// Host clusters to fill with zeros.
    zeros: Vec<u64>,
    /// Clusters that lose references, and how many.
    dropped: Vec<(u64, i64)>,
}

impl<'e, 'a> Work<'e, 'a> {
    fn new(editor: &'e mut Editor<'a>) -> Result<Self> {
        let header = editor.header().clone();
        check(&header)?;
        let mut l1s = vec![L1 {
            offset: header.l1_table_offset,
            entries: header.l1_size,
        }];
        let mut at = 0u64;
        for nth in 0..header.nb_snapshots {
            at = at.next_multiple_of(8);
            let broken = |what: &str| {
                Error::corrupt(format!(
                    "snapshot table: entry {nth} {what}: run diskplane check"
                ))
            };
            let offset = header
                .snapshots_offset
                .checked_add(at)
                .ok_or_else(|| broken("lies behind every file"))?;
            let fixed = editor.read(offset, SNAPSHOT_BYTES + 16)?;
            let snapshot = Snapshot::parse(&fixed).ok_or_else(|| broken("is cut short"))?;
            at += snapshot.len();
            if at > SNAPSHOT_TABLE_BYTES_MAX {
                return Err(broken("ends too far behind"));
            }
            if u64::from(snapshot.l1_size) * 8 > L1_BYTES_MAX {
                return Err(broken("has too large an L1 table"));
            }
            let state = read_u64(&fixed, SNAPSHOT_BYTES).filter(|_| snapshot.extra_len >= 8);
            let disk = read_u64(&fixed, SNAPSHOT_BYTES + 8).filter(|_| snapshot.extra_len >= 16);
            if state.is_some_and(|bytes| bytes > u64::from(u32::MAX))
                || disk.is_some_and(|bytes| bytes != header.size)
            {
                return Err(Error::unsupported(format!(
                    "cannot become compat=0.10: snapshot {nth} has another disk size than the image, or more \
                     than 4 GiB of VM state"
                )));
            }
            l1s.push(L1 {
                offset: snapshot.l1_offset,
                entries: snapshot.l1_size,
            });
        }
        Ok(Self {
            layout: editor.layout(),
            has_backing: header.backing.is_some(),
            encrypted: header.crypt_method != 0,
            zstd: header.incompatible & features::COMPRESSION != 0,
            editor,
            l1s,
            // The sum was looked at for each entry.
            snapshots: header.snapshots_offset..header.snapshots_offset.saturating_add(at),
            held: Vec::new(),
            zeros: Vec::new(),
            dropped: Vec::new(),
        })
    }

    /// The offsets of all L2 tables, sorted, each once.
    fn tables(&self) -> Result<Vec<u64>> {
        let mut tables = Vec::new();
        for l1 in &self.l1s {
            for raw in self.editor.read_l1(l1.offset, l1.entries)? {
                let at = raw & OFFSET_MASK;
                if at == 0 {
                    continue;
                }
                if self.layout.within(at) != 0 {
                    return Err(Error::corrupt(format!(
                        "L1 table at {:#x}: an entry is {raw:#x}, no cluster: run diskplane check",
                        l1.offset
                    )));
                }
                tables.push(at);
            }
            if tables.len() > TABLES_MAX {
                tables.sort_unstable();
                tables.dedup();
            }
            if tables.len() > TABLES_MAX {
                return Err(Error::unsupported(format!(
                    "more than {TABLES_MAX} L2 tables: too many to look through for compat=0.10"
                )));
            }
        }
        tables.sort_unstable();
        tables.dedup();
        Ok(tables)
    }

    /// Turns all zero clusters into others.
    fn run(&mut self) -> Result<()> {
        let tables = self.tables()?;
        // Nothing is written before it is sure that nothing prevents it.
        for at in &tables {
            self.judge(*at, &tables)?;
        }
        let mut bytes_held = 0;
        for at in tables {
            self.table(at)?;
            bytes_held += self.layout.cluster() as usize;
            if bytes_held >= HELD_BYTES || self.zeros.len() + self.dropped.len() > 1 << 16 {
                self.apply()?;
                bytes_held = 0;
            }
        }
        self.apply()
    }

    /// Refuses the L2 table at `at` when it holds what version 2 lacks, or leads zero clusters to metadata: those
    /// clusters would be filled with zeros.
    fn judge(&self, at: u64, tables: &[u64]) -> Result<()> {
        let bytes = self.editor.read(at, self.layout.cluster() as usize)?;
        for (nth, raw) in words_of(&bytes).iter().enumerate() {
            if raw & COMPRESSED != 0 {
                if self.zstd {
                    return Err(Error::unsupported(
                        "cannot become compat=0.10: it has clusters compressed with zstd",
                    ));
                }
                continue;
            }
            let host = raw & OFFSET_MASK;
            if raw & ZERO != 0 && self.encrypted && self.has_backing {
                return Err(Error::unsupported(
                    "cannot become compat=0.10: it is encrypted and has clusters that are zeros over a backing file",
                ));
            }
            if raw & ZERO == 0 || host == 0 {
                continue;
            }
            let holds_metadata = || {
                self.editor.is_fixed(host)
                    || tables.binary_search(&host).is_ok()
                    || self.snapshots.contains(&host)
                    || self.l1s.iter().any(|l1| {
                        let end = l1.offset + u64::from(l1.entries) * 8;
                        (l1.offset..end).contains(&host)
                    })
            };
            let what = match self.layout.within(host) {
                0 if holds_metadata() => "leads to metadata",
                0 => continue,
                _ => "is no cluster",
            };
            return Err(Error::corrupt(format!(
                "L2 table at {at:#x}: entry {nth} is {raw:#x}, which {what}: run diskplane check"
            )));
        }
        Ok(())
    }

    /// Works out what the L2 table at `at` becomes.
    fn table(&mut self, at: u64) -> Result<()> {
        let mut words = words_of(&self.editor.read(at, self.layout.cluster() as usize)?);
        let mut changed = false;
        let mut references = None;
        for raw in &mut words {
            if *raw & (COMPRESSED | ZERO) != ZERO {
                continue;
            }
            changed = true;
            let users = match references {
                Some(users) => users,
                None => *references.insert(self.references(at)?),
            };
            let host = *raw & OFFSET_MASK;
            if host != 0 && !self.encrypted && self.editor.refcount(host)? == users as u64 {
                // Only this entry's, through however many L1 tables.
                self.zeros.push(host);
                *raw = entry(host, users);
                continue;
            }
            if host != 0 {
                self.dropped.push((host, -users));
            }
            *raw = match self.has_backing {
                true => {
                    let new = self.editor.allocate(1)?;
                    if users > 1 {
                        self.editor.adjust(new, 1, users - 1)?;
                    }
                    self.zeros.push(new);
                    entry(new, users)
                }
                false => 0,
            };
        }
        if changed {
            let bytes = words.iter().flat_map(|w| w.to_be_bytes()).collect();
            self.held.push((at, bytes));
        }
        Ok(())
    }

    /// How many L1 tables refer to the L2 table at `at`.
    fn references(&mut self, at: u64) -> Result<i64> {
        let count = self.editor.refcount(at)?;
        i64::try_from(count).ok().filter(|n| *n > 0).ok_or_else(|| {
            Error::corrupt(format!(
                "the L2 table at {at:#x} has refcount {count}: run diskplane check"
            ))
        })
    }

    /// Carries out what has been worked out.
    fn apply(&mut self) -> Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        let storage = self.editor.storage();
        self.editor.commit()?;
        self.zeros.sort_unstable();
        for at in self.zeros.drain(..) {
            storage.write_zeroes(at, self.layout.cluster(), false)?;
        }
        storage.sync()?;
        for (at, bytes) in self.held.drain(..) {
            storage.write_at(at, &bytes)?;
        }
        storage.sync()?;
        let dropped = std::mem::take(&mut self.dropped);
        for (at, delta) in dropped {
            self.editor.adjust(at, 1, delta)?;
        }
        self.editor.commit()
    }
}

/// The L2 entry of a data cluster.
fn entry(host: u64, users: i64) -> u64 {
    match users {
        1 => host | COPIED,
        _ => host,
    }
}
