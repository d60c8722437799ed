//! Operations on whole images in the middle of a workload.
//!
//! A step that is no request ([`crate::script`]) names one of [`OPERATIONS`]. The image is closed before and opened
//! again afterwards; the operation may lose power and fail at every step like all else.

use crate::model::{Model, SECTOR, Value, Write};
use crate::world::World;
use block::{Error, Result, Storage};
use std::sync::Arc;
use tool::check::{CheckOptions, Repair};

/// A closed image and its history.
pub struct Ground<'a> {
    /// Its disks.
    pub world: &'a World,
    model: &'a mut Model,
    begun: u64,
}

/// What an operation makes of the guest's disk.
pub enum Effect {
    /// It reads as before.
    Nothing,
    /// It holds what it held at another time, a stamp for each sector: all of it at once.
    Content(Arc<[u64]>),
    /// It has another size.
    Size(u64),
}

type Operation = fn(&mut Ground, &[&str]) -> Result<Effect>;

/// What can be plugged into a workload: its name, and what it does.
const OPERATIONS: &[(&str, Operation)] = &[("check", |ground, words| {
    let repair = match words {
        ["repair"] => Repair::All,
        ["leaks"] => Repair::Leaks,
        _ => Repair::No,
    };
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    let report = tool::check::check(ground.file(), &options)?;
    match report.corruptions + report.check_errors {
        0 => Ok(Effect::Nothing),
        _ => Err(Error::corrupt(format!("{:?}", report.findings))),
    }
})];

/// Carries the operation `words` out.
///
/// # Errors
///
/// What it fails with; then its effect may be there or not.
///
/// # Panics
///
/// When there is no such operation.
pub fn run(ground: &mut Ground, words: &[String]) -> Result<()> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let found = OPERATIONS.iter().find(|(name, _)| words[0] == *name);
    let Some((_, operation)) = found else {
        panic!("'{}' is no operation on an image", words[0]);
    };
    let done = operation(ground, &words[1..]);
    let ended = ground.world.clock.tick();
    let begun = ground.begun;
    match done? {
        Effect::Nothing => {}
        Effect::Content(stamps) => {
            ground.model.begin(Write {
                first: 0,
                count: stamps.len() as u64,
                value: Value::Former(stamps),
                begun,
                ended: Some(ended),
                sure: true,
                durable: true,
            });
        }
        Effect::Size(size) => ground.model.resized(begun, ended, size, true),
    }
    Ok(())
}

impl<'a> Ground<'a> {
    /// A closed image.
    pub fn new(world: &'a World, model: &'a mut Model) -> Self {
        let begun = world.clock.tick();
        Self {
            world,
            model,
            begun,
        }
    }

    /// The image's file.
    pub fn file(&self) -> &dyn Storage {
        &**self.world.image()
    }

    /// What the guest's disk holds: a stamp for each sector.
    ///
    /// # Errors
    ///
    /// What reading it fails with.
    pub fn content(&self) -> Result<Arc<[u64]>> {
        let bytes = self.world.content()?;
        let sectors = bytes.chunks(SECTOR as usize);
        let stamps = sectors.map(|s| s.first_chunk().map_or(0, |w| u64::from_le_bytes(*w)));
        Ok(stamps.collect())
    }
}
