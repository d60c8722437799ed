//! VHDX images byte by byte: from [MS-VHDX], not from our code.
//!
//! ```text
//!   0 identifier, headers, region tables │ 1 M log │ 2 M block table │ 3 M metadata │ 4 M blocks …
//! ```

/// Bytes of the unit in which everything lies.
pub const MIB: usize = 1 << 20;

/// Where the log is, and where the block table, the metadata and the blocks are.
pub const LOG: usize = MIB;
/// See [`LOG`].
pub const TABLE: usize = 2 * MIB;
/// See [`LOG`].
pub const METADATA: usize = 3 * MIB;
/// See [`LOG`].
pub const BLOCKS: usize = 4 * MIB;

/// Where the headers are, and where the copies of the region table are.
pub const HEADERS: [usize; 2] = [64 << 10, 128 << 10];
/// See [`HEADERS`].
pub const REGIONS: [usize; 2] = [192 << 10, 256 << 10];

/// Where the items are: file parameters, virtual disk size, page 83 data, logical and physical sector size, locator.
pub const ITEMS: [usize; 6] = [
    METADATA + (64 << 10),
    METADATA + (64 << 10) + 8,
    METADATA + (64 << 10) + 16,
    METADATA + (64 << 10) + 32,
    METADATA + (64 << 10) + 36,
    METADATA + (64 << 10) + 40,
];

/// GUIDs as they are on disk.
const BAT_ID: [u8; 16] = *b"\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08";
const METADATA_ID: [u8; 16] = *b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";
const ITEM_IDS: [[u8; 16]; 6] = [
    *b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b",
    *b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8",
    *b"\xab\x12\xca\xbe\xe6\xb2\x23\x45\x93\xef\xc3\x09\xe0\x00\xc7\x46",
    *b"\x1d\xbf\x41\x81\x6f\xa9\x09\x47\xba\x47\xf2\x33\xa8\xfa\xab\x5f",
    *b"\xc7\x48\xa3\xcd\x5d\x44\x71\x44\x9c\xc9\xe9\x88\x52\x51\xc5\x56",
    *b"\x2d\x5f\xd3\xa8\x0b\xb3\x4d\x45\xab\xf7\xd3\xd8\x48\x34\xab\x0c",
];
const LOCATOR_ID: [u8; 16] = *b"\xb7\xef\x4a\xb0\x9e\xd1\x81\x4a\xb7\x89\x25\xb8\xe9\x44\x59\x13";

/// An image to make, in blocks of 1 MiB.
#[derive(Clone, Debug)]
pub struct Forge {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a logical sector.
    pub sector: u32,
    /// Blocks: number, state, and the byte that fills what the file has of it (nothing for states without a place).
    pub blocks: Vec<(usize, u8, u8)>,
    /// Of blocks in state 7: number, and the sectors that they have.
    pub bits: Vec<(usize, Vec<usize>)>,
    /// What it says of its parent, key by key.
    pub parent: Vec<(String, String)>,
    /// The header's DataWriteGuid.
    pub data_id: [u8; 16],
}

impl Forge {
    /// A dynamic image of `size` bytes without blocks.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            sector: 512,
            blocks: Vec::new(),
            bits: Vec::new(),
            parent: Vec::new(),
            data_id: [0x11; 16],
        }
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCKS];
        put(&mut bytes, 0, b"vhdxfile");
        put(&mut bytes, 8, b"t\0e\0s\0t\0");
        for (number, at) in HEADERS.into_iter().enumerate() {
            put(&mut bytes, at, b"head");
            put(&mut bytes, at + 8, &(7 + number as u64).to_le_bytes());
            put(&mut bytes, at + 32, &self.data_id);
            put(&mut bytes, at + 66, &1u16.to_le_bytes());
            put(&mut bytes, at + 68, &(MIB as u32).to_le_bytes());
            put(&mut bytes, at + 72, &(LOG as u64).to_le_bytes());
            seal(&mut bytes[at..at + 4096]);
        }
        for at in REGIONS {
            put(&mut bytes, at, b"regi");
            put(&mut bytes, at + 8, &2u32.to_le_bytes());
            for (place, id, offset) in [(16, BAT_ID, TABLE), (48, METADATA_ID, METADATA)] {
                put(&mut bytes, at + place, &id);
                put(&mut bytes, at + place + 16, &(offset as u64).to_le_bytes());
                put(&mut bytes, at + place + 24, &(MIB as u32).to_le_bytes());
                put(&mut bytes, at + place + 28, &1u32.to_le_bytes());
            }
            seal(&mut bytes[at..at + (64 << 10)]);
        }
        self.put_metadata(&mut bytes);
        // Of 2^23 sectors is a chunk, and a block has 1 MiB.
        let ratio = (self.sector as usize) << 3;
        let bitmap = (!self.parent.is_empty() && !self.bits.is_empty()).then_some(bytes.len());
        if let Some(at) = bitmap {
            bytes.resize(at + MIB, 0);
            put(
                &mut bytes,
                TABLE + ratio * 8,
                &(at as u64 | 6).to_le_bytes(),
            );
        }
        for (number, state, fill) in &self.blocks {
            let there = *state >= 6;
            let at = if there { bytes.len() } else { 0 };
            if there {
                bytes.resize(at + MIB, *fill);
            }
            let entry = at as u64 | u64::from(*state);
            put(
                &mut bytes,
                TABLE + (number + number / ratio) * 8,
                &entry.to_le_bytes(),
            );
        }
        for (number, sectors) in &self.bits {
            for sector in sectors {
                let bit = number * MIB / self.sector as usize + sector;
                let at = bitmap.expect("a parent");
                bytes[at + bit / 8] |= 1 << (bit % 8);
            }
        }
        bytes
    }

    fn put_metadata(&self, bytes: &mut [u8]) {
        put(bytes, METADATA, b"metadata");
        let locator = self.locator();
        let flags = if self.parent.is_empty() { 0 } else { 2u32 };
        let parameters = [(MIB as u32).to_le_bytes(), flags.to_le_bytes()].concat();
        let items = [
            parameters,
            self.size.to_le_bytes().to_vec(),
            vec![0x83; 16],
            self.sector.to_le_bytes().to_vec(),
            4096u32.to_le_bytes().to_vec(),
            locator,
        ];
        let count = if self.parent.is_empty() { 5 } else { 6 };
        put(bytes, METADATA + 10, &(count as u16).to_le_bytes());
        for (index, item) in items.iter().take(count).enumerate() {
            let entry = METADATA + 32 + index * 32;
            put(bytes, entry, &ITEM_IDS[index]);
            put(
                bytes,
                entry + 16,
                &((ITEMS[index] - METADATA) as u32).to_le_bytes(),
            );
            put(bytes, entry + 20, &(item.len() as u32).to_le_bytes());
            put(bytes, entry + 24, &4u32.to_le_bytes());
            put(bytes, ITEMS[index], item);
        }
    }

    fn locator(&self) -> Vec<u8> {
        let mut item = LOCATOR_ID.to_vec();
        item.extend([0, 0]);
        item.extend((self.parent.len() as u16).to_le_bytes());
        let mut texts: Vec<u8> = Vec::new();
        for (key, value) in &self.parent {
            let mut place = |text: &str| {
                let offset = 20 + self.parent.len() * 12 + texts.len();
                let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
                texts.extend(&units);
                (offset as u32, units.len() as u16)
            };
            let (key, value) = (place(key), place(value));
            item.extend(key.0.to_le_bytes());
            item.extend(value.0.to_le_bytes());
            item.extend(key.1.to_le_bytes());
            item.extend(value.1.to_le_bytes());
        }
        item.extend(texts);
        item
    }
}

/// An entry of a log.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its first sector in the log, of 4096 bytes.
    pub at: usize,
    /// The first sector of the sequence that it ends.
    pub tail: usize,
    /// Its number.
    pub sequence: u64,
    /// What it changes.
    pub changes: Vec<Change>,
    /// How long the file was, and is to be.
    pub flushed: u64,
    /// See [`Entry::flushed`].
    pub last: u64,
}

/// What an entry changes.
#[derive(Clone, Debug)]
pub enum Change {
    /// These 4096 bytes are to be there.
    Data(u64, Vec<u8>),
    /// So many zeros are to be there.
    Zeros(u64, u64),
}

/// The log's GUID.
pub const LOG_ID: [u8; 16] = [0x77; 16];

impl Entry {
    /// One at sector `at` that is a sequence of itself, of a file of `len` bytes.
    pub fn new(at: usize, sequence: u64, len: usize, changes: Vec<Change>) -> Self {
        Self {
            at,
            tail: at,
            sequence,
            changes,
            flushed: len as u64,
            last: len as u64,
        }
    }

    /// Its bytes: whole sectors.
    pub fn bytes(&self) -> Vec<u8> {
        let mut entry = vec![0; (64 + self.changes.len() * 32).next_multiple_of(4096)];
        for (index, change) in self.changes.iter().enumerate() {
            let place = 64 + index * 32;
            put(&mut entry, place + 24, &self.sequence.to_le_bytes());
            match change {
                Change::Zeros(at, len) => {
                    put(&mut entry, place, b"zero");
                    put(&mut entry, place + 8, &len.to_le_bytes());
                    put(&mut entry, place + 16, &at.to_le_bytes());
                }
                Change::Data(at, bytes) => {
                    put(&mut entry, place, b"desc");
                    put(&mut entry, place + 4, &bytes[4092..4096]);
                    put(&mut entry, place + 8, &bytes[..8]);
                    put(&mut entry, place + 16, &at.to_le_bytes());
                    let mut sector = bytes.clone();
                    put(&mut sector, 0, b"data");
                    put(
                        &mut sector,
                        4,
                        &((self.sequence >> 32) as u32).to_le_bytes(),
                    );
                    put(&mut sector, 4092, &(self.sequence as u32).to_le_bytes());
                    entry.extend(sector);
                }
            }
        }
        let len = entry.len() as u32;
        put(&mut entry, 0, b"loge");
        put(&mut entry, 8, &len.to_le_bytes());
        put(&mut entry, 12, &((self.tail * 4096) as u32).to_le_bytes());
        put(&mut entry, 16, &self.sequence.to_le_bytes());
        put(&mut entry, 24, &(self.changes.len() as u32).to_le_bytes());
        put(&mut entry, 32, &LOG_ID);
        put(&mut entry, 48, &self.flushed.to_le_bytes());
        put(&mut entry, 56, &self.last.to_le_bytes());
        seal(&mut entry);
        entry
    }

    /// Puts it into the log of a forged file, round its end.
    pub fn put(&self, file: &mut [u8]) {
        for (index, sector) in self.bytes().chunks(4096).enumerate() {
            put(file, LOG + (self.at + index) % 256 * 4096, sector);
        }
    }
}

/// Puts bytes at a place.
pub fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// Changes a field of both headers.
pub fn header(file: &mut [u8], at: usize, field: &[u8]) {
    for header in HEADERS {
        put(file, header + at, field);
        seal(&mut file[header..header + 4096]);
    }
}

/// Changes a field of both copies of the region table.
pub fn region(file: &mut [u8], at: usize, field: &[u8]) {
    for copy in REGIONS {
        put(file, copy + at, field);
        seal(&mut file[copy..copy + (64 << 10)]);
    }
}

/// Puts the checksum of a structure, CRC-32C, at its byte 4.
pub fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let mut crc = u32::MAX;
    for byte in bytes.iter() {
        crc = (crc >> 8) ^ SUMS[((crc ^ u32::from(*byte)) & 0xff) as usize];
    }
    bytes[4..8].copy_from_slice(&(!crc).to_le_bytes());
}

const SUMS: [u32; 256] = {
    let mut sums = [0; 256];
    let mut at = 0;
    while at < 256 {
        let (mut sum, mut bit) = (at as u32, 0);
        while bit < 8 {
            sum = if sum & 1 == 1 {
                sum >> 1 ^ 0x82f6_3b78
            } else {
                sum >> 1
            };
            bit += 1;
        }
        sums[at] = sum;
        at += 1;
    }
    sums
};

/// What an image with an empty log has of its disk, sector by sector, read as the specification says. `None` for what it
/// leaves to a parent.
pub fn sectors(file: &[u8]) -> Vec<Option<Vec<u8>>> {
    let number = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
    for at in HEADERS {
        assert_eq!(file[at + 48..at + 64], [0; 16], "a log");
    }
    let table = number(REGIONS[0] + 32);
    let block = number(ITEMS[0]) & 0xffff_ffff;
    let sector = number(ITEMS[3]) & 0xffff;
    let ratio = (sector << 23) / block;
    let mut all = Vec::new();
    for index in 0..number(ITEMS[1]) / sector {
        let (number_of, within) = (index * sector / block, index * sector % block);
        let entry = number(table + (number_of + number_of / ratio) * 8);
        let at = (entry & !0xf_ffff) + within;
        let there = match entry & 7 {
            0 => false,
            1..=5 => {
                all.push(Some(vec![0; sector]));
                continue;
            }
            6 => true,
            _ => {
                let bits = number(table + (number_of / ratio * (ratio + 1) + ratio) * 8);
                assert_eq!(bits & 7, 6, "no sector bitmap");
                let bit = index % (1 << 23);
                file[(bits & !7) + bit / 8] >> (bit % 8) & 1 == 1
            }
        };
        all.push(there.then(|| {
            // Of the last block a file may have what the disk has.
            let mut bytes = file[at.min(file.len())..(at + sector).min(file.len())].to_vec();
            bytes.resize(sector, 0);
            bytes
        }));
    }
    all
}
