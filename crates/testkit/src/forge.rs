//! A qcow2 image written byte by byte, from the specification and not from our code: for tests that need one which no
//! program would make.
//!
//! ```text
//!   cluster 0         header, extensions, backing file's name
//!           1         refcount table, then its blocks, the L1 table, and what is added
//! ```
//!
//! Everything that is allocated has refcount 1, and entries have their COPIED flag: what a test does not spoil is sound.

/// Header fields by their byte.
#[allow(missing_docs)]
pub mod field {
    pub const VERSION: u64 = 4;
    pub const BACKING_FILE_OFFSET: u64 = 8;
    pub const BACKING_FILE_SIZE: u64 = 16;
    pub const CLUSTER_BITS: u64 = 20;
    pub const SIZE: u64 = 24;
    pub const CRYPT_METHOD: u64 = 32;
    pub const L1_SIZE: u64 = 36;
    pub const L1_TABLE_OFFSET: u64 = 40;
    pub const REFCOUNT_TABLE_OFFSET: u64 = 48;
    pub const REFCOUNT_TABLE_CLUSTERS: u64 = 56;
    pub const NB_SNAPSHOTS: u64 = 60;
    pub const SNAPSHOTS_OFFSET: u64 = 64;
    pub const INCOMPATIBLE: u64 = 72;
    pub const COMPATIBLE: u64 = 80;
    pub const AUTOCLEAR: u64 = 88;
    pub const REFCOUNT_ORDER: u64 = 96;
    pub const HEADER_LENGTH: u64 = 100;
    pub const COMPRESSION_TYPE: u64 = 104;
}

/// Types of header extensions.
#[allow(missing_docs)]
pub mod extension {
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    pub const BITMAPS: u32 = 0x2385_2875;
    pub const CRYPTO_HEADER: u32 = 0x0537_be77;
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// The flag of an entry whose cluster has refcount 1.
pub const COPIED: u64 = 1 << 63;
/// The flag of an L2 entry that describes compressed data.
pub const COMPRESSED: u64 = 1 << 62;

/// What an image is like before anything is done to it.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster's bytes.
    pub cluster_bits: u32,
    /// log2 of a refcount's bits.
    pub refcount_order: u32,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of the header of a version 3 image.
    pub header_length: u32,
}

impl Default for Shape {
    /// 4 MiB in clusters of 4 KiB.
    fn default() -> Self {
        Self {
            version: 3,
            cluster_bits: 12,
            refcount_order: 4,
            extended_l2: false,
            size: 4 << 20,
            header_length: 112,
        }
    }
}

/// An image under construction. Offsets are bytes of the file; methods return the image, to be chained.
#[derive(Clone, Debug)]
pub struct Forge {
    /// The file.
    pub bytes: Vec<u8>,
    shape: Shape,
    refcount_table: u64,
    l1: u64,
    /// Where the next extension goes.
    extensions: u64,
}

impl Forge {
    /// A sound and empty image.
    pub fn new(shape: Shape) -> Self {
        let v3 = shape.version >= 3;
        let mut image = Self {
            bytes: Vec::new(),
            shape,
            refcount_table: shape.cluster(),
            l1: 0,
            extensions: if v3 { shape.header_length.into() } else { 72 },
        };
        // Header and refcount table are there before the first block, which counts them.
        image.bytes.resize(2 * shape.cluster() as usize, 0);
        image.set_refcount(0, 1);
        image.set_refcount(1, 1);
        let entry_bits = if shape.extended_l2 { 4 } else { 3 };
        let entries = shape
            .size
            .div_ceil(1 << (2 * shape.cluster_bits - entry_bits));
        image.l1 = image.allocate((entries * 8).div_ceil(shape.cluster()).max(1));
        let l1 = image.l1;
        image.bytes[..4].copy_from_slice(b"QFI\xfb");
        let mut image = image
            .put_u32(field::VERSION, shape.version)
            .put_u32(field::CLUSTER_BITS, shape.cluster_bits)
            .put_u64(field::SIZE, shape.size)
            .put_u32(field::L1_SIZE, entries as u32)
            .put_u64(field::L1_TABLE_OFFSET, l1)
            .put_u64(field::REFCOUNT_TABLE_OFFSET, shape.cluster())
            .put_u32(field::REFCOUNT_TABLE_CLUSTERS, 1);
        if v3 {
            image = image
                .put_u64(field::INCOMPATIBLE, u64::from(shape.extended_l2) << 4)
                .put_u32(field::REFCOUNT_ORDER, shape.refcount_order)
                .put_u32(field::HEADER_LENGTH, shape.header_length);
        }
        image
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        self.shape.cluster()
    }

    /// Overwrites bytes, growing the file where it ends before.
    pub fn put(mut self, at: u64, bytes: &[u8]) -> Self {
        self.write(at, bytes);
        self
    }

    /// A big-endian field.
    pub fn put_u32(self, at: u64, value: u32) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    /// A big-endian field.
    pub fn put_u64(self, at: u64, value: u64) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    /// The big-endian word at `at`.
    pub fn word(&self, at: u64) -> u64 {
        let at = at as usize;
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().expect("8 bytes"))
    }

    /// Cuts the file.
    pub fn truncate(mut self, len: u64) -> Self {
        self.bytes.truncate(len as usize);
        self
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        let end = at as usize + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[at as usize..end].copy_from_slice(bytes);
    }

    /// Whole clusters at the end of the file, each with refcount 1.
    pub fn allocate(&mut self, clusters: u64) -> u64 {
        let at = (self.bytes.len() as u64).next_multiple_of(self.cluster());
        self.bytes
            .resize((at + clusters * self.cluster()) as usize, 0);
        // A refcount block that this takes goes behind it.
        for cluster in at / self.cluster()..at / self.cluster() + clusters {
            self.set_refcount(cluster, 1);
        }
        at
    }

    /// Sets a refcount, with a new block where there is none.
    pub fn set_refcount(&mut self, cluster: u64, refcount: u64) {
        let bits = 1u64 << self.order();
        let per_block = self.cluster() * 8 / bits;
        let entry = self.refcount_table + cluster / per_block * 8;
        let mut block = self.word(entry);
        if block == 0 {
            block = (self.bytes.len() as u64).next_multiple_of(self.cluster());
            self.bytes.resize((block + self.cluster()) as usize, 0);
            self.write(entry, &block.to_be_bytes());
            self.set_refcount(block / self.cluster(), 1);
        }
        let at = cluster % per_block * bits;
        if bits >= 8 {
            let value = refcount.to_be_bytes();
            self.write(block + at / 8, &value[8 - bits as usize / 8..]);
        } else {
            // Narrow refcounts begin at a byte's low bits.
            let byte = (block + at / 8) as usize;
            let mask = ((1u8 << bits) - 1) << (at % 8);
            self.bytes[byte] = self.bytes[byte] & !mask | (refcount as u8) << (at % 8) & mask;
        }
    }

    fn order(&self) -> u32 {
        if self.shape.version >= 3 {
            self.shape.refcount_order
        } else {
            4
        }
    }

    /// The offset of the refcount block that counts the file's first clusters.
    pub fn refcount_block(&self) -> u64 {
        self.word(self.refcount_table)
    }

    /// The offset of the refcount table.
    pub fn refcount_table(&self) -> u64 {
        self.refcount_table
    }

    /// The offset of the L1 table.
    pub fn l1(&self) -> u64 {
        self.l1
    }

    /// The offset of the L2 table behind an L1 entry, which is made if there is none.
    pub fn l2(&mut self, index: u64) -> u64 {
        let entry = self.l1 + 8 * index;
        if self.word(entry) == 0 {
            let table = self.allocate(1);
            self.write(entry, &(table | COPIED).to_be_bytes());
        }
        self.word(entry) & !COPIED
    }

    /// The offset of the L2 entry of a guest cluster.
    pub fn entry(&mut self, guest_cluster: u64) -> u64 {
        let bytes = if self.shape.extended_l2 { 16 } else { 8 };
        let per_table = self.cluster() / bytes;
        self.l2(guest_cluster / per_table) + guest_cluster % per_table * bytes
    }

    /// Sets the L2 entry of a guest cluster.
    pub fn map(mut self, guest_cluster: u64, raw: u64) -> Self {
        let entry = self.entry(guest_cluster);
        self.write(entry, &raw.to_be_bytes());
        self
    }

    /// Sets the subcluster bitmap of a guest cluster.
    pub fn subclusters(mut self, guest_cluster: u64, bitmap: u64) -> Self {
        let entry = self.entry(guest_cluster);
        self.write(entry + 8, &bitmap.to_be_bytes());
        self
    }

    /// A guest cluster full of `byte`.
    pub fn data(mut self, guest_cluster: u64, byte: u8) -> Self {
        // Its table first: then the data are the last.
        self.entry(guest_cluster);
        let at = self.allocate(1);
        let cluster = self.cluster() as usize;
        self.write(at, &vec![byte; cluster]);
        self.map(guest_cluster, at | COPIED)
    }

    /// A compressed guest cluster: `packed` in clusters of its own.
    pub fn compressed(mut self, guest_cluster: u64, packed: &[u8]) -> Self {
        let raw = self.packed(packed);
        self.map(guest_cluster, raw)
    }

    /// Stores packed data and returns the entry that describes them.
    pub fn packed(&mut self, packed: &[u8]) -> u64 {
        let at = self.allocate((packed.len() as u64).div_ceil(self.cluster()).max(1));
        self.write(at, packed);
        self.descriptor(at, (packed.len() as u64).div_ceil(512).max(1) - 1)
    }

    /// A compressed cluster's entry: `sectors` besides the first (specification: "Compressed Clusters Descriptor").
    pub fn descriptor(&self, at: u64, sectors: u64) -> u64 {
        COMPRESSED | at | sectors << (62 - (self.shape.cluster_bits - 8))
    }

    /// Adds a header extension.
    pub fn extension(mut self, kind: u32, data: &[u8]) -> Self {
        let len = data.len() as u32;
        let mut bytes = [kind.to_be_bytes(), len.to_be_bytes()].concat();
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        self.write(self.extensions, &bytes);
        self.extensions += bytes.len() as u64;
        self
    }

    /// Where the next extension would be.
    pub fn extensions_end(&self) -> u64 {
        self.extensions
    }

    /// Names a backing file, and its format. To be called after all extensions.
    pub fn backing(mut self, name: &[u8], format: &str) -> Self {
        if !format.is_empty() {
            self = self.extension(extension::BACKING_FORMAT, format.as_bytes());
        }
        let at = self.extensions + 8;
        self.put(at, name)
            .put_u64(field::BACKING_FILE_OFFSET, at)
            .put_u32(field::BACKING_FILE_SIZE, name.len() as u32)
    }

    /// Adds the table of these snapshots.
    pub fn snapshots(mut self, entries: &[Snapshot]) -> Self {
        let mut table = Vec::new();
        for entry in entries {
            entry.encode(&mut table);
        }
        let clusters = (table.len() as u64).div_ceil(self.cluster()).max(1);
        let at = self.allocate(clusters);
        self.put(at, &table)
            .put_u32(field::NB_SNAPSHOTS, entries.len() as u32)
            .put_u64(field::SNAPSHOTS_OFFSET, at)
    }

    /// Adds the directory of these bitmaps, and the extension that leads there.
    pub fn bitmaps(mut self, entries: &[Bitmap]) -> Self {
        let mut directory = Vec::new();
        for entry in entries {
            entry.encode(&mut directory);
        }
        let len = directory.len() as u64;
        let at = self.allocate(len.div_ceil(self.cluster()).max(1));
        let autoclear = self.word(field::AUTOCLEAR);
        self.put(at, &directory)
            .put_u64(field::AUTOCLEAR, autoclear | 1)
            .extension(
                extension::BITMAPS,
                &bitmaps_extension(entries.len() as u32, len, at),
            )
    }
}

impl Shape {
    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }
}

/// A LUKS header (version 1, aes-xts-plain64, sha256) whose slots are not active: its fields are for tests to spoil.
///
/// ```text
///     0 magic   6 version   8 cipher   40 mode   72 hash   104 payload offset, sectors   108 key bytes
///   112 digest   132 salt   164 iterations   168 uuid   208 + 48 n  slot n: 0 state   4 iterations   8 salt
///   40 material's offset, sectors   44 stripes
/// ```
pub fn luks() -> Vec<u8> {
    let mut bytes = vec![0; 592];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"LUKS\xba\xbe\0\x01aes");
    put(40, b"xts-plain64");
    put(72, b"sha256");
    // Materials of 512 sectors from sector 8 on.
    put(104, &(8 + 8 * 512u32).to_be_bytes());
    put(108, &64u32.to_be_bytes());
    put(164, &1000u32.to_be_bytes());
    put(168, b"00000000-0000-0000-0000-000000000000");
    for slot in 0..8u32 {
        let at = 208 + 48 * slot as usize;
        put(at, &0xdeadu32.to_be_bytes());
        put(at + 40, &(8 + 512 * slot).to_be_bytes());
        put(at + 44, &4000u32.to_be_bytes());
    }
    bytes
}

/// The data of the bitmaps extension.
pub fn bitmaps_extension(count: u32, len: u64, offset: u64) -> Vec<u8> {
    let mut data = [count.to_be_bytes(), [0; 4]].concat();
    data.extend(len.to_be_bytes());
    data.extend(offset.to_be_bytes());
    data
}

/// An entry of the snapshot table.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Where its L1 table is.
    pub l1_offset: u64,
    /// Entries of that.
    pub l1_size: u32,
    /// Length of the extra data, if not theirs.
    pub extra_len: Option<u32>,
    /// Extra data: VM state size, disk size.
    pub extra: Vec<u8>,
    /// Lengths of id and name, if not theirs.
    pub lengths: Option<(u16, u16)>,
    /// The name.
    pub name: Vec<u8>,
}

impl Default for Snapshot {
    fn default() -> Self {
        Self {
            l1_offset: 0,
            l1_size: 0,
            extra_len: None,
            extra: [0u64.to_be_bytes(), (4u64 << 20).to_be_bytes()].concat(),
            lengths: None,
            name: b"snap".to_vec(),
        }
    }
}

impl Snapshot {
    fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let (id, name) = self.lengths.unwrap_or((1, self.name.len() as u16));
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(id.to_be_bytes());
        out.extend(name.to_be_bytes());
        out.extend([0; 20]);
        let extra = self.extra_len.unwrap_or(self.extra.len() as u32);
        out.extend(extra.to_be_bytes());
        out.extend(&self.extra);
        out.push(b'1');
        out.extend(&self.name);
        out.resize(start + (out.len() - start).next_multiple_of(8), 0);
    }
}

/// An entry of the bitmap directory.
#[derive(Clone, Debug)]
pub struct Bitmap {
    /// Where its table is.
    pub table: u64,
    /// Entries of that.
    pub entries: u32,
    /// 1 in use, 2 auto.
    pub flags: u32,
    /// 1 is a dirty tracking bitmap.
    pub kind: u8,
    /// log2 of the guest bytes of a bit.
    pub granularity_bits: u8,
    /// Length of the name, if not its own.
    pub name_len: Option<u16>,
    /// Length of the extra data, of which there are none.
    pub extra_len: u32,
    /// The name.
    pub name: Vec<u8>,
}

impl Default for Bitmap {
    fn default() -> Self {
        Self {
            table: 0,
            entries: 1,
            flags: 0,
            kind: 1,
            granularity_bits: 16,
            name_len: None,
            extra_len: 0,
            name: b"bits".to_vec(),
        }
    }
}

impl Bitmap {
    fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend(self.table.to_be_bytes());
        out.extend(self.entries.to_be_bytes());
        out.extend(self.flags.to_be_bytes());
        out.extend([self.kind, self.granularity_bits]);
        out.extend(
            self.name_len
                .unwrap_or(self.name.len() as u16)
                .to_be_bytes(),
        );
        out.extend(self.extra_len.to_be_bytes());
        out.extend(&self.name);
        out.resize(start + (out.len() - start).next_multiple_of(8), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TempDir, qemu};

    #[test]
    fn what_is_not_spoilt_is_sound_to_qemu() {
        let dir = TempDir::new();
        let plain = Shape::default();
        let shapes = [
            plain,
            Shape {
                version: 2,
                ..plain
            },
            Shape {
                cluster_bits: 9,
                size: 1 << 20,
                ..plain
            },
            Shape {
                refcount_order: 0,
                ..plain
            },
            Shape {
                refcount_order: 6,
                cluster_bits: 9,
                size: 1 << 18,
                ..plain
            },
            Shape {
                extended_l2: true,
                cluster_bits: 14,
                ..plain
            },
            Shape {
                header_length: 104,
                ..plain
            },
        ];
        for (nth, shape) in shapes.into_iter().enumerate() {
            let mut forge = Forge::new(shape).data(0, 1).data(5, 2);
            if shape.extended_l2 {
                forge = forge
                    .subclusters(0, 0xffff_ffff)
                    .subclusters(5, 0xffff_ffff);
            }
            if shape.refcount_order > 0 && shape.version == 3 {
                let table = forge.allocate(1);
                let bits = forge.allocate(1);
                let bitmap = Bitmap {
                    table,
                    ..Bitmap::default()
                };
                forge = forge.put_u64(table, bits).bitmaps(&[bitmap]);
                let l1_offset = forge.allocate(1);
                let l1_size = forge.word(field::L1_SIZE - 4) as u32;
                let extra = [0u64.to_be_bytes(), shape.size.to_be_bytes()].concat();
                forge = forge.snapshots(&[Snapshot {
                    l1_offset,
                    l1_size,
                    extra,
                    ..Snapshot::default()
                }]);
            }
            let path = dir.path(format!("{nth}"));
            std::fs::write(&path, &forge.bytes).unwrap();
            qemu::check("qcow2", &path);
            let cluster = 1u64 << shape.cluster_bits;
            let reads = [
                format!("read -P 1 0 {cluster}"),
                format!("read -P 2 {} {cluster}", 5 * cluster),
                format!("read -P 0 {cluster} {cluster}"),
            ];
            qemu::io("qcow2", &path, &reads.each_ref().map(String::as_str));
        }
    }
}
