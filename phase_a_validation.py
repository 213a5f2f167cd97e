"""CF-HoT, phase A: does a learned "control field" on the attention lower the loss of a 50M language model?

In every layer a small MLP reads position t and predicts a non-negative increment; its moving average is the field h,
and the log of the gate is added to the scores of key position j, for every query i >= j:

    dh_t = clamp(softplus(MLP[x_t; W_f x_t]), 0, 1)        h_t = a h_{t-1} + (1 - a) dh_t
    g_t  = sigmoid(-|lambda| h_t) <= 1/2                   score_ij = q_i . k_j / sqrt(d_head) + log g_j
    FFN(x_t) = W_b (sigmoid(1 - |lambda_k| kappa_t) * GELU(W_a x_t))        kappa_t: curvature of W_f x, causal here

"Holonomy" is the document's name for dh, a learned scalar; nothing geometric is computed. The published curvature
reads the next token (--curvature centered shows what that does); only differences of log g between keys matter.

Smoke test   python phase_a_validation.py --test                                              CPU, offline, 20 s
Document     python phase_a_validation.py --output_dir ./results/phase_a --batch_size 16 --max_steps 10000 --lr 1e-4
Offline      python phase_a_validation.py --data local --tokenizer local --output_dir runs/phase_a_local
Expect       two losses within a few per cent of each other, not the published 2.53 against 53.00: docs/cfhot.md
"""

import contextlib
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from core import arg, require


@dataclasses.dataclass
class Args(core.RunArgs):
    output_dir: str = arg("./results/phase_a", "run directory", "training")
    batch_size: int = arg(16, "sequences per micro-batch (and process)", "training")
    max_steps: int = arg(10000, "training length in micro-batches, not updates", "training")
    lr: float = arg(1e-4, "AdamW learning rate", "training")
    no_baseline: bool = arg(False, "train CF-HoT only, without the baseline beside it", "training")
    grad_accum: int = arg(2, "micro-batches per update", "training")
    warmup_steps: int = arg(0, "linear warm-up, in updates", "training")
    eval_interval: int = arg(1000, "evaluate every so many micro-batches", "training")
    save_interval: int = arg(5000, "checkpoint every so many micro-batches", "training")
    log_interval: int = arg(100, "log every so many micro-batches", "training")
    eval_batches: int = arg(50, "batches of the validation split to evaluate on; 0: all of it", "training")
    d_model: int = arg(512, "width", "model")
    n_layers: int = arg(8, "blocks", "model")
    n_heads: int = arg(8, "attention heads", "model")
    d_ff: int = arg(2048, "hidden width of the FFN", "model")
    seq_len: int = arg(512, "window length", "model")
    dropout: float = arg(0.1, "on embeddings, attention weights and FFN", "model")
    match_params: bool = arg(False, "widen the baseline's FFN so that both arms have equally many parameters", "model")
    d_fiber: int = arg(32, "width of the fiber projection W_f x", "control field")
    d_control: int = arg(64, "hidden width of the predictor of dh", "control field")
    momentum: float = arg(0.9, "a of the moving average, in [0, 1)", "control field")
    lambda_gate: float = arg(1.0, "initial gate scale (learned)", "control field")
    lambda_curv: float = arg(0.1, "initial curvature scale (learned)", "control field")
    lambda_hol: float = arg(1e-4, "weight of the mean of dh in the loss", "control field")
    lambda_curv_loss: float = arg(1e-5, "weight of the mean curvature in the loss", "control field")
    curvature: Literal["causal", "off", "centered"] = arg(
        "causal", "centered: the published rule, which reads the next token; its results are invalid", "control field"
    )
    data: Literal["wikitext103", "wikitext2", "text", "local", "synthetic", "iid"] = arg(
        "wikitext103", "hub sets; text: --data_path; local: prose of the Python library; iid: uniform tokens", "data"
    )
    data_path: str = arg("", "file or folder for --data text; unset: not used", "data")
    tokenizer: str = arg("gpt2", "hub name, directory, byte, or local (BPE trained on the training text)", "data")
    vocab_size: int = arg(4096, "entries of --tokenizer local; number of symbols of --data iid", "data")
    num_workers: int = arg(4, "loader processes (at most the number of cores less one)", "data")


TEST = dict(
    d_model=64,
    n_layers=2,
    n_heads=2,
    d_ff=128,
    seq_len=64,
    d_fiber=8,
    d_control=16,
    batch_size=8,
    max_steps=60,
    eval_interval=20,
    save_interval=30,
    log_interval=10,
    eval_batches=4,
    lr=3e-3,
    data="synthetic",
    tokenizer="byte",
    num_workers=0,
    device="cpu",
    threads=1,
)
FREE = ("output_dir", "max_steps", "eval_interval", "save_interval", "log_interval", "num_workers", "no_baseline")


def parse(argv=None) -> Args:
    args = core.parse_args(Args, TEST, argv, __doc__)
    core.require_positive(
        args,
        "batch_size max_steps grad_accum eval_interval save_interval log_interval d_model "
        "n_layers n_heads d_ff seq_len d_fiber d_control",
    )
    require(args.d_model % args.n_heads == 0, f"--d_model {args.d_model} is not divisible by --n_heads {args.n_heads}")
    require(0 <= args.momentum < 1, f"--momentum {args.momentum} is not in [0, 1): 1 would never forget")
    require(0 <= args.dropout < 1, f"--dropout {args.dropout} is not in [0, 1)")
    require(
        args.lr > 0 and args.warmup_steps >= 0 and args.eval_batches >= 0,
        "--lr must be positive, --warmup_steps and --eval_batches not negative",
    )
    require(args.seq_len >= 3, "--seq_len must be at least 3")
    require(args.data != "iid" or args.vocab_size >= 2, "--data iid needs --vocab_size 2 or more")
    return args


# ---------------------------------------------------------------------------------------------------------- model
def ema(x: Tensor, momentum: float, start: Tensor | None = None, chunk: int = 128) -> Tensor:
    """h_t = a h_{t-1} + (1 - a) x_t over the last axis of `x` [B, T], from h_{-1} = `start` [B] (zero).

    One product with the matrix a^(t - i) up to T = 1024; longer inputs are cut into chunks of 128, whose ends are
    carried on by the same recurrence with a^128, so the cost is O(T). ValueError unless 0 <= momentum < 1.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum {momentum} is not in [0, 1)")
    B, T = x.shape
    start = x.new_zeros(B) if start is None else start
    if T == 1:  # a decoding step
        return torch.lerp(x, start[:, None], momentum)
    if T <= 1024:
        kernel, decay = ema_kernel(T, momentum, x.device, x.dtype)
        return x @ kernel.T + start[:, None] * decay
    n = -(-T // chunk)
    inner = ema(F.pad(x, (0, n * chunk - T)).reshape(B * n, chunk), momentum).view(B, n, chunk)
    last = momentum**chunk
    ends = ema(inner[..., -1], last, start * (1 - last)) / (1 - last)  # B n: the state after each chunk
    before = torch.cat([start[:, None], ends[:, :-1]], 1)  # B n: the state before it
    return (inner + before[..., None] * ema_kernel(chunk, momentum, x.device, x.dtype)[1]).reshape(B, -1)[:, :T]


@functools.lru_cache(8)
def ema_kernel(T: int, momentum: float, device, dtype) -> tuple[Tensor, Tensor]:
    """((1 - a) a^(t - i) for i <= t, else 0 [T, T]; a^(t + 1) [T])."""
    steps = torch.arange(T, device=device)
    power = (steps[:, None] - steps).clamp(min=0)  # never negative, so no power overflows
    return ((1 - momentum) * momentum ** power.to(dtype)).tril(), momentum ** (steps + 1).to(dtype)


def curvature(phi: Tensor, rule: str, past: Tensor | None = None) -> Tensor:
    """kappa [B, T] of the fiber path `phi` [B, T, f]. `causal`: |phi_t - phi_{t-2}| / 2, with |phi_1 - phi_0| at t = 1
    and 0 at t = 0. `centered`, the published rule: |phi_{t+1} - phi_{t-1}| / 2, which reads the next token.
    `past` [B, p, f]: the fibers before `phi` in a cached sequence."""
    if rule == "centered":
        return _norm(torch.gradient(phi, dim=1)[0]) if phi.shape[1] > 1 else phi.new_zeros(phi.shape[:2])
    path = phi if past is None else torch.cat([past, phi], 1)
    kappa = torch.cat(
        [torch.zeros_like(path[:, :1, 0]), _norm(path[:, 1:2] - path[:, :1]), _norm(path[:, 2:] - path[:, :-2]) / 2], 1
    )
    return kappa[:, -phi.shape[1] :]


def _norm(x: Tensor) -> Tensor:
    return (x.square().sum(-1) + 1e-12).sqrt()


class Field(NamedTuple):
    """What a control field computes, each [B, T] in fp32 but `phi` [B, T, f]. 0 < g <= 1/2, 0 <= dh, h <= 1."""

    log_g: Tensor
    h: Tensor
    dh: Tensor
    dh_raw: Tensor  # before the clamp, so that a saturated position still feels the regulariser
    phi: Tensor


class ControlField(nn.Module):
    """The scalar field of the module docstring. Runs in fp32, whatever the model's precision.

    h is a weighted mean of values in [0, 1], so the documented clamp of h at 10 can never act; and g <= 1/2, so the
    documented healthy band 0.2 to 0.8 is met by any |lambda| <= 1.386, a gate that does nothing included.
    """

    def __init__(self, d_model: int, d_fiber: int, d_control: int, momentum: float, lambda_gate: float):
        super().__init__()
        self.fiber = nn.Linear(d_model, d_fiber)
        self.predictor = nn.Sequential(nn.Linear(d_model + d_fiber, d_control), nn.GELU(), nn.Linear(d_control, 1))
        self.scale = nn.Parameter(torch.tensor(float(lambda_gate)))
        self.momentum = momentum

    def reset(self) -> None:
        """softplus(-2) = 0.13: increments start small. Called after the generic initialisation, which it refines."""
        with torch.no_grad():
            self.predictor[2].weight.mul_(0.5)  # normal(0, 0.01)
            self.predictor[2].bias.fill_(-2.0)

    def forward(self, x: Tensor, start: Tensor | None = None) -> Field:  # x: B T D, start: B
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.fiber.weight.dtype)
            phi = self.fiber(x)  # B T f
            wide = torch.promote_types(x.dtype, torch.float32)  # what follows is never in half precision
            dh_raw = F.softplus(self.predictor(torch.cat([x, phi], -1)).squeeze(-1).to(wide))  # B T
            dh = dh_raw.clamp(0, 1)
            h = ema(dh, self.momentum, start).clamp(0, 10)
            log_g = F.logsigmoid(-self.scale.abs() * h).clamp(min=math.log(1e-8))
        return Field(log_g, h, dh, dh_raw, phi.to(wide))


def add_key_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Extend q, k, v [B, H, T, K] by two channels so that q'.k' scale = q.k scale + bias_j, with `bias` [B, T].

    No mask is held, and the fast causal kernel stays usable; a float mask that needs a gradient would rule it out.
    Two channels carry the bias and what rounding it to the dtype of k lost.
    """
    B, H, T, _ = k.shape
    high = (bias / scale).to(k.dtype)
    low = (bias / scale - high).to(k.dtype)
    extra = torch.stack([high, low], -1)[:, None].expand(B, H, T, 2)
    return torch.cat([q, torch.ones_like(q[..., :2])], -1), torch.cat([k, extra], -1), F.pad(v, (0, 2))


class Block(nn.Module):
    """Pre-norm attention and FFN; with a control field unless `field` is None (the baseline)."""

    def __init__(self, args: Args, d_ff: int, field: ControlField | None):
        super().__init__()
        self.heads, self.dropout, self.rule = args.n_heads, args.dropout, args.curvature
        self.norm1, self.norm2 = nn.LayerNorm(args.d_model), nn.LayerNorm(args.d_model)
        self.qkv = nn.Linear(args.d_model, 3 * args.d_model, bias=False)
        self.out = nn.Linear(args.d_model, args.d_model, bias=False)
        self.up, self.down = nn.Linear(args.d_model, d_ff), nn.Linear(d_ff, args.d_model)
        self.field = field
        if field is not None and self.rule != "off":
            self.curv_scale = nn.Parameter(torch.tensor(float(args.lambda_curv)))

    def attention(self, x: Tensor, log_g: Tensor | None, cache: dict | None) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each B H T K
        scale, mask = (D // self.heads) ** -0.5, None
        if log_g is not None:
            q, k, v = add_key_bias(q, k, v, log_g, scale)
        if cache is not None:
            k, v = (torch.cat([cache[n], t], 2) if n in cache else t for n, t in (("k", k), ("v", v)))
            cache["k"], cache["v"] = k, v
            mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=mask is None, scale=scale)
        return self.out(y[..., : D // self.heads].transpose(1, 2).reshape(B, T, D))

    def forward(self, x: Tensor, gate: bool = True, cache: dict | None = None) -> tuple[Tensor, Field | None, Tensor]:
        """x [B, T, D] -> (x, the field, the curvature [B, T]). `gate=False` leaves log g out of the scores."""
        normed, field, kappa = self.norm1(x), None, None
        if self.field is not None:
            field = self.field(normed, cache.get("h") if cache else None)
        log_g = field.log_g if field and gate else None
        x = x + self.attention(normed, log_g, cache)
        hidden = F.dropout(F.gelu(self.up(self.norm2(x))), self.dropout, self.training)  # B T F
        if field and self.rule != "off":
            kappa = curvature(field.phi, self.rule, cache.get("phi") if cache else None)
            hidden = hidden * torch.sigmoid(1 - self.curv_scale.abs() * kappa)[..., None].to(hidden.dtype)
        if cache is not None and field:
            phi = torch.cat([cache["phi"], field.phi], 1) if "phi" in cache else field.phi
            cache["h"], cache["phi"] = field.h[:, -1], phi[:, -2:]
        return x + F.dropout(self.down(hidden), self.dropout, self.training), field, kappa


class LanguageModel(nn.Module):
    """Token and learned position embeddings, pre-norm blocks, tied head: 51,608,344 parameters with control fields
    and 51,197,440 without, at the documented sizes."""

    def __init__(self, args: Args, vocab_size: int, arm: str):
        super().__init__()
        self.args, self.vocab_size, with_field = args, vocab_size, arm == "cf_hot"
        sizes = (args.d_model, args.d_fiber, args.d_control, args.momentum, args.lambda_gate)
        d_ff = args.d_ff
        if args.match_params and not with_field:  # a hidden unit costs 2D + 1; keep the width a multiple of 16
            extra = sum(p.numel() for p in ControlField(*sizes).parameters()) + (args.curvature != "off")
            d_ff += 16 * round(extra / (2 * args.d_model + 1) / 16)
        self.tokens = nn.Embedding(vocab_size, args.d_model)
        self.positions = nn.Embedding(args.seq_len, args.d_model)
        self.blocks = nn.ModuleList(
            Block(args, d_ff, ControlField(*sizes) if with_field else None) for _ in range(args.n_layers)
        )
        self.norm = nn.LayerNorm(args.d_model)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, gate: bool = True, cache: list | None = None):
        """input_ids [B, T] -> logits [B, T, V], position t predicting token t + 1; or, given labels [B, T] (shifted
        here), `loss` with the regularisers, `lm_loss` alone, and no logits, which the loss never holds whole.

        `fields` and `curvatures` come along for evaluation. `cache`: see `new_cache`.
        """
        past = cache[0]["k"].shape[2] if cache and cache[0] else 0
        positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        x = F.dropout(self.tokens(input_ids) + self.positions(positions), self.args.dropout, self.training)
        fields, kappas = [], []
        for i, block in enumerate(self.blocks):
            x, field, kappa = block(x, gate, cache[i] if cache else None)
            fields += [field] if field else []
            kappas += [kappa] if kappa is not None else []
        x = self.norm(x)
        out = {"fields": fields, "curvatures": kappas}
        if labels is None:
            return out | {"logits": F.linear(x, self.tokens.weight)}
        out["loss"] = out["lm_loss"] = core.next_token_loss(x, self.tokens.weight, labels)
        if fields:
            out["loss"] = out["loss"] + self.args.lambda_hol * torch.stack([f.dh_raw.mean() for f in fields]).mean()
        if kappas:
            out["loss"] = out["loss"] + self.args.lambda_curv_loss * torch.stack([k.mean() for k in kappas]).mean()
        return out

    def new_cache(self) -> list[dict]:
        """Per layer, filled by `forward`: keys and values [B, H, T, K + 2], the field's last h, the last two fibers."""
        if self.args.curvature == "centered" and self.blocks[0].field is not None:
            raise ValueError("--curvature centered reads the next token: nothing can be generated step by step")
        return [{} for _ in self.blocks]

    @torch.no_grad()
    def generate(self, ids: Tensor, new_tokens: int) -> Tensor:
        """Greedy continuation of `ids` [B, P] by up to `new_tokens` (the position table ends at seq_len)."""
        cache, step = self.new_cache(), ids
        for _ in range(min(new_tokens, self.args.seq_len - ids.shape[1])):
            step = self(step, cache=cache)["logits"][:, -1:].argmax(-1)
            ids = torch.cat([ids, step], 1)
        return ids


def build_model(args: Args, vocab_size: int = 50257, arm: str = "cf_hot") -> LanguageModel:
    """The model of one arm, `cf_hot` or `baseline`, initialised from --seed; tensors both arms have start equal."""
    model = LanguageModel(args, vocab_size, arm)
    core.init_normal(model, args.seed)
    for block in model.blocks:
        if block.field is not None:
            block.field.reset()
    return model


# ----------------------------------------------------------------------------------------------------------- data
class Data(NamedTuple):
    train: "core.np.ndarray"  # N T
    validation: "core.np.ndarray"  # N T
    vocab_size: int
    words: int  # whitespace-separated words of the validation text, 0 where there are none
    tokenizer: object


def load_data(args: Args) -> Data:
    if args.data == "iid":
        train, validation = (
            torch.randint(args.vocab_size, (n, args.seq_len), generator=core.generator(args.seed, p))
            for n, p in ((8192, "train"), (512, "eval"))
        )
        return Data(train.numpy(), validation.numpy(), args.vocab_size, 0, None)
    texts = [core.load_text(args.data, split, args.data_path) for split in ("train", "validation")]
    tokenizer = core.load_tokenizer(args.tokenizer, texts[0], args.vocab_size)
    train, validation = (
        core.blocks(core.encode(t, tokenizer), args.seq_len, f"--data {args.data} {args.data_path}") for t in texts
    )
    return Data(train, validation, len(tokenizer), sum(len(line.split()) for line in texts[1]), tokenizer)


# ------------------------------------------------------------------------------------------------------- evaluate
def field_stats(fields: list[Field]) -> Tensor:
    """[gate, holonomy, spread, saturated, in band, least gate, largest gate] of one batch, over all layers. Spread is
    the standard deviation of log g over positions from 16 on: without variation the gate is a no-op at any mean."""
    log_g, dh = torch.stack([f.log_g for f in fields]), torch.stack([f.dh for f in fields])  # L B T
    g, late = log_g.exp(), log_g[..., min(16, log_g.shape[-1] // 2) :]
    in_band = ((g >= 0.2) & (g <= 0.8)).float()
    spread = late.std(-1, correction=0)
    return torch.stack([g.mean(), dh.mean(), spread.mean(), (dh >= 1).float().mean(), in_band.mean(), g.min(), g.max()])


@torch.no_grad()
def evaluate(model, data: Data, args: Args, accelerator, gate: bool = True) -> dict:
    """Token-weighted validation loss over the first --eval_batches batches, always the same, and the field's state.

    Returns `loss`, `batches` (each batch's loss) and, of a model with control fields, their statistics."""
    from accelerate.utils import gather_object

    model.eval()
    rows, results = data.validation[: args.eval_batches * args.batch_size or None], []
    starts = range(0, len(rows), args.batch_size)[accelerator.process_index :: accelerator.num_processes]
    for start in starts:
        ids = torch.from_numpy(rows[start : start + args.batch_size].astype("int64")).to(accelerator.device)
        out = model(ids, labels=ids, gate=gate)
        stats = field_stats(out["fields"]) if out["fields"] else ids.new_zeros(0, dtype=torch.float32)
        results.append(torch.cat([out["lm_loss"].float()[None], stats]))
    model.train()
    results = torch.stack(results).tolist() if results else []
    results = torch.tensor(gather_object([[s, *r] for s, r in zip(starts, results)]), dtype=torch.float64)
    results = results[results[:, 0].argsort()]  # batches in their order, whatever process had them
    weight = (len(rows) - results[:, 0]).clamp(max=args.batch_size) / len(rows)  # the last batch may be short
    means = weight @ results
    found = {"loss": float(means[1]), "batches": results[:, 1].tolist(), "windows": len(rows)}
    if results.shape[1] > 2:
        names = ("gate", "holonomy_mean", "gate_spread", "sat_frac", "frac_in_band")
        found |= dict(zip(names, means[2:7].tolist()))
        found |= {"gate_min": float(results[:, 7].min()), "gate_max": float(results[:, 8].max())}
    return found


@torch.no_grad()
def lookahead_nats(model, data: Data, args: Args, device, positions: int = 16, windows: int = 4) -> float:
    """How much the loss of a token rises when the tokens after it are replaced by random ones: 0 for a causal model,
    the size of the leak, in nats, for one that reads ahead. Mean over `positions` of each of `windows`."""
    model.eval()
    g, T, gain = core.generator(args.seed, "lookahead"), args.seq_len, []
    at = torch.linspace(0, T - 3, min(positions, T - 2)).long()  # t: the position whose prediction is scored
    for row in data.validation[:windows]:
        ids = torch.from_numpy(row.astype("int64")).expand(len(at), T)
        labels = torch.full((len(at), T), -100).scatter(1, at[:, None] + 1, ids.gather(1, at[:, None] + 1))
        # the target itself is the model's future too: everything after t is replaced, the label stays
        future = torch.arange(T) > at[:, None]
        blind = torch.where(future, torch.randint(data.vocab_size, ids.shape, generator=g), ids)
        seen, unseen = (model(x.to(device), labels=labels.to(device))["lm_loss"] for x in (ids, blind))
        gain.append(unseen - seen)
    model.train()
    return float(torch.stack(gain).mean())


@torch.no_grad()
def sample(model, data: Data, args: Args, device) -> list[dict]:
    """Greedy continuations of two validation windows, step by step, for a person to read."""
    if data.tokenizer is None or args.curvature == "centered":
        return []
    model.eval()
    prompts = torch.from_numpy(data.validation[:2, : args.seq_len // 4].astype("int64"))
    ids = model.generate(prompts.to(device), min(64, args.seq_len // 2)).tolist()
    model.train()
    cut, text = prompts.shape[1], data.tokenizer.decode
    return [{"prompt": text(row[:cut]), "continuation": text(row[cut:])} for row in ids]


# ---------------------------------------------------------------------------------------------------------- train
def find_checkpoint(arm: str, args: Args, run: core.Run) -> dict | None:
    """The state to resume `arm` from: the file that --resume names if it is of this arm, else the newest valid one."""
    if args.resume not in ("", "auto"):
        state = core.load_checkpoint(Path(args.resume))
        require("arm" in state, f"{args.resume}: not a checkpoint of this script")
        if state["arm"] == arm:
            return state
    return core.latest_checkpoint(run.dir, f"{arm}_step_*.pt", run.say) if args.resume else None


def train(arm: str, args: Args, data: Data, run: core.Run, accelerator, stop_requested) -> dict:
    """Train one arm, from --seed or from its checkpoint; returns what the result file says of it."""
    label = {"cf_hot": "CF-HoT", "baseline": "Baseline"}[arm]
    saved = find_checkpoint(arm, args, run)
    if saved:
        require(
            saved["format_version"] == 2,
            "--resume: an earlier version of this script wrote that checkpoint, "
            "without the fingerprint of its data; start afresh with --overwrite",
        )
        core.check_same_config(saved["config"], args, FREE)
        if saved["step"] >= args.max_steps and saved["outcome"]:
            run.say(f"[Resume] {label}: already trained to step {saved['step']}")
            return saved["outcome"]
        require(saved["step"] < args.max_steps, f"--max_steps {args.max_steps} is not beyond the saved {saved['step']}")
    elif args.resume:
        run.forget(arm=arm)

    model = build_model(args, data.vocab_size, arm).to(accelerator.device)
    parameters = sum(p.numel() for p in model.parameters())
    run.say(f"[{label.replace('-', '')}] Parameters: {parameters:,}")
    run.say(f"[{label.replace('-', '')}] Control Field: {'ENABLED' if arm == 'cf_hot' else 'DISABLED'}")
    audit = core.causality_audit(model, data.vocab_size, args.seq_len)
    run.say(f"[Audit] {label}: largest change of a logit by a later token: {audit:.1e}")
    require(
        audit <= 1e-5 or args.curvature == "centered",
        f"{label} reads the future ({audit:.1e}): not trained",
        core.CHECK_FAILED,
    )

    if saved:
        model.load_state_dict(saved["model_state_dict"])
    core.shard(model, accelerator, model.blocks)
    optimizer = torch.optim.AdamW(core.decay_groups(model, 0.1), lr=args.lr, betas=(0.9, 0.95), fused=True)
    model, optimizer = core.prepare(model, optimizer, accelerator)
    plain = accelerator.unwrap_model(model)
    history = {k: [] for k in "train_loss val_loss val_ppl holonomy gate holonomy_mean gate_spread sat_frac".split()}
    step, seconds, losses = 0, 0.0, torch.zeros(2, device=accelerator.device)  # losses: sum, micro-batches
    skipped = torch.zeros(2, device=accelerator.device)
    seen = torch.zeros((), dtype=torch.int64, device=accelerator.device)  # fingerprint of all windows, in order
    places = torch.arange(1, args.batch_size * args.seq_len + 1, device=accelerator.device).view(args.batch_size, -1)
    torch.manual_seed(core.derived_seed(args.seed, "dropout", accelerator.process_index))  # equal for both arms
    if saved:
        core.load_optimizer(optimizer, saved["optimizer_state_dict"])
        if accelerator.scaler and saved["scaler_state_dict"]:
            accelerator.scaler.load_state_dict(saved["scaler_state_dict"])
        step, history, seconds = saved["step"], saved["history"], saved["seconds"]
        losses, skipped, seen = (saved[k].to(v) for k, v in (("losses", losses), ("skipped", skipped), ("seen", seen)))
        run.rewind(saved["log_size"])
        core.set_rng_state(saved["rng_state"], accelerator)
        run.say(f"[Resume] {label}: from step {step}")

    def record_evaluation() -> dict:
        with core.whole(plain):
            found = evaluate(plain, data, args, accelerator)
        values = {"val_loss": found["loss"], "val_ppl": core.perplexity(found["loss"])}
        values |= {k: found[k] for k in ("gate_spread", "sat_frac") if k in found}
        for name, value in values.items():
            history[name].append([step, value])
        core.check_finite(found["loss"], f"{label}'s validation loss at step {step}")
        run.say(f"[Eval] {label}: Val Loss = {found['loss']:.4f}, PPL = {values['val_ppl']:.2f}")
        run.log(arm=arm, step=step, **values)
        return found

    def save(outcome: dict | None = None) -> None:
        state = {
            "format_version": 2,
            "arm": arm,
            "step": step,
            "config": vars(args),
            "history": history,
            "model_state_dict": core.full_state(plain),
            "optimizer_state_dict": core.gathered(optimizer.state_dict()),
            "scaler_state_dict": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "rng_state": core.rng_state(accelerator),
            "losses": accelerator.reduce(losses, "mean"),
            "skipped": skipped,
            "seen": seen,
            "seconds": seconds,
            "log_size": run.log_size(),
            "outcome": outcome,
        }
        path = run.dir / f"{arm}_step_{step}.pt"
        if run.main:
            core.save_checkpoint(path, state)
        run.say(f"[Save] Checkpoint: {path}")

    if step == 0:
        found = record_evaluation()
    ahead = range(step, args.max_steps)
    stream = core.batches(data.train, args.batch_size, args.seed, ahead, accelerator, args.num_workers)
    bar, clock = run.progress(args.max_steps, step, label), time.perf_counter()
    while step < args.max_steps:
        before, update = step, step // args.grad_accum
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (update + 1) / max(1, args.warmup_steps))
        micro = min(args.grad_accum, args.max_steps - step)  # the last group may be short
        for i in range(micro):
            ids = next(stream)  # B T
            seen = (seen * 1_000_003 + (ids * places).sum()) % (2**31 - 1)
            with accelerator.no_sync(model) if i < micro - 1 else contextlib.nullcontext():
                out = model(ids, labels=ids)
                accelerator.backward(out["loss"] / micro)
            losses = core.add_loss(losses, out["lm_loss"])
        norm = core.clip_gradients(model.parameters(), 1.0, accelerator)
        skipped = core.guard_step(optimizer, norm, skipped, accelerator.scaler)
        optimizer.step()
        optimizer.zero_grad()
        step += micro
        bar.update(micro)

        logging, evaluating, saving = (
            step // interval > before // interval or step == args.max_steps
            for interval in (args.log_interval, args.eval_interval, args.save_interval)
        )
        if logging:
            core.check_skipped(skipped)
            total, count = accelerator.reduce(losses, "sum").tolist()
            losses = torch.zeros_like(losses)
            row = {"train_loss": total / max(1, count)}
            line = f"Step {step:5d} | Loss: {row['train_loss']:.4f} | PPL: {core.perplexity(row['train_loss']):.2f}"
            if out["fields"]:
                dh, g = (torch.stack([f[i].detach().float() for f in out["fields"]]) for i in (2, 0))  # L B T
                sums = torch.stack([dh.sum(), g.exp().sum(), torch.tensor(dh.numel()).to(dh)])
                holonomy, gate, n = accelerator.reduce(sums, "sum").tolist()
                row |= {"holonomy": holonomy, "gate": gate / n, "holonomy_mean": holonomy / n}
                line += f" | Holonomy: {holonomy:.2f} | Gate: {row['gate']:.3f}"
            for name, value in row.items():
                history[name].append([step, value])
            run.say(line)
            run.log(arm=arm, step=step, grad_norm=float(norm), lr=optimizer.param_groups[0]["lr"], **row)
        stopping, last = stop_requested(), step == args.max_steps
        if evaluating or saving or stopping:
            seconds += time.perf_counter() - clock
            if evaluating:
                found = record_evaluation()
            if not last and (saving or stopping):
                save()
            if stopping and not last:
                where = f"interrupted at step {step} of {label}; continue with --resume auto"
                raise core.Failure(where, 128 + stopping)
            clock = time.perf_counter()

    outcome = {"parameters": parameters, "history": history, "final": found, "causality_max_abs_diff": audit}
    outcome |= {"gate_effect": None, "nonfinite_steps": core.check_skipped(skipped), "time_s": seconds}
    with core.whole(plain):
        if arm == "cf_hot":
            outcome["gate_effect"] = evaluate(plain, data, args, accelerator, gate=False)["loss"] - found["loss"]
        outcome["lookahead_nats"] = lookahead_nats(plain, data, args, accelerator.device)
        outcome["samples"] = sample(plain, data, args, accelerator.device)
    tokens = args.max_steps * args.batch_size * accelerator.num_processes * args.seq_len
    outcome |= {"fingerprint": int(seen), "tokens": tokens, "tokens_per_s": tokens / seconds}
    outcome["peak_mem_bytes"] = core.peak_memory()
    save(outcome)
    return outcome


# ----------------------------------------------------------------------------------------------------------- main
def criteria(cf: dict, base: dict | None) -> dict:
    """The document's four criteria, which an inert gate can meet as well, and two that it cannot. None: no data."""
    late = [v for _, v in cf["history"]["holonomy_mean"]]
    late = torch.tensor(late[-max(5, len(late) // 5) :] if len(late) >= 5 else [], dtype=torch.float64)
    stable = bool(late.isfinite().all() and late.std() / late.mean().clamp(min=1e-12) < 0.25) if len(late) else None
    final = cf["final"]
    return {
        "ppl_better": final["loss"] < base["final"]["loss"] if base else None,
        "gate_in_range": 0.2 <= final["gate"] <= 0.8,
        "holonomy_stable": stable,
        "holonomy_nonzero": final["holonomy_mean"] > 1e-3,
        "holonomy_not_exploding": final["sat_frac"] < 0.5,
        "gate_active": final["gate_spread"] > 1e-3 and abs(cf["gate_effect"]) > 1e-4,
    }


def summarise(arms: dict[str, dict], args: Args, data: Data) -> dict:
    """The result file: the document's keys, then what tells whether its claim holds."""
    cf, base = arms["cf_hot"], arms.get("baseline")
    ppl = {name: core.perplexity(arm["final"]["loss"]) for name, arm in arms.items()}
    empty = {"train_loss": [], "val_loss": [], "val_ppl": []}
    final = {
        "cf_hot_ppl": ppl["cf_hot"],
        "baseline_ppl": ppl.get("baseline"),
        "cf_hot_loss": cf["final"]["loss"],
        "baseline_loss": base["final"]["loss"] if base else None,
        "improvement_pct": None,
    }
    final |= {
        k: cf["final"][k]
        for k in ("gate", "gate_min", "gate_max", "gate_spread", "holonomy_mean", "sat_frac", "frac_in_band")
    } | {"gate_effect": cf["gate_effect"]}
    if base:
        pairs = [b - c for b, c in zip(base["final"]["batches"], cf["final"]["batches"])]
        final["improvement_pct"] = 100 * (ppl["baseline"] - ppl["cf_hot"]) / ppl["baseline"]
        final["loss_gain"] = core.bootstrap(pairs)  # baseline minus CF-HoT, paired over batches
    for name, arm in arms.items():
        final[f"{name}_loss_interval"] = core.bootstrap(arm["final"]["batches"])
    if data.words and cf["final"]["windows"] == len(data.validation):
        scored = len(data.validation) * (args.seq_len - 1)
        for name, arm in arms.items():
            final[f"{name}_word_ppl"] = core.perplexity(arm["final"]["loss"] * scored / data.words)
    counts = {name: arm["parameters"] for name, arm in arms.items()}
    overhead = 100 * (counts["cf_hot"] / counts["baseline"] - 1) if base else None
    shared = (
        "causality_max_abs_diff",
        "lookahead_nats",
        "time_s",
        "tokens",
        "tokens_per_s",
        "peak_mem_bytes",
        "nonfinite_steps",
        "samples",
    )
    result = {"cf_hot": cf["history"], "final": final, "criteria": criteria(cf, base)}
    result["baseline"] = {k: base["history"][k] for k in empty} if base else empty
    result["params"] = {"baseline": None, **counts, "overhead_pct": overhead}
    result |= {key: {name: arm[key] for name, arm in arms.items()} for key in shared}
    result["causality_max_abs_diff"] = max(arm["causality_max_abs_diff"] for arm in arms.values())
    result["valid"] = result["causality_max_abs_diff"] <= 1e-5
    result["data"] = {
        "source": args.data,
        "path": args.data_path,
        "train_windows": len(data.train),
        "validation_windows": cf["final"]["windows"],
        "vocab_size": data.vocab_size,
    }
    result["data"]["fingerprint"] = {name: arm["fingerprint"] for name, arm in arms.items()}  # of the first process
    if args.data == "iid":
        result["data"]["entropy_floor_nats"] = math.log(args.vocab_size)
    return result | {"config": vars(args)}


def report(result: dict, run: core.Run) -> None:
    final = result["final"]
    run.say(f"\nCF-HoT Final PPL: {final['cf_hot_ppl']:.2f}")
    if final["baseline_ppl"] is not None:
        gain = final["loss_gain"]
        run.say(f"Baseline Final PPL: {final['baseline_ppl']:.2f}\nImprovement: {final['improvement_pct']:.2f}%")
        run.say("Loss gain: {mean:+.4f} nats, 95 % interval [{lo:+.4f}, {hi:+.4f}] over batches".format(**gain))
    run.say(f"Gate effect: {final['gate_effect']:+.5f} nats (loss without the gate minus loss with it)")
    for name, met in result["criteria"].items():
        run.say(f"  {name:24s} {'no data' if met is None else 'yes' if met else 'no'}")
    run.say("  (an inert gate can meet all of the document's criteria but the first: see gate_active)")
    if not result["valid"]:
        run.say("INVALID: this model reads the tokens it is scored on; its losses mean nothing")
    run.say(f"[Save] Results: {run.result}")


def plan_of(args: Args, data: Data, accelerator) -> dict:
    """What a run will be: parameters, tokens, memory and (--dry_run) time of each arm."""
    plan = {"updates": -(-args.max_steps // args.grad_accum), "train_windows": len(data.train)}
    plan["tokens"] = args.max_steps * args.batch_size * args.seq_len * accelerator.num_processes
    for arm in ("cf_hot",) if args.no_baseline else ("cf_hot", "baseline"):
        with torch.device("meta"):
            model = build_model(args, data.vocab_size, arm)
        half = accelerator.mixed_precision != "no"
        memory = core.memory_estimate(model, args.batch_size * args.seq_len, args.d_model, args.n_layers, half)
        plan[arm] = {"parameters": sum(p.numel() for p in model.parameters()), "memory_gb": memory}
        if args.dry_run:
            plan[arm]["time"] = core.time_estimate(
                model,
                lambda device, arm=arm: build_model(args, data.vocab_size, arm).to(device),
                lambda model, ids: model(ids, labels=ids)["loss"],
                data.vocab_size,
                args.batch_size,
                args.seq_len,
                args.max_steps,
                accelerator,
            )
    return plan


def main(argv=None) -> dict:
    args = parse(argv)
    accelerator = core.engine(args)
    data = load_data(args)
    plan = plan_of(args, data, accelerator)
    if args.dry_run:
        print(json.dumps(plan, indent=1))
        return plan
    outputs = ("cf_hot_step_*.pt", "baseline_step_*.pt")
    with core.Run(args, args.output_dir, accelerator, "phase_a_results.json", outputs) as run:
        size, memory = f"{args.grad_accum} x {args.batch_size} x {args.seq_len}", plan["cf_hot"]["memory_gb"]["total"]
        run.say(f"{args.max_steps} micro-batches = {plan['updates']} updates of {size} tokens, about {memory:.1f} GB")
        if args.curvature == "centered":
            run.say("WARNING: --curvature centered reads the next token; the results will be marked invalid")
        if args.lr > 1e-4 and accelerator.mixed_precision == "fp16":
            run.say("WARNING: the document saw NaN above --lr 1e-4 in fp16")
        with core.stop_signal(accelerator) as stop_requested:
            names = ("cf_hot",) if args.no_baseline else ("cf_hot", "baseline")
            arms = {arm: train(arm, args, data, run, accelerator, stop_requested) for arm in names}
        result = run.finish(summarise(arms, args, data))
        report(result, run)
    return result


if __name__ == "__main__":
    core.cli(main, "--batch_size (and raise --grad_accum), --seq_len or --d_model")
