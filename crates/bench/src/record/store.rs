//! Records in files.

use super::{Failure, Record, Run, Sample};
use block::{Context, Error, ErrorKind, Result, size};
use serde_json::Value;
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
};

/// Bytes of a line at most.
const LINE_MAX: u64 = 64 << 20;
/// Bytes of a file at most: they are all in memory.
const FILE_MAX: u64 = 2 << 30;

/// What a file of records holds.
#[derive(Clone, Debug, Default)]
pub struct Set {
    /// The file.
    pub path: PathBuf,
    /// Runs: the first, and each time that it was resumed.
    pub runs: Vec<Run>,
    /// Measurements, in the order in which they were taken.
    pub samples: Vec<Sample>,
    /// What was said of cells.
    pub cells: Vec<Value>,
    /// Sides that could not be measured.
    pub failures: Vec<Failure>,
    /// The last line was cut off when its writer ended, at this offset.
    pub torn: Option<u64>,
}

/// Reads a file of records, or those of a run by its folder: `records.jsonl` of an experiment, else the newest
/// `versus-SECONDS.jsonl`.
///
/// # Errors
///
/// There is none, it cannot be read, is too large, or a line but the last is no record: with its number.
pub fn read(path: &Path) -> Result<Set> {
    let path = &find(path)?;
    let named = || path.display().to_string();
    let file = File::open(path).context(named)?;
    let bytes = file.metadata().context(named)?.len();
    if bytes > FILE_MAX {
        return Err(Error::invalid(format!(
            "{}: it has {}, {} are allowed",
            named(),
            size::human(bytes),
            size::human(FILE_MAX)
        )));
    }
    let mut set = Set {
        path: path.clone(),
        ..Set::default()
    };
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    let mut at = 0_u64;
    for number in 1.. {
        line.clear();
        let read = reader.by_ref().take(LINE_MAX).read_until(b'\n', &mut line);
        let read = read.context(named)? as u64;
        if read == 0 {
            break;
        }
        match serde_json::from_slice::<Record>(&line) {
            Ok(Record::Run(run)) if run.schema > super::SCHEMA => {
                return Err(Error::unsupported(format!(
                    "{}: line {number}: the records are of schema {}, this diskplane ({}) knows those up to {}: use the \
                     version that wrote them",
                    named(),
                    run.schema,
                    env!("CARGO_PKG_VERSION"),
                    super::SCHEMA
                )));
            }
            Ok(record) if line.ends_with(b"\n") => set.push(record),
            // A writer that was stopped in the middle.
            _ if !line.ends_with(b"\n") && read < LINE_MAX => {
                set.torn = Some(at);
                break;
            }
            Ok(_) => {
                return Err(Error::invalid(format!(
                    "{}: line {number} is longer than {}",
                    named(),
                    size::human(LINE_MAX)
                )));
            }
            Err(error) => {
                return Err(Error::invalid(format!(
                    "{}: line {number} is no record: {error}",
                    named()
                )));
            }
        }
        at += read;
    }
    Ok(set)
}

impl Set {
    fn push(&mut self, record: Record) {
        match record {
            Record::Run(run) => self.runs.push(*run),
            Record::Sample(mut sample) => {
                for name in [&mut sample.cell, &mut sample.side] {
                    visible(name);
                }
                self.samples.push(*sample);
            }
            Record::Cell(cell) => self.cells.push(cell),
            Record::Failure(mut failure) => {
                for name in [&mut failure.cell, &mut failure.side] {
                    visible(name);
                }
                self.failures.push(failure);
            }
            Record::Other => {}
        }
    }
}

/// Replaces what no name has and no page or terminal may be given: control characters.
fn visible(name: &mut String) {
    if name.contains(char::is_control) {
        *name = name.replace(char::is_control, "\u{fffd}");
    }
}

/// Adds a record to a file, in one write.
///
/// # Errors
///
/// Writing failed.
pub fn append(mut file: &File, record: &Record) -> Result<()> {
    let text = serde_json::to_string(record)
        .map_err(|error| Error::new(ErrorKind::Io, format!("a record: {error}")))?;
    file.write_all(format!("{text}\n").as_bytes())
        .context(|| "write a record")
}

fn find(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let records = path.join("records.jsonl");
    if records.is_file() {
        return Ok(records);
    }
    let entries = fs::read_dir(path).context(|| path.display().to_string())?;
    let started = |path: &Path| -> Option<u64> {
        let name = path.file_name()?.to_str()?;
        let number = name.strip_prefix("versus-")?.strip_suffix(".jsonl")?;
        number.parse().ok()
    };
    let runs = entries.flatten().map(|entry| entry.path());
    runs.filter(|path| started(path).is_some())
        .max_by_key(|path| started(path))
        .ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "{}: there is neither a records.jsonl nor a versus-….jsonl in it",
                    path.display()
                ),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metric::Metric;

    fn sample(cell: &str) -> Record {
        Record::Sample(Box::new(Sample {
            cell: cell.to_owned(),
            metrics: [(Metric::Iops, 5.0)].into(),
            ..Sample::default()
        }))
    }

    #[test]
    fn what_is_written_is_read_and_a_torn_line_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("records.jsonl");
        let file = File::create(&path).unwrap();
        let run = Run {
            schema: super::super::SCHEMA,
            experiment: "E3".to_owned(),
            ..Run::default()
        };
        append(&file, &Record::Run(Box::new(run.clone()))).unwrap();
        append(&file, &sample("a")).unwrap();
        writeln!(&file, "{{\"record\":\"of a later version\",\"x\":1}}").unwrap();
        let whole = file.metadata().unwrap().len();
        write!(&file, "{{\"record\":\"sam").unwrap();
        let set = read(dir.path()).unwrap();
        assert_eq!(set.runs, [run]);
        assert_eq!((set.samples.len(), &set.samples[0].cell[..]), (1, "a"));
        assert_eq!((set.torn, set.path), (Some(whole), path.clone()));
        // Elsewhere such a line is an error, which says where it is.
        writeln!(&file).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("line 4 is no record"), "{error}");
    }

    #[test]
    fn the_newest_comparison_of_a_folder_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let error = read(dir.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        for (seconds, cell) in [(99, "old"), (100, "new")] {
            let path = dir.path().join(format!("versus-{seconds}.jsonl"));
            append(&File::create(path).unwrap(), &sample(cell)).unwrap();
        }
        assert_eq!(read(dir.path()).unwrap().samples[0].cell, "new");
        // The first schema had fewer fields.
        let path = dir.path().join("one.jsonl");
        let old = "{\"record\":\"run\",\"schema\":1,\"host\":{\"kernel\":\"k\"}}\n\
                   {\"record\":\"sample\",\"cell\":\"c\",\"side\":\"s\",\"engine\":\"auto\",\"round\":0,\
                   \"metrics\":{\"iops\":1.0},\"seen\":null,\"detail\":{}}\n";
        fs::write(&path, old).unwrap();
        let set = read(&path).unwrap();
        assert_eq!((set.runs[0].schema, &set.runs[0].host.kernel[..]), (1, "k"));
        assert_eq!(set.samples[0].metric(Metric::Iops), Some(1.0));
    }

    #[test]
    fn stages_of_the_second_schema_are_read_and_later_schemas_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("two.jsonl");
        let old = "{\"record\":\"run\",\"schema\":2}\n\
                   {\"record\":\"sample\",\"cell\":\"c\",\"side\":\"s\",\"stages\":{\"read\":{\"count\":4,\"map_us\":1.5,\
                   \"submit_us\":0.5,\"device_us\":80.0,\"complete_us\":2.0,\"notify_us\":1.0}}}\n";
        fs::write(&path, old).unwrap();
        let read_back = read(&path).unwrap().samples.remove(0);
        let stages = &read_back.stages["read"];
        assert_eq!((stages.count, stages.total_us()), (4, 85.0));
        assert_eq!(stages.mean_us(trace::Stage::Device), 80.0);
        // What is written now is read as it was.
        let again = dir.path().join("three.jsonl");
        let file = File::create(&again).unwrap();
        append(&file, &Record::Sample(Box::new(read_back.clone()))).unwrap();
        assert_eq!(read(&again).unwrap().samples, [read_back]);
        fs::write(&path, "{\"record\":\"run\",\"schema\":4}\n").unwrap();
        let error = read(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(
            error
                .to_string()
                .contains("line 1: the records are of schema 4"),
            "{error}"
        );
    }
}
