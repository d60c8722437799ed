//! What to do about an error of the operating system that a command ended with: it says what failed, and the host what
//! is in the way.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// What the errors are called that something can be said of.
const NOT_FOUND: &str = " (os error 2)";
const DENIED: &str = " (os error 13)";
const EXISTS: &str = " (os error 17)";
const NO_DIRECTORY: &str = " (os error 20)";
const DIRECTORY: &str = " (os error 21)";
const FULL: &str = " (os error 28)";
const READ_ONLY: &str = " (os error 30)";

/// What is to be known besides of an error that reads `text`: `nodir/a.raw: No such file or directory (os error 2)`.
pub fn of(text: &str) -> Option<String> {
    let last = text.lines().last()?;
    // The names are in it somewhere, the innermost last.
    let mut names = last.rsplit(": ").skip(1).map(plain_name);
    if last.ends_with(NOT_FOUND) {
        let folder = names.find_map(|name| {
            let folder = name.parent().filter(|p| !p.as_os_str().is_empty())?;
            (!folder.exists()).then_some(folder)
        })?;
        return Some(format!("there is no folder {}", folder.display()));
    }
    if last.ends_with(DENIED) {
        return names.find_map(whose);
    }
    if last.ends_with(FULL) {
        return Some("make room there, or choose another place".to_owned());
    }
    if last.ends_with(EXISTS) {
        let there = names.find_map(|name| fs::metadata(name).ok());
        return Some(match there {
            Some(meta) if meta.is_dir() => "it is a folder: name a file in it".to_owned(),
            Some(meta) if !meta.is_file() => {
                "it is neither a file nor a block device: choose another name".to_owned()
            }
            _ => "remove it or choose another name".to_owned(),
        });
    }
    if last.ends_with(NO_DIRECTORY) {
        let file = names.find_map(|name| name.ancestors().find(|path| path.is_file()))?;
        return Some(format!("{} is a file, no folder", file.display()));
    }
    if last.ends_with(DIRECTORY) {
        return Some("name a file in it".to_owned());
    }
    if last.ends_with(READ_ONLY) {
        let text =
            "it is mounted for reading only: change a copy elsewhere, or mount it for writing";
        return Some(text.to_owned());
    }
    None
}

/// A name without what an address has before it, and quotes.
fn plain_name(name: &str) -> &Path {
    let name = name.trim_start_matches("unix:").trim_matches('\'');
    Path::new(name)
}

/// Whose the file is, or what of the path to it can be seen.
fn whose(name: &Path) -> Option<String> {
    let name = name.is_absolute().then(|| name.to_owned()).or_else(|| {
        let here = std::env::current_dir().ok()?;
        Some(here.join(name))
    })?;
    let (seen, meta) = name.ancestors().find_map(|path| {
        let meta = fs::metadata(path).ok()?;
        Some((path, meta))
    })?;
    // A word of the error that is no name leads to the working directory only.
    let beside = name.parent() == Some(seen);
    if seen != name && !beside {
        return None;
    }
    let kind = if meta.is_dir() { "folder" } else { "file" };
    Some(format!(
        "user {} may not: the {kind} {} belongs to user {} and has mode {:04o}",
        rustix::process::geteuid().as_raw(),
        seen.display(),
        meta.uid(),
        meta.mode() & 0o7777
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn what_is_in_the_way_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display();
        let hint = of(&format!(
            "{path}/no/a.raw: No such file or directory (os error 2)"
        ));
        assert_eq!(hint.unwrap(), format!("there is no folder {path}/no"));
        let hint = of(&format!(
            "unix:{path}/no/s: listen: No such file or directory (os error 2)"
        ));
        assert_eq!(hint.unwrap(), format!("there is no folder {path}/no"));
        // The file's own absence says enough.
        let file = dir.path().join("a.raw");
        let missing = format!("{path}/a.raw: No such file or directory (os error 2)");
        assert_eq!(of(&missing), None);
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let (own, of_file) = (
            rustix::process::geteuid().as_raw(),
            fs::metadata(&file).unwrap().uid(),
        );
        let hint = of(&format!("{path}/a.raw: Permission denied (os error 13)"));
        assert_eq!(
            hint.unwrap(),
            format!(
                "user {own} may not: the file {path}/a.raw belongs to user {of_file} and has mode 0640"
            )
        );
        let hint = of(&format!("{path}/new: Permission denied (os error 13)")).unwrap();
        assert!(
            hint.contains(&format!("the folder {path} belongs to")),
            "{hint}"
        );
        for (name, error, want) in [
            ("a.raw", "File exists (os error 17)", "remove it or choose"),
            (
                "",
                "File exists (os error 17)",
                "is a folder: name a file in it",
            ),
            (
                "a.raw/b",
                "Not a directory (os error 20)",
                "a.raw is a file, no folder",
            ),
            ("", "Is a directory (os error 21)", "name a file in it"),
            (
                "a.raw",
                "Read-only file system (os error 30)",
                "for reading only: change a copy",
            ),
        ] {
            let hint = of(&format!("{path}/{name}: {error}")).unwrap();
            assert!(hint.contains(want), "{name}: {error}: {hint}");
        }
        let device = of("/dev/full: File exists (os error 17)").unwrap();
        assert!(
            device.contains("neither a file nor a block device"),
            "{device}"
        );
        assert_eq!(of("a.raw: header: wrong"), None);
        assert_eq!(of(""), None);
    }
}
