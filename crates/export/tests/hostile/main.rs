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

/// Programs long enough to do something.
fn programs() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..600)
}

fn run(cases: u32, abuse: impl Fn(&[u8])) {
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
