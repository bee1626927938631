use kvtier_core::cost::{ComputeProfile, GpuProfile, ModelProfile, RecomputeCoefficients};
use serde::Deserialize;

use super::GateError;

/// A model on its GPUs, as a gate needs it.
///
/// A preset is `MODEL/GPU` or `MODEL/NxGPU`, such as `llama-3.3-70b/4xh100`. A file says the same, and what was measured:
///
/// ```toml
/// model = "llama-3.3-70b"          # or: parameters, layers, attention_width and kv_bytes_per_token
/// gpu = "h100"                     # or: peak_tflops
/// gpus = 4
/// utilization = 0.5
/// overhead_ms = 10
/// kv_bytes_per_token = 163840      # fp8: half of the preset's
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct GateProfile {
    /// How a report names it.
    pub name: String,
    /// GPUs that share a prompt.
    pub gpus: u32,
    /// Keys and values of one token, bytes.
    pub kv_bytes_per_token: u64,
    /// What a prefill takes.
    pub coefficients: RecomputeCoefficients,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: Option<String>,
    model: Option<String>,
    gpu: Option<String>,
    #[serde(default = "one")]
    gpus: u32,
    #[serde(default = "half")]
    utilization: f64,
    #[serde(default = "overhead_ms")]
    overhead_ms: f64,
    parameters: Option<f64>,
    layers: Option<u32>,
    attention_width: Option<u32>,
    kv_bytes_per_token: Option<u64>,
    peak_tflops: Option<f64>,
}

fn one() -> u32 {
    1
}

fn half() -> f64 {
    0.5
}

fn overhead_ms() -> f64 {
    10.0
}

impl GateProfile {
    /// The preset of that name; `None` where the text is none.
    #[must_use]
    pub fn preset(text: &str) -> Option<GateProfile> {
        let (model, gpus) = text.split_once('/')?;
        let (count, gpu) = match gpus.split_once('x') {
            Some((count, gpu)) if count.parse::<u32>().is_ok() => (count.parse().ok()?, gpu),
            _ => (1, gpus),
        };
        let model = ModelProfile::preset(model)?;
        let gpu = GpuProfile::preset(gpu)?;
        (1..=1024)
            .contains(&count)
            .then(|| of(text, model, gpu, count, half(), overhead_ms()))
    }

    /// The names that presets are made of, in words.
    #[must_use]
    pub fn presets() -> String {
        let models: Vec<&str> = ModelProfile::PRESETS.iter().map(|preset| preset.name).collect();
        let gpus: Vec<&str> = GpuProfile::PRESETS.iter().map(|preset| preset.name).collect();
        format!(
            "MODEL/GPU or MODEL/NxGPU with a model of {} and a GPU of {}",
            models.join(", "),
            gpus.join(", ")
        )
    }

    /// The profile of a TOML file.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<GateProfile, GateError> {
        let file: File = toml::from_str(text).map_err(|error| GateError(error.to_string()))?;
        let wrong = |words: String| Err(GateError(words));
        let known = match &file.model {
            Some(name) => match ModelProfile::preset(name) {
                Some(model) => Some(model),
                None => return wrong(format!("model = {name:?}: no preset of that name")),
            },
            None => None,
        };
        let known = known.as_ref();
        let model = ModelProfile {
            name: "",
            active_parameters: required(
                "parameters",
                file.parameters.or(known.map(|model| model.active_parameters)),
            )?,
            layers: required("layers", file.layers.or(known.map(|model| model.layers)))?,
            attention_width: required(
                "attention_width",
                file.attention_width.or(known.map(|model| model.attention_width)),
            )?,
            kv_bytes_per_token: required(
                "kv_bytes_per_token",
                file.kv_bytes_per_token.or(known.map(|model| model.kv_bytes_per_token)),
            )?,
        };
        let gpu = match (&file.gpu, file.peak_tflops) {
            (Some(name), None) => match GpuProfile::preset(name) {
                Some(gpu) => gpu,
                None => return wrong(format!("gpu = {name:?}: no preset of that name")),
            },
            (_, Some(tflops)) => GpuProfile {
                name: "",
                peak_flops_per_s: tflops * 1e12,
            },
            (None, None) => return wrong("gpu is missing: name a preset, or give peak_tflops".to_string()),
        };
        for (name, value, least, most) in [
            ("parameters", model.active_parameters, 1e6, 1e14),
            ("layers", f64::from(model.layers), 1.0, 1e4),
            ("attention_width", f64::from(model.attention_width), 1.0, 1e7),
            ("kv_bytes_per_token", model.kv_bytes_per_token as f64, 1.0, 1e8),
            ("peak_tflops", gpu.peak_flops_per_s / 1e12, 0.01, 1e6),
            ("gpus", f64::from(file.gpus), 1.0, 1024.0),
            ("utilization", file.utilization, 0.01, 1.0),
            ("overhead_ms", file.overhead_ms, 0.0, 1e5),
        ] {
            if !(least..=most).contains(&value) {
                return wrong(format!("{name} = {value}: give {least} to {most}"));
            }
        }
        let name = file.name.clone().unwrap_or_else(|| {
            let model = file.model.as_deref().unwrap_or("a model");
            let gpu = file.gpu.as_deref().unwrap_or("GPUs");
            format!("{model}/{}x{gpu}", file.gpus)
        });
        Ok(of(&name, model, gpu, file.gpus, file.utilization, file.overhead_ms))
    }
}

fn required<T>(name: &str, value: Option<T>) -> Result<T, GateError> {
    value.ok_or_else(|| GateError(format!("{name} is missing: give it, or name a preset as model")))
}

fn of(name: &str, model: ModelProfile, gpu: GpuProfile, gpus: u32, utilization: f64, overhead_ms: f64) -> GateProfile {
    GateProfile {
        name: name.to_string(),
        gpus,
        kv_bytes_per_token: model.kv_bytes_per_token,
        coefficients: ComputeProfile {
            model,
            gpu,
            gpus,
            utilization,
            overhead_s: overhead_ms * 1e-3,
        }
        .coefficients(),
    }
}

#[cfg(test)]
mod tests {
    use super::GateProfile;

    #[test]
    fn a_preset_names_a_model_and_its_gpus() {
        let large = GateProfile::preset("llama-3.3-70b/4xh100").expect("a preset");
        assert_eq!((large.gpus, large.kv_bytes_per_token), (4, 327_680));
        assert!((large.coefficients.s_per_token * 1e6 - 71.3).abs() < 0.5);
        assert_eq!(GateProfile::preset("llama-3.1-8b/h100").expect("a preset").gpus, 1);
        for text in [
            "llama-3.1-8b",
            "llama-3.1-8b/0xh100",
            "nobody/h100",
            "llama-3.1-8b/axh100",
            "",
        ] {
            assert_eq!(GateProfile::preset(text), None, "{text}");
        }
    }

    #[test]
    fn a_file_says_what_a_preset_says_and_may_say_otherwise() {
        let text = "model = \"llama-3.3-70b\"\ngpu = \"h100\"\ngpus = 4\n";
        let mut same = GateProfile::parse(text).expect("a profile");
        same.name = "llama-3.3-70b/4xh100".to_string();
        assert_eq!(Some(same), GateProfile::preset("llama-3.3-70b/4xh100"));
        let halved = GateProfile::parse(&format!("{text}kv_bytes_per_token = 163840\n")).expect("a profile");
        assert_eq!(halved.kv_bytes_per_token, 163_840);
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (text, word) in [
            ("model = \"nobody\"\ngpu = \"h100\"", "nobody"),
            ("model = \"qwen3-8b\"", "peak_tflops"),
            ("gpu = \"h100\"", "parameters is missing"),
            (
                "model = \"qwen3-8b\"\ngpu = \"h100\"\nutilization = 2",
                "utilization = 2",
            ),
            ("model = \"qwen3-8b\"\ngpu = \"h100\"\nutilisation = 0.5", "utilisation"),
        ] {
            let error = GateProfile::parse(text).expect_err("cannot be");
            assert!(error.0.contains(word), "{error}");
        }
    }
}
