//! `qemu-img snapshot`.

use super::info;
use super::line::usage;
use super::open::{self};
use super::spec::Image;
use crate::open::Access;
use crate::print;
use anyhow::{Result, anyhow, bail};
use block::ErrorKind;
use clap::Args;
use image::Format;
use image::qcow2::snapshot;

/// `snapshot`.
#[derive(Args, Debug)]
pub struct Snapshot {
    /// quiet operations
    #[arg(short, long)]
    quiet: bool,
    /// open image in shared mode for concurrent access
    #[arg(short = 'U', long)]
    force_share: bool,
    /// list snapshots in FILENAME (the default)
    #[arg(short, long)]
    list: bool,
    /// create named snapshot
    #[arg(short, long, value_name = "SNAPSHOT")]
    create: Option<String>,
    /// apply named snapshot to the base
    #[arg(short, long, value_name = "SNAPSHOT")]
    apply: Option<String>,
    /// delete named snapshot
    #[arg(short, long, value_name = "SNAPSHOT")]
    delete: Option<String>,
    #[command(flatten)]
    pub(super) image: Image,
}

/// Lists, makes, applies or deletes snapshots.
pub fn run(args: &Snapshot) -> Result<u8> {
    let named = [&args.create, &args.apply, &args.delete];
    let said = named.iter().filter(|name| name.is_some()).count() + usize::from(args.list);
    if said > 1 {
        return Err(usage("Cannot mix '-l', '-a', '-c', '-d'"));
    }
    let file = args.image.file()?;
    let name = args.image.spec.name(file);
    let changes = named.iter().any(|name| name.is_some());
    let access = match changes {
        true => Access::Write,
        false => Access::reading(args.force_share),
    };
    let (storage, format) =
        open::shared_file(&name, access, args.force_share, &args.image.spec.objects)?;
    let storage: &dyn block::Storage = &*storage;
    open::need_key(&name, storage, format, &args.image.spec.objects)?;
    let could_not = |what: &str, name: &str, error: &block::Error| {
        anyhow!("Could not {what} snapshot '{name}': {error}")
    };
    if format != Format::Qcow2 {
        let said = [
            ("create", &args.create),
            ("apply", &args.apply),
            ("delete", &args.delete),
        ];
        for (what, name) in said {
            if let Some(name) = name {
                bail!(
                    "Could not {what} snapshot '{name}': {}",
                    match what {
                        "create" => "Operation not supported",
                        "apply" => "Block driver does not support snapshots",
                        _ => "snapshot not found",
                    }
                );
            }
        }
        return Ok(0);
    }
    if changes {
        super::check::mend(storage, format)?;
    }
    if let Some(name) = &args.create {
        snapshot::create(storage, &crate::snapshot::new(name)?)
            .map_err(|error| could_not("create", name, &error))?;
    } else if let Some(name) = &args.apply {
        snapshot::apply(storage, name).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                anyhow!(
                    "Could not apply snapshot '{name}': Failed to load snapshot: No such file or directory"
                )
            }
            _ if error.to_string().contains("persistent bitmaps") => {
                anyhow!("Could not apply snapshot '{name}': Device has active dirty bitmaps")
            }
            _ => could_not("apply", name, &error),
        })?;
    } else if let Some(name) = &args.delete {
        // By its name alone, unlike in other places: an id in its place deletes nothing.
        snapshot::delete_named(storage, name).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                anyhow!("Could not delete snapshot '{name}': snapshot not found")
            }
            _ => could_not("delete", name, &error),
        })?;
    } else {
        let list = snapshot::list(storage)?;
        if !list.is_empty() {
            print(&info::snapshots(&info::snapshot_values(&list), ""))?;
        }
    }
    Ok(0)
}
