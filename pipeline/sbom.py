"""The wheel's CycloneDX bill of materials: the library, and the upstream code compiled into it."""

from __future__ import annotations

import uuid
from datetime import datetime, timezone

from cyclonedx.model import (
    ExternalReference,
    ExternalReferenceType,
    HashAlgorithm,
    HashType,
    Property,
    XsUri,
)
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.contact import OrganizationalEntity
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.model.lifecycle import LifecyclePhase, PredefinedLifecycle
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from pipeline.files import digest_json
from pipeline.model import to_json
from pipeline.provenance import Origin, Upstream

EULA = "https://docs.nvidia.com/cuda/eula/index.html"
_NVIDIA = OrganizationalEntity(name="NVIDIA Corporation", urls=[XsUri("https://www.nvidia.com")])


def sbom(origin: Origin) -> str:
    """The bill as JSON; equal origins give equal bytes, so its number and time are theirs."""
    package = Component(
        name="w4a16",
        version=origin.version,
        type=ComponentType.LIBRARY,
        bom_ref="w4a16",
        purl=PackageURL(type="pypi", name="w4a16", version=origin.version),
        licenses=[DisjunctiveLicense(id="Apache-2.0")],
        properties=_properties(commit=origin.project.commit),
    )
    library = Component(
        name="libw4a16.so",
        version=origin.version,
        type=ComponentType.FILE,
        bom_ref="libw4a16.so",
        licenses=[DisjunctiveLicense(id="Apache-2.0")],
        hashes=[_sha256(origin.library.sha256)],
        properties=_properties(
            architecture=origin.library.architecture,
            bundle=origin.bundle_digest,
            compiler=origin.library.compiler,
        ),
    )
    compiled_in = [
        _upstream(origin.trtllm, version=origin.release),
        _upstream(origin.cutlass, version=origin.cutlass.commit),
        _cuda_runtime(origin.library.cuda_runtime),
    ]
    bom = Bom(
        components=[library, *compiled_in],
        metadata=BomMetaData(
            component=package,
            timestamp=datetime.fromtimestamp(origin.project.time, timezone.utc),
            lifecycles=[PredefinedLifecycle(phase=LifecyclePhase.BUILD)],
        ),
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"w4a16:{digest_json(to_json(origin))}"),
    )
    bom.register_dependency(package, [library])
    bom.register_dependency(library, compiled_in)
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def _upstream(upstream: Upstream, *, version: str) -> Component:
    """A repository; the vendored files that the compiler may have read are its parts."""
    references = []
    if upstream.url is not None:
        references.append(
            ExternalReference(type=ExternalReferenceType.VCS, url=XsUri(upstream.url))
        )
    return Component(
        name=upstream.name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=upstream.name,
        supplier=_NVIDIA,
        purl=_purl(upstream.url, version),
        licenses=[DisjunctiveLicense(id=upstream.license)],
        external_references=references,
        properties=_properties(
            **{"mirror-commit" if upstream.mirrored else "commit": upstream.commit}
        ),
        components=[
            Component(
                name=path,
                type=ComponentType.FILE,
                bom_ref=f"{upstream.name}/{path}",
                hashes=[_sha256(digest)],
            )
            for path, digest in upstream.files.items()
        ],
    )


def _cuda_runtime(version: str) -> Component:
    return Component(
        name="CUDA runtime",
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref="CUDA runtime",
        supplier=_NVIDIA,
        description="libcudart_static.a, linked statically, and headers of the CUDA toolkit",
        licenses=[DisjunctiveLicense(name="NVIDIA CUDA Toolkit EULA", url=XsUri(EULA))],
    )


def _purl(url: str | None, version: str) -> PackageURL | None:
    """A repository on GitHub has a package URL (in lower case, as its specification says)."""
    owner, slash, name = (url or "").removeprefix("https://github.com/").partition("/")
    if url is None or not url.startswith("https://github.com/") or not slash:
        return None
    return PackageURL(type="github", namespace=owner, name=name, version=version)


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _properties(**values: str | None) -> list[Property]:
    return [Property(name=f"w4a16:{name}", value=value) for name, value in values.items() if value]
