"""The vision transformer that image towers share: patches, then pre-norm blocks of attention and MLP, with biases.

What towers differ in is named here: the activation (`gelu` is the erf form), the names of a block's
tensors in its file format, one matrix or three for queries, keys and values, LayerScale. Tokens
before the patches, positions and the last norm are the towers' own.
"""

from __future__ import annotations

from dataclasses import dataclass

from cortexflow.ir import Value, named, scope
from cortexflow.ir.ops import act, add, attention, conv2d, layer_norm, mul, reshape, slice_, transpose
from cortexflow.models.params import Params


@dataclass(frozen=True)
class BlockNames:
    """Where a file format keeps the tensors of a block; `scales` are LayerScale's vectors, if there are any."""

    norms: tuple[str, str]
    qkv: tuple[str, ...]  # three linear layers, or one whose rows are queries, then keys, then values
    out: str
    scales: tuple[str, str] | None = None


HUGGING_FACE = BlockNames(
    ("layer_norm1", "layer_norm2"), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"
)
TIMM = BlockNames(("norm1", "norm2"), ("attn.qkv",), "attn.proj")
TIMM_LAYER_SCALE = BlockNames(*(TIMM.norms, TIMM.qkv, TIMM.out), ("ls1.scale_factor", "ls2.scale_factor"))


@dataclass(frozen=True)
class ImageTower:
    """The dimensions of one tower."""

    width: int
    heads: int
    mlp_dim: int
    patch_size: int
    num_patches: int
    eps: float
    act: str
    names: BlockNames


def patches(images: Value, t: ImageTower, p: Params) -> Value:
    """Non-overlapping patches of images f32 [n, 3, h, w], row by row: [n, patches, width], by one linear map."""
    kernel = p.get("weight", t.width, 3, t.patch_size, t.patch_size)
    grid = conv2d(images, kernel, p.get("bias", t.width), stride=(t.patch_size, t.patch_size))
    return transpose(reshape(grid, shape=(images.type.shape[0], t.width, t.num_patches)), perm=(0, 2, 1))


def norm(x: Value, eps: float, p: Params) -> Value:
    """LayerNorm with the tensors `weight` and `bias`."""
    width = x.type.shape[-1]
    return layer_norm(x, p.get("weight", width), p.get("bias", width), eps=eps)


def blocks(x: Value, t: ImageTower, p: Params, count: int, label: str) -> Value:
    """The first `count` blocks below `p`; the residual stream behind block i is named `<label>_<i>`."""
    for i in range(count):
        with scope(f"layers.{i}"):
            x = named(_block(x, t, p.at(str(i))), f"{label}_{i}")
    return x


def _block(x: Value, t: ImageTower, p: Params) -> Value:
    with scope("attn"):
        y = _attention(norm(x, t.eps, p.at(t.names.norms[0])), t, p)
        x = add(x, _scaled(p.at(t.names.out).linear(y, t.width, bias=True), t, p, 0))
    with scope("mlp"):
        y = norm(x, t.eps, p.at(t.names.norms[1]))
        y = act(p.at("mlp.fc1").linear(y, t.mlp_dim, bias=True), kind=t.act)
        return add(x, _scaled(p.at("mlp.fc2").linear(y, t.width, bias=True), t, p, 1))


def _attention(y: Value, t: ImageTower, p: Params) -> Value:
    n, m, width = y.type.shape
    heads = (n, m, t.heads, width // t.heads)
    if len(t.names.qkv) == 1:
        joined = p.at(t.names.qkv[0]).linear(y, 3 * width, bias=True)
        parts = [slice_(joined, axis=-1, start=i * width, stop=(i + 1) * width) for i in range(3)]
    else:
        parts = [p.at(name).linear(y, width, bias=True) for name in t.names.qkv]
    q, k, v = (reshape(part, shape=heads) for part in parts)
    return reshape(attention(q, k, v, scale=heads[3] ** -0.5), shape=(n, m, width))


def _scaled(branch: Value, t: ImageTower, p: Params, which: int) -> Value:
    """A branch times its LayerScale vector, where the tower has one."""
    return mul(branch, p.get(t.names.scales[which], t.width)) if t.names.scales else branch
