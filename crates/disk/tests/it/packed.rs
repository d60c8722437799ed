//! Compressed clusters that never change: how often they are unpacked.

use crate::common;

use block::{GuestOffset, Op, Result};
use common::Rig;
use disk::{Chain, ChainOptions, Disk, DiskOptions};
use image::{Compressed, Description, Extent, Format, Image, Load, Plan, Step, ZeroMode, ZeroPlan};
use io::EngineKind;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An image for reading that counts how often something of it is unpacked.
#[derive(Debug)]
struct Counted {
    image: Arc<dyn Image>,
    unpacked: Arc<AtomicU64>,
}

impl Image for Counted {
    fn describe(&self) -> Description {
        self.image.describe()
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        self.image.map(at, len)
    }

    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        self.image.plan_write(at, len)
    }

    fn plan_zero(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Result<Step<ZeroPlan>> {
        self.image.plan_zero(at, len, mode)
    }

    fn loaded(&self, load: &Load, bytes: &[u8]) -> Result<()> {
        self.image.loaded(load, bytes)
    }

    fn decompress(&self, cluster: &Compressed, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.unpacked.fetch_add(1, Ordering::Relaxed);
        self.image.decompress(cluster, input, output)
    }
}

#[test]
fn a_cluster_that_is_read_in_parts_is_unpacked_once() {
    let dir = common::dir();
    let path = dir.path().join("disk.cloop");
    // One that each queue keeps, and one that the disk keeps for all.
    for block in [1usize << 20, 6 << 20] {
        let disk: Vec<u8> = (0..3 * block).map(|at| (at / 777) as u8).collect();
        let bytes = testkit::cloop::image(block, &disk, testkit::cloop::stored);
        fs::write(&path, bytes).unwrap();
        let options = ChainOptions {
            format: Some(Format::Cloop),
            read_only: true,
            ..ChainOptions::default()
        };
        let mut chain = Chain::open(common::arg(&path), &options).unwrap();
        let unpacked = Arc::new(AtomicU64::new(0));
        let layer = &mut chain.layers[0];
        layer.image = Arc::new(Counted {
            image: Arc::clone(&layer.image),
            unpacked: Arc::clone(&unpacked),
        });
        let options = DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        };
        let served = Disk::new(chain, options).unwrap();
        let mut rigs = [(); 2].map(|()| Rig::new(&served, EngineKind::Threads, 32));
        let part = 96 << 10;
        for (nth, want) in disk.chunks(part).enumerate() {
            let at = (nth * part) as u64;
            let read = rigs[0].one(Op::Read, at, Vec::new(), want.len() as u64);
            assert!(read.unwrap() == want, "{at:#x}");
        }
        assert_eq!(unpacked.swap(0, Ordering::Relaxed), 3, "{block}");
        // Requests that are under way together, of another queue too.
        for rig in &mut rigs {
            for nth in 0..16 {
                rig.submit(Op::Read, nth * 4096, Vec::new(), 4096, &[]);
            }
        }
        for rig in &mut rigs {
            for ended in rig.drain() {
                ended.result.unwrap();
            }
        }
        let many = unpacked.load(Ordering::Relaxed);
        match block > 2 << 20 {
            true => assert_eq!(many, 1),
            false => assert!((2..=32).contains(&many), "{many}"),
        }
        rigs.into_iter().for_each(Rig::detach);
    }
}
