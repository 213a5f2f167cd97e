"""Every command in README.md and docs/*.md must be one that the scripts accept."""

import importlib
import os
import re
import shlex
import subprocess

import pytest
import yaml
from conftest import ROOT

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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_first_command_comes_early_and_nothing_private_is_named():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.startswith("make demo") for line in lines[:15])
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(work|root|home)/", page.read_text()), page.name
