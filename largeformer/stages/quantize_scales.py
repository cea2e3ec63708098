"""How `quantize` comes to its scales: one model in float32 that is changed, beside the one it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largeformer.config.quantize import QuantizeConfig
from largeformer.config.schema import Recipe
from largeformer.stages.common import prepared_data
from largeformer.stages.common.calibrating import calibration
from largeformer.stages.common.inputs import Input, take
from largeformer.stages.common.sparse import sparsity_kept
from largeformer.stages.common.weights import Source, load_model
from largeformer.stages.quantize_table import check_finite, check_outputs, error_table, figures, worst

if TYPE_CHECKING:
    import torch

    from largeformer.compression.linears import Linear
    from largeformer.compression.quantization.description import Description
    from largeformer.compression.quantization.layers import LayerError, Scales
    from largeformer.compression.quantization.names import Names
    from largeformer.compression.quantization.schemes import Given, Scheme
    from largeformer.evaluation.quality import Quality
    from largeformer.models.shards import Shard
    from largeformer.parallel.batch import Batch
    from largeformer.stages.common.world import World

SMOOTHED = "smoothed"


@dataclass(frozen=True)
class Made:
    """What the stage has found. table: by Hugging Face's layer whether it stays `float`, and whether because it is `kept`; of the
    others `relative_error` and `sqnr_db`."""

    description: Description
    table: dict[str, dict[str, Any]]
    metrics: dict[str, Any]


@dataclass(frozen=True)
class _Work:
    """The model that is changed, in float32, at a layout of one pipeline stage; `recipe` is at it as well."""

    recipe: Recipe
    world: World
    model: Any
    shards: Sequence[Shard]
    linears: list[list[Linear]]
    batches: list[Batch]

    @classmethod
    def on(cls, given: Input, world: World, checkpoint: Path) -> _Work:
        """The model of `checkpoint`, and the calibration text. Collective. Raises BadInputError where weights are not finite."""
        from largeformer.compression.linears import linears
        from largeformer.models.gpt import build_gpt
        from largeformer.training.checkpointing import load_weights

        batches = calibration(given.recipe, world, given.source, given.recipe.quantize.calibration)
        chunks, shards = build_gpt(_exact(given.recipe), world.groups, world.device)
        load_weights(checkpoint, shards)
        check_finite(shards, checkpoint)
        model = chunks[0].eval()
        return cls(given.recipe, world, model, shards, linears(model, shards, world.groups), batches)

    @property
    def settings(self) -> QuantizeConfig:
        return self.recipe.quantize

    @property
    def dtype(self) -> torch.dtype:
        """In which the weights are kept, and scales with them."""
        from largeformer.models.gpt import DTYPES

        return DTYPES[self.recipe.train.precision]

    @property
    def scheme(self) -> Scheme:
        return scheme_of(self.settings)

    @property
    def names(self) -> Names:
        from largeformer.compression.quantization.names import Names

        return Names(self.recipe.model)

    @property
    def each(self) -> list[Linear]:
        return [linear for layer in self.linears for linear in layer]

    @property
    def rounded(self) -> list[Linear]:
        """Those that the recipe does not keep."""
        kept = kept_layers(self.recipe)
        return [linear for linear in self.each if linear.name not in kept]

    def smooth(self) -> None:
        from largeformer.compression.quantization.calibration import channel_ranges
        from largeformer.compression.quantization.smoothquant import smooth

        settings = self.settings.smoothquant
        assert settings is not None, "it was asked for"
        ranges = channel_ranges(self.model, self.each, self.batches, self.world.groups)
        smooth(self.model, self.linears, ranges, self.recipe.model, settings.alpha, settings.projections)

    def input_scales(self) -> dict[Linear, torch.Tensor]:
        """float32, but numbers that the weights' dtype holds, in which an export stores them."""
        from largeformer.compression.quantization.calibration import input_scales

        settings = self.settings
        found = input_scales(self.model, self.rounded, self.batches, self.world.groups, settings.observer, settings.percentile)
        return {linear: scale.to(self.dtype).float() for linear, scale in found.items()}

    def as_kept(self) -> None:
        """Every weight becomes the number that the checkpoint's dtype has for it."""
        import torch

        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(self.dtype))

    def save(self, folder: Path, config_yaml: str) -> Path:
        """The weights as a checkpoint under `folder`, and its path. The model is in the checkpoint's dtype meanwhile. Collective."""
        from largeformer.training.saving import save_weights

        floats = [(parameter, parameter.data) for parameter in self.model.parameters()]
        for parameter, held in floats:
            parameter.data = held.to(self.dtype)
        checkpoint = save_weights(folder, self.shards, config_yaml)
        for parameter, held in floats:
            parameter.data = held
        return checkpoint


def scheme_of(settings: QuantizeConfig) -> Scheme:
    from largeformer.compression.quantization.schemes import Scheme

    return Scheme(settings.bits, settings.group_size if settings.bits == 4 else None, settings.symmetric, settings.activations)


def kept_layers(recipe: Recipe) -> frozenset[str]:
    """Our linear layers, such as `decoder.layers.3.mlp.linear_fc1`, of which `keep_float` names some: a client that fuses theirs wants
    all of one kind."""
    from largeformer.models.hf_mapping import rows

    kept = {f"{name}.weight" for name in recipe.quantize.keep_float}
    return frozenset(row.ours.rpartition(".")[0] for row in rows(recipe.model, "llama") if kept & row.theirs.keys())


@dataclass(frozen=True)
class Start:
    """What training with rounding begins from: a checkpoint, and the scales of static activations by our names."""

    checkpoint: Path
    input_scales: dict[str, torch.Tensor]


def start_of_training(given: Input, world: World, config_yaml: str, begin: Callable[[], None]) -> Start:
    """Smooth and calibrate the model that the stage was given, as far as the recipe says so. `given` is at an inference layout, which is
    the world's; `begin` takes its folder, once nothing is refused. Collective."""
    settings, checkpoint = given.recipe.quantize, given.source.checkpoint
    inputs: dict[str, torch.Tensor] = {}
    work = _Work.on(given, world, checkpoint) if settings.smoothquant is not None or settings.activations == "tensor" else None
    if work is not None and settings.smoothquant is not None:
        work.smooth()
        work.as_kept()
    if work is not None and settings.activations == "tensor":
        inputs = {linear.name: scale.cpu() for linear, scale in work.input_scales().items()}
    begin()
    if work is not None and settings.smoothquant is not None:
        checkpoint = work.save(given.folder / SMOOTHED, config_yaml)
    return Start(checkpoint, inputs)


def quantize(given: Input, world: World, trained: Source | None, config_yaml: str) -> Made:
    """Scales for the model that the stage was given, or has `trained`; and what they do to it on held-out text, beside the given one.

    `given` is at an inference layout, which is the world's. Unless the stage has trained one, its folder is taken for a checkpoint, once
    nothing can be refused any more. Collective.
    """
    from largeformer.compression.quantization.description import Description, as_integers, check_scales
    from largeformer.compression.quantization.layers import by_name, nearest_scales, quantized, with_input_scales

    work = _Work.on(given, world, (trained or given.source).checkpoint)
    settings, names = work.settings, work.names
    if settings.smoothquant is not None and trained is None:
        work.smooth()
        work.as_kept()
    inputs = work.input_scales() if settings.activations == "tensor" else {}
    solved = _by_gptq(work) if settings.method == "gptq" else {}
    scales = {linear: one for linear, (one, _) in solved.items()} or nearest_scales(
        work.rounded, work.scheme, work.dtype, settings.weight_observer
    )
    if inputs:
        scales = with_input_scales(scales, inputs)
    errors = _errors(work, scales, {linear: weights for linear, (_, weights) in solved.items()})
    beyond = {linear for linear in scales if max(errors[name].relative for name in names.of(linear)) > settings.largest_error}
    scales = {linear: one for linear, one in scales.items() if linear not in beyond}
    named = by_name(scales, names)
    check_scales(named)
    check_outputs(errors, given.source.checkpoint)
    for linear, (_, weights) in solved.items():
        if linear in scales:
            set_local(linear, weights)
    if trained is not None:
        checkpoint = trained.checkpoint
    else:
        world.from_main(lambda: take(given, given.origin()))
        checkpoint = work.save(given.folder / "checkpoints", config_yaml)
    ignore = tuple(names.all([linear for linear in work.each if linear not in scales]))
    described = Description(work.scheme, settings.method, ignore, named, checkpoint.name)
    integers = partial(as_integers, described=described, model=work.recipe.model)
    zeros = world.from_main(lambda: sparsity_kept(given.source.checkpoint, checkpoint, deployed=integers))
    with quantized(work.scheme, scales, world.groups):
        quality = _beside_the_given(work, given)
    table = error_table(names.all(work.each), errors, ignore)
    return Made(described, table, {**figures(settings, quality), "float_layers": list(ignore), **zeros, **worst(table)})


def local(linear: Linear) -> torch.Tensor:
    """A copy of what this rank holds of the weight."""
    return linear.module.weight.detach().clone()  # type: ignore[operator, no-any-return]


def set_local(linear: Linear, weights: torch.Tensor) -> None:
    linear.module.weight.data.copy_(weights)  # type: ignore[operator, union-attr]


def _by_gptq(work: _Work) -> dict[Linear, tuple[Given, torch.Tensor]]:
    """Scales, and this rank's part of the weights on their grid, as the checkpoint will hold them. The model is as it was, afterwards."""
    from largeformer.compression.quantization.layers import gptq_layers
    from largeformer.compression.quantization.schemes import weight_scales

    settings = work.settings
    before, rounded = {linear.name: local(linear) for linear in work.each}, {linear.name for linear in work.rounded}
    scales = gptq_layers(
        work.model,
        work.shards,
        work.batches,
        work.world.groups,
        work.scheme,
        settings.gptq,
        lambda weights: weight_scales(weights, work.scheme, work.dtype, settings.weight_observer),
        rounded,
    )
    work.as_kept()
    made = {linear: (scales[linear.name], local(linear)) for linear in work.rounded}
    for linear in work.each:
        set_local(linear, before[linear.name])
    return made


def _errors(work: _Work, scales: Scales, solved: dict[Linear, torch.Tensor]) -> dict[str, LayerError]:
    """By Hugging Face's names. solved: this rank's weights on their grid, where they are not what is nearest."""
    from largeformer.compression.quantization.layers import layer_errors
    from largeformer.compression.quantization.schemes import rounded

    by_name = {linear.name: linear for linear in scales}

    def integers(linear: Linear) -> torch.Tensor:
        own = by_name[linear.name]
        before = local(own)
        if own in solved:
            set_local(own, solved[own])
        whole = rounded(own.whole(), scales[own], work.scheme)
        set_local(own, before)
        return whole

    return layer_errors(work.model, work.shards, work.batches, work.world.groups, work.names, work.scheme, scales, integers)


def _beside_the_given(work: _Work, given: Input) -> Quality:
    """The model as it is now beside the one that the stage was given, on the test split."""
    from largeformer.data.loader import Reading, evaluation_windows
    from largeformer.data.splits import held_out_streams
    from largeformer.evaluation.quality import compare

    recipe, world, folder = work.recipe, work.world, given.source.prepared.path
    tokenizer = prepared_data.open_tokenizer(recipe, folder)
    streams = held_out_streams(recipe.data, prepared_data.prefixes(recipe, folder), tokenizer, "test", recipe.run.seed)
    reading = Reading(recipe.train.micro_batch_size, world.groups.coordinates.data, world.groups.layout.data)
    windows: Iterator[Batch] = evaluation_windows(streams, recipe.model.seq_length, reading, tokenizer.eod)
    if (tokens := work.settings.evaluation_tokens) is not None:
        step = recipe.model.seq_length * reading.micro_batch_size * reading.data_size
        windows = islice(windows, -(-tokens // step))
    (reference,) = load_model(_exact(recipe), world, given.source.checkpoint)
    return compare(work.model, reference, windows, world.groups, tokenizer.piece_bytes)


def _exact(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": "fp32"})})
