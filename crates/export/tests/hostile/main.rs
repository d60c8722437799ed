//! Clients that do anything: the servers as a whole take no harm, and the next client finds them well.

mod nbd;
mod program;
mod vhost;

#[path = "../nbd_common/mod.rs"]
mod nbd_common;
#[path = "../vhost_common/mod.rs"]
mod vhost_common;

use io::EngineKind;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::sync::Once;

/// Programs long enough to do something.
fn programs() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..600)
}

/// Has a panic of a server's thread end the process: its clients would wait for ever, one after the other while
/// the program is made smaller. Test threads are named for their tests.
fn watch_the_server() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            tell(info);
            let thread = std::thread::current();
            if !thread.name().is_some_and(|name| name.starts_with("any_")) {
                std::process::abort();
            }
        }));
    });
}

fn run(cases: u32, abuse: impl Fn(&[u8])) {
    watch_the_server();
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    };
    let result = TestRunner::new(config).run(&programs(), |program| {
        abuse(&program);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn any_nbd_client_is_survived() {
    let what = nbd_common::What {
        len: nbd::DISK_BYTES,
        ..Default::default()
    };
    let served = nbd_common::serve(what);
    run(300, |program| nbd::abuse(&served.socket(), program));
    served.wait_for_connections(0);
}

#[test]
fn any_guest_is_survived() {
    for engine in [EngineKind::Threads, EngineKind::IoUring] {
        let what = vhost_common::What {
            len: 1 << 20,
            engine,
            options: export::vhost_user::Options {
                queues: 3,
                ..Default::default()
            },
            ..Default::default()
        };
        let served = vhost_common::serve(what);
        run(150, |program| vhost::abuse(&served.socket(), program));
    }
}
