//! `diskplane amend`.
//!
//! With `--json` an object: `filename`, `format`, and what the image is then: `compat`, `lazy-refcounts`,
//! `refcount-bits`, `virtual-size`; `data-file-raw` where there is an external data file.

use crate::keys::Change;
use crate::open::{self, Access};
use crate::resize::{NewSize, Wish};
use crate::secret::Keys;
use crate::{args, check, options, print, resize};
use anyhow::{Result, bail};
use block::{Storage, size};
use disk::chain::ChainOptions;
use image::Format;
use image::qcow2::{AmendOptions, Header, amend, downgrade, features};
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

/// What `-o` wants to be changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What is in the header and the refcounts.
    pub image: AmendOptions,
    /// Bytes of the disk.
    pub size: Option<u64>,
    /// `encrypt.*`, in the order given.
    pub encrypt: Vec<(String, String)>,
}

/// Changes the options of an image.
pub fn run(args: &args::Amend) -> Result<()> {
    if args.options.iter().any(|o| o == "help" || o == "?") {
        return print(&options::amend_help());
    }
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
    let header = apply(&args.file, &changes, &args.keys, args.force, &options)?;
    report(args, &header)
}

/// Changes what `changes` say of the image at `path`, whose backing files are opened as `options` say. Returns its
/// header then.
pub fn apply(
    path: &Path,
    changes: &Changes,
    passphrases: &Keys,
    force: bool,
    options: &ChainOptions,
) -> Result<Header> {
    let keys = Change::parse(&changes.encrypt)?;
    let (file, format) = open::image(path, options.format, Access::Write)?;
    let shown = path.display();
    if format != Format::Qcow2 {
        bail!("{shown}: a {format} image has no options to amend; qcow2 images have");
    }
    let storage: &dyn Storage = &*file;
    let name = storage.name();
    check::mend(storage, Format::Qcow2)?;
    let header = Header::read(storage)?;
    header.check_known().map_err(|e| e.within(&name))?;
    changes
        .image
        .validate(&header)
        .map_err(|e| e.within(&name))?;
    if changes.size.is_some_and(|bytes| bytes < header.size) {
        bail!("{shown}: amend does not shrink a disk: use diskplane resize --shrink");
    }
    // In QEMU's order: what an upgrade allows comes behind it, what a downgrade forbids before it.
    amend(storage, &name, &changes.image)?;
    if let Some(change) = &keys {
        change.apply(storage, passphrases, force)?;
    }
    // It opens the image itself, with its backing files.
    drop(file);
    if let Some(bytes) = changes.size {
        let wish = Wish {
            size: NewSize::To(bytes),
            shrink: false,
            preallocation: Preallocation::Off,
        };
        resize::resize(path, options, &wish)?;
    }
    let file = open::file(path, Access::Write)?;
    if changes.image.version == Some(2) {
        downgrade(&*file, &name)?;
    }
    Ok(Header::read(&*file)?)
}

fn report(args: &args::Amend, header: &Header) -> Result<()> {
    if args.quiet {
        return Ok(());
    }
    let raw = header.autoclear & features::DATA_FILE_RAW != 0;
    let json = Json {
        filename: args.file.display().to_string(),
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
