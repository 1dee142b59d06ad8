//! Seeded random weights: a normal distribution cut at two standard deviations, fast enough for 10⁹ of them.

use std::f64::consts::SQRT_2;

use rayon::prelude::*;

/// Nothing lies further from 0, in standard deviations of the normal distribution that is cut.
const CUT: f64 = 2.0;
/// The upper bits of a random number choose one of so many equally likely cells, the others the place in it. Between
/// quantiles this near, straight lines are off by less than 10⁻⁵ standard deviations.
const CELL_BITS: u32 = 12;
const CELLS: u16 = 1 << CELL_BITS;
/// Numbers that one thread draws in one go.
const BLOCK: usize = 1 << 16;

/// A source of random numbers: the same seed, name and place give the same number on every machine.
pub(super) struct TruncatedNormal {
    /// The borders of the cells, from -2 to 2.
    quantiles: Vec<f32>,
    seed: u64,
}

impl TruncatedNormal {
    pub(super) fn new(seed: u64) -> Self {
        let quantiles = (0..=CELLS).map(|cell| quantile(f64::from(cell) / f64::from(CELLS)));
        Self { quantiles: quantiles.collect(), seed }
    }

    /// The first `len` numbers that belong to `name`, between -2σ and 2σ. Their own standard deviation is 0.88 σ.
    pub(super) fn draw(&self, name: &str, sigma: f32, len: usize) -> Vec<f32> {
        let stream = name.bytes().fold(mixed(self.seed), |state, byte| mixed(state ^ u64::from(byte)));
        let mut numbers = vec![0.0; len];
        numbers.par_chunks_mut(BLOCK).enumerate().for_each(|(number, block)| {
            let first = (number * BLOCK / 2) as u64;
            let pair_at = |place: u64| {
                let bits = mixed(stream.wrapping_add(place.wrapping_mul(GOLDEN)));
                #[expect(clippy::cast_possible_truncation, reason = "the halves of 64 bits")]
                [bits as u32, (bits >> 32) as u32].map(|half| sigma * self.number(half))
            };
            let (pairs, rest) = block.as_chunks_mut();
            pairs.iter_mut().zip(first..).for_each(|(pair, place)| *pair = pair_at(place));
            rest.iter_mut().for_each(|last| [*last, _] = pair_at(first + pairs.len() as u64));
        });
        numbers
    }

    /// The number that lies where `bits` does between 0 and 2³².
    fn number(&self, bits: u32) -> f32 {
        const PLACE_BITS: u32 = u32::BITS - CELL_BITS;
        let cell = (bits >> PLACE_BITS) as usize;
        #[expect(clippy::cast_precision_loss, reason = "20 bits fit")]
        let place = (bits & ((1 << PLACE_BITS) - 1)) as f32 / (1_u32 << PLACE_BITS) as f32;
        let (from, to) = (self.quantiles[cell], self.quantiles[cell + 1]);
        from + (to - from) * place
    }
}

/// The x that a part `probability` of the cut distribution lies below, by bisection.
fn quantile(probability: f64) -> f32 {
    let wanted = (2.0 * probability - 1.0) * libm::erf(CUT / SQRT_2);
    let (mut low, mut high) = (-CUT, CUT);
    for _ in 0..40 {
        let middle = f64::midpoint(low, high);
        if libm::erf(middle / SQRT_2) < wanted {
            low = middle;
        } else {
            high = middle;
        }
    }
    #[expect(clippy::cast_possible_truncation, reason = "weights are 32-bit floats")]
    let x = f64::midpoint(low, high) as f32;
    x
}

/// 2⁶⁴ divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// `SplitMix64`: a bijection whose values for consecutive multiples of [`GOLDEN`] pass tests of randomness (Steele,
/// Lea, Flood 2014).
fn mixed(state: u64) -> u64 {
    let state = state.wrapping_add(GOLDEN);
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_mix_is_the_published_one() {
        // The first outputs of the authors' C program for the seed 1234567.
        let outputs: Vec<u64> =
            (0..3).map(|place: u64| mixed(GOLDEN.wrapping_mul(place).wrapping_add(1_234_567))).collect();
        assert_eq!(outputs, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn the_distribution_is_the_cut_normal_one() {
        let count = 1_000_000;
        let numbers = TruncatedNormal::new(7).draw("w", 0.02, count);
        assert!(numbers.iter().all(|number| number.abs() <= 0.04));
        let mean =
            |of: &dyn Fn(f64) -> f64| numbers.iter().map(|x| of(f64::from(*x) / 0.02)).sum::<f64>() / count as f64;
        // Standard errors are about 0.001. The variance is 1 - 2·2·φ(2) / (Φ(2) - Φ(-2)) = 0.77374.
        assert!(mean(&|x| x).abs() < 0.005);
        assert!((mean(&|x| x * x) - 0.77374).abs() < 0.005);
        // Φ(0.5) - Φ(-0.5) = 0.38292 and Φ(1) - Φ(-1) = 0.68269, of Φ(2) - Φ(-2) = 0.95450.
        for (limit, part) in [(0.5, 0.38292 / 0.95450), (1.0, 0.68269 / 0.95450)] {
            let found = mean(&|x| f64::from(u8::from(x.abs() < limit)));
            assert!((found - part).abs() < 0.003, "{limit}: {found}, not {part}");
        }
        // Neighbours, which come from one 64-bit number or from two, know nothing of each other.
        let product = numbers.windows(2).map(|pair| f64::from(pair[0] * pair[1]) / 0.0004).sum::<f64>() / count as f64;
        assert!(product.abs() < 0.005, "{product}");
    }

    #[test]
    fn seed_and_name_decide() {
        let draw = |seed, name, len| TruncatedNormal::new(seed).draw(name, 1.0, len);
        assert_eq!(draw(1, "a", 5), draw(1, "a", 200_000)[..5]);
        assert_ne!(draw(1, "a", 5), draw(2, "a", 5));
        assert_ne!(draw(1, "a", 5), draw(1, "b", 5));
        let long = draw(1, "a", 2 * BLOCK);
        assert_ne!(long[..BLOCK], long[BLOCK..]);
    }
}
