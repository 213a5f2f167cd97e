"""The offline stand-ins: ordinary Hugging Face directories, reproducible, and questions that need binding."""

import json
from collections import Counter

import pytest
import torch
from conftest import same_tensors

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
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_it_learns_and_says_how_well(made):
    kind, directory, result = made
    assert json.loads((directory / "backbone_results.json").read_text()) == json.loads(json.dumps(result))
    losses = [value for _, value in result["history"]["train_loss"]]
    share = 0.8 if kind == "lm" else 0.97  # 40 updates of the reader only begin to copy
    assert losses[-1] < share * losses[0] and result["causality_max_abs_diff"] == 0
    assert "val_ppl" in result["final"] if kind == "lm" else {"em", "em_shuffled_words"} == set(result["final"])


def test_resume_and_repeat_are_bitwise_equal(made, tmp_path):
    kind, directory, _ = made
    flags = ["--test", "--kind", kind, "--output_dir", str(tmp_path)]
    P.main([*flags, "--max_steps", "40"])
    whole = core.load_checkpoint(tmp_path / "backbone_step_40.pt")
    assert same_tensors(whole["model"], core.load_checkpoint(directory / "backbone_step_40.pt")["model"])

    class Cut(Exception):
        pass

    save, kept = core.save_checkpoint, []

    def cut(path, state):  # the run dies right after its first checkpoint
        save(path, state)
        kept.append(path)
        raise Cut

    core.save_checkpoint = cut
    try:
        with pytest.raises(Cut):
            P.main([*flags, "--overwrite"])
    finally:
        core.save_checkpoint = save
    assert kept[0].name == "backbone_step_20.pt"
    P.main([*flags, "--resume", "auto"])
    resumed = core.load_checkpoint(tmp_path / "backbone_step_40.pt")
    assert all(same_tensors(resumed[k], whole[k]) for k in ("model", "optimizer", "history", "losses", "stage"))


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


def test_bag_of_words_control_keeps_the_words():
    context = "The boat of Ada is red ."
    assert sorted(P.shuffle_words(context).split()) == sorted(context.split())


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
