//! From a connected socket to an export that takes requests: fixed newstyle negotiation.

use super::{
    proto::*,
    uri::{Server, Uri},
};
use block::{Context, Error, ErrorKind, Result, size};
use std::{
    io::{Read, Write},
    net::TcpStream,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

/// How long a server may take for each answer.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// Bytes of an answer to an option that are believed.
const REPLY_BYTES_MAX: u32 = 64 << 10;
/// Answers to one option that are believed.
const REPLIES_MAX: usize = 100;

/// A connection.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Unix(stream) => stream.as_fd(),
            Socket::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Socket {
    pub(super) fn connect(server: &Server) -> std::io::Result<Self> {
        Ok(match server {
            Server::Unix(path) => Socket::Unix(UnixStream::connect(path)?),
            Server::Tcp(host, port) => {
                let stream = TcpStream::connect((host.as_str(), *port))?;
                stream.set_nodelay(true)?;
                Socket::Tcp(stream)
            }
        })
    }

    pub(super) fn set_read_timeout(&self, time: Duration) -> std::io::Result<()> {
        match self {
            Socket::Unix(stream) => stream.set_read_timeout(Some(time)),
            Socket::Tcp(stream) => stream.set_read_timeout(Some(time)),
        }
    }

    fn set_write_timeout(&self, time: Duration) -> std::io::Result<()> {
        match self {
            Socket::Unix(stream) => stream.set_write_timeout(Some(time)),
            Socket::Tcp(stream) => stream.set_write_timeout(Some(time)),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<()> {
        let read = match self {
            Socket::Unix(stream) => stream.read_exact(bytes),
            Socket::Tcp(stream) => stream.read_exact(bytes),
        };
        read.map_err(|error| match error.kind() {
            std::io::ErrorKind::WouldBlock => std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                "the server does not answer: does it take so many connections (qemu-nbd --shared)?",
            ),
            std::io::ErrorKind::UnexpectedEof => {
                std::io::Error::new(error.kind(), "the server closed the connection")
            }
            _ => error,
        })
    }

    fn word<const N: usize>(&mut self) -> std::io::Result<u64> {
        let mut bytes = [0; 8];
        self.read(&mut bytes[..N])?;
        Ok(be::<N>(&bytes, 0))
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Socket::Unix(stream) => stream.write_all(bytes),
            Socket::Tcp(stream) => stream.write_all(bytes),
        }
    }
}

/// What the server said of the export.
#[derive(Clone, Copy, Debug)]
pub(super) struct Export {
    pub capacity: u64,
    pub flags: u16,
    pub headers: Headers,
    /// Smallest and largest requests.
    pub block_min: u32,
    pub block_max: u32,
}

fn nonsense(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Io, what)
}

/// Connects and negotiates.
///
/// # Errors
///
/// Nobody listens, the server has no such export, it wants TLS, or it breaks the protocol.
pub(super) fn open(uri: &Uri) -> Result<(Socket, Export)> {
    let mut socket = Socket::connect(&uri.server).context(|| "connect")?;
    socket
        .set_read_timeout(ANSWER_MAX)
        .and_then(|()| socket.set_write_timeout(ANSWER_MAX))
        .context(|| "connect")?;
    let export = negotiate(&mut socket, &uri.export).context(|| "handshake")?;
    Ok((socket, export))
}

fn negotiate(socket: &mut Socket, name: &str) -> Result<Export> {
    let greeting = || "greeting";
    if socket.word::<8>().context(greeting)? != NBDMAGIC {
        return Err(nonsense("this is no NBD server"));
    }
    if socket.word::<8>().context(greeting)? != IHAVEOPT {
        return Err(nonsense("the server speaks the old style of NBD only"));
    }
    let flags = socket.word::<2>().context(greeting)? as u16;
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(nonsense("the server does not negotiate options"));
    }
    let flags = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
    socket.write(&flags.to_be_bytes()).context(greeting)?;

    let headers = if ask(socket, OPT_EXTENDED_HEADERS, &[], |_| Ok(()))?.is_ok() {
        Headers::Extended
    } else if ask(socket, OPT_STRUCTURED_REPLY, &[], |_| Ok(()))?.is_ok() {
        Headers::Structured
    } else {
        Headers::Simple
    };
    let mut go = (name.len() as u32).to_be_bytes().to_vec();
    go.extend(name.as_bytes());
    go.extend(1u16.to_be_bytes());
    go.extend(INFO_BLOCK_SIZE.to_be_bytes());
    let mut export = Export {
        capacity: 0,
        flags: 0,
        headers,
        // What a client may take for granted of a server that does not say ("size constraints").
        block_min: 1,
        block_max: 32 << 20,
    };
    let mut known = false;
    let answer = ask(socket, OPT_GO, &go, |info| {
        if info.len() < 2 {
            return Err(nonsense("an information without its type"));
        }
        match (be::<2>(info, 0) as u16, info.len()) {
            (INFO_EXPORT, 12) => {
                known = true;
                export.capacity = be::<8>(info, 2);
                export.flags = be::<2>(info, 10) as u16;
            }
            (INFO_BLOCK_SIZE, 14) => {
                export.block_min = be::<4>(info, 2) as u32;
                export.block_max = be::<4>(info, 10) as u32;
            }
            (INFO_EXPORT | INFO_BLOCK_SIZE, len) => {
                return Err(nonsense(format!("an information of {len} bytes")));
            }
            _ => {}
        }
        Ok(())
    })?;
    if let Err(why) = answer {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("export '{name}': {why}"),
        ));
    }
    if !known {
        return Err(nonsense("the server does not say how large the export is"));
    }
    if !export.block_min.is_power_of_two() || export.block_max < export.block_min {
        let (min, max) = (export.block_min, export.block_max);
        return Err(nonsense(format!(
            "the server takes blocks of {min} to {max} bytes"
        )));
    }
    Ok(export)
}

/// Sends an option, hands each information to `info`, and returns the end: acknowledged, or why not.
fn ask(
    socket: &mut Socket,
    option: u32,
    data: &[u8],
    mut info: impl FnMut(&[u8]) -> Result<()>,
) -> Result<std::result::Result<(), String>> {
    let named = || format!("option {option}");
    let mut message = IHAVEOPT.to_be_bytes().to_vec();
    message.extend(option.to_be_bytes());
    message.extend((data.len() as u32).to_be_bytes());
    message.extend(data);
    socket.write(&message).context(named)?;
    for _ in 0..REPLIES_MAX {
        let mut header = [0; 20];
        socket.read(&mut header).context(named)?;
        let (kind, len) = (be::<4>(&header, 12) as u32, be::<4>(&header, 16) as u32);
        if be::<8>(&header, 0) != OPTION_REPLY_MAGIC || be::<4>(&header, 8) != u64::from(option) {
            return Err(nonsense("this is no answer").within(named()));
        }
        if len > REPLY_BYTES_MAX {
            let len = size::human(len.into());
            return Err(nonsense(format!("an answer of {len}")).within(named()));
        }
        let mut reply = vec![0; len as usize];
        socket.read(&mut reply).context(named)?;
        match kind {
            REP_ACK => return Ok(Ok(())),
            REP_INFO => info(&reply).context(named)?,
            error if error & REP_FLAG_ERROR != 0 => {
                let text = String::from_utf8_lossy(&reply);
                let number = error & !REP_FLAG_ERROR;
                return Ok(Err(match number {
                    5 => "the server wants TLS, which this client lacks".to_owned(),
                    _ if text.is_empty() => format!("refused (error {number})"),
                    _ => format!("refused: {text}"),
                }));
            }
            _ => {}
        }
    }
    Err(nonsense("the answer has no end").within(named()))
}
