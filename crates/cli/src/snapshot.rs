//! `diskplane snapshot`.
//!
//! The flags are those of `qemu-img snapshot`. With `--json` a list is an array of objects, and what was made, applied
//! or deleted is one object; fields are named as in `qemu-img info --output=json`:
//!
//! | field | |
//! |---|---|
//! | `id`, `name` | of the snapshot |
//! | `vm-state-size` | bytes of VM state; 0 for the disk alone |
//! | `date-sec`, `date-nsec` | when it was made, since 1970, UTC |
//! | `vm-clock-sec`, `vm-clock-nsec` | for how long the VM had run |
//! | `icount` | instructions that the VM had executed; absent where they were not counted |
//! | `disk-size` | ours: bytes of the disk then; absent where the image does not say |

use crate::open::{self, Access};
use crate::{args, print, table};
use anyhow::{Context as _, Result, bail};
use block::{Storage, plain, size};
use image::Format;
use image::qcow2::snapshot::{self, NewSnapshot, Snapshot};
use serde::Serialize;
use std::time::{SystemTime, UNIX_EPOCH};

/// A snapshot, as `--json` prints it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Entry {
    id: String,
    name: String,
    vm_state_size: u64,
    date_sec: u32,
    date_nsec: u32,
    vm_clock_sec: u64,
    vm_clock_nsec: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    icount: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_size: Option<u64>,
}

impl From<&Snapshot> for Entry {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            id: snapshot.shown_id(),
            name: snapshot.shown_name(),
            vm_state_size: snapshot.vm_state_size(),
            date_sec: snapshot.date_sec,
            date_nsec: snapshot.date_nsec,
            vm_clock_sec: snapshot.vm_clock_nsec / NSEC,
            vm_clock_nsec: snapshot.vm_clock_nsec % NSEC,
            icount: snapshot.icount(),
            disk_size: snapshot.disk_size(),
        }
    }
}

const NSEC: u64 = 1_000_000_000;

/// Lists, makes, applies or deletes snapshots.
pub fn run(args: &args::Snapshot) -> Result<()> {
    let changes = args.create.is_some() || args.apply.is_some() || args.delete.is_some();
    let access = match changes {
        true => Access::Write,
        false => Access::reading(args.force_share),
    };
    let image = open::alone(
        &args.file,
        args.image_opts,
        &args.objects,
        args.format,
        access,
    )?;
    let (file, format) = (image.file, image.format);
    let shown = args.file.display();
    if format != Format::Qcow2 {
        bail!("{shown}: a {format} image has no internal snapshots; qcow2 images can have them");
    }
    let storage: &dyn Storage = &*file;
    if changes {
        crate::check::prepare(storage, Format::Qcow2)?;
    }
    let (done, snapshot) = match (&args.create, &args.apply, &args.delete) {
        (Some(name), ..) => ("created", snapshot::create(storage, &new(name)?)?),
        (_, Some(which), _) => ("applied", snapshot::apply(storage, which)?),
        (.., Some(which)) => ("deleted", snapshot::delete(storage, which)?),
        _ => return print(&listed(&snapshot::list(storage)?, args.json)?),
    };
    if args.quiet {
        return Ok(());
    }
    let entry = Entry::from(&snapshot);
    print(&match args.json {
        true => crate::json(&entry)?,
        false => format!(
            "{done} snapshot {} (id {})\n",
            plain(&entry.name),
            plain(&entry.id)
        ),
    })
}

pub fn new(name: &str) -> Result<NewSnapshot> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("the clock is before 1970")?;
    Ok(NewSnapshot {
        name: name.to_owned(),
        date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
        date_nsec: now.subsec_nanos(),
    })
}

fn listed(snapshots: &[Snapshot], json: bool) -> Result<String> {
    let entries: Vec<Entry> = snapshots.iter().map(Entry::from).collect();
    if json {
        return crate::json(&entries);
    }
    Ok(table(&entries))
}

/// For people: nothing where there are none.
pub fn table(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return String::new();
    }
    let mut table = table::bare();
    table.add_row(["id", "name", "VM state", "date (UTC)", "VM clock", "disk"]);
    for entry in entries {
        table.add_row([
            plain(&entry.id),
            plain(&entry.name),
            size::human(entry.vm_state_size),
            date(entry.date_sec),
            clock(entry.vm_clock_sec, entry.vm_clock_nsec),
            entry.disk_size.map(size::human).unwrap_or_default(),
        ]);
    }
    table::text(&table)
}

/// `2026-11-21 10:08:30`.
pub fn date(sec: u32) -> String {
    let (days, rest) = (i64::from(sec / 86400), sec % 86400);
    // Days since 0000-03-01, in eras of 400 years: leap days come last in such years.
    let day = days + 719_468;
    let era = day / 146_097;
    let of_era = day % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, over) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = era * 400 + year_of_era + over;
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// `0001:02:03.004`.
pub fn clock(sec: u64, nsec: u64) -> String {
    let (hour, minute, second) = (sec / 3600, sec / 60 % 60, sec % 60);
    format!("{hour:04}:{minute:02}:{second:02}.{:03}", nsec / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_and_clocks() {
        for (sec, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (951_868_800, "2000-03-01 00:00:00"),
            (1_795_255_710, "2026-11-21 10:08:30"),
            (u32::MAX, "2106-02-07 06:28:15"),
        ] {
            assert_eq!(date(sec), text);
        }
        assert_eq!(clock(3723, 4_000_000), "0001:02:03.004");
    }
}
