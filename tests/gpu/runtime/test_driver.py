"""The package's own layer over the driver, on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from w4a16 import driver
from w4a16.errors import DeviceError
from w4a16.library import LIBRARY

from ..reference import torch

DEVICE = 0


def read(address: int, count: int, dtype: str = "uint8", stream: int = 0) -> Any:
    host = np.empty(count, dtype)
    driver.copy_to_host(host, address, stream)
    return host


def test_the_driver_describes_the_gpu_as_torch_and_the_library_do() -> None:
    properties = torch.cuda.get_device_properties(DEVICE)
    assert driver.device_count() == torch.cuda.device_count()
    assert driver.device_name(DEVICE) == properties.name == LIBRARY.device(DEVICE).name
    assert driver.sm_count(DEVICE) == properties.multi_processor_count
    assert driver.compute_capability(DEVICE) == (properties.major, properties.minor)
    assert driver.l2_bytes(DEVICE) == properties.L2_cache_size
    assert abs(driver.total_memory(DEVICE) - properties.total_memory) < 1 << 20
    assert driver.driver_version() == LIBRARY.device(DEVICE).driver_version
    assert driver.clock_khz(DEVICE) > 100_000
    assert driver.memory_clock_khz(DEVICE) > 100_000
    assert driver.compute_mode(DEVICE) in ("default", "exclusive")


def test_a_device_that_is_not_there_is_named() -> None:
    for device in (driver.device_count(), -1, 1000):
        with pytest.raises(DeviceError, match=f"there is no device {device}"):
            driver.device_name(device)
        with (
            pytest.raises(DeviceError, match=f"there is no device {device}"),
            driver.use_device(device),
        ):
            pass


def test_memory_is_copied_set_and_freed_in_the_order_of_a_stream() -> None:
    with driver.use_device(DEVICE), driver.Stream.create() as stream:
        for where in (0, stream.handle):
            address = driver.allocate(1 << 20, where)
            assert address % 256 == 0
            assert driver.device_of(address) == DEVICE
            values = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
            driver.copy_to_device(address, values, where)
            driver.memset(address + 100, 0x5A, 50, where)
            driver.copy(address + 1000, address, 200, where)
            driver.copy_2d(address + 4096, 64, address + 8192, 128, 32, 5, where)
            expected = values.copy()
            expected[100:150] = 0x5A
            expected[1000:1200] = expected[:200]
            for row in range(5):
                source = 8192 + 128 * row
                expected[4096 + 64 * row : 4096 + 64 * row + 32] = expected[source : source + 32]
            assert np.array_equal(read(address, 1 << 20, stream=where), expected)
            driver.free(address, where)
        assert driver.allocate(0, 0) == 0
        driver.free(0, 0)


def test_host_memory_is_no_device_memory() -> None:
    assert driver.device_of(np.zeros(100).ctypes.data) is None


def test_memory_comes_from_a_pool_of_the_packages_own_and_is_reused() -> None:
    with driver.use_device(DEVICE):
        assert driver.has_pools(DEVICE)
        first = driver.allocate(32 << 20, 0)
        driver.free(first, 0)
        torch.cuda.synchronize()
        free, _ = driver.memory_info()
        second = driver.allocate(32 << 20, 0)
        torch.cuda.synchronize()
        assert abs(driver.memory_info().free - free) < 4 << 20  # kept, not given back
        driver.free(second, 0)


def test_too_large_an_allocation_says_what_is_free_and_harms_nothing() -> None:
    with driver.use_device(DEVICE):
        with pytest.raises(DeviceError, match=r"1099511627776 bytes were asked for, \d+ of \d+"):
            driver.allocate(1 << 40, 0)
        address = driver.allocate(1024, 0)
        driver.memset(address, 1, 1024, 0)
        assert set(read(address, 1024).tolist()) == {1}
        driver.free(address, 0)


def test_a_block_makes_the_primary_context_current_and_restores_what_was() -> None:
    torch.zeros(1, device="cuda")
    with driver.use_device(DEVICE) as device:
        assert device == driver.current_device() == torch.cuda.current_device()
        # Memory of torch, which uses the primary context, is there.
        tensor = torch.arange(10, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        assert read(tensor.data_ptr(), 10).tolist() == list(range(10))


def test_a_thread_without_a_context_gets_one_for_the_block() -> None:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(driver.current_device())
            with driver.use_device(DEVICE):
                address = driver.allocate(64, 0)
                driver.memset(address, 3, 64, 0)
                found.append(set(read(address, 64).tolist()))
                driver.free(address, 0)
            with pytest.raises(DeviceError, match="make a device current"):
                driver.allocate(64, 0)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0, {3}]


def test_many_threads_allocate_and_free_at_once() -> None:
    problems: list[str] = []

    def work(number: int) -> None:
        random = np.random.default_rng(number)
        try:
            with driver.use_device(DEVICE), driver.Stream.create() as stream:
                for _ in range(30):
                    size = int(random.integers(1, 1 << 18))
                    address = driver.allocate(size, stream)
                    driver.memset(address, number, size, stream)
                    if set(read(address, size, stream=stream.handle).tolist()) != {number}:
                        problems.append(f"{number}: {size} bytes were overwritten")
                    driver.free(address, stream)
        except BaseException as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_events_measure_time_and_order_streams() -> None:
    with driver.use_device(DEVICE), driver.Stream.create() as one, driver.Stream.create() as two:
        size = 1 << 28
        address = driver.allocate(size, one)
        begin, end = driver.Event.create(), driver.Event.create()
        begin.record(one)
        for value in range(20):
            driver.memset(address, value, size, one)
        end.record(one)
        driver.order(one, two)
        host = np.empty(1000, np.uint8)
        driver.copy_to_host(host, address + size - 1000, two)
        assert set(host.tolist()) == {19}
        end.synchronize()
        assert 0.1 < end.elapsed_ms(begin) < 1000
        two.wait(end)
        two.synchronize()
        driver.free(address, one)
        one.synchronize()
        for event in (begin, end):
            event.destroy()


def test_a_captured_graph_runs_when_it_is_launched_and_not_before() -> None:
    with driver.use_device(DEVICE), driver.Stream.create() as stream:
        address = driver.allocate(1000, stream)
        driver.memset(address, 1, 1000, stream)
        with driver.capture(stream) as captured:
            assert driver.is_capturing()
            assert driver.is_capturing(stream)
            driver.memset(address, 2, 1000, stream)
            with pytest.raises(DeviceError, match="graph is being captured"):
                read(address, 1000, stream=stream.handle)
            with pytest.raises(DeviceError, match="after the with block"):
                _ = captured.graph
        assert not driver.is_capturing()
        assert set(read(address, 1000, stream=stream.handle).tolist()) == {1}
        with captured.graph as graph:
            graph.launch(stream)
            assert set(read(address, 1000, stream=stream.handle).tolist()) == {2}
            driver.memset(address, 3, 1000, stream)
            graph.launch(stream)
            assert set(read(address, 1000, stream=stream.handle).tolist()) == {2}
        driver.free(address, stream)


def test_memory_that_is_allocated_in_a_capture_is_the_graphs() -> None:
    with driver.use_device(DEVICE), driver.Stream.create() as stream:
        target = driver.allocate(4096, stream)
        driver.memset(target, 0, 4096, stream)
        with driver.capture(stream) as captured:
            kept = driver.allocate(4096, stream)
            temporary = driver.allocate(1 << 20, stream)
            driver.memset(temporary, 7, 4096, stream)
            driver.copy(kept, temporary, 4096, stream)
            driver.free(temporary, stream)
            driver.copy(target, kept, 4096, stream)
        with captured.graph as graph:
            for _ in range(5):  # what is kept does not make the second launch an error
                driver.memset(target, 0, 4096, stream)
                graph.launch(stream)
                assert set(read(target, 4096, stream=stream.handle).tolist()) == {7}
        driver.free(target, stream)


def test_a_block_that_fails_in_a_capture_leaves_the_stream_usable() -> None:
    with driver.use_device(DEVICE), driver.Stream.create() as stream:
        address = driver.allocate(100, stream)
        with pytest.raises(KeyError), driver.capture(stream):
            _memset_and_fail(address, stream)
        assert not driver.is_capturing(stream)
        driver.memset(address, 4, 100, stream)
        assert set(read(address, 100, stream=stream.handle).tolist()) == {4}
        driver.free(address, stream)


def _memset_and_fail(address: int, stream: driver.Stream) -> None:
    driver.memset(address, 1, 100, stream)
    raise KeyError


def test_torchs_captures_are_seen() -> None:
    stream = torch.cuda.Stream()
    value = torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        assert not driver.is_capturing()
        with torch.cuda.graph(graph, stream=stream):
            value += 1
            assert driver.is_capturing()
            assert driver.is_capturing(stream.cuda_stream)
            assert driver.capture_id(stream.cuda_stream) is not None
        assert not driver.is_capturing()
    graph.replay()
    torch.cuda.synchronize()
    assert value.tolist() == [1.0] * 8


def test_ordering_never_spoils_a_capture() -> None:
    with driver.use_device(DEVICE), driver.Stream.create() as one, driver.Stream.create() as two:
        address = driver.allocate(100, one)
        driver.memset(address, 1, 100, one)
        one.synchronize()
        with driver.capture(two) as captured:
            driver.order(one, two)
            driver.order(0, two)
            driver.order(two, one)
            driver.order(two, driver.own_stream())
            driver.memset(address, 2, 100, two)
        with captured.graph as graph:
            graph.launch(two)
        assert set(read(address, 100, stream=two.handle).tolist()) == {2}
        driver.free(address, two)


def test_a_forked_child_is_told_to_spawn() -> None:
    code = """
import os, sys
from w4a16 import driver
from w4a16.arrays import DeviceArray
array = DeviceArray(4)
child = os.fork()
if child == 0:
    try:
        driver.device_count()
    except driver.DeviceError as error:
        del array
        os._exit(0 if "spawn" in str(error) else 2)
    os._exit(3)
_, status = os.waitpid(child, 0)
assert array.numpy().shape == (4,)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    root = Path(driver.__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def test_a_process_ends_quietly_with_arrays_and_streams_alive() -> None:
    code = """
import numpy as np
from w4a16 import driver
from w4a16.arrays import DeviceArray
driver.use_device(0).__enter__()
stream = driver.Stream.create()
arrays = [DeviceArray.from_numpy(np.zeros(1000), stream=stream.handle) for _ in range(3)]
capsule = arrays[0].__dlpack__()
"""
    root = Path(driver.__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
