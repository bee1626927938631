//! What callers pass, as the library takes it.

use std::time::Duration;

use kvtier::client::{FetchScope, Lineage};
use kvtier::{BlockHash, Hints, Label, Parent, Realization};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};

use crate::error::Invalid;

/// A key: 16 bytes.
pub(crate) fn hash_of(key: &Bound<'_, PyAny>) -> PyResult<BlockHash> {
    let Ok(key) = key.cast::<PyBytes>() else {
        return Err(PyTypeError::new_err(format!("a key is bytes, not {}", key.get_type())));
    };
    let bytes = key.as_bytes();
    let hash = bytes
        .try_into()
        .map_err(|_| Invalid::new_err(format!("a key has 16 bytes, not {}", bytes.len())))?;
    Ok(BlockHash(hash))
}

pub(crate) fn hashes_of(keys: &Bound<'_, PyAny>) -> PyResult<Vec<BlockHash>> {
    keys.try_iter()?.map(|key| hash_of(&key?)).collect()
}

/// "root", "unknown" or the key of the block before.
pub(crate) fn parent_of(parent: &Bound<'_, PyAny>) -> PyResult<Parent> {
    let Ok(word) = parent.cast::<PyString>() else {
        return hash_of(parent).map(Parent::Block);
    };
    match word.to_str()? {
        "root" => Ok(Parent::Root),
        "unknown" => Ok(Parent::Unknown),
        other => Err(Invalid::new_err(format!(
            "a parent is \"root\", \"unknown\" or a key, not {other:?}"
        ))),
    }
}

/// As for one block, or "independent".
pub(crate) fn lineage_of(parent: &Bound<'_, PyAny>) -> PyResult<Lineage> {
    match parent.cast::<PyString>() {
        Ok(word) if word.to_str()? == "independent" => Ok(Lineage::Independent),
        _ => parent_of(parent).map(Lineage::Chain),
    }
}

/// The hints of a put that is part of something.
pub(crate) fn hints_of(label: Option<&str>) -> Hints {
    Hints {
        label: label.map(Label::of),
        ..Hints::default()
    }
}

/// 32 bytes, or a dict of strings to digest in its order.
pub(crate) fn realization_of(realization: &Bound<'_, PyAny>) -> PyResult<Realization> {
    if let Ok(digest) = realization.cast::<PyBytes>() {
        let bytes = digest.as_bytes();
        let digest = bytes
            .try_into()
            .map_err(|_| Invalid::new_err(format!("a realization has 32 bytes, not {}", bytes.len())))?;
        return Ok(Realization(digest));
    }
    let Ok(fields) = realization.cast::<PyDict>() else {
        let message = format!(
            "a realization is bytes or a dict of strings, not {}",
            realization.get_type()
        );
        return Err(PyTypeError::new_err(message));
    };
    let fields = fields
        .iter()
        .map(|(name, value)| Ok((name.extract::<String>()?, value.extract::<String>()?)));
    let fields = fields.collect::<PyResult<Vec<(String, String)>>>()?;
    let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (&**name, &**value)).collect();
    Ok(Realization::digest(&fields))
}

pub(crate) fn scope_of(prefix: bool) -> FetchScope {
    if prefix { FetchScope::Prefix } else { FetchScope::Each }
}

pub(crate) fn seconds(name: &str, seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|error| Invalid::new_err(format!("{name}: {error}")))
}
