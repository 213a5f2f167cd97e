"""LatentWire, one code for two frozen readers: what is sent, who reads it, what must not move it."""

import copy
import json
import math
import random
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, same_tensors

import core
import latentwire_train as L
import pretrain_backbone as P

CPU = torch.device("cpu")


def parsed(*flags):
    return L.parse(["--test", *flags])


def made(*flags, facts=2, contexts=3):
    """(args, wire, groups) of two tiny random readers, every weight moved from its start."""
    args = parsed("--facts", str(facts), "--eval_samples", str(contexts), "--samples", "8", *flags)
    readers = L.load_readers(args, CPU)
    data = L.load_data(args, readers[0].tokenizer)
    wire = L.make_wire(args, data, readers)
    return args, wire.eval(), data.evaluation


def moved(wire, size=0.05):
    """Every trained weight off its start: an identity hides what is wrong behind it."""
    with torch.no_grad():
        for n, p in wire.named_parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=core.generator(1, n)))
    return wire


def rows_of(groups):
    return [row for group in groups for row in group]


SENDERS = ["byte", "lm", "interlingua"]
LM = ["--encoder_type", "lm", "--ratio", "4"]


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """The two random readers of --test, made once: each test gets copies. Yields what makes them afresh."""
    fresh = {"tiny": core.load_backbone, "tiny_qwen": L.tiny_qwen}
    kept = {"tiny": fresh["tiny"]("tiny"), "tiny_qwen": fresh["tiny_qwen"]()}

    def copied(name):
        base, tokenizer = kept[name]
        return copy.deepcopy(base), tokenizer

    with pytest.MonkeyPatch.context() as patch:
        load = lambda name, *more: copied(name) if name == "tiny" else fresh["tiny"](name, *more)  # noqa: E731
        patch.setattr(core, "load_backbone", load)
        patch.setattr(L, "tiny_qwen", lambda: copied("tiny_qwen"))
        yield fresh


# ------------------------------------------------------------------------------------------------ what is on the wire
def pack(z, bits):
    """One code [M, d_z] as bytes: the lowest bits of each level one after the other, then the scales."""
    z = z.detach()
    if bits in (0, 16):
        return z.numpy().astype(np.float32 if bits == 0 else np.float16).tobytes()
    level, scale = L.levels(z[None], torch.ones_like(z[None, :, 0]), bits)
    shifted = (level.flatten()[: z.numel()].numpy() + 2 ** (bits - 1)).astype(np.uint8)
    stream = np.unpackbits(shifted[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(stream.flatten()).tobytes() + scale.flatten().numpy().tobytes()


def unpack(data, slots, d_z, bits):
    """The code [slots, d_z] in what `pack` gave."""
    n = slots * d_z
    if bits in (0, 16):
        values = np.frombuffer(data, np.float32 if bits == 0 else np.float16)
        return torch.from_numpy(values.astype(np.float32)).view(slots, d_z)
    size = math.ceil(n * bits / 8)
    stream = np.unpackbits(np.frombuffer(data[:size], np.uint8))[: n * bits].reshape(n, bits)
    level = stream @ (1 << np.arange(bits)[::-1]) - 2 ** (bits - 1)
    scale = np.frombuffer(data[size:], np.float16).astype(np.float32).repeat(L.GROUP)[:n]
    return torch.from_numpy((level * scale).astype(np.float32)).view(slots, d_z)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_quantiser_against_a_slow_form_and_its_bytes(bits):
    """Groups of 32, one fp16 scale each: max / (2^(b-1) - 1); what is packed is what is counted and what arrives."""
    z = torch.randn(2, 5, 24, generator=core.generator(0, "z")) * torch.tensor([1.0, 30.0])[:, None, None]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    arrived = L.quantise(z * mask[..., None], mask, bits)
    for c, m in enumerate((5, 3)):
        values, expected = z[c, :m].flatten().double().tolist(), []
        for at in range(0, len(values), 32):
            part = values[at : at + 32]
            scale = float(np.float16(np.float32(max(map(abs, part))) / np.float32(2 ** (bits - 1) - 1)))
            top = 2 ** (bits - 1) - 1
            expected += [scale * min(top, max(-top, round(float(np.float32(v) / np.float32(scale))))) for v in part]
        assert arrived[c, :m].flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)
        sent = pack(z[c, :m], bits)
        assert len(sent) == L.code_bytes(m * 24, bits) == math.ceil(m * 24 * bits / 8) + 2 * math.ceil(m * 24 / 32)
        assert torch.equal(unpack(sent, m, 24, bits), arrived[c, :m])
    assert (arrived[1, 3:] == 0).all()


def test_bytes_of_a_code_are_the_specified_ones():
    assert [L.code_bytes(32 * 256, b) for b in (16, 8, 6, 4)] == [16384, 8704, 6656, 4608]
    z = torch.randn(3, 7)
    for bits in (0, 16):
        assert len(pack(z, bits)) == L.code_bytes(21, bits) == 21 * (4 if bits == 0 else 2)
        mask = torch.ones(1, 3, dtype=torch.long)
        assert torch.equal(unpack(pack(z, bits), 3, 7, bits), L.quantise(z[None], mask, bits)[0])


def test_gradients_pass_the_quantiser_straight_through():
    z, mask = torch.randn(1, 2, 8, requires_grad=True), torch.ones(1, 2, dtype=torch.long)
    weight = torch.randn(1, 2, 8)
    (L.quantise(z, mask, 4) * weight).sum().backward()
    assert torch.equal(z.grad, weight) and not torch.equal(L.quantise(z, mask, 4), z)


def test_a_zero_code_arrives_as_zero():
    z, mask = torch.zeros(1, 2, 8), torch.ones(1, 2, dtype=torch.long)
    assert all(torch.equal(L.quantise(z, mask, bits), z) for bits in (16, 8, 6, 4))


# ------------------------------------------------------------------------------------- what a code may and may not know
@pytest.mark.parametrize("sender", SENDERS)
def test_no_slot_depends_on_the_question_a_neighbour_or_padding(sender):
    _, wire, groups = made("--encoder_type", sender, "--bits", "8", contexts=3)
    moved(wire)
    whole = wire.collate(rows_of(groups), 4.0)
    code = wire.code(whole)
    for c, group in enumerate(groups):
        asked = [row | {"question": "What is the coat of the man with the very long name ?"} for row in group[:1]]
        alone = wire.code(wire.collate(asked, 4.0))
        m = int(code.mask[c].sum())
        assert alone.mask.sum() == m
        assert torch.allclose(alone.z[0, :m], code.z[c, :m], atol=2e-5)
    assert code.mask.sum(1).unique().numel() > 1  # some were padded
    assert (code.z[code.mask == 0] == 0).all()


def test_the_documents_form_puts_the_question_into_the_code():
    _, wire, groups = made("--question_scope", "encoded")
    rows = rows_of(groups)
    batch = wire.collate(rows, 4.0)
    assert len(batch.texts) == len(rows) and all(r["question"] in t for r, t in zip(rows, batch.texts))
    assert "Question" not in wire.readers[0].tokenizer.decode(batch.prompts[0].tail[0])
    _, wire, groups = made()
    batch = wire.collate(rows, 4.0)
    assert batch.texts == list(dict.fromkeys(row["context"] for row in rows))


def test_slots_are_the_ceiling_of_the_ratio_and_never_more_than_a_readers_tokens():
    _, wire, groups = made(*LM)
    batch = wire.collate(rows_of(groups), 4.0)
    n = [p.body_mask.sum(1) for p in batch.prompts]
    assert batch.slots.tolist() == [math.ceil(int(k) / 4) for k in n[0]]
    assert wire.collate(rows_of(groups), 1.0).slots.tolist() == torch.minimum(*n).tolist()
    fixed = made("--latent_len", "7")[1]
    assert (fixed.collate(rows_of(groups), None).slots == 7).all()


def test_slots_may_be_counted_in_another_tokenizers_tokens(tmp_path):
    P.reader_tokenizer().save_pretrained(tmp_path)
    _, wire, groups = made("--count_tokens_of", str(tmp_path))
    slots = wire.collate(rows_of(groups), 2.0).slots
    assert slots.tolist() == [math.ceil(len(group[0]["context"].split()) / 2) for group in groups]


def test_a_slot_stands_where_its_tokens_stood():
    tokens, slots = torch.tensor([7, 4]), torch.tensor([3, 2])
    for c, (n, m) in enumerate(((7, 3), (4, 2))):
        for slot in range(m):
            own = [t for t in range(n) if t * m // n == slot]
            assert L.places(tokens, slots)[c, slot] == round(sum(own) / len(own))
    _, wire, groups = made()
    batch = wire.collate(rows_of(groups), 4.0)
    text, coded = (way(1, batch, wire.code(batch)) for way in (wire.text, wire.coded))
    assert torch.equal(text.positions[:, -1], coded.positions[:, -1])  # the question is as far away as from the text
    H, m = len(batch.prompts[1].head), int(batch.slots[0])
    assert (
        coded.positions[0, H : H + m].tolist()
        == (H + L.places(batch.prompts[1].body_mask.sum(1), batch.slots))[0, :m].tolist()
    )


# ------------------------------------------------------------------------------------------------------- the readers
def test_text_is_read_as_the_library_reads_the_prompt():
    """[head | body | tail] from embeddings equals the prompt's own ids, and so do greedy answers."""
    _, wire, groups = made()
    rows = rows_of(groups)
    batch = wire.collate(rows, 4.0)
    for i, reader in enumerate(wire.readers):
        seen = wire.text(i, batch)
        logits = reader.answer_logits(seen, batch.prompts[i].gold, batch.prompts[i].gold_mask)
        said = reader.answers(seen, 4)
        for b, row in enumerate(rows):
            text = f"Context: {row['context']}\nQuestion: {row['question']}\nAnswer: "
            ids = reader.tokenizer(text.rstrip(" ") if reader.glued else text)["input_ids"]
            gold = batch.prompts[i].gold[b][batch.prompts[i].gold_mask[b].bool()].tolist()
            whole = reader.base(torch.tensor([ids + gold])).logits[0, len(ids) - 1 : -1]
            assert torch.allclose(logits[b, : len(gold)], whole, atol=1e-4)
            out = reader.base.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=reader.stop)
            assert said[b] == reader.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("flags", [[], ["--use_deep_prefix", "--use_latent_adapters", "--use_lora"]])
def test_a_batch_is_read_as_its_questions_one_by_one(flags):
    _, wire, groups = made(*LM, *flags)
    moved(wire)
    rows = rows_of(groups)
    batch = wire.collate(rows, 4.0)
    code = wire.code(batch)
    for i, reader in enumerate(wire.readers):
        p = batch.prompts[i]
        logits, seen = reader.answer_logits(wire.coded(i, batch, code), p.gold, p.gold_mask), wire.coded(i, batch, code)
        said, logp = reader.answers(seen, 3), reader.likelihood(seen, ["red", "blue stone"] * 3)[0]
        for b, row in enumerate(rows):
            one = wire.collate([row], 4.0)
            view, q = wire.coded(i, one, wire.code(one)), one.prompts[i]
            n = int(q.gold_mask.sum())
            assert torch.allclose(reader.answer_logits(view, q.gold, q.gold_mask)[0], logits[b, :n], atol=1e-4)
            assert reader.answers(view, 3) == said[b : b + 1]
            alone = reader.likelihood(view, [["red", "blue stone"][b % 2]])[0]
            assert alone == pytest.approx(float(logp[b]), abs=1e-3)


def test_the_first_logits_of_training_are_the_first_of_generation():
    _, wire, groups = made("--use_coprocessor", "--use_prefix")
    batch = moved(wire).collate(rows_of(groups), 4.0)
    code = wire.code(batch)
    for i, reader in enumerate(wire.readers):
        seen, p = wire.coded(i, batch, code), batch.prompts[i]
        first = reader.run(seen, keep=1, grow=True)[0].logits[:, -1]
        assert torch.allclose(reader.answer_logits(seen, p.gold, p.gold_mask)[:, 0], first, atol=1e-5)


@pytest.mark.parametrize("tokenizer", ["words", "pieces", "tiny", "tiny_qwen"])
def test_every_answer_survives_the_tokenizers(tokenizer):
    answers = [c for c in core.COLOURS] + [f"{c} {m}" for c in core.COLOURS for m in core.MATERIALS]
    own = {"tiny": lambda: core.load_backbone("tiny")[1], "tiny_qwen": lambda: L.tiny_qwen()[1]}
    tokenizer = own.get(tokenizer, lambda: P.reader_tokenizer(tokenizer))()
    for answer in answers:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == answer and tokenizer.unk_token_id not in ids


def test_readers_share_neither_tokenizer_width_nor_depth(tiny):
    one, two = L.load_readers(parsed(), CPU)
    for reader, again in ((one, tiny["tiny"]("tiny")[0]), (two, tiny["tiny_qwen"]()[0])):  # and are the same each time
        assert same_tensors(dict(reader.base.state_dict()), dict(again.state_dict()))
    assert one.width != two.width and len(one.table) != len(two.table)
    assert one.base.config.num_hidden_layers != two.base.config.num_hidden_layers


def test_one_readers_adapter_does_not_touch_the_other():
    _, wire, groups = made(*LM)
    batch = wire.collate(rows_of(groups), 4.0)
    code, p = wire.code(batch), batch.prompts[0]
    one, two = wire.readers
    before = one.answer_logits(wire.coded(0, batch, code), p.gold, p.gold_mask)
    before.sum().backward()
    assert all(q.grad is None for q in two.trained().values()) and one.adapter.skip.weight.grad.abs().sum() > 0
    with torch.no_grad():
        for q in two.trained().values():
            q.add_(1.0)
    code = wire.code(batch)
    assert torch.equal(one.answer_logits(wire.coded(0, batch, code), p.gold, p.gold_mask), before)


def test_an_adapter_is_the_function_of_the_specification():
    """A z + W2 GELU(W1 LN z), at the RMS of the table, times its scale; in float64."""
    args = parsed()
    table = torch.randn(50, 20, generator=core.generator(0, "table")) * 0.1
    adapter, z = L.Adapter(args, table), torch.randn(2, 3, args.d_z, generator=core.generator(0, "z"))
    core.init_normal(adapter, 0, 0.3)
    adapter.scale.data.fill_(1.5)
    mask = torch.ones(2, 3, dtype=torch.long)
    w = {name: p.detach().double() for name, p in adapter.named_parameters()}
    x = z.double()
    n = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    h = n @ w["inner.weight"].T
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    y = x @ w["skip.weight"].T + h @ w["out.weight"].T
    y = (
        y
        * math.sqrt(float(table.double().square().mean(1).sqrt().mean()) ** 2)
        / y.square().mean(-1, keepdim=True).sqrt()
    )
    assert torch.allclose(adapter(z, mask).double(), 1.5 * y, atol=1e-5)
    adapter.transform = "none"
    raw = adapter(z, mask)
    assert not torch.allclose(raw.square().mean(-1).sqrt(), torch.tensor(1.5 * adapter.rms), rtol=1e-2)
    adapter.eval().normalize = "batch"
    flat = adapter(z, mask).double()[0] / 1.5
    assert float(flat.mean()) == pytest.approx(float(table.mean()), abs=1e-6)
    assert float(flat.std(correction=0)) == pytest.approx(float(table.std()), rel=1e-4)


# -------------------------------------------------------------------------------------------------- where it starts
def test_the_lm_sender_starts_at_the_segments_means_and_its_first_reader_sees_them():
    _, wire, groups = made(*LM, "--d_z", "64")
    batch = wire.collate(rows_of(groups), 4.0)
    code, reader, p = wire.code(batch), wire.readers[0], batch.prompts[0]
    for c in range(len(batch.texts)):
        n, m = int(p.body_mask[c].sum()), int(batch.slots[c])
        for slot in range(m):
            own = [t for t in range(n) if t * m // n == slot]
            mean = reader.embed(p.body[c, own]).mean(0)
            assert torch.allclose(code.z[c, slot], mean, atol=1e-6)
            seen = wire.coded(0, batch, code).embeds[int((p.of == c).nonzero()[0]), len(p.head) + slot]
            assert torch.allclose(seen, mean * reader.rms / mean.square().mean().sqrt(), atol=1e-5)


def test_a_narrow_code_starts_at_the_tables_principal_directions():
    table = torch.randn(30, 6, dtype=torch.float64, generator=core.generator(0, "t")) * torch.arange(1.0, 7.0)
    basis = L.start_of(parsed("--d_z", "2"), table).double()
    _, vectors = np.linalg.eigh(table.numpy().T @ table.numpy())
    for row, vector in zip(basis.numpy(), vectors.T[::-1]):
        assert abs(row @ vector) == pytest.approx(1, abs=1e-5) and row[np.abs(row).argmax()] > 0


def test_the_second_adapter_starts_as_the_least_squares_translation():
    args, wire, _groups = made(*LM, "--d_z", "64")
    data = L.load_data(args, wire.readers[0].tokenizer)
    batch = wire.collate([group[0] for group in data.train[-1]], args.ratio)
    x, y = [], []
    for c in range(len(batch.texts)):
        for slot in range(int(batch.slots[c])):
            for i, (reader, rows) in enumerate(zip(wire.readers, (x, y))):
                n, m = int(batch.prompts[i].body_mask[c].sum()), int(batch.slots[c])
                own = [t for t in range(n) if t * m // n == slot]
                rows.append(reader.embed(batch.prompts[i].body[c, own]).mean(0).detach().double())
    x, y = torch.stack(x), torch.stack(y)
    gram = x.T @ x
    ridge = gram + 1e-3 * gram.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    expected = torch.linalg.inv(ridge) @ x.T @ y
    assert torch.allclose(wire.readers[1].adapter.skip.weight.double(), expected.T, atol=1e-4)
    for adapter in (reader.adapter for reader in wire.readers):  # else the two do not start alike
        assert float(adapter.inner.weight.std()) == pytest.approx(adapter.inner.in_features**-0.5, rel=0.1)
        assert not adapter.out.weight.any()
    random_start = made(*LM, "--d_z", "64", "--adapter_start", "random")[1]
    assert not torch.allclose(random_start.readers[1].adapter.skip.weight.double(), expected.T, atol=1e-2)


def test_gist_tokens_read_the_context_and_segment_means_need_none():
    _, wire, groups = made(*LM, "--d_z", "64")
    batch = moved(wire).collate(rows_of(groups), 4.0)
    before = wire.code(batch).z.clone()
    wire.sender.gist.data.add_(1.0)
    assert not torch.allclose(wire.code(batch).z, before, atol=1e-4)
    segment = made(*LM, "--code_form", "segment")[1]
    assert segment.sender.gist is None and segment.sender.norm.normalized_shape == (64,)


def test_the_senders_lora_acts_in_the_sender_alone():
    _, wire, groups = made(*LM)
    batch = wire.collate(rows_of(groups), 4.0)
    p, reader = batch.prompts[0], wire.readers[0]
    text = reader.answer_logits(wire.text(0, batch), p.gold, p.gold_mask)
    code = wire.code(batch).z.clone()
    with torch.no_grad():
        for name, q in wire.sender.lora.named_parameters():
            q.add_(0.3 * torch.randn(q.shape, generator=core.generator(0, name)))
        wire.sender.second.weight.add_(0.1)
    assert not torch.allclose(wire.code(batch).z, code, atol=1e-4)
    assert torch.equal(reader.answer_logits(wire.text(0, batch), p.gold, p.gold_mask), text)


# ---------------------------------------------------------------------------------------------- the document's parts
def test_parameter_counts_are_the_stated_ones():
    args = L.parse(["--d_z", "256", "--latent_len", "32"])
    with torch.device("meta"):
        sender = L.ByteSender(args, 32)
        part = L.LatentAdapter(4096, 256)
    encoder = sum(p.numel() for m in (sender.table, sender.encoder) for p in m.parameters())
    assert encoder == 256 * 256 + 6 * (4 * 256**2 + 8 * 256**2 + (4 + 4 + 1 + 4) * 256) + 2 * 256  # 4.80M
    assert 4.79e6 < encoder < 4.81e6
    pooler = sum(p.numel() for p in sender.parameters()) - encoder
    assert 0.55e6 < pooler < 0.70e6
    assert sum(p.numel() for p in part.parameters()) == 1_258_497
    own = made()[1]
    d_z, wide = 32, 128
    for reader in own.readers:
        count = 2 * d_z + d_z * wide + wide + wide * reader.width + reader.width + d_z * reader.width + 1
        assert sum(p.numel() for p in reader.trained().values()) == count  # an adapter and nothing else


SWITCHES = ["lora", "prefix", "deep_prefix", "latent_adapters", "coprocessor", "gist_head", "latent_refiner"]


@pytest.mark.parametrize("part", SWITCHES)
def test_a_part_acts_and_is_off_unless_asked_for(part):
    """Switched on it has weights of its own, all with a gradient; moved, they change the answer (the gist head only a
    loss); text is read without it; some start without any effect."""
    flags = [*LM, f"--use_{part}", "--lora_dropout", "0", "--deep_prefix_dropout", "0"]
    plain, (_args, wire, groups) = made(*LM)[1], made(*flags)
    batch = wire.collate(rows_of(groups), 4.0)
    p = batch.prompts[0]

    def logits(w, code=True):
        seen = w.coded(0, batch, w.code(batch)) if code else w.text(0, batch)
        return w.readers[0].answer_logits(seen, p.gold, p.gold_mask)

    names = {n for n, _ in wire.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert names and all(part in n or "refiner" in n for n in names)
    if part in ("lora", "latent_adapters", "latent_refiner", "gist_head"):
        assert torch.allclose(logits(wire), logits(plain), atol=1e-6)
    text = logits(wire, code=False)
    assert torch.equal(text, logits(plain, code=False))
    moved(wire)
    with torch.no_grad():
        for n, q in plain.named_parameters():
            if q.requires_grad:
                q.copy_(dict(wire.named_parameters())[n])
    gap = (logits(wire) - logits(plain)).abs().max()
    assert (gap < 1e-5) == (part == "gist_head") and torch.equal(logits(wire, code=False), text)
    L.Objective(wire)(batch)["loss"].backward()
    gradients = {n: q.grad for n, q in wire.named_parameters() if n in names}
    silent = [n for n, g in gradients.items() if g is None or not g.abs().sum() > 0]
    assert not [n for n in silent if "key" not in n or "bias" not in n], silent  # a key's bias moves no softmax


def test_keys_of_a_prefix_come_before_the_prompt_and_positions_go_on_behind():
    _, wire, groups = made("--use_deep_prefix")
    batch = wire.collate(rows_of(groups), 4.0)
    reader, seen = wire.readers[0], wire.coded(0, batch, wire.code(batch))
    assert len(seen.cache) == reader.base.config.num_hidden_layers
    assert seen.cache[0][0].shape[2] == int(batch.slots.max()) == seen.cache_mask.shape[1]
    _, mask, positions = reader.run(seen, keep=1)
    assert mask.shape[1] == seen.mask.shape[1] + seen.cache_mask.shape[1]
    assert torch.equal(positions, seen.positions + seen.cache_mask.sum(1, keepdim=True))
    assert seen.cache_mask.sum(1).unique().numel() > 1  # some are padded: what is not there takes no place


@pytest.mark.parametrize("pool", ["mean", "first", "max"])
def test_the_coprocessor_pools_what_is_there(pool):
    args, wire, _groups = made("--use_coprocessor", "--coprocessor_pool", pool, "--coprocessor_len", "2")
    part = wire.readers[0].parts["coprocessor"]
    z, mask = torch.randn(1, 4, args.d_z), torch.tensor([[1, 1, 1, 0]])
    expected = {"mean": z[:, :3].mean(1), "first": z[:, 0], "max": z[:, :3].amax(1)}[pool]
    x = part.mlp(expected).view(1, 2, 256)
    cache, seen = part(z, mask)
    keys = part.cache.keys[0](x).view(1, 2, part.cache.heads, -1).transpose(1, 2)
    assert torch.allclose(cache[0][0], 0.8 * keys, atol=1e-6) and seen.tolist() == [[1, 1]]


# ---------------------------------------------------------------------------------------------------------- the losses
def nll(logits, gold, mask, first=None):
    """Mean negative log-likelihood of the marked tokens, one after the other, in float64."""
    found = []
    for b in range(len(gold)):
        for t in range(gold.shape[1] if first is None else min(first, gold.shape[1])):
            if mask[b, t]:
                found.append(-logits[b, t].double().log_softmax(-1)[gold[b, t]])
    return torch.stack(found).mean()


def test_the_loss_is_the_weighted_sum_of_its_terms():
    flags = "--k_tokens 2 --k_ce_weight 0.3 --first_token_ce_weight 0.2 --first_token_entropy_weight 0.1 --scale_l2 0.5"
    _, wire, groups = made(*LM, *flags.split(), "--kd_first_k_weight", "0.7", "--kd_tau", "2")
    moved(wire)
    batch = wire.collate(rows_of(groups), 4.0)
    terms, total, code = L.Objective(wire)(batch, first=0.2), 0.0, wire.code(batch)
    for i, reader in enumerate(wire.readers):
        p = batch.prompts[i]
        logits = reader.answer_logits(wire.coded(i, batch, code), p.gold, p.gold_mask)
        teacher = reader.answer_logits(wire.text(i, batch), p.gold, p.gold_mask)
        h = [-(x.exp() * x).sum() for x in logits[:, 0].double().log_softmax(-1)]
        kl = []
        for b in range(len(p.gold)):
            for t in range(2):
                if p.gold_mask[b, t]:
                    s, q = ((x[b, t].double() / 2).log_softmax(-1) for x in (logits, teacher))
                    kl.append(4 * (q.exp() * (q - s)).sum())
        one = nll(logits, p.gold, p.gold_mask)
        assert float(terms[f"ce_{reader.name}"]) == pytest.approx(float(one), rel=1e-4)
        total += one + 0.3 * nll(logits, p.gold, p.gold_mask, 2) + 0.2 * nll(logits, p.gold, p.gold_mask, 1)
        total += -0.1 * torch.stack(h).mean() + 0.7 * torch.stack(kl).mean()
        total += 0.5 * (reader.adapter.scale - 1) ** 2
    assert float(terms["loss"]) == pytest.approx(float(total), rel=1e-4)


def test_distillation_from_a_reader_that_reads_the_text_itself_is_zero(monkeypatch):
    _, wire, groups = made("--kd_first_k_weight", "1")
    batch = wire.collate(rows_of(groups), 4.0)
    p = batch.prompts[0]
    student = wire.readers[0].answer_logits(wire.text(0, batch), p.gold, p.gold_mask)
    assert abs(float(L.Objective(wire).distillation(0, batch, student[:, :4]))) < 1e-6


def test_the_rewriting_loss_is_the_nll_of_the_context_behind_the_slots():
    _, wire, groups = made(*LM, "--latent_align_weight", "1")
    batch = moved(wire).collate(rows_of(groups), 4.0)
    code, found = wire.code(batch), []
    reader, p = wire.readers[1], batch.prompts[1]
    x, n = reader.adapter(code.z, code.mask), p.body_mask.sum(1)
    where = L.places(n, batch.slots)
    for c in range(len(batch.texts)):
        m, k, H = int(batch.slots[c]), int(n[c]), len(p.head)
        body = p.body[c, :k]
        embeds = torch.cat([reader.embed(p.head), x[c, :m], reader.ask[None], reader.embed(body)])[None]
        positions = [*range(H), *(H + where[c, :m]).tolist(), *range(H + k, H + 2 * k + 1)]
        logits = reader.base(inputs_embeds=embeds, position_ids=torch.tensor([positions])).logits[0]
        found += [-logits[H + m + t].log_softmax(-1)[body[t]] for t in range(k)]
    loss = L.Objective(wire).rewriting(1, batch, code)
    assert float(loss) == pytest.approx(float(torch.stack(found).mean()), rel=1e-4)


def test_the_gist_head_says_the_prompts_first_embeddings():
    _, wire, groups = made("--use_gist_head", "--gist_mask_prob", "0")
    batch = wire.collate(rows_of(groups), 4.0)
    reader, p, code = wire.readers[0], batch.prompts[0], wire.code(batch)
    y, errors = reader.parts["gist_head"](code.z, code.mask), []
    for c in range(len(batch.texts)):
        ids = [*p.head.tolist(), *p.body[c, : int(p.body_mask[c].sum())].tolist()][:48]
        errors += [(y[c, t] - reader.embed(torch.tensor(i))).square().mean() for t, i in enumerate(ids)]
    loss = L.Objective(wire).reconstruction(reader, p, code)
    assert float(loss) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


def test_warm_up_aligns_the_first_slots_with_the_answers_embeddings():
    _, wire, groups = made(*LM, "--warmup_align_tokens", "2", "--warmup_align_weight", "0.5", "--scale_l2", "0")
    batch = moved(wire).collate(rows_of(groups), 4.0)
    code, total = wire.code(batch), 0.0
    for i, reader in enumerate(wire.readers):
        p, x, errors = batch.prompts[i], reader.adapter(code.z, code.mask), []
        for b in range(len(p.gold)):
            for t in range(min(2, int(p.gold_mask[b].sum()))):
                gap = x[int(p.of[b]), t] - reader.embed(p.gold[b, t])
                errors.append(gap.square().mean() / reader.rms**2)
        total += 0.5 * torch.stack(errors).mean()
    assert float(L.Objective(wire)(batch, warm=True)["loss"]) == pytest.approx(float(total), rel=1e-4)


def test_the_schedules_of_the_first_token():
    at = {
        kind: parsed("--first_token_ce_weight", "2", "--first_token_ce_schedule", kind)
        for kind in ("none", "cosine", "warmup")
    }
    weights = {kind: [round(L.first_weight(args, f), 6) for f in (0.0, 0.2, 0.5, 1.0)] for kind, args in at.items()}
    assert weights["none"] == [2] * 4 and weights["warmup"] == [0, 1, 2, 2]
    assert weights["cosine"] == pytest.approx([2, 1 + math.cos(math.pi / 5), 1, 0], abs=1e-6)


# ------------------------------------------------------------------------------------------------------ evaluation
def test_the_joint_answer_has_the_highest_sum_and_a_single_proposal_wins():
    args, wire, groups = made()
    rows = rows_of(groups)[:3]
    found = []
    for at, (sums, tokens) in enumerate(
        [(([-1.0, -5.0], [-3.0, -2.0]), 2), (([-1, -1], [-1, -1]), 1), (([-9.0, -1], [-1, -1]), 4)]
    ):
        row = {"at": at, "joint": {"llama": [(s, tokens) for s in sums[0]], "qwen": [(s, 1) for s in sums[1]]}}
        for name, said in (("llama", "red"), ("qwen", "blue")):
            row[name] = {"said": said, "logp": -1.0, "tokens": 1, "right": True, "positions": 9}
        found.append(row)
    result = L.scores(wire, rows, found, True)
    assert result["joint"]["said"] == ["blue", "red", "blue"]  # -6 < -5; a tie goes to the first; -10 < -2
    assert result["joint_per_token"]["said"] == ["red", "red", "blue"]  # -3 > -5; a tie; -2.5 < -2
    assert result["agreement"] == 0
    for row in found:
        row["qwen"] = row["llama"] | {"said": "the Red !"}
    assert L.scores(wire, rows, found, True)["agreement"] == 1
    alone = L.Wire(args, list(wire.readers[:1]), None, 8)
    once = [{"at": r["at"], "llama": r["llama"], "joint": {"llama": r["joint"]["llama"][:1]}} for r in found]
    result = L.scores(alone, rows, once, True)
    assert result["joint"]["said"] == [r["llama"]["said"] for r in once]


def test_likelihood_is_the_sum_over_the_answer_and_its_end():
    _, wire, groups = made()
    batch = wire.collate(rows_of(groups)[:2], 4.0)
    reader, seen = wire.readers[0], wire.coded(0, batch, wire.code(batch))
    logp, tokens, _ = reader.likelihood(seen, ["red", "red brick"])
    for b, text in enumerate(["red", "red brick"]):
        ids = [*reader.tokenizer(text, add_special_tokens=False)["input_ids"], reader.tokenizer.eos_token_id]
        total = 0.0
        for k, token in enumerate(ids):
            before = reader.embed(torch.tensor([ids[:k]] * 2).long()), torch.ones(2, k, dtype=torch.long)
            view = seen.then(*before) if k else seen
            total += float(reader.run(view, keep=1)[0].logits[b, -1].log_softmax(-1)[token].detach())
        assert float(logp[b]) == pytest.approx(total, abs=1e-3) and int(tokens[b]) == len(ids)


def test_evaluation_is_the_same_in_batches_and_one_by_one_and_fresh():
    args, wire, groups = made(contexts=4)
    engine = core.engine(args)
    moved(wire)
    whole = L.evaluate(wire, groups, engine, joint=True)
    args.eval_batch_size = 1
    assert L.evaluate(wire, groups, engine, joint=True)["joint"]["said"] == whole["joint"]["said"]
    args.fresh_eval = True
    again = L.evaluate(wire, groups, engine, joint=True)
    assert again["readers"]["qwen"]["said"] == whole["readers"]["qwen"]["said"]
    assert again["readers"]["qwen"]["nll_per_token"] == pytest.approx(
        whole["readers"]["qwen"]["nll_per_token"], rel=1e-5
    )
    assert whole["readers"]["llama"]["n"] == len(rows_of(groups)) and whole["readers"]["llama"]["f1_interval"]["n"] == 4


def test_text_at_the_codes_price():
    """As many positions: the first tokens, the most surprising ones; as many bytes: zlib, ids."""
    args, wire, groups = made("--bits", "4", contexts=3)
    batch = wire.collate(rows_of(groups), 4.0)
    p, reader = batch.prompts[0], wire.readers[0]
    nats = L.surprise(wire, batch, 0)
    for c in range(len(batch.texts)):
        body = p.body[c, : int(p.body_mask[c].sum())]
        ids = torch.cat([p.head, body])
        logits = reader.base(ids[None]).logits[0]
        expected = [-logits[len(p.head) - 1 + t].log_softmax(-1)[body[t]] for t in range(len(body))]
        assert torch.allclose(nats[c, : len(body)], torch.stack(expected), atol=1e-4)
    seen = []
    way = wire.text
    wire.text = lambda i, b, code=None, keep=None: (seen.append((i, b, keep)), way(i, b, code, keep))[1]
    alone = [wire.collate(group[:1], 4.0) for group in groups]
    rows = L.rivals(wire, groups, alone, core.engine(args), 4.0)
    assert set(rows) == {"head", "salience", "zlib_bytes", "id_bytes"}
    head, salience, ids = (seen[2 * k] for k in (0, 1, 3))
    assert torch.equal(head[2].sum(1), head[1].slots) and head[2][:, 0].all()
    for c, m in enumerate(salience[1].slots.tolist()):
        n = int(salience[1].prompts[0].body_mask[c].sum())
        best = L.surprise(wire, salience[1], 0)[c, :n].topk(m).indices
        assert set(salience[2][c, :n].nonzero()[:, 0].tolist()) == set(best.tolist())
    size = [L.code_bytes(m * args.d_z, 4) for m in ids[1].slots.tolist()]
    kept = [int(k.sum()) for k in ids[2]]
    assert kept == [min(8 * s // 9, ids[2].shape[1]) for s in size]  # 259 entries: nine bits


def test_packed_text_is_the_longest_that_fits():
    row = {"context": core.context_of(core.draw_facts(random.Random(0).randrange, 12))}
    words = row["context"].split(" ")
    for size in (30, 90, 10_000):
        kept = L.packed_text(row, size)["context"].split(" ")
        fits = [k for k in range(1, len(words) + 1) if len(zlib.compress(" ".join(words[:k]).encode(), 9)) <= size]
        assert len(kept) == max(fits, default=1)


def test_the_nulls_take_the_code_away_and_put_the_sender_back():
    args, wire, groups = made(*LM)
    start = wire.state()["sender"]
    before, seen = {n: p.clone() for n, p in moved(wire).sender.named_parameters()}, []
    code = wire.code
    wire.code = lambda batch, bits=None: (
        seen.append((batch, {n: p.clone() for n, p in wire.sender.named_parameters()})),
        code(batch, bits),
    )[1]
    rows = L.nulls(wire, groups, core.engine(args), 4.0, start)
    assert set(rows) == {"swapped", "wrong_adapter", "untrained_sender"}
    contexts = [group[0]["context"] for group in groups]
    other = {row["question"]: row["context"] for row in seen[0][0].rows}
    for _k, group in enumerate(groups):
        assert other[group[0]["question"]] in contexts
    assert {row["context"] for row in seen[0][0].rows} == set(contexts) and len(seen) == 3
    asked = {(r["context"], r["question"]) for r in rows_of(groups)}
    assert not asked & {(r["context"], r["question"]) for r in seen[0][0].rows}
    assert all(torch.equal(seen[2][1][n], start[n]) for n in start)  # the untrained one
    assert all(torch.equal(p, before[n]) for n, p in wire.sender.named_parameters())


def test_the_wrong_readers_adapter_is_cut_or_filled_to_the_width():
    _, wire, groups = made()
    batch = moved(wire).collate(rows_of(groups), 4.0)
    code = wire.code(batch)
    for i, width in enumerate((64, 48)):
        p, y = batch.prompts[i], wire.readers[1 - i].adapter(code.z, code.mask)
        seen = wire.crossed(i, batch, code).embeds[0, len(p.head)]
        y = F.pad(y[0, 0], (0, 16))[:64] if i == 0 else y[0, 0, :48]
        assert len(seen) == width
        assert torch.allclose(seen, y * wire.readers[i].rms / y.square().mean().sqrt(), atol=1e-6)


def test_the_cost_by_hand():
    _, wire, groups = made(*LM, "--bits", "8", contexts=2)
    alone, packed, slots = [wire.collate(group[:1], 4.0) for group in groups], [], []
    figures = L.cost(wire, alone, 8)
    for batch in alone:
        slots.append(int(batch.slots[0]))
        packed.append(len(pack(wire.code(batch).z[0], 8)) + 2 * 2)  # and two bytes a reader
    assert figures["wire_bytes"] == np.mean(packed) and figures["slots"] == np.mean(slots)
    assert figures["text_bytes_zlib"] == np.mean([len(zlib.compress(g[0]["context"].encode(), 9)) for g in groups])
    n = [int(batch.prompts[0].body_mask.sum()) for batch in alone]
    assert figures["id_bytes_llama"] == np.mean([math.ceil(9 * k / 8) for k in n])
    base = sum(p.numel() for p in wire.readers[0].base.base_model.parameters()) - wire.readers[0].table.numel()
    own = sum(p.numel() for p in wire.sender.parameters())
    expected = [2 * (base * (k + m) + own * k) for k, m in zip(n, slots)]
    assert figures["operations_sender"] == pytest.approx(np.mean(expected))


# ------------------------------------------------------------------------------------------------------------ the data
def test_unseen_pairs_are_kept_out_of_training_and_asked_for():
    args = parsed("--facts", "4", "--unseen_pairs", "--samples", "60", "--eval_samples", "20")
    data = L.load_data(args, None)
    facts = [fact for group in data.train[-1] for fact in L.stated(group[0]["context"])]
    assert len(facts) == 240 and not any(L.held_pair(*fact) for fact in facts)
    assert len(data.unseen) >= 10
    for row in rows_of(data.unseen):
        name = row["question"].split()[-2]
        assert (name, row["answers"][0]) in L.stated(row["context"]) and L.held_pair(name, row["answers"][0])


def test_training_sees_no_evaluated_context_and_more_facts_are_evaluated():
    args = parsed("--facts", "4", "--fact_curriculum", "2,4", "--eval_facts", "8", "--samples", "30")
    data = L.load_data(args, None)
    assert [len(pool) for pool in data.train] == [30, 30] and set(data.beyond) == {8}
    assert [len(L.stated(pool[0][0]["context"])) for pool in data.train] == [2, 4]
    trained = {group[0]["context"] for pool in data.train for group in pool}
    assert not trained & {group[0]["context"] for group in data.evaluation}
    assert all(len({row["context"] for row in group}) == 1 and len(group) == 2 for group in data.evaluation)


def test_a_squad_file_is_split_and_its_long_contexts_are_cut(tmp_path):
    rows = [
        {
            "id": f"{k}",
            "title": f"t{k // 4}",
            "context": f"number {k // 2} {'word ' * 80} .",
            "question": f"What {k} ?",
            "answers": ["word"],
        }
        for k in range(80)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    args = parsed("--train_file", str(file), "--max_length", "50", "--eval_samples", "2")
    tokenizer = core.load_backbone("tiny")[1]
    data = L.load_data(args, tokenizer)
    assert data.source == "file" and len(data.evaluation) == 2
    contexts = {g[0]["context"] for g in (*data.train[0], *data.evaluation)}
    assert all(len(tokenizer(c, add_special_tokens=False)["input_ids"]) <= 50 for c in contexts)


def test_the_course_takes_more_facts_first_and_then_one_ratio_more_at_a_time():
    args = parsed("--facts", "8", "--fact_curriculum", "2,8", "--multi_ratio", "2,4,8")
    assert args.stages == [(2, [2.0]), (8, [2.0]), (8, [2.0, 4.0]), (8, [2.0, 4.0, 8.0])] and args.ratio == 2
    assert parsed("--multi_ratio", "1,2,4", "--ratio", "4").ratio == 4
    course = L.Course(args, core.engine(args), None)
    right = {"right": torch.tensor(91.0), "scored": torch.tensor(100.0)}
    said = [course.advance(step, 2.0, right) for step in range(1, 51)]
    assert [bool(line) for line in said] == [False] * 49 + [True] and course.stage == 1
    enough = {"right": torch.tensor(90.0), "scored": torch.tensor(100.0)}
    assert not any(course.advance(step, 2.0, enough) for step in range(50)) and course.stage == 1
    course.stage = 3
    drawn = [course.draw(step)[1] for step in range(400)]
    assert 150 < drawn.count(8.0) < 250 and drawn.count(2.0) > 50 and drawn.count(4.0) > 50
    assert {course.draw(step)[0] for step in range(10)} == {1}
    course = L.Course(args, core.engine(args), {"stage": 2, "seen": 0, "answers": torch.zeros(2)})
    assert not any(course.advance(step, 2.0, right) for step in range(60))  # an older ratio does not count


# ------------------------------------------------------------------------------------------------------------- runs
RUN = ["--test", *LM, "--bits", "8", "--samples", "8", "--batch_size", "2", "--eval_samples", "2"]  # eight updates


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wire") / "run"
    return directory, L.main([*RUN, "--eval_bits", "4", "--out_dir", str(directory)])


@pytest.fixture
def unexamined(finished, monkeypatch):
    """For tests of training alone: what `examine` found in the finished run stands for what it would find."""
    monkeypatch.setattr(L, "examine", lambda *given: copy.deepcopy(finished[1]))


def test_a_run_writes_its_files_and_leaves_the_readers_bit_equal(finished):
    directory, result = finished
    names = "wire_results.json metrics.json predictions.jsonl diagnostics.jsonl wire.pt last.pt manifest.json README.md"
    assert all((directory / name).exists() for name in names.split())
    assert json.loads((directory / "wire_results.json").read_text()) == json.loads(json.dumps(result))
    assert {"text", "latent", "joint", "token_budget", "oracle", "wire"} <= json.loads(
        (directory / "metrics.json").read_text()
    ).keys()
    point = result["curve"]["4"]
    assert set(point["rivals"]) == {"head", "salience", "zlib_bytes", "id_bytes"} and set(point["readers"]) == {
        "llama",
        "qwen",
    }
    assert set(result["bits"]) == {"4"} and result["manifest"]["inputs"]["base"] == L.frozen_digest(
        L.load_readers(parsed(), CPU)
    )
    assert len((directory / "predictions.jsonl").read_text().splitlines()) == 4
    assert result["causality_max_abs_diff"] == 0
    assert set(result["seconds_per_question"]) == {"1", "4", "16"}


def test_a_changed_reader_fails_the_run(tmp_path, unexamined, monkeypatch):
    trained = L.train

    def spoiling(args, wire, *more):
        figures = trained(args, wire, *more)
        next(wire.readers[1].base.parameters()).data[0, 0] += 1e-3
        return figures

    monkeypatch.setattr(L, "train", spoiling)
    with pytest.raises(core.Failure, match="changed a frozen reader") as failure:
        L.main([*RUN, "--epochs", "1", "--samples", "4", "--out_dir", str(tmp_path / "r")])
    assert failure.value.code == core.CHECK_FAILED and not (tmp_path / "r" / "wire_results.json").exists()


def last(directory):
    state = core.load_checkpoint(directory / "last.pt")
    parts = {k: state[k] for k in ("sender", "readers", "optimizer_state_dict", "state", "course", "start")}
    return parts | {k: state["loop"][k] for k in ("tokens", "skipped", "sums")}


def test_repeat_cadence_and_resume_are_bitwise_equal(finished, tmp_path, monkeypatch):
    directory, whole = finished
    flags = [*RUN, "--eval_bits", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(L, "examine", lambda *given: copy.deepcopy(whole))
        L.main([*flags, "--eval_every", "3", "--out_dir", str(tmp_path / "again")])
    assert same_tensors(last(tmp_path / "again"), last(directory))
    update = core.Loop.update

    def interrupted(loop, *args, **kwargs):
        if loop.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return update(loop, *args, **kwargs)

    monkeypatch.setattr(core.Loop, "update", interrupted)
    with pytest.raises(core.Failure, match="interrupted at step 5") as failure:
        L.main([*flags, "--out_dir", str(tmp_path / "cut")])
    assert failure.value.code == 143
    monkeypatch.undo()
    result = L.main([*flags, "--out_dir", str(tmp_path / "cut"), "--resume", "auto"])
    assert same_tensors(last(tmp_path / "cut"), last(directory))
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == (directory / "log.jsonl").read_bytes()
    for key in ("curve", "text", "bits", "train_loss"):
        strip = [{k: v for k, v in r[key].items()} if isinstance(r[key], dict) else r[key] for r in (result, whole)]
        assert strip[0] == strip[1], key
    again = L.main([*flags, "--out_dir", str(tmp_path / "cut"), "--resume"])
    assert again == json.loads(json.dumps(result))


def test_a_second_readers_adapter_is_trained_on_a_code_that_stays(finished, unexamined, tmp_path):
    """Experiment 4: the sender and the first adapter of a finished run are frozen."""
    directory, _ = finished
    file = str(directory / "wire.pt")
    flags = ["--ckpt_in", file, "--freeze_encoder", "--freeze_llama_adapter", file, "--epochs", "1"]
    L.main([*RUN, *flags, "--out_dir", str(tmp_path / "r")])
    before, after = core.load_checkpoint(directory / "wire.pt"), core.load_checkpoint(tmp_path / "r" / "wire.pt")
    assert same_tensors(before["sender"], after["sender"])
    assert same_tensors(before["readers"]["llama"], after["readers"]["llama"])
    assert not same_tensors(before["readers"]["qwen"], after["readers"]["qwen"])


def test_a_checkpoint_is_evaluated_alone_as_it_was_at_its_end(finished, tmp_path):
    directory, result = finished
    flags = ["--epochs", "0", "--ckpt_in", str(directory / "wire.pt"), "--multi_ratio", "4,8", "--eval_bits", "4"]
    again = L.main([*RUN, *flags, "--out_dir", str(tmp_path / "r")])
    for key in ("readers", "joint", "cost"):
        assert again["curve"]["4"][key] == result["curve"]["4"][key]
    assert again["bits"] == result["bits"] and set(again["curve"]) == {"4", "8"}  # --ratio 4 leads
    assert len({(folder / "predictions.jsonl").read_text() for folder in (directory, tmp_path / "r")}) == 1


def test_two_directories_of_two_families_learn_on_a_file(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    flags = []
    for name, Config, Model, tokenizer, width in (
        ("llama", LlamaConfig, LlamaForCausalLM, core.train_tokenizer(core.synthetic_text("train")[:50], 300), 32),
        ("qwen", Qwen2Config, Qwen2ForCausalLM, core.train_tokenizer([]), 48),
    ):
        shape = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = Config(**shape, num_key_value_heads=2, vocab_size=len(tokenizer) + 8, bos_token_id=1, eos_token_id=2)
        core.init_normal(model := Model(config), 0, 0.3)  # so that what is read matters
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        flags += [f"--{name}_id", str(tmp_path / name)]
    real, file = ROOT.parent / "shared" / "data" / "squad" / "train.json", tmp_path / "squad.json"
    if real.exists():  # six passages of two of its articles
        content = json.loads(real.read_text())
        content["data"] = [article | {"paragraphs": article["paragraphs"][:6]} for article in content["data"][:2]]
    else:
        content = P.squad_file(core.question_rows(24, 0, "file", facts=3, questions=2))
    core.write_json(file, content)
    more = "--epochs 40 --samples 4 --max_length 60 --latent_len 8 --question_scope encoded --use_latent_refiner "
    more += "--lr 1e-2 --questions_per_context 1 --eval_every 999 --save_every 999 --eval_samples 2"
    result = L.main(["--test", *flags, "--train_file", str(file), *more.split(), "--out_dir", str(tmp_path / "run")])
    losses = [loss for _, loss, _ in result["train_loss"]]
    assert losses[-1] < 0.9 * losses[0]
    assert result["data"]["source"] == "file" and "answer_as_text" in result
    assert set(result["text"]["readers"]) == {"llama", "qwen"}


# ---------------------------------------------------------------------------------------------------------- the flags
def test_the_documents_sections_are_laid_out_flat(tmp_path):
    content = {
        "model": {"models": "llama", "llama_device_map": "auto"},
        "data": {"samples": 160, "epochs": 3, "max_answer_tokens": 24},
        "encoder": {"encoder_type": "byte", "d_z": 16, "train_encoder": True},
        "evaluation": {"samples": 5, "dataset": "squad", "out_dir": "x", "max_new_tokens": 7},
        "system": {"require_cuda": "yes"},
    }
    file = tmp_path / "base.json"
    file.write_text(json.dumps(content))
    args = L.parse(["--config", str(file)])
    assert (args.models, args.samples, args.epochs, args.d_z) == ("llama", 160, 3, 16)
    assert (args.eval_samples, args.max_new_tokens, args.out_dir, args.config) == (5, 7, "runs/latentwire", str(file))
    assert L.parse([f"--config={file}", "--samples", "9"]).samples == 9
    assert L.parse(["--test", "--config", str(file)]).samples == L.TEST["samples"]  # the smoke test's size wins
    file.write_text("d_z: 8\nunknown: 3\n")
    with pytest.raises(core.Failure, match="unknown"):
        L.parse(["--config", str(file)])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--models gpt", "--models"),
        ("--ratio 0.5", "at least 1"),
        ("--multi_ratio 4,2", "rising"),
        ("--multi_ratio 2,4 --ratio 3", "one of"),
        ("--bits 5", "bits"),
        ("--use_coprocessor --use_deep_prefix", "excludes"),
        ("--peft_prefix_all_layers no", "gave it up"),
        ("--init_llama_from_phase1", "--freeze_llama_adapter"),
        ("--sequential_eval False", "one after the other"),
        ("--reset_epoch", "--ckpt_in"),
        ("--epochs 0", "--ckpt_in"),
        ("--train_encoder False", "--freeze_encoder"),
        ("--facts 40", "2 to 32"),
        ("--fact_curriculum 2,4 --facts 8", "must end in"),
        ("--train_file x --eval_facts 8", "synthetic alone"),
        ("--encoder_type lm --encoder_use_chat_template", "byte"),
        ("--k_ce_weight -1", "negative"),
        ("--eval_bits 3", "16, 8, 6, 4"),
        ("--grad_diag_components kce,what", "grad_diag"),
        ("--batch_size 0", "at least 1"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    with pytest.raises(core.Failure, match=message) as failure:
        parsed(*flags.split())
    assert failure.value.code == 2 and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--warm_anchor_mode chat", "no chat template"),
        ("--encoder_use_chat_template", "no chat template"),
        ("--use_latent_adapters --latent_adapter_layers 5", "layers 0 to 1"),
        ("--ckpt_in /no/such", "No such file"),
        ("--llama_id /no/such", "no such directory"),
    ],
)
def test_bad_input_at_run_time_is_one_line_and_leaves_nothing(flags, message, tmp_path):
    with pytest.raises(core.Failure, match=message) as failure:
        L.main(["--test", *flags.split(), "--out_dir", str(tmp_path / "r")])
    assert failure.value.code == 2 and not list((tmp_path / "r").glob("*.json*"))


def test_a_checkpoint_of_another_shape_is_refused(finished, tmp_path):
    with pytest.raises(core.Failure, match="does not fit these flags"):
        L.main(["--test", "--ckpt_in", str(finished[0] / "wire.pt"), "--out_dir", str(tmp_path / "r")])


def test_gradient_norms_are_of_each_loss_and_change_nothing(unexamined, tmp_path):
    flags = ["--test", *LM, "--epochs", "1", "--k_ce_weight", "0.5", "--samples", "8", "--eval_samples", "2"]
    flags += ["--latent_align_weight", "0.5"]  # rewriting, in the first of the two updates
    names = "ce,kce,rewrite"
    L.main([*flags, "--grad_diag_interval", "1", "--grad_diag_components", names, "--out_dir", str(tmp_path / "a")])
    L.main([*flags, "--out_dir", str(tmp_path / "b")])
    rows = [json.loads(line) for line in (tmp_path / "a" / "diagnostics.jsonl").read_text().splitlines()]
    norms = [row for row in rows if row["type"] == "gradients"]
    assert len(norms) == 2 and all(row["grad_ce"] > 0 and row["grad_kce"] > 0 for row in norms)
    assert norms[0]["grad_rewrite"] > 0 and "grad_rewrite" not in norms[1]
    assert same_tensors(*(core.load_checkpoint(tmp_path / n / "wire.pt")["sender"] for n in "ab"))


def test_a_reader_that_reads_ahead_is_not_built_on(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "causality_audit", lambda *args, **kwargs: 1.0)
    with pytest.raises(core.Failure, match="reads the future") as failure:
        L.main(["--test", "--out_dir", str(tmp_path / "r")])
    assert failure.value.code == core.CHECK_FAILED and not list((tmp_path / "r").glob("*.json*"))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Half of the contexts in each: the same weights, curve and answers."""
    flags = ["--test", *LM, "--epochs", "1", "--samples", "16", "--eval_samples", "3", "--eval_batch_size", "1"]
    flags += ["--k_ce_weight", "0.5", "--eval_every", "99"]
    one = L.main([*flags, "--batch_size", "8", "--out_dir", str(tmp_path / "one")])
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    words += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(ROOT / "latentwire_train.py"), *flags]
    done = subprocess.run(
        [*words, "--batch_size", "4", "--out_dir", str(tmp_path / "two")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "wire_results.json").read_text())
    assert two["processes"] == 2 and two["tokens"] == one["tokens"]
    for (step, loss, _), (again, other, _) in zip(one["train_loss"], two["train_loss"], strict=True):
        assert step == again and loss == pytest.approx(other, rel=1e-5)
    states = [core.load_checkpoint(tmp_path / name / "wire.pt") for name in ("one", "two")]
    for name, p in states[0]["sender"].items():
        assert torch.allclose(p, states[1]["sender"][name], atol=1e-5), name
    said = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two")]
    assert said[0] == said[1]
