"""A small local model for machines without a model hub: the stand-in on which adapters and compressors are tried.

Two kinds, each an ordinary Hugging Face directory that AutoModelForCausalLM and AutoTokenizer load:

    lm       a Llama (grouped-query attention) with its own byte-level BPE, trained on a text source
    reader   a Llama that answers generated questions in SQuAD's form; its data stands beside it as SQuAD v1.1 JSON

The reader's contexts state facts "The R of E is V ." that share their relations and entities, so a bag of words cannot
answer: the words must be bound to each other. Trained on questions alone such a model stays at guessing. Two stages
before them form the attention that binding needs: copying random words (find a repeat and follow it), then copying them
across filler words (find it though other words stand between). The questions follow, on two facts, three and so on, up
to --facts. The result file gives exact match on held-out contexts, by the number of facts, and what is left of it with
shuffled words, another context's facts, another question or an entity that is absent.

Language model   python pretrain_backbone.py --kind lm                8 minutes on two CPU cores
Reader           python pretrain_backbone.py --kind reader            1 to 2 minutes on one core
Longer contexts  python pretrain_backbone.py --kind reader --facts 16 --questions 3 --output_dir backbones/reader16
Another reader   ... --reader_tokenizer pieces --width 96 --layers 4  another tokenizer, width and depth
Smoke test       python pretrain_backbone.py --kind reader --test     15 s
On a GPU         python pretrain_backbone.py --kind lm --size 100m --data wikitext103 --batch_size 64 --max_steps 20000
Then             --model_path backbones/lm, --model_id backbones/reader in the other scripts
"""

import dataclasses
import functools
import itertools
import random
from collections import Counter
from collections.abc import Set
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import core
from core import arg, require

SIZES = {"small": None, "10m": (320, 6, 5, 5, 1024), "30m": (512, 8, 8, 4, 1536), "100m": (768, 12, 12, 4, 2304)}
SMALL = {"lm": (192, 4, 6, 2, 512), "reader": (64, 3, 4, 4, 128)}  # width, layers, heads, key-value heads, FFN width


@dataclasses.dataclass
class Args(core.RunArgs):
    kind: Literal["lm", "reader"] = arg("lm", "language model on text, or reader of generated questions", "model")
    size: Literal["small", "10m", "30m", "100m"] = arg("small", "small: 2M (lm), 0.13M (reader) parameters", "model")
    width: int = arg(0, "width of a small reader, a multiple of 16; 0: 64", "model")
    layers: int = arg(0, "layers of a small reader; 0: 3", "model")
    output_dir: str = arg("", "model directory; unset: backbones/KIND", "training")
    max_steps: int = arg(0, "updates; 0: 700 (lm), 2000 (reader, which stops early once it answers)", "training")
    batch_size: int = arg(0, "sequences per update and process; 0: 8 (lm), 32 (reader)", "training")
    lr: float = arg(0.0, "peak learning rate; 0: 3e-3 (lm), 2e-3 (reader)", "training")
    eval_interval: int = arg(200, "updates between evaluations", "training")
    save_interval: int = arg(400, "updates between checkpoints", "training")
    log_interval: int = arg(50, "updates between log lines", "training")
    data: Literal["wikitext103", "wikitext2", "text", "local", "synthetic"] = arg("local", "text of the lm", "lm data")
    data_path: str = arg("", "file or folder for --data text; unset: not used", "lm data")
    tokenizer: str = arg("local", "local: BPE trained on the text; byte; a directory; a hub name", "lm data")
    vocab_size: int = arg(2048, "entries of --tokenizer local", "lm data")
    seq_len: int = arg(512, "window length of the lm, and positions of either kind", "lm data")
    reader_tokenizer: Literal["words", "pieces"] = arg(
        "words", "pieces: byte-pair encoding of the same words, of one or two tokens each", "reader data"
    )
    facts: int = arg(4, "facts in a context, 2 to 32, reached step by step", "reader data")
    questions: int = arg(1, "questions to ask of each context in the files and the evaluation", "reader data")
    eval_items: int = arg(512, "held-out contexts to evaluate the reader on", "reader data")
    target_em: float = arg(0.99, "stop once the reader answers this share of the held-out questions", "reader data")


TEST = dict(max_steps=40, batch_size=4, seq_len=128, eval_interval=20, save_interval=20, log_interval=10, eval_items=32)
TEST |= dict(data="synthetic", tokenizer="byte", device="cpu", threads=1)
FREE = ("output_dir", "eval_interval", "save_interval", "log_interval")  # may differ when a run goes on
LENGTH = "max_steps"  # a larger one continues a finished run
PASSED = 0.9  # share of scored tokens that must be right, over 25 updates, for the reader's next stage


def parse(argv=None) -> Args:
    args = core.parse_args(Args, TEST, argv, __doc__)
    lm = args.kind == "lm"
    args.output_dir = args.output_dir or f"backbones/{args.kind}"
    args.max_steps = args.max_steps or (700 if lm else 2000)
    args.batch_size = args.batch_size or (8 if lm else 32)
    args.lr = args.lr or (3e-3 if lm else 2e-3)
    core.require_positive(args, "max_steps batch_size eval_interval save_interval log_interval eval_items")
    require(args.lr > 0 and 0 < args.target_em <= 1, "--lr must be positive and --target_em in (0, 1]")
    require(2 <= args.facts <= 32 and 1 <= args.questions <= args.facts, "2 to 32 --facts, 1 to as many --questions")
    require(args.eval_items >= 2, "--eval_items must be at least 2, so that contexts can be swapped")
    own = args.kind == "reader" and args.size == "small"
    require(own or not (args.width or args.layers), "--width and --layers are those of --kind reader --size small")
    require(args.width >= 0 and args.width % 16 == 0 and args.layers >= 0, "--width: a multiple of 16; --layers: 1 up")
    each = 8 if args.reader_tokenizer == "words" else 12
    require(args.seq_len >= max(128, each * args.facts), f"--seq_len must be at least 128, {each} for each of --facts")
    return args


# ---------------------------------------------------------------------------------------------------------- model
def build_model(args: Args, vocab_size: int):
    """A randomly initialised Llama with tied embeddings. The reader's initial spread of 0.08 is what lets its
    attention form; at the library's 0.02 it takes several times as long."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, heads, kv_heads, ffn = SIZES[args.size] or SMALL[args.kind]
    if args.width:  # heads of 16, as in the small reader
        width, heads, kv_heads, ffn = args.width, args.width // 16, args.width // 16, 2 * args.width
    layers = args.layers or layers
    shape = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads)
    shape |= dict(vocab_size=vocab_size, intermediate_size=ffn, max_position_embeddings=2 * args.seq_len)
    shape |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    core.init_normal(model, args.seed, 0.02 if args.kind == "lm" else 0.08)
    return model


# ----------------------------------------------------------------------------------------------------------- data
WORDS = "<pad> <bos> <eos> <unk> Context: Question: Answer: The the of is . What ?".split()
VOCABULARY = WORDS + core.ENTITIES + core.RELATIONS + core.COLOURS + core.MATERIALS
IDS = {word: i for i, word in enumerate(VOCABULARY)}
CONTENT, FILLER = range(len(WORDS), len(VOCABULARY)), range(4, len(WORDS))  # ids of words that say something; of others


END = "</w>"  # marks the last piece of a word


def word_pieces(mean: float = 1.5) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(ids, merges) of a byte-pair encoding of VOCABULARY with the fewest merges after which a word has at most `mean`
    pieces on average (none then has more than two). Each word counts once; of equally frequent pairs that of the
    longest word is merged, then the first in the alphabet: the library's own trainer takes another one each time."""
    words = [[*word[:-1], word[-1] + END] for word in VOCABULARY[4:]]
    entries, merges = [*WORDS[:4], *sorted({piece for word in words for piece in word})], []
    while sum(map(len, words)) > mean * len(words):
        pairs, longest = Counter(), Counter()
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair], longest[pair] = pairs[pair] + 1, max(longest[pair], len(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], -longest[pair], pair))
        merges.append(best)
        entries.append("".join(best))
        for word in words:
            for at in range(len(word) - 2, -1, -1):
                if (*word[at : at + 2],) == best:
                    word[at : at + 2] = ["".join(best)]
    return {piece: i for i, piece in enumerate(entries)}, merges


def reader_tokenizer(kind: str = "words"):
    """One token a word, or one or two; pad, bos, eos, unk are 0 to 3; a sequence begins with bos; padding is on the
    left. No blank is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    else:
        tokenizer = Tokenizer(models.BPE(*word_pieces(), unk_token="<unk>", end_of_word_suffix=END))
        tokenizer.add_special_tokens(WORDS[:4])
        tokenizer.decoder = decoders.BPEDecoder(suffix=END)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@functools.cache
def spelling(kind: str) -> list[list[int]]:
    """The tokens of each word of VOCABULARY."""
    words = reader_tokenizer(kind)(VOCABULARY, add_special_tokens=False)["input_ids"]
    return [[i] if i < 4 else ids for i, ids in enumerate(words)]


def facts_of(context: str) -> dict:  # the inverse of `core.context_of`
    words = (fact.split() for fact in context.removesuffix(" .").split(" . "))
    return {(relation, entity): " ".join(value) for _, relation, _, entity, _, *value in words}


def prompt_of(row: dict) -> str:
    return f"Context: {row['context']}\nQuestion: {row['question']}\nAnswer: "


def squad_file(rows: list[dict]) -> dict:
    """Rows as SQuAD v1.1 JSON, with the answers' positions: a paragraph for each context, with all its questions."""
    paragraphs = {}
    for row in rows:
        context, question = row["context"], {"id": row["id"], "question": row["question"]}
        starts = [context.index(f"is {answer} .") + len("is ") for answer in row["answers"]]
        question["answers"] = [{"text": a, "answer_start": start} for a, start in zip(row["answers"], starts)]
        paragraphs.setdefault(context, {"context": context, "qas": []})["qas"].append(question)
    return {"version": "1.1", "data": [{"title": "generated", "paragraphs": list(paragraphs.values())}]}


def probe_rows(args: Args, exclude: Set) -> dict[str, list[dict]]:
    """Sets of questions on contexts that do not decide when training ends, one each: by the number of facts, the last
    beyond those trained on; and three changes that show whether the answer is read in the context. With another's facts
    the old answer is right by chance (1 in 100), to another question never. About an absent entity the reader can only
    be wrong: there any value of the context counts as its answer."""
    probes, swapped, other, absent = {}, [], [], []
    for count in (*(n for n in (2, 4, 8, 16) if n < args.facts), args.facts, args.facts + 8):
        name = f"em_{count}_facts" + "_untrained" * (count > args.facts)
        probes[name] = core.question_rows(args.eval_items, args.seed, name, exclude, count)
    rows = probes[f"em_{args.facts}_facts"]
    for row, following in zip(rows, rows[1:] + rows[:1]):
        facts, rng = facts_of(row["context"]), random.Random(core.derived_seed(0, "absent", row["id"]))
        keys, values, people = list(facts), list(facts.values()), {entity for _, entity in facts}
        asked = values.index(row["answers"][0])
        stranger = keys[asked][0], rng.choice([entity for entity in core.ENTITIES if entity not in people])
        swapped.append(row | {"context": following["context"]})
        other.append(row | {"question": core.question_of(keys[asked - 1])})
        absent.append(row | {"question": core.question_of(stranger), "answers": values})
    return probes | {"em_context_swapped": swapped, "em_question_swapped": other, "entity_absent": absent}


def stages_of(facts: int) -> tuple[str | int, ...]:
    """What is trained on in turn: the two ways of copying, then contexts of so many facts."""
    return "copy", "gap", *(count for count in (2, 3, 4, 6, 8, 12, 16, 24) if count < facts), facts


def copy_row(rng: random.Random) -> tuple[list[int], list[bool]]:
    """Distinct random words, twice in a row; the second time is scored."""
    words = rng.sample(CONTENT, rng.randint(6, 24))
    return [1, *words, *words], [False] * (len(words) + 1) + [True] * len(words)


def gap_row(rng: random.Random) -> tuple[list[int], list[bool]]:
    """The same with fillers: "f f w1 f f w2 ..." and again with other fillers between the words, which are scored. To
    follow "w1 f f" a head must look past the fillers, as from "is" or "Answer:" to the entity and relation."""
    words = rng.sample(CONTENT, rng.randint(4, 12))
    before, after = (rng.choices(FILLER, k=rng.randint(0, 3)) for _ in range(2))  # first round's fillers, second's
    ids = [1]
    for fillers in (before, after):
        for word in words:
            ids += [*fillers, word]
    again = 1 + len(words) * (len(before) + 1)  # where the second round begins; its first word cannot be known
    return ids, [place > again + len(after) and token in CONTENT for place, token in enumerate(ids)]


def facts_row(rng: random.Random, count: int, held_out: Set = frozenset()) -> tuple[list[int], list[bool]]:
    """`count` facts, not those of a held-out context, then eight questions, drawn with replacement (without it the last
    answers follow by elimination); answers and eos are scored. Some rows beyond four facts have fewer than `count`."""
    count = rng.choice((count, count, count, rng.randint(2, count))) if count > 4 else count  # lest few be forgotten
    while core.context_of(facts := core.draw_facts(rng.randrange, count)) in held_out:
        continue
    ids = [1, *to_ids(f"Context: {core.context_of(facts)}")]
    scored = [False] * len(ids)
    for key in rng.choices(list(facts), k=8):
        asked, answer = to_ids(f"Question: {core.question_of(key)} Answer:"), [*to_ids(facts[key]), 2]
        ids += asked + answer
        scored += [False] * len(asked) + [True] * len(answer)
    return ids, scored


def reader_batch(args: Args, stage: str | int, step: int, rank=0, world=1, held_out: Set = frozenset()) -> tuple:
    """(ids, labels) [B, T] of one stage, right-padded, -100 where not scored: a pure function of (seed, stage, step).
    All processes draw the batch of all of them and keep their own rows."""
    rng, tokens = random.Random(core.derived_seed(args.seed, "train", step, 0)), spelling(args.reader_tokenizer)
    draw = {"copy": copy_row, "gap": gap_row}.get(stage, lambda rng: facts_row(rng, stage, held_out))

    def spelled(ids, scored):  # rows are drawn as words, and each of a scored word's tokens is scored
        pairs = [(token, mark) for word, mark in zip(ids, scored) for token in tokens[word]]
        return [torch.tensor(part) for part in zip(*pairs)]

    drawn = (spelled(*draw(rng)) for _ in range(args.batch_size * world))
    rows, labels = zip(*((ids, torch.where(scored, ids, -100)) for ids, scored in drawn))
    pad, mine = torch.nn.utils.rnn.pad_sequence, slice(rank * args.batch_size, (rank + 1) * args.batch_size)
    return pad(rows[mine], batch_first=True), pad(labels[mine], batch_first=True, padding_value=-100)


def to_ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


class Data(NamedTuple):
    tokenizer: object
    train: np.ndarray | None  # the lm's windows [N, T]; the reader's batches are drawn when they are needed
    validation: np.ndarray | list[dict]  # the lm's windows; the reader's questions
    probes: dict[str, list[dict]] | None = None  # other questions, asked of the reader at its end
    held_out: Set = frozenset()  # the contexts of both, none of which is trained on


def load_data(args: Args) -> Data:
    if args.kind == "reader":
        validation = core.question_rows(
            args.eval_items, args.seed, "validation", facts=args.facts, questions=args.questions
        )
        probes = probe_rows(args, {row["context"] for row in validation})
        held_out = {row["context"] for rows in (validation, *probes.values()) for row in rows}
        return Data(reader_tokenizer(args.reader_tokenizer), None, validation, probes, held_out)
    texts = [core.load_text(args.data, split, args.data_path) for split in ("train", "validation")]
    tokenizer = core.load_tokenizer(args.tokenizer, texts[0], args.vocab_size)
    windows = [core.blocks(core.encode(t, tokenizer), args.seq_len, f"--data {args.data}") for t in texts]
    return Data(tokenizer, *windows)


# ------------------------------------------------------------------------------------------------------- evaluate
@torch.no_grad()
def evaluate_lm(model, validation: np.ndarray, device) -> dict:
    """Token-weighted loss over at most 64 validation windows."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, min(64, len(validation)), 8):
        ids = torch.from_numpy(validation[start : start + 8].astype("int64")).to(device)
        hidden = model.model(ids).last_hidden_state
        total += float(core.next_token_loss(hidden, model.lm_head.weight, ids, reduction="sum"))
        count += ids[:, 1:].numel()
    model.train()
    return {"val_loss": total / count, "val_ppl": core.perplexity(total / count)}


@torch.no_grad()
def matches(model, tokenizer, rows: list[dict], device) -> list[float]:
    """For each row 1 if the greedy answer to its question is one of its answers, exactly; else 0."""
    model.eval()
    words = tokenizer(VOCABULARY[4:], add_special_tokens=False)["input_ids"]
    right, longest = [], 2 * max(map(len, words)) + 1  # two words and the end
    for start in range(0, len(rows), 128):
        part = rows[start : start + 128]
        prompts = [prompt_of(row) for row in part]
        batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False).to(device)
        ids = model.generate(**batch, max_new_tokens=longest, do_sample=False)[:, batch["input_ids"].shape[1] :]
        said = tokenizer.batch_decode(ids, skip_special_tokens=True)
        right += [core.squad_scores(text, row["answers"])[0] for text, row in zip(said, part)]
    model.train()
    return right


def rate(right: list[float]) -> dict:
    return core.wilson(int(sum(right)), len(right))


def evaluate_reader(model, tokenizer, rows: list[dict], device, questions: int = 1) -> dict:
    """Exact match with its Wilson interval; that on shuffled context words, which is as far as a bag of words gets; and
    where each context is asked several questions the mean over contexts with its bootstrap interval."""
    shuffled = [row | {"context": shuffle_words(row["context"])} for row in rows]
    em, control = (matches(model, tokenizer, asked, device) for asked in (rows, shuffled))
    scores = {"em": rate(em), "em_shuffled_words": rate(control)}
    by_context = np.reshape(em, (-1, questions)).mean(1)  # contexts; the questions of one follow each other
    return scores | ({"em_by_context": core.bootstrap(by_context)} if questions > 1 else {})


def evaluate(model, data: Data, args: Args, device) -> dict:
    if args.kind == "lm":
        return evaluate_lm(model, data.validation, device)
    return evaluate_reader(model, data.tokenizer, data.validation, device, args.questions)


def shuffle_words(context: str) -> str:
    words = context.split()
    order = torch.randperm(len(words), generator=core.generator(0, "shuffle", context)).tolist()
    return " ".join(words[i] for i in order)


# ---------------------------------------------------------------------------------------------------------- train
def learning_rate(args: Args, step: int) -> float:
    """Warm-up over 50 updates, constant, then linear to zero over the last 40 % (lm: to a tenth over all of it)."""
    rise, left = min(1.0, (step + 1) / 50), 1 - step / args.max_steps
    return args.lr * rise * (0.1 + 0.9 * left if args.kind == "lm" else min(1.0, left / 0.4))


def reader_loss(loss: Tensor, hidden: Tensor, head: Tensor, ids: Tensor, labels: Tensor, stage: str | int) -> tuple:
    """(the whole loss, how many scored tokens are predicted right, how many there are) from the `loss` of the scored
    tokens: once there are facts, the other words are learned too, at a tenth of the weight: they teach the language."""
    scored = labels[:, 1:] != -100  # B T-1
    count = scored.sum()
    if stage not in ("copy", "gap"):
        others = ids.masked_fill((labels != -100) | (ids == 0), -100)  # neither scored nor padding
        loss = loss + 0.1 * core.next_token_loss(hidden, head, others, reduction="sum") / count
    right = (F.linear(hidden[:, :-1][scored], head).argmax(-1) == labels[:, 1:][scored]).sum()
    return loss, right, count


def train(args: Args, data: Data, model, run: core.Run, accelerator, saved: dict | None) -> tuple[dict, dict]:
    """Train until --max_steps, or until the reader answers; returns (figures of the training, whole weights)."""
    lm, rank, world = args.kind == "lm", accelerator.process_index, accelerator.num_processes
    if saved:
        model.load_state_dict(saved["model"])
    core.shard(model, accelerator, model.model.layers)
    decay = core.decay_groups(model, 0.1 if lm else 0.0)
    optimizer = torch.optim.AdamW(decay, lr=args.lr, betas=(0.9, 0.98), fused=True)
    torch.manual_seed(core.derived_seed(args.seed, "dropout", rank))  # unused, but its state is in every checkpoint
    model, optimizer = core.prepare(model, optimizer, accelerator)
    plain = accelerator.unwrap_model(model)
    plain.train()
    loop = core.Loop(run, model, optimizer, total=args.max_steps, label=args.kind, saved=saved, max_norm=1.0)
    history = saved["history"] if saved else {"train_loss": [], "evaluation": [], "stages": []}
    stages = stages_of(args.facts)
    stage, done = (saved["stage"], saved["done"]) if saved else (0, False)
    answers = (saved["answers"] if saved else torch.zeros(2)).to(accelerator.device)  # right, scored: last 25 batches
    if lm:
        stream = core.batches(data.train, args.batch_size, args.seed, range(loop.step, args.max_steps), accelerator)
    while loop.step < loop.total and not done:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, loop.step)
        if lm:
            ids = labels = next(stream)  # B T
        else:
            batch = reader_batch(args, stages[stage], loop.step, rank, world, data.held_out)
            ids, labels = (x.to(accelerator.device) for x in batch)
        with accelerator.autocast():
            # through the wrapper, so that several processes average their gradients; one position's logits at a time
            hidden = model(input_ids=ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]  # B T D
            head = plain.lm_head.weight
            loss = core.next_token_loss(hidden, head, labels)
        if not lm:
            loss, right, count = reader_loss(loss, hidden, head, ids, labels, stages[stage])
            answers = answers + torch.stack([right, count])
            loss = loss * core.weight_of(accelerator, count)  # processes with more scored tokens count for more
        loop.backward(loss)
        loop.add(train_loss=loss)
        loop.update(tokens=ids.numel() * world)
        if not lm and loop.due(25):
            share, answers = float(torch.div(*accelerator.reduce(answers, "sum"))), torch.zeros_like(answers)
            if share > PASSED and stage < len(stages) - 1:
                stage += 1
                history["stages"].append([loop.step, stage])
                run.say(f"[Stage] step {loop.step}: {share:.3f} right, on to {stages[stage]}")
        if loop.due(args.log_interval) or loop.last:
            mean = loop.means()["train_loss"]
            history["train_loss"].append([loop.step, mean])
            run.say(f"Step {loop.step:5d} | Loss: {mean:.4f}")
            run.log(step=loop.step, train_loss=mean, lr=optimizer.param_groups[0]["lr"])
        if loop.due(args.eval_interval) or loop.last:
            with loop.paused(), core.whole(plain):
                scores = evaluate(plain, data, args, accelerator.device)
            history["evaluation"].append([loop.step, scores])
            row = {name: value if lm else value["mean"] for name, value in scores.items()}
            done = not lm and row["em"] >= args.target_em
            run.say(f"[Eval] step {loop.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
            run.log(step=loop.step, **row)
        if loop.due(args.save_interval) or loop.last or done or loop.stopping:
            own = {"model": core.full_state(plain), "history": history, "stage": stage, "done": done}
            own |= {"answers": accelerator.reduce(answers, "mean"), "config": vars(args)}
            loop.save(f"backbone_step_{loop.step}.pt", keep=2, of="backbone_step_*.pt", **own)
            if not done:
                loop.leave_if_stopped()
    figures = loop.end() | {"final": history["evaluation"][-1][1], "history": history}
    if not lm:
        with core.whole(plain):
            right = {k: matches(plain, data.tokenizer, rows, accelerator.device) for k, rows in data.probes.items()}
        figures["probes"] = {name: rate(hits) for name, hits in right.items()}
    return figures, core.full_state(plain)


# ----------------------------------------------------------------------------------------------------------- main
def plan_of(args: Args, data: Data, accelerator) -> dict:
    """Parameters, tokens and memory. The reader's tokens are those of its last stage, padding included; it may stop
    before --max_steps."""
    with torch.device("meta"):
        model = build_model(args, len(data.tokenizer))
    length = args.seq_len if args.kind == "lm" else reader_batch(args, args.facts, 0)[0].shape[1]
    half, shape = accelerator.mixed_precision != "no", (model.config.hidden_size, model.config.num_hidden_layers)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": args.max_steps * args.batch_size * length * accelerator.num_processes,
        "memory_gb": core.memory_estimate(model, args.batch_size * length, *shape, half),
    }


def save_model(model, weights: dict, result: dict, data: Data, args: Args, run: core.Run) -> None:
    """The Hugging Face directory with its card; beside a reader, the questions that it was and was not trained on."""
    model.save_pretrained(run.dir, state_dict=weights)
    data.tokenizer.save_pretrained(run.dir)
    if args.kind == "reader":
        rows = core.question_rows(4000, args.seed, "train", data.held_out, args.facts, args.questions)
        core.write_json(run.dir / "validation.json", squad_file(data.validation))
        core.write_json(run.dir / "train.json", squad_file(rows))
    final = {name: value["mean"] if isinstance(value, dict) else value for name, value in result["final"].items()}
    final |= {"parameters": result["parameters"], "steps": result["steps"]}
    about = result | {"seed": args.seed, "environment": core.environment()}
    title, base = f"claimbench backbone ({args.kind})", "none, trained from scratch"
    load = f'AutoModelForCausalLM.from_pretrained("{run.dir}"), AutoTokenizer.from_pretrained("{run.dir}")'
    caveat = "A small stand-in for a hub model: what holds on it need not hold on a large one."
    core.model_card(run, about, title, base, final, load, caveat)


def main(argv=None) -> dict:
    args = parse(argv)
    accelerator = core.engine(args)
    if args.dry_run:
        return core.show_plan(plan_of(args, load_data(args), accelerator))
    outputs = ("backbone_step_*.pt", "model.safetensors", "train.json", "validation.json")
    with core.Run(args, args.output_dir, accelerator, "backbone_results.json", outputs) as run:
        if done := run.finished(LENGTH, FREE):
            return done
        data = load_data(args)
        model = build_model(args, len(data.tokenizer)).to(accelerator.device)
        parameters = sum(p.numel() for p in model.parameters())
        audit = core.causality_audit(model, len(data.tokenizer), args.seq_len)
        require(audit <= 1e-5, f"the model reads the future ({audit:.1e})", core.CHECK_FAILED)
        run.say(f"[{args.kind}] {parameters:,} parameters, vocabulary {len(data.tokenizer)}, causality {audit:.0e}")
        saved = run.checkpoint("backbone_step_*.pt", total=args.max_steps)
        inputs = {"tokenizer": core.tokenizer_digest(data.tokenizer), "data": core.digest(data.train, data.validation)}
        run.start((*FREE, LENGTH), **inputs)
        figures, weights = train(args, data, model, run, accelerator, saved)
        result = {"kind": args.kind, "parameters": parameters, "causality_max_abs_diff": audit, "config": vars(args)}
        source = args.data if args.kind == "lm" else "generated"
        result |= {"data": {"source": source, "vocab_size": len(data.tokenizer)}, **figures}
        if run.main:
            save_model(model, weights, result, data, args, run)
        result = run.finish(result)
        run.say(f"[Save] {run.dir}: load it with --model_path {run.dir} or --model_id {run.dir}")
    return result


if __name__ == "__main__":
    core.cli(main)
