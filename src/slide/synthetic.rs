//! A made-up slide, so that tests, examples and demonstrations need no patient's tissue.
//!
//! Pink stroma with purple nuclei on noisy glass; on wish pale fat, a stroke of a pen and the black border that some
//! scanners leave. Every pixel is a function of its position and the seed alone, so any part can be made by itself,
//! and what is tissue is [known](SyntheticSlide::is_tissue). No library function whose rounding differs between
//! machines is involved. [`SyntheticSlide::write`] makes a file that OpenSlide reads like a scanner's.

mod svs;

use std::sync::LazyLock;

pub use self::svs::{Encoding, MppField, SvsOptions};

/// A synthetic slide's content.
#[derive(Clone, Debug, PartialEq)]
pub struct SyntheticSlide {
    /// Width in level-0 pixels.
    pub width: u32,
    /// Height in level-0 pixels.
    pub height: u32,
    /// Microns per level-0 pixel, as written to the file; the content doesn't scale with it.
    pub mpp: f64,
    /// Another seed is another slide.
    pub seed: u64,
    /// Where tissue lies.
    pub tissue: Tissue,
    /// Whether the middle of the tissue is fat.
    pub has_fat: bool,
    /// A stroke across the upper end of the slide.
    pub pen: Option<Ink>,
    /// Width of a black frame in pixels.
    pub border: u32,
}

/// Where the tissue of a synthetic slide lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tissue {
    /// Two pieces on glass, about two fifths of the slide.
    Pieces,
    /// Nowhere.
    None,
    /// Everywhere.
    Everywhere,
}

/// The ink of a pen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ink {
    /// Black.
    Black,
    /// Blue.
    Blue,
    /// Green.
    Green,
    /// Red.
    Red,
}

/// Side of the cells in which pixels are made; a nucleus lies within one.
const CELL: u32 = 16;
/// Diameter of a fat cell.
const FAT_CELL: u32 = 128;
/// Side of the table of noise.
const NOISE: usize = 64;

impl SyntheticSlide {
    /// Two pieces of tissue on glass at 0.5 µm per pixel, without fat, pen or border.
    #[must_use]
    pub fn new(width: u32, height: u32, seed: u64) -> Self {
        Self { width, height, mpp: 0.5, seed, tissue: Tissue::Pieces, has_fat: false, pen: None, border: 0 }
    }

    /// The pixels of a part: `[height, width, 3]`, RGB8. Beyond the slide the content goes on.
    #[must_use]
    pub fn pixels(&self, x: u32, y: u32, width: u32, height: u32) -> Vec<u8> {
        let mut rgb = vec![0; width as usize * height as usize * 3];
        let noise = &*GRAIN;
        let (end_x, end_y) = (x + width, y + height);
        for cell_y in y / CELL..end_y.div_ceil(CELL) {
            for cell_x in x / CELL..end_x.div_ceil(CELL) {
                let cell = self.cell(cell_x, cell_y);
                let left = (cell_x * CELL).max(x);
                let run = ((cell_x + 1) * CELL).min(end_x) - left;
                for at_y in (cell_y * CELL).max(y)..((cell_y + 1) * CELL).min(end_y) {
                    let start = ((at_y - y) as usize * width as usize + (left - x) as usize) * 3;
                    for (at_x, out) in (left..).zip(rgb[start..][..run as usize * 3].chunks_exact_mut(3)) {
                        let colour = self.colour(&cell, at_x, at_y);
                        let grain =
                            i16::from(noise[(at_y as usize % NOISE) * NOISE + (at_x as usize + cell.grain) % NOISE]);
                        for (value, colour) in out.iter_mut().zip(colour) {
                            *value = clamp(f32::from(i16::from(colour) + grain));
                        }
                    }
                }
            }
        }
        rgb
    }

    /// Whether tissue that can be seen lies there: not under ink or border.
    #[must_use]
    pub fn is_tissue(&self, x: u32, y: u32) -> bool {
        let cell = self.cell(x / CELL, y / CELL);
        !self.is_border(x, y) && self.pen_at(x, y).is_none() && cell.field.at(x, y) > 0.0
    }

    fn cell(&self, cell_x: u32, cell_y: u32) -> Cell {
        let corners = |value: &dyn Fn(u32, u32) -> f32| {
            Corners([
                [value(cell_x, cell_y), value(cell_x + 1, cell_y)],
                [value(cell_x, cell_y + 1), value(cell_x + 1, cell_y + 1)],
            ])
        };
        let field = corners(&|x, y| self.field(x * CELL, y * CELL));
        let hash = hash_of(self.seed, cell_x, cell_y);
        let texture = corners(&|x, y| unit(hash_of(self.seed ^ 0x7ec5, x, y)));
        let [offset_x, offset_y, size, shade] =
            [hash, hash >> 8, hash >> 16, hash >> 24].map(|bits| (bits & 0xff) as f32 / 255.0);
        // Crowded where a slow noise is high, as glands are.
        let crowd = 0.35 + 0.5 * self.smooth(cell_x * CELL, cell_y * CELL, 160.0, 0x9a1d);
        let has_nucleus = unit(hash >> 32) < crowd;
        let nucleus = has_nucleus.then(|| Nucleus {
            x: (cell_x * CELL) as f32 + 6.0 + 4.0 * offset_x,
            y: (cell_y * CELL) as f32 + 6.0 + 4.0 * offset_y,
            radius: 3.0 + 3.0 * size,
            shade,
        });
        Cell { field, texture, nucleus, grain: (hash >> 40) as usize % NOISE }
    }

    fn colour(&self, cell: &Cell, x: u32, y: u32) -> [u8; 3] {
        const GLASS: [f32; 3] = [243.0, 242.0, 244.0];
        if self.is_border(x, y) {
            return [9, 8, 10];
        }
        if let Some(ink) = self.pen_at(x, y) {
            return ink.rgb();
        }
        let field = cell.field.at(x, y);
        // Tissue ends within a few pixels.
        let cover = (field * 60.0 + 0.5).clamp(0.0, 1.0);
        if cover <= 0.0 {
            return GLASS.map(clamp);
        }
        let tissue = if self.is_fat(x, y) { fat(x, y) } else { cell.tissue(x, y) };
        mix(GLASS, tissue, cover).map(clamp)
    }

    /// Above 0 in tissue.
    fn field(&self, x: u32, y: u32) -> f32 {
        match self.tissue {
            Tissue::None => return -1.0,
            Tissue::Everywhere => return 1.0,
            Tissue::Pieces => {}
        }
        let longest = self.width.max(self.height) as f32;
        let (across, down) = (x as f32 / self.width as f32, y as f32 / self.height as f32);
        let piece = |centre_x: f32, centre_y: f32, radius_x: f32, radius_y: f32| {
            let (dx, dy) = ((across - centre_x) / radius_x, (down - centre_y) / radius_y);
            1.0 - dx * dx - dy * dy
        };
        let pieces = piece(0.34, 0.48, 0.24, 0.27).max(piece(0.76, 0.62, 0.15, 0.27));
        pieces
            + 0.5 * (self.smooth(x, y, longest / 12.0, 1) - 0.5)
            + 0.25 * (self.smooth(x, y, longest / 40.0, 2) - 0.5)
    }

    fn is_fat(&self, x: u32, y: u32) -> bool {
        let (dx, dy) = (x as f32 / self.width as f32 - 0.34, y as f32 / self.height as f32 - 0.48);
        self.has_fat && dx * dx + dy * dy < 0.012
    }

    fn is_border(&self, x: u32, y: u32) -> bool {
        self.border > 0
            && (x < self.border
                || y < self.border
                || x.saturating_add(self.border) >= self.width
                || y.saturating_add(self.border) >= self.height)
    }

    /// A zigzag stroke in the upper tenth of the slide, a twentieth of its height thick.
    fn pen_at(&self, x: u32, y: u32) -> Option<Ink> {
        let ink = self.pen?;
        let (across, down) = (x as f32 / self.width as f32, y as f32 / self.height as f32);
        let zigzag = ((across * 6.0).fract() - 0.5).abs() * 0.08;
        ((0.08..0.92).contains(&across) && (down - 0.07 - zigzag).abs() < 0.025).then_some(ink)
    }

    /// Value noise between 0 and 1 with features of `scale` pixels.
    fn smooth(&self, x: u32, y: u32, scale: f32, salt: u64) -> f32 {
        let (x, y) = (x as f32 / scale, y as f32 / scale);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positions are not negative")]
        let (column, row) = (x as u32, y as u32);
        let value = |dx, dy| unit(hash_of(self.seed ^ (salt << 48), column + dx, row + dy));
        let ease = |t: f32| t * t * (3.0 - 2.0 * t);
        let (right, down) = (ease(x - column as f32), ease(y - row as f32));
        let upper = value(0, 0) + (value(1, 0) - value(0, 0)) * right;
        let lower = value(0, 1) + (value(1, 1) - value(0, 1)) * right;
        upper + (lower - upper) * down
    }
}

impl Ink {
    fn rgb(self) -> [u8; 3] {
        match self {
            Self::Black => [28, 27, 30],
            Self::Blue => [35, 65, 165],
            Self::Green => [25, 125, 70],
            Self::Red => [205, 30, 42],
        }
    }
}

/// What is the same for all pixels of a cell.
struct Cell {
    field: Corners,
    texture: Corners,
    nucleus: Option<Nucleus>,
    grain: usize,
}

struct Nucleus {
    x: f32,
    y: f32,
    radius: f32,
    shade: f32,
}

/// Values at a cell's corners, `[row][column]`, linear in between.
struct Corners([[f32; 2]; 2]);

impl Corners {
    fn at(&self, x: u32, y: u32) -> f32 {
        let (right, down) = ((x % CELL) as f32 / CELL as f32, (y % CELL) as f32 / CELL as f32);
        let [[a, b], [c, d]] = self.0;
        let (upper, lower) = (a + (b - a) * right, c + (d - c) * right);
        upper + (lower - upper) * down
    }
}

impl Cell {
    fn tissue(&self, x: u32, y: u32) -> [f32; 3] {
        const PALE: [f32; 3] = [236.0, 190.0, 214.0];
        const DEEP: [f32; 3] = [212.0, 128.0, 174.0];
        const NUCLEUS: [f32; 3] = [112.0, 76.0, 150.0];
        const DARK_NUCLEUS: [f32; 3] = [72.0, 44.0, 112.0];
        let stroma = mix(PALE, DEEP, self.texture.at(x, y));
        let Some(nucleus) = &self.nucleus else { return stroma };
        let (dx, dy) = (x as f32 - nucleus.x, y as f32 - nucleus.y);
        // The squared distance, so without a root: soft over about the last third of the radius.
        let inside = (1.0 - (dx * dx + dy * dy) / (nucleus.radius * nucleus.radius)) * 2.0;
        if inside <= 0.0 { stroma } else { mix(stroma, mix(NUCLEUS, DARK_NUCLEUS, nucleus.shade), inside.min(1.0)) }
    }
}

/// Nearly empty cells between thin membranes.
fn fat(x: u32, y: u32) -> [f32; 3] {
    let shifted = x + (y / FAT_CELL % 2) * (FAT_CELL / 2);
    let is_membrane = shifted % FAT_CELL < 5 || y % FAT_CELL < 5;
    if is_membrane { [222.0, 172.0, 198.0] } else { [244.0, 240.0, 243.0] }
}

fn mix(a: [f32; 3], b: [f32; 3], share: f32) -> [f32; 3] {
    [a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share]
}

fn clamp(value: f32) -> u8 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates, as wanted")]
    let value = (value + 0.5) as u8;
    value
}

/// The camera's noise, for all slides the same: each cell of a slide starts elsewhere in it.
static GRAIN: LazyLock<Vec<i8>> = LazyLock::new(|| {
    let grain = |index: u32| {
        let hash = hash_of(0x6ea1, index, 0);
        // The sum of two is nearly triangular: -3 to 3, mostly 0.
        i8::try_from(hash % 4 + (hash >> 8) % 4).unwrap_or(3) - 3
    };
    (0..).take(NOISE * NOISE).map(grain).collect()
});

/// Between 0 and 1, from the low bits.
fn unit(hash: u64) -> f32 {
    (hash & 0xffff) as f32 / 65535.0
}

/// SplitMix64's finaliser over seed and position.
fn hash_of(seed: u64, x: u32, y: u32) -> u64 {
    let mut hash = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(x) << 32 | u64::from(y));
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_the_same_however_it_is_cut() {
        let slide =
            SyntheticSlide { has_fat: true, pen: Some(Ink::Blue), border: 7, ..SyntheticSlide::new(700, 500, 3) };
        let whole = slide.pixels(0, 0, 700, 500);
        for (x, y, width, height) in [(0, 0, 1, 1), (13, 200, 100, 50), (699, 499, 1, 1), (240, 240, 240, 240)] {
            let part = slide.pixels(x, y, width, height);
            for row in 0..height {
                let start = ((y + row) * 700 + x) as usize * 3;
                let len = width as usize * 3;
                assert_eq!(part[row as usize * len..][..len], whole[start..][..len], "{x},{y} row {row}");
            }
        }
        assert_ne!(whole, SyntheticSlide { seed: 4, ..slide }.pixels(0, 0, 700, 500));
    }

    #[test]
    fn tissue_is_where_it_is_said_to_be() {
        let mut slide = SyntheticSlide::new(1000, 1000, 1);
        let share = |slide: &SyntheticSlide| {
            let hits = (0..1000).step_by(10).flat_map(|y| (0..1000).step_by(10).map(move |x| (x, y)));
            hits.filter(|(x, y)| slide.is_tissue(*x, *y)).count() as f64 / 10_000.0
        };
        assert!((0.25..0.5).contains(&share(&slide)), "{}", share(&slide));
        slide.tissue = Tissue::None;
        assert_eq!(share(&slide), 0.0);
        slide.tissue = Tissue::Everywhere;
        assert_eq!(share(&slide), 1.0);
        slide.border = 100;
        assert!((0.6..0.7).contains(&share(&slide)));
    }
}
