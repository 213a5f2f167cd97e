"""What does the state of an untrained phase vector memory hold? Three readers of it, none of them the lane's own.

Nothing here is trained but the third reader: these are experiments on the memory of afrb_train.py, which calls them.

    python afrb_train.py --recall-curve --save runs/afrb/recall                     recall over distance, random codes
    python afrb_train.py --recall-curve --readout cancel --recall-width 256 --save runs/afrb/recall_cancel_d256
    python afrb_train.py --task needle ... --readout cancel --eval-only             the lane's own codes, read off

linear: a correlator turns the state back to the time when a token was written and takes the best code. cancel: newest
first, each token is taken out once it is read, so that only older ones disturb. mlp: a network trained on other
contexts. Shapes: n contexts, T tokens, V codes of D values, A lags.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import afrb_train as afrb
import core

LAGS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 134, 192, 256, 384)  # 134: from a documented needle to its answer
RETENTIONS = (0.85, 0.9, 0.95, 0.98, 0.99, 0.999)


# -------------------------------------------------------------------------------------------------------- readers
@torch.no_grad()
def newest_first(m: Tensor, end: Tensor, turn, beta: Tensor, alpha: float, codes, told=None, first=0):
    """Tokens [N, T] read one after another from states `m` [N, D] after the positions `end` [N]: the newest is the code
    nearest to what is there, turned back and over its weight alpha beta^lag; it is taken out, then the next. -1 after
    `end` and before `first`. `turn`: (cos, sin) of the phases, [T, 1] each; `beta` [] or [D]; `codes(s)` [V, D]: what
    each token writes at position s. `told(s)` gives (ids that it is known not to be [N, X], but for this one [N]). What
    is left is kept in fp64: what ends the reading is the format that `m` had."""
    N, T = len(m), len(turn[0])
    left, found = m.double(), torch.full((N, T), -1, device=m.device)
    eps, beta, latest = torch.finfo(m.dtype).eps / 2, beta.double(), None
    for s in range(int(end.max()), first - 1, -1):
        (cos, sin), lag = (x[s] for x in turn), (end - s).clamp(min=0)[:, None]  # N 1
        weight = beta**lag  # N 1 or N D
        # of each channel: the strength of what it holds over that of what is older and of its rounding
        trust = (1 - beta * beta) / (beta * beta + (eps / weight.clamp(min=1e-30)).square()).clamp(min=1e-30)
        trust = (trust / trust.amax(-1, keepdim=True)).float()
        if (code := codes(s)) is not latest:
            latest, narrow = code, code.float()  # V D
            power = narrow.square() if beta.ndim else narrow.square().sum(-1, keepdim=True)  # V D or V 1
        x = (afrb.rotate(left, cos, -sin) / (alpha * weight).clamp(min=1e-300)).float()
        scores = (x * trust) @ narrow.T - 0.5 * trust @ power.T  # N V
        if told is not None:
            excluded, allowed = told(s)
            own = scores.gather(1, allowed[:, None])
            scores.scatter_(1, excluded, -torch.inf).scatter_(1, allowed[:, None], own)
        token = scores.argmax(-1)
        found[:, s] = torch.where(end >= s, token, -1)
        left = left - alpha * weight * afrb.rotate(code[token].double(), cos, sin) * (end >= s)[:, None]
    return found


class Cancelling(afrb.Resonant):
    """The network under --readout cancel, of one block that is not trained. In place of an embedding the readout is the
    token found to follow, whose score is that of a cosine of one."""

    def recalled(self, lane: afrb.LanePass, at: Tensor) -> Tensor:
        """Token ids [B, A]: all tokens read from the state at `at` [B, A], newest first, and of those the one that
        followed when the last two (else the last one) stood there before; -1 if they did not."""
        (block,), T = self.lane.blocks, lane.x.shape[1]
        table, pvm = self.model.get_input_embeddings().weight.detach().float(), block.pvm
        turn, end = block.phase(T), at.flatten()  # B A
        m = afrb.rotate(afrb.pick(lane.content, at).flatten(0, 1), *(x[end] for x in turn))

        def codes(s: int) -> Tensor:  # V D: what each entry writes at position s
            return pvm.written(block.mixed(table, block.phase(1, s)))

        with torch.autocast(at.device.type, enabled=False):
            found = newest_first(m, end, turn, pvm.decay.value().to(m), pvm.alpha, codes)  # B A, T
        rows = torch.arange(len(end), device=at.device)
        same = (found[:, :-1] == found[rows, end][:, None]) & (torch.arange(T - 1, device=at.device) < end[:, None])
        pair = same & F.pad(found[:, :-2] == found[rows, end - 1][:, None], (1, 0))
        rank = (same.long() + pair) * T + torch.arange(T - 1, device=at.device)  # a pair first, then the latest
        best = rank.argmax(1)
        return torch.where(same.any(1), found[rows, best + 1], -1).view_as(at)

    def scores(self, e: Tensor) -> Tensor:
        """[..., V] of the token ids `e` [...]."""
        return F.one_hot(e.clamp(min=0), self.model.get_input_embeddings().num_embeddings) * (e >= 0)[..., None]


class Reader(nn.Module):
    """x + (A x + C gelu(B x + a shift for each lag)): at the start nearly the correlator."""

    def __init__(self, dim: int, lags: int):
        super().__init__()
        self.linear, self.hidden, self.out = nn.Linear(dim, dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.shift = nn.Parameter(torch.zeros(lags, 4 * dim))

    def forward(self, x: Tensor) -> Tensor:  # n A D, norm one
        wide = x * x.shape[-1] ** 0.5
        return x + (self.linear(wide) + self.out(F.gelu(self.hidden(wide) + self.shift))) * x.shape[-1] ** -0.5


# ---------------------------------------------------------------------------------- recall over distance, random codes
class Untrained(NamedTuple):
    """Contexts of random codes that a PVM without training has written: what does its last state hold?"""

    pvm: afrb.PhaseVectorMemory
    codes: Tensor  # V D, as they are written, fp64
    lags: Tensor  # A

    def write(self, n: int, T: int, g: torch.Generator, dtype=torch.float32) -> tuple[Tensor, Tensor]:
        """Tokens [n, T], no two alike in a context, and the states [n, D] after them, summed in `dtype`."""
        tokens = torch.stack([torch.randperm(len(self.codes), generator=g)[:T] for _ in range(n)])
        rows, how = max(1, 2**24 // (T * self.codes.shape[1])), (None, 0, self.pvm.phase(T))
        parts = tokens.split(rows)
        return tokens, torch.cat([self.pvm.accumulated(self.codes[part].to(dtype), *how)[1] for part in parts])

    def turned(self, m: Tensor, T: int) -> Tensor:
        """States m [n, D] turned back to each lag [n, A, D], each channel by what it holds of that token: what a reader
        needs to know of the time when a token was written."""
        cos, sin = (x[T - 1 - self.lags] for x in self.pvm.phase(T))  # A 1
        beta = self.pvm.decay.value()
        trust = (beta ** self.lags[:, None]) * (1 - beta * beta)  # A 1 or A D
        x = afrb.rotate(m.double()[:, None].expand(-1, len(cos), -1), cos, -sin) * trust
        return F.normalize(x, dim=-1).float()

    def right(self, e: Tensor, tokens: Tensor, excluded: bool) -> Tensor:
        """Whether the best code for `e` [n, A, D] is the token's at each lag, [n, A]. `excluded`: the context's other
        tokens are no candidates."""
        target = tokens[:, tokens.shape[1] - 1 - self.lags]  # n A
        scores = e @ self.codes.T.float()  # n A V
        own = scores.gather(-1, target[..., None])
        if excluded:
            scores = scores.scatter(-1, tokens[:, None].expand(-1, len(self.lags), -1), -torch.inf)
        return (scores.scatter(-1, target[..., None], -torch.inf).amax(-1, keepdim=True) < own).squeeze(-1)

    def cancelled(self, m: Tensor, tokens: Tensor, excluded: bool) -> Tensor:
        """The same, [n, A], of `newest_first`."""
        n, T = tokens.shape
        told = (lambda s: (tokens, tokens[:, s])) if excluded else None
        first = int(T - 1 - self.lags.max())
        about = self.pvm.phase(T), self.pvm.decay.value(), self.pvm.alpha, lambda s: self.codes, told, first
        return (newest_first(m, torch.full((n,), T - 1), *about) == tokens)[:, T - 1 - self.lags]

    def trained(self, updates: int, T: int, seed: int) -> nn.Module:
        """A readout trained on this memory, [n, A, D] -> [n, A, D]: for each lag its own shift of a hidden layer, and a
        linear part. Cross-entropy against 1,024 codes drawn anew for each update, on contexts that are not asked."""
        D, g = self.codes.shape[1], core.generator(seed, "reader")
        net = Reader(D, len(self.lags))
        core.init_normal(net, seed)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        for _ in range(updates):
            tokens, m = self.write(32, T, g)
            target = tokens[:, T - 1 - self.lags].flatten()  # n A
            rivals = torch.randint(len(self.codes), (1024,), generator=g)
            e = net(self.turned(m, T)).flatten(0, 1)  # n A, D
            own = (e * self.codes[target].float()).sum(-1, keepdim=True)
            others = (e @ self.codes[rivals].T.float()).masked_fill(rivals == target[:, None], -torch.inf)
            loss = F.cross_entropy(torch.cat([own, others], 1), torch.zeros_like(target))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return net


def recall_by_lag(held: Untrained, decoder: str, T: int, trials: int, updates: int, seed: int, formats=False) -> dict:
    """Right or wrong for each trial and lag [trials, A]: with the context's other tokens left out of the candidates
    (""), and with all ("all_"). `formats`: also of a state kept in 16 and in 64 bits, which matters to cancellation."""
    net = held.trained(updates, T, seed) if decoder == "mlp" else nn.Identity()
    with torch.no_grad():
        (tokens, m), right = held.write(trials, T, core.generator(seed, "recall")), {}
        for name, excluded in (("", True), ("all_", False)):
            e = None if decoder == "cancel" else net(held.turned(m, T))
            right[name] = held.cancelled(m, tokens, excluded) if e is None else held.right(e, tokens, excluded)
        if formats and decoder == "cancel":
            wide = held.write(trials, T, core.generator(seed, "recall"), torch.float64)[1]
            right["bf16_"] = held.cancelled(wide.bfloat16(), tokens, True)
            right["fp64_"] = held.cancelled(wide, tokens, True)
    return right


def recall_curve(args: afrb.Args, accelerator) -> dict:
    """Recall over distance of the untrained memory, for --pvm-beta, retentions that reach further, and all of them over
    the channels, by --readout: a correlator (linear), newest-first cancellation, or a readout trained for --steps."""
    tiny = args.model == "tiny"
    dim, vocab, trials, T = args.recall_width or (64 if tiny else 2048), *((512, 16, 64) if tiny else (32000, 64, 512))
    lags = [lag for lag in LAGS if lag < T - 1]
    with core.Run(args, args.save, accelerator, "metrics.json") as run:
        if done := run.finished(afrb.LENGTH, afrb.FREE):
            return done
        run.start(reader=core.digest(Path(__file__)))
        codes = torch.randn(vocab, dim, generator=core.generator(args.seed, "codes"))
        codes = afrb.PhaseVectorMemory.written(codes.double())
        low, recall, intervals = args.pvm_beta, {}, {}
        kinds = {f"beta_{beta:g}": afrb.Decay(beta) for beta in sorted({low, *RETENTIONS})}
        for name, decay in (kinds | {"beta_spread": afrb.Decay(afrb.spread(low, max(RETENTIONS), dim))}).items():
            pvm = afrb.PhaseVectorMemory(dim, args.pvm_alpha, omega=args.omega, decay=decay)
            held, asked = Untrained(pvm, codes, torch.tensor(lags)), (args.readout, T, trials, args.steps, args.seed)
            for way, right in recall_by_lag(held, *asked, decay.beta == low).items():
                key = (way + name).replace(".", "_")
                recall[key] = [[lag, share] for lag, share in zip(lags, right.double().mean(0).tolist())]
                intervals[key] = {str(lag): core.wilson(round(share * trials), trials) for lag, share in recall[key]}
                run.say(f"{key}: " + "  ".join(f"{lag}: {share:.2f}" for lag, share in recall[key]))
        result = {"status": "ok", "task": "recall_curve", "data": {"source": "random codes"}, "config": vars(args)}
        result |= {"decoder": args.readout, "dim": dim, "trials": trials, "candidates": vocab, "context": T}
        result |= {"chance": 1 / vocab, "recall": recall, "intervals": intervals}
        result["recalled_at"] = {name: {str(lag): share for lag, share in curve} for name, curve in recall.items()}
        return run.finish(result)
