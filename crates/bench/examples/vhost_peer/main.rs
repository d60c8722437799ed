//! Load on a vhost-user-blk server by an independent driver: the crate `virtio-driver`, which is that of libblkio, by other people than
//! ours. `scripts/generators.sh` has it and `diskplane bench load` take turns. Prints reads or writes per second.
//!
//! ```text
//! vhost_peer SOCKET randread|randwrite DEPTH SECONDS
//! ```

mod guest;

use std::{
    env,
    error::Error,
    io::ErrorKind,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport};

/// Bytes of a request.
const BLOCK: usize = 4096;
/// Entries of the virtqueue.
const ENTRIES: u16 = 128;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [socket, pattern, depth, seconds] = &args[..] else {
        return Err("usage: vhost_peer SOCKET randread|randwrite DEPTH SECONDS".into());
    };
    let writes = match pattern.as_str() {
        "randread" => false,
        "randwrite" => true,
        _ => return Err(format!("{pattern}: randread and randwrite are possible").into()),
    };
    let depth: usize = depth.parse()?;
    // Each has a header, a block and a status.
    if !(1..=usize::from(ENTRIES) / 3).contains(&depth) {
        return Err(format!("{depth}: depths from 1 to {} are possible", ENTRIES / 3).into());
    }
    let time = Duration::from_secs_f64(seconds.parse()?);

    let vhost = VhostUser::new(socket, guest::features())?;
    let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
    let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, ENTRIES)?;
    let queue = &mut queues[0];
    let bytes = depth * BLOCK;
    let (file, mut memory) = guest::memory(bytes)?;
    memory.fill(0x5a);
    transport.map_mem_region(memory.as_ptr().addr(), bytes, file.as_raw_fd(), 0)?;
    let kick = transport.get_submission_notifier(0);
    let call = transport.get_completion_fd(0);
    let blocks = u64::from(transport.get_config()?.capacity) * 512 / BLOCK as u64;
    if blocks == 0 {
        return Err("the disk is smaller than a block".into());
    }

    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut submit = |queue: &mut VirtioBlkQueue<'_, usize>, slot: usize| {
        // Xorshift.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = state % blocks * BLOCK as u64;
        let block = &mut memory[slot * BLOCK..][..BLOCK];
        match writes {
            true => queue.write(at, block, slot),
            false => queue.read(at, block, slot),
        }
    };
    queue.set_used_notif_enabled(true);
    for slot in 0..depth {
        submit(queue, slot)?;
    }
    kick.notify()?;
    let began = Instant::now();
    let mut ended = 0_u64;
    let mut slots = Vec::with_capacity(depth);
    while began.elapsed() < time {
        for completion in queue.completions() {
            if completion.ret != 0 {
                return Err(format!("a request failed: errno {}", -completion.ret).into());
            }
            slots.push(completion.context);
        }
        if slots.is_empty() {
            if let Err(error) = call.read() {
                if error.kind() != ErrorKind::WouldBlock {
                    return Err(error.into());
                }
                guest::wait(&*call)?;
            }
            continue;
        }
        ended += slots.len() as u64;
        for slot in slots.drain(..) {
            submit(queue, slot)?;
        }
        if queue.avail_notif_needed() {
            kick.notify()?;
        }
    }
    println!("{:.1}", ended as f64 / began.elapsed().as_secs_f64());
    Ok(())
}
