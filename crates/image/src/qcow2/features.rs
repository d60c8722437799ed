//! Feature bits of the header, and their names.
//!
//! Bits that this code does not know are named from the image's own *feature name table*
//! (specification: "Feature name table"), whose entries are 48 bytes:
//!
//! ```text
//!   byte 0      which bitmap: 0 incompatible, 1 compatible, 2 autoclear
//!   byte 1      bit number, 0–63
//!   bytes 2–47  name, padded with zeros
//! ```

/// Incompatible bit: refcounts may be wrong.
pub const DIRTY: u64 = 1 << 0;
/// Incompatible bit: any structure may be wrong.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible bit: guest data are in an external file.
pub const DATA_FILE: u64 = 1 << 2;
/// Incompatible bit: `compression_type` is not zlib.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible bit: L2 entries of 128 bits with subclusters.
pub const EXTENDED_L2: u64 = 1 << 4;
/// All incompatible bits that the specification names.
pub const INCOMPATIBLE_KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;

/// Compatible bit: refcounts may be written late, under the dirty bit.
pub const LAZY_REFCOUNTS: u64 = 1 << 0;

/// Autoclear bit: the bitmaps extension is consistent.
pub const BITMAPS: u64 = 1 << 0;
/// Autoclear bit: the external data file is a plain raw image too.
pub const DATA_FILE_RAW: u64 = 1 << 1;

/// All autoclear bits that this code keeps true; a writer clears the others first.
pub const AUTOCLEAR_KNOWN: u64 = BITMAPS | DATA_FILE_RAW;

/// The three bitmaps of feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    /// Must be known to open the image.
    Incompatible,
    /// May be ignored.
    Compatible,
    /// Must be cleared by a writer that does not know them.
    Autoclear,
}

impl FeatureKind {
    fn code(self) -> u8 {
        match self {
            FeatureKind::Incompatible => 0,
            FeatureKind::Compatible => 1,
            FeatureKind::Autoclear => 2,
        }
    }
}

const ENTRY_LEN: usize = 48;

const KNOWN: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];

/// The feature name table (extension data) that a new image carries.
pub fn standard_table() -> Vec<u8> {
    let mut table = Vec::with_capacity(KNOWN.len() * ENTRY_LEN);
    for (kind, bit, name) in KNOWN {
        table.push(kind.code());
        table.push(bit);
        let mut field = [0u8; ENTRY_LEN - 2];
        for (to, from) in field.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        table.extend_from_slice(&field);
    }
    table
}

/// The name of feature `bit` of the bitmap `kind`: the specification's, else the one in `table`
/// (the data of the image's own extension), else its number.
pub fn name(kind: FeatureKind, bit: u8, table: Option<&[u8]>) -> String {
    if let Some((_, _, name)) = KNOWN.iter().find(|k| k.0 == kind && k.1 == bit) {
        return (*name).to_owned();
    }
    // The last entry may lack its padding.
    for entry in table.unwrap_or_default().chunks(ENTRY_LEN) {
        let Some((head, text)) = entry.split_at_checked(2) else {
            break;
        };
        if head == [kind.code(), bit] {
            let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
            let text = block::plain(&String::from_utf8_lossy(&text[..end]));
            return format!("'{text}' (bit {bit})");
        }
    }
    format!("unknown feature bit {bit}")
}

/// The names of all `bits` of one bitmap, separated by commas.
pub fn names(kind: FeatureKind, bits: u64, table: Option<&[u8]>) -> String {
    (0u8..64)
        .filter(|bit| bits >> bit & 1 == 1)
        .map(|bit| name(kind, bit, table))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_the_table_when_unknown() {
        let mut table = standard_table();
        assert_eq!(table.len(), 8 * 48);
        table.extend_from_slice(&[0, 9]);
        let mut field = [0u8; 46];
        field[..6].copy_from_slice(b"warp\x1b9");
        table.extend_from_slice(&field);
        let i = FeatureKind::Incompatible;
        assert_eq!(names(i, EXTENDED_L2, Some(&table)), "extended L2 entries");
        assert_eq!(names(i, 1 << 9, Some(&table)), "'warp?9' (bit 9)");
        assert_eq!(
            names(i, 1 << 9 | 1 << 63, None),
            "unknown feature bit 9, unknown feature bit 63"
        );
        // A table that is cut short has the name that is there, and is not read past its end.
        for (cut, want) in [
            (1, "'warp?9' (bit 9)"),
            (42, "'warp' (bit 9)"),
            (46, "'' (bit 9)"),
            (47, "unknown feature bit 9"),
        ] {
            assert_eq!(name(i, 9, Some(&table[..table.len() - cut])), want);
        }
    }
}
