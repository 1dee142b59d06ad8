//! The frame around a picture of the slide: title, legend, colour bar and scale bar.
//!
//! Text comes from pre-rendered glyphs of Noto Sans Mono (Basic Latin and Latin-1): no font file is needed at run time
//! and every machine draws the same pixels. A character without a glyph becomes `?`.

use image::{Rgb, RgbImage};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

const PAPER: [u8; 3] = [255, 255, 255];
const INK: [u8; 3] = [28, 30, 34];
const FAINT_INK: [u8; 3] = [112, 116, 124];
const RULE: [u8; 3] = [206, 209, 214];

/// A picture and what is said about it.
pub(super) struct Figure<'a> {
    /// The picture.
    pub picture: RgbImage,
    /// First line, bold.
    pub title: &'a str,
    /// Second line.
    pub subtitle: &'a str,
    /// Heads the legend.
    pub legend_title: &'a str,
    /// The legend, from the top.
    pub legend: Vec<LegendItem>,
    /// Below the legend.
    pub color_bar: Option<ColorBar>,
    /// Below all else.
    pub notes: Vec<String>,
    /// Width of a pixel of the picture in µm.
    pub um_per_px: f64,
}

/// A line of the legend.
pub(super) struct LegendItem {
    /// Colour of the swatch; `None` draws an empty one.
    pub color: Option<[u8; 3]>,
    pub label: String,
    /// Right-aligned.
    pub value: String,
}

/// How probability becomes opacity, shown for each colour.
pub(super) struct ColorBar {
    pub title: String,
    /// What the colours are blended over.
    pub under: [u8; 3],
    pub colors: Vec<[u8; 3]>,
    /// Opacity of the colour at a probability of 0–1.
    pub opacity: fn(f64, f64) -> f64,
    /// The probability below which nothing is drawn.
    pub floor: f64,
}

/// Mixes `color` into `under`; opacity 0–1.
pub(super) fn blend(under: [u8; 3], color: [u8; 3], opacity: f64) -> [u8; 3] {
    let mix = |from: u8, to: u8| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two bytes")]
        let mixed = (f64::from(from) + (f64::from(to) - f64::from(from)) * opacity.clamp(0.0, 1.0)).round() as u8;
        mixed
    };
    [mix(under[0], color[0]), mix(under[1], color[1]), mix(under[2], color[2])]
}

/// A share as text: two digits that matter, never 0 for something nor 100 for not all.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 || part == 0 {
        return "0 %".into();
    }
    let share = 100.0 * part as f64 / whole as f64;
    match share {
        share if share < 0.1 => "<0.1 %".into(),
        share if share > 99.9 && part < whole => ">99.9 %".into(),
        share => format!("{share:.1} %"),
    }
}

impl Figure<'_> {
    /// Draws everything on one page.
    pub(super) fn draw(&self) -> RgbImage {
        let pen = Pen::for_picture(&self.picture);
        let (line, margin) = (pen.line(), pen.line());
        let header = 2 * margin + 2 * line;
        let panel_width = self.panel_width(&pen);
        let panel_height = self.panel_height(&pen);
        let title_width = pen.width(self.title).max(pen.width(self.subtitle)).min(60 * pen.advance());
        let width = (self.picture.width() + panel_width + 3 * margin).max(title_width + 2 * margin);
        let height = header + self.picture.height().max(panel_height) + margin;
        let mut page = RgbImage::from_pixel(width, height, Rgb(PAPER));

        let columns = (width - 2 * margin) / pen.advance();
        pen.bold(&mut page, margin, margin, &shortened(self.title, columns), INK);
        pen.text(&mut page, margin, margin + line + line / 4, &shortened(self.subtitle, columns), FAINT_INK);

        image::imageops::replace(&mut page, &self.picture, i64::from(margin), i64::from(header));
        outline(&mut page, [margin - 1, header - 1, self.picture.width() + 2, self.picture.height() + 2], RULE);
        self.draw_scale_bar(&pen, &mut page, margin, header + self.picture.height());
        self.draw_panel(&pen, &mut page, 2 * margin + self.picture.width(), header);
        page
    }

    fn panel_width(&self, pen: &Pen) -> u32 {
        let item = |item: &LegendItem| length(&item.label).min(MAX_LABEL) + length(&item.value) + 6;
        let legend = self.legend.iter().map(item).max().unwrap_or(0);
        let notes = self.notes.iter().map(|note| length(note)).max().unwrap_or(0);
        legend.max(notes).max(length(self.legend_title)).max(26) * pen.advance()
    }

    fn panel_height(&self, pen: &Pen) -> u32 {
        let lines = 1 + self.legend.len() + self.notes.len();
        let bar = self.color_bar.as_ref().map_or(0, |bar| 4 + bar.colors.len());
        (u32::try_from(lines + bar).unwrap_or(u32::MAX / 100) + 2) * pen.step()
    }

    fn draw_panel(&self, pen: &Pen, page: &mut RgbImage, left: u32, top: u32) {
        let (step, side) = (pen.step(), pen.line());
        let width = self.panel_width(pen);
        pen.bold(page, left, top, self.legend_title, INK);
        let mut y = top + step;
        for item in &self.legend {
            let swatch = [left, y + 1, side, side - 2];
            match item.color {
                Some(color) => fill(page, swatch, color),
                None => outline(page, swatch, RULE),
            }
            pen.text(page, left + side + pen.advance(), y, &shortened(&item.label, MAX_LABEL), INK);
            pen.text(page, left + width - pen.width(&item.value), y, &item.value, INK);
            y += step;
        }
        if let Some(bar) = &self.color_bar {
            y = bar.draw(pen, page, [left, y + step / 2, width]);
        }
        y += step / 2;
        for note in &self.notes {
            pen.text(page, left, y, note, FAINT_INK);
            y += step;
        }
    }

    /// In the lower left corner of the picture, on paper so that it shows on any stain.
    fn draw_scale_bar(&self, pen: &Pen, page: &mut RgbImage, left: u32, bottom: u32) {
        let Some((bar, label)) = scale_bar(self.picture.width(), self.um_per_px) else { return };
        let (pad, thick) = (pen.line() / 2, (pen.line() / 4).max(3));
        let (width, height) = (bar.max(pen.width(&label)) + 2 * pad, pen.line() + thick + 2 * pad);
        if width + 2 * pad > self.picture.width() || height + 2 * pad > self.picture.height() {
            return;
        }
        let (x, y) = (left + pad, bottom - height - pad);
        fill(page, [x, y, width, height], PAPER);
        outline(page, [x, y, width, height], RULE);
        pen.text(page, x + (width - pen.width(&label)) / 2, y + pad / 2, &label, INK);
        fill(page, [x + (width - bar) / 2, y + height - pad - thick, bar, thick], INK);
    }
}

impl ColorBar {
    /// Draws at `[left, top, width]` and returns the line below.
    fn draw(&self, pen: &Pen, page: &mut RgbImage, [left, top, width]: [u32; 3]) -> u32 {
        let step = pen.step();
        pen.bold(page, left, top, &self.title, INK);
        let mut y = top + step;
        let first = y;
        let probability = |x: u32| f64::from(x) / f64::from(width.saturating_sub(1).max(1));
        let bar_height = pen.line() - 2;
        for color in &self.colors {
            for x in 0..width {
                let mixed = blend(self.under, *color, (self.opacity)(probability(x), self.floor));
                fill(page, [left + x, y, 1, bar_height], mixed);
            }
            y += bar_height + 2;
        }
        outline(page, [left, first, width, (y - first).saturating_sub(2)], RULE);
        for (tick, label) in [(0.0, "0"), (0.25, ""), (0.5, "0.5"), (0.75, ""), (1.0, "1")] {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a fraction of the width")]
            let x = (f64::from(width - 1) * tick).round() as u32;
            fill(page, [left + x, y, 1, pen.line() / 3], FAINT_INK);
            let label_left =
                (left + x).saturating_sub(pen.width(label) / 2).clamp(left, left + width - pen.width(label));
            pen.text(page, label_left, y + pen.line() / 3, label, FAINT_INK);
        }
        y + pen.line() / 3 + step
    }
}

/// Characters of a label that the legend shows.
const MAX_LABEL: u32 = 32;

/// A round length of about a fifth of the picture: in pixels, and as text.
fn scale_bar(picture_width: u32, um_per_px: f64) -> Option<(u32, String)> {
    let most = f64::from(picture_width) * 0.25 * um_per_px;
    if !(most.is_finite() && most >= 1.0) {
        return None;
    }
    let decade = 10f64.powf(most.log10().floor());
    let um = [5.0, 2.0, 1.0].into_iter().map(|factor| factor * decade).find(|um| *um <= most)?;
    let label = if um >= 1000.0 { format!("{} mm", um / 1000.0) } else { format!("{um} µm") };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "less than the picture's width")]
    let pixels = (um / um_per_px).round().max(1.0) as u32;
    Some((pixels, label))
}

/// A text size: the line grows with the picture, so that a page reads the same when it is scaled to the screen.
struct Pen {
    size: RasterHeight,
}

impl Pen {
    fn for_picture(picture: &RgbImage) -> Self {
        let size = match picture.width().max(picture.height()) {
            0..700 => RasterHeight::Size16,
            700..1400 => RasterHeight::Size20,
            1400..2200 => RasterHeight::Size24,
            _ => RasterHeight::Size32,
        };
        Self { size }
    }

    /// Height of a line of text.
    fn line(&self) -> u32 {
        u32::try_from(self.size.val()).unwrap_or(16)
    }

    /// From one line of the panel to the next.
    fn step(&self) -> u32 {
        self.line() * 3 / 2
    }

    /// Width of a character; all are equal.
    fn advance(&self) -> u32 {
        u32::try_from(get_raster_width(FontWeight::Regular, self.size)).unwrap_or(8)
    }

    fn width(&self, text: &str) -> u32 {
        length(text) * self.advance()
    }

    fn text(&self, page: &mut RgbImage, x: u32, y: u32, text: &str, color: [u8; 3]) {
        self.print(page, (x, y), text, (FontWeight::Regular, color));
    }

    fn bold(&self, page: &mut RgbImage, x: u32, y: u32, text: &str, color: [u8; 3]) {
        self.print(page, (x, y), text, (FontWeight::Bold, color));
    }

    fn print(&self, page: &mut RgbImage, (left, top): (u32, u32), text: &str, (weight, color): (FontWeight, [u8; 3])) {
        for (index, character) in (0u32..).zip(text.chars()) {
            let glyph = |character| get_raster(character, weight, self.size);
            let Some(glyph) = glyph(character).or_else(|| glyph('?')) else { continue };
            for (y, row) in (top..).zip(glyph.rows()) {
                for (x, intensity) in (left + index * self.advance()..).zip(row) {
                    if let Some(pixel) = page.get_pixel_mut_checked(x, y) {
                        pixel.0 = blend(pixel.0, color, f64::from(*intensity) / 255.0);
                    }
                }
            }
        }
    }
}

fn length(text: &str) -> u32 {
    u32::try_from(text.chars().count()).unwrap_or(u32::MAX / 1000)
}

/// The text, its middle replaced if it is longer than `columns`: endings tell slides and classes apart.
fn shortened(text: &str, columns: u32) -> String {
    let (count, columns) = (length(text), columns.max(3));
    if count <= columns {
        return text.to_owned();
    }
    let (head, tail) = ((columns - 2).div_ceil(2), (columns - 2) / 2);
    let from = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
    text.chars().take(from(head)).chain("..".chars()).chain(text.chars().skip(from(count - tail))).collect()
}

/// Fills `[x, y, width, height]`, as far as it lies on the page.
fn fill(page: &mut RgbImage, [x, y, width, height]: [u32; 4], color: [u8; 3]) {
    for row in y..(y + height).min(page.height()) {
        for column in x..(x + width).min(page.width()) {
            page.put_pixel(column, row, Rgb(color));
        }
    }
}

/// Draws the border of `[x, y, width, height]`, one pixel wide.
fn outline(page: &mut RgbImage, [x, y, width, height]: [u32; 4], color: [u8; 3]) {
    if width == 0 || height == 0 {
        return;
    }
    fill(page, [x, y, width, 1], color);
    fill(page, [x, y + height - 1, width, 1], color);
    fill(page, [x, y, 1, height], color);
    fill(page, [x + width - 1, y, 1, height], color);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_bars_are_round_and_fit() {
        for (width, um_per_px, want) in [
            (1000, 10.0, Some((200, "2 mm"))),
            (1000, 20.0, Some((250, "5 mm"))),
            (1000, 2.0, Some((250, "500 µm"))),
            (800, 64.0, Some((156, "10 mm"))),
            (10, 0.01, None),
            (1000, 0.0, None),
            (1000, f64::NAN, None),
        ] {
            let want = want.map(|(pixels, label): (u32, &str)| (pixels, label.to_owned()));
            assert_eq!(scale_bar(width, um_per_px), want, "{width} px of {um_per_px} µm");
        }
    }

    #[test]
    fn shares_never_round_to_nothing_or_all() {
        for (part, whole, want) in [
            (0, 0, "0 %"),
            (0, 9, "0 %"),
            (1, 100_000, "<0.1 %"),
            (1, 8, "12.5 %"),
            (99_999, 100_000, ">99.9 %"),
            (7, 7, "100.0 %"),
        ] {
            assert_eq!(percent(part, whole), want);
        }
    }

    #[test]
    fn long_text_keeps_both_ends() {
        assert_eq!(shortened("abcdefghij", 10), "abcdefghij");
        assert_eq!(shortened("abcdefghijk", 8), "abc..ijk");
        assert_eq!(shortened("ééééé", 4), "é..é");
    }

    #[test]
    fn tiny_pictures_get_a_whole_page() {
        let figure = Figure {
            picture: RgbImage::new(1, 1),
            title: "slide",
            subtitle: "日本",
            legend_title: "Classes",
            legend: vec![LegendItem { color: None, label: "x".repeat(90), value: "0 %".into() }],
            color_bar: None,
            notes: vec!["note".into()],
            um_per_px: 1.0,
        };
        let page = figure.draw();
        assert!(page.width() > 200 && page.height() > 80);
    }
}
