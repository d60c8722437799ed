//! What a name in an image may mean: the policy of [`super`].

use super::Layer;
use block::{Context, Error, ErrorKind, Result, name};
use image::{Format, Parent, vhd, vhdx, vmdk};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Device and inode of each file of a chain.
pub(super) type Seen = Vec<(u64, u64)>;

/// A name from an image, or of the user, for a message.
pub(super) fn shown(name: &str) -> String {
    name::shown(name).escape_default().to_string()
}

/// Notes that the file at `path`, called `name`, is in the chain; it must not be there already.
pub(super) fn once(seen: &mut Seen, path: &Path, name: &str) -> Result<()> {
    let this = identity(path)?;
    if seen.contains(&this) {
        return Err(Error::corrupt(format!(
            "'{}' is in the chain already: the chain is a loop",
            shown(name)
        )));
    }
    seen.push(this);
    Ok(())
}

/// The format that the image `above` records for its backing file `name`.
pub(super) fn recorded(above: &Path, name: &str, format: Option<&str>) -> Result<Format> {
    match format {
        Some(format) => Format::recorded(format).context(|| format!("'{}'", shown(name))),
        None => Err(Error::new(
            ErrorKind::Denied,
            format!(
                "the format of '{0}' is not recorded in the image, and is not guessed: record it with \
                 diskplane rebase -u -b '{0}' -F raw|qcow2 '{1}'",
                shown(name),
                above.display()
            ),
        )),
    }
}

/// The first of `names` that means a file, and that. What is wrong with the first of them that leads to a file, or
/// of all, where none may be opened.
pub(super) fn resolve_any(
    above: &Path,
    names: &[String],
    allowed: &[PathBuf],
) -> Result<(String, PathBuf)> {
    let mut failed: Option<Error> = None;
    for name in names {
        match resolve(above, name, allowed) {
            Ok(path) => return Ok((name.clone(), path)),
            Err(error)
                if failed
                    .as_ref()
                    .is_none_or(|f| f.kind() == ErrorKind::NotFound) =>
            {
                failed = Some(error);
            }
            Err(_) => {}
        }
    }
    Err(failed.unwrap_or_else(|| Error::corrupt("the image has no name of it that can be read")))
}

/// Whether `layer` is the parent that the image above it means.
pub(super) fn verify(parent: &Parent, layer: &Layer) -> Result<()> {
    let shown = layer.path.display();
    let found = layer.image.unique_id();
    if !parent.unique_ids.is_empty() && found.is_none_or(|id| !parent.unique_ids.contains(&id)) {
        let show = |id: [u8; 16]| match layer.format {
            Format::Vhdx => vhdx::Guid(id).to_string(),
            _ => shown_id(&id),
        };
        let meant: Vec<String> = parent.unique_ids.iter().copied().map(show).collect();
        return Err(Error::corrupt(format!(
            "{shown}: its unique id is {}, the image lies over one with {}: it is another file, or was changed since",
            found.map_or("none".to_owned(), show),
            meant.join(" or ")
        )));
    }
    // Copying a file changes its time, and XenServer's tools mark parents as hidden: no reason to refuse it.
    let changed = fs::metadata(&layer.path)
        .ok()
        .and_then(|m| u64::try_from(m.mtime()).ok());
    if changed.is_some() && parent.changed.is_some() && changed != parent.changed {
        tracing::debug!(
            parent = %shown,
            "was changed after the image over it was made, or copied"
        );
    }
    Ok(())
}

/// An [`Image::unique_id`] as people know it.
fn shown_id(id: &[u8; 16]) -> String {
    match vmdk::cid_of(id) {
        Some(cid) => format!("{cid:08x} (CID)"),
        None => vhd::UniqueId(*id).to_string(),
    }
}

/// The file that `name`, stored in the image at `above`, may mean, or why it may not.
pub(super) fn resolve(above: &Path, name: &str, allowed: &[PathBuf]) -> Result<PathBuf> {
    let shown = shown(name);
    if has_protocol(name) {
        return Err(Error::new(
            ErrorKind::Denied,
            format!("'{shown}' has a protocol, only names of files are opened"),
        ));
    }
    // As in QEMU, a relative name starts at the directory of the name by which the image was
    // opened, also where that is a symbolic link.
    let directory = above.parent().unwrap_or(Path::new(""));
    let at_server = super::server::name(above).is_some();
    if at_server && !name.starts_with('/') {
        return Err(Error::new(
            ErrorKind::Denied,
            format!("'{shown}' is a name at the server, which has no directory"),
        ));
    }
    let path =
        fs::canonicalize(directory.join(name::path(name))).context(|| format!("'{shown}'"))?;
    if !at_server {
        let real = fs::canonicalize(above).context(|| above.display().to_string())?;
        if real.parent().is_some_and(|own| path.starts_with(own)) {
            return Ok(path);
        }
    }
    let allowed = allowed
        .iter()
        .filter(|allowed| super::server::name(allowed).is_none());
    for directory in allowed {
        let real = fs::canonicalize(directory)
            .context(|| format!("--allow-backing {}", directory.display()))?;
        if path.starts_with(&real) {
            return Ok(path);
        }
    }
    Err(Error::new(
        ErrorKind::Denied,
        format!(
            "'{}' lies outside the image's own directory: if that is intended, say --allow-backing {}",
            path.display(),
            path.parent().unwrap_or(&path).display()
        ),
    ))
}

/// Whether `name` is one of a file, and not of something with a protocol (`nbd://…`), which is never opened.
pub fn is_file_name(name: &str) -> bool {
    !has_protocol(name)
}

/// Whether a name is not a path to QEMU: a colon comes before the first slash.
pub(super) fn has_protocol(name: &str) -> bool {
    name.find([':', '/'])
        .is_some_and(|at| name.get(at..).is_some_and(|rest| rest.starts_with(':')))
}

/// What makes a file this file, whatever its name.
pub(super) fn identity(path: &Path) -> Result<(u64, u64)> {
    let metadata = fs::metadata(path).context(|| path.display().to_string())?;
    if let Some(why) = io::refuse_as_image(&metadata) {
        return Err(Error::invalid(format!("{}: {why}", path.display())));
    }
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn protocols_are_what_qemu_takes_for_them() {
        for (name, protocol) in [
            ("base.qcow2", false),
            ("/images/base:1.qcow2", false),
            ("./base:1.qcow2", false),
            ("base:1.qcow2", true),
            ("nbd://host/disk", true),
            ("json:{\"driver\":\"raw\"}", true),
            ("file:base.qcow2", true),
            ("", false),
        ] {
            assert_eq!(has_protocol(name), protocol, "{name}");
        }
    }

    #[test]
    fn names_lead_below_the_own_or_an_allowed_directory_only() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        for sub in ["own/deep", "other", "allowed"] {
            fs::create_dir_all(root.join(sub)).unwrap();
        }
        let files = [
            "own/top",
            "own/base",
            "own/deep/base",
            "other/key",
            "allowed/base",
        ];
        for file in files {
            fs::write(root.join(file), "x").unwrap();
        }
        symlink(root.join("other/key"), root.join("own/link")).unwrap();
        symlink(root.join("own/base"), root.join("own/good-link")).unwrap();
        symlink(root.join("own/top"), root.join("other/top-link")).unwrap();
        let allowed = [root.join("allowed")];
        let absolute = root.join("own/base").display().to_string();
        let top = root.join("own/top");
        for (above, name, reached) in [
            (&top, "base", Ok("own/base")),
            (&top, "deep/base", Ok("own/deep/base")),
            (&top, "./deep/../base", Ok("own/base")),
            (&top, &absolute, Ok("own/base")),
            (&top, "good-link", Ok("own/base")),
            (&top, "../allowed/base", Ok("allowed/base")),
            (&top, "../other/key", Err(ErrorKind::Denied)),
            (&top, "link", Err(ErrorKind::Denied)),
            (&top, "/etc/hostname", Err(ErrorKind::Denied)),
            (&top, "nbd:localhost:1", Err(ErrorKind::Denied)),
            (&top, "absent", Err(ErrorKind::NotFound)),
            // The link's directory is where the name starts, but not where the image is.
            (&root.join("other/top-link"), "key", Err(ErrorKind::Denied)),
        ] {
            let found = resolve(above, name, &allowed);
            let found = found.as_ref().map_err(Error::kind);
            let reached = reached.map(|path| root.join(path));
            assert_eq!(found, reached.as_ref().map_err(|kind| *kind), "{name}");
        }
    }

    #[test]
    fn a_format_that_is_not_recorded_is_not_guessed() {
        let top = Path::new("top");
        assert_eq!(recorded(top, "b", Some("raw")).unwrap(), Format::Raw);
        let error = recorded(top, "b", None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(error.to_string().contains("rebase -u -b 'b'"), "{error}");
        let error = recorded(top, "b", Some("vvfat")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}
