//! Bitmaps, or pages of numbers, of an image that is only read.

use super::Ask;
use super::bitmaps::{Bitmaps, Busy, Order, Uses};
use crate::Load;
use block::{Error, Result};
use std::sync::{Mutex, PoisonError};

/// Those of one image, as many as there are frames in memory, the ones that were asked for last.
#[derive(Debug)]
pub(crate) struct Reading {
    name: String,
    bitmaps: Bitmaps,
    uses: Mutex<Uses>,
}

impl Reading {
    /// Of the image `name`; else as [`Bitmaps::new`].
    pub(crate) fn new(name: String, count: u64, frames: usize, bits: u64, order: Order) -> Self {
        Self {
            name,
            bitmaps: Bitmaps::new(count, frames, bits, order),
            uses: Mutex::new(Uses::new(frames)),
        }
    }

    /// What `look` finds where bitmap `bitmap` is in memory. It is `len` bytes at byte `at` of the file.
    pub(crate) fn ask<T>(
        &self,
        bitmap: u64,
        (at, len): (u64, u32),
        look: impl Fn(&Bitmaps) -> Option<T>,
    ) -> Ask<T> {
        if let Some(found) = look(&self.bitmaps) {
            return Ok(found);
        }
        // The frame is the bitmap's only as long as the lock is held.
        let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = Busy {
            dirty: false,
            ticket: None,
        };
        uses.frame_of(&self.bitmaps, bitmap, idle, || Ok((at, len)))?;
        let lost = || Error::corrupt(format!("{}: no bitmap {bitmap}", self.name));
        Ok(look(&self.bitmaps).ok_or_else(lost)?)
    }

    /// The bytes of a bitmap that was asked for, or `None` where they could not be read.
    ///
    /// # Errors
    ///
    /// Nobody asked for it.
    pub(crate) fn end_load(&self, load: &Load, bytes: Option<&[u8]>) -> Result<()> {
        let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = uses.loaded(&self.bitmaps, load, bytes);
        let unasked = || Error::invalid(format!("{}: a load nobody asked for", self.name));
        loaded.map(|_| ()).ok_or_else(unasked)
    }
}
