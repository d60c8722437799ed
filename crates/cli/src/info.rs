//! `diskplane info`.
//!
//! With `--json` an object, or with `--backing-chain` an array of them, the active image first. Fields, which
//! stay as they are (names as in `qemu-img info` where it has them):
//!
//! | field | |
//! |---|---|
//! | `filename` | as given; of a backing image resolved |
//! | `format` | `raw`, `qcow2` or `null` |
//! | `virtual-size` | bytes of the disk |
//! | `file-size`, `actual-size` | bytes of the file, and bytes that it takes on the host; absent for `null`, the second for what a server has |
//! | `cluster-size` | bytes; absent for formats without clusters |
//! | `backing-filename`, `backing-filename-format` | as stored in the image; absent where it has none |
//! | `data-filename` | name of the external data file as stored in the image; absent where it has none |
//! | `encrypted` | whether the guest's data are |
//! | `encrypt` | object as in `format-specific` of `qemu-img info`: cipher, hash, key slots; absent where they are not |
//! | `read-only-because` | why the image cannot be written; absent where it can |
//! | `format-specific` | object of strings: further facts of the format, the metadata cache's coverage among them |
//! | `snapshots` | array of internal snapshots, as `snapshot --json` prints them; absent where there are none |
//! | `bitmaps` | array of objects with `name`, `granularity` (bytes) and `flags` (`in-use`, `auto`); absent where there are none |
//! | `engine` | object with `name` and `reason`: what `--aio auto` picks for the file; the active image only |

use crate::{args, bitmap, encrypt::Shown, open, print, snapshot, table};
use anyhow::Result;
use block::{plain, size};
use disk::chain::{Chain, ChainOptions, Layer};
use image::{Description, Format};
use io::{Aio, FileKind};
use serde::Serialize;
use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt};

/// One image, as `--json` prints it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Entry {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    file_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    read_only_because: Option<String>,
    encrypted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    encrypt: Option<Shown>,
    format_specific: BTreeMap<&'static str, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<snapshot::Entry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<bitmap::Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    engine: Option<Engine>,
    /// The facts in the format's order, for the table.
    #[serde(skip)]
    facts: Vec<(&'static str, String)>,
    /// Each bitmap's name and state, likewise.
    #[serde(skip)]
    bitmap_rows: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Engine {
    name: String,
    reason: String,
}

/// Shows what an image is.
pub fn run(args: &args::Info) -> Result<()> {
    let reading = &args.reading;
    let chain = open::named(
        &reading.file,
        reading.image_opts,
        &reading.keys.objects,
        ChainOptions {
            format: reading.format,
            read_only: true,
            force_share: reading.force_share,
            allow_backing: reading.allow_backing.clone(),
            data_file: reading.data_file.clone(),
            snapshot: reading.snapshot.clone(),
            without_backing: !args.backing_chain,
            passphrases: reading.keys.read()?,
            allow_locked: true,
            ..ChainOptions::default()
        },
    )?;
    let mut entries = Vec::new();
    for layer in &chain.layers {
        entries.push(entry(layer)?);
    }
    if let Some(active) = entries.first_mut() {
        active.engine = Some(engine(&chain)?);
    }
    let text = match (reading.json, args.backing_chain) {
        (true, true) => crate::json(&entries)?,
        (true, false) => crate::json(&entries.first())?,
        (false, _) => {
            let tables: Vec<String> = entries.iter().map(table).collect();
            tables.join("\n")
        }
    };
    print(&text)
}

fn entry(layer: &Layer) -> Result<Entry> {
    let Description {
        format,
        size,
        cluster_size,
        backing,
        backing_format,
        data_file,
        read_only_because,
        facts,
    } = layer.image.describe();
    let file = layer.files.first();
    let mut host = file.map(|_| 0);
    for file in &layer.files {
        if file.kind() == FileKind::Remote {
            // What it takes there, only the server knows.
            host = None;
            break;
        }
        let bytes = fs::metadata(file.path())?.blocks().saturating_mul(512);
        host = host.map(|sum| sum + bytes);
    }
    let snapshots = match file {
        Some(file) if format == Format::Qcow2.name() => image::qcow2::snapshot::list(&**file)?,
        _ => Vec::new(),
    };
    let bitmaps = match file {
        Some(file) if format == Format::Qcow2.name() => bitmap::entries(&**file),
        _ => Vec::new(),
    };
    Ok(Entry {
        filename: layer.path.display().to_string(),
        format,
        virtual_size: size,
        file_size: file.map(|f| f.len()).transpose()?,
        actual_size: host,
        cluster_size: Some(cluster_size).filter(|bytes| *bytes > 1),
        backing_filename: backing,
        backing_filename_format: backing_format,
        data_filename: data_file.and_then(|data| data.name),
        read_only_because,
        encrypted: layer.image.encryption().is_some(),
        encrypt: layer.image.encryption().map(Shown::of),
        format_specific: facts.iter().cloned().collect(),
        snapshots: snapshots.iter().map(snapshot::Entry::from).collect(),
        bitmaps: bitmaps.iter().map(bitmap::Json::of).collect(),
        engine: None,
        bitmap_rows: bitmaps
            .iter()
            .map(|entry| format!("{}: {}", entry.name(), bitmap::describe(entry)))
            .collect(),
        facts,
    })
}

fn engine(chain: &Chain) -> Result<Engine> {
    let files: Vec<_> = chain.layers.iter().flat_map(|l| l.files.clone()).collect();
    let choice = io::choose(Aio::Auto, &files)?;
    Ok(Engine {
        name: choice.kind.to_string(),
        reason: choice.reason,
    })
}

fn table(entry: &Entry) -> String {
    let sized = |bytes: u64| match bytes {
        0..1024 => format!("{bytes} bytes"),
        _ => format!("{} ({bytes} bytes)", size::human(bytes)),
    };
    let mut rows: Vec<(&str, String)> = vec![
        ("image", entry.filename.clone()),
        ("format", entry.format.to_owned()),
        ("virtual size", sized(entry.virtual_size)),
    ];
    let mut push = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    push("file size", entry.file_size.map(sized));
    push("on the host", entry.actual_size.map(size::human));
    push("cluster size", entry.cluster_size.map(size::human));
    push(
        "backing file",
        entry.backing_filename.as_ref().map(|name| {
            let format = entry.backing_filename_format.as_deref();
            format!("{} ({})", name, format.unwrap_or("no format recorded"))
        }),
    );
    for (name, value) in entry.encrypt.iter().flat_map(Shown::rows) {
        push(name, Some(value));
    }
    push("read-only", entry.read_only_because.clone());
    for (name, value) in &entry.facts {
        push(name, Some(value.clone()));
    }
    for bitmap in &entry.bitmap_rows {
        push("bitmap", Some(bitmap.clone()));
    }
    push(
        "engine",
        entry
            .engine
            .as_ref()
            .map(|e| format!("{}: {}", e.name, e.reason)),
    );
    let mut table = table::bare();
    for (name, value) in rows {
        table.add_row([name, &plain(&value)]);
    }
    let snapshots = match entry.snapshots.is_empty() {
        true => String::new(),
        false => format!("snapshots\n{}", snapshot::table(&entry.snapshots)),
    };
    table::text(&table) + &snapshots
}
