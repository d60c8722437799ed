//! In the steady state the data path allocates nothing.

mod vhost_common;

use bench::driver::{BUFFERS, IN, Machine, OUT, Piece, Setup};
use export::worker::Polling;
use io::EngineKind;
use testkit::allocations::Counting;
use vhost_common::{What, serve};

#[global_allocator]
static ALLOCATOR: Counting = Counting::new();

/// One batch of 32 requests of 4 KiB, half of them writes, answered to the last.
fn batch(vm: &mut Machine) {
    let queue = &mut vm.queues[0];
    for i in 0..32u64 {
        let at = BUFFERS + i * 0x2000;
        let write = i % 2 == 1;
        let mut header = [0; 16];
        header[0] = if write { OUT } else { IN } as u8;
        header[8] = i as u8 * 8;
        vm.ram.write(at, &header);
        let data = Piece {
            at: at + 0x1000,
            len: 4096,
            device_writes: !write,
        };
        let pieces = [Piece::read(at, 16), data, Piece::write(at + 16, 1)];
        queue.add(&pieces).expect("room for 32");
    }
    queue.kick();
    for _ in 0..32 {
        queue.wait();
    }
    let mut status = [0xff];
    for i in 0..32u64 {
        vm.ram.read_into(BUFFERS + i * 0x2000 + 16, &mut status);
        assert_eq!(status, [0]);
    }
}

// One test, so that nothing else allocates in this process meanwhile.
#[test]
fn the_steady_state_allocates_nothing() {
    let engines = [EngineKind::Threads, EngineKind::Native, EngineKind::IoUring];
    for (engine, spec) in engines
        .into_iter()
        .flat_map(|engine| [(engine, Some("null:1G")), (engine, None)])
    {
        if let Err(error) = io::open_engine(engine, &io::EngineOptions::default()) {
            eprintln!("{engine} is not measured: {error}");
            continue;
        }
        for (polling, packed) in [
            (Polling::OFF, false),
            (Polling::default(), false),
            (Polling::OFF, true),
            (Polling::default(), true),
        ] {
            let served = serve(What {
                spec,
                engine,
                // Linux AIO does nothing but O_DIRECT.
                cache: io::Cache::None,
                polling,
                ..What::default()
            });
            let setup = Setup {
                packed,
                ..Setup::default()
            };
            let mut vm = Machine::start(&served.socket(), setup).unwrap();
            for _ in 0..300 {
                batch(&mut vm);
            }
            let before = ALLOCATOR.count();
            for _ in 0..300 {
                batch(&mut vm);
            }
            let count = ALLOCATOR.count() - before;
            assert_eq!(
                count, 0,
                "{engine}, {spec:?}, {polling:?}, packed: {packed}"
            );
        }
    }
}
