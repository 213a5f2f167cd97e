"""Every training script on a GPU: fp32 as on the CPU, half precisions near it, resume, memory. `scripts/gpu.sh` begins
with these. CLAIMBENCH_DEVICE=cpu tries the tests themselves; without it they run where there is a GPU."""

import importlib
import json
import os

import pytest
import torch
from test_scaling import RUNS, SAVES, STOP, curves, words

import core

DEVICE = os.environ.get("CLAIMBENCH_DEVICE", "cuda" if torch.cuda.is_available() else "")
GPU = DEVICE.startswith("cuda")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DEVICE, reason="no GPU: CLAIMBENCH_DEVICE=cpu tries these")]
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
# script: the flag that recomputes activations
CHECKPOINTING = {
    "phase_b": "--gradient_checkpointing",
    "hst": "--grad_ckpt",
    "afrb": "--gradient_checkpointing",
    "cognate": "--gradient_checkpointing",
    "latentwire": "--grad_checkpoint",
}


def train(name: str, folder, *more, device: str = DEVICE, precision: str = "fp32") -> list[tuple]:
    """The curves of the short run of test_scaling.py on `device`."""
    flags = words(name, 4, folder / name, "--device", device, "--precision", precision, *more)
    importlib.import_module(RUNS[name][0]).main(flags)
    return curves(name, folder / name)


def result(name: str, folder) -> dict:
    (path,) = [p for pattern in ("*_results.json", "summary.json", "metrics.json") for p in folder.rglob(pattern)]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    found = {}

    def run(name):
        if name not in found:
            found[name] = train(name, tmp_path_factory.mktemp("cpu"), device="cpu")
        return found[name]

    return run


def near(found: list[tuple], expected: list[tuple], rel: float) -> None:
    """The same figures in the same order; a score of a few answers may turn over, a gradient's norm may wander."""
    assert [k for k, _ in found] == [k for k, _ in expected] and len(found) >= 4
    for (key, x), (_, y) in zip(found, expected):
        assert torch.tensor(x).isfinite(), key
        if "loss" in key:
            assert x == pytest.approx(y, rel=rel, abs=rel), key


@pytest.mark.parametrize("name", RUNS)
def test_fp32_is_that_of_the_cpu(name, tmp_path, on_cpu):
    near(train(name, tmp_path), on_cpu(name), 2e-3)


@pytest.mark.parametrize("name", RUNS)
def test_bf16_learns_alike(name, tmp_path, on_cpu):
    near(train(name, tmp_path, precision="bf16"), on_cpu(name), 0.1)


@needs_gpu
@pytest.mark.parametrize("name", [name for name in RUNS if name != "cognate"])  # which has no fp16
def test_fp16_learns_alike_and_keeps_its_scaler(name, tmp_path, on_cpu):
    near(train(name, tmp_path, *SAVES[name][0].split(), precision="fp16"), on_cpu(name), 0.1)
    (path,) = tmp_path.rglob(SAVES[name][1])
    scaler = core.load_checkpoint(path).get("scaler")
    assert scaler is not None and scaler["scale"] > 0


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(name, tmp_path, monkeypatch):
    """Bitwise on a CPU; kernels of a GPU may add up in another order."""
    whole, real, calls = train(name, tmp_path / "whole"), core.Run.stop_requested, []

    def stop_requested(run):
        calls.append(0)
        return 15 * (len(calls) == STOP)

    monkeypatch.setattr(core.Run, "stop_requested", stop_requested)
    with pytest.raises(core.Failure) as stopped:
        train(name, tmp_path / "cut")
    assert stopped.value.code == 143
    monkeypatch.setattr(core.Run, "stop_requested", real)
    resumed = train(name, tmp_path / "cut", "--resume", "auto")
    near(resumed, whole, 1e-3 if GPU else 1e-12)


@needs_gpu
@pytest.mark.parametrize("name", CHECKPOINTING)
def test_recomputed_activations_take_no_more_memory(name, tmp_path):
    peaks = []
    for kind, more in (("kept", ()), ("recomputed", (CHECKPOINTING[name],))):
        train(name, tmp_path / kind, *more)
        peaks.append(result(name, tmp_path / kind)["peak_mem_bytes"])
    assert peaks[1] <= peaks[0], peaks


@needs_gpu
@pytest.mark.parametrize("name, flags", [("phase_b", ("--load_in_4bit", "on")), ("latentwire", ("--load_4bit",))])
def test_a_base_in_four_bits_learns(name, flags, tmp_path):
    pytest.importorskip("bitsandbytes")
    losses = [x for key, x in train(name, tmp_path, *flags, precision="bf16") if key in ("train_loss", "loss")]
    assert torch.tensor(losses).isfinite().all() and losses[-1] < losses[0] + 0.1
