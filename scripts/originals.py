"""Figures of the published code itself, each beside what its reconstruction here gives.

An original is somebody else's repository at one commit. It is imported from its checkout and never copied; what stands
in its way (a module that was never published, statements of a notebook) is replaced in memory and named in the result.

All        ORIGINALS=DIR bash scripts/originals.sh        5 minutes on one core; DIR/HST and so on are the checkouts
One        python scripts/originals.py HST --source DIR/HST --output_dir runs/originals/HST

One result file each, `originals_results.json`: flat names, an interval as {mean, lo, hi, n}. A checkout that is
missing, or that does not run here, has `"ran": false` and the reason in `why`, and the exit code is 0.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import types
import unittest.mock
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))
import core  # noqa: E402

RESULT = "originals_results.json"
SEEDS = (0, 1, 2)
SYMBOLS = 16  # independent uniform tokens over so many: no model that reads only the past is below ln 16
ENTROPY = math.log(SYMBOLS)


class DoesNotRun(Exception):
    """What stopped the published code, in one line."""


# ----------------------------------------------------------------------------------------------- to call published code
@contextlib.contextmanager
def borrowed(*folders: Path, **stubs: dict):
    """Inside, modules are imported from `folders` first, and a module of each name in `stubs` exists with these
    attributes. Afterwards none of them is left."""
    before, path = set(sys.modules), list(sys.path)
    sys.path[:0] = map(str, folders)
    for name, attributes in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if name in stubs or any(file.startswith(str(folder)) for folder in folders):
                del sys.modules[name]


def theirs(call, *args, **kwargs):
    """Call published code; whatever it raises becomes DoesNotRun with one line."""
    try:
        return call(*args, **kwargs)
    except (Exception, SystemExit) as error:
        line = (str(error).splitlines() or [""])[0][:160]
        raise DoesNotRun(f"{type(error).__name__}: {line}".rstrip(": ")) from error


def attempt(figures: dict, key: str, call, *args) -> None:
    """`call(*args)`'s figures go into `figures`, or what stopped it, as `KEY_why`."""
    try:
        figures |= call(*args)
    except DoesNotRun as error:
        figures[f"{key}_why"] = str(error)


def load(folder: Path, file: str, used: set, definitions: bool = False):
    """The module in `folder`/`file`, whatever its name. `definitions`: its imports, constants, classes and functions
    alone, for a notebook that would go on to train."""
    path = folder / file
    if not path.exists():
        raise DoesNotRun(f"{file} is not in the checkout")
    used.add(file)
    name = "original_" + "".join(c if c.isalnum() else "_" for c in file)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if not definitions:
        theirs(spec.loader.exec_module, module)
        return module
    tree = ast.parse(path.read_text())
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    tree.body = [n for n in tree.body if isinstance(n, kinds) or is_constant(n)]
    theirs(exec, compile(tree, str(path), "exec"), vars(module))
    return module


def is_constant(statement: ast.stmt) -> bool:
    """A name that is given a literal, or a type: an assignment that calls nothing."""
    if not isinstance(statement, ast.Assign) or any(isinstance(node, ast.Call) for node in ast.walk(statement)):
        return False
    return all(isinstance(target, ast.Name) for target in statement.targets)


class Seeded(nn.Module):
    """Published code draws from the global generator, even in evaluation, and some of it takes one row alone: each row
    passes by itself, from the same seed, after `before`."""

    def __init__(self, model: nn.Module, before=lambda: None):
        super().__init__()
        self.model, self.before = model, before

    def forward(self, ids: Tensor, **more):
        outputs = []
        for row in ids:
            self.before()
            torch.manual_seed(0)
            outputs.append(theirs(self.model, row[None], **more))
        return outputs[0] if len(ids) == 1 else {"logits": torch.cat([out["logits"] for out in outputs])}


def built(make, seed: int) -> nn.Module:
    """The model that `make` gives, initialised by its own code under this seed."""
    torch.manual_seed(seed)
    return theirs(make)


# -------------------------------------------------------------------------------------------------------- what is asked
def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def same_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def uniform_rows(rows: int, *purpose) -> Tensor:
    return torch.randint(SYMBOLS, (rows, 32), generator=core.generator(*purpose))


def after_training(model: nn.Module, objective, seed: int, updates: int, score=next_token_loss) -> float:
    """Held-out loss in nats after `updates` of 32 rows of independent uniform tokens. `objective(model, ids)` is the
    model's own loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    for step in range(updates):
        loss = theirs(objective, model, uniform_rows(32, seed, "train", step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    ids = uniform_rows(512, seed, "held out")
    with torch.no_grad():
        return float(score(theirs(model, ids)["logits"], ids))


@torch.no_grad()
def cache_mismatch(model: nn.Module, ids: Tensor, name: str = "cache", prefill: int = 16) -> float:
    """Largest difference between the logits of a cached step and those of one full pass: `prefill` tokens at once, the
    rest one by one, with the cache that the model returns under `name` or `caches`."""
    full = model(ids)["logits"]
    out, worst = model(ids[:, :prefill]), 0.0
    for t in range(prefill, ids.shape[1]):
        cache = out.get("cache", out.get("caches"))
        if cache is None:
            raise DoesNotRun("it returns no cache")
        out = model(ids[:, t : t + 1], **{name: cache})
        worst = max(worst, float((out["logits"][:, -1] - full[:, t]).abs().max()))
    return worst


@torch.no_grad()
def indistinguishable(f, u: Tensor, distance: float = 1.0, steps: int = 40) -> Tensor:
    """An input about `distance` away from `u` with the same output, found by walking along the direction in which f
    changes least; a mixer that loses nothing has none, and the walk then ends with another output."""
    jacobian, y, v, before = torch.func.jacrev(f), f(u), u.clone(), None
    for _ in range(steps):
        least = torch.linalg.svd(jacobian(v))[2][-1]
        before = least if before is None or least @ before > 0 else -least
        v = v + distance / steps * before
        for _ in range(2):  # back to the same output
            v = v - torch.linalg.lstsq(jacobian(v), (f(v) - y)[:, None], driver="gelsd").solution[:, 0]
    return v


@torch.no_grad()
def lossless(f, width: int, seed: int = 0) -> dict:
    """Of a mixer of vectors in float64: the directions that it loses, and by how much every inverse must err. Two
    inputs with one output have one inverse, which is at least half of their difference away from one of them."""
    u = torch.randn(width, generator=core.generator(seed, "mixer"), dtype=torch.float64)
    values = torch.linalg.svdvals(torch.func.jacrev(f)(u))
    lost = int((values < 1e-10 * values[0]).sum())
    if not lost:
        return {"directions_lost": 0, "inverse_error_at_least": 0.0}
    v = indistinguishable(f, u)
    apart = {"outputs_apart": float((f(v) - f(u)).abs().max()), "inputs_apart": float((v - u).abs().max())}
    return {"directions_lost": lost, "inverse_error_at_least": apart["inputs_apart"] / 2} | apart


def interval(values: list[float]) -> dict:
    return core.mean_interval(values)


# ----------------------------------------------------------------------------------------- HolonomyTransformer (CF-HoT)
PHASE_A = dict(vocab_size=SYMBOLS, d_model=32, n_layers=2, n_heads=2, d_ff=64, d_fiber=8, d_control=16, dropout=0.0)


def phase_a(folder: Path, used: set, updates: int) -> dict:
    """The published model and its baseline on independent tokens, beside the two rules of the reconstruction."""
    import phase_a_validation as ours

    published = load(folder, "training/phase_a_validation.py", used)

    def of_theirs(field: bool):
        config = published.CFHoTConfig(**PHASE_A, max_seq_len=32, use_control_field=field)
        return lambda seed: built(lambda: published.CFHoTModel(config), seed)

    def of_ours(rule: str):
        flags = [w for k, v in PHASE_A.items() for w in (f"--{k}", str(v))]
        flags += ["--data", "iid", "--seq_len", "32", "--curvature", rule, "--device", "cpu"]
        return lambda seed: ours.build_model(ours.parse([*flags, "--seed", str(seed)]), SYMBOLS)

    makers = {"published": of_theirs(True), "published_baseline": of_theirs(False)}
    makers |= {"ours_centered": of_ours("centered"), "ours_causal": of_ours("causal")}
    figures = {"entropy": ENTROPY, "updates": updates}
    for name, make in makers.items():
        over, moves, trained_moves = [], [], []
        for seed in SEEDS:
            model = make(seed)
            moves.append(core.causality_audit(model, SYMBOLS, 32))
            loss = after_training(model, lambda m, ids: m(ids, labels=ids)["loss"], seed, updates)
            over.append(loss - ENTROPY)
            trained_moves.append(core.causality_audit(model, SYMBOLS, 32))
        figures |= {f"{name}_over_entropy": interval(over), f"{name}_loss": interval([x + ENTROPY for x in over])}
        figures |= {f"{name}_moves": interval(moves), f"{name}_moves_trained": interval(trained_moves)}
    below = [figures[f"{name}_over_entropy"]["hi"] < -0.02 for name in ("published", "ours_centered")]
    return figures | {"leak_agrees": below[0] == below[1]}


@torch.no_grad()
def moved(adapters: nn.Module, seed: int = 0) -> None:
    """Weights that let the adapters act: a fresh one may be the identity by construction."""
    for name, p in adapters.named_parameters():
        p.copy_(torch.normal(0.0, 1.0, p.shape, generator=core.generator(seed, "moved", name)))


def published_training(module) -> dict:
    """The published training of adapters from its first line to its last, ten updates on a random Llama of 32 layers:
    its mean gate and total risk before and after, and the share of the padding that its loss counts as language."""
    import datasets
    import transformers

    base, tokenizer = core.load_backbone("tiny")
    config = type(base.config)(**base.config.to_dict() | {"num_hidden_layers": 32})
    torch.manual_seed(0)
    deep, pads, seen = type(base)(config), [], []
    texts = [{"text": text * 3} for text in core.synthetic_text("train") if len(text) > 40][:32]
    forward = module.CFHoTLlamaHooked.forward

    def watched(self, input_ids, attention_mask=None, labels=None, **more):
        pads.append(labels[attention_mask == 0] != -100)
        out = forward(self, input_ids, attention_mask=attention_mask, labels=labels, **more)
        seen.append((float(out["mean_gate"]), float(out["total_risk"])))
        return out

    given = [
        (module.CFHoTLlamaHooked, "forward", watched),
        (transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer),
        (transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: deep),
        (datasets, "load_dataset", lambda *a, **k: texts),
    ]
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as out:
        for owner, name, value in given:
            stack.enter_context(unittest.mock.patch.object(owner, name, value))
        theirs(module.train_phase_b, "tiny", out, gradient_accumulation=1, max_steps=10)
    figures = {"padding_scored": float(torch.cat(pads).float().mean())}
    for name, (gate, risk) in {"fresh": seen[0], "trained": seen[-1]}.items():
        figures |= {f"gate_32_layers_{name}": gate, f"risk_32_layers_{name}": risk}
    return figures


def adapter_figures(key: str, wrap, ids: Tensor) -> dict:
    """How far adapters on a tiny random Llama move its logits: fresh, after 20 updates, and with large weights."""
    base = core.load_backbone("tiny")[0]
    with torch.no_grad():
        plain = base(ids).logits
    model = built(lambda: wrap(base), 0)
    figures, adapters = {}, model.cf_adapters

    def change() -> float:
        with torch.no_grad():
            return float((theirs(model, ids)["logits"] - plain).abs().max())

    figures[f"{key}_moves_fresh"] = change()
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-4, weight_decay=0.01)
    for _ in range(20):
        theirs(model, ids, labels=ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    figures[f"{key}_moves_trained"] = change()
    moved(adapters)
    figures[f"{key}_moves"] = change()
    model.remove_hooks()
    return figures


def phase_b(folder: Path, used: set) -> dict:
    """Whether the published adapters change a logit of a frozen model, and whether padding counts in their loss."""
    import phase_b_8b_adapters as ours

    ids = torch.randint(3, 259, (2, 32), generator=core.generator(0, "phase b"))
    base = core.load_backbone("tiny")[0]
    size = dict(d_model=base.config.hidden_size, n_layers=base.config.num_hidden_layers)
    figures = {}
    files = {"phase_b": "phase_b_8b_adapters.py", "phase_b_first": "phase_b_8b_adapters_ORIGINAL.py"}
    for key, file in files.items():

        def measure(key=key, file=file):
            module = load(folder, f"training/{file}", used)
            return adapter_figures(key, lambda b: module.CFHoTLlamaHooked(b, module.CFAdapterConfig(**size)), ids)

        attempt(figures, key, measure)

    def wrapper() -> dict:  # the class that the file defines first
        module = load(folder, "training/phase_b_8b_adapters.py", used)
        theirs(module.CFHoTLlama(base, module.CFAdapterConfig(**size)), ids)
        return {"phase_b_wrapper_runs": True}

    attempt(figures, "phase_b_wrapper", wrapper)
    attempt(figures, "gate", lambda: published_training(load(folder, "training/phase_b_8b_adapters.py", used)))
    mine = adapter_figures("ours_phase_b", lambda b: ours.CFHoTLlamaHooked(b, ours.CFAdapterConfig(**size)), ids)
    with torch.no_grad():  # the largest effect there is: no attention at all
        plain = base(ids).logits
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        mine["no_attention_moves"] = float((base(ids).logits - plain).abs().max())
    return figures | mine


def holonomy(folder: Path, used: set, short: bool) -> dict:
    with borrowed(folder):
        return phase_a(folder, used, 60 if short else 800) | phase_b(folder, used)


# ------------------------------------------------------------------------------------------------------------------ HST
COLAB = "colab_training_scripts/HST_{}_Colab_Training.py"
HST_FILES = {  # name: file, class, mode, the variant of ours
    "colab_v3": (COLAB.format("v3_Ultra"), "HSTv3Ultra", "", "v3_ultra"),
    "colab_v4": (COLAB.format("v4_Unified"), "HSTv4Unified", "token", "v4_unified"),
    "colab_v4_chunk": (COLAB.format("v4_Unified"), "HSTv4Unified", "chunk", ""),
    "colab_v4_1": (COLAB.format("v4_1_HyperLattice"), "HSTv4HyperLattice", "", "v4_1_hyperlattice"),
    "colab_v5": (COLAB.format("v5"), "HSTv5", "token", "v5"),
    "colab_v5_chunk": (COLAB.format("v5"), "HSTv5", "chunk", ""),
    "colab_v6": (COLAB.format("v6"), "HSTv6", "token", "v6"),
    "colab_v6_chunk": (COLAB.format("v6"), "HSTv6", "chunk", ""),
    "colab_v7_1_2": (COLAB.format("v7_1_2_Agile"), "HSTv7Agile", "token", "v7_1_2_agile"),
    "colab_v7_1_2_chunk": (COLAB.format("v7_1_2_Agile"), "HSTv7Agile", "chunk", ""),
    "colab_v8_2": (COLAB.format("v8_2_Crystalline"), "HSTv8Crystalline", "token", "v8_2_crystalline"),
    "v3": ("hst.v3.py", "HSTv3Ultra", "", ""),
    "v4": ("hst.v4.py", "HSTv4Unified", "token", ""),
    "v4_chunk": ("hst.v4.py", "HSTv4Unified", "chunk", ""),
    "v4_1": ("hst_v4.1.py", "HSTv4HyperLattice", "", ""),
    "v5": ("hst.v5.py", "HSTv5_2Unified", "token", ""),
    "v5_chunk": ("hst.v5.py", "HSTv5_2Unified", "chunk", ""),
    "v6": ("hst.v6.py", "HSTv6Giga", "token", ""),
    "v6_chunk": ("hst.v6.py", "HSTv6Giga", "chunk", ""),
    "v6_1": ("hst.v6.1.py", "HSTv6Giga", "token", ""),
    "v6_1_chunk": ("hst.v6.1.py", "HSTv6Giga", "chunk", ""),
    "v7_1": ("hst.v7.1.py", "HSTv7_1Ultimate", "token", ""),
    "v7_1_chunk": ("hst.v7.1.py", "HSTv7_1Ultimate", "chunk", ""),
    "v7_1_2": ("hst.v7.1.2.py", "HSTv7Agile", "token", ""),
    "v7_1_2_chunk": ("hst.v7.1.2.py", "HSTv7Agile", "chunk", ""),
    "v8": ("hst.v8.py", "HSTv8Crystalline", "token", ""),
    "v8_chunk": ("hst.v8.py", "HSTv8Crystalline", "chunk", ""),
    "v8_1": ("hst.v8.1.py", "HSTv8Crystalline", "token", ""),
    "v8_1_chunk": ("hst.v8.1.py", "HSTv8Crystalline", "chunk", ""),
    "v8_2": ("hst_v8.2.py", "HSTv8Hyper", "token", ""),
    "v8_2_chunk": ("hst_v8.2.py", "HSTv8Hyper", "chunk", ""),
    "chaoslogic": ("hst.cl.py", "ChaosLogicAI", "chunk", "chaoslogic"),
}
HST_SIZE = dict(vocab_size=64, d_model=64, n_heads=4, n_layers=4, max_seq_len=128, horizon=4)
MIXERS = {"colab_v8_2": "colab_v8_2", "v8": "v8", "v8_1": "v8_1", "v8_2": "v8_2"}


def hst_maker(module, class_name: str, mode: str):
    """Builds a published model of the small size; ChaosLogic wraps a chunk model of its file."""
    more = dict(mode=mode, chunk_size=16) if mode else {}
    if class_name == "ChaosLogicAI":
        return lambda: module.ChaosLogicAI(module.HSTv7Agile(**HST_SIZE, **more))
    return lambda: getattr(module, class_name)(**HST_SIZE, **more)


def trains(model: nn.Module) -> dict:
    """One backward pass in training mode; what stops it is told."""
    model.train()
    theirs(next_token_loss(model(uniform_rows(1, 0, "training"))["logits"], uniform_rows(1, 0, "training")).backward)
    return {}


@torch.no_grad()
def hst_variant(key: str, folder: Path, used: set) -> dict:
    """Of one published model: what a later token moves, and what the cache changes. Each over three initialisations."""
    file, class_name, mode, _ = HST_FILES[key]
    module = load(folder, file, used, definitions=file.startswith("colab"))
    make, leaks, mismatches, figures = hst_maker(module, class_name, mode), [], [], {}
    ids = torch.randint(64, (1, 32), generator=core.generator(0, "cache"))
    for seed in SEEDS:
        model = Seeded(built(make, seed)).eval()
        shape = tuple(model(ids)["logits"].shape[:2])
        if shape != (1, 32):
            raise DoesNotRun(f"32 tokens give logits of shape {shape}, not one for each token")
        leaks.append(core.causality_audit(model, 64, 64))
        if mode != "chunk":  # whose decoders keep no state between calls
            with contextlib.suppress(KeyError):
                name = "caches" if "caches" in model(ids) else "cache"
                attempt(
                    figures, f"{key}_cache", lambda m=model, n=name: mismatches.append(cache_mismatch(m, ids, n)) or {}
                )
    figures |= {f"{key}_leak": max(leaks), f"{key}_leak_least": min(leaks)}
    with torch.enable_grad():
        attempt(figures, f"{key}_training", trains, Seeded(built(make, 0)))
    return figures | ({f"{key}_cache": max(mismatches)} if mismatches else {})


def hst_mixer(key: str, folder: Path, used: set) -> dict:
    file = HST_FILES[key][0]
    module = load(folder, file, used, definitions=file.startswith("colab"))
    mixer = built(lambda: module.DiamondMixer(64), 0).double().eval()
    return {f"{key}_mixer_{name}": x for name, x in theirs(lossless, mixer, 64).items()}


def hst(folder: Path, used: set, short: bool) -> dict:
    import hst_train as ours

    figures = {}
    chosen = [key for key in HST_FILES if not short or key in ("colab_v4", "colab_v5", "colab_v8_2", "chaoslogic")]
    with borrowed(folder):
        for key in chosen:
            attempt(figures, key, hst_variant, key, folder, used)
            if key in MIXERS:
                attempt(figures, f"{key}_mixer", hst_mixer, key, folder, used)
    if not any(name.endswith("_leak") for name in figures):
        raise DoesNotRun(next(iter(figures.values()), "none of its files is there"))
    leaks = {key: figures[f"{key}_leak"] for key in chosen if f"{key}_leak" in figures}
    figures |= {
        "leak_max": max(leaks.values()),
        "models_run": len(leaks),
        "models_causal": sum(x < 1e-6 for x in leaks.values()),
    }
    figures["cache_max"] = max((v for k, v in figures.items() if k.endswith("_cache")), default=None)
    for key in chosen:
        if variant := HST_FILES[key][3]:
            mine = ours.self_check(ours.parse(["--test", "--variant", variant]))
            figures |= {
                f"ours_{variant}_{name}": mine[name]
                for name in ("leak", "cache_mismatch", "inverse_error")
                if name in mine
            }
    mixer = ours.build_model(ours.parse(["--test", "--variant", "v8_2_crystalline"])).stack.top[0].mixer.double()
    with torch.no_grad():
        nn.init.normal_(mixer.f[-1].weight, std=0.1, generator=core.generator(0))
        nn.init.normal_(mixer.g[-1].weight, std=0.1, generator=core.generator(1))
    return figures | {f"ours_mixer_{name}": x for name, x in lossless(mixer, 64).items()}


# ----------------------------------------------------------------------------------------------------------------- AFRB
NEEDLE = "--task needle --disable-attn --ctx-chunks 4 --ctx-chunk-len 32 --needle-len 16 --skip-phase-metrics "
NEEDLE += "--num-workers 0"
NO_MEMORY = "--n-afrb 1 --needle-query --bs 8 --ga 1 --lr 1e-2 --warmup-steps 10"  # a block without a memory
ECHO = {  # name: tied tables, flags; three seeds each where something is trained
    "tied": (True, "--n-afrb 0 --eval-only"),
    "untied": (False, "--n-afrb 0 --eval-only"),
    "trained": (False, NO_MEMORY),
    "trained_without_term": (False, f"{NO_MEMORY} --lambda-retrieval 0"),
}


def random_llama(folder: Path, tied: bool, seed: int) -> Path:
    """A directory with a random two-layer Llama of 512 tokens and its tokenizer, and the file that names it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, tie_word_embeddings=tied, **sizes))
    model.save_pretrained(folder / "lm")
    core.train_tokenizer(core.synthetic_text("train"), 512).save_pretrained(folder / "lm")
    core.write_json(folder / "reports" / "baseline_metrics.json", {"model": str(folder / "lm")})
    return folder


@torch.no_grad()
def needle_scores(module, model, seed: int) -> dict:
    """On the published items, after their query: needle tokens that the model predicts before it reads them (`right`),
    and how far other tokens move a position's logits (`mixes`, 0 for a model without attention and memory)."""
    tokenizer = types.SimpleNamespace(vocab_size=512, eos_token_id=0)
    items = theirs(module.generate_needle_dataset, tokenizer, 16, 4, 32, 1, 50, seed, True)[1]
    right = n = 0
    model.eval()
    for item in items:
        logits, start = model(torch.tensor([item["input_ids"]])).logits[0], item["retrieval_start"]
        said = logits[start - 1 : start + 15].argmax(-1)
        right, n = right + int((said == torch.tensor(item["needle"])).sum()), n + 16
    ids = torch.tensor([items[0]["input_ids"]])
    other = ids.clone()
    other[:, :-1] = (ids[:, :-1] + 7) % 512
    return {"right": right, "n": n, "mixes": float((model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max())}


def published_run(module, tied: bool, flags: str, seed: int, steps: int) -> dict:
    """The published program from its command line to its metrics.json, on a random model."""
    kept, inject = [], module.inject_afrb_adapters
    module.inject_afrb_adapters = lambda *a, **k: kept.append(inject(*a, **k)) or kept[0]
    words, argv = f"{NEEDLE} {flags} --seed {seed} --steps {steps} --save out".split(), sys.argv
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(random_llama(Path(folder), tied, seed)):
        sys.argv = ["train.py", *words]
        try:
            theirs(module.main)
        finally:
            sys.argv, module.inject_afrb_adapters = argv, inject
        metrics = json.loads(Path("out/metrics.json").read_text())
        return {"rate": metrics["needle_hit_rate"]} | needle_scores(module, kept[0], seed)


def afrb(folder: Path, used: set, short: bool) -> dict:
    import afrb_train as ours

    figures, source = {}, folder / "src"
    absent = {"phase_lattice": dict(PhaseLatticeMemory=nn.Module, compute_plm_metrics=lambda model: {})}
    absent["utils_phase"] = dict.fromkeys(("phase_coherence", "gamma_saturation", "entropy_flow"), lambda x: 0.0)
    with borrowed(source, **absent):
        if not (source / "train.py").exists():
            raise DoesNotRun("src/train.py is not in the checkout")
        with borrowed(source, resonant_blocks={"AFRB": theirs(importlib.import_module, "afrb").AFRB}):
            module = load(folder, "src/train.py", used)
            used |= {f"src/{name}.py" for name in ("afrb", "phase_memory", "phase_curvature", "utils_alignment")}
            for name, (tied, flags) in ECHO.items():
                seeds = (41, 42, 43) if "eval-only" not in flags else (41,)
                runs = [published_run(module, tied, flags, seed, 20 if short else 200) for seed in seeds]
                hits, n = sum(round(r["rate"] * 800) for r in runs), 800 * len(runs)
                if len(runs) == 1:
                    figures[f"echo_{name}"] = core.wilson(hits, n)
                    figures[f"recall_{name}"] = core.wilson(runs[0]["right"], runs[0]["n"])
                else:
                    figures[f"echo_{name}"] = interval([r["rate"] for r in runs])
                    figures[f"recall_{name}"] = interval([r["right"] / r["n"] for r in runs])
                figures[f"mixes_{name}"] = max(r["mixes"] for r in runs)
    figures["chance"] = 1 / 512
    with tempfile.TemporaryDirectory() as out:
        flags = "--test --task needle --disable-attn --n-afrb 0 --eval-items 50 --device cpu --save"
        mine = ours.main([*flags.split(), f"{out}/echo"])
    figures["ours_echo_tied"] = mine["legacy_echo_token_acc"]
    figures["ours_recall_tied"] = mine["needle_token_acc"]
    return figures | {"echo_agrees": figures["echo_tied"]["lo"] > 0.5 and figures["ours_echo_tied"] > 0.5}


# -------------------------------------------------------------------------------------------------------------- Cognate
TINY = dict(
    d_model=32,
    n_layers=2,
    n_heads=2,
    d_ff=64,
    vocab_size=SYMBOLS,
    max_seq_len=32,
    sw_window=32,
    d_mem=16,
    mag_hidden=16,
)
DOCUMENTED = dict(d_model=256, n_layers=10, n_heads=4, d_ff=1024, d_mem=128, mag_hidden=128)


def cognate_copies(model, ids: Tensor) -> Tensor:
    """The published loss with the labels as the model takes them: each position against its own token."""
    return model(ids, labels=ids)["loss"]


def cognate_shifts(model, ids: Tensor) -> Tensor:
    """The published loss with labels that the caller has shifted; the last position has none."""
    return model(ids, labels=F.pad(ids[:, 1:], (0, 1), value=-100))["loss"]


@torch.no_grad()
def cognate_parts(model) -> dict:
    """What acts in an untrained published model: halting head, memory, and what the memory keeps between calls."""
    ids, reset = uniform_rows(2, 0, "parts"), model.reset_memory

    def logits() -> Tensor:
        reset()
        return model(ids)["logits"]

    before, head = logits(), model.act_head.w_halt
    again = model(ids)["logits"]  # the same rows once more, without a reset
    figures = {"memory_carries": float((again - before).abs().max())}
    bias, steps = head.bias.clone(), []
    for value in (-20.0, 20.0):
        head.bias.fill_(value)
        figures["halting_moves"] = max(figures.get("halting_moves", 0.0), float((logits() - before).abs().max()))
        reset()
        steps.append(float(model(ids)["halting_steps"].float().mean()))
    head.bias.copy_(bias)
    figures |= {"halting_steps_never": steps[0], "halting_steps_at_once": steps[1]}
    model.backbone.ltm.w_up.weight.zero_()
    return figures | {"memory_moves": float((logits() - before).abs().max())}


def cognate_sizes(config_module, model_module) -> dict:
    """Parameters as committed and at the documented sizes, and whether head and embedding are one tensor."""
    figures = {}
    for name, shape in {"as_committed": {}, "as_documented": DOCUMENTED}.items():
        model = model_module.TRMTitansMAGModel(
            config_module.Phase1Config(titans_config=config_module.TitansMAGConfig(**shape))
        )
        figures[f"parameters_{name}"] = model.count_parameters()["total"]
        figures[f"parameters_{name}_counted"] = sum(p.numel() for p in model.parameters())
        figures[f"embedding_share_{name}"] = model.backbone.token_emb.weight.numel() / figures[f"parameters_{name}"]
    return figures | {"head_tied": model.lm_head.weight is model.backbone.token_emb.weight}


def cognate_rates(trainer, model) -> dict:
    """The rates that the published trainer asks for, and those of the optimizer that it makes."""
    config = trainer.TrainingConfig(model_config=None, device="cpu", use_curriculum=False, wandb_mode="disabled")
    fake = types.SimpleNamespace(model=model, config=config)
    rates = trainer.Phase1Trainer._create_optimizer(fake).param_groups[0]
    figures = {"rate_asked_muon": config.muon_lr, "rate_ran_muon": rates["muon_lr"]}
    figures |= {"lambda_asked": config.grokfast_lambda, "lambda_ran": rates["grokfast_lambda"]}
    fake.val_datasets = None
    return figures | {"validation_without_data": trainer.Phase1Trainer.validate(fake)[0]}


def cognate(folder: Path, used: set, short: bool) -> dict:
    import train_phase1_cognate as ours

    source, package, updates = folder / "src", "phase1_cognate", 10 if short else 120
    if not (source / package).exists():
        raise DoesNotRun(f"src/{package} is not in the checkout")
    figures = {"entropy": ENTROPY, "updates": updates}
    with borrowed(source):
        configs = theirs(importlib.import_module, f"{package}.model.model_config")
        models = theirs(importlib.import_module, f"{package}.model.full_model")

        def make():
            size = configs.TitansMAGConfig(**TINY, head_dim=16, dropout=0.0, attention_dropout=0.0)
            return models.TRMTitansMAGModel(configs.Phase1Config(titans_config=size))

        leaks, over, copied = [], [], []
        for seed in SEEDS:
            model = built(make, seed)
            leaks.append(core.causality_audit(Seeded(model, model.reset_memory), SYMBOLS, 32))
            copied.append(after_training(model, cognate_copies, seed, updates, same_token_loss))
            over.append(after_training(built(make, seed), cognate_shifts, seed, updates) - ENTROPY)
        figures |= {"published_moves": interval(leaks), "published_over_entropy": interval(over)}
        figures["published_loss_of_its_own_token"] = interval(copied)
        figures |= theirs(cognate_parts, built(make, 0).eval())
        model = built(make, 0)
        theirs(cognate_shifts, model, uniform_rows(2, 0, "gradient")).backward()
        gradient = model.act_head.w_halt.weight.grad
        figures["halting_gradient"] = 0.0 if gradient is None else float(gradient.abs().max())
        figures |= theirs(cognate_sizes, configs, models)
        attempt(
            figures,
            "rates",
            lambda: theirs(cognate_rates, importlib.import_module(f"{package}.training.trainer"), model),
        )
        used |= {
            str(Path(m.__file__).relative_to(folder)) for n, m in sys.modules.items() if n.startswith(f"{package}.")
        }
    flags = "--model reasoning --size tiny --d-model 32 --n-heads 2 --n-layers 2 --max-length 32 --dropout 0 "
    flags += "--device cpu --seed"
    losses, moves = [], []
    for seed in SEEDS:
        mine = ours.build_model(ours.parse([*flags.split(), str(seed)]), SYMBOLS)
        moves.append(core.causality_audit(mine, SYMBOLS, 32))
        losses.append(after_training(mine, cognate_copies, seed, updates) - ENTROPY)  # ours shifts the labels itself
    figures |= {"ours_moves": interval(moves), "ours_over_entropy": interval(losses)}
    whole = ours.build_model(ours.parse(["--model", "reasoning", "--device", "cpu"]))
    return figures | {"ours_parameters": sum(p.numel() for p in whole.parameters())}


# ----------------------------------------------------------------------------------------------------------- LatentWire
ANSWERS = {  # name: what was said, and the one right answer
    "empty_against_empty": ("", ""),
    "article_against_punctuation": ("the", "..."),
    "empty_against_word": ("", "Paris"),
    "right_with_a_word_twice": ("ten out of ten", "ten out of ten"),
}


def latentwire_scores(published) -> dict:
    """Exact match and F1 of the published scorer and of ours."""
    figures = {}
    for name, (said, gold) in ANSWERS.items():
        figures |= {f"em_{name}": published.em(said, gold), f"f1_{name}": published.f1(said, gold)}
        figures |= dict(zip((f"ours_em_{name}", f"ours_f1_{name}"), core.squad_scores(said, [gold])))
    return figures


@torch.no_grad()
def latentwire_norms(models) -> dict:
    """RMS of the published adapter's output over that of the embeddings: as its two training scripts build it, and
    with the table's statistics installed, which they never do. Embeddings have the scale of Llama 3.1 8B's, 0.0105."""
    import latentwire_stage1 as ours

    figures = {}
    x = torch.randn(512, 256, generator=core.generator(0, "table")) * 0.0105  # a table of 512 rows
    ratio = lambda y: float((y.square().mean(-1).sqrt() / x.square().mean(-1).sqrt()).mean())  # noqa: E731
    z = x[:, :64]
    table = types.SimpleNamespace(embedding_stats=lambda: (x.mean(0), x.std(0)))
    for name, colour in {"adapter": True, "adapter_plain": False}.items():
        adapter = built(lambda colour=colour: models.Adapter(64, 256, 32, hidden_mult=4, colorize=colour), 0).eval()
        figures[f"norm_ratio_{name}"] = ratio(theirs(adapter, z))
        if colour:
            adapter.install_color_from_wrapper(table)
            figures["norm_ratio_colour_installed"] = ratio(theirs(adapter, z))
    mine = ours.Adapter(64, 256, 4, 0.0, True)
    mine.reset(0, None)
    figures["ours_norm_ratio_adapter"] = ratio(mine(z))
    return figures | {"ours_norm_ratio_rescaled": ratio(ours.rescale(mine(z), x, "per_token", 0.0))}


class Words:
    """A tokenizer of bytes with what the published sweep calls; `decode` gives a word for each token."""

    pad_token_id, eos_token_id = 0, 258

    def __call__(self, text: str, **_):
        return {"input_ids": torch.tensor([[3 + b % 200 for b in text.encode()]])}

    def decode(self, ids, **_) -> str:
        return " ".join(f"w{int(i)}" for i in ids)


def latentwire_sweep(folder: Path, used: set, published) -> dict:
    """The published embedding sweep on a tiny random model: answers that are empty, in fp32 and in the half precision
    that it chooses on a GPU. Each configuration has eight prompts."""
    module = load(folder, "scripts/archive/run_embed_sweep_simple.py", used)
    examples, figures = [{"source": f"What is the number {i}?", "answer": str(i)} for i in range(8)], {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        model = core.load_backbone("tiny")[0].to(dtype)
        statistics = theirs(module.get_vocab_embedding_stats, model)
        empty = {
            c["name"]: theirs(
                module.run_experiment,
                c["name"],
                c["config"],
                model,
                Words(),
                examples,
                "cpu",
                statistics,
                len(examples),
            )["empty_rate"]
            for c in theirs(module.generate_experiment_configs)
        }
        scaled = [rate for key, rate in empty.items() if key.startswith("rms")]
        figures |= {f"empty_scaled_{name}": min(scaled), f"empty_unscaled_{name}": empty["baseline"]}
    return figures


def latentwire(folder: Path, used: set, short: bool) -> dict:
    if not (folder / "latentwire").exists():
        raise DoesNotRun("latentwire is not in the checkout")
    with borrowed(folder):
        utils = theirs(importlib.import_module, "latentwire.core_utils")
        models = theirs(importlib.import_module, "latentwire.models")
        figures = theirs(latentwire_scores, utils) | latentwire_norms(models)
        attempt(figures, "sweep", latentwire_sweep, folder, used, utils)
        used |= {
            str(Path(m.__file__).relative_to(folder)) for n, m in sys.modules.items() if n.startswith("latentwire.")
        }
    return figures


# ----------------------------------------------------------------------------------------------------------------- main
MEASURES = {
    "HolonomyTransformer": holonomy,
    "HST": hst,
    "attention-free-phase-blocks": afrb,
    "the-agent-maker": cognate,
    "LatentWire": latentwire,
}
PATCHED = {  # what the published code gets here that it does not bring
    "HolonomyTransformer": [
        "phase B trains a random Llama on generated text: the loaders of model and data give these"
    ],
    "HST": [
        "colab_training_scripts: imports, constants, classes and functions are executed, the training below is not",
        "each row passes by itself, from one random state: some take one row, ChaosLogic adds noise in evaluation",
    ],
    "attention-free-phase-blocks": [
        "resonant_blocks, which train.py imports, is src/afrb.py",
        "phase_lattice and utils_phase were never published: stubs, whose figures are not used",
        "reports/baseline_metrics.json, which names the model, is written for a random Llama of 512 tokens",
    ],
    "the-agent-maker": [
        "phase1_cognate.data was never published: rows of random tokens are given to the model directly"
    ],
    "LatentWire": ["the sweep gets a byte tokenizer and a tiny random Llama in place of the gated one"],
}


def commit_of(folder: Path) -> str:
    """The commit that is checked out there; nothing for a plain directory."""
    if not (folder / ".git").exists():
        return ""
    words = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def blob(path: Path) -> str:
    """The name that git gives a file's content, to be compared with `git ls-tree -r COMMIT`."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def measure(name: str, folder: Path, commit: str, short: bool) -> dict:
    """The result of one original."""
    there, used, began = commit_of(folder), set(), core.clock()
    result = {"original": name, "commit": commit, "commit_seen": there, "short": short, "seeds": list(SEEDS)}
    try:
        if not folder.is_dir():
            raise DoesNotRun(f"no checkout: ORIGINALS/{name} is not there")
        if there and commit and there != commit:
            raise DoesNotRun(f"the checkout is at {there[:12]}, not at {commit[:12]}")
        figures = {"ran": True, "why": ""} | MEASURES[name](folder, used, short)
    except DoesNotRun as error:
        figures = {"ran": False, "why": str(error)}
    files = {file: blob(folder / file) for file in sorted(used)}
    more = {"patched": PATCHED[name], "files": files, "environment": core.environment()}
    return result | figures | more | {"wall_s": core.clock() - began}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MEASURES, help="the original, by the name of its repository")
    parser.add_argument("--source", required=True, help="its checkout")
    parser.add_argument("--commit", default="", help="the commit that the checkout has to be at")
    parser.add_argument("--output_dir", required=True, help="where originals_results.json goes")
    parser.add_argument("--test", action="store_true", help="short: fewer updates and models")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    args = parse(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    result = measure(args.name, Path(args.source).resolve(), args.commit, args.test)
    core.write_json(Path(args.output_dir) / RESULT, result)
    print(f"{args.name}: {'measured' if result['ran'] else 'not run: ' + result['why']}")
    return result


if __name__ == "__main__":
    core.cli(main)
