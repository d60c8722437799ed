//! A worker with sessions that talk over eventfds.

use super::*;
use io::{EngineKind, EventFd};
use std::{
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
};

/// Adds up what it reads from an eventfd, and reports each sum.
struct Adder {
    fd: Arc<EventFd>,
    sum: u64,
    changed: bool,
    runs: Arc<AtomicU64>,
    out: mpsc::Sender<u64>,
}

impl Session for Adder {
    fn ready(&mut self, _cx: &mut Cx, key: u32) {
        assert_eq!(key, 7);
        while let Ok(Some(value)) = self.fd.read() {
            self.sum += value;
            self.changed = true;
        }
    }

    fn completed(&mut self, _cx: &mut Cx, _completion: &Completion) {}

    fn run(&mut self, _cx: &mut Cx) -> bool {
        self.runs.fetch_add(1, Ordering::SeqCst);
        let changed = std::mem::take(&mut self.changed);
        if changed {
            let _ = self.out.send(self.sum);
        }
        changed
    }

    fn stop(&mut self, cx: &mut Cx) {
        let _ = cx.unwatch(self.fd.as_fd(), 7);
        cx.close();
    }
}

struct Rig {
    worker: WorkerHandle,
    fd: Arc<EventFd>,
    runs: Arc<AtomicU64>,
    sums: mpsc::Receiver<u64>,
    id: SessionId,
}

fn rig(polling: Polling) -> Rig {
    let worker = Worker::spawn(WorkerOptions {
        polling,
        ..WorkerOptions::new(0, EngineKind::Threads)
    })
    .unwrap();
    let fd = Arc::new(EventFd::new().unwrap());
    let runs = Arc::new(AtomicU64::new(0));
    let (out, sums) = mpsc::channel();
    let id = {
        let (fd, runs) = (fd.clone(), runs.clone());
        worker
            .call_wait(move |cx| {
                cx.add(|cx| {
                    cx.watch(fd.as_fd(), 7, false)?;
                    Ok(Adder {
                        fd,
                        sum: 0,
                        changed: false,
                        runs,
                        out,
                    })
                })
            })
            .unwrap()
            .unwrap()
    };
    Rig {
        worker,
        fd,
        runs,
        sums,
        id,
    }
}

#[test]
fn events_reach_their_session() {
    for polling in [Polling::OFF, Polling::default()] {
        let rig = rig(polling);
        for turn in 1..=200u64 {
            rig.fd.write().unwrap();
            assert_eq!(rig.sums.recv().unwrap(), turn);
        }
        rig.worker.stop();
    }
}

#[test]
fn a_call_finds_its_session_by_type() {
    let rig = rig(Polling::OFF);
    let id = rig.id;
    let sum = rig
        .worker
        .call_wait(move |cx| cx.with::<Adder, _>(id, |adder, _| adder.sum))
        .unwrap();
    assert_eq!(sum, Some(0));
    let other = rig
        .worker
        .call_wait(move |cx| cx.with::<Adder, _>(id + (1 << 16), |_, _| ()))
        .unwrap();
    assert_eq!(other, None, "a session's id is not its slot's next owner's");
    rig.worker.stop();
}

#[test]
fn a_failed_builder_leaves_no_session() {
    let rig = rig(Polling::OFF);
    let counts = rig
        .worker
        .call_wait(|cx| {
            let failed = cx.add::<Adder>(|_| Err(block::Error::invalid("no")));
            (failed.is_err(), cx.session_count())
        })
        .unwrap();
    assert_eq!(counts, (true, 1));
    rig.worker.stop();
}

/// Waits until the CPU time of the worker's thread does not grow any more: the figure, not the
/// time, decides.
fn settles(worker: &WorkerHandle) {
    let thread = worker
        .call_wait(|_| rustix::thread::gettid().as_raw_nonzero().get())
        .unwrap();
    let cpu_ns = || {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap();
        let mut fields = stat.split_whitespace();
        fields.next().unwrap().parse::<u64>().unwrap()
    };
    let mut last = cpu_ns();
    let settled = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        let now = cpu_ns();
        let still = now == last;
        last = now;
        still
    });
    assert!(settled, "the worker burns a core at rest");
}

/// Looks at what another thread stores, which tells nobody.
struct Looker {
    value: Arc<AtomicU64>,
    out: mpsc::Sender<u64>,
    last: u64,
}

impl Session for Looker {
    fn ready(&mut self, _cx: &mut Cx, _key: u32) {}

    fn completed(&mut self, _cx: &mut Cx, _completion: &Completion) {}

    fn run(&mut self, cx: &mut Cx) -> bool {
        let value = self.value.load(Ordering::SeqCst);
        if value == self.last {
            return false;
        }
        self.last = value;
        let _ = self.out.send(value);
        if value == u64::MAX {
            cx.close();
        }
        true
    }
}

#[test]
fn one_that_always_polls_needs_no_notification_and_sleeps_without_sessions() {
    for engine in [EngineKind::Threads, EngineKind::Native, EngineKind::IoUring] {
        let worker = Worker::spawn(WorkerOptions {
            polling: Polling::Always,
            ..WorkerOptions::new(0, engine)
        });
        let worker = match worker {
            Ok(worker) => worker,
            Err(error) => {
                eprintln!("{engine} is not tested: {error}");
                continue;
            }
        };
        settles(&worker);
        let value = Arc::new(AtomicU64::new(0));
        let (out, seen) = mpsc::channel();
        let of_session = value.clone();
        worker
            .call_wait(move |cx| {
                cx.add(|_| {
                    Ok(Looker {
                        value: of_session,
                        out,
                        last: 0,
                    })
                })
            })
            .unwrap()
            .unwrap();
        for next in [1, 2, 3, u64::MAX] {
            value.store(next, Ordering::SeqCst);
            assert_eq!(seen.recv_timeout(Duration::from_secs(20)), Ok(next));
        }
        settles(&worker);
        worker.stop();
    }
}

#[test]
fn a_sleeping_worker_runs_nothing_and_a_wake_runs_all() {
    let rig = rig(Polling::default());
    // An event and its answer: afterwards the worker goes to sleep at once or soon.
    rig.fd.write().unwrap();
    rig.sums.recv().unwrap();
    // Two wakes that are both observed: each must run the session again.
    for _ in 0..2 {
        let before = rig.runs.load(Ordering::SeqCst);
        rig.worker.waker().wake();
        while rig.runs.load(Ordering::SeqCst) == before {
            std::thread::yield_now();
        }
    }
    settles(&rig.worker);
    rig.worker.stop();
}

/// Has one barrier for the engine, and does not get rid of it while the engine is full.
struct Barrier {
    file: io::FileSlot,
    staged: bool,
    out: mpsc::Sender<SessionId>,
}

impl Session for Barrier {
    fn ready(&mut self, _cx: &mut Cx, _key: u32) {}

    fn completed(&mut self, cx: &mut Cx, _completion: &Completion) {
        let _ = self.out.send(cx.session());
        cx.close();
    }

    fn run(&mut self, cx: &mut Cx) -> bool {
        if !self.staged {
            let io = io::Io {
                file: self.file,
                op: io::IoOp::Sync,
                offset: 0,
                len: 0,
                iov: std::ptr::null(),
                iov_len: 0,
                token: io::Token(cx.token_base()),
            };
            // SAFETY: a barrier uses no memory.
            self.staged = unsafe { cx.engine().stage(io) };
        }
        false
    }

    fn stop(&mut self, cx: &mut Cx) {
        cx.close();
    }
}

#[test]
fn sessions_that_sleep_hear_of_room_that_others_made() {
    let mut options = WorkerOptions::new(0, EngineKind::Sim);
    options.engine_options.depth = 1;
    let worker = Worker::spawn(options).unwrap();
    let (out, ended) = mpsc::channel();
    worker
        .call_wait(move |cx| {
            let sim = io::SimDisk::new(io::SimOptions::default());
            let file = io::File::sim(sim).unwrap();
            for _ in 0..3 {
                let (file, out) = (file.clone(), out.clone());
                cx.add(|cx| {
                    let file = cx.engine().attach(&file)?;
                    let staged = false;
                    Ok(Barrier { file, staged, out })
                })
                .unwrap();
            }
        })
        .unwrap();
    for _ in 0..3 {
        let end = ended.recv_timeout(Duration::from_secs(20));
        assert!(end.is_ok(), "a session that found the engine full sleeps");
    }
    worker.stop();
}

#[test]
fn stop_closes_sessions_and_later_calls_fail() {
    let rig = rig(Polling::OFF);
    rig.worker.stop();
    assert!(rig.worker.call_wait(|_| ()).is_err());
    // The session is gone, and its sender with it.
    assert!(rig.sums.recv().is_err());
    rig.worker.stop();
}

#[test]
fn calls_run_in_order_from_many_threads() {
    let rig = rig(Polling::default());
    let counter = Arc::new(AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let counter = counter.clone();
                    rig.worker
                        .call_wait(move |_| counter.fetch_add(1, Ordering::SeqCst))
                        .unwrap();
                }
            });
        }
    });
    assert_eq!(counter.load(Ordering::SeqCst), 800);
    rig.worker.stop();
}

use std::time::Duration;
