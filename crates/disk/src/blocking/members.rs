//! The images of a chain with their files, for any thread: bytes in and out of places that are known.

use super::cut_off::{self, CutOff};
use super::{Member, usize_of};
use crate::crypt::SECTOR;
use crate::unsynced::Unsynced;
use block::faults::Event;
use block::{Error, ErrorKind, GuestOffset, HostOffset, Result, Storage, align_up};
use crypto::SectorCipher;
use image::{Compressed, Encryption, FileId, Load};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of the largest cluster of which several are unpacked at a time.
const APART_MAX: u32 = 2 << 20;

/// An unpacked cluster: which one, and its bytes.
type Kept = ((usize, Compressed), Vec<u8>);

/// The images of a chain, the active one first.
#[derive(Clone, Debug)]
pub(super) struct Members {
    images: Arc<[Member]>,
    /// The compressed cluster that was unpacked last in part.
    kept: Arc<Mutex<Option<Kept>>>,
    /// Which files of the active image a barrier has to wait for.
    pub unsynced: Arc<Unsynced>,
    pub cut_off: CutOff,
}

impl Members {
    pub fn new(members: Vec<Member>) -> Self {
        let files = members.first().map_or(0, |first| first.files.len());
        Self {
            images: members.into(),
            kept: Arc::default(),
            unsynced: Arc::new(Unsynced::new(files)),
            cut_off: CutOff::default(),
        }
    }

    pub fn first(&self) -> Option<&Member> {
        self.images.first()
    }

    /// Whether the two are of one driver.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.images, &other.images)
    }

    pub fn get(&self, depth: usize) -> Option<&Member> {
        self.images.get(depth)
    }

    pub fn len(&self) -> usize {
        self.images.len()
    }

    pub fn member(&self, depth: usize) -> Result<&Member> {
        self.images
            .get(depth)
            .ok_or_else(|| Error::invalid(format!("the chain has no image {depth}")))
    }

    pub fn file(&self, depth: usize, file: FileId) -> Result<Arc<dyn Storage>> {
        let files = &self.member(depth)?.files;
        let found = files.get(usize::from(file.0));
        found.map(Arc::clone).ok_or_else(|| {
            Error::corrupt(format!("image {depth} of the chain has no file {}", file.0))
        })
    }

    /// Does `change` to one of the active image's files: barriers wait for it from then on.
    pub fn changing<T>(&self, file: FileId, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let done = change();
        // Of what failed a part may be there.
        self.unsynced.mark(usize::from(file.0));
        done
    }

    /// The table that `load` asks for. Of a file that does not grow (`fixed`) no byte of it can be missing; in one that does, what is
    /// missing (of formats that do not look for that when they are opened for writing) stays empty once it was looked at: what comes to
    /// lie there is no table.
    pub fn load(&self, depth: usize, load: &Load, fixed: bool) -> Result<Vec<u8>> {
        let file = self.file(depth, load.file)?;
        let mut bytes = vec![0; usize_of(u64::from(load.len))?];
        let there = read_padded(&*file, load.offset, &mut bytes)?;
        if there < bytes.len() && fixed && self.cut_off == CutOff::Refused {
            let image = &*self.member(depth)?.image;
            return Err(cut_off::table(
                image,
                &*file,
                load.offset,
                (there, bytes.len()),
            ));
        }
        Ok(bytes)
    }

    /// The bytes at `offset` of a file, decrypted where the image's data are encrypted.
    pub fn read_data(
        &self,
        depth: usize,
        file: FileId,
        guest: GuestOffset,
        offset: HostOffset,
        buf: &mut [u8],
    ) -> Result<()> {
        let storage = self.file(depth, file)?;
        let Some(encryption) = self.member(depth)?.image.encryption() else {
            let there = read_padded(&*storage, offset, buf)?;
            return self.judge(depth, &*storage, guest, offset, there, buf.len());
        };
        let cipher = cipher_of(encryption)?;
        let sector = encryption.sector(guest, offset);
        let skip = usize_of(offset.0 % SECTOR)?;
        let mut sectors = vec![0; usize_of(align_up((skip + buf.len()) as u64, SECTOR))?];
        let start = HostOffset(offset.0 - skip as u64);
        let there = read_padded(&*storage, start, &mut sectors)?;
        self.judge(
            depth,
            &*storage,
            guest,
            offset,
            there.saturating_sub(skip),
            buf.len(),
        )?;
        cipher.decrypt(sector, &mut sectors);
        let plain = sectors.iter().skip(skip);
        buf.iter_mut().zip(plain).for_each(|(to, from)| *to = *from);
        Ok(())
    }

    /// Refuses bytes of the disk, `len` at `offset` of a file, of which only the first `there` are in it.
    fn judge(
        &self,
        depth: usize,
        file: &dyn Storage,
        guest: GuestOffset,
        offset: HostOffset,
        there: usize,
        len: usize,
    ) -> Result<()> {
        if there == len || self.cut_off == CutOff::Zeros {
            return Ok(());
        }
        let end = file.len()?;
        let there = cut_off::there(end, offset, len as u64);
        match there == len as u64 {
            true => Ok(()),
            false => Err(cut_off::data(
                &*self.member(depth)?.image,
                file,
                guest.plus(there),
                offset.plus(there),
                end,
            )),
        }
    }

    /// Writes the active image's bytes at `offset` of a file, encrypted where its data are. Of a sector that is
    /// not wholly written the rest stays as it is.
    pub fn write_data(
        &self,
        file: FileId,
        guest: GuestOffset,
        offset: HostOffset,
        data: &[u8],
    ) -> Result<()> {
        let storage = self.file(0, file)?;
        let Some(encryption) = self.member(0)?.image.encryption() else {
            return self.changing(file, || storage.write_at(offset.0, data));
        };
        let cipher = cipher_of(encryption)?;
        let skip = usize_of(offset.0 % SECTOR)?;
        let mut sectors = vec![0; usize_of(align_up((skip + data.len()) as u64, SECTOR))?];
        let start = HostOffset(offset.0 - skip as u64);
        let sector = encryption.sector(guest, offset);
        if sectors.len() != data.len() {
            read_padded(&*storage, start, &mut sectors)?;
            cipher.decrypt(sector, &mut sectors);
        }
        let plain = sectors.iter_mut().skip(skip);
        plain.zip(data).for_each(|(to, from)| *to = *from);
        cipher.encrypt(sector, &mut sectors);
        self.changing(file, || storage.write_at(start.0, &sectors))
    }

    /// Reads a part of a compressed cluster: that from its `skip` on that `out` has room for.
    ///
    /// What never changes is kept, if another part of it may be asked for. Large clusters are unpacked one after the other:
    /// each takes up to three times its size of memory.
    pub fn unpack(&self, depth: usize, packed: &Compressed, out: &mut [u8]) -> Result<()> {
        let whole = out.len() as u64 == u64::from(packed.unpacked_len);
        if !packed.lasting || whole && packed.unpacked_len <= APART_MAX {
            return part_of(&self.unpacked(depth, packed)?, packed, out);
        }
        let mut kept = self.kept();
        if let Some((_, bytes)) = kept
            .as_ref()
            .filter(|((at, of), _)| *at == depth && of.is_of(packed))
        {
            return part_of(bytes, packed, out);
        }
        let bytes = if packed.unpacked_len > APART_MAX {
            // Its memory first.
            *kept = None;
            self.unpacked(depth, packed)?
        } else {
            drop(kept);
            let bytes = self.unpacked(depth, packed)?;
            kept = self.kept();
            bytes
        };
        part_of(&bytes, packed, out)?;
        *kept = Some(((depth, *packed), bytes));
        Ok(())
    }

    fn kept(&self) -> MutexGuard<'_, Option<Kept>> {
        // It holds a whole cluster or none, whoever panicked.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unpacked(&self, depth: usize, packed: &Compressed) -> Result<Vec<u8>> {
        let file = self.file(depth, packed.file)?;
        let there = file.len()?.saturating_sub(packed.offset.0);
        let mut input = vec![0; usize_of(u64::from(packed.len).min(there))?];
        file.event(Event::ReadCompressed);
        file.read_at(packed.offset.0, &mut input)?;
        let mut unpacked = vec![0; usize_of(u64::from(packed.unpacked_len))?];
        let image = &self.member(depth)?.image;
        let done = image.decompress(packed, &input, &mut unpacked);
        // What is packed may end before its last sector does, and the file with it: only where it cannot be unpacked
        // something is missing.
        done.map_err(|error| match (input.len() as u64) < u64::from(packed.len) {
            true => cut_off::packed(&**image, &*file, packed, error),
            false => error,
        })?;
        Ok(unpacked)
    }
}

/// The part of an unpacked cluster that was asked for.
fn part_of(unpacked: &[u8], packed: &Compressed, out: &mut [u8]) -> Result<()> {
    let skip = usize_of(u64::from(packed.skip))?;
    let part = unpacked
        .get(skip..)
        .and_then(|rest| rest.get(..out.len()))
        .ok_or_else(|| Error::corrupt("an extent runs out of its compressed cluster"))?;
    out.copy_from_slice(part);
    Ok(())
}

/// The cipher of an image that was opened with its passphrase.
fn cipher_of(encryption: &Encryption) -> Result<&SectorCipher> {
    encryption.cipher.as_deref().ok_or_else(|| {
        let message = "the image is encrypted, and was opened without its passphrase";
        Error::new(ErrorKind::Denied, message)
    })
}

/// Reads from `file`; what lies behind its end are zeros. Returns how many bytes lie before.
fn read_padded(file: &dyn Storage, offset: HostOffset, buf: &mut [u8]) -> Result<usize> {
    let there = usize_of(file.len()?.saturating_sub(offset.0))?.min(buf.len());
    let (inside, behind) = buf.split_at_mut(there);
    behind.fill(0);
    if !inside.is_empty() {
        file.read_at(offset.0, inside)?;
    }
    Ok(there)
}
