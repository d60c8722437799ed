//! Telling systemd that a service is ready (`sd_notify(3)`).

use anyhow::{Context, Result};
use std::{
    env,
    ffi::{OsStr, OsString},
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

/// Sends `state` (`READY=1`, `STOPPING=1`) to the socket that `$NOTIFY_SOCKET` names; nothing to do where it
/// names none.
pub fn notify(state: &str) -> Result<()> {
    match env::var_os("NOTIFY_SOCKET") {
        Some(name) if !name.is_empty() => {
            send(&name, state).with_context(|| format!("NOTIFY_SOCKET {}", name.display()))
        }
        _ => Ok(()),
    }
}

fn send(name: &OsString, state: &str) -> Result<()> {
    let address = match name.as_bytes().split_first() {
        Some((b'@', abstract_name)) => SocketAddr::from_abstract_name(abstract_name)?,
        _ => SocketAddr::from_pathname(OsStr::new(name))?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reaches_sockets_with_a_path_and_without() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let unique = format!("diskplane-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&unique).unwrap();
        for (socket, name) in [
            (UnixDatagram::bind(&path).unwrap(), path.into_os_string()),
            (
                UnixDatagram::bind_addr(&abstract_address).unwrap(),
                OsString::from(format!("@{unique}")),
            ),
        ] {
            send(&name, "READY=1").unwrap();
            let mut buf = [0; 64];
            let len = socket.recv(&mut buf).unwrap();
            assert_eq!(&buf[..len], b"READY=1");
        }
        assert!(send(&OsString::from("/nonexistent/notify"), "READY=1").is_err());
    }
}
