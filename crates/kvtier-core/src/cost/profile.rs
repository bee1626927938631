use super::RecomputeCoefficients;

/// What a model costs to read a prompt with. `docs/cost-profiles.md` names the source of every preset.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelProfile {
    /// How settings name it.
    pub name: &'static str,
    /// Parameters that one token meets (of a mixture of experts the active ones).
    pub active_parameters: f64,
    /// Layers.
    pub layers: u32,
    /// Attention heads times the width of a head: not always the model's hidden size.
    pub attention_width: u32,
    /// Keys and values of one token in all layers, at two bytes a number, bytes.
    pub kv_bytes_per_token: u64,
}

const fn model(
    name: &'static str,
    active_parameters: f64,
    layers: u32,
    attention_width: u32,
    kv_bytes_per_token: u64,
) -> ModelProfile {
    ModelProfile {
        name,
        active_parameters,
        layers,
        attention_width,
        kv_bytes_per_token,
    }
}

/// Keys and values of grouped-query attention: two tensors of two-byte numbers in each layer.
const fn grouped(layers: u64, kv_heads: u64, head_width: u64) -> u64 {
    2 * layers * kv_heads * head_width * 2
}

impl ModelProfile {
    /// Common models.
    pub const PRESETS: [ModelProfile; 11] = [
        model("llama-3.1-8b", 8.03e9, 32, 4096, grouped(32, 8, 128)),
        model("llama-3.3-70b", 70.55e9, 80, 8192, grouped(80, 8, 128)),
        model("llama-3.1-405b", 405.85e9, 126, 16384, grouped(126, 8, 128)),
        model("qwen2.5-7b", 7.62e9, 28, 3584, grouped(28, 4, 128)),
        model("qwen2.5-72b", 72.71e9, 80, 8192, grouped(80, 8, 128)),
        model("qwen3-8b", 8.19e9, 36, 4096, grouped(36, 8, 128)),
        model("qwen3-32b", 32.76e9, 64, 8192, grouped(64, 8, 128)),
        model("qwen3-30b-a3b", 3.3e9, 48, 4096, grouped(48, 4, 128)),
        model("mistral-7b-v0.3", 7.25e9, 32, 4096, grouped(32, 8, 128)),
        model("mixtral-8x7b", 12.9e9, 32, 4096, grouped(32, 8, 128)),
        // Multi-head latent attention: a latent of 512 and a rotary key of 64 are all that a layer keeps of a token.
        model("deepseek-v3", 37e9, 61, 20480, 61 * (512 + 64) * 2),
    ];

    /// The preset of that name.
    #[must_use]
    pub fn preset(name: &str) -> Option<ModelProfile> {
        ModelProfile::PRESETS.into_iter().find(|preset| preset.name == name)
    }
}

/// What a GPU computes. `docs/cost-profiles.md` names the source of every preset.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuProfile {
    /// How settings name it.
    pub name: &'static str,
    /// Dense bf16 peak, floating-point operations a second.
    pub peak_flops_per_s: f64,
}

const fn gpu(name: &'static str, peak_flops_per_s: f64) -> GpuProfile {
    GpuProfile { name, peak_flops_per_s }
}

impl GpuProfile {
    /// Common GPUs.
    pub const PRESETS: [GpuProfile; 7] = [
        gpu("a100", 312e12),
        gpu("l40s", 362e12),
        gpu("h20", 148e12),
        gpu("h100-pcie", 756e12),
        gpu("h100", 989e12),
        gpu("h200", 989e12),
        gpu("b200", 2250e12),
    ];

    /// The preset of that name.
    #[must_use]
    pub fn preset(name: &str) -> Option<GpuProfile> {
        GpuProfile::PRESETS.into_iter().find(|preset| preset.name == name)
    }
}

/// A model on its GPUs: where the coefficients of a recomputation come from before anything was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ComputeProfile {
    /// Which model.
    pub model: ModelProfile,
    /// On which GPUs.
    pub gpu: GpuProfile,
    /// How many of them share a prompt.
    pub gpus: u32,
    /// Share of the peak that a prefill reaches, 0 to 1: 0.5 where nobody knows better.
    pub utilization: f64,
    /// What any prefill costs beside its tokens, seconds: scheduling, launches, sampling. 0.01 where nobody knows better.
    pub overhead_s: f64,
}

impl ComputeProfile {
    /// `c0`, `a = 2P/(G·peak·u)` and `b = 4·L·H/(G·peak·u)`.
    #[must_use]
    pub fn coefficients(&self) -> RecomputeCoefficients {
        let flops_per_s = f64::from(self.gpus.max(1)) * self.gpu.peak_flops_per_s * self.utilization.clamp(0.01, 1.0);
        RecomputeCoefficients {
            overhead_s: self.overhead_s.max(0.0),
            s_per_token: 2.0 * self.model.active_parameters / flops_per_s,
            s_per_pair: 4.0 * f64::from(self.model.layers) * f64::from(self.model.attention_width) / flops_per_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ComputeProfile, GpuProfile, ModelProfile};

    fn coefficients(model: &str, gpus: u32) -> super::RecomputeCoefficients {
        ComputeProfile {
            model: ModelProfile::preset(model).unwrap(),
            gpu: GpuProfile::preset("h100").unwrap(),
            gpus,
            utilization: 0.5,
            overhead_s: 0.01,
        }
        .coefficients()
    }

    #[test]
    fn a_70b_model_on_four_h100_takes_70_microseconds_a_token_and_1_3_nanoseconds_a_pair() {
        let large = coefficients("llama-3.3-70b", 4);
        assert!((large.s_per_token * 1e6 - 71.3).abs() < 0.5, "{large:?}");
        assert!((large.s_per_pair * 1e9 - 1.33).abs() < 0.02, "{large:?}");
        let small = coefficients("llama-3.1-8b", 1);
        assert!((small.s_per_token * 1e6 - 32.5).abs() < 0.5, "{small:?}");
        assert!((small.s_per_pair * 1e9 - 1.06).abs() < 0.05, "{small:?}");
    }

    #[test]
    fn presets_have_distinct_names_and_the_kv_bytes_that_their_engines_allocate() {
        let bytes = |name| ModelProfile::preset(name).unwrap().kv_bytes_per_token;
        assert_eq!(bytes("llama-3.1-8b"), 128 << 10);
        assert_eq!(bytes("llama-3.3-70b"), 320 << 10);
        assert_eq!(bytes("qwen2.5-7b"), 56 << 10);
        assert_eq!(bytes("deepseek-v3"), 70_272);
        for (index, preset) in ModelProfile::PRESETS.iter().enumerate() {
            assert!(
                ModelProfile::PRESETS[..index]
                    .iter()
                    .all(|other| other.name != preset.name)
            );
        }
        assert!(ModelProfile::preset("nobody").is_none());
    }
}
