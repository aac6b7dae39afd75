"""Move to another release: make everything anew beside the old, then swap, and say what changed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from pipeline import diff, fetch, manifest, produce
from pipeline.console import Reporter
from pipeline.errors import MissingStageError
from pipeline.extract import extract
from pipeline.files import swap_folder, write_json, write_text
from pipeline.git import Location
from pipeline.lock import lock_of, write_lock
from pipeline.profile import Profile, load_profile
from pipeline.run import Options, Run, locate_run, resolve


def regenerate(options: Options, reporter: Reporter, to: str, *, build: bool = True) -> str:
    """Make release ``to``, and only then move the lock and the artifacts to it.

    Returns the comparison with the release before, which is stored beside the new manifest.
    Until everything has succeeded, the old lock and the old artifacts stand untouched.
    """
    profile = load_profile(options.config)
    old_dir = locate_run(options, reporter)[0].run_dir
    if not (old_dir / manifest.NAME).is_file():
        raise MissingStageError(
            f"there is nothing in {old_dir} to compare the new release with",
            hint="run `nox -s extract build` for the present release first",
        )
    old = manifest.read(old_dir)
    moved = _at(profile, to)
    if options.trtllm is not None:
        given = Location(url=options.trtllm.url, ref=to, local=options.trtllm.local)
        options = replace(options, trtllm=given)
    resolved = resolve(options, moved)
    target = options.out.resolve() if options.out else old_dir.with_name(resolved.release)
    # What is finished there stays until all is well: the new run gets a folder of its own.
    finished = target == old_dir or (target / "report.md").is_file()
    place = target.with_name(f"{target.name}.next") if finished else target
    run = Run(options, reporter, place, moved)
    with run.held():
        _, sources = extract(run, resolved, allow_moved=True)
        if build:
            produce.build(run)
            produce.verify(run)
            produce.test(run)
        change = diff.compare(old, manifest.read(place))
        text = diff.as_markdown(change)
        write_json(place / "changes.json", change)
        write_text(place / "changes.md", text)
        if resolved.wanted.given:
            write_lock(place / fetch.LOCK_NAME, lock_of(sources))
        if place != target:
            swap_folder(place, target)
        if not resolved.wanted.given:
            write_lock(options.vendor / fetch.LOCK_NAME, lock_of(sources))
            _write_ref(options.config, profile, to)
    return text


def _at(profile: Profile, ref: str) -> Profile:
    trtllm = profile.upstream.trtllm.model_copy(update={"ref": ref})
    upstream = profile.upstream.model_copy(update={"trtllm": trtllm})
    return profile.model_copy(update={"upstream": upstream})


def _write_ref(config: Path, profile: Profile, ref: str) -> None:
    """Put the new ref into the profile, and leave the rest of the file as people wrote it."""
    old = profile.upstream.trtllm.ref
    if old is None or old == ref:
        return
    text = config.read_text(encoding="utf-8")
    pattern = re.compile(rf"(\btrtllm:.*?\bref:\s*['\"]?){re.escape(old)}(?![\w.-])", re.DOTALL)
    changed = pattern.sub(lambda match: match.group(1) + ref, text, count=1)
    write_text(config, changed)
