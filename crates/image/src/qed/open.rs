//! Opening: read and judge everything that stays in memory.

use super::Qed;
use super::header::Header;
use crate::FileId;
use crate::appended::{Appended, Around, Form, Places, Setup, words_of};
use crate::metadata::{Layout, TICKETS_MAX, read_short};
use block::{Context, Result, Storage, limits};

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
            ..Places::default()
        };
        let l1_first = header.l1_table_offset >> bits;
        places
            .fixed
            .push(l1_first..l1_first + u64::from(header.table_size));
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

        // A cluster that the file has a part of is not one, as in QEMU; but what there is of it is read.
        let cut_off = read_only.is_some();
        let unit = if cut_off { 512 } else { layout.cluster() };
        let core = Appended::new(Setup {
            name: name.to_owned(),
            file: FileId::IMAGE,
            form: Form::Qed,
            layout,
            l1,
            l1_offset: header.l1_table_offset,
            l1_around: Around::default(),
            copies: Vec::new(),
            table_clusters: u64::from(header.table_size),
            places,
            head_end: u64::from(header.header_size) << bits,
            tables_from: u64::from(header.header_size) << bits,
            end: file_len & !(unit - 1),
            cut_off,
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
            encryption: None,
            core,
            header,
        })
    }
}

/// Notes where the L2 tables are, each of which must be sound and have its clusters for itself.
fn claim(places: &mut Places, header: &Header, l1: &[u64], file_len: u64) -> Result<(), String> {
    let cluster = u64::from(header.cluster_size);
    let head = u64::from(header.header_size) * cluster;
    let end = file_len & !(cluster - 1);
    for (index, raw) in l1.iter().copied().enumerate().filter(|(_, raw)| *raw != 0) {
        let table_end = raw.checked_add(header.table_bytes());
        if !raw.is_multiple_of(cluster) || raw < head || table_end.is_none_or(|e| e > end) {
            return Err(format!("L1 entry {index} is {raw:#x}"));
        }
        if !places.claim(raw / cluster) {
            return Err(format!(
                "L1 entry {index}: the L2 table at {raw:#x} overlaps another table"
            ));
        }
    }
    Ok(())
}
