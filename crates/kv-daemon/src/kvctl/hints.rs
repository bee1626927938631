//! What a request tells the node about itself, for the cost model to reckon with.

use clap::Args;
use kvtier::Hints;

#[derive(Clone, Debug, Args)]
pub(super) struct HintOptions {
    /// Tokens of the whole prompt [default: those of the keys named]
    #[arg(long, value_name = "N", help_heading = "Hints")]
    prompt_tokens: Option<u32>,
    /// How long the request waits for a GPU anyway, microseconds
    #[arg(long, value_name = "W", help_heading = "Hints")]
    queue_wait_us: Option<u64>,
    /// Tokens of its prefix that the engine has already
    #[arg(long, value_name = "N", help_heading = "Hints")]
    local_prefix_tokens: Option<u32>,
}

impl From<&HintOptions> for Hints {
    fn from(options: &HintOptions) -> Hints {
        Hints {
            prompt_tokens: options.prompt_tokens,
            queue_wait_us: options.queue_wait_us,
            local_prefix_tokens: options.local_prefix_tokens,
            ..Hints::default()
        }
    }
}
