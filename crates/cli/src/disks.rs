//! Which disks `serve` serves: one named by its own arguments, and one for each `--disk`.

use crate::{args::Serve, options::split, secret::Keys};
use anyhow::{Result, anyhow, bail};
use block::name;
use crypto::Passphrase;
use export::nbd::NbdAddress;
use image::Format;
use std::{path::PathBuf, str::FromStr, sync::Arc};

/// A disk to serve, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskSpec {
    /// Image (its name as [`block::name`] has it), or `null:SIZE`.
    pub file: String,
    /// Format of the image; by its magic where not given.
    pub format: Option<Format>,
    /// Socket for vhost-user-blk.
    pub vhost_user: Option<PathBuf>,
    /// Where NBD clients come.
    pub nbd: Option<NbdAddress>,
    /// Queues that a virtual machine may use.
    pub queues: u16,
    /// Files of its passphrases, in the order of the chain; where there are none, those of the command hold.
    pub key_files: Vec<PathBuf>,
    /// The same by the IDs of secrets.
    pub key_secrets: Vec<String>,
    /// Refuse writes.
    pub read_only: bool,
    /// Allow both exports at the same time.
    pub shared: bool,
    /// The image's external data file, in place of the one that it names.
    pub data_file: Option<PathBuf>,
    /// Serve this internal snapshot of the image, for reading.
    pub snapshot: Option<String>,
}

impl DiskSpec {
    /// The passphrases of its chain.
    pub fn keys(&self, args: &Serve) -> Result<Vec<Arc<Passphrase>>> {
        let own = Keys {
            objects: args.keys.objects.clone(),
            key_secret: self.key_secrets.clone(),
            key_file: self.key_files.clone(),
            key_fd: Vec::new(),
        };
        let keys = own.read()?;
        match keys.is_empty() {
            true => args.keys.read(),
            false => Ok(keys),
        }
    }
}

/// A `--disk` argument: what is not said there holds as for the other disks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskArgument {
    file: String,
    format: Option<Format>,
    vhost_user: Option<PathBuf>,
    nbd: Option<NbdAddress>,
    queues: Option<u16>,
    read_only: Option<bool>,
    key_files: Vec<PathBuf>,
    key_secrets: Vec<String>,
    data_file: Option<PathBuf>,
    snapshot: Option<String>,
}

impl FromStr for DiskArgument {
    type Err = anyhow::Error;

    /// `FILE,vhost-user=SOCK,…`; a comma within a value is written twice, as in QEMU.
    fn from_str(text: &str) -> Result<Self> {
        let mut pieces = split(text).into_iter();
        let mut disk = Self {
            file: pieces.next().unwrap_or_default(),
            ..Self::default()
        };
        if disk.file.is_empty() || text.starts_with(',') {
            bail!("it begins with the image: FILE,vhost-user=SOCK");
        }
        for pair in pieces {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| anyhow!("{pair}: give it as key=value"))?;
            match key {
                "format" => disk.format = Some(value.parse()?),
                "vhost-user" => disk.vhost_user = Some(name::path(value)),
                "nbd" => disk.nbd = Some(value.parse().map_err(|e| anyhow!("nbd={value}: {e}"))?),
                "data-file" => disk.data_file = Some(name::path(value)),
                "snapshot" => disk.snapshot = Some(value.to_owned()),
                "queues" => {
                    let queues = value.parse().ok().filter(|n| (1..=256).contains(n));
                    disk.queues =
                        Some(queues.ok_or_else(|| anyhow!("queues={value}: it must be 1 to 256"))?);
                }
                "key-file" => disk.key_files.push(name::path(value)),
                "key-secret" => disk.key_secrets.push(value.to_owned()),
                "read-only" => {
                    disk.read_only = Some(match value {
                        "on" => true,
                        "off" => false,
                        _ => bail!("read-only={value}: it must be on or off"),
                    });
                }
                _ => bail!(
                    "{key}: a disk has no such option; it has format, vhost-user, nbd, queues, read-only, data-file, snapshot, key-file, key-secret"
                ),
            }
        }
        if disk.vhost_user.is_none() && disk.nbd.is_none() {
            bail!("say where: vhost-user=SOCK or nbd=unix:PATH");
        }
        Ok(disk)
    }
}

/// All disks of a command line, in its order; at least one.
pub fn specs(args: &Serve) -> Result<Vec<DiskSpec>> {
    let mut specs = Vec::new();
    match &args.file {
        Some(file) => {
            if args.vhost_user.is_none() && args.nbd.is_none() {
                bail!("{file}: say where to serve it: --vhost-user SOCK or --nbd unix:PATH");
            }
            specs.push(DiskSpec {
                file: file.clone(),
                format: args.format,
                vhost_user: args.vhost_user.clone(),
                nbd: args.nbd.clone(),
                queues: args.queues,
                read_only: args.read_only,
                shared: args.shared,
                data_file: args.data_file.clone(),
                snapshot: args.snapshot.clone(),
                key_files: Vec::new(),
                key_secrets: Vec::new(),
            });
        }
        None if args.data_file.is_some() => {
            bail!("--data-file is for FILE; a --disk names its own: --disk FILE,data-file=PATH");
        }
        None if args.vhost_user.is_some() || args.nbd.is_some() => {
            bail!(
                "--vhost-user and --nbd are for FILE; a --disk names its own: --disk FILE,vhost-user=SOCK"
            );
        }
        None => {}
    }
    specs.extend(args.disk.iter().map(|disk| DiskSpec {
        file: disk.file.clone(),
        format: disk.format.or(args.format),
        vhost_user: disk.vhost_user.clone(),
        nbd: disk.nbd.clone(),
        queues: disk.queues.unwrap_or(args.queues),
        read_only: disk.read_only.unwrap_or(args.read_only),
        shared: args.shared,
        data_file: disk.data_file.clone(),
        snapshot: disk.snapshot.clone(),
        key_files: disk.key_files.clone(),
        key_secrets: disk.key_secrets.clone(),
    }));
    for spec in &specs {
        if spec.vhost_user.is_some() && spec.nbd.is_some() && !spec.shared {
            bail!(
                "{}: --vhost-user and --nbd at once: two clients that both cache would damage a file system; \
                 say --shared if they know of each other",
                spec.file
            );
        }
    }
    Ok(specs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn serve(args: &[&str]) -> Result<Vec<DiskSpec>> {
        let cli = Cli::try_parse_from([&["diskplane", "serve"], args].concat())?;
        match cli.command {
            Command::Serve(args) => specs(&args),
            _ => bail!("not serve"),
        }
    }

    #[test]
    fn one_disk_or_several() {
        let one = serve(&["a", "-f", "raw", "--vhost-user", "/s", "--queues", "2"]).unwrap();
        assert_eq!(one.len(), 1);
        assert_eq!((one[0].file.as_str(), one[0].queues), ("a", 2));
        let all = serve(&[
            "a",
            "--nbd",
            "unix:/n",
            "--read-only",
            "--disk",
            "b,,c,format=qcow2,vhost-user=/b,queues=4,read-only=off,data-file=/d",
            "--disk",
            "null:1G,vhost-user=/d",
        ])
        .unwrap();
        assert_eq!(all.len(), 3);
        assert_eq!(all[1].file, "b,c");
        assert_eq!(all[1].format, Some(Format::Qcow2));
        assert_eq!((all[1].queues, all[1].read_only), (4, false));
        assert_eq!(all[1].data_file, Some("/d".into()));
        assert_eq!((all[2].queues, all[2].read_only), (1, true));
        assert_eq!(all[2].vhost_user, Some("/d".into()));
    }

    #[test]
    fn says_what_is_missing() {
        for (args, why) in [
            (&["--disk", "a"][..], "say where"),
            (&["--disk", ",vhost-user=/s"], "it begins with the image"),
            (&["--disk", "a,colour=red"], "a disk has no such option"),
            (&["--disk", "a,vhost-user=/s,queues=0"], "1 to 256"),
            (&["--disk", "a,vhost-user=/s,read-only=yes"], "on or off"),
            (&["--disk", "a,vhost-user=/s,nbd=unix:/n"], "--shared"),
            (
                &["a", "--disk", "b,vhost-user=/s"],
                "a: say where to serve it",
            ),
            (
                &["--vhost-user", "/v", "--disk", "b,vhost-user=/s"],
                "are for FILE",
            ),
            (&["--vhost-user", "/v"], "<FILE>"),
        ] {
            let error = serve(args).unwrap_err().to_string();
            assert!(error.contains(why), "{args:?}: {error}");
        }
    }
}
