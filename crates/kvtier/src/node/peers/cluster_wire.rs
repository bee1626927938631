//! The messages of [`kvtier_core::cluster`] as bytes. Little-endian.
//!
//! ```text
//! message = kind u8, fields
//! 1 Renew   incarnation u64, round u64, known u8 (0, 1), incarnation u64, version u64
//! 2 Grant   to u64, round u64, incarnation u64, version u64, complete u8, array(text name, generation u64)
//! 3 Ask     incarnation u64, operation u64, text name
//! 4 Told    to u64, operation u64, generation u64
//! 5 Store   incarnation u64, operation u64, text name, generation u64
//! 6 Stored  to u64, operation u64, generation u64
//! ```

use kvtier_core::cluster::{Incarnation, Known, Message, Round, Version};
use kvtier_core::{Generation, OperationId};

use crate::wire::DecodeError;
use crate::wire::field::{Cursor, put_u32, put_u64};

/// Longest name of a counter, bytes.
pub(super) const NAME_BYTES_MAX: usize = 1024;

pub(super) fn encode(message: &Message) -> Vec<u8> {
    let mut target = Vec::with_capacity(64);
    match message {
        Message::Renew {
            incarnation,
            round,
            known,
        } => {
            target.push(1);
            put_u64(incarnation.0, &mut target);
            put_u64(round.0, &mut target);
            target.push(u8::from(known.is_some()));
            put_known(&known.unwrap_or_default(), &mut target);
        }
        Message::Grant {
            to,
            round,
            known,
            complete,
            raised,
        } => {
            target.push(2);
            put_u64(to.0, &mut target);
            put_u64(round.0, &mut target);
            put_known(known, &mut target);
            target.push(u8::from(*complete));
            put_u32(u32::try_from(raised.len()).unwrap_or(u32::MAX), &mut target);
            for (name, generation) in raised {
                put_name(name, &mut target);
                put_u64(generation.0, &mut target);
            }
        }
        Message::Ask {
            incarnation,
            operation,
            name,
        } => {
            target.push(3);
            put_u64(incarnation.0, &mut target);
            put_u64(operation.0, &mut target);
            put_name(name, &mut target);
        }
        Message::Told {
            to,
            operation,
            generation,
        } => put_numbers(4, [to.0, operation.0, generation.0], &mut target),
        Message::Store {
            incarnation,
            operation,
            name,
            generation,
        } => {
            target.push(5);
            put_u64(incarnation.0, &mut target);
            put_u64(operation.0, &mut target);
            put_name(name, &mut target);
            put_u64(generation.0, &mut target);
        }
        Message::Stored {
            to,
            operation,
            generation,
        } => put_numbers(6, [to.0, operation.0, generation.0], &mut target),
    }
    target
}

pub(super) fn decode(bytes: &[u8]) -> Result<Message, DecodeError> {
    let mut cursor = Cursor(bytes);
    let message = match cursor.u8("kind")? {
        1 => {
            let incarnation = Incarnation(cursor.u64("incarnation")?);
            let round = Round(cursor.u64("round")?);
            let is_known = flag(&mut cursor, "known")?;
            let known = known(&mut cursor)?;
            Message::Renew {
                incarnation,
                round,
                known: is_known.then_some(known),
            }
        }
        2 => Message::Grant {
            to: Incarnation(cursor.u64("incarnation")?),
            round: Round(cursor.u64("round")?),
            known: known(&mut cursor)?,
            complete: flag(&mut cursor, "complete")?,
            raised: (0..cursor.count("names")?)
                .map(|_| Ok((name(&mut cursor)?.into(), Generation(cursor.u64("generation")?))))
                .collect::<Result<_, DecodeError>>()?,
        },
        3 => Message::Ask {
            incarnation: Incarnation(cursor.u64("incarnation")?),
            operation: OperationId(cursor.u64("operation")?),
            name: name(&mut cursor)?.into(),
        },
        4 => Message::Told {
            to: Incarnation(cursor.u64("incarnation")?),
            operation: OperationId(cursor.u64("operation")?),
            generation: Generation(cursor.u64("generation")?),
        },
        5 => Message::Store {
            incarnation: Incarnation(cursor.u64("incarnation")?),
            operation: OperationId(cursor.u64("operation")?),
            name: name(&mut cursor)?.into(),
            generation: Generation(cursor.u64("generation")?),
        },
        6 => Message::Stored {
            to: Incarnation(cursor.u64("incarnation")?),
            operation: OperationId(cursor.u64("operation")?),
            generation: Generation(cursor.u64("generation")?),
        },
        code => {
            return Err(DecodeError::UnknownCode {
                field: "kind",
                code: code.into(),
            });
        }
    };
    if cursor.0.is_empty() {
        Ok(message)
    } else {
        Err(DecodeError::NotZero {
            field: "bytes behind the message",
        })
    }
}

fn put_numbers(kind: u8, numbers: [u64; 3], target: &mut Vec<u8>) {
    target.push(kind);
    for number in numbers {
        put_u64(number, target);
    }
}

fn put_known(known: &Known, target: &mut Vec<u8>) {
    put_u64(known.incarnation.0, target);
    put_u64(known.version.0, target);
}

fn known(cursor: &mut Cursor<'_>) -> Result<Known, DecodeError> {
    Ok(Known {
        incarnation: Incarnation(cursor.u64("known")?),
        version: Version(cursor.u64("known")?),
    })
}

fn flag(cursor: &mut Cursor<'_>, field: &'static str) -> Result<bool, DecodeError> {
    match cursor.u8(field)? {
        0 => Ok(false),
        1 => Ok(true),
        code => Err(DecodeError::UnknownCode {
            field,
            code: code.into(),
        }),
    }
}

/// Names longer than [`NAME_BYTES_MAX`] are refused where they arise.
fn put_name(name: &str, target: &mut Vec<u8>) {
    put_u32(u32::try_from(name.len()).unwrap_or(u32::MAX), target);
    target.extend(name.as_bytes());
}

fn name<'a>(cursor: &mut Cursor<'a>) -> Result<&'a str, DecodeError> {
    cursor.text("name", 1, NAME_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Message> {
        let known = Known {
            incarnation: Incarnation(8),
            version: Version(9),
        };
        let (incarnation, operation, generation) = (Incarnation(1), OperationId(2), Generation(3));
        vec![
            Message::Renew {
                incarnation,
                round: Round(4),
                known: None,
            },
            Message::Renew {
                incarnation,
                round: Round(4),
                known: Some(known),
            },
            Message::Grant {
                to: incarnation,
                round: Round(4),
                known,
                complete: true,
                raised: vec![("a/b@c".into(), generation), ("a/d@c".into(), Generation(u64::MAX))],
            },
            Message::Ask {
                incarnation,
                operation,
                name: "a/b@c".into(),
            },
            Message::Told {
                to: incarnation,
                operation,
                generation,
            },
            Message::Store {
                incarnation,
                operation,
                name: "a/b@c".into(),
                generation,
            },
            Message::Stored {
                to: incarnation,
                operation,
                generation,
            },
        ]
    }

    #[test]
    fn every_message_comes_back_and_none_that_is_cut_does() {
        for message in all() {
            let bytes = encode(&message);
            // A message of no round knows nothing of the other.
            assert_eq!(decode(&bytes), Ok(message.clone()));
            for cut in 0..bytes.len() {
                assert!(decode(&bytes[..cut]).is_err(), "{message:?} cut at {cut}");
            }
            for at in 0..bytes.len() {
                let mut altered = bytes.clone();
                altered[at] ^= 0xff;
                // Understood or not, without a panic.
                let _ = decode(&altered);
            }
        }
    }
}
