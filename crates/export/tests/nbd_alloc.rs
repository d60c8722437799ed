//! In the steady state a connection allocates nothing: buffers come from its pool, requests and
//! replies live in its slots.

mod nbd_common;

use image::Format;
use io::EngineKind;
use nbd_common::{Client, What, cmd, header, serve, serve_image};
use std::io::{Read, Write};
use testkit::allocations::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

const BLOCK: usize = 4096;
const LARGE: usize = 256 << 10;

/// What a client sends for one batch, and how many bytes the replies have: 16 reads and 16 writes of 4 KiB,
/// two of each of 256 KiB, a flush.
fn batch() -> (Vec<u8>, usize) {
    let (mut stream, mut replies) = (Vec::new(), 16);
    for (count, len) in [(16, BLOCK), (2, LARGE)] {
        for i in 0..count {
            let at = i * LARGE as u64;
            stream.extend(header(cmd::READ, 0, i, at, len as u32));
            stream.extend(header(cmd::WRITE, 0, i, at, len as u32));
            stream.resize(stream.len() + len, 7);
            replies += 16 + len + 16;
        }
    }
    stream.extend(header(cmd::FLUSH, 0, 99, 0, 0));
    (stream, replies)
}

/// Sends a batch and takes its replies, without allocating itself.
fn play(client: &mut Client, stream: &[u8], replies: &mut [u8]) {
    // The socket holds what the server cannot take before its replies are read.
    client.0.set_nonblocking(true).unwrap();
    let (mut sent, mut got) = (0, 0);
    while got < replies.len() {
        if sent < stream.len() {
            sent += client.0.write(&stream[sent..]).unwrap_or(0);
        } else {
            client.0.set_nonblocking(false).unwrap();
        }
        got += client.0.read(&mut replies[got..]).unwrap_or(0);
    }
    assert_eq!(sent, stream.len());
}

// One test, so that nothing else allocates in this process meanwhile.
#[test]
fn the_steady_state_allocates_nothing() {
    for engine in [EngineKind::Threads, EngineKind::Native, EngineKind::IoUring] {
        for format in [None, Some(Format::Raw), Some(Format::Qcow2)] {
            let what = What {
                engine,
                format: format.unwrap_or(Format::Raw),
                ..What::default()
            };
            let served = match format {
                Some(_) => serve(what),
                None => serve_image(what, tempfile::tempdir().unwrap(), "null:16M"),
            };
            let mut client = served.connect();
            let (stream, len) = batch();
            let mut replies = vec![0; len];
            for _ in 0..60 {
                play(&mut client, &stream, &mut replies);
            }
            let before = ALLOCATOR.count();
            for _ in 0..60 {
                play(&mut client, &stream, &mut replies);
            }
            let allocations = ALLOCATOR.count() - before;
            // 2200 requests. Tables may still grow once to a size that they had not needed before.
            assert!(
                allocations <= 8,
                "{engine}, {format:?}: {allocations} allocations"
            );
        }
    }
}
