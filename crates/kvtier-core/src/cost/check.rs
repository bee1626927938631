use super::{BackendProfile, GateSettings};
use crate::SettingsError;

/// No time of a gate is longer than this, seconds.
const SECONDS_MAX: f64 = 86_400.0;

type Checked = Result<(), SettingsError>;

fn within(field: &'static str, value: f64, least: f64, most: f64) -> Checked {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(SettingsError {
        field,
        value: value.to_string(),
        remedy: format!("give {least} to {most}"),
    })
}

/// Refuses a profile with which nothing could be predicted.
pub(super) fn check_profile(profile: &BackendProfile) -> Checked {
    within("lookup_s", profile.lookup_s, 0.0, SECONDS_MAX)?;
    within("bytes_per_s", profile.bytes_per_s, 1.0, 1e15)?;
    within("stored_ratio", profile.stored_ratio, 1e-3, 2.0)?;
    within(
        "decompress_bytes_per_s",
        profile.decompress_bytes_per_s,
        1.0,
        f64::INFINITY,
    )?;
    within("operation_s", profile.operation_s, 0.0, SECONDS_MAX)
}

/// Refuses a gate that could never turn, or never rest.
pub(super) fn check_gate(gate: &GateSettings) -> Checked {
    within("enable_value", gate.enable_value, 0.0, 1.0)?;
    within("disable_value", gate.disable_value, -1.0, gate.enable_value)?;
    within("enable_dwell_s", gate.enable_dwell_s, 0.0, SECONDS_MAX)?;
    within("disable_dwell_s", gate.disable_dwell_s, 0.0, SECONDS_MAX)?;
    within("estimate_age_max_s", gate.estimate_age_max_s, 0.0, SECONDS_MAX)?;
    within("value_weight", gate.value_weight, 1e-6, 1.0)?;
    within("failure_probability_max", gate.failure_probability_max, 0.0, 1.0)?;
    within(
        "failure_probability_max_harmless",
        gate.failure_probability_max_harmless,
        0.0,
        1.0,
    )?;
    within("break_s", gate.break_s, 1e-3, gate.break_max_s)?;
    within("break_max_s", gate.break_max_s, 1e-3, SECONDS_MAX)?;
    within("probe_interval_s", gate.probe_interval_s, 1e-3, SECONDS_MAX)?;
    within("probe_share_max", gate.probe_share_max, 0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use crate::cost::{BackendProfile, CostModel, GateSettings, RecomputeCoefficients};

    fn refused(profile: BackendProfile, gate: GateSettings) -> Option<&'static str> {
        let mut model = CostModel::new(RecomputeCoefficients::default());
        model.add_backend(profile, gate).err().map(|error| error.field)
    }

    #[test]
    fn a_backend_with_which_nothing_could_be_decided_is_refused_by_its_field() {
        let (profile, gate) = (BackendProfile::default(), GateSettings::default());
        assert_eq!(refused(profile, gate), None);
        let with = |change: fn(&mut BackendProfile)| {
            let mut profile = profile;
            change(&mut profile);
            refused(profile, gate)
        };
        assert_eq!(with(|profile| profile.bytes_per_s = 0.0), Some("bytes_per_s"));
        assert_eq!(with(|profile| profile.lookup_s = f64::NAN), Some("lookup_s"));
        assert_eq!(with(|profile| profile.stored_ratio = -1.0), Some("stored_ratio"));
        let with = |change: fn(&mut GateSettings)| {
            let mut gate = gate;
            change(&mut gate);
            refused(profile, gate)
        };
        assert_eq!(with(|gate| gate.disable_value = 0.5), Some("disable_value"));
        assert_eq!(with(|gate| gate.probe_interval_s = -1.0), Some("probe_interval_s"));
        assert_eq!(with(|gate| gate.break_s = f64::INFINITY), Some("break_s"));
        assert_eq!(with(|gate| gate.value_weight = f64::NAN), Some("value_weight"));
    }
}
