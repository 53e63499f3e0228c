"""What every test runs under: no settings from outside, threads that fit the machine, GPU tests only with a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported: its thread pools are sized once.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)

# The tests' own settings come from monkeypatch.setenv, never from the shell that started them.
for name in [name for name in os.environ if name.startswith("CORTEXFLOW_")]:
    del os.environ[name]

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if workers > 1:
    torch.set_num_threads(threads)

# A loaded machine is slow, not wrong.
hypothesis.settings.register_profile(
    "cortexflow", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("cortexflow")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", help="a folder of reference cases to compare with, in place of tests/data/pi")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small work, and results that do not depend on how a product is shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
