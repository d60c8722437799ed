//! `diskplane amend`.
//!
//! With `--json` an object: `filename`, `format`, and what the image is then: `compat`, `lazy-refcounts`,
//! `refcount-bits`, `virtual-size`; `data-file-raw` where there is an external data file. Of a luks image `active-slots`,
//! the number of its keys.

use crate::keys::Change;
use crate::open::{self, Access};
use crate::resize::{NewSize, Wish};
use crate::secret::Objects;
use crate::{args, check, options, print, resize};
use anyhow::{Result, bail};
use block::{Storage, size};
use disk::chain::ChainOptions;
use image::Format;
use image::qcow2::{AmendOptions, Header, amend, downgrade, extensions, features};
use serde::Serialize;
use std::path::Path;
use tool::prealloc::Preallocation;

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json {
    filename: String,
    format: &'static str,
    compat: &'static str,
    lazy_refcounts: bool,
    refcount_bits: u32,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file_raw: Option<bool>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonLuks {
    filename: String,
    format: &'static str,
    active_slots: usize,
}

/// What `-o` wants to be changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What is in the header and the refcounts.
    pub image: AmendOptions,
    /// Bytes of the disk.
    pub size: Option<u64>,
    /// The disk may become smaller.
    pub shrink: bool,
    /// A downgrade may take the persistent bitmaps with it; else it is refused while there are some.
    pub drop_bitmaps: bool,
    /// Some were said without `encrypt.`, as those of a luks image.
    pub bare: bool,
    /// `encrypt.*`, in the order given.
    pub encrypt: Vec<(String, String)>,
}

/// Changes the options of an image.
pub fn run(args: &args::Amend) -> Result<()> {
    if options::wants_help(&args.options) {
        return print(&options::amend_help());
    }
    let Some(file) = &args.file else {
        bail!("say which image is to be changed: diskplane amend -o k=v,… FILE");
    };
    let changes = options::parse_amend(&args.options)?;
    let options = ChainOptions {
        format: args.format,
        allow_backing: args.allow_backing.clone(),
        passphrases: args.keys.read()?,
        ..ChainOptions::default()
    };
    if args.options.is_empty() {
        bail!("say what to change: -o k=v,… (-o help lists what there is)");
    }
    let (path, options) = open::resolve(file, args.image_opts, &args.keys.objects, options)?;
    match apply(&path, &changes, &args.keys.objects, args.force, &options)? {
        Some(header) => report(args, file, &header),
        None => report_luks(args, file, &path),
    }
}

/// Changes what `changes` say of the image at `path`, whose backing files are opened as `options` say. Returns its
/// header then; of a luks image nothing.
pub fn apply(
    path: &Path,
    changes: &Changes,
    objects: &Objects,
    force: bool,
    options: &ChainOptions,
) -> Result<Option<Header>> {
    let keys = Change::parse(&changes.encrypt)?;
    let old = options.passphrases.first().map(|passphrase| &**passphrase);
    let (file, format) = open::image(path, options.format, Access::Write)?;
    let shown = path.display();
    match (format, &keys) {
        (Format::Qcow2, _) if !changes.bare => {}
        (Format::Qcow2, _) => {
            bail!("{shown}: the options of a qcow2 image's keys begin with encrypt.")
        }
        (Format::Luks, Some(change))
            if changes.size.is_none() && changes.image == AmendOptions::default() =>
        {
            change.apply(&*file, format, objects, old, force)?;
            return Ok(None);
        }
        (Format::Luks, _) => {
            bail!("{shown}: of a luks image only keys can be amended: state, keyslot, …")
        }
        _ => bail!("{shown}: a {format} image has no options to amend; qcow2 and luks images have"),
    }
    let storage: &dyn Storage = &*file;
    let name = storage.name();
    let repair = options.repair.unwrap_or(check::PREPARE);
    (repair.image)(storage, Format::Qcow2)?;
    let header = Header::read(storage)?;
    header.check_known().map_err(|e| e.within(&name))?;
    let drops = changes.drop_bitmaps && changes.image.version == Some(2) && header.version > 2;
    let mut judged = header.clone();
    if drops {
        judged
            .extensions
            .retain(|extension| extension.kind != extensions::BITMAPS);
    }
    let valid = changes.image.validate(&judged);
    valid.map_err(|e| e.within(&name))?;
    if changes
        .size
        .is_some_and(|bytes| bytes < header.size && !changes.shrink)
    {
        bail!("{shown}: amend does not shrink a disk: use diskplane resize --shrink");
    }
    // qemu-img leaves them where version 2 has no place for them, and nobody finds them again. Not before all that can be
    // refused was.
    if drops && tool::bitmap::remove_all(storage)? > 0 {
        eprintln!("qemu-img: warning: version 2 images have no bitmaps: they are removed");
    }
    // In QEMU's order: what an upgrade allows comes behind it, what a downgrade forbids before it.
    amend(storage, &name, &changes.image)?;
    if let Some(change) = &keys {
        change.apply(storage, format, objects, old, force)?;
    }
    // It opens the image itself, with its backing files.
    drop(file);
    if let Some(bytes) = changes.size {
        let wish = Wish {
            size: NewSize::To(bytes),
            shrink: changes.shrink,
            preallocation: Preallocation::Off,
        };
        resize::resize(path, options, &wish)?;
    }
    let file = open::file(path, Access::Write)?;
    if changes.image.version == Some(2) {
        downgrade(&*file, &name)?;
    }
    Ok(Some(Header::read(&*file)?))
}

fn report_luks(args: &args::Amend, file: &Path, path: &Path) -> Result<()> {
    if args.quiet {
        return Ok(());
    }
    let (storage, _) = open::image(path, Some(Format::Luks), Access::Read)?;
    let slots = image::luks::header(&*storage)?.active_slots();
    let filename = file.display().to_string();
    print(&match args.json {
        true => crate::json(&JsonLuks {
            filename,
            format: Format::Luks.name(),
            active_slots: slots,
        })?,
        false => format!(
            "amended {filename}: luks, {slots} of {} key slots are active\n",
            crypto::luks::SLOTS
        ),
    })
}

fn report(args: &args::Amend, file: &Path, header: &Header) -> Result<()> {
    if args.quiet {
        return Ok(());
    }
    let raw = header.autoclear & features::DATA_FILE_RAW != 0;
    let json = Json {
        filename: file.display().to_string(),
        format: Format::Qcow2.name(),
        compat: if header.version < 3 { "0.10" } else { "1.1" },
        lazy_refcounts: header.compatible & features::LAZY_REFCOUNTS != 0,
        refcount_bits: header.refcount_bits(),
        virtual_size: header.size,
        data_file_raw: (header.incompatible & features::DATA_FILE != 0).then_some(raw),
    };
    print(&match args.json {
        true => crate::json(&json)?,
        false => format!(
            "amended {}: qcow2, {}, compat={}, refcount_bits={}, lazy_refcounts={}\n",
            json.filename,
            size::human(json.virtual_size),
            json.compat,
            json.refcount_bits,
            if json.lazy_refcounts { "on" } else { "off" },
        ),
    })
}
