//! The images of a chain with their files, for any thread: bytes in and out of places that are known.

use super::{Member, usize_of};
use crate::crypt::SECTOR;
use block::faults::Event;
use block::{Error, ErrorKind, GuestOffset, HostOffset, Result, Storage, align_up};
use crypto::SectorCipher;
use image::{Compressed, Encryption, FileId};
use std::sync::Arc;

/// The images of a chain, the active one first.
#[derive(Clone, Debug)]
pub(super) struct Members(Arc<[Member]>);

impl Members {
    pub fn new(members: Vec<Member>) -> Self {
        Self(members.into())
    }

    pub fn first(&self) -> Option<&Member> {
        self.0.first()
    }

    /// Whether the two are of one driver.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub fn get(&self, depth: usize) -> Option<&Member> {
        self.0.get(depth)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn member(&self, depth: usize) -> Result<&Member> {
        self.0
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

    /// Asks the image at `depth` until it has an answer, doing what it needs in between.
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
            return read_padded(&*storage, offset, buf);
        };
        let cipher = cipher_of(encryption)?;
        let sector = encryption.sector(guest, offset);
        let skip = usize_of(offset.0 % SECTOR)?;
        let mut sectors = vec![0; usize_of(align_up((skip + buf.len()) as u64, SECTOR))?];
        read_padded(&*storage, HostOffset(offset.0 - skip as u64), &mut sectors)?;
        cipher.decrypt(sector, &mut sectors);
        let plain = sectors.iter().skip(skip);
        buf.iter_mut().zip(plain).for_each(|(to, from)| *to = *from);
        Ok(())
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
            return storage.write_at(offset.0, data);
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
        storage.write_at(start.0, &sectors)
    }

    pub fn unpack(&self, depth: usize, packed: &Compressed, out: &mut [u8]) -> Result<()> {
        let file = self.file(depth, packed.file)?;
        let there = file.len()?.saturating_sub(packed.offset.0);
        let mut input = vec![0; usize_of(u64::from(packed.len).min(there))?];
        file.event(Event::ReadCompressed);
        file.read_at(packed.offset.0, &mut input)?;
        let mut unpacked = vec![0; usize_of(u64::from(packed.unpacked_len))?];
        self.member(depth)?
            .image
            .decompress(&input, &mut unpacked)?;
        let skip = usize_of(u64::from(packed.skip))?;
        let part = unpacked
            .get(skip..)
            .and_then(|rest| rest.get(..out.len()))
            .ok_or_else(|| Error::corrupt("an extent runs out of its compressed cluster"))?;
        out.copy_from_slice(part);
        Ok(())
    }
}

/// The cipher of an image that was opened with its passphrase.
fn cipher_of(encryption: &Encryption) -> Result<&SectorCipher> {
    encryption.cipher.as_deref().ok_or_else(|| {
        let message = "the image is encrypted, and was opened without its passphrase";
        Error::new(ErrorKind::Denied, message)
    })
}

/// Reads from `file`; what lies behind its end are zeros.
pub(super) fn read_padded(file: &dyn Storage, offset: HostOffset, buf: &mut [u8]) -> Result<()> {
    let there = usize_of(file.len()?.saturating_sub(offset.0))?.min(buf.len());
    let (inside, behind) = buf.split_at_mut(there);
    behind.fill(0);
    if inside.is_empty() {
        return Ok(());
    }
    file.read_at(offset.0, inside)
}
