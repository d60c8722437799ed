//! Making an edit durable.

use super::{Editor, Progress};
use crate::qcow2::features;
use crate::qcow2::header::REFCOUNT_TABLE_BYTES_MAX;
use block::{Context, Error, Result};

impl Editor<'_> {
    /// Makes the edit durable and puts it in force: all of it, or nothing if the system crashes.
    /// Autoclear features that nobody knows are cleared. Afterwards a further edit may begin.
    ///
    /// # Errors
    ///
    /// What the host fails with. The image is as it was then, unless the header itself could not be
    /// written or made durable: then it is as it was or as it was to be, and sound.
    pub fn commit(&mut self) -> Result<()> {
        self.attempt(Self::commit_unnamed)
    }

    fn commit_unnamed(&mut self) -> Result<()> {
        self.header.autoclear &= features::AUTOCLEAR_KNOWN;
        if self.blocks.changed() {
            let (at, clusters) = self.place_table()?;
            self.blocks.write(self.storage)?;
            self.write_table(at, clusters)?;
            self.header.refcount_table_offset = at;
            self.header.refcount_table_clusters = u32::try_from(clusters)
                .map_err(|_| Error::unsupported("a refcount table of 2^32 clusters"))?;
        }
        self.storage.sync()?;
        let before = std::mem::replace(&mut self.state, Progress::Unknown);
        self.switch()?;
        self.state = before;
        self.blocks.switched();
        self.current = self.header.clone();
        self.space.fix(&self.current, &self.blocks);
        // The edit is durable: space that the host does not take back is no reason to say it failed.
        let cut = self.space.switched(self.storage);
        if let Err(error) = cut.and_then(|()| self.give_back()) {
            tracing::warn!(image = self.name, %error, "unused space was not given back");
        }
        Ok(())
    }

    /// Finds a place for the new refcount table, whose entries are all settled then.
    fn place_table(&mut self) -> Result<(u64, u64)> {
        let bits = self.layout.cluster_bits;
        let now = u64::from(self.current.refcount_table_clusters);
        self.count(self.current.refcount_table_offset >> bits, now, -1)?;
        self.house()?;
        let mut clusters = now;
        loop {
            let needed = (self.blocks.new.len() as u64 * 8).div_ceil(self.layout.cluster());
            if needed > clusters {
                // Room for the next ones too.
                let most = (REFCOUNT_TABLE_BYTES_MAX >> bits).max(1);
                clusters = (needed + needed / 2 + 1).min(most).max(needed);
            }
            let first = self.find(clusters)?;
            self.count(first, clusters, 1)?;
            self.house()?;
            if self.blocks.new.len() as u64 * 8 <= clusters << bits {
                return Ok((first << bits, clusters));
            }
            // Its own blocks made it outgrow its place. The next one is larger: this ends.
            self.count(first, clusters, -1)?;
        }
    }

    fn write_table(&self, at: u64, clusters: u64) -> Result<()> {
        // At most 8 MiB.
        let len = (clusters << self.layout.cluster_bits) as usize;
        let mut bytes = Vec::with_capacity(len);
        for offset in &self.blocks.new {
            bytes.extend_from_slice(&offset.to_be_bytes());
        }
        bytes.resize(len, 0);
        self.storage
            .write_at(at, &bytes)
            .context(|| format!("write the refcount table at {at:#x}"))
    }

    /// Tells the host which clusters are not needed any more.
    fn give_back(&mut self) -> Result<()> {
        let cluster = self.layout.cluster();
        for (start, len) in std::mem::take(&mut self.freed) {
            let mut run = (start, 0);
            for at in (start..start + len).step_by(cluster as usize) {
                // Freed, and taken again by the same edit: then it is in use.
                let free = self
                    .blocks
                    .get(self.storage, at >> self.layout.cluster_bits)?
                    == 0;
                if free {
                    run.1 += cluster;
                    continue;
                }
                self.discard(run)?;
                run = (at + cluster, 0);
            }
            self.discard(run)?;
        }
        Ok(())
    }

    fn discard(&self, (at, len): (u64, u64)) -> Result<()> {
        match len {
            0 => Ok(()),
            len => self.storage.discard(at, len),
        }
    }
}
