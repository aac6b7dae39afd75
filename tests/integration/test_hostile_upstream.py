"""Upstream trees that are broken or mean harm: refused, shown, and without effect outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.integration.forge import Result, Site, contents
from tests.upstream import Upstream, write_upstream

Fresh = Callable[..., Site]
HERE = Path(__file__).resolve().parent.parent / "upstream"
KERNELS = "cpp/tensorrt_llm/kernels/cutlass_kernels"
GENERATOR = f"{KERNELS}/python/generate_kernels.py"
LAUNCHER = f"{KERNELS}/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.inl"
MAIN = 'if __name__ == "__main__":\n    main()\n'


def upstream_text(path: str) -> str:
    return (HERE / "trtllm" / path).read_text(encoding="utf-8")


def generator(old: str, new: str) -> Mapping[str, str]:
    """The miniature's generator with one change."""
    text = upstream_text(GENERATOR)
    assert text.count(old) == 1, old
    return {GENERATOR: text.replace(old, new)}


def ends_with(code: str) -> Mapping[str, str]:
    """The generator with ``code`` after its work."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    return generator(MAIN, MAIN + lines)


def refused(small: Site, upstream: Upstream, code: int, *texts: str) -> Result:
    """What a good run left stays when ``upstream`` comes in its place."""
    kept = (".state", "generated")
    before = contents(small.folder, without=kept, times=True)
    result = small.elsewhere(small.folder, upstream=upstream).extract(code=code)
    assert result.says("error: ", *texts, "What to do: "), result.shown
    assert contents(small.folder, without=kept, times=True) == before
    return result


# --- the generator -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "texts"),
    [
        ("raise RuntimeError('no kernels today')", ("generator failed", "no kernels today")),
        ("raise SystemExit(3)", ("generator failed", "exit status 3")),
        ("import no_such_module", ("generator failed", "no_such_module")),
        ("print('Warning: 3 skipped')", ("printed something unforeseen", "Warning: 3 skipped")),
        (
            "open(os.path.join(sys.argv[2], 'notes.txt'), 'w').write('x')",
            ("files of a kind that is not known", "notes.txt"),
        ),
        (
            "os.symlink('/etc/passwd', os.path.join(sys.argv[2], 'passwd.cu'))",
            ("files of a kind that is not known", "passwd.cu"),
        ),
        ("import shutil; shutil.rmtree(os.path.join(sys.argv[2], 'gemm'))", ()),
        (
            "import shutil; [shutil.rmtree(e.path) for e in os.scandir(sys.argv[2])]",
            ("wrote nothing",),
        ),
        ("open(__file__, 'a').write('#')", ("wrote into its own checkout",)),
    ],
)
def test_a_generator_that_fails_or_does_something_unforeseen_stops_the_run(
    small: Site, tmp_path: Path, code: str, texts: tuple[str, ...]
) -> None:
    upstream = write_upstream(tmp_path / "bad", edits=ends_with(f"import os, sys\n{code}"))
    refused(small, upstream, 7 if texts else 8, *texts)
    assert small.extract().says("render: unchanged, skipped") or not texts


def test_a_generator_does_not_see_what_is_installed_or_in_the_environment(
    small: Site, tmp_path: Path
) -> None:
    code = "import os\nassert 'SECRET_TOKEN' not in os.environ, 'seen'\n"
    upstream = write_upstream(tmp_path / "curious", edits=ends_with(code))
    site = small.elsewhere(small.folder, upstream=upstream)
    site.run("extract", env={"SECRET_TOKEN": "1"})


# --- instantiations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{shape(cta)}, {shape(cluster)},", "{shape(cta)}, decltype(auto_cluster({cluster[0]})),"),
        ("{quant_op}, tensorrt_llm", "tensorrt_llm"),
        ("{mainloop}, {epilogue}> (\nconst", "{mainloop}, {epilogue}, int> (\nconst"),
    ],
)
def test_an_instantiation_that_cannot_be_parsed_stops_the_run_and_is_shown(
    small: Site, tmp_path: Path, old: str, new: str
) -> None:
    upstream = write_upstream(tmp_path / "bad", edits=generator(old, new))
    result = refused(small, upstream, 8, "template void sm90_generic_mixed_gemm_kernelLauncher<")
    assert result.says("gemm/90/cutlass_kernel_file_gemm_sm90_")


def test_two_instantiations_under_one_name_stop_the_run(small: Site, tmp_path: Path) -> None:
    edit = generator("CLUSTERS = [(1, 1, 1), (2, 1, 1)]", "CLUSTERS = [(1, 1, 1), (1, 1, 1)]")
    upstream = write_upstream(tmp_path / "bad", edits=edit)
    refused(small, upstream, 8, "two instantiations would both be sm90:64x32x64:1x1x1")


# --- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("cpp/tensorrt_llm/common/evil.h", "/etc/passwd"),
        ("cpp/tensorrt_llm/common/evil", "../../../../../../../../etc"),
        (f"{KERNELS}/evil.inl", "../../../../../outside.h"),
        (f"{KERNELS}/circle", "circle"),
    ],
)
def test_a_link_that_leads_outside_the_repository_is_refused_and_named(
    small: Site, tmp_path: Path, path: str, target: str
) -> None:
    upstream = write_upstream(tmp_path / "bad", symlinks={path: target})
    refused(small, upstream, 14, path, "is a link that leads outside its repository")


def test_a_link_in_cutlass_that_leads_outside_is_refused_too(small: Site, tmp_path: Path) -> None:
    links = {"include/cutlass/evil.h": "/etc/passwd"}
    upstream = write_upstream(tmp_path / "bad", cutlass_symlinks=links)
    refused(small, upstream, 14, "include/cutlass/evil.h is a link that leads outside")


def test_a_link_inside_the_repository_is_followed_and_vendored_as_a_file(
    small: Site, fresh: Fresh, tmp_path: Path
) -> None:
    common = "cpp/include/tensorrt_llm/common"
    upstream = write_upstream(
        tmp_path / "linked",
        edits={LAUNCHER: '#include "tensorrt_llm/common/alias.h"\n' + upstream_text(LAUNCHER)},
        symlinks={f"{common}/alias.h": "logger.h"},
    )
    site = fresh(upstream=upstream)
    site.extract()
    links = [path for path in site.source.rglob("*") if path.is_symlink()]
    assert links == []


@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_an_include_of_a_file_outside_the_repository_is_refused_and_not_copied(
    small: Site, fresh: Fresh, tmp_path: Path, how: str
) -> None:
    secret = tmp_path / "secret.h"
    secret.write_text("// the secret of this machine\n")
    name = str(secret) if how == "absolute" else "../" * 30 + str(secret).lstrip("/")
    upstream = write_upstream(
        tmp_path / "bad", edits={LAUNCHER: f'#include "{name}"\n' + upstream_text(LAUNCHER)}
    )
    refused(small, upstream, 14, f"upstream includes {secret}, outside its repository")
    site = fresh(upstream=upstream)
    site.extract(code=14)
    assert not site.source.exists()


def test_an_include_of_the_machines_password_file_is_refused(small: Site, tmp_path: Path) -> None:
    text = '#if 0\n#endif\n#include "/etc/passwd"\n' + upstream_text(LAUNCHER)
    upstream = write_upstream(tmp_path / "bad", edits={LAUNCHER: text})
    site = small.elsewhere(small.folder, upstream=upstream)
    before = contents(small.source, times=True)
    # 14 where the file goes through the preprocessor, 10 where its text does not.
    result = site.extract(code=None)
    assert result.code in (10, 14), result.shown
    assert contents(small.source, times=True) == before


def test_a_header_that_upstream_lacks_is_named(small: Site, tmp_path: Path) -> None:
    text = '#include "tensorrt_llm/not_there.h"\n' + upstream_text(LAUNCHER)
    upstream = write_upstream(tmp_path / "bad", edits={LAUNCHER: text})
    refused(small, upstream, 10, "includes tensorrt_llm/not_there.h", "stand-in")


def test_a_repository_with_hooks_and_filters_runs_none_of_them(
    small: Site, fresh: Fresh, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    upstream = write_upstream(
        tmp_path / "hooked", edits={".gitattributes": "* filter=evil diff=evil\n"}
    )
    config = upstream.trtllm / ".git/config"
    with config.open("a") as stream:
        stream.write(f'[filter "evil"]\n\tsmudge = touch {mark}; cat\n\tclean = touch {mark}\n')
        stream.write(f"[core]\n\tfsmonitor = touch {mark}\n\thooksPath = {tmp_path / 'hooks'}\n")
    for name in ("post-checkout", "reference-transaction", "post-index-change"):
        hook = tmp_path / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\ntouch {mark}\n")
        hook.chmod(0o755)
    site = fresh(upstream=upstream, own_vendor=True)
    site.extract()
    third_party = "third_party"
    assert contents(site.source / third_party) == contents(small.source / third_party)
    assert not mark.exists()
