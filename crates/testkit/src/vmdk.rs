//! Sparse VMDK extents with smaller grains and tables than QEMU makes, so that a small disk has several of each.

/// Entries of a grain table: the fewest that there may be.
pub const TABLE_ENTRIES: u64 = 128;

/// Changes the header at the start of `extent`: a disk of `sectors` in grains of `grain` sectors, with small tables; without
/// the redundant ones when `single`. The directory, which has one of QEMU's tables for each 32 MiB, must have enough of them.
///
/// # Panics
///
/// When there is no header, and when there are too few tables.
pub fn fit(extent: &mut [u8], sectors: u64, grain: u64, single: bool) {
    assert!(extent.starts_with(b"KDMV"), "no header");
    let field = |at: usize| u64::from_le_bytes(extent[at..at + 8].try_into().expect("8 bytes"));
    let tables = field(12).div_ceil(512 * field(20));
    assert!(
        sectors.div_ceil(TABLE_ENTRIES * grain) <= tables,
        "too few tables"
    );
    extent[12..20].copy_from_slice(&sectors.to_le_bytes());
    extent[20..28].copy_from_slice(&grain.to_le_bytes());
    extent[44..48].copy_from_slice(&(TABLE_ENTRIES as u32).to_le_bytes());
    if single {
        // VMDK4_FLAG_RGD.
        extent[8] &= !2;
    }
}
