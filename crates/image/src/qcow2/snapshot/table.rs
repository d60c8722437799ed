//! The snapshot table (specification: "Snapshot table section"); the entry's layout is drawn in
//! `check::snapshot`.

use crate::qcow2::check::{
    NO_ICOUNT, SNAPSHOT_BYTES, SNAPSHOT_EXTRA_BYTES_MAX, SNAPSHOT_TABLE_BYTES_MAX,
    Snapshot as Fixed,
};
use crate::qcow2::close::read_short;
use crate::qcow2::header::{Header, L1_BYTES_MAX, SNAPSHOTS_MAX};
use crate::qcow2::{read_u32, read_u64};
use block::{Error, Result, Storage};

/// Bytes of the table that are read at once.
const READ_BYTES: usize = 16 << 10;

/// An internal snapshot: what the table says of it. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table is.
    pub l1_offset: u64,
    /// Entries of that.
    pub l1_size: u32,
    /// Its id: decimal digits, as QEMU makes them.
    pub id: Vec<u8>,
    /// Its name, in no encoding for sure.
    pub name: Vec<u8>,
    /// When it was made: seconds since 1970, UTC.
    pub date_sec: u32,
    /// The part below a second, in nanoseconds.
    pub date_nsec: u32,
    /// For how long the VM had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// The VM state's size in 32 bits; `extra` may have it in 64.
    pub vm_state_size_32: u32,
    /// Extra data: VM state size, disk size, instruction count (8 bytes each), then what this code does
    /// not know. Kept as it is.
    pub extra: Vec<u8>,
}

impl Snapshot {
    /// A new snapshot's entry.
    pub(super) fn new(id: u64, name: &[u8], disk_size: u64) -> Self {
        Self {
            l1_offset: 0,
            l1_size: 0,
            id: id.to_string().into_bytes(),
            name: name.to_vec(),
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 0,
            vm_state_size_32: 0,
            // qemu-img has a count of 0 in those that it makes.
            extra: extra(0, disk_size, 0),
        }
    }

    /// Its id, as far as it is UTF-8. For a terminal it needs [`block::plain`].
    pub fn shown_id(&self) -> String {
        String::from_utf8_lossy(&self.id).into_owned()
    }

    /// Its name, as far as it is UTF-8. For a terminal it needs [`block::plain`].
    pub fn shown_name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Bytes of VM state; they lie behind the end of the virtual disk.
    pub fn vm_state_size(&self) -> u64 {
        read_u64(&self.extra, 0).unwrap_or(u64::from(self.vm_state_size_32))
    }

    /// The virtual disk's size when it was made; version 2 images may not say.
    pub fn disk_size(&self) -> Option<u64> {
        read_u64(&self.extra, 8)
    }

    /// Instructions that the VM had executed; `None` if it was not counted.
    pub fn icount(&self) -> Option<u64> {
        read_u64(&self.extra, 16).filter(|count| *count != NO_ICOUNT)
    }

    /// The number that QEMU takes its id for.
    pub(super) fn number(&self) -> u64 {
        self.id
            .iter()
            .map_while(|b| char::from(*b).to_digit(10))
            .fold(0u64, |n, digit| {
                n.saturating_mul(10).saturating_add(u64::from(digit))
            })
    }

    fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let length = |what: &str, len: usize| {
            u16::try_from(len).map_err(|_| Error::invalid(format!("{what} of {len} bytes")))
        };
        out.extend_from_slice(&self.l1_offset.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&length("a snapshot's id", self.id.len())?.to_be_bytes());
        out.extend_from_slice(&length("a snapshot's name", self.name.len())?.to_be_bytes());
        out.extend_from_slice(&self.date_sec.to_be_bytes());
        out.extend_from_slice(&self.date_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_state_size_32.to_be_bytes());
        // At most 1024, as `parse` and `new` have it.
        let extra_len = u32::try_from(self.extra.len()).unwrap_or(0);
        out.extend_from_slice(&extra_len.to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
        Ok(())
    }
}

/// The table's bytes, as they are read piece by piece.
struct Reader<'a> {
    storage: &'a dyn Storage,
    /// Where the next piece of the file is.
    at: u64,
    piece: Vec<u8>,
    used: usize,
    /// Bytes that were taken.
    taken: u64,
}

impl Reader<'_> {
    /// The next `len` bytes.
    fn take(&mut self, len: usize) -> Result<Vec<u8>> {
        if self.piece.len() - self.used < len {
            self.piece.drain(..self.used);
            self.used = 0;
            // At most 1024 bytes of extra data and two strings of 64 KiB are asked for.
            let more = read_short(self.storage, self.at, READ_BYTES.max(len))?;
            self.at = self.at.saturating_add(more.len() as u64);
            self.piece.extend_from_slice(&more);
        }
        let bytes = self.piece.get(self.used..self.used + len);
        self.used += len;
        self.taken += len as u64;
        Ok(bytes.unwrap_or_default().to_vec())
    }
}

/// The snapshots of an image, and how many bytes their table has.
///
/// # Errors
///
/// `Corrupt` for entries that QEMU refuses too: more than 1024 bytes of extra data, an L1 table between
/// clusters or beyond 32 MiB, a table beyond 64 MiB.
pub(super) fn read(storage: &dyn Storage, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    header.validate_snapshots()?;
    let mut reader = Reader {
        storage,
        at: header.snapshots_offset,
        piece: Vec::new(),
        used: 0,
        taken: 0,
    };
    let file_len = storage.len()?;
    let mut snapshots = Vec::new();
    for nth in 0..header.nb_snapshots.min(SNAPSHOTS_MAX) {
        let padding = (reader.taken.next_multiple_of(8) - reader.taken) as usize;
        reader.take(padding)?;
        let wrong = |what: String| {
            Error::corrupt(format!(
                "snapshot table: entry {nth}: {what}: run diskplane check --repair all"
            ))
        };
        let at = header.snapshots_offset.saturating_add(reader.taken);
        if at >= file_len {
            return Err(wrong("lies behind the end of the file".into()));
        }
        let bytes = reader.take(SNAPSHOT_BYTES)?;
        let Some(fixed) = Fixed::parse(&bytes) else {
            break;
        };
        if fixed.extra_len > SNAPSHOT_EXTRA_BYTES_MAX {
            return Err(wrong(format!(
                "has {} bytes of extra data, the most are {SNAPSHOT_EXTRA_BYTES_MAX}",
                fixed.extra_len
            )));
        }
        if u64::from(fixed.l1_size) * 8 > L1_BYTES_MAX {
            return Err(wrong(format!(
                "its L1 table has {} entries, the most are {}",
                fixed.l1_size,
                L1_BYTES_MAX / 8
            )));
        }
        let misplaced = fixed.l1_offset & (header.cluster_size() - 1) != 0;
        if fixed.l1_size > 0 && (misplaced || fixed.l1_offset == 0) {
            return Err(wrong(format!(
                "its L1 table is at {:#x}, no cluster",
                fixed.l1_offset
            )));
        }
        snapshots.push(Snapshot {
            l1_offset: fixed.l1_offset,
            l1_size: fixed.l1_size,
            date_sec: read_u32(&bytes, 16).unwrap_or(0),
            date_nsec: read_u32(&bytes, 20).unwrap_or(0),
            vm_clock_nsec: read_u64(&bytes, 24).unwrap_or(0),
            vm_state_size_32: read_u32(&bytes, 32).unwrap_or(0),
            // At most 1024.
            extra: reader.take(fixed.extra_len as usize)?,
            id: reader.take(usize::from(fixed.id_len))?,
            name: reader.take(usize::from(fixed.name_len))?,
        });
        if reader.taken > SNAPSHOT_TABLE_BYTES_MAX {
            return Err(wrong(format!(
                "the table has more than {SNAPSHOT_TABLE_BYTES_MAX} bytes here"
            )));
        }
    }
    Ok((snapshots, reader.taken))
}

/// Extra data as QEMU writes them.
fn extra(vm_state_size: u64, disk_size: u64, icount: u64) -> Vec<u8> {
    let fields = [vm_state_size, disk_size, icount];
    fields
        .iter()
        .flat_map(|field| field.to_be_bytes())
        .collect()
}

/// The bytes of a table of `snapshots`. Entries that lack extra data which QEMU writes get them; `disk_size` is the image's.
pub(super) fn encode(snapshots: &[Snapshot], disk_size: u64) -> Result<Vec<u8>> {
    if snapshots.len() as u64 > u64::from(SNAPSHOTS_MAX) {
        return Err(Error::invalid(format!(
            "an image has {SNAPSHOTS_MAX} snapshots at most"
        )));
    }
    let mut out = Vec::new();
    for snapshot in snapshots {
        let mut sound = snapshot.clone();
        let lacking = extra(
            sound.vm_state_size(),
            sound.disk_size().unwrap_or(disk_size),
            NO_ICOUNT,
        );
        if sound.extra.len() < lacking.len() {
            sound.extra = lacking;
        }
        sound.encode(&mut out)?;
        if out.len() as u64 > SNAPSHOT_TABLE_BYTES_MAX {
            return Err(Error::invalid(format!(
                "the snapshot table would pass {SNAPSHOT_TABLE_BYTES_MAX} bytes: \
                 delete snapshots first"
            )));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::testing::MemFile;
    use crate::qcow2::{CreateOptions, create};

    fn header(count: u32) -> Header {
        let file = MemFile::default();
        create(
            &file,
            &CreateOptions {
                size: 1 << 20,
                ..CreateOptions::default()
            },
        )
        .unwrap();
        let mut header = Header::read(&file).unwrap();
        header.nb_snapshots = count;
        header.snapshots_offset = 65536;
        header
    }

    fn file(table: &[u8]) -> MemFile {
        let mut bytes = vec![0; 65536];
        bytes.extend_from_slice(table);
        MemFile::of(bytes)
    }

    #[test]
    fn all_of_an_entry_is_kept() {
        let mut snapshots = Vec::new();
        for (n, extra) in [24, 32, 40, 1024].into_iter().enumerate() {
            snapshots.push(Snapshot {
                l1_offset: 0x3_0000,
                l1_size: 7,
                id: format!("{n}x").into_bytes(),
                name: vec![b'\xff'; n * 20_000],
                date_sec: 3_000_000_000,
                date_nsec: 999_999_999,
                vm_clock_nsec: 1 << 60,
                vm_state_size_32: 5,
                extra: (0..extra).map(|n| n as u8).collect(),
            });
        }
        let table = encode(&snapshots, 1).unwrap();
        let (read_back, len) = read(&file(&table), &header(4)).unwrap();
        assert_eq!(read_back, snapshots);
        assert_eq!(len.next_multiple_of(8), table.len() as u64);
        assert_eq!(snapshots[2].vm_state_size(), 0x0001_0203_0405_0607);
        assert_eq!(snapshots[0].icount(), Some(0x1011_1213_1415_1617));
        assert_eq!(snapshots[3].number(), 3);
    }

    #[test]
    fn what_version_2_may_lack_is_added() {
        let mut old = Snapshot::new(9, b"n", 4096);
        old.vm_state_size_32 = 77;
        old.extra.clear();
        assert_eq!((old.vm_state_size(), old.disk_size()), (77, None));
        let table = encode(&[old.clone()], 8192).unwrap();
        let (new, _) = read(&file(&table), &header(1)).unwrap();
        assert_eq!(new[0].vm_state_size(), 77);
        assert_eq!(new[0].disk_size(), Some(8192));
        assert_eq!((new[0].icount(), new[0].extra.len()), (None, 24));
        old.extra = new[0].extra.clone();
        assert_eq!(new[0], old);
    }

    #[test]
    fn hostile_tables_are_refused() {
        let good = Snapshot {
            l1_offset: 0x3_0000,
            l1_size: 1,
            ..Snapshot::new(1, b"n", 4096)
        };
        let with = |at: usize, bytes: &[u8]| {
            let mut table = encode(std::slice::from_ref(&good), 0).unwrap();
            table[at..at + bytes.len()].copy_from_slice(bytes);
            read(&file(&table), &header(1))
        };
        assert!(with(0, &[]).is_ok());
        for (at, bytes, why) in [
            (36, &1025u32.to_be_bytes()[..], "extra data"),
            (36, &u32::MAX.to_be_bytes(), "extra data"),
            (
                8,
                &u32::MAX.to_be_bytes(),
                "L1 table has 4294967295 entries",
            ),
            (0, &0x3_0200u64.to_be_bytes(), "0x30200, no cluster"),
            (0, &0u64.to_be_bytes(), "0x0, no cluster"),
        ] {
            let error = with(at, bytes).unwrap_err().to_string();
            assert!(error.contains("entry 0") && error.contains(why), "{error}");
        }
        let table = encode(std::slice::from_ref(&good), 0).unwrap();
        let error = read(&file(&table), &header(2000)).unwrap_err().to_string();
        assert!(error.contains("behind the end of the file"), "{error}");
        let many = vec![
            Snapshot {
                name: vec![0; 65535],
                ..good
            };
            1100
        ];
        assert!(encode(&many, 0).unwrap_err().to_string().contains("pass"));
    }
}
