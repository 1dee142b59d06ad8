//! Which level of the pyramid is read for a wanted resolution, and whether it must be resampled.

use std::fmt;

use super::LevelInfo;
use crate::geometry::{Level, Mpp, PixelSize};

/// How the wanted resolution is obtained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LevelChoice {
    /// The level that is read.
    pub level: Level,
    /// The resolution that was asked for.
    pub requested: Mpp,
    /// The resolution that the model gets.
    pub effective: PixelSize,
    /// Level-0 pixels per plane pixel along x.
    pub downsample_x: f64,
    /// Level-0 pixels per plane pixel along y.
    pub downsample_y: f64,
    /// How the level is resampled; `None` if its pixels are taken as they are.
    pub resample: Option<Resample>,
}

/// Pixels of the level per plane pixel: above 1 shrinks, below 1 enlarges.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Resample {
    /// Along x.
    pub x: f64,
    /// Along y.
    pub y: f64,
}

/// Chooses how to read a slide of `pixel_size` (level 0) at the resolution `target`.
///
/// The level nearest to the target is taken as it is if both its axes are within `tolerance` (0.05 = 5 %); of two
/// equally near ones the finer. Otherwise the coarsest level that is finer than the target is resampled to exactly the
/// target; if even level 0 is coarser, it is enlarged, which adds no detail and is therefore
/// [told](LevelChoice::is_enlarged).
#[must_use]
pub fn choose(levels: &[LevelInfo], pixel_size: PixelSize, target: Mpp, tolerance: f64) -> LevelChoice {
    let sizes = (0..).map(Level).zip(levels).filter_map(|(level, info)| {
        let effective = pixel_size.scaled(info.downsample_x, info.downsample_y)?;
        Some((level, info, effective))
    });
    let ratios = |size: PixelSize| (size.x.get() / target.get(), size.y.get() / target.get());
    let deviation = |size: PixelSize| {
        let (x, y) = ratios(size);
        (x - 1.0).abs().max((y - 1.0).abs())
    };
    // min_by keeps the first, which is the finer level.
    let nearest = sizes.clone().min_by(|a, b| deviation(a.2).total_cmp(&deviation(b.2)));
    if let Some((level, info, effective)) = nearest.filter(|(_, _, size)| deviation(*size) <= tolerance) {
        return LevelChoice {
            level,
            requested: target,
            effective,
            downsample_x: info.downsample_x,
            downsample_y: info.downsample_y,
            resample: None,
        };
    }
    let is_finer = |size: PixelSize| ratios(size).0 <= 1.0 && ratios(size).1 <= 1.0;
    let finer = sizes.clone().filter(|(_, _, size)| is_finer(*size)).last();
    let (level, read) = finer.map_or((Level(0), pixel_size), |(level, _, size)| (level, size));
    LevelChoice {
        level,
        requested: target,
        effective: PixelSize::square(target),
        downsample_x: target.get() / pixel_size.x.get(),
        downsample_y: target.get() / pixel_size.y.get(),
        resample: Some(Resample { x: target.get() / read.x.get(), y: target.get() / read.y.get() }),
    }
}

impl LevelChoice {
    /// Whether pixels are made up because the slide is coarser than what was asked for.
    #[must_use]
    pub fn is_enlarged(&self) -> bool {
        self.resample.is_some_and(|factors| factors.x < 1.0 || factors.y < 1.0)
    }
}

impl fmt::Display for LevelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LevelChoice { level: Level(level), requested, effective, .. } = *self;
        let size = |size: PixelSize| {
            if size.x == size.y {
                format!("{:.4}", size.x.get())
            } else {
                format!("{:.4} x {:.4}", size.x.get(), size.y.get())
            }
        };
        match self.resample {
            None => write!(f, "level {level} as it is, {} µm/px for {requested} wanted", size(effective)),
            Some(factors) => {
                let verb = if self.is_enlarged() { "ENLARGED: the slide is coarser," } else { "shrunk" };
                let by = if (factors.x - factors.y).abs() < 1e-9 {
                    format!("{:.3}", factors.x)
                } else {
                    format!("{:.3} x {:.3}", factors.x, factors.y)
                };
                write!(f, "level {level} {verb} by {by} to {} µm/px", size(effective))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels(downsamples: &[f64]) -> Vec<LevelInfo> {
        let level = |&downsample: &f64| LevelInfo {
            width: 100,
            height: 100,
            downsample_x: downsample,
            downsample_y: downsample,
            openslide_downsample: downsample,
            native_tile: None,
        };
        downsamples.iter().map(level).collect()
    }

    fn mpp(value: f64) -> Mpp {
        Mpp::new(value).unwrap()
    }

    #[test]
    fn choices_known_by_hand() {
        struct Case {
            downsamples: &'static [f64],
            slide: f64,
            target: f64,
            level: u32,
            effective: f64,
            resample: Option<f64>,
        }
        let cases = [
            // 40x scanner with levels 1/4/16: the level itself.
            Case {
                downsamples: &[1.0, 4.0, 16.0],
                slide: 0.25,
                target: 0.25,
                level: 0,
                effective: 0.25,
                resample: None,
            },
            Case { downsamples: &[1.0, 4.0, 16.0], slide: 0.25, target: 1.0, level: 1, effective: 1.0, resample: None },
            // 0.2527 and 1.0108 are 1.1 % off: read as they are.
            Case {
                downsamples: &[1.0, 4.0, 16.0],
                slide: 0.2527,
                target: 0.25,
                level: 0,
                effective: 0.2527,
                resample: None,
            },
            Case {
                downsamples: &[1.0, 4.0, 16.0],
                slide: 0.2527,
                target: 1.0,
                level: 1,
                effective: 1.0108,
                resample: None,
            },
            // Between two levels: the finer one, shrunk to exactly the target.
            Case {
                downsamples: &[1.0, 4.0, 16.0],
                slide: 0.25,
                target: 0.5,
                level: 0,
                effective: 0.5,
                resample: Some(2.0),
            },
            Case {
                downsamples: &[1.0, 4.0, 16.0],
                slide: 0.25,
                target: 2.0,
                level: 1,
                effective: 2.0,
                resample: Some(2.0),
            },
            Case {
                downsamples: &[1.0, 4.0, 16.0],
                slide: 0.25,
                target: 8.0,
                level: 2,
                effective: 8.0,
                resample: Some(2.0),
            },
            // 6 % off is too far; the level is coarser than the target, so the one before it is shrunk.
            Case {
                downsamples: &[1.0, 2.0],
                slide: 0.265,
                target: 0.5,
                level: 0,
                effective: 0.5,
                resample: Some(0.5 / 0.265),
            },
            // Finer than the slide: enlarged.
            Case { downsamples: &[1.0, 4.0], slide: 0.5, target: 0.25, level: 0, effective: 0.25, resample: Some(0.5) },
            // Two levels within tolerance: the nearer.
            Case { downsamples: &[1.0, 1.04], slide: 0.5, target: 0.515, level: 1, effective: 0.52, resample: None },
        ];
        for Case { downsamples, slide, target, level, effective, resample } in cases {
            let choice = choose(&levels(downsamples), PixelSize::square(mpp(slide)), mpp(target), 0.05);
            assert_eq!(choice.level, Level(level), "{slide} -> {target}");
            assert!((choice.effective.x.get() - effective).abs() < 1e-12, "{choice}");
            assert!((choice.downsample_x - effective / slide).abs() < 1e-9, "{choice}");
            assert_eq!(choice.resample.map(|factors| factors.x), resample, "{choice}");
            assert_eq!(choice.is_enlarged(), target < slide && resample.is_some());
        }
    }

    #[test]
    fn uneven_axes_are_resampled_to_square_pixels() {
        let size = PixelSize { x: mpp(0.25), y: mpp(0.5) };
        let choice = choose(&levels(&[1.0]), size, mpp(0.5), 0.05);
        assert_eq!(choice.resample, Some(Resample { x: 2.0, y: 1.0 }));
        assert_eq!((choice.downsample_x, choice.downsample_y), (2.0, 1.0));
        assert_eq!(choice.effective, PixelSize::square(mpp(0.5)));
        assert_eq!(choice.to_string(), "level 0 shrunk by 2.000 x 1.000 to 0.5000 µm/px");
    }

    #[test]
    fn zero_tolerance_still_takes_an_exact_level() {
        let choice = choose(&levels(&[1.0, 2.0]), PixelSize::square(mpp(0.25)), mpp(0.5), 0.0);
        assert_eq!((choice.level, choice.resample), (Level(1), None));
    }
}
