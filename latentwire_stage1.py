"""LatentWire, stage 1: can a prompt reach a frozen language model as a narrower or shorter continuous code?

    z_t = (E[id_t] - mu) P            PCA of the prompt's own embeddings, d -> k           (width)
    s_1..s_M = pool(z_1..z_S)         attention, convolution or segments, M < S            (length, --mode pooling)
    x_t = match(adapter(z_t))         a trained MLP back to width d, rescaled to the norm the model knows
    answer = frozen LM([x | question | "Answer: "])

The task is SQuAD, the question whether any code beats plain text cut to as many positions. A shorter code is made
from the context alone, before the question is known, and several questions are asked of it. Beside the document's
poolers stand three senders in which the frozen model itself, with LoRA, reads the context: `gist` tokens behind it,
`lm_segment`, which averages its states over segments, and `select`, which sends the words that it chooses.

Smoke test   python latentwire_stage1.py --test                                   every mode, CPU, offline, 60 s
Document     python latentwire_stage1.py --mode phase1a --compress_dim 1024 --samples 10000 --epochs 3
Offline      python pretrain_backbone.py --kind reader --facts 16 --questions 3 --output_dir backbones/reader16
             python latentwire_stage1.py --mode pooling --pooling_mode gist --model_id backbones/reader16 \\
                 --dataset synthetic --facts 16 --fact_curriculum 2,4,8,16 --multi_ratio 2,4,8 --compress_method none \\
                 --samples 3000 --epochs 12 --batch_size 12 --questions_per_context 8 --lambda_kd 0 --lambda_ae 0 \\
                 --adapter_lr 1e-3 --enc_lora_lr 1e-3                              10 minutes on one core
Sweeps       bash compression_suite.sh, scripts/run_phase1b_weight_sweep.sh and others: docs/latentwire.md;
             python claims.py status compression runs/compression_suite prints a sweep's table
Expect       gist tokens that answer nearly as text does at a quarter of the context's positions; documented poolers
             hardly better than with another context's code; width compression that answers nearly as text does
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import re
import string
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
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
POOLERS = ("mean_target", "generation_loss", "hierarchical", "convolutional", "hybrid_expand")  # the document's
SENDERS = ("lm_segment", "gist", "select")  # ours: the frozen model itself, with LoRA, reads what it codes
SWEEP = {"baseline": {"type": "baseline"}}  # the document's ten transforms of real embeddings, in its order
SWEEP |= {
    f"rms_scale{s}": {"type": "rms_matching", "target_scale": s} for s in (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5)
}
SWEEP |= {"batch_dist": {"type": "batch_distribution"}}
BLOCK = 2**26  # similarities of tokens with table rows that are held at a time


def numbers(text: str) -> tuple[float, ...]:
    """The values of a comma-separated flag."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise core.Failure(f"{text}: use numbers with commas between them, such as 2,4,8") from None


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

    pooling_mode: Literal[POOLERS + SENDERS] = arg("generation_loss", "how M slots come from S tokens", "pooling")
    sequence_pooling_target: int = arg(75, "M", "pooling")
    pool_ratio: float | None = arg(None, "M = ceil(S / ratio); unset: --sequence_pooling_target", "pooling")
    multi_ratio: str = arg("", "comma-separated: one wire for these ratios; unset: --pool_ratio alone", "pooling")
    fact_curriculum: str = arg("", "facts of generated contexts in turn, such as 2,4,8,16; unset: --facts", "pooling")
    questions_per_context: int = arg(3, "questions asked of one code where the question stays text", "pooling")
    pool_positions: Literal["sinusoid", "none"] = arg("sinusoid", "none: a bag of words, as published", "pooling")
    question_scope: Literal["", "kept", "compressed"] = arg(
        "", "kept: the code is made before the question, which stays text; unset: kept, --legacy compressed", "pooling"
    )
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
    experiment: str = arg("all", "embed_sweep: all, or a name", "baselines")

    dataset: Literal["squad", "synthetic"] = arg("squad", "hub set, or generated questions", "data")
    train_file: str = arg("", "SQuAD JSON or JSONL, split by article without --eval_file; unset: --dataset", "data")
    eval_file: str = arg("", "SQuAD JSON or JSONL; unset: a part of the training file, or --dataset", "data")
    facts: int = arg(4, "facts in a generated context, 2 to 32", "data")
    eval_facts: str = arg("", "comma-separated: more facts, to be answered untrained; unset: none", "data")

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = arg("auto", "of the base model; what is trained is fp32", "model")
    device_map: Literal["none", "auto"] = arg("none", "auto: spread the base model over the GPUs", "model")
    load_4bit: bool = arg(False, "base model in NF4", "model")
    grad_checkpoint: bool = arg(False, "recompute the base model's activations", "model")

    @property
    def pooled(self) -> bool:
        """Whether prompts become shorter: in --mode pooling, and in --mode eval of a checkpoint of that mode."""
        return self.mode == "pooling" or (self.mode == "eval" and self.pooling_mode != "")

    @property
    def sender(self) -> bool:
        """Whether the code is made by the base model itself."""
        return self.pooled and self.pooling_mode in SENDERS

    @property
    def questions(self) -> int:
        """Questions asked of one code: several where the code is made from the context alone."""
        return self.questions_per_context if self.pooled and self.question_scope == "kept" else 1

    @property
    def ratios(self) -> tuple:
        """The ratios that the wire is trained for; None stands for --sequence_pooling_target slots."""
        if self.pooling_mode == "convolutional":
            return (4.0,)  # its stride
        return numbers(self.multi_ratio) or (self.pool_ratio,)

    @property
    def stages(self) -> list[tuple[int, tuple]]:
        """What is trained on in turn: (facts, ratios). More facts at the first ratio, then one ratio more at a time."""
        ratios, facts = self.ratios, [int(n) for n in numbers(self.fact_curriculum)] or [self.facts]
        if not self.fact_curriculum:
            return [(facts[0], ratios)]
        rise = [(facts[-1], ratios[:n]) for n in range(2, len(ratios) + 1)]
        return [(n, ratios[:1]) for n in facts] + rise


TEST = dict(model_id="tiny", dataset="synthetic", device="cpu", threads=1, adapter_lr=2e-3, samples=32, epochs=2)
TEST |= dict(batch_size=8, compress_dim=16, pca_samples=32, sequence_pooling_target=8, token_budget=24)
TEST |= dict(eval_samples=24, eval_batch_size=8, quick_eval_every=4, quick_eval_samples=4, max_new_tokens=4)
BY_MODE = {
    "phase1a": dict(batch_size=64, save_dir="runs/stage1_adapter_only"),
    "phase1b": dict(save_dir="runs/stage1b_phase1b"),
    "pooling": dict(epochs=1, rms_match="vocab", save_dir="runs/phase1_pooling"),
    "baselines": dict(samples=1000, max_new_tokens=12, save_dir="runs/baselines"),
    "embed_sweep": dict(samples=100, max_new_tokens=12, save_dir="runs/embed_sweep_simple"),
    "eval": dict(save_dir="runs/stage1_eval"),
    "": dict(save_dir="runs/latentwire_test"),
}
SHAPE = (  # what a checkpoint's tensors were trained for
    "compress_dim compress_method adapter_type adapter_hidden_mult colorize rms_match pooling_mode seg_encoder "
    "sequence_pooling_target pool_ratio multi_ratio pool_positions question_scope use_lora lora_r lora_alpha "
    "lora_layers enc_lora_r"
).split()


def parse(argv=None) -> Args:
    args = core.parse_args(Args, TEST, argv, __doc__)
    require(args.mode or args.test, f"--mode is needed: one of {', '.join(MODES)} (--test alone runs them all)")
    chunk = os.environ.get("KD_TEACHER_CHUNK", "4")  # the document's name for --kd_chunk
    require(chunk.isdecimal(), f"KD_TEACHER_CHUNK={chunk}: use a whole number")
    unset = dict(samples=10000, epochs=3, batch_size=8, max_new_tokens=20, rms_match="per_token", lambda_kd=0.01)
    unset |= {"kd_chunk": int(chunk)} | BY_MODE[args.mode]
    if args.sender:
        unset |= dict(epochs=3, lambda_kd=1.0)
    unset["question_scope"] = "kept" if args.mode == "pooling" and not args.legacy else "compressed"
    if args.multi_ratio:
        unset["pool_ratio"] = min(numbers(args.multi_ratio))
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
    at_least_one = "samples epochs batch_size compress_dim adapter_hidden_mult k_tokens max_new_tokens max_length "
    at_least_one += "eval_every eval_samples eval_batch_size quick_eval_every quick_eval_samples save_every kd_chunk "
    at_least_one += "token_budget sequence_pooling_target lora_r lora_layers enc_lora_r questions_per_context"
    core.require_positive(args, at_least_one)
    for name in "lambda_kce lambda_kd lambda_ae w_cos w_mse anneal_delay_steps".split():
        require(getattr(args, name) >= 0, f"--{name} must not be negative")
    for name in "anneal_epochs kd_tau adapter_lr enc_lora_lr".split():
        require(getattr(args, name) > 0, f"--{name} must be positive")
    require(0 <= args.adapter_dropout < 1 and 0 <= args.lora_dropout < 1, "dropout must be in [0, 1)")
    require(args.pca_samples > 0 or args.pca_samples == -1, "--pca_samples must be positive, or -1 for all")
    require(min(args.pool_ratio or 1, *numbers(args.multi_ratio), 1) >= 1, "--pool_ratio, --multi_ratio: at least 1")
    own = args.pooling_mode == "convolutional" or args.pool_ratio in args.ratios
    require(own, f"--pool_ratio {args.pool_ratio} must be one of --multi_ratio {args.multi_ratio}")
    require(list(args.ratios) == sorted(args.ratios) or len(args.ratios) == 1, "--multi_ratio: in rising order")
    counts = [args.facts, *numbers(args.fact_curriculum), *numbers(args.eval_facts)]
    require(all(2 <= n <= 32 and n == int(n) for n in counts), "facts: whole numbers from 2 to 32")
    staged, last = args.fact_curriculum, numbers(args.fact_curriculum)[-1:]
    require(not staged or last == (args.facts,), f"--fact_curriculum {staged} must end in --facts {args.facts}")
    made = args.dataset == "synthetic" and not args.train_file
    require(made or not (staged or args.eval_facts), "--fact_curriculum, --eval_facts: for --dataset synthetic alone")
    more = f"--eval_facts {args.eval_facts}: more than --facts {args.facts}, which are trained on"
    require(min(numbers(args.eval_facts), default=33) > args.facts, more)
    pooling, with_faults = args.mode == "pooling", ("phase1b", "pooling", "embed_sweep")
    require(not args.legacy or args.mode in with_faults, "--legacy is for --mode phase1b, pooling or embed_sweep")
    line = "--rms_match per_token needs a token for each slot: use vocab or none with --mode pooling"
    require(not pooling or args.rms_match != "per_token", line)
    require(args.pad_side == "left" or not pooling, "--pad_side right is not for --mode pooling")
    require(not (args.legacy and args.sender), f"--legacy: {args.pooling_mode} is ours and has no published form")
    scope = args.question_scope == "compressed" or not args.legacy
    require(scope, "--legacy: the published poolers read the question too, use --question_scope compressed")
    unknown = [name for name in args.baseline.split(",") if name not in (*BASELINES, "all")]
    require(not unknown, f"--baseline {','.join(unknown)}: use {', '.join(BASELINES)} or all")
    require(args.experiment in ("all", *SWEEP), f"--experiment {args.experiment}: use all, {', '.join(SWEEP)}")
    require(args.eval_file == "" or args.train_file, "--eval_file needs --train_file, which PCA is fitted on")
    require(args.mode != "eval" or args.ckpt_in, "--mode eval needs --ckpt_in FILE")


# ---------------------------------------------------------------------------------------------- model: compression
def table_moments(table: Tensor, counts: Tensor) -> tuple[float, Tensor, Tensor]:
    """(N, mean [d], covariance [d, d]) of the embedded tokens in float64, from `counts` [V] alone: exact, since a
    prompt's vectors are rows of the `table` [V, d]; the prompts themselves are never embedded."""
    used = counts.nonzero()[:, 0]
    require(len(used), "PCA: no token was counted")
    rows, weight = table[used.to(table.device)].double(), counts[used].double().to(table.device)  # U d, U
    mean = weight @ rows / weight.sum()
    centred = rows - mean
    return float(weight.sum()), mean, centred.T @ (weight[:, None] * centred) / weight.sum()


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
    """The new layers of lm_segment and gist: u = A e + W2 GELU(W1 LN(c)), with A = 1 and W2 = 0 at the start, so that
    the code begins as the mean e of a segment's embeddings; then through k values and back. c [..., d or 2 d]: what the
    frozen model's states say of the segment, in gist also the state of the token that was appended for it."""

    def __init__(self, d: int, projection: Projection, narrow: bool, gist: bool):
        super().__init__()
        self.skip, width = nn.Linear(d, d, bias=False), d * (1 + gist)
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, d), nn.Linear(d, d)
        self.rewrite = nn.Parameter(torch.zeros(d))  # the embedding that asks for the context back
        self.gist = nn.Parameter(torch.zeros(d)) if gist else None  # what tells a gist token from a word
        self.narrow, k = narrow, projection.matrix.shape[1]
        if narrow:
            self.down, self.up = nn.Linear(d, k, bias=False), nn.Linear(k, d, bias=False)

    def reset(self, seed: int, projection: Projection) -> None:
        core.init_normal(self, seed)
        with torch.no_grad():
            self.first.weight.mul_(50 / math.sqrt(self.first.in_features))  # from 0.02 to 1 / sqrt(width)
            self.second.weight.zero_()
            nn.init.eye_(self.skip.weight)
            self.rewrite.fill_(projection.rms)
            if self.gist is not None:
                self.gist.zero_()
            if self.narrow:
                self.down.weight.copy_(projection.matrix.T)
                self.up.weight.copy_(projection.matrix)

    def forward(self, base: Tensor, context: Tensor, mean: Tensor) -> Tensor:
        u = self.skip(base) + self.second(F.gelu(self.first(self.norm(context))))  # C M d
        return self.up(self.down(u - mean)) + mean if self.narrow else u


class Selector(nn.Module):
    """The trained rival that sends words: each token's state is scored, the M best tokens go as they are. In training
    noise tries others out (Gumbel top-k: words drawn one after the other with the chance softmax(score)), and what is
    learned is the chance of a draw whose answers were better than others' (REINFORCE, Williams 1992)."""

    def __init__(self, d: int):
        super().__init__()
        self.norm, self.score = nn.LayerNorm(d), nn.Linear(d, 1)
        self.rewrite = nn.Parameter(torch.zeros(d))
        self.log_chance = None  # [C] of the latest draw

    def forward(self, x: Tensor, states: Tensor, valid: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings x and states [C, N, d] -> (the chosen x [C, M, d], where they stood in the body [C, M])."""
        score = self.score(self.norm(states)).squeeze(-1).masked_fill(~valid, -1e4)  # C N
        noisy = score - torch.rand_like(score).clamp(min=1e-9).log().neg().log() if self.training else score
        order = noisy.argsort(1, descending=True)  # C N
        taken = torch.arange(order.shape[1], device=order.device) < slots[:, None]  # C N: of the order
        drawn = score.take_along_dim(order, 1)
        left = drawn.flip(1).logcumsumexp(1).flip(1)  # C N: log of what was still to be drawn from
        self.log_chance = ((drawn - left) * taken).sum(1)
        left_out = (order.argsort(1) >= slots[:, None]).long()
        index = left_out.argsort(dim=1, stable=True)[:, : int(slots.max())]  # C M: the chosen, in their order
        return x.take_along_dim(index[..., None], 1), index


def segment_weights(tokens: Tensor, slots: Tensor) -> Tensor:
    """[B, M, N] averaging matrices: token t of a body of `tokens` [B] goes to slot floor(t slots / tokens)."""
    t = torch.arange(int(tokens.max()), device=tokens.device)
    of = t * slots[:, None] // tokens[:, None]  # B N
    slot = torch.arange(int(slots.max()), device=tokens.device)[:, None]  # M 1
    hit = (of[:, None] == slot) & (t < tokens[:, None])[:, None]  # B M N
    return hit / hit.sum(-1, keepdim=True).clamp(min=1)


def segment_means(x: Tensor, source: "Batch") -> tuple[Tensor, Tensor]:
    """(means [C, M, d] of the body's embeddings x [C, N, d] over its segments, their weights [C, M, N])."""
    average = segment_weights(source.stop - source.start, source.slots)
    return average @ x, average


# ------------------------------------------------------------------------------------- model: from batch to answer
class Batch(NamedTuple):
    """Prompts [B, S], padded at the left (`offset` [B] pads); answers [B, A], padded at the right. A prompt of
    `length` tokens is head [0, start), body [start, stop), tail [stop, length); the body becomes `slots` slots. Prompts
    of one head and body share their code: `of` [B] is its number, and `first` [C] the first prompt that has it."""

    ids: Tensor
    mask: Tensor
    gold: Tensor
    gold_mask: Tensor
    offset: Tensor
    start: Tensor
    stop: Tensor
    length: Tensor
    slots: Tensor
    of: Tensor
    first: Tensor

    def source(self) -> "Batch":
        """What a code is made from, once for each code: head and body, [C, L], padded at the right. What follows the
        body, and so the question where it stays text, is not in it."""
        rows, stop = self._replace(of=None, first=None), self.stop[self.first]
        rows = Batch(*(x if x is None else x[self.first] for x in rows))
        t = torch.arange(int(stop.max()), device=stop.device)
        mask = (t < stop[:, None]).long()  # C L
        ids = rows.ids.take_along_dim((rows.offset[:, None] + t).clamp(max=rows.ids.shape[1] - 1), 1) * mask
        return rows._replace(ids=ids, mask=mask, offset=torch.zeros_like(stop), length=stop)

    @property
    def positions(self) -> Tensor:
        """[B, S] position of each token in its own prompt; padding stands at 0."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def body(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The body's part of `values` [B, S, ...], left-aligned [B, N, ...], and what of it is real [B, N]."""
        count = self.stop - self.start
        t = torch.arange(int(count.max()), device=values.device)
        index = ((self.offset + self.start)[:, None] + t).clamp(max=values.shape[1] - 1)  # B N
        return values.take_along_dim(index[..., *[None] * (values.ndim - 2)], 1), t < count[:, None]


class Prefix(NamedTuple):
    """What the frozen model reads: embeddings [B, P, d], mask and positions [B, P]. `code` is what it was decoded
    to: [B, S, d] for every token, [C, M, d] for the slots of each code, none for text."""

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    code: Tensor | None = None

    @property
    def inputs(self) -> dict:
        """As the base model takes it."""
        return {"inputs_embeds": self.embeds, "attention_mask": self.mask, "position_ids": self.positions}

    def then(self, embeds: Tensor, mask: Tensor) -> "Prefix":
        """[prefix | embeds]: `embeds` [B, A, d] and `mask` [B, A] follow, their positions count on."""
        after = self.positions[:, -1:] + 1 + torch.arange(mask.shape[1], device=mask.device)
        pairs = ((self.embeds, embeds), (self.mask, mask), (self.positions, after))
        return Prefix(*(torch.cat(pair, 1) for pair in pairs))


def compose(x: Tensor, slots: Tensor, batch: Batch, where: Tensor | None) -> Prefix:
    """[head | slots | tail], padded at the left, from embeddings `x` [B, S, d] and `slots` [B, M, d]. `where` [B, M]:
    the slots' positions, then head and tail keep theirs; none: the positions are counted."""
    S, length = x.shape[1], batch.start + batch.slots + batch.length - batch.stop
    q = torch.arange(int(length.max()), device=x.device) - (length.max() - length)[:, None]  # B P, negative: padding
    start, after = batch.start[:, None], (batch.start + batch.slots)[:, None]
    own = torch.where(q < start, q, q - after + batch.stop[:, None])  # index in the prompt, of head and tail
    # slots are appended to the prompt, behind its S columns, so that one index reaches both
    index = torch.where((q >= start) & (q < after), S + q - start, own + batch.offset[:, None]).clamp(min=0)
    mask = (q >= 0).long()
    embeds = torch.cat([x, slots.to(x.dtype)], 1).take_along_dim(index[..., None], 1) * mask[..., None].to(x.dtype)
    if where is not None:
        q = torch.cat([batch.positions, where], 1).take_along_dim(index, 1)
    return Prefix(embeds, mask, q.clamp(min=0) * mask, slots)


class Lora:
    """The trained LoRA layers of the frozen base model, if any, and the switch that says in which pass they act."""

    def __init__(self):
        self.layers, self.weights = [], {}

    def add(self, base, which: str, r: int, alpha: int, only: list | None, dropout: float, seed: int) -> None:
        """LoRA on the projections `which` (letters of q k v o) of the layers `only`, or of all."""
        try:
            from peft import LoraConfig
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise core.Failure("LoRA needs peft: pip install peft, or run without it") from error
        names = [f"{letter}_proj" for letter in which]
        shape = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "layers_to_transform": only}
        try:
            base.add_adapter(LoraConfig(target_modules=names, **shape))
        except ValueError as error:
            line = f"LoRA: a {type(base).__name__} has no layers {', '.join(names)}: run without it, or use a Llama"
            raise core.Failure(line) from error
        self.layers = [m for m in base.modules() if isinstance(m, LoraLayer)]
        self.weights = {name: p for name, p in base.named_parameters() if "lora_" in name}
        for name, p in self.weights.items():
            p.data = p.data.float()  # whatever the base is in
            if "lora_A" in name and not p.is_meta:
                spread = 1 / math.sqrt(p.shape[1])
                generator = torch.Generator(p.device).manual_seed(core.derived_seed(seed, "init", name))
                p.data.uniform_(-spread, spread, generator=generator)

    @contextlib.contextmanager
    def switched(self, on: bool):
        """LoRA on or off for a while, without peft's own switch, which would also stop its gradients."""
        before = [layer._disable_adapters for layer in self.layers]
        for layer in self.layers:
            layer._disable_adapters = not on
        try:
            yield
        finally:
            for layer, disabled in zip(self.layers, before):
                layer._disable_adapters = disabled

    def recompute_with(self):
        """For checkpointing: the recomputation sees LoRA as the first pass did."""
        on = any(not layer._disable_adapters for layer in self.layers)
        return contextlib.nullcontext(), self.switched(on)


class Wire(nn.Module):
    """The frozen base model and all that stands between ids and its input: `build_prefix`, the one way to a code."""

    def __init__(self, args: Args, base, projection: Projection):
        super().__init__()
        self.args, self.base, self.projection = args, base.requires_grad_(False).eval(), projection
        self.pooled, self.lora = args.pooled, Lora()
        self.encodes = args.sender and args.seg_encoder == "lm"  # then LoRA acts where the base encodes
        self.adapter = self.pooler = None
        with torch.random.fork_rng(devices=[]):  # what the libraries draw for weights that are set here afterwards
            torch.manual_seed(core.derived_seed(args.seed, "init"))
            if args.pooling_mode == "select" and self.pooled:
                self.pooler = Selector(self.table.shape[1]).to(self.table.device)
                core.init_normal(self.pooler, args.seed)
            elif args.sender:
                gist, narrow = args.pooling_mode == "gist", args.compress_method != "none"
                self.pooler = Segmenter(self.table.shape[1], projection, narrow, gist).to(self.table.device)
                self.pooler.reset(args.seed, projection)
            elif args.adapter_type == "linear":
                self.adapter = linear_inverse(projection)
            else:
                d, k = projection.matrix.shape
                self.adapter = Adapter(k, d, args.adapter_hidden_mult, args.adapter_dropout, args.colorize)
                self.adapter.to(self.table.device).reset(args.seed, self.table if args.color_init == "vocab" else None)
            if self.pooled and not args.sender:
                self.pooler = self.make_pooler()
            if self.encodes:
                self.lora.add(base, "qkvo", args.enc_lora_r, 2 * args.enc_lora_r, None, 0.0, args.seed)
            elif self.pooled and args.use_lora:
                first = list(range(min(args.lora_layers, base.config.num_hidden_layers)))
                self.lora.add(base, "qv", args.lora_r, args.lora_alpha, first, args.lora_dropout, args.seed)
        self.to_train = [p for p in self.parameters() if p.requires_grad]

    def make_pooler(self) -> nn.Module:
        args, k = self.args, self.projection.matrix.shape[1]
        slots = math.ceil(args.max_length / args.ratios[0]) if args.pool_ratio else args.sequence_pooling_target
        if args.pooling_mode == "convolutional":
            pooler = Convolution(k)
        else:
            kind = Hierarchy if args.pooling_mode == "hierarchical" else QueryPooler
            pooler = kind(k, slots, positions=args.pool_positions == "sinusoid" and not args.legacy)
        core.init_normal(pooler, args.seed)
        for name, p in pooler.named_parameters():  # the library's own initialisation of these layers
            if "in_proj_weight" in name or "conv.weight" in name:
                nn.init.xavier_uniform_(p.flatten(1), generator=core.generator(args.seed, "init", name))
        return pooler.to(self.table.device)

    def train(self, mode: bool = True):
        super().train(mode)
        self.base.eval()
        for layer in self.lora.layers:
            layer.lora_dropout.train(mode)
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

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What is trained, but for LoRA."""
        return {name: m for name in ("adapter", "pooler") if (m := getattr(self, name)) is not None}

    # -- what a checkpoint holds
    def state(self, f1: float, epoch: int) -> dict:
        """Everything trained, the projection it was trained for, and its flags, under the documented names."""
        state, p = {name: module.state_dict() for name, module in self.parts.items()}, self.projection
        if self.lora.layers:
            state["lora"] = {n: p.detach() for n, p in self.lora.weights.items()}
        state |= {"compressor_projection": p.matrix, "compressor_mean": p.mean, "pca_explained_variance": p.captured}
        state |= {"token_rms": p.rms, "table_rms": p.table_rms}
        return state | {"config": vars(self.args), "best_f1": f1, "epoch": epoch}

    def load(self, state: dict, where: str) -> None:
        """Take over what the `state` of the file `where` holds; a part that it lacks stays as it is."""
        held = [name for name in self.parts if name in state]
        require(held, f"{where}: it holds no {' or '.join(self.parts)} for these flags")
        for name in held:
            self.parts[name].load_state_dict(state[name])
        lora = state.get("lora", self.lora.weights)
        require(self.lora.weights.keys() == lora.keys(), f"{where}: its LoRA does not fit these flags")
        for name, tensor in lora.items():
            self.lora.weights[name].data.copy_(tensor)

    # -- from ids to what the base model reads
    def embed(self, ids: Tensor) -> Tensor:
        return self.base.get_input_embeddings()(ids)

    def text_prefix(self, batch: Batch) -> Prefix:
        return Prefix(self.embed(batch.ids), batch.mask, batch.positions)

    def token_prefix(self, batch: Batch, decoder=None, projection: Projection | None = None, match: str = "") -> Prefix:
        """Every token through k values and back, unless given by the wire's own adapter, projection and --rms_match."""
        projection, x = projection or self.projection, self.embed(batch.ids)
        y = (decoder or self.adapter)(projection.compress(x))  # B S d
        y = rescale(y, x, match or self.args.rms_match, projection.rms)
        return Prefix(y.to(x.dtype), batch.mask, batch.positions, y)

    def snapped_prefix(self, batch: Batch, decoder=None) -> Prefix:
        """The token nearest to what each code was decoded to: what width compression is worth without its errors."""
        y = self.token_prefix(batch, decoder).code
        ids = nearest(self.table, y.flatten(0, 1))[1].view(batch.ids.shape)
        return Prefix(self.embed(ids), batch.mask, batch.positions)

    def encode(self, source: Batch) -> tuple[Tensor, Tensor | None]:
        """(code [C, M, d] in fp32, the positions of its slots [C, M] or none: counted) of the contexts `source`, one
        for each code. It sees nothing but the source: no question that stays text, and no batch mate's."""
        x = self.embed(source.ids)  # C L d
        part, valid = source.body(x.float())  # C N d, C N
        if not self.args.sender:
            code = self.pooler(self.projection.compress(part), valid, source.slots)  # C M k
            return rescale(self.adapter(code), part, self.args.rms_match, self.projection.rms), None
        positions = source.body(source.positions)[0]  # C N
        if self.args.pooling_mode == "select":
            code, index = self.pooler(part, source.body(self.states(x, source))[0], valid, source.slots)
            return code, positions.take_along_dim(index, 1)
        mean, average = segment_means(part, source)  # C M d, C M N
        where = (average @ positions[..., None].float()).squeeze(-1).round().long()  # C M
        context, gist = mean, self.args.pooling_mode == "gist"
        if self.encodes:
            asked = (mean + self.pooler.gist, where) if gist else ()
            states = self.states(x, source, *asked)  # C L (+ M) d
            context = average @ source.body(states[:, : x.shape[1]])[0]
            if gist:
                context = torch.cat([states[:, x.shape[1] :], context], -1)  # C M 2d
        elif gist:
            context = torch.cat([mean, mean], -1)
        code = self.pooler(mean, context, self.projection.mean)
        return rescale(code, part, "vocab", self.projection.rms), where

    def states(self, x: Tensor, source: Batch, appended: Tensor | None = None, where: Tensor | None = None) -> Tensor:
        """Last states of the base model, with the encoder's LoRA, of the embeddings x [C, L, d] and of the tokens
        `appended` [C, M, d] behind them at the positions `where` [C, M]: they see the whole source. fp32."""
        read = Prefix(x, source.mask, source.positions)
        if appended is not None:
            slot = torch.arange(where.shape[1], device=x.device) < source.slots[:, None]  # C M
            parts = (x, appended.to(x.dtype)), (source.mask, slot.long()), (source.positions, where)
            read = Prefix(*(torch.cat(pair, 1) for pair in parts))
        with self.lora.switched(self.encodes):
            return self.base.base_model(**read.inputs, use_cache=False).last_hidden_state.to(x.device).float()

    def coded_prefix(self, batch: Batch, code: Tensor, where: Tensor | None) -> Prefix:
        """[head | slots | tail] with the code [C, M, d] of each prompt's own context."""
        where = where if where is None else where[batch.of]
        return compose(self.embed(batch.ids), code[batch.of], batch, where)._replace(code=code)

    def segment_prefix(self, batch: Batch) -> Prefix:
        """The training-free rival: means of the body's embeddings over segments, at the scale of a prompt token."""
        source = batch.source()
        mean, average = segment_means(source.body(self.embed(source.ids).float())[0], source)
        where = (average @ source.body(source.positions)[0][..., None].float()).squeeze(-1).round().long()
        return self.coded_prefix(batch, rescale(mean, mean, "vocab", self.projection.rms), where)

    def worded_prefix(self, batch: Batch) -> Prefix:
        """The code as words: each slot replaced by the nearest row of the table."""
        code, where = self.encode(batch.source())
        rows = nearest(self.table, code.flatten(0, 1))[1][:, 0]
        return self.coded_prefix(batch, self.embed(rows.view(code.shape[:2])), where)

    def last_slot_prefix(self, batch: Batch) -> Prefix:
        """Each code with all its slots but the last taken from another context of the batch."""
        source = batch.source()
        code, where = self.encode(source)
        other, t = code.roll(1, 0), torch.arange(code.shape[1], device=code.device)
        taken = (t < source.slots[:, None] - 1) & (t < source.slots.roll(1)[:, None])  # C M
        return self.coded_prefix(batch, torch.where(taken[..., None], other, code), where)

    def build_prefix(self, batch: Batch) -> Prefix:
        """The one way from a prompt to what the model reads, in training and in every evaluation of the wire."""
        if not self.pooled:
            return self.token_prefix(batch)
        if self.args.legacy:
            return published_pooled_prefix(self, batch)
        return self.coded_prefix(batch, *self.encode(batch.source()))

    # -- the frozen model reads
    def reading(self):
        """LoRA as it is when the model reads a prefix: the encoder's off, the decoder's on."""
        return self.lora.switched(not self.encodes)

    def answer_logits(self, prefix: Prefix, gold: Tensor, gold_mask: Tensor) -> Tensor:
        """[B, K, V] in fp32: column j predicts gold token j, from one forward pass over [prefix | gold[:-1]]."""
        read = prefix.then(self.embed(gold[:, :-1]), gold_mask[:, :-1]).inputs
        return self.base(**read, logits_to_keep=gold.shape[1], use_cache=False).logits.float()


# ------------------------------------------------------------------------------------------------- model: the losses
class Objective(nn.Module):
    """The loss of a wire on one batch, and what it is made of. Under DDP each term is a mean over positions of which
    every process has another number: `weight` makes the mean over the processes the mean over all positions."""

    def __init__(self, wire: Wire, accelerator=None):
        super().__init__()
        self.wire, self.args, self.accelerator = wire, wire.args, accelerator

    def weight(self, count: Tensor) -> Tensor | float:
        return 1.0 if self.accelerator is None else core.weight_of(self.accelerator, count)

    def forward(self, batch: Batch, kce: float = 0.0, kd: float = 0.0, ae: float = 0.0) -> dict[str, Tensor]:
        """`loss` and its terms under the weights `kce`, `kd` (phase1b) and `ae` (our senders)."""
        if not self.wire.pooled:
            return self.width_terms(batch, kce, kd)
        if self.args.pooling_mode in ("mean_target", "hybrid_expand"):
            terms = self.slot_terms(batch)
            return terms | {"loss": terms["recon"], "gen": terms["recon"].detach()}
        return self.answer_terms(batch, ae)

    def width_terms(self, batch: Batch, kce: float, kd: float) -> dict[str, Tensor]:
        """Every token decoded, and in phase1b the answer read from it."""
        prefix = self.wire.token_prefix(batch)
        terms = self.reconstruction(prefix.code, self.wire.embed(batch.ids), batch.mask)
        loss = terms["recon"]
        if self.args.mode == "phase1b" and (self.args.lambda_kce or self.args.lambda_kd):
            terms |= self.objectives(prefix, batch, self.args.k_tokens, self.args.lambda_kd > 0)
            loss = loss + kce * terms["kce"]
            if self.args.lambda_kd:
                loss = loss + kd * terms["kd"]
        return terms | {"loss": loss}

    def slot_terms(self, batch: Batch) -> dict[str, Tensor]:
        """mean_target: each slot should be the prompt's mean. hybrid_expand: each token should be its nearest slot."""
        source = batch.source()
        return self.slot_loss(self.wire.encode(source)[0], source)

    def slot_loss(self, code: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Of codes [C, M, d] and what they were made from."""
        part, valid = batch.body(self.wire.embed(batch.ids).float())  # C N d, C N
        if self.args.pooling_mode == "mean_target":
            mean = (part * valid[..., None]).sum(1) / valid.sum(1)[:, None]  # C d
            valid = torch.arange(code.shape[1], device=part.device) < batch.slots[:, None]  # C M
            return self.reconstruction(code, mean[:, None].expand_as(code), valid)
        slot = torch.arange(part.shape[1], device=part.device) * batch.slots[:, None]
        slot = (slot // (batch.stop - batch.start)[:, None]).clamp(max=code.shape[1] - 1)  # C N
        return self.reconstruction(code.take_along_dim(slot[..., None], 1), part, valid)

    def answer_terms(self, batch: Batch, ae: float) -> dict[str, Tensor]:
        """The answer read from the slots; with our senders also distillation and the context rewritten from them. With
        them `right` of `scored` answer tokens are predicted."""
        prefix, gold, gold_mask = self.wire.build_prefix(batch), batch.gold, batch.gold_mask
        with self.wire.reading():
            logits = self.wire.answer_logits(prefix, gold, gold_mask)
            terms = {"gen": self.answer_ce(logits, gold, gold_mask)}
            loss, right = terms["gen"], (logits.argmax(-1) == gold) & gold_mask.bool()
            terms |= {"right": right.sum(), "scored": gold_mask.sum()}
            if self.args.pooling_mode == "select":
                loss = loss + self.draw_loss(logits.detach(), batch)
            if self.args.sender and self.args.lambda_kd:
                terms["kd"] = self.distillation(logits, batch, gold, gold_mask)
                loss = loss + self.args.lambda_kd * terms["kd"]
            if ae:
                terms["ae"] = self.rewriting(batch.source(), prefix.code)
                loss = loss + ae * terms["ae"]
        return terms | {"loss": loss}

    def draw_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """-advantage log P(words sent), mean over contexts; advantage: how many standard deviations the answers from a
        context's words are better than those from the other contexts' of the batch."""
        loss = F.cross_entropy(logits.transpose(1, 2), batch.gold, reduction="none") * batch.gold_mask  # B A
        each = loss.sum(1) / batch.gold_mask.sum(1)  # B
        asked = torch.bincount(batch.of)
        reward = -torch.zeros_like(asked, dtype=each.dtype).index_add(0, batch.of, each) / asked  # C
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        return self.weight(asked.sum()) * -(advantage * self.wire.pooler.log_chance).mean()

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

    def answer_ce(self, logits: Tensor, gold: Tensor, gold_mask: Tensor) -> Tensor:
        """Cross-entropy of the gold tokens, which the mask marks: the pad token may be the end token itself."""
        loss = F.cross_entropy(logits.flatten(0, 1), gold.masked_fill(gold_mask == 0, -100).flatten())
        return self.weight(gold_mask.sum()) * loss

    def objectives(self, prefix: Prefix, batch: Batch, K: int, distil: bool) -> dict[str, Tensor]:
        """Cross-entropy of the first K answer tokens and the KL to the text prompt; one pass each, whatever K."""
        gold, gold_mask = batch.gold[:, :K], batch.gold_mask[:, :K]
        logits = self.wire.answer_logits(prefix, gold, gold_mask)
        terms = {"kce": self.answer_ce(logits, gold, gold_mask)}
        return terms | ({"kd": self.distillation(logits, batch, gold, gold_mask)} if distil else {})

    @torch.no_grad()
    def teacher_logits(self, batch: Batch, gold: Tensor, gold_mask: Tensor) -> Tensor:
        """What the same model, without adapters, says after the text prompt: [B, K, V], in rows of --kd_chunk."""
        text, parts = self.wire.text_prefix(batch), []
        with self.wire.lora.switched(False):
            for rows in torch.arange(len(gold)).split(self.args.kd_chunk):
                part = Prefix(text.embeds[rows], text.mask[rows], text.positions[rows])
                parts.append(self.wire.answer_logits(part, gold[rows], gold_mask[rows]))
        return torch.cat(parts)

    def distillation(self, student: Tensor, batch: Batch, gold: Tensor, gold_mask: Tensor) -> Tensor:
        """tau^2 KL(teacher | student) over the valid gold positions, fp32."""
        tau = self.args.kd_tau
        log_s = (student / tau).log_softmax(-1)  # B K V
        log_t = (self.teacher_logits(batch, gold, gold_mask) / tau).log_softmax(-1)
        kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)  # B K
        return self.weight(gold_mask.sum()) * tau * tau * (kl * gold_mask).sum() / gold_mask.sum().clamp(min=1)

    def rewriting(self, batch: Batch, code: Tensor) -> Tensor:
        """Cross-entropy of the body's own tokens after [head | slots | rewrite], without holding their logits. `batch`:
        the sources, with no tail."""
        wire = self.wire
        start = compose(wire.embed(batch.ids), code, batch, None)
        ask = rescale(wire.pooler.rewrite, code, "vocab", wire.projection.rms)  # d
        ask = ask.to(start.embeds.dtype).expand(len(batch.ids), 1, -1)
        start = start.then(ask, torch.ones_like(start.mask[:, :1]))
        ids, valid = batch.body(batch.ids)
        read = start.then(wire.embed(ids), valid.long()).inputs
        hidden = wire.base.base_model(**read, use_cache=False).last_hidden_state
        labels = F.pad(ids.masked_fill(~valid, -100), (start.mask.shape[1], 0), value=-100)
        head = wire.base.get_output_embeddings().weight  # under --device_map auto on another device than the table
        loss = core.next_token_loss(hidden.to(head.device), head, labels.to(head.device)).to(ids.device)
        return self.weight(valid.sum()) * loss


# ------------------------------------------------------------------------------ the published faults (--legacy alone)
def published_pooled_prefix(wire: Wire, batch: Batch) -> Prefix:
    """As published: padding is read as if it were text, nothing is rescaled, and the slots stand alone."""
    x = wire.embed(batch.ids)
    y = wire.adapter(wire.pooler(wire.projection.compress(x), None, batch.slots))  # B M d
    mask = torch.ones(y.shape[:2], dtype=torch.long, device=x.device)
    return Prefix(y.to(x.dtype), mask, mask.cumsum(1) - 1, y)


class PublishedObjective(Objective):
    """The losses as published: what training reads is not what inference will read."""

    def __init__(self, wire: Wire, accelerator, tokenizer):
        super().__init__(wire, accelerator)
        self.eos, self.bos = tokenizer.eos_token_id, tokenizer.bos_token_id or tokenizer.eos_token_id
        self.anchor = [self.bos, *tokenizer(f" {wire.args.answer_prefix}", add_special_tokens=False)["input_ids"]]

    def anchored(self, prefix: Prefix) -> Prefix:
        """A second anchor with a BOS inside, and padding attended."""
        ids = torch.tensor(self.anchor, device=prefix.mask.device).expand(len(prefix.mask), -1)
        mask = torch.ones_like(prefix.mask)
        return Prefix(prefix.embeds, mask, mask.cumsum(1) - 1).then(self.wire.embed(ids), torch.ones_like(ids))

    def answer_terms(self, batch: Batch, ae: float) -> dict[str, Tensor]:
        """An anchor that is seen in training only, and no end to learn."""
        prefix, gold_mask = self.anchored(self.wire.build_prefix(batch)), batch.gold_mask * (batch.gold != self.eos)
        with self.wire.reading():
            loss = self.answer_ce(self.wire.answer_logits(prefix, batch.gold, gold_mask), batch.gold, gold_mask)
        return {"gen": loss, "loss": loss}

    def slot_terms(self, batch: Batch) -> dict[str, Tensor]:
        """hybrid_expand: slots repeated and filled up with zeros; the root at zero has no finite gradient."""
        code, x = published_pooled_prefix(self.wire, batch).code, self.wire.embed(batch.ids).float()  # B M d, B S d
        if self.args.pooling_mode == "mean_target":
            return self.slot_loss(code, batch)
        repeated = code.repeat_interleave(max(1, x.shape[1] // code.shape[1]), 1)
        decoded = F.pad(repeated, (0, 0, 0, x.shape[1] - repeated.shape[1]))
        decoded = decoded * (rms(x) / decoded.square().mean(-1, keepdim=True).sqrt())
        return self.reconstruction(decoded, x, batch.mask)

    def objectives(self, prefix: Prefix, batch: Batch, K: int, distil: bool) -> dict[str, Tensor]:
        """Answers padded at the left, so K columns are mostly padding and BOS; a teacher index that forgets padding."""
        B, A = batch.gold.shape
        answer = batch.gold.masked_fill(batch.gold_mask == 0, self.eos)
        answer = torch.cat([torch.full((B, 1), self.bos, device=answer.device), answer[:, : A - 1]], 1)
        shift = (A - batch.gold_mask.sum(1))[:, None]  # pads to bring to the left
        at = torch.arange(A, device=answer.device) - shift
        gold = torch.where(at >= 0, answer.take_along_dim(at.clamp(min=0), 1), self.eos)[:, :K]
        logits = self.wire.answer_logits(self.anchored(prefix), gold, torch.ones_like(gold))
        labels = gold.masked_fill(gold == self.eos, -100)
        n = (labels != -100).sum().clamp(min=1)
        terms = {"kce": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / n}
        if distil:
            with torch.no_grad():
                embeds = self.wire.embed(torch.cat([batch.ids, gold], 1))
                full = self.wire.base(inputs_embeds=embeds, use_cache=False).logits
                at = batch.length[:, None] - 1 + torch.arange(gold.shape[1], device=gold.device)
                teacher = full.float().take_along_dim(at[..., None], 1)  # B K V
            tau = self.args.kd_tau
            log_s, log_t = (logits / tau).log_softmax(-1), (teacher / tau).log_softmax(-1)
            kl = F.kl_div(log_s, log_t, reduction="none", log_target=True)
            terms["kd"] = tau * tau * kl.sum(-1).mean()
        return terms


# ------------------------------------------------------------------------------------------ generation and base model
@torch.no_grad()
def greedy_generate(base, prefix: Prefix, max_new_tokens: int, stop: Tensor, ended=None):
    """(new ids [B, T], logits of the first [B, V]); a row ends at an id in `stop`, or where `ended(row ids)`."""
    mask, position = prefix.mask, prefix.positions[:, -1:]
    out = base(**prefix.inputs, use_cache=True, logits_to_keep=1)
    first, tokens = out.logits[:, -1].float(), []
    done = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    for step in range(max_new_tokens):
        token = torch.where(done, stop[0], out.logits[:, -1].float().argmax(-1))
        tokens.append(token)
        done = done | torch.isin(token, stop)
        if ended is not None:
            rows = torch.stack(tokens, 1).tolist()
            done = done | torch.tensor([ended(row) for row in rows], device=done.device)
        if done.all() or step == max_new_tokens - 1:
            break
        mask, position = torch.cat([mask, torch.ones_like(position)], 1), position + 1
        read = {"input_ids": token[:, None], "attention_mask": mask, "position_ids": position}
        out = base(**read, use_cache=True, past_key_values=out.past_key_values, logits_to_keep=1)
    return torch.stack(tokens, 1), first


def base_dtype(args: Args, cuda: bool) -> torch.dtype:
    name = args.dtype if args.dtype != "auto" else args.precision
    if name == "auto":
        half = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        name = half if cuda else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def base_on_paper(args: Args, dtype: torch.dtype):
    """The base model without its weights, on the meta device: its sizes are known before anything large is loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = args.model_id
    if path == "tiny":
        return core.load_backbone("tiny", dtype)[0].to("meta")
    reachable = Path(path).is_dir() or core.hub_ready()
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).to(dtype)
    except Exception as error:  # a damaged directory raises many types
        why = (str(error).splitlines() or [""])[0][:120] if reachable else "the hub cannot be reached"
        raise core.Failure(f"model {path}: {why}; instead: tiny, or a local model directory") from error


def load_base(args: Args, accelerator):
    """(frozen model, tokenizer) on its device. A large model without a GPU is refused, not crawled through."""
    cuda, spread = accelerator.device.type == "cuda", args.device_map == "auto"
    require(not (accelerator.sharded and spread), "FSDP and --device_map auto: drop one of the two")
    dtype, path, placed = base_dtype(args, cuda), args.model_id, {}
    if not cuda and path != "tiny":
        count = sum(p.numel() for p in base_on_paper(args, dtype).parameters())
        remedy = "use one (CUDA_VISIBLE_DEVICES, --device cuda), a smaller model or --model_id tiny"
        require(count < 2e9, f"{path} has {count:,} parameters and there is no CUDA device: {remedy}")
    if path != "tiny" and (spread or args.load_4bit):
        placed["device_map"] = "auto" if spread else {"": accelerator.device}
    base, tokenizer = core.load_backbone(path, dtype, four_bit=args.load_4bit, **placed)
    core.shard_frozen(base, accelerator)
    base = base if placed else base.to(accelerator.device)
    if spread:
        bring_back(base)
    return base, tokenizer


def bring_back(base) -> None:
    """Let the logits of a model that is spread over devices return to the table's device, where the loss is made."""
    table = base.get_input_embeddings()
    base.get_output_embeddings().register_forward_hook(lambda module, inputs, out: out.to(table.weight.device))


# ----------------------------------------------------------------------------------------------------------- data
def split_by_article(rows: list[dict], source: str) -> tuple[list[dict], list[dict]]:
    """(train, eval) rows of `source`: a tenth of its articles, or of its only article's passages, is held out."""
    key = "title" if len({row["title"] for row in rows}) > 1 else "context"
    names = sorted({row[key] for row in rows})
    require(len(names) > 1, f"{source} has one passage only: give --eval_file")
    names = set(shuffled(names, max(1, len(names) // 10), 0))
    held_out = [row for row in rows if row[key] in names]
    seen = {row["context"] for row in held_out}  # a passage may stand in two articles
    return [row for row in rows if row[key] not in names and row["context"] not in seen], held_out


def questions_in(path: str) -> int:
    """Questions in a SQuAD JSON or JSONL file, with an answer or without."""
    text = core.read_text(path)
    if path.endswith(".jsonl"):
        return sum(bool(line.strip()) for line in text.split("\n"))
    return sum(len(p["qas"]) for article in json.loads(text)["data"] for p in article["paragraphs"])


def shuffled(rows: list[dict], count: int, seed: int) -> list[dict]:
    """The first `count` rows (all, if it is not positive) of a shuffle, as the document draws its subsets."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows[: count if count > 0 else None]


def by_context(rows: list[dict], questions: int) -> list[list[dict]]:
    """The examples in the rows: each by itself, or for several `questions` a passage with up to as many of its own."""
    if questions == 1:
        return [[row] for row in rows]
    groups = {}
    for row in rows:
        groups.setdefault(row["context"], []).append(row)
    return [group[:questions] for group in groups.values()]


class Rows(NamedTuple):
    """Examples, each a list of rows that share a context (one row, unless several questions are asked of a code)."""

    train: list  # one list of examples for each number of facts of the curriculum, otherwise one
    evaluation: list
    fitted: list  # rows for PCA
    beyond: dict  # {number of facts: examples}: contexts of more facts than are trained on
    source: str
    dropped: int  # questions without an answer in the files


def load_rows(args: Args, train: int, evaluated: int) -> Rows:
    """Drawn with the document's seeds: training 0, PCA and evaluation 42. Training and PCA see no evaluated context."""
    dropped, questions, beyond = 0, args.questions, {}
    if args.train_file:
        rows, source = core.squad_rows(args.train_file), "file"
        asked = sum(map(questions_in, {args.train_file, args.eval_file} - {""}))
        same = args.eval_file in ("", args.train_file)
        dropped = asked - len(rows) if same else asked - len(rows) - len(core.squad_rows(args.eval_file))
        rows, held_out = split_by_article(rows, args.train_file) if same else (rows, core.squad_rows(args.eval_file))
        pools = [rows]
    elif args.dataset == "synthetic":
        held_out, source, pools = generated(args, evaluated, 42, "evaluation", args.facts), "generated", []
        known = {row["context"] for row in held_out}
        for facts in dict.fromkeys(facts for facts, _ in args.stages):
            pools.append(generated(args, max(train, args.pca_samples), args.seed, "training", facts, known))
        for facts in map(int, numbers(args.eval_facts)):
            rows = generated(args, evaluated, 42, "evaluation", facts)
            beyond[facts] = by_context(rows, min(questions, facts))
    else:
        rows, held_out = (core.squad_rows("rajpurkar/squad", split) for split in ("train", "validation"))
        source, pools = "squad", [rows]
    require(pools[-1], "every passage of the file stands in an evaluated article too: give --eval_file")
    shared = {row["context"] for row in pools[-1]} & {row["context"] for row in held_out}
    remedy = "use disjoint files, or give one file for both, which is then split"
    require(not shared, f"{len(shared)} passages are in both training and evaluation data: {remedy}")
    trained = [shuffled(by_context(rows, questions), train, 0) for rows in pools]
    evaluation = shuffled(by_context(held_out, questions), evaluated, 42)
    return Rows(trained, evaluation, shuffled(pools[-1], args.pca_samples, 42), beyond, source, dropped)


def generated(args: Args, count: int, seed: int, purpose: str, facts: int, known=frozenset()) -> list[dict]:
    """The rows of `count` generated contexts, none of them `known`."""
    rows = core.question_rows(count, seed, purpose, known, facts, min(args.questions, facts))
    return [row | {"title": "generated"} for row in rows]


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
    passage: str  # the context's text: what questions share

    def stop(self, args: Args) -> int:
        """Where the body ends: what follows stays text."""
        return self.context if args.question_scope == "kept" else self.tail


def cut_to(item: Item, positions: int, how: str, surprise: np.ndarray | None = None) -> Item:
    """The prompt as text of at most so many tokens: `head` keeps its beginning, `question_kept` the beginning of the
    context, `salience` the context's most surprising tokens (`random`: by any numbers in place of their surprise); the
    answer prefix stays, and but for `head` the question. A tail that alone exceeds the budget keeps its last tokens."""
    ids, keep_from = item.ids, item.tail if how == "head" else item.context
    room = positions - (len(ids) - keep_from)
    if room < 0:
        kept = ids[len(ids) - positions :]
    elif how in ("salience", "random"):
        free = max(0, min(room, keep_from) - item.start)
        chosen = item.start + np.sort(np.argsort(-surprise[item.start : keep_from], kind="stable")[:free])
        kept = ids[: min(item.start, room)] + [ids[i] for i in chosen] + ids[keep_from:]
    else:
        kept = ids[: min(room, keep_from)] + ids[keep_from:]
    dropped = len(ids) - len(kept)
    marks = {"start": min(item.start, room), "context": item.context - dropped, "tail": item.tail - dropped}
    return item._replace(ids=kept, **{name: max(0, at) for name, at in marks.items()})


SYSTEM = "Answer the question with a short phrase from the context and nothing else."


def tokenize(rows: list[dict], tokenizer, args: Args) -> list[Item]:
    """Prompt and answer are tokenised together and cut where the answer begins. If the tokenizer glues the prefix's
    last blank to the word after it, the answer owns that blank, for every prompt alike, in training and evaluation."""
    glued, chat = glues_blanks(tokenizer), args.use_chat_template
    require(not chat or tokenizer.chat_template, "--use_chat_template: this tokenizer has no chat template")
    texts, ends = [], []  # ends: of the context, and of the source, in characters
    for row in rows:
        text = f"Context: {row['context']}\nQuestion: {row['question']}\n"
        if chat:
            talk = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ends.append((text.index("Context: ") + len(f"Context: {row['context']}"), len(text)))
        texts.append(text + args.answer_prefix)
    shown = [text.rstrip(" ") if glued else text for text in texts]
    special = dict(add_special_tokens=not chat, verbose=False)  # a chat template has written its own
    prompts = tokenizer(shown, return_offsets_mapping=True, **special)
    joint = tokenizer([text + row["answers"][0] for text, row in zip(texts, rows)], **special)["input_ids"]
    items, blank = [], " " if glued and args.answer_prefix.endswith(" ") else ""
    for i, (row, ids, whole) in enumerate(zip(rows, prompts["input_ids"], joint)):
        answer = whole[len(ids) :]
        if whole[: len(ids)] != ids:  # merged across the boundary: cut there
            answer = tokenizer(blank + row["answers"][0], add_special_tokens=False)["input_ids"]
        offsets, start = prompts["offset_mapping"][i], int(ids[0] == tokenizer.bos_token_id)
        context = next((j for j in range(start, len(ids)) if offsets[j][1] > ends[i][0]), len(ids))
        tail = next((j for j in range(context, len(ids)) if offsets[j][0] >= ends[i][1]), len(ids))
        golds, answer = row["answers"][: None if args.references == "all" else 1], [*answer, tokenizer.eos_token_id]
        passage = row["context"]
        item = Item(row["id"], row["question"], golds, ids, answer, start, context, tail, shown[i], passage)
        if args.truncate == "context":
            item = cut_to(item, args.max_length, "question_kept")
        else:  # as published: the end goes, with the question
            ids, context, tail = ids[: args.max_length], min(context, args.max_length), min(tail, args.max_length)
            item = item._replace(ids=ids, context=context, tail=tail)
        items.append(item)
    return items


def glues_blanks(tokenizer) -> bool:
    """Whether a blank belongs to the word after it (as in byte-level BPE), so that no prompt may end in one."""
    cut, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Answer: ", "Answer: the"))
    return whole[: len(cut)] != cut


def slot_count(item: Item, args: Args, ratio: float | None = None) -> int:
    """Slots for one prompt at the `ratio`, or at --pool_ratio: at most one for each token of its body."""
    body, ratio = item.stop(args) - item.start, ratio or args.pool_ratio
    if args.pooling_mode == "convolutional":
        return max(1, body // 4)
    return max(1, min(body, math.ceil(body / ratio) if ratio else args.sequence_pooling_target))


def swapped(items: list[Item], args: Args) -> list[Item]:
    """Each question about another example's context: what is left when a code says nothing of its own. Each passage is
    replaced by one passage, the next, so that its questions still share one code."""
    first = {item.passage: item for item in items}
    following = dict(zip(first, [*list(first.values())[1:], *list(first.values())[:1]]))
    rows = []
    for item in items:
        other = following[item.passage]
        ids = other.ids[: other.context] + item.ids[item.context :]
        move = other.context - item.context
        rows.append(item._replace(ids=ids, context=other.context, tail=item.tail + move, passage=other.passage))
    return rows


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
    slots, stop = slots or [slot_count(i, args) for i in items], [i.stop(args) for i in items]
    sources = [tuple(i.ids[:end]) for i, end in zip(items, stop)]
    of = {source: c for c, source in enumerate(dict.fromkeys(sources))}  # what was coded, and its number
    shared = [of[source] for source in sources], [sources.index(source) for source in of]
    rows = (ids, mask, gold, gold_mask, offset, [i.start for i in items], stop, count, slots, *shared)
    return Batch(*(torch.tensor(row, device=device) for row in rows))


STOPS = ("<|eot_id|>", "<|im_end|>", "</s>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")


class Reader(NamedTuple):
    """The way from items to a batch and from ids to answers: what an evaluation needs beside the wire."""

    args: Args
    tokenizer: object
    accelerator: object
    stop: Tensor  # ids that end an answer

    @property
    def device(self):
        return self.stop.device

    def batch(self, items: list[Item], slots: list[int] | None = None, ratio: float | None = None) -> Batch:
        slots = slots or [slot_count(item, self.args, ratio) for item in items]
        return collate(items, self.args, self.tokenizer, self.device, slots)

    def texts(self, ids: Tensor, ends: list[str]) -> list[str]:
        """The answers in `ids` [B, T], each up to its stop token and to the first of the strings `ends` in it."""
        answers = []
        for row in ids.tolist():
            row = row[: next((at for at, token in enumerate(row) if token in self.stop), len(row))]
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            answers.append(text[: min([text.find(end) for end in ends if end in text], default=len(text))])
        return answers


def make_reader(args: Args, tokenizer, accelerator, device) -> Reader:
    known = tokenizer.get_vocab()
    stop = dict.fromkeys([tokenizer.eos_token_id, *(known[s] for s in STOPS if s in known)])
    return Reader(args, tokenizer, accelerator, torch.tensor(list(stop), device=device))


class Data(NamedTuple):
    """What a run reads, tokenised."""

    train: list  # lists of examples, of which each is a list of Items; one for each number of facts in the curriculum
    evaluation: list  # of Item; the questions of one context follow each other
    rows: list  # the rows that the evaluation items come from
    beyond: dict  # {number of facts: list of Item}
    counts: Tensor  # V: tokens of the PCA prompts
    source: str
    dropped: int  # questions without an answer in the files


def load_data(args: Args, tokenizer, vocab_size: int) -> Data:
    evaluated = args.samples if args.mode in ("baselines", "embed_sweep") else args.eval_samples
    trains = args.mode in TRAINED
    rows = load_rows(args, args.samples if trains else 1, evaluated)
    held_out = [row for example in rows.evaluation for row in example]
    counted = torch.tensor([token for item in tokenize(rows.fitted, tokenizer, args) for token in item.ids])
    unknown = tokenizer.unk_token_id is not None and bool((counted == tokenizer.unk_token_id).any())
    remedy = "its words are not in this model's vocabulary: use a reader from pretrain_backbone.py, or --train_file"
    require(args.dataset != "synthetic" or not unknown, f"--dataset synthetic: {remedy}")
    train = [examples(pool, tokenizer, args) for pool in rows.train] if trains else []
    evaluation = tokenize(held_out, tokenizer, args)
    beyond = {
        n: [item for example in examples(pool, tokenizer, args) for item in example] for n, pool in rows.beyond.items()
    }
    trained = (item for pool in train for example in pool for item in example)
    empty = sum(item.stop(args) <= item.start for item in itertools.chain(trained, evaluation))
    remedy = f"--max_length {args.max_length} leaves nothing of {empty} prompts to compress: raise it"
    require(not empty or args.mode != "pooling", remedy)
    counts = torch.bincount(counted, minlength=vocab_size)
    return Data(train, evaluation, held_out, beyond, counts, rows.source, rows.dropped)


def examples(pool: list[list[dict]], tokenizer, args: Args) -> list[list[Item]]:
    """The examples of `pool` tokenised, all at once."""
    items = iter(tokenize([row for example in pool for row in example], tokenizer, args))
    return [[next(items) for _ in example] for example in pool]


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


def by_length(items: list[Item], size: int) -> list[list[int]]:
    """Indices of the items in groups of `size`, of similar length; questions of one context stand together."""
    longest = {}
    for item in items:
        longest[item.passage] = max(len(item.ids), longest.get(item.passage, 0))
    order = sorted(range(len(items)), key=lambda i: (longest[items[i].passage], items[i].passage))
    return [order[at : at + size] for at in range(0, len(order), size)]


@torch.no_grad()
def evaluate(wire: Wire, items: list[Item], reader: Reader, prefix_of=None, slots=None, native=False) -> dict:
    """Greedy answers and their scores. Prompts of similar length share a batch; the batches are shared out between
    processes. `prefix_of(batch)`: another way to make the prefix than the wire's, which the model then reads without
    any LoRA, as it was before training; `slots`: of each item; `native`: the library's own `generate` on the token
    ids, which no code of ours has touched."""
    from accelerate.utils import gather_object

    args, tokenizer, began = reader.args, reader.tokenizer, time.perf_counter()
    training, own, prefix_of = wire.training, prefix_of is None, prefix_of or wire.build_prefix
    wire.eval()
    ends = [s.replace("\\n", "\n") for s in args.stop_strings.split(",") if s]
    ended = (lambda row: any(end in tokenizer.decode(row) for end in ends)) if ends else None
    groups, rows, engine = by_length(items, args.eval_batch_size), [], reader.accelerator
    shared = engine.num_processes > 1 and not engine.sharded  # under FSDP all must run the base equally often
    for group in groups[engine.process_index :: engine.num_processes] if shared else groups:
        batch = reader.batch([items[i] for i in group], slots and [slots[i] for i in group])
        prefix = prefix_of(batch)
        with wire.reading() if own else wire.lora.switched(False):
            ids, first = greedy_generate(wire.base, prefix, args.max_new_tokens, reader.stop, ended)
            if native:
                ends_at = {"eos_token_id": reader.stop.tolist(), "pad_token_id": tokenizer.pad_token_id}
                read = {"attention_mask": batch.mask, "max_new_tokens": args.max_new_tokens, "do_sample": False}
                ids = wire.base.generate(batch.ids, **read, **ends_at)[:, batch.ids.shape[1] :]
        top = first.topk(5, -1).indices  # B 5
        hit = top == batch.gold[:, :1]
        columns = torch.stack([hit[:, 0], hit.any(1), prefix.mask.sum(1), top[:, 0]], 1).tolist()
        errors = [None] * len(group)
        if prefix.code is not None and prefix.code.shape[1] == batch.ids.shape[1] and not wire.pooled:
            errors = reconstruction_rows(wire, batch, prefix.code).tolist()
        for i, text, values, error in zip(group, reader.texts(ids, ends), columns, errors):
            rows.append((i, text, *values, error))
    wire.train(training)
    rows = sorted(gather_object(rows) if shared else rows)
    _, said, top1, top5, positions, first_ids, errors = map(list, zip(*rows))
    result = scores(items, said, args, first_ids) | reconstruction_figures(errors)
    for name, column in (("first_tok_top1", top1), ("first_tok_top5", top5), ("prefill_positions", positions)):
        result[name] = float(np.mean(column))
    seconds = time.perf_counter() - began
    times = {"seconds": seconds, "seconds_per_sample": seconds / len(items)}
    return result | {"positions": positions, "recon_each": errors} | times


def reconstruction_rows(wire: Wire, batch: Batch, y: Tensor) -> Tensor:
    """[B, 6]: sums over a prompt's tokens of cosine, squared and relative error, both norms, and their number."""
    x, y, m = wire.embed(batch.ids).float(), y.float(), batch.mask
    error, norms = (y - x), (y.norm(dim=-1), x.norm(dim=-1))
    parts = (F.cosine_similarity(y, x, -1), error.square().mean(-1), error.norm(dim=-1) / norms[1].clamp(min=1e-12))
    return torch.stack([(p * m).sum(1) for p in (*parts, *norms, torch.ones_like(norms[0]))], 1)


def reconstruction_figures(errors: list) -> dict:
    """Means over all tokens of what `reconstruction_rows` gave; nothing for a prefix that decodes no tokens."""
    if not errors[0]:
        return {}
    cos, mse, rel, norm_y, norm_x, n = np.sum(errors, 0).tolist()
    ratio = norm_y / norm_x
    figures = {"recon_cosine_sim": cos / n, "recon_mse": mse / n, "recon_rel_error": rel / n, "norm_ratio": ratio}
    return figures | {"norm_flag": "TOO LOW" if ratio < 0.8 else "TOO HIGH" if ratio > 1.2 else "OK"}


def scores(items: list[Item], raw: list[str], args: Args, first_ids: list[int], how: str = "") -> dict:
    """Official SQuAD scores of `raw` predictions after extraction, their intervals over contexts, and the collapse
    detector."""
    said = [extract_answer(text, how or args.extract, args.extract_max_words) for text in raw]
    em, f1 = np.array([core.squad_scores(p, i.golds) for p, i in zip(said, items)]).T
    n, histogram, passages = len(items), Counter(map(normal, said)), [item.passage for item in items]
    figures = {"f1": float(f1.mean()), "em": float(em.mean()), "f1_se": standard_error(f1)}
    figures |= {
        name: core.bootstrap(x, 2000, clusters=passages) for name, x in (("f1_interval", f1), ("em_interval", em))
    }
    answers = [
        {"id": i.id, "question": i.question, "golds": i.golds, "pred_raw": r, "pred": p}
        for i, r, p in zip(items, raw, said)
    ]
    return figures | {
        "eval_samples": n,
        "extract": how or args.extract,
        "empty_rate": sum(not p.strip() for p in raw) / n,
        "collapse": collapse(said, [i.golds for i in items], first_ids, [i.answer[0] for i in items]),
        "pred_diversity": len(histogram) / n,
        "first_ids": first_ids,
        "prediction_histogram": histogram.most_common(10),
        "f1_each": f1.tolist(),
        "predictions": answers,
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


def same_answers(a: dict, b: dict) -> bool:
    """Whether two evaluations of the same questions gave the same texts."""
    return all(x["pred_raw"] == y["pred_raw"] for x, y in zip(a["predictions"], b["predictions"]))


@torch.no_grad()
def nearest(table: Tensor, y: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """(cosines, ids), each [T, count], of the table's rows nearest to y [T, d], BLOCK cosines at a time."""
    rows, step = F.normalize(table.float(), dim=1), max(1, BLOCK // len(table))
    parts = [(F.normalize(part.float(), dim=1) @ rows.T).topk(count, 1) for part in y.split(step)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


@torch.no_grad()
def token_recovery(wire: Wire, items: list[Item], reader: Reader) -> tuple[float, str]:
    """Share of the tokens of the first eight prompts that the nearest row recovers, and the first prompt as decoded."""
    batch, training = reader.batch(items[:8]), wire.training
    y = wire.eval().token_prefix(batch).code
    wire.train(training)
    valid = batch.mask.bool()
    recovered = nearest(wire.table, y[valid])[1][:, 0]
    decoded = reader.tokenizer.decode(recovered[: int(batch.length[0])])
    return float((recovered == batch.ids[valid]).float().mean()), decoded[:200]


def ceiling_cosine(wire: Wire, items: list[Item]) -> float:
    """Mean cosine of the linear inverse of the projection over these prompts' tokens: an adapter's untrained rival."""
    ids = torch.tensor([t for i in items for t in i.ids], device=wire.table.device)
    ids, counts = ids.unique(return_counts=True)
    x, projection = wire.table[ids].float(), wire.projection
    y = projection.compress(x) @ projection.matrix.T + projection.mean
    return float((F.cosine_similarity(x, y, -1) * counts).sum() / counts.sum())


def budget(items: list[Item], wire: Wire, args: Args, positions: list[int], ratio: float | None = None) -> dict:
    """Cost of a prompt on the wire beside that of its text, means over the prompts: positions at the receiver, values
    and bytes on the wire, operations of sender and receiver (two for each weight and token; attention not counted)."""
    bits, k = math.log2(len(wire.table)), wire.projection.matrix.shape[1]
    prefill, text = np.array(positions), np.array([len(i.ids) for i in items])
    values, kept, shorter, body = text * (k + (args.rms_match == "per_token")), 0 * text, np.ones(len(text)), text
    if wire.pooled:
        slots, body = (np.array(x) for x in zip(*((slot_count(i, args, ratio), i.stop(args) - i.start) for i in items)))
        values, kept, shorter = slots * k, np.maximum(0, prefill - slots), text / prefill
    lora = sum(p.numel() for p in wire.lora.weights.values())  # acts in one of the two
    base = sum(p.numel() for p in wire.base.base_model.parameters()) - wire.table.numel() - lora
    own = sum(p.numel() for module in wire.parts.values() for p in module.parameters())
    gists = values / k if args.pooling_mode == "gist" else 0
    sender = (base + lora) * (body + gists) if wire.encodes else 0 * text
    packed = [len(zlib.compress(item.passage.encode(), 9)) for item in items]
    means = {
        "prefill_positions": prefill,
        "text_positions": text,
        "wire_values": values,
        "wire_bytes_fp16": 2 * values + np.ceil(kept * bits / 8),  # what stays text is sent as ids
        "token_id_bytes": np.ceil(text * bits / 8),
        "actual_seq_ratio": shorter,
        "text_bytes_utf8": np.array([len(i.source.encode()) for i in items]),
        "context_bytes_zlib": np.array(packed),
        "prefill_attn_ratio": shorter**2,
        "sender_operations": 2 * (sender + own * body),
        "receiver_operations": 2 * (base if wire.encodes else base + lora) * prefill,
        "text_operations": 2 * base * text,
    }
    if wire.pooled:
        means |= {"slots": slots, "coded_tokens": body, "code_ratio": body / slots}
    return {name: float(np.mean(v)) for name, v in means.items()}


def run_eval(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run) -> dict:
    """Scores of a checkpoint and of the text prompt under every extraction: it lifts both."""
    rows = {}
    for name, prefix_of in (("wire", None), ("text", wire.text_prefix)):
        answered = evaluate(wire, data.evaluation, reader, prefix_of)
        raw = [p["pred_raw"] for p in answered["predictions"]]
        rows[name] = {"none": brief(answered)}
        for how in ("none", "first_n", "before_punct", "path_c"):
            again = scores(data.evaluation, raw, args, answered["first_ids"], how)
            rows[name][how] = rows[name].get(how, {}) | {k: again[k] for k in ("f1", "em", "f1_se", "f1_interval")}
            run.say(f"{name:5s} {how:13s} {shown(again)}")
        if run.main and name == "wire":
            write_predictions(run.dir / "predictions.jsonl", answered)
        leave_if_stopped(run)
    gain = {name: row["path_c"]["f1"] - row["none"]["f1"] for name, row in rows.items()}
    return rows | {"best_f1": rows["wire"][args.extract]["f1"], "gain_of_extraction": gain}


def leave_if_stopped(run: core.Run) -> None:
    """End a mode that does not train, between two of its evaluations, if a signal asked for it."""
    signum = run.stop_requested()
    require(not signum, "interrupted; the same command starts it again", 128 + signum)


# ------------------------------------------------------------------------------------------------------- baselines
@torch.no_grad()
def token_surprise(wire: Wire, items: list[Item], reader: Reader) -> list[np.ndarray]:
    """Each prompt token's negative log-likelihood under the base model, in one pass."""
    surprise = [None] * len(items)
    for group in by_length(items, reader.args.eval_batch_size):
        batch = reader.batch([items[i] for i in group])
        with wire.lora.switched(False):
            logits = wire.base(**wire.text_prefix(batch).inputs, use_cache=False).logits[:, :-1].float()
        nll = F.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")  # B S-1
        nll = F.pad(nll, (1, 0)).cpu().numpy()
        for i, row, o, n in zip(group, nll, batch.offset.tolist(), batch.length.tolist()):
            surprise[i] = np.concatenate([[0.0], row[o + 1 : o + n]])  # nothing predicts the first
    return surprise


def equal_positions(wire: Wire, items: list[Item], reader: Reader, positions: list[int], surprise: list) -> dict:
    """The training-free rivals at the prefill `positions` that the wire gave each prompt (or its text's, if fewer): the
    beginning of the text, of the context, the context's most surprising tokens, any of them, and means of segments."""
    rows, scopes = {}, ("kept",) if reader.args.questions > 1 else ("compressed", "kept")
    chance = [core.generator(0, "cut", item.passage) for item in items]  # questions of a context keep the same tokens
    chance = [torch.rand(len(item.ids), generator=g).numpy() for item, g in zip(items, chance)]
    for how in ("head", "question_kept", "salience", "random"):
        numbers = chance if how == "random" else surprise
        cut = [cut_to(item, n, how, nll) for item, n, nll in zip(items, positions, numbers)]
        tails = [len(item.ids) - (item.tail if how == "head" else item.context) for item in items]
        row = evaluate(wire, cut, reader, wire.text_prefix)
        row["tail_cut"] = sum(n < tail for n, tail in zip(positions, tails))
        rows[how if how in ("salience", "random") else f"token_budget_{how}"] = row
    for scope in scopes:
        there = reader._replace(args=dataclasses.replace(reader.args, question_scope=scope, legacy=False))
        ends = [item.stop(there.args) for item in items]
        slots = [max(1, min(e - i.start, n - i.start - len(i.ids) + e)) for i, e, n in zip(items, ends, positions)]
        rows[f"segment_mean_{scope}"] = evaluate(wire, items, there, wire.segment_prefix, slots)
    return rows


def pca_row(args: Args, wire: Wire, data: Data, reader: Reader) -> dict:
    """The document's "PCA M": M values for each token, by its linear inverse; the sequence is as long as before."""
    narrow = fit_projection(wire.table, data.counts, min(args.token_budget, wire.table.shape[1]), "pca", args.seed)
    inverse = linear_inverse(narrow)
    row = evaluate(wire, data.evaluation, reader, lambda batch: wire.token_prefix(batch, inverse, narrow))
    values = float(np.mean([len(item.ids) for item in data.evaluation])) * narrow.matrix.shape[1]
    row |= {"pca_explained_variance": narrow.captured, "pca_first_5_components": narrow.first}
    return row | {"values_per_prompt": values}


def run_baselines(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run) -> dict:
    """Every baseline of --baseline, each with its results.json; the summary compares them."""
    wanted = BASELINES if "all" in args.baseline.split(",") else args.baseline.split(",")
    items, rows, chat = data.evaluation, {}, data.evaluation
    if reader.tokenizer.chat_template and not args.use_chat_template:  # replay baselines are documented with it
        chat = tokenize(data.rows, reader.tokenizer, dataclasses.replace(args, use_chat_template=True))
    if {"token_budget", "segment_mean", "salience"} & set(wanted):
        surprise = token_surprise(wire, items, reader)
        equal = equal_positions(wire, items, reader, [args.token_budget] * len(items), surprise)
        rows |= {name: row for name, row in equal.items() if any(name.startswith(w) for w in wanted)}
    anchor = reader.tokenizer(args.answer_prefix.rstrip(" "), add_special_tokens=False)["input_ids"]
    ended = [i if i.ids[-len(anchor) :] == anchor else i._replace(ids=i.ids + anchor) for i in chat]
    decoder = None if args.ckpt_in else linear_inverse(wire.projection)
    ways = {
        "text": lambda: evaluate(wire, items, reader, wire.text_prefix, native=True),
        "pca": lambda: pca_row(args, wire, data, reader),
        "embed_raw": lambda: evaluate(wire, chat, reader, wire.text_prefix),
        "embed_anchor": lambda: evaluate(wire, ended, reader, wire.text_prefix),
        "snap": lambda: evaluate(wire, items, reader, lambda batch: wire.snapped_prefix(batch, decoder)),
    }
    for name in wanted:
        leave_if_stopped(run)
        if name in ways:
            rows[name] = ways[name]()
        if name == "text":
            rows["text_swapped"] = evaluate(wire, swapped(items, args), reader, wire.text_prefix)
        if name == "text" and chat is not items:
            rows["text_chat"] = evaluate(wire, chat, reader, wire.text_prefix, native=True)
    for name, row in rows.items():
        record = {"config": vars(args), "exact_match": row["em"], "f1_score": row["f1"]}  # the document's names
        record |= {"num_examples": row["eval_samples"], "n_examples": row["eval_samples"], "timestamp": time.time()}
        record |= {"total_time_sec": row["seconds"], "token_budget": args.token_budget}
        if run.main:
            core.write_json(run.dir / name / "results.json", record | brief(row))
            write_predictions(run.dir / name / "predictions.jsonl", row)
        run.say(f"{name:28s} {shown(row)}  positions {row['prefill_positions']:.1f}  {row['collapse']}")
    led = f"token_budget_{args.budget_mode}"
    text, replay = rows.get("text_chat", rows.get("text")), rows.get("embed_raw")
    return {
        "rows": {name: brief(row) for name, row in rows.items()},
        "token_budget": args.token_budget,
        "leading": next(name for name in (led, *rows) if name in rows),
        "text_equals_replay": same_answers(text, replay) if text and replay else None,
    }


# ----------------------------------------------------------------------------------------------------- embed sweep
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
    return y.to(x.dtype)


def embedding_stats(wire: Wire, counts: Tensor) -> dict:
    """The document's diagnostics of real prompt embeddings: RMS, spread, nearest rows, spectrum."""
    table = wire.table.detach()
    used = counts.nonzero()[:, 0].to(table.device)
    x, w = table[used].float(), counts[used.cpu()].float().to(table.device)  # U d, U
    size, (_, centre, covariance) = x.square().mean(1).sqrt(), table_moments(table, counts)
    mean = float((w * size).sum() / w.sum())
    deviation = float(((w * (size - mean).square()).sum() / w.sum()).sqrt())
    spectrum = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    spread = covariance.diagonal().sqrt()
    return {
        "token_rms": {"min": float(size.min()), "mean": mean, "max": float(size.max()), "std": deviation},
        "table_rms": wire.projection.table_rms,
        "dimension_mean": [float(centre.min()), float(centre.max())],
        "dimension_std": [float(spread.min()), float(spread.max())],
        "nearest_other_cosine": float(nearest(table, x, 2)[0][:, 1].mean()),  # the nearest is the row itself
        "spectrum": spectrum[:32].tolist(),
        "spectrum_total": float(spectrum.sum()),
    }


def sweep_row(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run, config: dict) -> dict:
    """Scores of the source text's embeddings under one transform, followed by the untransformed answer prefix."""

    def changed(batch: Batch) -> Prefix:
        x, t = wire.embed(batch.ids), torch.arange(batch.ids.shape[1], device=batch.ids.device)
        source = batch.mask * (t < (batch.offset + batch.stop)[:, None])  # B S
        y = transform(x, source, config, wire.table, args.legacy)
        return Prefix(torch.where(source[..., None].bool(), y, x), batch.mask, batch.positions)

    errors, began = 0, time.perf_counter()
    try:
        row = evaluate(wire, data.evaluation, reader, changed)
    except RuntimeError as error:
        if not args.legacy:
            raise
        errors = len(data.evaluation)  # as published: an exception is an empty answer
        run.say(f"{errors} errors stored as empty answers: {str(error).splitlines()[0]}")
        row = {"predictions": [{"pred_raw": ""}] * errors, "first_ids": [0] * errors}
        row["seconds"] = time.perf_counter() - began
    after = [p["pred_raw"].rsplit("Answer:", 1)[-1] for p in row["predictions"]]
    return row | scores(data.evaluation, after, args, row["first_ids"]) | {"errors": errors}


def run_sweep(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run) -> dict:
    """Each transform of --experiment, with a file of its own, and all of them by F1."""
    reader = reader._replace(args=dataclasses.replace(args, question_scope="compressed"))  # all but the prefix
    results = []
    for name, config in SWEEP.items() if args.experiment == "all" else [(args.experiment, SWEEP[args.experiment])]:
        leave_if_stopped(run)
        row = sweep_row(args, wire, data, reader, run, config)
        result = {k: row[k] for k in ("f1", "em", "f1_se", "f1_interval", "empty_rate", "errors", "collapse")}
        result |= {"experiment": name, "config": config, "legacy": args.legacy}
        result |= {"num_samples": row["eval_samples"], "time_sec": row["seconds"]}
        result["description"] = f"{config['type']} {config.get('target_scale', '')}".strip()
        results.append(result)
        if run.main:
            core.write_json(run.dir / f"{name}.json", result)
        run.say(f"{name:16s} {shown(row)}  empty {row['empty_rate']:.0%}")
    if run.main:
        core.write_json(run.dir / "embedding_stats.json", embedding_stats(wire, data.counts))
    ranked = sorted(results, key=lambda r: (-r["f1"], r["experiment"]))  # ties by name
    keys = ("experiment", "f1", "em", "empty_rate", "config")
    f1 = {r["experiment"]: r["f1"] for r in results}
    middle = [r for r in results if r["config"].get("target_scale", 0) >= 0.7]  # scales that should do no harm
    scaled = {"f1_min": min(r["f1"] for r in middle), "f1_max": max(r["f1"] for r in middle)} if middle else None
    if middle:
        scaled["empty_max"] = max(r["empty_rate"] for r in middle)
    failed = sum(bool(r["errors"]) for r in results)
    return {
        "total_experiments": len(results),
        "successful": len(results) - failed,
        "failed": failed,
        "baseline_f1": f1.get("baseline"),
        "batch_dist_f1": f1.get("batch_dist"),
        "scaled": scaled,
        "results": results,
        "sorted_by_f1": [{"rank": i + 1} | {k: r[k] for k in keys} for i, r in enumerate(ranked)],
    }


# ---------------------------------------------------------------------------------------------------------- train
def epoch_steps(args: Args, examples: int, accelerator) -> int:
    """Updates of a pass over so many examples."""
    return max(1, examples // (args.batch_size * accelerator.num_processes))


def ramp(args: Args, step: int, steps_per_epoch: int, cosine: float) -> float:
    """alpha of the generation losses before update `step` (counted from 0); `cosine` is its moving average."""
    if not args.anneal_gen_objectives:
        return 1.0
    if args.anneal_mode == "linear":
        return min(1.0, step / (args.anneal_epochs * steps_per_epoch))
    return float(step >= args.anneal_delay_steps if args.anneal_mode == "delayed" else cosine > args.gate_cos)


def rate(args: Args, step: int, total: int) -> float:
    """Factor of the learning rates: cosine to 0; our senders rise over their first 5 % before. Under a curriculum: 100
    updates up, then constant, and down to 0 over the last fifth, so that a late stage is learned at a full rate too."""
    if args.fact_curriculum:
        return min(1.0, (step + 1) / 100, 5 * (1 - step / total))
    rise = min(1.0, (step + 1) / max(1, 0.05 * total)) if args.sender else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * step / total))


def rewriting_weight(args: Args, step: int, total: int) -> float:
    """Weight of our senders' rewriting loss: every other update, falling to 0 at half of the training."""
    return max(0.0, 1 - 2 * step / total) * args.lambda_ae if args.sender and step % 2 else 0.0


PASSED = 0.9  # share of answer tokens that must be right, over 50 updates at the newest ratio, for the next stage


class Course:
    """The stages of --fact_curriculum and --multi_ratio: which contexts and which ratio an update trains on."""

    def __init__(self, args: Args, total: int, accelerator, saved: dict | None):
        self.args, self.total, self.accelerator, self.stages = args, total, accelerator, args.stages
        self.stage, self.seen = (saved["stage"], saved["seen"]) if saved else (0, 0)
        self.answers = (saved["answers"] if saved else torch.zeros(2)).to(accelerator.device)  # right, scored

    def state(self) -> dict:
        return {"stage": self.stage, "seen": self.seen, "answers": self.accelerator.reduce(self.answers, "mean")}

    def draw(self, step: int) -> tuple[int, float | None]:
        """(the place of the update's contexts in `Data.train`, its ratio): the newest ratio every other time."""
        facts, ratios = self.stages[self.stage]
        rng = random.Random(core.derived_seed(self.args.seed, "ratio", step))
        newest = len(ratios) == 1 or (self.args.fact_curriculum and rng.random() < 0.5)
        ratio = ratios[-1] if newest else rng.choice(ratios[:-1] if self.args.fact_curriculum else ratios)
        return list(dict.fromkeys(n for n, _ in self.stages)).index(facts), ratio

    def advance(self, step: int, ratio: float | None, terms: dict) -> str:
        """After the update `step`, counted from 1: the next stage if this one is passed, or has had its share of the
        updates; a line that says so, or none."""
        if self.stage == len(self.stages) - 1:
            return ""
        if "right" in terms and ratio == self.stages[self.stage][1][-1]:
            self.answers, self.seen = self.answers + torch.stack([terms["right"], terms["scored"]]), self.seen + 1
        share, last = 0.0, step >= self.total * (self.stage + 1) / len(self.stages)
        if self.seen == 50:
            share = float(torch.div(*self.accelerator.reduce(self.answers, "sum")))
        if self.seen == 50 or last:
            self.answers, self.seen = torch.zeros_like(self.answers), 0
        if share <= PASSED and not last:
            return ""
        self.stage += 1
        facts, ratios = self.stages[self.stage]
        why = f"{share:.3f} right" if share > PASSED else "its share of the updates is over"
        return f"[Stage] step {step}: {why}, on to {facts} facts at ratio {ratios[-1]:g}"


def decay_groups(wire: Wire, args: Args) -> list[dict]:
    """The encoder's LoRA under its own learning rate, all else under --adapter_lr; matrices decay."""
    groups, lora_lr = [], args.enc_lora_lr if wire.encodes else args.adapter_lr
    for module, lr in ((nn.ModuleList(wire.parts.values()), args.adapter_lr), (wire.base, lora_lr)):
        groups += [group | {"lr": lr, "peak": lr} for group in core.decay_groups(module, 0.01)]
    return groups


def red_flag(args: Args, top: float, cosine: float, evaluated: dict | None, text_f1: float) -> str:
    """Why an annealed run should stop now, or nothing. `top`: the highest moving average of the cosine so far."""
    if not args.anneal_gen_objectives:
        return ""
    remedy = "lower the lambdas or lengthen --anneal_epochs"
    if top > 0.70 and cosine < 0.60:
        return f"the cosine fell to {cosine:.2f} after {top:.2f}: {remedy}"
    if evaluated is not None and evaluated["f1"] == 0 and text_f1 > 0:
        return f"F1 is 0 in a full evaluation: {remedy}"
    return ""


class Journal:
    """diagnostics.jsonl, the document's log, beside log.jsonl. An earlier run's is renamed, never mixed with."""

    def __init__(self, args: Args, run: core.Run, size: int | None):
        """`size`: bytes of the log when the checkpoint that the run goes on from was written; none: a fresh run."""
        self.path, self.run = Path(args.diagnostic_log), run
        if run.main and size is None and self.path.exists():
            self.path.rename(f"{self.path}.bak-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}")
        elif run.main and self.size() > (size or 0):
            os.truncate(self.path, size)

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def write(self, kind: str, **row) -> None:
        if self.run.main:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as f:
                f.write(json.dumps({"type": kind, **finite, "timestamp": time.time()}, allow_nan=False) + "\n")
        self.run.log(type=kind, **row)


def training_batch(args: Args, data: Data, reader: Reader, step: int, pool: int, ratio) -> tuple[Batch, int]:
    """(this process's part of the batch of update `step`, prompt tokens of all parts)."""
    size, engine, pool = args.batch_size, reader.accelerator, data.train[pool]
    chosen = core.batch_indices(len(pool), size * engine.num_processes, args.seed, step)
    tokens = sum(len(item.ids) for i in chosen for item in pool[i])
    mine = chosen[engine.process_index * size :][:size]
    return reader.batch([item for i in mine for item in pool[i]], ratio=ratio), tokens


def train(args: Args, wire: Wire, objective: Objective, data: Data, reader: Reader, run: core.Run, saved) -> dict:
    """Train the wire, from the checkpoint `saved` if any. Returns the best full evaluation by F1, whose checkpoint is
    written at once, the text prompt's, the losses and the loop's figures."""
    accelerator, world = reader.accelerator, reader.accelerator.num_processes
    steps_per_epoch = epoch_steps(args, len(data.train[-1]), accelerator)
    optimizer = torch.optim.AdamW(decay_groups(wire, args), fused=True)
    system, optimizer = core.prepare(objective, optimizer, accelerator)
    torch.manual_seed(core.derived_seed(args.seed, "dropout", accelerator.process_index))
    state = {"cosine": torch.zeros(()), "top": 0.0, "history": [], "evaluated": [], "best": {"f1": -1.0}, "stages": []}
    if saved:
        wire.load(saved, "the checkpoint to resume from")
        state = saved["state"]
    cosine = state["cosine"].to(reader.device)  # its moving average; state["top"]: the highest that was seen
    journal = Journal(args, run, saved["journal_size"] if saved else None)
    text = evaluate(wire, data.evaluation, reader, wire.text_prefix)
    short = reader._replace(args=dataclasses.replace(args, max_new_tokens=10))  # of the quick evaluations
    run.say(f"Text prompt: F1 {text['f1']:.3f} ± {text['f1_se']:.3f}, EM {text['em']:.3f}")

    total = args.epochs * steps_per_epoch
    loop = core.Loop(run, system, optimizer, total, args.mode, saved, max_norm=1.0, params=wire.to_train)
    course = Course(args, total, accelerator, saved and saved["course"])
    gated = args.mode == "phase1b" and args.anneal_gen_objectives and args.anneal_mode == "cosine_gated"
    objective.train()
    while not loop.last:
        step, epoch, flag = loop.step, loop.step // steps_per_epoch, ""
        # only a flag that asks for the cosine may wait for the device
        alpha = ramp(args, step, steps_per_epoch, float(cosine) if gated else 0.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(args, step, total)
        pool, ratio = course.draw(step)
        batch, tokens = training_batch(args, data, reader, step, pool, ratio)
        ae = rewriting_weight(args, step, total)
        terms = system(batch, kce=alpha * args.lambda_kce, kd=alpha * args.lambda_kd, ae=ae)
        loss = terms["loss"]
        if world > 1:  # a term that this step leaves out still takes part in the averaging of gradients
            loss = loss + 0.0 * sum(p.sum() for p in wire.to_train)
        loop.backward(loss)
        try:
            norm = loop.update(tokens=tokens)
        except core.Failure as failure:  # its line and the document's log name the term that is not finite
            names = [name for name in ("recon", "gen", "kce", "kd", "ae", "loss") if name in terms]
            term = next((name for name in names if not terms[name].isfinite()), "gradient")
            journal.write("diverged", step=loop.step, term=term)
            raise core.Failure(f"{failure} (the term {term} is not finite)", failure.code) from failure
        if line := course.advance(loop.step, ratio, terms):
            state["stages"].append([loop.step, course.stage])
            run.say(line)
        loop.add(**{name: value for name, value in terms.items() if name not in ("right", "scored")})
        loop.add(grad_norm=norm)
        if "cos" in terms:
            new = accelerator.reduce(terms["cos"], "mean")  # flags may act on it: the same in every process
            cosine = torch.where(new.isfinite(), new if step == 0 else 0.9 * cosine + 0.1 * new, cosine)
        if gated or loop.due(10) or loop.last:
            state["top"] = max(state["top"], float(cosine))

        if loop.due(10) or loop.last:
            means = loop.means()
            row = train_row(args, wire, means, alpha, batch) | {"nonfinite_steps": loop.nonfinite_steps()}
            journal.write("train", step=loop.step, epoch=epoch, lr=optimizer.param_groups[0]["lr"], **row)
            if math.isfinite(means["loss"]):
                state["history"].append([loop.step, means["loss"]])
            said = {k: f"{means[k]:.3f}" for k in ("loss", "recon", "kce", "kd", "gen", "cos") if k in means}
            loop.bar.set_postfix(said)
            flag = red_flag(args, state["top"], float(cosine), None, text["f1"])
            require(not flag, f"red flag at step {loop.step}: {flag}", core.DIVERGED)
        if loop.due(args.quick_eval_every):  # to watch a run by: nothing is chosen by these few examples
            with loop.paused():
                quick = evaluate(wire, data.evaluation[: args.quick_eval_samples], short)
                run.say(f"Step {loop.step}: Quick F1 = {quick['f1']:.1%}, FirstTok@1 = {quick['first_tok_top1']:.1%}")
                row = {f"quick_{name}": quick[name] for name in ("f1", "first_tok_top1", "first_tok_top5")}
                journal.write("quick_eval", step=loop.step, epoch=epoch, **row)
        evaluating = loop.last or loop.due(args.eval_every * steps_per_epoch)
        if evaluating:
            with loop.paused():
                losses = [loss for at, loss in state["history"] if at > epoch * steps_per_epoch]
                evaluated = full_evaluation(wire, data, reader, run, epoch, losses)
                keep_evaluation(args, wire, run, journal, state, evaluated, loop.step, epoch)
            flag = red_flag(args, state["top"], float(cosine), evaluated, text["f1"])
        if evaluating or loop.due(args.save_every) or loop.stopping:
            state["cosine"] = cosine
            own = wire.state(state["best"]["f1"], epoch) | {"state": state, "course": course.state()}
            loop.save("last.pt", previous="last_previous.pt", journal_size=journal.size(), **own)
        require(not flag, f"red flag at step {loop.step}: {flag}", core.DIVERGED)
        loop.leave_if_stopped()
    run.say(f"Best F1: {state['best']['f1']:.3f}")
    return {k: state[k] for k in ("best", "history", "evaluated", "stages")} | {"text": text, "figures": loop.end()}


def train_row(args: Args, wire: Wire, means: dict, alpha: float, batch: Batch) -> dict:
    """A `train` line of diagnostics.jsonl, with the document's names."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    used = {f"gpu_{i}_allocated_gb": torch.cuda.memory_allocated(i) / 1e9 for i in gpus}
    d, k = wire.projection.matrix.shape
    row = {"loss": means["loss"], "recon_mse": means.get("mse"), "recon_cosine_sim": means.get("cos")}
    row |= {"recon_rel_error": means.get("rel"), "grad_norm": means["grad_norm"], "compression_ratio": d / k}
    row |= {"batch_size": args.batch_size, **used, "total_gpu_memory_gb": sum(used.values()), "gpu_count": len(gpus)}
    if args.mode == "phase1b":
        kce, kd = alpha * args.lambda_kce, alpha * args.lambda_kd
        generated = kce * means.get("kce", 0.0) + kd * means.get("kd", 0.0)
        row |= {"loss_recon": means["recon"], "loss_kce": means.get("kce"), "loss_kd": means.get("kd")}
        row |= {"effective_lambda_kce": kce, "effective_lambda_kd": kd, "effective_lambda": kce}
        row |= {"gen_loss_share": generated / max(abs(means["loss"]), 1e-12)}
        row |= {"cosine_sim": means["cos"], "mse": means["mse"]}
    if wire.pooled:
        kept = batch.slots if args.legacy else batch.start + batch.slots + batch.length - batch.stop
        row |= {"gen_loss": means["gen"], "mode": args.pooling_mode, "loss_kd": means.get("kd")}
        row |= {"loss_ae": means.get("ae"), "sequence_compression_ratio": float(batch.length.sum() / kept.sum())}
    return row


def full_evaluation(wire: Wire, data: Data, reader: Reader, run: core.Run, epoch: int, losses: list) -> dict:
    """A full evaluation and its block of log lines; `losses`: those that this epoch has logged."""
    evaluated = evaluate(wire, data.evaluation, reader)
    if not wire.pooled:
        evaluated["token_recon_acc"], evaluated["decoded"] = token_recovery(wire, data.evaluation, reader)
    run.say(f"Epoch {epoch + 1}: Avg loss: " + (f"{np.mean(losses):.4f}" if losses else "not logged yet"))
    if "recon_cosine_sim" in evaluated:
        run.say(
            f"Avg cosine similarity: {evaluated['recon_cosine_sim']:.3f}\n"
            f"Avg relative error: {evaluated['recon_rel_error']:.3f}\n"
            f"Norm ratio: {evaluated['norm_ratio']:.3f} {evaluated['norm_flag']}\n"
            f"Token reconstruction: {evaluated['token_recon_acc']:.3f}  {evaluated['decoded'][:80]!r}"
        )
    run.say(f"F1: {evaluated['f1']:.3f}\nEM: {evaluated['em']:.3f}\nFirstTok@1: {evaluated['first_tok_top1']:.3f}")
    for p, sums in zip(evaluated["predictions"][:3], evaluated["recon_each"]):
        line = f"  Expected: {p['golds'][0]!r}  Generated: {p['pred_raw']!r}"
        if sums:
            cos, _, _, norm_y, norm_x, n = sums
            line += f"  norms {norm_x / n:.3f} -> {norm_y / n:.3f} (x {norm_y / norm_x:.3f})  cosine {cos / n:.3f}"
        run.say(line)
    return evaluated


def keep_evaluation(args: Args, wire: Wire, run: core.Run, journal: Journal, state, evaluated, step, epoch) -> None:
    """Log a full evaluation; if it is the best so far, write its checkpoint and its answers."""
    names = "f1 em f1_se first_tok_top1 first_tok_top5 empty_rate norm_ratio recon_cosine_sim recon_rel_error "
    names += "token_recon_acc collapse eval_samples extract"
    # a missing cosine is absent, never 0: the document's status tables took 0 for a collapse
    row = {name: evaluated[name] for name in names.split() if evaluated.get(name) is not None}
    journal.write("full_eval", step=step, epoch=epoch, **row)
    state["evaluated"].append({"step": step} | {k: evaluated[k] for k in ("f1", "f1_interval", "em")})
    if evaluated["f1"] <= state["best"]["f1"]:
        return
    state["best"] = evaluated | {"epoch": epoch, "step": step}
    if run.main:
        for path in filter(None, (run.dir / wire.best_file, args.ckpt_out)):
            core.save_checkpoint(Path(path), wire.state(evaluated["f1"], epoch))
        write_predictions(run.dir / "predictions.jsonl", state["best"])
    run.say("New best F1! Saved checkpoint")


# ----------------------------------------------------------------------------------------------------------- main
STATUSES = {  # the document's word from an F1 on
    "phase1a": ((0.70, "SUCCESS"), (0.50, "PARTIAL"), (0, "BELOW TARGET")),
    "phase1b": ((0.70, "SUCCESS"), (0.50, "PARTIAL"), (0.30, "MODEST"), (0, "BELOW TARGET")),
    "pooling": ((0.30, "SUCCESS"), (0.15, "MARGINAL"), (0.05, "POOR"), (0, "FAILURE")),
}


def status_of(mode: str, f1: float, reference: float | None) -> str:
    """The document's word for an F1. A stand-in is judged by the same shares of its own text F1, `reference`, as the
    documented thresholds are of the documented one (0.36); there is no word where it cannot answer even the text."""
    if reference == 0:
        return "NO REFERENCE"
    share = f1 if reference is None else f1 / reference
    scale = 1.0 if reference is None else 1 / 0.36
    return next(word for least, word in STATUSES[mode] if share >= min(1.0, least * scale))


def beside(own: dict, items: list[Item], rows: dict[str, dict]) -> dict[str, dict]:
    """`rows` without their lists, each with the gap of the answers `own` to it: paired by question, over contexts."""
    passages, f1 = [item.passage for item in items], np.array(own["f1_each"])
    gaps = {name: core.bootstrap(f1 - np.array(row["f1_each"]), 2000, clusters=passages) for name, row in rows.items()}
    return {name: brief(row) | {"gap": gaps[name]} for name, row in rows.items()}


def rival(equal: dict[str, dict]) -> dict | None:
    """The best training-free row at the same positions, and the gap to it."""
    if not equal:
        return None
    name = max(equal, key=lambda n: equal[n]["f1"])
    return {"name": name, "f1": equal[name]["f1"], "gap": equal[name]["gap"]}


def in_bytes(item: Item, size: float, bits: float) -> int:
    """Positions of the prompt with as much of its context as `size` bytes hold, at `bits` for a token's id."""
    return len(item.ids) - item.context + item.start + min(item.context - item.start, int(8 * size / bits))


def point(args: Args, wire: Wire, data: Data, reader: Reader, text: dict, surprise: list, ratio: float | None) -> dict:
    """The wire at one ratio: its answers, what they rest on (`nulls`), the rivals at equal positions, its cost."""
    items, bits, k = data.evaluation, math.log2(len(wire.table)), wire.projection.matrix.shape[1]

    def answers(items: list[Item], prefix_of=None) -> dict:
        slots = None if args.legacy else [slot_count(item, args, ratio) for item in items]  # those cover the padding
        return evaluate(wire, items, reader, prefix_of, slots)

    own = answers(items)
    cost = budget(items, wire, args, own["positions"], ratio)
    rows = equal_positions(wire, items, reader, own["positions"], surprise)
    sizes = [2 * k * slot_count(item, args, ratio) for item in items]
    cut = [cut_to(item, in_bytes(item, size, bits), "question_kept") for item, size in zip(items, sizes)]
    nulls, equal_bytes = {}, evaluate(wire, cut, reader, wire.text_prefix)
    if args.question_scope == "kept":
        nulls["swapped"] = answers(swapped(items, args))
        bare = [cut_to(item, len(item.ids) - item.context + item.start, "question_kept") for item in items]
        nulls["no_context"] = evaluate(wire, bare, reader, wire.text_prefix)
    elif not args.legacy:  # the code may hold the answer: how little of it is enough, and what the answer itself costs
        nulls["one_slot"] = evaluate(wire, items, reader, slots=[1] * len(items))
        nulls["last_slot_alone"] = answers(items, wire.last_slot_prefix)
    if args.sender and args.pooling_mode != "select":
        nulls["as_words"] = answers(items, wire.worded_prefix)
    result = brief(own) | {"budget": cost, "share_of_text": own["f1"] / max(text["f1"], 1e-9)}
    result |= {"text": beside(own, items, {"text": text})["text"], "equal_positions": beside(own, items, rows)}
    result |= {"equal_bytes": beside(own, items, {"text": equal_bytes})["text"], "nulls": beside(own, items, nulls)}
    by_context = {}
    for item, f1 in zip(items, own["f1_each"]):
        by_context.setdefault(item.passage, []).append(f1)
    return result | {"f1_by_context": [round(float(np.mean(f1)), 4) for f1 in by_context.values()]}


def curve(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run, text: dict) -> tuple[dict, dict]:
    """({ratio: `point`}, {number of facts: text and the wire at each ratio}) of the best wire, the second on contexts
    of more facts than it was trained on."""
    points, beyond, surprise = {}, {}, token_surprise(wire, data.evaluation, reader)
    for ratio in args.ratios:
        row = points[f"{ratio:g}" if ratio else "fixed"] = point(args, wire, data, reader, text, surprise, ratio)
        best, floors = rival(row["equal_positions"]), {name: null["f1"] for name, null in row["nulls"].items()}
        said = "".join(f", {name.replace('_', ' ')} {f1:.3f}" for name, f1 in floors.items())
        run.say(
            f"Ratio {row['budget']['code_ratio']:.1f}: {shown(row)}  positions {row['prefill_positions']:.1f} of "
            f"{row['budget']['text_positions']:.1f}; {best['name']} {best['f1']:.3f}{said}"
        )
    for facts, items in data.beyond.items():
        rows = {"text": evaluate(wire, items, reader, wire.text_prefix)}
        for ratio in args.ratios:
            slots = [slot_count(i, args, ratio) for i in items]
            rows[f"{ratio:g}" if ratio else "fixed"] = evaluate(wire, items, reader, slots=slots)
        beyond[str(facts)] = {name: brief(row) for name, row in rows.items()}
        run.say(f"{facts} facts: " + ", ".join(f"{name} F1 {row['f1']:.3f}" for name, row in rows.items()))
    return points, beyond


def adopt(args: Args) -> tuple[Args, dict | None]:
    """The flags under --ckpt_in, and what it holds: `eval` takes the shape from the file, other modes must agree."""
    if not args.ckpt_in:
        return args, None
    state = core.load_checkpoint(Path(args.ckpt_in))
    require({"config", "compressor_projection"} <= state.keys(), f"{args.ckpt_in}: not a checkpoint of this script")
    config, k = state["config"], state["compressor_projection"].shape[1]
    if args.mode == "eval":
        shape = {name: config[name] for name in SHAPE}
        if config["mode"] != "pooling":
            shape["pooling_mode"] = ""
        return dataclasses.replace(args, **shape), state
    wanted = args.compress_dim if args.compress_method != "none" else k
    require(k == wanted, f"--ckpt_in {args.ckpt_in} holds k = {k}, --compress_dim asks for {wanted}")
    return args, state


def make_wire(args: Args, base, data: Data, state: dict | None = None) -> Wire:
    """The wire for these prompts, or the one in a checkpoint's `state`, whose projection is not fitted again."""
    table = base.get_input_embeddings().weight.detach()
    if state is None:
        return Wire(args, base, fit_projection(table, data.counts, args.compress_dim, args.compress_method, args.seed))
    matrix, mean = (state[k].to(table.device) for k in ("compressor_projection", "compressor_mean"))
    require(len(matrix) == table.shape[1], f"--ckpt_in: made for a model of width {len(matrix)}, not {table.shape[1]}")
    fitted = (state["pca_explained_variance"], [], state["token_rms"], state["table_rms"])
    wire = Wire(args, base, Projection(mean, matrix, *fitted))
    wire.load(state, args.ckpt_in)
    return wire


def rivals(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run, outcome: dict) -> dict:
    """Rows under the same protocol as the best evaluation of --mode phase1a and phase1b."""
    items, rows = data.evaluation, {"text": outcome["text"]}
    inverse, k = linear_inverse(wire.projection), wire.projection.matrix.shape[1]
    rows["pca"] = evaluate(wire, items, reader, lambda batch: wire.token_prefix(batch, inverse))
    rows["snap"] = evaluate(wire, items, reader, wire.snapped_prefix)
    bits = math.log2(len(wire.table))
    run.say(f"Width compression probes the adapter, it saves nothing: {16 * k} bits per token, its id {bits:.1f}")
    if args.rms_match != "vocab":  # the same adapter without the side information of one value per token
        rows["rms_vocab"] = evaluate(wire, items, reader, lambda batch: wire.token_prefix(batch, match="vocab"))
    return rows | {"token_budget": rows["text"]}


def summarise(args: Args, wire: Wire, data: Data, reader: Reader, run: core.Run, outcome: dict) -> dict:
    """summary.json of a training mode: the best evaluation, what it cost, and the rivals under the same protocol."""
    best, file = outcome["best"], run.dir / wire.best_file
    wire.load(core.load_checkpoint(file), str(file))
    wire.eval()
    points, beyond, equal = {}, {}, {}
    if wire.pooled:
        points, beyond = curve(args, wire, data, reader, run, outcome["text"])
        led = points.get(f"{args.pool_ratio:g}" if args.pool_ratio else "fixed") or next(iter(points.values()))
        equal, rows = led["equal_positions"], {"text": outcome["text"]}
        rows["token_budget"] = equal["token_budget_question_kept"]
    else:
        rows = rivals(args, wire, data, reader, run, outcome)
    keys = ("f1", "em", "f1_se", "f1_interval", "prefill_positions")
    summary = {"best_f1": best["f1"]}
    names = "em f1_se f1_interval em_interval first_tok_top1 first_tok_top5 recon_cosine_sim token_recon_acc "
    names += "norm_ratio empty_rate collapse pred_diversity prediction_histogram epoch eval_samples"
    summary |= {name: best.get(name) for name in names.split()}
    ended = outcome["evaluated"][-1]  # `best` is chosen on the examples it is reported on; this one is not chosen
    summary |= {"last_f1": ended["f1"], "last_f1_interval": ended["f1_interval"]}
    summary["chosen_from_evaluations"] = len(outcome["evaluated"])
    summary |= {name: getattr(args, name) for name in "k_tokens lambda_kce lambda_kd question_scope pool_ratio".split()}
    relative, (d, k) = args.dataset == "synthetic", wire.projection.matrix.shape
    summary |= {
        "compression": f"{d} → {k}",
        "method": args.compress_method,
        "samples": len(data.train[-1]),
        "pca_explained_variance": wire.projection.captured,
        "pca_ceiling_cos": ceiling_cosine(wire, data.evaluation),
        "pooling_mode": args.pooling_mode if wire.pooled else None,
        "M": args.sequence_pooling_target if wire.pooled and not args.pool_ratio else None,
        "budget": budget(data.evaluation, wire, args, best["positions"]),
        "stages": outcome["stages"],
        "curve": points,
        "by_ratio": by_ratio(points),
        "more_facts": beyond,
        "baselines_same_protocol": {name: {key: row[key] for key in keys} for name, row in rows.items()},
        "equal_positions": equal,
        "rival": rival(equal),
        "relative": relative,
        "share_of_text": best["f1"] / max(outcome["text"]["f1"], 1e-9),
        "status": status_of(args.mode, best["f1"], outcome["text"]["f1"] if relative else None),
        "train_loss": outcome["history"],
        "trained_parameters": sum(p.numel() for p in wire.to_train),
        "wall_sec": outcome["figures"]["train_seconds"],  # the document's name
    }
    if not wire.pooled:
        summary["snap_equals_text"] = same_answers(rows["snap"], rows["text"])
    return summary | outcome["figures"]


def by_ratio(points: dict[str, dict]) -> dict[str, list]:
    """The curve for a figure: [tokens for each slot, F1] of the wire, of what it rests on and of each rival."""
    lines = {}
    for row in points.values():
        f1 = {"wire": row, "text": row["text"]} | row["nulls"] | row["equal_positions"]
        for name, found in f1.items():
            lines.setdefault(name, []).append([row["budget"]["code_ratio"], found["f1"]])
    return lines


def write_card(run: core.Run, args: Args, wire: Wire, result: dict) -> None:
    figures = {"F1": result["best_f1"], "share of the text prompt's F1": result["share_of_text"]}
    figures |= {"F1 of the last evaluation": result["last_f1"], "parameters": result["trained_parameters"]}
    load = f"python latentwire_stage1.py --mode eval --model_id {args.model_id} --ckpt_in {run.dir / wire.best_file}"
    caveat = "The best F1 is chosen on the questions that it is reported on. Width compression saves no bits; a "
    caveat += "shorter prompt counts only beside text of as many positions (`equal_positions`): docs/latentwire.md."
    title, load = f"LatentWire {args.mode}", f"{load} --save_dir OTHER"
    core.model_card(run, result, title, args.model_id, figures, load, caveat)


def plan_of(args: Args, accelerator) -> dict:
    """What these flags would run, and a rough estimate of memory; on the meta device, where no model needs any."""
    dtype = base_dtype(args, accelerator.device.type == "cuda")
    base = base_on_paper(args, dtype)
    d = base.get_input_embeddings().weight.shape[1]
    k = d if args.compress_method == "none" else args.compress_dim
    require(k <= d, f"--compress_dim {k} exceeds the model's width {d}")
    linear = sum(m.weight.numel() for m in base.base_model.modules() if isinstance(m, nn.Linear))
    with torch.device("meta"):
        wire = Wire(args, base, Projection(torch.zeros(d), torch.zeros(d, k), None, [], 1.0, 1.0))
    own = [p for module in wire.parts.values() for p in module.parameters()] + list(wire.lora.weights.values())
    batch = args.batch_size * args.questions * args.max_length
    layers = 0 if args.mode == "phase1a" else base.config.num_hidden_layers  # phase1a trains on the table alone
    memory = core.memory_estimate(wire, batch, d, layers, dtype.itemsize == 2)
    if args.load_4bit:  # NF4: half a byte, and an fp32 scale for 64 weights, in place of each weight of a layer
        for part in ("weights_and_optimizer", "total"):
            memory[part] -= linear * (dtype.itemsize - 0.5625) / 1e9
    trains = args.mode in TRAINED
    steps = args.epochs * epoch_steps(args, args.samples, accelerator) if trains else 0
    return {
        "steps": steps,
        "tokens": steps * batch * accelerator.num_processes,
        "width": d,
        "k": k,
        "parameters": sum(p.numel() for p in own),
        "trained_parameters": sum(p.numel() for p in wire.to_train) if trains else 0,
        "memory_gb": memory,
    }


LENGTH = "epochs"
FREE = ("save_dir", "run_name", "diagnostic_log", "ckpt_out", "eval_batch_size", "save_every", "kd_chunk")
OUTPUTS = (
    "adapter_phase1_best.pt best_checkpoint.pt last*.pt predictions.jsonl */results.json "
    "rms_scale*.json baseline.json batch_dist.json embedding_stats.json"
).split()


def main(argv=None) -> dict:
    args = parse(argv)
    if not args.mode:  # --test alone: every mode in turn, each in a folder of its own
        words, results = list(sys.argv[1:] if argv is None else argv), {}
        for mode in MODES:
            start = ["--ckpt_in", f"{args.save_dir}/phase1a/adapter_phase1_best.pt"] if mode == "eval" else []
            results[mode] = main([*words, "--mode", mode, "--save_dir", f"{args.save_dir}/{mode}", *start])
        return results
    args, checkpoint = adopt(args)
    accelerator = core.engine(dataclasses.replace(args, precision="fp32"))  # --dtype is the base's alone
    if args.dry_run:
        return core.show_plan(plan_of(args, accelerator))
    with core.Run(args, args.save_dir, accelerator, "summary.json", OUTPUTS) as run:
        if done := run.finished(LENGTH, FREE):
            return done
        base, tokenizer = load_base(args, accelerator)
        V, d = base.get_input_embeddings().weight.shape
        require(args.input_dim in (None, d), f"--input_dim {args.input_dim} differs from the model's width {d}")
        reader = make_reader(args, tokenizer, accelerator, base.get_input_embeddings().weight.device)
        audit = core.causality_audit(base, V, 32)
        data = load_data(args, tokenizer, V)
        wire = make_wire(args, base, data, checkpoint)
        if args.grad_checkpoint:
            base.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": wire.lora.recompute_with})
        total = args.epochs * epoch_steps(args, len(data.train[-1]) if data.train else 0, accelerator)
        saved = run.checkpoint("last*.pt", total=total, arm=args.mode) if args.mode in TRAINED else None
        inputs = {"data": core.digest(data.train, data.evaluation, data.counts.numpy())}
        inputs |= {"tokenizer": core.tokenizer_digest(tokenizer), "base": core.base_digest(args.model_id, base)}
        inputs |= {"ckpt_in": core.digest(Path(args.ckpt_in))} if args.ckpt_in else {}
        run.start((*FREE, LENGTH), **inputs)
        run.say(f"LatentWire {args.mode}: {args.model_id}, {run.dir}")
        fitted, k = wire.projection, wire.projection.matrix.shape[1]
        run.say(f"RMS of the table's rows {fitted.table_rms:.4f}, of prompt tokens {fitted.rms:.4f}")
        if args.compress_method == "pca":
            run.say(f"PCA captured variance (top {k} components): {fitted.captured:.1%}")
        if wire.adapter is not None and args.mode in TRAINED:
            run.say(f"Adapter parameters: {sum(p.numel() for p in wire.adapter.parameters()):,}")
        if args.pad_side == "right":
            run.say("WARNING: --pad_side right reads the first answer token at a padded position")
        if args.legacy:
            run.say("WARNING: --legacy repeats published faults; its figures are a demonstration")
        if args.mode in TRAINED:
            objective = Objective(wire, accelerator)
            if args.legacy:
                objective = PublishedObjective(wire, accelerator, tokenizer)
            outcome = train(args, wire, objective, data, reader, run, saved)
            result = summarise(args, wire, data, reader, run, outcome)
            run.say(f"Status: {result['status']}")
        else:
            job = {"baselines": run_baselines, "embed_sweep": run_sweep, "eval": run_eval}[args.mode]
            result = job(args, wire, data, reader, run) | {"peak_mem_bytes": core.peak_memory()}
        counted = {"train": len(data.train[-1]) if data.train else 0, "evaluated": len(data.evaluation)}
        counted |= {"questions_per_context": args.questions, "unanswerable_dropped": data.dropped}
        result |= {"mode": args.mode, "config": vars(args), "legacy": args.legacy, "causality_max_abs_diff": audit}
        result["model"] = {"id": args.model_id, "width": d, "vocabulary": V, "dtype": str(base.dtype)}
        result = run.finish(result | {"data": {"source": data.source, **counted}})
        if args.mode in TRAINED:
            write_card(run, args, wire, result)
        return result


if __name__ == "__main__":
    core.cli(main, "--batch_size, --kd_chunk, --eval_batch_size or --max_length; or use --grad_checkpoint, --load_4bit")
