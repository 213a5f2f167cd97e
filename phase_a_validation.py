"""CF-HoT, phase A: does a learned "control field" on the attention lower the loss of a 50M language model?

In every layer a small MLP reads position t and predicts a non-negative increment; its moving average is the field h,
and the log of the gate is added to the scores of key position j, for every query i >= j:

    dh_t = clamp(softplus(MLP[x_t; W_f x_t]), 0, 1)        h_t = a h_{t-1} + (1 - a) dh_t
    g_t  = sigmoid(-|lambda| h_t) <= 1/2                   score_ij = q_i . k_j / sqrt(d_head) + log g_j
    FFN(x_t) = W_b (sigmoid(1 - |lambda_k| kappa_t) * GELU(W_a x_t))        kappa_t: curvature of W_f x, causal here

"Holonomy" is the document's name for dh, a learned scalar; nothing geometric is computed. The published curvature
reads the next token (--curvature centered); only differences of log g between keys matter. --bias and --curvature also
name the controls: a gate of other keys, ALiBi's fixed decay, a forget gate, a constant factor, a short convolution.

Smoke test   python phase_a_validation.py --test                                              CPU, offline, 20 s
Document     python phase_a_validation.py --output_dir ./results/phase_a --batch_size 16 --max_steps 10000 --lr 1e-4
Offline      python phase_a_validation.py --data local --tokenizer local --d_model 128 --n_layers 4 --n_heads 4 \\
                 --d_ff 512 --seq_len 128 --max_steps 600 --grad_accum 1 --lr 1e-3           one core, 8 minutes
All arms     bash scripts/cfhot_arms.sh                                                   one core, 3 hours
Expect       two losses within a few per cent of each other, not the published 2.53 against 53.00: docs/cfhot.md
"""

import dataclasses
import functools
import json
import math
from typing import Literal, NamedTuple

import numpy as np
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
    curvature: Literal["causal", "off", "centered", "frozen", "conv"] = arg(
        "causal", "the FFN's factor. centered: published, reads ahead; frozen: constant; conv: 3 taps", "control field"
    )
    bias: Literal["field", "shuffled", "alibi", "forget", "none"] = arg(
        "field", "what a key's score gets. shuffled: an earlier key's gate; alibi, forget: rivals", "control field"
    )
    data: Literal["wikitext103", "wikitext2", "text", "local", "synthetic", "iid"] = arg(
        "wikitext103", "hub sets; text: --data_path; local: prose of the Python library; iid: uniform tokens", "data"
    )
    data_path: str = arg("", "file or folder for --data text; unset: not used", "data")
    tokenizer: str = arg("gpt2", "hub name, directory, byte, or local (BPE trained on the training text)", "data")
    vocab_size: int = arg(4096, "entries of --tokenizer local; number of symbols of --data iid", "data")
    tuning_windows: int = arg(0, "validation windows set aside for choosing a rate, reported as tuning_loss", "data")
    against: str = arg("", "result file of a run whose loss minus this one's is the gain; unset: none", "data")
    num_workers: int = arg(4, "loader processes (at most the number of cores less one)", "data")


TEST = dict(d_model=64, n_layers=2, n_heads=2, d_ff=128, seq_len=64, d_fiber=8, d_control=16, batch_size=8, lr=3e-3)
TEST |= dict(max_steps=60, eval_interval=20, save_interval=30, log_interval=10, eval_batches=4)
TEST |= dict(data="synthetic", tokenizer="byte", num_workers=0, device="cpu", threads=1)

FREE = ("output_dir", "eval_interval", "save_interval", "log_interval", "num_workers")  # may differ when a run goes on
LENGTH = "max_steps"  # a larger one continues a finished run
LABELS = {"cf_hot": "CF-HoT", "baseline": "Baseline"}  # the arms, trained in this order
FIGURES = ("steps", "tokens", "tokens_per_s", "train_seconds", "nonfinite_steps", "peak_mem_bytes")  # of core.Loop


def parse(argv=None) -> Args:
    args = core.parse_args(Args, TEST, argv, __doc__)
    core.require_positive(args, "batch_size max_steps grad_accum eval_interval save_interval log_interval")
    core.require_positive(args, "d_model n_layers n_heads d_ff d_fiber d_control")
    require(args.d_model % args.n_heads == 0, f"--d_model {args.d_model} is not divisible by --n_heads {args.n_heads}")
    require(0 <= args.momentum < 1, f"--momentum {args.momentum} is not in [0, 1): 1 would never forget")
    require(0 <= args.dropout < 1, f"--dropout {args.dropout} is not in [0, 1)")
    require(args.lr > 0, "--lr must be positive")
    counts = min(args.warmup_steps, args.eval_batches, args.tuning_windows)
    require(counts >= 0, "--warmup_steps, --eval_batches and --tuning_windows must not be negative")
    require(args.seq_len >= 3, "--seq_len must be at least 3")
    alone = args.bias in ("field", "shuffled") or args.curvature in ("off", "frozen")
    require(alone, f"--bias {args.bias} has no fiber for --curvature {args.curvature}: use --curvature off")
    require(args.no_baseline or not args.against, "--against takes the place of the baseline: add --no_baseline")
    require(args.data != "iid" or args.vocab_size >= 2, "--data iid needs --vocab_size 2 or more")
    return args


# ---------------------------------------------------------------------------------------------------------- model
def ema(x: Tensor, momentum: float, start: Tensor | None = None) -> Tensor:
    """h_t = a h_{t-1} + (1 - a) x_t over the last axis of `x` [B, T], from h_{-1} = `start` [B] (zero). One product
    with the matrix a^(t - i) up to T = 1024; longer inputs are cut into chunks of 128, each of which goes on from the
    end of the one before, so the cost is O(T). ValueError unless 0 <= momentum < 1."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum {momentum} is not in [0, 1)")
    T, chunks = x.shape[1], []
    start = torch.zeros_like(x[:, 0]) if start is None else start
    if T == 1:  # a decoding step
        return torch.lerp(x, start[:, None], momentum)
    for chunk in x.split(T if T <= 1024 else 128, 1):
        kernel, decay = ema_kernel(chunk.shape[1], momentum, x.device, x.dtype)
        chunks.append(chunk @ kernel.T + start[:, None] * decay)
        start = chunks[-1][:, -1]
    return torch.cat(chunks, 1)


@functools.lru_cache(8)
def ema_kernel(T: int, momentum: float, device, dtype) -> tuple[Tensor, Tensor]:
    """((1 - a) a^(t - i) for i <= t, else 0 [T, T]; a^(t + 1) [T])."""
    steps = torch.arange(T, device=device)
    power = (steps[:, None] - steps).clamp(min=0)  # never negative, so no power overflows
    return ((1 - momentum) * momentum ** power.to(dtype)).tril(), momentum ** (steps + 1).to(dtype)


def curvature(phi: Tensor, rule: str) -> Tensor:
    """kappa [B, T] of the fiber path `phi` [B, T, f]. `causal`: |phi_t - phi_{t-2}| / 2, with |phi_1 - phi_0| at t = 1
    and 0 at t = 0. `centered`, the published rule: |phi_{t+1} - phi_{t-1}| / 2, which reads the next token."""
    if rule == "centered":
        return _norm(torch.gradient(phi, dim=1)[0]) if phi.shape[1] > 1 else phi.new_zeros(phi.shape[:2])
    first, second = torch.zeros_like(phi[:, :1, 0]), _norm(phi[:, 1:2] - phi[:, :1])  # B 1
    return torch.cat([first, second, _norm(phi[:, 2:] - phi[:, :-2]) / 2], 1)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last axis; the small number keeps its gradient finite at zero."""
    return (x.square().sum(-1) + 1e-12).sqrt()


class Field(NamedTuple):
    """What a control field computes, each [B, T] in fp32 but `phi` [B, T, f]. 0 < g <= 1/2, 0 <= dh, h <= 1."""

    log_g: Tensor
    h: Tensor
    dh: Tensor
    dh_raw: Tensor  # before the clamp at 1, whose gradient is zero: the regulariser still reaches a saturated position
    phi: Tensor


class ControlField(nn.Module):
    """The scalar field of the module docstring, in fp32 whatever the model's precision. h is a mean of values in
    [0, 1], so the documented clamp at 10 never acts; g <= 1/2, so any |lambda| <= 1.386 meets the band 0.2 to 0.8."""

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

    def forward(self, x: Tensor, start: Tensor | None = None) -> Field:  # x: B T D, start: B, the h before x
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
    """Extend q, k, v [B, H, T, K] by two channels so that q'.k' scale = q.k scale + bias_j, with `bias` [B or 1, H or
    1, T]. No mask is held, so the fast causal kernel stays usable. The second channel carries what rounding lost."""
    B, H, T, _ = k.shape
    high = (bias / scale).to(k.dtype)
    low = (bias / scale - high).to(k.dtype)
    extra = torch.stack([high, low], -1).expand(B, H, T, 2)
    return torch.cat([q, torch.ones_like(q[..., :2])], -1), torch.cat([k, extra], -1), F.pad(v, (0, 2))


@functools.lru_cache(64)
def earlier(T: int, layer: int, device) -> Tensor:
    """Of each position an index drawn from 0 to it, by layer and position alone [T]."""
    draws = torch.rand(T, generator=core.generator(0, "shuffle", layer))
    return (draws * torch.arange(1, T + 1)).long().to(device)


def grown(cache: dict, name: str, new: Tensor, keep: int = 0) -> Tensor:
    """`new` [..., T, n] behind the positions that `cache` holds of it; `cache` then holds the last `keep`, or all."""
    whole = torch.cat([cache[name], new], -2) if name in cache else new
    cache[name] = whole[..., -keep:, :]
    return whole


class Block(nn.Module):
    """Pre-norm attention and FFN, with what --bias adds to a key's score and the factor of --curvature on the FFN."""

    def __init__(self, args: Args, d_ff: int, layer: int):
        super().__init__()
        D, self.heads, self.dropout, self.rule = args.d_model, args.n_heads, args.dropout, args.curvature
        self.bias, self.layer = args.bias, layer
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, d_ff), nn.Linear(d_ff, D)
        sizes = (D, args.d_fiber, args.d_control, args.momentum, args.lambda_gate)
        self.field = ControlField(*sizes) if self.bias in ("field", "shuffled") else None
        if self.bias == "forget":  # a network as large as the field, with an output for each head
            width = round((field_size(args) - self.heads) / (D + 1 + self.heads))
            self.forget = nn.Sequential(nn.Linear(D, width), nn.GELU(), nn.Linear(width, self.heads))
        if self.rule in ("causal", "centered"):
            self.curv_scale = nn.Parameter(torch.tensor(float(args.lambda_curv)))
        if self.rule == "conv":
            self.taps = nn.Parameter(torch.zeros(1, args.d_fiber, 3))  # of phi_{t-2}, phi_{t-1}, phi_t

    def key_bias(self, x: Tensor, field: Field | None, past: int, cache: dict) -> Tensor | None:
        """What is added to the score of each key [B or 1, H or 1, T], shared by all queries: log g, or of a rival. As
        softmax ignores what a query adds to all its keys, -slope (i - j) of ALiBi is slope j, and the forget gate's
        sum of log f from j + 1 to i is minus that from 0 to j (FoX, Lin et al. 2025)."""
        T = x.shape[1]
        if self.bias == "shuffled":
            log_g = grown(cache, "log_g", field.log_g[..., None])[..., 0]  # B past+T
            return log_g[:, earlier(past + T, self.layer, x.device)[past:]][:, None]
        if self.bias == "field":
            return field.log_g[:, None]
        if self.bias == "alibi":
            slopes = 2 ** (-8 * torch.arange(1, self.heads + 1, device=x.device) / self.heads)  # H
            return (slopes[:, None] * torch.arange(past, past + T, device=x.device))[None]
        if self.bias == "forget":
            log_f = F.logsigmoid(self.forget(x).to(torch.promote_types(x.dtype, torch.float32)))  # B T H
            return -grown(cache, "log_f", log_f).cumsum(1)[:, past:].transpose(1, 2)
        return None

    def attention(self, x: Tensor, bias: Tensor | None, past: int, cache: dict) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each B H T K
        scale = (D // self.heads) ** -0.5
        if bias is not None:
            q, k, v = add_key_bias(q, k, v, bias, scale)
        k, v = grown(cache, "k", k), grown(cache, "v", v)  # with the bias: B H past+T K+2, the queries at the end
        mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past) if past else None
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=not past, scale=scale)
        return self.out(y[..., : D // self.heads].transpose(1, 2).reshape(B, T, D))

    def forward(self, x: Tensor, gate: bool, past: int, cache: dict) -> tuple[Tensor, Field | None, Tensor | None]:
        """x [B, T, D], after `past` tokens in `cache` -> (x, the field, the curvature [B, T]). `gate=False` leaves the
        bias out of the scores."""
        normed, field, kappa, T = self.norm1(x), None, None, x.shape[1]
        if self.field is not None:
            field = self.field(normed, cache.get("h"))
            cache["h"], path = field.h[:, -1], grown(cache, "phi", field.phi, keep=2)  # path: B, up to 2 + T, f
        x = x + self.attention(normed, self.key_bias(normed, field, past, cache) if gate else None, past, cache)
        hidden = F.dropout(F.gelu(self.up(self.norm2(x))), self.dropout, self.training)  # B T F
        if self.rule in ("causal", "centered"):
            kappa = curvature(path, self.rule)[:, -T:]
            hidden = hidden * torch.sigmoid(1 - self.curv_scale.abs() * kappa)[..., None].to(hidden.dtype)
        elif self.rule == "conv":  # sees the positions that the causal curvature sees, without its norm
            mixed = F.conv1d(F.pad(path.transpose(1, 2), (2, 0)), self.taps)[..., -T:]  # B 1 T
            hidden = hidden * torch.sigmoid(1 + mixed).transpose(1, 2).to(hidden.dtype)
        elif self.rule == "frozen":
            hidden = hidden / (1 + math.exp(-1))
        return x + F.dropout(self.down(hidden), self.dropout, self.training), field, kappa


def field_size(args: Args) -> int:
    """Parameters of one layer's control field and curvature scale: what every other arm is given elsewhere."""
    D, f, c = args.d_model, args.d_fiber, args.d_control
    return D * f + f + (D + f + 1) * c + c + 3


class LanguageModel(nn.Module):
    """Token and learned position embeddings, pre-norm blocks, tied head: 51,608,344 parameters with control fields
    and 51,197,440 without, at the documented sizes."""

    def __init__(self, args: Args, vocab_size: int):
        super().__init__()
        self.args, d_ff = args, args.d_ff
        if args.match_params and args.bias in ("none", "alibi"):  # a hidden unit costs 2D + 1
            step = max(1, d_ff // 128)  # keeps the documented width a multiple of 16
            d_ff += step * round(field_size(args) / (2 * args.d_model + 1) / step)
        self.tokens = nn.Embedding(vocab_size, args.d_model)
        self.positions = nn.Embedding(args.seq_len, args.d_model)
        self.blocks = nn.ModuleList(Block(args, d_ff, layer) for layer in range(args.n_layers))
        self.norm = nn.LayerNorm(args.d_model)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, gate: bool = True, cache: list | None = None):
        """input_ids [B, T] -> logits [B, T, V], position t predicting token t + 1; or, given labels [B, T] (shifted
        here), `loss` with the regularisers and `lm_loss` alone, which never holds all logits. `fields`: one a layer.
        With a `cache`, input_ids go on from those it has seen."""
        past = cache[0]["k"].shape[2] if cache and cache[0] else 0
        end = past + input_ids.shape[1]
        if end > self.args.seq_len:
            raise ValueError(f"{end} tokens, but --seq_len {self.args.seq_len}")
        x = self.tokens(input_ids) + self.positions.weight[past:end]  # B T D
        x, fields, kappas = F.dropout(x, self.args.dropout, self.training), [], []
        for i, block in enumerate(self.blocks):
            x, field, kappa = block(x, gate, past, cache[i] if cache else {})
            fields += [field] if field else []
            kappas += [kappa] if kappa is not None else []
        x = self.norm(x)
        out = {"fields": fields}
        if labels is None:
            return out | {"logits": F.linear(x, self.tokens.weight)}
        out["loss"] = out["lm_loss"] = core.next_token_loss(x, self.tokens.weight, labels)
        if fields:
            out["loss"] = out["loss"] + self.args.lambda_hol * torch.stack([f.dh_raw.mean() for f in fields]).mean()
        if kappas:
            out["loss"] = out["loss"] + self.args.lambda_curv_loss * torch.stack([k.mean() for k in kappas]).mean()
        return out

    def new_cache(self) -> list[dict]:
        """For each layer what `forward` fills in: keys, values, the last h, the last two fibers, what a bias needs."""
        if self.args.curvature == "centered":
            raise ValueError("--curvature centered reads the next token: it cannot go step by step")
        return [{} for _ in self.blocks]

    @torch.no_grad()
    def generate(self, ids: Tensor, new_tokens: int) -> Tensor:
        """Greedy continuation of `ids` [B, P] by up to `new_tokens`: the position table ends at seq_len."""
        cache, step = self.new_cache(), ids
        for _ in range(min(new_tokens, self.args.seq_len - ids.shape[1])):
            step = self(step, cache=cache)["logits"][:, -1:].argmax(-1)
            ids = torch.cat([ids, step], 1)
        return ids


def build_model(args: Args, vocab_size: int = 50257, arm: str = "cf_hot") -> LanguageModel:
    """The model of one arm, initialised from --seed: `cf_hot`, by the flags, or `baseline`, which has neither bias nor
    factor. Tensors that two arms share start equal."""
    args = args if arm == "cf_hot" else dataclasses.replace(args, bias="none", curvature="off")
    model = LanguageModel(args, vocab_size)
    core.init_normal(model, args.seed)
    for block in model.blocks:  # rates of decay start alike, at softplus(-2) a token
        if block.field is not None:
            block.field.reset()
        elif args.bias == "forget":
            nn.init.constant_(block.forget[2].bias, 2.0)
    return model


# ----------------------------------------------------------------------------------------------------------- data
class Data(NamedTuple):
    train: np.ndarray  # N T
    validation: np.ndarray  # N T
    vocab_size: int
    words: int  # whitespace-separated words of the validation text, 0 where there are none
    tokenizer: object
    tuning: np.ndarray | None = None  # windows set aside for choosing a rate


def load_data(args: Args) -> Data:
    """Windows of both splits, and what is needed to score them and to read them."""
    if args.data == "iid":
        sizes, V, T = {"train": 8192, "eval": 512}, args.vocab_size, args.seq_len
        splits = [torch.randint(V, (n, T), generator=core.generator(args.seed, split)) for split, n in sizes.items()]
        return Data(*(ids.numpy() for ids in splits), V, 0, None)
    texts = [core.load_text(args.data, split, args.data_path) for split in ("train", "validation")]
    tokenizer = core.load_tokenizer(args.tokenizer, texts[0], args.vocab_size)
    what = f"--data {args.data} {args.data_path}"
    train, validation = (core.blocks(core.encode(text, tokenizer), args.seq_len, what) for text in texts)
    n, words = args.tuning_windows, sum(len(line.split()) for line in texts[1])
    require(n < len(validation), f"--tuning_windows {n} leaves nothing of {len(validation)} windows to report")
    return Data(train, validation[n:], len(tokenizer), 0 if n else words, tokenizer, validation[:n])


# ------------------------------------------------------------------------------------------------------- evaluate
FIELD_STATS = ("gate", "holonomy_mean", "gate_spread", "sat_frac", "frac_in_band", "gate_min", "gate_max")


def field_stats(fields: list[Field]) -> Tensor:
    """FIELD_STATS of one batch, over all layers. The spread is the standard deviation of log g over the positions from
    16 on, where the start of the moving average is over: without variation the gate is a no-op at any mean."""
    log_g = torch.stack([f.log_g for f in fields])  # L B T
    dh = torch.stack([f.dh for f in fields])  # L B T
    g = log_g.exp()
    spread = log_g[..., min(16, log_g.shape[-1] // 2) :].std(-1, correction=0)  # L B
    in_band = ((g >= 0.2) & (g <= 0.8)).float()
    return torch.stack([g.mean(), dh.mean(), spread.mean(), (dh >= 1).float().mean(), in_band.mean(), g.min(), g.max()])


@torch.no_grad()
def evaluate(model, data: Data, args: Args, accelerator, gate: bool = True) -> dict:
    """Over the first --eval_batches batches of `data.validation`: `loss`, weighted by tokens, `batches` (the loss of
    each), `windows` and, of a model with control fields, FIELD_STATS."""
    from accelerate.utils import gather_object

    model.eval()
    rows = data.validation[: args.eval_batches * args.batch_size or None]
    starts = range(0, len(rows), args.batch_size)[accelerator.process_index :: accelerator.num_processes]
    values = []  # of each batch: loss, field statistics
    for start in starts:
        ids = torch.from_numpy(rows[start : start + args.batch_size].astype("int64")).to(accelerator.device)
        out = model(ids, labels=ids, gate=gate)
        stats = field_stats(out["fields"]) if out["fields"] else ids.new_zeros(0, dtype=torch.float32)
        values.append(torch.cat([out["lm_loss"].float()[None], stats]))
    model.train()
    values = torch.stack(values).tolist() if values else []  # the one wait for the device
    table = sorted(gather_object([[start, *row] for start, row in zip(starts, values)]))  # by start, whoever had it
    table = torch.tensor(table, dtype=torch.float64)
    weight = (len(rows) - table[:, 0]).clamp(max=args.batch_size) / len(rows)  # the last batch may be short
    means = weight @ table
    evaluation = {"loss": float(means[1]), "batches": table[:, 1].tolist(), "windows": len(rows)}
    if table.shape[1] > 2:  # the least and the largest gate are no means
        means[-2:] = torch.stack([table[:, -2].min(), table[:, -1].max()])
    return evaluation | dict(zip(FIELD_STATS, means[2:].tolist()))


@torch.no_grad()
def lookahead_nats(model, data: Data, args: Args, device, positions: int = 16, windows: int = 4) -> float:
    """How much the loss of a token rises when the tokens after it are replaced by random ones: 0 for a causal model,
    the size of the leak, in nats, for one that reads ahead. Mean over `positions` of each of `windows`."""
    model.eval()
    random, T, rises = core.generator(args.seed, "lookahead"), args.seq_len, []
    at = torch.linspace(0, T - 3, min(positions, T - 2)).long()  # P: the position t whose prediction is scored
    future = torch.arange(T) > at[:, None]  # P T: the target itself is the model's future too
    for row in data.validation[:windows]:
        ids = torch.from_numpy(row.astype("int64")).expand(len(at), T)  # P T: the window once for each position
        labels = torch.full((len(at), T), -100).scatter(1, at[:, None] + 1, ids.gather(1, at[:, None] + 1))
        blind = torch.where(future, torch.randint(data.vocab_size, ids.shape, generator=random), ids)
        seen, unseen = (model(x.to(device), labels=labels.to(device))["lm_loss"] for x in (ids, blind))
        rises.append(unseen - seen)
    model.train()
    return float(torch.stack(rises).mean())


# ---------------------------------------------------------------------------------------------------------- train
def fingerprint(before: Tensor, ids: Tensor) -> Tensor:
    """`before` with the windows `ids` [B, T] added: an integer that depends on every token seen and on their order, so
    that a reader of the result can tell that both arms saw the same."""
    places = torch.arange(1, ids.numel() + 1, device=ids.device).view(ids.shape)
    return (before * 1_000_003 + (ids * places).sum()) % (2**31 - 1)


def field_row(fields: list[Field], accelerator) -> dict:
    """The document's figures of one micro-batch: dh summed over batch, positions and layers, the means of g and dh."""
    dh = torch.stack([f.dh.detach().float() for f in fields])  # L B T
    g = torch.stack([f.log_g.detach().float() for f in fields]).exp()  # L B T
    sums = torch.stack([dh.sum(), g.sum(), torch.tensor(dh.numel()).to(dh)])
    holonomy, gate, n = accelerator.reduce(sums, "sum").tolist()
    return {"holonomy": holonomy, "gate": gate / n, "holonomy_mean": holonomy / n}


def train(arm: str, args: Args, data: Data, run: core.Run, accelerator, untrained: dict, saved: dict | None) -> dict:
    """Train one arm, from --seed or from its checkpoint `saved`; returns what the result file says of it."""
    label = LABELS[arm]
    if saved and saved["outcome"] and saved["step"] == args.max_steps:
        run.say(f"[Resume] {label}: already trained to step {saved['step']}")
        return saved["outcome"]
    model = build_model(args, data.vocab_size, arm).to(accelerator.device)
    parameters = sum(p.numel() for p in model.parameters())
    run.say(f"[{label.replace('-', '')}] Parameters: {parameters:,}")
    run.say(f"[{label.replace('-', '')}] Control Field: {'DISABLED' if model.blocks[0].field is None else 'ENABLED'}")
    if saved:
        model.load_state_dict(saved["model_state_dict"])
    core.shard(model, accelerator, model.blocks)
    optimizer = torch.optim.AdamW(core.decay_groups(model, 0.1), lr=args.lr, betas=(0.9, 0.95), fused=True)
    model, optimizer = core.prepare(model, optimizer, accelerator)
    plain = accelerator.unwrap_model(model)
    torch.manual_seed(core.derived_seed(args.seed, "dropout", accelerator.process_index))  # equal for both arms
    loop = core.Loop(run, model, optimizer, total=args.max_steps, label=arm, saved=saved, max_norm=1.0)
    history = saved["history"] if saved else {}  # name of a curve: [[step, value]]
    seen = (saved["seen"] if saved else torch.zeros((), dtype=torch.int64)).to(accelerator.device)  # fingerprint

    def record(curves: dict, **others) -> None:
        for name, value in curves.items():
            history.setdefault(name, []).append([loop.step, value])
        run.log(arm=arm, step=loop.step, **others, **curves)

    def validate() -> dict:
        with loop.paused(), core.whole(plain):
            evaluation = evaluate(plain, data, args, accelerator)
        loss, ppl = evaluation["loss"], core.perplexity(evaluation["loss"])
        core.check_finite(loss, f"{label}'s validation loss at step {loop.step}")
        run.say(f"[Eval] {label}: Val Loss = {loss:.4f}, PPL = {ppl:.2f}")
        field = {name: evaluation[name] for name in ("gate_spread", "sat_frac") if name in evaluation}
        record({"val_loss": loss, "val_ppl": ppl} | field)
        return evaluation

    def save(outcome: dict | None = None) -> None:
        own = {"format_version": 3, "config": vars(args), "history": history, "seen": seen, "outcome": outcome}
        path = loop.save(f"{arm}_step_{loop.step}.pt", model_state_dict=core.full_state(plain), **own)
        run.say(f"[Save] Checkpoint: {path}")

    if loop.step == 0:
        evaluation = validate()
    ahead = range(loop.step, args.max_steps)
    stream = core.batches(data.train, args.batch_size, args.seed, ahead, accelerator, args.num_workers)
    while loop.step < loop.total:
        for group in optimizer.param_groups:  # constant, after a linear warm-up, which counts updates
            group["lr"] = args.lr * min(1.0, (loop.step // args.grad_accum + 1) / max(1, args.warmup_steps))
        micro = min(args.grad_accum, loop.total - loop.step)  # the last group may be short
        for _ in loop.micro_batches(micro):
            ids = next(stream)  # B T
            seen = fingerprint(seen, ids)
            out = model(ids, labels=ids)
            loop.backward(out["loss"] / micro)
            loop.add(train_loss=out["lm_loss"])
        norm = loop.update(tokens=ids.numel() * micro * accelerator.num_processes, advance=micro)
        if loop.due(args.log_interval) or loop.last:
            row = loop.means()
            loss = row["train_loss"]
            line = f"Step {loop.step:5d} | Loss: {loss:.4f} | PPL: {core.perplexity(loss):.2f}"
            if out["fields"]:
                row |= field_row(out["fields"], accelerator)
                line += f" | Holonomy: {row['holonomy']:.2f} | Gate: {row['gate']:.3f}"
            run.say(line)
            record(row, grad_norm=float(norm), lr=optimizer.param_groups[0]["lr"])
        if loop.due(args.eval_interval) or loop.last:
            evaluation = validate()
        if (loop.due(args.save_interval) or loop.stopping) and not loop.last:
            save()
            loop.leave_if_stopped()
    outcome = untrained | loop.end() | {"parameters": parameters, "history": history, "final": evaluation}
    outcome |= {"time_s": outcome["train_seconds"], "fingerprint": int(seen)}
    with core.whole(plain):
        moved = core.causality_audit(plain, data.vocab_size, args.seq_len)
        outcome["causality_max_abs_diff"] = max(moved, untrained["causality_max_abs_diff"])
        outcome["gate_effect"] = evaluate(plain, data, args, accelerator, gate=False)["loss"] - evaluation["loss"]
        outcome["lookahead_nats"] = lookahead_nats(plain, data, args, accelerator.device)
        if args.tuning_windows:
            outcome["tuning_loss"] = evaluate(plain, data._replace(validation=data.tuning), args, accelerator)["loss"]
    save(outcome)
    return outcome


# -------------------------------------------------------------------------------------------------------- results
def settled_at(history: dict) -> int | None:
    """The stopping rule: the first evaluated step at which the spread of the gate and the holonomy were flat, which is
    that over the last fifth of the steps until then the mean of the later half is within 10 % of the earlier one's."""

    def flat(curve: list, step: int) -> bool:
        late = [value for at, value in curve if 0.8 * step < at <= step]
        half = len(late) // 2
        a, b = (np.mean(part) if half > 1 else math.nan for part in (late[:half], late[half:]))
        return bool(abs(b - a) <= 0.1 * a)

    curves = [history.get(name, []) for name in ("gate_spread", "holonomy_mean")]
    return next((step for step, _ in curves[0] if all(flat(curve, step) for curve in curves)), None)


def criteria(cf: dict, base: dict | None) -> dict:
    """The document's four criteria, which an inert gate can meet as well, and two that it cannot. None: no data."""
    final, better = cf["final"], cf["final"]["loss"] < base["final"]["loss"] if base else None
    if "gate" not in final:
        return {"ppl_better": better}
    logged = [value for _, value in cf["history"]["holonomy_mean"]]
    late = torch.tensor(logged[-max(5, len(logged) // 5) :], dtype=torch.float64)  # the last fifth of the log rows
    steady = len(late) >= 5 and late.isfinite().all() and late.std() / late.mean().clamp(min=1e-12) < 0.25
    return {
        "ppl_better": better,
        "gate_in_range": 0.2 <= final["gate"] <= 0.8,
        "holonomy_stable": bool(steady) if len(late) >= 5 else None,
        "holonomy_nonzero": final["holonomy_mean"] > 1e-3,
        "holonomy_not_exploding": final["sat_frac"] < 0.5,
        "gate_active": final["gate_spread"] > 1e-3 and abs(cf["gate_effect"]) > 1e-4,
    }


def summarise(arms: dict[str, dict], args: Args, data: Data, other: dict | None = None) -> dict:
    """The result file: the document's keys, then what tells whether its claim holds. In `final` are the figures of the
    last evaluation and the gain over `other`, the run of --against, or the baseline."""
    cf, base = arms["cf_hot"], arms.get("baseline")
    last, other = cf["final"], other or base
    final = {"baseline_ppl": None, "baseline_loss": None, "improvement_pct": None}
    scored = len(data.validation) * (args.seq_len - 1)  # tokens of the whole validation split
    for name, arm in arms.items():
        loss = arm["final"]["loss"]
        final |= {f"{name}_loss": loss, f"{name}_ppl": core.perplexity(loss)}
        final[f"{name}_loss_interval"] = core.bootstrap(arm["final"]["batches"])
        if data.words and arm["final"]["windows"] == len(data.validation):
            final[f"{name}_word_ppl"] = core.perplexity(loss * scored / data.words)
    if other:
        gains = [b - c for b, c in zip(other["final"]["batches"], last["batches"], strict=True)]
        final["loss_gain"] = core.bootstrap(gains)  # baseline minus CF-HoT, paired over batches
    counts, overhead = {name: arm["parameters"] for name, arm in arms.items()}, None
    if base:
        final["improvement_pct"] = 100 * (final["baseline_ppl"] - final["cf_hot_ppl"]) / final["baseline_ppl"]
        overhead = 100 * (counts["cf_hot"] / counts["baseline"] - 1)
    causality = max(arm["causality_max_abs_diff"] for arm in arms.values())
    by_arm = (*FIGURES, "time_s", "lookahead_nats", "lookahead_nats_untrained", "tuning_loss")
    before = dict(other["history"]["val_loss"]) if other else {}  # step: loss
    source = {"source": args.data, "path": args.data_path, "vocab_size": data.vocab_size}
    source |= {"train_windows": len(data.train), "validation_windows": last["windows"]}
    if args.data == "iid":
        source["entropy_floor_nats"] = math.log(args.vocab_size)
    return {
        "cf_hot": cf["history"],
        "baseline": {name: base["history"][name] if base else [] for name in ("train_loss", "val_loss", "val_ppl")},
        "final": final | {name: last.get(name) for name in FIELD_STATS} | {"gate_effect": cf["gate_effect"]},
        "criteria": criteria(cf, base),
        "gain": [[step, before[step] - loss] for step, loss in cf["history"]["val_loss"] if step in before],
        "settled_at": settled_at(cf["history"]),
        "floors": core.ngram_floors(data.train, data.validation[: last["windows"]], data.vocab_size),
        "batch_losses": {name: arm["final"]["batches"] for name, arm in arms.items()},
        "params": {"baseline": None, **counts, "overhead_pct": overhead},
        **{key: {name: arm[key] for name, arm in arms.items() if key in arm} for key in by_arm},
        "causality_max_abs_diff": causality,
        "valid": causality <= 1e-5,
        "data": source | {"fingerprint": {name: arm["fingerprint"] for name, arm in arms.items()}},  # of process 0
        "config": vars(args),
    }


def report(result: dict, run: core.Run) -> None:
    """Print what the result says."""
    final = result["final"]
    run.say(f"\nCF-HoT Final PPL: {final['cf_hot_ppl']:.2f}")
    if final["baseline_ppl"] is not None:
        run.say(f"Baseline Final PPL: {final['baseline_ppl']:.2f}\nImprovement: {final['improvement_pct']:.2f}%")
    if gain := final.get("loss_gain"):
        run.say("Loss gain: {mean:+.4f} nats, 95 % interval [{lo:+.4f}, {hi:+.4f}] over batches".format(**gain))
    run.say("n-gram tables: " + ", ".join(f"{name} {loss:.4f}" for name, loss in result["floors"].items()))
    run.say(f"Gate effect: {final['gate_effect']:+.5f} nats (loss without the gate minus loss with it)")
    for name, met in result["criteria"].items():
        run.say(f"  {name:24s} {'no data' if met is None else 'yes' if met else 'no'}")
    run.say("  (an inert gate can meet the document's criteria: see gate_active)")
    if not result["valid"]:
        run.say("INVALID: this model reads the tokens it is scored on; its losses mean nothing")
    run.say(f"[Save] Results: {run.result}")


# ----------------------------------------------------------------------------------------------------------- main
def plan_of(args: Args, arms: list[str], data: Data, accelerator) -> dict:
    """What a run will be: its updates and tokens, and each arm's parameters and memory."""
    plan = {"updates": -(-args.max_steps // args.grad_accum), "train_windows": len(data.train)}
    plan["tokens"] = args.max_steps * args.batch_size * args.seq_len * accelerator.num_processes
    half = accelerator.mixed_precision != "no"
    for arm in arms:
        with torch.device("meta"):
            model = build_model(args, data.vocab_size, arm)
        memory = core.memory_estimate(model, args.batch_size * args.seq_len, args.d_model, args.n_layers, half)
        plan[arm] = {"parameters": sum(p.numel() for p in model.parameters()), "memory_gb": memory}
    return plan


def check_causality(arm: str, args: Args, data: Data, run: core.Run, accelerator) -> dict:
    """How far the untrained model of one arm sees ahead, which must be not at all."""
    model = build_model(args, data.vocab_size, arm).to(accelerator.device)
    moved = core.causality_audit(model, data.vocab_size, args.seq_len)
    line = f"{LABELS[arm]}: largest change of a logit by a later token: {moved:.1e}"
    run.say(f"[Audit] {line}")
    causal = moved <= 1e-5 or args.curvature == "centered"
    require(causal, f"{line}; it reads the future, so it is not trained", core.CHECK_FAILED)
    nats = lookahead_nats(model, data, args, accelerator.device)
    return {"causality_max_abs_diff": moved, "lookahead_nats_untrained": nats}


def read_against(args: Args, text: str) -> dict:
    """What `summarise` needs of the model in the result file of --against, which must have been scored on this text."""
    found = json.loads(core.read_text(args.against))
    same = found["manifest"]["inputs"]["data"] == text
    require(same, f"--against {args.against}: not a run on this text with as many --tuning_windows")
    return {"history": found["cf_hot"], "final": {"batches": found["batch_losses"]["cf_hot"]}}


def main(argv=None) -> dict:
    args = parse(argv)
    accelerator = core.engine(args)
    arms = list(LABELS)[: 1 if args.no_baseline else 2]
    if args.dry_run:
        return core.show_plan(plan_of(args, arms, load_data(args), accelerator))
    outputs = ("cf_hot_step_*.pt", "baseline_step_*.pt")
    with core.Run(args, args.output_dir, accelerator, "phase_a_results.json", outputs) as run:
        if done := run.finished(LENGTH, FREE):
            report(done, run)
            return done
        data = load_data(args)
        plan = plan_of(args, arms, data, accelerator)
        size, memory = f"{args.grad_accum} x {args.batch_size} x {args.seq_len}", plan["cf_hot"]["memory_gb"]["total"]
        run.say(f"{args.max_steps} micro-batches = {plan['updates']} updates of {size} tokens, about {memory:.1f} GB")
        if args.curvature == "centered":
            run.say("WARNING: --curvature centered reads the next token; the results will be marked invalid")
        if args.lr > 1e-4 and accelerator.mixed_precision == "fp16":
            run.say("WARNING: the document saw NaN above --lr 1e-4 in fp16")
        saved = {arm: run.checkpoint(f"{arm}_step_*.pt", total=args.max_steps, arm=arm) for arm in arms}
        untrained = {arm: check_causality(arm, args, data, run, accelerator) for arm in arms}
        tokenizer = core.tokenizer_digest(data.tokenizer) if data.tokenizer else "none"
        inputs = core.digest(data.train, data.validation)
        other = read_against(args, inputs) if args.against else None
        run.start((*FREE, LENGTH), data=inputs, tokenizer=tokenizer)
        outcomes = {arm: train(arm, args, data, run, accelerator, untrained[arm], saved[arm]) for arm in arms}
        result = run.finish(summarise(outcomes, args, data, other))
        report(result, run)
    return result


if __name__ == "__main__":
    core.cli(main, "--batch_size (and raise --grad_accum), --seq_len or --d_model")
