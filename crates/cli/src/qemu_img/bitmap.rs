//! `qemu-img bitmap`.

use super::open::{self, Name};
use super::spec::Spec;
use crate::bitmap::Actions;
use crate::open::Access;
use anyhow::{Result, anyhow, bail};
use block::ErrorKind;
use clap::Args;
use image::Format;
use tool::bitmap::Action;

/// `bitmap`.
#[derive(Args, Debug)]
pub struct Bitmap {
    #[command(flatten)]
    pub(super) spec: Spec,
    #[command(flatten)]
    actions: Actions,
    /// sets non-default bitmap granularity for --add to this size
    #[arg(short, long, value_name = "SIZE[KMGTPE]")]
    granularity: Option<String>,
    /// select alternative source file for --merge
    #[arg(short = 'b', long, value_name = "SRC_FILENAME")]
    source_file: Option<String>,
    /// specify format for SRC_FILENAME explicitly
    #[arg(short = 'F', long, value_name = "SRC_FMT")]
    source_format: Option<String>,
    /// FILENAME BITMAP
    #[arg(value_name = "FILENAME BITMAP")]
    operands: Vec<String>,
}

/// Changes a bitmap.
pub fn run(args: &Bitmap) -> Result<u8> {
    let Actions(mut actions) = args.actions.clone();
    let granularity = args.granularity.as_deref();
    let granularity = granularity
        .map(|text| super::line::number("granularity", text, 1, i64::MAX as u64))
        .transpose()?;
    if actions.is_empty() {
        bail!("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge");
    }
    let adds = |action: &Action| matches!(action, Action::Add { .. });
    let merges = |action: &Action| matches!(action, Action::Merge { .. });
    if granularity.is_some() && !actions.iter().any(adds) {
        bail!("granularity only supported with --add");
    }
    if args.source_format.is_some() && args.source_file.is_none() {
        bail!("-F only supported with -b");
    }
    if args.source_file.is_some() && !actions.iter().any(merges) {
        bail!("Merge bitmap source file only supported with --merge");
    }
    let [file, bitmap] = args.operands.as_slice() else {
        bail!("Expecting filename and bitmap name");
    };
    for action in &mut actions {
        if let Action::Add { granularity: of_it } = action {
            *of_it = granularity;
        }
    }
    let name = args.spec.name(file);
    let (storage, format) = open::file(&name, Access::Write, &args.spec.objects)?;
    let source = args.source_file.as_deref().map(|text| {
        let name = Name {
            text,
            format: args.source_format.as_deref(),
            image_opts: false,
        };
        open::file(&name, Access::Read, &args.spec.objects)
    });
    let source = source.transpose()?;
    open::need_key(&name, &*storage, format, &args.spec.objects)?;
    let first = actions.first().map_or("add", said);
    let failed = |operation: &str, why: &dyn std::fmt::Display| {
        anyhow!("Operation {operation} on bitmap {bitmap} failed: {why}")
    };
    if format != Format::Qcow2 {
        let why = match actions.first() {
            Some(Action::Add { .. }) => {
                format!("Can't store persistent bitmaps to {file}: Operation not supported")
            }
            _ => format!("Dirty bitmap '{bitmap}' not found"),
        };
        return Err(failed(first, &why));
    }
    super::check::mend(&*storage, format)?;
    let below = match &source {
        Some((file, Format::Qcow2)) => Some(&**file as &dyn block::Storage),
        // It has no bitmaps.
        Some(_) => {
            let sought = actions.iter().find_map(|action| match action {
                Action::Merge { source } => Some(String::from_utf8_lossy(source)),
                _ => None,
            });
            let why = format!("Dirty bitmap '{}' not found", sought.unwrap_or_default());
            return Err(failed("merge", &why));
        }
        None => None,
    };
    // One by one, as qemu-img does: those before the one that fails stay done.
    for action in actions {
        let operation = said(&action);
        tool::bitmap::apply(
            &*storage,
            bitmap.as_bytes(),
            std::slice::from_ref(&action),
            below,
        )
        .map_err(|error| failed(operation, &in_qemus_words(&action, file, bitmap, &error)))?;
    }
    Ok(0)
}

/// The action's name.
fn said(action: &Action) -> &'static str {
    match action {
        Action::Add { .. } => "add",
        Action::Remove => "remove",
        Action::Clear => "clear",
        Action::Enable => "enable",
        Action::Disable => "disable",
        Action::Merge { .. } => "merge",
    }
}

fn in_qemus_words(action: &Action, file: &str, bitmap: &str, error: &block::Error) -> String {
    let text = error.to_string();
    match action {
        Action::Add { .. } if text.contains("the name of a bitmap has") => match bitmap {
            "" => "Bitmap name cannot be empty".to_owned(),
            _ => "Bitmap name is too long".to_owned(),
        },
        Action::Add { .. } if text.contains("of version 2 has no bitmaps") => format!(
            "Can't make bitmap '{bitmap}' persistent in '{file}': Cannot store dirty bitmaps in qcow2 v2 files"
        ),
        Action::Add { .. } if text.contains("has a bitmap") => {
            format!("Bitmap already exists: {bitmap}")
        }
        Action::Add { .. } if text.contains("a granularity of") => {
            "Granularity must be power of 2 and at least 512".to_owned()
        }
        _ if error.kind() == ErrorKind::NotFound => {
            let missing = text
                .rsplit_once("has no bitmap ")
                .map_or("", |(_, name)| name);
            format!("Dirty bitmap {missing} not found")
        }
        _ if text.contains("inconsistent") => {
            format!("Bitmap '{bitmap}' is inconsistent and cannot be used")
        }
        _ => text,
    }
}
