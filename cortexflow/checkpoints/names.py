"""Canonical tensor names of π0 and π0.5, and the names that are known but never read.

Canonical names are those of openpi's PyTorch port: LeRobot's names without the `model.` prefix.
Every format is presented under them, in PyTorch layouts ([out, in] for a linear layer).
"""

from __future__ import annotations

import re
from collections.abc import Collection

from cortexflow.errors import CheckpointError
from cortexflow.models.config import VLAModelType

VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear."
ENCODER = "paligemma_with_expert.paligemma.model.language_model."
DECODER = "paligemma_with_expert.gemma_expert.model."

EMBEDDING = ENCODER + "embed_tokens.weight"
TIED_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"  # the token embedding where EMBEDDING is not stored

WRAPPERS = re.compile(r"^(?:(?:model|module|_orig_mod)\.)+")  # LeRobot, DistributedDataParallel, torch.compile
LORA = re.compile(r"lora_|\.base_layer\.|^base_model\.|_lora\.", re.IGNORECASE)

# Tensors that checkpoints hold and inference never reads: pattern of the canonical name, reason.
NEVER_READ: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"paligemma_with_expert\.paligemma\.lm_head\.weight"), "language head; π0 and π0.5 emit no text"),
    (re.compile(r"paligemma_with_expert\.gemma_expert\.lm_head\.weight"), "language head of the action expert"),
    (re.compile(r".*\.rotary_emb\.(original_)?inv_freq"), "RoPE frequencies, computed from rope_theta"),
    (re.compile(r".*\.embeddings\.position_ids"), "0, 1, 2, ... of the image patches"),
    (
        re.compile(r"(normalize_inputs|normalize_targets|unnormalize_outputs)\.buffer_.*"),
        "normalisation statistics, read by processing",
    ),
)

# Group of a canonical name in size reports; the first prefix that fits.
GROUPS: tuple[tuple[str, str], ...] = (
    (VISION, "vision"),
    (PROJECTOR, "projector"),
    (EMBEDDING, "embedding"),
    (ENCODER, "encoder"),
    (DECODER, "decoder"),
    ("vision_backbone.", "vision"),
    ("projector.", "projector"),
    ("language_model.model.embed_tokens.", "embedding"),
    ("language_model.model.", "encoder"),
    ("", "action"),
)

PI05_PROJECTIONS = ("time_mlp_in.weight", "time_mlp_out.weight")
PI0_PROJECTIONS = ("state_proj.weight", "action_time_mlp_in.weight", "action_time_mlp_out.weight")


def never_read(name: str) -> str | None:
    """Why a canonical name is skipped, or None when it must find its place in the model."""
    return next((reason for pattern, reason in NEVER_READ if pattern.fullmatch(name)), None)


def group_of(name: str) -> str:
    """The size-report group of a canonical name."""
    return next(group for prefix, group in GROUPS if name.startswith(prefix))


def projections_family(names: Collection[str]) -> VLAModelType | None:
    """The family that the action projections belong to; None when there are none, or both kinds."""
    pi05 = any(name in names for name in PI05_PROJECTIONS)
    pi0 = any(name in names for name in PI0_PROJECTIONS)
    if pi05 == pi0:
        return None
    return VLAModelType.PI05 if pi05 else VLAModelType.PI0


def norms_family(names: Collection[str]) -> VLAModelType | None:
    """The family that the action expert's norms belong to: adaRMS (`.dense.`) is π0.5's."""
    expert = [name for name in names if name.startswith(DECODER) and "norm." in name]
    pi05 = any(".dense." in name for name in expert)
    pi0 = any(".dense." not in name for name in expert)
    if pi05 == pi0:
        return None
    return VLAModelType.PI05 if pi05 else VLAModelType.PI0


def detect_family(names: Collection[str]) -> VLAModelType | None:
    """π0 or π0.5 from canonical names; None when nothing tells; an error when the evidence is mixed."""
    projections, norms = projections_family(names), norms_family(names)
    if projections and norms and projections != norms:
        raise CheckpointError(
            "expected the tensors of one family; found the action projections of "
            f"{projections.value} and the action expert's norms of {norms.value}. openpi's converter picks the norms "
            "by whether the checkpoint path contains 'pi05', and LeRobot renames action_time_mlp_* to time_mlp_* when "
            "a π0 file is loaded as π0.5: convert the original checkpoint again, under its own family"
        )
    return projections or norms
