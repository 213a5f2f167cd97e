"""Two processes equal one with twice the micro-batch, under DDP and under FSDP, and resume as if never stopped.

All two-process runs of a test session share one launch of two processes, which is this file run as a program: starting
Python and its libraries twice takes longer than the runs.
"""

import functools
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import traceback

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, same_tensors
from transformers import LlamaConfig, LlamaForCausalLM

import core

# script: (flags, its batch flag, its directory flag, its curves in log.jsonl). Dropout and every sum over a batch that
# is no mean over tokens are off: see docs/scaling.md
RUNS = {
    "phase_a": (
        "phase_a_validation",
        "--no_baseline --dropout 0 --d_model 32 --max_steps 12 --log_interval 4 "
        "--eval_interval 6 --save_interval 12 --eval_batches 0",
        "--batch_size",
        "--output_dir",
        ("train_loss", "val_loss", "grad_norm"),
    ),
    "phase_b": (
        "phase_b_8b_adapters",
        "--model_path tiny --no_eval --max_steps 6 --log_interval 2 --eval_interval 3 --save_interval 6",
        "--batch_size",
        "--output_dir",
        ("train_loss", "val_loss", "grad_norm"),
    ),
    "backbone_lm": (
        "pretrain_backbone",
        "--kind lm --max_steps 6 --log_interval 2 --eval_interval 3 --save_interval 6",
        "--batch_size",
        "--output_dir",
        ("train_loss", "val_loss"),
    ),
    "backbone_reader": (
        "pretrain_backbone",
        "--kind reader --max_steps 6 --log_interval 2 --eval_interval 6 --eval_items 4 --save_interval 6",
        "--batch_size",
        "--output_dir",
        ("train_loss", "em"),
    ),
    "afrb": (
        "afrb_train",
        "--task language --enable-pvm --steps 6 --log-every 2 --val-every 3 --no-controls",
        "--bs",
        "--save",
        ("train_loss", "val_loss", "grad_norm"),
    ),
    "latentwire": (
        "latentwire_stage1",
        "--mode phase1b --samples 48 --epochs 1 --eval_samples 6 --adapter_dropout 0 "
        "--quick_eval_every 99 --lambda_kce 0.5 --lambda_kd 0.5",
        "--batch_size",
        "--save_dir",
        ("loss", "recon_cosine_sim", "loss_kce", "loss_kd", "f1"),
    ),
    "cognate": (
        "train_phase1_cognate",
        "--model reasoning --synth-rows 12 --epochs 1 --dropout 0 --ltm-carry none --act-loss-weight 0 --log-every 2",
        "--batch-size",
        "--checkpoint-dir",
        ("train/loss", "train/gradient_norm", "val/loss"),
    ),
    "hst": (
        "hst_train",
        "--variant v6 --mode token --dropout 0 --max_steps 6 --log_every 2 --eval_every 3 "
        "--save_every 6 --eval_rows 5 --self_check no --optim adamw",
        "--batch_size",
        "--save_dir",
        ("loss", "lm_loss", "horizon_loss", "val_loss", "grad_norm"),
    ),
}
FSDP = [name for name in RUNS if name != "cognate"]
# so that a run that dies has a checkpoint behind it (Cognate saves after its only epoch: it begins again), and the
# checkpoints that it leaves at its end
SAVES = {
    "phase_a": ("--save_interval 2", "cf_hot_step_12.pt"),
    "phase_b": ("--save_interval 2", "cf_adapter_step_6.pt"),
    "backbone_lm": ("--save_interval 2", "backbone_step_6.pt"),
    "backbone_reader": ("--save_interval 2", "backbone_step_6.pt"),
    "afrb": ("", "checkpoint_last.pt"),
    "latentwire": ("--save_every 2", "last.pt"),
    "cognate": ("", "last.pt"),
    "hst": ("--save_every 2", "ckpt_step_6.pt"),
}
STOP = 3  # updates; the next log line then spans the stop


def words(name: str, batch: int, directory, *more) -> list[str]:
    _, flags, batch_flag, directory_flag, _ = RUNS[name]
    return ["--test", *flags.split(), batch_flag, str(batch), directory_flag, str(directory), *more]


def curves(name: str, directory) -> list[tuple]:
    """(name, value) of every figure of the curves, in the order in which they were logged."""
    keys, (path,) = RUNS[name][4], directory.rglob("log.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(k, row[k]) for row in rows for k in keys if row.get(k) is not None]
    assert {k for k, _ in found} == set(keys), (set(keys) - {k for k, _ in found}, rows[:2])
    return found


def launch(jobs: list[dict], folder) -> None:
    """Run all `jobs` in one launch of two processes; a job that failed has left the reason in FOLDER/errors.json."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        __file__,
        str(folder),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def run_jobs(folder: str) -> None:
    """In each of the two processes: one job after the other. `stop`: the update in which `signum` comes; 9 is a death
    that leaves the files as they are."""
    from accelerate import Accelerator

    Accelerator.end_training = lambda self: None  # it would close the connection that the next job needs
    real, cut, errors, shares = core.Run.stop_requested, core._cut, {}, {}

    def measured_cut(modules, *rest):  # what share of the weights that FSDP has got is held by this process?
        cut(modules, *rest)
        weights = [p for m in modules for p in m.parameters() if hasattr(p, "to_local")]
        shares[name] = sum(p.to_local().numel() for p in weights) / sum(p.numel() for p in weights)

    core._cut = measured_cut
    with open(f"{folder}/jobs.json") as f:
        jobs = json.load(f)
    for job in jobs:
        os.environ |= {"ACCELERATE_USE_FSDP": str(job["fsdp"]).lower(), "FSDP_VERSION": job.get("version", "2")}
        calls, name, number = [], job["name"], job.get("signum", 15)

        def stop_requested(run, calls=calls, at=job["stop"], signum=number):
            calls.append(0)
            if signum == 9 and len(calls) == at:
                raise RuntimeError("killed")
            return signum * (len(calls) == at)

        core.Run.stop_requested = stop_requested if job["stop"] else real
        torch.manual_seed(0)  # as in a process of its own: a script that draws nothing from this generator leaves it
        try:
            importlib.import_module(job["script"]).main(job["flags"])
        except Exception as error:
            errors[job["name"]] = [getattr(error, "code", None), str(error) or repr(error)]
            if not isinstance(error, core.Failure) and str(error) != "killed":
                traceback.print_exc()
        print("done", job["name"], flush=True)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    name = "update"
    core.Run.stop_requested = real
    skipped = non_finite_update(folder)
    if os.environ["RANK"] == "0":
        for file, content in (("errors", errors), ("shares", shares), ("update", skipped)):
            with open(f"{folder}/{file}.json", "w") as f:
                json.dump(content, f)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # several jobs in one process leave threads behind, on which the interpreter's end sometimes aborts


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = torch.nn.Linear(6, 5), torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * self.inner(x)


def non_finite_update(folder: str) -> dict:
    """What a gradient that is NaN in one process alone does to a sharded model, and a good one after it."""
    args, outcome = core.RunArgs(device="cpu"), {}
    accelerator = core.engine(args)
    model = Scaled()
    core.init_normal(model, 0)
    core.shard(model, accelerator, [model.inner])
    optimizer = torch.optim.AdamW(core.decay_groups(model, 0.1), lr=0.1, fused=True)
    model, optimizer = core.prepare(model, optimizer, accelerator)
    with core.Run(args, f"{folder}/update", accelerator, "result.json") as run:
        run.start()
        loop = core.Loop(run, model, optimizer, 3)
        for what, value in (("first", 1.0), ("nan", math.nan), ("last", 1.0)):
            before = core.full_state(model)
            value = value if accelerator.is_main_process else 1.0
            loop.backward(model(torch.full((2, 6), value)).sum())
            norm = loop.update()
            after = core.full_state(model)
            if accelerator.is_main_process:
                changed = not torch.equal(before["inner.weight"], after["inner.weight"])
                outcome[what] = loop.skipped.tolist(), bool(torch.isfinite(norm)), changed, list(after["scale"].shape)
    return outcome


def job(name: str, folder, kind: str, fsdp: bool, stop: int = 0, more: tuple = (), **changes) -> dict:
    flags = words(name, 2, folder / kind / name, *more)
    return {"name": f"{kind} {name}", "script": RUNS[name][0], "flags": flags, "fsdp": fsdp, "stop": stop} | changes


def check(name: str, folder, kind: str, expected: list[tuple], rel: float = 1e-4) -> None:
    errors, shares = (json.loads((folder / f"{what}.json").read_text()) for what in ("errors", "shares"))
    assert f"{kind} {name}" not in errors, errors[f"{kind} {name}"]
    if kind in ("ddp", "fsdp"):
        assert 0.4 < shares[f"fsdp {name}"] < 0.6 if kind == "fsdp" else f"ddp {name}" not in shares
    found = curves(name, folder / kind / name)
    assert [k for k, _ in found] == [k for k, _ in expected] and len(found) >= 4
    for (k, x), (_, y) in zip(found, expected):
        assert x == pytest.approx(y, rel=rel, abs=1e-6), (kind, name, k)


def alone(name: str, folder) -> list[tuple]:
    """The curves of one process with twice the micro-batch."""
    importlib.import_module(RUNS[name][0]).main(words(name, 4, folder / "one" / name))
    return curves(name, folder / "one" / name)


def test_phase_a_under_ddp_and_fsdp(tmp_path):
    """The fast one: the same curves, and a checkpoint of the same form, whatever wrote it."""
    launch([job("phase_a", tmp_path, "ddp", False), job("phase_a", tmp_path, "fsdp", True)], tmp_path)
    one = alone("phase_a", tmp_path)
    for kind in ("ddp", "fsdp"):
        check("phase_a", tmp_path, kind, one)
    files = [core.load_checkpoint(tmp_path / kind / "phase_a" / "cf_hot_step_12.pt") for kind in ("one", "ddp", "fsdp")]
    for part in ("model_state_dict", "optimizer_state_dict"):
        a, b, c = (shapes(f[part]) for f in files)
        assert same_tensors(a, b) and same_tensors(a, c), part
    for x, y in zip(files[0]["model_state_dict"].values(), files[2]["model_state_dict"].values()):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-4)
    update = json.loads((tmp_path / "update.json").read_text())
    assert update == {
        "first": [[0, 0], True, True, []],
        "nan": [[1, 1], False, False, []],
        "last": [[1, 0], True, True, []],
    }


def shapes(state):
    """A nested state with each tensor's shape and type in its place; [1] and [] are one (see `core.shard`)."""
    if isinstance(state, dict):
        return {k: shapes(v) for k, v in state.items()}
    return (state.shape if state.numel() > 1 else (), str(state.dtype)) if isinstance(state, torch.Tensor) else 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every two-process run: whole and stopped, DDP and FSDP; a run stopped under the one goes on under the other."""
    folder = tmp_path_factory.mktemp("scaling")
    jobs = []
    for name in RUNS:
        kinds = [("ddp", False), ("fsdp", True)] if name in FSDP else [("ddp", False)]
        for kind, fsdp in kinds:
            jobs.append(job(name, folder, kind, fsdp))
            signum = 2 if fsdp else 15
            cut = job(name, folder, f"{kind}_cut", fsdp, stop=STOP, signum=signum)
            jobs.append(cut | {"name": f"stopped {kind} {name}"})
            other = not fsdp and name in FSDP
            jobs.append(job(name, folder, f"{kind}_cut", other, more=("--resume", "auto")))
        saving = SAVES[name][0].split()
        dead = job(name, folder, "ddp_dead", False, stop=5, signum=9, more=tuple(saving))
        jobs.append(dead | {"name": f"dead {name}"})
        jobs.append(job(name, folder, "ddp_dead", False, more=(*saving, "--resume", "auto")))
    jobs.append(job("cognate", folder, "refused", True))
    jobs.append(job("phase_a", folder, "version1", True, version="1"))
    launch(jobs, folder)
    return folder


@pytest.fixture(scope="module")
def one(folder):
    return functools.cache(lambda name: alone(name, folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_ddp_equals_one_process_with_twice_the_batch(name, folder, one):
    check(name, folder, "ddp", one(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FSDP)
def test_fsdp_equals_one_process_with_twice_the_batch(name, folder, one):
    check(name, folder, "fsdp", one(name))


@pytest.mark.slow
@pytest.mark.parametrize("kind, name", [*(("ddp", n) for n in RUNS), *(("fsdp", n) for n in FSDP)])
def test_a_stopped_run_of_two_processes_goes_on_as_if_it_had_not_stopped(kind, name, folder):
    """Also from DDP to FSDP and back; the log line across the stop counts what every process saw before it."""
    errors = json.loads((folder / "errors.json").read_text())
    assert errors[f"stopped {kind} {name}"][0] == 128 + (2 if kind == "fsdp" else 15), errors
    check(name, folder, f"{kind}_cut", curves(name, folder / kind / name), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_processes_that_died_ends_bit_for_bit_as_if_it_had_not(name, folder):
    errors = json.loads((folder / "errors.json").read_text())
    assert errors[f"dead {name}"] == [None, "killed"] and f"ddp_dead {name}" not in errors, errors
    assert curves(name, folder / "ddp_dead" / name) == curves(name, folder / "ddp" / name)
    ends = [core.load_checkpoint(next((folder / k / name).rglob(SAVES[name][1]))) for k in ("ddp", "ddp_dead")]
    keys = [
        k for k in ends[0] if "state_dict" in k or k in ("model", "adapter", "trainable", "afrb_adapters", "rng_state")
    ]
    assert len(keys) >= 3  # weights, optimizer, random numbers
    for key in keys:
        assert same_tensors(ends[0][key], ends[1][key]), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, steps",
    [
        ("phase_a", "--max_steps"),
        ("phase_b", "--max_steps"),
        ("afrb", "--steps"),
        ("backbone_lm", "--max_steps"),
        ("cognate", "--epochs"),
    ],
)
def test_another_number_of_processes_is_refused(name, steps, folder):
    more = [steps, "20", "--resume", "auto"]
    with pytest.raises(core.Failure, match="the run had 2 processes"):
        importlib.import_module(RUNS[name][0]).main(words(name, 2, folder / "ddp" / name, *more))


@pytest.mark.slow
def test_what_fsdp_cannot_do_is_refused(folder):
    errors = json.loads((folder / "errors.json").read_text())
    for name, said in (
        ("refused cognate", "Muon"),
        ("version1 phase_a", "--fsdp_version 2"),
    ):
        code, line = errors[name]
        assert code == core.BAD_INPUT and said in line and "\n" not in line


# ------------------------------------------------------------------------------------------------------------ the page
def test_the_launch_commands_say_what_the_scripts_ask_for():
    lines = [x for x in (ROOT / "docs" / "scaling.md").read_text().splitlines() if x.startswith("accelerate launch")]
    assert len(lines) >= 8
    for line in lines:
        args = launch_command_parser().parse_args(shlex.split(line)[2:])
        assert args.use_fsdp != args.multi_gpu and args.num_processes > 1, line
        assert not args.use_fsdp or args.fsdp_version == "2", line


LLAMAS = {  # layers, width, FFN, heads, key-value heads, vocabulary, whether the head is the embedding table
    "1B": (16, 2048, 8192, 32, 8, 128256, True),
    "8B": (32, 4096, 14336, 32, 8, 128256, False),
    "13B": (40, 5120, 13824, 40, 40, 32000, False),
}


def memory_table() -> list[str]:
    """The rows of docs/scaling.md, in GB (1e9 bytes), from models on the meta device: see there for the formulas."""
    import afrb_train
    import latentwire_stage1
    import phase_b_8b_adapters

    rows = []
    for name, (layers, width, ffn, heads, kv, vocab, tied) in LLAMAS.items():
        config = LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            intermediate_size=ffn,
            vocab_size=vocab,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            tie_word_embeddings=tied,
        )
        for script in ("phase B", "AFRB", "LatentWire"):
            with torch.device("meta"):
                base = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
                total = sum(p.numel() for p in base.parameters())
                cut = sum(p.numel() for p in base.model.layers.parameters())
                linear = sum(p.numel() for p in base.model.layers.parameters() if p.ndim == 2)
                if script == "phase B":
                    args = phase_b_8b_adapters.parse(["--model_path", name])
                    trained, tokens = phase_b_8b_adapters.wrap(base, args).cf_adapters, args.batch_size * args.seq_len
                elif script == "AFRB":
                    args = afrb_train.parse(["--n-afrb", "1", "--enable-pvm"])
                    trained = afrb_train.build_model(args, base)
                    tokens = args.bs * (args.ctx_chunks * args.ctx_chunk_len + 1 + args.needle_len)
                else:
                    args = latentwire_stage1.parse(["--mode", "phase1b"])
                    sizes = (args.compress_dim, width, args.adapter_hidden_mult, args.adapter_dropout, args.colorize)
                    trained, tokens = latentwire_stage1.Adapter(*sizes), args.batch_size * args.max_length
            count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
            activations = core.memory_estimate(torch.nn.Identity(), tokens, width, layers, True)["activations"]
            again = (2 * layers + 34) * tokens * width / 1e9
            scales = 4 / 64 if script == "LatentWire" else 1 / 64 + 4 / (64 * 256)  # once, or quantised themselves
            half, nf4 = 2 * total / 1e9, (linear * (0.5 + scales) + 2 * (total - linear)) / 1e9
            sharded, training = (2 * cut / 8 + 2 * (total - cut)) / 1e9, 16 * count / 1e9
            four = "none" if script == "AFRB" else f"{nf4:.1f}"
            least = sharded if script == "AFRB" else nf4
            rows.append(
                f"| {name} | {script} | {total:,} | {count:,} | {half:.1f} | {four} | {sharded:.1f} | "
                f"{training:.2f} | {tokens:,} | {activations:.1f} | {again:.1f} | "
                f"{half + training + activations:.1f} | {least + training + again:.1f} |"
            )
    return rows


def test_the_memory_table_is_what_the_models_give():
    page = (ROOT / "docs" / "scaling.md").read_text()
    rows = memory_table()
    print("\n".join(rows))
    assert [line for line in page.splitlines() if re.match(r"\| \d+B \|", line)] == rows


if __name__ == "__main__":
    run_jobs(sys.argv[1])
