//! The lines of a job file (fio's HOWTO, "Job file format"): sections, options, comments, includes, variables of the environment.

use block::{Context, Error, Result};
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    rc::Rc,
};

/// Bytes of a file at most.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Includes within includes at most.
const DEPTH_MAX: usize = 8;
/// Sections of a file at most, with those that it includes.
const SECTIONS_MAX: usize = 1024;

/// Where something stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub file: Rc<str>,
    pub line: usize,
}

impl Place {
    /// An error there.
    pub(super) fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::invalid(format!("{}, line {}: {what}", self.file, self.line))
    }
}

/// `name=value`, or `name` alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Given {
    pub at: Place,
    pub name: String,
    pub value: Option<String>,
}

/// `[name]` and the options below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Section {
    pub name: String,
    pub at: Place,
    pub options: Vec<Given>,
}

/// Reads a file with what it includes.
///
/// # Errors
///
/// It cannot be read, is too large, or a line is none of a job file: with file and line.
pub(super) fn read(path: &Path) -> Result<Vec<Section>> {
    let mut sections = Vec::new();
    read_into(path, &mut sections, 0)?;
    Ok(sections)
}

fn read_into(path: &Path, sections: &mut Vec<Section>, depth: usize) -> Result<()> {
    let named = || path.display().to_string();
    let file = File::open(path).context(named)?;
    let mut text = String::new();
    let mut limited = file.take(FILE_BYTES_MAX + 1);
    limited.read_to_string(&mut text).context(named)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(Error::invalid(format!(
            "{}: more than 1 MiB is no job file",
            named()
        )));
    }
    let name: Rc<str> = named().into();
    for (line, number) in text.lines().zip(1..) {
        let at = Place {
            file: name.clone(),
            line: number,
        };
        // As fio does, wherever one begins.
        let line = line.split([';', '#']).next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        if let Some(other) = line.strip_prefix("include ") {
            if depth == DEPTH_MAX {
                return Err(at.wrong("includes within includes within includes …"));
            }
            let other = PathBuf::from(other.trim());
            // From where it is included.
            let other = path
                .parent()
                .map_or(other.clone(), |folder| folder.join(&other));
            read_into(&other, sections, depth + 1)
                .map_err(|e| e.within(format!("{}, line {number}", at.file)))?;
            continue;
        }
        if let Some(rest) = line.strip_prefix('[') {
            let Some(section) = rest.strip_suffix(']').filter(|name| !name.is_empty()) else {
                return Err(at.wrong(format!("'{line}' is no section: [NAME]")));
            };
            if sections.len() == SECTIONS_MAX {
                return Err(at.wrong(format!("more than {SECTIONS_MAX} sections")));
            }
            sections.push(Section {
                name: section.to_owned(),
                at,
                options: Vec::new(),
            });
            continue;
        }
        let Some(section) = sections.last_mut() else {
            return Err(at.wrong(format!("'{line}' stands before the first [section]")));
        };
        let line = expand(line, &at)?;
        let (name, value) = match line.split_once('=') {
            Some((name, value)) => (name.trim(), Some(value.trim().to_owned())),
            None => (line.as_str(), None),
        };
        section.options.push(Given {
            name: name.to_owned(),
            value,
            at,
        });
    }
    Ok(())
}

/// `${NAME}` of the environment; as in fio one that is not there is nothing.
fn expand(line: &str, at: &Place) -> Result<String> {
    let mut text = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, behind)) = after.split_once('}') else {
            return Err(at.wrong("'${' without '}'"));
        };
        text.push_str(before);
        text.push_str(&std::env::var(name).unwrap_or_default());
        rest = behind;
    }
    text.push_str(rest);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn sections_options_and_includes_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.fio");
        fs::write(dir.path().join("b.fio"), "# more\niodepth=4\n[two]\n").unwrap();
        let text = "; a comment\n[global]\nrw = randread\n\n[one] # the first\nstonewall;now\ninclude b.fio\nsize=${NO_SUCH_THING}4k\n";
        fs::write(&path, text).unwrap();
        let sections = read(&path).unwrap();
        let names: Vec<&str> = sections.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["global", "one", "two"]);
        let shown = |n: usize| {
            let options = sections[n].options.iter();
            let shown = options.map(|o| (o.name.as_str(), o.value.as_deref(), o.at.line));
            shown.collect::<Vec<_>>()
        };
        assert_eq!(shown(0), [("rw", Some("randread"), 3)]);
        assert_eq!(
            shown(1),
            [("stonewall", None, 6), ("iodepth", Some("4"), 2)]
        );
        assert_eq!(shown(2), [("size", Some("4k"), 8)]);
        assert!(sections[1].options[1].at.file.ends_with("b.fio"));
    }

    #[test]
    fn what_is_no_job_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.fio");
        for (text, says) in [
            ("rw=read\n", "a.fio, line 1: 'rw=read' stands before"),
            ("[a]\n\n[b\n", "line 3: '[b' is no section"),
            ("[a]\nrw=${X\n", "line 2: '${' without"),
            ("[a]\ninclude a.fio\n", "includes within"),
            ("[a]\ninclude nothing\n", "line 2: "),
        ] {
            fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        fs::write(&path, vec![b'#'; (1 << 20) + 1]).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("1 MiB"));
    }
}
