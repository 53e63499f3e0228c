"""openpi's JAX checkpoints: the orbax directory `params/` of a training step, presented under canonical names.

Orbax stores a tree of arrays as zarr in an OCDBT database (or, when old, in plain folders); the library
`tensorstore` alone reads both, JAX is not needed. The layers of a tower are stacked along the first axis,
attention weights are in einsum layouts with the heads as an axis of their own, and q, k, v or gate, up
share an array. Undone lazily, one canonical tensor at a time.

LoRA deltas are merged by openpi's own arithmetic (src/openpi/models/lora.py): see `merged`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cortexflow.checkpoints.dialects import Fact, Facts
from cortexflow.checkpoints.names import DECODER, EMBEDDING, ENCODER, PROJECTOR, VISION
from cortexflow.checkpoints.tensors import LazyTensor
from cortexflow.errors import CheckpointError

MARK = "PaliGemma/"  # every openpi tree has arrays below it, no other format has such names
NEEDS = "the package tensorstore: pip install tensorstore (JAX itself is not needed)"

MOST_VALUES = 1 << 50  # of an array; a header that says more is damaged
MOST_LAYERS = 1000

DTYPES = {  # of zarr version 2 and 3
    "bfloat16": torch.bfloat16,
    **dict.fromkeys(("<f2", "float16"), torch.float16),
    **dict.fromkeys(("<f4", "float32"), torch.float32),
    **dict.fromkeys(("<f8", "float64"), torch.float64),
    **dict.fromkeys(("<i4", "int32"), torch.int32),
    **dict.fromkeys(("<i8", "int64"), torch.int64),
    **dict.fromkeys(("|u1", "uint8"), torch.uint8),
    **dict.fromkeys(("|i1", "int8"), torch.int8),
    **dict.fromkeys(("|b1", "bool"), torch.bool),
}


# ---- layouts: one layer of a stored array as PyTorch has it -----------------------------------------

Layout = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1)


def _linear(x: Tensor) -> Tensor:
    """[in, out] as [out, in]."""
    return x.t()


def _heads_out(x: Tensor) -> Tensor:
    """[in, heads, head_dim] as [heads * head_dim, in]."""
    return x.flatten(1).t()


def _heads_in(x: Tensor) -> Tensor:
    """[heads, head_dim, out] as [out, heads * head_dim]."""
    return x.flatten(0, 1).t()


def _heads_first(x: Tensor) -> Tensor:
    """[heads, in, head_dim] as [heads * head_dim, in]."""
    return x.transpose(1, 2).flatten(0, 1)


def _convolution(x: Tensor) -> Tensor:
    """[height, width, channels, out] as [out, channels, height, width]."""
    return x.permute(3, 2, 0, 1)


def _first(x: Tensor) -> Tensor:
    """[1, patches, width] as [patches, width]."""
    return x[0]


class Rule(NamedTuple):
    """How an array becomes canonical tensors: one, or one for each element (q, k, v) of its first axis."""

    rank: int  # without the axis of layers and that of the parts
    layout: Layout
    names: tuple[str, ...]  # `{}` stands for a layer: such arrays are stacks


def _layer_norm(name: str) -> dict[str, Rule]:
    return {"scale": Rule(1, _same, (f"{name}.weight",)), "bias": Rule(1, _same, (f"{name}.bias",))}


def _dense(name: str) -> dict[str, Rule]:
    return {"kernel": Rule(2, _linear, (f"{name}.weight",)), "bias": Rule(1, _same, (f"{name}.bias",))}


def _below(path: str, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    return {f"{path}/{name}": rule for name, rule in rules.items()}


def _vision() -> dict[str, Rule]:
    root, layer = "PaliGemma/img", f"{VISION}encoder.layers.{{}}."
    block, attention = f"{root}/Transformer/encoderblock", f"{layer}self_attn."
    rules = {
        f"{root}/embedding/kernel": Rule(4, _convolution, (f"{VISION}embeddings.patch_embedding.weight",)),
        f"{root}/embedding/bias": Rule(1, _same, (f"{VISION}embeddings.patch_embedding.bias",)),
        f"{root}/pos_embedding": Rule(3, _first, (f"{VISION}embeddings.position_embedding.weight",)),
        **_below(f"{root}/Transformer/encoder_norm", _layer_norm(f"{VISION}post_layernorm")),
        **_below(f"{root}/head", _dense(PROJECTOR.removesuffix("."))),
        **_below(f"{block}/LayerNorm_0", _layer_norm(f"{layer}layer_norm1")),
        **_below(f"{block}/LayerNorm_1", _layer_norm(f"{layer}layer_norm2")),
        **_below(f"{block}/MlpBlock_0/Dense_0", _dense(f"{layer}mlp.fc1")),
        **_below(f"{block}/MlpBlock_0/Dense_1", _dense(f"{layer}mlp.fc2")),
    }
    heads = f"{block}/MultiHeadDotProductAttention_0"
    for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        rules[f"{heads}/{part}/kernel"] = Rule(3, _heads_out, (f"{attention}{name}.weight",))
        rules[f"{heads}/{part}/bias"] = Rule(2, _flat, (f"{attention}{name}.bias",))
    rules[f"{heads}/out/kernel"] = Rule(3, _heads_in, (f"{attention}out_proj.weight",))
    rules[f"{heads}/out/bias"] = Rule(1, _same, (f"{attention}out_proj.bias",))
    return rules


def _tower(prefix: str, expert: str) -> dict[str, Rule]:
    """One tower of the language model; the action expert's arrays have the suffix `_1`."""
    root, layer = "PaliGemma/llm", f"{prefix}layers.{{}}."
    block, attention, mlp = f"{root}/layers", f"{layer}self_attn.", f"{layer}mlp."
    q, k, v = (f"{attention}{part}_proj.weight" for part in "qkv")
    rules = {
        f"{block}/attn/q_einsum{expert}/w": Rule(3, _heads_first, (q,)),
        f"{block}/attn/kv_einsum{expert}/w": Rule(3, _heads_first, (k, v)),
        f"{block}/attn/qkv_einsum{expert}/w": Rule(3, _heads_first, (q, k, v)),  # as many key heads as query heads
        f"{block}/attn/attn_vec_einsum{expert}/w": Rule(3, _heads_in, (f"{attention}o_proj.weight",)),
        f"{block}/mlp{expert}/gating_einsum": Rule(2, _linear, (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")),
        f"{block}/mlp{expert}/linear": Rule(2, _linear, (f"{mlp}down_proj.weight",)),
    }
    norms = {
        f"{block}/pre_attention_norm": f"{layer}input_layernorm",
        f"{block}/pre_ffw_norm": f"{layer}post_attention_layernorm",
        f"{root}/final_norm": f"{prefix}norm",
    }
    for path, name in norms.items():
        rules[f"{path}{expert}/scale"] = Rule(1, _same, (f"{name}.weight",))
        rules |= _below(f"{path}{expert}/Dense_0", _dense(f"{name}.dense"))  # driven by the flow time
    return rules


PROJECTIONS = (
    "action_in_proj",
    "action_out_proj",
    "state_proj",
    "time_mlp_in",
    "time_mlp_out",
    "action_time_mlp_in",
    "action_time_mlp_out",
)
RULES: dict[str, Rule] = {
    **_vision(),
    "PaliGemma/llm/embedder/input_embedding": Rule(2, _same, (EMBEDDING,)),
    **_tower(ENCODER, ""),
    **_tower(DECODER, "_1"),
    **{path: rule for name in PROJECTIONS for path, rule in _below(name, _dense(name)).items()},
}


# ---- reading ---------------------------------------------------------------------------------------


def find_params(path: Path) -> Path | None:
    """The orbax directory that a path means: itself, or `params` below it; None where there is none."""
    for place in (path, path / "params"):
        if place.is_dir() and any((place / name).exists() for name in ("_METADATA", "manifest.ocdbt")):
            return place
    return None


def read_params(place: Path) -> dict[str, LazyTensor]:
    """The arrays of an orbax directory by their path in the tree (`PaliGemma/img/head/bias`); values are read later.

    The item `params` that openpi wraps its tree in, and the `value` at the end of each path, are left out.
    """
    if ".orbax-checkpoint-tmp" in place.absolute().as_posix():
        raise CheckpointError(f"{place}: this save was not finished (orbax renames the directory at the end)")
    told, strict = _metadata(place)
    base = {"driver": "file", "path": f"{place.absolute()}/"}
    store = {"driver": "ocdbt", "base": base} if (place / "manifest.ocdbt").is_file() else base
    tensors: dict[str, LazyTensor] = {}
    stored: set[str] = set()
    for key, content in _headers(place, store).items():
        folder, _, file = key.rpartition("/")
        stored.add(folder)
        shape, dtype = _header(place, folder, content)
        spec: dict[str, Any] = {
            "driver": "zarr" if file == ".zarray" else "zarr3",
            "kvstore": {**store, "path": f"{store.get('path', '')}{folder}/"},
        }
        if strict:  # else orbax has left chunks of zeros out
            spec["fill_missing_data_reads"] = False
        name = _tree_path(folder)
        if name in tensors:
            raise CheckpointError(f"{place}: expected one array {name}, found two (in separate trees)")
        tensors[name] = LazyTensor(name, shape, dtype, partial(_load, place, name, spec, shape, dtype))
    if absent := sorted(told - stored):
        raise CheckpointError(
            f"{place}: {len(absent)} of the {len(told)} arrays that _METADATA lists are not there, such as "
            f"{', '.join(map(_tree_path, absent[:5]))}. The copy is incomplete; copy the directory again"
        )
    if not tensors:
        raise CheckpointError(f"{place}: expected an orbax directory with arrays, found none in it")
    return tensors


def _tree_path(folder: str) -> str:
    return folder.removeprefix("params.").removesuffix(".value").replace(".", "/")


def _metadata(place: Path) -> tuple[set[str], bool]:
    """Folders of the arrays that _METADATA lists, and whether every chunk must be there."""
    file = place / "_METADATA"
    if not file.is_file():
        return set(), False
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = content["tree_metadata"].values()
        told = {
            ".".join(str(k["key"]) for k in entry["key_metadata"])
            for entry in entries
            if entry["value_metadata"]["value_type"] not in ("None", "Dict", "List", "Tuple", "NamedTuple", "string")
        }
        return told, bool(content.get("store_array_data_equal_to_fill_value", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected orbax's description of the arrays, cannot read it: {error}") from error


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise CheckpointError(f"openpi's JAX checkpoints need {NEEDS}") from error
    return tensorstore


def _headers(place: Path, store: Mapping[str, Any]) -> dict[str, bytes]:
    """Content of every zarr header in the store, by key."""
    ts = _tensorstore()
    try:
        kv = ts.KvStore.open(dict(store)).result()
        keys = [k.decode() for k in kv.list().result()]
        wanted = sorted(k for k in keys if k.endswith(("/.zarray", "/zarr.json")))
        reads = [kv.read(k) for k in wanted]
        return {k: bytes(r.result().value) for k, r in zip(wanted, reads, strict=True)}
    except Exception as error:  # tensorstore reports damage through many types
        raise _broken(place, "its list of arrays", error) from error


def _header(place: Path, folder: str, content: bytes) -> tuple[tuple[int, ...], torch.dtype]:
    try:
        header = json.loads(content)
        shape, code = header["shape"], header["dtype"] if "dtype" in header else header["data_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _broken(place, f"the header of {folder}", error) from error
    if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
        raise CheckpointError(f"{place}: array {folder}: expected a shape, found {shape!r}")
    if math.prod(shape) >= MOST_VALUES:
        raise CheckpointError(f"{place}: array {folder}: expected an array that a machine can hold, found {shape}")
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{place}: array {folder} has dtype {code!r}; expected bfloat16, float32 or another of {', '.join(DTYPES)}"
        )
    return tuple(shape), DTYPES[code]


def _load(place: Path, name: str, spec: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    ts = _tensorstore()
    try:
        array = ts.open(dict(spec), open=True, read=True).result().read().result()
        if dtype is torch.bfloat16:  # numpy has none
            value = torch.from_numpy(array.view("uint16").copy()).view(torch.bfloat16)
        else:
            value = torch.from_numpy(array if array.flags.writeable else array.copy())
    except Exception as error:  # tensorstore reports damage through many types
        raise _broken(place, name, error) from error
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise CheckpointError(f"{name}: the checkpoint changed since it was opened; open it again")
    return value


def _broken(place: Path, what: str, error: object) -> CheckpointError:
    reason = str(error).strip().split("\n")[0].split(" [source locations")[0][:300] or type(error).__name__
    return CheckpointError(
        f"{place}: expected a complete orbax directory, cannot read {what}: {reason}. A truncated or damaged copy is "
        "the usual cause: copy the directory again"
    )


# ---- canonical tensors -----------------------------------------------------------------------------


@dataclass
class Converted:
    """Canonical tensors of a tree, and what its shapes tell that canonical shapes do not."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert(stored: Mapping[str, LazyTensor]) -> Converted:
    """Canonical tensors of openpi's tree. A stack is decoded once for all of its layers."""
    arrays, merges = merged(stored)
    result = Converted()
    for path, array in arrays.items():
        rule = RULES.get(path)
        if rule is None:  # strict matching reports names that are none of this format's
            result.tensors[path] = array
            continue
        stacked, parts = "{}" in rule.names[0], len(rule.names)
        axes = stacked + (parts > 1)
        if len(array.shape) != rule.rank + axes or (parts > 1 and array.shape[stacked] != parts):
            raise CheckpointError(
                f"{path}: expected {rule.rank + axes} dimensions{', the first the layers' if stacked else ''}"
                f"{f', then {parts} parts' if parts > 1 else ''}, found the shape {list(array.shape)}"
            )
        if stacked and array.shape[0] > MOST_LAYERS:
            raise CheckpointError(f"{path}: expected a stack of layers, found {array.shape[0]} of them")
        layers = range(array.shape[0]) if stacked else [None]
        indices = {
            name.format(layer): tuple(i for i in (layer, part if parts > 1 else None) if i is not None)
            for layer in layers
            for part, name in enumerate(rule.names)
        }
        take = _shared(array, indices.values())
        for name, index in indices.items():
            shape = tuple(rule.layout(torch.empty(array.shape[axes:], device="meta")).shape)
            result.tensors[name] = LazyTensor(name, shape, array.dtype, partial(take, index, rule.layout))
    result.facts = _heads(arrays)
    if merges:
        result.notes.append(
            f"LoRA: {len(merges)} deltas merged in float32 by openpi's rule (in attention with the factor alpha / rank "
            f"= 1 of its *_lora variants, in the MLP without a factor): {', '.join(merges)}"
        )
    return result


def _shared(array: LazyTensor, indices: Collection[tuple[int, ...]]) -> Callable[[tuple[int, ...], Layout], Tensor]:
    """A reader of parts of an array: the first decodes all of it, and a part is kept until it was taken.

    A stack is usually one compressed chunk, which every layer would decode again. What nobody takes (a policy
    never reads the last query projection of its prefix) stays for as long as the checkpoint is open.
    """
    kept: dict[tuple[int, ...], Tensor] = {}

    def take(index: tuple[int, ...], layout: Layout) -> Tensor:
        if index not in kept:
            whole = array.load()
            kept.update({i: whole[i].clone() for i in indices})
        return layout(kept.pop(index)).contiguous()

    return take


def _heads(arrays: Mapping[str, LazyTensor]) -> Facts:
    """Head counts: einsum layouts have them as axes, which [out, in] matrices no longer tell."""
    facts: Facts = {}
    wanted = {
        "num_heads": ("PaliGemma/llm/layers/attn/q_einsum/w", 1),
        "num_kv_heads": ("PaliGemma/llm/layers/attn/kv_einsum/w", 2),
        "head_dim": ("PaliGemma/llm/layers/attn/q_einsum/w", 3),
        "vision_num_heads": ("PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel", 2),
    }
    together = "PaliGemma/llm/layers/attn/qkv_einsum/w"
    if together in arrays:
        wanted |= {"num_heads": (together, 2), "num_kv_heads": (together, 2), "head_dim": (together, 4)}
    for name, (path, axis) in wanted.items():
        if path in arrays:
            facts[name] = Fact(arrays[path].shape[axis], f"array {path} {list(arrays[path].shape)}")
    return facts


# ---- LoRA ------------------------------------------------------------------------------------------

# Rank of openpi's LoRA variants, each with alpha = rank (src/openpi/models/gemma.py: gemma_2b_lora, gemma_300m_lora).
RANKS = {"": 16, "_1": 32}


def merged(stored: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
    """The arrays with LoRA deltas added to their weights, and the names of these weights.

    With A [..., in, rank] and B [..., rank, out] openpi adds, in attention, `A B * alpha / rank` for each head, except
    in the output projection, whose einsums both sum over the heads: there every head has B summed over
    the heads. In the MLP it adds `A B` without a factor. No file holds alpha: attention deltas of another rank
    than that of openpi's variants (16 for the prefix, 32 for the expert; alpha = rank) are refused.
    """
    arrays = dict(stored)
    names: list[str] = []
    for path, rule in RULES.items():
        attention = path.endswith("_einsum/w") or path.endswith("_einsum_1/w")
        stem = path.removesuffix("w") if attention else f"{path}_"
        pair = [f"{stem}lora_{side}" for side in "ab"]
        there = [name for name in pair if name in stored]
        if not there:
            continue
        if len(there) < 2 or path not in stored:
            wanted = ", ".join(name for name in (path, *pair) if name not in stored)
            raise CheckpointError(f"{there[0]}: expected a LoRA delta with {wanted}, which is not there")
        w, a, b = (stored[name] for name in (path, *pair))
        rank = a.shape[-1] if a.shape else 0
        if len(w.shape) < 2 or a.shape != (*w.shape[:-1], rank) or b.shape != (*w.shape[:-2], rank, w.shape[-1]):
            raise CheckpointError(
                f"{pair[0]} {list(a.shape)} and {pair[1]} {list(b.shape)}: expected the factors of a delta of {path} "
                f"{list(w.shape)}"
            )
        expected = RANKS["_1" if "_einsum_1" in path else ""]
        if attention and rank != expected:
            raise CheckpointError(
                f"{pair[0]}, {pair[1]}: LoRA of rank {rank} is not merged: its factor alpha / rank is not in the file, "
                f"and is 1 only for openpi's own variant, of rank {expected}. Merge the deltas where the training "
                "configuration is known, and save the result"
            )
        across = rule.layout is _heads_in
        arrays[path] = LazyTensor(path, w.shape, torch.float32, partial(_with_delta, w, a, b, across))
        for name in pair:
            del arrays[name]
        names.append(path)
    return arrays, names


def _with_delta(w: LazyTensor, a: LazyTensor, b: LazyTensor, across_heads: bool) -> Tensor:
    """W + A B in float32; `across_heads` sums B over the axis before its last two first."""
    second = b.load().float()
    if across_heads:
        second = second.sum(-3, keepdim=True)
    first, result = a.load().float(), w.load().to(torch.float32, copy=True)
    for layer, x, y in zip(result, first, second, strict=True):  # one at a time: a delta is as large as its weight
        layer += x @ y
    return result
