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
    found = json.loads((tmp_path / "faults.json").read_text())["latentwire_stage1"]
    assert found["counts"] == {"flipped_byte": [1, 1], "changed_flag": [1, 1]} and found["failures"] == []
    assert "| flipped byte | 1/1 |" in capsys.readouterr().out


def test_what_is_not_withstood_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(core, "check_same_config", lambda *_: None)
    assert F.main([*FEW, "--out", str(tmp_path / "faults.json")]) == core.CHECK_FAILED
    found = json.loads((tmp_path / "faults.json").read_text())["latentwire_stage1"]
    assert found["counts"] == {"flipped_byte": [1, 1], "changed_flag": [0, 1]}
    assert found["failures"][0].startswith("changed_flag, try 0: exit 0 instead of 2")
    assert "| changed flag | 0/1 |" in capsys.readouterr().out


def test_the_readme_shows_what_was_recorded():
    record = json.loads(RECORD.read_text())
    page = (ROOT / "README.md").read_text()
    assert page.split(F.MARKS[0])[1].split(F.MARKS[1])[0].strip() == F.table(record)
    assert list(record) == list(F.SCRIPTS)
    for name, found in record.items():
        assert found["failures"] == [] and found["environment"]["uncommitted_changes"] is False, name
        assert all(passed == tried for passed, tried in found["counts"].values()), name
    assert not re.search(r"/(work|root|home|tmp|dev)/", RECORD.read_text())


def test_the_table_is_replaced_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{F.MARKS[0]}\nold\n{F.MARKS[1]}\nafter\n")
    record = {"hst_train": {"counts": {"truncated": [3, 4], "bad_data": [0, 0]}}}
    F.write_readme(page, F.table(record))
    rows = "| fault | `hst_train` |\n| --- | --- |\n| truncated | 3/4 |"
    assert page.read_text() == f"before\n{F.MARKS[0]}\n{rows}\n{F.MARKS[1]}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(core.Failure, match="are not in it"):
        F.write_readme(page, "text")
