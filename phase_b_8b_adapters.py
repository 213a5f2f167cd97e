"""CF-HoT, phase B: control-field adapters on a frozen pretrained model. Do they change what it writes for the better?

Adapter i reads the tensor that layer i's attention reads and biases that layer's attention scores, per key j:

    dh_t = clamp(softplus(MLP[x_t; W_f x_t]), 0, 1)     h_t = (a h_{t-1} + (1 - a) dh_t), divided by 1 - a^(t+1)
    score_ij += log g_j,  g_j = sigmoid(-|lambda| h_j)

At the start dh is the same everywhere, so h and g are constant, softmax ignores them, and the wrapped model gives the
base model's logits. The published adapters computed g and never applied it; its successors lost the causal mask.

Smoke test   python phase_b_8b_adapters.py --test                                                    CPU, 15 s
Document     python phase_b_8b_adapters.py --model_path /path/to/llama-8b --output_dir ./results/phase_b \\
                 --batch_size 2 --max_steps 5000
Offline      python phase_b_8b_adapters.py --model_path runs/backbone/lm --data local --output_dir runs/phase_b
             (make the model first: python pretrain_backbone.py --kind lm)
Expect       a gate that acts, a perplexity as before, and a repetition rate to compare with a plain repetition penalty
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
    model_path: str = arg("", "local model directory, hub id, or tiny; unset: needed, unless --test", "training")
    output_dir: str = arg("./results/phase_b", "run directory", "training")
    batch_size: int = arg(2, "sequences per micro-batch (and process)", "training")
    max_steps: int = arg(5000, "training length in updates", "training")
    lr: float = arg(1e-4, "AdamW learning rate of the adapters", "training")
    grad_accum: int = arg(16, "micro-batches per update", "training")
    seq_len: int = arg(512, "window length", "training")
    save_interval: int = arg(1000, "checkpoint every so many updates", "training")
    eval_interval: int = arg(500, "evaluate every so many updates", "training")
    log_interval: int = arg(10, "log every so many updates", "training")
    eval_windows: int = arg(32, "validation rows to evaluate on", "training")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass", "training")
    lora_reference: bool = arg(False, "train a LoRA of as many parameters on the same data beside it", "training")
    d_fiber: int = arg(16, "width of the fiber projection", "adapter")
    d_control: int = arg(64, "hidden width of the predictor", "adapter")
    momentum: float = arg(0.9, "a of the moving average, in [0, 1)", "adapter")
    lambda_init: float = arg(1.0, "initial gate scale (learned)", "adapter")
    lambda_hol: float = arg(1e-4, "weight of the mean of dh in the loss", "adapter")
    field_axis: Literal["position", "layer", "both"] = arg("position", "axis of the moving average", "adapter")
    adapter: str = arg("", "adapter file or directory to start from, or to evaluate; unset: from the seed", "adapter")
    load_in_4bit: Literal["auto", "on", "off"] = arg("auto", "NF4; needs CUDA and bitsandbytes", "base model")
    attn_implementation: str = arg("sdpa", "sdpa or eager", "base model")
    data: Literal["wikitext2", "wikitext103", "text", "local", "synthetic"] = arg("wikitext2", "training text", "data")
    data_path: str = arg("", "file or folder for --data text; unset: not used", "data")
    no_pack: bool = arg(False, "one padded line to a row, instead of lines packed into full windows", "data")
    allow_pickle: bool = arg(False, "accept a published --adapter file, whose config is a pickled object", "adapter")
    eval_only: bool = arg(False, "evaluate --adapter without training", "evaluation")
    no_eval: bool = arg(False, "do not generate text at the end", "evaluation")
    prompts: str = arg("", "file with one prompt a line; unset: the built-in ones", "evaluation")
    max_new_tokens: int = arg(100, "length of a continuation", "evaluation")
    samples: int = arg(5, "sampled continuations of each prompt, besides the greedy one", "evaluation")


TEST = dict(
    model_path="tiny_base",
    max_steps=20,
    grad_accum=2,
    seq_len=64,
    save_interval=10,
    eval_interval=10,
    eval_windows=8,
    d_fiber=4,
    d_control=8,
    lr=3e-3,
    data="synthetic",
    max_new_tokens=24,
    samples=2,
    device="cpu",
    threads=1,
)
FREE = (
    "output_dir",
    "max_steps",
    "eval_interval",
    "save_interval",
    "log_interval",
    "no_eval",
    "eval_only",
    "prompts",
    "max_new_tokens",
    "samples",
    "lora_reference",
)


def parse(argv=None) -> Args:
    args = core.parse_args(Args, TEST, argv, __doc__)
    require(args.model_path, "--model_path is needed: a local model directory, a hub id, or tiny")
    core.require_positive(
        args,
        "batch_size max_steps grad_accum seq_len save_interval eval_interval log_interval "
        "eval_windows d_fiber d_control max_new_tokens",
    )
    require(args.lr > 0 and args.samples >= 0, "--lr must be positive and --samples not negative")
    require(0 <= args.momentum < 1, f"--momentum {args.momentum} is not in [0, 1): 1 would never forget")
    require(
        args.attn_implementation in ("sdpa", "eager"),
        f"--attn_implementation {args.attn_implementation} takes no bias per key: use sdpa or eager",
    )
    require(args.adapter or not args.eval_only, "--eval_only needs --adapter FILE")
    return args


# ---------------------------------------------------------------------------------------------------------- model
def ema(x: Tensor, momentum: float, start: Tensor | None = None, chunk: int = 128) -> Tensor:
    """h_t = a h_{t-1} + (1 - a) x_t over the last axis of `x` [B, T], from h_{-1} = `start` [B] (zero).

    One product with the matrix a^(t - i) up to T = 1024; longer inputs are cut into chunks of 128, whose ends are
    carried on by the same recurrence with a^128, so the cost is O(T). ValueError unless 0 <= momentum < 1.
    """  # twin of phase_a_validation.py:ema
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
    """((1 - a) a^(t - i) for i <= t, else 0 [T, T]; a^(t + 1) [T])."""  # twin of phase_a_validation.py:ema_kernel
    steps = torch.arange(T, device=device)
    power = (steps[:, None] - steps).clamp(min=0)  # never negative, so no power overflows
    return ((1 - momentum) * momentum ** power.to(dtype)).tril(), momentum ** (steps + 1).to(dtype)


LOWEST = math.log(1e-8)  # of log g: finite in half precision


class CFAdapter(nn.Module):
    """The increment and gate of one layer, in fp32 whatever the base's precision; names as in the published files."""

    def __init__(self, d_model: int, d_fiber: int, d_control: int, lambda_init: float):
        super().__init__()
        self.fiber_proj = nn.Linear(d_model, d_fiber, bias=False)
        self.predictor = nn.Sequential(nn.Linear(d_model + d_fiber, d_control), nn.GELU(), nn.Linear(d_control, 1))
        self.lambda_gate = nn.Parameter(torch.tensor(float(lambda_init)))

    def reset(self) -> None:
        """A constant increment of softplus(-2) = 0.13: the wrapped model starts as the base model."""
        with torch.no_grad():
            self.predictor[2].weight.zero_()
            self.predictor[2].bias.fill_(-2.0)

    def increment(self, x: Tensor) -> Tensor:  # x: B T D -> softplus, before the clamp, B T
        x = x.to(self.fiber_proj.weight.dtype)
        z = self.predictor(torch.cat([x, self.fiber_proj(x)], -1)).squeeze(-1)
        return F.softplus(z.float())

    def log_gate(self, h: Tensor) -> Tensor:
        return F.logsigmoid(-self.lambda_gate.float().abs() * h).clamp(min=LOWEST)

    def folded(self) -> tuple:
        """What one decoding step needs: the predictor with the fiber projection folded into its first layer (there is
        nothing between them), -|lambda|, and whether that can take log g, for h <= 1, below its floor."""
        (first, _, last), width = self.predictor, self.fiber_proj.in_features
        weight = first.weight[:, :width] + first.weight[:, width:] @ self.fiber_proj.weight  # c D
        scale = -float(self.lambda_gate.abs())
        return weight, first.bias, last.weight, last.bias, scale, scale < LOWEST + 0.1


@dataclasses.dataclass
class CFAdapterConfig:
    d_model: int = 4096
    n_layers: int = 32
    d_fiber: int = 16
    d_control: int = 64
    momentum: float = 0.9
    lambda_init: float = 1.0
    lambda_hol_loss: float = 1e-4
    adapter_lr: float = 1e-4
    field_axis: str = "position"


class Field(NamedTuple):
    """What one layer computed, each [B, T]: log gate, clamped increment, raw increment."""

    log_g: Tensor
    dh: Tensor
    raw: Tensor


def add_bias(mask: Tensor | None, bias: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """The additive mask [B, 1, queries, K] that holds `bias` [B, K] where attention is allowed.

    `mask`: what the layer was given, None (plain causal), boolean (True: allowed) or additive. A mask longer than
    the keys (a static cache) gets no bias there. None is never passed on: sdpa would then drop the bias.
    """
    keys, lowest = bias.shape[1], torch.finfo(dtype).min
    bias = bias[:, None, None, :].to(dtype)
    if mask is None:
        if queries == 1:
            return bias
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).tril(keys - queries)
        return torch.where(allowed, bias, lowest)
    if mask.shape[-1] > keys:
        bias = F.pad(bias, (0, mask.shape[-1] - keys))
    return torch.where(mask, bias, lowest) if mask.dtype == torch.bool else (mask + bias).clamp(min=lowest)


class FieldState:
    """Per layer the field's last uncorrected h [B, 1] and log g of all past keys, in a buffer [B, room]. It lives on
    the KV cache and follows it: whatever reorders, selects, crops or resets the cache does the same here."""

    def __init__(self, cache):
        self.h, self.log_g, self.folded = {}, {}, {}
        for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset"):
            if hasattr(cache, name):
                setattr(cache, name, self._follow(getattr(cache, name), getattr(self, "_" + name)))
        cache.control_field = self

    def extend(self, i: int, past: int, log_g: Tensor) -> Tensor:
        """log g [B, past + T] of layer i with the new `log_g` [B, T] at its end. Written in place: a new small tensor
        at every decoding step would scatter the allocator's free blocks and slow the cache's own growth."""
        T = log_g.shape[1]
        if log_g.requires_grad:
            self.log_g[i] = torch.cat([self.log_g[i][:, :past], log_g], 1) if past else log_g
            return self.log_g[i]
        if past == 0 or past + T > self.log_g[i].shape[1]:
            room = log_g.new_zeros(log_g.shape[0], max(256, 2 * (past + T)))
            if past:
                room[:, :past] = self.log_g[i][:, :past]
            self.log_g[i] = room
        self.log_g[i].narrow(1, past, T).copy_(log_g)
        return self.log_g[i].narrow(1, 0, past + T)

    def _follow(self, theirs, ours):
        def both(*args, **kwargs):
            ours(*args, **kwargs)
            return theirs(*args, **kwargs)

        return both

    def _each(self, change):
        for store in (self.h, self.log_g):
            for layer in store:
                store[layer] = change(store[layer])

    def _reorder_cache(self, beam_idx):
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def _batch_select_indices(self, indices):
        self._each(lambda x: x[indices.to(x.device)])

    def _batch_repeat_interleave(self, repeats):
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def _crop(self, length):
        if length:  # the h of an earlier position is not kept: only a crop to nothing is exact
            raise ValueError("a cache with a control field cannot be cropped: start a new one")
        self._reset()

    def _reset(self):
        self.h.clear()
        self.log_g.clear()


class CFHoTLlamaHooked(nn.Module):
    """A frozen Llama-style model with an adapter hooked before every `self_attn`.

    `base.generate(...)` works as ever; nothing needs to be reset between calls. `disabled()` gives the base model
    back for a while, `remove_hooks()` for good. ValueError if the layers are not where they are expected.
    """

    def __init__(self, base, config: CFAdapterConfig | None = None, seed: int = 0):
        super().__init__()
        inner = base.get_base_model() if hasattr(base, "peft_config") else base
        self.config = config or CFAdapterConfig(base.config.hidden_size, base.config.num_hidden_layers)
        layers = getattr(getattr(inner, "model", None), "layers", None)
        if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
            raise ValueError(f"{type(base).__name__} has no model.layers[i].self_attn: not a Llama-style model")
        sizes = (base.config.hidden_size, base.config.num_hidden_layers)
        if sizes != (self.config.d_model, self.config.n_layers):
            raise ValueError(
                f"adapters for width {self.config.d_model} and {self.config.n_layers} layers do not fit a "
                f"model of width {sizes[0]} and {sizes[1]} layers"
            )
        if base.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"{base.config._attn_implementation} takes no bias per key: load the model with sdpa")
        self.base, self.fields, self.mode, self.shuffle_seed = base.requires_grad_(False).eval(), {}, "gate", 0
        c = self.config
        self.cf_adapters = nn.ModuleList(CFAdapter(c.d_model, c.d_fiber, c.d_control, c.lambda_init) for _ in layers)
        core.init_normal(self.cf_adapters, seed)
        for adapter, layer in zip(self.cf_adapters, layers):
            adapter.reset()
            adapter.to(next(layer.parameters()).device)
        self._mask, self._pass, self._layer_field, self._shuffles = None, None, {}, {}
        self._handles = [inner.model.register_forward_pre_hook(self._keep_mask, with_kwargs=True)]
        for i, layer in enumerate(layers):
            hook = functools.partial(self._bias_attention, i)
            self._handles.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))

    def train(self, mode: bool = True):
        super().train(mode)
        self.base.eval()  # no dropout in the frozen base, whatever the adapters do
        return self

    def get_adapter_params(self) -> list[nn.Parameter]:
        return list(self.cf_adapters.parameters())

    def remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextlib.contextmanager
    def using(self, mode: str):
        """`gate`; `off`: the base model; `shuffled`: key j takes the log g of a random earlier key, so that the values
        stay and their learned placement goes."""
        before, self.mode = self.mode, mode
        try:
            yield self
        finally:
            self.mode = before

    def disabled(self):
        return self.using("off")

    def generate(self, *args, **kwargs):
        return self.base.generate(*args, **kwargs)

    def _keep_mask(self, module, args, kwargs) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._mask, self._pass = mask if mask is not None and mask.ndim == 2 else None, None

    def _bias_attention(self, i: int, module, args, kwargs):
        if self.mode == "off":
            return None
        if "attention_mask" not in kwargs:
            raise ValueError("this model's attention does not take attention_mask by keyword: adapters cannot act")
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # B T D
        cache, state = kwargs.get("past_key_values"), None
        past = cache.get_seq_length(i) if cache is not None else 0
        if cache is not None:
            state = getattr(cache, "control_field", None) or FieldState(cache)
            if past == 0:
                for kept in (state.h, state.log_g, state.folded):
                    kept.pop(i, None)
            elif i not in state.log_g:
                raise ValueError("this cache was filled before the adapters were attached: start a new one")
        with torch.autocast(x.device.type, enabled=False):
            log_g = self._log_gate(i, x, past, state)  # B past+T
            bias = log_g if self.mode == "gate" else self._shuffled(i, log_g)
        kwargs["attention_mask"] = add_bias(kwargs["attention_mask"], bias, x.shape[1], x.dtype)
        return args, kwargs

    def _log_gate(self, i: int, x: Tensor, past: int, state: FieldState | None) -> Tensor:
        """log g of all keys so far [B, past + T]; keeps this layer's field for the metrics and the cache's state."""
        a, axis, T = self.config.momentum, self.config.field_axis, x.shape[1]
        if i == 0 or self._pass is None:  # once for all layers: which tokens are real, and the start-up correction
            real = None if self._mask is None else self._mask[:, past : past + T].float()
            n = (
                self._mask.cumsum(-1)[:, past : past + T].clamp(min=1)
                if self._mask is not None
                else (torch.arange(past + 1, past + T + 1, device=x.device))
            )
            self._pass = real, 1 / (1 - a ** n.float())
        real, correction = (t if t is None or t.device == x.device else t.to(x.device) for t in self._pass)
        if T == 1 and past and axis == "position" and not torch.is_grad_enabled():
            return self._decoding_step(i, x, past, state, real, correction)
        raw = self.cf_adapters[i].increment(x)  # B T
        dh = raw.clamp(0, 1) if real is None else raw.clamp(0, 1) * real
        h = dh
        if axis != "position":  # a moving average over the layers
            before = self._layer_field[i - 1].to(x.device) if i else torch.zeros_like(dh)
            self._layer_field[i] = a * before + (1 - a) * dh
            h = self._layer_field[i] / (1 - a ** (i + 1))
        if axis != "layer":  # over the positions, corrected for the zero it starts from: n real tokens so far
            h = ema(h, a, state.h[i][:, 0] if past else None)
            if state is not None:
                state.h[i] = h[:, -1:].clone()
            h = h * correction
        log_g = self.cf_adapters[i].log_gate(h.clamp(0, 10))
        if state is not None:
            return state.extend(i, past, log_g)
        self.fields[i] = Field(log_g, dh, raw)
        return log_g

    def _decoding_step(self, i: int, x: Tensor, past: int, state: FieldState, real, correction) -> Tensor:
        """`_log_gate` for one new token, in as few operations as there can be: on a small model they are the cost."""
        if i not in state.folded:
            state.folded[i] = self.cf_adapters[i].folded()
        weight, bias, last_weight, last_bias, scale, clamps = state.folded[i]
        hidden = F.gelu(F.linear(x[:, 0].to(weight.dtype), weight, bias))  # B c
        dh = F.softplus(F.linear(hidden, last_weight, last_bias)).clamp_(max=1)  # B 1
        dh = dh if real is None else dh * real
        state.h[i] = h = torch.lerp(dh, state.h[i], self.config.momentum)
        log_g = F.logsigmoid(h * correction * scale)  # the field is an average of dh, so within [0, 1] without a clamp
        return state.extend(i, past, log_g.clamp_(min=LOWEST) if clamps else log_g)

    def _shuffled(self, i: int, log_g: Tensor) -> Tensor:
        """Key j takes the log g of an index drawn from 0..j, a fixed function of (seed, layer, j); pads excluded."""
        if i not in self._shuffles:
            self._shuffles[i] = torch.rand(65536, generator=core.generator(self.shuffle_seed, "shuffle", i))
        B, K = log_g.shape
        pads = torch.zeros(B, 1, device=log_g.device) if self._mask is None else (self._mask[:, :K] == 0).sum(1, True)
        j = torch.arange(K, device=log_g.device)
        rank = (j - pads).clamp(min=0).long()  # B K: how many real tokens come before
        u = self._shuffles[i].to(log_g.device)[rank]
        return log_g.gather(1, torch.minimum((pads + (u * (rank + 1)).floor()).long(), j))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = True,
    ) -> dict:
        """input_ids, attention_mask, labels [B, T] -> logits [B, T, V] (unless `return_logits` is off), total_risk (sum
        of dh over layers and real tokens), mean_gate; with labels also lm_loss, risk_reg, loss (shifted here)."""
        self.fields.clear()
        hidden = self.base.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        out = {"logits": self.base.lm_head(hidden)} if return_logits else {}
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.fields:
            log_g, dh, raw = (torch.stack([f[k].to(hidden.device) for f in self.fields.values()]) for k in range(3))
            count = valid.sum() * len(self.fields)
            out |= {"total_risk": dh.sum().detach(), "mean_gate": ((log_g.exp() * valid).sum() / count).detach()}
            out["risk_mean"], out["risk_reg"] = out["total_risk"] / count, (raw * valid).sum() / count
        if labels is not None:
            out["lm_loss"] = core.next_token_loss(hidden, self.base.lm_head.weight, labels)
            out["loss"] = out["lm_loss"]
            if self.fields:
                out["risk_reg"] = self.config.lambda_hol_loss * out["risk_reg"]
                out["loss"] = out["loss"] + out["risk_reg"]
        return out


def load_cf_adapter(base, path: str | Path, allow_pickle: bool = False) -> CFHoTLlamaHooked:
    """`base` wrapped with the adapters of `path`, a file or a directory, in evaluation mode. `allow_pickle` accepts a
    published file, whose config is a pickled CFAdapterConfig: that class and no other. Failure on missing or extra
    tensors, ValueError naming both sizes if they do not fit the model."""
    names = ("__main__.CFAdapterConfig", "phase_b_8b_adapters.CFAdapterConfig") if allow_pickle else ()
    if Path(path).is_dir():  # of save_cf_adapter
        from safetensors.torch import load_file

        config, tensors = (Path(path) / f"adapter_{name}" for name in ("config.json", "model.safetensors"))
        require(config.exists() and tensors.exists(), f"{path}: holds no {config.name} and {tensors.name}")
        saved = {"adapter_state_dict": load_file(tensors), "config": json.loads(config.read_text())}
    else:
        saved = core.load_checkpoint(Path(path), sealed=False, allow=tuple((CFAdapterConfig, name) for name in names))
    require("adapter_state_dict" in saved and "config" in saved, f"{path}: not an adapter file")
    given = saved["config"] if isinstance(saved["config"], dict) else vars(saved["config"])
    known = {f.name for f in dataclasses.fields(CFAdapterConfig)}
    model = CFHoTLlamaHooked(base, CFAdapterConfig(**{k: v for k, v in given.items() if k in known}))
    mine, theirs = model.cf_adapters.state_dict(), saved["adapter_state_dict"]
    wrong = sorted(set(mine) ^ set(theirs)) + [k for k in mine if k in theirs and mine[k].shape != theirs[k].shape]
    if wrong:
        model.remove_hooks()
        raise core.Failure(f"{path}: missing, extra or misshapen tensors: {', '.join(wrong[:4])}")
    model.cf_adapters.load_state_dict(theirs)
    return model.eval()


def save_cf_adapter(model: CFHoTLlamaHooked, directory: Path, base: str) -> None:
    """adapter_model.safetensors and adapter_config.json, which names the base model, in `directory`."""
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().contiguous() for k, v in model.cf_adapters.state_dict().items()}
    core.write_atomic(directory / "adapter_model.safetensors", save(tensors))
    core.write_json(directory / "adapter_config.json", dataclasses.asdict(model.config) | {"base_model": base})


# ----------------------------------------------------------------------------------------------------------- data
class Batch(NamedTuple):
    ids: Tensor
    mask: Tensor
    labels: Tensor


def load_rows(args: Args, tokenizer, split: str) -> list[Tensor]:
    """Lines of more than 100 characters (at most 5,000 to train on), packed into full windows with EOS between them,
    or, with --no_pack, one line a row, cut at --seq_len."""
    lines = [line.strip() for line in core.load_text(args.data, split, args.data_path)]
    lines = [line for line in lines if len(line) > 100][:5000]
    encoded = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"] if lines else []
    if args.no_pack:
        require(encoded, f"--data {args.data} has no line of more than 100 characters: use more text")
        return [torch.tensor(ids[: args.seq_len]) for ids in encoded]
    flat = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
    return list(torch.from_numpy(core.blocks(core.np.array(flat), args.seq_len, f"--data {args.data} ({split})")))


def collate(rows: list[Tensor], pad: int, device) -> Batch:
    """Right-padded rows; padding has mask 0 and label -100."""
    lengths = torch.tensor([len(r) for r in rows])
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return Batch(*(x.to(device) for x in (ids, mask, torch.where(mask.bool(), ids, -100))))


def load_base(args: Args, run: core.Run, accelerator):
    """(base model, tokenizer) in the precision and quantisation asked for; --test makes its own small one."""
    if args.model_path == "tiny_base" and args.test:
        make_tiny_base(args, run, accelerator)
        args.model_path = str(run.dir / "tiny_base")
    device, kwargs = accelerator.device, {"attn_implementation": args.attn_implementation}
    four_bit = args.load_in_4bit != "off" and device.type == "cuda" and _has_bitsandbytes()
    require(four_bit or args.load_in_4bit != "on", "--load_in_4bit on needs CUDA and pip install bitsandbytes; use off")
    half = accelerator.mixed_precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(half, torch.float32)
    if four_bit:
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        kwargs["device_map"] = {"": accelerator.process_index} if accelerator.num_processes > 1 else "auto"
    elif args.load_in_4bit == "auto":
        run.say(f"[4-bit] off: no CUDA device with bitsandbytes here; the base model is loaded in {dtype}")
    model, tokenizer = core.load_backbone(args.model_path, dtype, **({} if args.model_path == "tiny" else kwargs))
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    core.shard_frozen(model, accelerator)
    return (model if four_bit else model.to(device)), tokenizer


def _has_bitsandbytes() -> bool:
    import importlib.util

    return importlib.util.find_spec("bitsandbytes") is not None


def make_tiny_base(args: Args, run: core.Run, accelerator) -> None:
    """OUTPUT/tiny_base for --test: a three-layer GQA Llama, trained 150 updates on synthetic text, so it repeats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = core.train_tokenizer([])
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            vocab_size=259,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    )
    core.init_normal(model, args.seed)
    model.to(accelerator.device)
    rows = core.blocks(core.encode(core.synthetic_text("train"), tokenizer), 64, "synthetic text")
    optimizer = torch.optim.AdamW(core.decay_groups(model, 0.1), lr=5e-3, fused=True)
    for step in range(150 if run.main else 0):
        chosen = core.batch_indices(len(rows), 16, args.seed, step)
        ids = torch.from_numpy(rows[chosen].astype("int64")).to(accelerator.device)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        core.next_token_loss(hidden, model.lm_head.weight, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    if run.main:
        model.save_pretrained(run.dir / "tiny_base")
        tokenizer.save_pretrained(run.dir / "tiny_base")
    accelerator.wait_for_everyone()


# ----------------------------------------------------------------------------------------- the reference: a LoRA
class Lora(nn.Module):
    """A peft LoRA on q_proj and v_proj of about `parameters` parameters, under the same loop and loss."""

    def __init__(self, base, parameters: int):
        super().__init__()
        from peft import LoraConfig, get_peft_model

        per_rank = sum(sum(m.weight.shape) for n, m in base.named_modules() if n.endswith(("q_proj", "v_proj")))
        self.rank = max(1, round(parameters / per_rank))
        self.base = get_peft_model(
            base,
            LoraConfig(r=self.rank, lora_alpha=2 * self.rank, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]),
        )

    def forward(self, input_ids, attention_mask=None, labels=None, return_logits=True) -> dict:
        inner = self.base.get_base_model()
        hidden = inner.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        out = {"logits": inner.lm_head(hidden)} if return_logits else {}
        if labels is not None:
            out["loss"] = out["lm_loss"] = core.next_token_loss(hidden, inner.lm_head.weight, labels)
        return out


# ------------------------------------------------------------------------------------------------------- evaluate
PROMPTS = """The will to power, as described by Nietzsche, is
The old bridge at the edge of the town had
When the committee met again in the spring,
A good teacher knows that
The first thing to check when a program fails is
Water that falls on the mountain
She opened the letter and read
The function returns a value that
In the middle of the night the station
Most people who learn a second language
The museum's new wing was built
If the connection is lost, the server
There are three reasons why the harvest
The captain looked at the map and
An object of this class holds
After the storm the fishermen
The law was changed because
Every morning the baker
The method raises an error when
On the last page of the diary
What the two theories have in common is""".splitlines()


def text_metrics(ids: list[int], prompt: list[int], tokenizer) -> dict[str, float]:
    """Repetition of a continuation `ids`: rep_w counts the prompt as context; rep_w_text is the logs' variant, prompt
    and continuation encoded again as one text; phrase_rep counts four-word phrases that occur at least twice."""
    again = tokenizer(tokenizer.decode([*prompt, *ids]), add_special_tokens=False)["input_ids"]
    words = tokenizer.decode(ids).lower().split()
    phrases = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    repeated = sum(phrases.count(p) > 1 for p in set(phrases))
    found = {"rep_w": core.rep_w(ids, prompt), "rep_w_text": core.rep_w(again[1:], again[:1]), "phrase_rep": repeated}
    found |= {f"distinct_{n}": core.distinct_n(ids, n) for n in (2, 3, 4)}
    found |= {f"rep_{n}": 1 - found[f"distinct_{n}"] for n in (2, 3, 4)}
    return found | {"unique_rate": len(set(ids)) / max(1, len(ids)), "length": len(ids)}


@torch.no_grad()
def continuations(model, tokenizer, prompts: list[str], args: Args, seed: int | None, **kwargs) -> list[list[int]]:
    """One continuation of each prompt, as ids without what follows EOS: greedy, or sampled (T 0.8, top-p 0.9) from
    `seed`, the same for every condition."""
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    batch = batch.to(next(model.parameters()).device)
    how = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(core.derived_seed(args.seed, "sampling", seed))
        out = model.generate(
            **batch, max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **how, **kwargs
        )
    rows = out[:, batch["input_ids"].shape[1] :].tolist()
    eos = tokenizer.eos_token_id
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def generate_all(models: dict, tokenizer, prompts: list[str], args: Args) -> tuple[list[dict], dict]:
    """(rows for generations.jsonl, statistics): every condition greedy and sampled, each paired with `base`.

    `models`: condition -> a context manager that yields the model, and further arguments of generate. The statistics
    are means over prompts; differences from base are paired by prompt, cut to the shorter of the two continuations,
    with a 95 % bootstrap interval over prompts.
    """
    texts, rows, stats = {}, [], {}
    for condition, (context, kwargs) in models.items():
        with context() as model:
            for seed in (None, *range(args.samples)):
                texts[condition, seed] = continuations(model, tokenizer, prompts, args, seed, **kwargs)
    encoded = [tokenizer(p)["input_ids"] for p in prompts]
    for decode in ("greedy", "sampled"):
        seeds = [None] if decode == "greedy" else list(range(args.samples))
        for condition in models if seeds else ():
            per_prompt, differences = [], []
            for i, prompt in enumerate(encoded):
                mine, gaps = [], []
                for seed in seeds:
                    ids, base = texts[condition, seed][i], texts["base", seed][i]
                    full, cut = text_metrics(ids, prompt, tokenizer), min(len(ids), len(base))
                    pair = [text_metrics(x[:cut], prompt, tokenizer) for x in (ids, base)]
                    mine.append(full)
                    gaps.append({k: pair[0][k] - pair[1][k] for k in full})
                    rows.append(
                        {
                            "prompt": prompts[i],
                            "condition": condition,
                            "decode": decode,
                            "seed": seed,
                            "text": tokenizer.decode(ids),
                            "metrics": full,
                            "matched": pair[0],
                        }
                    )
                per_prompt.append({k: sum(m[k] for m in mine) / len(mine) for k in mine[0]})
                differences.append({k: sum(g[k] for g in gaps) / len(gaps) for k in gaps[0]})
            stats.setdefault(decode, {})[condition] = {
                "mean": {k: sum(p[k] for p in per_prompt) / len(per_prompt) for k in per_prompt[0]},
                "minus_base": {k: core.bootstrap([d[k] for d in differences]) for k in differences[0]},
            }
    return rows, stats


@torch.no_grad()
def evaluate(model, batches: list[Batch]) -> dict:
    """Validation loss, token-weighted, and of adapters the state of the field."""
    losses, counts, stats = 0.0, 0, []
    for batch in batches:
        out = model(batch.ids, batch.mask, batch.labels, return_logits=False)
        n = int((batch.labels[:, 1:] != -100).sum())
        losses, counts = losses + float(out["lm_loss"]) * n, counts + n
        if getattr(model, "fields", None):
            stats.append(field_stats(list(model.fields.values()), batch.mask))
    found = {"loss": losses / counts, "ppl": core.perplexity(losses / counts), "tokens": counts}
    names = ("gate", "risk_mean", "gate_spread", "sat_frac")
    return found | (dict(zip(names, torch.stack(stats).mean(0).tolist())) if stats else {})


def field_stats(fields: list[Field], mask: Tensor) -> Tensor:
    """[mean gate, mean dh, spread of log g over real positions from 16 on, share of dh >= 1]."""
    log_g, dh = (torch.stack([f[k].to(mask.device) for f in fields]) for k in range(2))  # L B T
    valid = mask.expand_as(dh).bool()
    late = valid & (torch.arange(mask.shape[1], device=mask.device) >= min(16, mask.shape[1] // 2))
    n = late.sum(-1).clamp(min=1)
    centred = torch.where(late, log_g - ((log_g * late).sum(-1) / n)[..., None], 0.0)
    spread = ((centred.square().sum(-1) / n).sqrt()).mean()
    return torch.stack([log_g.exp()[valid].mean(), dh[valid].mean(), spread, (dh[valid] >= 1).float().mean()])


@torch.no_grad()
def compare_with_base(model: CFHoTLlamaHooked, batches: list[Batch]) -> dict:
    """kl_base: mean over validation tokens of KL(base || gated); max_abs_dlogit: largest change of a logit. Vocabulary
    distributions exist for 128 positions at a time."""
    divergence, count, largest = 0.0, 0, 0.0
    head = model.base.lm_head
    for batch in batches:
        hidden = []
        for mode in ("off", "gate"):
            with model.using(mode):
                hidden.append(model.base.model(batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state)
        real = batch.mask.bool()
        for base, gated in zip(*(h[real].split(128) for h in hidden)):
            p, q = (head(x).float() for x in (base, gated))
            largest = max(largest, float((p - q).abs().max()))
            divergence += float(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"))
            count += len(base)
    return {"kl_base": divergence / count, "max_abs_dlogit": largest}


# ---------------------------------------------------------------------------------------------------------- train
def train(arm: str, model, base, tokenizer, args: Args, run: core.Run, accelerator, stop_requested) -> dict:
    """Train the adapters (`cf_adapter`) or the LoRA (`lora`) of `model`; returns history, final figures and times."""
    device, history = accelerator.device, {k: [] for k in "train_loss lm_loss risk gate val_loss".split()}
    rows, validation = (load_rows(args, tokenizer, split) for split in ("train", "validation"))
    pad = tokenizer.pad_token_id
    held_out = [
        collate(validation[i : i + args.batch_size], pad, device)
        for i in range(0, min(args.eval_windows, len(validation)), args.batch_size)
    ]
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(core.decay_groups(model, 0.01), lr=args.lr, fused=True)
    plain = model
    model, optimizer = core.prepare(model, optimizer, accelerator)
    step, sums, seconds, best = 0, torch.zeros(5, device=device), 0.0, None  # loss, lm, risk, gate, micro-batches
    skipped = torch.zeros(2, device=device)
    torch.manual_seed(core.derived_seed(args.seed, "dropout", accelerator.process_index))
    saved = find_checkpoint(arm, args, run)
    if saved:
        core.check_same_config(saved["config"], args, FREE)
        missing = sorted(set(trainable) ^ set(saved["trainable"]))
        require(not missing, f"--resume: tensors differ: {', '.join(missing[:4])}")
        for name, p in trainable.items():
            p.data.copy_(saved["trainable"][name])
        optimizer.load_state_dict(saved["optimizer_state_dict"])
        step, history, seconds, best = saved["step"], saved["history"], saved["seconds"], saved["best"]
        sums, skipped = saved["sums"].to(device), saved["skipped"].to(device)
        if step < args.max_steps:  # else the rows behind it are the next arm's
            run.rewind(saved["log_size"])
        core.set_rng_state(saved["rng_state"], accelerator)
        run.say(f"[Resume] {arm}: from step {step}")
    elif args.resume:
        run.forget(arm=arm)

    def adapter_file(name: str) -> None:
        if run.main and arm == "cf_adapter":
            shape = {k: getattr(base.config, k) for k in "model_type hidden_size num_hidden_layers vocab_size".split()}
            core.save_checkpoint(
                run.dir / name,
                {
                    "format_version": 1,
                    "adapter_state_dict": plain.cf_adapters.state_dict(),
                    "history": history,
                    "config": dataclasses.asdict(plain.config),
                    "base": shape | {"name": args.model_path},
                },
            )

    def save() -> None:
        state = {
            "step": step,
            "trainable": {n: p.detach() for n, p in trainable.items()},
            "history": history,
            "optimizer_state_dict": optimizer.state_dict(),
            "config": vars(args),
            "best": best,
            "sums": accelerator.reduce(sums, "mean"),
            "skipped": skipped,
            "seconds": seconds,
            "rng_state": core.rng_state(accelerator),
            "log_size": run.log_size(),
        }
        if arm == "cf_adapter":
            state["adapter_state_dict"] = plain.cf_adapters.state_dict()
        if run.main:
            core.save_checkpoint(run.dir / f"{arm}_step_{step}.pt", state)
        run.say(f"[Save] {run.dir / f'{arm}_step_{step}.pt'}")

    model.train()
    bar, clock = run.progress(args.max_steps, step, arm), time.perf_counter()
    world, rank = accelerator.num_processes, accelerator.process_index
    while step < args.max_steps:
        group = []
        for i in range(step * args.grad_accum, (step + 1) * args.grad_accum):
            chosen = core.batch_indices(len(rows), args.batch_size * world, args.seed, i)
            mine = chosen[rank * args.batch_size : (rank + 1) * args.batch_size]
            group.append(collate([rows[k] for k in mine], pad, device))
        scored = torch.stack([(b.labels[:, 1:] != -100).sum() for b in group]).float()
        weights = scored / (accelerator.reduce(scored.sum(), "sum") / world)  # every token counts the same in an update
        for i, batch in enumerate(group):
            with accelerator.no_sync(model) if i < len(group) - 1 else contextlib.nullcontext():
                out = model(batch.ids, batch.mask, batch.labels, return_logits=False)
                accelerator.backward(out["loss"] * weights[i])
            zero = torch.zeros_like(sums[0])
            seen = (out["loss"], out["lm_loss"], out.get("total_risk", zero), out.get("mean_gate", zero))
            sums = core.add_loss(sums, *seen)
        norm = accelerator.clip_grad_norm_(list(trainable.values()), 1.0)
        skipped = core.guard_step(optimizer, norm, skipped, accelerator.scaler)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update(1)
        last, stopping = step == args.max_steps, stop_requested()
        if step % args.log_interval == 0 or last:
            core.check_skipped(skipped)
            *means, count = accelerator.reduce(sums, "sum").tolist()
            loss, lm, risk, gate = (x / max(1, count) for x in means)
            sums = torch.zeros_like(sums)
            values = {"train_loss": loss, "lm_loss": lm}
            line = f"Step {step:4d} | LM Loss: {lm:.4f}"
            if arm == "cf_adapter":
                values |= {"risk": risk, "gate": gate}
                line += f" | Risk: {risk:.2f} | Gate: {gate:.3f}"
                if step > 100 and float(out["risk_mean"]) < 1e-3:
                    run.say("WARNING: the mean increment is below 1e-3: the field has collapsed")
            for name, value in values.items():
                history[name].append([step, value])
            run.say(line)
            run.log(arm=arm, step=step, grad_norm=float(norm), **values)
        if step % args.eval_interval == 0 or last or step % args.save_interval == 0 or stopping:
            seconds += time.perf_counter() - clock
            if step % args.eval_interval == 0 or last:
                found = evaluate(plain.eval(), held_out)
                model.train()
                core.check_finite(found["loss"], f"the validation loss at step {step}")
                history["val_loss"].append([step, found["loss"]])
                run.say(f"[Eval] {arm}: Val Loss = {found['loss']:.4f}, PPL = {found['ppl']:.2f}")
                run.log(arm=arm, step=step, val_loss=found["loss"])
                if best is None or found["loss"] < best:
                    best = found["loss"]
                    adapter_file("cf_adapter_best.pt")
            if step % args.save_interval == 0 or last or stopping:
                save()
            if stopping and not last:
                raise core.Failure(f"interrupted at step {step}; continue with --resume auto", 128 + stopping)
            clock = time.perf_counter()
    adapter_file("cf_adapter_final.pt")
    if arm == "cf_adapter":
        run.say(f"Final checkpoint: {run.dir / 'cf_adapter_final.pt'}")
    tokens = args.max_steps * args.grad_accum * args.batch_size * world * args.seq_len
    final = evaluate(plain.eval(), held_out)
    return {
        "history": history,
        "final": final,
        "time_s": seconds,
        "nonfinite_steps": core.check_skipped(skipped),
        "parameters": sum(p.numel() for p in trainable.values()),
        "tokens_per_s": tokens / max(seconds, 1e-9),
        "held_out": held_out,
        "peak_mem_bytes": core.peak_memory(),
    }


def find_checkpoint(arm: str, args: Args, run: core.Run) -> dict | None:
    """The state that --resume names (of this arm), else the newest valid one in the run directory."""
    if args.resume not in ("", "auto"):
        state = core.load_checkpoint(Path(args.resume))
        require("trainable" in state, f"{args.resume}: not a checkpoint of this script; use cf_adapter_step_N.pt")
        if ("adapter_state_dict" in state) == (arm == "cf_adapter"):
            return state
    return core.latest_checkpoint(run.dir, f"{arm}_step_*.pt", run.say) if args.resume else None


# ----------------------------------------------------------------------------------------------------------- main
def criteria(arm: dict, val: dict, stats: dict) -> dict:
    """Whether the adapters act, stay healthy and do no harm; rep_reduced is reported, not required."""
    repetition = stats.get("greedy", {}).get("cfhot", {}).get("minus_base", {}).get("rep_4")
    return {
        "intervention_active": val["max_abs_dlogit"] > 1e-4,
        "gate_in_range": 0.2 <= arm["final"]["gate"] <= 0.8,
        "risk_not_collapsed": arm["final"]["risk_mean"] > 1e-3,
        "val_ppl_not_worse": val["ppl_gated"] <= 1.02 * val["ppl_base"],
        "rep_reduced": repetition["hi"] < 0 if repetition else None,
    }


def report(result: dict, run: core.Run) -> None:
    val = result["val"]
    run.say(
        f"\nPPL base {val['ppl_base']:.3f}, gated {val['ppl_gated']:.3f}; KL {val['kl_base']:.2e}, "
        f"largest change of a logit {val['max_abs_dlogit']:.2e}, gate effect {val['gate_effect']:+.5f} nats"
    )
    if result["lora"]:
        run.say(
            f"LoRA of rank {result['lora']['rank']} ({result['lora']['parameters']:,} parameters): "
            f"PPL {result['lora']['final']['ppl']:.3f}"
        )
    for decode, conditions in result["generation"].items():
        run.say(f"\n{decode:24s} {'rep_4':>8s} {'minus base, 95 % interval':>30s} {'distinct_2':>11s} {'length':>7s}")
        for name, found in conditions.items():
            d = found["minus_base"]["rep_4"]
            gap = f"{d['mean']:+.4f} [{d['lo']:+.4f}, {d['hi']:+.4f}]"
            rep, distinct, length = (found["mean"][k] for k in ("rep_4", "distinct_2", "length"))
            run.say(f"         {name:15s} {rep:8.4f} {gap:>30s} {distinct:11.4f} {length:7.1f}")
    for name, met in result["criteria"].items():
        run.say(f"  {name:20s} {'no data' if met is None else 'yes' if met else 'no'}")
    run.say(f"[Save] Results: {run.result}")


def wrap(base, args: Args) -> CFHoTLlamaHooked:
    """`base` with the adapters of --adapter, or new ones."""
    if args.adapter:
        try:
            return load_cf_adapter(base, args.adapter, args.allow_pickle)
        except ValueError as error:  # of another model
            raise core.Failure(f"{args.adapter}: {error}") from error
    config = CFAdapterConfig(
        base.config.hidden_size,
        base.config.num_hidden_layers,
        args.d_fiber,
        args.d_control,
        args.momentum,
        args.lambda_init,
        args.lambda_hol,
        args.lr,
        args.field_axis,
    )
    return CFHoTLlamaHooked(base, config, args.seed)


def run_all(args: Args, run: core.Run, accelerator, stop_requested) -> dict:
    """Base, adapters, and if asked for LoRA: train, evaluate, generate; the result."""
    base, tokenizer = load_base(args, run, accelerator)
    base_parameters = sum(p.numel() for p in base.parameters())
    before = {n: p.detach().clone() for n, p in base.named_parameters()} if base_parameters < 1e8 else {}
    model = wrap(base, args)
    audit = core.causality_audit(model, base.config.vocab_size, args.seq_len)
    limit = 1e-5 if base.dtype == torch.float32 else 1e-3
    require(audit <= limit, f"the model reads the future ({audit:.1e})", core.CHECK_FAILED)
    adapters = sum(p.numel() for p in model.get_adapter_params())
    run.say(f"[CFHoT-Hooked] Adapter params: {adapters:,}")
    updates = f"{args.max_steps} updates = {args.max_steps * args.grad_accum} micro-batches"
    run.say(f"{updates} of {args.batch_size} x {args.seq_len} tokens; causality audit {audit:.1e}")
    if args.eval_only:
        args.max_steps = 0
    arm = train("cf_adapter", model, base, tokenizer, args, run, accelerator, stop_requested)
    held_out = arm.pop("held_out")
    if run.main and not args.eval_only:
        save_cf_adapter(model, run.dir / "adapter", args.model_path)
    model.eval()
    with model.disabled():
        ppl_base = evaluate(model, held_out)
    val = {
        "ppl_base": ppl_base["ppl"],
        "ppl_gated": arm["final"]["ppl"],
        **compare_with_base(model, held_out),
        "gate_effect": ppl_base["loss"] - arm["final"]["loss"],
        "tokens": ppl_base["tokens"],
    }
    frozen = all(torch.equal(p, before[n]) for n, p in base.named_parameters() if n in before)
    core.require(frozen, "the base model's parameters changed: this must not happen")

    lora = None
    if args.lora_reference:
        other = Lora(load_base(args, run, accelerator)[0], adapters)
        lora = train("lora", other, other.base, tokenizer, args, run, accelerator, stop_requested)
        lora.pop("held_out")
        lora["rank"] = other.rank
    stats, rows = {}, []
    if not args.no_eval:
        prompts = [p for p in core.read_text(args.prompts).splitlines() if p.strip()] if args.prompts else PROMPTS
        models = {
            "base": (model.disabled, {}),
            "cfhot": (lambda: model.using("gate"), {}),
            "cfhot_shuffled": (lambda: model.using("shuffled"), {}),
            "rep_penalty": (model.disabled, {"repetition_penalty": 1.2}),
        }
        if lora:
            models["lora"] = (lambda: contextlib.nullcontext(other.base.eval()), {})
        rows, stats = generate_all(models, tokenizer, prompts, args)
    if run.main and rows:
        core.write_atomic(run.dir / "generations.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
    result = {"params": adapters, "base_params": base_parameters, "overhead_pct": 100 * adapters / base_parameters}
    result["final"] = arm["final"] | {"lm_loss": arm["final"]["loss"]}
    return result | {
        "val": val,
        "generation": stats,
        "criteria": criteria(arm, val, stats),
        "cf_adapter": arm,
        "lora": lora,
        "config": vars(args),
        "peak_mem_bytes": core.peak_memory(),
        "time_s": arm["time_s"],
        "causality_max_abs_diff": audit,
        "valid": audit <= 1e-3,
        "base_unchanged": frozen,
        "data": {"source": args.data, "path": args.data_path, "model": args.model_path},
    }


def plan_of(args: Args, accelerator) -> dict:
    """What a run will be, from the model's configuration alone: parameters, tokens, memory, time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    local = args.model_path in ("tiny", "tiny_base")
    try:
        config = core.load_backbone("tiny")[0].config if local else AutoConfig.from_pretrained(args.model_path)
    except (OSError, ValueError) as error:
        raise core.Failure(f"model {args.model_path}: {str(error).splitlines()[0][:120]}") from error

    def build(device):
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config)
        if args.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        return wrap(base, args)

    model = build("meta")
    adapters, base = (sum(p.numel() for p in m.parameters()) for m in (model.cf_adapters, model.base))
    memory = core.memory_estimate(
        model,
        args.batch_size * args.seq_len,
        config.hidden_size,
        config.num_hidden_layers,
        accelerator.mixed_precision != "no",
    )
    tokens = args.max_steps * args.grad_accum * args.batch_size * args.seq_len * accelerator.num_processes
    expected = core.time_estimate(
        model,
        build,
        lambda model, ids: model(ids, None, ids, return_logits=False)["loss"],
        config.vocab_size,
        args.batch_size,
        args.seq_len,
        args.max_steps * args.grad_accum,
        accelerator,
    )
    return {
        "adapter_parameters": adapters,
        "base_parameters": base,
        "tokens": tokens,
        "memory_gb": memory,
        "time": expected,
    }


def main(argv=None) -> dict:
    args = parse(argv)
    accelerator = core.engine(args)
    if args.dry_run:
        plan = plan_of(args, accelerator)
        print(json.dumps(plan, indent=1))
        return plan
    outputs = ("cf_adapter_*.pt", "lora_step_*.pt", "generations.jsonl", "adapter/adapter_*")
    with core.Run(args, args.output_dir, accelerator, "phase_b_results.json", outputs) as run:
        with core.stop_signal(accelerator) as stop_requested:
            result = run.finish(run_all(args, run, accelerator, stop_requested))
        report(result, run)
        val = result["val"]
        core.model_card(
            run,
            result,
            "CF-HoT adapters",
            args.model_path,
            {
                "perplexity of the base model": val["ppl_base"],
                "with the adapters": val["ppl_gated"],
                "gate effect in nats": val["gate_effect"],
                "adapter parameters": result["params"],
            },
            f"python phase_b_8b_adapters.py --model_path {args.model_path} --adapter {run.dir / 'adapter'} --eval_only "
            "--output_dir OTHER",
            "A gate that acts is no proof of a benefit. Whether repetition falls, beside a plain repetition penalty "
            "and a shuffled gate, stands under `generation` in the result file; docs/cfhot.md judges it.",
        )
    return result


if __name__ == "__main__":
    core.cli(main, "--batch_size (and raise --grad_accum) or --seq_len, or add --gradient_checkpointing")
