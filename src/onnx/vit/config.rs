//! The description of a ViT: read, checked, and what it says of parameters and cost.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// A vision transformer as timm builds it (Dosovitskiy et al. 2020): patches of an RGB image and a class token, learned
/// positions, blocks with the norm before, one norm at the end. What is counted from it holds if [`Self::check`] accepts
/// it.
#[derive(Clone, Debug, PartialEq)]
pub struct VitConfig {
    /// Width and height of the image in pixels.
    pub image: usize,
    /// Width and height of a patch in pixels; divides [`Self::image`].
    pub patch: usize,
    /// Channels of a token.
    pub dim: usize,
    /// Blocks.
    pub depth: usize,
    /// Attention heads; divides [`Self::dim`].
    pub heads: usize,
    /// Channels inside the MLP by those of a token; the product is rounded down, as timm does.
    pub mlp_ratio: f64,
    /// What becomes of the tokens.
    pub pool: Pool,
    /// Outputs of the linear head; 0 for none: the features are the output.
    pub classes: usize,
}

/// How the tokens become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// The class token is taken.
    Cls,
    /// The mean of all tokens but the class token.
    Avg,
}

/// A description of no ViT.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VitError {
    /// There is no such property.
    #[error("a ViT has no {key:?}; it has {}", KEYS.join(", "))]
    UnknownKey {
        /// What was given.
        key: String,
    },
    /// The name is none of the known ones.
    #[error(
        "{name:?} is neither the name of a ViT, which must come first, nor of the form key=value; names are \
         vit_SIZE and vit_SIZE_patchP_IMAGE, such as vit_base_patch16_384; sizes are {}; keys are {}",
        SIZES.map(|size| size.name).join(", "), KEYS.join(", ")
    )]
    UnknownName {
        /// What was given.
        name: String,
    },
    /// A property is given two values.
    #[error("{key} is given twice")]
    Twice {
        /// The property.
        key: String,
    },
    /// A value can't be read or is not allowed.
    #[error("{key}={value}: {key} must be {allowed}")]
    Value {
        /// The property.
        key: &'static str,
        /// What was given.
        value: String,
        /// What could be given.
        allowed: String,
    },
    /// One size is no multiple of another.
    #[error("{key}={size} is no multiple of {divisor_key}={divisor}")]
    NotDivisible {
        /// The property that is divided.
        key: &'static str,
        /// Its value.
        size: usize,
        /// The property that divides it.
        divisor_key: &'static str,
        /// Its value.
        divisor: usize,
    },
    /// More patches than anybody attends to.
    #[error("{side} x {side} patches are more than {0} x {0}", LARGEST_GRID)]
    Grid {
        /// Patches in a row.
        side: usize,
    },
    /// More weights than are built in memory.
    #[error("{parameters} parameters are more than {MOST_PARAMETERS}")]
    Parameters {
        /// How many it has.
        parameters: u64,
    },
}

/// The properties' names in a description, in the order in which they are written.
const KEYS: [&str; 8] = ["image", "patch", "dim", "depth", "heads", "mlp", "pool", "classes"];
/// Attention grows with the fourth power of this: 128 already means 268 million scores a head.
const LARGEST_GRID: usize = 128;
const MLP_RATIOS: RangeInclusive<f64> = 1.0..=16.0;
/// More than any ViT of pathology has; in 32 bits 12 GB, which are held more than once while a model is built.
const MOST_PARAMETERS: u64 = 3_000_000_000;

/// What the second word of a timm name stands for.
struct Size {
    name: &'static str,
    /// Where the name tells none.
    patch: usize,
    dim: usize,
    depth: usize,
    heads: usize,
    mlp_ratio: f64,
}

#[rustfmt::skip]
const SIZES: [Size; 7] = [
    Size { name: "tiny", patch: 16, dim: 192, depth: 12, heads: 3, mlp_ratio: 4.0 },
    Size { name: "small", patch: 16, dim: 384, depth: 12, heads: 6, mlp_ratio: 4.0 },
    Size { name: "base", patch: 16, dim: 768, depth: 12, heads: 12, mlp_ratio: 4.0 },
    Size { name: "large", patch: 16, dim: 1024, depth: 24, heads: 16, mlp_ratio: 4.0 },
    Size { name: "huge", patch: 14, dim: 1280, depth: 32, heads: 16, mlp_ratio: 4.0 },
    Size { name: "giant", patch: 14, dim: 1408, depth: 40, heads: 16, mlp_ratio: 48.0 / 11.0 },
    Size { name: "gigantic", patch: 14, dim: 1664, depth: 48, heads: 16, mlp_ratio: 64.0 / 13.0 },
];

/// timm's models of 224 px.
const PRESETS: [&str; 13] = [
    "vit_tiny_patch16_224",
    "vit_small_patch8_224",
    "vit_small_patch16_224",
    "vit_small_patch32_224",
    "vit_base_patch8_224",
    "vit_base_patch16_224",
    "vit_base_patch32_224",
    "vit_large_patch14_224",
    "vit_large_patch16_224",
    "vit_large_patch32_224",
    "vit_huge_patch14_224",
    "vit_giant_patch14_224",
    "vit_gigantic_patch14_224",
];

impl Default for VitConfig {
    /// `vit_base_patch16_224` without a head.
    fn default() -> Self {
        Self { image: 224, patch: 16, dim: 768, depth: 12, heads: 12, mlp_ratio: 4.0, pool: Pool::Cls, classes: 0 }
    }
}

impl VitConfig {
    /// timm's models of 224 px, without heads.
    pub fn presets() -> impl Iterator<Item = (&'static str, Self)> {
        PRESETS.into_iter().filter_map(|name| Some((name, Self::named(name)?)))
    }

    /// The model of a name as timm forms them, without a head: `vit_base_patch16_384`, or `vit_base` with the usual patch
    /// and 224 px. Whether the patch divides the image is not looked at.
    fn named(name: &str) -> Option<Self> {
        let text = name.strip_prefix("vit_")?;
        let (size, sides) = text.split_once("_patch").map_or((text, None), |(size, sides)| (size, Some(sides)));
        let Size { patch, dim, depth, heads, mlp_ratio, .. } = SIZES.into_iter().find(|known| known.name == size)?;
        let usual = Self { patch, dim, depth, heads, mlp_ratio, ..Self::default() };
        let Some(sides) = sides else { return Some(usual) };
        let (patch, image) = sides.split_once('_')?;
        Some(Self { patch: patch.parse().ok()?, image: image.parse().ok()?, ..usual })
    }

    /// Finds out whether there can be such a ViT.
    ///
    /// # Errors
    /// [`VitError`] if a size is out of range, or does not divide what it must.
    pub fn check(&self) -> Result<(), VitError> {
        let sizes: [(&str, usize, RangeInclusive<usize>); 6] = [
            ("image", self.image, 1..=4096),
            ("patch", self.patch, 1..=4096),
            ("dim", self.dim, 1..=8192),
            ("depth", self.depth, 1..=128),
            ("heads", self.heads, 1..=8192),
            ("classes", self.classes, 0..=1_000_000),
        ];
        for (key, size, allowed) in sizes {
            if !allowed.contains(&size) {
                let allowed = format!("from {} to {}", allowed.start(), allowed.end());
                return Err(VitError::Value { key, value: size.to_string(), allowed });
            }
        }
        if !MLP_RATIOS.contains(&self.mlp_ratio) {
            let allowed = format!("from {} to {}", MLP_RATIOS.start(), MLP_RATIOS.end());
            return Err(VitError::Value { key: "mlp", value: self.mlp_ratio.to_string(), allowed });
        }
        for (key, size, divisor_key, divisor) in
            [("image", self.image, "patch", self.patch), ("dim", self.dim, "heads", self.heads)]
        {
            if !size.is_multiple_of(divisor) {
                return Err(VitError::NotDivisible { key, size, divisor_key, divisor });
            }
        }
        let side = self.image / self.patch;
        if side > LARGEST_GRID {
            return Err(VitError::Grid { side });
        }
        let parameters = self.parameters();
        if parameters > MOST_PARAMETERS { Err(VitError::Parameters { parameters }) } else { Ok(()) }
    }

    /// Patches of one image, the class token not among them.
    #[must_use]
    pub fn patches(&self) -> usize {
        self.image.checked_div(self.patch).unwrap_or(0).pow(2)
    }

    /// Tokens of one image: patches and the class token.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.patches() + 1
    }

    /// Channels inside the MLP.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "sizes are small")]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "timm's int(dim * mlp_ratio)")]
    pub fn hidden(&self) -> usize {
        (self.dim as f64 * self.mlp_ratio) as usize
    }

    /// The number of learned parameters; those of timm's model of the same description.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let [patch, dim, depth, hidden, tokens, classes] = self.sizes();
        let linear = |inputs: u64, outputs: u64| (inputs + 1) * outputs;
        let norm = 2 * dim;
        let embedding = linear(3 * patch * patch, dim) + dim + tokens * dim;
        let block = 2 * norm + linear(dim, 3 * dim) + linear(dim, dim) + linear(dim, hidden) + linear(hidden, dim);
        embedding + depth * block + norm + linear(dim, classes)
    }

    /// Floating-point operations for one image by the usual formula, one multiplication with addition being two, for
    /// N patches of p pixels, D channels, H heads of d and the MLP's ratio r:
    /// 2·N·p²·3·D + depth·(2·N·D·3D + 2·H·N²·d·2 + 2·N·D·D + 4·N·D·(r·D) + 4·N·D).
    ///
    /// The class token, softmax, GELU, the sum with positions, the last norm and the head are not counted; the norms of
    /// the blocks are, as 4·N·D.
    #[must_use]
    pub fn flops_by_formula(&self) -> u64 {
        self.flops(self.sizes()[4] - 1)
    }

    /// [`Self::flops_by_formula`] with N + 1 tokens in the blocks, which the class token makes them; the patches that
    /// are embedded stay N.
    #[must_use]
    pub fn flops_by_formula_with_class_token(&self) -> u64 {
        self.flops(self.sizes()[4])
    }

    fn flops(&self, tokens: u64) -> u64 {
        let [patch, dim, depth, hidden, all_tokens, _] = self.sizes();
        let embedding = 2 * (all_tokens - 1) * patch * patch * 3 * dim;
        let attention = 2 * tokens * dim * 3 * dim + 4 * tokens * tokens * dim + 2 * tokens * dim * dim;
        embedding + depth * (attention + 4 * tokens * dim * hidden + 4 * tokens * dim)
    }

    /// Patch, dim, depth, hidden, tokens, classes.
    fn sizes(&self) -> [u64; 6] {
        [self.patch, self.dim, self.depth, self.hidden(), self.tokens(), self.classes].map(|size| size as u64)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), VitError> {
        let size = |key: &'static str, place: &mut usize| {
            let refuse = |_| VitError::Value { key, value: value.to_owned(), allowed: "a whole number".to_owned() };
            *place = value.parse().map_err(refuse)?;
            Ok(())
        };
        match key {
            "image" => size("image", &mut self.image),
            "patch" => size("patch", &mut self.patch),
            "dim" => size("dim", &mut self.dim),
            "depth" => size("depth", &mut self.depth),
            "heads" => size("heads", &mut self.heads),
            "classes" => size("classes", &mut self.classes),
            "mlp" => {
                self.mlp_ratio = parse_ratio(value)?;
                Ok(())
            }
            "pool" => {
                self.pool = value.parse()?;
                Ok(())
            }
            _ => Err(VitError::UnknownKey { key: key.to_owned() }),
        }
    }
}

/// Reads `4`, `4.5` or `48/11`.
fn parse_ratio(text: &str) -> Result<f64, VitError> {
    let ratio = match text.split_once('/') {
        Some((above, below)) => above.parse().and_then(|above: f64| Ok(above / below.parse::<f64>()?)),
        None => text.parse(),
    };
    ratio.map_err(|_| VitError::Value {
        key: "mlp",
        value: text.to_owned(),
        allowed: "a number such as 4, 4.5 or 48/11".to_owned(),
    })
}

impl FromStr for Pool {
    type Err = VitError;

    fn from_str(text: &str) -> Result<Self, VitError> {
        match text {
            "cls" => Ok(Self::Cls),
            "avg" => Ok(Self::Avg),
            _ => Err(VitError::Value { key: "pool", value: text.to_owned(), allowed: "cls or avg".to_owned() }),
        }
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cls => "cls",
            Self::Avg => "avg",
        })
    }
}

impl FromStr for VitConfig {
    type Err = VitError;

    /// Reads `image=224,patch=14,dim=768,depth=12,heads=8,mlp=4,pool=cls,classes=0`, a name such as `vit_base`
    /// or `vit_base_patch16_384`, or a name followed by what differs. What is not given is as in `vit_base_patch16_224`.
    fn from_str(text: &str) -> Result<Self, VitError> {
        let mut config = Self::default();
        let mut seen: Vec<&str> = Vec::new();
        for (place, part) in text.split(',').map(str::trim).enumerate() {
            let Some((key, value)) = part.split_once('=') else {
                let named = Self::named(part).filter(|_| place == 0);
                config = named.ok_or_else(|| VitError::UnknownName { name: part.to_owned() })?;
                continue;
            };
            let (key, value) = (key.trim(), value.trim());
            config.set(key, value)?;
            if seen.contains(&key) {
                return Err(VitError::Twice { key: key.to_owned() });
            }
            seen.push(key);
        }
        config.check()?;
        Ok(config)
    }
}

impl fmt::Display for VitConfig {
    /// All properties, as [`FromStr`] reads them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { image, patch, dim, depth, heads, mlp_ratio, pool, classes } = self;
        write!(f, "image={image},patch={patch},dim={dim},depth={depth},heads={heads}")?;
        write!(f, ",mlp={mlp_ratio},pool={pool},classes={classes}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_those_of_timm() {
        // timm 1.0.31: sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
        let counts = [
            ("vit_tiny_patch16_224", 5_524_416),
            ("vit_small_patch8_224", 21_670_272),
            ("vit_small_patch16_224", 21_665_664),
            ("vit_small_patch32_224", 22_493_952),
            ("vit_base_patch8_224", 85_807_872),
            ("vit_base_patch16_224", 85_798_656),
            ("vit_base_patch32_224", 87_455_232),
            ("vit_large_patch14_224", 303_178_752),
            ("vit_large_patch16_224", 303_301_632),
            ("vit_large_patch32_224", 305_510_400),
            ("vit_huge_patch14_224", 630_764_800),
            ("vit_giant_patch14_224", 1_011_202_432),
            ("vit_gigantic_patch14_224", 1_842_775_680),
        ];
        let found: Vec<_> = VitConfig::presets().map(|(name, config)| (name, config.parameters())).collect();
        assert_eq!(found, counts);
        let parameters = |text: &str| text.parse::<VitConfig>().unwrap().parameters();
        let larger = [
            ("vit_tiny_patch16_384", 5_597_376),
            ("vit_small_patch16_384", 21_811_584),
            ("vit_small_patch32_384", 22_530_432),
            ("vit_base_patch16_384", 86_090_496),
            ("vit_base_patch32_384", 87_528_192),
            ("vit_large_patch16_384", 303_690_752),
            ("vit_large_patch32_384", 305_607_680),
        ];
        assert_eq!(larger.map(|(name, _)| (name, parameters(name))), larger);
        // The same with num_classes=1000, and with global_pool="avg", whose norm comes after the mean.
        assert_eq!(parameters("vit_base_patch16_384,classes=1000"), 86_859_496);
        assert_eq!(parameters("vit_small_patch16_384,classes=1000"), 22_196_584);
        assert_eq!(parameters("vit_tiny_patch16_224,classes=1000"), 5_717_416);
        assert_eq!(parameters("vit_tiny_patch16_224,pool=avg"), 5_524_416);
    }

    #[test]
    fn flops_are_those_of_the_formula() {
        let check = |text: &str, without: u64, with: u64| {
            let config: VitConfig = text.parse().unwrap();
            assert_eq!(config.flops_by_formula(), without, "{text}");
            assert_eq!(config.flops_by_formula_with_class_token(), with, "{text} with class token");
        };
        // N = 2·2 = 4, D = 6, r·D = 12. Embedding 2·4·9·3·6 = 1296. A block: qkv 2·4·6·18 = 864, scores and sums
        // 4·16·6 = 384, projection 2·4·36 = 288, MLP 4·4·6·12 = 1152, norms 4·4·6 = 96: 2784.
        // With 5 tokens: 1080 + 600 + 360 + 1440 + 120 = 3600.
        check("image=6,patch=3,dim=6,depth=1,heads=2,mlp=2", 1296 + 2784, 1296 + 3600);
        // N = 256, D = 768, r·D = 3072. Embedding 2·256·196·3·768 = 231,211,008. A block: 905,969,664 + 201,326,592
        // + 301,989,888 + 2,415,919,104 + 786,432 = 3,825,991,680. With 257 tokens: 909,508,608 + 202,902,528
        // + 303,169,536 + 2,425,356,288 + 789,504 = 3,841,726,464.
        check(
            "image=224,patch=14,dim=768,depth=12,heads=8,mlp=4,pool=cls",
            231_211_008 + 12 * 3_825_991_680,
            231_211_008 + 12 * 3_841_726_464,
        );
        // N = 1024, D = 128, r·D = 1024. Embedding 2·1024·64·3·128 = 50,331,648. A block: 100,663,296 + 536,870,912
        // + 33,554,432 + 536,870,912 + 524,288 = 1,208,483,840. With 1025 tokens: 100,761,600 + 537,920,000
        // + 33,587,200 + 537,395,200 + 524,800 = 1,210,188,800.
        check(
            "image=256,patch=8,dim=128,depth=3,heads=4,mlp=8,pool=avg",
            50_331_648 + 3 * 1_208_483_840,
            50_331_648 + 3 * 1_210_188_800,
        );
    }

    #[test]
    fn what_is_not_given_is_the_base_model() {
        let parse = |text: &str| text.parse::<VitConfig>().unwrap();
        assert_eq!(parse("vit_base_patch16_224"), VitConfig::default());
        assert_eq!(parse("depth=12"), VitConfig::default());
        assert_eq!(parse("vit_giant_patch14_224").hidden(), 6144);
        assert_eq!(parse("vit_giant_patch14_224"), parse("patch=14,dim=1408,depth=40,heads=16,mlp=48/11"));
        let changed = parse("vit_small_patch16_224, pool=avg, classes=4");
        assert_eq!((changed.dim, changed.pool, changed.classes), (384, Pool::Avg, 4));
        for (name, config) in VitConfig::presets() {
            config.check().unwrap();
            assert_eq!(parse(name), config);
            assert_eq!(parse(&config.to_string()), config);
        }
    }

    #[test]
    fn a_size_alone_has_its_usual_patch_and_224_pixels() {
        let parse = |text: &str| text.parse::<VitConfig>().unwrap();
        for (short, whole) in [
            ("vit_tiny", "vit_tiny_patch16_224"),
            ("vit_small", "vit_small_patch16_224"),
            ("vit_base", "vit_base_patch16_224"),
            ("vit_large", "vit_large_patch16_224"),
            ("vit_huge", "vit_huge_patch14_224"),
            ("vit_giant", "vit_giant_patch14_224"),
            ("vit_gigantic", "vit_gigantic_patch14_224"),
            ("vit_base,image=384", "vit_base_patch16_384"),
            ("vit_huge_patch16_448", "vit_huge,patch=16,image=448"),
        ] {
            assert_eq!(parse(short), parse(whole), "{short}");
        }
    }

    #[test]
    fn what_is_no_vit_is_told() {
        let keys = "image, patch, dim, depth, heads, mlp, pool, classes";
        let unknown = |name: &str| {
            format!(
                "{name:?} is neither the name of a ViT, which must come first, nor of the form key=value; names are \
                 vit_SIZE and vit_SIZE_patchP_IMAGE, such as vit_base_patch16_384; sizes are tiny, small, base, large, \
                 huge, giant, gigantic; keys are {keys}"
            )
        };
        let cases = [
            ("width=3", format!("a ViT has no \"width\"; it has {keys}")),
            ("vit_medium", unknown("vit_medium")),
            ("vit_base_patch16", unknown("vit_base_patch16")),
            ("vit_base_patch16_clip_224", unknown("vit_base_patch16_clip_224")),
            ("depth=6,vit_base", unknown("vit_base")),
            ("vit_base_patch14_384", "image=384 is no multiple of patch=14".to_owned()),
            ("vit_base_patch0_224", "patch=0: patch must be from 1 to 4096".to_owned()),
            ("dim=64,heads", unknown("heads")),
            ("", unknown("")),
            ("dim=8192,depth=128,mlp=16,heads=1", "309271797760 parameters are more than 3000000000".to_owned()),
            ("dim=768,dim=768", "dim is given twice".to_owned()),
            ("depth=", "depth=: depth must be a whole number".to_owned()),
            ("depth=-1", "depth=-1: depth must be a whole number".to_owned()),
            ("depth=0", "depth=0: depth must be from 1 to 128".to_owned()),
            ("patch=0", "patch=0: patch must be from 1 to 4096".to_owned()),
            ("mlp=x", "mlp=x: mlp must be a number such as 4, 4.5 or 48/11".to_owned()),
            ("mlp=1/0", "mlp=inf: mlp must be from 1 to 16".to_owned()),
            ("mlp=nan", "mlp=NaN: mlp must be from 1 to 16".to_owned()),
            ("mlp=0.5", "mlp=0.5: mlp must be from 1 to 16".to_owned()),
            ("pool=max", "pool=max: pool must be cls or avg".to_owned()),
            ("patch=15", "image=224 is no multiple of patch=15".to_owned()),
            ("heads=7", "dim=768 is no multiple of heads=7".to_owned()),
            ("patch=1", "224 x 224 patches are more than 128 x 128".to_owned()),
        ];
        for (text, message) in cases {
            assert_eq!(text.parse::<VitConfig>().unwrap_err().to_string(), message, "{text}");
        }
    }
}
