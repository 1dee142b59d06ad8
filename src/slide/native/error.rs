//! What can go wrong between a file and its pixels.

use std::io;

/// Why a file can't be read natively.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PyramidError {
    /// The file can't be read.
    #[error("the TIFF directories can't be read")]
    Io(#[from] io::Error),
    /// The file is no TIFF.
    #[error("no TIFF: the file begins neither with II nor with MM and 42 or 43")]
    NotTiff,
    /// A directory or a value in it can't be parsed.
    #[error("the TIFF directory at byte {offset} can't be parsed")]
    Directory {
        /// Where the directory lies.
        offset: u64,
        /// What the `tiff` crate says.
        #[source]
        source: ::tiff::TiffError,
    },
    /// A directory contradicts itself, the file or common sense.
    #[error("the TIFF directory at byte {offset}: {fault}")]
    Absurd {
        /// Where the directory lies.
        offset: u64,
        /// What is wrong, in words.
        fault: String,
    },
    /// A sound file of a kind that is not read natively.
    #[error("{0} is not read natively")]
    Unsupported(String),
}

/// Why a tile can't be decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TileError {
    /// The tile's bytes can't be read from the file.
    #[error("its bytes can't be read")]
    Io(#[from] io::Error),
    /// The compressed bytes are damaged or cut off.
    #[error("its {compression} data is damaged: {fault}")]
    Damaged {
        /// Name of the compression.
        compression: &'static str,
        /// What is wrong, in words.
        fault: String,
    },
    /// The data is sound but of another size than the directory says.
    #[error("its data holds {found}, not {expected}")]
    WrongSize {
        /// What the data holds, with its unit.
        found: String,
        /// What the directory promises, with its unit.
        expected: String,
    },
    /// The data is of a kind that is not read natively.
    #[error("{0} is not read natively")]
    Unsupported(String),
}
