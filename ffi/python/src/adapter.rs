#![expect(
    unsafe_code,
    reason = "takes LMCache's word for where its pages are: addresses and lengths of memory that it owns"
)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use kvtier::adapter::{Adapter, AdapterSettings, Notice, ObjectKey};
use kvtier::client::ForeignSlice;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};

/// `kvtier::adapter::Adapter` for `kvtier.lmcache`, which documents it.
#[pyclass(frozen, module = "kvtier._kvtier")]
pub(crate) struct LmcacheAdapter {
    adapter: Adapter,
}

#[pymethods]
impl LmcacheAdapter {
    #[new]
    fn new(py: Python<'_>, adapter_params: &str) -> PyResult<LmcacheAdapter> {
        let mut settings =
            AdapterSettings::from_json(adapter_params).map_err(|error| PyValueError::new_err(error.to_string()))?;
        settings.notices = true;
        let adapter = py.detach(|| Adapter::start(settings));
        Ok(LmcacheAdapter {
            adapter: adapter.map_err(|error| PyOSError::new_err(error.to_string()))?,
        })
    }

    fn store_fd(&self) -> i32 {
        self.adapter.store_fd()
    }

    fn lookup_fd(&self) -> i32 {
        self.adapter.lookup_fd()
    }

    fn load_fd(&self) -> i32 {
        self.adapter.load_fd()
    }

    fn submit_store(&self, keys: &Bound<'_, PyList>, objects: &Bound<'_, PyList>) -> PyResult<u64> {
        let (keys, pages) = (keys_of(keys)?, pages_of(objects)?);
        check_lengths(keys.len(), pages.len())?;
        Ok(self.adapter.submit_store(keys, pages))
    }

    fn completed_stores(&self) -> Vec<(u64, bool, u64)> {
        let completed = self.adapter.completed_stores().into_iter();
        completed
            .map(|(task, result)| (task, result.success, result.bytes))
            .collect()
    }

    /// `sizes`: bytes of an object by group, where LMCache says.
    #[expect(clippy::needless_pass_by_value, reason = "PyO3 extracts values")]
    fn submit_lookup(&self, keys: &Bound<'_, PyList>, sizes: Bound<'_, PyDict>) -> PyResult<u64> {
        let keys = keys_of(keys)?;
        let sizes: std::collections::HashMap<u32, u64> = sizes.extract()?;
        let bytes = keys.iter().map(|key| sizes.get(&key.group).copied()).collect();
        Ok(self.adapter.submit_lookup(keys, bytes))
    }

    fn lookup_result(&self, task: u64) -> Option<Vec<bool>> {
        self.adapter.lookup_result(task)
    }

    fn unlock(&self, keys: &Bound<'_, PyList>) -> PyResult<()> {
        self.adapter.unlock(&keys_of(keys)?);
        Ok(())
    }

    fn submit_load(&self, keys: &Bound<'_, PyList>, objects: &Bound<'_, PyList>) -> PyResult<u64> {
        let (keys, pages) = (keys_of(keys)?, pages_of(objects)?);
        check_lengths(keys.len(), pages.len())?;
        Ok(self.adapter.submit_load(keys, pages))
    }

    fn load_result(&self, task: u64) -> Option<Vec<bool>> {
        self.adapter.load_result(task)
    }

    /// Tasks that could not even be begun, completed as failures of `count` keys.
    fn fail_store(&self) -> u64 {
        self.adapter.fail_store()
    }

    fn fail_lookup(&self, count: usize) -> u64 {
        self.adapter.fail_lookup(count)
    }

    fn fail_load(&self, count: usize) -> u64 {
        self.adapter.fail_load(count)
    }

    fn delete(&self, py: Python<'_>, keys: &Bound<'_, PyList>) -> PyResult<Vec<(usize, u64)>> {
        let keys = keys_of(keys)?;
        Ok(py.detach(|| self.adapter.delete(keys)))
    }

    fn touch(&self, keys: &Bound<'_, PyList>) -> PyResult<()> {
        self.adapter.touch(keys_of(keys)?);
        Ok(())
    }

    /// Up to `count` keys behind `after` with their sizes, as tuples of LMCache's fields.
    #[pyo3(signature = (model, count, after))]
    fn list<'py>(
        &self,
        py: Python<'py>,
        model: Option<&str>,
        count: usize,
        after: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Vec<(Bound<'py, PyTuple>, u64)>> {
        let after = after.map(|key| key_of(key, &mut Interned::default())).transpose()?;
        let listed = self.adapter.list(model, count, after.as_ref()).into_iter();
        listed.map(|(key, bytes)| Ok((tuple_of(py, &key)?, bytes))).collect()
    }

    /// What listeners are to be told, within `wait_ms`; `None` once closed. See `kvtier.lmcache` for the tuples.
    fn take_notices<'py>(&self, py: Python<'py>, wait_ms: u64) -> PyResult<Option<Vec<Bound<'py, PyTuple>>>> {
        let notices = py.detach(|| self.adapter.take_notices(Duration::from_millis(wait_ms)));
        let Some(notices) = notices else { return Ok(None) };
        let notices = notices.into_iter().map(|notice| notice_of(py, notice));
        notices.collect::<PyResult<Vec<_>>>().map(Some)
    }

    fn publish(&self, task: u64) {
        self.adapter.publish(task);
    }

    fn expect_purger(&self, processor: &str) {
        self.adapter.expect_purger(processor);
    }

    fn purged(&self, namespace: &str, generation: u64) {
        self.adapter.purged(namespace, generation);
    }

    fn refuse_stores(&self, keys: &Bound<'_, PyList>) -> PyResult<()> {
        self.adapter.refuse_stores(keys_of(keys)?);
        Ok(())
    }

    fn namespace_of(&self, salt: &str) -> String {
        self.adapter.namespace_of(salt)
    }

    fn is_healthy(&self) -> bool {
        self.adapter.is_healthy()
    }

    fn report(&self) -> String {
        self.adapter.report().to_string()
    }

    fn capacity_bytes(&self) -> u64 {
        self.adapter.capacity_bytes()
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.adapter.close());
    }
}

fn check_lengths(keys: usize, objects: usize) -> PyResult<()> {
    if keys == objects {
        Ok(())
    } else {
        Err(PyValueError::new_err(format!("{objects} objects for {keys} keys")))
    }
}

/// The model and salt of the key before: most keys of a task have the same.
#[derive(Default)]
struct Interned {
    salt: Option<Arc<str>>,
    model: Option<Arc<str>>,
}

fn intern_str(text: &str, slot: &mut Option<Arc<str>>) -> Arc<str> {
    match slot {
        Some(known) if &**known == text => Arc::clone(known),
        _ => {
            let fresh: Arc<str> = text.into();
            *slot = Some(Arc::clone(&fresh));
            fresh
        }
    }
}

fn keys_of(keys: &Bound<'_, PyList>) -> PyResult<Vec<ObjectKey>> {
    let mut interned = Interned::default();
    keys.iter().map(|key| key_of(&key, &mut interned)).collect()
}

fn key_of(key: &Bound<'_, PyAny>, interned: &mut Interned) -> PyResult<ObjectKey> {
    let py = key.py();
    let salt = key.getattr(intern!(py, "cache_salt"))?;
    let model = key.getattr(intern!(py, "model_name"))?;
    Ok(ObjectKey {
        salt: intern_str(salt.extract::<&str>()?, &mut interned.salt),
        model: intern_str(model.extract::<&str>()?, &mut interned.model),
        group: key.getattr(intern!(py, "object_group_id"))?.extract()?,
        rank: key.getattr(intern!(py, "kv_rank"))?.extract()?,
        chunk_hash: key.getattr(intern!(py, "chunk_hash"))?.extract::<&[u8]>()?.into(),
    })
}

fn tuple_of<'py>(py: Python<'py>, key: &ObjectKey) -> PyResult<Bound<'py, PyTuple>> {
    let hash = PyBytes::new(py, &key.chunk_hash);
    (hash, &*key.model, key.rank, key.group, &*key.salt).into_pyobject(py)
}

fn pages_of(objects: &Bound<'_, PyList>) -> PyResult<Vec<ForeignSlice>> {
    let py = objects.py();
    let page = |object: Bound<'_, PyAny>| {
        let address: usize = object.getattr(intern!(py, "data_ptr"))?.extract()?;
        let length: usize = object.call_method0(intern!(py, "get_size"))?.extract()?;
        let physical: usize = object.call_method0(intern!(py, "get_physical_size"))?.extract()?;
        if length > physical {
            return Err(PyValueError::new_err("an object that is larger than its memory"));
        }
        let address =
            NonNull::new(address as *mut u8).ok_or_else(|| PyValueError::new_err("an object at address 0"))?;
        // SAFETY: by LMCache's contract an object's buffer stays valid until the task's completion is reported, and the
        // adapter makes no copy after it has reported one. `kvtier.lmcache` keeps the object alive as long. Python holds
        // no Rust reference to it, and a tensor's memory is none of our regions.
        Ok(unsafe { ForeignSlice::new(address, length) })
    };
    objects.iter().map(page).collect()
}

fn notice_of(py: Python<'_>, notice: Notice) -> PyResult<Bound<'_, PyTuple>> {
    match notice {
        Notice::Stored { task, known } => ("stored", task, known).into_pyobject(py),
        Notice::Loaded { task, loaded, known } => ("loaded", task, loaded, known).into_pyobject(py),
        Notice::Gone { objects } => {
            let objects = objects.iter().map(|(key, bytes)| Ok((tuple_of(py, key)?, *bytes)));
            ("gone", objects.collect::<PyResult<Vec<_>>>()?).into_pyobject(py)
        }
        Notice::Invalidated {
            namespace,
            salts,
            generation,
        } => ("invalidated", namespace, salts, generation).into_pyobject(py),
    }
}
