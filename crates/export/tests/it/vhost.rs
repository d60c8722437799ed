//! The vhost-user-blk export against a hand-written front-end and driver.

use crate::vhost_common;

use bench::driver::{
    BUFFERS, DISCARD, DriverQueue, FLUSH, Frontend, GET_ID, IN, Machine, OUT, Piece, RAM, Ram,
    RegionSpec, Setup, WRITE_ZEROES, code, feature, segment,
};
use disk::DiskOptions;
use export::{
    vhost_user::{Options, VhostUser},
    worker::Polling,
};
use io::EngineKind;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::AsFd;
use vhost_common::{What, serve};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Bytes that say where they belong.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (seed.wrapping_mul(31).wrapping_add(i / 7)) as u8)
        .collect()
}

#[test]
fn features_and_configuration_describe_the_disk() {
    let served = serve(What {
        workers: 2,
        options: Options {
            queues: 3,
            ..Options::default()
        },
        ..What::default()
    });
    let mut frontend = Frontend::connect(&served.socket()).unwrap();
    let features = frontend.get_features().unwrap();
    for wanted in [
        feature::FLUSH,
        feature::CONFIG_WCE,
        feature::MQ,
        feature::DISCARD,
        feature::WRITE_ZEROES,
        feature::INDIRECT,
        feature::EVENT_IDX,
        feature::PROTOCOL,
        feature::VERSION_1,
    ] {
        assert_eq!(features & wanted, wanted, "{wanted:#x}");
    }
    assert_eq!(features & feature::RO, 0);
    frontend.negotiate(!0).unwrap();
    assert_eq!(frontend.get_queue_num().unwrap(), 3);
    assert!(frontend.get_max_mem_slots().unwrap() >= 8);
    let config = frontend.get_config(0, 60).unwrap();
    let u16_at = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    // Offsets of `struct virtio_blk_config` in linux/virtio_blk.h.
    assert_eq!(config[..8], (16u64 << 11).to_le_bytes(), "capacity");
    assert_eq!(u32_at(12), 126, "seg_max");
    assert_eq!(u32_at(20), served.disk.logical_block_size(), "blk_size");
    assert_eq!(config[32], 1, "write cache on");
    assert_eq!(u16_at(34), 3, "num_queues");
    assert!(u32_at(36) > 0, "max_discard_sectors");
    assert!(u32_at(40) > 1, "max_discard_seg");
    assert_eq!(
        u32_at(44),
        served.disk.cluster_size() / 512,
        "discard_sector_alignment"
    );
    assert!(u32_at(48) > 0 && u32_at(52) > 0, "write zeroes");
    assert_eq!(config[56], 1, "write_zeroes_may_unmap");
    assert_eq!(frontend.get_config(8, 8).unwrap(), config[8..16]);
    assert_eq!(frontend.get_config(200, 56).unwrap().len(), 56);
    assert!(frontend.get_config(250, 7).is_err());
}

#[test]
fn a_read_only_disk_offers_and_does_no_writes() {
    let served = serve(What {
        disk: DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        },
        ..What::default()
    });
    let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
    assert_ne!(vm.features & feature::RO, 0);
    assert_eq!(vm.features & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    assert_eq!(vm.request(0, OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(vm.request(0, DISCARD, 0, &segment(0, 8, 0), 0).0, UNSUPP);
    assert_eq!(vm.request(0, IN, 0, &[], 512), (OK, vec![0; 512]));
    assert_eq!(vm.request(0, FLUSH, 0, &[], 0).0, OK);
}

/// Every command once; with event index and indirect descriptors, and without, in rings of both layouts.
#[test]
fn commands_do_what_they_say() {
    let kinds = [
        (!0, Polling::OFF),
        (!feature::EVENT_IDX, Polling::default()),
        (!feature::INDIRECT, Polling::OFF),
        (!(feature::EVENT_IDX | feature::INDIRECT), Polling::OFF),
    ];
    for ((features, polling), (packed, size)) in kinds.into_iter().flat_map(|kind| {
        [
            (kind, (false, 128)),
            (kind, (true, 128)),
            (kind, (true, 11)),
        ]
    }) {
        let served = serve(What {
            polling,
            ..What::default()
        });
        let setup = Setup {
            features,
            packed,
            size,
            ..Setup::default()
        };
        let mut vm = Machine::start(&served.socket(), setup).unwrap();
        assert_eq!(vm.queues[0].is_packed(), packed);
        let data = pattern(1, 64 << 10);
        assert_eq!(vm.request(0, OUT, 8, &data, 0).0, OK);
        assert_eq!(vm.request(0, IN, 8, &[], 64 << 10), (OK, data.clone()));
        assert_eq!(vm.request(0, FLUSH, 0, &[], 0).0, OK);
        assert_eq!(served.file()[4096..4096 + data.len()], data);

        let zeroes = [segment(8, 8, 0), segment(24, 8, 1)].concat();
        assert_eq!(vm.request(0, WRITE_ZEROES, 0, &zeroes, 0).0, OK);
        let discard = [segment(40, 8, 0), segment(56, 0, 0), segment(72, 8, 0)].concat();
        assert_eq!(vm.request(0, DISCARD, 0, &discard, 0).0, OK);
        let mut expected = data.clone();
        for sector in [0, 16, 32, 64] {
            expected[sector * 512..(sector + 8) * 512].fill(0);
        }
        assert_eq!(vm.request(0, IN, 8, &[], 64 << 10), (OK, expected));

        let (status, id) = vm.request(0, GET_ID, 0, &[], 20);
        assert_eq!(
            (status, &id[..]),
            (OK, &b"test\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..])
        );

        // What is not possible fails, and alone.
        let end = (16 << 20) / 512;
        assert_eq!(vm.request(0, IN, end - 1, &[], 512).0, OK);
        assert_eq!(vm.request(0, IN, end - 1, &[], 1024).0, IOERR);
        assert_eq!(vm.request(0, OUT, end, &[1; 512], 0).0, IOERR);
        assert_eq!(vm.request(0, OUT, u64::MAX / 512, &[1; 512], 0).0, IOERR);
        assert_eq!(vm.request(0, OUT, 0, &[1; 100], 0).0, IOERR);
        assert_eq!(vm.request(0, 99, 0, &[], 0).0, UNSUPP);
        assert_eq!(vm.request(0, DISCARD, 0, &segment(0, 8, 1), 0).0, UNSUPP);
        assert_eq!(vm.request(0, IN, 0, &[], 512).0, OK);
    }
}

/// Batches on several queues and workers, against a model of the disk.
#[test]
fn storms_on_several_queues_read_what_was_written() {
    const SECTORS: u64 = 2048;
    for (engine, polling, packed) in [
        (EngineKind::Threads, Polling::OFF, false),
        (EngineKind::Threads, Polling::default(), true),
        (EngineKind::Native, Polling::OFF, false),
        (EngineKind::Native, Polling::Always, true),
        (EngineKind::IoUring, Polling::OFF, true),
        (EngineKind::IoUring, Polling::default(), false),
        (EngineKind::IoUring, Polling::Always, false),
        (EngineKind::IoUring, Polling::Always, true),
    ] {
        if let Err(error) = io::open_engine(engine, &io::EngineOptions::default()) {
            eprintln!("{engine} is not tested: {error}");
            continue;
        }
        let served = serve(What {
            workers: 2,
            engine,
            cache: io::Cache::None,
            polling,
            options: Options {
                queues: 2,
                ..Options::default()
            },
            ..What::default()
        });
        let setup = Setup {
            queues: 2,
            // Of a packed ring no power of two, in which 16 requests of one descriptor are less than a lap.
            size: if packed { 41 } else { 64 },
            packed,
            ..Setup::default()
        };
        let mut vm = Machine::start(&served.socket(), setup).unwrap();
        let mut model = vec![0u8; SECTORS as usize * 512];
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = move |limit: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % limit
        };
        for round in 0..200u64 {
            // Sixteen places that do not overlap, spread over both queues.
            let mut expected = Vec::new();
            let mut heads = Vec::new();
            for place in 0..16u64 {
                let sector = place * (SECTORS / 16) + next(64);
                let sectors = 1 + next(8);
                let len = sectors * 512;
                let slot = BUFFERS + place * 0x4000;
                let write = next(2) == 1;
                let mut header = [0; 16];
                header[..4].copy_from_slice(&if write { OUT } else { IN }.to_le_bytes());
                header[8..].copy_from_slice(&sector.to_le_bytes());
                vm.ram.write(slot, &header);
                vm.ram.write(slot + 16, &[0xff]);
                let range = sector as usize * 512..(sector * 512 + len) as usize;
                let data = slot + 0x1000;
                if write {
                    let bytes = pattern(round * 16 + place, len as usize);
                    vm.ram.write(data, &bytes);
                    model[range].copy_from_slice(&bytes);
                } else {
                    vm.ram.write(data, &vec![0xaa; len as usize]);
                    expected.push((data, model[range].to_vec()));
                }
                // Two pieces of data, cut at an odd place.
                let cut = 1 + next(len - 1);
                let piece = |at, len: u64| Piece {
                    at,
                    len: len as u32,
                    device_writes: !write,
                };
                let pieces = [
                    Piece::read(slot, 16),
                    piece(data, cut),
                    piece(data + cut, len - cut),
                    Piece::write(slot + 16, 1),
                ];
                let queue = &mut vm.queues[(place % 2) as usize];
                heads.push((place % 2, queue.add(&pieces).unwrap()));
            }
            for queue in &mut vm.queues {
                queue.kick();
            }
            for index in 0..2 {
                for _ in 0..8 {
                    let (head, _) = vm.queues[index].wait();
                    let at = heads.iter().position(|h| *h == (index as u64, head));
                    heads.swap_remove(at.expect("each ends once"));
                }
            }
            assert!(heads.is_empty());
            for place in 0..16 {
                assert_eq!(vm.ram.read(BUFFERS + place * 0x4000 + 16, 1), [OK]);
            }
            for (data, bytes) in expected {
                assert!(vm.ram.read(data, bytes.len()) == bytes, "round {round}");
            }
        }
        assert!(served.file()[..model.len()] == model);
    }
}

#[test]
fn a_client_goes_and_comes_back() {
    let served = serve(What::default());
    for round in 0..5u8 {
        let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
        let before = if round == 0 { 0 } else { round - 1 };
        assert_eq!(vm.request(0, IN, 0, &[], 512), (OK, vec![before; 512]));
        assert_eq!(vm.request(0, OUT, 0, &[round; 512], 0).0, OK);
        // Requests in flight when the client vanishes end by themselves.
        for i in 0..16 {
            let at = BUFFERS + 0x10000;
            vm.ram.write(at, &[0; 16]);
            let pieces = [Piece::read(at, 16), Piece::write(at + 512 + i * 1024, 513)];
            vm.queues[0].add(&pieces).unwrap();
        }
        vm.queues[0].kick();
    }
}

#[test]
fn memory_slots_come_and_go() {
    let served = serve(What::default());
    let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
    let extra = Ram::new(0x9_0000_0000, 1 << 20).unwrap();
    let read_into = |vm: &mut Machine, at: u64| {
        vm.ram.write(BUFFERS, &[0; 16]);
        vm.ram.write(BUFFERS + 64, &[0xff]);
        let pieces = [
            Piece::read(BUFFERS, 16),
            Piece::write(at, 512),
            Piece::write(BUFFERS + 64, 1),
        ];
        vm.queues[0].add(&pieces).unwrap();
        vm.queues[0].kick();
        vm.queues[0].wait();
        vm.ram.read(BUFFERS + 64, 1)[0]
    };
    assert_eq!(vm.request(0, OUT, 0, &[7; 512], 0).0, OK);
    for _ in 0..3 {
        assert_eq!(read_into(&mut vm, 0x9_0000_0000), IOERR);
        vm.frontend
            .add_mem_region(extra.region(), extra.fd())
            .unwrap();
        extra.write(0x9_0000_0000, &[0; 512]);
        assert_eq!(read_into(&mut vm, 0x9_0000_0000), OK);
        assert_eq!(extra.read(0x9_0000_0000, 512), [7; 512]);
        vm.frontend.remove_mem_region(extra.region()).unwrap();
    }
    // A whole new table with both, then with the first alone.
    vm.frontend
        .set_mem_table(
            &[vm.ram.region(), extra.region()],
            &[vm.ram.fd(), extra.fd()],
        )
        .unwrap();
    assert_eq!(read_into(&mut vm, 0x9_0000_0000), OK);
    vm.frontend
        .set_mem_table(&[vm.ram.region()], &[vm.ram.fd()])
        .unwrap();
    assert_eq!(read_into(&mut vm, 0x9_0000_0000), IOERR);
    // What is not there cannot be removed; asking costs the connection.
    assert!(vm.frontend.remove_mem_region(extra.region()).is_err());
}

#[test]
fn rings_stop_and_start_where_they_were() {
    for packed in [false, true] {
        stop_and_start(packed);
    }
}

fn stop_and_start(packed: bool) {
    let served = serve(What::default());
    let setup = Setup {
        packed,
        ..Setup::default()
    };
    let mut vm = Machine::start(&served.socket(), setup).unwrap();
    let first = vm.queues[0].base();
    for round in 1..=4u32 {
        for _ in 0..50 {
            assert_eq!(vm.request(0, IN, 0, &[], 512).0, OK);
        }
        // Some are in flight when the stop comes: they are done when it is answered.
        for i in 0..10u64 {
            let at = BUFFERS + 0x10000 + i * 1024;
            vm.ram.write(at, &[0; 16]);
            let pieces = [Piece::read(at, 16), Piece::write(at + 16, 513)];
            vm.queues[0].add(&pieces).unwrap();
        }
        vm.queues[0].kick();
        let base = vm.frontend.get_vring_base(0).unwrap();
        let mut taken = 0;
        while vm.queues[0].pop().is_some() {
            taken += 1;
        }
        assert!(taken <= 10, "{taken}");
        // What was taken is done: the ring stands where the driver has seen it.
        if packed {
            assert_eq!(base, vm.queues[0].base());
        } else {
            let added = vm.queues[0].next_avail();
            assert_eq!(base, u32::from(added) - 10 + taken);
        }
        // A kick to a stopped ring is nothing.
        vm.queues[0].kick_always();
        let queue = &vm.queues[0];
        vm.frontend.start_queue(queue, base).unwrap();
        for _ in taken..10 {
            vm.queues[0].wait();
        }
        // Off and on again, with the features that need no restart.
        vm.frontend.vring(code::SET_VRING_ENABLE, 0, 0).unwrap();
        vm.frontend.vring(code::SET_VRING_ENABLE, 0, 1).unwrap();
        let count = if packed {
            // 128 descriptors and a wrap counter, which begins as 1.
            let (laps, index) = (round * 60 / 128, round * 60 % 128);
            (index | ((laps + 1) % 2) << 15) * 0x1_0001
        } else {
            round * 60
        };
        assert_eq!(vm.frontend.get_vring_base(0).unwrap(), count);
        let queue = &vm.queues[0];
        vm.frontend.start_queue(queue, count).unwrap();
    }
    vm.frontend.tell(code::RESET_DEVICE, &[], &[]).unwrap();
    assert_eq!(vm.frontend.get_vring_base(0).unwrap(), first);
}

#[test]
fn the_write_cache_can_be_switched() {
    let served = serve(What::default());
    {
        let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
        assert!(served.disk.writeback());
        vm.frontend.set_config(32, &[0]).unwrap();
        assert!(!served.disk.writeback());
        assert_eq!(vm.frontend.get_config(32, 1).unwrap(), [0]);
        assert_eq!(vm.request(0, OUT, 0, &[3; 512], 0).0, OK);
        vm.frontend.set_config(32, &[1]).unwrap();
        assert!(served.disk.writeback());
        vm.frontend.set_config(32, &[0]).unwrap();
        assert!(vm.frontend.set_config(0, &[1]).is_err(), "capacity");
        assert!(vm.frontend.closed());
    }
    // A driver that cannot flush gets no write cache; the next client finds it on.
    let setup = Setup {
        features: !(feature::CONFIG_WCE | feature::FLUSH),
        ..Setup::default()
    };
    let vm = Machine::start(&served.socket(), setup).unwrap();
    assert!(!served.disk.writeback());
    drop(vm);
    let _vm = Machine::start(&served.socket(), Setup::default()).unwrap();
    assert!(served.disk.writeback());
}

/// A ring that makes no sense stops and says so; other disks and the next client are unaffected.
#[test]
fn a_broken_ring_is_its_owners_loss() {
    let served = serve(What::default());
    let other = VhostUser::serve(
        &served.path().join("other.sock"),
        served.disk.clone(),
        &served.workers,
        Options::default(),
    )
    .unwrap();
    let mut bystander = Machine::start(other.path(), Setup::default()).unwrap();
    type Break = fn(&mut Machine);
    let breaks: [(&str, Break); 6] = [
        ("head beyond the ring", |vm| {
            vm.queues[0].make_available(128);
        }),
        ("index far ahead", |vm| {
            let idx = vm.queues[0].next_avail().wrapping_add(129);
            vm.queues[0].set_available_index(idx);
        }),
        ("loop", |vm| {
            let queue = &mut vm.queues[0];
            let at = queue.descriptor_at(0);
            queue.write_descriptor(at, Piece::read(BUFFERS, 16), 1, 0);
            queue.make_available(0);
        }),
        ("indirect table in no memory", |vm| {
            let queue = &mut vm.queues[0];
            let at = queue.descriptor_at(0);
            queue.write_descriptor(at, Piece::read(RAM - 4096, 64), 4, 0);
            queue.make_available(0);
        }),
        ("nothing writable", |vm| {
            let queue = &mut vm.queues[0];
            let at = queue.descriptor_at(0);
            queue.write_descriptor(at, Piece::read(BUFFERS, 16), 0, 0);
            queue.make_available(0);
        }),
        ("nothing at all", |vm| {
            let queue = &mut vm.queues[0];
            let at = queue.descriptor_at(0);
            queue.write_descriptor(at, Piece::read(0, 0), 0, 0);
            queue.make_available(0);
        }),
    ];
    let both = breaks
        .iter()
        .flat_map(|one| [(one, false), (one, true)])
        // Of a packed ring, nothing says where another entry is.
        .filter(|((what, _), packed)| {
            !packed || !["head beyond the ring", "index far ahead"].contains(what)
        });
    for ((what, break_it), packed) in both {
        let setup = Setup {
            packed,
            ..Setup::default()
        };
        let mut vm = Machine::start(&served.socket(), setup).unwrap();
        assert_eq!(vm.request(0, IN, 0, &[], 512).0, OK, "{what}");
        break_it(&mut vm);
        vm.queues[0].kick_always();
        assert!(vm.queues[0].wait_err(), "{what}");
        assert_eq!(bystander.request(0, OUT, 8, &[9; 512], 0).0, OK, "{what}");
        // The same client sets the ring up anew.
        vm.frontend.get_vring_base(0).unwrap();
        let ram = vm.ram.clone();
        let queue = DriverQueue::new(ram, RAM, 0, 128, vm.features).unwrap();
        vm.frontend.start_queue(&queue, queue.base()).unwrap();
        vm.queues[0] = queue;
        assert_eq!(vm.request(0, IN, 8, &[], 512), (OK, vec![9; 512]), "{what}");
    }
    other.stop();
}

#[test]
fn messages_that_make_no_sense_end_the_connection() {
    let served = serve(What::default());
    let other = memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&other, 4096).unwrap();
    type Wrong<'a> = &'a dyn Fn(&mut Frontend) -> std::io::Result<()>;
    let wrongs: [(&str, Wrong<'_>); 12] = [
        ("garbage", &|f| {
            f.send_raw(&[0x5a; 64], &[])?;
            f.receive(1).map(drop)
        }),
        ("unknown message", &|f| f.tell(999, &[], &[])),
        ("huge message", &|f| {
            f.send_raw(&[5, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], &[])?;
            f.receive(5).map(drop)
        }),
        ("features not offered", &|f| {
            f.tell(code::SET_FEATURES, &u64::MAX.to_le_bytes(), &[])
        }),
        ("queue that is not there", &|f| {
            f.vring(code::SET_VRING_NUM, 1, 64)
        }),
        ("odd ring size", &|f| f.vring(code::SET_VRING_NUM, 0, 100)),
        ("huge ring size", &|f| {
            f.vring(code::SET_VRING_NUM, 0, 1 << 20)
        }),
        ("base of 17 bits", &|f| {
            f.vring(code::SET_VRING_BASE, 0, 1 << 16)
        }),
        ("kick that is no eventfd", &|f| {
            f.vring_fd(code::SET_VRING_KICK, 0, other.as_fd())
        }),
        ("call that is no eventfd", &|f| {
            f.vring_fd(code::SET_VRING_CALL, 0, other.as_fd())
        }),
        ("memory larger than its file", &|f| {
            let region = RegionSpec {
                guest: 0,
                len: 8192,
                user: 0,
                offset: 0,
            };
            f.set_mem_table(&[region], &[other.as_fd()])
        }),
        ("memory that overlaps", &|f| {
            let region = RegionSpec {
                guest: 0,
                len: 4096,
                user: 0,
                offset: 0,
            };
            f.set_mem_table(&[region; 2], &[other.as_fd(); 2])
        }),
    ];
    for (what, wrong) in wrongs {
        let mut frontend = Frontend::connect(&served.socket()).unwrap();
        frontend.negotiate(!feature::PACKED).unwrap();
        assert!(wrong(&mut frontend).is_err(), "{what}");
        assert!(frontend.closed(), "{what}");
        let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
        assert_eq!(vm.request(0, IN, 0, &[], 512).0, OK, "{what}");
    }
}

#[test]
fn half_a_message_does_not_hold_up_the_stop() {
    let mut served = serve(What::default());
    let frontend = Frontend::connect(&served.socket()).unwrap();
    frontend.send_raw(&[5, 0, 0], &[]).unwrap();
    served.server.take().unwrap().stop();
    assert!(!served.socket().exists());
}

#[test]
fn truncated_memory_is_its_owners_loss() {
    let served = serve(What::default());
    for packed in [false, true] {
        let setup = Setup {
            packed,
            ..Setup::default()
        };
        let mut vm = Machine::start(&served.socket(), setup).unwrap();
        assert_eq!(vm.request(0, IN, 0, &[], 512).0, OK);
        ftruncate(vm.ram.fd(), 0).unwrap();
        vm.queues[0].kick_always();
        // It sees a ring of zeros; that it answers at all is the point.
        vm.frontend.get_vring_base(0).unwrap();
    }
    let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
    assert_eq!(vm.request(0, IN, 0, &[], 512).0, OK);
}

#[test]
fn stop_finishes_what_is_in_flight() {
    let mut served = serve(What::default());
    let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
    let count = 30u64;
    for i in 0..count {
        let at = BUFFERS + i * 0x2000;
        let mut header = [0; 16];
        header[0] = OUT as u8;
        header[8] = i as u8 * 8;
        vm.ram.write(at, &header);
        vm.ram.write(at + 0x1000, &[i as u8 + 1; 4096]);
        let pieces = [
            Piece::read(at, 16),
            Piece::read(at + 0x1000, 4096),
            Piece::write(at + 16, 1),
        ];
        vm.queues[0].add(&pieces).unwrap();
    }
    vm.queues[0].kick();
    served.server.take().unwrap().stop();
    let mut done = 0;
    while vm.queues[0].pop().is_some() {
        done += 1;
    }
    let file = served.file();
    let written = (0..count as usize)
        .filter(|i| file[i * 4096..(i + 1) * 4096] == [*i as u8 + 1; 4096])
        .count();
    assert_eq!(written, done, "what was written was answered");
    assert!(vm.frontend.closed());
    assert!(!served.socket().exists());
    // A new server on the same path.
    served.start();
    let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
    assert_eq!(vm.request(0, IN, 0, &[], 512).0, OK);
}

#[test]
fn sockets_are_replaced_only_when_nobody_listens() {
    let served = serve(What::default());
    let path = served.path().join("another.sock");
    let serve_at = |path: &std::path::Path| {
        VhostUser::serve(
            path,
            served.disk.clone(),
            &served.workers,
            Options::default(),
        )
    };
    let error = serve_at(&served.socket()).unwrap_err().to_string();
    assert!(error.contains("another process serves on it"), "{error}");
    std::fs::write(&path, "precious").unwrap();
    let error = serve_at(&path).unwrap_err().to_string();
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a stale socket");
    let server = serve_at(&path).unwrap();
    Machine::start(&path, Setup::default()).unwrap();
    // Somebody else's socket at the path is left alone.
    std::fs::remove_file(&path).unwrap();
    let _theirs = std::os::unix::net::UnixListener::bind(&path).unwrap();
    server.stop();
    assert!(path.exists());
    for options in [
        Options {
            queues: 0,
            ..Options::default()
        },
        Options {
            queue_size_max: 100,
            ..Options::default()
        },
        Options {
            queue_size_max: 2048,
            ..Options::default()
        },
        Options {
            seg_max: 0,
            ..Options::default()
        },
    ] {
        let path = served.path().join("never.sock");
        let made = VhostUser::serve(&path, served.disk.clone(), &served.workers, options);
        assert!(made.is_err());
        assert!(!path.exists());
    }
}

/// One kick for a batch, and no call that the driver did not ask for.
#[test]
fn a_batch_is_one_kick_and_few_calls() {
    let served = serve(What {
        spec: Some("null:1G"),
        ..What::default()
    });
    for packed in [false, true] {
        let setup = Setup {
            packed,
            ..Setup::default()
        };
        few_calls(Machine::start(&served.socket(), setup).unwrap());
    }
}

fn few_calls(mut vm: Machine) {
    let rounds = 100;
    for _ in 0..rounds {
        let queue = &mut vm.queues[0];
        for i in 0..32u64 {
            let at = BUFFERS + i * 0x1000;
            vm.ram.write(at, &[0; 16]);
            let pieces = [Piece::read(at, 16), Piece::write(at + 16, 513)];
            queue.add(&pieces).unwrap();
        }
        queue.kick();
        for _ in 0..32 {
            queue.wait();
        }
    }
    let queue = &vm.queues[0];
    assert!(queue.kicks <= rounds, "{} kicks", queue.kicks);
    // `null` ends requests at once, and shows a driver that sleeps two by two: none of those is called for twice.
    assert!(queue.calls <= rounds * 16, "{} calls", queue.calls);
}
