"""Fixtures of the kernels' tests: a compiler cache of their own, a process that interprets, the card they ask for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("tests.kernels.builds", "tests.kernels.numerics")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A compiler cache of a module's own: every kernel is really compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> Any:
    """What a module prints as JSON where it is run itself, with a Triton that interprets from its import on."""
    name = ".".join(request.path.relative_to(ROOT).with_suffix("").parts)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", name], check=False, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs the instructions or the shared memory of Hopper")
