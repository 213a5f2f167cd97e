"""bench.py: turns, counted operations and the report, on contestants of known cost."""

import json

import accelerate
import pytest
import torch

import bench
import core


def test_race_takes_turns_and_counts_the_operations():
    order, a = [], torch.ones(8, 16)

    def contestant(name):
        return lambda: (lambda: (order.append(name), a @ a.T), 3, 8)

    contestants = {name: contestant(name) for name in ("first", "second")}
    rows = bench.race(contestants, 2, accelerate.Accelerator(cpu=True))
    assert order == ["first", "second", "first", "second", "second", "first"]  # untimed; then the order turns round
    for row in rows.values():
        assert row["operations"] == 2 * 8 * 16 * 8 and (row["parameters"], row["tokens"]) == (3, 8)
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0


def test_report(tmp_path, capsys, monkeypatch):
    all_groups, out = bench.groups, tmp_path / "bench.json"
    monkeypatch.setattr(
        bench,
        "groups",
        lambda *args: {
            "pvm": {name: build for name, build in all_groups(*args)["pvm"].items() if name.startswith("scan")}
        },
    )
    report = bench.main(["--group", "pvm", "--rounds", "1", "--threads", "1", "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    rows = report["pvm"]
    assert set(rows) == {"scan_512", "scan_2048"} and rows["scan_512"]["ratio"] == 1.0
    assert rows["scan_2048"]["tokens"] == 4 * rows["scan_512"]["tokens"]
    assert 3.5 < rows["scan_2048"]["operations"] / rows["scan_512"]["operations"] < 4.5  # linear in the length
    assert rows["scan_2048"]["peak_bytes"] > 1.5 * rows["scan_512"]["peak_bytes"] > 0
    for row in rows.values():
        assert row["utilisation"] == pytest.approx(
            row["operations"] / row["s_per_step"] / report["matmul_operations_per_s"]
        )
    assert "utilised" in capsys.readouterr().out


@pytest.mark.parametrize("flags", (["--group", "no_such"], ["--rounds", "0"]))
def test_bad_input(flags):
    with pytest.raises(core.Failure):
        bench.main(flags)
