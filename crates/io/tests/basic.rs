//! Each engine, one operation after the other.

mod common;

use common::{KINDS, Rig, pattern, scratch};
use io::{Cache, File, IoOp, Lock, OpenOptions};

fn options(cache: Cache) -> OpenOptions {
    OpenOptions {
        cache,
        lock: Lock::None,
        ..OpenOptions::default()
    }
}

#[test]
fn writes_and_reads_back() {
    for kind in KINDS {
        for cache in [Cache::Writeback, Cache::None] {
            if kind == io::EngineKind::Native && !cache.direct() {
                continue;
            }
            let dir = scratch();
            let file = File::create_new(&dir.path().join("f"), &options(cache)).unwrap();
            let mut rig = Rig::new(kind);
            let f = rig.engine.attach(&file).unwrap();
            let data = pattern(1, 300_000);
            rig.write(f, 1000, &data);
            rig.finish_ok();
            rig.other(f, IoOp::Sync, 0, 0);
            let back = rig.read(f, 900, 300_500);
            rig.finish_ok();
            let back = rig.take(back);
            assert!(back[..100].iter().all(|b| *b == 0), "{kind} {cache}");
            assert!(back[100..300_100] == data[..], "{kind} {cache}");
            assert!(back[300_100..].iter().all(|b| *b == 0), "{kind} {cache}");
        }
    }
}
