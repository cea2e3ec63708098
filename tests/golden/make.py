"""The golden curve: `python -m tests.golden.make` trains it anew and writes losses.json, after a change that means to move it.

20 steps of a 4-layer Llama of width 64 on text.txt, in float32 on one thread, through prepare, loader and engine (ZeRO 0).
text.txt is 40 kB of sentences made by the rule below: committed, so that the curve does not hang on Python's random numbers.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

from largeformer.config.schema import Recipe
from tests.recipes import tiny_recipe

FOLDER = Path(__file__).parent
TEXT, LOSSES = FOLDER / "text.txt", FOLDER / "losses.json"
STEPS = 20

WHO = [
    "the old pilot",
    "a clerk of the harbour",
    "the youngest deckhand",
    "nobody on the pier",
    "the keeper's daughter",
    "a stranger in oilskins",
]
DID = ["counted", "mended", "forgot", "carried home", "drew on the wall", "sold at dusk", "wrote down", "hid under the stairs"]
WHAT = ["seven coils of rope", "the tide tables", "a lamp without oil", "two charts of the sound", "the bell", "letters from the north"]
WHY = [
    "because the fog had come",
    "while it rained",
    "before the ferry left",
    "as every winter",
    "though no one asked",
    "and said nothing of it",
]


def recipe(output_dir: str) -> Recipe:
    return tiny_recipe(
        run={"output_dir": output_dir, "seed": 77},
        tokenizer={"vocab_size": 400},
        data={"sources": [{"path": str(TEXT)}], "split": "50,50,0"},
        train={"micro_batch_size": 2, "global_batch_size": 8, "train_iters": STEPS, "eval_interval": STEPS, "eval_iters": 1},
        optimizer={"lr": 3.0e-3, "min_lr": 3.0e-4, "lr_warmup_iters": 4},
        deepspeed="zero0",
        tracking={"wandb": {"mode": "disabled"}, "tensorboard": False},
    )


def train(output_dir: str) -> list[float]:
    """The training losses, then the validation loss."""
    import torch

    from largeformer.stages import pretrain

    torch.set_num_threads(1)
    pretrain.run(recipe(output_dir))
    rows = [json.loads(line) for line in (Path(output_dir) / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row] + [row["val_loss"] for row in rows if "val_loss" in row]


def text(size: int = 40_000) -> str:
    """Paragraphs of sentences, some with a number in them."""
    draw = random.Random(3)
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < size:
        sentences = []
        for _ in range(draw.randint(30, 60)):
            sentence = " ".join([draw.choice(WHO), draw.choice(DID), draw.choice(WHAT), draw.choice(WHY)])
            number = f" on day {draw.randint(1, 365)}" if draw.random() < 0.3 else ""
            sentences.append(f"{sentence[0].upper()}{sentence[1:]}{number}.")
        paragraphs.append("\n".join(sentences))
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    if not TEXT.exists():
        TEXT.write_text(text())
    with tempfile.TemporaryDirectory() as folder:
        LOSSES.write_text(json.dumps(train(folder), indent=1) + "\n")
