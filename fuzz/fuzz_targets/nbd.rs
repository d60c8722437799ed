//! An NBD client that does what the input says, at a server with a disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use std::sync::OnceLock;

#[path = "../../crates/export/tests/hostile/nbd.rs"]
mod nbd;
#[path = "../../crates/export/tests/nbd_common/mod.rs"]
mod nbd_common;
#[path = "../../crates/export/tests/hostile/program.rs"]
mod program;

static SERVER: OnceLock<PathBuf> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let socket = SERVER.get_or_init(|| {
        let what = nbd_common::What {
            len: nbd::DISK_BYTES,
            ..Default::default()
        };
        let served = nbd_common::serve(what);
        let socket = served.socket();
        // For as long as the process lives.
        std::mem::forget(served);
        socket
    });
    nbd::abuse(socket, data);
});
