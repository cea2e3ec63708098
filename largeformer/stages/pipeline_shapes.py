"""The shapes that the models of a chain will have, by the recipe alone: what a later stage would refuse is told before a training."""

from __future__ import annotations

from pathlib import Path

from largeformer.artifact import Artifact
from largeformer.config.chain import StageEntry, at_stage, merged
from largeformer.config.schema import ModelConfig, Recipe
from largeformer.errors import BadInputError


def check_shapes(recipe: Recipe) -> None:
    """Raise BadInputError where a stage after the pretraining cannot make its model of the one before it, or cannot quantize it. Where the
    pretraining has finished, or there is none, the stages tell it as soon; so they do behind a student whose shape is not known here."""
    names = [entry.stage for entry in recipe.run.stages]
    if "pretrain" not in names or Artifact.read(Path(recipe.run.output_dir) / "pretrain") is not None:
        return
    model: ModelConfig | None = recipe.model
    for entry in recipe.run.stages[names.index("pretrain") + 1 :]:
        try:
            model = _after(at_stage(recipe, entry).model_copy(update={"model": model}), entry, recipe.model)
        except BadInputError as error:
            raise BadInputError([f"{entry.name}: {problem}" for problem in error.problems]) from None
        if model is None:
            return


def _after(recipe: Recipe, entry: StageEntry, first: ModelConfig) -> ModelConfig | None:
    """The shape of the model that `entry` leaves, of one of the shape of `recipe`. first: the shape that was pretrained."""
    from largeformer.compression.pruning.shape import pruned_shape
    from largeformer.compression.pruning.unstructured import pattern_problems
    from largeformer.stages import quantize_checks

    problems: list[str] = []
    if entry.stage == "distill":
        return _student(recipe, first)
    if entry.stage == "prune":
        problems = list(pattern_problems(recipe.model, recipe.prune))
    elif entry.stage == "quantize":
        problems = quantize_checks.problems(recipe)
    if problems:
        raise BadInputError(problems)
    structured = entry.stage == "prune" and recipe.prune.structured
    return pruned_shape(recipe.model, recipe.tokenizer.vocab_size, recipe.prune) if structured else recipe.model


def _student(recipe: Recipe, first: ModelConfig) -> ModelConfig | None:
    """None where a teacher that is not the pretrained model gives it its layers."""
    from largeformer.stages.distill_pupils import chosen_layers

    settings = recipe.distill
    if settings.student.init == "previous":
        return recipe.model
    if settings.student.init == "scratch":
        return merged(first, settings.student.model, "distill.student.model")
    if settings.teacher not in (None, "pretrain"):
        return None
    layers = chosen_layers(recipe.model_copy(update={"model": first}), first.num_layers)
    return first.model_copy(update={"num_layers": len(layers)})
