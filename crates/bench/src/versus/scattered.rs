//! A large qcow2 image with scattered clusters, made in a second: only its metadata is written.
//!
//! Every [`every`](Scattered::every)th cluster of the disk is allocated. The host clusters follow each other in the
//! file in random order, so that no run of guest clusters is a run in the file, and they are holes:
//! reading them costs no device time, which leaves the cost of the translation to be seen.
//!
//! ```text
//!   0         header
//!   1         refcount table                     (clusters of the file)
//!   …         refcount blocks: 1 for every cluster up to the end, data included
//!   …         L1 table
//!   …         L2 tables
//!   DATA      data: holes
//! ```

use block::{Context, Error, Result};
use std::{
    fs::File,
    io::{BufWriter, Seek, SeekFrom, Write},
    path::Path,
};

/// Where the data clusters begin in the file.
pub const DATA: u64 = 256 << 20;

/// OFLAG_COPIED of L1 and L2 entries: the refcount is exactly one.
const COPIED: u64 = 1 << 63;

/// Shape of the image.
#[derive(Clone, Copy, Debug)]
pub struct Scattered {
    /// Bytes of the disk: a power of two.
    pub virtual_bytes: u64,
    /// Bytes of a cluster: a power of two.
    pub cluster_bytes: u64,
    /// Every how manieth cluster is allocated: a power of two.
    pub every: u64,
}

impl Scattered {
    /// Clusters that are allocated.
    pub fn allocated(&self) -> u64 {
        self.virtual_bytes / self.cluster_bytes / self.every
    }

    /// Bytes of the file; few of them are blocks of the host.
    pub fn file_bytes(&self) -> u64 {
        DATA + self.allocated() * self.cluster_bytes
    }

    /// The host cluster, counted from [`DATA`], of allocated cluster `index`: a permutation of powers of two (an odd
    /// multiplier is one, and so is a shift-xor; neither keeps neighbours together).
    fn place(&self, index: u64) -> u64 {
        let mask = self.allocated() - 1;
        let half = self.allocated().trailing_zeros().div_ceil(2).max(1);
        let mut x = index;
        for multiplier in [0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9] {
            x = x.wrapping_mul(multiplier) & mask;
            x ^= x >> half;
        }
        x
    }

    /// Writes the image.
    pub fn create(&self, path: &Path) -> Result<()> {
        let named = || path.display().to_string();
        let powers = [self.virtual_bytes, self.cluster_bytes, self.every];
        if powers.iter().any(|n| !n.is_power_of_two()) || self.allocated() < 2 {
            return Err(Error::invalid("the shape must be powers of two")).context(named);
        }
        let file = File::create_new(path).context(named)?;
        self.write(&file).context(named)
    }

    fn write(&self, file: &File) -> std::io::Result<()> {
        let cluster = self.cluster_bytes;
        let entries = cluster / 8;
        // One reference count of 16 bits per cluster of the file.
        let file_clusters = self.file_bytes() / cluster;
        let blocks = file_clusters.div_ceil(cluster / 2);
        let table_clusters = (blocks * 8).div_ceil(cluster);
        let l2_count = (self.virtual_bytes / cluster).div_ceil(entries);
        let l1_clusters = (l2_count * 8).div_ceil(cluster);
        let blocks_at = (1 + table_clusters) * cluster;
        let l1_at = blocks_at + blocks * cluster;
        let l2_at = l1_at + l1_clusters * cluster;
        let used = (l2_at + l2_count * cluster) / cluster;
        assert!(used * cluster <= DATA, "metadata reach into the data");
        file.set_len(self.file_bytes())?;
        let mut out = BufWriter::with_capacity(1 << 20, file);

        out.write_all(b"QFI\xfb")?;
        put32(&mut out, &[3])?; // version
        put64(&mut out, &[0])?; // backing file: none
        put32(&mut out, &[0, cluster.trailing_zeros()])?;
        put64(&mut out, &[self.virtual_bytes])?;
        put32(&mut out, &[0, small(l2_count)?])?; // no encryption; L1 entries
        put64(&mut out, &[l1_at, cluster])?; // L1, refcount table
        put32(&mut out, &[small(table_clusters)?, 0])?; // no snapshots
        put64(&mut out, &[0, 0, 0, 0])?; // snapshots; features: none
        put32(&mut out, &[4, 104])?; // refcount order, header length
        put64(&mut out, &[0])?; // end of header extensions

        out.seek(SeekFrom::Start(cluster))?;
        for block in 0..blocks {
            put64(&mut out, &[blocks_at + block * cluster])?;
        }
        // Metadata without gap from the start, then nothing, then data to the end.
        out.seek(SeekFrom::Start(blocks_at))?;
        let data = DATA / cluster;
        for index in 0..file_clusters {
            let count = u16::from(index < used || index >= data);
            out.write_all(&count.to_be_bytes())?;
        }
        out.seek(SeekFrom::Start(l1_at))?;
        for table in 0..l2_count {
            put64(&mut out, &[(l2_at + table * cluster) | COPIED])?;
        }
        out.seek(SeekFrom::Start(l2_at))?;
        for index in 0..l2_count * entries {
            let entry = if index % self.every == 0 && index * cluster < self.virtual_bytes {
                (DATA + self.place(index / self.every) * cluster) | COPIED
            } else {
                0
            };
            put64(&mut out, &[entry])?;
        }
        out.flush()?;
        drop(out);
        file.sync_all()
    }
}

fn put32(out: &mut impl Write, values: &[u32]) -> std::io::Result<()> {
    values
        .iter()
        .try_for_each(|v| out.write_all(&v.to_be_bytes()))
}

fn put64(out: &mut impl Write, values: &[u64]) -> std::io::Result<()> {
    values
        .iter()
        .try_for_each(|v| out.write_all(&v.to_be_bytes()))
}

fn small(value: u64) -> std::io::Result<u32> {
    u32::try_from(value).map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const SMALL: Scattered = Scattered {
        virtual_bytes: 8 << 30,
        cluster_bytes: 64 << 10,
        every: 16,
    };

    #[test]
    fn host_clusters_are_a_permutation_without_runs() {
        let mut seen = vec![false; SMALL.allocated() as usize];
        let mut runs = 0;
        for index in 0..SMALL.allocated() {
            let place = SMALL.place(index);
            assert!(!std::mem::replace(&mut seen[place as usize], true));
            runs += u64::from(index > 0 && place == SMALL.place(index - 1) + 1);
        }
        assert!(runs < SMALL.allocated() / 100, "{runs} runs");
    }

    #[test]
    fn qemu_finds_the_image_sound_and_the_clusters_where_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scattered.qcow2");
        SMALL.create(&path).unwrap();
        let qemu = |args: &[&str]| {
            let output = Command::new("qemu-img")
                .args(args)
                .arg(&path)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{text} {output:?}");
            text
        };
        let check = qemu(&["check", "-f", "qcow2"]);
        assert!(
            check.contains("No errors") && !check.contains("leaked"),
            "{check}"
        );
        let map = qemu(&["map", "--output=json", "-f", "qcow2"]);
        let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
        let allocated: Vec<_> = map.iter().filter(|e| e["offset"].is_u64()).collect();
        assert_eq!(allocated.len() as u64, SMALL.allocated());
        for (index, extent) in (0..).zip(allocated) {
            assert_eq!(extent["start"], index * SMALL.every * SMALL.cluster_bytes);
            assert_eq!(extent["length"], SMALL.cluster_bytes);
            let at = DATA + SMALL.place(index) * SMALL.cluster_bytes;
            assert_eq!(extent["offset"], at);
        }
        // Nothing but metadata takes space.
        use std::os::unix::fs::MetadataExt;
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 8 << 20);
        assert!(SMALL.create(&path).is_err(), "it overwrites");
    }
}
