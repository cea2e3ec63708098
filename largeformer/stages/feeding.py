"""What training reads: this data rank's batches as the recipe orders them, and the validation between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from largeformer.artifact import Artifact
from largeformer.config.sampling import LossSampling
from largeformer.config.schema import Recipe
from largeformer.stages import prepare
from largeformer.stages.world import World

if TYPE_CHECKING:
    from largeformer.data.splits import SourceDraws, Splits
    from largeformer.evaluation.perplexity import LossTotal
    from largeformer.models.gpt import GPT
    from largeformer.training.checkpointing import Stateful
    from largeformer.training.source_losses import Follower
    from largeformer.training.trainer import BatchSource
    from largeformer.training.watchdog import Watchdog


@dataclass(frozen=True)
class Feed:
    """open_at: the batches from a sample on; validate: the loss over held-out batches, the same ones each time; parts: what of the
    sampling a checkpoint must keep."""

    open_at: Callable[[int], BatchSource]
    validate: Callable[[], LossTotal]
    parts: dict[str, Stateful] = field(default_factory=dict)


def build_feed(recipe: Recipe, world: World, prepared: Artifact, chunks: Sequence[GPT], watchdog: Watchdog) -> Feed:
    """Open the prepared data. Collective."""
    from largeformer.data.augmentation.permutation import training_samples
    from largeformer.data.indexed import check_tokenizer
    from largeformer.data.loader import Batches, Reading, SourceBatches, fixed_batches
    from largeformer.data.packing import Packing
    from largeformer.data.ramp import BatchSizes
    from largeformer.data.splits import SourceDraws
    from largeformer.evaluation.perplexity import evaluate
    from largeformer.training.source_losses import FollowedBatches

    train, at = recipe.train, world.groups.coordinates
    tokenizer = prepare.open_tokenizer(recipe, prepared.path)
    check_tokenizer(tokenizer.unique_identifiers, prepared.metrics, prepared.path)
    sizes = BatchSizes(train)
    splits = _splits(recipe, prepared)
    training, validation = splits.train, splits.valid
    assert training is not None and validation is not None, "samples of both were asked for"
    packing = Packing.of(recipe.data, tokenizer.eod)
    reading = Reading(train.micro_batch_size, at.data, world.groups.layout.data, packing, world.device, recipe.data.num_workers)

    def validate() -> LossTotal:
        held_out = fixed_batches(validation, train.eval_iters, train.global_batch_size, reading)
        return evaluate(chunks, watchdog.following(held_out, "a batch of the validation"), world.groups, tokenizer.piece_bytes)

    if isinstance(training, SourceDraws):
        follower = _follower(recipe, world, training, chunks)
        return Feed(
            lambda sample: FollowedBatches(SourceBatches(training, follower.order, sizes.at, reading, sample), follower),
            validate,
            {"sampling": follower},
        )
    varied = training_samples(training, recipe.data.augment, tokenizer, recipe.run.seed)
    return Feed(lambda sample: Batches(varied, sizes.at, reading, sample), validate)


def _splits(recipe: Recipe, prepared: Artifact) -> Splits:
    from largeformer.data.ramp import BatchSizes
    from largeformer.data.splits import build_splits

    train = recipe.train
    spare = recipe.guards.rewind_steps * train.global_batch_size if recipe.guards.rewinds else 0
    return build_splits(
        recipe.data,
        recipe.model.seq_length,
        prepare.open_tokenizer(recipe, prepared.path),
        prepare.prefixes(recipe, prepared.path),
        (BatchSizes(train).samples_after(train.train_iters) + spare, train.eval_iters * train.global_batch_size, 0),
        recipe.run.seed,
        prepared.path / "cache",
    )


def _follower(recipe: Recipe, world: World, samples: SourceDraws, chunks: Sequence[GPT]) -> Follower:
    from largeformer.data.sampling import LossWeighted
    from largeformer.training.source_losses import Follower

    sampling = recipe.data.sampling
    assert isinstance(sampling, LossSampling)
    options = sampling.model_dump(include={"power", "interval", "decay", "floor"})
    return Follower(LossWeighted(samples.shares, (recipe.run.seed,), **options), chunks, world.groups)
