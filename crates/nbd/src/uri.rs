//! Names of exports: the URI of `doc/uri.md` (NetworkBlockDevice/nbd), and QEMU's own older form.
//!
//! | name | |
//! |---|---|
//! | `nbd://HOST[:PORT]/[EXPORT]` | over TCP; `HOST` may be `[IPv6]` |
//! | `nbd+unix:///[EXPORT]?socket=PATH` | over a Unix socket |
//! | `nbd:HOST:PORT[:exportname=EXPORT]`, `nbd:unix:PATH[:exportname=EXPORT]` | QEMU's, nothing is decoded in it |
//!
//! What goes through TLS, vsock or ssh (`nbds:`, `nbd+vsock:`, `nbd+ssh:`) is refused by its name.

use crate::proto::STRING_BYTES_MAX;
use block::{Error, Result};
use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::PathBuf;

/// The port that IANA gave to NBD.
pub const PORT: u16 = 10809;

/// How the names begin that are NBD's, supported or not.
const SCHEMES: [&str; 7] = [
    "nbd:",
    "nbds:",
    "nbd+unix:",
    "nbds+unix:",
    "nbd+vsock:",
    "nbds+vsock:",
    "nbd+ssh:",
];

/// What a name must look like.
const FORMS: &str = "nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH";

/// An export of a server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Uri {
    /// Where it listens.
    pub server: Server,
    /// The export's name; empty: the server's default.
    pub export: String,
    /// The context whose block status is asked for in place of `base:allocation`: QEMU's `x-dirty-bitmap`, as in
    /// `qemu:dirty-bitmap:NAME`. In a name it is `x-dirty-bitmap=` behind the `?`.
    pub context: Option<String>,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Server {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A host's name or address (IPv6 without brackets), and a port.
    Tcp(String, u16),
}

/// Whether `name` is NBD's rather than a file's: whether it can be opened, [`Uri::parse`] says.
pub fn is_name(name: &str) -> bool {
    SCHEMES.iter().any(|scheme| name.starts_with(scheme))
}

impl Uri {
    /// Parses a name of one of the forms above.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Unsupported`] for TLS and other transports, else [`block::ErrorKind::Invalid`], with what is
    /// wrong.
    pub fn parse(name: &str) -> Result<Self> {
        let wrong = |what: &str| {
            Error::invalid(format!(
                "'{}' is no name of an NBD export: {what}",
                block::plain(name)
            ))
        };
        let (scheme, rest) = name
            .split_once(':')
            .ok_or_else(|| wrong(&format!("give {FORMS}")))?;
        let lacking = match scheme {
            "nbd" | "nbd+unix" => None,
            "nbds" | "nbds+unix" | "nbds+vsock" => Some("TLS"),
            "nbd+vsock" => Some("vsock"),
            "nbd+ssh" => Some("ssh"),
            _ => return Err(wrong(&format!("give {FORMS}"))),
        };
        if let Some(lacking) = lacking {
            return Err(Error::unsupported(format!(
                "'{}': {scheme}: goes through {lacking}, which this client lacks: give {FORMS}",
                block::plain(name)
            )));
        }
        let uri = match rest.strip_prefix("//") {
            Some(rest) => Self::of_uri(scheme, rest),
            None if scheme == "nbd" => Self::of_qemu(rest),
            None => Err("two slashes come behind nbd+unix:"),
        };
        let uri = uri.map_err(wrong)?;
        if uri.export.len() > STRING_BYTES_MAX {
            return Err(wrong("the export's name has more than 4096 bytes"));
        }
        let context = uri.context.as_ref().map_or(0, String::len);
        if context > STRING_BYTES_MAX {
            return Err(wrong("x-dirty-bitmap has more than 4096 bytes"));
        }
        Ok(uri)
    }

    fn of_uri(scheme: &str, rest: &str) -> Result<Self, &'static str> {
        if rest.contains('#') {
            return Err("it has a fragment: write # within a name as %23");
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(path).ok_or("its export has a % that is no byte of UTF-8")?;
        let (mut socket, mut context) = (None, None);
        for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            match key {
                "socket" => {
                    let path = decode(value).filter(|path| !path.is_empty());
                    socket = Some(path.ok_or("socket= is empty, or has a % that is no byte")?);
                }
                "x-dirty-bitmap" => {
                    context = Some(decode(value).ok_or("x-dirty-bitmap= has a % that is no byte")?);
                }
                key if key.starts_with("tls-") => {
                    return Err("it asks for TLS, which this client lacks");
                }
                // Others may mean something to others.
                _ => {}
            }
        }
        let server = match (scheme, socket) {
            ("nbd+unix", Some(path)) if authority.is_empty() => Server::Unix(path.into()),
            ("nbd+unix", Some(_)) => return Err("a Unix socket has no host: three slashes"),
            ("nbd+unix", None) => return Err("it does not say which socket: ?socket=PATH"),
            (_, Some(_)) => return Err("socket= is of nbd+unix: only"),
            (_, None) => {
                // Who the user is, only TLS asks.
                let host = authority
                    .rsplit_once('@')
                    .map_or(authority, |(_, host)| host);
                let (host, port) = host_and_port(host)?;
                Server::Tcp(host, port.unwrap_or(PORT))
            }
        };
        Ok(Self {
            server,
            export,
            context,
        })
    }

    /// What comes behind `nbd:`.
    fn of_qemu(rest: &str) -> Result<Self, &'static str> {
        let (address, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
        let server = match address.strip_prefix("unix:") {
            Some("") => return Err("it does not say which socket: nbd:unix:PATH"),
            Some(path) => Server::Unix(path.into()),
            None => match host_and_port(address)? {
                (host, Some(port)) => Server::Tcp(host, port),
                (_, None) => return Err("a port comes behind the host: nbd:HOST:PORT"),
            },
        };
        Ok(Self {
            server,
            export: export.to_owned(),
            context: None,
        })
    }

    /// Two numbers that no other export has, and no file.
    pub fn identity(&self) -> (u64, u64) {
        let half = |which: u8| {
            let mut hasher = DefaultHasher::new();
            (which, &self.server, &self.export).hash(&mut hasher);
            hasher.finish()
        };
        // Numbers of devices have half as many bits.
        (half(0) | 1 << 63, half(1))
    }
}

/// A host, without the brackets of an IPv6 address, and the port behind it.
fn host_and_port(text: &str) -> Result<(String, Option<u16>), &'static str> {
    let (host, port) = match text.strip_prefix('[') {
        Some(v6) => {
            let (host, port) = v6
                .split_once(']')
                .ok_or("an address begins with [ and has no ]")?;
            match port.strip_prefix(':') {
                None if !port.is_empty() => return Err("behind ] comes : and a port"),
                port => (host, port),
            }
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let host = decode(host)
        .filter(|host| !host.is_empty() && !host.contains('\0'))
        .ok_or("it does not say which host")?;
    let port = match port {
        None | Some("") => None,
        Some(port) => {
            let port = port.parse().ok().filter(|port| *port > 0);
            Some(port.ok_or("a port is a number from 1 to 65535")?)
        }
    };
    Ok((host, port))
}

/// Resolves `%41` and the like (RFC 3986 §2.1).
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' {
            let (digits, tail) = tail.split_at_checked(2)?;
            let digit = |digit: u8| char::from(digit).to_digit(16);
            let (high, low) = (digit(*digits.first()?)?, digit(*digits.get(1)?)?);
            bytes.push(u8::try_from(high << 4 | low).ok()?);
            rest = tail;
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

/// Writes what needs it as `%41`; slashes stay.
fn encode(text: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in text {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => write!(f, "{}", char::from(*byte))?,
            b'-' | b'.' | b'_' | b'~' | b'/' | b':' | b'@' | b',' => {
                write!(f, "{}", char::from(*byte))?;
            }
            _ => write!(f, "%{byte:02X}")?,
        }
    }
    Ok(())
}

/// The name as a URI.
impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use std::os::unix::ffi::OsStrExt as _;
        match &self.server {
            Server::Unix(path) => {
                // As QEMU shows it.
                f.write_str("nbd+unix://")?;
                if !self.export.is_empty() {
                    f.write_str("/")?;
                }
                encode(self.export.as_bytes(), f)?;
                f.write_str("?socket=")?;
                encode(path.as_os_str().as_bytes(), f)?;
            }
            Server::Tcp(host, port) => {
                match host.contains(':') {
                    true => write!(f, "nbd://[{host}]:{port}")?,
                    false => {
                        f.write_str("nbd://")?;
                        encode(host.as_bytes(), f)?;
                        write!(f, ":{port}")?;
                    }
                }
                if !self.export.is_empty() {
                    f.write_str("/")?;
                }
                encode(self.export.as_bytes(), f)?;
            }
        }
        let Some(context) = &self.context else {
            return Ok(());
        };
        f.write_str(match self.server {
            Server::Unix(_) => "&x-dirty-bitmap=",
            Server::Tcp(..) => "?x-dirty-bitmap=",
        })?;
        encode(context.as_bytes(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::ErrorKind;
    use proptest::prelude::*;

    #[test]
    fn names_are_understood() {
        let unix = |path: &str| Server::Unix(path.into());
        let tcp = |host: &str, port| Server::Tcp(host.into(), port);
        for (text, server, export) in [
            ("nbd+unix:///?socket=/run/s", unix("/run/s"), ""),
            ("nbd+unix://?socket=/run/s", unix("/run/s"), ""),
            ("nbd+unix:////x?socket=s", unix("s"), "/x"),
            (
                "nbd+unix:///a%20b?x=1&socket=%2Frun/s",
                unix("/run/s"),
                "a b",
            ),
            ("nbd://localhost", tcp("localhost", 10809), ""),
            ("nbd://localhost/", tcp("localhost", 10809), ""),
            ("nbd://localhost:/", tcp("localhost", 10809), ""),
            ("nbd://me@localhost:1/disk", tcp("localhost", 1), "disk"),
            ("nbd://h/disk?unknown=1", tcp("h", 10809), "disk"),
            ("nbd://[::1]:2/a/b", tcp("::1", 2), "a/b"),
            ("nbd://[::1]", tcp("::1", 10809), ""),
            ("nbd://h/%C3%BC%23%3f", tcp("h", 10809), "ü#?"),
            ("nbd:h:1", tcp("h", 1), ""),
            ("nbd:[::1]:1:exportname=x", tcp("::1", 1), "x"),
            ("nbd:h:1:exportname=a:b%20/c", tcp("h", 1), "a:b%20/c"),
            ("nbd:unix:/run/s", unix("/run/s"), ""),
            ("nbd:unix:/run/s:1:exportname=x", unix("/run/s:1"), "x"),
            ("nbd:unix:s:exportname=", unix("s"), ""),
        ] {
            let export = export.to_owned();
            let uri = Uri::parse(text).unwrap();
            let context = None;
            let want = Uri {
                server,
                export,
                context,
            };
            assert_eq!(uri, want, "{text}");
            assert!(is_name(text));
            assert_eq!(Uri::parse(&uri.to_string()).unwrap(), uri, "{uri}");
            // With another context it is another name of the same disk.
            let context = Some("qemu:dirty-bitmap:a&b?".to_owned());
            let dirty = Uri { context, ..want };
            assert_eq!(Uri::parse(&dirty.to_string()).unwrap(), dirty, "{dirty}");
            assert_eq!(dirty.identity(), uri.identity());
        }
    }

    #[test]
    fn what_is_wrong_with_a_name_is_said() {
        for (text, what) in [
            ("", "give nbd://"),
            ("/run/s", "give nbd://"),
            ("http://h/x", "give nbd://"),
            ("nbd+unix:/x", "two slashes"),
            ("nbd+unix:///x", "which socket"),
            ("nbd+unix:///x?socket=", "socket= is empty"),
            ("nbd+unix://h/x?socket=s", "has no host"),
            ("nbd+unix:///%4?socket=/s", "a % that is no byte"),
            ("nbd+unix:///%+4?socket=/s", "a % that is no byte"),
            ("nbd+unix:///%zz?socket=s", "a % that is no byte"),
            ("nbd+unix:///x?socket=%ff", "a % that is no byte"),
            ("nbd://", "which host"),
            ("nbd:///x", "which host"),
            ("nbd://h:x", "a port is"),
            ("nbd://h:0", "a port is"),
            ("nbd://h:70000", "a port is"),
            ("nbd://h:1:2", "a port is"),
            ("nbd://[::1", "no ]"),
            ("nbd://[::1]x", "behind ]"),
            ("nbd://h/%ff", "a % that is no byte"),
            ("nbd://h/x?socket=/s", "of nbd+unix: only"),
            ("nbd://h/x?tls-certificates=/s", "asks for TLS"),
            ("nbd://h/x#y", "a fragment"),
            ("nbd:", "which host"),
            ("nbd:h", "a port comes behind"),
            ("nbd:h:", "a port comes behind"),
            ("nbd:unix:", "which socket"),
            ("nbd:h:1,ipv4=on", "a port is"),
        ] {
            let error = Uri::parse(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{text}");
            let error = error.to_string();
            assert!(error.contains("is no name of an NBD export"), "{error}");
            assert!(error.contains(what), "{text}: {error}");
        }
        let long = format!("nbd://h/{}", "x".repeat(4097));
        let error = Uri::parse(&long).unwrap_err().to_string();
        assert!(error.contains("more than 4096 bytes"), "{error}");
    }

    #[test]
    fn other_transports_are_refused_by_their_names() {
        for (text, what) in [
            ("nbds://h/x", "TLS"),
            ("nbds+unix:///x?socket=s", "TLS"),
            ("nbd+vsock://2/x", "vsock"),
            ("nbds+vsock://2/x", "TLS"),
            ("nbd+ssh://h/x", "ssh"),
        ] {
            assert!(is_name(text));
            let error = Uri::parse(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(what), "{error}");
        }
        for file in ["nbd", "nbd.raw", "./nbd:x", "xnbd://h", "file:nbd"] {
            assert!(!is_name(file), "{file}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived_and_what_is_shown_is_read_back(
            scheme in 0usize..4, text in "[a-z0-9%/:?=&#@\\[\\]\\PC]{0,30}"
        ) {
            let scheme = ["nbd:", "nbd://", "nbd+unix:///", "nbd+unix:///?socket="][scheme];
            if let Ok(uri) = Uri::parse(&format!("{scheme}{text}")) {
                prop_assert_eq!(Uri::parse(&uri.to_string()).unwrap(), uri);
            }
        }
    }
}
