"""CF-HoT, phase B: control-field adapters on a frozen pretrained model. Do they change what it writes for the better?

Adapter i reads the tensor that layer i's attention reads and biases that layer's attention scores, per key j:

    dh_t = clamp(softplus(MLP[x_t; W_f x_t]), 0, 1)     h_t = (a h_{t-1} + (1 - a) dh_t), divided by 1 - a^(t+1)
    score_ij += log g_j,  g_j = sigmoid(-|lambda| h_j)

At the start dh is the same everywhere, so h and g are constant, softmax ignores them, and the wrapped model gives the
base model's logits. The published adapters computed g and never applied it; its successors lost the causal mask.

Smoke test   python phase_b_8b_adapters.py --test                                                    CPU, 15 s
Document     python phase_b_8b_adapters.py --model_path /path/to/llama-8b --output_dir ./results/phase_b \\
                 --batch_size 2 --max_steps 5000
Offline      python pretrain_backbone.py --kind lm && bash scripts/cfhot_adapter_seeds.sh     two cores, 35 minutes
Expect       a gate that acts, a perplexity as before, and a repetition rate to compare with a plain repetition penalty
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
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
    tuning_windows: int = arg(0, "further validation rows, for choosing a rate: tuning_loss", "training")
    lora_reference: bool = arg(False, "train a LoRA of as many parameters on the same data beside it", "training")
    lora_lr: float = arg(0.0, "the LoRA's learning rate; 0: --lr", "training")
    d_fiber: int = arg(16, "width of the fiber projection", "adapter")
    d_control: int = arg(64, "hidden width of the predictor", "adapter")
    momentum: float = arg(0.9, "a of the moving average, in [0, 1)", "adapter")
    lambda_init: float = arg(1.0, "initial gate scale (learned)", "adapter")
    lambda_hol: float = arg(1e-4, "weight of the mean of dh in the loss", "adapter")
    field_axis: Literal["position", "layer", "both"] = arg("position", "axis of the moving average", "adapter")
    adapter: str = arg("", "adapter file or directory to start from, or to evaluate; unset: from the seed", "adapter")
    load_in_4bit: Literal["auto", "on", "off"] = arg("auto", "NF4; needs CUDA and bitsandbytes", "base model")
    attn_implementation: Literal["sdpa", "eager"] = arg("sdpa", "others take no bias per key", "base model")
    data: Literal["wikitext2", "wikitext103", "text", "local", "synthetic"] = arg("wikitext2", "training text", "data")
    data_path: str = arg("", "file or folder for --data text; unset: not used", "data")
    no_pack: bool = arg(False, "one padded line to a row, instead of lines packed into full windows", "data")
    allow_pickle: bool = arg(False, "accept a published --adapter file, whose config is a pickled object", "adapter")
    eval_only: bool = arg(False, "evaluate --adapter without training", "evaluation")
    no_eval: bool = arg(False, "do not generate text at the end", "evaluation")
    prompts: str = arg("", "file with one prompt a line; unset: the built-in ones", "evaluation")
    max_new_tokens: int = arg(100, "length of a continuation", "evaluation")
    samples: int = arg(5, "sampled continuations of each prompt, besides the greedy one", "evaluation")


TEST = dict(model_path="tiny_base", data="synthetic", device="cpu", threads=1, seq_len=64, d_fiber=4, d_control=8)
TEST |= dict(max_steps=20, lr=3e-3, grad_accum=2, save_interval=10, eval_interval=10, eval_windows=8)
TEST |= dict(max_new_tokens=24, samples=2)
FREE = ("output_dir", "eval_interval", "save_interval", "log_interval")  # may differ when a run goes on
LENGTH = "max_steps"  # more of it continues a run that was finished


def parse(argv=None) -> Args:
    args = core.parse_args(Args, TEST, argv, __doc__)
    require(args.model_path, "--model_path is needed: a local model directory, a hub id, or tiny")
    sizes = "batch_size max_steps grad_accum seq_len d_fiber d_control eval_windows max_new_tokens"
    core.require_positive(args, f"{sizes} save_interval eval_interval log_interval")
    counts = min(args.samples, args.tuning_windows, args.lora_lr)
    require(args.lr > 0 and counts >= 0, "--lr must be positive, --samples, --tuning_windows, --lora_lr not negative")
    require(args.adapter or not args.eval_only, "--eval_only needs --adapter FILE")
    require(0 <= args.momentum < 1, f"--momentum {args.momentum} is not in [0, 1): 1 would never forget")
    return args


# ---------------------------------------------------------------------------------------------------------- model
def ema(x: Tensor, momentum: float, start: Tensor | None = None) -> Tensor:  # twin of phase_a_validation.py:ema
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
    """((1 - a) a^(t - i) for i <= t, else 0 [T, T]; a^(t + 1) [T])."""  # twin of phase_a_validation.py:ema_kernel
    steps = torch.arange(T, device=device)
    power = (steps[:, None] - steps).clamp(min=0)  # never negative, so no power overflows
    return ((1 - momentum) * momentum ** power.to(dtype)).tril(), momentum ** (steps + 1).to(dtype)


class CFAdapter(nn.Module):
    """The increment and gate of one layer, in fp32 whatever the base's precision; names as in the published files."""

    def __init__(self, d_model: int, d_fiber: int, d_control: int, lambda_init: float):
        super().__init__()
        self.fiber_proj = nn.Linear(d_model, d_fiber, bias=False)
        self.predictor = nn.Sequential(nn.Linear(d_model + d_fiber, d_control), nn.GELU(), nn.Linear(d_control, 1))
        self.lambda_gate = nn.Parameter(torch.tensor(float(lambda_init)))
        self._folded: tuple = None, None  # of which weights, W_1 and W_f as one matrix

    def reset(self) -> None:
        """A constant increment of softplus(-2) = 0.13: the wrapped model starts as the base model."""
        nn.init.zeros_(self.predictor[2].weight)
        nn.init.constant_(self.predictor[2].bias, -2.0)

    def increment(self, x: Tensor) -> Tensor:
        """dh before its clamp [B, T] for x [B, T, D]. W_1 [x; W_f x] is one product with W_1's columns for x plus those
        for the fiber times W_f; without gradients that sum is kept until a weight changes."""
        fiber, (first, act, last) = self.fiber_proj.weight, self.predictor
        now = [(p._version, p.data_ptr(), p.dtype) for p in (fiber, first.weight)]
        if not torch.is_grad_enabled() and self._folded[0] == now:
            folded = self._folded[1]
        else:
            direct, through = first.weight.split([fiber.shape[1], fiber.shape[0]], 1)  # c D, c f
            folded = torch.addmm(direct, through, fiber)  # c D
            self._folded = (None, None) if torch.is_grad_enabled() else (now, folded)
        return F.softplus(last(act(F.linear(x.to(fiber.dtype), folded, first.bias))).squeeze(-1).float())

    def log_gate(self, h: Tensor) -> Tensor:
        """log g of the field h, both [B, T], at least log 1e-8, which half precision holds. The sign of lambda is
        dropped: a negative one would reward risk."""
        return F.logsigmoid(-self.lambda_gate.float().abs() * h).clamp(min=math.log(1e-8))


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


def add_bias(mask: Tensor | None, bias: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """The additive mask [B, 1, queries, K] that holds `bias` [B, K] where attention is allowed. `mask`: what the layer
    was given, None (plain causal), boolean (True: allowed) or additive; one longer than the keys (a static cache) gets
    no bias there, a shorter one (a sliding window) that of the last keys. None would make sdpa drop the bias."""
    keys, lowest = bias.shape[1], torch.finfo(dtype).min
    bias = bias[:, None, None, :].to(dtype)
    if mask is None:
        if queries == 1:
            return bias
        mask = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).tril(keys - queries)
    room = mask.shape[-1] - keys
    bias = F.pad(bias, (0, room)) if room >= 0 else bias[..., -room:]
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, lowest)
    return (mask + bias).clamp(min=lowest)


class Followed:
    """What a KV cache with a control field does besides its own: the field's state follows the rows of the batch."""

    def reorder_cache(self, beam_idx):
        self.control_field.rows(lambda x: x.index_select(0, beam_idx.to(x.device)))
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices):
        self.control_field.rows(lambda x: x[indices.to(x.device)])
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats):
        self.control_field.rows(lambda x: x.repeat_interleave(repeats, 0))
        super().batch_repeat_interleave(repeats)


@functools.cache
def followed(kind: type) -> type:
    return type(kind.__name__, (Followed, kind), {})


class FieldState:
    """Per layer the field's uncorrected h and log g of all past keys, in buffers [B, room] that live on the KV cache.
    How much of them counts is the length of the cache itself, so one that is cropped or reset needs nothing done here;
    an attribute of the cache and a class with its name, and no closure, so that it can be copied."""

    def __init__(self, cache):
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.filled: dict[tuple[str, int], int] = {}
        cache.control_field, cache.__class__ = self, followed(type(cache))

    def rows(self, change) -> None:
        self.buffers = {key: change(x) for key, x in self.buffers.items()}

    def cut(self, i: int, past: int) -> None:
        """What layer i's cache holds from `past` on is no longer what the buffers hold."""
        for name in ("h", "log_g"):
            self.filled[name, i] = min(past, self.filled.get((name, i), 0))

    def extend(self, name: str, i: int, past: int, new: Tensor) -> Tensor:
        """[B, past + T]: `new` [B, T] of layer i after what is there. Written in place: a new small tensor at every
        decoding step would scatter the allocator's free blocks and slow the cache's own growth."""
        key, T = (name, i), new.shape[1]
        if past > self.filled.get(key, 0):
            raise ValueError("this cache was filled without the adapters: start a new one")
        old, self.filled[key] = self.buffers[key] if past else new[:, :0], past + T
        if new.requires_grad:
            self.buffers[key] = torch.cat([old[:, :past], new], 1)
            return self.buffers[key]
        if past + T > old.shape[1]:
            self.buffers[key] = F.pad(old[:, :past], (0, max(256, 2 * (past + T)) - past))
        self.buffers[key].narrow(1, past, T).copy_(new)
        return self.buffers[key].narrow(1, 0, past + T)


def unwrapped(base):
    """The Llama-style model below a peft wrapper, if there is one."""
    return base.get_base_model() if hasattr(base, "peft_config") else base


class CFHoTLlamaHooked(nn.Module):
    """A frozen Llama-style model with an adapter hooked before every `self_attn`. `base.generate(...)` works as ever;
    nothing needs to be reset between calls. `disabled()` gives the base model back for a while, `remove_hooks()` for
    good. ValueError if the layers are not where they are expected."""

    def __init__(self, base, config: CFAdapterConfig | None = None, seed: int = 0):
        super().__init__()
        inner = unwrapped(base)
        width, depth = base.config.hidden_size, base.config.num_hidden_layers
        c = self.config = config or CFAdapterConfig(width, depth)
        layers = getattr(getattr(inner, "model", None), "layers", None)
        if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
            raise ValueError(f"{type(base).__name__} has no model.layers[i].self_attn: not a Llama-style model")
        if (width, depth) != (c.d_model, c.n_layers):
            ours = f"adapters for width {c.d_model} and {c.n_layers} layers"
            raise ValueError(f"{ours} do not fit a model of width {width} and {depth} layers")
        if base.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"{base.config._attn_implementation} takes no bias per key: load the model with sdpa")
        self.base, self.mode = base.requires_grad_(False).eval(), "gate"
        self.cf_adapters = nn.ModuleList(CFAdapter(c.d_model, c.d_fiber, c.d_control, c.lambda_init) for _ in layers)
        core.init_normal(self.cf_adapters, seed)
        for adapter, layer in zip(self.cf_adapters, layers):
            adapter.reset()
            adapter.to(next(layer.parameters()).device)
        self._draws = [torch.rand(65536, generator=core.generator(0, "shuffle", i)) for i in range(depth)]
        # What the hooks of one pass through the layers hand on to each other.
        self._mask: Tensor | None = None  # B K, 1 where a token is real
        self._real: tuple = ()  # what `_tokens` found for this pass, by device
        self._layer_field: dict[int, Tensor] = {}  # the average over the layers, up to and with each layer
        self._fields: dict[int, tuple] = {}  # log g, dh, raw dh by layer: one that is computed again counts once
        self._handles = [inner.model.register_forward_pre_hook(self._keep_mask, with_kwargs=True)]
        for i, layer in enumerate(layers):
            hook = functools.partial(self._bias_attention, i)
            self._handles.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))

    def train(self, mode: bool = True):
        """The mode of the adapters. The frozen base stays in evaluation mode, so that no dropout acts in it. But the
        library recomputes a layer only if that layer trains: with gradient checkpointing it is told so, it alone."""
        super().train(mode)
        self.base.eval()
        for module in self.base.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    def get_adapter_params(self) -> list[nn.Parameter]:
        return list(self.cf_adapters.parameters())

    def remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextlib.contextmanager
    def using(self, mode: str):
        """`gate`; `off`: the base model; `shuffled`: each key has the gate of an earlier one, so the values stay;
        `constant`: all keys of a row have their mean, which softmax ignores."""
        before, self.mode = self.mode, mode
        try:
            yield self
        finally:
            self.mode = before

    def disabled(self):
        return self.using("off")

    def _keep_mask(self, module, args, kwargs) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._real = ()

    def _bias_attention(self, i: int, module, args, kwargs):
        """The hook before layer i's attention: adds log g of every key to the mask that the layer was given."""
        cache, state = kwargs.get("past_key_values"), None
        past = 0 if cache is None else int(cache.get_seq_length(i))  # a static cache has a tensor
        if self.mode == "off":  # the cache grows without the field
            if state := getattr(cache, "control_field", None):
                state.cut(i, past)
            return None
        if "attention_mask" not in kwargs:
            raise ValueError("this model's attention does not take attention_mask by keyword: adapters cannot act")
        x, mask = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], kwargs["attention_mask"]  # B T D
        if cache is not None:
            state = getattr(cache, "control_field", None) or FieldState(cache)
        with torch.autocast(x.device.type, enabled=False):
            real, correction = self._tokens(x, past, mask)
            bias = self._log_gate(i, x, past, state, real, correction)  # B past+T
            if self.mode == "shuffled":
                bias = self._shuffled(i, bias, real)
            elif self.mode == "constant":
                bias = bias.mean(1, keepdim=True).expand_as(bias)
        kwargs["attention_mask"] = add_bias(mask, bias, x.shape[1], x.dtype)
        return args, kwargs

    def _log_gate(self, i: int, x: Tensor, past: int, state: FieldState | None, real, correction) -> Tensor:
        """log g of all keys so far [B, past + T] for the new x [B, T, D]; `state`: the cache's, if there is one; `real`
        and `correction`: see `_tokens`."""
        a, axis = self.config.momentum, self.config.field_axis
        raw = self.cf_adapters[i].increment(x)  # B T
        dh = h = raw.clamp(0, 1) * real[:, past:]
        if axis != "position":  # a moving average over the layers, corrected for the zero it starts from
            before = self._layer_field[i - 1].to(x.device) if i else torch.zeros_like(dh)
            self._layer_field[i] = a * before + (1 - a) * dh
            h = self._layer_field[i] / (1 - a ** (i + 1))
        if axis != "layer":  # over the positions, in the same way
            h = ema(h, a, state.buffers["h", i][:, past - 1] if past and state.filled.get(("h", i)) else None)
            if state is not None:
                state.extend("h", i, past, h)
            h = h * correction
        log_g = self.cf_adapters[i].log_gate(h.clamp(0, 10))
        if state is not None:
            return state.extend("log_g", i, past, log_g)
        self._fields[i] = log_g, dh, raw
        return log_g

    def _tokens(self, x: Tensor, past: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(1 where a token is real, 0 on padding [1 or B, past + T]; of the new ones the factor 1 / (1 - a^n) [1 or B,
        T] with n real tokens so far): once for all layers. From the model's own 2-D mask or, with a static cache, from
        the 4-D mask [B, 1, T, K] that the layer is given: some query may see a real key."""
        if self._real and self._real[0] == x.device:
            return self._real[1:]
        end = past + x.shape[1]
        if self._mask is not None:
            real = self._mask[:, :end].to(x.device).float()
        elif mask is None:
            real = torch.ones(1, end, device=x.device)
        else:
            if mask.shape[-1] < end:
                raise ValueError("padding past a sliding window needs the 2-D attention_mask: use a dynamic cache")
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            real = allowed[:, 0, :, :end].any(1).float()
        self._real = x.device, real, 1 / (1 - self.config.momentum ** real.cumsum(1)[:, past:].clamp(min=1))
        return self._real[1:]

    def _shuffled(self, i: int, log_g: Tensor, real: Tensor) -> Tensor:
        """Key j takes the log g of an index drawn from 0..j, no pad; the draw depends on layer and j alone."""
        j = torch.arange(log_g.shape[1], device=log_g.device)  # K
        rank = (real.cumsum(1) - 1).clamp(min=0).long()  # 1 or B, K: how many real tokens come before
        u = self._draws[i].to(log_g.device)[rank]
        return log_g.gather(1, (j - rank + (u * (rank + 1)).floor().long()).expand_as(log_g))

    def forward(self, input_ids: Tensor, attention_mask=None, labels=None, return_logits: bool = True) -> dict:
        """input_ids, attention_mask, labels [B, T] -> logits [B, T, V] (unless `return_logits` is off), total_risk (sum
        of dh over layers and real tokens), mean_gate, log_g and dh [L, B, T]; with labels (shifted here) also lm_loss,
        risk_reg, loss. Without a gate (`disabled`) only logits, lm_loss and loss."""
        self._fields.clear()
        inner = unwrapped(self.base)
        hidden = inner.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state  # B T D
        out = {"logits": inner.lm_head(hidden)} if return_logits else {}
        if labels is not None:
            out["lm_loss"] = out["loss"] = core.next_token_loss(hidden, inner.lm_head.weight, labels)
        if not self._fields:
            return out
        layers = [[x.to(hidden.device) for x in field] for field in self._fields.values()]
        log_g, dh, raw = (torch.stack(parts) for parts in zip(*layers))  # each L B T
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        count = valid.sum() * len(layers)
        out |= {"log_g": log_g.detach(), "dh": dh.detach(), "total_risk": dh.sum().detach()}
        out["mean_gate"] = ((log_g.exp() * valid).sum() / count).detach()
        out["risk_mean"] = out["total_risk"] / count
        if labels is not None:
            out["risk_reg"] = self.config.lambda_hol_loss * ((raw * valid).sum() / count)
            out["loss"] = out["lm_loss"] + out["risk_reg"]
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
    try:
        model.cf_adapters.load_state_dict(saved["adapter_state_dict"])
    except RuntimeError as error:  # it names the tensors that are missing, extra or misshapen, a line each
        model.remove_hooks()
        raise core.Failure(f"{path}: {' '.join(str(error).split())[:200]}") from error
    return model.eval()


def save_cf_adapter(model: CFHoTLlamaHooked, directory: Path, base: str) -> None:
    """adapter_model.safetensors and adapter_config.json, which names the base model, in `directory`."""
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().contiguous() for k, v in model.cf_adapters.state_dict().items()}
    core.write_atomic(directory / "adapter_model.safetensors", save(tensors))
    core.write_json(directory / "adapter_config.json", dataclasses.asdict(model.config) | {"base_model": base})


# ----------------------------------------------------------------------------------------------------------- data
class Batch(NamedTuple):
    ids: Tensor  # B T, padded on the right
    mask: Tensor  # B T, 1 where a token is real
    labels: Tensor  # B T, -100 on padding


class Data(NamedTuple):
    train: list[Tensor]  # rows of token ids
    validation: list[Batch]  # of one row each, so that two models are paired by window
    pad: int  # token id
    digest: str  # of the rows of both
    tuning: tuple[Batch, ...] = ()  # rows that follow, for choosing a rate


def load_data(args: Args, tokenizer, device) -> Data:
    train, validation = load_rows(args, tokenizer, "train"), load_rows(args, tokenizer, "validation")
    count, pad = args.eval_windows, tokenizer.pad_token_id
    validation = validation[: count + args.tuning_windows]
    have = args.tuning_windows == 0 or len(validation) == count + args.tuning_windows
    require(have, f"--eval_windows and --tuning_windows: the validation text has {len(validation)} rows")
    batches = [collate([row], pad, device) for row in validation]
    digest = core.digest([row.tolist() for row in (*train, *validation)])
    return Data(train, batches[:count], pad, digest, tuple(batches[count:]))


def load_rows(args: Args, tokenizer, split: str) -> list[Tensor]:
    """Lines of more than 100 characters (at most 5,000 to train on), packed into full windows with EOS between them,
    or, with --no_pack, one line a row, cut at --seq_len. A row begins with BOS if prompts do."""
    lines = map(str.strip, core.load_text(args.data, split, args.data_path))
    lines = [line for line in lines if len(line) > 100][:5000]
    encoded = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"] if lines else []
    bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    if args.no_pack:
        require(encoded, f"--data {args.data} has no line of more than 100 characters: use more text")
        return [torch.tensor([*bos, *ids][: args.seq_len]) for ids in encoded]
    flat = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
    rows = core.blocks(np.array(flat), args.seq_len - len(bos), f"--data {args.data} ({split})")
    return [torch.tensor([*bos, *row.tolist()]) for row in rows]


def collate(rows: list[Tensor], pad: int, device) -> Batch:
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)  # B T
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # B T
    labels = torch.where(mask.bool(), ids, -100)
    return Batch(*(x.to(device) for x in (ids, mask, labels)))


def update_batches(data: Data, args: Args, step: int, accelerator) -> tuple[list[Batch], Tensor, int]:
    """The micro-batches of update `step` in this process, the factor of each one's mean loss with which every scored
    token of the update counts the same, and the tokens of all processes in it."""
    world, rank = accelerator.num_processes, accelerator.process_index
    batches = []
    for i in range(step * args.grad_accum, (step + 1) * args.grad_accum):
        everyone = core.batch_indices(len(data.train), args.batch_size * world, args.seed, i)
        mine = everyone[rank * args.batch_size : (rank + 1) * args.batch_size]
        batches.append(collate([data.train[k] for k in mine], data.pad, accelerator.device))
    scored = torch.stack([(batch.labels[:, 1:] != -100).sum() for batch in batches]).float()  # grad_accum
    weights = scored / (accelerator.reduce(scored.sum(), "sum") / world)
    return batches, weights, world * sum(batch.ids.numel() for batch in batches)


def precision(args: Args, accelerator) -> tuple[torch.dtype, bool]:  # of the base model; whether it is in 4 bits
    able = accelerator.device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None
    require(able or args.load_in_4bit != "on", "--load_in_4bit on needs CUDA and pip install bitsandbytes; use off")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return half.get(accelerator.mixed_precision, torch.float32), able and args.load_in_4bit != "off"


def load_base(args: Args, accelerator):
    """(base model, tokenizer) in the precision and quantisation asked for."""
    dtype, four_bit = precision(args, accelerator)
    if args.model_path == "tiny_base":
        model, tokenizer = make_tiny_base(args.seed)
        model.to(dtype).set_attn_implementation(args.attn_implementation)
    else:
        options = {"attn_implementation": args.attn_implementation}
        if four_bit:
            options["device_map"] = {"": accelerator.process_index} if accelerator.num_processes > 1 else "auto"
        model, tokenizer = core.load_backbone(args.model_path, dtype, four_bit, double_quant=True, **options)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    core.shard_frozen(model, accelerator)
    return (model if four_bit else model.to(accelerator.device)), tokenizer


def tiny_config(name: str):
    """Of `tiny`, core's, and of `tiny_base`, which has a third layer and a tied head."""
    config = core.load_backbone("tiny")[0].config
    config.update({"num_hidden_layers": 3, "tie_word_embeddings": True} if name == "tiny_base" else {})
    return config


def make_tiny_base(seed: int):
    """(model, tokenizer) of --test: a small Llama, trained 150 updates on synthetic text, so that it repeats itself.
    Every process makes it on its CPU, so all have the same one."""
    from transformers import LlamaForCausalLM

    tokenizer = core.train_tokenizer([])
    with torch.random.fork_rng(devices=[]):  # the library's own draws, which init_normal replaces, disturb no others
        model = LlamaForCausalLM(tiny_config("tiny_base"))
    core.init_normal(model, seed)
    rows = core.blocks(core.encode(core.synthetic_text("train"), tokenizer), 64, "synthetic text")  # N 64
    optimizer = torch.optim.AdamW(core.decay_groups(model, 0.1), lr=5e-3, fused=True)
    for step in range(150):
        ids = torch.from_numpy(rows[core.batch_indices(len(rows), 16, seed, step)].astype("int64"))
        hidden = model.model(ids, use_cache=False).last_hidden_state
        core.next_token_loss(hidden, model.lm_head.weight, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


# ------------------------------------------------------------------------------------------------------- evaluate
@torch.no_grad()
def evaluate(model, batches: list[Batch]) -> dict:
    """Validation loss, token-weighted, and of each batch (`windows`), and of adapters the state of the field."""
    total, count, states, windows = 0.0, 0, [], []
    for batch in batches:
        out, n = model(*batch, return_logits=False), int((batch.labels[:, 1:] != -100).sum())
        windows.append(float(out["lm_loss"]))
        total, count = total + windows[-1] * n, count + n
        if "log_g" in out:
            states.append(field_state(out["log_g"], out["dh"], batch.mask))
    figures = {"loss": total / count, "ppl": core.perplexity(total / count), "tokens": count, "windows": windows}
    if states:
        figures |= dict(zip(("gate", "risk_mean", "gate_spread", "sat_frac"), torch.stack(states).mean(0).tolist()))
    return figures


def field_state(log_g: Tensor, dh: Tensor, mask: Tensor) -> Tensor:
    """[mean gate, mean dh, spread of log g over real positions from 16 on, share of dh >= 1] for log_g and dh [L, B, T]
    and mask [B, T]. The spread is a standard deviation over positions, in the mean over layers and rows."""
    valid = mask.expand_as(dh).bool()
    late = valid & (torch.arange(mask.shape[1], device=mask.device) >= min(16, mask.shape[1] // 2))
    n = late.sum(-1).clamp(min=1)  # L B
    centred = torch.where(late, log_g - ((log_g * late).sum(-1) / n)[..., None], 0.0)
    spread = (centred.square().sum(-1) / n).sqrt().mean()
    return torch.stack([log_g.exp()[valid].mean(), dh[valid].mean(), spread, (dh[valid] >= 1).float().mean()])


@torch.no_grad()
def compare_with_base(model: CFHoTLlamaHooked, batches: list[Batch]) -> dict:
    """kl_base: mean over validation tokens of KL(base || gated); max_abs_dlogit: largest change of a logit. Vocabulary
    distributions exist for 128 positions at a time."""
    inner, divergence, count, largest = unwrapped(model.base), 0.0, 0, 0.0
    for batch in batches:
        hidden = []
        for mode in ("off", "gate"):
            with model.using(mode):
                hidden.append(inner.model(batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state)
        for base, gated in zip(*(h[batch.mask.bool()].split(128) for h in hidden)):  # 128 D
            p, q = inner.lm_head(base).float(), inner.lm_head(gated).float()  # 128 V
            largest = max(largest, float((p - q).abs().max()))
            divergence += float(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"))
            count += len(base)
    return {"kl_base": divergence / count, "max_abs_dlogit": largest}


@torch.no_grad()
def audit_moved(model: CFHoTLlamaHooked, length: int) -> float:
    """The causality audit with adapters moved off their start: there the gate is the same everywhere, so that a field
    that reads ahead would move nothing."""
    matrices = [p for p in model.cf_adapters.parameters() if p.ndim == 2]
    kept = [p.clone() for p in matrices]
    for i, p in enumerate(matrices):
        noise = torch.randn(p.shape, generator=core.generator(i, "audit"))
        p.add_((3 * noise / math.sqrt(p.shape[1])).to(p))
    found = core.causality_audit(model, model.base.config.vocab_size, length)
    for p, before in zip(matrices, kept):
        p.copy_(before)
    return found


# ---------------------------------------------------------------------------------------------------------- train
LOGGED = {"train_loss": "loss", "lm_loss": "lm_loss", "risk": "total_risk", "gate": "mean_gate"}  # row: model's output


def train(arm: str, model, data: Data, args: Args, run: core.Run, saved: dict | None) -> dict:
    """Train the adapters (`cf_adapter`) or the LoRA (`lora`) of `model`; returns history, figures and the last
    evaluation. Nothing is trained with --eval_only."""
    accelerator, plain = run.accelerator, model
    history, best = {name: [] for name in (*LOGGED, "val_loss")}, None
    if saved:
        for name, tensor in trained(model)["adapter_state_dict"].items():
            tensor.copy_(saved["adapter_state_dict"][name])
        history, best = saved["history"], saved["best"]
    rate = (args.lora_lr if arm == "lora" else 0) or args.lr
    optimizer = torch.optim.AdamW(core.decay_groups(model, 0.01), lr=rate, fused=True)
    model, optimizer = core.prepare(model, optimizer, accelerator)
    torch.manual_seed(core.derived_seed(args.seed, "dropout", accelerator.process_index))
    model.train()
    loop = core.Loop(run, model, optimizer, 0 if args.eval_only else args.max_steps, label=arm, saved=saved)
    while not loop.last:
        batches, weights, tokens = update_batches(data, args, loop.step, accelerator)
        for i in loop.micro_batches(args.grad_accum):
            out = model(*batches[i], return_logits=False)
            loop.backward(out["loss"] * weights[i])
            loop.add(**{name: out[key] for name, key in LOGGED.items() if key in out})
        norm = loop.update(tokens=tokens)
        if loop.due(args.log_interval) or loop.last:
            means = loop.means()
            for name, value in means.items():
                history[name].append([loop.step, value])
            run.log(arm=arm, step=loop.step, grad_norm=float(norm), tokens_per_s=loop.rate(), **means)
            field = f" | Risk: {means['risk']:.2f} | Gate: {means['gate']:.3f}" if "gate" in means else ""
            run.say(f"Step {loop.step:4d} | LM Loss: {means['lm_loss']:.4f}{field}")
            if "risk_mean" in out and loop.step > 100 and float(out["risk_mean"]) < 1e-3:
                run.say("WARNING: the mean increment is below 1e-3: the field has collapsed")
        if loop.due(args.eval_interval) or loop.last:
            with loop.paused():
                figures = evaluate(plain.eval(), data.validation)
                model.train()
                core.check_finite(figures["loss"], f"the validation loss at step {loop.step}")
                history["val_loss"].append([loop.step, figures["loss"]])
                run.log(arm=arm, step=loop.step, val_loss=figures["loss"])
                run.say(f"[Eval] {arm}: Val Loss = {figures['loss']:.4f}, PPL = {figures['ppl']:.2f}")
                if best is None or figures["loss"] < best:
                    best = figures["loss"]
                    save_adapter_file(run, "cf_adapter_best.pt", plain, history)
        if loop.due(args.save_interval) or loop.last or loop.stopping:
            path = loop.save(f"{arm}_step_{loop.step}.pt", **trained(plain), history=history, best=best)
            run.say(f"[Save] {path}")
        loop.leave_if_stopped()
    figures = loop.end()
    if loop.step:
        save_adapter_file(run, "cf_adapter_final.pt", plain, history)
    figures |= {"time_s": figures["train_seconds"], "parameters": sum(p.numel() for p in loop.params)}
    tuning = evaluate(plain.eval(), data.tuning)["loss"] if data.tuning else None
    return figures | {"history": history, "final": evaluate(plain.eval(), data.validation), "tuning_loss": tuning}


def trained(model: nn.Module) -> dict:
    """What a file holds of a model: the trained tensors, which have the names of the published files, and sizes."""
    tensors = {n.removeprefix("cf_adapters."): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    config = {"rank": model.rank} if isinstance(model, Lora) else dataclasses.asdict(model.config)
    return {"adapter_state_dict": tensors, "config": config}


def save_adapter_file(run: core.Run, name: str, model, history: dict) -> None:
    """The documented file of trained adapters; a LoRA has none."""
    if isinstance(model, CFHoTLlamaHooked) and run.main:
        keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        base = {key: getattr(model.base.config, key) for key in keys} | {"name": base_name(run)}
        core.save_checkpoint(run.dir / name, trained(model) | {"format_version": 1, "history": history, "base": base})


# ------------------------------------------------------------------- a LoRA to compare with, and what each model writes
def lora_rank(base, parameters: int) -> int:
    """The rank at which a LoRA on q_proj and v_proj has about `parameters` parameters."""
    targets = [m for name, m in base.named_modules() if name.endswith((".q_proj", ".v_proj"))]
    require(targets, f"--lora_reference: {type(base).__name__} has no q_proj and v_proj; leave the flag out")
    return max(1, round(parameters / sum(m.in_features + m.out_features for m in targets)))


class Lora(nn.Module):
    """A peft LoRA on q_proj and v_proj, under the same loop and loss as the adapters."""

    def __init__(self, base, rank: int):
        super().__init__()
        from peft import LoraConfig, get_peft_model

        self.rank, targets = rank, ["q_proj", "v_proj"]
        self.base = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, return_logits: bool = False) -> dict:
        inner = unwrapped(self.base)
        hidden = inner.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state  # B T D
        loss = core.next_token_loss(hidden, inner.lm_head.weight, labels)
        return {"loss": loss, "lm_loss": loss}


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
What the two theories have in common is"""


def load_prompts(args: Args) -> list[str]:
    text = core.read_text(args.prompts) if args.prompts else PROMPTS
    prompts = list(dict.fromkeys(line for line in text.splitlines() if line.strip()))
    require(prompts, f"--prompts {args.prompts}: no prompt in it; write one a line")
    return prompts


def rep_w(ids: list[int], prompt: list[int], window: int = 32) -> float:
    """Share of `ids` that occur among the `window` tokens before them, the prompt's included."""
    every = np.array([*prompt, *ids])
    seen = np.zeros(len(every), bool)
    for back in range(1, min(window, len(every) - 1) + 1):
        seen[back:] |= every[back:] == every[:-back]
    return float(seen[len(prompt) :].mean()) if ids else 0.0


def text_metrics(ids: list[int], prompt: list[int], tokenizer) -> dict[str, float]:
    """Repetition of a continuation `ids`: rep_w counts the prompt as context; rep_w_text is the logs' variant, prompt
    and continuation encoded again as one text; phrase_rep counts four-word phrases that occur at least twice."""
    again = tokenizer(tokenizer.decode([*prompt, *ids]), add_special_tokens=False)["input_ids"]
    words = tokenizer.decode(ids).lower().split()
    phrases = Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3))
    metrics = {"rep_w": rep_w(ids, prompt), "rep_w_text": rep_w(again[1:], again[:1])}
    metrics["phrase_rep"] = sum(count > 1 for count in phrases.values())
    metrics |= {f"distinct_{n}": core.distinct_n(ids, n) for n in (2, 3, 4)}
    metrics |= {f"rep_{n}": 1 - metrics[f"distinct_{n}"] for n in (2, 3, 4)}
    return metrics | {"unique_rate": len(set(ids)) / max(1, len(ids)), "length": len(ids)}


@torch.no_grad()
def continuations(model, tokenizer, prompts: list[str], args: Args, seed: int | None, **options) -> list[list[int]]:
    """One continuation of each prompt, as ids without what follows EOS: greedy, or sampled (T 0.8, top-p 0.9) from
    `seed`, the same for every condition."""
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    batch = batch.to(next(model.parameters()).device)
    options |= {"max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    sampled = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
    options |= {"do_sample": False} if seed is None else sampled
    with torch.random.fork_rng():
        torch.manual_seed(core.derived_seed(args.seed, "sampling", seed))
        out = model.base.generate(**batch, **options)
    rows = out[:, batch["input_ids"].shape[1] :].tolist()
    eos = tokenizer.eos_token_id
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def generate_all(models: dict, tokenizer, prompts: list[str], args: Args) -> tuple[list[dict], dict]:
    """(rows for generations.jsonl, statistics) of `models`: condition, `base` first -> a context manager that yields
    the model, and further arguments of generate. Statistics are means over prompts; differences from base are paired
    by prompt, cut to the shorter of the two continuations (a short text repeats less), with a bootstrap interval."""
    rows, statistics, base = [], {}, {}
    for seed in (None, *range(args.samples)):
        decode = "greedy" if seed is None else "sampled"
        for condition, (context, options) in models.items():
            with context() as model:
                texts = continuations(model, tokenizer, prompts, args, seed, **options)
            base[seed] = texts if condition == "base" else base[seed]
            for prompt, ids, base_ids in zip(prompts, texts, base[seed]):
                given, shorter = tokenizer(prompt)["input_ids"], min(len(ids), len(base_ids))
                row = {"prompt": prompt, "condition": condition, "decode": decode, "seed": seed}
                row |= {"text": tokenizer.decode(ids), "metrics": text_metrics(ids, given, tokenizer)}
                row["matched"] = text_metrics(ids[:shorter], given, tokenizer)
                row["base"] = text_metrics(base_ids[:shorter], given, tokenizer)
                rows.append(row)
    for decode, condition in {(row["decode"], row["condition"]): None for row in rows}:
        of_prompts, gaps = [], []  # means over the seeds
        for prompt in prompts:
            chosen = [r for r in rows if (r["prompt"], r["decode"], r["condition"]) == (prompt, decode, condition)]
            of_prompts.append(means_of([row["metrics"] for row in chosen]))
            gaps.append(means_of([{k: row["matched"][k] - row["base"][k] for k in row["base"]} for row in chosen]))
        differences = {name: core.bootstrap([gap[name] for gap in gaps]) for name in gaps[0]}
        statistics.setdefault(decode, {})[condition] = {"mean": means_of(of_prompts), "minus_base": differences}
    return rows, statistics


def means_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def write_texts(model: CFHoTLlamaHooked, lora: Lora | None, tokenizer, args: Args, run: core.Run) -> dict:
    """generations.jsonl: what every condition makes of the prompts; returns the statistics."""
    models = {
        "base": (model.disabled, {}),
        "cfhot": (lambda: model.using("gate"), {}),
        "cfhot_shuffled": (lambda: model.using("shuffled"), {}),
        "rep_penalty": (model.disabled, {"repetition_penalty": 1.2}),
    }
    if lora:
        models["lora"] = (lambda: contextlib.nullcontext(lora.eval()), {})
    rows, statistics = generate_all(models, tokenizer, load_prompts(args), args)
    if run.main:
        core.write_atomic(run.dir / "generations.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return statistics


# ----------------------------------------------------------------------------------------------------------- main
def criteria(final: dict, val: dict, generation: dict) -> dict:
    """Whether the adapters act, stay healthy and do no harm; rep_reduced is reported, not required."""
    repetition = generation.get("greedy", {}).get("cfhot", {}).get("minus_base", {}).get("rep_4")
    return {
        "intervention_active": val["max_abs_dlogit"] > 1e-4,
        "gate_in_range": 0.2 <= final["gate"] <= 0.8,
        "risk_not_collapsed": final["risk_mean"] > 1e-3,
        "val_ppl_not_worse": val["ppl_gated"] <= 1.02 * val["ppl_base"],
        "rep_reduced": repetition["hi"] < 0 if repetition else None,
    }


def report(result: dict, run: core.Run) -> None:
    val = result["val"]
    run.say("\nPPL base {ppl_base:.3f}, gated {ppl_gated:.3f}; gate effect {gate_effect:+.5f} nats".format(**val))
    for mode in ("off", "shuffled", "constant"):
        gain = "gain over gates {}: {mean:+.5f} nats [{lo:+.5f}, {hi:+.5f}] over windows"
        run.say(gain.format(mode, **val[f"gain_over_{mode}"]))
    run.say(f"KL {val['kl_base']:.2e}, largest change of a logit {val['max_abs_dlogit']:.2e}")
    if lora := result["lora"]:
        run.say(f"LoRA of rank {lora['rank']} ({lora['parameters']:,} parameters): PPL {lora['final']['ppl']:.3f}")
    for decode, conditions in result["generation"].items():
        run.say(f"\n{decode:24s} {'rep_4':>8s} {'minus base, 95 % interval':>30s}")
        for name, figures in conditions.items():
            gap = figures["minus_base"]["rep_4"]
            interval = f"{gap['mean']:+.4f} [{gap['lo']:+.4f}, {gap['hi']:+.4f}]"
            run.say(f"         {name:15s} {figures['mean']['rep_4']:8.4f} {interval:>30s}")
    for name, met in result["criteria"].items():
        run.say(f"  {name:20s} {'no data' if met is None else 'yes' if met else 'no'}")
    run.say(f"[Save] Results: {run.result}")


def wrap(base, args: Args) -> CFHoTLlamaHooked:
    """`base` with the adapters of --adapter, or new ones."""
    sizes = base.config.hidden_size, base.config.num_hidden_layers, args.d_fiber, args.d_control
    strengths = args.momentum, args.lambda_init, args.lambda_hol, args.lr
    try:
        if args.adapter:
            return load_cf_adapter(base, args.adapter, args.allow_pickle)
        return CFHoTLlamaHooked(base, CFAdapterConfig(*sizes, *strengths, args.field_axis), args.seed)
    except ValueError as error:  # no model for these adapters, or for any
        raise core.Failure(f"{args.adapter or args.model_path}: {error}") from error


def run_all(args: Args, run: core.Run) -> dict:
    """Base, adapters, and if asked for LoRA: train, evaluate, generate; the result."""
    accelerator = run.accelerator
    base, tokenizer = load_base(args, accelerator)
    if args.load_in_4bit == "auto" and not precision(args, accelerator)[1]:
        run.say(f"[4-bit] off: no CUDA device with bitsandbytes here; the base model is loaded in {base.dtype}")
    data = load_data(args, tokenizer, accelerator.device)
    load_prompts(args)
    model = wrap(base, args)
    adapters, base_parameters = (sum(p.numel() for p in part.parameters()) for part in (model.cf_adapters, base))
    rank = lora_rank(base, adapters) if args.lora_reference else 0
    audit, limit = audit_moved(model, args.seq_len), 1e-5 if base.dtype == torch.float32 else 1e-3
    require(audit <= limit, f"the model reads the future ({audit:.1e})", core.CHECK_FAILED)
    arms = ("cf_adapter", "lora")
    saved = {arm: run.checkpoint(f"{arm}_step_*.pt", total=args.max_steps, arm=arm) for arm in arms}
    inputs = {"data": data.digest, "tokenizer": core.tokenizer_digest(tokenizer)}
    inputs["adapter"] = core.digest(Path(args.adapter)) if args.adapter else ""
    run.start((*FREE, LENGTH), base=core.base_digest(args.model_path, base), **inputs)

    if args.model_path == "tiny_base" and run.main:  # the adapters are of no use without it
        whole = make_tiny_base(args.seed)[0] if accelerator.sharded else base
        whole.save_pretrained(run.dir / "tiny_base")
        tokenizer.save_pretrained(run.dir / "tiny_base")
    run.say(f"[CFHoT-Hooked] Adapter params: {adapters:,}")
    updates = f"{args.max_steps} updates = {args.max_steps * args.grad_accum} micro-batches"
    run.say(f"{updates} of {args.batch_size} x {args.seq_len} tokens; causality audit {audit:.1e}")
    before = {n: p.detach().clone() for n, p in base.named_parameters()} if base_parameters < 1e8 else {}
    arm = train("cf_adapter", model, data, args, run, saved["cf_adapter"])
    if run.main and not args.eval_only:
        save_cf_adapter(model, run.dir / "adapter", base_name(run))
        run.say(f"Final checkpoint: {run.dir / 'cf_adapter_final.pt'}")
    frozen = all(torch.equal(p, before[n]) for n, p in base.named_parameters() if n in before)
    require(frozen, "the base model's parameters changed: this must not happen", core.CHECK_FAILED)
    trained_audit, final, controls = core.causality_audit(model, base.config.vocab_size, args.seq_len), arm["final"], {}
    for mode in ("off", "shuffled", "constant"):
        with model.using(mode):
            controls[mode] = evaluate(model, data.validation)
    alone = controls["off"]
    val = {"ppl_base": alone["ppl"], "ppl_gated": final["ppl"], **compare_with_base(model, data.validation)}
    val |= {"gate_effect": alone["loss"] - final["loss"], "tokens": alone["tokens"]}
    for mode, figures in controls.items():  # what the gates save beside those of a control, paired by window
        gaps = [a - b for a, b in zip(figures["windows"], final["windows"], strict=True)]
        val[f"gain_over_{mode}"] = core.bootstrap(gaps)
    lora, lora_arm = None, None
    if args.lora_reference:
        lora = Lora(load_base(args, accelerator)[0], rank)
        lora_arm = train("lora", lora, data, args, run, saved["lora"]) | {"rank": rank}
    generation = {} if args.no_eval else write_texts(model, lora, tokenizer, args, run)
    result = {name: value for name, value in arm.items() if name not in ("history", "parameters")}
    result |= {"params": adapters, "base_params": base_parameters, "overhead_pct": 100 * adapters / base_parameters}
    result |= {"final": final | {"lm_loss": final["loss"]}, "val": val, "generation": generation}
    result |= {"criteria": criteria(final, val, generation), "cf_adapter": arm, "lora": lora_arm, "config": vars(args)}
    result["tuning_loss"] = {"cf_adapter": arm["tuning_loss"], "lora": lora_arm and lora_arm["tuning_loss"]}
    result |= {"causality": {"moved": audit, "trained": trained_audit}, "base_unchanged": frozen}
    result |= {"causality_max_abs_diff": max(audit, trained_audit), "valid": max(audit, trained_audit) <= limit}
    return result | {"data": {"source": args.data, "path": args.data_path, "model": base_name(run)}}


def base_name(run: core.Run) -> str:
    """Where the base model can be loaded from."""
    return str(run.dir / "tiny_base") if run.args.model_path == "tiny_base" else run.args.model_path


def write_card(result: dict, run: core.Run) -> None:
    val, base = result["val"], base_name(run)
    metrics = {"perplexity of the base model": val["ppl_base"], "with the adapters": val["ppl_gated"]}
    metrics |= {"gate effect in nats": val["gate_effect"], "adapter parameters": result["params"]}
    command = f"python phase_b_8b_adapters.py --model_path {base} --adapter {run.dir / 'adapter'} --eval_only"
    caveat = """A gate that acts is no proof of a benefit. Whether repetition falls, beside a plain repetition penalty
and a shuffled gate, stands under `generation` in the result file; docs/cfhot.md judges it."""
    core.model_card(run, result, "CF-HoT adapters", base, metrics, f"{command} --output_dir OTHER", caveat)


def plan(args: Args, accelerator) -> dict:
    """What a run will be, from the model's configuration alone: parameters, tokens, memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        tiny = args.model_path in ("tiny", "tiny_base")
        config = tiny_config(args.model_path) if tiny else AutoConfig.from_pretrained(args.model_path)
    except (OSError, ValueError) as error:
        raise core.Failure(f"model {args.model_path}: {str(error).splitlines()[0][:120]}") from error
    dtype, four_bit = precision(args, accelerator)
    with torch.device("meta"):
        model = wrap(AutoModelForCausalLM.from_config(config, dtype=dtype), args)
    adapters, base = (sum(p.numel() for p in part.parameters()) for part in (model.cf_adapters, model.base))
    tokens, layers = args.batch_size * args.seq_len, config.num_hidden_layers
    if args.gradient_checkpointing:  # each layer's input is kept, 2 of its 34 bytes a value, and one layer's all
        layers = 1 + layers * 2 / 34
    memory = core.memory_estimate(model, tokens, config.hidden_size, layers, dtype != torch.float32)
    if four_bit:  # half a byte a weight, and a scale for 64, which are quantised themselves
        matrices = [p for p in model.base.model.layers.parameters() if p.ndim == 2]
        spared = sum(p.numel() * (p.element_size() - 0.5 - 1 / 64 - 4 / (64 * 256)) for p in matrices) / 1e9
        memory["weights_and_optimizer"] -= spared
        memory["total"] -= spared
    tokens *= args.max_steps * args.grad_accum * accelerator.num_processes
    return {"adapter_parameters": adapters, "base_parameters": base, "tokens": tokens, "memory_gb": memory}


def main(argv=None) -> dict:
    args = parse(argv)
    accelerator = core.engine(args)
    if args.dry_run:
        return core.show_plan(plan(args, accelerator))
    outputs = ("cf_adapter_*.pt", "lora_step_*.pt", "generations.jsonl", "adapter/adapter_*")
    with core.Run(args, args.output_dir, accelerator, "phase_b_results.json", outputs) as run:
        if result := run.finished(LENGTH, FREE):
            report(result, run)
            return result
        result = run.finish(run_all(args, run))
        report(result, run)
        write_card(result, run)
    return result


if __name__ == "__main__":
    core.cli(main, "--batch_size (and raise --grad_accum) or --seq_len, or add --gradient_checkpointing")
