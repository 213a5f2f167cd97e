"""Fault suite: breaks every training script on purpose and counts how often it withstands that.

    python tests/faults.py                                     every fault on every script
    python tests/faults.py --script hst_train --fault sigterm  one of each
    python tests/faults.py --out docs/results/faults/faults.json --readme README.md

A try passes if the run ends with the documented exit code and one line that says what to do, leaves a checkpoint that
loads, and, where it goes on, ends bit-equal to a run that was never disturbed (result, log rows, last checkpoint). The
table has a row for each fault and a column for each script: passed/tried, or a dash where the fault does not apply.
Exit code 1 if anything was not withstood.

Every run is the script itself (its `__main__`) in a forked child: the libraries are imported once, in the parent, which
never trains. A fault that must strike inside a run is a patch of core or torch in that child.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}

import torch  # noqa: E402

import claims  # noqa: E402
import core  # noqa: E402


class Script(NamedTuple):
    """A training script and the flags of a run of 20 to 30 small updates that saves at (nearly) each of them."""

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
    long: str = "--max_steps 40"  # enough updates to use up the budget of skipped ones
    once: int = 0  # exit code after a single gradient that is not finite
    package: str = ""  # flags that need bitsandbytes
    inside: str = ""  # the run's own folder in the run directory


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
            long="--max_steps 40 --no_baseline",
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
            long="--steps 40",
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
            long="--epochs 10",
            package="--load_4bit",
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
            long="--epochs 3",
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
            once=core.DIVERGED,
            package="--optim adamw8bit",
        ),
    )
}


# ------------------------------------------------------------------------------------------------ running a script
class Ended(NamedTuple):
    code: int
    out: str
    err: str


def begin(script: Script, directory: Path, flags: str = "", inject=None) -> int:
    """Start the script in a forked child, in --test sizes, after calling `inject()` there; returns its pid. Later
    flags win. Its output goes to DIRECTORY.out and DIRECTORY.err."""
    words = ["--test", *script.flags.split(), script.directory, str(directory), *flags.split()]
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(f"{directory}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # not a test's captured ones
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
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end(pid: int, directory: Path) -> Ended:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ended(code, *(Path(f"{directory}.{name}").read_text(errors="replace") for name in ("out", "err")))


def run(script: Script, directory: Path, flags: str = "", inject=None) -> Ended:
    return end(begin(script, directory, flags, inject), directory)


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


def at_save(number: int, act):
    """An injection: call `act(save, path, state)` before checkpoint `number` is written; `save` is core's."""

    def inject():
        save, calls = core.save_checkpoint, []

        def saving(path, state):
            calls.append(1)
            if len(calls) == number:
                act(save, path, state)
            save(path, state)

        core.save_checkpoint = saving

    return inject


def send(signum: int):
    return lambda *_: signal.raise_signal(signum)


NOISE = re.compile(
    r"time|_share$|seconds|_sec$|wall|per_s|mem|environment|config|clock|args|command|size|_ms|speed|note"
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
    found = (directory / script.inside).glob(script.checkpoints)
    return sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True)


def differs(script: Script, directory: Path, whole: Path) -> str:
    """Empty if the run in `directory` ended bit-equal to the undisturbed one in `whole`, else where they differ."""
    found = []
    for root in (directory, whole):
        rows = (root / script.inside / "log.jsonl").read_text().splitlines()
        result = json.loads((root / script.inside / script.result).read_text())
        last = max(saved(script, root), key=lambda p: [int(n) for n in re.findall(r"\d+", p.stem)][-1:])
        found.append(
            {
                "log": [quiet(json.loads(row)) for row in rows],
                "result": quiet(result),
                "checkpoint": quiet(core.load_checkpoint(last)),
            }
        )
    return equal(*found)


class Scene:
    """What the faults of one script share: a folder, a finished run, and one that was stopped near its end."""

    def __init__(self, script: Script, folder: Path):
        self.script, self.folder, self.count = script, folder, 0
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

    def resumes(self, directory: Path, *words: str) -> str:
        """Empty if --resume auto completes the run in `directory` bit-equally to the undisturbed one."""
        return wrong(run(self.script, directory, "--resume auto"), 0, *words) or differs(
            self.script, directory, self.whole
        )

    def loadable(self, directory: Path) -> str:
        for path in saved(self.script, directory):
            with contextlib.suppress(core.Failure):
                core.load_checkpoint(path)
                return ""
        return "no checkpoint loads"


# ------------------------------------------------------------- the faults: each yields, for every try, what went wrong
def kill_while_saving(scene: Scene):
    """kill -9 at a random moment of a save, 20 times; then the run goes on from what is there."""
    directory, draw = scene.fresh(), random.Random(0)
    notes = Path(f"{directory}.notes")

    def killed_often(save, path, state):
        began = time.perf_counter()
        save(path, state)
        spent = time.perf_counter() - began
        for _ in range(20):
            child = os.fork()
            if child == 0:
                while True:
                    save(path, state)
            time.sleep(draw.uniform(0, 3 * spent))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with open(notes, "a") as f:
                f.write(scene.loadable(directory) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    ended = run(scene.script, directory, inject=at_save(5, killed_often))
    after = f"exit {ended.code}, not killed" if ended.code != -signal.SIGKILL else scene.resumes(directory)
    for line in notes.read_text().splitlines() if notes.exists() else [""]:
        yield line or after


def kill_between_saves(scene: Scene):
    """kill -9 before the first save, and in the first update of a second arm: no row is logged twice."""
    for inject in (at_save(1, send(signal.SIGKILL)), at_update(13, send(signal.SIGKILL))):
        directory = scene.fresh()
        code = run(scene.script, directory, inject=inject).code
        yield f"exit {code}, not killed" if code != -signal.SIGKILL else scene.resumes(directory)


def truncated(scene: Scene):
    """The newest checkpoint cut short: it is named, and the run goes on from an older one."""
    for share in (0, 0.01, 0.5, 0.99):
        directory = scene.fresh(scene.stopped)
        newest = saved(scene.script, directory)[0]
        os.truncate(newest, int(share * newest.stat().st_size))
        yield scene.resumes(directory, re.escape(newest.name) + ".*(no checksum|damaged)")


def flipped_byte(scene: Scene):
    """One byte of the newest checkpoint changed."""
    directory = scene.fresh(scene.stopped)
    newest = saved(scene.script, directory)[0]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    yield scene.resumes(directory, re.escape(newest.name) + ".*damaged")


def leftover_files(scene: Scene):
    """Temporary files of a dead process: ignored, then removed."""
    directory = scene.fresh(scene.stopped)
    home = directory / scene.script.inside
    for name in (saved(scene.script, directory)[0].name + ".tmp", "config.json.123.tmp"):
        (home / name).write_bytes(b"half a file")
    yield scene.resumes(directory) or ("temporary files remain" if list(home.glob("*.tmp")) else "")


def disk_full(scene: Scene):
    """The system refuses to write more than half of a checkpoint: exit 4, and the one before it is intact."""
    directory, size = scene.fresh(), saved(scene.script, scene.stopped)[0].stat().st_size
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = at_update(10, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, most)))
    yield (
        wrong(run(scene.script, directory, inject=full), core.DISK, r"cannot save \S+\.pt", "free space")
        or scene.loadable(directory)
        or scene.resumes(directory)
    )


def gradient_not_finite(scene: Scene):
    """NaN in one gradient: the update is skipped and counted. In every gradient: exit 3 after a budget."""
    script, directory = scene.script, scene.fresh()
    poison = [lambda parameters, v=v: parameters[0].grad.fill_(v) for v in (float("nan"), float("inf"))]
    ended = run(script, directory, inject=at_update(3, poison[0]))
    text = wrong(ended, script.once, *["not finite"] * (script.once > 0))
    if not text and not script.once:
        result = (directory / script.inside / script.result).read_text()
        counts = re.findall(r'"(?:nonfinite_steps|skipped_steps|skipped\w*)": (?:\{[^}]*?: )?1\b', result)
        text = "" if counts else "the result does not count the skipped update"
    yield text
    yield wrong(run(script, scene.fresh(), script.long, at_update(3, poison[1], True)), core.DIVERGED, "not finite")


def sigterm(scene: Scene):
    """SIGTERM in an update and in a save: the state is saved, exit 143."""
    for inject in (at_update(15, send(signal.SIGTERM)), at_save(5, send(signal.SIGTERM))):
        directory = scene.fresh()
        yield (
            wrong(run(scene.script, directory, inject=inject), 143, "interrupted .* --resume")
            or scene.resumes(directory)
        )


def sigint_twice(scene: Scene):
    """The first Ctrl-C saves and exits with 130; a second one, in that save, quits at once."""
    directory = scene.fresh()
    ended = run(scene.script, directory, inject=at_update(15, send(signal.SIGINT)))
    yield wrong(ended, 130, "interrupted .* --resume") or scene.resumes(directory)

    def again(_):
        core.save_checkpoint = send(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    directory = scene.fresh()
    ended = run(scene.script, directory, inject=at_update(15, again))
    yield (
        f"exit {ended.code}, not 130 at once"
        if ended.code != 130 or "interrupted" in ended.err
        else scene.resumes(directory)
    )


def two_processes(scene: Scene):
    """A second run in a directory in use is refused and names the first; a dead one's lock is free."""
    directory, marker = scene.fresh(), scene.folder / f"held{scene.count}"

    def hold(_):
        marker.touch()
        time.sleep(3600)

    first = begin(scene.script, directory, inject=at_update(5, hold))
    while not marker.exists() and os.waitpid(first, os.WNOHANG)[0] == 0:
        time.sleep(0.05)
    other = run(scene.script, directory, "--resume auto")
    yield wrong(other, core.BAD_INPUT, f"in use by process {first} on {re.escape(socket.gethostname())}")
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    yield scene.resumes(directory)


def bad_data(scene: Scene):
    """Data that is missing, empty, of one row, not UTF-8: one line that names it; a line of 10 MB does no harm."""
    flags, name = scene.script.data
    folder = scene.folder / "data"
    folder.mkdir()
    words = "Ada found the lamp by the harbour, and Boris carried the old map to the station at night. " * 2
    if name.endswith(".jsonl"):

        def row(i, text):
            names = {"id": str(i), "title": str(i), "context": f"{i} {text}", "question": f"Who is {i} of Ada?"}
            return json.dumps(names | {"answers": ["lamp"], "answer": f"It is {i} #### {i}"})

        many, one = [row(i, words) for i in range(40)], row(0, words)
        wide = row(99, words * (10**7 // len(words)))
    else:
        many, one, wide = [words] * 80, words, words * (10**7 // len(words))
    contents = {
        "missing": None,
        "empty": b"",
        "one row": one.encode(),
        "not UTF-8": b"\xff\xfe" + one.encode("utf-16"),
        "10 MB line": "\n".join([*many, wide, *many[:20]]).encode(),
    }
    for what, content in contents.items():
        path = folder / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        ended = run(scene.script, scene.fresh(), flags.format(path, folder=folder))
        text = wrong(ended, core.BAD_INPUT, f"{path.stem}|{folder}")
        yield f"{what}: {text}" if text and (what != "10 MB line" or wrong(ended, 0)) else ""


def vocabulary_mismatch(scene: Scene):
    """A tokenizer with more entries than the model has embeddings."""
    if flags := scene.script.vocabulary:
        text = scene.folder / "text.txt"
        text.write_text("Ada found the lamp by the harbour.\n" * 200)
        flags = flags.format(model=scene.folder.parent / "small_model", text=text)
        yield wrong(run(scene.script, scene.fresh(), flags), core.BAD_INPUT, "vocab|tokenizer")


def foreign_weights(scene: Scene):
    """A file of weights with a tensor missing, one too many, one of another shape; and a file of something else."""
    flag, name, entry = scene.script.weights
    content = core.load_checkpoint(scene.whole / scene.script.inside / name)
    tensors = content[entry]
    first = next(k for k, v in tensors.items() if v.ndim == 2)
    changed = [
        {k: v for k, v in tensors.items() if k != first},
        tensors | {"surplus.weight": tensors[first]},
        tensors | {first: tensors[first][:, :-1].clone()},
    ]
    for new in [content | {entry: c} for c in changed] + [{"another": torch.zeros(1)}]:
        directory = scene.fresh()
        core.save_checkpoint(path := scene.folder / name, new)
        if (best := scene.whole / scene.script.inside / "best_model.pt").exists():  # Cognate's, looked for beside it
            shutil.copy(best, scene.folder)
        names = f"surplus|{re.escape(first)}" if "another" not in new else name
        yield wrong(run(scene.script, directory, f"{flag} {path}"), core.BAD_INPUT, names)


def changed_flag(scene: Scene):
    """A flag of the experiment changed between save and resume: refused by name."""
    flags = scene.script.changed
    ended = run(scene.script, scene.fresh(scene.stopped), f"--resume auto {flags}")
    yield wrong(ended, core.BAD_INPUT, "flags differ", flags.split()[0].strip("-").replace("lr", "lr|learning_rate"))


def changed_dtype(scene: Scene):
    """The same of the precision."""
    ended = run(scene.script, scene.fresh(scene.stopped), f"--resume auto {scene.script.dtype}")
    yield wrong(ended, core.BAD_INPUT, "flags differ", "precision|dtype")


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def malicious_pickle(scene: Scene):
    """A pickle that runs code, given as a checkpoint by name and found as the newest: refused, not executed."""
    marker, path = scene.folder / "executed", scene.folder / "bomb_step_999.pt"
    torch.save({"model": Bomb(marker)}, path)
    for flag in dict.fromkeys(("--resume", scene.script.weights[0])):
        ended = run(scene.script, scene.fresh(), f"{flag} {path}")
        yield "it was executed" if marker.exists() else wrong(ended, core.BAD_INPUT, path.name)
    directory = scene.fresh(scene.stopped)
    shutil.copy(path, newest := saved(scene.script, directory)[0])
    yield "it was executed" if marker.exists() else scene.resumes(directory, re.escape(newest.name))


def out_of_memory(scene: Scene):
    """An allocation fails in an update: one line that names the flags to lower; the checkpoints are intact."""
    directory = scene.fresh()
    ended = run(scene.script, directory, inject=at_update(15, lambda _: torch.empty(2**60, dtype=torch.uint8)))
    yield wrong(ended, core.BAD_INPUT, "out of memory: lower --") or scene.resumes(directory)


def package_absent(scene: Scene):
    """W&B asked for but not installed: said once, and the run goes on. bitsandbytes asked for: refused by name."""

    def without(name):
        for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
            del sys.modules[loaded]
        sys.modules[name] = None

    ended = run(scene.script, scene.fresh(), "--wandb offline", lambda: without("wandb"))
    yield wrong(ended, 0, r"(?i)W&B|wandb")
    if scene.script.package:
        ended = run(scene.script, scene.fresh(), scene.script.package, lambda: without("bitsandbytes"))
        yield wrong(ended, core.BAD_INPUT, "bitsandbytes")


def network_off(scene: Scene):
    """No connection, and a model or data set of the hub: refused in one line that names what to use instead."""

    def off():
        def refuse(*args, **kwargs):
            raise OSError("Network is unreachable")

        socket.create_connection = socket.getaddrinfo = refuse
        os.environ.pop("HF_HUB_OFFLINE", None)

    yield wrong(run(scene.script, scene.fresh(), scene.script.hub, off), core.BAD_INPUT, "instead: ")


def awkward_directory(scene: Scene):
    """A symbolic link and a name outside ASCII: nothing changes. A directory that cannot be written: one line."""
    link, target = scene.fresh(), scene.folder / "target"
    target.mkdir(exist_ok=True)
    link.symlink_to(target)
    unusual = scene.folder / "Prüfung_実験"
    for directory in (link, unusual):
        yield wrong(run(scene.script, directory), 0) or differs(scene.script, directory, scene.whole)
    locked = scene.folder / "locked"
    locked.mkdir()
    locked.chmod(0o555)

    def as_nobody():  # root may write anywhere
        if os.geteuid() == 0:
            os.seteuid(65534)

    ended = run(scene.script, locked / "run", inject=as_nobody) if os.geteuid() else run_as(scene, locked, as_nobody)
    yield wrong(ended, core.BAD_INPUT, "cannot write to")


def run_as(scene: Scene, locked: Path, become) -> Ended:
    """As `run`, with the output files outside of the locked directory."""
    (inside := scene.fresh()).symlink_to(locked / "run")
    return run(scene.script, inside, inject=become)


def resumed_often(scene: Scene):
    """Stopped after every update and resumed, 20 times: the same curve, no row lost or doubled."""
    directory, stop = scene.fresh(), at_update(1, send(signal.SIGTERM))
    stops = [wrong(run(scene.script, directory, "--resume auto", stop), 143, "interrupted") for _ in range(20)]
    after = scene.resumes(directory)
    yield from (text or after for text in stops)


FAULTS = {
    f.__name__: f
    for f in (
        kill_while_saving,
        kill_between_saves,
        truncated,
        flipped_byte,
        leftover_files,
        disk_full,
        gradient_not_finite,
        sigterm,
        sigint_twice,
        two_processes,
        bad_data,
        vocabulary_mismatch,
        foreign_weights,
        changed_flag,
        changed_dtype,
        malicious_pickle,
        out_of_memory,
        package_absent,
        network_off,
        awkward_directory,
        resumed_often,
    )
}


# ----------------------------------------------------------------------------------------------------------- report
MARKS = "<!-- faults: begin -->", "<!-- faults: end -->"


def table(record: dict) -> str:
    """Markdown: a row per fault, a column per script. `record`: script -> fault -> {passed, tried, ...}."""
    scripts = [s for s in SCRIPTS if s in record]
    cells = [["fault", *(f"`{s}`" for s in scripts)], ["---"] * (len(scripts) + 1)]
    for name in FAULTS:
        row = [record[s].get(name, {"tried": 0}) for s in scripts]
        if any(cell["tried"] for cell in row):
            cells.append([name.replace("_", " ")])
            cells[-1] += [f"{cell['passed']}/{cell['tried']}" if cell["tried"] else "–" for cell in row]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def write_readme(path: Path, text: str) -> None:
    """Put `text` between the two marks of the page."""
    claims.replace_between(path, MARKS, text)


def measure(scene: Scene, fault: str) -> dict:
    """What the record says of one fault on one script: passed and tried, what went wrong, and of which code."""
    tries, here = list(FAULTS[fault](scene)), core.environment()
    failures = [f"try {i}: {text.replace(str(scene.folder), '')}" for i, text in enumerate(tries) if text]
    print(f"{scene.script.file:22s} {fault:20s} {tries.count('')}/{len(tries)}", *failures, sep="\n  ", flush=True)
    return {
        "passed": tries.count(""),
        "tried": len(tries),
        "failures": failures,
        "commit": here["commit"],
        "uncommitted_changes": here["uncommitted_changes"],
    }


def small_model(folder: Path) -> None:
    """A Hugging Face directory whose tokenizer has 259 entries and whose embedding has 100."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=100,
            eos_token_id=2,
        )
    ).save_pretrained(folder)
    core.train_tokenizer([]).save_pretrained(folder)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", action="append", choices=SCRIPTS, help="this script only (may be repeated)")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="this fault only (may be repeated)")
    parser.add_argument("--out", type=Path, help="write the counts as JSON; others in it stay")
    parser.add_argument("--readme", type=Path, help="replace the table in this page")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for module in "accelerate peft transformers.models.llama.modeling_llama torch._dynamo".split():
        importlib.import_module(module)  # once, for all children
    shm = Path("/dev/shm")  # a save waits for the disk: let there be none
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        os.chmod(folder, 0o755)
        core.CACHE = Path(folder) / "cache"
        small_model(Path(folder) / "small_model")
        record, failures = {}, 0
        if args.out and args.out.exists():  # what is not tried now stays
            record = json.loads(args.out.read_text())["scripts"]
        for name in args.script or SCRIPTS:
            (home := Path(folder) / name).mkdir()
            scene = Scene(SCRIPTS[name], home)
            for fault in args.fault or FAULTS:
                record.setdefault(name, {})[fault] = found = measure(scene, fault)
                failures += len(found["failures"])
                if args.out:
                    core.write_json(args.out, {"environment": core.environment(), "scripts": record})
            shutil.rmtree(home)
    print(table(record))
    if args.readme:
        write_readme(args.readme, table(record))
    print(f"{failures} tries were not withstood" if failures else "everything was withstood")
    return core.CHECK_FAILED if failures else 0


if __name__ == "__main__":
    sys.exit(main())
