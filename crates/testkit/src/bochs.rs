//! Growing disk images of Bochs, from QEMU's `block/bochs.c` and not from our code.

/// An image of `disk` (whole sectors) in extents of so many bytes, the last extents first. Sectors and extents of zeros are
/// left out.
pub fn image(version_1: bool, extent: usize, disk: &[u8]) -> Vec<u8> {
    let count = disk.len().div_ceil(extent).max(1);
    let bitmap = (extent / 512).div_ceil(8);
    let mut bytes = vec![0; 512];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"Bochs Virtual HD Image");
    put(32, b"Redolog");
    put(48, b"Growing");
    let version: u32 = if version_1 { 0x10000 } else { 0x20000 };
    // Extents begin at sectors.
    let entries = count.next_multiple_of(128);
    let words = [version, 512, entries as u32, bitmap as u32, extent as u32];
    for (nth, word) in words.iter().enumerate() {
        put(64 + nth * 4, &word.to_le_bytes());
    }
    put(
        if version_1 { 84 } else { 88 },
        &(disk.len() as u64).to_le_bytes(),
    );
    let mut catalog = vec![u32::MAX; entries];
    let mut extents = Vec::new();
    let mut number = 0;
    for (index, part) in disk.chunks(extent).enumerate().rev() {
        if part.iter().all(|byte| *byte == 0) {
            continue;
        }
        catalog[index] = number;
        number += 1;
        let mut bits = vec![0u8; bitmap.next_multiple_of(512)];
        for (sector, data) in part.chunks(512).enumerate() {
            if data.iter().any(|byte| *byte != 0) {
                bits[sector / 8] |= 1 << (sector % 8);
            }
        }
        extents.extend(bits);
        // What no bit stands for is not zeros in the file.
        let data = part
            .chunks(512)
            .flat_map(|data| match data.iter().all(|b| *b == 0) {
                true => vec![0xee; data.len()],
                false => data.to_vec(),
            });
        let mut data: Vec<u8> = data.collect();
        data.resize(extent, 0xee);
        extents.extend(data);
    }
    bytes.extend(catalog.iter().flat_map(|entry| entry.to_le_bytes()));
    bytes.extend(extents);
    bytes
}
