//! An image in words.
//!
//! ```text
//!   size=1M cluster_size=4k refcount_bits=1 compat=0.10 extended_l2 lazy_refcounts zstd backing junk=256k
//!   qcow qed qed=2 vhd vhd=fixed vhdx vhdx=fixed vdi vdi=static vmdk vmdk=zeroed+single+split data_file data_file_raw luks filled compressed over cluster_size=64k size=700k compressed over raw
//! ```
//!
//! `qcow` is a qcow image of version 1 (clusters of 512 bytes over another image, else of 4 KiB: `cluster_size` is to say the
//! same); `qed` is a QED image, with tables of so many clusters; `vhd` a VHD image with blocks of the cluster size, over
//! another a differencing one; `vdi` a VDI image likewise, over nothing; `vmdk` one with grains of that size ([`vmdk`]). With `data_file` the guest's data are in a file of their own, with `luks` they are encrypted. `filled` and
//! `compressed` images hold something from the beginning, as it is or compressed where that makes it smaller.
//! `raw luks` is a raw image that is encrypted as a whole.
//! `over` begins the words of the image below, which is filled and may be `raw`; `backing` is a raw one that is a little
//! shorter. `junk` bytes follow the last cluster, as on a device that was used before.

use crate::vmdk;
use crypto::Passphrase;
use crypto::luks::{FormatOptions, Volume};
use image::qcow2::{Compression, CreateOptions};
use image::{Format, qcow, qed, vdi, vhd, vhdx};
use std::sync::Arc;

/// What the backing file is called in the image that is number `above` of the chain, 0 the active one.
pub fn backing(above: usize) -> String {
    match above {
        0 => "base".to_owned(),
        n => format!("base{n}"),
    }
}

/// What the data file is called in the image.
pub const DATA: &str = "data";

/// The passphrase of an encrypted image.
pub fn passphrase() -> Arc<Passphrase> {
    let passphrase = Passphrase::new(b"open sesame".to_vec().into());
    Arc::new(passphrase.expect("a passphrase that may be"))
}

/// Another one, of a key that is added and erased.
pub fn second_passphrase() -> Arc<Passphrase> {
    let passphrase = Passphrase::new(b"another one".to_vec().into());
    Arc::new(passphrase.expect("a passphrase that may be"))
}

/// An image to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// As the format wants it.
    pub create: CreateOptions,
    /// It is a raw image; of the options only the size counts.
    pub raw: bool,
    /// It is a qcow image of version 1; of the options only the size and the backing file count.
    pub qcow: bool,
    /// It is a QED image with tables of so many clusters; of the options only sizes and the backing file count.
    pub qed: Option<u64>,
    /// It is a VHD image of that type; of the options only sizes count.
    pub vhd: Option<vhd::DiskType>,
    /// It is a VDI image of that type; of the options only sizes count.
    pub vdi: Option<vdi::ImageType>,
    /// It is a VHDX image, fixed or not; of the options only sizes count.
    pub vhdx: Option<bool>,
    /// It is a VMDK image of that kind; of the options only sizes and the backing file count.
    pub vmdk: Option<vmdk::Kind>,
    /// What it holds from the beginning.
    pub content: Content,
    /// The image below.
    pub below: Option<Box<Spec>>,
    /// Bytes of rubbish behind the image.
    pub junk: u64,
}

/// What an image holds from the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing.
    Nothing,
    /// Something here and there.
    Filled,
    /// Likewise, compressed where that makes it smaller.
    Compressed,
}

impl Spec {
    /// Reads the words. The size is 1 MiB unless they say another.
    ///
    /// # Errors
    ///
    /// The word that means nothing.
    pub fn parse(words: &str) -> Result<Self, String> {
        let words: Vec<&str> = words.split_whitespace().collect();
        let mut images = words.split(|word| *word == "over");
        let top = Self::image(images.next().unwrap_or_default(), 1 << 20)?;
        let mut chain = vec![top];
        for words in images {
            let above = chain.last().map_or(0, |spec| spec.create.size);
            let mut spec = Self::image(words, above)?;
            if spec.content == Content::Nothing {
                spec.content = Content::Filled;
            }
            chain.push(spec);
        }
        let mut below: Option<Spec> = None;
        let depths = (0..chain.len()).rev();
        for (above, mut spec) in depths.zip(chain.into_iter().rev()) {
            // `backing` has put one there.
            let lower = below.take().map(Box::new).or(spec.below.take());
            if let Some(lower) = &lower {
                let format = lower.format().qemu_name();
                spec.create.backing = Some((backing(above), format.to_owned()));
            }
            spec.below = lower;
            below = Some(spec);
        }
        below.ok_or_else(|| "no image".to_owned())
    }

    /// One image of a chain, of `size` bytes unless the words say another.
    fn image(words: &[&str], size: u64) -> Result<Self, String> {
        let mut spec = Self {
            create: CreateOptions {
                size,
                ..CreateOptions::default()
            },
            raw: false,
            qcow: false,
            qed: None,
            vhd: None,
            vdi: None,
            vhdx: None,
            vmdk: None,
            content: Content::Nothing,
            below: None,
            junk: 0,
        };
        let create = &mut spec.create;
        let mut backing = false;
        for word in words {
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
                "raw" => spec.raw = true,
                "qcow" => spec.qcow = true,
                "qed" => spec.qed = Some(if value.is_empty() { 4 } else { number()? }),
                "vhd" => {
                    spec.vhd = Some(match value {
                        "fixed" => vhd::DiskType::Fixed,
                        _ => vhd::DiskType::Dynamic,
                    });
                }
                "vdi" => {
                    spec.vdi = Some(match value {
                        "static" => vdi::ImageType::Static,
                        _ => vdi::ImageType::Dynamic,
                    });
                }
                "vmdk" => spec.vmdk = Some(vmdk::Kind::parse(value)),
                "vhdx" => spec.vhdx = Some(value == "fixed"),
                "filled" => spec.content = Content::Filled,
                "compressed" => spec.content = Content::Compressed,
                "backing" => backing = true,
                "junk" => spec.junk = number()?,
                _ => return Err(format!("'{word}' says nothing about an image")),
            }
        }
        if backing {
            // Ends inside a cluster, before the disk does.
            let size = spec.create.size / 8 * 7 / 512 * 512 + 512;
            let mut raw = Self::image(&["raw"], size)?;
            raw.content = Content::Filled;
            spec.below = Some(Box::new(raw));
        }
        Ok(spec)
    }

    /// What it is.
    pub fn format(&self) -> Format {
        match self {
            Spec { raw: true, .. } if self.create.encryption.is_some() => Format::Luks,
            Spec { raw: true, .. } => Format::Raw,
            Spec { qcow: true, .. } => Format::Qcow,
            Spec { qed: Some(_), .. } => Format::Qed,
            Spec { vhd: Some(_), .. } => Format::Vhd,
            Spec { vhdx: Some(_), .. } => Format::Vhdx,
            Spec { vdi: Some(_), .. } => Format::Vdi,
            Spec { vmdk: Some(_), .. } => Format::Vmdk,
            _ => Format::Qcow2,
        }
    }

    /// How a VDI image is made.
    pub fn vdi(&self, image_type: vdi::ImageType) -> vdi::CreateOptions {
        vdi::CreateOptions {
            size: self.create.size,
            image_type,
            // Blocks are smaller than 4 GiB.
            block_bytes: self.create.cluster_size as u32,
        }
    }

    /// How a VHD image is made, over what has that unique id.
    pub fn vhd(&self, disk_type: vhd::DiskType, below: vhd::UniqueId) -> vhd::CreateOptions {
        let parent = self
            .create
            .backing
            .as_ref()
            .map(|(name, _)| vhd::NewParent {
                name: name.clone(),
                absolute: format!("/{name}"),
                unique_id: below,
                timestamp: 0,
            });
        vhd::CreateOptions {
            size: self.create.size,
            disk_type: match parent {
                Some(_) => vhd::DiskType::Differencing,
                None => disk_type,
            },
            force_size: true,
            // Blocks are smaller than 4 GiB.
            block_bytes: self.create.cluster_size as u32,
            parent,
        }
    }

    /// How a VHDX image is made, over what has that DataWriteGuid.
    ///
    /// # Errors
    ///
    /// For a name of the image below that the format cannot hold.
    pub fn vhdx(
        &self,
        fixed: bool,
        below: Option<vhdx::Guid>,
    ) -> block::Result<vhdx::CreateOptions> {
        let parent = self.create.backing.as_ref().zip(below);
        let parent =
            parent.map(|((name, _), id)| vhdx::Locator::new(id, name, &format!("/{name}")));
        Ok(vhdx::CreateOptions {
            size: self.create.size,
            fixed,
            block_bytes: Some(self.create.cluster_size),
            parent: parent.transpose()?,
            ..vhdx::CreateOptions::default()
        })
    }

    /// How a qcow image is made.
    pub fn qcow(&self) -> qcow::CreateOptions {
        let backing = self.create.backing.as_ref();
        qcow::CreateOptions {
            size: self.create.size,
            backing: backing.map(|(name, _)| name.clone()),
        }
    }

    /// How a QED image is made.
    pub fn qed(&self, table_size: u64) -> qed::CreateOptions {
        let backing = self.create.backing.as_ref();
        qed::CreateOptions {
            size: self.create.size,
            cluster_size: self.create.cluster_size,
            table_size,
            backing: backing.map(|(name, format)| (name.clone(), format == "raw")),
        }
    }

    /// What its files beside the first are called.
    pub fn parts(&self) -> Vec<String> {
        let parts = self.vmdk.map_or(0, vmdk::Kind::parts);
        let parts = (0..parts).map(|nth| format!("part{nth}"));
        self.create.data_file.iter().cloned().chain(parts).collect()
    }

    /// The images of the chain, the active one first.
    pub fn chain(&self) -> impl Iterator<Item = &Spec> {
        std::iter::successors(Some(self), |spec| spec.below.as_deref())
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
        let below = spec.below.unwrap();
        assert_eq!((below.create.size, spec.junk), ((7 << 18) + 512, 8192));
        assert!(below.raw && below.content == Content::Filled);
        let spec = Spec::parse("over cluster_size=2k compressed size=9k over raw").unwrap();
        let names: Vec<_> = spec.chain().map(|s| s.create.backing.clone()).collect();
        let name = |name: &str, format: &str| Some((name.to_owned(), format.to_owned()));
        assert_eq!(names, [name("base", "qcow2"), name("base1", "raw"), None]);
        let sizes: Vec<_> = spec.chain().map(|s| s.create.size).collect();
        assert_eq!(sizes, [1 << 20, 9 << 10, 9 << 10]);
        assert!(Spec::parse("cluster=4k").is_err() && Spec::parse("size=x").is_err());
    }
}
