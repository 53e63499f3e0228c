"""One's own robot, described in a small file of TOML or JSON.

    name = "bench"                          # in messages; default: the file's name
    cameras = ["front", "wrist"]            # in the order of the checkpoint's views
    state = { joints = 6, gripper = 1 }     # parts in order, with their lengths; or one number
    actions = 7                             # values per action that the robot reads

    optional = ["wrist"]                    # cameras that may be absent: masked, as openpi does
    ignored = ["depth"]                     # keys of the observation that are not read
    delta = [true, true, true, true, true, true, false]   # actions relative to the state; default: none
    default_prompt = "pick up the cup"      # where an observation has none
    asset = "my_data_set"                   # which of several assets/*/norm_stats.json
    norm = "quantile"                       # mean_std, quantile or identity; default: the model family's
    state_in_prompt = true                  # π0.5 only: openpi's discrete_state_input
    resize = "pil"                          # pil (openpi), lerobot, openvla or openvla_crop
    eps = "openpi"                          # openpi, lerobot or openvla: the small constants of the normalisation
    adapt = "none"                          # none; aloha for Aloha's joint signs and gripper units; libero_gripper for
                                            # OpenVLA's gripper in LIBERO

The first four lines are the least (three without the name). Unknown keys are errors. What is left out comes
from the checkpoint's files where they tell (LeRobot), else from openpi's settings for its family.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from cortexflow.errors import ConfigError
from cortexflow.processing.images import RESIZES
from cortexflow.processing.normalise import MODES, RULES
from cortexflow.processing.robots import ADAPTATIONS, ROBOTS, Robot

NEEDED = ("cameras", "state", "actions")
CHOICES: dict[str, Collection[str]] = {"norm": MODES, "resize": RESIZES, "eps": RULES, "adapt": ADAPTATIONS}
RESERVED = ("images", "prompt", "task", "state")  # keys of every observation
MOST = 1024  # cameras, values of a state or of an action: more is a mistake


def find_robot(robot: str | Path | Robot) -> Robot:
    """A row of `ROBOTS` by its name, or the robot that a file describes. Raises ConfigError."""
    if isinstance(robot, Robot):
        return robot
    if not isinstance(robot, (str, Path)):
        raise ConfigError(f"robot: expected a name, a .toml or .json file, or a Robot, found {type(robot).__name__}")
    if isinstance(robot, str) and robot in ROBOTS:
        return ROBOTS[robot]
    if Path(robot).suffix in (".toml", ".json"):
        return load_robot(robot)
    raise ConfigError(
        f"robot: expected one of {', '.join(ROBOTS)}, or a .toml or .json file that describes one's own, found "
        f"{str(robot)!r}"
    )


def load_robot(path: str | Path) -> Robot:
    """The robot that a file of the form above describes. Raises ConfigError, which names the file and the key."""
    file = Path(path)
    return make_robot(_content(file), str(file), default_name=file.stem)


def make_robot(content: Any, where: str = "robot", default_name: str = "this robot") -> Robot:
    """The robot that a dictionary describes, with the keys of the module's table. Raises ConfigError."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected a table of keys, found {type(content).__name__}")
    known = {*NEEDED, *_READERS}
    if unknown := [key for key in content if key not in known]:
        raise ConfigError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; the keys are {', '.join(sorted(known))}"
        )
    if missing := [key for key in NEEDED if key not in content]:
        raise ConfigError(f"{where}: expected the keys {', '.join(NEEDED)}, found no {', '.join(missing)}")
    cameras = _names(content["cameras"], f"{where}: cameras")
    state = _state(content["state"], f"{where}: state")
    actions = _count(content["actions"], f"{where}: actions")
    given = {key: _READERS[key](value, f"{where}: {key}") for key, value in content.items() if key in _READERS}
    optional, ignored = given.pop("optional", ()), given.pop("ignored", ())
    if not cameras:
        raise ConfigError(f"{where}: cameras: expected at least one, found none")
    if lost := sorted(set(optional) - set(cameras)):
        raise ConfigError(f"{where}: optional: expected some of {', '.join(cameras)}, found {', '.join(lost)}")
    parts = [name for name, _ in state] if isinstance(content["state"], Mapping) else []
    names = [*cameras, *parts, *ignored]
    if twice := sorted({name for name in names if names.count(name) > 1 or name in RESERVED}):
        raise ConfigError(
            f"{where}: expected names of cameras, state and ignored that differ, and none of {', '.join(RESERVED)}; "
            f"found {', '.join(twice)}; rename them"
        )
    delta = given.pop("delta", ())
    if len(delta) > min(actions, sum(size for _, size in state)):
        raise ConfigError(
            f"{where}: delta: expected at most a flag for each of the {actions} actions and for each value of the "
            f"state, found {len(delta)}"
        )
    about = {key: given.pop(key) for key in ("name", "asset", "default_prompt") if key in given}
    options = given | ({"delta_mask": delta} if "delta" in content else {})
    return Robot(
        cameras=cameras,
        state=state,
        actions=actions,
        executed=None,
        required=tuple(camera for camera in cameras if camera not in optional),
        ignored=ignored,
        options=options,
        **({"name": default_name} | about),
    )


def _content(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{file}: expected a file that describes a robot, found none at this path") from None
    except (OSError, ValueError, RecursionError) as reason:
        form = "JSON" if file.suffix == ".json" else "TOML"
        raise ConfigError(f"{file}: expected {form} in UTF-8, cannot read it ({reason}); correct the file") from reason


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: expected a text, found {value!r}")
    return value


def _names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value) or len(value) > MOST:
        raise ConfigError(f"{where}: expected a list of names, found {_short(value)}")
    return tuple(value)


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise ConfigError(f"{where}: expected a whole number from 1 to {MOST}, found {_short(value)}")
    return value


def _state(value: Any, where: str) -> tuple[tuple[str, int], ...]:
    if not isinstance(value, Mapping):
        return (("state", _count(value, where)),)
    if not value or "" in value:
        raise ConfigError(f"{where}: expected parts with their lengths, or one length, found {_short(value)}")
    return tuple((name, _count(size, f"{where}.{name}")) for name, size in value.items())


def _flags(value: Any, where: str) -> tuple[bool, ...]:
    if not isinstance(value, list) or not all(isinstance(flag, bool) for flag in value):
        raise ConfigError(f"{where}: expected a list of true and false, one for each action, found {_short(value)}")
    return tuple(value)


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: expected true or false, found {_short(value)}")
    return value


def _choice(value: Any, where: str) -> str:
    table = CHOICES[where.rsplit(" ", 1)[1]]
    if not isinstance(value, str) or value not in table:
        raise ConfigError(f"{where}: expected one of {', '.join(table)}, found {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "name": _text,
    "optional": _names,
    "ignored": _names,
    "delta": _flags,
    "default_prompt": _text,
    "asset": _text,
    "state_in_prompt": _flag,
    **dict.fromkeys(CHOICES, _choice),
}
