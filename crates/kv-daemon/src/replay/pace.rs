use std::time::Duration;

/// How fast a trace is sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Pace {
    /// As fast as it goes.
    Max,
    /// At this multiple of its own pace.
    Factor(f64),
}

impl Pace {
    pub(super) fn parse(text: &str) -> Result<Pace, String> {
        if text == "max" {
            return Ok(Pace::Max);
        }
        match text.trim_end_matches('x').parse::<f64>() {
            Ok(factor) if factor > 0.0 && factor.is_finite() => Ok(Pace::Factor(factor)),
            _ => Err("write max, or a factor such as 1 or 60".to_string()),
        }
    }

    /// When a request that arrived this long after the first is due, after the start; `None`: at once.
    pub(super) fn due(self, arrival: Duration) -> Option<Duration> {
        match self {
            Pace::Max => None,
            Pace::Factor(factor) => Duration::try_from_secs_f64(arrival.as_secs_f64() / factor).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_factor_compresses_time() {
        assert_eq!(Pace::parse("max"), Ok(Pace::Max));
        assert_eq!(Pace::parse("60x"), Ok(Pace::Factor(60.0)));
        assert_eq!(
            Pace::Factor(60.0).due(Duration::from_secs(120)),
            Some(Duration::from_secs(2))
        );
        for text in ["0", "-1", "inf", "fast"] {
            assert!(Pace::parse(text).is_err(), "{text}");
        }
    }
}
