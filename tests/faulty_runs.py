"""The training scripts as the fault suite runs them: what it starts, how it strikes, how it judges what is left.

Every run is the script itself (its `__main__`) in a forked child: the libraries are imported once, in the parent, which
never trains. A fault that must strike inside a run is a patch of core, torch or the operating system in that child.
"""

import builtins
import contextlib
import errno
import hashlib
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}

import torch  # noqa: E402

import core  # noqa: E402

LIMIT = 120  # seconds after which a run that does not end counts as hanging


class Script(NamedTuple):
    """A training script and the flags of a run of 12 to 24 small updates that saves at (nearly) each of them."""

    file: str
    directory: str  # flag of the run directory
    flags: str
    checkpoints: str  # pattern of the files that --resume auto chooses from
    result: str
    changed: str  # a flag that a resumed run must not see changed
    dtype: str  # the same for the precision
    weights: tuple  # (flag that reads a file of weights, such a file, the entry that holds its tensors)
    data: tuple  # (flags that read the file or folder {}, its name)
    hub: str  # flags that need the hub
    vocabulary: str = ""  # flags under which the tokenizer is larger than the model
    base: str = ""  # flags that read the Hugging Face directory {}: a model, or a tokenizer alone
    unnamed: bool = False  # whether a run directory without a name is one that the script names
    long: str = "--max_steps 40"  # enough updates to use up the budget of skipped ones
    package: str = ""  # flags that need bitsandbytes
    inside: str = ""  # the run's own folder in the run directory
    workers: str = ""  # flags of loader processes
    caches: bool = False  # whether the tokens of a text are kept in the cache


SCRIPTS = {
    s.file: s
    for s in (
        Script(
            "phase_a_validation",
            "--output_dir",
            "--max_steps 12 --grad_accum 1 --save_interval 1 --eval_interval 6 "
            "--log_interval 1 --eval_batches 1 --batch_size 2 --seq_len 32",
            "*_step_*.pt",
            "phase_a_results.json",
            "--lr 0.5",
            "--precision bf16",
            ("--resume", "cf_hot_step_11.pt", "model_state_dict"),
            ("--data text --data_path {}", "text.txt"),
            "--data wikitext2",
            base="--tokenizer {}",
            long="--max_steps 40 --no_baseline",
            workers="--num_workers 2",
            caches=True,
        ),
        Script(
            "phase_b_8b_adapters",
            "--output_dir",
            "--model_path tiny --lora_reference --max_steps 12 --grad_accum 1 "
            "--batch_size 2 --seq_len 32 --save_interval 1 --eval_interval 12 --log_interval 1 --eval_windows 2 "
            "--no_eval",
            "*_step_*.pt",
            "phase_b_results.json",
            "--lr 0.5",
            "--precision bf16",
            ("--adapter", "cf_adapter_final.pt", "adapter_state_dict"),
            ("--data text --data_path {}", "text.txt"),
            "--model_path example/model",
            "--model_path {model}",
            base="--model_path {}",
            package="--load_in_4bit on",
        ),
        Script(
            "pretrain_backbone",
            "--output_dir",
            "--kind reader --max_steps 24 --batch_size 4 --eval_items 8 "
            "--save_interval 1 --eval_interval 24 --log_interval 1",
            "backbone_step_*.pt",
            "backbone_results.json",
            "--lr 0.5",
            "--precision bf16",
            ("--resume", "backbone_step_24.pt", "model"),
            ("--kind lm --data text --data_path {}", "text.txt"),
            "--kind lm --data wikitext2",
            base="--kind lm --tokenizer {}",
            unnamed=True,
            caches=True,
        ),
        Script(
            "afrb_train",
            "--save",
            "--task needle --enable-pvm --steps 24 --val-every 1 --log-every 1 --eval-items 2",
            "checkpoint_*.pt",
            "metrics.json",
            "--lr 0.5",
            "--dtype bf16",
            ("--resume", "checkpoint_last.pt", "afrb_adapters"),
            ("--task language --seq 32 --data text --data-path {}", "text.txt"),
            "--model example/model",
            "--task language --seq 32 --model {model}",
            base="--model {}",
            long="--steps 40",
            workers="--num-workers 2",
            caches=True,
        ),
        Script(
            "latentwire_stage1",
            "--save_dir",
            "--mode phase1a --samples 16 --batch_size 4 --epochs 6 --eval_every 6 "
            "--save_every 1 --eval_samples 4 --quick_eval_every 100 --max_new_tokens 2",
            "last*.pt",
            "summary.json",
            "--adapter_lr 0.5",
            "--dtype bf16",
            ("--ckpt_in", "adapter_phase1_best.pt", "adapter"),
            ("--train_file {}", "rows.jsonl"),
            "--model_id example/model",
            "--model_id {model} --dataset synthetic",
            base="--model_id {} --dataset synthetic",
            unnamed=True,
            long="--epochs 10",
            package="--load_4bit",
        ),
        Script(
            "latentwire_train",
            "--out_dir",
            "--samples 16 --batch_size 4 --epochs 6 --save_every 1 --eval_every 99 --eval_samples 2 "
            "--questions_per_context 1 --max_new_tokens 2 --d_z 16",
            "last*.pt",
            "wire_results.json",
            "--lr 0.5",
            "--dtype bf16",
            ("--ckpt_in", "wire.pt", "sender"),
            ("--train_file {}", "rows.jsonl"),
            "--llama_id example/model",
            "--llama_id {model} --dataset synthetic",
            base="--llama_id {} --dataset synthetic",
            unnamed=True,
            long="--epochs 10",
        ),
        Script(
            "train_phase1_cognate",
            "--checkpoint_dir",
            "--model reasoning --epochs 3 --datasets synth_add --synth_rows "
            "16 --batch_size 2 --grad_accum 1 --max_length 64 --log_every 1 --save_every 1 --early_stop_patience 0",
            "*.pt",
            "cognate_results.json",
            "--lr 0.5",
            "--precision bf16",
            ("--resume", "last.pt", "model_state_dict"),
            ("--datasets gsm8k --data_dir {folder}", "gsm8k.jsonl"),
            "--datasets gsm8k",
            "--vocab_size 100",
            base="--tokenizer {}",
            long="--epochs 8",
            inside="reasoning",
        ),
        Script(
            "hst_train",
            "--save_dir",
            "--variant v4_unified --d_model 32 --n_layers 2 --n_heads 2 --max_steps 24 "
            "--save_every 3 --log_every 1 --eval_every 12 --eval_rows 2 --batch_size 2 "
            "--self_check False",
            "*_step_*.pt",
            "hst_results.json",
            "--lr 0.5",
            "--precision bf16",
            ("--resume", "ckpt_step_24.pt", "model"),
            ("--data {}", "text.txt"),
            "--data= --tokenizer byte",
            "--data {text} --vocab_size 100",
            base="--data {text} --tokenizer {}",
            unnamed=True,
            package="--optim adamw8bit",
            caches=True,
        ),
    )
}


# ------------------------------------------------------------------------------------------------ running a script
class Ended(NamedTuple):
    code: int
    out: str
    err: str


def become(script: Script, words: list[str], directory: Path, inject=None) -> None:
    """In a forked child: be the script, with its output in DIRECTORY.out and DIRECTORY.err. Returns if it ended well,
    else ends the child with its exit code."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(f"{directory}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, number)
        sys.stdout = open(1, "w", closefd=False)  # not a test's captured ones
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")
        if inject:
            inject()
        path = ROOT / f"{script.file}.py"
        sys.argv = [str(path), *words]
        runpy.run_path(str(path), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if code:
        os._exit(code)


def fork(directory: Path) -> int:
    """Fork, with the outputs of an earlier run in the directory out of the way."""
    for name in ("out", "err"):
        Path(f"{directory}.{name}").unlink(missing_ok=True)
    sys.stdout.flush()
    return os.fork()


def explicit(script: Script) -> list[str]:
    """What --test sets, as flags that a person could give: a run that is no test run, of the same sizes."""
    return [f"--{name}={value}" for name, value in importlib.import_module(script.file).TEST.items()]


def begin(script: Script, directory: Path, flags="", inject=None, test=True, own_group=False) -> int:
    """Start the script in a forked child, in --test sizes, after calling `inject()` there; returns its pid. Later
    flags win; `flags` may be a list, of words that hold blanks. `own_group`: in a process group of its own."""
    sizes = ["--test"] if test else explicit(script)
    more = flags.split() if isinstance(flags, str) else flags
    words = [*sizes, *script.flags.split(), script.directory, str(directory), *more]
    pid = fork(directory)
    if pid == 0:
        if own_group:
            os.setpgid(0, 0)
        try:
            become(script, words, directory, inject)
        finally:  # nothing of the parent's is cleared up here
            os._exit(0)
    return pid


def end(pid: int, directory: Path) -> Ended:
    """Wait for a run. One that hangs is killed: its exit code is then -9."""
    deadline = time.monotonic() + LIMIT
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            own_group = os.getpgid(pid) == pid
            (os.killpg if own_group else os.kill)(pid, signal.SIGKILL)
        time.sleep(0.005)
    outputs = (Path(f"{directory}.{name}") for name in ("out", "err"))
    texts = [path.read_text(errors="replace") if path.exists() else "" for path in outputs]
    return Ended(os.waitstatus_to_exitcode(status), *texts)


def run(script: Script, directory: Path, flags="", inject=None, **how) -> Ended:
    return end(begin(script, directory, flags, inject, **how), directory)


def run_two(script: Script, directory: Path, flags: str = "", inject=None) -> Ended:
    """The script in two processes on the CPU, under the agent of torchrun; `inject(rank)` is called in each. The two
    are forked as well, so that they need not import everything again."""
    words = ["--test", *script.flags.split(), script.directory, str(directory), *flags.split()]
    pid = fork(directory)
    if pid == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            launch(script, words, directory, inject)
            code = 0
        except BaseException:  # torchrun prints what its agent raises, and ends with 1
            with open(f"{directory}.err", "a") as file:
                traceback.print_exc(file=file)
        os._exit(code)
    return end(pid, directory)


def launch(script: Script, words: list[str], directory: Path, inject) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def rank() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in an interpreter that torchrun has started
        become(script, words, directory, (lambda: inject(int(os.environ["RANK"]))) if inject else None)

    own = {"run_id": str(os.getpid()), "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=0, monitor_interval=0.05, start_method="fork", **own
    )
    elastic_launch(config, rank)()


# ----------------------------------------------------------------------------------------------- striking inside a run
def at_update(number: int, act, following: bool = False):
    """An injection: call `act(parameters)` before the gradients of update `number` are clipped (`following`: and in
    every later one)."""

    def inject():
        clip, calls = torch.nn.utils.clip_grad_norm_, []

        def clipped(parameters, *args, **kwargs):
            parameters = list(parameters)
            calls.append(1)
            if len(calls) == number or (following and len(calls) > number):
                act(parameters)
            return clip(parameters, *args, **kwargs)

        torch.nn.utils.clip_grad_norm_ = clipped

    return inject


def at_save(number: int, act, after=lambda: None):
    """An injection: call `act(path, state)` before training checkpoint `number` is written, and `after()` after it."""

    def inject():
        save, calls = core.save_checkpoint, []

        def saving(path, state, *args, **kwargs):
            calls.extend([1] * ("optimizer_state_dict" in state))
            if len(calls) != number:
                return save(path, state, *args, **kwargs)
            calls.append(1)  # once
            act(path, state)
            save(path, state, *args, **kwargs)
            return after()

        core.save_checkpoint = saving

    return inject


def send(signum: int):
    return lambda *_: signal.raise_signal(signum)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Watched:
    """A file being written, whose `write` calls `act(bytes written so far)` first."""

    def __init__(self, file, act):
        self.file, self.act, self.written = file, act, 0

    def write(self, data):
        self.written += self.file.write(data)
        self.act(self.written)
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return self.file.__exit__(*exception)

    def __iter__(self):
        return iter(self.file)


def watch_writes(within: Path, act) -> None:
    """From now on `act(path, bytes written)` sees every write to a file that is opened in the directory `within`."""
    opened, within = builtins.open, within.resolve()

    def watching(file, mode="r", *args, **kwargs):
        handle = opened(file, mode, *args, **kwargs)
        if not isinstance(file, str | os.PathLike) or "b" not in mode or set("wax+").isdisjoint(mode):
            return handle
        path = Path(file).resolve()
        return Watched(handle, lambda count: act(path, count)) if within in path.parents else handle

    builtins.open = watching


def kill_half_way(within: Path, size: int) -> None:
    """Die when half of the next file of about `size` bytes has been written."""

    def act(path, count):
        if count > size // 2:
            kill()

    watch_writes(within, act)


def kill_at_rename(power_lost: bool) -> None:
    """Die just before the next file that is written from now on gets its name (another that it replaces may have got a
    new one already); or just after that by a loss of power: what was not flushed to the disk before is gone."""
    rename, sync, flushed = os.replace, os.fsync, {}
    # the clock of a file's times moves in ticks: a file written within one would look older than a finer clock's moment
    began = time.clock_gettime_ns(5) if sys.platform == "linux" else time.time_ns()  # 5: CLOCK_REALTIME_COARSE

    def synced(handle):
        sync(handle)
        status = os.fstat(handle if isinstance(handle, int) else handle.fileno())
        flushed[status.st_ino] = status.st_size

    def renamed(source, target, *args, **kwargs):
        status = os.stat(source)
        new = status.st_mtime_ns >= began
        if new and not power_lost:
            kill()
        rename(source, target, *args, **kwargs)
        if new:
            if flushed.get(status.st_ino) != status.st_size:
                os.truncate(target, 0)
            kill()

    os.replace, os.fsync = renamed, synced


MOMENTS = {
    "half written": kill_half_way,
    "before its name": lambda within, size: kill_at_rename(power_lost=False),
    "power lost after the rename": lambda within, size: kill_at_rename(power_lost=True),
}


def kill_in_save(number: int, moment: str, notes: Path):
    """An injection: die at `moment` of training checkpoint `number`. `notes` then says what was there before it."""

    def act(path, state):
        good = {k: v for k, v in contents(path.parent).items() if step_of(path.parent / k) is not None}
        notes.write_text(json.dumps({"step": int(state["step"]), "good": good, "all": contents(path.parent)}))
        MOMENTS[moment](path.parent, max((p.stat().st_size for p in path.parent.glob("*.pt")), default=10**5))

    return at_save(number, act, after=lambda: os._exit(SURVIVED))


SURVIVED = 77  # exit code of a run that was to be killed in a save and was not


def fail_writes(code: int, where: str, within: Path) -> None:
    """From now on opening, writing or flushing a file in a directory fails as a broken disk does."""
    error = OSError(code, os.strerror(code))
    if where == "flush":

        def flushing(handle):
            raise error

        os.fsync = flushing
        return
    opened = builtins.open

    def act(path, count):
        raise error

    def opening(file, mode="r", *args, **kwargs):
        inside = isinstance(file, str | os.PathLike) and within.resolve() in Path(file).resolve().parents
        if inside and not set("wax+").isdisjoint(mode):
            raise error
        return opened(file, mode, *args, **kwargs)

    if where == "write":
        watch_writes(within, act)
    else:
        builtins.open = opening


# -------------------------------------------------------------------------------------------------------- judging
def wrong(ended: Ended, code: int, *words: str) -> str:
    """Empty if a run ended with exit code `code`, without a traceback, one line on standard error if it failed as it
    should, and all of `words` (regular expressions) in what it printed; else what is wrong."""
    lines = [x for x in ended.err.splitlines() if re.match(r"\w+\.py: ", x)]
    if ended.code != code:
        return f"exit {ended.code} instead of {code}: {' '.join((ended.err or ended.out).splitlines()[-1:])[:160]}"
    if "Traceback" in ended.err or len(lines) != (code != 0):
        return f"{len(lines)} lines for exit {code}: {ended.err[-160:]}"
    absent = [w for w in words if not re.search(w, ended.out + ended.err)]
    return f"does not say {absent}: {(lines or ended.out.splitlines())[-1:]}" if absent else ""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(directory: Path) -> dict[str, str]:
    """Hash of every checkpoint in a directory, of hidden temporary ones too."""
    return {p.name: digest(p) for p in directory.iterdir() if p.is_file() and ".pt" in p.name}


def snapshot(directory: Path) -> dict[str, str]:
    """Hash of every file below a directory; the lock and who holds it aside."""
    paths = [p for p in directory.rglob("*") if p.is_file() and p.name not in (".lock", ".holder")]
    return {str(p.relative_to(directory)): digest(p) for p in paths}


def changed(before: dict, after: dict) -> str:
    """Empty if two snapshots are equal, else the names that differ."""
    names = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    return f"changed, new or gone: {', '.join(names)[:160]}" if names else ""


NOISE = re.compile(
    r"time|_share$|seconds|_sec$|wall|per_s|mem|environment|config|clock|args|command|size|_ms|speed|note|manifest|spent|peak"
)


def quiet(value):
    """`value` without entries that differ between equal runs: times, memory, directories."""
    if isinstance(value, dict):
        size = value.get("id") == "checkpoint_saved"  # in bytes: the file holds the directory's name
        return {k: quiet(v) for k, v in value.items() if not (NOISE.search(str(k)) or (size and k == "value"))}
    return [quiet(v) for v in value] if isinstance(value, list | tuple) else value


def equal(a, b) -> str:
    """Empty if two nested values are bit-equal, else where they first differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{sorted(map(str, a.keys() ^ b.keys()))}"
        return next((f"{k}: {text}" for k in a if (text := equal(a[k], b[k]))), "")
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{len(a)} entries, not {len(b)}"
        return next((f"{i}: {text}" for i, (x, y) in enumerate(zip(a, b)) if (text := equal(x, y))), "")
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)
    return "" if same else "values differ"


def saved(script: Script, directory: Path) -> list[Path]:
    """Checkpoints to resume from, the newest first."""
    paths = (directory / script.inside).glob(script.checkpoints)
    return sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True)


def outcome(script: Script, directory: Path) -> dict:
    """What equal runs have in common: log rows, result, last checkpoint."""
    home = directory / script.inside
    rows = (home / "log.jsonl").read_text().splitlines()
    newest = next(path for path in core.newest_first(saved(script, directory)) if step_of(path) is not None)
    return {
        "log": [quiet(json.loads(row)) for row in rows],
        "result": quiet(json.loads((home / script.result).read_text())),
        "checkpoint": quiet(core.load_checkpoint(newest)),
    }


def differs(script: Script, directory: Path, whole: Path) -> str:
    """Empty if the run in `directory` ended bit-equal to the undisturbed one in `whole`, else where they differ."""
    return equal(outcome(script, directory), outcome(script, whole))


def lost(directory: Path, before: dict) -> str:
    """Empty if a save that was broken off has done no harm: what verified before it is still there, by content, unless
    the new checkpoint is complete; and no file bears a checkpoint's name that is half of one."""
    now = contents(directory)
    steps = {name: step_of(directory / name) for name in now}
    new = before["step"] in steps.values()
    gone = [name for name, content in before["good"].items() if content not in now.values()]
    if gone and not new:
        return f"lost before the new checkpoint was complete: {gone}"
    known = before["all"].values()
    half = [
        name
        for name, content in now.items()
        if not name.startswith(".") and content not in known and steps[name] is None
    ]
    return f"half written: {half}" if half else ""


def step_of(path: Path) -> int | None:
    """The step of a checkpoint that loads, -1 for one without; None for a file that does not load."""
    try:
        return int(core.load_checkpoint(path).get("step", -1))
    except core.Failure:
        return None


class Scene:
    """What the faults of one script share: a folder, a finished run, and one that was stopped near its end."""

    def __init__(self, script: Script, folder: Path, shared: Path):
        self.script, self.folder, self.shared, self.count = script, folder, shared, 0
        self.whole, self.stopped = folder / "whole", folder / "stopped"
        if text := wrong(run(script, self.whole), 0):
            raise SystemExit(f"{script.file} does not run undisturbed: {text}")
        if text := wrong(run(script, self.stopped, inject=at_update(20, send(signal.SIGTERM))), 143):
            raise SystemExit(f"{script.file} does not stop: {text}")

    def fresh(self, like: Path | None = None) -> Path:
        """A new run directory, empty or a copy of `like`."""
        self.count += 1
        path = self.folder / f"try{self.count}"
        return Path(shutil.copytree(like, path)) if like else path

    def home(self, directory: Path) -> Path:
        """Where the script writes, in its run directory."""
        return directory / self.script.inside

    def resumes(self, directory: Path, *words: str, flags: str = "") -> str:
        """Empty if --resume auto completes the run in `directory` bit-equally to the undisturbed one, and leaves no
        temporary file behind."""
        text = wrong(run(self.script, directory, f"--resume auto {flags}"), 0, *words)
        text = text or differs(self.script, directory, self.whole)
        expected, found = ({p.name for p in self.home(d).iterdir()} for d in (self.whole, directory))
        extra = sorted(name for name in found - expected if is_temporary(name))
        absent = sorted(name for name in expected - found if not is_temporary(name))
        text = text or (f"temporary files remain: {extra}" if extra else "")
        return text or (f"files that such a run leaves are not there: {absent}" if absent else "")

    def refuses(self, directory: Path, code: int, *words: str, flags="", **how) -> str:
        """Empty if a run with `flags` is refused in one line and changes no file of the directory."""
        before = snapshot(directory)
        ended = run(self.script, directory, flags, **how)
        return wrong(ended, code, *words) or changed(before, snapshot(directory))

    def text(self, name: str = "text.txt", rows: int = 200) -> Path:
        path = self.folder / name
        row = "Ada found the lamp by the harbour, and Boris carried the old map to the station at night. " * 2
        path.write_text(f"{row}\n" * rows)
        return path

    @contextlib.contextmanager
    def disk(self, size: int, options: str = ""):
        """A small disk of its own; None where this user may not mount one."""
        self.count += 1
        path = self.folder / f"disk{self.count}"
        path.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(path)]
        mounted = shutil.which("mount") and subprocess.run(words, capture_output=True).returncode == 0
        try:
            yield path if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", str(path)], check=True)


def is_temporary(name: str) -> bool:
    return name.endswith(".tmp") or (name.startswith(".") and name not in (".lock", ".holder"))


def fill(disk: Path, leave: int) -> None:
    """Fill a small disk up to its last `leave` bytes."""
    free = os.statvfs(disk)
    with contextlib.suppress(OSError), open(disk / "ballast", "ab") as file:
        for _ in range(max(0, free.f_bavail * free.f_frsize - leave) // 4096 + (leave == 0)):
            file.write(b"x" * 4096)


FULL = {"read-only": (errno.EROFS, "open"), "quota": (errno.EDQUOT, "write"), "broken": (errno.EIO, "flush")}
