"""core: the figures of every result. Scores, intervals, n-gram floors, losses, the audit, each against a slow form."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import core


def test_distinct_n_by_hand():
    assert core.distinct_n([1, 2, 1, 2, 1], 2) == 2 / 4 and core.distinct_n([1, 2, 1, 2, 1], 1) == 2 / 5
    assert core.distinct_n([7], 2) == 0


@pytest.mark.parametrize(
    "prediction, references, em, f1",
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("the cat sat", ["a cat sat down", "dog"], 0, 2 * 2 / (2 + 3)),
        ("no no no", ["no"], 0, 2 * 1 / (3 + 1)),  # multiset overlap, not that of sets
        ("no no", ["no no no"], 0, 2 * 2 / (2 + 3)),
        ("", ["x"], 0, 0),
        ("Another theatre, an", ["another theatre"], 1, 1),  # articles are words, not letters
        ("theatre", ["atre"], 0, 0),
        ("U.S.A.", ["usa"], 1, 1),
        ("don't", ["dont"], 1, 1),
        ("well-known", ["well known"], 0, 0),  # punctuation vanishes, it does not part words
        ("x  \n y", ["x y"], 1, 1),
        ("dog", ["cat", "the dog"], 1, 1),  # the best of the references
        ("red dog", ["cat", "big red dog", "red dog here now"], 0, 2 * 2 / (2 + 3)),
        ("", [""], 1, 0),  # nothing is left of both: they match and have no word in common
        ("the", ["cat", "an a"], 1, 0),
    ],
)
def test_squad_scores_are_the_official_ones(prediction, references, em, f1):
    assert core.squad_scores(prediction, references) == (em, pytest.approx(f1))


def student_tail(quantile: float, freedom: int) -> float:
    """P(|t| > quantile) of Student's t by summing its density up to 0 in small steps."""
    x = np.linspace(0, quantile, 200_001)
    density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    density *= math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    return 1 - 2 * float(np.trapezoid(density, x))


def test_a_mean_has_the_interval_of_students_t():
    for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 20, 60, 400):
        values = np.random.default_rng(n).normal(5, 2, n)
        interval = core.mean_interval(values)
        error = math.sqrt(sum((v - values.mean()) ** 2 for v in values) / (n - 1)) / math.sqrt(n)
        quantile = (interval["hi"] - interval["mean"]) / error
        assert student_tail(quantile, n - 1) == pytest.approx(0.05, rel=1e-3 if n <= 11 else 0.03)
        assert interval["mean"] - interval["lo"] == pytest.approx(interval["hi"] - interval["mean"])
        assert interval["n"] == n and interval["mean"] == pytest.approx(values.mean())
    assert core.mean_interval([5.0]) == {"mean": 5.0, "lo": 5.0, "hi": 5.0, "n": 1}


def test_wilson_bounds_are_where_the_score_test_turns():
    """The interval holds the rates p at which the observed share is within 1.96 standard errors sqrt(p (1 - p) / n)."""
    for successes, n in ((0, 10), (10, 10), (1, 7), (81, 263), (500, 1000)):
        interval = core.wilson(successes, n)
        assert interval["mean"] == successes / n and interval["n"] == n
        for bound, trivial in ((interval["lo"], 0), (interval["hi"], 1)):
            if successes != trivial * n:
                score = (successes / n - bound) / math.sqrt(bound * (1 - bound) / n)
                assert abs(score) == pytest.approx(1.959964, rel=1e-5)
        assert interval["lo"] + 1e-12 >= 0 and interval["hi"] <= 1 + 1e-12
    assert core.wilson(81, 263)["lo"] == pytest.approx(0.2553, abs=1e-3)
    assert core.wilson(0, 10)["hi"] == pytest.approx(0.27753, abs=1e-4)
    ends = [core.wilson(k, n) for n in range(1, 200) for k in (0, n)]
    assert all(0 <= row["lo"] < row["hi"] <= 1 for row in ends)


def test_bootstrap_percentiles_are_those_of_the_binomial():
    """Resampling 20 ones and 20 zeros draws the mean of 40 coin throws, whose percentiles are known."""
    share = [math.comb(40, k) / 2**40 for k in range(41)]
    low = next(k for k in range(41) if sum(share[: k + 1]) >= 0.025)
    high = next(k for k in range(41) if sum(share[: k + 1]) >= 0.975)
    interval = core.bootstrap([0, 1] * 20)
    assert (interval["lo"], interval["hi"]) == (low / 40, high / 40) and (low, high) == (14, 26)
    assert interval["mean"] == 0.5 and interval["n"] == 40
    assert core.bootstrap([1.0, 2.0, 4.0]) == core.bootstrap([1.0, 2.0, 4.0])
    wide = core.bootstrap(np.random.default_rng(0).normal(3, 1, 400))
    assert wide["lo"] < 3.0 < wide["hi"] and wide["hi"] - wide["lo"] == pytest.approx(2 * 1.96 / 20, rel=0.1)


def test_bootstrap_draws_whole_clusters():
    """Questions of one context come and go together, here in a slow form; the interval counts contexts."""
    values, of = [1, 0.5, 0, 0, 1, 1, 0.25, 0, 1], ["b", "a", "c", "b", "a", "a", "d", "a", "b"]
    groups = [[v for v, name in zip(values, of) if name == one] for one in "abcd"]
    means = []
    for draw in np.random.default_rng(3).integers(0, 4, (300, 4)):
        drawn = [v for i in draw for v in groups[i]]
        means.append(sum(drawn) / len(drawn))
    lo, hi = np.percentile(means, (2.5, 97.5))
    found = core.bootstrap(values, 300, seed=3, clusters=of)
    assert found == {"mean": pytest.approx(sum(values) / 9), "lo": pytest.approx(lo), "hi": pytest.approx(hi), "n": 4}
    f1 = np.random.default_rng(0).random(20)  # five times the same answer is not five answers
    again = core.bootstrap(np.repeat(f1, 5), 500, clusters=np.repeat(np.arange(20), 5))
    alone, many = core.bootstrap(f1, 500), core.bootstrap(np.repeat(f1, 5), 500)
    assert again == {key: pytest.approx(value) for key, value in alone.items()} and again["n"] == 20
    assert again["hi"] - again["lo"] > 1.8 * (many["hi"] - many["lo"])


def test_perplexity_of_a_diverged_run_is_a_number():
    assert core.perplexity(2.0) == math.exp(2) and core.perplexity(1e9) == math.exp(20)


def witten_bell(train, rows, vocab, order):
    """The slow form: P(w | h) = (c(h w) + T(h) P(w | h')) / (c(h) + T(h)), T the number of different followers of h,
    for the longest known history of at most `order` tokens within the row; 1 / vocab below the unigram."""
    counts = defaultdict(Counter)
    for row in train:
        for at, n in itertools.product(range(len(row)), range(order + 1)):
            if at >= n:
                counts[tuple(row[at - n : at])][row[at]] += 1

    def probability(word, history):
        shorter = probability(word, history[1:]) if history else 1 / vocab
        seen = counts.get(tuple(history))
        if not seen:
            return shorter
        return (seen[word] + len(seen) * shorter) / (seen.total() + len(seen))

    losses = [
        -math.log(probability(row[at], list(row[max(0, at - order) : at]))) for row in rows for at in range(1, len(row))
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shape, vocab", [((30, 12), 5), ((4, 6), 50), ((8, 3), 7), ((6, 2), 4)])
def test_ngram_floors_equal_the_slow_form(shape, vocab):
    rng = np.random.default_rng(0)
    train, rows = (rng.integers(0, vocab, (n, shape[1])).astype(np.uint16) for n in (shape[0], 9))
    rows[:, -1] = (rows[:, -2] + 1) % vocab  # words and histories that were never seen are among them
    floors = core.ngram_floors(train, rows, vocab)
    for order, name in enumerate(("unigram", "bigram", "trigram")):
        assert floors[name] == pytest.approx(witten_bell(train.tolist(), rows.tolist(), vocab, order), rel=1e-12)


def test_ngram_floors_find_the_order_of_a_source():
    """A chain in which each token gives the next with 90 %: the bigram finds its entropy, the unigram only log V."""
    rng = np.random.default_rng(1)
    ids = [0]
    for jump in rng.random(200_000) < 0.1:
        ids.append(int(rng.integers(8)) if jump else (ids[-1] + 1) % 8)
    rows = np.array(ids[:200_000]).reshape(-1, 50)
    floors = core.ngram_floors(rows[:3000], rows[3000:], 8)
    stay = 0.9 + 0.1 / 8
    entropy = -stay * math.log(stay) - 7 * (0.1 / 8) * math.log(0.1 / 8)
    assert floors["unigram"] == pytest.approx(math.log(8), rel=1e-3)
    assert floors["bigram"] == pytest.approx(entropy, rel=0.02) == pytest.approx(floors["trigram"], rel=0.02)


# ---------------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("old_torch", [False, True])
def test_loss_equals_plain_cross_entropy_with_gradients(old_torch, monkeypatch):
    """Both the library's chunks and the fallback for older torch; several chunks, ignored labels."""
    monkeypatch.setattr(core, "LOSS_CHUNK", 7 * 50)
    if old_torch:
        monkeypatch.delattr(F, "linear_cross_entropy")
    hidden, weight = torch.randn(3, 11, 16), torch.randn(50, 16)
    labels = torch.randint(50, (3, 11))
    labels[0, 4:] = -100
    grads = []
    for loss in (
        core.next_token_loss,
        lambda h, w, y: F.cross_entropy((h @ w.T)[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(h, w, labels)
        grads.append((value.detach(), *torch.autograd.grad(value, (h, w))))
    for ours, plain in zip(*grads):
        assert torch.allclose(ours, plain, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(core.next_token_loss(hidden, weight, labels), grads[1][0], atol=1e-5)
        total = core.next_token_loss(hidden, weight, labels, "sum")
        assert torch.allclose(total / (labels[:, 1:] != -100).sum(), grads[1][0], atol=1e-5)


def test_loss_in_bf16_stays_close_to_fp32():
    hidden, weight, labels = torch.randn(2, 64, 32), torch.randn(500, 32) * 0.1, torch.randint(500, (2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        h = hidden.clone().requires_grad_()
        value = core.next_token_loss(h, weight, labels)
    value.backward()
    assert abs(value.item() - core.next_token_loss(hidden, weight, labels).item()) < 0.02
    assert h.grad.isfinite().all() and h.grad.abs().max() > 0


def plain_head_loss(hidden, weight, target, weights):
    """One position after the other, in float64."""
    total, ces, right = hidden.new_zeros(()), [], []
    for h, y, share in zip(hidden, target.tolist(), weights):
        logits = weight @ h
        ce = logits.exp().sum().log() - logits[y] if y >= 0 else logits[0] * 0
        total = total + share * ce
        ces.append(ce.detach())
        right.append(y >= 0 and int(logits.argmax()) == y)
    return total, torch.stack(ces), torch.tensor(right)


@pytest.mark.parametrize("rows", [0, 1, 4, 100])
def test_head_loss_equals_one_position_after_the_other(rows):
    hidden, weight = torch.randn(11, 6).double(), torch.randn(9, 6).double()
    target = torch.tensor([3, -100, 0, 8, 8, -1, 2, 5, 5, 5, 1])
    target[4] = int((weight @ hidden[4]).argmax())
    uneven = torch.rand(11).double()
    mean = (target >= 0).double() / 9
    for given, weights in ((uneven, uneven), (None, mean)):
        results = []
        for form in (
            lambda h, w, g=given: core.head_loss(h, w, target, g, rows),
            lambda h, w, g=weights: plain_head_loss(h, w, target, g),
        ):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            total, ce, right = form(h, w)
            results.append((total.detach(), ce, right, *torch.autograd.grad(3 * total, (h, w))))
        for ours, slow in zip(*results):
            assert torch.allclose(ours.double(), slow.double(), rtol=1e-6, atol=1e-7)
        assert results[0][2].sum() >= 1


def test_head_loss_of_large_logits_is_finite():
    hidden, weight = torch.tensor([[1000.0, 0.0], [0.0, 900.0]]).requires_grad_(), torch.eye(2)
    total, ce, right = core.head_loss(hidden, weight, torch.tensor([0, 0]))
    assert ce.tolist() == [0, 900] and right.tolist() == [True, False]
    assert torch.equal(torch.autograd.grad(total, hidden)[0], torch.tensor([[0.0, 0.0], [-0.5, 0.5]]))


def test_head_loss_keeps_small_weights_in_half_precision():
    """Weights of 1e-6 would leave nothing of a gradient in fp16 if they were multiplied into the logits' slopes."""
    hidden, weight, target = torch.randn(8, 16), torch.randn(20, 16) * 0.3, torch.randint(20, (8,))
    grads = []
    for kind in (torch.float32, torch.float16):
        h = hidden.to(kind).requires_grad_()
        total, *_ = core.head_loss(h, weight.to(kind), target, torch.full((8,), 1e-6))
        scale = 1e6  # as a loss scaler would
        grads.append(torch.autograd.grad(total * scale, h)[0].float())
    assert torch.allclose(*grads, rtol=0.02, atol=0.01) and grads[1].abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------------- audit
class Leak(nn.Module):
    """Position t sees token t, and position `at` the token after it as well: a leak in one place alone."""

    def __init__(self, at=None, size=1.0):
        super().__init__()
        self.table, self.at, self.size, self.seen = nn.Embedding(50, 8), at, size, []

    def forward(self, ids):  # B T
        self.seen.append((tuple(ids.shape), self.training, torch.is_autocast_enabled("cpu")))
        x = self.table(ids).clone()
        if self.at is not None:
            x[:, self.at] += self.size * self.table(ids[:, self.at + 1])
        return {"logits": x, "fixed": torch.ones_like(x)}


@pytest.mark.parametrize("at", [0, 31, 62])
def test_the_audit_finds_a_leak_at_the_start_in_the_middle_and_at_the_end(at):
    assert core.causality_audit(Leak(at, 1e-3), 50, 64) > 0
    assert core.causality_audit(Leak(at), 50, 64, ("fixed",)) == 0.0  # only what it was asked to look at
    assert core.causality_audit(Leak(at), 50, 64, ("fixed", "logits")) > 0


def test_the_audit_of_a_causal_model_is_zero_and_leaves_its_mode():
    for mode in (True, False):
        model = Leak().train(mode)
        with torch.autocast("cpu", torch.bfloat16):
            assert core.causality_audit(model, 50, 1000) == 0.0
        assert model.training is mode
        assert set(model.seen) == {((2, 64), False, False)} and len(model.seen) == 4
    short = Leak()
    assert core.causality_audit(short, 50, 8) == 0.0 and short.seen[0][0] == (2, 8)


def test_the_audit_replaces_every_token_from_j_on_and_none_before():
    class Record(Leak):
        def forward(self, ids):
            inputs.append(ids.clone())
            return super().forward(ids)

    inputs = []
    core.causality_audit(Record(), 2, 16)  # two tokens only: a draw that is not forced to differ would repeat some
    original, *replaced = inputs
    firsts = set()
    for ids in replaced:
        j = int((ids != original).any(0).nonzero()[0])
        firsts.add(j)
        assert (ids[:, :j] == original[:, :j]).all() and (ids[:, j:] != original[:, j:]).all()
    assert firsts == {1, 8, 15}
