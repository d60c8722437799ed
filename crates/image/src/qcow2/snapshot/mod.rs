//! Internal snapshots of an image that nobody has open (specification: "Snapshots").
//!
//! ```text
//!   header ─┬─▶ active L1 ───▶ L2 ──▶ clusters
//!           │                  ▲  └──▶ …             refcounts say how many L1 tables lead to
//!           └─▶ snapshot table │                     a table or cluster; COPIED, in the active
//!                 └─▶ L1 ──────┘                     tables, that it is only one
//! ```
//!
//! Each operation is one edit ([`super::edit`]): a crash leaves the image as it was or as it shall be. L2 tables
//! whose flags change are therefore not changed in place, as QEMU does it, but get a new place.
//! L1 entries behind the virtual disk's end (VM state) are like all others.

mod table;
#[cfg(test)]
mod tests;
pub(super) mod walk;

pub use table::Snapshot;

use super::edit::Editor;
use super::entry::COPIED;
use super::features;
use super::header::{Header, L1_BYTES_MAX};
use block::{Context, Error, ErrorKind, Result, Storage, plain, size};
use walk::{
    count, flag_all, free_table, read_l1, read_l2, share, table_of, write_bytes, write_table,
};

/// Longest name that a snapshot can be given: QEMU cuts longer ones off.
pub const NAME_BYTES_MAX: usize = 255;

/// What a new snapshot is to be called, and when it was made.
#[derive(Clone, Debug, Default)]
pub struct NewSnapshot {
    /// Its name; others may have the same.
    pub name: String,
    /// Seconds since 1970, UTC.
    pub date_sec: u32,
    /// The part below a second, in nanoseconds.
    pub date_nsec: u32,
}

/// The snapshots of the image in `storage`, in the table's order.
///
/// # Errors
///
/// `Corrupt` for a header or table that cannot be read; more than 65536 snapshots or 64 MiB are not.
pub fn list(storage: &dyn Storage) -> Result<Vec<Snapshot>> {
    let header = Header::read(storage)?;
    let (snapshots, _) = table::read(storage, &header).context(|| storage.name())?;
    Ok(snapshots)
}

/// The snapshot whose id is `which`, else the first with that name: what QEMU applies and reads. As in QEMU,
/// `snapshot.id=ID`, `snapshot.name=NAME`, or both with a comma between, say which of the two is meant.
pub fn find<'s>(snapshots: &'s [Snapshot], which: &str) -> Option<&'s Snapshot> {
    if which.starts_with("snapshot.") {
        let (mut id, mut name) = (None, None);
        for pair in which.split(',') {
            match pair.split_once('=')? {
                ("snapshot.id", value) => id = Some(value),
                ("snapshot.name", value) => name = Some(value),
                _ => return None,
            }
        }
        let fits = |has: &[u8], said: Option<&str>| said.is_none_or(|said| said.as_bytes() == has);
        return snapshots
            .iter()
            .find(|s| fits(&s.id, id) && fits(&s.name, name));
    }
    let which = which.as_bytes();
    let by_id = snapshots.iter().find(|s| s.id == which);
    by_id.or_else(|| snapshots.iter().find(|s| s.name == which))
}

/// Makes a snapshot of the disk as it is.
///
/// # Errors
///
/// `Unsupported` where a refcount does not fit its `refcount_bits`, and for data in an external file; `Invalid` for a
/// name that is too long and beyond 65536 snapshots; as [`Editor::open`] and [`Editor::commit`].
/// The image is unchanged then.
pub fn create(storage: &dyn Storage, new: &NewSnapshot) -> Result<Snapshot> {
    Edit::begin(storage)?.run(|edit| edit.create(new))
}

/// Makes the disk what it was when the snapshot was made, its size included; what was written since
/// is lost. `which` is an id or else a name.
///
/// # Errors
///
/// `NotFound`; `Invalid` while the image has persistent bitmaps, which would be wrong afterwards;
/// as [`create`].
pub fn apply(storage: &dyn Storage, which: &str) -> Result<Snapshot> {
    Edit::begin(storage)?.run(|edit| edit.apply(which))
}

/// Deletes the first snapshot of that name, else the one with that id.
///
/// # Errors
///
/// `NotFound`; as [`create`].
pub fn delete(storage: &dyn Storage, which: &str) -> Result<Snapshot> {
    Edit::begin(storage)?.run(|edit| edit.delete(which, true))
}

/// Deletes the first snapshot of that name, as `qemu-img` does, which knows no ids here.
///
/// # Errors
///
/// As [`delete`].
pub fn delete_named(storage: &dyn Storage, name: &str) -> Result<Snapshot> {
    Edit::begin(storage)?.run(|edit| edit.delete(name, false))
}

/// Where the snapshot table of an image is, and the L1 tables that it names: offset and bytes of each.
///
/// # Errors
///
/// As [`list`].
pub(super) fn tables(storage: &dyn Storage, header: &Header) -> Result<Vec<(u64, u64)>> {
    if header.nb_snapshots == 0 {
        return Ok(Vec::new());
    }
    let (snapshots, len) = table::read(storage, header)?;
    let l1s = snapshots
        .iter()
        .map(|s| (s.l1_offset, u64::from(s.l1_size) * 8));
    Ok(std::iter::once((header.snapshots_offset, len))
        .chain(l1s)
        .collect())
}

/// Makes `header` that of the disk as it was when the snapshot `which` was made.
///
/// # Errors
///
/// `NotFound`; as [`list`].
pub(super) fn enter(storage: &dyn Storage, header: &mut Header, which: &str) -> Result<()> {
    let (snapshots, _) = match header.nb_snapshots {
        0 => (Vec::new(), 0),
        _ => table::read(storage, header)?,
    };
    let snapshot = find(&snapshots, which).ok_or_else(|| not_found(&snapshots, which))?;
    header.l1_table_offset = snapshot.l1_offset;
    header.l1_size = snapshot.l1_size;
    header.size = snapshot.disk_size().unwrap_or(header.size);
    header
        .validate()
        .context(|| format!("snapshot '{}'", plain(&snapshot.shown_name())))
}

fn not_found(snapshots: &[Snapshot], which: &str) -> Error {
    let names: Vec<String> = snapshots.iter().map(|s| plain(&s.shown_name())).collect();
    let there = match names.len() {
        0 => "it has none".to_owned(),
        1..=10 => format!("it has {}", names.join(", ")),
        count => format!("it has {count} others"),
    };
    Error::new(
        ErrorKind::NotFound,
        format!("there is no snapshot '{which}': {there}"),
    )
}

struct Edit<'a> {
    editor: Editor<'a>,
    snapshots: Vec<Snapshot>,
    /// Bytes of the snapshot table as it is.
    table_len: u64,
}

impl<'a> Edit<'a> {
    fn begin(storage: &'a dyn Storage) -> Result<Self> {
        let name = storage.name();
        let editor = Editor::open(storage, &name)?;
        let header = editor.header();
        if header.incompatible & features::DATA_FILE != 0 {
            return Err(Error::unsupported(format!(
                "{name}: its data are in an external file, which cannot have snapshots"
            )));
        }
        let (snapshots, table_len) = table::read(storage, header).context(|| &name)?;
        Ok(Self {
            editor,
            snapshots,
            table_len,
        })
    }

    fn run(mut self, operation: impl FnOnce(&mut Self) -> Result<Snapshot>) -> Result<Snapshot> {
        let name = self.editor.name().to_owned();
        let snapshot = operation(&mut self).map_err(|error| {
            // What the editor says names the file already.
            match error.to_string().starts_with(&name) {
                true => error,
                false => error.within(&name),
            }
        })?;
        self.editor.commit()?;
        Ok(snapshot)
    }

    fn active_l1(&self) -> Result<Vec<u64>> {
        let header = self.editor.header();
        read_l1(&self.editor, header.l1_table_offset, header.l1_size)
    }

    fn create(&mut self, new: &NewSnapshot) -> Result<Snapshot> {
        if new.name.len() > NAME_BYTES_MAX {
            return Err(Error::invalid(format!(
                "a snapshot's name of {} bytes: the most are {NAME_BYTES_MAX}",
                new.name.len()
            )));
        }
        if new.name.contains('\0') {
            return Err(Error::invalid("a snapshot's name with a zero byte"));
        }
        let mut l1 = self.active_l1()?;
        for (index, raw) in l1.iter_mut().enumerate() {
            let Some(table) = table_of(&self.editor, index, *raw)? else {
                continue;
            };
            let mut l2 = read_l2(&self.editor, table)?;
            count(&mut self.editor, table, &l2, 1)?;
            *raw = match share(&self.editor, &mut l2) {
                true => {
                    self.editor.free(table, 1)?;
                    let copy = write_table(&mut self.editor, &l2)?;
                    self.editor.adjust(copy, 1, 1)?;
                    copy
                }
                false => {
                    self.editor.adjust(table, 1, 1)?;
                    table
                }
            };
        }
        let numbers = self.snapshots.iter().map(Snapshot::number);
        let id = numbers.max().unwrap_or(0).saturating_add(1);
        let disk_size = self.editor.header().size;
        let snapshot = Snapshot {
            l1_offset: write_table(&mut self.editor, &l1)?,
            l1_size: self.editor.header().l1_size,
            date_sec: new.date_sec,
            date_nsec: new.date_nsec,
            ..Snapshot::new(id, new.name.as_bytes(), disk_size)
        };
        self.snapshots.push(snapshot.clone());
        self.replace_l1(&l1, disk_size)?;
        self.replace_table()?;
        Ok(snapshot)
    }

    fn apply(&mut self, which: &str) -> Result<Snapshot> {
        let header = self.editor.header();
        if header.autoclear & features::BITMAPS != 0 {
            return Err(Error::invalid(
                "it has persistent bitmaps, which would not be true any more: remove them first",
            ));
        }
        let found =
            find(&self.snapshots, which).ok_or_else(|| not_found(&self.snapshots, which))?;
        let snapshot = found.clone();
        let disk_size = snapshot.disk_size().unwrap_or(header.size);
        self.check_size(&snapshot, disk_size)?;
        let old = self.active_l1()?;
        self.drop_references(&old)?;
        let mut l1 = read_l1(&self.editor, snapshot.l1_offset, snapshot.l1_size)?;
        for (index, raw) in l1.iter_mut().enumerate() {
            let Some(table) = table_of(&self.editor, index, *raw)? else {
                continue;
            };
            let mut l2 = read_l2(&self.editor, table)?;
            count(&mut self.editor, table, &l2, 1)?;
            *raw = match share(&self.editor, &mut l2) {
                // Flags mean nothing in tables of a snapshot only, but may be there.
                true => write_table(&mut self.editor, &l2)? | COPIED,
                false => {
                    self.editor.adjust(table, 1, 1)?;
                    table
                }
            };
        }
        let needed = self.l1_needed(disk_size);
        if l1.len() < needed {
            l1.resize(needed, 0);
        }
        self.replace_l1(&l1, disk_size)?;
        Ok(snapshot)
    }

    fn delete(&mut self, which: &str, ids: bool) -> Result<Snapshot> {
        let by = |part: fn(&Snapshot) -> &[u8]| {
            self.snapshots
                .iter()
                .position(|s| part(s) == which.as_bytes())
        };
        let position = by(|s| &s.name).or_else(|| by(|s| &s.id).filter(|_| ids));
        let position = position.ok_or_else(|| not_found(&self.snapshots, which))?;
        let snapshot = self.snapshots.remove(position);
        let gone = read_l1(&self.editor, snapshot.l1_offset, snapshot.l1_size)?;
        self.drop_references(&gone)?;
        let l1_len = u64::from(snapshot.l1_size) * 8;
        free_table(&mut self.editor, snapshot.l1_offset, l1_len)?;
        let before = self.active_l1()?;
        let mut l1 = before.clone();
        flag_all(&mut self.editor, &mut l1)?;
        if l1 != before {
            self.replace_l1(&l1, self.editor.header().size)?;
        }
        self.replace_table()?;
        Ok(snapshot)
    }

    /// L1 entries that a disk of `disk_size` bytes needs.
    fn l1_needed(&self, disk_size: u64) -> usize {
        // The caller bounds it: at most 32 MiB of table.
        disk_size.div_ceil(self.editor.header().l1_entry_bytes()) as usize
    }

    fn check_size(&self, snapshot: &Snapshot, disk_size: u64) -> Result<()> {
        let entries = disk_size.div_ceil(self.editor.header().l1_entry_bytes());
        if disk_size > block::limits::DISK_BYTES_MAX || entries * 8 > L1_BYTES_MAX {
            return Err(Error::corrupt(format!(
                "snapshot '{}' is of a disk of {}, which is too large",
                plain(&snapshot.shown_name()),
                size::human(disk_size)
            )));
        }
        Ok(())
    }

    /// Takes back the references of an L1 table's entries.
    fn drop_references(&mut self, l1: &[u64]) -> Result<()> {
        for (index, raw) in l1.iter().enumerate() {
            if let Some(table) = table_of(&self.editor, index, *raw)? {
                let l2 = read_l2(&self.editor, table)?;
                count(&mut self.editor, table, &l2, -1)?;
                self.editor.free(table, 1)?;
            }
        }
        Ok(())
    }

    /// Puts `l1` in place of the active L1 table, of a disk of `disk_size` bytes.
    fn replace_l1(&mut self, l1: &[u64], disk_size: u64) -> Result<()> {
        let mut header = self.editor.header().clone();
        let old_len = u64::from(header.l1_size) * 8;
        free_table(&mut self.editor, header.l1_table_offset, old_len)?;
        header.l1_table_offset = write_table(&mut self.editor, l1)?;
        header.l1_size =
            u32::try_from(l1.len()).map_err(|_| Error::invalid("an L1 table of 2^32 entries"))?;
        header.size = disk_size;
        self.editor.set_header(header)
    }

    /// Writes the snapshot table anew.
    fn replace_table(&mut self) -> Result<()> {
        let mut header = self.editor.header().clone();
        free_table(&mut self.editor, header.snapshots_offset, self.table_len)?;
        let bytes = table::encode(&self.snapshots, header.size)?;
        header.snapshots_offset = write_bytes(&mut self.editor, bytes)?;
        header.nb_snapshots =
            u32::try_from(self.snapshots.len()).map_err(|_| Error::invalid("2^32 snapshots"))?;
        self.editor.set_header(header)
    }
}
