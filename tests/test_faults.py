"""The fault suite itself: it passes what is withstood, reports what is not, and the README shows what was recorded of
the code as it is."""

import json
import os
import re

import faults as F
import faulty_runs as R
import pytest
import torch
from conftest import ROOT

import core

RECORD = ROOT / "docs" / "results" / "faults" / "faults.json"
SCRIPT = "latentwire_stage1"  # its saves replace a file and keep the one before it


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    monkeypatch.setattr(core, "CACHE", core.CACHE)  # the suite sets its own


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A finished run and a stopped one, made by the code as it is; each test strikes at copies of them."""
    return R.Scene(R.SCRIPTS[SCRIPT], tmp_path_factory.mktemp("scene"), tmp_path_factory.mktemp("shared"))


def test_what_is_withstood_is_counted(tmp_path, capfd):
    assert F.main(["--script", SCRIPT, "--fault", "changed_flag", "--out", str(tmp_path / "faults.json")]) == 0
    record = json.loads((tmp_path / "faults.json").read_text())["scripts"][SCRIPT]
    assert record == {"code": F.code_of(SCRIPT), "faults": {"changed_flag": {"passed": 2, "tried": 2, "failures": []}}}
    assert "| changed flag | 2/2 |" in capfd.readouterr().out


def test_what_is_not_withstood_is_reported(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(core.Run, "_compare", lambda *_: None)
    words = ["--script", SCRIPT, "--fault", "changed_flag", "--out", str(tmp_path / "faults.json")]
    assert F.main(words) == core.CHECK_FAILED
    record = json.loads((tmp_path / "faults.json").read_text())["scripts"][SCRIPT]["faults"]["changed_flag"]
    assert (record["passed"], record["tried"]) == (0, 2)
    assert record["failures"][0].startswith("try 0: exit 0 instead of 2")
    assert "| changed flag | 0/2 |" in capfd.readouterr().out


@pytest.mark.parametrize("fault", ["kill_while_saving", "kill_after_damage"])
def test_a_save_as_it_should_be_is_withstood(scene, fault):
    assert F.try_fault(scene, fault) == {"passed": 3, "tried": 3, "failures": []}


def in_place(path, state, displaced=None):
    """A save without a temporary file and a rename; the file it replaces is moved away first if that has a name."""
    if displaced and path.exists():
        os.rename(path, displaced)
    with open(path, "w+b") as file:
        torch.save(state, file)
        file.seek(-2, os.SEEK_END)
        file.write(core._SEAL_LENGTH.to_bytes(2, "little") + f"step:{state.get('step', 0):012d} sha256:".encode())
        file.seek(0)
        file.write(core.hashlib.file_digest(file, "sha256").hexdigest().encode())


@pytest.mark.parametrize("fault", ["kill_while_saving", "kill_after_damage"])
def test_a_save_in_place_is_found_out(scene, fault, monkeypatch):
    monkeypatch.setattr(core, "save_checkpoint", lambda path, state, displaced=None: in_place(path, state))
    tried = F.try_fault(scene, fault)
    assert tried["passed"] == 0 and tried["failures"][0].startswith("try 0: half written: ")


def test_a_save_in_place_after_a_rotation_is_found_out(scene, monkeypatch):
    """What was the file before the last one is gone by then, and nothing stands for it."""
    monkeypatch.setattr(core, "save_checkpoint", in_place)
    tried = F.try_fault(scene, "kill_while_saving")
    assert tried["passed"] == 0 and "lost before the new checkpoint was complete: " in tried["failures"][0]


def test_a_save_that_is_not_flushed_before_its_rename_is_found_out(scene, monkeypatch):
    def unflushed(path, state, displaced=None):
        temporary = path.with_name(f".claimbench-{path.name}")
        in_place(temporary, state)
        if displaced and core.verifies(path):
            os.replace(path, displaced)
        os.replace(temporary, path)

    monkeypatch.setattr(core, "save_checkpoint", unflushed)
    tried = F.try_fault(scene, "kill_while_saving")
    assert tried["failures"] and all("power lost" in text for text in tried["failures"])


def test_a_rotation_of_a_damaged_file_over_the_good_one_is_found_out(scene, monkeypatch):
    monkeypatch.setattr(core, "verifies", lambda path: True)
    tried = F.try_fault(scene, "kill_after_damage")
    assert tried["passed"] < tried["tried"]


def test_the_record_is_of_this_code_and_the_readme_shows_it():
    record = json.loads(RECORD.read_text())["scripts"]
    page = (ROOT / "README.md").read_text()
    assert page.split(F.MARKS[0])[1].split(F.MARKS[1])[0].strip() == F.table(record)
    assert record and set(record) == set(R.SCRIPTS)
    for name, recorded in record.items():
        assert recorded["code"] == F.code_of(name), f"{name}: the record is of other code; run make faults"
        assert set(recorded["faults"]) == set(F.FAULTS), name
        for fault, counts in recorded["faults"].items():
            assert counts["passed"] == counts["tried"] and not counts["failures"], (name, fault)
    for fault in F.FAULTS:  # a fault that no script meets says nothing
        assert any(recorded["faults"][fault]["tried"] for recorded in record.values()), fault
    assert not re.search(r"/(work|root|home|tmp|dev)/", RECORD.read_text())


def test_a_changed_script_makes_its_column_stale(tmp_path, monkeypatch):
    for name in ("core.py", "hst_train.py", "afrb_train.py", "scripts/sweep.bash", "tests/faults.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "tests/faulty_runs.py").write_bytes((ROOT / "tests/faulty_runs.py").read_bytes())
    before = {name: F.code_of(name) for name in ("hst_train", "afrb_train")}
    monkeypatch.setattr(F, "ROOT", tmp_path)
    assert before == {name: F.code_of(name) for name in before}
    (tmp_path / "hst_train.py").write_text("pass\n")
    assert F.code_of("hst_train") != before["hst_train"] and F.code_of("afrb_train") == before["afrb_train"]
    (tmp_path / "core.py").write_text("pass\n")
    assert F.code_of("afrb_train") != before["afrb_train"]


def test_the_table_is_replaced_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{F.MARKS[0]}\nold\n{F.MARKS[1]}\nafter\n")
    counts = {"sigterm": {"passed": 3, "tried": 4}, "bad_data": {"passed": 0, "tried": 0}}
    F.write_readme(page, F.table({"hst_train": {"faults": counts}}))
    rows = "| fault | `hst_train` |\n| --- | --- |\n| sigterm | 3/4 |"
    assert page.read_text() == f"before\n{F.MARKS[0]}\n{rows}\n{F.MARKS[1]}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(core.Failure, match="are not in it"):
        F.write_readme(page, "text")
