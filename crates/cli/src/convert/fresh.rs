//! A target that is made.

use super::{Copied, Copying};
use crate::partial::Partial;
use crate::{create, encrypt, open, options};
use anyhow::{Result, bail};
use crypto::Passphrase;
use disk::chain::Layer;
use image::Format;
use io::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::{fs, sync::Arc};
use tool::convert::{Report, Target, convert};
use tool::prealloc::Preallocation;
use tool::work::Work;

/// The image that is written, before its data.
struct Made<'a> {
    path: &'a Path,
    format: Format,
    passphrases: Vec<Arc<Passphrase>>,
    /// It reads as zeros, or as its backing file.
    blank: bool,
    resume: bool,
    /// The host could not write all of it: what it reads as may not be on the disk.
    doubtful: bool,
}

impl Copying<'_> {
    /// Makes the image, and copies.
    pub(super) fn write_new(
        &self,
        below: Vec<Arc<Passphrase>>,
        work: &mut Work<'_>,
    ) -> Result<Copied> {
        let args = self.args;
        let format = create::format_of(args.target_format, self.target, "-O")?;
        let mut options = self.creation(format)?;
        let entries = self.bitmaps(format)?;
        if !entries.0.is_empty() && options.qcow2.version < 3 {
            bail!("--bitmaps: images of version 2 (compat=0.10) have none");
        }
        // A device is taken as it is, and stays where it is.
        let device = match fs::metadata(self.target) {
            _ if open::at_server(self.target).is_some() => true,
            Ok(metadata) if metadata.is_file() => bail!(create::exists(self.target)),
            found => found.is_ok(),
        };
        let mut passphrases = below;
        if matches!(format, Format::Qcow2 | Format::Luks)
            && let Some(passphrase) = self.target_passphrase(&options.encrypt)?
        {
            options.seal_with(format, &passphrase)?;
            options.qcow2.validate()?;
            passphrases.insert(0, passphrase);
        }
        if device && args.resume {
            bail!(
                "--resume: DST is a device or at a server, in which nothing tells how far a copy came"
            );
        }
        if device {
            let mut made = Made {
                path: self.target,
                format,
                passphrases,
                blank: !matches!(format, Format::Raw | Format::Luks),
                resume: false,
                doubtful: false,
            };
            let report = self.fill(&mut made, true, &options, work)?;
            self.copy_bitmaps(self.target, &entries)?;
            return Ok(self.copied(format, report, entries));
        }
        let mut partial = match args.resume {
            true => Partial::lasting(self.target),
            false => Partial::new(self.target),
        };
        if let Some(data) = self.data_file(&options) {
            // The image has another name until it is complete.
            create::refuse_as_data(self.target, &data)?;
            partial.add(data);
        }
        for extent in options
            .vmdk
            .files()
            .iter()
            .filter(|_| format == Format::Vmdk)
        {
            partial.add(self.target.with_file_name(block::name::path(&extent.name)));
        }
        let path = partial.path().to_owned();
        let mut made = Made {
            path: &path,
            format,
            passphrases,
            // Zeros in the file are not zeros of the disk there.
            blank: format != Format::Luks,
            resume: args.resume && self.goes_on(&path, format, &options)?,
            doubtful: false,
        };
        let report = self
            .fill(&mut made, false, &options, work)
            .map_err(|error| self.name_other(error))
            // Nobody is to see the name before all is there.
            .and_then(|report| self.copy_bitmaps(&path, &entries).map(|()| report))
            .map_err(|error| partial.name(error));
        if args.resume && made.doubtful {
            eprintln!(
                "diskplane: note: {} is removed: the host failed to write it, and may show what is not on the disk",
                path.display()
            );
            partial.forget();
        }
        let report = report?;
        partial.finish()?;
        Ok(self.copied(format, report, entries))
    }

    /// Makes the target, unless it goes on with one, and copies.
    fn fill(
        &self,
        made: &mut Made<'_>,
        device: bool,
        options: &options::Options,
        work: &mut Work<'_>,
    ) -> Result<Report> {
        if self.args.compress || options.packs_always(made.format) {
            return self.compressed(made, device, options, work);
        }
        if !made.resume {
            create::write_all(made.path, made.format, options, &work.stop)?;
        }
        let passphrases = std::mem::take(&mut made.passphrases);
        let target = self.open(made.path, Some(made.format), passphrases)?;
        let report = self.copy(&target, made.blank && !made.resume, made.resume, work);
        let mut files = target.layers.first().into_iter().flat_map(|l| &l.files);
        made.doubtful = files.any(|file| file.sync_failure().is_some());
        report
    }

    /// What the new image is to be.
    fn creation(&self, format: Format) -> Result<options::Options> {
        let args = self.args;
        let mut options = options::parse(format, &args.options)?;
        if options.backing_file.is_some() || options.backing_format.is_some() {
            bail!("-o backing_file, backing_fmt: say -B and -F");
        }
        if let (Some(name), Some(backing)) = (&args.backing, args.backing_format) {
            create::refuse_backing("-B", format)?;
            options.set_backing(format, self.target, name, backing)?;
        }
        if format == Format::Vmdk {
            options.vmdk.name = create::file_name(self.target)?;
        }
        options.qcow2.extended_l2 = options.extended_l2.unwrap_or(false);
        options.settle(format, self.bytes)?;
        let streams = options.packs_always(format);
        if args.compress && format == Format::Vmdk && !streams {
            bail!(
                "-c: of vmdk images only streamOptimized ones have compressed grains: -o subformat=streamOptimized"
            );
        }
        if args.compress && !matches!(format, Format::Qcow2 | Format::Qcow | Format::Vmdk) {
            bail!("-c: {format} images have no compressed clusters");
        }
        if args.compress && options.preallocation != Preallocation::Off {
            bail!("-c and -o preallocation exclude each other");
        }
        if args.compress && options.encrypt.is_wanted() {
            bail!("-c and -o encrypt.…: compressed clusters would not be encrypted");
        }
        if args.resume && !matches!(format, Format::Raw | Format::Qcow2) {
            bail!("--resume: a {format} image cannot be gone on with; raw and qcow2 images can");
        }
        if args.resume && options.qcow2.data_file.is_some() {
            bail!(
                "--resume and -o data_file exclude each other: the data file has no other name to wait under"
            );
        }
        Ok(options)
    }

    fn data_file(&self, options: &options::Options) -> Option<PathBuf> {
        let directory = self.target.parent().unwrap_or(Path::new(""));
        let name = options.qcow2.data_file.as_ref();
        name.map(|name| directory.join(block::name::path(name)))
    }

    /// The passphrase that a new image is to be encrypted with, if it is to be.
    fn target_passphrase(&self, options: &encrypt::Options) -> Result<Option<Arc<Passphrase>>> {
        let is_encrypted = |layer: &Layer| layer.image.encryption().is_some();
        let mut layers = self.sources.iter().flat_map(|source| &source.layers);
        if options.is_wanted() && !options.names_secret() && layers.any(is_encrypted) {
            bail!(
                "-o encrypt.format=luks: SRC has a passphrase of its own: name the new one, \
                 --object secret,id=ID,file=FILE -o encrypt.key-secret=ID"
            );
        }
        options.passphrase(&self.args.moving.keys)
    }

    fn compressed(
        &self,
        made: &Made<'_>,
        device: bool,
        options: &options::Options,
        work: &mut Work<'_>,
    ) -> Result<Report> {
        let path = made.path;
        let open = OpenOptions {
            cache: self.args.moving.cache.unwrap_or_default(),
            ..OpenOptions::default()
        };
        let file = match device {
            true => open::open_file(path, &open)?,
            false => File::create_new(path, &open)?,
        };
        if device && !file.is_fixed() {
            bail!("{}: neither a file nor a block device", path.display());
        }
        let target = Target::Compressed {
            writer: options.sequential(made.format, &*file)?,
        };
        let source = self.source()?;
        Ok(convert(source, target, &self.options(), work)?)
    }
}
