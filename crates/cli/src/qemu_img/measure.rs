//! `qemu-img measure`.

use super::create;
use super::create_options::{self, Said};
use super::line;
use super::open::{self, How};
use super::spec::{Output, Spec};
use super::value;
use crate::options;
use crate::{measure, print, signals};
use anyhow::{Result, anyhow, bail};
use clap::Args;
use serde_json::json;
use tool::source::{Source, UNMAPPED};
use tool::work::Work;

/// `measure`.
#[derive(Args, Debug)]
pub struct Measure {
    #[command(flatten)]
    pub(super) spec: Spec,
    /// desired target/output image format (default raw)
    #[arg(short = 'O', long, value_name = "FMT")]
    target_format: Option<String>,
    /// its options
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// measure file size for given image size
    #[arg(short, long, value_name = "SIZE")]
    size: Option<String>,
    /// use this snapshot in FILENAME as source
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    #[command(flatten)]
    output: Output,
    /// open images in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    /// measure file size required to convert from FILENAME
    #[arg(value_name = "FILENAME")]
    files: Vec<String>,
}

/// Says how large an image will be.
pub fn run(args: &Measure) -> Result<u8> {
    let as_json = args.output.is_json()?;
    let size = args.size.as_deref();
    let size = size
        .map(|text| line::bytes("image size", text))
        .transpose()?;
    let file = match args.files.as_slice() {
        [] => None,
        [file] => Some(file.as_str()),
        _ => bail!("At most one filename argument is allowed."),
    };
    if file.is_none()
        && (args.spec.image_opts || args.spec.format.is_some() || args.snapshot.is_some())
    {
        bail!("--image-opts, -f, and -l require a filename argument.");
    }
    match (file, size) {
        (Some(_), Some(_)) => bail!("--size N cannot be used together with a filename."),
        (None, None) => bail!("Either --size N or one filename must be specified."),
        _ => {}
    }
    let how = How {
        force_share: args.force_share,
        snapshot: args.snapshot.clone(),
        ..How::default()
    };
    let chain = file.map(|text| {
        let name = args.spec.name(text);
        open::chain(&name, &how, &args.spec.objects)
    });
    let chain = chain.transpose().map_err(|error| {
        match error.to_string().contains("there is no snapshot") {
            true => anyhow!("Failed to load snapshot: Can't find snapshot"),
            false => error,
        }
    })?;
    let target = args.target_format.as_deref().unwrap_or("raw");
    let format = create_options::of_new(target)?;
    let list = line::joined(&args.options)?;
    let said = Said::parse(target, &list).map_err(|error| {
        anyhow!("{error}\nqemu-img: Invalid options for file format '{target}'")
    })?;
    create::name_key(format, &said, &args.spec.objects)?;
    let mut options = options::parse(format, &said.own())?;
    options.backing_file = said.get("backing_file").map(str::to_owned);
    let mut source = chain.as_ref().map(Source::new).transpose()?;
    let bytes = match (&source, size) {
        (Some(source), _) => source.size(),
        (None, size) => block::align_up(size.unwrap_or(0).min(block::limits::DISK_BYTES_MAX), 512),
    };
    let mut progress = |_| {};
    let mut work = Work::new(signals::stop_on_signals()?, &mut progress);
    let measured = measure::of(
        format,
        &mut options,
        bytes,
        chain.as_ref(),
        source.as_mut(),
        &mut work,
    );
    let measured = measured.map_err(|error| {
        let own = error.downcast_ref::<block::Error>();
        if let Some(own) = own.filter(|own| own.to_string().starts_with(UNMAPPED)) {
            return anyhow!("Unable to get block status: {}", open::os_reason(own));
        }
        let error = create::own_words(format, error);
        // Here qemu-img does not say of which format.
        let of_it = format!(" for file format '{}'", format.qemu_name());
        anyhow!("{}", error.to_string().replace(&of_it, ""))
    })?;
    let Some(measured) = measured else {
        bail!("Block driver '{target}' does not support size measurement");
    };
    print(&match as_json {
        true => {
            let mut value = json!({
                "required": measured.required,
                "fully-allocated": measured.fully_allocated,
            });
            if let (Some(bytes), Some(object)) = (measured.bitmaps, value.as_object_mut()) {
                object.insert("bitmaps".into(), bytes.into());
            }
            value::json(&value)
        }
        false => {
            let mut text = format!(
                "required size: {}\nfully allocated size: {}\n",
                measured.required, measured.fully_allocated
            );
            if let Some(bytes) = measured.bitmaps {
                text.push_str(&format!("bitmaps size: {bytes}\n"));
            }
            text
        }
    })?;
    Ok(0)
}
