"""core.Run, core.Loop and the checkpoint store, on a training of a few numbers: what they promise every script."""

import dataclasses
import hashlib
import json
import math
import os
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same_tensors
from torch import nn

import core

DATA = np.arange(60, dtype=np.int64).reshape(20, 3) % 7


@dataclasses.dataclass
class Args(core.RunArgs):
    max_steps: int = core.arg(6, "updates")
    lr: float = core.arg(0.1, "rate")
    save_interval: int = core.arg(2, "save")
    out: str = core.arg("", "directory")


FREE = ("save_interval", "out")


class Model(nn.Module):
    """Predicts a column of a row of numbers; draws random numbers, as dropout does."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Embedding(7, 4), nn.Parameter(torch.tensor(0.5))
        core.init_normal(self, 0, 0.5)

    def forward(self, ids):  # B T
        return (self.scale * nn.functional.dropout(self.table(ids), 0.3)).square().mean()


def train(out, data=DATA, at=None, evaluate=None, optimizer_of=None, **flags):
    """The loop of a script in short; `at(loop)` is called after each update, `evaluate()` when one is due."""
    args = Args(out=str(out), device="cpu", **flags)
    accelerator = core.engine(args)
    with core.Run(args, args.out, accelerator, "result.json", ("x_step_*.pt",)) as run:
        if done := run.finished("max_steps", FREE):
            return done
        saved = run.checkpoint("x_step_*.pt", total=args.max_steps)
        run.start((*FREE, "max_steps"), data=core.digest(data))
        model = Model()
        if saved:
            model.load_state_dict(saved["model_state_dict"])
        torch.manual_seed(args.seed)
        optimizer = torch.optim.AdamW(core.decay_groups(model, 0.1), lr=args.lr, fused=True)
        if optimizer_of:
            optimizer = optimizer_of(model)
        model, optimizer = core.prepare(model, optimizer, accelerator)
        loop = core.Loop(run, model, optimizer, args.max_steps, saved=saved)
        while not loop.last:
            for i in loop.micro_batches(2):
                ids = torch.from_numpy(data[core.batch_indices(len(data), 4, args.seed, loop.step * 2 + i)])
                loss = model(ids)
                loop.backward(loss / 2)
                loop.add(loss=loss)
            norm = loop.update(tokens=2 * ids.numel())
            if at:
                at(loop)
            if loop.due(3) or loop.last:
                run.log(step=loop.step, norm=float(norm), **loop.means())
            if evaluate:
                with loop.paused():
                    evaluate()
                    with loop.paused():  # saving in there would do the same
                        evaluate()
            if loop.due(args.save_interval) or loop.stopping or loop.last:
                loop.save(f"x_step_{loop.step}.pt", model_state_dict=core.full_state(model))
            loop.leave_if_stopped()
        figures = loop.end()
        if evaluate:
            evaluate()  # training has ended: the clock stands
        assert loop.seconds == figures["train_seconds"]
        return run.finish(figures | {"weights": model.table.weight.detach().flatten().tolist()})


def files(directory: Path) -> dict:
    """Every file below the directory by content; the lock and who holds it aside."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name not in (".lock", ".holder")]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def stop_at(step, signum=signal.SIGTERM):
    return lambda loop: signal.raise_signal(signum) if loop.step == step else None


def rows(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def same_run(a, b) -> bool:
    last = [core.load_checkpoint(core.newest_first(d.glob("x_step_*.pt"))[0]) for d in (a, b)]
    for state in last:
        del state["manifest"], state["log_size"]
        state["loop"] = {k: state["loop"][k] for k in ("tokens", "skipped", "sums")}
    return same_tensors(*last) and rows(a) == rows(b)


# ------------------------------------------------------------------------------------------------ resume and manifest
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_bit_for_bit(signum, tmp_path):
    train(tmp_path / "whole")
    with pytest.raises(core.Failure) as failure:
        train(tmp_path / "cut", at=stop_at(4, signum))  # seen at the end of the next update
    assert failure.value.code == 128 + signum and "--resume auto" in str(failure.value)
    resumed = train(tmp_path / "cut", resume="auto")
    assert same_run(tmp_path / "whole", tmp_path / "cut")
    assert resumed["steps"] == 6 and resumed["tokens"] == 6 * 2 * 12
    assert len(resumed["manifest"]["segments"]) == 2
    assert resumed["wall_s"] == sum(s["wall_s"] for s in resumed["manifest"]["segments"])
    assert [s["updates"] for s in resumed["manifest"]["segments"]] == [5, 1]


def test_rows_after_the_last_checkpoint_are_written_once(tmp_path):
    class Dead(Exception):
        pass

    def die(loop):
        if loop.step == 4:
            raise Dead

    train(tmp_path / "whole", save_interval=1)
    with pytest.raises(Dead):
        train(tmp_path / "cut", at=die, save_interval=3)
    with open(tmp_path / "cut" / "log.jsonl", "a") as f:
        f.write('{"step": 4}\n{"step": 5, "lo')  # written after the checkpoint of step 3, the last one not to its end
    train(tmp_path / "cut", resume="auto", save_interval=1)
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_half_written_row_is_dropped_when_there_is_no_checkpoint(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "log.jsonl").write_text('{"step": 1}\n{"st')
    train(tmp_path / "x", resume="auto")
    assert [row["step"] for row in rows(tmp_path / "x")] == [3, 6]


def test_a_finished_run_returns_its_result_and_changes_nothing(tmp_path, capsys):
    result = train(tmp_path / "x")
    before = files(tmp_path / "x")
    again = train(tmp_path / "x", resume="auto", save_interval=5)
    assert again == json.loads(json.dumps(result)) and files(tmp_path / "x") == before
    assert "finished already" in capsys.readouterr().out
    for flags in ({"lr": 0.2}, {"seed": 1}, {"max_steps": 5}, {"test": True}):
        with pytest.raises(core.Failure, match=next(iter(flags))) as failure:
            train(tmp_path / "x", resume="auto", **flags)
        assert failure.value.code == 2 and files(tmp_path / "x") == before
    with pytest.raises(core.Failure, match="already holds a run"):  # the refused --test left no mark behind
        train(tmp_path / "x")
    assert files(tmp_path / "x") == before


def test_a_finished_run_asked_for_more_goes_on_to_the_same_end(tmp_path):
    train(tmp_path / "whole", max_steps=9)
    train(tmp_path / "x", max_steps=6)
    train(tmp_path / "x", max_steps=9, resume="auto")
    assert rows(tmp_path / "x")[-1] == rows(tmp_path / "whole")[-1]


def test_rows_of_a_run_without_a_checkpoint_go_before_the_first_new_one(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    args = Args(out=str(tmp_path), device="cpu", resume="auto")
    with core.Run(args, args.out, core.engine(args), "result.json") as run:
        assert run.checkpoint("x_step_*.pt", total=6) is None
        run.start()
        run.log(step=0)  # before there is a loop
        core.Loop(run, model := Model(), torch.optim.SGD(model.parameters(), lr=0.1), 5)
    assert rows(tmp_path) == [{"step": 0}]


def test_two_arms_in_one_directory_keep_each_others_rows(tmp_path):
    """Each arm is trained to its end before the next; a longer run continues the first behind the rows of both."""

    def both(max_steps, resume=""):
        args = Args(out=str(tmp_path), device="cpu", max_steps=max_steps, resume=resume)
        accelerator = core.engine(args)
        with core.Run(args, args.out, accelerator, "result.json", ("*_step_*.pt",)) as run:
            saved = {arm: run.checkpoint(f"{arm}_step_*.pt", total=max_steps, arm=arm) for arm in ("first", "second")}
            run.start(("max_steps",))
            for arm in saved:
                model = Model()
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
                model, optimizer = core.prepare(model, optimizer, accelerator)
                loop = core.Loop(run, model, optimizer, max_steps, arm, saved[arm])
                while not loop.last:
                    loop.backward(model(torch.tensor([[1, 2]])))
                    loop.update()
                    run.log(arm=arm, step=loop.step)
                    if loop.step == 3 and not resume and arm == "second":
                        raise core.Failure("killed before its first checkpoint")
                loop.save(f"{arm}_step_{loop.step}.pt")

    first, second = ([{"arm": arm, "step": n} for n in range(1, 5)] for arm in ("first", "second"))
    with pytest.raises(core.Failure, match="killed"):
        both(4)
    assert rows(tmp_path) == first + second[:3]
    both(4, "auto")
    assert rows(tmp_path) == first + second
    both(5, "auto")
    assert rows(tmp_path) == first + second + [{"arm": "first", "step": 5}, {"arm": "second", "step": 5}]


def test_another_number_of_processes_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(core.Failure):
        train(tmp_path / "x", at=stop_at(2))
    path = core.newest_first((tmp_path / "x").glob("x_step_*.pt"))[0]
    saved = core.load_checkpoint(path)
    core.save_checkpoint(path, saved | {"rng_state": saved["rng_state"] * 2})
    before = files(tmp_path / "x")
    with pytest.raises(core.Failure, match="the run had 2 processes"):
        train(tmp_path / "x", resume="auto")
    assert files(tmp_path / "x") == before


def test_a_checkpoint_that_the_asked_steps_do_not_continue_is_refused_before_anything_is_written(tmp_path):
    """Neither one beyond them, nor one of the last step that a longer training saved on its way."""
    with pytest.raises(core.Failure):
        train(tmp_path / "x", at=stop_at(2))  # it is saved after the third of six steps
    with open(tmp_path / "x" / "log.jsonl", "a") as log:
        log.write("a row that a resumed run would cut off")
    before = files(tmp_path / "x")
    for steps in (2, 3):
        with pytest.raises(core.Failure, match=f"step 3 of 6, which {steps} steps do not continue"):
            train(tmp_path / "x", resume="auto", max_steps=steps)
        assert files(tmp_path / "x") == before
    assert train(tmp_path / "x", resume="auto", max_steps=4)["steps"] == 4


def test_changed_inputs_and_flags_are_refused(tmp_path):
    with pytest.raises(core.Failure, match="interrupted"):
        train(tmp_path / "x", at=stop_at(2))
    before = files(tmp_path / "x")
    for flags, words in (({"data": DATA + 1}, "data changed, not what"), ({"lr": 0.3}, "lr 0.1 -> 0.3")):
        with pytest.raises(core.Failure, match=words):
            train(tmp_path / "x", resume="auto", **flags)
        assert files(tmp_path / "x") == before


def test_changed_code_is_a_further_segment(tmp_path, monkeypatch, capsys):
    with pytest.raises(core.Failure):
        train(tmp_path / "x", at=stop_at(2))
    real = core.digest
    monkeypatch.setattr(core, "digest", lambda *v: "other" if isinstance(v[0], Path) else real(*v))
    result = train(tmp_path / "x", resume="auto")
    codes = [segment["code"]["core.py"] for segment in result["manifest"]["segments"]]
    assert len(codes) == 2 and codes[0] != codes[1] == "other"
    assert "the code has changed" in capsys.readouterr().out


def test_the_manifest_names_what_the_run_rests_on(tmp_path):
    result = train(tmp_path / "x")
    manifest = result["manifest"]
    assert manifest["flags"]["lr"] == 0.1 and manifest["inputs"] == {"data": core.digest(DATA)}
    assert manifest["script"] == "test_loop.py"
    code = manifest["segments"][0]["code"]
    assert code == {p.name: core.digest(p) for p in (Path(__file__), Path(core.__file__))}
    on_disk = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert on_disk == json.loads(json.dumps(manifest))


def test_a_refused_run_writes_and_removes_nothing(tmp_path):
    """--overwrite removes the old run when the new one starts, not before its data have been read."""
    train(tmp_path / "x")
    before = files(tmp_path / "x")
    args = Args(out=str(tmp_path / "x"), device="cpu", overwrite=True)
    with pytest.raises(core.Failure, match="no such data"):
        with core.Run(args, args.out, core.engine(args), "result.json", ("x_step_*.pt",)):
            raise core.Failure("no such data")
    assert files(tmp_path / "x") == before
    train(tmp_path / "x", overwrite=True, max_steps=1)
    assert sorted(p.name for p in (tmp_path / "x").glob("x_step_*")) == ["x_step_1.pt"]


def test_a_persons_own_files_stay(tmp_path):
    (tmp_path / "x" / "thesis.tmp").mkdir(parents=True)
    (tmp_path / "x" / "notes.tmp").write_text("mine")
    (tmp_path / "x" / ".claimbench-1-x_step_9.pt").write_text("left by a killed process")
    train(tmp_path / "x")
    train(tmp_path / "x", overwrite=True)
    left = {p.name for p in (tmp_path / "x").iterdir()}
    assert {"thesis.tmp", "notes.tmp"} <= left and not [n for n in left if n.startswith(".claimbench-")]


def test_an_empty_directory_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x_step_1.pt").write_text("mine")
    with pytest.raises(core.Failure, match="no name"):
        train("")
    assert os.listdir(tmp_path) == ["x_step_1.pt"]


def test_a_checkpoint_of_another_script_is_refused(tmp_path):
    other = {"step": 1, "rng_state": [], "arm": "x", "manifest": {"script": "b.py"}}
    core.save_checkpoint(tmp_path / "other.pt", other)
    core.save_checkpoint(tmp_path / "export.pt", {"weights": torch.ones(2)})
    for name in ("other.pt", "export.pt"):
        with pytest.raises(core.Failure, match=f"{name}: not a training checkpoint of this script"):
            train(tmp_path / "x", resume=str(tmp_path / name))


def test_a_named_checkpoint_is_taken_from_anywhere(tmp_path):
    train(tmp_path / "whole")
    with pytest.raises(core.Failure, match="interrupted"):
        train(tmp_path / "x", at=stop_at(2))
    (path,) = (tmp_path / "x").glob("x_step_3.pt")
    train(tmp_path / "y", resume=str(path))
    assert rows(tmp_path / "y")[-1] == rows(tmp_path / "whole")[-1]
    assert [s["updates"] for s in json.loads((tmp_path / "y" / "manifest.json").read_text())["segments"]] == [3, 3]


def test_two_runs_in_one_directory(tmp_path):
    args = Args(out=str(tmp_path / "x"), device="cpu")
    with core.Run(args, args.out, core.engine(args), "result.json"):
        with pytest.raises(core.Failure, match="in use by process"):
            train(tmp_path / "x")


# ------------------------------------------------------------------------------------------------------------- clock
def test_the_clock_counts_training_alone(tmp_path, monkeypatch):
    """A clock that only moves where it is told to: 1 s in each update, 100 s in each evaluation, 10 s in each save."""
    now = [0.0]
    monkeypatch.setattr(core, "clock", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    save = core.save_checkpoint
    monkeypatch.setattr(core, "save_checkpoint", lambda *a: (save(*a), passes(10)))
    result = train(tmp_path / "x", at=lambda loop: passes(1), evaluate=lambda: passes(100))
    assert result["train_seconds"] == 6 and result["tokens_per_s"] == result["tokens"] / 6
    assert result["wall_s"] == 6 + 1200 + 30 + 100
    assert result["manifest"]["segments"][0]["train_seconds"] == 6


def test_seconds_go_on_after_a_resume(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(core, "clock", lambda: now[0])

    def second(loop):
        now[0] += 1
        stop_at(3)(loop)

    with pytest.raises(core.Failure):
        train(tmp_path / "x", at=second)
    steps = len(list((tmp_path / "x").glob("*.pt")))
    assert steps
    result = train(tmp_path / "x", resume="auto", at=lambda loop: now.__setitem__(0, now[0] + 1))
    assert result["train_seconds"] == 6


# ------------------------------------------------------------------------------------------- sums, guard, micro-batches
def test_sums_are_weighted_means_and_leave_out_what_is_not_finite():
    sums = core.Sums(core.engine(Args(device="cpu")))
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    sums.add(weight=3, a=one, b=two)
    sums.add(weight=torch.tensor(1), a=two, b=two)
    sums.add(weight=5, a=torch.tensor(math.nan), b=one)  # neither is counted
    sums.add(c=two)
    state = sums.state()
    assert sums.means() == {"a": 5 / 4, "b": 2.0, "c": 2.0} and sums.means() == {}
    sums.load(state)
    assert sums.means()["a"] == 5 / 4
    sums.add(a=torch.tensor(math.inf))
    assert math.isnan(sums.means()["a"])


def poisoned(updates):
    """`at` that makes the gradients of the update after each of `updates` infinite, by way of the weights' hook."""

    def at(loop):
        if loop.step in updates:
            for p in loop.params:
                p.register_hook(lambda g: g * math.inf)

    return at


@pytest.mark.parametrize("fused", [True, False])
def test_twenty_updates_that_are_not_finite_end_the_run(fused, tmp_path):
    """A fused optimizer skips by itself, another one is not called: in both the weights stay as they were."""
    seen = []

    def at(loop):
        seen.append([p.detach().clone() for p in loop.params])
        poisoned({4})(loop)

    def plain(model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(core.Failure, match=r"not finite \d+ times in a row") as failure:
        train(tmp_path / "x", at=at, max_steps=60, optimizer_of=None if fused else plain)
    assert failure.value.code == core.DIVERGED
    assert 4 + 20 <= len(seen) + 1 <= 4 + 40  # looked at every twentieth update, so that no update waits
    assert all(torch.equal(a, b) for a, b in zip(seen[3], seen[-1]))
    assert not all(torch.equal(a, b) for a, b in zip(seen[2], seen[3]))
    assert not (tmp_path / "x" / "result.json").exists()


def test_a_loss_that_is_not_finite_counts_even_if_its_gradient_is(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    args = Args(out=str(tmp_path), device="cpu")
    with core.Run(args, args.out, core.engine(args), "result.json") as run:
        run.start()
        loop = core.Loop(run, nn.ParameterList([weight]), torch.optim.SGD([weight], lr=0.1), 5)
        loop.backward(weight.sum() + torch.tensor(math.nan))  # its gradient is 1
        assert not loop.update().isfinite() and loop.nonfinite_steps() == 1
        assert torch.equal(weight, torch.ones(3))


def test_fewer_are_skipped_and_counted(tmp_path):
    def at(loop):
        if loop.step == 2:
            handles.extend(p.register_hook(lambda g: g * math.nan) for p in loop.params)
        elif loop.step == 4:
            for handle in handles:
                handle.remove()

    handles = []
    assert train(tmp_path / "x", at=at, max_steps=30)["nonfinite_steps"] == 2


def test_gradients_are_averaged_with_the_last_micro_batch_alone():
    entered = []

    class Quiet:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    accelerator = types.SimpleNamespace(no_sync=lambda model: Quiet())
    loop = types.SimpleNamespace(accelerator=accelerator, model=None)
    for i in core.Loop.micro_batches(loop, 3):
        entered.append(i)
    assert entered == ["in", 0, "out", "in", 1, "out", 2]


def test_due_is_reached_or_crossed():
    loop = types.SimpleNamespace(before=7, step=12)
    due = [n for n in (None, 0, 1, 4, 5, 6, 12, 13, 20) if core.Loop.due(loop, n)]
    assert due == [1, 4, 5, 6, 12]  # 8 or 12, 10, 12


def test_the_loss_scalers_state_comes_back(tmp_path, monkeypatch):
    """fp16 needs a GPU, its scaler does not: its scale and growth counter are in the checkpoint and are restored."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 32.0, "_growth_tracker": 5})
    args = Args(out=str(tmp_path), device="cpu")
    accelerator = core.engine(args)

    def loop_of(saved=None):
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return core.Loop(run, model, optimizer, 10, saved=saved)

    with core.Run(args, args.out, accelerator, "result.json") as run:
        run.start()
        monkeypatch.setattr(accelerator, "scaler", scaler)
        loop_of().save("x_step_0.pt")
        saved = core.load_checkpoint(tmp_path / "x_step_0.pt")
        fresh = torch.amp.GradScaler("cpu", init_scale=4.0)
        monkeypatch.setattr(accelerator, "scaler", fresh)
        loop_of(saved)
    assert fresh.state_dict()["scale"] == 32.0 and fresh.state_dict()["_growth_tracker"] == 5


# ------------------------------------------------------------------------------------------------------------- store
def state(step):
    return {"step": step, "w": torch.full((100,), float(step))}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_highest_step_is_taken_whatever_the_names(tmp_path):
    core.save_checkpoint(tmp_path / "final.pt", state(6))
    core.save_checkpoint(tmp_path / "x_step_9.pt", state(9))
    core.save_checkpoint(tmp_path / "last.pt", state(7))
    assert [p.name for p in core.newest_first(tmp_path.glob("*.pt"))] == ["x_step_9.pt", "last.pt", "final.pt"]
    said = []
    flip(tmp_path / "x_step_9.pt")
    assert core.newest_checkpoint(tmp_path.glob("*.pt"), said.append)["step"] == 7
    assert len(said) == 1 and "x_step_9.pt" in said[0]


def test_rotation_keeps_only_what_verifies(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for step in (1, 2, 3):
        core.save_checkpoint(last, state(step), previous)
    assert [core.load_checkpoint(p)["step"] for p in (last, previous)] == [3, 2]
    flip(last)
    core.save_checkpoint(last, state(4), previous)  # the damaged one does not take the good one's place
    assert [core.load_checkpoint(p)["step"] for p in (last, previous)] == [4, 2]


def test_pruning_counts_only_what_verifies(tmp_path):
    for step in range(1, 6):
        core.save_checkpoint(tmp_path / f"x_step_{step}.pt", state(step))
    flip(tmp_path / "x_step_5.pt")
    flip(tmp_path / "x_step_3.pt")
    core.prune_checkpoints(tmp_path.glob("x_step_*.pt"), 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x_step_2.pt", "x_step_3.pt", "x_step_4.pt", "x_step_5.pt"]
    core.prune_checkpoints(tmp_path.glob("x_step_*.pt"), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x_step_4.pt", "x_step_5.pt"]


def test_the_loop_keeps_and_rotates(tmp_path):
    def at(loop):
        loop.save("last.pt", previous="before.pt")
        loop.save(f"y_step_{loop.step}.pt", keep=2, of="y_step_*.pt")

    train(tmp_path / "x", at=at)
    assert sorted(p.name for p in (tmp_path / "x").glob("y_*")) == ["y_step_5.pt", "y_step_6.pt"]
    assert [core.load_checkpoint(tmp_path / "x" / n)["step"] for n in ("last.pt", "before.pt")] == [6, 5]
