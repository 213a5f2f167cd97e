"""core: what several scripts' numbers stand on. Metrics by hand, checkpoints under faults, data, arguments."""

import dataclasses
import errno
import json
import math
import os
import pickle
import random
import signal
import time
import types
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import core


# --------------------------------------------------------------------------------------------------------- metrics
def test_text_metrics_by_hand():
    ids = [1, 2, 1, 2, 1]
    assert core.distinct_n(ids, 2) == 2 / 4
    assert core.rep_w(ids) == 3 / 5 and core.rep_w(ids, prompt=[2]) == 4 / 5
    assert core.rep_w([1, 5, 1], window=1) == 0
    assert core.distinct_n([7], 2) == 0 and core.rep_w([]) == 0


def test_squad_scores_are_the_official_ones():
    assert core.squad_scores("The Eiffel Tower!", ["eiffel tower"]) == (1.0, 1.0)
    em, f1 = core.squad_scores("the cat sat", ["a cat sat down", "dog"])
    assert em == 0 and math.isclose(f1, 2 * 2 / (2 + 3))
    assert core.squad_scores("no no no", ["no"])[1] == 2 * 1 / (3 + 1)  # multiset overlap, not set intersection
    assert core.squad_scores("", ["x"]) == (0.0, 0.0) and core.squad_scores("the", ["a"]) == (1.0, 1.0)


def test_intervals_against_known_values():
    w = core.wilson(0, 10)
    assert w["lo"] == pytest.approx(0, abs=1e-12) and w["hi"] == pytest.approx(0.27753, abs=1e-4)
    w = core.wilson(81, 263)
    assert (w["lo"], w["hi"]) == (pytest.approx(0.2553, abs=1e-3), pytest.approx(0.3662, abs=1e-3))
    t = core.mean_interval([1.0, 2.0, 3.0])
    assert t["mean"] == 2 and t["hi"] == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    assert core.mean_interval([5.0]) == {"mean": 5.0, "lo": 5.0, "hi": 5.0, "n": 1}
    b = core.bootstrap(np.random.default_rng(0).normal(3, 1, 400))
    assert b["lo"] < 3.0 < b["hi"] and b["hi"] - b["lo"] == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert core.bootstrap([1.0, 2.0]) == core.bootstrap([1.0, 2.0])


@pytest.mark.parametrize("old_torch", [False, True])
def test_loss_equals_plain_cross_entropy_with_gradients(old_torch, monkeypatch):
    """Both the library's chunks and the fallback for older torch; several chunks, ignored labels."""
    monkeypatch.setattr(core, "LOSS_CHUNK", 7 * 50)
    if old_torch:
        monkeypatch.delattr(F, "linear_cross_entropy")
    hidden, weight = torch.randn(3, 11, 16), torch.randn(50, 16)
    labels = torch.randint(50, (3, 11))
    labels[0, 4:] = -100
    grads = []
    for loss in (
        core.next_token_loss,
        lambda h, w, y: F.cross_entropy((h @ w.T)[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(h, w, labels)
        grads.append((value.detach(), *torch.autograd.grad(value, (h, w))))
    for ours, plain in zip(*grads):
        assert torch.allclose(ours, plain, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(core.next_token_loss(hidden, weight, labels), grads[1][0], atol=1e-5)


def test_loss_in_bf16_stays_close_to_fp32():
    hidden, weight, labels = torch.randn(2, 64, 32), torch.randn(500, 32) * 0.1, torch.randint(500, (2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        h = hidden.clone().requires_grad_()
        value = core.next_token_loss(h, weight, labels)
    value.backward()
    assert abs(value.item() - core.next_token_loss(hidden, weight, labels).item()) < 0.02
    assert h.grad.isfinite().all() and h.grad.abs().max() > 0


# ----------------------------------------------------------------------------------------------------- checkpoints
STATE = {"step": 3, "w": torch.arange(2000.0), "nested": {"l": [1, "x", None, True]}}


def test_checkpoint_round_trip_and_plain_torch_reads_it(tmp_path):
    path = tmp_path / "x_step_3.pt"
    core.save_checkpoint(path, STATE)
    for state in (core.load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(state["w"], STATE["w"]) and state["nested"] == STATE["nested"]
    assert os.listdir(tmp_path) == ["x_step_3.pt"]


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(share, tmp_path):
    path = tmp_path / "x_step_3.pt"
    core.save_checkpoint(path, STATE)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(core.Failure, match="x_step_3"):
        core.load_checkpoint(path)


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


def test_the_newest_valid_checkpoint_is_chosen_and_bad_ones_named(tmp_path):
    for step in (9, 10, 100):
        core.save_checkpoint(tmp_path / f"x_step_{step}.pt", {"step": step})
    os.truncate(tmp_path / "x_step_100.pt", 50)
    said = []
    assert core.latest_checkpoint(tmp_path, "x_step_*.pt", said.append)["step"] == 10
    assert len(said) == 1 and "x_step_100.pt" in said[0]
    assert core.latest_checkpoint(tmp_path, "y_step_*.pt") is None


@pytest.mark.parametrize("kills", [50])
def test_kill_minus_nine_always_leaves_a_loadable_checkpoint(kills, tmp_path):
    """A child saves checkpoint after checkpoint; it is killed at random moments, many of them inside a save."""
    rng, mid_save = random.Random(0), 0
    for attempt in range(kills):
        child = os.fork()
        if child == 0:
            step = attempt * 1000
            while True:
                step += 1
                state = {"step": step, "w": torch.full((300_000,), float(step))}
                core.save_checkpoint(tmp_path / f"x_step_{step % 3}.pt", state)
        time.sleep(rng.uniform(0.02, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        mid_save += bool(list(tmp_path.glob("*.tmp")))
        states = [core.load_checkpoint(p) for p in tmp_path.glob("x_step_*.pt")]  # every one verifies
        assert states and all((s["w"] == s["step"]).all() for s in states)
    assert mid_save > kills // 5  # the test did hit saves


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x_step_1.pt"
    core.save_checkpoint(path, {"step": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(core.Failure) as failure:
        core.save_checkpoint(path, {"step": 2})
    assert failure.value.code == core.DISK and "space" in str(failure.value)
    assert core.load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["x_step_1.pt"]


# ---------------------------------------------------------------------------------------------- engine and updates
@dataclasses.dataclass
class Args(core.RunArgs):
    width: int = core.arg(8, "a width", "model")
    flag: bool = core.arg(True, "a switch", "model")


CPU = Args(device="cpu")


def test_processes_that_would_train_alone_are_refused(monkeypatch):
    """What a plain Accelerator() does under torchrun on a machine without a GPU: single runs that know no other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: types.SimpleNamespace(num_processes=1))
    with pytest.raises(core.Failure, match="2 processes were started"):
        core.engine(CPU)


def test_a_non_finite_update_changes_nothing_and_twenty_end_the_run():
    accelerator = core.engine(CPU)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(core.decay_groups(model, 0.1), lr=0.1, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    counts = torch.zeros(2)

    def update(value):
        nonlocal counts
        loss = model(torch.full((2, 4), value)).sum()
        accelerator.backward(loss)
        counts = core.guard_step(optimizer, accelerator.clip_grad_norm_(model.parameters(), 1.0), counts)
        optimizer.step()
        optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()] + [
            v.clone() for s in optimizer.state_dict()["state"].values() for v in s.values()
        ]

    before = update(1.0)
    after = update(math.nan)
    assert all(torch.equal(a, b) for a, b in zip(before, after)) and counts.tolist() == [1, 1]
    assert not all(torch.equal(a, b) for a, b in zip(after, update(1.0))) and counts.tolist() == [1, 0]
    assert core.check_skipped(counts) == 1
    for _ in range(20):
        update(math.inf)
    with pytest.raises(core.Failure, match="20 times in a row") as failure:
        core.check_skipped(counts)
    assert failure.value.code == core.DIVERGED


def test_every_parameter_is_in_one_group():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(3, 4))
    model[1].bias.requires_grad_(False)
    groups = core.decay_groups(model, 0.1)
    assert [len(g["params"]) for g in groups] == [2, 2] and [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_seed_streams_do_not_touch_each_other():
    a, b = (torch.rand(5, generator=core.generator(0, p)) for p in ("init", "data"))
    assert not torch.equal(a, b) and torch.equal(a, torch.rand(5, generator=core.generator(0, "init")))
    state = torch.get_rng_state()
    accelerator = core.engine(CPU)
    list(core.batches(np.zeros((10, 4), np.uint16), 2, 0, range(3), accelerator, workers=1))
    assert torch.equal(state, torch.get_rng_state())  # loading data draws nothing from dropout's stream


def test_batches_are_the_rows_of_their_indices():
    rows = np.arange(40, dtype=np.uint16).reshape(10, 4)
    for workers in (0, 1):
        got = list(core.batches(rows, 3, 5, range(2, 6), core.engine(CPU), workers))
        for step, batch in zip(range(2, 6), got, strict=True):
            assert batch.tolist() == rows[core.batch_indices(10, 3, 5, step)].tolist()


class Probe(nn.Module):
    """A model that draws random numbers in its forward pass, and counts the tokens that it saw."""

    def __init__(self):
        super().__init__()
        self.table, self.seen = nn.Embedding(11, 4), []

    def forward(self, ids):
        self.seen.append(tuple(ids.shape))
        return F.dropout(self.table(ids), 0.5).square().mean()


def test_time_estimate_is_finite_and_leaves_no_trace():
    accelerator, model = accelerate.Accelerator(cpu=True), Probe()
    model.table.weight.grad = kept = torch.ones(11, 4)
    before = torch.get_rng_state()
    found = core.time_estimate(model, lambda device: model, lambda m, ids: m(ids), 11, 3, 8, 5, accelerator)
    assert 0 < found["seconds"] < math.inf and found["passes"] == 5 and "3 of 3" in found["found_by"]
    assert set(model.seen) == {(3, 8)} and torch.equal(torch.get_rng_state(), before)
    assert model.table.weight.grad is kept and torch.equal(kept, torch.ones(11, 4))
    with torch.device("meta"):
        large = nn.Linear(2**20, 2**20)
    found = core.time_estimate(large, None, None, 11, 3, 512, 5, accelerator)  # nothing is built
    assert 0 < found["seconds"] < math.inf and "arithmetic" in found["found_by"]


def test_in_words():
    said = [core.in_words(s) for s in (3, 89, 90, 3599, 3600, 7300, 86400, 200000)]
    assert said == ["3 s", "89 s", "2 min", "60 min", "1.0 h", "2.0 h", "24.0 h", "2.3 days"]


def test_progress_without_a_terminal_is_plain_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(core._Lines, "every", 0.0)
    with core.Run(core.RunArgs(), str(tmp_path / "r"), accelerate.Accelerator(cpu=True), "x.json", ()) as run:
        bar = run.progress(4, 1, "first")
        bar.update(1)
        bar.refresh()
        run.say("a line")
        second = run.progress(2, 0, "second")
        second.update(2)
        second.refresh()
    shown = capsys.readouterr()
    lines = [line.split(", ") for line in shown.err.splitlines()]
    assert {"first: 2/4 (50 %)", "second: 2/2 (100 %)"} <= {line[0] for line in lines}
    assert all(line[1].endswith(" left") for line in lines)
    assert shown.out == "a line\n" and "\r" not in shown.err


def test_a_card_stands_beside_a_model_and_replaces_no_other_page(tmp_path):
    with core.Run(core.RunArgs(), str(tmp_path), accelerate.Accelerator(cpu=True), "x.json", ()) as run:
        result = run.finish({"data": {"source": "generated"}, "f1": 0.25})
        card = ("Title", "tiny", {"F1": result["f1"], "absent": None, "steps": 7}, "python x.py --load", "Little.")
        core.model_card(run, result, *card)
        text = (tmp_path / "README.md").read_text()
        for word in (
            'base_model: "tiny"',
            "# Title",
            "| F1 | 0.25 |",
            "| steps | 7 |",
            "python x.py --load",
            "Little.",
            "data: generated",
            "x.json",
        ):
            assert word in text
        assert "absent" not in text
        (tmp_path / "README.md").write_text("a person's page")
        core.model_card(run, result, *card)
        assert (tmp_path / "README.md").read_text() == "a person's page"


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
    config.write_text("just words")
    with pytest.raises(core.Failure, match="flag: value"):
        core.parse_args(Args, {}, ["--config", str(config)])


# ------------------------------------------------------------------------------------------------------------ data
def test_text_is_split_by_file(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(f"file {i}\n")
    train, held_out = (core.split_text(str(tmp_path), s) for s in ("train", "validation"))
    assert held_out == ["file 0\n", "file 10\n"] and len(train) == 18
    one = tmp_path / "05.txt"
    one.write_text("".join(f"{i}\n" for i in range(100)))
    train, held_out = (core.split_text(str(one), s) for s in ("train", "validation"))
    assert train == [f"{i}\n" for i in range(90)] and held_out[0] == "90\n"


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


def test_encode_skips_blank_lines_and_adds_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(core, "CACHE", tmp_path)
    byte = core.load_tokenizer("byte")
    ids = core.encode(["ab\n", "  \n", "c"], byte)
    assert byte.decode(ids.tolist()) == "ab\nc" and ids.dtype == np.uint16
    assert core.encode(["ab\n", "  \n", "c"], byte).tolist() == ids.tolist()
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    core.encode(["ab\n", "d"], byte)
    assert len(list((tmp_path / "tokens").iterdir())) == 2  # other text, other key


def test_squad_files_and_what_is_wrong_with_them(tmp_path):
    qa = {"id": "q1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}
    article = {"title": "t", "paragraphs": [{"context": "Ada did.", "qas": [qa, {**qa, "answers": []}]}]}
    (tmp_path / "a.json").write_text(json.dumps({"data": [article]}))
    row = {"id": "q1", "title": "t", "context": "Ada did.", "question": "Who?", "answers": ["Ada"]}
    assert core.squad_rows(str(tmp_path / "a.json")) == [row]
    lines = [{"context": "c", "question": "q", "answers": ["x", "y"]}, {"context": "c", "question": "q"}]
    (tmp_path / "b.jsonl").write_text(json.dumps(lines[0]))
    assert core.squad_rows(str(tmp_path / "b.jsonl"))[0]["answers"] == ["x", "y"]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(core.Failure, match="record 1: KeyError 'answers'"):
        core.squad_rows(str(tmp_path / "b.jsonl"))
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


def test_backbones(tmp_path):
    model, tokenizer = core.load_backbone("tiny")
    assert torch.equal(model.lm_head.weight, core.load_backbone("tiny")[0].lm_head.weight)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    again, tok = core.load_backbone(str(tmp_path / "m"), torch.bfloat16)
    assert again.dtype == torch.bfloat16 and not again.training and len(tok) == len(tokenizer)
    begin = time.time()
    for name in ("no-such-org/no-such-model", str(tmp_path / "absent")):
        with pytest.raises(core.Failure, match=r"model .*: ") as failure:
            core.load_backbone(name)
        assert "\n" not in str(failure.value)
    assert time.time() - begin < 10


def test_an_unreachable_hub_fails_at_once_and_names_what_to_use(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    begin = time.time()
    assert core.hub_ready() is False and os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(core.Failure, match="--data local"):
        core.load_text("wikitext103", "train")
    assert time.time() - begin < 10


# ---------------------------------------------------------------------------------------------------------- the CLI
@pytest.mark.parametrize(
    "error, code, says",
    [
        (core.Failure("x: use y"), 2, "x: use y"),
        (core.Failure("nan", core.DIVERGED), 3, "nan"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "lower --width"),
        (MemoryError(), 2, "lower --width"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 4, "No space"),
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


def test_a_bug_is_not_hidden():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        core.cli(main)


def test_results_refuse_nan_and_are_atomic(tmp_path):
    path = tmp_path / "r.json"
    core.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        core.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


def test_wandb_offline_logs_and_its_failure_costs_nothing(tmp_path, monkeypatch, capsys):
    args = Args(device="cpu", wandb="offline")
    with core.Run(args, str(tmp_path / "a"), core.engine(args), "r.json", ()) as run:
        run.log(step=1, loss=2.0)
        run.finish({"x": 1})
    assert list((tmp_path / "a").rglob("*.wandb"))
    import wandb

    monkeypatch.setattr(wandb, "init", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no tracker today")))
    with core.Run(args, str(tmp_path / "b"), core.engine(args), "r.json", ()) as run:
        run.log(step=1, loss=2.0)
    assert "no tracker today" in capsys.readouterr().out and (tmp_path / "b" / "log.jsonl").exists()


def test_rows_of_a_run_without_a_checkpoint_are_dropped(tmp_path):
    args = Args(device="cpu")
    with core.Run(args, str(tmp_path), core.engine(args), "r.json", ()) as run:
        run.forget(arm="b")  # no log yet
        for arm in "aab":
            run.log(arm=arm, loss=2.0)
        run.forget(arm="c")
        assert run.log_size() == 3 * len('{"arm": "a", "loss": 2.0}\n')
        run.forget(arm="b")
        assert (tmp_path / "log.jsonl").read_text() == '{"arm": "a", "loss": 2.0}\n' * 2
        run.forget()
        assert run.log_size() == 0


def test_the_first_valid_checkpoint_is_taken(tmp_path):
    paths, said = [tmp_path / name for name in ("gone.pt", "cut.pt", "good.pt")], []
    for path in paths[1:]:
        core.save_checkpoint(path, {"step": len(path.name)})
    os.truncate(paths[1], 100)
    assert core.first_valid(paths, said.append) == {"step": 7}
    assert len(said) == 1 and "cut.pt" in said[0]
    assert core.first_valid(paths[:2], said.append) is None


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    model, tokenizer = core.load_backbone("tiny")
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(core.Failure, match="its tokenizer has 259 entries, its embedding 100"):
        core.load_backbone(str(tmp_path))


def test_weights_that_do_not_fit_are_one_line(monkeypatch, capsys):
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(SystemExit) as stop:
        core.cli(lambda: layer.load_state_dict({"weight": torch.zeros(3, 2), "more": torch.zeros(1)}))
    error = capsys.readouterr().err
    assert stop.value.code == core.BAD_INPUT and error.count("\n") == 1
    assert all(word in error for word in ("does not fit", "weight", "bias", "more"))
