"""The search for tools, with scripts that stand in for compilers and for pip."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from pipeline import toolchain
from pipeline.errors import ToolchainError
from pipeline.files import read_json
from pipeline.toolchain import MINIMUM_CMAKE, Toolchain, find_toolchain

NVCC = """\
#!/bin/sh
case "$*" in
  *--version*) echo "compilation tools, release {release}, V{release}.88"; exit {version_status};;
  *--dryrun*) echo '#$ TOP={root}/bin/..'; exit 0;;
esac
echo "$*" >> "{root}/calls"
{body}
"""
CUOBJDUMP = '#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.1"\n'
GXX = '#!/bin/sh\necho "g++ (Fake) 12.2.0"\n'


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def toolkit(
    root: Path,
    *,
    release: str = "13.0",
    body: str = "exit 0",
    version_status: int = 0,
    sass: str | None = "13.0",
) -> Path:
    for name in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    if sass is not None:
        for tool in ("cuobjdump", "nvdisasm"):
            script(root / "bin" / tool, CUOBJDUMP.format(release=sass))
    text = NVCC.format(release=release, root=root, body=body, version_status=version_status)
    return script(root / "bin" / "nvcc", text)


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a C++ compiler and nothing else; pip has no network."""
    programs = tmp_path / "programs"
    script(programs / "g++", GXX)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    which = shutil.which

    def only_ours(name: str) -> str | None:
        found = which(name, path=str(programs))
        return found if "/" not in name else name

    monkeypatch.setattr(shutil, "which", only_ours)
    monkeypatch.setattr(toolchain, "_installed_toolkits", lambda: iter(()))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "NVCC_CCBIN", "CXX"):
        monkeypatch.delenv(name, raising=False)
    offline = script(programs / "pip", "#!/bin/sh\necho 'no network'\nexit 1\n")
    monkeypatch.setattr(toolchain, "_installer", lambda: [str(offline)])
    return programs


def find(mode: toolchain.Mode, tmp_path: Path, *, need_sass_tools: bool = True) -> Toolchain:
    return find_toolchain(mode, environment=tmp_path / "env", need_sass_tools=need_sass_tools)


def fake_index(programs: Path, monkeypatch: pytest.MonkeyPatch, extra: str = "") -> Path:
    """A pip that puts a small toolkit into its ``--target`` and counts its calls."""
    text = f"""\
#!/bin/sh
echo "$*" >> "{programs}/installs"
root="$2/nvidia/cu13"
mkdir -p "$root/bin" "$root/lib" "$root/include" "$2/nvidia_cuda_nvcc-13.4.92.dist-info"
: > "$root/include/cuda_runtime.h"; : > "$root/lib/libcudart_static.a"
echo runtime > "$root/lib/libcudart.so.13"
for tool in cuobjdump nvdisasm; do
  printf '#!/bin/sh\\necho release 13.4, V13.4.92\\n' > "$root/bin/$tool"
done
printf '#!/bin/sh\\necho "release 13.4, V13.4.92"\\n' > "$root/bin/nvcc"
chmod +x "$root/bin/"*
{extra}
"""
    pip = script(programs / "pip", text)
    monkeypatch.setattr(toolchain, "_installer", lambda: [str(pip)])
    return programs / "installs"


def installs(record: Path) -> int:
    return len(record.read_text().splitlines()) if record.exists() else 0


def test_a_machine_s_toolkit_that_works_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    found = find("auto", tmp_path)
    assert (found.origin, found.nvcc, found.version) == ("system", nvcc, (13, 0, 88))
    assert found.cudart_static == tmp_path / "cuda/lib64/libcudart_static.a"
    assert found.cuobjdump == tmp_path / "cuda/bin/cuobjdump"
    assert found.cmake_version >= MINIMUM_CMAKE
    assert found.driver.startswith("580")
    assert found.host_version == "g++ (Fake) 12.2.0"


def test_a_wrapper_script_leads_to_the_toolkit_that_it_calls(
    tmp_path: Path, bare_machine: Path
) -> None:
    real = toolkit(tmp_path / "cuda")
    wrapper = script(bare_machine / "nvcc", f'#!/bin/sh\nexec "{real}" "$@"\n')
    found = find("system", tmp_path)
    assert found.nvcc == wrapper
    assert found.root == tmp_path / "cuda"


def test_the_compiler_is_tried_for_the_profile_s_architecture_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    find("system", tmp_path)
    find("system", tmp_path)
    calls = (tmp_path / "cuda/calls").read_text().splitlines()
    assert len(calls) == 1
    assert "arch=compute_90a,code=sm_90a" in calls[0]


def test_a_compiler_that_changed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    find("system", tmp_path)
    toolkit(tmp_path / "cuda", release="13.1", sass="13.1")
    assert find("system", tmp_path).version == (13, 1, 88)
    assert len((tmp_path / "cuda/calls").read_text().splitlines()) == 2


def test_no_compiler_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="no CUDA compiler") as caught:
        find("system", tmp_path)
    assert "--toolchain pypi" in caught.value.hint
    assert caught.value.exit_code == 9


def test_a_compiler_that_is_too_old_is_named_with_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "cuda", release="12.4")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(ToolchainError) as caught:
        find("system", tmp_path)
    assert "too old (found 12.4.88, need 12.8)" in caught.value.details


def test_a_compiler_that_cannot_build_shows_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "cuda", body="echo unsupported GNU version; exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(ToolchainError) as caught:
        find("system", tmp_path)
    assert "unsupported GNU version" in caught.value.details


def test_a_compiler_that_does_not_run_shows_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "cuda", version_status=127)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(ToolchainError) as caught:
        find("system", tmp_path)
    assert "does not run" in caught.value.details


def test_a_toolkit_without_the_static_runtime_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "cuda")
    (tmp_path / "cuda/lib64/libcudart_static.a").unlink()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(ToolchainError) as caught:
        find("system", tmp_path)
    assert "libcudart_static.a" in caught.value.details


def test_a_named_compiler_that_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nowhere/nvcc"))
    with pytest.raises(ToolchainError) as caught:
        find("system", tmp_path)
    assert "no such file" in caught.value.details


def test_a_second_toolkit_is_taken_when_the_first_is_of_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "old", release="12.0")
    good = toolkit(tmp_path / "good")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "good"))
    assert find("system", tmp_path).nvcc == good


def test_no_host_compiler_is_said(
    tmp_path: Path, bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "cuda")
    (bare_machine / "g++").unlink()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler"):
        find("system", tmp_path)


def test_auto_installs_a_toolkit_where_there_is_none(
    tmp_path: Path, bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = fake_index(bare_machine, monkeypatch)
    found = find("auto", tmp_path)
    assert (found.origin, found.version) == ("pypi", (13, 4, 92))
    assert (found.root / "lib/libcudart.so").read_text() == "runtime\n"
    assert found.environment["CUDA_HOME"] == str(found.root)
    assert "cuda-toolkit[cccl,crt,cudart,cuobjdump,nvcc,nvdisasm,nvvm]>=13.2,<14" in (
        record.read_text()
    )


def test_an_installed_toolkit_is_used_again_offline(
    tmp_path: Path, bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = fake_index(bare_machine, monkeypatch)
    first = find("pypi", tmp_path)
    monkeypatch.setattr(toolchain, "_installer", lambda: ["/bin/false"])
    assert find("pypi", tmp_path) == first
    assert installs(record) == 1


@pytest.mark.parametrize("damage", ["cut", "missing", "stamp"])
def test_a_damaged_install_is_noticed_and_made_again(
    tmp_path: Path, bare_machine: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    record = fake_index(bare_machine, monkeypatch)
    found = find("pypi", tmp_path)
    if damage == "cut":
        found.nvcc.write_text("")
    elif damage == "missing":
        (found.root / "include/cuda_runtime.h").unlink()
    else:
        (tmp_path / "env/cuda-toolkit/installed.json").write_text("{")
    assert find("pypi", tmp_path).version == (13, 4, 92)
    assert installs(record) == 2


def test_an_install_that_fails_half_way_leaves_nothing_to_trust(
    tmp_path: Path, bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_index(bare_machine, monkeypatch, extra="echo connection lost; exit 1")
    with pytest.raises(ToolchainError, match="could not be installed") as caught:
        find("pypi", tmp_path)
    assert "connection lost" in caught.value.details
    assert "network" in caught.value.hint
    assert not list((tmp_path / "env").glob("**/nvcc"))
    record = fake_index(bare_machine, monkeypatch)
    assert find("pypi", tmp_path).origin == "pypi"
    assert installs(record) == 2


def test_auto_offline_says_why_the_machine_s_compiler_was_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "cuda", release="11.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(ToolchainError) as caught:
        find("auto", tmp_path)
    assert "too old (found 11.8.88" in caught.value.details
    assert "no network" in caught.value.details


@pytest.mark.parametrize("sass", [None, "12.9"])
def test_tools_that_a_toolkit_lacks_or_has_too_old_are_installed(
    tmp_path: Path, bare_machine: Path, monkeypatch: pytest.MonkeyPatch, sass: str | None
) -> None:
    toolkit(tmp_path / "cuda", sass=sass)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    record = fake_index(bare_machine, monkeypatch)
    found = find("auto", tmp_path)
    assert found.origin == "system"
    assert found.cuobjdump is not None
    assert found.cuobjdump.is_relative_to(tmp_path / "env/cuda-tools")
    assert "cuda-toolkit[cuobjdump,nvdisasm]" in record.read_text()
    find("auto", tmp_path)
    assert installs(record) == 1


def test_nothing_is_installed_for_tools_that_are_not_needed(
    tmp_path: Path, bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "cuda", sass=None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    record = fake_index(bare_machine, monkeypatch)
    assert find("auto", tmp_path, need_sass_tools=False).cuobjdump is None
    assert installs(record) == 0


def test_the_install_records_what_came(
    tmp_path: Path, bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_index(bare_machine, monkeypatch)
    find("pypi", tmp_path)
    stamp = read_json(tmp_path / "env/cuda-toolkit/installed.json")
    assert stamp["versions"] == {"nvidia_cuda_nvcc": "13.4.92"}


def test_cmake_and_ninja_come_from_the_running_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    found = find("system", tmp_path)
    assert found.cmake.is_relative_to(sys.prefix)
    assert found.ninja.is_relative_to(sys.prefix)


def test_an_old_cmake_is_refused_with_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    old = script(tmp_path / "old/cmake", '#!/bin/sh\necho "cmake version 3.25.1"\n')
    monkeypatch.setattr(toolchain, "_programs", lambda name, constant: iter([old]))
    with pytest.raises(ToolchainError, match=r"no CMake 3\.31 or newer .*3\.25\.1"):
        find("system", tmp_path)


def test_installed_toolkits_are_tried_newest_first(tmp_path: Path) -> None:
    for name in ("cuda-12.9", "cuda-13.0", "cuda-9.2", "cuda-samples"):
        (tmp_path / name).mkdir()
    found = [path.parents[1].name for path in REAL_TOOLKITS(tmp_path)]
    assert found == ["cuda", "cuda-13.0", "cuda-12.9", "cuda-9.2"]


REAL_TOOLKITS = toolchain._installed_toolkits
