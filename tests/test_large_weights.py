"""Large weights made in slices: the same bits as op by op on the host."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from cortexflow import large_weights
from cortexflow.errors import CheckpointError, InputError
from cortexflow.ir import Block, Type, building, ops
from cortexflow.models import ModelConfig, Signature, VLAModelType, create_model
from cortexflow.passes import run_passes
from cortexflow.weights import Weights, prepare, prepared, random_weights


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_weights, "SMALLEST", 2048)
    monkeypatch.setattr(large_weights, "SLICE", 777)


def config_of(kind: VLAModelType) -> ModelConfig:
    """Small, of sizes that no slice divides."""
    return ModelConfig(
        model_type=kind,
        vision_encoder_dim=48,
        vision_num_heads=2,
        vision_num_layers=2,
        vision_mlp_dim=100,
        encoder_dim=72,
        encoder_mlp_dim=130,
        decoder_dim=40,
        decoder_mlp_dim=90,
        num_heads=2,
        head_dim=16,
        num_views=1,
        chunk_size=4,
        num_diffusion_steps=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        image_size=28,
        max_token_len=8,
        vocab_size=100,
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [VLAModelType.PI05, VLAModelType.PI0])
def test_same_bits(kind: VLAModelType, stored: torch.dtype, dtype: str, device: str) -> None:
    config = config_of(kind)
    module = create_model(config).build(Signature.of(config), dtype)
    weights = {key: w.to(stored) for key, w in random_weights(module).items()}
    lowered, _ = run_passes(module, lambda op: False)
    made = []
    original = large_weights.make

    def counted(*given: object) -> Tensor:
        made.append(original(*given))  # type: ignore[arg-type]
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_weights, "make", counted)
        ready = prepared(lowered, weights, device=torch.device(device))
        found = {key: ready[key] for key in ready}
    assert len(made) > 15 and all(x.device.type == device for x in made)
    for key, x in prepare(lowered, weights)[1].items():
        assert found[key].dtype == x.dtype and torch.equal(found[key].cpu(), x), key


@pytest.mark.parametrize("damaged", ["layers.0.mlp.gate_proj.weight", "time_mlp_in.weight", "mlp.fc1.bias"])
def test_a_damaged_tensor_ends_in_its_error(damaged: str) -> None:
    """Wherever it is read: ahead, or by what other threads make on the host."""
    config = config_of(VLAModelType.PI05)
    module = create_model(config).build(Signature.of(config), "bf16")
    weights = random_weights(module)
    (name, *_) = (key for key in weights if key.endswith(damaged))

    def load(key: str) -> Tensor:
        if key == name:
            raise CheckpointError(f"{key} is damaged")
        return weights[key]

    lowered, _ = run_passes(module, lambda op: False)
    ready = prepared(lowered, Weights(list(weights), load), device=torch.device("cpu"))
    with pytest.raises(CheckpointError, match="is damaged"):
        for key in ready:
            ready[key]


def test_tensors_are_read_ahead_in_order_and_few_at_a_time() -> None:
    reads: list[str] = []
    readers: dict[str, threading.Thread] = {}
    names = [f"w{i}" for i in range(60)]

    def load(name: str) -> Tensor:
        reads.append(name)
        readers[name] = threading.current_thread()
        if name == "w3":
            raise CheckpointError("w3 is damaged")
        return torch.tensor(int(name[1:]))

    read = large_weights.read_ahead(Weights(names, load), names)
    assert not reads
    for i in range(3):
        assert read(names[i]) == i
    with pytest.raises(CheckpointError, match="w3 is damaged"):
        read("w3")
    assert read("w40") == 40, "out of order: read when asked for"
    mine = [name for name, thread in readers.items() if thread is threading.current_thread()]
    assert mine == ["w0", "w40"] and {"w1", "w2", "w3"} < readers.keys()
    assert len(reads) <= 5 + large_weights.AHEAD


def test_a_tensor_of_another_shape_is_an_error() -> None:
    with building(Block()):
        v = ops.mul(ops.weight(key="w", type=Type("f32", (64, 64))), ops.weight(key="scale", type=Type("f32", (64,))))
    given = {"w": torch.ones(64, 32), "scale": torch.ones(64)}
    with pytest.raises(InputError, match=r"weight 'w': expected f32\[64,64\], found shape \(64, 32\)"):
        large_weights.make(v, given.__getitem__, torch.device("cpu"))


def test_what_is_no_function_entry_by_entry_is_made_on_the_host() -> None:
    with building(Block()):
        w = ops.weight(key="w", type=Type("f32", (64, 64)))
        scale = ops.weight(key="scale", type=Type("f32", (64,)))
        scaled, product, turned = ops.mul(w, scale), ops.matmul(w, w), ops.transpose(w, perm=(1, 0))
        assert large_weights.fits(scaled) and large_weights.fits(ops.concat(scaled, w, axis=-1))
        assert large_weights.sources(ops.concat(scaled, turned, axis=0)) == ["w", "w"]
        others = [product, ops.mul(product, scale), ops.add(w, turned), scale, ops.concat(w, product, axis=1)]
        assert not any(map(large_weights.fits, [*others, ops.concat(w, turned, axis=1)]))
