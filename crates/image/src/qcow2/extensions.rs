//! Header extensions: typed pieces of data between the header and the backing file's name.
//!
//! ```text
//!   0–3  type     4–7  length     8–n  data     n–m  padding to a multiple of 8
//! ```

use super::read_u32;
use block::{Error, Result};

/// Type: end of the extension area.
pub const END: u32 = 0;
/// Type: name of the backing file's format.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Type: feature name table.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Type: bitmaps.
pub const BITMAPS: u32 = 0x2385_2875;
/// Type: pointer to the LUKS header.
pub const CRYPTO_HEADER: u32 = 0x0537_be77;
/// Type: name of the external data file.
pub const DATA_FILE_NAME: u32 = 0x4441_5441;

/// One extension, kept as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// Parses the extensions in `area`, which starts at byte `base` of the file and ends
/// where the backing file's name (or else the first cluster) does.
///
/// A name that is there twice (of the backing file's format, of features) is the last one.
///
/// Fails with [`block::ErrorKind::Corrupt`] for data that runs out of the area and for a type which appears twice and
/// leads to something.
pub fn parse(area: &[u8], base: usize) -> Result<Vec<Extension>> {
    let mut found: Vec<Extension> = Vec::new();
    let mut at = 0;
    // Each turn consumes at least 8 bytes of at most 2 MiB.
    while let (Some(kind), Some(len)) = (read_u32(area, at), read_u32(area, at + 4)) {
        if kind == END {
            break;
        }
        let data = usize::try_from(len)
            .ok()
            .and_then(|len| area.get(at + 8..)?.get(..len))
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "header extension {kind:#010x} at byte {}: its {len} bytes run out of the header",
                    base + at
                ))
            })?;
        let once = matches!(kind, BITMAPS | CRYPTO_HEADER | DATA_FILE_NAME);
        if once && found.iter().any(|e| e.kind == kind) {
            return Err(Error::corrupt(format!(
                "header extension {kind:#010x} at byte {} is there a second time",
                base + at
            )));
        }
        // Names only: the last one counts, as in QEMU.
        if matches!(kind, BACKING_FORMAT | FEATURE_NAMES) {
            found.retain(|e| e.kind != kind);
        }
        found.push(Extension {
            kind,
            data: data.to_vec(),
        });
        at += 8 + data.len().next_multiple_of(8);
    }
    Ok(found)
}

/// Appends `extensions` and the end mark to `out`.
pub fn encode(extensions: &[Extension], out: &mut Vec<u8>) -> Result<()> {
    for extension in extensions {
        let len = u32::try_from(extension.data.len())
            .map_err(|_| Error::invalid("a header extension of 4 GiB or more"))?;
        out.extend_from_slice(&extension.kind.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(&extension.data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out.extend_from_slice(&[0; 8]);
    Ok(())
}
