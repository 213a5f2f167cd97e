"""The suite's ground floor: whatever could quietly falsify several scripts' numbers stands here, once.

No trainer, no callbacks and no module that carries a hypothesis: each script's model, loss and loop stand in the
script. Shapes in comments: B batch, T positions, D width, V vocabulary, N windows.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import warnings
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Set
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

CACHE = Path(os.environ.get("CLAIMBENCH_CACHE", "~/.cache/claimbench")).expanduser()
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # errors of a disk that takes no more
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
        elif getattr(error, "errno", 0) in FULL:
            code, line = DISK, f"cannot write: {error}"
        elif "RANK" in os.environ and re.search("gloo|NCCL|by peer", str(error)):
            code, line = CHECK_FAILED, "another process of this run has ended; continue with --resume auto"
        else:
            raise
        if "--debug" in sys.argv:
            sys.excepthook(*sys.exc_info())
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    else:
        time.sleep(1)  # the first process that leaves ends the others: not before the main one has spoken
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
        "", "checkpoint to go on from; auto, or no name: the newest; unset: none", "run", nargs="?", const="auto"
    )
    overwrite: bool = arg(False, "replace an earlier run in the same directory", "run")
    wandb: Literal["off", "offline", "online"] = arg("off", "log to Weights & Biases as well", "run")
    config: str = arg("", "YAML file of flag values; explicit flags override it; unset: none", "run")
    test: bool = arg(False, "smoke test on a CPU, offline: the same code at small sizes", "run")
    dry_run: bool = arg(False, "print parameters, tokens and an estimate of memory, then stop", "run")
    debug: bool = arg(False, "show the traceback of an expected failure", "run")


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """One spelling of each flag, no value after a switch, and a default only where it says something."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default in ("", "==SUPPRESS==")
        return action.help if silent else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        names = dict.fromkeys(n[:2] + n[2:].replace("-", "_") for n in action.option_strings)
        switch = action.nargs == 0 or (action.nargs == "?" and action.const is True)
        return ", ".join(names) + ("" if switch else f" {self._format_args(action, action.dest.upper())}")


def parse_args(cls, test: dict, argv=None, doc: str = ""):
    """Parse flags into dataclass `cls`. Later values win: config file, then `test` if --test, then `argv`. `--a-b` and
    `--a_b` are one flag; there are no abbreviations. Bad input is a Failure of one line."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def add_argument(self, *names, group="options", **how):  # only --help has no heading
            known = {heading.title: heading for heading in self._action_groups}
            return (known.get(group) or self.add_argument_group(group)).add_argument(*names, **how)

        def error(self, message):
            if message.startswith("unrecognized") and any(not word.strip() for word in argv):
                message = "a stray blank argument: usually a space after the backslash at a line's end"
            raise Failure(f"{message} (see --help)")

    argv = list(sys.argv[1:] if argv is None else argv)
    usage = "%(prog)s [flags]    (a dash and an underscore are the same in a flag)"
    parser = Parser(cls, allow_abbrev=False, usage=usage, description=doc, formatter_class=_Formatter)
    parser._action_groups.sort(key=lambda group: group.title == "run")  # shared flags last

    def parse(words):
        args, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return args

    def words(values):  # as typed words: argparse then checks a file's values as it checks a person's
        return [f"--{k}={v}" for k, v in values.items() if v is not None]

    overlay = []
    if path := parse(argv).config:
        with contextlib.suppress(yaml.YAMLError, RecursionError):  # then it is no mapping either
            overlay = yaml.safe_load(read_text(path))
        require(isinstance(overlay, dict), f"--config {path}: expected lines of the form 'flag: value'")
        overlay = words(overlay)
    args = parse(overlay + argv)
    args = parse(overlay + words(test) + argv) if args.test else args
    for name, value in vars(args).items():
        for item in value if isinstance(value, list) else [value]:
            require(not isinstance(item, float) or math.isfinite(item), f"--{name} {item}: not a finite number")
            require(str(item).isascii() or not re.search("[\ud800-\udfff]", str(item)), f"--{name}: not UTF-8")
    require(0 <= args.threads <= 1024, f"--threads {args.threads}: use 1 to 1024, or 0 for torch's choice")
    require(getattr(args, "num_workers", 0) >= 0, "--num_workers: use 0 or more")
    return args


# ------------------------------------------------------------------ engine: device, precision, memory, processes
def engine(args, no_fsdp: str = ""):
    """The accelerate engine for `args.device` and `args.precision`, which places every script's model; the allocator is
    set before the first CUDA call. Processes that would each train alone are refused. Its `sharded` says whether FSDP
    was asked for at the launch; a script that cannot be sharded gives the reason as `no_fsdp`."""
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
    from accelerate.utils import patch_environment

    atexit.unregister(end_loaders)  # once, however many engines
    atexit.register(end_loaders)
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
    log_with, mixed = None if args.wandb == "off" else "wandb", precision if precision in ("bf16", "fp16") else "no"
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # `shard` does it: accelerate cannot on a CPU, nor scalars
        accelerator = Accelerator(cpu=device.type == "cpu", log_with=log_with, mixed_precision=mixed)
    accelerator.sharded = sharded
    alone = f"{world} processes were started but each would train alone on {device}"
    remedy = "use torchrun with --device cpu, or one GPU for each process"
    require(accelerator.num_processes == world, f"{alone}: {remedy}")
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
    model.scalars = [name for name, p in model.named_parameters() if p.ndim == 0]
    for name in model.scalars:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(model.get_parameter(name).detach().view(1)))
    _cut([*layers, model], accelerator)
    model.forward = accelerator.autocast()(model.forward)  # as accelerate does for a model that is whole


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
    """`accelerator.prepare`: DDP averages over the processes the gradients of all that FSDP has not cut up."""
    if hasattr(model, "set_requires_gradient_sync"):
        return model, accelerator.prepare(optimizer)
    model._ddp_params_and_buffers_to_ignore = [n for n, p in model.named_parameters() if hasattr(p, "full_tensor")]
    return accelerator.prepare(model, optimizer)


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


def _whole_state() -> tuple:
    from torch.distributed.checkpoint import state_dict

    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_state(model: nn.Module) -> dict:
    """`model.state_dict()` as it would be without FSDP, on the CPU of the main process: all processes must call it."""
    if not hasattr(model, "scalars"):
        return model.state_dict()
    library, options = _whole_state()
    state = library.get_model_state_dict(model, options=options)
    return {k: v.view(()) if k in model.scalars else v for k, v in state.items()}


def optimizer_state(model: nn.Module, optimizer, load: dict | None = None) -> dict:
    """State of `optimizer` by the names of the parameters of `model`, whole, so that it fits with and without FSDP; or,
    with `load`, restore such a state. An optimizer that is not torch's gives its own."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper around it
    if not type(inner).__module__.startswith("torch."):
        return inner.state_dict() if load is None else inner.load_state_dict(load)
    library, options = _whole_state()
    state = load or library.get_optimizer_state_dict(model, inner, options=options)
    for name in getattr(model, "scalars", ()):  # those that `shard` gave the shape [1]
        moments = state.get("state", {}).get(name, {})  # whole in the main process alone, nothing in the others
        moments.update({k: v.view(() if load is None else (1,)) for k, v in moments.items() if k != "step"})
    if load and load["state"]:  # the library cannot restore one that is empty
        some = dataclasses.replace(options, strict=False)  # a parameter that was held back so far has none
        library.set_optimizer_state_dict(model, inner, state, options=some)
        for name, p in model.named_parameters():  # and gets none: what the library makes up counts as an update
            if name.removeprefix("module.") not in state["state"]:
                inner.state.pop(p, None)
    return state


# ---------------------------------------------------------------------------------------- memory, groups and seeds
def memory_estimate(model: nn.Module, tokens: int, width: int, layers: int, half: bool) -> dict[str, float]:
    """Rough training memory in GB. Activations: 34 * tokens * width bytes per layer in half precision, twice that
    in fp32 (Korthikanti et al. 2022, eq. 1 without the score term); gradients and two Adam moments in fp32."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) + 12 * trainable
    activations = 34 * tokens * width * layers * (1 if half else 2)
    parts = {"weights_and_optimizer": weights, "activations": activations, "loss": 8 * LOSS_CHUNK}
    return {k: v / 1e9 for k, v in (parts | {"total": sum(parts.values())}).items()}


def show_plan(plan: dict) -> dict:
    """Print what --dry_run found, as JSON; returns it."""
    print(json.dumps(plan, indent=1))
    return plan


def peak_memory() -> int:
    """Bytes: peak CUDA allocation where a GPU is in use, else this process's peak resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # Linux: getrusage would count what a parent had before it forked
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: matrices decay; biases, norms and scalars do not. Every trainable parameter is in one."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay}
    others = {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}
    return [group for group in (matrices, others) if group["params"]]


def weight_of(accelerator, count: Tensor) -> Tensor | float:
    """The factor of a mean over `count` positions of this process with which DDP's mean over the processes becomes the
    mean over all positions: count over the processes' mean count. All processes must call it; 1 if there is one."""
    if accelerator.num_processes == 1:
        return 1.0
    return count / accelerator.reduce(count.float(), "mean").clamp(min=1e-9)


def check_finite(value: float, what: str) -> None:
    """Failure (diverged) unless `value` is finite."""
    require(math.isfinite(value), f"{what} is not finite: lower --lr or use --precision fp32", DIVERGED)


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


# ---------------------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def _atomic(path: Path, displaced: Path | None = None):
    """A binary file to write, which becomes `path` at the end in one step: a reader sees the old file or the new one,
    never half. The old one gets the name `displaced`, if given, once the new one is safe on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")  # processes may fill one cache
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if displaced:
            os.replace(path, displaced)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


_TEMPORARY = ".claimbench-"  # what a killed process leaves behind begins so, and nothing of a person's does


def write_atomic(path: Path, data: bytes) -> None:
    with _atomic(Path(path)) as file:
        file.write(data)


def write_json(path: Path, value) -> None:
    """Strict JSON (NaN and infinity are refused), atomically."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def cached(path: Path, make) -> bytes:
    """What `make()` gave when `path` was first asked for. A file that does not carry its checksum is made again."""
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data[:-64]).hexdigest().encode() != data[-64:]:
        content = make()
        data = content + hashlib.sha256(content).hexdigest().encode()
        write_atomic(path, data)
    return data[:-64]


def digest(*values) -> str:
    """Fingerprint of what a run rests on: arrays, files and folders (as Path), and plain values."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, Path):
            for path in sorted(value.rglob("*")) if value.is_dir() else [value]:
                if path.is_file():
                    with open(path, "rb") as file:
                        total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        elif isinstance(value, np.ndarray):
            total.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        else:
            total.update(json.dumps(value, sort_keys=True, default=str).encode())
    return total.hexdigest()[:32]


def tokenizer_digest(tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest(backend.to_str() if backend else tokenizer.get_vocab())


def base_digest(name: str, model: nn.Module) -> str:
    """Fingerprint of a base model's weights: of the files of a local directory, the commit of a hub model."""
    files = [path for kind in ("*.safetensors", "*.bin") for path in sorted(Path(name).glob(kind))]
    return digest(*files) if files else digest(name, getattr(model.config, "_commit_hash", None))


# -------------------------------------------------------------------------------------------------- run directory
@functools.cache
def environment() -> dict:
    """Commit, versions and hardware: what a reader needs to trust or repeat a number."""
    from importlib.metadata import PackageNotFoundError, version

    def git(*words):
        with contextlib.suppress(OSError):  # no git on this machine
            here = Path(__file__).resolve().parent
            return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()
        return ""

    versions = {"python": sys.version.split()[0]}
    for package in "torch numpy transformers tokenizers accelerate peft datasets bitsandbytes".split():
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": changed, "versions": versions, "device": device}


class Run:
    """One run directory: lock, manifest, log.jsonl, console, and the result file that ends it.

    `outputs` are glob patterns of the other files that the script writes there. Nothing is written, and nothing of an
    earlier run is removed, before `start`, which a script calls when all that could refuse the run has passed.
    `tracker`: what W&B calls the run (project, name, tags).
    """

    FREE = frozenset("resume overwrite wandb config debug dry_run threads".split())  # may differ when a run goes on

    def __init__(self, args, directory: str, accelerator, result: str, outputs: tuple = (), tracker=None):
        require(str(directory).strip(), "the run directory has no name: give one")
        self.args, self.dir, self.accelerator = args, Path(directory), accelerator
        self.result, self.outputs = self.dir / result, outputs
        self.tracker = {"project": "claimbench"} | (tracker or {})
        self.log_file, self.manifest_file = self.dir / "log.jsonl", self.dir / "manifest.json"
        self.script = Path(sys.modules[type(args).__module__].__file__)
        self.main, self.bar, self.lock = accelerator.is_main_process, None, None
        self.resumed = []  # manifests of the checkpoints that this run goes on from, each with the size of its log
        self.segment = {}  # what the manifest says of this part of the run
        self.signum, self.handlers, self.started = 0, {}, clock()

    def __enter__(self):
        if self.main:
            self._claim()
        self.accelerator.wait_for_everyone()
        return self

    def _claim(self) -> None:
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.dir / ".lock")  # the system frees it when its holder dies
            self.lock.acquire(blocking=False)
            write_atomic(self.dir / ".holder", f"process {os.getpid()} on {socket.gethostname()}".encode())
        except Timeout as error:
            who = self.dir / ".holder"
            who = who.read_text() if who.exists() else "another run"
            raise Failure(f"{self.dir} is in use by {who}: wait for it or choose another directory") from error
        except OSError as error:
            code = DISK if error.errno in FULL else BAD_INPUT
            raise Failure(f"cannot write to {self.dir}: {error.strerror}; choose another directory", code) from error
        was_test = False
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none there, or another program's
            was_test = json.loads(self.manifest_file.read_text())["flags"]["test"]
        free = self.args.resume or self.args.overwrite or was_test or not self._old_files()
        remedy = "continue it with --resume auto, replace it with --overwrite, or choose another directory"
        require(free, f"{self.dir} already holds a run: {remedy}")

    def _old_files(self) -> list[Path]:
        names = (self.result.name, self.manifest_file.name, self.log_file.name, *self.outputs)
        return [path for name in names for path in self.dir.glob(name) if path.is_file()]

    def finished(self, length: str, free: tuple = ()) -> dict | None:
        """With --resume: the result of a run that ended with these flags. Nothing is written. None if there is none,
        or if the flag `length` asks for more than that run had. Failure if any flag but those in `free` differs."""
        if not (self.args.resume and self.result.exists()):
            return None
        try:
            result = json.loads(self.result.read_text())
            flags = result["manifest"]["flags"]
        except (ValueError, LookupError) as error:
            raise Failure(f"{self.result} holds no manifest: start afresh with --overwrite") from error
        longer = getattr(self.args, length) > flags[length]
        self._compare(flags, (*free, length) if longer else free)
        if longer:
            return None
        self.say(f"[Resume] finished already: {self.result}")
        return result

    def _compare(self, flags: dict, free: tuple) -> None:
        """Refuse to go on under flags that would change the run."""
        now, free = vars(self.args), self.FREE.union(free)
        changed = [f"{k} {flags[k]} -> {now[k]}" for k in now if k in flags and k not in free and flags[k] != now[k]]
        require(not changed, f"--resume: flags differ from the saved run ({'; '.join(changed)}); restore them")

    def checkpoint(self, *patterns: str, total: float, arm: str = "") -> dict | None:
        """What --resume goes on from: the checkpoint that it names, else, of the files that match `patterns`, the one
        of the highest step that verifies. None for a fresh start. `arm`: one of several trainings in the directory.
        `total`: the steps of the training. A checkpoint beyond them is refused, and so is one of that very step from
        the midst of a longer training, which lacks what the end adds."""
        if not self.args.resume:
            return None
        saved = load_checkpoint(Path(self.args.resume)) if self.args.resume != "auto" else None
        if saved and self._ours(saved) and arm and saved["arm"] != arm:
            self.say(f"[Resume] {self.args.resume} is of {saved['arm']}; for {arm} the newest in {self.dir} is taken")
            saved = None
        if saved is None:
            saved = newest_checkpoint([path for pattern in patterns for path in self.dir.glob(pattern)], self.say)
        if saved is None:
            return None
        remedy = "not a training checkpoint of this script; name one that it saved while training"
        require(self._ours(saved), f"--resume {self.args.resume}: {remedy}")
        count, step, of = len(saved["rng_state"]), saved["step"], saved["loop"].get("total", total)
        require(count == self.accelerator.num_processes, f"--resume: the run had {count} processes; use as many")
        where = f"--resume: the run is at step {step} of {of}, which {total} steps do not continue"
        require(step < total or step == of == total, f"{where}: ask for more, or choose another directory")
        self.resumed.append(saved["manifest"] | {"log_size": saved["log_size"]})
        return saved

    def _ours(self, saved: dict) -> bool:
        manifest = saved.get("manifest")
        return isinstance(manifest, dict) and manifest["script"] == self.script.name and "rng_state" in saved

    def start(self, free: tuple = (), **inputs: str) -> None:
        """Begin to write: every check has passed. `inputs`: fingerprints of data, tokenizer and base weights, which,
        like all flags but those in `free`, must be those of the checkpoints that the run goes on from.

        From here on the first SIGINT or SIGTERM is only noted: the loop saves and ends. A second one quits at once.
        """
        for manifest in self.resumed:
            self._compare(manifest["flags"], free)
            changed = [k for k, v in manifest["inputs"].items() if inputs.get(k, v) != v]
            remedy = "not what the run began with; restore it, or start afresh"
            require(not changed, f"--resume: {' and '.join(changed)} changed, {remedy}")
        code = {path.name: digest(path) for path in (self.script, Path(__file__).resolve())}
        self.segment = {"commit": environment()["commit"], "code": code, "started": time.ctime()}
        self.segment |= {"updates": 0, "train_seconds": 0.0}
        earlier = max((manifest["segments"] for manifest in self.resumed), key=len, default=[])
        if earlier and earlier[-1]["code"] != code:
            self.say("[Resume] the code has changed since this run began: its manifest says from where on")
        self.record = {"script": self.script.name, "flags": vars(self.args), "inputs": inputs, "argv": sys.argv[1:]}
        self.record |= {"environment": environment(), "segments": [*earlier, self.segment]}
        self.accelerator.wait_for_everyone()  # no process reads an old file any more
        if self.main:
            for path in [*self.dir.glob(f"{_TEMPORARY}*"), *([] if self.args.resume else self._old_files())]:
                path.unlink()
            if self.log_file.exists():  # rows after the checkpoints are logged again; a row that was cut in two goes
                size = max((manifest["log_size"] for manifest in self.resumed), default=0)
                os.truncate(self.log_file, self.log_file.read_bytes()[:size].rfind(b"\n") + 1)
            write_json(self.manifest_file, self.manifest())
        if self.args.wandb != "off":
            self._start_tracker()
        self.handlers = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        self.accelerator.wait_for_everyone()

    def manifest(self) -> dict:
        """What the run rests on: flags, code, inputs, versions; and its segments, one for each start."""
        self.segment |= {"wall_s": clock() - self.started, "peak_mem_bytes": peak_memory()}
        return self.record

    def _start_tracker(self) -> None:
        try:
            require(self.args.wandb == "offline" or reaches("https://api.wandb.ai"), "its server does not answer")
            where = {"mode": self.args.wandb, "dir": str(self.dir)} | self.tracker
            self.accelerator.init_trackers(where.pop("project"), vars(self.args), {"wandb": where})
        except Exception as error:  # a tracker must never cost a run, whatever it raises
            self.accelerator.trackers = []
            self.say(f"[W&B] off: {type(error).__name__}: {str(error).splitlines()[0]}")

    def _receive(self, signum, frame) -> None:
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum

    def stop_requested(self) -> int:
        """The number of the signal that one of the processes got, in all of them, which must all ask; else 0."""
        if self.accelerator.num_processes == 1:
            return self.signum
        return int(self.accelerator.gather(torch.tensor([self.signum], device=self.accelerator.device)).max())

    def say(self, line: str = "") -> None:
        """Print on the main process, above the progress bar if there is one."""
        if self.main:
            above = self.bar is not None and sys.stderr.isatty()  # elsewhere the bar would be drawn again at each line
            self.bar.write(line, file=sys.stdout) if above else print(line, flush=True)

    def progress(self, total: int, done: int, label: str):
        """A tqdm bar on a terminal; elsewhere a plain line a minute on standard error, with the time left."""
        if self.bar is not None:
            self.bar.close()
        form = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f} %), {remaining} left\n"
        plain = {} if sys.stderr.isatty() else {"mininterval": 60, "delay": 60, "bar_format": form}
        shown = {"initial": done, "desc": label, "disable": not self.main, "leave": False, "smoothing": 0.05}
        self.bar = tqdm(total=total, **shown, **plain)
        return self.bar

    def log(self, **row) -> None:
        """A row of log.jsonl; a number that is not finite becomes null."""
        row = json.loads(json.dumps(row), parse_constant=lambda name: None)
        if self.main:
            with open(self.log_file, "a") as f:
                f.write(json.dumps(row, allow_nan=False) + "\n")
        self.accelerator.log(row)

    def finish(self, result: dict) -> dict:
        """Write the result file, which alone marks the run as done."""
        manifest = self.manifest()
        common = {"seed": self.args.seed, "processes": self.accelerator.num_processes, "environment": environment()}
        result |= common | {"manifest": manifest, "wall_s": sum(s["wall_s"] for s in manifest["segments"])}
        if self.main:
            write_json(self.manifest_file, manifest)
            write_json(self.result, result)
        self.accelerator.wait_for_everyone()
        return result

    def __exit__(self, *exception) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        if self.bar is not None:
            self.bar.close()
        if self.lock:
            self.lock.release()
        if self.args.wandb != "off" or self.accelerator.num_processes > 1:
            self.accelerator.end_training()


def model_card(run: Run, result: dict, title: str, base: str, metrics: dict, load: str, caveat: str) -> None:
    """README.md beside a saved model: what it is, its base model, data and figures, the command that loads it, and
    what it does not show. `metrics`: values of `result` by name. A README.md that is no card stays as it is."""
    from huggingface_hub import ModelCardData

    path, first = run.dir / "README.md", "---\nlibrary_name: claimbench\n"
    if not run.main or (path.exists() and not path.read_text().startswith(first)):
        return
    hub = base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None  # a path is no hub id
    about = {"license": "mit", "base_model": hub, "tags": ["claimbench", run.script.stem]}
    about = ModelCardData(library_name="claimbench", **about).to_yaml(original_order=["library_name"])
    lines = [f"---\n{about}\n---\n# {title}\n- base model: {base} (its own license applies to its weights)"]
    lines += [f"- data: {result['data']['source']}", f"- seed {result['seed']}"]
    lines += [f"- commit {result['environment']['commit']}; every figure and flag: `{run.result.name}`", ""]
    lines += ["| metric | value |", "| --- | --- |"]
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in metrics.items() if v is not None}
    lines += [f"| {name} | {value} |" for name, value in shown.items()]
    lines += [f"\n## To load it\n\n```\n{load}\n```\n\n## What it does not show\n\n{caveat}\n"]
    write_atomic(path, "\n".join(lines).encode())


# ---------------------------------------------------------------------------------------------------- checkpoints
_SEAL = re.compile(rb"step:(\d{12}) sha256:([0-9a-f]{64})\Z")  # the zip comment that ends a checkpoint
_SEAL_LENGTH = 5 + 12 + 8 + 64


def save_checkpoint(path: Path, state: dict, displaced: Path | None = None) -> None:
    """torch.save with its step and a checksum of every byte before the checksum inside the file, atomically. On failure
    (disk) the old file stays. If it verifies it gets the name `displaced` once the new one is written."""
    try:
        with _atomic(path, displaced if displaced and verifies(path) else None) as f:
            torch.save(state, f)
            f.seek(-2, os.SEEK_END)  # the last field of a zip file is the length of its comment
            f.write(_SEAL_LENGTH.to_bytes(2, "little") + f"step:{state.get('step', 0):012d} sha256:".encode())
            f.seek(0)
            f.write(hashlib.file_digest(f, "sha256").hexdigest().encode())
    except (OSError, RuntimeError) as error:
        raise Failure(f"cannot save {path}: {error}; free space, then --resume auto", DISK) from error


def load_checkpoint(path: Path, sealed: bool = True, allow: tuple = ()) -> dict:
    """Load a file on the CPU with `weights_only=True`, its checksum first (`sealed=False`: a foreign file without
    one; `allow`: (class, pickled name) pairs that may stand in it). A missing, damaged or foreign file is a Failure;
    nothing in it is ever executed."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from error
    remedy = "use an earlier checkpoint of this script"
    require(_intact(data) or not sealed, f"{path}: damaged, cut short or foreign (its checksum); {remedy}")
    try:
        with torch.serialization.safe_globals(list(allow)):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types for what it refuses
        raise Failure(f"{path}: not a checkpoint of plain tensors; nothing was loaded") from error


def _intact(data: bytes) -> bool:
    seal = _SEAL.search(data[-_SEAL_LENGTH:])
    return bool(seal) and hashlib.sha256(data[:-64]).hexdigest().encode() == seal[2]


def verifies(path: Path) -> bool:
    """Whether the file carries the checksum of its content."""
    return path.is_file() and _intact(path.read_bytes())


def newest_first(paths) -> list[Path]:
    """By the step sealed in each file, which is read without the rest; those with a damaged end first."""

    def order(path: Path) -> tuple:
        with open(path, "rb") as f:
            f.seek(-min(_SEAL_LENGTH, path.stat().st_size), os.SEEK_END)
            seal = _SEAL.search(f.read())
        return int(seal[1]) if seal else math.inf, path.stat().st_mtime_ns

    whole = [path for path in paths if path.is_file() and not path.name.startswith(_TEMPORARY)]
    return sorted(whole, key=order, reverse=True)


def newest_checkpoint(paths, say=print) -> dict | None:
    """Content of the checkpoint of the highest step that verifies; bad ones before it are named."""
    for path in newest_first(paths):
        try:
            return load_checkpoint(path)
        except Failure as failure:
            say(f"[Resume] skipping a bad checkpoint: {failure}")
    return None


def prune_checkpoints(paths, keep: int) -> None:
    """Remove all but the newest files, once `keep` of those have been seen to verify."""
    good = 0
    for path in newest_first(paths):
        if good >= keep:
            path.unlink()
        elif verifies(path):
            good += 1


# ------------------------------------------------------------------------------------------------- training loop
def clock() -> float:
    """Seconds of wall time from some fixed moment: the one clock of every training."""
    return time.perf_counter()


def _clocks() -> tuple[float, float]:
    return clock(), time.process_time()


class Sums:
    """Weighted sums of named values over micro-batches, kept on the device, for the means that a log row shows."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.rows: dict[str, Tensor] = {}  # name -> sum of weight * value, and sum of the weights: [2]

    def add(self, weight: Tensor | float = 1.0, **values: Tensor) -> None:
        """Add one micro-batch. If any of its values is not finite it is left out."""
        device = self.accelerator.device
        row = torch.stack([torch.as_tensor(v, device=device).detach().double() for v in (*values.values(), 1.0)])
        row = row * torch.as_tensor(weight, device=device).detach()  # [n + 1]
        row = torch.where(row.isfinite().all(), row, torch.zeros_like(row))
        for name, total in zip(values, row):
            self.rows[name] = torch.stack([total, row[-1]]) + self.rows.get(name, 0.0)

    def means(self) -> dict[str, float]:
        """Mean of each value since the last call, over all processes, which must all call it; NaN if none was finite.
        Waits for the device."""
        rows, self.rows = self.accelerator.reduce(self.rows, "sum"), {}
        return {name: float(total / weight) for name, (total, weight) in rows.items()}

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: the mean over the processes, so that each may take it up again as its own."""
        return self.accelerator.reduce(self.rows, "mean")

    def load(self, state: dict[str, Tensor]) -> None:
        self.rows = {name: row.to(self.accelerator.device) for name, row in state.items()}


class Loop:
    """The bookkeeping of one training: its clock, sums, guarded updates, cadence, checkpoints and its end.

    It never calls the script: batch, model, loss and step stand there. `total` and `step` count what the script counts
    (updates, or micro-batches). `saved` is a checkpoint that `save` wrote, whose weights the script has loaded itself.
    """

    PATIENCE = 20  # updates with a gradient that is not finite, in a row, that end a run

    def __init__(self, run: Run, model, optimizer, total: int, label="", saved=None, max_norm=1.0, params=None):
        self.run, self.accelerator, self.model, self.optimizer = run, run.accelerator, model, optimizer
        self.total, self.label, self.max_norm = total, label, max_norm
        self.params = [p for p in model.parameters() if p.requires_grad] if params is None else list(params)
        torchs = type(getattr(optimizer, "optimizer", optimizer)).__module__.startswith("torch.")
        self.fused = torchs and all(group.get("fused") for group in optimizer.param_groups)
        self.step = self.before = self.tokens = self.stopping = self.earlier_peak = 0
        self.skipped = torch.zeros(2, device=self.accelerator.device)  # updates skipped: in all, in a row
        self.sums = Sums(self.accelerator)
        self.add, self.means = self.sums.add, self.sums.means
        self.spent = self._restore(saved) if saved else [0.0, 0.0]  # wall and CPU seconds until the clock last stopped
        self.bar = run.progress(total, self.step, label)
        self.counted = self.tokens, self.spent[0]  # when `rate` was last asked
        self.since = _clocks()  # when the clock last started; None while it stands still

    def _restore(self, saved: dict) -> list[float]:
        """Take up what `save` put down; the wall and CPU seconds of training until then."""
        device, kept, scaler = self.accelerator.device, saved["loop"], self.accelerator.scaler
        rng = saved["rng_state"][self.accelerator.process_index]
        optimizer_state(self.model, self.optimizer, load=saved["optimizer_state_dict"])
        if scaler and saved["scaler_state_dict"]:
            scaler.load_state_dict(saved["scaler_state_dict"])
        self.step = self.before = saved["step"]
        self.tokens, self.earlier_peak, self.skipped = kept["tokens"], kept["peak"], kept["skipped"].to(device)
        self.sums.load(kept["sums"])
        torch.set_rng_state(rng["cpu"])
        if device.type == "cuda" and rng["cuda"] is not None:
            torch.cuda.set_rng_state(rng["cuda"])
        self.run.say(f"[Resume] {self.label}{': ' if self.label else ''}from step {self.step}")
        return kept["spent"]

    @contextlib.contextmanager
    def paused(self):
        """Around whatever is not training, such as evaluation and saving: the clock stands still."""
        running = self.since is not None
        self._stop_clock()
        yield
        if running:
            self.since = _clocks()

    def _stop_clock(self) -> None:
        if self.since is None:
            return
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)  # work that was only queued is training too
        before, self.spent, self.since = self.spent, self._spent(), None
        self.run.segment["train_seconds"] += self.spent[0] - before[0]

    def _spent(self) -> list[float]:
        if self.since is None:
            return self.spent
        return [done + now - then for done, now, then in zip(self.spent, _clocks(), self.since)]

    @property
    def seconds(self) -> float:
        """Wall time of training alone, over all segments."""
        return self._spent()[0]

    @property
    def cpu_seconds(self) -> float:
        return self._spent()[1]

    def rate(self) -> float:
        """Tokens per second of training since the last call."""
        tokens, seconds = self.counted
        self.counted = self.tokens, self.seconds
        return (self.tokens - tokens) / max(self.counted[1] - seconds, 1e-9)

    @property
    def last(self) -> bool:
        return self.step >= self.total

    def micro_batches(self, count: int):
        """0, 1, ..., count - 1. Under DDP the gradients are averaged over the processes with the last one alone."""
        for i in range(count):
            with self.accelerator.no_sync(self.model) if i < count - 1 else contextlib.nullcontext():
                yield i

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`; where it is not finite theirs are not either, whatever its formula makes of that."""
        self.accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))

    def update(self, tokens: int = 0, advance: int = 1) -> Tensor:
        """Clip, step the optimizer unless the gradient is not finite, clear the gradients; returns their norm before
        clipping. `tokens`: of all processes in this update. `advance`: what it adds to `step`.

        A fused optimizer skips the update by itself where its `found_inf` is 1, so that nothing waits for the device;
        in half precision the loss scaler does; for any other optimizer the norm is looked at here.
        """
        norm, scaler = self.accelerator.clip_grad_norm_(self.params, self.max_norm), self.accelerator.scaler
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        bad = (~torch.isfinite(norm)).float()
        if self.fused and scaler is None:
            self.optimizer.optimizer.found_inf = bad
        if self.fused or scaler or not bad:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped = torch.stack([self.skipped[0] + bad, (self.skipped[1] + 1) * bad])
        self.before, self.step, self.tokens = self.step, self.step + advance, self.tokens + tokens
        self.run.segment["updates"] += 1
        self.bar.update(advance)
        if self.due(self.PATIENCE) or self.last:
            self.nonfinite_steps()
        self.stopping = self.run.stop_requested()
        return norm

    def nonfinite_steps(self) -> int:
        """Updates skipped so far; Failure (diverged) after `PATIENCE` in a row. Waits for the device."""
        skipped, in_a_row = (int(n) for n in self.skipped)
        line = f"the gradient was not finite {in_a_row} times in a row, up to step {self.step}"
        require(in_a_row < self.PATIENCE, f"{line}: lower the learning rate or use --precision fp32", DIVERGED)
        return skipped

    def due(self, interval: int | None) -> bool:
        """Whether the last update reached or crossed a multiple of `interval`; never for 0 or None."""
        return bool(interval) and self.step // interval > self.before // interval

    def save(self, name: str, keep: int = 0, of: str = "", previous: str = "", **own) -> Path:
        """Write a checkpoint: `own` entries of the script and all that `saved` restores. All processes must call it.

        `keep`: remove all but so many of the files that match the pattern `of`. `previous`: the name that the file
        which this one replaces gets, if it verifies. Neither ever leaves the directory without a file that verifies.
        """
        from accelerate.utils import gather_object

        with self.paused():
            cuda = torch.cuda.get_rng_state() if self.accelerator.device.type == "cuda" else None
            scaler, log, path = self.accelerator.scaler, self.run.log_file, self.run.dir / name
            loop = {"total": self.total, "tokens": self.tokens, "spent": self.spent}
            loop |= {"peak": max(self.earlier_peak, peak_memory()), "sums": self.sums.state(), "skipped": self.skipped}
            state = own | {"step": self.step, "arm": self.label, "loop": loop, "manifest": self.run.manifest()}
            state["log_size"] = log.stat().st_size if log.exists() else 0
            state["optimizer_state_dict"] = optimizer_state(self.model, self.optimizer)
            state["scaler_state_dict"] = scaler.state_dict() if scaler else None
            state["rng_state"] = gather_object([{"cpu": torch.get_rng_state(), "cuda": cuda}])
            if self.run.main:
                save_checkpoint(path, state, self.run.dir / previous if previous else None)
                prune_checkpoints(self.run.dir.glob(of), keep) if keep else None
        return path

    def leave_if_stopped(self) -> None:
        """End the run, after a save, if SIGINT or SIGTERM asked for it; in its last step it goes on to the end."""
        if self.stopping and not self.last:
            where = f"interrupted at step {self.step}" + (f" of {self.label}" if self.label else "")
            raise Failure(f"{where}; continue with --resume auto", 128 + self.stopping)

    def end(self) -> dict:
        """Stop the clock for good. The figures of the whole training, over all segments and processes."""
        self._stop_clock()
        figures = {"steps": self.step, "tokens": self.tokens, "train_seconds": self.seconds}
        figures |= {"tokens_per_s": self.tokens / max(self.seconds, 1e-9), "nonfinite_steps": self.nonfinite_steps()}
        return figures | {"peak_mem_bytes": max(self.earlier_peak, peak_memory())}


# ----------------------------------------------------------------------------------------------------------- data
def reaches(url: str, timeout: float = 3.0) -> bool:
    """Whether the server of `url` takes a connection, or, where a proxy is set, whether that does."""
    where = urllib.parse.urlparse(urllib.request.getproxies().get("https") or url)
    with contextlib.suppress(OSError):
        socket.create_connection((where.hostname, where.port or 443), timeout).close()
        return True
    return False


def hub_ready() -> bool:
    """Whether the hub answers. If not, its libraries go offline: what is not cached fails at once, not in 30 s."""
    online = os.environ.get("HF_HUB_OFFLINE", "0") in ("0", "")
    if online and reaches(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
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
    """Prose of the Python standard library (docstrings and comments), real English on every machine; one module in ten
    is held out. Texts differ between Python versions: compare losses within one version only."""

    def collect() -> bytes:
        root, sides, seen = Path(os.__file__).parent, {"train": [], "validation": []}, set()
        for path in sorted(root.rglob("*.py")):
            name, source = path.relative_to(root).as_posix(), path.read_text(errors="ignore")
            if "test" in name or "site-packages" in name:
                continue
            passages = [body for _, body in re.findall(r"(\"\"\"|''')(.*?)\1", source, re.S)]
            passages += [re.sub(r"(?m)^[ \t]*#+", "", c) for c in re.findall(r"(?m)(?:^[ \t]*#.*\n)+", source)]
            parts = [" ".join(p.split()) + "\n" for text in passages for p in re.split(r"\n\s*\n", text)]
            fresh = [p for p in parts if p not in seen]
            seen.update(fresh)  # a paragraph that modules share belongs to the first, so to one side
            prose = [p for p in fresh if re.fullmatch(r"(?=(\S+ ){9})(?!.*>>>).*[.!?:]\n", p)]
            prose = [p for p in prose if sum(c.isalpha() or c == " " for c in p) > 0.85 * len(p)]
            sides["validation" if derived_seed(0, name) % 10 == 0 else "train"] += prose
        return json.dumps(sides).encode()

    return json.loads(cached(CACHE / f"stdlib-{sys.version.split()[0]}.json", collect))[split]


def synthetic_text(split: str, seed: int = 0) -> list[str]:
    """Seeded ASCII paragraphs of a small grammar. People and things persist within a paragraph, so context helps;
    in a fifth of them a sentence is repeated two to five times, so that repetition exists to be measured."""
    people = "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Katya Leon Mira Nils Olga Pavel".split()
    things = "lamp boat letter mirror garden clock violin map kettle ladder basket engine".split()
    verbs = "found carried repaired painted sold hid borrowed described".split()
    places = "by the harbour|at the station|in a small kitchen|near the old mill|on the north road".split("|")
    rng, lines = random.Random(derived_seed(seed, "synthetic", split)), []
    for _ in range(2000 if split == "train" else 200):
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
    alphabet = {"special_tokens": special, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **alphabet)
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
    except Exception as error:  # a damaged file raises many types
        raise Failure(f"tokenizer {name} did not load; instead: --tokenizer byte, local or a directory") from error


def encode(lines, tokenizer) -> np.ndarray:
    """Token ids of all non-blank `lines`, joined without separators; cached under the text and the tokenizer."""
    key = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for line in lines:
        key.update(line.encode())

    def tokenise() -> bytes:
        dtype, parts = np.uint16 if len(tokenizer) <= 65536 else np.uint32, []
        for start in range(0, len(lines), 1000):
            batch = [line for line in lines[start : start + 1000] if line.strip()]
            ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"] if batch else []
            parts += [np.asarray(i, dtype) for i in ids]
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(parts or [np.zeros(0, dtype)]))
        return buffer.getvalue()

    return np.load(io.BytesIO(cached(CACHE / "tokens" / f"{key.hexdigest()[:32]}.npy", tokenise)))


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


def ignore_signals(worker: int) -> None:
    """In a loader's process: a signal to the whole process group is the parent's to handle, which saves first."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def end_loaders() -> None:
    """At the end of the program: Python ends processes by SIGTERM, which these ignore, and would wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes the death of a loader's process for an error
    for process in multiprocessing.active_children():
        process.kill()


def batches(rows: np.ndarray, batch: int, seed: int, steps: range, accelerator, workers: int = 0):
    """Micro-batches [batch, T] int64 on the device, for `steps`. A step's global batch is `batch` rows for each
    process, cut by rank: N processes see together what one sees at N times the batch."""
    world, rank = accelerator.num_processes, accelerator.process_index
    order = (batch_indices(len(rows), batch * world, seed, step) for step in steps)
    loader = torch.utils.data.DataLoader(
        rows,
        batch_sampler=(ids[rank * batch : (rank + 1) * batch] for ids in order),
        collate_fn=lambda chosen: torch.from_numpy(np.stack(chosen).astype(np.int64)),
        num_workers=min(workers, os.cpu_count() or 1),
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_signals,
        generator=generator(seed, "loader"),  # else every new loader draws from the global stream, dropout's
    )
    return (rows_BT.to(accelerator.device, non_blocking=True) for rows_BT in loader)


def squad_rows(source: str, split: str = "train") -> list[dict]:
    """Rows {id, title, context, question, answers: [str]} of a SQuAD v1.1 JSON file, of a JSONL file with the fields
    context, question and answers, or of a hub set. Questions without an answer are dropped."""
    rows, read = [], 0
    try:
        if source.endswith(".jsonl"):
            flat = (json.loads(line) for line in read_text(source).split("\n") if line.strip())
        elif source.endswith(".json"):
            passages = [(a, p) for a in json.loads(read_text(source))["data"] for p in a["paragraphs"]]
            flat = (q | {"context": p["context"], "title": a.get("title", "")} for a, p in passages for q in p["qas"])
        else:
            flat = load_hub_dataset(source, None, split, "a local .json or .jsonl file in SQuAD form")
        for row in flat:
            answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
            if not isinstance(answers, list):
                raise TypeError("answers must be a list")
            answers = [a["text"] if isinstance(a, dict) else a for a in answers]
            "".join((row["context"], row["question"], *answers)).encode()  # all are text, of whole characters
            names = {"id": str(row.get("id", read)), "title": row.get("title", "")}
            if answers:
                rows.append(names | {"context": row["context"], "question": row["question"], "answers": answers})
            read += 1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        line = f"{source}: record {read + 1}: {type(error).__name__} {error}; expected SQuAD v1.1"
        raise Failure(line) from error
    require(rows, f"{source}: no answerable question")
    return rows


# ------------------------------------------------------------------------------------------- data: generated questions
ENTITIES = (
    "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Katya Leon Mira Nils Olga Pavel Rosa Selim Tilda "
    "Uwe Vera Wim Xenia Yusuf"
).split()
RELATIONS = "house boat garden coat".split()
COLOURS = (  # the first word of a value
    "amber azure beige black blue bronze brown copper coral cream gold green grey indigo ivory lilac olive "
    "orange pink purple red silver white yellow"
).split()
MATERIALS = (  # its second, if it has one
    "brick canvas cedar clay cotton felt flint glass granite hemp iron leather linen marble oak paper pine "
    "plaster sand silk slate steel stone wool"
).split()


def draw_facts(pick: Callable[[int], int], count: int) -> dict[tuple[str, str], str]:
    """{(relation, entity): value} for `count` pairs of some relations and entities (of 2 by 2 up to four facts, 4 by 4
    for sixteen, 4 by 8 for thirty-two), in random order. A value has one or two words. No two are equal; up to 24 facts
    no two share the first word, beyond that two may ("red", "red brick"). `pick(n)` draws from range(n)."""

    def some(items, count):  # drawn without replacement
        items = list(items)
        return [items.pop(pick(len(items))) for _ in range(count)]

    relations = min(max(2, math.isqrt(count)), len(RELATIONS))
    entities = some(ENTITIES, max(2, math.ceil(count / relations)))
    pairs = some([(relation, entity) for relation in some(RELATIONS, relations) for entity in entities], count)
    values = []
    for first in some(COLOURS * math.ceil(count / len(COLOURS)), count):
        while (value := first if pick(2) else f"{first} {MATERIALS[pick(len(MATERIALS))]}") in values:
            continue
        values.append(value)
    return dict(zip(pairs, values))


def context_of(facts: dict) -> str:
    return " ".join(f"The {r} of {e} is {v} ." for (r, e), v in facts.items())


def question_of(key: tuple[str, str]) -> str:
    return f"What is the {key[0]} of {key[1]} ?"


def question_rows(count: int, seed: int, purpose: str, exclude: Set = frozenset(), facts=4, questions=1) -> list[dict]:
    """Rows {id, context, question, answers}: of each of `count` fresh contexts, none in `exclude`, that many different
    questions, one after the other."""
    rng, rows, used = random.Random(derived_seed(seed, "reader", purpose)), [], set(exclude)
    while len(rows) < count * questions:
        stated = draw_facts(rng.randrange, facts)
        keys, context = rng.sample(list(stated), questions), context_of(stated)
        if context not in used:
            used.add(context)
            for key in keys:
                row = {"id": f"{purpose}-{len(rows)}", "context": context}
                rows.append(row | {"question": question_of(key), "answers": [stated[key]]})
    return rows


# -------------------------------------------------------------------------------------------------- data: backbones
def load_backbone(name: str, dtype=torch.float32, four_bit: bool = False, double_quant: bool = False, **kwargs):
    """(model, tokenizer) of a hub id, a local Hugging Face directory, or `tiny`: a two-layer Llama with random weights
    and the byte tokenizer; `four_bit`: its matrices in NF4. A hub that cannot be reached fails within seconds, and so
    does a directory that is damaged or lacks a tensor; nothing is substituted."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    if four_bit:
        require(importlib.util.find_spec("bitsandbytes"), "4 bits need bitsandbytes: pip install it, or drop the flag")
        require(name != "tiny", "tiny has no 4-bit form: name a model, or drop the flag")
    if name == "tiny":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 259}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(0, "tiny"))
            return LlamaForCausalLM(config).to(dtype).eval(), train_tokenizer([])
    local = Path(name).is_dir()
    require(local or not name.startswith((".", "/", "~")), f"model {name}: no such directory")
    if four_bit:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant, "bnb_4bit_compute_dtype": dtype}
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    reachable = local or hub_ready()
    instead = "instead: tiny, a local model directory, or one from pretrain_backbone.py"
    try:
        kwargs |= {"dtype": dtype, "local_files_only": local, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except Exception as error:  # a damaged directory raises many types
        why = (str(error).splitlines() or [type(error).__name__])[0][:120] if reachable else "the hub cannot be reached"
        raise Failure(f"model {name}: {why}; {instead}") from error
    absent = ", ".join(sorted(info["missing_keys"])[:3])
    require(not absent, f"model {name}: its files lack {absent}, which would stay random; {instead}")
    tokenizer, rows = load_tokenizer(name), model.get_input_embeddings().weight.shape[0]
    require(len(tokenizer) <= rows, f"model {name}: its tokenizer has {len(tokenizer)} entries, its embedding {rows}")
    return model.eval(), tokenizer


# -------------------------------------------------------------------------------------------------------- metrics
LOSS_CHUNK = 2**25  # logits that the loss holds at a time: 128 MB in fp32


class _HeadLoss(torch.autograd.Function):
    """Both gradients are taken while a chunk's logits are there, so no logits are kept and none computed twice."""

    @staticmethod
    def forward(ctx, hidden, weight, target, weights, rows, learn):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        ce, right = hidden.new_zeros(len(hidden), dtype=wide), torch.zeros_like(target, dtype=torch.bool)
        top = weights.max().clamp(min=1e-30) if len(weights) else weights.new_ones(())
        with torch.autocast(kind, enabled=False):
            w = weight.to(dtype)
            grads = [torch.zeros_like(x, dtype=wide) for x in (hidden, weight)] if learn else []
            room = w.new_empty(min(rows, len(hidden)), len(w))  # one: taking and giving back memory costs time
            for i in range(0, len(hidden), rows):
                part = slice(i, i + rows)
                h, y = hidden[part].to(dtype), target[part]
                logits = torch.mm(h, w.T, out=room[: len(h)]).to(wide)  # rows V
                high, best = logits.max(-1, keepdim=True)  # rows 1
                index, right[part] = y.clamp(min=0)[:, None], best.squeeze(1) == y
                own = logits.gather(1, index)
                total = logits.sub_(high).exp_().sum(-1, keepdim=True)  # one exponential for the loss and its gradient
                ce[part] = (total.log() + high - own).squeeze(1) * (y >= 0)
                if learn:  # weights over their maximum: nothing underflows in half precision
                    share = (weights[part] / top * (y >= 0))[:, None].to(wide)
                    slope = logits.mul_(share / total).scatter_add_(1, index, -share).to(dtype)
                    grads[0][part] = slope @ w
                    grads[1] += slope.T @ h
        ctx.save_for_backward(top, *grads)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(ce, right)
        return (ce * weights).sum(), ce, right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        top, *grads = ctx.saved_tensors
        hidden, weight = ((g * (scale * top)).to(dtype) for g, dtype in zip(grads, ctx.dtypes))
        return hidden, weight, None, None, None, None


def head_loss(hidden: Tensor, weight: Tensor, target: Tensor, weights: Tensor | None = None, rows: int = 0) -> tuple:
    """(sum of weights * CE, CE [M] in nats, whether the top choice is right [M]) of the LM head `weight` [V, D] on
    hidden [M, D], at most `rows` x V logits at a time. A target [M] below 0 is not scored. weights: default, a mean."""
    if weights is None:
        scored = (target >= 0).float()
        weights = scored / scored.sum().clamp(min=1)
    rows = rows or max(1, LOSS_CHUNK // len(weight))
    return _HeadLoss.apply(hidden, weight, target, weights, rows, torch.is_grad_enabled())


def next_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of the LM head `weight` [V, D] on `hidden` [B, T, D], never holding all logits: position t
    against labels[:, t + 1], the only shift there is. A label of -100 is not scored."""
    x, y = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # [B*(T-1), D], [B*(T-1)]
    scored = (y != -100).sum().clamp(min=1)
    if hasattr(F, "linear_cross_entropy") and torch.is_grad_enabled():
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        kind = "sum" if x.dtype == torch.float32 else "none"  # in half precision the sum itself would be rounded
        chunk = {"batch_chunk_size": max(1, LOSS_CHUNK // len(weight)), "chunking_method": None}
        options = nn.LinearCrossEntropyOptions(acc_policy="accurate", **chunk)
        total = F.linear_cross_entropy(x, weight, y, reduction=kind, ignore_index=-100, options=options).float().sum()
    else:  # evaluation, and older torch
        total = head_loss(x, weight, y, torch.ones_like(y, dtype=torch.float32))[0]
    return total / scored if reduction == "mean" else total


def perplexity(loss: float) -> float:
    """exp of a loss in nats, capped at exp(20) so that a diverged run still writes valid JSON."""
    return math.exp(min(loss, 20.0))


def ngram_floors(train: np.ndarray, rows: np.ndarray, vocab: int) -> dict[str, float]:
    """{unigram, bigram, trigram}: nats per token that tables counted on `train` [N, T] give on positions 1 to T - 1 of
    `rows` [M, T], each knowing its row alone. Interpolated Witten-Bell (Chen and Goodman 1999, section 2.4):

        P(w | h) = (c(h w) + distinct(h) P(w | shorter h)) / (c(h) + distinct(h)), below the unigram 1 / V
    """

    def grams(ids, n):  # each token and the n before it in its row, as one number: [., T - n]
        parts = [ids[:, i : ids.shape[1] - n + i].astype(np.int64) * vocab ** (n - i) for i in range(n + 1)]
        return sum(parts)

    def lookup(keys, values, asked):
        at = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
        return np.where(keys[at] == asked, values[at], 0)

    p, floors = np.full((len(rows), rows.shape[1] - 1), 1 / vocab), {}  # M T-1
    for n, name in enumerate(("unigram", "bigram", "trigram")):
        first = max(n, 1)  # the first position that has n tokens before it; those before keep the shorter history
        asked = grams(rows, n)[:, first - n :]  # M T-first
        seen, counts = np.unique(grams(train, n), return_counts=True)
        if seen.size and asked.size:
            histories, begin, distinct = np.unique(seen // vocab, return_index=True, return_counts=True)
            totals, types = (lookup(histories, x, asked // vocab) for x in (np.add.reduceat(counts, begin), distinct))
            mixed = (lookup(seen, counts, asked) + types * p[:, first - 1 :]) / np.maximum(totals + types, 1)
            p[:, first - 1 :] = np.where(totals > 0, mixed, p[:, first - 1 :])
        floors[name] = float(-np.log(p).mean())
    return floors


def mean_interval(values) -> dict:
    """{mean, lo, hi, n}: 95 % Student-t interval over independent runs; a single run has none (lo = hi = mean)."""
    quantiles = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # by degrees of freedom
    n, mean, sd = len(values), float(np.mean(values)), float(np.std(values, ddof=min(1, len(values) - 1)))
    half = (quantiles[n - 1] if n <= len(quantiles) else 1.96 + 2.8 / (n - 1)) * sd / math.sqrt(n)
    return {"mean": mean, "lo": mean - half, "hi": mean + half, "n": n}


def bootstrap(values, resamples: int = 10000, seed: int = 0, clusters=None) -> dict:
    """{mean, lo, hi, n}: 95 % percentile-bootstrap interval over prompts, batches or paired differences. `clusters`:
    of each value the context, item or document that it comes from; these are drawn then, whole, and n counts them."""
    values = np.asarray(values, float)
    of = np.unique(np.arange(len(values)) if clusters is None else clusters, return_inverse=True)[1]
    total, count = np.bincount(of, values), np.bincount(of)  # of each cluster
    draws = np.random.default_rng(seed).integers(0, len(count), (resamples, len(count)))
    lo, hi = np.percentile(total[draws].sum(1) / count[draws].sum(1), (2.5, 97.5))
    return {"mean": float(np.mean(values)), "lo": float(lo), "hi": float(hi), "n": len(count)}


def wilson(successes: int, n: int) -> dict:
    """{mean, lo, hi, n}: a rate and its 95 % Wilson score interval."""
    z, p = 1.959964, successes / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    lo, hi = ((p + z * z / (2 * n) + side * half) / (1 + z * z / n) for side in (-1, 1))
    return {"mean": p, "lo": max(0.0, lo), "hi": min(1.0, hi), "n": n}  # rounding steps over 0 and 1


def distinct_n(ids: list, n: int) -> float:
    """Unique n-grams over n-grams, 0 for fewer than n tokens. rep-n is 1 - distinct-n."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def squad_scores(prediction: str, references: list[str]) -> tuple[float, float]:
    """Official SQuAD v1.1 exact match and F1 (multiset overlap), each the maximum over the references. Where nothing is
    left of both texts they match, and F1 is 0, as in the official script."""

    def words(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def f1(said, gold):
        common = sum((Counter(said) & Counter(gold)).values())
        return 2 * common / max(1, len(said) + len(gold))

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
