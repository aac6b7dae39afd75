"""The manylinux policy, asked of auditwheel about small libraries compiled here."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("auditwheel", reason="pip install '.[wheel]'")

from pipeline import wheel_policy
from pipeline.errors import WheelError
from pipeline.process import CommandError
from pipeline.wheel_policy import newest_needs, policy_of

GXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(GXX is None, reason="no g++")

NEW_SYMBOL = "int brand_new(void) { return 1; }\n"


def compiled(target: Path, source: str, *options: str) -> Path:
    """A shared library from C."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_suffix(".c")
    file.write_text(source)
    assert GXX is not None
    command = [GXX, "-x", "c", "-shared", "-fPIC", str(file), "-x", "none", "-o", str(target)]
    subprocess.run([*command, *options], check=True)
    return target


def wheel_of(library: Path) -> Path:
    """A wheel with nothing but ``library`` in it."""
    info = "w4a16-0.1.0.dist-info"
    files = {
        f"{info}/METADATA": b"Metadata-Version: 2.4\nName: w4a16\nVersion: 0.1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\n"
        b"Tag: py3-none-linux_x86_64\n",
        "w4a16/lib/libw4a16.so": library.read_bytes(),
    }
    lines = [
        f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items()
    ]
    files[f"{info}/RECORD"] = f"{''.join(lines)}{info}/RECORD,,\n".encode()
    path = library.parent / "w4a16-0.1.0-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def needing_new_libc(folder: Path) -> Path:
    """A library that asks libc for a version that no system has."""
    script = folder / "future.map"
    script.write_text("GLIBC_2.9999 { global: brand_new; };\n")
    stub = compiled(
        folder / "stub" / "libc.so.6",
        NEW_SYMBOL,
        *("-nostdlib", f"-Wl,--version-script={script}", "-Wl,-soname,libc.so.6"),
    )
    source = "int brand_new(void);\nint w4a16_new(void) { return brand_new(); }\n"
    return compiled(folder / "new" / "libw4a16.so", source, "-nostdlib", str(stub))


def test_a_plain_library_fits_a_manylinux_policy(tmp_path: Path) -> None:
    library = compiled(tmp_path / "libw4a16.so", "int w4a16_one(void) { return 1; }\n")
    assert policy_of(wheel_of(library), library).startswith("manylinux_2_")


def test_a_symbol_newer_than_every_policy_is_named(tmp_path: Path) -> None:
    library = needing_new_libc(tmp_path)
    with pytest.raises(WheelError, match="fits no manylinux policy") as caught:
        policy_of(wheel_of(library), library)
    assert "needs libc.so.6 GLIBC_2.9999 for brand_new" in caught.value.details
    assert "older system" in caught.value.hint


def test_a_library_that_no_system_has_is_named(tmp_path: Path) -> None:
    other = compiled(tmp_path / "libother.so", NEW_SYMBOL, "-Wl,-soname,libother.so.7")
    source = "int brand_new(void);\nint w4a16_new(void) { return brand_new(); }\n"
    library = compiled(tmp_path / "libw4a16.so", source, str(other))
    with pytest.raises(WheelError) as caught:
        policy_of(wheel_of(library), library)
    assert "needs libother.so.7" in caught.value.details


def test_only_the_newest_version_of_each_interface_is_listed(tmp_path: Path) -> None:
    source = (
        "#include <string>\n#include <thread>\n#include <cmath>\n"
        'extern "C" int w4a16_run(int n) {\n'
        "    std::string text(n, 'x');\n"
        "    std::thread([&] { text.append(1, 'y'); }).join();\n"
        "    return (int)text.size() + (int)std::exp((double)n);\n}\n"
    )
    file = tmp_path / "a.cpp"
    file.write_text(source)
    library = tmp_path / "libw4a16.so"
    assert GXX is not None
    subprocess.run([GXX, "-shared", "-fPIC", str(file), "-o", str(library)], check=True)
    needs = newest_needs(library)
    families = [(need.library, need.version.rpartition("_")[0]) for need in needs]
    assert len(families) == len(set(families))
    assert ("libstdc++.so.6", "GLIBCXX") in families
    assert all(need.symbols for need in needs)


def test_a_wheel_that_auditwheel_cannot_read_is_a_clear_error(tmp_path: Path) -> None:
    wheel = tmp_path / "w4a16-0.1.0-py3-none-linux_x86_64.whl"
    wheel.write_bytes(b"no archive")
    with pytest.raises(WheelError, match="auditwheel cannot read"):
        policy_of(wheel, Path(sys.executable))


@pytest.mark.parametrize("said", ["", "{}", '{"error": "no ELF file"}', "[]"])
def test_words_of_auditwheel_that_mean_nothing_are_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str
) -> None:
    def answer(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, said, "")

    monkeypatch.setattr(wheel_policy, "run", answer)
    with pytest.raises(WheelError) as caught:
        policy_of(tmp_path / "a.whl", Path(sys.executable))
    assert said in caught.value.details


def test_instructions_of_newer_processors_are_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = {"overall_tag": "linux_x86_64", "sym_tag": "manylinux_2_34_x86_64"}

    def answer(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        text = json.dumps({**said, "unsupported_isa": True})
        return subprocess.CompletedProcess([], 0, text, "")

    monkeypatch.setattr(wheel_policy, "run", answer)
    with pytest.raises(WheelError, match="linux_x86_64") as caught:
        policy_of(tmp_path / "a.whl", Path(os.path.realpath(sys.executable)))
    assert "instructions" in caught.value.details


def test_a_failing_auditwheel_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        raise CommandError("python failed (exit status 1)", output="No module named auditwheel")

    monkeypatch.setattr(wheel_policy, "run", fail)
    with pytest.raises(WheelError) as caught:
        policy_of(tmp_path / "a.whl", Path(sys.executable))
    assert "No module named auditwheel" in caught.value.details
