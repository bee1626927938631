"""Memory of a GPU as the source of puts and the target of gets: on the software device, whose memory is host memory."""

import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import kvtier
import pytest
from conftest import Node, eventually, key

LIBRARY = Path(os.environ["KVTIER_BIN_DIR"]) / "deps" / "libkvtier_softgpu.so"


class Driver:
    """As much of the driver as an engine needs to have arrays."""

    def __init__(self, number):
        self.driver = ctypes.CDLL(str(LIBRARY))
        context = ctypes.c_void_p()
        assert self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number) == 0
        self.context = context

    def allocate(self, size):
        address = ctypes.c_uint64()
        assert self.driver.cuCtxPushCurrent_v2(self.context) == 0
        assert self.driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0
        assert self.driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 0
        return address.value


class Array:
    """One with __cuda_array_interface__. The driver has its memory until the process ends."""

    def __init__(self, driver, content=None, size=None, **interface):
        self.size = len(content) if size is None else size
        self.driver, self.context = driver.driver, driver.context
        self.address = driver.allocate(self.size)
        self.read_only = interface.pop("read_only", False)
        self.interface = {"shape": (self.size // 2,), "typestr": "<f2", "version": 3} | interface
        if content is not None:
            ctypes.memmove(self.address, content, len(content))

    @property
    def __cuda_array_interface__(self):
        return {"data": (self.address, self.read_only)} | self.interface

    def bytes(self):
        return ctypes.string_at(self.address, self.size)


class DlTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class Tensor:
    """One with DLPack, as frameworks have it: two dimensions of 16-bit elements."""

    def __init__(self, driver, content, device=(2, 0), strides=None):
        self.array = Array(driver, content)
        self.device = device
        self.shape = (ctypes.c_int64 * 2)(2, len(content) // 4)
        self.strides = None if strides is None else (ctypes.c_int64 * 2)(*strides)
        self.streams = []
        self.tensor = DlTensor(
            data=self.array.address, device_type=device[0], device_id=device[1], ndim=2, code=2, bits=16, lanes=1
        )
        self.tensor.shape = self.shape
        if self.strides is not None:
            self.tensor.strides = self.strides

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(ctypes.addressof(self.tensor), b"dltensor", None)

    def bytes(self):
        return self.array.bytes()


@pytest.fixture
def hbm_node():
    with tempfile.TemporaryDirectory(prefix="kvp-") as directory:
        node = Node(Path(directory), hbm_bytes="4MiB", hbm_segment_bytes="2MiB", hbm_library=LIBRARY)
        try:
            yield node
        finally:
            node.kill()


@pytest.fixture
def device():
    return kvtier.Device(0, library=LIBRARY)


@pytest.fixture
def driver(device):
    return Driver(device.number)


def pattern(seed, size):
    return bytes((at * 7 + seed * 31) % 251 for at in range(size))


def test_a_machine_without_a_driver_says_so():
    with pytest.raises(kvtier.Unavailable, match="cuda unavailable"):
        kvtier.Device(0, library="/nowhere/libcuda.so.1")
    with pytest.raises(kvtier.Unavailable, match="INVALID_DEVICE"):
        kvtier.Device(99, library=LIBRARY)


def test_arrays_go_to_the_node_and_come_back(node, device, driver):
    assert device.name == "software: well" and device.uuid.startswith("GPU-")
    contents = [pattern(1, 4096), pattern(2, 10_000)]
    with node.client() as client:
        sources = [Array(driver, contents[0], stream=1), Tensor(driver, contents[1])]
        put = client.put_from_device([key(1), key(2)], sources, device=device, parent="root", tokens=16)
        assert put == ["published", "published"]
        assert sources[1].streams == [-1], "it is ordered with the stream of the call"
        # What came from a device is a block like any other.
        assert bytes(client.get(key(2))) == contents[1]
        targets = [Array(driver, size=8192), Tensor(driver, bytes(10_000)), Array(driver, size=10)]
        got = client.get_into_device([key(1), key(2), key(9)], targets, device=device)
        assert [(one.status, one.length) for one in got] == [("hit", 4096), ("hit", 10_000), ("miss", None)]
        assert targets[0].bytes()[:4096] == contents[0] and targets[1].bytes() == contents[1]
        small = client.get_into_device([key(1)], [Array(driver, size=64)], device=device)
        assert (small[0].status, small[0].length) == ("too_small", 4096)


def test_blocks_that_are_used_again_come_from_memory_of_the_device(hbm_node, device, driver):
    with hbm_node.client() as client:
        source = Array(driver, pattern(3, 50_000))
        assert client.put_from_device([key(1)], [source], device=device) == ["published"]
        target = Array(driver, size=50_000)
        eventually(
            lambda: client.get_into_device([key(1)], [target], device=device)[0].tier == "hbm", "it lies on the device"
        )
        assert target.bytes() == source.bytes()
        # Who does not ask for device memory is not given any.
        assert client.get(key(1)).tier == "host"


def test_an_engines_pages_go_and_come_layer_by_layer(hbm_node, device, driver):
    sizes = {"layers": 3, "pages": 4, "page_tokens": 16, "heads": 2, "head_elements": 32, "element_bytes": 2}
    layout = kvtier.KvLayout(**sizes)
    row = 16 * 2 * 32 * 2
    assert layout.block_bytes(2) == 3 * 2 * 2 * row
    contents = [pattern(layer, 2 * 4 * row) for layer in range(3)]
    tensors = [Array(driver, content) for content in contents]
    cache = kvtier.DeviceCache(device, layout, tensors)
    assert len(cache) == 3
    page = lambda layer, part, number: tensors[layer].bytes()[(part * 4 + number) * row :][:row]
    with hbm_node.client() as client:
        put = cache.begin_put(client, [key(1), key(2)], [[0], [1]], parent="root", tokens=16)
        put.hold()
        assert put.finish() == ["published", "published"]
        with pytest.raises(kvtier.Closed):
            put.finish()
        get = cache.begin_get(client, [key(1), key(2), key(3)], [[2], [3], [0]], prefix=True)
        assert [got.status for got in get.outcomes()] == ["hit", "hit", "miss"]
        for layer in range(3):
            get.hold(first=layer, end=layer + 1)
        with pytest.raises(kvtier.Invalid, match="3 layers"):
            get.hold(end=4)
        assert [bool(got) for got in get.finish()] == [True, True, False]
        for layer in range(3):
            for part in range(2):
                assert page(layer, part, 2) == page(layer, part, 0) and page(layer, part, 3) == page(layer, part, 1)
        assert device.piece_mover.startswith("copy_engines (cuModuleLoadData")
        with pytest.raises(kvtier.Invalid, match="page 4"):
            cache.get(client, [key(1)], [[4]])
        with pytest.raises(kvtier.Invalid, match="lists of pages"):
            cache.put(client, [key(1)], [])


OWNER = """
import ctypes, sys
from test_device import Array, Driver, pattern
array = Array(Driver(0), pattern(7, 10_000))
handle = (ctypes.c_uint8 * 64)()
assert array.driver.cuCtxPushCurrent_v2(array.context) == 0
assert array.driver.cuIpcGetMemHandle(handle, ctypes.c_uint64(array.address)) == 0
assert array.driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 0
print(bytes(handle).hex(), flush=True)
sys.stdin.readline()
print(array.bytes()[:4096] == pattern(8, 4096), flush=True)
sys.stdin.readline()
"""


def test_memory_of_another_process_is_an_array_while_that_lives(node, device):
    here = Path(__file__).parent
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        handle = bytes.fromhex(owner.stdout.readline())
        whole = kvtier.IpcArray(device, handle, 10_000)
        assert len(whole) == 10_000
        with node.client() as client:
            assert client.put_from_device([key(1)], [whole], device=device) == ["published"]
            assert bytes(client.get(key(1))) == pattern(7, 10_000)
            part = kvtier.IpcArray(device, handle, 100, offset=9_900)
            assert client.put_from_device([key(2)], [part], device=device) == ["published"]
            assert bytes(client.get(key(2))) == pattern(7, 10_000)[9_900:]
            client.put(key(3), pattern(8, 4096))
            got = client.get_into_device([key(3)], [whole], device=device)
            assert bool(got[0])
        owner.stdin.write("\n")
        owner.stdin.flush()
        assert owner.stdout.readline() == "True\n"
        with pytest.raises(kvtier.Unavailable, match="not in the allocation"):
            kvtier.IpcArray(device, handle, 10_001)
        with pytest.raises(kvtier.Invalid, match="64 bytes, not 63"):
            kvtier.IpcArray(device, handle[1:], 10)
        # While one of them is open another of the same memory is no new mapping.
        del whole, part
        gc.collect()
    finally:
        owner.kill()
        owner.wait()
    with pytest.raises(kvtier.Unavailable, match="cuIpcOpenMemHandle"):
        kvtier.IpcArray(device, handle, 10_000)


def test_what_moves_pages_can_be_chosen():
    assert kvtier.Device(5, library=LIBRARY).piece_mover is None
    assert kvtier.Device(5, library=LIBRARY, piece_mover="kernel").piece_mover.startswith("kernel")
    engines = kvtier.Device(5, library=LIBRARY, piece_mover="copy_engines")
    assert engines.piece_mover == "copy_engines (as asked for)"
    with pytest.raises(kvtier.Invalid, match="faster, kernel or copy_engines"):
        kvtier.Device(5, library=LIBRARY, piece_mover="sm")


def test_what_is_no_array_of_the_device_is_refused(node, device, driver):
    content = pattern(1, 4096)
    with node.client() as client:
        put = lambda *arrays: client.put_from_device([key(1)], arrays, device=device)
        with pytest.raises(TypeError, match="__cuda_array_interface__"):
            put(b"host memory")
        with pytest.raises(kvtier.Invalid, match="gaps"):
            put(Array(driver, content, strides=(4,)))
        with pytest.raises(kvtier.Invalid, match="gaps"):
            put(Tensor(driver, content, strides=(4096, 1)))
        with pytest.raises(kvtier.Invalid, match="without bytes"):
            put(Array(driver, content, shape=(0,)))
        with pytest.raises(kvtier.Invalid, match="typestr"):
            put(Array(driver, content, typestr="|V"))
        with pytest.raises(kvtier.Invalid, match="not on CUDA device 0"):
            put(Tensor(driver, content, device=(2, 1)))
        with pytest.raises(kvtier.Invalid, match="not on CUDA device 0"):
            put(Tensor(driver, content, device=(1, 0)))
        with pytest.raises(kvtier.Invalid, match="2 arrays for 1 keys"):
            put(Array(driver, content), Array(driver, content))
        with pytest.raises(kvtier.Invalid, match="read-only"):
            client.get_into_device([key(1)], [Array(driver, content, read_only=True)], device=device)
        assert put(Array(driver, content, strides=(2,), read_only=True)) == ["published"]
        assert put(Tensor(driver, content, strides=(1024, 1))) == ["present"]
        assert not client.exists(key(2))


def test_memory_stays_until_the_device_is_done(node, device):
    slow = kvtier.Device(1, library=LIBRARY)
    driver = Driver(1)
    with node.client() as client:
        array = Array(driver, pattern(1, 4096))
        alive = weakref.ref(array)
        put = client.begin_put_from_device([key(1)], [array], device=slow)
        del array
        gc.collect()
        assert alive() is not None, "the device reads it"
        assert put.finish() == ["published"]
        gc.collect()
        assert alive() is None
        target = Array(driver, size=4096)
        get = client.begin_get_into_device([key(1)], [target], device=slow)
        alive = weakref.ref(target)
        copy = target.bytes
        del get
        assert copy() == pattern(1, 4096), "what is dropped is waited for"
        del target, copy
        gc.collect()
        assert alive() is None
