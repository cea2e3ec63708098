"""Text from a model, token by token, with a cache of keys and values.

`b` prompts at once, `v` vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist

from largeformer.config.schema import GenerateConfig, Recipe
from largeformer.errors import BadInputError
from largeformer.parallel.groups import ParallelGroups


def inference_recipe(recipe: Recipe) -> Recipe:
    """`recipe` as generation can run it: one pipeline stage, no sequence parallelism, nothing compiled; tensor parallelism stays.

    Megatron-core decodes neither over virtual stages nor a sequence that one new token cannot be cut from. Build the model
    from this recipe and load the weights, which any layout can.
    """
    parallel = recipe.parallel.model_copy(
        update={
            "pipeline_model_parallel_size": 1,
            "virtual_pipeline_model_parallel_size": None,
            "num_layers_in_first_pipeline_stage": None,
            "num_layers_in_last_pipeline_stage": None,
            "sequence_parallel": False,
        }
    )
    not_trained = {"compile": False, **dict.fromkeys(("recompute_granularity", "recompute_method", "recompute_num_layers"))}
    train = recipe.train.model_copy(update=not_trained)
    return recipe.model_copy(update={"parallel": parallel, "train": train})


# Not inference mode: the library keeps the rotary table that the first call makes, and training may need it afterwards.
@torch.no_grad()
def generate(
    chunks: Sequence[Any],
    groups: ParallelGroups,
    prompts: Sequence[Sequence[int]],
    settings: GenerateConfig,
    eod: int,
    device: torch.device,
    ends: Collection[int] = (),
) -> list[list[int]]:
    """Continue each prompt until it draws `eod` or one of `ends`, has `max_new_tokens`, or fills the model's sequence length.

    An empty prompt starts from `eod`, as a document does in training. A prompt's draws depend on the seed and on its place
    among the prompts alone. Collective over the tensor-parallel group, whose ranks all get the same tokens.

    Returns: the new tokens of each prompt, without the one that ended it.
    Raises BadInputError for a prompt that is longer than the sequence length or holds an id outside the vocabulary.
    """
    model = _whole_model(chunks, groups)
    limit, vocab_size = model.max_sequence_length, model.output_layer.vocab_size
    starts = [list(prompt) or [eod] for prompt in prompts]
    _check_prompts(starts, limit, vocab_size)
    rows = [_Row(start, min(len(start) + settings.max_new_tokens, limit)) for start in starts]
    generators = [torch.Generator().manual_seed(((settings.seed << 16) + index) % 2**63) for index in range(len(rows))]
    was_training = model.training
    model.eval()
    decoder = CachedDecoder(model, len(rows), max((row.limit for row in rows), default=0), device)
    ending, done = {eod, *ends}, 0  # tokens of every row that the cache holds
    while not all(row.finished for row in rows):
        # Prompts differ in length: the shortest sets the prefill, and the longer ones are fed on until they are through.
        known = min(len(row.tokens) for row in rows)
        logits = decoder.advance([row.tokens[done:known] for row in rows])
        done = known
        waiting = [index for index, row in enumerate(rows) if len(row.tokens) == done]
        drawn = draw(logits[waiting, :vocab_size], settings, [generators[index] for index in waiting])
        dist.broadcast(drawn, src=dist.get_global_rank(groups.tensor, 0), group=groups.tensor)
        for index, token in zip(waiting, drawn.tolist(), strict=True):
            rows[index].append(token, ending)
    model.train(was_training)
    return [row.new for row in rows]


class CachedDecoder:
    """Feeds a model a growing batch, of which it has to see only the new tokens."""

    def __init__(self, model: Any, batch: int, max_length: int, device: torch.device) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext

        self._model, self._device = model, device
        self._context = StaticInferenceContext(batch, max_length)

    def advance(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """tokens: the next of each row, equally many; several in the first call (prefill), one in later ones.

        Returns: logits of what follows the last, [b, v] with the padded vocabulary of all tensor-parallel ranks.
        """
        new = torch.tensor(tokens, dtype=torch.int64, device=self._device)
        start, length = self._context.sequence_len_offset, new.shape[1]
        assert start == 0 or length == 1, "a later call with several tokens would need a mask of its own"
        positions = torch.arange(start, start + length, device=self._device).expand_as(new)
        logits = self._model(new, positions, None, inference_context=self._context, runtime_gather_output=True)
        self._context.sequence_len_offset += length
        self._context.enable_decode_mode()
        return logits[:, -1]  # type: ignore[no-any-return]


def draw(logits: torch.Tensor, settings: GenerateConfig, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One token for each row of logits [b, v]: the most likely at temperature 0, else drawn. Returns: int64[b], on their device.

    Draws are made on the CPU, in float32: the same seed gives the same tokens on every device that computes the same logits.
    """
    scores = logits.float().cpu()
    if not torch.isfinite(scores).all():
        raise BadInputError("the model's logits are not finite, so nothing can be generated; load a checkpoint from before it diverged")
    if settings.temperature == 0.0:
        return scores.argmax(dim=-1).to(logits.device)
    probabilities = distribution(scores, settings)
    drawn = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)


def distribution(logits: torch.Tensor, settings: GenerateConfig) -> torch.Tensor:
    """The probabilities that tokens are drawn from: after temperature, then top-k, then top-p. float32[b, v] -> float32[b, v].

    top_k 0 keeps all. top_p keeps the likeliest tokens until they hold that mass, the one that reaches it included
    (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
    """
    scores = logits / settings.temperature
    if 0 < settings.top_k < scores.shape[-1]:
        least = scores.topk(settings.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if settings.top_p < 1.0:
        ordered, order = scores.softmax(dim=-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        beyond = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before >= settings.top_p)
        scores = scores.masked_fill(beyond, float("-inf"))
    return scores.softmax(dim=-1)


class _Row:
    """One prompt and what has been added to it, up to `limit` tokens in all."""

    def __init__(self, prompt: list[int], limit: int) -> None:
        self.tokens, self.limit, self._prompt_length = list(prompt), limit, len(prompt)
        self._ended_at: int | None = None if len(prompt) < limit else len(prompt)

    @property
    def finished(self) -> bool:
        return self._ended_at is not None

    @property
    def new(self) -> list[int]:
        return self.tokens[self._prompt_length : self._ended_at]

    def append(self, token: int, ending: Collection[int]) -> None:
        """Add a drawn token. A finished row grows on, so that the batch stays rectangular; what it adds is not returned."""
        self.tokens.append(token)
        if self.finished:
            return
        if token in ending:
            self._ended_at = len(self.tokens) - 1
        elif len(self.tokens) == self.limit:
            self._ended_at = self.limit


def _whole_model(chunks: Sequence[Any], groups: ParallelGroups) -> Any:
    assert len(chunks) == 1 and groups.layout.pipeline == 1, "generation runs at one pipeline stage; see inference_recipe"
    (model,) = chunks
    assert not model.config.sequence_parallel, "generation runs without sequence parallelism; see inference_recipe"
    return model


def _check_prompts(prompts: Sequence[Sequence[int]], limit: int, vocab_size: int) -> None:
    problems = []
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > limit:
            problems.append(f"prompt {number} has {len(prompt)} tokens, model.seq_length is {limit}; shorten the prompt")
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            problems.append(f"prompt {number} holds the id {outside[0]}, the vocabulary has {vocab_size}; use the model's own tokenizer")
    if problems:
        raise BadInputError(problems)
