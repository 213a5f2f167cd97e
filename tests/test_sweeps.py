"""Every sweep skips, goes on after a failure, and ends when it is interrupted; a stub stands in for Python."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

# Records its command, then does what the first matching rule says: "exit CODE", "hang" until a signal comes, or
# "nothing" at all. Without a rule it writes the result file of its script and ends well. A signal is recorded, and so
# is the end of the save that follows it.
STUB = """#!{python} -SE
import os, signal, sys, time
record = lambda line: os.write(os.open({calls!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT), (line + "\\n").encode())
words = sys.argv[1:]
command = " ".join(words)
record(command)
rule = next((rule for part, rule in {rules!r} if part in command), "")
def saves(signum, frame):
    record(f"signal {{signum}}")
    time.sleep(0.3)
    record("saved")
    os._exit(128 + signum)
if rule == "hang":
    signal.signal(signal.SIGINT, saves)
    signal.signal(signal.SIGTERM, saves)
    record("hangs")
    while True:
        time.sleep(0.01)
if rule.startswith("exit"):
    sys.exit(int(rule.split()[1]))
for flag, name in {results!r}.get(words[0], ()):
    if flag in words and not rule:
        path = os.path.join(words[words.index(flag) + 1], name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").write('{{"status": "ok"}}')
"""
RESULTS = {  # script: its flag for the directory, and its result file
    "phase_a_validation.py": [("--output_dir", "phase_a_results.json")],
    "phase_b_8b_adapters.py": [("--output_dir", "phase_b_results.json")],
    "pretrain_backbone.py": [("--output_dir", "backbone_results.json")],
    "afrb_train.py": [("--save", "metrics.json")],
    "train_phase1_cognate.py": [("--checkpoint-dir", "reasoning/cognate_results.json")],
    "latentwire_stage1.py": [("--save_dir", "summary.json")],
    "latentwire_train.py": [("--save_dir", "wire_results.json")],
    "hst_train.py": [("--save_dir", "hst_results.json")],
    "scripts/originals.py": [("--output_dir", "originals_results.json")],
}
SHORT = {"SEEDS": "0 1 2", "BUDGETS": "8 16 32", "VARIANTS": "plain v6", "RATES": "1e-3", "LAMBDAS": "0 0.1 0.5"}
SQUAD = ROOT / "scripts/latentwire_squad.sh"  # two runs on a file that is given
SWEEPS = [p for p in [*sorted(ROOT.glob("scripts/*.sh")), ROOT / "compression_suite.sh"] if p.stem != "demo"]
SWEEPS.remove(SQUAD)
TRAINING = "|".join(RESULTS)
TABLE = re.compile(r"^(claims\.py|-)|--(summarize|compare)")  # what ends a sweep


class Stubbed:
    """A folder for the runs of a sweep, and the stub that records what the sweep starts."""

    def __init__(self, folder: Path):
        self.folder, self.calls, self.python = folder, folder / "calls", folder / "python"
        self.rules()
        names = {"MODEL": "lm", "READER": "reader", "SECOND": "second"}
        names |= {"ROOT": "runs", "PYTHON": "python", "ORIGINALS": "src"}
        self.env = os.environ | {k: str(folder / v) for k, v in names.items()} | SHORT | {"HUB": "1"}
        for name in ("lm", "reader", "second"):
            (folder / name).mkdir()
            (folder / name / "backbone_results.json").write_text("{}")

    def rules(self, **rules) -> None:
        """What the stub does: `part_of_the_command="exit 1"` and so on."""
        self.calls.write_text("")
        pairs = list(rules.items())
        text = STUB.format(python=sys.executable, calls=str(self.calls), rules=pairs, results=RESULTS)
        self.python.write_text(text)
        self.python.chmod(0o755)

    def words(self, sweep: Path, *flags) -> list[str]:
        groups = {"afrb_sweep": ["controls", "blocks"], "gpu": ["phase_a", "hst", "latentwire"]}.get(sweep.stem, [])
        return ["bash", str(sweep), *groups, *flags]

    def run(self, sweep: Path, *flags, **env) -> subprocess.CompletedProcess:
        env = self.env | env
        return subprocess.run(self.words(sweep, *flags), env=env, capture_output=True, text=True, timeout=60)

    def started(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if not re.match(r"hangs|saved|signal", line)]

    def trained(self) -> list[str]:
        return [line for line in self.started() if re.match(TRAINING, line) and not TABLE.search(line)]

    def dry(self, sweep: Path) -> list[str]:
        lines = [line.removeprefix(f"{self.python} ") for line in self.run(sweep, DRY="1").stdout.splitlines()]
        return [line for line in lines if not TABLE.search(line)]

    def begin(self, words: list[str]) -> subprocess.Popen:
        """Start a command in a process group of its own and wait until a run of it hangs."""
        process = subprocess.Popen(words, env=self.env, stdout=subprocess.PIPE, text=True, start_new_session=True)
        while "hangs" not in self.calls.read_text():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        return process


@pytest.fixture
def stub(tmp_path):
    return Stubbed(tmp_path)


def key(command: str) -> str:
    """What tells a run of a sweep from the others: its directory."""
    words = shlex.split(command)
    (flag, _), *_ = RESULTS[words[0]]
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda p: p.stem)
def test_a_sweep_starts_what_it_prints_and_nothing_twice(stub, sweep):
    printed = stub.dry(sweep)
    assert len(printed) >= 3 and not stub.started()
    done = stub.run(sweep)
    assert done.returncode == 0 and stub.trained() == printed, done.stdout + done.stderr
    assert done.stdout.count("running: ") == len(printed) and stub.started()[-1] not in printed
    stub.rules()
    done = stub.run(sweep)
    assert done.returncode == 0 and not stub.trained()
    assert done.stdout.count("done already: ") == len(printed) and stub.started()


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda p: p.stem)
def test_a_failure_is_reported_and_the_rest_goes_on(stub, sweep):
    printed = stub.dry(sweep)
    stub.rules(**{f"{key(printed[1])} ": "exit 4", key(printed[2]) + " ": "nothing"})
    done = stub.run(sweep)
    assert done.returncode == 1 and stub.trained() == printed
    assert re.findall(r"FAILED: (\S+)", done.stdout) == [key(printed[1]), key(printed[2])]  # the second left no result
    stub.rules()
    done = stub.run(sweep)
    assert done.returncode == 0 and stub.trained() == printed[1:3]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda p: p.stem)
def test_ctrl_c_ends_a_sweep_once_its_run_has_saved(stub, sweep):
    printed = stub.dry(sweep)
    stub.rules(**{f"{key(printed[1])} ": "hang"})
    process = stub.begin(stub.words(sweep))
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and f"interrupted: {key(printed[1])}" in out, out
    assert stub.started() == printed[:2]
    assert stub.calls.read_text().splitlines()[-3:] == ["hangs", f"signal {signal.SIGINT}", "saved"]  # one signal


LEAK = ROOT / "scripts/cfhot_leak.sh"


@pytest.mark.parametrize("whole_group", (True, False))
def test_sigterm_ends_a_sweep_once_its_run_has_saved(stub, whole_group):
    stub.rules(causal_s0="hang")
    process = stub.begin(stub.words(LEAK))
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and len(stub.started()) == 1
    assert stub.calls.read_text().splitlines()[1:] == ["hangs", f"signal {signal.SIGTERM}", "saved"]


@pytest.mark.parametrize("code", (130, 143))
@pytest.mark.parametrize("sweep", (LEAK, ROOT / "scripts/run_stage1b_h100.sh"), ids=lambda p: p.stem)
def test_a_run_that_was_interrupted_ends_the_sweep(stub, sweep, code):
    printed = stub.dry(sweep)
    stub.rules(**{f"{key(printed[1])} ": f"exit {code}"})
    done = stub.run(sweep)
    assert done.returncode == code and stub.started() == printed[:2] and "FAILED" not in done.stdout


def test_ctrl_c_in_the_table_is_no_ordinary_failure(stub):
    stub.rules(claims="hang")
    process = stub.begin(stub.words(LEAK))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_backbone_that_was_half_saved_is_made_again(stub):
    sweep, reader = ROOT / "scripts/run_baselines.sh", stub.folder / "reader"
    (reader / "model.safetensors").touch()
    assert stub.run(sweep, "--test").returncode == 0
    assert not [line for line in stub.started() if line.startswith("pretrain_backbone.py")]
    (reader / "backbone_results.json").unlink()
    stub.rules(pretrain_backbone="exit 4")
    done = stub.run(sweep, "--test", ROOT=str(stub.folder / "other"))
    expected = f"pretrain_backbone.py --kind reader --output_dir {reader} --resume auto"
    assert done.returncode == 1 and stub.started() == [expected]  # without it no run can succeed
    stub.rules()
    done = stub.run(sweep, "--test", ROOT=str(stub.folder / "other"))
    assert done.returncode == 0 and stub.started()[0] == expected and len(stub.trained()) == 4


CHECKPOINTS = """
for flag, name in (("--save_dir", "/adapter_phase1_best.pt"), ("--ckpt_out", "")):
    if flag in words:
        open(words[words.index(flag) + 1] + name, "w").close()
"""
# Sequences of LatentWire's document (lines 411, 3414, 3147, 4588, 5034): a sweep, and what is read after it, or what it
# is said to have written.
SEQUENCES = [
    ("run_embed_sweep_simple", ["runs/embed_sweep_simple/summary.json"]),
    (
        "run_stage1_h100",
        [f"runs/stage1_adapter_only/{f}" for f in ("adapter_phase1_best.pt", "logs/training.log", "summary.json")],
    ),
    ("run_stage1b_h100", ["runs/stage1b_phase1b/logs/training.log", "runs/stage1b_phase1b/summary.json"]),
    ("run_annealing", ["runs/phase1_warmstart/adapter.pt", "runs/phase1_anneal_warmstart/summary.json"]),
    ("test_sequence_compression", [f"runs/exp{n}/summary.json" for n in ("1_baseline", "2_pooling")]),
    ("test_sequence_compression", ["runs/exp3_pooling_lora/summary.json"]),
]


@pytest.mark.parametrize("sweep, reads", SEQUENCES, ids=[f"{s[0]}-{s[1][-1]}" for s in SEQUENCES])
def test_a_sweep_writes_where_the_document_then_reads_and_its_rm_takes_no_backbone(tmp_path, sweep, reads):
    """The document's `rm -rf runs`, its call of the sweep without settings, and what it opens then, as they stand."""
    folder, project = tmp_path / "stub", tmp_path / "project"
    folder.mkdir()
    project.mkdir()
    stub = Stubbed(folder)
    for path in ROOT.iterdir():
        if path.name not in ("runs", "backbones", ".git"):
            (project / path.name).symlink_to(path)
    stub.python.write_text(stub.python.read_text() + CHECKPOINTS)
    backbone = project / "backbones/reader"
    backbone.mkdir(parents=True)
    (backbone / "backbone_results.json").write_text("{}")
    (project / "runs").mkdir()
    env = {k: v for k, v in os.environ.items() if k not in (*SHORT, "ROOT", "OUTPUT_DIR", "TEST", "OFFLINE", "READER")}
    for settings in ({}, {"TEST": "1"}):
        command = f"rm -rf runs && PYTHONPATH=. bash scripts/{sweep}.sh"
        run = {"cwd": project, "env": env | {"PYTHON": str(stub.python)} | settings}
        done = subprocess.run(["bash", "-c", command], **run, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        if not settings:
            assert all((project / path).exists() for path in reads)
            table = shlex.split(stub.started()[-1])  # of the runs of this sweep alone
            assert table[:2] == ["claims.py", "status"] and (project / table[3]).is_dir()
            names = {p.name for p in (project / table[3]).iterdir() if p.is_dir()}
            assert sweep == "run_embed_sweep_simple" or names == {Path(key(c)).name for c in stub.trained()}
    assert not [line for line in stub.started() if line.startswith("pretrain_backbone.py")]
    assert "--model_id backbones/reader" in stub.trained()[-1] and (backbone / "backbone_results.json").exists()


GPU = ROOT / "scripts/gpu.sh"


def test_the_gpus_runs_begin_with_checks_and_end_in_slices(stub):
    stub.rules(phase_a_validation="hang")
    done = subprocess.run(["bash", str(GPU), "nonsense"], env=stub.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "unknown group: nonsense (use: checks bench" in done.stderr
    process = stub.begin(["bash", str(GPU), "checks", "bench", "phase_a"])
    begun = stub.started()
    assert begun[0].startswith("-m pytest -m slow tests/test_device.py") and begun[1].startswith("bench.py")
    os.kill(process.pid, signal.SIGTERM)  # as the timer of MINUTES does
    process.communicate(timeout=30)
    assert process.returncode == 143 and stub.calls.read_text().splitlines()[-1] == "saved"
    stub.rules()
    words = ["bash", str(GPU), "checks", "bench", "phase_a"]
    done = subprocess.run(words, env=stub.env, capture_output=True, text=True)
    assert done.returncode == 0 and "passed already" in done.stdout, done.stdout + done.stderr
    assert [line.split()[0] for line in stub.started()] == ["phase_a_validation.py"] * 3 + ["claims.py"]


def test_the_gpus_runs_end_in_time(stub):
    stub.rules(phase_a="hang")
    env = stub.env | {"MINUTES": "0.05"}  # three seconds: the first run hangs by then
    done = subprocess.run(["bash", str(GPU), "phase_a"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 143, done.stdout + done.stderr


@pytest.mark.slow
def test_the_gpus_runs_at_smoke_size_on_a_cpu(tmp_path):
    env = os.environ | {"TEST": "1", "ROOT": str(tmp_path / "gpu"), "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(GPU)], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "phase_a_s0" in done.stdout and "tokens/s" in done.stdout


def test_the_runs_on_real_questions_need_their_file(stub):
    file, env = stub.folder / "squad.json", {"OUTPUT_DIR": str(stub.folder / "squad")}
    done = stub.run(SQUAD, str(file), **env)
    assert (
        done.returncode == 2 and done.stderr == "latentwire_squad.sh: give a SQuAD v1.1 file\n" and not stub.started()
    )
    file.write_text("{}")
    printed = [shlex.split(line)[1:] for line in stub.run(SQUAD, str(file), DRY="1", **env).stdout.splitlines()]
    assert [words[0] for words in printed] == ["pretrain_backbone.py", "latentwire_stage1.py"] and not stub.started()
    done = stub.run(SQUAD, str(file), **env)
    assert done.returncode == 0 and [shlex.split(line) for line in stub.trained()] == printed, done.stdout + done.stderr
    stub.rules(pretrain="exit 4")
    done = stub.run(SQUAD, str(file), **env)
    assert done.returncode == 0 and not stub.trained() and done.stdout.count("done already: ") == 2
    (Path(env["OUTPUT_DIR"]) / "lm/backbone_results.json").unlink()
    assert stub.run(SQUAD, str(file), **env).returncode == 1


def test_a_run_whose_result_is_of_a_failure_is_not_finished(stub):
    sweep = ROOT / "scripts/afrb_sweep.sh"
    assert stub.run(sweep).returncode == 0
    stub.rules()
    (stub.folder / "runs/null_adapter/metrics.json").write_text('{"status": "diverged"}')
    assert stub.run(sweep).returncode == 0
    assert [key(line) for line in stub.trained()] == [str(stub.folder / "runs/null_adapter")]


def test_a_published_fault_may_diverge(stub):
    stub.rules(phase1b_legacy="exit 3")
    done = stub.run(ROOT / "scripts/run_stage1b_h100.sh", LEGACY="1")
    assert done.returncode == 0 and done.stdout.count("diverged, as published: ") == 3
    stub.rules(phase1b_zero="exit 3")
    assert stub.run(ROOT / "scripts/run_stage1b_h100.sh", LEGACY="1", FORCE="1").returncode == 1


def test_a_sweep_shows_the_last_lines_of_the_run_and_keeps_them_all(stub):
    sweep, log = ROOT / "scripts/run_baselines.sh", stub.folder / "runs/m8/training.log"
    said = 'case "$*" in *claims*) exit;; esac\necho step 1\necho Best F1: $NUMBER\n'
    stub.python.write_text(f"#!/bin/sh\n{said}touch {log.parent}/summary.json\n")
    for number in ("1", "2"):
        out = stub.run(sweep, BUDGETS="8", FORCE="1", NUMBER=number).stdout.splitlines()
        assert out == [f"running: {log.parent}", f"Best F1: {number}"]
    assert log.read_text().splitlines() == ["step 1", "Best F1: 1", "step 1", "Best F1: 2"]


# ------------------------------------------------------------------------------------------------------- the demo
DEMO = ROOT / "scripts/demo.sh"


def test_the_demo_skips_goes_on_and_fails_at_the_end(stub):
    stub.rules(cognate_recall="exit 1")
    parts = re.findall(r"(\w+):\d+", DEMO.read_text())
    for started in (set(parts), {"cognate_recall"}):
        stub.calls.write_text("")
        done = stub.run(DEMO, JOBS="4")
        assert set(re.findall(r"^started: (\w+)$", done.stdout, re.M)) == started and len(parts) >= 12
        assert done.returncode == 1 and re.findall(r"FAILED: (\w+)", done.stdout) == ["cognate_recall"]
        assert stub.started()[-1].startswith("claims.py report")


@pytest.mark.parametrize("signum", (signal.SIGINT, signal.SIGTERM))
def test_ctrl_c_of_the_demo_saves_every_part_and_starts_no_other(stub, signum):
    stub.rules(afrb_train="hang", cfhot_leak="hang")
    stub.env |= {"JOBS": "2"}
    process = stub.begin(["bash", str(DEMO)])
    while stub.calls.read_text().count("hangs") < 2:
        time.sleep(0.01)
    before = stub.started()
    os.killpg(process.pid, signum)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signum and "interrupted: " in out and "FAILED" not in out, out
    assert stub.started() == before and stub.calls.read_text().count("saved") == 2
    assert stub.calls.read_text().count("signal") == 2
    stub.rules()
    done = stub.run(DEMO)
    assert done.returncode == 0 and not {"lm", "reader"} & set(re.findall(r"^started: (\w+)$", done.stdout, re.M))


def test_parts_of_the_demo_end_with_ctrl_c_under_xargs(stub):
    """A person may run parts in parallel with xargs: the signal reaches each of them through the process group."""
    (stub.folder / "runs/log").mkdir(parents=True)
    stub.rules(afrb_train="hang", cfhot_leak="hang")
    command = f"printf '%s\\n' cfhot_leak afrb hst cognate | xargs -P 2 -I{{}} bash {DEMO} {{}}"
    process = stub.begin(["bash", "-c", command])
    while stub.calls.read_text().count("hangs") < 2:
        time.sleep(0.01)
    before = stub.started()
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while stub.calls.read_text().count("saved") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stub.calls.read_text().count("saved") == 2 and stub.started() == before


def test_an_interrupted_part_ends_the_demo(stub):
    stub.rules(cfhot_leak="exit 143")
    done = stub.run(DEMO, JOBS="1")
    assert done.returncode == 143 and set(re.findall(r"started: (\w+)", done.stdout)) == {"lm", "reader", "cfhot_leak"}
