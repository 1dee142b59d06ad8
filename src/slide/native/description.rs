//! Finds the resolution in what scanners write into a TIFF's ImageDescription.

/// `MPP = 0.499` among the fields of an Aperio description.
pub(crate) fn aperio_mpp(description: &str) -> Option<(f64, f64)> {
    let field = description.split('|').find_map(|field| {
        let (name, value) = field.split_once('=')?;
        (name.trim() == "MPP").then(|| value.trim())
    })?;
    positive(field).map(|mpp| (mpp, mpp))
}

/// PhysicalSizeX and PhysicalSizeY of the first image of an OME description.
pub(crate) fn ome_mpp(description: &str) -> Option<(f64, f64)> {
    let axis = |size: &str, unit: &str| {
        let micrometres = match attribute(description, "Pixels", unit) {
            // µ has two code points, and XML may escape either.
            None | Some("\u{b5}m" | "\u{3bc}m" | "&#181;m" | "&#xB5;m" | "&#xb5;m" | "&#956;m") => 1.0,
            Some("nm") => 1e-3,
            Some("mm") => 1e3,
            Some(_) => return None,
        };
        positive(attribute(description, "Pixels", size)?).map(|value| value * micrometres)
    };
    axis("PhysicalSizeX", "PhysicalSizeXUnit").zip(axis("PhysicalSizeY", "PhysicalSizeYUnit"))
}

fn positive(text: &str) -> Option<f64> {
    text.parse().ok().filter(|value: &f64| value.is_finite() && *value > 0.0)
}

/// An attribute of the first element of that name; enough XML for OME, whose attributes hold no `>`.
pub(crate) fn attribute<'a>(xml: &'a str, element: &str, name: &str) -> Option<&'a str> {
    let start = xml.match_indices('<').map(|(at, _)| &xml[at + 1..]).find_map(|rest| {
        // Elements may carry a namespace prefix.
        let after = rest.trim_start_matches(char::is_alphanumeric);
        let rest = after.strip_prefix(':').unwrap_or(rest);
        rest.strip_prefix(element).filter(|rest| rest.starts_with(char::is_whitespace))
    })?;
    let element = start.split('>').next()?;
    element.match_indices(name).find_map(|(at, _)| {
        let is_whole = element[..at].ends_with(char::is_whitespace);
        let value = element[at + name.len()..].trim_start().strip_prefix('=')?.trim_start();
        let quote = value.chars().next().filter(|quote| matches!(quote, '"' | '\''))?;
        is_whole.then(|| value[1..].split(quote).next()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_by_whole_names() {
        let xml = "<a:OME><!-- <x> --><b:Pixels\n ID=\"1\" PhysicalSizeXUnit='µm' PhysicalSizeX = '0.5'>";
        assert_eq!(attribute(xml, "Pixels", "PhysicalSizeX"), Some("0.5"));
        assert_eq!(attribute(xml, "Pixels", "SizeX"), None);
        assert_eq!(attribute("<PixelsX ID='1'><Pixels>", "Pixels", "ID"), None);
    }

    #[test]
    fn resolutions_are_positive_numbers_in_known_units() {
        assert_eq!(aperio_mpp("Aperio\r\n1x1|AppMag = 20|MPP = 0.4990"), Some((0.499, 0.499)));
        for text in ["Aperio|MPP = 0", "Aperio|MPP = none", "Aperio|XMPP = 1", "Aperio"] {
            assert_eq!(aperio_mpp(text), None, "{text}");
        }
        let ome = |unit: &str| {
            ome_mpp(&format!(
                "<Pixels PhysicalSizeX='2' PhysicalSizeY='3' PhysicalSizeXUnit='{unit}' PhysicalSizeYUnit='µm'/>"
            ))
        };
        assert_eq!(ome("&#181;m"), Some((2.0, 3.0)));
        assert_eq!(ome("mm"), Some((2000.0, 3.0)));
        assert_eq!(ome("pixel"), None);
    }
}
