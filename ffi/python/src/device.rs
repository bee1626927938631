#![expect(
    unsafe_code,
    reason = "takes device memory of objects by __cuda_array_interface__ and DLPack, and streams by their numbers"
)]

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use kvtier::client::blocking::{DeviceArrays, DeviceCache as Cache, Loading, Saving};
use kvtier::gpu::{
    Cuda, DeviceRegion, DeviceSlice, EngineStream, Gpu, IpcHandle, KvLayout as Layout, KvOrder, KvParts,
    PieceMoverWanted,
};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyTuple};

use crate::argument::{hashes_of, hints_of, lineage_of, scope_of};
use crate::client::{Client, same_length};
use crate::error::{Closed, Invalid, Unavailable, raised};
use crate::outcome::{Got, put_name};

/// Drivers that were opened: the system's under `None`. They stay open, as a driver's threads do.
static DRIVERS: LazyLock<Mutex<HashMap<Option<PathBuf>, Arc<Cuda>>>> = LazyLock::new(Mutex::default);

/// `kDLCUDA`.
const DLPACK_CUDA: i32 = 2;
const DLPACK_NAME: &CStr = c"dltensor";

/// A GPU, by its number, for puts from its memory and gets into it. `library` is CUDA's driver where the system has it elsewhere.
///
/// `piece_mover` is what moves the pages of a DeviceCache: "copy_engines", a "kernel" on the device's processors, or, when the first
/// cache is made, whichever of them is found to be "faster".
///
/// Raises Unavailable where there is no driver or no such device.
#[pyclass(frozen, weakref, module = "kvtier")]
pub(crate) struct Device {
    number: usize,
    gpu: Arc<Gpu>,
    arrays: DeviceArrays,
}

#[pymethods]
impl Device {
    #[new]
    #[pyo3(signature = (number = 0, *, library = None, piece_mover = "faster"))]
    fn new(py: Python<'_>, number: usize, library: Option<PathBuf>, piece_mover: &str) -> PyResult<Device> {
        let wanted = match piece_mover {
            // When it is needed.
            "faster" => None,
            "kernel" => Some(PieceMoverWanted::Kernel),
            "copy_engines" => Some(PieceMoverWanted::CopyEngines),
            other => {
                return Err(Invalid::new_err(format!(
                    "piece_mover: faster, kernel or copy_engines, not {other}"
                )));
            }
        };
        let opened = py.detach(|| {
            let gpu = driver(library)?.device(number).map_err(|error| error.to_string())?;
            let arrays = DeviceArrays::new(&gpu).map_err(|error| error.to_string())?;
            if let Some(wanted) = wanted {
                gpu.choose_piece_mover(wanted);
            }
            Ok((gpu, arrays))
        });
        let (gpu, arrays) = opened.map_err(|words: String| Unavailable::new_err(words))?;
        Ok(Device { number, gpu, arrays })
    }

    /// Its number, as CUDA counts.
    #[getter]
    fn number(&self) -> usize {
        self.number
    }

    /// What it is called.
    #[getter]
    fn name(&self) -> &str {
        self.gpu.name()
    }

    /// What moves the pages of its caches, and why; None before the first of them was made.
    #[getter]
    fn piece_mover(&self) -> Option<String> {
        self.gpu.piece_mover().map(|chosen| chosen.to_string())
    }

    /// What names it in every process.
    #[getter]
    fn uuid(&self) -> String {
        self.gpu.uuid().to_string()
    }

    fn __repr__(&self) -> String {
        format!("<kvtier.Device {}: {}>", self.number, self.gpu.name())
    }
}

fn driver(library: Option<PathBuf>) -> Result<Arc<Cuda>, String> {
    let mut drivers = DRIVERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = drivers.get(&library) {
        return Ok(Arc::clone(known));
    }
    let opened = match &library {
        None => Cuda::open(),
        Some(library) => Cuda::open_at(library),
    };
    let cuda = Arc::new(opened.map_err(|error| error.to_string())?);
    drivers.insert(library, Arc::clone(&cuda));
    Ok(cuda)
}

/// How an engine's paged KV cache lies in its tensors: layers, a keys' and a values' part of each (or one, `parts` = 1), pages,
/// tokens of a page, heads of this rank, elements of a head, bytes of an element. `pages_outer`: in a layer the page comes before
/// the part. `one_tensor`: all layers lie in one tensor, otherwise each has its own.
#[pyclass(frozen, module = "kvtier")]
pub(crate) struct KvLayout {
    layout: Layout,
}

#[pymethods]
impl KvLayout {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "in Python they are named")]
    #[pyo3(signature = (*, layers, pages, page_tokens, heads, head_elements, element_bytes, parts = 2, pages_outer = false, one_tensor = false))]
    fn new(
        layers: u32,
        pages: u32,
        page_tokens: u32,
        heads: u32,
        head_elements: u32,
        element_bytes: u32,
        parts: u32,
        pages_outer: bool,
        one_tensor: bool,
    ) -> PyResult<KvLayout> {
        let parts = match parts {
            1 => KvParts::Latent,
            2 => KvParts::KeysAndValues,
            other => return Err(Invalid::new_err(format!("parts: 1 or 2, not {other}"))),
        };
        let layout = Layout {
            layers,
            parts,
            order: if pages_outer {
                KvOrder::PagesOuter
            } else {
                KvOrder::PartsOuter
            },
            one_tensor,
            pages,
            page_tokens,
            heads,
            head_elements,
            element_bytes,
        };
        layout.tensors().map_err(|error| Invalid::new_err(error.to_string()))?;
        Ok(KvLayout { layout })
    }

    /// Bytes of a block of so many pages.
    fn block_bytes(&self, pages: usize) -> PyResult<usize> {
        let bytes = self.layout.block_bytes(pages);
        bytes.map_err(|error| Invalid::new_err(error.to_string()))
    }
}

/// An engine's paged KV cache on a GPU. `tensors` have `__cuda_array_interface__` or DLPack, are contiguous, and are kept.
///
/// A block is some pages, all layers of them. Each call is ordered with `stream`, the engine's by its number (`CUstream`,
/// `torch.cuda.Stream.cuda_stream`; 0, the default, is the default stream): it begins when what the stream was given before is done.
#[pyclass(frozen, weakref, module = "kvtier")]
pub(crate) struct DeviceCache {
    gpu: Arc<Gpu>,
    cache: Cache,
    tensors: Vec<Py<PyAny>>,
}

#[pymethods]
impl DeviceCache {
    #[new]
    fn new(
        py: Python<'_>,
        device: &Bound<'_, Device>,
        layout: &KvLayout,
        tensors: &Bound<'_, PyAny>,
    ) -> PyResult<DeviceCache> {
        let device = device.get();
        let arrays = arrays_of(tensors, device, true)?;
        let slices = arrays.iter().map(|array| array.slice.clone()).collect();
        let gpu = Arc::clone(&device.gpu);
        let cache = py.detach(|| Cache::new(&gpu, layout.layout, slices)).map_err(raised)?;
        let tensors = arrays.into_iter().flat_map(|array| array.owners).collect();
        Ok(DeviceCache { gpu, cache, tensors })
    }

    /// How many tensors it lies in.
    fn __len__(&self) -> usize {
        self.tensors.len()
    }

    /// Puts blocks from pages, a list of page numbers for each key, keys in prefix order; waits until they are published. Outcomes,
    /// `parent`, `tokens` and `label` as for `Client.put_batch`.
    #[pyo3(signature = (client, keys, pages, *, parent = None, tokens = 0, label = None, stream = 0))]
    #[expect(clippy::too_many_arguments, reason = "in Python they are named")]
    fn put(
        slf: &Bound<'_, Self>,
        client: &Client,
        keys: &Bound<'_, PyAny>,
        pages: Vec<Vec<u32>>,
        parent: Option<&Bound<'_, PyAny>>,
        tokens: u32,
        label: Option<&str>,
        stream: u64,
    ) -> PyResult<Vec<&'static str>> {
        DeviceCache::begin_put(slf, client, keys, pages, parent, tokens, label, stream)?.finish(slf.py())
    }

    /// Begins a put, and returns when the device has been told: a `DevicePut`.
    #[pyo3(signature = (client, keys, pages, *, parent = None, tokens = 0, label = None, stream = 0))]
    #[expect(clippy::too_many_arguments, reason = "in Python they are named")]
    fn begin_put(
        slf: &Bound<'_, Self>,
        client: &Client,
        keys: &Bound<'_, PyAny>,
        pages: Vec<Vec<u32>>,
        parent: Option<&Bound<'_, PyAny>>,
        tokens: u32,
        label: Option<&str>,
        stream: u64,
    ) -> PyResult<DevicePut> {
        let this = slf.get();
        let lineage = parent.map(lineage_of).transpose()?.unwrap_or_default();
        let hashes = hashes_of(keys)?;
        same_length(hashes.len(), pages.len(), "lists of pages")?;
        let blocks: Vec<_> = hashes.into_iter().zip(pages.iter().map(Vec::as_slice)).collect();
        let (hints, engine) = (hints_of(label), stream_of(&this.gpu, stream));
        let saving = client.call(slf.py(), |open| {
            let namespace = open.namespace.with_hints(hints);
            this.cache.begin_put(&namespace, lineage, &blocks, tokens, &[engine])
        })?;
        Ok(DevicePut::new(&this.gpu, saving, vec![slf.clone().into_any().unbind()]))
    }

    /// Gets blocks into pages and waits for them: one `Got` for each key. With `prefix` nothing behind the first miss is read.
    #[pyo3(signature = (client, keys, pages, *, prefix = false, stream = 0))]
    fn get(
        slf: &Bound<'_, Self>,
        client: &Client,
        keys: &Bound<'_, PyAny>,
        pages: Vec<Vec<u32>>,
        prefix: bool,
        stream: u64,
    ) -> PyResult<Vec<Got>> {
        DeviceCache::begin_get(slf, client, keys, pages, prefix, stream)?.finish(slf.py())
    }

    /// Begins a get, layer by layer, and returns when the device has been told: a `DeviceGet`.
    #[pyo3(signature = (client, keys, pages, *, prefix = false, stream = 0))]
    fn begin_get(
        slf: &Bound<'_, Self>,
        client: &Client,
        keys: &Bound<'_, PyAny>,
        pages: Vec<Vec<u32>>,
        prefix: bool,
        stream: u64,
    ) -> PyResult<DeviceGet> {
        let this = slf.get();
        let hashes = hashes_of(keys)?;
        same_length(hashes.len(), pages.len(), "lists of pages")?;
        let blocks: Vec<_> = hashes.into_iter().zip(pages.iter().map(Vec::as_slice)).collect();
        let (scope, engine) = (scope_of(prefix), stream_of(&this.gpu, stream));
        let loading = client.call(slf.py(), |open| {
            this.cache.begin_get(&open.namespace, &blocks, scope, &[engine])
        })?;
        Ok(DeviceGet::new(
            &this.gpu,
            loading,
            vec![slf.clone().into_any().unbind()],
        ))
    }
}

/// Memory of a device that another process allocated with cudaMalloc and told the handle of (cudaIpcGetMemHandle, 64 bytes): `size` bytes from
/// `offset` on. An array of bytes for puts, gets and caches. The other process keeps it allocated while this lives.
///
/// Raises Unavailable where it cannot be opened: that process is gone, it is this one, or the memory is another device's.
#[pyclass(frozen, weakref, module = "kvtier")]
pub(crate) struct IpcArray {
    region: Arc<DeviceRegion>,
}

#[pymethods]
impl IpcArray {
    #[new]
    #[pyo3(signature = (device, handle, size, *, offset = 0))]
    fn new(
        py: Python<'_>,
        device: &Bound<'_, Device>,
        handle: &[u8],
        size: usize,
        offset: usize,
    ) -> PyResult<IpcArray> {
        let handle: [u8; IpcHandle::BYTES] = handle
            .try_into()
            .map_err(|_| Invalid::new_err(format!("a handle has 64 bytes, not {}", handle.len())))?;
        if size == 0 {
            return Err(Invalid::new_err("an array without bytes"));
        }
        let gpu = &device.get().gpu;
        let opened = py.detach(|| gpu.open_ipc(&IpcHandle(handle), offset, size));
        let region = opened.map_err(|error| Unavailable::new_err(error.to_string()))?;
        Ok(IpcArray { region })
    }

    fn __len__(&self) -> usize {
        self.region.bytes()
    }

    /// See <https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html>.
    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("shape", (self.region.bytes(),))?;
        interface.set_item("typestr", "|u1")?;
        interface.set_item("data", (self.region.address(), false))?;
        interface.set_item("version", 3)?;
        Ok(interface)
    }
}

/// As `DeviceCache.begin_put`, from arrays of a block each.
pub(crate) fn begin_put(
    py: Python<'_>,
    client: &Client,
    keys: &Bound<'_, PyAny>,
    objects: &Bound<'_, PyAny>,
    device: &Bound<'_, Device>,
    parent: Option<&Bound<'_, PyAny>>,
    (tokens, label, stream): (u32, Option<&str>, u64),
) -> PyResult<DevicePut> {
    let device = device.get();
    let lineage = parent.map(lineage_of).transpose()?.unwrap_or_default();
    let (hashes, arrays) = (hashes_of(keys)?, arrays_of(objects, device, false)?);
    same_length(hashes.len(), arrays.len(), "arrays")?;
    let slices = arrays.iter().map(|array| array.slice.clone());
    let blocks: Vec<_> = hashes.into_iter().zip(slices).collect();
    let (hints, engines) = (hints_of(label), streams_of(&device.gpu, stream, &arrays));
    let saving = client.call(py, |open| {
        let namespace = open.namespace.with_hints(hints);
        device.arrays.begin_put(&namespace, lineage, &blocks, tokens, &engines)
    })?;
    let owners = arrays.into_iter().flat_map(|array| array.owners).collect();
    Ok(DevicePut::new(&device.gpu, saving, owners))
}

/// As `DeviceCache.begin_get`, into arrays of a block each.
pub(crate) fn begin_get(
    py: Python<'_>,
    client: &Client,
    keys: &Bound<'_, PyAny>,
    objects: &Bound<'_, PyAny>,
    device: &Bound<'_, Device>,
    (prefix, stream): (bool, u64),
) -> PyResult<DeviceGet> {
    let device = device.get();
    let (hashes, arrays) = (hashes_of(keys)?, arrays_of(objects, device, true)?);
    same_length(hashes.len(), arrays.len(), "arrays")?;
    let slices = arrays.iter().map(|array| array.slice.clone());
    let blocks: Vec<_> = hashes.into_iter().zip(slices).collect();
    let (scope, engines) = (scope_of(prefix), streams_of(&device.gpu, stream, &arrays));
    let loading = client.call(py, |open| {
        device.arrays.begin_get(&open.namespace, &blocks, scope, &engines)
    })?;
    let owners = arrays.into_iter().flat_map(|array| array.owners).collect();
    Ok(DeviceGet::new(&device.gpu, loading, owners))
}

macro_rules! under_way {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[pyclass(frozen, weakref, module = "kvtier")]
        pub(crate) struct $name {
            gpu: Arc<Gpu>,
            state: Mutex<Option<(Box<$inner>, Vec<Py<PyAny>>)>>,
        }

        impl $name {
            fn new(gpu: &Arc<Gpu>, inner: $inner, owners: Vec<Py<PyAny>>) -> $name {
                $name {
                    gpu: Arc::clone(gpu),
                    state: Mutex::new(Some((Box::new(inner), owners))),
                }
            }

            /// What is under way, and whose memory it uses, which has to stay until that is over.
            fn take(&self) -> PyResult<(Box<$inner>, Vec<Py<PyAny>>)> {
                let taken = self.state.lock().unwrap_or_else(PoisonError::into_inner).take();
                taken.ok_or_else(|| Closed::new_err("it is finished already"))
            }

            fn with<R>(&self, look: impl FnOnce(&$inner) -> R) -> PyResult<R> {
                let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                let (inner, _) = state.as_ref().ok_or_else(|| Closed::new_err("it is finished already"))?;
                Ok(look(inner))
            }
        }

        impl Drop for $name {
            /// Waits for the device before whose memory it uses is let go of.
            fn drop(&mut self) {
                let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner).take();
                let Some((inner, owners)) = state else { return };
                // When the interpreter is gone nobody else runs that would have to go on meanwhile.
                let _ = Python::try_attach(|py| py.detach(|| drop(inner)));
                let_go(&self.gpu, owners);
            }
        }
    };
}

under_way! {
    /// A put under way. Dropping it waits for the device and publishes nothing.
    DevicePut, Saving
}

under_way! {
    /// A get under way. Dropping it waits for the device.
    DeviceGet, Loading
}

#[pymethods]
impl DevicePut {
    /// What the stream is given from now on waits until the memory was read: then it may be written again. Does not wait itself.
    #[pyo3(signature = (stream = 0))]
    fn hold(&self, stream: u64) -> PyResult<()> {
        let engine = stream_of(&self.gpu, stream);
        self.with(|saving| saving.hold(&engine))?.map_err(raised)
    }

    /// Waits for the device and publishes: one outcome for each key, as for `Client.put_batch`.
    pub(crate) fn finish(&self, py: Python<'_>) -> PyResult<Vec<&'static str>> {
        let (saving, owners) = self.take()?;
        let outcomes = py.detach(|| saving.finish()).map_err(raised);
        let_go(&self.gpu, owners);
        Ok(outcomes?.into_iter().map(put_name).collect())
    }
}

#[pymethods]
impl DeviceGet {
    /// What becomes of each key, if nothing fails.
    fn outcomes(&self) -> PyResult<Vec<Got>> {
        self.with(|loading| loading.outcomes().iter().copied().map(Got::from).collect())
    }

    /// What the stream is given from now on waits until the layers from `first` up to `end` (not included), and those before them,
    /// are in place; without `end` all of them. Does not wait itself. Call `finish` before what was computed with them counts.
    #[pyo3(signature = (stream = 0, *, first = 0, end = None))]
    fn hold(&self, stream: u64, first: u32, end: Option<u32>) -> PyResult<()> {
        let engine = stream_of(&self.gpu, stream);
        let layers = |loading: &Loading| -> Range<u32> { first..end.unwrap_or(loading.layers()) };
        self.with(|loading| loading.hold(&engine, layers(loading)))?
            .map_err(raised)
    }

    /// Waits for the device: one `Got` for each key.
    pub(crate) fn finish(&self, py: Python<'_>) -> PyResult<Vec<Got>> {
        let (loading, owners) = self.take()?;
        let outcomes = py.detach(|| loading.finish()).map_err(raised);
        let_go(&self.gpu, owners);
        Ok(outcomes?.into_iter().map(Got::from).collect())
    }
}

/// The device is done with their memory; or it is lost, and nobody can tell: then they stay.
fn let_go(gpu: &Arc<Gpu>, owners: Vec<Py<PyAny>>) {
    let owners = ManuallyDrop::new(owners);
    if !gpu.is_lost() {
        drop(ManuallyDrop::into_inner(owners));
    }
}

/// The stream of a call, and those on which its arrays were made.
fn streams_of(gpu: &Arc<Gpu>, stream: u64, arrays: &[Array]) -> Vec<EngineStream> {
    let mut streams = vec![stream];
    for made_on in arrays.iter().filter_map(|array| array.made_on) {
        if !streams.contains(&made_on) {
            streams.push(made_on);
        }
    }
    streams.into_iter().map(|stream| stream_of(gpu, stream)).collect()
}

fn stream_of(gpu: &Arc<Gpu>, stream: u64) -> EngineStream {
    // SAFETY: the caller names a live stream of this device's, as CUDA itself asks of whoever names one.
    unsafe { gpu.engine_stream(stream) }
}

/// Memory of an object on a device, and who keeps it there.
struct Array {
    slice: DeviceSlice,
    /// The stream that has to be waited for before it is used, where the object names one.
    made_on: Option<u64>,
    owners: Vec<Py<PyAny>>,
}

fn arrays_of(objects: &Bound<'_, PyAny>, device: &Device, writable: bool) -> PyResult<Vec<Array>> {
    objects
        .try_iter()?
        .map(|object| array_of(&object?, device, writable))
        .collect()
}

fn array_of(object: &Bound<'_, PyAny>, device: &Device, writable: bool) -> PyResult<Array> {
    let mut made_on = None;
    let (address, bytes, capsule) = if let Some(interface) = object.getattr_opt("__cuda_array_interface__")? {
        let (address, bytes, stream) = cuda_array(&interface, writable)?;
        made_on = stream;
        (address, bytes, None)
    } else if object.hasattr("__dlpack__")? {
        let (address, bytes, capsule) = dlpack(object, device)?;
        (address, bytes, Some(capsule.into_any().unbind()))
    } else {
        let kind = object.get_type();
        return Err(pyo3::exceptions::PyTypeError::new_err(format!(
            "device memory has __cuda_array_interface__ or __dlpack__, {kind} has neither"
        )));
    };
    // SAFETY: the object says so, and is kept, or what it exported is, until every slice of it is gone.
    let region = unsafe { device.gpu.adopt(address, bytes) };
    let slice = region
        .slice(0, bytes)
        .map_err(|error| Invalid::new_err(error.to_string()))?;
    let owners = std::iter::once(object.clone().unbind()).chain(capsule).collect();
    Ok(Array { slice, made_on, owners })
}

/// <https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html>, version 3: address and bytes of a contiguous array,
/// and the stream that made it.
fn cuda_array(interface: &Bound<'_, PyAny>, writable: bool) -> PyResult<(u64, usize, Option<u64>)> {
    let interface = interface.cast::<PyDict>()?;
    let entry = |name: &str| {
        let entry = interface.get_item(name)?;
        entry.ok_or_else(|| Invalid::new_err(format!("__cuda_array_interface__ has no {name}")))
    };
    let (address, read_only): (u64, bool) = entry("data")?.extract()?;
    if read_only && writable {
        return Err(Invalid::new_err("the array is read-only"));
    }
    let shape: Vec<usize> = entry("shape")?.extract()?;
    let kind: String = entry("typestr")?.extract()?;
    let item = kind.get(2..).and_then(|bytes| bytes.parse::<usize>().ok());
    let item = item.ok_or_else(|| Invalid::new_err(format!("typestr {kind:?}")))?;
    let strides = interface.get_item("strides")?.filter(|strides| !strides.is_none());
    let strides: Option<Vec<i64>> = strides.map(|strides| strides.extract()).transpose()?;
    let stream = interface.get_item("stream")?.filter(|stream| !stream.is_none());
    let stream = stream.map(|stream| stream.extract()).transpose()?;
    Ok((address, contiguous(&shape, strides.as_deref(), item, item)?, stream))
}

/// `DLTensor` of dlpack.h.
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    dimensions: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// <https://dmlc.github.io/dlpack/latest/>: address and bytes of a contiguous tensor, and what keeps it. The capsule is not consumed:
/// its own end gives the tensor back.
fn dlpack<'py>(object: &Bound<'py, PyAny>, device: &Device) -> PyResult<(u64, usize, Bound<'py, PyCapsule>)> {
    let (kind, number): (i32, i32) = object.call_method0("__dlpack_device__")?.extract()?;
    if kind != DLPACK_CUDA || usize::try_from(number) != Ok(device.number) {
        let wanted = device.number;
        return Err(Invalid::new_err(format!(
            "the tensor lies on device {number} of kind {kind}, not on CUDA device {wanted}"
        )));
    }
    let arguments = PyDict::new(object.py());
    // It does not synchronise: calls are ordered with the stream that they name.
    arguments.set_item("stream", -1)?;
    let capsule = object.call_method("__dlpack__", PyTuple::empty(object.py()), Some(&arguments))?;
    let capsule = capsule.cast_into::<PyCapsule>()?;
    // SAFETY: a live capsule and a name that ends in zero.
    let tensor = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), DLPACK_NAME.as_ptr()) };
    if tensor.is_null() {
        return Err(PyErr::fetch(object.py()));
    }
    // SAFETY: a capsule of this name holds a `DLManagedTensor`, which begins with a `DLTensor`, until it is consumed.
    let tensor = unsafe { &*tensor.cast::<DlTensor>() };
    let dimensions = usize::try_from(tensor.dimensions).unwrap_or(0);
    let numbers = |first: *const i64| -> Vec<i64> {
        if first.is_null() {
            return Vec::new();
        }
        // SAFETY: as many numbers as there are dimensions.
        unsafe { std::slice::from_raw_parts(first, dimensions) }.to_vec()
    };
    let shape: Option<Vec<usize>> = numbers(tensor.shape)
        .into_iter()
        .map(|length| usize::try_from(length).ok())
        .collect();
    let shape = shape.ok_or_else(|| Invalid::new_err("a shape with a negative length"))?;
    let strides = Some(numbers(tensor.strides)).filter(|_| !tensor.strides.is_null());
    let item = usize::from(tensor.bits) * usize::from(tensor.lanes);
    if !item.is_multiple_of(8) {
        return Err(Invalid::new_err("elements that are not whole bytes"));
    }
    let bytes = contiguous(&shape, strides.as_deref(), item / 8, 1)?;
    Ok((tensor.data as u64 + tensor.byte_offset, bytes, capsule))
}

/// Bytes of an array that lies in one piece, the last dimension first. `step`: what the stride of one element is.
fn contiguous(shape: &[usize], strides: Option<&[i64]>, item: usize, step: usize) -> PyResult<usize> {
    let wrong = |words: &str| Invalid::new_err(format!("{words}: device memory of a block lies in one piece"));
    let mut elements = 1_usize;
    for (at, length) in shape.iter().enumerate().rev() {
        if let Some(strides) = strides {
            let stride = strides.get(at).copied().unwrap_or(-1);
            if *length > 1 && usize::try_from(stride).ok() != elements.checked_mul(step) {
                return Err(wrong("an array with gaps"));
            }
        }
        elements = elements
            .checked_mul(*length)
            .ok_or_else(|| wrong("more bytes than memory has"))?;
    }
    let bytes = elements
        .checked_mul(item)
        .filter(|bytes| isize::try_from(*bytes).is_ok());
    bytes
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| wrong("an array without bytes, or with more than memory has"))
}
