import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, final

from typing_extensions import Buffer

Tier = Literal["hbm", "host", "nvme", "remote"]
Put = Literal["published", "present", "stale", "busy", "invalid"]
Parent = bytes | Literal["root", "unknown"]

class Error(Exception): ...
class Invalid(Error): ...
class Busy(Error): ...
class Unavailable(Error): ...
class Stale(Error): ...
class Corrupt(Error): ...
class Closed(Error): ...
class Internal(Error): ...
class Denied(Error): ...

@final
class Got:
    @property
    def status(self) -> Literal["hit", "miss", "busy", "too_small"]: ...
    @property
    def length(self) -> int | None: ...
    @property
    def tier(self) -> Tier | None: ...
    def __bool__(self) -> bool: ...

@final
class Found:
    @property
    def prefix(self) -> int: ...
    @property
    def tiers(self) -> list[Tier | None]: ...

@final
class Flushed:
    @property
    def written(self) -> int: ...
    @property
    def left_out(self) -> int: ...

@final
class Block:
    @property
    def tier(self) -> Tier: ...
    def release(self) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __enter__(self) -> Block: ...
    def __exit__(self, *exception: object) -> None: ...

# Device memory: anything with __cuda_array_interface__, or with __dlpack__ and __dlpack_device__.
DeviceArray = Any

@final
class Device:
    def __init__(
        self,
        number: int = 0,
        *,
        library: str | os.PathLike[str] | None = None,
        piece_mover: Literal["faster", "kernel", "copy_engines"] = "faster",
    ) -> None: ...
    @property
    def number(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def piece_mover(self) -> str | None: ...
    @property
    def uuid(self) -> str: ...

@final
class KvLayout:
    def __init__(
        self,
        *,
        layers: int,
        pages: int,
        page_tokens: int,
        heads: int,
        head_elements: int,
        element_bytes: int,
        parts: int = 2,
        pages_outer: bool = False,
        one_tensor: bool = False,
    ) -> None: ...
    def block_bytes(self, pages: int) -> int: ...

@final
class DevicePut:
    def hold(self, stream: int = 0) -> None: ...
    def finish(self) -> list[Put]: ...

@final
class DeviceGet:
    def outcomes(self) -> list[Got]: ...
    def hold(self, stream: int = 0, *, first: int = 0, end: int | None = None) -> None: ...
    def finish(self) -> list[Got]: ...

@final
class IpcArray:
    def __init__(self, device: Device, handle: bytes, size: int, *, offset: int = 0) -> None: ...
    def __len__(self) -> int: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

@final
class DeviceCache:
    def __init__(self, device: Device, layout: KvLayout, tensors: Iterable[DeviceArray]) -> None: ...
    def __len__(self) -> int: ...
    def put(
        self,
        client: Client,
        keys: Iterable[bytes],
        pages: Sequence[Sequence[int]],
        *,
        parent: Parent | Literal["independent"] | None = None,
        tokens: int = 0,
        label: str | None = None,
        stream: int = 0,
    ) -> list[Put]: ...
    def begin_put(
        self,
        client: Client,
        keys: Iterable[bytes],
        pages: Sequence[Sequence[int]],
        *,
        parent: Parent | Literal["independent"] | None = None,
        tokens: int = 0,
        label: str | None = None,
        stream: int = 0,
    ) -> DevicePut: ...
    def get(
        self,
        client: Client,
        keys: Iterable[bytes],
        pages: Sequence[Sequence[int]],
        *,
        prefix: bool = False,
        stream: int = 0,
    ) -> list[Got]: ...
    def begin_get(
        self,
        client: Client,
        keys: Iterable[bytes],
        pages: Sequence[Sequence[int]],
        *,
        prefix: bool = False,
        stream: int = 0,
    ) -> DeviceGet: ...

@final
class Client:
    def __init__(
        self,
        socket: str | os.PathLike[str],
        *,
        namespace: str,
        realization: bytes | dict[str, str],
        token: bytes | None = None,
        timeout: float = 10.0,
        threads: int = 2,
        gets_max: int = 1024,
    ) -> None: ...
    @property
    def socket(self) -> os.PathLike[str]: ...
    @property
    def namespace(self) -> str: ...
    @property
    def closed(self) -> bool: ...
    def put(
        self,
        key: bytes,
        data: Buffer,
        *,
        parent: Parent | None = None,
        tokens: int = 0,
        label: str | None = None,
    ) -> Put: ...
    def put_batch(
        self,
        keys: Iterable[bytes],
        data: Iterable[Buffer],
        *,
        parent: Parent | Literal["independent"] | None = None,
        tokens: int = 0,
        label: str | None = None,
    ) -> list[Put]: ...
    def get_into(self, key: bytes, target: Buffer) -> Got: ...
    def get_into_batch(
        self,
        keys: Iterable[bytes],
        targets: Iterable[Buffer],
        *,
        prefix: bool = False,
        prompt_tokens: int | None = None,
        local_prefix_tokens: int | None = None,
        queue_wait_us: int | None = None,
        can_split: bool = False,
    ) -> list[Got]: ...
    def put_from_device(
        self,
        keys: Iterable[bytes],
        arrays: Iterable[DeviceArray],
        *,
        device: Device,
        parent: Parent | Literal["independent"] | None = None,
        tokens: int = 0,
        label: str | None = None,
        stream: int = 0,
    ) -> list[Put]: ...
    def begin_put_from_device(
        self,
        keys: Iterable[bytes],
        arrays: Iterable[DeviceArray],
        *,
        device: Device,
        parent: Parent | Literal["independent"] | None = None,
        tokens: int = 0,
        label: str | None = None,
        stream: int = 0,
    ) -> DevicePut: ...
    def get_into_device(
        self,
        keys: Iterable[bytes],
        arrays: Iterable[DeviceArray],
        *,
        device: Device,
        prefix: bool = False,
        stream: int = 0,
    ) -> list[Got]: ...
    def begin_get_into_device(
        self,
        keys: Iterable[bytes],
        arrays: Iterable[DeviceArray],
        *,
        device: Device,
        prefix: bool = False,
        stream: int = 0,
    ) -> DeviceGet: ...
    def get(self, key: bytes) -> Block | None: ...
    def get_batch(self, keys: Iterable[bytes], *, prefix: bool = False) -> list[Block | None]: ...
    def exists(self, key: bytes) -> bool: ...
    def exists_batch(self, keys: Iterable[bytes]) -> list[bool]: ...
    def lookup(
        self,
        keys: Iterable[bytes],
        *,
        raw: bool = False,
        prompt_tokens: int | None = None,
        local_prefix_tokens: int | None = None,
        queue_wait_us: int | None = None,
        can_split: bool = False,
    ) -> Found: ...
    def explain(
        self,
        keys: Iterable[bytes],
        *,
        prompt_tokens: int | None = None,
        local_prefix_tokens: int | None = None,
        queue_wait_us: int | None = None,
        can_split: bool = False,
    ) -> dict[str, Any]: ...
    def advise(
        self,
        keys: Iterable[bytes],
        advice: Literal["closed", "pinned", "expected", "answered"],
        seconds: float = 0.0,
        *,
        tokens: int | None = None,
    ) -> int: ...
    def delete(self, key: bytes) -> bool: ...
    def delete_batch(self, keys: Iterable[bytes]) -> list[bool]: ...
    def invalidate(self) -> int: ...
    def generation(self) -> int: ...
    def report_computed(self, tokens: int, seconds: float, *, before_tokens: int = 0) -> None: ...
    def status(self) -> dict[str, Any]: ...
    def flush(self) -> Flushed: ...
    def watch(self, since: int = 0, wait: float = 0.0) -> tuple[int, dict[str, int]]: ...
    def confirm(self, generation: int, processor: str) -> int: ...
    def event_fd(self) -> int: ...
    def submit_get_into(self, keys: Iterable[bytes], targets: Iterable[Buffer], *, prefix: bool = False) -> int: ...
    def completed(self) -> list[tuple[int, list[Got] | Error]]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Client: ...
    def __exit__(self, *exception: object) -> None: ...
