"""Does broken code fail a test? Applies each mutant of tests/mutants.yaml to a copy of the tree and runs its tests.

    python tests/mutants.py                                the whole list, two at a time (make mutants)
    python tests/mutants.py --file core.py                 the mutants of one file
    python tests/mutants.py --id core-wilson-z --verbose   one mutant, and what its tests printed

An entry of the list has an `id`, the `file` it changes, a `text` that stands exactly once in that file, its
`replacement`, what that `breaks`, and what is `expected`: killed (a test fails) or survives (a known gap). `tests` may
name tests that surely kill it, as a list of node ids (tests/test_core.py::test_x) or as one -k expression: they run
first, and all fast tests of the file only if the mutant survives them.

The unmutated tree must pass the same tests before anything is judged. Exit code 1: it does not, or a mutant that should
die survives, or one that is listed as a survivor dies (then the list is out of date). Exit code 2: the list is wrong.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "mutants.yaml"
AT_LEAST = 15  # mutants of each file in the table
TESTS = {  # file: the test files that must notice what is broken in it; any other x.py has tests/test_x.py
    "core.py": ["tests/test_metrics.py", "tests/test_core.py", "tests/test_loop.py"],
    "phase_a_validation.py": ["tests/test_phase_a.py"],
    "phase_b_8b_adapters.py": ["tests/test_phase_b.py"],
    "pretrain_backbone.py": ["tests/test_backbone.py"],
    "hst_train.py": ["tests/test_hst.py"],
    "train_phase1_cognate.py": ["tests/test_cognate.py"],
    "afrb_train.py": ["tests/test_afrb.py"],
    "latentwire_stage1.py": ["tests/test_latentwire.py"],
    "latentwire_train.py": ["tests/test_latentwire_train.py"],
}
SETTINGS = {  # of every run: one thread, no network, no byte code (Python would take a mutant of equal length as known)
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
}
LIBRARIES = """hypothesis numpy torch torch._dynamo accelerate peft datasets tokenizers safetensors.torch
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto transformers.hf_argparser
    transformers.models.llama.modeling_llama transformers.models.gpt2.modeling_gpt2 transformers.generation.utils"""


# -------------------------------------------------------------------------------------------------------- the list
class WrongList(Exception):
    """The list cannot be judged: one line for each thing that is wrong with it."""


class WrongTree(Exception):
    """The unmutated tree does not pass its own tests."""


@dataclasses.dataclass
class Mutant:
    """One entry of the list."""

    id: str
    file: str
    text: str
    replacement: str
    breaks: str
    expected: str
    tests: list | str = ()

    def applied(self, source: str) -> str:
        return source.replace(self.text, self.replacement)

    def selection(self) -> list[str]:
        """What pytest is told so that it runs `tests` alone; all tests of the file where none are named."""
        if isinstance(self.tests, str):
            return [*tests_of(self.file), "-k", self.tests]
        return list(self.tests) or tests_of(self.file)


def tests_of(file: str) -> list[str]:
    return TESTS.get(file, [f"tests/test_{Path(file).stem}.py"])


def read_list(path: Path) -> list[Mutant]:
    """The entries of the list at `path`."""
    entries = yaml.safe_load(path.read_text()) or []
    known = {field.name for field in dataclasses.fields(Mutant)}
    wrong = []
    for number, entry in enumerate(entries, start=1):
        missing, unknown = sorted(known - {"tests"} - set(entry)), sorted(set(entry) - known)
        if missing or unknown:
            wrong.append(f"entry {number} ({entry.get('id')}): missing {missing}, unknown {unknown}")
    if wrong:
        raise WrongList("\n".join(wrong))
    return [Mutant(**entry) for entry in entries]


def fault_of(mutant: Mutant, root: Path) -> str:
    """What is wrong with one entry, or nothing."""
    path = root / mutant.file
    if not path.is_file():
        return f"there is no {mutant.file}"
    source = path.read_text()
    count = source.count(mutant.text)
    if count != 1:
        return f"its text stands {count} times in {mutant.file}, not once"
    part = statement_with(source, source.index(mutant.text), len(mutant.text))
    try:
        if ast.dump(ast.parse(mutant.applied(part))) == ast.dump(ast.parse(part)):
            return "its replacement changes no code"
    except SyntaxError as error:
        return f"{mutant.file} no longer parses with its replacement: {error}"
    if mutant.expected not in ("killed", "survives"):
        return f"expected: {mutant.expected}, but it must be killed or survives"
    if not mutant.breaks.strip():
        return "it does not say what it breaks"
    missing = [word for word in mutant.selection() if ".py" in word and not is_test(word, root)]
    return f"there is no {missing[0]}" if missing else ""


@functools.cache
def statements(source: str) -> list[tuple[int, int]]:
    """Where each function, class and other statement at the top of a file begins and ends."""
    lines = [0]
    for line in source.split("\n"):
        lines.append(lines[-1] + len(line) + 1)
    nodes = ast.parse(source).body
    first = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) for node in nodes]
    return [(lines[begin - 1], lines[node.end_lineno]) for begin, node in zip(first, nodes)]


def statement_with(source: str, at: int, length: int) -> str:
    """The statement of the file that holds the text at `at`, which is parsed far sooner than all; else the source."""
    for begin, end in statements(source):
        if begin <= at and at + length <= end:
            return source[begin:end]
    return source


def is_test(node: str, root: Path) -> bool:
    """Whether `node` is a test file of the tree, or a test function in one: tests/test_x.py::test_y[case]."""
    path, *names = node.split("[")[0].split("::")
    file = root / path
    return file.is_file() and (not names or f"def {names[-1]}(" in file.read_text())


def validate(mutants: list[Mutant], root: Path) -> None:
    """Raise `WrongList` unless every entry can be applied to the tree at `root` and every script has its number."""
    wrong = [f"{m.id}: {fault}" for m in mutants if (fault := fault_of(m, root))]
    wrong += [f"{name}: this id stands {n} times" for name, n in Counter(m.id for m in mutants).items() if n > 1]
    per_file = Counter(m.file for m in mutants)
    for file in TESTS:
        if (root / file).exists() and per_file[file] < AT_LEAST:
            wrong.append(f"{file}: {per_file[file]} mutants, but at least {AT_LEAST} are needed")
    if wrong:
        raise WrongList("\n".join(wrong))


# ---------------------------------------------------------------------------------------------- copies of the tree
def files_of(root: Path) -> list[str]:
    """What a commit of the tree would hold: all that git tracks or does not ignore. Without git: all but caches."""
    words = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    with contextlib.suppress(OSError):
        listed = subprocess.run(words, capture_output=True, text=True)
        if listed.returncode == 0:
            return [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]
    left_out = {".venv", ".git", "runs", "wandb", "__pycache__"}
    paths = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
    return [str(path) for path in paths if not any(p in left_out or p.endswith("_cache") for p in path.parts)]


def snapshot(root: Path, target: Path) -> None:
    """Copy the tree once, so that work on it may go on while its mutants are judged."""
    for name in files_of(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name, follow_symlinks=False)


class Slot:
    """Where one run of tests at a time takes place: a fresh copy of the tree, `shared` beside it as it is beside the
    original, a cache, and a folder for what the tests write."""

    def __init__(self, place: Path, root: Path):
        self.place, self.tree, self.cache = place, place / "tree", place / "cache"
        self.report, self.printed = place / "report.json", place / "printed.txt"
        place.mkdir()
        shared = root.parent / "shared"
        if shared.exists():
            (place / "shared").symlink_to(shared.resolve())

    def fill(self, original: Path, mutant: Mutant | None, cache: Path) -> None:
        """Nothing that an earlier mutant wrote is left, neither in the tree nor in the cache.

        A script's mutants find the caches that the unmutated tests filled. Core's start without: core fills them, and
        would find there what it had written before it was broken.
        """
        for folder in (self.tree, self.cache):
            shutil.rmtree(folder, ignore_errors=True)
        self.report.unlink(missing_ok=True)
        shutil.copytree(original, self.tree, symlinks=True)
        if mutant is None:
            return
        path = self.tree / mutant.file
        path.write_text(mutant.applied(path.read_text()))
        if mutant.file != "core.py" and cache.exists():
            shutil.copytree(cache, self.cache)


# ---------------------------------------------------------------------------------------------------- runs of tests
@dataclasses.dataclass
class Job:
    """A run of tests: on the unmutated tree where `mutant` is None. The lower half says how it ended."""

    selection: list[str]
    limit: float  # seconds
    mutant: Mutant | None = None

    code: int = 0  # pytest's: 0 all passed, 1 one failed, 2 interrupted, more: it could not run them
    timed_out: bool = False
    failed: str = ""  # the test that ended it
    seconds: dict = dataclasses.field(default_factory=dict)  # of each test
    printed: str = ""


class Witness:
    """A pytest plugin that notes how long each test took and which failed first. It runs the quick tests first, and
    gives a test the same random draws wherever it runs: a mutant meets those with which the unmutated tree passed."""

    def __init__(self, known_seconds: dict):
        self.known_seconds, self.seconds, self.failed = known_seconds, {}, ""

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: self.known_seconds.get(item.nodeid, 0.0))

    def pytest_runtest_setup(self, item):
        random.seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(0)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed and not self.failed:
            self.failed = report.nodeid


def run_tests(slot: Slot, selection: list[str], cache: Path, known_seconds: dict) -> int:
    """In a process of its own: pytest on the slot's tree. Writes the report and gives pytest's exit code."""
    import pytest

    printed = os.open(slot.printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.chdir(slot.tree)
    os.environ["CLAIMBENCH_CACHE"] = str(cache)
    own_places = (ROOT, ROOT / "tests")  # the copy's modules must be found, not those beside this file
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in own_places]
    sys.dont_write_bytecode = True
    witness = Witness(known_seconds)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain", "-m", "not slow"]
    code = pytest.main([*options, f"--basetemp={slot.place / 'tmp'}", *selection], plugins=[witness])
    slot.report.write_text(json.dumps({"failed": witness.failed, "seconds": witness.seconds}))
    return int(code)


def start(job: Job, slot: Slot, original: Path, cache: Path, known_seconds: dict) -> int:
    """Fork a process for the job and return its id. The libraries that this process has imported are there already."""
    slot.fill(original, job.mutant, cache)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()  # what it starts can then be ended with it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = run_tests(slot, job.selection, cache if job.mutant is None else slot.cache, known_seconds)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_group(pid: int) -> None:
    """End a job, if it still runs, and what it has left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def note_end(job: Job, slot: Slot, status: int) -> None:
    job.code = os.waitstatus_to_exitcode(status)
    job.printed = slot.printed.read_text(errors="replace") if slot.printed.exists() else ""
    if slot.report.exists():
        report = json.loads(slot.report.read_text())
        job.failed, job.seconds = report["failed"], report["seconds"]


def run_all(jobs: list[Job], slots: list[Slot], original: Path, cache: Path, known_seconds: dict, say) -> None:
    """Make every run, one at a time in each slot; `say(job)` is called as each ends."""
    waiting, free, running = list(jobs), list(slots), {}
    try:
        while waiting or running:
            while waiting and free:
                job, slot = waiting.pop(0), free.pop()
                pid = start(job, slot, original, cache, known_seconds)
                running[pid] = (job, slot, time.monotonic() + job.limit)
            time.sleep(0.02)
            for pid, (job, slot, deadline) in list(running.items()):
                job.timed_out = time.monotonic() > deadline
                if job.timed_out:
                    end_group(pid)
                ended, status = os.waitpid(pid, 0 if job.timed_out else os.WNOHANG)
                if ended:
                    end_group(pid)
                    del running[pid]
                    free.append(slot)
                    note_end(job, slot, status)
                    say(job)
    finally:
        for pid in running:
            end_group(pid)
            os.waitpid(pid, 0)


# ---------------------------------------------------------------------------------------------------- the judgement
@dataclasses.dataclass
class Verdict:
    """Whether a mutant died, by which test; or why that cannot be said."""

    mutant: Mutant
    killed: bool
    by: str = ""
    fault: str = ""

    @property
    def as_expected(self) -> bool:
        return not self.fault and self.killed == (self.mutant.expected == "killed")


def verdict_of(job: Job) -> Verdict:
    """A failed test kills, and so does a test that never ends or that ends the whole process."""
    if job.timed_out:
        return Verdict(job.mutant, True, by=f"no end within {job.limit:.0f} s")
    if job.code == 0:
        return Verdict(job.mutant, False)
    if job.code in (1, 2) and job.seconds:
        return Verdict(job.mutant, True, by=job.failed or "interrupted")
    if job.code in (1, 2):
        return Verdict(job.mutant, False, fault="its file can no longer be imported, which shows nothing about tests")
    if job.code in (3, 4, 5, 70):
        return Verdict(job.mutant, False, fault=f"pytest could not run {' '.join(job.selection)}")
    return Verdict(job.mutant, True, by=f"the process ended with code {job.code}")


class Judge:
    """Runs the unmutated tests first, then each mutant against them."""

    LIMIT = 900.0  # seconds for the unmutated tests of a file, which take a minute on an idle core

    def __init__(self, slots: list[Slot], original: Path, cache: Path, verbose: bool):
        self.slots, self.original, self.cache, self.verbose = slots, original, cache, verbose
        self.seconds: dict[str, float] = {}  # of each test that the unmutated tree has passed
        self.whole: set[str] = set()  # files whose fast tests it has passed, all of them

    def run(self, jobs: list[Job], say) -> None:
        run_all(jobs, self.slots, self.original, self.cache, dict(self.seconds), say)

    def baseline(self, mutants: list[Mutant], whole: bool) -> None:
        """The unmutated tree must pass what the mutants will meet: the tests named for them, or the whole file's."""
        jobs = []
        for file in dict.fromkeys(m.file for m in mutants if m.file not in self.whole):
            of_file = [m for m in mutants if m.file == file]
            named = list(dict.fromkeys(name for m in of_file if isinstance(m.tests, list) for name in m.tests))
            words = " or ".join(dict.fromkeys(f"({m.tests})" for m in of_file if isinstance(m.tests, str)))
            if whole or any(not m.tests or m.expected == "survives" for m in of_file):
                self.whole.add(file)
                jobs.append(Job(tests_of(file), self.LIMIT))
                continue
            jobs += [Job(named, self.LIMIT)] if named else []
            jobs += [Job([*tests_of(file), "-k", words], self.LIMIT)] if words else []
        self.run(jobs, self.say_baseline)
        bad = [job for job in jobs if job.code != 0]
        if bad:
            tails = ["\n".join(job.printed.splitlines()[-40:]) for job in bad]
            raise WrongTree("\n".join([*tails, "the unmutated tree does not pass these tests, so no mutant is judged"]))
        for job in jobs:
            self.seconds |= job.seconds

    def limit(self, selection: list[str]) -> float:
        """Seconds after which a run that does not end counts as killed: far beyond what the unmutated tests took."""
        chosen = [s for test, s in self.seconds.items() if test.startswith(tuple(selection))]
        return 30.0 + 5.0 * sum(chosen)

    def meet(self, mutants: list[Mutant], whole: bool) -> list[Verdict]:
        """Each mutant against its named tests, or against the whole file's."""
        verdicts = []

        def say(job: Job) -> None:
            verdict = verdict_of(job)
            verdicts.append(verdict)
            word = "wrong" if verdict.fault else "killed" if verdict.killed else "survives"
            print(f"{word:9}{job.mutant.id:44} {verdict.by or verdict.fault}", flush=True)
            if self.verbose or verdict.fault:
                print(job.printed, flush=True)

        selections = [tests_of(m.file) if whole else m.selection() for m in mutants]
        self.run([Job(words, self.limit(words), m) for words, m in zip(selections, mutants, strict=True)], say)
        return verdicts

    def say_baseline(self, job: Job) -> None:
        said = f"{len(job.seconds)} tests, {sum(job.seconds.values()):.0f} s"
        print(f"unmutated: {said}, exit code {job.code}: {' '.join(job.selection)[:80]}", flush=True)

    def judge(self, mutants: list[Mutant]) -> list[Verdict]:
        self.baseline(mutants, whole=False)
        verdicts = self.meet(mutants, whole=False)
        again = [v.mutant for v in verdicts if not v.killed and not v.fault and v.mutant.tests]
        if again:
            self.baseline(again, whole=True)
            verdicts = [v for v in verdicts if v.mutant not in again] + self.meet(again, whole=True)
        return verdicts


def table(verdicts: list[Verdict]) -> str:
    """Killed of all for each file, then what survives and what it breaks."""
    lines = ["", "| file | killed |", "| --- | --- |"]
    for file in dict.fromkeys(v.mutant.file for v in verdicts):
        of_file = [v for v in verdicts if v.mutant.file == file]
        lines.append(f"| `{file}` | {sum(v.killed for v in of_file)}/{len(of_file)} |")
    lines.append(f"| all | {sum(v.killed for v in verdicts)}/{len(verdicts)} |")
    for v in verdicts:
        if v.fault:
            lines.append(f"WRONG: {v.mutant.id}: {v.fault}")
        elif not v.killed:
            known = " (as listed)" if v.as_expected else ""
            lines.append(f"survives{known}: {v.mutant.id}: {v.mutant.breaks}")
        elif not v.as_expected:
            lines.append(f"dies though listed as a survivor: {v.mutant.id}: set `expected: killed` (by {v.by})")
    return "\n".join(lines)


def import_libraries() -> None:
    """Import once what every run needs, so that the forked processes start at once; what is not installed is left."""
    for name in LIBRARIES.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def main(argv=None) -> int:
    """Judge the list and print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", action="append", default=[], help="only mutants of this file (repeatable)")
    parser.add_argument("--id", action="append", default=[], help="only this mutant (repeatable)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--list", type=Path, default=LIST, help="another list")
    parser.add_argument("--root", type=Path, default=ROOT, help="another tree")
    parser.add_argument("--verbose", action="store_true", help="show what the tests print")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    try:
        mutants = read_list(args.list)
        validate(mutants, args.root)
        chosen = [m for m in mutants if (not args.file or m.file in args.file) and (not args.id or m.id in args.id)]
        if not chosen:
            raise WrongList("no mutant of the list was chosen")
        os.environ.update(SETTINGS)
        if args.root == ROOT:
            import_libraries()
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            work = Path(folder)
            snapshot(args.root, work / "original")
            slots = [Slot(work / f"slot{i}", args.root) for i in range(args.jobs)]
            verdicts = Judge(slots, work / "original", work / "cache", args.verbose).judge(chosen)
    except (WrongList, WrongTree) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, WrongList) else 1
    except KeyboardInterrupt:
        return 130
    print(table(verdicts))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes, cores = (time.monotonic() - begin) / 60, (used.ru_utime + used.ru_stime) / 60
    print(f"{len(verdicts)} mutants in {minutes:.1f} minutes, {cores:.1f} core-minutes of tests")
    return 0 if all(v.as_expected for v in verdicts) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not at once: what runs is ended, the copies removed
    sys.exit(main())
