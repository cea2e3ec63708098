"""What `bench` compares: largeformer under DeepSpeed, and loops without it.

Megatron-core and DeepSpeed are imported when a candidate is built, after the world has been entered.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.parallel.batch import Batch
from largeformer.stages.common.world import World

ENGINE, BARE, PLAIN = "largeformer", "largeformer, bare optimizer", "plain PyTorch"
COMPILED, HUGGING_FACE = "plain PyTorch, compiled", "Hugging Face"
Step = Callable[[], object]


@dataclass(frozen=True)
class Candidate:
    """Something to be measured. `build` makes it, when its turn comes to warm up; its step then trains on `tokens` tokens."""

    name: str
    tokens: int
    build: Callable[[], Step]


def candidates(recipe: Recipe, world: World, compiled: bool = True) -> list[Candidate]:
    """What is compared. On several ranks every rank runs a plain loop of its own, the whole model and no communication: the
    best that any plain data-parallel loop could do."""
    train, ranks = recipe.train, world.info.world_size
    alone = ranks == 1
    engine_batches = train.global_batch_size // (train.micro_batch_size * world.groups.layout.data)
    plain_batches = max(1, train.global_batch_size // (train.micro_batch_size * ranks))
    plain_tokens = ranks * plain_batches * train.micro_batch_size * recipe.model.seq_length
    all_tokens = train.global_batch_size * recipe.model.seq_length
    batches = _mock_batches(recipe, max(engine_batches, plain_batches), world)
    own = batches[:plain_batches]
    made = [Candidate(ENGINE, all_tokens, lambda: _engine(recipe, world, batches[:engine_batches]))]
    if alone:
        made.append(Candidate(BARE, all_tokens, lambda: _bare(recipe, world, batches[:engine_batches])))
    made.append(Candidate(PLAIN, plain_tokens, lambda: _plain(recipe, world.device, own)))
    if compiled and _can_compile(world.device):
        made.append(Candidate(COMPILED, plain_tokens, lambda: _plain(recipe, world.device, own, compiled=True)))
    if alone and importlib.util.find_spec("transformers") and _has_architecture(recipe):
        made.append(Candidate(HUGGING_FACE, plain_tokens, lambda: _hugging_face(recipe, world.device, own)))
    return made


def _engine(recipe: Recipe, world: World, batches: Sequence[Batch]) -> Step:
    from largeformer.models.gpt import build_gpt
    from largeformer.training.engine import build_engine

    chunks, shards = build_gpt(recipe, world.groups, world.device)
    engine = build_engine(recipe, chunks, shards, world.groups, world.deepspeed)
    return lambda: engine.train_step(batches, recipe.optimizer.lr)


def _bare(recipe: Recipe, world: World, batches: Sequence[Batch]) -> Step:
    """The same model under a torch optimizer that does the same arithmetic as the engine (fp32 masters and accumulation)."""
    from largeformer.models.gpt import build_gpt
    from largeformer.parallel.pipeline import forward_loss
    from largeformer.training.engine import compile_layers
    from largeformer.training.plain_loop import PlainLoop

    (model,), _ = build_gpt(recipe, world.groups, world.device)
    if recipe.train.compile:
        compile_layers([model])
    loop = PlainLoop(
        lambda batch: forward_loss(model, batch), model.parameters(), recipe.optimizer, masters=recipe.train.precision != "fp32"
    )
    return lambda: loop.step(batches)


def _plain(recipe: Recipe, device: torch.device, batches: Sequence[Batch], compiled: bool = False) -> Step:
    """bf16 means bf16 parameters that the optimizer steps as they are: the least work that a hand-written loop can do. fp16 is
    timed as bf16, which needs no loss scaling."""
    from largeformer.models.plain import PlainGPT
    from largeformer.training.plain_loop import PlainLoop

    with torch.device(device):
        plain = PlainGPT(recipe.model, recipe.tokenizer.vocab_size).to(_dtype(recipe))
    model = torch.compile(plain) if compiled else plain

    def loss_of(batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = model(batch.tokens, batch.labels, batch.loss_mask)
        return loss

    loop = PlainLoop(loss_of, plain.parameters(), recipe.optimizer, masters=False)
    return lambda: loop.step(batches)


def _hugging_face(recipe: Recipe, device: torch.device, batches: Sequence[Batch]) -> Step:
    from transformers import AutoConfig, AutoModelForCausalLM

    from largeformer.models.hf_config import hugging_face_config
    from largeformer.training.plain_loop import PlainLoop

    config = AutoConfig.for_model(**hugging_face_config(recipe.model, recipe.tokenizer.vocab_size))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=_dtype(recipe), attn_implementation="sdpa").train()

    def loss_of(batch: Batch) -> torch.Tensor:
        logits = model(batch.tokens, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="none")
        return (losses * batch.loss_mask.flatten()).sum()

    loop = PlainLoop(loss_of, model.parameters(), recipe.optimizer, masters=False)
    return lambda: loop.step(batches)


def _mock_batches(recipe: Recipe, count: int, world: World) -> list[Batch]:
    """Random tokens; the ranks that share a copy of the model get the same."""
    shape = (recipe.train.micro_batch_size, recipe.model.seq_length)
    generator = torch.Generator().manual_seed(recipe.run.seed + world.groups.coordinates.data)
    positions = torch.arange(shape[1]).expand(shape)
    made = []
    for _ in range(count):
        tokens, labels = (torch.randint(0, recipe.tokenizer.vocab_size, shape, generator=generator) for _ in range(2))
        made.append(Batch(tokens, labels, torch.ones(shape), positions).to(world.device))
    return made


def _dtype(recipe: Recipe) -> torch.dtype:
    return torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16


def _can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` has what it generates code for: a C++ compiler, and Triton for GPUs."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    return compiler is not None and (device.type != "cuda" or importlib.util.find_spec("triton") is not None)


def _has_architecture(recipe: Recipe) -> bool:
    from largeformer.models.hf_config import architecture

    try:
        architecture(recipe.model)
    except BadInputError:
        return False
    return True
