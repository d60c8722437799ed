//! Options of QEMU's driver `nbd` (`BlockdevOptionsNbd` of its QAPI, section "block-core").

use super::node::{Node, seconds};
use ::nbd::uri::{PORT, Server, Uri};
use anyhow::{Result, anyhow, bail};

impl Node {
    /// The name of the export that is meant: a URI.
    pub fn nbd(&mut self) -> Result<String> {
        let filename = self.take("filename");
        let mut server = self.child("server");
        let mut take = |key: &str| server.take(key).or_else(|| self.take(key));
        let (kind, path) = (take("type"), take("path"));
        let (host, port) = (take("host"), take("port"));
        server.finish("Block protocol 'nbd' doesn't support the option of server")?;
        let export = self.take("export").unwrap_or_default();
        if self.0.contains_key("tls-creds") || self.0.contains_key("tls-hostname") {
            bail!("TLS to NBD servers is not supported: leave out tls-creds and tls-hostname");
        }
        // They count for all servers ([`ImageOptions::server`]).
        for key in ["open-timeout", "reconnect-delay"] {
            self.take(key)
                .map(|value| seconds(key, &value))
                .transpose()?;
        }
        let context = self.take("x-dirty-bitmap");
        self.look_at_file()?;
        self.finish("Block protocol 'nbd' doesn't support the option")?;
        let server = match (kind.as_deref(), path, host, port) {
            (None, None, None, None) => match filename {
                Some(name) if context.is_none() => return Ok(name),
                Some(name) => {
                    let uri = Uri::parse(&name)?;
                    return Ok(Uri { context, ..uri }.to_string());
                }
                None => bail!("NBD server address missing"),
            },
            _ if filename.is_some() => {
                bail!("NBD server address and filename are mutually exclusive")
            }
            (Some("unix") | None, Some(path), None, None) => Server::Unix(block::name::path(&path)),
            (Some("inet") | None, None, Some(host), port) => {
                let port = match port {
                    Some(port) => port
                        .parse()
                        .map_err(|_| anyhow!("{port}: no port of an NBD server"))?,
                    None if kind.is_some() => bail!("Parameter 'server.port' is missing"),
                    None => PORT,
                };
                Server::Tcp(host, port)
            }
            (Some(kind @ ("vsock" | "fd")), ..) => {
                bail!("server.type={kind} is not supported: unix and inet are")
            }
            (Some("unix"), None, ..) => bail!("Parameter 'server.path' is missing"),
            (Some("inet"), _, None, _) => bail!("Parameter 'server.host' is missing"),
            (Some("unix" | "inet") | None, ..) => {
                bail!("path and host/port of an NBD server are mutually exclusive")
            }
            (Some(kind), ..) => bail!("Invalid parameter '{kind}'"),
        };
        Ok(Uri {
            server,
            export,
            context,
        }
        .to_string())
    }
}
