"""Does a lattice over fixed places help to remember? A model of hst_train.py learns to answer from its context.

A row of 64 symbols is noise, in which facts stand (FACT, key, value) and are later asked for (ASK, key -> value); only
the value that follows a question is scored. Tasks:

    any     facts at random places, asked for 8, 16, 32, ... positions later: accuracy against distance
    spine   values stand on spine nodes (12, 36, 104, ...), all asked for in the last quarter of the row
    off     the same, five places behind each node, where no table of the lattice looks first

Keys and values are drawn anew for each row: chance is 1 / 16, and a key tells nothing without its fact. `absent`: the
same questions with the facts taken out; a model that reads its context is then at chance.

Smoke test   python scripts/hst_recall.py --test --variant plain --save_dir runs/recall_test
Run          python scripts/hst_recall.py --variant v5 --task spine --max_steps 2000 --save_dir runs/recall/v5_spine_s0
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import core
import hst_train as hst

FACT, ASK, KEYS, VALUES, NOISE = 0, 1, 2, 18, 34  # first symbol of each kind: 16 keys, 16 values, 30 of noise
KINDS = 16


@dataclasses.dataclass
class Args(hst.Args):
    task: str = core.arg("any", "any, spine or off: where the facts stand", "data")


TEST = hst.TEST | dict(max_steps=20, self_check=False, eval_rows=16, log_every=10)


def places(task: str, length: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """(where a fact begins, where its question begins) for one row; three symbols of a fact, two and the answer of a
    question, and nothing overlaps."""
    taken, found = set(), []
    if task == "any":
        distances = [8 * 2**i for i in range(20) if 8 * 2**i + 3 < length]
        for distance in distances[::-1]:  # the longest first: it has the fewest places
            starts = torch.randperm(length - distance - 2, generator=generator).tolist()
            for start in starts:
                mine = {*range(start, start + 3), *range(start + distance, start + distance + 3)}
                if not mine & taken:
                    taken |= mine
                    found.append((start, start + distance))
                    break
        return found
    shift = 5 if task == "off" else 0
    last = 3 * length // 4
    facts = [node + shift - 2 for node in hst.spine(last) if node >= 4 and node + shift < last]
    order = torch.randperm(len(facts), generator=generator).tolist()
    questions = [last + 3 * i for i in range(len(facts))]
    return [(facts[i], question) for i, question in zip(order, questions) if question + 3 <= length]


def make_rows(task: str, rows: int, length: int, generator: torch.Generator, absent: bool = False) -> tuple:
    """ids [rows, length], labels (the answers, -100 elsewhere) and the distance from fact to question at each answer.
    `absent`: the facts are replaced by noise, the labels stay."""
    ids = torch.randint(NOISE, 64, (rows, length), generator=generator)
    labels, distance = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row in range(rows):
        keys = torch.randperm(KINDS, generator=generator)
        values = torch.randint(KINDS, (KINDS,), generator=generator)
        for (fact, question), key, value in zip(places(task, length, generator), keys, values):
            if not absent:
                ids[row, fact : fact + 3] = torch.stack([torch.tensor(FACT), KEYS + key, VALUES + value])
            ids[row, question : question + 3] = torch.stack([torch.tensor(ASK), KEYS + key, VALUES + value])
            labels[row, question + 2] = VALUES + value
            distance[row, question + 2] = question - fact
    return ids, labels, distance


@torch.no_grad()
def accuracy(model: hst.HST, args: Args, absent: bool = False) -> dict:
    """{distance: share of right answers with its interval}, and of all, on rows that no seed trains on."""
    ids, labels, distance = make_rows(
        args.task, args.eval_rows, args.max_seq_len + 1, core.generator(10_000, args.task), absent
    )
    training, device = model.training, model.tokens.weight.device
    model.eval()
    right = [model(row[None, :-1].to(device))["logits"][0].argmax(-1).cpu() for row in ids]  # T each
    model.train(training)
    right, asked = torch.stack(right) == labels[:, 1:], labels[:, 1:] >= 0
    out = {"all": core.wilson(int(right[asked].sum()), int(asked.sum()))}
    for d in distance.unique().tolist()[1:]:
        here = distance[:, 1:] == d
        out[str(d)] = core.wilson(int(right[here].sum()), int(here.sum()))
    return out


def train(args: Args, run: core.Run, accelerator) -> dict:
    model = hst.build_model(args).to(accelerator.device)
    audited = hst.audit_start(model, args, run.say)
    run.start((*hst.FREE, hst.LENGTH), data=core.digest([args.task, args.max_seq_len]))
    bare = model
    model, optimizer = core.prepare(model, hst.make_optimizer(model, args, False), accelerator)
    torch.manual_seed(core.derived_seed(args.seed, "noise"))
    loop, curve = core.Loop(run, model, optimizer, args.max_steps, "recall", None, args.grad_clip), []
    while not loop.last:
        for group in optimizer.param_groups:
            group["lr"] = hst.rate(args, loop.step, 0.0)
        generator = core.generator(args.seed, "data", loop.step)
        ids, labels, _ = make_rows(args.task, args.batch_size, args.max_seq_len + 1, generator)
        ids, labels = ids.to(accelerator.device), labels.to(accelerator.device)
        out = model(ids[:, :-1], labels)  # every position counts for the horizon: answers are few
        loop.backward(out["loss"])
        loop.add(loss=out["loss"].detach(), lm_loss=out["lm_loss"])
        loop.update(tokens=ids[:, 1:].numel())
        if loop.due(args.log_every) or loop.last:
            curve.append([loop.step, loop.means()["lm_loss"]])
            run.log(step=loop.step, lm_loss=curve[-1][1])
            run.say(f"Step {loop.step:6d} | nats an answer {curve[-1][1]:.4f}")
        if loop.stopping:
            raise core.Failure("interrupted: begin again with --overwrite", 128 + loop.stopping)
    figures = loop.end()
    scores = {"accuracy": accuracy(bare, args), "absent": accuracy(bare, args, absent=True)}
    outcome = {"variant": args.variant, "mode": args.mode, "task": args.task, "parameters": hst.count(bare)}
    return outcome | scores | {"chance": 1 / KINDS, "chance_nats": math.log(KINDS), "curve": curve} | audited | figures


def parse(argv=None) -> Args:
    args = core.parse_args(Args, TEST, argv, __doc__)
    core.require(args.task in ("any", "spine", "off"), f"--task {args.task}: choose any, spine or off")
    given = {k: v for k, v in vars(args).items() if k != "task" and v is not None and v != ""}
    words = [f"--{k}={v}" for k, v in given.items() if v is not False]
    settled = hst.parse([*words, "--data", "synthetic"])  # its checks, and what it fills in
    return Args(**vars(settled) | {"task": args.task, "test": args.test})


def main(argv=None) -> dict:
    args = parse(argv)
    args = dataclasses.replace(args, d_ff=hst.on_meta(args).args.d_ff)
    accelerator = core.engine(args)
    with core.Run(args, args.save_dir, accelerator, "hst_recall_results.json") as run:
        if done := run.finished(hst.LENGTH, hst.FREE):
            return done
        result = run.finish(train(args, run, accelerator))
        asked, absent = (result[name]["all"]["mean"] for name in ("accuracy", "absent"))
        run.say(f"answers right: {asked:.3f}, without a fact {absent:.3f}")
    return result


if __name__ == "__main__":
    core.cli(main)
