"""Cognate, phase 1: does a 25.6M-parameter model with a recursive head, adaptive halting and a memory train soundly?

Three equally shaped models ("reasoning", "memory", "speed") are trained from scratch. A causal sliding-window
transformer gives y; a leaky integral of y is mixed in by a gate; a recursion refines a latent z and an answer y:

    x_t = W_down y_t       m_t = decay m_{t-1} + (1 - decay) x_t         in chunks of 128, no loop over positions
    g = sigmoid(W relu(U [y; W_up m]))          f = g y + (1 - g) W_up m
    z <- LN(z + MLP[z; Attn(z, f); Attn(z, y)])  twice, then  y <- LN(y + MLP[y; z]);  q = sigmoid(w z) halts
    L = sum_t w_t CE(y_t) / sum_t w_t + 0.01 mean_t L_act(t) - 0.001 H(g)         over the states y_0 ... y_T

MuGrokfast: g + lambda mu (mu: moving average of g), then Muon for hidden matrices and AdamW for the rest. The memory
has no keys and values and so cannot store associations: recall from the context must come from the attention.

Smoke test   python train_phase1_cognate.py --model reasoning --test --epochs 1             CPU, offline, under 90 s
Document     python train_phase1_cognate.py --model reasoning --epochs 10 --batch-size 16 --wandb-mode offline
All three    python train_phase1_cognate.py --all --test --epochs 2 --wandb-mode disabled
Outputs      python train_phase1_cognate.py --validate checkpoints/phase1_test/reasoning/best_model.pt
Local files  python train_phase1_cognate.py --model reasoning --data-dir my_data --datasets gsm8k --tokenizer local
Expect       on the documented data 2 to 4 nats per token, not the published 0.5 (docs/cognate.md says why)
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import random
import re
import statistics
import timeit
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import core
from core import arg, require

SPECIALISATIONS = ("reasoning", "memory", "speed")


@dataclasses.dataclass
class Args(core.RunArgs):
    model: Literal[SPECIALISATIONS] | None = arg(
        None, "train this one; unset: --all", "mode", aliases=["--specialization"]
    )
    all: bool = arg(False, "train all three, one after the other", "mode")
    validate: str = arg("", "check the outputs of this checkpoint; unset: train", "mode")
    prompts: str = arg("", "--validate: file of prompts, one a line (tab, answer); unset: the built-in ones", "mode")
    max_new_tokens: int = arg(20, "--validate: tokens for each prompt", "mode")
    adaptive: bool = arg(False, "--validate: halt by the ACT head instead of running every step", "mode")
    report: str = arg("", "--validate: the JSON report; unset: validation.json beside the checkpoint", "mode")
    epochs: int = arg(10, "passes over the data of the current curriculum stage", "training")
    batch_size: int = arg(16, "sequences per micro-batch (and process)", "training")
    grad_accum: int | None = arg(None, "micro-batches per update; unset: 64 // batch_size", "training")
    learning_rate: float = arg(5e-4, "AdamW: embeddings, norms, biases, ACT head", "training", aliases=["--lr"])
    muon_lr: float = arg(5e-3, "Muon: hidden matrices", "training")
    optimizer: Literal["mugrokfast", "adamw"] = arg("mugrokfast", "adamw: AdamW for every parameter", "training")
    grokfast_lambda: float = arg(0.02, "weight of the slow gradient; 0 is off", "training")
    grokfast_alpha: float = arg(0.98, "its moving average, in [0, 1)", "training")
    weight_decay: float = arg(0.0, "of both optimizers", "training")
    gradient_clip: float = arg(1.0, "global norm; 0: no clipping", "training")
    warmup_epochs: int = arg(1, "linear warm-up from a tenth of the rate", "training")
    min_lr: float = arg(1e-6, "end of the cosine", "training")
    no_lr_scheduler: bool = arg(False, "constant rates", "training")
    early_stop_patience: int = arg(3, "epochs without improvement before stopping; 0: never", "training")
    min_delta: float = arg(0.01, "what counts as an improvement, in nats", "training")
    val_split: float = arg(0.1, "share of rows held out", "training")
    data_seed: int = arg(42, "of generated rows and of the split; another one for choosing rates", "training")
    no_validate: bool = arg(False, "no validation: no early stopping, best_model.pt is the last epoch", "training")
    save_every: int = arg(2, "keep epoch_N.pt every so many epochs", "training")
    log_every: int = arg(50, "log every so many updates", "training")
    eval_every: int = arg(0, "validation loss every so many updates, for the curve; 0: after each epoch", "training")
    checkpoint_dir: str = arg("checkpoints/phase1", "run directories, one for each specialisation", "training")
    datasets: list[str] | None = arg(None, "names, all, or generated; unset: gsm8k to wikitext", "data")  # noqa: RUF009
    max_samples: int | None = arg(None, "rows per data set; unset: 8000, hellaswag 2000", "data")
    max_length: int = arg(512, "tokens per row", "data")
    data_dir: str = arg("", "read NAME.jsonl, or the published file, from here; unset: from the hub", "data")
    cache_dir: str = arg("", "cache of the hub's data sets; unset: the library's", "data")
    skip_missing: bool = arg(False, "train without the data sets that cannot be loaded", "data")
    tokenizer: str = arg("gpt2", "hub name, directory, byte, or local (BPE trained on the training rows)", "data")
    vocab_size: int | None = arg(None, "entries of model and --tokenizer local; unset: by --size, 4096", "data")
    synth_rows: int = arg(400, "rows of each generated set", "data")
    probes: int = arg(200, "contexts of each probe of a model trained on bind_N", "data")
    no_curriculum: bool = arg(False, "all loaded data sets in every epoch", "data")
    staged: bool = arg(False, "one set after the other: the next when 0.9 of the scored tokens are right", "data")
    epoch_rows: int = arg(0, "rows that an epoch draws from its sets, others in each epoch; 0: all of them", "data")
    size: Literal["full", "tiny"] = arg("full", "full: the documented 25.6M; tiny: width 64, 2 layers", "model")
    d_model: int | None = arg(None, "width; unset: that of --size", "model")
    n_layers: int | None = arg(None, "layers; unset: those of --size", "model")
    n_heads: int | None = arg(None, "heads; unset: those of --size", "model")
    dropout: float = arg(0.1, "on the MLPs' outputs and the attention weights", "model")
    init_std: float = arg(0.02, "standard deviation of the initial weights", "model")
    t_max: int = arg(3, "recursion steps, at most 9; 0: the first state alone, and no recursion is built", "model")
    plain: bool = arg(False, "a library GPT-2 of this width and as many parameters in the model's place", "model")
    micro_steps: int = arg(2, "refinements of z per step", "model")
    no_memory: bool = arg(False, "without long-term memory and gate", "model")
    ltm_carry: Literal["train", "none"] = arg("train", "none: the memory of every sequence starts at zero", "model")
    no_act: bool = arg(False, "no halting head in loss and inference: always t_max steps", "ACT")
    halt_threshold: float | None = arg(None, "halt above this q; unset: the specialisation's", "ACT")
    act_loss_weight: float = arg(0.01, "weight of the halting loss", "ACT")
    act_diversity_weight: float = arg(0.01, "weight of the shortfall of q's variance", "ACT")
    act_target_variance: float = arg(0.1, "the variance below which it counts", "ACT")
    gradient_checkpointing: bool = arg(False, "recompute the layers in the backward pass", "run")
    wandb: Literal["off", "disabled", "offline", "online"] = arg(
        "offline", "Weights & Biases; disabled and off are the same", "run", aliases=["--wandb_mode", "--wandb-mode"]
    )
    wandb_project: str = arg("agent-forge-v2", "its project", "run")
    seed: int | None = arg(None, "initialisation and data order; unset: the specialisation's own", "run")
    precision: Literal["auto", "fp32", "bf16"] = arg("auto", "auto: bf16 autocast where a GPU has it, else fp32", "run")


TEST = dict(epochs=1, batch_size=8, grad_accum=2, max_length=128, datasets="generated", tokenizer="byte", size="tiny")
TEST |= dict(probes=4, device="cpu", threads=1, checkpoint_dir="checkpoints/phase1_test", wandb="off", log_every=10)
SHAPE = ("d_model", "n_layers", "n_heads")
TINY = dict(d_model=64, n_layers=2, n_heads=2, d_ff=256, d_mem=32, mag_hidden=32, max_seq_len=256)
FREE = ("checkpoint_dir", "wandb_project", "save_every", "log_every", "cache_dir", "device")  # may differ on resume
LENGTH = "epochs"  # a larger value makes a finished run longer
OUTPUTS = ("last.pt", "epoch_*.pt", "history.csv", "metrics.jsonl", "report.json", "validation.json")


def parse(argv=None) -> Args:
    args = core.parse_args(Args, TEST, argv, __doc__)
    require(args.model or args.all or args.validate, "give --model reasoning|memory|speed, --all or --validate CKPT")
    require(bool(args.model) + args.all + bool(args.validate) == 1, "--model, --all and --validate exclude each other")
    if args.plain:
        args.t_max, args.no_memory = 0, True
    args.no_act = args.no_act or args.t_max == 0  # nothing can halt
    if args.grad_accum is None:
        args.grad_accum = max(1, 64 // max(1, args.batch_size))
    positive = "epochs batch_size grad_accum max_new_tokens save_every log_every synth_rows micro_steps probes"
    given = [name for name in ("max_samples", "vocab_size", *SHAPE) if getattr(args, name) is not None]
    core.require_positive(args, " ".join([positive, *given]))
    require(args.max_length >= 2, "--max_length must be at least 2: one token predicts nothing")
    require(0 < args.val_split < 1, f"--val_split {args.val_split} is not between 0 and 1")
    require(0 <= args.t_max <= 9, f"--t_max {args.t_max} is not in 0 to 9 (the ACT head counts at most 10 states)")
    for name in ("dropout", "grokfast_alpha"):
        require(0 <= getattr(args, name) < 1, f"--{name} {getattr(args, name)} is not in [0, 1)")
    for name in ("learning_rate", "muon_lr", "init_std"):
        require(getattr(args, name) > 0, f"--{name} must be positive")
    rates = "grokfast_lambda weight_decay gradient_clip warmup_epochs min_lr early_stop_patience min_delta".split()
    for name in (*rates, "epoch_rows", "act_loss_weight", "act_diversity_weight", "act_target_variance"):
        require(getattr(args, name) >= 0, f"--{name} must not be negative")
    require(args.checkpoint_dir.strip(), "--checkpoint_dir has no name: give one")
    require(args.halt_threshold is None or 0 < args.halt_threshold < 1, "--halt_threshold must lie between 0 and 1")
    require(not (args.staged and args.no_validate), "--staged needs the validation: leave out --no_validate")
    if args.wandb == "disabled":  # the document's word for what every script calls off
        args.wandb = "off"
    groups = {"all": list(HUB), "generated": list(GENERATED[:5])}
    words = args.datasets or STAGES["FOUNDATION"][:6]
    args.datasets = list(dict.fromkeys(name for word in words for name in groups.get(word, [word])))
    unknown = [name for name in args.datasets if name not in HUB and name not in GENERATED]
    require(not unknown, f"--datasets {' '.join(unknown)}: unknown; use all, generated, {' '.join([*HUB, *GENERATED])}")
    require(not args.staged or {*GENERATED} >= {*args.datasets}, "--staged takes generated sets alone: equal in size")
    longest = model_config(args, "reasoning").titans_config.max_seq_len
    require(args.max_length <= longest, f"--max_length {args.max_length} exceeds the position table, {longest} entries")
    return args


# ---------------------------------------------------------------------------------------------------------- model
@dataclasses.dataclass
class TitansMAGConfig:
    d_model: int = 256
    n_layers: int = 10
    n_heads: int = 4
    head_dim: int = 64
    d_ff: int = 1024
    vocab_size: int = 50257
    max_seq_len: int = 2048
    sw_window: int = 1024
    d_mem: int = 128
    memory_decay: float = 0.99
    mag_hidden: int = 128
    mag_entropy_reg: float = 0.001
    dropout: float = 0.1
    attention_dropout: float = 0.1
    memory: bool = True
    ltm_carry: str = "train"
    init_std: float = 0.02
    library_layers: int = 0  # of a library GPT-2 in place of backbone and recursion

    def __post_init__(self):
        if self.d_model % self.n_heads or self.head_dim != self.d_model // self.n_heads:
            raise ValueError(f"d_model {self.d_model}, n_heads {self.n_heads}, head_dim {self.head_dim} do not agree")
        if not 0 < self.memory_decay < 1:
            raise ValueError(f"memory_decay {self.memory_decay} is not between 0 and 1")


def step_weights(t_max: int) -> list[float]:
    """Weights of the states y_0 ... y_t_max in the loss; the documented 0.33, 0.5, 0.75, 1.0 for t_max = 3."""
    return [0.33] + [0.5 + 0.5 * (t - 1) / (t_max - 1) if t_max > 1 else 1.0 for t in range(1, t_max + 1)]


@dataclasses.dataclass
class TRMConfig:
    T_max: int = 3
    micro_steps: int = 2
    deep_supervision: bool = True
    step_weights: list[float] = dataclasses.field(default_factory=lambda: step_weights(3))
    detach_between_steps: bool = True

    def __post_init__(self):
        if len(self.step_weights) != self.T_max + 1:
            raise ValueError(f"step_weights has {len(self.step_weights)} entries, T_max {self.T_max} needs one more")
        if not 0 <= self.T_max <= 9:
            raise ValueError(f"T_max {self.T_max} is not in 0 to 9: the ACT head counts at most 10 states")


@dataclasses.dataclass
class ACTConfig:
    halt_threshold: float = 0.5
    ema_decay: float = 0.98
    entropy_reg: float = 0.001
    act_loss_weight: float = 0.01
    diversity_weight: float = 0.01
    target_variance: float = 0.1
    enabled: bool = True


def by_name(*values) -> dict:
    return dict(zip(SPECIALISATIONS, values))


@dataclasses.dataclass
class Phase1Config:
    """All of a model. A specialisation sets the halting threshold and the memory's decay: capacity stands for the time
    constant, 100 tokens at 4096. The surprise thresholds are recorded and unused: a decaying sum has no surprise."""

    specialization: str = "reasoning"
    titans_config: TitansMAGConfig = dataclasses.field(default_factory=TitansMAGConfig)
    trm_config: TRMConfig = dataclasses.field(default_factory=TRMConfig)
    act_config: ACTConfig = dataclasses.field(default_factory=ACTConfig)
    act_thresholds: dict[str, float] = dataclasses.field(default_factory=lambda: by_name(0.95, 0.90, 0.99))
    ltm_capacities: dict[str, int] = dataclasses.field(default_factory=lambda: by_name(4096, 8192, 2048))
    surprise_thresholds: dict[str, float] = dataclasses.field(default_factory=lambda: by_name(0.7, 0.5, 0.3))
    seeds: dict[str, int] = dataclasses.field(default_factory=lambda: by_name(42, 1337, 2023))
    infer_steps: dict[str, int] = dataclasses.field(default_factory=lambda: by_name(3, 3, 1))
    batch_size: int = 16
    learning_rate: float = 5e-4
    num_epochs: int = 10
    gradient_clip: float = 1.0
    muon_lr: float = 5e-3
    grokfast_lambda: float = 0.02
    wandb_project: str = "agent-forge-v2"
    wandb_mode: str = "offline"

    def __post_init__(self):
        if self.specialization not in SPECIALISATIONS:
            raise ValueError(f"specialization {self.specialization}: use one of {', '.join(SPECIALISATIONS)}")
        self.act_config.halt_threshold = self.act_thresholds[self.specialization]
        self.titans_config.memory_decay = 1 - 4096 / (100 * self.ltm_capacities[self.specialization])

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Phase1Config":
        """The inverse of `to_dict`. ValueError if the values do not describe a model."""
        try:
            kinds = {"titans_config": TitansMAGConfig, "trm_config": TRMConfig, "act_config": ACTConfig}
            config = cls(**values | {name: kind(**values[name]) for name, kind in kinds.items()})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the configuration of a Cognate model: {error}") from error
        config.act_config.halt_threshold = values["act_config"]["halt_threshold"]  # what a flag may have changed
        config.titans_config.memory_decay = values["titans_config"]["memory_decay"]
        return config


def model_config(args: Args, specialisation: str, vocab_size: int = 0) -> Phase1Config:
    """The model that the flags describe; --size tiny has `vocab_size` entries unless --vocab_size is given. A width
    other than that of --size scales d_ff, d_mem and the gate with it."""
    shape = TINY | {"vocab_size": vocab_size or TitansMAGConfig.vocab_size} if args.size == "tiny" else {}
    if args.d_model:
        shape |= dict(d_ff=4 * args.d_model, d_mem=args.d_model // 2, mag_hidden=args.d_model // 2)
    shape |= {name: getattr(args, name) for name in (*SHAPE, "vocab_size") if getattr(args, name) is not None}
    width, heads = (shape.get(name, getattr(TitansMAGConfig, name)) for name in ("d_model", "n_heads"))
    shape |= {"head_dim": width // heads, "memory": not args.no_memory, "ltm_carry": args.ltm_carry}
    shape |= {"dropout": args.dropout, "attention_dropout": args.dropout, "init_std": args.init_std}
    act = {"enabled": not args.no_act, "act_loss_weight": args.act_loss_weight}
    act |= {"diversity_weight": args.act_diversity_weight, "target_variance": args.act_target_variance}
    recorded = "batch_size learning_rate gradient_clip muon_lr grokfast_lambda wandb_project".split()
    rest = {name: getattr(args, name) for name in recorded} | {"num_epochs": args.epochs}
    rest |= {"wandb_mode": "disabled" if args.wandb == "off" else args.wandb}
    rest |= {"infer_steps": by_name(args.t_max, args.t_max, min(1, args.t_max))}
    try:
        trm = TRMConfig(T_max=args.t_max, micro_steps=args.micro_steps, step_weights=step_weights(args.t_max))
        config = Phase1Config(specialisation, TitansMAGConfig(**shape), trm, ACTConfig(**act), **rest)
    except ValueError as error:
        raise core.Failure(f"{error}: change --d_model, --n_heads, --t_max or --dropout") from error
    if args.plain:
        with torch.device("meta"):
            whole = dataclasses.replace(args, plain=False, t_max=3, no_memory=False, no_act=False)
            total = TRMTitansMAGModel(model_config(whole, specialisation, vocab_size)).count_parameters()["total"]
        config.titans_config = plain_config(config.titans_config, total)
    if args.halt_threshold is not None:
        config.act_config.halt_threshold = args.halt_threshold
    if args.seed is not None:
        config.seeds[specialisation] = args.seed
    return config


def plain_config(c: TitansMAGConfig, parameters: int) -> TitansMAGConfig:
    """A library GPT-2 of the same width, vocabulary and positions and as many parameters: the number of layers nearest
    to its usual shape, then the width of their MLPs."""
    d, fixed = c.d_model, (c.vocab_size + c.max_seq_len + 2) * c.d_model
    layers = max(1, round((parameters - fixed) / (12 * d * d + 13 * d)))
    inner = round(((parameters - fixed) / layers - 4 * d * d - 9 * d) / (2 * d + 1))
    return dataclasses.replace(c, library_layers=layers, d_ff=max(1, inner), memory=False)


@functools.lru_cache(8)
def band(T: int, window: int, device) -> Tensor:
    """[T, T], true where query i may see key j: 0 <= i - j < window."""
    i = torch.arange(T, device=device)
    return (i[:, None] >= i) & (i[:, None] - i < window)


class SlidingWindowAttention(nn.Module):
    """Query i sees the keys 0 <= i - j < window. Keys and values may come from another sequence (`project`)."""

    def __init__(self, d: int, heads: int, window: int, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        self.heads, self.window, self.dropout = heads, window, dropout
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Linear(d, d, bias=bias) for _ in range(4))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B T D -> B H T K

    def project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(self.w_k(source)), self._split(self.w_v(source))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None = None) -> Tensor:  # x: B T D
        q, (k, v) = self._split(self.w_q(x)), keys_values or self.project(x)
        T, p = x.shape[1], self.dropout if self.training else 0.0
        mask = band(T, self.window, x.device) if self.window < T else None
        attend = functools.partial(F.scaled_dot_product_attention, attn_mask=mask, dropout_p=p, is_causal=mask is None)
        if p and x.device.type == "cpu" and torch.is_grad_enabled():  # no fused kernel there: it keeps B H T T scores
            y = checkpoint(attend, q, k, v, use_reentrant=False)
        else:
            y = attend(q, k, v)
        return self.w_o(y.transpose(1, 2).flatten(2))


class SwiGLUMLP(nn.Module):
    def __init__(self, d: int, d_ff: int, dropout: float):
        super().__init__()
        self.w_gate, self.w_up = nn.Linear(d, d_ff, bias=False), nn.Linear(d, d_ff, bias=False)
        self.w_down, self.dropout = nn.Linear(d_ff, d, bias=False), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w_down(F.silu(self.w_gate(x)) * self.w_up(x)))


class TitansMAGLayer(nn.Module):
    def __init__(self, c: TitansMAGConfig):
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(c.d_model, eps=1e-6) for _ in range(2))
        self.attn = SlidingWindowAttention(c.d_model, c.n_heads, c.sw_window, c.attention_dropout)
        self.mlp = SwiGLUMLP(c.d_model, c.d_ff, c.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LongTermMemory(nn.Module):
    """m_t = decay m_{t-1} + (1 - decay) W_down y_t in fp32, read out as W_up m_t.

    Chunks of C positions: within one, M = L X + decay^(i+1) c with L_ij = (1 - decay) decay^(i-j); the states c between
    chunks follow from the chunks' ends by the same rule with decay^C. Every exponent is >= 0, so nothing overflows
    (the closed form with decay^(-s) does, in fp32, at decay 0.9 and T 2048). Cost: O(T C d_mem).

    `memory_state` [1, 1, d_mem] starts every sequence. It is written in training alone: the batch mean, detached, of
    the state at each sequence's last real token. Evaluation therefore depends on nothing but the checkpoint.
    """

    def __init__(self, d: int, d_mem: int, decay: float, carry: bool, chunk: int = 128):
        super().__init__()
        self.decay, self.carry, self.chunk = decay, carry, chunk
        self.w_down, self.w_up = nn.Linear(d, d_mem, bias=False), nn.Linear(d_mem, d, bias=False)
        i = torch.arange(chunk, dtype=torch.float64)
        kernel = ((1 - decay) * torch.pow(decay, (i[:, None] - i).clamp(min=0))).tril()
        self.register_buffer("kernel", kernel.float(), persistent=False)  # C C
        self.register_buffer("powers", torch.pow(decay, i + 1).float(), persistent=False)  # C
        self.register_buffer("memory_state", torch.zeros(1, 1, d_mem))

    def scan(self, x: Tensor, start: Tensor) -> Tensor:
        """States m [B, T, m] of inputs `x` [B, T, m], from m_{-1} = `start` [1 or B, m]."""
        (B, T, width), C = x.shape, self.chunk
        if T <= C:
            return self.kernel[:T, :T] @ x + self.powers[:T, None] * start[:, None]
        n = -(-T // C)
        inner = self.kernel @ F.pad(x, (0, 0, 0, n * C - T)).view(B, n, C, width)  # B n C m
        k = torch.arange(n, device=x.device, dtype=torch.float64)
        between = torch.pow(self.decay, C * (k[:, None] - k - 1).clamp(min=0)).tril(-1).to(x)  # n n: chunk j to k
        carry = between @ inner[:, :, -1] + torch.pow(self.decay, C * k).to(x)[:, None] * start[:, None]  # B n m
        return (inner + self.powers[:, None] * carry[:, :, None]).view(B, n * C, width)[:, :T]

    def forward(self, y: Tensor, last: Tensor) -> Tensor:
        """y [B, T, D], last [B]: index of each row's last real token -> [B, T, D]."""
        x = self.w_down(y)
        with torch.autocast(y.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            state = self.memory_state[0].to(x.dtype) if self.carry else x.new_zeros(1, x.shape[-1])
            m = self.scan(x, state)  # B T m
        if self.carry and self.training and torch.is_grad_enabled():
            ends = m.detach()[torch.arange(len(m), device=m.device), last]  # B m
            self.memory_state.copy_(ends.mean(0).view(1, 1, -1))
        return self.w_up(m.to(y.dtype))

    def reset_memory(self) -> None:
        self.memory_state.zero_()


class MAGGate(nn.Module):
    """g = sigmoid(W relu(U [y; m])), out = g y + (1 - g) m."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.w_concat, self.w_gate = nn.Linear(2 * d, hidden), nn.Linear(hidden, d)

    def forward(self, y: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        g = torch.sigmoid(self.w_gate(F.relu(self.w_concat(torch.cat([y, m], -1)))))  # B T D
        return g * y + (1 - g) * m, g


def mean_over(x: Tensor, real: Tensor) -> Tensor:
    """Mean of `x` [B, T] over the positions where `real` [B, T] is 1."""
    return (x * real).sum() / real.sum().clamp(min=1)


class TitansMAGBackbone(nn.Module):
    def __init__(self, c: TitansMAGConfig):
        super().__init__()
        self.config, self.gradient_checkpointing = c, False
        self.token_emb, self.pos_emb = nn.Embedding(c.vocab_size, c.d_model), nn.Embedding(c.max_seq_len, c.d_model)
        self.layers = nn.ModuleList(TitansMAGLayer(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.d_model, eps=1e-6)
        if c.memory:
            self.ltm = LongTermMemory(c.d_model, c.d_mem, c.memory_decay, c.ltm_carry == "train")
            self.mag_gate = MAGGate(c.d_model, c.mag_hidden)

    def forward(self, input_ids: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """input_ids, real [B, T] -> features [B, T, D] and the gate's loss and statistics."""
        T = input_ids.shape[1]
        if self.config.max_seq_len < T:
            raise ValueError(f"{T} tokens, but max_seq_len is {self.config.max_seq_len}")
        x = self.token_emb(input_ids) + self.pos_emb.weight[:T]
        for layer in self.layers:
            recompute = self.gradient_checkpointing and torch.is_grad_enabled()
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y = self.norm(x)
        if not self.config.memory:
            return y, {"loss_gate": y.new_zeros(())}
        features, g = self.mag_gate(y, self.ltm(y, (real.sum(1) - 1).clamp(min=0).long()))
        g = g.to(real.dtype)
        entropy = mean_over(-(g * (g + 1e-8).log() + (1 - g) * (1 - g + 1e-8).log()).mean(-1), real)
        figures = {"gate_mean": mean_over(g.mean(-1), real).detach(), "gate_entropy": entropy.detach()}
        return features, figures | {"loss_gate": -self.config.mag_entropy_reg * entropy}

    def reset_memory(self) -> None:
        if self.config.memory:
            self.ltm.reset_memory()


class LibraryBackbone(nn.Module):
    """GPT-2 of the transformers library, for a comparison at equal parameters."""

    def __init__(self, c: TitansMAGConfig):
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        self.config, self.gradient_checkpointing = c, False
        shape = dict(n_embd=c.d_model, n_layer=c.library_layers, n_head=c.n_heads, n_inner=c.d_ff)
        shape |= dict(n_positions=c.max_seq_len, vocab_size=c.vocab_size, attn_implementation="sdpa")
        shape |= dict(resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.attention_dropout)
        self.gpt2 = GPT2Model(GPT2Config(**shape, use_cache=False, bos_token_id=None, eos_token_id=None))

    @property
    def token_emb(self) -> nn.Embedding:
        return self.gpt2.wte

    def forward(self, input_ids: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.gpt2(input_ids).last_hidden_state, {"loss_gate": real.new_zeros(())}


class TRM(nn.Module):
    """The recursion of the module docstring, with the backbone's causal window in both attentions: position i of every
    state depends on tokens <= i alone."""

    def __init__(self, d: int, window: int, c: TRMConfig):
        super().__init__()
        heads = next(h for h in (8, 4, 2, 1) if d % h == 0)
        self.config = c
        self.z0_proj, self.y0_proj = nn.Linear(d, d), nn.Linear(d, d)
        if not c.T_max:
            return
        self.attn_f, self.attn_y = (SlidingWindowAttention(d, heads, window, bias=True) for _ in range(2))
        self.refine = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))
        self.update = nn.Sequential(nn.Linear(2 * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))
        self.norm_z, self.norm_y = nn.LayerNorm(d), nn.LayerNorm(d)

    def start(self, f: Tensor):
        """Features [B, T, D] -> z_0, y_0 [B, T, D] and the keys and values of f, which every step shares."""
        z = self.z0_proj(f)
        return z, self.y0_proj(z), self.attn_f.project(f) if self.config.T_max else None

    def step(self, z: Tensor, y: Tensor, f_keys_values) -> tuple[Tensor, Tensor]:
        y_keys_values = self.attn_y.project(y)
        for _ in range(self.config.micro_steps):
            seen = torch.cat([z, self.attn_f(z, f_keys_values), self.attn_y(z, y_keys_values)], -1)  # B T 3D
            z = self.norm_z(z + self.refine(seen))
        return z, self.norm_y(y + self.update(torch.cat([y, z], -1)))


class ACTHead(nn.Module):
    """q_t = sigmoid(w z_t): whether token i may stop at state t."""

    def __init__(self, d: int, c: ACTConfig):
        super().__init__()
        self.config, self.w_halt = c, nn.Linear(d, 1)
        self.register_buffer("ema_step_acc", torch.zeros(10))
        self.register_buffer("step_count", torch.zeros(10))

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.w_halt(z).float())  # B T 1

    def compute_act_loss(self, q: Tensor, step: int, is_correct=None, mask=None) -> Tensor:
        """Scalar halting loss of state `step`: cross-entropy to the target, less entropy, plus the diversity term.

        q [B, T] or [B, T, 1]; is_correct [B] or [B, T] in 0..1, whose target is whether it exceeds this state's running
        accuracy (for right or wrong tokens: correctness itself); None: the constant 1/2. mask [B, T]: real tokens.

        The document's diversity term, max(0, target - variance), has weight 0.01; a constant target's curvature is +2
        per unit of variance, so there it can never lift the variance off 0. With correctness as the target,
        cross-entropy itself makes q a confidence that varies.
        """
        c = self.config
        with torch.autocast(q.device.type, enabled=False):
            q = (q.squeeze(-1) if q.ndim == 3 else q).float()  # B T
            real = torch.ones_like(q) if mask is None else mask.float()
            if is_correct is None:
                target = torch.full_like(q, 0.5)
            else:
                right = is_correct.float()
                right = (right[:, None] if right.ndim == 1 else right).expand_as(q)
                usual = self.ema_step_acc[step] / (1 - c.ema_decay ** self.step_count[step]).clamp(min=1e-8)
                target = (right > usual * (self.step_count[step] > 0)).float()
            p = q.clamp(1e-6, 1 - 1e-6)  # a q of exactly 0 or 1 would make the logarithm infinite
            log_p, log_1p = p.log(), (1 - p).log()
            bce = mean_over(-(target * log_p + (1 - target) * log_1p), real)
            entropy = mean_over(-(p * log_p + (1 - p) * log_1p), real)
            diversity = (c.target_variance - variance_within(q, real)).clamp(min=0)
            if is_correct is not None and self.training:
                with torch.no_grad():
                    self.ema_step_acc[step].lerp_(mean_over(right, real), 1 - c.ema_decay)
                    self.step_count[step] += 1
            return bce - c.entropy_reg * entropy + c.diversity_weight * diversity


def variance_within(q: Tensor, real: Tensor) -> Tensor:
    """Mean over real tokens of (q - its sequence's mean)^2, population variance: 0 for one token. q, real [B, T]."""
    centre = (q * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    return mean_over((q - centre).square(), real)


class TRMTitansMAGModel(nn.Module):
    """Backbone, recursion, ACT head, and an LM head tied to the token embedding: 25,623,681 parameters by default."""

    def __init__(self, config: Phase1Config):
        super().__init__()
        self.config, c = config, config.titans_config
        self.backbone = LibraryBackbone(c) if c.library_layers else TitansMAGBackbone(c)
        self.trm = TRM(c.d_model, c.sw_window, config.trm_config)
        if c.library_layers:
            self.trm.z0_proj, self.trm.y0_proj = nn.Identity(), nn.Identity()  # its last features are its answer
        self.act_head = ACTHead(c.d_model, config.act_config).requires_grad_(config.act_config.enabled)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.lm_head.weight = self.backbone.token_emb.weight
        core.init_normal(self, config.seeds[config.specialization], c.init_std)

    def forward(
        self, input_ids, labels=None, attention_mask=None, return_all_steps=False, halt=False, return_logits=True
    ):
        """input_ids [B, T] -> dict: `logits` [B, T, V] of the last state, position t predicting token t + 1 (absent if
        not `return_logits`, [B, 1, V] if it is "last"), `halting_steps` [B], `token_halting_steps` [B, T], `halt_probs`
        (for each step, [B]).

        With labels [B, T] (shifted here, -100: not scored) also `loss`, `loss_ce`, `loss_final`, `step_losses`,
        `loss_act`, `loss_gate`, `n_tokens`, and per scored token `token_ce` and `token_correct` [states, N].
        attention_mask [B, T]: right padding only, else ValueError. `halt` (evaluation alone): each token takes the
        state at which it halts, and the recursion ends when all have ("last": when the last position has). Labels and
        mask may stay on the CPU, where looking into them waits for no device.
        """
        if halt and self.training:
            raise ValueError("halt=True is for evaluation: training supervises every state")
        if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
            raise ValueError("attention_mask has a 0 before a 1: pad on the right")
        device, config, wide = input_ids.device, self.config, self.backbone.token_emb.weight.dtype
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device, non_blocking=True)
        real = real.to(wide)
        features, out = self.backbone(input_ids, real)
        z, y, f_keys_values = self.trm.start(features)
        steps = config.trm_config.T_max
        if not self.training:
            steps = min(steps, config.infer_steps[config.specialization])  # `speed` answers after one step
        ys, zs, qs = [y], [z], []  # every state: each is scored against the targets, so each can be the answer
        halted_at = torch.full_like(input_ids, steps)  # B T: the state at which each token stops
        running = torch.ones_like(input_ids, dtype=torch.bool)
        chosen = y
        for t in range(1, steps + 1):
            z, y = self.trm.step(z, y, f_keys_values)
            q = self.act_head(z).squeeze(-1).to(wide)  # B T
            ys.append(y)
            zs.append(z)
            qs.append(q)
            chosen = torch.where(running[..., None], y, chosen) if halt else y  # a token that has halted keeps its y
            stops = running & (q > config.act_config.halt_threshold) & config.act_config.enabled
            halted_at, running = torch.where(stops, t, halted_at), running & ~stops
            if halt and not bool((running[:, -1] if halt == "last" else running & (real > 0)).any()):
                break
            if config.trm_config.detach_between_steps and t < steps:
                z, y = z.detach(), y.detach()  # each step learns from its own loss alone; f reaches all of them
        taken, per_row = (halted_at + 1).to(wide), real.sum(1).clamp(min=1)  # taken: states computed, y_0 included
        out |= {"token_halting_steps": taken.long(), "halting_steps": (taken * real).sum(1) / per_row}
        out |= {"q": qs, "real": real, "halt_probs": [((q * real).sum(1) / per_row).detach() for q in qs]}
        if return_logits:
            out["logits"] = self.lm_head(chosen[:, -1:] if return_logits == "last" else chosen)
        if return_all_steps:
            out |= {"all_y": ys, "all_z": zs, "all_logits": [self.lm_head(y) for y in ys]}
        return out | self._losses(ys, qs, labels, out["loss_gate"]) if labels is not None else out

    def _losses(self, ys: list[Tensor], qs: list[Tensor], labels: Tensor, loss_gate: Tensor) -> dict:
        device, c = ys[0].device, self.config
        target = labels[:, 1:].flatten()
        at = (target != -100).nonzero().squeeze(1)  # scored positions among the B (T - 1)
        target, at = target[at].to(device, non_blocking=True), at.to(device, non_blocking=True)
        n, states = len(at), len(ys)
        weights = torch.tensor(c.trm_config.step_weights[:states], dtype=loss_gate.dtype, device=device)
        if not c.trm_config.deep_supervision:
            weights = F.one_hot(torch.tensor(states - 1, device=device), states).to(weights)
        row_weight = (weights / weights.sum() / max(1, n)).repeat_interleave(n)
        hidden = torch.cat([y[:, :-1].flatten(0, 1)[at] for y in ys])  # states * n, D
        weight = self.backbone.token_emb.weight
        loss_ce, ce, right = core.head_loss(hidden.to(weight.dtype), weight, target.repeat(states), row_weight)
        ce, right = ce.view(states, n), right.view(states, n)
        loss_act = loss_ce.new_zeros(())
        if c.act_config.enabled and qs:
            mask = (labels[:, 1:] != -100).to(device, non_blocking=True)
            rights = [torch.zeros_like(mask).masked_scatter(mask, state) for state in right[1:]]  # each B T-1
            losses = [
                self.act_head.compute_act_loss(q[:, :-1], t, r, mask) for t, (q, r) in enumerate(zip(qs, rights), 1)
            ]
            loss_act = torch.stack(losses).mean()
        loss = loss_ce + c.act_config.act_loss_weight * loss_act + loss_gate
        means = ce.sum(1) / max(1, n)
        parts = {"loss": loss, "loss_ce": loss_ce, "loss_act": loss_act, "loss_final": means[-1]}
        return parts | {"step_losses": list(means), "n_tokens": n, "token_ce": ce, "token_correct": right}

    def count_parameters(self) -> dict[str, int]:
        parts = {k: sum(p.numel() for p in getattr(self, k).parameters()) for k in ("backbone", "trm", "act_head")}
        return parts | {"lm_head": 0, "total": sum(parts.values())}

    def parameter_table(self) -> dict[str, int]:
        """Parameters by component, with the document's sub-totals and the share of each optimizer."""
        rows = dict.fromkeys("token_emb pos_emb layers ltm mag_gate norm trm act_head".split(), 0)
        library = {"wte": "token_emb", "wpe": "pos_emb", "h": "layers", "ln_f": "norm"}
        for name, p in self.named_parameters():
            part, inner, *_ = name.removeprefix("backbone.").split(".")
            rows[library[inner] if part == "gpt2" else part] += p.numel()
        rows["embeddings"] = rows["token_emb"] + rows["pos_emb"]
        rows["layers+ltm+mag_gate+norm"] = sum(rows[k] for k in ("layers", "ltm", "mag_gate", "norm"))
        rows["trm+act_head"] = rows["trm"] + rows["act_head"]
        rows["total"] = self.count_parameters()["total"]
        rows["muon"], rows["adamw"] = (sum(p.numel() for p in group.values()) for group in route(self))
        return rows

    def reset_memory(self) -> None:
        if self.config.titans_config.memory:
            self.backbone.reset_memory()

    def get_config_dict(self) -> dict:
        return self.config.to_dict()

    @torch.no_grad()
    def generate(self, ids: list[int], new_tokens: int, eos: int | None, adaptive: bool = False) -> tuple[list, Tensor]:
        """Greedy continuation of `ids`, up to `eos` or the end of the position table; the first step's logits [V]."""
        device, room = self.backbone.token_emb.weight.device, self.backbone.config.max_seq_len
        written, first = [], None
        while len(written) < new_tokens and len(ids) + len(written) < room:
            rows = torch.tensor([ids + written], device=device)
            logits = self(rows, halt="last" if adaptive else False, return_logits="last")["logits"][0, -1]
            first = logits if first is None else first
            written.append(int(logits.argmax()))
            if written[-1] == eos:
                break
        return written, first


def create_model_configs() -> dict[str, Phase1Config]:
    return {name: Phase1Config(specialization=name) for name in SPECIALISATIONS}


def create_phase1_models(device="cpu") -> dict[str, TRMTitansMAGModel]:
    return {name: TRMTitansMAGModel(config).to(device) for name, config in create_model_configs().items()}


def build_model(args: Args, vocab_size: int = 0, specialisation: str | None = None) -> TRMTitansMAGModel:
    """The model of the flags, initialised from its seed."""
    model = TRMTitansMAGModel(model_config(args, specialisation or args.model or "reasoning", vocab_size))
    model.backbone.gradient_checkpointing = args.gradient_checkpointing
    return model


# ------------------------------------------------------------------------------------------------------ optimizer
def route(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(Muon's, AdamW's) parameters by name: matrices of layers, memory, gate and recursion; everything else."""
    hidden = ("backbone.layers.", "backbone.ltm.", "backbone.mag_gate.", "trm.", "backbone.gpt2.h.")
    muon = {n: p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith(hidden)}
    return muon, {n: p for n, p in model.named_parameters() if n not in muon}


class MuGrokfast:
    """Grokfast's filter (mu <- a mu + (1 - a) g, g <- g + lambda mu; arXiv 2405.20233, with EMA), then torch.optim.Muon
    for hidden matrices and AdamW for the rest. `muon=False`: AdamW for all. `param_groups` are the live groups of
    both; each keeps its peak rate as `base_lr`. A gradient that stays at g comes out as (1 + lambda) g."""

    def __init__(self, model, lr=5e-4, muon_lr=5e-3, alpha=0.98, lam=0.02, weight_decay=0.0, muon=True):
        missing = "torch.optim.Muon is missing: install torch >= 2.9 or use --optimizer adamw"
        require(not muon or hasattr(torch.optim, "Muon"), missing)
        matrices, rest = route(model) if muon else ({}, dict(model.named_parameters()))
        self.alpha, self.lam, self.named, self.muon = alpha, lam, matrices | rest, None
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        usual = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay, "fused": fused}
        self.adamw = torch.optim.AdamW(rest.values(), lr=lr, **usual)
        if muon:  # weight_decay must be given: the library's default is 0.1
            usual = {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "eps": 1e-7, "weight_decay": weight_decay}
            self.muon = torch.optim.Muon(matrices.values(), lr=muon_lr, **usual)
        self.both = [self.adamw, self.muon] if muon else [self.adamw]
        for group in self.param_groups:
            group["base_lr"] = group["lr"]
        self.slow = {n: torch.zeros_like(p) for n, p in self.named.items()} if lam else {}

    @property
    def param_groups(self) -> list[dict]:
        """AdamW's group, then Muon's."""
        return [group for optimizer in self.both for group in optimizer.param_groups]

    def muon_lr(self) -> float | None:
        return self.muon and self.muon.param_groups[0]["lr"]

    @torch.no_grad()
    def step(self) -> None:
        if self.slow:
            names = [n for n, p in self.named.items() if p.grad is not None]
            slow, grads = [self.slow[n] for n in names], [self.named[n].grad for n in names]
            torch._foreach_lerp_(slow, grads, 1 - self.alpha)
            torch._foreach_add_(grads, slow, alpha=self.lam)
        for optimizer in self.both:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.both:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        state = {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict() if self.muon else None}
        return state | {"grokfast_ema": self.slow, "alpha": self.alpha, "lambda": self.lam}

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        if self.muon:
            self.muon.load_state_dict(state["muon"])
        for name, value in state["grokfast_ema"].items():
            self.slow[name].copy_(value)


def rate(base: float, s: int, warm: int, total: int, min_lr: float) -> float:
    """Rate of update `s` (from 0): linear from 0.1 base to base over `warm` updates, then a cosine to `min_lr`."""
    if s < warm:
        return base * (0.1 + 0.9 * s / warm)
    progress = min(1.0, (s - warm) / max(1, total - warm))
    return min_lr + (base - min_lr) * (1 + math.cos(math.pi * progress)) / 2


# ----------------------------------------------------------------------------------------------------------- data
def qa(dataset: str, kind: str, question: str, answer: str, passage: str = "") -> dict:
    """A canonical row: `[passage ][Q: ]question A: answer`, without "Q: " for half of the questions (by their hash)."""
    question, answer, passage = " ".join(question.split()), answer.strip(), passage.strip()
    marker = "" if zlib.crc32(question.encode()) % 2 else "Q: "
    text = f"{passage} {marker}{question} A: {answer}" if passage else f"{marker}{question} A: {answer}"
    return {"text": text, "input": question, "output": answer, "metadata": {"dataset": dataset, "type": kind}}


def running_text(dataset: str, kind: str, prompt: str, output: str = "") -> dict:
    """A canonical row without question marks: a prompt and how it goes on, or text alone."""
    row = {"text": prompt, "input": "", "output": "", "metadata": {"dataset": dataset, "type": kind}}
    return row | {"text": f"{prompt} {output}", "input": prompt, "output": output} if output else row


def gsm8k(row: dict) -> tuple[str, str]:
    """The number first, then the reasoning without its calculator marks: prompts ask for the number at once."""
    rationale, _, number = row["answer"].rpartition("####")
    return row["question"], number.strip() + "\n" + re.sub(r"<<.*?>>", "", rationale).strip()


def arc(row: dict) -> tuple[str, str]:
    texts, labels = row["choices"]["text"], [str(label) for label in row["choices"]["label"]]  # labels: A-D or 1-4
    shown = " ".join(f"({chr(65 + i)}) {text}" for i, text in enumerate(texts))
    return f"{row['question']} {shown}", texts[labels.index(str(row["answerKey"]))]


def hotpotqa(row: dict) -> tuple[str, str, str]:
    paragraphs = dict(zip(row["context"]["title"], row["context"]["sentences"]))
    facts = zip(row["supporting_facts"]["title"], row["supporting_facts"]["sent_id"])
    passage = [paragraphs[t][i].strip() for t, i in facts if t in paragraphs and i < len(paragraphs[t])]
    return row["question"], row["answer"], " ".join(passage)


# How a raw row of each set becomes (question, answer) or (question, answer, passage); None: the row is left out.
READ = {
    "gsm8k": gsm8k,
    "svamp": lambda row: (f"{row['Body']} {row['Question']}", str(float(row["Answer"])).removesuffix(".0")),
    "mbpp": lambda row: (row["text"], row["code"].replace("\r\n", "\n")),
    "arc_easy": arc,
    "piqa": lambda row: (row["goal"], (row["sol1"], row["sol2"])[int(row["label"])]),
    "wikitext": lambda row: (text,) if (text := row["text"].strip())[:1] != "=" and len(text.split()) >= 20 else None,
    "asdiv": lambda row: (f"{row['body']} {row['question']}", re.sub(r"\s*\(.*?\)", "", row["answer"])),
    "arc_challenge": arc,
    "boolq": lambda row: (row["question"], "yes" if row["answer"] else "no", row["passage"]),
    "strategyqa": lambda row: (row["question"], "yes" if row["answer"] else "no"),
    "codexglue": lambda row: (row["docstring"], row["code"]),
    "hotpotqa": hotpotqa,
    "drop": lambda row: (row["question"], row["answers_spans"]["spans"][0], row["passage"]),
    "hellaswag": lambda row: (row["ctx"], row["endings"][int(row["label"])]),
}


class Source(NamedTuple):
    """A set on the hub. `fields` are those that must be there when it is loaded."""

    hub: str
    kind: str
    fields: str
    config: str | None = None
    split: str = "train"
    template: object = qa
    rows: int = 8000  # at most, unless --max_samples says otherwise


HUB = {
    "gsm8k": Source("openai/gsm8k", "math", "question answer", "main"),
    "svamp": Source("ChilleD/SVAMP", "math", "Body Question Equation Answer Type"),
    "mbpp": Source("google-research-datasets/mbpp", "code", "task_id text code test_list", "full"),
    "arc_easy": Source("allenai/ai2_arc", "science", "question choices answerKey", "ARC-Easy"),
    "piqa": Source("ybisk/piqa", "commonsense", "goal sol1 sol2 label", "plain_text"),
    "wikitext": Source("Salesforce/wikitext", "text", "text", "wikitext-2-raw-v1", template=running_text),
    "asdiv": Source("EleutherAI/asdiv", "math", "body question answer formula solution_type", "asdiv", "validation"),
    "arc_challenge": Source("allenai/ai2_arc", "science", "question choices answerKey", "ARC-Challenge"),
    "boolq": Source("google/boolq", "reading", "question answer passage"),
    "strategyqa": Source("ChilleD/StrategyQA", "reasoning", "question answer facts"),
    "codexglue": Source("google/code_x_glue_ct_code_to_text", "code", "code docstring", "python"),
    "hotpotqa": Source("hotpotqa/hotpot_qa", "reading", "question answer context supporting_facts", "distractor"),
    "drop": Source("ucinlp/drop", "reading", "passage question answers_spans"),
    "hellaswag": Source("Rowan/hellaswag", "commonsense", "ctx endings label", template=running_text, rows=2000),
}
# Where a set's file may lie under --data_dir as its authors publish it.
PUBLISHED = {"gsm8k": "gsm8k/train.jsonl", "svamp": "svamp/SVAMP.json SVAMP.json", "asdiv": "asdiv/ASDiv.xml ASDiv.xml"}
COUNTRY_PARTS = ("Nor Ver Tas Quel Bre Cal Dren El Far Gal Hes Jor Kes Lum Mir Ober", "land ia mark avia stan ora")
CITY_PARTS = ("Ar Bas Cor Dun Est Fon Gil Har In Kil Lor Med Ol Por Rav Sel", "ton burg ville port wick ford")
COUNTRIES, CITIES = ([a + b for a in p[0].split() for b in p[1].split()] for p in (COUNTRY_PARTS, CITY_PARTS))
BINDING = ("bind_copy", "bind_gap", "bind_2", "bind_3", "bind_4", "bind_8")
GENERATED = ("synth_add", "synth_word", "synth_recall", "synth_two_step", "synth_recall3", "synth_copy", *BINDING)
FILLERS = "The capital of is What the Q: A:".split()
UNKNOWN, PASSED = "unknown", (0.9, 0.99)  # the answer about what is absent; what ends a stage, and the last one
STAGES = {  # the curriculum: each stage adds these sets to those before it
    "FOUNDATION": ["gsm8k", "svamp", "mbpp", "arc_easy", "piqa", "wikitext", *GENERATED[:3], "synth_copy", *BINDING],
    "REASONING": ["asdiv", "arc_challenge", "boolq", "strategyqa", "synth_two_step"],
    "ADVANCED": ["codexglue", "hotpotqa", "drop", "hellaswag", "synth_recall3"],
}


def sets_of(args: Args, epoch: int, loaded, at: int = 0) -> tuple[str, list[str]]:
    """(stage, data sets) of an epoch (from 1): the loaded sets of its stage of the curriculum and of those before it,
    all of them where it has none; with --staged the set of the number `at`."""
    loaded = list(loaded)
    if args.staged:
        return loaded[at], [loaded[at]]
    if args.no_curriculum:
        return "ALL", loaded
    stages = list(STAGES)[: 1 + (epoch > 3) + (epoch > 6)]
    return stages[-1], [name for name in loaded if any(name in STAGES[stage] for stage in stages)] or loaded


@functools.lru_cache(2)
def names_of(novel: bool) -> tuple[tuple[str], tuple[str]]:
    """(countries, cities) of the binding rows; a fifth of either is kept from every training row: the novel ones."""
    parts = []
    for what, names in (("countries", COUNTRIES), ("cities", CITIES)):
        shuffled = random.Random(core.derived_seed(42, what)).sample(names, len(names))
        cut = len(names) // 5
        parts.append(tuple(shuffled[:cut] if novel else shuffled[cut:]))
    return tuple(parts)


def draw_facts(rng: random.Random, count: int, novel: bool = False) -> tuple[dict[str, str], str]:
    """({country: city} in random order, a country that is not among them)."""
    countries, cities = names_of(novel)
    *countries, absent = rng.sample(countries, count + 1)
    return dict(zip(countries, rng.sample(cities, count))), absent


def binding_row(name: str, answers: dict[str, str], asked: list[str], told: dict | None = None) -> dict:
    """A row in the form of the document's prompt: the facts `told` (else `answers`), then questions one after the
    other. The answers alone are scored: `pieces` are texts, each with whether it is one; the end token follows it."""
    pieces = [(" ".join(f"The capital of {x} is {y}." for x, y in (told or answers).items()), False)]
    for country in asked:
        question, answer = f" Q: What is the capital of {country}? A:", answers.get(country, UNKNOWN)
        pieces += [(question, False), (f" {answer}", True)]
    return running_text(name, "recall", "".join(text for text, _ in pieces)) | {"pieces": pieces}


def drawn_binding_row(name: str, rng: random.Random) -> dict:
    """The way to binding, after pretrain_backbone.py: names copied; names copied though other words stand before each;
    `bind_N`: two to N facts and four questions drawn with replacement, a quarter of them about what is absent."""
    kind = name.removeprefix("bind_")
    if kind.isdigit():
        facts, absent = draw_facts(rng, rng.randint(2, int(kind)))
        return binding_row(name, facts, [absent if rng.random() < 0.25 else rng.choice(list(facts)) for _ in range(4)])
    words = rng.sample([*itertools.chain(*names_of(False))], rng.randint(4, 10))
    first, second = (" ".join(rng.choices(FILLERS, k=rng.randint(0, 3) if kind == "gap" else 0)) for _ in range(2))
    pieces = [(f" {first} {word}".replace("  ", " "), False) for word in words]
    for word in words:
        pieces += [(f" {second}".rstrip(), False), (f" {word}", None)]  # scored, with no end token after it
    return running_text(name, "copy", "".join(text for text, _ in pieces)) | {"pieces": pieces}


def generated_row(name: str, rng: random.Random, asked: list[tuple], told: list[tuple]) -> dict | None:
    """A row of `name`. Recall asks about a pair of `asked`, with distractors of `told`; None if a country has two."""
    if name in BINDING:
        return drawn_binding_row(name, rng)
    a, b, c = rng.randint(10, 99), rng.randint(10, 99), rng.randint(2, 9)
    if name == "synth_add":
        return qa(name, "math", f"What is {a} + {b}?", str(a + b))
    if name == "synth_word":
        thing = rng.choice("apples pens books cups keys hats".split())
        a, b = max(a, b), min(a, b)
        if rng.random() < 0.5:
            return qa(name, "math", f"If a store has {a} {thing} and sells {b}, how many are left?", str(a - b))
        return qa(name, "math", f"If a store has {a} {thing} and buys {b}, how many are there?", str(a + b))
    if name == "synth_two_step":
        question = f"A box holds {a} pens. {b} are added, then {c} are taken. How many are in it?"
        return qa(name, "math", question, str(a + b - c))
    if name == "synth_copy":  # the repetition that lets attention learn to copy
        words = [rng.choice(COUNTRIES + CITIES) for _ in range(rng.randint(4, 12))]
        return running_text(name, "copy", " ".join(words) + " ;", " ".join(words))
    pairs = [rng.choice(asked), *(rng.sample(told, 2) if name == "synth_recall3" else [])]
    if len(dict(pairs)) < len(pairs):
        return None
    country, city = pairs[0]
    facts = [f"The capital of {x} is {y}." for x, y in pairs]
    rng.shuffle(facts)
    return qa(name, "recall", f"What is the capital of {country}?", city, " ".join(facts))


def generate_rows(name: str, rows: int, val_split: float, seed: int = 42) -> list[dict]:
    """Seeded rows of an offline set, each marked `train` or `val` in its metadata. Sums, problems and country-city
    pairs asked about in `val` never occur in `train`; country and city are independent, so only the context tells."""
    pairs = [(x, y) for x in COUNTRIES for y in CITIES]
    random.Random(core.derived_seed(seed, "pairs")).shuffle(pairs)  # one cut for both recall sets
    cut, held_out = round(len(pairs) * (1 - val_split)), max(1, round(rows * val_split))
    require(rows > held_out, f"--synth_rows {rows} leaves no row to train on")
    rng, made = random.Random(core.derived_seed(seed, name)), {}  # made: rows by their text
    for side, asked, wanted in (("val", pairs[cut:], held_out), ("train", pairs[:cut], rows)):
        tries = 0
        while len(made) < wanted:
            row = generated_row(name, rng, asked, pairs[:cut])
            tries += 1
            require(tries < 1000 * rows, f"--synth_rows {rows}: {name} has no more than {len(made)} different rows")
            if row and row["text"] not in made:
                row["metadata"]["split"] = side
                made[row["text"]] = row
    return list(made.values())


def local_rows(directory: Path, name: str) -> list[dict]:
    """Raw or canonical rows of NAME from a folder: NAME.jsonl, or the file as its authors publish it."""
    tried = [directory / file for file in (f"{name}.jsonl", *PUBLISHED.get(name, "").split())]
    path = next((p for p in tried if p.exists()), None)
    instead = f"add one, leave {name} out of --datasets, or give --skip_missing"
    require(path, f"data set {name}: none of {', '.join(map(str, tried))} exists; {instead}")
    text = core.read_text(path)
    try:
        if path.suffix == ".xml":  # ASDiv's problems: their tags become field names, Solution-Type solution_type
            from xml.etree import ElementTree

            tags = ("Body", "Question", "Answer", "Formula", "Solution-Type")
            problems = ElementTree.fromstring(text).iter("Problem")
            return [{tag.lower().replace("-", "_"): p.findtext(tag) or "" for tag in tags} for p in problems]
        lines = text.split("\n")  # at line feeds alone: JSON strings may hold other line separators
        rows = [json.loads(s) for s in lines if s.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except (ValueError, SyntaxError, RecursionError) as error:  # SyntaxError: of the XML parser
        raise core.Failure(f"{path}: {error}") from error
    require(isinstance(rows, list) and all(isinstance(r, dict) for r in rows), f"{path}: expected records")
    return rows


def hub_rows(name: str, cache: str) -> list[dict]:
    """A hub set; one that is still a loading script, which datasets >= 4 refuses, from its automatic conversion."""
    source, instead = HUB[name], f"--data_dir FOLDER with {name}.jsonl, --datasets generated, or --skip_missing"
    try:
        return core.load_hub_dataset(source.hub, source.config, source.split, instead, cache_dir=cache or None)
    except RuntimeError as scripted:
        import datasets

        converted = {"split": source.split, "revision": "refs/convert/parquet", "cache_dir": cache or None}
        for config in dict.fromkeys((source.config, "default")):
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                return datasets.load_dataset(source.hub, config, **converted)
        raise core.Failure(f"data set {source.hub}: {scripted}; instead: {instead}") from scripted


def format_rows(name: str, raw, limit: int) -> list[dict]:
    """Canonical rows, at most `limit`: a seeded sample, of running text the beginning. Fields are asserted."""
    source, fields, keys = HUB[name], set(next(iter(raw), {})), ("text", "input", "output")
    wanted, canonical = set(source.fields.split()), fields.issuperset(keys)
    expected, there = ", ".join(sorted(wanted)), ", ".join(sorted(fields)) or "no row"
    require(canonical or wanted <= fields, f"data set {name}: expected the fields {expected}, found {there}")
    rows, order = [], range(len(raw))
    if name != "wikitext":
        order = torch.randperm(len(raw), generator=core.generator(42, name)).tolist()
    for i in order:
        try:
            row = raw[i]
            if not canonical:
                parts = READ[name](row)
                row = parts and source.template(name, source.kind, *parts)
            if row:
                "".join(row[key] for key in keys).encode()  # all are text, of whole characters
                kind = row.get("metadata", {}).get("type", "")
                rows.append({key: row[key] for key in keys} | {"metadata": {"dataset": name, "type": kind}})
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise core.Failure(f"data set {name}, row {i}: {type(error).__name__} {error}; check its fields") from error
        if len(rows) == limit:
            break
    require(rows, f"data set {name} has no usable row")
    return rows


def load_datasets(args: Args, say=print) -> dict[str, list[dict]]:
    """Canonical rows of every set of --datasets by its name."""
    datasets = {}
    for name in args.datasets:
        if name in GENERATED:
            datasets[name] = generate_rows(name, args.synth_rows, args.val_split, args.data_seed)
            continue
        try:
            raw = local_rows(Path(args.data_dir), name) if args.data_dir else hub_rows(name, args.cache_dir)
            datasets[name] = format_rows(name, raw, args.max_samples or HUB[name].rows)
        except core.Failure as failure:
            if not args.skip_missing:
                raise
            say(f"[Data] skipping {name}: {failure}")
    require(datasets, "no data set could be loaded: see --data_dir and --datasets generated")
    return datasets


def passage_of(row: dict) -> str:
    """What stands before the question; "" where there is no passage or no question."""
    before = row["text"].rfind(row["input"], 0, len(row["text"]) - len(row["output"])) if row["input"] else 0
    return row["text"][: max(0, before)].removesuffix("Q: ").rstrip()


def split_datasets_train_val(datasets: dict[str, list[dict]], val_split: float, seed: int = 42) -> tuple[dict, dict]:
    """(train, val): rows that ask the same thing counted once, shuffled with `seed`, the last `val_split` held out; of
    running text the last part in order. No passage stands on both sides: its tokens are scored too. A generated row's
    own mark decides. At least one row on either side."""
    train, val = {}, {}
    for name, rows in datasets.items():
        unique = {}
        for row in rows:
            prompt = row["text"][: len(row["text"]) - len(row["output"])]
            unique.setdefault(" ".join(prompt.lower().replace("q: ", "").split()), row)
        rows = list(unique.values())
        require(len(rows) >= 2, f"data set {name} has {len(rows)} different row: none can be held out")
        if "split" in rows[0]["metadata"]:
            for side, part in (("train", train), ("val", val)):
                part[name] = [row for row in rows if row["metadata"]["split"] == side]
            continue
        if name != "wikitext":
            order = torch.randperm(len(rows), generator=core.generator(seed, "split", name)).tolist()
            rows, first = [rows[i] for i in order], {}
            rows.sort(key=lambda r: first.setdefault(passage_of(r) or id(r), len(first)))  # rows of a passage together
        held_out = min(len(rows) - 1, max(1, round(len(rows) * val_split)))
        while held_out < len(rows) - 1:  # the passage at the cut goes to validation as a whole
            inside, outside = passage_of(rows[-held_out]), passage_of(rows[-held_out - 1])
            if not inside or inside != outside:
                break
            held_out += 1
        train[name], val[name] = rows[:-held_out], rows[-held_out:]
    return train, val


def encode_row(row: dict, tokenizer, max_length: int) -> tuple[list[int], int, list[bool]] | None:
    """(token ids with the end token, where the answer starts, which tokens are scored). Too long: the passage is cut,
    of running text the end; None if question and answer alone do not fit. The answer is encoded apart, as the prompts
    of --validate are. Every token is scored, but of a row in `pieces` its answers alone."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    text, output, end = row["text"], row["output"], [tokenizer.eos_token_id]
    if "pieces" in row:
        parts = [(encode(piece) + end * (kind is True), kind is not False) for piece, kind in row["pieces"]]
        ids, scored = [i for part, _ in parts for i in part], [kind for part, kind in parts for _ in part]
        return (ids, scored.index(True), scored) if len(ids) <= max_length else None
    if not output or not text.endswith(" " + output):
        whole = (encode(text) + end)[:max_length]
        return whole, len(whole), [True] * len(whole)
    prompt, answer = text[: -len(output) - 1], encode(" " + output) + end
    question = encode(prompt)
    if len(question) + len(answer) > max_length:
        passage = passage_of(row)
        kept = encode(prompt[len(passage) :])
        room = max_length - len(kept) - len(answer)
        if not passage or room < 0:
            return None
        question = encode(passage)[:room] + kept
    return question + answer, len(question), [True] * len(question + answer)


class Rows(NamedTuple):
    """Encoded rows, all data sets in one list."""

    ids: list[list[int]]
    answers: list[int]  # where each answer starts; its end for running text
    sets: list[str]
    scored: list[list[bool]]  # which tokens the loss counts; the first of a row never

    def targets(self, i: int) -> int:
        return sum(self.scored[i][1:])


def encoded_rows(name: str, rows: list[dict], tokenizer, max_length: int) -> Rows:
    """The rows that fit; one token predicts nothing."""
    encoded = [encode_row(row, tokenizer, max_length) for row in rows]
    fit = [parts for parts in encoded if parts and len(parts[0]) >= 2]
    require(fit, f"data set {name}: no row fits --max_length {max_length}")
    ids, answers, scored = map(list, zip(*fit))
    return Rows(ids, answers, [name] * len(fit), scored)


class Data(NamedTuple):
    train: Rows
    val: Rows
    tokenizer: object
    dropped: int  # rows whose question and answer are too long


def load_data(args: Args, say=print) -> Data:
    """Both sides of every set, encoded, and the tokenizer, which --tokenizer local trains on the training side."""
    split = split_datasets_train_val(load_datasets(args, say), args.val_split, args.data_seed)
    texts = [row["text"] for rows in split[0].values() for row in rows]
    tokenizer = core.load_tokenizer(args.tokenizer, texts, args.vocab_size or 4096)
    require(tokenizer.eos_token_id is not None, f"--tokenizer {args.tokenizer} has no end token; use byte or local")
    sides, dropped = [], 0
    for side in split:
        parts = [encoded_rows(name, rows, tokenizer, args.max_length) for name, rows in side.items()]
        sides.append(Rows(*(list(itertools.chain(*column)) for column in zip(*parts))))
        dropped += sum(map(len, side.values())) - len(sides[-1].ids)
    counts = ", ".join(f"{name}: {len(rows)} train, {len(split[1][name])} val" for name, rows in split[0].items())
    say(f"[Data] {counts}" + (f"; {dropped} rows too long" if dropped else ""))
    return Data(*sides, tokenizer, dropped)


def epoch_batches(rows: Rows, chosen, batch: int, seed: int, epoch: int, most: int = 0) -> list[list[int]]:
    """Row numbers of an epoch's micro-batches: a pure function of its arguments. Rows of `chosen` sets, shuffled, at
    `most` so many (0: all), then sorted by length within pools of 32 batches (little padding), the batches shuffled
    again."""
    g = core.generator(seed, "data", epoch)
    members = [i for i, name in enumerate(rows.sets) if name in chosen]
    members = [members[i] for i in torch.randperm(len(members), generator=g).tolist()[: most or None]]
    cut = []
    for start in range(0, len(members), 32 * batch):
        pool = sorted(members[start : start + 32 * batch], key=lambda i: len(rows.ids[i]))
        cut += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    return [cut[i] for i in torch.randperm(len(cut), generator=g).tolist()]


def collate(rows: Rows, members: list[int], device, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids on the device, labels, attention_mask on the CPU), each [B, T]; T a multiple of 8, at most `limit`."""
    sequences = [torch.tensor(rows.ids[i]) for i in members]
    lengths = torch.tensor([len(ids) for ids in sequences])
    T = min(limit, -(-int(lengths.max()) // 8) * 8)
    mask = (torch.arange(T) < lengths[:, None]).long()
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    ids = F.pad(ids, (0, T - ids.shape[1]))
    scored = nn.utils.rnn.pad_sequence([torch.tensor(rows.scored[i]) for i in members], batch_first=True)
    labels = ids.masked_fill(~F.pad(scored, (0, T - scored.shape[1])), -100)
    return ids.to(device, non_blocking=True), labels, mask


# ------------------------------------------------------------------------------------------------------- evaluate
PROMPTS = [  # (prompt, expected): the document's three, then two that do not end in a colon
    ("If a store has 15 apples and sells 7, how many are left? A:", "8"),
    ("What is 25 + 17? A:", "42"),
    ("The capital of France is Paris. Q: What is the capital of France? A:", "Paris"),
    ("What is 25 + 17? The answer is", "42"),
    ("The capital of France is Paris. The capital of France is", "Paris"),
]


class Scores(NamedTuple):
    """Of every scored token of some rows, row by row: N tokens, S states."""

    row: Tensor  # N: the number of its row
    ce: Tensor  # S N, float64
    right: Tensor  # N: whether the last state predicts it
    missed: Tensor  # N: whether it belongs to an answer and is not predicted
    q: Tensor  # S-1 N: of the states after the first


@torch.no_grad()
def token_scores(model: nn.Module, rows: Rows, args: Args) -> tuple[Scores, Tensor]:
    """Scores, and the sums over real tokens of (q variance, halting, gate mean, 1). Rows of a batch need little
    padding. Like every check below it leaves the model in evaluation mode."""
    model.eval()
    device = model.backbone.token_emb.weight.device
    by_length = sorted(range(len(rows.ids)), key=lambda i: len(rows.ids[i]))
    totals, parts = torch.zeros(4, dtype=torch.float64), []
    for start in range(0, len(by_length), args.batch_size):
        members = torch.tensor(by_length[start : start + args.batch_size])
        ids, labels, mask = collate(rows, members.tolist(), device, model.backbone.config.max_seq_len)
        out = model(ids, labels=labels, attention_mask=mask, return_logits=False)
        row, column = (labels[:, 1:] != -100).nonzero().T  # of every scored token, in the order of token_ce
        right = out["token_correct"][-1].cpu()  # N
        answers = torch.tensor([rows.answers[i] for i in members])
        missed = (column + 1 >= answers[row]) & ~right  # column t holds the token at t + 1
        q = torch.stack([state.cpu()[row, column] for state in out["q"]]) if out["q"] else torch.zeros(0, len(row))
        parts.append((members[row], out["token_ce"].double().cpu(), right, missed, q))
        real, n = out["real"], float(mask.sum())
        spread = [variance_within(state, real) for state in out["q"]] or [real.new_zeros(())]
        halting = mean_over(out["token_halting_steps"].to(real), real)
        gate = out.get("gate_mean", torch.ones((), device=device))
        figures = torch.stack([torch.stack(spread).mean(), halting, gate, torch.ones_like(gate)])
        totals += n * figures.double().cpu()
    joined = [torch.cat(part, -1) for part in zip(*parts)]
    order = joined[0].argsort(stable=True)
    return Scores(*(part[..., order] for part in joined)), totals


def halting_figures(scores: Scores, threshold: float) -> dict[str, dict]:
    """For the threshold of the run (`own`) and some others: the loss when each token takes the state at which it halts,
    beside as many stops dealt out at random, and beside a fixed state for all (between two states: on the line between
    their losses). `saved` is random minus halting, 95 % bootstrap over rows. Position t's q decides which state
    predicts t + 1."""
    last, means, figures = len(scores.q), scores.ce.mean(1), {}  # means: S
    for name, limit in {"own": threshold, "at_30": 0.3, "at_50": 0.5, "at_70": 0.7, "at_90": 0.9}.items():
        above = scores.q > limit
        above[-1] = True  # the last state ends it
        at = above.int().argmax(0) + 1  # N: the first state, from 1 on, whose q is above
        taken, states = scores.ce.gather(0, at[None])[0], float(at.double().mean()) + 1
        saved, fixed = (means[at] - taken).numpy(), float(np.interp(states, range(1, last + 2), means))
        figure = {"threshold": limit, "states": states, "loss": float(taken.mean())}
        figure |= {"loss_at_random": float(means[at].mean()), "loss_fixed": fixed}
        mean = np.bincount(scores.row, saved).sum() / len(saved)  # summed by row, like every loss here
        figures[name] = figure | {"saved": core.bootstrap(saved, 1000, clusters=scores.row) | {"mean": float(mean)}}
    return figures


def evaluate(model: nn.Module, data: Data, args: Args) -> dict:
    """Losses of the fixed validation set, per token: final state (`loss`), every state, every data set; token accuracy,
    answer accuracy (every token of `output` and the end right, given those before), and q."""
    val, every = data.val, range(len(data.val.ids))
    scores, totals = token_scores(model, val, args)
    spread, halting, gate = (totals[:3] / totals[3]).tolist()
    sums = torch.cat([scores.ce, scores.right[None], scores.missed[None]])  # S + 2, N
    by_row = torch.zeros(len(sums), len(every), dtype=torch.float64).index_add_(1, scores.row, sums)
    *losses, right, missed = by_row.tolist()  # each a list over the rows; losses: one such list for each state
    tokens = [val.targets(i) for i in every]

    def per_token(sums: list[float], rows) -> float:
        return sum(sums[i] for i in rows) / sum(tokens[i] for i in rows)

    sets = {}
    for name in dict.fromkeys(val.sets):
        rows = [i for i in every if val.sets[i] == name]
        asked = [i for i in rows if val.answers[i] < len(val.ids[i])]  # not running text
        answers = core.wilson(sum(missed[i] == 0 for i in asked), len(asked)) if asked else None
        sets[name] = {"loss": per_token(losses[-1], rows), "rows": len(rows), "answers": answers}
        sets[name]["token_accuracy"] = per_token(right, rows)
    loss = float(np.sum(losses[-1]) / sum(tokens))
    interval = core.bootstrap(scores.ce[-1], 1000, clusters=scores.row) | {"mean": loss}  # over rows
    figures = {"loss": loss, "loss_interval": interval, "ppl": core.perplexity(loss)}
    figures |= {"token_accuracy": per_token(right, every), "act_q_variance": None if args.no_act else spread}
    figures |= {"avg_halting_steps": halting, "gate_mean": None if args.no_memory else gate, "datasets": sets}
    figures["loss_per_state"] = [per_token(sums, every) for sums in losses]
    if args.no_act:
        return figures | {"halting": None}
    return figures | {"halting": halting_figures(scores, model.config.act_config.halt_threshold)}


def ngram_floors(train: Rows, ids: list[list[int]], scored: list[list[bool]], vocab: int) -> dict[str, float]:
    """`core.ngram_floors` for rows of any length, over their scored tokens. A table looks back two tokens at most, so a
    row is its first pair and its triples, less what the pair within each triple adds."""
    counted = np.concatenate(train.ids)[None]  # rows end with the end token, which no scored token follows
    pairs = [row[:2] for row, mask in zip(ids, scored) if mask[1]]
    triples = [row[t - 2 : t + 1] for row, mask in zip(ids, scored) for t in range(2, len(row)) if mask[t]]
    total, count = Counter(), len(pairs) + len(triples)
    for cut, weight in ((pairs, 1), (triples, 2), ([triple[:2] for triple in triples], -1)):
        if cut:
            for name, mean in core.ngram_floors(counted, np.array(cut), vocab).items():
                total[name] += weight * len(cut) * mean / count
    return dict(total)


@torch.no_grad()
def binding_probes(model: nn.Module, data: Data, args: Args) -> dict | None:
    """What the answers of a model trained on `bind_N` rest on, over contexts that no row is made of; intervals are over
    contexts. Every fact of a context is asked for. `swapped_facts`: the cities are dealt out anew, and whether the city
    that was right before is still given; `swapped_question`: whether one question's answer is given to the next one."""
    most = max((int(n.removeprefix("bind_")) for n in args.datasets if n in BINDING and n[5:].isdigit()), default=0)
    if not most:
        return None
    asked = {}  # probe: a row for each question, context by context

    def ask(probe: str, facts: dict[str, str], answers: dict[str, str]) -> None:
        rows = [binding_row(probe, facts | {country: city}, [country], facts) for country, city in answers.items()]
        asked.setdefault(probe, []).extend(rows)

    for count, novel in itertools.product(sorted({2, most, most + 2}), (False, True)):
        rng = random.Random(core.derived_seed(0, "probes", count, novel))
        name = f"facts_{count}" + "_untrained" * (count > most) + "_novel_names" * novel
        for _ in range(args.probes):
            facts, absent = draw_facts(rng, count, novel)
            cities = list(facts.values())
            after = dict(zip(facts, cities[1:] + cities[:1]))
            ask(name, facts, facts)
            ask(f"{name}_absent", facts, {absent: UNKNOWN})
            if count == most and not novel:
                ask("swapped_facts", after, after)
                ask("swapped_facts_old_answer", after, facts)
                ask("swapped_question_old_answer", facts, after)
                ask("first_city_whatever_is_asked", facts, dict.fromkeys(facts, cities[0]))
                ask("last_city_whatever_is_asked", facts, dict.fromkeys(facts, cities[-1]))
    figures = {"without_the_question": 1 / most}  # every fact is asked for: any rule that does not read it gives this
    for name, rows in asked.items():
        encoded = encoded_rows(name, rows, data.tokenizer, model.backbone.config.max_seq_len)
        scores = token_scores(model, encoded, args)[0]
        missed = np.bincount(scores.row, scores.missed)  # of each question: 0 as a greedy continuation of it would read
        figures[name] = core.bootstrap((missed == 0).reshape(args.probes, -1).mean(1))
    return figures


@torch.no_grad()
def canary(model: TRMTitansMAGModel, args: Args, epoch: int) -> float:
    """Loss on one batch of uniformly random tokens. A causal model cannot be below ln V but by chance."""
    model.eval()
    V, device = model.config.titans_config.vocab_size, model.backbone.token_emb.weight.device
    ids = torch.randint(V, (16, min(args.max_length, 128)), generator=core.generator(0, "canary", epoch))
    loss = float(model(ids.to(device), labels=ids, return_logits=False)["loss_final"])
    leak = f"future leak: loss {loss:.3f} on random tokens, ln V = {math.log(V):.3f}"
    require(not loss < math.log(V) - 0.1, leak, core.CHECK_FAILED)
    return loss


def continuation_stats(ids: list[int], text: str, last_prompt_token: int) -> dict:
    """Figures of one greedy continuation, and the rules against collapse that it breaks (`signs`)."""
    longest = max((len(list(run)) for _, run in itertools.groupby(ids)), default=0)
    top_share = max(map(ids.count, ids), default=0) / max(1, len(ids))
    bad = sum(c == "\ufffd" or (unicodedata.category(c) == "Cc" and c not in "\n\t") for c in text)
    stats = {"distinct_ratio": core.distinct_n(ids, 1), "top_share": top_share, "max_run": longest}
    stats |= {"colon_only": bool(text.strip()) and not text.replace(":", "").strip()}
    stats |= {"copy_last": ids[:1] == [last_prompt_token], "garbage_share": bad / max(1, len(text))}
    signs = {"colon_only": stats["colon_only"], "garbage_share": stats["garbage_share"] > 0.2}
    if len(ids) >= 8:  # fewer are too few to tell
        signs |= {
            "distinct_ratio": stats["distinct_ratio"] < 0.2,
            "top_share": top_share > 0.5,
            "max_run": longest >= 5,
        }
    return stats | {"signs": [name for name, broken in signs.items() if broken]}


def answer_prompt(model, tokenizer, prompt: str, expected: str | None, new_tokens: int, adaptive: bool) -> dict:
    """One greedy continuation with its statistics. `near`: its beginning, in which an answer may stand."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    require(ids, "a prompt is empty: every line of --prompts must hold one")
    longest = model.backbone.config.max_seq_len - 1
    require(len(ids) <= longest, f"a prompt has {len(ids)} tokens, the model at most {longest}: shorten it")
    written, first_logits = model.generate(ids, new_tokens, tokenizer.eos_token_id, adaptive)
    kept = [i for i in written if i != tokenizer.eos_token_id]
    text = tokenizer.decode(kept)
    top = first_logits.topk(min(5, len(first_logits)))
    needed = len(tokenizer(f" {expected}", add_special_tokens=False)["input_ids"]) if expected else 0
    row = {"prompt": prompt, "first_token": tokenizer.decode(written[:1]), "text": text, "expected": expected}
    row["hit"] = bool(re.match(rf"\s*{re.escape(expected)}(?!\w|[.,]\d)", text)) if expected else None
    row |= continuation_stats(kept, text, ids[-1])
    row |= {"ids": kept, "near": tokenizer.decode(kept[: max(3, needed)])}
    return row | {"top5": [[tokenizer.decode([i]), v] for v, i in zip(top.values.tolist(), top.indices.tolist())]}


def check_outputs(model, tokenizer, prompts=PROMPTS, new_tokens: int = 20, adaptive: bool = False) -> dict:
    """Greedy continuations of the prompts, their statistics, and the verdict with its reasons."""
    model.eval()
    rows = [answer_prompt(model, tokenizer, *prompt, new_tokens, adaptive) for prompt in prompts]
    reasons = list(dict.fromkeys(sign for row in rows for sign in row["signs"]))
    if all(row["copy_last"] for row in rows):
        reasons.append("copy_last")
    if len(rows) > 1 and all(row["ids"] == rows[0]["ids"] for row in rows):
        reasons.append("same_continuation")
    return {"prompts": rows, "verdict": "collapsed" if reasons else "ok", "reasons": reasons}


@torch.no_grad()
def continuations(model: nn.Module, data: Data, new_tokens: int = 20, prompts: int = 16) -> dict:
    """Greedy continuations of the beginnings of held-out rows: the share that collapses, and their nats per token under
    a table of the training tokens' triples, beside those of the same tokens shuffled. A repetition may have few nats,
    so the two are read together."""
    model.eval()
    val, device = data.val, model.backbone.token_emb.weight.device
    chosen = [val.ids[len(val.ids) * k // prompts] for k in range(prompts)]
    length = max(2, min(map(len, chosen)) // 2)  # of every prompt, so that they are one batch
    rows = torch.tensor([ids[:length] for ids in chosen], device=device)
    for _ in range(min(new_tokens, model.backbone.config.max_seq_len - length)):
        rows = torch.cat([rows, model(rows, return_logits="last")["logits"].argmax(-1)], 1)
    rows, rng, vocab = rows.tolist(), random.Random(0), model.config.titans_config.vocab_size
    stats = [continuation_stats(row[length:], data.tokenizer.decode(row[length:]), row[length - 1]) for row in rows]
    shuffled = [row[:length] + rng.sample(row[length:], len(row) - length) for row in rows]
    masks = [[False] * length + [True] * (len(row) - length) for row in rows]
    nats = {"nats": rows, "nats_shuffled": shuffled}
    nats = {name: ngram_floors(data.train, texts, masks, vocab)["trigram"] for name, texts in nats.items()}
    collapsed = core.wilson(sum(bool(row["signs"] or row["copy_last"]) for row in stats), prompts)
    return {"collapsed": collapsed, "distinct_ratio": statistics.fmean(row["distinct_ratio"] for row in stats)} | nats


def load_saved(path: str) -> tuple[TRMTitansMAGModel, object, dict]:
    """(model, tokenizer, checkpoint) of a file written by this script."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = core.load_checkpoint(Path(path), sealed=False)
    missing = {"model_state_dict", "config", "tokenizer"} - set(state) if isinstance(state, dict) else {"all"}
    require(not missing, f"{path}: not a checkpoint of this script; use best_model.pt, last.pt or epoch_N.pt")
    try:
        model = TRMTitansMAGModel(Phase1Config.from_dict(state["config"]))
        model.load_state_dict(state["model_state_dict"])
        saved = Tokenizer.from_str(state["tokenizer"]["json"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=saved, eos_token=state["tokenizer"]["eos"])
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        line = f"{path}: {str(error).splitlines()[0]}; its weights and configuration disagree"
        raise core.Failure(line) from error
    return model.eval(), tokenizer, state


def validate_checkpoint(args: Args) -> dict:
    """The document's step 8: print what the checkpoint answers, write it as JSON, exit 1 if it has collapsed."""
    device = core.engine(args).device
    model, tokenizer, state = load_saved(args.validate)
    lines = [line for line in core.read_text(args.prompts).splitlines() if line.strip()] if args.prompts else []
    require(lines or not args.prompts, f"--prompts {args.prompts}: no prompt in it")
    prompts = [(*line.split("\t"), None)[:2] for line in lines] or PROMPTS
    outputs = check_outputs(model.to(device), tokenizer, prompts, args.max_new_tokens, args.adaptive)
    for row in outputs["prompts"]:
        print(f"Q: {row['prompt']}\n→ {row['first_token']}")
        flags = " ".join(name for name in ("hit", "colon_only", "copy_last") if row[name])
        shares = f"distinct={row['distinct_ratio']:.2f} top={row['top_share']:.2f} garbage={row['garbage_share']:.2f}"
        print(f"   {row['text']!r} {shares} run={row['max_run']} {flags}")
        print("   " + "  ".join(f"{token!r} {logit:.2f}" for token, logit in row["top5"]))
    result = {"checkpoint": args.validate} | {name: state.get(name) for name in ("specialization", "epoch")}
    ours = ("ids", "near", "signs")
    result["prompts"] = [{k: v for k, v in row.items() if k not in ours} for row in outputs["prompts"]]
    result |= {name: outputs[name] for name in ("verdict", "reasons")}
    path, reasons = Path(args.report or Path(args.validate).parent / "validation.json"), ", ".join(outputs["reasons"])
    core.write_json(path, result)
    print(f"verdict: {result['verdict']} {reasons}\nreport: {path}")
    require(not reasons, f"the outputs have collapsed ({reasons}); see {path}", core.CHECK_FAILED)
    return result


# -------------------------------------------------------------------------------------------- the document's checks
def handoff_ready(root: Path) -> tuple[bool | None, str]:
    """Whether the three best_model.pt agree in names and shapes; None while one is missing."""
    shapes = []
    for name in SPECIALISATIONS:
        path = root / name / "best_model.pt"
        if not path.exists():
            return None, f"{path} is not there yet"
        try:
            shapes.append({k: v.shape for k, v in core.load_checkpoint(path)["model_state_dict"].items()})
        except (core.Failure, KeyError) as failure:
            return False, str(failure)
    return shapes[0] == shapes[1] == shapes[2], "names and shapes of the three best_model.pt"


OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}
OPERATORS["contains"] = operator.contains


def item(id: str, group: str, value, op: str, threshold, note: str = "") -> dict:
    """A line of report.json. pass: None without a value, where the item does not apply."""
    passed = None if value is None else OPERATORS[op](value, threshold)
    return {"id": id, "group": group, "value": value, "op": op, "threshold": threshold, "pass": passed, "note": note}


def machine_report(history, outputs, directory: Path, stopped, audit: float, warm_norm, V: int, runs: dict) -> list:
    """The document's acceptance list, each item computed. `stopped`: the epoch of an early stop; `runs`: whether the
    saved best model is that of its epoch ("loads"), and on which devices it gives finite logits."""
    val = [row["val_loss"] for row in history if row["val_loss"] is not None]
    train, prompts = [row["train_loss"] for row in history], outputs["prompts"]
    changes = item("val_loss_changes", "loss", len(set(val)), ">=", 2)
    changes["pass"] = changes["pass"] and any(abs(v - 2.5) > 1e-6 for v in val) if len(val) >= 2 else None
    smooth = item("no_divergence_epoch7", "loss", None, "<=", "min of epochs 1-6 + 0.05")
    if len(val) >= 7:
        smooth |= {"value": val[6], "pass": val[6] <= min(val[:6]) + 0.05 and train[6] <= 1.05 * train[5]}
    late = item("early_stop_late", "loss", stopped, ">=", 8)
    late["pass"] = (stopped is None or stopped >= 8) if val else None
    suspect = "if it is met on natural text from scratch, suspect a leak first"
    spread, path = history[-1]["act_q_variance"], directory / "best_model.pt"
    outside = "" if spread is None or 0.05 <= spread <= 0.15 else "outside 0.05-0.15"
    variety = statistics.median(row["distinct_ratio"] for row in prompts)
    answered = sum(any(c.isalnum() for c in row["text"].split("Q:")[0]) for row in prompts)
    where = "first 3 tokens, or as many as the word needs"
    (ready, why), lowest = handoff_ready(directory.parent), min(row["canary"] for row in history)
    random_tokens = "loss on random tokens against ln V - 0.1"
    return [
        changes,
        item("val_loss_final", "loss", min(val, default=None), "<", 1.0, suspect),
        smooth,
        late,
        item("grad_norm_max", "optimizer", warm_norm, "<", 10.0, "largest norm before clipping, after warm-up"),
        item("act_variance", "ACT", spread, ">", 0.05, outside),
        item("coherent", "outputs", outputs["reasons"], "==", []),
        item("token_variety", "outputs", variety, ">=", 0.5),
        item("qa_format", "outputs", answered / len(prompts), ">=", 2 / 3),
        item("context_recall", "outputs", prompts[2]["near"], "contains", "Paris", where),
        item("checkpoint_saved", "files", path.stat().st_size, ">", 0),
        item("checkpoint_loads", "files", runs["loads"], "==", True),
        item("inference_cpu", "files", runs["cpu"], "==", True),
        item("inference_cuda", "files", runs.get("cuda"), "==", True),
        item("handoff_ready", "files", ready, "==", True, why),
        item("causal", "controls", audit, "<=", 1e-5, "largest change of a logit by a later token"),
        item("canary", "controls", lowest, ">=", math.log(V) - 0.1, random_tokens),
    ]


# ---------------------------------------------------------------------------------------------------------- train
LOSSES = ("loss", "loss_ce", "loss_act", "loss_gate", "loss_final")
CAVEAT = """A falling loss does not show that recursion, halting or the memory help: only the ablations do.
The memory has no keys and values and so stores no associations: docs/cognate.md."""  # on the saved model's card


@dataclasses.dataclass
class EarlyStop:
    """Improved: lower than the best by more than `delta`. `update` tells so; `stop` after `patience` failures."""

    patience: int
    delta: float
    best: float = math.inf
    epoch: int = 0
    counter: int = 0

    def update(self, loss: float, epoch: int) -> bool:
        better = loss < self.best - self.delta
        self.best, self.epoch, self.counter = (loss, epoch, 0) if better else (self.best, self.epoch, self.counter + 1)
        return better

    @property
    def stop(self) -> bool:
        return bool(self.patience) and self.counter >= self.patience


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds beside the loop's own entries: last.pt and epoch_N.pt have every field by its name."""

    history: list[dict] = dataclasses.field(default_factory=list)  # a row for each finished epoch
    norms: list[float] = dataclasses.field(default_factory=list)  # gradient norms of all updates, from the first on
    curve: list[list[float]] = dataclasses.field(default_factory=list)  # [update, tokens, seconds, validation loss]
    untrained: dict | None = None  # {loss, continuations}
    stage: int = 0  # of --staged: the number of its data set; as many as there are when the last is learned


def epoch_updates(args: Args, rows: Rows, epoch: int, world: int, stage: int = 0) -> list[list[list[int]]]:
    """The updates of an epoch. Each is a list of micro-batches, each of the rows of all processes. The last one may
    have fewer: it is an update of its own, so no gradient leaks into the next epoch."""
    sets = sets_of(args, epoch, dict.fromkeys(rows.sets), stage)[1]
    cut = epoch_batches(rows, set(sets), args.batch_size * world, args.seed, epoch, args.epoch_rows)
    return [cut[i : i + args.grad_accum] for i in range(0, len(cut), args.grad_accum)]


def epoch_sizes(args: Args, rows: Rows, world: int, say) -> tuple[list[int], int]:
    """The updates of each epoch, and how many of them are warm-up: what the rates depend on."""
    epochs = range(1, args.epochs + 1)
    sizes = [len(epoch_updates(args, rows, epoch, world)) for epoch in epochs]
    warm = sum(sizes[: args.warmup_epochs]) if args.epochs > args.warmup_epochs else max(1, sum(sizes) // 10)
    counts = Counter(rows.sets)
    equal = not args.staged or len(set(counts.values())) == 1
    require(equal, f"--staged needs sets of equal size: {dict(counts)}; raise --max_length or lower --synth_rows")
    if not args.no_curriculum and not args.staged:
        stages = dict(sets_of(args, epoch, dict.fromkeys(rows.sets)) for epoch in epochs)
        say("[Curriculum] " + ", ".join(f"{stage}: {' '.join(sets)}" for stage, sets in stages.items()))
    size = f"{args.batch_size} x {args.grad_accum} x {world} = {args.batch_size * args.grad_accum * world} rows"
    say(f"[Train] {args.epochs} epochs, {sum(sizes)} updates of {size}, {warm} of them warm-up")
    return sizes, warm


def print_table(table: dict, say=print) -> None:
    say("[Model] parameters")
    for name, count in table.items():
        say(f"  {name:24s} {count:>12,d} {100 * count / table['total']:6.2f} %")


def audited_model(args: Args, entries: int, device, say) -> tuple[TRMTitansMAGModel, float]:
    """The model for a tokenizer of `entries`, and the largest change of a logit by a later token."""
    model = build_model(args, entries).to(device)
    V = model.config.titans_config.vocab_size
    remedy = f"give --vocab_size {entries} or another --tokenizer"
    require(entries <= V, f"the tokenizer has {entries} entries, the model {V}: {remedy}")
    print_table(model.parameter_table(), say)
    audit = core.causality_audit(model, V, args.max_length)
    say(f"[Audit] largest change of a logit by a later token: {audit:.1e}")
    require(audit <= 1e-5, f"the model reads the future ({audit:.1e}): not trained", core.CHECK_FAILED)
    return model, audit


def find_checkpoint(args: Args, run: core.Run, total: int) -> tuple[dict | None, Path | None]:
    """What --resume goes on from (the file named, or the newest that verifies), and the best model so far beside it."""
    saved = run.checkpoint("last.pt", "epoch_*.pt", total=total)
    if not saved or not any(row["is_best"] for row in saved["history"]):
        return saved, None
    best = (run.dir / "last.pt" if args.resume == "auto" else Path(args.resume)).with_name("best_model.pt")
    require(best.exists(), f"{args.resume}: the best model so far is missing; put it there as {best}")
    return saved, best


def place_best_model(run: core.Run, best: Path | None) -> None:
    """Take the best model so far along from where it lies; keep that of an earlier run under another name."""
    here = run.dir / "best_model.pt"
    if not run.main or (best and best.resolve() == here.resolve()):
        return
    if here.exists():
        run.say("WARNING: best_model.pt of an earlier run is now best_model.prev.pt")
        os.replace(here, run.dir / "best_model.prev.pt")
    if best:
        core.write_atomic(here, best.read_bytes())


def micro_batch(rows: Rows, members: list[int], accelerator, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """This process's share of the rows `members`. With fewer rows than processes: one of them, scored nowhere."""
    mine = members[accelerator.process_index :: accelerator.num_processes]
    ids, labels, mask = collate(rows, mine or members[:1], accelerator.device, limit)
    return ids, labels if mine else torch.full_like(labels, -100), mask


def count_targets(rows: Rows, updates: list[list[list[int]]]) -> int:
    """Tokens that are predicted in `updates`: all that are scored, but never the first of a row."""
    return sum(rows.targets(i) for update in updates for members in update for i in members)


def exported(model: nn.Module, data: Data, args: Args, step: int, history: list[dict], early: EarlyStop) -> dict:
    """The documented entries of every checkpoint; best_model.pt has no others."""
    tokenizer = {"name": args.tokenizer, "json": data.tokenizer.backend_tokenizer.to_str()}
    state = {"model_state_dict": core.full_state(model), "epoch": len(history), "global_step": step, "history": history}
    state |= {"best_val_loss": early.best, "val_loss": history[-1]["val_loss"] if history else None}
    tokenizer |= {"eos": data.tokenizer.eos_token}
    return state | {"specialization": args.model, "config": model.config.to_dict(), "tokenizer": tokenizer}


def history_row(epoch: int, stage: str, train_loss: float, validation: dict, optimizer, norms: list[float]) -> dict:
    """An epoch in the history, as far as its training and its validation (empty without) tell."""
    row = {"epoch": epoch, "stage": stage, "train_loss": train_loss}
    row |= {"val_loss": validation.get("loss"), "val_ppl": validation.get("ppl")}
    row |= {"lr": optimizer.param_groups[0]["lr"], "muon_lr": optimizer.muon_lr()}
    row |= {"grad_norm_mean": statistics.fmean(norms) if norms else None, "grad_norm_max": max(norms, default=None)}
    return row | {name: validation.get(name) for name in ("act_q_variance", "avg_halting_steps", "gate_mean")}


def measured(row: dict) -> dict:
    """The row without what was not measured: every logged value is measured or absent."""
    return {name: value for name, value in row.items() if value is not None}


def step_row(model, out: dict, norm: float, optimizer: MuGrokfast, args: Args, loop: core.Loop) -> dict:
    """One logged step: losses are means since the last one, the rest is of the last micro-batch."""
    means = loop.means()
    row = {"train/step": loop.step} | {f"train/{name}": means[name] for name in LOSSES[:-1]}
    row |= {"train/perplexity": core.perplexity(means["loss_final"]), "train/gradient_norm": norm}
    row |= {"train/learning_rate": optimizer.param_groups[0]["lr"], "train/skipped_updates": loop.nonfinite_steps()}
    row |= {"optimizer/muon_lr": optimizer.muon_lr(), "optimizer/grokfast_lambda": optimizer.lam}
    row |= {"system/tokens_per_second": loop.rate()}
    if not args.no_act:
        halting, real, head = out["halting_steps"].float(), out["real"], model.act_head
        q = [state.detach() for state in out["q"]]  # of each state, B T
        row |= {"act/avg_halting_steps": float(halting.mean()), "act/max_halting_steps": float(halting.max())}
        row |= {"act/min_halting_steps": float(halting.min()), "act/halting_variance": float(halting.var(correction=0))}
        row["act/q_mean"] = float(torch.stack([mean_over(state, real) for state in q]).mean())
        row["act/q_variance"] = float(torch.stack([variance_within(state, real) for state in q]).mean())
        for t in range(1, len(q) + 1):
            seen = 1 - head.config.ema_decay ** float(head.step_count[t])
            row[f"act/ema_acc_step{t}"] = float(head.ema_step_acc[t]) / seen
    if not args.no_memory:
        gate = float(out["gate_mean"])
        row |= {"gate/mean_g": gate, "gate/entropy": float(out["gate_entropy"]), "ltm/memory_usage": 1 - gate}
        if args.ltm_carry == "train":
            row["ltm/state_rms"] = float(model.backbone.ltm.memory_state.square().mean().sqrt())
    if out["real"].is_cuda:
        used, cached = torch.cuda.memory_allocated() / 1e9, torch.cuda.memory_reserved() / 1e9
        row |= {"system/gpu_memory_used_gb": used, "system/gpu_memory_cached_gb": cached}
    return measured(row)


def log_epoch(run: core.Run, past: dict, validation: dict, outputs: dict, step: int) -> None:
    """Log an epoch (its row `past` of the history, its validation and outputs) and say it in the document's form."""
    variety = statistics.median(prompt["distinct_ratio"] for prompt in outputs["prompts"])
    row = {"train/epoch": past["epoch"], "train/step": step, "epoch/train_loss": past["train_loss"]}
    row |= {"canary/random_ce": past["canary"]}
    row |= {"gen/distinct_ratio": variety, "gen/collapsed": bool(outputs["reasons"])}
    row |= {"curriculum/stage": past["stage"], "time/epoch_duration_minutes": past["seconds"] / 60}
    row |= {"val/loss": past["val_loss"], "val/perplexity": past["val_ppl"]}
    row |= {f"val/{name}": validation.get(name) for name in ("act_q_variance", "token_accuracy")}
    row |= {f"val/loss_step{t}": loss for t, loss in enumerate(validation.get("loss_per_state", []))}
    for name, part in validation.get("datasets", {}).items():
        row |= {f"val/{name}_loss": part["loss"], f"val/{name}_accuracy": part["answers"] and part["answers"]["mean"]}
    run.log(kind="epoch", **measured(row))

    def shown(name: str, form: str = ".4f", absent: str = "off") -> str:
        return absent if past[name] is None else format(past[name], form)

    head, losses = f"Epoch {past['epoch']}:", f"train={past['train_loss']:.4f}, val={shown('val_loss')}"
    rates = f"lr={past['lr']:.1e} muon_lr={shown('muon_lr', '.1e')} gnorm_max={shown('grad_norm_max', '.2f', 'nan')}"
    last = f"act_var={shown('act_q_variance')} stage={past['stage']}" + " *best" * past["is_best"]
    run.say(f"{head:10s}{losses} | {rates} {last}")


def write_history(run: core.Run, history: list[dict]) -> None:
    """history.csv, and metrics.jsonl: the rows of log.jsonl under their documented name."""
    names = [name for name in history[0] if name != "canary"]
    lines = [names] + [["" if row[name] is None else str(row[name]) for name in names] for row in history]
    if run.main:
        core.write_atomic(run.dir / "history.csv", "".join(",".join(line) + "\n" for line in lines).encode())
        core.write_atomic(run.dir / "metrics.jsonl", (run.dir / "log.jsonl").read_bytes())


def show_report(items: list[dict], say) -> None:
    for row in items:
        verdict = "n/a" if row["pass"] is None else "pass" if row["pass"] else "FAIL"
        say(f"  {row['id']:22s} {verdict}  {row['value']!s:.60s} {row['op']} {row['threshold']!s:.40s}")


def gradient_norms(norms: list[float]) -> dict | None:
    """Quantiles over the updates after warm-up, before clipping, and the share above the document's limit of 10."""
    kept = [norm for norm in norms if math.isfinite(norm)]
    if not kept:
        return None
    quantiles = dict(zip(("q50", "q90", "q99", "max"), map(float, np.quantile(kept, (0.5, 0.9, 0.99, 1)))))
    return quantiles | {"n": len(kept), "above_10": core.wilson(sum(norm > 10 for norm in kept), len(kept))}


@torch.no_grad()
def truncated(model: nn.Module, data: Data, args: Args) -> dict[str, dict[str, float]]:
    """Loss of each state (`y0`, ...) by the refinements in each step: as many as it was trained with, and fewer."""
    config, figures = model.config.trm_config, {}
    for count in range(1, config.micro_steps + 1):
        model.trm.config = dataclasses.replace(config, micro_steps=count)
        means = token_scores(model, data.val, args)[0].ce.mean(1).tolist()
        figures[f"micro{count}"] = {f"y{t}": loss for t, loss in enumerate(means)}
    model.trm.config = config
    return figures


def reached(curve: list[list[float]], floors: dict[str, float]) -> dict[str, dict | None]:
    """The first point of the curve that is below each floor; None where none is."""
    first = {name: next((point for point in curve if point[3] < floor), None) for name, floor in floors.items()}
    return {name: point and dict(zip(("step", "tokens", "seconds"), point)) for name, point in first.items()}


@torch.no_grad()
def operations(model: nn.Module, length: int) -> dict[str, float]:
    """Forward operations per token, counted on one row: of the logits of the last state alone, as in answering, and of
    the losses of every state, as in training (whose backward pass takes twice as many again)."""
    from torch.utils.flop_counter import FlopCounterMode

    device, counts = model.backbone.token_emb.weight.device, {}
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    for name, given in (("answering", {}), ("training", {"labels": ids, "return_logits": False})):
        with FlopCounterMode(display=False) as counter:
            model.eval()(ids, **given)
        counts[name] = counter.get_total_flops() / length
    return counts


def finish(args: Args, data: Data, run: core.Run, accelerator, loop, progress: Progress, early, audit, warm) -> dict:
    """Load the best model as the document's snippet does, measure it again, and write report.json and the result."""
    figures, path, history = loop.end(), run.dir / "best_model.pt", progress.history
    stopped = len(history) if early.stop and len(history) < args.epochs else None
    if stopped:
        run.say(f"Early stopping triggered (patience={args.early_stop_patience})")
    if not args.no_validate:
        run.say(f"Best val loss: {early.best:.4f} at epoch {early.epoch}")
    accelerator.wait_for_everyone()  # the main process may still be writing the file
    model, _, saved = load_saved(str(path))
    best = max(row["epoch"] for row in history if row["is_best"])
    stale = f"{path} is of epoch {saved['epoch']}, the best one was {best}: train again with --overwrite"
    require(saved["epoch"] == best, stale)
    runs = {"loads": saved["val_loss"] == history[best - 1]["val_loss"]}
    prompt = torch.tensor([data.tokenizer(PROMPTS[0][0])["input_ids"]])
    with torch.no_grad():
        for device in (torch.device("cpu"), accelerator.device):
            ids = prompt.to(device)
            runs[device.type] = bool(model.to(device)(ids)["logits"].isfinite().all())
        every = timeit.repeat(lambda: model(ids)["logits"].sum().item(), number=1, repeat=5)
        halting = timeit.repeat(lambda: model(ids, halt="last")["logits"].sum().item(), number=1, repeat=5)
        ms, halting_ms = 1000 * statistics.median(every), 1000 * statistics.median(halting)
    with accelerator.autocast():  # the precision in which it was chosen
        final, outputs = evaluate(model, data, args), check_outputs(model, data.tokenizer)
        final |= {"truncated": truncated(model, data, args), "binding": binding_probes(model, data, args)}
        written = continuations(model, data)
    if saved["val_loss"] is not None and not math.isclose(final["loss"], saved["val_loss"], rel_tol=1e-4):
        run.say(f"WARNING: best_model.pt gives {final['loss']:.6f}, {saved['val_loss']:.6f} when it was saved")
    table, V, prompts = model.parameter_table(), model.config.titans_config.vocab_size, outputs["prompts"]
    audit = max(audit, core.causality_audit(model, V, args.max_length))  # on the trained weights as well
    train_loss, megabytes = history[best - 1]["train_loss"], path.stat().st_size / 1e6
    norms = gradient_norms(progress.norms[warm:])
    items = machine_report(history, outputs, run.dir, stopped, audit, norms and norms["max"], V, runs)
    row = {"final/total_params": table["total"], "final/training_time_hours": figures["train_seconds"] / 3600}
    row |= {"final/train_loss": train_loss, "final/val_loss": final["loss"], "final/perplexity": final["ppl"]}
    row |= {"final/model_size_mb": megabytes, "diversity/avg_halting_steps": final["avg_halting_steps"]}
    row |= {"diversity/inference_time_ms": ms}
    row |= {"diversity/ltm_usage": None if final["gate_mean"] is None else 1 - final["gate_mean"]}
    run.log(kind="final", **measured(row))
    write_history(run, history)
    if run.main:
        core.write_json(run.dir / "report.json", items)
    show_report(items, run.say)
    sets = list(dict.fromkeys(data.train.sets))
    source = "local files" if args.data_dir else "generated" if set(sets) <= set(GENERATED) else "hub"
    counts = {"train_rows": len(data.train.ids), "val_rows": len(data.val.ids), "dropped_rows": data.dropped}
    entries = {"vocab_size": V, "tokenizer_entries": len(data.tokenizer)}
    result = figures | {"model": args.model, "final": final, "best_epoch": best, "train_loss": train_loss}
    before = progress.untrained or dict.fromkeys(("loss", "continuations"))
    result |= {"untrained_val_loss": before["loss"], "continuations_untrained": before["continuations"]}
    floors = ngram_floors(data.train, data.val.ids, data.val.scored, V)
    result |= {"continuations": written, "floors": floors, "reached": reached(progress.curve, floors)}
    result |= {"val_loss": [[row["epoch"], row["val_loss"]] for row in history if row["val_loss"] is not None]}
    result |= {"train_curve": [[row["epoch"], row["train_loss"]] for row in history], "curve": progress.curve}
    result |= {"canary": {"lowest": min(row["canary"] for row in history), "ln_v": math.log(V)}}
    result |= {"causality_max_abs_diff": audit, "outputs": {name: outputs[name] for name in ("verdict", "reasons")}}
    result |= {"samples": [{name: row[name] for name in ("prompt", "text", "expected", "hit")} for row in prompts]}
    result |= {"hits": core.wilson(sum(bool(row["hit"]) for row in prompts), len(prompts))}
    result |= {"document_recall": float(prompts[2]["hit"]), "early_stop_epoch": stopped, "parameters": table}
    result |= {"grad_norm_max_after_warmup": norms and norms["max"], "grad_norm": norms}
    result |= {"operations_per_token": operations(model, args.max_length), "model_size_mb": megabytes}
    result |= {"inference_ms": ms, "inference_ms_halting": halting_ms, "report": items, "history": history}
    result |= {"data": {"source": source, "sets": sets} | counts | entries, "config": vars(args)}
    result = run.finish(result)
    run.say(f"[Save] Results: {run.result}")
    figures = {"validation loss": final["loss"], "perplexity": final["ppl"], "untrained": before["loss"]}
    figures |= {"best epoch": best, "outputs": outputs["verdict"], "parameters": table["total"]}
    load = f"python train_phase1_cognate.py --validate {path}"
    core.model_card(run, result, f"Cognate phase 1: {args.model}", "none, trained from scratch", figures, load, CAVEAT)
    return result


def train(args: Args, data: Data, run: core.Run, accelerator) -> dict:
    """Train one specialisation, from its seed or its checkpoint; returns what the result file says of it."""
    names, world = list(dict.fromkeys(data.train.sets)), accelerator.num_processes
    sizes, warm = epoch_sizes(args, data.train, world, run.say)
    total = sum(sizes)
    saved, best_so_far = find_checkpoint(args, run, total)
    model, audit = audited_model(args, len(data.tokenizer), accelerator.device, run.say)
    tokenizer = core.tokenizer_digest(data.tokenizer)
    run.start((*FREE, LENGTH), data=core.digest(*data.train[:3], *data.val[:3]), tokenizer=tokenizer)
    place_best_model(run, best_so_far)
    progress, early = Progress(), EarlyStop(args.early_stop_patience, args.min_delta)
    if saved:
        model.load_state_dict(saved["model_state_dict"])
        progress = Progress(**{name: saved[name] for name in vars(progress)})
        early = EarlyStop(**saved["early_stop"])
    torch.manual_seed(core.derived_seed(args.seed, "dropout", accelerator.process_index))
    rates, grokfast = (args.learning_rate, args.muon_lr), (args.grokfast_alpha, args.grokfast_lambda)
    optimizer = MuGrokfast(model, *rates, *grokfast, args.weight_decay, args.optimizer == "mugrokfast")
    wrapped, optimizer = core.prepare(model, optimizer, accelerator)
    clip = args.gradient_clip or math.inf
    loop = core.Loop(run, wrapped, optimizer, total, label=args.model, saved=saved, max_norm=clip)
    epoch_loss = core.Sums(accelerator)
    if saved:
        epoch_loss.load(saved["epoch_loss"])

    def save(name: str) -> None:
        own = vars(progress) | {"early_stop": vars(early), "epoch_loss": epoch_loss.state()}
        loop.save(name, **(exported(model, data, args, loop.step, progress.history, early) | own))

    if progress.untrained is None and not args.no_validate:
        with loop.paused():
            untrained = evaluate(model, data, args)["loss"]
            run.say(f"[Eval] untrained: val={untrained:.4f}")
            run.log(kind="start", **{"val/loss": untrained, "train/step": 0})
            progress.untrained = {"loss": untrained, "continuations": continuations(model, data)}
    while len(progress.history) < args.epochs and not early.stop and progress.stage < len(names):
        epoch = len(progress.history) + 1
        stage, _ = sets_of(args, epoch, names, progress.stage)
        updates = epoch_updates(args, data.train, epoch, world, progress.stage)
        first = sum(sizes[: epoch - 1])
        model.train()  # evaluation leaves it in evaluation mode
        if loop.step == first:  # not where a resumed run takes up an epoch: its checkpoint holds the memory
            model.reset_memory()
        for update in updates[loop.step - first :]:
            for group in () if args.no_lr_scheduler else optimizer.param_groups:
                group["lr"] = rate(group["base_lr"], loop.step, warm, total, args.min_lr)
            tokens = count_targets(data.train, [update])
            for i in loop.micro_batches(len(update)):
                ids, labels, mask = micro_batch(data.train, update[i], accelerator, model.backbone.config.max_seq_len)
                out = wrapped(ids, labels=labels, attention_mask=mask, return_logits=False)
                n = out["n_tokens"]
                loop.backward(out["loss"] * (n * world / tokens))  # every token weighs the same; DDP takes the mean
                loop.add(weight=n, **{name: out[name] for name in LOSSES})
                epoch_loss.add(weight=n, loss_final=out["loss_final"])
            norm = float(loop.update(tokens=tokens))
            for name, buffer in model.named_buffers() if world > 1 else ():
                if name.endswith(("memory_state", "ema_step_acc")):  # the processes go on from their mean
                    buffer.copy_(accelerator.reduce(buffer, "mean"))
            progress.norms.append(norm)
            if loop.due(args.eval_every):
                with loop.paused():
                    loss = evaluate(model, data, args)["loss"]
                progress.curve.append([loop.step, loop.tokens, loop.seconds, loss])
                model.train()
            if loop.due(args.log_every):
                row = step_row(model, out, norm, optimizer, args, loop) | {"train/epoch": epoch}
                run.say(f"  Step {loop.step}, Batch {loop.step - first}: loss={row['train/loss']:.4f}")
                run.log(kind="step", **row)
            if loop.stopping and not loop.last:
                save("last.pt")
                loop.leave_if_stopped()

        with loop.paused():
            train_loss = epoch_loss.means()["loss_final"]
            core.check_finite(train_loss, f"the training loss of epoch {epoch}")
            validation = {} if args.no_validate else evaluate(model, data, args)
            core.check_finite(validation.get("loss", 0.0), f"the validation loss of epoch {epoch}")
            floor, outputs = canary(model, args, epoch), check_outputs(model, data.tokenizer)
            watched = validation["datasets"][names[-1]]["loss"] if args.staged else validation.get("loss")
            best = early.update(watched, epoch) if validation else True  # without, the last epoch counts
            seconds = loop.seconds - sum(row["seconds"] for row in progress.history)
            norms = [norm for norm in progress.norms[first:] if math.isfinite(norm)]  # else the update was skipped
            row = history_row(epoch, stage, train_loss, validation, optimizer, norms)
            row |= {"target_tokens": count_targets(data.train, updates), "seconds": seconds}
            row |= {"is_best": best, "epochs_without_improvement": early.counter, "canary": floor}
            progress.history.append(row)
            if args.staged:  # the last stage ends the training
                progress.stage += validation["datasets"][stage]["token_accuracy"] > PASSED[stage == names[-1]]
            if best and run.main:
                state = exported(model, data, args, loop.step, progress.history, early)
                core.save_checkpoint(run.dir / "best_model.pt", state)
            log_epoch(run, row, validation, outputs, loop.step)
            if epoch % args.save_every == 0:  # before last.pt, after which a run that is killed goes on
                save(f"epoch_{epoch}.pt")
            save("last.pt")
            write_history(run, progress.history)
    return finish(args, data, run, accelerator, loop, progress, early, audit, warm)


# ----------------------------------------------------------------------------------------------------------- main
def dry_run(args: Args, specialisations, accelerator) -> dict:
    """Configuration, parameter table, tokens and memory; reads no data, so every set has all rows allowed."""
    entries = {"byte": 259, "local": args.vocab_size or 4096}.get(args.tokenizer, 50257)
    rows = {name: args.max_samples or HUB[name].rows for name in HUB} | dict.fromkeys(GENERATED, args.synth_rows)
    sets = [sets_of(args, epoch, args.datasets)[1] for epoch in range(1, args.epochs + 1)]
    trained = sum(math.ceil((1 - args.val_split) * sum(rows[name] for name in chosen)) for chosen in sets)
    plans = {}
    for name in specialisations:
        with torch.device("meta"):
            model = build_model(args, entries, name)
        c, half = model.config.titans_config, accelerator.mixed_precision != "no"
        depth = c.d_model, (c.library_layers or c.n_layers) + args.t_max + 1  # a recursion step counts as a layer
        plan = {"config": model.config.to_dict(), "parameters": model.parameter_table()}
        plan |= {"effective_batch": args.batch_size * args.grad_accum * accelerator.num_processes}
        plan |= {"tokens_at_most": trained * args.max_length}
        plan |= {"memory_gb": core.memory_estimate(model, args.batch_size * args.max_length, *depth, half)}
        plans[name] = plan
        print_table(plan["parameters"])
    return core.show_plan(plans)


def main(argv=None) -> dict:
    args = parse(argv)
    if args.validate:
        return validate_checkpoint(args)
    if args.precision == "auto":  # bf16 on a GPU that has it; never fp16, which would need a loss scaler
        gpu = args.device != "cpu" and torch.cuda.is_available()
        args.precision = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    accelerator = core.engine(args, no_fsdp="Muon orthogonalises whole matrices")
    names = SPECIALISATIONS if args.all else (args.model,)
    if args.dry_run:
        return dry_run(args, names, accelerator)
    data, results, root = None, {}, Path(args.checkpoint_dir)
    for name in names:
        seed = Phase1Config().seeds[name] if args.seed is None else args.seed
        one, stopped_by = dataclasses.replace(args, model=name, all=False, seed=seed), 0
        tracker = {"project": args.wandb_project, "name": f"phase1-cognate-{name}"}
        tracker["tags"] = ["phase1", "cognate", name, "pretraining"]
        with core.Run(one, str(root / name), accelerator, "cognate_results.json", OUTPUTS, tracker) as run:
            if finished := run.finished(LENGTH, FREE):
                show_report(finished["report"], run.say)
                results[name] = finished
                continue
            data = data or load_data(args, accelerator.print)
            results[name] = train(one, data, run, accelerator)
            stopped_by = run.stop_requested()
        if stopped_by and name != names[-1]:
            raise core.Failure(f"interrupted after {name}; continue with --resume auto", 128 + stopped_by)
    ready, why = handoff_ready(root) if args.all else (None, "")
    for name, result in results.items():  # only when all three are there can a report say whether they agree
        row = next(row for row in result["report"] if row["id"] == "handoff_ready")
        if args.all and accelerator.is_main_process and row["value"] != ready:
            row |= {"value": ready, "pass": ready, "note": why}
            core.write_json(root / name / "report.json", result["report"])
            core.write_json(root / name / "cognate_results.json", result)
    return results if args.all else results[args.model]


if __name__ == "__main__":
    core.cli(main, "--batch_size, or use --gradient_checkpointing")
