"""What every training script owes its user, whatever it trains."""

import importlib

import pytest

import core

RUN = {  # script: flags of a smoke test of its own model, and its flag for the run directory
    "phase_a_validation": ("--output_dir", []),
    "phase_b_8b_adapters": ("--output_dir", ["--model_path", "tiny"]),
    "pretrain_backbone": ("--output_dir", ["--kind", "lm"]),
    "afrb_train": ("--save", ["--task", "language"]),
    "train_phase1_cognate": ("--checkpoint-dir", ["--model", "reasoning"]),
    "hst_train": ("--save_dir", ["--variant", "v6"]),
}


@pytest.mark.parametrize("script", RUN)
def test_a_model_that_reads_the_future_is_not_trained(script, tmp_path, monkeypatch):
    flag, flags = RUN[script]
    monkeypatch.setattr(core, "causality_audit", lambda *args, **kwargs: 1.0)
    with pytest.raises(core.Failure, match="reads the future") as failure:
        importlib.import_module(script).main(["--test", "--threads", "1", flag, str(tmp_path), *flags])
    assert failure.value.code == core.CHECK_FAILED
    assert not list(tmp_path.rglob("*results*.json")) and not list(tmp_path.rglob("*.pt"))
