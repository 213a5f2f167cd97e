"""Every command in README.md and docs/*.md must be one that the scripts accept."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

import claims

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """(page, command) of every line in a code block, of every `command` in back ticks that runs something, and of every
    row of the claims."""
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
        lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        inline = re.findall(r"`((?:python|bash|torchrun|make) [^`]+)`", prose)
        yield from ((page.name, line) for line in [*lines, *inline] if line)
    for row in claims.load(ROOT / "claims.yaml")["claims"]:
        figures = [row[s] for s in claims.SUBJECTS if s in row] + row["nulls"] + row.get("controls", [])
        yield from (("claims.yaml", command) for command in {f["command"] for f in figures if "command" in f})


def parses(words):
    """A command of words is one that its script accepts; a sweep prints its commands, each of which is."""
    settings = dict(w.split("=", 1) for w in words if re.fullmatch(r"[A-Z_]+=.*", w))
    words = [w for w in words if not re.fullmatch(r"[A-Z_]+=.*", w)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[0] == "bash":
        env = os.environ | settings | {"DRY": "1"}
        done = subprocess.run(["bash", str(ROOT / words[1]), *words[2:]], capture_output=True, text=True, env=env)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
        for line in done.stdout.splitlines():
            parses(shlex.split(line))
    else:
        assert words[0] in ("python", "torchrun", "accelerate")
        program = next(i for i, w in enumerate(words) if w.endswith(".py"))
        flags = words[program + 1 :]
        if words[program].startswith("tests/"):
            assert (ROOT / words[program]).exists()
        elif "--help" not in flags and "..." not in flags:
            importlib.import_module(words[program].removesuffix(".py").replace("/", ".")).parse(flags)


def test_every_command_parses():
    checked = 0
    for page, command in commands():
        try:
            parses(shlex.split(command))
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}: {command}: {error}") from error
        checked += 1
    assert checked >= 150


DOCUMENTED = sorted((ROOT / "tests" / "documented").glob("*.tsv"))
RUNS = r"^[\s$]*(?:[A-Z_]+=\S+ )*(?:python3?|bash|sh|torchrun|accelerate launch) \S*\.(?:py|sh)\b"


def documented(path):
    """(line, the document's command, ours, why there is none) of each row of a table of documented commands."""
    rows = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
    return [(int(row[0]), row[1], row[2], row[3] if len(row) > 3 else "") for row in rows]


def flags(command):
    return {w.split("=")[0].replace("-", "_") for w in shlex.split(command, comments=True) if w.startswith("--")}


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda p: p.stem)
def test_a_documented_command_runs_under_our_scripts_name(path):
    """With our script's name in its place each parses, with every flag that the document gives."""
    assert len(DOCUMENTED) == 5
    ours = [row for row in documented(path) if row[2] != "-"]
    assert len(ours) >= 2 and all(why for _, _, mine, why in documented(path) if mine == "-")
    for line, theirs, mine, why in ours:
        assert why or flags(theirs) <= flags(mine), (line, flags(theirs) - flags(mine))
        try:
            parses(shlex.split(mine))
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{path.stem}, line {line}: {mine}: {error}") from error


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda p: p.stem)
def test_no_command_of_a_document_is_left_out(path):
    documents = sorted((ROOT.parent / "shared" / "documents").glob("*.txt"))
    if not documents:
        pytest.skip("the documents are not here")
    order = ("cfhot", "hst", "cognate", "afrb", "latentwire")
    text = documents[order.index(path.stem)].read_text().splitlines()
    named = {row[0] for row in documented(path)}
    for number, line in enumerate(text, 1):
        assert number in named or not re.match(RUNS, line), (number, line)
    for number, theirs, _, _ in documented(path):
        first = theirs.split()[0]
        assert first in text[number - 1], (number, theirs)


SWEEPS = [
    p.relative_to(ROOT)
    for p in [*sorted(ROOT.glob("scripts/*.sh")), ROOT / "compression_suite.sh"]
    if p.stem not in ("demo", "latentwire_squad")  # the latter is two runs on a file that is given
]
NO_TRAINING = {"report", "status", "lanes", "hst", "cognate", "--recall-curve", "pytest", "bench.py"}


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_a_sweep_can_be_tried_at_smoke_size(sweep):
    words = ["bash", str(ROOT / sweep), *(["controls"] if sweep.stem == "afrb_sweep" else [])]
    env = os.environ | {"DRY": "1", "TEST": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    runs = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("python")]
    assert done.returncode == 0 and len(runs) >= 2
    for run in runs:
        assert "--test" in run or NO_TRAINING & set(run), run


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


FIRST = {
    "phase_a_validation": [],
    "phase_b_8b_adapters": [],
    "pretrain_backbone": ["--kind", "reader"],
    "afrb_train": ["--task", "needle", "--enable-pvm"],
    "latentwire_stage1": ["--mode", "phase1b"],
    "train_phase1_cognate": ["--model", "reasoning"],
    "hst_train": ["--variant", "v6"],
}


@pytest.mark.parametrize("name", FIRST)
def test_help_opens_with_commands_and_says_what_an_unset_flag_means(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit):
        module.parse(["--help"])
    text = capsys.readouterr().out
    assert "(default: None)" not in text and "(default: )" not in text and "(default: False)" not in text
    assert text.index(module.__doc__.splitlines()[0]) < text.index(f"python {name}.py") < text.index("options:")
    assert text.rindex("\nrun:") > max(
        text.index(f"\n{f.metadata['group']}:") for f in dataclasses.fields(module.Args) if f.metadata["group"] != "run"
    )
    unset = [f for f in dataclasses.fields(module.Args) if f.default is None or f.default == ""]
    assert len(unset) >= 3
    for f in unset:
        assert re.search(r"unset\b", f.metadata["help"]), f.name


@pytest.mark.parametrize("name", FIRST)
def test_dry_run_counts_and_touches_nothing(name, tmp_path, monkeypatch, capsys):
    """What --dry_run says ends in JSON: how much is trained, on how many tokens, and how much memory that takes."""
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    plan = module.main([*FIRST[name], "--test", "--dry_run"])
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("\n{") if not shown.startswith("{") else 0 :]) == json.loads(json.dumps(plan))
    plan = plan.get("cf_hot") or plan.get("reasoning") or plan
    sizes = [value for key, value in plan.items() if "parameters" in key or key == "adapters"]
    numbers = [n for size in sizes for n in (size.values() if isinstance(size, dict) else [size])]
    assert numbers and max(numbers) > 0 and plan["memory_gb"]["total"] > 0 and "time" not in plan
