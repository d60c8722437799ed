//! Clusters of persistent bitmaps.

use super::counts::Role;
use super::tally::Severity;
use super::walk::Walk;
use block::Result;
use image::qcow2::check::{Bitmap, BitmapDirectory, DIRECTORY_ENTRY_BYTES, bitmap_data};

impl Walk<'_> {
    pub(super) fn bitmaps(&mut self) -> Result<()> {
        let image = self.image;
        let directory = match BitmapDirectory::of(&image.header, &image.layout) {
            None => return Ok(()),
            Some(Err(what)) => {
                self.unread(format!("header: the bitmaps extension {what}"));
                return Ok(());
            }
            Some(Ok(directory)) => directory,
        };
        let what = || "the bitmap directory".into();
        self.region(directory.offset, directory.len, Role::Own, 1, what);
        let (mut at, mut tables) = (0, 0);
        for nth in 0..directory.count {
            let mut fixed = [0; DIRECTORY_ENTRY_BYTES];
            let there = directory.len.saturating_sub(at);
            let part = fixed.len().min(there.min(64) as usize);
            let Some(part) = fixed.get_mut(..part) else {
                break;
            };
            self.source
                .read(directory.offset.saturating_add(at), part)?;
            let bitmap = match Bitmap::parse(part, &image.layout, image.header.size) {
                Ok(bitmap) if bitmap.len <= there => bitmap,
                Ok(_) => {
                    self.unread(format!(
                        "bitmap directory: entry {nth} ends behind the directory"
                    ));
                    return Ok(());
                }
                Err(what) => {
                    self.unread(format!("bitmap directory: entry {nth} {what}"));
                    return Ok(());
                }
            };
            at += bitmap.len;
            tables += u64::from(bitmap.entries) * 8;
            if tables > image.file_len {
                self.unread("bitmap directory: the tables are larger than the file".into());
                return Ok(());
            }
            self.bitmap(nth, &bitmap)?;
        }
        if at != directory.len {
            self.unread(format!(
                "bitmap directory: its {} entries have {at} bytes, not {}",
                directory.count, directory.len
            ));
        }
        Ok(())
    }

    /// Counts something that cannot be read, and with it the references that it may have.
    pub(super) fn unread(&mut self, what: String) {
        self.tally.unread.get_or_insert_with(|| what.clone());
        if self.first {
            self.tally.found(Severity::CheckError, 1, || what);
        }
    }

    fn bitmap(&mut self, nth: u32, bitmap: &Bitmap) -> Result<()> {
        let layout = self.image.layout;
        let len = u64::from(bitmap.entries) * 8;
        let what = || format!("the table of bitmap {nth}");
        self.region(bitmap.table, len, Role::Own, 1, what);
        let mut bytes = vec![0; len.min(1 << 16) as usize];
        let mut at = 0;
        while at < len && !self.counts.full() {
            let part = bytes.len().min((len - at) as usize);
            let Some(part) = bytes.get_mut(..part) else {
                break;
            };
            self.source.read(bitmap.table.saturating_add(at), part)?;
            for (index, raw) in part.as_chunks::<8>().0.iter().enumerate() {
                let raw = u64::from_be_bytes(*raw);
                let what = || {
                    let index = at / 8 + index as u64;
                    format!("bitmap {nth}: table entry {index} ({raw:#x})")
                };
                match bitmap_data(&layout, raw) {
                    None => self.unread(format!("{} is not sound", what())),
                    Some(0) => {}
                    Some(data) => self.region(data, layout.cluster(), Role::Own, 1, what),
                }
            }
            at += part.len() as u64;
        }
        Ok(())
    }
}
