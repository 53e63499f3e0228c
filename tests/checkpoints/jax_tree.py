"""Golden weights as openpi's JAX tree, and as the orbax directory that training writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PALIGEMMA = "paligemma_with_expert.paligemma."
VISION = PALIGEMMA + "model.vision_tower.vision_model."
LLM = PALIGEMMA + "model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
HEAD = PALIGEMMA + "lm_head.weight"


def to_jax(weights: Mapping[str, np.ndarray], c: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tree by path: layers stacked, heads as axes, [in, out] kernels."""
    w = {name.removeprefix("model."): value for name, value in weights.items()}
    tree: dict[str, np.ndarray] = {}

    def stack(path: str, name: str, depth: int, change: Any = lambda x: x) -> None:
        tree[path] = np.stack([change(w[name.format(i)]) for i in range(depth)])

    v = c["vision"]
    heads, dim, depth = v["num_heads"], v["width"] // v["num_heads"], v["depth"]
    tree["PaliGemma/img/embedding/kernel"] = w[VISION + "embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)
    tree["PaliGemma/img/embedding/bias"] = w[VISION + "embeddings.patch_embedding.bias"]
    tree["PaliGemma/img/pos_embedding"] = w[VISION + "embeddings.position_embedding.weight"][None]
    tree["PaliGemma/img/Transformer/encoder_norm/scale"] = w[VISION + "post_layernorm.weight"]
    tree["PaliGemma/img/Transformer/encoder_norm/bias"] = w[VISION + "post_layernorm.bias"]
    tree["PaliGemma/img/head/kernel"] = w[PALIGEMMA + "model.multi_modal_projector.linear.weight"].T
    tree["PaliGemma/img/head/bias"] = w[PALIGEMMA + "model.multi_modal_projector.linear.bias"]
    block, layer = "PaliGemma/img/Transformer/encoderblock/", VISION + "encoder.layers.{}."
    for k in (0, 1):
        stack(f"{block}LayerNorm_{k}/scale", f"{layer}layer_norm{k + 1}.weight", depth)
        stack(f"{block}LayerNorm_{k}/bias", f"{layer}layer_norm{k + 1}.bias", depth)
        stack(f"{block}MlpBlock_0/Dense_{k}/kernel", f"{layer}mlp.fc{k + 1}.weight", depth, np.transpose)
        stack(f"{block}MlpBlock_0/Dense_{k}/bias", f"{layer}mlp.fc{k + 1}.bias", depth)
    attention = block + "MultiHeadDotProductAttention_0/"
    for part in ("query", "key", "value"):
        name = f"{layer}self_attn.{part[0]}_proj"
        stack(f"{attention}{part}/kernel", name + ".weight", depth, lambda x: x.T.reshape(-1, heads, dim))
        stack(f"{attention}{part}/bias", name + ".bias", depth, lambda x: x.reshape(heads, dim))
    stack(f"{attention}out/kernel", f"{layer}self_attn.out_proj.weight", depth, lambda x: x.T.reshape(heads, dim, -1))
    stack(f"{attention}out/bias", f"{layer}self_attn.out_proj.bias", depth)

    tree["PaliGemma/llm/embedder/input_embedding"] = w.get(LLM + "embed_tokens.weight", w.get(HEAD))
    for key, prefix, suffix in (("vlm", LLM, ""), ("expert", EXPERT, "_1")):
        t = c[key]
        depth, n, k, h = t["depth"], t["num_heads"], t["num_kv_heads"], t["head_dim"]
        layer, block = prefix + "layers.{}.", "PaliGemma/llm/layers/"

        def split(x: np.ndarray, count: int, h: int = h) -> np.ndarray:
            """[heads * head_dim, in] as [heads, in, head_dim]."""
            return x.reshape(count, h, -1).transpose(0, 2, 1)

        projections = {
            part: [w[f"{layer}self_attn.{part}_proj.weight".format(i)] for i in range(depth)] for part in "qkvo"
        }
        q = np.stack([split(x, n) for x in projections["q"]])
        kv = np.stack([np.stack([split(projections[p][i], k) for p in "kv"]) for i in range(depth)])
        if n == k:
            tree[f"{block}attn/qkv_einsum{suffix}/w"] = np.concatenate([q[:, None], kv], 1)
        else:
            tree[f"{block}attn/q_einsum{suffix}/w"], tree[f"{block}attn/kv_einsum{suffix}/w"] = q, kv
        tree[f"{block}attn/attn_vec_einsum{suffix}/w"] = np.stack([x.T.reshape(n, h, -1) for x in projections["o"]])
        gates = [[w[f"{layer}mlp.{p}_proj.weight".format(i)].T for p in ("gate", "up")] for i in range(depth)]
        tree[f"{block}mlp{suffix}/gating_einsum"] = np.array(gates)
        stack(f"{block}mlp{suffix}/linear", f"{layer}mlp.down_proj.weight", depth, np.transpose)
        for norm, name in (("pre_attention_norm", "input_layernorm"), ("pre_ffw_norm", "post_attention_layernorm")):
            if suffix and c["model"] == "pi05":
                stack(f"{block}{norm}{suffix}/Dense_0/kernel", f"{layer}{name}.dense.weight", depth, np.transpose)
                stack(f"{block}{norm}{suffix}/Dense_0/bias", f"{layer}{name}.dense.bias", depth)
            else:
                stack(f"{block}{norm}{suffix}/scale", f"{layer}{name}.weight", depth)
        if suffix and c["model"] == "pi05":
            tree["PaliGemma/llm/final_norm_1/Dense_0/kernel"] = w[prefix + "norm.dense.weight"].T
            tree["PaliGemma/llm/final_norm_1/Dense_0/bias"] = w[prefix + "norm.dense.bias"]
        else:
            tree[f"PaliGemma/llm/final_norm{suffix}/scale"] = w[prefix + "norm.weight"]
    for name, value in w.items():
        if "." not in name.removesuffix(".weight").removesuffix(".bias"):
            head, _, kind = name.partition(".")
            tree[f"{head}/kernel" if kind == "weight" else f"{head}/bias"] = value.T if kind == "weight" else value
    return tree


def write_orbax(place: Path, tree: Mapping[str, np.ndarray], *, driver: str = "zarr", ocdbt: bool = True) -> Path:
    """The tree as orbax lays it out (see data/pi/orbax for what orbax itself writes); bfloat16 comes as uint16."""
    import tensorstore

    place.mkdir(parents=True, exist_ok=True)
    base = {"driver": "file", "path": f"{place}/"}
    store: dict[str, Any] = {"driver": "ocdbt", "base": base} if ocdbt else base
    entries = {}
    for path, value in tree.items():
        keys = ["params", *path.split("/"), "value"]
        value = np.ascontiguousarray(value)
        code = "bfloat16" if value.dtype == np.uint16 else value.dtype.name
        folder = f"{store.get('path', '')}{'.'.join(keys)}/"
        spec = {"driver": driver, "kvstore": {**store, "path": folder}, "store_data_equal_to_fill_value": True}
        if driver == "zarr":
            spec["metadata"] = {"compressor": {"id": "zstd"}, "shape": value.shape, "chunks": value.shape}
        array = tensorstore.open(spec, create=True, delete_existing=True, dtype=code, shape=value.shape).result()
        array.write(value.view(array.dtype.numpy_dtype)).result()
        entries[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    metadata = {"tree_metadata": entries, "store_array_data_equal_to_fill_value": True}
    (place / "_METADATA").write_text(json.dumps(metadata))
    return place
