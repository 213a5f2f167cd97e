"""CF-HoT phase B: spec section 8 (invariants 1, 3-14) and section 11 (checks 9-18)."""

import contextlib
import copy
import functools
import hashlib
import json
import math
import re
import signal
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import same_tensors

import core
import phase_b_8b_adapters as B

KINDS = ("llama", "qwen2", "mistral")
TRAINED = functools.cache(B.make_tiny_base)


@pytest.fixture(autouse=True)
def one_base(monkeypatch):
    """The base of --test is trained once for each seed in a test process: every run gets a copy of it."""
    monkeypatch.setattr(B, "make_tiny_base", lambda seed: copy.deepcopy(TRAINED(seed)))


def test_the_base_of_a_smoke_test_is_the_same_each_time():
    (once, tokenizer), (again, _) = TRAINED(B.Args.seed), TRAINED.__wrapped__(B.Args.seed)
    assert same_tensors(once.state_dict(), again.state_dict()) and len(tokenizer) == 259


def tiny_base(kind="llama", attention="sdpa", width=64, layers=3):
    """A randomly initialised model of one family, grouped-query attention, 259 tokens."""
    import transformers as t

    config, model = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM),
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM),
        "mistral": (t.MistralConfig, t.MistralForCausalLM),
    }[kind]
    torch.manual_seed(0)
    made = config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=259,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
        attn_implementation=attention,
    )
    return model(made).eval()


def wrapped(*args, strong=True, axis="position", **kwargs):
    """A wrapped base; `strong` gives the adapters weights that make the gate vary a lot."""
    base = tiny_base(*args, **kwargs)
    model = B.CFHoTLlamaHooked(base, B.CFAdapterConfig(64, 3, 4, 8, field_axis=axis)).eval()
    if strong:
        g = torch.Generator().manual_seed(1)
        for adapter in model.cf_adapters:
            adapter.predictor[2].weight.data.normal_(0, 4.0, generator=g)
            adapter.predictor[0].weight.data.normal_(0, 0.3, generator=g)
            adapter.lambda_gate.data.fill_(3.0)
    return model


def files(directory):
    """Every file below the directory by content; the lock and who holds it aside."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name not in (".lock", ".holder")]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def tokens(*shape, seed=0):
    return torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[(k, a) for k in KINDS for a in ("sdpa", "eager")], ids=lambda p: "-".join(p))
def family(request):
    return request.param


# ------------------------------------------------------------------------------------------ identity and the switch
def test_a_fresh_wrap_is_the_base_model(family):
    ids, base = tokens(2, 40), tiny_base(*family)
    expected = base(ids).logits
    for axis in ("position", "layer", "both"):
        model = B.CFHoTLlamaHooked(base, B.CFAdapterConfig(64, 3, 4, 8, field_axis=axis))
        assert (model(ids)["logits"] - expected).abs().max() < 1e-5
        model.remove_hooks()
    assert torch.equal(base(ids).logits, expected)


def test_strong_adapters_act_and_can_be_switched_off(family):
    model, ids = wrapped(*family), tokens(2, 40)
    expected = tiny_base(*family)(ids).logits
    assert (model(ids)["logits"] - expected).abs().max() > 1e-3
    with model.disabled():
        assert torch.equal(model(ids)["logits"], expected) and torch.equal(model.base(ids).logits, expected)
    with model.using("shuffled"):
        shuffled = model(ids)["logits"]
        assert (shuffled - expected).abs().max() > 1e-3 and (shuffled - model(ids)["logits"]).abs().max() == 0
    assert (model(ids)["logits"] - shuffled).abs().max() > 1e-3
    with model.using("constant"):
        assert 0 < (model(ids)["logits"] - expected).abs().max() < 1e-5
    for adapter in model.cf_adapters:
        adapter.lambda_gate.data.zero_()
    assert (model(ids)["logits"] - expected).abs().max() < 1e-5
    model.remove_hooks()
    assert torch.equal(model.base(ids).logits, expected)


@pytest.mark.parametrize("axis", ["position", "layer", "both"])
@pytest.mark.parametrize("mode", ["gate", "shuffled"])
def test_no_token_moves_an_earlier_logit(family, axis, mode):
    model = wrapped(*family, axis=axis)
    with model.using(mode):
        assert core.causality_audit(model, 259, 64) == 0


def test_field_bounds_and_hand_values():
    model = wrapped()
    out = model(tokens(2, 40))
    g, dh = out["log_g"].exp(), out["dh"]
    assert (g > 0).all() and (g <= 0.5).all() and (dh >= 0).all() and (dh <= 1).all()
    fresh = wrapped(strong=False)
    out = fresh(tokens(1, 30))
    h = math.log1p(math.exp(-2))  # constant dh and the corrected average of a constant is that constant
    expected = math.log(1 / (1 + math.exp(h)))
    assert torch.allclose(out["log_g"], torch.full((3, 1, 30), expected), atol=1e-6)


def field_by_hand(model, increments, axis):
    """h [T] of each layer, position by position: the slow form of the three axes."""
    a, out = model.config.momentum, []
    e = torch.zeros_like(increments[0])
    for layer, dh in enumerate(increments):
        e = a * e + (1 - a) * dh
        source = {"position": dh, "layer": None, "both": e / (1 - a ** (layer + 1))}[axis]
        if axis == "layer":
            out.append(e / (1 - a ** (layer + 1)))
            continue
        h, values = torch.zeros_like(dh[:, 0]), []
        for t in range(dh.shape[1]):
            h = a * h + (1 - a) * source[:, t]
            values.append(h / (1 - a ** (t + 1)))
        out.append(torch.stack(values, 1))
    return out


@pytest.mark.parametrize("axis", ["position", "layer", "both"])
def test_axes_equal_the_slow_form(axis):
    model = wrapped(axis=axis)
    out = model(tokens(2, 40))
    for adapter, log_g, h in zip(model.cf_adapters, out["log_g"], field_by_hand(model, out["dh"], axis)):
        assert torch.allclose(log_g, adapter.log_gate(h.clamp(0, 10)), atol=1e-5)


@torch.no_grad()
def log_gate_by_hand(adapter, x, real, a=0.9):
    """log g [B, T] for x [B, T, D] in float64, from the equations, token by token. `real` [B, T]."""
    w_f, lam = adapter.fiber_proj.weight.double(), adapter.lambda_gate.double()
    (w_1, b_1), (w_2, b_2) = (
        (p.weight.double(), p.bias.double()) for p in (adapter.predictor[0], adapter.predictor[2])
    )
    log_g = torch.zeros(x.shape[:2], dtype=torch.float64)
    for b in range(len(x)):
        h, n = 0.0, 0
        for t in range(x.shape[1]):
            token = x[b, t].double()
            z = w_2 @ F.gelu(w_1 @ torch.cat([token, w_f @ token]) + b_1) + b_2
            dh = min(float((1 + z.exp()).log()), 1.0) * int(real[b, t])
            h, n = a * h + (1 - a) * dh, n + int(real[b, t])
            g = 1 / (1 + math.exp(abs(float(lam)) * h / (1 - a ** max(n, 1))))
            log_g[b, t] = max(math.log(g), math.log(1e-8))
    return log_g


@pytest.mark.parametrize("lam", [3.0, -3.0], ids=["lambda positive", "lambda negative"])
def test_the_gate_is_the_equation_and_multiplies_the_weight_of_its_key(lam):
    """Attention with the gate on is softmax(score + log g): the base's weights times g of the key, normalised again.
    The last row is padded on the right. A negative lambda is the same as a positive one."""
    model, ids = wrapped(attention="eager"), tokens(2, 24)
    adapter = model.cf_adapters[0]
    adapter.lambda_gate.data.fill_(lam)
    mask = torch.ones_like(ids)
    mask[1, 18:] = 0
    seen = []
    handle = model.base.model.layers[0].input_layernorm.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        log_g = model(ids, mask)["log_g"][0].double()
        with model.disabled():
            plain = model.base(ids, attention_mask=mask, output_attentions=True).attentions[0].double()
        gated = model.base(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions[0]
    handle.remove()
    expected = log_gate_by_hand(adapter, seen[0], mask)
    assert expected[0].std() > 0.1 and torch.allclose(log_g, expected, atol=1e-5)
    weights = plain * expected.exp()[:, None, None, :]  # B H T T
    weights = weights / weights.sum(-1, keepdim=True)
    assert torch.allclose(gated.double(), weights, atol=1e-5) and (gated - plain).abs().max() > 1e-2


def test_the_gate_has_a_floor_that_half_precision_can_hold():
    adapter = B.CFAdapter(8, 2, 4, 100.0)
    floor = adapter.log_gate(torch.ones(1, 1))
    assert math.isclose(floor.item(), math.log(1e-8), rel_tol=1e-6) and floor.half().isfinite()
    adapter.predictor[2].weight.data.fill_(1.0)
    adapter.reset()
    raw = adapter.increment(torch.randn(2, 3, 8))
    assert torch.allclose(raw, torch.full((2, 3), math.log1p(math.exp(-2))))


def test_loss_and_figures_by_hand():
    """Cross-entropy over labelled positions, plus lambda_hol times the mean of dh before its clamp over real positions
    and layers; the risk is the sum of the clamped dh."""
    model = wrapped()
    model.config.lambda_hol_loss = 0.25
    batch = B.collate([tokens(20), tokens(30, seed=1)], 0, "cpu")
    raws = []
    for adapter in model.cf_adapters:
        plain = adapter.increment
        adapter.increment = lambda x, plain=plain: raws.append(plain(x)) or raws[-1]
    out = model(*batch)
    logits = out["logits"][:, :-1].double()
    target = batch.ids[:, 1:]
    counted = batch.mask[:, 1:].bool()
    ce = -logits.log_softmax(-1).gather(-1, target[..., None])[..., 0][counted].mean()
    real = batch.mask.bool()
    raw = torch.stack(raws).double()  # L B T
    assert (raw > 1).any()
    penalty = 0.25 * raw[:, real].mean()
    assert torch.allclose(out["lm_loss"].double(), ce, atol=1e-5)
    assert torch.allclose(out["risk_reg"].double(), penalty, atol=1e-6)
    assert torch.allclose(out["loss"].double(), ce + penalty, atol=1e-5)
    clamped = raw.clamp(0, 1)[:, real]
    assert torch.allclose(out["total_risk"].double(), clamped.sum(), rtol=1e-5)
    assert torch.allclose(out["risk_mean"].double(), clamped.mean(), rtol=1e-5)
    assert torch.allclose(out["mean_gate"].double(), out["log_g"].double().exp()[:, real].mean(), rtol=1e-5)


def test_bias_on_every_kind_of_mask():
    bias, low = torch.tensor([[-0.1, -0.2, -0.3]]), torch.finfo(torch.float32).min
    causal = torch.tensor([[True, True, False], [True, True, True]])
    expected = torch.where(causal, bias, low)[None, None]
    additive = torch.where(causal, 0.0, low)[None, None]
    for mask in (None, causal[None, None], additive):
        assert torch.equal(B.add_bias(mask, bias, 2, torch.float32), expected)
    assert torch.equal(B.add_bias(None, bias, 1, torch.float32), bias[:, None, None])
    longer = B.add_bias(torch.ones(1, 1, 2, 5, dtype=torch.bool), bias, 2, torch.float32)  # a static cache
    assert torch.equal(longer[0, 0, 0], torch.tensor([-0.1, -0.2, -0.3, 0.0, 0.0]))
    closed = torch.full((1, 1, 2, 3), torch.finfo(torch.float16).min, dtype=torch.float16)
    half = B.add_bias(closed, bias - 18, 2, torch.float16)
    assert half.isfinite().all()


def test_shuffled_keys_are_earlier_keys():
    model = wrapped()
    log_g = -torch.arange(50.0)[None].repeat(2, 1)
    real = torch.ones(2, 50)
    real[1, :7] = 0
    took = -model._shuffled(0, log_g, real)
    assert (took <= torch.arange(50)).all() and (took[1, 7:] >= 7).all()
    assert torch.equal(took[0, :43] + 7, took[1, 7:])  # the same draw for the j-th real token
    share = (took[0, 1:] / torch.arange(1, 50)).mean()  # drawn uniformly from 0..j, half of j in the mean
    assert 0.35 < share < 0.65
    assert took[0].unique().numel() > 20 and torch.equal(took, -model._shuffled(0, log_g, real))
    assert torch.equal(took[:1], -model._shuffled(0, log_g[:1], torch.ones(1, 50)))


# ------------------------------------------------------------------------------------------- caches and generation
@pytest.mark.parametrize("axis", ["position", "layer", "both"])
def test_decoding_and_chunked_prefill_equal_the_whole(family, axis):
    from transformers import DynamicCache

    model, ids = wrapped(*family, axis=axis), tokens(2, 24)
    whole = model(ids)["logits"]
    for sizes in ([1] * 24, [10, 1, 1, 12], [20, 1, 1, 1, 1]):
        cache, parts = DynamicCache(config=model.base.config), []
        for part in ids.split(sizes, 1):
            parts.append(model.base(part, past_key_values=cache, use_cache=True).logits)
        assert cache.get_seq_length() == 24
        assert (torch.cat(parts, 1) - whole).abs().max() < 2e-5


def test_left_padding_changes_nothing(family):
    model, ids = wrapped(*family), tokens(2, 20)
    whole = model(ids)["logits"]
    padded, mask = torch.cat([torch.zeros(2, 6, dtype=torch.long), ids], 1), torch.ones(2, 26, dtype=torch.long)
    mask[:, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model.base(padded, attention_mask=mask, position_ids=positions).logits
    assert (out[:, 6:] - whole).abs().max() < 2e-5


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("mode", ["gate", "shuffled"])
def test_generation_with_and_without_cache(family, how, mode):
    model, ids = wrapped(*family), tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # the first row is padded on the left
    ids = ids.masked_fill(mask == 0, 0)
    with model.using(mode):
        runs = [
            model.base.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=c, **how)
            for c in (True, False, True)
        ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])  # a second call is independent of the first
    if not how and mode == "gate":
        short = model.base.generate(ids[:1, 4:], max_new_tokens=12, do_sample=False)
        n = min(short.shape[1] - 6, 12)
        assert torch.equal(short[0, 6 : 6 + n], runs[0][0, 10 : 10 + n])


def test_a_cache_filled_without_adapters_is_refused():
    from transformers import DynamicCache

    model, ids, cache = wrapped(), tokens(1, 8), DynamicCache()
    with model.disabled():
        model.base(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="filled without"):
        model.base(ids, past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_state_follows_the_cache():
    from transformers import DynamicCache

    model, cache = wrapped(), DynamicCache()
    model.base(tokens(3, 8), past_key_values=cache, use_cache=True)
    before = cache.control_field.buffers["log_g", 1].clone()
    copied = copy.deepcopy(cache)  # a prompt's cache may be copied for each continuation
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert isinstance(cache, DynamicCache) and torch.equal(cache.control_field.buffers["log_g", 1], before[[2, 0, 1]])
    cache.batch_repeat_interleave(2)
    assert cache.control_field.buffers["h", 0].shape[0] == 6
    cache.batch_select_indices(torch.tensor([0, 1, 5]))
    assert torch.equal(cache.control_field.buffers["log_g", 1], before[[2, 2, 1]])
    assert torch.equal(copied.control_field.buffers["log_g", 1], before)


@torch.no_grad()
@pytest.mark.parametrize("axis", ["position", "layer", "both"])
def test_a_cache_that_was_cropped_copied_or_reset_goes_on_as_if_it_had_never_been_longer(axis):
    from transformers import DynamicCache

    model, ids, cache = wrapped(axis=axis), tokens(2, 24), DynamicCache()
    whole = model(ids)["logits"]
    model.base(torch.cat([ids[:, :12], tokens(2, 5, seed=9)], 1), past_key_values=cache, use_cache=True)
    cache.crop(-5)
    for again in (copy.deepcopy(cache), cache):
        out = model.base(ids[:, 12:], past_key_values=again, use_cache=True).logits
        assert (out - whole[:, 12:]).abs().max() < 2e-5
    cache.crop(-10)
    with model.disabled():  # as long again, but not through the adapters
        model.base(ids[:, :10], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="filled without"):
        model.base(ids[:, :3], past_key_values=cache, use_cache=True)
    out = model.base(ids, past_key_values=DynamicCache(), use_cache=True).logits
    assert (out - whole).abs().max() < 2e-5


@pytest.mark.parametrize("mode", ["gate", "shuffled"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_static_cache_gives_the_same_text(attention, mode):
    """With the first row padded on the left: a static cache's mask is 4-D, and says it there."""
    model, ids = wrapped(attention=attention), tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids = ids.masked_fill(mask == 0, 0)
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "output_logits": True}
    with model.using(mode):
        plain, static = (
            model.base.generate(ids, cache_implementation=kind, return_dict_in_generate=True, **how)
            for kind in (None, "static")
        )
    assert torch.equal(plain.sequences, static.sequences)
    assert (torch.stack(plain.logits) - torch.stack(static.logits)).abs().max() < 2e-5


def test_a_quantised_cache_keeps_the_field():
    """The library's own eight-bit cache: what the gate reads is not quantised, so the logits stay near."""
    from transformers.cache_utils import Cache, Fp8QuantizedLayer

    model, ids = wrapped(), tokens(2, 20)
    whole, cache = model(ids)["logits"], Cache(layers=[Fp8QuantizedLayer() for _ in range(3)])
    parts = [model.base(part, past_key_values=cache, use_cache=True).logits for part in ids.split([10, 1, 9], 1)]
    exact = torch.cat([cache.control_field.buffers["log_g", 0][:, :20]])
    assert cache.get_seq_length() == 20 and torch.allclose(exact, model(ids)["log_g"][0], atol=1e-5)
    gap = (torch.cat(parts, 1) - whole).abs().mean()
    with model.disabled():
        assert gap < 0.1 * (model(ids)["logits"] - whole).abs().mean()


@pytest.mark.parametrize("how", ["prompt lookup", "assisted"])
def test_speculative_decoding_gives_the_text_of_plain_decoding(how):
    """Both take tokens back out of the cache."""
    model, ids = wrapped(), tokens(1, 6).repeat(1, 4)
    more = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {"assistant_model": tiny_base(layers=1)}
    plain, fast = (model.base.generate(ids, max_new_tokens=24, do_sample=False, **m) for m in ({}, more))
    assert torch.equal(plain, fast)


def test_a_base_below_peft_is_wrapped_like_any_other(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = get_peft_model(tiny_base(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = tokens(2, 20)
    plain = lora(ids).logits
    model = B.CFHoTLlamaHooked(lora, B.CFAdapterConfig(64, 3, 4, 8))
    assert (model(ids)["logits"] - plain).abs().max() < 1e-5
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in model.get_adapter_params()}
    for adapter in model.cf_adapters:
        adapter.predictor[2].weight.data.normal_(0, 4.0, generator=torch.Generator().manual_seed(1))
    gated = model(ids)["logits"]
    assert (gated - plain).abs().max() > 1e-3 and core.causality_audit(model, 259, 20) == 0
    assert torch.allclose(lora(ids).logits, gated, atol=1e-5)
    out = lora.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(out[:, 20], gated[:, -1].argmax(-1))
    batch = B.collate(list(ids), 0, "cpu")
    assert B.evaluate(model, [batch])["loss"] == pytest.approx(model(*batch)["lm_loss"].item(), abs=1e-5)
    assert B.compare_with_base(model, [batch])["max_abs_dlogit"] > 1e-3


def test_the_folded_weights_follow_every_change_of_theirs():
    model, x = wrapped(), torch.randn(2, 5, 64)
    adapter = model.cf_adapters[0]

    def by_hand():
        return F.softplus(adapter.predictor(torch.cat([x, adapter.fiber_proj(x)], -1))[..., 0])

    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: adapter.fiber_proj.weight.mul_(2),
            lambda: adapter.predictor[0].weight.add_(0.1),
            lambda: setattr(adapter.fiber_proj.weight, "data", torch.randn(4, 64)),
            lambda: adapter.load_state_dict({k: v + 0.1 for k, v in adapter.state_dict().items()}),
        ):
            before = adapter.increment(x)
            change()
            assert torch.allclose(adapter.increment(x), by_hand(), atol=1e-5), change
    copy.deepcopy(model)
    grads = [torch.autograd.grad(f.sum(), list(adapter.parameters())[1:]) for f in (adapter.increment(x), by_hand())]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*grads)) and before.shape == (2, 5)


# -------------------------------------------------------------------------------------------------------- gradients
def test_gradients_reach_every_adapter_and_no_base_parameter(family):
    model, ids = wrapped(*family).train(), tokens(2, 30)
    model.config.lambda_hol_loss = 0.0
    model(ids, labels=ids)["loss"].backward()
    for adapter in model.cf_adapters:
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in model.base.parameters())


@pytest.fixture
def mlp_calls(monkeypatch):
    """Forward passes of a Llama's MLPs that gradients flow through: evaluation does not count."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, plain = [], LlamaMLP.forward

    def forward(self, x):
        if torch.is_grad_enabled():
            calls.append(self.training)
        return plain(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    return calls


@pytest.mark.parametrize("axis", ["position", "layer", "both"])
def test_gradient_checkpointing_computes_layers_again_and_changes_nothing(axis, mlp_calls):
    """Also where the base has dropout: it stays off, in the first pass and in the second."""
    results, ids = [], tokens(2, 30)
    for on in (False, True):
        model = wrapped(axis=axis)
        for layer in model.base.model.layers:
            layer.self_attn.attention_dropout = 0.5
        if on:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
        mlp_calls.clear()
        out = model.train()(ids, labels=ids)
        out["loss"].backward()
        assert mlp_calls == [False] * (6 if on else 3)
        assert model.eval().base.model.layers[0].training is False
        results.append((out["loss"].detach(), out["total_risk"], [p.grad for p in model.get_adapter_params()]))
    assert same_tensors(*results) if axis == "position" else torch.allclose(results[0][0], results[1][0])
    for a, b in zip(results[0][2], results[1][2]):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_flag_for_gradient_checkpointing_acts_in_training(tmp_path, mlp_calls):
    states, flags = [], ["--test", "--model_path", "tiny", "--no_eval", "--max_steps", "3", "--grad_accum", "1"]
    for flag, times in (([], 1), (["--gradient_checkpointing"], 2)):
        mlp_calls.clear()
        B.main([*flags, *flag, "--output_dir", str(tmp_path / f"{times}")])
        assert len(mlp_calls) == times * 2 * 3  # two layers, three updates
        states.append(torch.load(tmp_path / f"{times}" / "cf_adapter_final.pt", weights_only=True))
    assert same_tensors(*(state["adapter_state_dict"] for state in states))


def test_half_adapters_still_work():
    model, ids = wrapped(), tokens(2, 20)
    expected = model(ids)["logits"]
    model.cf_adapters.half()
    assert (model(ids)["logits"] - expected).abs().max() < 0.05


def test_padding_content_is_inert():
    model = wrapped()
    rows = [tokens(20), tokens(30, seed=1)]
    losses = []
    for pad in (0, 77):
        batch = B.collate(rows, pad, "cpu")
        out = model(batch.ids, batch.mask, batch.labels)
        losses.append((out["lm_loss"], out["total_risk"], out["mean_gate"], out["loss"]))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*losses))
    assert (batch.labels[0, 20:] == -100).all()


# ------------------------------------------------------------------------------------------------ sizes, save, load
def test_parameter_counts():
    def count(width, fiber, control):
        with torch.device("meta"):
            return sum(p.numel() for p in B.CFAdapter(width, fiber, control, 1.0).parameters())

    assert count(4096, 16, 64) == 328_834 and 32 * count(4096, 16, 64) == 10_522_688
    assert count(64, 4, 8) == 818
    assert sum(p.numel() for p in wrapped().get_adapter_params()) == 2_454
    names = ["fiber_proj.weight", "predictor.0.weight", "predictor.0.bias", "predictor.2.weight", "predictor.2.bias"]
    assert set(wrapped().cf_adapters.state_dict()) == {f"{i}.{n}" for i in range(3) for n in [*names, "lambda_gate"]}


def test_save_load_and_what_does_not_fit(tmp_path):
    model, ids, path = wrapped(), tokens(2, 20), tmp_path / "a.pt"
    state = {"adapter_state_dict": model.cf_adapters.state_dict(), "config": vars(model.config), "history": {}}
    core.save_checkpoint(path, state)
    again = B.load_cf_adapter(tiny_base(), path)
    assert torch.equal(again(ids)["logits"], model(ids)["logits"]) and not again.training
    B.save_cf_adapter(model, tmp_path / "adapter", "tiny")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model"] == "tiny"
    again = B.load_cf_adapter(tiny_base(), tmp_path / "adapter")
    assert torch.equal(again(ids)["logits"], model(ids)["logits"]) and not again.training
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(core.Failure, match="adapter_config"):
        B.load_cf_adapter(tiny_base(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="width 64 and 3 layers do not fit a model of width 32 and 3"):
        B.load_cf_adapter(tiny_base(width=32), path)
    for change in ("missing", "extra", "shape"):
        broken = dict(state["adapter_state_dict"])
        key = "1.predictor.2.bias"
        if change == "missing":
            del broken[key]
        else:
            broken[key if change == "shape" else "9.extra"] = torch.zeros(7)
        core.save_checkpoint(path, state | {"adapter_state_dict": broken})
        with pytest.raises(core.Failure, match=r"9\.extra" if change == "extra" else r"1\.predictor\.2\.bias"):
            B.load_cf_adapter(tiny_base(), path)


def test_a_published_file_needs_allow_pickle(tmp_path):
    """Its config is an object; with the flag that one class is accepted, and still nothing else."""
    model, ids, path = wrapped(), tokens(2, 20), tmp_path / "public.pt"
    torch.save({"adapter_state_dict": model.cf_adapters.state_dict(), "config": model.config, "history": {}}, path)
    with pytest.raises(core.Failure, match="nothing was loaded"):
        B.load_cf_adapter(tiny_base(), path)
    assert torch.equal(B.load_cf_adapter(tiny_base(), path, allow_pickle=True)(ids)["logits"], model(ids)["logits"])
    torch.save({"adapter_state_dict": {}, "config": core.Failure("x")}, path)
    with pytest.raises(core.Failure, match="nothing was loaded"):
        B.load_cf_adapter(tiny_base(), path, allow_pickle=True)


def test_models_that_cannot_be_wrapped():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ValueError, match="not a Llama-style model"):
        B.CFHoTLlamaHooked(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)))
    with pytest.raises(ValueError, match="load the model with sdpa"):
        B.CFHoTLlamaHooked(tiny_base(attention="flex_attention"), B.CFAdapterConfig(64, 3))
    assert (B.CFAdapterConfig().d_model, B.CFAdapterConfig().n_layers, B.CFAdapterConfig().d_fiber) == (4096, 32, 16)


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_a_directory_that_neither_adapters_nor_a_lora_fit_ends_in_one_line(kind, tmp_path):
    """GPT-2 has no layers of this form; Phi-3 has, but its attention has one matrix for q, k and v."""
    import transformers as t

    few = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=1, n_head=2, **few))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = t.Phi3ForCausalLM(t.Phi3Config(**sizes, **few))
    model.save_pretrained(tmp_path / "base")
    core.train_tokenizer([]).save_pretrained(tmp_path / "base")
    flags = ["--test", "--model_path", str(tmp_path / "base"), "--lora_reference"]
    with pytest.raises(core.Failure) as failure:
        B.main([*flags, "--output_dir", str(tmp_path / "run")])
    assert failure.value.code == 2 and "\n" not in str(failure.value)
    assert ("not a Llama-style model" if kind == "gpt2" else "no q_proj and v_proj") in str(failure.value)
    assert files(tmp_path / "run") == {}


# ------------------------------------------------------------------------------------------------ figures and texts
def test_evaluation_counts_every_token_once_and_describes_the_field():
    model = wrapped()
    batches = [B.collate([tokens(20), tokens(30, seed=1)], 0, "cpu"), B.collate([tokens(25, seed=2)], 0, "cpu")]
    figures = B.evaluate(model, batches)
    total, count, gates, risks, full, spreads = 0.0, 0, [], [], [], []
    for batch in batches:
        out = model(*batch)
        n = int((batch.labels[:, 1:] != -100).sum())
        total, count = total + out["lm_loss"].item() * n, count + n
        real, log_g, dh = batch.mask.bool(), out["log_g"].detach(), out["dh"]
        gates.append(log_g[:, real].exp().mean())
        risks.append(dh[:, real].mean())
        full.append((dh[:, real] >= 1).float().mean())
        lengths = [int(n) for n in batch.mask.sum(1)]
        start = min(16, batch.ids.shape[1] // 2)
        rows = [layer[b, start:n].std(correction=0) for layer in log_g for b, n in enumerate(lengths)]
        spreads.append(torch.stack(rows).mean())
    assert count == 19 + 29 + 24 == figures["tokens"] and math.isclose(figures["loss"], total / count, rel_tol=1e-6)
    assert math.isclose(figures["ppl"], math.exp(total / count), rel_tol=1e-6)
    for name, values in (("gate", gates), ("risk_mean", risks), ("sat_frac", full), ("gate_spread", spreads)):
        assert math.isclose(figures[name], float(torch.stack(values).mean()), rel_tol=1e-4, abs_tol=1e-6), name
    with model.disabled():
        assert set(B.evaluate(model, batches)) == {"loss", "ppl", "tokens", "windows"}
    assert figures["windows"] == pytest.approx([model(*batch)["lm_loss"].item() for batch in batches], rel=1e-5)


def test_comparison_with_the_base_by_hand():
    model = wrapped()
    batch = B.collate([tokens(20), tokens(30, seed=1)], 0, "cpu")
    with torch.no_grad():
        gated = model(*batch)["logits"].double()
        with model.disabled():
            base = model(*batch)["logits"].double()
    real = batch.mask.bool()
    base, gated = base[real], gated[real]
    expected = (base.softmax(-1) * (base.log_softmax(-1) - gated.log_softmax(-1))).sum(-1).mean()
    figures = B.compare_with_base(model, [batch])
    assert math.isclose(figures["kl_base"], float(expected), rel_tol=1e-3)
    assert math.isclose(figures["max_abs_dlogit"], float((base - gated).abs().max()), rel_tol=1e-4)


class Words:
    """A tokenizer whose token i is the word `wi`."""

    pad_token_id, eos_token_id = 0, 2

    def __call__(self, text, **kwargs):
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


def test_text_metrics_by_hand():
    metrics = B.text_metrics([1, 2, 1, 2, 1], [], Words())
    assert metrics["distinct_2"] == 2 / 4 and metrics["rep_2"] == 0.5
    assert metrics["rep_w"] == 3 / 5 and metrics["rep_w_text"] == 3 / 4
    assert metrics["unique_rate"] == 2 / 5 and metrics["length"] == 5 and metrics["phrase_rep"] == 0
    assert B.text_metrics([7], [], Words())["distinct_2"] == 0 and B.text_metrics([], [3], Words())["rep_w"] == 0
    assert B.text_metrics([1, 2], [5, 1], Words())["rep_w"] == 1 / 2  # the prompt is context
    assert B.rep_w([9, *range(20, 52), 9], []) == 0 and B.rep_w([9, *range(20, 51), 9], []) == 1 / 33  # 32 before it
    assert B.text_metrics([1, 2, 3, 4, 1, 2, 3, 4], [], Words())["phrase_rep"] == 1


def test_texts_are_compared_at_equal_length(monkeypatch):
    """A shorter text repeats less: the base's is cut to its length before the two are compared."""
    texts = {"base": [5, 5, 5, 5, 5, 5, 5, 5, 5, 5], "cfhot": [5, 5, 5, 5]}
    asked = []

    def continuations(model, tokenizer, prompts, args, seed, **options):
        asked.append((model, seed, options))
        return [texts[model]] * len(prompts)

    monkeypatch.setattr(B, "continuations", continuations)
    models = {name: (lambda name=name: contextlib.nullcontext(name), {}) for name in texts}
    rows, statistics = B.generate_all(models, Words(), ["w3", "w4"], types.SimpleNamespace(samples=2))
    assert asked == [(name, seed, {}) for seed in (None, 0, 1) for name in texts] and len(rows) == 2 * 2 * 3
    whole = {name: B.text_metrics(ids, [3], Words()) for name, ids in texts.items()}
    assert whole["cfhot"]["rep_4"] == 0 and whole["base"]["rep_4"] == 1 - 1 / 7
    for decode in ("greedy", "sampled"):
        for name in texts:
            figures = statistics[decode][name]
            assert all(d["mean"] == 0 and d["n"] == 2 for d in figures["minus_base"].values())
            assert figures["mean"] == pytest.approx(whole[name])


def test_how_each_condition_is_decoded():
    """Greedy; or sampled with T 0.8 and top-p 0.9 from the same seed for all, and no repetition penalty but where that
    is the condition."""
    calls = []

    class Base(torch.nn.Linear):
        def generate(self, input_ids, **options):
            calls.append(options | {"seed": torch.initial_seed()})
            return torch.cat([input_ids, torch.tensor([[9, 2, 7]]).expand(len(input_ids), 3)], 1)

    tokenizer = core.train_tokenizer([])
    tokenizer.padding_side = "left"
    model = types.SimpleNamespace(base=Base(1, 1), parameters=lambda: iter([torch.zeros(1)]))
    args = types.SimpleNamespace(seed=3, max_new_tokens=7)
    for _ in range(2):
        assert B.continuations(model, tokenizer, ["ab", "c"], args, 1) == [[9], [9]]  # without what follows EOS
    B.continuations(model, tokenizer, ["ab"], args, None, repetition_penalty=1.2)
    sampled, same, greedy = calls
    assert sampled["do_sample"] and (sampled["temperature"], sampled["top_p"], sampled["top_k"]) == (0.8, 0.9, 0)
    assert "repetition_penalty" not in sampled and sampled["seed"] == same["seed"] and sampled["max_new_tokens"] == 7
    assert greedy["do_sample"] is False and greedy["repetition_penalty"] == 1.2


def test_the_conditions_that_are_compared(tmp_path, monkeypatch):
    seen = {}

    def generate_all(models, tokenizer, prompts, args):
        for name, (context, options) in models.items():
            with context() as model:
                seen[name] = (getattr(model, "mode", None), options)
        return [{"n": len(prompts)}], {}

    monkeypatch.setattr(B, "generate_all", generate_all)
    lora = torch.nn.Linear(1, 1)
    B.write_texts(wrapped(), lora, Words(), B.parse(["--test"]), types.SimpleNamespace(main=True, dir=tmp_path))
    assert list(seen) == ["base", "cfhot", "cfhot_shuffled", "rep_penalty", "lora"]
    assert seen["base"] == ("off", {}) and seen["rep_penalty"] == ("off", {"repetition_penalty": 1.2})
    assert (seen["cfhot"], seen["cfhot_shuffled"], seen["lora"]) == (("gate", {}), ("shuffled", {}), (None, {}))
    assert json.loads((tmp_path / "generations.jsonl").read_text()) == {"n": 21} and not lora.training


def test_criteria_by_hand():
    final, val = {"gate": 0.4, "risk_mean": 0.1}, {"max_abs_dlogit": 0.1, "ppl_gated": 10.19, "ppl_base": 10.0}
    below = {"greedy": {"cfhot": {"minus_base": {"rep_4": {"mean": -0.2, "lo": -0.3, "hi": -0.1}}}}}
    across = {"greedy": {"cfhot": {"minus_base": {"rep_4": {"mean": -0.1, "lo": -0.3, "hi": 0.1}}}}}
    assert all(B.criteria(final, val, below).values())
    assert B.criteria(final, val, across)["rep_reduced"] is False and B.criteria(final, val, {})["rep_reduced"] is None
    for worse, name in (
        ({"gate": 0.19}, "gate_in_range"),
        ({"gate": 0.81}, "gate_in_range"),
        ({"risk_mean": 0.0009}, "risk_not_collapsed"),
        ({"max_abs_dlogit": 0.00009}, "intervention_active"),
        ({"ppl_gated": 10.21}, "val_ppl_not_worse"),
    ):
        verdicts = B.criteria(final | worse, val | worse, below)
        assert [k for k, met in verdicts.items() if not met] == [name]


# ------------------------------------------------------------------------------------------------------------ data
def test_every_token_of_an_update_counts_the_same():
    rows = [tokens(n, seed=n) for n in (5, 9, 30, 12, 7, 20)]
    data = B.Data(rows, [], 0, "")
    args = types.SimpleNamespace(batch_size=2, grad_accum=3, seed=0)
    alone = types.SimpleNamespace(num_processes=1, process_index=0, device="cpu", reduce=lambda x, how: x)
    batches, weights, count = B.update_batches(data, args, 0, alone)
    assert len(batches) == 3 and count == sum(batch.ids.numel() for batch in batches)
    drawn = sorted(int(n) for batch in batches for n in batch.mask.sum(1))
    assert drawn == sorted(len(row) for row in rows)  # an epoch is every row once
    model = wrapped()
    parts = sum(model(*batch)["lm_loss"] * weight for batch, weight in zip(batches, weights))
    whole = model(*B.collate(rows, 0, "cpu"))["lm_loss"]
    assert torch.allclose(parts, whole, atol=1e-5)


def test_batches_really_have_the_asked_rows_and_accumulation_is_inert(tmp_path, monkeypatch):
    sizes, plain = [], B.CFHoTLlamaHooked.forward

    def spy(self, input_ids, *args, **kwargs):
        sizes.append((self.training, len(input_ids)))
        return plain(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(B.CFHoTLlamaHooked, "forward", spy)
    flags = ["--test", "--no_eval", "--max_steps", "4", "--log_interval", "1"]
    a = B.main([*flags, "--batch_size", "2", "--grad_accum", "1", "--output_dir", str(tmp_path / "a")])
    assert [n for training, n in sizes if training] == [2] * 4
    b = B.main([*flags, "--batch_size", "1", "--grad_accum", "2", "--output_dir", str(tmp_path / "b")])
    for name in ("lm_loss", "train_loss"):
        for (s, x), (t, y) in zip(a["cf_adapter"]["history"][name], b["cf_adapter"]["history"][name], strict=True):
            assert s == t and math.isclose(x, y, rel_tol=1e-5)
    norms = [[row["grad_norm"] for row in rows_of(tmp_path / name) if "grad_norm" in row] for name in "ab"]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_packed_rows_have_eos_between_lines_and_no_pack_rows_are_lines(monkeypatch):
    tokenizer = core.load_tokenizer("byte")
    lines = [f"{i} " + "x" * 120 + "\n" for i in range(30)] + ["short\n"]
    monkeypatch.setattr(core, "load_text", lambda *a, **k: lines)
    packed = B.load_rows(B.parse(["--test"]), tokenizer, "train")
    text = tokenizer.decode(torch.cat(packed).tolist())
    assert all(len(r) == 64 for r in packed) and "short" not in text and text.count("<eos>") in (29, 30)
    single = B.load_rows(B.parse(["--test", "--no_pack", "--seq_len", "100"]), tokenizer, "train")
    assert len(single) == 30 and all(len(r) == 100 for r in single)
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id  # a tokenizer that begins a prompt with BOS, as Llama's does
    template = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.backend_tokenizer.post_processor = template
    for flags, plain in (([], packed), (["--no_pack", "--seq_len", "100"], single)):
        rows = B.load_rows(B.parse(["--test", *flags]), tokenizer, "train")
        assert all(row[0] == bos and bos not in row[1:] and len(row) == len(plain[0]) for row in rows)
    assert torch.equal(rows[0][1:], single[0][:-1])


# ------------------------------------------------------------------------------------------------------------ runs
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("b") / "run"
    return directory, B.main(["--test", "--output_dir", str(directory)])


def test_the_files_and_keys_of_the_spec(finished):
    directory, result = finished
    assert json.loads((directory / "phase_b_results.json").read_text()) == json.loads(json.dumps(result))
    assert result["params"] == 2_454 and result["base_unchanged"] and result["valid"] and result["lora"] is None
    assert {"lm_loss", "risk_mean", "gate", "gate_spread", "sat_frac"} <= set(result["final"])
    assert {"ppl_base", "ppl_gated", "kl_base", "gate_effect", "max_abs_dlogit"} <= set(result["val"])
    assert result["criteria"]["intervention_active"] is True and result["criteria"]["val_ppl_not_worse"] is True
    shared = {"steps": 20, "tokens": 20 * 2 * 2 * 64, "nonfinite_steps": 0}
    assert {k: result[k] for k in shared} == {k: result["cf_adapter"][k] for k in shared} == shared
    assert result["time_s"] == result["train_seconds"] and result["peak_mem_bytes"] > 0
    flags = json.loads((directory / "manifest.json").read_text())["flags"]
    asked = vars(B.parse(["--test", "--output_dir", str(directory)]))
    assert flags == asked == result["config"] == result["manifest"]["flags"]
    assert set(result["manifest"]["inputs"]) == {"data", "tokenizer", "base", "adapter"}
    assert not {"config.json", "env.json"} & {p.name for p in directory.iterdir()}
    names = "intervention_active gate_in_range risk_not_collapsed val_ppl_not_worse rep_reduced"
    assert list(result["criteria"]) == names.split()
    final = torch.load(directory / "cf_adapter_final.pt", weights_only=True)
    assert {"adapter_state_dict", "config", "history", "base", "format_version"} == set(final)
    assert final["base"]["model_type"] == "llama" and final["config"]["d_model"] == 64
    assert all(final["history"][k] for k in ("train_loss", "lm_loss", "risk", "gate"))
    for step in (10, 20):
        state = torch.load(directory / f"cf_adapter_step_{step}.pt", weights_only=True)
        assert {"step", "adapter_state_dict", "optimizer_state_dict", "config", "history"} <= set(state)
        assert {"scaler_state_dict", "rng_state", "manifest"} <= set(state) and state["arm"] == "cf_adapter"
    assert (directory / "cf_adapter_best.pt").exists()
    rows = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    conditions = {"base", "cfhot", "cfhot_shuffled", "rep_penalty"}
    assert len(rows) == 21 * 4 * (1 + 2) and {r["condition"] for r in rows} == conditions
    assert {"prompt", "condition", "decode", "seed", "text", "metrics"} <= set(rows[0])
    for decode in ("greedy", "sampled"):
        for condition in conditions:
            texts = result["generation"][decode][condition]
            assert texts["minus_base"]["rep_4"]["n"] == 21 and 0 <= texts["mean"]["rep_4"] <= 1
        assert result["generation"][decode]["base"]["minus_base"]["rep_4"]["hi"] == 0


@pytest.mark.parametrize("name", ["cf_adapter_final.pt", "cf_adapter_best.pt", "cf_adapter_step_20.pt", "adapter"])
def test_the_adapter_files_load_into_the_saved_base(finished, name):
    directory, _ = finished
    base, tokenizer = core.load_backbone(str(directory / "tiny_base"))
    model, ids = B.load_cf_adapter(base, directory / name), tokens(2, 30)
    gated = model(ids)["logits"]
    with model.disabled():
        assert (model(ids)["logits"] - gated).abs().max() > 1e-4
    assert model.base.generate(ids[:, :5], max_new_tokens=4, do_sample=False).shape == (2, 9) and len(tokenizer) == 259


def test_log_lines(script, tmp_path):
    done = script("phase_b_8b_adapters.py", "--test", "--no_eval", "--output_dir", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    for pattern in (
        r"^\[CFHoT-Hooked\] Adapter params: 2,454$",
        r"^Step   10 \| LM Loss: \d\.\d{4} \| Risk: \d+\.\d\d \| Gate: 0\.\d{3}$",
        r"^\[Save\] .*cf_adapter_step_20\.pt$",
        r"^Final checkpoint: .*cf_adapter_final\.pt$",
    ):
        assert re.search(pattern, done.stdout, re.M), pattern


def comparable(result):
    skip = ("time_s wall_s peak_mem_bytes environment config tokens_per_s data manifest train_seconds").split()
    return {k: comparable(v) if isinstance(v, dict) else v for k, v in result.items() if k not in skip}


def final_states(*directories):
    keep = ("adapter_state_dict", "optimizer_state_dict", "history", "rng_state", "best")
    states = [torch.load(d / "cf_adapter_step_20.pt", weights_only=True) for d in directories]
    return [{k: state[k] for k in keep} for state in states]


def stop_at(monkeypatch, step):
    """SIGTERM while the micro-batches of update `step` are drawn, once."""
    plain, done = B.update_batches, []

    def drawn(data, args, at, accelerator):
        if at == step and not done:
            done.append(at)
            signal.raise_signal(signal.SIGTERM)
        return plain(data, args, at, accelerator)

    monkeypatch.setattr(B, "update_batches", drawn)


def rows_of(directory):
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def test_resume_and_repeat_are_bitwise_equal(finished, tmp_path, monkeypatch):
    directory, flags = tmp_path / "r", ["--test", "--output_dir", str(tmp_path / "r")]
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        with pytest.raises(core.Failure, match=r"interrupted at step 13.*--resume auto") as failure:
            B.main(flags)
    assert failure.value.code == 128 + signal.SIGTERM and not (directory / "phase_b_results.json").exists()
    resumed = B.main([*flags, "--resume", "auto"])
    assert comparable(resumed) == comparable(finished[1]) and resumed["tokens"] == finished[1]["tokens"]
    assert same_tensors(*final_states(directory, finished[0])) and rows_of(directory) == rows_of(finished[0])
    assert [s["updates"] for s in resumed["manifest"]["segments"]] == [13, 7]


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(tmp_path, monkeypatch):
    """Two arms: of each the log has one row for each step, also after they went on one after the other."""
    directory = tmp_path / "r"
    flags = ["--test", "--lora_reference", "--no_eval", "--log_interval", "1", "--output_dir", str(directory)]
    result = B.main([*flags, "--max_steps", "4"])
    before = files(directory)
    with monkeypatch.context() as patch:
        patch.setattr(B, "evaluate", None)  # nothing is evaluated again
        again = B.main([*flags, "--max_steps", "4", "--resume", "auto", "--save_interval", "3"])
    assert again == json.loads(json.dumps(result)) and files(directory) == before
    for other in (["--lr", "0.1"], ["--seed", "5"], ["--samples", "1"], ["--max_steps", "3"]):
        with pytest.raises(core.Failure, match="flags differ") as failure:
            B.main([*flags, "--max_steps", "4", "--resume", "auto", *other])
        assert failure.value.code == 2 and files(directory) == before
    longer = B.main([*flags, "--max_steps", "6", "--resume", "auto"])
    whole = B.main([*flags[:-1], str(tmp_path / "whole"), "--max_steps", "6"])
    for arm in ("cf_adapter", "lora"):
        assert longer[arm]["steps"] == 6 and longer[arm]["final"] == whole[arm]["final"]
        steps = [row["step"] for row in rows_of(directory) if row["arm"] == arm and "train_loss" in row]
        assert len(steps) == len(set(steps)) and steps[-2:] == [5, 6]


def test_changed_data_is_refused_on_resume(tmp_path):
    text, directory = tmp_path / "text.txt", tmp_path / "r"
    lines = [f"{i} a line of more than a hundred characters, {'word ' * 20}\n" for i in range(60)]
    text.write_text("".join(lines))
    flags = ["--test", "--model_path", "tiny", "--no_eval", "--data", "text", "--data_path", str(text)]
    flags += ["--output_dir", str(directory)]
    B.main([*flags, "--max_steps", "2"])
    before = files(directory)
    text.write_text("".join(lines).replace("7 a line", "7 another"))
    with pytest.raises(core.Failure, match="data changed") as failure:
        B.main([*flags, "--max_steps", "4", "--resume", "auto"])
    assert failure.value.code == 2 and files(directory) == before


def test_the_clock_counts_training_alone(tmp_path, monkeypatch):
    now, draw, evaluate = [0.0], B.update_batches, B.evaluate

    def drawn(*args):
        now[0] += 1.0
        return draw(*args)

    def evaluated(*args):
        now[0] += 1000.0
        return evaluate(*args)

    monkeypatch.setattr(core, "clock", lambda: now[0])
    monkeypatch.setattr(B, "update_batches", drawn)
    monkeypatch.setattr(B, "evaluate", evaluated)
    flags = ["--test", "--model_path", "tiny", "--no_eval", "--max_steps", "6", "--grad_accum", "1"]
    for interval in ("1", "6"):
        result = B.main([*flags, "--eval_interval", interval, "--output_dir", str(tmp_path / interval)])
        assert result["train_seconds"] == result["time_s"] == 6.0
        assert result["tokens_per_s"] == result["tokens"] / 6.0 == 2 * 64


def test_the_optimizer_and_the_clipping_are_those_of_the_document(tmp_path, monkeypatch):
    seen, plain = [], core.Loop.__init__

    def spy(self, run, model, optimizer, *args, **kwargs):
        plain(self, run, model, optimizer, *args, **kwargs)
        seen.append((self, [dict(group) for group in optimizer.param_groups]))

    monkeypatch.setattr(core.Loop, "__init__", spy)
    flags = ["--test", "--model_path", "tiny", "--no_eval", "--max_steps", "2", "--lr", "0.002", "--lambda_hol", "0.5"]
    B.main([*flags, "--output_dir", str(tmp_path / "r")])
    ((loop, groups),) = seen
    assert loop.max_norm == 1.0 and loop.total == 2
    assert all((group["lr"], group["betas"]) == (0.002, (0.9, 0.999)) for group in groups)
    for group, decay in zip(groups, (0.01, 0.0), strict=True):
        assert group["weight_decay"] == decay and all((p.ndim >= 2) == (decay > 0) for p in group["params"])
    config = core.load_checkpoint(tmp_path / "r" / "cf_adapter_step_2.pt")["config"]
    expected = (0.9, 1.0, 0.5, 0.002, "position", 4, 8)
    names = "momentum lambda_init lambda_hol_loss adapter_lr field_axis d_fiber d_control".split()
    assert tuple(config[name] for name in names) == expected


def test_evaluation_cadence_is_inert_and_it_learns(finished, tmp_path):
    flags = ["--test", "--no_eval", "--eval_interval", "3", "--log_interval", "7"]
    other = B.main([*flags, "--output_dir", str(tmp_path)])
    files = [torch.load(d / "cf_adapter_final.pt", weights_only=True) for d in (tmp_path, finished[0])]
    assert same_tensors(*(f["adapter_state_dict"] for f in files))
    assert other["val"]["gate_effect"] > 0  # on held-out text the trained gate lowers the loss of the frozen base


def test_the_best_file_is_that_of_the_lowest_validation_loss(tmp_path, monkeypatch):
    losses, plain = iter([3.0, 1.0, 2.0, 1.5]), B.evaluate
    monkeypatch.setattr(B, "evaluate", lambda *args: plain(*args) | {"loss": next(losses, 1.0)})
    flags = ["--test", "--model_path", "tiny", "--no_eval", "--max_steps", "4"]
    flags += ["--eval_interval", "1", "--save_interval", "1", "--output_dir", str(tmp_path)]
    B.main(flags)
    best, second, last = (
        core.load_checkpoint(tmp_path / f"cf_adapter_{name}.pt", sealed=False)["adapter_state_dict"]
        for name in ("best", "step_2", "step_4")
    )
    assert same_tensors(best, second) and not same_tensors(best, last)


def test_a_field_computed_backwards_in_time_is_refused_though_a_fresh_one_shows_nothing(tmp_path, monkeypatch):
    plain = B.ema
    monkeypatch.setattr(B, "ema", lambda x, a, start=None: plain(x.flip(1), a).flip(1))
    model = B.CFHoTLlamaHooked(tiny_base(), B.CFAdapterConfig(64, 3, 4, 8))
    before = [p.clone() for p in model.get_adapter_params()]
    assert core.causality_audit(model, 259, 64) < 1e-5 < 1e-3 < B.audit_moved(model, 64)
    assert same_tensors(before, model.get_adapter_params())
    with pytest.raises(core.Failure, match="reads the future") as failure:
        B.main(["--test", "--model_path", "tiny", "--output_dir", str(tmp_path / "r")])
    assert failure.value.code == core.CHECK_FAILED and not files(tmp_path / "r")


def test_gains_are_paired_by_window_and_rates_chosen_on_other_windows(tmp_path, monkeypatch):
    rates, plain = {}, core.Loop.__init__

    def spy(self, run, model, optimizer, total, label="", **kwargs):
        rates[label] = optimizer.param_groups[0]["lr"]
        plain(self, run, model, optimizer, total, label=label, **kwargs)

    monkeypatch.setattr(core.Loop, "__init__", spy)
    flags = (
        "--test --model_path tiny --no_eval --max_steps 3 --lambda_init 4 --eval_windows 5 --tuning_windows 3".split()
    )
    flags += ["--lora_reference", "--lora_lr", "0.02", "--output_dir", str(tmp_path / "r")]
    result = B.main(flags)
    assert rates == {"cf_adapter": 3e-3, "lora": 0.02}
    args = B.parse(flags)
    base, tokenizer = core.load_backbone("tiny")
    data, rows = B.load_data(args, tokenizer, "cpu"), B.load_rows(args, tokenizer, "validation")
    assert [batch.ids[0].tolist() for batch in (*data.validation, *data.tuning)] == [row.tolist() for row in rows[:8]]
    model = B.load_cf_adapter(base, tmp_path / "r" / "cf_adapter_final.pt")
    gated = [model(*batch)["lm_loss"].item() for batch in data.validation]
    for mode in ("off", "shuffled", "constant"):
        with model.using(mode):
            gaps = [model(*batch)["lm_loss"].item() - own for batch, own in zip(data.validation, gated)]
        figure = result["val"][f"gain_over_{mode}"]
        assert figure["n"] == 5 and figure["mean"] == pytest.approx(sum(gaps) / 5, abs=1e-6)
    tuning = [model(*batch)["lm_loss"].item() for batch in data.tuning]
    assert result["tuning_loss"]["cf_adapter"] == pytest.approx(sum(tuning) / 3, abs=1e-6)
    assert result["tuning_loss"]["lora"] == result["lora"]["tuning_loss"] != result["tuning_loss"]["cf_adapter"]
    assert result["causality"] == {"moved": 0, "trained": 0} and result["valid"]
    with pytest.raises(core.Failure, match="--tuning_windows"):
        B.main([*flags[:-1], str(tmp_path / "s"), "--tuning_windows", "100000"])


def test_eval_only_trains_nothing(finished, tmp_path):
    directory, first = finished
    result = B.main(
        [
            "--test",
            "--model_path",
            str(directory / "tiny_base"),
            "--eval_only",
            "--no_eval",
            "--adapter",
            str(directory / "cf_adapter_final.pt"),
            "--output_dir",
            str(tmp_path),
        ]
    )
    assert result["val"] == first["val"] and {p.name for p in tmp_path.iterdir()}.isdisjoint({"adapter"})
    assert not list(tmp_path.glob("*.pt")) and result["steps"] == 0
    assert result["config"]["max_steps"] == 20  # as asked, whether or not it was needed


def test_lora_reference_has_as_many_parameters_and_leaves_the_base_alone(tmp_path):
    result = B.main(["--test", "--lora_reference", "--samples", "0", "--output_dir", str(tmp_path)])
    assert abs(result["lora"]["parameters"] / result["params"] - 1) < 0.15
    assert result["lora"]["final"]["loss"] < result["final"]["loss"] + 1
    assert "lora" in result["generation"]["greedy"] and result["base_unchanged"]


BAD = [
    (["--model_path", ""], "--model_path is needed"),
    (["--test", "--model_path", "/no/such/llama"], "/no/such/llama"),
    (["--test", "--load_in_4bit", "on"], "--load_in_4bit on"),
    (["--test", "--attn_implementation", "flash_attention_2"], "sdpa"),
    (["--test", "--momentum", "1.0"], "--momentum"),
    (["--test", "--max_steps", "0"], "--max_steps"),
    (["--test", "--eval_only"], "--adapter"),
    (["--test", "--adapter", "/no/such.pt"], "/no/such.pt"),
]


@pytest.mark.parametrize("flags, says", BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input(flags, says, tmp_path):
    with pytest.raises(core.Failure) as failure:
        B.main([*flags, "--output_dir", str(tmp_path / "r")])
    assert failure.value.code == 2 and says in str(failure.value) and "\n" not in str(failure.value)


def test_dry_run_is_of_the_very_configuration_and_writes_nothing(finished, tmp_path):
    plan = B.main(["--test", "--dry_run", "--output_dir", str(tmp_path / "r")])
    assert plan["adapter_parameters"] == 3 * 818 and plan["tokens"] == 20 * 2 * 2 * 64 and not (tmp_path / "r").exists()
    assert plan["base_parameters"] == finished[1]["base_params"] and set(plan) == {
        "adapter_parameters",
        "base_parameters",
        "tokens",
        "memory_gb",
    }
    again = B.main(["--test", "--dry_run", "--gradient_checkpointing"])["memory_gb"]
    values = 2 * 64 * 64  # of one layer's input: batch, length, width
    assert plan["memory_gb"]["activations"] == pytest.approx(3 * 68 * values / 1e9)
    assert again["activations"] == pytest.approx((68 + 3 * 4) * values / 1e9)  # one layer whole, of all the input
    half = B.main(["--test", "--dry_run", "--precision", "bf16"])["memory_gb"]
    spared = 2 * plan["base_parameters"] / 1e9
    saved = plan["memory_gb"]["weights_and_optimizer"] - half["weights_and_optimizer"]
    assert saved == pytest.approx(spared)
    with pytest.raises(core.Failure, match="/no/such"):
        B.main(["--dry_run", "--model_path", "/no/such/llama"])


@pytest.mark.parametrize("steps", ["5000", "100"])
def test_documented_commands(steps, tmp_path):
    words = f"--model_path /path/to/llama-8b --output_dir ./results/phase_b --batch_size 2 --max_steps {steps}".split()
    args = B.parse(words)
    assert (args.batch_size, args.max_steps, args.lr, args.grad_accum) == (2, int(steps), 1e-4, 16)
    words[1], words[3], words[-1] = "tiny", str(tmp_path), "2"  # a model and sizes that are here
    result = B.main([*words, "--test", "--no_eval"])
    assert result["config"]["batch_size"] == 2 and (tmp_path / "cf_adapter_final.pt").exists()
