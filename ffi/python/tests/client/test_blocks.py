"""Puts and gets: what comes back, in which buffers, and what is refused."""

import array
import ctypes
import gc
import mmap

import kvtier
import pytest
from conftest import content, eventually, key

MIB = 1 << 20


def leases(client) -> int:
    return client.status()["leases"]


@pytest.mark.parametrize("length", [1, 4095, 4096, 100_003, 3 * MIB])
def test_what_was_put_comes_back(client, length):
    data = content(7, length)
    assert client.put(key(7), data, parent="root", tokens=16) == "published"
    assert client.put(key(7), data) == "present"
    target = bytearray(length + 5)
    got = client.get_into(key(7), target)
    assert got and (got.status, got.length, got.tier) == ("hit", length, "host")
    assert target == data + bytes(5), "nothing is written past the block"
    with client.get(key(7)) as block:
        assert bytes(block) == data and len(block) == length and block.tier == "host"


def test_a_put_under_another_label_is_a_put_again(client):
    data = content(3, 5000)
    assert client.put(key(3), data, label="doc-1") == "published"
    assert client.put(key(3), data, label="doc-1") == "present"
    assert client.put(key(3), data) == "present"
    assert client.put(key(3), data, label="doc-2") == "published"
    assert client.put_batch([key(3), key(4)], [data, data], label="doc-1") == ["present", "published"]
    target = bytearray(5000)
    assert client.get_into(key(3), target) and target == data


def test_a_batch_says_of_each_key_what_became_of_it(client):
    data = [content(number, 5000 + number) for number in range(40)]
    keys = [key(number) for number in range(40)]
    assert client.put_batch(keys[:30], data[:30], parent="root") == ["published"] * 30
    assert client.put_batch(keys[25:35], data[25:35], parent=key(24)) == ["present"] * 5 + ["published"] * 5
    targets = [bytearray(6000) for _ in keys]
    outcomes = client.get_into_batch(keys, targets)
    assert [got.status for got in outcomes] == ["hit"] * 35 + ["miss"] * 5
    for target, one in zip(targets[:35], data):
        assert target[: len(one)] == one
    assert targets[35] == bytes(6000)


def test_a_prefix_ends_at_the_first_miss(client):
    client.put_batch([key(1), key(2), key(4)], [b"a", b"b", b"d"], parent="independent")
    keys = [key(number) for number in (1, 2, 3, 4)]
    targets = [bytearray(1) for _ in keys]
    each = client.get_into_batch(keys, targets)
    assert [bool(got) for got in each] == [True, True, False, True]
    prefix = client.get_into_batch(keys, [bytearray(1) for _ in keys], prefix=True)
    assert [bool(got) for got in prefix] == [True, True, False, False]
    assert [block is not None for block in client.get_batch(keys, prefix=True)] == [True, True, False, False]
    found = client.lookup(keys)
    assert found.prefix == 2 and found.tiers == ["host", "host", None, "host"]
    hints = {"prompt_tokens": 64, "local_prefix_tokens": 16, "queue_wait_us": 5_000_000, "can_split": True}
    assert client.lookup(keys, raw=True, **hints).tiers == found.tiers
    hinted = client.get_into_batch(keys, [bytearray(1) for _ in keys], prefix=True, **hints)
    assert [bool(got) for got in hinted] == [True, True, False, False]
    assert client.exists_batch(keys) == [True, True, False, True]
    # This node has nothing beside it: there is nothing to weigh, and that is said.
    with pytest.raises(kvtier.Unavailable, match="nothing|neither|no backend"):
        client.explain(keys, **hints)
    # Whoever weighs nothing learns nothing, and that is no error.
    client.report_computed(256, 0.05, before_tokens=16)
    with pytest.raises(kvtier.Invalid):
        client.report_computed(256, -1.0)
    assert client.exists(key(1)) and not client.exists(key(3))
    assert client.advise(keys, "pinned", 60) == client.advise(keys, "expected", 0.5) == client.advise(keys, "closed") == 3
    for advice, seconds in [("forever", 1), ("closed", 1), ("pinned", -1), ("pinned", 3601)]:
        with pytest.raises(kvtier.Invalid):
            client.advise(keys, advice, seconds)
    assert client.advise(keys, "answered", tokens=12) == 3
    wrong = [("answered", {"tokens": -1}), ("answered", {"tokens": 1 << 32}), ("answered", {"seconds": 1, "tokens": 1})]
    for advice, arguments in [*wrong, ("answered", {}), ("closed", {"tokens": 1})]:
        with pytest.raises(kvtier.Invalid):
            client.advise(keys, advice, **arguments)


def test_a_target_that_is_too_small_is_not_touched(client):
    client.put(key(1), b"0123456789")
    client.put(key(2), b"abc")
    small, right = bytearray(b"....."), bytearray(3)
    outcomes = client.get_into_batch([key(1), key(2)], [small, right])
    assert [got.status for got in outcomes] == ["too_small", "hit"]
    assert outcomes[0].length == 10 and not outcomes[0]
    assert small == b"....." and right == b"abc"


def test_any_contiguous_buffer_serves_as_source_and_target(client):
    data = content(3, 4096)

    class Record(ctypes.Structure):
        _fields_ = [("words", ctypes.c_uint64 * 512)]

    mapped = mmap.mmap(-1, 4096)
    makers = {
        "bytearray": lambda: bytearray(4096),
        "doubles": lambda: array.array("d", bytes(4096)),
        "ctypes array": lambda: (ctypes.c_uint8 * 4096)(),
        "ctypes structure": Record,
        "memoryview of ctypes": lambda: memoryview((ctypes.c_uint8 * 4096)()),
        "cast to two dimensions": lambda: memoryview(bytearray(4096)).cast("B").cast("I", [32, 32]),
        "part of a bytearray": lambda: memoryview(bytearray(5000))[300 : 300 + 4096],
        "mapped memory": lambda: mapped,
    }
    assert memoryview((ctypes.c_uint8 * 4096)()).format == "<B"
    for number, (name, make) in enumerate(makers.items(), start=100):
        target = make()
        memoryview(target).cast("B")[:] = bytes(4096) if not isinstance(target, ctypes.Structure) else bytes(4096)
        client.put(key(1), data)
        assert client.get_into(key(1), target).status == "hit", name
        assert memoryview(target).tobytes() == data, name
        assert client.put(key(number), target) == "published", name
        assert bytes(client.get(key(number))) == data, name
    mapped.close()


def test_buffers_that_cannot_serve_are_refused(client):
    client.put(key(1), bytes(100))
    with pytest.raises(BufferError):
        client.get_into(key(1), bytes(100))
    with pytest.raises(BufferError):
        client.get_into(key(1), memoryview(bytearray(200))[::2])
    with pytest.raises(BufferError):
        client.put(key(2), memoryview(bytes(200))[::2])
    with pytest.raises(TypeError):
        client.put(key(2), "text")
    with pytest.raises(TypeError):
        client.get_into(key(1), None)
    assert client.put(key(3), b"") == "invalid"
    assert client.get_into(key(2), bytearray(0)).status == "miss"


def test_a_view_of_a_block_can_be_put_under_another_key(client):
    data = content(5, 70_000)
    client.put(key(1), data)
    with client.get(key(1)) as block:
        assert client.put(key(2), block) == "published"
    assert bytes(client.get(key(2))) == data


def test_a_block_is_read_only(client):
    client.put(key(1), b"abc")
    block = client.get(key(1))
    view = memoryview(block)
    assert view.readonly and view.nbytes == 3
    with pytest.raises(TypeError):
        view[0] = 0
    with pytest.raises(BufferError):
        client.get_into(key(1), block)


def test_a_lease_goes_with_the_block_and_its_views(client):
    client.put(key(1), bytes(10_000))
    assert leases(client) == 0
    block = client.get(key(1))
    assert leases(client) == 1
    view = memoryview(block)
    with pytest.raises(BufferError):
        block.release()
    del block
    gc.collect()
    assert leases(client) == 1, "the view keeps the block"
    del view
    gc.collect()
    eventually(lambda: leases(client) == 0, "the lease is released")
    block = client.get(key(1))
    block.release()
    block.release()
    with pytest.raises(kvtier.Closed):
        memoryview(block)
    eventually(lambda: leases(client) == 0, "the lease is released")
    client.get_into_batch([key(1)] * 3, [bytearray(10_000) for _ in range(3)])
    eventually(lambda: leases(client) == 0, "copies leave no lease")


def test_a_block_outlives_its_client(node, client):
    data = content(9, 50_000)
    with node.client() as other:
        other.put(key(9), data)
        block = other.get(key(9))
        view = memoryview(block)
    assert other.closed
    del other
    gc.collect()
    assert view == data and bytes(block) == data
    assert leases(client) == 1, "closing a client does not take its blocks away"
    del view, block
    gc.collect()
    eventually(lambda: leases(client) == 0, "the lease is released")


def test_deleted_and_invalidated_blocks_are_misses(node, client):
    client.put_batch([key(1), key(2), key(3)], [b"1", b"2", b"3"])
    assert client.delete(key(1)) and not client.delete(key(1))
    assert client.delete_batch([key(1), key(2)]) == [False, True]
    assert client.exists_batch([key(1), key(2), key(3)]) == [False, False, True]
    before = client.generation()
    with node.client(namespace="other") as other:
        other.put(key(3), b"x")
        assert client.invalidate() == before + 1 == client.generation()
        assert client.get(key(3)) is None
        assert other.exists(key(3)), "another namespace is not touched"


def test_the_same_key_in_another_form_or_namespace_is_another_block(node, client):
    client.put(key(1), b"mine")
    with node.client(realization={"model": "m", "dtype": "fp8"}) as form, node.client(namespace="b") as tenant:
        assert not form.exists(key(1)) and not tenant.exists(key(1))
    with node.client(realization={"model": "m", "dtype": "bf16"}) as same:
        assert bytes(same.get(key(1))) == b"mine"


def test_a_flush_brings_blocks_to_nvme_and_they_come_back(node, client):
    data = [content(number, MIB) for number in range(4)]
    client.put_batch([key(number) for number in range(4)], data)
    flushed = client.flush()
    assert flushed.written == 4 and flushed.left_out == 0
    client.close()
    node.kill()
    node.start()
    with node.client() as client:
        assert client.lookup([key(0)]).tiers == ["nvme"]
        target = bytearray(MIB)
        got = client.get_into(key(0), target)
        assert got.tier == "nvme" and target == data[0]
        assert bytes(client.get(key(1))) == data[1]


def test_watchers_learn_of_invalidations_and_confirm_them(node, client):
    sequence, generations = client.watch()
    assert "tenant" not in generations
    generation = client.invalidate()
    later, generations = client.watch(sequence, wait=10)
    assert later != sequence and generations["tenant"] == generation
    assert client.confirm(generation, "engine") == generation
    listed = client.status()["domains"][0]["processors"]
    assert [(one["processor"], one["namespace"], one["confirmed_generation"]) for one in listed] == [
        ("engine", "tenant", generation)
    ]
    with pytest.raises(kvtier.Invalid):
        client.confirm(generation + 5, "engine")


def test_wrong_arguments_say_what_is_wrong(node, client):
    for wrong in (b"short", bytes(17)):
        with pytest.raises(kvtier.Invalid, match="16 bytes"):
            client.exists(wrong)
    for wrong in ("0123456789abcdef", 5, None, bytearray(16)):
        with pytest.raises(TypeError, match="a key is bytes"):
            client.exists(wrong)
    with pytest.raises(kvtier.Invalid, match="2 buffers for 1 keys"):
        client.put_batch([key(1)], [b"a", b"b"])
    with pytest.raises(kvtier.Invalid, match="1 targets for 2 keys"):
        client.get_into_batch([key(1), key(2)], [bytearray(1)])
    with pytest.raises(kvtier.Invalid, match="parent"):
        client.put(key(1), b"a", parent="mother")
    with pytest.raises(TypeError):
        client.put(key(1), b"a", parent=7)
    with pytest.raises(OverflowError):
        client.put(key(1), b"a", tokens=-1)
    with pytest.raises(kvtier.Invalid, match="32 bytes"):
        node.client(realization=b"short")
    with pytest.raises(TypeError, match="realization"):
        node.client(realization="model")
    with pytest.raises(kvtier.Invalid):
        node.client(namespace="")
    with pytest.raises(kvtier.Invalid, match="timeout"):
        node.client(timeout=-1)
    with pytest.raises(TypeError):
        kvtier.Client(node.socket)
    with pytest.raises(kvtier.Denied):
        node.client(token=b"nobody's")
    with pytest.raises(kvtier.Unavailable):
        kvtier.Client(str(node.socket) + "-gone", namespace="t", realization={})
    assert client.exists_batch([]) == [] and client.put_batch([], []) == []


def test_each_kind_of_error_has_a_class():
    kinds = ["Invalid", "Busy", "Unavailable", "Stale", "Corrupt", "Closed", "Internal", "Denied"]
    classes = [getattr(kvtier, kind) for kind in kinds]
    assert len(set(classes)) == 8
    assert all(one.__bases__ == (kvtier.Error,) and one.__module__ == "kvtier" for one in classes)
    assert issubclass(kvtier.Error, Exception)


def test_a_closed_client_raises_closed(node):
    client = node.client()
    assert not client.closed and "tenant" in repr(client)
    client.close()
    client.close()
    assert client.closed and "closed" in repr(client)
    for call in (
        lambda: client.exists(key(1)),
        lambda: client.put(key(1), b"a"),
        lambda: client.get_into(key(1), bytearray(1)),
        client.status,
        client.event_fd,
        client.completed,
        client.invalidate,
    ):
        with pytest.raises(kvtier.Closed):
            call()
