//! `diskplane dd`: a part of a disk into a new image.
//!
//! Operands are those of `qemu-img dd`, and so is what they mean: `count` blocks end the part that is copied,
//! counted from the disk's beginning, `skip` blocks of it are left out. With `--json` an object as `convert --json`
//! prints it.

use crate::args;
use crate::convert::{self, Window};
use anyhow::{Result, anyhow, bail};
use block::size;
use image::Format;

/// What the operands say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Operands {
    input: Option<String>,
    output: Option<String>,
    block: Option<u64>,
    count: Option<u64>,
    skip: Option<u64>,
}

impl Operands {
    fn parse(texts: &[String]) -> Result<Self> {
        let mut found = Self::default();
        for text in texts {
            let Some((key, value)) = text.split_once('=') else {
                bail!("{text}: give it as key=value: if=FILE of=FILE bs=SIZE count=N skip=N");
            };
            let number = || size::parse(value).map_err(|error| anyhow!("{key}={value}: {error}"));
            match key {
                "if" => found.input = Some(value.to_owned()),
                "of" => found.output = Some(value.to_owned()),
                "bs" => match number()? {
                    0 => bail!("bs=0: a block has at least a byte"),
                    bytes => found.block = Some(bytes),
                },
                "count" => found.count = Some(number()?),
                "skip" => found.skip = Some(number()?),
                _ => bail!("{key}: there is no such operand: if, of, bs, count and skip are"),
            }
        }
        Ok(found)
    }

    /// The part of the disk that is copied.
    fn window(&self) -> Window {
        let block = self.block.unwrap_or(512);
        let bytes = |blocks: u64| blocks.saturating_mul(block);
        let skip = bytes(self.skip.unwrap_or(0));
        let end = self.count.map_or(u64::MAX, bytes);
        Window {
            skip,
            len: end.saturating_sub(skip),
        }
    }
}

/// Copies a part of a disk.
pub fn run(args: &args::Dd) -> Result<()> {
    let operands = Operands::parse(&args.operands)?;
    let (Some(input), Some(output)) = (&operands.input, &operands.output) else {
        bail!("say what to copy, and where: if=FILE of=FILE");
    };
    let copy = args::Convert {
        format: args.format,
        target_format: Some(args.target_format.unwrap_or(Format::Raw)),
        force_share: args.force_share,
        moving: args::Moving {
            allow_backing: args.allow_backing.clone(),
            keys: args.keys.clone(),
            json: args.json,
            quiet: args.quiet,
            progress: args.progress,
            ..args::Moving::default()
        },
        ..args::Convert::of(input, output)
    };
    convert::copy(&copy, Some(operands.window()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_those_of_qemu_img() {
        let parse = |text: &str| {
            let texts: Vec<String> = text.split(' ').map(str::to_owned).collect();
            Operands::parse(&texts)
        };
        for (text, skip, len) in [
            ("if=a of=b", 0, u64::MAX),
            ("if=a of=b bs=1M count=3 skip=2", 2 << 20, 1 << 20),
            ("if=a of=b count=2 skip=3", 1536, 0),
            ("if=a of=b bs=1 skip=7 count=8", 7, 1),
        ] {
            assert_eq!(
                parse(text).unwrap().window(),
                Window { skip, len },
                "{text}"
            );
        }
        for text in ["if", "bs=0", "bs=x", "conv=sync", "seek=1"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
