"""The bill of materials: what is in it, and that equal origins give equal bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("cyclonedx", reason="pip install '.[wheel]'")

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from pipeline.sbom import EULA, sbom

from .conftest import ROOT
from .test_provenance import MIRROR, manifest, origin


def bill(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(sbom(origin(**changes)))
    return values


def component(values: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (entry for entry in values["components"] if entry["name"] == name)
    assert isinstance(found, dict)
    return found


def test_the_bill_follows_its_schema() -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(sbom(origin())) is None


def test_the_package_holds_the_library_and_that_what_is_compiled_in() -> None:
    values = bill()
    assert values["metadata"]["component"]["purl"] == "pkg:pypi/w4a16@0.1.0"
    assert {entry["name"] for entry in values["components"]} == {
        "libw4a16.so",
        "TensorRT-LLM",
        "CUTLASS",
        "CUDA runtime",
    }
    graph = {entry["ref"]: entry.get("dependsOn", []) for entry in values["dependencies"]}
    assert graph["w4a16"] == ["libw4a16.so"]
    assert set(graph["libw4a16.so"]) == {"TensorRT-LLM", "CUTLASS", "CUDA runtime"}


def test_upstreams_have_package_url_commit_licence_and_their_vendored_files() -> None:
    trtllm = component(bill(), "TensorRT-LLM")
    # Package URLs of GitHub are in lower case.
    assert trtllm["purl"] == "pkg:github/nvidia/tensorrt-llm@v1.0.0"
    assert trtllm["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert trtllm["properties"] == [{"name": "w4a16:commit", "value": "1" * 40}]
    (file,) = trtllm["components"]
    assert file["name"] == "cpp/a.h"
    assert file["hashes"] == [{"alg": "SHA-256", "content": "aa" * 32}]
    cutlass = component(bill(), "CUTLASS")
    assert cutlass["purl"] == f"pkg:github/nvidia/cutlass@{'2' * 40}"
    assert cutlass["licenses"] == [{"license": {"id": "BSD-3-Clause"}}]


def test_the_library_has_its_digest_and_the_runtime_its_terms() -> None:
    values = bill()
    (digest,) = component(values, "libw4a16.so")["hashes"]
    assert digest == {"alg": "SHA-256", "content": origin().library.sha256}
    runtime = component(values, "CUDA runtime")
    assert runtime["version"] == "13.2"
    assert runtime["licenses"][0]["license"]["url"] == EULA


def test_commits_of_a_mirror_are_called_so() -> None:
    trtllm = component(bill(values=manifest(MIRROR)), "TensorRT-LLM")
    assert trtllm["properties"] == [{"name": "w4a16:mirror-commit", "value": "1" * 40}]
    assert MIRROR not in json.dumps(trtllm)


def test_a_repository_that_is_nowhere_public_has_no_package_url() -> None:
    trtllm = component(bill(values=manifest(MIRROR, matches_lock=None)), "TensorRT-LLM")
    assert "purl" not in trtllm
    assert "externalReferences" not in trtllm


def test_number_and_time_are_the_origins() -> None:
    assert sbom(origin()) == sbom(origin())
    first, second = bill(), bill(commit="4" * 40)
    assert first["serialNumber"] != second["serialNumber"]
    assert bill(time=1700000000)["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"


def test_another_process_writes_the_same_bytes() -> None:
    program = (
        "from pipeline.sbom import sbom\nfrom tests.unit.test_provenance import origin\n"
        "import sys\nsys.stdout.write(sbom(origin()))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert texts == {sbom(origin())}
