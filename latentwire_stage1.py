"""LatentWire, stage 1: can a prompt reach a frozen language model as a narrower or shorter continuous code?

    z_t = (E[id_t] - mu) P            PCA of the prompt's own embeddings, d -> k           (width)
    s_1..s_M = pool(z_1..z_S)         attention, convolution or segments, M < S            (length, --mode pooling)
    x_t = match(adapter(z_t))         a trained MLP back to width d, rescaled to the norm the model knows
    answer = frozen LM([x | "Answer: "])

The task is SQuAD, the question whether any code beats plain text cut to as many positions. `lm_segment`, not in the
document, lets the frozen model itself (with LoRA) encode the prompt and averages its states over segments.

Smoke test   python latentwire_stage1.py --test                                   every mode, CPU, offline, 60 s
Document     python latentwire_stage1.py --mode phase1a --compress_dim 1024 --samples 10000 --epochs 3
Offline      python pretrain_backbone.py --kind reader
             python latentwire_stage1.py --mode pooling --pooling_mode lm_segment --model_id runs/backbone/reader \\
                 --dataset synthetic --compress_method none --pool_ratio 2 --samples 24000 --epochs 3 --batch_size 48
Sweeps       bash compression_suite.sh, scripts/run_phase1b_weight_sweep.sh and others: docs/latentwire.md;
             python claims.py status compression runs/compression_suite prints a sweep's table
Expect       width compression that answers nearly as text does; documented poolers at the level of a bag of words
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import re
import string
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from core import arg, require

MODES = ("phase1a", "phase1b", "pooling", "baselines", "embed_sweep", "eval")
BASELINES = ("text", "token_budget", "pca", "embed_raw", "embed_anchor", "snap", "segment_mean", "salience")
TRAINED = ("phase1a", "phase1b", "pooling")  # the modes that train
SCALES = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5)
BLOCK = 2**26  # similarities of tokens with table rows that are held at a time


@dataclasses.dataclass
class Args(core.RunArgs):
    mode: Literal["", *MODES] = arg("", "experiment; unset, with --test alone: all of them in turn")
    model_id: str = arg("meta-llama/Meta-Llama-3.1-8B-Instruct", "hub id, local directory, or tiny")
    samples: int | None = arg(None, "training examples; unset: 10000 (baselines evaluate 1000, embed_sweep 100)")
    epochs: int | None = arg(None, "passes over the training examples; unset: 3, pooling 1")
    batch_size: int | None = arg(None, "examples per update and process; unset: phase1a 64, otherwise 8")
    save_dir: str = arg("", "run directory; unset: the document's for the mode")
    run_name: str = arg("", "save in runs/RUN_NAME; unset: in --save_dir")
    diagnostic_log: str = arg("", "the document's log; unset: SAVE_DIR/diagnostics.jsonl")
    legacy: bool = arg(False, "repeat the published faults of this mode, to show what they do; never a result")
    seed: int = arg(42, "seed of initialisation, data order and generated training data", "run")

    compress_dim: int = arg(1024, "k, values per token on the wire", "compression")
    compress_method: Literal["pca", "random", "none"] = arg("pca", "none: k = d, identity", "compression")
    input_dim: int | None = arg(None, "a check of the model's width; unset: none", "compression")
    pca_samples: int = arg(5000, "training prompts that PCA is fitted on; -1: all", "compression")
    adapter_type: Literal["mlp", "linear"] = arg("mlp", "linear starts as the inverse of PCA", "compression")
    adapter_hidden_mult: int = arg(4, "hidden width over k", "compression")
    adapter_dropout: float = arg(0.1, "in the adapter", "compression")
    adapter_lr: float = arg(5e-4, "AdamW learning rate", "compression")
    colorize: bool = arg(True, "standardise the output, then a gain and offset per dimension", "compression")
    color_init: Literal["vocab", "unit"] = arg("vocab", "initial gain and offset: table's, or 1 and 0", "compression")
    rms_match: Literal["", "per_token", "vocab", "none"] = arg(
        "", "rescale to each token's RMS or the vocabulary's; unset: per_token, pooling vocab", "compression"
    )

    w_cos: float = arg(1.0, "weight of 1 - cosine", "losses")
    w_mse: float = arg(0.1, "weight of the squared error", "losses")
    k_tokens: int = arg(4, "K, supervised answer tokens of phase1b", "losses")
    lambda_kce: float = arg(0.01, "weight of the cross-entropy of K answer tokens", "losses")
    lambda_kd: float | None = arg(None, "weight of the KL to the model on text; unset: 0.01, lm_segment 1.0", "losses")
    kd_tau: float = arg(1.0, "temperature of that KL", "losses")
    kd_chunk: int | None = arg(None, "teacher rows per forward pass; unset: KD_TEACHER_CHUNK or 4", "losses")
    cache_teacher: bool = arg(False, "keep the teacher's 64 likeliest tokens per example", "losses")
    anneal_gen_objectives: bool = arg(False, "ramp both weights up", "losses")
    anneal_epochs: float = arg(3.0, "length of the ramp in epochs, counted in steps", "losses")
    anneal_mode: Literal["linear", "delayed", "cosine_gated"] = arg("linear", "shape of the ramp", "losses")
    anneal_delay_steps: int = arg(200, "first step of --anneal_mode delayed", "losses")
    gate_cos: float = arg(0.75, "cosine that opens --anneal_mode cosine_gated", "losses")

    ckpt_in: str = arg("", "start from (or evaluate) this checkpoint; unset: from the seed", "checkpoints")
    ckpt_out: str = arg("", "write the best checkpoint here too; unset: in the run directory alone", "checkpoints")
    save_every: int = arg(500, "steps between writes of last.pt, besides each epoch's end", "checkpoints")

    eval_every: int = arg(1, "epochs between evaluations", "evaluation")
    eval_samples: int = arg(100, "evaluated examples", "evaluation")
    eval_batch_size: int = arg(32, "prompts per batch, of similar length", "evaluation")
    quick_eval_every: int = arg(100, "steps between quick evaluations, which select nothing", "evaluation")
    quick_eval_samples: int = arg(10, "their examples", "evaluation")
    max_new_tokens: int | None = arg(None, "longest answer; unset: 20, baselines and embed_sweep 12", "evaluation")
    references: Literal["all", "first"] = arg("all", "score against the best reference, or the first", "evaluation")
    extract: Literal["none", "first_n", "before_punct", "path_c"] = arg("none", "answer extraction", "evaluation")
    extract_max_words: int = arg(5, "words kept by first_n and path_c", "evaluation")
    stop_strings: str = arg("", "comma-separated ends of an answer (\\n: line break); unset: none", "evaluation")

    max_length: int = arg(384, "longest prompt in tokens", "prompt")
    truncate: Literal["context", "tail"] = arg("context", "tail cuts the question off, as published", "prompt")
    pad_side: Literal["left", "right"] = arg("left", "right: the published fault", "prompt")
    answer_prefix: str = arg("Answer: ", "ends the prompt", "prompt")
    use_chat_template: bool = arg(False, "wrap the prompt in the tokenizer's chat template", "prompt")

    pooling_mode: Literal[
        "mean_target", "generation_loss", "hierarchical", "convolutional", "hybrid_expand", "lm_segment"
    ] = arg("generation_loss", "how M slots come from S tokens", "pooling")
    sequence_pooling_target: int = arg(75, "M", "pooling")
    pool_ratio: float | None = arg(None, "M = ceil(S / ratio); unset: --sequence_pooling_target", "pooling")
    pool_positions: Literal["sinusoid", "none"] = arg("sinusoid", "none: a bag of words, as published", "pooling")
    question_scope: Literal["compressed", "kept"] = arg("compressed", "kept: the question stays text", "pooling")
    use_lora: bool = arg(False, "LoRA on q_proj and v_proj of the first layers of the reading model", "pooling")
    lora_r: int = arg(8, "its rank", "pooling")
    lora_alpha: int = arg(16, "its scale", "pooling")
    lora_layers: int = arg(4, "its layers", "pooling")
    lora_dropout: float = arg(0.05, "its dropout", "pooling")
    seg_encoder: Literal["lm", "none"] = arg("lm", "lm_segment: the model's own states, or embeddings only", "pooling")
    enc_lora_r: int = arg(16, "rank of the encoder's LoRA (q, k, v, o of all layers)", "pooling")
    enc_lora_lr: float = arg(2e-4, "its learning rate", "pooling")
    lambda_ae: float = arg(0.5, "weight of rewriting the prompt from its slots, every other step, 0 at half", "pooling")

    baseline: str = arg("all", f"comma-separated: {', '.join(BASELINES)}, all", "baselines")
    token_budget: int = arg(32, "M, prefill positions", "baselines", aliases="--latent_len")
    budget_mode: Literal["head", "question_kept"] = arg("head", "which of the two the summary leads with", "baselines")
    experiment: str = arg("all", "embed_sweep: all, a name, nearest_k or anchor_offset", "baselines")

    dataset: Literal["squad", "synthetic"] = arg("squad", "hub set, or generated questions", "data")
    train_file: str = arg("", "SQuAD JSON or JSONL, split by article without --eval_file; unset: --dataset", "data")
    eval_file: str = arg("", "SQuAD JSON or JSONL; unset: a part of the training file, or --dataset", "data")

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = arg("auto", "of the base model; what is trained is fp32", "model")
    device_map: Literal["none", "auto"] = arg("none", "auto: spread the base model over the GPUs", "model")
    load_4bit: bool = arg(False, "base model in NF4", "model")
    grad_checkpoint: bool = arg(False, "recompute the base model's activations", "model")
    tiny_dir: str = arg("", "the reader that --model_id tiny stands for; unset: an untrained two-layer Llama", "model")

    @property
    def pooled(self) -> bool:
        """Whether prompts become shorter: in --mode pooling, and in --mode eval of a checkpoint of that mode."""
        return self.mode == "pooling" or (self.mode == "eval" and self.pooling_mode != "")

    @property
    def segments(self) -> bool:
        """Whether the pooler is lm_segment."""
        return self.pooled and self.pooling_mode == "lm_segment"

    @property
    def model_path(self) -> str:
        """What --model_id stands for."""
        return self.tiny_dir if self.model_id == "tiny" and self.tiny_dir else self.model_id


TEST = dict(
    model_id="tiny",
    dataset="synthetic",
    samples=32,
    epochs=2,
    batch_size=8,
    compress_dim=16,
    pca_samples=32,
    eval_samples=24,
    eval_batch_size=8,
    quick_eval_every=4,
    quick_eval_samples=4,
    max_new_tokens=4,
    sequence_pooling_target=8,
    token_budget=24,
    adapter_lr=2e-3,
    device="cpu",
    threads=1,
)
BY_MODE = {
    "phase1a": dict(batch_size=64, save_dir="runs/stage1_adapter_only"),
    "phase1b": dict(save_dir="runs/stage1b_phase1b"),
    "pooling": dict(epochs=1, rms_match="vocab", save_dir="runs/phase1_pooling"),
    "baselines": dict(samples=1000, max_new_tokens=12, save_dir="runs/baselines"),
    "embed_sweep": dict(samples=100, max_new_tokens=12, save_dir="runs/embed_sweep_simple"),
    "eval": dict(save_dir="runs/stage1_eval"),
    "": dict(save_dir="runs/latentwire_test"),
}
SHAPE = (
    "compress_dim compress_method adapter_type adapter_hidden_mult colorize pooling_mode sequence_pooling_target "
    "pool_ratio pool_positions question_scope use_lora lora_r lora_alpha lora_layers seg_encoder enc_lora_r "
    "rms_match"
).split()  # what a checkpoint's tensors were trained for
FREE = ("save_dir", "run_name", "diagnostic_log", "ckpt_out", "eval_batch_size", "save_every", "kd_chunk")


def parse(argv=None) -> Args:
    args = core.parse_args(Args, TEST, argv, __doc__)
    require(args.mode or args.test, f"--mode is needed: one of {', '.join(MODES)} (--test alone runs them all)")
    chunk = os.environ.get("KD_TEACHER_CHUNK", "4")  # the document's name for --kd_chunk
    require(chunk.isdecimal(), f"KD_TEACHER_CHUNK={chunk}: use a whole number")
    unset = dict(samples=10000, epochs=3, batch_size=8, max_new_tokens=20, rms_match="per_token", lambda_kd=0.01)
    unset |= {"kd_chunk": int(chunk)} | BY_MODE[args.mode]
    if args.segments:
        unset |= dict(epochs=3, lambda_kd=1.0)
    if args.run_name:
        unset["save_dir"] = f"runs/{args.run_name}"
    for name, value in unset.items():
        if getattr(args, name) in (None, ""):
            setattr(args, name, value)
    args.diagnostic_log = args.diagnostic_log or f"{args.save_dir}/diagnostics.jsonl"
    if args.mode == "embed_sweep":
        args.compress_method = "none"  # it transforms the embeddings themselves
    if args.model_id == "tiny":
        args.dataset = "synthetic"  # an untrained byte model cannot read real questions
    check(args)
    return args


def check(args: Args) -> None:
    """Refuse values that no run could use, and flags that exclude each other."""
    core.require_positive(
        args,
        "samples epochs batch_size compress_dim adapter_hidden_mult k_tokens eval_every "
        "eval_samples eval_batch_size quick_eval_every quick_eval_samples max_new_tokens max_length "
        "sequence_pooling_target lora_r lora_layers enc_lora_r token_budget kd_chunk save_every",
    )
    for name in "lambda_kce lambda_kd lambda_ae w_cos w_mse anneal_delay_steps".split():
        require(getattr(args, name) >= 0, f"--{name} must not be negative")
    for name in "anneal_epochs kd_tau adapter_lr enc_lora_lr".split():
        require(getattr(args, name) > 0, f"--{name} must be positive")
    require(0 <= args.adapter_dropout < 1 and 0 <= args.lora_dropout < 1, "dropout must be in [0, 1)")
    require(args.pca_samples > 0 or args.pca_samples == -1, "--pca_samples must be positive, or -1 for all")
    require(args.pool_ratio is None or args.pool_ratio >= 1, "--pool_ratio must be at least 1")
    pooling, with_faults = args.mode == "pooling", ("phase1b", "pooling", "embed_sweep")
    require(not args.legacy or args.mode in with_faults, "--legacy is for --mode phase1b, pooling or embed_sweep")
    require(
        not pooling or args.rms_match != "per_token",
        "--rms_match per_token needs a token for each slot: use vocab or none with --mode pooling",
    )
    require(args.pad_side == "left" or not pooling, "--pad_side right is not for --mode pooling")
    unpublished = "--legacy: lm_segment is not in the document, so it has no published form"
    require(not (args.legacy and args.segments), unpublished)
    unknown = [name for name in args.baseline.split(",") if name not in (*BASELINES, "all")]
    require(not unknown, f"--baseline {','.join(unknown)}: use {', '.join(BASELINES)} or all")
    require(
        args.experiment in ("all", "nearest_k", "anchor_offset", *sweep_configs()),
        f"--experiment {args.experiment}: use all, {', '.join(sweep_configs())}, nearest_k or anchor_offset",
    )
    require(args.eval_file == "" or args.train_file, "--eval_file needs --train_file, which PCA is fitted on")
    require(args.mode != "eval" or args.ckpt_in, "--mode eval needs --ckpt_in FILE")


# ---------------------------------------------------------------------------------------------- model: compression
class Moments(NamedTuple):
    """Of vectors [N, d]: N, mean [d] and covariance [d, d], float64."""

    n: float
    mean: Tensor
    covariance: Tensor


def table_moments(table: Tensor, counts: Tensor) -> Moments:
    """Moments of the embedded tokens from `counts` [V] alone: exact, since a prompt's vectors are rows of the `table`
    [V, d]; the prompts themselves are never embedded."""
    used = counts.nonzero()[:, 0]
    require(len(used), "PCA: no token was counted")
    rows, weight = table[used.to(table.device)].double(), counts[used].double().to(table.device)  # U d, U
    mean = weight @ rows / weight.sum()
    centred = rows - mean
    return Moments(float(weight.sum()), mean, centred.T @ (weight[:, None] * centred) / weight.sum())


class Projection(NamedTuple):
    """The way from d to k values and what it was fitted on."""

    mean: Tensor  # d
    matrix: Tensor  # d k, orthonormal columns
    captured: float | None  # share of the variance: of the trace, not of the kept sum as published
    first: list  # the five largest shares
    rms: float  # mean RMS of a prompt token
    table_rms: float  # mean RMS of a table row

    def compress(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., k], fp32."""
        return (x.float() - self.mean) @ self.matrix


def fit_projection(table: Tensor, counts: Tensor, k: int, method: str, seed: int) -> Projection:
    """PCA (or a random orthonormal basis, or the identity) of the tokens that `counts` [V] counts."""
    d = table.shape[1]
    require(method == "none" or k <= d, f"--compress_dim {k} exceeds the model's width {d}")
    n, mean, covariance = table_moments(table, counts)
    weight = counts.double().to(table.device)
    used = weight.nonzero()[:, 0]
    prompt_rms = float(weight[used] @ table[used].double().square().mean(1).sqrt() / n)
    table_rms = float(table.float().square().mean(1).sqrt().mean())
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)  # descending
    total = values.sum().clamp(min=1e-30)
    if method == "none":
        mean, matrix, captured = torch.zeros_like(mean), torch.eye(d, device=table.device), 1.0
    elif method == "random":
        draw = torch.randn(d, k, generator=core.generator(seed, "projection"), dtype=torch.float64) / math.sqrt(k)
        matrix = torch.linalg.qr(draw)[0].to(table.device)
        captured = float((matrix * (covariance @ matrix)).sum() / total)
    else:
        rank = int((values > 1e-12 * values[0]).sum())
        require(k <= rank, f"--compress_dim {k} exceeds the rank {rank} of the counted tokens: more --pca_samples")
        matrix, captured = vectors[:, :k], float(values[:k].sum() / total)
    peak = matrix.gather(0, matrix.abs().argmax(0)[None])  # 1 k: each column's largest entry is made positive
    first = (values[:5] / total).tolist()
    return Projection(mean.float(), (matrix * peak.sign()).float(), captured, first, prompt_rms, table_rms)


def rms(x: Tensor) -> Tensor:
    """Root mean square over the last axis, kept; the epsilon stands inside the root, so zero rows have a gradient."""
    return (x.float().square().mean(-1, keepdim=True) + 1e-12).sqrt()


def rescale(y: Tensor, x: Tensor, match: str, usual: float) -> Tensor:
    """`y` [..., d] at the scale that the model knows: `per_token` the RMS of the originals `x` [..., d], which costs
    one more value on the wire; `vocab` the `usual` RMS of a prompt token, which costs nothing; `none` as it is."""
    if match == "none":
        return y
    return y * ((rms(x) if match == "per_token" else usual) / rms(y))


class Adapter(nn.Module):
    """The document's adapter, z [..., k] -> [..., d]: 50,374,657 parameters at k 1024, d 4096, mult 4, colorize."""

    def __init__(self, k: int, d: int, mult: int, dropout: float, colorize: bool):
        super().__init__()
        self.norm, self.inner, self.mid = nn.LayerNorm(k), nn.Linear(k, k * mult), nn.Linear(k * mult, k * mult)
        self.dropout, self.out, self.skip = nn.Dropout(dropout), nn.Linear(k * mult, d), nn.Linear(k, d)
        self.film_scale, self.film_shift, self.out_norm = nn.Linear(k, d), nn.Linear(k, d), nn.LayerNorm(d)
        self.scale = nn.Parameter(torch.ones(()))
        self.colorize = colorize
        if colorize:  # which standardises the scale away: it stays for the published names, but is not trained
            self.gain, self.offset = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
            self.scale.requires_grad_(False)

    def reset(self, seed: int, table: Tensor | None) -> None:
        """Xavier-uniform matrices, zero biases; gain and offset from the `table` [V, d] if given."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.xavier_uniform_(p, generator=core.generator(seed, "init", name))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if table is not None and self.colorize:
            with torch.no_grad():
                self.gain.copy_(table.float().std(0))
                self.offset.copy_(table.float().mean(0))

    def forward(self, z: Tensor) -> Tensor:
        n = self.norm(z)
        h = F.gelu(self.mid(F.gelu(self.inner(n))))  # ... k*mult
        y = self.out(self.dropout(h)) + self.skip(n)  # ... d
        y = y * torch.sigmoid(self.film_scale(z)) + self.film_shift(z)
        y = self.out_norm(y) * self.scale
        if self.colorize:
            y = (y - y.mean(-1, keepdim=True)) / y.std(-1, keepdim=True).clamp(min=1e-6) * self.gain + self.offset
        return y


def linear_inverse(projection: Projection) -> nn.Linear:
    """y = mu + z P^T, the best linear decoder of PCA, before any training."""
    layer = nn.Linear(*projection.matrix.shape[::-1], device=projection.matrix.device)
    with torch.no_grad():
        layer.weight.copy_(projection.matrix)
        layer.bias.copy_(projection.mean)
    return layer


# -------------------------------------------------------------------------------------------------- model: pooling
def sinusoids(length: int, width: int, device) -> Tensor:
    """[length, width] fixed positions (Vaswani et al. 2017)."""
    half = -(-width // 2)
    angle = torch.arange(length, device=device)[:, None] * 10000.0 ** (-torch.arange(half, device=device) / half)
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width]


class QueryPooler(nn.Module):
    """Learned queries attend to the tokens. 4,277,248 parameters at k 1024 and 75 queries."""

    def __init__(self, k: int, queries: int, positions: bool):
        super().__init__()
        heads = next(h for h in (8, 4, 2, 1) if k % h == 0)
        self.queries, self.positions = nn.Parameter(torch.empty(queries, k)), positions
        self.attention, self.norm = nn.MultiheadAttention(k, heads, 0.1, batch_first=True), nn.LayerNorm(k)

    def forward(self, z: Tensor, valid: Tensor | None, slots: Tensor) -> Tensor:
        """z [B, N, k], valid [B, N] -> [B, max(slots), k]. Without `valid`, padding is read (the published form)."""
        z = F.layer_norm(z, z.shape[-1:]) if valid is not None else z
        query, key = self.queries[: int(slots.max())].expand(len(z), -1, -1), z  # B M k
        if self.positions:  # static embeddings carry no order: without this the output is a bag of words
            query = query + sinusoids(query.shape[1], z.shape[2], z.device)
            key = key + sinusoids(z.shape[1], z.shape[2], z.device)
        return self.norm(self.attention(query, key, z, None if valid is None else ~valid, need_weights=False)[0])


class Hierarchy(nn.Module):
    """Three query poolers in a row, to 3M, 2M and M slots: 13,062,144 parameters at k 1024, M 75."""

    def __init__(self, k: int, queries: int, positions: bool):
        super().__init__()
        self.stages = nn.ModuleList(QueryPooler(k, c * queries, positions) for c in (3, 2, 1))

    def forward(self, z: Tensor, valid: Tensor | None, slots: Tensor) -> Tensor:
        tokens = valid.sum(1) if valid is not None else torch.full_like(slots, z.shape[1])
        for c, stage in zip((3, 2, 1), self.stages):
            count = torch.minimum(c * slots, tokens) if c > 1 else slots
            z = stage(z, valid, count)
            valid = None if valid is None else torch.arange(z.shape[1], device=z.device) < count[:, None]
        return z


class Convolution(nn.Module):
    """Windows of four tokens to one slot each, from the first real token on; an incomplete last window is dropped,
    as a convolution over the unpadded prompt does. 4,197,376 parameters at k 1024."""

    def __init__(self, k: int):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(k, k, 4, 4), nn.LayerNorm(k)

    def forward(self, z: Tensor, valid: Tensor | None, slots: Tensor) -> Tensor:
        z = z if valid is None else z * valid[..., None]
        z = F.pad(z, (0, 0, 0, max(0, 4 - z.shape[1])))
        return self.norm(self.conv(z.transpose(1, 2)).transpose(1, 2))[:, : int(slots.max())]


class Segmenter(nn.Module):
    """lm_segment's new layers: u = e + W2 GELU(W1 LN(c)), W2 = 0 at the start; then through k values and back."""

    def __init__(self, d: int, projection: Projection, narrow: bool):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(d), nn.Linear(d, d), nn.Linear(d, d)
        self.rewrite = nn.Parameter(torch.zeros(d))  # the embedding that asks for the prompt back
        self.narrow, k = narrow, projection.matrix.shape[1]
        if narrow:
            self.down, self.up = nn.Linear(d, k, bias=False), nn.Linear(k, d, bias=False)

    def reset(self, seed: int, projection: Projection) -> None:
        core.init_normal(self, seed)
        with torch.no_grad():
            self.first.weight.mul_(50 / math.sqrt(self.first.in_features))  # from 0.02 to 1 / sqrt(d)
            self.second.weight.zero_()
            self.rewrite.fill_(projection.rms)
            if self.narrow:
                self.down.weight.copy_(projection.matrix.T)
                self.up.weight.copy_(projection.matrix)

    def forward(self, base: Tensor, context: Tensor, mean: Tensor) -> Tensor:
        u = base + self.second(F.gelu(self.first(self.norm(context))))  # B M d
        return self.up(self.down(u - mean)) + mean if self.narrow else u


def segment_weights(tokens: Tensor, slots: Tensor) -> Tensor:
    """[B, M, N] averaging matrices: token t of a body of `tokens` [B] goes to slot floor(t slots / tokens)."""
    t = torch.arange(int(tokens.max()), device=tokens.device)
    of = t * slots[:, None] // tokens[:, None]  # B N
    slot = torch.arange(int(slots.max()), device=tokens.device)[:, None]  # M 1
    hit = (of[:, None] == slot) & (t < tokens[:, None])[:, None]  # B M N
    return hit / hit.sum(-1, keepdim=True).clamp(min=1)


# ------------------------------------------------------------------------------------- model: from batch to answer
class Batch(NamedTuple):
    """Prompts [B, S], padded at the left (`offset` [B] pads); answers [B, A], padded at the right. A prompt of
    `length` tokens is head [0, start), body [start, stop), tail [stop, length); the body becomes `slots` slots."""

    ids: Tensor
    mask: Tensor
    gold: Tensor
    gold_mask: Tensor
    offset: Tensor
    start: Tensor
    stop: Tensor
    length: Tensor
    slots: Tensor
    keys: tuple  # ids of the examples

    @property
    def positions(self) -> Tensor:
        return (self.mask.cumsum(1) - 1).clamp(min=0)


class Prefix(NamedTuple):
    """What the frozen model reads: embeddings [B, P, d], mask and positions [B, P]. `code` is what it was decoded
    to, in fp32: [B, S, d] for every token, [B, M, d] for slots, none for text."""

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    code: Tensor | None = None


def compose(x: Tensor, slots: Tensor, batch: Batch, where: Tensor | None) -> Prefix:
    """[head | slots | tail], padded at the left, from embeddings `x` [B, S, d] and `slots` [B, M, d]. `where` [B, M]:
    the slots' positions, then head and tail keep theirs; none: the positions are counted."""
    S, L = x.shape[1], batch.start + batch.slots + batch.length - batch.stop
    q = torch.arange(int(L.max()), device=x.device) - (L.max() - L)[:, None]  # B P
    start, after = batch.start[:, None], (batch.start + batch.slots)[:, None]
    own = torch.where(q < start, q, q - after + batch.stop[:, None])  # index in the prompt, of head and tail
    index = torch.where((q >= start) & (q < after), S + q - start, own + batch.offset[:, None]).clamp(min=0)
    mask = (q >= 0).long()
    embeds = torch.cat([x, slots.to(x.dtype)], 1).take_along_dim(index[..., None], 1) * mask[..., None].to(x.dtype)
    if where is not None:
        q = torch.cat([batch.positions, where], 1).take_along_dim(index, 1)
    return Prefix(embeds, mask, q.clamp(min=0) * mask, slots)


class Wire(nn.Module):
    """The frozen base model and everything that stands between token ids and its input. `build_prefix` is the one way
    into the model, in training, quick and full evaluation of every mode."""

    weight = staticmethod(lambda count: 1.0)  # of a mean over `count` positions: see `core.weight_of`

    def __init__(self, args: Args, base, projection: Projection):
        super().__init__()
        self.args, self.base, self.pooled = args, base.requires_grad_(False).eval(), args.mode == "pooling"
        self.projection, self.lora_layers, self.teacher_cache = projection, [], {}
        self.adapter = self.pooler = None
        self.encodes = args.segments and args.seg_encoder == "lm"
        device, (d, k) = self.table.device, projection.matrix.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(core.derived_seed(args.seed, "init"))
            if args.segments:
                self.pooler = Segmenter(d, projection, args.compress_method != "none").to(device)
                self.pooler.reset(args.seed, projection)
            elif args.adapter_type == "linear":
                self.adapter = linear_inverse(projection)
            else:
                sizes = (k, d, args.adapter_hidden_mult, args.adapter_dropout, args.colorize)
                self.adapter = Adapter(*sizes).to(device)
                self.adapter.reset(args.seed, self.table if args.color_init == "vocab" else None)
            if self.pooled and not args.segments:
                M = math.ceil(args.max_length / args.pool_ratio) if args.pool_ratio else args.sequence_pooling_target
                ordered = args.pool_positions == "sinusoid" and not args.legacy
                kind = {"hierarchical": Hierarchy, "convolutional": Convolution}.get(args.pooling_mode, QueryPooler)
                self.pooler = kind(k) if kind is Convolution else kind(k, M, ordered)
                core.init_normal(self.pooler, args.seed)
                for name, p in self.pooler.named_parameters():  # the library's own initialisation of these layers
                    if "in_proj_weight" in name or "conv.weight" in name:
                        nn.init.xavier_uniform_(p.flatten(1), generator=core.generator(args.seed, "init", name))
                self.pooler.to(device)
            if self.encodes:
                self.add_lora("qkvo", args.enc_lora_r, 2 * args.enc_lora_r, None, 0.0)
            elif self.pooled and args.use_lora:
                layers = list(range(min(args.lora_layers, base.config.num_hidden_layers)))
                self.add_lora("qv", args.lora_r, args.lora_alpha, layers, args.lora_dropout)
        self.to_train = [p for p in self.parameters() if p.requires_grad]

    def add_lora(self, which: str, r: int, alpha: int, layers: list | None, dropout: float) -> None:
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise core.Failure("LoRA needs peft: pip install peft, or run without it") from error
        self.base.add_adapter(
            LoraConfig(
                r=r,
                lora_alpha=alpha,
                lora_dropout=dropout,
                layers_to_transform=layers,
                target_modules=[f"{x}_proj" for x in which],
            )
        )
        self.lora_layers = [m for m in self.base.modules() if isinstance(m, LoraLayer)]
        for name, p in self.base.named_parameters():  # fp32, whatever the base is in
            if "lora_" in name:
                p.data = p.data.float()
                if "lora_A" in name and not p.is_meta:
                    spread = 1 / math.sqrt(p.shape[1])
                    generator = torch.Generator(p.device).manual_seed(core.derived_seed(self.args.seed, "init", name))
                    p.data.uniform_(-spread, spread, generator=generator)

    @contextlib.contextmanager
    def lora(self, on: bool):
        """LoRA on or off, without peft's own switch, which would also stop its gradients."""
        before = [layer._disable_adapters for layer in self.lora_layers]
        for layer in self.lora_layers:
            layer._disable_adapters = not on
        try:
            yield
        finally:
            for layer, state in zip(self.lora_layers, before):
                layer._disable_adapters = state

    def reading(self):
        """LoRA as it is when the model reads a prefix: the encoder's off, the decoder's on."""
        return self.lora(not self.encodes)

    def recompute_with(self):
        """For checkpointing: the recomputation sees LoRA as the first pass did."""
        on = any(not layer._disable_adapters for layer in self.lora_layers)
        return contextlib.nullcontext(), self.lora(on)

    def train(self, mode: bool = True):
        super().train(mode)
        self.base.eval()
        for layer in self.lora_layers if mode and self.args.lora_dropout and not self.encodes else ():
            layer.lora_dropout.train()
        if self.args.grad_checkpoint:  # the library recomputes in training mode only; these models have no dropout
            self.base.train(mode)
        return self

    @property
    def table(self) -> Tensor:
        """The embedding table, [V, d]."""
        return self.base.get_input_embeddings().weight

    @property
    def best_file(self) -> str:
        """The documented name of the best checkpoint."""
        return "best_checkpoint.pt" if self.pooled else "adapter_phase1_best.pt"

    def embed(self, ids: Tensor) -> Tensor:
        return self.base.get_input_embeddings()(ids)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What is trained, but for LoRA."""
        return {name: m for name in ("adapter", "pooler") if (m := getattr(self, name)) is not None}

    def lora_weights(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.base.named_parameters() if "lora_" in n}

    def state(self) -> dict:
        """Everything trained, and the projection it was trained for."""
        state = {name: module.state_dict() for name, module in self.parts.items()}
        if self.lora_layers:
            state["lora"] = {n: p.detach() for n, p in self.lora_weights().items()}
        p = self.projection
        return state | {
            "compressor_projection": p.matrix,
            "compressor_mean": p.mean,
            "pca_explained_variance": p.captured,
            "token_rms": p.rms,
            "table_rms": p.table_rms,
        }

    def load(self, state: dict, where: str) -> None:
        """Take over what the `state` of the file `where` holds; a part that it lacks stays as it is."""
        held = [name for name in self.parts if name in state]
        require(held, f"{where}: it holds no {' or '.join(self.parts)} for these flags")
        for name in held:
            module = self.parts[name]
            mine, theirs = ({n: tuple(p.shape) for n, p in s.items()} for s in (module.state_dict(), state[name]))
            wrong = [f"{n} {theirs.get(n)} -> {mine.get(n)}" for n in mine | theirs if mine.get(n) != theirs.get(n)]
            require(not wrong, f"{where}: its {name} does not fit these flags ({'; '.join(wrong[:2])})")
            module.load_state_dict(state[name])
        lora = self.lora_weights()
        require(lora.keys() == state.get("lora", lora).keys(), f"{where}: its LoRA does not fit these flags")
        for name, tensor in state.get("lora", {}).items():
            lora[name].data.copy_(tensor)

    # the wire itself
    def compress(self, x: Tensor) -> Tensor:
        return (x.float() - self.projection.mean) @ self.projection.matrix

    def decode(self, z: Tensor, x: Tensor, inverse=None) -> Tensor:
        """Codes [..., k] -> embeddings [..., d], fp32, at the RMS of the originals `x` or of the vocabulary."""
        y = (inverse or self.adapter)(z)
        if self.args.rms_match == "none":
            return y
        return y * ((rms(x) if self.args.rms_match == "per_token" else self.projection.rms) / rms(y))

    def text_prefix(self, batch: Batch) -> Prefix:
        return Prefix(self.embed(batch.ids), batch.mask, batch.positions)

    def token_prefix(self, batch: Batch, inverse=None) -> Prefix:
        """Every prompt token through k values and back."""
        x = self.embed(batch.ids)
        y = self.decode(self.compress(x), x, inverse)  # B S d
        return Prefix(y.to(x.dtype), batch.mask, batch.positions, y)

    def snapped_prefix(self, batch: Batch, inverse=None) -> Prefix:
        """The token nearest to what each code was decoded to: what width compression is worth without its errors."""
        y = self.token_prefix(batch, inverse).code
        ids = nearest_tokens(self.table, y.flatten(0, 1)).view(batch.ids.shape)
        return Prefix(self.embed(ids), batch.mask, batch.positions)

    def body(self, batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
        """The body's part of `values` [B, S, ...], left-aligned [B, N, ...], and what of it is real [B, N]."""
        t, count = torch.arange(int((batch.stop - batch.start).max()), device=values.device), batch.stop - batch.start
        index = (batch.offset + batch.start)[:, None] + t
        part = values.take_along_dim(index.clamp(max=values.shape[1] - 1)[..., *[None] * (values.ndim - 2)], 1)
        return part, t < count[:, None]

    def segment_prefix(self, batch: Batch, trained: bool = True) -> Prefix:
        """Means of the body's embeddings over segments; `trained` adds what the model's own states say of them."""
        x = self.embed(batch.ids)
        A = segment_weights(batch.stop - batch.start, batch.slots)  # B M N
        mean = A @ self.body(batch, x.float())[0]  # B M d
        if trained:
            context = mean
            if self.encodes:
                with self.lora(True):
                    H = self.base.base_model(
                        inputs_embeds=x, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
                    ).last_hidden_state.to(x.device)  # B S d
                context = A @ self.body(batch, H.float())[0]
            mean = self.pooler(mean, context, self.projection.mean)
        where = (A @ self.body(batch, batch.positions.float())[0][..., None]).squeeze(-1).round().long()  # B M
        return compose(x, mean * (self.projection.rms / rms(mean)), batch, where)

    def pooled_prefix(self, batch: Batch) -> Prefix:
        """[head | slots | tail] by a documented pooler."""
        x = self.embed(batch.ids)
        if self.args.legacy:  # padding is read as if it were text, and the slots stand alone
            y = self.adapter(self.pooler(self.compress(x), None, batch.slots))
            mask = torch.ones(y.shape[:2], dtype=torch.long, device=x.device)
            return Prefix(y.to(x.dtype), mask, (mask.cumsum(1) - 1), y)
        part, valid = self.body(batch, self.compress(x))
        return compose(x, self.decode(self.pooler(part, valid, batch.slots), x), batch, None)

    def build_prefix(self, batch: Batch) -> Prefix:
        if not self.pooled:
            return self.token_prefix(batch)
        return self.segment_prefix(batch) if self.args.segments else self.pooled_prefix(batch)

    # the frozen model reads
    def answer_logits(self, prefix: Prefix, gold: Tensor, gold_mask: Tensor) -> Tensor:
        """[B, K, V] in fp32: column j predicts gold token j, from one forward pass over [prefix | gold[:-1]]."""
        K = gold.shape[1]
        out = self.base(**self.joined(prefix, gold[:, :-1], gold_mask[:, :-1]), logits_to_keep=K, use_cache=False)
        return out.logits.float()

    def joined(self, prefix: Prefix, ids: Tensor, mask: Tensor) -> dict:
        after = prefix.positions[:, -1:] + 1 + torch.arange(ids.shape[1], device=ids.device)
        return {
            "inputs_embeds": torch.cat([prefix.embeds, self.embed(ids)], 1),
            "attention_mask": torch.cat([prefix.mask, mask], 1),
            "position_ids": torch.cat([prefix.positions, after], 1),
        }

    @torch.no_grad()
    def teacher_logits(self, batch: Batch, gold: Tensor, gold_mask: Tensor) -> Tensor:
        """What the same model, without adapters, says after the text prompt: [B, K, V], in rows of --kd_chunk."""
        prefix, parts = self.text_prefix(batch), []
        with self.lora(False):
            for rows in torch.arange(len(gold)).split(self.args.kd_chunk):
                part = Prefix(prefix.embeds[rows], prefix.mask[rows], prefix.positions[rows])
                parts.append(self.answer_logits(part, gold[rows], gold_mask[rows]))
        return torch.cat(parts)

    def distillation(self, student: Tensor, batch: Batch, gold: Tensor, gold_mask: Tensor) -> Tensor:
        """tau^2 KL(teacher | student) over the valid gold positions, fp32. With --cache_teacher over the teacher's 64
        likeliest tokens and the rest as one."""
        tau, log_s = self.args.kd_tau, (student / self.args.kd_tau).log_softmax(-1)
        if not self.args.cache_teacher:
            log_t = (self.teacher_logits(batch, gold, gold_mask) / tau).log_softmax(-1)
        else:
            if not all(key in self.teacher_cache for key in batch.keys):
                full = (self.teacher_logits(batch, gold, gold_mask) / tau).log_softmax(-1)
                top = full.topk(min(64, full.shape[-1] - 1), -1)
                self.teacher_cache |= {key: (v[m], i[m]) for key, v, i, m in zip(batch.keys, *top, gold_mask.bool())}
            pad, kept = nn.utils.rnn.pad_sequence, [self.teacher_cache[key] for key in batch.keys]
            values, index = (pad([row[j] for row in kept], batch_first=True) for j in (0, 1))  # B K 64
            rest = values.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6).neg().log1p()
            log_t, picked = torch.cat([values, rest], -1), log_s.gather(-1, index)
            log_s = torch.cat([picked, picked.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6).neg().log1p()], -1)
        kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)  # B K
        return self.weight(gold_mask.sum()) * tau * tau * (kl * gold_mask).sum() / gold_mask.sum().clamp(min=1)

    def reconstruction(self, y: Tensor, x: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Cosine, squared and relative error of `y` against `x` [B, T, d] over `valid` [B, T], fp32."""
        x, y, n = x.float(), y.float(), valid.sum()
        error = (y - x).square()
        cos = (F.cosine_similarity(y, x, -1) * valid).sum() / n
        mse = (error.mean(-1) * valid).sum() / n
        relative = ((error.sum(-1) + 1e-12).sqrt() / (x.norm(dim=-1) + 1e-12) * valid).sum() / n
        w = self.weight(n)
        recon = w * (self.args.w_cos * (1 - cos) + self.args.w_mse * mse)
        return {"recon": recon, "cos": w * cos.detach(), "mse": w * mse.detach(), "rel": w * relative.detach()}

    def forward(self, batch: Batch, kce: float | Tensor = 0.0, kd: float | Tensor = 0.0, ae: float = 0.0) -> dict:
        """The loss terms of one batch under the weights `kce`, `kd` and `ae`: `loss` and what it is made of."""
        if not self.pooled:
            return self.width_terms(batch, kce, kd)
        if self.args.pooling_mode in ("mean_target", "hybrid_expand"):
            return self.slot_terms(batch)
        return self.answer_terms(batch, ae)

    def width_terms(self, batch: Batch, kce: float | Tensor, kd: float | Tensor) -> dict:
        """Every token decoded, and in phase1b the answer read from it."""
        args, prefix = self.args, self.token_prefix(batch)
        terms = self.reconstruction(prefix.code, self.embed(batch.ids), batch.mask)
        terms["loss"] = terms["recon"]
        if args.mode == "phase1b" and (args.lambda_kce or args.lambda_kd):
            losses = self.legacy_objectives if args.legacy else self.objectives
            terms |= losses(prefix, batch, args.k_tokens, args.lambda_kd > 0)
            terms["loss"] = terms["loss"] + kce * terms["kce"]
            if args.lambda_kd:
                terms["loss"] = terms["loss"] + kd * terms["kd"]
        return terms

    def slot_terms(self, batch: Batch) -> dict:
        """mean_target: each slot should be the prompt's mean. hybrid_expand: each token should be its nearest slot."""
        code = self.pooled_prefix(batch).code  # B M d
        part, valid = self.body(batch, self.embed(batch.ids).float())  # B N d, B N
        if self.args.pooling_mode == "mean_target":
            part = ((part * valid[..., None]).sum(1) / valid.sum(1)[:, None])[:, None].expand_as(code)
            valid = torch.arange(part.shape[1], device=part.device) < batch.slots[:, None]
            decoded = code
        elif self.args.legacy:  # repeat and fill with zeros; the root at zero has no finite gradient
            part, valid = self.embed(batch.ids).float(), batch.mask
            repeat = code.repeat_interleave(max(1, part.shape[1] // code.shape[1]), 1)
            decoded = F.pad(repeat, (0, 0, 0, part.shape[1] - repeat.shape[1]))
            decoded = decoded * (rms(part) / decoded.square().mean(-1, keepdim=True).sqrt())
        else:
            of = torch.arange(part.shape[1], device=part.device) * batch.slots[:, None]
            of = (of // (batch.stop - batch.start)[:, None]).clamp(max=code.shape[1] - 1)
            decoded = code.take_along_dim(of[..., None], 1)  # B N d
        terms = self.reconstruction(decoded, part, valid)
        return terms | {"loss": terms["recon"], "gen": terms["recon"].detach()}

    def answer_terms(self, batch: Batch, ae: float) -> dict:
        """The answer read from the slots; in lm_segment also distillation and the prompt rewritten from them."""
        prefix, gold, gold_mask = self.build_prefix(batch), batch.gold, batch.gold_mask
        if self.args.legacy:  # an anchor with a BOS inside, seen in training only, and no end to learn
            prefix, gold_mask = self.legacy_anchor(prefix), gold_mask * (gold != self.eos)
        with self.reading():
            logits = self.answer_logits(prefix, gold, gold_mask)
            terms = {"gen": self.answer_ce(logits, gold, gold_mask)}
            terms["loss"] = terms["gen"]
            if self.args.segments and self.args.lambda_kd:
                terms["kd"] = self.distillation(logits, batch, gold, gold_mask)
                terms["loss"] = terms["loss"] + self.args.lambda_kd * terms["kd"]
            if ae:
                terms["ae"] = self.rewriting(batch, prefix)
                terms["loss"] = terms["loss"] + ae * terms["ae"]
        return terms

    def answer_ce(self, logits: Tensor, gold: Tensor, gold_mask: Tensor) -> Tensor:
        loss = F.cross_entropy(logits.flatten(0, 1), gold.masked_fill(gold_mask == 0, -100).flatten())
        return self.weight(gold_mask.sum()) * loss

    def objectives(self, prefix: Prefix, batch: Batch, K: int, distil: bool) -> dict[str, Tensor]:
        """Cross-entropy of the first K answer tokens and the KL to the text prompt, from one student and one teacher
        pass, whatever K."""
        gold, gold_mask = batch.gold[:, :K], batch.gold_mask[:, :K]
        logits = self.answer_logits(prefix, gold, gold_mask)
        terms = {"kce": self.answer_ce(logits, gold, gold_mask)}
        return terms | ({"kd": self.distillation(logits, batch, gold, gold_mask)} if distil else {})

    def rewriting(self, batch: Batch, prefix: Prefix) -> Tensor:
        """Cross-entropy of the body's own tokens after [head | slots | rewrite], without holding their logits."""
        bare = batch._replace(stop=batch.length)  # no tail
        start = compose(self.embed(batch.ids), prefix.code, bare, None)
        ask = self.pooler.rewrite * (self.projection.rms / rms(self.pooler.rewrite))
        row = ask.to(start.embeds.dtype).expand(len(batch.ids), 1, -1)
        one = torch.ones_like(start.mask[:, :1])
        start = Prefix(
            torch.cat([start.embeds, row], 1),
            torch.cat([start.mask, one], 1),
            torch.cat([start.positions, start.positions[:, -1:] + 1], 1),
        )
        ids, valid = self.body(batch, batch.ids)
        hidden = self.base.base_model(**self.joined(start, ids, valid.long()), use_cache=False).last_hidden_state
        labels = F.pad(ids.masked_fill(~valid, -100), (start.mask.shape[1], 0), value=-100)
        head = self.base.get_output_embeddings().weight  # under --device_map auto on another device than the table
        loss = core.next_token_loss(hidden.to(head.device), head, labels.to(head.device)).to(ids.device)
        return self.weight(valid.sum()) * loss

    # the published faults, for --legacy alone
    def legacy_anchor(self, prefix: Prefix) -> Prefix:
        ids = self.anchor.to(prefix.mask.device).expand(len(prefix.mask), -1)
        return Prefix(
            torch.cat([prefix.embeds, self.embed(ids)], 1),
            torch.cat([torch.ones_like(prefix.mask), torch.ones_like(ids)], 1),
            torch.arange(prefix.mask.shape[1] + ids.shape[1], device=ids.device).expand(len(ids), -1),
        )

    def legacy_objectives(self, prefix: Prefix, batch: Batch, K: int, distil: bool) -> dict[str, Tensor]:
        """As published: a second anchor with a BOS inside, padding attended, answers padded at the left with the end
        token (so that the first K columns are mostly padding and BOS), the teacher read at an index that forgets the
        left padding."""
        B, A = batch.gold.shape
        answer = batch.gold.masked_fill(batch.gold_mask == 0, self.eos)
        answer = torch.cat([torch.full((B, 1), self.bos, device=answer.device), answer[:, : A - 1]], 1)
        shift = (A - batch.gold_mask.sum(1))[:, None]  # pads to bring to the left
        at = torch.arange(A, device=answer.device) - shift
        gold = torch.where(at >= 0, answer.take_along_dim(at.clamp(min=0), 1), self.eos)[:, :K]
        logits = self.answer_logits(self.legacy_anchor(prefix), gold, torch.ones_like(gold))
        labels = gold.masked_fill(gold == self.eos, -100)
        n = (labels != -100).sum().clamp(min=1)
        terms = {"kce": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / n}
        if distil:
            with torch.no_grad():
                full = self.base(inputs_embeds=self.embed(torch.cat([batch.ids, gold], 1)), use_cache=False).logits
                at = batch.length[:, None] - 1 + torch.arange(gold.shape[1], device=gold.device)
                teacher = full.float().take_along_dim(at[..., None], 1)
            tau = self.args.kd_tau
            kl = F.kl_div(
                (logits / tau).log_softmax(-1), (teacher / tau).log_softmax(-1), reduction="none", log_target=True
            )
            terms["kd"] = tau * tau * kl.sum(-1).mean()
        return terms


@torch.no_grad()
def greedy_generate(base, prefix: Prefix, max_new_tokens: int, stop: Tensor, ended=None, ban: tuple = (0, ())):
    """(new ids [B, T], logits of the first [B, V]) with a KV cache; a row ends at an id in `stop`, or where
    `ended(row ids)` says so. `ban` = (steps, ids): ids that may not come in the first steps."""
    mask, position = prefix.mask, prefix.positions[:, -1:]
    out = base(
        inputs_embeds=prefix.embeds,
        attention_mask=mask,
        position_ids=prefix.positions,
        use_cache=True,
        logits_to_keep=1,
    )
    first, tokens = out.logits[:, -1].float(), []
    done = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    for step in range(max_new_tokens):
        logits = out.logits[:, -1].float()
        if step < ban[0]:
            logits[:, list(ban[1])] = -torch.inf
        token = torch.where(done, stop[0], logits.argmax(-1))
        tokens.append(token)
        done = done | torch.isin(token, stop)
        if ended is not None:
            rows = torch.stack(tokens, 1).tolist()
            done = done | torch.tensor([ended(row) for row in rows], device=done.device)
        if done.all() or step == max_new_tokens - 1:
            break
        mask, position = torch.cat([mask, torch.ones_like(position)], 1), position + 1
        out = base(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position,
            use_cache=True,
            past_key_values=out.past_key_values,
            logits_to_keep=1,
        )
    return torch.stack(tokens, 1), first


def base_dtype(args: Args, cuda: bool) -> torch.dtype:
    name = args.dtype if args.dtype != "auto" else args.precision
    if name == "auto":
        half = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        name = half if cuda else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def load_base(args: Args, accelerator):
    """(frozen model, tokenizer) on its device. A large model without a GPU is refused, not crawled through."""
    cuda, kwargs = accelerator.device.type == "cuda", {}
    dtype, path = base_dtype(args, cuda), args.model_path
    if path != "tiny" and not cuda and (Path(path) / "config.json").exists():
        size = json.loads((Path(path) / "config.json").read_text())
        guess = 12 * size.get("num_hidden_layers", 0) * size.get("hidden_size", 0) ** 2
        require(
            guess < 2e9,
            f"{path} has about {guess / 1e9:.0f}e9 parameters and there is no CUDA device: use one "
            "(CUDA_VISIBLE_DEVICES, --device cuda), a smaller model or --model_id tiny",
        )
    if args.load_4bit:
        try:
            import bitsandbytes  # noqa: F401
            from transformers import BitsAndBytesConfig
        except ImportError as error:
            raise core.Failure("--load_4bit needs bitsandbytes: pip install bitsandbytes, or drop the flag") from error
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if args.device_map == "auto" or args.load_4bit:
        kwargs["device_map"] = "auto" if args.device_map == "auto" else {"": accelerator.device}
    require(not (accelerator.sharded and args.device_map == "auto"), "FSDP and --device_map auto: drop one of the two")
    require(
        not (accelerator.sharded and args.cache_teacher),
        "FSDP and --cache_teacher: each process would run the teacher on other steps; drop the flag",
    )
    base, tokenizer = core.load_backbone(path, dtype, **({} if path == "tiny" else kwargs))
    core.shard_frozen(base, accelerator)
    if "device_map" not in kwargs or path == "tiny":
        base = base.to(accelerator.device)
    count = sum(p.numel() for p in base.parameters())
    require(
        cuda or count < 2e9,
        f"{path} has {count:,} parameters and there is no CUDA device: use one, a smaller model or --model_id tiny",
    )
    if args.device_map == "auto":
        bring_back(base)
    return base, tokenizer


def bring_back(base) -> None:
    """Let the logits of a model that is spread over devices return to the embedding table's, where prefix and loss
    are."""
    base.lm_head.register_forward_hook(lambda m, i, out: out.to(base.get_input_embeddings().weight.device))


# ----------------------------------------------------------------------------------------------------------- data
ENTITIES = (
    "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Katya Leon Mira Nils Olga Pavel Rosa Selim Tilda "
    "Uwe Vera Wim Xenia Yusuf"
).split()
RELATIONS = "house boat garden coat".split()
FIRST = (
    "amber azure beige black blue bronze brown copper coral cream gold green grey indigo ivory lilac olive "
    "orange pink purple red silver white yellow"
).split()
SECOND = (
    "brick canvas cedar clay cotton felt flint glass granite hemp iron leather linen marble oak paper pine "
    "plaster sand silk slate steel stone wool"
).split()


def generated_rows(count: int, *purpose) -> list[dict]:
    """`count` questions in SQuAD's form, as the reader of pretrain_backbone.py knows them: one on each fresh context of
    four facts. Two facts share each relation and two each entity, so a bag of words cannot answer."""
    rng, rows = random.Random(core.derived_seed(*purpose)), []
    for i in range(count):
        relations, people = rng.sample(RELATIONS, 2), rng.sample(ENTITIES, 2)
        values = [f if rng.random() < 0.5 else f"{f} {rng.choice(SECOND)}" for f in rng.sample(FIRST, 4)]
        facts = list(zip(rng.sample([(r, e) for r in relations for e in people], 4), values))
        (relation, entity), answer = rng.choice(facts)
        context = " ".join(f"The {r} of {e} is {v} ." for (r, e), v in facts)
        rows.append(
            {
                "id": f"{purpose[-1]}-{i}",
                "title": "generated",
                "context": context,
                "question": f"What is the {relation} of {entity} ?",
                "answers": [answer],
            }
        )
    return rows


def split_by_article(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(train, eval): a tenth of the articles (of the passages, if there is one article) is held out."""
    key = "title" if len({row["title"] for row in rows}) > 1 else "context"
    names = sorted({row[key] for row in rows})
    require(len(names) > 1, "the file has one passage only: give --eval_file")
    random.Random(0).shuffle(names)
    names = set(names[: max(1, len(names) // 10)])
    held_out = [r for r in rows if r[key] in names]
    seen = {r["context"] for r in held_out}  # a passage may stand in two articles
    return [r for r in rows if r[key] not in names and r["context"] not in seen], held_out


def questions_in(path: str) -> int:
    """Questions in a SQuAD JSON or JSONL file, with an answer or without."""
    text = core.read_text(path)
    if path.endswith(".jsonl"):
        return sum(bool(line.strip()) for line in text.splitlines())
    return sum(len(p["qas"]) for article in json.loads(text)["data"] for p in article["paragraphs"])


def load_rows(args: Args, train: int, evaluated: int) -> tuple[list, list, list, str, int]:
    """(training rows, evaluation rows, rows for PCA, source, questions dropped for want of an answer). Subsets are
    drawn with the document's seeds: training 0, PCA and evaluation 42; PCA and training never see an evaluated
    context."""
    dropped = 0
    if args.train_file:
        rows = core.squad_rows(args.train_file)
        same = args.eval_file in ("", args.train_file)
        rows, held_out = split_by_article(rows) if same else (rows, core.squad_rows(args.eval_file))
        dropped = sum(map(questions_in, {args.train_file, args.eval_file} - {""})) - len(rows) - len(held_out)
        source = "file"
    elif args.dataset == "synthetic":
        held_out, source = generated_rows(evaluated, 42, "evaluation"), "generated"
        known, size = {r["context"] for r in held_out}, max(train, args.pca_samples)
        rows = [r for r in generated_rows(size + 16, args.seed, "training") if r["context"] not in known][:size]
    else:
        rows, held_out = (core.squad_rows("rajpurkar/squad", split) for split in ("train", "validation"))
        source = "squad"
    require(rows, "every passage of the file stands in an evaluated article too: give --eval_file")
    shared = {r["context"] for r in rows} & {r["context"] for r in held_out}
    require(
        not shared,
        f"{len(shared)} passages are in both training and evaluation data: use disjoint files, or give "
        "one file for both, which is then split",
    )

    def subset(rows, n, seed):
        rows = list(rows)
        random.Random(seed).shuffle(rows)
        return rows[: n if n > 0 else None]

    fitted = subset(rows, args.pca_samples, 42)
    return subset(rows, train, 0), subset(held_out, evaluated, 42), fitted, source, dropped


class Item(NamedTuple):
    """A tokenised example: `ids` of the prompt, `answer` of the first reference and the end token; the context ends
    before token `context`, the answer prefix begins at `tail`, and `start` special tokens lead."""

    id: str
    question: str
    golds: list
    ids: list
    answer: list
    start: int
    context: int
    tail: int
    source: str  # the prompt's text

    def stop(self, args: Args) -> int:
        """Where the body ends: what follows stays text."""
        return self.context if args.question_scope == "kept" else self.tail


SYSTEM = "Answer the question with a short phrase from the context and nothing else."


def tokenize(rows: list[dict], tokenizer, args: Args) -> list[Item]:
    """Prompt and answer are tokenised together and cut where the answer begins. If the tokenizer glues the prefix's
    last blank to the word after it, the answer owns that blank, for every prompt alike, in training and evaluation."""
    ends, texts, glued, chat = [], [], _glues_blanks(tokenizer), args.use_chat_template
    require(not chat or tokenizer.chat_template, "--use_chat_template: this tokenizer has no chat template")
    for row in rows:
        text = f"Context: {row['context']}\nQuestion: {row['question']}\n"
        if chat:
            talk = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ends.append((text.index("Context: ") + len(f"Context: {row['context']}"), len(text)))
        texts.append(text + args.answer_prefix)
    shown = [t.rstrip(" ") if glued else t for t in texts]
    plain = dict(add_special_tokens=not chat, verbose=False)
    prompts = tokenizer(shown, return_offsets_mapping=True, **plain)
    joint = tokenizer([t + r["answers"][0] for t, r in zip(texts, rows)], **plain)["input_ids"]
    items, blank = [], " " if glued and args.answer_prefix.endswith(" ") else ""
    for i, (row, ids, whole) in enumerate(zip(rows, prompts["input_ids"], joint)):
        answer = (
            whole[len(ids) :]
            if whole[: len(ids)] == ids
            else tokenizer(blank + row["answers"][0], add_special_tokens=False)["input_ids"]
        )  # merged across the boundary: cut there
        offsets, start = prompts["offset_mapping"][i], int(ids[0] == tokenizer.bos_token_id)
        context = next((j for j in range(start, len(ids)) if offsets[j][1] > ends[i][0]), len(ids))
        tail = next((j for j in range(context, len(ids)) if offsets[j][0] >= ends[i][1]), len(ids))
        over = len(ids) - args.max_length
        if over > 0 and args.truncate == "tail":
            ids, context, tail = ids[:-over], min(context, args.max_length), min(tail, args.max_length)
        elif over > 0:  # the context's end goes; question and prefix stay
            cut = min(over, context - start)
            ids, context, tail = ids[: context - cut] + ids[context:], context - cut, tail - cut
            ids, lost = ids[-args.max_length :], max(0, len(ids) - args.max_length)
            start, context, tail = (max(0, x - lost) for x in (start, context, tail))
        golds = row["answers"] if args.references == "all" else row["answers"][:1]
        items.append(
            Item(
                row["id"],
                row["question"],
                golds,
                ids,
                [*answer, tokenizer.eos_token_id],
                start,
                context,
                tail,
                shown[i],
            )
        )
    return items


def _glues_blanks(tokenizer) -> bool:
    """Whether a blank belongs to the word after it (as in byte-level BPE), so that no prompt may end in one."""
    cut, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Answer: ", "Answer: the"))
    return whole[: len(cut)] != cut


def slot_count(item: Item, args: Args) -> int:
    """Slots for one prompt: at most one for each token of its body."""
    body = item.stop(args) - item.start
    if args.pooling_mode == "convolutional":
        return max(1, body // 4)
    return max(1, min(body, math.ceil(body / args.pool_ratio) if args.pool_ratio else args.sequence_pooling_target))


def collate(items: list[Item], args: Args, tokenizer, device, slots: list[int] | None = None) -> Batch:
    """Pads with the pad token, which the masks, not its id, mark: it may be the end token itself."""
    S, A, pad = max(len(i.ids) for i in items), max(len(i.answer) for i in items), tokenizer.pad_token_id or 0
    count = [len(i.ids) for i in items]
    offset = [S - n if args.pad_side == "left" else 0 for n in count]
    ids = [[pad] * o + i.ids + [pad] * (S - o - len(i.ids)) for i, o in zip(items, offset)]
    mask = [[0] * o + [1] * n + [0] * (S - o - n) for n, o in zip(count, offset)]
    gold = [i.answer + [pad] * (A - len(i.answer)) for i in items]
    gold_mask = [[1] * len(i.answer) + [0] * (A - len(i.answer)) for i in items]
    if args.legacy and args.mode == "pooling":  # the published slots cover the whole prompt, padding included
        slots = [min(S // 4 if args.pooling_mode == "convolutional" else args.sequence_pooling_target, S)] * len(items)
    slots = slots or [slot_count(i, args) for i in items]
    rows = (ids, mask, gold, gold_mask, offset, [i.start for i in items], [i.stop(args) for i in items], count, slots)
    return Batch(*(torch.tensor(row, device=device) for row in rows), tuple(i.id for i in items))


class Data(NamedTuple):
    train: list  # of Item
    evaluation: list  # of Item
    rows: list  # the rows that the evaluation items come from
    counts: Tensor  # V: tokens of the PCA prompts
    source: str
    dropped: int  # questions without an answer in the files


def load_data(args: Args, tokenizer, vocab_size: int) -> Data:
    evaluated = args.samples if args.mode in ("baselines", "embed_sweep") else args.eval_samples
    trains = args.mode in TRAINED
    train, held_out, fitted, source, dropped = load_rows(args, args.samples if trains else 1, evaluated)
    counted = torch.tensor([t for i in tokenize(fitted, tokenizer, args) for t in i.ids])
    if args.dataset == "synthetic" and tokenizer.unk_token_id is not None:
        require(
            not (counted == tokenizer.unk_token_id).any(),
            "--dataset synthetic: its words are not in this model's "
            "vocabulary: use a reader from pretrain_backbone.py, or --train_file",
        )
    train, evaluation = tokenize(train, tokenizer, args) if trains else [], tokenize(held_out, tokenizer, args)
    empty = sum(i.stop(args) <= i.start for i in (*train, *evaluation))
    require(
        not empty or args.mode != "pooling",
        f"--max_length {args.max_length} leaves nothing of {empty} prompts to compress: raise it",
    )
    return Data(train, evaluation, held_out, torch.bincount(counted, minlength=vocab_size), source, dropped)


# ------------------------------------------------------------------------------------------------------- evaluate
def extract_answer(text: str, how: str, words: int = 5) -> str:
    """A shorter answer out of a generated text; see docs/latentwire.md for the rules."""
    if how == "first_n":
        return " ".join(text.split()[:words])
    if how in ("before_punct", "path_c"):
        body = re.sub(r"^[:\s]*", "", text)
        end = r"[.!?\n]"
        if how == "path_c":
            body = re.sub(r"^[:\s]*(?:answer\s*:\s*)?(?:\(?[A-Za-z]\)\s+)?", "", body, flags=re.I)
            end = r"\.(?=\s|$)|[!?\n]"
        cut = re.split(end, body, maxsplit=1)[0].strip() or (body.split() or [""])[0]
        return extract_answer(cut, "first_n", words) if how == "path_c" else cut
    return text.strip()


def normal(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def collapse(predictions: list[str], golds: list[list[str]], first_ids: list[int], gold_ids: list[int]) -> str:
    """none, or the way in which the predictions are degenerate: empty, repeat, single_answer or first_token (few
    first tokens, and less than half as many as the answers `gold_ids` have: a closed vocabulary is no collapse)."""
    n = len(predictions)
    if sum(not p.strip() for p in predictions) >= 0.9 * n:
        return "empty"
    long = [p.lower().split() for p in predictions if len(p.split()) >= 4]
    repeated = sum(Counter(words).most_common(1)[0][1] >= 0.5 * len(words) for words in long)
    if long and repeated >= 0.5 * n:
        return "repeat"
    if n >= 20:
        said, count = Counter(map(normal, predictions)).most_common(1)[0]
        true = sum(said in map(normal, g) for g in golds)
        if count >= 0.5 * n and count >= 2 * true:
            return "single_answer"
        if len(set(first_ids)) <= max(1, 0.05 * n) and len(set(first_ids)) < 0.5 * len(set(gold_ids)):
            return "first_token"
    return "none"


class Reader(NamedTuple):
    """What an evaluation needs beside the wire."""

    args: Args
    tokenizer: object
    accelerator: object
    stop: Tensor

    @property
    def device(self):
        return self.stop.device


STOPS = ("<|eot_id|>", "<|im_end|>", "</s>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")


def make_reader(args: Args, tokenizer, accelerator, device) -> Reader:
    known = tokenizer.get_vocab()
    stop = dict.fromkeys([tokenizer.eos_token_id, *(known[s] for s in STOPS if s in known)])
    return Reader(args, tokenizer, accelerator, torch.tensor(list(stop), device=device))


def by_length(items: list[Item], size: int) -> list[list[int]]:
    """Indices of the items in groups of `size`, of similar length."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    return [order[at : at + size] for at in range(0, len(order), size)]


@torch.no_grad()
def evaluate(
    wire: Wire,
    items: list[Item],
    reader: Reader,
    prefix_of=None,
    slots: list[int] | None = None,
    max_new_tokens: int = 0,
    native: bool = False,
) -> dict:
    """Greedy answers and their scores. Prompts of similar length share a batch; the batches are shared out between
    processes. `prefix_of(batch)`: another way to make the prefix than the wire's, which the model then reads without
    any LoRA, as it was before training; `slots`: of each item; `native`: the library's own `generate` on the token
    ids, which no code of ours has touched."""
    from accelerate.utils import gather_object

    args, tokenizer, began = reader.args, reader.tokenizer, time.perf_counter()
    training, own, prefix_of = wire.training, prefix_of is None, prefix_of or wire.build_prefix
    wire.eval()
    stops = [s.replace("\\n", "\n") for s in args.stop_strings.split(",") if s]
    punct = [
        i
        for t, i in tokenizer.get_vocab().items()
        if args.ban_punct_steps and tokenizer.convert_tokens_to_string([t]).strip(" ") in (".", "!", "?", "\n")
    ]
    ended = (lambda row: any(s in tokenizer.decode(row) for s in stops)) if stops else None
    groups, rows, engine = by_length(items, args.eval_batch_size), [], reader.accelerator
    shared = engine.num_processes > 1 and not engine.sharded  # under FSDP all must run the base equally often
    for group in groups[engine.process_index :: engine.num_processes] if shared else groups:
        batch = collate([items[i] for i in group], args, tokenizer, reader.device, slots and [slots[i] for i in group])
        prefix = prefix_of(batch)
        with wire.reading() if own else wire.lora(False):
            limit = max_new_tokens or args.max_new_tokens
            ids, first = greedy_generate(wire.base, prefix, limit, reader.stop, ended, (args.ban_punct_steps, punct))
            if native and not args.ban_punct_steps:
                ids = wire.base.generate(
                    batch.ids,
                    attention_mask=batch.mask,
                    max_new_tokens=limit,
                    do_sample=False,
                    eos_token_id=reader.stop.tolist(),
                    pad_token_id=tokenizer.pad_token_id,
                )
                ids = ids[:, batch.ids.shape[1] :]
        top = first.topk(5, -1).indices  # B 5
        hit = top == batch.gold[:, :1]
        found = torch.stack([hit[:, 0], hit.any(1), prefix.mask.sum(1), top[:, 0]], 1).tolist()
        recon = [None] * len(group)
        if prefix.code is not None and prefix.code.shape[1] == batch.ids.shape[1] and not wire.pooled:
            recon = reconstruction_rows(wire, batch, prefix.code).tolist()
        for i, row, values, error in zip(group, ids.tolist(), found, recon):
            row = row[: next((j for j, t in enumerate(row) if t in reader.stop), len(row))]
            text = tokenizer.decode(row, skip_special_tokens=True)
            text = text[: min([text.find(s) for s in stops if s in text], default=len(text))]
            rows.append((i, text, *values, error))
    wire.train(training)
    _, said, top1, top5, positions, first_ids, recon = map(list, zip(*sorted(gather_object(rows) if shared else rows)))
    result = scores(items, said, args, first_ids)
    for name, column in (("first_tok_top1", top1), ("first_tok_top5", top5), ("prefill_positions", positions)):
        result[name] = float(np.mean(column))
    result |= {"positions": positions, "recon_each": recon}
    if recon[0]:
        cos, mse, rel, norm_y, norm_x, n = np.sum(recon, 0).tolist()
        result |= {
            "recon_cosine_sim": cos / n,
            "recon_mse": mse / n,
            "recon_rel_error": rel / n,
            "norm_ratio": norm_y / norm_x,
        }
        result["norm_flag"] = "TOO LOW" if norm_y < 0.8 * norm_x else "TOO HIGH" if norm_y > 1.2 * norm_x else "OK"
    seconds = time.perf_counter() - began
    return result | {"seconds": seconds, "seconds_per_sample": seconds / len(items)}


def reconstruction_rows(wire: Wire, batch: Batch, y: Tensor) -> Tensor:
    """[B, 6]: sums over a prompt's tokens of cosine, squared and relative error, both norms, and their number."""
    x, y, m = wire.embed(batch.ids).float(), y.float(), batch.mask
    error, norms = (y - x), (y.norm(dim=-1), x.norm(dim=-1))
    parts = (F.cosine_similarity(y, x, -1), error.square().mean(-1), error.norm(dim=-1) / norms[1].clamp(min=1e-12))
    return torch.stack([(p * m).sum(1) for p in (*parts, *norms, torch.ones_like(norms[0]))], 1)


def scores(items: list[Item], raw: list[str], args: Args, first_ids: list[int], how: str = "") -> dict:
    """Official SQuAD scores of `raw` predictions after extraction, their intervals and the collapse detector."""
    said = [extract_answer(text, how or args.extract, args.extract_max_words) for text in raw]
    pairs = np.array([core.squad_scores(p, i.golds) for p, i in zip(said, items)])
    em, f1 = pairs.T
    n, histogram = len(items), Counter(map(normal, said))
    return {
        "f1": float(f1.mean()),
        "em": float(em.mean()),
        "f1_se": standard_error(f1),
        "f1_interval": core.bootstrap(f1, 2000),
        "em_interval": core.wilson(int(em.sum()), n),
        "eval_samples": n,
        "extract": how or args.extract,
        "empty_rate": sum(not p.strip() for p in raw) / n,
        "collapse": collapse(said, [i.golds for i in items], first_ids, [i.answer[0] for i in items]),
        "pred_diversity": len(histogram) / n,
        "first_ids": first_ids,
        "prediction_histogram": histogram.most_common(10),
        "f1_each": f1.tolist(),
        "predictions": [
            {"id": i.id, "question": i.question, "golds": i.golds, "pred_raw": r, "pred": p}
            for i, r, p in zip(items, raw, said)
        ],
    }


def standard_error(x: np.ndarray) -> float:
    """Of the mean; 0 for a single value."""
    return float(x.std(ddof=min(1, len(x) - 1)) / math.sqrt(len(x)))


def brief(result: dict) -> dict:
    """A result without its lists, for logs and tables."""
    lists = ("predictions", "f1_each", "positions", "recon_each", "prediction_histogram", "first_ids")
    return {k: v for k, v in result.items() if k not in lists}


def write_predictions(path: Path, result: dict) -> None:
    lines = [json.dumps(p, ensure_ascii=False) for p in result["predictions"]]
    core.write_atomic(path, ("\n".join(lines) + "\n").encode())


def shown(row: dict) -> str:
    return f"F1 {row['f1']:.3f} ± {row['f1_se']:.3f}  EM {row['em']:.3f}"


@torch.no_grad()
def nearest(table: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(cosines, ids), each [T, count], of the table's rows nearest to y [T, d], BLOCK cosines at a time."""
    rows, step = F.normalize(table.float(), dim=1), max(1, BLOCK // len(table))
    found = [(F.normalize(part.float(), dim=1) @ rows.T).topk(count, 1) for part in y.split(step)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def nearest_tokens(table: Tensor, y: Tensor) -> Tensor:
    """Ids [T] of the table's rows nearest to y [T, d] by cosine."""
    return nearest(table, y, 1)[1][:, 0]


@torch.no_grad()
def token_recovery(wire: Wire, items: list[Item], reader: Reader) -> tuple[float, str]:
    """Share of the tokens of the first eight prompts that the nearest row recovers, and the first prompt as decoded."""
    batch = collate(items[:8], reader.args, reader.tokenizer, reader.device)
    training = wire.training
    y = wire.eval().token_prefix(batch).code
    wire.train(training)
    valid = batch.mask.bool()
    found = nearest_tokens(wire.table, y[valid])
    shown = reader.tokenizer.decode(found[: int(batch.length[0])])
    return float((found == batch.ids[valid]).float().mean()), shown[:200]


def ceiling_cosine(wire: Wire, items: list[Item]) -> float:
    """Mean cosine of the linear inverse of the projection over these prompts' tokens: an adapter's untrained rival."""
    ids = torch.tensor([t for i in items for t in i.ids], device=wire.table.device)
    ids, counts = ids.unique(return_counts=True)
    x = wire.table[ids].float()
    y = wire.compress(x) @ wire.projection.matrix.T + wire.projection.mean
    return float((F.cosine_similarity(x, y, -1) * counts).sum() / counts.sum())


def budget(items: list[Item], wire: Wire, args: Args, positions: list[int]) -> dict:
    """Positions, values and bytes of a prompt on the wire beside those of its text, means over the prompts."""
    V, k = len(wire.table), wire.projection.matrix.shape[1]
    S = np.array([len(i.ids) for i in items])
    if wire.pooled:
        slots = np.array([slot_count(i, args) for i in items])
        values, text = slots * k, np.maximum(0, np.array(positions) - slots)
        ratio = S / np.array(positions)
    else:
        values, text = S * (k + (args.rms_match == "per_token")), 0 * S
        ratio = np.ones(len(S))
    as_bytes = np.ceil(S * math.log2(V) / 8)
    wired = 2 * values + np.ceil(text * math.log2(V) / 8)
    means = {
        "prefill_positions": np.array(positions),
        "text_positions": S,
        "wire_values": values,
        "wire_bytes_fp16": wired,
        "token_id_bytes": as_bytes,
        "actual_seq_ratio": ratio,
        "text_bytes_utf8": np.array([len(i.source.encode()) for i in items]),
        "prefill_attn_ratio": ratio**2,
    }
    return {name: float(np.mean(v)) for name, v in means.items()}


def run_eval(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run) -> dict:
    """Scores of a checkpoint and of the text prompt under every extraction: it lifts both."""
    rows = {}
    for name, prefix_of in (("wire", None), ("text", wire.text_prefix)):
        found = evaluate(wire, data.evaluation, reader, prefix_of)
        raw = [p["pred_raw"] for p in found["predictions"]]
        rows[name] = {"none": brief(found)}
        for how in ("none", "first_n", "before_punct", "path_c"):
            again = scores(data.evaluation, raw, args, found["first_ids"], how)
            rows[name][how] = rows[name].get(how, {}) | {k: again[k] for k in ("f1", "em", "f1_se", "f1_interval")}
            run.say(f"{name:5s} {how:13s} {shown(again)}")
        if run.main and name == "wire":
            write_predictions(run.dir / "predictions.jsonl", found)
    return rows | {
        "best_f1": rows["wire"][args.extract]["f1"],
        "gain_of_extraction": {n: r["path_c"]["f1"] - r["none"]["f1"] for n, r in rows.items()},
    }


# ------------------------------------------------------------------------------------------------------- baselines
@torch.no_grad()
def token_surprise(wire: Wire, items: list[Item], reader: Reader) -> list[np.ndarray]:
    """Each prompt token's negative log-likelihood under the base model, in one pass."""
    found = [None] * len(items)
    for group in by_length(items, reader.args.eval_batch_size):
        batch = collate([items[i] for i in group], reader.args, reader.tokenizer, reader.device)
        with wire.lora(False):
            logits = (
                wire.base(
                    inputs_embeds=wire.embed(batch.ids),
                    attention_mask=batch.mask,
                    position_ids=batch.positions,
                    use_cache=False,
                )
                .logits[:, :-1]
                .float()
            )
        nll = F.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")  # B S-1
        nll = F.pad(nll, (1, 0)).cpu().numpy()
        for i, row, o, n in zip(group, nll, batch.offset.tolist(), batch.length.tolist()):
            found[i] = np.concatenate([[0.0], row[o + 1 : o + n]])  # nothing predicts the first
    return found


def cut_to(item: Item, positions: int, how: str, surprise: np.ndarray | None = None) -> Item:
    """The prompt as text of at most so many tokens: `head` keeps its beginning, `question_kept` the beginning of the
    context, `salience` the context's most surprising tokens; the answer prefix stays, and in the last two the
    question. A tail that alone exceeds the budget keeps its last tokens."""
    ids, keep_from = item.ids, item.tail if how == "head" else item.context
    room = positions - (len(ids) - keep_from)
    if room < 0:
        kept = ids[len(ids) - positions :]
    elif how == "salience":
        free = max(0, min(room, keep_from) - item.start)
        chosen = item.start + np.sort(np.argsort(-surprise[item.start : keep_from], kind="stable")[:free])
        kept = ids[: min(item.start, room)] + [ids[i] for i in chosen] + ids[keep_from:]
    else:
        kept = ids[: min(room, keep_from)] + ids[keep_from:]
    dropped = len(ids) - len(kept)
    return item._replace(
        ids=kept,
        start=min(item.start, len(kept)),
        context=max(0, item.context - dropped),
        tail=max(0, item.tail - dropped),
    )


def equal_positions(wire: Wire, items: list[Item], reader: Reader, positions: list[int]) -> dict[str, dict]:
    """The training-free rivals, each prompt at exactly as many prefill positions as the wire gave it (or as its own
    text has, if fewer)."""
    surprise, rows = token_surprise(wire, items, reader), {}
    for name, how in (
        ("token_budget_head", "head"),
        ("token_budget_question_kept", "question_kept"),
        ("salience", "salience"),
    ):
        cut = [cut_to(i, p, how, s) for i, p, s in zip(items, positions, surprise)]
        rows[name] = evaluate(wire, cut, reader, wire.text_prefix)
        rows[name]["tail_cut"] = sum(
            p < len(i.ids) - (i.tail if how == "head" else i.context) for i, p in zip(items, positions)
        )
    for scope in ("compressed", "kept"):
        there = reader._replace(args=dataclasses.replace(reader.args, question_scope=scope, legacy=False))
        ends = [i.stop(there.args) for i in items]
        slots = [max(1, min(e - i.start, p - i.start - len(i.ids) + e)) for i, e, p in zip(items, ends, positions)]
        rows[f"segment_mean_{scope}"] = evaluate(wire, items, there, lambda b: wire.segment_prefix(b, False), slots)
    return rows


def run_baselines(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run) -> dict:
    """Every baseline of --baseline, each with its results.json; the summary compares them."""
    wanted = BASELINES if "all" in args.baseline.split(",") else args.baseline.split(",")
    items, M, d = data.evaluation, args.token_budget, wire.projection.matrix.shape[0]
    rows, projection, chat = {}, wire.projection, items
    if reader.tokenizer.chat_template and not args.use_chat_template:  # replay baselines are documented with it
        chat = tokenize(data.rows, reader.tokenizer, dataclasses.replace(args, use_chat_template=True))
    if {"token_budget", "segment_mean", "salience"} & set(wanted):
        equal = equal_positions(wire, items, reader, [M] * len(items))
        rows |= {n: r for n, r in equal.items() if any(n.startswith(w) for w in wanted)}
    for name in wanted:
        if name == "text":
            rows["text"] = evaluate(wire, items, reader, wire.text_prefix, native=True)
            if chat is not items:
                rows["text_chat"] = evaluate(wire, chat, reader, wire.text_prefix, native=True)
        elif name == "pca":
            narrow = fit_projection(wire.table, data.counts, min(M, d), "pca", args.seed)
            wire.projection = narrow
            inverse = linear_inverse(narrow)
            rows["pca"] = evaluate(wire, items, reader, lambda b, f=inverse: wire.token_prefix(b, f))
            wire.projection = projection
            rows["pca"] |= {
                "pca_explained_variance": narrow.captured,
                "pca_first_5_components": narrow.first,
                "values_per_prompt": float(np.mean([len(i.ids) for i in items])) * min(M, d),
            }
        elif name == "embed_raw":
            rows[name] = evaluate(wire, chat, reader, wire.text_prefix)
        elif name == "embed_anchor":
            anchor = reader.tokenizer(args.answer_prefix.rstrip(" "), add_special_tokens=False)["input_ids"]
            ended = [i if i.ids[-len(anchor) :] == anchor else i._replace(ids=i.ids + anchor) for i in chat]
            rows[name] = evaluate(wire, ended, reader, wire.text_prefix)
        elif name == "snap":
            inverse = None if args.ckpt_in else linear_inverse(projection)
            rows[name] = evaluate(wire, items, reader, lambda b, f=inverse: wire.snapped_prefix(b, f))
    for name, row in rows.items():
        record = {
            "config": vars(args),
            "em": row["em"],
            "f1": row["f1"],
            "exact_match": row["em"],
            "f1_score": row["f1"],
            "num_examples": len(items),
            "n_examples": len(items),
            "timestamp": time.time(),
            "total_time_sec": row["seconds"],
            "token_budget": M,
            **brief(row),
        }
        if run.main:
            core.write_json(run.dir / name / "results.json", record)
            write_predictions(run.dir / name / "predictions.jsonl", row)
        run.say(f"{name:28s} {shown(row)}  positions {row['prefill_positions']:.1f}  {row['collapse']}")
    led = f"token_budget_{args.budget_mode}"
    best = next(n for n in (led, *rows) if n in rows)
    return {
        "rows": {name: brief(row) for name, row in rows.items()},
        "token_budget": M,
        "leading": best,
        "text_equals_replay": _same(rows, "text_chat" if "text_chat" in rows else "text", "embed_raw"),
    }


def _same(rows: dict, a: str, b: str) -> bool | None:
    if a not in rows or b not in rows:
        return None
    return all(x["pred_raw"] == y["pred_raw"] for x, y in zip(rows[a]["predictions"], rows[b]["predictions"]))


# ----------------------------------------------------------------------------------------------------- embed sweep
def sweep_configs() -> dict[str, dict]:
    """The document's ten transforms of real embeddings, in its order."""
    scaled = {f"rms_scale{s}": {"type": "rms_matching", "target_scale": s} for s in SCALES}
    return {"baseline": {"type": "baseline"}, **scaled, "batch_dist": {"type": "batch_distribution"}}


def transform(x: Tensor, mask: Tensor, config: dict, table: Tensor, legacy: bool = False) -> Tensor:
    """`x` [B, S, d] transformed, padding (`mask` [B, S]) apart: each prompt by itself, in the dtype of x."""
    kind, y = config["type"], x.float()
    if kind == "rms_matching":
        target = config["target_scale"] * table.float().square().mean(1).sqrt().mean()
        if legacy:
            return x * (torch.ones(1, device=x.device) * target / rms(x))  # fp32 times half is fp32
        y = y * (target / rms(y))
    elif kind == "batch_distribution":
        n = mask.sum(1)[:, None, None] * x.shape[2]
        w = mask[..., None]
        mean = (y * w).sum((1, 2), keepdim=True) / n
        sd = (((y - mean).square() * w).sum((1, 2), keepdim=True) / (n - 1)).sqrt()
        y = (y - mean) / (sd + 1e-8) * table.float().std() + table.float().mean()
    elif kind == "nearest_k":
        cosines, ids = nearest(table, y.flatten(0, 1), 5)  # B*S 5
        y = 0.5 * y + 0.5 * ((10 * cosines).softmax(1)[..., None] * table[ids].float()).sum(1).view_as(y)
    elif kind == "anchor_offset":
        anchor = table[nearest_tokens(table, y.flatten(0, 1))].float().view_as(y)  # B S d
        gap, limit = y - anchor, 0.1 * anchor.norm(dim=-1, keepdim=True)
        y = anchor + gap * (limit / gap.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    return y.to(x.dtype)


def embedding_stats(wire: Wire, counts: Tensor) -> dict:
    """The document's diagnostics of real prompt embeddings: RMS, spread, nearest rows, spectrum."""
    table = wire.table.detach()
    used = counts.nonzero()[:, 0].to(table.device)
    x, w = table[used].float(), counts[used.cpu()].float().to(table.device)
    size, moments = x.square().mean(1).sqrt(), table_moments(table, counts)
    mean = float((w * size).sum() / w.sum())
    near = nearest(table, x, 2)[0][:, 1]  # beside itself
    spectrum = torch.linalg.eigvalsh(moments.covariance).flip(0).clamp(min=0)
    spread = (moments.covariance.diagonal()).sqrt()
    return {
        "token_rms": {
            "min": float(size.min()),
            "mean": mean,
            "max": float(size.max()),
            "std": float(((w * (size - mean).square()).sum() / w.sum()).sqrt()),
        },
        "table_rms": wire.projection.table_rms,
        "dimension_mean": [float(moments.mean.min()), float(moments.mean.max())],
        "dimension_std": [float(spread.min()), float(spread.max())],
        "nearest_other_cosine": float(near.mean()),
        "spectrum": spectrum[:32].tolist(),
        "spectrum_total": float(spectrum.sum()),
    }


def run_sweep(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run) -> dict:
    """Each transform of the source text's embeddings, followed by the untransformed answer prefix."""
    configs = sweep_configs() | {n: {"type": n} for n in ("nearest_k", "anchor_offset") if args.experiment == n}
    if args.experiment != "all":
        configs = {args.experiment: configs[args.experiment]}
    results = []
    reader = reader._replace(args=dataclasses.replace(args, question_scope="compressed"))  # all but the prefix
    for name, config in configs.items():

        def changed(batch, config=config):
            x, S = wire.embed(batch.ids), batch.ids.shape[1]
            source = batch.mask * (torch.arange(S, device=x.device) < (batch.offset + batch.stop)[:, None])  # B S
            y = transform(x, source, config, wire.table, args.legacy)
            return Prefix(torch.where(source[..., None].bool(), y, x), batch.mask, batch.positions)

        errors, began = 0, time.perf_counter()
        try:
            row = evaluate(wire, data.evaluation, reader, changed)
        except RuntimeError as error:
            if not args.legacy:
                raise
            errors = len(data.evaluation)  # as published: an exception is an empty answer
            run.say(f"{name}: {errors} errors stored as empty answers: {str(error).splitlines()[0]}")
            row = scores(data.evaluation, [""] * errors, args, [0] * errors) | {"seconds": time.perf_counter() - began}
        raw = [p["pred_raw"] for p in row["predictions"]]
        after = [text.rsplit("Answer:", 1)[-1] for text in raw]
        if after != raw:
            row |= scores(data.evaluation, after, args, row["first_ids"])
        result = {
            "experiment": name,
            "config": config,
            "f1": row["f1"],
            "em": row["em"],
            "f1_se": row["f1_se"],
            "empty_rate": row["empty_rate"],
            "num_samples": len(raw),
            "time_sec": row["seconds"],
            "description": f"{config['type']} {config.get('target_scale', '')}".strip(),
            "errors": errors,
            "collapse": row["collapse"],
            "f1_interval": row["f1_interval"],
            "legacy": args.legacy,
        }
        results.append(result)
        if run.main:
            core.write_json(run.dir / f"{name}.json", result)
        run.say(f"{name:16s} {shown(row)}  empty {row['empty_rate']:.0%}")
    if run.main:
        core.write_json(run.dir / "embedding_stats.json", embedding_stats(wire, data.counts))
    ranked = sorted(results, key=lambda r: (-r["f1"], r["experiment"]))  # ties by name
    keys = ("experiment", "f1", "em", "empty_rate", "config")
    f1 = {r["experiment"]: r["f1"] for r in results}
    middle = [r for r in results if r["config"].get("target_scale", 0) >= 0.7]
    scaled = (
        {
            "f1_min": min(r["f1"] for r in middle),
            "f1_max": max(r["f1"] for r in middle),
            "empty_max": max(r["empty_rate"] for r in middle),
        }
        if middle
        else None
    )
    return {
        "total_experiments": len(results),
        "successful": sum(not r["errors"] for r in results),
        "baseline_f1": f1.get("baseline"),
        "batch_dist_f1": f1.get("batch_dist"),
        "scaled": scaled,
        "failed": sum(bool(r["errors"]) for r in results),
        "results": results,
        "sorted_by_f1": [{"rank": i + 1} | {k: r[k] for k in keys} for i, r in enumerate(ranked)],
    }


# ---------------------------------------------------------------------------------------------------------- train
def ramp(args: Args, step: int, steps_per_epoch: int, cosine: float) -> float:
    """alpha of the generation losses before update `step` (counted from 0); `cosine` is its moving average."""
    if not args.anneal_gen_objectives:
        return 1.0
    if args.anneal_mode == "linear":
        return min(1.0, step / (args.anneal_epochs * steps_per_epoch))
    return float(step >= args.anneal_delay_steps if args.anneal_mode == "delayed" else cosine > args.gate_cos)


def rate(args: Args, step: int, total: int) -> float:
    """Factor of the learning rates: cosine to 0; lm_segment rises over its first 5 % before."""
    rise = min(1.0, (step + 1) / max(1, 0.05 * total)) if args.segments else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * step / total))


def decay_groups(wire: Wire, args: Args) -> list[dict]:
    """The encoder's LoRA under its own learning rate, all else under --adapter_lr; matrices decay."""
    groups, lora_lr = [], args.enc_lora_lr if wire.encodes else args.adapter_lr
    for modules, lr in ((wire.parts.values(), args.adapter_lr), ([wire.base], lora_lr)):
        trained = enumerate(p for m in modules for p in m.parameters() if p.requires_grad)
        ordered = nn.ParameterDict({str(i): p for i, p in trained})  # 0 1 10 11 2, the order in every last.pt
        groups += [g | {"lr": lr, "peak": lr} for g in core.decay_groups(ordered, 0.01)]
    return groups


def red_flag(args: Args, top: float, cosine: float, found: dict | None, text_f1: float) -> str:
    """Why an annealed run should stop now, or nothing."""
    if not args.anneal_gen_objectives:
        return ""
    if top > 0.70 and cosine < 0.60:
        return f"the cosine fell to {cosine:.2f} after {top:.2f}"
    if found is not None and found["f1"] == 0 and text_f1 > 0:
        return "F1 is 0 in a full evaluation"
    return ""


class Journal:
    """diagnostics.jsonl, the document's log, beside log.jsonl. An earlier run's is renamed, never mixed with."""

    def __init__(self, args: Args, run: core.Run, fresh: bool):
        self.path, self.run = Path(args.diagnostic_log), run
        if run.main and self.path.exists() and fresh:
            self.path.rename(f"{self.path}.bak-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, size: int) -> None:
        if self.run.main and self.size() > size:
            os.truncate(self.path, size)

    def write(self, kind: str, **row) -> None:
        if self.run.main:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as f:
                f.write(json.dumps({"type": kind, **finite, "timestamp": time.time()}, allow_nan=False) + "\n")
        self.run.log(type=kind, **row)


def gpu_memory() -> dict:
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    used = {f"gpu_{i}_allocated_gb": torch.cuda.memory_allocated(i) / 1e9 for i in range(n)}
    return used | {"total_gpu_memory_gb": sum(used.values()), "gpu_count": n}


def train(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run, stop_requested) -> dict:
    """Train the wire; the best checkpoint by F1 of a full evaluation is written as soon as it is found."""
    accelerator, device, world = reader.accelerator, reader.device, reader.accelerator.num_processes
    steps_per_epoch = max(1, len(data.train) // (args.batch_size * world))
    total, last_file = args.epochs * steps_per_epoch, run.dir / "last.pt"
    gated = args.mode == "phase1b" and (
        args.cos_floor or (args.anneal_gen_objectives and args.anneal_mode == "cosine_gated")
    )
    optimizer = torch.optim.AdamW(decay_groups(wire, args), fused=True)
    core.hide_sharded(wire)
    wire.weight = functools.partial(core.weight_of, accelerator)
    system = accelerator.prepare_model(wire, device_placement=False) if world > 1 else wire
    optimizer = accelerator.prepare(optimizer)
    step, epoch, seconds, best = 0, 0, 0.0, {"f1": -1.0}
    skipped, sums, ema = torch.zeros(2, device=device), {}, torch.zeros((), device=device)
    state = {"top": 0.0, "halved": 1.0, "halved_at": -100, "history": [], "evaluated": []}
    torch.manual_seed(core.derived_seed(args.seed, "dropout", accelerator.process_index))
    saved = None
    if args.resume == "auto":
        saved = core.first_valid([last_file, run.dir / "last_previous.pt"], run.say)
    elif args.resume:
        saved = core.load_checkpoint(Path(args.resume))
    journal = Journal(args, run, saved is None)
    if saved is None:
        run.rewind(0)  # --resume auto of a run that died before its first checkpoint
    else:
        require("optimizer" in saved, f"{args.resume}: not a last.pt of this script")
        core.check_same_config(saved["config"], args, FREE)
        wire.load(saved, str(last_file))
        optimizer.load_state_dict(saved["optimizer"])
        step, epoch, seconds, best, state = (saved[k] for k in ("step", "epoch", "seconds", "best", "loop"))
        skipped, ema = saved["skipped"].to(device), saved["ema"].to(device)
        sums = {k: v.to(device) for k, v in saved["sums"].items()}
        run.rewind(saved["log_size"])
        journal.rewind(saved["journal_size"])
        core.set_rng_state(saved["rng_state"], accelerator)
        run.say(f"[Resume] from step {step}")
    text = evaluate(wire, data.evaluation, reader, wire.text_prefix)
    run.say(f"Text prompt: F1 {text['f1']:.3f} ± {text['f1_se']:.3f}, EM {text['em']:.3f}")

    def save(path: Path, **more) -> None:
        if run.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            core.save_checkpoint(
                path, wire.state() | {"config": vars(args), "best_f1": best["f1"], "epoch": epoch} | more
            )

    def save_last() -> None:
        more = {
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
            "best": best,
            "loop": state,
            "skipped": skipped,
            "ema": ema,
            "rng_state": core.rng_state(accelerator),
            "sums": {k: accelerator.reduce(v, "mean") for k, v in sums.items()},
            "log_size": run.log_size(),
            "journal_size": journal.size(),
        }
        if run.main and last_file.exists():  # to go on from if the new one is damaged
            os.replace(last_file, run.dir / "last_previous.pt")
        save(last_file, **more)

    bar, clock = run.progress(total, step, args.mode), time.perf_counter()
    wire.train()
    while step < total:
        epoch = step // steps_per_epoch
        chosen = core.batch_indices(len(data.train), args.batch_size * world, args.seed, step)
        chosen = chosen[accelerator.process_index * args.batch_size :][: args.batch_size]
        batch = collate([data.train[i] for i in chosen], args, reader.tokenizer, device)
        cosine = float(ema) if gated else 0.0  # waits for the device only where a flag asks for the value
        if args.cos_floor and step - state["halved_at"] >= 100 and state["top"] > args.cos_floor > cosine:
            state |= {"halved": state["halved"] / 2, "halved_at": step}
        alpha = ramp(args, step, steps_per_epoch, cosine) * state["halved"]
        if gated:
            state["top"] = max(state["top"], cosine)
        ae = max(0.0, 1 - 2 * step / total) * args.lambda_ae if args.segments and step % 2 else 0.0
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(args, step, total)
        terms = system(batch, kce=alpha * args.lambda_kce, kd=alpha * args.lambda_kd, ae=ae)
        loss = terms["loss"]
        if world > 1:  # a term that this step leaves out still takes part in the averaging of gradients
            loss = loss + 0.0 * sum(p.sum() for p in wire.to_train)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(wire.to_train, 1.0)
        skipped = core.guard_step(optimizer, norm, skipped)
        optimizer.step()
        optimizer.zero_grad()
        one = torch.ones((), device=device)
        for name, value in (terms | {"grad_norm": norm}).items():  # sum and count: not every step has every term
            old = sums.get(name, torch.zeros(2, device=device))
            sums[name] = old + torch.stack([value.detach().float(), one])
        if "cos" in terms:
            cos = accelerator.reduce(terms["cos"], "mean")  # flags may act on it: the same in every process
            ema = cos if step == 0 else 0.9 * ema + 0.1 * cos
        step += 1
        bar.update(1)

        last, ended = step == total, step % steps_per_epoch == 0
        evaluating = last or (ended and (step // steps_per_epoch) % args.eval_every == 0)
        if step % 10 == 0 or last:
            means = {name: v[0] / v[1] for name, v in sums.items()}
            means = {name: float(accelerator.reduce(v, "mean")) for name, v in means.items()}
            for name in ("recon", "gen", "kce", "kd", "ae", "loss"):
                if name in means and not math.isfinite(means[name]):
                    journal.write("diverged", step=step, term=name)
                    raise core.Failure(
                        f"step {step}: the term {name} is not finite; lower --adapter_lr or the "
                        "lambdas, or use --dtype fp32",
                        core.DIVERGED,
                    )
            sums = {}
            journal.write(
                "train",
                step=step,
                epoch=epoch,
                lr=optimizer.param_groups[0]["lr"],
                batch_size=args.batch_size,
                nonfinite_steps=core.check_skipped(skipped),
                **train_row(args, wire, means, alpha, batch),
            )
            state["history"].append([step, means["loss"]])
            bar.set_postfix({k: f"{means[k]:.3f}" for k in ("loss", "recon", "kce", "kd", "gen", "cos") if k in means})
            state["top"] = max(state["top"], float(ema))
            if why := red_flag(args, state["top"], float(ema), None, text["f1"]):
                raise core.Failure(
                    f"red flag at step {step}: {why}; lower the lambdas or lengthen --anneal_epochs", core.DIVERGED
                )
        stopping, saving = stop_requested(), step % args.save_every == 0
        if step % args.quick_eval_every == 0 or evaluating or saving or stopping:
            seconds += time.perf_counter() - clock
            if step % args.quick_eval_every == 0:
                q = evaluate(wire, data.evaluation[: args.quick_eval_samples], reader, max_new_tokens=10)
                run.say(f"Step {step}: Quick F1 = {q['f1']:.1%}, FirstTok@1 = {q['first_tok_top1']:.1%}")
                journal.write(
                    "quick_eval",
                    step=step,
                    epoch=epoch,
                    quick_f1=q["f1"],
                    quick_first_tok_top1=q["first_tok_top1"],
                    quick_first_tok_top5=q["first_tok_top5"],
                )
            if evaluating:
                losses = [loss for at, loss in state["history"] if at > epoch * steps_per_epoch] or [math.nan]
                found = full_evaluation(wire, data, reader, run, epoch, float(np.mean(losses)))
                present = {k: found[k] for k in FULL if found.get(k) is not None}  # a missing cosine is absent, never 0
                journal.write("full_eval", step=step, epoch=epoch, **present)
                state["evaluated"].append({"step": step} | {k: found[k] for k in ("f1", "f1_interval", "em")})
                if found["f1"] > best["f1"]:
                    best = found | {"epoch": epoch, "step": step}
                    for path in filter(None, (run.dir / wire.best_file, args.ckpt_out)):
                        save(Path(path))
                    if run.main:
                        write_predictions(run.dir / "predictions.jsonl", best)
                    run.say("New best F1! Saved checkpoint")
                if why := red_flag(args, state["top"], float(ema), found, text["f1"]):
                    save_last()
                    raise core.Failure(f"red flag at step {step}: {why}; lower the lambdas", core.DIVERGED)
            if evaluating or saving or stopping:
                save_last()
            if stopping and not last:
                raise core.Failure(f"interrupted at step {step}; continue with --resume auto", 128 + stopping)
            clock = time.perf_counter()
    run.say(f"Best F1: {best['f1']:.3f}")
    return {
        "best": best,
        "text": text,
        "steps": step,
        "seconds": seconds,
        "history": state["history"],
        "evaluated": state["evaluated"],
        "nonfinite_steps": core.check_skipped(skipped),
    }


def train_row(args: Args, wire: Wire, means: dict, alpha: float, batch: Batch) -> dict:
    """A `train` line of diagnostics.jsonl, with the document's names."""
    row = {
        "loss": means["loss"],
        "recon_mse": means.get("mse"),
        "recon_cosine_sim": means.get("cos"),
        "recon_rel_error": means.get("rel"),
        "grad_norm": means["grad_norm"],
        "compression_ratio": wire.projection.matrix.shape[0] / wire.projection.matrix.shape[1],
        **gpu_memory(),
    }
    if args.mode == "phase1b":
        kce, kd = alpha * args.lambda_kce, alpha * args.lambda_kd
        share = (kce * means.get("kce", 0.0) + kd * means.get("kd", 0.0)) / max(abs(means["loss"]), 1e-12)
        row |= {
            "loss_recon": means["recon"],
            "loss_kce": means.get("kce"),
            "loss_kd": means.get("kd"),
            "effective_lambda_kce": kce,
            "effective_lambda_kd": kd,
            "effective_lambda": kce,
            "gen_loss_share": share,
            "cosine_sim": means["cos"],
            "mse": means["mse"],
        }
    if wire.pooled:
        kept = batch.slots if args.legacy else batch.start + batch.slots + batch.length - batch.stop
        row |= {
            "gen_loss": means["gen"],
            "mode": args.pooling_mode,
            "loss_kd": means.get("kd"),
            "loss_ae": means.get("ae"),
            "sequence_compression_ratio": float(batch.length.sum() / kept.sum()),
        }
    return row


FULL = (
    "f1 em f1_se first_tok_top1 first_tok_top5 empty_rate norm_ratio recon_cosine_sim recon_rel_error "
    "token_recon_acc collapse eval_samples extract"
).split()


def full_evaluation(wire: Wire, data: Data, reader: Reader, run: core.Run, epoch: int, loss: float) -> dict:
    """A full evaluation and its block of log lines."""
    found = evaluate(wire, data.evaluation, reader)
    if not wire.pooled:
        found["token_recon_acc"], found["decoded"] = token_recovery(wire, data.evaluation, reader)
    run.say(f"Epoch {epoch + 1}: Avg loss: {loss:.4f}")
    if "recon_cosine_sim" in found:
        run.say(
            f"Avg cosine similarity: {found['recon_cosine_sim']:.3f}\nAvg relative error: "
            f"{found['recon_rel_error']:.3f}\nNorm ratio: {found['norm_ratio']:.3f} {found['norm_flag']}\n"
            f"Token reconstruction: {found['token_recon_acc']:.3f}  {found['decoded'][:80]!r}"
        )
    run.say(f"F1: {found['f1']:.3f}\nEM: {found['em']:.3f}\nFirstTok@1: {found['first_tok_top1']:.3f}")
    for p, sums in zip(found["predictions"][:3], found["recon_each"]):
        line = f"  Expected: {p['golds'][0]!r}  Generated: {p['pred_raw']!r}"
        if sums:
            cos, _, _, norm_y, norm_x, n = sums
            line += f"  norms {norm_x / n:.3f} -> {norm_y / n:.3f} (x {norm_y / norm_x:.3f})  cosine {cos / n:.3f}"
        run.say(line)
    return found


# ------------------------------------------------------------------------------------------------- report, statuses
def threshold(value: float, reference: float | None) -> float:
    """A documented F1 threshold, or, for a stand-in model, the same share of its text F1 (documented: 0.36)."""
    return value if reference is None else min(1.0, value / 0.36) * reference


STATUSES = {  # the document's word from an F1 on, by mode or sweep
    "phase1a": ((0.70, "SUCCESS"), (0.50, "PARTIAL"), (0, "BELOW TARGET")),
    "phase1b": ((0.70, "SUCCESS"), (0.50, "PARTIAL"), (0.30, "MODEST"), (0, "BELOW TARGET")),
    "pooling": ((0.30, "SUCCESS"), (0.15, "MARGINAL"), (0.05, "POOR"), (0, "FAILURE")),
    "sequence": ((0.40, "strong"), (0.30, "moderate"), (0.20, "partial"), (0, "failure")),
}


NO_REFERENCE = "NO REFERENCE"  # the model cannot answer even the text prompt


def status_of(kind: str, f1: float, reference: float | None) -> str:
    if reference == 0:
        return NO_REFERENCE
    return next(word for least, word in STATUSES[kind] if f1 >= threshold(least, reference))


def sweep_status(cos: float, f1: float, reference: float | None = None) -> str:
    """The document's word for one weight of the sweep."""
    if reference == 0:
        return NO_REFERENCE
    if cos < 0.3 or f1 < threshold(0.05, reference):
        return "COLLAPSED"
    if f1 > threshold(0.25, reference):
        return "IMPROVED"
    return "STABLE" if f1 > threshold(0.20, reference) else "DEGRADED"


def anneal_status(f1: float, cos: float, first: float, degenerate: bool, reference: float | None = None) -> str:
    if reference == 0:
        return NO_REFERENCE
    if degenerate:
        return "collapsed"
    levels = (
        ("gold", 0.40, 0.85, 0.15),
        ("strong", 0.35, 0.80, 0.10),
        ("minimum", 0.30, 0.75, 0.0),
        ("partial", 0.28, -1, 0.0),
        ("between", 0.26, -1, 0.0),
    )
    return next(
        (
            word
            for word, least, cosine, token in levels
            if f1 >= threshold(least, reference) and cos >= cosine and first >= token
        ),
        "fail",
    )


def expected(name: str, f1: float, cos: float, reference: float | None = None) -> str:
    """Whether an annealed run does what the document's plan expects of its variant; nothing for another run."""
    for variant, cosine, least in (("linear", 0.75, 0.30), ("weak", 0.80, 0.28), ("warmstart", 0.85, 0.35)):
        if f"anneal_{variant}" in name:
            least = threshold(least, reference)
            return "as expected" if cos >= cosine and f1 >= least else f"expected cos {cosine:.2f}, F1 {least:.2f}"
    return ""


def against_control(row: dict, control: dict) -> str:
    """One weight of the sweep against weight 0 under the same seed."""
    gap, se = row["f1"] - control["f1"], math.hypot(row["f1_se"], control["f1_se"])
    if row["collapse"] != "none":
        return "COLLAPSED"
    return "IMPROVED" if gap > 2 * se else "WORSE" if gap < -2 * se else "SAME"


def rival(f1: float, equal: dict[str, dict]) -> dict | None:
    """The best training-free row at the same positions and the gap to it, with the standard error of the difference
    over the same examples."""
    if not equal:
        return None
    name = max(equal, key=lambda n: equal[n]["f1"])
    gap, se = f1 - equal[name]["f1"], equal[name]["gap_se"]
    return {"name": name, "f1": equal[name]["f1"], "gap": gap, "se": se, "gap_minus_2se": gap - 2 * se}


def read_runs(root: Path) -> list[dict]:
    """One row for each run below `root`: its summary, or, of one that wrote none, what its log says. The cosine is that
    of the last record that has one: an evaluation record may not."""
    require(root.is_dir(), f"--runs_dir {root}: no such folder")
    rows = []
    for directory in sorted(p for p in root.iterdir() if p.is_dir()):
        logs = sorted(directory.rglob("diagnostics.jsonl"))
        records = [json.loads(line) for p in logs for line in p.read_text().splitlines()]
        cosines = [r["recon_cosine_sim"] for r in records if r.get("recon_cosine_sim") is not None]
        row = {"name": directory.name, "cos": cosines[-1] if cosines else None, "f1": None, "failed": ""}
        if (directory / "summary.json").exists():
            row |= json.loads((directory / "summary.json").read_text())
            if "best_f1" not in row or "budget" not in row:  # of another mode
                continue
            row["f1"] = row["best_f1"]
            row["cos"] = row.get("recon_cosine_sim") if row["cos"] is None else row["cos"]  # the log may lie elsewhere
            row["reference"] = row["baselines_same_protocol"]["text"]["f1"] if row.get("relative") else None
        elif logs:
            values = [r for r in records if r.get("type") == "full_eval"]
            ends = [f"{r['term']} not finite at step {r['step']}" for r in records if r.get("type") == "diverged"]
            row |= max(values, key=lambda r: r["f1"], default={"failed": (ends or ["no result file"])[-1]})
        else:
            continue
        rows.append(row)
    require(rows, f"--runs_dir {root}: no run with a summary.json or a diagnostics.jsonl in it")
    return rows


def report(args: Args) -> dict:
    """Print a sweep's table; returns its rows."""
    root = Path(args.runs_dir)
    if args.report == "embed_sweep":
        found = json.loads(core.read_text(Path(args.summary or root / "summary.json")))
        for r in found["sorted_by_f1"]:
            print(
                f"{r['rank']:3d} {r['experiment']:16s} F1 {r['f1']:.3f}  EM {r['em']:.3f}  empty {r['empty_rate']:.0%}"
            )
        print(f"{found['successful']} of {found['total_experiments']} ran without an error")
        return found
    if args.report == "baselines":
        rows = [json.loads(p.read_text()) | {"name": p.parent.name} for p in sorted(root.rglob("results.json"))]
        require(rows, f"--runs_dir {root}: no results.json in it")
        for r in rows:
            print(f"{r['name']:28s} {shown(r)}  positions {r['prefill_positions']:7.1f}  {r['collapse']}")
        return {"rows": rows}
    rows = read_runs(root)
    controls = {
        r.get("seed"): r
        for r in reversed(rows)
        if r.get("lambda_kce") == r.get("lambda_kd") == 0 and r["f1"] is not None
    }
    for r in rows:
        f1, cos, reference = r["f1"], r["cos"] or 0.0, r.get("reference")
        if f1 is None:
            print(f"{r['name']:30s} FAILED ({r['failed']})")
            continue
        if args.report == "weight_sweep":
            r["word"] = sweep_status(cos, f1, reference)
            control = controls.get(r.get("seed"), r)
            if control is not r:
                r["against_control"] = against_control(r, control)
        elif args.report == "anneal":
            degenerate, first = r.get("collapse", "none") != "none", r.get("first_tok_top1") or 0.0
            r["word"] = anneal_status(f1, cos, first, degenerate, reference)
            r["against_plan"] = "" if reference == 0 else expected(r["name"], f1, cos, reference)
        else:
            r["word"] = status_of("sequence" if args.report == "sequence" else "pooling", f1, reference)
        print(line_of(r))
    if args.report == "compression":
        print(verdict(rows))
    return {"rows": rows}


def line_of(r: dict) -> str:
    cells = [f"{r['name']:30s} {shown({'f1_se': 0, 'em': 0} | r)}"]  # a log may lack them
    cells += [f"cos {r['cos']:.3f}"] if r["cos"] is not None else []
    if "budget" in r:
        b = r["budget"]
        cells.append(
            f"positions {b['prefill_positions']:.1f} of {b['text_positions']:.1f} "
            f"({b['actual_seq_ratio']:.2f}x), {b['wire_bytes_fp16']:.0f} B, ids {b['token_id_bytes']:.0f} B"
        )
    if best := r.get("rival"):
        cells.append(f"best free row {best['name']} {best['f1']:.3f}, gap {best['gap']:+.3f} ± {best['se']:.3f}")
    cells += [
        r["word"],
        r.get("against_control", ""),
        r.get("against_plan", ""),
        "LEGACY" if r.get("legacy") else "",
        r.get("collapse") or "",
    ]
    return "  ".join(c for c in cells if c and c != "none")


def verdict(rows: list[dict]) -> str:
    """Whether lm_segment beats the best training-free row at its positions and every documented mode that had as many
    positions or more, by two standard errors each."""
    done = [r for r in rows if r["f1"] is not None and not r.get("legacy")]
    ours = [r for r in done if r.get("pooling_mode") == "lm_segment" and "segment_only" not in r["name"]]
    theirs = [r for r in done if r.get("pooling_mode") not in (None, "lm_segment")]
    lines = []
    for r in ours:
        ratio = r["budget"]["actual_seq_ratio"]
        fair = [t for t in theirs if t["budget"]["actual_seq_ratio"] <= 1.05 * ratio]
        against = [(r["rival"]["name"], r["rival"]["gap"], r["rival"]["se"])] if r["rival"] else []
        against += [(t["name"], r["f1"] - t["f1"], math.hypot(r["f1_se"], t["f1_se"])) for t in fair]
        losses = [f"{name} ({gap:+.3f} ± {se:.3f})" for name, gap, se in against if gap <= 2 * se]
        won = (
            "beats every training-free row at its positions and every documented mode with as many positions or "
            f"more ({len(fair)} runs) by more than 2 SE"
        )
        lines.append(
            f"{r['name']} at {ratio:.2f}x: "
            + (f"does NOT beat by more than 2 SE: {', '.join(losses)}" if losses else won)
        )
    return "\n".join(lines or ["no lm_segment run here"])


# ----------------------------------------------------------------------------------------------------------- main
def adopt(args: Args) -> tuple[Args, dict | None]:
    """The flags under --ckpt_in: `eval` takes the shape from the file, other modes must agree with it."""
    if not args.ckpt_in:
        return args, None
    state = core.load_checkpoint(Path(args.ckpt_in))
    require({"config", "compressor_projection"} <= state.keys(), f"{args.ckpt_in}: not a checkpoint of this script")
    config, found = state["config"], state["compressor_projection"].shape[1]
    if args.mode == "eval":
        shape = {k: config[k] for k in SHAPE} | {"mode": "pooling" if config["mode"] == "pooling" else "phase1a"}
        return dataclasses.replace(args, **shape), state
    wanted = args.compress_dim if args.compress_method != "none" else found
    require(found == wanted, f"--ckpt_in {args.ckpt_in} holds k = {found}, --compress_dim asks for {wanted}")
    return args, state


def make_wire(args: Args, base, data: Data, tokenizer, state: dict | None = None) -> Wire:
    """The wire for these prompts, or the one in a checkpoint's `state`, whose projection is not fitted again."""
    table = base.get_input_embeddings().weight.detach()
    if state is not None:
        P, mean = (state[k].to(table.device) for k in ("compressor_projection", "compressor_mean"))
        require(len(P) == table.shape[1], f"--ckpt_in: made for a model of width {len(P)}, not {table.shape[1]}")
        projection = Projection(mean, P, state["pca_explained_variance"], [], state["token_rms"], state["table_rms"])
    else:
        projection = fit_projection(table, data.counts, args.compress_dim, args.compress_method, args.seed)
    wire = Wire(args, base, projection)
    wire.eos, wire.bos = tokenizer.eos_token_id, tokenizer.bos_token_id or tokenizer.eos_token_id
    anchor = tokenizer(f" {args.answer_prefix}", add_special_tokens=False)["input_ids"]
    wire.anchor = torch.tensor([wire.bos, *anchor], device=table.device)
    if state is not None:
        wire.load(state, args.ckpt_in)
    return wire


def announce(run: core.Run, args: Args, wire: Wire) -> None:
    p = wire.projection
    run.say(f"RMS of the table's rows {p.table_rms:.4f}, of prompt tokens {p.rms:.4f}")
    if p.captured is not None and args.compress_method == "pca":
        run.say(f"PCA captured variance (top {p.matrix.shape[1]} components): {p.captured:.1%}")
    if wire.adapter is not None:
        run.say(f"Adapter parameters: {sum(x.numel() for x in wire.adapter.parameters()):,}")
    if args.pad_side == "right":
        run.say("WARNING: --pad_side right reads the first answer token at a padded position")
    if args.legacy:
        run.say("WARNING: --legacy repeats published faults; its figures are a demonstration")


def summarise(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run, outcome: dict) -> dict:
    """summary.json of a training mode: the best evaluation, what it cost, and the rivals under the same protocol."""
    best, items = outcome["best"], data.evaluation
    d, k = wire.projection.matrix.shape
    file = run.dir / wire.best_file
    wire.load(core.load_checkpoint(file), str(file))
    wire.eval()
    rows = {"text": outcome["text"]}
    equal = equal_positions(wire, items, reader, best["positions"]) if wire.pooled else {}
    if not wire.pooled:
        inverse = linear_inverse(wire.projection)
        rows["pca"] = evaluate(wire, items, reader, lambda b: wire.token_prefix(b, inverse))
        rows["snap"] = evaluate(wire, items, reader, wire.snapped_prefix)
        bits = math.log2(len(wire.table))
        run.say(f"Width compression probes the adapter, it saves nothing: {16 * k} bits per token, its id {bits:.1f}")
        if args.rms_match != "vocab":  # the same adapter without the side information of one value per token
            wire.args = dataclasses.replace(args, rms_match="vocab")
            rows["rms_vocab"] = evaluate(wire, items, reader)
            wire.args = args
    for name, row in equal.items():
        equal[name] = brief(row) | {"gap_se": standard_error(np.array(best["f1_each"]) - np.array(row["f1_each"]))}
    rows["token_budget"] = equal.get("token_budget_question_kept") or rows["text"]
    protocol = {
        name: {k: row[k] for k in ("f1", "em", "f1_se", "f1_interval", "prefill_positions")}
        for name, row in rows.items()
    }
    relative = args.dataset == "synthetic"
    keys = (
        "em",
        "f1_se",
        "f1_interval",
        "em_interval",
        "first_tok_top1",
        "first_tok_top5",
        "recon_cosine_sim",
        "token_recon_acc",
        "norm_ratio",
        "empty_rate",
        "collapse",
        "pred_diversity",
        "prediction_histogram",
        "epoch",
        "eval_samples",
    )
    ended = outcome["evaluated"][-1]  # `best` is chosen on the examples it is reported on; this one is not chosen
    summary = {"best_f1": best["f1"]} | {k: best.get(k) for k in keys}
    summary |= {
        "last_f1": ended["f1"],
        "last_f1_interval": ended["f1_interval"],
        "chosen_from_evaluations": len(outcome["evaluated"]),
        "compression": f"{d} → {k}",
        "method": args.compress_method,
        "samples": len(data.train),
        "k_tokens": args.k_tokens,
        "lambda_kce": args.lambda_kce,
        "lambda_kd": args.lambda_kd,
        "pca_explained_variance": wire.projection.captured,
        "pca_ceiling_cos": ceiling_cosine(wire, items),
        "pooling_mode": args.pooling_mode if wire.pooled else None,
        "question_scope": args.question_scope,
        "M": args.sequence_pooling_target if wire.pooled and not args.pool_ratio else None,
        "pool_ratio": args.pool_ratio,
        "budget": budget(items, wire, args, best["positions"]),
        "baselines_same_protocol": protocol,
        "equal_positions": equal,
        "relative": relative,
        "share_of_text": best["f1"] / max(outcome["text"]["f1"], 1e-9),
        "status": status_of(args.mode, best["f1"], outcome["text"]["f1"] if relative else None),
        "legacy": args.legacy,
        "wall_sec": outcome["seconds"],
        "steps": outcome["steps"],
        "train_loss": outcome["history"],
        "nonfinite_steps": outcome["nonfinite_steps"],
        "trained_parameters": sum(p.numel() for p in wire.to_train),
    }
    if not wire.pooled:
        summary["snap_equals_text"] = _same(rows, "snap", "text")
    return summary | {"rival": rival(best["f1"], equal)}


def write_card(run: core.Run, args: Args, wire: Wire, result: dict) -> None:
    core.model_card(
        run,
        result,
        f"LatentWire {args.mode}",
        args.model_id,
        {
            "F1": result["best_f1"],
            "share of the text prompt's F1": result["share_of_text"],
            "F1 of the last evaluation": result["last_f1"],
            "parameters": result["trained_parameters"],
        },
        f"python latentwire_stage1.py --mode eval --model_id {args.model_id} --ckpt_in {run.dir / wire.best_file} "
        "--save_dir OTHER",
        "The best F1 is chosen on the questions that it is reported on. Width compression saves no bits; a "
        "shorter prompt counts only beside text of as many positions (`equal_positions`): docs/latentwire.md.",
    )


def plan_of(args: Args, accelerator) -> dict:
    """What a run will be: steps, parameters of the adapter, rough estimates of its memory and of the time."""
    config, why = base_config(args.model_path)
    d = config.hidden_size if config else args.input_dim or 4096
    k = d if args.compress_method == "none" else args.compress_dim
    with torch.device("meta"):
        adapter = Adapter(k, d, args.adapter_hidden_mult, args.adapter_dropout, args.colorize)
    tokens = args.batch_size * args.max_length
    steps = args.epochs * max(1, args.samples // args.batch_size)
    memory = core.memory_estimate(adapter, tokens, d, 1, False)
    if config:
        memory |= base_memory(args, config, tokens, accelerator)
        memory["total"] = sum(v for name, v in memory.items() if name != "total")
    plan = {
        "steps": steps,
        "width": d,
        "k": k,
        "parameters": sum(p.numel() for p in adapter.parameters()),
        "tokens": steps * tokens,
        "memory_gb": memory,
    }
    if args.mode in TRAINED:
        plan["time"] = expected_time(args, config, k, steps, accelerator) if config else f"not estimated: {why}"
    return plan


def base_config(path: str) -> tuple:
    """(the base model's configuration, "") without its weights, or (None, why there is none)."""
    from transformers import AutoConfig

    if path == "tiny":
        return core.load_backbone("tiny")[0].config, ""
    reachable = Path(path).is_dir() or core.hub_ready()
    try:
        return AutoConfig.from_pretrained(path), ""
    except (OSError, ValueError):
        why = "did not load" if reachable else "cannot be had without the hub"
        return None, f"the configuration of {path} {why}"


def base_memory(args: Args, config, tokens: int, accelerator) -> dict[str, float]:
    """GB of the frozen base model: its weights, and what its layers keep of `tokens` positions where it is run."""
    from transformers import AutoModelForCausalLM

    dtype = base_dtype(args, accelerator.device.type == "cuda")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config).requires_grad_(False).to(dtype)
    runs = args.mode != "phase1a"  # which uses the embedding table alone
    found = core.memory_estimate(base, tokens * runs, config.hidden_size, config.num_hidden_layers, dtype.itemsize == 2)
    if args.load_4bit:  # NF4: half a byte, and an fp32 scale for 64 weights, in place of each weight of a layer
        inside = sum(m.weight.numel() for m in base.base_model.modules() if isinstance(m, nn.Linear))
        found["weights_and_optimizer"] -= inside * (dtype.itemsize - 0.5625) / 1e9
    return {"base_weights": found["weights_and_optimizer"], "base_activations": found["activations"]}


def expected_time(args: Args, config, k: int, steps: int, accelerator) -> dict:
    """core.time_estimate with a base model of the right shape and random weights, and full prompts of random tokens."""
    from transformers import AutoModelForCausalLM

    def build(device) -> Wire:
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config)
            d = config.hidden_size
            random = Projection(torch.zeros(d), torch.randn(d, min(k, d)) / d**0.5, 1.0, [], 1.0, 1.0)
        wire = Wire(args, base, random)
        wire.eos, wire.bos, wire.anchor = 2, 1, torch.tensor([1, 3], device=device)
        return wire

    def loss(wire, ids):
        S = ids.shape[1] - args.k_tokens
        items = [Item(str(i), "", [], row[:S], row[S:], 1, S - 8, S - 4, "") for i, row in enumerate(ids.tolist())]
        generates = args.mode == "phase1b"
        return wire(
            collate(items, args, SimpleNamespace(pad_token_id=0), ids.device),
            kce=args.lambda_kce * generates,
            kd=args.lambda_kd * generates,
        )["loss"]

    meta = build("meta")
    if args.mode == "phase1a":
        meta = meta.adapter  # the base model's embedding table alone is used
    return core.time_estimate(
        meta, build, loss, config.vocab_size, args.batch_size, args.max_length + args.k_tokens, steps, accelerator
    )


def all_modes(argv: list, args: Args) -> dict:
    """--test without --mode: every mode in turn, each in a folder of its own."""
    root, results = args.save_dir, {}
    for mode in MODES:
        words = ["--mode", mode, "--save_dir", f"{root}/{mode}"]
        words += ["--ckpt_in", f"{root}/phase1a/adapter_phase1_best.pt"] if mode == "eval" else []
        words += ["--report", "compression", "--runs_dir", root] if mode == "report" else []
        results[mode] = main([*argv, *words])
    return results


def main(argv=None) -> dict:
    args = parse(argv)
    if not args.mode:
        return all_modes(list(sys.argv[1:] if argv is None else argv), args)
    if args.mode == "report" and not args.dry_run:
        return report(args)
    accelerator = core.engine(dataclasses.replace(args, precision="fp32"))  # --dtype is the base's alone
    if args.dry_run:
        plan = plan_of(args, accelerator)
        print(json.dumps(plan, indent=1))
        return plan
    given, (args, state) = args, adopt(args)  # they differ in --mode eval, which takes the file's shape
    outputs = (
        "adapter_phase1_best.pt",
        "best_checkpoint.pt",
        "last*.pt",
        "predictions.jsonl",
        "*/results.json",
        "rms_scale*.json",
        "baseline.json",
        "batch_dist.json",
        "embedding_stats.json",
    )
    with core.Run(given, args.save_dir, accelerator, "summary.json", outputs) as run:
        if args.resume and run.result.exists():
            run.say(f"done already: {run.result}")
            return json.loads(run.result.read_text())
        run.say(json.dumps(vars(given), indent=1))
        base, tokenizer = load_base(args, accelerator)
        table = base.get_input_embeddings().weight
        V, d = table.shape
        require(args.input_dim in (None, d), f"--input_dim {args.input_dim} differs from the model's width {d}")
        reader = make_reader(args, tokenizer, accelerator, table.device)
        audit = core.causality_audit(base, V, 32)
        data = load_data(given, tokenizer, V)
        wire = make_wire(args, base, data, tokenizer, state)
        announce(run, args, wire)
        if args.grad_checkpoint:
            base.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": wire.recompute_with})
        if given.mode in TRAINED:
            with core.stop_signal(accelerator) as stop_requested:
                outcome = train(args, wire, data, reader, run, stop_requested)
            result = summarise(args, wire, data, reader, run, outcome)
            run.say(f"Status: {result['status']}")
        else:
            job = {"baselines": run_baselines, "embed_sweep": run_sweep}.get(given.mode, run_eval)
            result = job(args, wire, data, reader, run)
        model = {"id": args.model_id, "width": d, "vocabulary": V, "dtype": str(table.dtype)}
        counted = {"train": len(data.train), "evaluated": len(data.evaluation), "unanswerable_dropped": data.dropped}
        result |= {
            "mode": given.mode,
            "config": vars(given),
            "model": model,
            "causality_max_abs_diff": audit,
            "data": {"source": data.source, **counted},
            "legacy": args.legacy,
            "peak_mem_bytes": core.peak_memory(),
        }
        result = run.finish(result)
        if given.mode in TRAINED:
            write_card(run, args, wire, result)
        return result


if __name__ == "__main__":
    core.cli(main, "--batch_size, --kd_chunk, --eval_batch_size or --max_length; or use --grad_checkpoint, --load_4bit")
