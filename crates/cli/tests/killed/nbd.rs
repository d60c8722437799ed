//! An NBD client on a Unix socket: fixed newstyle, simple replies (NBD protocol, "Transmission").

use crate::client::{Client, Kind, Request};
use crate::record::SECTOR;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

pub struct Nbd {
    socket: UnixStream,
    out: Vec<u8>,
    /// Bytes that the answer to each slot's request carries.
    reads: Vec<usize>,
}

impl Nbd {
    pub fn connect(socket: &Path, depth: usize) -> Self {
        let mut socket = UnixStream::connect(socket).unwrap();
        // Only a failure needs that long.
        let limit = Some(Duration::from_secs(20));
        socket.set_read_timeout(limit).unwrap();
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        // Fixed newstyle without zeroes; NBD_OPT_EXPORT_NAME of the default export.
        socket.write_all(&3u32.to_be_bytes()).unwrap();
        socket.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        let mut export = [0; 10];
        socket.read_exact(&mut export).unwrap();
        Self {
            socket,
            out: Vec::new(),
            reads: vec![0; depth],
        }
    }

    fn try_next(&mut self, data: &mut Vec<u8>) -> std::io::Result<(usize, bool)> {
        let mut reply = [0; 16];
        self.socket.read_exact(&mut reply)?;
        let word = |at: usize| u32::from_be_bytes(reply[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), REPLY_MAGIC);
        let (ok, slot) = (word(4) == 0, word(12) as usize);
        data.clear();
        if ok {
            data.resize(self.reads[slot], 0);
            self.socket.read_exact(data)?;
        }
        Ok((slot, ok))
    }
}

impl Client for Nbd {
    fn submit(&mut self, slot: usize, request: &Request, data: &[u8]) {
        let len = request.sectors as usize * SECTOR;
        // Write zeroes with NBD_CMD_FLAG_NO_HOLE every other time.
        let (command, flags) = match request.kind {
            Kind::Read => (0u16, 0u16),
            Kind::Write => (1, 0),
            Kind::Flush => (3, 0),
            Kind::Discard => (4, 0),
            Kind::Zero => (6, (request.number as u16 & 1) << 1),
        };
        self.reads[slot] = if request.kind == Kind::Read { len } else { 0 };
        self.out.extend(REQUEST_MAGIC.to_be_bytes());
        self.out.extend(flags.to_be_bytes());
        self.out.extend(command.to_be_bytes());
        self.out.extend((slot as u64).to_be_bytes());
        self.out
            .extend((request.first * SECTOR as u64).to_be_bytes());
        self.out.extend((len as u32).to_be_bytes());
        self.out.extend(data);
    }

    fn send(&mut self) {
        // The server reads on while its answers wait, so this ends.
        self.socket.write_all(&self.out).unwrap();
        self.out.clear();
    }

    fn next(&mut self, wait: bool, data: &mut Vec<u8>) -> Option<(usize, bool)> {
        match self.try_next(data) {
            Ok(answer) => Some(answer),
            Err(error) => {
                let gone = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset];
                assert!(!wait && gone.contains(&error.kind()), "{error}");
                None
            }
        }
    }
}
