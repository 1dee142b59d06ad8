//! The pictures of a slide's results: the overlay of the classes, and the tissue mask with its contours.

use image::RgbImage;
use image::imageops;

use super::EngineError;
use super::config::Emit;
use super::plan::SlidePlan;
use super::write::Target;
use crate::geometry::Level0Rect;
use crate::output::{
    self, Cells, ClassStyle, MapArea, MaskLabel, MaskPicture, Overlay, OverlayClass, RegionClass, RegionMap, Thumbnail,
    Written, draw_mask, draw_overlay, write_png,
};
use crate::stitch::Overview;
use crate::tissue::Cell;

/// Longest side of the slide in a picture, in pixels: fits a screen, is sent by mail.
const PICTURE_SIDE: u32 = 1600;
/// Longest side of the picture of the slide that a region's picture is cut from.
const MAX_THUMBNAIL_SIDE: u32 = 8192;

/// The region of the run as a picture, and the area that its pixels cover.
pub(crate) struct SlidePicture {
    pub(crate) pixels: RgbImage,
    pub(crate) area: Level0Rect,
}

/// What is drawn and written without a result of the model, beside the tiles.
pub(super) struct EarlyPictures {
    /// To draw results on, if pictures are asked for.
    pub(super) slide: Option<SlidePicture>,
    /// The files of the tissue mask.
    pub(super) masks: Vec<Written>,
}

impl EarlyPictures {
    /// Reads the picture of the slide and writes the tissue mask's.
    pub(super) fn make(target: &Target<'_>) -> Result<Self, EngineError> {
        let is_drawn = target.emits(Emit::Png) && (target.stitch.is_some() || target.plan.tissue.is_some());
        let slide = is_drawn.then(|| SlidePicture::new(target.plan)).transpose()?;
        let masks = write_masks(target, slide.as_ref())?;
        Ok(Self { slide, masks })
    }

    /// Takes the files away again: those of a slide that has failed.
    pub(super) fn remove(&self) {
        for file in &self.masks {
            // What can't be removed is replaced when the slide is run again.
            std::fs::remove_file(&file.path).ok();
        }
    }
}

/// Draws the classes over the slide.
pub(super) fn write_overlay(
    target: &Target<'_>,
    SlidePicture { pixels, area }: &SlidePicture,
    overview: &Overview,
) -> Result<Written, EngineError> {
    let classes: Vec<OverlayClass> = target
        .class_styles()
        .into_iter()
        .enumerate()
        .map(|(index, style)| OverlayClass { style, is_background: target.card.background == Some(index) })
        .collect();
    let probabilities: Vec<&[u8]> = overview.probabilities.iter().map(Vec::as_slice).collect();
    let effective = target.plan.choice.effective;
    let overlay = Overlay {
        title: target.id,
        subtitle: &format!("{}, {:.3} µm/px", target.card.name, effective.x.get()),
        map: map_area(&target.overview_cells(overview, &overview.classes)),
        class_index: &overview.classes,
        probabilities: &probabilities,
        classes: &classes,
        floor: target.config.threshold,
    };
    let thumbnail = Thumbnail { pixels, area: *area, um_per_px: um_per_px(target, *area, pixels) };
    Ok(write_png(&target.path("overlays", "png"), &draw_overlay(&thumbnail, &overlay))?)
}

/// Draws the tissue mask, if there is a picture to draw it on, and writes its contours, if they are asked for.
fn write_masks(target: &Target<'_>, picture: Option<&SlidePicture>) -> Result<Vec<Written>, EngineError> {
    let Some(mask) = &target.plan.tissue else { return Ok(Vec::new()) };
    let labels = labels();
    let values: Vec<u8> = mask.cells().iter().map(|cell| value_of(*cell)).collect();
    let cells = Cells {
        values: &values,
        width: mask.width(),
        height: mask.height(),
        origin_x: 0.0,
        origin_y: 0.0,
        cell_width: mask.scale_x(),
        cell_height: mask.scale_y(),
    };
    let mut written = Vec::new();
    if let Some(SlidePicture { pixels, area }) = picture {
        let picture = MaskPicture {
            title: target.id,
            subtitle: "what was taken for tissue",
            map: map_area(&cells),
            values: &values,
            labels: &labels,
        };
        let thumbnail = Thumbnail { pixels, area: *area, um_per_px: um_per_px(target, *area, pixels) };
        written.push(write_png(&target.path("masks", "png"), &draw_mask(&thumbnail, &picture))?);
    }
    if target.emits(Emit::GeoJson) {
        let map = RegionMap {
            slide_id: target.id,
            cells,
            bounds: target.plan.slide.extent(),
            pixel_size: target.plan.pixel_size,
            min_area_mm2: 0.0,
        };
        let tissue = &labels[..1];
        let classes: Vec<RegionClass<'_>> =
            tissue.iter().map(|label| RegionClass { value: label.value, style: &label.style }).collect();
        written.push(output::write_regions(&target.path("masks", "geojson"), &map, &classes)?.0);
    }
    Ok(written)
}

/// Longest side of the picture of the slide that the region's is cut from: a small region needs a larger one.
fn thumbnail_side(plan: &SlidePlan) -> u32 {
    let (region, extent) = (plan.plane.region, plan.slide.extent());
    let zoom = extent.width.max(extent.height) as f64 / region.width.max(region.height) as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a picture's size")]
    let side = (f64::from(PICTURE_SIDE) * zoom).min(f64::from(MAX_THUMBNAIL_SIDE)) as u32;
    side
}

/// Memory that the pictures of a plan take, whether or not results are drawn.
pub(super) fn memory_bytes(plan: &SlidePlan, emit: &[Emit], has_map: bool) -> Result<u64, EngineError> {
    let emits = |kind| emit.contains(&kind);
    let cells = plan.tissue.as_ref().map_or(0, |mask| mask.cells().len() as u64);
    if !emits(Emit::Png) || !(has_map || plan.tissue.is_some()) {
        return Ok(if emits(Emit::GeoJson) { cells } else { 0 });
    }
    let region = plan.plane.region;
    let (long, short) = (region.width.max(region.height).max(1) as f64, region.width.min(region.height).max(1) as f64);
    let side = f64::from(PICTURE_SIDE);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most a picture's size")]
    let picture = (3.0 * side * (side * short / long).ceil()) as u64;
    // The picture, the one that is drawn on, the page around it, and that compressed.
    Ok(plan.slide.thumbnail_bytes(thumbnail_side(plan))? + cells + 4 * picture)
}

impl SlidePicture {
    pub(crate) fn new(plan: &SlidePlan) -> Result<Self, EngineError> {
        let region = plan.plane.region;
        let thumbnail = plan.slide.thumbnail(thumbnail_side(plan))?;
        let (scale_x, scale_y) = (thumbnail.scale_x, thumbnail.scale_y);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the region lies within the slide")]
        let pixel = |level0: i64, scale: f64, round: fn(f64) -> f64| round(level0 as f64 / scale).max(0.0) as u32;
        let (left, top) = (pixel(region.x, scale_x, f64::floor), pixel(region.y, scale_y, f64::floor));
        let right = pixel(region.x + region.width, scale_x, f64::ceil).min(thumbnail.image.width()).max(left + 1);
        let bottom = pixel(region.y + region.height, scale_y, f64::ceil).min(thumbnail.image.height()).max(top + 1);
        let picture = imageops::crop_imm(&thumbnail.image, left, top, right - left, bottom - top).to_image();
        #[expect(clippy::cast_possible_truncation, reason = "within the slide")]
        let level0 = |pixel: u32, scale: f64| (f64::from(pixel) * scale).round() as i64;
        let (x, y) = (level0(left, scale_x), level0(top, scale_y));
        let area = Level0Rect { x, y, width: level0(right, scale_x) - x, height: level0(bottom, scale_y) - y };
        Ok(Self { pixels: picture, area })
    }
}

fn um_per_px(target: &Target<'_>, area: Level0Rect, pixels: &RgbImage) -> f64 {
    target.plan.pixel_size.x.get() * area.width as f64 / f64::from(pixels.width())
}

/// The area that a raster covers, to whole level-0 pixels.
fn map_area(cells: &Cells<'_>) -> MapArea {
    #[expect(clippy::cast_possible_truncation, reason = "within the slide, or one cell beyond it")]
    let round = |value: f64| value.round() as i64;
    let area = Level0Rect {
        x: round(cells.origin_x),
        y: round(cells.origin_y),
        width: round(cells.cell_width * f64::from(cells.width)),
        height: round(cells.cell_height * f64::from(cells.height)),
    };
    MapArea { width: cells.width, height: cells.height, area }
}

/// A cell of the mask as a value of the picture; glass is 0.
fn value_of(cell: Cell) -> u8 {
    let kinds = kinds();
    let place = kinds.iter().position(|(kind, ..)| *kind == cell);
    place.and_then(|index| u8::try_from(index + 1).ok()).unwrap_or(0)
}

/// What the mask's picture shows, with its colours; tissue comes first.
fn kinds() -> [(Cell, &'static str, [u8; 3]); 5] {
    [
        (Cell::Tissue, "tissue", [34, 139, 34]),
        (Cell::Pen, "pen, left out", [30, 100, 220]),
        (Cell::Border, "black border, left out", [200, 30, 30]),
        (Cell::Speck, "speck, left out", [230, 150, 0]),
        (Cell::Unreadable, "unreadable, tried", [150, 0, 200]),
    ]
}

fn labels() -> Vec<MaskLabel> {
    let style = |name: &str, color| ClassStyle { name: name.to_owned(), color };
    kinds()
        .into_iter()
        .map(|(cell, name, color)| MaskLabel { value: value_of(cell), style: style(name, color) })
        .collect()
}
