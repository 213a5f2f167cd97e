"""Every command in README.md and docs/*.md must be one that the scripts accept."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """(page, command) of every line in a code block, and of every `command` in back ticks that runs something."""
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
        lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        inline = re.findall(r"`((?:python|bash|torchrun|make) [^`]+)`", prose)
        yield from ((page.name, line) for line in [*lines, *inline] if line)


def test_every_command_parses():
    checked = 0
    for page, command in commands():
        words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", w)]
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), (page, command)
        elif words[0] == "bash":
            assert (ROOT / words[1]).exists(), (page, command)
        else:
            program = next(i for i, w in enumerate(words) if w.endswith(".py"))
            assert words[0] in ("python", "torchrun", "accelerate"), (page, command)
            module, flags = importlib.import_module(words[program].removesuffix(".py")), words[program + 1 :]
            if "--help" in flags or "..." in flags or module.__name__ == "claims":
                continue
            if module.__name__ == "bench":
                module.core.parse_args(module.Args, {}, flags)
            else:
                module.parse(flags)
        checked += 1
    assert checked >= 25


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_first_command_comes_early_and_nothing_private_is_named():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.startswith("make demo") for line in lines[:15])
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(work|root|home)/", page.read_text()), page.name
