//! `qemu-img dd`.

use super::convert::{Copy, reads_as_zeros};
use super::create;
use super::create_options::Said;
use super::line;
use super::open::{self, How};
use super::spec::Spec;
use anyhow::{Result, anyhow, bail};
use clap::Args;
use tool::convert::ConvertOptions;
use tool::source::Source;

/// `dd`.
#[derive(Args, Debug)]
pub struct Dd {
    #[command(flatten)]
    pub(super) spec: Spec,
    /// format of the OUTPUT (default raw)
    #[arg(short = 'O', long, value_name = "OUTPUT_FMT")]
    output_format: Option<String>,
    /// open images in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    /// bs=BLOCK_SIZE count=COUNT skip=COUNT if=INPUT of=OUTPUT
    #[arg(value_name = "KEY=VALUE")]
    operands: Vec<String>,
}

/// Copies a part of a disk.
pub fn run(args: &Dd) -> Result<u8> {
    let (mut input, mut output) = (None, None);
    let (mut block, mut count, mut skip) = (512, None, 0);
    for operand in &args.operands {
        let (key, value) = operand.split_once('=').unwrap_or((operand, ""));
        match key {
            "if" => input = Some(value),
            "of" => output = Some(value),
            "bs" => block = line::number("bs", value, 1, i32::MAX as u64)?,
            "count" => count = Some(line::bytes("count", value)?),
            "skip" => skip = line::bytes("skip", value)?,
            _ => bail!("unrecognized operand {key}"),
        }
    }
    let (Some(input), Some(output)) = (input, output) else {
        bail!("Must specify both input and output files");
    };
    let name = args.spec.name(input);
    let how = How {
        force_share: args.force_share,
        ..How::default()
    };
    let chain = open::chain(&name, &how, &args.spec.objects)?;
    let said = args.output_format.as_deref().unwrap_or("raw");
    let Some(format) = open::format_named(said) else {
        bail!("Unknown file format");
    };
    open::check_protocol(output)?;
    let disk = open::active(&chain)?.image.size();
    let end = count.map_or(disk, |count: u64| count.saturating_mul(block).min(disk));
    let begin = skip.saturating_mul(block);
    let mut options = Said::parse(said, "")?;
    let bytes = end.saturating_sub(begin);
    options.set("size", &bytes.to_string())?;
    let made = create::make(output, format, &options, &args.spec.objects)
        .map_err(|error| anyhow!("{output}: error while creating output image: {error}"))?;
    if begin > end {
        super::complain(&anyhow!("{input}: cannot skip to specified offset"));
        return Ok(0);
    }
    let copy = Copy {
        source: Source::window(&chain, begin, bytes)?,
        file: output,
        format,
        options: ConvertOptions::default(),
        blank: reads_as_zeros(output, format),
        how: How {
            write: true,
            passphrases: create::passphrases(&made, &args.spec.objects)?,
            ..How::default()
        },
        image_opts: false,
        compress: false,
        rate: None,
        progress: None,
        quiet: false,
    };
    copy.run(&[], &args.spec.objects)
        .map_err(|failed| failed.why)?;
    Ok(0)
}
