"""The README's Python examples run as they stand, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_python_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    Path("demo-output").mkdir()
    Path("demo-output/checkpoint").symlink_to(ROOT / "tests/data/pi/pi05_tiny")
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    actions = namespace["actions"]
    assert tuple(actions.shape) == (1, 10, 32)  # type: ignore[attr-defined]
    assert namespace["chunk"].shape == (10, 32)  # type: ignore[attr-defined]
    assert "fused.modulated_norm_matmul" in capsys.readouterr().out


def test_the_pass_is_short() -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "def " in b)
    assert len(block.splitlines()) < 30


def test_the_excerpt_is_real() -> None:
    """Every op shown in the excerpt stands in a dump of the small reference model."""
    import cortexflow

    dump = cortexflow.compile(ROOT / "tests/data/pi/pi05_tiny", progress=False).dump_ir(after="fuse")
    text = (ROOT / "README.md").read_text()
    excerpt = next(b for b in text.split("```") if "loop(%noise)" in b)
    for line in excerpt.strip().splitlines():
        shown = line.strip().split("  #")[0]
        assert shown == "..." or shown in dump, shown
