"""Cognate phase 1: spec section 8 (lessons 1-16) and section 11 (acceptance checks 1-16)."""

import csv
import dataclasses
import hashlib
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, same_tensors

import core
import train_phase1_cognate as C

V = 259
RUN = ["--test", "--model", "reasoning", "--synth-rows", "40"]
DOCUMENTED = [  # everything after the script's name, in the document and in its repository
    "--model reasoning --test --epochs 1",
    "--model reasoning --epochs 10 --batch-size 16 --wandb-mode offline",
    "--model reasoning --epochs 10",
    "--all",
    "--model memory --epochs 10 --batch-size 16",
    "--model speed --epochs 10 --batch-size 16",
    "--model reasoning --epochs 10 --batch-size 16 --wandb-mode offline "
    "--datasets gsm8k svamp mbpp arc_easy piqa wikitext",
    "--model reasoning --batch-size 8",
    "--model reasoning --device cpu",
    "--model reasoning --wandb-mode disabled",
    "--specialization memory",
    "--model reasoning --epochs 5 --batch-size 8 --datasets gsm8k svamp mbpp arc_easy arc_challenge hellaswag "
    "--checkpoint-dir checkpoints_nuclear_fix/phase1",
    "--model reasoning --act-diversity-weight 0.05",
    "--model reasoning --no-act",
    "--model reasoning --muon-lr 2e-3",
    "--model reasoning --no-curriculum",
    "--model reasoning --gradient-checkpointing",
]


def config(specialisation="reasoning", window=1024, **flags):
    """A tiny model's configuration without dropout; `flags` change the backbone."""
    c = C.model_config(
        C.parse(["--model", specialisation, "--size", "tiny", "--max-length", "64", "--dropout", "0"]),
        specialisation,
        V,
    )
    c.titans_config = dataclasses.replace(c.titans_config, sw_window=window, **flags)
    return c


def tiny(specialisation="reasoning", window=1024, strong=True, **flags):
    """A tiny model; `strong` weights make every mechanism visible in the output."""
    model = C.TRMTitansMAGModel(config(specialisation, window, **flags))
    for name, p in model.named_parameters() if strong else ():
        if p.ndim == 2:
            p.data.copy_(torch.normal(0.0, 0.15, p.shape, generator=core.generator(7, name)))
    return model.eval()


def tokens(*shape, seed=0, high=V):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- sizes, config
@pytest.mark.parametrize("name", C.SPECIALISATIONS)
def test_check_1_parameters_are_the_documented_ones(name, capsys):
    plan = C.main(["--dry-run", "--model", name])[name]
    table = plan["parameters"]
    assert table["total"] == 25_623_681 and table["embeddings"] == 13_390_080
    assert table["layers+ltm+mag_gate+norm"] == 10_655_360 and table["trm"] == 1_577_984 and table["act_head"] == 257
    assert table["layers"] == 10_490_880 and table["ltm"] == 65_536 and table["mag_gate"] == 98_688
    assert table["muon"] == 12_222_464 and table["adamw"] == 13_401_217
    printed = capsys.readouterr().out
    assert all(f"{n:,d}" in printed for n in (25_623_681, 13_390_080, 10_655_360, 12_222_464))
    with torch.device("meta"):
        model = C.TRMTitansMAGModel(C.Phase1Config(specialization=name))
    buffers = {n for n, _ in model.named_buffers()}
    state = {k: v for k, v in model.state_dict().items() if k not in buffers and k != "lm_head.weight"}
    assert sum(v.numel() for v in state.values()) == 25_623_681
    counts = model.count_parameters()
    assert counts["lm_head"] == 0 and counts["total"] == 25_623_681 and counts["backbone"] == 13_390_080 + 10_655_360


@pytest.mark.parametrize("d, layers, vocabulary, expected", [(320, 8, 50257, 32_571_041), (320, 8, 32768, 26_974_561)])
def test_the_formula_gives_the_other_totals_of_the_repository(d, layers, vocabulary, expected):
    titans = C.TitansMAGConfig(
        d_model=d,
        n_layers=layers,
        n_heads=4,
        head_dim=80,
        d_ff=4 * d,
        d_mem=d // 2,
        mag_hidden=d // 2,
        vocab_size=vocabulary,
    )
    with torch.device("meta"):
        assert C.TRMTitansMAGModel(C.Phase1Config(titans_config=titans)).count_parameters()["total"] == expected


def test_specialisations_and_their_round_trip():
    configs = C.create_model_configs()
    assert [c.act_config.halt_threshold for c in configs.values()] == [0.95, 0.90, 0.99]
    assert [round(c.titans_config.memory_decay, 6) for c in configs.values()] == [0.99, 0.995, 0.98]
    assert [c.seeds[n] for n, c in configs.items()] == [42, 1337, 2023]
    for c in configs.values():
        c.act_config.halt_threshold = 0.7  # what a flag may set survives
        again = C.Phase1Config.from_dict(json.loads(json.dumps(c.to_dict())))
        assert again == c and again.act_config.halt_threshold == 0.7
    assert C.step_weights(3) == [0.33, 0.5, 0.75, 1.0] and C.step_weights(1) == [0.33, 1.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: C.TitansMAGConfig(d_model=100, n_heads=3),
        lambda: C.TitansMAGConfig(head_dim=32),
        lambda: C.TitansMAGConfig(memory_decay=1.0),
        lambda: C.TRMConfig(T_max=4),
        lambda: C.Phase1Config("wise"),
        lambda: C.TRMConfig(T_max=10, step_weights=C.step_weights(10)),
        lambda: C.Phase1Config.from_dict({"x": 1}),
    ],
)
def test_check_15_bad_configurations_are_value_errors(make):
    with pytest.raises(ValueError):
        make()


def test_lesson_13_specialisations_share_an_architecture_and_not_their_weights():
    models = [tiny(n, strong=False) for n in C.SPECIALISATIONS]
    for a in models:
        for b in models:
            C.TRMTitansMAGModel(config()).load_state_dict(b.state_dict())
            if a is not b:
                assert not torch.equal(a.trm.z0_proj.weight, b.trm.z0_proj.weight)


def test_the_head_is_tied_and_stays_so():
    model = tiny()
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    model = model.to(torch.float64).float()
    assert model.lm_head.weight is model.backbone.token_emb.weight and "lm_head.weight" in model.state_dict()


def test_first_loss_is_ln_v():
    model, ids = tiny(strong=False), tokens(8, 64)
    assert abs(float(model(ids, labels=ids)["loss_final"]) - math.log(V)) < 0.15


# -------------------------------------------------------------------------------------------------------- causality
@pytest.mark.parametrize("name", C.SPECIALISATIONS)
@pytest.mark.parametrize("window", [8, 1024])
@pytest.mark.parametrize("mode", ["train", "eval", "halt"])
def test_lesson_1_no_logit_sees_a_later_token(name, window, mode):
    model = tiny(name, window)
    model.config.act_config.halt_threshold = 0.5  # so that tokens do halt at different states
    model.train(mode == "train")
    ids = tokens(2, 48)
    other = ids.clone()
    other[:, 20:] = tokens(2, 28, seed=1)
    with torch.no_grad():
        a, b = (model(x, halt=mode == "halt")["logits"] for x in (ids, other))
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20:], b[:, 20:])
    assert core.causality_audit(model.eval(), V, 48) == 0


def test_lesson_1_the_published_symmetric_window_would_be_caught(monkeypatch):
    def symmetric(T, window, device):
        i = torch.arange(T)
        return (i[:, None] - i).abs() <= window // 2

    monkeypatch.setattr(C, "band", symmetric)
    assert core.causality_audit(tiny(window=8), V, 48) > 1e-3


def test_window_is_the_last_keys_alone():
    mask = C.band(6, 3, torch.device("cpu"))
    assert torch.equal(mask, torch.ones(6, 6).tril().bool() & torch.ones(6, 6).triu(-2).bool())
    q, k, v = (torch.randn(1, 2, 12, 4) for _ in range(3))
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(full, F.scaled_dot_product_attention(q, k, v, C.band(12, 12, q.device)), atol=1e-6)


def test_lesson_2_random_tokens_cannot_be_learned():
    torch.manual_seed(0)
    model, V2 = tiny(strong=False, vocab_size=64), 64
    optimizer = C.MuGrokfast(model, 2e-3)
    model.train()
    for step in range(200):
        ids = tokens(8, 16, seed=step, high=V2)
        model(ids, labels=ids, return_logits=False)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    losses = [float(model(x, labels=x)["loss_final"]) for x in (tokens(64, 16, seed=s, high=V2) for s in (900, 901))]
    assert min(losses) >= math.log(V2) - 0.1


def test_the_canary_calls_a_leak():
    args, model = C.parse(RUN), tiny()
    assert C.canary(model, args, 1) >= math.log(V) - 0.1
    whole = model.forward

    def leaky(ids, labels=None, **kwargs):
        return whole(ids, labels=labels, **kwargs) | {"loss_final": torch.tensor(1.0)}

    model.forward = leaky
    with pytest.raises(core.Failure, match="future leak") as failure:
        C.canary(model, args, 1)
    assert failure.value.code == 1


# ------------------------------------------------------------------------------------------------- long-term memory
def loop(x, decay, m):
    out = []
    for t in range(x.shape[1]):
        m = decay * m + (1 - decay) * x[:, t]
        out.append(m)
    return torch.stack(out, 1)


@pytest.mark.parametrize("T", [1, 127, 128, 129, 512])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.999])
def test_check_7_chunked_memory_equals_the_loop(T, decay):
    memory = C.LongTermMemory(16, 8, decay, True)
    x, start = torch.randn(3, T, 8, requires_grad=True), torch.randn(1, 8, requires_grad=True)
    weight = torch.randn(3, T, 8)
    fast, slow = memory.scan(x, start), loop(x.double(), decay, start.double())
    assert (fast - slow).abs().max() < 1e-5
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), (x, start)) for out in (fast, slow))):
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))


def test_memory_is_finite_where_the_closed_form_is_not():
    memory, x = C.LongTermMemory(16, 8, 0.9, True), torch.randn(1, 2048, 8)
    s = torch.arange(2048.0)
    assert not torch.isfinite(0.9 ** s[:, None] * (0.1 * (0.9 ** -s[:, None] * x[0]).cumsum(0))).all()
    assert torch.isfinite(memory.scan(x, torch.zeros(1, 8))).all()


def test_lesson_6_memory_state_in_training():
    model = tiny().train()
    for B in (5, 1):
        before = model.backbone.ltm.memory_state.clone()
        ids = tokens(B, 20)
        model(ids, labels=ids)["loss"].backward()
        state = model.backbone.ltm.memory_state
        assert state.shape == (1, 1, 32) and not state.requires_grad and not torch.equal(state, before)
    model.reset_memory()
    assert not model.backbone.ltm.memory_state.any()
    none = tiny(ltm_carry="none").train()
    none(tokens(2, 20))
    assert not none.backbone.ltm.memory_state.any()


def test_memory_state_is_taken_at_the_last_real_token():
    model, ids = tiny().train(), tokens(1, 20)
    model(ids[:, :12])
    short = model.backbone.ltm.memory_state.clone()
    model.reset_memory()
    model(ids, attention_mask=(torch.arange(20) < 12).long()[None])
    assert torch.allclose(model.backbone.ltm.memory_state, short, atol=1e-6)


@pytest.mark.parametrize("name", C.SPECIALISATIONS)
def test_lesson_5_evaluation_is_a_pure_function(name):
    model, ids = tiny(name), tokens(3, 40)
    model.backbone.ltm.memory_state.normal_()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    first = model(ids, labels=ids)["logits"]
    assert torch.equal(model(ids, labels=ids)["logits"], first)
    assert torch.allclose(model(ids[1:2])["logits"], first[1:2], atol=1e-5)
    assert same_tensors(buffers, dict(model.named_buffers()))


def test_lesson_3_padding_changes_nothing_and_the_end_is_learned():
    model, ids = tiny(), tokens(2, 30)
    padded = F.pad(ids, (0, 10), value=5)
    mask = F.pad(torch.ones_like(ids), (0, 10))
    a, b = model(ids, labels=ids), model(padded, labels=padded.masked_fill(mask == 0, -100), attention_mask=mask)
    assert torch.allclose(a["logits"], b["logits"][:, :30], atol=1e-5)
    for key in ("loss", "loss_ce", "loss_act", "loss_gate"):
        assert torch.allclose(a[key], b[key], atol=1e-5), key
    assert a["n_tokens"] == b["n_tokens"] == 58
    with pytest.raises(ValueError, match="right"):
        model(padded, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="max_seq_len"):
        model(tokens(1, 257))
    data = C.load_data(C.parse(RUN))
    assert all(row[-1] == data.tokenizer.eos_token_id for row in data.train.ids)  # a token like any other, so scored


# --------------------------------------------------------------------------------------------- the equations, slowly
DECAY = {name: 1 - 1 / (100 * capacity / 4096) for name, capacity in zip(C.SPECIALISATIONS, (4096, 8192, 2048))}


class Slow:
    """The model of the specification in float64, position by position, from the parameters of `model` by name."""

    def __init__(self, model, specialisation, window, heads=2):
        self.W = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
        self.state = model.backbone.ltm.memory_state.double()[0]  # 1 m
        self.decay, self.window, self.heads = DECAY[specialisation], window, heads

    def linear(self, x, name):
        return x @ self.W[f"{name}.weight"].T + self.W.get(f"{name}.bias", 0.0)

    def rms(self, x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.W[f"{name}.weight"]

    def layer_norm(self, x, name):
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * self.W[f"{name}.weight"] + self.W[f"{name}.bias"]

    def attend(self, x, source, name, heads):
        """Query i over the keys j with 0 <= i - j < window, softmax by hand."""
        q, k, v = (self.linear(s, f"{name}.{w}") for s, w in ((x, "w_q"), (source, "w_k"), (source, "w_v")))
        rows = []
        for i in range(x.shape[1]):
            seen = slice(max(0, i - self.window + 1), i + 1)
            parts = []
            for h in range(heads):
                width = x.shape[-1] // heads
                part = slice(h * width, (h + 1) * width)
                scores = (k[:, seen, part] @ q[:, i, part, None])[..., 0] / math.sqrt(width)  # B keys
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                parts.append((weights[..., None] * v[:, seen, part]).sum(1))
            rows.append(torch.cat(parts, -1))
        return self.linear(torch.stack(rows, 1), f"{name}.w_o")

    def features(self, ids, real):
        """(f, gate loss) of the backbone, memory and gate."""
        x = self.W["backbone.token_emb.weight"][ids] + self.W["backbone.pos_emb.weight"][: ids.shape[1]]
        layer = 0
        while f"backbone.layers.{layer}.norm1.weight" in self.W:
            at = f"backbone.layers.{layer}"
            normed = self.rms(x, f"{at}.norm1")
            x = x + self.attend(normed, normed, f"{at}.attn", self.heads)
            normed = self.rms(x, f"{at}.norm2")
            gate = self.linear(normed, f"{at}.mlp.w_gate")
            inner = gate / (1 + (-gate).exp()) * self.linear(normed, f"{at}.mlp.w_up")
            x, layer = x + self.linear(inner, f"{at}.mlp.w_down"), layer + 1
        y = self.rms(x, "backbone.norm")
        m, states = self.state, []
        for compressed in self.linear(y, "backbone.ltm.w_down").unbind(1):
            m = self.decay * m + (1 - self.decay) * compressed
            states.append(m)
        self.states = torch.stack(states, 1)  # B T m
        memory = self.linear(self.states, "backbone.ltm.w_up")
        hidden = self.linear(torch.cat([y, memory], -1), "backbone.mag_gate.w_concat").clamp(min=0)
        g = 1 / (1 + (-self.linear(hidden, "backbone.mag_gate.w_gate")).exp())
        entropy = -(g * g.log() + (1 - g) * (1 - g).log()).mean(-1)
        return g * y + (1 - g) * memory, -0.001 * (entropy * real).sum() / real.sum()

    def states_of(self, f, steps=3, micro=2):
        """All y_t and q_t of the recursion; from one TRM step to the next no gradient flows."""
        heads = next(h for h in (8, 4, 2, 1) if f.shape[-1] % h == 0)
        z = self.linear(f, "trm.z0_proj")
        y = self.linear(z, "trm.y0_proj")
        ys, qs = [y], []
        for t in range(1, steps + 1):
            for _ in range(micro):
                seen = [z, self.attend(z, f, "trm.attn_f", heads), self.attend(z, y, "trm.attn_y", heads)]
                hidden = self.linear(torch.cat(seen, -1), "trm.refine.0").clamp(min=0)
                z = self.layer_norm(z + self.linear(hidden, "trm.refine.2"), "trm.norm_z")
            hidden = self.linear(torch.cat([y, z], -1), "trm.update.0").clamp(min=0)
            y = self.layer_norm(y + self.linear(hidden, "trm.update.2"), "trm.norm_y")
            ys.append(y)
            qs.append((1 / (1 + (-self.linear(z, "act_head.w_halt")).exp()))[..., 0])
            if t < steps:
                z, y = z.detach(), y.detach()
        return ys, qs

    def loss(self, ids, real, ys, qs, gate_loss):
        """(loss, cross-entropy of each state): the formula of the specification, section 4."""
        scored, weights = real[:, 1:], (0.33, 0.5, 0.75, 1.0)
        ces, acts = [], []
        for t, y in enumerate(ys):
            logits = y[:, :-1] @ self.W["backbone.token_emb.weight"].T
            chosen = logits.gather(-1, ids[:, 1:, None])[..., 0]
            ces.append(((logits.exp().sum(-1).log() - chosen) * scored).sum() / scored.sum())
            if t:
                right = (logits.argmax(-1) == ids[:, 1:]).double()
                acts.append(slow_act_loss(qs[t - 1][:, :-1], right, scored))
        weighted = sum(w * ce for w, ce in zip(weights, ces)) / sum(weights)
        return weighted + 0.01 * sum(acts) / len(acts) + gate_loss, ces


def slow_act_loss(q, target, real, entropy_reg=0.001, diversity=0.01, wanted=0.1):
    """Cross-entropy - entropy_reg H(q) + diversity max(0, wanted - variance within sequences), over real tokens."""
    n = real.sum()
    bce = -(target * q.log() + (1 - target) * (1 - q).log())
    entropy = -(q * q.log() + (1 - q) * (1 - q).log())
    centre = (q * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
    variance = ((q - centre).square() * real).sum() / n
    return (
        (bce * real).sum() / n - entropy_reg * (entropy * real).sum() / n + diversity * (wanted - variance).clamp(min=0)
    )


@pytest.mark.parametrize("name", C.SPECIALISATIONS)
@pytest.mark.parametrize("window", [5, 1024])
def test_the_whole_model_is_the_equations_of_the_specification(name, window):
    """Outputs, losses, memory and every gradient, with a carried memory, a padded row and two lengths of window."""
    model = tiny(name, window).train()
    model.backbone.ltm.memory_state.copy_(torch.normal(0.0, 1.0, (1, 1, 32), generator=core.generator(3)))
    slow, ids = Slow(model, name, window), tokens(2, 14)
    mask = (torch.arange(14) < torch.tensor([14, 9])[:, None]).long()
    real = mask.double()
    out = model(ids, labels=ids.masked_fill(mask == 0, -100), attention_mask=mask, return_all_steps=True)
    f, gate_loss = slow.features(ids, real)
    ys, qs = slow.states_of(f)
    loss, ces = slow.loss(ids, real, ys, qs, gate_loss)
    for ours, theirs in ((torch.stack(out["all_y"]), torch.stack(ys)), (torch.stack(out["q"]), torch.stack(qs))):
        assert torch.allclose(ours.double(), theirs, atol=2e-5)
    assert torch.allclose(torch.stack(out["step_losses"]).double(), torch.stack(ces), atol=1e-5)
    assert math.isclose(out["loss"].item(), loss.item(), rel_tol=1e-5)
    assert math.isclose(out["loss_gate"].item(), gate_loss.item(), rel_tol=1e-4)
    ends = slow.states[torch.arange(2), torch.tensor([13, 8])].mean(0)  # each row's last real token
    assert torch.allclose(model.backbone.ltm.memory_state[0, 0].double(), ends, atol=1e-5)
    out["loss"].backward()
    loss.backward()
    for n, p in model.named_parameters():
        scale = float(slow.W[n].grad.abs().max())
        assert (p.grad.double() - slow.W[n].grad).abs().max() < 1e-3 * scale + 1e-8, n


@pytest.mark.parametrize("entropy_reg, diversity", [(0.001, 0.01), (0.3, 0.0), (0.0, 0.7)])
def test_the_halting_loss_and_its_running_accuracy_are_the_specification(entropy_reg, diversity):
    """Three calls in a row: the target is 1[correct > bias-corrected average], the average 0.98 old + 0.02 new."""
    head = C.ACTHead(4, C.ACTConfig(entropy_reg=entropy_reg, diversity_weight=diversity))
    real, ema = torch.ones(2, 6), 0.0
    real[1, 4:] = 0
    for call in range(3):
        q = torch.rand(2, 6, generator=core.generator(call, "q")) * 0.1 + 0.4  # so that the diversity term acts
        right = torch.rand(2, 6, generator=core.generator(call, "right"))
        usual = ema / (1 - 0.98**call) if call else 0.0
        target = (right > usual).double()
        expected = slow_act_loss(q.double(), target, real.double(), entropy_reg, diversity)
        assert math.isclose(float(head.compute_act_loss(q, 2, right, real)), float(expected), rel_tol=1e-5)
        ema = 0.98 * ema + 0.02 * float((right * real).sum() / real.sum())
        assert math.isclose(float(head.ema_step_acc[2]), ema, rel_tol=1e-5) and head.step_count[2] == call + 1
    assert not head.ema_step_acc[[0, 1, 3]].any()


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout"])
def test_each_dropout_acts_in_training_alone_and_at_its_rate(rate):
    ids = tokens(1, 16)
    model = tiny(ltm_carry="none", **{rate: 0.25})
    assert torch.equal(model(ids)["logits"], model(ids)["logits"])
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(model(ids)["logits"], model(ids)["logits"])
    layer = model.backbone.layers[0]
    if rate == "dropout":
        zeros = (layer.mlp(torch.randn(64, 64, 64)) == 0).float().mean()
        assert abs(float(zeros) - 0.25) < 0.01
    else:  # uniform attention over 64 equal values: what is left of each sum is the share of the kept weights
        for p in (layer.attn.w_q, layer.attn.w_k):
            p.weight.data.zero_()
        layer.attn.w_v.weight.data.copy_(torch.eye(64))
        layer.attn.w_o.weight.data.copy_(torch.eye(64))
        kept = layer.attn(torch.ones(64, 64, 64))[:, -1, ::32] * 0.75  # B heads: a mean over 64 weights
        assert abs(float(kept.mean()) - 0.75) < 0.02 and abs(float(kept.var()) - 0.25 * 0.75 / 64) < 1e-3


def slow_step(p, g, slow, state, lam, step):
    """One update of AdamW's documented form behind Grokfast's filter: (weights, slow gradient, moments)."""
    slow = 0.98 * slow + 0.02 * g
    g = g + lam * slow
    m, v = 0.9 * state[0] + 0.1 * g, 0.999 * state[1] + 0.001 * g * g
    unbiased = m / (1 - 0.9**step), v / (1 - 0.999**step)
    return p - 1e-2 * unbiased[0] / (unbiased[1].sqrt() + 1e-8), slow, (m, v)


def slow_muon(p, g, slow, momentum, lam):
    """One update of Muon behind the filter: Nesterov momentum 0.95, five Newton-Schulz steps, the original scale."""
    slow = 0.98 * slow + 0.02 * g
    g = g + lam * slow
    momentum = 0.95 * momentum + 0.05 * g
    x = 0.05 * g + 0.95 * momentum
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / max(float(x.norm()), 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    x = x.T if tall else x
    return p - 3e-2 * math.sqrt(max(1.0, p.shape[0] / p.shape[1])) * x, slow, momentum


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_three_updates_of_mugrokfast_by_hand(lam):
    model = tiny()
    optimizer = C.MuGrokfast(model, 1e-2, 3e-2, lam=lam)
    matrices = C.route(model)[0]
    watched = ["trm.update.0.weight", "trm.refine.0.weight", "backbone.pos_emb.weight", "trm.norm_y.bias"]
    assert sum(n in matrices for n in watched) == 2
    expected = {n: model.get_parameter(n).detach().double() for n in watched}
    slow = dict.fromkeys(watched, 0.0)
    state = {n: 0.0 if n in matrices else (0.0, 0.0) for n in watched}
    for step in (1, 2, 3):
        for n, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=core.generator(step, n))
        for n in watched:
            g = model.get_parameter(n).grad.double()
            if n in matrices:
                expected[n], slow[n], state[n] = slow_muon(expected[n], g, slow[n], state[n], lam)
            else:
                expected[n], slow[n], state[n] = slow_step(expected[n], g, slow[n], state[n], lam, step)
        optimizer.step()
    for n in watched:  # Newton-Schulz runs in bf16
        tolerance = 3e-3 if n in matrices else 1e-5
        assert (model.get_parameter(n).double() - expected[n]).abs().max() < tolerance, n
    for name, wanted in {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}.items():
        assert optimizer.adamw.param_groups[0][name] == wanted
    for name, wanted in {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "weight_decay": 0.0}.items():
        assert optimizer.muon.param_groups[0][name] == wanted


def test_a_prefix_and_one_more_token_at_a_time_give_the_same_logits():
    model, ids = tiny(window=6), tokens(1, 20)
    with torch.no_grad():
        whole = model(ids)["logits"]
        for T in (1, 5, 6, 7, 20):
            assert torch.allclose(model(ids[:, :T])["logits"], whole[:, :T], atol=1e-5)
            assert torch.allclose(model(ids[:, :T], return_logits="last")["logits"][:, 0], whole[:, T - 1], atol=1e-5)


# ------------------------------------------------------------------------------------------------ switches and parts
def test_every_switch_moves_the_output():
    ids, base = tokens(2, 40), tiny()
    with torch.no_grad():
        reference = base(ids)["logits"]
        without = tiny(memory=False)
        assert not any("ltm" in n or "mag_gate" in n for n in without.state_dict())
        assert (without(ids)["logits"] - reference).abs().max() > 1e-3
        base.backbone.ltm.memory_state.fill_(2.0)
        assert (base(ids)["logits"] - reference).abs().max() > 1e-4
        base.backbone.ltm.carry = False
        assert torch.allclose(base(ids)["logits"], reference, atol=1e-6)
        base.trm.config.micro_steps = 1
        assert (base(ids)["logits"] - reference).abs().max() > 1e-3
        narrow = tiny(window=4)
        assert (narrow(ids)["logits"] - reference).abs().max() > 1e-3


def test_gate_by_hand():
    gate = C.MAGGate(1, 1)
    for p, value in zip(gate.parameters(), (torch.tensor([[1.0, -1.0]]), 0.5, torch.tensor([[2.0]]), -1.0)):
        p.data.copy_(torch.as_tensor(value).expand_as(p))
    out, g = (x.detach() for x in gate(torch.tensor([[[2.0]]]), torch.tensor([[[1.0]]])))
    expected = 1 / (1 + math.exp(-(2 * 1.5 - 1)))
    assert math.isclose(float(g), expected, rel_tol=1e-6) and math.isclose(float(out), 1 + expected, rel_tol=1e-6)


def test_memory_usage_and_gate_loss_are_measured():
    model, ids = tiny(), tokens(2, 30)
    out = model(ids, labels=ids)
    seen = []
    model.backbone.mag_gate.register_forward_hook(lambda m, i, o: seen.append(o[1].detach().mean()))
    again = model(ids, labels=ids)
    assert torch.allclose(out["gate_mean"], seen[0], atol=1e-6) and torch.equal(out["loss_gate"], again["loss_gate"])
    assert torch.allclose(out["loss_gate"], -0.001 * out["gate_entropy"])


def test_the_last_state_reaches_the_backbone_and_detached_states_do_not_leak_back():
    model, ids = tiny().train(), tokens(2, 20)
    model.config.trm_config.deep_supervision = False
    model.config.act_config.act_loss_weight = 0.0
    out = model(ids, labels=ids)
    out["loss"].backward()
    assert model.backbone.layers[0].attn.w_q.weight.grad.abs().max() > 0  # features are never detached
    assert model.trm.y0_proj.weight.grad is None or not model.trm.y0_proj.weight.grad.any()


def test_check_8_chunked_loss_equals_the_full_one():
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16).requires_grad_(), torch.randn(70, 16).requires_grad_()
    target, rows = torch.randint(70, (50,)), torch.rand(50)
    full = (F.cross_entropy(hidden @ weight.T, target, reduction="none") * rows).sum()
    for size in (7, 50, 1000):
        loss, ce, right = core.head_loss(hidden, weight, target, rows, size)
        assert torch.allclose(loss, full, atol=1e-5) and torch.equal(right, (hidden @ weight.T).argmax(-1) == target)
        assert torch.allclose((ce * rows).sum(), full, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(3 * x, (hidden, weight), retain_graph=True) for x in (loss, full))):
            assert torch.allclose(a, b, atol=1e-5)


def test_check_8_loss_is_the_formula():
    model, ids = tiny().train(), tokens(3, 30)
    labels = ids.clone()
    labels[0, 10:15] = -100
    out = model(ids, labels=labels, return_all_steps=True)
    ce = [F.cross_entropy(x[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) for x in out["all_logits"]]
    assert torch.allclose(torch.stack(ce), torch.stack(out["step_losses"]), atol=1e-5)
    weights = model.config.trm_config.step_weights
    expected = sum(w * x for w, x in zip(weights, ce)) / sum(weights) + 0.01 * out["loss_act"] + out["loss_gate"]
    assert torch.allclose(out["loss"], expected, atol=1e-5) and torch.allclose(out["loss_final"], ce[-1], atol=1e-5)
    assert len(out["all_y"]) == len(out["all_z"]) == 4 and "logits" not in model(ids, return_logits=False)


def test_gradient_checkpointing_changes_nothing():
    ids, grads = tokens(2, 20), []
    for on in (False, True):
        model = tiny(ltm_carry="none").train()
        model.backbone.gradient_checkpointing = on
        model(ids, labels=ids)["loss"].backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads[0].values(), grads[1].values()))


# --------------------------------------------------------------------------------------------------------------- ACT
def test_lesson_7_the_halting_loss_trains_the_head_at_any_shape():
    for B, T in ((1, 1), (1, 9), (4, 9)):
        head = C.ACTHead(8, C.ACTConfig())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            q = head(torch.randn(B, T, 8))
            for right in (None, torch.rand(B) > 0.5, torch.rand(B, T) > 0.5):
                assert torch.isfinite(head.compute_act_loss(q, 1, right, torch.ones(B, T)))
            head.compute_act_loss(q, 1, torch.rand(B, T) > 0.5).backward()
        assert head.w_halt.weight.grad.abs().max() > 0
        assert head.step_count[1] == 3 and head.step_count[2] == 0
    model, ids = tiny().train(), tokens(2, 20)
    model(ids, labels=ids)["loss"].backward()
    assert model.act_head.w_halt.weight.grad.abs().max() > 0


def test_halting_loss_by_hand():
    head = C.ACTHead(2, C.ACTConfig(entropy_reg=0.0, diversity_weight=0.5)).eval()
    q, right = torch.tensor([[0.8, 0.2]]), torch.tensor([[1.0, 0.0]])
    expected = -math.log(0.8) + 0.5 * (0.1 - 0.09)  # variance of 0.8, 0.2 is 0.09
    assert math.isclose(float(head.compute_act_loss(q, 1, right)), expected, rel_tol=1e-5)
    assert not head.step_count.any()  # evaluation writes nothing
    half = float(head.compute_act_loss(q, 1))
    assert math.isclose(half, -0.5 * (math.log(0.8) + math.log(0.2)) + 0.005, rel_tol=1e-5)


@pytest.mark.parametrize("weight, lifted", [(0.01, False), (0.05, False), (1.0, False), (3.0, True)])
def test_a_constant_target_cannot_lift_the_variance_at_the_documented_weight(weight, lifted):
    head, logits = C.ACTHead(2, C.ACTConfig(diversity_weight=weight)), torch.linspace(-1, 1, 20)[None].requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        head.compute_act_loss(logits.sigmoid(), 1).backward()
        optimizer.step()
    spread = float(C.variance_within(logits.sigmoid().detach(), torch.ones(1, 20)))
    assert spread > 0.05 if lifted else spread < 1e-3


def test_equal_values_have_variance_zero():
    """The document blames "degrees of freedom" for a variance of 0; equal values have it without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert C.variance_within(torch.full((4, 9), 0.3), torch.ones(4, 9)) < 1e-12
        assert C.variance_within(torch.rand(1, 1), torch.ones(1, 1)) == 0


def test_halting_takes_each_tokens_state_and_saves_steps():
    model, ids = tiny(), tokens(3, 40)
    model.config.act_config.halt_threshold = 0.5
    model.act_head.w_halt.weight.data.mul_(20)
    with torch.no_grad():
        every = model(ids, return_all_steps=True)
        halted = model(ids, halt=True)
    at = every["token_halting_steps"] - 1  # B T
    assert len(set(at.flatten().tolist())) >= 2 and at.min() >= 1 and at.max() <= 3
    picked = torch.stack(every["all_logits"])[at, torch.arange(3)[:, None], torch.arange(40)]
    assert torch.allclose(halted["logits"], picked, atol=1e-6)
    assert torch.equal(halted["halting_steps"], every["halting_steps"])
    model.act_head.w_halt.bias.data.fill_(50.0)  # everyone halts at the first step
    calls = []
    model.trm.refine.register_forward_hook(lambda *a: calls.append(1))
    model(ids, halt=True)
    assert len(calls) == 2 and torch.equal(model(ids)["halting_steps"], torch.full((3,), 2.0))
    with pytest.raises(ValueError):
        model.train()(ids, halt=True)


def test_speed_runs_one_step_in_evaluation_and_no_act_never_halts():
    ids = tokens(2, 20)
    assert len(tiny("speed")(ids, return_all_steps=True)["all_y"]) == 2
    assert len(tiny("speed").train()(ids, return_all_steps=True)["all_y"]) == 4
    model = tiny()
    model.config.act_config.enabled = False
    model.act_head.w_halt.bias.data.fill_(50.0)
    out = model(ids, labels=ids)
    assert (out["token_halting_steps"] == 4).all() and out["loss_act"] == 0


# --------------------------------------------------------------------------------------------------------- optimizer
def test_every_parameter_is_in_one_group_and_embeddings_are_in_adamw():
    model = tiny()
    muon, adamw = C.route(model)
    assert {*muon, *adamw} == {n for n, _ in model.named_parameters()} and not set(muon) & set(adamw)
    assert {"backbone.token_emb.weight", "backbone.pos_emb.weight", "act_head.w_halt.weight"} <= set(adamw)
    optimizer = C.MuGrokfast(model, 5e-4, 5e-3)
    assert [g["lr"] for g in optimizer.param_groups] == [5e-4, 5e-3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.0]
    ids = tokens(2, 20)
    model.train()(ids, labels=ids)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_lesson_9_a_lasting_gradient_becomes_one_plus_lambda_times_itself():
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = C.MuGrokfast(model, 0.0, alpha=0.98, lam=0.5, muon=False)
    for _ in range(400):
        model.weight.grad = torch.full((1, 1), 3.0)
        optimizer.step()
    assert math.isclose(float(model.weight.grad), 4.5, rel_tol=1e-3)
    first = C.MuGrokfast(model, 0.0, alpha=0.98, lam=0.5, muon=False)
    model.weight.grad = torch.full((1, 1), 3.0)
    first.step()
    assert math.isclose(float(model.weight.grad), 3 * (1 + 0.5 * 0.02), rel_tol=1e-5)
    assert not C.MuGrokfast(model, lam=0.0, muon=False).slow


def test_lesson_10_first_muon_update_is_orthogonal():
    model = tiny(strong=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = C.MuGrokfast(model, muon_lr=1.0, lam=0.0)
    for n, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=core.generator(0, n))
    optimizer.step()
    shapes = set()
    for n in C.route(model)[0]:
        values = torch.linalg.svdvals(before[n] - model.get_parameter(n).detach())
        rows, columns = before[n].shape
        scale = max(1, rows / columns) ** 0.5
        inside = (values / scale > 0.2).float().mean()  # a square Gaussian has a singular value near 0, which stays low
        assert values.max() / scale < 1.3 and inside >= (0.95 if rows == columns else 1.0), n
        shapes.add((rows > columns) - (rows < columns))
    assert shapes == {-1, 0, 1}


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (64, 4)])
def test_lesson_10_thin_matrices(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape)
    torch.optim.Muon([p], lr=1.0, weight_decay=0.0).step()
    values = torch.linalg.svdvals(p.detach()) / max(1, shape[0] / shape[1]) ** 0.5
    assert values.min() > 0.2 and values.max() < 1.3


def test_lesson_8_schedule():
    rates = [C.rate(5e-3, s, 100, 1000, 1e-6) for s in range(1001)]
    assert math.isclose(rates[0], 5e-4) and math.isclose(rates[100], 5e-3) and max(rates) == rates[100]
    assert rates[999] < 2e-6 and math.isclose(rates[1000], 1e-6)
    steps = [b - a for a, b in itertools.pairwise(rates)]
    assert all(s > 0 for s in steps[:100]) and all(s < 0 for s in steps[100:])


def test_lesson_11_accumulation_equals_one_batch():
    args = C.parse([*RUN, "--dropout", "0", "--ltm-carry", "none"])
    data, grads = C.load_data(args), []
    members = list(range(64))
    total = sum(len(data.train.ids[i]) - 1 for i in members)
    for size in (16, 64):
        model = tiny(ltm_carry="none").train()
        for start in range(0, 64, size):
            ids, labels, mask = C.collate(data.train, members[start : start + size], "cpu", 256)
            out = model(ids, labels=labels, attention_mask=mask, return_logits=False)
            # cross-entropy alone: the diversity term and the memory's mean are not sums over rows
            (out["loss_ce"] * (out["n_tokens"] / total)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


def test_lesson_11_no_gradient_survives_an_epoch_end(monkeypatch, tmp_path):
    """Every epoch begins without gradients, and its short last group is an update of its own tokens alone."""
    flags = [*RUN, "--datasets", "synth_add", "--epochs", "2", "--dropout", "0", "--no-memory", "--no-act"]
    args = C.parse(flags)  # so that the loss is the cross-entropy: 36 rows, 5 micro-batches, groups of 2, 2 and 1
    data, clean, updates = C.load_data(args), [], []
    reset, step = C.TRMTitansMAGModel.reset_memory, C.MuGrokfast.step

    def epoch_begins(model):
        clean.append(all(p.grad is None for p in model.parameters()))
        reset(model)

    def update(optimizer):
        updates.append(
            [
                {n: p.detach().clone() for n, p in optimizer.named.items()},
                {n: p.grad.clone() for n, p in optimizer.named.items() if p.grad is not None},
            ]
        )
        step(optimizer)

    monkeypatch.setattr(C.TRMTitansMAGModel, "reset_memory", epoch_begins)
    monkeypatch.setattr(C.MuGrokfast, "step", update)
    C.main([*flags, "--gradient-clip", "0", "--checkpoint-dir", str(tmp_path)])
    assert clean == [True, True] and len(updates) == 6
    for i, (weights, grads) in enumerate(updates):
        cut = C.epoch_batches(data.train, {"synth_add"}, 8, 42, i // 3 + 1)
        members = [row for batch in cut[2 * (i % 3) : 2 * (i % 3) + 2] for row in batch]  # 16, 16 and 4 rows at once
        model = C.build_model(args, V).train()
        model.load_state_dict(weights, strict=False)
        ids, labels, mask = C.collate(data.train, members, "cpu", 256)
        model(ids, labels=labels, attention_mask=mask, return_logits=False)["loss"].backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(cut) == 5 and grads.keys() == expected.keys()
        assert all(torch.allclose(grads[n], expected[n], atol=1e-6) for n in grads)


def test_muon_hidden_is_one_line(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(core.Failure, match=r"torch >= 2\.9 or use --optimizer adamw"):
        C.main([*RUN, "--checkpoint-dir", str(tmp_path)])
    result = C.main([*RUN, "--checkpoint-dir", str(tmp_path / "a"), "--optimizer", "adamw", "--datasets", "synth_add"])
    assert result["history"][0]["muon_lr"] is None


# --------------------------------------------------------------------------------------------------------------- data
LITERAL = {  # name: (raw row, the question, the answer, what stands before the question)
    "gsm8k": (
        {"question": "Tim has 2 pens and buys 3.", "answer": "He has 2+3=<<2+3=5>>5 pens.\n#### 5"},
        "Tim has 2 pens and buys 3.",
        "5\nHe has 2+3=5 pens.",
        "",
    ),
    "svamp": (
        {"Body": "Dan had 7.", "Question": "How many?", "Equation": "( 7 )", "Answer": 7.0, "Type": "x"},
        "Dan had 7. How many?",
        "7",
        "",
    ),
    "mbpp": (
        {"task_id": 1, "text": "Add two.", "code": "def f(a, b):\r\n    return a + b", "test_list": []},
        "Add two.",
        "def f(a, b):\n    return a + b",
        "",
    ),
    "arc_easy": (
        {"question": "Which?", "choices": {"text": ["air", "rock"], "label": ["1", "2"]}, "answerKey": "2"},
        "Which? (A) air (B) rock",
        "rock",
        "",
    ),
    "arc_challenge": (
        {"question": "Why?", "choices": {"text": ["a b", "c"], "label": ["A", "B"]}, "answerKey": "A"},
        "Why? (A) a b (B) c",
        "a b",
        "",
    ),
    "piqa": ({"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 1}, "Open it", "pull", ""),
    "asdiv": (
        {"body": "9 in it.", "question": "How many?", "answer": "9 (apples)", "formula": "9", "solution_type": "x"},
        "9 in it. How many?",
        "9",
        "",
    ),
    "boolq": ({"question": "is it so", "answer": True, "passage": "It is so."}, "is it so", "yes", "It is so. "),
    "strategyqa": ({"question": "Can it?", "answer": False, "facts": []}, "Can it?", "no", ""),
    "codexglue": ({"docstring": "Add.", "code": "def f():\n    pass"}, "Add.", "def f():\n    pass", ""),
    "hotpotqa": (
        {
            "question": "Who?",
            "answer": "Bob",
            "context": {"title": ["A", "B"], "sentences": [["No. ", "Bob did."], ["Never."]]},
            "supporting_facts": {"title": ["A"], "sent_id": [1]},
        },
        "Who?",
        "Bob",
        "Bob did. ",
    ),
    "drop": (
        {"passage": "It was 3.", "question": "How much?", "answers_spans": {"spans": ["3", "4"]}},
        "How much?",
        "3",
        "It was 3. ",
    ),
}


@pytest.mark.parametrize("name", LITERAL)
def test_check_14_formatters(name):
    raw, question, answer, passage = LITERAL[name]
    row = C.format_rows(name, [raw], 10)[0]
    assert row["text"] in (f"{passage}Q: {question} A: {answer}", f"{passage}{question} A: {answer}")
    assert (row["input"], row["output"], row["metadata"]["dataset"]) == (question, answer, name)


def test_check_14_formatters_of_running_text():
    long = "word " * 25
    rows = C.format_rows("wikitext", [{"text": " = A heading = "}, {"text": "too short"}, {"text": long}], 10)
    assert [r["text"] for r in rows] == [long.strip()] and rows[0]["output"] == ""
    row = C.format_rows("hellaswag", [{"ctx": "He runs", "endings": ["a", "home.", "c", "d"], "label": "1"}], 10)[0]
    assert row["text"] == "He runs home." and row["output"] == "home."
    assert {*LITERAL, "wikitext", "hellaswag"} == set(C.HUB)


def test_half_of_the_questions_have_no_marker():
    rows = [C.qa("x", "y", f"Is {i} even?", "no") for i in range(400)]
    assert 150 < sum(r["text"].startswith("Q: ") for r in rows) < 250


def test_fields_are_asserted_and_named():
    with pytest.raises(core.Failure, match="expected the fields answer, question, found prompt"):
        C.format_rows("gsm8k", [{"prompt": "x"}], 10)


def test_a_scripted_hub_set_is_read_from_its_conversion(monkeypatch):
    import datasets

    calls = []

    def load(hub, config, split, revision=None, cache_dir=None):
        calls.append((config, revision, cache_dir))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported")
        if config != "default":
            raise ValueError("BuilderConfig not found")
        return [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    converted = "refs/convert/parquet"
    for cache, given in (("", None), ("there", "there")):
        calls.clear()
        assert len(C.hub_rows("piqa", cache)) == 1
        assert calls == [("plain_text", None, given), ("plain_text", converted, given), ("default", converted, given)]


@pytest.fixture
def published(tmp_path):
    """GSM8K, SVAMP and ASDiv as their authors publish them, in miniature."""
    for name in ("gsm8k", "svamp", "asdiv"):
        (tmp_path / name).mkdir()
    rows = [{"question": f"Tim has {i} pens.", "answer": f"<<{i}>>{i}\n#### {i}"} for i in range(20)]
    (tmp_path / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [
        {
            "ID": str(i),
            "Body": f"Dan had {i}",
            "Question": "How many?",
            "Equation": "x",
            "Answer": float(i),
            "Type": "t",
        }
        for i in range(20)
    ]
    (tmp_path / "svamp" / "SVAMP.json").write_text(json.dumps(rows))
    problems = "".join(
        f"<Problem ID='{i}'><Body>{i} in it.</Body><Question>How many?</Question><Solution-Type>S</"
        f"Solution-Type><Answer>{i} (pens)</Answer><Formula>{i}</Formula></Problem>"
        for i in range(20)
    )
    (tmp_path / "asdiv" / "ASDiv.xml").write_text(f"<C><ProblemSet>{problems}</ProblemSet></C>")
    canonical = [C.qa("boolq", "reading", f"is it {i}", "yes", "It is.") for i in range(20)]
    (tmp_path / "boolq.jsonl").write_text("\n".join(map(json.dumps, canonical)))
    return tmp_path


def test_published_and_canonical_local_files(published, capsys):
    flags = ["--model", "reasoning", "--data-dir", str(published), "--datasets", "gsm8k", "svamp", "asdiv", "boolq"]
    sets = C.load_datasets(C.parse(flags))
    assert {k: len(v) for k, v in sets.items()} == {"gsm8k": 20, "svamp": 20, "asdiv": 20, "boolq": 20}
    assert any(r["output"] == "7" and r["input"] == "Dan had 7 How many?" for r in sets["svamp"])
    assert any(r["output"] == "7" and r["input"] == "7 in it. How many?" for r in sets["asdiv"])
    assert all(r["text"].startswith("It is. ") for r in sets["boolq"])
    with pytest.raises(core.Failure, match=r"data set drop: none of .*drop.jsonl exists.*--skip_missing"):
        C.load_datasets(C.parse([*flags, "drop"]))
    assert "drop" not in C.load_datasets(C.parse([*flags, "drop", "--skip-missing"]))
    assert "skipping drop" in capsys.readouterr().out


def test_unusual_characters_in_local_files(tmp_path):
    """A string may hold a line separator; half of a surrogate pair, numbers for text and deep nesting are refused."""
    path, flags = tmp_path / "boolq.jsonl", ["--model", "reasoning", "--data-dir", str(tmp_path), "--datasets", "boolq"]
    rows = [C.qa("boolq", "reading", f"is it {i}", "yes", "It\u2028is.") for i in range(4)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert len(C.load_datasets(C.parse(flags))["boolq"]) == 4
    bad = [json.dumps(rows[0] | {"output": value}) for value in ("\ud800", 5, None)]
    for text in (*bad, "[" * 100_000, '{"text": ', "[1, 2]"):
        path.write_text(text)
        with pytest.raises(core.Failure, match=r"boolq") as failure:
            C.load_datasets(C.parse(flags))
        assert failure.value.code == 2 and "\n" not in str(failure.value)


def test_training_on_published_files_with_a_local_tokenizer(published, tmp_path):
    result = C.main(
        [
            *RUN,
            "--data-dir",
            str(published),
            "--datasets",
            "gsm8k",
            "svamp",
            "--tokenizer",
            "local",
            "--vocab-size",
            "300",
            "--checkpoint-dir",
            str(tmp_path / "r"),
        ]
    )
    assert result["data"]["source"] == "local files" and result["data"]["vocab_size"] == 300
    assert result["data"]["sets"] == ["gsm8k", "svamp"] and result["causality_max_abs_diff"] == 0


def test_lesson_4_train_and_validation_are_disjoint_and_sums_are_right():
    args = C.parse([*RUN, "--synth-rows", "200"])
    sets = C.load_datasets(args)
    train, val = C.split_datasets_train_val(sets, 0.1)
    assert list(sets) == ["synth_add", "synth_word", "synth_recall", "synth_two_step", "synth_recall3"]
    for name in sets:
        a, b = ({r["text"].replace("Q: ", "") for r in side[name]} for side in (train, val))
        assert len(a) > 150 and len(b) >= 18 and not a & b
    pairs = [
        {tuple(re.findall(r"of (\w+) is (\w+)\.", r["text"])[0]) for n in ("synth_recall",) for r in side[n]}
        for side in (train, val)
    ]
    assert not pairs[0] & pairs[1]
    shown = {
        p
        for n in ("synth_recall", "synth_recall3")
        for r in train[n]
        for p in re.findall(r"of (\w+) is (\w+)\.", r["text"])
    }
    asked = {
        (re.search(r"capital of (\w+)\?", r["text"])[1], r["output"])
        for n in ("synth_recall", "synth_recall3")
        for r in val[n]
    }
    assert not shown & asked
    for row in train["synth_add"] + val["synth_two_step"]:
        numbers = list(map(int, re.findall(r"\d+", row["input"])))
        signs = (1, 1) if "+" in row["input"] else (1, 1, -1)
        assert int(row["output"]) == sum(s * n for s, n in zip(signs, numbers))


def test_split_of_other_sets():
    rows = [C.qa("gsm8k", "math", f"Q {i // 2}?", str(i)) for i in range(100)]  # every question twice
    train, val = C.split_datasets_train_val(
        {"gsm8k": rows, "wikitext": [C.running_text("wikitext", "text", f"t {i}") for i in range(50)]}, 0.1
    )
    assert len(train["gsm8k"]) == 45 and len(val["gsm8k"]) == 5
    assert not {r["input"] for r in train["gsm8k"]} & {r["input"] for r in val["gsm8k"]}
    assert [r["text"] for r in val["wikitext"]] == [f"t {i}" for i in range(45, 50)]
    again = C.split_datasets_train_val({"gsm8k": rows}, 0.1)
    assert again[1]["gsm8k"] == val["gsm8k"]


def test_lesson_4_no_passage_stands_on_both_sides():
    """DROP asks several questions of a passage, whose tokens are scored as well."""
    rows = [C.qa("drop", "reading", f"How many {i}?", str(i), f"Passage {i % 30} is long.") for i in range(200)]
    assert C.passage_of(rows[31]) == "Passage 1 is long." and C.passage_of(C.qa("x", "y", "Is it?", "no")) == ""
    for share in (0.08, 0.1, 0.115, 0.15):  # some of these cuts fall inside a passage
        train, val = (side["drop"] for side in C.split_datasets_train_val({"drop": rows}, share))
        assert len(train) + len(val) == 200 and 200 * share <= len(val) < 200 * share + 7
        assert not {C.passage_of(r) for r in train} & {C.passage_of(r) for r in val}


def test_long_rows_lose_their_passage_and_nothing_else():
    tokenizer = core.train_tokenizer([])
    row = C.qa("boolq", "reading", "is it so", "yes", "A long passage. " * 20)
    ids, start, scored = C.encode_row(row, tokenizer, 60)
    assert scored == [True] * 60
    text = tokenizer.decode(ids)
    assert len(ids) == 60 and text.endswith("is it so A: yes<eos>") and text.startswith("A long passage.")
    assert tokenizer.decode(ids[start:]) == " yes<eos>"
    assert C.encode_row(C.qa("gsm8k", "math", "x" * 80, "5"), tokenizer, 60) is None
    assert len(C.encode_row(C.running_text("wikitext", "text", "y" * 99), tokenizer, 60)[0]) == 60


def test_check_13_curriculum():
    args, epochs = C.parse(["--model", "reasoning"]), (1, 3, 4, 6, 7, 10)
    assert args.datasets == ["gsm8k", "svamp", "mbpp", "arc_easy", "piqa", "wikitext"]
    plan = [C.sets_of(args, epoch, args.datasets) for epoch in epochs]
    assert [stage[0] for stage, _ in plan] == list("FFRRAA") and all(sets == args.datasets for _, sets in plan)
    everything = C.parse(["--model", "reasoning", "--datasets", "all"]).datasets
    assert len(everything) == 14
    assert [len(C.sets_of(args, epoch, everything)[1]) for epoch in epochs] == [6, 6, 10, 10, 14, 14]
    assert C.sets_of(args, 1, ["drop"]) == ("FOUNDATION", ["drop"])
    args.no_curriculum = True
    assert C.sets_of(args, 1, everything) == ("ALL", everything)


def test_batches_are_a_pure_function_and_hold_every_row_once():
    ids = [[1] * (2 + i % 37) for i in range(500)]
    rows = C.Rows(ids, [1] * 500, ["a"] * 400 + ["b"] * 100, [[True] * len(row) for row in ids])
    cut = C.epoch_batches(rows, {"a"}, 8, 42, 1)
    assert sorted(i for members in cut for i in members) == list(range(400))
    assert cut == C.epoch_batches(rows, {"a"}, 8, 42, 1) != C.epoch_batches(rows, {"a"}, 8, 42, 2)
    drawn = [{i for members in C.epoch_batches(rows, {"a"}, 8, 42, epoch, 120) for i in members} for epoch in (1, 2)]
    assert [len(rows) for rows in drawn] == [120, 120] and len(drawn[0] & drawn[1]) < 60  # --epoch_rows: 36 by chance
    spread = [max(len(rows.ids[i]) for i in m) - min(len(rows.ids[i]) for i in m) for m in cut]
    assert sum(spread) / len(spread) < 6  # of 36
    ids, labels, mask = C.collate(rows, cut[0], "cpu", 256)
    assert ids.shape[1] % 8 == 0 and ((labels == -100) == (mask == 0)).all()


# --------------------------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One --test run of two epochs; many tests read what it wrote."""
    root = tmp_path_factory.mktemp("cognate")
    result = C.main([*RUN, "--epochs", "2", "--save-every", "1", "--checkpoint-dir", str(root)])
    return root / "reasoning", result


REPORT = (
    "val_loss_changes val_loss_final no_divergence_epoch7 early_stop_late grad_norm_max act_variance coherent "
    "token_variety qa_format context_recall checkpoint_saved checkpoint_loads inference_cpu inference_cuda "
    "handoff_ready causal canary"
).split()


def test_files_and_keys_of_the_spec(finished):
    directory, result = finished
    assert json.loads((directory / "cognate_results.json").read_text()) == json.loads(json.dumps(result))
    rows = list(csv.DictReader((directory / "history.csv").open()))
    columns = "epoch stage train_loss val_loss val_ppl lr muon_lr grad_norm_mean grad_norm_max act_q_variance "
    columns += "avg_halting_steps gate_mean target_tokens seconds is_best epochs_without_improvement"
    assert list(rows[0]) == columns.split() and [r["epoch"] for r in rows] == ["1", "2"]
    best = torch.load(directory / "best_model.pt", map_location="cpu", weights_only=True)
    wanted = "model_state_dict epoch global_step best_val_loss val_loss specialization config tokenizer history"
    assert set(wanted.split()) == set(best)
    assert {"backbone.ltm.memory_state", "act_head.ema_step_acc", "act_head.step_count", "lm_head.weight"} <= set(
        best["model_state_dict"]
    )
    for name in ("last.pt", "epoch_1.pt", "epoch_2.pt"):
        state = torch.load(directory / name, map_location="cpu", weights_only=True)
        assert {"optimizer_state_dict", "early_stop", "rng_state"} <= set(state) and "counter" in state["early_stop"]
        assert set(state["optimizer_state_dict"]) == {"muon", "adamw", "grokfast_ema", "alpha", "lambda"}
    report = json.loads((directory / "report.json").read_text())
    assert [r["id"] for r in report] == REPORT == [r["id"] for r in result["report"]]
    assert all(set(r) == {"id", "group", "value", "op", "threshold", "pass", "note"} for r in report)
    passed = {r["id"]: r["pass"] for r in report}
    assert passed["no_divergence_epoch7"] is None and passed["handoff_ready"] is None
    assert all(passed[k] for k in ("checkpoint_saved", "checkpoint_loads", "inference_cpu", "causal", "canary"))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert {r["kind"] for r in lines} == {"start", "step", "epoch", "final"}
    step = next(r for r in lines if r["kind"] == "step")
    for key in (
        "train/step train/epoch train/loss train/loss_ce train/loss_act train/loss_gate train/perplexity "
        "train/learning_rate optimizer/muon_lr optimizer/grokfast_lambda train/gradient_norm "
        "train/skipped_updates act/avg_halting_steps act/max_halting_steps act/min_halting_steps "
        "act/halting_variance act/q_mean act/q_variance act/ema_acc_step3 gate/mean_g gate/entropy "
        "ltm/memory_usage ltm/state_rms system/tokens_per_second"
    ).split():
        assert key in step, key
    epoch = next(r for r in lines if r["kind"] == "epoch")
    for key in (
        "val/loss val/perplexity val/token_accuracy val/synth_add_loss val/synth_recall_accuracy "
        "val/loss_step0 val/loss_step3 val/act_q_variance canary/random_ce gen/distinct_ratio gen/collapsed "
        "curriculum/stage "
        "time/epoch_duration_minutes"
    ).split():
        assert key in epoch, key
    final = next(r for r in lines if r["kind"] == "final")
    for key in (
        "final/total_params final/training_time_hours final/train_loss final/val_loss final/perplexity "
        "final/model_size_mb diversity/avg_halting_steps diversity/ltm_usage "
        "diversity/inference_time_ms"
    ).split():
        assert key in final, key
    for key in ("environment", "seed", "wall_s", "peak_mem_bytes", "manifest", "tokens_per_s", "data", "config"):
        assert result[key] is not None, key
    assert result["steps"] == 14 and result["tokens"] == sum(h["target_tokens"] for h in result["history"])


def test_lesson_4_it_learns_and_validation_differs_between_epochs(finished):
    assert finished[1]["final"]["act_q_variance"] > 0  # lesson 7
    losses = [h["val_loss"] for h in finished[1]["history"]]
    assert losses[1] < losses[0] < finished[1]["untrained_val_loss"] and finished[1]["canary"]["lowest"] > 5.4
    interval = finished[1]["final"]["loss_interval"]
    assert interval["lo"] < interval["mean"] < interval["hi"] and interval["n"] == 20


def test_lesson_8_the_rates_of_the_flags_are_in_force(finished):
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if r["kind"] == "step"]
    total, warm = 2 * 7, 7  # 108 rows of the first stage / 8 / 2, per epoch
    for r in steps:
        s = r["train/step"] - 1
        assert math.isclose(r["train/learning_rate"], C.rate(5e-4, s, warm, total, 1e-6), rel_tol=1e-9)
        assert math.isclose(r["optimizer/muon_lr"], C.rate(5e-3, s, warm, total, 1e-6), rel_tol=1e-9)
    assert steps and finished[1]["history"][-1]["muon_lr"] < 1e-3


def test_lesson_12_the_best_checkpoint_holds_the_weights_that_were_measured(finished):
    model, _, state = C.load_saved(str(finished[0] / "best_model.pt"))
    args = C.parse(RUN)
    loss = C.evaluate(model, C.load_data(args), args)["loss"]
    assert math.isclose(loss, state["val_loss"], rel_tol=1e-6) and state["val_loss"] == state["best_val_loss"]


def comparable(result):
    """A result without what may differ between equal runs."""
    skip = "train_seconds wall_s tokens_per_s peak_mem_bytes environment manifest config inference_ms report".split()
    result = {k: v for k, v in result.items() if k not in (*skip, "model_size_mb", "inference_ms_halting")}
    return result | {"history": [{k: v for k, v in h.items() if k != "seconds"} for h in result["history"]]}


def final_state(directory):
    state = torch.load(directory / "last.pt", weights_only=True)
    same = ("model_state_dict", "optimizer_state_dict", "rng_state", "epoch_loss", "global_step", "norms", "early_stop")
    return {k: state[k] for k in same}


def test_a_repeat_is_bitwise_equal_whatever_the_logging(finished, tmp_path):
    again = C.main([*RUN, "--epochs", "2", "--log-every", "3", "--checkpoint-dir", str(tmp_path)])
    assert comparable(again) == comparable(finished[1])
    mine, theirs = final_state(tmp_path / "reasoning"), final_state(finished[0])
    assert same_tensors(mine["model_state_dict"], theirs["model_state_dict"])


def test_check_12_resume_equals_the_uninterrupted_run(finished, tmp_path):
    resumed = C.main(
        [
            *RUN,
            "--epochs",
            "2",
            "--save-every",
            "1",
            "--resume",
            str(finished[0] / "epoch_1.pt"),
            "--checkpoint-dir",
            str(tmp_path),
        ]
    )
    assert comparable(resumed) == comparable(finished[1])
    assert same_tensors(final_state(tmp_path / "reasoning"), final_state(finished[0]))


def test_resume_elsewhere_takes_the_best_model_along(tmp_path):
    flags = [*RUN, "--datasets", "synth_add", "--epochs", "2", "--save-every", "1", "--min-delta", "9"]  # best: 1
    first = C.main([*flags, "--checkpoint-dir", str(tmp_path / "a")])
    best = tmp_path / "a" / "reasoning" / "best_model.pt"
    again = [*flags, "--resume", str(best.with_name("epoch_1.pt")), "--checkpoint-dir"]
    other = tmp_path / "b" / "reasoning" / "best_model.pt"  # of another run: kept, and not taken for this one's
    other.parent.mkdir(parents=True)
    other.write_bytes(b"another run's")
    assert first["best_epoch"] == 1 and comparable(C.main([*again, str(tmp_path / "b")])) == comparable(first)
    assert other.with_name("best_model.prev.pt").read_bytes() == b"another run's"
    best.unlink()
    with pytest.raises(core.Failure, match="the best model so far is missing"):
        C.main([*again, str(tmp_path / "c")])


def files(directory):
    """Every file below the directory by its content; the lock aside."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name not in (".lock", ".holder")]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


SHORT = [*RUN, "--datasets", "synth_add", "--log-every", "1"]  # 36 rows: 3 updates an epoch


def stop_after(updates, monkeypatch, signum=signal.SIGTERM):
    """Let the signal arrive in the update of that number, as `kill` would send it."""
    step, done = C.MuGrokfast.step, []

    def interrupted(optimizer):
        step(optimizer)
        done.append(1)
        if len(done) == updates:
            signal.raise_signal(signum)

    monkeypatch.setattr(C.MuGrokfast, "step", interrupted)


def test_a_finished_run_is_left_as_it_is_and_can_be_made_longer(tmp_path, capsys):
    here = [*SHORT, "--checkpoint-dir", str(tmp_path)]
    first = C.main([*here, "--epochs", "1"])
    before = files(tmp_path)
    again = C.main([*here, "--epochs", "1", "--resume", "--log-every", "7"])
    assert again == json.loads(json.dumps(first)) and files(tmp_path) == before
    assert "finished already" in capsys.readouterr().out
    for flags, says in ((["--muon-lr", "2e-3"], r"muon_lr 0\.005 -> 0\.002"), (["--dropout", "0"], "dropout 0.1 -> 0")):
        with pytest.raises(core.Failure, match=says) as failure:
            C.main([*here, "--epochs", "1", "--resume", *flags])
        assert failure.value.code == 2 and files(tmp_path) == before
    longer = C.main([*here, "--epochs", "2", "--resume"])
    assert [h["epoch"] for h in longer["history"]] == [1, 2] and longer["steps"] == 6
    assert longer["history"][0] == first["history"][0] and len(longer["manifest"]["segments"]) == 2
    with pytest.raises(core.Failure, match="epochs 2 -> 1"):
        C.main([*here, "--epochs", "1", "--resume"])


@pytest.mark.parametrize("updates", [4, 6], ids=["in an epoch", "at its end"])
def test_sigterm_then_resume_is_bitwise_equal(updates, monkeypatch, tmp_path):
    flags = [*SHORT, "--epochs", "3", "--checkpoint-dir"]
    whole = C.main([*flags, str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        stop_after(updates, patch)
        with pytest.raises(core.Failure, match=f"interrupted at step {updates} .*continue with --resume") as failure:
            C.main([*flags, str(tmp_path / "cut")])
    assert failure.value.code == 143
    state = core.load_checkpoint(tmp_path / "cut" / "reasoning" / "last.pt")
    assert state["global_step"] == state["step"] == updates and len(state["history"]) == 1
    resumed = C.main([*flags, str(tmp_path / "cut"), "--resume"])
    assert comparable(resumed) == comparable(whole)
    assert same_tensors(*(final_state(tmp_path / d / "reasoning") for d in ("cut", "whole")))
    logs = [(tmp_path / d / "reasoning" / "metrics.jsonl").read_text().splitlines() for d in ("cut", "whole")]
    timed = ("system/tokens_per_second", "time/", "final/training_time", "diversity/inference", "final/model_size")
    rows = [[{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in log] for log in logs]
    assert rows[0] == rows[1]


def test_a_signal_between_two_of_all_ends_the_rest(monkeypatch, tmp_path):
    stop_after(3, monkeypatch)  # the last update of `reasoning`, which still writes its result
    flags = ["--all", "--test", "--epochs", "1", "--synth-rows", "40", "--datasets", "synth_add"]
    with pytest.raises(core.Failure, match="interrupted after reasoning") as failure:
        C.main([*flags, "--checkpoint-dir", str(tmp_path)])
    assert failure.value.code == 143
    assert (tmp_path / "reasoning" / "cognate_results.json").exists() and not (tmp_path / "memory").exists()


def test_changed_data_or_tokenizer_is_refused_on_resume(published, monkeypatch, tmp_path):
    here = [*RUN, "--data-dir", str(published), "--datasets", "gsm8k", "--checkpoint-dir", str(tmp_path / "r")]
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(core.Failure, match="interrupted"):
            C.main(here)
    before, path = files(tmp_path / "r"), published / "gsm8k" / "train.jsonl"
    original = path.read_text()
    path.write_text(original.replace("Tim has 3 pens", "Tim has 3 pets"))
    with pytest.raises(core.Failure, match="data changed, not what the run began with") as failure:
        C.main([*here, "--resume"])
    assert failure.value.code == 2 and files(tmp_path / "r") == before
    path.write_text(original)
    with monkeypatch.context() as patch:
        digest = core.tokenizer_digest
        patch.setattr(core, "tokenizer_digest", lambda tokenizer: digest(tokenizer) + "x")
        with pytest.raises(core.Failure, match="tokenizer changed"):
            C.main([*here, "--resume"])
    assert files(tmp_path / "r") == before and C.main([*here, "--resume"])["history"]


def test_evaluation_and_saving_are_not_training_time(monkeypatch, tmp_path):
    """A clock that moves by a second in each update and by a thousand in everything else."""
    now, step, evaluate, save = [0.0], C.MuGrokfast.step, C.evaluate, core.save_checkpoint

    def taking(seconds, call):
        def slowed(*args, **kwargs):
            now[0] += seconds
            return call(*args, **kwargs)

        return slowed

    monkeypatch.setattr(core, "clock", lambda: now[0])
    monkeypatch.setattr(C.MuGrokfast, "step", taking(1.0, step))
    monkeypatch.setattr(C, "evaluate", taking(1000.0, evaluate))
    monkeypatch.setattr(C, "check_outputs", taking(1000.0, C.check_outputs))
    monkeypatch.setattr(core, "save_checkpoint", taking(1000.0, save))
    result = C.main([*SHORT, "--epochs", "2", "--save-every", "1", "--checkpoint-dir", str(tmp_path)])
    assert result["train_seconds"] == 6 and [h["seconds"] for h in result["history"]] == [3, 3]
    assert result["tokens_per_s"] == result["tokens"] / 6 and result["wall_s"] > 5000
    rows = [json.loads(line) for line in (tmp_path / "reasoning" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if r["kind"] == "step"]
    assert sum(r["system/tokens_per_second"] for r in steps) == result["tokens"]  # a second each


@pytest.mark.parametrize("clip, clipped", [("0.25", True), ("0", False)])
def test_the_gradient_is_clipped_before_the_filter(clip, clipped, monkeypatch, tmp_path):
    given, step = [], C.MuGrokfast.step

    def watched(optimizer):
        given.append(float(torch.cat([p.grad.flatten() for p in optimizer.named.values()]).norm()))
        step(optimizer)

    monkeypatch.setattr(C.MuGrokfast, "step", watched)
    C.main([*SHORT, "--gradient-clip", clip, "--checkpoint-dir", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "reasoning" / "metrics.jsonl").read_text().splitlines()]
    logged = [r["train/gradient_norm"] for r in rows if r["kind"] == "step"]
    assert len(logged) == 3 and min(logged) > 0.25  # the log has the norm before clipping
    for before, norm in zip(logged, given):
        assert math.isclose(norm, 0.25 if clipped else before, rel_tol=1e-4)


def test_the_largest_norm_is_that_after_warm_up(monkeypatch, tmp_path):
    norms = iter((9.0, 5.0, 3.0))  # of three updates the first is warm-up
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(next(norms)))
    result = C.main([*SHORT, "--checkpoint-dir", str(tmp_path)])
    assert result["grad_norm_max_after_warmup"] == 5
    assert result["history"][0]["grad_norm_max"] == 9 and math.isclose(result["history"][0]["grad_norm_mean"], 17 / 3)


def test_only_a_checkpoint_of_this_specialisation_is_resumed(finished, tmp_path):
    here = [*RUN, "--epochs", "3", "--save-every", "1", "--checkpoint-dir", str(tmp_path), "--resume"]
    state = core.load_checkpoint(finished[0] / "last.pt")
    foreign = state | {"manifest": state["manifest"] | {"script": "phase_a_validation.py"}, "arm": "cf_hot"}
    core.save_checkpoint(tmp_path / "phase_a.pt", {k: v for k, v in foreign.items() if k != "history"})
    for path in (tmp_path / "phase_a.pt", finished[0] / "best_model.pt"):
        with pytest.raises(core.Failure, match="not a training checkpoint of this script") as failure:
            C.main([*here, str(path)])
        assert failure.value.code == 2 and "\n" not in str(failure.value)
    with pytest.raises(core.Failure, match=r"flags differ .*model reasoning -> memory"):
        C.main([*here, str(finished[0] / "last.pt"), "--model", "memory"])
    assert not list(tmp_path.glob("*/manifest.json"))


def test_the_weight_average_and_the_second_tracker_flag_are_gone():
    for flags in (["--ema-decay", "0.9"], ["--wandb-mode", "maybe"]):
        with pytest.raises(core.Failure):
            C.parse(["--model", "reasoning", *flags])
    names = {f.name for f in dataclasses.fields(C.Args)}
    assert "wandb_mode" not in names and "ema_decay" not in names
    assert not {"HeadLoss", "head_loss", "weights_of", "try_checkpoint"} & set(vars(C))


def test_dry_run_estimates_the_memory_of_its_configuration():
    def total(*more):
        args = C.parse(["--model", "reasoning", *more])
        return C.dry_run(args, ["reasoning"], core.engine(args))["reasoning"]["memory_gb"]["total"]

    assert total("--batch-size", "8") < total() < total("--t-max", "9")


def test_check_11_early_stopping(monkeypatch, tmp_path, capsys):
    script = iter([9.0, 1.0, 0.995, 0.993, 0.992, 0.5, 0.5])  # untrained first
    whole = C.evaluate

    def scripted(model, data, args):
        return whole(model, data, args) | {"loss": next(script)}

    monkeypatch.setattr(C, "evaluate", scripted)
    result = C.main([*RUN, "--epochs", "10", "--datasets", "synth_add", "--checkpoint-dir", str(tmp_path)])
    assert len(result["history"]) == 4 and result["best_epoch"] == 1 and result["early_stop_epoch"] == 4
    out = capsys.readouterr().out
    assert "Early stopping triggered (patience=3)" in out and "Best val loss: 1.0000 at epoch 1" in out
    report = {r["id"]: r["pass"] for r in result["report"]}
    assert report["early_stop_late"] is False


@pytest.mark.slow
def test_check_3_all_three_are_ready_for_handoff(tmp_path):
    results = C.main(
        [
            "--all",
            "--test",
            "--epochs",
            "2",
            "--synth-rows",
            "20",
            "--wandb-mode",
            "disabled",
            "--checkpoint-dir",
            str(tmp_path),
        ]
    )
    assert list(results) == list(C.SPECIALISATIONS)
    for name in C.SPECIALISATIONS:
        report = {r["id"]: r["pass"] for r in json.loads((tmp_path / name / "report.json").read_text())}
        assert report["handoff_ready"] is True
    assert len({r["history"][0]["val_loss"] for r in results.values()}) == 3
    (tmp_path / "speed" / "best_model.pt").write_bytes(b"damaged")
    assert C.handoff_ready(tmp_path)[0] is False
    assert len(results["speed"]["final"]["loss_per_state"]) == 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "bf16"],
        ["--no-act"],
        ["--no-memory"],
        ["--ltm-carry", "none"],
        ["--gradient-checkpointing"],
        ["--plain"],
        ["--t-max", "0"],
    ],
    ids=lambda f: f[0],
)
def test_every_variant_trains(flags, tmp_path):
    result = C.main([*RUN, *flags, "--datasets", "synth_add", "--checkpoint-dir", str(tmp_path)])
    assert result["final"]["loss"] < result["untrained_val_loss"] and result["causality_max_abs_diff"] == 0


def test_no_validate_keeps_the_last_epoch_and_validation_is_inert(finished, tmp_path):
    result = C.main([*RUN, "--epochs", "2", "--no-validate", "--checkpoint-dir", str(tmp_path)])
    assert result["best_epoch"] == 2 and all(h["val_loss"] is None for h in result["history"])
    mine, theirs = (final_state(d)["model_state_dict"] for d in (tmp_path / "reasoning", finished[0]))
    assert same_tensors(mine, theirs)


def test_an_earlier_best_model_is_kept(finished, tmp_path, capsys):
    (tmp_path / "reasoning").mkdir()
    (tmp_path / "reasoning" / "best_model.pt").write_bytes((finished[0] / "best_model.pt").read_bytes())
    C.main([*RUN, "--datasets", "synth_add", "--checkpoint-dir", str(tmp_path)])
    assert "WARNING: best_model.pt" in capsys.readouterr().out
    assert (tmp_path / "reasoning" / "best_model.prev.pt").read_bytes() == (finished[0] / "best_model.pt").read_bytes()


def test_non_finite_gradients_are_skipped_then_fatal(monkeypatch, tmp_path):
    whole = torch.nn.utils.clip_grad_norm_
    calls = []

    def broken(parameters, limit, **more):
        calls.append(1)
        return torch.tensor(math.nan) if len(calls) in bad else whole(parameters, limit, **more)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    bad = {2}
    result = C.main([*RUN, "--datasets", "synth_add", "--checkpoint-dir", str(tmp_path / "a")])
    assert result["nonfinite_steps"] == 1
    bad, calls = set(range(100)), []
    with pytest.raises(core.Failure, match="20 times in a row") as failure:
        C.main([*SHORT, "--synth-rows", "200", "--grad-accum", "1", "--checkpoint-dir", str(tmp_path / "b")])
    assert failure.value.code == core.DIVERGED


def test_lesson_14_no_metric_is_a_literal(finished, tmp_path):
    """Another model, under other flags, gives another value of every logged metric and every column of the history."""
    C.main(
        [
            "--test",
            "--model",
            "memory",
            "--synth-rows",
            "60",
            "--epochs",
            "3",
            "--d-model",
            "32",
            "--n-heads",
            "2",
            "--init-std",
            "0.2",
            "--halt-threshold",
            "0.45",
            "--lr",
            "2e-3",
            "--muon-lr",
            "1e-2",
            "--grokfast-lambda",
            "0.5",
            "--no-curriculum",
            "--checkpoint-dir",
            str(tmp_path),
        ]
    )
    counted = {"train/skipped_updates", "gen/collapsed"}  # 0 and true in both: other tests make them differ
    counted |= {f"val/{name}_accuracy" for name in C.GENERATED}  # likewise: no answer is right so early
    seen = []
    for directory in (finished[0], tmp_path / "memory"):
        rows, values = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()], {}
        for row in rows:
            for key in row.keys() - {"kind"}:
                values.setdefault(f"{row['kind']} {key}", []).append(row[key])
        for row in csv.DictReader((directory / "history.csv").open()):
            for key in row:
                values.setdefault(f"history {key}", []).append(row[key])
        seen.append(values)
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) > 65
    same = {key for key in seen[0] if seen[0][key] == seen[1][key]} - {"start train/step"}  # both start at update 0
    assert {key.split()[1] for key in same} <= counted, same


class Knowing(torch.nn.Module):
    """Stands in for a model that knows the rows by heart, but for the tokens `wrong(row, position)`."""

    def __init__(self, rows, wrong):
        super().__init__()
        self.backbone, self.rows, self.wrong = tiny().backbone, rows, wrong

    def forward(self, ids, labels, attention_mask, return_logits):
        right = []
        for row, column in (labels[:, 1:] != -100).nonzero().tolist():
            length = int(attention_mask[row].sum())
            number = self.rows.ids.index(ids[row, :length].tolist())
            right.append(not self.wrong(number, column + 1))
        real = attention_mask.float()
        scores = {"token_ce": torch.ones(1, len(right)), "token_correct": torch.tensor(right)[None]}
        return scores | {"real": real, "q": [real * 0.5], "token_halting_steps": real}


@pytest.mark.parametrize(
    "wrong, answered",
    [
        (lambda rows, i, t: False, 1.0),
        (lambda rows, i, t: t == len(rows.ids[i]) - 1, 0.0),  # the end token
        (lambda rows, i, t: t == rows.answers[i], 0.0),  # the first token of the answer
        (lambda rows, i, t: t == rows.answers[i] - 1, 1.0),  # the last token of the question does not count
        (lambda rows, i, t: i % 2 == 0 and t == rows.answers[i], 0.5),
    ],
    ids=["all right", "end wrong", "first wrong", "question wrong", "half wrong"],
)
def test_answer_accuracy_counts_whole_answers(wrong, answered):
    args = C.parse([*RUN, "--datasets", "synth_add", "--no-act"])
    data = C.load_data(args)
    model = Knowing(data.val, lambda i, t: wrong(data.val, i, t))
    scores = C.evaluate(model, data, args)
    assert scores["datasets"]["synth_add"]["answers"]["mean"] == answered
    expected = 1 - sum(wrong(data.val, i, t) for i, ids in enumerate(data.val.ids) for t in range(1, len(ids))) / sum(
        len(ids) - 1 for ids in data.val.ids
    )
    assert math.isclose(scores["token_accuracy"], expected)


# -------------------------------------------------------------------------------------------------------- generation
def test_check_4_validate_writes_five_prompts_and_a_verdict(finished, tmp_path, capsys):
    path = tmp_path / "out.json"
    with pytest.raises(core.Failure) if _collapsed(finished[0]) else _nothing():
        C.main(["--validate", str(finished[0] / "best_model.pt"), "--report", str(path), "--adaptive"])
    report = json.loads(path.read_text())
    assert len(report["prompts"]) == 5 and report["verdict"] in ("ok", "collapsed")
    assert report["specialization"] == "reasoning" and report["epoch"] == 2
    out = capsys.readouterr().out
    assert "Q: The capital of France is Paris. Q: What is the capital of France? A:\n→ " in out
    wanted = "prompt first_token text expected hit distinct_ratio top_share max_run colon_only copy_last garbage_share"
    assert set(wanted.split()) <= set(report["prompts"][0]) and len(report["prompts"][0]["top5"]) == 5


def _collapsed(directory):
    model, tokenizer, _ = C.load_saved(str(directory / "best_model.pt"))
    return bool(C.check_outputs(model, tokenizer, adaptive=True)["reasons"])


def _nothing():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("rule, reason", [("colon", "colon_only"), ("copy", "copy_last"), ("cycle", "distinct_ratio")])
def test_check_5_collapse_is_recognised(finished, monkeypatch, rule, reason):
    """A model rigged to say only ":", to repeat its last token, or to alternate between two."""

    def rigged(self, ids, **kwargs):
        last, logits = ids[0, -1], torch.zeros(1, ids.shape[1], V)
        a, b, colon = (_byte(c) for c in "ab:")
        choice = {"colon": colon, "copy": int(last), "cycle": b if last == a else a}[rule]
        logits[0, -1, choice] = 9.0
        return {"logits": logits}

    monkeypatch.setattr(C.TRMTitansMAGModel, "forward", rigged)
    with pytest.raises(core.Failure, match=reason) as failure:
        C.main(["--validate", str(finished[0] / "best_model.pt"), "--report", str(finished[0] / "rigged.json")])
    assert failure.value.code == 1
    assert reason in json.loads((finished[0] / "rigged.json").read_text())["reasons"]


def _byte(c):
    return core.train_tokenizer([])(c)["input_ids"][0]


def test_continuation_statistics_by_hand():
    stats = C.continuation_stats([5, 5, 5, 7], "ab\ufffd\x00", 5)
    assert stats["distinct_ratio"] == 0.5 and stats["top_share"] == 0.75 and stats["max_run"] == 3
    assert stats["copy_last"] and stats["garbage_share"] == 0.5 and not stats["colon_only"]
    assert C.continuation_stats([1, 2], ":: :", 9)["colon_only"]


def test_prompts_from_a_file(finished, tmp_path):
    (tmp_path / "p.txt").write_text("What is 1 + 1? A:\t2\nHello\n")
    model, tokenizer, _ = C.load_saved(str(finished[0] / "best_model.pt"))
    monkey = C.check_outputs(model, tokenizer, [("Hello", None)])
    assert monkey["prompts"][0]["hit"] is None
    with pytest.raises(core.Failure, match="no prompt"):
        (tmp_path / "empty.txt").write_text("\n")
        C.main(["--validate", str(finished[0] / "best_model.pt"), "--prompts", str(tmp_path / "empty.txt")])


SNIPPET = """
import torch
from pathlib import Path
import sys
sys.path.insert(0, 'src')

from train_phase1_cognate import TRMTitansMAGModel
from train_phase1_cognate import Phase1Config
from transformers import GPT2Tokenizer

# Load model
config = Phase1Config(specialization='reasoning')
model = TRMTitansMAGModel(config)
checkpoint = torch.load('checkpoints/phase1/reasoning/best_model.pt', map_location='cpu')
model.load_state_dict(checkpoint['model_state_dict'])
model.eval()

# Load tokenizer
tokenizer = GPT2Tokenizer.from_pretrained('gpt2')
tokenizer.pad_token = tokenizer.eos_token

# Test prompts
prompts = [
    'If a store has 15 apples and sells 7, how many are left? A:',
    'What is 25 + 17? A:',
    'The capital of France is Paris. Q: What is the capital of France? A:'
]

for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors='pt', max_length=64, truncation=True)
    with torch.no_grad():
        output = model(inputs['input_ids'])
        logits = output['logits'][0, -1, :]  # Last token
        predicted_id = logits.argmax().item()
        predicted_token = tokenizer.decode([predicted_id])

    print(f'Q: {prompt}')
    print(f'→ {predicted_token}')
    print()
"""


@pytest.mark.slow
def test_check_6_the_documents_step_8_snippet_on_a_full_size_checkpoint(monkeypatch, tmp_path, capsys):
    """Only its two import lines differ from the document; GPT-2's tokenizer, which is on the hub, is the byte one."""
    import transformers

    small = ["--datasets", "synth_recall", "--synth-rows", "4", "--max-length", "100"]
    where = ["--checkpoint-dir", "checkpoints/phase1"]
    monkeypatch.chdir(tmp_path)
    result = C.main(["--test", "--size", "full", "--model", "reasoning", *small, *where])
    assert result["parameters"]["total"] == 25_623_681 and 100 < result["model_size_mb"] < 105
    monkeypatch.setattr(transformers.GPT2Tokenizer, "from_pretrained", lambda name: core.train_tokenizer([]))
    monkeypatch.setattr(sys, "path", list(sys.path))
    capsys.readouterr()
    exec(SNIPPET, {})
    assert len(re.findall("^→ ", capsys.readouterr().out, re.M)) == 3
    assert (tmp_path / "checkpoints/phase1/reasoning/last.pt").stat().st_size / 1e6 < 420


# ------------------------------------------------------------------------------------------------- shell and commands
@pytest.mark.slow
def test_check_2_the_smoke_test_at_the_shell(script, tmp_path):
    code = "import train_phase1_cognate as C; C.core.cli(C.main); print('RSS', C.core.peak_memory())"
    words = ["--model", "reasoning", "--test", "--epochs", "1", "--checkpoint-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Epoch (\d+):\s+train=([\d.]+), val=([\d.]+)", done.stdout, re.M)
    assert "  Step 10, Batch 10: loss=" in done.stdout
    assert re.search(r"^Best val loss: [\d.]+ at epoch 1$", done.stdout, re.M)
    for name in ("best_model.pt", "last.pt", "history.csv", "report.json"):
        assert (tmp_path / "reasoning" / name).exists()
    result = json.loads((tmp_path / "reasoning" / "cognate_results.json").read_text())
    assert result["val_loss"][0][1] < result["untrained_val_loss"]
    assert result["canary"]["lowest"] >= math.log(V) - 0.1
    assert int(re.search(r"RSS (\d+)", done.stdout)[1]) < 1e9


@pytest.mark.parametrize("command", DOCUMENTED)
def test_documented_commands_parse_with_the_documented_values(command):
    args = C.parse(command.split())
    if "--test" not in command:
        assert args.batch_size * args.grad_accum == 64 and args.size == "full" and args.tokenizer == "gpt2"
        assert args.muon_lr in (5e-3, 2e-3) and args.learning_rate == 5e-4 and args.grokfast_lambda == 0.02
    if "nuclear" in command:
        assert args.grad_accum == 8 and args.epochs == 5 and len(args.datasets) == 6
    if "specialization" in command:
        assert args.model == "memory"


def test_test_sets_only_what_was_not_given():
    args = C.parse("--model reasoning --test --epochs 3 --batch-size 4 --max-length 64 --tokenizer local".split())
    assert (args.epochs, args.batch_size, args.grad_accum, args.max_length) == (3, 4, 2, 64)
    assert args.tokenizer == "local" and args.size == "tiny" and args.wandb == "off"
    assert C.parse("--model reasoning --wandb-mode disabled".split()).wandb == "off"
    assert C.parse(["--model", "reasoning"]).wandb == "offline"


BAD = [
    ([], "--model reasoning|memory|speed"),
    (["--model", "foo"], "--model"),
    (["--model", "speed", "--all"], "exclude"),
    (["--model", "reasoning", "--datasets", "nope"], "nope: unknown"),
    (["--model", "reasoning", "--val-split", "0"], "--val_split"),
    (["--model", "reasoning", "--val-split", "1.5"], "--val_split"),
    (["--model", "reasoning", "--batch-size", "0"], "--batch_size"),
    (["--model", "reasoning", "--epoch", "1"], "--epoch"),
    (["--model", "reasoning", "--t-max", "10"], "--t_max"),
    (["--model", "reasoning", "--d-model", "30", "--n-heads", "4"], "do not agree"),
    (["--model", "reasoning", "--max-length", "300"], "position table"),
    (["--model", "reasoning", "--grokfast-alpha", "1"], "grokfast_alpha"),
    (["--model", "reasoning", "--precision", "fp16"], "precision"),
    (["--model", "reasoning", "--lr", "inf"], "learning_rate inf"),
    (["--model", "reasoning", "--checkpoint-dir", " "], "--checkpoint_dir"),
    (["--model", "reasoning", "--vocab-size", "100"], "give --vocab_size 259"),
    (["--model", "reasoning", "--datasets", "gsm8k"], "--data_dir"),
    (["--model", "reasoning", "--data-dir", "/no/such", "--datasets", "gsm8k"], "none of"),
    (["--model", "reasoning", "--tokenizer", "gpt2"], "--tokenizer byte"),
    (["--model", "reasoning", "--resume", "/no/such.pt"], "/no/such.pt"),
    (["--validate", "/no/such.pt"], "/no/such.pt"),
]


@pytest.mark.parametrize("flags, says", BAD, ids=[" ".join(b[0])[:50] or "nothing" for b in BAD])
def test_check_15_bad_input_is_one_line(flags, says, tmp_path):
    with pytest.raises(core.Failure) as failure:
        C.main(["--test", "--synth-rows", "20", "--checkpoint-dir", str(tmp_path), *flags])
    assert failure.value.code == 2 and says in str(failure.value) and "\n" not in str(failure.value)
    assert not list(tmp_path.glob("*/best_model.pt"))


def test_check_15_checkpoints_that_do_not_fit(finished, tmp_path):
    (tmp_path / "broken.pt").write_bytes((finished[0] / "best_model.pt").read_bytes()[:5000])
    torch.save({"x": torch.zeros(2)}, tmp_path / "foreign.pt")
    state = torch.load(finished[0] / "best_model.pt", weights_only=True)
    torch.save(state | {"config": C.Phase1Config().to_dict()}, tmp_path / "other_size.pt")
    for name, says in (("broken", "not a checkpoint"), ("foreign", "not a checkpoint"), ("other_size", "disagree")):
        with pytest.raises(core.Failure, match=says) as failure:
            C.main(["--validate", str(tmp_path / f"{name}.pt")])
        assert failure.value.code == 2
    with pytest.raises(RuntimeError):  # and in the API, the library's own error
        C.TRMTitansMAGModel(C.Phase1Config()).load_state_dict(state["model_state_dict"])


@pytest.mark.slow
def test_check_15_at_the_shell(script, tmp_path):
    done = script("train_phase1_cognate.py", "--model", "foo")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    shown = script("train_phase1_cognate.py", "--help")
    assert shown.returncode == 0 and "no keys and values" in shown.stdout


def test_check_16_wandb_offline_and_absent(tmp_path, monkeypatch, capsys):
    flags = [*RUN, "--datasets", "synth_add", "--wandb-mode", "offline"]
    C.main([*flags, "--checkpoint-dir", str(tmp_path / "a")])
    assert list((tmp_path / "a" / "reasoning" / "wandb").glob("offline-run-*"))
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = C.main([*flags, "--checkpoint-dir", str(tmp_path / "b")])
    assert capsys.readouterr().out.count("[W&B] off") == 1 and result["history"]


def test_lesson_16_only_the_run_directory_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    C.main([*RUN, "--datasets", "synth_add"])
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints"}
    assert {p.name for p in (tmp_path / "checkpoints/phase1_test/reasoning").iterdir()} <= {
        "best_model.pt",
        "last.pt",
        "log.jsonl",
        "metrics.jsonl",
        "history.csv",
        "report.json",
        "manifest.json",
        "cognate_results.json",
        ".lock",
        ".holder",
        "README.md",
    }
    source = (ROOT / "train_phase1_cognate.py").read_text()
    assert "os.kill" not in source and "psutil" not in source


def test_finished_runs_are_not_overwritten(tmp_path):
    flags = [*RUN, "--datasets", "synth_add", "--checkpoint-dir", str(tmp_path)]
    C.main(flags)
    path = tmp_path / "reasoning" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["flags"]["test"] = False
    path.write_text(json.dumps(manifest))
    with pytest.raises(core.Failure, match="already holds a run"):
        C.main(flags)
    C.main([*flags, "--overwrite"])
    assert (tmp_path / "reasoning" / "best_model.prev.pt").exists()


@pytest.mark.slow
def test_check_10_a_tiny_model_overfits_32_recall_rows():
    args = C.parse(
        [
            *RUN,
            "--datasets",
            "synth_recall",
            "--dropout",
            "0",
            "--init-std",
            "0.05",
            "--tokenizer",
            "local",
            "--vocab-size",
            "420",
        ]
    )
    data = C.load_data(args)
    torch.manual_seed(0)
    model = C.build_model(args, 420)
    optimizer, rows, best, spread = C.MuGrokfast(model, 2e-3), data.train, math.inf, 0.0
    ids, labels, mask = C.collate(rows, list(range(32)), "cpu", 256)
    asked = torch.tensor([rows.answers[i] for i in range(32)])[:, None] <= torch.arange(1, ids.shape[1])
    row, column = (labels[:, 1:] != -100).nonzero().T
    model.train()
    for _ in range(400):
        out = model(ids, labels=labels, attention_mask=mask, return_logits=False)
        best = min(best, float(out["token_ce"][-1][asked[row, column]].mean()))
        spread = max(spread, float(C.variance_within(out["q"][-1].detach(), out["real"])))
        if best < 0.1 and spread > 0:
            break
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert best < 0.1 and spread > 0


# ------------------------------------------------------------------------------------------ binding, floors, arms
BIND = ["--datasets", "bind_copy", "bind_gap", "bind_2", "bind_4"]


def test_binding_rows_have_the_form_of_the_documents_prompt():
    row = C.binding_row("bind_2", {"France": "Paris"}, ["France", "Norland"])
    asked = "The capital of France is Paris. Q: What is the capital of France? A:"
    assert row["text"] == f"{asked} Paris Q: What is the capital of Norland? A: unknown" and asked == C.PROMPTS[2][0]
    tokenizer = core.train_tokenizer([])
    ids, start, scored = C.encode_row(row, tokenizer, 256)
    said = tokenizer.decode([i for i, counts in zip(ids, scored) if counts])
    assert said == " Paris<eos> unknown<eos>" and tokenizer.decode(ids[:start]) == asked
    assert C.encode_row(row, tokenizer, 100) is None


def test_binding_rows_ask_about_what_they_say_and_keep_a_fifth_of_the_names_for_later():
    known, novel = C.names_of(False), C.names_of(True)
    for kept, held_out, names in zip(known, novel, (C.COUNTRIES, C.CITIES)):
        assert set(kept) | set(held_out) == set(names) and not set(kept) & set(held_out)
        assert len(held_out) == len(names) // 5
    never, absent, counts = {*novel[0], *novel[1]}, 0, set()
    for row in C.generate_rows("bind_4", 300, 0.1):
        facts = dict(re.findall(r"of (\w+) is (\w+)\.", row["text"]))
        asked = re.findall(r"What is the capital of (\w+)\? A: (\w+)", row["text"])
        assert len(asked) == 4 and 2 <= len(facts) <= 4 and len(set(facts.values())) == len(facts)
        assert all(answer == facts.get(country, "unknown") for country, answer in asked)
        assert not never & set(re.findall(r"\w+", row["text"]))
        absent += sum(answer == "unknown" for _, answer in asked)
        counts.add(len(facts))
    assert counts == {2, 3, 4} and 0.2 < absent / 1200 < 0.3
    for name in ("bind_copy", "bind_gap"):
        for row in C.generate_rows(name, 40, 0.1):
            words = [text.split()[-1] for text, scored in row["pieces"] if scored is None]
            assert words == [w for w in re.findall(r"\w+", row["text"]) if w in known[0] + known[1]][: len(words)]
            assert 4 <= len(words) <= 10


def test_only_scored_tokens_are_targets():
    args = C.parse([*RUN, "--datasets", "bind_2", "--synth-rows", "20", "--max-length", "256"])
    data = C.load_data(args)
    _, labels, _ = C.collate(data.train, [0, 1, 2], "cpu", 256)
    for i, row in enumerate(labels):
        told = [int(token) for token in row if token != -100]
        text = data.tokenizer.decode(told)
        assert len(told) == data.train.targets(i) and re.fullmatch(r"( \w+<eos>){4}", text), text
    updates = [[[0, 1], [2]]]
    assert C.count_targets(data.train, updates) == int((labels[:, 1:] != -100).sum())


def slow_floors(train, rows, scored, vocab):
    """Interpolated Witten-Bell by dictionaries, in rows of any length; nats over the scored tokens."""
    counts = [{}, {}, {}]
    for row in train:
        for t in range(len(row)):
            for n in range(min(t, 2) + 1):
                following = counts[n].setdefault(tuple(row[t - n : t]), {})
                following[row[t]] = following.get(row[t], 0) + 1
    nats = [[], [], []]
    for row, mask in zip(rows, scored):
        for t in range(1, len(row)):
            p = 1 / vocab
            for n in range(3):
                following = counts[n].get(tuple(row[t - n : t]), {}) if n <= t else {}
                if following:
                    p = (following.get(row[t], 0) + len(following) * p) / (sum(following.values()) + len(following))
                if mask[t]:
                    nats[n].append(-math.log(p))
    return {name: sum(part) / len(part) for name, part in zip(("unigram", "bigram", "trigram"), nats)}


def test_floors_of_rows_of_any_length_are_the_slow_ones():
    def rows(count, seed):  # tokens 1 to 7, each row closed by the end token 0
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 9, (count,), generator=g).tolist()
        return [[*torch.randint(1, 8, (n,), generator=g).tolist(), 0] for n in lengths]

    train, val = rows(60, 0), rows(30, 1)
    scored = [[(i + t) % 3 > 0 for t in range(len(row))] for i, row in enumerate(val)]
    whole = C.Rows(train, [1] * 60, ["a"] * 60, [[True] * len(row) for row in train])
    for masks in (scored, [[True] * len(row) for row in val]):
        expected = slow_floors(train, val, masks, 8)
        assert C.ngram_floors(whole, val, masks, 8) == pytest.approx(expected, rel=1e-9)


def test_halting_is_set_against_as_many_stops_at_random_by_hand():
    """Two rows of two tokens, three states. At 0.5 the stops are after states 1, 2, 2, 1."""
    ce = torch.tensor([[4.0, 4, 4, 4], [1, 3, 3, 1], [2, 1, 2, 5]], dtype=torch.float64)
    q = torch.tensor([[0.9, 0.1, 0.2, 0.6], [0.0, 0.0, 0.0, 0.0]])
    scores = C.Scores(torch.tensor([0, 0, 1, 1]), ce, torch.ones(4), torch.zeros(4), q)
    first = C.halting_figures(scores, 0.5)["own"]
    assert first["threshold"] == 0.5 and first["states"] == 2.5
    assert first["loss"] == (1 + 1 + 2 + 1) / 4  # of states 1, 2, 2, 1
    assert first["loss_at_random"] == (2 + 2.5) / 2  # means of the states 1 and 2 are 2 and 2.5
    assert first["loss_fixed"] == 2.25 and first["saved"]["mean"] == 1.0 and first["saved"]["n"] == 2
    never = C.halting_figures(scores, 0.95)["own"]
    assert never["states"] == 3 and never["loss"] == never["loss_at_random"] == never["loss_fixed"] == 2.5


def test_fewer_refinements_than_trained_with_are_those_of_a_shallower_model():
    args = C.parse([*RUN, "--datasets", "synth_add", "--synth-rows", "20"])
    data, model = C.load_data(args), tiny()
    expected = C.evaluate(model, data, args)["loss_per_state"]
    shallow = tiny()
    shallow.trm.config = dataclasses.replace(shallow.trm.config, micro_steps=1)
    figures = C.truncated(model, data, args)
    assert list(figures["micro2"].values()) == pytest.approx(expected)
    assert list(figures["micro1"].values()) == pytest.approx(C.evaluate(shallow, data, args)["loss_per_state"])
    assert abs(figures["micro1"]["y3"] - expected[3]) > 1e-4 and figures["micro1"]["y0"] == pytest.approx(expected[0])
    assert C.evaluate(model, data, args)["loss_per_state"] == expected


def test_the_first_point_below_a_floor():
    curve = [[5, 50, 1.5, 2.0], [10, 100, 3.0, 1.0], [15, 150, 4.5, 0.9]]
    found = C.reached(curve, {"unigram": 2.0, "bigram": 0.95, "trigram": 0.5})
    assert found["unigram"] == {"step": 10, "tokens": 100, "seconds": 3.0} and found["bigram"]["step"] == 15
    assert found["trigram"] is None


def test_the_snippet_is_the_documents_but_for_its_import_lines():
    ours = SNIPPET.replace("train_phase1_cognate import T", "phase1_cognate.model.full_model import T")
    ours = ours.replace("train_phase1_cognate import P", "phase1_cognate.model.model_config import P")
    theirs = [row.split("\t")[1] for row in (ROOT / "tests/documented/cognate.tsv").read_text().splitlines()]
    snippet = next(row for row in theirs if row.startswith('python -c "'))
    code = (
        snippet.removeprefix('python -c "').removesuffix('"').replace("\u201a\u00dc\u00ed", "\u2192")
    )  # an arrow, misread
    assert " ".join(ours.split()) == " ".join(code.split())


def test_without_recursion_the_answer_is_the_first_state():
    flags = ["--model", "reasoning", "--size", "tiny", "--max-length", "64", "--dropout", "0"]
    with_steps, without = (C.build_model(C.parse([*flags, "--t-max", n]), V).eval() for n in ("3", "0"))
    ids = tokens(2, 30)
    first = with_steps(ids, return_all_steps=True)["all_logits"][0]
    out = without(ids, labels=ids)
    assert torch.allclose(out["logits"], first, atol=1e-6) and torch.allclose(out["loss_ce"], out["loss_final"])
    trm = {n for n, _ in without.named_parameters() if n.startswith("trm")}
    assert trm == {f"trm.{n}0_proj.{w}" for n in "zy" for w in ("weight", "bias")}
    assert (out["token_halting_steps"] == 1).all() and out["loss_act"] == 0


@pytest.mark.parametrize("size", [["--size", "tiny"], []], ids=["tiny", "full"])
def test_the_library_model_has_as_many_parameters(size):
    flags = ["--model", "reasoning", "--max-length", "64", *size]
    with torch.device("meta"):
        plain, ours = (C.build_model(C.parse([*flags, *more]), V) for more in (["--plain"], []))
    a, b = (model.count_parameters()["total"] for model in (plain, ours))
    assert abs(a / b - 1) < 0.002, (a, b)
    table = plain.parameter_table()
    assert table["total"] == a == sum(table[k] for k in ("embeddings", "layers", "norm", "act_head"))
    assert table["embeddings"] == ours.parameter_table()["embeddings"] and not table["trm"] + table["ltm"]


def test_the_library_model_is_the_library_model():
    from transformers import GPT2LMHeadModel

    args = C.parse(["--model", "reasoning", "--size", "tiny", "--max-length", "64", "--dropout", "0", "--plain"])
    model, ids = C.build_model(args, V).eval(), tokens(2, 40)
    reference = GPT2LMHeadModel(model.backbone.gpt2.config).eval()
    reference.transformer.load_state_dict(model.backbone.gpt2.state_dict())
    out, theirs = model(ids, labels=ids), reference(ids, labels=ids)
    assert torch.allclose(out["logits"], theirs.logits, atol=1e-5)
    assert math.isclose(float(out["loss"]), float(theirs.loss), rel_tol=1e-5)
    assert core.causality_audit(model, V, 40) < 1e-5
    muon = C.route(model)[0]
    assert muon and all(n.startswith("backbone.gpt2.h.") for n in muon)


@pytest.mark.parametrize(
    "rule, expected",
    [  # what each kind of reader would score
        ("binds", {"facts_4": 1, "facts_4_absent": 1, "swapped_facts": 1, "swapped_facts_old_answer": 0}),
        ("first", {"facts_4": 1 / 4, "facts_4_absent": 0, "swapped_facts": 1 / 4, "first_city_whatever_is_asked": 1}),
        ("last", {"facts_2": 1 / 2, "last_city_whatever_is_asked": 1, "first_city_whatever_is_asked": 0}),
        ("unknown", {"facts_4": 0, "facts_4_absent": 1, "facts_4_novel_names_absent": 1, "swapped_facts": 0}),
    ],
)
def test_probes_tell_a_reader_from_a_copy(monkeypatch, rule, expected):
    """The model is replaced by a rule on the text of the prompt."""
    args = C.parse([*RUN, "--datasets", "bind_4", "--probes", "2"])
    data = C.Data(None, None, core.train_tokenizer([]), 0)

    def scored(model, rows, args):
        missed = []
        for ids in rows.ids:
            text = data.tokenizer.decode(ids[:-1])
            facts = re.findall(r"of (\w+) is (\w+)\.", text)
            country, answer = re.search(r"What is the capital of (\w+)\? A: (\w+)$", text).groups()
            says = {"binds": dict(facts).get(country, "unknown"), "first": facts[0][1], "last": facts[-1][1]}
            missed.append(says.get(rule, "unknown") != answer)
        return C.Scores(torch.arange(len(missed)), None, None, torch.tensor(missed), None), None

    monkeypatch.setattr(C, "token_scores", scored)
    figures = C.binding_probes(tiny(), data, args)
    assert figures["without_the_question"] == 1 / 4
    for name, share in expected.items():
        assert figures[name]["mean"] == pytest.approx(share) and figures[name]["n"] == 2, name
    assert {"facts_6_untrained", "facts_2_novel_names", "swapped_question_old_answer"} <= set(figures)
    assert C.binding_probes(tiny(), data, C.parse([*RUN, "--datasets", "synth_add"])) is None


def test_a_stage_follows_when_the_one_before_is_learned(monkeypatch, tmp_path):
    whole, seen, right = C.evaluate, [], iter([0.5, 0.95, 0.91, 0.995])

    def scripted(model, data, args):
        scores = whole(model, data, args)
        if seen:
            scores["datasets"][seen[-1]]["token_accuracy"] = next(right, 1.0)
        return scores

    def watched(rows, chosen, *rest):
        seen.extend(chosen)
        return batches(rows, chosen, *rest)

    batches = C.epoch_batches
    flags = [*RUN, "--datasets", "synth_add", "synth_word", "synth_two_step", "--synth-rows", "20", "--staged"]
    C.epoch_sizes(args := C.parse([*flags, "--epochs", "9"]), C.load_data(args).train, 1, str)
    monkeypatch.setattr(C, "epoch_sizes", lambda *_: ([2] * 9, 1))
    monkeypatch.setattr(C, "evaluate", scripted)
    monkeypatch.setattr(C, "epoch_batches", watched)
    result = C.main([*flags, "--epochs", "9", "--early-stop-patience", "0", "--checkpoint-dir", str(tmp_path)])
    assert seen == ["synth_add", "synth_add", "synth_word", "synth_two_step"]
    assert [row["stage"] for row in result["history"]] == seen and result["steps"] == 8
    with pytest.raises(core.Failure, match="generated sets alone"):
        C.parse(["--model", "reasoning", "--staged", "--datasets", "gsm8k"])


def test_the_curve_is_inert_and_holds_the_losses(tmp_path):
    flags = [*SHORT, "--epochs", "2", "--dropout", "0.1"]
    without = C.main([*flags, "--checkpoint-dir", str(tmp_path / "a")])
    curve = C.main([*flags, "--eval-every", "1", "--checkpoint-dir", str(tmp_path / "b")])
    states = [final_state(tmp_path / d / "reasoning")["model_state_dict"] for d in "ab"]
    assert same_tensors(*states) and without["curve"] == []
    assert [point[0] for point in curve["curve"]] == [1, 2, 3, 4, 5, 6]
    assert [point[1] for point in curve["curve"]][-1] == curve["tokens"]
    assert curve["curve"][2][3] == curve["history"][0]["val_loss"]
    assert curve["curve"][5][3] == curve["history"][1]["val_loss"]


def test_quantiles_of_the_gradient_norm_are_over_all_updates():
    norms = C.gradient_norms([float(n) for n in range(101)] + [math.nan])
    assert norms["q50"] == 50 and norms["q90"] == 90 and norms["q99"] == 99 and norms["max"] == 100
    assert norms["n"] == 101 and norms["above_10"]["mean"] == pytest.approx(90 / 101)
    assert C.gradient_norms([]) is None


@pytest.mark.parametrize(
    "text, hit",
    [(" 8", True), ("8 apples", True), (" 8.", True), (" 82", False), (" 8.5", False), (" 18", False), ("", False)],
)
def test_an_answer_is_a_whole_number(monkeypatch, text, hit):
    model, tokenizer = tiny(), core.train_tokenizer([])
    ids = tokenizer(text)["input_ids"] if text else []
    monkeypatch.setattr(model, "generate", lambda *_: (ids, torch.zeros(V)))
    assert C.answer_prompt(model, tokenizer, "How many? A:", "8", 20, False)["hit"] is hit


@pytest.mark.parametrize(
    "ids, text, sign",
    [
        ([1, 2, 3, 1, 2, 3, 1, 2, 3, 1], "x", None),
        ([1, 1, 1, 1, 1, 2, 3, 4, 5, 6], "x", "max_run"),
        ([1, 2, 1, 3, 1, 4, 1, 5, 1, 6, 1], "x", "top_share"),
        ([1, 2] * 8, "x", "distinct_ratio"),
        ([1, 1, 1, 1, 1], "x", None),  # too short to tell
        ([1], ":: :", "colon_only"),
        ([1, 2], "a\ufffdb", "garbage_share"),
    ],
)
def test_each_sign_of_collapse_at_its_edge(ids, text, sign):
    assert C.continuation_stats(ids, text, 0)["signs"] == ([sign] if sign else [])


def test_continuations_of_an_untrained_model_are_no_text(finished):
    before, after = (finished[1][f"continuations{which}"] for which in ("_untrained", ""))
    assert before["collapsed"]["mean"] > 0.9 and before["collapsed"]["n"] == 16
    assert set(before) == set(after) == {"collapsed", "distinct_ratio", "nats", "nats_shuffled"}
    assert before["nats"] > finished[1]["floors"]["trigram"]


@pytest.mark.parametrize("name", C.SPECIALISATIONS)
def test_what_a_training_builds_is_what_the_flags_say(name, monkeypatch, tmp_path):
    """Spies at the optimizer's boundary, and the decay in the built memory, in the run itself."""
    built, build = [], C.MuGrokfast.__init__

    def watched(optimizer, model, *args):
        build(optimizer, model, *args)
        built.append((optimizer, model))

    monkeypatch.setattr(C.MuGrokfast, "__init__", watched)
    flags = ["--test", "--model", name, "--synth-rows", "10", "--datasets", "synth_add", "--no-lr-scheduler"]
    flags += ["--lr", "2e-3", "--muon-lr", "7e-3", "--grokfast-lambda", "0.3", "--grokfast-alpha", "0.9"]
    C.main([*flags, "--weight-decay", "0.05", "--checkpoint-dir", str(tmp_path)])
    (optimizer, model), *more = built
    assert not more and (optimizer.alpha, optimizer.lam) == (0.9, 0.3)
    adamw, muon = optimizer.param_groups
    assert (adamw["lr"], adamw["betas"], adamw["eps"], adamw["weight_decay"]) == (2e-3, (0.9, 0.999), 1e-8, 0.05)
    assert (muon["lr"], muon["momentum"], muon["nesterov"], muon["weight_decay"]) == (7e-3, 0.95, True, 0.05)
    assert len(adamw["params"]) + len(muon["params"]) == len(list(model.parameters()))
    memory, decay = model.backbone.ltm, DECAY[name]
    assert math.isclose(memory.decay, decay) and math.isclose(
        float(memory.kernel[5, 2]), (1 - decay) * decay**3, rel_tol=1e-6
    )
    assert math.isclose(float(memory.powers[9]), decay**10, rel_tol=1e-6)
    assert model.config.act_config.halt_threshold == dict(zip(C.SPECIALISATIONS, (0.95, 0.90, 0.99)))[name]
