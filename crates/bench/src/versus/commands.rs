//! The cells of commands: issue 5, "Speed, in one run against qemu-img 10 on the same files".

use super::cell::{
    Against, Bar, Cell, Image, Job, Limit, Metric, NONE, Server, Side, at_least, at_most, shown,
    side,
};
use Metric::{CpuS, ElapsedS, PeakMib, Runs};

const CONVERT: &str = "convert raw→qcow2 and qcow2→raw";
const PACKED: &str = "compressed zstd/zlib";

const fn to(format: &'static str, durable: bool) -> Job {
    Job::Convert {
        to: format,
        packed: None,
        durable,
    }
}

const fn pack(method: &'static str) -> Job {
    Job::Convert {
        to: "qcow2",
        packed: Some(method),
        durable: false,
    }
}

const fn sides(image: Image, job: Job) -> [Side; 2] {
    [
        side("diskplane", Server::Tool, image).job(job),
        side("qemu-img", Server::QemuImg, image).job(job),
    ]
}

const PEAK: Bar = Bar {
    metric: PeakMib,
    against: Against::Alone,
    limit: Limit::Below(256.0),
};

const fn bars(times: f64) -> [Bar; 4] {
    [
        at_least(Runs, "qemu-img", times),
        at_most(CpuS, "qemu-img", 1.0),
        shown(ElapsedS, "qemu-img"),
        PEAK,
    ]
}

/// The issue asks for time only.
const fn time_bars(times: f64) -> [Bar; 4] {
    [
        at_least(Runs, "qemu-img", times),
        shown(CpuS, "qemu-img"),
        shown(ElapsedS, "qemu-img"),
        PEAK,
    ]
}

/// Every cell whose sides are commands.
pub const COMMANDS: &[Cell] = &[
    Cell {
        name: "convert-raw-qcow2",
        line: CONVERT,
        meaning: "A half-full raw disk into a new qcow2 image; neither side waits until it is on the disk (`-t unsafe`, qemu-img's default).",
        load: NONE,
        sides: &sides(Image::HalfRaw, to("qcow2", false)),
        bars: &bars(1.5),
        cores: 2,
    },
    Cell {
        name: "convert-raw-qcow2-sync",
        line: CONVERT,
        meaning: "The same, and on the disk when the command ends: diskplane's default, qemu-img with `-t writeback` or `-t none`.",
        load: NONE,
        sides: &sides(Image::HalfRaw, to("qcow2", true)),
        bars: &bars(1.5),
        cores: 2,
    },
    Cell {
        name: "convert-qcow2-raw",
        line: CONVERT,
        meaning: "A half-full qcow2 image into a new raw disk; neither side waits until it is on the disk.",
        load: NONE,
        sides: &sides(Image::HalfQcow2, to("raw", false)),
        bars: &bars(1.5),
        cores: 2,
    },
    Cell {
        name: "convert-qcow2-raw-sync",
        line: CONVERT,
        meaning: "The same, and on the disk when the command ends.",
        load: NONE,
        sides: &sides(Image::HalfQcow2, to("raw", true)),
        bars: &bars(1.5),
        cores: 2,
    },
    Cell {
        name: "convert-zlib",
        line: PACKED,
        meaning: "A smaller half-full raw disk into a compressed qcow2 image (zlib); not waited for.",
        load: NONE,
        sides: &sides(Image::PackRaw, pack("zlib")),
        bars: &time_bars(1.3),
        cores: 2,
    },
    Cell {
        name: "convert-zstd",
        line: PACKED,
        meaning: "The same with zstd.",
        load: NONE,
        sides: &sides(Image::PackRaw, pack("zstd")),
        bars: &time_bars(1.3),
        cores: 2,
    },
    Cell {
        name: "compare",
        line: "`map`/`measure`/`compare`",
        meaning: "The half-full disk as qcow2 and as raw, which are the same.",
        load: NONE,
        sides: &sides(Image::HalfQcow2, Job::Compare),
        bars: &time_bars(1.0),
        cores: 2,
    },
    Cell {
        name: "check",
        line: "`check` of a 1 TiB-virtual qcow2",
        meaning: "A sound qcow2 image of 1 TiB with 2^18 scattered clusters.",
        load: NONE,
        sides: &sides(Image::Sparse, Job::Check),
        bars: &time_bars(2.0),
        cores: 2,
    },
    Cell {
        name: "map",
        line: "`map`/`measure`/`compare`",
        meaning: "The map of the same image as JSON: 2^19 entries.",
        load: NONE,
        sides: &sides(Image::Sparse, Job::Map),
        bars: &time_bars(1.0),
        cores: 2,
    },
    Cell {
        name: "measure",
        line: "`map`/`measure`/`compare`",
        meaning: "How large the same image would be as a new qcow2 image.",
        load: NONE,
        sides: &sides(Image::Sparse, Job::Measure),
        bars: &time_bars(1.0),
        cores: 2,
    },
];
