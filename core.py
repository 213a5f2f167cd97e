"""The suite's ground floor: whatever could quietly falsify several scripts' numbers stands here, once.

No trainer, no callbacks and no module that carries a hypothesis: each script's model, loss and loop stand in the
script. Shapes in comments: B batch, T positions, D width, V vocabulary, N windows.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import signal
import socket
import string
import subprocess
import sys
import time
import warnings
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CACHE = Path(os.environ.get("CLAIMBENCH_CACHE", "~/.cache/claimbench")).expanduser()
CHECK_FAILED, BAD_INPUT, DIVERGED, DISK = 1, 2, 3, 4  # exit codes; an interrupted run gives 128 + signal


class Failure(Exception):
    """An end that a user can meet: one line that names the remedy, and the exit code."""

    def __init__(self, message: str, code: int = BAD_INPUT):
        super().__init__(message)
        self.code = code


def require(condition, message: str, code: int = BAD_INPUT) -> None:
    """Raise `Failure(message, code)` unless `condition` holds."""
    if not condition:
        raise Failure(message, code)


def require_positive(args, names: str) -> None:
    """Every flag in `names` (space-separated) must be at least 1."""
    for name in names.split():
        require(getattr(args, name) >= 1, f"--{name} must be at least 1")


def cli(main, lower: str = "--batch_size or --seq_len") -> None:
    """Run `main()` as a program: an expected failure is one line and its exit code (--debug: with its traceback).
    `lower` names the flags to lower when memory runs out."""
    try:
        return main()
    except (Failure, KeyboardInterrupt, MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, Failure):
            code, line = error.code, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, line = 130, "interrupted"
        elif isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
            code, line = BAD_INPUT, f"out of memory: lower {lower}; checkpoints written before are intact"
        elif "loading state_dict" in str(error):  # it names the tensors, a line each
            code, line = BAD_INPUT, f"the checkpoint does not fit these flags: {' '.join(str(error).split())[:300]}"
        elif getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            code, line = DISK, f"cannot write: {error}"
        else:
            raise
        if "--debug" in sys.argv:
            sys.excepthook(*sys.exc_info())
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(code)


# ------------------------------------------------------------------------------------------------------ arguments
def arg(default, help: str, group: str = "experiment", **kwargs):
    """A flag: its default, its help text and the heading it stands under; `kwargs` go to argparse."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **kwargs})


@dataclasses.dataclass
class RunArgs:
    """Flags that every training script has."""

    seed: int = arg(0, "seed of initialisation, data order, evaluation and sampling", "run")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N", "run")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = arg("auto", "auto: bf16, else fp16; fp32 on a CPU", "run")
    tf32: bool = arg(False, "let fp32 matrix products on a GPU round their inputs to TF32", "run")
    threads: int = arg(0, "CPU threads; 0: torch's choice. Tiny models run fastest with 1", "run")
    resume: str = arg(
        "",
        "checkpoint to continue from; auto, or no name: the newest valid one; unset: start afresh",
        "run",
        nargs="?",
        const="auto",
    )
    overwrite: bool = arg(False, "replace an earlier run in the same directory", "run")
    wandb: Literal["off", "offline", "online"] = arg("off", "log to Weights & Biases as well", "run")
    config: str = arg("", "YAML file of flag values; explicit flags override it; unset: none", "run")
    test: bool = arg(False, "smoke test on a CPU, offline: the same code at small sizes", "run")
    dry_run: bool = arg(False, "print parameters, tokens, estimates of memory and time, then stop", "run")
    debug: bool = arg(False, "show the traceback of an expected failure", "run")


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """One spelling of each flag, no value after a switch, and a default only where it says something."""

    def add_usage(self, usage, actions, groups, prefix=None):
        usage = usage or "%(prog)s [flags]    (a dash and an underscore are the same in a flag)"
        super().add_usage(usage, [], [], prefix)

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default in ("", "==SUPPRESS==")
        return action.help if silent else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        names = dict.fromkeys(n[:2] + n[2:].replace("-", "_") for n in action.option_strings)
        switch = action.nargs == 0 or (action.nargs == "?" and action.const is True)
        return ", ".join(names) + ("" if switch else f" {self._format_args(action, action.dest.upper())}")


def parse_args(cls, test: dict, argv=None, doc: str = ""):
    """Parse flags into dataclass `cls`. Later values win: config file, then `test` if --test, then `argv`.

    `--a-b` and `--a_b` are one flag; there are no abbreviations. Bad input raises Failure in one line.
    """
    import yaml
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):
            if message.startswith("unrecognized") and any(not word.strip() for word in argv):
                message = "a stray blank argument: usually a space after the backslash at a line's end"
            raise Failure(f"{message} (see --help)")

    argv, groups = list(sys.argv[1:] if argv is None else argv), {}
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.metadata["group"] == "run"):  # shared flags last
        field = dataclasses.field(default=f.default, metadata={k: v for k, v in f.metadata.items() if k != "group"})
        groups.setdefault(f.metadata["group"], []).append((f.name, f.type, field))
    classes = [
        dataclasses.make_dataclass("Group", fields, namespace={"_argument_group_name": title})
        for title, fields in groups.items()
    ]
    parser = Parser(classes, allow_abbrev=False, description=doc, formatter_class=_Formatter)

    def parse(words):
        *parts, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return cls(**{k: v for part in parts for k, v in vars(part).items()})

    def words(values):  # as typed words: argparse then checks a file's values as it checks a person's
        return [f"--{k}={v}" for k, v in values.items() if v is not None]

    overlay = []
    if path := parse(argv).config:
        with contextlib.suppress(yaml.YAMLError):  # then it is no mapping either
            overlay = yaml.safe_load(read_text(path))
        require(isinstance(overlay, dict), f"--config {path}: expected lines of the form 'flag: value'")
        overlay = words(overlay)
    args = parse(overlay + argv)
    return parse(overlay + words(test) + argv) if args.test else args


# ------------------------------------------------------------------ engine: device, precision, memory, processes
def engine(args, no_fsdp: str = ""):
    """The accelerate engine for `args.device` and `args.precision`, which places every script's model.

    Sets the allocator before the first CUDA call. Processes that would each train alone are refused. Its `sharded` says
    whether FSDP was asked for at the launch; a script that cannot gives the reason as `no_fsdp`.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a forked loader hangs otherwise
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # peft imports it; of 4 bits on a CPU
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less fragmentation
    if not sys.stderr.isatty():  # no bars of the libraries in a log file
        from transformers.utils.logging import disable_progress_bar

        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        disable_progress_bar()
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if args.threads:
        torch.set_num_threads(args.threads)
    name, precision = args.device, args.precision
    require(re.fullmatch(r"auto|cpu|cuda(:\d+)?", name), f"--device {name}: use auto, cpu, cuda or cuda:N")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    missing = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    require(not missing, f"--device {name}: there are {torch.cuda.device_count()} CUDA devices; use cpu or auto")
    require((precision, device.type) != ("fp16", "cpu"), "--precision fp16 crawls on a CPU: use fp32 or bf16")
    if device.type == "cuda":
        if precision == "auto":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        torch.cuda.set_device(device) if device.index is not None else None
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
        torch.cuda.reset_peak_memory_stats()
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:  # runs that follow each other in one interpreter may differ in precision
        AcceleratorState._reset_state(reset_partial_state=True)
    sharded = world > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    require(not (sharded and no_fsdp), f"FSDP: {no_fsdp}; launch without --use_fsdp, so that DDP is used")
    require(not sharded or os.environ.get("FSDP_VERSION") == "2", "FSDP: only version 2; launch with --fsdp_version 2")
    require(not sharded or precision != "fp16", "FSDP: --precision fp16 is not supported; use bf16 or fp32")
    asked = os.environ.pop("ACCELERATE_USE_FSDP", "")  # `shard` does it: accelerate cannot shard scalars, nor on a CPU
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        log_with=None if args.wandb == "off" else "wandb",
        mixed_precision=precision if precision in ("bf16", "fp16") else "no",
    )
    accelerator.sharded = sharded
    if asked:
        os.environ["ACCELERATE_USE_FSDP"] = asked  # for a second engine in this process
    require(
        accelerator.num_processes == world,
        f"{world} processes were started but each would train alone on "
        f"{device}: use torchrun with --device cpu, or one GPU for each process",
    )
    return accelerator


# ----------------------------------------------------- FSDP: the weights of a model cut up over the processes
def _cut(modules: list, accelerator, ignored: set = frozenset()) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # about changing its output in place: nothing here does
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in modules:  # inner ones first
        fully_shard(module, mesh=mesh, ignored_params=ignored & set(module.parameters()))


def shard(model: nn.Module, accelerator, layers=()) -> None:
    """Under FSDP, in place: cut up a model that is trained, each of `layers` to be gathered when it runs and the rest
    at the start. Load weights before it, make the optimizer after it. A scalar parameter becomes one of shape [1]."""
    if not accelerator.sharded:
        return
    scalars = [name for name, p in model.named_parameters() if p.ndim == 0]
    for name in scalars:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(model.get_parameter(name).detach().view(1)))
    _cut([*layers, model], accelerator)
    model.scalars = scalars
    model.forward = accelerator.autocast()(model.forward)  # as accelerate does for a model that is whole

    @contextlib.contextmanager
    def no_sync():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    model.no_sync = no_sync  # accelerator.no_sync asks for it


def shard_frozen(base: nn.Module, accelerator) -> None:
    """Under FSDP, in place: cut up the decoder layers of a frozen Hugging Face model; embeddings and head stay whole.
    Add what is trained afterwards, and run the model equally often in every process: each layer is gathered by all."""
    if not accelerator.sharded:
        return
    require(all(p.is_floating_point() for p in base.parameters()), "FSDP does not cut up 4-bit weights: drop either")
    layers = [m for m in base.modules() if type(m).__name__ in (base._no_split_modules or ())]
    require(layers, f"FSDP: {type(base).__name__} does not say what its layers are; launch without --use_fsdp")
    inside = {p for layer in layers for p in layer.requires_grad_(False).parameters()}
    _cut([*layers, base.base_model], accelerator, set(base.parameters()) - inside)


def prepare(model: nn.Module, optimizer, accelerator) -> tuple:
    """`accelerator.prepare`: DDP where there are several processes, which averages the gradients of the parameters that
    are whole; those that FSDP has cut up it leaves alone."""
    if hasattr(model, "set_requires_gradient_sync"):
        return model, accelerator.prepare(optimizer)
    hide_sharded(model)
    return accelerator.prepare(model, optimizer)


def hide_sharded(model: nn.Module) -> None:
    """Keep DDP, which `model` will be given to, from the parameters that FSDP has cut up."""
    model._ddp_params_and_buffers_to_ignore = [n for n, p in model.named_parameters() if hasattr(p, "full_tensor")]


@contextlib.contextmanager
def whole(model: nn.Module):
    """All weights of a sharded model in every process for a while, so that processes may run it, or parts of it, as
    often as each likes; nothing where it is whole anyway. Gradients and optimizer state stay cut up."""
    parts = [m for m in model.modules() if hasattr(m, "set_reshard_after_forward")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.reshard()
        part.set_reshard_after_forward(part is not model, recurse=False)


def gathered(state):
    """`state` (nested) with every sharded tensor whole, on the CPU of the main process: all processes must call it."""
    if isinstance(state, dict):
        return {k: gathered(v) for k, v in state.items()}
    if hasattr(state, "full_tensor"):
        state = state.full_tensor()
        return state.cpu() if torch.distributed.get_rank() == 0 else None
    return state


def full_state(model: nn.Module) -> dict:
    """`model.state_dict()` as it would be without FSDP: all processes must call it."""
    state = gathered(model.state_dict())
    return state | {k: None if state[k] is None else state[k].view(()) for k in getattr(model, "scalars", ())}


def load_optimizer(optimizer, state: dict) -> None:
    """`optimizer.load_state_dict` of a whole state, cut up where its parameters are."""
    from torch.distributed.tensor import distribute_tensor

    optimizer.load_state_dict(state)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        for name, value in optimizer.state[p].items():
            if name != "step" and value.numel() == p.numel():
                value = value.view(p.shape)
                if hasattr(p, "full_tensor"):
                    value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
                optimizer.state[p][name] = value


# ------------------------------------------------------------------------------------- memory and updates
def memory_estimate(model: nn.Module, tokens: int, width: int, layers: int, half: bool) -> dict[str, float]:
    """Rough training memory in GB. Activations: 34 * tokens * width bytes per layer in half precision, twice that
    in fp32 (Korthikanti et al. 2022, eq. 1 without the score term); gradients and two Adam moments in fp32."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) + 12 * trainable
    parts = {"weights_and_optimizer": weights, "activations": 34 * tokens * width * layers * (1 if half else 2)}
    parts["loss"] = 8 * LOSS_CHUNK
    return {k: v / 1e9 for k, v in (parts | {"total": sum(parts.values())}).items()}


def in_words(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h` or `2.1 days`."""
    for size, unit in ((86400, "days"), (3600, "h")):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def matmul_rate(accelerator) -> float:
    """Operations per second of one large matrix product in the precision of `accelerator`: what the device can do."""
    device, dtypes = accelerator.device, {"bf16": torch.bfloat16, "fp16": torch.float16}
    width = 8192 if device.type == "cuda" else 1024
    a = torch.ones(width, width, device=device, dtype=dtypes.get(accelerator.mixed_precision))
    return 2 * width**3 / min(timed(lambda: a @ a, device) for _ in range(10))


def timed(call, device: torch.device) -> float:
    """Seconds that `call()` takes, to the end of what it has started on the device."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - begin, 1e-9)


def time_estimate(meta: nn.Module, build, loss, vocab: int, rows: int, length: int, passes: int, accelerator) -> dict:
    """Expected seconds of `passes` forward and backward passes over `rows` sequences of `length` tokens, and how that
    was found: {seconds, time, passes, found_by}. Evaluation, optimizer and checkpoints come on top.

    One pass of `loss(model, ids)` is timed on a fresh model from `build(device)` with random tokens, at `rows`
    sequences or, where that would take long, at fewer. Where even one would, the operations (4 for each token and
    parameter, 6 if it is trained; `meta` counts them) are divided by the rate of a matrix product. Random states and
    gradients are left as they were.
    """
    device = accelerator.device
    operations = length * sum((6 if p.requires_grad else 4) * p.numel() for p in meta.parameters())  # of one sequence

    def one_pass() -> None:
        with accelerator.autocast():
            value = loss(model, ids)
        trainable = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(value, trainable, allow_unused=True)  # leaves every .grad alone

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        per_row = operations / matmul_rate(accelerator)
        seconds, found_by = passes * rows * per_row, "arithmetic and the rate of a matrix product: a lower bound"
        n = min(rows, int(1 / per_row))
        if n:
            try:
                model, ids = build(device).train(), torch.randint(vocab, (n, length), device=device)
                timed(one_pass, device)  # warms up
                seconds = passes * rows / n * timed(one_pass, device)
                found_by = f"one timed pass of {n} of {rows} sequences" + (", scaled up" if n < rows else "")
            except torch.OutOfMemoryError:
                found_by += " (this shape does not fit the device's memory)"
    return {"seconds": seconds, "time": in_words(seconds), "passes": passes, "found_by": found_by}


def peak_memory() -> int:
    """Bytes: peak CUDA allocation where a GPU is in use, else this process's peak resident set (Linux)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: matrices decay; biases, norms and scalars do not. Every trainable parameter is in one."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if (p.ndim >= 2) == matrix], "weight_decay": weight_decay * matrix}
        for matrix in (True, False)
    ]
    return [g for g in groups if g["params"]]


def guard_step(optimizer, norm: Tensor, counts: Tensor, scaler=None) -> Tensor:
    """Make the coming `optimizer.step()` skip itself if the gradient norm is not finite, without waiting for the
    device: a fused optimizer changes nothing where its `found_inf` is 1 (in fp16 the loss scaler sees to that).
    Returns the new counts [2]: skipped in all, skipped in a row."""
    bad = (~torch.isfinite(norm)).float()
    if scaler is None:
        optimizer.optimizer.found_inf = bad
    return torch.stack([counts[0] + bad, (counts[1] + 1) * bad])


def clip_gradients(parameters, max_norm: float, accelerator) -> Tensor:
    """`accelerator.clip_grad_norm_`, whose norm is that of the whole gradient in every process, sharded or not."""
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def weight_of(accelerator, count: Tensor) -> Tensor | float:
    """The factor of a mean over `count` positions of this process with which DDP's mean over the processes becomes the
    mean over all positions: count over the processes' mean count. All processes must call it; 1 if there is one."""
    if accelerator.num_processes == 1:
        return 1.0
    return count / accelerator.reduce(count.float(), "mean").clamp(min=1e-9)


def add_loss(sums: Tensor, *values: Tensor) -> Tensor:
    """`sums` [n + 1] plus n values of one micro-batch and their count; one with a non-finite value is left out."""
    row = torch.stack([v.detach().float() for v in values] + [torch.ones_like(sums[0])])
    return sums + torch.where(row.isfinite().all(), row, torch.zeros_like(row))


def check_finite(value: float, what: str) -> None:
    """Failure (diverged) unless `value` is finite."""
    if not math.isfinite(value):
        raise Failure(f"{what} is not finite: lower --lr or use --precision fp32", DIVERGED)


def check_skipped(counts: Tensor, budget: int = 20) -> int:
    """Updates skipped so far; Failure (diverged) after `budget` in a row. Waits for the device: call it rarely."""
    skipped, in_a_row = (int(c) for c in counts)
    if in_a_row >= budget:
        raise Failure(f"the gradient was not finite {in_a_row} times in a row: lower --lr or use fp32", DIVERGED)
    return skipped


# ---------------------------------------------------------------------------------------------------------- seeds
def derived_seed(seed: int, *purpose) -> int:
    """A 60-bit seed for one purpose ("init", "data", "eval", "sampling"): no two purposes share draws."""
    return int(hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).hexdigest()[:15], 16)


def generator(seed: int, *purpose) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


@torch.no_grad()
def init_normal(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Matrices normal(0, std), biases zero, norms one. Each draw depends on (seed, parameter name) alone, so models
    that share a name and shape start from the same value there."""
    for name, p in model.named_parameters():
        if p.ndim >= 2 and not p.is_meta:
            p.copy_(torch.normal(0.0, std, p.shape, generator=generator(seed, "init", name)))
        elif p.ndim == 1:
            p.fill_(0.0 if name.endswith("bias") else 1.0)


def rng_state(accelerator) -> list[dict]:
    """Every process's global generators (dropout draws from them), in rank order."""
    from accelerate.utils import gather_object

    cuda = torch.cuda.get_rng_state() if accelerator.device.type == "cuda" else None
    return gather_object([{"cpu": torch.get_rng_state(), "cuda": cuda}])


def set_rng_state(states: list[dict], accelerator) -> None:
    require(len(states) == accelerator.num_processes, f"--resume: the run had {len(states)} processes; use as many")
    torch.set_rng_state(states[accelerator.process_index]["cpu"])
    if accelerator.device.type == "cuda" and states[accelerator.process_index]["cuda"] is not None:
        torch.cuda.set_rng_state(states[accelerator.process_index]["cuda"])


# -------------------------------------------------------------------------------------------------- run directory
def write_atomic(path: Path, data: bytes) -> None:
    """Write to a temporary name, fsync, rename: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # processes may fill one cache
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    """Strict JSON (NaN and infinity are refused), atomically."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


@functools.cache
def environment() -> dict:
    """Commit, versions and hardware: what a reader needs to trust or repeat a number."""
    from importlib.metadata import PackageNotFoundError, version

    def git(*words):
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()

    versions = {"python": sys.version.split()[0]}
    with contextlib.suppress(PackageNotFoundError):
        for package in "torch numpy transformers tokenizers accelerate peft datasets bitsandbytes".split():
            versions[package] = version(package)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": changed, "versions": versions, "device": device}


class _Lines:
    """Standard error for a bar where it is no terminal: its state on a line of its own, a minute apart."""

    every = 60.0  # seconds

    def __init__(self):
        self.said = time.monotonic()

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and time.monotonic() - self.said >= self.every:
            print(line, file=sys.stderr, flush=True)
            self.said = time.monotonic()

    def flush(self) -> None:
        """Lines are flushed as they are written."""


class Run:
    """One run directory: lock, config.json, env.json, log.jsonl, console, and the result file that ends it.

    `outputs` are glob patterns of the other files that the script writes there. A directory that holds a run is
    refused unless the run is resumed, --overwrite is given, or that run was itself a --test run.
    """

    def __init__(self, args, directory: str, accelerator, result: str, outputs: tuple, config: str = "config.json"):
        self.args, self.dir, self.accelerator = args, Path(directory), accelerator
        self.config = self.dir / config  # another name where config.json is a Hugging Face model's
        self.result, self.outputs, self.started = self.dir / result, outputs, time.time()
        self.main, self.bar, self.lock = accelerator.is_main_process, None, None

    def __enter__(self):
        if self.main:
            self._claim()
        if self.args.wandb != "off":
            try:
                where = {"wandb": {"mode": self.args.wandb, "dir": str(self.dir)}}
                self.accelerator.init_trackers("claimbench", vars(self.args), where)
            except Exception as error:  # a tracker must never cost a run, whatever it raises
                self.accelerator.trackers = []
                self.say(f"[W&B] off: {type(error).__name__}: {str(error).splitlines()[0]}")
        self.accelerator.wait_for_everyone()
        return self

    def _claim(self) -> None:
        from filelock import FileLock, Timeout

        holder, was_test = self.dir / ".holder", False
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.dir / ".lock")  # the system frees it when its holder dies
            self.lock.acquire(blocking=False)
        except Timeout as error:
            who = holder.read_text() if holder.exists() else "another run"
            raise Failure(f"{self.dir} is in use by {who}: wait for it or choose another directory") from error
        except OSError as error:
            raise Failure(f"cannot write to {self.dir}: {error.strerror}; choose another directory") from error
        write_atomic(holder, f"process {os.getpid()} on {socket.gethostname()}".encode())
        with contextlib.suppress(OSError, ValueError):
            was_test = json.loads(self.config.read_text()).get("test", False)
        patterns = () if self.args.resume else (self.result.name, "log.jsonl", *self.outputs)
        old = [path for pattern in patterns for path in self.dir.glob(pattern)]
        require(
            not old or was_test or self.args.overwrite,
            f"{self.dir} already holds a run: continue it with "
            "--resume auto, replace it with --overwrite, or choose another directory",
        )
        for path in [*old, *self.dir.glob("*.tmp")]:
            path.unlink()
        write_json(self.config, vars(self.args))
        write_json(self.dir / "env.json", environment() | {"argv": sys.argv, "started": time.ctime()})

    def say(self, line: str = "") -> None:
        """Print on the main process, above the progress bar if there is one."""
        if self.main:
            self.bar.write(line, file=sys.stdout) if self.bar else print(line, flush=True)

    def progress(self, total: int, done: int, label: str):
        """A tqdm bar on a terminal; elsewhere a plain line a minute on standard error, with the time left."""
        from tqdm import tqdm

        if self.bar is not None:
            self.bar.close()
        form = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f} %), {remaining} left"
        plain = {} if sys.stderr.isatty() else {"file": _Lines(), "bar_format": form}
        shown = {"initial": done, "desc": label, "disable": not self.main, "leave": False, "smoothing": 0.05}
        self.bar = tqdm(total=total, **shown, **plain)
        return self.bar

    def log(self, **row) -> None:
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        if self.main:
            with open(self.dir / "log.jsonl", "a") as f:
                f.write(json.dumps(row, allow_nan=False) + "\n")
        self.accelerator.log(row)

    def log_size(self) -> int:
        """Bytes of log.jsonl: a checkpoint keeps it, and a resumed run cuts the log back to it."""
        path = self.dir / "log.jsonl"
        return path.stat().st_size if path.exists() else 0

    def rewind(self, log_size: int) -> None:
        if self.main and self.log_size() > log_size:
            os.truncate(self.dir / "log.jsonl", log_size)

    def forget(self, **first) -> None:
        """Cut log.jsonl before its first row that begins with `first`: rows of a run without a valid checkpoint."""
        path = self.dir / "log.jsonl"
        if self.main and path.exists() and (start := path.read_bytes().find(json.dumps(first)[:-1].encode())) >= 0:
            os.truncate(path, start)

    def finish(self, result: dict) -> dict:
        """Write the result file, which alone marks the run as done."""
        common = {"seed": self.args.seed, "processes": self.accelerator.num_processes, "environment": environment()}
        result = result | common | {"wall_s": time.time() - self.started}
        if self.main:
            write_json(self.result, result)
        self.accelerator.wait_for_everyone()
        return result

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.lock:
            self.lock.release()
        if self.args.wandb != "off" or self.accelerator.num_processes > 1:
            self.accelerator.end_training()


def model_card(run: Run, result: dict, title: str, base: str, metrics: dict, load: str, caveat: str) -> None:
    """README.md beside a saved model: what it is, its base model, data and figures, the command that loads it, and
    what it does not show. `metrics`: values of `result` by name. A README.md that is no card stays as it is."""
    path, first = run.dir / "README.md", "---\nlibrary_name: claimbench\n"
    if not run.main or (path.exists() and not path.read_text().startswith(first)):
        return
    shown = [
        f"| {k} | {v:.4g} |" if isinstance(v, float) else f"| {k} | {v} |" for k, v in metrics.items() if v is not None
    ]
    lines = [
        f"{first}base_model: {json.dumps(base)}\n---",
        f"# {title}",
        f"- base model: {base}",
        f"- data: {result['data']['source']}",
        f"- seed {result['seed']}, commit {result['environment']['commit']}",
        f"- every figure and flag: `{run.result.name}`, `{run.config.name}`",
        "",
        "| metric | value |",
        "| --- | --- |",
        *shown,
        "",
        "## To load it",
        "",
        f"```\n{load}\n```",
        "",
        "## What it does not show",
        "",
        caveat,
        "",
    ]
    write_atomic(path, "\n".join(lines).encode())


# ----------------------------------------------------------------------------------- checkpoints and stop signal
_SEAL = b"sha256:"  # a checkpoint's zip comment: this and the hex digest of every byte before the digest


def save_checkpoint(path: Path, state: dict) -> None:
    """torch.save with a checksum inside the file, atomically. On failure (disk) the old file stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w+b") as f:
            torch.save(state, f)
            f.seek(-2, os.SEEK_END)  # the last field of a zip file is the length of its comment
            f.write((len(_SEAL) + 64).to_bytes(2, "little") + _SEAL)
            f.seek(0)
            f.write(hashlib.file_digest(f, "sha256").hexdigest().encode())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise Failure(f"cannot save {path}: {error}; free space, then --resume auto", DISK) from error


def load_checkpoint(path: Path, sealed: bool = True, allow: tuple = ()) -> dict:
    """Load a file on the CPU with `weights_only=True`, its checksum first (`sealed=False`: a foreign file without
    one; `allow`: (class, pickled name) pairs that may stand in it). A missing, damaged or foreign file is a Failure;
    nothing in it is ever executed."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from error
    ours = data[-64 - len(_SEAL) : -64] == _SEAL
    intact = ours and hashlib.sha256(data[:-64]).hexdigest().encode() == data[-64:]
    require(ours or not sealed, f"{path}: no checksum, so cut short or foreign; use a checkpoint of this script")
    require(intact or not sealed, f"{path}: checksum mismatch, the file is damaged; use an earlier checkpoint")
    try:
        with torch.serialization.safe_globals(list(allow)):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types for what it refuses
        raise Failure(f"{path}: not a checkpoint of plain tensors; nothing was loaded") from error


def latest_checkpoint(directory: Path, pattern: str, say=print) -> dict | None:
    """Content of the newest file that matches `pattern` (names end in the step) and verifies; bad ones are named."""
    paths = Path(directory).glob(pattern)
    return first_valid(sorted(paths, key=lambda p: int(re.findall(r"\d+", p.stem)[-1]), reverse=True), say)


def first_valid(paths, say=print) -> dict | None:
    """Content of the first of the checkpoints `paths` that is there and verifies; bad ones are named."""
    for path in filter(Path.exists, paths):
        try:
            return load_checkpoint(path)
        except Failure as failure:
            say(f"[Resume] skipping a bad checkpoint: {failure}")
    return None


def check_same_config(saved: dict, args, free: tuple[str, ...]) -> None:
    """Refuse to resume under flags that would change the run; those in `free` may differ."""
    free = (*free, *"resume overwrite wandb config debug dry_run threads test".split())
    now = vars(args)
    changed = [f"{k} {saved[k]} -> {now[k]}" for k in now if k in saved and k not in free and saved[k] != now[k]]
    require(not changed, f"--resume: flags differ from the saved run ({'; '.join(changed)}); restore them")


@contextlib.contextmanager
def stop_signal(accelerator):
    """Yields `requested()`: the number of the first SIGINT or SIGTERM, on every process as soon as one got it, else 0.
    The script then saves and ends; a second signal quits at once."""
    received = []

    def receive(signum, frame):
        if received:
            os._exit(128 + signum)
        received.append(signum)

    def requested() -> int:
        signum = received[0] if received else 0
        if accelerator.num_processes > 1:
            signum = int(accelerator.gather(torch.tensor([signum], device=accelerator.device)).max())
        return signum

    before = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# ----------------------------------------------------------------------------------------------------------- data
def hub_ready(timeout: float = 3.0) -> bool:
    """Whether the hub answers. If not, its libraries go offline: cached files load, the rest fails at once instead
    of after half a minute of retries."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # behind a proxy a direct connection says nothing
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("://")[-1].split("/")[0]
    with contextlib.suppress(OSError):
        if os.environ.get("HF_HUB_OFFLINE", "0") in ("0", ""):
            socket.create_connection((host.split(":")[0], int((host + ":443").split(":")[1])), timeout).close()
            return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):  # imported already: the variable is too late
        if module in sys.modules:
            sys.modules[module].HF_HUB_OFFLINE = True
    return False


def load_hub_dataset(name: str, config: str | None, split: str, instead: str, **more):
    """A split of a hub data set; `more` goes to `datasets.load_dataset`. A Failure names what to use `instead`."""
    reachable = hub_ready()
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, **more)
    except (OSError, ValueError) as error:
        why = type(error).__name__ if reachable else "the hub cannot be reached"
        raise Failure(f"data set {name} ({config}, {split}): {why}; instead: {instead}") from error


def read_text(path: Path) -> str:
    try:
        return Path(path).read_bytes().decode()
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Failure(f"{path}: not UTF-8 at byte {error.start}; convert it with iconv") from error


def split_text(path: str, split: str) -> list[str]:
    """Lines of a local file or folder, split `train` or `validation`. Held out is, in a folder: the files named
    *test*, else *valid* or *dev*, else every tenth file; of a single file, its last tenth."""
    root = Path(path)
    require(root.exists(), f"{path}: no such file or folder")
    files = sorted(p for p in root.rglob("*") if p.suffix in (".txt", ".md")) if root.is_dir() else [root]
    require(files, f"{path}: no .txt or .md file in this folder")
    if len(files) == 1:
        lines = read_text(files[0]).splitlines(keepends=True)
        return lines[: len(lines) * 9 // 10] if split == "train" else lines[len(lines) * 9 // 10 :]
    named = [[p for p in files if re.search(name, p.stem)] for name in ("test", "valid|dev")]
    held_out = next((n for n in named if 0 < len(n) < len(files)), files[::10])
    chosen = [p for p in files if (p in held_out) == (split == "validation")]
    return [line for p in chosen for line in read_text(p).splitlines(keepends=True)]


def local_text(split: str) -> list[str]:
    """Prose of the Python standard library (docstrings and comments): real English that is on every machine.

    One module in ten is held out. Texts differ between Python versions: compare losses within one version only.
    """
    cache = CACHE / f"stdlib-{sys.version.split()[0]}.json"
    if not cache.exists():
        root, sides, seen = Path(os.__file__).parent, {"train": [], "validation": []}, set()
        for path in sorted(root.rglob("*.py")):
            name, source = path.relative_to(root).as_posix(), path.read_text(errors="ignore")
            passages = [body for _, body in re.findall(r"(\"\"\"|''')(.*?)\1", source, re.S)]
            passages += [re.sub(r"(?m)^[ \t]*#+", "", c) for c in re.findall(r"(?m)(?:^[ \t]*#.*\n)+", source)]
            parts = [" ".join(p.split()) + "\n" for text in passages for p in re.split(r"\n\s*\n", text)]
            fresh = [] if "test" in name or "site-packages" in name else [p for p in parts if p not in seen]
            seen.update(fresh)  # a paragraph that modules share belongs to the first, so to one side
            side = "validation" if derived_seed(0, name) % 10 == 0 else "train"
            sides[side] += [
                p
                for p in fresh
                if re.fullmatch(r"(?=(\S+ ){9})(?!.*>>>).*[.!?:]\n", p)
                and sum(c.isalpha() or c == " " for c in p) > 0.85 * len(p)
            ]
        write_json(cache, sides)
    return json.loads(cache.read_text())[split]


def synthetic_text(split: str, seed: int = 0, paragraphs: int = 2000) -> list[str]:
    """Seeded ASCII paragraphs of a small grammar. People and things persist within a paragraph, so context helps;
    in a fifth of them a sentence is repeated two to five times, so that repetition exists to be measured."""
    people = "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Katya Leon Mira Nils Olga Pavel".split()
    things = "lamp boat letter mirror garden clock violin map kettle ladder basket engine".split()
    verbs = "found carried repaired painted sold hid borrowed described".split()
    places = "by the harbour|at the station|in a small kitchen|near the old mill|on the north road".split("|")
    rng, lines = random.Random(derived_seed(seed, "synthetic", split)), []
    for _ in range(paragraphs if split == "train" else paragraphs // 10):
        who, what, where = rng.sample(people, 2), rng.sample(things, 2), rng.choice(places)
        facts = [(rng.choice(who), rng.choice(verbs), rng.choice(what)) for _ in range(rng.randint(3, 6))]
        sentences = [f"{a} {b} the {c}" + rng.choice((".", f" {where}.")) for a, b, c in facts]
        repeats = rng.randint(2, 5) if rng.random() < 0.2 else 0
        lines.append(" ".join(sentences + [rng.choice(sentences)] * repeats) + "\n")
    return lines


def load_text(source: str, split: str, path: str = "", seed: int = 0):
    """Lines of `wikitext103 wikitext2 text local synthetic`; split is `train` or `validation`."""
    if source.startswith("wikitext"):
        config = {"wikitext103": "wikitext-103-raw-v1", "wikitext2": "wikitext-2-raw-v1"}[source]
        instead = "--data text --data_path FILE_OR_FOLDER, --data local or --data synthetic"
        return load_hub_dataset("Salesforce/wikitext", config, split, instead)["text"]
    require(path or source != "text", "--data text needs --data_path FILE_OR_FOLDER")
    if source == "text":
        return split_text(path, split)
    return local_text(split) if source == "local" else synthetic_text(split, seed)


def train_tokenizer(lines, vocab_size: int = 259):
    """Byte-level BPE over `lines`, ids 0, 1, 2 being pad, bos, eos; 259 entries are these and the bytes alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer, special = Tokenizer(models.BPE()), ["<pad>", "<bos>", "<eos>"]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(lines if vocab_size > 259 else [], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def load_tokenizer(name: str, lines=(), vocab_size: int = 4096):
    """`byte`, `local` (byte-level BPE of `vocab_size` entries trained on `lines`), a directory or a hub name."""
    if name in ("byte", "local"):
        return train_tokenizer(lines, 259 if name == "byte" else vocab_size)
    if not Path(name).exists():
        hub_ready()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise Failure(f"tokenizer {name} did not load; instead: --tokenizer byte, local or a directory") from error


def encode(lines, tokenizer) -> np.ndarray:
    """Token ids of all non-blank `lines`, concatenated without separators: a memory map of a cached file, which is
    keyed by the text and the tokenizer."""
    key = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for line in lines:
        key.update(line.encode())
    path = CACHE / "tokens" / f"{key.hexdigest()[:32]}.npy"
    if not path.exists():
        dtype, parts = np.uint16 if len(tokenizer) <= 65536 else np.uint32, []
        for start in range(0, len(lines), 1000):
            batch = [line for line in lines[start : start + 1000] if line.strip()]
            ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"] if batch else []
            parts += [np.asarray(i, dtype) for i in ids]
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(parts or [np.zeros(0, dtype)]))
        write_atomic(path, buffer.getvalue())
    return np.load(path, mmap_mode="r")


def blocks(ids: np.ndarray, length: int, what: str) -> np.ndarray:
    """[N, length] non-overlapping windows; the tail is dropped. Less than one window is a Failure."""
    n = len(ids) // length
    require(n, f"{what} has {len(ids)} tokens, but one window needs {length}: use more text or shorter windows")
    return ids[: n * length].reshape(n, length)


@functools.lru_cache(4)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "data", epoch))


def batch_indices(n: int, batch: int, seed: int, step: int) -> list[int]:
    """Rows of micro-batch `step`: a pure function of its arguments, so a resumed run needs no saved position and
    every arm sees the same order. Each epoch is a fresh permutation; a batch may straddle two."""
    return [int(_permutation(n, seed, i // n)[i % n]) for i in range(step * batch, (step + 1) * batch)]


def batches(rows: np.ndarray, batch: int, seed: int, steps: range, accelerator, workers: int = 0):
    """Micro-batches [batch, T] int64 on the device, for `steps`. A step's global batch is `batch` rows for each
    process, cut by rank: N processes see together what one sees at N times the batch."""
    world, rank = accelerator.num_processes, accelerator.process_index
    order = (batch_indices(len(rows), batch * world, seed, step) for step in steps)
    loader = torch.utils.data.DataLoader(
        rows,
        batch_sampler=(ids[rank * batch : (rank + 1) * batch] for ids in order),
        collate_fn=lambda chosen: torch.from_numpy(np.stack(chosen).astype(np.int64)),
        num_workers=min(workers, (os.cpu_count() or 1) - 1),
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=lambda _: signal.signal(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's to handle
        generator=generator(seed, "loader"),
    )  # else every new loader draws from the global stream, dropout's
    return (rows_BT.to(accelerator.device, non_blocking=True) for rows_BT in loader)


def squad_rows(source: str, split: str = "train") -> list[dict]:
    """Rows {id, title, context, question, answers: [str]} of a SQuAD v1.1 JSON file, of a JSONL file with the fields
    context, question and answers, or of a hub set. Questions without an answer are dropped."""
    rows, flat, i = [], [], 0
    try:
        if source.endswith(".jsonl"):
            flat = [json.loads(line) for line in read_text(source).splitlines() if line.strip()]
        elif source.endswith(".json"):
            passages = [(a, p) for a in json.loads(read_text(source))["data"] for p in a["paragraphs"]]
            flat = [q | {"context": p["context"], "title": a.get("title", "")} for a, p in passages for q in p["qas"]]
        else:
            flat = load_hub_dataset(source, None, split, "a local .json or .jsonl file in SQuAD form")
        for i, row in enumerate(flat):
            answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
            row = {
                "id": str(i),
                "title": "",
                **{k: row[k] for k in ("id", "title") if k in row},
                "context": row["context"],
                "question": row["question"],
                "answers": [a["text"] if isinstance(a, dict) else a for a in answers],
            }
            rows += [row] if answers else []
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"{source}: record {i}: {type(error).__name__} {error}; expected SQuAD v1.1") from error
    require(rows, f"{source}: no answerable question")
    return rows


def load_backbone(name: str, dtype: torch.dtype = torch.float32, **kwargs):
    """(model, tokenizer) of a hub id, a local Hugging Face directory, or `tiny`: a two-layer Llama with random weights
    and the byte tokenizer. A hub that cannot be reached fails within seconds; nothing is substituted."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name == "tiny":
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=259,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(0, "tiny"))
            return LlamaForCausalLM(config).to(dtype).eval(), train_tokenizer([])
    local = Path(name).is_dir()
    require(local or not name.startswith((".", "/", "~")), f"model {name}: no such directory")
    reachable = local or hub_ready()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=local, **kwargs)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0][:120] if reachable else "the hub cannot be reached"
        line = f"model {name}: {why}; instead: tiny, a local model directory, or one from pretrain_backbone.py"
        raise Failure(line) from error
    tokenizer, rows = load_tokenizer(name), model.get_input_embeddings().weight.shape[0]
    require(len(tokenizer) <= rows, f"model {name}: its tokenizer has {len(tokenizer)} entries, its embedding {rows}")
    return model.eval(), tokenizer


# -------------------------------------------------------------------------------------------------------- metrics
LOSS_CHUNK = 2**25  # logits that the loss holds at a time: 128 MB in fp32


def next_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of the LM head `weight` [V, D] on `hidden` [B, T, D], never holding all logits.

    Position t is scored against labels[:, t + 1] (the only shift there is); a label of -100 is not scored.
    """
    x, y = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # [B*(T-1), D], [B*(T-1)]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    rows, scored = max(1, LOSS_CHUNK // len(weight)), (y != -100).sum().clamp(min=1)
    if hasattr(F, "linear_cross_entropy") and torch.is_grad_enabled():
        options = nn.LinearCrossEntropyOptions(acc_policy="accurate", batch_chunk_size=rows, chunking_method=None)
        kind = "sum" if x.dtype == torch.float32 else "none"  # in half precision the sum itself would be rounded
        total = F.linear_cross_entropy(x, weight, y, reduction=kind, ignore_index=-100, options=options).float().sum()
    else:  # older torch, and evaluation: the same chunks, their logits computed again in the backward pass
        total, again = torch.zeros((), device=x.device), dict(use_reentrant=False, preserve_rng_state=False)
        for part, target in zip(x.split(rows), y.split(rows)):
            total = total + checkpoint(_summed_loss, part, weight, target, **again)
    return total / scored if reduction == "mean" else total


def _summed_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target, ignore_index=-100, reduction="sum")


def perplexity(loss: float) -> float:
    """exp of a loss in nats, capped at exp(20) so that a diverged run still writes valid JSON."""
    return math.exp(min(loss, 20.0))


def mean_interval(values) -> dict:
    """{mean, lo, hi, n}: 95 % Student-t interval over independent runs; a single run has none (lo = hi = mean)."""
    quantiles = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # by degrees of freedom
    n, mean, sd = len(values), float(np.mean(values)), float(np.std(values, ddof=min(1, len(values) - 1)))
    half = (quantiles[n - 1] if n <= len(quantiles) else 1.96 + 2.8 / (n - 1)) * sd / math.sqrt(n)
    return {"mean": mean, "lo": mean - half, "hi": mean + half, "n": n}


def bootstrap(values, resamples: int = 10000, seed: int = 0) -> dict:
    """{mean, lo, hi, n}: 95 % percentile-bootstrap interval over prompts, batches or paired differences."""
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    lo, hi = np.percentile(np.asarray(values, float)[draws].mean(1), (2.5, 97.5))
    return {"mean": float(np.mean(values)), "lo": float(lo), "hi": float(hi), "n": len(values)}


def wilson(successes: int, n: int) -> dict:
    """{mean, lo, hi, n}: a rate and its 95 % Wilson score interval."""
    z, p = 1.959964, successes / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    lo, hi = ((p + z * z / (2 * n) + side * half) / (1 + z * z / n) for side in (-1, 1))
    return {"mean": p, "lo": lo, "hi": hi, "n": n}


def distinct_n(ids: list, n: int) -> float:
    """Unique n-grams over n-grams, 0 for fewer than n tokens. rep-n is 1 - distinct-n."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def rep_w(ids: list, prompt: list = (), window: int = 32) -> float:
    """Share of `ids` that occur among the `window` tokens before them, the prompt's included."""
    every = np.array([*prompt, *ids])
    seen = np.zeros(len(every), bool)
    for back in range(1, min(window, len(every) - 1) + 1):
        seen[back:] |= every[back:] == every[:-back]
    return float(seen[len(prompt) :].mean()) if len(ids) else 0.0


def squad_scores(prediction: str, references: list[str]) -> tuple[float, float]:
    """Official SQuAD v1.1 exact match and F1 (multiset overlap), each the maximum over the references."""

    def words(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def f1(said, gold):
        common = sum((Counter(said) & Counter(gold)).values())
        return 2 * common / (len(said) + len(gold)) if common else float(said == gold)

    pairs = [(words(prediction), words(reference)) for reference in references]
    return max(float(said == gold) for said, gold in pairs), max(f1(said, gold) for said, gold in pairs)


# --------------------------------------------------------------------------------------------------------- checks
@torch.no_grad()
def causality_audit(model: nn.Module, vocab_size: int, length: int, outputs=("logits",)) -> float:
    """Largest change of any output before position j when every token from j on is replaced: 0 if causal.

    fp32, evaluation mode, two rows of min(length, 64) random tokens, j in {1, T/2, T-1}. `outputs` are keys of the
    model's result, each [B, T, ...]. The model's mode is restored.
    """
    device, training, T = next(model.parameters()).device, model.training, min(length, 64)
    ids = torch.randint(vocab_size, (2, T), generator=generator(0, "audit"))
    other = (ids + torch.randint(1, vocab_size, (2, T), generator=generator(1, "audit"))) % vocab_size  # all differ
    model.eval()
    with torch.autocast(device.type, enabled=False):
        before, worst = model(ids.to(device)), 0.0
        for j in {1, T // 2, T - 1}:
            after = model(torch.cat([ids[:, :j], other[:, j:]], 1).to(device))
            worst = max(worst, *(float((before[k][:, :j] - after[k][:, :j]).abs().max()) for k in outputs))
    model.train(training)
    return worst
