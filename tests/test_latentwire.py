"""LatentWire stage 1: spec section 8 (invariants D1-D24) and section 11 (checks 1-18).

What needs a model that answers is marked slow: it runs on the reader of pretrain_backbone.py, in backbones/reader
or trained once into the cache."""

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import re
import signal
import string
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, same_tensors
from transformers import LlamaConfig

import claims
import core
import latentwire_stage1 as L

POOLERS = (*L.POOLERS, *L.SENDERS)  # the document's, and ours
SQUAD = ROOT.parent / "shared" / "data" / "squad" / "train.json"


@pytest.fixture
def small(monkeypatch):
    """`small(*flags)`: everything a run has, at --test size on the untrained tiny model, dropout off. Its weights are
    enlarged, so that its logits depend on what it reads, and its tokenizer puts a BOS first, as the document's does."""
    from tokenizers import processors

    def build(*flags, mode="phase1b", eval_mode=True):
        args = L.parse(["--test", "--mode", mode, "--adapter_dropout", "0", "--samples", "12", *map(str, flags)])
        accelerator = core.engine(dataclasses.replace(args, precision="fp32"))
        base, tokenizer = L.load_base(args, accelerator)
        enlarge(base)
        start = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
        tokenizer.backend_tokenizer.post_processor = start
        data = L.load_data(args, tokenizer, base.get_input_embeddings().weight.shape[0])
        wire = L.make_wire(args, base, data)
        wire.train(not eval_mode)
        objective = L.PublishedObjective(wire, None, tokenizer) if args.legacy else L.Objective(wire)
        examples = data.train[-1] if data.train else [[item] for item in data.evaluation]
        reader = L.make_reader(args, tokenizer, accelerator, accelerator.device)
        return SimpleNamespace(
            args=args,
            base=base,
            tok=tokenizer,
            data=data,
            wire=wire,
            objective=objective,
            examples=examples,  # questions of one context each
            items=[example[0] for example in examples],  # of different contexts
            reader=reader,
            batch=lambda some, **kw: L.collate(some, args, tokenizer, accelerator.device, **kw),
        )

    return build


@pytest.fixture(scope="session")
def reader_dir():
    """A reader that answers: backbones/reader, else one trained into the cache (minutes)."""
    for path in (ROOT / "backbones" / "reader", core.CACHE / "reader"):
        if (path / "model.safetensors").exists():
            return str(path)
    import pretrain_backbone

    pretrain_backbone.main(["--kind", "reader", "--threads", "1", "--output_dir", str(core.CACHE / "reader")])
    return str(core.CACHE / "reader")


def enlarge(base):
    with torch.no_grad():
        for p in base.parameters():
            if p.ndim == 2:
                p.mul_(4)


def longer(item, n):
    """The item with `n` more context tokens."""
    extra = item.ids[item.start : item.start + n]
    return item._replace(
        ids=item.ids[: item.context] + extra + item.ids[item.context :], context=item.context + n, tail=item.tail + n
    )


def real(prefix, row=0):
    return prefix.embeds[row][prefix.mask[row].bool()], prefix.positions[row][prefix.mask[row].bool()]


# ------------------------------------------------------------------------------------- sizes (check 3, D16)
def test_parameter_counts_are_the_documented_ones():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        assert count(L.Adapter(1024, 4096, 4, 0.1, True)) == 50_374_657
        assert count(L.Adapter(512, 4096, 4, 0.1, False)) == 19_952_641
        assert count(L.Adapter(512, 4096, 4, 0.1, True)) == 19_960_833
        assert count(L.QueryPooler(1024, 75, True)) == 4_277_248
        assert count(L.QueryPooler(1024, 150, True)) == 4_354_048
        assert count(L.Hierarchy(1024, 75, True)) == 13_062_144
        assert count(L.Convolution(1024)) == 4_197_376
        projection = L.Projection(torch.zeros(4096), torch.zeros(4096, 1024), 1.0, [], 0.01, 0.01)
        new = 2 * (4096**2 + 4096) + 2 * 4096 + 2 * 4096 * 1024
        ask = 4096  # the embedding that asks for the context
        assert count(L.Segmenter(4096, projection, True, gist=False)) == new + 4096**2 + ask
        wider = 4096**2 + 2 * 4096 + 4096  # two states for each slot, and what tells a gist token from a word
        assert count(L.Segmenter(4096, projection, True, gist=True)) == new + 4096**2 + ask + wider
        assert count(L.Selector(4096)) == 2 * 4096 + 4096 + 1 + ask


@pytest.mark.parametrize(
    "which, r, layers, expected", [("qv", 8, [0, 1, 2, 3], 425_984), ("qkvo", 16, None, 13_631_488)]
)
def test_lora_sits_on_the_named_layers_alone(which, r, layers, expected):
    """D16. At 8B: the document's 20.97M and 41.9M are all seven modules of all layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=6 if layers else 32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config).requires_grad_(False)
        L.Lora().add(base, which, r, 2 * r, layers, 0.0, seed=0)
    trained = [n for n, p in base.named_parameters() if p.requires_grad]
    assert sum(base.get_parameter(n).numel() for n in trained) == expected
    assert all("lora_" in n for n in trained)
    found = {int(re.search(r"layers\.(\d+)\.", n)[1]) for n in trained}
    assert found == set(layers if layers else range(32))
    assert {re.search(r"(\w)_proj", n)[1] for n in trained} == set(which)


# --------------------------------------------------------------------------------------- compression (check 4, 5)
def test_pca_from_counts_equals_pca_of_the_embedded_prompts():
    """Check 4, D13: against numpy on every embedded vector; shares are of the trace."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(300, 24, generator=g) * torch.linspace(0.2, 2, 24) + 0.3
    ids = torch.randint(0, 250, (4000,), generator=g) ** 2 % 300
    found = L.fit_projection(table, torch.bincount(ids, minlength=300), 8, "pca", 0)
    x = table[ids].double().numpy()
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1][:, :8]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(8)])
    assert np.abs(found.matrix.numpy() - vectors).max() < 1e-5 and np.abs(found.mean.numpy() - x.mean(0)).max() < 1e-6
    assert found.captured == pytest.approx(values[:8].sum() / values.sum(), abs=1e-9) and found.captured < 0.99
    assert found.first == pytest.approx((values[:5] / values.sum()).tolist(), abs=1e-9)
    assert found.rms == pytest.approx(np.sqrt((x**2).mean(1)).mean(), rel=1e-6)
    n, mean, covariance = L.table_moments(table, torch.bincount(ids, minlength=300))
    assert n == 4000 and np.abs(mean.numpy() - x.mean(0)).max() < 1e-9
    assert np.abs(covariance.numpy() - np.cov(x.T, bias=True)).max() < 1e-9


def test_projection_bases_errors_and_full_rank():
    """D15: `random` is an orthonormal projection, not the first k dimensions; k = d reconstructs to 1e-4."""
    table, counts = torch.randn(99, 16), torch.ones(99)
    full = L.fit_projection(table, counts, 16, "pca", 0)
    z = (table - full.mean) @ full.matrix
    assert torch.allclose(z @ full.matrix.T + full.mean, table, atol=1e-4) and full.captured == pytest.approx(1)
    drawn = L.fit_projection(table, counts, 4, "random", 0).matrix
    assert torch.allclose(drawn.T @ drawn, torch.eye(4), atol=1e-5) and (drawn[4:].abs() > 1e-3).any()
    assert not torch.equal(drawn, L.fit_projection(table, counts, 4, "random", 1).matrix)
    assert torch.equal(L.fit_projection(table, counts, 4, "none", 0).matrix, torch.eye(16))
    with pytest.raises(core.Failure, match="width 16"):
        L.fit_projection(table, counts, 17, "pca", 0)
    with pytest.raises(core.Failure, match="rank 4"):
        L.fit_projection(table, (torch.arange(99) < 5).float(), 8, "pca", 0)


def test_linear_adapter_starts_at_the_ceiling(small):
    """Check 5: cosine at step 0 equals pca_ceiling_cos."""
    s = small("--adapter_type", "linear", mode="phase1a")
    found = L.evaluate(s.wire, s.items, s.reader)
    assert found["recon_cosine_sim"] == pytest.approx(L.ceiling_cosine(s.wire, s.items), abs=1e-5)
    assert found["norm_ratio"] == pytest.approx(1, abs=1e-4) and found["norm_flag"] == "OK"


def test_rms_match_has_a_gradient_at_zero_and_keeps_the_dtype(small):
    """D12, D1."""
    x = torch.zeros(2, 3, 8, requires_grad=True)
    (x * (0.5 / L.rms(x))).sum().backward()
    assert x.grad.isfinite().all()
    for flags in (["--dtype", "bf16"], ["--dtype", "fp32"]):
        s = small(*flags)
        prefix = s.wire.build_prefix(s.batch(s.items[:2]))
        assert prefix.embeds.dtype == s.base.dtype and prefix.code.dtype == torch.float32
        seen = s.wire.embed(s.batch(s.items[:2]).ids)[s.batch(s.items[:2]).mask.bool()].float()
        got = L.rms(prefix.code[s.batch(s.items[:2]).mask.bool()])
        assert torch.allclose(got, L.rms(seen), rtol=1e-3)
    vocab = small("--rms_match", "vocab")
    code = vocab.wire.build_prefix(vocab.batch(vocab.items[:2])).code
    assert torch.allclose(L.rms(code), torch.tensor(vocab.wire.projection.rms), rtol=1e-4)


def test_colour_starts_at_the_table_and_the_dead_scale_is_not_trained():
    table = torch.randn(50, 12) * 0.1 + 0.02
    adapter = L.Adapter(4, 12, 2, 0.0, True)
    adapter.reset(0, table)
    assert torch.allclose(adapter.gain, table.std(0)) and torch.allclose(adapter.offset, table.mean(0))
    assert not adapter.scale.requires_grad and L.Adapter(4, 12, 2, 0.0, False).scale.requires_grad
    adapter.reset(0, None)
    z = torch.randn(3, 4)
    before = adapter(z)
    adapter.scale.data.fill_(7.0)
    assert torch.allclose(adapter(z), before, atol=1e-4)  # standardised away


def slow_norm(x):
    """LayerNorm without gain and offset."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("colorize", [True, False])
def test_the_adapter_is_the_documented_function(colorize):
    """Section 3.3, term by term in float64, every parameter drawn at random."""
    adapter, g = L.Adapter(3, 5, 2, 0.5, colorize).double().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    z, w = torch.randn(7, 3, generator=g, dtype=torch.float64), adapter.state_dict()

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    n = slow_norm(z) * w["norm.weight"] + w["norm.bias"]
    y = linear("out", gelu(linear("mid", gelu(linear("inner", n))))) + linear("skip", n)
    y = y / (1 + torch.exp(-linear("film_scale", z))) + linear("film_shift", z)
    y = (slow_norm(y) * w["out_norm.weight"] + w["out_norm.bias"]) * w["scale"]
    if colorize:
        y = (y - y.mean(-1, keepdim=True)) / y.std(-1, keepdim=True) * w["gain"] + w["offset"]
    assert torch.allclose(adapter(z), y, atol=1e-12)


def test_slots_are_the_ceiling_of_the_ratio():
    """Section 2.2: M = ceil(S / ratio), of what goes through the wire; at most one slot a token; windows of four."""
    item = L.Item("1", "", [], list(range(14)), [2], 1, 8, 11, "", "")
    for flags, slots in (
        (["--pool_ratio", "3", "--question_scope", "compressed"], 4),
        (["--pool_ratio", "3"], 3),  # the question stays text
        (["--sequence_pooling_target", "6"], 6),
        (["--sequence_pooling_target", "75"], 7),
        (["--sequence_pooling_target", "75", "--question_scope", "compressed"], 10),
        (["--pooling_mode", "convolutional", "--question_scope", "compressed"], 2),
        (["--pooling_mode", "convolutional", "--pool_ratio", "2"], 1),  # its stride is its ratio
        (["--multi_ratio", "2,7"], 4),
    ):
        assert L.slot_count(item, L.parse(["--test", "--mode", "pooling", *flags])) == slots, flags
    args = L.parse(["--test", "--mode", "pooling", "--multi_ratio", "2,3,7"])
    assert [L.slot_count(item, args, ratio) for ratio in (2, 3, 7, 70)] == [4, 3, 1, 1]


# -------------------------------------------------------------------------- K-token losses (D6, check 6, check 14)
def slow_losses(s, item, K):
    """Token by token, without padding or batching: mean NLL of the first K gold tokens after the text prompt."""
    ids, total = list(item.ids), []
    for token in item.answer[:K]:
        logits = s.base(torch.tensor([ids])).logits[0, -1].float()
        total.append(-logits.log_softmax(-1)[token])
        ids.append(token)
    return torch.stack(total)


def test_identity_text_as_prefix_gives_no_kd_and_the_text_nll(small):
    """D6: with the true embeddings as prefix L_kd < 1e-5 and L_kce is the text NLL, whatever the padding and the
    other rows."""
    s = small("--k_tokens", 3, "--kd_chunk", 2)
    first, other = s.items[0], longer(s.items[1], 40)
    batch = s.batch([first, other])
    terms = s.objective.objectives(s.wire.text_prefix(batch), batch, 3, True)
    slow = [slow_losses(s, i, 3) for i in (first, other)]
    assert terms["kd"] < 1e-5
    assert terms["kce"].item() == pytest.approx(torch.cat(slow).mean().item(), abs=1e-5)
    alone = s.batch([first])
    assert s.objective.objectives(s.wire.text_prefix(alone), alone, 3, True)["kce"].item() == pytest.approx(
        slow[0].mean().item(), abs=1e-5
    )
    assert (
        s.objective.objectives(s.wire.build_prefix(batch), batch, 3, True)["kd"] > 1e-4
    )  # a code that is not the text


def test_distillation_is_the_divergence_from_the_model_on_text(small):
    """Section 4.3, in float64: tau^2 KL(teacher || student), the teacher read without any LoRA, mean over gold
    positions."""
    s = pooled(small, "lm_segment", "--kd_tau", 2)
    for layer in s.wire.lora.layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, 0, 0.3)
    items, tau, total, count = [s.items[0], longer(s.items[1], 9)], 2.0, 0.0, 0
    batch = s.batch(items)
    prefix = s.wire.build_prefix(batch)
    with s.wire.reading(), torch.no_grad():
        student = s.wire.answer_logits(prefix, batch.gold, batch.gold_mask)
        found = s.objective.distillation(student, batch, batch.gold, batch.gold_mask)
    for i, item in enumerate(items):
        ids = list(item.ids)
        for j, token in enumerate(item.answer):
            with s.wire.lora.switched(False), torch.no_grad():
                t = (s.base(torch.tensor([ids])).logits[0, -1].double() / tau).softmax(-1)
            q = (student[i, j].double() / tau).softmax(-1)
            total += tau * tau * float((t * (t.log() - q.log())).sum())
            count += 1
            ids.append(token)
    assert found.item() == pytest.approx(total / count, rel=1e-4) and found > 1e-3


def test_the_answer_shorter_than_k_is_masked(small):
    s = small()
    one, two = s.items[:2]
    short = [one._replace(answer=one.answer[-2:]), two._replace(answer=two.answer[:1] + [2])]
    batch = s.batch(short)
    six = s.objective.objectives(s.wire.text_prefix(batch), batch, 6, True)
    two = s.objective.objectives(s.wire.text_prefix(batch), batch, 2, True)
    assert six["kce"].item() == pytest.approx(two["kce"].item(), abs=1e-6)
    assert six["kd"].item() == pytest.approx(two["kd"].item(), abs=1e-6)


def test_the_end_token_is_supervised_even_where_it_is_the_pad_token(small):
    """D4: labels are masked by length, never by id."""
    s = small(mode="pooling")
    s.tok.pad_token = s.tok.eos_token
    batch = s.batch([s.items[0], s.items[1]._replace(answer=[5, 2])])
    assert batch.gold_mask.sum(1).tolist() == [len(s.items[0].answer), 2]
    logits = torch.zeros(2, batch.gold.shape[1], 259)
    logits[..., 2] = 3.0  # only the end token is likely
    better = logits.clone()
    better[1, 0, 5] = 9.0
    assert s.objective.answer_ce(better, batch.gold, batch.gold_mask) < s.objective.answer_ce(
        logits, batch.gold, batch.gold_mask
    )
    worse = logits.clone()
    worse[1, 1, 2] = -9.0  # the end token's own column
    assert s.objective.answer_ce(worse, batch.gold, batch.gold_mask) > s.objective.answer_ce(
        logits, batch.gold, batch.gold_mask
    )


@pytest.mark.parametrize("K", [1, 8])
def test_two_passes_per_step_whatever_k_and_no_logits_but_the_scored(small, monkeypatch, K):
    """Section 9: one student and one teacher pass; ORIG took 2K."""
    s, shapes = small("--k_tokens", K, "--kd_chunk", 99), []
    forward = type(s.base).forward

    def counted(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        shapes.append(tuple(out.logits.shape))
        return out

    monkeypatch.setattr(type(s.base), "forward", counted)
    batch = s.batch(s.items[:4])
    s.objective(batch, kce=0.1, kd=0.1)
    width = min(K, batch.gold.shape[1])
    assert shapes == [(4, width, 259)] * 2
    shapes.clear()
    without = small("--k_tokens", K, "--lambda_kd", 0)
    without.objective(without.batch(without.items[:4]), kce=0.1, kd=0.0)
    assert len(shapes) == 1  # no teacher at all


def test_step_work_is_linear_in_s_and_hardly_depends_on_k(small):
    """Section 9, counted, not timed: products of matrices in one update of phase1b. Attention's own, which grow with
    the square of S, are not among them."""
    from torch.utils.flop_counter import FlopCounterMode

    def work(K, copies):
        s = small("--k_tokens", K, "--kd_chunk", 8)
        items = [i._replace(ids=i.ids * copies, answer=(i.answer * 9)[:9]) for i in s.items[:8]]
        batch = s.batch(items)
        with FlopCounterMode(display=False) as counter:
            s.objective(batch, kce=0.1, kd=0.1)["loss"].backward()
        return counter.get_total_flops(), batch.ids.shape[1]

    (one, S), (eight, _), (twice, _) = work(1, 1), work(8, 1), work(1, 2)
    assert twice / one == pytest.approx(2, rel=0.01)
    assert 1 < eight / one < 1.2 * (S + 7) / S  # ORIG: 2K passes, so eight times as much


def test_total_loss_is_the_weighted_sum_and_weights_move_it(small):
    s = small()
    batch = s.batch(s.items[:3])
    t = s.objective(batch, kce=0.3, kd=0.2)
    assert t["loss"].item() == pytest.approx((t["recon"] + 0.3 * t["kce"] + 0.2 * t["kd"]).item(), rel=1e-6)
    assert s.objective(batch, kce=0.0, kd=0.0)["loss"].item() == pytest.approx(t["recon"].item(), rel=1e-6)


def test_ramp_at_the_documented_steps():
    """D7, check 6: 0.4 epochs of 1,250 steps are 500 steps."""
    args = L.parse(["--mode", "phase1b", "--anneal_gen_objectives", "--anneal_epochs", "0.4"])
    assert [L.ramp(args, s, 1250, 0.0) for s in (0, 250, 500, 501)] == [0.0, 0.5, 1.0, 1.0]
    delayed = dataclasses.replace(args, anneal_mode="delayed")
    assert [L.ramp(delayed, s, 1250, 0.0) for s in (0, 199, 200)] == [0.0, 0.0, 1.0]
    gated = dataclasses.replace(args, anneal_mode="cosine_gated")
    assert [L.ramp(gated, 9, 1250, c) for c in (0.7, 0.8)] == [0.0, 1.0]
    assert L.ramp(dataclasses.replace(args, anneal_gen_objectives=False), 0, 1250, 0.0) == 1.0


def test_learning_rate_schedule():
    args = L.parse(["--mode", "phase1a"])
    assert L.rate(args, 0, 100) == 1.0 and L.rate(args, 50, 100) == pytest.approx(0.5) and L.rate(args, 99, 100) < 1e-3
    ours = L.parse(["--mode", "pooling", "--pooling_mode", "lm_segment"])
    assert ours.epochs == 3 and ours.lambda_kd == 1.0
    assert L.rate(ours, 0, 1000) == pytest.approx(0.02) and L.rate(ours, 49, 1000) > 0.99


# ----------------------------------------------------------------------------- prefixes (D3, D9, D10, D11, check 6)
def pooled(small, mode, *flags):
    """The wire of a pooling mode as if it were trained: what is zero at the start is not zero any more."""
    s = small("--pooling_mode", mode, "--pool_ratio", 3, "--compress_method", "none", *flags, mode="pooling")
    g = torch.Generator().manual_seed(0)
    if mode in ("lm_segment", "gist"):
        torch.nn.init.normal_(s.wire.pooler.second.weight, 0, 0.2, generator=g)
    if mode == "gist":
        torch.nn.init.normal_(s.wire.pooler.gist, 0, 0.2, generator=g)
    if mode == "select":
        torch.nn.init.normal_(s.wire.pooler.score.weight, 0, 0.2, generator=g)
    return s


def move_lora(wire, spread=0.3):
    for layer in wire.lora.layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, 0, spread, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scope", ["compressed", "kept"])
@pytest.mark.parametrize("mode", POOLERS)
def test_prefix_does_not_depend_on_padding_or_neighbours(small, mode, scope):
    """D3, D11."""
    s = pooled(small, mode, "--question_scope", scope)
    item = s.items[0]
    alone = real(s.wire.build_prefix(s.batch([item])))
    beside = real(s.wire.build_prefix(s.batch([item, longer(s.items[1], 50)])))
    assert alone[0].shape == beside[0].shape and torch.allclose(alone[0], beside[0], atol=1e-5)
    assert torch.equal(alone[1], beside[1])
    n = L.slot_count(item, s.args)
    tail = len(item.ids) - item.stop(s.args)
    assert item.stop(s.args) == (item.context if scope == "kept" else item.tail)
    assert len(alone[0]) == 1 + n + tail
    assert torch.equal(alone[0][-tail:], s.wire.embed(torch.tensor(item.ids[-tail:])))
    assert torch.equal(alone[0][0], s.wire.embed(torch.tensor(item.ids[0])))
    slots = alone[0][1 : 1 + n]
    if mode == "select":  # words as they are
        words = s.wire.table[item.ids[1 : item.stop(s.args)]]
        assert (slots[:, None] == words).all(-1).any(1).all()
    else:
        assert torch.allclose(L.rms(slots), torch.tensor(s.wire.projection.rms), rtol=1e-3)  # D9: matched


@pytest.mark.parametrize("mode", POOLERS)
def test_order_matters_but_for_a_bag_of_words(small, mode):
    """D11: two swapped tokens change the slots; without positions an attention pooler cannot see it."""
    for positions in ("sinusoid", "none"):
        s = pooled(small, mode, "--pool_positions", positions)
        item = s.items[0]
        ids = list(item.ids)
        at, to = item.start + 1, item.start + 30
        assert ids[at] != ids[to]
        ids[at], ids[to] = ids[to], ids[at]
        codes = [s.wire.build_prefix(s.batch([i])).code for i in (item, item._replace(ids=ids))]
        blind = positions == "none" and mode not in ("convolutional", *L.SENDERS)
        assert torch.allclose(*codes, atol=1e-5) == blind, (mode, positions)


@pytest.mark.parametrize("mode", ["phase1b", *POOLERS])
def test_teacher_forced_first_logits_are_the_first_of_generation(small, mode):
    """D10: one build_prefix; also for several further steps, along the generated tokens. No prefix reads the answer."""
    s = small() if mode == "phase1b" else pooled(small, mode)
    batch = s.batch([s.items[0], longer(s.items[1], 17)])
    prefix = s.wire.build_prefix(batch)
    with s.wire.reading():
        ids, first = L.greedy_generate(s.base, prefix, 4, torch.tensor([-1]))
        logits = s.wire.answer_logits(prefix, ids, torch.ones_like(ids))
    assert torch.allclose(logits[:, 0], first, atol=1e-5)
    assert torch.equal(logits.argmax(-1), ids)  # the cached steps see what one parallel pass sees
    other = batch._replace(gold=(batch.gold + 7) % 259)
    assert torch.equal(s.wire.build_prefix(other).embeds, prefix.embeds)


def test_segments_by_hand_and_against_a_loop():
    A = L.segment_weights(torch.tensor([5, 3]), torch.tensor([2, 3]))
    assert torch.allclose(A[0], torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 0, 0.5, 0.5], [0, 0, 0, 0, 0]]))
    assert torch.equal(A[1], torch.eye(3, 5))
    n, m = torch.tensor([17, 40, 9]), torch.tensor([4, 13, 9])
    slow = torch.zeros(3, 13, 40)
    for b in range(3):
        of = [t * int(m[b]) // int(n[b]) for t in range(int(n[b]))]
        for t, j in enumerate(of):
            slow[b, j, t] = 1 / of.count(j)
    assert torch.allclose(L.segment_weights(n, m), slow)


@pytest.mark.parametrize("scope", ["compressed", "kept"])
@pytest.mark.parametrize("mode", ["lm_segment", "gist"])
def test_a_sender_starts_as_the_segment_mean_and_its_parts_act(small, mode, scope):
    """Section 3.6 and the wire's section 8: W2 = 0 and A = 1, so that the code departs from what the reader knows. Then
    the skip, the encoder and its LoRA move the output; --seg_encoder none sees no context."""
    args = ("--pooling_mode", mode, "--pool_ratio", 3, "--compress_method", "none", "--question_scope", scope)
    s = small(*args, mode="pooling")
    batch = s.batch(s.items[:2])
    start = s.wire.build_prefix(batch)
    assert torch.allclose(start.embeds, s.wire.segment_prefix(batch).embeds, atol=1e-6)
    item = s.items[0]  # by hand: means of the embeddings, matched in RMS, at the mean position of their tokens
    stop = item.stop(s.args)
    body = s.wire.embed(torch.tensor(item.ids[1:stop])).float()
    M = L.slot_count(item, s.args)
    groups = [[t for t in range(len(body)) if t * M // len(body) == j] for j in range(M)]
    mean = torch.stack([body[g].mean(0) for g in groups])
    mean = mean * (s.wire.projection.rms / L.rms(mean))
    embeds, positions = real(start)
    assert torch.allclose(embeds[1 : 1 + M], mean, atol=1e-5)
    assert positions.tolist() == [0, *[round(1 + sum(g) / len(g)) for g in groups], *range(stop, len(item.ids))]
    moved = pooled(small, mode, "--question_scope", scope)
    move_lora(moved.wire)
    with_lora = moved.wire.build_prefix(batch).code
    move_lora(moved.wire, 0.0)
    without = moved.wire.build_prefix(batch).code
    assert (with_lora - without).abs().max() > 1e-4 and (without - start.code).abs().max() > 1e-4
    with torch.no_grad():
        s.wire.pooler.skip.weight[0] += 1.0
    assert (s.wire.build_prefix(batch).code - start.code).abs().max() > 1e-4
    plain = pooled(small, mode, "--question_scope", scope, "--seg_encoder", "none")
    assert not plain.wire.lora.layers
    # a change beyond a segment reaches its slot through the model's states only (here: an earlier token)
    ids = list(item.ids)
    ids[1] = 65 if ids[1] != 65 else 66
    for world, reaches in ((plain, False), (moved, True)):
        codes = [world.wire.build_prefix(world.batch([i])).code[0, -1] for i in (item, item._replace(ids=ids))]
        assert bool((codes[0] - codes[1]).abs().max() > 1e-5) == reaches


def test_narrow_lm_segment_sends_exactly_k_values(small):
    s = small("--pooling_mode", "lm_segment", "--pool_ratio", 3, mode="pooling")
    assert s.wire.pooler.down.weight.shape == (16, 64)
    u = s.wire.build_prefix(s.batch(s.items[:1])).code[0]
    raw = s.wire.pooler.up.weight  # every slot lies in the mean plus the span of k columns, up to its rescaling
    basis = torch.cat([raw, s.wire.projection.mean[:, None]], 1)
    residual = u.T - basis @ torch.linalg.lstsq(basis, u.T).solution
    assert residual.abs().max() < 1e-4 * u.abs().max()
    cost = L.budget(s.items[:1], s.wire, s.args, [12])
    assert cost["wire_values"] == L.slot_count(s.items[0], s.args) * 16


def test_short_prompts_take_fewer_slots(small):
    """If S <= M the slots are clipped, not filled up: the ratio is the actual one."""
    s = small("--pooling_mode", "generation_loss", "--sequence_pooling_target", 9999, "--pool_ratio", 1, mode="pooling")
    item = s.items[0]
    assert L.slot_count(item, s.args) == item.context - item.start
    prefix = s.wire.build_prefix(s.batch([item]))
    assert int(prefix.mask.sum()) == len(item.ids)
    conv = dataclasses.replace(s.args, pooling_mode="convolutional")
    assert L.slot_count(item, conv) == (item.context - item.start) // 4


def test_hybrid_expansion_is_the_nearest_slot(small):
    s = pooled(small, "hybrid_expand")
    batch = s.batch([s.items[0], longer(s.items[1], 11)])
    code, terms = s.wire.build_prefix(batch).code, s.objective(batch)
    total, count = 0.0, 0
    for b in range(2):
        body = s.wire.embed(batch.ids[b][batch.mask[b].bool()][batch.start[b] : batch.stop[b]]).float()
        M, n = int(batch.slots[b]), len(body)
        total += sum(F.cosine_similarity(code[b, t * M // n], body[t], 0).item() for t in range(n))
        count += n
    assert float(terms["cos"]) == pytest.approx(total / count, abs=1e-5)


# ------------------------------------------------ a code made from the context alone (the wire's section 8, EVIDENCE 4)
def asked(item, ids):
    """The item with another question: `ids` between its context and the answer prefix."""
    return item._replace(ids=item.ids[: item.context] + list(ids) + item.ids[item.tail :], tail=item.context + len(ids))


@pytest.mark.parametrize("mode", POOLERS)
def test_no_slot_depends_on_the_question_a_neighbour_or_padding(small, mode):
    """With moved weights and LoRA on. In the document's form, where the question is coded too, the slots do."""
    s = pooled(small, mode)
    move_lora(s.wire)
    item, far = s.items[0], longer(s.items[1], 60)
    same_length, n = asked(item, [70] * (item.tail - item.context)), L.slot_count(item, s.args)
    codes = []
    for items in ([item], [same_length], [far, asked(item, item.ids[1:90])], [asked(item, [70, 71]), far, item]):
        batch = s.batch(items)
        code, where = s.wire.encode(batch.source())
        at = batch.of[[i.passage for i in items].index(item.passage)]
        codes.append((code[at, :n], None if where is None else where[at, :n]))
    for code, where in codes[1:]:
        assert torch.allclose(code, codes[0][0], atol=1e-5) and (where is None or torch.equal(where, codes[0][1]))
    assert (s.wire.encode(s.batch([far]).source())[0][0, :n] - codes[0][0]).abs().max() > 1e-3
    with_question = dataclasses.replace(s.args, question_scope="compressed")
    first, second = (L.collate([i], with_question, s.tok, "cpu").source() for i in (item, same_length))
    assert (s.wire.encode(first)[0] - s.wire.encode(second)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["generation_loss", *L.SENDERS])
def test_several_questions_on_one_code_are_read_as_one_by_one(small, mode, monkeypatch):
    """A context is coded once, however many questions are asked of it."""
    s, made, encode = pooled(small, mode), [], L.Wire.encode
    monkeypatch.setattr(L.Wire, "encode", lambda self, source: made.append(len(source.ids)) or encode(self, source))
    move_lora(s.wire)
    items = [*s.examples[0], *[longer(i, 20) for i in s.examples[1]]]
    assert len(items) == 6 and len({i.question for i in items[:3]}) == 3
    batch = s.batch(items)
    assert batch.of.tolist() == [0, 0, 0, 1, 1, 1] and batch.first.tolist() == [0, 3]
    source = batch.source()  # what the code is made from: BOS and context, padded at the right
    for c, item in enumerate((items[0], items[3])):
        assert source.ids[c][source.mask[c].bool()].tolist() == item.ids[: item.context]
        assert source.positions[c][: item.context].tolist() == list(range(item.context))
    prefix = s.wire.build_prefix(batch)
    assert made == [2] and len(prefix.code) == 2
    with s.wire.reading(), torch.no_grad():
        logits = s.wire.answer_logits(prefix, batch.gold, batch.gold_mask)
        for i, item in enumerate(items):
            one = s.batch([item])
            alone = s.wire.answer_logits(s.wire.build_prefix(one), one.gold, one.gold_mask)[0]
            assert torch.allclose(logits[i, : len(alone)], alone, atol=1e-4)
    assert s.batch([items[n] for n in (0, 3, 1, 4)]).of.tolist() == [0, 1, 0, 1]


def slow_states(s, item, appended=None, where=()):
    """(embeddings [L, d], last states [L + M, d]) of a context and of what is `appended` at the positions `where`:
    the frozen model with the sender's LoRA in float64, one context by itself."""
    base, stop = copy.deepcopy(s.base).double(), item.stop(s.args)
    x = base.get_input_embeddings()(torch.tensor(item.ids[:stop]))
    read = x if appended is None else torch.cat([x, appended(x)])
    positions = torch.tensor([[*range(stop), *where]])
    states = base.base_model(
        inputs_embeds=read[None], position_ids=positions, attention_mask=torch.ones_like(positions)
    )
    return x.detach(), states.last_hidden_state[0].detach()


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def slow_segments(s, item):
    """Tokens of each segment, counted from the first of the context, and the position of its slot."""
    n, M = item.stop(s.args) - 1, L.slot_count(item, s.args)
    groups = [[t for t in range(n) if t * M // n == j] for j in range(M)]
    return groups, [round(1 + sum(g) / len(g)) for g in groups]


@pytest.mark.parametrize("mode, narrow", [("lm_segment", False), ("gist", False), ("gist", True)])
def test_a_sender_is_the_function_of_the_specification(small, mode, narrow):
    """In float64 from the text of the specifications, every weight moved: a slot is A e + W2 GELU(W1 LN(c)), e the mean
    embedding of its segment and c the mean of the model's states; in gist also the state of a token that is appended to
    the whole context at the segment's position, with the embedding e plus a learned vector. Then k values and back, and
    the scale of a prompt token."""
    s = pooled(small, mode, *(["--compress_method", "pca"] if narrow else []))
    move_lora(s.wire)
    with torch.no_grad():
        for i, p in enumerate(s.wire.pooler.parameters()):
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    item, w = s.items[0], {name: p.double() for name, p in s.wire.pooler.state_dict().items()}
    groups, where = slow_segments(s, item)

    def means(x):
        return torch.stack([x[1:][g].mean(0) for g in groups])

    x, states = slow_states(
        s, item, (lambda x: means(x) + w["gist"]) if mode == "gist" else None, where * (mode == "gist")
    )
    context = means(states[: len(x)])
    if mode == "gist":
        context = torch.cat([states[len(x) :], context], -1)
    normed = slow_norm(context) * w["norm.weight"] + w["norm.bias"]
    inner = linear(w, "first", normed)
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    u, mu = linear(w, "skip", means(x)) + linear(w, "second", inner), s.wire.projection.mean.double()
    if narrow:
        assert w["down.weight"].shape == (16, 64)
        u = linear(w, "up", linear(w, "down", u - mu)) + mu
    u = u * s.wire.projection.rms / u.square().mean(-1, keepdim=True).sqrt()
    batch = s.batch([longer(s.items[1], 40), item])
    code, found = s.wire.encode(batch.source())
    assert torch.allclose(code[1, : len(u)].double(), u, atol=2e-4 * float(u.abs().max()))
    assert found[1, : len(u)].tolist() == where
    other = s.wire.encode(
        s.batch([item._replace(ids=item.ids[: item.context - 1] + [35] + item.ids[item.context :])]).source()
    )
    moved = (
        other[0][0, 0] - code[1, 0]
    ).abs().max() > 1e-4  # the last token reaches the first slot through a gist token
    assert bool(moved) == (mode == "gist")
    with torch.no_grad():  # in gist the learned vector acts, in lm_segment there is none
        if mode == "gist":
            s.wire.pooler.gist.zero_()
            assert (s.wire.encode(batch.source())[0] - code).abs().max() > 1e-4
        else:
            assert s.wire.pooler.gist is None


def test_the_selector_sends_the_best_words_in_their_order(small):
    """The trained rival: the M tokens of the highest score, as they are and where they stood."""
    s = pooled(small, "select")
    move_lora(s.wire)
    item, w = s.items[0], {name: p.double() for name, p in s.wire.pooler.state_dict().items()}
    x, states = slow_states(s, item)
    score = linear(w, "score", slow_norm(states[1:]) * w["norm.weight"] + w["norm.bias"])[:, 0]
    M = L.slot_count(item, s.args)
    ranked = sorted(range(len(score)), key=lambda t: -score[t])
    best = sorted(ranked[:M])
    code, where = s.wire.encode(s.batch([item, longer(s.items[1], 30)]).source())
    assert best != list(range(M)) and where[0, :M].tolist() == [1 + t for t in best]
    assert torch.allclose(code[0, :M].double(), x[1:][best], rtol=1e-6)
    chance = [score[t] - score[ranked[n:]].logsumexp(0) for n, t in enumerate(ranked[:M])]  # one after the other
    found = float(s.wire.pooler.log_chance[0].detach())
    assert found == pytest.approx(float(sum(chance).detach()), rel=1e-4)


def test_the_selector_learns_what_was_answered_better(small):
    """REINFORCE: the log chance of each context's words, weighted by how much better its questions were answered."""
    s = pooled(small, "select")
    move_lora(s.wire)
    torch.manual_seed(0)  # of the draw
    items = several(s)
    batch, objective = s.batch(items + items[:1]), L.Objective(s.wire.train())  # of one context a question more
    prefix = s.wire.build_prefix(batch)
    chance = s.wire.pooler.log_chance
    logits = s.wire.answer_logits(prefix, batch.gold, batch.gold_mask).detach()
    reward = [[] for _ in chance]
    for c, row, gold, mask in zip(batch.of.tolist(), logits.double(), batch.gold, batch.gold_mask):
        n = int(mask.sum())
        reward[c].append(float(row.log_softmax(-1)[range(n), gold[:n]].mean()))
    reward = torch.tensor([sum(of) / len(of) for of in reward])
    advantage = (reward - reward.mean()) / reward.std()
    loss = objective.draw_loss(logits, batch)
    expected = -(advantage * chance.detach()).sum() / len(chance)
    assert len(chance) == 3 and float(loss.detach()) == pytest.approx(float(expected), rel=5e-3)
    found = torch.autograd.grad(loss, s.wire.pooler.score.weight, retain_graph=True)[0]
    by_hand = torch.autograd.grad(-(advantage * chance).mean(), s.wire.pooler.score.weight, retain_graph=True)[0]
    assert torch.allclose(found, by_hand, rtol=5e-3, atol=1e-7) and found.abs().max() > 1e-6
    terms = objective.answer_terms(batch, 0.0)
    assert terms["loss"] != terms["gen"]  # the answers' own loss has no gradient: the words go as they are
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in s.wire.lora.weights.items() if "lora_B" in n)


def test_the_selector_tries_words_out_in_training_alone():
    """Gumbel noise: for one slot a word is taken with the probability softmax(score), padding never."""
    selector = L.Selector(1)
    selector.norm = torch.nn.Identity()
    torch.nn.init.ones_(selector.score.weight)
    torch.nn.init.zeros_(selector.score.bias)
    shares = torch.tensor([0.15, 0.5, 0.3, 0.05])
    states = torch.cat([shares.log(), torch.tensor([9.0])]).expand(4000, 5)[..., None]
    valid, x = torch.tensor([True] * 4 + [False]).expand(4000, 5), torch.arange(5.0).expand(4000, 5)[..., None]
    torch.manual_seed(0)
    for training in (True, False):
        code, index = selector.train(training)(x, states, valid, torch.ones(4000, dtype=torch.long))
        assert index.shape == (4000, 1) and torch.allclose(code[:, 0, 0], index[:, 0].float())
        found = index.flatten().bincount(minlength=5) / 4000
        expected = shares if training else torch.tensor([0, 1.0, 0, 0])
        assert (found[:4] - expected).abs().max() < 0.03 * training + 1e-9 and found[4] == 0
    both, index = selector.eval()(x[:1], states[:1], valid[:1], torch.tensor([2]))
    assert index.tolist() == [[1, 2]] and both.flatten().tolist() == [1, 2]


def several(s, contexts=3):
    """Items of several contexts of different lengths, each with its questions."""
    return [longer(item, 10 * n) for n, example in enumerate(s.examples[:contexts]) for item in example]


def test_swapped_slots_are_those_of_another_context_for_all_its_questions(small):
    s = small("--pool_ratio", 3, mode="pooling")
    items = [item._replace(passage=f"{n // 3}") for n, item in enumerate(several(s))]
    found, given = L.swapped(items, s.args), set()
    for before, after in zip(items, found, strict=True):
        (other, *_) = (i for i in items if i.passage == after.passage)
        assert after.passage != before.passage and after.ids[: after.context] == other.ids[: other.context]
        assert after.ids[after.context :] == before.ids[before.context :]
        assert after.ids[after.tail :] == before.ids[before.tail :]
        assert (after.id, after.question, after.golds, after.answer) == (
            before.id,
            before.question,
            before.golds,
            before.answer,
        )
        given.add((before.passage, after.passage))
    assert len(given) == len({other for _, other in given}) == 3
    assert s.batch(found).of.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_text_of_equal_positions_is_one_text_for_all_questions_of_a_context(small, monkeypatch):
    """What a rival keeps of a context is chosen before the question, as the code is; the question stays."""
    s, seen = pooled(small, "gist"), []
    items = several(s, 2)
    positions = s.wire.build_prefix(s.batch(items)).mask.sum(1).tolist()
    surprise = L.token_surprise(s.wire, items, s.reader)
    monkeypatch.setattr(
        L, "evaluate", lambda wire, some, reader, prefix_of, slots=None: seen.append((some, slots)) or {"f1": 0.0}
    )
    rows = L.equal_positions(s.wire, items, s.reader, positions, surprise)
    names = ["token_budget_head", "token_budget_question_kept", "salience", "random", "segment_mean_kept"]
    assert (
        list(rows) == names
        and positions[0] == 1 + L.slot_count(items[0], s.args) + len(items[0].ids) - items[0].context
    )
    kept = {}
    for name, (some, slots) in zip(names, seen, strict=True):
        if slots is not None:
            assert slots == [L.slot_count(item, s.args) for item in items]
            continue
        assert [len(item.ids) for item in some] == positions
        if name != "token_budget_head":
            assert [i.ids[i.context :] for i in some] == [i.ids[i.context :] for i in items]
            texts = [tuple(i.ids[: i.context]) for i in some]
            assert [len(set(texts[:3])), len(set(texts[3:]))] == [1, 1] and texts[0] != texts[3]
            kept[name] = texts[0]
    assert len(set(kept.values())) == 3  # random is neither the beginning nor the most surprising
    source = iter(items[0].ids)
    assert all(token in source for token in kept["random"])  # in their order


ALONE = SimpleNamespace(device="cpu", num_processes=1, reduce=lambda values, how: values)


def course(*flags, total=900, saved=None, seed=0):
    args = L.parse(["--test", "--mode", "pooling", "--pooling_mode", "gist", "--seed", str(seed), *flags])
    return L.Course(args, total, ALONE, saved)


STAGED = ("--facts", "8", "--fact_curriculum", "2,8", "--multi_ratio", "2,3,4")


def answered(share):
    return {"right": torch.tensor(round(100 * share)), "scored": torch.tensor(100)}


def test_the_course_takes_more_facts_first_and_then_one_ratio_more_at_a_time():
    assert course(*STAGED).stages == [(2, (2,)), (8, (2,)), (8, (2, 3)), (8, (2, 3, 4))]
    assert course("--multi_ratio", "2,4").stages == [(4, (2, 4))] and course("--pool_ratio", "3").stages == [(4, (3,))]
    assert course("--facts", "8", "--pooling_mode", "convolutional").stages == [(8, (4.0,))]
    assert course("--sequence_pooling_target", "5").stages == [(4, (None,))]
    args = course(*STAGED).args
    assert args.pool_ratio == 2 and course("--multi_ratio", "2,4", "--pool_ratio", "4").args.pool_ratio == 4


def test_the_newest_ratio_is_drawn_every_other_time():
    """And the others evenly; a draw depends on the seed and the update alone. Without a curriculum all are even."""
    last, again, other = course(*STAGED), course(*STAGED), course(*STAGED, seed=1)
    for one in (last, again, other):
        one.stage = 3
    drawn = [last.draw(step) for step in range(4000)]
    assert drawn[::-1] == [again.draw(step) for step in reversed(range(4000))]
    assert drawn != [other.draw(step) for step in range(4000)]
    shares = [sum(ratio == r for _, ratio in drawn) / 4000 for r in (2, 3, 4)]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.03) and {pool for pool, _ in drawn} == {1}
    assert {course(*STAGED).draw(step) for step in range(50)} == {(0, 2)}
    even = course("--multi_ratio", "2,3,4")
    drawn = [even.draw(step) for step in range(3000)]
    assert [drawn.count((0, r)) / 3000 for r in (2, 3, 4)] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_a_stage_is_passed_at_nine_tenths_over_fifty_updates_of_its_newest_ratio():
    one = course(*STAGED)
    assert [one.advance(n, 2, answered(1.0)) for n in range(1, 50)] == [""] * 49
    assert one.advance(50, 2, answered(0.0)) == "[Stage] step 50: 0.980 right, on to 8 facts at ratio 2"
    assert (one.stage, one.seen, one.answers.tolist()) == (1, 0, [0, 0])
    said = [one.advance(50 + n, 2, answered(0.9)) for n in range(1, 101)]  # more than nine tenths
    assert said == [""] * 100 and one.stage == 1 and one.seen == 0
    said = [one.advance(150 + n, 2, answered(0.91)) for n in range(1, 51)]  # a window of its own
    assert said[:-1] == [""] * 49 and "0.910 right, on to 8 facts at ratio 3" in said[-1]
    for n in range(1, 50):  # the newest ratio alone counts
        assert not one.advance(200 + 2 * n, 2, answered(1.0)) and not one.advance(200 + 2 * n + 1, 3, answered(1.0))
    assert not one.advance(300, 2, answered(1.0)) and one.seen == 49
    assert "on to 8 facts at ratio 4" in one.advance(301, 3, answered(1.0)) and one.stage == 3
    assert not any(one.advance(301 + n, 4, answered(1.0)) for n in range(100))


def test_a_stage_ends_with_its_share_of_the_updates_and_goes_on_after_a_stop():
    one = course(*STAGED, total=400)
    said = {n: line for n in range(1, 401) if (line := one.advance(n, 2, answered(0.5)))}
    assert list(said) == [100, 200, 300] and all("its share of the updates is over" in line for line in said.values())
    blind = course(*STAGED, total=40)  # a loss that scores no answers
    assert [n for n in range(1, 41) if blind.advance(n, 2, {})] == [10, 20, 30]
    first = course(*STAGED)
    for n in range(1, 30):
        first.advance(n, 2, answered(1.0))
    second = course(*STAGED, saved=first.state())
    assert [bool(second.advance(n, 2, answered(1.0))) for n in range(30, 51)] == [False] * 20 + [True]
    assert course(*STAGED, saved=second.state()).stage == 1


def test_an_update_trains_on_all_questions_of_its_contexts_at_its_ratio(small):
    s = small(*STAGED, "--pooling_mode", "gist", "--questions_per_context", 4, mode="pooling")
    for pool, facts, ratio in ((0, 2, 2.0), (1, 8, 4.0)):
        batch, tokens = L.training_batch(s.args, s.data, s.reader, 3, pool, ratio)
        each = min(facts, 4)
        assert len(batch.first) == s.args.batch_size == 8 and len(batch.ids) == 8 * each
        assert tokens == int(batch.mask.sum()) and batch.of.bincount().tolist() == [each] * 8
        body = batch.stop - batch.start
        assert torch.equal(batch.slots, (body / ratio).ceil().long())
        assert {i.source.count(" is ") - i.question.count(" is ") for e in s.data.train[pool] for i in e} == {facts}


def test_the_rate_under_a_curriculum_is_constant_until_the_last_fifth():
    args = course(*STAGED).args
    found = [L.rate(args, step, 1000) for step in (0, 49, 99, 100, 500, 799, 800, 900, 999)]
    assert found == pytest.approx([0.01, 0.5, 1, 1, 1, 1, 1, 0.5, 0.005])


@pytest.mark.parametrize("mode", ["gist", "lm_segment", "select", "generation_loss"])
def test_the_budget_by_hand(small, mode):
    """Three figures of cost: positions at the receiver, bytes on the wire, work of the sender (two operations for each
    weight and token)."""
    s = pooled(small, mode)
    items = several(s, 2)
    positions = s.wire.build_prefix(s.batch(items)).mask.sum(1).tolist()
    found, k = L.budget(items, s.wire, s.args, positions, 5.0), 64
    frozen = sum(p.numel() for n, p in s.base.base_model.named_parameters() if "lora_" not in n and "embed" not in n)
    lora = sum(p.numel() for p in s.wire.lora.weights.values())
    own = sum(p.numel() for m in (s.wire.adapter, s.wire.pooler) if m is not None for p in m.parameters())
    rows = []
    for item, prefill in zip(items, positions):
        body, bits = item.context - 1, math.log2(259)
        slots = math.ceil(body / 5)
        read = (frozen + lora) * (body + slots * (mode == "gist")) if mode != "generation_loss" else 0
        rows.append(
            {
                "prefill_positions": prefill,
                "text_positions": len(item.ids),
                "slots": slots,
                "coded_tokens": body,
                "code_ratio": body / slots,
                "wire_values": slots * k,
                "wire_bytes_fp16": 2 * slots * k + math.ceil((prefill - slots) * bits / 8),
                "token_id_bytes": math.ceil(len(item.ids) * bits / 8),
                "text_bytes_utf8": len(item.source.encode()),
                "context_bytes_zlib": len(zlib.compress(item.passage.encode(), 9)),
                "actual_seq_ratio": len(item.ids) / prefill,
                "prefill_attn_ratio": (len(item.ids) / prefill) ** 2,
                "sender_operations": 2 * (read + own * body),
                "receiver_operations": 2 * frozen * prefill,
                "text_operations": 2 * frozen * len(item.ids),
            }
        )
    assert found == {name: pytest.approx(np.mean([row[name] for row in rows])) for name in rows[0]}


def test_gaps_are_paired_by_question_and_drawn_by_context():
    items = [L.Item(str(n), "", [], [], [], 0, 0, 0, "", passage) for n, passage in enumerate("aaabbc")]
    own, same, other = [1.0, 0.5, 0.0, 1.0, 0.0, 1.0], [1.0, 0.5, 0.0, 1.0, 0.0, 1.0], [0.0, 0.5, 0.5, 1.0, 0.0, 0.25]
    rows = {"same": {"f1": 0.6, "f1_each": same}, "other": {"f1": 0.4, "f1_each": other, "predictions": []}}
    found = L.beside({"f1_each": own}, items, rows)
    assert found["same"]["gap"] == {"mean": 0, "lo": 0, "hi": 0, "n": 3} and "f1_each" not in found["other"]
    groups, means = [[1.0, 0.0, -0.5], [0.0, 0.0], [0.75]], []
    for draw in np.random.default_rng(0).integers(0, 3, (2000, 3)):
        drawn = [gap for i in draw for gap in groups[i]]
        means.append(sum(drawn) / len(drawn))
    lo, hi = np.percentile(means, (2.5, 97.5))
    assert found["other"]["gap"] == {
        "mean": pytest.approx(1.25 / 6),
        "lo": pytest.approx(lo),
        "hi": pytest.approx(hi),
        "n": 3,
    }
    assert L.rival(found) == {"name": "same", "f1": 0.6, "gap": found["same"]["gap"]} and L.rival({}) is None


def test_intervals_of_scores_are_over_contexts():
    args = L.parse(["--test", "--mode", "pooling"])
    items = [L.Item(str(n), "", ["x"], [], [1], 0, 0, 0, "", passage) for n, passage in enumerate("aaabbc")]
    found = L.scores(items, list("xxyxyy"), args, [1] * 6)
    assert found["eval_samples"] == 6 and found["f1_interval"]["n"] == found["em_interval"]["n"] == 3
    assert found["em_interval"] == core.bootstrap([1, 1, 0, 1, 0, 0], 2000, clusters=list("aaabbc"))


def test_text_of_equal_bytes_holds_as_many_ids_as_the_code_has_room_for():
    item = L.Item("1", "", [], list(range(20)), [2], 1, 12, 17, "", "")
    for size, bits, kept in ((4, 8.0, 4), (4, 7.0, 4), (4, 6.0, 5), (0, 8.0, 0), (99, 8.0, 11)):
        positions = L.in_bytes(item, size, bits)
        cut = L.cut_to(item, positions, "question_kept")
        assert positions == 1 + kept + 8 and cut.ids == [*range(1 + kept), *range(12, 20)], (size, bits)


def test_the_figure_of_a_curve_has_a_line_for_each_row():
    def row(ratio, f1):
        others = {"nulls": {"swapped": {"f1": 0.1}}, "equal_positions": {"salience": {"f1": f1 / 2}}}
        return {"f1": f1, "budget": {"code_ratio": ratio}, "text": {"f1": 0.9}} | others

    assert L.by_ratio({"2": row(1.9, 0.8), "4": row(3.8, 0.6)}) == {
        "wire": [[1.9, 0.8], [3.8, 0.6]],
        "text": [[1.9, 0.9], [3.8, 0.9]],
        "swapped": [[1.9, 0.1], [3.8, 0.1]],
        "salience": [[1.9, 0.4], [3.8, 0.3]],
    }


CURVE = [("kept", "gist"), ("kept", "select"), ("kept", "generation_loss"), ("compressed", "lm_segment")]


@pytest.mark.parametrize("scope, mode", CURVE)
def test_a_point_of_the_curve_stands_beside_its_nulls(small, monkeypatch, scope, mode):
    """The wire at one ratio, another context's slots, no context, the slots as words; of the document's form, in which
    the code may hold the answer, one slot and all slots but the last taken from another prompt."""
    s = pooled(small, mode, "--question_scope", scope, "--multi_ratio", "3,6", "--max_new_tokens", 1)
    items, calls, evaluate = several(s, 2), [], L.evaluate
    if scope == "compressed":
        items = items[:2]
    surprise = L.token_surprise(s.wire, items, s.reader)
    text = evaluate(s.wire, items, s.reader, s.wire.text_prefix) | {"f1": 0.8}

    def noted(wire, some, reader, prefix_of=None, slots=None):
        calls.append((some, prefix_of, slots))
        f1 = np.random.default_rng(len(calls)).random(len(some)).tolist()
        return evaluate(wire, some, reader, prefix_of, slots) | {"f1_each": f1, "f1": float(np.mean(f1))}

    monkeypatch.setattr(L, "evaluate", noted)
    found = L.point(s.args, s.wire, s.data._replace(evaluation=items), s.reader, text, surprise, 6.0)
    slots = [math.ceil((item.stop(s.args) - 1) / 6) for item in items]
    assert calls[0] == (items, None, slots) and found["share_of_text"] == pytest.approx(found["f1"] / 0.8)
    assert (
        found["budget"]["slots"] == np.mean(slots)
        and found["prefill_positions"] == found["budget"]["prefill_positions"]
    )
    nulls = ["swapped", "no_context"] if scope == "kept" else ["one_slot", "last_slot_alone"]
    nulls += ["as_words"] * (mode in ("gist", "lm_segment"))
    assert list(found["nulls"]) == nulls
    made = dict(zip(nulls, calls[-len(nulls) :]))
    if scope == "kept":
        others = L.swapped(items, s.args)
        assert made["swapped"] == (others, None, [math.ceil((item.context - 1) / 6) for item in others])
        some, prefix_of, _ = made["no_context"]
        assert prefix_of == s.wire.text_prefix
        assert [i.ids for i in some] == [item.ids[:1] + item.ids[item.context :] for item in items]
    else:
        assert made["one_slot"] == (items, None, [1] * len(items))
        assert made["last_slot_alone"] == (items, s.wire.last_slot_prefix, slots)
    if "as_words" in made:
        assert made["as_words"] == (items, s.wire.worded_prefix, slots)
    of_bytes, prefix_of, _ = calls[-len(nulls) - 1]
    assert prefix_of == s.wire.text_prefix
    for item, cut, n in zip(items, of_bytes, slots):
        assert len(cut.ids) == L.in_bytes(item, 2 * 64 * n, math.log2(259))
    for row in (*found["nulls"].values(), found["equal_bytes"], *found["equal_positions"].values()):
        assert row["gap"]["mean"] == pytest.approx(found["f1"] - row["f1"]) and row["gap"]["n"] == 2
        assert row["prefill_positions"] > 0
    f1 = np.random.default_rng(1).random(len(items)).reshape(2, -1).mean(1)
    assert found["f1_by_context"] == pytest.approx(f1.tolist(), abs=1e-4)


def test_slots_of_another_prompt_and_slots_as_words(small):
    s = pooled(small, "lm_segment")
    batch = s.batch([s.items[0], longer(s.items[1], 30), s.items[2]])
    own, slots = s.wire.build_prefix(batch), batch.slots.tolist()
    mixed, words = s.wire.last_slot_prefix(batch), s.wire.worded_prefix(batch)
    assert len(set(slots)) > 1 and torch.equal(mixed.positions, own.positions)
    rows = F.normalize(s.wire.table, dim=1)
    for c, n in enumerate(slots):
        for t in range(n):
            taken = t < n - 1 and t < slots[c - 1]
            assert torch.equal(mixed.code[c, t], own.code[c - 1 if taken else c, t])
            nearest = (rows @ F.normalize(own.code[c, t], dim=0)).argmax()
            assert torch.equal(real(words, c)[0][1 + t], s.wire.table[nearest])
        assert torch.equal(real(words, c)[0][1 + n :], real(own, c)[0][1 + n :])


def test_contexts_of_a_curriculum_are_groups_and_none_is_evaluated(monkeypatch):
    rows = core.question_rows  # all from one seed: only what is held out keeps the pools apart
    monkeypatch.setattr(core, "question_rows", lambda count, seed, purpose, *rest: rows(count, 0, "x", *rest))
    flags = ["--facts", "4", "--fact_curriculum", "2,4", "--eval_facts", "6,9", "--pca_samples", "60"]
    found = L.load_rows(L.parse(["--test", "--mode", "pooling", *flags]), 40, 30)
    evaluated = contexts(found.evaluation)
    assert len(evaluated) == len(found.evaluation) == 30 and list(found.beyond) == [6, 9]
    for pool, facts, count in (
        *zip(found.train, (2, 4), (40, 40)),
        (found.evaluation, 4, 30),
        *((found.beyond[n], n, 30) for n in (6, 9)),
    ):
        assert len(pool) == len(contexts(pool)) == count
        for example in pool:
            assert len({row["context"] for row in example}) == 1 and example[0]["context"].count(" is ") == facts
            assert len({row["question"] for row in example}) == len(example) == min(3, facts)
    assert not evaluated & (contexts(found.train[0]) | contexts(found.train[1]) | contexts([found.fitted]))


def test_questions_of_a_file_are_grouped_by_passage(tmp_path):
    rows = [
        {"context": f"c{n % 6}", "title": f"t{n % 6}", "question": f"q{n}", "answers": ["a"], "id": str(n)}
        for n in range(30)
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    found = L.load_rows(L.parse(["--test", "--mode", "pooling", "--train_file", str(file)]), -1, -1)
    for example in (*found.train[0], *found.evaluation):
        assert len({row["context"] for row in example}) == 1 and len({row["question"] for row in example}) == 3
    assert len(found.train[0]) + len(found.evaluation) == 6 and found.dropped == 0 and not found.beyond
    assert L.by_context(rows, 1) == [[row] for row in rows]


def test_the_code_is_made_before_the_question_unless_the_documents_form_is_asked_for():
    for flags, scope, questions in (
        (["--mode", "pooling"], "kept", 3),
        (["--mode", "pooling", "--questions_per_context", "5"], "kept", 5),
        (["--mode", "pooling", "--question_scope", "compressed"], "compressed", 1),
        (["--mode", "pooling", "--legacy"], "compressed", 1),
        (["--mode", "phase1b"], "compressed", 1),
        (["--mode", "baselines"], "compressed", 1),
    ):
        args = L.parse(flags)
        assert (args.question_scope, args.questions) == (scope, questions), flags


# ----------------------------------------------------------------------------------------- generation (D2, D3, D4)
def test_greedy_generation_equals_the_library(small):
    """D2: `generate` on ids, on embeddings, and ours, with left padding; only new tokens come back."""
    s = small()
    batch = s.batch([s.items[0], longer(s.items[1], 23)])
    ours, _ = L.greedy_generate(s.base, s.wire.text_prefix(batch), 7, torch.tensor([2]))
    kwargs = dict(attention_mask=batch.mask, max_new_tokens=7, do_sample=False, eos_token_id=2, pad_token_id=2)
    by_ids = s.base.generate(batch.ids, **kwargs)[:, batch.ids.shape[1] :]
    by_embeds = s.base.generate(inputs_embeds=s.wire.embed(batch.ids), **kwargs)
    assert torch.equal(ours, by_ids) and torch.equal(ours, by_embeds)


def test_rows_end_alone_at_a_stop_token_or_string(small):
    s = small()
    batch = s.batch(s.items[:3])
    prefix = s.wire.text_prefix(batch)
    free, _ = L.greedy_generate(s.base, prefix, 6, torch.tensor([-1]))
    stop = free[0, 2]
    ended, _ = L.greedy_generate(s.base, prefix, 6, stop[None])
    at = free[0].tolist().index(int(stop))
    assert ended[0].tolist() == free[0, : at + 1].tolist() + [int(stop)] * (ended.shape[1] - at - 1)
    cut, _ = L.greedy_generate(s.base, prefix, 6, torch.tensor([-1]), ended=lambda row: len(row) >= 2)
    assert torch.equal(cut, free[:, :2])


def test_evaluation_is_the_same_in_batches_and_one_by_one_and_pads_are_silent(small):
    """D3, section 9: bucketed batches change no score."""
    s = small()
    items = [longer(i, 7 * n) for n, i in enumerate(s.items[:8])]
    whole = L.evaluate(s.wire, items, s.reader)
    alone = L.evaluate(s.wire, items, s.reader._replace(args=dataclasses.replace(s.args, eval_batch_size=1)))
    assert [p["pred_raw"] for p in whole["predictions"]] == [p["pred_raw"] for p in alone["predictions"]]
    for key in ("f1", "em", "first_tok_top1", "first_tok_top5", "recon_cosine_sim", "recon_mse", "norm_ratio"):
        assert whole[key] == pytest.approx(alone[key], abs=1e-6)
    assert whole["positions"] == [len(i.ids) for i in items] and whole["seconds_per_sample"] > 0


def test_right_padding_reads_a_padded_position(small, capsys):
    """D4: what --pad_side right does; nothing changes for a prompt that needs no padding."""
    s, r = small("--dtype", "fp32"), small("--pad_side", "right")
    items = [s.items[0], longer(s.items[1], 30)]
    first = [L.greedy_generate(x.base, x.wire.text_prefix(x.batch(items)), 1, torch.tensor([-1]))[1] for x in (s, r)]
    assert not torch.allclose(first[0][0], first[1][0], atol=1e-4)
    assert torch.allclose(first[0][1], first[1][1], atol=1e-5)


# ------------------------------------------------------------------------------------- the LoRA switch (D16, D17)
def test_lora_off_is_the_base_model_and_its_gradients_survive_the_switch(small):
    s = pooled(small, "lm_segment", "--lambda_ae", "0.5")
    ids = torch.tensor([s.items[0].ids])
    plain = core.load_backbone("tiny")[0]
    enlarge(plain)
    plain = plain(ids).logits
    for layer in s.wire.lora.layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, 0, 0.3)
    with s.wire.lora.switched(False):
        assert torch.equal(s.base(ids).logits, plain)
    assert not torch.allclose(s.base(ids).logits, plain, atol=1e-3)
    terms = s.objective(s.batch(s.items[:2]), ae=0.5)
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in s.wire.to_train)
    assert all(p.grad is None for n, p in s.base.named_parameters() if "lora_" not in n)
    assert terms["loss"].item() == pytest.approx((terms["gen"] + terms["kd"] + 0.5 * terms["ae"]).item(), rel=1e-5)


def test_text_and_rivals_are_read_without_a_trained_lora(small):
    """A training-free row must not change with what training did to the model; the wire's own row must."""
    s, found = small("--use_lora", "--max_new_tokens", 6, mode="pooling"), []
    for spread in (0.0, 1.0):
        for layer in s.wire.lora.layers:
            torch.nn.init.normal_(layer.lora_B["default"].weight, 0, spread)
        surprise = L.token_surprise(s.wire, s.items[:4], s.reader)
        rows = L.equal_positions(s.wire, s.items[:4], s.reader, [90] * 4, surprise)
        rows |= {
            "text": L.evaluate(s.wire, s.items[:4], s.reader, s.wire.text_prefix),
            "wire": L.evaluate(s.wire, s.items[:4], s.reader),
        }
        found.append({name: [p["pred_raw"] for p in row["predictions"]] for name, row in rows.items()})
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"wire"}


def test_everything_trained_stands_where_the_embedding_table_does():
    """D20: `meta` plays the device of the embedding layer, the CPU that of the head, whose logits come back."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=99, num_attention_heads=4)
    )
    base.get_input_embeddings().to("meta")
    assert {p.device.type for p in base.parameters()} == {"meta", "cpu"}
    projection = L.Projection(torch.zeros(64, device="meta"), torch.zeros(64, 8, device="meta"), 1.0, [], 0.1, 0.1)
    for mode in ("lm_segment", "gist", "select", "generation_loss"):
        args = L.parse(["--test", "--mode", "pooling", "--pooling_mode", mode, "--seg_encoder", "none"])
        wire = L.Wire(args, base, projection)
        assert wire.to_train and {p.device.type for p in wire.to_train} == {"meta"}
    L.bring_back(base)
    assert base.lm_head(torch.zeros(1, 64)).device.type == "meta"


def test_checkpointing_gives_the_same_gradients(small):
    """The recomputation sees LoRA in the encoder's pass and not in the decoder's."""
    grads = []
    for flag in ([], ["--grad_checkpoint"]):
        s = pooled(small, "lm_segment", *flag)
        for layer in s.wire.lora.layers:
            torch.nn.init.normal_(layer.lora_B["default"].weight, 0, 0.3, generator=torch.Generator().manual_seed(1))
        if flag:
            s.base.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": s.wire.lora.recompute_with})
        s.wire.train()
        s.objective(s.batch(s.items[:2]))["loss"].backward()
        grads.append([p.grad for p in s.wire.to_train if p.grad is not None])
    assert len(grads[0]) > 10 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


@pytest.mark.parametrize("scope", ["compressed", "kept"])
def test_the_rewriting_loss_is_the_nll_of_the_body(small, scope):
    s = pooled(small, "lm_segment", "--question_scope", scope)
    batch, total, count = s.batch([s.items[0], longer(s.items[1], 9)]), 0.0, 0
    for item in (s.items[0], longer(s.items[1], 9)):
        one = s.batch([item])
        slots = s.wire.build_prefix(one).code[0]
        ask = s.wire.pooler.rewrite * (s.wire.projection.rms / L.rms(s.wire.pooler.rewrite))
        body = item.ids[item.start : item.stop(s.args)]
        x = torch.cat([s.wire.embed(torch.tensor(item.ids[:1])), slots, ask[None], s.wire.embed(torch.tensor(body))])
        with s.wire.lora.switched(False):
            logits = s.base(inputs_embeds=x[None]).logits[0, -len(body) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(body), reduction="sum").item()
        count += len(body)
    with s.wire.reading():
        found = s.objective.rewriting(batch.source(), s.wire.build_prefix(batch).code)
    assert found.item() == pytest.approx(total / count, abs=1e-4)


# -------------------------------------------------------------------------------------------- data (check 18, D14)
def glued_tokenizer():
    """A byte-level BPE that glues a blank to the word after it, as the published model's does."""
    lines = ["Context: the house of Ada is amber brick\nQuestion: What is it ?\nAnswer: amber brick coral\n"] * 50
    return core.train_tokenizer(lines, 400)


def test_prompt_and_answer_are_cut_where_generation_begins():
    args = L.parse(["--test", "--mode", "phase1a"])
    row = {
        "id": "1",
        "title": "",
        "context": "the house of Ada is amber brick",
        "question": "What is it ?",
        "answers": ["amber brick", "coral"],
    }
    for tokenizer, glued in ((glued_tokenizer(), True), (core.train_tokenizer([]), False)):
        assert L.glues_blanks(tokenizer) == glued
        (item,) = L.tokenize([row], tokenizer, args)
        text = f"Context: {row['context']}\nQuestion: {row['question']}\nAnswer: "
        assert tokenizer.decode(item.ids + item.answer[:-1]) == text + "amber brick"
        assert item.answer[-1] == tokenizer.eos_token_id and item.golds == ["amber brick", "coral"]
        assert tokenizer.decode(item.ids) == (text.rstrip(" ") if glued else text)
        whole = tokenizer(text + "amber brick")["input_ids"]
        assert item.ids + item.answer[:-1] == whole  # as one text: no token of generation is unseen in training
        assert tokenizer.decode(item.ids[item.start : item.context]).strip() == f"Context: {row['context']}"
        assert tokenizer.decode(item.ids[item.tail :]).strip() == "Answer:"
        digits = L.tokenize([row | {"answers": ["1990"]}], tokenizer, args)[0]
        assert digits.ids == item.ids  # the prompt does not depend on its answer
    first = L.tokenize([row], core.train_tokenizer([]), dataclasses.replace(args, references="first"))[0]
    assert first.golds == ["amber brick"]


def test_truncation_keeps_the_question():
    """Check 18: a 2,000-word context; `tail`, as published, loses question and prefix."""
    row = {"id": "1", "title": "", "context": "word " * 2000, "question": "What is it ?", "answers": ["word"]}
    tokenizer = core.train_tokenizer([])
    for how, kept in (("context", True), ("tail", False)):
        args = L.parse(["--test", "--mode", "phase1a", "--truncate", how, "--max_length", "200"])
        (item,) = L.tokenize([row], tokenizer, args)
        assert len(item.ids) == 200 and item.start <= item.context <= item.tail <= 200
        text = tokenizer.decode(item.ids)
        assert text.endswith("\nQuestion: What is it ?\nAnswer: ") == kept and ("Question" in text) == kept
        assert text.startswith("Context: word")


def test_chat_template_keeps_the_anchor_once():
    tokenizer = core.train_tokenizer([])
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}<assistant>"
    args = L.parse(["--test", "--mode", "baselines", "--use_chat_template"])
    rows = core.question_rows(3, 0, "x")
    for item in L.tokenize(rows, tokenizer, args):
        text = tokenizer.decode(item.ids)
        assert text.count("Answer: ") == 1 and text.endswith("<assistant>Answer: ") and L.SYSTEM in text
        assert tokenizer.decode(item.ids[item.tail :]) == "Answer: "
    with pytest.raises(core.Failure, match="no chat template"):
        L.tokenize(rows, core.train_tokenizer([]), args)


def single(examples):
    """The rows of examples of one question each."""
    assert all(len(example) == 1 for example in examples)
    return [row for (row,) in examples]


def contexts(examples):
    return {row["context"] for example in examples for row in example}


def test_data_splits_share_nothing(tmp_path):
    args = L.parse(["--test", "--mode", "phase1a", "--samples", "300"])
    found = L.load_rows(args, 300, 100)
    train, held_out, known = single(found.train[0]), single(found.evaluation), contexts(found.evaluation)
    assert len(found.train) == 1 and found.source == "generated" and len(train) == 300 and len(held_out) == 100
    assert not known & contexts(found.train[0]) and not known & contexts([found.fitted])
    file = tmp_path / "a.jsonl"
    rows = [
        {"id": str(i), "title": f"t{i % 7}", "context": f"c{i}", "question": "q", "answers": ["a", "b"]}
        for i in range(70)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    by_file = dataclasses.replace(args, train_file=str(file), eval_file=str(file))
    found = L.load_rows(by_file, -1, -1)
    train, held_out = single(found.train[0]), single(found.evaluation)
    assert found.source == "file" and len(train) + len(held_out) == 70 and found.dropped == 0
    assert not {r["title"] for r in train} & {r["title"] for r in held_out} and held_out
    other = tmp_path / "b.jsonl"
    other.write_text(json.dumps(rows[0]))
    with pytest.raises(core.Failure, match="both training and evaluation"):
        L.load_rows(dataclasses.replace(by_file, eval_file=str(other)), -1, -1)
    assert L.load_rows(args, 50, 10) == L.load_rows(args, 50, 10)


def test_files_without_ids_and_unanswerable_questions(tmp_path):
    """Two files whose records have no ids are told apart by their passages; what is dropped is counted."""
    rows = [{"context": f"c{i}", "question": "q", "answers": ["a"] if i % 3 else []} for i in range(12)]
    for name, part in (("a", rows[:9]), ("b", rows[9:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    args = L.parse(
        [
            "--test",
            "--mode",
            "phase1a",
            "--train_file",
            str(tmp_path / "a.jsonl"),
            "--eval_file",
            str(tmp_path / "b.jsonl"),
        ]
    )
    found = L.load_rows(args, -1, -1)
    assert (len(found.train[0]), len(found.evaluation), found.dropped) == (6, 2, 4)
    qas = [{"id": str(i), "question": "q", "answers": [{"text": "a"}] if i else []} for i in range(3)]
    paragraphs = [{"context": f"p{i}", "qas": [q | {"id": f"{i}{q['id']}"} for q in qas]} for i in range(4)]
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"data": [{"title": f"t{i}", "paragraphs": [p]} for i, p in enumerate(paragraphs)]}))
    found = L.load_rows(dataclasses.replace(args, train_file=str(file), eval_file=""), -1, -1)
    assert len(found.train[0]) + len(found.evaluation) == 8 and found.dropped == 4
    twice = {"title": "t9", "paragraphs": [paragraphs[i] for i in range(4)]}  # an article that repeats the others
    file.write_text(
        json.dumps({"data": [{"title": f"t{i}", "paragraphs": [p]} for i, p in enumerate(paragraphs)] + [twice]})
    )
    found = L.load_rows(dataclasses.replace(args, train_file=str(file), eval_file=""), -1, -1)
    assert found.evaluation and not contexts(found.train[0]) & contexts(found.evaluation)
    file.write_text(json.dumps({"data": [twice | {"title": t} for t in "ab"]}))  # the same twice
    with pytest.raises(core.Failure, match="give --eval_file"):
        L.load_rows(dataclasses.replace(args, train_file=str(file), eval_file=""), -1, -1)


@pytest.mark.skipif(not SQUAD.exists(), reason="no SQuAD file beside the repository")
def test_real_squad_runs_and_is_split_by_article(tmp_path):
    result = L.main(
        [
            "--test",
            "--mode",
            "phase1a",
            "--train_file",
            str(SQUAD),
            "--eval_file",
            str(SQUAD),
            "--samples",
            "8",
            "--eval_samples",
            "4",
            "--epochs",
            "1",
            "--dataset",
            "squad",
            "--save_dir",
            str(tmp_path),
        ]
    )
    assert result["data"]["source"] == "file" and result["data"]["train"] == 8 and result["legacy"] is False
    rows = core.squad_rows(str(SQUAD))
    train, held_out = L.split_by_article(rows, "rows.jsonl")
    assert train and held_out and not {r["title"] for r in train} & {r["title"] for r in held_out}


# --------------------------------------------------------------------------- scores, extraction, collapse (10-12)
def test_official_f1_fixtures():
    """D14, check 11; two texts of which nothing is left are equal but share no word: EM 1, F1 0."""
    f1 = {
        pair: core.squad_scores(pair[0], list(pair[1]))[1]
        for pair in (
            ("the the cat", ("cat",)),
            ("cat cat dog", ("cat cat",)),
            ("", ("cat",)),
            ("the", ("a",)),
            ("Cat.", ("x", "cat")),
        )
    }
    assert list(f1.values()) == [1.0, 0.8, 0.0, 0.0, 1.0] and core.squad_scores("the", ["a"])[0] == 1.0
    said = "Dane was killed in one of the battles that took place there during those long years"
    words = [w for w in said.lower().split() if w not in ("a", "an", "the")]
    assert len(words) == 15 and core.squad_scores(said, ["Dane"])[1] == pytest.approx(0.125)


def test_extraction_fixtures():
    """Check 12."""
    dane = ": Dane. Dane was killed"
    assert L.extract_answer(dane, "before_punct") == L.extract_answer(dane, "path_c") == "Dane"
    assert L.extract_answer("3.5 million. It", "before_punct") == "3"
    assert L.extract_answer("3.5 million. It", "path_c") == "3.5 million"
    assert [L.extract_answer("", how) for how in ("none", "first_n", "before_punct", "path_c")] == [""] * 4
    assert L.extract_answer("A) the old mill", "path_c") == "the old mill"
    assert L.extract_answer("Answer: one two three four five six", "path_c") == "one two three four five"
    assert L.extract_answer("one two three", "first_n", 2) == "one two" and L.extract_answer(" x y ", "none") == "x y"
    assert L.extract_answer("...", "before_punct") == "..."  # nothing before it: the first word


def test_collapse_fixtures():
    """Check 10."""
    golds = [[f"answer {i}"] for i in range(40)]
    ids, gold_ids = list(range(40)), list(range(40))
    assert L.collapse(["the the the the"] * 40, golds, ids, gold_ids) == "repeat"
    assert L.collapse([""] * 40, golds, ids, gold_ids) == "empty"
    assert L.collapse(["Dane"] * 40, golds, [1] * 40, gold_ids) == "single_answer"
    assert L.collapse([f"x {i}" for i in range(40)], golds, [3] * 40, gold_ids) == "first_token"
    assert L.collapse([g[0] for g in golds], golds, ids, gold_ids) == "none"
    assert L.collapse([g[0] for g in golds], golds, [5] * 40, [5] * 40) == "none"  # the answers begin alike themselves
    assert L.collapse(["yes"] * 30, [["yes"]] * 30, [1] * 30, [1] * 30) == "none"  # so does the truth
    assert L.collapse(["Dane"] * 5, golds[:5], [1] * 5, gold_ids[:5]) == "none"  # too few to tell


def test_stop_strings_reach_the_answers(small):
    s = small("--max_new_tokens", 6)
    plain = L.evaluate(s.wire, s.items[:4], s.reader, s.wire.text_prefix)
    text = plain["predictions"][0]["pred_raw"]
    assert len(text) >= 3
    args = dataclasses.replace(s.args, stop_strings=text[1])
    cut = L.evaluate(s.wire, s.items[:4], s.reader._replace(args=args), s.wire.text_prefix)
    assert cut["predictions"][0]["pred_raw"] == text[: text.index(text[1])]
    assert L.parse(["--mode", "phase1a", "--stop_strings", "\\n"]).stop_strings == "\\n"


# ------------------------------------------------------------------------------------------------- baselines
def test_budgets_are_exact_and_keep_what_they_say(small):
    s = small(mode="baselines")
    item, surprise = s.items[0], np.arange(999.0)
    for how in ("head", "question_kept", "salience", "random"):
        for M in (60, 90, len(item.ids), 999):
            cut = L.cut_to(item, M, how, surprise)
            assert len(cut.ids) == min(M, len(item.ids))
            assert cut.ids[cut.tail :] == item.ids[item.tail :] and cut.ids[0] == item.ids[0]
            if how != "head" and len(item.ids) - item.context < M:
                assert s.tok.decode(cut.ids).endswith(f"Question: {item.question}\nAnswer: ")
    assert "Question" not in s.tok.decode(L.cut_to(item, 60, "head").ids)
    most = L.cut_to(item, 80, "salience", surprise)  # surprise grows with the position: the context's end survives
    assert most.ids[1 : most.context] == item.ids[item.context - (most.context - 1) : item.context]
    assert len(L.cut_to(item, 5, "question_kept").ids) == 5


def test_rivals_stand_at_equal_positions(small):
    s = small(mode="baselines")
    surprise = L.token_surprise(s.wire, s.items[:6], s.reader)
    rows = L.equal_positions(s.wire, s.items[:6], s.reader, [100] * 6, surprise)
    assert set(rows) == {
        "token_budget_head",
        "token_budget_question_kept",
        "salience",
        "random",
        "segment_mean_compressed",
        "segment_mean_kept",
    }
    for name, row in rows.items():
        assert row["positions"] == [100] * 6, name


def test_one_evaluated_example_has_no_spread(tmp_path):
    flags = ["--mode", "pooling", "--samples", "8", "--epochs", "1", "--eval_samples", "1"]
    found = L.main([*RUN, *flags, "--questions_per_context", "1", "--save_dir", str(tmp_path)])
    assert found["f1_se"] == 0 and len(found["equal_positions"]) > 4
    gaps = [row["gap"] for row in found["equal_positions"].values()]
    assert {(gap["hi"] - gap["lo"], gap["n"]) for gap in gaps} == {(0, 1)}


def test_surprise_is_the_tokens_own_nll(small):
    s = small(mode="baselines")
    items = [s.items[0], longer(s.items[1], 12)]
    for item, found in zip(items, L.token_surprise(s.wire, items, s.reader)):
        logits = s.base(torch.tensor([item.ids])).logits[0, :-1].log_softmax(-1)
        slow = -logits[range(len(item.ids) - 1), item.ids[1:]]
        assert np.abs(found[1:] - slow.detach().numpy()).max() < 1e-4 and found[0] == 0


def test_nearest_tokens_in_chunks(small, monkeypatch):
    table = torch.randn(50, 8)
    y = table[torch.arange(20)] * 3 + 0.01
    whole = L.nearest(table, torch.randn(31, 8, generator=torch.Generator().manual_seed(0)), 3)
    monkeypatch.setattr(L, "BLOCK", 200)  # four tokens at a time
    parts = L.nearest(table, torch.randn(31, 8, generator=torch.Generator().manual_seed(0)), 3)
    assert torch.allclose(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    assert torch.equal(L.nearest(table, y)[1][:, 0], torch.arange(20))
    s = small("--compress_method", "none", "--adapter_type", "linear", mode="phase1a")
    assert L.token_recovery(s.wire, s.items, s.reader)[0] == 1.0


# ----------------------------------------------------------------------------------------- embedding sweep (D1)
def test_transforms_by_hand_and_their_dtype():
    table = torch.randn(40, 16) * 0.2 + 0.05
    x, mask = torch.randn(2, 5, 16), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    rho = table.square().mean(1).sqrt().mean()
    for name, config in L.SWEEP.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            y = L.transform(x.to(dtype), mask, config, table.to(dtype))
            assert y.dtype == dtype and y.shape == x.shape, name
    y = L.transform(x, mask, {"type": "rms_matching", "target_scale": 0.7}, table)
    assert torch.allclose(L.rms(y), 0.7 * rho, atol=1e-5)
    y = L.transform(x, mask, {"type": "batch_distribution"}, table)
    one = x[0, 2:]
    expected = (one - one.mean()) / (one.std() + 1e-8) * table.std() + table.mean()
    assert torch.allclose(y[0, 2:], expected, atol=1e-5)  # padding and the other row do not enter
    assert len(L.SWEEP) == 10 and next(iter(L.SWEEP)) == "baseline"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sweep_runs_and_its_published_form_hides_errors(dtype, tmp_path, capsys):
    """D1, check 7: in half precision the published target promotes to fp32, the model refuses it, and a blanket
    except stores empty strings."""
    flags = ["--test", "--mode", "embed_sweep", "--samples", "6", "--dtype", dtype]
    good = L.main([*flags, "--save_dir", str(tmp_path / "a")])
    assert good["total_experiments"] == good["successful"] == 10 and good["failed"] == 0
    assert [r["experiment"] for r in good["results"]] == list(L.SWEEP)
    assert all(r["empty_rate"] < 1 and r["errors"] == 0 for r in good["results"])
    assert [r["rank"] for r in good["sorted_by_f1"]] == list(range(1, 11))
    keys = "experiment config f1 em empty_rate num_samples time_sec description"
    one = json.loads((tmp_path / "a" / "rms_scale0.7.json").read_text())
    assert set(keys.split()) <= set(one) and one["config"] == {"type": "rms_matching", "target_scale": 0.7}
    stats = json.loads((tmp_path / "a" / "embedding_stats.json").read_text())
    assert stats["token_rms"]["min"] <= stats["token_rms"]["mean"] <= stats["token_rms"]["max"]
    capsys.readouterr()
    bad = L.main([*flags, "--legacy", "--save_dir", str(tmp_path / "b")])
    hidden = [r for r in bad["results"] if r["errors"]]
    assert bad["legacy"] and len(hidden) == bad["failed"] == (8 if dtype == "bf16" else 0)
    assert all(r["empty_rate"] == 1 and r["collapse"] == "empty" for r in hidden)
    assert capsys.readouterr().out.count("errors stored as empty") == len(hidden)


# ------------------------------------------------------------------------------------- runs (checks 1, 15, 16; D17-19)
def test_red_flags():
    args = L.parse(["--mode", "phase1b", "--anneal_gen_objectives"])
    assert "cosine fell" in L.red_flag(args, 0.75, 0.55, None, 1.0)
    assert "F1 is 0" in L.red_flag(args, 0.75, 0.8, {"f1": 0.0}, 1.0)
    assert not L.red_flag(args, 0.65, 0.55, None, 1.0) and not L.red_flag(args, 0.9, 0.9, {"f1": 0.0}, 0.0)
    assert not L.red_flag(dataclasses.replace(args, anneal_gen_objectives=False), 0.9, 0.1, {"f1": 0.0}, 1.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """python latentwire_stage1.py --test: every mode in turn. (folder, results, what it printed)"""
    root, printed = tmp_path_factory.mktemp("lw") / "all", io.StringIO()
    with contextlib.redirect_stdout(printed):
        results = L.main(["--test", "--save_dir", str(root)])
    return root, results, printed.getvalue()


def test_every_mode_writes_its_files(finished):
    """Check 1, D18."""
    root, results, _ = finished
    assert list(results) == list(L.MODES)
    for mode, file in (
        ("phase1a", "adapter_phase1_best.pt"),
        ("phase1b", "adapter_phase1_best.pt"),
        ("pooling", "best_checkpoint.pt"),
    ):
        here = root / mode
        summary = json.loads((here / "summary.json").read_text())
        wanted = (
            "best_f1 epoch compression method samples k_tokens lambda_kce lambda_kd em first_tok_top1 "
            "pooling_mode recon_cosine_sim pca_explained_variance pca_ceiling_cos M budget collapse status "
            "baselines_same_protocol "
            "status legacy wall_sec config f1_interval causality_max_abs_diff environment data peak_mem_bytes"
        )
        assert set(wanted.split()) <= set(summary) and summary["compression"] == "64 → 16"
        assert summary["causality_max_abs_diff"] <= 1e-5 and {"text", "token_budget"} <= set(
            summary["baselines_same_protocol"]
        )
        rows = [json.loads(line) for line in (here / "diagnostics.jsonl").read_text().splitlines()]
        full = [r["f1"] for r in rows if r["type"] == "full_eval"]
        assert summary["chosen_from_evaluations"] == len(full) and summary["last_f1"] == full[-1]
        assert summary["best_f1"] == max(full) and summary["data"]["unanswerable_dropped"] == 0
        state = torch.load(here / file, weights_only=True)  # the document's one-liner
        assert {"best_f1", "epoch", "config", "compressor_projection", "compressor_mean", "adapter"} <= set(state)
        assert state["best_f1"] == summary["best_f1"] and state["config"]["mode"] == mode
        assert (here / "last.pt").exists() and not list(here.glob("*.tmp"))
        rows = [json.loads(line) for line in (here / "diagnostics.jsonl").read_text().splitlines()]
        kinds = {r["type"] for r in rows}
        assert kinds == {"train", "quick_eval", "full_eval"} if mode != "phase1a" else kinds >= {"train", "full_eval"}
        train = [r for r in rows if r["type"] == "train"][-1]
        base = "step epoch timestamp loss recon_mse recon_cosine_sim recon_rel_error lr grad_norm compression_ratio"
        assert set(f"{base} batch_size total_gpu_memory_gb gpu_count".split()) <= set(train)
        if mode == "phase1b":
            more = (
                "loss_recon loss_kce loss_kd effective_lambda_kce effective_lambda_kd gen_loss_share "
                "effective_lambda cosine_sim mse"
            )
            assert set(more.split()) <= set(train)
            share = (0.01 * train["loss_kce"] + 0.01 * train["loss_kd"]) / train["loss"]
            assert train["gen_loss_share"] == pytest.approx(share, rel=1e-6)
        if mode == "pooling":
            assert {"gen_loss", "mode"} <= set(train) and train["sequence_compression_ratio"] > 2  # none was asked for
        full = [r for r in rows if r["type"] == "full_eval"][-1]
        assert set("f1 em f1_se first_tok_top1 first_tok_top5 empty_rate collapse eval_samples".split()) <= set(full)
        predictions = [json.loads(line) for line in (here / "predictions.jsonl").read_text().splitlines()]
        assert len(predictions) == (72 if mode == "pooling" else 24)  # three questions on each context there
        assert summary["eval_samples"] == len(predictions) and summary["f1_interval"]["n"] == 24
        assert set(predictions[0]) == {"id", "question", "golds", "pred_raw", "pred"}
    names = {p.parent.name for p in (root / "baselines").glob("*/results.json")}
    assert {
        "text",
        "text_swapped",
        "token_budget_head",
        "token_budget_question_kept",
        "pca",
        "embed_raw",
        "embed_anchor",
        "snap",
        "segment_mean_kept",
        "salience",
    } <= names
    one = json.loads((root / "baselines" / "pca" / "results.json").read_text())
    keys = "config em f1 exact_match f1_score num_examples n_examples timestamp total_time_sec pca_explained_variance"
    assert set(f"{keys} pca_first_5_components token_budget".split()) <= set(one)
    assert set(results["eval"]["wire"]) == {"none", "first_n", "before_punct", "path_c"} == set(results["eval"]["text"])
    assert {r["name"] for r in claims.status("compression", root)} == {"phase1a", "phase1b", "pooling"}


def test_reconstruction_learns(finished):
    history = finished[1]["phase1a"]["train_loss"]
    rows = (finished[0] / "phase1a" / "diagnostics.jsonl").read_text().splitlines()
    losses = [json.loads(r)["loss"] for r in rows if '"train"' in r]
    assert losses and history
    long = [v for _, v in finished[1]["phase1b"]["train_loss"]]
    assert finished[1]["phase1a"]["recon_cosine_sim"] > 0.2 and math.isfinite(long[-1])


def test_reloaded_checkpoints_predict_the_same(finished, tmp_path):
    """Check 15, D17: every trained tensor is in the file."""
    for mode, file in (("phase1b", "adapter_phase1_best.pt"), ("pooling", "best_checkpoint.pt")):
        there = finished[0] / mode
        words = ["--test", "--mode", "eval", "--ckpt_in", str(there / file), "--max_new_tokens", "4"]
        L.main([*words, "--save_dir", str(tmp_path / mode)])
        best = finished[1][mode]
        lines = [(d / "predictions.jsonl").read_text() for d in (there, tmp_path / mode)]
        assert lines[0] == lines[1] and '"pred_raw": ""' not in lines[0]
        again = json.loads((tmp_path / mode / "summary.json").read_text())
        assert again["best_f1"] == best["best_f1"] and again["wire"]["none"]["first_tok_top1"] == best["first_tok_top1"]


@pytest.mark.parametrize("flags", [("--pooling_mode", "lm_segment"), ("--use_lora",)])
def test_lora_is_in_the_checkpoint(flags, small, tmp_path):
    """D17."""
    L.main(["--test", "--mode", "pooling", *flags, "--epochs", "1", "--eval_samples", "4", "--save_dir", str(tmp_path)])
    s = small(*flags, mode="pooling")
    state = core.load_checkpoint(tmp_path / "best_checkpoint.pt")
    assert state["lora"] and any(t.abs().sum() > 0 for n, t in state["lora"].items() if "lora_B" in n)
    batch = s.batch(s.items[:2])

    def logits():
        with s.wire.reading():
            return s.wire.answer_logits(s.wire.build_prefix(batch), batch.gold, batch.gold_mask)

    before = logits()
    s.wire.load(state, "x")
    after = logits()
    assert not torch.equal(before, after) and sum(p.numel() for p in s.wire.to_train) == sum(
        t.numel() for part in ("adapter", "pooler", "lora") for n, t in state.get(part, {}).items() if n != "scale"
    )
    again = small(*flags, mode="pooling")
    again.wire.load(state, "x")
    with again.wire.reading():
        same = again.wire.answer_logits(again.wire.build_prefix(batch), batch.gold, batch.gold_mask)
    assert torch.equal(same, after)


def comparable(result):
    """All of a result but for its times, its environment and what it says of the process."""
    times = "wall_s wall_sec train_seconds tokens_per_s environment manifest config peak_mem_bytes seconds "
    times = [*times.split(), "seconds_per_sample"]
    if not isinstance(result, dict):
        return result
    return {k: comparable(v) for k, v in result.items() if k not in times}


def weights(path):
    state = torch.load(path, weights_only=True)
    names = ("adapter", "pooler", "lora", "optimizer_state_dict", "rng_state")
    return {k: state[k] for k in names if k in state} | {"cosine": state["state"]["cosine"]}


def files_of(directory):
    """Every file of a run by content; the lock and who holds it aside."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name not in (".lock", ".holder")]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def rows_of(directory, kind=""):
    """Rows of the document's log, without their times."""
    rows = [json.loads(line) for line in (directory / "diagnostics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "timestamp"} for r in rows if kind in ("", r["type"])]


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, call)`: `call()` is made while the batch of update n, counted from 0, is put together."""

    def arrange(n, call):
        batch_of = L.training_batch

        def watched(args, data, reader, step, *rest):
            if step == n:
                call()
            return batch_of(args, data, reader, step, *rest)

        monkeypatch.setattr(L, "training_batch", watched)

    return arrange


RUN = ["--test", "--samples", "48", "--epochs", "2", "--eval_samples", "6"]


CURRICULUM = ["pooling", "--pooling_mode", "gist", "--fact_curriculum", "2,4", "--multi_ratio", "8,16"]
CURRICULUM += ["--eval_facts", "6", "--questions_per_context", "2"]


def told(args, wire, data, reader, run, outcome):
    raise core.Failure("trained")


@pytest.mark.parametrize("mode", [["phase1b"], CURRICULUM], ids=["phase1b", "curriculum"])
def test_repeat_cadence_and_resume_are_bitwise_equal(mode, tmp_path, monkeypatch):
    """Check 16: dropout on; evaluating and saving at other steps changes nothing; a run cut at an epoch, here in the
    middle of a stage of the curriculum, goes on."""
    flags = [*RUN, "--mode", *mode]
    whole = L.main([*flags, "--save_dir", str(tmp_path / "a")])
    inert = [*flags, "--quick_eval_every", "3", "--save_every", "2", "--quick_eval_samples", "2"]
    with monkeypatch.context() as patched, pytest.raises(core.Failure, match="trained"):
        patched.setattr(L, "summarise", told)  # nothing is trained after it
        L.main([*inert, "--save_dir", str(tmp_path / "b")])
    assert same_tensors(weights(tmp_path / "a" / "last.pt"), weights(tmp_path / "b" / "last.pt"))
    calls, evaluation = [], L.full_evaluation

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:
            raise core.Failure("cut", 143)
        return evaluation(*args)

    L.full_evaluation = dies
    try:
        with pytest.raises(core.Failure, match="cut"):
            L.main([*flags, "--save_dir", str(tmp_path / "c")])
        stopped = core.load_checkpoint(tmp_path / "c" / "last.pt")
    finally:
        L.full_evaluation = evaluation
    resumed = L.main([*flags, "--resume", "auto", "--save_dir", str(tmp_path / "c")])
    assert same_tensors(weights(tmp_path / "a" / "last.pt"), weights(tmp_path / "c" / "last.pt"))
    assert comparable(resumed) == comparable(whole)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "c")
    if mode == ["phase1b"]:
        return
    reached = stopped["course"]
    assert (stopped["step"], reached["stage"], reached["seen"]) == (6, 1, 2) and reached["answers"][1] > 0
    assert whole["stages"] == [[4, 1], [8, 2]] and list(whole["curve"]) == ["8", "16"]
    for ratio, row in whole["curve"].items():
        assert row["budget"]["code_ratio"] == pytest.approx(float(ratio), rel=0.1) and row["eval_samples"] == 12
        assert set(row["nulls"]) == {"swapped", "no_context", "as_words"} and len(row["f1_by_context"]) == 6
    assert whole["equal_positions"] == whole["curve"]["8"]["equal_positions"]  # at --pool_ratio
    assert set(whole["more_facts"]) == {"6"} and set(whole["more_facts"]["6"]) == {"text", "8", "16"}
    few, many = whole["curve"]["8"], whole["more_facts"]["6"]["8"]
    assert many["eval_samples"] == 12 and many["prefill_positions"] > few["prefill_positions"] + 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_bit_for_bit(signum, at_step, monkeypatch, tmp_path):
    flags = [*RUN, "--mode", "phase1b", "--quick_eval_every", "1000"]
    at_step(4, lambda: signal.raise_signal(signum))
    with pytest.raises(core.Failure, match="interrupted at step 5 of phase1b; continue with --resume auto") as failure:
        L.main([*flags, "--save_dir", str(tmp_path / "cut")])
    assert failure.value.code == 128 + signum
    assert core.load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == 5
    if signum == signal.SIGINT:
        return
    monkeypatch.undo()
    whole = L.main([*flags, "--save_dir", str(tmp_path / "whole")])
    resumed = L.main([*flags, "--resume", "auto", "--save_dir", str(tmp_path / "cut")])
    assert comparable(resumed) == comparable(whole) and len(resumed["manifest"]["segments"]) == 2
    assert same_tensors(weights(tmp_path / "cut" / "last.pt"), weights(tmp_path / "whole" / "last.pt"))
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_a_finished_run_is_not_touched_and_a_longer_one_goes_on(tmp_path):
    flags = [*RUN, "--mode", "phase1a", "--save_dir", str(tmp_path)]
    first = L.main(flags)
    before = files_of(tmp_path)
    again = L.main([*flags, "--resume", "auto", "--save_every", "7"])  # a flag that may differ
    assert again == json.loads(json.dumps(first)) and files_of(tmp_path) == before
    for changed in (["--adapter_lr", "0.1"], ["--seed", "7"], ["--epochs", "1"], ["--samples", "16"]):
        with pytest.raises(core.Failure, match=f"{changed[0][2:]} .* -> ") as failure:
            L.main([*flags, "--resume", "auto", *changed])
        assert failure.value.code == core.BAD_INPUT and files_of(tmp_path) == before
    longer = L.main([*flags, "--resume", "auto", "--epochs", "3"])
    assert (first["steps"], longer["steps"]) == (12, 18) and longer["chosen_from_evaluations"] == 3
    assert longer["train_loss"][: len(first["train_loss"])] == json.loads(json.dumps(first["train_loss"]))


def test_changed_data_is_refused_on_resume(tmp_path, at_step, monkeypatch):
    file, folder = tmp_path / "squad.jsonl", tmp_path / "run"
    rows = [{"title": f"t{i}", "context": f"c {i}", "question": "q", "answers": ["a"]} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--test", "--mode", "phase1a", "--train_file", str(file), "--eval_samples", "2", "--save_dir", str(folder)]
    at_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(core.Failure, match="interrupted"):
        L.main(flags)
    monkeypatch.undo()
    before = files_of(folder)
    file.write_text("\n".join(json.dumps(row | {"question": "r"}) for row in rows))
    with pytest.raises(core.Failure, match="data changed, not what the run began with") as failure:
        L.main([*flags, "--resume", "auto"])
    assert failure.value.code == core.BAD_INPUT and files_of(folder) == before


def test_evaluation_is_not_training_time(tmp_path, monkeypatch):
    """A clock that only updates and evaluations move: the seconds of training are those of the updates alone."""
    now, evaluate, update = [0.0], L.evaluate, core.Loop.update

    def slow_evaluation(*args, **kwargs):
        now[0] += 1000.0
        return evaluate(*args, **kwargs)

    def slow_update(self, *args, **kwargs):
        now[0] += 1.0
        return update(self, *args, **kwargs)

    monkeypatch.setattr(core, "clock", lambda: now[0])
    monkeypatch.setattr(L, "evaluate", slow_evaluation)
    monkeypatch.setattr(core.Loop, "update", slow_update)
    for often in ("1", "1000"):
        folder = str(tmp_path / often)
        result = L.main([*RUN, "--mode", "phase1a", "--quick_eval_every", often, "--save_dir", folder])
        assert result["train_seconds"] == result["wall_sec"] == result["steps"] == 12
        assert result["tokens_per_s"] == result["tokens"] / 12


def test_the_only_valid_checkpoint_is_never_lost(tmp_path, at_step, monkeypatch):
    """A damaged last.pt is not rotated over the good file before it."""
    flags = [*RUN, "--mode", "phase1a", "--save_every", "3", "--save_dir", str(tmp_path)]
    last, previous = tmp_path / "last.pt", tmp_path / "last_previous.pt"

    def damage():
        data = bytearray(last.read_bytes())
        data[len(data) // 2] ^= 1
        last.write_bytes(data)
        signal.raise_signal(signal.SIGTERM)  # the next save would rotate it

    at_step(9, damage)  # saved at 3, 6 (an epoch's end) and 9
    with pytest.raises(core.Failure, match="interrupted at step 10"):
        L.main(flags)
    assert core.load_checkpoint(last)["step"] == 10 and core.load_checkpoint(previous)["step"] == 6
    last.write_bytes(b"cut short")
    monkeypatch.undo()
    resumed = L.main([*flags, "--resume", "auto"])
    assert resumed["steps"] == 12 and core.load_checkpoint(last)["step"] == 12


def test_logs_of_two_runs_never_mix(tmp_path):
    """D18."""
    flags = [*RUN, "--mode", "phase1a", "--epochs", "1", "--save_dir", str(tmp_path)]
    L.main(flags)
    first = (tmp_path / "diagnostics.jsonl").read_text()
    L.main(flags)  # a --test run may be replaced
    (kept,) = tmp_path.glob("diagnostics.jsonl.bak-*")
    assert kept.read_text() == first
    rows = [json.loads(line) for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["type"] == "full_eval"] == [6]


def test_quick_scores_select_nothing(tmp_path, monkeypatch):
    """D19: the best checkpoint follows full evaluations alone."""
    real_evaluate = L.evaluate

    def generous(wire, items, reader, *args, **kwargs):
        found = real_evaluate(wire, items, reader, *args, **kwargs)
        return found | {"f1": 0.9} if len(items) == 2 else found

    monkeypatch.setattr(L, "evaluate", generous)
    result = L.main(
        [
            *RUN,
            "--mode",
            "phase1a",
            "--batch_size",
            "8",
            "--quick_eval_every",
            "2",
            "--quick_eval_samples",
            "2",
            "--save_dir",
            str(tmp_path),
        ]
    )
    assert result["best_f1"] < 0.9
    rows = [json.loads(line) for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines()]
    assert any(r.get("quick_f1") == 0.9 for r in rows)


def test_warm_start_continues_where_the_checkpoint_stood(finished, tmp_path):
    """Check 15: the first step's cosine is the saved adapter's; PCA is not fitted again; another k is refused."""
    source = finished[0] / "phase1a" / "adapter_phase1_best.pt"
    flags = ["--test", "--mode", "phase1b", "--ckpt_in", str(source), "--adapter_dropout", "0", "--save_dir"]
    result = L.main(
        [
            *flags,
            str(tmp_path / "w"),
            "--epochs",
            "1",
            "--samples",
            "8",
            "--pca_samples",
            "3",
            "--ckpt_out",
            str(tmp_path / "o.pt"),
        ]
    )
    state = core.load_checkpoint(source)
    after = core.load_checkpoint(tmp_path / "o.pt")
    assert torch.equal(after["compressor_projection"], state["compressor_projection"]) and result["best_f1"] >= 0
    with pytest.raises(core.Failure, match=r"k = 16, --compress_dim asks for 8"):
        L.main([*flags, str(tmp_path / "x"), "--compress_dim", "8"])
    args = L.parse([*flags, str(tmp_path / "y")])
    accelerator = core.engine(args)
    base, tokenizer = L.load_base(args, accelerator)
    data = L.load_data(args, tokenizer, 259)
    wire = L.make_wire(args, base, data, state).eval()
    reader = L.make_reader(args, tokenizer, accelerator, accelerator.device)
    first = L.evaluate(wire, data.evaluation, reader)["recon_cosine_sim"]
    assert first == pytest.approx(finished[1]["phase1a"]["recon_cosine_sim"], abs=1e-3)


def test_the_model_is_loaded_once(tmp_path, monkeypatch):
    """D23: the teacher is the student's own base."""
    calls, load = [], core.load_backbone
    monkeypatch.setattr(core, "load_backbone", lambda *a, **k: calls.append(a) or load(*a, **k))
    L.main([*RUN, "--mode", "phase1b", "--epochs", "1", "--samples", "8", "--save_dir", str(tmp_path)])
    assert len(calls) == 1


def test_the_scale_is_measured_and_printed_at_the_start(tmp_path, capsys):
    """D5: the table's and the prompts' RMS stand in the log, and are those of this model."""
    L.main([*RUN, "--mode", "phase1a", "--epochs", "1", "--samples", "8", "--save_dir", str(tmp_path)])
    shown = re.search(r"RMS of the table's rows ([\d.]+), of prompt tokens ([\d.]+)", capsys.readouterr().out)
    state = core.load_checkpoint(tmp_path / "last.pt")
    table = core.load_backbone("tiny")[0].get_input_embeddings().weight
    assert float(shown[1]) == pytest.approx(table.square().mean(1).sqrt().mean().item(), abs=1e-4)
    assert float(shown[2]) == pytest.approx(state["token_rms"], abs=1e-4) and shown[1] != shown[2]


def test_run_name_and_the_sweeps_zero_control(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = L.main(
        [
            "--test",
            "--mode",
            "phase1b",
            "--samples",
            "8",
            "--epochs",
            "1",
            "--lambda_kce",
            "0",
            "--lambda_kd",
            "0",
            "--run_name",
            "zero",
            "--eval_samples",
            "4",
        ]
    )
    assert (tmp_path / "runs" / "zero" / "diagnostics.jsonl").exists() and result["lambda_kce"] == 0
    args = L.parse(["--mode", "phase1b", "--run_name", "x"])
    assert args.save_dir == "runs/x" and args.diagnostic_log == "runs/x/diagnostics.jsonl"


def test_updates_are_clipped_and_the_cosine_is_averaged(tmp_path, monkeypatch):
    """Section 4.6 and 4.4: the norm before clipping is logged, the norm after it is at most 1; EMA(0.9) of the batch
    cosine."""
    cosines, norms, forward, step = [], [], L.Objective.forward, torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        terms = forward(self, *args, **kwargs)
        cosines.append(float(terms["cos"]))
        return terms | {"loss": 100 * terms["loss"]}  # a gradient that has to be clipped

    def stepped(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(L.Objective, "forward", watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    L.main([*RUN, "--mode", "phase1a", "--save_dir", str(tmp_path)])
    assert norms == pytest.approx([1.0] * 12, abs=1e-4)
    assert all(row["grad_norm"] > 1.5 for row in rows_of(tmp_path, "train"))
    average = cosines[0]
    for cosine in cosines[1:]:
        average = 0.9 * average + 0.1 * cosine
    assert float(core.load_checkpoint(tmp_path / "last.pt")["state"]["cosine"]) == pytest.approx(average, abs=1e-6)


def test_the_rewriting_loss_is_on_every_other_update_until_half(tmp_path, monkeypatch):
    """Section 3.6, step 6: 0.5 at the start, falling to 0 at half of the training; and it reaches the loss."""
    args = L.parse(["--test", "--mode", "pooling", "--pooling_mode", "lm_segment"])
    assert [L.rewriting_weight(args, n, 8) for n in range(8)] == [0, 0.375, 0, 0.125, 0, 0, 0, 0]
    assert L.rewriting_weight(dataclasses.replace(args, pooling_mode="generation_loss"), 1, 8) == 0
    seen, forward = [], L.Objective.forward

    def watched(self, batch, kce, kd, ae):
        terms = forward(self, batch, kce, kd, ae)
        seen.append((ae, "ae" in terms))
        return terms

    monkeypatch.setattr(L.Objective, "forward", watched)
    flags = ["--mode", "pooling", "--pooling_mode", "lm_segment", "--pool_ratio", "8", "--save_dir", str(tmp_path)]
    L.main([*RUN, *flags, "--samples", "32"])
    assert seen == [(w, w > 0) for w in (0, 0.375, 0, 0.125, 0, 0, 0, 0)]


def test_the_encoder_learns_at_its_own_rate(small):
    """Section 3.6, step 7; of the matrices alone some is taken away."""
    s = small("--pooling_mode", "lm_segment", "--enc_lora_lr", 3e-4, "--adapter_lr", 2e-3, mode="pooling")
    groups = L.decay_groups(s.wire, s.args)
    lora = {id(p) for p in s.wire.lora.weights.values()}
    by_id = {id(p): group for group in groups for p in group["params"]}
    assert set(by_id) == {id(p) for p in s.wire.to_train} and len(lora) > 4
    for p in s.wire.to_train:
        assert by_id[id(p)]["peak"] == by_id[id(p)]["lr"] == (3e-4 if id(p) in lora else 2e-3)
        assert by_id[id(p)]["weight_decay"] == (0.01 if p.ndim >= 2 else 0)
    reader = small("--use_lora", "--enc_lora_lr", 3e-4, mode="pooling")  # a decoder's LoRA is no encoder
    assert {group["lr"] for group in L.decay_groups(reader.wire, reader.args)} == {reader.args.adapter_lr}


def test_the_best_evaluation_is_kept_and_judged(tmp_path, monkeypatch):
    """The best checkpoint holds the weights of the best evaluation, not of the last; the rivals and what the result
    says beside it are measured with them."""
    weights_at, judged, evaluation, rivals = [], [], L.full_evaluation, L.rivals

    def scored(wire, *rest):
        weights_at.append({k: v.clone() for k, v in wire.adapter.state_dict().items()})
        return evaluation(wire, *rest) | {"f1": (0.2, 0.7, 0.4)[len(weights_at) - 1]}

    def watched(args, wire, *rest):
        judged.append({k: v.clone() for k, v in wire.adapter.state_dict().items()})
        return rivals(args, wire, *rest)

    monkeypatch.setattr(L, "full_evaluation", scored)
    monkeypatch.setattr(L, "rivals", watched)
    result = L.main([*RUN, "--mode", "phase1a", "--epochs", "3", "--save_dir", str(tmp_path)])
    best = core.load_checkpoint(tmp_path / "adapter_phase1_best.pt")
    assert (result["best_f1"], result["last_f1"], best["best_f1"], best["epoch"]) == (0.7, 0.4, 0.7, 1)
    assert same_tensors(best["adapter"], weights_at[1]) and same_tensors(judged[0], weights_at[1])
    assert not same_tensors(weights_at[1], weights_at[2])
    assert same_tensors(core.load_checkpoint(tmp_path / "last.pt")["adapter"], weights_at[2])


def test_another_projection_or_match_is_passed_and_not_left_behind(small, monkeypatch):
    """A baseline that fails half-way leaves the wire as it was."""
    s = small(mode="baselines")
    projection, args, batch = s.wire.projection, s.wire.args, s.batch(s.items[:2])
    usual = s.wire.token_prefix(batch).code
    vocab = s.wire.token_prefix(batch, match="vocab").code
    assert torch.allclose(L.rms(vocab), torch.tensor(projection.rms), rtol=1e-4) and not torch.equal(vocab, usual)
    monkeypatch.setattr(L, "greedy_generate", lambda *a: (_ for _ in ()).throw(RuntimeError("half-way")))
    with pytest.raises(RuntimeError, match="half-way"):
        L.pca_row(s.args, s.wire, s.data, s.reader)
    assert s.wire.projection is projection and s.wire.args is args
    assert torch.equal(s.wire.token_prefix(batch).code, usual)


def test_an_evaluation_of_a_checkpoint_has_one_set_of_flags(finished, tmp_path):
    """The shape comes from the file, and the result says so."""
    for mode, file, pooled in (("pooling", "best_checkpoint.pt", True), ("phase1a", "adapter_phase1_best.pt", False)):
        words = ["--test", "--mode", "eval", "--ckpt_in", str(finished[0] / mode / file), "--compress_dim", "8"]
        args, _ = L.adopt(L.parse(words))
        assert (args.mode, args.pooled, args.compress_dim) == ("eval", pooled, 16)
        result = L.main([*words, "--save_dir", str(tmp_path / mode)])
        assert result["mode"] == "eval" and result["config"]["compress_dim"] == 16
        assert result["config"] == result["manifest"]["flags"]


@pytest.mark.parametrize("mode", ["baselines", "embed_sweep", "eval"])
def test_a_mode_that_does_not_train_can_be_stopped(mode, finished, tmp_path, monkeypatch):
    evaluate = L.evaluate
    monkeypatch.setattr(L, "evaluate", lambda *a, **k: (signal.raise_signal(signal.SIGTERM), evaluate(*a, **k))[1])
    words = ["--test", "--mode", mode, "--samples", "4", "--eval_samples", "4", "--save_dir", str(tmp_path)]
    words += ["--baseline", "embed_raw,snap", "--ckpt_in", str(finished[0] / "phase1a" / "adapter_phase1_best.pt")]
    words += ["--compress_dim", "16"]
    with pytest.raises(core.Failure, match="interrupted") as failure:
        L.main(words if mode != "embed_sweep" else words[: words.index("--baseline")])
    assert failure.value.code == 143 and not (tmp_path / "summary.json").exists()


# ------------------------------------------------------------------------------------------------- legacy (3.7)
def test_legacy_objectives_break_the_identity(small):
    """D6: with the true embeddings as prefix the published losses are not zero and see the padding."""
    s = small("--k_tokens", 2)
    item, other = s.items[0], longer(s.items[1], 40)
    alone, beside = s.batch([item]), s.batch([item, other])
    good = s.objective.objectives(s.wire.text_prefix(alone), alone, 2, True)
    published = L.PublishedObjective(s.wire, None, s.tok)
    bad = published.objectives(s.wire.text_prefix(alone), alone, 2, True)
    assert good["kd"] < 1e-5 < 1e-3 < bad["kd"]
    assert abs(bad["kce"] - good["kce"]) > 1e-3
    with torch.no_grad():
        rows = [
            s.wire.answer_logits(published.anchored(s.wire.text_prefix(b)), b.gold[:, :1], b.gold_mask[:, :1])[0]
            for b in (alone, beside)
        ]
        fine = [
            s.wire.answer_logits(s.wire.text_prefix(b), b.gold[:, :1], b.gold_mask[:, :1])[0] for b in (alone, beside)
        ]
    assert not torch.allclose(*rows, atol=1e-3) and torch.allclose(*fine, atol=1e-4)


def test_legacy_pooling_has_no_parity_between_training_and_use(small, tmp_path):
    """D10 as published: what training continues from is not what inference continues from."""
    s = small("--legacy", "--pooling_mode", "generation_loss", mode="pooling")
    batch = s.batch(s.items[:2])
    prefix = s.wire.build_prefix(batch)
    trained = s.wire.answer_logits(s.objective.anchored(prefix), batch.gold, batch.gold_mask)[:, 0]
    used = L.greedy_generate(s.base, prefix, 1, torch.tensor([-1]))[1]
    assert not torch.allclose(trained, used, atol=1e-3)
    beside = s.batch([s.items[0], longer(s.items[1], 40)])
    assert not torch.allclose(prefix.code[0], s.wire.build_prefix(beside).code[0], atol=1e-4)  # padding is read
    result = L.main([*RUN, "--mode", "pooling", "--legacy", "--epochs", "1", "--save_dir", str(tmp_path)])
    assert result["legacy"] is True


def test_legacy_hybrid_is_not_a_number_and_the_corrected_one_is(tmp_path):
    """D12: the published zero fill under a root without epsilon; the run ends with exit code 3."""
    flags = [*RUN, "--mode", "pooling", "--pooling_mode", "hybrid_expand", "--epochs", "1", "--batch_size", "2"]
    flags += [
        "--question_scope",
        "compressed",
        "--sequence_pooling_target",
        "120",
    ]  # prompts have 121 to 239 tokens: each is filled up with zeros
    with pytest.raises(core.Failure, match="not finite 20 times in a row, up to step 20") as failure:
        L.main([*flags, "--legacy", "--save_dir", str(tmp_path / "a")])
    assert failure.value.code == core.DIVERGED and "(the term recon is not finite)" in str(failure.value)
    sound = L.main([*flags, "--save_dir", str(tmp_path / "b")])
    assert sound["nonfinite_steps"] == 0 and math.isfinite(sound["train_loss"][-1][1])


# --------------------------------------------------------------------------------------------- bad input (check 17)
MADE = ["--dataset", "synthetic"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mode", "pooling", "--pooling_mode", "bogus"], "invalid choice"),
        (["--mode", "phase1b", "--anneal_epochs", "-1"], "--anneal_epochs must be positive"),
        (["--mode", "phase1b", "--k_tokens", "0"], "--k_tokens must be at least 1"),
        (["--mode", "phase1a", "--legacy"], "--legacy is for"),
        (["--mode", "pooling", "--legacy", "--pooling_mode", "gist"], "gist is ours and has no published form"),
        (["--mode", "pooling", "--legacy", "--question_scope", "kept"], "use --question_scope compressed"),
        (["--mode", "pooling", "--questions_per_context", "0"], "--questions_per_context must be at least 1"),
        (["--mode", "pooling", "--multi_ratio", "4,2"], "--multi_ratio: in rising order"),
        (["--mode", "pooling", "--multi_ratio", "0.5,2"], "--pool_ratio, --multi_ratio: at least 1"),
        (["--mode", "pooling", "--multi_ratio", "2,x"], "2,x: use numbers with commas between them"),
        (["--mode", "pooling", "--multi_ratio", "2,4", "--pool_ratio", "3"], "must be one of --multi_ratio 2,4"),
        (["--mode", "pooling", *MADE, "--facts", "33"], "facts: whole numbers from 2 to 32"),
        (["--mode", "pooling", *MADE, "--fact_curriculum", "1,4"], "facts: whole numbers from 2 to 32"),
        (["--mode", "pooling", *MADE, "--eval_facts", "5.5"], "facts: whole numbers from 2 to 32"),
        (["--mode", "pooling", *MADE, "--eval_facts", "4"], "--eval_facts 4: more than --facts 4"),
        (["--mode", "pooling", *MADE, "--fact_curriculum", "2,8"], "2,8 must end in --facts 4"),
        (["--mode", "pooling", "--fact_curriculum", "2,4"], "for --dataset synthetic alone"),
        (["--mode", "pooling", "--eval_facts", "8"], "for --dataset synthetic alone"),
        (["--mode", "pooling", *MADE, "--train_file", "x", "--eval_facts", "8"], "for --dataset synthetic alone"),
        (["--mode", "pooling", "--rms_match", "per_token"], "needs a token for each slot"),
        (["--mode", "baselines", "--baseline", "nope"], "--baseline nope"),
        (["--mode", "embed_sweep", "--experiment", "nope"], "--experiment nope"),
        (["--mode", "eval"], "needs --ckpt_in"),
        (["--mode", "phase1a", "--eval_file", "x"], "needs --train_file"),
        (["--mode", "phase1a", "--unknown", "1"], "unrecognized"),
        ([], "--mode is needed"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    with pytest.raises(core.Failure, match=re.escape(message)) as failure:
        L.parse(flags)
    assert failure.value.code == core.BAD_INPUT and "\n" not in str(failure.value)


def test_bad_input_at_run_time(tmp_path, monkeypatch):
    def fails(match, *flags):
        with pytest.raises(core.Failure, match=match):
            L.main(["--test", "--overwrite", "--save_dir", str(tmp_path / "r"), *flags])

    fails("exceeds the model's width 64", "--mode", "phase1a", "--compress_dim", "65")
    fails("--input_dim 4096 differs from the model's width 64", "--mode", "phase1a", "--input_dim", "4096")
    fails("No such file", "--mode", "phase1a", "--train_file", str(tmp_path / "none.json"))
    fails("--max_length 20 leaves nothing", "--mode", "pooling", "--question_scope", "kept", "--max_length", "20")
    L.main(
        [
            "--test",
            "--mode",
            "pooling",
            "--pooling_mode",
            "lm_segment",
            "--epochs",
            "1",
            "--samples",
            "8",
            "--eval_samples",
            "2",
            "--save_dir",
            str(tmp_path / "seg"),
        ]
    )  # a checkpoint without an adapter
    fails(
        "it holds no adapter",
        "--mode",
        "baselines",
        "--baseline",
        "snap",
        "--ckpt_in",
        str(tmp_path / "seg" / "best_checkpoint.pt"),
    )
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "answers": []}]}]}]}))
    fails("record 1", "--mode", "phase1a", "--train_file", str(bad))
    fails("No such file", "--mode", "eval", "--ckpt_in", str(tmp_path / "none.pt"))
    fails("tiny", "--mode", "phase1a", "--model_id", "nobody/nothing")
    monkeypatch.setitem(sys.modules, "peft", None)
    fails("pip install peft", "--mode", "pooling", "--use_lora")


def test_environment_of_the_teacher_is_checked(monkeypatch):
    monkeypatch.setenv("KD_TEACHER_CHUNK", "7")
    assert L.parse(["--mode", "phase1b"]).kd_chunk == 7
    assert L.parse(["--mode", "phase1b", "--kd_chunk", "2"]).kd_chunk == 2
    monkeypatch.setenv("KD_TEACHER_CHUNK", "many")
    with pytest.raises(core.Failure, match="KD_TEACHER_CHUNK=many"):
        L.parse(["--mode", "phase1b"])


def test_a_nan_names_its_term(tmp_path, monkeypatch):
    """Check 17: injected into the adapter; the run ends after twenty updates in a row that could not be made."""
    reset = L.Adapter.reset
    monkeypatch.setattr(L.Adapter, "reset", lambda self, *a: (reset(self, *a), self.skip.weight.data.fill_(torch.nan)))
    with pytest.raises(core.Failure, match=r"up to step 20: .*\(the term recon is not finite\)") as failure:
        L.main(["--test", "--mode", "phase1a", "--samples", "200", "--eval_samples", "4", "--save_dir", str(tmp_path)])
    assert failure.value.code == core.DIVERGED and not (tmp_path / "summary.json").exists()
    assert rows_of(tmp_path, "diverged") == [{"type": "diverged", "step": 20, "term": "recon"}]


def test_a_single_nan_costs_one_update(tmp_path, monkeypatch):
    calls, forward = [], L.Objective.forward

    def sometimes(self, *args, **kwargs):
        calls.append(1)
        terms = forward(self, *args, **kwargs)
        return terms | {"loss": terms["loss"] * torch.nan} if len(calls) == 3 else terms

    monkeypatch.setattr(L.Objective, "forward", sometimes)
    result = L.main([*RUN, "--mode", "phase1a", "--save_dir", str(tmp_path)])
    assert result["nonfinite_steps"] == 1 and all(math.isfinite(loss) for _, loss in result["train_loss"])
    assert all(p.isfinite().all() for p in core.load_checkpoint(tmp_path / "last.pt")["adapter"].values())


def llama(folder, **sizes):
    """The configuration of a Llama, by default of the documented size, in a folder without weights."""
    shape = dict(hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32)
    shape |= dict(num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False) | sizes
    LlamaConfig(**shape).save_pretrained(folder)
    return str(folder)


def test_a_large_model_is_not_crawled_through_on_a_cpu(tmp_path):
    """D22."""
    with pytest.raises(core.Failure, match="8,030,261,248 parameters and there is no CUDA device"):
        L.main(["--test", "--mode", "phase1a", "--model_id", llama(tmp_path / "m"), "--save_dir", str(tmp_path / "r")])


def test_lora_on_a_model_without_such_layers_is_one_line(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=99))
    with pytest.raises(core.Failure, match="a GPT2LMHeadModel has no layers q_proj, v_proj") as failure:
        L.Lora().add(base, "qv", 2, 4, None, 0.0, seed=0)
    assert "\n" not in str(failure.value)


@pytest.mark.slow
def test_out_of_memory_names_the_flags(script, tmp_path):
    """D24, and one line without a traceback."""
    code = "import sys, core, latentwire_stage1 as L\nL.main = lambda: (_ for _ in ()).throw(MemoryError())\n"
    code += (ROOT / "latentwire_stage1.py").read_text().splitlines()[-1].strip().replace("main,", "L.main,")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "--kd_chunk" in done.stderr and "--batch_size" in done.stderr
    done = script("latentwire_stage1.py", "--mode", "phase1b", "--k_tokens", "0")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_dry_run_at_the_documented_size(tmp_path, capsys):
    model = ["--model_id", llama(tmp_path / "m"), "--dtype", "bf16", "--dry_run"]
    plan = L.main(["--mode", "phase1a", *model])
    assert plan["parameters"] == 50_374_657 and plan["steps"] == 3 * (10000 // 64)
    assert plan["trained_parameters"] == 50_374_656 and plan["tokens"] == plan["steps"] * 64 * 384
    assert json.loads(capsys.readouterr().out) == plan and "time" not in plan
    assert L.main(["--mode", "phase1b", "--epochs", "1", *model])["steps"] == 1250
    pooled = L.main(["--mode", "pooling", "--pooling_mode", "hierarchical", "--use_lora", *model])
    assert pooled["parameters"] == 50_374_657 + 13_062_144 + 425_984
    with pytest.raises(core.Failure, match=r"3\.1-8B-Instruct: the hub cannot be reached") as failure:
        L.main(["--mode", "phase1a", "--dry_run"])
    assert failure.value.code == core.BAD_INPUT


def test_dry_run_counts_the_base_model(tmp_path):
    model = ["--model_id", llama(tmp_path), "--dtype", "bf16", "--dry_run"]

    def memory(*flags):
        gb = L.main([*flags, *model])["memory_gb"]
        assert gb["total"] == pytest.approx(sum(v for k, v in gb.items() if k != "total"))
        return gb

    half, four = memory("--mode", "phase1b"), memory("--mode", "phase1b", "--load_4bit")
    inside = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # attention and FFN matrices
    adapter = 16 * 50_374_656 + 4  # fp32 with gradient and two moments; the scale that colour makes idle
    assert half["weights_and_optimizer"] == pytest.approx((2 * 8_030_261_248 + adapter) / 1e9)
    less = half["weights_and_optimizer"] - four["weights_and_optimizer"]
    assert less == pytest.approx(inside * (2 - 0.5625) / 1e9)
    assert half["activations"] == pytest.approx(34 * 8 * 384 * 4096 * 32 / 1e9)
    assert memory("--mode", "phase1a")["activations"] == 0


@pytest.mark.parametrize("mode", [("phase1b",), *(("pooling", "--pooling_mode", m) for m in POOLERS)])
def test_dry_run_counts_what_will_be_trained(mode, small, tmp_path, monkeypatch):
    """The planned parameters and steps are those of the run."""
    monkeypatch.chdir(tmp_path)
    plan = L.main([*RUN, "--mode", *mode, "--dry_run"])
    s = small(*mode[1:], mode=mode[0])
    assert plan["trained_parameters"] == sum(p.numel() for p in s.wire.to_train)
    assert (plan["width"], plan["k"], plan["steps"]) == (64, 16, 12) and not list(tmp_path.iterdir())
    assert plan["tokens"] == 12 * 8 * 384 * (3 if mode[0] == "pooling" else 1)  # all questions of each context


def test_the_smoke_test_prints_what_a_person_reads(finished):
    """No dump of the flags, which stand in the manifest."""
    lines = finished[2].splitlines()
    assert len(lines) < 150 and not any("adapter_hidden_mult" in line for line in lines)
    assert sum(line.startswith("LatentWire ") for line in lines) == len(L.MODES)
    manifest = json.loads((finished[0] / "phase1b" / "manifest.json").read_text())
    assert manifest["flags"]["adapter_hidden_mult"] == 4 and set(manifest["inputs"]) == {"data", "tokenizer", "base"}


def test_defaults_are_the_documented_ones():
    a, b, p = (L.parse(["--mode", m]) for m in ("phase1a", "phase1b", "pooling"))
    assert (a.epochs, a.batch_size, a.save_dir, a.rms_match) == (3, 64, "runs/stage1_adapter_only", "per_token")
    assert (b.epochs, b.batch_size, b.lambda_kce, b.lambda_kd, b.k_tokens) == (3, 8, 0.01, 0.01, 4)
    assert (p.epochs, p.batch_size, p.rms_match, p.sequence_pooling_target) == (1, 8, "vocab", 75)
    assert (a.samples, a.compress_dim, a.pca_samples, a.adapter_lr, a.seed) == (10000, 1024, 5000, 5e-4, 42)
    assert L.parse(["--mode", "baselines"]).samples == 1000 and L.parse(["--mode", "embed_sweep"]).samples == 100
    assert L.parse(["--mode", "baselines", "--latent_len", "16"]).token_budget == 16
    assert L.parse(["--mode", "phase1b"]).kd_chunk == 4 and not set(string.punctuation) & set(a.extract)


# ------------------------------------------------------------------------------------------- on the reader (slow)
def on_reader(reader_dir, tmp_path, name, *flags):
    words = [
        "--model_id",
        reader_dir,
        "--dataset",
        "synthetic",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--adapter_lr",
        "2e-3",
        "--pca_samples",
        "2000",
        "--eval_samples",
        "512",
        "--max_new_tokens",
        "4",
    ]
    return L.main([*words, *map(str, flags), "--save_dir", str(tmp_path / name)])


@pytest.mark.slow
def test_reader_answers_text_and_replayed_embeddings_alike(reader_dir, tmp_path):
    """Check 2: EM at least .90; embed_raw is text, token for token; snap with every token recovered is text too."""
    found = on_reader(reader_dir, tmp_path, "b", "--mode", "baselines", "--samples", 512, "--compress_dim", 48)
    assert found["rows"]["text"]["em"] >= 0.90 and found["text_equals_replay"] is True
    assert found["rows"]["snap"]["em"] == found["rows"]["text"]["em"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scaling_is_harmless_on_the_reader(reader_dir, tmp_path, dtype):
    """Check 7: F1 within .10 of the baseline for s in [.7, 1.5], and nothing empty."""
    found = on_reader(reader_dir, tmp_path, "s", "--mode", "embed_sweep", "--samples", 256, "--dtype", dtype)
    rows = {r["experiment"]: r for r in found["results"]}
    for s in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5):
        row = rows[f"rms_scale{s}"]
        assert abs(row["f1"] - rows["baseline"]["f1"]) <= 0.10 and row["empty_rate"] == 0, (s, row["f1"])


@pytest.mark.slow
@pytest.mark.parametrize("k, least", [(32, 0.8), (16, 0.8)])
def test_width_compression_keeps_the_answers(reader_dir, tmp_path, k, least):
    """Check 8 and 5: F1 at least .8 of text at k = d/2 and d/4, cosine at least .90 and not below the linear decoder's;
    snap equals text where every token is recovered."""
    flags = ("--mode", "phase1a", "--compress_dim", k, "--samples", 4000, "--epochs", 10)
    found = on_reader(reader_dir, tmp_path, "p", *flags)
    assert found["share_of_text"] >= least and found["recon_cosine_sim"] >= 0.90
    assert found["recon_cosine_sim"] >= found["pca_ceiling_cos"] - 0.02
    rows = found["baselines_same_protocol"]
    assert found["token_recon_acc"] < 1 or rows["snap"]["f1"] == rows["text"]["f1"]


@pytest.mark.slow
def test_corrected_losses_do_not_collapse(reader_dir, tmp_path):
    """Check 14: at both weights 0.5 F1 stays at least half of that without them."""
    f1 = {}
    for weight in (0.0, 0.5):
        flags = (
            "--mode",
            "phase1b",
            "--compress_dim",
            16,
            "--samples",
            6000,
            "--epochs",
            1,
            "--batch_size",
            8,
            "--lambda_kce",
            weight,
            "--lambda_kd",
            weight,
            "--k_tokens",
            2,
        )
        f1[weight] = on_reader(reader_dir, tmp_path, f"w{weight}", *flags)["best_f1"]
    assert f1[0.5] >= 0.5 * f1[0.0], f1


@pytest.mark.slow
def test_pooling_on_the_reader(reader_dir, tmp_path):
    """Check 13 at ratio 2 in the document's form, all compressed: a bag of words stays low, lm_segment answers."""
    flags = (
        "--mode",
        "pooling",
        "--compress_method",
        "none",
        "--pool_ratio",
        2,
        "--samples",
        24000,
        "--batch_size",
        48,
        "--enc_lora_lr",
        "2e-3",
        "--question_scope",
        "compressed",
    )
    bag = on_reader(reader_dir, tmp_path, "bag", *flags, "--pool_positions", "none", "--epochs", 2)
    ours = on_reader(reader_dir, tmp_path, "seg", *flags, "--pooling_mode", "lm_segment", "--epochs", 2)
    assert bag["em"] <= 0.35 < 0.80 <= ours["em"]
    assert ours["rival"]["gap"]["lo"] > 0
