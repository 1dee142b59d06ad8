//! Why a run over a slide, or over all of them, fails.

use std::path::PathBuf;

use super::inputs::InputError;
use crate::geometry::{GridError, Level0Rect, TilePosition};
use crate::inference::{ModelError, SessionError};
use crate::native::NativeError;
use crate::output::OutputError;
use crate::report;
use crate::slide::SlideError;
use crate::stitch::TooManyClasses;
use crate::tissue::TissueError;

/// What stopped a slide or a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The slides of the run can't be told.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A native library is missing.
    #[error(transparent)]
    Native(#[from] NativeError),
    /// The model or its card is not usable.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The slide can't be read.
    #[error(transparent)]
    Slide(#[from] SlideError),
    /// The mask can't be read.
    #[error(transparent)]
    Tissue(#[from] TissueError),
    /// The slide can't be cut into tiles.
    #[error(transparent)]
    Grid(#[from] GridError),
    /// The model failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Too many classes for a map.
    #[error(transparent)]
    Classes(#[from] TooManyClasses),
    /// A file can't be written or read.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// There is nothing to infer with.
    #[error("no sessions were given")]
    NoSessions,
    /// There is nothing to infer.
    #[error("no tiles were given")]
    NoTilesGiven,
    /// The region shares no pixel with the slide.
    #[error("{}: region {region:?} lies outside the slide, {extent:?}", path.display())]
    RegionOutside {
        /// The slide.
        path: PathBuf,
        /// What was asked for.
        region: Level0Rect,
        /// The slide's extent.
        extent: Level0Rect,
    },
    /// A coordinates file was made for tiles of another size.
    #[error(
        "{}: its tiles cover {} × {} level-0 px, this model's {} × {}",
        path.display(), found.0, found.1, expected.0, expected.1
    )]
    CoordsTileSize {
        /// The coordinates file.
        path: PathBuf,
        /// Tile size in the file, level-0 px.
        found: (i64, i64),
        /// The model's tile size on this slide, level-0 px.
        expected: (i64, i64),
    },
    /// A coordinates file was made for another slide.
    #[error("{}: the tile at ({x}, {y}) lies outside the slide", path.display())]
    CoordsOutside {
        /// The coordinates file.
        path: PathBuf,
        /// Its tile, level-0 px.
        x: i64,
        /// Its tile, level-0 px.
        y: i64,
    },
    /// The model's output has NaN or infinite values.
    #[error("{count} values of the model's output for the tile at ({}, {}) are NaN or infinite", position.x, position.y)]
    Nonfinite {
        /// The tile.
        position: TilePosition,
        /// How many values.
        count: usize,
    },
    /// The map has more pixels along a side than a TIFF can.
    #[error("{}: the map at the model's resolution is too large for a TIFF", path.display())]
    MapTooLarge {
        /// The slide.
        path: PathBuf,
    },
    /// There is a limit on memory where the system doesn't tell how much is taken.
    #[error("this system does not tell how much memory a process takes, so no limit can be held")]
    MemoryUnknown,
    /// A slide would take more memory than it may.
    #[error(
        "{}: up to {} of memory expected, more than the limit of {}; most of it, {}, is for the {part}",
        path.display(), report::bytes(*expected), report::bytes(*limit), report::bytes(*bytes)
    )]
    MemoryTooLittle {
        /// The slide.
        path: PathBuf,
        /// What it would take, the program included.
        expected: u64,
        /// What it may take.
        limit: u64,
        /// The largest part.
        part: &'static str,
        /// How much that is.
        bytes: u64,
    },
    /// A slide took more memory than it may.
    #[error(
        "{}: {} of memory taken, more than the limit of {}",
        path.display(), report::bytes(*peak), report::bytes(*limit)
    )]
    MemoryExceeded {
        /// The slide.
        path: PathBuf,
        /// The most that was taken.
        peak: u64,
        /// What it may take.
        limit: u64,
    },
    /// Another run writes to the same folder.
    #[error("{}: another run is writing to this folder{}", path.display(), holder.as_ref().map(|who| format!(" ({who})")).unwrap_or_default())]
    Locked {
        /// The folder.
        path: PathBuf,
        /// Who, as far as the lock says.
        holder: Option<String>,
    },
    /// Someone asked to stop.
    #[error("stopped on request")]
    Cancelled,
    /// A worker panicked.
    #[error("stage {stage:?} panicked: {message}")]
    Panicked {
        /// The stage.
        stage: &'static str,
        /// What the panic said.
        message: String,
    },
}

impl EngineError {
    /// How to put it right, in words that are settings and flags alike.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let text = |hint: Option<&'static str>| hint.map(str::to_owned);
        match self {
            Self::Input(error) => text(error.hint()),
            Self::Native(error) => Some(error.hint()),
            Self::Model(error) => text(error.hint()),
            Self::Slide(error) => error.hint(),
            Self::Tissue(error) => error.hint(),
            Self::Grid(_) => text(Some("lower `overlap` or choose a smaller `region`")),
            Self::Session(error) => error.hint(),
            Self::Classes(_) => text(Some("leave tiff, png and geojson out of `emit`")),
            Self::Output(error) => text(error.hint()),
            Self::RegionOutside { .. } => text(Some("`region` is X,Y,W,H in level-0 pixels")),
            Self::CoordsTileSize { .. } => {
                text(Some("make the coordinates with this model's tile size and resolution, or set `target_mpp`"))
            }
            Self::CoordsOutside { .. } => text(Some("`coords` must have been made from this slide")),
            Self::Nonfinite { .. } => {
                text(Some("try another `variant`, or leave such tiles out by `on_nonfinite` skip"))
            }
            Self::MapTooLarge { .. } => text(Some("choose a `region` or a coarser `target_mpp`")),
            Self::MemoryUnknown => text(Some("leave `memory_limit` out")),
            Self::MemoryTooLittle { part, .. } => text(Some(match *part {
                "model" => "lower `sessions` or `batch_size`, or raise `memory_limit`",
                "tiles" | "predictions" => "lower `batch_size`, `sessions` or `readers`, or raise `memory_limit`",
                "reading" => "lower `readers`, or raise `memory_limit`",
                "maps" => "leave tiff out of `emit`, choose a smaller `region`, or raise `memory_limit`",
                "pictures" => "leave png out of `emit`, or raise `memory_limit`",
                "trace" => "leave `profile` out, or raise `memory_limit`",
                _ => "choose a smaller `region` or a coarser `target_mpp`, or raise `memory_limit`",
            })),
            Self::MemoryExceeded { .. } => text(Some(
                "lower `batch_size`, `sessions` or `readers`, leave kinds out of `emit`, or raise `memory_limit`",
            )),
            Self::Locked { .. } => text(Some("wait for it to end or choose another `out`")),
            Self::Panicked { .. } => text(Some("this is a bug in slidestream: please report it with this message")),
            Self::Cancelled | Self::NoSessions | Self::NoTilesGiven => None,
        }
    }

    /// The message with the messages of what caused it.
    #[must_use]
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error's message with those of its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        // A transparent wrapper repeats its source.
        if !text.ends_with(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text
}
