"""What surrounds the scripts: licence, citation, installation, the hosted workflow."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT


@pytest.mark.parametrize("words", [["."], ["--editable", "."]], ids=["install", "editable"])
def test_an_installation_is_refused_with_what_to_do_instead(words, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "x"),
        *words,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and not (tmp_path / "x").exists()
    assert "not a package" in done.stderr and "make demo" in done.stderr and "requirements.txt" in done.stderr


def test_licence_and_citation_agree_with_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (ROOT / "LICENSE").read_text().startswith(f"{project['license']} License")
    assert citation["license"] == project["license"] == "MIT" and citation["cff-version"] == "1.2.0"
    assert citation["title"].startswith(project["name"]) and citation["authors"] and citation["message"]


def test_the_hosted_workflow_runs_the_commands_of_the_readme():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    runs = " ".join(step.get("run", "") for step in steps)
    torch = re.search(r"^torch==.*$", (ROOT / "requirements.txt").read_text(), re.M)[0]
    assert torch in runs and "make test" in runs and "make claims" in runs
    for target in re.findall(r"make (\w+)", runs):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    assert "make test" in (ROOT / "README.md").read_text() and "make test" in (ROOT / ".ci" / "run").read_text()
