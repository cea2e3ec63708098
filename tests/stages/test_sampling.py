"""Training with each order of samples, from text to checkpoint: interrupted and resumed it is the run that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from largeformer.config.schema import Recipe
from tests.distributed import RankContext, RankPool
from tests.golden.make import RECIPE, TEXT

Ranks = Callable[[int], RankPool]
STEPS, CUT = 8, 5


def recipe_of(folder: Path, sampling: dict[str, Any], **more: Any) -> Recipe:
    """Two sources of many documents each: the golden text, and one letter over and over, whose loss is soon nothing."""
    dull, prose = folder / "dull.jsonl", folder / "prose.jsonl"
    if not dull.exists():
        dull.write_text((json.dumps({"text": "a " * 24}) + "\n") * 400)
        prose.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT.read_text().split("\n\n") if text.strip()))
    data = {
        "sources": [{"path": str(prose)}, {"path": str(dull)}],
        "split": "90,10,0",
        "sampling": sampling,
        "reset_attention_mask": True,
        "eod_mask_loss": True,
    }
    train = {**RECIPE["train"], "micro_batch_size": 2, "global_batch_size": 8, "train_iters": STEPS, "eval_interval": 4, **more}
    run = {"output_dir": str(folder / "run"), "seed": 3}
    return Recipe.model_validate({**RECIPE, "run": run, "data": data, "train": train})


def train(ranks: RankContext, recipe: Recipe) -> tuple[list[float], dict[str, Any]]:
    from largeformer.stages import pretrain

    pretrain.run(recipe)
    folder = Path(recipe.run.output_dir) / "pretrain"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    newest = max((folder / "checkpoints").glob("step_*"))
    return [row["loss"] for row in rows if "loss" in row], json.loads((newest / "state.json").read_text())["extra"]


SAMPLINGS: dict[str, dict[str, Any]] = {
    "sources by their loss": {"type": "loss", "interval": 2, "power": 2.0, "decay": 0.5},
    "curriculum": {"type": "curriculum", "difficulty": "rarity", "pacing": "linear"},
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_interrupted_and_resumed_on_two_ranks(ranks: Ranks, tmp_path: Path, name: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    straight, kept = ranks(2).run(train, recipe_of(tmp_path / "one", SAMPLINGS[name]))[0]
    ranks(2).run(train, recipe_of(tmp_path / "two", SAMPLINGS[name], exit_iteration=CUT))
    resumed, kept_resumed = ranks(2).run(train, recipe_of(tmp_path / "two", SAMPLINGS[name]))[0]
    assert len(straight) == STEPS and resumed == straight
    assert kept.get("sampling") == kept_resumed.get("sampling")
    if name == "sources by their loss":
        state = kept["sampling"]
        assert state["steps"] == STEPS and state["places"] == sum(state["drawn"]) == 8 * STEPS
        assert state["losses"][1] < state["losses"][0] and state["shares"][0] > 0.55, "the dull source is drawn less"
