//! `qemu-img map`.

use super::info::full;
use super::line;
use super::open::{self, How};
use super::spec::{Image, Output};
use crate::map::{Entry, finish, walk};
use anyhow::{Result, anyhow, bail};
use clap::Args;
use disk::chain::Chain;
use image::{FileId, Format, vmdk};
use std::io::{self, BufWriter, Write};
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
    // A map may have millions of lines: none of them is kept.
    let mut out = BufWriter::new(io::stdout().lock());
    let written = match as_json {
        true => json(&chain, range, &mut out),
        false => human(
            &chain,
            &names(&open::active(&chain)?.path, &chain)?,
            range,
            &mut out,
        ),
    };
    finish(written, out).map_err(|error| match error.downcast_ref::<block::Error>() {
        Some(own) => anyhow!("Could not read file metadata: {}", open::os_reason(own)),
        None => error,
    })?;
    Ok(0)
}

fn json(chain: &Chain, range: Range<u64>, out: &mut impl Write) -> Result<()> {
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
    let walked = walk(chain, range, |entry| {
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
    out: &mut impl Write,
) -> Result<()> {
    writeln!(
        out,
        "{:<16}{:<16}{:<16}File",
        "Offset", "Length", "Mapped to"
    )?;
    walk(chain, range, |entry| {
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
