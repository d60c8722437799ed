//! VHD images byte by byte, as XenServer's tools lay them out: from the specification and their documentation, not
//! from our code.
//!
//! ```text
//!   footer │ header │ block table │ batmap's header │ batmap │ locators │ block │ … │ footer
//! ```

/// Bytes of a block.
pub const BLOCK: usize = 2 << 20;

const SECTOR: usize = 512;

/// An image to make.
#[derive(Clone, Debug)]
pub struct Forge {
    /// Bytes of the disk.
    pub size: u64,
    /// Names it.
    pub id: [u8; 16],
    /// What it lies over: a differencing image then.
    pub parent: Option<ForgedParent>,
    /// Blocks in the order in which they are in the file: number, sectors that it has, byte that fills them. What the
    /// file has in other sectors of a block is rubbish.
    pub blocks: Vec<(usize, Vec<usize>, u8)>,
}

/// What a differencing image says of its parent.
#[derive(Clone, Debug)]
pub struct ForgedParent {
    /// Its unique id; zeros for a raw one.
    pub id: [u8; 16],
    /// Its name from the image's directory, as `./base.vhd`.
    pub name: String,
}

impl Forge {
    fn entries(&self) -> usize {
        (self.size as usize).div_ceil(BLOCK)
    }

    fn footer(&self) -> Vec<u8> {
        let mut f = vec![0; SECTOR];
        f[..8].copy_from_slice(b"conectix");
        f[11] = 2;
        f[13] = 1;
        f[16..24].copy_from_slice(&512u64.to_be_bytes());
        f[24..28].copy_from_slice(&0x2000_0000u32.to_be_bytes());
        f[28..32].copy_from_slice(b"tap\0");
        f[32..36].copy_from_slice(&0x0001_0003u32.to_be_bytes());
        f[40..48].copy_from_slice(&self.size.to_be_bytes());
        f[48..56].copy_from_slice(&self.size.to_be_bytes());
        // A geometry that says less than the size, as always.
        f[56..60].copy_from_slice(&[0, 100, 4, 17]);
        f[63] = if self.parent.is_some() { 4 } else { 3 };
        f[68..84].copy_from_slice(&self.id);
        seal(&mut f, 64);
        f
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let entries = self.entries();
        let table_bytes = (entries * 4).next_multiple_of(SECTOR);
        let table_at = 3 * SECTOR;
        let batmap_at = table_at + table_bytes;
        let map_at = batmap_at + SECTOR;
        let locators_at = map_at + SECTOR;
        let mut header = vec![0; 1024];
        header[..8].copy_from_slice(b"cxsparse");
        header[8..16].fill(0xff);
        header[16..24].copy_from_slice(&(table_at as u64).to_be_bytes());
        header[25] = 1;
        header[28..32].copy_from_slice(&(entries as u32).to_be_bytes());
        header[32..36].copy_from_slice(&(BLOCK as u32).to_be_bytes());
        let mut names = Vec::new();
        if let Some(parent) = &self.parent {
            header[40..56].copy_from_slice(&parent.id);
            header[56..60].copy_from_slice(&0x1fff_ffffu32.to_be_bytes());
            let base = parent.name.rsplit('/').next().unwrap_or_default();
            for (at, unit) in base.encode_utf16().enumerate() {
                header[64 + at * 2..][..2].copy_from_slice(&unit.to_be_bytes());
            }
            let windows: Vec<u8> = (parent.name.replace('/', "\\").encode_utf16())
                .flat_map(u16::to_le_bytes)
                .collect();
            let url = format!("file://{}", parent.name).into_bytes();
            for (n, (code, name)) in [(b"MACX", &url), (b"W2ku", &windows), (b"W2ru", &windows)]
                .into_iter()
                .enumerate()
            {
                let at = 576 + n * 24;
                header[at..at + 4].copy_from_slice(code);
                // Bytes, where the specification has sectors.
                header[at + 4..at + 8].copy_from_slice(&512u32.to_be_bytes());
                header[at + 8..at + 12].copy_from_slice(&(name.len() as u32).to_be_bytes());
                let offset = (locators_at + names.len()) as u64;
                header[at + 16..at + 24].copy_from_slice(&offset.to_be_bytes());
                names.extend_from_slice(name);
                names.resize(names.len().next_multiple_of(SECTOR), 0);
            }
        }
        seal(&mut header, 36);
        let mut table = vec![0xff; entries * 4];
        table.resize(table_bytes, 0);
        let mut map = vec![0; SECTOR];
        let mut blocks = Vec::new();
        let mut at = locators_at + names.len();
        for (number, sectors, fill) in &self.blocks {
            // The data begin on a page.
            let start = (at + SECTOR).next_multiple_of(4096) - SECTOR;
            blocks.resize(blocks.len() + start - at, 0);
            table[number * 4..][..4].copy_from_slice(&((start / SECTOR) as u32).to_be_bytes());
            let mut bitmap = vec![0u8; SECTOR];
            let mut data = vec![0xdb; BLOCK];
            for sector in sectors {
                bitmap[sector / 8] |= 0x80 >> (sector % 8);
                data[sector * SECTOR..][..SECTOR].fill(*fill);
            }
            if sectors.len() == BLOCK / SECTOR {
                map[number / 8] |= 0x80 >> (number % 8);
            }
            blocks.extend(bitmap);
            blocks.extend(data);
            at = start + SECTOR + BLOCK;
        }
        let mut batmap = vec![0; SECTOR];
        batmap[..8].copy_from_slice(b"tdbatmap");
        batmap[8..16].copy_from_slice(&(map_at as u64).to_be_bytes());
        batmap[16..20].copy_from_slice(&1u32.to_be_bytes());
        batmap[20..24].copy_from_slice(&0x0001_0002u32.to_be_bytes());
        batmap[24..28].copy_from_slice(&sum(&map).to_be_bytes());
        let footer = self.footer();
        let parts = [
            &footer, &header, &table, &batmap, &map, &names, &blocks, &footer,
        ];
        parts.into_iter().flatten().copied().collect()
    }
}

fn sum(bytes: &[u8]) -> u32 {
    !bytes.iter().map(|b| u32::from(*b)).sum::<u32>()
}

/// Puts the checksum of a structure at `at`.
pub fn seal(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum = sum(bytes);
    bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
}

/// What an image has of its disk, sector by sector, read as the specification says. `None` for what it has not.
pub fn sectors(file: &[u8]) -> Vec<Option<Vec<u8>>> {
    let number = |at: usize, len: usize| -> usize {
        let field = &file[at..at + len];
        field.iter().fold(0, |n, byte| n << 8 | usize::from(*byte))
    };
    assert_eq!(&file[..8], b"conectix", "no copy of the footer");
    let header = number(16, 8);
    let (table, block) = (number(header + 16, 8), number(header + 32, 4));
    let bitmap_bytes = (block / SECTOR / 8).next_multiple_of(SECTOR);
    let mut all = Vec::new();
    for sector in 0..number(48, 8) / SECTOR {
        let (number_of, within) = (sector * SECTOR / block, sector % (block / SECTOR));
        let entry = number(table + number_of * 4, 4);
        let there = entry != 0xffff_ffff && {
            let byte = file[entry * SECTOR + within / 8];
            byte << (within % 8) & 0x80 != 0
        };
        all.push(there.then(|| {
            let at = entry * SECTOR + bitmap_bytes + within * SECTOR;
            file[at..at + SECTOR].to_vec()
        }));
    }
    all
}
