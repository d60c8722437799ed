//! `diskplane create`.

use crate::{args, open, options, options::Options, partial::Partial, signals};
use anyhow::{Context, Result, bail};
use block::{ErrorKind, Storage, limits, size};
use disk::chain::{self, Chain, ChainOptions};
use image::{Format, luks, qcow, qcow2, qed, vdi, vhd, vhdx, vmdk};
use io::{Cache, File, FileKind, OpenOptions};
use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};
use tool::prealloc::{Preallocation, fill_host};
use tool::rebase::Link;
use tool::work::Stop;

/// A disk that is smaller than any file system: somebody forgot a suffix.
const SMALL_BYTES: u64 = 4096;

/// Links behind one name, at most, as the kernel has it.
const LINKS_MAX: usize = 40;

/// Creates an image.
pub fn run(args: &args::Create) -> Result<()> {
    let wants_help = options::wants_help(&args.options);
    let file = match (&args.file, args.format) {
        (_, Some(format)) if wants_help => return crate::print(&options::help(format)),
        (Some(file), _) => file,
        (None, _) if wants_help => bail!("-o help: say of which format: -f {NEW_NAMES}"),
        (None, _) => bail!("say which file is to be made: diskplane create … FILE SIZE"),
    };
    let format = format_of(args.format, file, "-f")?;
    if wants_help {
        return crate::print(&options::help(format));
    }
    let mut options = options::parse(format, &args.options)?;
    let backing = backing_of(args, &options)?;
    let base_bytes = match &backing {
        Some((name, backing_format)) => {
            refuse_backing("-b", format)?;
            Some(base_size(file, name, *backing_format)?)
        }
        None => None,
    };
    let Some(bytes) = args.size.or(base_bytes) else {
        bail!("say how large the disk is to be: 20G, 512M, …");
    };
    if bytes > limits::DISK_BYTES_MAX {
        bail!(
            "a disk of {} is too large: the most is {} bytes",
            size::human(bytes),
            limits::DISK_BYTES_MAX
        );
    }
    options.qcow2.size = bytes;
    if let Some((name, below)) = &backing {
        options.set_backing(format, file, name, *below)?;
    }
    if format == Format::Vmdk {
        options.vmdk.name = file_name(file)?;
    }
    let mut chosen = false;
    if format == Format::Qcow2 {
        chosen = options.choose();
    }
    // Before the file is touched.
    let disk_bytes = options.settle(format, bytes)?;
    if bytes < SMALL_BYTES && !args.quiet {
        eprintln!(
            "diskplane: warning: a disk of {bytes} bytes, which has {disk_bytes}: sizes are in bytes where they have no \
             suffix (10G is 10 GiB)"
        );
    }
    options.seal(format, &args.keys)?;
    make(file, format, &options)?;
    let mut line = format!(
        "created {}: {format}, {}",
        file.display(),
        size::human(disk_bytes)
    );
    if format == Format::Vhd {
        line.push_str(&format!(", {}", options.vhd.disk_type));
        if disk_bytes != bytes {
            line.push_str(&format!(
                " ({disk_bytes} bytes, as cylinders, heads and sectors make them; exactly {bytes}: -o force_size=on)"
            ));
        }
    }
    if format == Format::Vdi {
        line.push_str(&format!(", {}", options.vdi.image_type));
    }
    if format == Format::Qcow2 {
        let cluster = size::human(options.qcow2.cluster_size);
        line.push_str(&format!(", clusters of {cluster}"));
        if options.qcow2.extended_l2 {
            let part = size::human(options.qcow2.subcluster_size());
            line.push_str(&format!(" with subclusters of {part}"));
        }
    }
    if let Some(volume) = options.luks.as_ref().or(options.qcow2.encryption.as_ref()) {
        let suite = &volume.header.suite;
        let (cipher, mode) = (suite.algorithm, suite.mode_name());
        line.push_str(&format!(", encrypted with {cipher} {mode}"));
    }
    if format == Format::Vhdx {
        let kind = match (options.vhdx.fixed, &options.vhdx.parent) {
            (true, _) => "fixed",
            (false, Some(_)) => "differencing",
            (false, None) => "dynamic",
        };
        let block = size::human(options.vhdx.block_bytes());
        line.push_str(&format!(", {kind}, blocks of {block}"));
    }
    if format == Format::Qcow {
        let cluster = size::human(options.qcow.cluster_size());
        line.push_str(&format!(", clusters of {cluster}"));
    }
    if format == Format::Qed {
        let cluster = size::human(options.qed.cluster_size);
        line.push_str(&format!(", clusters of {cluster}"));
    }
    if format == Format::Vmdk {
        line.push_str(&format!(", {}", options.vmdk.subformat.name()));
        match options.vmdk.files().len() {
            0 => {}
            1 => line.push_str(", data in a file beside it"),
            count => line.push_str(&format!(", data in {count} files beside it")),
        }
    }
    if let Some((name, below)) = &backing {
        line.push_str(&format!(", on {name} ({below})"));
    }
    if let Some(name) = &options.qcow2.data_file {
        let raw = if options.qcow2.data_file_raw {
            " (raw)"
        } else {
            ""
        };
        line.push_str(&format!(", data in {name}{raw}"));
    }
    if chosen {
        line.push_str(
            "\nsubclusters make small writes to an overlay cheap; QEMU reads them from 5.2 on \
             (without them: -o extended_l2=off)",
        );
    }
    if !args.quiet {
        crate::print(&format!("{line}\n"))?;
    }
    warn_of_policy(
        file,
        format,
        backing.is_some() || options.qcow2.data_file.is_some(),
    );
    Ok(())
}

/// Makes the image. What takes long, to give it all of its space, has another name until it is complete.
fn make(file: &Path, format: Format, options: &Options) -> Result<()> {
    let stop = signals::stop_on_signals()?;
    let is_new = open::at_server(file).is_none() && fs::symlink_metadata(file).is_err();
    if !is_new || options.preallocation == Preallocation::Off {
        return write_all(file, format, options, &stop);
    }
    let mut partial = Partial::new(file);
    if let Some(name) = &options.qcow2.data_file {
        // The image has another name until it is complete.
        let data = file
            .parent()
            .unwrap_or(Path::new(""))
            .join(block::name::path(name));
        refuse_as_data(file, &data)?;
        partial.add(data);
    }
    let path = partial.path().to_owned();
    write_all(&path, format, options, &stop).map_err(|error| partial.name(error))?;
    partial.finish()
}

/// The formats that new images can have.
pub const NEW_NAMES: &str = "raw, qcow2, qcow, qed, vhd, vhdx, vdi, vmdk or luks";

/// The format that was said (by `flag`), or that a new file's name says.
pub(crate) fn format_of(said: Option<Format>, file: &Path, flag: &str) -> Result<Format> {
    if let Some(format) = said {
        return Ok(format);
    }
    if open::at_server(file).is_some() {
        bail!(
            "{}: what is to be written to a server, its name does not say: say {flag} raw, or another format",
            file.display()
        );
    }
    let extension = file.extension().and_then(|e| e.to_str());
    Ok(match extension {
        Some("qcow2") => Format::Qcow2,
        Some("qcow") => Format::Qcow,
        Some("qed") => Format::Qed,
        Some("vhd" | "vpc") => Format::Vhd,
        Some("vhdx") => Format::Vhdx,
        Some("vdi") => Format::Vdi,
        Some("luks") => Format::Luks,
        Some("vmdk") => Format::Vmdk,
        Some("raw" | "img") => Format::Raw,
        _ => bail!(
            "{}: its name does not say which format it is to have: say {flag} {}",
            file.display(),
            NEW_NAMES
        ),
    })
}

/// Refuses a backing file (said by `flag`) for a format that is not made with one.
pub(crate) fn refuse_backing(flag: &str, format: Format) -> Result<()> {
    match format {
        Format::Qcow2 | Format::Qcow | Format::Qed | Format::Vhd | Format::Vhdx | Format::Vmdk => {
            Ok(())
        }
        Format::Raw
        | Format::Null
        | Format::Vdi
        | Format::Luks
        | Format::Parallels
        | Format::Bochs
        | Format::Cloop
        | Format::Dmg => {
            bail!("{flag}: {format} images have no backing file")
        }
    }
}

/// The file that is called `name` from the directory of `file`, open for reading, and its absolute name.
pub(crate) fn parent(file: &Path, name: &str) -> Result<(Arc<File>, String)> {
    let path = file
        .parent()
        .unwrap_or(Path::new(""))
        .join(block::name::path(name));
    let path = fs::canonicalize(&path).with_context(|| path.display().to_string())?;
    let read_only = OpenOptions {
        read_only: true,
        lock: io::Lock::None,
        ..OpenOptions::default()
    };
    Ok((File::open(&path, &read_only)?, block::name::text(&path)))
}

/// What a differencing VHD image at `file` says of the parent `name`, which is there.
pub(crate) fn vhd_parent(file: &Path, name: &str, format: Format) -> Result<vhd::NewParent> {
    let (parent, absolute) = parent(file, name)?;
    let unique_id = match format {
        Format::Vhd => vhd::Layout::read(&*parent)?.footer.unique_id,
        Format::Raw => vhd::UniqueId::NONE,
        other => bail!("{name}: a vhd image lies over vhd or raw, not over {other}"),
    };
    let changed = fs::metadata(block::name::path(&absolute))?.modified()?;
    let changed = changed
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    Ok(vhd::NewParent {
        name: name.to_owned(),
        absolute,
        unique_id,
        timestamp: u32::try_from(changed.as_secs().saturating_sub(vhd::EPOCH))?,
    })
}

/// The name of a new image's file, as its descriptor is to have it.
pub(crate) fn file_name(file: &Path) -> Result<String> {
    let name = file.file_name();
    let name = name.with_context(|| format!("{}: no name of a file", file.display()))?;
    Ok(block::name::text(name))
}

/// What a VMDK image at `file` says of the parent `name`, which is there: the name, and its CID.
pub(crate) fn vmdk_parent(file: &Path, name: &str, format: Format) -> Result<(String, u32)> {
    if format != Format::Vmdk {
        bail!("{name}: a vmdk image lies over vmdk, not over {format}");
    }
    let path = file
        .parent()
        .unwrap_or(Path::new(""))
        .join(block::name::path(name));
    let base = open::file(&path, open::Access::ReadUnlocked)?;
    let parts = vmdk::Parts::read(&*base)?;
    Ok((name.to_owned(), parts.descriptor.cid))
}

/// What a VHDX image at `file` says of the parent `name`, which is there; and that.
pub(crate) fn vhdx_parent(
    file: &Path,
    name: &str,
    format: Format,
) -> Result<(vhdx::Locator, vhdx::Layout)> {
    if format != Format::Vhdx {
        bail!("{name}: a vhdx image lies over vhdx, not over {format}");
    }
    let (parent, absolute) = parent(file, name)?;
    let parent = vhdx::Layout::read(&*parent)?;
    let id = parent.headers.current.data_write;
    Ok((vhdx::Locator::new(id, name, &absolute)?, parent))
}

/// What the image of `format` at `file` is to say of its backing file `name`, of the format `below`. But for qcow2 and QED,
/// it is opened for that.
pub(crate) fn link(file: &Path, format: Format, name: &str, below: Format) -> Result<Link> {
    Ok(match format {
        Format::Vhd => Link::Vhd(vhd_parent(file, name, below)?),
        Format::Vhdx => Link::Vhdx(vhdx_parent(file, name, below)?.0),
        Format::Vmdk => {
            let (name, cid) = vmdk_parent(file, name, below)?;
            Link::Vmdk(name, cid)
        }
        _ => Link::Named(name.to_owned(), below),
    })
}

fn backing_of(args: &args::Create, options: &Options) -> Result<Option<(String, Format)>> {
    let name = match (&args.backing, &options.backing_file) {
        (Some(a), Some(b)) if a != b => {
            bail!("-b {a} and -o backing_file={b} contradict each other")
        }
        (a, b) => a.as_ref().or(b.as_ref()),
    };
    let format = match (args.backing_format, options.backing_format) {
        (Some(a), Some(b)) if a != b => {
            bail!("-F {a} and -o backing_fmt={b} contradict each other")
        }
        (a, b) => a.or(b),
    };
    Ok(match (name, format) {
        (Some(name), Some(format)) => Some((name.clone(), format)),
        (Some(name), None) => bail!("-b {name}: say its format with -F"),
        (None, Some(_)) => bail!("-F without -b"),
        (None, None) => None,
    })
}

/// Opens the base as the new image will and gives its size.
fn base_size(file: &Path, name: &str, format: Format) -> Result<u64> {
    // A relative name starts at the directory of the image that stores it.
    let path = open::beside(file, name);
    let options = ChainOptions {
        format: Some(format),
        read_only: true,
        without_backing: true,
        allow_locked: true,
        ..ChainOptions::default()
    };
    let chain = open::chain(&path, &options).context("backing file")?;
    Ok(chain.layers.first().map_or(0, |layer| layer.image.size()))
}

/// Makes the external data file, if there is to be one, and the image; neither, where `stop` asks for the end.
pub(crate) fn write_all(path: &Path, format: Format, options: &Options, stop: &Stop) -> Result<()> {
    if format == Format::Vmdk {
        return write_vmdk(path, &options.vmdk, options.overwrite);
    }
    let Some(name) = &options.qcow2.data_file else {
        return write(path, format, options, stop);
    };
    if !chain::is_file_name(name) {
        bail!("-o data_file={name}: it has a protocol, only names of files are opened");
    }
    if !options.overwrite && fs::metadata(path).is_ok_and(|m| m.is_file()) {
        bail!(exists(path));
    }
    // As with backing files, a relative name starts at the directory of the image that stores it.
    let data = path
        .parent()
        .unwrap_or(Path::new(""))
        .join(block::name::path(name));
    refuse_as_data(path, &data)?;
    let is_new = !data.exists();
    // A failure takes a new file away again.
    write(&data, Format::Raw, options, stop).context("data file")?;
    let written = write(path, format, options, stop);
    if written.is_err() && is_new {
        let _ = fs::remove_file(&data);
    }
    written
}

/// Refuses `data` for the external data file of the image at `path` where both are one file, or would be once they are
/// made, whatever names and links lead to it: what is made second would destroy the first.
pub(crate) fn refuse_as_data(path: &Path, data: &Path) -> Result<()> {
    let are_one = match (fs::metadata(path), fs::metadata(data)) {
        (Ok(a), Ok(b)) if a.file_type().is_block_device() && b.file_type().is_block_device() => {
            a.rdev() == b.rdev()
        }
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        (Err(_), Err(_)) => place(path).is_some_and(|place_| Some(place_) == place(data)),
        _ => false,
    };
    match are_one {
        true => bail!(
            "-o data_file={}: is the image itself: the data need a file of their own",
            data.display()
        ),
        false => Ok(()),
    }
}

/// Where a file will be that is made under the name `path`; absent where it cannot be made.
fn place(path: &Path) -> Option<PathBuf> {
    let path = beyond_links(path);
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Some(fs::canonicalize(directory).ok()?.join(path.file_name()?))
}

/// What `path` is called in the end where it is a link to a file that is not there yet: no new file can be made under
/// the name of a link.
fn beyond_links(path: &Path) -> PathBuf {
    let mut found = path.to_owned();
    if path.exists() {
        return found;
    }
    for _ in 0..LINKS_MAX {
        let Ok(to) = fs::read_link(&found) else {
            break;
        };
        found = found.parent().unwrap_or(Path::new("")).join(to);
    }
    found
}

pub(crate) fn exists(path: &Path) -> String {
    if let (Ok(to), false) = (fs::read_link(path), path.exists()) {
        return format!(
            "{}: is a link to {}, which is not there: name that, or remove the link",
            path.display(),
            to.display()
        );
    }
    format!(
        "{}: the file exists already: remove it or choose another name",
        path.display()
    )
}

/// Makes the extents of a VMDK image, and then the image; over files that are there only with `overwrite`.
fn write_vmdk(path: &Path, options: &vmdk::CreateOptions, overwrite: bool) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new(""));
    let mut made = Vec::new();
    let mut make = |path: &Path, write: &dyn Fn(&File) -> block::Result<()>| -> Result<()> {
        let is_new = !path.exists();
        let file = match create_new(path, &OpenOptions::default(), overwrite) {
            Err(_) if path.is_file() && overwrite => emptied(path, Cache::default())?,
            Err(_) if path.is_file() => bail!(exists(path)),
            Err(_) if path.exists() => {
                bail!(
                    "{}: a vmdk image is made of files, which grow",
                    path.display()
                )
            }
            created => created?,
        };
        if is_new {
            made.push(file.path().to_owned());
        }
        Ok(write(&file)?)
    };
    let mut all = || {
        for extent in options.files() {
            make(&directory.join(block::name::path(&extent.name)), &|file| {
                extent.write(file)
            })?;
        }
        make(path, &|file| options.write(file))
    };
    let written = all();
    if written.is_err() {
        for path in &made {
            // What matters is why it failed.
            let _ = fs::remove_file(path);
        }
        return written;
    }
    sync_directory(path)
}

fn write(path: &Path, format: Format, options: &Options, stop: &Stop) -> Result<()> {
    let open = OpenOptions::default();
    if open::at_server(path).is_some() {
        let file = open::open_file(path, &open)?;
        return write_fixed(path, &file, format, options, stop);
    }
    let created = match create_new(path, &open, options.overwrite) {
        Ok(file) => return write_new(file.path(), &file, format, options, stop),
        Err(error) if path.exists() => error,
        Err(_) if path.is_symlink() && !options.overwrite => bail!(exists(path)),
        Err(error) => return Err(error.into()),
    };
    let file = match File::open(path, &open) {
        Ok(file) if file.kind() == FileKind::BlockDevice => file,
        Ok(file) if options.overwrite => return write_over(&file, format, options, stop),
        Ok(_) => bail!(exists(path)),
        Err(error) if error.kind() == ErrorKind::Locked => return Err(error.into()),
        Err(_) => return Err(created.into()),
    };
    write_fixed(path, &file, format, options, stop)
}

/// Makes an image in what cannot grow: a device, or a disk of a server.
fn write_fixed(
    path: &Path,
    file: &File,
    format: Format,
    options: &Options,
    stop: &Stop,
) -> Result<()> {
    match format {
        Format::Qcow2 => write_qcow2(file, options, stop),
        Format::Qcow | Format::Qed | Format::Vhdx => bail!(
            "{}: a {format} image grows, which a device cannot",
            path.display()
        ),
        Format::Vhd if options.vhd.disk_type == vhd::DiskType::Fixed => bail!(
            "{}: a fixed vhd image on a device would show what the device held, and has its footer where a \
             device rarely ends: say subformat=dynamic, or write a raw disk",
            path.display()
        ),
        Format::Vhd => write_vhd(file, options, stop),
        Format::Vdi if options.vdi.image_type == vdi::ImageType::Static => bail!(
            "{}: a static vdi image on a device would show what the device held: say static=off, or write a raw disk",
            path.display()
        ),
        Format::Vdi => write_vdi(file, options, stop),
        Format::Luks => write_luks(file, options, stop),
        _ if file.len()? < options.qcow2.size => bail!(
            "{}: the device has {}, less than {}",
            path.display(),
            size::human(file.len()?),
            size::human(options.qcow2.size)
        ),
        // A raw disk on a device is whatever the device holds.
        _ => Ok(()),
    }
}

/// A new file at `path`; with `follow`, where a link leads that has that name.
fn create_new(path: &Path, options: &OpenOptions, follow: bool) -> block::Result<Arc<File>> {
    if !follow {
        return File::create_new(path, options);
    }
    let created = File::create_new(&beyond_links(path), options);
    if let Err(error) = &created
        && error.kind() == ErrorKind::NotFound
    {
        // Of the name that was asked for.
        block::Context::context(fs::metadata(path), || path.display().to_string())?;
    }
    created
}

/// Fills a file that did not exist before; takes it away again when that fails.
fn write_new(
    path: &Path,
    file: &File,
    format: Format,
    options: &Options,
    stop: &Stop,
) -> Result<()> {
    let written = fill(file, format, options, stop);
    if written.is_err() {
        // What matters is why it failed.
        let _ = fs::remove_file(path);
        return written;
    }
    sync_directory(path)
}

/// Makes an image of a file that is there, and stays where it is, whatever names lead to it.
fn write_over(file: &File, format: Format, options: &Options, stop: &Stop) -> Result<()> {
    file.set_len(0)?;
    fill(file, format, options, stop)
}

/// The file at `path`, without what it held, or a new one.
pub(crate) fn emptied(path: &Path, cache: Cache) -> Result<Arc<File>> {
    let open = OpenOptions {
        cache,
        ..OpenOptions::default()
    };
    if open::at_server(path).is_some() {
        return open::open_file(path, &open);
    }
    let file = match create_new(path, &open, true) {
        Ok(file) => return Ok(file),
        Err(_) if path.exists() => io::wait_for_lock(|| File::open(path, &open))?,
        Err(error) => return Err(error.into()),
    };
    match file.kind() {
        FileKind::BlockDevice => {}
        _ => file.set_len(0)?,
    }
    Ok(file)
}

/// Makes an image of an empty file.
fn fill(file: &File, format: Format, options: &Options, stop: &Stop) -> Result<()> {
    match format {
        Format::Qcow2 => write_qcow2(file, options, stop),
        Format::Qcow => qcow::create(file, &options.qcow).map_err(Into::into),
        Format::Qed => qed::create(file, &options.qed).map_err(Into::into),
        Format::Vhd => write_vhd(file, options, stop),
        Format::Vhdx => write_vhdx(file, options, stop),
        Format::Vdi => write_vdi(file, options, stop),
        Format::Luks => write_luks(file, options, stop),
        _ => write_raw(file, options, stop),
    }
}

/// Makes the name of a new file durable.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::File::open(directory)
        .and_then(|d| d.sync_all())
        .with_context(|| format!("{}: sync", directory.display()))
}

fn write_qcow2(file: &File, options: &Options, stop: &Stop) -> Result<()> {
    qcow2::create(file, &options.qcow2)?;
    reserve(options, file, options.qcow2.data_range(), stop)?;
    Ok(file.sync()?)
}

fn write_vhd(file: &File, options: &Options, stop: &Stop) -> Result<()> {
    let options_of_format = vhd::CreateOptions {
        size: options.qcow2.size,
        ..options.vhd.clone()
    };
    let bytes = options_of_format.disk_bytes()?;
    // Before the footer behind it, without which there is no image.
    if options_of_format.disk_type == vhd::DiskType::Fixed {
        file.set_len(bytes)?;
        reserve(options, file, 0..bytes, stop)?;
    }
    Ok(vhd::create(file, &options_of_format)?)
}

fn write_vhdx(file: &File, options: &Options, stop: &Stop) -> Result<()> {
    // Before the headers, without which there is no image.
    let range = options.vhdx.data_range()?;
    if !range.is_empty() {
        file.set_len(range.end)?;
        reserve(options, file, range, stop)?;
    }
    Ok(vhdx::create(file, &options.vhdx)?)
}

fn write_vdi(file: &File, options: &Options, stop: &Stop) -> Result<()> {
    // Before the header, without which there is no image.
    if options.vdi.image_type == vdi::ImageType::Static {
        let range = options.vdi.data_range()?;
        file.set_len(range.end)?;
        reserve(options, file, range, stop)?;
    }
    Ok(vdi::create(file, &options.vdi)?)
}

fn write_luks(file: &File, options: &Options, stop: &Stop) -> Result<()> {
    let Some(volume) = &options.luks else {
        bail!("{}: no key was made for it", file.name());
    };
    let size = options.qcow2.size;
    let end = luks::file_bytes(volume.len(), size)?;
    match file.kind() {
        FileKind::BlockDevice | FileKind::Remote if file.len()? < end => bail!(
            "{}: the device has {}, less than disk and header need: {}",
            file.name(),
            size::human(file.len()?),
            size::human(end)
        ),
        FileKind::BlockDevice | FileKind::Remote => {}
        // Before the header, without which there is no image.
        _ => {
            file.set_len(end)?;
            reserve(options, file, volume.len()..end, stop)?;
        }
    }
    Ok(luks::create(file, volume, size)?)
}

/// Has the host set space aside, if that was asked for.
fn reserve(options: &Options, file: &File, range: std::ops::Range<u64>, stop: &Stop) -> Result<()> {
    match options.preallocation {
        // A new file is sparse.
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        mode => Ok(fill_host(
            mode,
            file,
            range.start,
            range.end - range.start,
            stop,
        )?),
    }
}

fn write_raw(file: &File, options: &Options, stop: &Stop) -> Result<()> {
    let bytes = block::align_up(options.qcow2.size, 512);
    file.set_len(bytes)?;
    reserve(options, file, 0..bytes, stop)?;
    Ok(file.sync()?)
}

/// Says so when the new image's backing or data file will not be opened without being allowed.
pub(crate) fn warn_of_policy(path: &Path, format: Format, names_files: bool) {
    if !names_files {
        return;
    }
    let options = ChainOptions {
        format: Some(format),
        read_only: true,
        allow_locked: true,
        ..ChainOptions::default()
    };
    if let Err(error) = Chain::open(path, &options)
        && error.kind() == ErrorKind::Denied
    {
        eprintln!("diskplane: note: {}", block::plain(&error.to_string()));
    }
}
