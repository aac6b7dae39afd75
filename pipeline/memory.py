"""What this machine can give: memory and cores, within the limits of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 1 << 60


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Cores and bytes of memory at hand."""

    cores: int
    memory_available: int
    memory_total: int


def find_machine(root: Path = Path("/")) -> Machine:
    """Measure the machine; ``root`` stands for the file system's root in tests."""
    available, total = _meminfo(root / "proc/meminfo")
    cores = _affinity()
    for group in _groups(root):
        limit, used = _memory_limit(group)
        if limit is not None:
            total = min(total, limit)
            available = min(available, max(0, limit - used))
        quota = _cpu_quota(group)
        if quota is not None:
            cores = min(cores, max(1, int(quota)))
    return Machine(cores=cores, memory_available=available, memory_total=total)


def _affinity() -> int:
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on every Unix
        return os.cpu_count() or 1


def _meminfo(path: Path) -> tuple[int, int]:
    figures = {}
    for line in _read(path).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            figures[name] = int(words[0]) * 1024
    total = figures.get("MemTotal", 8 << 30)
    return figures.get("MemAvailable", figures.get("MemFree", total // 2)), total


def _groups(root: Path) -> Iterator[Path]:
    """The control group folders that bind this process, its own and their parents, v1 and v2."""
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        controllers, inner = parts[1].split(","), parts[2].strip("/")
        if controllers == [""]:
            mounts = [base, base / "unified"]
        else:
            mounts = [base / name for name in controllers if name in ("memory", "cpu")]
        for mount in mounts:
            folder = mount / inner
            while folder != mount.parent:
                yield folder
                folder = folder.parent


def _memory_limit(group: Path) -> tuple[int | None, int]:
    for limit_name, used_name, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        text = _read(group / limit_name).strip()
        if text.isdigit() and int(text) < _NO_LIMIT:
            used = _read(group / used_name).strip()
            cached = 0
            for line in _read(group / "memory.stat").splitlines():
                name, _, value = line.partition(" ")
                if name == cache_key and value.strip().isdigit():
                    cached = int(value)
            return int(text), max(0, int(used) - cached) if used.isdigit() else 0
    return None, 0


def _cpu_quota(group: Path) -> float | None:
    words = _read(group / "cpu.max").split()
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
        return int(words[0]) / int(words[1])
    quota = _read(group / "cpu.cfs_quota_us").strip()
    period = _read(group / "cpu.cfs_period_us").strip()
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
