"""Parse explicit instantiations out of generated C++, strictly: what is not understood is an error.

Grammar (read off the generator's output of v0.9.0 to v1.0.0)::

    file      = { '#include "…"' | '#if …' | scope | statement }
    statement = 'template' type name '<' arguments '>' '(' parameters ')' ';'

Only statements that name the mixed-input launcher are parsed into their parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import SelectError
from pipeline.model import Instantiation, Shape3

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"][ \t]*$', re.MULTILINE)
_TEMPLATE = re.compile(r"\btemplate\b\s*(?!<)")
_HEAD = re.compile(r"template\s+void\s+([A-Za-z_]\w*)\s*<")
_SHAPE = re.compile(
    r"(?:::)?cute::Shape<cute::Int<(\d{1,6})>,cute::Int<(\d{1,6})>,cute::Int<(\d{1,6})>>"
)
_TYPE = re.compile(r"(?:::)?[A-Za-z_][\w:]*(?:<[\w:<>,\- ]*>)?")
_ARGUMENTS = 11


@dataclass(frozen=True)
class ParsedFile:
    instantiations: tuple[Instantiation, ...]
    others: tuple[str, ...]
    """Names of other functions and macros that the file instantiates."""


def parse_file(text: str, *, origin: str, launcher: str) -> ParsedFile:
    """Parse one generated file; ``launcher`` is the name of the mixed-input GEMM launcher."""
    blank = _blanked(text)
    statements = list(_statements(blank, text, origin))
    ours = [s for s in statements if s.function == launcher]
    mentions = len(re.findall(rf"\b{re.escape(launcher)}\b", blank))
    if mentions != len(ours):
        raise SelectError(
            f"{origin}: {launcher} occurs {mentions} times, but {len(ours)} explicit "
            "instantiations of it were understood",
            details=_surroundings(blank, text, launcher, [s.span for s in ours]),
            hint="the generator writes a form that pipeline/instantiation.py does not know",
        )
    if not ours:
        names = {s.function for s in statements} | _macros(blank)
        return ParsedFile((), tuple(sorted(names)))
    include = tuple(_INCLUDE.findall(text))
    if not include:
        raise SelectError(
            f"{origin}: the file includes no launcher",
            hint="the generator writes a form that pipeline/instantiation.py does not know",
        )
    first, last = ours[0].span[0], ours[-1].span[1]
    open_scope = _INCLUDE.sub("", _COMMENT.sub("", text[:first])).strip()
    close_scope = _COMMENT.sub("", text[last:]).strip()
    _require_scopes(open_scope, close_scope, origin)
    return ParsedFile(
        tuple(
            _parse(s, origin=origin, include=include, scopes=(open_scope, close_scope))
            for s in ours
        ),
        tuple(sorted({s.function for s in statements} - {launcher})),
    )


@dataclass(frozen=True)
class _Statement:
    function: str
    text: str
    span: tuple[int, int]
    line: int


def _statements(blank: str, text: str, origin: str) -> Iterator[_Statement]:
    position = 0
    while match := _TEMPLATE.search(blank, position):
        end = blank.find(";", match.start())
        line = blank.count("\n", 0, match.start()) + 1
        if end < 0:
            raise _unparsed(origin, line, text[match.start() :], "it has no end")
        head = _HEAD.match(blank, match.start())
        statement = text[match.start() : end + 1]
        if head is None:
            raise _unparsed(origin, line, statement, "it is not 'template void NAME<…> (…);'")
        yield _Statement(head.group(1), statement, (match.start(), end + 1), line)
        position = end + 1


def _parse(
    statement: _Statement, *, origin: str, include: tuple[str, ...], scopes: tuple[str, str]
) -> Instantiation:
    def unparsed(why: str) -> SelectError:
        return _unparsed(origin, statement.line, statement.text, why)

    clean = _blanked(statement.text)
    inner, rest = _angle(clean, clean.index("<"), unparsed)
    arguments = [" ".join(part.split()) for part in _split(inner)]
    if len(arguments) != _ARGUMENTS:
        raise unparsed(f"it has {len(arguments)} template arguments, not {_ARGUMENTS}")
    compact = [argument.replace(" ", "") for argument in arguments]
    cta, cluster = (_shape(compact[place], unparsed) for place in (7, 8))
    for place, argument in enumerate(compact):
        if place not in (7, 8) and not _TYPE.fullmatch(argument):
            raise unparsed(f"{arguments[place]!r} is not the name of a type")
    if not re.fullmatch(r"\s*\(\s*[^();]+\)\s*;", rest):
        raise unparsed("its parameter list is not understood")
    return Instantiation(
        function=statement.function,
        act=arguments[0],
        weight=arguments[1],
        scale_zero=arguments[2],
        bias=arguments[3],
        out=arguments[4],
        quant_op=arguments[5],
        epilogue=arguments[6],
        cta=cta,
        cluster=cluster,
        mainloop=arguments[9],
        epilogue_schedule=arguments[10],
        origin=origin,
        line=statement.line,
        text=statement.text,
        include=include,
        open_scope=scopes[0],
        close_scope=scopes[1],
    )


def _blanked(text: str) -> str:
    """``text`` with comments replaced by blanks of the same length and lines."""
    return _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def _angle(text: str, start: int, unparsed: object) -> tuple[str, str]:
    """What stands between the ``<`` at ``start`` and its ``>``, and what follows."""
    depth = 0
    for position in range(start, len(text)):
        if text[position] == "<":
            depth += 1
        elif text[position] == ">":
            depth -= 1
            if depth == 0:
                return text[start + 1 : position], text[position + 1 :]
    raise unparsed("its angle brackets do not match")  # type: ignore[operator]


def _split(arguments: str) -> list[str]:
    """Split a template argument list at its outermost commas."""
    parts, depth, begin = [], 0, 0
    for position, character in enumerate(arguments):
        if character in "<(":
            depth += 1
        elif character in ">)":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(arguments[begin:position])
            begin = position + 1
    return [*parts, arguments[begin:]]


def _shape(argument: str, unparsed: object) -> Shape3:
    match = _SHAPE.fullmatch(argument)
    if match is None:
        raise unparsed(f"{argument!r} is not a cute::Shape of three integers")  # type: ignore[operator]
    first, second, third = (int(extent) for extent in match.groups())
    return first, second, third


def _macros(blank: str) -> set[str]:
    return set(re.findall(r"^\s*(INSTANTIATE_\w+)\s*\(", blank, re.MULTILINE))


def _require_scopes(open_scope: str, close_scope: str, origin: str) -> None:
    """The scopes are copied into every unit, so they must be scopes and nothing else."""
    opened = re.fullmatch(
        r"(?:\s*(?:(?:inline\s+)?namespace(?:\s+[\w:]+)?\s*\{|[A-Z][A-Z0-9_]*NAMESPACE_BEGIN))*\s*",
        open_scope,
    )
    closed = re.fullmatch(r"(?:\s*(?:\}|[A-Z][A-Z0-9_]*NAMESPACE_END))*\s*", close_scope)
    if not opened or not closed:
        raise SelectError(
            f"{origin}: more than namespaces stands around the instantiations",
            details=open_scope if not opened else close_scope,
            hint="the generator writes a form that pipeline/instantiation.py does not know",
        )


def _surroundings(blank: str, text: str, launcher: str, spans: list[tuple[int, int]]) -> str:
    shown = []
    for match in re.finditer(rf"\b{re.escape(launcher)}\b", blank):
        if not any(begin <= match.start() < end for begin, end in spans):
            line = blank.count("\n", 0, match.start()) + 1
            shown.append(f"line {line}:\n{text[match.start() : match.start() + 600]}")
    return "\n".join(shown)


def _unparsed(origin: str, line: int, statement: str, why: str) -> SelectError:
    return SelectError(
        f"{origin}:{line}: cannot parse this instantiation: {why}",
        details=statement[:4000],
        hint="nothing was selected; if the release writes a new form, teach it to "
        "pipeline/instantiation.py",
    )
