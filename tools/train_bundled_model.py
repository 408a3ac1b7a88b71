"""Train the small Python-writing language model that ships in ``models/python-7m``.

Everything starts from the text that a Python installation carries: the standard library's source
files and ``pydoc`` help topics, minus the held-out part fixed in ``quern.evaluation.heldout``.  From
it the script trains a byte-level BPE tokenizer and a Qwen2-shaped model of 7.3 million parameters, or another of ``SHAPES``.

    python tools/train_bundled_model.py               # train (or carry on), then export
    python tools/train_bundled_model.py --export      # write the latest checkpoint to the model folder
    python tools/train_bundled_model.py --choices     # write the minimal-pair choice set
    python tools/train_bundled_model.py --evaluate    # held-out bits per byte, against gzip and xz
    python tools/train_bundled_model.py --name python-12m --out FOLDER    # another shape; not bundled

A run is a function of the seed, the Python version that supplies the text, and the numerics of the
machine.  What step N reads depends on N alone, so a run that was stopped takes up its newest checkpoint
and ends where an uninterrupted one would.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bundled_model_choices import choice_pairs
from bundled_model_text import END, ROOT, TOKENS_PER_STEP, VOCABULARY, heldout, prepare
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quern.core.machine.products import multiplies_half

SHORT, LONG = 512, 2048  # sequence lengths of the first part of the training and of the last
LONG_SHARE = 0.1  # share of the steps taken at the long length, so that the stated window is a trained one
PEAK_RATE, FLOOR_RATE, WARMUP = 2e-3, 1e-4, 150
SHAPES: dict[str, dict[str, Any]] = {
    "python-7m": {
        "model_type": "qwen2",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "python-12m": {
        "model_type": "qwen2",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "python-8m-routed": {
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "intermediate_size": 512,  # of no block: all are routed
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
}
"""The input width of every linear layer is a multiple of 256, of the routed model's of 128."""
BALANCE = 0.01
"""What the unevenness of routing counts beside the loss, so that every expert learns (Fedus et al., arXiv 2101.03961)."""


# --- training --------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to the floor."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return FLOOR_RATE + (PEAK_RATE - FLOOR_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def new_model(name: str, seed: int) -> Any:
    """Return the untrained model of one of ``SHAPES``."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        **SHAPES[name],
        vocab_size=VOCABULARY,
        max_position_embeddings=LONG,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def batch_loss(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean nats per token, and of a routed model what balances its experts."""
    if not getattr(model.config, "num_experts", 0):
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    made = model(input_ids=inputs, use_cache=False, output_router_logits=True)
    return F.cross_entropy(made.logits.float().flatten(0, 1), targets.flatten()) + BALANCE * made.aux_loss


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that the name never points at half a file."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def train(options: argparse.Namespace) -> None:
    """Train from the newest checkpoint, if there is one, to the last step."""
    work, device, steps = options.work, torch.device(options.device), options.steps
    stream, digest = prepare(work, options.seed)
    model = new_model(options.name, options.seed).to(device)
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    recipe = {"name": options.name, "text": digest, "seed": options.seed, "python": sys.version.split()[0]}
    loss_of = torch.compile(batch_loss, dynamic=False) if options.compile else batch_loss
    fast_halves = device.type != "cpu" or multiplies_half()
    checkpoint, step, seconds = work / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["recipe"] != recipe:
            raise SystemExit(f"{checkpoint} belongs to another run, {state['recipe']}: choose another --work")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        step, seconds = state["step"], state["seconds"]
        print(f"carrying on from {checkpoint}", flush=True)

    def keep() -> None:
        state = {"recipe": recipe, "step": step, "seconds": seconds, "rng": torch.get_rng_state()}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_atomically(state, checkpoint)

    epochs = steps * TOKENS_PER_STEP / stream.epoch_tokens
    print(f"step {step} of {steps}, {epochs:.2f} epochs in all", flush=True)
    model.train()
    kept_at, told_at, first, start = time.monotonic(), time.monotonic(), step, time.monotonic()
    smooth = math.nan
    last = min(steps, options.stop_at or steps)
    while step < last:
        began = time.monotonic()
        length = LONG if step >= steps * (1 - LONG_SHARE) else SHORT
        inputs, targets = (part.to(device) for part in stream.read(step, length))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_halves):
            loss = loss_of(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        value = loss.item()
        smooth = value if math.isnan(smooth) else 0.95 * smooth + 0.05 * value
        now = time.monotonic()
        seconds += now - began
        if now - told_at > 10 or step == last:
            pace = (now - start) / (step - first)
            print(
                f"step {step}/{steps}  loss {smooth:.4f}  {TOKENS_PER_STEP / pace:.0f} tokens/s  "
                f"{(steps - step) * pace / 60:.1f} min left",
                flush=True,
            )
            told_at = now
        if now - kept_at > 120 or step == last:
            keep()
            kept_at = now


def export(name: str, work: Path, out: Path) -> None:
    """Write the newest checkpoint as a Hugging Face model folder with bf16 weights."""
    state = torch.load(work / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = new_model(name, 0)
    model.load_state_dict(state["model"])
    fresh = work / "export"  # written here first, so that the model folder never holds half a file
    model.to(torch.bfloat16).save_pretrained(fresh)
    shutil.copyfile(work / "tokenizer.json", fresh / "tokenizer.json")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": END,
        "pad_token": END,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": LONG,
    }
    (fresh / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(fresh.iterdir()):
        file.chmod(0o644)
        shutil.copyfile(file, out / f".{file.name}.part")
        os.replace(out / f".{file.name}.part", out / file.name)
    print(f"exported step {state['step']} ({state['seconds'] / 60:.1f} min of training) to {out}", flush=True)


# --- measuring -------------------------------------------------------------------------------------


@torch.inference_mode()
def negative_log_likelihood(model: Any, ids: list[int], context: int = 1024, stride: int = 512) -> float:
    """Return the nats of one document: every token once, with at least ``context - stride`` before it."""
    tokens = torch.tensor([model.config.eos_token_id, *ids], device=model.device)
    nats, scored = 0.0, 1
    while scored < len(tokens):
        end = min(len(tokens), context + 1 if scored == 1 else scored + stride)
        window = tokens[max(0, end - context - 1) : end]
        losses = F.cross_entropy(model(window[None, :-1]).logits[0].float(), window[1:], reduction="none")
        nats += losses[scored - end :].double().sum().item()
        scored = end
    return nats


def evaluate(out: Path, device: str) -> None:
    """Print the held-out bits per byte of the exported model and of two compressors, and the choices."""
    encode = AutoTokenizer.from_pretrained(out).backend_tokenizer.encode
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(device).eval()
    documents = heldout.held_out_text()
    code = [text for name, text in documents if ":" not in name]
    prose = [text for name, text in documents if ":" in name]
    for title, texts in (("modules", code), ("help topics", prose), ("all held-out text", code + prose)):
        data = "".join(texts).encode()
        nats = sum(negative_log_likelihood(model, encode(text).ids) for text in texts)
        zipped, xz = gzip.compress(data, 9), lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
        print(
            f"{title}, {len(data)} bytes, bits per byte: model {nats / math.log(2) / len(data):.3f}  "
            f"gzip -9 {8 * len(zipped) / len(data):.3f}  xz -9e {8 * len(xz) / len(data):.3f}",
            flush=True,
        )
    if (out / "choice.jsonl").exists():
        pairs = [json.loads(line) for line in (out / "choice.jsonl").read_text(encoding="utf-8").splitlines()]
        tally: dict[str, list[bool]] = {}
        for pair in pairs:
            good, bad = (encode(pair[key]).ids for key in ("sentence_good", "sentence_bad"))
            right = negative_log_likelihood(model, good) < negative_log_likelihood(model, bad)
            tally.setdefault(pair["UID"], []).append(right)
        for kind, outcomes in sorted(tally.items()):
            print(f"choices, {kind}: {sum(outcomes)} of {len(outcomes)}")
        total = sum(sum(outcomes) for outcomes in tally.values())
        print(f"choices, all: {total} of {len(pairs)} ({100 * total / len(pairs):.1f} %)")


def main() -> None:
    """Read the command line and do what it asks."""
    parser = argparse.ArgumentParser(description="Train, export or measure the bundled model.")
    parser.add_argument("--name", choices=SHAPES, default="python-7m", help="which shape")
    parser.add_argument("--work", type=Path, help="checkpoints (default: build/train-NAME)")
    parser.add_argument("--out", type=Path, help="the model folder (default: models/python-7m; of others build/NAME)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=1500, help="length of the schedule; may be changed")
    parser.add_argument("--stop-at", type=int, help="stop after this step; a later run carries on from there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the model first: a fifth faster")
    parser.add_argument("--export", action="store_true", help="only write the newest checkpoint to --out")
    parser.add_argument("--choices", action="store_true", help="only write the minimal pairs to --out")
    parser.add_argument("--evaluate", action="store_true", help="only measure the model in --out")
    options = parser.parse_args()
    options.work = options.work or ROOT / "build" / f"train-{options.name}"
    options.out = options.out or ROOT / ("models" if options.name == "python-7m" else "build") / options.name
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.export or options.choices or options.evaluate):
        train(options)
        options.export = True
    if options.export:
        export(options.name, options.work, options.out)
    if options.choices:
        pairs = choice_pairs(options.seed)
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (options.out / "choice.jsonl").write_text(lines, encoding="utf-8")
        print(f"wrote {len(pairs)} pairs to {options.out / 'choice.jsonl'}")
    if options.evaluate:
        evaluate(options.out, options.device)


if __name__ == "__main__":
    # glibc hands large blocks back to the kernel and faults them in again at every step, which halves
    # the speed on a CPU; it reads these settings only when a process starts, so start over with them.
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        tuned = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **tuned})
    main()
