//! `qemu-img map`.

use super::info::full;
use super::line;
use super::open::{self, How, Name};
use crate::map::{Entry, finish, walk};
use crate::secret::Objects;
use anyhow::{Result, bail};
use clap::Args;
use disk::chain::Chain;
use std::io::{self, BufWriter, Write};
use std::ops::Range;

/// `map`.
#[derive(Args, Debug)]
pub struct Map {
    /// specify FILENAME format explicitly
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// indicates that FILENAME is a complete image specification instead of a file name
    #[arg(long)]
    image_opts: bool,
    /// begin there
    #[arg(short, long, value_name = "OFFSET")]
    start_offset: Option<String>,
    /// show so much at most
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<String>,
    /// specify output format name (default human)
    #[arg(long, value_name = "human|json")]
    output: Option<String>,
    /// open image in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    objects: Objects,
    /// image file name (or specification with --image-opts)
    #[arg(value_name = "FILENAME")]
    files: Vec<String>,
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
    let as_json = line::is_json(args.output.as_deref())?;
    let file = line::one(&args.files, "Expecting one image file name")?;
    let name = Name {
        text: file,
        format: args.format.as_deref(),
        image_opts: args.image_opts,
    };
    let how = How {
        force_share: args.force_share,
        allow_locked: true,
        ..How::default()
    };
    let chain = open::chain(&name, &how, &args.objects)?;
    let range = start..start.saturating_add(length);
    // A map may have millions of lines: none of them is kept.
    let mut out = BufWriter::new(io::stdout().lock());
    let written = match as_json {
        true => json(&chain, range, &mut out),
        false => human(&chain, &names(file, &chain), range, &mut out),
    };
    finish(written, out)?;
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
        } = entry;
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
    walk(chain, range, |entry| {
        empty = false;
        put(entry)
    })?;
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
        })?;
    }
    Ok(writeln!(out, "]")?)
}

/// The names of a chain's files with data, as they lead to each other.
fn names(file: &str, chain: &Chain) -> Vec<String> {
    let mut name = file.to_owned();
    let mut names = Vec::new();
    for layer in &chain.layers {
        let description = layer.image.describe();
        let data = description.data_file.and_then(|data| data.name);
        names.push(data.map_or_else(|| name.clone(), |data| full(&name, &data)));
        name = description
            .backing
            .map_or(name.clone(), |below| full(&name, &below));
    }
    names
}

fn human(chain: &Chain, names: &[String], range: Range<u64>, out: &mut impl Write) -> Result<()> {
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
        let file = names.get(entry.depth).map_or("", String::as_str);
        let hex = |number: u64| match number {
            0 => "0".to_owned(),
            number => format!("{number:#x}"),
        };
        writeln!(
            out,
            "{:<16}{:<16}{:<16}{file}",
            hex(entry.start),
            hex(entry.length),
            hex(offset)
        )?;
        Ok(())
    })
}
