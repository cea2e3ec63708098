"""Makes the golden files again: `python -m tests.golden.make`. Do so, and say why, when a change is meant to move the curve.

    text.txt       paragraphs of prose and of Python by a small grammar and a fixed seed; `compose` is all there is to it
    losses.json    the curve of `RECIPE` over it by `largeformer pretrain`, on one process with one thread, and how it was made

The curve was made once, on x86-64; what another processor rounds differently stays below the 1e-4 that the test allows.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from largeformer.config.schema import Recipe
from tests.distributed import RankContext, RankPool

FOLDER = Path(__file__).parent
TEXT, LOSSES = FOLDER / "text.txt", FOLDER / "losses.json"
TEXT_BYTES = 48_000

# Dropout is off: its draws differ between processors, those of the weights do not.
RECIPE: dict[str, Any] = {
    "run": {"name": "golden", "seed": 1234},
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 64,
        "make_vocab_size_divisible_by": 8,
    },
    "tokenizer": {"vocab_size": 500},
    "data": {"split": "50,50,0"},
    "train": {
        "precision": "fp32",
        "micro_batch_size": 4,
        "global_batch_size": 16,
        "train_iters": 20,
        "eval_interval": 10,
        "eval_iters": 2,
        "loss_chunk_size": 100,
    },
    "optimizer": {"lr": 1.0e-2, "min_lr": 1.0e-3, "lr_warmup_iters": 4},
    "deepspeed": "ds_configs/zero1.json",
    "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False},
}

SUBJECTS = ["the ferry", "a lighthouse keeper", "the night train", "her neighbour", "a small harbour", "the old pump", "the baker's cat"]
VERBS = ["waits for", "remembers", "carries", "repairs", "forgets", "measures", "paints", "answers"]
OBJECTS = ["the morning mail", "a broken clock", "seven crates of salt", "the tide table", "an empty boat", "yesterday's bread", "the bell"]
PLACES = ["behind the mill", "near the quay", "under the bridge", "at the last stop", "in the garden", "by the window"]
TIMES = ["before sunrise", "on a quiet Monday", "when the rain stops", "twice a year", "after supper", "without a word"]
NOUNS = ["total", "depth", "weight", "signal", "width", "price", "level", "index"]
ACTIONS = ["scale", "clip", "shift", "count", "merge", "round", "check"]


def compose(size: int = TEXT_BYTES, seed: int = 7) -> str:
    """Paragraphs of prose and functions in turn, `size` bytes of ASCII."""
    draw = random.Random(seed)
    text = ""
    while len(text) < size:
        text += (_prose(draw) if draw.random() < 0.6 else _function(draw)) + "\n\n"
    return text[: size - 1] + "\n"


def _prose(draw: random.Random) -> str:
    return " ".join(_sentence(draw) for _ in range(draw.randint(2, 5)))


def _sentence(draw: random.Random) -> str:
    parts = [draw.choice(SUBJECTS), draw.choice(VERBS), draw.choice(OBJECTS)]
    if draw.random() < 0.6:
        parts.append(draw.choice(PLACES))
    if draw.random() < 0.4:
        parts = [draw.choice(TIMES) + ",", *parts]
    sentence = " ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def _function(draw: random.Random) -> str:
    action, noun, other = draw.choice(ACTIONS), *draw.sample(NOUNS, 2)
    limit = draw.randint(2, 99)
    lines = [f"def {action}_{noun}({noun}, {other}={limit}):"]
    if draw.random() < 0.5:
        lines += [f"    if {noun} > {other}:", f"        return {other}"]
    if draw.random() < 0.5:
        lines += [f"    for step in range({limit}):", f"        {noun} = {noun} + step * {other}"]
    return "\n".join([*lines, f"    return {noun} - {other}"])


def curve(ranks: RankContext, output_dir: Path) -> dict[str, Any]:
    """Trains `RECIPE` on a pool's rank, from text to checkpoint. Returns the losses by step, as `metrics.jsonl` has them."""
    from largeformer.stages import pretrain

    given = {
        **RECIPE,
        "run": {**RECIPE["run"], "output_dir": str(output_dir)},
        "data": {**RECIPE["data"], "sources": [{"path": str(TEXT)}]},
    }
    pretrain.run(Recipe.model_validate(given))
    rows = [json.loads(line) for line in (output_dir / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss": [row["loss"] for row in rows if "loss" in row],
        "val_loss": {str(row["step"]): row["val_loss"] for row in rows if "val_loss" in row},
    }


def main() -> None:
    import torch

    TEXT.write_text(compose())
    with RankPool(1) as pool, tempfile.TemporaryDirectory() as folder:
        measured = pool.run(curve, Path(folder))[0]
    made = {"by": "python -m tests.golden.make", "torch": torch.__version__, "machine": torch.backends.cpu.get_cpu_capability()}
    LOSSES.write_text(json.dumps({"made": made, **measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
