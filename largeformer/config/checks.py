"""Rules between the keys of a recipe. Each returns sentences that name the keys, the values and the fix; empty where all is well.

Every sentence names every key that it judges: the loader drops a sentence about a value that could not be read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from largeformer.config.augment import augment_problems
from largeformer.config.batches import data_problems
from largeformer.config.chain import at_stage, chain_problems
from largeformer.config.cleaning import cleaning_problems
from largeformer.config.distill import distill_problems
from largeformer.config.guards import guards_problems
from largeformer.config.prune import prune_problems
from largeformer.config.quality import quality_problems
from largeformer.config.quantize import quantize_problems
from largeformer.config.rules import schedule_problems
from largeformer.config.schema import ModelConfig, OptimizerConfig, Recipe, TrainConfig
from largeformer.config.tokenizer_rules import tokenizer_problems
from largeformer.errors import BadInputError
from largeformer.layout import batch_problems, shape_problems

_NO_MODEL = ("prepare", "evaluate", "export")


def recipe_problems(recipe: Recipe) -> list[str]:
    """Everything that can be said about a recipe before the world size and the DeepSpeed config are known."""
    return [
        *_attention_problems(recipe.model),
        *_layout_problems(recipe),
        *_recompute_problems(recipe.train, recipe.model.add_bias_linear),
        *_rampup_problems(recipe.train),
        *_schedule_problems(recipe),
        *_optimizer_problems(recipe.optimizer),
        *augment_problems(recipe.data.augment, recipe.model.family, recipe.data.sampling.type),
        *_sample_problems(recipe),
        *cleaning_problems(recipe.data.cleaning, recipe.data.deduplicate),
        *_retention_problems(recipe),
        *guards_problems(recipe.guards, recipe.checkpoint.save_interval),
        *data_problems(recipe),
        *tokenizer_problems(recipe.tokenizer),
        *distill_problems(recipe),
        *quantize_problems(recipe.quantize),
        *chain_problems(recipe),
        *quality_problems(recipe.quality, {entry.name: entry.stage not in _NO_MODEL for entry in recipe.run.stages}),
        *prune_problems(recipe.prune, recipe.train),
    ]


def stage_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the recipe as one stage reads it, by its section or its entry of `run.stages`, and not as it stands."""
    told = set(recipe_problems(recipe))
    for entry in recipe.run.stages:
        with contextlib.suppress(BadInputError):  # which `chain_problems` tells
            yield from (f"in {entry.name}: {problem}" for problem in recipe_problems(at_stage(recipe, entry)) if problem not in told)


def world_problems(recipe: Recipe, world_size: int) -> list[str]:
    """What is wrong with this recipe on `world_size` ranks: the degrees, and the arithmetic of every batch size on the way."""
    try:
        layout = recipe.layout(world_size)
    except ValueError as error:
        return [str(error)]
    problems = batch_problems(recipe.train.global_batch_size, recipe.train.micro_batch_size, layout)
    for size in _rampup_sizes(recipe.train):
        wrong = batch_problems(size, recipe.train.micro_batch_size, layout)
        if wrong:  # The first is enough: the others fail for the same reason.
            return [*problems, f"train.rampup_batch_size passes through {size} samples: {wrong[0]}"]
    return problems


def calibration_problems(recipe: Recipe, stage: str, world_size: int) -> list[str]:
    """A sentence where `stage`, if it takes statistics from text, has more ranks to read it than windows: its pipeline ranks are
    data-parallel ones. `recipe` fits the world."""
    settings = {
        "prune": recipe.prune.calibration if recipe.prune.calibrates else None,
        "quantize": recipe.quantize.calibration,
    }.get(stage)
    layout = recipe.layout(world_size)
    readers = layout.data * layout.pipeline
    if settings is None or settings.samples >= readers:
        return []
    return [
        f"{stage}.calibration.samples {settings.samples} is fewer than the {readers} data-parallel ranks, of which each reads one at least "
        f"(pipeline ranks are such ranks there): set it to {readers} or more"
    ]


def _attention_problems(model: ModelConfig) -> Iterator[str]:
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.hidden_size {model.hidden_size} is not divisible by model.num_attention_heads {model.num_attention_heads}: "
            "change one of them, or give the size of a head as model.kv_channels"
        )
    elif model.position_embedding == "rope" and model.head_dim % 2:
        yield (
            f"model.position_embedding rope needs an even head size; model.hidden_size {model.hidden_size} and "
            f"model.num_attention_heads {model.num_attention_heads} (or model.kv_channels) make it {model.head_dim}"
        )


def _layout_problems(recipe: Recipe) -> list[str]:
    model, parallel = recipe.model, recipe.parallel
    return shape_problems(
        num_layers=model.num_layers,
        heads=model.num_attention_heads,
        query_groups=model.query_groups,
        ffn=model.ffn_size,
        seq_length=model.seq_length,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        virtual=parallel.virtual_pipeline_model_parallel_size or 1,
        sequence_parallel=parallel.sequence_parallel,
        first=parallel.num_layers_in_first_pipeline_stage,
        last=parallel.num_layers_in_last_pipeline_stage,
    )


def _recompute_problems(train: TrainConfig, biases: bool) -> Iterator[str]:
    method, layers = train.recompute_method, train.recompute_num_layers
    if train.recompute_granularity == "full":
        if method is None:
            yield "train.recompute_granularity full needs train.recompute_method, which is null: set it to uniform or block"
        if layers is None:
            yield "train.recompute_granularity full needs train.recompute_num_layers, which is null: set it to 1 to save most memory"
        return
    for name, value in (("recompute_method", method), ("recompute_num_layers", layers)):
        if value is not None:
            given = train.recompute_granularity or "null"
            yield f"train.{name} is {value}, but train.recompute_granularity is {given}: set that to full, or train.{name} to null"
    if train.recompute_granularity == "selective" and not train.recompute_modules:
        yield "train.recompute_granularity selective needs train.recompute_modules, which is empty: name core_attn, mlp or both"
    if train.recompute_granularity == "selective" and "mlp" in train.recompute_modules and biases:
        yield (
            "train.recompute_modules mlp does not go with model.add_bias_linear true: the backward of Megatron-core 0.16 would call itself "
            "without end. Name core_attn alone, or use train.recompute_granularity full"
        )


def _rampup_problems(train: TrainConfig) -> Iterator[str]:
    ramp = train.rampup_batch_size
    if ramp is None:
        return
    if ramp.start > train.global_batch_size:
        yield f"train.rampup_batch_size.start {ramp.start} is above train.global_batch_size {train.global_batch_size}: start lower"
    elif (train.global_batch_size - ramp.start) % ramp.increment:
        yield (
            f"train.rampup_batch_size.increment {ramp.increment} does not lead from train.rampup_batch_size.start {ramp.start} to "
            f"train.global_batch_size {train.global_batch_size}: it must divide the difference, {train.global_batch_size - ramp.start}"
        )


def _rampup_sizes(train: TrainConfig) -> range:
    ramp = train.rampup_batch_size
    return range(ramp.start, train.global_batch_size, ramp.increment) if ramp is not None else range(0)


def _schedule_problems(recipe: Recipe) -> list[str]:
    optimizer = recipe.optimizer
    return schedule_problems(
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        train_iters=recipe.train.train_iters,
        warmup_iters=recipe.warmup_iters,
        decay_style=optimizer.lr_decay_style,
        decay_iters=optimizer.lr_decay_iters,
        wsd_decay_iters=optimizer.lr_wsd_decay_iters,
    )


def _optimizer_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    if optimizer.type == "sgd" and optimizer.backend in ("deepspeed_fused", "deepspeed_cpu"):
        yield f"optimizer.backend {optimizer.backend} has no SGD (optimizer.type sgd): set optimizer.backend to auto or torch"


def _retention_problems(recipe: Recipe) -> Iterator[str]:
    checkpoint, interval = recipe.checkpoint, recipe.train.eval_interval
    if checkpoint.keep_best and (checkpoint.save_interval is None or checkpoint.save_interval % interval):
        yield (
            f"checkpoint.keep_best {checkpoint.keep_best} compares validations, and checkpoint.save_interval {checkpoint.save_interval} "
            f"is not a multiple of train.eval_interval {interval}: make it one, so that each saved step is validated"
        )


def _sample_problems(recipe: Recipe) -> Iterator[str]:
    """What stands against generating with the model as it is trained."""
    if not recipe.tracking.sample_prompts:
        return
    parallel = recipe.parallel
    obstacles = {
        f"parallel.pipeline_model_parallel_size {parallel.pipeline_model_parallel_size}": parallel.pipeline_model_parallel_size > 1,
        "parallel.sequence_parallel true": parallel.sequence_parallel,
        "train.compile true": recipe.train.compile,
        "data.sources mock": recipe.data.is_mock,
    }
    for obstacle in (name for name, there in obstacles.items() if there):
        yield (
            f"tracking.sample_prompts cannot be gone on with while training under {obstacle}: leave them out; `largeformer generate` and "
            "the stage evaluate write text at any layout"
        )
