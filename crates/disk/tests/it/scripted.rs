//! The request table over a format that follows a script: orders of events that real formats
//! and engines bring about rarely.

use block::{GuestOffset, HostOffset, IoVec, Op, Result, Storage, Zeroed};
use disk::{Chain, Disk, DiskOptions, DiskQueue, Layer, QueueOptions, Request};
use image::{
    Allocation, Description, Extent, ExtentKind, FileId, Fill, FlushRun, Format, Freed, Image, Key,
    Load, Need, Plan, Reserve, Step, Ticket, ZeroMode, ZeroPlan,
};
use io::{Completion, Engine, EngineKind, EngineOptions, Events, File, SimDisk, SimOptions, Wait};
use std::{
    fmt,
    sync::{Arc, Mutex},
};

const SIZE: u64 = 1 << 20;
/// Smallest run that the script maps.
const UNIT: u64 = 512;

type Map = dyn FnMut(GuestOffset, u64) -> Step<Extent> + Send;

/// Maps as its script says; every write is an allocation of which a unit before and one behind it are copied. With
/// several files, each write is one in place in the file whose number is its unit's.
struct Script {
    map: Mutex<Box<Map>>,
    files: usize,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Script")
    }
}

impl Image for Script {
    fn describe(&self) -> Description {
        Description {
            format: "script",
            size: SIZE,
            cluster_size: UNIT,
            backing: None,
            backing_format: None,
            data_file: None,
            read_only_because: None,
            facts: Vec::new(),
        }
    }
    fn size(&self) -> u64 {
        SIZE
    }
    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        Ok(self.map.lock().unwrap()(at, len))
    }
    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        if self.files > 1 {
            let file = FileId((at.0 / UNIT).try_into().unwrap());
            let offset = HostOffset(at.0);
            return Ok(Step::Done(Plan::InPlace { file, offset, len }));
        }
        Ok(Step::Done(Plan::Allocate(Allocation {
            ticket: Ticket(1),
            key: Key(99),
            file: FileId::IMAGE,
            host: HostOffset(0),
            start: GuestOffset(at.0 - UNIT),
            len: UNIT + len + UNIT,
            write_len: len,
            zeroed: true,
            fill: Fill::Existing,
        })))
    }
    fn commit(&self, _ticket: Ticket) {}
    fn abort(&self, _ticket: Ticket) {}
    fn plan_zero(&self, _: GuestOffset, len: u64, _: ZeroMode) -> Result<Step<ZeroPlan>> {
        Ok(Step::Done(ZeroPlan::Done { len }))
    }
    fn loaded(&self, _load: &Load, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }
    fn load_failed(&self, _load: &Load) {}
    fn reserved(&self, _reserve: &Reserve, _zeroed: Zeroed) {}
    fn reserve_failed(&self, _reserve: &Reserve) {}
    fn flush_begin(&self, run: &mut FlushRun) -> Result<()> {
        run.seal();
        Ok(())
    }
    fn flush_end(&self, _run: &mut FlushRun, _ok: bool) {}
    fn is_dirty(&self) -> bool {
        false
    }
    fn take_freed(&self, _out: &mut Vec<Freed>) {}
    fn release(&self, _freed: &Freed, _zeroed: Zeroed) {}
    fn close(&self, _files: &[&dyn Storage]) -> Result<()> {
        Ok(())
    }
}

/// A queue whose completions the test hands out itself.
struct Table {
    engine: Box<dyn Engine>,
    queue: DiskQueue,
    /// Requests' memory; kept until the end of the test.
    memory: Vec<(Vec<u8>, Box<IoVec>)>,
}

impl Table {
    fn new(depth: u16, map: impl FnMut(GuestOffset, u64) -> Step<Extent> + Send + 'static) -> Self {
        Self::of_files(1, depth, map)
    }

    fn of_files(
        files: usize,
        depth: u16,
        map: impl FnMut(GuestOffset, u64) -> Step<Extent> + Send + 'static,
    ) -> Self {
        let file = |_| {
            let sim = SimDisk::new(SimOptions {
                size: SIZE,
                ..SimOptions::default()
            });
            File::sim(sim).unwrap()
        };
        let layer = Layer {
            image: Arc::new(Script {
                map: Mutex::new(Box::new(map)),
                files,
            }),
            files: (0..files).map(file).collect(),
            path: "script".into(),
            format: Format::Qcow2,
            part: None,
        };
        let chain = Chain::new(vec![layer], false);
        let disk = Disk::new(chain, DiskOptions::default()).unwrap();
        let mut engine = io::open_engine(EngineKind::Sim, &EngineOptions::default()).unwrap();
        let options = QueueOptions {
            depth,
            token_base: 0,
            waker: Arc::new(io::Waker::new().unwrap()),
        };
        let queue = DiskQueue::attach(&disk, &mut *engine, options).unwrap();
        Self {
            engine,
            queue,
            memory: Vec::new(),
        }
    }

    fn submit(&mut self, op: Op, at: u64, len: u64, tag: u64) {
        let mut buffer = vec![0; if op.has_data() { len as usize } else { 0 }];
        let piece = Box::new(IoVec::from_mut(&mut buffer));
        let request = Request {
            op,
            at: GuestOffset(at),
            len,
            iov: &raw const *piece,
            iov_len: u32::from(op.has_data()),
            tag,
            arrived_ns: 0,
            seen_ns: 0,
            parsed_ns: 0,
        };
        self.memory.push((buffer, piece));
        // SAFETY: the memory is kept until the table is dropped, and its engine before it.
        let taken = unsafe { self.queue.submit(&mut *self.engine, request) };
        assert!(taken.is_ok());
    }

    /// Waits until all that is at the engine ended; the ends, by operation.
    fn ends(&mut self) -> Vec<Completion> {
        let mut events = Events::default();
        while self.engine.in_flight() > 0 {
            self.engine.turn(Wait::Forever, &mut events).unwrap();
        }
        events.completions.sort_by_key(|c| c.token.0);
        events.completions
    }

    /// What a worker does with what ended in a turn; tags of the requests that ended.
    fn hand_out(&mut self, ends: &[Completion]) -> Vec<u64> {
        for end in ends {
            self.queue.completed(&mut *self.engine, end);
        }
        self.queue.advance(&mut *self.engine);
        std::iter::from_fn(|| self.queue.done())
            .map(|done| {
                assert_eq!(done.result, Ok(()));
                done.tag
            })
            .collect()
    }
}

fn load(key: u64) -> Step<Extent> {
    Step::Need(Need::Load(Load {
        key: Key(key),
        file: FileId::IMAGE,
        offset: HostOffset(0),
        len: 512,
    }))
}

fn zeros(len: u64) -> Step<Extent> {
    let kind = ExtentKind::Zero { host: None };
    Step::Done(Extent { len, kind })
}

/// Data in runs of one unit that do not touch.
fn fragment(at: GuestOffset) -> Step<Extent> {
    Step::Done(Extent {
        len: UNIT,
        kind: ExtentKind::Data {
            file: FileId::IMAGE,
            offset: HostOffset(SIZE - UNIT - at.0),
        },
    })
}

#[test]
fn a_key_that_is_woken_while_its_waiter_loads_is_waited_for_again() {
    // The second request finds key 1 busy, then something else to load; key 1 is woken meanwhile,
    // and busy again when it comes back.
    let mut asked = [0; 3];
    let mut table = Table::new(4, move |at, len| {
        let who = (at.0 / UNIT) as usize;
        asked[who] += 1;
        match (who, asked[who]) {
            (0 | 2, 1) => load(1),
            (1, 1 | 3 | 4) => Step::Wait(Key(1)),
            (1, 2) => load(2),
            _ => zeros(len),
        }
    });
    table.submit(Op::Read, 0, UNIT, 0);
    table.submit(Op::Read, UNIT, UNIT, 1);
    let ends = table.ends();
    assert_eq!(table.hand_out(&ends[..1]), [0]);
    table.submit(Op::Read, 2 * UNIT, UNIT, 2);
    assert_eq!(table.hand_out(&ends[1..]), [0u64; 0]);
    let ends = table.ends();
    let mut done = table.hand_out(&ends);
    done.sort_unstable();
    assert_eq!(done, [1, 2], "a wake-up is lost");
}

#[test]
fn a_copy_that_waited_for_room_and_is_zeros_goes_on() {
    // One read takes all operations but one, which the write's fill sets aside. Its copy waits
    // for room, and then needs no operation.
    let operations = 2 * 2 + 128;
    let data = (operations - 1) * UNIT;
    let mut table = Table::new(2, move |at, len| {
        if at.0 < data {
            fragment(at)
        } else {
            zeros(len)
        }
    });
    table.submit(Op::Read, 0, data, 0);
    table.submit(Op::Write { fua: false }, data + UNIT, UNIT, 1);
    assert_eq!(table.engine.in_flight() as u64, operations - 1);
    let ends = table.ends();
    assert_eq!(table.hand_out(&ends), [0]);
    let ends = table.ends();
    assert_eq!(table.hand_out(&ends), [1], "nobody issues the fill's write");
}

#[test]
fn a_write_goes_on_where_only_what_it_overwrites_cannot_be_read() {
    let mut table = Table::new(2, |at, _| fragment(at));
    table.submit(Op::Write { fua: false }, UNIT, UNIT, 0);
    assert_eq!(table.hand_out(&[]), [0u64; 0]);
    // Three units that are no neighbours in the file: what is before, what is overwritten, what is behind.
    let mut ends = table.ends();
    assert_eq!(ends.len(), 3);
    ends[1].errno = 5;
    assert_eq!(table.hand_out(&ends), [0u64; 0]);
    for what in ["before", "behind"] {
        let ends = table.ends();
        assert_eq!(ends.len(), 1, "what is {what} is read alone");
        assert_eq!(table.hand_out(&ends), [0u64; 0]);
    }
    let ends = table.ends();
    assert_eq!(table.hand_out(&ends), [0]);
}

#[test]
fn a_write_fails_where_what_it_needs_cannot_be_read() {
    let mut table = Table::new(2, |at, _| fragment(at));
    table.submit(Op::Write { fua: false }, UNIT, UNIT, 0);
    table.hand_out(&[]);
    let mut ends = table.ends();
    ends.iter_mut().for_each(|end| end.errno = 5);
    assert_eq!(table.hand_out(&ends), [0u64; 0]);
    let mut ends = table.ends();
    assert_eq!(ends.len(), 1);
    ends[0].errno = 5;
    table.queue.completed(&mut *table.engine, &ends[0]);
    table.queue.advance(&mut *table.engine);
    let done = table.queue.done().expect("it ends");
    assert_eq!((done.tag, done.result), (0, Err(block::GuestError::Io)));
    assert!(table.queue.done().is_none() && !table.queue.is_busy());
}

#[test]
fn a_flush_is_not_crowded_out_by_reads() {
    let mut table = Table::new(4, |at, _| fragment(at));
    for tag in 0..3 {
        table.submit(Op::Read, 0, 200 * UNIT, tag);
    }
    table.submit(Op::Flush, 0, 0, 99);
    let mut reads = 0;
    for _ in 0..1000 {
        let ends = table.ends();
        let done = table.hand_out(&ends);
        if done.contains(&99) {
            return;
        }
        for tag in done {
            reads += 1;
            table.submit(Op::Read, 0, 200 * UNIT, tag);
        }
        assert!(reads < 20, "the flush has to wait for {reads} reads");
    }
    panic!("nothing happens");
}

#[test]
fn a_queue_says_when_a_commit_waits_for_its_next_step() {
    let mut table = Table::new(4, |_, len| zeros(len));
    table.submit(Op::Discard, 0, UNIT, 0);
    assert!(!table.queue.must_advance());
    table.submit(Op::Flush, 0, 0, 1);
    assert!(table.queue.must_advance());
    assert_eq!(table.hand_out(&[]), [0]);
    assert!(!table.queue.must_advance());
    let ends = table.ends();
    assert_eq!(table.hand_out(&ends), [1]);
}

/// A flush; how many barriers it had.
fn barriers(table: &mut Table) -> usize {
    table.submit(Op::Flush, 0, 0, 99);
    table.queue.advance(&mut *table.engine);
    let ends = table.ends();
    assert_eq!(table.hand_out(&ends), [99]);
    ends.len()
}

/// A write into a file, which ends as `errno` says.
fn write_file(table: &mut Table, file: u64, errno: i32) {
    table.submit(Op::Write { fua: false }, file * UNIT, UNIT, file);
    let mut ends = table.ends();
    assert_eq!(ends.len(), 1);
    ends[0].errno = errno;
    table.queue.completed(&mut *table.engine, &ends[0]);
    table.queue.advance(&mut *table.engine);
    assert_eq!(table.queue.done().unwrap().tag, file);
}

#[test]
fn a_flush_waits_for_those_files_of_many_that_were_changed() {
    let mut table = Table::of_files(3, 4, |_, len| zeros(len));
    assert_eq!(barriers(&mut table), 3, "what was before is not known");
    assert_eq!(barriers(&mut table), 0);
    write_file(&mut table, 1, 0);
    assert_eq!(barriers(&mut table), 1);
    table.submit(Op::Read, 0, UNIT, 0);
    assert_eq!(table.hand_out(&[]), [0]);
    assert_eq!(barriers(&mut table), 0, "a read changes nothing");
    write_file(&mut table, 0, 0);
    write_file(&mut table, 2, 0);
    write_file(&mut table, 2, 0);
    assert_eq!(barriers(&mut table), 2);
    write_file(&mut table, 2, 5);
    assert_eq!(barriers(&mut table), 1, "a part of it may be there");
    assert_eq!(table.queue.disk().statistics().barriers, 7);
}

#[test]
fn a_file_whose_sync_failed_and_one_that_is_written_meanwhile_are_synced_again() {
    let mut table = Table::of_files(2, 4, |_, len| zeros(len));
    assert_eq!(barriers(&mut table), 2);
    write_file(&mut table, 1, 0);
    table.submit(Op::Flush, 0, 0, 7);
    table.queue.advance(&mut *table.engine);
    let mut ends = table.ends();
    assert_eq!(ends.len(), 1);
    ends[0].errno = 5;
    table.queue.completed(&mut *table.engine, &ends[0]);
    table.queue.advance(&mut *table.engine);
    let done = table.queue.done().unwrap();
    assert_eq!((done.tag, done.result), (7, Err(block::GuestError::Io)));
    assert_eq!(barriers(&mut table), 1, "it is not durable yet");
    // A write that ends while the barrier is under way is not what that waited for.
    write_file(&mut table, 1, 0);
    table.submit(Op::Flush, 0, 0, 7);
    table.queue.advance(&mut *table.engine);
    let barrier = table.ends();
    write_file(&mut table, 1, 0);
    assert_eq!(table.hand_out(&barrier), [7]);
    assert_eq!(barriers(&mut table), 1);
    assert_eq!(barriers(&mut table), 0);
}

#[test]
fn a_commit_ahead_that_fails_is_told_to_the_next_flush() {
    let mut table = Table::of_files(2, 4, |_, len| zeros(len));
    assert_eq!(barriers(&mut table), 2);
    for _ in 0..16 {
        write_file(&mut table, 0, 0);
        assert_eq!(barriers(&mut table), 1);
    }
    write_file(&mut table, 0, 0);
    // Its barrier is at the engine, and nobody waits for it.
    let mut ends = table.ends();
    assert_eq!(ends.len(), 1);
    ends[0].errno = 5;
    table.queue.completed(&mut *table.engine, &ends[0]);
    table.queue.advance(&mut *table.engine);
    assert!(table.queue.done().is_none());
    table.submit(Op::Flush, 0, 0, 7);
    table.queue.advance(&mut *table.engine);
    // That of its own succeeds: what the first one lost it cannot bring back.
    let ends = table.ends();
    assert_eq!(ends.len(), 1);
    table.queue.completed(&mut *table.engine, &ends[0]);
    table.queue.advance(&mut *table.engine);
    let done = table.queue.done().unwrap();
    assert_eq!((done.tag, done.result), (7, Err(block::GuestError::Io)));
    // Told once.
    write_file(&mut table, 0, 0);
    assert_eq!(barriers(&mut table), 1);
}
