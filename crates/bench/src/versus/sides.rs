//! From a side of a cell to the server that is started.

use super::{
    cell::{Image, Server, Side},
    command,
    image::Images,
};
use crate::peer::{ENGINES, Programs, Setup};
use std::path::PathBuf;

/// The variants of a side that are tried; the best one counts.
pub(super) fn variants(side: &Side) -> &'static [&'static str] {
    match side.server {
        // A disk that rests or has no file needs no engine.
        Server::Qsd | Server::QemuNbd if !matches!(side.image, Image::Null | Image::Many(_)) => {
            &ENGINES
        }
        Server::Qsd if side.image != Image::Null => &ENGINES[..1],
        Server::QemuImg => side.job.map_or(&[], command::variants),
        _ => &["auto"],
    }
}

/// What is started for a side on the files that are there, which others have open too where they are `shared`.
pub(super) fn setup<'a>(
    programs: &Programs,
    images: &Images,
    side: &Side,
    engine: &'a str,
    files: &'a [PathBuf],
    shared: bool,
) -> Setup<'a> {
    Setup {
        server: side.server,
        files,
        format: side.image.format(),
        backing: matches!(side.image, Image::Overlay | Image::Subclusters).then(|| images.base()),
        engine,
        queues: side.queues,
        io_threads: side.io_threads,
        polling: side.polling,
        direct: programs.direct,
        drops_flushes: false,
        writethrough: false,
        read_only: side.image == Image::ScatteredFile,
        shared,
        table_cache: None,
        table_entry: None,
    }
}
