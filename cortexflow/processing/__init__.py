"""What stands between an observation and the graph: images, prompt, state, actions.

`pipeline` ties the other modules together; each of them is usable on its own.
"""

from cortexflow.processing.images import as_model_images, read_image, resize_with_pad
from cortexflow.processing.normalise import absolute_actions, normalise, pad_to, unnormalise
from cortexflow.processing.observations import Sample, read_observation
from cortexflow.processing.pipeline import (
    FAMILIES,
    HORIZONS,
    ONE_CAMERA,
    PROCESSINGS,
    ModelInputs,
    Processing,
    finish_actions,
    prepare_observation,
    suits,
)
from cortexflow.processing.prompts import PROMPT_FORMATS, encode_prompt, prompt_pieces, state_bins
from cortexflow.processing.robot_file import find_robot, load_robot, make_robot
from cortexflow.processing.robots import ROBOTS, Robot, camera_views, join_state, of_one_view, robot
from cortexflow.processing.stats import Stats, check_stats, make_stats
from cortexflow.processing.stats_files import asset_ids, load_stats, stats_file
from cortexflow.processing.stats_lerobot import lerobot_options, save_stats
from cortexflow.processing.tokenizer import PromptTokenizer, load_tokenizer

__all__ = [
    "FAMILIES",
    "HORIZONS",
    "ONE_CAMERA",
    "PROCESSINGS",
    "PROMPT_FORMATS",
    "ROBOTS",
    "ModelInputs",
    "Processing",
    "PromptTokenizer",
    "Robot",
    "Sample",
    "Stats",
    "absolute_actions",
    "as_model_images",
    "asset_ids",
    "camera_views",
    "check_stats",
    "encode_prompt",
    "find_robot",
    "finish_actions",
    "join_state",
    "lerobot_options",
    "load_robot",
    "load_stats",
    "load_tokenizer",
    "make_robot",
    "make_stats",
    "normalise",
    "of_one_view",
    "pad_to",
    "prepare_observation",
    "prompt_pieces",
    "read_image",
    "read_observation",
    "resize_with_pad",
    "robot",
    "save_stats",
    "state_bins",
    "stats_file",
    "suits",
    "unnormalise",
]
