//! LUKS over raw: a disk that is encrypted as a whole (source: "LUKS1 On-Disk Format Specification" 1.2.3).
//!
//! ```text
//!   header │ key slots │ payload: the disk's sectors, each encrypted with its number on the disk
//! ```
//!
//! What `cryptsetup` makes with `--type luks1` and QEMU calls `luks`. As in raw images there is no metadata that changes, and
//! a flush is one barrier. What was never written reads as random bytes, since zeros in the file are none to the guest; so
//! does what a discard would punch, which therefore does nothing.
//!
//! A header whose payload is in another file (a *detached* one) says that it begins at byte 0, and is refused.

use crate::contract::{
    Description, Extent, ExtentKind, FileId, Image, Plan, Step, ZeroMode, ZeroPlan,
};
use crate::{Encryption, Method};
use block::{
    Context, Error, ErrorKind, GuestOffset, HostOffset, Result, Storage, align_up, limits,
};
use crypto::luks::{HEADER_LEN, Header, Volume};
use crypto::{Passphrase, SECTOR, SectorCipher};
use std::sync::Arc;

/// The first bytes of a file: LUKS of version 1, the only one that QEMU knows.
pub const MAGIC: [u8; 8] = *b"LUKS\xba\xbe\0\x01";

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// For reading only.
    pub read_only: bool,
    /// What opens one of its key slots; without it the data cannot be read.
    pub passphrase: Option<Arc<Passphrase>>,
}

/// An open image.
#[derive(Debug)]
pub struct Luks {
    name: String,
    size: u64,
    payload: u64,
    read_only: bool,
    encryption: Encryption,
}

/// The header at the beginning of `file`, whose payload is in the file too.
///
/// # Errors
///
/// [`block::ErrorKind::Corrupt`] and [`block::ErrorKind::Unsupported`] with field and byte.
pub fn header(file: &dyn Storage) -> Result<Header> {
    let named = || file.name();
    let mut bytes = [0; HEADER_LEN];
    let there = file.len()?.min(HEADER_LEN as u64) as usize;
    file.read_at(0, bytes.get_mut(..there).unwrap_or_default())?;
    // Before what follows from it, which such a header would contradict.
    let payload = bytes.get(104..108).unwrap_or_default();
    if bytes.starts_with(&MAGIC) && payload == [0; 4] {
        return Err(Error::unsupported(
            "LUKS header: payload offset at byte 104 is 0: a detached header, whose data are in another file: attach it \
             (cryptsetup luksHeaderBackup and luksHeaderRestore) or convert the volume with QEMU",
        )
        .within(file.name()));
    }
    let header = Header::parse(&bytes).context(named)?;
    // Where the materials are has been seen to.
    Header::read(file, 0, header.payload_offset).context(named)
}

impl Luks {
    /// Opens the image in `file`.
    ///
    /// # Errors
    ///
    /// As [`header`]; [`ErrorKind::Denied`] where the passphrase opens no key slot.
    pub fn open(file: &dyn Storage, options: &OpenOptions) -> Result<Self> {
        let name = file.name();
        let header = header(file)?;
        let payload = header.payload_offset;
        // As raw images, rounded up to whole sectors.
        let size = align_up(file.len()?.saturating_sub(payload), SECTOR as u64);
        let cipher = match options.passphrase.as_deref() {
            Some(passphrase) => {
                let (_, key) = header
                    .unlock(file, 0, passphrase)
                    .map_err(|error| error.within(&name))?;
                Some(Arc::new(SectorCipher::new(&header.suite, &key)?))
            }
            None => None,
        };
        Ok(Self {
            name,
            size,
            payload,
            read_only: options.read_only,
            encryption: Encryption {
                method: Method::Volume(header.into()),
                cipher,
            },
        })
    }

    fn host(&self, at: GuestOffset) -> HostOffset {
        HostOffset(self.payload + at.0)
    }

    fn check_writable(&self) -> Result<()> {
        match self.read_only {
            false => Ok(()),
            true => Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{}: is open for reading only", self.name),
            )),
        }
    }
}

/// Makes an image with a disk of `size` bytes, rounded up to whole sectors, in `file`, which is empty but for what may have
/// been set aside for its payload. The header is durable last.
///
/// # Errors
///
/// [`ErrorKind::Unsupported`] for a disk that is too large, and what writing fails with: the file holds no image then.
pub fn create(file: &dyn Storage, volume: &Volume, size: u64) -> Result<()> {
    let end = file_bytes(volume.len(), size)?;
    let written = || -> Result<()> {
        file.write_at(0, &[0; HEADER_LEN])?;
        if file.len()? < end {
            file.set_len(end)?;
        }
        volume.write_material(file, 0)?;
        file.sync()?;
        file.write_at(0, &volume.header.encode())?;
        file.sync()
    };
    written().context(|| format!("{}: create", file.name()))
}

/// Bytes of the file of a disk of `size` bytes behind a header of `header` bytes.
///
/// # Errors
///
/// [`ErrorKind::Unsupported`] where no file can have as many.
pub fn file_bytes(header: u64, size: u64) -> Result<u64> {
    let end = size.checked_next_multiple_of(SECTOR as u64);
    let end = end.and_then(|bytes| bytes.checked_add(header));
    end.filter(|end| *end <= limits::DISK_BYTES_MAX)
        .ok_or_else(|| {
            Error::unsupported(format!(
                "a disk of {size} bytes is too large: the header takes {header} more, and a file has at most {}",
                limits::DISK_BYTES_MAX
            ))
        })
}

impl Image for Luks {
    fn describe(&self) -> Description {
        let locked = self.encryption.cipher.is_none();
        Description {
            read_only_because: locked
                .then(|| "it is encrypted, and was opened without its passphrase".to_owned()),
            facts: vec![("payload offset", format!("{:#x}", self.payload))],
            ..Description::new("luks", self.size, 1)
        }
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        Ok(Step::Done(Extent {
            len,
            kind: ExtentKind::Data {
                file: FileId::IMAGE,
                offset: self.host(at),
            },
        }))
    }

    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        self.check_writable()?;
        Ok(Step::Done(Plan::InPlace {
            file: FileId::IMAGE,
            offset: self.host(at),
            len,
        }))
    }

    fn plan_zero(&self, _: GuestOffset, len: u64, mode: ZeroMode) -> Result<Step<ZeroPlan>> {
        self.check_writable()?;
        Ok(Step::Done(match mode {
            ZeroMode::Discard => ZeroPlan::Skip { len },
            ZeroMode::Zero { .. } => ZeroPlan::Write { len },
        }))
    }

    fn encryption(&self) -> Option<&Encryption> {
        Some(&self.encryption)
    }
}
