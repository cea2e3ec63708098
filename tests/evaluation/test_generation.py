"""Generation: the cache changes nothing, Hugging Face draws the same, filters are exact, tensor-parallel ranks agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from largeformer.config.checks import recipe_problems
from largeformer.config.schema import GenerateConfig, Recipe
from largeformer.errors import BadInputError
from largeformer.evaluation.generation import CachedDecoder, distribution, draw, generate, inference_recipe
from largeformer.models.gpt import build_gpt
from largeformer.models.hf_config import architecture, hugging_face_config
from largeformer.models.hf_mapping import to_hugging_face
from largeformer.parallel.device import prepare_device
from largeformer.parallel.groups import create_groups, destroy_groups
from tests.distributed import RankContext, RankPool
from tests.one_process import CPU, Built
from tests.recipes import GPT2, LLAMA, tiny_recipe

EOD = 2
GREEDY = GenerateConfig(max_new_tokens=10, temperature=0.0)
PROMPTS = [[5, 9, 14, 3], [7], [], [11, 12, 13, 14, 15, 16, 17]]

# Weights of ordinary size make a random model's argmax hang on rounding; large ones make it decided.
SHAPES: dict[str, dict[str, Any]] = {
    "rope, grouped": {**LLAMA, "init_method_std": 0.2},
    "rope, grouped, local attention": {**LLAMA, "init_method_std": 0.2, "attention_backend": "local"},
    "learned": {**GPT2, "init_method_std": 0.2},
    "learned, local attention": {**GPT2, "init_method_std": 0.2, "attention_backend": "local"},
    "no positions": {**LLAMA, "init_method_std": 0.2, "position_embedding": "none"},
}


def uncached_logits(built: Built, tokens: Sequence[int]) -> torch.Tensor:
    """[s, v] for one row, with a pass over all of it."""
    row = torch.tensor([tokens])
    with torch.no_grad():
        return built.model.eval()(row, torch.arange(len(tokens))[None], None)[0]


def uncached_greedy(built: Built, prompt: Sequence[int], settings: GenerateConfig, vocab_size: int, limit: int) -> list[int]:
    tokens = list(prompt) or [EOD]
    new: list[int] = []
    while len(new) < settings.max_new_tokens and len(tokens) < limit:
        token = int(uncached_logits(built, tokens)[-1, :vocab_size].argmax())
        if token == EOD:
            break
        tokens.append(token)
        new.append(token)
    return new


@pytest.mark.parametrize("name", SHAPES)
def test_cached_logits_equal_uncached(name: str, one_process: Callable[[Recipe], Built]) -> None:
    built = one_process(tiny_recipe(model=SHAPES[name]))
    rows = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1)).tolist()
    expected = torch.stack([uncached_logits(built, row) for row in rows])
    decoder = CachedDecoder(built.model.eval(), 2, 32, CPU)
    with torch.no_grad():
        steps = [decoder.advance([row[:5] for row in rows])]
        steps += [decoder.advance([row[at : at + 1] for row in rows]) for at in range(5, 9)]
    torch.testing.assert_close(torch.stack(steps, dim=1), expected[:, 4:], rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_equals_uncached(name: str, one_process: Callable[[Recipe], Built]) -> None:
    built = one_process(tiny_recipe(model=SHAPES[name]))
    built.model.train()
    together = generate([built.model], built.groups, PROMPTS, GREEDY, EOD, CPU)
    assert built.model.training, "the mode is left as it was"
    assert together == [uncached_greedy(built, prompt, GREEDY, 250, 32) for prompt in PROMPTS]
    assert len({tuple(new) for new in together}) == len(PROMPTS), "the prompts must matter"
    assert together == [generate([built.model], built.groups, [prompt], GREEDY, EOD, CPU)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["rope, grouped", "learned"])
def test_greedy_equals_hugging_face(name: str, one_process: Callable[[Recipe], Built]) -> None:
    transformers = pytest.importorskip("transformers")
    recipe = tiny_recipe(model=SHAPES[name])
    built = one_process(recipe)
    config = transformers.AutoConfig.for_model(**hugging_face_config(recipe.model, 250))
    twin = getattr(transformers, architecture(recipe.model).name)(config).eval()
    twin.load_state_dict(to_hugging_face(built.weights(), recipe.model), strict=False)
    twin.tie_weights()
    ours = generate([built.model], built.groups, PROMPTS, GREEDY, EOD, CPU)
    for prompt, new in zip(PROMPTS, ours, strict=True):
        start = torch.tensor([prompt or [EOD]])
        theirs = twin.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=10, do_sample=False, eos_token_id=EOD, pad_token_id=0
        )
        assert new == [token for token in theirs[0, start.shape[1] :].tolist() if token != EOD]


def test_stops_at_eod_at_the_limit_and_when_full(one_process: Callable[[Recipe], Built]) -> None:
    built = one_process(tiny_recipe(model={"init_method_std": 0.2}))

    def new(prompt: list[int], eod: int = EOD, **settings: Any) -> list[int]:
        return generate([built.model], built.groups, [prompt], GREEDY.model_copy(update=settings), eod, CPU)[0]

    tokens = new([5, 9])
    assert len(tokens) == 10
    last = next(index for index in range(1, 10) if tokens[index] not in tokens[:index])
    assert new([5, 9], eod=tokens[last]) == tokens[:last]
    assert generate([built.model], built.groups, [[5, 9]], GREEDY, EOD, CPU, ends=[EOD, tokens[last]]) == [tokens[:last]]
    assert new([5, 9], max_new_tokens=3) == tokens[:3]
    assert len(new([5, 9] * 14, max_new_tokens=100)) == 4, "28 of 32 positions were taken"
    assert new([5, 9] * 16) == []
    assert generate([built.model], built.groups, [], GREEDY, EOD, CPU) == []
    # A row that is full, or at its end, goes along with one that is not.
    assert generate([built.model], built.groups, [[5, 9] * 16, [5, 9]], GREEDY, EOD, CPU) == [[], tokens]


def test_the_cache_is_as_long_as_the_longest_row_may_get(one_process: Callable[[Recipe], Built], monkeypatch: pytest.MonkeyPatch) -> None:
    built, lengths = one_process(tiny_recipe()), []

    class Watched(CachedDecoder):
        def __init__(self, model: object, batch: int, max_length: int, device: torch.device) -> None:
            lengths.append(max_length)
            super().__init__(model, batch, max_length, device)

    monkeypatch.setattr("largeformer.evaluation.generation.CachedDecoder", Watched)
    for prompts in ([[5, 6, 7], [8]], [[5] * 30, [6]]):
        made = generate([built.model], built.groups, prompts, GREEDY.model_copy(update={"max_new_tokens": 4}), EOD, CPU)
        assert [len(row) for row in made] == [min(4, 32 - len(prompt)) for prompt in prompts]
    assert lengths == [7, 32]


def test_bad_prompts_are_refused_all_at_once(one_process: Callable[[Recipe], Built]) -> None:
    built = one_process(tiny_recipe())
    with pytest.raises(BadInputError) as raised:
        generate([built.model], built.groups, [[1] * 33, [3], [250]], GREEDY, EOD, CPU)
    assert raised.value.problems == [
        "prompt 1 has 33 tokens, model.seq_length is 32; shorten the prompt",
        "prompt 3 holds the id 250, the vocabulary has 250; use the model's own tokenizer",
    ]
    built.model.decoder.final_layernorm.weight.data.fill_(float("nan"))
    with pytest.raises(BadInputError, match="not finite"):
        generate([built.model], built.groups, [[1]], GREEDY, EOD, CPU)


def test_padded_ids_are_never_drawn(one_process: Callable[[Recipe], Built]) -> None:
    recipe = tiny_recipe(tokenizer={"vocab_size": 249}, model={"position_embedding": "none"})
    built = one_process(recipe)
    # Of all ids the padding is made by far the likeliest.
    built.model.output_layer.weight.data[249:] = 1000.0 * built.model.decoder.final_layernorm.weight.data
    built.model.output_layer.weight.data[:249] = 0.0
    for temperature in (0.0, 1.0):
        settings = GenerateConfig(max_new_tokens=20, temperature=temperature, top_p=1.0)
        (new,) = generate([built.model], built.groups, [[1, 2]], settings, EOD, CPU)
        assert all(token < 249 for token in new)


def test_draws_follow_seed_and_place_alone(one_process: Callable[[Recipe], Built]) -> None:
    built = one_process(tiny_recipe())
    settings = GenerateConfig(max_new_tokens=12, temperature=1.0, top_p=1.0)

    def new(prompts: list[list[int]], seed: int = 0) -> list[list[int]]:
        return generate([built.model], built.groups, prompts, settings.model_copy(update={"seed": seed}), EOD, CPU)

    first = new([[5, 9], [5, 9]])
    torch.manual_seed(99)
    assert new([[5, 9], [5, 9]]) == first
    assert first[0] != first[1]
    assert new([[5, 9], [5, 9]], seed=1) != first
    assert new([[5, 9], [3, 4, 8]])[0] == first[0], "another prompt in the batch must not change a draw"


FILTERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.5, "top_p": 1.0},
    "top-k": {"temperature": 1.0, "top_k": 7, "top_p": 1.0},
    "top-k beyond the vocabulary": {"temperature": 1.0, "top_k": 1000, "top_p": 1.0},
    "top-k of one": {"temperature": 1.0, "top_k": 1, "top_p": 1.0},
    "top-p": {"temperature": 1.0, "top_p": 0.6},
    "top-p below the likeliest": {"temperature": 1.0, "top_p": 0.001},
    "all three": {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
}


@pytest.mark.parametrize("name", FILTERS)
def test_distribution_equals_hugging_face(name: str) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    settings = GenerateConfig(**FILTERS[name])
    logits = 2.0 * torch.randn(5, 50, generator=torch.Generator().manual_seed(4))
    expected = process.TemperatureLogitsWarper(settings.temperature)(None, logits)
    if settings.top_k:
        expected = process.TopKLogitsWarper(settings.top_k)(None, expected)
    if settings.top_p < 1.0:
        expected = process.TopPLogitsWarper(settings.top_p)(None, expected)
    ours = distribution(logits, settings)
    assert torch.equal(ours > 0, torch.isfinite(expected))
    torch.testing.assert_close(ours, expected.softmax(dim=-1))


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square over 4,000 draws of 6 ids: below 20.5, its 99.9 % point at 5 degrees of freedom; the seed is fixed."""
    logits = torch.log(torch.tensor([[0.4, 0.25, 0.15, 0.1, 0.07, 0.03]]))
    settings = GenerateConfig(temperature=1.0, top_p=1.0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw(logits, settings, [generator]) for _ in range(4000)])
    expected = 4000 * logits.exp()[0]
    counts = torch.bincount(drawn, minlength=6)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


def generated(ranks: RankContext, recipe: Recipe, settings: GenerateConfig) -> list[list[int]]:
    device = prepare_device(0)
    groups = create_groups(recipe.layout(ranks.world_size))
    chunks, _ = build_gpt(recipe, groups, device)
    torch.manual_seed(ranks.rank)  # ranks whose global states differ must agree all the same
    new = generate(chunks, groups, PROMPTS, settings, EOD, device)
    destroy_groups()
    return new


SAMPLED = GenerateConfig(max_new_tokens=10, temperature=0.7, top_k=40, seed=3)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["rope, grouped", "learned"])
def test_tensor_parallel_draws_the_same(
    name: str, settings: GenerateConfig, ranks: Callable[[int], RankPool], one_process: Callable[[Recipe], Built]
) -> None:
    built = one_process(tiny_recipe(model=SHAPES[name]))
    alone = generate([built.model], built.groups, PROMPTS, settings, EOD, CPU)
    trained_with = tiny_recipe(model=SHAPES[name], parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True})
    assert ranks(2).run(generated, inference_recipe(trained_with), settings) == [alone, alone]


def test_inference_recipe_keeps_all_but_what_generation_cannot_run() -> None:
    parallel = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    }
    recipe = tiny_recipe(parallel=parallel, train={"compile": True, "recompute_granularity": "full"})
    expected = tiny_recipe(parallel={"tensor_model_parallel_size": 2})
    assert inference_recipe(recipe) == expected


def test_a_model_that_was_trained_with_recomputation_fits_its_inference_layout() -> None:
    training = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    recipe = tiny_recipe(train=training, parallel={"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2})
    assert recipe_problems(recipe) == [] == recipe_problems(inference_recipe(recipe))
