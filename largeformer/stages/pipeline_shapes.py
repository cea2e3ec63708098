"""The shapes that the models of a chain will have, by the recipe alone: what a later stage would refuse is told before a training."""

from __future__ import annotations

from largeformer.config.chain import StageEntry, at_stage, merged
from largeformer.config.checks import recipe_problems
from largeformer.config.schema import ModelConfig, Recipe
from largeformer.errors import BadInputError


def check_shapes(recipe: Recipe) -> None:
    """Raise BadInputError where a stage cannot make its model of the one before it, or cannot quantize it. Of a chain that begins with a
    model that is there already its stages tell it: no pretraining stands before them."""
    if not any(entry.stage == "pretrain" for entry in recipe.run.stages):
        return
    model, problems = recipe.model, list[str]()
    for entry in recipe.run.stages:
        try:
            model = _after(at_stage(recipe, entry).model_copy(update={"model": model}), entry, recipe.model)
        except BadInputError as error:
            problems += [f"{entry.name}: {problem}" for problem in error.problems]
    if problems:
        raise BadInputError(problems)


def _after(recipe: Recipe, entry: StageEntry, first: ModelConfig) -> ModelConfig:
    """The shape of the model that `entry` leaves, of one of the shape of `recipe`. first: the shape of the chain's first model."""
    from largeformer.compression.pruning.shape import pruned_shape
    from largeformer.compression.pruning.unstructured import pattern_problems
    from largeformer.stages import quantize_checks

    model, problems = recipe.model, list[str]()
    if entry.stage == "prune":
        problems += pattern_problems(model, recipe.prune)
        model = pruned_shape(model, recipe.tokenizer.vocab_size, recipe.prune) if recipe.prune.structured else model
    elif entry.stage == "distill":
        model = _student(recipe, first)
    elif entry.stage == "quantize":
        problems += quantize_checks.problems(recipe)
    problems += recipe_problems(recipe.model_copy(update={"model": model}))
    if problems:
        raise BadInputError(problems)
    return model


def _student(recipe: Recipe, first: ModelConfig) -> ModelConfig:
    """Of a teacher elsewhere only the stage itself can tell the layers."""
    from largeformer.stages.distill_pupils import chosen_layers

    settings = recipe.distill
    if settings.student.init == "scratch":
        return merged(first, settings.student.model, "distill.student.model")
    if settings.student.init == "teacher_layers" and settings.teacher in (None, "pretrain"):
        of_run = recipe.model_copy(update={"model": first})
        return first.model_copy(update={"num_layers": len(chosen_layers(of_run, first.num_layers))})
    return recipe.model
