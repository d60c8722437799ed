//! Sound images that no creation of ours makes: of formats that are only read, with several files, or small enough to be
//! damaged everywhere.

use super::{CALLS_MAX, CLUSTER, REACH, SPACE, bytes_of, storage};
use block::{Result, Storage};
use image::vmdk::{self, StreamWriter, Subformat};
use std::sync::{Arc, OnceLock};
use testkit::dmg::{RAW, Tables, ZERO, ZLIB};
use testkit::memory::Memory;
use testkit::vmdk::fit;

/// Sectors of the first of three extents of a disk, which is sparse as the last one is; the other is flat.
pub(super) const PART: u64 = 400;

/// The file of a name that a descriptor has, sound: sparse where its name begins with an s, else of some bytes.
pub(super) fn part(name: &str) -> Memory {
    static SPARSE: OnceLock<Vec<u8>> = OnceLock::new();
    if !name.starts_with('s') {
        let flat = Memory::new(&[0x5a; 9000], SPACE, CALLS_MAX);
        flat.set_len(1 << 20).expect("a length");
        return flat;
    }
    let bytes = SPARSE.get_or_init(|| {
        let file = storage(&[]);
        let new = vmdk::CreateOptions {
            subformat: Subformat::TwoGbMaxExtentSparse,
            ..sparse("image.vmdk")
        };
        new.files()[0].write(&*file).expect("an extent");
        let mut bytes = bytes_of(&file);
        fit(&mut bytes, PART, CLUSTER / 512, false);
        bytes
    });
    Memory::new(bytes, SPACE, CALLS_MAX)
}

/// A sparse VMDK image of so many tables that there are enough for small ones.
fn sparse(name: &str) -> vmdk::CreateOptions {
    vmdk::CreateOptions {
        size: 3 * REACH / (128 * CLUSTER) * (32 << 20),
        zeroed_grain: true,
        name: name.to_owned(),
        ..vmdk::CreateOptions::default()
    }
}

pub(super) fn descriptor() -> Vec<u8> {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"custom\"\n\
         # Extents\nRW {PART} SPARSE \"s1\"\nRW 700 FLAT \"flat\" 9\nRW {PART} SPARSE \"s2\"\n\
         RW 300 FLAT \"flat\" 1000\n\nddb.adapterType = \"ide\"\n"
    )
    .into_bytes()
}

/// A Parallels image with clusters of the same size, in no order.
pub(super) fn parallels() -> Vec<u8> {
    let entries: [u32; 20] = std::array::from_fn(|n| match n {
        0 | 1 | 3 => 4 - n as u32,
        _ => 0,
    });
    let head = [2u32, 16, 40, 8, 20, 160, 0, 0x312e_3276, 8, 0, 0, 0];
    let mut bytes = b"WithouFreSpacExt".to_vec();
    bytes.extend(
        head.iter()
            .chain(&entries)
            .flat_map(|word| word.to_le_bytes()),
    );
    bytes.resize(5 * CLUSTER as usize, 0x5a);
    bytes
}

/// A sparse VMDK image with small grains and tables.
pub(super) fn sparse_image(file: &Arc<Memory>) -> Result<()> {
    let new = sparse("image.vmdk");
    new.write(&**file)?;
    let mut bytes = bytes_of(file);
    let sectors = 3 * REACH / 512;
    fit(&mut bytes, sectors, CLUSTER / 512, false);
    let head = String::from_utf8_lossy(&bytes[512..21 * 512]);
    let line = |sectors: u64| format!("RW {sectors} SPARSE");
    let mut head = head
        .replace(&line(new.size / 512), &line(sectors))
        .into_bytes();
    head.resize(20 * 512, 0);
    bytes[512..21 * 512].copy_from_slice(&head);
    file.write_at(0, &bytes)
}

/// A compressed VMDK image.
pub(super) fn stream(file: &Arc<Memory>) -> Vec<u8> {
    let new = vmdk::CreateOptions {
        size: 20 << 16,
        subformat: Subformat::StreamOptimized,
        zeroed_grain: true,
        name: "image.vmdk".to_owned(),
        ..vmdk::CreateOptions::default()
    };
    let mut writer = StreamWriter::new(&**file, &new).expect("an image");
    for guest in [0, 1, 3] {
        // Not the same from sector to sector, so that there is something to inflate.
        let grain: Vec<u8> = (0..1u32 << 16).map(|n| (n / 300 + guest) as u8).collect();
        writer.put_data(u64::from(guest), &grain).expect("a grain");
    }
    writer.put_zero(4).expect("zeros");
    writer.finish().expect("an image");
    bytes_of(file)
}

/// A disk of 75 clusters with some of zeros.
fn disk() -> Vec<u8> {
    let mut disk: Vec<u8> = (0..75 * CLUSTER).map(|at| (at / 700) as u8 | 1).collect();
    let zeros = 9 * CLUSTER as usize;
    disk[zeros..3 * zeros].fill(0);
    disk
}

/// A growing image of Bochs, with extents of a cluster.
pub(super) fn bochs() -> Vec<u8> {
    testkit::bochs::image(false, CLUSTER as usize, &disk())
}

/// A compressed loop image, with blocks of a cluster that are not packed.
pub(super) fn cloop() -> Vec<u8> {
    testkit::cloop::image(CLUSTER as usize, &disk(), testkit::cloop::stored)
}

/// An Apple disk image with a resource fork: nothing in it is text.
pub(super) fn dmg() -> Vec<u8> {
    let disk = disk();
    let sectors = CLUSTER / 512;
    let parts = disk.chunks(CLUSTER as usize).enumerate();
    let chunks: Vec<_> = parts
        .map(|(nth, part)| match nth {
            _ if part.iter().all(|byte| *byte == 0) => (ZERO, sectors, Vec::new()),
            nth if nth % 3 == 0 => (RAW, sectors, part.to_vec()),
            _ => (ZLIB, sectors, testkit::cloop::stored(part)),
        })
        .collect();
    testkit::dmg::image(&chunks, Tables::Fork)
}
