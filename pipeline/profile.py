"""The profile: which release, which kernels, which gates. YAML in, a frozen model out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import ProfileError
from pipeline.model import QUANT_OPS, QuantOp, Shape3

_SHAPE = re.compile(r"^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}x[1-9][0-9]{0,3}$")
#: A profile's name and a release's name become folder names.
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")

Architecture = Literal["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]
Activation = Literal["fp16", "bf16", "fp8"]
Weight = Literal["int4", "int8"]

#: What has been proved right on a GPU. The rest of the schema is there to grow into.
VERIFIED_ARCHITECTURES: tuple[Architecture, ...] = ("sm_90a",)
VERIFIED_ACTIVATIONS: tuple[Activation, ...] = ("fp16",)
VERIFIED_WEIGHTS: tuple[Weight, ...] = ("int4",)


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Model):
    """A repository: URL or local path, and a tag, branch or commit (None: as pinned)."""

    url: str = Field(min_length=1)
    ref: str | None = None

    @field_validator("url", "ref")
    @classmethod
    def _no_option(cls, value: str | None) -> str | None:
        if value is not None and (not value or value[0] == "-" or not value.isprintable()):
            raise ValueError("may not be empty, start with '-' or hold control characters")
        return value


class Upstream(Model):
    trtllm: Source
    cutlass: Source


def parse_shape(text: str) -> Shape3:
    if not _SHAPE.fullmatch(text):
        raise ValueError(f"{text!r} is not a shape such as 128x64x64")
    first, second, third = (int(extent) for extent in text.split("x"))
    return first, second, third


class Gemm(Model):
    quant_ops: tuple[QuantOp, ...] = Field(default=QUANT_OPS, min_length=1)
    tiles: Literal["all"] | tuple[str, ...] = "all"
    clusters: Literal["all"] | tuple[str, ...] = "all"

    @field_validator("tiles", "clusters")
    @classmethod
    def _shapes(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(value, str):
            if not value:
                raise ValueError("name at least one, or 'all'")
            for text in value:
                parse_shape(text)
            _without_repeats(value)
        return value

    @field_validator("quant_ops")
    @classmethod
    def _distinct(cls, value: tuple[QuantOp, ...]) -> tuple[QuantOp, ...]:
        return _without_repeats(value)


class MRange(Model):
    first: int = Field(alias="from", ge=1, le=15)
    last: int = Field(alias="to", ge=1, le=15)

    @model_validator(mode="after")
    def _ordered(self) -> MRange:
        if self.last < self.first:
            raise ValueError("'to' is below 'from'")
        return self


class GemvChoice(Model):
    """CUDA-core GEMV kernels; upstream has them for M 1 to 15 and groups 64 and 128."""

    m: MRange = Field(default_factory=lambda: MRange.model_validate({"from": 1, "to": 15}))
    groups: tuple[Literal[64, 128], ...] = (64, 128)
    per_column: bool = True
    zeros: tuple[bool, ...] = (False, True)
    bias: tuple[bool, ...] = (False, True)

    @field_validator("groups", "zeros", "bias")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return _without_repeats(value)


def _refuse_few_stages(
    tile_bytes: int,
    scale_bytes: int,
    sums_bytes: int,
    ctas_per_sm: int,
    least: int,
    taken_bytes: int = 0,
) -> None:
    """As ``kernels/decode/ring.h`` counts them, which says so a compilation later."""
    most = (227 if ctas_per_sm == 1 else 113) * 1024  # of an SM's 228 KiB; 1 KiB a CTA is CUDA's
    stage = tile_bytes + scale_bytes + 3 * 8  # three barriers of 8 bytes
    fit = min(24, (most - taken_bytes) // stage)
    needed = max(least, -(-sums_bytes // tile_bytes))
    if fit < needed:
        raise ValueError(
            f"needs {needed} stages, and shared memory holds {fit}: ask for fewer rows, tokens, "
            "sets or ctas_per_sm, or for a smaller stage_k where there is one"
        )


class NarrowChoice(Model):
    """A decode kernel that multiplies with mma.sync."""

    rows: int = Field(ge=16, le=256)
    """Columns of W that a CTA computes."""
    tokens: Literal[8, 16]
    """Rows of activations that a CTA computes."""
    row_groups: Literal[1, 2, 4] = 1
    """Groups of warps that share the rows."""
    warps: Literal[6, 8] = 8
    """That multiply; fewer leave more registers to each."""
    ctas_per_sm: Literal[1, 2] = 1
    normalizes: bool = False
    """Also make kernels that normalise a few rows of activations first."""

    @model_validator(mode="after")
    def _whole_tiles(self) -> NarrowChoice:
        unit = 16 * self.row_groups
        if self.rows % unit:
            raise ValueError(
                f"rows {self.rows} with {self.row_groups} row_groups: not a multiple of {unit}"
            )
        return self

    @model_validator(mode="after")
    def _few_rows_to_normalize(self) -> NarrowChoice:
        if self.normalizes and (self.tokens, self.warps) != (8, 8):
            raise ValueError("normalizes: only kernels of 8 tokens and 8 warps do")
        return self

    @model_validator(mode="after")
    def _pairs_of_warps(self) -> NarrowChoice:
        if self.warps % (2 * self.row_groups):
            raise ValueError(
                f"{self.warps} warps with {self.row_groups} row_groups: each group needs pairs of "
                f"warps, so a multiple of {2 * self.row_groups}"
            )
        return self

    @model_validator(mode="after")
    def _stages(self) -> NarrowChoice:
        tile = self.rows * 128 + self.tokens * 512
        scales = 2 * 8 * self.rows * 2  # groups of 32, with zeros
        shares = self.warps // self.row_groups
        sums = shares * self.tokens * (self.rows + 4) * 4
        _refuse_few_stages(tile, scales, sums, self.ctas_per_sm, shares // 2)
        if self.normalizes:  # as kernels/decode/normalizing.h has it
            taken = 16 * 1024 + 2 * 8 * self.warps + 128
            tile = self.rows * 128
            _refuse_few_stages(tile, scales, sums, self.ctas_per_sm, shares // 2, taken)
        return self


class WideChoice(Model):
    """A decode kernel that multiplies with wgmma."""

    rows: Literal[64, 128, 192, 256]
    tokens: Literal[8, 16, 32, 64, 128, 256]
    sets: int = Field(default=1, ge=1, le=4)
    """Of warpgroups with the same rows, which take parts of K in turn."""
    buffers: Literal[2, 4] = 2
    """Of operands in registers."""
    stage_k: Literal[128, 256] = 256
    """How much of K one copy brings."""
    ctas_per_sm: Literal[1, 2] = 1
    cluster: Literal[1, 2, 4, 8] = 1
    """CTAs that share K."""
    streams: bool = False
    """All stages of all tiles are dealt out evenly (stream-K); for that one set and no cluster."""

    @model_validator(mode="after")
    def _threads(self) -> WideChoice:
        if self.rows // 64 * self.sets > 7:
            raise ValueError(
                f"{self.sets} sets of {self.rows} rows are {self.rows // 64 * self.sets} "
                "warpgroups, and a CTA has at most 7 beside its copying warp"
            )
        return self

    @model_validator(mode="after")
    def _alone(self) -> WideChoice:
        if self.streams and (self.sets, self.cluster) != (1, 1):
            raise ValueError("a kernel that streams has one set and no cluster")
        if self.streams and self.rows * self.ctas_per_sm < 128:
            raise ValueError(
                "a kernel that streams moves registers between its warps, and 64 rows alone on "
                "an SM have more than they can take: 128 rows, or ctas_per_sm: 2"
            )
        return self

    @model_validator(mode="after")
    def _stages(self) -> WideChoice:
        tile = self.stage_k * (self.rows // 2 + self.tokens * 2)
        scales = 2 * self.stage_k // 64 * self.rows * 2  # groups of 64, with zeros
        sums = self.sets * self.tokens * (self.rows + 4) * 4
        received = (self.cluster - 1) * (self.tokens // self.cluster) * self.rows * 4
        _refuse_few_stages(tile, scales, sums + received, self.ctas_per_sm, 2 * self.sets)
        return self


class DecodeChoice(Model):
    """This project's own kernels for few tokens; each entry is one tactic."""

    narrow: tuple[NarrowChoice, ...] = ()
    wide: tuple[WideChoice, ...] = ()

    @field_validator("narrow", "wide")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        # Those that differ in nothing but that would have one name.
        _without_repeats(tuple(e.model_copy(update={"normalizes": False}) for e in value))
        return value

    @model_validator(mode="after")
    def _some(self) -> DecodeChoice:
        if not self.narrow and not self.wide:
            raise ValueError("name at least one configuration, or leave the section out")
        return self


class BuildChoice(Model):
    compress: Literal["size", "speed", "balance", "default", "none"] = "size"
    static: bool = True
    """Also make a static library; the shared one is what gets verified, and is always made."""


class Gates(Model):
    """Limits that fail the run when the built library passes them."""

    library_bytes: int = Field(default=5_000_000, gt=0)
    spill_bytes: int = Field(default=0, ge=0)
    gemm_sass: tuple[str, ...] = ("HGMMA", "UTMALDG")
    narrow_sass: tuple[str, ...] = ("HMMA", "UTMALDG")
    wide_sass: tuple[str, ...] = ("HGMMA", "UTMALDG")


class Profile(Model):
    name: str
    upstream: Upstream
    architecture: Architecture = "sm_90a"
    activation: Activation = "fp16"
    weight: Weight = "int4"
    gemm: Gemm = Field(default_factory=Gemm)
    gemv: GemvChoice | None = None
    decode: DecodeChoice | None = None
    build: BuildChoice = Field(default_factory=BuildChoice)
    gates: Gates = Field(default_factory=Gates)

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("a profile's name is also a folder's: letters, digits, '.', '_', '-'")
        return value

    @model_validator(mode="after")
    def _verified(self) -> Profile:
        for label, value, verified in (
            ("architecture", self.architecture, VERIFIED_ARCHITECTURES),
            ("activation", self.activation, VERIFIED_ACTIVATIONS),
            ("weight", self.weight, VERIFIED_WEIGHTS),
        ):
            if value not in verified:
                raise ValueError(
                    f"{label} {value} is not verified yet; verified today: {', '.join(verified)}"
                )
        if self.upstream.trtllm.ref is None:
            raise ValueError("upstream.trtllm.ref: name a tag, branch or commit")
        return self

    @property
    def sm(self) -> int:
        """The architecture as a number, e.g. 90."""
        return int(re.sub(r"\D", "", self.architecture))

    def wants_tile(self, shape: str) -> bool:
        return self.gemm.tiles == "all" or shape in self.gemm.tiles

    def wants_cluster(self, shape: str) -> bool:
        return self.gemm.clusters == "all" or shape in self.gemm.clusters


T = TypeVar("T")


def _without_repeats(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) != len(values):
        raise ValueError("an entry is given twice")
    return values


def load_profile(path: Path) -> Profile:
    return load_yaml_model(path, Profile, what="profile")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            # `<<` merges another mapping, whose keys may be given again.
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        "while reading a mapping",
                        node.start_mark,
                        f"the key {key.value!r} is given twice",
                        key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


M = TypeVar("M", bound=BaseModel)


def load_yaml_model(path: Path, model: type[M], *, what: str) -> M:
    """Read ``path`` into ``model``; every fault becomes one ProfileError that names the key."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError as error:
        raise ProfileError(
            f"{what} {path} does not exist",
            hint="give an existing file with --config; configs/ holds the ones that ship",
        ) from error
    except OSError as error:
        raise ProfileError(
            f"{what} {path} cannot be read",
            details=str(error),
            hint="give a file that can be read with --config",
        ) from error
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # PyYAML lets out the errors of Python's constructors too (!!int "", 2024-13-45).
        raise ProfileError(
            f"{what} {path} cannot be read", details=repr(error), hint="mend the file's YAML"
        ) from error
    except yaml.YAMLError as error:
        raise ProfileError(
            f"{what} {path} cannot be read", details=str(error), hint="mend the file's YAML"
        ) from error
    if not isinstance(data, dict):
        raise ProfileError(
            f"{what} {path} holds no mapping", hint="compare with configs/w4a16-sm90.yaml"
        )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(fault, model) for fault in error.errors()]
        raise ProfileError(
            f"{what} {path} is not valid",
            details="\n".join(f"  {line}" for line in lines),
            hint="mend the named keys; configs/w4a16-sm90.yaml shows every key",
        ) from error


def _explain(fault: Any, model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in fault["loc"]) or "(top level)"
    if fault["type"] != "extra_forbidden":
        return f"{place}: {fault['msg'].removeprefix('Value error, ')}"
    name = str(fault["loc"][-1])
    known = sorted(_keys_at(model, fault["loc"][:-1]))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    suggestion = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{place}: unknown key; {suggestion}"


def _keys_at(model: type[BaseModel], path: Iterable[Any]) -> set[str]:
    """The YAML keys that the model at ``path`` below ``model`` knows."""
    current = [model]
    for part in path:
        following: list[type[BaseModel]] = []
        for candidate in current:
            for name, info in candidate.model_fields.items():
                if part in (name, info.alias):
                    following += _models_in(info.annotation)
        current = following or current
    return {
        info.alias or name for candidate in current for name, info in candidate.model_fields.items()
    }


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for argument in getattr(annotation, "__args__", ()):
        found += _models_in(argument)
    return found
