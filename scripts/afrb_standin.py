"""A frozen model for the needle task where no pretrained one can be had: trained on the task's own kind of tokens.

A language model of text is worse than a uniform guess on random tokens. This one is a small Llama trained on needle
items, with attention in every second update and without it in the others, so that in either state it knows at least
which tokens occur. It is refused unless it is better than a uniform guess over its entries in both states. With
attention it may learn to find the needle; the result file says how far.

    python scripts/afrb_standin.py --output_dir backbones/needles_s0                  tied tables
    python scripts/afrb_standin.py --untied --output_dir backbones/needles_untied_s0  two, as the 1.1B model has

Then --model backbones/needles_s0 in afrb_train.py.
"""

import dataclasses
import math
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import afrb_train as afrb
import core


@dataclasses.dataclass
class Args(core.RunArgs):
    output_dir: str = core.arg("backbones/needles", "model directory")
    untied: bool = core.arg(False, "an output table of its own")
    max_steps: int = core.arg(600, "updates, every second one without attention")
    batch_size: int = core.arg(8, "needle items of an update")
    lr: float = core.arg(1e-3, "learning rate, after 50 updates of warm-up")
    eval_items: int = core.arg(64, "held-out items")


TEST = dict(max_steps=4, batch_size=2, eval_items=4, device="cpu", threads=1)


def silence(module, args, output):
    """What --disable-attn does to an attention module, for one pass."""
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def loss_of(model, ids, attention: bool, last: int = 0):
    """Mean loss in nats of the last `last` tokens of `ids` [B, T], 0: of all; and the share of rows all right there."""
    layers = [model.base_model.get_submodule(name) for name in afrb.attention_names(model)]
    hooks = [] if attention else [layer.register_forward_hook(silence) for layer in layers]
    logits = model(ids, use_cache=False).logits[:, -last - 1 if last else 0 : -1].float()
    for hook in hooks:
        hook.remove()
    target = ids[:, -last:] if last else ids[:, 1:]
    right = (logits.argmax(-1) == target).all(1).double().mean()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten()), float(right)


def main(argv=None) -> dict:
    args = core.parse_args(Args, TEST, argv, __doc__)
    core.require_positive(args, "max_steps batch_size eval_items")
    folder = Path(args.output_dir)
    result = folder / "backbone_results.json"
    core.require(not result.exists() or args.overwrite, f"{folder}: finished already; --overwrite makes it anew")
    accelerator = core.engine(args)
    task = afrb.parse(["--task", "needle", "--needle-query", "--model", "tiny"])
    config = afrb.llama_config(
        128, 256, 3, 4, 2, 512, max_position_embeddings=1024, tie_word_embeddings=not args.untied
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    core.init_normal(model, args.seed)
    model.to(accelerator.device)
    items = {
        name: afrb.Needles(task, afrb.token_ids(task, 512, 2), f"standin {name}", args.seed)
        for name in ("train", "test")
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    for step in range(args.max_steps):
        rows = [items["train"][i][0] for i in range(step * args.batch_size, (step + 1) * args.batch_size)]
        ids = torch.stack([torch.from_numpy(row) for row in rows]).to(accelerator.device)  # B T
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 50)
        optimizer.zero_grad()
        loss, _ = loss_of(model, ids, attention=step % 2 == 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(
                f"update {step}: {float(loss.detach()):.4f} nats, attention {'on' if step % 2 == 0 else 'off'}",
                flush=True,
            )
    ids = afrb.draw(items["test"], args.eval_items)[0].to(accelerator.device)
    figures = types.SimpleNamespace(uniform=math.log(512))
    with torch.no_grad():
        model.eval()
        for attention in ("on", "off"):
            loss, exact = loss_of(model, ids, attention == "on", task.needle_len)
            setattr(figures, f"needle_loss_{attention}", float(loss))
            setattr(figures, f"needle_hit_rate_{attention}", exact)
    worse = max(figures.needle_loss_on, figures.needle_loss_off)
    said = f"{folder}: {worse:.3f} nats on needles, a uniform guess {figures.uniform:.3f}: raise --max_steps"
    core.require(worse < figures.uniform or args.test, said, core.CHECK_FAILED)
    model.save_pretrained(folder)
    core.load_tokenizer("byte").save_pretrained(folder)
    figures = vars(figures) | {"config": vars(args), "environment": core.environment()}
    core.write_json(result, figures)
    print({k: v for k, v in figures.items() if isinstance(v, float)})
    return figures


if __name__ == "__main__":
    core.cli(main)
