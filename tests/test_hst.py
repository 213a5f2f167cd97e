"""HST: spec section 8 (invariants I1 to I13) and section 11 (acceptance checks 1 to 20 and the negative ones)."""

import collections
import contextlib
import copy
import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, same_tensors
from torch.utils._python_dispatch import TorchDispatchMode

import claims
import core
import hst_train as H

FORMS = [(v, mode) for v, spec in H.VARIANTS.items() for mode in spec.modes]
DOCUMENTED = {
    "v3_ultra token": 122_426_321,
    "v4_unified token": 160_199_633,
    "v4_1_hyperlattice token": 171_409_928,
    "v5 token": 154_496_079,
    "v6 token": 153_905_431,
    "v6 chunk": 156_550_670,
    "v7_1_2_agile token": 154_492_996,
    "v7_1_2_agile chunk": 157_141_311,
    "v8_2_crystalline token": 171_013_578,
    "chaoslogic token": 138_567_940,
}


def tiny(variant, mode=None, *flags):
    return H.parse(["--test", "--variant", variant, *(["--mode", mode] if mode else []), *flags])


def tokens(*shape, seed=0, high=64):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def harsh(variant, mode=None, *flags, **changes):
    return H.harsh(tiny(variant, mode, *flags), **changes)


# ------------------------------------------------------------------------------------------------ sizes and tables
def test_list_variants_prints_eight_rows(capsys):
    rows = H.main(["--list-variants"])
    assert [r["variant"] for r in rows] == list(H.VARIANTS) and len(capsys.readouterr().out.splitlines()) == 8


def test_parameters_are_the_documented_ones(capsys):
    """Within 1 % of the document; the chunk forms are smaller by the lattice layer that no chunk could ever reach."""
    ask = ["--params", "--variant", "all", "--middle", "spine"]
    found = {name: parts["total"] for name, parts in H.main(ask).items()}
    assert set(found) == {f"{v} {m}" for v, m in FORMS}
    for name, documented in DOCUMENTED.items():
        assert abs(found[name] / documented - 1) < (0.01 if "token" in name else 0.012), name
    exact = ("v3_ultra token", "v4_unified token", "v4_1_hyperlattice token", "v8_2_crystalline token")
    assert all(found[name] == DOCUMENTED[name] for name in exact)


def planned(*flags):
    return H.main([*flags, "--dry_run", "--device", "cpu"])


def test_memory_estimate_at_the_documented_size_is_below_15_gb(capsys):
    for variant, mode in FORMS:
        plan = planned("--variant", variant, "--mode", mode)
        assert 2 < plan["memory_gb"]["total"] < 15 and plan["tokens"] == 100_000 * 8192 and "time" not in plan


def test_the_plan_is_of_that_very_configuration(capsys):
    """Recomputed blocks, a smaller optimizer and absent heads each lower their own part of the memory by hand-made
    arithmetic, and nothing else; the planned parameters are those of the model that would be trained."""
    base, T, D, L = planned("--variant", "v5")["memory_gb"], 512, 768, 16 + 10  # blocks, and the lattice's layers
    recomputed = planned("--variant", "v5", "--grad_ckpt")["memory_gb"]
    assert recomputed["activations"] == pytest.approx(base["activations"] / L + 4 * T * D * L / 1e9)
    headless = planned("--variant", "v5", "--off", "horizon,fields")["memory_gb"]
    assert base["loss"] - headless["loss"] == pytest.approx(8 * T * 0.25 * 7 * D / 1e9)
    small = planned("--variant", "v5", "--optim", "adamw8bit")
    spared = 6 * (small["parameters"] - 32000 * D) / 1e9
    assert base["weights_and_optimizer"] - small["memory_gb"]["weights_and_optimizer"] == pytest.approx(spared)
    for plan in (base, recomputed, headless, small["memory_gb"]):
        assert plan["total"] == pytest.approx(sum(v for k, v in plan.items() if k != "total"))
    chosen = planned("--test", "--variant", "v6", "--match_params", "500000")
    model = H.build_model(tiny("v6", None, "--match_params", "500000"))
    assert chosen["parameters"] == H.count(model) and chosen["d_ff"] == model.args.d_ff


def test_tip_one_runs():
    a = H.parse(["--d_model", "512"])
    assert a.n_heads == 8 and H.count(H.on_meta(a)) > 5e7


def test_match_params_gives_equal_counts():
    target = H.count(H.on_meta(tiny("v8_2_crystalline"))) + 100_000
    for variant in [*H.VARIANTS, "plain"]:
        found = H.count(H.on_meta(tiny(variant, None, "--match_params", str(target))))
        assert abs(found / target - 1) < 0.02, variant


def published_v3(D, L, H, V=32000, S=512):
    """Parameters of the author's v3 script, from its layers: ten level MLPs, of which most are never used, a horizon
    head of V columns, a confidence of every block."""
    nn = torch.nn

    def mlp(*sizes, bias=True):
        return [nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes)]

    with torch.device("meta"):
        levels = [layer for _ in range(10) for layer in (*mlp(D, D, D), nn.LayerNorm(D))]
        levels += [nn.MultiheadAttention(D, 4), *mlp(2 * D, D), nn.LayerNorm(D)]
        paths = [*mlp(1, 64, 1), *mlp(2 * D, D), nn.LayerNorm(D), nn.GRU(D, D), *mlp(2 * D, D)]
        fusion = [*mlp(3 * D, 2 * D, D), nn.LayerNorm(2 * D)]
        block = [*mlp(D, D, D, D, D, bias=False), *mlp(D, 2 * D, D), *mlp(D, 1), nn.LayerNorm(D), nn.LayerNorm(D)]
        horizon = [*mlp(D, D * H), *mlp(D, V, bias=False), *mlp(D, D // 4, H)]
        outside = [nn.Embedding(V, D), nn.Embedding(S, D), nn.LayerNorm(D)]
    once = numbers(levels + paths + fusion + horizon + outside)
    return once + L * numbers(block)


def numbers(modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_the_counts_that_the_claims_calculate_with():
    """claims.yaml: the published v3 at both sizes by formula, and the rebuilt one."""
    rows = {row["id"]: row for row in yaml.safe_load((ROOT / "claims.yaml").read_text())["claims"]}
    for name, size in (("hst-470m", (1152, 32, 16)), ("hst-64m-85m", (768, 16, 8))):
        assert eval(rows[name]["published"]["value"]) * 1e6 == pytest.approx(published_v3(*size), abs=0.5)
    big = H.parse(["--variant", "v3_ultra", "--d_model", "1152", "--n_layers", "32", "--horizon", "16"])
    assert eval(rows["hst-470m"]["controls"][0]["value"]) * 1e6 == pytest.approx(H.count(H.on_meta(big)), abs=0.5)
    counts = [H.count(H.on_meta(H.parse(["--variant", v, "--middle", "spine"]))) for v in H.VARIANTS]
    bench = json.loads((ROOT / "docs/results/bench/hst.json").read_text())
    assert [bench[f"hst_{v}"]["hst"]["parameters"] for v in H.VARIANTS] == counts
    assert min(counts) == bench["hst_v3_ultra"]["hst"]["parameters"]


def test_spine_and_ancestors():
    assert H.spine(512) == [0, 2, 4, 12, 36, 104, 304] and H.spine(8192)[7:] == [888, 2592, 7568]
    assert H.spine(400, (2, 1)) == [0, 2, 4, 10, 24, 58, 140, 338]
    t, nodes = H.lattice_tables(512), H.spine(512)
    expected = {
        36: {12: 1, 4: 2, 2: 2, 0: 1},
        104: {36: 1, 12: 2, 4: 4, 2: 3, 0: 2},
        304: {104: 1, 36: 2, 12: 4, 4: 7, 2: 6, 0: 4},
    }
    for node, counts in expected.items():
        row = t.count[t.cls[node]]
        assert {nodes[i]: int(n) for i, n in enumerate(row) if n} == counts
    assert t.level[t.cls[304]].tolist() == [2, 2, 2, 1, 1, 1, 0] and t.weights.shape[1] == 3
    assert H.lattice_tables(8192).weights.shape[1] == 4


def ancestors(t, nodes):
    """{node: (paths, hops)} of a position, from the definition."""
    parents = (
        [nodes[nodes.index(t) - k] for k in (1, 2, 3)]
        if t in nodes[3:]
        else []
        if t in nodes
        else [max(s for s in nodes if s < t)]
    )
    out = {}
    for p in parents:
        for a, (n, hops) in [(p, (1, 1)), *((a, (n, h + 1)) for a, (n, h) in ancestors(p, nodes).items())]:
            old = out.get(a, (0, hops))
            out[a] = old[0] + n, min(old[1], hops)
    return out


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("length", [1, 3, 4, 13, 512])
def test_tables_and_lattices_equal_the_loop_over_positions(length):
    nodes, D, t = H.spine(length), 16, H.lattice_tables(length)
    for at in range(length):
        row = t.count[t.cls[at]].tolist()
        assert {nodes[i]: (n, int(t.level[t.cls[at], i])) for i, n in enumerate(row) if n} == ancestors(at, nodes)
    torch.manual_seed(0)
    x = torch.randn(2, length, D)
    args = types.SimpleNamespace(d_model=D)
    module = H.CompleteLattice(args, length)
    module.key = "m"
    u, out = module.norm(x), []
    for at in range(length):
        mine, here = ancestors(at, nodes), u[:, at]
        order = sorted(mine, reverse=True)
        h1 = h2 = here
        if mine:
            deepest = max(h for _, h in mine.values())
            rows = []
            for level in range(1, deepest + 1):
                inside = [(a, n) for a, (n, h) in mine.items() if h == level]
                mean = sum(n * u[:, a] for a, n in inside) / sum(n for _, n in inside)
                rows.append(module.levels[level - 1](mean))
            k, v = module.kv(torch.stack(rows, 1)).chunk(2, -1)
            heads = [H.split_heads(z, 4) for z in (module.q(here)[:, None], k, v)]
            scores = (heads[0] @ heads[1].transpose(-1, -2) / 2).softmax(-1)  # sqrt(16 / 4) = 2
            a = module.o((scores @ heads[2]).transpose(1, 2).flatten(2)[:, 0])
            h1 = module.norm1(module.merge(torch.cat([a, here], -1)))
            steps = []
            for a in order:
                message = F.gelu(module.norm2(module.message(torch.cat([u[:, a], here], -1))))
                steps.append(message * F.softplus(module.weight(torch.tensor([[math.log1p(mine[a][0])]]))))
            g = steps[0] if module.gru is None else module.gru(torch.stack(steps, 1))[0][:, -1]
            z = module.gate(torch.cat([g, here], -1)).sigmoid()
            h2 = z * g + (1 - z) * here
        out.append(x[:, at] + module.fuse(torch.cat([here, h1, h2], -1)))
    assert torch.allclose(module(x, None, {}), torch.stack(out, 1), atol=1e-5)

    adaptive = H.AdaptiveLattice(args, length)
    adaptive.key = "a"
    y, gates = x.clone(), adaptive.router(x.cumsum(1) / torch.arange(1, length + 1)[:, None]).sigmoid()
    for i in range(len(adaptive.norms)):
        u, moved = adaptive.norms[i](y), y.clone()
        for at in range(length):
            before = [s for s in nodes if s < at]
            if len(before) > i:
                pair = torch.cat([u[:, at], u[:, before[-1 - i]]], -1)
                moved[:, at] += gates[:, at, i : i + 1] * adaptive.second[i](F.gelu(adaptive.first[i](pair)))
        y = moved
    assert torch.allclose(adaptive(x, None, {}), y, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- components
def test_hyperlattice_grouped_equals_dense_and_gathered():
    torch.manual_seed(0)
    module = H.HyperLattice(types.SimpleNamespace(d_model=16, lattice_paths=48), 0)
    torch.nn.init.normal_(module.paths, 0, 0.3)
    x, aux = torch.randn(2, 40, 16, requires_grad=True), {}
    out = module(x, None, aux)
    u = module.norm(x)
    weight = torch.zeros(2, 40, 48).scatter(-1, (best := module.router(u).topk(4, -1))[1], best[0].softmax(-1))
    dense = x + module.out(torch.einsum("btp,btd,pde->bte", weight, u, module.paths))
    assert module.k == 4 and torch.allclose(out, dense, atol=1e-5)
    grads = [
        torch.autograd.grad(o.square().sum(), (module.paths, module.router.weight, x), retain_graph=True)
        for o in (out, dense)
    ]
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in zip(*grads)) and grads[0][1].abs().max() > 1e-4
    few = module(x[:1, :10], None, {})  # 10 tokens x 4 paths <= 48: the gathered form
    assert torch.allclose(few, dense[:1, :10], atol=1e-5) and aux["balance"] >= 0.9


@pytest.mark.parametrize("n", [1, 5, 128, 300])
def test_hebbian_parallel_equals_sequential(n):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g) for _ in range(3))
    k, eta, S = F.normalize(k, dim=-1), torch.rand(2, 3, n, generator=g), torch.randn(2, 3, 8, 8, generator=g)
    state, out = S.clone(), []
    for t in range(n):
        state = 0.95 * state + eta[:, :, t, None, None] * k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((state.transpose(-1, -2) @ q[:, :, t, :, None])[..., 0])
    for chunk in (128, 7):
        o, last = H.fast_weights(q, k, v, eta, 0.95, S, chunk)
        assert torch.allclose(o, torch.stack(out, 2), atol=1e-5) and torch.allclose(last, state, atol=1e-5)
    moved = v.clone()
    moved[0] += 1
    assert torch.equal(H.fast_weights(q, k, moved, eta, 0.95)[0][1], H.fast_weights(q, k, v, eta, 0.95)[0][1])


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_diamond_is_lossless(dtype, limit):
    torch.manual_seed(0)
    module, u = H.Diamond(32, 128).to(dtype), torch.randn(2, 9, 32, dtype=dtype)
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    out = module(u)
    assert (out - u).abs().max() > 0.1 and (module.inverse(out) - u).abs().max() <= limit
    z, w = module.rotate(u)
    assert torch.allclose(z.square().sum() + w.square().sum(), u.square().sum())


def test_points_stay_inside_the_ball():
    table = torch.randn(50, 16)
    for scale in (1e-6, 0.01, 1.0, 1e4):
        assert (H.poincare(table * scale).norm(dim=-1) < 1).all()
    assert torch.allclose(H.poincare(table[:1] * 1e-3), table[:1] * 1e-3, rtol=1e-3)  # near the origin: the identity
    zero = torch.zeros(3, 16, requires_grad=True)
    H.poincare(zero).sum().backward()
    assert zero.grad.isfinite().all()
    model = harsh("v8_2_crystalline")
    model.tokens.weight.data.mul_(1e4)
    assert model.spec.hyperbolic and (model.embed(tokens(1, 30)) / model.scale).norm(dim=-1).max() < 1


def test_exit_needs_patience_and_layer_one():
    """v3/v4 leave after one confident layer (the second at the earliest), v5/v6 after two in a row."""
    for variant, expected in (("v4_unified", 2.0), ("v5", 2.0)):
        model = harsh(variant, "token", exit_threshold=0.0)
        assert (model.trunk(tokens(1, 20))[1]["depth"] == expected).all()
    for variant, expected in (("v4_unified", 2.0), ("v5", 3.0)):
        model = harsh(variant, "token")
        for i, head in enumerate(model.stack.bottom.heads):
            head.weight.data.zero_()
            head.bias.data.fill_(-9.0 if i == 0 else 9.0)  # confident from layer 1 on
        assert (model.trunk(tokens(1, 20))[1]["depth"] == expected).all()


def test_depth_is_independent_of_the_batch():
    for variant in ("v5", "v7_1_2_agile", "chaoslogic"):
        model, ids = harsh(variant, "token"), tokens(3, 60)
        together = model.trunk(ids)[1]["depth"]
        alone = torch.cat([model.trunk(row[None])[1]["depth"] for row in ids])
        assert torch.allclose(together, alone, atol=1e-5) and together.std() > 1e-3


def test_evaluation_is_deterministic_and_training_draws_patterns():
    model, ids = harsh("chaoslogic"), tokens(2, 60)
    assert torch.equal(model(ids)["logits"], model(ids)["logits"])
    model.train()
    assert not torch.equal(model(ids)["logits"], model(ids)["logits"])


SWITCHED = [(v, name) for v, spec in H.VARIANTS.items() for name in H.mechanisms(spec)]


@pytest.mark.parametrize("variant, name", SWITCHED)
def test_every_mechanism_moves_the_output_and_paging_does_not(variant, name):
    """Parameters of one name start equal, so only the mechanism differs."""
    ids = tokens(2, 60)
    with_it, without = (harsh(variant, "token", "--off", off) for off in ("", name))
    key = "horizon" if name == "fields" else "logits"
    if name == "horizon":
        assert "horizon" in with_it(ids) and "horizon" not in without(ids)
    elif name == "paged":
        stepped = [H.cached(m, ids, (7, 1), m.new_state(2)) for m in (with_it, without)]
        assert with_it.new_state(1).pages and not without.new_state(1).pages and torch.equal(*stepped)
    else:
        assert (with_it(ids)[key] - without(ids)[key]).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------- caches
def test_pages_are_counted_and_returned():
    model, ids = harsh("v4_1_hyperlattice"), tokens(2, 128)
    st = model.new_state(2)
    for upto in (5, 16, 17, 60, 128):  # page 16: appends that end inside, at and across borders
        H.cached(model, ids[:, st.length : upto], (100,), st)
        assert st.pages.held * 2 == 2 * math.ceil(upto / 16) == st.pages.total - len(st.pages.free)
    st.truncate(40)
    assert st.pages.held == 3
    st.truncate(0)
    assert sorted(st.pages.free) == list(range(st.pages.total))
    small = model.new_state(2, pages=4)
    H.cached(model, ids[:, :32], (32,), small)
    with pytest.raises(ValueError, match="out of pages"):
        model.trunk(ids[:, 32:33], small)


def test_paged_store_equals_the_contiguous_one():
    paged, flat = H.State(2, 64, page=8), H.State(2, 64)
    parts = torch.randn(2, 2, 3, 40, 4).split([3, 5, 9, 1, 22], 3)
    for part in parts:
        paged.pages.resize(paged.length + part.shape[3])
        got = paged.append("x", *part)
        assert all(map(torch.equal, got, flat.append("x", *part)))
        paged.length = flat.length = flat.length + part.shape[3]


def test_compressed_cache_is_small_and_sparse():
    big = H.on_meta(H.parse(["--variant", "chaoslogic"])).stack.top[0].attn
    assert big.rank == 80 and 2 * 768 / big.rank == 19.2
    model, ids = harsh("chaoslogic"), tokens(1, 100)
    st = model.new_state(1)
    whole = H.cached(model, ids, (9,), st)
    latents = {k: v.shape for k, v in st.buffers.items() if k.endswith("attn")}
    assert len(latents) == 8 and all(s == (1, 128, model.stack.top[0].attn.rank) for s in latents.values())
    attn = model.stack.top[0].attn
    x = torch.randn(1, 100, 64)
    y, near, spine = attn(x), x.clone(), x.clone()
    near[:, 50] += 1  # neither in the window of position 90 nor on the spine
    spine[:, 36] += 1
    assert torch.equal(attn(near)[:, 66:], y[:, 66:]) and not torch.equal(attn(near)[:, 65], y[:, 65])
    assert not torch.equal(attn(spine)[:, 90], y[:, 90]) and whole.isfinite().all()


# ------------------------------------------------------------------------------------------- invariants, all variants
# the others are checked among the slow tests: v6's token mode is v5's network, v7.1.2's chunk mode v6's
OFTEN = [form for form in FORMS if form not in (("v6", "token"), ("v7_1_2_agile", "chunk"), ("v4_unified", "chunk"))]


@pytest.mark.parametrize(
    "variant, mode", [*OFTEN, *(pytest.param(*form, marks=pytest.mark.slow) for form in FORMS if form not in OFTEN)]
)
def test_self_check_holds(variant, mode):
    """I1 to I6: causal (with every head), rows apart, cached = uncached, truncate, speculative = plain, gradients."""
    found = H.self_check(tiny(variant, mode))
    assert found["leak"] <= 1e-5 and found["rows"] <= 1e-5 and found["cache_mismatch"] <= 1e-4
    assert ("truncate_mismatch" in found) == (variant != "v8_2_crystalline")


@pytest.mark.parametrize("variant", [v for v, spec in H.VARIANTS.items() if spec.draft])
def test_without_horizon_heads_there_are_no_drafts(variant):
    assert H.self_check(tiny(variant, "token", "--off", "horizon"))["greedy_equal"]


@pytest.mark.parametrize("variant, mode", [("v3_ultra", "token"), ("v6", "chunk")])
def test_the_check_sees_a_leak(variant, mode, monkeypatch):
    keys = H.Attention.keys
    monkeypatch.setattr(H.Attention, "keys", lambda self, x, st: (*keys(self, x, st)[:2], None))
    assert H.audit(harsh(variant, mode), 128)["leak"] > 1e-3
    with pytest.raises(core.Failure, match="leak") as failure:
        H.self_check(tiny(variant, mode))
    assert failure.value.code == core.CHECK_FAILED


def test_the_check_sees_rows_that_mix(monkeypatch):
    mean = H.running_mean
    monkeypatch.setattr(H, "running_mean", lambda x, st, key: mean(x, st, key).mean(0, keepdim=True).expand_as(x))
    assert H.audit(harsh("v7_1_2_agile", "token"), 128)["rows"] > 1e-3


def test_hebbian_state_refuses_to_roll_back():
    model = harsh("v8_2_crystalline")
    st = model.new_state(1)
    model.trunk(tokens(1, 9), st)
    with pytest.raises(ValueError, match="roll back"):
        st.truncate(5)


def test_fast_weights_learn_while_decoding():
    model, ids = harsh("v8_2_crystalline"), tokens(1, 40)
    st = model.new_state(1)
    model.trunk(ids, st)
    for name, buffer in st.buffers.items():
        if "hebbian" in name:
            buffer.zero_()
    forgetful, whole = model.trunk(ids[:, :1], st)[0], model.trunk(torch.cat([ids, ids[:, :1]], 1))[0][:, -1:]
    assert (forgetful - whole).abs().max() > 1e-3


def test_a_chunk_call_may_not_cross_a_border():
    model = harsh("v6", "chunk")
    st = model.new_state(1)
    with pytest.raises(ValueError, match="border"):
        model.trunk(tokens(1, 17), st)
    H.cached(model, tokens(1, 20), (100,), st)
    st.truncate(16)
    with pytest.raises(ValueError, match="least is 16"):
        st.truncate(15)


@pytest.mark.parametrize("variant, mode", [(v, m) for v, m in FORMS if m == "chunk"])
def test_a_first_chunk_can_be_forgotten_whole(variant, mode):
    model, ids = harsh(variant, mode), tokens(2, 100)
    st = model.new_state(2)
    model.trunk(ids.flip(1)[:, :5], st)
    st.truncate(0)
    with torch.no_grad():
        assert (H.cached(model, ids, (7,), st) - model.trunk(ids)[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("variant", ["v4_unified", "v5", "v6", "v7_1_2_agile"])
def test_rows_of_two_chunks_leave_no_dead_parameter(variant):
    """The documented --max_seq_len 256 is two chunks: one place to run the lattice over, which has no ancestor."""
    found = H.self_check(tiny(variant, "chunk", "--max_seq_len", "32"))
    assert not found["without_gradient"]
    model = H.build_model(tiny(variant, "chunk", "--max_seq_len", "8", "--chunk_size", "1", "--horizon", "4"))
    assert H.audit(model, 8)["leak"] <= 1e-5  # places around the borders of chunks of one token


def test_injection_reaches_later_chunks_only():
    model, ids = harsh("v7_1_2_agile", "chunk"), tokens(1, 100)
    memory = model.memory_of(tokens(40, seed=3)), 3
    plain, injected = (model.trunk(ids, injection=i)[0] for i in (None, memory))
    moved = (plain - injected).abs().amax((0, 2))
    assert moved[:48].max() == 0 and moved[48:].min() > 1e-4
    st, parts = model.new_state(1), []
    while st.length < 100:
        part = next(model.pieces(ids[:, st.length : st.length + 7], st.length))
        parts.append(model.trunk(part, st, memory)[0])
    assert torch.allclose(torch.cat(parts, 1), injected, atol=1e-4)
    assert model.memory_of(tokens(3)).isfinite().all()  # shorter than a chunk: padded, the only one


@pytest.mark.parametrize("at", [0, 2, 7])
def test_injection_outlives_a_full_context(at):
    """Its first chunk is counted from the text's first token: where the context is cut to tokens 65.., chunk 7 of the
    text (token 112) becomes the new context's chunk 3 (token 113), and a chunk that was cut off is its first."""
    model, ids, memory = harsh("v7_1_2_agile", "chunk"), tokens(1, 120), None
    memory = model.memory_of(tokens(40, seed=3))
    texts = [H.generate(model, ids, 20, cache=cache, injection=(memory, at))[0] for cache in (True, False)]
    assert torch.equal(*texts)
    first = next(chunk for chunk in range(9) if 65 + 16 * chunk >= 16 * at)
    for length in range(129, 140):
        hidden = model.trunk(texts[0][:, 65:length], injection=(memory, first))[0][:, -1]
        assert model.logits(hidden).argmax() == texts[0][0, length]
    assert not torch.equal(texts[0][:, 129:], H.generate(model, texts[0][:, :129], 11)[0][:, 129:])


# ------------------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize(
    "variant, mode", [("v3_ultra", "token"), ("v6", "chunk"), ("v7_1_2_agile", "token"), ("v8_2_crystalline", "token")]
)
def test_a_full_context_is_read_again_alike_in_all_forms(variant, mode):
    model, said = harsh(variant, mode), []
    forms = [dict(cache=False), {}, *([dict(speculative=True)] if model.spec.draft else [])]
    texts = [H.generate(model, tokens(1, 90), 100, say=said.append, **form) for form in forms]
    assert all(torch.equal(texts[0][0], other) for other, _ in texts[1:]) and texts[0][0].shape == (1, 190)
    assert len(said) == len(forms) and texts[0][1]["re_reads"] >= 1


def cycle_model(variant, mode, steps=80):
    """A small model trained on the cycle 0, 1, ..., 15, 0, ..., where every draft can be right."""
    a = tiny(variant, mode)
    torch.manual_seed(0)
    model = H.build_model(a).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        rows = (tokens(8, 1, seed=step) + torch.arange(65)) % 16
        model(rows[:, :-1], rows)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("variant, mode", [(v, m) for v, m in FORMS if H.VARIANTS[v].draft])
def test_drafts_of_a_trained_model_are_accepted(variant, mode):
    """I5 after training: token for token the plain greedy text, more than two tokens for each forward pass."""
    model = cycle_model(variant, mode)
    prompt = torch.arange(10)[None] % 16
    plain = H.generate(model, prompt, 48)[0]
    text, stats = H.generate(model, prompt, 48, speculative=True)
    assert torch.equal(text, plain) and torch.equal(text, H.generate(model, prompt, 48, cache=False)[0])
    assert torch.equal(text[0], torch.arange(58) % 16)
    assert stats["accepted_tokens"] > 0 and stats["tokens_generated"] / stats["forwards"] > 2, stats


def test_speculative_sampling_keeps_the_distribution():
    """Check 15: first two tokens over a 5-token vocabulary, 20,000 draws of each kind, chi-square at 0.1 %."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(5, generator=g).softmax(-1)
    second, draft = (torch.randn(5, 5, generator=g).softmax(-1) for _ in range(2))  # given the first; the draft is poor
    n, counts = 20_000, torch.zeros(25)
    ones = torch.multinomial(first, n, True, generator=g)
    q = draft[0]  # drafted without having seen the first token
    for a, d in zip(ones.tolist(), torch.multinomial(q, n, True, generator=g)):
        kept, rest = H.accept(second[a][None], q[None], d[None], g)
        b = int(d) if kept else int(torch.multinomial(rest, 1, generator=g))
        counts[5 * a + b] += 1
    expected = n * (first[:, None] * second).flatten()
    assert ((counts - expected) ** 2 / expected).sum() < 51.2  # 24 degrees of freedom, p = 0.001


@pytest.mark.slow
def test_speculative_sampling_of_a_model_keeps_the_distribution():
    """Check 15 through `generate`: a model of five tokens, 3,000 texts of each kind, chi-square at 0.1 %."""
    a = tiny("v6", "token", "--d_model", "16", "--n_heads", "1", "--n_layers", "2", "--horizon", "4")
    model, prompt, n = H.build_model(dataclasses.replace(a, vocab_size=5)).eval(), tokens(1, 3, high=5), 3000
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            p.data.copy_(torch.normal(0.0, 0.3, p.shape, generator=core.generator(1, name)))
    counts, accepted = torch.zeros(2, 25), 0
    for speculative in (0, 1):
        g = torch.Generator().manual_seed(speculative)
        for _ in range(n):
            warm = functools.partial(H.distribution, temperature=1.0)
            ids, stats = H.generate(model, prompt, 2, warm, speculative=bool(speculative), generator=g)
            counts[speculative, 5 * ids[0, 3] + ids[0, 4]] += 1
            accepted += stats["accepted_tokens"]
    chi = ((counts[0] - counts[1]) ** 2 / counts.sum(0).clamp(min=1)).sum()
    assert 0.1 * n < accepted < 0.95 * n and chi < 51.2, (accepted, chi)  # 24 degrees of freedom


def test_speculative_acceptance_is_exact_in_float64():
    """With p and q known, the distribution of what is kept or drawn instead follows by arithmetic: sum over drafts of
    q min(1, p / q), and the rest from the normalised excess of p over q. It must be p to the last bits, at any draw."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        p, q = (torch.randn(7, generator=g, dtype=torch.float64).mul(2).softmax(-1) for _ in range(2))
        kept, total = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
        for token in range(7):
            chance = sum(accepted_at((step + 0.5) / 50, p, q, token)[0] for step in range(50)) / 50
            assert chance == pytest.approx(min(1, float(p[token] / q[token])), abs=1 / 50)
            rest = accepted_at(1 - 1e-15, p, q, token)[1]  # None only where p is at least q
            kept[token] = q[token] * min(1, p[token] / q[token])
            if rest is not None:
                total += (q[token] - kept[token]) * rest
        assert torch.allclose(kept + total, p, atol=1e-14, rtol=0)


def accepted_at(draw, p, q, token):
    """`accept` for one draft, its uniform draw being `draw`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **how: torch.tensor(draw, dtype=torch.float64))
        return H.accept(p[None], q[None], torch.tensor([token]))


def test_a_refused_draft_ends_the_round_in_its_place():
    """Three drafts of which the second is impossible under p: one is kept, and the next token comes from row 1."""
    p = torch.eye(4, dtype=torch.float64)[[1, 2, 3]]
    q = torch.full((3, 4), 0.25, dtype=torch.float64)
    assert H.accept(p, q, torch.tensor([1, 3, 3]))[0] == 1
    assert H.accept(p, q, torch.tensor([1, 3, 3]))[1].tolist() == [0, 0, 1, 0]
    assert H.accept(p, q, torch.tensor([1, 2, 3])) == (3, None)


def test_filters():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert H.distribution(logits, 0).argmax() == 3 and H.distribution(logits, 0).max() == 1
    assert (H.distribution(logits, 1.0, top_k=2) > 0).tolist() == [[False, False, True, True]]
    assert (H.distribution(logits, 1.0, top_p=0.6) > 0).tolist() == [[False, False, False, True]]
    assert torch.allclose(H.distribution(logits, 1.0), logits.softmax(-1))


# ----------------------------------------------------------------------------------------------------------- loss
def test_chunked_loss_equals_cross_entropy_with_its_gradients():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 8, generator=g), torch.randn(50, 8, generator=g)
    targets, weights = tokens(37, high=50), torch.rand(37, generator=g)
    targets[5] = targets[20] = -100
    results = []
    for chunk in (0, 10, 1024):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunk:
            total, ce, right = core.head_loss(h, w, targets, weights, chunk)
            assert torch.equal(right, (h @ w.T).argmax(-1) == targets)
        else:
            ce = F.cross_entropy(h @ w.T, targets, reduction="none", ignore_index=-100)
            total = (ce * weights).sum()
        (3 * total).backward()
        results.append((total, ce, h.grad, w.grad))
    for other in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results[0], other))
    mean = core.head_loss(hidden, weight, targets)[0]
    assert torch.allclose(mean, F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100))
    assert core.head_loss(hidden[:0], weight, targets[:0])[0] == 0


def test_horizon_targets(monkeypatch):
    """Row 0, 1, 2, ...: the target of offset k at t is t + k, never one from before t, none beyond the row."""
    seen = {}
    real = core.head_loss
    monkeypatch.setattr(core, "head_loss", lambda h, w, y, *r: seen.update(y=y, w=r[0]) or real(h, w, y, *r))
    model, T = harsh("v5", "token"), 20
    rows = torch.arange(T + 1)[None]
    out = model.train()(rows[:, :-1], rows)
    assert seen["y"][:T].tolist() == list(range(1, T + 1))
    far = seen["y"][T:].view(T, 7)
    for t, k in itertools.product(range(T), range(2, 9)):
        assert far[t, k - 2] == (t + k if t + k <= T else -100)
    gamma = torch.tensor([0.95**k for k in range(2, 9)])
    by_offset = torch.stack([out["parts"][f"ce_{k}"] for k in range(2, 9)])
    assert torch.allclose(out["parts"]["horizon_loss"], (by_offset * gamma).sum() / gamma.sum(), atol=1e-5)
    aux = 0.03 * out["parts"]["exit_loss"] + 0.03 * out["parts"]["conf"]
    assert torch.allclose(out["loss"], out["lm_loss"] + 0.5 * out["parts"]["horizon_loss"] + aux, atol=1e-4)
    logits = model.eval()(rows[:, :-1])["logits"]
    expected = F.cross_entropy(logits[0], rows[0, 1:])
    assert torch.allclose(model(rows[:, :-1], rows)["lm_loss"], expected, atol=1e-5)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, torch.Tensor)]
        self.most = max(self.most, *sizes, 0)
        return out


@pytest.mark.parametrize("variant", ["v4_unified", "v6", "v8_2_crystalline"])
def test_no_whole_logits_are_ever_held(variant):
    V = 4000
    a = tiny(variant, None, "--vocab_size", str(V), "--d_model", "16", "--n_heads", "2", "--lattice_paths", "4")
    model = H.build_model(a).train()
    rows = tokens(40, 65, high=V)  # 2560 positions, 640 of them with seven more offsets
    with Largest() as mode:
        model(rows[:, :-1], rows, H.positions_for_horizon(a, rows, 0))["loss"].backward()
    assert mode.most == 1024 * V < 40 * 64 * V


def test_recomputation_changes_nothing_but_memory():
    rows, losses = tokens(2, 65), []
    for flag in ((), ("--grad_ckpt",)):
        model = H.build_model(tiny("v6", "token", "--dropout", "0", *flag)).train()
        out = model(rows[:, :-1], rows)["loss"]
        out.backward()
        losses.append((out.detach(), [p.grad for p in model.parameters()]))
    assert same_tensors(*losses)


def test_the_schedule_and_its_ends():
    a = tiny("v3_ultra", None, "--max_steps", "100", "--warmup", "10", "--lr", "1")
    assert [round(H.rate(a, u, 0), 3) for u in (0, 9, 10, 55)] == [0.1, 1.0, 1.0, 0.5] and H.rate(a, 100, 0) == 0
    timed = dataclasses.replace(a, max_seconds=10.0)
    assert H.rate(timed, 50, 9.0) == pytest.approx(0.1 / 0.9) and H.rate(timed, 50, 10.0) == 0


# ---------------------------------------------------------------------------------- oracles: slow, float64, by the spec
def wide(x):
    return x.detach().double()


def apply(linear, x):
    """W x + b."""
    return x @ wide(linear.weight).T + (0 if linear.bias is None else wide(linear.bias))


def layer_norm(norm, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * wide(norm.weight) + wide(norm.bias)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def attend(attn, x, memory, allowed):
    """Softmax attention of each place of x [n, D] over the places of memory [m, D] that `allowed` [n, m] names."""
    q, (k, v) = apply(attn.q, x), apply(attn.kv, memory).chunk(2, -1)
    out = torch.zeros_like(x)
    dh = x.shape[1] // attn.heads
    for head, t in itertools.product(range(attn.heads), range(len(x))):
        part = slice(head * dh, (head + 1) * dh)
        seen = allowed[t].nonzero().flatten()
        weights = (k[seen, part] @ q[t, part] / dh**0.5).softmax(0)
        out[t, part] = weights @ v[seen, part]
    return apply(attn.out, out)


def block_by_hand(block, x, allowed):
    u = layer_norm(block.norm1, x)
    x = x + attend(block.attn, u, u, allowed)
    return x + apply(block.down, gelu(apply(block.up, layer_norm(block.norm2, x))))


def close(a, b, atol=1e-4):
    return torch.allclose(a.double(), b.double(), atol=atol)


TABLE = {  # spec 3.3: control, patience, middle (and the published one, if another), first, FFN, cache, horizon, modes,
    # draft, and what it has beside these
    "v3_ultra": ("exit", 1, "complete", True, 2, "contiguous", "harmonic", "token", "", "tied"),
    "v4_unified": ("exit", 1, "complete", False, 4, "contiguous", "harmonic", "token chunk", "", ""),
    "v4_1_hyperlattice": ("none", 1, "hyper places", False, 4, "paged", "harmonic", "token", "", ""),
    "v5": ("exit", 2, "adaptive gated", False, 4, "contiguous", "recursive", "token chunk", "", "fields"),
    "v6": ("exit", 2, "adaptive gated", False, 4, "contiguous", "recursive", "chunk token", "full", "row_decoder"),
    "v7_1_2_agile": (
        *("depth", 1, "adaptive gated", False, 4, "contiguous", "recursive", "token chunk", "confident"),
        "row_decoder",
    ),
    "v8_2_crystalline": (
        *("none", 1, "hyper", False, 4, "contiguous", "streamlined", "token", ""),
        "hyperbolic diamond hebbian feedback",
    ),
    "chaoslogic": ("pattern", 1, "adaptive gated", False, 4, "compressed", "recursive", "token", "", ""),
}


def test_the_table_of_variants_is_the_documents():
    assert list(H.VARIANTS) == list(TABLE) and len(H.KEY_INNOVATION) == 8
    names = "fields hyperbolic diamond hebbian feedback tied row_decoder".split()
    for name, (control, patience, middle, first, ffn, cache, horizon, modes, draft, has) in TABLE.items():
        extras = {extra: extra in has.split() for extra in names}
        ours, published = [*middle.split(), ""][:2]
        shape = dict(control=control, patience=patience, middle=ours, published=published, middle_first=first, ffn=ffn)
        shape |= dict(cache=cache, horizon=horizon, modes=tuple(modes.split()), draft=draft)
        assert H.VARIANTS[name] == H.Variant(**shape, **extras), name


def spread(module):
    return module.weight.std().item()


def test_documented_constants_are_those_of_the_built_model():
    """What acts is read off what was built, not off a flag: initialisation, optimizer, widths, schedule."""
    size = ["--d_model", "128", "--n_layers", "4", "--vocab_size", "4096"]
    a = H.parse(["--variant", "v8_2_crystalline", *size])
    model = H.build_model(a)
    assert spread(model.tokens) == pytest.approx(0.01, rel=0.02) and model.scale.item() == 2.0
    assert model.embed(tokens(4, 64, high=4096)).norm(dim=-1).mean().item() == pytest.approx(
        2 * 0.01 * 128**0.5, rel=0.05
    )
    block = model.stack.top[0]
    assert spread(block.attn.q) == pytest.approx(0.02, rel=0.05)
    assert spread(block.attn.out) == pytest.approx(0.02 / (2 * 4) ** 0.5, rel=0.05)
    assert block.hebbian.gain.eq(0.02 / (2 * 4) ** 0.5).all() and model.stack.middle[1].rounds == 2
    old = H.build_model(dataclasses.replace(a, old_start=True)).stack.top[0]
    assert old.hebbian.gain.eq(0.1).all()
    for half in "fg":  # inside as much as an FFN has, from half the inputs; its output louder than the context's
        for at, std, louder in ((1, 0.02, 2**0.5), (3, 0.02 / (2 * 4) ** 0.5, 2.0)):
            assert spread(getattr(block.mixer, half)[at]) == pytest.approx(louder * std, rel=0.05)
            assert spread(getattr(old.mixer, half)[at]) == pytest.approx(std, rel=0.05)
    assert model.stack.middle[0].k == 4 and len(model.stack.middle[0].paths) == 48
    row = H.build_model(H.parse(["--variant", "v6", "--mode", "chunk", *size])).decoder[0]
    assert spread(row.cross.out) == pytest.approx(0.25 * spread(row.attn.out), rel=0.05)
    optimizer = H.make_optimizer(model, a, eight_bit=False)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.01 if p.ndim >= 2 else 0.0) for p in model.parameters())
    assert all(group["betas"] == (0.9, 0.999) and group["fused"] for group in optimizer.param_groups)
    agile = H.build_model(tiny("v7_1_2_agile", "token", "--n_layers", "8"))
    assert agile.stack.bottom.depth[2].bias.item() == 2.0 and agile.stack.bottom.d_min == 2
    depth = agile.eval().trunk(tokens(2, 40))[1]["depth"]
    assert (depth - (2 + 2 / (1 + math.exp(-2)))).abs().max() < 0.05  # 88 % of the way from 2 to 4
    patterns = H.build_model(tiny("chaoslogic")).stack.bottom
    assert patterns.patterns.tolist() == [[1, 0, 0, 0]] * 2
    assert patterns.table.tolist() == [[1, 1], [1, 0], [0, 1], [0.5, 0.5]]
    assert a.exit_threshold == 0.93 and (a.horizon_weight, a.horizon_gamma, a.horizon_frac) == (0.5, 0.95, 0.25)


@pytest.mark.parametrize("variant", ["v3_ultra", "v4_unified"])
def test_blocks_and_the_lattices_place_by_hand(variant):
    """v3 has its lattice before the bottom stack, the others between the stacks."""
    model, ids = harsh(variant, "token", n_layers=4, max_seq_len=32), tokens(1, 20)
    x = wide(model.tokens.weight)[ids[0]] + wide(model.positions.weight)[:20]
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    lattice = model.stack.middle[0]

    def over(blocks, x):
        for block in blocks:
            x = block_by_hand(block, x, causal)
        return x

    def through_lattice(x):  # which has an oracle of its own
        with torch.no_grad():
            return wide(lattice(x.float()[None], None, {})[0])

    if variant == "v3_ultra":
        x = over(model.stack.bottom.blocks, through_lattice(x))
    else:
        x = through_lattice(over(model.stack.bottom.blocks, x))
    expected = layer_norm(model.norm, over(model.stack.top, x))
    model.stack.bottom.threshold = math.inf
    with torch.no_grad():
        assert close(model.trunk(ids)[0][0], expected)


def test_an_infinite_threshold_runs_every_layer():
    model, ids = harsh("v5", "token"), tokens(2, 60)
    with torch.no_grad():
        early, trained = model.trunk(ids), model.train().trunk(ids)[0]
        model.eval().stack.bottom.threshold = math.inf
        hidden, aux = model.trunk(ids)
    assert (aux["depth"] == 4).all() and torch.equal(hidden, trained) and not torch.equal(hidden, early[0])


@pytest.mark.parametrize("variant", ["v5", "v7_1_2_agile", "plain"])
def test_the_loss_against_layers_used(variant):
    """Each point is what a model gives whose bottom stack is really so deep; afterwards everything is as before."""
    model = harsh(variant, "token")
    a = dataclasses.replace(tiny(variant, "token"), eval_rows=2, max_seq_len=128)
    data = H.load_data(a, None)
    engine = types.SimpleNamespace(process_index=0, num_processes=1, device="cpu", autocast=contextlib.nullcontext)
    before = H.evaluate(model, data, a, engine)["loss"]
    points = H.by_depth(model, data, a, engine)
    model.eval()
    bottom, row = model.stack.bottom, data.validation
    for cap, (layers, loss) in enumerate(points if variant != "v5" else [], 1):
        cut = copy.deepcopy(model)
        if variant == "plain":
            del cut.stack.bottom.blocks[cap:]
        else:
            cut.stack.bottom.cap = cap
            depth = cut.trunk(row[:, :-1])[1]["depth"]
            assert depth.mean().item() == pytest.approx(layers, abs=1e-4) and depth.max() <= cap
        logits = cut(row[:, :-1])["logits"].flatten(0, 1)
        assert F.cross_entropy(logits, row[:, 1:].flatten()).item() == pytest.approx(loss, rel=1e-5)
    depths = [layers for layers, _ in points]
    assert depths == sorted(depths) and depths[0] < depths[-1]
    if variant == "v5":
        assert depths[-1] == len(bottom.blocks) and bottom.threshold == 0.5
    if variant != "v5":
        assert points[-1][1] == pytest.approx(before, rel=1e-5)
    assert len(bottom.blocks) == 4 and bottom.cap == math.inf and H.evaluate(model, data, a, engine)["loss"] == before


def test_the_chunk_encoder_by_hand():
    """Bidirectional inside the chunk, then one learned query over its places."""
    model = harsh("v6", "chunk", "--middle", "spine", chunk_size=8, max_seq_len=32)
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(8, 8, dtype=torch.bool)
    with torch.no_grad():
        vectors = model.encode(x)
    for chunk, vector in zip(wide(x), vectors):
        for block in model.encoder:
            chunk = block_by_hand(block, chunk, everything)
        assert close(vector, attend(model.pool, wide(model.query), chunk, everything)[0])


def test_feedback_by_hand():
    """s = x; twice: e = sigmoid(w s + b), s = (1 - e) s + e GRU(input x, hidden s)."""
    torch.manual_seed(0)
    module, x = H.Feedback(8, 2), torch.randn(2, 5, 8)
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    cell, given = module.cell, wide(x).flatten(0, 1)
    s = given
    for _ in range(2):
        ir, iz, i_new = (given @ wide(cell.weight_ih).T + wide(cell.bias_ih)).chunk(3, -1)
        hr, hz, h_new = (s @ wide(cell.weight_hh).T + wide(cell.bias_hh)).chunk(3, -1)
        reset, update = (ir + hr).sigmoid(), (iz + hz).sigmoid()
        gru = (1 - update) * (i_new + reset * h_new).tanh() + update * s
        e = apply(module.error, s).sigmoid()
        s = (1 - e) * s + e * gru
    assert close(module(x, None, {}).flatten(0, 1), s, 1e-5)


def test_hebbian_by_hand():
    """S_t = 0.95 S_{t-1} + eta_t k_t v_t^T with unit k; x_t + gain LN(S_t^T q_t), q of unit length, head by head."""
    torch.manual_seed(0)
    args = types.SimpleNamespace(old_start=False, d_model=16, n_heads=2, n_layers=4, middle="stack")
    module, x = H.Hebbian(args), torch.randn(1, 12, 16)
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    u = layer_norm(module.norm, wide(x)[0])
    q, k, v = apply(module.qkv, u).chunk(3, -1)
    eta = apply(module.rate, u).sigmoid()
    expected = wide(x)[0].clone()
    for head in range(2):
        part, S = slice(8 * head, 8 * head + 8), torch.zeros(8, 8, dtype=torch.float64)
        for t in range(12):
            S = 0.95 * S + eta[t, head] * torch.outer(k[t, part] / k[t, part].norm(), v[t, part])
            o = S.T @ (q[t, part] / q[t, part].norm())
            expected[t, part] += wide(module.gain)[part] * layer_norm(module.head_norm, o)
    assert close(module(x)[0], expected, 1e-5)


def test_the_ball_by_hand():
    for v in (torch.tensor([0.3, -0.4]), torch.tensor([30.0, 40.0]), torch.tensor([1e-3, 0.0])):
        norm = float(v.double().norm())
        assert close(H.poincare(v), min(math.tanh(norm), 1 - 1e-3) * v.double() / norm, 1e-6)


@pytest.mark.parametrize("H_", [4, 8, 16])
def test_recursive_heads_by_hand(H_):
    """Offsets H/2 and H first, then those halfway between two made before, each from the two that bracket it."""
    torch.manual_seed(0)
    head = H.Horizon(tiny("v6", None, "--horizon", str(H_), "--d_model", "16", "--n_heads", "2"), "recursive", 0)
    for p in head.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    h = torch.randn(3, 16)
    z = {0: wide(h)}
    for k in (H_ // 2, H_):
        z[k] = wide(h) + gelu(apply(head.coarse, wide(h) + wide(head.offsets[k - 2])))
    spacing = H_ // 2
    while len(z) < H_:  # 0 and all offsets but 1
        for k in range(2, H_):
            left, right = k - spacing // 2, k + spacing // 2
            if k not in z and left in z and right in z and k % (spacing // 2) == 0:
                middle = (z[left] + z[right]) / 2 + wide(head.offsets[k - 2])
                linear = head.medium if spacing == H_ // 2 else head.fine
                z[k] = wide(h) + gelu(apply(linear, torch.cat([wide(h), middle], -1)))
        spacing //= 2
    expected = torch.stack([layer_norm(head.norm, z[k]) for k in range(2, H_ + 1)], -2)
    assert close(head(h), expected, 1e-5)


def test_harmonic_and_streamlined_heads_by_hand():
    torch.manual_seed(0)
    h = torch.randn(3, 64)
    for kind in ("harmonic", "streamlined"):
        head = H.Horizon(tiny("v4_1"), kind, 0)
        for p in head.parameters():
            torch.nn.init.normal_(p, 0, 0.2)
        if kind == "harmonic":
            z = wide(h)[:, None] + apply(head.linear, wide(h)).view(3, 7, 64)
        else:
            z = apply(head.mlp[2], gelu(apply(head.mlp[0], wide(h)))).view(3, 7, 64)
        assert close(head(h), layer_norm(head.norm, z), 1e-5)


def test_predictive_fields_by_hand():
    """Near offsets (1 to 6) read layers 3 to 6, the medium ones (7 and 8) layers 1 to 4, all scaled by sigmoid(1); the
    head then sees h plus a linear map of the layers' weighted sum."""
    size = ["--d_model", "64", "--n_layers", "2", "--vocab_size", "64"]
    model = H.build_model(H.parse(["--variant", "v5", "--middle", "spine", *size]))
    head, one = model.horizon, 1 / (1 + math.exp(-1))
    near, medium = [0, 0, 0, 0.3, 0.8, 1, 0.8], [0, 0.5, 1, 0.8, 0.3, 0, 0]
    template = one * torch.tensor([near] * 5 + [medium] * 2)
    assert close(head.phi[template > 0], template[template > 0], 1e-6)
    assert head.phi[template == 0].abs().max() < 0.1  # other layers start as any matrix does, near zero
    ten = H.build_model(H.parse(["--variant", "v5", *size])).horizon.phi  # the author's lattice has ten layers
    assert ten.shape == (7, 10) and torch.equal(ten[:, :7][template > 0], head.phi[template > 0])
    torch.manual_seed(0)
    for p in head.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    h, deltas = torch.randn(3, 64), [torch.randn(3, 64) for _ in range(7)]
    for k in (4, 8):  # the coarse offsets, which need no other
        mixed = sum(wide(head.phi)[k - 2, layer] * wide(delta) for layer, delta in enumerate(deltas))
        base = wide(h) + apply(head.field, mixed)
        z = base + gelu(apply(head.coarse, base + wide(head.offsets[k - 2])))
        assert close(head(h, deltas)[:, k - 2], layer_norm(head.norm, z), 1e-4)


def test_drafts_are_as_long_as_the_document_says():
    """v6: always H; v7.1.2: the largest n whose product of confidences of the offsets 2..n is at least 0.5."""
    confidence = torch.tensor([0.1, 0.9, 0.9, 0.7, 0.8, 0.99, 0.99, 0.99])  # of offsets 1, 2, ..., 8
    args = types.SimpleNamespace(horizon=8)
    for draft, room, expected in (("full", 99, 8), ("full", 3, 3), ("confident", 99, 4), ("confident", 2, 2)):
        spec = types.SimpleNamespace(draft=draft)
        model = types.SimpleNamespace(horizon=1, spec=spec, args=args, confidence=lambda h: confidence.logit())
        assert H.draft_length(model, torch.zeros(4), room) == expected
    doubtful = torch.tensor([0.9, 0.4] + [0.99] * 6)
    model = types.SimpleNamespace(horizon=1, spec=spec, args=args, confidence=lambda h: doubtful.logit())
    assert H.draft_length(model, torch.zeros(4), 99) == 1


class Watched:
    """What the blocks of the bottom stack and the HyperLattice see and give in one forward pass."""

    def __init__(self, model):
        self.states, self.routed = [], []
        for block in model.stack.bottom.blocks:
            block.register_forward_hook(lambda module, given, out: self.states.append(wide(out)))
        for part in model.stack.middle:
            if isinstance(part, H.HyperLattice):
                part.register_forward_hook(lambda module, given, out: self.routed.append(wide(given[0])))


def bce(p, target):
    return -(target * p.log() + (1 - target) * (1 - p).log())


def auxiliary_by_hand(model, watched, aux):
    """0.03 exit + 0.01 mean depth / n_b + 0.01 balance, whichever the variant has."""
    total, bottom = 0.0, model.stack.bottom
    if model.spec.control == "exit":
        terms, last = [], watched.states[-1]
        for head, state in zip(bottom.heads, watched.states):
            near = (state * last).sum(-1) / (state.norm(dim=-1) * last.norm(dim=-1))
            terms.append(bce(apply(head, state).sigmoid()[..., 0], near.clamp(0, 1)))
        total += 0.03 * torch.stack(terms).mean()
    elif model.spec.control != "none":
        total += 0.01 * wide(aux["depth"]).mean() / len(bottom.blocks)
    routers = [part for part in model.stack.middle if isinstance(part, H.HyperLattice)]
    for part, x in zip(routers, watched.routed):
        logits = layer_norm(part.norm, x).flatten(0, 1) @ wide(part.router.weight).T
        share = torch.zeros(len(part.paths), dtype=torch.float64)
        for row in logits:
            share[row.topk(part.k)[1]] += 1 / (part.k * len(logits))
        total += 0.01 * len(part.paths) * (share * logits.softmax(-1).mean(0)).sum()
    return total


@pytest.mark.parametrize("variant, mode", FORMS)
def test_the_whole_loss_by_hand(variant, mode):
    """Every term from the model's own hidden states, for an omega that is only part of the positions: CE_1, the horizon
    with weight 0.5 and gamma 0.95, the confidence that offset k's top choice is right, and the auxiliary terms."""
    model, T = harsh(variant, mode, max_seq_len=32, chunk_size=8).train(), 32
    for name, p in model.named_parameters():
        if name.startswith("confidence"):
            p.data.mul_(0.1)  # else float32's sigmoid is 0 or 1
    ids, labels, omega = tokens(2, T, seed=7), tokens(2, T + 1, seed=8), torch.arange(1, 2 * T, 3)
    watched = Watched(model)
    torch.manual_seed(0)  # of the Gumbel noise
    hidden, aux = model.trunk(ids)
    table = model.tokens if variant == "v3_ultra" else model.head
    flat, E = wide(hidden).flatten(0, 1), wide(table.weight)
    deltas = [d.flatten(0, 1)[omega] for d in aux["deltas"]] if model.horizon.fields else None
    z = wide(model.horizon(hidden.flatten(0, 1)[omega], deltas))  # N H-1 D
    c = apply(model.confidence, flat).sigmoid()  # B*T H
    for n in range(0, len(omega), 2):  # else hardly any top choice is right
        row, t = divmod(int(omega[n]), T)
        labels[row, t + 1] = (E @ flat[omega[n]]).argmax()
        labels[row, min(t + 3, T)] = (E @ z[n, 1]).argmax()
    torch.manual_seed(0)
    out = model(ids, labels, omega)
    ce, by_offset, confident = [], {k: [] for k in range(2, 9)}, []
    for at in range(2 * T):
        row, t = divmod(at, T)
        logits, target = E @ flat[at], int(labels[row, t + 1])
        ce.append(-logits.log_softmax(0)[target])
        confident.append(bce(c[at, 0], float(logits.argmax() == target)))
    for n, at in enumerate(omega.tolist()):
        row, t = divmod(at, T)
        for k in range(2, 9):
            if t + k <= T:
                logits, target = E @ z[n, k - 2], int(labels[row, t + k])
                by_offset[k].append(-logits.log_softmax(0)[target])
                confident.append(bce(c[at, k - 1], float(logits.argmax() == target)))
    gamma = {k: 0.95**k for k in by_offset}
    horizon = sum(gamma[k] * torch.stack(by_offset[k]).mean() for k in by_offset) / sum(gamma.values())
    terms = {"lm_loss": torch.stack(ce).mean(), "horizon_loss": horizon, "conf": torch.stack(confident).mean()}
    for name, term in terms.items():
        assert out["parts"][name].item() == pytest.approx(term.item(), rel=1e-5), name
    expected = terms["lm_loss"] + 0.5 * horizon + 0.03 * terms["conf"] + auxiliary_by_hand(model, watched, aux)
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_confidences_and_exits_do_not_move_the_model():
    """Both are trained on a detached state: with other weights of theirs, every other gradient is the same."""
    rows, gradients = tokens(2, 65), []
    for scale in (1.0, 3.0):
        model = harsh("v5", "token", max_seq_len=64).train()
        heads = [model.confidence, *model.stack.bottom.heads]
        for head in heads:
            head.weight.data.mul_(scale)
        model(rows[:, :-1], rows)["loss"].backward()
        own = {id(p) for head in heads for p in head.parameters()}
        gradients.append([p.grad for p in model.parameters() if id(p) not in own])
    assert same_tensors(*gradients) and len(gradients[0]) > 50


def test_omega_is_a_quarter_of_the_positions_drawn_anew_for_each_purpose():
    a, rows = tiny("v5", None, "--horizon_frac", "0.25"), tokens(3, 66)
    omega = H.positions_for_horizon(a, rows, 0, 0)
    assert len(omega) == math.ceil(0.25 * 3 * 65) == 49 and len(set(omega.tolist())) == 49
    assert omega.min() >= 0 and omega.max() < 3 * 65 and omega.max() > 65
    assert not torch.equal(omega, H.positions_for_horizon(a, rows, 0, 1))
    assert not torch.equal(omega, H.positions_for_horizon(dataclasses.replace(a, seed=1), rows, 0, 0))


def test_the_share_of_a_process_makes_ddps_mean_the_mean_over_all():
    """Two processes of two rows each, as DDP averages them, against one process with the four rows."""
    model, H_ = harsh("v5", "token", max_seq_len=32, horizon_frac=0.3).train(), 8
    a, rows = model.args, tokens(4, 33, seed=5)
    whole = H.positions_for_horizon(a, rows, 0)
    alone = types.SimpleNamespace(num_processes=1)
    assert H.process_share(rows, whole, H_, alone) is None
    parts = [(rows[r::2], H.positions_for_horizon(a, rows[r::2], 0, rank=r, world=2)) for r in (0, 1)]
    counts = []
    record = types.SimpleNamespace(num_processes=2, reduce=lambda x, kind: counts.append(x) or x)
    for part in parts:
        H.process_share(*part, H_, record)
    mean = types.SimpleNamespace(num_processes=2, reduce=lambda x, kind: (counts[0] + counts[1]) / 2)
    expected, got = model(rows[:, :-1], rows, whole), []
    for part, omega in parts:
        got.append(model(part[:, :-1], part, omega, H.process_share(part, omega, H_, mean)))
    assert len(parts[0][1]) != len(parts[1][1])
    for name in ("horizon_loss", "conf", "lm_loss", "ce_5"):
        average = (got[0]["parts"][name] + got[1]["parts"][name]) / 2
        assert torch.allclose(average, expected["parts"][name], atol=1e-5), name


# ------------------------------------------------------------------------------- the author's architecture, made causal
def post_norm_by_hand(layer, x, allowed, memory=None, visible=None):
    """PyTorch's encoder (decoder) layer with norms after the sums, eight heads and ReLU."""
    assert layer.attn.heads == 8
    x = layer_norm(layer.norm1, x + attend(layer.attn, x, x, allowed))
    if memory is not None:
        x = layer_norm(layer.norm_cross, x + attend(layer.cross, x, memory, visible))
    hidden = apply(layer.up, x).clamp(min=0)
    return layer_norm(layer.norm2, x + apply(layer.down, hidden))


def gated_by_hand(module, x):
    """h += g_l (f_l(h) - h); the gates from the mean of the module's input up to each place."""
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    mean = torch.stack([x[: t + 1].mean(0) for t in range(len(x))])
    gates = apply(module.router[2], apply(module.router[0], mean).clamp(min=0)).sigmoid()
    for i, layer in enumerate(module.layers):
        x = x + gates[:, i : i + 1] * (post_norm_by_hand(layer, x, causal) - x)
    return x


def redrawn(module, std=0.3):
    torch.manual_seed(0)
    module.key = "m"
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, std)
    return module.double().eval()


def test_the_gated_stack_by_hand():
    module = redrawn(H.GatedStack(tiny("v5", None, "--dropout", "0.5"), 64))
    x = torch.randn(2, 20, 64, dtype=torch.float64)
    out, aux = None, {}
    with torch.no_grad():
        for name, part in module.named_modules():
            part.key = name
        out = module(x, None, aux)
    for row, expected in zip(x, out):
        assert torch.allclose(gated_by_hand(module, row), expected, atol=1e-10)
    assert len(module.layers) == len(aux["deltas"]) == 4 and torch.allclose(x + sum(aux["deltas"]), out, atol=1e-12)


def test_the_lattice_of_places_by_hand():
    """The first P positions alone; each mixes with itself and earlier ones by a softmax of its own row of weights."""
    module = redrawn(H.PlaceLattice(types.SimpleNamespace(d_model=16, lattice_paths=6), 64), 0.5)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        out, alone = module(x, None, {}), module(x[:, :4], None, {})
    assert torch.equal(out[:, 6:], x[:, 6:]) and not torch.equal(out[:, 5], x[:, 5])
    assert torch.allclose(alone, out[:, :4], atol=1e-12)  # a row shorter than the lattice
    for row, expected in zip(x, out):
        nodes = gelu(layer_norm(module.node[1], apply(module.node[0], row)))
        for t in range(6):
            scores = [float(wide(module.weights)[t, j].exp()) for j in range(t + 1)]
            mixed = sum(score / sum(scores) * nodes[j] for j, score in enumerate(scores))
            message = apply(module.edge[2], gelu(apply(module.edge[0], torch.cat([nodes[t], mixed]))))
            gate = apply(module.gate, torch.cat([row[t], message])).sigmoid()
            assert torch.allclose(gate * apply(module.out, message) + (1 - gate) * row[t], expected[t], atol=1e-10)


@pytest.mark.parametrize("variant", ["v5", "v6"])
def test_the_chunk_modes_by_hand(variant):
    """Encoder over each complete chunk, gated stack over chunk vectors, then the decoder: v5's reads its own chunk and
    the vector of the chunk before (norms after sums); v6's reads the row and all earlier vectors (norms before)."""
    model, C, T = harsh(variant, "chunk", chunk_size=8, max_seq_len=32).double(), 8, 29
    ids = tokens(1, T)
    x = wide(model.tokens.weight)[ids[0]] + wide(model.places.weight)[:T]
    everything = torch.ones(C, C, dtype=torch.bool)
    vectors = []
    for j in range(T // C):
        chunk = x[C * j : C * j + C]
        for layer in model.encoder:
            chunk = post_norm_by_hand(layer, chunk, everything)
        vectors.append(attend(model.pool, wide(model.query), chunk, torch.ones(1, C, dtype=torch.bool))[0])
    (lattice,) = model.stack.middle
    assert not len(model.stack.bottom.blocks) and not len(model.stack.top) and len(model.encoder) == 2
    memory = torch.cat([wide(model.begin), gated_by_hand(lattice, torch.stack(vectors))])
    chunk_of = torch.arange(T) // C
    allowed = torch.ones(T, T, dtype=torch.bool).tril()
    entry = torch.arange(len(memory)) - 1  # -1: the beginning, which is always there
    visible = entry < chunk_of[:, None]
    if variant == "v5":
        allowed &= chunk_of[:, None] == chunk_of
        visible &= (entry == -1) | (entry == chunk_of[:, None] - 1)
    x = x + wide(model.local.weight)[torch.arange(T) % C]
    for block in model.decoder:
        if variant == "v5":
            x = post_norm_by_hand(block, x, allowed, memory, visible)
            continue
        u = layer_norm(block.norm1, x)
        x = x + attend(block.attn, u, u, allowed)
        x = x + attend(block.cross, layer_norm(block.norm_cross, x), memory, visible)
        x = x + apply(block.down, gelu(apply(block.up, layer_norm(block.norm2, x))))
    with torch.no_grad():
        hidden = model.trunk(ids)[0][0]
        assert torch.allclose(hidden, layer_norm(model.norm, x), atol=1e-9)
        assert torch.allclose(model.logits(hidden), layer_norm(model.norm, x) @ wide(model.head.weight).T, atol=1e-8)


def published_lattice(D):
    """Parameters of the author's AdaptiveLatticeProcessor: ten of PyTorch's encoder layers and the task router."""
    with torch.device("meta"):
        layers = [torch.nn.TransformerEncoderLayer(D, nhead=8, batch_first=True) for _ in range(10)]
        return numbers([*layers, torch.nn.Linear(D, 256), torch.nn.Linear(256, 10)])


def published_places(D, P):
    """Parameters of the author's HyperLatticeBlock of v4.1."""
    with torch.device("meta"):
        linears = [torch.nn.Linear(a * D, D) for a in (1, 2, 1, 1, 2)]
        return numbers([*linears, torch.nn.LayerNorm(D)]) + P * P


def test_the_published_middles_have_the_published_parameters():
    """At the document's width: 55.3 million for ten encoder layers with their router, 4.1 million for v4.1's places."""
    for variant in ("v5", "v6", "v7_1_2_agile", "chaoslogic"):
        (middle,) = H.on_meta(H.parse(["--variant", variant, "--mode", "token"])).stack.middle
        assert H.count(middle) == published_lattice(768) == 55_339_274, variant
    (middle,) = H.on_meta(H.parse(["--variant", "v4_1"])).stack.middle
    assert H.count(middle) == published_places(768, 48) == 4_136_448
    for variant in H.VARIANTS:
        own, lighter = (H.on_meta(H.parse(["--variant", variant, "--middle", m])) for m in ("stack", "spine"))
        assert lighter.head is None and (own.head is None) == (variant == "v3_ultra"), variant
        assert (own.args.dropout, lighter.args.dropout) == (0.1, 0.0)


def test_what_the_author_drops():
    """In training: on each branch, on attention weights and in the FFN, but not on embeddings; in the lighter form
    on embeddings and not on branches."""
    rates = {"stack": 0.1, "spine": 0.0}
    for middle, expected in rates.items():
        assert tiny("v5", "token", "--middle", middle).dropout == expected
        model = harsh("v5", "token", "--middle", middle, dropout=0.5).train()
        x = torch.ones(4, 64, 64)
        assert torch.equal(model.drop(x), x) == (middle == "stack")
        block = model.stack.top[0]
        block.down.weight.data.zero_()
        block.down.bias.data.fill_(1.0)
        block.attn.out.weight.data.zero_()
        added = block(torch.zeros(4, 64, 64))  # what is left of a branch that adds 1 everywhere
        assert sorted(set(added.unique().tolist())) == ([0.0, 2.0] if middle == "stack" else [1.0])


def test_v5_and_v6_in_chunk_mode_are_two_networks():
    ids = tokens(1, 60)
    v5, v6 = (harsh(variant, "chunk") for variant in ("v5", "v6"))
    assert (v5(ids)["logits"] - v6(ids)["logits"]).abs().max() > 0.1
    changed = ids.clone()
    changed[0, 35] += 1  # of chunk 2: v5's chunk 4 reads the vector of chunk 3 alone, but that has read chunk 2
    assert (v5(changed)["logits"] - v5(ids)["logits"])[0, 48:].abs().max() > 1e-6


# of the lighter form the fast tests take those with a middle of its own, or a chunk mode
OWN = [(v, mode) for v, mode in FORMS if H.VARIANTS[v].published or mode == "chunk"]
EVERY_FORM = [(v, mode, "stack") for v, mode in [*FORMS, ("plain", "token")]] + [(*form, "spine") for form in OWN]
REST = [(*form, "spine") for form in [*FORMS, ("plain", "token")] if form not in OWN]


@pytest.mark.parametrize(
    "variant, mode, middle", [*EVERY_FORM, *(pytest.param(*form, marks=pytest.mark.slow) for form in REST)]
)
def test_every_suffix_and_every_cache_in_float64(variant, mode, middle):
    """Other tokens from position t on, for every t: nothing before t moves. Read by token or in uneven pieces, the
    hidden states are those of one pass."""
    model, T = harsh(variant, mode, "--middle", middle, max_seq_len=48, n_layers=4).double(), 48
    ids, other = tokens(1, T), tokens(1, T, seed=1)
    later = torch.arange(T) >= torch.arange(1, T)[:, None]  # a row for each suffix
    with torch.no_grad():
        out, moved = model(ids), model(torch.where(later, other, ids))
        for key in ("hidden", "logits", "horizon", "confidence"):
            if key in out:
                difference = (moved[key] - out[key]).abs().flatten(2).amax(-1)  # suffixes T
                assert difference[~later].max() <= 1e-12 and difference[later].max() > 1e-3, key
        for sizes in ((1,), (5, 1, 11, 2)):
            assert (H.cached(model, ids, sizes, model.new_state(1)) - out["hidden"]).abs().max() <= 1e-10


def test_the_share_of_the_token_is_what_it_says(monkeypatch):
    """A model whose h is its token, or the first token of its context, or a sum of both."""
    embedding = torch.nn.functional.one_hot(torch.arange(64), 64).double()
    for weights, expected in (((1, 0), 1.0), ((0, 1), 0.0), ((1, 1), 0.5), ((1, 2), 0.2)):
        trunk = lambda ids, w=weights: ((w[0] * embedding[ids] + w[1] * embedding[ids[:, :1]]), {})  # noqa: E731
        model = H.build_model(tiny("plain"))
        monkeypatch.setattr(model, "trunk", trunk)
        assert H.token_share(model) == pytest.approx(expected, abs=0.08)


HEARD = [*FORMS, ("plain", "token")]


@pytest.mark.parametrize("middle", ["stack", "spine"])
@pytest.mark.parametrize(
    "layers, forms",
    [(4, HEARD), (16, [("v8_2_crystalline", "token")]), pytest.param(16, HEARD, marks=pytest.mark.slow)],
)
def test_every_variant_hears_its_token_at_the_start(layers, forms, middle):
    """In both forms of the architecture; v8.2 once started with a gain and a mixer under which it did not."""
    for variant, mode in forms:
        model = H.build_model(tiny(variant, mode, "--n_layers", str(layers), "--middle", middle))
        assert H.token_share(model) > 0.7, (variant, mode)
        assert model.training  # as it was


@pytest.mark.slow
@pytest.mark.parametrize("middle", ["stack", "spine"])
def test_every_arm_of_the_evidence_hears_its_token_at_the_start(middle):
    env = os.environ | {"DRY": "1", "PHASES": "grid", "RATES": "1e-3", "ARMS": "all"}
    out = subprocess.run(["bash", "scripts/hst_evidence.sh"], cwd=ROOT, env=env, capture_output=True, text=True).stdout
    arms = [H.parse([*line.split()[2:], "--middle", middle]) for line in out.splitlines()]
    assert len(arms) == 13
    shares = {f"{a.variant} {a.off}": H.token_share(H.build_model(a)) for a in arms}
    assert min(shares.values()) > 0.6, shares


def test_a_start_that_buries_the_token_is_refused(tmp_path, monkeypatch):
    words = ["--variant", "v8_2", "--test", *SHORT, "--max_steps", "1", "--save_dir", str(tmp_path)]
    asked = H.main([*words, "--middle", "spine", "--old_start"])
    assert asked["token_share"] < 0.5  # the start of the recorded runs, which their sweep asks for
    monkeypatch.setattr(H.Hebbian, "reset", lambda self: self.gain.fill_(0.1))
    for middle in ("spine", "stack"):
        with pytest.raises(core.Failure, match="of the first h is context") as failure:
            H.main([*words, "--overwrite", "--middle", middle])
        assert failure.value.code == core.CHECK_FAILED


def test_a_checkpoint_from_before_there_was_a_choice_is_of_the_lighter_form(tmp_path):
    H.main(["--variant", "v5", "--test", *SHORT, "--max_steps", "1", "--middle", "spine", "--save_dir", str(tmp_path)])
    state = core.load_checkpoint(tmp_path / "v5_final.pt")
    del state["manifest"]["flags"]["middle"]
    core.save_checkpoint(tmp_path / "old.pt", state)
    ask = ["--generate", "abcd", "--max_new_tokens", "9", "--device", "cpu", "--ckpt"]
    texts = [H.main([*ask, str(tmp_path / name)])["ids"] for name in ("v5_final.pt", "old.pt")]
    assert texts[0] == texts[1]


# ----------------------------------------------------------------------------------------------------------- data
def test_the_chain_is_the_recurrence_and_has_its_entropy():
    rows = H.chain_rows(200, 65, core.generator(0, "x"))
    steps = (rows[:, 1:] - 7 * rows[:, :-1] - 3) % 64
    allowed = torch.tensor([0, 13, 26, 39])
    assert torch.isin(steps, allowed).all()
    shares = torch.stack([(steps == s).float().mean() for s in allowed])
    assert (shares - 0.25).abs().max() < 0.02 and len(rows.unique()) == 64
    assert torch.equal(rows, H.chain_rows(200, 65, core.generator(0, "x")))


class Listed:
    """A streamed set without a state of its own."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter([{"text": f"document {i} " * (1 + i % 5)} for i in range(self.n)])


@pytest.mark.parametrize("kind", ["listed", "hub"])
def test_a_stream_continues_exactly(kind, tmp_path):
    """Packing with stride S, shuffle windows, several epochs; at every row, a reloaded stream goes on alike."""
    tokenizer = core.load_tokenizer("byte")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(json.dumps(r) for r in Listed(23)))

    def fresh():
        import datasets

        source = (
            Listed(23)
            if kind == "listed"
            else datasets.load_dataset(str(folder), split="train", streaming=True, cache_dir=str(tmp_path / "cache"))
        )
        return H.Documents(source, 3, tokenizer, 32, 0, window=6)

    stream = fresh()
    rows, states = [], []
    for i in range(60):
        states.append(json.loads(json.dumps(stream.state())))
        rows.append(stream.take(i, 1))
    assert stream.at["epoch"] >= 1 and stream.at["documents"] > 20
    assert all(torch.equal(a[:, -1], b[:, 0]) for a, b in itertools.pairwise(rows))  # stride S
    for at in range(0, 60, 7):
        again = fresh()
        again.load(states[at])
        assert all(torch.equal(again.take(i, 1), rows[i]) for i in range(at, 60))
    text = tokenizer.decode(torch.cat([r[0, :-1] for r in rows]).tolist())
    seen = [int(x) for x in re.findall(r"document (\d+) .*?<eos>", text)]
    assert sorted(seen[:20]) == list(range(3, 23)) and seen[:20] != sorted(seen[:20])  # the first 3 are held out
    assert set(seen[:6]) == set(range(3, 9)) and seen[20:40] != seen[:20]


# ----------------------------------------------------------------------------------------------------------- recall
def recall():
    return importlib.import_module("scripts.hst_recall")


@pytest.mark.parametrize("task", ["any", "spine", "off"])
def test_a_recall_row_holds_what_it_asks_for(task):
    R, spine = recall(), set(H.spine(256))
    ids, labels, distance = R.make_rows(task, 20, 256, core.generator(0))
    without = R.make_rows(task, 20, 256, core.generator(0), absent=True)[0]
    assert (ids == R.FACT).sum() == (labels >= 0).sum() == (ids == R.ASK).sum() > 40 and not (without == R.FACT).any()
    for row, at in (labels >= 0).nonzero().tolist():
        key, fact = ids[row, at - 1], at - 2 - int(distance[row, at])
        assert ids[row, at - 2] == R.ASK and 2 <= key < 18 <= labels[row, at] < 34
        assert ids[row, fact : fact + 3].tolist() == [R.FACT, key, labels[row, at]] and fact + 3 <= at - 2
        if task != "any":
            assert (fact + 2 in spine) == (task == "spine") and at >= 192
    if task == "any":
        assert set(distance.unique().tolist()) == {0, 8, 16, 32, 64, 128}


def test_recall_is_scored_by_distance_and_against_chance():
    """A model that looks the key up is always right with the fact in its row; without, it says one thing: chance."""
    R = recall()

    class Reader(torch.nn.Module):
        tokens = torch.nn.Embedding(1, 1)

        def forward(self, ids):
            logits = torch.zeros(1, ids.shape[1], 64)
            for t in range(2, ids.shape[1]):
                facts = [i for i in range(t - 1) if ids[0, i] == R.FACT and ids[0, i + 1] == ids[0, t]]
                logits[0, t, int(ids[0, facts[0] + 2]) if facts else R.VALUES] = 1
            return {"logits": logits}

    a = types.SimpleNamespace(task="any", eval_rows=60, max_seq_len=128)
    known, unknown = (R.accuracy(Reader(), a, absent) for absent in (False, True))
    assert set(known) == {"all", "8", "16", "32", "64"} and all(score["mean"] == 1 for score in known.values())
    assert unknown["all"]["lo"] < 1 / 16 < unknown["all"]["hi"] and unknown["all"]["n"] == known["all"]["n"] >= 200


@pytest.mark.slow
def test_recall_runs_and_is_paired_by_seed(tmp_path):
    words = ["--test", "--variant", "v4_1", "--max_steps", "3", "--task", "spine", "--save_dir", str(tmp_path)]
    result = recall().main(words)
    assert result["accuracy"]["all"]["n"] == result["absent"]["all"]["n"] and len(result["curve"]) == 1
    assert result["manifest"]["flags"]["task"] == "spine" and result["token_share"] > 0.5


# ------------------------------------------------------------------------------------------------------------ runs
SHORT = [
    "--max_steps",
    "10",
    "--save_every",
    "5",
    "--eval_every",
    "5",
    "--log_every",
    "2",
    "--eval_rows",
    "4",
    "--self_check",
    "false",
    "--batch_size",
    "4",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hst") / "v6"
    return directory, H.main(["--variant", "v6", "--test", "--save_dir", str(directory)])


def test_files_keys_and_learning(finished):
    directory, result = finished
    assert json.loads((directory / "hst_results.json").read_text()) == json.loads(json.dumps(result))
    assert {p.name for p in directory.glob("*.pt")} == {"ckpt_step_100.pt", "ckpt_step_200.pt", "v6_final.pt"}
    keys = "model optimizer_state_dict scaler_state_dict rng_state loop step data_state manifest variant mode version"
    for step in (100, 200):
        state = torch.load(directory / f"ckpt_step_{step}.pt", weights_only=True)
        assert set(keys.split()) <= set(state) and state["step"] == step and state["variant"] == "v6"
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    wanted = (
        "step loss lm_loss ppl horizon_loss horizon_by_offset confidence conf lr grad_norm scale "
        "skipped tokens tokens_per_s"
    )
    logged = [r for r in rows if "loss" in r]
    assert len(logged) == 10 and all(set(wanted.split()) <= set(r) for r in logged)
    assert logged[-1]["tokens"] == 200 * 8 * 64 == result["tokens"] and len(logged[0]["horizon_by_offset"]) == 7
    tail = result["tail"]
    assert 1.33 <= tail["lm_loss"] <= 1.70 and tail["ce_2"] < tail["ce_3"] < tail["ce_4"]
    assert result["final"]["loss"] >= 1.33 and result["causality_max_abs_diff"] <= 1e-5 and result["self_check"]
    assert result["speculative"]["equal_to_plain"] and 0 <= result["speculative"]["acceptance_rate"] <= 1
    card = (directory / "README.md").read_text()
    loss, line = f"| validation loss | {result['final']['loss']:.4g} |", f"--ckpt {directory / 'v6_final.pt'}"
    assert "# HST v6 (chunk mode)" in card and loss in card and line in card and "docs/hst.md" in card
    assert result["final"]["loss_interval"]["n"] == 64 and result["data"]["entropy_floor_nats"] == math.log(4)
    assert result["token_share"] > 0.5 and result["final"]["by_depth"] == []  # his chunk mode has no bottom stack


@pytest.mark.slow
@pytest.mark.parametrize("variant, mode", [*FORMS, ("plain", "token")])
def test_every_form_learns_and_never_beats_the_entropy(variant, mode, tmp_path):
    result = H.main(["--variant", variant, "--mode", mode, "--test", "--save_dir", str(tmp_path)])
    tail = result["tail"]
    assert 1.33 <= tail["lm_loss"] <= 1.70 and result["final"]["loss"] >= 1.33
    if variant != "plain":
        assert tail["ce_2"] < tail["ce_3"] < tail["ce_4"] and tail["ce_2"] > 2.7


def test_lines_on_the_console(capsys, tmp_path):
    H.main(["--variant", "v8_2_crystalline", "--test", *SHORT, "--save_dir", str(tmp_path / "a")])
    out = capsys.readouterr().out
    for pattern in (
        r"^Device: cpu$",
        r"^\[1/5\] Loading tokenizer...$",
        r"^\[2/5\] Building HST v8_2_crystalline model...$",
        r"^Model: \d\.\dM params$",
        r"^Trainable: \d\.\dM params$",
        r"^\[3/5\] Setting up optimizer...$",
        r"^Using standard AdamW$",
        r"^\[4/5\] Loading dataset...$",
        r"^\[5/5\] Starting training \(Max Steps: 10, Accumulation: 1\)...$",
        r"^  Checkpoint saved at step 5$",
        r"^Step      2 \| Loss \d\.\d{4} \| LM \d\.\d{4} \| Horizon \d\.\d{4} \| Uncertainty 0\.\d{3} "
        r"\| LR \d\.\d\de-0\d \| \d+ tok/s$",
    ):
        assert re.search(pattern, out, re.M), pattern
    places = [out.index(f"[{i}/5]") for i in range(1, 6)]
    assert places == sorted(places)


def end_of(directory, variant, step=10):
    """What a run has come to, without what a stop may change: seconds, the place in the log, the manifest."""
    state = torch.load(directory / f"{variant}_final.pt", weights_only=True)
    assert state["step"] == step
    for name in ("manifest", "log_size"):
        del state[name]
    del state["history"]["val_seconds"], state["loop"]["spent"], state["loop"]["peak"]
    return state


def stop_in_update(monkeypatch, n):
    """SIGTERM arrives in update `n`, which is finished."""
    update = core.Loop.update

    def interrupted(self, *args, **kwargs):
        if self.step == n - 1:
            signal.raise_signal(signal.SIGTERM)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(core.Loop, "update", interrupted)


# the fast tests hold a form with a memory of its own and the control, the slow ones every other form
INTERRUPTED = [("v8_2_crystalline", "token"), ("plain", "token")]


@pytest.mark.parametrize(
    "variant, mode",
    [*INTERRUPTED, *(pytest.param(*form, marks=pytest.mark.slow) for form in FORMS if form not in INTERRUPTED)],
)
def test_an_interrupted_run_equals_the_uninterrupted_one(variant, mode, tmp_path, monkeypatch):
    """Bitwise: weights, moments, noise, history; the interruption falls between two checkpoints and two log lines."""
    flags = ["--variant", variant, "--mode", mode, "--test", *SHORT, "--dropout", "0.1", "--grad_accum", "2"]
    whole = H.main([*flags, "--save_dir", str(tmp_path / "a")])
    with monkeypatch.context() as patch:
        stop_in_update(patch, 7)
        with pytest.raises(core.Failure, match="interrupted at step 7") as failure:
            H.main([*flags, "--save_dir", str(tmp_path / "b")])
    assert failure.value.code == 143 and not list((tmp_path / "b").glob("*_final.pt"))
    assert [p.name for p in (tmp_path / "b").glob("*interrupt*")] == [f"{variant}_interrupt_step_7.pt"]
    resumed = H.main([*flags, "--save_dir", str(tmp_path / "b"), "--resume", "auto"])
    assert same_tensors(end_of(tmp_path / "a", variant), end_of(tmp_path / "b", variant))
    assert resumed["final"] == whole["final"] and resumed["tail"] == whole["tail"]


def test_the_moments_of_the_8_bit_optimizer_come_back(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    flags = ["--variant", "v4_unified", "--test", *SHORT, "--optim", "adamw8bit"]
    H.main([*flags, "--save_dir", str(tmp_path / "a")])
    with monkeypatch.context() as patch:
        stop_in_update(patch, 7)
        with pytest.raises(core.Failure, match="interrupted"):
            H.main([*flags, "--save_dir", str(tmp_path / "b")])
    H.main([*flags, "--save_dir", str(tmp_path / "b"), "--resume"])
    a, b = (end_of(tmp_path / d, "v4_unified") for d in "ab")
    assert same_tensors(a, b)
    moments = {t.dtype for t in tensors_of(a["optimizer_state_dict"])}
    assert {torch.uint8, torch.float32} <= moments  # matrices in 8 bits, the embedding and small ones in 32


def tensors_of(state):
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


def jsonl_folder(tmp_path, n=80):
    folder = tmp_path / "set"
    folder.mkdir()
    text = "the quick brown fox jumps over the lazy dog and runs away from it "
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{i} " + text * (1 + i % 4)}) for i in range(n)))
    where = ["--dataset", str(folder), "--dataset_config", "", "--data", ""]
    return [*where, "--tokenizer", "byte", "--vocab_size", "264"]


def test_resume_from_a_checkpoint_of_a_streamed_set(tmp_path, monkeypatch):
    flags = ["--variant", "v3_ultra", "--test", *SHORT, *jsonl_folder(tmp_path)]
    H.main([*flags, "--save_dir", str(tmp_path / "a")])
    stop_in_update(monkeypatch, 5)
    with pytest.raises(core.Failure):
        H.main([*flags, "--save_dir", str(tmp_path / "b")])
    monkeypatch.undo()
    for path in (tmp_path / "b").glob("*interrupt*"):
        path.unlink()  # what is left is the periodic checkpoint
    H.main([*flags, "--save_dir", str(tmp_path / "b"), "--resume"])
    a, b = (end_of(tmp_path / d, "v3_ultra") for d in "ab")
    assert same_tensors(a, b) and a["data_state"]["documents"] > 5


def test_the_loss_scaler_is_resumed(tmp_path, monkeypatch):
    """A scaler on the CPU whose scale grows every second update, with one overflow that makes it skip."""
    real, grown = core.engine, []

    def engine(args):
        accelerator = real(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
        monkeypatch.setattr(accelerator, "native_amp", True, raising=False)
        monkeypatch.setattr(accelerator, "autocast", lambda *a, **k: torch.autocast("cpu", enabled=False))
        grown.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(core, "engine", engine)
    monkeypatch.setattr(
        "accelerate.accelerator.get_mixed_precision_context_manager",
        lambda *a, **k: torch.autocast("cpu", enabled=False),
    )
    flags = ["--variant", "v5", "--test", *SHORT]
    whole = H.main([*flags, "--save_dir", str(tmp_path / "a")])
    with monkeypatch.context() as patch:
        stop_in_update(patch, 7)
        with pytest.raises(core.Failure, match="interrupted"):
            H.main([*flags, "--save_dir", str(tmp_path / "b")])
    resumed = H.main([*flags, "--save_dir", str(tmp_path / "b"), "--resume"])
    a, b = (end_of(tmp_path / d, "v5") for d in "ab")
    assert a["scaler_state_dict"]["scale"] == 1024 * 2**5 and same_tensors(a, b) and resumed["final"] == whole["final"]


def fingerprints(directory):
    """Every file of a run by content; the lock and who holds it aside."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name not in (".lock", ".holder")]
    return {p.name: core.digest(p) for p in paths}


def test_a_finished_run_is_returned_unchanged_or_refused_or_made_longer(tmp_path, capsys):
    words = ["--variant", "v3_ultra", "--test", *SHORT, "--save_dir", str(tmp_path)]
    result = H.main(words)
    before = fingerprints(tmp_path)
    capsys.readouterr()
    again = H.main([*words, "--resume", "auto", "--log_every", "3"])
    assert again == json.loads(json.dumps(result)) and fingerprints(tmp_path) == before
    assert "TRAINING COMPLETE: validation loss" in capsys.readouterr().out
    for change, named in (("--lr 0.5", "lr"), ("--max_steps 9", "max_steps"), ("--self_check true", "self_check")):
        with pytest.raises(core.Failure, match=f"flags differ.*{named}") as failure:
            H.main([*words, "--resume", "auto", *change.split()])
        assert failure.value.code == core.BAD_INPUT and fingerprints(tmp_path) == before
    longer = H.main([*words, "--resume", "auto", "--max_steps", "14"])
    assert longer["steps"] == 14 and longer["tokens"] == 14 * 4 * 64 and len(longer["manifest"]["segments"]) == 2
    steps = [step for step, _ in longer["history"]["val_loss"]]
    logged = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 14] and logged == [2, 4, 5, 6, 8, 10, 10, 12, 14, 14]


def test_a_run_killed_before_its_result_ends_alike(tmp_path):
    """Between the last checkpoint and the result file: its end is made again, and nothing stands twice."""
    words = ["--variant", "v6", "--test", *SHORT, "--save_dir", str(tmp_path)]
    whole = H.main(words)
    rows = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "hst_results.json").unlink()
    again = H.main([*words, "--resume"])
    assert (tmp_path / "log.jsonl").read_text() == rows
    for key in "final tail speculative tokens steps parameters".split():
        assert again[key] == whole[key], key
    assert again["history"]["val_loss"] == whole["history"]["val_loss"]


def test_other_text_under_the_same_name_is_refused_on_resume(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("words of a text that is long enough to be read\n" * 60)
    data = ["--data", str(tmp_path / "text.txt"), "--save_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        stop_in_update(patch, 3)
        with pytest.raises(core.Failure, match="interrupted at step 3"):
            H.main(["--variant", "v3_ultra", "--test", *SHORT, *data])
    before = fingerprints(tmp_path / "run")
    (tmp_path / "text.txt").write_text("words of a text that is long enough to be new\n" * 60)
    with pytest.raises(core.Failure, match="data changed, not what the run began with") as failure:
        H.main(["--variant", "v3_ultra", "--test", *SHORT, *data, "--resume", "auto"])
    assert failure.value.code == core.BAD_INPUT and fingerprints(tmp_path / "run") == before


def test_floors_are_of_the_training_rows_and_the_scored_positions(tmp_path):
    """A text of one repeated line: a trigram table knows almost all of it; counted here by a dictionary, unigrams."""
    (tmp_path / "text.txt").write_text("words of a text that is long enough to be read\n" * 60)
    words = ["--variant", "v3", "--test", *SHORT, "--max_steps", "2", "--data", str(tmp_path / "text.txt")]
    result = H.main([*words, "--save_dir", str(tmp_path / "run")])
    floors, first = result["floors"], json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["depth"] == 2 and first["exit_loss"] > 0  # token mode has a bottom stack; in training all of it runs
    assert floors["trigram"] < floors["bigram"] < floors["unigram"] < math.log(264)
    data = H.load_data(H.parse(words), core.load_tokenizer("byte"))
    counts = collections.Counter(data.train.flatten().tolist())
    total, kinds = sum(counts.values()), len(counts)
    scored = data.validation[:, 1:].flatten().tolist()
    nats = [-math.log((counts[token] + kinds / 264) / (total + kinds)) for token in scored]
    assert floors["unigram"] == pytest.approx(sum(nats) / len(nats), rel=1e-6)


def test_evaluation_and_saving_are_not_training_time(tmp_path, monkeypatch):
    """Clocks that move only where they are told to: an update takes 1 s of wall and 2 s of CPU time, an evaluation 100
    of each. The budget and its schedule count CPU time here, the result has both, and cadence changes neither."""
    now = {"wall": 0.0, "cpu": 0.0}
    update, evaluate = core.Loop.update, H.evaluate

    def passes(result, wall, cpu):
        now["wall"], now["cpu"] = now["wall"] + wall, now["cpu"] + cpu
        return result

    monkeypatch.setattr(core, "clock", lambda: now["wall"])
    monkeypatch.setattr(core.time, "process_time", lambda: now["cpu"])
    monkeypatch.setattr(core.Loop, "update", lambda *a, **k: passes(update(*a, **k), 1, 2))
    monkeypatch.setattr(H, "evaluate", lambda *a: passes(evaluate(*a), 100, 100))
    words = ["--variant", "plain", "--test", *SHORT, "--eval_rows", "1", "--save_every", "3"]
    for every, points in (("0", [10]), ("1", list(range(1, 11)))):
        result = H.main([*words, "--eval_every", every, "--save_dir", str(tmp_path / every)])
        assert (result["train_seconds"], result["train_cpu_seconds"]) == (10, 20)
        assert result["tokens_per_s"] == 10 * 4 * 64 / 10
        assert result["history"]["val_seconds"] == [[step, 2.0 * step] for step in points]
        rows = [json.loads(line) for line in (tmp_path / every / "log.jsonl").read_text().splitlines()]
        assert all(row["tokens_per_s"] == 4 * 64 for row in rows if "loss" in row)
    timed = H.main([*words, "--max_steps", "100", "--max_seconds", "8", "--save_dir", str(tmp_path / "timed")])
    assert (timed["steps"], timed["train_seconds"], timed["train_cpu_seconds"]) == (4, 4, 8)


def test_the_loop_clips_at_the_flag_and_follows_the_schedule(tmp_path, monkeypatch):
    """What acts in an update: the largest norm that is left of the gradient, and the rate."""
    seen, update = [], core.Loop.update

    def watched(self, *args, **kwargs):
        clip = self.accelerator.clip_grad_norm_

        def noted(parameters, norm):
            seen.append([norm, self.optimizer.param_groups[0]["lr"]])
            return clip(parameters, norm)

        with monkeypatch.context() as context:
            context.setattr(self.accelerator, "clip_grad_norm_", noted)
            return update(self, *args, **kwargs)

    monkeypatch.setattr(core.Loop, "update", watched)
    words = ["--variant", "plain", "--test", *SHORT, "--grad_clip", "0.125", "--warmup", "4", "--lr", "1e-2"]
    H.main([*words, "--save_dir", str(tmp_path)])
    rates = [0.0025, 0.005, 0.0075, 0.01, 0.01, *(0.01 * (1 - done / 10) / 0.6 for done in range(5, 10))]
    assert seen == [[0.125, pytest.approx(rate)] for rate in rates]


def test_the_budget_is_cpu_time_on_a_cpu_alone():
    for kind, seconds in (("cpu", 2.0), ("cuda", 1.0)):
        accelerator = types.SimpleNamespace(device=torch.device(kind))
        assert H.budget_seconds(types.SimpleNamespace(accelerator=accelerator, seconds=1.0, cpu_seconds=2.0)) == seconds


def test_cadence_is_inert_and_a_repeat_is_equal(tmp_path):
    flags = ["--variant", "v7_1_2_agile", "--test", *SHORT]
    H.main([*flags, "--save_dir", str(tmp_path / "a")])
    H.main([*flags, "--save_dir", str(tmp_path / "b"), "--eval_every", "3", "--log_every", "5", "--save_every", "4"])
    H.main([*flags, "--save_dir", str(tmp_path / "c"), "--seed", "1"])
    a, b, c = (end_of(tmp_path / d, "v7_1_2_agile")["model"] for d in "abc")
    assert same_tensors(a, b) and not same_tensors(a, c)


def test_a_run_that_died_before_its_first_checkpoint_starts_its_log_anew(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 999}\n')
    H.main(["--variant", "v3", "--test", *SHORT, "--save_dir", str(tmp_path), "--resume", "auto"])
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["step"] == 2


def test_keep_prunes_periodic_files_only(tmp_path, monkeypatch):
    stop_in_update(monkeypatch, 9)
    with pytest.raises(core.Failure):
        H.main(["--variant", "v3", "--test", *SHORT, "--save_every", "2", "--keep", "2", "--save_dir", str(tmp_path)])
    left = {p.name for p in tmp_path.glob("*.pt")}
    assert left == {"ckpt_step_6.pt", "ckpt_step_8.pt", "v3_ultra_interrupt_step_9.pt"}


def test_a_failed_write_leaves_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(core.Failure) as failure:
        H.main(["--variant", "v3_ultra", "--test", *SHORT, "--save_dir", str(tmp_path)])
    assert failure.value.code == core.DISK and not list(tmp_path.glob("*.pt*"))


@pytest.mark.parametrize("fused", [True, False])
def test_divergence_saves_and_exits_3(fused, tmp_path, monkeypatch):
    """One limit, whether the optimizer skips by itself or not: 20 updates in a row, none of which moved a weight."""
    losses, adamw = H.HST.losses, torch.optim.AdamW
    monkeypatch.setattr(H.HST, "losses", lambda self, *a: (out := losses(self, *a)) | {"loss": out["loss"] * math.inf})
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **settings: adamw(groups, **settings | {"fused": fused}))
    words = ["--variant", "v3_ultra", "--test", *SHORT, "--max_steps", "40", "--save_dir", str(tmp_path)]
    with pytest.raises(core.Failure, match=r"not finite 20 times in a row.*v3_ultra_nonfinite\.pt") as failure:
        H.main(words)
    assert failure.value.code == core.DIVERGED and not (tmp_path / "hst_results.json").exists()
    kept = core.load_checkpoint(tmp_path / "v3_ultra_nonfinite.pt")
    assert kept["step"] == 20 and same_tensors(kept["model"], dict(H.build_model(H.parse(words)).state_dict()))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows if "loss" in row] == list(range(2, 20, 2))


def test_fewer_than_twenty_are_skipped_and_the_schedule_goes_on(tmp_path, monkeypatch):
    """A skipped update is a step like any other: of the schedule, and of the number of updates."""
    losses, rates = H.HST.losses, []
    rate = H.rate

    def one_bad(self, *a):
        out = losses(self, *a)
        return out | {"loss": out["loss"] * (math.nan if self.training and len(rates) == 4 else 1.0)}

    monkeypatch.setattr(H.HST, "losses", one_bad)
    monkeypatch.setattr(H, "rate", lambda *a: rates.append(rate(*a)) or rates[-1])
    words = ["--variant", "v3_ultra", "--test", *SHORT, "--save_dir", str(tmp_path)]
    result = H.main(words)
    assert result["nonfinite_steps"] == result["skipped"] == 1 and result["steps"] == 10
    assert rates == [rate(H.parse(words), step, 0.0) for step in range(10)]


def test_ctrl_c_saves_and_exits_130(tmp_path):
    words = [sys.executable, "hst_train.py", "--test", "--variant", "v3", "--max_steps", "100000", "--log_every", "1"]
    process = subprocess.Popen(
        [*words, "--save_dir", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    )
    for line in process.stdout:
        if line.startswith("Step      3"):
            process.send_signal(signal.SIGINT)
            break
    out, _ = process.communicate(timeout=60)
    files = [p.name for p in tmp_path.glob("*.pt")]
    assert process.returncode == 130 and "!! Training INTERRUPTED by User !!" in out and len(files) == 1
    assert re.fullmatch(r"v3_ultra_interrupt_step_\d+.pt", files[0])
    assert core.load_checkpoint(tmp_path / files[0])["step"] >= 3


def test_a_process_without_a_row_takes_part_in_the_evaluation(monkeypatch):
    a, gathered = tiny("v3_ultra", None, "--eval_rows", "1"), []
    model, data = H.build_model(a), H.load_data(a, None)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: gathered.extend(mine) or list(gathered))
    found = [
        H.evaluate(
            model,
            data,
            a,
            types.SimpleNamespace(process_index=rank, num_processes=2, device="cpu", autocast=contextlib.nullcontext),
        )
        for rank in (0, 1)
    ]
    assert found[0] == found[1] and len(found[0]["rows"]) == 1 and found[0]["loss"] > 3


def test_generate_on_a_checkpoint(finished, capsys):
    checkpoint = str(finished[0] / "v6_final.pt")
    results = [
        H.main(["--generate", "abcd", "--ckpt", checkpoint, "--max_new_tokens", "80", "--device", "cpu", *flags])
        for flags in ([], ["--no_cache"], ["--speculative"])
    ]
    out = capsys.readouterr().out
    assert results[0]["ids"] == results[1]["ids"] == results[2]["ids"] and len(results[0]["ids"]) == 84
    assert re.search(r"Tokens Generated: 80 \| Total Time: \d+\.\d\d s \| Average TPS: \d+\.\d", out)
    keys = "tokens_generated accepted_tokens drafted_tokens acceptance_rate forwards effective_speedup"
    assert set(keys.split()) <= set(results[2]) and "The context is full at 64 tokens" in out
    ask = ["--generate", "abcd", "--ckpt", checkpoint, "--temperature", "1", "--top_k", "20", "--top_p", "0.9"]
    sampled = [H.main([*ask, "--device", "cpu", *flags])["ids"] for flags in ([], [], ["--seed", "1"])]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_from_text_with_an_injected_file(tmp_path, capsys):
    flags = ["--variant", "v7_1_2", "--mode", "chunk", "--test", *SHORT]
    (tmp_path / "text.txt").write_text("words of a text that is long enough to be read\n" * 60)
    H.main([*flags, "--data", str(tmp_path / "text.txt"), "--save_dir", str(tmp_path / "r")])
    ask = ["--generate", "words of", "--ckpt", str(tmp_path / "r" / "v7_1_2_agile_final.pt"), "--device", "cpu"]
    plain = H.main(ask)
    told = H.main([*ask, "--inject_file", str(tmp_path / "text.txt"), "--inject_at", "0", "--speculative"])
    assert plain["text"].startswith("words of") and len(told["ids"]) == 8 + 128


# -------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--variant", "v9"], ", ".join(H.VARIANTS)),
        (["--variant", "all"], "all"),
        (["--d_model", "512", "--n_heads", "12"], "not divisible"),
        (["--mode", "chunk", "--variant", "v3_ultra"], "token mode only"),
        (["--n_layers", "1"], "n_layers"),
        (["--speculative", "--variant", "v8_2_crystalline", "--generate", "x"], "v6 and v7_1_2_agile"),
        (["--chunk_size", "100", "--variant", "v6"], "chunk_size"),
        (["--horizon", "6", "--variant", "v5"], "power of two"),
        (["--horizon", "2", "--variant", "v6"], "power of two"),
        (["--generate", "x", "--ckpt", ""], "--ckpt"),
        (["--data", "synthetic", "--vocab_size", "10"], "64 symbols"),
        (["--off", "hebbian", "--variant", "v5"], "--off"),
        (["--inject_file", "x", "--variant", "v6"], "v7_1_2_agile"),
        (["--top_p", "0"], "top_p"),
        (["--lattice_paths", "1", "--variant", "v4_1"], "--lattice_paths"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_bad_flags(flags, words):
    with pytest.raises(core.Failure, match=re.escape(words)) as failure:
        H.main(flags)
    assert failure.value.code == core.BAD_INPUT and "\n" not in str(failure.value)


def test_bad_sources_and_checkpoints(finished, tmp_path):
    def refused(words, *flags):
        with pytest.raises(core.Failure, match=words) as failure:
            H.main([*flags, "--save_dir", str(tmp_path / "r"), "--device", "cpu"])
        assert failure.value.code == core.BAD_INPUT

    (tmp_path / "empty.txt").write_text("")
    small = ["--variant", "v3_ultra", "--test", "--overwrite"]
    refused("0 tokens", *small, "--data", str(tmp_path / "empty.txt"))
    refused("below the tokenizer", *small, "--data", "local", "--vocab_size", "100")
    refused("instead", "--variant", "v3_ultra", *["--d_model", "64", "--overwrite"])  # the hub, which is not there
    refused("instead|hub", *small, "--data", "", "--tokenizer", "byte", "--vocab_size", "264")
    final = str(finished[0] / "v6_final.pt")
    refused("variant v6 -> v5.*mode chunk -> token", "--variant", "v5", "--test", "--resume", final)
    refused("d_model 64 -> 128", "--variant", "v6", "--test", "--d_model", "128", "--resume", final)
    refused("65 tokens|100 tokens", "--generate", "x" * 100, "--ckpt", final)
    refused("No such file", "--generate", "x", "--ckpt", str(tmp_path / "none.pt"))


def test_the_allocator_is_set_before_torch():
    code = (
        "import os, runpy, sys\nsys.argv = ['hst_train.py', '--list-variants']\n"
        "class Watch:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': sys.exit(f\"AT {os.environ.get('PYTORCH_CUDA_ALLOC_CONF')}\")\n"
        "sys.meta_path.insert(0, Watch())\nrunpy.run_path('hst_train.py', run_name='__main__')\n"
    )
    for value, expected in ((None, "expandable_segments:True"), ("max_split_size_mb:64", "max_split_size_mb:64")):
        env = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k} | (
            {"PYTORCH_CUDA_ALLOC_CONF": value} if value else {}
        )
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert done.stderr == f"AT {expected}\n"


def test_the_documented_allocator_string_is_left_and_warned_of(tmp_path, capsys, monkeypatch):
    documented = "backend:cudaMallocAsync,expandable_segments:True,max_split_size_mb:32"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", documented)
    H.main(["--variant", "v3", "--test", *SHORT, "--max_steps", "1", "--save_dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("WARNING") == 1 and "Allocator: backend:cudaMallocAsync" in out


# ---------------------------------------------------------------------------------------------------------- sweep
def write_result(root, name, variant, loss, seed=0, parameters=1000, tokens=64, **flags):
    """A result file of that variant in a directory whose name need not say so."""
    (root / name).mkdir(parents=True)
    result = {"variant": variant, "seed": seed, "parameters": parameters, "tokens": tokens, "final": {"loss": loss}}
    result |= {"manifest": {"flags": {"lr": 0.1} | flags}, "data": {"source": "x"}}
    (root / name / "hst_results.json").write_text(json.dumps(result))


def compare(root):
    return claims.main(["hst", str(root)])


def test_the_comparison_is_paired_by_seed_and_fair(tmp_path, capsys):
    for seed, gain in enumerate((0.1, 0.2, 0.3)):
        write_result(tmp_path, f"plain_s{seed}", "plain", 5.0, seed)
        write_result(tmp_path, f"v6_s{seed}", "v6", 5.0 - gain, seed, 1005)
    write_result(tmp_path, "plain_time_s0", "plain", 4.0, max_seconds=90)
    write_result(tmp_path, "v6_time_s0", "v6", 4.5, tokens=99, max_seconds=90)
    gains = compare(tmp_path)
    assert gains["v6 tokens"] == pytest.approx([0.1, 0.2, 0.3]) and gains["v6 seconds"] == [-0.5]
    half = 4.303 * 0.1 / math.sqrt(3)
    assert f"+0.2000 [{0.2 - half:+.4f}, {0.2 + half:+.4f}] n=3" in capsys.readouterr().out
    one = json.loads((tmp_path / "compare_s0" / "hst_comparison.json").read_text())
    assert one["tokens"] == {"v6": pytest.approx(0.1)} and one["seconds"] == {"v6": -0.5}
    write_result(tmp_path, "v6_s7", "v6", 4.0, 7)  # its plain run is missing: no comparison, and none is written
    assert compare(tmp_path) == gains and not (tmp_path / "compare_s7").exists()
    for flags, words in (
        (dict(parameters=1200), "differ in parameters"),
        (dict(tokens=65), "differ in tokens"),
        (dict(lr=0.2), "odd_s1 and plain_s1 differ in lr"),
    ):
        write_result(tmp_path, "odd_s1", "v5", 4.0, 1, **flags)
        with pytest.raises(core.Failure, match=words):
            compare(tmp_path)
        shutil.rmtree(tmp_path / "odd_s1")


def test_the_comparison_reads_result_files_not_directory_names(tmp_path):
    """The name of a directory says nothing: not which variant it holds, nor what was left out, nor the axis."""
    write_result(tmp_path, "v5_s0", "plain", 5.0)
    write_result(tmp_path, "plain_s0", "v5", 4.0)
    write_result(tmp_path, "v5_time_s0", "v5", 4.5, off="horizon,fields")
    assert compare(tmp_path) == {"v5 tokens": [1.0], "v5_without_fields_without_horizon tokens": [0.5]}
    write_result(tmp_path, "again", "v5", 4.4, off="fields,horizon")
    with pytest.raises(core.Failure, match="again and v5_time_s0 are both v5_without_fields_without_horizon, seed 0"):
        compare(tmp_path)


def test_the_recorded_comparison_follows_from_the_recorded_runs(tmp_path, capsys):
    recorded = ROOT / "docs" / "results" / "hst"
    for path in recorded.glob("*/hst_results.json"):
        (tmp_path / path.parent.name).mkdir()
        shutil.copy(path, tmp_path / path.parent.name)
    gains = compare(tmp_path)
    assert len(gains) == 2 * len(H.VARIANTS) and all(len(g) == 3 for g in gains.values())
    for seed in range(3):
        old, new = (
            json.loads((d / f"compare_s{seed}" / "hst_comparison.json").read_text()) for d in (recorded, tmp_path)
        )
        assert all(old[axis] == new[axis] for axis in ("tokens", "seconds"))


def test_the_evidence_has_a_control_for_each_kind_of_horizon_and_equal_parameters():
    env = os.environ | {"DRY": "1", "PHASES": "grid off", "RATES": "1e-3", "ARMS": "all"}
    out = subprocess.run(["bash", "scripts/hst_evidence.sh"], cwd=ROOT, env=env, capture_output=True, text=True).stdout
    runs = [H.parse(line.split()[2:]) for line in out.splitlines()]
    grid = {r.save_dir.split("/")[-1].removesuffix("_lr1e-3"): r for r in runs if "/grid/" in r.save_dir}
    assert {r.variant for r in grid.values()} == {*H.VARIANTS, "plain"} and all(r.middle == "stack" for r in runs)
    sizes = [H.count(H.on_meta(r)) for r in grid.values()]
    assert max(sizes) / min(sizes) < 1.03 and all(r.n_layers >= 8 for r in grid.values())
    kinds = {}
    for name, r in grid.items():
        spec = H.without(H.form(r), r.off)
        kinds.setdefault(spec.horizon, set()).add(name)
        if name.endswith("_control"):  # a plain trunk
            bare = spec._replace(horizon="none", ffn=4, middle_first=False, published="", tied=False, modes=("token",))
            assert bare._replace(patience=1) == H.ALL["plain"], name
    assert all(any(name.endswith("control") for name in names) for kind, names in kinds.items() if kind != "none")
    assert len([r for r in runs if "/off/" in r.save_dir]) == 3 * 16


def test_the_sweep_covers_everything_and_skips_what_is_done(tmp_path):
    env = os.environ | {"DRY": "1", "ROOT": str(tmp_path)}
    out = subprocess.run(["bash", "scripts/hst_variants.sh"], cwd=ROOT, env=env, capture_output=True, text=True).stdout
    runs = [H.parse(line.split()[2:]) for line in out.splitlines()]
    assert len(runs) == 9 * 3 * 2 and {r.variant for r in runs} == {*H.VARIANTS, "plain"}
    sizes = [H.count(H.on_meta(r)) for r in runs if r.seed == 0 and not r.max_seconds]
    assert max(sizes) / min(sizes) < 1.01 and all(r.data == "local" for r in runs)
    for r in runs:
        write_result(tmp_path, r.save_dir.split("/")[-1], r.variant, 5.0, r.seed, max_seconds=r.max_seconds)
    env |= {"DRY": "0", "PYTHON": sys.executable}
    done = subprocess.run(["bash", "scripts/hst_variants.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.count("done already") == 54 and "nats saved over plain" in done.stdout, done.stderr
