"""Reading files: shards, damage, pickles, and how much memory a conversion takes."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cortexflow.checkpoints import count_nonfinite, open_checkpoint
from cortexflow.checkpoints.tensors import read_directory, read_safetensors
from cortexflow.errors import CheckpointError

ROOT = Path(__file__).parents[2]


def shard(source: Path, target: Path, parts: int, *, index: bool = True) -> None:
    """A golden directory as `parts` shards."""
    target.mkdir()
    stored = load_file(source / "model.safetensors")
    names = sorted(stored)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = names[part::parts]
        save_file({name: stored[name] for name in mine}, target / file)
        weight_map |= dict.fromkeys(mine, file)
    if index:
        content = {"metadata": {}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(content))
    (target / "config.json").write_bytes((source / "config.json").read_bytes())


@pytest.mark.parametrize("index", [True, False])
def test_shards(index, data, tmp_path):
    shard(data / "pi05_tiny", tmp_path / "s", 3, index=index)
    whole, parts = open_checkpoint(data / "pi05_tiny"), open_checkpoint(tmp_path / "s")
    assert whole.config == parts.config and set(whole.tensors) == set(parts.tensors)
    for name in whole.tensors:
        assert torch.equal(whole.load_checked(name), parts.load_checked(name))


@pytest.mark.parametrize(
    ("index", "text"), [(True, "1 of them not there: model-00002-of-00003"), (False, "3 shards, missing number 2")]
)
def test_missing_shard(index, text, data, tmp_path):
    shard(data / "pi05_tiny", tmp_path / "s", 3, index=index)
    (tmp_path / "s" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(tmp_path / "s")


def test_bad_indices(data, tmp_path):
    shard(data / "pi05_tiny", tmp_path / "s", 2)
    file = tmp_path / "s" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    for change, text in [
        ({"weight_map": index["weight_map"] | {"ghost": "model-00001-of-00002.safetensors"}}, "in no shard.*ghost"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "shards beside the index"),
        ({"weight_map": 3}, "expected a 'weight_map'"),
        ([], "expected a JSON object"),
    ]:
        file.write_text(json.dumps(change))
        with pytest.raises(CheckpointError, match=text):
            open_checkpoint(tmp_path / "s")
    file.write_text("{")
    with pytest.raises(CheckpointError, match="expected JSON"):
        open_checkpoint(tmp_path / "s")


def test_the_same_tensor_in_two_files(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"x is in both a\.safetensors and b\.safetensors"):
        read_directory(tmp_path)


def test_processor_statistics_are_not_weights(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    save_file({"mean": torch.zeros(1)}, tmp_path / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    assert set(read_directory(tmp_path)) == {"x"}


def test_damaged_files(data, tmp_path):
    good = (data / "pi0_tiny" / "model.safetensors").read_bytes()
    header = int.from_bytes(good[:8], "little")
    for content, reason in [
        (good[: len(good) // 2], "truncated"),
        (good[:200], "truncated"),
        (b"", "the file is empty"),
        (good[:8] + b"\xff" * header + good[8 + header :], "damaged"),
        ((1 << 40).to_bytes(8, "little") + good[8:], "damaged"),
        (b"hello, this is no safetensors file at all", "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (pickle.dumps({"x": 1}, protocol=4), "PyTorch or pickle file"),
    ]:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason) as error:
            open_checkpoint(tmp_path)
        assert str(path) in str(error.value)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="without tensors"):
        open_checkpoint(path)


def test_file_damaged_after_opening(data, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((data / "pi0_tiny" / "model.safetensors").read_bytes())
    tensor = read_safetensors(path)["state_proj.weight"]
    path.write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a complete safetensors file"):
        tensor.load()


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is nothing at this path"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"found none\. The directory holds nothing"):
        open_checkpoint(tmp_path)
    (tmp_path / "weights.pkl").touch()
    with pytest.raises(CheckpointError, match=r"weights\.pkl: pass that file itself"):
        open_checkpoint(tmp_path)
    (tmp_path / "params").mkdir()
    with pytest.raises(CheckpointError, match="JAX checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "pretrained_model").mkdir()
    with pytest.raises(CheckpointError, match=r"one level down: pass .*pretrained_model"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="pass its directory"):
        open_checkpoint(tmp_path / "config.json")
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="LoRA deltas, not a model"):
        open_checkpoint(tmp_path)


def test_bad_config_json(data, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((data / "pi0_tiny" / "model.safetensors").read_bytes())
    for content, text in [
        ("{", "expected JSON"),
        ("[1]", "expected a JSON object"),
        ("{}", r"found the keys \(none\)"),
        ('{"type": "act"}', "expected 'pi0', 'pi05', 'openvla', found 'act'"),
        ('{"type": "pi0", "image_resolution": [224, 200]}', "square images"),
        ('{"type": "pi0", "image_resolution": [224, 224]}', "image_size: .* says 224, tensor .* says 28"),
        ('{"type": "pi0", "chunk_size": -1}', "'chunk_size': expected a positive integer"),
        ('{"model": "pi0", "vlm": 3}', "'vlm': expected an object"),
        ('{"model": "pi0", "vlm": {"num_heads": 8}, "expert": {"num_heads": 4}}', "num_heads: .* says 8, .* says 4"),
    ]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=text) as error:
            open_checkpoint(tmp_path)
        assert str(tmp_path) in str(error.value)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_malicious_pickles_never_run(tmp_path):
    mark = tmp_path / "executed"
    bomb = {"x": torch.zeros(2), "y": Bomb(mark)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(bomb))
    (tmp_path / "b.pt").write_bytes(pickle.dumps(bomb))
    torch.save(bomb, tmp_path / "c.pt")
    torch.save(bomb, tmp_path / "d.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "e.safetensors").write_bytes(pickle.dumps(bomb))
    for file in ("a.pkl", "b.pt", "c.pt", "d.pt", "e.safetensors"):
        with pytest.raises(CheckpointError, match="pickle"):
            open_checkpoint(tmp_path / file)
        assert not mark.exists(), file
    with pytest.raises(CheckpointError):  # consent is what runs it, and only that
        open_checkpoint(tmp_path / "a.pkl", allow_pickle=True)
    assert mark.exists()


def test_damaged_torch_files(tmp_path):
    torch.save({"x": torch.zeros(1000)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    for content, text in [(b"", "is empty"), (good[:1000], "cut short"), (b"\x80\x04garbage", "this is a pickle")]:
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=text):
            open_checkpoint(tmp_path / "bad.pt")
    (tmp_path / "bad.pkl").write_bytes(b"\x80\x04garbage")
    with pytest.raises(CheckpointError, match="cannot read it"):
        open_checkpoint(tmp_path / "bad.pkl", allow_pickle=True)
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors, found list"):
        open_checkpoint(tmp_path / "list.pt")


def test_count_nonfinite():
    nan, inf = float("nan"), float("inf")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert count_nonfinite(torch.tensor([1.0, nan, -inf, inf, nan, nan], dtype=dtype)) == (3, 2)
        assert count_nonfinite(torch.full((3, 3), torch.finfo(dtype).max, dtype=dtype)) == (0, 0)
    assert count_nonfinite(torch.tensor([1.0, nan]).to(torch.float8_e4m3fn)) == (1, 0)
    assert count_nonfinite(torch.tensor([1, 2])) == (0, 0)
    assert count_nonfinite(torch.empty(0)) == (0, 0)


MEASURE = """
    import sys
    import torch
    from safetensors import safe_open
    from cortexflow.checkpoints.tensors import count_nonfinite, read_safetensors
    from pathlib import Path

    def peak():
        # Peak resident memory of this process. (getrusage's ru_maxrss survives exec: it would start at the parent's.)
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    path = Path(sys.argv[1])
    tensors = read_safetensors(path)
    torch.randn(1 << 20).to(torch.bfloat16)  # threads and buffers of the first conversion
    count_nonfinite(torch.randn(1 << 20))
    before = peak()
    if sys.argv[2] == "lazy":
        kept = [t.load().to(torch.bfloat16) for t in tensors.values() if count_nonfinite(t.load()) == (0, 0)]
    else:
        with safe_open(path, framework="pt") as file:
            mapped = [file.get_tensor(name) for name in tensors]
            kept = [tensor.to(torch.bfloat16) for tensor in mapped]
    print((peak() - before) / sum(t.nbytes for t in kept))
"""


def measured_peak(path: Path, way: str) -> float:
    """Peak growth of a process that converts every tensor to bfloat16, in sizes of the result."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(path), way]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_conversion_peak_memory(tmp_path):
    """Converting a float32 file to bfloat16 tensor by tensor peaks under 1.3 × the converted weights."""
    path = tmp_path / "model.safetensors"
    block = torch.randn(2048, 1024)  # 8 MB, 40 of them
    save_file({f"layer.{i}.weight": block + i for i in range(40)}, path)
    assert measured_peak(path, "lazy") < 1.3
    assert measured_peak(path, "one mapping") > 2.5  # the measure sees what it must: mapped pages count
