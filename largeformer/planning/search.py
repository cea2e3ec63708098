"""All layouts of a recipe on so many ranks: the fastest that fit, and why the others do not.

Tensor, pipeline and virtual stages, micro batch, ZeRO and recomputation vary; the model, the global batch and the precision stay, so that
every layout trains the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from largeformer.config.checks import world_problems
from largeformer.config.deepspeed import ZeroConfig
from largeformer.config.schema import ParallelConfig, Recipe
from largeformer.config.size import rank_parameters
from largeformer.layout import shape_problems
from largeformer.planning.hardware import Cluster
from largeformer.planning.inventory import inventories
from largeformer.planning.memory import ends_memory, fullest
from largeformer.planning.prediction import Prediction, misfits, predict
from largeformer.planning.step import Job, step_time

BEST = 5
_LARGEST_BUCKET = 500_000_000  # elements, DeepSpeed's default
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_MOST_VIRTUAL = 8
_SIMULATED = 12  # of the fastest by formula, before the five are named

Recomputation = tuple[str | None, str | None, int | None, tuple[str, ...]]
_RECOMPUTATIONS: dict[str, Recomputation] = {
    "none": (None, None, None, ("core_attn",)),
    "selective core_attn": ("selective", None, None, ("core_attn",)),
    "selective mlp": ("selective", None, None, ("mlp",)),
    "full": ("full", "uniform", 1, ("core_attn",)),
}


@dataclass
class Found:
    """best: fastest first. tried: layouts that were looked at. why_not: reason -> how many failed for it; nearest: of those that do not
    fit in memory, the one that needs least."""

    best: list[Prediction] = field(default_factory=list)
    tried: int = 0
    why_not: Counter[str] = field(default_factory=Counter)
    nearest: Prediction | None = None


def search(recipe: Recipe, world_size: int, cluster: Cluster, overlap_comm: bool = False) -> Found:
    """Without offload first; with it only where nothing fits, since it is slow."""
    plain = [{"stage": stage} for stage in ((0, 1, 2, 3) if recipe.train.precision == "fp32" else (1, 2, 3))]
    found = Found()
    for sections in (plain, _OFFLOADED):
        if not found.best:
            _search(recipe, world_size, cluster, [{**section, "overlap_comm": overlap_comm} for section in sections], found)
    return found


_OFFLOADED: list[dict[str, Any]] = [
    {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    {"stage": 3, "offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme"}},
]


def _search(recipe: Recipe, world_size: int, cluster: Cluster, sections: list[dict[str, Any]], found: Found) -> None:
    fitting: list[tuple[float, Job]] = []
    least: tuple[int, Job] | None = None
    for parallel in _parallels(recipe, world_size, cluster, found.why_not):
        stages = inventories(recipe.model_copy(update={"parallel": parallel}))
        for candidate in _variants(recipe, parallel):
            layout = candidate.layout(world_size)
            if world_problems(candidate, world_size):
                found.tried += len(sections)
                found.why_not["the global batch does not divide"] += len(sections)
                continue
            for section in sections:
                found.tried += 1
                if section["stage"] >= 2 and layout.pipeline > 1:
                    found.why_not["ZeRO 2 and 3 do not go with a pipeline"] += 1
                    continue
                job = Job(candidate, layout, _with_buckets(section, candidate), cluster, stages)
                memory = ends_memory(job)
                if misfits(cluster, memory):
                    found.why_not["does not fit in memory"] += 1
                    needed = fullest(memory).total_bytes
                    least = (needed, job) if least is None or needed < least[0] else least
                else:
                    fitting.append((step_time(job, exact=False).seconds, job))
    fitting.sort(key=lambda one: one[0])
    exact = sorted((predict(job) for _, job in fitting[:_SIMULATED]), key=lambda one: one.step.seconds)
    found.best = exact[:BEST]
    found.nearest = predict(least[1]) if least and not fitting else found.nearest
    if slower := len(fitting) - len(found.best):
        found.why_not["fits, but is slower"] += slower


def _parallels(recipe: Recipe, world_size: int, cluster: Cluster, why_not: Counter[str]) -> Iterator[ParallelConfig]:
    """Every division that the model's shape allows. Tensor parallelism stays in a node, and is sequence parallel."""
    model = recipe.model
    for tensor in _divisors(world_size, min(cluster.gpus_per_node, model.num_attention_heads)):
        for pipeline in _divisors(world_size // tensor, model.num_layers):
            for virtual in range(1, _MOST_VIRTUAL + 1) if pipeline > 1 else (1,):
                sequence = tensor > 1 and model.seq_length % tensor == 0
                wrong = shape_problems(
                    num_layers=model.num_layers,
                    heads=model.num_attention_heads,
                    query_groups=model.query_groups,
                    ffn=model.ffn_size,
                    seq_length=model.seq_length,
                    tensor=tensor,
                    pipeline=pipeline,
                    virtual=virtual,
                    sequence_parallel=sequence,
                )
                if wrong:
                    why_not["the model's layers, heads or widths do not divide"] += 1
                    continue
                yield ParallelConfig(
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
                    sequence_parallel=sequence,
                )


def _variants(recipe: Recipe, parallel: ParallelConfig) -> Iterator[Recipe]:
    """Micro batches and recomputation under one division."""
    for micro in _MICRO_BATCHES:
        if recipe.train.global_batch_size % micro:
            continue
        for granularity, method, layers, modules in _RECOMPUTATIONS.values():
            if granularity == "selective" and _pointless(recipe, modules):
                continue
            update = {
                "micro_batch_size": micro,
                "recompute_granularity": granularity,
                "recompute_method": method,
                "recompute_num_layers": layers,
                "recompute_modules": modules,
            }
            train = recipe.train.model_copy(update=update)
            yield recipe.model_copy(update={"parallel": parallel, "train": train})


def _pointless(recipe: Recipe, modules: tuple[str, ...]) -> bool:
    """Fused attention keeps nothing that recomputing it would save; a feed-forward part with biases cannot be recomputed."""
    model = recipe.model
    return model.attention_backend == "sdpa" if "core_attn" in modules else model.add_bias_linear


def _with_buckets(section: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The ZeRO section with what `config.deepspeed` would fill in, as far as memory depends on it."""
    filled = {
        "reduce_bucket_size": min(rank_parameters(recipe), _LARGEST_BUCKET),
        "stage3_param_persistence_threshold": 10 * recipe.model.hidden_size,
        **section,
    }
    return {"zero_optimization": filled}


def describe(job: Job) -> dict[str, Any]:
    """The layout in the recipe's own keys: what to put on the command line to get it."""
    parallel, train, zero = job.recipe.parallel, job.recipe.train, ZeroConfig.of(job.deepspeed)
    return {
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "parallel.sequence_parallel": parallel.sequence_parallel,
        "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "parallel.virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.recompute_granularity": train.recompute_granularity,
        "train.recompute_method": train.recompute_method,
        "train.recompute_num_layers": train.recompute_num_layers,
        "train.recompute_modules": list(train.recompute_modules),
        "deepspeed": deepspeed_name(zero),
    }


def deepspeed_name(zero: ZeroConfig) -> str:
    """The shipped DeepSpeed config of that kind."""
    device = zero.offload_param if zero.offload_param != "none" else zero.offload_optimizer
    return f"zero{zero.stage}" + (f"_offload_{device}" if device != "none" else "")


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]
