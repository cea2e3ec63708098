"""Whether one model is better than another by more than chance: `python -m tests.benchmarks.side_by_side MODEL MODEL [MODEL ...]`.

MODEL: a stage's folder; several with commas between them are seeds of one, whose losses are averaged. All of them read the same text.
Loss is that of every window of the held-out splits (`--splits valid,test`), in float32, source by source and over all. The difference to
the first MODEL is a mean over tokens, and its standard error that of a ratio over the windows, which both read alike (Cochran 1977).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from largeformer.config.load import load_recipe
from largeformer.config.schema import Recipe
from largeformer.data.loader import Reading, evaluation_windows
from largeformer.data.splits import held_out_streams
from largeformer.models.flops import parameter_count
from largeformer.parallel.batch import Batch
from largeformer.stages.common import prepared_data
from largeformer.stages.common.deployed import deployed
from largeformer.stages.common.weights import find_source, shaped_like
from largeformer.stages.common.world import World, enter_world

MICRO_BATCH = 8
ONE_PROCESS = ["train.precision=fp32", "parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1"]


@dataclass(frozen=True)
class Losses:
    """Of windows: `tokens` predicted in each, and their losses' sum. float64[windows]."""

    tokens: torch.Tensor
    sums: torch.Tensor

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.tokens.sum())

    def minus(self, other: Losses) -> torch.Tensor:
        if not torch.equal(self.tokens, other.tokens):
            sys.exit("the models read different text: all of them need one data.split, one tokenizer and one seq_length")
        return self.sums - other.sums

    def beyond(self, other: Losses) -> tuple[float, float]:
        """How much larger than the `other`'s a token's loss is, and the standard error of that over windows."""
        rest = self.minus(other)
        mean = float(rest.sum() / self.tokens.sum())
        count = len(rest)
        spread = float(((rest - mean * self.tokens) ** 2).sum()) / max(count - 1, 1)
        return mean, math.sqrt(spread * count) / float(self.tokens.sum())


def together(parts: Sequence[Losses]) -> Losses:
    return Losses(torch.cat([part.tokens for part in parts]), torch.cat([part.sums for part in parts]))


def average(seeds: Sequence[Losses]) -> Losses:
    first, *_ = seeds
    return Losses(first.tokens, first.sums + torch.stack([seed.minus(first) for seed in seeds]).mean(dim=0))


@torch.no_grad()
def losses(model: torch.nn.Module, batches: Sequence[Batch], vocab_size: int) -> Losses:
    tokens, sums = [], []
    for batch in batches:
        logits = model(batch.tokens, batch.position_ids, batch.attention_mask(), runtime_gather_output=True)[..., :vocab_size].float()
        found = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none") * batch.loss_mask
        tokens.append(batch.loss_mask.sum(dim=1).double())
        sums.append(found.sum(dim=1).double())
    whole = together([Losses(*pair) for pair in zip(tokens, sums, strict=True)])
    read = whole.tokens > 0  # what fills the last batch up is masked
    return Losses(whole.tokens[read], whole.sums[read])


def held_out(recipe: Recipe, folder: Path, splits: Sequence[str]) -> dict[str, list[Batch]]:
    """The windows of each source, numbered as in `data.sources`; each has some in every one of `splits`."""
    tokenizer, prefixes = prepared_data.open_tokenizer(recipe, folder), prepared_data.prefixes(recipe, folder)
    found: dict[str, list[Batch]] = {}
    for split in splits:
        streams = held_out_streams(recipe.data, prefixes, tokenizer, split, recipe.run.seed)
        if len(streams) < len(prefixes):
            sys.exit(f"a source of {folder} has no {split} text, so its windows cannot be told from another's: name other --splits")
        for number, stream in enumerate(streams, start=1):
            windows = evaluation_windows([stream], recipe.model.seq_length, Reading(MICRO_BATCH, 0, 1), tokenizer.eod)
            found.setdefault(f"source {number}", []).extend(windows)
    return found


def measured(recipe: Recipe, models: Sequence[Path], splits: Sequence[str], world: World) -> tuple[int, dict[str, Losses]]:
    """The parameters of one of them, and their average losses, by source and over all."""
    seeds: list[dict[str, Losses]] = []
    for model in models:
        source = find_source(recipe, model)
        shaped = shaped_like(recipe, source)
        text = held_out(shaped, source.prepared.path, splits)
        with deployed(shaped, world, source.checkpoint) as chunk:
            seeds.append({name: losses(chunk, batches, shaped.tokenizer.vocab_size) for name, batches in text.items()})
    by_text = {name: average([seed[name] for seed in seeds]) for name in seeds[0]}
    if len(by_text) > 1:
        by_text["all"] = together(list(by_text.values()))
    return parameter_count(shaped.model, shaped.tokenizer.vocab_size), by_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--splits", default="valid,test")
    given = parser.parse_args()
    first = Path(given.models[0].split(",")[0])
    recipe = load_recipe(str(first / "config.yaml"), ONE_PROCESS)
    with enter_world(recipe, training=False) as world:
        found = {name: measured(recipe, [Path(one) for one in name.split(",")], given.splits.split(","), world) for name in given.models}
    (_, reference), *_ = found.values()
    print("| model | parameters | text | tokens | perplexity | beside the first | standard error |\n" + "|---" * 7 + "|")
    for name, (parameters, by_text) in found.items():
        for text, here in by_text.items():
            more, error = here.beyond(reference[text])
            tokens, perplexity = int(here.tokens.sum()), math.exp(here.mean)
            print(f"| {name} | {parameters / 1e6:.2f}M | {text} | {tokens:,} | {perplexity:.3f} | {math.expm1(more):+.2%} | {error:.2%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
