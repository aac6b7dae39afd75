"""How a checkpoint says that it is quantised: ``quantization_config`` and ``quantize_config.json``.

Keys and their meaning are those of GPTQModel (``gptqmodel/quantization/config.py``), AutoGPTQ
(``auto_gptq/quantization/config.py``), AutoAWQ (``awq/models/_config.py``), transformers
(``utils/quantization_config.py``) and compressed-tensors (``quantization/quant_args.py``,
``quant_scheme.py``, ``quant_config.py``; matching of modules: ``utils/match.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from w4a16.arguments import is_group_size
from w4a16.errors import FormatError

Method = Literal["gptq", "awq", "compressed-tensors"]
ZeroPoints = Literal["v1", "v2"]

METHODS: tuple[Method, ...] = ("gptq", "awq", "compressed-tensors")

_SUPPORTED = (
    "supported are 4-bit gptq (checkpoint_format gptq or gptq_v2), awq (version gemm) and"
    " compressed-tensors (format pack-quantized)"
)
# Where a model's config.json keeps it; older compressed-tensors wrote compression_config.
_SECTIONS = ("quantization_config", "compression_config")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """How one weight is stored."""

    method: Method | Literal["plain"]
    group_size: int | None
    """Inputs that share a scale; -1: all of them; None: not said, so read off the shapes."""
    symmetric: bool | None = None
    """Whether every zero point is 8; None: not said."""
    zero_points: ZeroPoints = "v1"
    """GPTQ: v1 stores the zero point minus 1, v2 the zero point."""
    act_order: bool | None = None
    """Whether rows may belong to any group (``g_idx``); None: not said."""
    producer: str = ""
    """The program that wrote the checkpoint, if it says so; for messages."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the modules of certain names are; the first rule that matches a name decides."""

    kind: Literal["regex", "exact", "contains", "not under"]
    """regex: as ``re.match``; contains: anywhere in the name; not under: no pattern ends it."""
    patterns: tuple[str, ...]
    layer: LayerConfig | None
    """None: such modules are not quantised."""
    problem: str = ""
    """Why such modules cannot be used, if they cannot."""

    def matches(self, name: str) -> bool:
        if self.kind == "regex":
            return any(re.match(pattern, name) for pattern in self.patterns)
        if self.kind == "exact":
            return name in self.patterns
        if self.kind == "contains":
            return any(pattern in name for pattern in self.patterns)
        return not any(f".{name}".endswith(f".{pattern}") for pattern in self.patterns)


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the weights of a model are quantised."""

    method: Method
    rules: tuple[Rule, ...] = ()
    default: LayerConfig | None
    """Of modules that no rule matches; None: not quantised."""

    @classmethod
    def parse(cls, config: Any) -> QuantizationConfig:
        """Reads a ``quantization_config``.

        ``config`` is the mapping, the whole ``config.json`` around it, the content of a
        ``quantize_config.json``, or an object with ``to_dict`` (those of transformers). Raises
        :class:`w4a16.FormatError`, naming the key, its value, and what is supported.
        """
        if isinstance(config, QuantizationConfig):
            return config
        keys = _section(_mapping(config, "config"))
        method = _method(keys)
        if method == "gptq":
            return _gptq(keys)
        if method == "awq":
            return _awq(keys)
        return _compressed_tensors(keys)

    def for_module(self, name: str) -> LayerConfig | None:
        """How the linear module ``name`` (as in the model, without ``.weight``) is stored.

        None: not quantised. Raises :class:`w4a16.FormatError` if it is quantised in a way that
        is not supported.
        """
        for rule in self.rules:
            if rule.matches(name):
                if rule.problem:
                    raise FormatError(f"{name}: {rule.problem}; {_SUPPORTED}")
                return rule.layer
        return self.default

    @property
    def layer(self) -> LayerConfig:
        """How any quantised weight is stored, where that needs no name.

        Raises :class:`w4a16.FormatError` where modules differ.
        """
        if self.default is not None:
            return self.default
        found = {rule.layer for rule in self.rules if rule.layer is not None}
        if len(found) == 1 and not any(rule.problem for rule in self.rules):
            return found.pop()
        raise FormatError(
            "config quantises modules in different ways: pass config.for_module(name), with"
            " config = w4a16.QuantizationConfig.parse(…), for the module that this weight is of"
        )


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict):
        converted = to_dict()
        if isinstance(converted, Mapping):
            return converted
    raise FormatError(
        f"{name} is {_show(value)}: expected a mapping, such as the quantization_config of a"
        f" model's config.json; {_SUPPORTED}"
    )


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantisation's part of a ``config.json``, or what was given if it is that part."""
    for outer in (config, config.get("text_config")):
        for name in _SECTIONS:
            if isinstance(outer, Mapping) and outer.get(name) is not None:
                return _mapping(outer[name], name)
    if "architectures" in config or "model_type" in config:
        raise FormatError(
            "config has no quantization_config: the model is not quantised, or its"
            f" quantize_config.json holds it; {_SUPPORTED}"
        )
    return config


def _method(keys: Mapping[str, Any]) -> Method:
    given = next((name for name in ("quant_method", "method") if keys.get(name) is not None), None)
    if given is None:
        # Files of AutoAWQ and of AutoGPTQ before 0.7 do not name the method.
        if "config_groups" in keys:
            return "compressed-tensors"
        if "zero_point" in keys or "w_bit" in keys:
            return "awq"
        if "bits" in keys and ("desc_act" in keys or "damp_percent" in keys or "sym" in keys):
            return "gptq"
        raise FormatError(f"config has no quant_method, only {sorted(keys)}; {_SUPPORTED}")
    method = _word(keys, given)
    for known in METHODS:
        if method == known:
            return known
    advice = ""
    if method == "auto-round":
        advice = " (export it with the format auto_gptq or auto_awq)"
    raise FormatError(f"{given} is {_show(keys[given])}{advice}; {_SUPPORTED}")


# ---- GPTQ ----


def _gptq(keys: Mapping[str, Any]) -> QuantizationConfig:
    _bits(keys, "bits")
    zero_points: ZeroPoints = "v1"
    for name in ("checkpoint_format", "format"):
        if keys.get(name) is not None:
            checkpoint_format = _word(keys, name)
            if checkpoint_format not in ("gptq", "gptq_v2"):
                raise FormatError(
                    f"{name} is {_show(keys[name])}: its weights are in a kernel's own layout;"
                    " save the model as gptq or gptq_v2 (GPTQModel: format='gptq')"
                )
            zero_points = "v2" if checkpoint_format == "gptq_v2" else "v1"
            break
    if _flag(keys, "is_marlin_format"):
        raise FormatError(
            "is_marlin_format is true: the weights are in Marlin's own layout; save the model as"
            " gptq or gptq_v2"
        )
    pack_dtype = keys.get("pack_dtype")
    if pack_dtype is not None and str(pack_dtype).rsplit(".", 1)[-1] != "int32":
        raise FormatError(f"pack_dtype is {_show(pack_dtype)}: supported is int32")
    default = LayerConfig(
        method="gptq",
        group_size=_group_size(keys, "group_size"),
        symmetric=_flag(keys, "sym"),
        zero_points=zero_points,
        act_order=_flag(keys, "desc_act"),
        producer=_producer(keys),
    )
    rules = [_dynamic_rule(key, value, default) for key, value in _dynamic(keys).items()]
    if not _flag(keys, "lm_head"):
        rules.append(Rule(kind="regex", patterns=(r"(.*\.)?lm_head$",), layer=None))
    inside = _inside_blocks(keys)
    if inside:
        rules.append(Rule(kind="not under", patterns=inside, layer=None))
    return QuantizationConfig(method="gptq", rules=tuple(rules), default=default)


def _dynamic(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    dynamic = keys.get("dynamic")
    if dynamic is None or dynamic is False:
        return {}
    if isinstance(dynamic, Mapping):
        return dynamic
    raise FormatError(
        f"dynamic is {_show(dynamic)}: expected a mapping from regular expressions to overrides"
    )


def _dynamic_rule(key: str, overrides: Any, default: LayerConfig) -> Rule:
    """``-:regex``: not quantised; ``+:regex`` or ``regex``: with these keys instead."""
    pattern = key[2:] if key.startswith(("+:", "-:")) else key
    _check_regex(pattern, f"dynamic[{key!r}]")
    if key.startswith("-:"):
        return Rule(kind="regex", patterns=(pattern,), layer=None)
    where = f"dynamic[{key!r}]"
    found = _mapping(overrides if overrides is not None else {}, where)
    try:
        if found.get("bits") is not None:
            _bits(found, "bits", where)
        group_size = _group_size(found, "group_size", where)
        symmetric = _flag(found, "sym", where)
        act_order = _flag(found, "desc_act", where)
    except FormatError as error:
        # Of no concern until such a module is asked for.
        return Rule(kind="regex", patterns=(pattern,), layer=None, problem=str(error))
    layer = replace(
        default,
        group_size=default.group_size if group_size is None else group_size,
        symmetric=default.symmetric if symmetric is None else symmetric,
        act_order=default.act_order if act_order is None else act_order,
    )
    return Rule(kind="regex", patterns=(pattern,), layer=layer)


def _inside_blocks(keys: Mapping[str, Any]) -> tuple[str, ...]:
    """Which modules of a block are quantised: lists of lists of names, as optimum writes them."""
    name = "modules_in_block_to_quantize"
    given = keys.get(name)
    if given is None:
        return ()
    flat: list[str] = []
    for item in _sequence(given, name):
        flat += [item] if isinstance(item, str) else _texts(item, name)
    return tuple(flat)


def _producer(keys: Mapping[str, Any]) -> str:
    """``meta.quantizer`` (GPTQModel: a list, AutoGPTQ: a text), or ``provider`` (AutoRound)."""
    meta = keys.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    if isinstance(quantizer, list | tuple):
        quantizer = ", ".join(str(item) for item in quantizer)
    return str(quantizer or keys.get("provider") or "")


# ---- AWQ ----


def _awq(keys: Mapping[str, Any]) -> QuantizationConfig:
    _bits(keys, "bits" if keys.get("bits") is not None else "w_bit")
    names = ("version", "format", "checkpoint_format")
    name = next((name for name in names if keys.get(name) is not None), None)
    if name is not None and _word(keys, name) != "gemm":
        raise FormatError(
            f"{name} is {_show(keys[name])}: supported is gemm; quantise the model again with"
            " AutoAWQ's version='GEMM'"
        )
    if _plain(keys.get("backend")) == "llm-awq":
        raise FormatError(
            "backend is 'llm-awq', whose weights lie differently: quantise the model again with"
            " AutoAWQ's version='GEMM'"
        )
    group_name = "group_size" if keys.get("group_size") is not None else "q_group_size"
    zero_point = _flag(keys, "zero_point")
    default = LayerConfig(
        method="awq",
        group_size=_group_size(keys, group_name),
        symmetric=None if zero_point is None else not zero_point,
        act_order=False,
        producer=_producer(keys),
    )
    left = keys.get("modules_to_not_convert")
    patterns = () if left is None else tuple(_texts(left, "modules_to_not_convert"))
    rules = (Rule(kind="contains", patterns=patterns, layer=None),) if patterns else ()
    return QuantizationConfig(method="awq", rules=rules, default=default)


# ---- compressed-tensors ----


def _compressed_tensors(keys: Mapping[str, Any]) -> QuantizationConfig:
    groups = _mapping(keys.get("config_groups"), "config_groups")
    common = keys.get("format")
    # Of several targets an exact name counts first, then an expression, then a class.
    by_kind: dict[str, list[Rule]] = {"exact": [], "regex": [], "class": []}
    problems: list[str] = []
    for group, scheme in groups.items():
        where = f"config_groups[{group!r}]"
        scheme = _mapping(scheme, where)
        layer, problem = _scheme(scheme, where, common)
        problems += [problem] if problem else []
        for target in _texts(scheme.get("targets"), f"{where}.targets"):
            kind, pattern = _target(target, f"{where}.targets")
            if kind != "other":
                rule_kind: Literal["exact", "regex"] = "exact" if kind == "exact" else "regex"
                by_kind[kind].append(
                    Rule(kind=rule_kind, patterns=(pattern,), layer=layer, problem=problem)
                )
    rules = [rule for kind in by_kind.values() for rule in kind]
    if problems and not any(rule.layer for rule in rules):
        raise FormatError(f"{problems[0]}; {_SUPPORTED}")
    if not rules:
        raise FormatError(
            f"config_groups is {_show(dict(groups))}: expected groups with weights and targets;"
            f" {_SUPPORTED}"
        )
    ignored = [] if keys.get("ignore") is None else _texts(keys["ignore"], "ignore")
    left: list[Rule] = []
    for target in ignored:
        kind, pattern = _target(target, "ignore")
        if kind != "other":
            left.append(
                Rule(kind="exact" if kind == "exact" else "regex", patterns=(pattern,), layer=None)
            )
    return QuantizationConfig(method="compressed-tensors", rules=(*left, *rules), default=None)


def _target(target: str, where: str) -> tuple[Literal["exact", "regex", "class", "other"], str]:
    """How a target is to be matched, where nothing but the names of linear modules is known."""
    if target.startswith("re:"):
        pattern = target[len("re:") :]
        _check_regex(pattern, where)
        return "regex", pattern
    if target in ("Linear", "LinearBase"):
        return "class", ""  # every linear module
    if "." in target or target[:1].islower():
        return "exact", target
    return "other", target  # another class


def _scheme(scheme: Mapping[str, Any], where: str, common: Any) -> tuple[LayerConfig | None, str]:
    """The layer, or why it is not supported."""
    try:
        return _supported_scheme(scheme, where, common), ""
    except FormatError as error:
        return None, str(error)


def _supported_scheme(scheme: Mapping[str, Any], where: str, common: Any) -> LayerConfig:
    name = f"{where}.format" if scheme.get("format") is not None else "format"
    stored = scheme["format"] if scheme.get("format") is not None else common
    if _plain(stored) != "pack-quantized":
        raise FormatError(f"{name} is {_show(stored)}: supported is 'pack-quantized'")
    for side in ("input_activations", "output_activations"):
        if scheme.get(side) is not None:
            raise FormatError(
                f"{where}.{side} is {_show(scheme[side])}: supported is null, since activations"
                " stay FP16"
            )
    weights = scheme.get("weights")
    if weights is None:
        raise FormatError(f"{where}.weights is null: expected 4-bit weights")
    where = f"{where}.weights"
    weights = _mapping(weights, where)
    _bits(weights, "num_bits", where)
    if _plain(weights.get("type", "int")) != "int":
        raise FormatError(f"{where}.type is {_show(weights['type'])}: supported is 'int'")
    group_size = _group_size(weights, "group_size", where)
    strategy = _plain(weights.get("strategy"))
    if strategy is None:
        strategy = "group" if (group_size or 0) > 0 else "channel" if group_size == -1 else "tensor"
    if strategy not in ("group", "channel"):
        raise FormatError(
            f"{where}.strategy is {_show(weights.get('strategy'))}: supported are 'group' and"
            " 'channel'"
        )
    if strategy == "group" and (group_size is None or group_size < 1):
        raise FormatError(
            f"{where}.group_size is {_show(weights.get('group_size'))}: expected a positive"
            " number with the strategy 'group'"
        )
    act_order = _plain(weights.get("actorder"))
    # group (alias dynamic, and true): rows may belong to any group.  weight (alias static):
    # rows were quantised in another order, and are stored in their own.
    if act_order not in (None, True, False, "group", "dynamic", "weight", "static"):
        raise FormatError(
            f"{where}.actorder is {_show(weights['actorder'])}: supported are null, 'group' and"
            " 'weight'"
        )
    return LayerConfig(
        method="compressed-tensors",
        group_size=group_size if strategy == "group" else -1,
        symmetric=_flag(weights, "symmetric", where) is not False,
        act_order=act_order in (True, "group", "dynamic"),
    )


# ---- Values ----


def _plain(value: Any) -> Any:
    """Of an enumerator its value, of a text its lower case."""
    value = getattr(value, "value", value)
    return value.lower() if isinstance(value, str) else value


def _word(keys: Mapping[str, Any], name: str) -> str:
    value = _plain(keys[name])
    if not isinstance(value, str):
        raise FormatError(f"{name} is {_show(keys[name])}: expected a text; {_SUPPORTED}")
    return value


def _bits(keys: Mapping[str, Any], name: str, where: str = "") -> None:
    bits = keys.get(name)
    if isinstance(bits, bool) or bits != 4:
        full = f"{where}.{name}" if where else name
        raise FormatError(f"{full} is {_show(bits)}: supported is the number 4")


def _group_size(keys: Mapping[str, Any], name: str, where: str = "") -> int | None:
    value = keys.get(name)
    if value is None:
        return None
    if not is_group_size(value):
        full = f"{where}.{name}" if where else name
        raise FormatError(
            f"{full} is {_show(value)}: expected a positive number, or -1 for one scale a column"
        )
    return value


def _flag(keys: Mapping[str, Any], name: str, where: str = "") -> bool | None:
    value = keys.get(name)
    if value is None or isinstance(value, bool):
        return value
    full = f"{where}.{name}" if where else name
    raise FormatError(f"{full} is {_show(value)}: expected true or false")


def _sequence(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return value
    raise FormatError(f"{name} is {_show(value)}: expected a list")


def _texts(value: Any, name: str) -> list[str]:
    items = _sequence(value, name)
    for item in items:
        if not isinstance(item, str):
            raise FormatError(f"{name} holds {_show(item)}: expected texts")
    return list(items)


def _check_regex(pattern: str, name: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise FormatError(f"{name} is no regular expression: {error}") from None


def _show(value: Any) -> str:
    text = repr(getattr(value, "value", value))
    return text if len(text) <= 80 else f"{text[:77]}…"
