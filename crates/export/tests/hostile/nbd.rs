//! An NBD client that says what a program tells it to.

use super::program::Program;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Bytes of the disk that the server has.
pub const DISK_BYTES: u64 = 1 << 20;
/// Messages of a program at most.
const MESSAGES_MAX: usize = 64;
/// Payload of a request that is really sent.
const PAYLOAD_MAX: usize = 128 << 10;

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const EXPORT_NAME: u32 = 1;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const SET_META_CONTEXT: u32 = 10;
const EXTENDED_HEADERS: u32 = 11;
const WRITE: u16 = 1;

/// Connects, does what the program says and hangs up.
///
/// # Panics
///
/// When the server does not greet, or does not close the connection after the client's end of it.
pub fn abuse(socket: &Path, program: &[u8]) {
    let mut program = Program::new(program);
    let mut client = UnixStream::connect(socket).expect("the server listens");
    // Only a failure needs that long.
    client
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a limit");
    client
        .set_write_timeout(Some(Duration::from_secs(20)))
        .expect("a limit");
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).expect("a greeting");
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    // What it answers is taken all the time: a client that does not is the tests' subject elsewhere.
    let mut answers = client.try_clone().expect("a descriptor");
    let reader = std::thread::spawn(move || {
        let mut buf = vec![0; 64 << 10];
        loop {
            match answers.read(&mut buf) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
                Err(error) => panic!("the server did not close: {error}"),
            }
        }
    });
    // A server that has closed takes no more: that is an answer too.
    let _ = talk(&mut client, &mut program);
    let _ = client.shutdown(Shutdown::Write);
    reader.join().expect("the connection ends");
}

fn talk(client: &mut UnixStream, program: &mut Program) -> std::io::Result<()> {
    let manner = program.byte() % 6;
    let mut extended = false;
    match manner {
        0 => {}
        1 => client.write_all(&program.u32().to_be_bytes())?,
        _ => client.write_all(&3u32.to_be_bytes())?,
    }
    match manner {
        0..=2 => {}
        3 => option(client, EXPORT_NAME, &[])?,
        4 => {
            option(client, STRUCTURED_REPLY, &[])?;
            // An empty name, one query.
            option(
                client,
                SET_META_CONTEXT,
                b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation",
            )?;
            option(client, GO, &[0; 6])?;
        }
        _ => {
            option(client, EXTENDED_HEADERS, &[])?;
            option(client, GO, &[0; 6])?;
            extended = true;
        }
    }
    for _ in 0..MESSAGES_MAX {
        if program.at_end() {
            break;
        }
        match (program.byte() % 8, manner) {
            (0, _) => client.write_all(program.bytes(255))?,
            (1, 0..=2) => {
                let kind = u32::from(program.byte() % 16);
                option(client, kind, program.bytes(255))?;
            }
            (2, 0..=2) => {
                // A length that may be a lie.
                let (kind, len) = (program.u32(), program.number(64) as u32);
                client.write_all(OPTION_MAGIC)?;
                client.write_all(&kind.to_be_bytes())?;
                client.write_all(&len.to_be_bytes())?;
                client.write_all(program.bytes(255))?;
            }
            (3, 0..=2) => option(client, GO, &[0; 6])?,
            _ => request(client, program, extended)?,
        }
    }
    Ok(())
}

fn option(client: &mut UnixStream, kind: u32, data: &[u8]) -> std::io::Result<()> {
    client.write_all(OPTION_MAGIC)?;
    client.write_all(&kind.to_be_bytes())?;
    client.write_all(&(data.len() as u32).to_be_bytes())?;
    client.write_all(data)
}

fn request(client: &mut UnixStream, program: &mut Program, extended: bool) -> std::io::Result<()> {
    let kind = match program.byte() {
        kind @ 0..=250 => u16::from(kind % 9),
        _ => program.u16(),
    };
    let flags = match program.byte() {
        0..=127 => 0,
        flags @ 128..=250 => u16::from(flags & 63),
        _ => program.u16(),
    };
    let (at, len) = (program.number(DISK_BYTES), program.number(DISK_BYTES / 16));
    let mut bytes = Vec::new();
    match extended {
        false => bytes.extend(0x2560_9513u32.to_be_bytes()),
        true => bytes.extend(0x21e4_1c71u32.to_be_bytes()),
    }
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u64::from(program.byte()).to_be_bytes());
    bytes.extend(at.to_be_bytes());
    match extended {
        false => bytes.extend((len as u32).to_be_bytes()),
        true => bytes.extend(len.to_be_bytes()),
    }
    // With extended headers flag 5 says that a payload follows.
    if kind == WRITE || extended && flags & 32 != 0 {
        let sent = usize::try_from(len).unwrap_or(usize::MAX).min(PAYLOAD_MAX);
        bytes.resize(bytes.len() + sent, 0x5a);
    }
    client.write_all(&bytes)
}
