"""AFRB + PVM: can a rotated moving average of fixed size replace attention for recall, and help a frozen model?

A small trainable lane stands between the embedding and the first block of a frozen language model. Block i rotates
feature pairs by a log-time phase and mixes them through a gated unit; a Phase Vector Memory (PVM) may sit inside:

    theta_t = omega ln(1 + t) + phi    f = (1 - alpha) LN(x) + alpha R(theta_t) LN(x)    v = a sigmoid(g), [a, g] = W f
    m_t = beta m_{t-1} + pvm_alpha R(theta_t) w(v_t)     v <- v + sigmoid(gate) R(-theta_t) m_t     m: D values, any T
    y = x + gamma s LN(v)                                  s: RMS of the embedding table

--disable-attn makes attention a true zero, so that the PVM is the only path between tokens. Two tasks: recall of a
random "needle", scored on tokens that the model has not seen, and language modelling. The published 10.5 % recall
comes from scoring a position against its own input token: legacy_echo_* shows that number's origin under its own name.

Smoke test   python afrb_train.py --test --task needle --needle-query --disable-attn --enable-pvm --save out/a   (20 s)
Document     python afrb_train.py --task needle --needle-query --disable-attn --n-afrb 1 --enable-pvm --readout-from pvm
                 --infonce-weight 0.3 --kiss-ridge-calib --seed 41 --save ./out/REPRODUCE_10PCT
Memory alone python afrb_train.py --recall-curve --save runs/afrb/recall            (1 minute)
Sweep        bash scripts/afrb_sweep.sh
Expect       no needle recalled by the documented configuration: 0.85^134 = 3.5e-10 of it is left. See docs/afrb.md.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import shlex
import sys
import types
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import core
from core import arg, require

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
FLAG = dict(nargs="?", const=True)  # a switch whose absence is told from False


@dataclasses.dataclass
class Args(core.RunArgs):
    task: Literal["needle", "language"] = arg("language", "recall of a random needle, or language modelling", "task")
    save: str = arg("./out/run", "run directory", "task")
    model: str = arg(TINYLLAMA, "hub id, local directory, tiny, tiny_untied, or random:tinyllama (full size)", "task")
    disable_attn: bool = arg(False, "zero the attention output in every block of the frozen model", "task")
    eval_only: bool = arg(False, "no training", "task")
    recall_curve: bool = arg(False, "recall of the untrained memory against distance, instead of a training", "task")
    recall_width: int = arg(0, "width of that memory; 0: 2048, for tiny 64", "task")
    n_afrb: int | None = arg(None, "lane blocks, 0 to 4; 0: the bare model; unset: 1", "lane")
    alpha: float | None = arg(None, "phase blend of block 1, in [0, 1]; unset: 0.04", "lane")
    omega: float | None = arg(None, "log-phase frequency of block 1; unset: 6.0", "lane")
    gamma: float = arg(0.2, "initial residual gate, in (0, 1), learned", "lane")
    omega_delta: float | None = arg(None, "block i has omega + (i - 1) delta; unset: 0", "lane")
    cascade_lambda: float | None = arg(None, "block i has alpha exp(-lambda (i - 1)); unset: 0", "lane")
    phase_delta: float | None = arg(None, "block i has phi = (i - 1) delta; unset: 0", "lane")
    phase: Literal["log", "linear"] | None = arg(None, "theta = omega ln(1 + t), or omega t; unset: log", "lane")
    adaptive_omega: bool | None = arg(None, "learn omega, between --omega-min and -max; unset: no", "lane", **FLAG)
    omega_min: float | None = arg(None, "lower bound of a learned omega; unset: 5.6", "lane")
    omega_max: float | None = arg(None, "upper bound of a learned omega; unset: 6.4", "lane")
    enable_pvm: bool | None = arg(None, "phase vector memory inside every block; unset: no", "memory", **FLAG)
    pvm_alpha: float | None = arg(None, "write strength; unset: 0.3", "memory")
    pvm_beta: float | None = arg(None, "retention per token, in [0, 1); unset: 0.85", "memory")
    pvm_beta_max: float | None = arg(None, "pairs retain from --pvm-beta to this; unset: all alike", "memory")
    pvm_gate_init: float = arg(-2.0, "initial logit of the gate; sigmoid(-2) = 0.1192", "memory")
    memory: Literal["pvm", "diagonal", "delta"] | None = arg(None, "or a rival of equal state; unset: pvm", "memory")
    t2_enable: bool | None = arg(None, "multiply beta by a relaxation factor below one; unset: no", "memory", **FLAG)
    t2_steps: int | None = arg(None, "relaxation time in tokens: factor exp(-1/T2); unset: 1500", "memory")
    readout_from: Literal["auto", "pvm", "none", "both"] = arg("auto", "auto, both: pvm for needles", "readout")
    readout: Literal["linear", "mlp", "cancel"] | None = arg(None, "how the state is read; unset: linear", "readout")
    readout_scale: float = arg(1.0, "factor of the readout's scores", "readout")
    kiss_ridge_calib: bool = arg(False, "closed-form initialisation of the readout matrix", "readout")
    kiss_ridge_max_pairs: int = arg(512, "calibration pairs", "readout")
    kiss_ridge_l2: float = arg(1e-3, "ridge penalty", "readout")
    kiss_ridge_unfreeze_step: int = arg(100, "update from which the calibrated matrix trains; 0: never", "readout")
    infonce_weight: float = arg(0.0, "weight of the contrastive loss, in [0, 1]", "readout")
    infonce_negatives: int = arg(128, "negatives for each anchor", "readout")
    infonce_tau: float = arg(0.08, "temperature of that loss and of the readout", "readout")
    legacy_echo: bool = arg(False, "add the published loss term on unshifted labels", "readout")
    ctx_chunks: int = arg(4, "haystack length in chunks", "data")
    ctx_chunk_len: int = arg(128, "tokens in a chunk", "data")
    needle_len: int = arg(16, "tokens in the needle", "data")
    needle_query: bool = arg(False, "append a query that names the needle's key", "data")
    needle_marker: Literal["key", "none", "range"] = arg("key", "two key tokens, nothing, or own ids before it", "data")
    seq: int | None = arg(None, "block length of the language task; unset: 512", "data")
    data: Literal["", "wikitext2", "text", "local", "synthetic"] = arg("", "unset: wikitext2, for tiny local", "data")
    data_path: str = arg("", "file or folder for --data text; unset: not used", "data")
    num_workers: int = arg(0, "loader processes", "data")
    pin_memory: bool | None = arg(None, "pinned host memory; unset: on with CUDA", "data", **FLAG)
    steps: int = arg(2000, "updates; 0: evaluate only", "training")
    lr: float = arg(1e-4, "AdamW learning rate of lane and readout", "training")
    bs: int = arg(1, "sequences per micro-batch (and process)", "training")
    ga: int = arg(4, "micro-batches per update", "training")
    warmup_steps: int = arg(100, "linear warm-up, then constant", "training")
    grad_clip: float = arg(1.0, "global norm of the gradient", "training")
    gradient_checkpointing: bool = arg(False, "recompute the frozen model's activations", "training")
    dtype: Literal["auto", "bf16", "fp32"] = arg("auto", "as --precision", "training")
    seed: int = arg(41, "seed of initialisation, training data and sampling", "run")
    eval_items: int = arg(200, "needles to evaluate on (language: blocks of validation)", "evaluation")
    eval_seed: int = arg(1234, "seed of the needles evaluated on, whatever --seed is", "evaluation")
    eval_topk: int = arg(5, "k of the top-k rates", "evaluation")
    log_every: int = arg(10, "log every so many updates", "evaluation")
    val_every: int = arg(200, "validate and save every so many updates", "evaluation")
    no_controls: bool = arg(False, "no controls at the end", "evaluation")
    skip_phase_metrics: bool = arg(False, "omit coherence and entropy", "evaluation")

    context = property(lambda self: self.ctx_chunks * self.ctx_chunk_len, doc="tokens of the haystack")


TEST = dict(model="tiny", data="synthetic", device="cpu", threads=1, steps=20, bs=2, ga=1, warmup_steps=5)
TEST |= dict(ctx_chunks=4, ctx_chunk_len=16, needle_len=4, seq=64, eval_items=16, val_every=10, log_every=5)
TEST |= dict(kiss_ridge_max_pairs=32, kiss_ridge_unfreeze_step=5)
# What makes up a lane. A checkpoint brings its own values: they stand unless a flag is given.
ARCHITECTURE = dict(n_afrb=1, alpha=0.04, omega=6.0, omega_delta=0.0, cascade_lambda=0.0, phase_delta=0.0, phase="log")
ARCHITECTURE |= dict(adaptive_omega=False, omega_min=5.6, omega_max=6.4)
ARCHITECTURE |= dict(enable_pvm=False, memory="pvm", pvm_alpha=0.3, pvm_beta=0.85, pvm_beta_max=0.0, readout="linear")
ARCHITECTURE |= dict(t2_enable=False, t2_steps=1500)
FREE = ("save", "log_every", "num_workers", "pin_memory", "no_controls")  # flags that may differ when a run goes on
LENGTH = "steps"  # the flag that makes a run longer
CANCEL_NEEDS = "--readout cancel reads one block's pvm on needles: --task needle --n-afrb 1 --memory pvm"
RANGES = (  # what a value must be, in words and as a test, and the flags it is asked of; an unset flag passes
    ("0 or more", lambda v: v >= 0, "omega cascade_lambda n_afrb kiss_ridge_unfreeze_step"),
    ("0 or more", lambda v: v >= 0, "steps warmup_steps recall_width"),
    ("1 or more", lambda v: v >= 1, "t2_steps ctx_chunks ctx_chunk_len needle_len bs ga eval_topk log_every val_every"),
    ("1 or more", lambda v: v >= 1, "infonce_negatives kiss_ridge_max_pairs"),
    ("2 or more", lambda v: v >= 2, "eval_items"),
    ("3 or more", lambda v: v >= 3, "seq"),
    ("above 0", lambda v: v > 0, "pvm_alpha kiss_ridge_l2 grad_clip infonce_tau lr"),
    ("0 to 1", lambda v: 0 <= v <= 1, "alpha infonce_weight"),
    ("between 0 and 1, both excluded", lambda v: 0 < v < 1, "gamma"),
    ("in [0, 1): at 1 the memory grows without bound", lambda v: 0 <= v < 1, "pvm_beta pvm_beta_max"),
)


def parse(argv=None) -> Args:
    words = sys.argv[1:] if argv is None else argv
    require(all(w.strip() for w in words), "stray space after a backslash; put the comment on its own line")
    args = core.parse_args(Args, TEST, argv, __doc__)
    for wanted, holds, names in RANGES:
        for name in names.split():
            value = getattr(args, name)
            require(value is None or holds(value), f"--{name.replace('_', '-')} {value}: use {wanted}")
    require(args.precision != "fp16", "--precision fp16: use bf16 or fp32; the lane itself is always fp32")
    args.precision = args.dtype = args.dtype if args.dtype != "auto" else args.precision
    if args.model.startswith("tiny") and not args.threads and "OMP_NUM_THREADS" not in os.environ:
        args.threads = 1  # two threads on so small a model take 25 times as long as one
    args.data = args.data or ("local" if args.model.startswith(("tiny", "random:")) else "wikitext2")
    return resolve(args, {}) if args.resume in ("", "auto") else args  # else `main` resolves it with that checkpoint


def resolve(args: Args, saved: dict) -> Args:
    """Fill what was not given from `saved`, a checkpoint's config, else from ARCHITECTURE; check what depends on it."""
    for name, default in ARCHITECTURE.items():
        mine, theirs = getattr(args, name), saved.get(name)
        if name in ("n_afrb", "enable_pvm", "memory") and None not in (mine, theirs):
            flag = f"--{name.replace('_', '-')}"
            require(mine == theirs, f"{flag} is {mine} here but {theirs} in {args.resume}: drop the flag")
        if mine is None:
            setattr(args, name, default if theirs is None else theirs)
    require(args.omega_min < args.omega_max, "--omega-min must be below --omega-max")
    require(args.n_afrb or not args.enable_pvm, "--enable-pvm needs a block to sit in: --n-afrb 1 or more")
    needs = {"--kiss-ridge-calib": args.kiss_ridge_calib, "--readout-from pvm": args.readout_from == "pvm"}
    needs |= {"--infonce-weight": args.infonce_weight > 0, "--t2-enable": args.t2_enable}
    needs |= {f"--memory {args.memory}": args.memory != "pvm"}
    needs |= {f"--readout {args.readout}": args.readout != "linear", "--pvm-beta-max": args.pvm_beta_max > 0}
    for flag, on in needs.items():  # --recall-curve is a memory by itself
        require(args.enable_pvm or args.recall_curve or not on, f"{flag} needs the memory: add --enable-pvm")
    require(args.pvm_beta_max in (0, max(args.pvm_beta, args.pvm_beta_max)), "--pvm-beta-max is below --pvm-beta")
    needle, cancels = args.task == "needle", args.readout == "cancel" and not args.recall_curve
    require((needle and args.n_afrb == 1 and args.memory == "pvm") or not cancels, CANCEL_NEEDS)
    require(not cancels or args.eval_only or not args.steps, "--readout cancel is not trained: add --eval-only")
    args.precision = args.dtype = "fp32" if cancels else args.precision  # what was written must be known exactly
    require(needle or not args.legacy_echo, "--legacy-echo needs --task needle")
    if needle:
        low, high = needle_places(args)
        fits = f"a needle of {args.needle_len} tokens and its key do not fit into a context of {args.context}"
        require(low <= high, f"{fits}: raise --ctx-chunks or lower --needle-len")
    if args.readout_from in ("auto", "both"):
        args.readout_from = "pvm" if needle and args.enable_pvm else "none"
    return args


# ---------------------------------------------------------------------------------------------------------- model
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R(theta) x of `x` [..., T, D]: channels (k, k + D // 2) turn by the angle of `cos`, `sin` [T, 1]; the last
    channel of an odd D stays. R(theta) preserves the norm, and -sin gives its inverse."""
    a, b, rest = x.split([x.shape[-1] // 2, x.shape[-1] // 2, x.shape[-1] % 2], -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class Phase(nn.Module):
    """theta_t = omega ln(1 + t) + phi in fp32, t counted from the start of the sequence; bf16 positions would collide
    above 256. `linear`: omega t + phi, the same turn at every step. omega is a buffer, or with `bounds` a parameter
    that `clamp` keeps between them."""

    def __init__(self, omega: float, phi: float, bounds: tuple[float, float] | None = None, linear: bool = False):
        super().__init__()
        self.bounds, self.linear = bounds, linear
        self.key, self.table = None, None  # the tables made last, and what they were made for
        if bounds:
            self.omega = nn.Parameter(torch.tensor(float(omega)).clamp(*bounds))
        else:
            self.register_buffer("omega", torch.tensor(float(omega)))
        self.register_buffer("phi", torch.tensor(float(phi)))

    @torch.no_grad()
    def clamp(self) -> None:
        if self.bounds:
            self.omega.clamp_(*self.bounds)

    def theta(self, T: int, start: int = 0) -> Tensor:
        at = torch.arange(start, start + T, device=self.phi.device, dtype=torch.float32)
        return self.omega * (at if self.linear else at.log1p()) + self.phi  # T

    def forward(self, T: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, 1]; the last ones are kept for a length that comes again, unless omega is learned."""
        if self.bounds:
            theta = self.theta(T, start)[:, None]
            return theta.cos(), theta.sin()
        key = (T, start, self.phi.device, self.phi._version, self.omega._version)
        if key != self.key:
            theta = self.theta(T, start)[:, None]
            self.key, self.table = key, (theta.cos(), theta.sin())
        return self.table


class Decay(NamedTuple):
    """Retention per token: `beta`, one value or one for every channel, times the T2 factor exp(-1/steps) if given."""

    beta: float | tuple[float, ...]
    steps: float = 0.0

    def value(self) -> Tensor:  # [] or [D], float64
        return torch.tensor(self.beta, dtype=torch.float64) * (math.exp(-1 / self.steps) if self.steps else 1)


def spread(low: float, high: float, dim: int) -> tuple[float, ...]:
    """A retention for each of `dim` channels, alike within a pair: from `low` to `high`, 1 - beta in equal ratios."""
    pairs = (1 - np.geomspace(1 - low, 1 - high, -(-dim // 2))).tolist()
    return tuple((*pairs[: dim // 2], *pairs)[:dim])


def decay_of(args: Args, dim: int) -> Decay:
    beta = spread(args.pvm_beta, args.pvm_beta_max, dim) if args.pvm_beta_max else args.pvm_beta
    return Decay(beta, args.t2_steps if args.t2_enable else 0)


def decay_tables(d: Tensor, T: int, chunk: int) -> tuple:
    """What a chunked scan of length T needs of the retention `d` [] or [D], from logarithms in fp64, so that no power
    overflows and none is formed by division; N is 1 or D. (chunk length C; within [N, C, C]; into [C, N], what is left
    of the state before the chunk; across [N, n, n] and first [n, N], of each chunk's end and of the first state)."""
    n = -(-T // chunk)
    C = -(-T // n)
    log = d.double().reshape(-1, 1).clamp(min=1e-300).log()  # N 1
    c = log.expand(-1, C).cumsum(1)  # N C
    later = torch.ones(C, C, dtype=torch.bool, device=d.device).triu(1)
    within = (c[:, :, None] - c[:, None, :]).masked_fill(later, -torch.inf).exp()
    before = F.pad(c[:, -1:].expand(-1, n).cumsum(1), (1, 0))[:, :-1]  # N n: log decay over all chunks before k
    after = before + c[:, -1:]
    never = torch.ones(n, n, dtype=torch.bool, device=d.device).triu()
    across = (before[:, :, None] - after[:, None, :]).masked_fill(never, -torch.inf).exp()
    return C, within, c.exp().T, across, before.exp().T


@functools.lru_cache(16)
def constant_tables(decay: Decay, T: int, chunk: int, device, dtype) -> tuple:
    C, *tables = decay_tables(decay.value(), T, chunk)
    return C, *(x.to(device, dtype) for x in tables)


def mixed(table: Tensor, x: Tensor) -> Tensor:
    """`table` [N, C, C] on axis -2 of `x` [..., C, D]: one matrix for all channels, or one for each."""
    return torch.matmul(table[0], x) if len(table) == 1 else torch.einsum("dij,...jd->...id", table, x)


def scan(x: Tensor, decay: Decay | Tensor, state: Tensor | None = None, chunk: int = 64) -> Tensor:
    """m_t = d m_{t-1} + x_t over axis 1 of `x` [B, T, D] in fp32, from `state` [B, D] (zero). `decay`: constant, or a
    learned d [D]. Two levels of matrix products: inside chunks, then over their ends. O(T chunk D), no loop over t."""
    B, T, D = x.shape
    learned = isinstance(decay, Tensor)
    if T == 1:  # a streaming step
        d = decay if learned else decay.value().to(x.device, x.dtype)
        return x if state is None else x + d * state[:, None]
    if learned:
        C, *tables = decay_tables(decay, T, chunk)
        within, into, across, first = (table.to(x.dtype) for table in tables)
    else:
        C, within, into, across, first = constant_tables(decay, T, chunk, x.device, x.dtype)
    n = len(first)
    x = F.pad(x, (0, 0, 0, n * C - T)) if n * C > T else x
    m = mixed(within, x.view(B, n, C, D))  # B n C D
    if n > 1 or state is not None:
        before = mixed(across, m[:, :, -1])  # B n D: the state before each chunk
        if state is not None:
            before = before + first * state[:, None]
        m = m + into * before[:, :, None]
    return m.reshape(B, n * C, D)[:, :T]


class PhaseVectorMemory(nn.Module):
    """m_t = beta m_{t-1} + alpha R(theta_t) w(v_t), m_{-1} = 0; read back in the content frame, R(-theta_t) m_t.

    w(v) = kappa v / max(1, RMS(kappa v)), kappa = 10/3: a lane block's mixer output has RMS 0.3 at the start, so it is
    written at RMS 1; it may be written weaker (a learned write gate), never stronger: RMS(m) <= alpha / (1 - beta).
    The state has `dim` values for any T. `memory` [dim] is the last one, averaged over the batch; nothing reads it."""

    def __init__(self, dim: int, alpha=0.3, beta=0.85, omega=6.0, phi=0.0, gate_init=-2.0, decay: Decay | None = None):
        super().__init__()
        decay = decay or Decay(beta)
        require(all(0 <= b < 1 for b in np.atleast_1d(decay.beta)), f"beta {decay.beta} is not in [0, 1)")
        self.alpha, self.decay, self.phase = alpha, decay, Phase(omega, phi)
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))
        self.register_buffer("memory", torch.zeros(dim))

    @staticmethod
    def written(v: Tensor) -> Tensor:
        """w(v), of the shape of `v` [..., D]."""
        w = v.to(torch.promote_types(v.dtype, torch.float32)) * (10 / 3)
        return w * w.square().mean(-1, keepdim=True).clamp(min=1).rsqrt()

    def accumulated(self, w: Tensor, state: Tensor | None, start: int, table) -> tuple[Tensor, Tensor]:
        """w [B, T, D] -> (what can be read at each position [B, T, D], state [B, D] after the last token)."""
        cos, sin = table or self.phase(w.shape[1], start)
        m = scan(self.alpha * rotate(w, cos, sin), self.decay, state)  # B T D
        return rotate(m, cos, -sin), m[:, -1]

    def read(self, v: Tensor, state: Tensor | None = None, start: int = 0, table=None, keep: bool = True):
        """v [B, T, D] -> (content-frame memory [B, T, D], state [B, D] after the last token)."""
        with torch.autocast(v.device.type, enabled=False):
            content, state = self.accumulated(self.written(v), state, start, table)
        if keep:
            self.memory.copy_(content[:, -1].detach().mean(0))
        return content, state

    def forward(self, x: Tensor) -> Tensor:
        """x + sigmoid(gate) R(-theta) m, same shape, causal; every sequence starts from an empty memory."""
        return x + self.gate.sigmoid() * self.read(x)[0]

    def step(self, x_t: Tensor, state: Tensor | None, t: int) -> tuple[Tensor, Tensor]:
        """One token, O(D): x_t [B, D], state [B, D] or None at the start -> (what `forward` gives at t, new state)."""
        content, state = self.read(x_t[:, None], state, t, keep=False)
        return x_t + self.gate.sigmoid() * content[:, 0], state


class DiagonalMemory(PhaseVectorMemory):
    """A rival of equal state, without rotation: m_t = a m_{t-1} + sqrt(1 - a^2) w(v_t), where every channel learns its
    own retention a [D] (Orvieto et al. 2023, with real values). They begin spread over 0.5 to 0.999."""

    def __init__(self, dim: int, **more):
        super().__init__(dim, **more)
        self.retention = nn.Parameter(torch.tensor(spread(0.5, 0.999, dim)).logit())

    def accumulated(self, w: Tensor, state: Tensor | None, start: int, table) -> tuple[Tensor, Tensor]:
        a = self.retention.sigmoid()
        m = scan((1 - a * a).sqrt() * w, a, state)  # B T D
        return m, m[:, -1]


class DeltaMemory(PhaseVectorMemory):
    """A rival of equal state, the gated delta rule (Yang et al. 2024): with keys k_t of norm one, strength b_t and
    retention a_t in (0, 1), all linear in w(v_t), a matrix S [P, Q] of P Q = D values is

        S_t = a_t S_{t-1} + b_t k_t (u_t - a_t S_{t-1}^T k_t)^T

    It takes out what the key held before it writes. Read whole, as a vector of D, as the PVM is. Chunks are solved as
    triangular systems; the loop is over chunks."""

    def __init__(self, dim: int, chunk: int = 64, **more):
        super().__init__(dim, **more)
        self.P = next(p for p in range(math.isqrt(dim), 0, -1) if dim % p == 0)
        self.key, self.chunk = nn.Linear(dim, self.P, bias=False), chunk
        self.value = nn.Linear(dim, dim // self.P, bias=False)
        self.rates = nn.Linear(dim, 2)
        self.rates.bias.data.copy_(torch.tensor([4.0, 0.0]))  # retention 0.982, strength 0.5

    def accumulated(self, w: Tensor, state: Tensor | None, start: int, table) -> tuple[Tensor, Tensor]:
        S, contents = w.new_zeros(len(w), w.shape[2]) if state is None else state, []
        for x in w.split(self.chunk, 1):  # B C D
            k, u = F.normalize(self.key(x), dim=-1), self.value(x)  # B C P, B C Q
            log_a, b = F.logsigmoid(self.rates(x)[..., :1]), self.rates(x)[..., 1:].sigmoid()  # B C 1 each
            g = log_a.cumsum(1)
            left = (g - g.mT).tril().exp().tril()  # B C C: what is left at t of what was written at j
            held = k @ S.unflatten(1, (self.P, -1)) * g.exp()  # B C Q: of the chunks before
            mutual = (b * (k @ k.mT) * left).tril(-1) + torch.eye(x.shape[1]).to(x)
            new = torch.linalg.solve_triangular(mutual, b * (u - held), upper=False)  # B C Q
            outer = torch.einsum("bcp,bcq->bcpq", k, new).flatten(2)  # B C D
            contents.append(left @ outer + g.exp() * S[:, None])
            S = contents[-1][:, -1]
        return torch.cat(contents, 1), S


MEMORIES = {"pvm": PhaseVectorMemory, "diagonal": DiagonalMemory, "delta": DeltaMemory}


class HybridMemory(nn.Module):
    """mix * PVM + (1 - mix) * causal attention over the last `window` tokens, at every position. The document's version
    mixes batch and time and attends from the last 32 positions only; no documented command uses it."""

    def __init__(self, dim: int, num_heads: int = 8, window: int = 32, mix: float = 0.7, **pvm):
        super().__init__()
        require(dim % num_heads == 0, f"width {dim} is not divisible by {num_heads} heads")
        self.pvm = PhaseVectorMemory(dim, **pvm)
        self.heads, self.window, self.mix = num_heads, window, mix
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # B H T K each
        near = torch.ones(T, T, dtype=torch.bool, device=x.device).tril().triu(1 - self.window)
        y = F.scaled_dot_product_attention(q, k, v, near).transpose(1, 2).reshape(B, T, D)
        return self.mix * self.pvm(x) + (1 - self.mix) * self.out(y)


class Trace(NamedTuple):
    """What a block computed: `y`, `r` [B, T, D]; `content` [B, T, D], the memory in the content frame, or None."""

    y: Tensor
    r: Tensor
    content: Tensor | None


class AFRBAdapter(nn.Module):
    """One lane block of the module docstring: 2 D^2 + 6 D + 1 parameters, and the gate with a PVM (width 2048:
    8,400,897 and one). gamma, the residual gate, is its only other learned scalar; alpha, omega, phi, s are buffers.
    `kinds`: omega_bounds and linear, of the phase; memory, one of MEMORIES; pvm, what its constructor takes besides."""

    def __init__(self, dim: int, alpha=0.04, omega=6.0, gamma=0.2, use_pvm=False, phi=0.0, scale=1.0, **kinds):
        super().__init__()
        omega_bounds, linear, memory, pvm = (kinds.get(name) for name in ("omega_bounds", "linear", "memory", "pvm"))
        self.norm_in = nn.LayerNorm(dim)
        self.mixer = nn.Linear(dim, 2 * dim)
        self.norm_out = nn.LayerNorm(dim)
        self.gamma_raw = nn.Parameter(torch.tensor(math.log(gamma / (1 - gamma))))
        self.phase = Phase(omega, phi, omega_bounds, bool(linear))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.pvm = MEMORIES[memory or "pvm"](dim, omega=omega, phi=phi, **(pvm or {})) if use_pvm else None

    gamma = property(lambda self: self.gamma_raw.sigmoid())

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Matrices uniform(+-1 / sqrt(D)), biases zero: the mixer's output then has RMS 0.3."""
        for p in self.parameters():
            if p.ndim == 2:
                p.uniform_(-1, 1, generator=generator).mul_(p.shape[1] ** -0.5)
        self.mixer.bias.zero_()

    def mixed(self, x: Tensor, cos_sin: tuple) -> Tensor:
        """v of `x` [..., T, D]: what the memory is given."""
        u = self.norm_in(x)
        blend = torch.lerp(u, rotate(u, *cos_sin), self.alpha.to(u.dtype))
        a, g = self.mixer(blend).to(x.dtype).chunk(2, -1)
        return a * g.sigmoid()

    def forward(self, x: Tensor, state=None, start: int = 0, use_memory: bool = True, keep: bool = True):
        """x [B, T, D] -> (Trace, state for the tokens that follow). `use_memory=False` closes the gate."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        cos_sin = self.phase(x.shape[1], start)
        v = self.mixed(wide, cos_sin)  # B T D
        content = None
        if self.pvm is not None:
            content, state = self.pvm.read(v, state, start, cos_sin, keep)
            if use_memory:
                v = v + self.pvm.gate.sigmoid() * content
        r = self.norm_out(v)
        y = wide + self.gamma * self.scale * r
        return Trace(y.to(x.dtype), r, content), state


class LanePass(NamedTuple):
    """What one pass of `x` [B, T, D] through the lane computed: a Trace of every block, and the state from which the
    tokens that follow go on, (tokens so far, what each block remembers)."""

    x: Tensor
    traces: list[Trace]
    state: tuple | None

    @property
    def y(self) -> Tensor:  # B T D
        return self.traces[-1].y if self.traces else self.x

    @property
    def content(self) -> Tensor:
        """What the readout reads, [B, T, D]: the memory in the content frame, mean over the blocks."""
        return torch.stack([trace.content for trace in self.traces]).mean(0)


class Lane:
    """The blocks, and their place in the frozen model: behind its embedding, or behind the caller's `inputs_embeds`.

    Hooks put them there, so that `model(ids)` and `model.generate` pass through them. `call` is the pass of the model's
    call that is running, and None between calls. A KV cache carries the blocks' states along, so that decoding with a
    cache is exact. A caller that has run the lane itself says so with `lane=False`."""

    def __init__(self, model, blocks: nn.ModuleList):
        self.blocks, self.call = blocks, None
        body = model.base_model
        self.encoder = hasattr(body, "embeddings")  # BERT and its kin embed inputs_embeds there as well
        self.embedding = body.embeddings if self.encoder else model.get_input_embeddings()
        body.register_forward_pre_hook(self.enter, with_kwargs=True)
        self.embedding.register_forward_hook(self.embed)
        body.register_forward_hook(self.leave, always_call=True)

    def run(self, x: Tensor, state: tuple | None = None, use_memory: bool = True, keep: bool = True) -> LanePass:
        """The blocks on `x` [B, T, D], from `state` on. `use_memory=False` closes the gates; `keep=False` leaves the
        buffers `pvm.memory` as they are."""
        start, before = state or (0, [None] * len(self.blocks))
        y, traces, after = x, [], []
        for block, remembered in zip(self.blocks, before):
            trace, remembered = block(y, remembered, start, use_memory, keep)
            y = trace.y
            traces.append(trace)
            after.append(remembered)
        return LanePass(x, traces, (start + x.shape[1], after))

    def enter(self, module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and self.blocks:
            padded = "the lane counts positions from the first token: pad on the right, not left"
            require(bool(mask[:, 0].all()), padded)
        if kwargs.pop("lane", True):
            state = getattr(kwargs.get("past_key_values"), "afrb_state", None)
            self.call = LanePass(None, [], state)
            if not self.encoder and kwargs.get("inputs_embeds") is not None:
                self.call = self.run(kwargs["inputs_embeds"], state)
                kwargs = kwargs | {"inputs_embeds": self.call.y}
        return args, kwargs

    def embed(self, module, args, output):
        if self.call is None or self.call.x is not None:
            return None  # not within a call of the model, or the lane was applied already
        self.call = self.run(output, self.call.state)
        return self.call.y

    def leave(self, module, args, output):
        call, self.call = self.call, None
        cache = getattr(output, "past_key_values", None)
        if call is None or cache is None or not self.blocks:
            return
        if not hasattr(cache, "afrb_state") and hasattr(cache, "reorder_cache"):
            from accelerate.utils import recursively_apply

            reorder_keys = cache.reorder_cache

            def reorder(beam_idx):  # beam search
                cache.afrb_state = recursively_apply(lambda s: s[beam_idx.to(s.device)], cache.afrb_state)
                return reorder_keys(beam_idx)

            cache.reorder_cache = reorder
        cache.afrb_state = call.state


INJECTION = ARCHITECTURE | dict(pvm_gate_init=-2.0, seed=41)  # flags that say what is injected


def refuse_to_save(*args, **kwargs):
    """`save_pretrained` of a model with a lane: the library's loader silently drops weights unknown to it."""
    raise core.Failure("save_pretrained would lose the lane: keep a run's checkpoint_final.pt, load it by --resume")


@torch.no_grad()
def inject_afrb_adapters(model, n_afrb, alpha, omega, gamma, device, use_pvm=False, pvm_alpha=0.3, pvm_beta=0.85, **kw):
    """Freeze `model` and put `n_afrb` blocks behind its embedding. Adds `afrb_adapters`, `afrb_lane`, with a PVM also
    `pvm2emb` (and `pvm_mlp` with `readout="mlp"`), and `get_pvm_readout`. Failure if that was done already.
    `kw`: values for any of INJECTION."""
    require(kw.keys() <= INJECTION.keys(), f"inject_afrb_adapters takes {', '.join(INJECTION)}, not {', '.join(kw)}")
    given = types.SimpleNamespace(**(INJECTION | kw | {"pvm_beta": pvm_beta}))
    require(not hasattr(model, "afrb_adapters"), "AFRB adapters are already injected into this model: load a fresh one")
    model.requires_grad_(False).eval()
    table = model.get_input_embeddings().weight
    D = table.shape[1]
    scale = 0.0 if table.is_meta else float(table.float().square().mean().sqrt())
    pvm = dict(alpha=pvm_alpha, gate_init=given.pvm_gate_init, decay=decay_of(given, D))
    bounds = (given.omega_min, given.omega_max) if given.adaptive_omega else None
    kinds = dict(omega_bounds=bounds, linear=given.phase == "linear", memory=given.memory, pvm=pvm)
    g = core.generator(given.seed, "init")
    blocks = nn.ModuleList()
    for i in range(n_afrb):
        alpha_i = alpha * math.exp(-given.cascade_lambda * i)
        omega_i = omega + given.omega_delta * i
        blocks.append(AFRBAdapter(D, alpha_i, omega_i, gamma, use_pvm, given.phase_delta * i, scale, **kinds))
        blocks[-1].reset(g)
    model.afrb_adapters = blocks.to(device)
    if use_pvm and n_afrb:
        model.pvm2emb = nn.Linear(D, D, bias=False)
        model.pvm2emb.weight.uniform_(-1, 1, generator=g).mul_(D**-0.5)
        model.pvm2emb.to(device)
        if given.readout == "mlp":
            model.pvm_mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)).to(device)
            core.init_normal(model.pvm_mlp, given.seed, D**-0.5)
    model.afrb_lane = Lane(model, blocks)
    model.get_pvm_readout, model.save_pretrained = functools.partial(get_pvm_readout, model), refuse_to_save
    return model


@torch.no_grad()
def get_pvm_readout(model, tokens: Tensor) -> Tensor:
    """Final content-frame memory, fp32 [B, D], of `tokens` [T] or [B, T]: the lane alone, no pass through the frozen
    model; `pvm.memory` is left as it is. Failure without a PVM."""
    lane = model.afrb_lane
    require(any(block.pvm is not None for block in lane.blocks), "get_pvm_readout needs a model with use_pvm=True")
    return lane.run(lane.embedding(tokens.reshape(-1, tokens.shape[-1])), keep=False).content[:, -1].float()


class NoAttention(nn.Module):
    """An attention module that contributes nothing: a zero of its input's shape (a view, no memory), and as many
    `None`s as the original returned besides."""

    def __init__(self, extra: int | None):
        super().__init__()
        self.extra = extra  # None: the original returns a bare tensor

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        zero = hidden_states.new_zeros(()).expand_as(hidden_states)
        return zero if self.extra is None else (zero, *([None] * self.extra))


def attention_names(model) -> list[str]:
    return [name for name, _ in model.base_model.named_modules() if name.rsplit(".", 1)[-1] in ("self_attn", "attn")]


@torch.no_grad()
def disable_attention(model) -> int:
    """Replace every attention module of a decoder by NoAttention and free its weights; returns how many. What the
    original returns is found by calling the model once on two tokens."""
    body, returned = model.base_model, {}
    hooks = [
        body.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: returned.update({name: out}))
        for name in attention_names(model)
    ]
    body(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    require(returned, f"--disable-attn: no attention module called self_attn or attn in {type(model).__name__}")
    for name, out in returned.items():
        body.set_submodule(name, NoAttention(len(out) - 1 if isinstance(out, tuple) else None))
    return len(returned)


class Pass(NamedTuple):
    """One forward pass of the frozen model: its last hidden state, and what the lane computed on the way."""

    hidden: Tensor  # B T D
    lane: LanePass
    readout: bool  # whether the memory's scores are added to the logits


READERS = ("pvm2emb", "pvm_mlp")  # the readout's matrices in the model, where it has them


class Resonant(nn.Module):
    """The frozen model with its lane and its readout; logits are formed at scored positions only.

    Readout: e_t = W_e r_t with r_t the mean over blocks of the content-frame memory; the score of token v is the cosine
    of e_t and v's input embedding over tau, added to the model's logit. --readout mlp adds a hidden layer."""

    def __init__(self, model, args: Args):
        super().__init__()
        self.model, self.args, self.lane = model, args, model.afrb_lane
        self.table = None  # the normalised embedding table, made when it is needed first
        self.reads = args.readout_from == "pvm"
        for name in READERS:
            if hasattr(model, name):
                getattr(model, name).requires_grad_(self.reads or args.infonce_weight > 0)
        if args.gradient_checkpointing:
            from transformers.modeling_layers import GradientCheckpointingLayer

            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():  # a layer recomputes only while it trains; its dropout stays off
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True

    def train(self, mode: bool = True):
        return self  # dropout of the frozen model stays off

    def embeddings(self) -> Tensor:
        """The input embedding table, rows of norm one, fp32 [V, D]."""
        if self.table is None:
            self.table = F.normalize(self.model.get_input_embeddings().weight.detach().float(), dim=-1)
        return self.table

    def run(self, ids: Tensor, without: str = "") -> Pass:
        """One forward pass over `ids` [B, T]. `without` "memory" closes the lane's gate, "lane" passes the embedding on
        as it is, "readout" takes only the readout away, which goes with either."""
        x = self.lane.embedding(ids)  # B T D
        lane = LanePass(x, [], None) if without == "lane" else self.lane.run(x, use_memory=without != "memory")
        hidden = self.model.base_model(inputs_embeds=lane.y, use_cache=False, lane=False).last_hidden_state
        return Pass(hidden, lane, self.reads and not without)

    def recalled(self, lane: LanePass, at: Tensor) -> Tensor:
        """e [B, A, D], fp32, norm one: what the readout reads at positions `at` [B, A], through W_e."""
        r = pick(lane.content, at)
        e = self.model.pvm2emb(r)
        if self.args.readout == "mlp":
            e = e + self.model.pvm_mlp(r)
        return F.normalize(e.float(), dim=-1)

    def readout(self, done: Pass, at: Tensor) -> Tensor | None:
        """e [B, A, D] at positions `at` [B, A]; None where there is no readout."""
        return self.recalled(done.lane, at) if done.readout else None

    def scores(self, e: Tensor) -> Tensor:
        """Cosines [..., V] of `e` [..., D] and the input embeddings."""
        return e @ self.embeddings().T

    def logits(self, hidden: Tensor, e: Tensor | None) -> Tensor:
        """fp32 [..., V] of `hidden` [..., D] and what `readout` gave for it. All scores come from here, or, where there
        is no readout, from `core.next_token_loss`."""
        logits = self.model.get_output_embeddings()(hidden).float()
        if e is None:
            return logits
        with torch.autocast(hidden.device.type, enabled=False):
            return logits + self.args.readout_scale / self.args.infonce_tau * self.scores(e)

    def logits_at(self, done: Pass, at: Tensor) -> Tensor:
        """The logits [B, A, V] at positions `at` [B, A] of a forward pass."""
        return self.logits(pick(done.hidden, at), self.readout(done, at))

    def losses(self, done: Pass, at: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy [B, A] of `target` [B, A] at positions `at` [B, A], never holding all logits."""
        head, e = self.model.get_output_embeddings(), self.readout(done, at)
        x = pick(done.hidden, at).flatten(0, 1)
        rows = max(1, core.LOSS_CHUNK // head.weight.shape[0])
        es = itertools.repeat(None) if e is None else e.flatten(0, 1).split(rows)

        def part(x, e, target):
            return F.cross_entropy(self.logits(x, e), target, reduction="none")

        pieces = zip(x.split(rows), es, target.flatten().split(rows))
        few = len(x) <= rows
        return torch.cat([part(*p) if few else checkpoint(part, *p, use_reentrant=False) for p in pieces]).view_as(at)

    def loss(self, done: Pass, ids: Tensor, first: int = 0) -> Tensor:
        """Mean cross-entropy of ids[:, first + 1 :], each token under the position before it; ids [B, T]."""
        head, at = self.model.get_output_embeddings(), positions(ids, first)
        if not done.readout and getattr(head, "bias", None) is None:
            return core.next_token_loss(done.hidden[:, first:], head.weight, ids[:, first:])
        return self.losses(done, at, ids.gather(1, at + 1)).mean()

    def forward(self, ids: Tensor, anchors: Tensor | None = None, negatives: Tensor | None = None) -> dict:
        """Losses of `ids` [B, T]: `loss` and its parts `lm_loss`, `infonce_loss`; and `lane`, the LanePass without its
        graph. `anchors` [B, A]: positions whose memory is contrasted; `negatives` [B, A, N] in [0, V - 1), moved past
        the positive's id here."""
        from accelerate.utils import recursively_apply

        args, done = self.args, self.run(ids)
        first = first_scored(args, ids.shape[1])
        loss = lm_loss = self.loss(done, ids, first)
        infonce_loss = torch.zeros_like(lm_loss)
        if anchors is not None:
            target = ids.gather(1, anchors + 1)  # B A
            negatives = negatives + (negatives >= target[..., None])
            with torch.autocast(ids.device.type, enabled=False):
                e, table = self.recalled(done.lane, anchors), self.embeddings()
                infonce_loss = infonce(e, table[target], table[negatives], args.infonce_tau)
            loss = loss + args.infonce_weight * infonce_loss
        if args.legacy_echo:  # the published term, which is at fault: an answer position's label is its own input
            at = positions(ids, first) + 1
            loss = loss + 0.5 * self.losses(done._replace(readout=False), at, ids.gather(1, at)).mean()
        lane = recursively_apply(Tensor.detach, done.lane)
        return {"loss": loss, "lm_loss": lm_loss, "infonce_loss": infonce_loss, "lane": lane}


def positions(ids: Tensor, first: int = 0) -> Tensor:
    """[B, T - 1 - first]: the positions of `ids` [B, T] from `first` on that predict a token."""
    return torch.arange(first, ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)


def pick(x: Tensor, at: Tensor) -> Tensor:
    """`x` [B, T, D] at positions `at` [B, A]: [B, A, D]."""
    return x[torch.arange(len(at), device=at.device)[:, None], at]


def infonce(e: Tensor, positive: Tensor, negatives: Tensor, tau: float) -> Tensor:
    """-log softmax of the positive's cosine over tau, mean over anchors: e, positive [B, A, D], negatives [B, A, N, D],
    all of norm one. ln(1 + N) at chance (van den Oord et al. 2018, eq. 4)."""
    scores = torch.cat([positive[..., None, :], negatives], -2) @ e[..., None] / tau  # B A 1+N 1
    return -scores.squeeze(-1).log_softmax(-1)[..., 0].mean()


def ridge(Z: Tensor, E: Tensor, l2: float) -> Tensor:
    """W [D, D'] of least ||Z W - E||^2 + l2 ||W||^2 in fp64; Z [N, D], E [N, D']. For N < D by its N x N dual."""
    Z, E = Z.double(), E.double()
    if len(Z) < Z.shape[1]:
        return Z.T @ torch.linalg.solve(Z @ Z.T + l2 * torch.eye(len(Z)).to(Z), E)
    return torch.linalg.solve(Z.T @ Z + l2 * torch.eye(Z.shape[1]).to(Z), Z.T @ E)


def llama_config(width: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, **more):
    from transformers import LlamaConfig

    shape = dict(hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, vocab_size=vocab)
    return LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, **shape, **more)


def tiny_config(tied: bool = True):
    return llama_config(64, 128, 2, 4, 2, 512, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def load_model(args: Args, dtype: torch.dtype = torch.float32):
    """(frozen model, tokenizer or None) of --model. Under `torch.device("meta")` a named model is built from its
    configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if args.model == "random:tinyllama":
        config = llama_config(2048, 5632, 22, 32, 4, 32000, max_position_embeddings=2048)
    elif args.model in ("tiny", "tiny_untied"):
        config = tiny_config(args.model == "tiny")
    elif torch.empty(0).is_meta:
        core.hub_ready()
        try:
            config = AutoConfig.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            raise core.Failure(f"model {args.model} did not load; use --model tiny or a local directory") from error
    else:
        return core.load_backbone(args.model, dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    core.init_normal(model, 0)  # the same frozen model whatever --seed is
    return model.eval(), core.load_tokenizer("byte")


def build_model(args: Args, model) -> Resonant:
    """`model` with the lane injected, and the readout around it."""
    flags = {name: getattr(args, name) for name in INJECTION}
    inject_afrb_adapters(model, gamma=args.gamma, device=model.device, use_pvm=args.enable_pvm, **flags)
    if args.readout == "cancel":
        from scripts.afrb_recall import Cancelling

        return Cancelling(model, args)
    return Resonant(model, args)


# ----------------------------------------------------------------------------------------------------------- data
def sequence_length(args: Args) -> int:
    """Tokens of a sequence: of a needle item its haystack, separator, query and answer; else of a block of text."""
    if args.task == "language":
        return args.seq or 512
    query = 5 if args.needle_query else 0
    return args.context + 1 + query + args.needle_len


def first_scored(args: Args, T: int) -> int:
    """The first position whose prediction is scored: of a needle item the one before its answer, of text the first."""
    return T - 1 - args.needle_len if args.task == "needle" else 0


def needle_places(args: Args) -> tuple[int, int]:
    """Least and largest position of the needle's first token, both included."""
    low, high = max(2, args.ctx_chunk_len), args.context - args.ctx_chunk_len - args.needle_len
    return (low, high) if low <= high else (2, args.context - args.needle_len)


class Ids(NamedTuple):
    """Reserved tokens, and the ranges [lo, hi) that needles and haystack are drawn from."""

    sep: int
    query: list[int]  # QUERY RETURN ARROW KEY1 KEY2
    needle: tuple[int, int]
    haystack: tuple[int, int]


def token_ids(args: Args, vocab: int, eos) -> Ids:
    large = vocab >= 4096
    lo, hi = (110, vocab - 100) if large else (16, vocab)
    cut = hi - (hi - lo) // 10 if args.needle_marker == "range" else lo
    require(hi - lo > 2 * args.needle_len + 16, f"{vocab} token ids are too few for --needle-len {args.needle_len}")
    require(hi - cut >= args.needle_len, f"--needle-marker range leaves {hi - cut} ids for {args.needle_len} tokens")
    query = list(range(100, 105)) if large else list(range(3, 8))
    eos = eos[0] if isinstance(eos, list) else eos
    sep = 2 if eos is None or lo <= eos < hi or eos >= vocab else eos
    return Ids(sep, query, (cut, hi), (lo, cut if cut > lo else hi))


class Needles(torch.utils.data.Dataset):
    """Item i of a stream is a pure function of (seed, stream, i): (ids [T], position of the needle's first token).

    haystack with KEY1 KEY2 n_1 .. n_L in it | SEP | QUERY RETURN ARROW KEY1 KEY2 | n_1 .. n_L, scored. The needle's
    tokens differ from each other and from the haystack's; key and query say nothing about them."""

    def __init__(self, args: Args, ids: Ids, stream: str, seed: int):
        self.args, self.ids, self.stream, self.seed = args, ids, stream, seed

    def __len__(self) -> int:
        return 2**40  # endless

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        a, ids, L = self.args, self.ids, self.args.needle_len
        rng = np.random.default_rng(core.derived_seed(self.seed, self.stream, i))
        needle = ids.needle[0] + rng.choice(ids.needle[1] - ids.needle[0], L, replace=False)
        others = np.setdiff1d(np.arange(*ids.haystack), needle, assume_unique=True)
        haystack = others[rng.integers(len(others), size=a.context)]
        low, high = needle_places(a)
        p = int(rng.integers(low, high + 1))
        haystack[p : p + L] = needle
        if a.needle_marker == "key":
            haystack[p - 2 : p] = ids.query[3:]
        query = ids.query if a.needle_query else []
        return np.concatenate([haystack, [ids.sep, *query], needle]), p


class Data(NamedTuple):
    train: Needles | list  # of items (ids [T], place of the needle, in text 0)
    calibration: Needles | list
    validation: Needles | list
    test: Needles | list
    source: str
    fingerprint: str  # of everything above: a resumed run must find it unchanged


def load_data(args: Args, model, tokenizer) -> Data:
    vocab = model.get_input_embeddings().weight.shape[0]
    if args.task == "needle":
        ids = token_ids(args, vocab, model.config.eos_token_id)
        seeds = {"train": args.seed, "calibration": args.seed, "validation": args.eval_seed, "test": args.eval_seed}
        parts = [Needles(args, ids, stream, seed) for stream, seed in seeds.items()]
        return Data(*parts, "random tokens", core.digest(ids, seeds))  # and of the flags, which are compared anyway
    length, source = sequence_length(args), f"{args.data} {args.data_path}".strip()
    splits = ("train", "validation", "test") if args.data == "wikitext2" else ("train", "validation")
    texts = [core.load_text(args.data, split, args.data_path) for split in splits]
    rows = [core.blocks(core.encode(text, tokenizer), length, f"--data {source}") for text in texts]
    require(max(int(r.max()) for r in rows) < vocab, "the tokenizer has more entries than the model")
    if len(rows) == 2:  # a source with one held-out part: its first half validates, its second half tests
        n = len(rows[1])
        require(n >= 2, f"--data {source}: the held-out part has {n} blocks, 2 are needed: lower --seq")
        rows[1:] = rows[1][: n // 2], rows[1][n // 2 :]
    n, aside, each = len(rows[0]), 0, min(64, length - 1)
    if args.kiss_ridge_calib:  # blocks kept from training, `each` pairs from each, for the fit and for its check
        aside = -(-args.kiss_ridge_max_pairs // each) + -(-128 // each)
        require(n > 2 * aside, f"--data {source}: {n} blocks are too few to keep {aside} for calibration")
    parts = rows[0][: n - aside], rows[0][n - aside :], rows[1], rows[2]
    items = [[(row, 0) for row in part.astype(np.int64)] for part in parts]
    return Data(*items, source, core.digest(*parts))


def order(args: Args, data: Data, micro: int, rank: int, world: int) -> list[int]:
    """Items of micro-batch `micro`: a pure function, and the same sequence for (bs 1, ga 4) and (bs 4, ga 1)."""
    B, n = args.bs * world, len(data.train)
    if args.task == "needle":
        return list(range(micro * B + rank * args.bs, micro * B + (rank + 1) * args.bs))
    return core.batch_indices(n, B, args.seed, micro)[rank * args.bs : (rank + 1) * args.bs]


def stream(args: Args, data: Data, micros: range, vocab: int, accelerator):
    """Training micro-batches of this process, on the device: ids [B, T]; anchors [B, A] and negatives [B, A, N] of the
    contrastive loss."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    pin = device.type == "cuda" if args.pin_memory is None else args.pin_memory and torch.cuda.is_available()
    how = dict(num_workers=args.num_workers, pin_memory=pin, worker_init_fn=core.ignore_signals)
    items = (order(args, data, micro, rank, world) for micro in micros)
    generator = core.generator(args.seed, "loader")  # else a new loader would draw from the global stream
    loader = torch.utils.data.DataLoader(data.train, batch_sampler=items, generator=generator, **how)
    for micro, (ids, _) in zip(micros, loader):
        first = (micro * world + rank) * args.bs
        contrasted = contrast(args, range(first, first + args.bs), ids.shape[1], vocab, device)
        yield ids.to(device, non_blocking=True), *contrasted


def draw(items: Needles | list, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` items: (ids [N, T], needle positions [N])."""
    chosen = [items[i] for i in range(min(count, len(items)))]
    return torch.from_numpy(np.stack([ids for ids, _ in chosen])), torch.tensor([p for _, p in chosen])


def anchors_of(args: Args, T: int, g: torch.Generator) -> Tensor:
    """Positions [A] at which the memory is contrasted or calibrated: those that predict the needle, or 64 of a text
    block at random."""
    needle = torch.arange(first_scored(args, T), T - 1)
    return needle if args.task == "needle" else torch.randperm(T - 1, generator=g)[:64]


def contrast(args: Args, places: range, T: int, vocab: int, device) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(anchors [B, A], negatives [B, A, N]) of the items at these places of the training order."""
    if not args.infonce_weight:
        return None, None
    anchors, negatives = [], []
    for i in places:
        g = core.generator(args.seed, "sampling", i)
        anchors.append(anchors_of(args, T, g))
        negatives.append(torch.randint(vocab - 1, (len(anchors[-1]), args.infonce_negatives), generator=g))
    return torch.stack(anchors).to(device, non_blocking=True), torch.stack(negatives).to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------- evaluate
LANE_METRICS = "phase_coherence phase_coherence_null phase_locking entropy_flow gamma_saturation".split()
LANE_METRICS += "gamma_saturated_frac pvm_gate_strength pvm_memory_norm".split()


@torch.no_grad()
def lane_metrics(blocks: nn.ModuleList, lane: LanePass, args: Args) -> dict[str, float | None]:
    """Order of a forward pass's phases and state of the lane; None for what does not exist or was not asked.

    phase_coherence: mean over b, t of |mean over k of e^(i psi)|, psi the angle of pair k of r in the last block. A
    rotation common to all pairs leaves it as it is; phase_locking, the mean over b, k of |mean over t of
    e^(i (psi - theta_t))|, shows one. entropy_flow: rise through the lane of the entropy of h_k^2 / |h|^2 over ln D."""
    metrics = dict.fromkeys(LANE_METRICS)
    if not blocks:
        return metrics
    gammas = torch.stack([block.gamma for block in blocks])
    metrics["gamma_saturation"] = float(gammas.mean())
    metrics["gamma_saturated_frac"] = float(((gammas < 0.05) | (gammas > 0.95)).float().mean())
    if blocks[0].pvm is not None:
        last = torch.stack([trace.content[:, -1] for trace in lane.traces])  # blocks B D
        metrics["pvm_gate_strength"] = float(torch.stack([block.pvm.gate.sigmoid() for block in blocks]).mean())
        metrics["pvm_memory_norm"] = float(last.square().mean(-1).sqrt().mean())
    if args.skip_phase_metrics:
        return metrics
    r = lane.traces[-1].r  # B T D
    K = r.shape[-1] // 2
    theta = blocks[-1].phase.theta(r.shape[1])[:, None]
    unit = F.normalize(torch.stack([r[..., :K], r[..., K : 2 * K]], -1).float(), dim=-1)  # B T K 2: e^(i psi)
    turned = rotate(unit.transpose(1, 2), theta.cos(), -theta.sin())  # B K T 2
    metrics["phase_coherence"] = float(unit.mean(2).norm(dim=-1).mean().clamp(0, 1))
    metrics["phase_coherence_null"] = math.sqrt(math.pi / (4 * K))
    metrics["phase_locking"] = float(turned.mean(2).norm(dim=-1).mean().clamp(0, 1))
    metrics["entropy_flow"] = float(entropy(lane.y) - entropy(lane.x))
    return metrics


def entropy(h: Tensor) -> Tensor:
    """Mean over positions of the entropy of h_k^2 / |h|^2, over ln D: 1 where all D channels are equally strong."""
    p = F.normalize(h.float(), dim=-1).square()
    return -torch.special.xlogy(p, p).sum(-1).mean() / math.log(h.shape[-1])


def interval(shares: Tensor) -> dict:
    """{mean, lo, hi, n} of what each needle has right [N], 95 %: tokens of one needle hang together, so needles are
    drawn. By bootstrap; Wilson's where every needle has all or nothing, which a bootstrap of few cannot see."""
    if ((shares == 0) | (shares == 1)).all():
        return core.wilson(int(shares.sum()), len(shares))
    return core.bootstrap(shares.tolist())


class Scores(NamedTuple):
    """Per needle token: `hit`, `topk` (bool) and `nll` in nats, each [N, L]."""

    hit: Tensor
    topk: Tensor
    nll: Tensor

    def rates(self, name: str = "needle") -> dict[str, float]:
        """Needles count only whole; and single tokens."""
        marks = {"hit_rate": self.hit.all(1), "top5_hit": self.topk.all(1)}
        marks |= {"token_acc": self.hit, "token_acc_topk": self.topk}
        return {f"{name}_{kind}": float(mark.double().mean()) for kind, mark in marks.items()}

    def intervals(self) -> dict[str, dict]:
        """{mean, lo, hi, n} of each rate, over needles."""
        marks = dict(exact=self.hit.all(1), exact_topk=self.topk.all(1), token=self.hit, token_topk=self.topk)
        return {kind: interval(mark.double().view(len(mark), -1).mean(1)) for kind, mark in marks.items()}


def needle_rates(scores: Scores | None) -> dict[str, float | None]:
    """The documented rates, each None for text."""
    if scores is None:
        names = "needle_hit_rate needle_top5_hit needle_token_acc needle_token_acc_topk"
        return dict.fromkeys((*names.split(), "avg_correct_tokens_per_needle"))
    return scores.rates() | {"avg_correct_tokens_per_needle": float(scores.hit.sum(1).double().mean())}


class Evaluation(NamedTuple):
    """What was measured on a set of items: the mean `loss` on labelled tokens, and that of each item. Of needles also
    their scores, ids, places, and how many ids theirs are drawn from. `lane`: of the last batch."""

    loss: float
    losses: list[float]
    lane: LanePass
    scores: Scores | None = None
    ids: Tensor | None = None
    places: Tensor | None = None
    choices: int = 0


@torch.no_grad()
def score(net: Resonant, ids: Tensor, at: Tensor, target: Tensor, accelerator, without="") -> tuple[Scores, LanePass]:
    """Score `target` [N, L] by the logits at positions `at` [N, L] of `ids` [N, T], in batches of 16k tokens. Logits
    exist at these positions only. Also the last batch's pass through the lane."""
    parts, rows = [], max(1, 16384 // ids.shape[1])
    for i in range(0, len(ids), rows):
        x, a, y = (z[i : i + rows].to(accelerator.device) for z in (ids, at, target))
        with accelerator.autocast():
            done = net.run(x, without)
            logits = net.logits_at(done, a)  # b L V
        top = logits.topk(min(net.args.eval_topk, logits.shape[-1]), -1).indices  # b L k
        nll = logits.logsumexp(-1) - logits.gather(-1, y[..., None]).squeeze(-1)
        parts.append(torch.stack([top[..., 0] == y, (top == y[..., None]).any(-1), nll]).cpu())
    hit, topk, nll = torch.cat(parts, 1)
    return Scores(hit.bool(), topk.bool(), nll), done.lane


def evaluate(net: Resonant, items, args: Args, accelerator, count: int, without: str = "") -> Evaluation:
    """The first `count` items under `net`, or under it without its memory or its lane."""
    ids, places = draw(items, count)
    if args.task == "needle":
        at = positions(ids, first_scored(args, ids.shape[1]))
        scores, lane = score(net, ids, at, ids.gather(1, at + 1), accelerator, without)
        loss, losses = float(scores.nll.double().mean()), scores.nll.mean(1).tolist()
        return Evaluation(loss, losses, lane, scores, ids, places, items.ids.needle[1] - items.ids.needle[0])
    losses = []
    for rows in ids.split(max(1, 16384 // ids.shape[1])):
        with torch.no_grad(), accelerator.autocast():
            rows = rows.to(accelerator.device)
            done, at = net.run(rows, without), positions(rows)
            losses.append(net.losses(done, at, rows[:, 1:]).double().mean(1).cpu())
    losses = torch.cat(losses)
    return Evaluation(float(losses.mean()), losses.tolist(), done.lane)


def published_echo_rates(net: Resonant, test: Evaluation, args: Args, accelerator) -> dict[str, float]:
    """The published scoring, which is at fault: the needle's own tokens in the context, each against the logits at its
    own position, whose input it is. It has no readout."""
    at = test.places[:, None] + torch.arange(args.needle_len)
    target = test.ids.gather(1, at)
    return score(net, test.ids, at, target, accelerator, "readout")[0].rates("legacy_echo")


def controls(net: Resonant, test: Evaluation, args: Args, accelerator) -> dict[str, Scores]:
    """The same items with another item's needle as answer, without the context, and with the memory closed."""
    ids, L = test.ids, args.needle_len
    at, truth = positions(ids, first_scored(args, ids.shape[1])), ids[:, -L:]
    false = truth.roll(1, 0)
    shuffled, _ = score(net, torch.cat([ids[:, :-L], false], 1), at, false, accelerator)
    no_context, _ = score(net, ids[:, args.context :], at - args.context, truth, accelerator)
    memory_off, _ = score(net, ids, at, truth, accelerator, "memory")
    return {"shuffled": shuffled, "no_context": no_context, "memory_off": memory_off}


def recall_by_distance(scores: Scores, places: Tensor, args: Args) -> dict:
    """Hits against the tokens between the needle and the context's end: in fixed bins, beside what of a needle is left
    after that many, and as a curve, [[distance, token accuracy], ...] of eight bins of equal count, with intervals."""
    distance, exact, right = args.context - places - args.needle_len, scores.hit.all(1), scores.hit.double().mean(1)
    bins, curve, intervals = {}, [], []
    for lo, hi in itertools.pairwise((0, 32, 64, 128, 256, math.inf)):
        here = (distance >= lo) & (distance < hi)
        if here.any():
            rates = {"token_acc": float(right[here].mean()), "hit_rate": float(exact[here].double().mean())}
            rates |= {"n": int(here.sum()), "mean_distance": float(distance[here].double().mean())}
            rates |= {"token": interval(right[here]), "beta_pow_d": args.pvm_beta ** rates["mean_distance"]}
            bins[f"<{hi}" if hi < math.inf else f">={lo}"] = rates
    for part in distance.argsort(stable=True).tensor_split(min(8, len(places))):
        curve.append([float(distance[part].double().mean()), float(right[part].mean())])
        intervals.append([curve[-1][0], interval(right[part])])
    return {"hit_by_distance": bins, "recall_by_distance": curve, "recall_intervals": intervals}


def needle_result(net: Resonant, test: Evaluation, args: Args, accelerator) -> dict:
    """What the result file says about needles: rates, levels, controls, verdict, `intervals` over needles. Above its
    controls is a recall only if the lower end of its token rate exceeds chance and the bag of the context, and that of
    its difference from every control, paired by needle, exceeds zero."""
    scores, N, L, values = test.scores, len(test.ids), args.needle_len, test.choices
    (low, high), intervals = needle_places(args), scores.intervals()
    result = needle_rates(scores) | {"needle_items": N, "needle_tokens": N * L}
    result |= {"needle_hits": int(scores.hit.all(1).sum()), "needle_hits_topk": int(scores.topk.all(1).sum())}
    result["needle_token_hits"] = int(scores.hit.sum())
    for name, choices in (("chance", values), ("bag_of_context", args.context), ("needle_set", L)):
        result |= {f"{name}_token": 1 / choices, f"{name}_topk": min(1.0, args.eval_topk / choices)}
    unmarked = args.needle_marker == "none"  # nothing tells where it starts; then the rest can follow
    exact = 1 / (high - low + 1) if unmarked else 1.0
    result |= {"chance_exact": values ** -float(L), "needle_positions": high - low + 1}
    result |= {"ceiling_exact": exact, "ceiling_token": (L - 1 + exact) / L}
    result |= recall_by_distance(scores, test.places, args) | published_echo_rates(net, test, args, accelerator)
    if args.no_controls:
        return result | {"retrieval_verdict": None, "intervals": intervals}
    above, level = [], max(1 / values, 1 / args.context)
    for name, control in controls(net, test, args, accelerator).items():
        rates = control.rates(f"control_{name}")
        result |= {key: rate for key, rate in rates.items() if "top" not in key}
        gain = core.bootstrap((scores.hit.double() - control.hit.double()).mean(1).tolist())
        intervals |= {f"control_{name}": control.intervals()["token"], f"above_{name}": gain}
        above.append(gain["lo"] > 0)
    verdict = "above_controls" if intervals["token"]["lo"] > level and all(above) else "not_above_controls"
    return result | {"retrieval_verdict": verdict, "control_level": level, "intervals": intervals}


def final_metrics(net: Resonant, data: Data, args: Args, accelerator) -> dict:
    """What the result file says of the test items; of text also what the lane and its memory are worth."""
    count = args.eval_items if args.task == "needle" else len(data.test)
    test = evaluate(net, data.test, args, accelerator, count)
    core.check_finite(test.loss, "the test loss")
    interval = core.bootstrap(test.losses)
    result = {"test_loss": test.loss, "test_ppl": core.perplexity(test.loss), "test_items": interval["n"]}
    result |= {"test_loss_lo": interval["lo"], "test_loss_hi": interval["hi"]}
    result |= lane_metrics(net.lane.blocks, test.lane, args)
    if args.task == "needle":
        return result | needle_result(net, test, args, accelerator)
    result |= needle_rates(None) | {"retrieval_verdict": None}
    if not args.n_afrb or args.no_controls:
        return result
    for part in ("lane", "memory") if args.enable_pvm else ("lane",):
        rest = evaluate(net, data.test, args, accelerator, count, without=part)
        gains = [more - less for more, less in zip(rest.losses, test.losses)]  # in nats, paired over blocks
        result[f"{part}_gain"] = core.bootstrap(gains)
        result[f"test_loss_without_{part}"] = rest.loss
    return result


# ---------------------------------------------------------------------------------------------------------- train
COLUMNS = "step train_loss lm_loss infonce_loss lr grad_norm val_loss needle_hit_rate needle_top5_hit".split()
COLUMNS += "phase_coherence entropy_flow gamma_saturation pvm_gate_strength pvm_memory_norm".split()
COLUMNS += "avg_correct_tokens_per_needle needle_token_acc val_ppl tokens_per_sec peak_mem_gb elapsed_sec".split()
VALIDATED = "step val_loss needle_hit_rate needle_hit_rate_topk avg_correct_tokens_per_needle".split()
VALIDATED += "phase_coherence entropy_flow gamma_saturation".split()
SHOWN = "train_loss lm_loss infonce_loss grad_norm lr phase_coherence pvm_gate_strength pvm_memory_norm".split()
LOGS = ("train.log", "metrics.csv", "val_metrics.jsonl")


class Journal:
    """train.log (what the console shows), metrics.csv and val_metrics.jsonl of a run, beside its log.jsonl. Lines that
    are said before `open` are on the console at once, and in train.log once the run has begun to write."""

    def __init__(self, run: core.Run):
        self.run, self.waiting = run, []

    def open(self, sizes: dict[str, int] | None) -> None:
        """Begin to write. `sizes`: of the files when the checkpoint was saved that the run goes on from, to which they
        are cut back; None for a run that begins."""
        for name in LOGS if self.run.main else ():
            path, size = self.run.dir / name, (sizes or {}).get(name, 0)
            if path.exists() and path.stat().st_size > size:  # else truncate would add zeros
                os.truncate(path, size)
        lines, self.waiting = self.waiting, None
        for line in lines:
            self.append("train.log", line + "\n")
        if sizes is None:
            self.append("metrics.csv", ",".join(COLUMNS) + "\n")

    def append(self, name: str, text: str) -> None:
        if self.run.main:
            with open(self.run.dir / name, "a", encoding="utf-8", newline="") as f:
                f.write(text)

    def say(self, line: str) -> None:
        self.run.say(line)
        if self.waiting is None:
            self.append("train.log", line + "\n")
        else:
            self.waiting.append(line)

    def row(self, values: dict) -> None:
        cells = (values.get(name) for name in COLUMNS)
        self.append("metrics.csv", ",".join("" if x is None else str(x) for x in cells) + "\n")
        self.run.log(**values)

    def sizes(self) -> dict[str, int]:
        return {name: path.stat().st_size for name in LOGS if (path := self.run.dir / name).exists()}


def show(values: dict) -> str:
    return " ".join(f"{k}={v:.6g}" for k, v in values.items() if v is not None)


@torch.no_grad()
def calibrate(net: Resonant, data: Data, args: Args, journal: Journal, accelerator) -> dict:
    """Set pvm2emb to the ridge solution from normalised memories to normalised embeddings of the tokens to predict.
    Says R2 on the fitted pairs and on 128 others: below the width's count of pairs, even unrelated ones fit."""
    each = args.needle_len if args.task == "needle" else min(64, sequence_length(args) - 1)
    want, memories, targets = args.kiss_ridge_max_pairs, [], []
    fit_rows = -(-want // each)
    for i in range(fit_rows + -(-128 // each)):
        ids = torch.from_numpy(data.calibration[i][0])[None].to(accelerator.device)
        at = anchors_of(args, ids.shape[1], core.generator(args.seed, "calibration", i))[None].to(ids.device)
        memories.append(pick(net.run(ids).lane.content, at)[0])
        targets.append(net.embeddings()[ids[0, at[0] + 1]])
    Z, E = (torch.cat(x[:fit_rows])[:want] for x in (memories, targets))
    Z2, E2 = (torch.cat(x[fit_rows:])[:128] for x in (memories, targets))
    empty = "[KISS-RIDGE] the memory is zero or not finite: nothing to calibrate on; raise --pvm-alpha"
    require(torch.isfinite(Z).all() and (Z.norm(dim=-1) > 0).all(), empty, core.DIVERGED)
    Z, Z2 = F.normalize(Z, dim=-1).double(), F.normalize(Z2, dim=-1).double()
    W = ridge(Z, E, args.kiss_ridge_l2)
    net.model.pvm2emb.weight.copy_(W.T)

    def r2(z, e):
        return 1 - float((e - z @ W).square().sum() / (e - e.mean(0)).square().sum())

    fit = {"pairs": len(Z), "r2_fit": r2(Z, E.double()), "r2_holdout": r2(Z2, E2.double())}
    journal.say(f"[KISS-RIDGE] Calibrated pvm2emb: {len(Z)} pairs, λ={args.kiss_ridge_l2:g}")
    journal.say(f"[KISS-RIDGE] R2 fit={fit['r2_fit']:.5f} holdout={fit['r2_holdout']:.5f}")
    return fit


PARTS = ("afrb_adapters", *READERS)  # what a checkpoint holds of the model, each None where there is none


def lane_state(net: Resonant, args: Args, calibrated: bool, metrics: dict | None = None) -> dict:
    """What a checkpoint holds of the model: lane and readout, nothing of the frozen part."""
    modules = {name: getattr(net.model, name, None) for name in PARTS}
    weights = {k: None if m is None else {n: v.cpu() for n, v in m.state_dict().items()} for k, m in modules.items()}
    width = net.model.get_input_embeddings().weight.shape[1]
    about = {"format_version": 1, "config": vars(args), "model_id": args.model, "hidden_size": width}
    return about | weights | {"pvm2emb_calibrated": calibrated, "metrics": metrics or {}}


def load_lane(net: Resonant, saved: dict, path: str) -> None:
    width = net.model.get_input_embeddings().weight.shape[1]
    require(saved["hidden_size"] == width, f"{path}: hidden size {saved['hidden_size']}, but --model has {width}")
    for name in PARTS:
        if saved.get(name) is not None and hasattr(net.model, name):
            module = getattr(net.model, name)
            own = {k: v for k, v in module.named_buffers() if not k.endswith("memory")}  # alpha, omega, phi, scale
            module.load_state_dict(saved[name] | own)


def validate(net: Resonant, data: Data, args: Args, accelerator, journal: Journal, step: int) -> dict:
    """Evaluate on the validation items, say it and write it down; returns the cells that metrics.csv has for it."""
    validation = evaluate(net, data.validation, args, accelerator, args.eval_items)
    core.check_finite(validation.loss, f"the validation loss at step {step}")
    lane = lane_metrics(net.lane.blocks, validation.lane, args)
    rates = needle_rates(validation.scores)
    row = {"val_loss": validation.loss, "val_ppl": core.perplexity(validation.loss)}
    row |= {name: rate for name, rate in rates.items() if name in COLUMNS}
    journal.say(f"[VAL] Step {step} " + show({**row, "phase_coherence": lane["phase_coherence"]}))
    every = rates | row | lane | {"step": step, "needle_hit_rate_topk": rates["needle_top5_hit"]}
    journal.append("val_metrics.jsonl", json.dumps({name: every[name] for name in VALIDATED}) + "\n")
    return row | lane


def prepare_training(args: Args, net: Resonant, data: Data, journal: Journal, accelerator, saved: dict | None):
    """What is trained (`trainable`), how many `steps`, and `held`, the calibrated readout matrix, which trains only
    from --kiss-ridge-unfreeze-step on. Says it, and calibrates the readout unless the run goes on from `saved`."""
    trainable = [p for p in net.parameters() if p.requires_grad]
    matrix = net.model.pvm2emb.weight if args.kiss_ridge_calib else None
    held = matrix if matrix is not None and matrix.requires_grad else None
    steps = args.steps or (saved["step"] if saved else 0)  # --steps 0 evaluates an interrupted run where it stands
    steps = steps if trainable and not args.eval_only else 0
    total = sum(p.numel() for p in trainable)
    first = total - (0 if held is None else held.numel())
    thaws = f" (+{total - first:,} after unfreeze)" if total > first and args.kiss_ridge_unfreeze_step else ""
    journal.say(f"[SETUP] Trainable: {first:,} params{thaws}")
    if not trainable:
        journal.say("[BASELINE] no trainable parameters: evaluation only")
    calibration = saved["calibration"] if saved else None
    if args.kiss_ridge_calib and not args.eval_only and not saved:
        calibration = calibrate(net, data, args, journal, accelerator)
    if args.infonce_weight:
        rivals = args.infonce_negatives
        journal.say(f"[INFONCE] loss at chance: ln(1 + {rivals}) = {math.log(1 + rivals):.3f}")
    world = accelerator.num_processes
    journal.say(f"[SETUP] effective batch {args.bs} x {args.ga} x {world} = {args.bs * args.ga * world} sequences")
    counts = {"trainable_params": first, "trainable_params_after_unfreeze": total}
    return types.SimpleNamespace(trainable=trainable, steps=steps, held=held, calibration=calibration, counts=counts)


def train(args: Args, plan, net: Resonant, data: Data, journal: Journal, accelerator, saved: dict | None) -> tuple:
    """(core.Loop's figures, what the last validation found); `saved`: the checkpoint that the run goes on from."""
    optimizer = torch.optim.AdamW(plan.trainable, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    model, optimizer = core.prepare(net, optimizer, accelerator)
    loop = core.Loop(journal.run, model, optimizer, plan.steps, "lane", saved, args.grad_clip, plan.trainable)
    if saved:
        journal.append("train.log", f"[Resume] from step {loop.step}\n")  # the console has it from the loop
    micros = range(loop.step * args.ga, loop.total * args.ga)
    batches = stream(args, data, micros, net.model.get_input_embeddings().weight.shape[0], accelerator)
    validation = None
    while not loop.last:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (loop.step + 1) / max(1, args.warmup_steps))
        for _ in loop.micro_batches(args.ga):
            ids, anchors, negatives = next(batches)
            out = model(ids, anchors, negatives)
            loop.backward(out["loss"] / args.ga)
            loop.add(train_loss=out["loss"], lm_loss=out["lm_loss"], infonce_loss=out["infonce_loss"])
        if plan.held is not None and not 0 < args.kiss_ridge_unfreeze_step <= loop.step + 1:
            plan.held.grad = None  # in the optimizer from the start, so that unfreezing has effect, but passed over
        norm = loop.update(tokens=ids.numel() * args.ga * accelerator.num_processes)
        for block in net.lane.blocks:
            block.phase.clamp()
        if plan.held is not None and loop.step == args.kiss_ridge_unfreeze_step:
            journal.say(f"[KISS-RIDGE] Unfroze pvm2emb at step {loop.step}")

        validating = loop.due(args.val_every) or loop.last
        if loop.due(args.log_every) or validating:
            with loop.paused():
                row = loop.means() | {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}
                row |= lane_metrics(net.lane.blocks, out["lane"], args)
                journal.say(f"[TRAIN] Step {loop.step}/{loop.total} " + show({name: row[name] for name in SHOWN}))
                row |= {"tokens_per_sec": loop.rate(), "peak_mem_gb": core.peak_memory() / 1e9}
                if validating:
                    validation = validate(net, data, args, accelerator, journal, loop.step)
                    row |= validation
                journal.row({"step": loop.step, **row, "elapsed_sec": loop.seconds})
        if validating or loop.stopping:
            own = lane_state(net, args, plan.calibration is not None)
            own |= {"calibration": plan.calibration, "sizes": journal.sizes()}
            loop.save("checkpoint_last.pt", previous="checkpoint_previous.pt", **own)
        loop.leave_if_stopped()
    return loop.end(), validation


def train_and_evaluate(args: Args, net: Resonant, data: Data, journal: Journal, accelerator, saved) -> dict:
    """What the result file says of the training and of the test items; writes checkpoint_final.pt."""
    plan = prepare_training(args, net, data, journal, accelerator, saved)
    validation = None
    if not saved:
        validation = validate(net, data, args, accelerator, journal, 0)
        journal.row({"step": 0, **validation, "peak_mem_gb": core.peak_memory() / 1e9, "elapsed_sec": 0.0})
    figures = {"steps": 0, "tokens": 0, "train_seconds": 0.0, "tokens_per_s": None, "nonfinite_steps": 0}
    figures["peak_mem_bytes"] = core.peak_memory()
    if plan.steps:
        figures, trained = train(args, plan, net, data, journal, accelerator, saved)
        # a run that went on after its last step has not been validated
        validation = trained or validation or validate(net, data, args, accelerator, journal, figures["steps"])
    result = figures | plan.counts | {"kiss_ridge": plan.calibration}
    result |= {name: validation[name] for name in ("val_loss", "val_ppl")}
    result["gamma_values"] = [float(block.gamma.detach()) for block in net.lane.blocks]
    result |= final_metrics(net, data, args, accelerator)
    # the documented names
    result |= {"tokens_per_sec": figures["tokens_per_s"], "peak_mem_gb": figures["peak_mem_bytes"] / 1e9}
    if journal.run.main:
        metrics = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
        final = lane_state(net, args, plan.calibration is not None, metrics) | {"step": figures["steps"]}
        core.save_checkpoint(journal.run.dir / "checkpoint_final.pt", final)
    return result


# ----------------------------------------------------------------------------------------------------------- main
def plan_of(args: Args, accelerator) -> dict:
    """Parameters, tokens and memory of a run, from the model's configuration alone."""
    half = accelerator.mixed_precision == "bf16"
    with torch.device("meta"):
        model, _ = load_model(args, torch.bfloat16 if half else torch.float32)
    for name in attention_names(model) if args.disable_attn else ():
        model.base_model.set_submodule(name, nn.Identity())
    config, length = model.config, sequence_length(args)
    frozen = sum(p.numel() for p in model.parameters())
    with torch.random.fork_rng(devices=[]):  # new layers draw from the global stream before they are set
        net = build_model(args, model)
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    steps = args.steps if trainable and not args.eval_only else 0
    memory = core.memory_estimate(net, args.bs * length, config.hidden_size, config.num_hidden_layers, half)
    tokens = steps * args.bs * args.ga * length * accelerator.num_processes
    plan = {"parameters": {"frozen": frozen, "trainable": trainable}, "memory_gb": memory}
    return plan | {"tokens_per_sequence": length, "tokens": tokens}


def announce(args: Args, words: list[str], journal: Journal) -> None:
    """The first lines of train.log: the command, the arguments as they took effect, and what is odd about them."""
    journal.say("[CMD] " + shlex.join(["python", "afrb_train.py", *words]))
    given = {k: v for k, v in vars(args).items() if v is not False and v is not None and v != ""}  # a 0 is a value
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in given.items()]
    journal.say("[ARGS] " + " ".join(flags))
    needle = args.task == "needle"
    if args.n_afrb > 4:
        journal.say(f"[WARN] --n-afrb {args.n_afrb}: the document uses up to 4")
    if needle and not args.disable_attn:
        journal.say("[WARN] attention enabled: hit rate measures backbone attention, not PVM")
    if needle and args.seq not in (None, args.context):
        journal.say(f"[WARN] --seq {args.seq} is not --ctx-chunks x --ctx-chunk-len: {args.context} is used")
    if args.needle_query and not needle:
        journal.say("[WARN] --needle-query has no meaning for --task language: ignored")


def build(args: Args, saved: dict | None, journal: Journal, accelerator) -> tuple[Resonant, Data, dict]:
    """Model with its lane, data, the fingerprints of both; and the lines of the log about them."""
    say, dtype = journal.say, torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    model, tokenizer = load_model(args, dtype)
    needs = f"adapters can be injected into one, but --task {args.task} needs a causal language model"
    require(not hasattr(model.base_model, "embeddings"), f"{args.model} is an encoder: {needs}")
    data = load_data(args, model, tokenizer)
    inputs = {"data": data.fingerprint, "tokenizer": core.tokenizer_digest(tokenizer)}
    inputs["base"] = core.base_digest(args.model, model)
    length, limit = sequence_length(args), getattr(model.config, "max_position_embeddings", None) or math.inf
    tokens = model.get_input_embeddings()
    learned = any(isinstance(m, nn.Embedding) and m is not tokens for m in model.base_model.modules())
    beyond = f"{length} tokens exceed the model's {limit} learned positions: lower --ctx-chunks or --seq"
    require(length <= limit or not learned, beyond)
    if length > limit and not args.disable_attn:
        say(f"[WARN] {length} tokens exceed the {limit} positions that the model's attention was trained on")
    if args.disable_attn:
        say(f"[DISABLE-ATTN] {disable_attention(model)} layers")
    core.shard_frozen(model, accelerator)
    model.to(accelerator.device)
    net = build_model(args, model).to(accelerator.device)
    if args.readout == "cancel":  # its code stands elsewhere: the manifest knows this file and core
        inputs["reader"] = core.digest(Path(sys.modules[type(net).__module__].__file__))
    if saved:
        load_lane(net, saved, f"--resume {args.resume}")
        say(f"[RESUME] weights of --resume {args.resume} at its step {saved['step']}")
    if args.t2_enable:
        first = args.pvm_beta * math.exp(-1 / args.t2_steps)
        was, now = (args.pvm_alpha / math.sqrt(1 - d * d) for d in (args.pvm_beta, first))
        cannot = f"memory RMS on white input {was:.4f} -> {now:.4f}: it cannot cure an exploding memory"
        say(f"[T2] retention {args.pvm_beta:g} -> {first:.5f}, {cannot}")
    if args.enable_pvm:
        left = ", ".join(f"{args.pvm_beta**d:.1e} at {d}" for d in (16, 64, 134))
        say(f"[PVM] state {model.config.hidden_size} values a block; a token d back has weight beta^d: {left}")
    return net, data, inputs


@torch.no_grad()
def audit_of(net: Resonant, length: int) -> float:
    """core.causality_audit, and that the output head on the body's last state gives the model's own logits."""
    model = net.model
    ids = torch.arange(8, device=model.device)[None] + 3
    own, ours = model(ids, use_cache=False).logits.float(), net.logits(net.run(ids).hidden, None)
    changes = f"{type(model).__name__} changes its logits after the output head: not supported"
    require(torch.allclose(own, ours, atol=1e-2, rtol=1e-2), changes)
    audit = core.causality_audit(model, model.get_input_embeddings().weight.shape[0], length)
    limit = 1e-5 if model.dtype == torch.float32 else 1e-2
    require(audit <= limit, f"the model reads the future ({audit:.1e}): not trained", core.CHECK_FAILED)
    return audit


def say_result(r: dict, args: Args, say) -> None:
    """The lines that sum a run up, from `r`, what the result file says."""
    if args.task == "language":
        interval = f"[{r['test_loss_lo']:.4f}, {r['test_loss_hi']:.4f}]"
        say(f"[RESULT] test_loss={r['test_loss']:.4f} {interval} test_ppl={r['test_ppl']:.2f}")
        for part in ("lane", "memory"):
            if gain := r.get(f"{part}_gain"):
                loss = r[f"test_loss_without_{part}"]
                saves = f"{gain['mean']:+.4f} [{gain['lo']:+.4f}, {gain['hi']:+.4f}] nats"
                say(f"[CONTROL] without the {part}: test_loss={loss:.4f}, so it saves {saves}")
        return
    n, tokens, k = r["needle_items"], r["needle_tokens"], args.eval_topk
    exact, token = (f"[{r['intervals'][x]['lo']:.3f}, {r['intervals'][x]['hi']:.3f}]" for x in ("exact", "token"))
    ceiling = f"ceiling {r['ceiling_exact']:.4f} exact, {r['ceiling_token']:.4f} a token"
    chance = f"chance {r['chance_token']:.2g} a token, bag of context {r['bag_of_context_token']:.2g}"
    say(f"[NEEDLE-EVAL] Exact hit rate: {r['needle_hit_rate']:.3f} ({r['needle_hits']}/{n})")
    say(f"[NEEDLE-EVAL] Top-{k} hit rate: {r['needle_top5_hit']:.3f} ({r['needle_hits_topk']}/{n})")
    say(f"[NEEDLE-EVAL] Token accuracy: {r['needle_token_acc']:.3f} ({r['needle_token_hits']}/{tokens})")
    say(f"[NEEDLE-EVAL] 95 % intervals over {n} needles: exact {exact}, token {token}")
    say(f"[NEEDLE-EVAL] Levels: {chance}, {ceiling}")
    for name, part in r["hit_by_distance"].items():
        rate = f"token_acc={part['token_acc']:.3f} beta^d={part['beta_pow_d']:.2g}"
        say(f"[NEEDLE-EVAL] distance {name}: n={part['n']} {rate}")
    controls = {name: f"control_{name}" for name in ("shuffled", "no_context", "memory_off")}
    controls["legacy echo (a token against its own input; not retrieval)"] = "legacy_echo"
    for name, key in controls.items():
        if f"{key}_hit_rate" in r:
            say(f"[CONTROL] {name}: hit_rate={r[f'{key}_hit_rate']:.3f} token_acc={r[f'{key}_token_acc']:.3f}")
    say(f"[RESULT] retrieval_verdict={r['retrieval_verdict']}")


CARD = "test_loss test_ppl needle_hit_rate needle_token_acc chance_token control_memory_off_hit_rate steps".split()
CAVEAT = """A recall counts only beside the controls in the result file (shuffled, no context, memory off);
`legacy_echo_*` is the published figure's origin, not recall: docs/afrb.md."""


def main(argv=None) -> dict:
    args, words = parse(argv), list(sys.argv[1:] if argv is None else argv)
    given = None  # the checkpoint of another run, whose lane this one starts from
    if args.resume not in ("", "auto"):
        given = core.load_checkpoint(Path(args.resume))
        require("afrb_adapters" in given, f"{args.resume}: not a checkpoint of this script")
        resolve(args, given["config"])
    if args.precision == "auto" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        args.precision = "fp32"  # not fp16: the lane would need a loss scaler
    accelerator = core.engine(args)
    if args.recall_curve:
        from scripts.afrb_recall import recall_curve

        return recall_curve(args, accelerator)
    if args.dry_run:
        return core.show_plan(plan_of(args, accelerator))
    fresh = dataclasses.replace(args, resume="") if given else args  # to the directory it is a new run
    with core.Run(fresh, args.save, accelerator, "metrics.json", (*LOGS, "checkpoint_*.pt")) as run:
        if done := run.finished(LENGTH, FREE):
            return done
        names, total = ("checkpoint_last.pt", "checkpoint_previous.pt"), args.steps or math.inf  # 0 steps evaluate it
        saved = run.checkpoint(*names, total=total, arm="lane")
        journal = Journal(run)
        announce(args, words, journal)
        net, data, inputs = build(args, saved or given, journal, accelerator)
        if given:
            inputs["lane"] = core.digest(Path(args.resume))
        audit = audit_of(net, sequence_length(args))
        run.start((*FREE, LENGTH), **inputs)
        journal.open(saved["sizes"] if saved else None)
        try:
            result = train_and_evaluate(args, net, data, journal, accelerator, saved)
        except core.Failure as failure:
            if failure.code == core.DIVERGED:
                journal.say(f"[ERROR] {failure}")
            raise
        about = {"status": "ok", "task": args.task, "command": shlex.join(["afrb_train.py", *words])}
        result = about | result | {"model_id": args.model, "hidden_size": net.model.config.hidden_size}
        result["attention_disabled"] = args.disable_attn
        result["alpha_profile"] = [float(block.alpha) for block in net.lane.blocks]
        result["omega_profile"] = [float(block.phase.omega.detach()) for block in net.lane.blocks]
        result["causality_max_abs_diff"] = max(audit, audit_of(net, sequence_length(args)))
        result["wall_sec"] = sum(segment["wall_s"] for segment in run.manifest()["segments"])
        result |= {"data": {"source": data.source}, "config": vars(args)}
        say_result(result, args, journal.say)
        result = run.finish(result)
        flags = f"--model {args.model} --task {args.task} --resume {run.dir / 'checkpoint_final.pt'}"
        load = f"python afrb_train.py {flags} --eval-only --save OTHER"
        card = {name: result[name] for name in CARD if name in result}
        core.model_card(run, result, "AFRB lane", args.model, card, load, CAVEAT)
        journal.say(f"[SAVE] {run.result}")
    return result


if __name__ == "__main__":
    sys.modules["afrb_train"] = sys.modules["__main__"]  # for scripts/afrb_recall.py: one copy of this file, not two
    core.cli(main, "--bs, --ctx-chunk-len or --seq (or add --gradient-checkpointing)")
