"""The exceptions CortexFlow raises at its doors.

Every message says three things: what was expected, what was found, and what to do next.
"""

from __future__ import annotations


class CortexFlowError(Exception):
    """Base class: catching it catches everything this package raises on purpose."""


class InputError(CortexFlowError, ValueError):
    """An argument of a call (images, tokens, prompt, state, ...) does not fit the signature."""


class CheckpointError(CortexFlowError, ValueError):
    """A checkpoint cannot be read, is unsafe to read, or does not hold what the model needs."""


class ConfigError(CortexFlowError, ValueError):
    """A configuration value is missing, unknown or contradicts the checkpoint."""


class TargetError(CortexFlowError, RuntimeError):
    """A target is unknown, not installed, or cannot run an op, dtype or device."""


class VerifyError(CortexFlowError, ValueError):
    """A module, function or op breaks a rule of the IR."""


class ParseError(CortexFlowError, ValueError):
    """IR text is not well formed; the message carries the line number."""
