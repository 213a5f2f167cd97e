"""Every command in README.md and docs/*.md must be one that the scripts accept."""

import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import subprocess

import pytest
import torch
import yaml
from conftest import ROOT

import core

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """(page, command) of every line in a code block, of every `command` in back ticks that runs something, and of every
    row of the claims."""
    for page in PAGES:
        text = page.read_text()
        fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
        blocks = [block for language, block in fenced if not language]
        lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        inline = re.findall(r"`((?:python|bash|torchrun|make) [^`]+)`", prose)
        yield from ((page.name, line) for line in [*lines, *inline] if line)
    for rows in yaml.safe_load((ROOT / "claims.yaml").read_text())["claims"].values():
        yield from (("claims.yaml", row["command"]) for row in rows if "command" in row)


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
            importlib.import_module(words[program].removesuffix(".py")).parse(flags)


def test_every_command_parses():
    checked = 0
    for page, command in commands():
        try:
            parses(shlex.split(command))
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}: {command}: {error}") from error
        checked += 1
    assert checked >= 150


SWEEPS = [
    p.relative_to(ROOT) for p in [*sorted(ROOT.glob("scripts/*.sh")), ROOT / "compression_suite.sh"] if p.stem != "demo"
]
NO_TRAINING = {"report", "--summarize", "--recall-curve", "--compare"}


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
def test_dry_run_says_what_a_run_would_take_and_touches_nothing(name, tmp_path, monkeypatch, capsys):
    """Parameters, tokens and memory; no file, no draw from the global generator."""
    module, before = importlib.import_module(name), torch.get_rng_state()
    monkeypatch.chdir(tmp_path)
    plan = module.main([*FIRST[name], "--test", "--dry_run"])
    assert not list(tmp_path.iterdir()) and torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr().out.endswith(json.dumps(plan, indent=1) + "\n")
    part = plan | (plan.get("cf_hot") or plan.get("reasoning") or {})
    assert part["memory_gb"]["total"] > 0 and "time" not in part
    assert any("param" in key for key in part) and any("token" in key for key in part)


def test_the_first_command_comes_early_and_nothing_private_is_named():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.startswith("make demo") for line in lines[:15])
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(work|root|home)/", page.read_text()), page.name


def test_the_example_script_of_the_contributing_page_runs(tmp_path, monkeypatch):
    """It learns, is causal, writes what every script writes, goes on bit for bit, and its mechanism does something."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert max(map(len, code.splitlines())) <= 120
    (tmp_path / "example_train.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    example = importlib.import_module("example_train")

    def run(name, *flags):
        return example.main(["--test", "--threads", "1", "--output_dir", str(tmp_path / name), *flags])

    result = run("on")
    rows = [json.loads(line) for line in (tmp_path / "on" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5 and result["val_loss"] < math.log(259) - 1
    assert result["causality_max_abs_diff"] == 0 and result["floors"]["bigram"] < result["floors"]["unigram"]
    assert result["steps"] == 60 and result["tokens"] == 60 * 16 * 32 and result["manifest"]["inputs"]["data"]
    before = {path: path.read_bytes() for path in (tmp_path / "on").iterdir()}
    assert run("on", "--resume") == json.loads(json.dumps(result))
    assert {path: path.read_bytes() for path in (tmp_path / "on").iterdir()} == before
    run("parts", "--max_steps", "30")
    assert run("parts", "--resume")["val_loss"] == result["val_loss"] != run("off", "--no-mean")["val_loss"]
    with pytest.raises(core.Failure, match="lr"):
        run("on", "--resume", "--lr", "1")
