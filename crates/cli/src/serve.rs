//! `diskplane serve`.
//!
//! ```text
//!   block signals · open chain · choose engine · start I/O threads · listen · "ready …"
//!        SIGUSR1: statistics
//!   SIGTERM, SIGINT: stop listening · finish what is in flight · flush · close clean · exit 0
//! ```

use crate::{
    args::{self, Discard},
    print,
    signals::{Signal, Signals},
    systemd,
};
use anyhow::{Context, Result, bail};
use block::size;
use disk::{Chain, ChainOptions, Disk, DiskOptions};
use std::{fmt::Write, sync::Arc};

/// Serves an image until a signal stops it.
pub fn run(args: &args::Serve) -> Result<()> {
    if args.vhost_user.is_some() && args.nbd.is_some() && !args.shared {
        bail!(
            "--vhost-user and --nbd at once: two clients that both cache would damage a file system; \
             say --shared if they know of each other"
        );
    }
    // Before anything starts a thread: all of them inherit the mask.
    let mut signals = Signals::block()?;
    let chain = Chain::open(&args.file, &chain_options(args))?;
    for file in chain.layers.iter().flat_map(|layer| &layer.files) {
        if let Some(note) = file.fallback() {
            eprintln!("diskplane: note: {note}");
        }
    }
    let disk = Disk::new(chain, disk_options(args))?;
    let line = ready_line(args, &disk);
    print(&line)?;
    systemd::notify("READY=1")?;
    loop {
        match signals.wait()? {
            Signal::Statistics => eprintln!("{}", disk.statistics().table()),
            Signal::Stop => break,
        }
    }
    systemd::notify("STOPPING=1")?;
    disk.close()
        .with_context(|| format!("{}: close", args.file))?;
    if args.stats {
        eprintln!("{}", disk.statistics().table());
    }
    Ok(())
}

fn chain_options(args: &args::Serve) -> ChainOptions {
    ChainOptions {
        format: args.format,
        read_only: args.read_only,
        cache: args.cache,
        allow_backing: args.allow_backing.clone(),
        ..ChainOptions::default()
    }
}

fn disk_options(args: &args::Serve) -> DiskOptions {
    DiskOptions {
        read_only: args.read_only,
        writethrough: args.cache.writethrough(),
        discard: args.discard == Discard::Unmap,
    }
}

fn ready_line(args: &args::Serve, disk: &Arc<Disk>) -> String {
    let mut line = format!("ready {} {}", args.file, size::human(disk.size()));
    if let Some(path) = &args.vhost_user {
        let _ = write!(line, " vhost-user:{}", path.display());
    }
    if let Some(address) = &args.nbd {
        let _ = write!(line, " nbd:{address}");
    }
    line.push('\n');
    line
}
