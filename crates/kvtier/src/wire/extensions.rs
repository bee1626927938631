use kvtier_core::{Hints, Label};

use super::DecodeError;
use super::field::{Cursor, put_u32, put_u64};

const PROMPT_TOKENS: u16 = 1;
const LOCAL_PREFIX_TOKENS: u16 = 2;
const QUEUE_WAIT_US: u16 = 3;
const CAN_SPLIT: u16 = 4;
const LABEL: u16 = 5;
const SESSION: u16 = 6;
const RAW: u16 = 7;
const DEVICE: u16 = 8;
const KNOWN_MAX: u16 = DEVICE;

/// What follows a body: hints, and what a later version added.
///
/// Tags rise strictly, so that what is unknown is always a tail; it is kept as it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extensions<'a> {
    /// What the caller knows.
    pub hints: Hints,
    /// Of a lookup: what exists is asked, not what is worth fetching.
    pub raw: bool,
    /// Of a fetch: the device, by its UUID, whose memory the caller can read.
    pub device: Option<[u8; 16]>,
    unknown: &'a [u8],
}

impl From<Hints> for Extensions<'_> {
    fn from(hints: Hints) -> Self {
        Extensions {
            hints,
            raw: false,
            device: None,
            unknown: &[],
        }
    }
}

impl<'a> Extensions<'a> {
    /// Those of a lookup that asks what exists.
    #[must_use]
    pub fn raw(hints: Hints) -> Self {
        Extensions {
            raw: true,
            ..Extensions::from(hints)
        }
    }

    /// Those of a fetch by who can read the memory of a device.
    #[must_use]
    pub fn on_device(hints: Hints, device: [u8; 16]) -> Self {
        Extensions {
            device: Some(device),
            ..Extensions::from(hints)
        }
    }

    /// The encoded extensions of a later version, as they came.
    #[must_use]
    pub fn unknown(&self) -> &'a [u8] {
        self.unknown
    }

    pub(super) fn decode(bytes: &'a [u8]) -> Result<Extensions<'a>, DecodeError> {
        let mut extensions = Extensions::default();
        let mut last = 0;
        let mut cursor = Cursor(bytes);
        while !cursor.0.is_empty() {
            let start = cursor.0;
            let tag = cursor.u16("extension")?;
            let length = cursor.u16("extension")?;
            let value = cursor.take(length.into(), "extension")?;
            if tag <= last {
                return Err(DecodeError::BadExtension { tag });
            }
            if tag > KNOWN_MAX && last <= KNOWN_MAX {
                extensions.unknown = start;
            }
            last = tag;
            let wrong = DecodeError::BadExtension { tag };
            #[cfg(feature = "mutants")]
            let value = if super::fuzz::planted::is_on() && tag == SESSION {
                value.get(..8).unwrap_or(value)
            } else {
                value
            };
            let hints = &mut extensions.hints;
            match tag {
                PROMPT_TOKENS => hints.prompt_tokens = Some(u32::from_le_bytes(value.try_into().map_err(|_| wrong)?)),
                LOCAL_PREFIX_TOKENS => {
                    hints.local_prefix_tokens = Some(u32::from_le_bytes(value.try_into().map_err(|_| wrong)?));
                }
                QUEUE_WAIT_US => hints.queue_wait_us = Some(u64::from_le_bytes(value.try_into().map_err(|_| wrong)?)),
                CAN_SPLIT if value.is_empty() => hints.can_split = true,
                CAN_SPLIT => return Err(wrong),
                LABEL => hints.label = Some(Label(u64::from_le_bytes(value.try_into().map_err(|_| wrong)?))),
                SESSION => hints.session = Some(u64::from_le_bytes(value.try_into().map_err(|_| wrong)?)),
                RAW if value.is_empty() => extensions.raw = true,
                RAW => return Err(wrong),
                DEVICE => extensions.device = Some(value.try_into().map_err(|_| wrong)?),
                _ => {}
            }
        }
        Ok(extensions)
    }

    pub(super) fn encode(&self, target: &mut Vec<u8>) {
        fn head(tag: u16, length: u16, target: &mut Vec<u8>) {
            target.extend_from_slice(&tag.to_le_bytes());
            target.extend_from_slice(&length.to_le_bytes());
        }
        let hints = &self.hints;
        for (tag, value) in [
            (PROMPT_TOKENS, hints.prompt_tokens),
            (LOCAL_PREFIX_TOKENS, hints.local_prefix_tokens),
        ] {
            if let Some(value) = value {
                head(tag, 4, target);
                put_u32(value, target);
            }
        }
        if let Some(value) = hints.queue_wait_us {
            head(QUEUE_WAIT_US, 8, target);
            put_u64(value, target);
        }
        if hints.can_split {
            head(CAN_SPLIT, 0, target);
        }
        let label = hints.label.map(|Label(label)| label);
        for (tag, value) in [(LABEL, label), (SESSION, hints.session)] {
            if let Some(value) = value {
                head(tag, 8, target);
                put_u64(value, target);
            }
        }
        if self.raw {
            head(RAW, 0, target);
        }
        if let Some(device) = &self.device {
            head(DEVICE, 16, target);
            target.extend_from_slice(device);
        }
        target.extend_from_slice(self.unknown);
    }
}
