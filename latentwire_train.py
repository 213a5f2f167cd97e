"""LatentWire: can one short code of a text be a common language that two different frozen models read?

    Z = sender(context)                       M slots of d_z values, made before any question is known     [M, d_z]
    Z' = quantise(Z)                          groups of 32 values share a scale; 16, 8, 6 or 4 bits, or none
    x_i = adapter_i(Z')                       d_z -> 4 d_z -> d_i, at the scale of reader i's embedding table
    answer_i = reader_i([BOS | Context: | x_i | question | Answer: ])
    joint = argmax over the proposed answers a of sum_i log p_i(a | Z', question)

The document's encoder reads bytes, question included, and every run of it collapsed (F1 0 to .03 where text gives .69
to .80). Here several questions are asked of one fixed code. Three senders: `byte`, the document's; `lm`, the first
reader with LoRA and gist tokens, which starts as the mean embedding of each segment; `interlingua`, the document's last
proposal. Beside each figure stand text cut to as many positions or bytes, another context's code, the wrong reader's
adapter and the untrained sender. The document's parts (prefixes, latent adapters, coprocessor, refiner, gist head,
LoRA) are off unless asked for.

Smoke test   python latentwire_train.py --test                              two tiny random readers, CPU, 20 s
Document     python latentwire_train.py --embed_transform rms_matching --samples 10000 --epochs 10
Readers      python pretrain_backbone.py --kind reader --facts 32 --questions 4 --max_steps 4000 \\
                 --output_dir backbones/reader32            the second, of another tokenizer: scripts/latentwire_wire.sh
Offline      python latentwire_train.py --llama_id backbones/reader32 --qwen_id backbones/pieces16 --encoder_type lm \\
                 --dataset synthetic --facts 16 --fact_curriculum 2,4,8,16 --multi_ratio 2,4,8,16 --d_z 64 \\
                 --samples 3000 --epochs 12 --batch_size 12 --questions_per_context 8 --lr 1e-3
Experiments  bash scripts/latentwire_wire.sh, bash scripts/latentwire_smoke.sh: docs/latentwire_wire.md
Expect       one code of a quarter of the positions from which both readers answer nearly as from text, and which weighs
             more bytes than the text; the document's byte encoder hardly better than with another context's code
"""

import contextlib
import dataclasses
import functools
import json
import math
import random
import re
import string
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import core
from core import arg, require

NAMES = ("llama", "qwen")  # the document's readers; any models may stand behind the names
PARTS = "lora prefix deep_prefix latent_adapters coprocessor gist_head latent_refiner".split()
GROUP = 32  # values that share a scale on the wire


@dataclasses.dataclass
class Args(core.RunArgs):
    llama_id: str = arg("meta-llama/Meta-Llama-3.1-8B-Instruct", "first reader: hub id, directory, tiny")
    qwen_id: str = arg("Qwen/Qwen2.5-7B-Instruct", "second reader: hub id, directory, tiny_qwen")
    models: str = arg("llama,qwen", "which of the two, in this order; the lm sender is the first")
    readers: int = arg(2, "use the first N of --models")
    out_dir: str = arg("", "run directory; unset: runs/latentwire", aliases="--save_dir")
    run_name: str = arg("", "save in runs/RUN_NAME; unset: in --out_dir")
    tag: str = arg("", "a label in the result; unset: none")
    diagnostic_log: str = arg("", "the document's log; unset: OUT_DIR/diagnostics.jsonl")
    seed: int = arg(42, "seed of initialisation, data order and generated training data", "run")

    dataset: Literal["squad", "synthetic"] = arg("squad", "hub set, or generated questions", "data")
    train_file: str = arg("", "SQuAD JSON or JSONL, split by article without --eval_file; unset: --dataset", "data")
    eval_file: str = arg("", "SQuAD JSON or JSONL; unset: a part of the training file, or --dataset", "data")
    samples: int = arg(10000, "training contexts", "data")
    facts: int = arg(4, "facts in a generated context, 2 to 32", "data")
    fact_curriculum: str = arg("", "facts of generated contexts in turn, such as 2,4,8,16; unset: --facts", "data")
    eval_facts: str = arg("", "comma-separated: more facts, answered untrained; unset: none", "data")
    unseen_pairs: bool = arg(False, "train without some pairs of a name and a colour; ask about these", "data")
    question_scope: Literal["text", "encoded"] = arg("text", "encoded: the document's, question in the code", "data")
    questions_per_context: int = arg(3, "questions asked of one code", "data")
    answer_as_text: bool = arg(False, "also evaluate the answer sent as text (always for encoded)", "data")
    max_length: int = arg(384, "longest context of a file, in the first reader's tokens; byte: slots x ratio", "data")
    warm_anchor_mode: Literal["none", "text", "chat", "auto"] = arg(
        "text", "before the answer: nothing, 'Answer: ', that in the chat template, or whichever there is", "data"
    )

    encoder_type: Literal["byte", "lm", "interlingua"] = arg("byte", "sender", "sender")
    code_form: Literal["gist", "segment"] = arg("gist", "lm: gist tokens, or segments' means alone", "sender")
    train_encoder: bool = arg(True, "train the sender", "sender")
    freeze_encoder: bool = arg(False, "leave the sender as it starts, or as --ckpt_in has it", "sender")
    encoder_use_chat_template: bool = arg(False, "byte: wrap the text in the first reader's template", "sender")
    latent_len: int = arg(32, "slots, unless --ratio is given", "sender")
    ratio: float | None = arg(
        None, "tokens a slot (of --multi_ratio: that of --eval_bits, predictions); unset: --latent_len slots", "sender"
    )
    multi_ratio: str = arg("", "comma-separated, rising: one code for these ratios; unset: --ratio", "sender")
    count_tokens_of: str = arg("", "whose tokens --ratio counts; unset: the first reader's", "sender")
    d_z: int = arg(256, "values in a slot", "sender")
    bits: Literal[16, 8, 6, 4, 0] = arg(0, "bits of a value on the wire, trained straight-through; 0: fp32", "sender")
    eval_bits: str = arg("", "comma-separated: other bits, evaluated untrained; unset: none", "sender")
    max_bytes: int = arg(2048, "byte: longest source", "sender")
    enc_lora_r: int = arg(16, "lm: rank of its LoRA (q, k, v, o of all layers)", "sender")

    embed_transform: Literal["none", "rms_matching", "batch_distribution"] = arg(
        "rms_matching", "scale of a slot at its reader: as it is, the table's RMS, the table's mean and sd", "adapter"
    )
    embed_normalize: Literal["none", "batch"] = arg("none", "batch: evaluate with batch_distribution", "adapter")
    adapter_hidden_mult: int = arg(4, "hidden width over d_z", "adapter")
    adapter_dropout: float = arg(0.0, "in the adapter", "adapter")
    adapter_start: Literal["aligned", "random"] = arg("aligned", "lm: fit each adapter to segment means", "adapter")
    freeze_llama_adapter: str = arg("", "checkpoint of the first adapter, then frozen; unset: trained", "adapter")
    init_llama_from_phase1: bool = arg(False, "refused: an adapter of stage 1 has another form", "adapter")
    ckpt_in: str = arg("", "start from its sender and adapters, at update 0; unset: from the seed", "adapter")
    reset_epoch: bool = arg(False, "with --ckpt_in, which always begins at update 0", "adapter")

    use_lora: bool = arg(False, "LoRA on q_proj, v_proj of the readers", "parts")
    lora_r: int = arg(8, "its rank", "parts")
    lora_alpha: int = arg(16, "its scale", "parts")
    lora_dropout: float = arg(0.05, "its dropout", "parts")
    lora_firstN: int = arg(12, "its layers", "parts")
    use_prefix: bool = arg(False, "learned keys and values at every layer", "parts")
    prefix_tokens: int = arg(16, "how many", "parts")
    peft_prefix_all_layers: Literal["yes", "no"] = arg("yes", "no: refused", "parts")
    use_deep_prefix: bool = arg(False, "keys and values at every layer from the slots", "parts")
    deep_prefix_dropout: float = arg(0.1, "its dropout", "parts")
    use_latent_adapters: bool = arg(False, "cross-attention to the slots inside the readers", "parts")
    latent_adapter_layers: str = arg("5,10,15", "at these layers", "parts")
    use_coprocessor: bool = arg(False, "keys and values at every layer from the pooled slots", "parts")
    coprocessor_len: int = arg(1, "how many", "parts")
    coprocessor_pool: Literal["mean", "first", "max"] = arg("mean", "how the slots are pooled", "parts")
    use_gist_head: bool = arg(False, "reconstruct the prompt's first embeddings from the slots", "parts")
    gist_mask_prob: float = arg(0.15, "share of them that a step leaves out", "parts")
    gist_weight: float = arg(0.02, "weight of that loss", "parts")
    use_latent_refiner: bool = arg(False, "a small transformer over the slots", "parts")
    latent_refiner_layers: int = arg(2, "its layers", "parts")

    k_tokens: int = arg(4, "K, the answer tokens of the next two", "losses", aliases="--K")
    k_ce_weight: float = arg(0.0, "more weight on the first K answer tokens", "losses")
    kd_first_k_weight: float = arg(0.0, "KL to the reader on text, first K answer tokens", "losses")
    kd_tau: float = arg(1.0, "its temperature", "losses")
    first_token_ce_weight: float = arg(0.0, "more weight on the first answer token", "losses")
    first_token_ce_schedule: Literal["none", "cosine", "warmup"] = arg("none", "of that weight", "losses")
    first_token_entropy_weight: float = arg(0.0, "bonus for the entropy of the first token", "losses")
    latent_align_weight: float = arg(0.0, "each reader rewrites the context; 0 from half of training on", "losses")
    scale_l2: float = arg(0.05, "penalty on an adapter's scale", "losses")
    warmup_text_latent_epochs: float = arg(0.0, "every other update aligns slots with the answer's text", "losses")
    warmup_text_latent_steps: int = arg(0, "the same in updates", "losses")
    warmup_align_tokens: int = arg(4, "answer tokens to align with", "losses")
    warmup_align_weight: float = arg(0.5, "weight of that alignment", "losses")

    epochs: int = arg(10, "passes over the training contexts; 0: evaluate --ckpt_in", "training")
    batch_size: int = arg(64, "contexts per update and process", "training")
    lr: float = arg(5e-5, "AdamW: 100 updates (a tenth) up, constant, down over the last fifth", "training")
    max_grad_norm: float = arg(1.0, "gradients are clipped to it", "training")
    save_every: int = arg(500, "updates between checkpoints", "training")
    grad_diag_interval: int = arg(0, "updates between gradient norms of each loss; 0: none", "training")
    grad_diag_components: str = arg("ce,first,kce,kd,align,rewrite,gist", "of these losses", "training")

    eval_samples: int = arg(200, "evaluated contexts", "evaluation")
    eval_batch_size: int = arg(32, "contexts per batch", "evaluation")
    eval_every: int = arg(500, "updates between short evaluations, which select nothing", "evaluation")
    max_new_tokens: int = arg(24, "longest answer", "evaluation")
    sequential_eval: bool = arg(True, "one reader after the other, the only way here", "evaluation")
    fresh_eval: bool = arg(False, "make the code again for each reader", "evaluation")

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = arg("auto", "of the readers; what is trained is fp32", "model")

    @property
    def ratios(self) -> list:
        """The ratios that the code is trained for; None stands for --latent_len slots."""
        return numbers(self.multi_ratio) or [self.ratio]

    @property
    def stages(self) -> list[tuple[int, list]]:
        """What is trained on in turn: (facts, ratios). More facts at the first ratio, then one ratio more at a time."""
        facts = [int(n) for n in numbers(self.fact_curriculum)]
        if not facts:
            return [(self.facts, self.ratios)]
        return [(n, self.ratios[:1]) for n in facts] + [
            (facts[-1], self.ratios[:n]) for n in range(2, len(self.ratios) + 1)
        ]


TEST = dict(llama_id="tiny", qwen_id="tiny_qwen", dataset="synthetic", device="cpu", threads=1, facts=2, samples=16)
TEST |= dict(epochs=2, batch_size=4, questions_per_context=2, latent_len=16, d_z=32, latent_adapter_layers="0,1")
TEST |= dict(lr=2e-3, eval_samples=4, eval_batch_size=4, eval_every=4, max_new_tokens=4, max_bytes=256, save_every=4)
SECTIONS = {"samples": "eval_samples", "max_new_tokens": "max_new_tokens", "fresh_eval": "fresh_eval"}  # of evaluation
ELSEWHERE = (  # flags of the document's files that say how its machines, loops and anchors were set up
    "sequential_models load_4bit llama_device_map qwen_device_map grad_accum_steps max_answer_tokens prefix_projection "
    "lora_target_modules deep_prefix_len train_append_bos_after_prefix use_chat_template auto_resume "
    "save_training_stats latent_adapter_heads latent_adapter_dropout coprocessor_width coprocessor_dropout "
    "coprocessor_kv_scale gist_target_len gist_hidden gist_layers gist_dropout latent_refiner_heads"
).split()


def numbers(text: str) -> list[float]:
    """The values of a comma-separated flag."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise core.Failure(f"{text}: use numbers with commas between them, such as 2,4,8") from None


def flattened(path: str) -> dict:
    """Flags of a configuration file: YAML, or the document's JSON, whose sections are laid out flat. What it evaluates
    has flags of its own here; what it says of its machines is left out."""
    try:
        content = yaml.safe_load(core.read_text(path))
    except (yaml.YAMLError, RecursionError):
        content = None
    require(isinstance(content, dict), f"--config {path}: expected lines of the form 'flag: value', or sections")
    flags = {}
    for section, values in content.items():
        if section == "evaluation":
            flags |= {SECTIONS[name]: value for name, value in values.items() if name in SECTIONS}
        elif section != "system":
            flags |= values if isinstance(values, dict) else {section: values}
    return {name: value for name, value in flags.items() if name not in ELSEWHERE}


def parse(argv=None) -> Args:
    argv = sys.argv[1:] if argv is None else argv
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    at = argv.index("--config") + 1 if "--config" in argv[:-1] else None
    config = argv[at] if at else ""
    with tempfile.TemporaryDirectory() as folder:
        if config:  # core reads flat files: the sections of this one are laid out for it
            argv[at] = f"{folder}/flags.yaml"
            core.write_json(argv[at], flattened(config))
        args = core.parse_args(Args, TEST, argv, __doc__)
    args.config = config
    args.out_dir = f"runs/{args.run_name}" if args.run_name else args.out_dir or "runs/latentwire"
    args.diagnostic_log = args.diagnostic_log or f"{args.out_dir}/diagnostics.jsonl"
    args.ratio = args.ratio or (args.ratios[0] if args.multi_ratio else None)
    if args.llama_id == "tiny" and not args.train_file:
        args.dataset = "synthetic"  # an untrained byte model cannot read real questions
    check(args)
    return args


def check(args: Args) -> None:
    """Refuse values that no run could use, and flags that exclude each other."""
    names = "samples batch_size questions_per_context max_length latent_len d_z max_bytes enc_lora_r eval_samples "
    names += "adapter_hidden_mult lora_r lora_firstN prefix_tokens coprocessor_len latent_refiner_layers k_tokens "
    names += "warmup_align_tokens save_every eval_batch_size eval_every max_new_tokens readers"
    core.require_positive(args, names)
    for name in (f.name for f in dataclasses.fields(args) if f.type in (float, int)):
        require((getattr(args, name) or 0) >= 0 or name == "seed", f"--{name} must not be negative")
    require(args.lr > 0 and args.kd_tau > 0 and args.max_grad_norm > 0, "--lr, --kd_tau, --max_grad_norm: positive")
    for name in ("adapter_dropout", "lora_dropout", "deep_prefix_dropout", "gist_mask_prob"):
        require(getattr(args, name) < 1, f"--{name} must be below 1")
    chosen = args.models.split(",")
    require(chosen and set(chosen) <= set(NAMES) and len(set(chosen)) == len(chosen), "--models: llama, qwen or both")
    require(args.epochs or args.ckpt_in, "--epochs 0 evaluates what --ckpt_in holds: name it")
    require(min([1.0, *(r for r in args.ratios if r)]) >= 1, "--ratio, --multi_ratio: at least 1")
    require(args.ratios == sorted(args.ratios), "--multi_ratio: in rising order")
    require(args.ratio in args.ratios, f"--ratio {args.ratio} must be one of --multi_ratio {args.multi_ratio}")
    counts = [args.facts, *numbers(args.fact_curriculum), *numbers(args.eval_facts)]
    require(all(2 <= n <= 32 and n == int(n) for n in counts), "facts: whole numbers from 2 to 32")
    made, staged = args.dataset == "synthetic" and not args.train_file, numbers(args.fact_curriculum)
    require(not staged or staged[-1] == args.facts, f"--fact_curriculum must end in --facts {args.facts}")
    line = "--fact_curriculum, --eval_facts, --unseen_pairs: for --dataset synthetic alone"
    require(made or not (staged or args.eval_facts or args.unseen_pairs), line)
    require(not args.eval_file or args.train_file, "--eval_file needs --train_file")
    require(set(numbers(args.eval_bits)) <= {16, 8, 6, 4, 0}, "--eval_bits: of 16, 8, 6, 4 and 0")
    require(args.train_encoder or args.freeze_encoder, "--train_encoder False: say --freeze_encoder")
    require(not (args.use_coprocessor and args.use_deep_prefix), "--use_coprocessor excludes --use_deep_prefix")
    line = "--peft_prefix_all_layers no: a cache has keys for every layer or for none (the document gave it up too)"
    require(args.peft_prefix_all_layers == "yes", line)
    line = "--init_llama_from_phase1: an adapter of stage 1 maps tokens, not slots; use --freeze_llama_adapter or "
    require(not args.init_llama_from_phase1, line + "--ckpt_in with a checkpoint of this script")
    require(args.sequential_eval, "--sequential_eval False: readers are evaluated one after the other here")
    require(not args.reset_epoch or args.ckpt_in, "--reset_epoch: give --ckpt_in FILE, which begins at update 0")
    require(not (args.reset_epoch and args.resume), "--resume goes on at its step: drop it or --reset_epoch")
    chat = args.encoder_use_chat_template and args.encoder_type != "byte"
    require(not chat, "--encoder_use_chat_template is for --encoder_type byte: the others read the prompt's own tokens")
    parts = set(args.grad_diag_components.split(","))
    require(parts <= {"ce", "first", "kce", "kd", "align", "rewrite", "gist"}, "--grad_diag_components: see --help")


# ---------------------------------------------------------------------------------------------- model: on the wire
def levels(z: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(whole numbers [C, G, GROUP], fp16 scales [C, G, 1]) that are sent for codes z [C, M, d_z], empty slots zero, at
    8, 6 or 4 bits: symmetric, the scale is a group's largest value over the largest level."""
    top, flat = 2 ** (bits - 1) - 1, (z * mask[..., None]).flatten(1)  # C M*d_z
    group = F.pad(flat, (0, -flat.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = (group.abs().amax(-1, keepdim=True) / top).clamp(min=2.0**-24).half()
    return (group / scale.float()).round().clamp(-top, top), scale


def quantise(z: Tensor, mask: Tensor, bits: int) -> Tensor:
    """What arrives of codes z [C, M, d_z]; gradients pass straight through. 16 bits: half precision, no scales."""
    if bits == 0:
        return z
    arrived = z.half().float()
    if bits < 16:
        level, scale = levels(z.detach(), mask, bits)
        arrived = (level * scale.float()).flatten(1)[:, : z[0].numel()].view_as(z)
    return z + (arrived - z).detach()


def code_bytes(values: int, bits: int) -> int:
    """Bytes of a code of so many values, scales included."""
    bits, scales = bits or 32, 2 * math.ceil(values / GROUP) if 0 < bits < 16 else 0
    return math.ceil(values * bits / 8) + scales


# twin of latentwire_stage1.py:segment_weights
def segment_weights(tokens: Tensor, slots: Tensor) -> Tensor:
    """[B, M, N] averaging matrices: token t of a body of `tokens` [B] goes to slot floor(t slots / tokens)."""
    t = torch.arange(int(tokens.max()), device=tokens.device)
    of = t * slots[:, None] // tokens[:, None]  # B N
    slot = torch.arange(int(slots.max()), device=tokens.device)[:, None]  # M 1
    hit = (of[:, None] == slot) & (t < tokens[:, None])[:, None]  # B M N
    return hit / hit.sum(-1, keepdim=True).clamp(min=1)


# twin of latentwire_stage1.py:sinusoids
def sinusoids(length: int, width: int, device) -> Tensor:
    """[length, width] fixed positions (Vaswani et al. 2017)."""
    half = -(-width // 2)
    angle = torch.arange(length, device=device)[:, None] * 10000.0 ** (-torch.arange(half, device=device) / half)
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width]


def attention(width: int) -> nn.MultiheadAttention:
    """Of up to eight heads."""
    return nn.MultiheadAttention(width, next(h for h in (8, 4, 2, 1) if width % h == 0), batch_first=True)


def transformer(width: int, layers: int) -> nn.TransformerEncoder:
    heads = attention(width).num_heads
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)


def padded(rows: list[list[int]], device, side: str = "right") -> tuple[Tensor, Tensor]:
    """(token ids, mask) of the rows, each [B, T]."""
    ids = [torch.tensor(row, device=device, dtype=torch.long) for row in rows]
    pair = (ids, [torch.ones_like(row) for row in ids])
    return tuple(nn.utils.rnn.pad_sequence(part, True, padding_side=side) for part in pair)


def widen(*layers: nn.Linear) -> None:
    """Weights as `core.init_normal` draws them, from a spread of 0.02 to one over the root of what they read."""
    for layer in layers:
        layer.weight.data.mul_(50 / math.sqrt(layer.in_features))


class Lora(nn.Module):
    """Low-rank corrections of a frozen model's projections, which act while `on`: several may share a model."""

    def __init__(self, base, which: str, r: int, alpha: int, layers: int | None = None, dropout: float = 0.0):
        super().__init__()
        names, self.on, self.gain = [f"{letter}_proj" for letter in which], False, alpha / r
        self.a, self.b, self.dropout = nn.ParameterDict(), nn.ParameterDict(), nn.Dropout(dropout)
        for name, module in base.named_modules():
            layer = re.search(r"\.(\d+)\.", name)
            if name.split(".")[-1] in names and (layers is None or (layer and int(layer[1]) < layers)):
                key = name.replace(".", "_")
                self.a[key] = nn.Parameter(torch.empty(r, module.in_features))
                self.b[key] = nn.Parameter(torch.zeros(module.out_features, r))
                module.register_forward_hook(functools.partial(self.correct, key))
        line = f"LoRA: a {type(base).__name__} has no layers {', '.join(names)}: run without it, or use a Llama"
        require(len(self.a), line)

    def begin(self) -> None:
        """Without effect."""
        for key, a in self.a.items():
            a.data.mul_(50 / math.sqrt(a.shape[1]))
            self.b[key].data.zero_()

    def correct(self, key: str, module, inputs, out: Tensor) -> Tensor:
        if not self.on:
            return out
        x = self.dropout(inputs[0].float())
        return out + (x @ self.a[key].T @ self.b[key].T * self.gain).to(out.dtype)

    @contextlib.contextmanager
    def switched_on(self):
        self.on = True
        try:
            yield
        finally:
            self.on = False


# --------------------------------------------------------------------------------------------- model: three senders
class ByteSender(nn.Module):
    """The document's: bytes of the text, a six-layer encoder (4.80M parameters at d_z 256), and learned queries that
    attend to it (0.60M). Padding is masked, which the document's was not."""

    def __init__(self, args: Args, slots: int):
        super().__init__()
        d, self.longest = args.d_z, args.max_bytes
        self.table = nn.Embedding(256, d)
        self.encoder, self.attention = transformer(d, 6), attention(d)
        self.queries = nn.Parameter(torch.empty(slots, d))
        self.gate, self.norm = nn.Linear(2 * d, d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, batch: "Batch") -> Tensor:
        """[C, M, d_z]; no slot depends on padding."""
        ids, mask = padded([list(text.encode()[: self.longest]) for text in batch.texts], self.queries.device)
        x, empty = self.table(ids), mask == 0  # C L d, C L
        x = self.encoder(x + sinusoids(x.shape[1], x.shape[2], x.device), src_key_padding_mask=empty)
        q = self.queries[: int(batch.slots.max())].expand(len(x), -1, -1)  # C M d
        y = self.attention(q, x, x, empty, need_weights=False)[0] + q
        open_ = torch.sigmoid(self.gate(torch.cat([y, q], -1)))
        y = open_ * y + (1 - open_) * q
        return y + self.mlp(self.norm(y))


class LmSender(nn.Module):
    """The first reader, with LoRA, reads the context and behind it one gist token for each slot, which starts as the
    mean embedding of its segment and stands at that segment's position. Slot: a linear map of that mean (the identity,
    or the table's first directions) and a correction from the states, zero at the start."""

    def __init__(self, args: Args, reader: "Reader"):
        super().__init__()
        d, self.gists = reader.width, args.code_form == "gist"
        self.reader = [reader]  # a reference, not a part: its weights are not the sender's
        self.lora = Lora(reader.base, "qkvo", args.enc_lora_r, 2 * args.enc_lora_r)
        self.skip, wide = nn.Linear(d, args.d_z, bias=False), d * (1 + self.gists)
        self.norm, self.first, self.second = nn.LayerNorm(wide), nn.Linear(wide, d), nn.Linear(d, args.d_z)
        self.gist = nn.Parameter(torch.zeros(d)) if self.gists else None

    @torch.no_grad()
    def begin(self, basis: Tensor) -> None:
        """`basis` [d_z, d]: where the code starts."""
        widen(self.first)
        self.second.weight.zero_()
        self.skip.weight.copy_(basis)
        if self.gists:
            self.gist.zero_()

    def forward(self, batch: "Batch") -> Tensor:
        reader, p = self.reader[0], batch.prompts[0]
        body, n = reader.embed(p.body).float(), p.body_mask.sum(1)  # C N d, C
        average = segment_weights(n, batch.slots)  # C M N
        mean, H, C = average @ body, len(p.head), len(n)
        where = H + places(n, batch.slots)  # C M
        x = [reader.embed(p.head).float().expand(C, -1, -1), body]
        mask, t = [p.body_mask.new_ones(C, H), p.body_mask], torch.arange(H + body.shape[1], device=n.device)
        positions = [t.expand(C, -1)]
        if self.gists:
            slot = torch.arange(mean.shape[1], device=n.device) < batch.slots[:, None]
            x, mask, positions = [*x, mean + self.gist], [*mask, slot.long()], [*positions, where]
        read = {"inputs_embeds": torch.cat(x, 1).to(reader.table.dtype), "attention_mask": torch.cat(mask, 1)}
        with self.lora.switched_on():
            states = reader.base.base_model(**read, position_ids=torch.cat(positions, 1), use_cache=False)
        states = states.last_hidden_state.float()
        context = average @ states[:, H : H + body.shape[1]]
        if self.gists:
            context = torch.cat([states[:, H + body.shape[1] :], context], -1)  # C M 2d
        return self.skip(mean) + self.second(F.gelu(self.first(self.norm(context))))


class Interlingua(nn.Module):
    """The document's last proposal: the token embeddings of every reader and an anchor, here the mean last state of the
    first reader, are brought to d_z; a query for each place of the text attends to all of them."""

    def __init__(self, args: Args, readers: list):
        super().__init__()
        d, self.readers = args.d_z, readers  # a plain list: they are not its parts
        self.into = nn.ModuleList(nn.Linear(r.width, d) for r in readers)
        self.anchor, self.query = nn.Linear(readers[0].width, d), nn.Parameter(torch.empty(1, d))
        self.attention, self.norm, self.out = attention(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, batch: "Batch") -> Tensor:
        first, p, parts, masks = self.readers[0], batch.prompts[0], [], []
        with torch.no_grad():
            read = {"inputs_embeds": first.embed(p.body), "attention_mask": p.body_mask}
            state = first.base.base_model(**read, use_cache=False).last_hidden_state.float()  # C N d
            state = (state * p.body_mask[..., None]).sum(1) / p.body_mask.sum(1)[:, None]
        longest = int(p.body_mask.sum(1).max()) * 2
        table = sinusoids(longest, self.query.shape[1], p.body.device)
        for reader, into, p in zip(self.readers, self.into, batch.prompts):
            n, t = p.body_mask.sum(1)[:, None], torch.arange(p.body.shape[1], device=p.body.device)
            place = t * batch.prompts[0].body_mask.sum(1)[:, None] // n  # counted in tokens of the first reader: C N
            parts.append(into(reader.embed(p.body).float() / reader.rms) + table[place.clamp(max=longest - 1)])
            masks.append(p.body_mask)
        anchor = self.anchor(state)[:, None]  # C 1 d
        x, mask = torch.cat([*parts, anchor], 1), torch.cat([*masks, masks[0][:, :1]], 1)
        query = self.query + table[places(batch.prompts[0].body_mask.sum(1), batch.slots)] + anchor  # C M d
        y = query + self.attention(query, self.norm(x), x, mask == 0, need_weights=False)[0]
        return y + self.mlp(self.out(y))


def places(tokens: Tensor, slots: Tensor) -> Tensor:
    """[C, M] the position in a body of `tokens` [C] that each slot stands for: the middle of its segment, rounded."""
    weights = segment_weights(tokens, slots)
    t = torch.arange(weights.shape[2], device=tokens.device, dtype=torch.float32)
    return (weights @ t).round().long()


# ------------------------------------------------------------------------- model: what stands between code and reader
class Adapter(nn.Module):
    """Slots [..., d_z] to a reader's width: A z + W2 GELU(W1 LN z), at the scale of its embedding table."""

    def __init__(self, args: Args, table: Tensor):
        super().__init__()
        d_z, wide, d = args.d_z, args.d_z * args.adapter_hidden_mult, table.shape[1]
        self.norm, self.inner, self.dropout = nn.LayerNorm(d_z), nn.Linear(d_z, wide), nn.Dropout(args.adapter_dropout)
        self.out, self.skip = nn.Linear(wide, d), nn.Linear(d_z, d, bias=False)
        self.scale, self.transform, self.normalize = (
            nn.Parameter(torch.ones(())),
            args.embed_transform,
            args.embed_normalize,
        )
        self.rms = float(table.float().square().mean(1).sqrt().mean())
        self.mean, self.sd = float(table.float().mean()), float(table.float().std())

    @torch.no_grad()
    def begin(self, start: Tensor | None) -> None:
        """A from `start` [d, d_z], and no correction of it; or both random."""
        widen(self.inner)
        if start is None:
            widen(self.skip, self.out)
        else:
            self.skip.weight.copy_(start)
            self.out.weight.zero_()

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """[C, M, d] of codes z [C, M, d_z] whose slots `mask` [C, M] marks: what it leaves out moves nothing."""
        y = self.skip(z) + self.out(self.dropout(F.gelu(self.inner(self.norm(z)))))
        how = self.transform if self.training or self.normalize == "none" else "batch_distribution"
        if how == "rms_matching":
            y = y * (self.rms / (y.square().mean(-1, keepdim=True) + 1e-12).sqrt())
        elif how == "batch_distribution":  # over each code's own slots, so that no batch mate matters
            n, w = mask.sum(1)[:, None, None] * y.shape[2], mask[..., None]
            mean = (y * w).sum((1, 2), keepdim=True) / n
            sd = (((y - mean).square() * w).sum((1, 2), keepdim=True) / n + 1e-12).sqrt()
            y = (y - mean) / sd * self.sd + self.mean
        return y * self.scale


def by_head(y: Tensor, heads: int) -> Tensor:
    """[B, T, width] -> [B, heads, T, size]."""
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)


class KeyValues(nn.Module):
    """[C, P, width] -> keys and values [C, heads, P, head size] of every layer; values are zero at the start."""

    def __init__(self, width: int, config):
        super().__init__()
        self.heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (width, self.heads * size)
        self.keys = nn.ModuleList(nn.Linear(*shape) for _ in range(config.num_hidden_layers))
        self.values = nn.ModuleList(nn.Linear(*shape) for _ in range(config.num_hidden_layers))

    def begin(self) -> None:
        for layer in self.values:
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(by_head(k(x), self.heads), by_head(v(x), self.heads)) for k, v in zip(self.keys, self.values)]


class Prefix(nn.Module):
    """PEFT's prefix: learned keys and values, the same for every code."""

    def __init__(self, args: Args, config):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(args.prefix_tokens, 2 * args.d_z))
        self.cache = KeyValues(2 * args.d_z, config)

    def forward(self, z: Tensor, mask: Tensor) -> tuple[list, Tensor]:
        return self.cache(self.tokens.expand(len(z), -1, -1)), mask.new_ones(len(z), len(self.tokens))


class DeepPrefix(nn.Module):
    """Keys and values of every layer from the slots."""

    def __init__(self, args: Args, config):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(args.d_z), nn.Linear(args.d_z, args.d_z)
        self.dropout, self.cache = nn.Dropout(args.deep_prefix_dropout), KeyValues(args.d_z, config)

    def forward(self, z: Tensor, mask: Tensor) -> tuple[list, Tensor]:
        x = self.norm(z)
        return self.cache(self.dropout(x + self.mix(x))), mask


class Coprocessor(nn.Module):
    """Keys and values of every layer from the pooled slots, scaled by 0.8."""

    def __init__(self, args: Args, config):
        super().__init__()
        self.pool, self.length = args.coprocessor_pool, args.coprocessor_len
        self.mlp = nn.Sequential(nn.Linear(args.d_z, 256), nn.GELU(), nn.Linear(256, 256 * self.length))
        self.cache = KeyValues(256, config)

    def forward(self, z: Tensor, mask: Tensor) -> tuple[list, Tensor]:
        if self.pool == "first":
            x = z[:, 0]
        elif self.pool == "max":
            x = z.masked_fill(mask[..., None] == 0, -math.inf).amax(1)
        else:
            x = (z * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        cache = self.cache(self.mlp(x).unflatten(-1, (self.length, 256)))
        return [(0.8 * k, 0.8 * v) for k, v in cache], mask.new_ones(len(z), self.length)


class LatentAdapter(nn.Module):
    """x + tanh(alpha) W MLP(attention of x to the slots), inside a reader's layer: 1,258,497 parameters at d 4096, d_z
    256. The document's own form, at full width, has 153,133,057, not the 3 to 5 million that it states."""

    def __init__(self, d: int, d_z: int, width: int = 128):
        super().__init__()
        self.norm, self.query = nn.LayerNorm(d), nn.Linear(d, width)
        self.key, self.value = nn.Linear(d_z, width), nn.Linear(d_z, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.up, self.alpha = nn.Linear(width, d), nn.Parameter(torch.tensor(0.5))

    def begin(self) -> None:
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, d], z [B, M, d_z], mask [B, M]."""
        q, k, v = (by_head(y, 8) for y in (self.query(self.norm(x.float())), self.key(z), self.value(z)))
        y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None].bool()).transpose(1, 2).flatten(2)
        return x + (torch.tanh(self.alpha) * self.up(self.mlp(y))).to(x.dtype)


class GistHead(nn.Module):
    """Learned queries attend to the slots and say what the prompt's first embeddings were."""

    def __init__(self, args: Args, d: int, length: int = 48):
        super().__init__()
        self.queries, self.attention = nn.Parameter(torch.empty(length, args.d_z)), attention(args.d_z)
        sizes = (args.d_z, 512)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(sizes[0]), nn.Linear(*sizes), nn.GELU(), nn.Linear(*sizes[::-1])) for _ in "12"
        )
        self.out = nn.Sequential(nn.LayerNorm(args.d_z), nn.Linear(args.d_z, d))

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """[C, 48, d]."""
        x = self.attention(self.queries.expand(len(z), -1, -1), z, z, mask == 0, need_weights=False)[0]
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


class Refiner(nn.Module):
    """A small transformer over the slots; its gate is zero at the start."""

    def __init__(self, args: Args):
        super().__init__()
        self.encoder, self.gate = transformer(args.d_z, args.latent_refiner_layers), nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        return z + self.gate * self.encoder(z, src_key_padding_mask=mask == 0)


# ------------------------------------------------------------------------------------------------ model: the readers
class Prompts(NamedTuple):
    """A batch in the tokens of one reader: head [H], the same for all; body [C, N] of each code's source, padded at the
    right; tail [B, T] of each question, at the left; gold [B, A], at the right. `of` [B] is the code of a question."""

    head: Tensor
    body: Tensor
    body_mask: Tensor
    tail: Tensor
    tail_mask: Tensor
    gold: Tensor
    gold_mask: Tensor
    of: Tensor


class Code(NamedTuple):
    z: Tensor  # C M d_z, as it arrived
    mask: Tensor  # C M


class Seen(NamedTuple):
    """What a reader reads: embeddings [B, P, d], mask and positions [B, P]; keys and values before them, if any, and
    their mask; the code of each row, if a code is read."""

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    cache: list = ()
    cache_mask: Tensor | None = None
    code: Code | None = None

    def then(self, embeds: Tensor, mask: Tensor) -> "Seen":
        """`embeds` [B, A, d] follow, their positions count on."""
        after = self.positions[:, -1:] + 1 + torch.arange(mask.shape[1], device=mask.device)
        pairs = ((self.embeds, embeds), (self.mask, mask), (self.positions, after))
        return self._replace(**{k: torch.cat(pair, 1) for k, pair in zip(("embeds", "mask", "positions"), pairs)})


STOPS = ("<|eot_id|>", "<|im_end|>", "</s>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")


class Reader(nn.Module):
    """A frozen language model, its tokenizer, its adapter, and the document's parts that were asked for."""

    def __init__(self, name: str, base, tokenizer, args: Args):
        super().__init__()
        self.name, self.base, self.tokenizer = name, base.requires_grad_(False).eval(), tokenizer
        self.width, self.adapter = self.table.shape[1], Adapter(args, self.table)
        self.rms, self.parts, config = self.adapter.rms, nn.ModuleDict(), base.config
        if args.use_lora:
            self.parts["lora"] = Lora(base, "qv", args.lora_r, args.lora_alpha, args.lora_firstN, args.lora_dropout)
        for flag, kind in (("prefix", Prefix), ("deep_prefix", DeepPrefix), ("coprocessor", Coprocessor)):
            if getattr(args, f"use_{flag}"):
                self.parts[flag] = kind(args, config)
        self.sees = None  # the code of each row, while one is read
        if args.use_latent_adapters:
            layers = [int(n) for n in numbers(args.latent_adapter_layers)]
            line = f"--latent_adapter_layers {args.latent_adapter_layers}: {name} has layers 0 to "
            require(layers and max(layers) < config.num_hidden_layers, f"{line}{config.num_hidden_layers - 1}")
            self.parts["latent_adapters"] = nn.ModuleList(LatentAdapter(self.width, args.d_z) for _ in layers)
            for place, part in zip(layers, self.parts["latent_adapters"]):
                base.base_model.layers[place].register_forward_hook(functools.partial(self.inside, part))
        if args.use_gist_head:
            self.parts["gist_head"] = GistHead(args, self.width)
        self.ask = nn.Parameter(torch.empty(self.width)) if args.latent_align_weight else None  # "the context, please"
        known, mode = tokenizer.get_vocab(), args.warm_anchor_mode
        self.stop = list(dict.fromkeys([tokenizer.eos_token_id, *(known[s] for s in STOPS if s in known)]))
        cut, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("Answer: ", "Answer: the"))
        self.glued = whole[: len(cut)] != cut  # a blank belongs to the word after it, so no prompt may end in one
        self.chat = mode == "chat" or (mode == "auto" and bool(tokenizer.chat_template))
        self.anchor = "" if mode == "none" else "Answer: "

    def inside(self, part: LatentAdapter, module, inputs, out):
        if self.sees is None:
            return out
        if isinstance(out, tuple):
            return (part(out[0], *self.sees), *out[1:])
        return part(out, *self.sees)

    def train(self, mode: bool = True):
        super().train(mode)
        self.base.eval()
        return self

    @property
    def table(self) -> Tensor:
        """The embedding table [V, d]."""
        return self.base.get_input_embeddings().weight

    def embed(self, ids: Tensor) -> Tensor:
        return self.base.get_input_embeddings()(ids)

    def trained(self) -> dict[str, Tensor]:
        """What is trained for this reader, by name."""
        return {n: p for n, p in self.named_parameters() if not n.startswith("base.")}

    def see(self, p: Prompts, x: Tensor, mask: Tensor, where: Tensor, span: Tensor, code: Code | None = None) -> Seen:
        """[head | x | tail] for every question, from embeddings x [C, N, d] that `mask` [C, N] marks and that stand at
        the places `where` [C, N] of a body of `span` [C] positions, behind which the question goes on."""
        B, H, of = len(p.tail), len(p.head), p.of
        t = torch.arange(H, device=x.device).expand(B, -1)
        tail = H + span[of][:, None] + (p.tail_mask.cumsum(1) - 1).clamp(min=0)
        head, x = self.embed(p.head).expand(B, -1, -1), x.to(self.table.dtype)[of]
        embeds, positions = torch.cat([head, x, self.embed(p.tail)], 1), torch.cat([t, (H + where)[of], tail], 1)
        seen = Seen(embeds, torch.cat([torch.ones_like(t), mask[of].long(), p.tail_mask], 1), positions)
        if code is None:
            return seen
        made = [self.parts[n](code.z, code.mask) for n in ("prefix", "deep_prefix", "coprocessor") if n in self.parts]
        if made:
            cache = [tuple(torch.cat(kv, 2)[of] for kv in zip(*layer)) for layer in zip(*(c for c, _ in made))]
            seen = seen._replace(cache=cache, cache_mask=torch.cat([m for _, m in made], 1)[of].long())
        return seen._replace(code=Code(code.z[of], code.mask[of]))

    def run(self, seen: Seen, keep: int = 0, grow: bool = False, hidden: bool = False):
        """The frozen model on what is seen: logits of the last `keep` places, its last states, or (`grow`) all that
        generation needs. Parts act where a code is read, and nowhere else."""
        from transformers import DynamicCache

        cache, mask, positions = None, seen.mask, seen.positions
        if seen.cache:
            cache = DynamicCache()
            for layer, pair in enumerate(seen.cache):
                cache.update(*(y.to(self.table.dtype) for y in pair), layer)
            mask, positions = torch.cat([seen.cache_mask, mask], 1), positions + seen.cache_mask.sum(1, keepdim=True)
        read = {"inputs_embeds": seen.embeds, "attention_mask": mask, "position_ids": positions}
        model = self.base.base_model if hidden else self.base
        kept = {} if hidden else {"logits_to_keep": keep}
        with self.reading(seen.code):
            return model(**read, past_key_values=cache, use_cache=grow or cache is not None, **kept), mask, positions

    @contextlib.contextmanager
    def reading(self, code: Code | None):
        self.sees, lora = code, self.parts["lora"] if "lora" in self.parts and code is not None else None
        try:
            with lora.switched_on() if lora else contextlib.nullcontext():
                yield
        finally:
            self.sees = None

    def answer_logits(self, seen: Seen, gold: Tensor, gold_mask: Tensor) -> Tensor:
        """[B, A, V] in fp32: column j predicts gold token j."""
        read = seen.then(self.embed(gold[:, :-1]), gold_mask[:, :-1])
        return self.run(read, keep=gold.shape[1])[0].logits.float()

    @torch.no_grad()
    def answers(self, seen: Seen, most: int) -> list[str]:
        """Greedy answers of at most so many tokens."""
        stop, tokens = torch.tensor(self.stop, device=seen.mask.device), []
        out, mask, positions = self.run(seen, keep=1, grow=True)
        position, done = positions[:, -1:], torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        for step in range(most):
            token = torch.where(done, stop[0], out.logits[:, -1].float().argmax(-1))
            tokens.append(token)
            done = done | torch.isin(token, stop)
            if done.all() or step == most - 1:
                break
            mask, position = torch.cat([mask, torch.ones_like(position)], 1), position + 1
            read = {"input_ids": token[:, None], "attention_mask": mask, "position_ids": position}
            with self.reading(seen.code):
                out = self.base(**read, use_cache=True, past_key_values=out.past_key_values, logits_to_keep=1)
        said = []
        for row in torch.stack(tokens, 1).tolist():
            row = row[: next((at for at, token in enumerate(row) if token in self.stop), len(row))]
            said.append(self.tokenizer.decode(row, skip_special_tokens=True).strip())
        return said

    def message(self, text: str) -> str:
        """A text as a user's message in the reader's chat template."""
        line = f"{self.name} has no chat template: drop --encoder_use_chat_template, use --warm_anchor_mode text"
        require(self.tokenizer.chat_template, line)
        talk = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)

    def prompts(self, rows: list[dict], sources: list[str], first: list[int], of: Tensor) -> Prompts:
        """The prompts of the rows, cut where what is coded (`sources`) begins and ends; `first` [C] is the first row of
        each code. The code of a row has the same body as the row itself, since what follows a context begins with a
        line's end."""
        texts, cut = [], []
        for row in rows:
            text = f"Context: {row['context']}\nQuestion: {row['question']}\n"
            text = (self.message(text) if self.chat else text) + self.anchor
            texts.append(text.rstrip(" ") if self.glued else text)
        told = self.tokenizer(texts, return_offsets_mapping=True, add_special_tokens=not self.chat, verbose=False)
        for text, source, ids, offsets in zip(texts, sources, told["input_ids"], told["offset_mapping"]):
            start = text.index("Context: ") + len("Context: ")
            a = next((j for j, (_, end) in enumerate(offsets) if end > start), len(ids))
            b = next((j for j in range(a, len(ids)) if offsets[j][1] > start + len(source)), len(ids))
            cut.append((ids[:a], ids[a:b], ids[b:]))
        require(all(cut[c][1] for c in first), "a context without a token: remove it from the file")
        head, body = torch.tensor(cut[0][0], device=of.device), padded([cut[c][1] for c in first], of.device)
        tail, gold = padded([part for *_, part in cut], of.device, "left"), self.ends([r["answers"][0] for r in rows])
        return Prompts(head, *body, *tail, *gold, of)

    def ends(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Answers as tokens with the end token, [B, A], and their mask: a pad may be the end token itself."""
        blank = " " if self.glued and self.anchor else ""
        ids = self.tokenizer([blank + text if text else "" for text in texts], add_special_tokens=False)["input_ids"]
        return padded([[*row, self.tokenizer.eos_token_id] for row in ids], self.table.device)

    @torch.no_grad()
    def likelihood(self, seen: Seen, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probability of each text as the answer, its tokens, whether its first is the reader's choice), [B]."""
        gold, mask = self.ends(texts)
        logits = self.answer_logits(seen, gold, mask)
        logp = logits.log_softmax(-1).gather(-1, gold[..., None])[..., 0] * mask
        return logp.sum(1), mask.sum(1), logits[:, 0].argmax(-1) == gold[:, 0]


# ------------------------------------------------------------------------------------------------ model: the wire
class Batch(NamedTuple):
    """Questions (rows) and the codes that they share, in every reader's tokens."""

    rows: list  # B
    texts: list  # C: what is coded
    slots: Tensor  # C
    prompts: list  # one for each reader


class Wire(nn.Module):
    """Readers, sender and refiner: the one way from texts to codes, and from a code to what each reader sees."""

    def __init__(self, args: Args, readers: list, counter, slots: int):
        super().__init__()
        self.args, self.readers, self.counter = args, nn.ModuleList(readers), counter
        self.most = slots if args.encoder_type == "byte" else 10**9  # it has a learned query for each slot
        kinds = {"byte": lambda: ByteSender(args, slots), "interlingua": lambda: Interlingua(args, readers)}
        self.sender = kinds.get(args.encoder_type, lambda: LmSender(args, readers[0]))()
        self.refiner = Refiner(args) if args.use_latent_refiner else None
        self.to(readers[0].table.device)
        for part in (self.sender, self.refiner, *(m for r in readers for m in (r.adapter, r.parts))):
            if part is not None:
                core.init_normal(part, args.seed)
        for part in self.modules():
            if isinstance(part, Lora | KeyValues | LatentAdapter):
                part.begin()
        basis = start_of(args, readers[0].table) if args.encoder_type == "lm" else None
        if basis is not None:
            self.sender.begin(basis)
        for i, reader in enumerate(readers):
            aligned = basis is not None and args.adapter_start == "aligned" and i == 0
            reader.adapter.begin(basis.T if aligned else None)
            if reader.ask is not None:
                nn.init.constant_(reader.ask, reader.rms)
        self.sender.requires_grad_(not args.freeze_encoder)

    @torch.no_grad()
    def align(self, batch: Batch) -> None:
        """Fit the linear part of every further adapter, by ridge regression, from where the codes start to the means of
        that reader's own embeddings over the same segments."""
        code = self.sender.skip(self.means(batch, 0)).double()  # C M d_z
        valid = (torch.arange(code.shape[1], device=code.device) < batch.slots[:, None]).flatten()
        x = code.flatten(0, 1)[valid]
        gram = x.T @ x
        gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=x.device, dtype=x.dtype)
        for i, reader in enumerate(self.readers):
            if i:
                y = self.means(batch, i).double().flatten(0, 1)[valid]
                reader.adapter.skip.weight.copy_(torch.linalg.solve(gram, x.T @ y).T)
                reader.adapter.out.weight.zero_()

    def means(self, batch: Batch, i: int) -> Tensor:
        """[C, M, d] mean embeddings of reader i over the segments that the slots stand for."""
        p = batch.prompts[i]
        return segment_weights(p.body_mask.sum(1), batch.slots) @ self.readers[i].embed(p.body).float()

    # -- what a checkpoint holds
    def own(self) -> dict[str, dict]:
        """{part: {name: parameter}} of sender, refiner and what belongs to each reader."""
        parts = {"sender": self.sender, "refiner": self.refiner}
        parts = {name: dict(part.named_parameters()) for name, part in parts.items() if part is not None}
        return parts | {reader.name: reader.trained() for reader in self.readers}

    def state(self) -> dict:
        """Everything trained, on the CPU, and the flags that it was trained under."""
        own = {part: {n: p.detach().cpu().clone() for n, p in held.items()} for part, held in self.own().items()}
        readers = {reader.name: own.pop(reader.name) for reader in self.readers}
        return own | {"config": vars(self.args), "readers": readers}

    def load(self, state: dict, where: str, needed: bool = True) -> None:
        """Take over what the `state` of the file `where` holds; a reader that it does not know stays as it is."""
        require({"sender", "readers"} <= state.keys(), f"{where}: not a checkpoint of this script")
        held = state | state["readers"]
        require(not needed or all(r.name in held for r in self.readers), f"{where}: it lacks a reader of --models")
        for part, known in self.own().items():
            tensors = held.get(part, known)
            odd = [name for name in {**known, **tensors} if name not in tensors or name not in known]
            odd = odd or [name for name, p in known.items() if tensors[name].shape != p.shape]
            remedy = "give those that it was made with"
            require(not odd, f"{where}: its {part} does not fit these flags ({', '.join(odd[:1])}); {remedy}")
            for name, p in known.items():
                p.data.copy_(tensors[name])

    # -- from texts to codes, and from a code to what a reader sees
    def collate(self, rows: list[dict], ratio: float | None) -> Batch:
        """Rows that share what is coded share their code; its slots are counted in the tokens of --count_tokens_of."""
        args, device = self.args, self.readers[0].table.device
        asked = args.question_scope == "encoded"  # as published
        texts = [f"{row['context']}\nQuestion: {row['question']}" if asked else row["context"] for row in rows]
        place = {text: c for c, text in enumerate(dict.fromkeys(texts))}
        first, of = [texts.index(text) for text in place], torch.tensor([place[t] for t in texts], device=device)
        prompts = [reader.prompts(rows, texts, first, of) for reader in self.readers]
        counts = torch.stack([p.body_mask.sum(1) for p in prompts])  # readers C
        tokens = counts[0]
        if self.counter is not None:
            ids = self.counter(list(place), add_special_tokens=False)["input_ids"]
            tokens = torch.tensor([len(row) for row in ids], device=device)
        wanted = torch.ceil(tokens / ratio).long() if ratio else torch.full_like(tokens, args.latent_len)
        slots = wanted.clamp(1, self.most).minimum(counts.amin(0))
        coded = [self.readers[0].message(t) if args.encoder_use_chat_template else t for t in place]
        return Batch(rows, coded, slots, prompts)

    def code(self, batch: Batch, bits: int | None = None) -> Code:
        """The codes of a batch as they arrive. The sender sees texts and slots: no question, unless it is encoded."""
        z = self.sender(batch)
        mask = (torch.arange(z.shape[1], device=z.device) < batch.slots[:, None]).long()
        z = z * mask[..., None]
        if self.refiner is not None:
            z = self.refiner(z, mask) * mask[..., None]
        return Code(quantise(z, mask, self.args.bits if bits is None else bits), mask)

    def coded(self, i: int, batch: Batch, code: Code) -> Seen:
        """Reader i before the slots of a code, which take the places of the tokens that they stand for."""
        reader, p = self.readers[i], batch.prompts[i]
        n = p.body_mask.sum(1)
        return reader.see(p, reader.adapter(code.z, code.mask), code.mask, places(n, batch.slots), n, code)

    def text(self, i: int, batch: Batch, code=None, keep: Tensor | None = None) -> Seen:
        """Reader i before the text itself, or before those of its tokens that `keep` [C, N] marks."""
        reader, p = self.readers[i], batch.prompts[i]
        keep = p.body_mask.bool() if keep is None else keep & p.body_mask.bool()
        order = (~keep).long().argsort(dim=1, stable=True)[:, : max(1, int(keep.sum(1).max()))]
        mask, t = keep.take_along_dim(order, 1), torch.arange(order.shape[1], device=keep.device)
        return reader.see(p, reader.embed(p.body.take_along_dim(order, 1)), mask, t.expand_as(order), keep.sum(1))

    def crossed(self, i: int, batch: Batch, code: Code) -> Seen:
        """Reader i before what the next reader's adapter makes of the code: cut or filled up to its own width."""
        reader, other = self.readers[i], self.readers[(i + 1) % len(self.readers)]
        p, y = batch.prompts[i], other.adapter(code.z, code.mask)
        y = F.pad(y, (0, max(0, reader.width - other.width)))[..., : reader.width]
        y = y * (reader.rms / (y.square().mean(-1, keepdim=True) + 1e-12).sqrt())
        n = p.body_mask.sum(1)
        return reader.see(p, y, code.mask, places(n, batch.slots), n, code)


def start_of(args: Args, table: Tensor) -> Tensor:
    """[d_z, d] where the lm sender starts: the identity, or the table's first principal directions if d_z is less."""
    d = table.shape[1]
    if args.d_z >= d:
        return torch.eye(args.d_z, d, device=table.device)
    vectors = torch.linalg.eigh(table.double().T @ table.double())[1].flip(1)[:, : args.d_z]  # d d_z
    peak = vectors.gather(0, vectors.abs().argmax(0)[None])
    return (vectors * peak.sign()).T.float()


# -------------------------------------------------------------------------------------------------- model: the losses
class Objective(nn.Module):
    """The loss of a wire on one batch and its terms. Under DDP each is a mean over positions of which every process has
    another number; `mean` makes the mean over the processes the mean over all positions."""

    def __init__(self, wire: Wire, accelerator=None):
        super().__init__()
        self.wire, self.args, self.accelerator = wire, wire.args, accelerator

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        w = 1.0 if self.accelerator is None else core.weight_of(self.accelerator, mask.sum())
        return w * (values * mask).sum() / mask.sum().clamp(min=1)

    def forward(self, batch: Batch, first: float = 0.0, rewrite: float = 0.0, warm: bool = False) -> dict[str, Tensor]:
        """`loss` and its terms: `first` and `rewrite` are weights of this update, `warm` says that it only aligns."""
        code, sums, loss = self.wire.code(batch), {}, 0.0
        right = scored = torch.zeros((), device=code.z.device)
        for i, reader in enumerate(self.wire.readers):
            if warm:
                terms = self.alignment(reader, batch.prompts[i], code)
            else:
                terms, hits, count = self.answering(i, batch, code, first, rewrite)
                right, scored = right + hits, scored + count
            loss = loss + sum(weight * value for value, weight in terms.values())
            for name, (value, _) in terms.items():
                sums[name] = sums.get(name, 0.0) + value
            sums[f"ce_{reader.name}"] = terms["ce"][0].detach() if "ce" in terms else torch.zeros(())
        return sums | {"loss": loss, "right": right, "scored": scored}

    def scale(self, reader: Reader) -> tuple[Tensor, float]:
        return (reader.adapter.scale - 1).square(), self.args.scale_l2

    def alignment(self, reader: Reader, p: Prompts, code: Code) -> dict:
        """{name: (term, its weight)} of the first slots against the answer's embeddings."""
        K = min(self.args.warmup_align_tokens, p.gold.shape[1], code.z.shape[1])
        x = reader.adapter(code.z, code.mask)[p.of][:, :K]  # B K d
        error = (x - reader.embed(p.gold[:, :K]).float()).square().mean(-1) / reader.rms**2
        mean = self.mean(error, p.gold_mask[:, :K] * code.mask[p.of][:, :K])
        return {"align": (mean, self.args.warmup_align_weight), "scale": self.scale(reader)}

    def answering(self, i: int, batch: Batch, code: Code, first: float, rewrite: float) -> tuple[dict, Tensor, Tensor]:
        """({name: (term, its weight)}, answer tokens right, scored) of reader i."""
        args, reader, p, mask = self.args, self.wire.readers[i], batch.prompts[i], batch.prompts[i].gold_mask
        logits = reader.answer_logits(self.wire.coded(i, batch, code), p.gold, mask)  # B A V
        ce, K = F.cross_entropy(logits.transpose(1, 2), p.gold, reduction="none"), args.k_tokens  # B A
        terms = {"ce": (self.mean(ce, mask), 1.0), "scale": self.scale(reader)}
        if args.k_ce_weight:
            terms["kce"] = self.mean(ce[:, :K], mask[:, :K]), args.k_ce_weight
        if args.first_token_ce_weight:
            terms["first"] = self.mean(ce[:, :1], mask[:, :1]), first
        if args.first_token_entropy_weight:
            logp = logits[:, 0].log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
            terms["entropy"] = self.mean(entropy, mask[:, :1]), -args.first_token_entropy_weight
        if args.kd_first_k_weight:
            terms["kd"] = self.distillation(i, batch, logits[:, :K]), args.kd_first_k_weight
        if rewrite:
            terms["rewrite"] = self.rewriting(i, batch, code), rewrite
        if "gist_head" in reader.parts:
            terms["gist"] = self.reconstruction(reader, p, code), args.gist_weight
        hits = (logits.argmax(-1) == p.gold) & mask.bool()
        return terms, hits.sum().float(), mask.sum().float()

    def distillation(self, i: int, batch: Batch, student: Tensor) -> Tensor:
        """tau^2 KL(reader on text | reader on the code) over the first K answer tokens; student [B, K, V]."""
        p, K, tau = batch.prompts[i], student.shape[1], self.args.kd_tau
        gold, mask = p.gold[:, :K], p.gold_mask[:, :K]
        with torch.no_grad():
            teacher = self.wire.readers[i].answer_logits(self.wire.text(i, batch), gold, mask)
        log_s, log_t = (student / tau).log_softmax(-1), (teacher / tau).log_softmax(-1)
        return tau * tau * self.mean(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1), mask)

    def rewriting(self, i: int, batch: Batch, code: Code) -> Tensor:
        """Cross-entropy of the context's own tokens after [head | slots | ask], without holding their logits."""
        reader, p, N = self.wire.readers[i], batch.prompts[i], batch.prompts[i].body.shape[1]
        tail, mask = (torch.cat([x[:, :1], x], 1) for x in (p.body, p.body_mask))  # C 1+N; `ask` stands in the first
        p = p._replace(tail=tail, tail_mask=mask, of=torch.arange(len(tail), device=tail.device))
        seen = self.wire.coded(i, batch._replace(prompts=[*batch.prompts[:i], p]), code)
        seen.embeds[:, -N - 1] = reader.ask.to(seen.embeds.dtype)
        hidden = reader.run(seen, hidden=True)[0].last_hidden_state[:, -N - 1 : -1]  # C N d
        target, weight = p.body.masked_fill(p.body_mask == 0, -1), reader.base.get_output_embeddings().weight
        loss = core.head_loss(hidden.flatten(0, 1), weight, target.flatten())[0]
        return self.mean(loss.expand(p.body.shape), p.body_mask)

    def reconstruction(self, reader: Reader, p: Prompts, code: Code) -> Tensor:
        """Squared error of the gist head against the prompt's first embeddings, some of which each step leaves out."""
        y = reader.parts["gist_head"](code.z, code.mask)  # C 48 d
        ids = torch.cat([p.head.expand(len(p.body), -1), p.body], 1)[:, : y.shape[1]]
        mask = torch.cat([p.body_mask[:, :1].expand(-1, len(p.head)), p.body_mask], 1)[:, : y.shape[1]]
        kept = mask * (torch.rand(mask.shape) >= self.args.gist_mask_prob).to(mask.device)
        return self.mean((y[:, : ids.shape[1]] - reader.embed(ids).float()).square().mean(-1), kept)


# ----------------------------------------------------------------------------------------------------------- data


# twin of latentwire_stage1.py:shuffled
def shuffled(rows: list[dict], count: int, seed: int) -> list[dict]:
    """The first `count` rows (all, if it is not positive) of a shuffle, as the document draws its subsets."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows[: count if count > 0 else None]


# twin of latentwire_stage1.py:split_by_article
def split_by_article(rows: list[dict], source: str) -> tuple[list[dict], list[dict]]:
    """(train, eval) rows of `source`: a tenth of its articles, or of its only article's passages, is held out."""
    key = "title" if len({row["title"] for row in rows}) > 1 else "context"
    names = sorted({row[key] for row in rows})
    require(len(names) > 1, f"{source} has one passage only: give --eval_file")
    names = set(shuffled(names, max(1, len(names) // 10), 0))
    held_out = [row for row in rows if row[key] in names]
    seen = {row["context"] for row in held_out}  # a passage may stand in two articles
    return [row for row in rows if row[key] not in names and row["context"] not in seen], held_out


def grouped(rows: list[dict], questions: int) -> list[list[dict]]:
    """Rows by context, at most so many of each."""
    groups = {}
    for row in rows:
        groups.setdefault(row["context"], []).append(row)
    return [group[:questions] for group in groups.values()]


def held_pair(name: str, value: str) -> bool:
    """Whether --unseen_pairs keeps this name and this colour apart in training: one pair in sixteen."""
    return core.derived_seed(0, "pair", name, value.split()[0]) % 16 == 0


def stated(context: str) -> list[tuple[str, str]]:
    """(name, value) of each fact of a generated context."""
    return re.findall(r"of (\w+) is ([\w ]+?) \.", context)


class Data(NamedTuple):
    train: list  # one list of contexts (each a list of rows) for each number of facts of the curriculum
    evaluation: list  # of contexts
    beyond: dict  # {number of facts: contexts}
    unseen: list  # contexts with questions about pairs that --unseen_pairs kept apart
    source: str


def load_data(args: Args, tokenizer) -> Data:
    """Training sees no evaluated context. A file or the hub set gives contexts in the order of a seeded shuffle."""
    q, unseen = args.questions_per_context, []
    if args.dataset == "synthetic" and not args.train_file:

        def made(count, seed, purpose, facts, known=frozenset()):
            return grouped(core.question_rows(count, seed, purpose, known, facts, min(q, facts)), q)

        evaluation = made(args.eval_samples, 42, "evaluation", args.facts)
        known, pools = {group[0]["context"] for group in evaluation}, []
        for facts in dict.fromkeys(facts for facts, _ in args.stages):
            share = (15 / 16) ** facts / 2 if args.unseen_pairs else 1  # of contexts that hold no such pair, at least
            pool = made(math.ceil(args.samples / share), args.seed, "training", facts, known)
            if args.unseen_pairs:
                pool = [g for g in pool if not any(held_pair(*fact) for fact in stated(g[0]["context"]))]
            require(len(pool) >= args.samples, "--unseen_pairs left too few contexts: lower --samples")
            pools.append(pool[: args.samples])
        beyond = {n: made(args.eval_samples, 42, "evaluation", n) for n in map(int, numbers(args.eval_facts))}
        if args.unseen_pairs:
            every = core.question_rows(4 * args.eval_samples, 43, "unseen", known, args.facts, args.facts)
            about = [r for r in every if held_pair(re.search(r"of (\w+) \?", r["question"])[1], r["answers"][0])]
            unseen = grouped(about, q)[: args.eval_samples]
        return Data(pools, evaluation, beyond, unseen, "generated")
    if args.train_file:
        rows, same = core.squad_rows(args.train_file), args.eval_file in ("", args.train_file)
        rows, held_out = split_by_article(rows, args.train_file) if same else (rows, core.squad_rows(args.eval_file))
    else:
        rows, held_out = (core.squad_rows("rajpurkar/squad", split) for split in ("train", "validation"))
    shared = {row["context"] for row in rows} & {row["context"] for row in held_out}
    require(not shared, f"{len(shared)} passages are in both training and evaluation data: use disjoint files")
    rows, held_out = (shortened(part, args.max_length, tokenizer) for part in (rows, held_out))
    train = shuffled(grouped(rows, q), args.samples, 0)
    evaluation = shuffled(grouped(held_out, q), args.eval_samples, 42)
    return Data([train], evaluation, {}, [], "file" if args.train_file else "squad")


def shortened(rows: list[dict], longest: int, tokenizer) -> list[dict]:
    """Rows whose contexts are cut to so many tokens of the first reader."""
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    told = tokenizer(contexts, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    cut = {c: c[: at[:longest][-1][1]] for c, at in zip(contexts, told["offset_mapping"]) if len(at) > longest}
    rows = [row | {"context": cut.get(row["context"], row["context"])} for row in rows]
    return [row for row in rows if row["context"].strip()]


# ------------------------------------------------------------------------------------------------------- evaluate
def normal(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@torch.no_grad()
def evaluate(wire: Wire, groups: list, engine, way=None, ratio=None, bits=None, joint=False) -> dict:
    """Answers of every reader to the questions of `groups` (contexts), and their scores; `joint`: also the answer that
    the readers agree on. `way(i, batch, code)`: what reader i sees, if not its slots. `ratio`, `bits`: if not those of
    the flags."""
    from accelerate.utils import gather_object

    args, training, way, found = wire.args, wire.training, way or wire.coded, []
    wire.eval()
    order = sorted(range(len(groups)), key=lambda g: (len(groups[g][0]["context"]), g))
    starts = np.cumsum([0, *map(len, groups)]).tolist()  # the number of each context's first question
    chunks = [order[i : i + args.eval_batch_size] for i in range(0, len(order), args.eval_batch_size)]
    for chunk in chunks[engine.process_index :: engine.num_processes]:
        rows = [row for g in chunk for row in groups[g]]
        table = [{"at": starts[g] + k, "joint": {}} for g in chunk for k in range(len(groups[g]))]
        batch = wire.collate(rows, ratio or args.ratio)
        code, seen = wire.code(batch, bits), []
        for i, reader in enumerate(wire.readers):
            code = wire.code(batch, bits) if args.fresh_eval else code
            seen.append(way(i, batch, code))
            figures = [reader.answers(seen[i], args.max_new_tokens)]
            figures += [x.tolist() for x in reader.likelihood(seen[i], [row["answers"][0] for row in rows])]
            for row, *values in zip(table, *figures, seen[i].mask.sum(1).tolist()):
                row[reader.name] = dict(zip(("said", "logp", "tokens", "right", "positions"), values))
        for proposer in wire.readers if joint else ():  # what every reader thinks of every reader's answer
            texts = [row[proposer.name]["said"] for row in table]
            judged = [judge.likelihood(view, texts) for judge, view in zip(wire.readers, seen)]
            for b, row in enumerate(table):
                row["joint"][proposer.name] = [(float(logp[b]), int(tokens[b])) for logp, tokens, _ in judged]
        found += table
    wire.train(training)
    found = sorted(gather_object(found) if engine.num_processes > 1 else found, key=lambda row: row["at"])
    return scores(wire, [row for group in groups for row in group], found, joint)


def scores(wire: Wire, rows: list[dict], found: list[dict], joint: bool) -> dict:
    """Per reader: SQuAD scores with their intervals over contexts; jointly: the answer of the highest sum of
    log-probabilities (of its mean per token), the readers' agreement, and the better of their answers each time."""
    passages, names = [row["context"] for row in rows], [reader.name for reader in wire.readers]

    def scored(said: list[str]) -> dict:
        em, f1 = np.array([core.squad_scores(text, row["answers"]) for text, row in zip(said, rows)]).T
        figures = {"em": float(em.mean()), "f1": float(f1.mean()), "n": len(rows), "f1_each": f1.tolist()}
        figures |= {"em_interval": core.bootstrap(em, 2000, clusters=passages), "said": said}
        return figures | {"f1_interval": core.bootstrap(f1, 2000, clusters=passages)}

    result = {"readers": {}}
    for name in names:
        own = {key: [row[name][key] for row in found] for key in found[0][name]}
        each = {"first_tok_top1": float(np.mean(own["right"])), "positions": float(np.mean(own["positions"]))}
        each |= {"nll_per_token": -sum(own["logp"]) / sum(own["tokens"])}
        each |= {"different_answers": len(set(map(normal, own["said"]))) / len(found)}
        result["readers"][name] = scored(own["said"]) | each
    result["oracle_f1"] = float(np.max([each["f1_each"] for each in result["readers"].values()], 0).mean())
    if joint:
        for key, per_token in (("joint", False), ("joint_per_token", True)):
            said = []
            for row in found:  # of equal sums the first reader's: max keeps the first
                total = {n: sum(p / t if per_token else p for p, t in row["joint"][n]) for n in names}
                said.append(row[max(names, key=total.get)]["said"])
            result[key] = scored(said)
        same = [len({normal(row[name]["said"]) for name in names}) == 1 for row in found]
        result["agreement"] = float(np.mean(same))
    return result


def brief(result):
    """An evaluation without its lists."""
    if not isinstance(result, dict):
        return result
    return {k: brief(v) for k, v in result.items() if k not in ("f1_each", "said")}


def beside(own: dict, row: dict, groups: list) -> dict:
    """An evaluation, brief, with the gap of `own` to it for each reader: paired by question, over contexts."""
    passages, gaps = [r["context"] for group in groups for r in group], {}
    for name, each in row["readers"].items():
        gap = np.array(own["readers"][name]["f1_each"]) - np.array(each["f1_each"])
        gaps[name] = core.bootstrap(gap, 2000, clusters=passages)
    return brief(row) | {"gap": gaps}


@torch.no_grad()
def surprise(wire: Wire, batch: Batch, i: int) -> Tensor:
    """[C, N] negative log-likelihood of each body token under reader i, in one pass over [head | body]."""
    reader, p = wire.readers[i], batch.prompts[i]
    ids = torch.cat([p.head.expand(len(p.body), -1), p.body], 1)
    logits = reader.base(ids, use_cache=False).logits[:, len(p.head) - 1 : -1].float()  # padded at the right: no mask
    return F.cross_entropy(logits.transpose(1, 2), p.body, reduction="none")


def packed_text(row: dict, size: int) -> dict:
    """The row with as much of its context's beginning as so many bytes hold, compressed by zlib."""
    words, low, high = row["context"].split(" "), 1, len(row["context"].split(" "))
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(zlib.compress(" ".join(words[:middle]).encode(), 9)) <= size
        low, high = (middle, high) if fits else (low, middle - 1)
    return row | {"context": " ".join(words[:low])}


def rivals(wire: Wire, groups: list, alone: list[Batch], engine, ratio) -> dict:
    """Text at the code's price: of as many positions (its beginning, its most surprising tokens) and of as many bytes
    (compressed by zlib; as token ids). `alone`: each context by itself."""
    bits = wire.args.bits

    def cut(choose):
        def way(i, batch, code):
            t = torch.arange(batch.prompts[i].body.shape[1], device=batch.slots.device)
            return wire.text(i, batch, keep=choose(i, batch, t))

        return evaluate(wire, groups, engine, way, ratio)

    def salient(i, batch, t):
        score = surprise(wire, batch, i).masked_fill(batch.prompts[i].body_mask == 0, -math.inf)
        return score.argsort(dim=1, descending=True, stable=True).argsort(1) < batch.slots[:, None]

    def ids(i, batch, t):
        width = math.ceil(math.log2(len(wire.readers[i].table)))
        size = [code_bytes(int(m) * wire.args.d_z, bits) for m in batch.slots]
        return t < torch.tensor([8 * s // width for s in size], device=t.device)[:, None]

    rows = {"head": cut(lambda i, batch, t: t < batch.slots[:, None]), "salience": cut(salient)}
    sizes = [code_bytes(int(batch.slots[0]) * wire.args.d_z, bits) for batch in alone]
    packed = [[packed_text(row, size) for row in group] for group, size in zip(groups, sizes)]
    return rows | {"zlib_bytes": evaluate(wire, packed, engine, wire.text), "id_bytes": cut(ids)}


def nulls(wire: Wire, groups: list, engine, ratio, start: dict) -> dict:
    """What the code's figures rest on: another context's code, the wrong adapter, the sender as it was at the start."""
    other = [group[0]["context"] for group in (*groups[1:], groups[0])]
    swapped = [[row | {"context": context} for row in group] for group, context in zip(groups, other)]
    rows = {"swapped": evaluate(wire, swapped, engine, ratio=ratio)}
    if len(wire.readers) > 1:
        rows["wrong_adapter"] = evaluate(wire, groups, engine, wire.crossed, ratio)
    trained = wire.state()["sender"]
    wire.sender.load_state_dict(start)
    rows["untrained_sender"] = evaluate(wire, groups, engine, ratio=ratio)
    wire.sender.load_state_dict(trained)
    return rows


def cost(wire: Wire, alone: list[Batch], bits: int) -> dict:
    """Of a mean context: slots, bytes on the wire beside those of the text, and operations (two for each weight and
    token; attention is not counted). Beside the code go two bytes a reader: how many positions it stands for."""
    args, slots = wire.args, np.array([int(batch.slots[0]) for batch in alone])
    context = [batch.rows[0]["context"].encode() for batch in alone]
    bytes_ = [code_bytes(int(m) * args.d_z, bits) + 2 * len(wire.readers) for m in slots]
    figures = {"slots": slots, "wire_bytes": bytes_, "text_bytes_utf8": [len(c) for c in context]}
    figures["text_bytes_zlib"] = [len(zlib.compress(c, 9)) for c in context]
    weights = [sum(p.numel() for n, p in r.base.base_model.named_parameters()) - r.table.numel() for r in wire.readers]
    own = sum(p.numel() for p in wire.sender.parameters())
    for i, reader in enumerate(wire.readers):
        n = np.array([int(b.prompts[i].body_mask.sum()) for b in alone])
        rest = np.array([len(b.prompts[i].head) + int(b.prompts[i].tail_mask.sum()) for b in alone])
        figures |= {f"tokens_{reader.name}": n, f"code_ratio_{reader.name}": n / slots}
        figures[f"id_bytes_{reader.name}"] = np.ceil(n * math.ceil(math.log2(len(reader.table))) / 8)
        figures[f"operations_code_{reader.name}"] = 2 * weights[i] * (slots + rest)
        figures[f"operations_text_{reader.name}"] = 2 * weights[i] * (n + rest)
    tokens = figures[f"tokens_{wire.readers[0].name}"]
    read = {"lm": weights[0] * (tokens + slots * (args.code_form == "gist")), "interlingua": weights[0] * tokens}
    figures["operations_sender"] = 2 * (read.get(args.encoder_type, 0 * tokens) + own * tokens)
    return {name: float(np.mean(values)) for name, values in figures.items()}


@torch.no_grad()
def times(wire: Wire, groups: list) -> dict:
    """Seconds for each question when a code is asked so many: the sender once, prefill and three tokens each, beside
    the same from text."""
    figures = {}

    def timed(spent: dict, name: str, work, *given, **more):
        began = core.clock()
        made = work(*given, **more)
        spent[name] = (core.clock() - began) / len(rows)
        return made

    for count in (1, 4, 16):
        rows, spent = [row for group in groups[:4] for row in (group * count)[:count]], {}
        batch = wire.collate(rows, wire.args.ratio)
        code = timed(spent, "sender", wire.code, batch)
        for i, reader in enumerate(wire.readers):
            for kind, seen in (("code", wire.coded(i, batch, code)), ("text", wire.text(i, batch))):
                timed(spent, f"prefill_{kind}_{reader.name}", reader.run, seen, keep=1, grow=True)
                timed(spent, f"answer_{kind}_{reader.name}", reader.answers, seen, 4)
        figures[str(count)] = spent
    return figures


def share(row: dict, text: dict) -> dict[str, float]:
    """{reader: share of the text's F1 that it keeps}."""
    return {name: row["readers"][name]["f1"] / max(each["f1"], 1e-9) for name, each in text["readers"].items()}


def point(wire: Wire, groups: list, alone: list[Batch], engine, ratio, text: dict, start: dict) -> tuple[dict, dict]:
    """The code at one ratio: its answers, text at its price, what they rest on, its cost; and its evaluation whole."""
    own = evaluate(wire, groups, engine, ratio=ratio, joint=True)
    result = brief(own) | {"text": beside(own, text, groups), "cost": cost(wire, alone, wire.args.bits)}
    others = {"rivals": rivals(wire, groups, alone, engine, ratio), "nulls": nulls(wire, groups, engine, ratio, start)}
    for kind, rows in others.items():
        result[kind] = {name: beside(own, row, groups) for name, row in rows.items()}
    sizes = np.cumsum([len(group) for group in groups])[:-1]
    each = {name: np.split(np.array(each["f1_each"]), sizes) for name, each in own["readers"].items()}
    result["f1_by_context"] = {name: [round(float(part.mean()), 4) for part in parts] for name, parts in each.items()}
    return result | {"share_of_text": share(own, text)}, own


def name_of(ratio: float | None, args: Args) -> str:
    return f"{ratio:g}" if ratio else f"{args.latent_len}_slots"


def examine(wire: Wire, data: Data, run: core.Run, engine, start: dict) -> dict:
    """All that wire_results.json says of a trained wire."""
    args, groups, result = wire.args, data.evaluation, {"curve": {}, "bits": {}, "beyond": {}}
    text = evaluate(wire, groups, engine, wire.text, joint=True)
    result["text"] = brief(text)
    run.say(f"Text: {shown(text)}")
    if args.answer_as_text or args.question_scope == "encoded":
        told = [[row | {"context": row["answers"][0]}] for group in groups for row in group]
        result["answer_as_text"] = brief(evaluate(wire, told, engine, wire.text))
        run.say(f"The answer sent as text: {shown(result['answer_as_text'])}")
    for ratio in args.ratios:
        alone = [wire.collate(group[:1], ratio) for group in groups]
        row, own = point(wire, groups, alone, engine, ratio, text, start)
        result["curve"][name_of(ratio, args)] = row
        if ratio == args.ratio:
            led, counted = own, alone
        run.say(f"{row['cost']['slots']:.1f} slots, {row['cost']['wire_bytes']:.0f} bytes: {shown(row)}")
        for name, each in (*row["rivals"].items(), *row["nulls"].items()):
            run.say(f"    {name:18s}{shown(each)}")
    for bits in map(int, numbers(args.eval_bits)):
        row = evaluate(wire, groups, engine, bits=bits, joint=True)
        result["bits"][str(bits)] = brief(row) | {"cost": cost(wire, counted, bits)}
        run.say(f"{bits} bits: {shown(row)}")
    for name, contexts in (data.beyond | ({"unseen_pairs": data.unseen} if data.unseen else {})).items():
        rows = {"text": brief(evaluate(wire, contexts, engine, wire.text))}
        for ratio in args.ratios:
            rows[name_of(ratio, args)] = brief(evaluate(wire, contexts, engine, ratio=ratio))
        result["beyond"][str(name)] = rows
        run.say(f"{name}: " + "; ".join(f"{key} {shown(row)}" for key, row in rows.items()))
    write_predictions(groups, led, run)
    for key, kept in (("shares", lambda row: row), ("shares_swapped", lambda row: row["nulls"]["swapped"])):
        parts = {ratio: share(kept(row), text) for ratio, row in result["curve"].items()}
        result[key] = {f"{name}_{ratio}": x for ratio, part in parts.items() for name, x in part.items()}
    return result | {"seconds_per_question": times(wire, groups), "by_ratio": by_ratio(result["curve"])}


def shown(row: dict) -> str:
    said = ", ".join(f"{name} F1 {each['f1']:.3f} EM {each['em']:.3f}" for name, each in row["readers"].items())
    return said + (f", joint F1 {row['joint']['f1']:.3f}" if "joint" in row else "")


def write_predictions(groups: list, led: dict, run: core.Run) -> None:
    """predictions.jsonl: each reader's answer from the code at --ratio, and the joint one."""
    lines, columns = [], {name: each["said"] for name, each in (led["readers"] | {"joint": led["joint"]}).items()}
    for k, row in enumerate(row for group in groups for row in group):
        said = {name: column[k] for name, column in columns.items()}
        lines.append(json.dumps({"id": row["id"], "question": row["question"], "golds": row["answers"]} | said) + "\n")
    if run.main:
        core.write_atomic(run.dir / "predictions.jsonl", "".join(lines).encode())


def by_ratio(curve: dict) -> dict[str, list]:
    """The curve for a figure: [tokens for each slot, F1] of each reader, of text and of each rival and null."""
    lines = {}
    for row in curve.values():
        where = 1 / row["cost"]["slots"]
        for kind, each in ({"code": row, "text": row["text"]} | row["rivals"] | row["nulls"]).items():
            for name, found in each["readers"].items():
                lines.setdefault(f"{kind}_{name}", []).append([row["cost"][f"tokens_{name}"] * where, found["f1"]])
    return lines


# ---------------------------------------------------------------------------------------------------------- train
PASSED = 0.9  # share of answer tokens that must be right, over 50 updates at the newest ratio, for the next stage


class Course:
    """The stages of --fact_curriculum and --multi_ratio: which contexts and which ratio an update trains on."""

    def __init__(self, args: Args, accelerator, saved: dict | None):
        self.args, self.accelerator, self.stages = args, accelerator, args.stages
        self.stage, self.seen = (saved["stage"], saved["seen"]) if saved else (0, 0)
        self.answers = (saved["answers"] if saved else torch.zeros(2)).to(accelerator.device)  # right, scored

    def state(self) -> dict:
        return {"stage": self.stage, "seen": self.seen, "answers": self.accelerator.reduce(self.answers, "mean")}

    def draw(self, step: int) -> tuple[int, float | None]:
        """(the place of the update's contexts in `Data.train`, its ratio): the newest ratio every other time."""
        facts, ratios = self.stages[self.stage]
        rng = random.Random(core.derived_seed(self.args.seed, "ratio", step))
        newest = len(ratios) == 1 or (self.args.fact_curriculum and rng.random() < 0.5)
        ratio = ratios[-1] if newest else rng.choice(ratios[:-1] if self.args.fact_curriculum else ratios)
        return list(dict.fromkeys(n for n, _ in self.stages)).index(facts), ratio

    def advance(self, step: int, ratio: float | None, terms: dict) -> str:
        """After an update: the next stage if this one is passed; a line that says so, or none."""
        if self.stage == len(self.stages) - 1 or ratio != self.stages[self.stage][1][-1]:
            return ""
        self.answers, self.seen = self.answers + torch.stack([terms["right"], terms["scored"]]), self.seen + 1
        if self.seen < 50:
            return ""
        right, scored = self.accelerator.reduce(self.answers, "sum").tolist()
        self.answers, self.seen = torch.zeros_like(self.answers), 0
        if right <= PASSED * max(1.0, scored):
            return ""
        self.stage += 1
        facts, ratios = self.stages[self.stage]
        return f"[Stage] step {step}: {right / scored:.3f} right, on to {facts} facts at ratio {ratios[-1] or 0:g}"


def epoch_steps(args: Args, accelerator, contexts: int) -> int:
    return max(1, contexts // (args.batch_size * accelerator.num_processes))


def first_weight(args: Args, fraction: float) -> float:
    """Weight of the first answer token after this fraction of the training: constant, falling by a cosine to 0, or
    rising over the first 40 %."""
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * fraction)), "warmup": min(1.0, fraction / 0.4)}
    return args.first_token_ce_weight * factor.get(args.first_token_ce_schedule, 1.0)


def gradient_norms(args: Args, terms: dict, wire: Wire) -> dict:
    """The norm of each loss's own gradient, before its weight."""
    params, norms = [p for p in wire.parameters() if p.requires_grad], {}
    for name in args.grad_diag_components.split(","):
        if name in terms and terms[name].requires_grad:
            grads = torch.autograd.grad(terms[name], params, retain_graph=True, allow_unused=True)
            norms[f"grad_{name}"] = math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))
    return norms


def train(args: Args, wire: Wire, data: Data, run: core.Run, saved: dict | None, start: dict) -> dict:
    """Train the wire, from the checkpoint `saved` if any; nothing is chosen by an evaluation. The loop's figures."""
    engine, size = run.accelerator, args.batch_size
    world, rank = engine.num_processes, engine.process_index
    steps = epoch_steps(args, engine, len(data.train[-1]))
    trained = [p for p in wire.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(core.decay_groups(wire, 0.01), lr=args.lr, fused=True)
    objective = Objective(wire, engine)
    system, optimizer = core.prepare(objective, optimizer, engine)
    torch.manual_seed(core.derived_seed(args.seed, "dropout", rank))
    if saved:
        wire.load(saved, "the checkpoint to resume from")
    state = saved["state"] if saved else {"history": [], "stages": []}
    loop = core.Loop(run, system, optimizer, args.epochs * steps, "wire", saved, args.max_grad_norm, trained)
    course = Course(args, engine, saved and saved["course"])
    warm_until = args.warmup_text_latent_steps + int(args.warmup_text_latent_epochs * steps)
    objective.train()
    while not loop.last:
        step, fraction = loop.step, loop.step / loop.total
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / max(1, min(100, loop.total // 10)), 5 * (1 - fraction))
        pool, ratio = course.draw(step)
        chosen = core.batch_indices(len(data.train[pool]), size * world, args.seed, step)
        rows = [row for c in chosen[rank * size : (rank + 1) * size] for row in data.train[pool][c]]
        batch = wire.collate(rows, ratio)
        rewrite = args.latent_align_weight * (fraction < 0.5)
        warm = step < warm_until and step % 2 == 0
        terms = system(batch, first=first_weight(args, fraction), rewrite=rewrite, warm=warm)
        loss = terms["loss"]
        if world > 1 or warm:  # what this update leaves out still takes part in the averaging of gradients
            loss = loss + 0.0 * sum(p.sum() for p in trained)
        if args.grad_diag_interval and (step + 1) % args.grad_diag_interval == 0:
            run.log(type="gradients", step=step + 1, **gradient_norms(args, terms, wire))
        loop.backward(loss)
        read = sum(p.tail_mask.sum() + batch.slots[p.of].sum() for p in batch.prompts).float()  # slots and questions
        norm = loop.update(tokens=int(engine.reduce(read, "sum")))
        if not warm and (line := course.advance(loop.step, ratio, terms)):
            state["stages"].append([loop.step, course.stage])
            run.say(line)
        loop.add(grad_norm=norm, **{name: value for name, value in terms.items() if name not in ("right", "scored")})
        if not warm:
            loop.add(answer_tokens_right=terms["right"] / terms["scored"])
        if loop.due(10) or loop.last:
            means = loop.means()
            run.log(type="train", step=loop.step, stage=course.stage, lr=optimizer.param_groups[0]["lr"], **means)
            state["history"].append([loop.step, means["loss"], means.get("answer_tokens_right", 0.0)])
            loop.bar.set_postfix(loss=f"{means['loss']:.3f}")
        if loop.due(args.eval_every):
            with loop.paused():
                quick = brief(evaluate(wire, data.evaluation[:8], engine))
                run.say(f"Step {loop.step}: {shown(quick)}")
                f1 = {f"quick_f1_{name}": each["f1"] for name, each in quick["readers"].items()}
                run.log(type="quick_eval", step=loop.step, **f1)
        if loop.due(args.save_every) or loop.last or loop.stopping:
            own = wire.state() | {"start": start, "state": state, "course": course.state()}
            loop.save("last.pt", previous="last_previous.pt", **own)
            loop.leave_if_stopped()
    return {"train_loss": state["history"], "stages": state["stages"]} | loop.end()


# ----------------------------------------------------------------------------------------------------------- main
def tiny_qwen():
    """A random Qwen2 that shares neither tokenizer, width nor depth with `tiny`: for --test."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = core.train_tokenizer(core.synthetic_text("train"), 400)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": len(tokenizer)}
    config = Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(core.derived_seed(0, "tiny_qwen"))
        return Qwen2ForCausalLM(config).eval(), tokenizer


def load_readers(args: Args, device) -> list[Reader]:
    """The frozen readers on their device. A large model without a GPU is refused, not crawled through."""
    half = torch.bfloat16 if args.dtype == "auto" and device.type == "cuda" else torch.float32
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(args.dtype, half)
    readers = []
    for name in args.models.split(",")[: args.readers]:
        path = getattr(args, f"{name}_id")
        base, tokenizer = tiny_qwen() if path == "tiny_qwen" else core.load_backbone(path, dtype)
        count = sum(p.numel() for p in base.parameters())
        line = f"{path} has {count:,} parameters and there is no CUDA device: use one, or a smaller model"
        require(device.type == "cuda" or count < 2e9, line)
        readers.append(Reader(name, base.to(device), tokenizer, args).to(device))
    return readers


def make_wire(args: Args, data: Data, readers: list[Reader]) -> Wire:
    """The wire at its start: from the seed, or from the checkpoints that the flags name."""
    counter = core.load_tokenizer(args.count_tokens_of) if args.count_tokens_of else None
    longest = math.ceil(args.max_length / args.ratios[0]) if args.ratio else args.latent_len
    wire = Wire(args, readers, counter, longest)
    wire.collate(data.evaluation[0], args.ratio)  # what a template or a text could refuse is refused here
    if args.encoder_type == "lm" and args.adapter_start == "aligned" and len(readers) > 1:
        groups = data.train[-1][:256] or data.evaluation
        wire.align(wire.collate([group[0] for group in groups], args.ratios[0]))
    if args.ckpt_in:
        wire.load(core.load_checkpoint(Path(args.ckpt_in)), args.ckpt_in, needed=not args.epochs)
    if args.freeze_llama_adapter:
        path, first = args.freeze_llama_adapter, readers[0]
        held = core.load_checkpoint(Path(path)).get("readers", {}).get(first.name, {})
        for name, p in first.adapter.named_parameters():
            fits = f"adapter.{name}" in held and held[f"adapter.{name}"].shape == p.shape
            require(fits, f"--freeze_llama_adapter {path}: no adapter of {first.name} and these sizes")
            p.data.copy_(held[f"adapter.{name}"])
            p.requires_grad_(False)
    return wire


def frozen_digest(readers: list[Reader]) -> str:
    """Of every weight of every reader, bit by bit: training must not have touched one."""
    own = (p.detach().cpu().view(torch.uint8).numpy() for r in readers for p in r.base.parameters())
    return core.digest(*own)


def counts_of(wire: Wire) -> dict:
    """Parameters by part."""
    parts = {"sender": wire.sender, "latent_refiner": wire.refiner}
    for reader in wire.readers:
        owned = {"adapter": reader.adapter, **reader.parts}
        parts |= {f"{name}_{reader.name}": part for name, part in owned.items()}
    figures = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    return figures | {"trained": sum(p.numel() for p in wire.parameters() if p.requires_grad)}


def plan_of(args: Args, wire: Wire, data: Data, engine) -> dict:
    steps = args.epochs * epoch_steps(args, engine, len(data.train[-1]))
    batch = wire.collate([row for group in data.train[-1][:4] for row in group], args.ratio)
    rows = args.batch_size * args.questions_per_context * len(wire.readers)
    length = max(len(p.head) + int(batch.slots.max()) + p.tail.shape[1] for p in batch.prompts)
    base = max(wire.readers, key=lambda r: r.width).base.config
    memory = core.memory_estimate(wire, rows * length, base.hidden_size, base.num_hidden_layers, False)
    tokens = steps * rows * length * engine.num_processes
    return {"steps": steps, "tokens": tokens, "parameters": counts_of(wire), "memory_gb": memory}


LENGTH = "epochs"
FREE = ("out_dir", "run_name", "tag", "diagnostic_log", "eval_batch_size", "eval_every", "save_every")
OUTPUTS = ("last*.pt", "wire.pt", "predictions.jsonl", "metrics.json", "diagnostics.jsonl")


def write_files(args: Args, wire: Wire, result: dict, run: core.Run) -> None:
    """The trained wire, the document's metrics.json and diagnostics.jsonl, and the model's card."""
    core.save_checkpoint(run.dir / "wire.pt", wire.state())
    led = result["curve"][name_of(args.ratio, args)]
    blocks = {"text": result["text"]["readers"], "latent": led["readers"], "joint": led["joint"]}
    blocks |= {"token_budget": led["rivals"]["head"]["readers"], "oracle": led["oracle_f1"], "wire": led["cost"]}
    core.write_json(run.dir / "metrics.json", blocks | {"agreement": led["agreement"], "tag": args.tag})
    if run.log_file.exists():
        core.write_atomic(Path(args.diagnostic_log), run.log_file.read_bytes())
    figures = {f"share of text's F1, {name}": share for name, share in led["share_of_text"].items()}
    figures |= {"bytes of a code": led["cost"]["wire_bytes"], "bytes of its text, zlib": led["cost"]["text_bytes_zlib"]}
    load = f"python latentwire_train.py --epochs 0 --ckpt_in {run.dir}/wire.pt --out_dir OTHER, with the same flags"
    caveat = "The code is shorter in positions, not in bytes: docs/latentwire_wire.md."
    bases = " and ".join(getattr(args, f"{reader.name}_id") for reader in wire.readers)
    core.model_card(run, result, f"LatentWire, one code for {len(wire.readers)} readers", bases, figures, load, caveat)


def main(argv=None) -> dict:
    args = parse(argv)
    whole = dataclasses.replace(args, precision="fp32")  # --dtype is the readers' alone
    accelerator = core.engine(whole, no_fsdp="the readers of a wire are not cut up")
    if args.dry_run:
        readers = load_readers(args, torch.device("cpu"))
        data = load_data(args, readers[0].tokenizer)
        return core.show_plan(plan_of(args, make_wire(args, data, readers), data, accelerator))
    with core.Run(args, args.out_dir, accelerator, "wire_results.json", OUTPUTS) as run:
        if done := run.finished(LENGTH, FREE):
            return done
        readers = load_readers(args, accelerator.device)
        audit = max(core.causality_audit(reader.base, len(reader.table), 32) for reader in readers)
        require(audit <= 1e-5, f"a reader reads the future ({audit:.1e})", core.CHECK_FAILED)
        data = load_data(args, readers[0].tokenizer)
        before, wire = frozen_digest(readers), make_wire(args, data, readers)
        total = args.epochs * epoch_steps(args, accelerator, len(data.train[-1]))
        saved = run.checkpoint("last*.pt", total=total, arm="wire") if args.epochs else None
        start = saved["start"] if saved else wire.state()["sender"]
        inputs = {"data": core.digest(data.train, data.evaluation, data.beyond, data.unseen), "base": before}
        inputs["tokenizer"] = core.digest(*(core.tokenizer_digest(reader.tokenizer) for reader in readers))
        inputs |= {"ckpt_in": core.digest(Path(args.ckpt_in))} if args.ckpt_in else {}
        run.start((*FREE, LENGTH), **inputs)
        sizes = counts_of(wire)
        names = ", ".join(f"{r.name} ({r.width} wide, {len(r.table)} tokens)" for r in readers)
        run.say(f"LatentWire: {args.encoder_type} to {names}; {sizes['trained']:,} parameters are trained")
        figures = train(args, wire, data, run, saved, start) if args.epochs else {"peak_mem_bytes": core.peak_memory()}
        wire.eval()
        result = examine(wire, data, run, accelerator, start)
        require(frozen_digest(readers) == before, "training has changed a frozen reader", core.CHECK_FAILED)
        result |= figures | {"parameters": sizes, "tag": args.tag, "config": vars(args)}
        counted = {"train": len(data.train[-1]), "evaluated": sum(map(len, data.evaluation))}
        about = {"source": data.source, "questions_per_context": args.questions_per_context, **counted}
        result |= {"data": about, "causality_max_abs_diff": audit}
        common = {"seed": args.seed, "environment": core.environment()}
        if run.main:
            write_files(args, wire, result | common, run)
        return run.finish(result)


if __name__ == "__main__":
    core.cli(main, "--batch_size, --eval_batch_size, --questions_per_context or --max_length")
