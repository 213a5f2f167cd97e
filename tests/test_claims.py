"""claims.py: verdicts by hand, the committed book, the table of a sweep; and the shell sweeps themselves."""

import importlib
import json
import math
import os
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import claims
import core


def test_values_are_paths_with_one_operator():
    r = {"a": {"b": 6, "c": True}, "d": 3.0}
    assert claims.value(r, "a.b") == 6 and claims.value(r, "a.b / d") == 2 and claims.value(r, "a.b - 1.5") == 4.5
    assert claims.value(r, "a.c") == 1.0 and claims.value(r, "a.x") is None and claims.value(r, "a.b / a.x") is None


@pytest.mark.parametrize(
    "lo, hi, expected",
    [(91, 99, "holds"), (80, 99, "partly"), (1, 2, "partly"), (-1, 2, "fails"), (-5, -4, "fails"), (95, 101, "fails")],
)
def test_the_end_that_is_worst_for_the_claim_decides(lo, hi, expected):
    measured = {"mean": (lo + hi) / 2, "lo": lo, "hi": hi, "n": 3}
    assert claims.verdict(measured, {"holds": [90, 100], "partly": [0, 100]}) == expected
    assert claims.verdict(measured, {"holds": [90, 100]}) == (expected if expected == "holds" else "fails")
    assert claims.verdict(None, {"holds": [90, 100]}) == "not testable here"


def result_file(root, run, gain, source="local"):
    path = root / "cfhot_a" / run / "phase_a_results.json"
    path.parent.mkdir(parents=True)
    curve = [[0, 5.0], [10, 4.0 - gain / 100]]
    cf = {"val_loss": curve, "gate": curve}
    path.write_text(
        json.dumps(
            {
                "final": {"improvement_pct": gain, "cf_hot_loss": 4.0},
                "cf_hot": cf,
                "baseline": {"val_loss": curve},
                "data": {"source": source},
            }
        )
    )


def test_report_from_result_files_alone(tmp_path):
    for seed, gain in enumerate((1.0, 1.2, 1.1)):
        result_file(tmp_path / "results", f"causal_s{seed}", gain)
    rows = {r["id"]: r for r in claims.main(["report", "--results", str(tmp_path / "results"), "--out", str(tmp_path)])}
    assert rows["cfhot-a-perplexity"]["verdict"] == "partly"
    half = 4.303 * 0.1 / math.sqrt(3)
    assert rows["cfhot-a-perplexity"]["measured"] == f"1.1 [{1.1 - half:.4g}, {1.1 + half:.4g}] (n = 3)"
    assert rows["cfhot-a-memory-time"]["verdict"] == "not testable here"
    text = (tmp_path / "RESULTS.md").read_text()
    assert "on local instead of wikitext103" in text and "bash scripts/cfhot_seeds.sh" in text
    assert (tmp_path / "plots" / "cfhot_loss.png").stat().st_size > 10_000
    assert not (tmp_path / "plots" / "cfhot_leak.png").exists()  # no data, no picture


def test_the_book_is_complete():
    book = yaml.safe_load((ROOT / "claims.yaml").read_text())
    rows = [claim for system in book["claims"].values() for claim in system]
    assert len(rows) >= 11 and len({c["id"] for c in rows}) == len(rows)
    for c in rows:
        assert {"id", "claim", "documented", "holds"} <= set(c) and c["holds"][0] <= c["holds"][1]
        assert ("results" in c and "metric" in c and "command" in c) or "value" in c or "needs" in c, c["id"]


def test_the_committed_report_is_what_the_committed_results_give(tmp_path):
    rows = claims.report(ROOT / "docs" / "results", tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "RESULTS.md").read_text()
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {p.name for p in (ROOT / "plots").iterdir()}
    assert sum(r["measured"] != "no result file" for r in rows) >= 9


def test_table_groups_seeds(tmp_path, capsys):
    for seed, gain in enumerate((1.0, 3.0)):
        result_file(tmp_path, f"causal_s{seed}", gain)
    claims.main(["table", str(tmp_path / "cfhot_a"), "final.improvement_pct", "final.nothing"])
    out = capsys.readouterr().out
    assert "2.0000 ± 1.4142 (n=2)" in out and "causal " in out
    with pytest.raises(core.Failure, match="no "):
        claims.main(["table", str(tmp_path / "empty"), "x"])


def test_plot_draws_every_run_finished_or_not(tmp_path, capsys, monkeypatch):
    rows = [{"arm": "lora", "step": s, "train_loss": 3.0 - s, "lm_loss": 2.0 - s, "gate": 0.4} for s in range(3)]
    rows += [{"step": 1, "horizon_by_offset": [1.0, 2.0]}, {"train/step": 2, "val/act_q_variance": 0.1}, {"x": "end"}]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    interval = {"mean": 0.5, "lo": 0.4, "hi": 0.7, "n": 9}
    for name, content in (
        ("b/metrics.json", {"recall": {"beta_0_85": [[1, 1.0], [4, 0.2]]}}),
        (
            "c/summary.json",
            {"f1_interval": interval, "best_f1": 0.5, "baselines_same_protocol": {"text": {"f1_interval": interval}}},
        ),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    drawn = {}
    monkeypatch.setattr(claims, "picture", lambda path, plot, curves: drawn.update({path.stem: curves}))
    claims.main(["plot", str(tmp_path)])
    assert drawn.keys() == {"loss", "gate", "heads", "act_variance", "recall", "f1_by_strategy"}
    assert drawn["loss"] == {
        "lora, training": [[(0, 3.0), (1, 2.0), (2, 1.0)]],
        "lora, training, next token": [[(0, 2.0), (1, 1.0), (2, 0.0)]],
    }
    assert drawn["heads"] == {"offset 2": [[(1, 1.0)]], "offset 3": [[(1, 2.0)]]}
    assert drawn["recall"] == {"beta 0.85": [[[1, 1.0], [4, 0.2]]]} and drawn["f1_by_strategy"].keys() == {"text", "c"}
    assert capsys.readouterr().out.count("plot: ") == 6
    monkeypatch.undo()
    for curves in (drawn["loss"], drawn["f1_by_strategy"]):
        claims.picture(tmp_path / "x.png", {"title": "t", "x": "x", "y": "y"}, curves)
        assert (tmp_path / "x.png").stat().st_size > 5000
        (tmp_path / "x.png").unlink()
    with pytest.raises(core.Failure, match="no such run"):
        claims.main(["plot", str(tmp_path / "c" / "none")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(core.Failure, match="pip install matplotlib"):
        claims.main(["plot", str(tmp_path / "a")])


SWEEPS = sorted((ROOT / "scripts").glob("*.sh"))


@pytest.mark.parametrize("script", SWEEPS, ids=lambda p: p.name)
def test_sweeps_parse_and_their_commands_too(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    env = os.environ | {"DRY": "1", "ROOT": "runs/x"}
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=env, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) >= 3
    for line in lines:
        program, *flags = line.split()[1:]
        importlib.import_module(program.removesuffix(".py").replace("/", ".")).parse(flags)


def test_the_headlines_in_the_readme_are_those_of_the_results(tmp_path):
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    claims.report(ROOT / "docs" / "results", tmp_path)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(core.Failure, match="claims: begin"):
        claims.report(ROOT / "docs" / "results", tmp_path)


def test_the_ablation_of_cognate_by_hand(tmp_path, capsys):
    """Main effects are paired by seed and averaged over other factors; a cell without partner does not count."""
    losses = {(1, 1, 1, 0): 1.0, (0, 1, 1, 0): 1.5, (1, 0, 1, 0): 1.2, (0, 0, 1, 0): 1.4, (1, 1, 0, 1): 9.0}
    for (muon, grokfast, memory, seed), loss in losses.items():
        path = tmp_path / f"muon{muon}_grokfast{grokfast}_memory{memory}_s{seed}" / "reasoning"
        path.mkdir(parents=True)
        final = {"loss": loss, "act_q_variance": 0.1, "datasets": {}}
        (path / "cognate_results.json").write_text(json.dumps({"final": final, "tokens": 10}))
    runs = claims.main(["cognate", str(tmp_path)])
    assert {key: columns["val loss"] for key, columns in runs.items()} == losses
    assert claims.cognate_effects(runs, 0, "val loss") == [pytest.approx(((1.0 - 1.5) + (1.2 - 1.4)) / 2)]
    assert claims.cognate_effects(runs, 1, "val loss") == [pytest.approx(((1.0 - 1.2) + (1.5 - 1.4)) / 2)]
    assert claims.cognate_effects(runs, 2, "val loss") == [] == claims.cognate_effects(runs, 0, "synth_add")
    assert re.search(r"Muon +-0.35 \[-0.35, -0.35\]", capsys.readouterr().out)
    with pytest.raises(core.Failure, match="no run has finished"):
        claims.main(["cognate", str(tmp_path / "nothing")])
