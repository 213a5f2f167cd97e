"""The runner of the mutants on a small tree of its own, and the list against this tree."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import mutants as M
import pytest
import yaml
from conftest import ROOT

CODE = '''"""Two rules."""


def area(width, height):
    return width * height


def edge(width, height):
    return 2 * (width + height)
'''
CONFTEST = "import sys\nfrom pathlib import Path\n\nsys.path.insert(0, str(Path(__file__).parent.parent))\n"
SUITE = """import random
import time

import thing

ORDER = []


def test_area_of_a_square():
    ORDER.append(random.random())
    assert thing.area(2, 2) == 4


def test_area():
    assert thing.area(2, 3) == 6


def test_draws_are_those_of_the_unmutated_tree():
    assert random.random() == 0.8444218515250481
"""


@pytest.fixture
def tree(tmp_path):
    """A tree with one file and its tests, which know the area and have never heard of the edge."""
    root = tmp_path / "tree"
    (root / "tests").mkdir(parents=True)
    (root / "thing.py").write_text(CODE)
    (root / "tests" / "conftest.py").write_text(CONFTEST)
    (root / "tests" / "test_thing.py").write_text(SUITE)
    (root / ".pytest_cache").mkdir()
    (root / ".pytest_cache" / "left_out").touch()
    return root


def entry(name="sum", text="width * height", replacement="width + height", expected="killed", **more):
    fields = {"id": name, "file": "thing.py", "text": text, "replacement": replacement, "breaks": f"rule of {name}"}
    return fields | {"expected": expected} | more


EDGE = {"text": "2 * (width + height)", "replacement": "3 * (width + height)"}


@pytest.fixture
def judge(tree, script):
    """`judge(entry, ...)`: the finished process of the runner on the tree with this list."""

    def run(*entries, flags=()):
        (tree / "list.yaml").write_text(yaml.safe_dump(list(entries)))
        return script("tests/mutants.py", "--root", tree, "--list", tree / "list.yaml", *flags)

    return run


def test_a_killed_and_a_surviving_mutant(tree, judge):
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    done = judge(entry(), entry("edge", **EDGE))
    assert done.returncode == 1, done.stderr
    assert "unmutated: 3 tests" in done.stdout
    assert "| `thing.py` | 1/2 |" in done.stdout and "survives: edge: rule of edge" in done.stdout
    killed = next(line for line in done.stdout.splitlines() if line.startswith("killed"))
    assert killed.split() == ["killed", "sum", "tests/test_thing.py::test_area"]  # 2 + 2 = 2 * 2 had passed before it
    assert "2 mutants in" in done.stdout
    after = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {tree / "list.yaml"} and all(after[p] == before[p] for p in before)


def test_exit_code_says_whether_all_is_as_listed(judge):
    edge = entry("edge", **EDGE, expected="survives")
    done = judge(entry(), edge)
    assert done.returncode == 0 and "survives (as listed): edge" in done.stdout
    done = judge(entry(expected="survives"), edge)
    assert done.returncode == 1 and "dies though listed as a survivor: sum" in done.stdout
    assert judge(entry(), entry("edge", **EDGE), flags=("--id", "sum")).returncode == 0


def test_named_tests_run_first_and_the_others_only_if_they_do_not_kill(judge):
    square = ["tests/test_thing.py::test_area_of_a_square"]
    done = judge(entry("node", tests=["tests/test_thing.py::test_area"]), entry("k", tests="area and not square"))
    assert done.returncode == 0 and done.stdout.count("unmutated: 1 tests") == 2
    done = judge(entry("too-weak", tests=square))
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[:4]] == [
        "unmutated:",
        "survives",
        "unmutated:",
        "killed",
    ]
    done = judge(entry("nothing", tests="no_test_is_called_so"))
    assert done.returncode == 1 and "no mutant is judged" in done.stderr


def test_nothing_is_judged_if_the_unmutated_tests_fail(tree, judge):
    (tree / "thing.py").write_text(CODE.replace("width * height", "width * height + 1"))
    done = judge(entry())
    assert done.returncode == 1
    assert "no mutant is judged" in done.stderr and "killed" not in done.stdout


def test_a_mutant_that_cannot_be_imported_or_never_ends(judge):
    done = judge(entry("name", text='"""Two rules."""', replacement="x = y"))
    assert done.returncode == 1 and "can no longer be imported" in done.stdout
    job = M.Job(["tests"], limit=30.0, mutant=M.Mutant(**entry()), timed_out=True, code=-9)
    assert M.verdict_of(job).killed and M.verdict_of(job).by == "no end within 30 s"
    job = M.Job(["tests"], limit=30.0, mutant=M.Mutant(**entry()), code=-11)
    assert M.verdict_of(job).killed and "code -11" in M.verdict_of(job).by


HOLDER = """import fcntl, sys, time
held = open(sys.argv[1], "w")
fcntl.flock(held, fcntl.LOCK_EX)
held.write("held")
held.flush()
time.sleep(600)
"""
DRIVER = """import sys, time
from pathlib import Path
import mutants as M
tree, place, held = map(Path, sys.argv[1:])
pid = M.start(M.Job(["tests/test_thing.py"], 60.0), M.Slot(place, tree), tree, place / "cache", {})
while not held.exists() or not held.read_text():
    time.sleep(0.05)
M.end_group(pid)
"""


def holds_a_lock(tree, held):
    """Make the tree's one test start a process that takes a lock on `held` and would sleep."""
    holder = [sys.executable, "-c", HOLDER, str(held)]
    (tree / "tests" / "test_thing.py").write_text(
        f"import subprocess\n\ndef test_x():\n    subprocess.run({holder!r})\n"
    )


def is_freed(held) -> bool:
    with open(held) as file:
        for _ in range(600):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.1)
    return False


def test_a_run_is_ended_with_what_it_started(tree, tmp_path):
    held = tmp_path / "held"
    holds_a_lock(tree, held)
    words = [sys.executable, "-c", DRIVER, str(tree), str(tmp_path / "slot"), str(held)]
    subprocess.run(words, cwd=ROOT / "tests", check=True, timeout=120)
    assert is_freed(held)


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_runner_leaves_nothing_behind(signum, code, tree, tmp_path):
    held, places = tmp_path / "held", tmp_path / "places"
    places.mkdir()
    holds_a_lock(tree, held)
    (tree / "list.yaml").write_text(yaml.safe_dump([entry()]))
    words = [sys.executable, ROOT / "tests" / "mutants.py", "--root", tree, "--list", tree / "list.yaml"]
    runner = subprocess.Popen(words, env=os.environ | {"TMPDIR": str(places)})
    while not held.exists() or not held.read_text():
        assert runner.poll() is None
        time.sleep(0.05)
    runner.send_signal(signum)
    assert runner.wait(60) == code and is_freed(held) and not list(places.iterdir())


@pytest.mark.parametrize(
    "entries, says",
    [
        ([entry(text="width")], "stands 4 times"),
        ([entry(text="depth")], "stands 0 times"),
        ([entry(replacement="width  *  height")], "changes no code"),
        ([entry(replacement="width *")], "no longer parses"),
        ([entry(), entry()], "this id stands 2 times"),
        ([entry(expected="dies")], "must be killed or survives"),
        ([entry(tests=["tests/test_other.py::test_x"])], "there is no tests/test_other.py"),
        ([entry(tests=["tests/test_thing.py::test_gone"])], "there is no tests/test_thing.py::test_gone"),
        ([entry(file="other.py")], "there is no other.py"),
        ([{"id": "short"}], "missing ['breaks', 'expected'"),
        ([entry(why="no such field")], "unknown ['why']"),
    ],
)
def test_a_wrong_list_is_refused(entries, says, tree, capsys):
    (tree / "list.yaml").write_text(yaml.safe_dump(entries))
    assert M.main(["--root", str(tree), "--list", str(tree / "list.yaml")]) == 2
    assert says in capsys.readouterr().err


def test_too_few_mutants_of_a_script_are_refused(tree, monkeypatch):
    monkeypatch.setitem(M.TESTS, "thing.py", ["tests/test_thing.py"])
    with pytest.raises(M.WrongList, match=r"thing\.py: 1 mutants, but at least 15"):
        M.validate([M.Mutant(**entry())], tree)


def test_a_copy_is_complete_and_finds_the_shared_data(tree, tmp_path):
    (tree.parent / "shared").mkdir()
    (tree.parent / "shared" / "data.txt").write_text("data")
    M.snapshot(tree, tmp_path / "original")
    slot = M.Slot(tmp_path / "slot", tree)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tokens").touch()
    slot.fill(tmp_path / "original", M.Mutant(**entry()), tmp_path / "cache")
    assert (slot.tree.parent / "shared" / "data.txt").read_text() == "data"
    assert (slot.tree / "thing.py").read_text() == CODE.replace("width * height", "width + height")
    assert (slot.cache / "tokens").exists() and not (slot.tree / ".pytest_cache").exists()
    (slot.tree / "thing.py").write_text("rubbish")
    slot.fill(tmp_path / "original", None, tmp_path / "cache")
    assert (slot.tree / "thing.py").read_text() == CODE
    assert "tests/mutants.py" in M.files_of(ROOT) and not any(".venv" in name for name in M.files_of(ROOT))


def test_the_list_fits_this_tree():
    """Every text stands exactly once in its file, every replacement changes code, every script has its number."""
    listed = M.read_list(M.LIST)
    M.validate(listed, ROOT)
    scripts = {path.name for path in ROOT.glob("*.py") if "def main(" in path.read_text()} - {"bench.py", "claims.py"}
    assert scripts | {"core.py"} == set(M.TESTS)
