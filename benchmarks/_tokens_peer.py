"""OpenVLA as its users run it: timm's image towers and transformers' `LlamaForCausalLM`, eager, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cortexflow.models import ModelConfig

TOWERS = {  # by the name of its tensors: timm's model, and the field of its depth
    "featurizer": ("vit_large_patch14_reg4_dinov2.lvd142m", "dino_num_layers"),
    "fused_featurizer": ("vit_so400m_patch14_siglip_224", "vision_num_layers"),
}


class Answer(NamedTuple):
    """Greedy token ids [count] and the logits f32 [count, vocabulary] behind each."""

    token_ids: Tensor
    logits: Tensor


@contextmanager
def _making(device: str) -> Iterator[None]:
    """Parameters made here are bfloat16 and on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _load(module: nn.Module, prefix: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """Parameters by the checkpoint's names; those that no checkpoint's reader needs stay as they are."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            key = prefix + name.replace(".gamma", ".scale_factor")
            if key in weights:
                parameter.copy_(weights[key])
    return module.eval()


def openvla(
    c: ModelConfig, weights: Mapping[str, Tensor], device: str = "cuda"
) -> Callable[[Mapping[str, Tensor]], Answer]:
    """The released model's sizes and forward pass, one observation at a time, prompts without padding."""
    import timm
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.encoder_dim,
        intermediate_size=c.encoder_mlp_dim,
        num_hidden_layers=c.num_encoder_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        rms_norm_eps=c.norm_eps,
        pad_token_id=c.pad_token_id,
    )
    with _making(device):
        towers = [
            _load(timm.create_model(made, num_classes=0, img_size=c.image_size), f"vision_backbone.{name}.", weights)
            for name, (made, _) in TOWERS.items()
        ]
        width = sum(t.embed_dim for t in towers)
        fc = [nn.Linear(width, 4 * width), nn.Linear(4 * width, c.encoder_dim), nn.Linear(c.encoder_dim, c.encoder_dim)]
        for i, layer in enumerate(fc, 1):
            _load(layer, f"projector.fc{i}.", weights)
        projector = nn.Sequential(fc[0], nn.GELU(), fc[1], nn.GELU(), fc[2])
        model = _load(LlamaForCausalLM(config), "language_model.", weights)
    depths = [getattr(c, field) for _, field in TOWERS.values()]

    @torch.inference_mode()
    def answer(inputs: Mapping[str, Tensor]) -> Answer:
        pixels = inputs["pixel_values"].to(device, torch.bfloat16).split(3, dim=1)
        seen = [t.get_intermediate_layers(x, n=[d - 2])[0] for t, x, d in zip(towers, pixels, depths, strict=True)]
        words = model.get_input_embeddings()(inputs["tokens"].to(device).long())
        x = torch.cat([words[:, :1], projector(torch.cat(seen, -1)), words[:, 1:]], 1)
        out = model(inputs_embeds=x, use_cache=True, logits_to_keep=1)
        logits = [out.logits[0, -1].float()]
        while len(logits) < c.action_dim:
            token = logits[-1].argmax().view(1, 1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0, -1].float())
        behind = torch.stack(logits)
        return Answer(behind.argmax(-1), behind)

    return answer
