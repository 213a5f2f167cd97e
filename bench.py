"""Speed and memory of every model here beside a plain transformer of equal shape, in one run.

The contestants of a group take turns step by step, so that a noisy machine slows them alike; the figure to trust is
the ratio. Peak memory is each contestant's own, measured in a process that runs nothing else. Utilisation is the
operations of a step's matrix products and attention (those done twice to save memory count twice), over the time, over
the rate of one large matrix product in the same precision.

All         python bench.py                              2 CPU cores: 20 minutes
One group   python bench.py --group phase_a --rounds 20
Several     python bench.py --group hst --rounds 3       every group whose name begins so
HST         python bench.py --group stack --rounds 3     its variants as the author built them, made causal
Clock       python bench.py --group cadence              training seconds with frequent and with rare evaluation
Output      a table for each group, then one line of JSON (--out FILE keeps it for claims.py)
"""

import contextlib
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import afrb_train as afrb
import core
import hst_train as hst
import latentwire_stage1 as latentwire
import latentwire_train as wire_script
import phase_a_validation as phase_a
import phase_b_8b_adapters as phase_b
import pretrain_backbone
import train_phase1_cognate as cognate

GROUPS = (
    "phase_a",
    "phase_a_no_dropout",
    "loss",
    "ema",
    "phase_b_forward",
    "phase_b_decode",
    "phase_b_decode_one",
    "pvm",
    "afrb_train",
    "afrb_score",
    "cognate",
    "cognate_memory_512",
    "cognate_memory_2048",
    "latentwire_step",
    "latentwire_eval",
    "wire",
    *(f"hst_{v}" for v in hst.VARIANTS),
    *(f"stack_{v}" for v in hst.VARIANTS),
    "cadence",
)

# script: flags of a short run, its flag for the run directory, the flags of frequent and of rare evaluation
CADENCE = {
    phase_a: ("--no_baseline --max_steps 60 --eval_batches 4", "--output_dir", "--eval_interval"),
    phase_b: ("--model_path tiny --no_eval --max_steps 60", "--output_dir", "--eval_interval"),
    pretrain_backbone: ("--kind lm --max_steps 60", "--output_dir", "--eval_interval"),
    afrb: ("--task language --steps 60 --no-controls --enable-pvm", "--save", "--val-every"),
    cognate: ("--model reasoning --epochs 6 --synth-rows 24 --early-stop-patience 0", "--checkpoint-dir", ""),
    hst: ("--variant v6 --max_steps 60 --self_check false", "--save_dir", "--eval_every"),
    latentwire: ("--mode phase1a --samples 240 --epochs 1", "--save_dir", "--quick_eval_every"),
}


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
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=args.seq_len,
            activation_function="gelu",
            use_cache=False,
            attn_implementation="sdpa",
            **shape,
            **drop,
        )
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


class LoopMemory(afrb.PhaseVectorMemory):
    """The phase vector memory token by token, as it was published: the reference of the group `pvm`."""

    def forward(self, x):
        cos, sin = self.phase(x.shape[1])
        w = x * (10 / 3)
        w, m, out = w * w.square().mean(-1, keepdim=True).clamp(min=1).rsqrt(), torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            m = self.decay.beta * m + self.alpha * afrb.rotate(w[:, t : t + 1], cos[t : t + 1], sin[t : t + 1])[:, 0]
            out.append(afrb.rotate(m[:, None], cos[t : t + 1], -sin[t : t + 1])[:, 0])
        return x + self.gate.sigmoid() * torch.stack(out, 1)


def pvm_group(device) -> dict:
    """The memory alone, forward and backward, width 512: the per-token loop first, then the chunked scan at two
    lengths; linear growth is a ratio of four from T 512 to T 2048."""

    def contestant(kind, T):
        memory = kind(512).to(device)
        x = torch.randn(1, T, 512, generator=core.generator(0, "bench")).to(device).requires_grad_()
        return lambda: memory(x).square().sum().backward(), 1, T

    scan = afrb.PhaseVectorMemory
    return {
        "loop_512": lambda: contestant(LoopMemory, 512),
        "scan_512": lambda: contestant(scan, 512),
        "scan_2048": lambda: contestant(scan, 2048),
    }


def afrb_group(args: Args, device, scoring: bool) -> dict:
    """A frozen offline language model's shape on the needle task (T 534): bare with attention, without it, and without
    it but with AFRB + PVM; one update of the lane (bare: one forward pass, for nothing trains), or the scoring of 32
    needles, whose output head sees the answer only (`all_logits`: the usual call, which forms them everywhere)."""
    words = ["--task", "needle", "--needle-query", "--model", "tiny", "--infonce-weight", "0.3", "--kiss-ridge-calib"]
    a = afrb.parse([*words, "--enable-pvm", "--disable-attn"])
    bare = afrb.parse(["--task", "needle", "--needle-query", "--n-afrb", "0"])
    ids, rows = afrb.token_ids(a, 2048, 2), 32 if scoring else args.batch_size
    x = afrb.draw(afrb.Needles(a, ids, "train", 0), rows)[0].to(device)
    at = torch.arange(533 - 16, 533, device=device).expand(rows, 16)

    def contestant(a, attention: bool, everywhere: bool = False):
        model = pretrain_backbone.build_model(pretrain_backbone.parse(["--kind", "lm"]), 2048).to(device).eval()
        if not attention:
            afrb.disable_attention(model)
        net = afrb.build_model(a, model).to(device)
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

        def step():
            if scoring:
                with torch.no_grad():
                    if everywhere:
                        return model(x, use_cache=False).logits.logsumexp(-1)
                    return net.logits_at(net.run(x), at).logsumexp(-1)
            if not trained:
                with torch.no_grad():
                    return net(x)
            net(x, *afrb.contrast(a, range(rows), x.shape[1], 2048, device))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, sum(p.numel() for p in net.parameters()), x.numel()

    if scoring:
        return {
            "all_logits": lambda: contestant(bare, True, True),
            "answers_only": lambda: contestant(bare, True),
            "afrb_pvm": lambda: contestant(a, False),
        }
    return {
        "bare_forward": lambda: contestant(bare, True),
        "bare_no_attention": lambda: contestant(bare, False),
        "afrb_pvm_update": lambda: contestant(a, False),
    }


def cognate_group(args: Args, device) -> dict:
    """Cognate's documented size at T 512, one whole update. First: the reference, a library GPT-2 of its width, depth
    and vocabulary under AdamW, which has neither recursion nor three further supervised states; then one of as many
    parameters as Cognate, which takes six more layers."""
    ids = torch.randint(50257, (args.batch_size, 512), generator=core.generator(0, "bench")).to(device)
    shape = ["--d_model=256", "--n_layers=10", "--n_heads=4", "--d_ff=1024"]

    def contestant(*flags: str, muon: bool = True):
        a = cognate.parse(["--model", "reasoning", *flags])
        model = cognate.build_model(a).to(device).train()
        optimizer = cognate.MuGrokfast(model, a.learning_rate, a.muon_lr, muon=muon)

        def step():
            model(ids, labels=ids, return_logits=False)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step, model.count_parameters()["total"], ids.numel()

    return {
        "gpt2": lambda: training_step(LibraryTransformer(phase_a.parse(shape), 50257, True).to(device), ids),
        "gpt2_equal": lambda: training_step(
            LibraryTransformer(phase_a.parse([*shape, "--n_layers=16"]), 50257, True).to(device), ids
        ),
        "cognate": contestant,
        "cognate_adamw": lambda: contestant(muon=False),
        "cognate_no_memory": lambda: contestant("--no_memory"),
        "cognate_checkpointing": lambda: contestant("--gradient_checkpointing"),
    }


def cognate_memory_group(device, length: int) -> dict:
    """Cognate's memory over 4 rows of width 128, forward and backward: the loop over positions, and in chunks."""

    def contestant(chunked: bool):
        memory = cognate.LongTermMemory(256, 128, 0.99, True).to(device)
        x = torch.randn(4, length, 128, generator=core.generator(0, "bench")).to(device).requires_grad_()

        def step():
            if chunked:
                states = memory.scan(x, memory.memory_state[0])
            else:
                m, parts = memory.memory_state[0], []
                for t in range(length):
                    m = 0.99 * m + 0.01 * x[:, t]
                    parts.append(m)
                states = torch.stack(parts, 1)
            states.sum().backward()

        return step, 0, 4 * length

    return {"loop": lambda: contestant(False), "chunked": lambda: contestant(True)}


def latentwire_parts(device, *flags: str, wide: bool = True):
    """(args, wire, data, evaluation reader) of LatentWire on an untrained model: a byte model of width 512 (wide enough
    that attention, which is quadratic, is a small part of a step), prompts of about 185 tokens; or the offline reader's
    shape, prompts of about 41."""
    from transformers import LlamaConfig, LlamaForCausalLM

    args = latentwire.parse(["--test", "--mode", "phase1b", "--samples", "64", "--eval_samples", "64", *flags])
    accelerator = core.engine(dataclasses.replace(args, device=device.type, threads=0))
    if wide:
        base, tokenizer = (
            LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=512,
                    intermediate_size=2048,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    vocab_size=259,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                )
            ),
            core.train_tokenizer([]),
        )
    else:
        tokenizer = pretrain_backbone.reader_tokenizer()
        base = pretrain_backbone.build_model(pretrain_backbone.parse(["--kind", "reader"]), len(tokenizer))
    base.to(accelerator.device).eval()
    data = latentwire.load_data(args, tokenizer, base.get_input_embeddings().weight.shape[0])
    wire = latentwire.make_wire(args, base, data)
    return args, wire, data, latentwire.make_reader(args, tokenizer, accelerator, accelerator.device)


def latentwire_step_group(device) -> dict:
    """One training step of 8 prompts. First: the base model on the text prompt, forward and backward to its input.
    K must hardly matter (it adds K - 1 columns). Twice the prompt must cost twice as much but for the base model's own
    attention, which is quadratic: 7 % of a step at this width, so about 2.15 times. glibc hands blocks above 32 MiB
    back to the kernel and the longer prompt pays for their pages again in every step (2.3 times): set
    MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ to 4000000000 to see the arithmetic alone."""

    def contestant(*flags: str, copies: int = 1):
        args, wire, data, reader = latentwire_parts(device, *flags)
        items = [i._replace(ids=i.ids * copies, answer=(i.answer * 9)[:9]) for i in data.train[:8]]
        batch = latentwire.collate(items, args, reader.tokenizer, reader.device)
        wire.train()

        def step():
            latentwire.Objective(wire)(batch, kce=0.1, kd=0.1)["loss"].backward()

        return step, sum(p.numel() for p in wire.to_train), batch.ids.numel()

    def text():
        args, wire, data, reader = latentwire_parts(device)
        batch = latentwire.collate(data.train[:8], args, reader.tokenizer, reader.device)

        def step():
            prefix = wire.text_prefix(batch)
            prefix = prefix._replace(embeds=prefix.embeds.detach().requires_grad_())
            logits = wire.answer_logits(prefix, batch.gold, batch.gold_mask)
            latentwire.Objective(wire).answer_ce(logits, batch.gold, batch.gold_mask).backward()

        return step, sum(p.numel() for p in wire.base.parameters()), batch.ids.numel()

    kd, pool = ("--kd_chunk", "8"), ("--mode", "pooling", "--pool_ratio", "4")
    return {
        "text": text,
        "reconstruction": lambda: contestant("--lambda_kce", "0", "--lambda_kd", "0"),
        "phase1b_k1": lambda: contestant("--k_tokens", "1", *kd),
        "phase1b_k8": lambda: contestant("--k_tokens", "8", *kd),
        "phase1b_k1_twice_s": lambda: contestant("--k_tokens", "1", *kd, copies=2),
        "generation_loss": lambda: contestant(*pool),
        "lm_segment": lambda: contestant(*pool, *kd, "--pooling_mode", "lm_segment"),
    }


def latentwire_eval_group(device) -> dict:
    """Greedy answers of 256 prompts by a model of the offline reader's shape, in batches of 32, and one by one."""

    def contestant(size: int):
        _, wire, data, reader = latentwire_parts(
            device, "--eval_samples", "256", "--max_new_tokens", "4", "--eval_batch_size", str(size), wide=False
        )

        def step():
            latentwire.evaluate(wire, data.evaluation, reader)

        return step, sum(p.numel() for p in wire.to_train), sum(len(i.ids) for i in data.evaluation)

    return {"batched": lambda: contestant(32), "one_by_one": lambda: contestant(1)}


def wire_group(device) -> dict:
    """One update of a code for two tiny readers (eight contexts, two questions each) by sender, beside reading the text
    itself with both."""

    def contestant(sender: str):
        flags = ["--test", "--samples", "8", "--encoder_type", sender if sender != "text" else "byte", "--ratio", "4"]
        args = wire_script.parse(flags)
        readers = wire_script.load_readers(args, device)
        data = wire_script.load_data(args, readers[0].tokenizer)
        wire = wire_script.make_wire(args, data, readers)
        batch = wire.collate([row for group in data.train[-1] for row in group], args.ratio)
        objective = wire_script.Objective(wire)

        def step():
            if sender != "text":
                objective(batch)["loss"].backward()
                return
            for i, p in enumerate(batch.prompts):
                with torch.no_grad():
                    readers[i].answer_logits(wire.text(i, batch), p.gold, p.gold_mask)

        trained = sum(p.numel() for p in wire.parameters() if p.requires_grad)
        tokens = sum(int(p.body_mask.sum(1)[p.of].sum() + p.tail_mask.sum()) for p in batch.prompts)
        return step, trained, tokens

    return {name: lambda name=name: contestant(name) for name in ("text", "byte", "lm", "interlingua")}


def hst_group(variant: str, middle: str, device) -> dict:
    """One training step of an HST variant at the documented size (d 768, 16 layers, T 512, batch 1), beside a plain
    transformer of as many parameters without horizon heads. `middle` stack: the author's architecture, else ours."""
    form = ["--middle", middle]
    a = hst.parse([*form, "--variant", variant])
    rows = torch.randint(32000, (1, 513), generator=core.generator(0, "bench")).to(device)

    def contestant(name: str):
        size = [] if name != "plain" else ["--match_params", str(hst.count(hst.on_meta(a)))]
        model = hst.build_model(hst.parse([*form, "--variant", name, *size])).to(device)
        omega = hst.positions_for_horizon(a, rows, "bench")
        return training_step(model, rows[:, 1:], lambda: model(rows[:, :-1], rows, omega)["loss"])

    return {"plain": lambda: contestant("plain"), "hst": lambda: contestant(variant)}


def groups(args: Args, device) -> dict:
    return {
        "phase_a": phase_a_group(args, device),
        "phase_a_no_dropout": phase_a_group(args, device, "--dropout=0"),
        "loss": loss_group(device),
        "ema": ema_group(device),
        "phase_b_forward": phase_b_group(device, args.batch_size, False),
        "phase_b_decode": phase_b_group(device, 21, True),
        "phase_b_decode_one": phase_b_group(device, 1, True),
        "pvm": pvm_group(device),
        "afrb_train": afrb_group(args, device, False),
        "afrb_score": afrb_group(args, device, True),
        "cognate": cognate_group(args, device),
        "cognate_memory_512": cognate_memory_group(device, 512),
        "cognate_memory_2048": cognate_memory_group(device, 2048),
        "latentwire_step": latentwire_step_group(device),
        "latentwire_eval": latentwire_eval_group(device),
        "wire": wire_group(device),
        **{f"hst_{v}": hst_group(v, "spine", device) for v in hst.VARIANTS},
        **{f"stack_{v}": hst_group(v, "stack", device) for v in hst.VARIANTS},
    }


def peak_bytes(args: Args, group: str, name: str) -> int:
    """What one step of one contestant adds to the peak memory of a process of its own."""
    words = [
        "--peak_of",
        f"{group}/{name}",
        "--batch_size",
        str(args.batch_size),
        "--device",
        args.device,
        "--precision",
        args.precision,
    ]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    core.require(done.returncode == 0, f"{name}: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def timed(call, device: torch.device) -> float:
    """Seconds that `call()` takes, to the end of what it has started on the device."""
    begin = core.clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(core.clock() - begin, 1e-9)


def matmul_rate(accelerator) -> float:
    """Operations per second of one large matrix product in the precision of `accelerator`: what the device can do."""
    device, dtypes = accelerator.device, {"bf16": torch.bfloat16, "fp16": torch.float16}
    width = 8192 if device.type == "cuda" else 1024
    a = torch.ones(width, width, device=device, dtype=dtypes.get(accelerator.mixed_precision))
    return 2 * width**3 / min(timed(lambda: a @ a, device) for _ in range(10))


def race(contestants: dict, rounds: int, accelerator) -> dict:
    """Seconds of each timed step, the contestants taking turns in every round; the order turns round as well."""
    built = {name: build() for name, build in contestants.items()}
    rows = {name: {"seconds": [], "parameters": n, "tokens": tokens} for name, (_, n, tokens) in built.items()}
    for name, row in rows.items():  # the first step is not timed
        with accelerator.autocast(), FlopCounterMode(display=False) as counter:
            built[name][0]()
        row["operations"] = counter.get_total_flops()
    for turn in range(1, rounds + 1):
        for name in list(built)[:: 1 if turn % 2 else -1]:
            with accelerator.autocast():
                rows[name]["seconds"].append(timed(built[name][0], accelerator.device))
    return rows


def train_seconds(result: dict) -> float:
    """The training seconds that a script's result file gives, of its only arm."""
    if "train_seconds" in result:
        seconds = result["train_seconds"]
        return next(iter(seconds.values())) if isinstance(seconds, dict) else seconds
    return next(train_seconds(part) for part in result.values() if isinstance(part, dict) and "train_seconds" in part)


def cadence(rounds: int) -> dict:
    """Training seconds of each script's small run that evaluates at every update, over those of the same run that does
    so at every twentieth (Cognate, which evaluates after an epoch: at each, and never). The clock of a training counts
    neither, so that the ratio should be 1; the two take turns, and their order turns round."""
    rows = {}
    for script, (flags, directory, interval) in CADENCE.items():
        often, rare = ([interval, "1"], [interval, "20"]) if interval else ([], ["--no-validate"])
        seconds = {"often": [], "rare": []}
        for turn in range(rounds + 1):
            for name, more in list({"often": often, "rare": rare}.items())[:: 1 if turn % 2 else -1]:
                with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                    words = ["--test", "--threads", "1", *flags.split(), *more, directory, folder]
                    result = script.main(words)
                seconds[name] += [train_seconds(result)] if turn else []  # the first round warms up
        ratios = sorted(a / b for a, b in zip(seconds["often"], seconds["rare"]))
        row = {
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "interval": core.bootstrap(ratios),
        }
        row |= {name: statistics.median(values) for name, values in seconds.items()}
        low, high = row["quartiles"]
        times = f"{row['often']:7.3f} s {row['rare']:7.3f} s"
        print(f"{script.__name__:22s} {times}   {row['ratio']:.3f} ({low:.3f}, {high:.3f})", flush=True)
        rows[script.__name__] = row
    return rows


def parse(argv=None) -> Args:
    return core.parse_args(Args, {"rounds": 2, "batch_size": 1}, argv, __doc__)


def main(argv=None) -> dict:
    args = parse(argv)
    chosen = [g for g in GROUPS if args.group in ("all", g) or g.startswith(f"{args.group}_")]
    core.require(chosen, f"--group {args.group}: use all or one of {', '.join(GROUPS)}")
    core.require(args.rounds >= 1 and args.batch_size >= 1, "--rounds and --batch_size must be at least 1")
    accelerator = core.engine(args)
    device = accelerator.device
    if args.peak_of:
        group, _, name = args.peak_of.partition("/")
        step = groups(args, device)[group][name]()[0]
        before = core.peak_memory()
        with accelerator.autocast():
            step()
            step()  # the second holds the optimizer's moments as well
        print(core.peak_memory() - (0 if device.type == "cuda" else before))
        return {}
    peak_rate = matmul_rate(accelerator)
    report = {
        "rounds": args.rounds,
        "batch_size": args.batch_size,
        "precision": accelerator.mixed_precision,
        "matmul_operations_per_s": peak_rate,
    }
    print(f"one large matrix product, precision {accelerator.mixed_precision}: {peak_rate / 1e12:.2f} TFLOP/s")
    for title, contestants in groups(args, device).items():
        if title not in chosen:
            continue
        rows = race(contestants, args.rounds, accelerator)
        reference = next(iter(rows.values()))["seconds"]
        print(f"\n{title}: {args.rounds} rounds, {core.environment()['device']}, {torch.get_num_threads()} threads")
        print(
            f"{'':20s} {'parameters':>11s} {'s/step':>8s} {'tokens/s':>9s} {'peak MiB':>9s} {'utilised':>8s}  "
            "time ratio (quartiles)"
        )
        for name, row in rows.items():
            seconds = row.pop("seconds")
            ratios = sorted(s / r for s, r in zip(seconds, reference))
            q1, q3 = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            row |= {"s_per_step": statistics.median(seconds), "ratio": statistics.median(ratios), "quartiles": [q1, q3]}
            row["interval"] = core.bootstrap(ratios)  # of the mean ratio, over rounds
            row |= {"tokens_per_s": row["tokens"] / row["s_per_step"], "peak_bytes": peak_bytes(args, title, name)}
            row["utilisation"] = row["operations"] / row["s_per_step"] / peak_rate
            print(
                f"{name:20s} {row['parameters']:11,d} {row['s_per_step']:8.3f} {row['tokens_per_s']:9.0f} "
                f"{row['peak_bytes'] / 2**20:9.0f} {row['utilisation']:8.1%}  "
                f"{row['ratio']:.3f} ({q1:.3f}, {q3:.3f})"
            )
        report[title] = rows
    if "cadence" in chosen:
        print("\ntraining seconds with evaluation at every update, and at every twentieth; ratio (quartiles)")
        report["cadence"] = cadence(args.rounds)
    report["environment"] = core.environment()
    print(json.dumps(report))
    if args.out:
        core.write_json(Path(args.out), report)
    return report


if __name__ == "__main__":
    core.cli(main, "--batch_size")
