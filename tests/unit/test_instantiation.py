"""The parser of generated C++: whatever names the launcher is understood, or stops the run."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SelectError
from pipeline.instantiation import ParsedFile, parse_file

from .conftest import LAUNCHER

INCLUDE = '#include "launchers/fpA_intB_launcher_sm90.inl"\n'
OPEN = "namespace tensorrt_llm\n{\nnamespace kernels\n{\n"
CLOSE = "} // namespace kernels\n} // namespace tensorrt_llm\n"
ARGUMENTS = (
    "half",
    "cutlass::uint4b_t",
    "half",
    "half",
    "half",
    "cutlass::WeightOnlyQuantOp::FINEGRAINED_SCALE_ONLY",
    "tensorrt_llm::cutlass_extensions::EpilogueOpBias",
    "cute::Shape<cute::Int<128>, cute::Int<64>, cute::Int<64>>",
    "cute::Shape<cute::Int<2>, cute::Int<1>, cute::Int<1>>",
    "cutlass::gemm::KernelTmaWarpSpecializedCooperative",
    "cutlass::epilogue::TmaWarpSpecializedCooperative",
)
PARAMETERS = "(const half*, const cutlass::uint4b_t*, int, size_t, cudaStream_t, int*\n)"

settings.register_profile("unit", deadline=None, max_examples=60)
settings.load_profile("unit")


def statement(*arguments: str, function: str = LAUNCHER, parameters: str = PARAMETERS) -> str:
    return f"template void {function}<{', '.join(arguments or ARGUMENTS)}> {parameters};\n"


def source(*statements: str, opening: str = OPEN, closing: str = CLOSE, head: str = INCLUDE) -> str:
    return head + opening + "\n".join(statements or [statement()]) + closing


def parse(text: str) -> ParsedFile:
    return parse_file(text, origin="gemm/90/file.generated.cu", launcher=LAUNCHER)


def changed(place: int, value: str) -> str:
    return statement(*ARGUMENTS[:place], value, *ARGUMENTS[place + 1 :])


def test_an_instantiation_is_read_into_its_parts() -> None:
    (found,) = parse(source()).instantiations
    assert (found.act, found.weight, found.out) == ("half", "cutlass::uint4b_t", "half")
    assert found.quant_op.endswith("::FINEGRAINED_SCALE_ONLY")
    assert (found.cta, found.cluster) == ((128, 64, 64), (2, 1, 1))
    assert found.mainloop == "cutlass::gemm::KernelTmaWarpSpecializedCooperative"
    assert found.epilogue_schedule == "cutlass::epilogue::TmaWarpSpecializedCooperative"
    assert (found.origin, found.line) == ("gemm/90/file.generated.cu", 6)
    assert found.include == ("launchers/fpA_intB_launcher_sm90.inl",)
    assert found.arguments == ", ".join(ARGUMENTS)


def test_the_scopes_around_the_instantiations_are_kept_for_the_units() -> None:
    (found,) = parse(source()).instantiations
    assert found.open_scope.split() == OPEN.split()
    assert found.close_scope.split() == ["}", "}"]


def test_several_instantiations_are_found_in_order_with_their_lines() -> None:
    text = source(statement(), changed(0, "__nv_bfloat16"), changed(1, "uint8_t"))
    found = parse(text).instantiations
    assert [f.act for f in found] == ["half", "__nv_bfloat16", "half"]
    lines = text.splitlines()
    assert all(lines[f.line - 1].startswith("template void") for f in found)


@pytest.mark.parametrize(
    "space", [" ", "\n", "\t", "\r\n", " \n\t ", "\f", "/* a > b; */", "//x\n"]
)
def test_white_space_and_comments_between_tokens_do_not_matter(space: str) -> None:
    tokens = re.findall(r"::|\w+|[^\w\s]", statement())
    text = space.join(tokens)
    if not space.isspace():
        text = text.replace(f"template{space}void{space}", f"template {space}void {space}")
    (found,) = parse(source(text + "\n")).instantiations
    assert (found.cta, found.cluster) == ((128, 64, 64), (2, 1, 1))
    assert found.arguments.count(",") == 10 + 4
    assert "//" not in found.arguments
    assert "/*" not in found.arguments


def test_a_commented_out_instantiation_is_none() -> None:
    gone = "".join(f"// {line}\n" for line in changed(0, "float").splitlines())
    block = f"/* {changed(0, 'double')} */\n"
    found = parse(source(gone, statement(), block)).instantiations
    assert [f.act for f in found] == ["half"]


def test_a_comment_in_a_statement_does_not_reach_the_units() -> None:
    text = statement().replace("half, cutlass", "half, // the > weights;\n cutlass", 1)
    (found,) = parse(source(text)).instantiations
    assert found.arguments == ", ".join(ARGUMENTS)
    assert "//" not in found.text


def test_namespaces_opened_by_macros_are_kept() -> None:
    opening = "TRTLLM_NAMESPACE_BEGIN\nnamespace kernels\n{\n"
    closing = "} // namespace kernels\nTRTLLM_NAMESPACE_END\n"
    (found,) = parse(source(opening=opening, closing=closing)).instantiations
    assert found.open_scope.startswith("TRTLLM_NAMESPACE_BEGIN")
    assert found.close_scope.endswith("TRTLLM_NAMESPACE_END")


def test_nested_and_inline_namespaces_are_scopes() -> None:
    opening = "namespace a::b { inline namespace _v1 {\n"
    assert parse(source(opening=opening, closing="}}\n")).instantiations


def test_every_include_is_kept_whatever_follows_it_on_its_line() -> None:
    head = '#include "a.h" // first\n  #  include <b.h>\n#include "c.h" /* third */\n'
    (found,) = parse(source(head=head)).instantiations
    assert found.include == ("a.h", "b.h", "c.h")


def test_an_include_in_a_comment_is_none() -> None:
    (found,) = parse(source(head=f'/*\n#include "gone.h"\n*/\n{INCLUDE}')).instantiations
    assert found.include == ("launchers/fpA_intB_launcher_sm90.inl",)


def test_instantiations_of_other_functions_are_named_but_not_parsed() -> None:
    other = statement("int", "3", function="other_launcher")
    found = parse(source(other, statement(), other))
    assert len(found.instantiations) == 1
    assert found.others == ("other_launcher",)


def test_a_file_of_other_functions_says_which_they_are() -> None:
    text = source(statement("int", function="moe_launcher")) + "INSTANTIATE_MOE_GEMM(Sm90, 1);\n"
    found = parse(text)
    assert found.instantiations == ()
    assert found.others == ("INSTANTIATE_MOE_GEMM", "moe_launcher")


def test_an_empty_file_holds_nothing() -> None:
    assert parse("") == ParsedFile((), ())


@pytest.mark.parametrize("count", [0, 1, 10, 12])
def test_another_number_of_arguments_is_refused(count: int) -> None:
    arguments = (*ARGUMENTS, "int")[:count] or ("",)
    with pytest.raises(SelectError, match="template arguments, not 11"):
        parse(source(statement(*arguments)))


@pytest.mark.parametrize(
    "shape",
    [
        "cute::Shape<cute::Int<64>, cute::Int<16>>",
        "cute::Shape<cute::Int<64>, cute::Int<16>, cute::Int<64>, cute::Int<1>>",
        "cute::Shape<cute::Int<64.0>, cute::Int<16>, cute::Int<64>>",
        "cute::Shape<cute::Int<-64>, cute::Int<16>, cute::Int<64>>",
        "cute::Shape<cute::Int<0>, cute::Int<16>, cute::Int<64>>",
        "cute::Shape<cute::Int<064>, cute::Int<16>, cute::Int<64>>",
        "cute::Shape<cute::Int<0x40>, cute::Int<16>, cute::Int<64>>",
        "cute::Shape<cute::Int<1'0>, cute::Int<16>, cute::Int<64>>",
        "cute::Shape<cute::Int<\u0666\u0664>, cute::Int<16>, cute::Int<64>>",
        "cute::Shape<cute::Int<N>, cute::Int<16>, cute::Int<64>>",
        "cute::Shape<cute::_64, cute::_16, cute::_64>",
        "cute::Int<64>",
        "half",
    ],
)
@pytest.mark.parametrize("place", [7, 8])
def test_a_shape_of_anything_but_three_plain_integers_is_refused(shape: str, place: int) -> None:
    with pytest.raises(SelectError) as caught:
        parse(source(changed(place, shape)))
    assert LAUNCHER in caught.value.details


@pytest.mark.parametrize(
    "value", ["", "1", "half*", "half&", "f(x)", "a + b", '"half"', "decltype(x)", "half{}", "a, b"]
)
def test_an_argument_that_is_no_type_name_is_refused(value: str) -> None:
    with pytest.raises(SelectError):
        parse(source(changed(0, value)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cute::Shape<", "cute::Shape<<"),
        ("Cooperative> (", "Cooperative>> ("),
        (";", ""),
        ("(const", "((const"),
        (PARAMETERS, ""),
        (PARAMETERS, "()"),
        (PARAMETERS, "(int) (int)"),
        (PARAMETERS, "(void (*)(int))"),
        ("template void", "template"),
        ("template void", "template int"),
        ("template void", "extern template void"),
        ("template void", "template<> void"),
        ("template void", "template <> void"),
        (LAUNCHER, f"kernels::{LAUNCHER}"),
        (LAUNCHER, f"{LAUNCHER}::call"),
        (f"template void {LAUNCHER}", f"auto x = &{LAUNCHER}"),
        ("template", "templ\\\nate"),
    ],
)
def test_a_statement_of_another_form_is_refused_and_shown(old: str, new: str) -> None:
    broken = statement()
    assert old in broken
    with pytest.raises(SelectError) as caught:
        parse(source(broken.replace(old, new, 1)))
    assert caught.value.details


@pytest.mark.parametrize(
    "smuggled",
    [
        "int evil = 1;",
        "#if 0",
        "#endif",
        "#define half float",
        "} namespace other {",
        "namespace inner {",
        "using half = float;",
        "extern",
        "__attribute__((constructor)) void f() {}",
        "INSTANTIATE_SOMETHING(half, 1);",
        'static const char* s = "//";',
        "[[deprecated]]",
    ],
)
@pytest.mark.parametrize("place", ["before", "opening", "between", "closing", "after"])
def test_code_beside_the_instantiations_is_never_passed_over(smuggled: str, place: str) -> None:
    code = f"\n{smuggled}\n"
    parts = [INCLUDE, OPEN, statement(), changed(0, "float"), CLOSE]
    at = {"before": 0, "opening": 1, "between": 3, "closing": 4, "after": 5}[place]
    with pytest.raises(SelectError):
        parse("".join([*parts[:at], code, *parts[at:]]))


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        (OPEN, "}\n"),
        (OPEN, "} } }\n"),
        ("TRTLLM_NAMESPACE_BEGIN\n", ""),
        ("TRTLLM_NAMESPACE_BEGIN\n", "}\n"),
        ("", "TRTLLM_NAMESPACE_END\n"),
    ],
)
def test_scopes_that_do_not_balance_are_refused(opening: str, closing: str) -> None:
    with pytest.raises(SelectError):
        parse(source(opening=opening, closing=closing))


def test_instantiations_without_an_include_are_refused() -> None:
    with pytest.raises(SelectError, match="includes no launcher"):
        parse(source(head=""))


@pytest.mark.parametrize(
    "hidden",
    [
        'auto a = "//"; ',
        'auto a = "/*"; ',
        "auto a = '\"'; // ",
        'auto a = R"(")"; // ',
        "/* never closed ",
        "// goes on \\\n",
    ],
)
def test_nothing_hides_an_instantiation_behind_what_looks_like_a_comment(hidden: str) -> None:
    """Whether it is hidden is for a compiler to say: the parser must not guess."""
    with pytest.raises(SelectError):
        parse(source(statement(), hidden + changed(0, "float")))
    with pytest.raises(SelectError):
        parse(hidden + source())


def test_a_launcher_named_in_two_pieces_is_not_passed_over() -> None:
    with pytest.raises(SelectError):
        parse(
            source(statement(), statement().replace(LAUNCHER, f"{LAUNCHER[:9]}\\\n{LAUNCHER[9:]}"))
        )


HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(
            [
                INCLUDE,
                OPEN,
                CLOSE,
                statement(),
                changed(0, "float"),
                statement("int", function="other"),
                LAUNCHER,
                *("//", "/*", "*/", '"', "'", "\\\n", "\n", ";", "<", ">", "{", "}", "(", ")", "#"),
                *("template", "template void ", "void ", "namespace x {", "#if 0\n", "#endif\n"),
            ]
        ),
        st.text(max_size=8),
    ),
    max_size=14,
).map("".join)


@given(HOSTILE)
@settings(max_examples=300, deadline=None)
def test_any_text_is_understood_whole_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except SelectError:
        return
    # What is left without the plainest comments names the launcher once an instantiation.
    code = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    assert len(re.findall(rf"\b{LAUNCHER}\b", code)) == len(found.instantiations)
    for instantiation in found.instantiations:
        assert instantiation.function == LAUNCHER
        assert instantiation.arguments.count(",") >= 10


@given(HOSTILE)
def test_a_refused_mention_is_shown(text: str) -> None:
    with pytest.raises(SelectError) as caught:
        parse(source(statement(), f"{LAUNCHER} x;", opening=OPEN) + text.replace(LAUNCHER, ""))
    assert caught.value.details


@given(st.sampled_from(range(len(source()))), st.sampled_from("<>(){};,:#\"'\\/*x0 \n"))
@settings(max_examples=300, deadline=None)
def test_one_changed_character_never_loses_an_instantiation(place: int, character: str) -> None:
    text = source()
    broken = text[:place] + character + text[place + 1 :]
    if f"\n{character}" in ("\n/", "\n*") or not re.search(rf"\b{LAUNCHER}\b", broken):
        return
    try:
        found = parse(broken)
    except SelectError:
        return
    assert len(found.instantiations) == 1


@pytest.mark.parametrize(
    "text",
    [
        "/* " * 200_000,
        "/*/" * 200_000,
        '"' * 200_000,
        "template " * 100_000,
        "template void " * 100_000,
        "<" * 500_000,
        source("\n".join(statement() for _ in range(2_000))),
        source(changed(0, "a<" * 50_000)),
        source(changed(0, "a" + "<a," * 50_000 + ">" * 50_000)),
        source(opening="namespace " * 50_000),
        source(opening="ANAMESPACE_BEGIN" * 40 + "!"),
        source(closing="ANAMESPACE_END" * 40 + "!"),
        source(opening=" \n" * 100_000 + "!"),
        source(statement(parameters="(" + "int, " * 100_000 + "int)")),
        f"#{' ' * 200_000}include",
        "\n" * 500_000 + LAUNCHER,
    ],
    ids=range(16),
)
def test_long_input_stays_fast(text: str) -> None:
    shown = ""
    begin = time.perf_counter()
    try:
        parse(text)
    except SelectError as error:
        shown = str(error)
    assert time.perf_counter() - begin < 3
    assert len(shown) < 100_000
