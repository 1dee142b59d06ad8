//! Tissue found by its colour.
//!
//! Glass is nearly white but tinted by the lamp, so what is measured is chroma (largest less smallest channel) after
//! glass was made white; brightness would lose pale fat. Otsu's threshold always splits, also a slide that is all glass
//! or all tissue, so it is kept between two bounds. Fat belongs to the tissue it lies in: its membranes are faint, so a
//! lower threshold holds for whatever touches clear tissue, and gaps as wide as a fat cell are closed. Ink and the
//! scanner's frame are taken away before, by colours that haematoxylin and eosin don't have.

use image::{GrayImage, RgbImage};
use imageproc::contrast::otsu_level;
use imageproc::filter::gaussian_blur_f32;
use rayon::prelude::*;

use super::binary::{Binary, Connectivity, Pieces};
use super::{Cell, TissueError, TissueMask};
use crate::geometry::PixelSize;
use crate::slide::{Slide, Thumbnail};

/// Wanted size of a cell: a tenth of the usual tile of 112 µm, and coarse enough to read any slide at once.
const CELL_UM: f64 = 8.0;
/// Longest side of the mask in cells; 33 mm at the wanted size.
const MAX_SIDE: u32 = 4096;
/// Bounds of the threshold on chroma: camera noise and compression stay below 8, pale keratin reaches 20.
const CHROMA_THRESHOLD: (u8, u8) = (12, 20);
/// Chroma of faint tissue beside clear tissue, at least.
const FAINT_CHROMA: u8 = 7;
/// Gaps closed: half of a large fat cell.
const CLOSING_UM: f64 = 40.0;
/// Stroke of a pen, at least; less is pigment, or dirt.
const MIN_PEN_UM2: f64 = 30_000.0;
/// Soft edge of ink and frame that goes with them.
const EDGE_UM: f64 = 24.0;
/// Brightest channel of the scanner's frame.
const FRAME_BRIGHTNESS: u8 = 60;
/// Darkest channel of what may be glass.
const GLASS_BRIGHTNESS: u8 = 200;

/// What counts as a piece of tissue.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TissueOptions {
    /// Size of a level-0 pixel.
    pub pixel_size: PixelSize,
    /// Area in µm² below which a piece is a speck.
    pub min_piece_um2: f64,
    /// Area in µm² up to which a hole in tissue is filled.
    pub max_hole_um2: f64,
}

impl TissueOptions {
    /// A piece is at least 10,000 µm² (about one tile of 224 px at 20x), holes up to 50,000 µm² are filled.
    #[must_use]
    pub fn new(pixel_size: PixelSize) -> Self {
        Self { pixel_size, min_piece_um2: 10_000.0, max_hole_um2: 50_000.0 }
    }
}

impl TissueMask {
    /// Finds the tissue of a slide, on a raster of about 8 µm.
    ///
    /// # Errors
    /// [`TissueError::Slide`] if the slide can't be read at all; damaged parts become [`Cell::Unreadable`].
    pub fn detect(slide: &Slide, options: &TissueOptions) -> Result<Self, TissueError> {
        let extent = slide.extent();
        let PixelSize { x, y } = options.pixel_size;
        let longest_um = (extent.width as f64 * x.get()).max(extent.height as f64 * y.get());
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates, then clamped")]
        let side = ((longest_um / CELL_UM).ceil() as u32).clamp(1, MAX_SIDE);
        Ok(Self::of_thumbnail(slide, &slide.thumbnail(side)?, options))
    }

    /// Finds the tissue in a picture of the whole slide; its pixels become the cells.
    #[must_use]
    pub fn of_thumbnail(slide: &Slide, thumbnail: &Thumbnail, options: &TissueOptions) -> Self {
        let Thumbnail { image, scale_x, scale_y, .. } = thumbnail;
        let cell_um = (options.pixel_size.x.get() * scale_x, options.pixel_size.y.get() * scale_y);
        let mut cells = classify(image, cell_um, options);
        for part in &thumbnail.unreadable {
            let span = |start: i64, len: i64, scale: f64, count: u32| {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates")]
                let [from, to] = [(start as f64 / scale).floor() as u32, ((start + len) as f64 / scale).ceil() as u32];
                from.min(count)..to.min(count)
            };
            for row in span(part.y, part.height, *scale_y, image.height()) {
                for col in span(part.x, part.width, *scale_x, image.width()) {
                    cells[row as usize * image.width() as usize + col as usize] = Cell::Unreadable;
                }
            }
        }
        Self::new(image.width(), image.height(), slide.extent(), cells)
    }
}

/// Sorts every pixel of a picture whose pixels are `cell_um` µm wide and high.
fn classify(image: &RgbImage, cell_um: (f64, f64), options: &TissueOptions) -> Vec<Cell> {
    let cell_area = cell_um.0 * cell_um.1;
    let mean_um = cell_area.sqrt();
    let border = frame(image, radius(EDGE_UM, mean_um));
    let pen = ink(image, &border, MIN_PEN_UM2 / cell_area, radius(EDGE_UM, mean_um));
    let removed = border.clone().or(&pen);
    let chroma = chroma_on_white(image, &removed);
    let stained = stained(&chroma, &removed, radius(CLOSING_UM, mean_um));
    let tissue = with_holes_filled(stained, &removed, options.max_hole_um2 / cell_area);
    let specks = small_pieces(&tissue, options.min_piece_um2 / cell_area);
    let cell = |x, y| match () {
        () if border.get(x, y) => Cell::Border,
        () if pen.get(x, y) => Cell::Pen,
        () if specks.get(x, y) => Cell::Speck,
        () if tissue.get(x, y) => Cell::Tissue,
        () => Cell::Background,
    };
    let mut cells = vec![Cell::Background; image.width() as usize * image.height() as usize];
    let rows = cells.par_chunks_mut(image.width().max(1) as usize).zip(0..image.height());
    rows.for_each(|(row, y)| row.iter_mut().zip(0..).for_each(|(out, x)| *out = cell(x, y)));
    cells
}

/// The black frame: what is black and hangs together with the picture's edge.
fn frame(image: &RgbImage, edge: u8) -> Binary {
    let (width, height) = image.dimensions();
    let is_black = |rgb: [u8; 3]| rgb.into_iter().all(|channel| channel < FRAME_BRIGHTNESS);
    let black = Binary::from_fn(width, height, |x, y| is_black(image.get_pixel(x, y).0));
    let mut pieces = Pieces::of(&black, Connectivity::Eight);
    pieces.keep_if(|x, y| x == 0 || y == 0 || x + 1 == width || y + 1 == height);
    pieces.kept().dilated_by_square(edge)
}

/// Strokes of a pen: of clear ink colour somewhere, of ink colour all over, and not small.
fn ink(image: &RgbImage, border: &Binary, min_cells: f64, edge: u8) -> Binary {
    let is_ink = |x: u32, y: u32| ink_of(image.get_pixel(x, y).0).is_some() && !border.get(x, y);
    let strokes = Binary::from_fn(image.width(), image.height(), is_ink);
    let mut pieces = Pieces::of(&strokes, Connectivity::Eight);
    pieces.drop_smaller_than(min_cells);
    pieces.keep_if(|x, y| ink_of(image.get_pixel(x, y).0) == Some(true));
    pieces.kept().dilated_by_square(edge)
}

/// Whether a colour is ink, and if so whether clearly.
///
/// Haematoxylin and eosin run from blue violet over pink to orange red: red is never the smallest channel by much. So
/// green and blue ink have less red than anything stained, black ink is dark without chroma, and red ink has far more
/// red than even blood while green and blue are alike.
fn ink_of([red, green, blue]: [u8; 3]) -> Option<bool> {
    let (r, g, b) = (i16::from(red), i16::from(green), i16::from(blue));
    let (most, least) = (r.max(g).max(b), r.min(g).min(b));
    let chroma = most - least;
    let is_black = most < 95 && chroma < 30;
    let is_cold = chroma >= 14 && g - r >= 8;
    let is_red = r > 140 && r - g.max(b) > 105 && (g - b).abs() < 45 && g < 75;
    if is_black || is_red {
        return Some(true);
    }
    is_cold.then_some(chroma >= 50 && g - r >= 15)
}

/// Chroma with glass made white, smoothed over about a cell.
fn chroma_on_white(image: &RgbImage, removed: &Binary) -> GrayImage {
    let glass = glass_colour(image, removed);
    let balanced = |value: u8, glass: u8| (u16::from(value) * 255 / u16::from(glass.max(1))).min(255) as u8;
    let [red_of, green_of, blue_of] =
        glass.map(|glass| (0..=u8::MAX).map(|value| balanced(value, glass)).collect::<Vec<u8>>());
    let mut chroma = GrayImage::new(image.width(), image.height());
    image.as_raw().par_chunks_exact(3).zip(chroma.par_iter_mut()).for_each(|(pixel, out)| {
        let [red, green, blue] = [0, 1, 2].map(|channel| usize::from(pixel[channel]));
        let (red, green, blue) = (red_of[red], green_of[green], blue_of[blue]);
        *out = red.max(green).max(blue) - red.min(green).min(blue);
    });
    gaussian_blur_f32(&chroma, 0.8)
}

/// The median colour of what is as bright as glass and nearly grey; white if that is hardly anything.
fn glass_colour(image: &RgbImage, removed: &Binary) -> [u8; 3] {
    let mut counts = [[0u64; 256]; 3];
    let mut total = 0;
    for (x, y, pixel) in image.enumerate_pixels() {
        let [red, green, blue] = pixel.0;
        let (most, least) = (red.max(green).max(blue), red.min(green).min(blue));
        // Tinted glass differs by up to 25 between channels, pale tissue by more.
        if least >= GLASS_BRIGHTNESS && most - least <= 25 && !removed.get(x, y) {
            total += 1;
            for (count, value) in counts.iter_mut().zip(pixel.0) {
                count[usize::from(value)] += 1;
            }
        }
    }
    if total * 100 < u64::from(image.width()) * u64::from(image.height()) {
        return [u8::MAX; 3];
    }
    counts.map(|count| {
        let mut below = 0;
        let median = (0..=u8::MAX).find(|value| {
            below += count[usize::from(*value)];
            below * 2 >= total
        });
        median.unwrap_or(u8::MAX)
    })
}

/// Clear tissue, and the faint tissue that hangs together with it.
fn stained(chroma: &GrayImage, removed: &Binary, closing: u8) -> Binary {
    let seen: Vec<u8> =
        chroma.enumerate_pixels().filter(|(x, y, _)| !removed.get(*x, *y)).map(|(_, _, chroma)| chroma.0[0]).collect();
    let count = u32::try_from(seen.len()).unwrap_or(0);
    let Some(row) = GrayImage::from_raw(count, 1, seen).filter(|row| !row.is_empty()) else {
        return Binary::new(chroma.width(), chroma.height());
    };
    let threshold = otsu_level(&row).clamp(CHROMA_THRESHOLD.0, CHROMA_THRESHOLD.1);
    let faint = (threshold / 2).max(FAINT_CHROMA);
    let is_above = |x: u32, y: u32, least: u8| chroma.get_pixel(x, y).0[0] > least && !removed.get(x, y);
    let faint = Binary::from_fn(chroma.width(), chroma.height(), |x, y| is_above(x, y, faint));
    let mut pieces = Pieces::of(&faint.closed_by_disc(closing), Connectivity::Eight);
    pieces.keep_if(|x, y| is_above(x, y, threshold));
    pieces.kept()
}

/// Fills holes of at most `max_cells` that don't reach the picture's edge and hold neither ink nor frame.
fn with_holes_filled(tissue: Binary, removed: &Binary, max_cells: f64) -> Binary {
    let (width, height) = tissue.size();
    let mut gaps = Pieces::of(&tissue.clone().not(), Connectivity::Four);
    gaps.drop_larger_than(max_cells);
    gaps.drop_if(|x, y| x == 0 || y == 0 || x + 1 == width || y + 1 == height || removed.get(x, y));
    tissue.or(&gaps.kept())
}

fn small_pieces(tissue: &Binary, min_cells: f64) -> Binary {
    let mut pieces = Pieces::of(tissue, Connectivity::Eight);
    pieces.drop_larger_than(min_cells - 0.5);
    pieces.kept()
}

/// A length as a number of cells, at least 1.
fn radius(um: f64, cell_um: f64) -> u8 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates, as wanted")]
    let cells = (um / cell_um).round().max(1.0) as u8;
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Level0Rect;
    use crate::slide::synthetic::{Ink, SvsOptions, SyntheticSlide, Tissue};

    /// Intersection over union of the mask with the truth, on every 16th pixel, and the mask.
    fn score(synthetic: &SyntheticSlide) -> (f64, TissueMask) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.svs");
        synthetic.write(&path, &SvsOptions::default()).unwrap();
        let slide = Slide::open(&path, None).unwrap();
        let options = TissueOptions::new(slide.pixel_size(None).unwrap());
        let mask = TissueMask::detect(&slide, &options).unwrap();
        let (mut both, mut either) = (0u32, 0u32);
        for (x, y) in
            (0..synthetic.height).step_by(16).flat_map(|y| (0..synthetic.width).step_by(16).map(move |x| (x, y)))
        {
            let truth = synthetic.is_tissue(x, y);
            let found = mask.fraction(Level0Rect { x: x.into(), y: y.into(), width: 1, height: 1 }) > 0.5;
            both += u32::from(truth && found);
            either += u32::from(truth || found);
        }
        (f64::from(both) / f64::from(either.max(1)), mask)
    }

    fn small() -> SyntheticSlide {
        SyntheticSlide::new(2400, 2000, 3)
    }

    #[test]
    fn pieces_are_found_with_and_without_fat() {
        for has_fat in [false, true] {
            let (iou, mask) = score(&SyntheticSlide { has_fat, ..small() });
            assert!(iou > 0.9, "fat {has_fat}: {iou}");
            assert_eq!(mask.share(Cell::Pen) + mask.share(Cell::Border), 0.0);
        }
    }

    #[test]
    fn ink_of_every_colour_and_the_frame_are_no_tissue() {
        for ink in [Ink::Black, Ink::Blue, Ink::Green, Ink::Red] {
            let (iou, mask) = score(&SyntheticSlide { pen: Some(ink), ..small() });
            assert!(iou > 0.88, "{ink:?}: {iou}");
            assert!((0.03..0.13).contains(&mask.share(Cell::Pen)), "{ink:?}: {}", mask.share(Cell::Pen));
        }
        let (iou, mask) = score(&SyntheticSlide { border: 120, ..small() });
        assert!(iou > 0.88, "border: {iou}");
        assert!(mask.share(Cell::Border) > 0.15);
    }

    #[test]
    fn glass_alone_has_no_tissue_and_tissue_alone_is_full() {
        let (_, mask) = score(&SyntheticSlide { tissue: Tissue::None, ..small() });
        assert_eq!(mask.share(Cell::Tissue), 0.0);
        let (iou, mask) = score(&SyntheticSlide { tissue: Tissue::Everywhere, ..small() });
        assert_eq!((iou, mask.share(Cell::Tissue)), (1.0, 1.0));
    }

    #[test]
    fn stains_are_no_ink() {
        let stains = [
            ("haematoxylin", [90, 60, 140]),
            ("pale haematoxylin", [170, 160, 205]),
            ("blue haematoxylin", [88, 84, 150]),
            ("dense nuclei", [52, 28, 84]),
            ("eosin", [230, 150, 190]),
            ("orange eosin", [225, 140, 120]),
            ("blood", [190, 70, 85]),
            ("melanin", [95, 60, 40]),
            ("glass", [243, 242, 244]),
            ("grey glass", [190, 190, 192]),
        ];
        for (name, colour) in stains {
            assert_eq!(ink_of(colour), None, "{name}");
        }
    }

    #[test]
    fn specks_go_holes_close_and_tinted_glass_is_glass() {
        let options = TissueOptions::new(PixelSize::square(crate::geometry::Mpp::new(8.0).unwrap()));
        // A square with a hole of 16 cells (1,024 µm²), one with a hole of 900 (57,600 µm²), and a speck.
        let image = RgbImage::from_fn(200, 120, |x, y| {
            let within = |left, top, side| (left..left + side).contains(&x) && (top..top + side).contains(&y);
            let is_tissue = within(10, 10, 40) && !within(30, 30, 4)
                || within(80, 10, 80) && !within(100, 30, 40)
                || within(20, 90, 6);
            image::Rgb(if is_tissue { [215, 140, 180] } else { [244, 238, 228] })
        });
        let cells = classify(&image, (8.0, 8.0), &options);
        let at = |x: usize, y: usize| cells[y * 200 + x];
        for (x, y, expected) in [
            (15, 15, Cell::Tissue),
            (31, 31, Cell::Tissue),
            (120, 50, Cell::Background),
            (85, 50, Cell::Tissue),
            (23, 93, Cell::Speck),
            (60, 60, Cell::Background),
        ] {
            assert_eq!(at(x, y), expected, "{x},{y}");
        }
    }

    #[test]
    fn what_cant_be_decoded_is_tried() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.svs");
        let options = SvsOptions { damaged_tiles: vec![(1, 0, 0)], ..SvsOptions::default() };
        SyntheticSlide::new(2400, 2000, 3).write(&path, &options).unwrap();
        let slide = Slide::open(&path, None).unwrap();
        let options = TissueOptions::new(slide.pixel_size(None).unwrap());
        // 600 cells along the longer side, so that level 1 and not the undamaged level 2 is read.
        let mask = TissueMask::of_thumbnail(&slide, &slide.thumbnail(600).unwrap(), &options);
        assert!(mask.share(Cell::Unreadable) > 0.1);
        assert_eq!(mask.fraction(Level0Rect { x: 10, y: 10, width: 200, height: 200 }), 1.0);
    }
}
