//! Serves a raw image or `null:SIZE` over vhost-user-blk until killed: the export alone, to measure it.
//!
//! ```text
//! vhost_serve IMAGE SOCKET [aio=threads|native|io_uring] [cache=none|writeback] [queues=1] [threads=1]
//!             [poll_ns=16000]
//! ```

use block::{Error, Result};
use disk::{Chain, ChainOptions, Disk, DiskOptions};
use export::{
    vhost_user::{Options, VhostUser},
    worker::{Polling, Worker, WorkerOptions},
};
use image::Format;
use io::Aio;
use std::{path::Path, process::ExitCode};

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [spec, socket, rest @ ..] = &args[..] else {
        return Err(Error::invalid("which image, which socket?"));
    };
    let (mut aio, mut queues, mut threads, mut polling) = (Aio::Auto, 1, 1, Polling::default());
    let mut chain = ChainOptions {
        format: (!spec.starts_with("null:")).then_some(Format::Raw),
        cache: io::Cache::None,
        ..ChainOptions::default()
    };
    for arg in rest {
        let (name, value) = arg.split_once('=').unwrap_or((arg, ""));
        let number = || {
            value
                .parse::<u64>()
                .map_err(|e| Error::invalid(format!("{arg}: {e}")))
        };
        match name {
            "aio" => aio = value.parse()?,
            "cache" => chain.cache = value.parse()?,
            "queues" => queues = number()? as u16,
            "threads" => threads = number()? as usize,
            "poll_us" => polling = Polling::up_to(number()?),
            "qcow2" => chain.format = Some(Format::Qcow2),
            _ => return Err(Error::invalid(format!("'{arg}' is not understood"))),
        }
    }
    let chain = Chain::open(spec, &chain)?;
    let files: Vec<_> = chain.layers.iter().flat_map(|l| l.files.clone()).collect();
    let choice = io::choose(aio, &files)?;
    let disk = Disk::new(chain, DiskOptions::default())?;
    let workers = (0..threads)
        .map(|index| {
            Worker::spawn(WorkerOptions {
                polling,
                ..WorkerOptions::new(index, choice.kind)
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let options = Options {
        queues,
        ..Options::default()
    };
    let _server = VhostUser::serve(Path::new(socket), disk, &workers, options)?;
    println!("ready: {} ({})", choice.kind, choice.reason);
    loop {
        std::thread::park();
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost_serve: {error}");
            ExitCode::FAILURE
        }
    }
}
