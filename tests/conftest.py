"""Shared by all tests: offline, one thread, a cache of their own, and small helpers."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # of the processes that tests start: each test process has a core of its own
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("CLAIMBENCH_CACHE", str(ROOT / ".pytest_cache" / "claimbench"))
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: its children would never see Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def script():
    """Run a script as a person would: `script("name.py", *flags)` gives the finished process."""

    def run(name, *flags, timeout=120, **env):
        words = [sys.executable, str(ROOT / name), *map(str, flags)]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=os.environ | env)

    return run


def same_tensors(a, b) -> bool:
    """Bitwise equality of nested checkpoints' tensors and values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def adamw_by_hand(params: dict, gradients: dict, state: dict, lr: float, betas, decay: float, clip: float) -> None:
    """One update of the tensors `params`, in place: the gradient is clipped to the norm `clip`, only matrices decay.
    `state` begins as an empty dict."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    state["step"] = state.get("step", 0) + 1
    for name, p in params.items():
        g = gradients[name] * min(1.0, clip / norm)
        first, second = state.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
        first, second = betas[0] * first + (1 - betas[0]) * g, betas[1] * second + (1 - betas[1]) * g * g
        state[name] = first, second
        unbiased = first / (1 - betas[0] ** state["step"]), second / (1 - betas[1] ** state["step"])
        p.mul_(1 - lr * decay * (p.ndim >= 2)).sub_(lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8))
