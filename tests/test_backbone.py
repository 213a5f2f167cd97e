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

STAGES = ("copy", "gap", 2, 3, 4)  # of the default
CPU = torch.device("cpu")


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
    parts = {k: state[k] for k in ("model", "optimizer_state_dict", "history", "stage", "answers")}
    return parts | {k: state["loop"][k] for k in ("tokens", "skipped", "sums")}


def stop_at(monkeypatch, step, signum=signal.SIGTERM):
    """A signal while the update after `step` is made."""
    update = core.Loop.update

    def interrupted(loop, *args, **kwargs):
        if loop.step == step:
            signal.raise_signal(signum)
        return update(loop, *args, **kwargs)

    monkeypatch.setattr(core.Loop, "update", interrupted)


def test_a_stopped_run_goes_on_bit_for_bit(made, tmp_path, monkeypatch):
    kind, directory, whole = made
    step, signum = (13, signal.SIGTERM) if kind == "lm" else (29, signal.SIGINT)
    flags = ["--test", "--kind", kind, "--output_dir", str(tmp_path / "cut")]
    stop_at(monkeypatch, step, signum)
    with pytest.raises(core.Failure, match=f"interrupted at step {step + 1}") as failure:
        P.main(flags)
    assert failure.value.code == 128 + signum and not (tmp_path / "cut" / "backbone_results.json").exists()
    monkeypatch.undo()
    result = P.main([*flags, "--resume", "auto"])
    assert same_tensors(last_state(tmp_path / "cut"), last_state(directory))
    for name in ("log.jsonl", "model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (directory / name).read_bytes()
    assert result["history"] == whole["history"] and len(result["manifest"]["segments"]) == 2
    assert len(list((tmp_path / "cut").glob("*.pt"))) == 2  # one to go on from if the newest is damaged


def test_a_repeat_is_bitwise_equal_and_another_seed_differs(made, tmp_path):
    kind, directory, _ = made
    flags = ["--test", "--kind", kind]
    P.main([*flags, "--eval_interval", "23", "--output_dir", str(tmp_path / "again")])
    again, first = last_state(tmp_path / "again"), last_state(directory)
    assert same_tensors(again["model"], first["model"])  # evaluating at other times changes nothing
    assert again["history"]["train_loss"] == first["history"]["train_loss"]
    other = P.main([*flags, "--seed", "1", "--max_steps", "2", "--output_dir", str(tmp_path / "other")])
    assert other["history"]["train_loss"][0][1] != pytest.approx(first["history"]["train_loss"][0][1], abs=1e-6)


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
    now, update, save = [0.0], core.Loop.update, core.save_checkpoint

    def taking(seconds, call):
        def timed(*args, **kwargs):
            now[0] += seconds
            return call(*args, **kwargs)

        return timed

    monkeypatch.setattr(core, "clock", lambda: now[0])
    monkeypatch.setattr(core.Loop, "update", taking(1, update))
    monkeypatch.setattr(core, "save_checkpoint", taking(10, save))
    monkeypatch.setattr(P, "evaluate", taking(100, lambda *_: {"val_loss": 1.0, "val_ppl": 2.7}))
    for interval in ("2", "12"):
        flags = ["--test", "--kind", "lm", "--max_steps", "12", "--save_interval", "6", "--eval_interval", interval]
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
        longest = P.reader_batch(P.parse(flags), 4, 0)[0].shape[1]
        assert plan["tokens"] == 3 * 4 * longest > result["tokens"]


# ------------------------------------------------------------------------------------------------ training by hand
def nats(logits, ids, scored):
    """Cross-entropy of each scored token, one after the other."""
    places = [(b, t) for b in range(len(ids)) for t in range(1, ids.shape[1]) if scored[b, t]]
    return torch.stack([-logits[b, t - 1].log_softmax(-1)[ids[b, t]] for b, t in places])


@pytest.mark.parametrize("kind, stage", [("lm", "copy"), ("reader", "copy"), ("reader", 3)])
def test_four_updates_of_training_by_hand(kind, stage, tmp_path, monkeypatch):
    """AdamW (0.9, 0.98), decay 0.1 of the lm's matrices and none of the reader's, the gradient clipped to 1; from the
    stage of facts on the unscored words count a tenth, over the number of the scored ones."""
    monkeypatch.setattr(P, "stages_of", lambda facts: (stage,))
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
            ids, labels = P.reader_batch(args, stage, step)
            scored = labels != -100
        logits = model(ids).logits
        loss = nats(logits, ids, scored).mean()
        if stage == 3:
            others = ~scored & (ids != 0)
            loss = loss + 0.1 * nats(logits, ids, others).sum() / scored[:, 1:].sum()
        losses.append(loss.item())
        gradients = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
        with torch.no_grad():
            fall = 0.1 + 0.9 * (1 - step / 4) if kind == "lm" else min(1, (1 - step / 4) / 0.4)
            rate = 0.5 * (step + 1) / 50 * fall
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
    for stage in STAGES:
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
    scores = P.evaluate_lm(model, windows.numpy(), CPU)
    assert scores == pytest.approx({"val_loss": expected, "val_ppl": math.exp(expected)}, rel=1e-4)
    assert P.evaluate_lm(model, windows.repeat(9, 1).numpy(), CPU)["val_loss"] == pytest.approx(
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
        {"context": core.context_of(f), "question": core.question_of(("coat", "Ada")), "answers": [f["coat", "Ada"]]}
        for f in facts
    ]
    parrot, tokenizer = Parrot(), P.reader_tokenizer()
    scores = P.evaluate_reader(parrot, tokenizer, rows, CPU)
    assert scores["em"] == core.wilson(2, 3) and parrot.asked == [3, 3]
    assert scores["em_shuffled_words"]["mean"] < 1 and scores["em_shuffled_words"]["n"] == 3
    wordy = Parrot([P.IDS["stone"], P.IDS["wool"]])  # goes on after a right answer of two words
    assert P.evaluate_reader(wordy, tokenizer, rows, CPU)["em"]["mean"] == 0


def test_the_reader_goes_on_from_stage_to_stage_and_stops_when_it_answers(tmp_path, monkeypatch):
    """More than nine tenths of 25 updates' tokens decide; the run ends at the first evaluation that is good."""
    stages, loss_of = [], P.reader_loss

    def loss(total, hidden, head, ids, labels, stage):
        total = loss_of(total, hidden, head, ids, labels, stage)[0]
        stages.append(stage)
        share = 0.89 if len(stages) <= 25 else 0.91
        return total, torch.tensor(share * 1000), torch.tensor(1000.0)

    def evaluate(model, data, args, device):
        return {"em": core.wilson(99 if len(stages) >= 160 else 98, 100), "em_shuffled_words": core.wilson(0, 100)}

    monkeypatch.setattr(P, "reader_loss", loss)
    monkeypatch.setattr(P, "evaluate", evaluate)
    flags = ["--test", "--kind", "reader", "--max_steps", "400", "--batch_size", "1", "--output_dir", str(tmp_path)]
    result = P.main(flags)
    assert result["history"]["stages"] == [[50, 1], [75, 2], [100, 3], [125, 4]]
    assert result["steps"] == 160 and result["final"]["em"]["mean"] == 0.99
    assert stages == ["copy"] * 50 + ["gap"] * 25 + [2] * 25 + [3] * 25 + [4] * 35
    again = P.main([*flags, "--resume"])
    assert again["steps"] == 160


def test_questions_need_the_words_to_be_bound():
    rows = core.question_rows(300, 0, "x")
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


def test_contexts_are_drawn_once_and_never_from_those_held_out():
    rows = core.question_rows(20, 0, "train")
    held_out = frozenset(row["context"] for row in rows[:10])
    again = core.question_rows(20, 0, "train", held_out)
    assert len({row["context"] for row in again}) == 20 and not {row["context"] for row in again} & held_out
    assert [row["context"] for row in again[:10]] == [row["context"] for row in rows[10:]]


def test_held_out_contexts_are_new_and_the_files_are_squad(made):
    kind, directory, _ = made
    if kind == "lm":
        pytest.skip("the reader's data")
    train, validation = (core.squad_rows(str(directory / f"{name}.json")) for name in ("train", "validation"))
    assert len(train) == 4000 and len(validation) == 32
    probes = P.load_data(P.parse(["--test", "--kind", "reader"])).probes.values()
    held_out = {r["context"] for r in validation} | {row["context"] for rows in probes for row in rows}
    assert len(held_out) == 4 * 32 and not {r["context"] for r in train} & held_out
    article = json.loads((directory / "validation.json").read_text())["data"][0]
    for paragraph in article["paragraphs"]:
        for answer in paragraph["qas"][0]["answers"]:
            assert paragraph["context"][answer["answer_start"] :].startswith(answer["text"])


@pytest.mark.parametrize("stage", [*STAGES, 16, 32])
def test_batches_score_what_can_be_known(stage):
    args = P.parse(["--kind", "reader", "--batch_size", "6"])
    ids, labels = P.reader_batch(args, stage, 7, 0)
    again = P.reader_batch(args, stage, 7, 0)
    assert torch.equal(ids, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(ids[:, :20], P.reader_batch(args, stage, 8, 0)[0][:, :20])
    assert ids.shape == labels.shape and ((labels == -100) | (labels == ids)).all()
    tokenizer = P.reader_tokenizer()
    if stage in ("copy", "gap"):  # the first round's words in their order; across gaps its first is unknown
        for row, scored in zip(ids.tolist(), (labels != -100).tolist()):
            content = [i for i in row if i >= len(P.WORDS)]
            first = content[: len(content) // 2]
            known = first[1:] if stage == "gap" else first
            assert content == first * 2 and [i for i, s in zip(row, scored) if s] == known
    else:  # every scored run is an answer that stands in its context, closed by eos
        row, scored = ids[0].tolist(), (labels[0] != -100).tolist()
        text = tokenizer.decode(ids[0])
        said = [tokenizer.decode([row[i]]) for i in range(len(row)) if scored[i]]
        answers = " ".join(said).split("<eos>")[:-1]
        assert len(answers) == 8 and all(f"is {a.strip()} ." in text for a in answers)


# ---------------------------------------------------------------------------------------------------- another reader
def test_pieces_spell_every_word_and_are_the_same_each_time():
    tokenizer, again = P.reader_tokenizer("pieces"), P.reader_tokenizer("pieces")
    assert core.tokenizer_digest(tokenizer) == core.tokenizer_digest(again)  # the library's trainer differs each time
    pieces = P.spelling("pieces")
    sizes = Counter(map(len, pieces))
    assert pieces[:4] == [[0], [1], [2], [3]] and set(sizes) == {1, 2} and min(sizes.values()) > 30
    assert sum(map(len, pieces[4:])) <= 1.5 * len(pieces[4:]) and len(set(map(tuple, pieces))) == len(pieces)
    assert all(tokenizer.decode(ids) == word for ids, word in zip(pieces[4:], P.VOCABULARY[4:]))
    assert P.spelling("words") == [[i] for i in range(len(P.VOCABULARY))]
    assert len(tokenizer) != len(P.VOCABULARY)
    row = core.question_rows(1, 0, "x", facts=5)[0]
    spelled = [token for word in P.to_ids(P.prompt_of(row)) for token in pieces[word]]
    assert tokenizer(P.prompt_of(row))["input_ids"] == [1, *spelled]  # what is trained on is what is asked


@pytest.mark.parametrize("stage", ["copy", "gap", 3])
def test_a_batch_of_pieces_is_the_batch_of_words_spelled(stage):
    words, pieces = (
        P.reader_batch(P.parse(["--kind", "reader", "--batch_size", "4", "--reader_tokenizer", kind]), stage, 3)
        for kind in ("words", "pieces")
    )
    for ids, labels, spelled, marks in zip(*words, *pieces):
        n = int((ids != 0).sum())
        expected = [(t, s) for i, s in zip(ids[:n].tolist(), labels[:n].tolist()) for t in P.spelling("pieces")[i]]
        expected = [(t, t if s != -100 else -100) for t, s in expected]
        assert list(zip(spelled.tolist(), marks.tolist()))[: len(expected)] == expected


def test_a_reader_of_another_width_depth_and_tokenizer_answers_in_full(tmp_path):
    flags = ["--kind", "reader", "--reader_tokenizer", "pieces", "--width", "96", "--layers", "4", "--max_steps", "2"]
    result = P.main(["--test", *flags, "--output_dir", str(tmp_path)])
    model, tokenizer = core.load_backbone(str(tmp_path))
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (96, 4, 6)
    assert config.vocab_size == len(tokenizer) == result["data"]["vocab_size"] == len(P.reader_tokenizer("pieces"))
    row = core.question_rows(1, 0, "x")[0] | {"answers": ["black cotton"]}
    said = tokenizer("black cotton", add_special_tokens=False)["input_ids"]
    assert len(said) > 2

    class Knows(Parrot):
        def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
            return torch.cat([input_ids, torch.tensor([[*said, 2, 0, 0][:max_new_tokens]])], 1)

    assert P.matches(Knows(), tokenizer, [row], CPU) == [1.0]


# --------------------------------------------------------------------------------------------------- longer contexts
def parsed(context):
    """{(relation, entity): value} of a context, word by word."""
    facts, words = {}, context.split()
    while words:
        end = words.index(".")
        the, relation, of, entity, verb, *value = words[:end]
        assert (the, of, verb) == ("The", "of", "is") and (relation, entity) not in facts
        facts[relation, entity], words = " ".join(value), words[end + 1 :]
    return facts


def test_the_default_draws_what_it_always_drew():
    """Recorded before contexts could be longer: batches of every stage, rows and their file, of two seeds."""
    drawn = hashlib.sha256()
    for seed in (0, 1):
        args = P.parse(["--kind", "reader", "--seed", str(seed), "--batch_size", "3"])
        assert P.stages_of(args.facts) == STAGES
        for stage in STAGES:
            for step in (0, 5):
                batch = [part.tolist() for part in P.reader_batch(args, stage, step)]
                drawn.update(json.dumps(batch).encode())
        rows = core.question_rows(40, seed, "train")
        drawn.update(json.dumps([rows, P.squad_file(rows)]).encode())
    assert drawn.hexdigest() == "df58cbad6fbbe33777bfb94ed3d1ab3ff75e090b083b1e8b7c9e12a5a39837ea"


def test_the_curriculum_ends_at_the_facts_asked_for():
    assert P.stages_of(2) == ("copy", "gap", 2)
    assert P.stages_of(7) == ("copy", "gap", 2, 3, 4, 6, 7)
    assert P.stages_of(16) == ("copy", "gap", 2, 3, 4, 6, 8, 12, 16)
    assert P.stages_of(32) == ("copy", "gap", 2, 3, 4, 6, 8, 12, 16, 24, 32)


@pytest.mark.parametrize(
    "count, relations, people", [(2, 2, 2), (6, 2, 3), (16, 4, 4), (24, 4, 6), (32, 4, 8), (40, 4, 10)]
)
def test_facts_share_relations_and_entities_and_no_two_are_of_one_value(count, relations, people):
    rng, twice, kinds = random.Random(count), 0, [set(), set()]
    for _ in range(60):
        facts = core.draw_facts(rng.randrange, count)
        assert len(facts) == len(set(facts.values())) == count and P.facts_of(core.context_of(facts)) == facts
        for place, number, kind in ((0, relations, kinds[0]), (1, people, kinds[1])):
            shares = Counter(key[place] for key in facts)
            kind.update(shares)
            assert len(shares) <= number and (count < relations * people or set(shares.values()) == {count // number})
        first = Counter(value.split()[0] for value in facts.values())
        assert max(first.values()) <= (1 if count <= 24 else 2)
        twice += max(first.values()) == 2
    assert twice == (60 if count > 24 else 0)
    assert [sorted(kind) for kind in kinds] == [sorted(core.RELATIONS), sorted(core.ENTITIES)]


def test_fewer_facts_are_not_forgotten_in_later_stages():
    """Of four rows about one has any number of facts from two up; up to four facts all have as many as the stage."""
    counts = {16: Counter(), 4: Counter()}
    for stage, seen in counts.items():
        for i in range(600):
            ids = P.facts_row(random.Random(i), stage)[0]
            seen[ids[: ids.index(P.IDS["Question:"])].count(P.IDS["."])] += 1
    assert counts[4] == {4: 600} and set(counts[16]) == set(range(2, 17))
    assert 0.7 < counts[16].pop(16) / 600 < 0.83 and max(counts[16].values()) < 25


def test_a_context_is_asked_several_questions():
    rows = core.question_rows(20, 0, "x", facts=16, questions=3)
    assert len(rows) == 60 and len({row["id"] for row in rows}) == 60
    paragraphs = P.squad_file(rows)["data"][0]["paragraphs"]
    assert len(paragraphs) == len({row["context"] for row in rows}) == 20
    for i, paragraph in enumerate(paragraphs):
        facts, own = parsed(paragraph["context"]), rows[3 * i : 3 * i + 3]
        assert len(facts) == 16 and [row["context"] for row in own] == [paragraph["context"]] * 3
        assert len({row["question"] for row in own}) == 3
        for row, asked in zip(own, paragraph["qas"], strict=True):
            words = row["question"].split()
            assert row["answers"] == [facts[words[3], words[5]]]
            assert (asked["id"], asked["question"]) == (row["id"], row["question"])
            (answer,) = asked["answers"]
            assert answer["text"] == row["answers"][0]
            assert paragraph["context"][answer["answer_start"] :].startswith(f"{answer['text']} .")


def test_no_held_out_context_is_trained_on(tmp_path, monkeypatch):
    """A row whose context is held out is drawn again, and the loop hands all held-out contexts on."""
    plain = P.facts_row(random.Random(0), 4)[0]
    context = core.context_of(core.draw_facts(random.Random(0).randrange, 4))
    assert plain[2 : 2 + len(context.split())] == P.to_ids(context)
    again = P.facts_row(random.Random(0), 4, {context})[0]
    rng = random.Random(0)
    _, second = (core.context_of(core.draw_facts(rng.randrange, 4)) for _ in range(2))
    assert again[2 : 2 + len(second.split())] == P.to_ids(second) and second != context
    given, facts_row = [], P.facts_row

    def noted(rng, count, held_out):
        given.append((count, held_out))
        return facts_row(rng, count, held_out)

    monkeypatch.setattr(P, "facts_row", noted)
    monkeypatch.setattr(P, "stages_of", lambda facts: (facts,))
    flags = ["--test", "--kind", "reader", "--facts", "6", "--questions", "2", "--max_steps", "2"]
    result = P.main([*flags, "--output_dir", str(tmp_path)])
    data = P.load_data(P.parse(flags))
    assert given == [(6, data.held_out)] * 2 * 4
    sets = [data.validation, *(data.probes[f"em_{name}"] for name in ("2_facts", "4_facts", "6_facts"))]
    sets.append(data.probes["em_14_facts_untrained"])
    contexts = [{row["context"] for row in rows} for rows in sets]
    assert [len(c) for c in contexts] == [32] * 5 and data.held_out == set().union(*contexts)
    assert [len(parsed(min(c))) for c in contexts] == [6, 2, 4, 6, 14] and len(data.held_out) == 5 * 32
    assert set(result["probes"]) == set(data.probes) and len(data.probes) == 7
    assert all(score["n"] == 32 for score in result["probes"].values())
    assert result["final"]["em"]["n"] == 64 and result["final"]["em_by_context"]["n"] == 32
    for name, count in (("validation", 32), ("train", 4000)):
        (article,) = json.loads((tmp_path / f"{name}.json").read_text())["data"]
        assert len(article["paragraphs"]) == count and {len(p["qas"]) for p in article["paragraphs"]} == {2}
        assert name == "validation" or not {p["context"] for p in article["paragraphs"]} & data.held_out


class Lookup(Parrot):
    """Answers with the value that the context states of the relation and entity asked for; else says <unk>."""

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
        said = []
        for row in input_ids.tolist():
            words = [P.VOCABULARY[i] for i in row]
            asked = words.index("Question:")
            facts = parsed(" ".join(words[words.index("Context:") + 1 : asked]))
            answer = P.to_ids(facts.get((words[asked + 4], words[asked + 6]), "<unk>"))
            said.append([*answer, 2, 2, 2][:max_new_tokens])
        return torch.cat([input_ids, torch.tensor(said)], 1)


def test_what_changes_of_the_question_do_to_readers_that_are_known():
    args = P.parse(["--test", "--kind", "reader", "--facts", "6", "--eval_items", "200"])
    probes, tokenizer = P.load_data(args).probes, P.reader_tokenizer()
    rows, keys = probes["em_6_facts"], []
    for i, row in enumerate(rows):
        facts, words = parsed(row["context"]), row["question"].split()
        keys.append((words[3], words[5]))
        assert row["answers"] == [facts[keys[-1]]]
        swapped, other, absent = (
            probes[name][i] for name in ("em_context_swapped", "em_question_swapped", "entity_absent")
        )
        assert swapped == row | {"context": rows[(i + 1) % 200]["context"]} != row
        words = other["question"].split()
        assert (words[3], words[5]) in facts and other == row | {"question": other["question"]} != row
        words = absent["question"].split()
        assert words[3] == keys[-1][0] and words[5] in core.ENTITIES and words[5] not in row["context"].split()
        assert absent["context"] == row["context"] and set(absent["answers"]) == set(facts.values())
    assert len({row["question"].split()[5] for row in probes["entity_absent"]}) > 20  # any absent entity
    for reader in (Lookup(), Parrot()):
        hits = {name: sum(P.matches(reader, tokenizer, asked, CPU)) for name, asked in probes.items()}
        if type(reader) is Lookup:
            same = sum(
                parsed(rows[(i + 1) % 200]["context"]).get(keys[i]) == row["answers"][0] for i, row in enumerate(rows)
            )
            assert hits.pop("em_context_swapped") == same < 4
            assert hits.pop("em_question_swapped") == hits.pop("entity_absent") == 0
            assert list(hits) == ["em_2_facts", "em_4_facts", "em_6_facts", "em_14_facts_untrained"]
            assert set(hits.values()) == {200}
        else:  # it says the first word of the last value, whatever is asked
            last = [list(parsed(row["context"]).values())[-1] for row in rows]
            assert hits["entity_absent"] == sum(len(value.split()) == 1 for value in last) > 60
            assert (
                hits["em_6_facts"] == sum(value.split()[0] == row["answers"][0] for value, row in zip(last, rows)) > 0
            )


def test_a_score_of_several_questions_is_clustered_by_context():
    rows = core.question_rows(30, 0, "x", facts=6, questions=3)
    scores = P.evaluate_reader(Parrot(), P.reader_tokenizer(), rows, CPU, 3)
    said = [list(parsed(row["context"]).values())[-1].split()[0] for row in rows]  # it stops after one word
    right = [float(text == row["answers"][0]) for text, row in zip(said, rows)]
    means = [sum(right[i : i + 3]) / 3 for i in range(0, 90, 3)]
    assert scores["em"] == core.wilson(int(sum(right)), 90) and 0 < sum(right) < 30
    assert scores["em_by_context"] == core.bootstrap(means) and scores["em_by_context"]["n"] == 30
    assert "em_by_context" not in P.evaluate_reader(Parrot(), P.reader_tokenizer(), rows[::3], CPU)


@pytest.mark.parametrize("facts, seq_len", [(4, 128), (16, 128), (32, 256)])
def test_there_are_positions_for_the_longest_context(facts, seq_len):
    """Values of two words throughout; eight questions in training, one of eight facts more at the end."""
    args = P.parse(["--kind", "reader", "--facts", str(facts), "--seq_len", str(seq_len)])
    with torch.device("meta"):
        positions = P.build_model(args, 90).config.max_position_embeddings
    assert positions >= 2 + 8 * facts + 8 * (9 + 3) and positions >= 2 + 8 * (facts + 8) + 9 + 3
    longest = max(len(P.facts_row(random.Random(i), facts)[0]) for i in range(50))
    assert longest <= 2 + 8 * facts + 8 * (9 + 3)


@pytest.mark.slow
def test_the_reader_binds_words(tmp_path):
    """The default recipe answers at least 95 % of held-out questions, far above the shuffled-words control."""
    result = P.main(["--kind", "reader", "--threads", "1", "--seed", "3", "--output_dir", str(tmp_path / "reader")])
    assert result["final"]["em"]["mean"] >= 0.95
    assert result["final"]["em_shuffled_words"]["mean"] < 0.3


def test_bag_of_words_control_keeps_the_words_and_not_their_order():
    context = "The boat of Ada is red ."
    assert sorted(P.shuffle_words(context).split()) == sorted(context.split())
    contexts = [row["context"] for row in core.question_rows(20, 0, "x")]
    assert all(P.shuffle_words(c) != c and P.shuffle_words(c) == P.shuffle_words(c) for c in contexts)


def test_facts_are_drawn_evenly_and_in_any_order():
    rng, first, words = random.Random(0), Counter(), Counter()
    for _ in range(400):
        facts = core.draw_facts(rng.randrange, 3)
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
        (["--kind", "reader", "--facts", "32", "--seq_len", "255"], "--seq_len"),
        (["--kind", "reader", "--facts", "12", "--reader_tokenizer", "pieces"], "12 for each"),
        (["--kind", "reader", "--width", "50"], "multiple of 16"),
        (["--kind", "lm", "--layers", "2"], "--layers"),
        (["--kind", "reader", "--facts", "1"], "--facts"),
        (["--kind", "reader", "--facts", "33", "--seq_len", "512"], "--facts"),
        (["--kind", "reader", "--questions", "5"], "--questions"),
        (["--kind", "reader", "--eval_items", "1"], "--eval_items"),
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
