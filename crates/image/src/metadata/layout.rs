//! Clusters and tables as shifts, and how L2 tables are cut into slices for the cache.

/// The entry's cluster may be written in place (qcow2: it has refcount 1).
pub(crate) const COPIED: u64 = 1 << 63;
/// The cluster reads as zeros.
pub(crate) const ZERO: u64 = 1;
/// Bits of the host offset.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// In memory only, in entries of first-level tables: the block behind it was never written, so
/// what is not in the cache is zeros.
pub(crate) const FRESH: u64 = 1;
/// In memory only, with [`FRESH`]: its place in the file reads as zeros already.
pub(crate) const FRESH_ZEROED: u64 = 2;

/// Slices of L2 tables are so large, or a table, or what keeps the slot table below [`SLOTS_MAX`].
const SLICE_BYTES: u64 = 4096;
/// Bytes of L2 tables that are read at once.
const SPAN_BYTES: u64 = 64 << 10;
/// Most slices of all L2 tables together: 64 MiB of slots.
const SLOTS_MAX: u64 = 1 << 24;

/// The constants that the metadata cache needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// log2 of the cluster size.
    pub(crate) cluster_bits: u32,
    /// log2 of the bytes of an L2 table (or another block that is cut into slices).
    pub(crate) table_bits: u32,
    /// log2 of the bytes of a slice.
    pub(crate) slice_bits: u32,
    /// Bytes of the virtual disk.
    pub(crate) size: u64,
    /// Whether L2 entries have 128 bits.
    extended: bool,
}

impl Layout {
    /// For a disk of `size` bytes with clusters of `1 << cluster_bits` and L2 tables of `1 << table_bits` bytes.
    pub(crate) fn new(size: u64, cluster_bits: u32, table_bits: u32, extended: bool) -> Self {
        let mut layout = Self {
            cluster_bits,
            table_bits,
            slice_bits: table_bits,
            size,
            extended,
        };
        let tables = layout.guest_clusters().div_ceil(1 << layout.l2_bits());
        let mut slice = SLICE_BYTES.trailing_zeros().min(table_bits);
        while slice < table_bits && tables << (table_bits - slice) > SLOTS_MAX {
            slice += 1;
        }
        layout.slice_bits = slice;
        layout
    }

    /// Bytes of a cluster.
    #[inline]
    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of a slice.
    #[inline]
    pub(crate) fn slice(&self) -> u64 {
        1 << self.slice_bits
    }

    /// Whether L2 entries have 128 bits, with subclusters.
    #[inline]
    pub(crate) fn extended(&self) -> bool {
        self.extended
    }

    /// log2 of the 64-bit words of an L2 entry.
    #[inline]
    pub(crate) fn entry_word_bits(&self) -> u32 {
        u32::from(self.extended)
    }

    /// 64-bit words of a slice.
    #[inline]
    pub(crate) fn slice_words(&self) -> usize {
        1 << (self.slice_bits - 3)
    }

    /// log2 of the L2 entries of a slice.
    #[inline]
    pub(crate) fn slice_entry_bits(&self) -> u32 {
        self.slice_bits - 3 - self.entry_word_bits()
    }

    /// L2 entries of a slice.
    #[inline]
    pub(crate) fn slice_entries(&self) -> usize {
        1 << self.slice_entry_bits()
    }

    /// log2 of the slices of a table.
    #[inline]
    pub(crate) fn slices_per_table_bits(&self) -> u32 {
        self.table_bits - self.slice_bits
    }

    /// L2 slices that one read brings in while there is room: a whole table, or 64 KiB of it. A power of two,
    /// at most 64.
    #[inline]
    pub(crate) fn span_slices(&self) -> u64 {
        (SPAN_BYTES >> self.slice_bits).clamp(1, 1 << self.slices_per_table_bits())
    }

    /// log2 of the guest clusters behind one L1 entry.
    #[inline]
    pub(crate) fn l2_bits(&self) -> u32 {
        self.table_bits - 3 - self.entry_word_bits()
    }

    /// Guest clusters of the disk.
    pub(crate) fn guest_clusters(&self) -> u64 {
        self.size.div_ceil(self.cluster())
    }

    /// Slices of all L2 tables that the disk can have.
    pub(crate) fn l2_slices(&self) -> u64 {
        self.guest_clusters().div_ceil(self.slice_entries() as u64)
    }

    /// Bytes of the unit in which a slice's changes are tracked and written: at most 64 per slice.
    #[inline]
    pub(crate) fn granule_bits(&self) -> u32 {
        // Whole blocks of most file systems: a direct write of less than a block would make ext4 take the
        // file for itself, and wait for all other writes.
        self.slice_bits
            .min(12)
            .max(self.slice_bits.saturating_sub(6))
    }
}
