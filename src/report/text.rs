//! Numbers as people read them, and text as HTML holds it. What is not finite becomes a dash.

/// Stands for what is not there.
pub(super) const ABSENT: &str = "–";

/// Applies a format to a number that may be absent.
pub(super) fn or_absent<T>(value: Option<T>, format: impl Fn(T) -> String) -> String {
    value.map_or_else(|| ABSENT.to_owned(), format)
}

/// With this many decimals and commas between the thousands.
pub(super) fn fixed(value: f64, decimals: usize) -> String {
    if !value.is_finite() {
        return ABSENT.to_owned();
    }
    let digits = format!("{:.decimals$}", value.abs());
    let (whole, fraction) = digits.split_once('.').unwrap_or((&digits, ""));
    let is_zero = digits.bytes().all(|byte| byte == b'0' || byte == b'.');
    let sign = if value < 0.0 && !is_zero { "−" } else { "" };
    let point = if fraction.is_empty() { "" } else { "." };
    format!("{sign}{}{point}{fraction}", grouped(whole))
}

/// With three digits that matter; all digits of larger ones, powers of ten beyond the readable.
#[must_use]
pub fn significant(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if !value.is_finite() => ABSENT.to_owned(),
        _ if size == 0.0 => "0".to_owned(),
        _ if !(1e-4..1e12).contains(&size) => {
            let text = format!("{value:.1e}");
            let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            format!("{} × 10{}", mantissa.replace('-', "−"), superscript(exponent))
        }
        _ if size >= 99.95 => fixed(value, 0),
        _ if size >= 9.995 => fixed(value, 1),
        _ if size >= 0.9995 => fixed(value, 2),
        _ if size >= 0.0995 => fixed(value, 3),
        _ if size >= 0.00995 => fixed(value, 4),
        _ => fixed(value, 5),
    }
}

/// A whole number with commas between the thousands.
pub fn count(value: u64) -> String {
    grouped(&value.to_string())
}

/// `3.21×`.
pub(super) fn times(ratio: f64) -> String {
    if ratio.is_finite() { format!("{}×", significant(ratio)) } else { ABSENT.to_owned() }
}

/// A share in per cent; `100 %` and `0 %` only for all and nothing.
pub(super) fn percent(share: f64) -> String {
    match share {
        _ if !share.is_finite() => ABSENT.to_owned(),
        _ if share < 1.0 && share > 0.9999 => ">99.99 %".to_owned(),
        _ if share > 0.0 && share < 0.0001 => "<0.01 %".to_owned(),
        _ if share == 0.0 || share == 1.0 => format!("{} %", fixed(100.0 * share, 0)),
        _ if !(0.01..=0.99).contains(&share) => format!("{} %", fixed(100.0 * share, 2)),
        _ => format!("{} %", fixed(100.0 * share, 1)),
    }
}

/// A number near 1 with about two digits after its nines: `0.99987`, at most seven decimals; `1` only for exactly 1.
pub(super) fn near_one(value: f64) -> String {
    if !value.is_finite() {
        return ABSENT.to_owned();
    }
    if value == 1.0 {
        return "1".to_owned();
    }
    let gap = (1.0 - value).abs();
    if value < 1.0 && gap < 1e-7 {
        return ">0.9999999".to_owned();
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 3 and 7")]
    let decimals = (2.0 - gap.log10().ceil()).clamp(3.0, 7.0) as usize;
    fixed(value, decimals)
}

/// With nine digits that matter, as a limit and what is held against it: three could make a miss look like a hit.
pub(super) fn exact(value: f64) -> String {
    if !value.is_finite() {
        return ABSENT.to_owned();
    }
    let rounded: f64 = format!("{value:.8e}").parse().unwrap_or(value);
    if (1e-4..1e12).contains(&value.abs()) || value == 0.0 {
        rounded.to_string().replace('-', "−")
    } else {
        significant(value)
    }
}

/// A label of an axis: no more digits than it needs, powers of ten for what is very large or small.
pub(super) fn tick(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 || (1e-3..1e6).contains(&size) {
        let text = exact(value);
        let decimals = text.split_once('.').map_or(0, |(_, fraction)| fraction.len());
        return fixed(value, decimals);
    }
    let text = format!("{value:e}");
    match text.split_once('e') {
        Some(("1", exponent)) => format!("10{}", superscript(exponent)),
        _ => significant(value),
    }
}

/// A difference with its sign, in percentage points.
pub(super) fn points(share: f64) -> String {
    if !share.is_finite() {
        return ABSENT.to_owned();
    }
    let text = fixed(100.0 * share, 2);
    if share > 0.0 && text != "0.00" { format!("+{text}") } else { text }
}

/// `3.4 GiB`.
#[must_use]
pub fn bytes(value: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut size, mut unit) = (value as f64, 0);
    while size >= 1023.5 && unit + 1 < units.len() {
        size /= 1024.0;
        unit += 1;
    }
    format!("{} {}", fixed(size, usize::from(unit > 0 && size < 99.95)), units[unit])
}

/// Seconds as `12.3 s`, `4 min 22 s` or `3 h 12 min`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return ABSENT.to_owned();
    }
    if seconds < 99.95 {
        return format!("{} s", significant(seconds));
    }
    if seconds >= 360_000.0 {
        return format!("{} h", fixed(seconds / 3600.0, 0));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 100 and 360,000")]
    let whole = seconds.round() as u64;
    let (minutes, rest) = (whole / 60, whole % 60);
    match (minutes, rest) {
        (60.., _) => format!("{} h {} min", minutes / 60, minutes % 60),
        (_, 0) => format!("{minutes} min"),
        _ => format!("{minutes} min {rest} s"),
    }
}

/// Text as HTML and SVG hold it, in elements and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // SVG within HTML allows no other control characters.
            '\n' | '\t' => escaped.push(character),
            character if character.is_control() => escaped.push('\u{fffd}'),
            character => escaped.push(character),
        }
    }
    escaped
}

fn grouped(digits: &str) -> String {
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn superscript(exponent: &str) -> String {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    let raised = |character: char| match character.to_digit(10) {
        Some(digit) => DIGITS[digit as usize],
        None => '⁻',
    };
    exponent.chars().map(raised).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let texts = [10_546.4, 99.96, 21.37, 3.2149, 0.19, 0.0123, 0.000_15, -4.0, 0.0, f64::NAN].map(significant);
        assert_eq!(texts, ["10,546", "100", "21.4", "3.21", "0.190", "0.0123", "0.00015", "−4.00", "0", "–"]);
        assert_eq!(significant(1.25e-7), "1.2 × 10⁻⁷");
        assert_eq!(significant(3e15), "3.0 × 10¹⁵");
        assert_eq!([1234.0, f64::INFINITY].map(times), ["1,234×", "–"]);
        assert_eq!([999, 1000, 1_234_567].map(count), ["999", "1,000", "1,234,567"]);
        assert_eq!(fixed(-0.001, 2), "0.00");
    }

    #[test]
    fn all_and_nothing_are_not_said_of_less() {
        assert_eq!(
            [1.0, 0.99995, 0.9987, 0.5, 0.001, 1e-6, 0.0].map(percent),
            ["100 %", ">99.99 %", "99.87 %", "50.0 %", "0.10 %", "<0.01 %", "0 %"]
        );
        assert_eq!(
            [1.0, 0.999_999_99, 0.99987, 0.876, 0.9, -0.5].map(near_one),
            ["1", ">0.9999999", "0.99987", "0.876", "0.900", "−0.500"]
        );
        assert_eq!([0.989_96, 0.99, 12.0, 1e-7, -0.5].map(exact), ["0.98996", "0.99", "12", "1.0 × 10⁻⁷", "−0.5"]);
        assert_eq!([0.0, 0.5, 200.0, 10_000.0, 1e-6, 1e12].map(tick), ["0", "0.5", "200", "10,000", "10⁻⁶", "10¹²"]);
        assert_eq!([0.0123, -0.001, 0.0, 1e-9].map(points), ["+1.23", "−0.10", "0.00", "0.00"]);
    }

    #[test]
    fn sizes_and_times_have_units() {
        assert_eq!(
            [0, 1023, 1024, 1_288_490_189, u64::MAX].map(bytes),
            ["0 B", "1,023 B", "1.0 KiB", "1.2 GiB", "16,777,216 TiB"]
        );
        assert_eq!(
            [0.0123, 12.34, 99.99, 262.0, 300.0, 11_520.0, 4e6, f64::NAN].map(duration),
            ["0.0123 s", "12.3 s", "1 min 40 s", "4 min 22 s", "5 min", "3 h 12 min", "1,111 h", "–"]
        );
    }

    #[test]
    fn text_cannot_leave_its_place() {
        assert_eq!(escape("<a b='c\"&\u{0}é\n"), "&lt;a b=&#39;c&quot;&amp;\u{fffd}é\n");
    }
}
