# SPDX-License-Identifier: Apache-2.0
"""Writes the miniature upstream as two git repositories, the same commits every time."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

Shape = Literal["classic", "modern"]
"""How a TensorRT-LLM tree is laid out: `classic` as v1.0.0 is (CUTLASS a submodule, namespaces
spelled out), `modern` as later ones are (CUTLASS's tag in 3rdparty/fetch_content.json, an inline
namespace opened by macros)."""

HERE = Path(__file__).parent
GENERATOR = "cpp/tensorrt_llm/kernels/cutlass_kernels/python/generate_kernels.py"
CUTLASS_TAGS = ("v4.0.0", "v4.4.2")
RELEASES: Mapping[Shape, tuple[str, str]] = {
    "classic": ("v1.0.0", "v1.1.0"),
    "modern": ("v1.3.0", "v1.4.0"),
}
OLD_RELEASE = "v0.8.0"

_GITMODULES = """\
[submodule "3rdparty/cutlass"]
	path = 3rdparty/cutlass
	url = ../cutlass
"""

# A pointer to a large file that nobody may ask for. It is not a file beside this one, lest git-lfs
# take this project's own checkout for one that has such files.
_LFS = {
    ".gitattributes": "*cubin.cpp filter=lfs diff=lfs merge=lfs -text\n",
    "cpp/tensorrt_llm/kernels/decoderMaskedMultiheadAttention/cubin/xqa_cubin.cpp": (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064}\nsize 1048576\n"
    ),
}

_GRID_DEPENDENCY_H = """\
// SPDX-License-Identifier: Apache-2.0
// New in this release: programmatic dependent launch, of which the miniature has none.
#pragma once
"""

_CONFIG_H = """\
// SPDX-License-Identifier: Apache-2.0
// Opens and closes the project's namespace, with a version in the symbols' names.
#pragma once

#define TRTLLM_NAMESPACE_BEGIN namespace tensorrt_llm { inline namespace _v1 {
#define TRTLLM_NAMESPACE_END }}
"""

_NO_EDITS: Mapping[str, str | None] = MappingProxyType({})
_NO_LINKS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Where the repositories are and what to ask them for."""

    trtllm: Path
    cutlass: Path
    ref: str
    cutlass_commit: str  # what `ref` pins
    next_ref: str  # the release after it, see _next_release
    next_cutlass_commit: str
    old_ref: str  # a release without a generator


@dataclass(frozen=True, kw_only=True)
class _File:
    data: bytes
    mode: str = "100644"  # 120000 is a link to `data`


_Tree = dict[str, _File]


@dataclass(frozen=True, kw_only=True)
class _Commit:
    tag: str
    tree: _Tree
    gitlinks: Mapping[str, str]  # path to commit


def write_upstream(
    target: Path,
    *,
    shape: Shape = "classic",
    edits: Mapping[str, str | None] = _NO_EDITS,
    symlinks: Mapping[str, str] = _NO_LINKS,
    cutlass_edits: Mapping[str, str | None] = _NO_EDITS,
    cutlass_symlinks: Mapping[str, str] = _NO_LINKS,
    bare: bool = False,
) -> Upstream:
    """Write `target`/trtllm and `target`/cutlass, which must not exist.

    `edits` puts a text in the place of a file, or removes it where the text is None; `symlinks`
    makes links (path to target, as hostile as wanted). Both are relative to the repository's root
    and touch all releases but the old one.
    """
    suffix = ".git" if bare else ""
    trtllm, cutlass = target / f"trtllm{suffix}", target / f"cutlass{suffix}"
    first = _read(HERE / "cutlass")
    second = _replace(
        first,
        "include/cutlass/version.h",
        "MINOR 0\n#define CUTLASS_PATCH 0",
        "MINOR 4\n#define CUTLASS_PATCH 2",
    )
    pins = _write_repository(
        cutlass,
        [
            _Commit(tag=tag, tree=_edit(tree, cutlass_edits, cutlass_symlinks), gitlinks={})
            for tag, tree in zip(CUTLASS_TAGS, (first, second), strict=True)
        ],
        bare=bare,
    )

    base = _edit(_read(HERE / "trtllm"), _LFS, _NO_LINKS)
    commits = [
        _Commit(
            tag=OLD_RELEASE, tree=_with_version(_without_generator(base), OLD_RELEASE), gitlinks={}
        )
    ]
    for ref, cutlass_tag, tree in zip(
        RELEASES[shape], CUTLASS_TAGS, (base, _next_release(base)), strict=True
    ):
        tree = _with_version(tree, ref)
        gitlinks = {}
        if shape == "modern":
            tree = _modern(tree, cutlass_tag)
        else:
            tree = tree | {".gitmodules": _text(_GITMODULES)}
            gitlinks = {"3rdparty/cutlass": pins[cutlass_tag]}
        commits.append(_Commit(tag=ref, tree=_edit(tree, edits, symlinks), gitlinks=gitlinks))
    _write_repository(trtllm, commits, bare=bare)
    return Upstream(
        trtllm=trtllm,
        cutlass=cutlass,
        ref=RELEASES[shape][0],
        cutlass_commit=pins[CUTLASS_TAGS[0]],
        next_ref=RELEASES[shape][1],
        next_cutlass_commit=pins[CUTLASS_TAGS[1]],
        old_ref=OLD_RELEASE,
    )


def _text(text: str) -> _File:
    return _File(data=text.encode())


def _read(root: Path) -> _Tree:
    return {
        path.relative_to(root).as_posix(): _File(data=path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _replace(tree: _Tree, path: str, old: str, new: str) -> _Tree:
    text = tree[path].data.decode()
    if text.count(old) != 1:
        raise ValueError(f"{path} has {text.count(old)} times {old!r}, not once")
    return tree | {path: _text(text.replace(old, new))}


def _edit(tree: _Tree, edits: Mapping[str, str | None], symlinks: Mapping[str, str]) -> _Tree:
    missing = [path for path, text in edits.items() if text is None and path not in tree]
    if missing:
        raise ValueError(f"cannot remove what is not there: {missing}")
    changed = tree | {path: _text(text) for path, text in edits.items() if text is not None}
    changed |= {path: _File(data=link.encode(), mode="120000") for path, link in symlinks.items()}
    return {path: file for path, file in changed.items() if edits.get(path, "") is not None}


def _with_version(tree: _Tree, ref: str) -> _Tree:
    return _replace(tree, "tensorrt_llm/version.py", '"1.0.0"', f'"{ref.removeprefix("v")}"')


def _without_generator(tree: _Tree) -> _Tree:
    return {
        path: file for path, file in tree.items() if path != GENERATOR and "launchers" not in path
    }


def _next_release(tree: _Tree) -> _Tree:
    """64x64 comes, 64x16 goes; the launcher changes and includes a header that is new."""
    kernels = "cpp/tensorrt_llm/kernels/cutlass_kernels"
    extensions = "cpp/tensorrt_llm/cutlass_extensions/include/cutlass_extensions"
    tree = _replace(
        tree, GENERATOR, "[(64, 16), (64, 32), (128, 32)]", "[(64, 32), (64, 64), (128, 32)]"
    )
    tree = _replace(
        tree, f"{kernels}/cutlass_heuristic.cpp", "CtaShape64x16x128B", "CtaShape64x64x128B"
    )
    tree = _replace(
        tree,
        f"{kernels}/fpA_intB_gemm/fpA_intB_gemm_template.h",
        "TRY_TACTIC(64, 16, 1",
        "TRY_TACTIC(64, 64, 1",
    )
    tree = _replace(
        tree,
        f"{kernels}/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.inl",
        '#include "cutlass_extensions/compute_occupancy.h"\n',
        '#include "cutlass_extensions/arch/grid_dependency.h"\n'
        '#include "cutlass_extensions/compute_occupancy.h"\n',
    )
    return tree | {f"{extensions}/arch/grid_dependency.h": _text(_GRID_DEPENDENCY_H)}


def _modern(tree: _Tree, cutlass_tag: str) -> _Tree:
    """The same tree with macros in the place of `namespace tensorrt_llm`, in the generator too."""
    pins = {
        "schema_version": 1,
        "dependencies": [
            {
                "name": "cxxopts",
                "git_repository": "https://example.invalid/cxxopts",
                "git_tag": "v3.1.1",
            },
            {
                "name": "cutlass",
                "git_repository": "../cutlass",
                "git_tag": cutlass_tag,
                "git_shallow": True,
            },
        ],
    }
    modern: _Tree = {
        "3rdparty/fetch_content.json": _text(json.dumps(pins, indent=2) + "\n"),
        "cpp/include/tensorrt_llm/common/config.h": _text(_CONFIG_H),
    }
    opening, closing, include = (
        "namespace tensorrt_llm\n{\n",
        "} // namespace tensorrt_llm\n",
        "#include ",
    )
    for path, file in tree.items():
        text = file.data.decode()
        if opening in text:
            text = text.replace(opening, "TRTLLM_NAMESPACE_BEGIN\n").replace(
                closing, "TRTLLM_NAMESPACE_END\n"
            )
            mark = "#pragma once\n\n" if "#pragma once\n\n" in text else include
            new = f'{include}"tensorrt_llm/common/config.h"\n'
            text = text.replace(mark, mark + new if mark != include else new + mark, 1)
        modern[path] = _text(text)
    modern = _replace(modern, GENERATOR, r'"namespace tensorrt_llm\n{"', '"TRTLLM_NAMESPACE_BEGIN"')
    return _replace(modern, GENERATOR, '"} // namespace tensorrt_llm"', '"TRTLLM_NAMESPACE_END"')


def _write_repository(path: Path, commits: list[_Commit], *, bare: bool) -> dict[str, str]:
    """The commits in turn on `main`, each with its tag; gives the commit of each tag."""
    if path.exists():
        raise FileExistsError(path)
    path.mkdir(parents=True)
    _git(
        path,
        "init",
        "--quiet",
        "--template=",
        "--initial-branch=main",
        *(["--bare"] if bare else []),
    )
    # A file:// clone may then be partial, as one from a public host may.
    _git(path, "config", "uploadpack.allowFilter", "true")
    _git(path, "config", "uploadpack.allowAnySHA1InWant", "true")
    _git(path, "fast-import", "--quiet", data=b"".join(_stream(commits)))
    if not bare:
        _git(path, "reset", "--quiet", "--hard")
    return {commit.tag: _git(path, "rev-parse", f"{commit.tag}^{{commit}}") for commit in commits}


def _stream(commits: list[_Commit]) -> Iterator[bytes]:
    """What git fast-import reads; no clock, user or file mode of this machine goes into it."""
    for number, commit in enumerate(commits):
        seconds = 1_700_000_000 + number * 86_400
        yield b"commit refs/heads/main\n"
        yield f"committer Miniature <miniature@example.invalid> {seconds} +0000\n".encode()
        yield _data(f"Release {commit.tag}\n".encode())
        yield b"deleteall\n"
        for path, file in sorted(commit.tree.items()):
            yield f"M {file.mode} inline {path}\n".encode() + _data(file.data)
        for path, pin in commit.gitlinks.items():
            yield f"M 160000 {pin} {path}\n".encode()
        yield f"reset refs/tags/{commit.tag}\nfrom refs/heads/main\n\n".encode()


def _data(data: bytes) -> bytes:
    return b"data %d\n%b\n" % (len(data), data)


def _git(path: Path, *arguments: str, data: bytes = b"") -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
    }
    result = subprocess.run(
        ["git", *arguments], cwd=path, env=environment, input=data, capture_output=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(
            f"git {arguments[0]} in {path} failed:\n{result.stderr.decode(errors='replace')}"
        )
    return result.stdout.decode().strip()
