"""scripts/afrb_recall.py: what the state of an untrained memory holds, and by which reader it is found."""

import math
import os
import shlex
import subprocess

import torch
import torch.nn.functional as F
from conftest import ROOT
from test_afrb import PVM, network, run, tokens, turned, white

import afrb_train as A
import claims
import core
from scripts import afrb_recall as R


def untrained(beta, lags, width=1024, vocab=2000):
    codes = A.PhaseVectorMemory.written(white(vocab, width).double())
    pvm = A.PhaseVectorMemory(width, decay=A.Decay(beta))
    return R.Untrained(pvm, codes, torch.tensor(lags))


def test_check_07_recall_against_lag():
    """A smaller memory and fewer candidates; the full size is `--recall-curve`."""

    def shares(decoder, beta, lags, T, formats=False):
        right = R.recall_by_lag(untrained(beta, lags), decoder, T, 8, 0, 0, formats)
        return {name: r.double().mean(0).tolist() for name, r in right.items()}

    linear = shares("linear", 0.85, [1, 4, 24, 90], 150)
    assert linear[""][:2] == [1, 1] and max(linear[""][2:]) <= 0.2
    assert max(linear["all_"][:2]) < 0.5  # the newest token is louder at nearly the same angle
    # one state, read newest first: to where fp32 ends, 0.85^102 = 2^-24, further in fp64, not so far in 16 bits
    cancel = shares("cancel", 0.85, [1, 4, 24, 90, 140], 150, True)
    assert cancel[""] == [1, 1, 1, 1, 0] and cancel["fp64_"] == [1] * 5 and cancel["bf16_"] == [1, 1, 1, 0, 0]
    assert shares("linear", 0.98, [16], 64)[""][0] > 0.5  # a longer memory does hold it


def test_oracle_of_the_decoders():
    """The correlator and newest-first cancellation, by hand in fp64: turn back, find the nearest code, take it out."""
    held, T = untrained(0.7, [0, 1, 2, 3, 5, 8, 13], width=24, vocab=40), 16
    tokens, m = held.write(6, T, core.generator(3, "t"), torch.float64)
    for row, state in zip(tokens, m):
        slow = sum(0.3 * 0.7 ** (T - 1 - s) * turned(held.codes[row[s]], 6 * math.log1p(s)) for s in range(T))
        assert (slow - state).abs().max() < 1e-6
    found = {}
    for excluded in (True, False):
        found[excluded] = []
        for row, state in zip(tokens, m):
            left, read, wrong = state, {}, set(row.tolist())
            for s in range(T - 1, 1, -1):
                x = turned(left, -6 * math.log1p(s)) / (0.3 * 0.7 ** (T - 1 - s))
                far = (held.codes - x).square().sum(-1)
                banned = [v for v in wrong if v != int(row[s])] if excluded else []
                far[banned] = torch.inf
                read[s] = int(far.argmin())
                left = left - 0.3 * 0.7 ** (T - 1 - s) * turned(held.codes[read[s]], 6 * math.log1p(s))
            found[excluded].append([read[T - 1 - lag] == int(row[T - 1 - lag]) for lag in held.lags.tolist()])
        assert held.cancelled(m, tokens, excluded).tolist() == found[excluded]
        scores = torch.stack([turned(m, -6 * math.log1p(T - 1 - lag)) for lag in held.lags.tolist()], 1) @ held.codes.T
        for b, row in enumerate(tokens):
            for a, lag in enumerate(held.lags.tolist()):
                if excluded:
                    scores[b, a, [v for v in row.tolist() if v != int(row[T - 1 - lag])]] = -torch.inf
        best = scores.argmax(-1) == tokens[:, T - 1 - held.lags]
        assert torch.equal(held.right(held.turned(m, T), tokens, excluded), best)
    assert found[True] != found[False]  # leaving candidates out is worth something here


def test_a_trained_readout_reads_its_memory():
    """It begins as the correlator and must not get worse by training on other contexts than those it is asked about."""
    held = untrained(0.6, [1, 3], width=48, vocab=60)
    linear, mlp = (float(R.recall_by_lag(held, d, 16, 80, 60, 0)[""].double().mean()) for d in ("linear", "mlp"))
    assert mlp > 0.4 and mlp > linear - 0.05
    weights = held.trained(5, 16, 0).linear.weight
    assert (weights - held.trained(6, 16, 0).linear.weight).abs().max() > 1e-4


CANCEL = [*PVM, "--ctx-chunk-len", "8", "--pvm-beta", "0.6", "--eval-items", "24", "--eval-only"]


def test_a_readout_that_cancels_recalls_the_needle(tmp_path):
    """The lane as it is injected, untrained: the linear readout finds nothing of what the state does hold."""
    linear = run(tmp_path, *CANCEL, name="linear")
    cancel = run(tmp_path, *CANCEL, "--readout", "cancel", name="cancel")
    assert linear["needle_token_acc"] == 0 and linear["retrieval_verdict"] == "not_above_controls"
    assert cancel["needle_hit_rate"] > 0.8 and cancel["retrieval_verdict"] == "above_controls"
    for name in ("shuffled", "no_context", "memory_off"):
        assert cancel[f"control_{name}_token_acc"] < 0.05, name
    assert cancel["steps"] == 0


def test_oracle_of_the_readout_that_cancels():
    """Every position read off against the slow form, codes and state from the equations of the block alone."""
    net = network(*CANCEL, "--readout", "cancel", "--alpha", "0.3")
    block, table = net.lane.blocks[0], net.model.get_input_embeddings().weight.detach().double()
    ids = torch.from_numpy(A.Needles(net.args, A.token_ids(net.args, 512, 2), "test", 1)[0][0])[None]  # 1 T
    W, b = block.mixer.weight.detach().double(), block.mixer.bias.detach().double()

    def code(s):  # V D
        u = F.layer_norm(table, (64,))
        a, g = (((0.7 * u + 0.3 * turned(u, 6 * math.log1p(s))) @ W.T) + b).chunk(2, -1)
        v = a * torch.sigmoid(g) * 10 / 3
        return v / v.square().mean(-1, keepdim=True).sqrt().clamp(min=1)

    at = torch.tensor([[10, 40]])
    state, found = net.run(ids).lane, []
    for t in at[0].tolist():
        left, read = turned(state.content[0, t].detach().double(), 6 * math.log1p(t)), {}
        for s in range(t, max(-1, t - 25), -1):
            weight = 0.3 * 0.6 ** (t - s)
            read[s] = int((code(s) - turned(left, -6 * math.log1p(s)) / weight).square().sum(-1).argmin())
            left = left - weight * turned(code(s)[read[s]], 6 * math.log1p(s))
        found.append([read[s] for s in range(t, t - 10, -1)])
        assert read[t] == int(ids[0, t]) and read[t - 5] == int(ids[0, t - 5])
    turn = block.phase(ids.shape[1])
    m = torch.stack([turned(state.content[0, t], 6 * math.log1p(t)) for t in at[0].tolist()])

    def codes(s):
        return block.pvm.written(block.mixed(table.float(), block.phase(1, s)))

    with torch.no_grad():
        got = R.newest_first(m, at[0], turn, torch.tensor(0.6), 0.3, codes)
    assert [[int(got[i, t - k]) for k in range(10)] for i, t in enumerate(at[0].tolist())] == found
    assert (got[0, 11:] == -1).all()


def test_what_followed_before_is_read_off(monkeypatch):
    """A pair that stood there before comes first, then the latest place of the last token, then nothing."""
    net = network(*CANCEL, "--readout", "cancel")
    rows = [[5, 6, 9, 5, 8, 4, 5, 7], [3, 5, 6, 1, 2, 5, 8, 5], [1, 2, 3, 4, 5, 6, 7, 8], [3, 5, 6, 9, 5, 8, 3, 5]]
    monkeypatch.setattr(R, "newest_first", lambda m, end, *a: torch.tensor(rows))
    at = torch.tensor([[6, 7, 7, 7]])
    assert net.recalled(net.run(tokens(1, 8)).lane, at).tolist() == [[8, 8, -1, 6]]


def test_recall_curve_writes_numbers_that_claims_draws(tmp_path):
    result = A.main(["--test", "--recall-curve", "--readout", "cancel", "--save", str(tmp_path)])
    betas = ["beta_0_85", "beta_0_9", "beta_0_95", "beta_0_98", "beta_0_99", "beta_0_999", "beta_spread"]
    formats = {"bf16_beta_0_85", "fp64_beta_0_85"}
    assert set(result["recall"]) == {way + beta for beta in betas for way in ("", "all_")} | formats
    for name, curve in result["recall"].items():
        assert [lag for lag, _ in curve] == [lag for lag in R.LAGS if lag < 63]
        for lag, share in curve:
            ends = result["intervals"][name][str(lag)]
            assert ends["lo"] <= share <= ends["hi"] + 1e-9 and ends["n"] == result["trials"] == 16
            assert result["recalled_at"][name][str(lag)] == share
    (drawn,) = claims.plot_run(tmp_path)
    assert drawn.name == "recall.png" and drawn.stat().st_size > 10_000


def test_what_is_not_trained_stays_so_in_a_sweep_at_test_size():
    """Smaller runs, of the same kind: every command of the group is one that the script takes."""
    env = os.environ | {"TEST": "1", "DRY": "1", "SEEDS": "41"}
    command = ["bash", str(ROOT / "scripts/afrb_sweep.sh"), "cancel"]
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    steps = {}
    for line in lines:
        args = A.parse(shlex.split(line)[2:])
        steps.setdefault((args.readout, args.test), set()).add(args.steps)
    assert steps == {("cancel", True): {0}, ("linear", True): {0}, ("mlp", True): {6}}
