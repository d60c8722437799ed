//! A large qcow2 image whose clusters lie scattered, made in a moment: the metadata is written, the data are holes.
//!
//! Reads of holes need no device, so that what is measured on it is the metadata path; the same file read as raw is
//! the ceiling.
//!
//! ```text
//!   header │ L1 table │ refcount table │ refcount blocks │ L2 tables │ clusters (a hole)
//! ```

use std::{
    fs::File,
    io::{Error, Result},
    os::unix::fs::FileExt,
    path::Path,
};

const BITS: u32 = 16;
const CLUSTER: u64 = 1 << BITS;
/// Entries of an L2 table, and of a cluster of the refcount table.
const ENTRIES: u64 = CLUSTER / 8;
/// Refcounts of 16 bits in a block.
const BLOCK: u64 = CLUSTER / 2;
const COPIED: u64 = 1 << 63;

fn write(file: &File, cluster: u64, words: impl Iterator<Item = u64>) -> Result<()> {
    let bytes: Vec<u8> = words.flat_map(u64::to_be_bytes).collect();
    file.write_all_at(&bytes, cluster << BITS)
}

/// Makes a qcow2 image (version 3, clusters of 64 KiB) of `size` bytes at `path` in which every `step`-th cluster
/// is allocated; guest order and host order have nothing to do with one another. `size` is a power of
/// two from 512 MiB on, `step` one from 1 to 8192.
///
/// For reads of the allocated clusters alone: offsets that are multiples of `step * 65536`, plus less than 65536.
pub fn scattered_qcow2(path: &Path, size: u64, step: u64) -> Result<()> {
    let tables = size / CLUSTER / ENTRIES;
    if !size.is_power_of_two() || tables == 0 || !step.is_power_of_two() || step > ENTRIES {
        return Err(Error::other(
            "size and step are powers of two, within limits",
        ));
    }
    let data = size / CLUSTER / step;
    let l1 = 1;
    let ref_table = l1 + tables.div_ceil(ENTRIES);
    // Blocks for everything, themselves and their table generously included.
    let blocks = (data + tables + ref_table) / BLOCK + 3;
    let first_block = ref_table + blocks.div_ceil(ENTRIES);
    let first_table = first_block + blocks;
    let first_data = first_table + tables;
    let end = first_data + data;
    let file = File::create(path)?;
    file.set_len(end << BITS)?;
    // Specification: "Header".
    let header = [
        0x5146_49fb_0000_0003, // magic, version
        0,                     // backing file
        u64::from(BITS),       // backing file's name's length, cluster_bits
        size,
        tables, // no encryption, l1_size
        l1 << BITS,
        ref_table << BITS,
        (first_block - ref_table) << 32, // clusters of the refcount table, no snapshots
        0,
        0,
        0,
        0,
        4 << 32 | 104, // refcount_order, header_length
        0,
    ];
    write(&file, 0, header.into_iter())?;
    write(
        &file,
        l1,
        (0..tables).map(|t| COPIED | (first_table + t) << BITS),
    )?;
    write(
        &file,
        ref_table,
        (0..blocks).map(|b| (first_block + b) << BITS),
    )?;
    for block in 0..blocks {
        let used = end.saturating_sub(block * BLOCK).min(BLOCK);
        let bytes = [0, 1].repeat(usize::try_from(used).map_err(Error::other)?);
        file.write_all_at(&bytes, (first_block + block) << BITS)?;
    }
    let entry = |cluster: u64| {
        // An odd number times all numbers below a power of two gives each of them once.
        let host = (cluster / step).wrapping_mul(0x9e37_79b1) & (data - 1);
        match cluster % step {
            0 => COPIED | (first_data + host) << BITS,
            _ => 0,
        }
    };
    for table in 0..tables {
        let first = table * ENTRIES;
        write(
            &file,
            first_table + table,
            (first..first + ENTRIES).map(entry),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn qemu_finds_nothing_wrong() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("scattered.qcow2");
        for (size, step) in [(1 << 29, 1), (1 << 31, 16), (1 << 36, 16)] {
            scattered_qcow2(&path, size, step).unwrap();
            let out = Command::new("qemu-img").arg("check").arg(&path).output();
            let out = out.expect("qemu-img runs");
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            assert!(out.status.success(), "{size} {step}: {text}");
            let share = format!("{}/{} =", size / CLUSTER / step, size / CLUSTER);
            assert!(text.contains(&share), "{text}");
        }
        assert!(scattered_qcow2(&path, 1 << 28, 1).is_err());
        assert!(scattered_qcow2(&path, 1 << 30, 3).is_err());
    }
}
