//! Whole numbers in JSON: as numbers while every reader holds them exactly (below 2^53), as decimal text from there on.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The first whole number that a reader with 64-bit floats may confuse with its neighbour.
pub(super) const EXACT_BELOW: u64 = 1 << 53;

pub(super) fn serialize<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    if *number < EXACT_BELOW {
        serializer.serialize_u64(*number)
    } else {
        serializer.serialize_str(&number.to_string())
    }
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Spelling {
        Number(u64),
        Text(String),
    }
    let unexpected = |what: &str| de::Error::custom(format!("{what} is no whole number as receipts spell it"));
    match Spelling::deserialize(deserializer)? {
        Spelling::Number(number) if number < EXACT_BELOW => Ok(number),
        Spelling::Number(number) => Err(unexpected(&number.to_string())),
        Spelling::Text(text) => match text.parse() {
            Ok(number) if number >= EXACT_BELOW && u64::to_string(&number) == text => Ok(number),
            _ => Err(unexpected(&text)),
        },
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Held(#[serde(with = "super")] u64);

    #[test]
    fn a_number_is_text_from_two_to_the_53_on_and_has_one_spelling() {
        for (number, text) in [
            (0, "0"),
            (9_007_199_254_740_991, "9007199254740991"),
            (9_007_199_254_740_992, "\"9007199254740992\""),
            (u64::MAX, "\"18446744073709551615\""),
        ] {
            assert_eq!(serde_json::to_string(&Held(number)).unwrap(), text);
            assert_eq!(serde_json::from_str::<Held>(text).unwrap(), Held(number));
        }
        for text in [
            "\"5\"",
            "9007199254740992",
            "\"09007199254740992\"",
            "\"+9007199254740992\"",
            "\"18446744073709551616\"",
            "-1",
            "1.5",
            "null",
        ] {
            assert!(serde_json::from_str::<Held>(text).is_err(), "{text}");
        }
    }
}
