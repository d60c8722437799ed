//! `qemu-img map`.

use super::info::full;
use super::line;
use super::open::{self, How};
use super::spec::{Image, Output};
use crate::map::{Entry, Holes, finish, walk};
use anyhow::{Result, anyhow, bail};
use block::Storage;
use clap::Args;
use disk::chain::{Chain, Layer};
use image::qcow2::check::each_refcount;
use image::{FileId, Format, qcow2, vdi, vhd, vmdk};
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::Path;

/// `map`.
#[derive(Args, Debug)]
pub struct Map {
    /// begin there
    #[arg(short, long, value_name = "OFFSET")]
    start_offset: Option<String>,
    /// show so much at most
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<String>,
    #[command(flatten)]
    output: Output,
    /// open image in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    pub(super) image: Image,
}

/// Shows where an image's data are.
pub fn run(args: &Map) -> Result<u8> {
    let bound = |what, text: &Option<String>| {
        text.as_deref()
            .map(|text| line::bytes(what, text))
            .transpose()
    };
    let start = bound("start offset", &args.start_offset)?.unwrap_or(0);
    let length = bound("max length", &args.max_length)?.unwrap_or(u64::MAX);
    let as_json = args.output.is_json()?;
    let file = args.image.file()?;
    let name = args.image.spec.name(file);
    let how = How {
        force_share: args.force_share,
        ..How::default()
    };
    let mut chain = open::chain(&name, &how, &args.image.spec.objects)?;
    // As QEMU does, it looks below what has the disk's accesses fail.
    chain.faults = None;
    let range = start..start.saturating_add(length);
    let told = chain.layers.iter().map(told_by_holes);
    let told = told.collect::<block::Result<Vec<Holes>>>()?;
    let holes = |layer: &Layer, _| {
        let depth = chain.layers.iter().position(|l| std::ptr::eq(l, layer));
        let told = depth.and_then(|depth| told.get(depth).copied());
        told.unwrap_or(Holes::Unseen)
    };
    // A map may have millions of lines: none of them is kept.
    let mut out = BufWriter::new(std::io::stdout().lock());
    let written = match as_json {
        true => json(&chain, range, holes, &mut out),
        false => human(
            &chain,
            &names(&open::active(&chain)?.path, &chain)?,
            range,
            holes,
            &mut out,
        ),
    };
    finish(written, out).map_err(|error| match error.downcast_ref::<block::Error>() {
        Some(own) => anyhow!("Could not read file metadata: {}", open::os_reason(own)),
        None => error,
    })?;
    Ok(0)
}

/// What QEMU takes holes in the files of an image for: where its driver says that whoever asks may look there
/// (`BDRV_BLOCK_RECURSE`, `BDRV_BLOCK_RAW`). Of VHDX images it shows all as data, wherever they are: this shows what there is.
fn told_by_holes(layer: &Layer) -> block::Result<Holes> {
    let Some(file) = layer.files.first() else {
        return Ok(Holes::Unseen);
    };
    if layer.image.encryption().is_some() {
        return Ok(Holes::Unseen);
    }
    Ok(match layer.format {
        Format::Raw | Format::Vhdx => Holes::Zeros,
        Format::Vhd if vhd::Layout::read(&**file)?.header.is_none() => Holes::Zeros,
        Format::Vdi if vdi::Layout::read(&**file)?.header.image_type == vdi::ImageType::Static => {
            Holes::ZeroData
        }
        // Grains of sparse extents are written whole.
        Format::Vmdk => Holes::ZeroData,
        Format::Qcow2 if is_preallocated(file)? => Holes::ZeroData,
        _ => Holes::Unseen,
    })
}

/// Whether QEMU takes a qcow2 image for one whose clusters were laid out before they were written
/// (`qcow2_detect_metadata_preallocation`): more of them have refcounts than the host has space for.
fn is_preallocated(file: &io::File) -> block::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let header = qcow2::Header::read(file)?;
    let Ok(metadata) = std::fs::metadata(file.path()) else {
        return Ok(false);
    };
    let (bits, file_bytes) = (header.cluster_bits, file.len()?);
    let real = metadata.blocks().saturating_mul(512) >> bits;
    let enough = (real.saturating_mul(10) / 9).max(real + 2);
    let clusters = file_bytes.div_ceil(1 << bits);
    let entries = u64::from(header.refcount_table_clusters) << (bits - 3);
    let per_block = 1 << (bits + 3 - header.refcount_order);
    let (mut block, mut counted) = (vec![0; 1 << bits], 0);
    for nth in 0..clusters.div_ceil(per_block).min(entries) {
        let mut entry = [0; 8];
        file.read_at(header.refcount_table_offset + nth * 8, &mut entry)?;
        let offset = u64::from_be_bytes(entry) & !511;
        if offset == 0 || offset >= file_bytes {
            continue;
        }
        let there = (file_bytes - offset).min(1 << bits) as usize;
        block.fill(0);
        if let Some(part) = block.get_mut(..there) {
            file.read_at(offset, part)?;
        }
        let first = nth * per_block;
        each_refcount(
            header.refcount_order,
            &block,
            (clusters - first).min(per_block),
            |_, _| {
                counted += 1;
            },
        );
        if counted >= enough {
            return Ok(true);
        }
    }
    Ok(false)
}

fn json(
    chain: &Chain,
    range: Range<u64>,
    holes: impl Fn(&Layer, FileId) -> Holes,
    out: &mut impl Write,
) -> Result<()> {
    let mut lead = "[";
    let mut put = |entry| -> Result<()> {
        let Entry {
            start,
            length,
            depth,
            present,
            zero,
            data,
            compressed,
            offset,
            file: _,
        } = entry;
        // Of a VHD image without a parent QEMU takes blocks that are not there for zeros.
        let layer = chain.layers.get(depth).filter(|_| length > 0);
        let present =
            present || layer.is_some_and(|l| l.format == Format::Vhd && l.image.parent().is_none());
        write!(
            out,
            "{lead}{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \
             \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}"
        )?;
        if let Some(offset) = offset {
            write!(out, ", \"offset\": {offset}")?;
        }
        write!(out, "}}")?;
        lead = ",\n";
        Ok(())
    };
    let mut empty = true;
    let start = range.start;
    let walked = walk(chain, range, holes, |entry| {
        empty = false;
        put(entry)
    });
    if let Err(error) = walked {
        // qemu-img leaves half a document; what is printed here is JSON.
        let _ = writeln!(out, "{}", if empty { "[]" } else { "]" });
        return Err(error);
    }
    if empty {
        // Of nothing qemu-img has an entry too.
        put(Entry {
            start,
            length: 0,
            depth: 0,
            present: false,
            zero: false,
            data: false,
            compressed: false,
            offset: None,
            file: FileId::IMAGE,
        })?;
    }
    Ok(writeln!(out, "]")?)
}

/// The names of each image's files with data, by their numbers, as they lead to each other.
fn names(file: &Path, chain: &Chain) -> Result<Vec<Vec<String>>> {
    let mut name = block::name::text(file);
    // Which of its contexts was asked for is no part of an export's name.
    if let Ok(export) = nbd::Uri::parse(&name) {
        let context = None;
        name = nbd::Uri { context, ..export }.to_string();
    }
    let mut names = Vec::new();
    for layer in &chain.layers {
        let description = layer.image.describe();
        let data = description.data_file.and_then(|data| data.name);
        let mut own = vec![name.clone()];
        own.extend(data.map(|data| full(&name, &data)));
        if let (Format::Vmdk, Some(file)) = (layer.format, layer.files.first()) {
            let parts = vmdk::Parts::read(&**file)?;
            let lines = parts.descriptor.extents.iter();
            let others = lines.filter(|line| !line.file.is_empty());
            own.extend(others.map(|line| full(&name, &line.file)));
        }
        names.push(own);
        name = description
            .backing
            .map_or(name.clone(), |below| full(&name, &below));
    }
    Ok(names)
}

fn human(
    chain: &Chain,
    names: &[Vec<String>],
    range: Range<u64>,
    holes: impl Fn(&Layer, FileId) -> Holes,
    out: &mut impl Write,
) -> Result<()> {
    writeln!(
        out,
        "{:<16}{:<16}{:<16}File",
        "Offset", "Length", "Mapped to"
    )?;
    walk(chain, range, holes, |entry| {
        if !entry.data || entry.zero {
            return Ok(());
        }
        let Some(offset) = entry.offset else {
            bail!("File contains external, encrypted or compressed clusters.");
        };
        let files = names.get(entry.depth);
        let file = files.and_then(|files| files.get(usize::from(entry.file.0)));
        let file = file.map_or("", String::as_str);
        let hex = |number: u64| match number {
            0 => "0".to_owned(),
            number => format!("{number:#x}"),
        };
        let line = format!(
            "{:<16}{:<16}{:<16}{file}\n",
            hex(entry.start),
            hex(entry.length),
            hex(offset)
        );
        Ok(out.write_all(&block::name::bytes(&line))?)
    })
}
