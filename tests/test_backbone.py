"""The offline stand-ins: ordinary Hugging Face directories, reproducible, and questions that need binding."""

import hashlib
import json
import math
import random
import shutil
import signal
from collections import Counter

import pytest
import torch
from conftest import adamw_by_hand, same_tensors

import core
import pretrain_backbone as P


@pytest.fixture(scope="module", params=["lm", "reader"])
def made(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, directory, P.main(["--test", "--kind", request.param, "--output_dir", str(directory)])


def test_the_directory_loads_as_any_other(made):
    kind, directory, result = made
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]
    assert len(tokenizer) == model.config.vocab_size == result["data"]["vocab_size"]
    ours, _ = core.load_backbone(str(directory))
    ids = tokenizer("The house of Ada is", return_tensors="pt")["input_ids"]
    assert torch.equal(ours(ids).logits, model.eval()(ids).logits)
    assert model.config.num_key_value_heads < model.config.num_attention_heads or kind == "reader"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.max_position_embeddings == 2 * 128  # prompts may be longer than the windows
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_it_learns_and_says_how_well(made):
    kind, directory, result = made
    assert json.loads((directory / "backbone_results.json").read_text()) == json.loads(json.dumps(result))
    losses = [value for _, value in result["history"]["train_loss"]]
    share = 0.8 if kind == "lm" else 0.97  # 40 updates of the reader only begin to copy
    assert losses[-1] < share * losses[0] and result["causality_max_abs_diff"] == 0
    assert "val_ppl" in result["final"] if kind == "lm" else {"em", "em_shuffled_words"} == set(result["final"])


def contents(directory):
    """Every file below the directory by its hash; the lock aside."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name not in (".lock", ".holder")]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def last_state(directory, step=40):
    """What must be equal of two runs; times aside."""
    state = core.load_checkpoint(directory / f"backbone_step_{step}.pt")
    parts = {k: state[k] for k in ("model", "optimizer_state_dict", "history", "stage", "answers", "rng_state")}
    return parts | {k: state["loop"][k] for k in ("tokens", "skipped", "sums")}


def stop_at(monkeypatch, step, signum=signal.SIGTERM):
    """A signal while the update after `step` is made."""
    update = core.Loop.update

    def interrupted(loop, *args, **kwargs):
        if loop.step == step:
            signal.raise_signal(signum)
        return update(loop, *args, **kwargs)

    monkeypatch.setattr(core.Loop, "update", interrupted)


@pytest.mark.parametrize("step, signum", [(13, signal.SIGTERM), (29, signal.SIGINT)])
def test_a_stopped_run_goes_on_bit_for_bit(made, step, signum, tmp_path, monkeypatch):
    kind, directory, whole = made
    flags = ["--test", "--kind", kind, "--output_dir", str(tmp_path / "cut")]
    stop_at(monkeypatch, step, signum)
    with pytest.raises(core.Failure, match=f"interrupted at step {step + 1}") as failure:
        P.main(flags)
    assert failure.value.code == 128 + signum and not (tmp_path / "cut" / "backbone_results.json").exists()
    monkeypatch.undo()
    result = P.main([*flags, "--resume", "auto"])
    assert same_tensors(last_state(tmp_path / "cut"), last_state(directory))
    assert [(tmp_path / "cut" / n).read_bytes() for n in ("log.jsonl", "model.safetensors")] == [
        (directory / n).read_bytes() for n in ("log.jsonl", "model.safetensors")
    ]
    assert result["history"] == whole["history"] and len(result["manifest"]["segments"]) == 2
    assert sorted(p.name for p in (tmp_path / "cut").glob("*.pt")) == [
        "backbone_step_20.pt",
        "backbone_step_40.pt",
    ] or (step == 29 and (tmp_path / "cut" / "backbone_step_30.pt").exists())


def test_a_repeat_is_bitwise_equal_and_another_seed_differs(made, tmp_path):
    kind, directory, _ = made
    flags = ["--test", "--kind", kind]
    P.main([*flags, "--eval_interval", "7", "--log_interval", "10", "--output_dir", str(tmp_path / "again")])
    again, first = last_state(tmp_path / "again"), last_state(directory)
    assert same_tensors(again["model"], first["model"])  # evaluating at other times changes nothing
    assert again["history"]["train_loss"] == first["history"]["train_loss"]
    P.main([*flags, "--seed", "1", "--max_steps", "10", "--output_dir", str(tmp_path / "other")])
    assert last_state(tmp_path / "other", 10)["history"]["train_loss"][0] != first["history"]["train_loss"][0]


def test_a_finished_run_returns_its_result_and_changes_nothing(made, capsys):
    kind, directory, result = made
    flags, before = ["--test", "--kind", kind, "--resume", "--output_dir", str(directory)], contents(directory)
    assert P.main([*flags, "--log_interval", "3"]) == json.loads(json.dumps(result)) and contents(directory) == before
    assert "finished already" in capsys.readouterr().out
    for more, named in (("--lr 1", "lr"), ("--seed 4", "seed"), ("--max_steps 30", "max_steps 40 -> 30")):
        with pytest.raises(core.Failure, match=named) as failure:
            P.main([*flags, *more.split()])
        assert failure.value.code == 2 and contents(directory) == before


def test_a_finished_run_asked_for_more_goes_on(made, tmp_path):
    kind, directory, result = made
    shutil.copytree(directory, tmp_path / "r")
    longer = P.main(["--test", "--kind", kind, "--max_steps", "50", "--resume", "--output_dir", str(tmp_path / "r")])
    assert longer["steps"] == 50 and longer["tokens"] > result["tokens"]
    curves = [r["history"]["train_loss"] for r in (longer, result)]
    assert curves[0][:-1] == curves[1] and curves[0][-1][0] == 50
    assert [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]


def test_a_refused_run_leaves_the_old_model_alone(made, tmp_path):
    """Whatever is wrong is found before anything is removed or written."""
    kind, directory, _ = made
    shutil.copytree(directory, tmp_path / "r")
    before = contents(tmp_path / "r")
    where = ["--test", "--output_dir", str(tmp_path / "r")]
    for more, why in (
        ("--overwrite --kind lm --data text --data_path /no/such", "/no/such"),
        ("--overwrite --kind lm --tokenizer /no/such", "/no/such"),
        ("--overwrite --kind lm --data wikitext2", "--data local"),
        ("--overwrite --kind lm --seq_len 1000000", "one window needs"),
        (f"--kind {kind} --resume {tmp_path}/none.pt --max_steps 90", "none.pt"),
        (f"--kind {kind} --resume auto --lr 1", "lr"),
    ):
        with pytest.raises(core.Failure, match=why) as failure:
            P.main([*where, *more.split()])
        assert failure.value.code == 2 and contents(tmp_path / "r") == before, more


def test_changed_text_is_refused_on_resume(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g\n" * 800)
    flags = ["--test", "--kind", "lm", "--max_steps", "8", "--data", "text", "--data_path", str(text)]
    stop_at(monkeypatch, 3)
    with pytest.raises(core.Failure, match="interrupted"):
        P.main([*flags, "--output_dir", str(tmp_path / "r")])
    monkeypatch.undo()
    before = contents(tmp_path / "r")
    text.write_text("a b c d e f h\n" * 800)
    with pytest.raises(core.Failure, match="data changed, not what the run began with") as failure:
        P.main([*flags, "--resume", "--output_dir", str(tmp_path / "r")])
    assert failure.value.code == 2 and contents(tmp_path / "r") == before
    text.write_text("a b c d e f g\n" * 800)
    assert P.main([*flags, "--resume", "--output_dir", str(tmp_path / "r")])["steps"] == 8


def test_the_clock_counts_training_alone(tmp_path, monkeypatch):
    """A clock that moves 1 s in each update, 100 s in each evaluation, 10 s in each save."""
    now, update, save, evaluate = [0.0], core.Loop.update, core.save_checkpoint, P.evaluate

    def taking(seconds, call):
        def timed(*args, **kwargs):
            now[0] += seconds
            return call(*args, **kwargs)

        return timed

    monkeypatch.setattr(core, "clock", lambda: now[0])
    monkeypatch.setattr(core.Loop, "update", taking(1, update))
    monkeypatch.setattr(core, "save_checkpoint", taking(10, save))
    monkeypatch.setattr(P, "evaluate", taking(100, evaluate))
    for interval in ("2", "12"):
        flags = ["--test", "--kind", "lm", "--max_steps", "12", "--save_interval", "3", "--eval_interval", interval]
        result = P.main([*flags, "--output_dir", str(tmp_path / interval)])
        assert result["train_seconds"] == 12 and result["tokens_per_s"] == result["tokens"] / 12
        assert result["tokens"] == 12 * 4 * 128


def test_the_record_of_the_run_stands_beside_the_models_own_config(made):
    kind, directory, result = made
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["flags"]["kind"] == kind and set(manifest["inputs"]) == {"data", "tokenizer"}
    assert not (directory / "run_config.json").exists() and not (directory / "env.json").exists()
    card = (directory / "README.md").read_text()
    assert f"| steps | {result['steps']} |" in card and result["environment"]["commit"] in card


@pytest.mark.parametrize("kind", ["lm", "reader"])
def test_the_plan_is_of_that_very_configuration(kind, tmp_path, capsys):
    flags = ["--test", "--kind", kind, "--max_steps", "3", "--output_dir", str(tmp_path / "r")]
    plan = P.main([*flags, "--dry_run"])
    assert plan == json.loads(capsys.readouterr().out) and not (tmp_path / "r").exists()
    result = P.main(flags)
    assert plan["parameters"] == result["parameters"] and plan["memory_gb"]["total"] > 0
    if kind == "lm":
        assert plan["tokens"] == result["tokens"] == 3 * 4 * 128
    else:  # of the last stage; the first has shorter rows
        longest = P.reader_batch(P.parse(flags), len(P.STAGES) - 1, 0)[0].shape[1]
        assert plan["tokens"] == 3 * 4 * longest > result["tokens"]


# ------------------------------------------------------------------------------------------------ training by hand
def nats(logits, ids, scored):
    """Cross-entropy of each scored token, one after the other."""
    places = [(b, t) for b in range(len(ids)) for t in range(1, ids.shape[1]) if scored[b, t]]
    return torch.stack([-logits[b, t - 1].log_softmax(-1)[ids[b, t]] for b, t in places])


@pytest.mark.parametrize("kind, stage", [("lm", 0), ("reader", 0), ("reader", 3)])
def test_four_updates_of_training_by_hand(kind, stage, tmp_path, monkeypatch):
    """AdamW (0.9, 0.98), decay 0.1 of the lm's matrices and none of the reader's, the gradient clipped to 1; from the
    stage of facts on the unscored words count a tenth, over the number of the scored ones."""
    monkeypatch.setattr(P, "STAGES", P.STAGES[stage : stage + 1])
    flags = ["--test", "--kind", kind, "--max_steps", "4", "--batch_size", "3", "--lr", "0.5"]
    args = P.parse([*flags, "--output_dir", str(tmp_path)])
    result = P.main([*flags, "--output_dir", str(tmp_path)])
    data, state, losses = P.load_data(args), {}, []
    model = P.build_model(args, len(data.tokenizer))
    params = dict(model.named_parameters())
    for step in range(4):
        if kind == "lm":
            ids = torch.from_numpy(data.train[core.batch_indices(len(data.train), 3, 0, step)].astype("int64"))
            scored = torch.ones_like(ids, dtype=torch.bool)
        else:
            ids, labels = P.reader_batch(args, 0, step)
            scored = labels != -100
        logits = model(ids).logits
        loss = nats(logits, ids, scored).mean()
        if stage == 3:
            others = ~scored & (ids != 0)
            loss = loss + 0.1 * nats(logits, ids, others).sum() / scored[:, 1:].sum()
        losses.append(loss.item())
        gradients = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
        with torch.no_grad():
            rate = (
                0.5 * (step + 1) / 50 * (0.1 + 0.9 * (1 - step / 4) if kind == "lm" else min(1, (1 - step / 4) / 0.4))
            )
            adamw_by_hand(params, gradients, state, rate, (0.9, 0.98), 0.1 if kind == "lm" else 0.0, clip=1.0)
    trained = core.load_checkpoint(tmp_path / "backbone_step_4.pt")["model"]
    for name, p in params.items():
        difference = (p - trained[name]).abs().flatten()
        assert difference.quantile(0.99) < 1e-4, (name, difference.max())
    assert result["history"]["train_loss"] == [[4, pytest.approx(sum(losses) / 4, rel=1e-4)]]


def test_the_learning_rates():
    lm, reader = (P.parse(["--kind", kind, "--max_steps", "1000", "--lr", "1"]) for kind in ("lm", "reader"))
    for args in (lm, reader):
        assert [P.learning_rate(args, step) for step in (0, 24)] == pytest.approx([0.02, 0.5], rel=0.05)
    assert [P.learning_rate(lm, step) for step in (100, 500, 1000)] == pytest.approx([0.91, 0.55, 0.1])
    assert [P.learning_rate(reader, step) for step in (50, 600, 800, 900)] == pytest.approx([1, 1, 0.5, 0.25])


def test_a_reader_batch_is_cut_by_rank():
    args = P.parse(["--kind", "reader", "--batch_size", "4"])
    both = P.parse(["--kind", "reader", "--batch_size", "8"])
    for stage in range(len(P.STAGES)):
        whole = P.reader_batch(both, stage, 3)
        for rank in (0, 1):
            for part, full in zip(P.reader_batch(args, stage, 3, rank, 2), whole):
                rows = full[4 * rank : 4 * rank + 4]
                assert torch.equal(part, rows[:, : part.shape[1]]) and ((rows[:, part.shape[1] :] <= 0).all())
    assert not torch.equal(*(P.reader_batch(P.parse(["--kind", "reader", "--seed", s]), 4, 0)[0][:, :40] for s in "12"))


def test_the_loss_of_a_validation_is_weighted_by_tokens():
    args = P.parse(["--test", "--kind", "lm"])
    model = P.build_model(args, 259).eval()
    windows = torch.randint(3, 259, (11, 128), generator=torch.Generator().manual_seed(0))
    expected = nats(model(windows).logits, windows, torch.ones_like(windows)).mean().item()
    scores = P.evaluate_lm(model, windows.numpy(), torch.device("cpu"))
    assert scores == pytest.approx({"val_loss": expected, "val_ppl": math.exp(expected)}, rel=1e-4)
    assert P.evaluate_lm(model, windows.repeat(9, 1).numpy(), torch.device("cpu"))["val_loss"] == pytest.approx(
        nats(model(w := windows.repeat(9, 1)[:64]).logits, w, torch.ones_like(w)).mean().item(), rel=1e-4
    )


class Parrot:
    """Answers every question with the word after the last "is" of its context, and then `more`."""

    def __init__(self, more=()):
        self.more, self.asked = more, []

    def eval(self):
        return self

    train = eval

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
        assert not do_sample and (input_ids[:, -1] == P.IDS["Answer:"]).all()  # padding is on the left
        self.asked.append(len(input_ids))
        said = []
        for row in input_ids.tolist():
            last = len(row) - 1 - row[::-1].index(P.IDS["is"], row[::-1].index(P.IDS["Question:"]))
            said.append([row[last + 1], *self.more, 2, 2, 2][:max_new_tokens])
        return torch.cat([input_ids, torch.tensor(said)], 1)


def test_an_answer_is_right_if_it_is_the_whole_answer_and_nothing_more():
    facts = [{("house", "Ada"): "red", ("coat", "Ada"): value} for value in ("blue", "blue stone", "green")]
    rows = [
        {"context": P.context_of(f), "question": P.question_of(("coat", "Ada")), "answers": [f["coat", "Ada"]]}
        for f in facts
    ]
    parrot, tokenizer = Parrot(), P.reader_tokenizer()
    scores = P.evaluate_reader(parrot, tokenizer, rows, torch.device("cpu"))
    assert scores["em"] == core.wilson(2, 3) and parrot.asked == [3, 3]
    assert scores["em_shuffled_words"]["mean"] < 1 and scores["em_shuffled_words"]["n"] == 3
    wordy = Parrot([P.IDS["stone"], P.IDS["wool"]])  # goes on after a right answer of two words
    assert P.evaluate_reader(wordy, tokenizer, rows, torch.device("cpu"))["em"]["mean"] == 0


def test_the_reader_goes_on_from_stage_to_stage_and_stops_when_it_answers(tmp_path, monkeypatch):
    """What decides is more than nine tenths of 25 updates' tokens; the run ends at the first evaluation that is good."""
    answers = iter([0.89, 0.91, 0.91, 0.91, 0.91, 0.91, 0.91])
    shares, loss_of = {}, P.reader_loss

    def loss(total, hidden, head, ids, labels, stage):
        total, right, count = loss_of(total, hidden, head, ids, labels, stage)
        step = len(shares)
        shares[step] = stage
        if step % 25 == 0:
            loss.share = next(answers)
        return total, torch.tensor(loss.share * 1000), torch.tensor(1000.0)

    def evaluate(model, data, args, device):
        em = 0.99 if len(shares) >= 160 else 0.98
        return {"em": core.wilson(round(em * 100), 100), "em_shuffled_words": core.wilson(0, 100)}

    monkeypatch.setattr(P, "reader_loss", loss)
    monkeypatch.setattr(P, "evaluate", evaluate)
    flags = ["--test", "--kind", "reader", "--max_steps", "400", "--batch_size", "1", "--output_dir", str(tmp_path)]
    result = P.main(flags)
    assert result["history"]["stages"] == [[50, 1], [75, 2], [100, 3], [125, 4]]
    assert result["steps"] == 160 and result["final"]["em"]["mean"] == 0.99
    assert {step: stage for step, stage in shares.items() if step in (49, 50, 74, 75, 159)} == {
        49: 0,
        50: 1,
        74: 1,
        75: 2,
        159: 4,
    }
    again = P.main([*flags, "--resume"])
    assert again["steps"] == 160


def test_questions_need_the_words_to_be_bound():
    rows = P.reader_rows(300, 0, "x")
    for row in rows:
        facts = [line.split() for line in row["context"].removesuffix(" .").split(" . ")]
        assert len(facts) == 4 and all(f[0] == "The" and f[2] == "of" and f[4] == "is" for f in facts)
        relations, entities = Counter(f[1] for f in facts), Counter(f[3] for f in facts)
        assert set(relations.values()) == set(entities.values()) == {2}  # neither alone points at the answer
        values = [" ".join(f[5:]) for f in facts]
        assert len(set(values)) == 4 and all(1 <= len(v.split()) <= 2 for v in values)
        asked = row["question"].split()
        (answer,) = (v for f, v in zip(facts, values) if (f[1], f[3]) == (asked[3], asked[5]))
        assert row["answers"] == [answer]
    assert len({row["context"] for row in rows}) == 300


def test_held_out_contexts_are_new_and_the_files_are_squad(made):
    kind, directory, _ = made
    if kind == "lm":
        pytest.skip("the reader's data")
    train, validation = (core.squad_rows(str(directory / f"{name}.json")) for name in ("train", "validation"))
    assert len(train) == 4000 and len(validation) == 32
    assert not {r["context"] for r in train} & {r["context"] for r in validation}
    article = json.loads((directory / "validation.json").read_text())["data"][0]
    for paragraph in article["paragraphs"]:
        for answer in paragraph["qas"][0]["answers"]:
            assert paragraph["context"][answer["answer_start"] :].startswith(answer["text"])


@pytest.mark.parametrize("stage", range(len(P.STAGES)))
def test_batches_score_what_can_be_known(stage):
    args = P.parse(["--kind", "reader", "--batch_size", "6"])
    ids, labels = P.reader_batch(args, stage, 7, 0)
    again = P.reader_batch(args, stage, 7, 0)
    assert torch.equal(ids, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(ids[:, :20], P.reader_batch(args, stage, 8, 0)[0][:, :20])
    assert ids.shape == labels.shape and ((labels == -100) | (labels == ids)).all()
    tokenizer = P.reader_tokenizer()
    if P.STAGES[stage] in ("copy", "gap"):  # the first round's words in their order; across gaps its first is unknown
        for row, scored in zip(ids.tolist(), (labels != -100).tolist()):
            content = [i for i in row if i >= len(P.WORDS)]
            first = content[: len(content) // 2]
            known = first[1:] if P.STAGES[stage] == "gap" else first
            assert content == first * 2 and [i for i, s in zip(row, scored) if s] == known
    else:  # every scored run is an answer that stands in its context, closed by eos
        row, scored = ids[0].tolist(), (labels[0] != -100).tolist()
        text = tokenizer.decode(ids[0])
        said = [tokenizer.decode([row[i]]) for i in range(len(row)) if scored[i]]
        answers = " ".join(said).split("<eos>")[:-1]
        assert len(answers) == 8 and all(f"is {a.strip()} ." in text for a in answers)


@pytest.mark.slow
def test_the_reader_binds_words(tmp_path):
    """The default recipe answers at least 95 % of held-out questions, far above the shuffled-words control."""
    result = P.main(["--kind", "reader", "--threads", "1", "--seed", "3", "--output_dir", str(tmp_path / "reader")])
    assert result["final"]["em"]["mean"] >= 0.95
    assert result["final"]["em_shuffled_words"]["mean"] < 0.3


def test_bag_of_words_control_keeps_the_words_and_not_their_order():
    context = "The boat of Ada is red ."
    assert sorted(P.shuffle_words(context).split()) == sorted(context.split())
    contexts = [row["context"] for row in P.reader_rows(20, 0, "x")]
    assert all(P.shuffle_words(c) != c and P.shuffle_words(c) == P.shuffle_words(c) for c in contexts)


def test_facts_are_drawn_evenly_and_in_any_order():
    rng, first, words = random.Random(0), Counter(), Counter()
    for _ in range(400):
        facts = P.draw_facts(rng.randrange, 2, 2, 3)
        assert len(facts) == 3 and len({v.split()[0] for v in facts.values()}) == 3
        first[next(iter(facts))[0]] += 1
        words.update(len(value.split()) for value in facts.values())
    assert len(first) == 4 and min(first.values()) > 60  # each relation may come first
    assert 0.4 < words[1] / 1200 < 0.6


def test_weights_start_with_the_documented_spread():
    for kind, spread in (("lm", 0.02), ("reader", 0.08)):
        model = P.build_model(P.parse(["--kind", kind]), 500)
        assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--kind", "poet"], "--kind"),
        (["--kind", "lm", "--lr", "-1"], "--lr"),
        (["--kind", "reader", "--seq_len", "16"], "--seq_len"),
        (["--kind", "lm", "--data", "text", "--data_path", "/no/such"], "/no/such"),
    ],
)
def test_bad_input(flags, says, tmp_path):
    with pytest.raises(core.Failure) as failure:
        P.main(["--test", "--output_dir", str(tmp_path), *flags])
    assert failure.value.code == 2 and says in str(failure.value) and "\n" not in str(failure.value)


def test_sizes():
    def count(kind, size):
        args = P.parse(["--kind", kind, "--size", size])
        with torch.device("meta"):
            return sum(p.numel() for p in P.build_model(args, 16384 if size == "100m" else 2048).parameters())

    assert count("lm", "small") < 3e6 and count("reader", "small") < 1e6
    assert 80e6 < count("lm", "100m") < 120e6 and 25e6 < count("lm", "30m") < 40e6
