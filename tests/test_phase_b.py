"""CF-HoT phase B: spec section 8 (invariants 1, 3-14) and section 11 (checks 9-18)."""

import json
import math
import re

import pytest
import torch
from conftest import same_tensors

import core
import phase_b_8b_adapters as B

KINDS = ("llama", "qwen2", "mistral")


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
    model(tokens(2, 40))
    for field in model.fields.values():
        g = field.log_g.exp()
        assert (g > 0).all() and (g <= 0.5).all() and (field.dh >= 0).all() and (field.dh <= 1).all()
    fresh = wrapped(strong=False)
    fresh(tokens(1, 30))
    h = math.log1p(math.exp(-2))  # constant dh and the corrected average of a constant is that constant
    expected = math.log(1 / (1 + math.exp(h)))
    assert torch.allclose(fresh.fields[1].log_g, torch.full((1, 30), expected), atol=1e-6)


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
    model(tokens(2, 40))
    fields = list(model.fields.values())
    for adapter, field, h in zip(model.cf_adapters, fields, field_by_hand(model, [f.dh for f in fields], axis)):
        assert torch.allclose(field.log_g, adapter.log_gate(h.clamp(0, 10)), atol=1e-5)


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
    model._mask = torch.ones(2, 50, dtype=torch.long)
    model._mask[1, :7] = 0
    took = -model._shuffled(0, log_g)
    assert (took <= torch.arange(50)).all() and (took[1, 7:] >= 7).all()
    assert torch.equal(took[0, :43] + 7, took[1, 7:])  # the same draw for the j-th real token
    assert took[0].unique().numel() > 20 and torch.equal(took, -model._shuffled(0, log_g))


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
            model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=c, **how)
            for c in (True, False, True)
        ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])  # a second call is independent of the first
    if not how and mode == "gate":
        short = model.generate(ids[:1, 4:], max_new_tokens=12, do_sample=False)
        n = min(short.shape[1] - 6, 12)
        assert torch.equal(short[0, 6 : 6 + n], runs[0][0, 10 : 10 + n])


def test_a_cache_filled_without_adapters_is_refused():
    from transformers import DynamicCache

    model, ids, cache = wrapped(), tokens(1, 8), DynamicCache()
    with model.disabled():
        model.base(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="filled before"):
        model.base(ids, past_key_values=cache, use_cache=True)


def test_state_follows_the_cache():
    from transformers import DynamicCache

    model, cache = wrapped(), DynamicCache()
    model.base(tokens(3, 8), past_key_values=cache, use_cache=True)
    before = cache.control_field.log_g[1].clone()
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(cache.control_field.log_g[1], before[[2, 0, 1]])
    cache.batch_repeat_interleave(2)
    assert cache.control_field.h[0].shape == (6, 1)
    cache.batch_select_indices(torch.tensor([0, 5]))
    assert torch.equal(cache.control_field.log_g[1], before[[2, 1]])
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(-1)


# -------------------------------------------------------------------------------------------------------- gradients
def test_gradients_reach_every_adapter_and_no_base_parameter(family):
    model, ids = wrapped(*family).train(), tokens(2, 30)
    model.config.lambda_hol_loss = 0.0
    model(ids, labels=ids)["loss"].backward()
    for adapter in model.cf_adapters:
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in model.base.parameters())


@pytest.mark.parametrize("axis", ["position", "layer", "both"])
def test_gradient_checkpointing_changes_nothing(axis):
    results, ids = [], tokens(2, 30)
    for on in (False, True):
        model = wrapped(axis=axis)
        if on:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
            model.base.train()  # the library checkpoints in training mode only; there is no dropout in this base
            model.base.model.gradient_checkpointing = True
        out = model(ids, labels=ids)
        out["loss"].backward()
        results.append((out["loss"].detach(), out["total_risk"], [p.grad for p in model.get_adapter_params()]))
    assert same_tensors(*results) if axis == "position" else torch.allclose(results[0][0], results[1][0])
    for a, b in zip(results[0][2], results[1][2]):
        assert torch.allclose(a, b, atol=1e-6)


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
    assert (B.CFAdapterConfig().d_model, B.CFAdapterConfig().n_layers, B.CFAdapterConfig().d_fiber) == (4096, 32, 16)


# ------------------------------------------------------------------------------------------------------------ data
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


def test_packed_rows_have_eos_between_lines_and_no_pack_rows_are_lines(monkeypatch):
    tokenizer = core.load_tokenizer("byte")
    lines = [f"{i} " + "x" * 120 + "\n" for i in range(30)] + ["short\n"]
    monkeypatch.setattr(core, "load_text", lambda *a, **k: lines)
    packed = B.load_rows(B.parse(["--test"]), tokenizer, "train")
    text = tokenizer.decode(torch.cat(packed).tolist())
    assert all(len(r) == 64 for r in packed) and "short" not in text and text.count("<eos>") in (29, 30)
    single = B.load_rows(B.parse(["--test", "--no_pack", "--seq_len", "100"]), tokenizer, "train")
    assert len(single) == 30 and all(len(r) == 100 for r in single)


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
    names = "intervention_active gate_in_range risk_not_collapsed val_ppl_not_worse rep_reduced"
    assert list(result["criteria"]) == names.split()
    final = torch.load(directory / "cf_adapter_final.pt", weights_only=True)
    assert {"adapter_state_dict", "config", "history", "base", "format_version"} == set(final)
    assert final["base"]["model_type"] == "llama" and final["config"]["d_model"] == 64
    assert all(final["history"][k] for k in ("train_loss", "lm_loss", "risk", "gate"))
    for step in (10, 20):
        state = torch.load(directory / f"cf_adapter_step_{step}.pt", weights_only=True)
        assert {"step", "adapter_state_dict", "optimizer_state_dict", "config", "history"} <= set(state)
    assert (directory / "cf_adapter_best.pt").exists()
    rows = [json.loads(line) for line in (directory / "generations.jsonl").read_text().splitlines()]
    conditions = {"base", "cfhot", "cfhot_shuffled", "rep_penalty"}
    assert len(rows) == 21 * 4 * (1 + 2) and {r["condition"] for r in rows} == conditions
    assert {"prompt", "condition", "decode", "seed", "text", "metrics"} <= set(rows[0])
    for decode in ("greedy", "sampled"):
        for condition in conditions:
            found = result["generation"][decode][condition]
            assert found["minus_base"]["rep_4"]["n"] == 21 and 0 <= found["mean"]["rep_4"] <= 1
        assert result["generation"][decode]["base"]["minus_base"]["rep_4"]["hi"] == 0


def test_the_adapter_file_loads_into_the_saved_base(finished):
    directory, _ = finished
    base, tokenizer = core.load_backbone(str(directory / "tiny_base"))
    model, ids = B.load_cf_adapter(base, directory / "cf_adapter_final.pt"), tokens(2, 30)
    gated = model(ids)["logits"]
    with model.disabled():
        assert (model(ids)["logits"] - gated).abs().max() > 1e-4
    assert model.generate(ids[:, :5], max_new_tokens=4, do_sample=False).shape == (2, 9) and len(tokenizer) == 259


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
    skip = ("time_s", "wall_s", "peak_mem_bytes", "environment", "config", "tokens_per_s", "data")
    return {k: comparable(v) if isinstance(v, dict) else v for k, v in result.items() if k not in skip}


def test_resume_and_repeat_are_bitwise_equal(finished, tmp_path):
    directory = tmp_path / "r"
    again = B.main(["--test", "--output_dir", str(directory)])
    assert comparable(again) == comparable(finished[1])
    (directory / "cf_adapter_step_20.pt").unlink()
    (directory / "phase_b_results.json").unlink()
    resumed = B.main(["--test", "--resume", "auto", "--output_dir", str(directory)])
    assert comparable(resumed) == comparable(finished[1])
    states = [torch.load(d / "cf_adapter_step_20.pt", weights_only=True) for d in (directory, finished[0])]
    keep = ("adapter_state_dict", "optimizer_state_dict", "history", "rng_state")
    assert same_tensors(*({k: s[k] for k in keep} for s in states))


def test_evaluation_cadence_is_inert_and_it_learns(finished, tmp_path):
    flags = ["--test", "--no_eval", "--eval_interval", "3", "--log_interval", "7"]
    other = B.main([*flags, "--output_dir", str(tmp_path)])
    files = [torch.load(d / "cf_adapter_final.pt", weights_only=True) for d in (tmp_path, finished[0])]
    assert same_tensors(*(f["adapter_state_dict"] for f in files))
    assert other["val"]["gate_effect"] > 0  # on held-out text the trained gate lowers the loss of the frozen base


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
    assert result["val"] == first["val"] and not list(tmp_path.glob("cf_adapter_step_*"))


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


def test_dry_run_writes_nothing(tmp_path):
    plan = B.main(["--test", "--dry_run", "--output_dir", str(tmp_path / "r")])
    assert plan["adapter_parameters"] == 2 * 818 and plan["tokens"] == 20 * 2 * 2 * 64 and not (tmp_path / "r").exists()
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
