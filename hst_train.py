"""HST: eight variants of a "Harmonic Sequence Transformer", trained and decoded by one file. Do their additions help?

    x = E[ids] + position;  x = bottom(x), with early exit, depth or pattern gates;  x = middle(x);  x = top(x)
    h = LN(x);  logits = h E^T (tied);  z_k = horizon head(h), k = 2..H, through the same E
    loss = CE_1 + 0.5 sum_k 0.95^k CE_k / sum_k 0.95^k + auxiliary losses      on a quarter of the positions for k > 1

The middle is a lattice over the spine 0, 2, 4, 12, 36, 104, 304, ... (s_i = 2 (s_{i-1} + s_{i-2} + s_{i-3})), or sparse
matrix paths. Variants: v3_ultra v4_unified v4_1_hyperlattice v5 v6 v7_1_2_agile v8_2_crystalline chaoslogic, and the
control, `plain`. Nothing looks at a later token, at another row, or at a statistic of the whole sequence.

Variants     python hst_train.py --list-variants
Smoke test   python hst_train.py --variant v6 --test                                        CPU, offline, 30 s
Document     python hst_train.py --variant v3_ultra                                         GPU, fineweb-edu streamed
Offline      python hst_train.py --variant v5 --data local --tokenizer local --vocab_size 2048 --d_model 128 \\
                 --n_layers 4 --max_seq_len 128 --batch_size 8 --grad_accum 1 --max_steps 300    one core, 2 minutes
Generate     python hst_train.py --generate "The lattice" --ckpt runs/hst_v6/v6_final.pt --speculative
Expect       on the test source a loss near its entropy, 1.386 nats, and never below it: docs/hst.md
"""

import os

if __name__ == "__main__":  # the allocator reads this when torch is imported; importing this file changes nothing
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import bisect
import contextlib
import copy
import dataclasses
import gc
import importlib.util
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import core
from core import arg, require


class Variant(NamedTuple):
    """What sets a variant apart; everything else is shared."""

    control: str = "none"  # of the bottom stack: exit | depth | pattern (depth and pattern) | none
    patience: int = 1  # layers in a row that must be confident before a token exits
    middle: str = "none"  # complete | adaptive | hyper | none, and with --middle stack
    published: str = ""  # where the author's own middle is another: gated | places
    row_decoder: bool = False  # of his chunk decoders the one with a cache, which reads the whole row
    tied: bool = False  # the head is the embedding also with --middle stack
    middle_first: bool = False  # before the bottom stack
    ffn: int = 4  # FFN width over d_model
    fields: bool = False  # predictive fields over the lattice's layers in the horizon heads
    hyperbolic: bool = False  # Poincare embedding
    diamond: bool = False  # Diamond mixer in place of the FFN
    hebbian: bool = False  # fast weights in every block
    feedback: bool = False  # loop after the middle
    cache: str = "contiguous"  # contiguous | paged | compressed (and sparse)
    horizon: str = "none"  # harmonic | recursive | streamlined | none
    modes: tuple = ("token",)  # the first is the default
    draft: str = ""  # speculative decoding: full (always H tokens) | confident


HEAD_ROWS = 1024  # (position, offset) pairs whose logits are held at a time: no row's logits are ever held as a whole
BOTH, CRYSTALLINE = ("token", "chunk"), ("hyperbolic", "diamond", "hebbian", "feedback")
VARIANTS = {
    "v3_ultra": Variant("exit", middle="complete", tied=True, middle_first=True, ffn=2, horizon="harmonic"),
    "v4_unified": Variant("exit", middle="complete", horizon="harmonic", modes=BOTH),
    "v4_1_hyperlattice": Variant(middle="hyper", published="places", cache="paged", horizon="harmonic"),
    "v5": Variant("exit", 2, "adaptive", "gated", fields=True, horizon="recursive", modes=BOTH),
    "v6": Variant("exit", 2, "adaptive", "gated", True, horizon="recursive", modes=BOTH[::-1], draft="full"),
    "v7_1_2_agile": Variant("depth", 1, "adaptive", "gated", True, horizon="recursive", modes=BOTH, draft="confident"),
    "v8_2_crystalline": Variant(middle="hyper", horizon="streamlined", **dict.fromkeys(CRYSTALLINE, True)),
    "chaoslogic": Variant("pattern", 1, "adaptive", "gated", cache="compressed", horizon="recursive"),
}
KEY_INNOVATION = (  # in the words of the document
    "Complete Lattice Core with meta-fusion|Token/Chunk dual-mode|Paged KV Cache + Hyper-Lattice|"
    "Layer-aware predictive fields|Cross-attention caching|Speculative verification|Diamond Mixer + Feedback Loop|"
    "Compressed cache + task routing"
).split("|")
ALL = VARIANTS | {"plain": Variant()}  # the control: the same trunk and nothing else
ALIASES = dict(v3="v3_ultra", v4="v4_unified", v4_1="v4_1_hyperlattice", v7_1_2="v7_1_2_agile", v8_2="v8_2_crystalline")
SWITCHES = "middle control horizon fields paged compressed hebbian feedback hyperbolic diamond".split()  # of --off


def form(args) -> Variant:
    """The variant as --middle and --mode build it. The author's chunk modes have neither bottom nor top stack."""
    spec = ALL[args.variant]
    if args.middle == "stack":
        control = "none" if args.mode == "chunk" else spec.control
        spec = spec._replace(middle=spec.published or spec.middle, control=control)
    return spec


def mechanisms(spec: Variant) -> list[str]:
    """What --off can leave out of a variant: fields of `Variant`, and the cache by its kind."""
    return [name for name in SWITCHES if spec.cache == name or getattr(spec, name, False) not in (False, "none")]


def without(spec: Variant, off: str) -> Variant:
    """The variant with the mechanisms in the comma-separated `off` as `plain` has them."""
    fields = ["cache" if spec.cache == name else name for name in filter(None, off.split(","))]
    return spec._replace(**{field: getattr(ALL["plain"], field) for field in fields})


def also(name: str) -> list[str]:  # a second name of a flag, with underscores and with dashes
    return [f"--{name}", f"--{name.replace('_', '-')}"]


@dataclasses.dataclass
class Args(core.RunArgs):
    variant: str = arg("v3_ultra", f"{' '.join(VARIANTS)}, or plain", "variant")
    mode: Literal["token", "chunk"] | None = arg(None, "token or chunk; unset: the variant's first", "variant")
    middle: Literal["stack", "spine"] = arg("stack", "the author's architecture, causal; or a lighter one", "variant")
    off: str = arg("", f"comma-separated mechanisms to leave out ({' '.join(SWITCHES)}); unset: none", "variant")
    list_variants: bool = arg(False, "print the variants and their parameters at these sizes, then stop", "variant")
    params: bool = arg(False, "print parameters by component, then stop (--variant all: of every variant)", "variant")
    d_model: int = arg(768, "width", "model")
    n_layers: int = arg(16, "blocks", "model")
    n_heads: int | None = arg(None, "attention heads; unset: d_model / 64", "model")
    d_ff: int | None = arg(None, "FFN width; unset: 4 d_model (v3_ultra 2)", "model")
    match_params: int = arg(0, "choose the FFN width that gives this many parameters; 0: leave it", "model")
    max_seq_len: int = arg(512, "tokens in a row, and the position table", "model")
    chunk_size: int = arg(128, "tokens in a chunk (chunk mode)", "model")
    horizon: int = arg(8, "offsets predicted at once; 1 is the next token", "model")
    vocab_size: int | None = arg(None, "unset: 32000 (tokenizer byte 264, local 4096; data synthetic 64)", "model")
    dropout: float | None = arg(None, "unset: 0.1 with --middle stack as published, else 0", "model")
    exit_threshold: float = arg(0.93, "confidence above which a token leaves the bottom stack", "model")
    lattice_layers: int = arg(10, "gated encoder layers of the lattice (v5 to chaoslogic, --middle stack)", "model")
    lattice_paths: int = arg(48, "paths or places of the HyperLattice", "model", aliases=also("lattice_depth"))
    page_size: int = arg(64, "tokens in a page of the paged cache", "model")
    kv_sparsity: float = arg(0.1, "width of the compressed cache over d_model", "model")
    window: int = arg(128, "local window of the sparse attention", "model")
    gumbel_tau: float = arg(1.0, "temperature of the pattern selector", "model")
    feedback_iters: int = arg(2, "rounds of the feedback loop", "model")
    old_start: bool = arg(False, "first values of v8.2's recorded runs: more of the context than of the token", "model")
    grad_ckpt: bool = arg(False, "recompute each block in the backward pass", "model")
    compile: bool = arg(False, "torch.compile the blocks", "model")
    batch_size: int = arg(1, "rows in a micro-batch (and process)", "training")
    grad_accum: int = arg(16, "micro-batches in an update", "training", aliases=also("gradient_accumulation_steps"))
    max_steps: int = arg(100000, "updates", "training", aliases=also("max_training_steps"))
    max_seconds: float = arg(0.0, "end (and decay the rate) by training time, on a CPU CPU time; 0: off", "training")
    lr: float = arg(2e-4, "peak learning rate", "training", aliases=also("initial_lr"))
    warmup: int = arg(2000, "linear warm-up in updates, then linear to 0", "training", aliases=also("warmup_steps"))
    weight_decay: float = arg(0.01, "on matrices", "training")
    grad_clip: float = arg(1.0, "largest gradient norm", "training")
    optim: Literal["auto", "adamw8bit", "adamw"] = arg("auto", "auto: 8-bit with bitsandbytes on a GPU", "training")
    horizon_weight: float = arg(0.5, "weight of the horizon loss", "training")
    horizon_gamma: float = arg(0.95, "weight of offset k is gamma^k, normalised", "training")
    horizon_frac: float = arg(0.25, "share of the positions that the horizon loss scores", "training")
    save_dir: str | None = arg(None, "run directory; unset: runs/hst_VARIANT (--test: runs/test_VARIANT)", "training")
    save_every: int = arg(5000, "checkpoint every so many updates", "training")
    keep: int = arg(3, "periodic checkpoints kept; 0: all", "training")
    log_every: int = arg(100, "log every so many updates; 0: never", "training")
    eval_every: int = arg(5000, "evaluate every so many updates; 0: only at the end", "training")
    eval_rows: int = arg(64, "validation rows", "training")
    empty_cache_every: int = arg(50, "release cached GPU memory every so many updates; 0: never", "training")
    self_check: bool = arg(False, "check causality, cached decoding and gradients after training", "training")
    dataset: str = arg("HuggingFaceFW/fineweb-edu", "hub set (or folder) to stream, field `text`", "data")
    dataset_config: str = arg("sample-10BT", "its configuration", "data")
    data: str = arg("", "offline: synthetic, local, or a text file or folder; unset: --dataset", "data")
    tokenizer: str | None = arg(None, "hub name, directory, byte, local (BPE); unset: byte, or Mistral-7B-v0.1", "data")
    generate: str | None = arg(None, "continue this text with the checkpoint --ckpt; unset: train", "generation")
    ckpt: str = arg("", "checkpoint for --generate; needed there; unset: not used", "generation")
    max_new_tokens: int = arg(128, "tokens to generate", "generation")
    temperature: float = arg(0.0, "0: greedy", "generation")
    top_k: int = arg(0, "sample among the k likeliest; 0: all", "generation")
    top_p: float = arg(1.0, "sample among the likeliest that make up this probability", "generation")
    no_cache: bool = arg(False, "recompute the whole context for every token", "generation")
    speculative: bool = arg(False, "draft with the horizon heads (v6, v7_1_2_agile)", "generation")
    inject_file: str = arg("", "text to become a memory vector (v7_1_2_agile, chunk mode); unset: none", "generation")
    inject_at: int = arg(0, "first chunk that sees it", "generation")


SMALL = dict(d_model=64, n_heads=4, chunk_size=16, lattice_layers=4, lattice_paths=24, window=16, page_size=16)
TEST = SMALL | dict(n_layers=4, max_seq_len=64, batch_size=8, grad_accum=1, max_steps=200, lr=3e-3, warmup=10)
TEST |= dict(log_every=20, eval_every=100, eval_rows=64, save_every=100, self_check=True)
TEST |= dict(data="synthetic", device="cpu", threads=1)
# Flags that may differ when a run goes on: they change no training step and no final figure.
FREE = tuple(
    "save_dir save_every keep log_every eval_every empty_cache_every list_variants params "
    "generate ckpt max_new_tokens temperature top_k top_p no_cache speculative inject_file inject_at".split()
)
LENGTH = "max_steps"  # a larger value continues a finished run


def parse(argv=None) -> Args:
    args = core.parse_args(Args, TEST, argv, __doc__)
    args.variant = ALIASES.get(args.variant, args.variant)
    every = args.variant == "all" and (args.test or args.params)
    known = every or args.variant in ALL
    require(known, f"--variant {args.variant}: choose from {', '.join(VARIANTS)}, or plain (all: --test or --params)")
    core.require_positive(args, "d_model max_seq_len chunk_size horizon page_size window feedback_iters max_new_tokens")
    core.require_positive(args, "batch_size grad_accum max_steps save_every eval_rows lattice_layers")
    args.dropout = (0.1 if args.middle == "stack" else 0.0) if args.dropout is None else args.dropout
    require(args.n_layers >= 2 and args.lattice_paths >= 2, "--n_layers and --lattice_paths must be at least 2")
    args.n_heads = max(1, args.d_model // 64) if args.n_heads is None else args.n_heads
    D, heads = args.d_model, args.n_heads
    line = f"--d_model {D} is not divisible by --n_heads {heads}: leave --n_heads out (then d_model / 64)"
    require(heads >= 1 and D % heads == 0, line)
    require(D % 8 == 0, f"--d_model {D} is not divisible by 8")
    require(0 <= args.dropout < 1 and 0 < args.kv_sparsity <= 1, "--dropout must be in [0, 1), --kv_sparsity in (0, 1]")
    for name in ("horizon_frac", "horizon_gamma", "top_p"):
        require(0 < getattr(args, name) <= 1, f"--{name} must be in (0, 1]")
    require(args.lr > 0 and args.grad_clip > 0 and args.gumbel_tau > 0, "--lr, --grad_clip, --gumbel_tau: above 0")
    names = "warmup keep log_every eval_every empty_cache_every temperature top_k inject_at max_seconds horizon_weight"
    for name in names.split():
        require(getattr(args, name) >= 0, f"--{name} must not be negative")
    require(args.horizon < args.max_seq_len and args.max_seq_len >= 8, "--max_seq_len must exceed --horizon, and 7")
    args.tokenizer = args.tokenizer or ("byte" if args.data else "mistralai/Mistral-7B-v0.1")
    if args.vocab_size is None:
        small = {"byte": 264, "local": 4096}.get(args.tokenizer, 32000)
        args.vocab_size = 64 if args.data == "synthetic" else small
    require(args.data != "synthetic" or args.vocab_size >= 64, "--vocab_size: the synthetic source has 64 symbols")
    if every:
        return args
    args = settle(args, args.variant)
    if not args.ckpt:  # else the variant is the checkpoint's
        check_generation(args)
    return args


def check_generation(args: Args) -> None:
    draft = ALL[args.variant].draft
    require(not args.speculative or draft, f"--speculative: only v6 and v7_1_2_agile have it, not {args.variant}")
    require(not args.speculative or not args.no_cache, "--speculative needs the cache: drop --no_cache")
    injects = args.variant == "v7_1_2_agile" and args.mode == "chunk"
    require(not args.inject_file or injects, "--inject_file needs --variant v7_1_2_agile --mode chunk")


def settle(args: Args, variant: str) -> Args:
    """A copy of `args` for one variant: mode and directory filled in, and checked against what the variant has."""
    args, spec = dataclasses.replace(args, variant=variant), ALL[variant]
    args.mode = args.mode or spec.modes[0]
    require(args.mode in spec.modes, f"--mode {args.mode}: {variant} supports {' and '.join(spec.modes)} mode only")
    if args.mode == "chunk":
        S, C = args.max_seq_len, args.chunk_size
        require(S % C == 0 and S >= 2 * C, f"--chunk_size {C} must divide --max_seq_len {S}, at least twice")
        require(args.n_layers >= 4, "--mode chunk needs --n_layers 4 or more")
    has, wanted = mechanisms(form(args)), set(filter(None, args.off.split(",")))
    require(wanted <= set(has), f"--off {args.off}: {variant} has {' '.join(has) or 'nothing to leave out'}")
    halves = args.horizon >= 4 and args.horizon & (args.horizon - 1) == 0  # a power of two: each spacing is half
    line = f"--horizon {args.horizon}: the recursive heads of {variant} need a power of two from 4 on"
    require(halves or without(spec, args.off).horizon != "recursive", line)
    args.save_dir = args.save_dir or f"runs/{'test' if args.test else 'hst'}_{variant}"
    return args


# ---------------------------------------------------------------------------------------------------------------- model
def spine(length: int, coefficients=(2, 2, 2)) -> list[int]:
    """Nodes below `length`: 0, 2, 4, then s_i = sum_k coefficients[k] s_{i-1-k}."""
    nodes = [0, 2, 4]
    while (following := sum(c * s for c, s in zip(coefficients, reversed(nodes)))) < length:
        nodes.append(following)
    return [s for s in nodes if s < length]


class Lattice(NamedTuple):
    """Ancestors of every position. Positions of one class share them: class 2i is spine node i, class 2i + 1 the gap
    after it. M nodes, C = 2M classes, L levels; every ancestor lies strictly before the position."""

    cls: Tensor  # S
    count: Tensor  # C M: directed paths from a position of the class to the node
    level: Tensor  # C M: fewest hops, 0 where the node is no ancestor
    order: Tensor  # C M: ancestors nearest first, then padding
    n_anc: Tensor  # C
    weights: Tensor  # C L M: counts of one level, each row summing to one (or zero)
    descent: Tensor  # S: index of the largest spine node before the position, -1 at position 0


def lattice_tables(length: int) -> Lattice:
    nodes = spine(length)
    M = len(nodes)
    with torch.device("cpu"):  # tables are real even where the model is built on the meta device
        count, level = torch.zeros(2 * M, M, dtype=torch.long), torch.full((2 * M, M), M)  # M: farther than any
        for c in range(2 * M):
            i, gap = divmod(c, 2)
            for parent in [i] if gap else range(i - 3, i) if i >= 3 else []:
                count[c, parent] += 1
                count[c] += count[2 * parent]
                hops = level[2 * parent] + 1
                hops[parent] = 1
                level[c] = torch.minimum(level[c], hops)
        level *= count > 0
        cls = torch.tensor([2 * (bisect.bisect_right(nodes, t) - 1) + (t not in nodes) for t in range(length)])
        n_anc = (count > 0).sum(1)
        order = torch.where(count > 0, torch.arange(M), -1).sort(1, descending=True)[0].clamp(min=0)
        levels = torch.arange(1, max(1, int(level[cls].max())) + 1)
        weights = count[:, None] * (level[:, None] == levels[:, None])  # C L M
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
        descent = torch.tensor([bisect.bisect_left(nodes, t) - 1 for t in range(length)])
        return Lattice(cls, count, level, order, n_anc, weights, descent)


class State:
    """What decoding remembers of the tokens it has seen: `length`, and buffers that modules fill under their own key.
    They are indexed by position: to forget all but the first k tokens is a change of `length` alone. Chunk mode has
    three more inside: of the stack over chunks, the decoder's tokens, and the memory that its cross-attention reads."""

    def __init__(self, batch: int, capacity: int, page: int = 0, pages: int | None = None, rollback: bool = True):
        self.batch, self.capacity, self.length, self.rollback = batch, capacity, 0, rollback
        self.buffers: dict[str, Tensor] = {}
        self.pages = Pages(batch, capacity, page, pages) if page else None
        self.chunks = self.local = self.memory = None  # chunk mode
        self.floor = 0  # tokens of the chunks that are in the memory: these cannot be forgotten any more

    def buffer(self, key: str, shape: tuple, like: Tensor) -> Tensor:
        """[batch, *shape] zeros at first use, with the dtype and device of `like`."""
        if key not in self.buffers:
            self.buffers[key] = like.new_zeros((self.batch, *shape))
        return self.buffers[key]

    def append(self, key: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, h, n, d] behind the `length` ones there are; returns all of them."""
        if self.pages:
            return tuple(self.pages.append(f"{key}.{name}", x, self.length) for name, x in (("k", k), ("v", v)))
        end, out = self.length + k.shape[2], []
        for name, x in (("k", k), ("v", v)):
            whole = self.buffer(f"{key}.{name}", (k.shape[1], self.capacity, k.shape[3]), k)
            whole[:, :, self.length : end] = x
            out.append(whole[:, :, :end])
        return tuple(out)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. ValueError where that cannot be exact."""
        if length == self.length:
            return
        if not self.rollback:
            raise ValueError("Hebbian fast weights are a running sum: they cannot roll back")
        if not self.floor <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}: the least is {self.floor}")
        self.length = length
        if self.pages:
            self.pages.resize(length)


class Pages:
    """Fixed pools of pages, one page table and free list for all layers. Pages in use: rows * ceil(length / page)."""

    def __init__(self, batch: int, capacity: int, page: int, pages: int | None):
        self.page, self.pools, most = page, {}, -(-capacity // page)
        self.table = torch.zeros(batch, most, dtype=torch.long)  # B max_pages
        self.total = batch * most if pages is None else pages
        self.free, self.held = list(range(self.total))[::-1], 0

    def resize(self, length: int) -> None:
        """Hold exactly the pages that `length` tokens need in every row."""
        needed, rows = -(-length // self.page), self.table.shape[0]
        if (needed - self.held) * rows > len(self.free):
            raise ValueError(f"out of pages: {length} tokens need {needed * rows} of {self.total}; raise the pool")
        while self.held < needed:
            self.table[:, self.held] = torch.tensor([self.free.pop() for _ in range(rows)])
            self.held += 1
        while self.held > needed:
            self.held -= 1
            self.free += self.table[:, self.held].tolist()

    def append(self, key: str, x: Tensor, length: int) -> Tensor:
        """Write x [B, h, n, d] at positions length, length + 1, ...; returns all positions gathered."""
        B, h, n, d = x.shape
        if key not in self.pools:
            self.pools[key] = x.new_zeros(self.total, h, self.page, d)
        pool, at = self.pools[key], torch.arange(length, length + n)
        pool[self.table[:, at // self.page].to(x.device), :, (at % self.page).to(x.device)] = x.transpose(1, 2)
        used = self.table[:, : self.held].to(x.device)  # B p
        return pool[used].transpose(1, 2).reshape(B, h, -1, d)[:, :, : length + n]


def wide(x: Tensor) -> Tensor:  # sums and probabilities are never taken in half precision
    return x.to(torch.promote_types(x.dtype, torch.float32))


def running_mean(x: Tensor, st: State | None, key: str) -> Tensor:
    """m_t = mean of x_0..x_t [B, n, D], in fp32; prefix sums are kept per position."""
    start, n = (st.length if st else 0), x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        sums = wide(x).cumsum(1)
        if st:
            kept = st.buffer(key, (st.capacity, x.shape[2]), sums)
            sums = sums + kept[:, start - 1 : start] if start else sums
            kept[:, start : start + n] = sums
        return (sums / torch.arange(start + 1, start + n + 1, device=x.device)[:, None]).to(x.dtype)


def at_spine(u: Tensor, nodes: list[int], st: State | None, key: str) -> Tensor:
    """u at the spine positions, [B, M, D]. Entries of nodes not reached yet are arbitrary; no position reads them."""
    if st is None:
        return u[:, [min(s, u.shape[1] - 1) for s in nodes]]
    kept = st.buffer(key, (len(nodes), u.shape[2]), u)
    low, high = (bisect.bisect_left(nodes, at) for at in (st.length, st.length + u.shape[1]))
    kept[:, low:high] = u[:, [s - st.length for s in nodes[low:high]]]
    return kept


class Out(nn.Linear):
    """A projection that writes into the residual stream: initialised smaller, by 1 / sqrt(2 n_layers)."""


def split_heads(x: Tensor, heads: int) -> Tensor:  # B n D -> B h n d
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with a key-value cache in `State`, or cross-attention to a memory.
    Compressed: keys and values are a linear map of a latent of width r, which alone is cached; and sparse: position t
    sees the last `window` positions and the spine. Training uses the same bottleneck and mask."""

    def __init__(self, args: Args, cache: str = "contiguous", heads: int = 0):
        super().__init__()
        D, self.dropout, self.window = args.d_model, args.dropout, args.window
        self.heads, bias = heads or args.n_heads, heads > 0  # the author's lattice has heads of its own, and biases
        self.q, self.out = nn.Linear(D, D, bias=bias), Out(D, D, bias=bias)
        self.rank = max(8, 8 * math.ceil(args.kv_sparsity * D / 8)) if cache == "compressed" else 0
        if self.rank:
            self.down = nn.Linear(D, self.rank, bias=False)
            nodes, places = torch.tensor(spine(args.max_seq_len)), torch.arange(args.max_seq_len)
            self.register_buffer("on_spine", torch.isin(places, nodes), persistent=False)
        self.kv = nn.Linear(self.rank or D, 2 * D, bias=bias)

    def project(self, x: Tensor) -> list[Tensor]:  # B n D -> k, v, each B h n d
        return [split_heads(part, self.heads) for part in self.kv(x).chunk(2, -1)]

    def keys(self, x: Tensor, st: State | None):
        """(k, v, mask) for the n positions of x: the mask is None (all keys), "causal", or [n, keys] booleans."""
        start, n = (st.length if st else 0), x.shape[1]
        query = torch.arange(start, start + n, device=x.device)[:, None]
        if self.rank:
            c, positions = self.down(x), query.T
            if st:
                kept = st.buffer(self.key, (st.capacity, self.rank), c)
                kept[:, start : start + n] = c
                first = max(0, start - self.window + 1)
                far = self.on_spine[:first].nonzero().flatten()
                positions = torch.cat([far, torch.arange(first, start + n, device=x.device)])[None]
                c = kept[:, positions[0]]  # only what the mask can show: at most window + M latents and the new ones
            seen = (positions <= query) & ((query - positions < self.window) | self.on_spine[positions])
            return *self.project(c), seen
        k, v = self.project(x)
        if st is None:
            return k, v, "causal"
        k, v = st.append(self.key, k, v)
        if n == 1 or not start:
            return k, v, None if n == 1 else "causal"
        return k, v, torch.arange(start + n, device=x.device) <= query

    def attend(self, x: Tensor, k: Tensor, v: Tensor, mask=None) -> Tensor:
        causal, drop = isinstance(mask, str), self.dropout if self.training else 0.0
        q, mask = split_heads(self.q(x), self.heads), None if causal else mask
        y = F.scaled_dot_product_attention(q, k, v, mask, drop, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, st: State | None = None, causal: bool = True) -> Tensor:
        return self.attend(x, *self.keys(x, st)) if causal else self.attend(x, *self.project(x))


class Diamond(nn.Module):
    """An invertible mixer in place of the FFN: rotate the halves, couple them additively, rotate back. u = (a, b):
    z = (a + b) / sqrt 2, w = (b - a) / sqrt 2; w += F(LN z); z += G(LN w); out ((z - w), (z + w)) / sqrt 2."""

    def __init__(self, D: int, width: int):
        super().__init__()
        d, w = D // 2, width // 2
        self.f, self.g = (nn.Sequential(nn.LayerNorm(d), nn.Linear(d, w), nn.GELU(), Out(w, d)) for _ in range(2))

    def rotate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        a, b = u.chunk(2, -1)
        return (a + b) * 0.5**0.5, (b - a) * 0.5**0.5

    def forward(self, u: Tensor) -> Tensor:
        z, w = self.rotate(u)
        w = w + self.f(z)
        z = z + self.g(w)
        return torch.cat([z - w, z + w], -1) * 0.5**0.5  # rotated back

    def inverse(self, y: Tensor) -> Tensor:
        z, w = self.rotate(y)
        z = z - self.g(w)
        w = w - self.f(z)
        return torch.cat([z - w, z + w], -1) * 0.5**0.5


def fast_weights(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, decay: float, start: Tensor | None = None, chunk: int = 128
) -> tuple[Tensor, Tensor]:
    """S_t = decay S_{t-1} + eta_t k_t v_t^T, o_t = S_t^T q_t, without a loop: (o [B, h, n, d], S_{n-1} [B, h, d, d]).
    q, k, v [B, h, n, d] and eta [B, h, n] in fp32. Inside a chunk a masked product; between chunks the states' own
    recurrence, written as a product with the powers of decay^chunk. No negative power occurs, so nothing overflows."""
    B, h, n, d = q.shape
    c = min(chunk, n)
    m = -(-n // c)
    start = q.new_zeros(B, h, d, d) if start is None else start
    weighted = k * eta[..., None]
    rest = decay ** torch.arange(n - 1, -1, -1, device=q.device, dtype=q.dtype)  # decay^(n-1-j)
    last = decay**n * start + (weighted * rest[:, None]).transpose(-1, -2) @ v
    pad = (0, 0, 0, m * c - n)
    q, weighted, v = (F.pad(x, pad).view(B, h, m, c, d) for x in (q, weighted, v))
    i = torch.arange(c, device=q.device)
    power = (i[:, None] - i).clamp(min=0)
    inside = (q @ weighted.transpose(-1, -2)) * (decay ** power.to(q.dtype)).tril() @ v  # B h m c d
    gains = (weighted * (decay ** (c - 1 - i).to(q.dtype))[:, None]).transpose(-1, -2) @ v  # B h m d d: of each chunk
    j = torch.arange(m, device=q.device)
    carry = (decay**c) ** (j[:, None] - 1 - j).clamp(min=0).to(q.dtype) * (j < j[:, None])  # m m: strictly earlier
    begin = ((decay**c) ** j.to(q.dtype))[:, None, None] * start[:, :, None]
    before = torch.einsum("mj,bhjde->bhmde", carry, gains) + begin
    across = (q * (decay ** (i + 1).to(q.dtype))[:, None]) @ before
    return (inside + across).flatten(2, 3)[:, :, :n], last


class Hebbian(nn.Module):
    """Fast weights of rank-one writes that fade by 0.95 a token; the state is zero at the start of every sequence."""

    def __init__(self, args: Args):
        super().__init__()
        D, heads = args.d_model, args.n_heads
        self.heads, self.norm, self.head_norm = heads, nn.LayerNorm(D), nn.LayerNorm(D // heads)
        self.qkv, self.rate = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, heads)
        # Their output has unit spread, the stream starts at 0.03: a gain of 0.1 buries the token under its context.
        self.start = 0.1 if args.old_start else 0.02 * (2 * args.n_layers) ** -0.5
        self.gain = nn.Parameter(torch.empty(D))

    def reset(self) -> None:
        self.gain.fill_(self.start)

    def forward(self, x: Tensor, st: State | None = None) -> Tensor:
        u = self.norm(x)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(u).chunk(3, -1))  # B h n d
        eta = self.rate(u).transpose(1, 2)  # B h n
        with torch.autocast(x.device.type, enabled=False):
            q, k = (F.normalize(wide(part), dim=-1) for part in (q, k))
            kept = st.buffer(self.key, (self.heads, q.shape[-1], q.shape[-1]), q) if st else None
            o, last = fast_weights(q, k, wide(v), wide(eta).sigmoid(), 0.95, kept)
            if st:
                kept.copy_(last)
            o = self.head_norm(o.to(self.head_norm.weight.dtype))
        return x + self.gain * o.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """What a layer computes is its `run`; with --grad_ckpt the backward pass computes it again."""

    def forward(self, x: Tensor, *rest, **more) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(self.run, x, *rest, use_reentrant=False, **more)
        return self.run(x, *rest, **more)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Block(Layer):
    """Pre-norm attention and FFN. `gates` [B, n, 1] weigh the branches; keys and values are of the ungated stream."""

    def __init__(self, args: Args, spec: Variant, cross: bool = False):
        super().__init__()
        D, width = args.d_model, args.d_ff
        self.norm1, self.attn = nn.LayerNorm(D), Attention(args, spec.cache)
        self.dropout, self.recompute, self.branches = args.dropout, args.grad_ckpt, args.middle == "stack"
        self.cross = Attention(args) if cross else None
        self.norm_cross = nn.LayerNorm(D) if cross else None
        self.mixer = Diamond(D, width) if spec.diamond else None
        if not spec.diamond:
            self.norm2, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, width), Out(width, D)
        self.hebbian = Hebbian(args) if spec.hebbian else None

    def run(self, x, st=None, gates=None, causal=True, memory=None) -> Tensor:
        branch = self.drop if self.branches else lambda x: x  # the author drops what a branch adds to the stream, too
        idle = st is not None and gates is not None and not self.training and not torch.stack(gates).any()
        if idle:  # no row uses this layer in this decoding step, but later tokens attend to its keys and values
            self.attn.keys(self.norm1(x), st)
            return x
        a = branch(self.attn(self.norm1(x), st, causal))
        x = x + (a if gates is None else gates[0].to(a.dtype) * a)
        if memory is not None:
            x = x + branch(self.cross.attend(self.norm_cross(x), *memory))
        if self.mixer is not None:
            x = self.mixer(x)
        else:
            hidden = self.drop(F.gelu(self.up(self.norm2(x))))  # B n F
            f = branch(self.down(hidden))
            x = x + (f if gates is None else gates[1].to(f.dtype) * f)
        return x if self.hebbian is None else self.hebbian(x, st)


class PostNorm(Layer):
    """The author's encoder layer (with `cross`: v5's decoder's), PyTorch's own: post-norm, ReLU, 8 heads, biases."""

    def __init__(self, args: Args, width: int, cross: bool = False):
        super().__init__()
        D, self.dropout, self.recompute = args.d_model, args.dropout, args.grad_ckpt
        self.attn, self.norm1, self.norm2 = Attention(args, heads=8), nn.LayerNorm(D), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, width), Out(width, D)
        self.cross, self.norm_cross = (Attention(args, heads=8), nn.LayerNorm(D)) if cross else (None, None)

    def run(self, x, st=None, causal=True, memory=None) -> Tensor:
        x = self.norm1(x + self.drop(self.attn(x, st, causal)))
        if memory is not None:
            x = self.norm_cross(x + self.drop(self.cross.attend(x, *memory)))
        return self.norm2(x + self.drop(self.down(self.drop(F.relu(self.up(x))))))


class Bottom(nn.Module):
    """The bottom stack under its control, each a pair of gates on a block's branches, token by token:

    exit     c_l = sigmoid(head_l(x_{l+1})), trained to predict the cosine between x_{l+1} and the last layer's output;
             in evaluation a token leaves after layer l >= 1 once c > threshold at `patience` layers in a row
    depth    d = d_min + (n - d_min) sigmoid(MLP(p)), p = softmax_4 of a running mean; layer l weighs clamp(d - l, 0, 1)
    pattern  depth, and one of four (attention, FFN) gates by a straight-through Gumbel choice from p"""

    def __init__(self, args: Args, spec: Variant, n_layers: int):
        super().__init__()
        D, self.control, self.patience, self.threshold = args.d_model, spec.control, spec.patience, args.exit_threshold
        self.blocks, self.tau = nn.ModuleList(Block(args, spec) for _ in range(n_layers)), args.gumbel_tau
        self.cap = math.inf  # of the predicted depth
        if self.control == "exit":
            self.heads = nn.ModuleList(nn.Linear(D, 1) for _ in range(n_layers))
        elif self.control != "none":
            self.d_min, self.read, self.task = n_layers // 2, nn.Linear(D, D), nn.Linear(D, 4)
            self.depth = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        if self.control == "pattern":
            self.patterns, self.choose = nn.Parameter(torch.zeros(n_layers, 4)), nn.Linear(4, 4 * n_layers)
            table = torch.tensor([[1, 1], [1, 0], [0, 1], [0.5, 0.5]])
            self.register_buffer("table", table, persistent=False)

    def reset(self) -> None:
        if self.control in ("depth", "pattern"):
            self.depth[2].bias.fill_(2.0)
        if self.control == "pattern":
            self.patterns.copy_(torch.tensor([1.0, 0, 0, 0]).expand_as(self.patterns))

    def forward(self, x: Tensor, st: State | None, aux: dict) -> Tensor:
        if self.control == "exit":
            return self.with_exits(x, st, aux)
        gates = [None] * len(self.blocks) if self.control == "none" else self.gates(x, st, aux)
        for block, pair in zip(self.blocks, gates):
            x = block(x, st, pair)
        return x

    def gates(self, x: Tensor, st: State | None, aux: dict) -> list:
        """The pair of gates of every block, each B n 1, from the predicted depth and (pattern) the chosen pattern."""
        L = len(self.blocks)
        p = wide(self.task(running_mean(self.read(x), st, self.key))).softmax(-1)  # B n 4
        depth = (self.d_min + (L - self.d_min) * wide(self.depth(p)).sigmoid()).clamp(max=self.cap)  # B n 1
        aux["depth"], aux["depth_loss"] = depth.squeeze(-1), depth.mean() / L
        weights = [(depth - i).clamp(0, 1) for i in range(L)]
        if self.control == "depth":
            return [(weight, weight) for weight in weights]
        scores = self.patterns + wide(self.choose(p)).unflatten(-1, (L, 4))  # B n L 4
        hard = F.one_hot(scores.argmax(-1), 4).to(scores.dtype)
        choice = (F.gumbel_softmax(scores, self.tau, hard=True) if self.training else hard) @ self.table  # B n L 2
        return [[weight * choice[..., i, j : j + 1] for j in (0, 1)] for i, weight in enumerate(weights)]

    def with_exits(self, x: Tensor, st: State | None, aux: dict) -> Tensor:
        exiting, states, scores = not self.training, [], []
        active, streak, depth = (torch.full_like(x[..., :1], v) for v in (1.0, 0.0, 0.0))  # each B n 1
        for i, (block, head) in enumerate(zip(self.blocks, self.heads)):
            x, depth = block(x, st, (active, active) if exiting else None), depth + active
            states.append(x)
            scores.append(wide(head(x.detach())))  # B n 1
            if exiting:
                # Frozen from the next layer on; layer 0 counts towards the streak, but nobody leaves right after it.
                streak = torch.where(scores[-1].sigmoid() > self.threshold, streak + 1, 0)
                active = active * (streak < self.patience) if i >= 1 else active
        aux["exit"], aux["depth"] = torch.cat(scores, -1), depth.squeeze(-1)  # B n L, B n
        if self.training:
            with torch.no_grad():
                last = wide(x)
                near = torch.stack([F.cosine_similarity(wide(s), last, dim=-1) for s in states], -1).clamp(0, 1)
            aux["exit_loss"] = F.binary_cross_entropy_with_logits(aux["exit"], near)
        return x


class CompleteLattice(nn.Module):
    """Multi-level attention over ancestors and a GRU along them, fused: x + MLP([u; h1; h2]), u = LN x.
    h1: 4-head attention over the levels of t's ancestors, each level a mean of its nodes, weighted by path counts, and
    through an MLP of its own. h2: a GRU over the ancestors' messages, nearest first, each scaled by its path count."""

    def __init__(self, args: Args, length: int):
        super().__init__()
        D, t, self.nodes = args.d_model, lattice_tables(length), spine(length)
        self.n_anc = t.n_anc[t.cls].tolist()  # of each position
        valid = t.weights.sum(-1) > 0  # C L
        own = torch.eye(len(valid), dtype=torch.bool, device="cpu")[..., None] & valid  # C C L: its own levels only
        own[~valid.any(1), 0, 0] = True  # no ancestors: any key, its result is not used
        tables = dict(cls=t.cls, order=t.order, weights=t.weights, has=t.n_anc > 0, mask=own.flatten(1))
        tables |= dict(last=(t.n_anc - 1).clamp(min=0), log_count=t.count.float().log1p()[..., None])
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.norm = nn.LayerNorm(D)
        levels = [(nn.Linear(D, D), nn.LayerNorm(D), nn.GELU(), nn.Linear(D, D)) for _ in range(valid.shape[1])]
        self.levels = nn.ModuleList(nn.Sequential(*level) for level in levels)
        self.q, self.kv, self.o = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.merge, self.norm1 = nn.Linear(2 * D, D), nn.LayerNorm(D)
        self.message, self.norm2 = nn.Linear(2 * D, D), nn.LayerNorm(D)
        self.weight = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 1))
        self.gru = nn.GRU(D, D, batch_first=True) if max(self.n_anc) > 1 else None  # one ancestor: nothing to run along
        self.gate = nn.Linear(2 * D, D)
        self.fuse = nn.Sequential(nn.Linear(3 * D, 2 * D), nn.LayerNorm(2 * D), nn.GELU(), Out(2 * D, D))

    def forward(self, x: Tensor, st: State | None, aux: dict) -> Tensor:
        B, n, D = x.shape
        start, u = (st.length if st else 0), self.norm(x)
        us = at_spine(u, self.nodes, st, self.key)  # B M D
        cls = self.cls[start : start + n]  # n
        levels = torch.einsum("clm,bmd->lbcd", self.weights.to(us.dtype), us)
        levels = torch.stack([mlp(f) for mlp, f in zip(self.levels, levels)], 2).flatten(1, 2)  # B C*L D
        k, v = (split_heads(part, 4) for part in self.kv(levels).chunk(2, -1))
        a = F.scaled_dot_product_attention(split_heads(self.q(u), 4), k, v, self.mask[cls])  # B 4 n d
        has = self.has[cls][:, None]  # n 1
        h1 = torch.where(has, self.norm1(self.merge(torch.cat([self.o(a.transpose(1, 2).flatten(2)), u], -1))), u)
        K = max(1, *self.n_anc[start : start + n])
        order = self.order[cls, :K]  # n K
        w_a, w_t = self.message.weight.chunk(2, 1)  # one 2D -> D map, its ancestor half run on M vectors only
        m = F.linear(us, w_a)[:, order] + F.linear(u, w_t, self.message.bias)[:, :, None]  # B n K D
        scale = F.softplus(self.weight(self.log_count))[..., 0][cls].gather(1, order)  # n K
        m = F.gelu(self.norm2(m)) * scale[..., None].to(m.dtype)
        if self.gru is None:
            g = m[:, :, 0]
        else:
            out = self.gru(m.flatten(0, 1))[0].view(B, n, K, D)
            g = out.take_along_dim(self.last[cls].view(1, n, 1, 1), 2)[:, :, 0]  # B n D: at the farthest ancestor
        z = self.gate(torch.cat([g, u], -1)).sigmoid()
        h2 = torch.where(has, z * g + (1 - z) * u, u)
        return x + self.fuse(torch.cat([u, h1, h2], -1))


class AdaptiveLattice(nn.Module):
    """L layers; layer l adds g_l F_l([u_t; u at the l-th spine node back from t]), g = router(running mean)."""

    def __init__(self, args: Args, length: int):
        super().__init__()
        D, descent = args.d_model, lattice_tables(length).descent
        self.nodes, layers = spine(length), min(10, 1 + int(descent.max()))
        self.register_buffer("descent", descent, persistent=False)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(layers))
        self.first = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(layers))
        self.second = nn.ModuleList(Out(D, D) for _ in range(layers))
        self.router = nn.Sequential(nn.Linear(D, 256), nn.ReLU(), nn.Linear(256, layers))

    def forward(self, x: Tensor, st: State | None, aux: dict) -> Tensor:
        start, n, deltas = (st.length if st else 0), x.shape[1], []
        g = self.router(running_mean(x, st, self.key + ".mean")).sigmoid()  # B n L
        for i, (norm, first, second) in enumerate(zip(self.norms, self.first, self.second)):
            u, back = norm(x), self.descent[start : start + n] - i  # n: index of the node i steps down
            us = at_spine(u, self.nodes, st, f"{self.key}.{i}")  # B M D
            w_u, w_c = first.weight.chunk(2, 1)
            hidden = F.gelu(F.linear(u, w_u, first.bias) + F.linear(us, w_c)[:, back.clamp(min=0)])
            deltas.append(g[..., i : i + 1] * (back >= 0)[:, None] * second(hidden))
            x = x + deltas[-1]
        aux["deltas"] = deltas  # L of B n D
        return x


class GatedStack(nn.Module):
    """The author's lattice of v5 to v7.1.2, causal: layer l replaces a share of the stream by what it makes of it,
    x += g_l (f_l(x) - x), g = router(running mean). Its FFNs are 8/3 D wide: 2048 at his width of 768."""

    def __init__(self, args: Args, length: int):
        super().__init__()
        D, L = args.d_model, args.lattice_layers
        self.layers = nn.ModuleList(PostNorm(args, 8 * round(D / 3)) for _ in range(L))
        self.router = nn.Sequential(nn.Linear(D, 256), nn.ReLU(), nn.Linear(256, L))

    def forward(self, x: Tensor, st: State | None, aux: dict) -> Tensor:
        g, aux["deltas"] = self.router(running_mean(x, st, self.key + ".mean")).sigmoid(), []  # B n L; L of B n D
        for i, layer in enumerate(self.layers):
            aux["deltas"].append(g[..., i : i + 1] * (layer(x, st) - x))
            x = x + aux["deltas"][-1]
        return x


class PlaceLattice(nn.Module):
    """The author's lattice of v4.1, causal: the first P positions mix by learned weights, one for each pair of places.
    T = GELU(LN(W x)); e_t = MLP([T_t; sum_{j <= t} a_tj T_j]), a_t = softmax of t's weights up to t;
    x_t = g O e_t + (1 - g) x_t, g = sigmoid(V [x_t; e_t]). Later positions pass unchanged."""

    def __init__(self, args: Args, length: int):
        super().__init__()
        D, places = args.d_model, min(args.lattice_paths, length)
        self.weights = nn.Parameter(torch.zeros(places, places))
        self.node = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.GELU())
        self.edge = nn.Sequential(nn.Linear(2 * D, D), nn.GELU(), nn.Linear(D, D))
        self.out, self.gate = nn.Linear(D, D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor, st: State | None, aux: dict) -> Tensor:
        start, P = (st.length if st else 0), len(self.weights)
        near, end = x[:, : max(0, P - start)], min(P, start + x.shape[1])
        if start >= P:
            return x
        here = nodes = self.node(near)  # B m D
        if st:
            kept = st.buffer(self.key, (P, x.shape[2]), nodes)
            kept[:, start:end] = nodes
            nodes = kept[:, :end]
        later = torch.ones(end - start, end, dtype=torch.bool, device=x.device).triu(start + 1)  # m end
        share = wide(self.weights[start:end, :end]).masked_fill(later, -math.inf).softmax(-1).to(x.dtype)
        message = self.edge(torch.cat([here, share @ nodes], -1))
        g = self.gate(torch.cat([near, message], -1)).sigmoid()
        return torch.cat([g * self.out(message) + (1 - g) * near, x[:, P - start :]], 1)


class HyperLattice(nn.Module):
    """P paths, each a D x D matrix; every token takes its k = max(2, P / 10) best, softmax-weighted among them."""

    def __init__(self, args: Args, length: int):
        super().__init__()
        D, paths = args.d_model, args.lattice_paths
        self.k, self.norm = min(paths, max(2, int(0.1 * paths))), nn.LayerNorm(D)
        self.router = nn.Linear(D, paths, bias=False)
        self.paths, self.out = nn.Parameter(torch.zeros(paths, D, D)), Out(D, D)

    def forward(self, x: Tensor, st: State | None, aux: dict) -> Tensor:
        u = self.norm(x).flatten(0, 1)  # N D
        logits = wide(self.router(u))  # N P
        best, chosen = logits.topk(self.k, -1)  # N k each
        (N, k), P = chosen.shape, len(self.paths)
        if N * k <= P:  # few tokens, as in decoding: each fetches its own k matrices
            y = torch.einsum("nd,nkde->nke", u, self.paths[chosen])
        else:  # many: sort the (token, path) pairs by path, and take one product for each path
            order = chosen.flatten().argsort(stable=True)
            sizes = torch.bincount(chosen.flatten(), minlength=P).tolist()
            parts = u[order // k].split(sizes)
            y = torch.cat([part @ path for part, path in zip(parts, self.paths.unbind(0))])
            y = y[order.argsort()].view(N, k, -1)  # back to token order, so that the sum over k has a fixed order
        y = (y * best.softmax(-1)[..., None].to(y.dtype)).sum(1)
        share = F.one_hot(chosen, P).float().sum(1).mean(0) / k  # P
        aux["balance"] = P * (share * logits.softmax(-1).mean(0)).sum()
        return x + self.out(y).view_as(x)


class Feedback(nn.Module):
    """s = x; r times: e = sigmoid(error(s)), s = (1 - e) s + e GRUCell(x, s). Token by token."""

    def __init__(self, D: int, rounds: int):
        super().__init__()
        self.rounds, self.error, self.cell = rounds, nn.Linear(D, 1), nn.GRUCell(D, D)

    def forward(self, x: Tensor, st: State | None, aux: dict) -> Tensor:
        given = s = x.flatten(0, 1)  # N D
        for _ in range(self.rounds):
            e = self.error(s).sigmoid()
            s = (1 - e) * s + e * self.cell(given, s)
        return s.view_as(x)


def poincare(v: Tensor) -> Tensor:
    """The exponential map at the origin of a ball of curvature -1: tangent v [..., D] to a point inside, in fp32."""
    v = wide(v)
    norm = v.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
    return norm.tanh().clamp(max=1 - 1e-3) / norm * v


class Horizon(nn.Module):
    """z_k for offsets k = 2..H from h [..., D] (and, with predictive fields, the lattice's layers): [..., H - 1, D]."""

    def __init__(self, args: Args, kind: str, fields: int):
        super().__init__()
        D, H = args.d_model, args.horizon
        self.kind, self.H, self.norm = kind, H, nn.LayerNorm(D)
        if kind == "harmonic":
            self.linear = nn.Linear(D, (H - 1) * D)
        elif kind == "streamlined":
            self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, (H - 1) * D))
        else:
            self.offsets = nn.Parameter(torch.zeros(H - 1, D))
            self.coarse, self.medium = nn.Linear(D, D), nn.Linear(2 * D, D)
            self.fine = nn.Linear(2 * D, D) if H >= 8 else None
        self.fields = fields
        if fields:
            self.phi, self.field = nn.Parameter(torch.zeros(H - 1, fields)), nn.Linear(D, D)

    def reset(self) -> None:
        template = ((5, 0, (1, 0.8, 0.5)), (2, 1, (0.5, 1, 0.8, 0.3)), (0, 3, (0.3, 0.8, 1, 0.8)))
        if self.fields:  # near offsets read the deep layers (far nodes), far ones shallower; scaled by sigmoid(1)
            for k in range(2, self.H + 1):
                distance = int(math.log2(k + 1))
                first, values = next(row for above, *row in template if distance > above)
                first = max(0, min(first, self.fields - len(values)))  # fewer layers than the template: its first ones
                values = torch.tensor(values[: self.fields], device=self.phi.device)
                self.phi[k - 2, first : first + len(values)] = values * values.new_ones(()).sigmoid()

    def forward(self, h: Tensor, deltas: list[Tensor] | None = None) -> Tensor:
        if self.kind == "harmonic":
            return self.norm(h[..., None, :] + self.linear(h).unflatten(-1, (self.H - 1, -1)))
        if self.kind == "streamlined":
            return self.norm(self.mlp(h).unflatten(-1, (self.H - 1, -1)))
        base = h[..., None, :].expand(*h.shape[:-1], self.H - 1, -1)
        if self.fields:
            mixed = torch.einsum("kl,l...d->...kd", self.phi.to(h.dtype), torch.stack(deltas).to(h.dtype))
            base = base + self.field(mixed)
        base, z = base.unbind(-2), {0: h}  # base[k - 2] is offset k's; z[k] its state, and offset 0 the position itself

        def made(ks, linear, inputs):
            out = torch.stack([base[k - 2] for k in ks], -2) + F.gelu(linear(torch.stack(inputs, -2)))
            z.update(zip(ks, out.unbind(-2)))

        ks, step = [self.H // 2, self.H], self.H // 2
        made(ks, self.coarse, [base[k - 2] + self.offsets[k - 2] for k in ks])
        while step > 1:  # halve the spacing: each new offset from the two that bracket it
            ks = [k for k in range(step // 2, self.H, step) if k > 1]
            middles = [(z[k - step // 2] + z[k + step // 2]) / 2 + self.offsets[k - 2] for k in ks]
            linear = self.medium if step == self.H // 2 else self.fine
            made(ks, linear, [torch.cat([base[k - 2], m], -1) for k, m in zip(ks, middles)])
            step //= 2
        return self.norm(torch.stack([z[k] for k in range(2, self.H + 1)], -2))


class Stack(nn.Module):
    """Bottom, middle and top blocks over an index of `length` places: positions, or in chunk mode chunks."""

    def __init__(self, args: Args, spec: Variant, n_layers: int, length: int):
        super().__init__()
        D, below = args.d_model, n_layers // 2
        self.first, self.middle = spec.middle_first, nn.ModuleList()
        kinds = dict(hyper=HyperLattice, places=PlaceLattice, gated=GatedStack)
        kinds |= dict(complete=CompleteLattice, adaptive=AdaptiveLattice)
        if spec.middle != "none" and (length > 1 or spec.middle == "hyper"):  # one place: no ancestor, all weights dead
            self.middle.append(kinds[spec.middle](args, length))
        if spec.feedback:
            self.middle.append(Feedback(D, args.feedback_iters))
        self.bottom = Bottom(args, spec, below)
        self.top = nn.ModuleList(Block(args, spec) for _ in range(n_layers - below))

    def forward(self, x: Tensor, st: State | None, aux: dict) -> Tensor:
        for part in [*self.middle, self.bottom] if self.first else [self.bottom, *self.middle]:
            x = part(x, st, aux)
        for block in self.top:
            x = block(x, st)
        return x


class HST(nn.Module):
    """Token mode: a `Stack` over positions. Chunk mode: chunks of C tokens are encoded to one vector each, the stack
    runs over chunks, and a decoder predicts each token from those before it in its chunk and from earlier chunks."""

    def __init__(self, args: Args):
        super().__init__()
        spec, D, self.published = without(form(args), args.off), args.d_model, args.middle == "stack"
        self.args, self.spec = args, spec
        self.C = args.chunk_size if args.mode == "chunk" else 0
        self.reads_row = self.published and spec.row_decoder  # the chunk decoder's self-attention, as in his v6
        self.tokens = nn.Embedding(args.vocab_size, D)
        if spec.hyperbolic:
            self.scale = nn.Parameter(torch.tensor(2.0))
        if self.C:
            # No chunk sees the vector of a row's last one: the stack has one place fewer than there are chunks.
            # The author's split is two encoder layers, a lattice, two decoder layers, whatever --n_layers says.
            own, post, places = self.published, self.published and not spec.row_decoder, args.max_seq_len // self.C - 1
            n = 2 if own else max(1, args.n_layers // 4)
            self.local = nn.Embedding(self.C, D)
            self.places = nn.Embedding(args.max_seq_len if own else places, D)  # of tokens if published, else of chunks
            self.encoder = nn.ModuleList(PostNorm(args, args.d_ff) if own else Block(args, spec) for _ in range(n))
            self.query, self.pool = nn.Parameter(torch.zeros(1, D)), Attention(args)
            self.begin = nn.Parameter(torch.zeros(1, D))  # the memory of the first chunk
            self.stack = Stack(args, spec, 0 if own else args.n_layers - 2 * n, places)
            layers = [PostNorm(args, args.d_ff, True) if post else Block(args, spec, True) for _ in range(n)]
            self.decoder = nn.ModuleList(layers)
        else:
            self.positions = nn.Embedding(args.max_seq_len, D)
            self.stack = Stack(args, spec, args.n_layers, args.max_seq_len)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, args.vocab_size, bias=False) if self.published and not spec.tied else None
        self.horizon = self.confidence = None
        if spec.horizon != "none":
            self.confidence = nn.Linear(D, args.horizon)
            if args.horizon > 1:
                lattice = next((m for m in self.stack.middle if isinstance(m, AdaptiveLattice | GatedStack)), None)
                fields = len(lattice.router[2].bias) if spec.fields and lattice and not self.C else 0
                self.horizon = Horizon(args, spec.horizon, fields)
        for name, module in self.named_modules():
            module.key = name  # under which it keeps its state

    def new_state(self, batch: int, pages: int | None = None) -> State:
        """An empty state for `batch` rows. `pages`: size of the paged pool (default: enough for max_seq_len)."""
        page = self.args.page_size if self.spec.cache == "paged" else 0
        st = State(batch, self.args.max_seq_len, page, pages, rollback=not self.spec.hebbian)
        if self.C:
            places = self.args.max_seq_len // self.C - 1
            sizes = places, self.args.max_seq_len if self.reads_row else self.C, places + 2
            st.chunks, st.local, st.memory = (State(batch, capacity) for capacity in sizes)
        return st

    def pieces(self, ids: Tensor, length: int):
        """`ids` cut so that no call crosses a chunk border, `length` tokens having been consumed before."""
        first = self.C - length % self.C if self.C else ids.shape[1]
        yield from filter(lambda part: part.shape[1], [ids[:, :first], *ids[:, first:].split(self.C or 1, 1)])

    def embed(self, ids: Tensor) -> Tensor:  # B n -> B n D
        if not self.spec.hyperbolic:
            return self.tokens(ids)
        with torch.autocast(ids.device.type, enabled=False):
            return (self.scale * poincare(self.tokens(ids))).to(self.tokens.weight.dtype)

    def trunk(self, ids: Tensor, st: State | None = None, injection=None) -> tuple[Tensor, dict]:
        """ids [B, n] -> (hidden [B, n, D] after the final norm, what the parts report). With a state, ids are the next
        n >= 1 tokens after the `st.length` that it has seen; afterwards it has seen them too.
        injection: (vector [1, D] from `memory_of`, first chunk that sees it), chunk mode only."""
        start, n, aux = (st.length if st else 0), ids.shape[1], {}
        if n < 1 or start + n > self.args.max_seq_len:
            raise ValueError(f"{start} + {n} tokens: there are positions for 1 to {self.args.max_seq_len}")
        if self.C:
            x = self.chunked(ids, aux, injection) if st is None else self.chunked_step(ids, st, aux, injection)
            return self.norm(x), aux
        if st and st.pages:
            st.pages.resize(start + n)
        x = self.stack(self.drop(self.embed(ids) + self.positions.weight[start : start + n]), st, aux)
        if st:
            st.length += n
        return self.norm(x), aux

    def drop(self, x: Tensor) -> Tensor:  # the author drops nothing of an embedding
        return x if self.published else F.dropout(x, self.args.dropout, self.training)

    def encode(self, x: Tensor) -> Tensor:
        """Chunks x [N, C, D], complete ones, to vectors [N, D]: bidirectional blocks, then attention pooling."""
        for block in self.encoder:
            x = block(x, causal=False)
        query = self.query.to(x.dtype).expand(len(x), 1, -1)
        return self.pool.attend(query, *self.pool.project(x))[:, 0]

    def memory_of(self, ids: Tensor) -> Tensor:
        """The mean chunk vector [1, D] of a text [n]; an incomplete last chunk counts only if there is no other."""
        n = max(1, len(ids) // self.C)
        ids = F.pad(ids, (0, max(0, n * self.C - len(ids))))[: n * self.C]
        place = (self.places if self.published else self.local).weight[: self.C]  # every chunk as if it were the first
        return self.encode(self.embed(ids.view(n, self.C)) + place).mean(0, keepdim=True)

    def visible(self, chunk: Tensor, memory: int, injection) -> Tensor:
        """[n, memory] booleans: which entries [begin, (injected), g_0, g_1, ...] a token of `chunk` [n] may see."""
        entry, first = torch.arange(memory, device=chunk.device), 2 if injection else 1
        seen = entry - first < chunk[:, None]  # g_i for i < chunk; the entries before them always
        if self.published and not self.reads_row:  # v5's decoder reads one vector: g_chunk made causal
            seen &= (entry < first) | (entry - first == chunk[:, None] - 1)
        if injection:
            seen[:, 1] = chunk >= injection[1]
        return seen

    def chunked(self, ids: Tensor, aux: dict, injection) -> Tensor:
        (B, T), C = ids.shape, self.C
        n, row = -(-T // C), self.reads_row
        tokens = self.embed(F.pad(ids, (0, n * C - T)))  # B n*C D
        if self.published:
            tokens = tokens + self.places.weight[: n * C]
        tokens = tokens.view(B, n, C, -1)
        x = self.drop(tokens + self.local.weight)  # B n C D
        memory = [part.to(x.dtype).expand(B, 1, -1) for part in (self.begin, *(injection or ())[:1])]
        if n > 1:
            u = self.encode((tokens if self.published else x)[:, :-1].flatten(0, 1)).view(B, n - 1, -1)
            u = u if self.published else u + self.places.weight[: n - 1]
            memory.append(self.stack(u, None, aux))
        memory = torch.cat(memory, 1)  # B m D
        mask = self.visible(torch.arange(n * C, device=ids.device) // C, memory.shape[1], injection)  # n*C m
        x = x.flatten(1, 2) if row else x.flatten(0, 1)  # B n*C D, or B*n C D
        mask = mask if row else mask.view(n, 1, C, -1).repeat(B, 1, 1, 1)  # B*n 1 C m
        for block in self.decoder:
            k, v = (part.repeat_interleave(1 if row else n, 0) for part in block.cross.project(memory))  # B h m d
            x = block(x, memory=(k, v, mask))
        return x.view(B, n * C, -1)[:, :T]

    def chunked_step(self, ids: Tensor, st: State, aux: dict, injection) -> Tensor:
        (B, n), (chunk, at) = ids.shape, divmod(st.length, self.C)
        if at + n > self.C:
            raise ValueError(f"{n} tokens from place {at} of a chunk of {self.C} would cross its border: see `pieces`")
        running, places = st.buffer("ids", (self.C,), ids), self.places.weight
        if not st.memory.length:  # the first call: what every chunk sees, whichever tokens are forgotten later
            self.remember(torch.cat([part.expand(B, 1, -1) for part in (self.begin, *(injection or ())[:1])], 1), st)
        if at == 0 and chunk > st.chunks.length:
            # A chunk is encoded when the next one begins, not when it is full: its last tokens may yet be forgotten.
            place = places[st.length - self.C : st.length] if self.published else self.local.weight
            u = self.encode(self.embed(running) + place)[:, None]
            u = u if self.published else u + places[chunk - 1]
            self.remember(self.stack(u, st.chunks, aux), st)
            st.chunks.length += 1
            st.floor = st.length
        running[:, at : at + n] = ids
        st.local.length = st.length if self.reads_row else at
        x = self.embed(ids) + self.local.weight[at : at + n]
        if self.published:
            x = x + places[st.length : st.length + n]
        mask = self.visible(torch.full((n,), chunk, device=ids.device), st.memory.length, injection)
        for block in self.decoder:
            k, v = (st.memory.buffers[f"{block.cross.key}.{name}"][:, :, : st.memory.length] for name in "kv")
            x = block(x, st.local, memory=(k, v, mask))
        st.length += n
        return x

    def remember(self, entries: Tensor, st: State) -> None:
        """Append entries [B, m, D] to every decoder layer's cross-attention keys and values, computed once."""
        for block in self.decoder:
            st.memory.append(block.cross.key, *block.cross.project(entries))
        st.memory.length += entries.shape[1]

    def logits(self, hidden: Tensor) -> Tensor:  # ... D -> ... V
        return F.linear(hidden, (self.head or self.tokens).weight)

    def forward(self, input_ids: Tensor, labels=None, omega=None, share=None) -> dict:
        """input_ids [B, T] -> `logits` [B, T, V] (position t predicts token t + 1), `hidden`, and whatever the variant
        computes for each position: `horizon` [B, T, H - 1, D], `confidence` [B, T, H], `exit`, `depth`.
        Given labels [B, T or more] (shifted here; -100 is not scored): `loss`, `lm_loss` and `parts`, the named terms,
        no logits. `omega` [N]: indices into B * T where the horizon is scored (default: everywhere). `share` [H]: what
        the means over those positions are multiplied by, see `process_share` (default: 1)."""
        hidden, aux = self.trunk(input_ids)
        if labels is not None:
            return self.losses(hidden, aux, labels, omega, share)
        out = {"hidden": hidden, "logits": self.logits(hidden)}
        if self.horizon:
            out["horizon"] = self.horizon(hidden, aux.get("deltas"))
        if self.confidence:
            out["confidence"] = self.confidence(hidden)
        return out | {k: aux[k] for k in ("exit", "depth") if k in aux}

    def losses(self, hidden: Tensor, aux: dict, labels: Tensor, omega: Tensor | None, share: Tensor | None) -> dict:
        """The terms of the loss for hidden [B, T, D], by one call of the head: a row is a position and an offset."""
        a, (B, T, _), H = self.args, hidden.shape, self.args.horizon
        y = offset_targets(labels, T, H)  # B*T H
        flat = hidden.flatten(0, 1)  # B*T D
        valid = (y[:, 0] >= 0).float()  # B*T
        rows, targets, weights = [flat], [y[:, 0]], [valid / valid.sum().clamp(min=1)]
        share = valid.new_ones(H) if share is None else share
        omega = torch.arange(B * T, device=y.device) if omega is None else omega
        if self.horizon:
            deltas = [d.flatten(0, 1)[omega] for d in aux["deltas"]] if self.horizon.fields else None
            rows.append(self.horizon(flat[omega], deltas).flatten(0, 1))  # N*(H-1) D
            gamma = a.horizon_gamma ** torch.arange(2, H + 1, device=y.device)
            far = (y[omega, 1:] >= 0).float()  # N H-1: 0 where the target lies beyond the row
            mean = far / far.sum(0).clamp(min=1) * share[1:]
            targets.append(y[omega, 1:].flatten())
            weights.append((a.horizon_weight * gamma / gamma.sum() * mean).flatten())
        rows, head = torch.cat([r.to(flat.dtype) for r in rows]), (self.head or self.tokens).weight
        total, ce, right = core.head_loss(rows, head, torch.cat(targets), torch.cat(weights), HEAD_ROWS)
        lm = (ce[: B * T] * weights[0]).sum()
        parts = {"lm_loss": lm}
        if self.horizon:
            by_offset = (ce[B * T :].view(-1, H - 1) * mean).sum(0)  # H-1
            parts["horizon_loss"] = (by_offset * gamma / gamma.sum()).sum()
            parts |= {f"ce_{k}": by_offset[k - 2] for k in range(2, H + 1)}
        if self.confidence:
            c = wide(self.confidence(flat.detach()))  # B*T H
            scores, scored = c[:, 0], valid
            if self.horizon:
                scores, scored = torch.cat([scores, c[omega, 1:].flatten()]), torch.cat([valid, far.flatten()])
            bce = F.binary_cross_entropy_with_logits(scores, right.float(), reduction="none")
            parts["conf"] = (bce * scored).sum() / scored.sum().clamp(min=1) * share[0]
            total = total + 0.03 * parts["conf"]
            parts["confidence"] = c.sigmoid().mean()
        for name, factor in (("exit_loss", 0.03), ("depth_loss", 0.01), ("balance", 0.01)):
            if name in aux:
                total = total + factor * aux[name]
                parts[name] = aux[name]
        if "depth" in aux:
            parts["depth"] = aux["depth"].float().mean()
        return {"loss": total, "lm_loss": lm.detach(), "parts": {k: v.detach() for k, v in parts.items()}}


def offset_targets(labels: Tensor, T: int, H: int) -> Tensor:
    """[B * T, H]: the token k places after position t, k = 1..H, for labels [B, T or more]; -100 beyond the row."""
    return F.pad(labels, (0, H), value=-100).unfold(1, H, 1)[:, 1 : T + 1].flatten(0, 1)


def process_share(rows: Tensor, omega: Tensor, H: int, accelerator) -> Tensor | None:
    """[H] factors that make DDP's mean over processes the mean over all positions of `rows` [B, T + 1] in `omega`: of
    the confidence loss, then of the loss of each offset 2..H. All processes must call it; None if there is but one."""
    if accelerator.num_processes == 1:
        return None
    y = offset_targets(rows, rows.shape[1] - 1, H)
    far = (y[omega, 1:] >= 0).sum(0)  # H-1
    scored = (y[:, 0] >= 0).sum() + far.sum()
    return core.weight_of(accelerator, torch.cat([scored.view(1), far]))


@torch.no_grad()
def initialise(model: HST, args: Args) -> HST:
    """core's normal(0, 0.02), but: `Out` smaller, Diamond larger, GRUs PyTorch's, the ball's table 0.01, `reset`s."""
    core.init_normal(model, args.seed)
    for name, module in model.named_modules():
        if isinstance(module, Out):
            module.weight.mul_((2 * args.n_layers) ** -0.5)
        elif isinstance(module, Block) and module.cross and model.published:  # few entries, of unit spread: loud
            module.cross.out.weight.mul_(0.25)
        elif isinstance(module, Diamond) and not args.old_start:  # of half the inputs: or its token is hardly heard
            for linear, louder in zip((*module.f[1::2], *module.g[1::2]), (2**0.5, 2, 2**0.5, 2)):
                linear.weight.mul_(louder)
        elif isinstance(module, nn.GRU | nn.GRUCell):
            for label, p in module.named_parameters():
                if not p.is_meta:
                    draw = torch.rand(p.shape, generator=core.generator(args.seed, "init", f"{name}.{label}"))
                    p.copy_((2 * draw - 1) * module.hidden_size**-0.5)
        elif hasattr(module, "reset"):
            module.reset()
    if model.spec.hyperbolic:
        model.tokens.weight.mul_(0.5)
    return model


def build_model(args: Args) -> HST:
    """The variant that `args` (from `parse` or `settle`) describes, initialised from --seed."""
    if args.d_ff is None:
        width = matching_width(args) if args.match_params else ALL[args.variant].ffn * args.d_model
        args = dataclasses.replace(args, d_ff=width)
    require(args.d_ff >= 2 and args.d_ff % 2 == 0, f"--d_ff {args.d_ff} must be even and positive")
    model = initialise(HST(args), args)
    if args.compile:
        for module in model.modules():
            if isinstance(module, Layer):
                module.compile()
    return model


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(args: Args, **changes) -> HST:
    with torch.device("meta"):
        return build_model(dataclasses.replace(args, compile=False, **changes))


def matching_width(args: Args) -> int:
    """The FFN width, a multiple of 8, whose parameter count is nearest to --match_params (which is linear in it)."""
    low, high = (count(on_meta(args, d_ff=w, match_params=0)) for w in (8, 16))
    width = 8 * round((args.match_params - low) / (high - low) + 1)
    require(width >= 8, f"--match_params {args.match_params}: {args.variant} has {low} with the narrowest FFN")
    return width


def distribution(logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities [..., V] to sample from; temperature 0 puts everything on the likeliest token."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    p = (logits.float() / temperature).softmax(-1)
    if top_k:
        p = p * (p >= p.topk(min(top_k, p.shape[-1]), -1)[0][..., -1:])
    if top_p < 1:
        ordered, index = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        p = torch.zeros_like(p).scatter(-1, index, ordered * (before < top_p * ordered.sum(-1, keepdim=True)))
    return p / p.sum(-1, keepdim=True)


def accept(p: Tensor, q: Tensor, drafts: Tensor, generator=None) -> tuple[int, Tensor | None]:
    """Leviathan et al. (2023): draft i [n], drawn from q_i [n, V], is kept with probability min(1, p_i / q_i) until one
    is not. (how many were kept, what the next token is drawn from: p's excess over q, or None if all were kept.)"""
    for i, token in enumerate(drafts.tolist()):
        if torch.rand((), generator=generator, device=p.device) >= p[i, token] / q[i, token]:
            excess = (p[i] - q[i]).clamp(min=0)
            return i, excess / excess.sum()
    return len(drafts), None


@torch.no_grad()
def generate(model, ids, n, likely=None, cache=True, speculative=False, generator=None, injection=None, say=None):
    """Continue ids [B, P] by n tokens: (ids [B, P + n], counts). One rule for all forms, so greedy outputs are equal.
    `likely`: logits [..., V] -> probabilities to draw from (default: greedy). Where the position table ends, its last
    half is read again. Speculative: the horizon heads draft, one pass checks, what is refused is forgotten; one row."""
    if speculative and (len(ids) > 1 or not cache or not model.spec.draft):
        raise ValueError("speculative decoding: one row, with a cache, v6 or v7_1_2_agile")
    S, C, end, start, st, residual = model.args.max_seq_len, model.C, ids.shape[1] + n, 0, None, None
    keep = max(C, S // 2 // C * C) if C else S // 2  # what a full context is cut to: whole chunks
    likely, given = likely or distribution, injection
    stats = dict.fromkeys("forwards accepted_tokens drafted_tokens re_reads".split(), 0)
    training = model.training
    model.eval()
    while ids.shape[1] < end:
        if ids.shape[1] - start > S:
            if say and not stats["re_reads"]:
                say(f"The context is full at {S} tokens: reading its last {keep} again")
            start, st, stats["re_reads"] = ids.shape[1] - keep, None, stats["re_reads"] + 1
            if given:  # its first chunk is counted from the first token there ever was, not from this context's
                injection = given[0], max(0, given[1] - start // C)
        if not cache:
            hidden, _ = model.trunk(ids[:, start:], injection=injection)
            stats["forwards"] += 1
        else:
            st = st or model.new_state(len(ids))
            for part in model.pieces(ids[:, start + st.length :], st.length):
                hidden, _ = model.trunk(part, st, injection)
                stats["forwards"] += 1
        h = hidden[:, -1]  # B D
        # After a refused draft the next token is drawn from what the model would have added there, not from p itself.
        p = likely(model.logits(h)) if residual is None else residual[None]  # B V
        token, residual = torch.multinomial(p, 1, generator=generator), None  # B 1
        ids = torch.cat([ids, token], 1)
        if not speculative:
            continue
        # Drafts end where text, context or chunk does; the first of the `length` tokens is the one just drawn.
        room = min(end - ids.shape[1] + 1, S - st.length, C - st.length % C if C else S)
        length = draft_length(model, h[0], room)
        if length < 2:
            continue
        z = model.horizon(h[0])[: length - 1]  # length-1 D: offsets 2..; no variant that drafts has predictive fields
        q = likely(model.logits(z))
        drafts = torch.multinomial(q, 1, generator=generator)[:, 0]
        before = st.length  # the state has seen neither the token nor the drafts
        hidden, _ = model.trunk(torch.cat([token[0], drafts])[None], st, injection)
        stats["forwards"] += 1
        p = likely(model.logits(hidden[0, :-1]))  # length-1 V
        kept, residual = accept(p, q, drafts, generator)  # kept 0: the token alone stays, as without drafts
        st.truncate(before + 1 + kept)
        hidden, ids = hidden[:, : kept + 1], torch.cat([ids, drafts[None, :kept]], 1)
        stats["accepted_tokens"] += kept
        stats["drafted_tokens"] += length - 1
    model.train(training)
    return ids, stats | {"tokens_generated": n * len(ids)}


def draft_length(model: HST, h: Tensor, room: int) -> int:
    """Tokens to propose from h [D]: the horizon, or as many as the confidences' product stays at 0.5 or above for."""
    if model.horizon is None:  # --off horizon
        return 1
    most = min(model.args.horizon, room)
    if model.spec.draft == "confident":
        most = min(most, 1 + int((model.confidence(h).sigmoid()[1:].cumprod(0) >= 0.5).sum()))
    return most


def rates(stats: dict) -> dict:
    accepted = stats["accepted_tokens"] / max(1, stats["drafted_tokens"])
    return {"acceptance_rate": accepted, "effective_speedup": stats["tokens_generated"] / stats["forwards"]}


# ----------------------------------------------------------------------------------------------------------- data
def chain_rows(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """[rows, length] of x_{t+1} = (7 x_t + 13 r + 3) mod 64, r uniform in 0..3: entropy ln 4 = 1.3863 nats a token.
    Closed form: x_t = 7^t (x_0 + sum_{i < t} 7^-(i+1) (13 r_i + 3)) mod 64, with 7^-1 = 55 and 7^8 = 1 mod 64."""
    start, r = (torch.randint(high, (rows, width), generator=generator) for high, width in ((64, 1), (4, length - 1)))
    power = torch.tensor([pow(7, t % 8, 64) for t in range(length)])
    inverse = torch.tensor([pow(55, (t + 1) % 8, 64) for t in range(length - 1)])
    return power * ((start + F.pad((inverse * (13 * r + 3)).cumsum(1), (1, 0))) % 64) % 64


class Documents:
    """A streamed set as rows of S + 1 tokens with stride S, packed across documents, which are shuffled in windows of
    1000. The position is exact: documents consumed, tokens left over, the set's own state at the window's start."""

    def __init__(self, source, skip: int, tokenizer, length: int, seed: int, window: int = 1000):
        self.source, self.skip, self.tokenizer, self.length = source, skip, tokenizer, length
        self.seed, self.window, self.stream = seed, window, None
        self.first = copy.deepcopy(source.state_dict()) if hasattr(source, "state_dict") else None
        self.at = {"documents": 0, "epoch": 0, "window": 0, "inside": 0, "left_over": [], "stream": None}

    def state(self) -> dict:
        return self.at | {"left_over": list(self.at["left_over"])}

    def load(self, state: dict) -> None:
        self.at, self.stream = state | {"left_over": list(state["left_over"])}, None

    def texts(self):
        at = self.at
        while True:
            passed = self.skip + at["window"] * self.window  # the first `skip` documents are the validation rows
            if self.first is not None:  # explicitly also at the start: a loaded position would come back every epoch
                passed = 0 if at["stream"] else passed
                self.source.load_state_dict(copy.deepcopy(at["stream"] or self.first))
            documents = itertools.islice(iter(self.source), passed, None)
            while window := list(itertools.islice(documents, self.window)):
                generator = core.generator(self.seed, "data", at["epoch"], at["window"])
                for i in torch.randperm(len(window), generator=generator).tolist()[at["inside"] :]:
                    at["inside"], at["documents"] = at["inside"] + 1, at["documents"] + 1
                    yield window[i]["text"]
                stream = None if self.first is None else copy.deepcopy(self.source.state_dict())
                at |= {"window": at["window"] + 1, "inside": 0, "stream": stream}
            require(at["documents"], "the data set has no document left to train on: lower --eval_rows")
            at |= {"epoch": at["epoch"] + 1, "window": 0, "inside": 0, "stream": None}

    def take(self, index: int, rows: int) -> Tensor:
        """The next [rows, S + 1] tokens (`index` plays no part: the position does)."""
        self.stream, left, out = self.stream or self.texts(), self.at["left_over"], []
        while len(out) < rows:
            while len(left) <= self.length:
                left += tokenise(self.tokenizer, next(self.stream))
            out.append(left[: self.length + 1])
            del left[: self.length]
        return torch.tensor(out)


def tokenise(tokenizer, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]


class Data(NamedTuple):
    take: Callable[[int, int], Tensor]  # index of a micro-batch, its rows -> rows S+1
    validation: Tensor  # N S+1
    about: dict  # for the result file
    digest: str  # fingerprint that a resumed run compares; of a stream, its held-out beginning stands for all of it
    train: Tensor | None = None  # N S+1, what n-grams are counted on; None: a stream, which is never there as a whole
    stream: Documents | None = None  # has a position to save; elsewhere the index alone says what comes


def load_tokenizer(args: Args):
    """The tokenizer of a text source, its size checked; None for the synthetic one."""
    if args.data == "synthetic":
        return None
    texts = local_lines(args, "train") if args.tokenizer == "local" else ()
    tokenizer = core.load_tokenizer(args.tokenizer, texts, args.vocab_size)
    enough = len(tokenizer) <= args.vocab_size
    require(enough, f"--vocab_size {args.vocab_size} is below the tokenizer's {len(tokenizer)}: raise it")
    require(tokenizer.eos_token_id is not None, f"--tokenizer {args.tokenizer} has no end-of-text token")
    return tokenizer


def local_lines(args: Args, split: str) -> list[str]:
    return core.load_text("local" if args.data == "local" else "text", split, args.data)


def load_data(args: Args, tokenizer) -> Data:
    """Training rows and held-out rows: of the hub set, its first documents; of a text, core's validation split."""
    S, n, about = args.max_seq_len, args.eval_rows, {"source": args.data or args.dataset, "tokenizer": args.tokenizer}
    if args.data == "synthetic":
        about = {"source": "synthetic", "entropy_floor_nats": math.log(4)}
        held_out = chain_rows(n, S + 1, core.generator(args.seed, "eval"))
        draw = lambda i, b: chain_rows(b, S + 1, core.generator(args.seed, "data", i))  # noqa: E731
        train = torch.cat([draw(i, args.batch_size) for i in range(min(256, args.max_steps * args.grad_accum))])
        return Data(draw, held_out, about, core.digest(held_out.numpy()), train)
    if args.data:
        rows, digests = [], []
        for split in ("train", "validation"):
            ids = core.encode(local_lines(args, split), tokenizer)
            line = f"--data {args.data}: the {split} text has {len(ids)} tokens, one row needs {S + 1}"
            require(len(ids) > S, line)
            rows.append(torch.from_numpy(ids.astype("int64")).unfold(0, S + 1, S))  # N S+1, stride S
            digests.append(core.digest(ids))
        choose = lambda i, b: rows[0][core.batch_indices(len(rows[0]), b, args.seed, i)]  # noqa: E731
        return Data(choose, rows[1][:n].clone(), about | {"train_rows": len(rows[0])}, core.digest(*digests), rows[0])
    instead = "--data synthetic, --data local or a text file, with --tokenizer byte"
    source = core.load_hub_dataset(args.dataset, args.dataset_config or None, "train", instead, streaming=True)
    ids, skip = [], 0
    for document in source:
        ids, skip = ids + tokenise(tokenizer, document["text"]), skip + 1
        if len(ids) > n * S:
            break
    require(len(ids) > n * S, f"--dataset {args.dataset}: too short for --eval_rows {n}")
    about |= {"config": args.dataset_config, "validation_documents": skip}
    stream = Documents(source, skip, tokenizer, S, args.seed)
    held_out = torch.tensor(ids).unfold(0, S + 1, S)[:n].clone()
    return Data(stream.take, held_out, about, core.digest(ids), stream=stream)


# ------------------------------------------------------------------------------------------------------- evaluate
@torch.no_grad()
def evaluate(model: HST, data: Data, args: Args, accelerator) -> dict:
    """Mean loss of the next token on held-out rows (`loss`, `rows`: of each) and, on a part of them, of each offset."""
    from accelerate.utils import gather_object

    model.eval()
    mine = []  # (row's number, names of the terms, their values) of this process's rows
    for i in range(accelerator.process_index, len(data.validation), accelerator.num_processes):
        row = data.validation[i : i + 1].to(accelerator.device)
        with accelerator.autocast():
            parts = model(row[:, :-1], row, positions_for_horizon(args, row, "eval", i))["parts"]
        mine.append([i, list(parts), torch.stack([v.float() for v in parts.values()])])
    model.train()
    rows = sorted(gather_object([[i, names, v.tolist()] for i, names, v in mine]))  # a process may have no row
    values = torch.tensor([v for *_, v in rows], dtype=torch.float64)  # rows, parts
    means = dict(zip(rows[0][1], values.mean(0).tolist()))
    return {"loss": means.pop("lm_loss"), "rows": values[:, 0].tolist()} | means


def positions_for_horizon(args: Args, rows: Tensor, *purpose, rank: int = 0, world: int = 1) -> Tensor:
    """The random share of the B * T positions [N] that the horizon loss scores; of several processes, this one's."""
    T = rows.shape[1] - 1
    n = rows.shape[0] * world * T
    chosen = torch.randperm(n, generator=core.generator(args.seed, "omega", *purpose))
    chosen = chosen[: math.ceil(args.horizon_frac * n)].sort()[0]
    mine = chosen[chosen // T % world == rank]  # index c is position c % T of row c // T; rows are dealt out in turn
    return (mine // T // world * T + mine % T).to(rows.device)


def speculation(model: HST, data: Data, prompts: int = 4) -> dict:
    """Greedy decoding of held-out prompts with and without drafts: are the tokens equal, what do the drafts save?"""
    S, total, same = model.args.max_seq_len, {}, []
    device = next(model.parameters()).device
    for row in data.validation[:prompts, : S // 4].to(device):
        plain, _ = generate(model, row[None], S // 2)
        drafted, stats = generate(model, row[None], S // 2, speculative=True)
        same.append(torch.equal(plain, drafted))
        total = {k: total.get(k, 0) + v for k, v in stats.items()}
    return total | rates(total) | {"equal_to_plain": all(same), "prompts": len(same)}


@torch.no_grad()
def audit(model: HST, length: int) -> dict:
    """Replace one token of row 1, at places around every border that the variant has. `leak`: largest change of any
    output before it (0 if causal); `response`: least change of one at it; `rows`: largest change in row 0."""
    training, C, V, device = model.training, model.C, model.args.vocab_size, model.tokens.weight.device
    model.eval()
    ids = torch.randint(V, (2, length), generator=core.generator(0, "audit")).to(device)
    places = {1, 5, length // 2, length - 2} | ({C - 1, C, C + 1} - {0} if C else set())  # nothing is before 0
    before = model(ids)
    leak, response, rows = 0.0, math.inf, 0.0
    for t in places:
        other = ids.clone()
        other[1, t] = (ids[1, t] + 1 + t % (V - 1)) % V
        moved = {k: (v - before[k]).abs() for k, v in model(other).items() if not C or k not in ("exit", "depth")}
        leak = max(leak, *(float(v[1, :t].max()) for v in moved.values()))
        rows = max(rows, *(float(v[0].max()) for v in moved.values()))
        response = min(response, *(float(moved[k][1, t].max()) for k in ("logits", "horizon") if k in moved))
    model.train(training)
    return {"leak": leak, "response": response, "rows": rows}


@torch.no_grad()
def token_share(model: HST, kinds: int = 4) -> float:
    """Share of the variance of h at one place that is due to the token there, not to those before it: `kinds` tokens
    crossed with as many contexts; the squares between the tokens' means over all. Chance gives 1 / (kinds + 1)."""
    training, C, V, device = model.training, model.C, model.args.vocab_size, model.tokens.weight.device
    model.eval()
    n, length = min(kinds, V), min(model.args.max_seq_len, C + C // 2 + 1 if C else 64)  # chunk mode: behind a border
    generator = core.generator(0, "share")
    contexts = torch.randint(V, (n, length - 1), generator=generator)
    last = torch.randperm(V, generator=generator)[:n, None]
    ids = torch.cat([contexts.repeat(n, 1), last.repeat_interleave(n, 0)], 1).to(device)  # token by token
    h = torch.cat([model.trunk(part)[0][:, -1].float() for part in ids.split(n)]).view(n, n, -1)  # token context D
    model.train(training)
    h = h - h.mean((0, 1))
    return float(n * h.mean(1).square().sum() / h.square().sum())


def harsh(args: Args, **changes) -> HST:
    """A small deep model with large random weights, in which exits, depths and gates really differ between tokens."""
    size = dict(n_layers=12 if args.mode == "chunk" else 8, max_seq_len=128, d_ff=None, match_params=0)
    size = SMALL | size | dict(vocab_size=64, dropout=0.0, exit_threshold=0.5)
    model = build_model(dataclasses.replace(args, **(size | changes)))
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            std = 2.0 if ".task." in name or ".depth." in name else 0.15  # else all depths would be nearly one
            p.data.copy_(torch.normal(0.0, std, p.shape, generator=core.generator(1, name)))
    return model.eval()


@torch.no_grad()
def cached(model: HST, ids: Tensor, sizes, st: State) -> Tensor:
    """Hidden states [B, T, D] of `ids` read in calls of the given sizes (repeated), never across a chunk border."""
    out, sizes = [], itertools.cycle(sizes)
    while ids.shape[1]:
        part = next(model.pieces(ids[:, : next(sizes)], st.length))
        out.append(model.trunk(part, st)[0])
        ids = ids[:, part.shape[1] :]
    return torch.cat(out, 1)


def self_check(args: Args) -> dict:
    """Figures of the variant's invariants on a harsh model; Failure (exit code 1) names those that do not hold."""
    model = harsh(args)
    ids, S = torch.randint(64, (2, 128), generator=core.generator(2)), 128
    figures, wrong = audit(model, S), []
    with torch.no_grad():
        whole, aux = model.trunk(ids)
        stepped = cached(model, ids, (10, 1, 1, 5, 1, 20, 1), model.new_state(2))
        figures["cache_mismatch"] = float((stepped - whole).abs().max())
        if "depth" in aux:
            figures["depth_range"] = [float(aux["depth"].min()), float(aux["depth"].max())]
            if not figures["depth_range"][0] + 0.1 < figures["depth_range"][1]:
                wrong.append("all tokens have one depth: the check shows nothing")
        if model.spec.diamond:
            u = torch.randn(2, 32, 64, generator=core.generator(3))
            mixers = [block.mixer for block in model.stack.top]
            figures["inverse_error"] = max(float((mixer.inverse(mixer(u)) - u).abs().max()) for mixer in mixers)
        if model.spec.hyperbolic:
            figures["ball_norm"] = float(poincare(model.tokens.weight * 1e4).norm(dim=-1).max())
        st, cut = model.new_state(2), 37
        cached(model, ids[:, :cut], (7,), st)
        cached(model, ids.flip(1)[:, cut : cut + 6], (2,), st)  # tokens to be forgotten
        if st.rollback:
            st.truncate(cut)
            again = cached(model, ids[:, cut:], (3, 1), st)
            figures["truncate_mismatch"] = float((again - whole[:, cut:]).abs().max())
        else:  # fast weights cannot, and must say so; what they remember: the same token with and without it
            with contextlib.suppress(ValueError):
                st.truncate(cut)
                wrong.append("fast weights claim to roll back")
            remembered = model.trunk(ids[:, :1], st)[0]
            st.length -= 1
            for held in (buffer for key, buffer in st.buffers.items() if key.endswith("hebbian")):
                held.zero_()
            figures["fast_weight_effect"] = float((model.trunk(ids[:, :1], st)[0] - remembered).abs().max())
    forms = [dict(cache=False), {}, *([dict(speculative=True)] if model.spec.draft else [])]
    texts = [generate(model, ids[:1, :9], 48, **how)[0] for how in forms]
    figures["greedy_equal"] = all(torch.equal(texts[0], other) for other in texts[1:])
    torch.manual_seed(0)
    fresh = build_model(dataclasses.replace(args, dropout=0.0, d_ff=None)).train()
    row = chain_rows(args.batch_size, args.max_seq_len + 1, core.generator(0)) % args.vocab_size
    fresh(row[:, :-1], labels=row)["loss"].backward()
    dead = [name for name, p in fresh.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    figures["without_gradient"] = dead
    limits = {"leak": 1e-5, "rows": 1e-5, "cache_mismatch": 1e-4, "truncate_mismatch": 1e-4, "inverse_error": 1e-5}
    holds = {f"{k} {figures[k]:.1e}": figures[k] <= limit for k, limit in limits.items() if k in figures}
    holds["a token does not move its own logits or horizon states"] = figures["response"] > 1e-6
    holds["greedy decoding differs between its forms"] = figures["greedy_equal"]
    holds[f"no gradient: {', '.join(dead)}"] = not dead
    wrong += [what for what, right in holds.items() if not right]
    if wrong:
        raise core.Failure(f"{args.variant} {args.mode}: self-check failed: {'; '.join(wrong)}", core.CHECK_FAILED)
    return figures


# ---------------------------------------------------------------------------------------------------------- train
def uses_eight_bit(args: Args, device: torch.device) -> bool:
    """Whether training takes 8-bit AdamW: where it is asked for, or can be had on a GPU."""
    there = importlib.util.find_spec("bitsandbytes") is not None
    require(args.optim != "adamw8bit" or there, "--optim adamw8bit: pip install bitsandbytes, or use --optim adamw")
    return args.optim == "adamw8bit" or (args.optim == "auto" and device.type == "cuda" and there)


def make_optimizer(model: HST, args: Args, eight_bit: bool):
    """AdamW; in 8 bits with the embedding's moments in 32, as bitsandbytes recommends."""
    groups, settings = core.decay_groups(model, args.weight_decay), dict(lr=args.lr, betas=(0.9, 0.999))
    if not eight_bit:
        return torch.optim.AdamW(groups, **settings, fused=True)
    import bitsandbytes as bnb

    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(model.tokens, "weight", {"optim_bits": 32})
    return bnb.optim.AdamW8bit(groups, **settings)


def rate(args: Args, update: int, seconds: float) -> float:
    """Linear warm-up, then linear to 0 at --max_steps (or --max_seconds, whichever is nearer)."""
    done = max(update / args.max_steps, seconds / args.max_seconds if args.max_seconds else 0.0)
    warm = min(args.warmup, args.max_steps - 1) / args.max_steps
    return args.lr * max(0.0, min((update + 1) / max(1, args.warmup), (1 - done) / (1 - warm)))


def budget_seconds(loop: core.Loop) -> float:
    """What --max_seconds counts: time of training alone; on a CPU, which others may share, its CPU time."""
    return loop.cpu_seconds if loop.accelerator.device.type == "cpu" else loop.seconds


def end_if_time_is_up(loop: core.Loop, args: Args) -> None:
    """Make the update that was just done the last one."""
    if 0 < args.max_seconds <= budget_seconds(loop):
        loop.total = loop.step


def audit_start(model: HST, args: Args, say) -> dict:
    """What the result file says of causality and rows; Failure if a later token or another row moves an output."""
    outputs = ["logits", "hidden", *(name for name in ("horizon", "confidence") if getattr(model, name))]
    moved = audit(model, args.max_seq_len)
    leak = max(moved["leak"], core.causality_audit(model, args.vocab_size, args.max_seq_len, outputs))
    share = token_share(model)
    say(f"[Audit] largest change of an output by a later token {leak:.1e}, by another row {moved['rows']:.1e}")
    say(f"[Audit] share of h that is due to the token it stands at: {share:.2f}")
    require(max(leak, moved["rows"]) <= 1e-5, f"{args.variant} reads the future or another row", core.CHECK_FAILED)
    line = f"{args.variant}: {1 - share:.0%} of the first h is context: not trained (fewer layers, or a narrower model)"
    require(share >= 0.5 or args.old_start, line, core.CHECK_FAILED)
    return {"causality_max_abs_diff": leak, "row_influence": moved["rows"], "token_share": share}


def log_update(args: Args, run: core.Run, loop: core.Loop, means: dict, **state) -> None:
    """One console line and one row of log.jsonl: `means` of the loss's terms since the last, and where training is."""
    row = dict(means)
    by_offset = [row.pop(f"ce_{k}") for k in range(2, args.horizon + 1) if f"ce_{k}" in row]
    by_offset = [nats if math.isfinite(nats) else None for nats in by_offset]
    extra = {"depth": " | Depth {:.2f}", "confidence": " | Conf {:.3f}", "balance": " | Balance {:.3f}"}
    if args.variant == "v8_2_crystalline" and "confidence" in row:
        row["uncertainty"] = 1 - row["confidence"]
        extra = {"uncertainty": " | Uncertainty {:.3f}"}
    scaler, speed = run.accelerator.scaler, loop.rate()
    own = "".join(text.format(row[k]) for k, text in extra.items() if k in row)
    line = f"Step {loop.step:6d} | Loss {row['loss']:.4f} | LM {row['lm_loss']:.4f} | Horizon "
    line += f"{row.get('horizon_loss', 0):.4f}{own} | LR {state['lr']:.2e} | {speed:.0f} tok/s"
    if run.accelerator.device.type == "cuda":
        a, r = torch.cuda.memory_allocated() / 1e9, torch.cuda.memory_reserved() / 1e9
        line += f" | GPU Memory: {a:.2f}GB allocated, {r:.2f}GB reserved"
        row |= {"mem_alloc_gb": a, "mem_reserved_gb": r}
    run.say(line)
    row |= {"scale": scaler.get_scale() if scaler else None, "skipped": loop.nonfinite_steps()}
    row |= {"tokens": loop.tokens, "tokens_per_s": speed, "ppl": core.perplexity(row["lm_loss"])}
    run.log(step=loop.step, horizon_by_offset=by_offset, **state, **row)


def set_up(args: Args, run: core.Run, accelerator) -> tuple:
    """(model, optimizer, data, checkpoint or None, figures of the audit). Whatever can refuse the run does so here."""
    device, say = accelerator.device, run.say
    say("[1/5] Loading tokenizer...")
    tokenizer = load_tokenizer(args)
    say(f"[2/5] Building HST {args.variant} model...")
    model = build_model(args).to(device)
    size = f"{count(model) / 1e6:.1f}M params"  # nothing is frozen
    say(f"Model: {size}\nTrainable: {size}")
    audited = audit_start(model, args, say)
    say("[3/5] Setting up optimizer...")
    eight_bit = uses_eight_bit(args, device)
    require(not (accelerator.sharded and eight_bit), "FSDP: 8-bit AdamW cannot be cut up; use --optim adamw")
    say(f"Using {'8-bit' if eight_bit else 'standard'} AdamW")
    say("[4/5] Loading dataset...")
    data = load_data(args, tokenizer)
    names = ("ckpt_step_*.pt", f"{args.variant}_*step_*.pt", f"{args.variant}_final.pt")
    saved = run.checkpoint(*names, total=args.max_steps, arm="hst")
    if args.resume and not saved:
        say(f"[Resume] nothing in {run.dir}: starting fresh")
    inputs = {"tokenizer": core.tokenizer_digest(tokenizer)} if tokenizer else {}
    run.start((*FREE, LENGTH), data=data.digest, **inputs)
    if saved:
        model.load_state_dict(saved["model"])
        if data.stream:
            data.stream.load(saved["data_state"])
    core.shard(model, accelerator)  # all in one piece: its parts use each other's weights
    model, optimizer = core.prepare(model, make_optimizer(model, args, eight_bit), accelerator)
    torch.manual_seed(core.derived_seed(args.seed, "noise", accelerator.process_index))
    return model, optimizer, data, saved, audited


def train(args: Args, run: core.Run, accelerator) -> dict:
    """Train one variant, from --seed or from its checkpoint; returns what the result file says."""
    model, optimizer, data, saved, audited = set_up(args, run, accelerator)
    bare, say = accelerator.unwrap_model(model), run.say  # `bare`: without DDP around it
    world, rank = accelerator.num_processes, accelerator.process_index
    loop = core.Loop(run, model, optimizer, args.max_steps, "hst", saved, args.grad_clip)
    history = saved["history"] if saved else {"train_loss": [], "val_loss": [], "val_seconds": []}
    recent = [{k: v.to(accelerator.device) for k, v in terms.items()} for terms in saved["recent"]] if saved else []

    def save(name: str, **keep) -> Path:
        state = {"version": 2, "variant": args.variant, "mode": args.mode, "model": core.full_state(bare)}
        state |= {"history": history, "data_state": data.stream.state() if data.stream else {}}
        return loop.save(name, **keep, **state, recent=accelerator.reduce(recent, "mean"))

    def validate() -> dict:
        with loop.paused(), core.whole(bare):
            figures = evaluate(bare, data, args, accelerator)
        core.check_finite(figures["loss"], "the validation loss")
        say(f"[Eval] step {loop.step}: Val Loss = {figures['loss']:.4f}, PPL = {core.perplexity(figures['loss']):.2f}")
        if [loop.step] != [step for step, _ in history["val_loss"][-1:]]:  # else it is made again after a resume
            history["val_loss"].append([loop.step, figures["loss"]])
            history["val_seconds"].append([loop.step, budget_seconds(loop)])
            run.log(step=loop.step, val_loss=figures["loss"], val_seconds=budget_seconds(loop))
        return figures

    say(f"[5/5] Starting training (Max Steps: {args.max_steps}, Accumulation: {args.grad_accum})...")
    end_if_time_is_up(loop, args)
    try:
        while not loop.last:
            lr = rate(args, loop.step, budget_seconds(loop))
            for group in optimizer.param_groups:
                group["lr"] = lr
            terms = []  # of the loss, a micro-batch each
            for i in loop.micro_batches(args.grad_accum):
                # N processes see together what one sees at N times the batch.
                rows = data.take(loop.step * args.grad_accum + i, args.batch_size * world)[rank::world]  # B S+1
                rows = rows.to(accelerator.device, non_blocking=True)
                omega = positions_for_horizon(args, rows, loop.step, i, rank=rank, world=world)  # N
                out = model(rows[:, :-1], rows, omega, process_share(rows, omega, args.horizon, accelerator))
                loop.backward(out["loss"] / args.grad_accum)
                terms.append({"loss": out["loss"].detach(), **out["parts"]})
                loop.add(**terms[-1])
            norm = loop.update(tokens=rows[:, 1:].numel() * args.grad_accum * accelerator.num_processes)
            end_if_time_is_up(loop, args)
            recent = [*recent[-9:], {k: sum(t[k].float() for t in terms) / len(terms) for k in terms[0]}]
            if loop.due(args.log_every):
                means = loop.means()
                if math.isfinite(means["lm_loss"]):
                    history["train_loss"].append([loop.step, means["lm_loss"]])
                log_update(args, run, loop, means, grad_norm=float(norm), lr=lr)
            if loop.due(args.empty_cache_every) and accelerator.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
            if loop.due(args.eval_every) and not loop.last:
                validate()
            if loop.due(args.save_every):
                save(f"ckpt_step_{loop.step}.pt", keep=args.keep, of="ckpt_step_*.pt")
                say(f"  Checkpoint saved at step {loop.step}")
            if loop.stopping and not loop.last:
                path = save(f"{args.variant}_interrupt_step_{loop.step}.pt")
                say(f"!! Training INTERRUPTED by User !!\nModel saved at interruption: {path}")
            loop.leave_if_stopped()
        figures = loop.end()
        final = validate()
    except core.Failure as failure:
        if failure.code != core.DIVERGED:
            raise
        raise core.Failure(f"{failure} (saved {save(f'{args.variant}_nonfinite.pt')})", failure.code) from failure
    save(f"{args.variant}_final.pt")
    outcome = {"variant": args.variant, "mode": args.mode, "final": final, "history": history}
    outcome |= final_figures(args, bare, data, final, accelerator)
    sums = core.Sums(accelerator)  # of the last ten updates, over all processes
    for terms in recent:
        sums.add(**terms)
    outcome["tail"] = {name: mean for name, mean in sums.means().items() if math.isfinite(mean)}
    outcome |= {"parameters": count(bare), **audited, "data": data.about, **figures}
    return outcome | {"train_cpu_seconds": loop.cpu_seconds, "skipped": figures["nonfinite_steps"]}


def by_depth(model: HST, data: Data, args: Args, accelerator) -> list[list[float]]:
    """[layers of the bottom stack that a token runs on average, nats], for more and more layers: by the threshold of
    early exits (the last: none leaves), by a cap on the predicted depth, or by cutting off blocks."""
    bottom, points = model.stack.bottom, []
    blocks, control, threshold = bottom.blocks, bottom.control, bottom.threshold
    for setting in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, math.inf) if control == "exit" else range(1, len(blocks) + 1):
        if control == "exit":
            bottom.threshold = setting
        elif control == "none":
            bottom.blocks = blocks[:setting]
        bottom.cap = setting
        figures = evaluate(model, data, args, accelerator)
        points.append([figures.get("depth", float(setting)), figures["loss"]])
    bottom.blocks, bottom.threshold, bottom.cap = blocks, threshold, math.inf
    return points


def final_figures(args: Args, model: HST, data: Data, final: dict, accelerator) -> dict:
    """What is measured once, on the trained model. In `final` the losses of single rows make way for their interval."""
    rows = final.pop("rows")
    final |= {"ppl": core.perplexity(final["loss"]), "loss_interval": core.bootstrap(rows)}
    final["scored_tokens"] = len(rows) * args.max_seq_len
    seen = None if data.train is None else data.train.numpy()
    floors = seen if seen is None else core.ngram_floors(seen, data.validation.numpy(), args.vocab_size)
    with core.whole(model):
        final["by_depth"] = by_depth(model, data, args, accelerator)
        if model.spec.control == "exit":
            final["loss_full_depth"] = final["by_depth"][-1][1]
        drafts = speculation(model, data) if model.spec.draft and model.horizon else None
    return {"floors": floors, "speculative": drafts}


# ----------------------------------------------------------------------------------------------------------- main
def list_variants(args: Args) -> list[dict]:
    rows = []
    for (name, spec), innovation in zip(VARIANTS.items(), KEY_INNOVATION, strict=True):
        n = count(on_meta(settle(dataclasses.replace(args, mode=None), name)))
        rows.append({"variant": name, "parameters": n})
        print(f"{name:19s} {n:12,d}  {'/'.join(spec.modes):12s} {spec.cache:11s} {innovation}")
    return rows


def print_params(args: Args) -> dict:
    """Parameters by component, of one variant or (--variant all) of every variant in every mode it has."""
    tables = {}
    for name in VARIANTS if args.variant == "all" else [args.variant]:
        for mode in ALL[name].modes if args.variant == "all" else [args.mode]:
            model = on_meta(settle(dataclasses.replace(args, mode=mode), name))
            modules = [*model.named_children(), *((f"  stack.{k}", m) for k, m in model.stack.named_children())]
            sizes = {part: count(module) for part, module in modules if count(module)} | {"total": count(model)}
            print(f"\n{name} {mode}", *(f"  {part:18s} {n:12,d}" for part, n in sizes.items()), sep="\n")
            tables[f"{name} {mode}"] = sizes
    return tables


def generate_text(args: Args) -> dict:
    """Continue --generate with the checkpoint --ckpt (with --test and none: with an untrained model)."""
    require(args.ckpt or args.test, "--generate needs --ckpt CHECKPOINT")
    accelerator, model_args, saved = core.engine(args), args, None
    if args.ckpt:
        saved = core.load_checkpoint(Path(args.ckpt))
        require("variant" in saved and "manifest" in saved, f"{args.ckpt}: not a checkpoint of this script")
        flags = {"middle": "spine"} | saved["manifest"]["flags"]  # before there was a choice, the lighter form
        model_args = Args(**flags | {k: getattr(args, k) for k in FREE})
        model_args = settle(model_args, model_args.variant)
        check_generation(model_args)
    model = build_model(model_args)
    if saved:
        model.load_state_dict(saved["model"])
    model.to(accelerator.device).eval()
    tokenizer = load_tokenizer(model_args)

    def encode(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if tokenizer else [b % 64 for b in text.encode()]
        return torch.tensor(ids, dtype=torch.long, device=accelerator.device)

    ids, injection, S = encode(args.generate), None, model_args.max_seq_len
    require(0 < len(ids) <= S, f"--generate: {len(ids)} tokens, but the model reads 1 to {S}: change the text")
    with torch.no_grad(), accelerator.autocast():
        if args.inject_file:
            injection = model.memory_of(encode(core.read_text(args.inject_file))), args.inject_at
        draw = torch.Generator(accelerator.device).manual_seed(core.derived_seed(args.seed, "sampling"))
        begin, n = time.perf_counter(), args.max_new_tokens
        likely = lambda logits: distribution(logits, args.temperature, args.top_k, args.top_p)  # noqa: E731
        how = dict(cache=not args.no_cache, speculative=args.speculative, injection=injection, say=print)
        out, stats = generate(model, ids[None], n, likely, generator=draw, **how)
    seconds, out = time.perf_counter() - begin, out[0].tolist()
    text = tokenizer.decode(out) if tokenizer else " ".join(map(str, out))
    print(f"{text}\nTokens Generated: {n} | Total Time: {seconds:.2f} s | Average TPS: {n / seconds:.1f}")
    stats = stats | rates(stats) if args.speculative else {"tokens_generated": n, "forwards": stats["forwards"]}
    print(json.dumps(stats))
    return {"ids": out, "text": text, **stats}


def run_one(args: Args, accelerator) -> dict:
    conf = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or "default"
    model = on_meta(args)
    args = dataclasses.replace(args, d_ff=model.args.d_ff)  # as --match_params chose it
    half, batch = accelerator.mixed_precision != "no", args.batch_size * args.max_seq_len
    layers = sum(isinstance(module, Layer) for module in model.modules())
    memory = core.memory_estimate(model, batch, args.d_model, layers, half)
    if uses_eight_bit(args, accelerator.device):  # two moments of a byte each in place of four, but of the embedding
        memory["weights_and_optimizer"] -= 6 * (count(model) - model.tokens.weight.numel()) / 1e9
    if args.grad_ckpt:  # the inputs of all blocks, and the inside of the one that is being recomputed
        inputs = (2 if half else 4) * batch * args.d_model * layers / 1e9
        memory["activations"] = memory["activations"] / layers + inputs
    offsets = args.horizon - 1 if model.horizon is not None else 0
    scored = batch * (1 + args.horizon_frac * offsets)  # rows of the head, each D wide in fp32 twice
    memory["loss"] = (4 * args.vocab_size * (3 * HEAD_ROWS + 2 * args.d_model) + 8 * scored * args.d_model) / 1e9
    memory["total"] = sum(v for k, v in memory.items() if k != "total")
    rows = args.max_steps * args.grad_accum * args.batch_size * accelerator.num_processes
    plan = {"variant": args.variant, "mode": args.mode, "parameters": count(model), "d_ff": args.d_ff}
    plan |= {"memory_gb": memory, "allocator": conf, "tokens": rows * args.max_seq_len}
    if args.dry_run:
        return core.show_plan(plan)
    require(not args.max_seconds or accelerator.num_processes == 1, "--max_seconds: one process only, clocks differ")
    outputs = ("ckpt_step_*.pt", f"{args.variant}_*.pt")
    with core.Run(args, args.save_dir, accelerator, "hst_results.json", outputs) as run:
        result = run.finished(LENGTH, FREE)
        if result is None:
            run.say(f"Device: {accelerator.device}")
            if accelerator.device.type == "cuda":
                total = torch.cuda.get_device_properties(accelerator.device).total_memory / 1e9
                run.say(f"GPU: {torch.cuda.get_device_name(accelerator.device)}\nVRAM: {total:.1f} GB")
            run.say(f"Allocator: {conf}\nEstimated memory: {memory['total']:.1f} GB")
            if "cudaMallocAsync" in conf and ("expandable" in conf or "max_split" in conf):
                run.say("WARNING: cudaMallocAsync ignores expandable_segments and max_split_size_mb")
            outcome = train(args, run, accelerator)
            checks = self_check(args) if args.self_check else None
            result = run.finish(outcome | {"self_check": checks, "memory_estimate_gb": memory})
            metrics = {"validation loss": result["final"]["loss"], "perplexity": result["final"]["ppl"]}
            metrics |= {k: result[k] for k in "parameters steps tokens causality_max_abs_diff".split()}
            load = f'python hst_train.py --generate "The lattice" --ckpt {run.dir / args.variant}_final.pt'
            caveat = "A loss says nothing of the mechanisms: only `--variant plain` at equal parameters and tokens "
            caveat += "does; what learns fastest in a short run need not be best in a long one: docs/hst.md."
            title = f"HST {args.variant} ({args.mode} mode)"
            core.model_card(run, result, title, "none, trained from scratch", metrics, load, caveat)
        final, gap = result["final"], ""
        if args.data == "synthetic":
            gap = f" ({result['data']['entropy_floor_nats']:.4f} is the entropy)"
        run.say(f"TRAINING COMPLETE: validation loss {final['loss']:.4f}{gap}, perplexity {final['ppl']:.2f}")
        if result["self_check"]:
            run.say(f"Self-check passed: {json.dumps(result['self_check'])}")
        run.say(f"[Save] Results: {run.result}")
    return result


def main(argv=None):
    args = parse(argv)
    if args.list_variants:
        return list_variants(args)
    if args.params:
        return print_params(args)
    if args.generate is not None:
        return generate_text(args)
    accelerator = core.engine(args)
    if args.variant != "all":
        return run_one(args, accelerator)
    where = {v: args.save_dir and f"{args.save_dir}/{v}" for v in VARIANTS}
    return {v: run_one(settle(dataclasses.replace(args, save_dir=where[v]), v), accelerator) for v in VARIANTS}


if __name__ == "__main__":
    core.cli(main, "--batch_size (and raise --grad_accum), --max_seq_len, --n_layers 12 or --d_model 512")
