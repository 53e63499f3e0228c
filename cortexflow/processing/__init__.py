"""What stands between an observation and the graph: images, prompt, state, actions.

`pipeline` ties the other modules together; each of them is usable on its own.
"""

from cortexflow.processing.images import as_model_images, read_image, resize_with_pad
from cortexflow.processing.normalise import absolute_actions, normalise, pad_to, unnormalise
from cortexflow.processing.pipeline import (
    PROCESSINGS,
    ModelInputs,
    Processing,
    finish_actions,
    prepare_observation,
)
from cortexflow.processing.prompts import PROMPT_FORMATS, encode_prompt, prompt_pieces, state_bins
from cortexflow.processing.robots import ROBOTS, Robot, camera_views, join_state, robot
from cortexflow.processing.stats import Stats, lerobot_options, load_stats, make_stats, save_stats
from cortexflow.processing.tokenizer import PromptTokenizer, load_tokenizer

__all__ = [
    "PROCESSINGS",
    "PROMPT_FORMATS",
    "ROBOTS",
    "ModelInputs",
    "Processing",
    "PromptTokenizer",
    "Robot",
    "Stats",
    "absolute_actions",
    "as_model_images",
    "camera_views",
    "encode_prompt",
    "finish_actions",
    "join_state",
    "lerobot_options",
    "load_stats",
    "load_tokenizer",
    "make_stats",
    "normalise",
    "pad_to",
    "prepare_observation",
    "prompt_pieces",
    "read_image",
    "resize_with_pad",
    "robot",
    "save_stats",
    "state_bins",
    "unnormalise",
]
