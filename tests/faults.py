"""Fault suite: breaks every training script on purpose and counts how often it withstands that.

    python tests/faults.py                                     every fault on every script, two scripts at a time
    python tests/faults.py --script hst_train --fault sigterm  one of each
    python tests/faults.py --out docs/results/faults/faults.json --readme README.md

A try passes if the run ends with the documented exit code and one line that says what to do, leaves a checkpoint that
loads, and, where it goes on, ends bit-equal to a run that was never disturbed (result, log rows, last checkpoint). The
table has a row for each fault and a column for each script: passed/tried, or a dash where the fault does not apply.
Exit code 1 if anything was not withstood. The record holds a hash of the code that was tried.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faulty_runs as runs
from faulty_runs import ROOT, SCRIPTS, Scene, Script, at_save, at_update, begin, end, run, saved, send, wrong

import torch  # isort: skip

import claims
import core


# ------------------------------------------------------------- the faults: each yields, for every try, what went wrong
def kill_while_saving(scene: Scene):
    """kill -9 with half of a checkpoint written, and before it gets its name; loss of power after that. What the save
    replaces, or what it writes, must verify, and nothing else may be lost."""
    for moment in runs.MOMENTS:
        directory, notes = scene.fresh(), scene.folder / f"notes{scene.count}"
        yield killed_in_save(scene, directory, "", runs.kill_in_save(3, moment, notes), notes, moment)


def killed_in_save(scene: Scene, directory: Path, flags: str, inject, notes: Path, moment: str) -> str:
    """Empty if a run that `inject` kills in a save has lost nothing by it and can be completed."""
    code = run(scene.script, directory, flags, inject).code
    if code != -signal.SIGKILL:
        return f"{moment}: exit {code}, not killed"
    text = runs.lost(scene.home(directory), json.loads(notes.read_text()))
    return f"{moment}: {text}" if text else scene.resumes(directory)


def kill_after_damage(scene: Scene):
    """The newest checkpoint is damaged, the run goes on from the one before it and is killed in its next save: the good
    one must survive that."""
    for moment in runs.MOMENTS:
        directory, notes = scene.fresh(scene.stopped), scene.folder / f"notes{scene.count}"
        flip(saved(scene.script, directory)[0])
        yield killed_in_save(scene, directory, "--resume auto", runs.kill_in_save(1, moment, notes), notes, moment)


def kill_between_saves(scene: Scene):
    """kill -9 before the first save, and in the first update of a second arm: no row is logged twice."""
    for inject in (at_save(1, lambda *_: runs.kill()), at_update(13, lambda _: runs.kill())):
        directory = scene.fresh()
        code = run(scene.script, directory, inject=inject).code
        yield f"exit {code}, not killed" if code != -signal.SIGKILL else scene.resumes(directory)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damaged_checkpoint(scene: Scene):
    """The newest checkpoint empty, cut short, with one byte changed: it is named, and an older one is taken."""
    for damage in (lambda p: os.truncate(p, 0), lambda p: os.truncate(p, p.stat().st_size - 9), flip):
        directory = scene.fresh(scene.stopped)
        newest = saved(scene.script, directory)[0]
        damage(newest)
        yield scene.resumes(directory, re.escape(newest.name) + ".*(no checksum|damaged)")


def log_cut_short(scene: Scene):
    """log.jsonl ends in the middle of a row: of one that was being written, or, by a loss of power, of an older one.
    No row is glued to another."""
    directory = scene.fresh(scene.stopped)
    with open(scene.home(directory) / "log.jsonl", "a") as file:
        file.write('{"step": 21, "lo')
    yield scene.resumes(directory)
    directory = scene.fresh(scene.stopped)
    log = scene.home(directory) / "log.jsonl"
    os.truncate(log, log.stat().st_size - 5)
    text = wrong(run(scene.script, directory, "--resume auto"), 0)
    try:
        rows = [json.loads(row) for row in log.read_text().splitlines()]
        whole = (scene.home(scene.whole) / "log.jsonl").read_text().splitlines()
        yield text or ("" if len(rows) >= len(whole) - 1 else f"{len(rows)} rows, not {len(whole)}")
    except ValueError as error:
        yield text or f"the log is no JSON any more: {error}"


def files_of_others(scene: Scene):
    """Files and a folder of a person's own in the run directory stay as they are."""
    directory = scene.fresh(scene.stopped)
    home = scene.home(directory)
    (home / "archive.tmp").mkdir()
    own = [
        home / "notes.tmp",
        home / (saved(scene.script, directory)[0].name + ".tmp"),
        home / "archive.tmp" / "old.pt",
    ]
    for path in own:
        path.write_bytes(b"mine")
    text = wrong(run(scene.script, directory, "--resume auto"), 0) or runs.differs(scene.script, directory, scene.whole)
    yield text or ("" if all(p.exists() and p.read_bytes() == b"mine" for p in own) else "they are gone")


def disk_full(scene: Scene):
    """The disk takes no more than half of a checkpoint (a limit of the system; a small disk of its own), and no result:
    exit 4, the checkpoint before is intact, nothing half written stays, and with room again the run goes on. A token
    cache that does not fit leaves nothing behind either."""
    script, size = scene.script, saved(scene.script, scene.stopped)[0].stat().st_size
    directory = scene.fresh()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = at_update(10, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, most)))
    ended = run(script, directory, inject=limit)
    yield wrong(ended, core.DISK, r"cannot save \S+\.pt", "free space") or scene.resumes(directory)
    with scene.disk(2**28) as disk:
        if disk is None:
            return
        (disk / "run").mkdir()
        (directory := scene.fresh()).symlink_to(disk / "run")  # its output has files outside of the small disk
        ended = run(script, directory, inject=at_update(10, lambda _: runs.fill(disk, leave=size // 2)))
        yield go_on_with_room(scene, ended, directory, disk, "free space")

        def no_result():
            write = core.write_json

            def writing(path, value):
                if Path(path).name == script.result:
                    runs.fill(disk, leave=0)
                write(path, value)

            core.write_json = writing

        (disk / "another").mkdir()
        (directory := scene.fresh()).symlink_to(disk / "another")
        yield go_on_with_room(scene, run(script, directory, inject=no_result), directory, disk, "cannot write")
    if script.caches:
        with scene.disk(2**16) as disk:

            def small_cache():
                core.CACHE = disk

            flags = script.data[0].format(scene.text(rows=2000), folder=scene.folder)
            text = wrong(run(script, scene.fresh(), flags, small_cache), core.DISK, "cannot write")
            left = [str(p.relative_to(disk)) for p in disk.rglob("*") if p.is_file()]
            yield text or (f"left in the cache: {left}" if left else "")


def go_on_with_room(scene: Scene, ended: runs.Ended, directory: Path, disk: Path, words: str) -> str:
    (disk / "ballast").unlink(missing_ok=True)
    return wrong(ended, core.DISK, words) or scene.resumes(directory)


def write_errors(scene: Scene):
    """A disk that became read-only, a quota that is used up, a disk that fails when it is flushed, in the middle of a
    run; and a run directory on a disk that is read-only from the start: exit 4."""
    for code, where in runs.FULL.values():
        directory = scene.fresh()
        inject = at_save(3, lambda path, state, code=code, where=where: runs.fail_writes(code, where, path.parent))
        yield wrong(run(scene.script, directory, inject=inject), core.DISK, "cannot") or scene.resumes(directory)
    with scene.disk(2**20, ",ro") as disk:
        if disk is not None:
            (link := scene.fresh()).symlink_to(disk)
            yield wrong(run(scene.script, link), core.DISK, "cannot write to")


def gradient_not_finite(scene: Scene):
    """NaN in one gradient: the update is skipped and counted. In every gradient: exit 3 after a budget."""
    script, directory = scene.script, scene.fresh()
    poison = [lambda parameters, v=v: parameters[0].grad.fill_(v) for v in (float("nan"), float("inf"))]
    text = wrong(run(script, directory, inject=at_update(3, poison[0])), 0)
    if not text:
        result = (scene.home(directory) / script.result).read_text()
        counted = re.search(r'"nonfinite_steps": (?:\{[^}]*?: )?1\b', result)  # one number, or one for each arm
        text = "" if counted else "the result does not count the skipped update"
    yield text
    yield wrong(run(script, scene.fresh(), script.long, at_update(3, poison[1], True)), core.DIVERGED, "not finite")


def sigterm(scene: Scene):
    """SIGTERM in an update and in a save: the state is saved, exit 143."""
    for inject in (at_update(15, send(signal.SIGTERM)), at_save(3, send(signal.SIGTERM))):
        directory = scene.fresh()
        ended = run(scene.script, directory, inject=inject)
        yield wrong(ended, 143, "interrupted .* --resume") or scene.resumes(directory)


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
    late = ended.code != 130 or "interrupted" in ended.err
    yield f"exit {ended.code}, not 130 at once" if late else scene.resumes(directory)


def signal_to_all(scene: Scene):
    """SIGTERM and SIGINT to a whole process group, two loader processes among it, as a batch system or Ctrl-C sends
    them: the state is saved, no process stays behind, and the run goes on."""
    if not scene.script.workers:
        return
    for signum in (signal.SIGTERM, signal.SIGINT):
        directory = scene.fresh()
        inject = at_update(8, lambda _, signum=signum: os.killpg(0, signum))
        pid = begin(scene.script, directory, scene.script.workers, inject, own_group=True)
        text = wrong(end(pid, directory), 128 + signum, "interrupted .* --resume")
        yield text or survivors(pid) or scene.resumes(directory, flags=scene.script.workers)


def survivors(group: int) -> str:
    """Empty if the process group has ended, within a few seconds; else it is ended here."""
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
        return "a process stays behind"
    return ""


def interrupted_sweep(scene: Scene):
    """Ctrl-C of a sweep: its run saves, the next one is not started, exit 130; called again it goes on to the end."""
    script, directory = scene.script, scene.fresh()
    words = [script.file + ".py", "--test", *script.flags.split(), script.directory]
    line = 'run_one "$1/{inside}{result}" "$1" "$PYTHON" {words} "$1" --resume auto'
    line = line.format(inside=f"{script.inside}/" * bool(script.inside), result=script.result, words=" ".join(words))
    sweep = scene.folder / f"sweep{scene.count}.sh"
    other = f"{directory}_next"
    sweep.write_text(f"source {ROOT}/scripts/sweep.bash\n{line}\nset -- {other}\n{line}\nexit $failed\n")
    env = os.environ | {"PYTHON": sys.executable, "CLAIMBENCH_CACHE": str(core.CACHE)}
    log, output = scene.home(directory) / "log.jsonl", scene.folder / f"sweep{scene.count}.txt"
    with open(output, "w") as file:
        process = subprocess.Popen(["bash", sweep, directory], env=env, stdout=file, stderr=file, process_group=0)
        wait_for(lambda: process.poll() is not None or (log.exists() and log.read_text().count("\n") > 2))
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=runs.LIMIT)
    if code != 130 or Path(other).exists():
        yield f"exit {code}, next run started: {Path(other).exists()}: {output.read_text()[-160:]}"
        return
    yield scene.resumes(directory)


def wait_for(condition) -> None:
    deadline = time.monotonic() + runs.LIMIT
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def interrupted_demo(scene: Scene):
    """Ctrl-C of the demo, whose first parts are this script: both save, no other part is started, exit 130."""
    if scene.script.file != "pretrain_backbone":
        return
    root, output = scene.fresh(), scene.folder / "demo.txt"
    env = os.environ | {"PYTHON": sys.executable, "ROOT": str(root), "TEST": "1", "CLAIMBENCH_CACHE": str(core.CACHE)}
    logs = [root / "backbone" / kind / "log.jsonl" for kind in ("lm", "reader")]
    with open(output, "w") as file:
        words = ["bash", str(ROOT / "scripts/demo.sh")]
        process = subprocess.Popen(words, env=env, stdout=file, stderr=file, process_group=0)
        wait_for(lambda: process.poll() is not None or any(log.exists() for log in logs))
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=runs.LIMIT)
    started = sorted(re.findall(r"^started: (\w+)", output.read_text(), re.M))
    alive = subprocess.run(["pgrep", "-f", str(root)], capture_output=True, text=True).stdout.split()
    good = code == 130 and started == ["lm", "reader"] and not alive and "FAILED" not in output.read_text()
    yield "" if good else f"exit {code}, started {started}, {len(alive)} processes alive: {output.read_text()[-160:]}"


def two_processes(scene: Scene):
    """A second run in a directory in use is refused and names the first; a dead one's lock is free."""
    directory, marker = scene.fresh(), scene.folder / f"held{scene.count}"

    def hold(_):
        marker.touch()
        time.sleep(3600)

    first = begin(scene.script, directory, inject=at_update(5, hold))
    wait_for(lambda: marker.exists() or os.waitpid(first, os.WNOHANG)[0])
    other = scene.fresh()
    other.symlink_to(directory)  # its output has files of its own
    ended = run(scene.script, other, "--resume auto")
    yield wrong(ended, core.BAD_INPUT, f"in use by process {first} on {re.escape(socket.gethostname())}")
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    yield scene.resumes(directory)


def torchrun(scene: Scene):
    """Two processes under torchrun: one dies, one meets a loss that is not finite, both are told to end. All three end,
    none hangs, the checkpoints are whole; torchrun ends with 1 and names the exit code of the process."""
    script, directory = scene.script, scene.fresh()

    def dies(rank):
        if rank == 1:
            at_update(9, lambda _: runs.kill())()

    def diverges(rank):
        backward = core.Loop.backward
        if rank == 1:
            core.Loop.backward = lambda loop, loss: backward(loop, loss * float("nan"))

    gone = r"Signal 9|another process of this run has ended; continue with --resume"  # whichever process ends first
    yield ranks(runs.run_two(script, directory, inject=dies), gone) or loadable(scene, directory)
    ended = runs.run_two(script, scene.fresh(), script.long, diverges)
    yield ranks(ended, r"not finite(.|\n)*exitcode *: 3")
    directory = scene.fresh()
    ended = runs.run_two(script, directory, inject=lambda rank: at_update(9, send(signal.SIGTERM))())
    text = ranks(ended, r"interrupted .* --resume(.|\n)*exitcode *: 143")
    yield text or wrong(runs.run_two(script, directory, "--resume auto"), 0)


def ranks(ended: runs.Ended, words: str) -> str:
    """Empty if torchrun ended with 1 and said `words`."""
    if ended.code != 1:
        return f"exit {ended.code} instead of 1: {ended.err[-160:]}"
    own = ended.err.split("ChildFailedError")[0].split("Traceback")  # what stands before the agent's own traceback
    if len(own) > 2:
        return f"a traceback of the script: {ended.err[-300:]}"
    return "" if re.search(words, ended.err) else f"does not say {words}: {ended.err[-300:]}"


def loadable(scene: Scene, directory: Path) -> str:
    good = [path for path in saved(scene.script, directory) if runs.step_of(path) is not None]
    return "" if good else "no checkpoint loads"


# ------------------------------------------------------------------------------------------------- what a run is given
def bad_flags(scene: Scene):
    """Values out of range, a YAML file nested too deeply, bytes that are no text, a run directory without a name: one
    line each."""
    script, rate = scene.script, scene.script.changed.split()[0]
    deep = scene.folder / "deep.yaml"
    deep.write_text("[" * 100_000)
    tries = [f"{rate} inf", f"{rate} nan", "--threads -3", "--threads 1000000", f"--config {deep}"]
    tries += ["--num_workers -1"] * bool(script.workers)
    words = [*map(str.split, tries), ["--config", "no\udce9.yaml"]]
    words += [] if script.unnamed else [[f"{script.directory}="]]
    for flags in words:
        text = wrong(run(script, scene.fresh(), flags), core.BAD_INPUT)
        yield f"{flags}: {text}" if text else ""


def bad_data(scene: Scene):
    """Data that is missing, empty, of one row, not UTF-8, JSON nested too deeply or with half a character: one line
    that names it; a line of 2 MB does no harm."""
    flags, name = scene.script.data
    folder = scene.folder / "data"
    folder.mkdir()
    for what, content in data_contents(name).items():
        path = folder / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        ended = run(scene.script, scene.fresh(), flags.format(path, folder=folder))
        text = wrong(ended, 0) if what == "2 MB line" else wrong(ended, core.BAD_INPUT, f"{path.stem}|{folder}")
        yield f"{what}: {text}" if text else ""


def data_contents(name: str) -> dict:
    """Contents of a data file of that name, bad ones and, last, a good one with a very long line."""
    words = "Ada found the lamp by the harbour, and Boris carried the old map to the station at night. " * 2
    wide = words * (2 * 10**6 // len(words))
    if name.endswith(".jsonl"):
        many, one, wide = [json_row(i, words) for i in range(40)], json_row(0, words), json_row(99, wide)
        more = {"deep": b"[" * 100_000, "half a character": json_row(0, words + "\ud800").encode()}
    else:
        many, one, more = [words] * 80, words, {}
    bad = {"missing": None, "empty": b"", "one row": one.encode(), "not UTF-8": b"\xff\xfe" + one.encode("utf-16")}
    return bad | more | {"2 MB line": "\n".join([*many, wide, *many[:20]]).encode()}


def json_row(i: int, text: str) -> str:
    """A row that SQuAD's and GSM8K's readers both take."""
    names = {"id": str(i), "title": str(i), "context": f"{i} {text}", "question": f"Who is {i} of Ada?"}
    return json.dumps(names | {"answers": ["lamp"], "answer": f"It is {i} #### {i}"})


def good_data(scene: Scene) -> tuple[str, Path]:
    """Flags of a run on a file of one's own, and the file or folder that the data come from."""
    flags, name = scene.script.data
    (folder := scene.folder / "own").mkdir(exist_ok=True)
    content = data_contents(name)["2 MB line"].split(b"\n")
    (folder / name).write_bytes(b"\n".join(line for line in content if len(line) < 1000))
    return flags.format(folder / name, folder=folder), folder / name


def broken_model(scene: Scene):
    """A directory of a model that lacks a tensor, whose weights are cut short, whose tokenizer lacks its keys or is
    nested too deeply: one line that names it. Where a script takes a tokenizer alone, the same of that."""
    from safetensors.torch import load_file, save_file

    if not scene.script.base:
        return
    folder = scene.folder / "broken"
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"

    def lack():
        tensors = load_file(weights)
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})

    damages = {
        "lacks a tensor": lack,
        "cut short": lambda: os.truncate(weights, weights.stat().st_size // 2),
        "no keys": lambda: tokenizer.write_text("{}"),
        "deep": lambda: tokenizer.write_text('{"a":' * 100_000),
    }
    for what, damage in damages.items():
        if "--tokenizer" in scene.script.base and what in ("lacks a tensor", "cut short"):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(scene.shared / "model", folder)
        damage()
        text = wrong(
            run(scene.script, scene.fresh(), scene.script.base.format(folder, text=scene.text())),
            core.BAD_INPUT,
            "broken",
        )
        yield f"{what}: {text}" if text else ""


def vocabulary_mismatch(scene: Scene):
    """A tokenizer with more entries than the model has embeddings."""
    if flags := scene.script.vocabulary:
        flags = flags.format(model=scene.shared / "small_model", text=scene.text())
        yield wrong(run(scene.script, scene.fresh(), flags), core.BAD_INPUT, "vocab|tokenizer")


def foreign_weights(scene: Scene):
    """A file of weights with a tensor missing, one too many, one of another shape; a file of something else; and the
    checkpoint of another script."""
    flag, name, entry = scene.script.weights
    content = core.load_checkpoint(scene.home(scene.whole) / name)
    tensors = content[entry]
    first = next(k for k, v in tensors.items() if v.ndim == 2)
    less = {k: v for k, v in tensors.items() if k != first}
    more, other = tensors | {"surplus.weight": tensors[first]}, tensors | {first: tensors[first][:, :-1].clone()}
    for new in [content | {entry: c} for c in (less, more, other)] + [{"another": torch.zeros(1)}]:
        core.save_checkpoint(path := scene.folder / name, new)
        if (best := scene.home(scene.whole) / "best_model.pt").exists():  # Cognate's, looked for beside it
            shutil.copy(best, scene.folder)
        names = f"surplus|{re.escape(first)}" if "another" not in new else name
        yield wrong(run(scene.script, scene.fresh(), f"{flag} {path}"), core.BAD_INPUT, names)
    another = SCRIPTS["hst_train" if scene.script.file != "hst_train" else "phase_a_validation"]
    if text := wrong(run(another, donor := scene.fresh()), 0):
        yield f"{another.file}: {text}"
        return
    flags = f"--resume {saved(another, donor)[0]}"
    yield wrong(run(scene.script, scene.fresh(), flags), core.BAD_INPUT, "of this script|does not fit")


def token_cache(scene: Scene):
    """The cached tokens with a flipped byte, cut short, empty: they are made again, and nothing changes."""
    if not scene.script.caches:
        return
    flags, cache = scene.script.data[0].format(scene.text(), folder=scene.folder), scene.folder / "token_cache"

    def own_cache():
        core.CACHE = cache

    ended = run(scene.script, first := scene.fresh(), flags, own_cache)
    files = [p for p in cache.rglob("*") if p.is_file()]
    if text := wrong(ended, 0) or ("" if files else "there is no cached file"):
        yield text
        return
    for damage in (flip, lambda p: os.truncate(p, p.stat().st_size // 2), lambda p: os.truncate(p, 0)):
        for path in files:
            damage(path)
        directory = scene.fresh()
        text = wrong(run(scene.script, directory, flags, own_cache), 0)
        yield text or runs.differs(scene.script, directory, first)


def malicious_pickle(scene: Scene):
    """A pickle that runs code, given as a checkpoint by name and found as the newest: refused, not executed."""
    marker, path = scene.folder / "executed", scene.folder / "bomb_step_999.pt"
    torch.save({"model": Bomb(marker)}, path)
    for flag in dict.fromkeys(("--resume", scene.script.weights[0])):
        ended = run(scene.script, scene.fresh(), f"{flag} {path}")
        yield "it was executed" if marker.exists() else wrong(ended, core.BAD_INPUT, path.name)
    directory = scene.fresh(scene.stopped)
    shutil.copy(path, newest := saved(scene.script, directory)[0])
    text = scene.resumes(directory, re.escape(newest.name))
    yield "it was executed" if marker.exists() else text


class Bomb:
    """Unpickling it creates a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# ------------------------------------------------------------------------------------ a run that may not go on, or does
def changed_flag(scene: Scene):
    """A flag of the experiment, and the precision, changed before a resume: refused by name, no file changes."""
    name = scene.script.changed.split()[0].strip("-").replace("lr", "lr|learning_rate")
    for flags, names in ((scene.script.changed, name), (scene.script.dtype, "precision|dtype")):
        directory = scene.fresh(scene.stopped)
        yield scene.refuses(directory, core.BAD_INPUT, "flags differ", names, flags=f"--resume auto {flags}")


def changed_inputs(scene: Scene):
    """The data, the base weights, the tokenizer have another content under the same name when a run goes on: refused by
    name, nothing changes. As they were, it goes on."""
    script = scene.script
    data_flags, data = good_data(scene)
    model = scene.folder / "base"
    shutil.copytree(scene.shared / "model", model)
    tries = [(data_flags, data, lambda: data.write_bytes(data.read_bytes().replace(b"Ada", b"Eva")))]
    if script.base:
        flags = script.base.format(model, text=scene.text())
        tokenizer, weights = model / "tokenizer.json", model / "model.safetensors"
        lower = tokenizer.read_text().replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}')
        tries.append((flags, tokenizer, lambda: tokenizer.write_text(lower)))
        if "--tokenizer" not in script.base:
            tries.append((flags, weights, lambda: flip(weights)))
    for flags, path, change in tries:
        stopped = scene.fresh()
        if text := wrong(run(script, stopped, flags, at_update(8, send(signal.SIGTERM))), 143):
            yield f"{path.name}: {text}"
            continue
        before = path.read_bytes()
        change()
        differ = path.read_bytes() != before
        text = scene.refuses(stopped, core.BAD_INPUT, "data|tokenizer|base", flags=f"--resume auto {flags}")
        path.write_bytes(before)
        text = text or wrong(run(script, stopped, f"--resume auto {flags}"), 0)
        yield f"{path.name}: {text}" if text else ("" if differ else "nothing was changed")


def finished_run(scene: Scene):
    """A finished run, no test run, is asked to go on with another flag, as a test, to start again, to start again
    although its data are not there: refused. Asked for what it has done it gives its result. No file changes."""
    script, directory = scene.script, scene.fresh()
    if text := wrong(run(script, directory, test=False), 0):
        yield text
        return
    gone = script.data[0].format(scene.folder / "nowhere.txt", folder=scene.folder / "nowhere")
    for flags, how in (
        (f"--resume auto {script.changed}", {"test": False}),
        (f"--resume auto {script.changed}", {"test": True}),
        ("", {"test": False}),
        ("", {"test": True}),
        (f"--overwrite {gone}", {"test": False}),
    ):
        text = scene.refuses(directory, core.BAD_INPUT, flags=flags, **how)
        yield f"{flags} {how}: {text}" if text else ""
    yield scene.refuses(directory, 0, flags="--resume auto", test=False)


def resumed_often(scene: Scene):
    """Stopped after every update and resumed, eight times: the same curve, no row lost or doubled."""
    directory, stop = scene.fresh(), at_update(1, send(signal.SIGTERM))
    stops = [wrong(run(scene.script, directory, "--resume auto", stop), 143, "interrupted") for _ in range(8)]
    yield next(filter(None, stops), "") or scene.resumes(directory)


# ------------------------------------------------------------------------------------------------------ surroundings
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


def program_absent(scene: Scene):
    """No git on the path; no /proc, as on other systems than Linux: the run is the same."""

    def no_git():
        os.environ["PATH"] = str(scene.folder / "empty")
        core.environment.cache_clear()

    def no_proc():
        read, status = Path.read_text, Path("/proc")

        def reading(path, *args, **kwargs):
            if status in path.parents:
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return read(path, *args, **kwargs)

        Path.read_text = reading

    for inject in (no_git, no_proc):
        directory = scene.fresh()
        text = wrong(run(scene.script, directory, inject=inject), 0)
        yield text or runs.differs(scene.script, directory, scene.whole)


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
        text = wrong(run(scene.script, directory), 0)
        yield text or runs.differs(scene.script, directory, scene.whole)
    locked = scene.folder / "locked"
    locked.mkdir()
    locked.chmod(0o555)

    def as_nobody():  # root may write anywhere
        if os.geteuid() == 0:
            os.seteuid(65534)

    (inside := scene.fresh()).symlink_to(locked / "run")  # its output has files outside of the locked directory
    yield wrong(run(scene.script, inside, inject=as_nobody), core.BAD_INPUT, "cannot write to")


FAULTS = {
    f.__name__: f
    for f in (
        kill_while_saving,
        kill_after_damage,
        kill_between_saves,
        damaged_checkpoint,
        log_cut_short,
        files_of_others,
        disk_full,
        write_errors,
        gradient_not_finite,
        sigterm,
        sigint_twice,
        signal_to_all,
        interrupted_sweep,
        interrupted_demo,
        two_processes,
        torchrun,
        bad_flags,
        bad_data,
        broken_model,
        vocabulary_mismatch,
        foreign_weights,
        token_cache,
        malicious_pickle,
        changed_flag,
        changed_inputs,
        finished_run,
        resumed_often,
        out_of_memory,
        package_absent,
        program_absent,
        network_off,
        awkward_directory,
    )
}


# ----------------------------------------------------------------------------------------------------------- report
MARKS = "<!-- faults: begin -->", "<!-- faults: end -->"


def code_of(name: str) -> str:
    """Hash of the code that the faults of one script try: the script, core, the sweeps, and the faults themselves."""
    files = [f"{name}.py", "core.py", "scripts/sweep.bash", "tests/faults.py", "tests/faulty_runs.py"]
    files += ["scripts/demo.sh"] * (name == "pretrain_backbone")
    return hashlib.sha256(b"".join((ROOT / file).read_bytes() for file in files)).hexdigest()[:16]


def table(record: dict) -> str:
    """Markdown: a row per fault, a column per script. `record`: script -> {faults: {fault -> {passed, tried}}}."""
    scripts = [s for s in SCRIPTS if s in record]
    cells = [["fault", *(f"`{s}`" for s in scripts)], ["---"] * (len(scripts) + 1)]
    for name in FAULTS:
        row = [record[s]["faults"].get(name, {"tried": 0}) for s in scripts]
        if any(cell["tried"] for cell in row):
            cells.append([name.replace("_", " ")])
            cells[-1] += [f"{cell['passed']}/{cell['tried']}" if cell["tried"] else "–" for cell in row]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def write_readme(path: Path, text: str) -> None:
    """Put `text` between the two marks of the page."""
    claims.replace_between(path, MARKS, text)


def try_fault(scene: Scene, fault: str) -> dict:
    """What the record says of one fault on one script: passed and tried, and what went wrong."""
    began = time.monotonic()
    tries = list(FAULTS[fault](scene))
    hidden = (str(scene.folder), str(scene.shared))
    failures = [f"try {i}: {text}" for i, text in enumerate(tries) if text]
    for path in hidden:
        failures = [text.replace(path, "") for text in failures]
    count = f"{tries.count('')}/{len(tries)}" if tries else "–"
    seconds = f"{time.monotonic() - began:.0f} s"
    print(f"{scene.script.file:22s} {fault:20s} {count:6s} {seconds}", *failures, sep="\n  ", flush=True)
    return {"passed": tries.count(""), "tried": len(tries), "failures": failures}


def try_script(script: Script, faults: list[str], folder: Path) -> None:
    """All `faults` on one script; what came out is in FOLDER/NAME.json."""
    (home := folder / script.file).mkdir()
    core.CACHE = home / "cache"
    scene = Scene(script, home, folder)
    core.write_json(folder / f"{script.file}.json", {fault: try_fault(scene, fault) for fault in faults})
    shutil.rmtree(home)


def try_all(names: list[str], faults: list[str], folder: Path, jobs: int) -> dict:
    """Script -> fault -> what came out, `jobs` scripts at a time, each in a process of its own."""
    waiting, running = list(names), {}  # pid -> script
    while waiting or running:
        while waiting and len(running) < jobs:
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    try_script(SCRIPTS[waiting[0]], faults, folder)
                    code = 0
                except SystemExit as error:
                    print(error, file=sys.stderr, flush=True)
                finally:
                    os._exit(code)
            running[pid] = waiting.pop(0)
        pid, status = os.wait()
        if status:
            print(f"{running[pid]}: ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr, flush=True)
        del running[pid]
    files = {name: folder / f"{name}.json" for name in names}
    absent = [name for name, file in files.items() if not file.exists()]
    core.require(not absent, f"the faults of {', '.join(absent)} were not tried to the end", core.CHECK_FAILED)
    return {name: json.loads(file.read_text()) for name, file in files.items()}


def make_shared(folder: Path) -> None:
    """What the faults of several scripts use: two small models, the second with more tokens than embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, tokenizer = core.load_backbone("tiny")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):  # a run starts from the state that a new interpreter has
        small = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, eos_token_id=2))
    small.save_pretrained(folder / "small_model")
    tokenizer.save_pretrained(folder / "small_model")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", action="append", choices=SCRIPTS, help="this script only (may be repeated)")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="this fault only (may be repeated)")
    parser.add_argument("--jobs", type=int, default=2, help="scripts at a time (default: 2)")
    parser.add_argument("--out", type=Path, help="write the counts as JSON; those of scripts not tried now stay")
    parser.add_argument("--readme", type=Path, help="replace the table in this page")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: no run would see a Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for module in "accelerate peft transformers.models.llama.modeling_llama torch._dynamo".split():
        importlib.import_module(module)  # once, for all children
    importlib.import_module("transformers").utils.logging.disable_progress_bar()
    record = {}
    if args.out and args.out.exists():
        record = json.loads(args.out.read_text())["scripts"]
    shm = Path("/dev/shm")  # a save waits for the disk: let there be none
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        os.chmod(folder, 0o755)
        core.CACHE = Path(folder) / "cache"
        make_shared(Path(folder))
        tried = try_all(args.script or list(SCRIPTS), args.fault or list(FAULTS), Path(folder), args.jobs)
    for name, faults in tried.items():
        earlier = record.get(name, {})
        kept = earlier["faults"] if args.fault and earlier.get("code") == code_of(name) else {}
        record[name] = {"code": code_of(name), "faults": {f: (kept | faults)[f] for f in FAULTS if f in kept | faults}}
    if args.out:
        versions = {k: v for k, v in core.environment().items() if k in ("versions", "device")}
        core.write_json(args.out, {"environment": versions, "scripts": record})
    print(table(record))
    if args.readme:
        write_readme(args.readme, table(record))
    failures = sum(len(fault["failures"]) for faults in tried.values() for fault in faults.values())
    print(f"{failures} tries were not withstood" if failures else "everything was withstood")
    return core.CHECK_FAILED if failures else 0


if __name__ == "__main__":
    sys.exit(main())
