//! The disks of a machine, and how an image on them is opened.

use crate::model::Model;
use crate::mutant::{self, Mutant};
use crate::spec::{BACKING, DATA, Spec, passphrase};
use block::{Context, Result, Storage};
use disk::{Chain, Layer};
use image::{Format, Raw, qcow2};
use io::{File, SimClock, SimDisk, SimOptions};
use std::sync::Arc;

/// The simulated disks that an image and what it refers to lie on.
#[derive(Clone, Debug)]
pub struct World {
    /// How the image was made.
    pub spec: Spec,
    /// Numbers what happens to the disks.
    pub clock: SimClock,
    /// The image's file; then its data file and its backing file, if it has them.
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
        let options = |label: &str, salt| SimOptions {
            label: label.to_owned(),
            seed: seed.wrapping_add(salt),
            clock: clock.clone(),
            ..SimOptions::default()
        };
        let image = SimDisk::new(options("image", 0));
        qcow2::create(&*image, &spec.create)?;
        let mut bytes = image.bytes();
        let junk = Model::bytes(0xdead, 0, spec.junk / 512);
        bytes.extend_from_slice(&junk);
        let mut disks = vec![SimDisk::from_bytes(options("image", 0), &bytes)];
        if spec.create.data_file.is_some() {
            let data = SimDisk::new(SimOptions {
                size: spec.create.size,
                ..options(DATA, 2)
            });
            disks.push(data);
        }
        if spec.backed > 0 {
            let backing = Model::bytes(1, 0, spec.backed / 512);
            disks.push(SimDisk::from_bytes(options(BACKING, 1), &backing));
        }
        Ok(Self {
            spec: spec.clone(),
            clock,
            disks,
        })
    }

    /// The same image on other disks.
    pub fn on(&self, disks: Vec<Arc<SimDisk>>) -> Self {
        Self {
            disks,
            ..self.clone()
        }
    }

    /// The image's file.
    pub fn image(&self) -> &Arc<SimDisk> {
        &self.disks[0]
    }

    /// The other files with their names.
    pub fn others(&self) -> impl Iterator<Item = (&'static str, &Arc<SimDisk>)> {
        let data = self.spec.create.data_file.is_some().then_some(DATA);
        let backing = (self.spec.backed > 0).then_some(BACKING);
        let names = data.into_iter().chain(backing);
        names.zip(self.disks.iter().skip(1))
    }

    /// A file of that name.
    fn file(&self, name: &str) -> Result<Option<Arc<File>>> {
        let found = self.others().find(|(other, _)| *other == name);
        found
            .map(|(_, disk)| File::sim(Arc::clone(disk)))
            .transpose()
    }

    /// Opens the image with what it lies over. A writer first brings one that was not closed in order, as the
    /// command does.
    ///
    /// # Errors
    ///
    /// What opening it fails with.
    pub fn open(&self, read_only: bool, mutant: Option<Mutant>) -> Result<Chain> {
        let file = File::sim(Arc::clone(self.image()))?;
        let options = qcow2::OpenOptions {
            read_only,
            passphrase: (self.spec.create.encryption.is_some()).then(passphrase),
            ..qcow2::OpenOptions::default()
        };
        if !read_only {
            tool::check::mend_dirty(&*file)?;
        }
        let image = qcow2::Qcow2::open(&*file, &options).context(|| "open")?;
        let mut files = vec![file];
        files.extend(self.file(DATA)?);
        let mut layers = vec![Layer {
            image: mutant::wrap(Arc::new(image), mutant),
            files,
            path: "image".into(),
            format: Format::Qcow2,
        }];
        if let Some(file) = self.file(BACKING)? {
            let storage: &dyn Storage = &*file;
            layers.push(Layer {
                image: Arc::new(Raw::open(storage)?),
                files: vec![file],
                path: BACKING.into(),
                format: Format::Raw,
            });
        }
        Ok(Chain { layers, read_only })
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
}
