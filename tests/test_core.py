"""core: files, run directory, training loop, arguments and data, under faults and against hand-computed cases."""

import dataclasses
import errno
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import accelerate
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

import core


@dataclasses.dataclass
class Args(core.RunArgs):
    width: int = core.arg(8, "a width", "model")
    rate: float = core.arg(0.1, "a rate", "model")
    num_workers: int = core.arg(0, "processes", "model")
    flag: bool = core.arg(True, "a switch", "model")


CPU = Args(device="cpu")


def run_of(directory, **flags) -> core.Run:
    args = Args(device="cpu", **flags)
    return core.Run(args, str(directory), core.engine(args), "r.json", ("x_step_*.pt",))


# ----------------------------------------------------------------------------------------------------- checkpoints
STATE = {"step": 3, "w": torch.arange(2000.0), "nested": {"l": [1, "x", None, True]}}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_checkpoint_round_trip_and_plain_torch_reads_it(tmp_path):
    path = tmp_path / "x_step_3.pt"
    core.save_checkpoint(path, STATE)
    for state in (core.load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(state["w"], STATE["w"]) and state["nested"] == STATE["nested"]
    assert os.listdir(tmp_path) == ["x_step_3.pt"] and core.verifies(path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(share, tmp_path):
    path = tmp_path / "x_step_3.pt"
    core.save_checkpoint(path, STATE)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(core.Failure, match="x_step_3"):
        core.load_checkpoint(path)
    assert not core.verifies(path)


def test_every_flipped_byte_is_caught(tmp_path):
    path, rng = tmp_path / "x_step_3.pt", random.Random(0)
    core.save_checkpoint(path, STATE)
    data = path.read_bytes()
    positions = [0, len(data) - 1, len(data) - 70] + [rng.randrange(len(data)) for _ in range(200)]
    for at in positions:
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        with pytest.raises(core.Failure):
            core.load_checkpoint(path)


class _Bomb:
    def __reduce__(self):
        return (os.system, (f"touch {_Bomb.flag}",))


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_foreign_pickle_is_refused_and_not_executed(writer, sealed, tmp_path):
    path, _Bomb.flag = tmp_path / "evil_step_1.pt", tmp_path / "executed"
    torch.save({"w": _Bomb()}, path) if writer == "torch" else path.write_bytes(pickle.dumps({"w": _Bomb()}))
    with pytest.raises(core.Failure) as failure:
        core.load_checkpoint(path, sealed=sealed)
    assert "\n" not in str(failure.value) and not _Bomb.flag.exists()


def test_a_sealed_bomb_is_not_executed_either(tmp_path):
    path, _Bomb.flag = tmp_path / "evil_step_1.pt", tmp_path / "executed"
    core.save_checkpoint(path, {"w": _Bomb()})
    with pytest.raises(core.Failure):
        core.load_checkpoint(path)
    assert not _Bomb.flag.exists()


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def half_of_save(state, file, save=torch.save):
    """torch.save of a process that is killed in the middle of its writing."""
    buffer = core.io.BytesIO()
    save(state, buffer)
    file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    file.flush()
    die()


def die_at(call: int, function):
    """`function`, at whose call number `call` the process is killed instead."""
    calls = itertools.count(1)
    return lambda *args: die() if next(calls) == call else function(*args)


KILLS = {  # moment: what is replaced in the saving process, and the step that the directory must give afterwards
    "in the middle of writing": (torch, "save", half_of_save, 1),
    "before the disk has it": (os, "fsync", die, 1),
    "before the first rename": (os, "replace", die_at(1, os.replace), 1),
    "between the two renames": (os, "replace", die_at(2, os.replace), 1),
    "at the end": (os, "replace", die_at(3, os.replace), 2),
}


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("moment", KILLS)
def test_a_save_killed_at_any_moment_leaves_the_old_or_the_new_file(moment, rotate, tmp_path):
    """Judged by what this very save must leave: before the rename the old content, whole; after it the new."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt" if rotate else None
    where, name, replacement, step = KILLS[moment]
    if name == "replace" and not rotate and "between" in moment:
        step = 2  # there is only one rename, and it is made
    core.save_checkpoint(last, {"step": 1, "w": torch.full((300_000,), 1.0)})
    child = os.fork()
    if child == 0:
        setattr(where, name, replacement)
        core.save_checkpoint(last, {"step": 2, "w": torch.full((300_000,), 2.0)}, previous)
        die()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    files = [path for path in tmp_path.iterdir() if not path.name.startswith(core._TEMPORARY)]
    assert all(core.verifies(path) for path in files)
    left = core.newest_checkpoint(files)
    assert left["step"] == step and (left["w"] == step).all()
    if not rotate or step == 2 or "between" not in moment:
        assert core.load_checkpoint(last)["step"] == step


def test_kill_minus_nine_always_leaves_a_loadable_checkpoint(tmp_path):
    """A child saves checkpoint after checkpoint and is killed at random moments, many of them inside a save."""
    rng, inside = random.Random(0), 0
    for attempt in range(12):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for step in itertools.count(attempt * 1000):
                state = {"step": step, "w": torch.full((300_000,), float(step))}
                core.save_checkpoint(tmp_path / f"x_step_{step % 3}.pt", state)
                os.write(writer, b".")
        for _ in range(rng.randint(1, 4)):
            os.read(reader, 1)
        core.time.sleep(rng.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
        leftovers = list(tmp_path.glob(f"{core._TEMPORARY}*"))
        inside += bool(leftovers)
        for path in leftovers:
            path.unlink()
        states = [core.load_checkpoint(path) for path in tmp_path.glob("x_step_*.pt")]  # every one verifies
        assert states and all((s["w"] == s["step"]).all() for s in states)
    assert inside  # some kills did hit a save


@pytest.mark.parametrize("kind", ["checkpoint", "result", "cache"])
def test_a_file_is_on_the_disk_before_it_gets_its_name(kind, tmp_path, monkeypatch):
    """The order that a power cut asks for: all bytes written, fsync of that very file, then the rename."""
    path, events = tmp_path / "file.json", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(number):
        events.append(("fsync", os.fstat(number).st_ino, os.fstat(number).st_size))
        fsync(number)

    def note_replace(source, target):
        events.append(("rename", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    if kind == "checkpoint":
        core.save_checkpoint(path, STATE)
    elif kind == "result":
        core.write_json(path, {"a": 1})
    else:
        core.cached(path, lambda: b"content")
    there = path.stat().st_ino, path.stat().st_size
    assert events == [("fsync", *there), ("rename", *there)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("moment", [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_a_disk_that_takes_no_more_keeps_the_old_checkpoint(moment, number, tmp_path, monkeypatch):
    path = tmp_path / "x_step_1.pt"
    core.save_checkpoint(path, {"step": 1})

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*moment, full)
    with pytest.raises(core.Failure, match="free space") as failure:
        core.save_checkpoint(path, {"step": 2})
    assert failure.value.code == core.DISK and os.strerror(number) in str(failure.value)
    assert core.load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["x_step_1.pt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_no_more_keeps_the_old_result_and_no_leftover(number, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    core.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        core.write_json(path, {"a": 2})
    with pytest.raises(OSError):
        core.cached(tmp_path / "cache" / "x", lambda: b"content")
    assert json.loads(path.read_text()) == {"a": 1}
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["r.json"]


def test_results_refuse_nan(tmp_path):
    path = tmp_path / "r.json"
    core.write_json(path, {"a": 1})
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError):
            core.write_json(path, {"a": bad})
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["r.json"]


def test_pruning_removes_nothing_until_enough_verify(tmp_path):
    paths = [tmp_path / f"x_step_{step}.pt" for step in (1, 2, 3)]
    for step, path in enumerate(paths, start=1):
        core.save_checkpoint(path, {"step": step})
    for path in paths[1:]:
        flip(path, 40)
    core.prune_checkpoints(paths, 1)
    assert all(path.exists() for path in paths)  # the first is the only one that verifies


# ------------------------------------------------------------------------------------------------- cache and digests
def test_the_cache_is_made_again_when_its_checksum_does_not_fit(tmp_path):
    path, made = tmp_path / "tokens" / "x", []

    def make():
        made.append(1)
        return bytes(range(200))

    assert core.cached(path, make) == core.cached(path, make) == bytes(range(200)) and len(made) == 1
    for damage in (
        lambda: flip(path, 7),
        lambda: flip(path, -3),
        lambda: os.truncate(path, 30),
        lambda: os.truncate(path, 120),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"foreign"),
    ):
        before = len(made)
        damage()
        assert core.cached(path, make) == bytes(range(200)) and len(made) == before + 1
    assert core.cached(tmp_path / "empty", lambda: b"") == b""


def test_digests_differ_where_the_content_does(tmp_path):
    ids = np.arange(12, dtype=np.uint16)
    different = [ids, ids.astype(np.int64), ids.reshape(3, 4), ids + 1, [1, 2], [2, 1], {"a": 1}, {"a": 2}, "a", None]
    assert len({core.digest(value) for value in different}) == len(different)
    assert core.digest(ids) == core.digest(ids.copy()) and core.digest({"a": 1, "b": 2}) == core.digest(
        {"b": 2, "a": 1}
    )
    assert core.digest(ids, "x") != core.digest(ids) != core.digest("x", ids)
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.txt").write_text("one")
    first = core.digest(folder)
    assert core.digest(folder) == first != core.digest(folder / "inner" / "a.txt", folder)
    (folder / "inner" / "a.txt").write_text("two")
    second = core.digest(folder)
    (folder / "inner" / "a.txt").rename(folder / "inner" / "b.txt")
    assert len({first, second, core.digest(folder)}) == 3


def test_a_base_is_known_by_its_weights(tmp_path):
    model, tokenizer = core.load_backbone("tiny")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = core.base_digest(str(tmp_path), model)
    (tmp_path / "README.md").write_text("a card changes nothing")
    assert core.base_digest(str(tmp_path), model) == before
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert core.base_digest(str(tmp_path), model) != before
    hub = types.SimpleNamespace(config=types.SimpleNamespace(_commit_hash="1"))
    later = types.SimpleNamespace(config=types.SimpleNamespace(_commit_hash="2"))
    assert (
        core.base_digest("org/name", hub) != core.base_digest("org/name", later) != core.base_digest("org/other", later)
    )
    bpe = core.load_tokenizer("local", core.synthetic_text("train"), 300)
    assert (
        core.tokenizer_digest(bpe)
        != core.tokenizer_digest(tokenizer)
        == core.tokenizer_digest(core.load_tokenizer("byte"))
    )


# --------------------------------------------------------------------------------------------- engine and directory
def test_processes_that_would_train_alone_are_refused(monkeypatch):
    """What a plain Accelerator() does under torchrun on a machine without a GPU: single runs that know no other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: types.SimpleNamespace(num_processes=1))
    with pytest.raises(core.Failure, match="2 processes were started"):
        core.engine(CPU)


def test_every_parameter_is_in_one_group():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(3, 4))
    model[1].bias.requires_grad_(False)
    groups = core.decay_groups(model, 0.1)
    assert [len(g["params"]) for g in groups] == [2, 2] and [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"]) and all(p.ndim < 2 for p in groups[1]["params"])


def test_initial_weights_depend_on_seed_and_name_alone():
    small, large = (
        nn.ModuleDict({"a": nn.Linear(30, 40)}),
        nn.ModuleDict({"b": nn.Linear(9, 9), "a": nn.Linear(30, 40)}),
    )
    large["norm"] = nn.LayerNorm(5)
    for model in (small, large):
        core.init_normal(model, 7, 0.05)
    assert torch.equal(small["a"].weight, large["a"].weight)
    assert float(small["a"].weight.detach().std()) == pytest.approx(0.05, rel=0.1) and not small["a"].bias.any()
    assert (large["norm"].weight == 1).all() and not large["norm"].bias.any()
    again = nn.ModuleDict({"a": nn.Linear(30, 40)})
    core.init_normal(again, 8, 0.05)
    assert not torch.equal(small["a"].weight, again["a"].weight)


def test_mean_over_all_positions_from_the_means_of_two_processes():
    """DDP averages the processes' gradients; weighted so, the average is the mean over all positions."""
    counts, means = torch.tensor([30.0, 10.0]), torch.tensor([2.0, 6.0])
    accelerator = types.SimpleNamespace(num_processes=2, reduce=lambda count, how: counts.mean())
    weighted = sum(core.weight_of(accelerator, n) * m for n, m in zip(counts, means)) / 2
    assert weighted == (30 * 2 + 10 * 6) / 40
    assert core.weight_of(types.SimpleNamespace(num_processes=1), counts[0]) == 1.0


def test_a_machine_without_git_or_proc(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "git")

    monkeypatch.setattr(subprocess, "run", absent)
    found = core.environment.__wrapped__()
    assert not found["commit"] and found["uncommitted_changes"] is False and found["versions"]["torch"]
    with_proc = core.peak_memory()
    monkeypatch.setattr(Path, "read_text", absent)
    assert core.peak_memory() == pytest.approx(with_proc, rel=0.9) and core.peak_memory() > 50e6


@pytest.mark.parametrize(
    "number, code", [(errno.EROFS, core.DISK), (errno.ENOSPC, core.DISK), (errno.EACCES, core.BAD_INPUT)]
)
def test_a_directory_that_cannot_be_written(number, code, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(core.Failure, match=f"{os.strerror(number)}; choose another directory") as failure:
        with run_of(tmp_path / "x"):
            pass
    assert failure.value.code == code


def test_an_old_run_is_protected_unless_it_was_a_test(tmp_path):
    with run_of(tmp_path, test=True) as run:
        run.start()
        run.finish({"x": 1})
    with run_of(tmp_path) as run:  # what --test left may be replaced
        run.start()
        assert not run.result.exists()
        run.finish({"x": 2})
    for name in ("r.json", "manifest.json", "log.jsonl", "x_step_3.pt"):
        alone = tmp_path / f"only_{name}"
        alone.mkdir()
        (alone / name).write_text("{}")
        for flags in ({}, {"test": True}):
            with pytest.raises(core.Failure, match="already holds a run"):
                with run_of(alone, **flags):
                    pass
        assert (alone / name).read_text() == "{}"
        with run_of(alone, overwrite=True) as run:
            run.start()
            assert [path.name for path in run._old_files()] == ["manifest.json"]
    assert json.loads((tmp_path / "r.json").read_text())["x"] == 2


def test_a_second_signal_quits_at_once(tmp_path, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with run_of(tmp_path) as run:
        run.start()
        assert run.stop_requested() == 0
        signal.raise_signal(signal.SIGTERM)
        assert run.stop_requested() == signal.SIGTERM and not codes
        signal.raise_signal(signal.SIGINT)
        assert codes == [130]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_every_process_hears_of_a_signal_to_one(tmp_path, monkeypatch):
    with run_of(tmp_path) as run:
        run.start()
        monkeypatch.setattr(core.Run, "accelerator", None, raising=False)
        run.accelerator = types.SimpleNamespace(
            num_processes=2, device="cpu", gather=lambda own: torch.tensor([int(own), 15]), end_training=lambda: None
        )
        assert run.stop_requested() == 15


def test_a_log_row_is_strict_json(tmp_path):
    with run_of(tmp_path) as run:
        run.start()
        run.log(step=1, loss=math.nan, norm=math.inf, text="x")
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": null, "norm": null, "text": "x"}\n'


def test_progress_without_a_terminal_is_plain_lines(tmp_path, capsys):
    with run_of(tmp_path / "r") as run:
        bar = run.progress(4, 1, "first")
        assert bar.mininterval == 60
        bar.update(1)
        bar.refresh()
        run.say("a line")
        second = run.progress(2, 0, "second")
        second.update(2)
        second.refresh()
    shown = capsys.readouterr()
    lines = {line.strip("\r ").split(", ")[0] for line in shown.err.split("\n")}
    assert {"first: 2/4 (50 %)", "second: 2/2 (100 %)"} <= lines
    assert shown.out == "a line\n"


def test_a_card_stands_beside_a_model_and_replaces_no_other_page(tmp_path):
    with run_of(tmp_path) as run:
        run.start()
        result = run.finish({"data": {"source": "generated"}, "f1": 0.25})
        card = ("Title", "tiny", {"F1": result["f1"], "absent": None, "steps": 7}, "python x.py --load", "Little.")
        core.model_card(run, result, *card)
        text = (tmp_path / "README.md").read_text()
        says = ("base model: tiny", "# Title", "| F1 | 0.25 |", "| steps | 7 |", "python x.py --load", "Little.")
        assert all(word in text for word in (*says, "data: generated", "r.json")) and "absent" not in text
        about = huggingface_hub.ModelCard.load(tmp_path / "README.md").data.to_dict()
        script = Path(__file__).stem
        assert about == {"library_name": "claimbench", "license": "mit", "tags": ["claimbench", script]}  # no hub id
        core.model_card(run, result, "Title", "an-owner/a-model", *card[2:])  # replaces the card
        assert huggingface_hub.ModelCard.load(tmp_path / "README.md").data.base_model == "an-owner/a-model"
        (tmp_path / "README.md").write_text("a person's page")
        core.model_card(run, result, *card)
        assert (tmp_path / "README.md").read_text() == "a person's page"


def test_wandb_offline_logs_and_its_failure_costs_nothing(tmp_path, monkeypatch, capsys):
    with run_of(tmp_path / "a", wandb="offline") as run:
        run.start()
        run.log(step=1, loss=2.0)
        run.finish({"x": 1})
    assert list((tmp_path / "a").rglob("*.wandb"))
    import wandb

    monkeypatch.setattr(wandb, "init", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no tracker today")))
    with run_of(tmp_path / "b", wandb="offline") as run:
        run.start()
        run.log(step=1, loss=2.0)
    assert "no tracker today" in capsys.readouterr().out and (tmp_path / "b" / "log.jsonl").exists()
    asked = []
    monkeypatch.setattr(core, "reaches", lambda url: asked.append(url))
    with run_of(tmp_path / "c", wandb="online") as run:  # without its server it is not even tried: that takes minutes
        run.start()
    assert asked == ["https://api.wandb.ai"] and "its server does not answer" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- the training loop
def loop_of(run, model, momentum=0.0, **flags) -> core.Loop:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    model, optimizer = core.prepare(model, optimizer, run.accelerator)
    return core.Loop(run, model, optimizer, total=flags.pop("total", 100), **flags)


def test_a_gradient_is_clipped_to_its_norm_and_no_more(tmp_path):
    """SGD with rate 1 moves the weights by the clipped gradient: its length is min(norm, max_norm)."""
    with run_of(tmp_path) as run:
        run.start()
        model = nn.Linear(3, 1, bias=False)
        loop = loop_of(run, model, max_norm=2.0)
        for length, moved in ((10.0, 2.0), (1.5, 1.5)):
            before = model.weight.detach().clone()
            loop.backward((model.weight * torch.tensor([[0.6, 0.8, 0.0]]) * length).sum())
            norm = loop.update()
            assert float(norm) == pytest.approx(length, rel=1e-5)
            assert (before - model.weight).tolist()[0] == pytest.approx(
                [0.6 * moved, 0.8 * moved, 0], rel=1e-4, abs=1e-6
            )
            assert not model.weight.grad if model.weight.grad is None else not model.weight.grad.any()


def test_only_the_given_parameters_are_clipped(tmp_path):
    with run_of(tmp_path) as run:
        run.start()
        model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
        loop = loop_of(run, model, params=model["a"].parameters(), max_norm=1.0)
        before = model["b"].weight.item()
        loop.backward(model["a"].weight.sum() * 5 + model["b"].weight.sum() * 7)
        assert float(loop.update()) == pytest.approx(5) and before - model["b"].weight.item() == pytest.approx(7)


@pytest.mark.parametrize("bad, ends", [(19, False), (20, True)])
def test_the_limit_is_twenty_updates_in_a_row(bad, ends, tmp_path):
    with run_of(tmp_path) as run:
        run.start()
        model = nn.Linear(2, 1)
        loop = loop_of(run, model)
        for step in range(20):
            value = math.inf if step >= 20 - bad else 1.0
            loop.backward(model(torch.full((1, 2), value)).sum())
            if step < 19 or not ends:
                loop.update()
        if ends:
            with pytest.raises(core.Failure, match="20 times in a row, up to step 20") as failure:
                loop.update()
            assert failure.value.code == core.DIVERGED
        else:
            assert loop.end()["nonfinite_steps"] == bad and loop.skipped.tolist() == [bad, bad]


def test_a_good_update_between_bad_ones_begins_the_count_again(tmp_path):
    with run_of(tmp_path) as run:
        run.start()
        model = nn.Linear(2, 1)
        loop = loop_of(run, model)
        for step in range(60):
            loop.backward(model(torch.full((1, 2), 1.0 if step % 10 == 0 else math.nan)).sum())
            loop.update()
        assert loop.nonfinite_steps() == 54 and loop.skipped.tolist() == [54, 9]


def test_rate_and_figures_of_a_training_in_two_parts(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(core, "clock", lambda: now[0])
    monkeypatch.setattr(core.time, "process_time", lambda: 3 * now[0])
    monkeypatch.setattr(core, "peak_memory", lambda: 500)
    with run_of(tmp_path) as run:
        run.start()
        model = nn.Linear(2, 1)
        loop = loop_of(run, model, 0.5, label="first")
        rates = []
        for tokens, seconds in ((100, 1), (300, 2), (50, 5)):
            loop.backward(model(torch.ones(1, 2)).sum())
            loop.update(tokens=tokens, advance=3)
            now[0] += seconds
            rates.append(loop.rate())
        assert rates == [100, 150, 10] and (loop.seconds, loop.cpu_seconds, loop.step) == (8, 24, 9)
        path = loop.save("x_step_9.pt")
        saved = core.load_checkpoint(path)
        monkeypatch.setattr(core, "peak_memory", lambda: 300)
        later = loop_of(run, nn.Linear(2, 1), 0.5, label="first", saved=saved)
        now[0] += 2
        assert later.rate() == 0 and (later.seconds, later.cpu_seconds) == (10, 30)
        expected = {"steps": 9, "tokens": 450, "train_seconds": 10, "tokens_per_s": 45, "nonfinite_steps": 0}
        assert later.end() == expected | {"peak_mem_bytes": 500}


def test_a_run_longer_than_asked_or_with_other_processes_is_refused(tmp_path):
    with run_of(tmp_path) as run:
        run.start()
        loop = loop_of(run, nn.Linear(2, 1))
        loop.step = 7
        saved = core.load_checkpoint(loop.save("x_step_7.pt"))
    for total in (6, 7):  # `loop_of` trains for more than 7: the checkpoint is not the end of a run of 7 either
        with run_of(tmp_path, resume="auto") as run:
            with pytest.raises(core.Failure, match=f"step 7 of .*{total} steps"):
                run.checkpoint("x_step_*.pt", total=total)
    core.save_checkpoint(tmp_path / "x_step_8.pt", saved | {"step": 8, "rng_state": saved["rng_state"] * 2})
    with run_of(tmp_path, resume="auto") as run:
        with pytest.raises(core.Failure, match="had 2 processes"):
            run.checkpoint("x_step_*.pt", total=9)


# ------------------------------------------------------------------------------------------------------- arguments
def test_both_spellings_config_and_order_of_precedence(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("width: 3\nseed: 1e1\ndry-run: true\n")
    with pytest.raises(core.Failure, match="seed"):  # 1e1 is no int: a file is checked as typed words are
        core.parse_args(Args, {}, ["--config", str(config)])
    config.write_text("width: 3\nseed: 10\ndry-run: true\nflag: false\n")
    args = core.parse_args(Args, {"width": 4}, ["--config", str(config)])
    assert (args.width, args.seed, args.dry_run, args.flag) == (3, 10, True, False)
    assert core.parse_args(Args, {"width": 4}, ["--config", str(config), "--test"]).width == 4
    assert core.parse_args(Args, {"width": 4}, ["--test", "--width", "5", "--no-flag", "--dry-run"]).width == 5
    config.write_text("depth: 3\n")
    with pytest.raises(core.Failure, match="depth"):
        core.parse_args(Args, {}, ["--config", str(config)])
    for words in ("just words", "[" * 5000):
        config.write_text(words)
        with pytest.raises(core.Failure, match="flag: value"):
            core.parse_args(Args, {}, ["--config", str(config)])


@pytest.mark.parametrize(
    "words",
    [
        ["--rate", "inf"],
        ["--rate", "nan"],
        ["--threads", "-3"],
        ["--threads", "1000000"],
        ["--num_workers", "-1"],
        ["--wid", "3"],
        ["--width", "3.5"],
        ["--resume", "\udcff"],
        ["--width", "3", " "],
        ["--precision", "fp8"],
    ],
)
def test_values_out_of_range_are_one_line(words):
    with pytest.raises(core.Failure) as failure:
        core.parse_args(Args, {}, words)
    assert failure.value.code == core.BAD_INPUT and "\n" not in str(failure.value).strip()
    assert words[0] in str(failure.value) or "blank" in str(failure.value)


def test_what_no_device_can_do_is_refused(monkeypatch):
    for device, precision in (("gpu", "auto"), ("cpu", "fp16"), ("cuda:77", "auto")):
        with pytest.raises(core.Failure, match=r"--device|--precision"):
            core.engine(Args(device=device, precision=precision))


# ------------------------------------------------------------------------------------------------------- data order
def test_seed_streams_do_not_touch_each_other():
    a, b = (torch.rand(5, generator=core.generator(0, p)) for p in ("init", "data"))
    assert not torch.equal(a, b) and torch.equal(a, torch.rand(5, generator=core.generator(0, "init")))
    state = torch.get_rng_state()
    list(core.batches(np.zeros((10, 4), np.uint16), 2, 0, range(3), core.engine(CPU), workers=1))
    assert torch.equal(state, torch.get_rng_state())  # loading data draws nothing from dropout's stream


def test_each_epoch_is_a_fresh_permutation_and_a_batch_may_straddle_two():
    def order(batch, steps, seed=5):
        return [i for step in range(steps) for i in core.batch_indices(10, batch, seed, step)]

    epochs = [order(4, 10)[start : start + 10] for start in (0, 10, 20, 30)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4 and list(range(10)) not in epochs
    assert order(4, 10) == order(2, 20) == order(10, 4) == order(40, 1)  # whatever the size of a batch
    assert order(4, 10) != order(4, 10, seed=6)


def test_the_recorded_order_of_the_data():
    """Recorded results stand on these numbers: another hash, another generator would be another training."""
    assert core.derived_seed(0, "data", 0) == 342537235873088852
    assert core.batch_indices(10, 10, 0, 0) == [9, 5, 4, 8, 7, 3, 1, 2, 6, 0]


def test_batches_are_the_rows_of_their_indices():
    rows = np.arange(40, dtype=np.uint16).reshape(10, 4)
    for workers in (0, 1):
        got = list(core.batches(rows, 3, 5, range(2, 6), core.engine(CPU), workers))
        for step, batch in zip(range(2, 6), got, strict=True):
            assert batch.tolist() == rows[core.batch_indices(10, 3, 5, step)].tolist()
            assert batch.dtype == torch.int64


def test_processes_see_together_what_one_sees_with_a_larger_batch():
    rows = np.arange(40, dtype=np.uint16).reshape(20, 2)

    def seen(world, rank, batch):
        accelerator = types.SimpleNamespace(num_processes=world, process_index=rank, device=torch.device("cpu"))
        return list(core.batches(rows, batch, 5, range(4), accelerator))

    parts = zip(seen(2, 0, 3), seen(2, 1, 3))
    assert [torch.cat(pair).tolist() for pair in parts] == [whole.tolist() for whole in seen(1, 0, 6)]


def test_loader_processes_leave_signals_to_their_parent():
    """A signal to the whole process group must not take a worker away in the middle of the save that it asks for."""

    class Dispositions:
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return np.array([signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGTERM, signal.SIGINT)])

    [batch] = core.batches(Dispositions(), 4, 0, range(1), core.engine(CPU), workers=1)
    assert batch.bool().all()


BROKEN = """
import numpy as np
import core

args = core.parse_args(core.RunArgs, {}, ["--device", "cpu"])
loader = core.batches(np.zeros((64, 4), np.uint16), 2, 0, range(32), core.engine(args), workers=2)
next(loader)
raise RuntimeError("something that nobody expected")
"""


def test_a_program_that_fails_beside_its_loaders_ends(tmp_path):
    """They ignore the signal by which Python ends its processes; it must not wait for them for ever."""
    (tmp_path / "broken.py").write_text(BROKEN)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, tmp_path / "broken.py"], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 1 and done.stderr.rstrip().endswith("RuntimeError: something that nobody expected")


# ------------------------------------------------------------------------------------------------------------ data
def test_text_is_split_by_file(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(f"file {i}\n")
    train, held_out = (core.split_text(str(tmp_path), s) for s in ("train", "validation"))
    assert held_out == ["file 0\n", "file 10\n"] and len(train) == 18
    (tmp_path / "my_dev.txt").write_text("dev\n")
    assert core.split_text(str(tmp_path), "validation") == ["dev\n"]
    (tmp_path / "test.md").write_text("test\n")
    train, held_out = (core.split_text(str(tmp_path), s) for s in ("train", "validation"))
    assert held_out == ["test\n"] and len(train) == 21
    one = tmp_path / "05.txt"
    one.write_text("".join(f"{i}\n" for i in range(100)))
    train, held_out = (core.split_text(str(one), s) for s in ("train", "validation"))
    assert train == [f"{i}\n" for i in range(90)] and held_out == [f"{i}\n" for i in range(90, 100)]
    one.write_bytes(b"ab\xff")
    for path, says in ((tmp_path / "gone", "no such file"), (one, "not UTF-8 at byte 2")):
        with pytest.raises(core.Failure, match=says):
            core.split_text(str(path), "train")


def test_local_and_synthetic_text():
    train, held_out = (core.local_text(s) for s in ("train", "validation"))
    assert sum(map(len, train)) > 500_000 and len(held_out) > 100 and not set(train) & set(held_out)
    a, b = (core.synthetic_text(s, seed=3) for s in ("train", "validation"))
    assert a == core.synthetic_text("train", seed=3) != core.synthetic_text("train", seed=4) and len(b) * 10 == len(a)
    repeated = sum(len(set(s)) < len(s) for s in (line.strip().split(". ") for line in a)) / len(a)
    assert 0.1 < repeated < 0.5 and all(line.isascii() for line in a)


def test_byte_and_trained_tokenizers_round_trip(tmp_path):
    text = "Ünïcode, tabs\tand  spaces\n"
    byte = core.load_tokenizer("byte")
    assert len(byte) == 259 and len(byte(text)["input_ids"]) == len(text.encode())
    bpe = core.load_tokenizer("local", core.synthetic_text("train"), 400)
    assert len(bpe) == 400 and len(bpe("Clara found the lamp")["input_ids"]) < 15
    bpe.save_pretrained(tmp_path)
    for tokenizer in (byte, bpe, core.load_tokenizer(str(tmp_path))):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(core.Failure, match="did not load"):
        core.load_tokenizer(str(tmp_path))


def test_encode_skips_blank_lines_and_adds_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(core, "CACHE", tmp_path)
    byte = core.load_tokenizer("byte")
    ids = core.encode(["ab\n", "  \n", "c"], byte)
    assert byte.decode(ids.tolist()) == "ab\nc" and ids.dtype == np.uint16
    many = [f"line {i}\n" for i in range(2500)]
    assert byte.decode(core.encode(many, byte).tolist()) == "".join(many)
    assert len(core.encode([], byte)) == 0


def test_cached_tokens_belong_to_their_text_and_their_tokenizer(monkeypatch, tmp_path):
    monkeypatch.setattr(core, "CACHE", tmp_path)
    lines = core.synthetic_text("train")[:50]
    byte, bpe = core.load_tokenizer("byte"), core.load_tokenizer("local", lines, 300)
    loud = [line.upper() for line in lines]  # as long as the other text, line by line
    for text, tokenizer in ((lines, byte), (lines, bpe), (loud, byte), (lines, byte)):
        expected = [i for line in text for i in tokenizer(line, add_special_tokens=False)["input_ids"]]
        assert core.encode(text, tokenizer).tolist() == expected
    [*files] = (tmp_path / "tokens").iterdir()
    assert len(files) == 3  # the last was taken from the first's file
    expected = core.encode(lines, byte).tolist()
    for path in files:  # other ids under an intact frame train to another loss without a word
        flip(path, path.stat().st_size // 2)
    assert core.encode(lines, byte).tolist() == expected


def test_windows_drop_the_tail():
    assert core.blocks(np.arange(11), 4, "text").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(core.Failure, match="text has 3 tokens, but one window needs 4"):
        core.blocks(np.arange(3), 4, "text")


def test_generated_questions_are_asked_of_their_own_context():
    """Each context has as many different questions as were asked for, one after the other, and states their answers;
    each of its relations and entities belongs to several facts, so that neither alone points at an answer."""
    rows = core.question_rows(30, 0, "x", facts=6, questions=4)
    assert len(rows) == len({row["id"] for row in rows}) == 120 and len({row["context"] for row in rows}) == 30
    for at in range(0, 120, 4):
        asked = rows[at : at + 4]
        stated = [fact.split() for fact in asked[0]["context"].removesuffix(" .").split(" . ")]
        assert {row["context"] for row in asked} == {asked[0]["context"]} and len(stated) == 6
        assert len({row["question"] for row in asked}) == 4
        assert {len({fact[1] for fact in stated}), len({fact[3] for fact in stated})} == {2, 3}
        for row in asked:
            _, _, _, relation, _, entity, _ = row["question"].split()
            assert row["answers"] == [" ".join(f[5:]) for f in stated if (f[1], f[3]) == (relation, entity)]
    places = [row["context"].index(f"{row['answers'][0]} .") / len(row["context"]) for row in rows]
    assert min(places) < 0.2 and max(places) > 0.8  # what is asked may stand anywhere
    known = {row["context"] for row in rows[:60]}
    again = core.question_rows(20, 0, "x", known, facts=6, questions=4)
    assert [row["context"] for row in again[:60]] == [row["context"] for row in rows[60:]]
    for other in ((30, 1, "x"), (30, 0, "y")):
        assert not {row["context"] for row in core.question_rows(*other, facts=6, questions=4)} & known
    assert (
        len({row["context"] for row in core.question_rows(30, 0, "x")}) == 30
    )  # by default one question of four facts


def test_squad_files_of_both_forms(tmp_path):
    qa = {"id": "q1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}
    article = {"title": "t", "paragraphs": [{"context": "Ada did.", "qas": [qa, {**qa, "answers": []}]}]}
    (tmp_path / "a.json").write_text(json.dumps({"data": [article]}))
    row = {"id": "q1", "title": "t", "context": "Ada did.", "question": "Who?", "answers": ["Ada"]}
    assert core.squad_rows(str(tmp_path / "a.json")) == [row]
    line = {"context": "c\u2028d", "question": "q", "answers": ["x", "y"]}  # valid JSON, though no line end
    (tmp_path / "b.jsonl").write_text("\n\n".join([json.dumps(line, ensure_ascii=False)] * 2) + "\n")
    rows = core.squad_rows(str(tmp_path / "b.jsonl"))
    assert [row["id"] for row in rows] == ["0", "1"] and rows[0]["context"] == "c\u2028d"
    assert rows[0]["answers"] == ["x", "y"] and rows[0]["title"] == ""
    hub = {"context": "c", "question": "q", "answers": {"text": ["x"], "answer_start": [0]}}
    (tmp_path / "b.jsonl").write_text(json.dumps(hub))
    assert core.squad_rows(str(tmp_path / "b.jsonl"))[0]["answers"] == ["x"]


@pytest.mark.parametrize(
    "damage",
    [
        {"answers": "lamp"},  # a string is a list of letters
        {"answers": None},
        {"answers": [None]},
        {"answers": [3]},
        {"answers": [math.nan]},
        {"context": None},
        {"context": 7},
        {"question": ["q"]},
        {"context": "\ud800"},
    ],
)
def test_a_malformed_question_is_refused_with_its_number(damage, tmp_path):
    good = {"context": "c", "question": "q", "answers": ["x"]}
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in (good, good, good | damage)))
    with pytest.raises(core.Failure, match=r"b\.jsonl: record 3: .*expected SQuAD") as failure:
        core.squad_rows(str(tmp_path / "b.jsonl"))
    assert "\n" not in str(failure.value)


def test_squad_files_that_are_none(tmp_path):
    (tmp_path / "b.jsonl").write_text(
        '{"context": "c", "question": "q", "answers": ["x"]}\n{"context": "c", "question": "q"}'
    )
    with pytest.raises(core.Failure, match="record 2: KeyError 'answers'"):
        core.squad_rows(str(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"context": "c", "question": "q", "answers": []}')
    with pytest.raises(core.Failure, match="no answerable question"):
        core.squad_rows(str(tmp_path / "b.jsonl"))
    for text in ("", "[1", "[" * 100_000, "{}", '{"data": 3}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(core.Failure, match=r"a\.json: record 1"):
            core.squad_rows(str(tmp_path / "a.json"))
    with pytest.raises(core.Failure, match=r"missing\.json"):
        core.squad_rows(str(tmp_path / "missing.json"))
    with pytest.raises(core.Failure, match=r"local \.json"):
        core.squad_rows("squad")


def test_real_squad_file_where_there_is_one():
    path = Path(__file__).resolve().parents[2] / "shared/data/squad/train.json"
    if not path.exists():
        pytest.skip("no ../shared/data here")
    rows = core.squad_rows(str(path))
    assert len(rows) == 2575 and all(r["answers"] and r["context"] and r["title"] for r in rows)


# -------------------------------------------------------------------------------------------------------- backbones
@pytest.fixture
def backbone(tmp_path):
    model, tokenizer = core.load_backbone("tiny")
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def connections(monkeypatch):
    """Every attempt to connect to anything, with its time limit: none succeeds."""
    attempts = []

    def refuse(self, address):
        attempts.append((address, self.gettimeout()))
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


def test_backbones(backbone, connections):
    model, tokenizer = core.load_backbone("tiny")
    assert torch.equal(model.lm_head.weight, core.load_backbone("tiny")[0].lm_head.weight)
    again, tok = core.load_backbone(str(backbone), torch.bfloat16)
    assert again.dtype == torch.bfloat16 and not again.training and len(tok) == len(tokenizer)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())
    for name in ("no-such-org/no-such-model", str(backbone.parent / "absent")):
        with pytest.raises(core.Failure, match=r"model .*: ") as failure:
            core.load_backbone(name)
        assert "\n" not in str(failure.value)
    assert not connections  # offline it does not even try


def test_a_directory_that_lacks_a_tensor_or_is_damaged_is_refused(backbone):
    file = backbone / "model.safetensors"
    weights, whole = load_file(file), file.read_bytes()
    save_file({k: v for k, v in weights.items() if "layers.1.mlp.up_proj" not in k}, file, {"format": "pt"})
    with pytest.raises(core.Failure, match=r"lack .*layers\.1\.mlp\.up_proj\.weight, which would stay random"):
        core.load_backbone(str(backbone))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(core.Failure, match="instead: tiny") as failure:
        core.load_backbone(str(backbone))
    assert "\n" not in str(failure.value)
    file.write_bytes(whole)
    (backbone / "tokenizer.json").write_text("{}")
    with pytest.raises(core.Failure, match="did not load"):
        core.load_backbone(str(backbone))
    shutil.copy(backbone / "config.json", backbone / "tokenizer.json")
    with pytest.raises(core.Failure, match="did not load"):
        core.load_backbone(str(backbone))


def test_a_tokenizer_larger_than_the_model_is_refused(backbone):
    model, _ = core.load_backbone("tiny")
    model.resize_token_embeddings(100)
    model.save_pretrained(backbone)
    with pytest.raises(core.Failure, match="its tokenizer has 259 entries, its embedding 100"):
        core.load_backbone(str(backbone))


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_are_nf4(nested, backbone):
    pytest.importorskip("bitsandbytes")
    model, _ = core.load_backbone(str(backbone), torch.float32, four_bit=True, double_quant=nested)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.uint8 and weight.quant_state.quant_type == "nf4"
    assert weight.quant_state.nested is nested and weight.quant_state.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- the hub
def test_an_unreachable_hub_is_asked_once_and_then_no_more(monkeypatch, connections):
    """One attempt of at most 3 seconds; the libraries, which would try for half a minute, are told to stay offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert core.hub_ready() is False and os.environ["HF_HUB_OFFLINE"] == "1"
    assert connections == [(("127.0.0.1", 9), 3.0)]
    with pytest.raises(core.Failure, match=r"the hub cannot be reached; instead: .*--data local"):
        core.load_text("wikitext103", "train")
    with pytest.raises(core.Failure, match="the hub cannot be reached; instead: tiny"):
        core.load_backbone("no-such-org/no-such-model")
    assert len(connections) == 1


def test_behind_a_proxy_it_is_the_proxy_that_is_asked(monkeypatch, connections):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:7")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:7")
    assert core.reaches("https://huggingface.co") is False
    assert connections == [(("127.0.0.1", 7), 3.0)]


def test_a_server_that_answers(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert core.reaches(f"http://127.0.0.1:{server.getsockname()[1]}") is True


# ---------------------------------------------------------------------------------------------------------- the CLI
@pytest.mark.parametrize(
    "error, code, says",
    [
        (core.Failure("x: use y"), 2, "x: use y"),
        (core.Failure("nan", core.DIVERGED), 3, "nan"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "lower --width"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "lower --width"),
        (MemoryError(), 2, "lower --width"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 4, "No space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), 4, "quota"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 4, "Read-only"),
        (OSError(errno.EIO, "Input/output error", "/x"), 4, "Input/output"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(error, code, says, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        core.cli(main, "--width")
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == code and len(lines) == 1 and says in lines[0]


def test_one_process_speaks_for_all(monkeypatch, capsys):
    def main():
        raise core.Failure("x: use y", core.DISK)

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        core.cli(main)
    assert end.value.code == core.DISK and capsys.readouterr().err == ""


def test_a_process_whose_peer_has_died_says_so_in_one_line(monkeypatch, capsys):
    def main():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer.\nGLHF!")

    with pytest.raises(RuntimeError):  # alone, it is a bug
        core.cli(main)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as end:
        core.cli(main)
    error = capsys.readouterr().err
    assert end.value.code == core.CHECK_FAILED and error.count("\n") == 1
    assert "another process" in error and "--resume auto" in error


@pytest.mark.parametrize("error", [RuntimeError("a bug"), PermissionError(errno.EACCES, "a bug")])
def test_a_bug_is_not_hidden(error):
    def main():
        raise error

    with pytest.raises(type(error), match="a bug"):
        core.cli(main)


def test_weights_that_do_not_fit_are_one_line(capsys):
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(SystemExit) as stop:
        core.cli(lambda: layer.load_state_dict({"weight": torch.zeros(3, 2), "more": torch.zeros(1)}))
    error = capsys.readouterr().err
    assert stop.value.code == core.BAD_INPUT and error.count("\n") == 1
    assert all(word in error for word in ("does not fit", "weight", "bias", "more"))
