//! A vhost-user front-end and a guest's driver that do what the input says, at a server with a disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use std::sync::OnceLock;

#[path = "../../crates/export/tests/hostile/program.rs"]
mod program;
#[path = "../../crates/export/tests/hostile/vhost.rs"]
mod vhost;
#[path = "../../crates/export/tests/vhost_common/mod.rs"]
mod vhost_common;

static SERVER: OnceLock<PathBuf> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let socket = SERVER.get_or_init(|| {
        let what = vhost_common::What {
            len: 1 << 20,
            options: export::vhost_user::Options {
                queues: 3,
                ..Default::default()
            },
            ..Default::default()
        };
        let served = vhost_common::serve(what);
        let socket = served.socket();
        // For as long as the process lives.
        std::mem::forget(served);
        socket
    });
    vhost::abuse(socket, data);
});
