"""The fault suite itself: it passes what is withstood, reports what is not, and the README shows what was recorded."""

import json
import re

import faults as F
import pytest
from conftest import ROOT

import core

RECORD = ROOT / "docs" / "results" / "faults" / "faults.json"
FEW = ("--script", "latentwire_stage1", "--fault", "flipped_byte", "--fault", "changed_flag")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    monkeypatch.setattr(core, "CACHE", core.CACHE)  # the suite sets its own


def test_what_is_withstood_is_counted(tmp_path, capsys):
    assert F.main([*FEW, "--out", str(tmp_path / "faults.json")]) == 0
    found = json.loads((tmp_path / "faults.json").read_text())["scripts"]["latentwire_stage1"]
    assert list(found) == ["flipped_byte", "changed_flag"]
    assert all((f["passed"], f["tried"], f["failures"]) == (1, 1, []) for f in found.values())
    assert "| flipped byte | 1/1 |" in capsys.readouterr().out


def test_what_is_not_withstood_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(core, "check_same_config", lambda *_: None)
    assert F.main([*FEW, "--out", str(tmp_path / "faults.json")]) == core.CHECK_FAILED
    found = json.loads((tmp_path / "faults.json").read_text())["scripts"]["latentwire_stage1"]
    assert [f["passed"] for f in found.values()] == [1, 0]
    assert found["changed_flag"]["failures"][0].startswith("try 0: exit 0 instead of 2")
    assert "| changed flag | 0/1 |" in capsys.readouterr().out


def test_the_readme_shows_what_was_recorded():
    record = json.loads(RECORD.read_text())["scripts"]
    page = (ROOT / "README.md").read_text()
    assert page.split(F.MARKS[0])[1].split(F.MARKS[1])[0].strip() == F.table(record)
    assert record and set(record) == set(F.SCRIPTS)
    for name, faults in record.items():
        for fault, found in faults.items():
            assert found["passed"] == found["tried"] and not found["uncommitted_changes"], (name, fault)
    assert not re.search(r"/(work|root|home|tmp|dev)/", RECORD.read_text())


def test_the_table_is_replaced_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{F.MARKS[0]}\nold\n{F.MARKS[1]}\nafter\n")
    record = {"hst_train": {"truncated": {"passed": 3, "tried": 4}, "bad_data": {"passed": 0, "tried": 0}}}
    F.write_readme(page, F.table(record))
    rows = "| fault | `hst_train` |\n| --- | --- |\n| truncated | 3/4 |"
    assert page.read_text() == f"before\n{F.MARKS[0]}\n{rows}\n{F.MARKS[1]}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(core.Failure, match="are not in it"):
        F.write_readme(page, "text")
