//! A vhost-user front-end and a driver that do what a program tells them to.

use super::program::Program;
use bench::driver::{BUFFERS, Frontend, Machine, Piece, RAM, RegionSpec, Setup, code};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Bytes of memory behind the rings.
const BUFFER_BYTES: u64 = 1 << 20;
/// Entries of a ring.
const ENTRIES: u16 = 16;
/// Steps of a program at most.
const STEPS_MAX: usize = 96;

/// Connects, does what the program says and hangs up; then a guest that behaves must find the server well.
///
/// # Panics
///
/// When it does not.
pub fn abuse(socket: &Path, program: &[u8]) {
    let mut program = Program::new(program);
    // A server that has hung up or refuses something ends the program: that is an answer too.
    let kind = program.byte();
    let _ = match kind % 4 {
        0 => messages_only(socket, &mut program),
        queues => {
            let setup = Setup {
                packed: kind >= 128,
                ..setup(u32::from(queues))
            };
            machine(socket, &mut program, setup)
        }
    };
    let next = Setup {
        packed: kind & 64 != 0,
        ..setup(1)
    };
    let mut machine = Machine::start(socket, next).expect("the server takes the next client");
    let (status, data) = machine.request(0, bench::driver::IN, 0, &[], 512);
    assert_eq!(
        (status, data.len()),
        (0, 512),
        "the server answers the next client"
    );
}

fn setup(queues: u32) -> Setup {
    Setup {
        queues,
        size: ENTRIES,
        ram_bytes: BUFFERS - RAM + BUFFER_BYTES,
        ..Setup::default()
    }
}

fn messages_only(socket: &Path, program: &mut Program) -> std::io::Result<()> {
    let mut frontend = Frontend::connect(socket)?;
    let ram = bench::driver::Ram::new(RAM, setup(1).ram_bytes)?;
    for _ in 0..STEPS_MAX {
        if program.at_end() {
            break;
        }
        match program.byte() % 4 {
            0 => frontend.send_raw(program.bytes(255), &[])?,
            1 => frontend.set_mem_table(&[ram.region()], &[ram.fd()])?,
            _ => message(&mut frontend, program, &ram)?,
        }
    }
    Ok(())
}

/// A message of any kind, with payload and descriptors as they come.
fn message(
    frontend: &mut Frontend,
    program: &mut Program,
    ram: &bench::driver::Ram,
) -> std::io::Result<()> {
    let kind = match program.byte() {
        kind @ 0..=250 => u32::from(kind % 46),
        _ => program.u32(),
    };
    let flags = u32::from(program.byte() & 0xfc);
    let mut payload = Vec::new();
    match program.byte() % 5 {
        0 => payload.extend(program.bytes(255)),
        // A queue and a number.
        1 => {
            payload.extend(program.number(4).to_le_bytes());
            let half = program.number(u64::from(ENTRIES)) as u32;
            payload[4..].copy_from_slice(&half.to_le_bytes());
        }
        2 => payload.extend(program.number(4).to_le_bytes()),
        // A table of regions.
        3 => {
            let count = program.number(8);
            payload.extend(count.to_le_bytes());
            for _ in 0..count.min(9) {
                region(program, ram, &mut payload);
            }
        }
        // Addresses of rings.
        _ => {
            payload.extend(program.number(2).to_le_bytes());
            for _ in 0..4 {
                let address = program
                    .number(setup(1).ram_bytes)
                    .wrapping_add(ram.user(RAM));
                payload.extend(address.to_le_bytes());
            }
        }
    }
    let own: Vec<OwnedFd> = (0..program.byte() % 4)
        .map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK))
        .collect::<Result<_, _>>()?;
    let mut fds: Vec<BorrowedFd> = own.iter().map(AsFd::as_fd).collect();
    fds.extend((0..program.byte() % 10).map(|_| ram.fd()));
    frontend.send(kind, flags, &payload, &fds)
}

fn region(program: &mut Program, ram: &bench::driver::Ram, payload: &mut Vec<u8>) {
    let all = ram.region();
    for word in [all.guest, all.len, all.user, all.offset] {
        let word = match program.byte() % 4 {
            0 => program.number(all.len),
            1 => word.wrapping_add(program.u64()),
            _ => word,
        };
        payload.extend(word.to_le_bytes());
    }
}

/// A guest whose rings are sound at first.
fn machine(socket: &Path, program: &mut Program, setup: Setup) -> std::io::Result<()> {
    let mut machine = Machine::start(socket, setup)?;
    for _ in 0..STEPS_MAX {
        if program.at_end() {
            break;
        }
        let nth = usize::from(program.byte()) % machine.queues.len();
        let ram = machine.ram.clone();
        let queue = &mut machine.queues[nth];
        match program.byte() % 16 {
            // A descriptor, in the ring's table or in an indirect one.
            0..=5 => {
                let index = u64::from(program.byte());
                let at = match program.byte() % 3 {
                    0 => queue.tables().0 + 16 * index,
                    _ => queue.descriptor_at((index % u64::from(ENTRIES)) as u16),
                };
                let piece = Piece {
                    at: address(program, queue.tables().0),
                    len: length(program),
                    device_writes: program.byte().is_multiple_of(2),
                };
                let flags = match program.byte() {
                    0..=99 => 1,
                    100..=129 => 4,
                    130..=239 => 0,
                    _ => program.u16(),
                };
                let next = match program.byte() {
                    next @ 0..=239 => u16::from(next) % ENTRIES,
                    _ => program.u16(),
                };
                queue.write_descriptor(at, piece, flags, next);
            }
            // A request's header, mostly of a kind that exists.
            6 | 7 => {
                let at = BUFFERS + u64::from(program.byte()) * 16;
                let kind = match program.byte() {
                    kind @ 0..=239 => u32::from(kind % 14),
                    _ => program.u32(),
                };
                let sector = program.number(2048);
                ram.write(at, &kind.to_le_bytes());
                ram.write(at + 8, &sector.to_le_bytes());
            }
            8 => ram.write(BUFFERS + u64::from(program.u16()), program.bytes(64)),
            // Anywhere in the rings, the device's own included.
            9 => {
                let at = RAM + u64::from(program.u32()) % (bench::driver::RING_BYTES - 64);
                ram.write(at, program.bytes(64));
            }
            10 | 11 => {
                let head = match program.byte() {
                    head @ 0..=239 => u16::from(head) % ENTRIES,
                    _ => program.u16(),
                };
                queue.make_available(head);
                queue.kick_always();
            }
            12 => {
                queue.set_available_index(program.u16());
                queue.kick_always();
            }
            13 => drop(queue.pop_used()),
            // Memory goes and comes, while requests may be in flight.
            14 => {
                let mut spec = ram.region();
                if program.byte().is_multiple_of(2) {
                    spec = RegionSpec {
                        guest: program.number(spec.len).wrapping_add(spec.guest),
                        len: program.number(spec.len),
                        ..spec
                    };
                }
                match program.byte() % 3 {
                    0 => machine.frontend.remove_mem_region(spec)?,
                    1 => machine.frontend.add_mem_region(spec, ram.fd())?,
                    _ => machine.frontend.set_mem_table(&[spec], &[ram.fd()])?,
                }
            }
            _ => match program.byte() % 4 {
                0 => drop(machine.frontend.get_vring_base(nth as u32)?),
                1 => machine.frontend.vring(
                    code::SET_VRING_ENABLE,
                    nth as u32,
                    u32::from(program.byte() % 2),
                )?,
                2 => {
                    let base = match program.byte() % 4 {
                        0 => program.u32(),
                        1 => machine.queues[nth].base(),
                        _ => program.u16().into(),
                    };
                    machine.frontend.start_queue(&machine.queues[nth], base)?;
                }
                _ => message(&mut machine.frontend, program, &ram)?,
            },
        }
    }
    Ok(())
}

/// An address near something.
fn address(program: &mut Program, tables: u64) -> u64 {
    match program.byte() % 8 {
        0 => program.number(setup(1).ram_bytes).wrapping_add(RAM),
        1 => tables + u64::from(program.byte()) * 16,
        2 => program.u64(),
        _ => BUFFERS + u64::from(program.byte()) * 16,
    }
}

fn length(program: &mut Program) -> u32 {
    match program.byte() % 8 {
        0 => 1,
        1 | 2 => 16,
        3 => 512 * u32::from(program.byte()),
        4 => 16 * u32::from(program.byte()),
        5 => program.number(BUFFER_BYTES) as u32,
        6 => 0,
        _ => 4096,
    }
}
