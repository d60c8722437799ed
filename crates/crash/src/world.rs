//! The disks of a machine, and how an image on them is opened.

use crate::judge::stamps;
use crate::model::{Model, SECTOR};
use crate::mutant::{self, Mutant};
use crate::random::Random;
use crate::spec::{Content, Spec, backing, passphrase};
use crate::vmdk;
use block::{Context, Error, Result, Storage};
use disk::{Chain, Layer};
use image::qcow2::{self, ImageWriter};
use image::{Format, Raw, Sequential, luks, qcow, qed, vdi, vhd, vhdx};
use io::{File, SimClock, SimDisk, SimOptions};
use std::sync::Arc;

/// The simulated disks that an image and what it refers to lie on.
#[derive(Clone, Debug)]
pub struct World {
    /// How the image was made.
    pub spec: Spec,
    /// Numbers what happens to the disks.
    pub clock: SimClock,
    /// The image's file; then its others, if it has any ([`Spec::parts`]), and the images below it.
    pub disks: Vec<Arc<SimDisk>>,
}

impl World {
    /// A fresh image. Nothing has happened to its disks yet.
    ///
    /// # Errors
    ///
    /// What creating it fails with.
    pub fn new(spec: &Spec, seed: u64) -> Result<Self> {
        let clock = SimClock::default();
        // The beginning of the model's history.
        clock.tick();
        clock.tick();
        let chain: Vec<&Spec> = spec.chain().collect();
        let mut below: Option<World> = None;
        for (depth, spec) in chain.into_iter().enumerate().rev() {
            below = Some(Self::over(spec, below, depth, seed, &clock)?);
        }
        let world = below.expect("a chain has an image");
        let disks = world.disks.iter().map(|disk| disk.copy()).collect();
        Ok(world.on(disks))
    }

    /// The image at `depth` of the chain over those `below`.
    fn over(
        spec: &Spec,
        below: Option<World>,
        depth: usize,
        seed: u64,
        clock: &SimClock,
    ) -> Result<Self> {
        let label = match depth {
            0 => "image".to_owned(),
            n => backing(n - 1),
        };
        let options = |label: String, salt| SimOptions {
            label,
            seed: seed.wrapping_add(salt),
            clock: clock.clone(),
            ..SimOptions::default()
        };
        let image = SimDisk::new(options(label.clone(), depth as u64));
        let mut disks = vec![Arc::clone(&image)];
        for (salt, name) in (77..).zip(spec.parts()) {
            let size = match spec.create.data_file {
                Some(_) => spec.create.size,
                None => 0,
            };
            disks.push(SimDisk::new(SimOptions {
                size,
                ..options(name, salt)
            }));
        }
        let own = disks.len();
        let below_vhd = below.as_ref().filter(|world| world.spec.vhd.is_some());
        let below_vhd = below_vhd.map(|world| Arc::clone(world.image()));
        let below_vhdx = below.as_ref().filter(|world| world.spec.vhdx.is_some());
        let below_vhdx = below_vhdx.map(|world| Arc::clone(world.image()));
        let below_vmdk = below.as_ref().filter(|world| world.spec.vmdk.is_some());
        let below_vmdk = below_vmdk.map(|world| vmdk::cid(&**world.image()));
        disks.extend(below.iter().flat_map(|world| world.disks.iter().cloned()));
        let mut world = Self {
            spec: spec.clone(),
            clock: clock.clone(),
            disks,
        };
        let mut random = Random::new(seed, 500 + depth as u64);
        let id = depth + 1;
        if let (true, Some(volume)) = (spec.raw, &spec.create.encryption) {
            luks::create(&*image, volume, spec.create.size)?;
            // What nobody has written reads as anything.
            let mut driver = world.open(false, None)?.driver()?;
            driver.write_zeroes(0, spec.create.size, false)?;
            driver.close()?;
        } else if spec.raw {
            image.set_len(spec.create.size)?;
        } else if spec.qcow {
            qcow::create(&*image, &spec.qcow())?;
        } else if let Some(table_size) = spec.qed {
            qed::create(&*image, &spec.qed(table_size))?;
        } else if let Some(disk_type) = spec.vhd {
            let parent = below_vhd.as_ref().map(|disk| vhd::Layout::read(&**disk));
            let parent = parent.transpose()?.map(|layout| layout.footer.unique_id);
            let parent = parent.unwrap_or(vhd::UniqueId::NONE);
            vhd::create(&*image, &spec.vhd(disk_type, parent))?;
        } else if let Some(image_type) = spec.vdi {
            vdi::create(&*image, &spec.vdi(image_type))?;
        } else if let Some(fixed) = spec.vhdx {
            let parent = below_vhdx.as_ref().map(|disk| vhdx::Layout::read(&**disk));
            let parent = parent.transpose()?;
            let parent = parent.map(|layout| layout.headers.current.data_write);
            vhdx::create(&*image, &spec.vhdx(fixed, parent)?)?;
        } else if let Some(kind) = spec.vmdk {
            vmdk::create(spec, kind, &world.disks[..own], below_vmdk.transpose()?)?;
        } else if spec.content != Content::Compressed {
            qcow2::create(&*image, &spec.create)?;
        }
        match spec.content {
            Content::Nothing => {}
            Content::Filled => world.fill(id, &mut random)?,
            Content::Compressed => world.compress(id, &mut random)?,
        }
        if spec.junk > 0 {
            let mut bytes = image.bytes();
            bytes.extend_from_slice(&Model::bytes(0xdead, 0, spec.junk / SECTOR));
            world.disks[0] = SimDisk::from_bytes(options(label, depth as u64), &bytes);
        }
        Ok(world)
    }

    /// Writes here and there, most of the disk.
    fn fill(&mut self, id: usize, random: &mut Random) -> Result<()> {
        let mut driver = self.open(false, None)?.driver()?;
        let sectors = driver.size() / SECTOR;
        let mut at = random.below(3);
        while at < sectors {
            let count = (1 + random.below(sectors / 4)).min(sectors - at);
            driver.write(at * SECTOR, &Model::bytes(id, at, count))?;
            let gap = random.below(sectors / 16 + 2).min(sectors - at - count);
            if random.once_in(3) && gap > 0 {
                driver.write_zeroes((at + count) * SECTOR, gap * SECTOR, true)?;
            }
            at += count + gap;
        }
        driver.close()
    }

    /// Makes the image with compressed clusters.
    fn compress(&mut self, id: usize, random: &mut Random) -> Result<()> {
        let mut writer: Box<dyn Sequential> = match self.spec.qcow {
            true => Box::new(qcow::ImageWriter::new(&*self.disks[0], &self.spec.qcow())?),
            false => Box::new(ImageWriter::new(&*self.disks[0], &self.spec.create)?),
        };
        let mut packer = writer.packer()?;
        let sectors = writer.cluster_size() / SECTOR;
        let end = self.spec.create.size / SECTOR;
        let mut packed = Vec::new();
        for guest in 0..writer.clusters() {
            let first = guest * sectors;
            let mut bytes = Model::bytes(id, first, sectors.min(end - first));
            bytes.resize((sectors * SECTOR) as usize, 0);
            match random.below(8) {
                0 => {}
                1 => writer.put_zero(guest)?,
                2 => writer.put_data(guest, &bytes)?,
                _ if packer.pack(&bytes, &mut packed) => {
                    writer.put_compressed(guest, &packed)?;
                }
                _ => writer.put_data(guest, &bytes)?,
            }
        }
        writer.finish()
    }

    /// The same image on other disks.
    pub fn on(&self, disks: Vec<Arc<SimDisk>>) -> Self {
        Self {
            disks,
            ..self.clone()
        }
    }

    /// The same image on copies of its disks.
    pub fn copy(&self) -> Self {
        self.on(self.disks.iter().map(|disk| disk.copy()).collect())
    }

    /// The image's file.
    pub fn image(&self) -> &Arc<SimDisk> {
        &self.disks[0]
    }

    /// The other files with their names.
    pub fn others(&self) -> impl Iterator<Item = (String, &Arc<SimDisk>)> {
        let chain = self.spec.chain().enumerate();
        let names = chain.flat_map(|(depth, spec)| {
            let first = depth.checked_sub(1).map(backing);
            first.into_iter().chain(spec.parts())
        });
        names.zip(self.disks.iter().skip(1))
    }

    /// Opens the image with what it lies over. A writer first brings one that was not closed in order, as the commands
    /// do.
    ///
    /// # Errors
    ///
    /// What opening it fails with.
    pub fn open(&self, read_only: bool, mutant: Option<Mutant>) -> Result<Chain> {
        self.open_chain((!read_only).then_some(0), mutant)
    }

    /// The images of the chain with their files, the image's own first.
    pub fn images(&self) -> impl Iterator<Item = (&Spec, &[Arc<SimDisk>])> {
        let mut disks = self.disks.as_slice();
        self.spec.chain().map(move |spec| {
            let files = 1 + spec.parts().len();
            let (own, below) = disks.split_at(files);
            disks = below;
            (spec, own)
        })
    }

    /// Opens the image at `depth` for writing with what it lies over, without those above it.
    ///
    /// # Errors
    ///
    /// What opening it fails with.
    pub fn open_below(&self, depth: usize) -> Result<Chain> {
        let mut chain = self.open_chain(Some(depth), None)?;
        chain.layers.drain(..depth);
        Ok(chain)
    }

    fn open_chain(&self, writable: Option<usize>, mutant: Option<Mutant>) -> Result<Chain> {
        let mut layers = Vec::new();
        // What lies below is written for a commit into it only.
        let keeps_id = writable.is_some_and(|depth| depth > 0);
        for (depth, (spec, disks)) in self.images().enumerate() {
            let own = disks.iter();
            let files: Vec<Arc<File>> = own
                .map(|disk| File::sim(Arc::clone(disk)))
                .collect::<Result<_>>()?;
            let file: &dyn Storage = &*files[0];
            match spec.format() {
                Format::Qcow2 if writable == Some(depth) => drop(tool::check::mend_dirty(file)?),
                Format::Qed if writable == Some(depth) => drop(tool::check::qed::mend(file)?),
                Format::Vhd if writable == Some(depth) => drop(vhd::mend(file)?),
                Format::Vdi if writable == Some(depth) => drop(vdi::mend(file)?),
                Format::Vhdx if writable == Some(depth) => drop(vhdx::mend(file)?),
                _ => {}
            }
            let (image, format): (Arc<dyn image::Image>, _) = if spec.format() == Format::Luks {
                let options = luks::OpenOptions {
                    read_only: writable != Some(depth),
                    passphrase: Some(passphrase()),
                };
                let image = luks::Luks::open(file, &options).context(|| "open")?;
                (Arc::new(image), Format::Luks)
            } else if spec.raw {
                (Arc::new(Raw::open(file)?), Format::Raw)
            } else if spec.qcow {
                let options = qcow::OpenOptions {
                    read_only: writable != Some(depth),
                    ..qcow::OpenOptions::default()
                };
                let image = qcow::Qcow::open(file, &options).context(|| "open")?;
                (Arc::new(image), Format::Qcow)
            } else if spec.qed.is_some() {
                let options = qed::OpenOptions {
                    read_only: writable != Some(depth),
                    ..qed::OpenOptions::default()
                };
                let image = qed::Qed::open(file, &options).context(|| "open")?;
                (Arc::new(image), Format::Qed)
            } else if spec.vhd.is_some() {
                let options = vhd::OpenOptions {
                    read_only: writable != Some(depth),
                    // As few bitmaps as there may be.
                    cache_bytes: Some(0),
                    size_from: None,
                };
                let image = vhd::Vhd::open(file, &options).context(|| "open")?;
                (Arc::new(image), Format::Vhd)
            } else if spec.vdi.is_some() {
                let options = vdi::OpenOptions {
                    read_only: writable != Some(depth),
                    // As few pages of the map as there may be.
                    cache_bytes: Some(0),
                };
                let image = vdi::Vdi::open(file, &options).context(|| "open")?;
                (Arc::new(image), Format::Vdi)
            } else if spec.vhdx.is_some() {
                let options = vhdx::OpenOptions {
                    read_only: writable != Some(depth),
                    cache_bytes: Some(0),
                    keeps_id,
                };
                let image = vhdx::Vhdx::open(file, &options).context(|| "open")?;
                (Arc::new(image), Format::Vhdx)
            } else if spec.vmdk.is_some() {
                let storages: Vec<&dyn Storage> = files.iter().map(|f| &**f as _).collect();
                let image =
                    vmdk::open(&storages, writable != Some(depth), keeps_id).context(|| "open")?;
                (Arc::new(image), Format::Vmdk)
            } else {
                let options = qcow2::OpenOptions {
                    read_only: writable != Some(depth),
                    passphrase: (spec.create.encryption.is_some()).then(passphrase),
                    ..qcow2::OpenOptions::default()
                };
                let image = qcow2::Qcow2::open(file, &options).context(|| "open")?;
                (Arc::new(image), Format::Qcow2)
            };
            if let Some(id) = image.unique_id()
                && let Some(parent) = layers.last().and_then(|above: &Layer| above.image.parent())
                && !parent.unique_ids.is_empty()
                && !parent.unique_ids.contains(&id)
            {
                return Err(Error::corrupt(format!(
                    "{}: is not the parent that the image above it means",
                    file.name()
                )));
            }
            layers.push(Layer {
                image: mutant::wrap(image, mutant.filter(|_| depth == 0)),
                path: file.name().into(),
                files,
                format,
                part: None,
            });
        }
        Ok(Chain::new(layers, writable.is_none()))
    }

    /// All that the guest sees, read by the blocking driver.
    ///
    /// # Errors
    ///
    /// What opening or reading fails with.
    pub fn content(&self) -> Result<Vec<u8>> {
        let mut driver = self.open(true, None)?.driver()?;
        let mut bytes = vec![0; driver.size() as usize];
        driver.read(0, &mut bytes).context(|| "read")?;
        Ok(bytes)
    }

    /// The history of the disk, with nothing in it but what it holds.
    ///
    /// # Errors
    ///
    /// As [`World::content`].
    pub fn model(&self) -> Result<Model> {
        let stamps = stamps(&self.content()?);
        Ok(Model::new(&stamps, self.spec.chain().count()))
    }
}
