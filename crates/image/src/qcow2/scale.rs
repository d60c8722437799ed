//! The metadata cache at the size of real disks: tables that are computed when they are read, so that
//! terabytes need no file.

use super::close::read_short;
use super::entry::COPIED;
use super::tables::Slot;
use super::testing::Rng;
use super::{Compression, CreateOptions, OpenOptions, Qcow2, create};
use crate::{ExtentKind, Image, Need, Step};
use block::{Error, GuestOffset, HostOffset, Range, Result, Storage, Zeroed};
use std::sync::Barrier;
use std::thread;

const BITS: u32 = 16;
/// Entries of an L2 table.
const TABLE: u64 = 1 << (BITS - 3);
/// Host offset of the first L2 table; the others follow, then the data.
const TABLES_AT: u64 = 1 << 30;

/// A qcow2 file in which every `step`-th cluster is allocated, in no order.
#[derive(Debug)]
struct Synthetic {
    /// Header and L1 table.
    head: Vec<u8>,
    clusters: u64,
    step: u64,
}

impl Synthetic {
    fn new(size: u64, step: u64) -> Self {
        let file = super::testing::MemFile::default();
        let options = CreateOptions {
            size,
            version: 3,
            cluster_size: 1 << BITS,
            extended_l2: false,
            refcount_bits: 16,
            lazy_refcounts: false,
            backing: None,
            compression: Compression::Zlib,
            ..CreateOptions::default()
        };
        create(&file, &options).unwrap();
        let mut head = file.bytes();
        let l1 = super::Header::read(&file).unwrap().l1_table_offset as usize;
        let clusters = size >> BITS;
        let tables = clusters.div_ceil(TABLE);
        head.resize(head.len().max(l1 + tables as usize * 8), 0);
        for (table, entry) in (0u64..)
            .zip(head[l1..].chunks_exact_mut(8))
            .take(tables as usize)
        {
            let raw = COPIED | (TABLES_AT + (table << BITS));
            entry.copy_from_slice(&raw.to_be_bytes());
        }
        Self {
            head,
            clusters,
            step,
        }
    }

    /// The host cluster of a guest cluster.
    fn host(&self, cluster: u64) -> Option<u64> {
        let tables = self.clusters.div_ceil(TABLE);
        // An odd number times all numbers below a power of two gives each of them once.
        let scattered = cluster.wrapping_mul(0x9e37_79b1) & (self.clusters.next_power_of_two() - 1);
        cluster
            .is_multiple_of(self.step)
            .then_some((TABLES_AT >> BITS) + tables + scattered)
    }
}

impl Storage for Synthetic {
    fn name(&self) -> String {
        "synthetic.qcow2".into()
    }

    fn len(&self) -> Result<u64> {
        Ok(1 << 50)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        for (at, out) in (offset..).step_by(8).zip(buf.chunks_mut(8)) {
            let word = match at.checked_sub(TABLES_AT) {
                Some(at) => {
                    let host = Some(at / 8).filter(|c| *c < self.clusters);
                    let host = host.and_then(|cluster| self.host(cluster));
                    host.map_or(0, |host| COPIED | host << BITS).to_be_bytes()
                }
                None => {
                    let mut word = [0; 8];
                    let head = self.head.get(at as usize..).unwrap_or_default();
                    word.iter_mut().zip(head).for_each(|(to, from)| *to = *from);
                    word
                }
            };
            out.copy_from_slice(&word[..out.len()]);
        }
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        Err(Error::invalid("read only"))
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, _: u64) -> Result<()> {
        Err(Error::invalid("read only"))
    }

    fn allocate(&self, _: u64, _: u64) -> Result<Zeroed> {
        Err(Error::invalid("read only"))
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        Err(Error::invalid("read only"))
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Err(Error::invalid("read only"))
    }

    fn range_at(&self, _: u64) -> Result<Option<Range>> {
        Ok(None)
    }
}

fn open(file: &Synthetic, cache_bytes: Option<u64>) -> Qcow2 {
    let options = OpenOptions {
        read_only: true,
        cache_bytes,
        ..OpenOptions::default()
    };
    Qcow2::open(file, &options).unwrap()
}

/// Maps a guest cluster, checks the answer, and tells how many loads that took.
fn map(file: &Synthetic, image: &Qcow2, cluster: u64) -> u32 {
    let at = GuestOffset((cluster << BITS) + 4096);
    let mut loads = 0;
    // Far more turns than any wait takes: a hang must fail, not hang.
    for _ in 0..10_000_000u32 {
        match image.map(at, 4096).unwrap() {
            Step::Done(extent) => {
                assert_eq!(extent.len, 4096);
                let want = file.host(cluster).map(|h| HostOffset((h << BITS) + 4096));
                match (extent.kind, want) {
                    (ExtentKind::Data { offset, .. }, Some(want)) if offset == want => {}
                    (ExtentKind::Unallocated, None) => {}
                    (kind, want) => panic!("cluster {cluster}: {kind:?}, not {want:?}"),
                }
                return loads;
            }
            Step::Need(Need::Load(load)) => {
                loads += 1;
                let bytes = read_short(file, load.offset.0, load.len as usize).unwrap();
                image.loaded(&load, &bytes).unwrap();
            }
            Step::Need(need) => panic!("a read needs {need:?}"),
            Step::Wait(_) => thread::yield_now(),
        }
    }
    panic!("waits without an end");
}

fn used_bytes(image: &Qcow2) -> u64 {
    image.lock().cache.frames_used() as u64 * image.geometry.slice()
}

/// A 16th of a disk allocated, scattered: each table is read once, and all of the map stays in a fraction
/// of the memory that the tables take. (64 GiB and 4 MiB for what a user has as 1 TiB and 64 MiB.)
#[test]
fn scattered_clusters_take_a_fraction_of_their_tables() {
    let file = Synthetic::new(64 << 30, 16);
    let image = open(&file, Some(4 << 20));
    let mut rng = Rng(1);
    let tables = file.clusters / TABLE;
    let mut loads = 0;
    for table in 0..tables {
        loads += u64::from(map(&file, &image, table * TABLE + rng.below(TABLE)));
    }
    assert_eq!(loads, tables, "one read brings in a whole table");
    for _ in 0..20_000 {
        let cluster = rng.below(file.clusters);
        assert_eq!(map(&file, &image, cluster), 0, "cluster {cluster} was lost");
        assert_eq!(map(&file, &image, cluster & !15), 0);
    }
    let used = used_bytes(&image);
    assert!(used <= 768 << 10, "{used} bytes for 65536 clusters");
    assert_eq!(image.lock().cache.present, tables * 16);
}

/// The worst there is: every cluster allocated, in no order. Half of the tables' size holds all but the last.
#[test]
fn clusters_in_disorder_take_half_of_their_tables() {
    let file = Synthetic::new(64 << 30, 1);
    let image = open(&file, Some(4 << 20));
    let mut rng = Rng(2);
    let tables = file.clusters / TABLE;
    for table in 0..tables {
        map(&file, &image, table * TABLE + rng.below(TABLE));
    }
    let present = image.lock().cache.present;
    assert!(present >= tables * 16 * 49 / 50, "{present} slices");
    assert!(used_bytes(&image) <= 4 << 20);
}

/// 16 TiB in disorder with hardly any memory: each miss is one read, and finding room for it costs the clock
/// a bounded number of steps on average.
#[test]
fn sixteen_tebibytes_work_with_a_small_budget() {
    for budget in [256 << 10, 4 << 20] {
        let file = Synthetic::new(16 << 40, 1);
        let image = open(&file, Some(budget));
        let mut rng = Rng(3);
        let mut loads = 0;
        for _ in 0..6_000 {
            let took = map(&file, &image, rng.below(file.clusters));
            assert!(took <= 1);
            loads += u64::from(took);
        }
        assert!(
            loads > 5_000,
            "{loads} loads: the budget is meant to be too small"
        );
        assert!(used_bytes(&image) <= budget.max(1 << 20));
        let steps = image.lock().cache.steps;
        assert!(
            steps <= 6 * loads,
            "{steps} steps of the clock for {loads} loads"
        );
    }
}

/// Readers without the lock while pages are filled, evicted and used again under them.
#[test]
fn readers_of_pages_never_believe_a_wrong_answer() {
    let file = Synthetic::new(64 << 30, 3);
    let image = open(&file, Some(0));
    let start = Barrier::new(4);
    let loads: u64 = thread::scope(|scope| {
        let run = |id: u64| {
            let (file, image, start) = (&file, &image, &start);
            move || {
                let mut rng = Rng(id);
                start.wait();
                // A few slices are hot, the others push them out.
                (0..8_000u64)
                    .map(|_| {
                        let hot = rng.below(4) != 0;
                        let within = if hot { 512 * 12 } else { file.clusters };
                        u64::from(map(file, image, rng.below(within)))
                    })
                    .sum::<u64>()
            }
        };
        let threads: Vec<_> = (0..4).map(|id| scope.spawn(run(id))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert!(
        loads > 5_000,
        "slices are meant to come and go: {loads} loads"
    );
}

/// What was changed, written and evicted while a read of its table was under way is not in what was read.
#[test]
fn a_load_brings_in_only_what_was_absent_when_it_began() {
    let file = Synthetic::new(1 << 30, 1);
    let image = open(&file, None);
    let other = 3;
    image
        .lock()
        .cache
        .move_slot(&image.tables, other, Slot::Empty);
    let Step::Need(Need::Load(load)) = image.map(GuestOffset(0), 4096).unwrap() else {
        panic!("nothing is loaded yet");
    };
    assert_eq!(load.len, 64 << 10);
    // The others of the table wait for the same read, and only for that.
    let step = image.map(GuestOffset((5 * 512) << BITS), 4096).unwrap();
    assert_eq!(step, Step::Wait(load.key));
    image
        .lock()
        .cache
        .move_slot(&image.tables, other, Slot::Absent);
    let bytes = read_short(&file, load.offset.0, load.len as usize).unwrap();
    image.loaded(&load, &bytes).unwrap();
    for slice in 0..16 {
        let absent = image.tables.slot(slice) == Slot::Absent;
        assert_eq!(absent, slice == other, "slice {slice}");
    }
    // A failed read leaves everything as it was, and its frame behind.
    let vacant = image.lock().cache.vacant();
    let Step::Need(Need::Load(load)) = image.map(GuestOffset((other * 512) << BITS), 4096).unwrap()
    else {
        panic!("it is absent");
    };
    assert_eq!(image.lock().cache.vacant(), vacant - 1);
    image.load_failed(&load);
    assert_eq!(image.lock().cache.vacant(), vacant);
    assert_eq!(map(&file, &image, other * 512), 1);
}
