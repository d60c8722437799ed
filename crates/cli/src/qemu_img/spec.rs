//! What most commands have in common: the image that they work on.

use super::line;
use super::open::Name;
use crate::secret::Objects;
use anyhow::Result;
use clap::Args;

/// How an image is named.
#[derive(Args, Debug)]
pub struct Spec {
    /// specify FILENAME format explicitly
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// indicates that FILENAME is a complete image specification instead of a file name
    #[arg(long)]
    pub image_opts: bool,
    #[command(flatten)]
    pub objects: Objects,
}

impl Spec {
    /// The image that `text` names so.
    pub fn name<'a>(&'a self, text: &'a str) -> Name<'a> {
        Name {
            text,
            format: self.format.as_deref(),
            image_opts: self.image_opts,
        }
    }
}

/// The one image that a command works on.
#[derive(Args, Debug)]
pub struct Image {
    #[command(flatten)]
    pub spec: Spec,
    /// image file name (or specification with --image-opts)
    #[arg(value_name = "FILENAME")]
    pub files: Vec<String>,
}

impl Image {
    /// Its name, or what its name is in options.
    ///
    /// # Errors
    ///
    /// Where there is not one.
    pub fn file(&self) -> Result<&str> {
        line::one(&self.files, "Expecting one image file name")
    }
}

/// `--output`.
#[derive(Args, Debug)]
pub struct Output {
    /// specify output format name (default human)
    #[arg(long, value_name = "human|json")]
    output: Option<String>,
}

impl Output {
    /// Whether it asks for JSON.
    ///
    /// # Errors
    ///
    /// For what is no such name.
    pub fn is_json(&self) -> Result<bool> {
        line::is_json(self.output.as_deref())
    }
}

/// What commands have that take long.
#[derive(Args, Debug)]
pub struct Shown {
    /// quiet operations
    #[arg(short, long)]
    pub quiet: bool,
    /// show operation progress
    #[arg(short, long)]
    progress: bool,
}

impl Shown {
    /// Whether it is to be shown how far the work is.
    pub fn progress(&self) -> bool {
        self.progress && !self.quiet
    }
}
