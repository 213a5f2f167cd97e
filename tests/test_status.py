"""claims.py status: the document's words for LatentWire's sweeps (spec section 6.4, check 9, D8)."""

import json
import re

import pytest
from conftest import ROOT

import claims
import core
import latentwire_stage1 as L


def write_log(root, name, cos, f1):
    (root / name).mkdir(parents=True)
    rows = [{"type": "train", "step": 10, "recon_cosine_sim": cos}, {"type": "full_eval", "step": 10, "f1": f1}]
    (root / name / "diagnostics.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_weight_sweep_statuses_from_logs(tmp_path, capsys):
    """Check 9, D8: the cosine comes from the last record that has one, not from the evaluation after it."""
    cases = {
        "a": (0.71, 0.23, "STABLE"),
        "b": (0.71, 0.26, "IMPROVED"),
        "c": (0.71, 0.1, "DEGRADED"),
        "d": (0.2, 0.26, "COLLAPSED"),
        "e": (0.9, 0.04, "COLLAPSED"),
    }
    for name, (cos, f1, _) in cases.items():
        write_log(tmp_path, name, cos, f1)
    rows = claims.main(["status", "weight_sweep", str(tmp_path)])
    assert {r["name"]: r["word"] for r in rows} == {n: w for n, (_, _, w) in cases.items()}
    assert "DEGRADED" in capsys.readouterr().out


def test_a_weight_is_held_against_the_control_of_its_own_seed(tmp_path, monkeypatch):
    rows = [
        {
            "name": f"lambda_{w}_s{seed}",
            "lambda_kce": w,
            "lambda_kd": w,
            "seed": seed,
            "f1": f1,
            "f1_se": 0.01,
            "cos": 0.9,
            "collapse": "none",
        }
        for w, seed, f1 in ((0, 0, 0.2), (0, 1, 0.8), (0.1, 0, 0.5), (0.1, 1, 0.5))
    ]
    rows.append(rows[2] | {"name": "no_kce", "lambda_kce": 0, "f1": 0.4})  # not without the losses: no control
    monkeypatch.setattr(claims, "status_rows", lambda root: [dict(r) for r in rows[::-1]])
    words = {r["name"]: r.get("against_control") for r in claims.status("weight_sweep", tmp_path)}
    assert words == {
        "lambda_0_s0": None,
        "lambda_0_s1": None,
        "lambda_0.1_s0": "IMPROVED",
        "lambda_0.1_s1": "WORSE",
        "no_kce": "IMPROVED",
    }


def test_other_statuses():
    assert [L.status_of("phase1a", f, None) for f in (0.7, 0.5, 0.3)] == ["SUCCESS", "PARTIAL", "BELOW TARGET"]
    assert [L.status_of("phase1b", f, None) for f in (0.7, 0.5, 0.3, 0.2)] == [
        "SUCCESS",
        "PARTIAL",
        "MODEST",
        "BELOW TARGET",
    ]
    assert [L.status_of("pooling", f, None) for f in (0.3, 0.15, 0.05, 0.04)] == [
        "SUCCESS",
        "MARGINAL",
        "POOR",
        "FAILURE",
    ]
    assert [claims.suite_status("sequence", f, None) for f in (0.4, 0.3, 0.2, 0.1)] == [
        "strong",
        "moderate",
        "partial",
        "failure",
    ]
    assert L.status_of("pooling", 0.8, 1.0) == "MARGINAL" and L.status_of("pooling", 0.84, 1.0) == "SUCCESS"
    assert L.status_of("phase1a", 1.0, 1.0) == "SUCCESS" and L.status_of("phase1a", 0.0, 0.0) == "NO REFERENCE"
    assert [
        claims.anneal_status(*x)
        for x in (
            (0.4, 0.85, 0.15, False),
            (0.35, 0.8, 0.1, False),
            (0.3, 0.75, 0, False),
            (0.29, 0.9, 0.5, False),
            (0.2, 0.9, 0.5, False),
            (0.5, 0.9, 0.9, True),
        )
    ] == ["gold", "strong", "minimum", "partial", "fail", "collapsed"]
    assert [
        claims.against_plan(f"phase1_anneal_{n}_s0", f, c)
        for n, f, c in (("linear", 0.3, 0.75), ("weak", 0.28, 0.8), ("warmstart", 0.35, 0.85))
    ] == ["as expected"] * 3
    assert claims.against_plan("phase1_anneal_warmstart", 0.34, 0.9) == "expected cos 0.85, F1 0.35"
    assert claims.against_plan("phase1_anneal_weak", 0.5, 0.7).startswith("expected")
    assert claims.anneal_status(0.0, 0.9, 0.2, False, 0.0) == claims.sweep_status(0.9, 0.0, 0.0) == "NO REFERENCE"
    assert claims.against_plan("phase1_warmstart", 1, 1) == ""


def test_a_report_without_logs_takes_the_cosine_of_the_summary():
    rows = claims.status_rows(ROOT / "docs" / "results" / "latentwire" / "annealing")
    assert len(rows) >= 4 and all(r["cos"] == r["recon_cosine_sim"] > 0.9 for r in rows)


def test_the_curve_of_a_run_stands_beside_the_best_text_and_its_nulls():
    budget = {"code_ratio": 3.9, "wire_bytes_fp16": 4000.0}
    texts = {"salience": {"f1": 0.1}, "token_budget_question_kept": {"f1": 0.25}}
    at = {"budget": budget, "prefill_positions": 40.5, "f1": 0.9, "text": {"f1": 0.99}, "equal_positions": texts}
    run = {"name": "exp10_gist_s0", "curve": {"4": at | {"nulls": {"swapped": {"f1": 0.03}}}}}
    head, line = claims.curve_table([run, {"name": "exp1_baseline_s0"}]).splitlines()
    assert head.split()[:6] == ["run", "ratio", "positions", "bytes", "F1", "text"]
    said = "exp10_gist_s0 3.9 40.5 4000 0.900 0.990 token_budget_question_kept 0.250, swapped 0.030"
    assert " ".join(line.split()) == said
    assert claims.curve_table([{"name": "exp1_baseline_s0"}]) == "no run with a curve here"


def test_a_run_without_a_result_shows_what_its_log_says(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "diagnostics.jsonl").write_text('{"type": "diverged", "step": 20, "term": "recon"}\n')
    (row,) = claims.main(["status", "compression", str(tmp_path)])
    assert row["f1"] is None and "FAILED (recon not finite at step 20)" in capsys.readouterr().out
    for folder, line in ((tmp_path / "none", "no such folder"), (tmp_path / "a", "no run with")):
        with pytest.raises(core.Failure, match=line):
            claims.main(["status", "anneal", str(folder)])


def test_the_recorded_sweeps_have_a_table(capsys):
    root = ROOT / "docs" / "results" / "latentwire"
    for kind, folder in (("weight_sweep", "weights"), ("compression", "compression"), ("sequence", "sequence")):
        assert len(claims.main(["status", kind, str(root / folder)])) >= 9
    assert re.search(r"exp10_gist_s0 +4.0 +40.5 +3919 +0.987 +0.999  token_budget", capsys.readouterr().out)
    rows = claims.main(["status", "embed_sweep", str(root / "embed_sweep" / "bf16")])
    assert rows == claims.main(["status", "embed_sweep", str(root / "embed_sweep" / "bf16" / "summary.json")])
    assert len(rows) == 10 and "10 of 10 ran without an error" in capsys.readouterr().out


def test_the_table_of_gpu_runs(tmp_path, capsys):
    files = {
        "a_s0/phase_a_results.json": {
            "config": {"tokens_per_s": 1},
            "tokens_per_s": {"cf_hot": 1500.0, "baseline": 2.0},
        },
        "c_s0/reasoning/cognate_results.json": {"final": {"train_seconds": 61.2}, "peak_mem_bytes": 2.5e9},
        "l_s0/metrics.json": {"tokens_per_sec": 7.0},
        "bench_pvm.json": {
            "rounds": 3,
            "pvm": {"scan": {"s_per_step": 0.5, "tokens_per_s": 12.0, "utilisation": 0.25, "peak_bytes": 1e9}},
        },
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "a_s0/decides.txt").write_text("perplexity 53\n")
    claims.gpu(tmp_path)
    rows = [line.split(maxsplit=5) for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["a_s0", "1,500", "-", "-", "-", "perplexity 53"]
    assert rows[2] == ["c_s0", "-", "-", "2.50", "61", "-"] and rows[3][:2] == ["l_s0", "7"]
    assert " ".join(" ".join(rows[4]).split()) == "bench pvm scan 12 25% 1.00 0.500 a step"
    with pytest.raises(core.Failure, match="no finished run"):
        claims.gpu(tmp_path / "empty")
