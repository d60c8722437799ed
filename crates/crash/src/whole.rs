//! Operations on whole images in the middle of a workload.
//!
//! A step that is no request ([`crate::script`]) names one of [`OPERATIONS`]. The image is closed before and opened
//! again afterwards; the operation may lose power and fail at every step like all else.

use crate::judge;
use crate::model::{Model, SECTOR, Value, Write};
use crate::random::Random;
use crate::spec::{bytes, passphrase, second_passphrase};
use crate::world::World;
use block::{Error, Result, Storage};
use crypto::luks::{self, Erase};
use image::qcow2::bitmap::Bitmaps;
use image::qcow2::snapshot::{self, NewSnapshot};
use image::qcow2::{AmendOptions, Header, ImageWriter, amend, crypt, downgrade};
use image::{Format, vhd, vhdx};
use std::sync::Arc;
use tool::check::{CheckOptions, Repair};
use tool::commit::{commit, empty};
use tool::convert::{ConvertOptions, Target, convert};
use tool::prealloc::Preallocation;
use tool::rebase::{Link, copy_differences, set_backing};
use tool::resize::{ResizeOptions, resize};
use tool::source::Source;
use tool::work::{Stop, Work};

/// A closed image and its history.
pub struct Ground<'a> {
    /// Its disks.
    pub world: &'a World,
    model: &'a mut Model,
    begun: u64,
}

/// What an operation makes of the guest's disk.
#[derive(Clone, Debug)]
pub enum Effect {
    /// It reads as before.
    Nothing,
    /// It holds what it held at another time, a stamp for each sector: all of it at once.
    Content(Arc<[u64]>),
    /// It has another size.
    Size(u64),
}

type Operation = fn(&mut Ground, &[&str]) -> Result<Effect>;

/// What can be plugged into a workload: its name, and what it does.
///
/// Snapshots and bitmaps are saved under names of their own, so that a crash state's can be judged.
const OPERATIONS: &[(&str, Operation)] = &[
    ("check", check),
    ("snapshot-create", |ground, words| {
        let name = words[0].to_owned();
        ground.save(&name)?;
        let new = NewSnapshot {
            name,
            ..NewSnapshot::default()
        };
        snapshot::create(ground.file(), &new)?;
        Ok(Effect::Nothing)
    }),
    ("snapshot-apply", |ground, words| {
        snapshot::apply(ground.file(), words[0])?;
        let saved = ground.model.saved(words[0]).unwrap_or_default();
        Ok(Effect::Content(saved.into()))
    }),
    ("snapshot-delete", |ground, words| {
        snapshot::delete(ground.file(), words[0])?;
        Ok(Effect::Nothing)
    }),
    ("resize", |ground, words| {
        let size = bytes(words[0]).expect("a size");
        let preallocation = words.get(1).map_or(Ok(Preallocation::Off), |w| w.parse());
        let options = ResizeOptions {
            size,
            shrink: true,
            preallocation: preallocation?,
        };
        let chain = ground.world.open(false, None)?;
        resize(&chain.members(), ground.world.spec.format(), &options)?;
        Ok(Effect::Size(size))
    }),
    ("amend", |ground, words| {
        let number = |at: usize| words[at].parse().expect("a number");
        let options = match words[0] {
            "compat" => AmendOptions {
                version: Some(number(1)),
                ..AmendOptions::default()
            },
            "lazy_refcounts" => AmendOptions {
                lazy_refcounts: Some(words[1] == "on"),
                ..AmendOptions::default()
            },
            "data_file_raw" => AmendOptions {
                data_file_raw: Some(words[1] == "on"),
                ..AmendOptions::default()
            },
            _ => AmendOptions {
                refcount_bits: Some(number(1)),
                ..AmendOptions::default()
            },
        };
        amend(ground.file(), "image", &options)?;
        Ok(Effect::Nothing)
    }),
    ("downgrade", |ground, _| {
        downgrade(ground.file(), "image")?;
        Ok(Effect::Nothing)
    }),
    ("bitmap-add", |ground, words| {
        ground.save(words[0])?;
        bitmaps(ground, |bitmaps| {
            bitmaps.add(words[0].as_bytes(), Some(4096))
        })
    }),
    ("bitmap-clear", |ground, words| {
        ground.save(words[0])?;
        bitmaps(ground, |bitmaps| bitmaps.clear(words[0].as_bytes()))
    }),
    ("bitmap-disable", |ground, words| {
        bitmaps(ground, |bitmaps| {
            bitmaps.set_enabled(words[0].as_bytes(), false)
        })
    }),
    ("bitmap-merge", |ground, words| {
        bitmaps(ground, |bitmaps| {
            let mut source = bitmaps.stored(words[1].as_bytes())?;
            bitmaps.merge(words[0].as_bytes(), &mut source)
        })
    }),
    ("bitmap-remove", |ground, words| {
        bitmaps(ground, |bitmaps| bitmaps.remove(words[0].as_bytes()))
    }),
    ("key-add", |ground, _| {
        let (offset, mut luks) = keys(ground)?;
        let (_, key) = luks.unlock(ground.file(), offset, &passphrase())?;
        luks.add_key(ground.file(), offset, &key, &second_passphrase(), None, 1)?;
        Ok(Effect::Nothing)
    }),
    ("key-erase", |ground, _| {
        let (offset, mut luks) = keys(ground)?;
        let which = Erase::Opened(&second_passphrase());
        luks.erase_keys(ground.file(), offset, which, false)?;
        Ok(Effect::Nothing)
    }),
    ("repair", damage_and_repair),
    ("convert", convert_again),
    ("commit", commit_and_empty),
    ("pack", pack_in_place),
    ("rebase", copy_for_rebase),
    ("link", link_anew),
    ("create", |ground, _| {
        ground.model.absent(ground.begun);
        image::qcow2::create(ground.file(), &ground.world.spec.create)?;
        ground.model.present(ground.world.clock.tick());
        let content = ground.world.content()?;
        Ok(Effect::Content(judge::stamps(&content).into()))
    }),
];

/// The image's LUKS header, and where it is.
fn keys(ground: &Ground) -> Result<(u64, luks::Header)> {
    match ground.world.spec.format() {
        Format::Luks => Ok((0, image::luks::header(ground.file())?)),
        _ => crypt::luks_header(ground.file(), &Header::read(ground.file())?),
    }
}

/// Damages refcounts and COPIED flags, and repairs that.
fn damage_and_repair(ground: &mut Ground, _: &[&str]) -> Result<Effect> {
    damage(ground)?;
    check(ground, &["repair"])?;
    ground.model.mended(ground.world.clock.tick());
    Ok(Effect::Nothing)
}

/// Damages what a repair mends without losing anything, durably.
fn damage(ground: &mut Ground) -> Result<()> {
    let file: &dyn Storage = &**ground.world.image();
    let header = Header::read(file)?;
    let mut random = Random::new(ground.begun, 9);
    let begun = ground.world.clock.tick();
    ground.model.damaged(begun);
    let entries = |offset: u64, count: u64| -> Result<Vec<u64>> {
        let mut bytes = vec![0; count as usize * 8];
        file.read_at(offset, &mut bytes)?;
        let entries = bytes.chunks_exact(8);
        Ok(entries
            .map(|e| u64::from_be_bytes(e.try_into().expect("8 bytes")))
            .collect())
    };
    // The bits of entries that say where something is.
    let place = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
    let cluster = header.cluster_size();
    for block in entries(header.refcount_table_offset, cluster / 8)? {
        if block == 0 || random.once_in(3) {
            continue;
        }
        for _ in 0..1 + random.below(4) {
            let at = place(block) + random.below(cluster);
            file.write_at(at, &[[0, 0xff][random.below(2) as usize]])?;
        }
    }
    for table in entries(header.l1_table_offset, u64::from(header.l1_size))? {
        if table == 0 || random.once_in(3) {
            continue;
        }
        let words = if header.extended_l2() { 2 } else { 1 };
        let entries = entries(place(table), cluster / 8)?;
        for (at, entry) in (0..).zip(entries).step_by(words) {
            // Not of compressed clusters, whose bit it is.
            if place(entry) != 0 && entry >> 62 & 1 == 0 && random.once_in(8) {
                let flipped = (entry ^ 1 << 63).to_be_bytes();
                file.write_at(place(table) + at * 8, &flipped)?;
            }
        }
    }
    file.sync()
}

/// Writes the image anew over itself, compressed.
fn convert_again(ground: &mut Ground, _: &[&str]) -> Result<Effect> {
    ground.model.absent(ground.begun);
    let source = ground.world.copy().open(true, None)?;
    let mut below = source.clone();
    below.layers.remove(0);
    let mut create = ground.world.spec.create.clone();
    create.size = ground.model.size();
    let target = Target::Compressed {
        writer: Box::new(ImageWriter::new(ground.file(), &create)?),
    };
    let options = ConvertOptions {
        base: (!below.layers.is_empty()).then_some(&below),
        ..ConvertOptions::default()
    };
    let mut progress = |_| {};
    let mut work = Work::new(Stop::default(), &mut progress);
    convert(Source::new(&source)?, target, &options, &mut work)?;
    ground.model.present(ground.world.clock.tick());
    Ok(Effect::Nothing)
}

/// Puts what the image has into the one below, and takes it out of the image.
fn commit_and_empty(ground: &mut Ground, _: &[&str]) -> Result<Effect> {
    let above = ground.world.open(true, None)?.layers;
    let mut progress = |_| {};
    let mut work = Work::new(Stop::default(), &mut progress);
    commit(&above[..1], &|| ground.world.open_below(1), &mut work)?;
    empty(&ground.world.open(false, None)?.layers[0])?;
    Ok(Effect::Nothing)
}

/// Compresses clusters of the image where they are, so many of them at random, some of them again, and gives some up. In
/// between it is flushed.
fn pack_in_place(ground: &mut Ground, words: &[&str]) -> Result<Effect> {
    let count: u64 = words[0].parse().expect("a number");
    let mut random = Random::new(ground.begun, 10);
    let chain = ground.world.open(false, None)?;
    let cluster = ground.world.spec.create.cluster_size;
    let mut driver = chain.driver()?;
    let mut packer = driver.packer()?;
    let (size, mut packed) = (driver.size(), Vec::new());
    for _ in 0..count {
        let at = random.below(size.div_ceil(cluster)) * cluster;
        let mut bytes = vec![0; cluster as usize];
        let len = (size - at).min(cluster) as usize;
        driver.read(at, &mut bytes[..len])?;
        if !packer.pack(&bytes, &mut packed) {
            continue;
        }
        if random.once_in(8) {
            let given_up = driver.place_packed(at, packed.len() as u32)?;
            given_up.expect("nobody else writes").write(&packed)?;
        } else {
            driver.write_packed(at, &packed)?;
        }
        if random.once_in(6) {
            driver.flush()?;
        }
    }
    driver.close()?;
    Ok(Effect::Nothing)
}

/// Prepares the image for the backing file at the depth that is said, or with `none` for none, compressed or not: it must read on that as before.
/// Its name in the header is left alone, since the world has its own of what lies below an image.
fn copy_for_rebase(ground: &mut Ground, words: &[&str]) -> Result<Effect> {
    let depth: Option<usize> = words.first().and_then(|depth| depth.parse().ok());
    let whole = ground.world.open(true, None)?;
    let mut base = whole.clone();
    base.layers.drain(..depth.unwrap_or(base.layers.len()));
    let base = depth.is_some().then_some(&base);
    let mut progress = |_| {};
    let mut work = Work::new(Stop::default(), &mut progress);
    copy_differences(
        &ground.world.open(false, None)?,
        base,
        words.contains(&"compress"),
        &mut work,
    )?;
    let mut over = ground.world.open(true, None)?;
    over.layers.drain(1..depth.unwrap_or(over.layers.len()));
    let mut driver = over.driver()?;
    let mut bytes = vec![0; driver.size() as usize];
    driver.read(0, &mut bytes)?;
    let content = ground.world.content()?;
    match bytes
        .iter()
        .zip(&content)
        .position(|(now, then)| now != then)
    {
        None => Ok(Effect::Nothing),
        Some(at) => Err(Error::corrupt(format!(
            "on its new backing file it reads otherwise at {at:#x}"
        ))),
    }
}

/// Gives the image, which has one below it, another link to that, with so many bytes more in its name; or, with `none`, none
/// at all.
fn link_anew(ground: &mut Ground, words: &[&str]) -> Result<Effect> {
    let format = ground.world.spec.format();
    let layers = ground.world.open(true, None)?.layers;
    let id = layers.get(1).and_then(|below| below.image.unique_id());
    let name = ground.world.spec.create.backing.as_ref();
    let link = words[0].parse::<usize>().ok().map(|more| -> Result<Link> {
        let name = name.map_or("", |(name, _)| name);
        // It leads where it did.
        let (name, id) = (
            format!("{}{name}", "./".repeat(more / 2)),
            id.unwrap_or_default(),
        );
        let absolute = format!("/{name}");
        Ok(match format {
            Format::Vhd => Link::Vhd(vhd::NewParent {
                name,
                absolute,
                unique_id: vhd::UniqueId(id),
                timestamp: 1,
            }),
            Format::Vhdx => Link::Vhdx(vhdx::Locator::new(vhdx::Guid(id), &name, &absolute)?),
            Format::Vmdk => Link::Vmdk(name, image::vmdk::cid_of(&id).unwrap_or(0)),
            _ => Link::Named(name, layers[1].format),
        })
    });
    drop(layers);
    set_backing(ground.file(), format, link.transpose()?.as_ref())?;
    Ok(Effect::Nothing)
}

/// One edit of the bitmaps.
fn bitmaps(ground: &Ground, change: impl FnOnce(&mut Bitmaps) -> Result<()>) -> Result<Effect> {
    let mut bitmaps = Bitmaps::open(ground.file())?;
    change(&mut bitmaps)?;
    bitmaps.commit()?;
    Ok(Effect::Nothing)
}

fn check(ground: &mut Ground, words: &[&str]) -> Result<Effect> {
    let repair = match words {
        ["repair"] => Repair::All,
        ["leaks"] => Repair::Leaks,
        _ => Repair::No,
    };
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    let world = ground.world;
    let report = judge::check_image(&world.spec, &world.disks, &options)?;
    match report.corruptions + report.check_errors {
        0 => Ok(Effect::Nothing),
        _ => Err(Error::corrupt(format!("{:?}", report.findings))),
    }
}

/// Carries the operation `words` out.
///
/// # Errors
///
/// What it fails with; then its effect may be there or not.
///
/// # Panics
///
/// When there is no such operation.
pub fn run(ground: &mut Ground, words: &[String]) -> Result<()> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let found = OPERATIONS.iter().find(|(name, _)| words[0] == *name);
    let Some((_, operation)) = found else {
        panic!("'{}' is no operation on an image", words[0]);
    };
    let done = operation(ground, &words[1..]);
    let ended = ground.world.clock.tick();
    let begun = ground.begun;
    // An operation that failed may have had its effect; only this one has any so far.
    let sure = done.is_ok();
    let effect = match (&done, words[0]) {
        (Err(_), "snapshot-apply") => {
            Effect::Content(ground.model.saved(words[1]).unwrap_or_default().into())
        }
        (Err(_), "resize") => Effect::Size(bytes(words[1]).unwrap_or(0)),
        (Err(_), _) => Effect::Nothing,
        (Ok(effect), _) => effect.clone(),
    };
    match effect {
        Effect::Nothing => {}
        Effect::Content(stamps) => {
            let size = stamps.len() as u64 * SECTOR;
            if size != ground.model.size() {
                ground.model.resized(begun, ended, size, sure);
            }
            ground.model.begin(Write {
                first: 0,
                count: stamps.len() as u64,
                value: Value::Former(stamps),
                begun,
                ended: Some(ended),
                sure,
                durable: true,
            });
        }
        Effect::Size(size) => ground.model.resized(begun, ended, size, sure),
    }
    done.map(|_| ())
}

impl<'a> Ground<'a> {
    /// A closed image.
    pub fn new(world: &'a World, model: &'a mut Model) -> Self {
        let begun = world.clock.tick();
        Self {
            world,
            model,
            begun,
        }
    }

    /// The image's file.
    pub fn file(&self) -> &dyn Storage {
        &**self.world.image()
    }

    /// Keeps what the guest's disk holds under a name.
    fn save(&mut self, name: &str) -> Result<()> {
        let bytes = self.world.content()?;
        self.model.save(name, judge::stamps(&bytes));
        Ok(())
    }
}
