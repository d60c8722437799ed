//! Opening: read and judge everything that stays in memory.

use super::Qcow;
use super::header::{HEADER_LEN, Header};
use crate::appended::{Appended, Around, Form, Places, Setup};
use crate::metadata::{Layout, TICKETS_MAX, read_short};
use crate::{Encryption, FileId};
use block::{Context, Result, Storage, limits};
use crypto::Passphrase;
use std::sync::Arc;

/// Bytes of the L1 table that are read at a time.
const CHUNK: usize = 1 << 20;
const SECTOR: u64 = 512;

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Never write to it.
    pub read_only: bool,
    /// Upper bound of the metadata cache in bytes; 64 MiB when not given. Less is used where less covers the
    /// disk, a little more where it is too little to work.
    pub cache_bytes: Option<u64>,
    /// That of an encrypted image; without it its data cannot be read.
    pub passphrase: Option<Arc<Passphrase>>,
}

impl Qcow {
    /// Opens the image in `storage`, reading header and L1 table.
    ///
    /// An image that can be read but must not be written opens; its description says why, and writes to it fail with
    /// `ReadOnly`.
    ///
    /// # Errors
    ///
    /// `Corrupt` (naming file, field and offset), `Unsupported` (naming the limit), or what reading failed with.
    pub fn open(storage: &dyn Storage, options: &OpenOptions) -> Result<Self> {
        let name = storage.name();
        Self::open_unnamed(storage, options, &name).context(|| name)
    }

    fn open_unnamed(storage: &dyn Storage, options: &OpenOptions, name: &str) -> Result<Self> {
        let header = Header::read_unnamed(storage)?;
        let file_len = storage.len()?;
        let (bits, table_bits) = (header.cluster_bits, header.l2_bits + 3);
        let layout = Layout::new(header.disk_bytes(), bits, table_bits, false);
        let l1 = read_l1(storage, &header)?;

        let encryption = (header.encrypted)
            .then(|| Encryption::aes(options.passphrase.as_deref()))
            .transpose()?;
        let mut lacks = encryption.as_ref().and_then(Encryption::read_only_because);
        let mut places = Places {
            table_size: header.table_bytes().div_ceil(header.cluster_size()),
            fixed: fixed(&header),
            ..Places::default()
        };
        if !options.read_only
            && let Err(what) = claim(&mut places, &header, &l1, file_len)
        {
            lacks.get_or_insert_with(|| {
                format!("it is damaged, or not made as QEMU does ({what}): convert it")
            });
        }
        let read_only = lacks
            .clone()
            .or_else(|| options.read_only.then(String::new));
        let around = match read_only {
            None => around(storage, &header)?,
            Some(_) => Around::default(),
        };
        let core = Appended::new(Setup {
            name: name.to_owned(),
            file: FileId::IMAGE,
            form: Form::Qcow,
            layout,
            l1,
            l1_offset: header.l1_table_offset,
            l1_around: around,
            copies: Vec::new(),
            table_clusters: places.table_size,
            places,
            head_end: HEADER_LEN as u64,
            tables_from: SECTOR,
            end: file_len,
            // What there is of a cluster that the file ends in is read.
            cut_off: read_only.is_some(),
            free_from: file_len.div_ceil(layout.cluster()),
            file_bytes_max: limits::DISK_BYTES_MAX,
            has_backing: header.backing.is_some(),
            read_only,
            cache_bytes: options.cache_bytes,
            tickets: TICKETS_MAX,
        });
        Ok(Self {
            name: name.to_owned(),
            lacks,
            encryption,
            core,
            header,
        })
    }
}

fn read_l1(storage: &dyn Storage, header: &Header) -> Result<Vec<u64>> {
    // At most 64 MiB.
    let mut l1 = Vec::with_capacity(header.l1_entries() as usize);
    let mut chunk = Vec::new();
    let (mut at, end) = (header.l1_table_offset, header.l1_end());
    while at < end {
        chunk.resize((end - at).min(CHUNK as u64) as usize, 0);
        storage.read_at(at, &mut chunk)?;
        Form::Qcow.decode(&chunk, &mut l1);
        at += chunk.len() as u64;
    }
    Ok(l1)
}

/// The clusters of the header, of the name and of the L1 table.
fn fixed(header: &Header) -> Vec<std::ops::Range<u64>> {
    let name = header.backing_file_offset;
    let name = name..name + u64::from(header.backing_file_size);
    [
        0..HEADER_LEN as u64,
        name,
        header.l1_table_offset..header.l1_end(),
    ]
    .into_iter()
    .filter(|bytes| !bytes.is_empty())
    .map(|bytes| bytes.start >> header.cluster_bits..bytes.end.div_ceil(header.cluster_size()))
    .collect()
}

/// What shares sectors with the L1 table.
fn around(storage: &dyn Storage, header: &Header) -> Result<Around> {
    let (start, end) = (header.l1_table_offset, header.l1_end());
    let first = start & !(SECTOR - 1);
    // Less than a sector each.
    Ok(Around {
        before: read_short(storage, first, (start - first) as usize)?,
        behind: read_short(storage, end, (end.next_multiple_of(SECTOR) - end) as usize)?,
    })
}

/// Notes where the L2 tables are, each of which must be sound and have its clusters for itself.
fn claim(places: &mut Places, header: &Header, l1: &[u64], file_len: u64) -> Result<(), String> {
    let cluster = header.cluster_size();
    if !header.l1_table_offset.is_multiple_of(8) {
        return Err(format!("the L1 table is at {:#x}", header.l1_table_offset));
    }
    for (index, raw) in l1.iter().copied().enumerate().filter(|(_, raw)| *raw != 0) {
        let end = raw.checked_add(header.table_bytes());
        if !raw.is_multiple_of(cluster) || end.is_none_or(|end| end > file_len) {
            return Err(format!("L1 entry {index} is {raw:#x}"));
        }
        if !places.claim(raw / cluster) {
            return Err(format!(
                "L1 entry {index}: the L2 table at {raw:#x} overlaps another table, or the header"
            ));
        }
    }
    Ok(())
}
