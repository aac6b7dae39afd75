"""``extract``: the stages from upstream's repositories to the bundle, in their order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import fetch, manifest, render, vendor
from pipeline.errors import MissingStageError
from pipeline.files import digest_of_files, tree_digests
from pipeline.generate import generate
from pipeline.lock import lock_of, write_lock
from pipeline.model import Bundle, Closure, GeneratedTree, Selection, Sources
from pipeline.run import Run, resolve
from pipeline.select import select
from pipeline.state import code_digest


def extract(
    run: Run, resolved: fetch.Resolved | None, *, allow_moved: bool = False
) -> tuple[Bundle, Sources]:
    """Stages fetch to render: DIR then holds ``source/``, the bundle, and ``manifest.json``.

    ``allow_moved`` is for *regenerate*: no lock is asked, and none is written.
    """
    profile, stages, say = run.profile, run.stages, run.reporter.say
    resolved = resolved or resolve(run.options, profile)
    if stages.last("vendor", Closure) is None:
        run.toolchain()  # that there is no compiler is said before any work
    sources, facts = fetch.fetch(
        resolved,
        run.table,
        vendor=run.options.vendor,
        run_dir=run.run_dir,
        allow_moved=allow_moved,
        say=say,
    )
    say(
        f"fetch: TensorRT-LLM {sources.release} ({sources.trtllm.commit[:12]}), "
        f"CUTLASS {sources.cutlass.commit[:12]}"
    )
    inputs: dict[str, Any] = {
        "content": [sources.trtllm.digests, sources.cutlass.digests],
        "facts": facts,
        # Where the sources come from is told by their content.
        "profile": profile.model_dump(mode="json", exclude={"upstream"}),
        "code": code_digest(),
    }
    generated = run.run_dir / "generated"

    def make_tree() -> GeneratedTree:
        with run.reporter.stage("generate"):
            return generate(sources, facts, sm=profile.sm, target=generated, show=run.reporter.show)

    tree = stages.run("generate", GeneratedTree, make_tree, inputs=inputs, outputs=(generated,))
    tree = replace(tree, folder=str(generated))

    def make_selection() -> Selection:
        found = select(profile, facts, tree, Path(sources.trtllm.folder))
        kernels = sum(len(family.kernels) for family in found.gemv.selected)
        say(
            f"select: {len(found.selected)} instantiations kept, {len(found.dropped)} dropped, "
            f"{len(found.ignored)} files ignored; {kernels} GEMV kernels"
            + (f" ({found.gemv.reason})" if found.gemv.reason else "")
            + f"; {len(found.decode.selected)} decode tactics"
            + (f" ({found.decode.reason})" if found.decode.reason else "")
        )
        return found

    selection = stages.run("select", Selection, make_selection, inputs=inputs)

    def make_closure() -> Closure:
        with run.reporter.stage("vendor"):
            return vendor.close(
                sources,
                facts,
                render.probe(profile, facts, sources, selection),
                run.toolchain(),
                gencode=render.gencode(profile),
                scratch=run.run_dir / ".state" / "probe",
                show=run.reporter.show,
            )

    closure = stages.run("vendor", Closure, make_closure, inputs=inputs)

    def make_bundle() -> Bundle:
        with run.reporter.stage("render"):
            return render.render(profile, facts, sources, selection, closure, run.source)

    names = [profile.upstream.trtllm.url, sources.trtllm.commit, sources.cutlass.commit]
    bundle = stages.run(
        "render",
        Bundle,
        make_bundle,
        inputs={**inputs, "closure": closure, "names": names},
        outputs=(run.source,),
    )
    values = manifest.extracted(profile, sources, tree, selection, closure, bundle)
    old = _manifest_of(run)
    if old is None or any(old.get(key) != value for key, value in values.items()):
        manifest.write(run.run_dir, values)
    if not allow_moved:
        # Given sources are locked in DIR; the profile's own, where no lock is there yet, in vendor.
        if resolved.wanted.given:
            write_lock(run.run_dir / fetch.LOCK_NAME, lock_of(sources))
        elif not (run.options.vendor / fetch.LOCK_NAME).exists():
            write_lock(run.options.vendor / fetch.LOCK_NAME, lock_of(sources))
    return bundle, sources


def _manifest_of(run: Run) -> dict[str, Any] | None:
    try:
        return manifest.read(run.run_dir)
    except (OSError, ValueError):
        return None


def bundle_of(run: Run) -> tuple[Bundle, Selection, tuple[str, ...]]:
    """What is in ``DIR/source`` now, the selection, and the files changed by hand since *extract*.

    A changed bundle may be built (and is marked so); one that lacks files may not.
    """
    bundle = run.stages.last("render", Bundle)
    selection = run.stages.last("select", Selection)
    if bundle is None or selection is None or _manifest_of(run) is None:
        raise MissingStageError(
            f"{run.run_dir} holds no bundle",
            hint="run `nox -s extract` first, with the same --config and --out",
        )
    _require_same_profile(run)
    found = tree_digests(run.source) if run.source.is_dir() else {}
    found.pop(render.INDEX, None)
    missing = sorted(bundle.files.keys() - found.keys())
    if missing:
        raise MissingStageError(
            f"the bundle in {run.source} lacks {len(missing)} files that extract left there",
            details="\n".join(missing[:10]),
            hint="run `nox -s extract` again; it remakes what was damaged",
        )
    changed = tuple(sorted(n for n in found if found[n] != bundle.files.get(n)))
    if changed:
        digest = f"{digest_of_files(found)}-dirty"
        return replace(bundle, files=found, digest=digest), selection, changed
    return bundle, selection, ()


def _require_same_profile(run: Run) -> None:
    """The bundle was rendered from a profile; another one needs another bundle."""
    made_from = manifest.read(run.run_dir)["profile"]
    asked = run.profile.model_dump(mode="json", by_alias=True)
    baked_in = ("name", "architecture", "activation", "weight", "gemm", "gemv", "decode")
    changed = [key for key in baked_in if made_from.get(key) != asked[key]]
    if made_from["build"]["compress"] != asked["build"]["compress"]:
        changed.append("build.compress")
    if changed:
        raise MissingStageError(
            f"the bundle in {run.source} was extracted for a profile with other "
            + ", ".join(changed),
            hint="run `nox -s extract` with this --config first",
        )
