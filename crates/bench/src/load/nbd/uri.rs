//! Where an NBD server is (`doc/uri.md` of NetworkBlockDevice/nbd).

use block::{Error, Result};
use std::path::PathBuf;

/// The port that IANA gave to NBD.
const PORT: u16 = 10809;

/// An export of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Uri {
    pub server: Server,
    /// Its name; empty: the server's default.
    pub export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    Unix(PathBuf),
    Tcp(String, u16),
}

/// Parses `nbd+unix:///EXPORT?socket=PATH`, `nbd://HOST[:PORT][/EXPORT]` or `unix:PATH`.
pub(crate) fn parse(text: &str) -> Result<Uri> {
    let wrong = || {
        Error::invalid(format!(
            "'{text}' is no NBD server: give nbd+unix:///EXPORT?socket=PATH, nbd://HOST:PORT/EXPORT or unix:PATH"
        ))
    };
    if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
        return Ok(Uri {
            server: Server::Unix(path.into()),
            export: String::new(),
        });
    }
    if let Some(rest) = text.strip_prefix("nbd+unix:///") {
        let (export, query) = rest.split_once('?').ok_or_else(wrong)?;
        let mut parameters = query.split('&').filter_map(|pair| pair.split_once('='));
        let socket = parameters.find(|(name, _)| *name == "socket");
        let path = decode(socket.ok_or_else(wrong)?.1).ok_or_else(wrong)?;
        if path.is_empty() {
            return Err(wrong());
        }
        return Ok(Uri {
            server: Server::Unix(path.into()),
            export: decode(export).ok_or_else(wrong)?,
        });
    }
    let rest = text.strip_prefix("nbd://").ok_or_else(wrong)?;
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => {
            let (host, port) = v6.split_once(']').ok_or_else(wrong)?;
            (host, port.strip_prefix(':'))
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let port = port.map_or(Ok(PORT), |port| port.parse().map_err(|_| wrong()))?;
    if host.is_empty() || export.contains('?') {
        return Err(wrong());
    }
    Ok(Uri {
        server: Server::Tcp(host.to_owned(), port),
        export: decode(export).ok_or_else(wrong)?,
    })
}

/// Resolves `%41` and the like (RFC 3986 §2.1).
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood() {
        let unix = |path: &str| Server::Unix(path.into());
        let tcp = |host: &str, port| Server::Tcp(host.into(), port);
        for (text, server, export) in [
            ("unix:/run/s", unix("/run/s"), ""),
            ("nbd+unix:///?socket=/run/s", unix("/run/s"), ""),
            (
                "nbd+unix:///a%20b?x=1&socket=%2Frun/s",
                unix("/run/s"),
                "a b",
            ),
            ("nbd://localhost", tcp("localhost", 10809), ""),
            ("nbd://localhost:1/disk", tcp("localhost", 1), "disk"),
            ("nbd://[::1]:2/a/b", tcp("::1", 2), "a/b"),
            ("nbd://[::1]", tcp("::1", 10809), ""),
        ] {
            let export = export.to_owned();
            assert_eq!(parse(text).unwrap(), Uri { server, export }, "{text}");
        }
        for text in [
            "",
            "unix:",
            "/run/s",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbd://",
            "nbd://h:x",
            "nbd://h:70000",
            "nbd://[::1",
            "nbd+unix:///%4?socket=/s",
            "nbd://h/%ff",
            "nbd+unix:///%zz?socket=s",
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains("is no NBD server"), "{text}: {error}");
        }
    }
}
