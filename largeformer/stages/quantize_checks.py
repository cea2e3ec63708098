"""What stands against quantizing a model as the recipe says: told before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator

from largeformer.config.quantize import QuantizeConfig
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.stages.quantize_scales import kept_layers


def check(recipe: Recipe) -> None:
    """`recipe` is shaped like the model. Raises BadInputError with everything that does not go."""
    from largeformer.compression.quantization.schemes import check_library

    check_library()
    if found := problems(recipe):
        raise BadInputError(found)


def problems(recipe: Recipe) -> list[str]:
    """What stands against it in the shape of the model, which `recipe` has."""
    return [*_group_problems(recipe), *_name_problems(recipe), *_client_problems(recipe)]


def _group_problems(recipe: Recipe) -> Iterator[str]:
    settings, sizes = recipe.quantize, _rounded_inputs(recipe)
    wrong = [name for name, size in sizes.items() if size % settings.group_size] if settings.bits == 4 else []
    if wrong:
        yield (
            f"quantize.group_size {settings.group_size} does not divide {sizes[wrong[0]]}, the inputs of {len(wrong)} layers such as "
            f"{wrong[0]}: choose a divisor, or list them in quantize.keep_float"
        )
    tensor = recipe.parallel.tensor_model_parallel_size
    parted = [name for name, size in sizes.items() if name.endswith(("o_proj", "down_proj")) and (size // tensor) % settings.group_size]
    if settings.bits == 4 and settings.trains and parted and not wrong:
        yield (
            f"quantize.group_size {settings.group_size} does not divide {sizes[parted[0]] // tensor}, the inputs of {parted[0]} on one of "
            f"{tensor} tensor-parallel ranks, which quantize.method qat needs: choose a divisor, fewer ranks, or "
            "list such layers in quantize.keep_float"
        )


def _name_problems(recipe: Recipe) -> Iterator[str]:
    sizes = _inputs(recipe)
    if unknown := [name for name in recipe.quantize.keep_float if name not in sizes and name != "lm_head"]:
        yield f"quantize.keep_float names {', '.join(unknown)}; this model's linear layers are named as {', '.join(list(sizes)[:3])}"


def _client_problems(recipe: Recipe) -> Iterator[str]:
    from largeformer.models.hf_config import architecture

    try:
        style = architecture(recipe.model).style
    except BadInputError:
        style = "gpt2"
    settings: QuantizeConfig = recipe.quantize
    if settings.scheme != "w8a8" and style != "llama":
        yield (
            f"quantize.scheme {settings.scheme} cannot be exported for a model of this shape: compressed-tensors knows Llama's "
            "layers alone, and ONNX holds w8a8: choose that"
        )


def _rounded_inputs(recipe: Recipe) -> dict[str, int]:
    """The same of those layers alone that do not stay floats."""
    from largeformer.models.hf_mapping import rows

    kept = kept_layers(recipe)
    stay = {name for row in rows(recipe.model, "llama") if row.ours.rpartition(".")[0] in kept for name in row.theirs}
    return {name: size for name, size in _inputs(recipe).items() if f"{name}.weight" not in stay}


def _inputs(recipe: Recipe) -> dict[str, int]:
    """Input channels of every linear layer of the Transformer layers, by Hugging Face's names."""
    from largeformer.models.hf_mapping import rows, shapes

    theirs = shapes(rows(recipe.model, "llama"), recipe.model, recipe.tokenizer.vocab_size)
    return {name.removesuffix(".weight"): shape[1] for name, shape in theirs.items() if name.endswith("_proj.weight")}
