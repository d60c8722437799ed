//! A load on a vhost-user-blk server, as a guest's driver makes it: to compare servers.
//!
//! ```text
//! vhost_load SOCKET [rw=randread|randwrite|read|write|randrw] [bs=4K] [depth=32] [queues=1]
//!            [seconds=5] [size=BYTES] [pid=PID] [ring=128] [poll] [indirect=0|1] [event=0|1]
//! ```
//!
//! Each queue has a thread that keeps `depth` requests in flight and sleeps until the server
//! calls (`poll`: spins). Printed are I/Os per second, the latency's percentiles, kicks and calls
//! for each I/O and, with `pid`, the server's CPU time for each I/O. The server's disk must be at
//! least `size` (default: all of it). For example, against qemu-storage-daemon:
//!
//! ```text
//! qemu-storage-daemon --blockdev driver=file,node-name=f,filename=X,cache.direct=on,aio=native \
//!   --export type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path=S,writable=on
//! ```

#[path = "../tests/vhost_frontend/mod.rs"]
mod vhost_frontend;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use vhost_frontend::{BUFFERS, DriverQueue, IN, Machine, OUT, Piece, Ram, Setup, feature};

#[derive(Clone)]
struct Load {
    socket: PathBuf,
    rw: String,
    bs: u64,
    depth: usize,
    queues: u32,
    seconds: f64,
    size: Option<u64>,
    pid: Option<u32>,
    ring: u16,
    poll: bool,
    features: u64,
}

fn parse() -> Result<Load, String> {
    let mut args = std::env::args().skip(1);
    let socket = args.next().ok_or("which socket?")?;
    let mut load = Load {
        socket: socket.into(),
        rw: "randread".into(),
        bs: 4096,
        depth: 32,
        queues: 1,
        seconds: 5.0,
        size: None,
        pid: None,
        ring: 128,
        poll: false,
        features: !0,
    };
    for arg in args {
        let (name, value) = arg.split_once('=').unwrap_or((&arg, ""));
        let size = || block::size::parse(value).map_err(|e| e.to_string());
        let number = || value.parse::<u32>().map_err(|e| format!("{arg}: {e}"));
        match name {
            "rw" => load.rw = value.into(),
            "bs" => load.bs = size()?,
            "depth" => load.depth = number()? as usize,
            "queues" => load.queues = number()?,
            "seconds" => load.seconds = value.parse().map_err(|e| format!("{arg}: {e}"))?,
            "size" => load.size = Some(size()?),
            "pid" => load.pid = Some(number()?),
            "ring" => load.ring = number()? as u16,
            "poll" => load.poll = true,
            "indirect" if value == "0" => load.features &= !feature::INDIRECT,
            "event" if value == "0" => load.features &= !feature::EVENT_IDX,
            "indirect" | "event" => {}
            _ => return Err(format!("'{arg}' is not understood")),
        }
    }
    Ok(load)
}

/// CPU time of a process's threads in nanoseconds.
fn cpu_ns(pid: u32) -> u64 {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return 0;
    };
    tasks
        .flatten()
        .filter_map(|task| {
            let stat = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            stat.split_whitespace().next()?.parse::<u64>().ok()
        })
        .sum()
}

/// Latencies in buckets of 1/16 of a power of two of nanoseconds.
struct Latencies(Vec<u64>);

impl Latencies {
    fn new() -> Self {
        Self(vec![0; 64 * 16])
    }

    fn add(&mut self, ns: u64) {
        let ns = ns.max(16);
        let log = 63 - ns.leading_zeros() as u64;
        let bucket = log * 16 + (ns >> (log - 4)) % 16;
        self.0[bucket as usize] += 1;
    }

    fn percentile_us(&self, percent: f64) -> f64 {
        let total: u64 = self.0.iter().sum();
        let mut left = (total as f64 * percent / 100.0) as u64;
        for (bucket, count) in self.0.iter().enumerate() {
            if left < *count {
                let (log, part) = (bucket as u64 / 16, bucket as u64 % 16);
                return ((16 + part) << log >> 4) as f64 / 1000.0;
            }
            left -= count;
        }
        0.0
    }
}

struct Outcome {
    ios: u64,
    errors: u64,
    kicks: u64,
    calls: u64,
    latencies: Latencies,
}

/// Bytes between the buffers of two requests.
fn stride(bs: u64) -> u64 {
    4096 + bs.next_multiple_of(4096)
}

fn drive(
    load: &Load,
    ram: &Ram,
    mut queue: DriverQueue,
    base: u64,
    blocks: u64,
    stop: &AtomicBool,
    start: &Barrier,
) -> Outcome {
    let mut random = 0x2545_f491_4f6c_dd1du64.wrapping_mul(1 + u64::from(queue.index()));
    let mut sequence = u64::from(queue.index()) * blocks / u64::from(load.queues);
    let mut slots = vec![(0usize, Instant::now()); usize::from(queue.size())];
    let mut outcome = Outcome {
        ios: 0,
        errors: 0,
        kicks: 0,
        calls: 0,
        latencies: Latencies::new(),
    };
    let mut add = |queue: &mut DriverQueue, slots: &mut [(usize, Instant)], slot: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let block = if load.rw.starts_with("rand") {
            random % blocks
        } else {
            sequence += 1;
            sequence % blocks
        };
        let write = match load.rw.as_str() {
            "randrw" => random >> 60 < 8,
            rw => rw.ends_with("write"),
        };
        let at = base + slot as u64 * stride(load.bs);
        let mut header = [0; 16];
        header[0] = if write { OUT } else { IN } as u8;
        header[8..].copy_from_slice(&(block * (load.bs / 512)).to_le_bytes());
        ram.write(at, &header);
        let data = Piece {
            at: at + 4096,
            len: load.bs as u32,
            device_writes: !write,
        };
        let pieces = [Piece::read(at, 16), data, Piece::write(at + 16, 1)];
        let head = queue.add(&pieces).expect("the ring holds the depth");
        slots[usize::from(head)] = (slot, Instant::now());
    };
    start.wait();
    for slot in 0..load.depth {
        add(&mut queue, &mut slots, slot);
    }
    queue.kick();
    let mut in_flight = load.depth;
    while in_flight > 0 {
        let mut done = if load.poll {
            queue.pop()
        } else {
            Some(queue.wait())
        };
        let now = Instant::now();
        let stopping = stop.load(Ordering::Relaxed);
        while let Some((head, _)) = done {
            let (slot, since) = slots[usize::from(head)];
            outcome.ios += 1;
            outcome.latencies.add((now - since).as_nanos() as u64);
            let mut status = [0xff];
            ram.read_into(base + slot as u64 * stride(load.bs) + 16, &mut status);
            outcome.errors += u64::from(status != [0]);
            if stopping {
                in_flight -= 1;
            } else {
                add(&mut queue, &mut slots, slot);
            }
            done = queue.pop();
        }
        queue.kick();
    }
    outcome.kicks = queue.kicks;
    outcome.calls = queue.calls;
    outcome
}

fn main() -> ExitCode {
    match parse().and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost_load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(load: Load) -> Result<(), String> {
    let per_queue = stride(load.bs) * load.depth as u64;
    let ram_bytes = BUFFERS - vhost_frontend::RAM + per_queue * u64::from(load.queues);
    let setup = Setup {
        queues: load.queues,
        size: load.ring,
        ram_bytes: ram_bytes.next_multiple_of(2 << 20),
        features: load.features,
    };
    let mut machine = Machine::start(&load.socket, setup).map_err(|e| e.to_string())?;
    let config = machine
        .frontend
        .get_config(0, 8)
        .map_err(|e| e.to_string())?;
    let capacity = u64::from_le_bytes(config.try_into().map_err(|_| "short answer")?) * 512;
    let blocks = load.size.unwrap_or(capacity).min(capacity) / load.bs;
    if blocks == 0 || load.depth == 0 || load.depth > usize::from(load.ring) {
        return Err("the disk is too small, or the ring smaller than the depth".into());
    }

    let stop = Arc::new(AtomicBool::new(false));
    let start = Arc::new(Barrier::new(load.queues as usize + 1));
    let threads: Vec<_> = machine
        .queues
        .drain(..)
        .enumerate()
        .map(|(i, queue)| {
            let (load, ram) = (load.clone(), machine.ram.clone());
            let (stop, start) = (stop.clone(), start.clone());
            let base = BUFFERS + per_queue * i as u64;
            thread::spawn(move || drive(&load, &ram, queue, base, blocks, &stop, &start))
        })
        .collect();
    start.wait();
    let cpu_before = load.pid.map_or(0, cpu_ns);
    let began = Instant::now();
    thread::sleep(Duration::from_secs_f64(load.seconds));
    stop.store(true, Ordering::Relaxed);
    let mut total = Outcome {
        ios: 0,
        errors: 0,
        kicks: 0,
        calls: 0,
        latencies: Latencies::new(),
    };
    for thread in threads {
        let one = thread.join().map_err(|_| "a driver thread panicked")?;
        total.ios += one.ios;
        total.errors += one.errors;
        total.kicks += one.kicks;
        total.calls += one.calls;
        for (sum, count) in total.latencies.0.iter_mut().zip(one.latencies.0) {
            *sum += count;
        }
    }
    let elapsed = began.elapsed().as_secs_f64();
    let cpu_ns = load.pid.map_or(0, cpu_ns) - cpu_before;
    let ios = total.ios.max(1) as f64;
    println!(
        "{:9} bs {:>6} depth {:>3} queues {}: {:>9.0} IOPS  p50 {:>7.1} µs  p99 {:>7.1} µs  \
         kicks/io {:.3}  calls/io {:.3}  server CPU/io {}  errors {}",
        load.rw,
        load.bs,
        load.depth,
        load.queues,
        ios / elapsed,
        total.latencies.percentile_us(50.0),
        total.latencies.percentile_us(99.0),
        total.kicks as f64 / ios,
        total.calls as f64 / ios,
        match load.pid {
            Some(_) => format!("{:.2} µs", cpu_ns as f64 / ios / 1000.0),
            None => "?".into(),
        },
        total.errors,
    );
    Ok(())
}
