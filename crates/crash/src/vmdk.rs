//! VMDK images to crash.
//!
//! QEMU's have grains of 64 KiB and tables of 32 MiB of the disk. Those made here have grains of the cluster size and
//! tables of 128 of them, so that a small disk has several; the redundant tables can be left out, and the disk can be
//! split.
//!
//! ```text
//!   split: image │ descriptor      part0 │ sparse: a third       part1 │ 5 sectors, flat: a quarter       part2 │ sparse
//! ```

use crate::spec::Spec;
use block::{Error, Result, Storage};
use image::vmdk::{CreateOptions, NO_PARENT, Parts, Subformat, Vmdk};
use io::SimDisk;
use std::sync::Arc;
use testkit::vmdk::TABLE_ENTRIES;
use tool::check::{CheckOptions, Report};

const SECTOR: u64 = 512;
/// Bytes of the disk that a grain table of QEMU's has.
const TABLE_REACH: u64 = 32 << 20;
/// Sectors of a flat extent's file before the extent.
const BEFORE: u64 = 5;

/// What kind of VMDK image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Entries of 1 stand for zeros.
    pub zeroed: bool,
    /// Grain tables have no copies.
    pub single: bool,
    /// A descriptor, and three files that have a part of the disk each: sparse, flat, sparse.
    pub split: bool,
}

impl Kind {
    /// Words with `+` between them.
    pub fn parse(words: &str) -> Self {
        let has = |word| words.split('+').any(|w| w == word);
        Self {
            zeroed: has("zeroed"),
            single: has("single"),
            split: has("split"),
        }
    }

    /// The files beside the first.
    pub fn parts(self) -> usize {
        if self.split { 3 } else { 0 }
    }
}

/// Makes the image `spec` on its own disks, which are empty, over what has the CID `below`.
///
/// # Errors
///
/// What creating it fails with.
pub fn create(spec: &Spec, kind: Kind, disks: &[Arc<SimDisk>], below: Option<u32>) -> Result<()> {
    let parent = spec.create.backing.as_ref().zip(below);
    let size = spec.create.size;
    let new = |size: u64, subformat| CreateOptions {
        size: size.div_ceil(TABLE_ENTRIES * spec.create.cluster_size) * TABLE_REACH,
        subformat,
        zeroed_grain: kind.zeroed,
        name: "image".to_owned(),
        parent: parent.map(|((name, _), cid)| (name.clone(), cid)),
        ..CreateOptions::default()
    };
    let grain = spec.create.cluster_size;
    let [image, parts @ ..] = disks else {
        return Err(Error::invalid("a world without a disk"));
    };
    if let [first, flat, last] = parts {
        // Whole grains: of a last one that is not whole, QEMU (10.0.2) reads all, and the next extent from where that ends.
        let sectors = |bytes: u64| bytes / grain * grain / SECTOR;
        let sizes = [sectors(size / 3), sectors(size / 4)];
        let sizes = [sizes[0], sizes[1], size / SECTOR - sizes[0] - sizes[1]];
        for (disk, sectors) in [(first, sizes[0]), (last, sizes[2])] {
            let new = new(sectors * SECTOR, Subformat::TwoGbMaxExtentSparse);
            for file in new.files() {
                file.write(&**disk)?;
            }
            fit(&**disk, sectors, grain, kind.single)?;
        }
        flat.set_len((BEFORE + sizes[1]) * SECTOR)?;
        flat.sync()?;
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={NO_PARENT:x}\ncreateType=\"twoGbMaxExtentSparse\"\n\
             RW {} SPARSE \"part0\"\nRW {} FLAT \"part1\" {BEFORE}\nRW {} SPARSE \"part2\"\n",
            sizes[0], sizes[1], sizes[2]
        );
        image.write_at(0, text.as_bytes())?;
        return image.sync();
    }
    let new = new(size, Subformat::MonolithicSparse);
    new.write(&**image)?;
    fit(&**image, size / SECTOR, grain, kind.single)?;
    // The descriptor has the size too.
    let text = Parts::read(&**image)?.text;
    let mut bytes = vec![0; (text.end - text.start) as usize];
    image.read_at(text.start, &mut bytes)?;
    let line = |sectors: u64| format!("RW {sectors} SPARSE");
    let old = String::from_utf8_lossy(&bytes);
    let mut bytes = old
        .replace(&line(new.size / SECTOR), &line(size / SECTOR))
        .into_bytes();
    bytes.resize((text.end - text.start) as usize, 0);
    image.write_at(text.start, &bytes)?;
    image.sync()
}

/// Gives a sparse file that has enough tables smaller ones, for `sectors` of a disk.
fn fit(file: &dyn Storage, sectors: u64, grain: u64, single: bool) -> Result<()> {
    let mut header = [0; SECTOR as usize];
    file.read_at(0, &mut header)?;
    testkit::vmdk::fit(&mut header, sectors, grain / SECTOR, single);
    file.write_at(0, &header)?;
    file.sync()
}

/// The CID of the image in `file`.
///
/// # Errors
///
/// What is wrong with it.
pub fn cid(file: &dyn Storage) -> Result<u32> {
    Ok(Parts::read(file)?.descriptor.cid)
}

/// Opens the image in its own `files`. `keeps_id`: as [`image::vmdk::OpenOptions::keeps_id`].
///
/// # Errors
///
/// What opening it fails with.
pub fn open(files: &[&dyn Storage], read_only: bool, keeps_id: bool) -> Result<Vmdk> {
    let options = image::vmdk::OpenOptions {
        read_only,
        // As few tables as there may be.
        cache_bytes: Some(0),
        keeps_id,
    };
    Vmdk::open(Parts::read(files[0])?, files, &options)
}

/// Checks the image in its own `files`.
///
/// # Errors
///
/// As `tool::check::vmdk::check`.
pub fn check(files: &[&dyn Storage], options: &CheckOptions) -> Result<Report> {
    tool::check::vmdk::check(&Parts::read(files[0])?, files, options)
}
