"""What training reads: this data rank's batches as the recipe orders them, and the validation between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from largeformer.artifact import Artifact
from largeformer.config.sampling import LossSampling
from largeformer.config.schema import Recipe
from largeformer.stages.common import prepared_data
from largeformer.stages.common.world import World

if TYPE_CHECKING:
    from largeformer.data.loader import Reading
    from largeformer.data.splits import Samples, SourceDraws, Splits
    from largeformer.data.tokenization.tokenizer import MockTokenizer, Tokenizer
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


def build_feed(recipe: Recipe, world: World, prepared: Artifact, chunks: Sequence[GPT], watchdog: Watchdog, samples: int) -> Feed:
    """Open the prepared data, of which training may come to read so many samples. Collective."""
    from largeformer.data.loader import SourceBatches, fixed_batches
    from largeformer.data.ramp import BatchSizes
    from largeformer.data.splits import SourceDraws
    from largeformer.evaluation.perplexity import evaluate
    from largeformer.training.source_losses import FollowedBatches

    train, text = recipe.train, _open(recipe, world, prepared, samples)
    training, validation = text.splits.train, text.splits.valid
    assert training is not None and validation is not None, "samples of both were asked for"

    def validate() -> LossTotal:
        held_out = fixed_batches(validation, train.eval_iters, train.global_batch_size, text.reading)
        return evaluate(chunks, watchdog.following(held_out, "a batch of the validation"), world.groups, text.tokenizer.piece_bytes)

    if isinstance(training, SourceDraws):
        follower, sizes = _follower(recipe, world, training, chunks), BatchSizes(train)
        return Feed(
            lambda sample: FollowedBatches(SourceBatches(training, follower.order, sizes.at, text.reading, sample), follower),
            validate,
            {"sampling": follower},
        )
    return Feed(_batches_of(recipe, training, text), validate)


def training_batches(recipe: Recipe, world: World, prepared: Artifact) -> Callable[[int], BatchSource]:
    """The training batches from a sample on, without what accompanies training; their order may not depend on losses. Collective."""
    text = _open(recipe, world, prepared, samples_to_train_on(recipe))
    assert text.splits.train is not None, "samples of it were asked for"
    return _batches_of(recipe, text.splits.train, text)


def check_text(recipe: Recipe, world: World, prepared: Artifact) -> None:
    """Raise BadInputError where training could not read the prepared data as the recipe wants it. Collective."""
    _open(recipe, world, prepared, samples_to_train_on(recipe))


def samples_to_train_on(recipe: Recipe, step: int = 0, read: int = 0) -> int:
    """How many samples a run may come to read, with those that take the place of what is left out, which brings the end of a ramp of batch
    sizes nearer. One that begins at `step` goes on behind so many that another run had `read`. Alike in every process of a run."""
    from largeformer.data.ramp import BatchSizes

    train, sizes = recipe.train, BatchSizes(recipe.train)
    spare = recipe.guards.rewind_steps * train.global_batch_size if recipe.guards.rewinds else 0
    return max(sizes.samples_after(train.train_iters, spare), sizes.samples_after(train.train_iters - step, read + spare))


@dataclass(frozen=True)
class _Text:
    tokenizer: Tokenizer | MockTokenizer
    splits: Splits
    reading: Reading


def _open(recipe: Recipe, world: World, prepared: Artifact, samples: int) -> _Text:
    from largeformer.data.indexed import check_tokenizer
    from largeformer.data.loader import Reading
    from largeformer.data.packing import Packing

    at, layout = world.groups.coordinates, world.groups.layout
    tokenizer = prepared_data.open_tokenizer(recipe, prepared.path)
    check_tokenizer(tokenizer.unique_identifiers, prepared.metrics, prepared.path)
    packing = Packing.of(recipe.data, tokenizer.eod)
    reading = Reading(recipe.train.micro_batch_size, at.data, layout.data, packing, world.device, recipe.data.num_workers)
    return _Text(tokenizer, _splits(recipe, prepared, samples), reading)


def _batches_of(recipe: Recipe, training: Samples, text: _Text) -> Callable[[int], BatchSource]:
    from largeformer.data.augmentation.permutation import training_samples
    from largeformer.data.loader import Batches
    from largeformer.data.ramp import BatchSizes

    sizes = BatchSizes(recipe.train)
    varied = training_samples(training, recipe.data.augment, text.tokenizer, recipe.run.seed)
    return lambda sample: Batches(varied, sizes.at, text.reading, sample)


def _splits(recipe: Recipe, prepared: Artifact, samples: int) -> Splits:
    from largeformer.data.splits import build_splits

    train = recipe.train
    return build_splits(
        recipe.data,
        recipe.model.seq_length,
        prepared_data.open_tokenizer(recipe, prepared.path),
        prepared_data.prefixes(recipe, prepared.path),
        (samples, train.eval_iters * train.global_batch_size, 0),
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
