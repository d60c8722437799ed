//! A server of ours and libblkio's driver (the crate `virtio-driver`), which other people wrote: from negotiation to data, and what the
//! server noted of it. Split rings only: for packed ones the driver begins with the base 0, whose wrap counters (bits 15 and 31) are
//! not those that it goes on with.

use crate::common;

#[path = "../../examples/vhost_peer/guest.rs"]
mod guest;

use common::{LEN, serve};
use std::os::fd::AsRawFd;
use trace::Operation;
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport};

/// Bytes of a request, and how many requests there are of each kind, all at a time.
const BLOCK: usize = 8192;
const COUNT: usize = 16;

/// Where the blocks lie on the disk: apart, so that nothing is merged.
fn place(block: usize) -> u64 {
    (block * 3 + 1) as u64 * BLOCK as u64
}

/// Waits for `count` requests; those that ended, in the order of their numbers.
fn finish(
    transport: &VirtioBlkTransport,
    queue: &mut VirtioBlkQueue<'_, usize>,
    count: usize,
) -> Vec<usize> {
    transport.get_submission_notifier(0).notify().unwrap();
    let call = transport.get_completion_fd(0);
    let mut ended = Vec::new();
    loop {
        for completion in queue.completions() {
            assert_eq!(completion.ret, 0, "request {}", completion.context);
            ended.push(completion.context);
        }
        if ended.len() >= count {
            ended.sort_unstable();
            return ended;
        }
        guest::wait(&*call).unwrap();
        let _ = call.read();
    }
}

#[test]
fn libblkios_driver_is_served() {
    let served = serve(false);
    let wanted = guest::features();
    let socket = served.dir.path("vhost");
    let vhost = VhostUser::new(socket.to_str().unwrap(), wanted).unwrap();
    let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
    assert_eq!(transport.get_features() & wanted, wanted);
    let capacity = transport.get_config().unwrap().capacity;
    assert_eq!(u64::from(capacity) * 512, LEN);
    let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, 128).unwrap();
    let queue = &mut queues[0];
    queue.set_used_notif_enabled(true);
    let bytes = 2 * COUNT * BLOCK;
    let (file, mut memory) = guest::memory(bytes).unwrap();
    let address = memory.as_ptr().addr();
    transport
        .map_mem_region(address, bytes, file.as_raw_fd(), 0)
        .unwrap();

    let (out, back) = memory.split_at_mut(COUNT * BLOCK);
    let all: Vec<usize> = (0..COUNT).collect();
    for (n, block) in out.chunks_mut(BLOCK).enumerate() {
        block.fill(n as u8 + 1);
        queue.write(place(n), block, n).unwrap();
    }
    assert_eq!(finish(&*transport, queue, COUNT), all);
    queue.flush(COUNT).unwrap();
    assert_eq!(finish(&*transport, queue, 1), [COUNT]);
    for (n, block) in back.chunks_mut(BLOCK).enumerate() {
        queue.read(place(n), block, n).unwrap();
    }
    assert_eq!(finish(&*transport, queue, COUNT), all);
    assert!(out == back);

    let count = COUNT as u64;
    served.assert_grown([0; 3], [count, count, 1]);
    let noted = served.requests();
    for n in 0..COUNT {
        for operation in [Operation::Write, Operation::Read] {
            let asked = (operation, place(n), BLOCK as u64);
            assert_eq!(
                noted.iter().filter(|one| **one == asked).count(),
                1,
                "{asked:?}"
            );
        }
    }
    drop((queues, transport));
    let dir = served.end();
    let disk = std::fs::read(dir.path("disk.raw")).unwrap();
    let mut expected = vec![0; LEN as usize];
    for (n, block) in memory[..COUNT * BLOCK].chunks(BLOCK).enumerate() {
        expected[place(n) as usize..][..BLOCK].copy_from_slice(block);
    }
    assert!(disk == expected);
}
