//! Sizes as people write them: `64MiB`, `1.5GiB`, `300MB`, `4096`.

/// Units, largest first, so that printing finds the largest that divides.
const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// Bytes written as a number with an optional unit: `KiB MiB GiB TiB` (also `K M G T`) are powers of 1024, `KB MB GB TB`
/// of 1000, `B` and nothing are bytes. A fraction is allowed before a unit if the product is a whole number of bytes.
///
/// # Errors
/// Words that say what was expected.
pub fn parse(text: &str) -> Result<u64, String> {
    let expected =
        || format!("{text:?} is no size: write bytes or a number with a unit, such as 67108864, 64MiB or 1.5GiB");
    let text = text.trim();
    let split = text
        .find(|letter: char| !(letter.is_ascii_digit() || letter == '.' || letter == '_'))
        .unwrap_or(text.len());
    let number = text[..split].replace('_', "");
    let unit = text[split..].trim();
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(expected()),
    };
    let too_large = || format!("{text:?} is more bytes than fit 64 bits");
    let (whole, fraction) = number.split_once('.').unwrap_or((&number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || fraction.len() > 9 {
        return Err(expected());
    }
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().map_err(|_| too_large())?
    };
    let mut bytes = whole.checked_mul(factor).ok_or_else(too_large)?;
    if !fraction.is_empty() {
        let scale = 10_u128.pow(u32::try_from(fraction.len()).unwrap_or(0));
        let part = u128::from(fraction.parse::<u64>().map_err(|_| expected())?) * u128::from(factor);
        if part % scale != 0 {
            return Err(format!("{text:?} is not a whole number of bytes"));
        }
        bytes = bytes
            .checked_add(u64::try_from(part / scale).map_err(|_| too_large())?)
            .ok_or_else(too_large)?;
    }
    Ok(bytes)
}

/// The shortest exact form that [`parse`] reads back to the same number.
#[must_use]
pub fn exact(bytes: u64) -> String {
    match UNITS
        .iter()
        .find(|(_, factor)| bytes > 0 && bytes.is_multiple_of(*factor))
    {
        Some((unit, factor)) => format!("{}{unit}", bytes / factor),
        None => bytes.to_string(),
    }
}

/// A form for people: three significant digits and a unit.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn rounded(bytes: u64) -> String {
    match UNITS.iter().find(|(_, factor)| bytes >= *factor) {
        Some((unit, factor)) => {
            let value = bytes as f64 / *factor as f64;
            let digits = if value >= 100.0 {
                0
            } else if value >= 10.0 {
                1
            } else {
                2
            };
            format!("{value:.digits$} {unit}")
        }
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::{exact, parse, rounded};

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("4096", 4096),
            ("64MiB", 64 << 20),
            ("64 mib", 64 << 20),
            ("1.5GiB", 3 << 29),
            ("2k", 2048),
            ("300MB", 300_000_000),
            ("1_000", 1000),
            (".5K", 512),
            ("0", 0),
            ("16777215TiB", 16_777_215 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_in_words() {
        for text in [
            "",
            "MiB",
            "-1",
            "1.2.3MiB",
            "64XB",
            "0.3B",
            "99999999999999999999",
            "16777216TiB",
            ".",
        ] {
            let words = parse(text).expect_err(text);
            assert!(words.contains('"'), "{words}");
        }
    }

    #[test]
    fn the_exact_form_reads_back() {
        for bytes in [0, 1, 1023, 1024, 1025, 64 << 20, (64 << 20) + 1, 3 << 29, u64::MAX] {
            assert_eq!(parse(&exact(bytes)), Ok(bytes));
        }
        assert_eq!(exact(64 << 20), "64MiB");
        assert_eq!(rounded(1536), "1.50 KiB");
        assert_eq!(rounded(17), "17 B");
    }
}
