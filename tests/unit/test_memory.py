"""What a machine gives, read from made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.memory import find_machine

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "proc/meminfo", f"MemTotal: {24 << 20} kB\nMemAvailable: {22 << 20} kB\n")
    return tmp_path


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_limits_all_of_the_machine_counts(root: Path) -> None:
    machine = find_machine(root)
    assert machine.memory_available == 22 * GIB
    assert machine.memory_total == 24 * GIB
    assert machine.cores >= 1


def test_a_limit_of_the_group_or_a_parent_binds_in_version_2(root: Path) -> None:
    put(root, "proc/self/cgroup", "0::/a/b\n")
    put(root, "sys/fs/cgroup/a/memory.max", f"{8 * GIB}\n")
    put(root, "sys/fs/cgroup/a/memory.current", f"{3 * GIB}\n")
    put(root, "sys/fs/cgroup/a/memory.stat", f"anon 1\ninactive_file {GIB}\n")
    put(root, "sys/fs/cgroup/a/b/memory.max", "max\n")
    put(root, "sys/fs/cgroup/a/b/cpu.max", "100000 100000\n")
    machine = find_machine(root)
    assert machine.memory_total == 8 * GIB
    assert machine.memory_available == 6 * GIB
    assert machine.cores == 1


def test_a_limit_binds_in_version_1(root: Path) -> None:
    put(root, "proc/self/cgroup", "4:memory:/job\n2:cpu,cpuacct:/job\n1:name=systemd:/\n")
    put(root, "sys/fs/cgroup/memory/job/memory.limit_in_bytes", f"{4 * GIB}\n")
    put(root, "sys/fs/cgroup/memory/job/memory.usage_in_bytes", f"{GIB}\n")
    put(root, "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "150000\n")
    put(root, "sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000\n")
    machine = find_machine(root)
    assert machine.memory_available == 3 * GIB
    assert machine.cores == 1


def test_the_huge_number_that_means_no_limit_is_none(root: Path) -> None:
    put(root, "proc/self/cgroup", "4:memory:/\n")
    put(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert find_machine(root).memory_total == 24 * GIB


def test_a_machine_without_proc_still_has_an_answer(tmp_path: Path) -> None:
    assert find_machine(tmp_path).memory_available > 0
