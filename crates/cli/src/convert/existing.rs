//! A target that is there (`-n`).

use super::{Copied, Copying};
use anyhow::{Result, bail};
use crypto::Passphrase;
use disk::chain::{Chain, Layer};
use image::Format;
use std::sync::Arc;
use tool::work::Work;

impl Copying<'_> {
    /// Copies into the image that is there.
    pub(super) fn write_existing(
        &self,
        passphrases: Vec<Arc<Passphrase>>,
        work: &mut Work<'_>,
    ) -> Result<Copied> {
        // Opened for writing, raw has to be said.
        let chain = self.open(self.target, self.args.target_format, passphrases)?;
        let format = chain
            .layers
            .first()
            .map_or(Format::Raw, |layer| layer.format);
        if self.args.target_is_zero && chain.layers.len() > 1 {
            bail!("--target-is-zero: DST has a backing file, which it reads as");
        }
        if let Some(base) = &self.base {
            let below = |chain: &Chain, nth: usize| {
                let file = chain.layers.get(nth).and_then(|layer| layer.files.first());
                file.map(|file| file.identity()).transpose()
            };
            if below(&chain, 1)? != below(base, 0)? {
                bail!("-B: with -n it must be the backing file that DST has");
            }
            // The same bytes are another disk in another format.
            let kind = |chain: &Chain, nth: usize| chain.layers.get(nth).map(|l| l.format);
            match (kind(&chain, 1), kind(base, 0)) {
                (recorded, said) if recorded == said => {}
                (Some(recorded), Some(said)) => bail!(
                    "-F {said}: DST has its backing file as {recorded}: say -F {recorded}, or change that \
                     first (diskplane rebase -u)"
                ),
                _ => bail!("-B: with -n it must be the backing file that DST has"),
            }
        }
        self.refuse_sources(&chain)?;
        if self.args.compress && format != Format::Qcow2 {
            bail!("-c: into {format} images that are there no compressed clusters can be written");
        }
        let entries = self.bitmaps(format)?;
        let report = self.copy(&chain, self.args.target_is_zero, false, work)?;
        drop(chain);
        self.copy_bitmaps(self.target, &entries)?;
        Ok(self.copied(format, report, entries))
    }

    /// Refuses a target that is read from, too. Locks do, unless they are left out (`-U`).
    fn refuse_sources(&self, target: &Chain) -> Result<()> {
        let files = |layers: &[Layer]| -> block::Result<Vec<(u64, u64)>> {
            let files = layers.iter().flat_map(|layer| &layer.files);
            files.map(|file| file.identity()).collect()
        };
        let written = files(target.layers.get(..1).unwrap_or_default())?;
        for source in &self.sources {
            if files(&source.layers)?.iter().any(|id| written.contains(id)) {
                bail!(
                    "{}: is read from, too: it would be overwritten while it is copied",
                    self.target.display()
                );
            }
        }
        Ok(())
    }
}
