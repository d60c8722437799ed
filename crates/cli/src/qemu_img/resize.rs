//! `qemu-img resize`.

use super::line::{self, usage};
use super::open::{self, How};
use super::spec::Spec;
use crate::print;
use anyhow::{Result, anyhow, bail};
use clap::Args;
use image::Format;
use std::ffi::OsString;
use tool::prealloc::Preallocation;
use tool::resize::{ResizeOptions, resize};

/// `resize`.
#[derive(Args, Debug)]
pub struct Resize {
    #[command(flatten)]
    pub(super) spec: Spec,
    /// quiet operation
    #[arg(short, long)]
    quiet: bool,
    /// allow operation when new size is smaller than original
    #[arg(long)]
    shrink: bool,
    /// specify preallocation type for the new areas
    #[arg(long, value_name = "PREALLOC")]
    preallocation: Option<String>,
    /// FILENAME [+-]SIZE[bkKMGTPE]
    #[arg(value_name = "FILENAME [+-]SIZE")]
    operands: Vec<String>,
}

/// A size may begin with a dash, and is the last argument, or the one behind the file: nothing takes it for an option
/// then.
pub fn with_size_last(arguments: &[OsString]) -> Vec<OsString> {
    let mut arguments = arguments.to_vec();
    let text = |at: usize| {
        let argument = arguments.get(at).map(|argument| argument.to_string_lossy());
        argument.unwrap_or_default().into_owned()
    };
    let is_size = |at: &usize| {
        text(*at)
            .strip_prefix('-')
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    // `-f` and `--format`, `--preallocation` and `--object`, as far as they are written out, take what follows.
    let takes_next = |option: &str| {
        let is = |short: &str| option.starts_with(short) && !option.contains('=');
        option == "-f" || is("--f") || is("--p") || is("--o")
    };
    let is_file = |at: usize| {
        let value = at.checked_sub(1).is_some_and(|at| takes_next(&text(at)));
        !text(at).starts_with('-') && !value
    };
    let last = arguments.len().saturating_sub(1);
    let found = (0..=last)
        .filter(is_size)
        .find(|at| *at == last || at.checked_sub(1).is_some_and(is_file));
    if let Some(at) = found
        && !arguments.iter().any(|argument| argument == "--")
    {
        let size = arguments.remove(at);
        arguments.extend(["--".into(), size]);
    }
    arguments
}

/// Resizes an image.
pub fn run(args: &Resize) -> Result<u8> {
    let preallocation = match args.preallocation.as_deref() {
        None => Preallocation::Off,
        Some(mode) => mode
            .parse()
            .map_err(|_| anyhow!("Invalid preallocation mode '{mode}'"))?,
    };
    let [file, size] = args.operands.as_slice() else {
        return match args.operands.len() {
            0 | 1 => Err(usage("Expecting image file name and size")),
            _ => Err(usage("Extra argument(s) in command line")),
        };
    };
    let (sign, digits) = match size.strip_prefix('+') {
        Some(more) => (1, more),
        None => match size.strip_prefix('-') {
            Some(less) => (-1, less),
            None => (0, size.as_str()),
        },
    };
    let bytes = line::size_of(digits).ok_or_else(|| {
        anyhow!(
            "Parameter 'size' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means kilo-, \
             mega-, giga-, tera-, peta-\nand exabytes, respectively."
        )
    })?;
    let name = args.spec.name(file);
    let how = How {
        write: true,
        ..How::default()
    };
    let (chain, opened) = open::chain_and_options(&name, &how, &args.spec.objects)?;
    if opened.part.is_some() {
        bail!("Cannot resize a part of a file: offset and size say where it is");
    }
    let layer = open::active(&chain)?;
    let (old, format) = (layer.image.size(), layer.format);
    let new = match sign {
        1 => old.checked_add(bytes),
        -1 => old.checked_sub(bytes),
        _ => Some(bytes),
    };
    // QEMU counts in signed numbers.
    let Some(new) = new.filter(|new| (1..=i64::MAX as u64).contains(new)) else {
        bail!("New image size must be positive");
    };
    if new <= old && preallocation != Preallocation::Off {
        bail!("Preallocation can only be used for growing images");
    }
    if new < old && !args.shrink {
        bail!(
            "Use the --shrink option to perform a shrink operation.\nqemu-img: warning: Shrinking an image will \
             delete all data beyond the shrunken image's end. Before performing such an operation, make sure there \
             is no important data there."
        );
    }
    if format == Format::Raw && preallocation == Preallocation::Metadata {
        bail!("Unsupported preallocation mode: metadata");
    }
    // A raw disk ends where it is told to; what is behind it up to a whole sector reads as zeros.
    let exact = matches!(format, Format::Raw | Format::Luks);
    if !exact && !new.is_multiple_of(512) {
        bail!(match format {
            Format::Qed => "Invalid image size specified",
            _ => "The new size must be a multiple of 512",
        });
    }
    let fixed = layer.files.first().filter(|file| file.is_fixed());
    if let Some(file) = fixed.filter(|_| format == Format::Raw && new != old) {
        match crate::open::at_server(file.path()) {
            Some(_) => bail!("Cannot resize NBD nodes"),
            None if new > old => bail!("Cannot grow device files"),
            None => bail!("Cannot resize device files"),
        }
    }
    match format {
        Format::Vmdk
        | Format::Vhd
        | Format::Vhdx
        | Format::Vdi
        | Format::Qcow
        | Format::Bochs
        | Format::Cloop
        | Format::Dmg => {
            bail!("Image format driver does not support resize")
        }
        Format::Qed if new < old => bail!("Shrinking images is currently not supported"),
        _ => {}
    }
    let options = ResizeOptions {
        size: new,
        shrink: args.shrink,
        preallocation,
    };
    resize(&chain.members(), format, &options).map_err(|error| {
        match error
            .to_string()
            .contains("a version 2 image with snapshots")
        {
            true => anyhow!("Can't resize a v2 image which has snapshots"),
            false => anyhow!("{error}"),
        }
    })?;
    if !args.quiet {
        print("Image resized.\n")?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_no_option() {
        let given = |text: &str| -> Vec<OsString> { text.split(' ').map(Into::into).collect() };
        for (text, want) in [
            ("a -1M", "a -- -1M"),
            ("-q a +1M", "-q a +1M"),
            ("a 1M --shrink", "a 1M --shrink"),
            ("-f raw a -1M --shrink", "-f raw a --shrink -- -1M"),
            ("-f raw -1M --shrink a", "-f raw -1M --shrink a"),
            ("--form raw -1M a", "--form raw -1M a"),
            ("a -- -1M", "a -- -1M"),
        ] {
            assert_eq!(with_size_last(&given(text)), given(want), "{text}");
        }
    }
}
