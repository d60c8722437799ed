//! What a server leaves of requests in flight, for the next.

use crate::vhost_common;

use bench::driver::{BUFFERS, DISCARD, Frontend, GET_ID, IN, Machine, OUT, Piece, Setup};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::{fd::AsFd, unix::fs::FileExt};
use vhost_common::{What, serve};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// A server that was killed took four requests and answered the third: the next does the others again.
#[test]
fn requests_in_flight_outlive_their_server() {
    let served = serve(What::default());
    let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
    vm.frontend.get_vring_base(0).unwrap();
    let (description, file) = vm.frontend.get_inflight(1, 128).unwrap();
    let file = std::fs::File::from(file);
    vm.frontend
        .set_inflight(&description, file.as_fd())
        .unwrap();
    let queue = &vm.queues[0];
    vm.frontend.start_queue(queue, 0).unwrap();
    assert_eq!(vm.request(0, IN, 0, &[], 512).0, OK);
    vm.frontend.get_vring_base(0).unwrap();

    let mut heads = Vec::new();
    for i in 0..6u64 {
        let at = BUFFERS + 0x10000 + i * 0x1000;
        let mut header = [0; 16];
        header[0] = OUT as u8;
        header[8] = i as u8;
        vm.ram.write(at, &header);
        vm.ram.write(at + 16, &[i as u8 + 1; 512]);
        vm.ram.write(at + 600, &[0xff]);
        let pieces = [Piece::read(at, 528), Piece::write(at + 600, 1)];
        heads.push(vm.queues[0].add(&pieces).unwrap());
    }
    // The dead server's notes (vhost-user.rst, "Inflight I/O tracking"): it had taken 0 to 3, answered
    // 2, and died before it cleared that one's flag.
    for (i, head) in heads[..4].iter().enumerate() {
        let at = 16 + 16 * u64::from(*head);
        let mut entry = [0; 16];
        entry[0] = 1;
        entry[6..8].copy_from_slice(&0xffffu16.to_le_bytes());
        entry[8..].copy_from_slice(&(100 + i as u64).to_le_bytes());
        file.write_all_at(&entry, at).unwrap();
    }
    file.write_all_at(&heads[2].to_le_bytes(), 12).unwrap();
    vm.queues[0].push_used(heads[2]);
    vm.ram.write(BUFFERS + 0x12000 + 600, &[OK]);

    // QEMU knows but the used index: 2 in all.
    vm.frontend
        .set_inflight(&description, file.as_fd())
        .unwrap();
    let queue = &vm.queues[0];
    vm.frontend.start_queue(queue, 2).unwrap();
    let mut done: Vec<u16> = (0..6).map(|_| vm.queues[0].wait().0).collect();
    assert!(vm.queues[0].pop().is_none(), "nothing twice");
    assert_eq!(done.remove(0), heads[2]);
    done.sort_unstable();
    let mut expected = [0, 1, 3, 4, 5].map(|i| heads[i]);
    expected.sort_unstable();
    assert_eq!(done, expected);
    let disk = served.file();
    for i in 0..6usize {
        let status = vm.ram.read(BUFFERS + 0x10000 + i as u64 * 0x1000 + 600, 1);
        assert_eq!(status, [OK]);
        // The answered one was written by the server that died, and not again.
        let byte = if i == 2 { 0 } else { i as u8 + 1 };
        assert_eq!(disk[i * 512..(i + 1) * 512], [byte; 512], "{i}");
    }
    vm.frontend.get_vring_base(0).unwrap();
    let mut flags = vec![0; 16 * 129];
    file.read_exact_at(&mut flags, 0).unwrap();
    assert!(
        flags[16..].chunks(16).all(|entry| entry[0] == 0),
        "no flag is left"
    );
}

#[test]
fn impossible_inflight_files_are_refused() {
    let served = serve(What::default());
    let small = memfd_create("small", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&small, 4096).unwrap();
    for (what, queues, size, mmap_size) in [
        ("too many queues", 2u16, 128u16, 65536u64),
        ("too large rings", 1, 2048, 65536),
        ("file too small for its size", 1, 128, 65536),
        ("size too small for its rings", 1, 1024, 4096),
    ] {
        let mut frontend = Frontend::connect(&served.socket()).unwrap();
        frontend.negotiate(!0).unwrap();
        let mut description = mmap_size.to_le_bytes().to_vec();
        description.extend([0; 8]);
        description.extend(queues.to_le_bytes());
        description.extend(size.to_le_bytes());
        description.extend([0; 4]);
        let set = frontend.set_inflight(&description, small.as_fd());
        assert!(set.is_err(), "{what}");
    }
    let mut vm = Machine::start(&served.socket(), Setup::default()).unwrap();
    assert_eq!(vm.request(0, IN, 0, &[], 512).0, OK);
}

/// Requests that are answered without the disk (names, nonsense, no segments) between others, in one batch, where each is noted.
#[test]
fn answers_without_the_disk_are_shown_before_the_next_is_noted() {
    let served = serve(What::default());
    for packed in [false, true] {
        let setup = Setup {
            packed,
            ..Setup::default()
        };
        let mut vm = Machine::start(&served.socket(), setup).unwrap();
        let base = vm.frontend.get_vring_base(0).unwrap();
        let (description, file) = vm.frontend.get_inflight(1, 128).unwrap();
        let file = std::fs::File::from(file);
        vm.frontend
            .set_inflight(&description, file.as_fd())
            .unwrap();
        vm.frontend.start_queue(&vm.queues[0], base).unwrap();
        for _ in 0..40 {
            let kinds = [
                (IN, 512, OK),
                (GET_ID, 20, OK),
                (99, 512, UNSUPP),
                (IN, 512, OK),
                (IN, 100, IOERR),
                (DISCARD, 16, OK),
                (IN, 512, OK),
            ];
            let mut heads = Vec::new();
            for (i, (kind, len, _)) in kinds.iter().enumerate() {
                let at = BUFFERS + 0x10000 + i as u64 * 0x1000;
                let mut header = [0; 16];
                header[..4].copy_from_slice(&kind.to_le_bytes());
                vm.ram.write(at, &header);
                vm.ram.write(at + 1024, &[0xff]);
                let mut pieces = vec![Piece::read(at, 16)];
                pieces.push(match *kind {
                    // A segment of no sectors.
                    DISCARD => Piece::read(at + 16, *len),
                    _ => Piece::write(at + 16, *len),
                });
                pieces.push(Piece::write(at + 1024, 1));
                heads.push(vm.queues[0].add(&pieces).unwrap());
            }
            vm.queues[0].kick();
            let mut done: Vec<u16> = heads.iter().map(|_| vm.queues[0].wait().0).collect();
            done.sort_unstable();
            heads.sort_unstable();
            assert_eq!(done, heads, "packed: {packed}");
            for (i, (kind, _, status)) in kinds.iter().enumerate() {
                let at = BUFFERS + 0x10000 + i as u64 * 0x1000 + 1024;
                assert_eq!(vm.ram.read(at, 1), [*status], "{kind}, packed: {packed}");
            }
        }
        vm.frontend.get_vring_base(0).unwrap();
        let (header, entry) = if packed { (32, 32) } else { (16, 16) };
        let mut notes = vec![0; header + entry * 128];
        file.read_exact_at(&mut notes, 0).unwrap();
        let noted = notes[header..].chunks(entry).filter(|note| note[0] != 0);
        assert_eq!(noted.count(), 0, "packed: {packed}");
    }
}
