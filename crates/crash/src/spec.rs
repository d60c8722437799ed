//! An image in words.
//!
//! ```text
//!   size=1M cluster_size=4k refcount_bits=1 compat=0.10 extended_l2 lazy_refcounts zstd backing junk=256k
//!   data_file data_file_raw luks
//! ```
//!
//! With `data_file` the guest's data are in a file of their own, with `luks` they are encrypted. With `backing` the image lies over a raw one that is a little shorter. `junk` bytes follow the last cluster, as
//! on a device that was used before.

use crypto::Passphrase;
use crypto::luks::{FormatOptions, Volume};
use image::qcow2::{Compression, CreateOptions};
use std::sync::Arc;

/// What the backing file is called in the image.
pub const BACKING: &str = "base";

/// What the data file is called in the image.
pub const DATA: &str = "data";

/// The passphrase of an encrypted image.
pub fn passphrase() -> Arc<Passphrase> {
    let passphrase = Passphrase::new(b"open sesame".to_vec().into());
    Arc::new(passphrase.expect("a passphrase that may be"))
}

/// An image to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// As the format wants it.
    pub create: CreateOptions,
    /// Bytes of the backing file, if any.
    pub backed: u64,
    /// Bytes of rubbish behind the image.
    pub junk: u64,
}

impl Spec {
    /// Reads the words. The size is 1 MiB unless they say another.
    ///
    /// # Errors
    ///
    /// The word that means nothing.
    pub fn parse(words: &str) -> Result<Self, String> {
        let mut spec = Self {
            create: CreateOptions {
                size: 1 << 20,
                ..CreateOptions::default()
            },
            backed: 0,
            junk: 0,
        };
        let create = &mut spec.create;
        let mut backing = false;
        for word in words.split_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || bytes(value).ok_or_else(|| format!("'{word}': what number is that"));
            match key {
                "size" => create.size = number()?,
                "cluster_size" => create.cluster_size = number()?,
                "refcount_bits" => create.refcount_bits = number()? as u32,
                "compat" => create.version = if value == "0.10" { 2 } else { 3 },
                "extended_l2" => create.extended_l2 = true,
                "lazy_refcounts" => create.lazy_refcounts = true,
                "data_file" => create.data_file = Some(DATA.to_owned()),
                "data_file_raw" => {
                    create.data_file = Some(DATA.to_owned());
                    create.data_file_raw = true;
                }
                "luks" => {
                    let options = FormatOptions {
                        iter_time_ms: 1,
                        ..FormatOptions::default()
                    };
                    let volume = Volume::format(&options, &passphrase());
                    create.encryption = Some(volume.map_err(|e| e.to_string())?);
                }
                "zstd" => create.compression = Compression::Zstd,
                "backing" => backing = true,
                "junk" => spec.junk = number()?,
                _ => return Err(format!("'{word}' says nothing about an image")),
            }
        }
        if backing {
            create.backing = Some((BACKING.to_owned(), "raw".to_owned()));
            // Ends inside a cluster, before the disk does.
            spec.backed = create.size / 8 * 7 / 512 * 512 + 512;
        }
        Ok(spec)
    }
}

/// `64k`, `1M`, `512`.
pub fn bytes(text: &str) -> Option<u64> {
    let (digits, unit) = match text.chars().last()? {
        'k' => (&text[..text.len() - 1], 1 << 10),
        'M' => (&text[..text.len() - 1], 1 << 20),
        'G' => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_options() {
        let spec = Spec::parse("cluster_size=4k refcount_bits=1 size=2M backing junk=8k").unwrap();
        assert_eq!(spec.create.cluster_size, 4096);
        assert_eq!(spec.create.refcount_bits, 1);
        assert_eq!((spec.backed, spec.junk), ((7 << 18) + 512, 8192));
        assert!(Spec::parse("cluster=4k").is_err() && Spec::parse("size=x").is_err());
    }
}
