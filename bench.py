"""Speed and memory of every model here beside a plain transformer of equal shape, in one run.

The contestants of a group take turns step by step, so that a noisy machine slows them alike; the figure to trust is
the ratio. Peak memory is each contestant's own, measured in a process that runs nothing else.

All         python bench.py                              2 CPU cores: 20 minutes
One group   python bench.py --group phase_a --rounds 20
Several     python bench.py --group hst --rounds 3       every group whose name begins so
Output      a table for each group, then one line of JSON (--out FILE keeps it for claims.py)
"""
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import core
import hst_train as hst
import phase_a_validation as phase_a
import phase_b_8b_adapters as phase_b
import pretrain_backbone

GROUPS = ("phase_a", "phase_a_no_dropout", "loss", "ema", "phase_b_forward", "phase_b_decode", "phase_b_decode_one",
          *(f"hst_{v}" for v in hst.VARIANTS))


@dataclasses.dataclass
class Args(core.RunArgs):
    group: str = core.arg("all", f"all or one of {', '.join(GROUPS)}", "bench")
    rounds: int = core.arg(7, "timed steps of each contestant, after one that is not timed", "bench")
    batch_size: int = core.arg(2, "sequences per step of the groups that do not fix it", "bench")
    out: str = core.arg("", "write the report to this JSON file as well", "bench")
    peak_of: str = core.arg("", "run one step of one contestant, GROUP/NAME, and print its peak memory", "bench")


class LibraryTransformer(nn.Module):
    """GPT-2 of the transformers library at the shape of `args` (pre-norm, learned positions, GELU, tied head, SDPA),
    under the same loss as our models. `same_dropout` moves its dropout to where the document has it: after the FFN's
    GELU instead of after the attention's output; on a CPU a drawn mask costs more than the GELU."""

    def __init__(self, args: phase_a.Args, vocab_size: int, same_dropout: bool):
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        shape = dict(n_embd=args.d_model, n_layer=args.n_layers, n_head=args.n_heads, n_inner=args.d_ff)
        drop = dict(resid_pdrop=args.dropout, embd_pdrop=args.dropout, attn_pdrop=args.dropout)
        config = GPT2Config(vocab_size=vocab_size, n_positions=args.seq_len, activation_function="gelu",
                            use_cache=False, attn_implementation="sdpa", **shape, **drop)
        self.body = GPT2Model(config)
        for block in self.body.h if same_dropout else ():
            block.attn.resid_dropout = nn.Identity()
            block.mlp.act = nn.Sequential(block.mlp.act, nn.Dropout(args.dropout))

    def forward(self, ids, labels):
        hidden = self.body(ids).last_hidden_state  # B T D
        return {"loss": core.next_token_loss(hidden, self.body.wte.weight, labels)}


def training_step(model: nn.Module, ids: torch.Tensor, loss=None):
    """(a function that does one whole update on `ids` [B, T], number of parameters, tokens per step)."""
    loss = loss or (lambda: model(ids, labels=ids)["loss"])
    optimizer = torch.optim.AdamW(core.decay_groups(model, 0.1), lr=1e-4, fused=True)
    model.train()

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in model.parameters()), ids.numel()


def phase_a_group(args: Args, device, *flags: str) -> dict:
    """CF-HoT's documented shape (d 512, 8 layers, T 512, vocabulary 50257). First: the reference, a library GPT-2."""
    a = phase_a.parse(list(flags))
    ids = torch.randint(50257, (args.batch_size, a.seq_len), generator=core.generator(0, "bench")).to(device)
    return {
        "gpt2": lambda: training_step(LibraryTransformer(a, 50257, True).to(device), ids),
        "gpt2_stock": lambda: training_step(LibraryTransformer(a, 50257, False).to(device), ids),
        "baseline": lambda: training_step(phase_a.build_model(a, arm="baseline").to(device), ids),
        "cf_hot": lambda: training_step(phase_a.build_model(a, arm="cf_hot").to(device), ids),
    }


def loss_group(device) -> dict:
    """The language-model loss alone, forward and backward: batch 8 x 512, width 512, vocabulary 50257."""

    def contestant(loss):
        g = core.generator(0, "bench")
        hidden, weight = (torch.randn(*shape, generator=g) for shape in ((8, 512, 512), (50257, 512)))
        hidden, weight = (x.mul(s).to(device).requires_grad_() for x, s in ((hidden, 1.0), (weight, 0.02)))
        hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)  # not part of the loss's own
        labels = torch.randint(50257, (8, 512), generator=g).to(device)
        return lambda: loss(hidden, weight, labels).backward(), weight.numel(), labels.numel()

    def plain(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden[:, :-1], weight).flatten(0, 1), labels[:, 1:].flatten())

    ours = core.next_token_loss
    return {"plain": lambda: contestant(plain), "next_token_loss": lambda: contestant(ours)}


def ema_group(device) -> dict:
    """The control field's moving average over 16 rows: the longer input costs eight times as much if it is linear."""

    def contestant(length):
        x = torch.rand(16, length, generator=core.generator(0, "bench")).to(device)
        return lambda: [phase_a.ema(x, 0.9) for _ in range(20)], 0, 20 * x.numel()

    return {"t_512": lambda: contestant(512), "t_4096": lambda: contestant(4096)}


def phase_b_group(device, batch: int, decode: bool) -> dict:
    """The offline language model's shape at T 512, bare and with adapters of the documented sizes: one forward pass,
    or greedy decoding of 64 tokens with a cache after a prompt of 448."""
    length = 448 if decode else 512
    ids = torch.randint(3, 2048, (batch, length), generator=core.generator(0, "bench")).to(device)

    def contestant(adapters: bool):
        base = pretrain_backbone.build_model(pretrain_backbone.parse(["--kind", "lm"]), 2048).to(device).eval()
        base.generation_config.eos_token_id = None  # always the full length
        config = phase_b.CFAdapterConfig(base.config.hidden_size, base.config.num_hidden_layers)
        if adapters:
            phase_b.CFHoTLlamaHooked(base, config)

        @torch.no_grad()
        def step():
            if decode:
                base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
            else:
                base(ids)

        return step, sum(p.numel() for p in base.parameters()), batch * (64 if decode else 512)

    return {"bare": lambda: contestant(False), "adapters": lambda: contestant(True)}


def hst_group(variant: str, device) -> dict:
    """One training step of an HST variant at the documented size (d 768, 16 layers, T 512, batch 1), beside a plain
    transformer of as many parameters without horizon heads."""
    a = hst.parse(["--variant", variant])
    rows = torch.randint(32000, (1, 513), generator=core.generator(0, "bench")).to(device)

    def contestant(name: str):
        size = [] if name != "plain" else ["--match_params", str(hst.count(hst.on_meta(a)))]
        model = hst.build_model(hst.parse(["--variant", name, *size])).to(device)
        omega = hst.positions_for_horizon(a, rows, "bench")
        return training_step(model, rows[:, 1:], lambda: model(rows[:, :-1], rows, omega)["loss"])

    return {"plain": lambda: contestant("plain"), "hst": lambda: contestant(variant)}


def groups(args: Args, device) -> dict:
    return {"phase_a": phase_a_group(args, device), "phase_a_no_dropout": phase_a_group(args, device, "--dropout=0"),
            "loss": loss_group(device), "ema": ema_group(device),
            "phase_b_forward": phase_b_group(device, args.batch_size, False),
            "phase_b_decode": phase_b_group(device, 21, True), "phase_b_decode_one": phase_b_group(device, 1, True),
            **{f"hst_{v}": hst_group(v, device) for v in hst.VARIANTS}}


def peak_bytes(args: Args, group: str, name: str) -> int:
    """What one step of one contestant adds to the peak memory of a process of its own."""
    words = ["--peak_of", f"{group}/{name}", "--batch_size", str(args.batch_size), "--device", args.device]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    core.require(done.returncode == 0, f"{name}: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def race(contestants: dict, rounds: int, device) -> dict:
    """Seconds of each timed step, the contestants taking turns in every round; the order turns round as well."""
    built = {name: build() for name, build in contestants.items()}
    seconds = {name: [] for name in built}
    for turn in range(rounds + 1):
        for name in list(built)[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            built[name][0]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: {"seconds": s, "parameters": built[name][1], "tokens": built[name][2]} for name, s in seconds.items()}


def main(argv=None) -> dict:
    args = core.parse_args(Args, {"rounds": 2, "batch_size": 1}, argv, __doc__)
    chosen = [g for g in GROUPS if args.group in ("all", g) or g.startswith(f"{args.group}_")]
    core.require(chosen, f"--group {args.group}: use all or one of {', '.join(GROUPS)}")
    core.require(args.rounds >= 1 and args.batch_size >= 1, "--rounds and --batch_size must be at least 1")
    device = core.engine(args).device
    if args.peak_of:
        group, _, name = args.peak_of.partition("/")
        step = groups(args, device)[group][name]()[0]
        before = core.peak_memory()
        step()
        step()  # the second holds the optimizer's moments as well
        print(core.peak_memory() - (0 if device.type == "cuda" else before))
        return {}
    report = {"rounds": args.rounds, "batch_size": args.batch_size}
    for title, contestants in groups(args, device).items():
        if title not in chosen:
            continue
        rows = race(contestants, args.rounds, device)
        reference = next(iter(rows.values()))["seconds"]
        print(f"\n{title}: {args.rounds} rounds, {core.environment()['device']}, {torch.get_num_threads()} threads")
        print(f"{'':20s} {'parameters':>11s} {'s/step':>8s} {'tokens/s':>9s} {'peak MiB':>9s}  time ratio (quartiles)")
        for name, row in rows.items():
            seconds = row.pop("seconds")
            ratios = sorted(s / r for s, r in zip(seconds, reference))
            q1, q3 = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            row |= {"s_per_step": statistics.median(seconds), "ratio": statistics.median(ratios), "quartiles": [q1, q3]}
            row |= {"tokens_per_s": row["tokens"] / row["s_per_step"], "peak_bytes": peak_bytes(args, title, name)}
            print(f"{name:20s} {row['parameters']:11,d} {row['s_per_step']:8.3f} {row['tokens_per_s']:9.0f} "
                  f"{row['peak_bytes'] / 2**20:9.0f}  {row['ratio']:.3f} ({q1:.3f}, {q3:.3f})")
        report[title] = rows
    report["environment"] = core.environment()
    print(json.dumps(report))
    if args.out:
        core.write_json(Path(args.out), report)
    return report


if __name__ == "__main__":
    core.cli(main, "--batch_size")
