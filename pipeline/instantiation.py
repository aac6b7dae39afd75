"""Parse explicit instantiations out of generated C++, strictly: what is not understood is an error.

Grammar (read off the generator's output of v0.9.0 to v1.0.0)::

    file      = { '#include "…"' } { scope-begin } { statement } { scope-end }
    statement = 'template' 'void' name '<' arguments '>' '(' parameters ')' ';'

Only statements that name the mixed-input launcher are parsed into their parts; a file that does
not name it may hold anything else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import SelectError
from pipeline.model import Instantiation, Shape3

_STRING_OR_COMMENT = re.compile(r'"[^"\n]*"|//[^\n]*|/\*.*?(?:\*/|\Z)', re.DOTALL)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"][ \t]*$', re.MULTILINE)
_TEMPLATE = re.compile(r"\btemplate\b(?!\s*<)")
_HEAD = re.compile(r"template\s+void\s+([A-Za-z_]\w*)\s*<", re.ASCII)
_SHAPE = re.compile(
    r"(?:::)?cute::Shape<cute::Int<([1-9][0-9]{0,5})>,cute::Int<([1-9][0-9]{0,5})>,"
    r"cute::Int<([1-9][0-9]{0,5})>>"
)
_TYPE = re.compile(r"(?:::)?[A-Za-z_][\w:]*(?:<[\w:<>,\-]*>)?", re.ASCII)
_BEGIN = r"[A-Z][A-Z0-9_]*NAMESPACE_BEGIN\b"
_END = r"[A-Z][A-Z0-9_]*NAMESPACE_END\b"
_ARGUMENTS = 11
_HINT = "the generator writes a form that pipeline/instantiation.py does not know"


@dataclass(frozen=True)
class ParsedFile:
    instantiations: tuple[Instantiation, ...]
    others: tuple[str, ...]
    """Names of other functions and macros that the file instantiates."""


def parse_file(text: str, *, origin: str, launcher: str) -> ParsedFile:
    """Parse one generated file; ``launcher`` is the name of the mixed-input GEMM launcher."""
    blank = _blanked(text)
    if launcher in re.sub(r"\\[ \t]*\n", "", text):
        _require_plain(blank, text, origin)
    statements = list(_statements(blank, origin))
    ours = [s for s in statements if s.function == launcher]
    mentions = len(re.findall(rf"\b{re.escape(launcher)}\b", blank))
    if mentions != len(ours):
        raise SelectError(
            f"{origin}: {launcher} occurs {mentions} times, but {len(ours)} explicit "
            "instantiations of it were understood",
            details=_surroundings(blank, text, launcher, [s.span for s in ours]),
            hint=_HINT,
        )
    if not ours:
        names = {s.function for s in statements} | _macros(blank)
        return ParsedFile((), tuple(sorted(names)))
    include, scopes = _around(blank, [s.span for s in statements], origin)
    return ParsedFile(
        tuple(_parse(s, origin=origin, include=include, scopes=scopes) for s in ours),
        tuple(sorted({s.function for s in statements} - {launcher})),
    )


@dataclass(frozen=True)
class _Statement:
    function: str
    text: str
    span: tuple[int, int]
    line: int


def _statements(blank: str, origin: str) -> Iterator[_Statement]:
    position = 0
    while match := _TEMPLATE.search(blank, position):
        end = blank.find(";", match.start())
        line = blank.count("\n", 0, match.start()) + 1
        if end < 0:
            raise _unparsed(origin, line, blank[match.start() :], "it has no end")
        head = _HEAD.match(blank, match.start())
        statement = blank[match.start() : end + 1]
        if head is None:
            raise _unparsed(origin, line, statement, "it is not 'template void NAME<…> (…);'")
        yield _Statement(head.group(1), statement, (match.start(), end + 1), line)
        position = end + 1


def _parse(
    statement: _Statement, *, origin: str, include: tuple[str, ...], scopes: tuple[str, str]
) -> Instantiation:
    def unparsed(why: str) -> SelectError:
        return _unparsed(origin, statement.line, statement.text, why)

    inner, rest = _angle(statement.text, statement.text.index("<"), unparsed)
    arguments = [" ".join(part.split()) for part in _split(inner)]
    if len(arguments) != _ARGUMENTS:
        raise unparsed(f"it has {len(arguments)} template arguments, not {_ARGUMENTS}")
    compact = [re.sub(r" ?([<>,:]) ?", r"\1", argument) for argument in arguments]
    cta, cluster = (_shape(compact[place], unparsed) for place in (7, 8))
    for place, argument in enumerate(compact):
        if place not in (7, 8) and not _TYPE.fullmatch(argument):
            raise unparsed(f"{arguments[place][:200]!r} is not the name of a type")
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
    return _STRING_OR_COMMENT.sub(
        lambda m: m.group() if m.group()[0] == '"' else re.sub(r"[^\n]", " ", m.group()), text
    )


def _require_plain(blank: str, text: str, origin: str) -> None:
    """Refuse what could make a comment look like code or code like a comment."""
    code = re.search(r"[\"'\\]", _INCLUDE.sub("", blank))
    comment = any(_runs_on(found.group()) for found in _STRING_OR_COMMENT.finditer(text))
    if code or comment:
        raise SelectError(
            f"{origin}: the file holds quotes, a backslash or an open comment",
            details=text[:4000],
            hint=_HINT,
        )


def _runs_on(token: str) -> bool:
    """Whether a comment is not closed, or goes on in the next line."""
    if token.startswith("/*"):
        return len(token) < 4 or not token.endswith("*/")
    return token.startswith("//") and token.rstrip().endswith("\\")


def _around(
    blank: str, spans: list[tuple[int, int]], origin: str
) -> tuple[tuple[str, ...], tuple[str, str]]:
    """The includes, and the scopes that open and close; they are copied into every unit, so
    that nothing else may stand around and between the statements."""
    head, tail = blank[: spans[0][0]], blank[spans[-1][1] :]
    begin = max((match.end() for match in _INCLUDE.finditer(head)), default=0)
    include = tuple(_INCLUDE.findall(head))
    if not include:
        raise SelectError(f"{origin}: the file includes no launcher", hint=_HINT)
    opening, closing = head[begin:].strip(), tail.strip()
    opened = re.fullmatch(
        rf"(?:\s*(?:(?:inline\s+)?namespace(?:\s+[\w:]+)?\s*\{{|{_BEGIN}))*", opening
    )
    closed = re.fullmatch(rf"(?:\s*(?:\}}|{_END}))*", closing)
    between = "".join(blank[end:start] for (_, end), (start, _) in itertools.pairwise(spans))
    same = opening.count("{") == closing.count("}") and len(re.findall(_BEGIN, opening)) == len(
        re.findall(_END, closing)
    )
    before = _INCLUDE.sub("", head[:begin])
    if not opened or not closed or not same or before.strip() or between.strip():
        shown = [part.strip() for part in (before, opening, between, closing)]
        raise SelectError(
            f"{origin}: more than matching namespaces stands around the instantiations",
            details="\n…\n".join(part for part in shown if part)[:4000],
            hint=_HINT,
        )
    return include, (opening, closing)


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
        raise unparsed(f"{argument[:200]!r} is not a cute::Shape of three integers")  # type: ignore[operator]
    first, second, third = (int(extent) for extent in match.groups())
    return first, second, third


def _macros(blank: str) -> set[str]:
    return set(re.findall(r"^\s*(INSTANTIATE_\w+)\s*\(", blank, re.MULTILINE))


def _surroundings(blank: str, text: str, launcher: str, spans: list[tuple[int, int]]) -> str:
    shown = []
    for match in re.finditer(rf"\b{re.escape(launcher)}\b", blank):
        if not any(begin <= match.start() < end for begin, end in spans):
            line = blank.count("\n", 0, match.start()) + 1
            shown.append(f"line {line}:\n{text[match.start() : match.start() + 600]}")
    return "\n".join(shown[:5])


def _unparsed(origin: str, line: int, statement: str, why: str) -> SelectError:
    return SelectError(
        f"{origin}:{line}: cannot parse this instantiation: {why}",
        details=statement[:4000],
        hint="nothing was selected; if the release writes a new form, teach it to "
        "pipeline/instantiation.py",
    )
