//! `qemu-img info`.

use super::open::{self, How, Name};
use super::spec::{Image, Output};
use super::value;
use crate::encrypt::Shown;
use crate::image_opts::{self, ImageOptions};
use crate::{bitmap, print};
use anyhow::{Result, bail};
use block::{Storage, plain};
use clap::Args;
use disk::chain::Layer;
use image::qcow2::{self, features, snapshot::Snapshot};
use image::{Format, Method, qed, vmdk};
use io::{File, FileKind};
use serde_json::{Map, Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// `info`.
#[derive(Args, Debug)]
pub struct Info {
    /// display information about the backing chain
    #[arg(short, long)]
    backing_chain: bool,
    /// open image in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    pub(super) image: Image,
}

/// Images of a chain that are shown at most.
const CHAIN_MAX: usize = block::limits::CHAIN_LENGTH_MAX;

/// Shows what an image is.
pub fn run(args: &Info) -> Result<u8> {
    let as_json = args.output.is_json()?;
    let file = args.image.file()?;
    let how = How {
        force_share: args.force_share,
        without_backing: true,
        refuse_backing: true,
        allow_locked: true,
        ..How::default()
    };
    let (mut name, mut format, mut by_options) = (
        file.to_owned(),
        args.image.spec.format.clone(),
        args.image.spec.image_opts,
    );
    let mut nodes: Vec<Map<String, Value>> = Vec::new();
    let mut seen = Vec::new();
    loop {
        if seen.contains(&name) {
            bail!("Backing file '{name}' creates an infinite loop.");
        }
        if seen.len() >= CHAIN_MAX {
            bail!("The chain of backing files is longer than {CHAIN_MAX} images");
        }
        let image = Name {
            text: &name,
            format: format.as_deref(),
            image_opts: by_options,
        };
        let chain = open::chain(&image, &how, &args.image.spec.objects)?;
        let active = open::active(&chain)?;
        if active.format == Format::Null {
            let said = by_options || image_opts::is_json(&name);
            let said = said.then(|| ImageOptions::parse(&name)).transpose()?;
            nodes.push(nothing(&name, said.as_ref(), format.as_deref(), active));
            break;
        }
        // Options are shown as what they name.
        let path = block::name::text(&active.path);
        let path = match disk::chain::is_file_name(&path) {
            true => path,
            // An export is shown as a URI, in whatever form it was named.
            false if let Some(file) = server_of(active) => block::name::text(file.path()),
            // It is one of a file all the same.
            false => format!("./{path}"),
        };
        if let (true, Some(file)) = (is_file(by_options, &name)?, active.files.first()) {
            let node = protocol(&active.path, file)?;
            nodes.push(node.as_object().cloned().unwrap_or_default());
            break;
        }
        let mut shown = node(&path, active)?;
        if by_options || image_opts::is_json(&name) {
            let said = ImageOptions::parse(&name)?;
            if !said.strong.is_empty() || said.window.is_some() {
                shown.insert("filename".into(), options_of(&said, active).into());
            }
        }
        let below = |key: &str| shown.get(key).and_then(Value::as_str).map(str::to_owned);
        let next = below("full-backing-filename");
        format = below("backing-filename-format");
        nodes.push(shown);
        match next.filter(|_| args.backing_chain) {
            Some(next) => seen.push(std::mem::replace(&mut name, next)),
            None => break,
        }
        by_options = false;
    }
    print(&match (as_json, args.backing_chain) {
        (true, true) => {
            let nodes = nodes.into_iter().map(Value::Object);
            value::json(&Value::Array(nodes.collect()))
        }
        (true, false) => nodes
            .into_iter()
            .next()
            .map_or(String::new(), |node| value::json(&Value::Object(node))),
        (false, _) => {
            let texts = nodes.iter().map(|node| human(node, 0, "/", false));
            texts.collect::<Vec<_>>().join("\n")
        }
    })?;
    Ok(0)
}

/// Whether options name a file, or an export, and no image in it: QEMU shows what they are of.
fn is_file(by_options: bool, name: &str) -> Result<bool> {
    if !by_options && !image_opts::is_json(name) {
        return Ok(false);
    }
    Ok(ImageOptions::parse(name)?.is_protocol)
}

/// The name of an image that is more than its file, as QEMU has it: `json:{…}`.
fn options_of(said: &ImageOptions, layer: &Layer) -> String {
    let mut object = Map::new();
    object.insert("driver".into(), layer.format.qemu_name().into());
    let first = layer.files.first();
    let file = match first.and_then(|file| file.part()) {
        Some(part) => part_of(&layer.path, part),
        None => {
            let protocol = first.map_or("file", |file| driver_of(file));
            json!({"driver": protocol, "filename": block::name::text(&layer.path)})
        }
    };
    object.insert("file".into(), file);
    for (key, value) in &said.strong {
        object.insert(key.clone(), value.as_str().into());
    }
    format!("json:{}", value::compact(&object))
}

/// What QEMU tells of a disk of nothing.
fn nothing(
    name: &str,
    said: Option<&ImageOptions>,
    format: Option<&str>,
    layer: &Layer,
) -> Map<String, Value> {
    let driver = match name.contains("null-aio") {
        true => "null-aio",
        false => "null-co",
    };
    let mut name = format!("{driver}://");
    if let Some(said) = said.filter(|said| !said.strong.is_empty()) {
        let mut object = Map::new();
        object.insert("driver".into(), driver.into());
        for (key, value) in &said.strong {
            object.insert(key.clone(), value.as_str().into());
        }
        name = format!("json:{}", value::compact(&object));
    }
    let own = json!({
        "filename": name,
        "format": driver,
        "virtual-size": layer.image.size(),
        "actual-size": 0,
        "children": [],
    });
    let mut shown = own.as_object().cloned().unwrap_or_default();
    // By its name it is the file of a raw disk.
    if said.is_none() && format.is_none_or(|format| format == "raw") {
        shown.insert("format".into(), "raw".into());
        shown.insert("children".into(), json!([{"name": "file", "info": own}]));
    }
    shown
}

/// The options that say which part of the file `path` is meant.
fn part_of(path: &Path, (offset, size): (u64, u64)) -> Value {
    let file = json!({"driver": "file", "filename": block::name::text(path)});
    json!({"driver": "raw", "offset": offset, "size": size, "file": file})
}

/// What QEMU calls what an image's file is.
fn driver_of(file: &File) -> &'static str {
    match file.kind() {
        FileKind::BlockDevice => "host_device",
        FileKind::Remote if file.part().is_none() => "nbd",
        _ => "file",
    }
}

/// What QEMU tells of an image, as its `BlockGraphInfo`.
fn node(name: &str, layer: &Layer) -> Result<Map<String, Value>> {
    let description = layer.image.describe();
    let mut node = Map::new();
    let mut put = |key: &str, value: Value| {
        node.insert(key.to_owned(), value);
    };
    put("filename", name.into());
    put("format", layer.format.qemu_name().into());
    put("virtual-size", description.size.into());
    if description.cluster_size > 1 && tells_of_itself(layer.format) {
        put("cluster-size", description.cluster_size.into());
    }
    if layer.image.encryption().is_some() {
        put("encrypted", true.into());
    }
    if let Some(backing) = &description.backing {
        put("backing-filename", backing.as_str().into());
        put("full-backing-filename", full(name, backing).into());
    }
    if let Some(format) = &description.backing_format {
        put("backing-filename-format", format.as_str().into());
    }
    let mut children = Vec::new();
    if let Some(file) = layer.files.first() {
        let parts = match layer.format {
            Format::Vmdk => Some(vmdk::Parts::read(&**file)?),
            _ => None,
        };
        let extents = parts
            .as_ref()
            .map_or(Vec::new(), |parts| extents(layer, parts));
        let mut bytes = match server_of(layer) {
            // What it takes there, only the server knows.
            Some(_) => None,
            None => Some(actual_size(&layer.path)?),
        };
        for (nth, (_, path, extent)) in extents.iter().enumerate() {
            let more = actual_size(path)?;
            bytes = bytes.map(|bytes| bytes.saturating_add(more));
            let info = protocol(path, extent)?;
            children.insert(0, json!({"name": format!("extents.{nth}"), "info": info}));
        }
        if let Some(bytes) = bytes {
            put("actual-size", bytes.into());
        }
        children.push(json!({"name": "file", "info": protocol(&layer.path, file)?}));
        // Of a raw disk there QEMU knows as little as of the export.
        let only_bytes = layer.format == Format::Raw && server_of(layer).is_some();
        if !only_bytes && tells_of_itself(layer.format) {
            put("dirty-flag", is_dirty(layer.format, &**file)?.into());
        }
        if let Some(specific) = specific(layer, &**file)? {
            let kind = layer.format.qemu_name();
            put("format-specific", json!({"type": kind, "data": specific}));
        }
        if layer.format == Format::Qcow2 {
            let snapshots = qcow2::snapshot::list(&**file)?;
            if !snapshots.is_empty() {
                put("snapshots", snapshots.iter().map(snapshot).collect());
            }
        }
    }
    put("children", children.into());
    Ok(node)
}

/// Where the backing file `name` of the image `above` is.
pub fn full(above: &str, name: &str) -> String {
    let above = above.strip_prefix("file:").unwrap_or(above);
    match disk::chain::is_file_name(name) {
        true => super::create::below(&super::create::path(above), name),
        false => name.to_owned(),
    }
}

/// The first file of an image that lies at a server.
fn server_of(layer: &Layer) -> Option<&File> {
    let first = layer.files.first();
    first
        .map(|file| &**file)
        .filter(|file| file.kind() == FileKind::Remote && file.part().is_none())
}

fn actual_size(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks().saturating_mul(512))
}

/// The file below an image.
fn protocol(path: &Path, file: &File) -> Result<Value> {
    let kind = driver_of(file);
    if let Some(part) = file.part() {
        let all = File::open(path, &super::open::looking())?;
        let options = part_of(path, part);
        let options = options.as_object().map(value::compact);
        return Ok(json!({
            "filename": format!("json:{}", options.unwrap_or_default()),
            "format": "raw",
            "virtual-size": block::align_up(file.len()?, 512),
            "actual-size": actual_size(path)?,
            "dirty-flag": false,
            "children": [{"name": "file", "info": protocol(path, &all)?}],
        }));
    }
    if file.kind() == FileKind::Remote {
        return Ok(json!({
            "filename": block::name::text(file.path()),
            "format": kind,
            "virtual-size": block::align_up(file.len()?, 512),
            "children": [],
        }));
    }
    Ok(json!({
        "filename": block::name::text(path),
        "format": kind,
        "virtual-size": block::align_up(file.len()?, 512),
        "actual-size": actual_size(path)?,
        "dirty-flag": false,
        "format-specific": {"type": kind, "data": {}},
        "children": [],
    }))
}

/// Whether QEMU's driver says anything of an image but its size (`bdrv_get_info`).
fn tells_of_itself(format: Format) -> bool {
    !matches!(
        format,
        Format::Bochs | Format::Cloop | Format::Dmg | Format::Parallels
    )
}

/// Whether the image was not closed, as it says itself.
fn is_dirty(format: Format, file: &dyn Storage) -> Result<bool> {
    Ok(match format {
        Format::Qcow2 => qcow2::Header::read(file)?.incompatible & features::DIRTY != 0,
        Format::Qed => qed::Header::read(file)?.features & qed::F_NEED_CHECK != 0,
        _ => false,
    })
}

/// What only images of this format have.
fn specific(layer: &Layer, file: &dyn Storage) -> Result<Option<Map<String, Value>>> {
    if let (Format::Luks, Some(encryption)) = (layer.format, layer.image.encryption()) {
        let mut shown = serde_json::to_value(Shown::of(encryption))?;
        let facts = shown.as_object_mut().map(std::mem::take);
        return Ok(facts.map(|facts| {
            facts
                .into_iter()
                .filter(|(key, _)| key != "format")
                .collect()
        }));
    }
    if layer.format == Format::Vmdk {
        return vmdk_facts(layer, file).map(Some);
    }
    if layer.format != Format::Qcow2 {
        return Ok(None);
    }
    let header = qcow2::Header::read(file)?;
    let mut facts = Map::new();
    let mut put = |key: &str, value: Value| {
        facts.insert(key.to_owned(), value);
    };
    let zstd = header.compression()? == qcow2::Compression::Zstd;
    put(
        "compression-type",
        if zstd { "zstd" } else { "zlib" }.into(),
    );
    put("refcount-bits", header.refcount_bits().into());
    if header.version < 3 {
        put("compat", "0.10".into());
    } else {
        put("compat", "1.1".into());
        let lazy = header.compatible & features::LAZY_REFCOUNTS != 0;
        put("lazy-refcounts", lazy.into());
        let corrupt = header.incompatible & features::CORRUPT != 0;
        put("corrupt", corrupt.into());
        put("extended-l2", header.extended_l2().into());
        let bitmaps = bitmap::entries(file);
        if !bitmaps.is_empty() {
            let bitmaps = bitmaps.iter().map(bitmap::Json::of);
            put(
                "bitmaps",
                serde_json::to_value(bitmaps.collect::<Vec<_>>())?,
            );
        }
        if let Some(data) = header.data_file()? {
            if let Some(name) = data.name {
                put("data-file", name.into());
            }
            put("data-file-raw", data.raw.into());
        }
    }
    if let Some(encryption) = layer.image.encryption() {
        let mut shown = serde_json::to_value(Shown::of(encryption))?;
        if let (Method::Luks(_), Some(object)) = (&encryption.method, shown.as_object_mut()) {
            object.insert("format".into(), "luks".into());
        }
        put("encrypt", shown);
    }
    Ok(Some(facts))
}

/// The extents of a VMDK image that have files of their own, with these and what they are called from here.
fn extents<'a>(
    layer: &'a Layer,
    parts: &'a vmdk::Parts,
) -> Vec<(&'a vmdk::ExtentLine, PathBuf, &'a Arc<File>)> {
    let directory = layer.path.parent().unwrap_or(Path::new(""));
    let lines = parts
        .descriptor
        .extents
        .iter()
        .filter(|line| !line.file.is_empty());
    let files = layer.files.iter().skip(1);
    lines
        .zip(files)
        .map(|(line, file)| (line, directory.join(block::name::path(&line.file)), file))
        .collect()
}

/// What only VMDK images have: QEMU's `ImageInfoSpecificVmdk`.
fn vmdk_facts(layer: &Layer, file: &dyn Storage) -> Result<Map<String, Value>> {
    let parts = vmdk::Parts::read(file)?;
    let description = layer.image.describe();
    let create_type = parts.descriptor.create_type.as_str();
    let extents: Vec<Value> = match layer.files.len() {
        1 => {
            let mut extent = json!({
                "virtual-size": description.size,
                "filename": block::name::text(&layer.path),
                "cluster-size": description.cluster_size,
                "format": "",
            });
            if let (true, Some(extent)) = (create_type == "streamOptimized", extent.as_object_mut())
            {
                extent.insert("compressed".into(), true.into());
            }
            vec![extent]
        }
        _ => {
            let extent = |(line, path, _): &(&vmdk::ExtentLine, PathBuf, &Arc<File>)| {
                let mut extent = json!({
                    "virtual-size": line.sectors.saturating_mul(512),
                    "filename": block::name::text(path),
                    "format": line.kind.name(),
                });
                let packed = description.cluster_size > 1 && line.kind == vmdk::ExtentType::Sparse;
                if let (true, Some(extent)) = (packed, extent.as_object_mut()) {
                    extent.insert("cluster-size".into(), description.cluster_size.into());
                }
                extent
            };
            extents(layer, &parts).iter().map(extent).collect()
        }
    };
    let mut facts = Map::new();
    facts.insert("cid".into(), parts.descriptor.cid.into());
    facts.insert("parent-cid".into(), parts.descriptor.parent_cid.into());
    facts.insert("create-type".into(), create_type.into());
    facts.insert("extents".into(), extents.into());
    Ok(facts)
}

/// A snapshot, as QEMU's `SnapshotInfo`.
fn snapshot(snapshot: &Snapshot) -> Value {
    let nsec = 1_000_000_000;
    let mut object = json!({
        "id": snapshot.shown_id(),
        "name": snapshot.shown_name(),
        "vm-state-size": snapshot.vm_state_size(),
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec / nsec,
        "vm-clock-nsec": snapshot.vm_clock_nsec % nsec,
    });
    if let (Some(icount), Some(object)) = (snapshot.icount(), object.as_object_mut()) {
        object.insert("icount".into(), icount.into());
    }
    object
}

/// The table of snapshots, with its heading; `indent` before each line.
pub fn snapshots(snapshots: &[Value], indent: &str) -> String {
    let mut text = format!(
        "{indent}Snapshot list:\n{indent}{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}\n",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    );
    for snapshot in snapshots {
        let number = |key: &str| snapshot.get(key).and_then(Value::as_u64);
        let string = |key: &str| plain(snapshot.get(key).and_then(Value::as_str).unwrap_or(""));
        let date = u32::try_from(number("date-sec").unwrap_or(0)).unwrap_or(0);
        text.push_str(&format!(
            "{indent}{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}\n",
            string("id"),
            string("name"),
            value::size(number("vm-state-size").unwrap_or(0)),
            crate::snapshot::date(date),
            crate::snapshot::clock(
                number("vm-clock-sec").unwrap_or(0),
                number("vm-clock-nsec").unwrap_or(0)
            ),
            number("icount").map_or("--".to_owned(), |icount| icount.to_string()),
        ));
    }
    text
}

/// The snapshots of an image as [`snapshots`] takes them.
pub fn snapshot_values(list: &[Snapshot]) -> Vec<Value> {
    list.iter().map(snapshot).collect()
}

/// An image for people; `path` names it among the nodes.
fn human(node: &Map<String, Value>, depth: usize, path: &str, protocol: bool) -> String {
    let indent = "    ".repeat(depth);
    let string = |key: &str| node.get(key).and_then(Value::as_str).map(plain);
    let number = |key: &str| node.get(key).and_then(Value::as_u64);
    let is = |key: &str| node.get(key).and_then(Value::as_bool).unwrap_or(false);
    let label = |plain, of_protocol| if protocol { of_protocol } else { plain };
    let size = number("virtual-size").unwrap_or(0);
    let mut rows = vec![
        format!(
            "{}: {}",
            label("image", "filename"),
            string("filename").unwrap_or_default()
        ),
        format!(
            "{}: {}",
            label("file format", "protocol type"),
            string("format").unwrap_or_default()
        ),
        format!(
            "{}: {} ({size} bytes)",
            label("virtual size", "file length"),
            value::size(size)
        ),
        format!(
            "disk size: {}",
            number("actual-size").map_or("unavailable".to_owned(), value::size)
        ),
    ];
    if is("encrypted") {
        rows.push("encrypted: yes".into());
    }
    if let Some(bytes) = number("cluster-size") {
        rows.push(format!("cluster_size: {bytes}"));
    }
    if is("dirty-flag") {
        rows.push("cleanly shut down: no".into());
    }
    if let Some(backing) = string("backing-filename") {
        let full = string("full-backing-filename").filter(|full| *full != backing);
        let full = full.map_or(String::new(), |full| format!(" (actual path: {full})"));
        rows.push(format!("backing file: {backing}{full}"));
        if let Some(format) = string("backing-filename-format") {
            rows.push(format!("backing file format: {format}"));
        }
    }
    let mut text: String = rows.iter().map(|row| format!("{indent}{row}\n")).collect();
    if let Some(list) = node.get("snapshots").and_then(Value::as_array) {
        text.push_str(&snapshots(list, &indent));
    }
    let data = node.get("format-specific").and_then(|s| s.get("data"));
    if let Some(data) = data
        .and_then(Value::as_object)
        .filter(|data| !data.is_empty())
    {
        text.push_str(&format!("{indent}Format specific information:\n"));
        text.push_str(&value::human(data, depth + 1));
    }
    let children = node.get("children").and_then(Value::as_array);
    for child in children.into_iter().flatten() {
        let name = child
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or_default();
        text.push_str(&format!("{indent}Child node '{path}{name}':\n"));
        if let Some(info) = child.get("info").and_then(Value::as_object) {
            let is_protocol = info
                .get("children")
                .and_then(Value::as_array)
                .is_none_or(Vec::is_empty);
            text.push_str(&human(
                info,
                depth + 1,
                &format!("{path}{name}/"),
                is_protocol,
            ));
        }
    }
    text
}
