"""One case: who can compute it, whether the results are right, and the time, all in turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.suite.cases import SUSTAINED_FROM, Case, Job, Weight
from benchmarks.suite.contenders.base import Contender, Prepared, Run, brief
from benchmarks.suite.errors import Lost, Missing
from benchmarks.suite.gpu import GRAPH, Replay
from benchmarks.suite.results import CaseResult, Line, Mode, Times
from benchmarks.suite.weights import MANY_ROWS


@dataclass(frozen=True, kw_only=True)
class Method:
    """How it is measured; stands in every result."""

    replays: int = 7
    """Timed rounds; a round runs every contender's graph once."""
    replays_many_rows: int = 5
    """From 512 rows on, where a graph takes long."""
    warm: int = 2
    """Rounds before those."""
    pause_s: float = 0.02
    """The GPU is left idle so long before each round of a burst, from 16 rows on."""
    sustain_s: float = 0.35
    """All contenders run in turns so long before sustained times are taken."""
    plain_finalists: int = 3
    overlap_finalists: int = 3
    """So many tactics are timed properly, the fastest of a short pass over all, beside what the
    package takes and the best of each kind."""
    near: float = 1.25
    """Those of the fastest that took so much longer than the first of them are not timed again."""
    quick_launches: int = 10
    quick_launches_many_rows: int = 2
    quick_rounds: int = 3
    hopeless: float = 4.0
    """A contender that was so much slower than the fastest at fewer rows (16 or more) is left out
    beyond."""

    def rounds(self, m: int) -> int:
        return self.replays_many_rows if m >= MANY_ROWS else self.replays

    def quick(self, m: int) -> int:
        return self.quick_launches_many_rows if m >= MANY_ROWS else self.quick_launches


@dataclass
class _Entrant:
    """A run that goes to the start: its graph, and what is known of it."""

    run: Run
    line: Line
    replay: Replay | None = None


@dataclass
class _Seen:
    """What one weight's cases have taught so far, as M grows."""

    slow: dict[str, str] = field(default_factory=dict)
    """Contenders and tactics that are left out from now on, and why."""


class Bench:
    """Measures the cases of one weight after another."""

    def __init__(
        self,
        gpu: Any,
        library: Any,
        peers: Sequence[Contender],
        *,
        method: Method,
        clocks: Callable[[], Mapping[str, float]],
        rows: Callable[[Any, int], Any],
        peer_limit_s: float,
        say: Callable[[str], None] = print,
    ) -> None:
        self._gpu = gpu
        self._library = library
        self._peers = list(peers)
        self._method = method
        self._clocks = clocks
        self._rows = rows
        self._say = say
        self._limit = peer_limit_s
        self._spent: dict[str, float] = {}
        self._weights: Any = None
        self._prepared: dict[str, Prepared | str] = {}
        self._seen = _Seen()

    def use(self, weights: Any) -> None:
        """The weight of the cases that follow; what was made of the one before goes."""
        self._prepared = {}
        self._seen = _Seen()
        self._weights = weights

    # ---- One case ----

    def measure(self, job: Job) -> CaseResult:
        """Every contender on a case; what fails is a line that says so."""
        case = job.case
        rows = self._rows(self._weights, case.m)
        conditions: dict[str, Mapping[str, float]] = {"before": self._clocks()}
        auto, source = self._auto(case)
        finalists, quick = self._short_pass(case, rows, auto)
        entrants: list[_Entrant] = []
        try:
            entrants += self._started(rows, finalists)
            if job.peers:
                for peer in self._peers:
                    entrants += self._peer(peer, rows)
            self._time(job, entrants, conditions)
        finally:
            for entrant in entrants:
                if entrant.replay is not None:
                    with contextlib.suppress(Exception):
                        entrant.replay.close()
        lines = tuple(entrant.line for entrant in entrants)
        self._learn(case, lines)
        return CaseResult(
            case=case,
            lines=lines,
            auto=auto,
            auto_source=source,
            quick=quick,
            conditions=conditions,
        )

    def samples(
        self, case: Case, launches: int, count: int
    ) -> tuple[dict[str, Times], str, list[Line]]:
        """Times of many small graphs of each contender, what the package takes, and everybody's
        line, without times."""
        rows = self._rows(self._weights, case.m)
        auto, _ = self._auto(case)
        chosen, _ = self._short_pass(case, rows, auto)
        entrants = self._started(rows, chosen)
        for peer in self._peers:
            entrants += self._peer(peer, rows)
        lines = [entrant.line for entrant in entrants]
        small: dict[str, Replay] = {}
        try:
            for entrant in entrants:
                if entrant.replay is None:
                    continue
                if entrant.replay.method == GRAPH:
                    small[entrant.line.label] = self._capture(
                        entrant.run, launches, first=len(small) * launches
                    )
                else:
                    small[entrant.line.label] = self._gpu.eager(entrant.run.launch, launches)
            if not small:
                return {}, auto, lines
            times = self._gpu.rounds(list(small.values()), count, self._method.warm)
            return dict(zip(small, times, strict=True)), auto, lines
        finally:
            for replay in (*small.values(), *(e.replay for e in entrants if e.replay)):
                replay.close()

    def _auto(self, case: Case) -> tuple[str, str]:
        try:
            found: tuple[str, str] = self._library.auto(case)
            return found
        except Exception as error:  # no tactic takes it: a line below says so
            return "", brief(error)

    # ---- Which tactics ----

    def _short_pass(self, case: Case, rows: Any, auto: str) -> tuple[list[Run], dict[str, float]]:
        """The library's runs that deserve proper timing, and rough times of all others."""
        try:
            runs = [
                run
                for run in self._library.prepare(self._weights).runs(rows)
                if run.contender == auto or run.label not in self._seen.slow
            ]
        except Missing as error:
            self._say(f"{case}: {error}")
            return [], {}
        times = self._rough(case, runs)
        if not times:
            return runs, {}
        order = sorted(times, key=lambda i: times[i])
        chosen = finalists(
            [(runs[i], times[i]) for i in order],
            auto,
            self._method,
            everything=getattr(self._library, "everything", False),
        )
        best = times[order[0]]
        for i in order:
            if runs[i].label not in {run.label for run in chosen}:
                self._judge(case, runs[i].label, times[i] / best)
        # What failed on the way comes along: its line says why.
        chosen = chosen + [run for i, run in enumerate(runs) if i not in times]
        kept = {run.label for run in chosen}
        rest = {runs[i].label: times[i] for i in order if runs[i].label not in kept}
        return chosen, rest

    def _rough(self, case: Case, runs: Sequence[Run]) -> dict[int, float]:
        """Least microseconds of each run that works, by its position."""
        launches = self._method.quick(case.m)
        replays: dict[int, Replay] = {}
        try:
            for i, run in enumerate(runs):
                with contextlib.suppress(Exception):  # told when it is captured in full
                    run.launch(0)
                    replays[i] = self._capture(run, launches, first=i * launches)
            self._gpu.synchronize()
            if not replays:
                return {}
            times = self._gpu.rounds(list(replays.values()), self._method.quick_rounds, 1)
            return {i: found.least for i, found in zip(replays, times, strict=True)}
        finally:
            for replay in replays.values():
                replay.close()

    def _capture(self, run: Run, launches: int, first: int = 0) -> Replay:
        call = run.launch if first == 0 else lambda i: run.launch(i + first)
        replay: Replay = self._gpu.capture(call, launches, torch_graph=run.torch_graph)
        return replay

    # ---- To the start ----

    def _started(self, rows: Any, runs: Sequence[Run]) -> list[_Entrant]:
        return [self._start(rows, run) for run in runs]

    def _peer(self, peer: Contender, rows: Any) -> list[_Entrant]:
        """A peer's entrants on a case, or one that says why there is none."""
        if reason := self._seen.slow.get(peer.name, ""):
            return [_absent(peer.name, "left out", reason)]
        spent = self._spent.get(peer.name, 0.0)
        if spent > self._limit:
            reason = f"its preparing took {spent:.0f} s, more than {self._limit:.0f}"
            return [_absent(peer.name, "left out", reason)]
        begin = time.monotonic()
        try:
            prepared = self._prepared_of(peer)
            if isinstance(prepared, str):
                return [_absent(peer.name, "left out", prepared)]
            return self._started(rows, list(prepared.runs(rows)))
        except Missing as error:
            return [_absent(peer.name, "left out", str(error))]
        except Lost:
            raise
        except Exception as error:  # a peer's failure is its own line, and no more
            self._require_gpu(f"{peer.name}: {brief(error)}")
            return [_absent(peer.name, "failed", brief(error))]
        finally:
            self._spent[peer.name] = spent + time.monotonic() - begin

    def _prepared_of(self, peer: Contender) -> Prepared | str:
        if peer.name not in self._prepared:
            try:
                self._prepared[peer.name] = peer.prepare(self._weights)
            except Missing as error:
                self._prepared[peer.name] = str(error)
            except Exception as error:
                self._require_gpu(f"{peer.name}: {brief(error)}")
                self._prepared[peer.name] = f"preparing the weight failed: {brief(error)}"
        return self._prepared[peer.name]

    def _start(self, rows: Any, run: Run) -> _Entrant:
        """Launches it once, captures it, and looks at what a replay of the graph leaves."""
        line = Line(
            contender=run.contender,
            role=run.role,
            overlap=run.overlap,
            note=run.note,
            launches=rows.launches,
        )
        replay: Replay | None = None
        try:
            run.launch(0)
            self._gpu.synchronize()
            try:
                replay = self._capture(run, rows.launches)
            except Exception as error:
                replay = self._gpu.eager(run.launch, rows.launches)
                note = f"cannot be captured: {brief(error)}"
                line = replace(line, note="; ".join(filter(None, (line.note, note))))
            assert replay is not None
            line = replace(line, method=replay.method)
            rows.poison()
            replay.launch()
            self._gpu.synchronize()
            error_found = max(
                _error(rows, replay, i) for i in dict.fromkeys((0, rows.launches - 1))
            )
        except Exception as error:
            if replay is not None:
                with contextlib.suppress(Exception):
                    replay.close()
            self._require_gpu(f"{run.label}: {brief(error)}")
            return _Entrant(run, replace(line, status="failed", note=brief(error)))
        line = replace(line, error=error_found)
        if not error_found <= run.limit:
            replay.close()
            note = f"relative error {error_found:.1e} against float64, limit {run.limit:.0e}"
            return _Entrant(run, replace(line, status="wrong", note=note))
        return _Entrant(run, line, replay)

    def _require_gpu(self, what: str) -> None:
        """Raises :class:`Lost` if the GPU no longer answers, as after an illegal address."""
        try:
            self._gpu.synchronize()
        except Exception:
            raise Lost(f"the GPU's context was lost by {what}") from None

    # ---- Time ----

    def _time(
        self, job: Job, entrants: list[_Entrant], conditions: dict[str, Mapping[str, float]]
    ) -> None:
        ready = [(entrant, entrant.replay) for entrant in entrants if entrant.replay is not None]
        if not ready:
            return
        m, method = job.case.m, self._method
        replays = [replay for _, replay in ready]
        pause = method.pause_s if m >= SUSTAINED_FROM else 0.0
        self._note(ready, "burst", self._gpu.rounds(replays, method.rounds(m), method.warm, pause))
        conditions["burst"] = self._clocks()
        if m >= SUSTAINED_FROM and job.sustained:
            self._gpu.busy(replays, method.sustain_s)
            conditions["sustained"] = self._clocks()  # while it runs
            self._note(ready, "sustained", self._gpu.rounds(replays, method.rounds(m), 0))

    @staticmethod
    def _note(ready: Sequence[tuple[_Entrant, Replay]], mode: Mode, times: Sequence[Times]) -> None:
        for (entrant, _), found in zip(ready, times, strict=True):
            if mode == "burst":
                entrant.line = replace(entrant.line, burst=found)
            else:
                entrant.line = replace(entrant.line, sustained=found)

    # ---- What is hopeless from now on ----

    def _learn(self, case: Case, lines: Sequence[Line]) -> None:
        medians = {line.label: line.burst.median for line in lines if line.burst}
        if not medians:
            return
        best = min(medians.values())
        for label, us in medians.items():
            self._judge(case, label, us / best)

    def _judge(self, case: Case, label: str, ratio: float) -> None:
        if case.m >= SUSTAINED_FROM and ratio > self._method.hopeless:
            self._seen.slow[label] = f"took {ratio:.1f} times the fastest at M = {case.m}"


def finalists(
    ranked: Sequence[tuple[Run, float]], auto: str, method: Method, *, everything: bool
) -> list[Run]:
    """Of runs with their rough times, from the fastest to the slowest, those to time properly.

    The fastest plain and overlapped ones, as far as they are near to the first; each of those with
    its counterpart; what ``auto`` takes; the best of each kind.
    """
    if everything:
        return [run for run, _ in ranked]
    wanted = {auto}
    for overlap, most in ((False, method.plain_finalists), (True, method.overlap_finalists)):
        mine = [(run.contender, us) for run, us in ranked if run.overlap == overlap]
        wanted |= {name for name, us in mine[:most] if us <= method.near * mine[0][1]}
    kinds: dict[str, str] = {}
    for run, _ in ranked:
        kinds.setdefault(run.kind, run.contender)
    wanted |= set(kinds.values())
    return [run for run, _ in ranked if run.contender in wanted]


def _error(rows: Any, replay: Replay, i: int) -> float:
    slot = i % rows.slots
    given = replay.outputs[i] if i < len(replay.outputs) else None
    return float(rows.error(rows.out[slot] if given is None else given, slot))


def _absent(name: str, status: Any, note: str) -> _Entrant:
    """A peer without a run."""
    line = Line(contender=name, role="peer", status=status, note=note, method="")
    return _Entrant(Run(contender=name, role="peer", launch=lambda i: None), line)


def by_weight(jobs: Sequence[Job]) -> Iterator[tuple[Weight, list[Job]]]:
    """Jobs in their order, those of a weight together: it is made and packed once."""
    groups: dict[Weight, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.case.weight, []).append(job)
    yield from groups.items()
