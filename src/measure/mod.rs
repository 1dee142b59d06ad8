//! The arithmetic of comparing: repeated times, agreement of two models, accuracy against labels, and how sure they are.
//!
//! Pure functions on numbers; what is measured, and when, is decided elsewhere.

mod accuracy;
mod agreement;
mod bootstrap;
mod calibration;
mod ranking;
mod samples;

pub use accuracy::{ClassCounts, Confusion, mean_of_some};
pub use agreement::{cosine, flips, max_abs_difference, non_finite, predicted_class, top1_agreement};
pub use bootstrap::{Bootstrap, Interval};
pub use calibration::{Bin, CALIBRATION_BINS, Calibration};
pub use ranking::{Ranking, auc, auc_one_vs_rest, is_in_top};
pub use samples::{Samples, Summary, percentile};
