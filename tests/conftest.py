"""Shared by all tests: offline, one thread, a cache of their own, and small helpers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("CLAIMBENCH_CACHE", str(ROOT / ".pytest_cache" / "claimbench"))
torch.set_num_threads(1)


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
