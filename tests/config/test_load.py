"""Every mistake in a recipe is told, at once, in a sentence that names the key, the value and the way out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from largeformer.config.load import check_world, load_recipe, recipe_yaml
from largeformer.errors import BadInputError
from tests.config.recipes import RECIPE, problems_of, write_recipe

# name: (overrides, the problems, whole and in order)
BAD: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["model.num_layer=3"], ["unknown key model.num_layer; did you mean model.num_layers?"]),
    "key of another section": (["train.lr=1.0"], ["unknown key train.lr; did you mean optimizer.lr?"]),
    "unknown section": (["optimiser.lr=1.0"], ["unknown key optimiser; did you mean optimizer?"]),
    "unknown nested key": (["tracking.wandb.projct=x"], ["unknown key tracking.wandb.projct; did you mean tracking.wandb.project?"]),
    "text for a number": (["train.train_iters=many"], ["train.train_iters is 'many', which should be a whole number"]),
    "truth for a number": (["model.num_layers=true"], ["model.num_layers is true, which should be a whole number"]),
    "fraction for a whole number": (["model.num_layers=4.5"], ["model.num_layers is 4.5, which should be a whole number"]),
    "number for text": (["run.name=7"], ["run.name is 7, which should be text (put it in quotes)"]),
    "text for truth": (["train.compile='yes'"], ["train.compile is 'yes', which should be true or false"]),
    "value for a section": (["checkpoint=5"], ["checkpoint is 5, which should be a section of keys"]),
    "NaN learning rate": (["optimizer.lr=.nan"], ["optimizer.lr is nan, which should be a finite number"]),
    "infinite learning rate": (["optimizer.lr=.inf"], ["optimizer.lr is inf, which should be a finite number"]),
    "below a bound": (["optimizer.lr=0.0"], ["optimizer.lr is 0.0, which should be above 0"]),
    "above a bound": (["model.hidden_dropout=1.0"], ["model.hidden_dropout is 1.0, which should be below 1"]),
    "misspelt choice": (
        ["model.activation=swigul"],
        ["model.activation is 'swigul', which is none of gelu, gelu_tanh, swiglu; did you mean swiglu?"],
    ),
    "misspelt stage": (
        ["run.stages=[prepare, pretrian]"],
        ["run.stages[1] is 'pretrian', which is none of prepare, pretrain, prune, "],
    ),
    "missing in a list": (["data.sources=[{weight: 1.0}]"], ["data.sources[0].path is missing: the recipe must state it"]),
    "empty list": (["data.sources=[]"], ["data.sources is empty: give at least 1"]),
    "override without value": (["train.train_iters"], ["override 'train.train_iters' is not of the form section.key=value, for example"]),
    "override into a value": (["deepspeed.stage=1"], ["override 'deepspeed.stage=1' reaches into deepspeed, which is not a section"]),
    "override of broken YAML": (["data.sources=[{path: x"], ["override 'data.sources=[{path: x': the value is not valid YAML"]),
    "context parallel": (
        ["parallel.context_parallel_size=2"],
        ["parallel.context_parallel_size is 2, which is refused: Megatron-core has"],
    ),
    "expert parallel": (["parallel.expert_model_parallel_size=2"], ["parallel.expert_model_parallel_size is 2, which is refused: mixture"]),
    "experts": (["model.num_moe_experts=8"], ["model.num_moe_experts is 8, which is refused: mixture of experts is not supported yet"]),
    "fp8 switch": (["train.fp8=hybrid"], ["train.fp8 is 'hybrid', which is refused: 8-bit floats are not supported yet"]),
    "fp8 precision": (["train.precision=fp8"], ["train.precision is 'fp8', which is refused: 8-bit floats are not supported yet"]),
    "norm recomputation": (
        ["train.recompute_granularity=selective", "train.recompute_modules=[core_attn, layernorm]"],
        ["train.recompute_modules is ['core_attn', 'layernorm']; layernorm is refused: Megatron-core recomputes norms"],
    ),
    "feed-forward recomputation with biases": (
        ["model.add_bias_linear=true", "train.recompute_granularity=selective", "train.recompute_modules=[mlp]"],
        ["train.recompute_modules mlp does not go with model.add_bias_linear true: the backward of Megatron-core 0.16 would call"],
    ),
    "heads by groups": (
        ["model.num_query_groups=3"],
        ["model.num_attention_heads 4 is not divisible by model.num_query_groups 3; the nearest number of groups that divides it is 2"],
    ),
    "heads and groups by tensor": (
        ["parallel.tensor_model_parallel_size=3", "model.ffn_hidden_size=96"],
        [
            "model.num_attention_heads 4 is not divisible by parallel.tensor_model_parallel_size 3; the nearest degree that divides it is",
            "model.num_query_groups 2 is not divisible by parallel.tensor_model_parallel_size 3; the nearest degree that divides it is 2",
        ],
    ),
    "feed-forward by tensor": (
        ["parallel.tensor_model_parallel_size=2", "model.ffn_hidden_size=97"],
        ["model.ffn_hidden_size 97 is not divisible by parallel.tensor_model_parallel_size 2; the nearest degree that divides it is 1"],
    ),
    "layers by pipeline": (
        ["parallel.pipeline_model_parallel_size=3"],
        ["model.num_layers 4 is not divisible by parallel.pipeline_model_parallel_size 3; the next number of layers that is: 6"],
    ),
    "layers by virtual stages": (
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=3"],
        [
            "model.num_layers 4 is not divisible by parallel.pipeline_model_parallel_size 2 x "
            "parallel.virtual_pipeline_model_parallel_size 3; the next number of layers that is: 6"
        ],
    ),
    "virtual stages alone": (
        ["parallel.virtual_pipeline_model_parallel_size=2"],
        ["parallel.virtual_pipeline_model_parallel_size 2 needs more than parallel.pipeline_model_parallel_size 1; set it to null"],
    ),
    "uneven with virtual stages": (
        [
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
            "parallel.num_layers_in_first_pipeline_stage=1",
        ],
        ["parallel.virtual_pipeline_model_parallel_size 2 excludes parallel.num_layers_in_first_pipeline_stage 1: drop one of them"],
    ),
    "uneven without pipeline": (
        ["parallel.num_layers_in_last_pipeline_stage=1"],
        ["parallel.num_layers_in_last_pipeline_stage 1 needs more than parallel.pipeline_model_parallel_size 1; set it to null"],
    ),
    "uneven split that holds too few": (
        ["model.num_layers=6", "parallel.pipeline_model_parallel_size=3", "parallel.num_layers_in_first_pipeline_stage=1"],
        ["model.num_layers 6 cannot be cut by parallel.pipeline_model_parallel_size 3 with parallel.num_layers_in_first_pipeline_stage 1"],
    ),
    "sequence parallel alone": (
        ["parallel.sequence_parallel=true"],
        ["parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1; it is 1: set sequence_parallel to false"],
    ),
    "sequence by tensor": (
        ["parallel.sequence_parallel=true", "parallel.tensor_model_parallel_size=2", "model.seq_length=31"],
        ["model.seq_length 31 is not divisible by parallel.tensor_model_parallel_size 2, as parallel.sequence_parallel needs"],
    ),
    "hidden by heads": (
        ["model.hidden_size=66"],
        ["model.hidden_size 66 is not divisible by model.num_attention_heads 4: change one of them, or give the size of a head"],
    ),
    "odd head under rope": (["model.kv_channels=15"], ["model.position_embedding rope needs an even head size"]),
    "full recomputation, nothing said": (
        ["train.recompute_granularity=full"],
        [
            "train.recompute_granularity full needs train.recompute_method, which is null: set it to uniform or block",
            "train.recompute_granularity full needs train.recompute_num_layers, which is null: set it to 1 to save most memory",
        ],
    ),
    "recomputation method alone": (
        ["train.recompute_method=block"],
        ["train.recompute_method is block, but train.recompute_granularity is null: set that to full, or train.recompute_method to null"],
    ),
    "selective with layers": (
        ["train.recompute_granularity=selective", "train.recompute_num_layers=1"],
        ["train.recompute_num_layers is 1, but train.recompute_granularity is selective: set that to full"],
    ),
    "ramp-up above the batch": (
        ["train.rampup_batch_size={start: 16, increment: 2, samples: 100}"],
        ["train.rampup_batch_size.start 16 is above train.global_batch_size 8: start lower"],
    ),
    "ramp-up that misses the batch": (
        ["train.rampup_batch_size={start: 3, increment: 2, samples: 100}"],
        ["train.rampup_batch_size.increment 2 does not lead from train.rampup_batch_size.start 3 to train.global_batch_size 8"],
    ),
    "minimum above the learning rate": (["optimizer.min_lr=0.1"], ["optimizer.min_lr 0.1 is above optimizer.lr 0.001"]),
    "warmup without end": (["optimizer.lr_warmup_iters=11"], ["optimizer.lr_warmup_iters 11 is above train_iters 10"]),
    "SGD of DeepSpeed": (
        ["optimizer.type=sgd", "optimizer.backend=deepspeed_cpu"],
        ["optimizer.backend deepspeed_cpu has no SGD (optimizer.type sgd): set optimizer.backend to auto or torch"],
    ),
    "split in two": (["data.split='90,10'"], ["data.split '90,10' is not three shares for training, validation and test"]),
    "no such DeepSpeed config": (["deepspeed=zero5"], ["deepspeed zero5: there is no such file; did you mean zero3?"]),
    "ZeRO 2 under a pipeline": (
        ["deepspeed=zero2", "parallel.pipeline_model_parallel_size=2"],
        ["zero2: ZeRO stage 2 reduces gradients in every backward, which parallel.pipeline_model_parallel_size 2 does not allow"],
    ),
    "bf16 without ZeRO": (["deepspeed=zero0"], ["zero0: ZeRO stage 0 does not train train.precision bf16 correctly"]),
    "fp16 without ZeRO": (
        ["deepspeed=zero0", "train.precision=fp16"],
        ["zero0: ZeRO stage 0 does not train train.precision fp16 correctly"],
    ),
    "five mistakes": (
        [
            "model.num_layer=8",
            "train.micro_batch_size=two",
            "parallel.tensor_model_parallel_size=3",
            "parallel.context_parallel_size=2",
            "optimizer.lr=.nan",
            "model.num_query_groups=4",
            "model.ffn_hidden_size=96",
        ],
        [
            "parallel.context_parallel_size is 2, which is refused",
            "unknown key model.num_layer; did you mean model.num_layers?",
            "train.micro_batch_size is 'two', which should be a whole number",
            "optimizer.lr is nan, which should be a finite number",
            "model.num_attention_heads 4 is not divisible by parallel.tensor_model_parallel_size 3",
            "model.num_query_groups 4 is not divisible by parallel.tensor_model_parallel_size 3",
        ],
    ),
    "rules on what could be read": (
        ["model.num_attention_heads=four", "parallel.pipeline_model_parallel_size=3", "deepspeed=zero3", "optimizer.min_lr=1.0"],
        [
            "model.num_attention_heads is 'four', which should be a whole number",
            "model.num_layers 4 is not divisible by parallel.pipeline_model_parallel_size 3",
            "optimizer.min_lr 1 is above optimizer.lr 0.001",
            "zero3: ZeRO stage 3 reduces gradients in every backward",
        ],
    ),
    "no rule on a value that could not be read": (
        ["parallel.tensor_model_parallel_size=two", "parallel.sequence_parallel=true", "model.hidden_size=65.5", "optimizer.lr=fast"],
        [
            "model.hidden_size is 65.5, which should be a whole number",
            "parallel.tensor_model_parallel_size is 'two', which should be a whole number",
            "optimizer.lr is 'fast', which should be a number",
        ],
    ),
    "no rule on what follows from it, the feed-forward": (
        ["model.hidden_size=wide", "model.num_attention_heads=6", "model.num_query_groups=6", "parallel.tensor_model_parallel_size=3"],
        ["model.hidden_size is 'wide', which should be a whole number"],
    ),
    "no rule on what follows from it, the groups": (
        ["model.num_attention_heads=four", "model.num_query_groups=null", "parallel.tensor_model_parallel_size=2"],
        ["model.num_attention_heads is 'four', which should be a whole number"],
    ),
}


@pytest.mark.parametrize(("overrides", "expected"), BAD.values(), ids=BAD)
def test_bad_recipe_is_told_whole(overrides: list[str], expected: list[str], tmp_path: Path) -> None:
    problems = problems_of(tmp_path, *overrides)
    assert len(problems) == len(expected), problems
    for problem, sentence in zip(problems, expected, strict=True):
        assert problem.startswith(sentence)


FILES = {
    "malformed": ("model:\n  a: [1\n  b: 2\n", "line 3 column 4, is not valid YAML"),
    "a tab": ("model:\n\tnum_layers: 4\n", "line 2 column 1, is not valid YAML"),
    "two documents": ("model: {}\n---\nmodel: {}\n", "line 2 column 1, is not valid YAML"),
    "a list": ("- model\n", "holds a list, not sections"),
    "empty": ("# nothing\n", "holds nothing, not sections"),
    "python object": ("model: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    "endless": ("model: &m {a: *m}\n", "is not valid YAML"),
    "key twice": (RECIPE + "deepspeed: zero2\n", "key deepspeed stands twice, in lines 7 and 8: keep one"),
    "key twice in a section": (RECIPE.replace("lr: 1.0e-3", "lr: 1.0e-3, lr: 2.0e-3"), "key lr stands twice, in lines 6 and 6"),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES)
def test_bad_file(text: str, expected: str, tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, text=text)
    assert problem.startswith(f"recipe {tmp_path / 'small.yaml'}")
    assert expected in problem


def test_required_sections_are_named(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, text="model: {num_layers: 2}\n")
    missing = ["model.hidden_size", "model.num_attention_heads", "model.seq_length", "tokenizer", "train", "optimizer"]
    assert problems == [f"{key} is missing: the recipe must state it" for key in missing]


def test_no_such_recipe_names_the_nearest() -> None:
    with pytest.raises(BadInputError, match=r"no recipe quikstart; did you mean quickstart\? \(shipped: .*llama-8b"):
        load_recipe("quikstart")


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="is a folder"):
        load_recipe(str(tmp_path))


def test_values_are_read_as_the_writer_meant_them(tmp_path: Path) -> None:
    overrides = ["optimizer.lr=1e-3", "optimizer.min_lr=5E-5", "optimizer.eps=1.e-7", "optimizer.clip_grad=1", "tokenizer.model='1e3'"]
    overrides += ["data.sources=[{path: a, weight: 2}, {path: b}]", "train.rampup_batch_size.start=4"]
    overrides += ["train.rampup_batch_size.increment=2", "train.rampup_batch_size.samples=8", "model.num_query_groups="]
    recipe = load_recipe(write_recipe(tmp_path), overrides)
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.eps, optimizer.clip_grad) == (1e-3, 5e-5, 1e-7, 1.0)
    assert recipe.tokenizer.model == "1e3"
    assert [(source.path, source.weight) for source in recipe.data.sources] == [("a", 2.0), ("b", 1.0)]
    assert recipe.train.rampup_batch_size is not None and recipe.train.rampup_batch_size.start == 4
    assert recipe.model.query_groups == 4


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load_recipe(write_recipe(tmp_path), ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize("idle", ["parallel.context_parallel_size=1", "parallel.expert_model_parallel_size=1", "train.fp8=null"])
def test_what_asks_for_nothing_is_dropped(idle: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    assert load_recipe(path, [idle]) == load_recipe(path)


def test_resolved_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["train.rampup_batch_size={start: 4, increment: 2, samples: 8}", "run.name='1e5'"])
    assert load_recipe(write_recipe(tmp_path, recipe_yaml(recipe))) == recipe


def test_deepspeed_config_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "mine.json").write_text('{"zero_optimization": {"stage": 1}}')
    path = write_recipe(folder, RECIPE.replace("zero1", "mine.json"))
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path).deepspeed == str(folder / "mine.json")
    monkeypatch.chdir(folder)
    assert load_recipe(os.path.basename(path)).deepspeed == "mine.json"
    (folder / "mine.json").unlink()
    assert load_recipe(path, with_deepspeed=False).deepspeed == "mine.json"


WORLDS = {
    "fits": ([], 4, None),
    "degrees": (["parallel.tensor_model_parallel_size=2"], 3, "world size 3 does not fit: parallel.tensor_model_parallel_size 2 x"),
    "batch": ([], 3, "train.global_batch_size 8 is not a multiple of train.micro_batch_size 2 x data parallel 3 = 6; the nearest"),
    "ramp-up": (
        ["train.rampup_batch_size={start: 2, increment: 2, samples: 8}"],
        2,
        "train.rampup_batch_size passes through 2 samples: train.global_batch_size 2 is not a multiple",
    ),
    "interleaving": (
        [
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
            "train.global_batch_size=6",
        ],
        2,
        "train.global_batch_size 6 gives 3 microbatches a rank; the interleaved schedule needs a multiple of "
        "parallel.pipeline_model_parallel_size 2, such as a batch of 8",
    ),
}


@pytest.mark.parametrize(("overrides", "world_size", "expected"), WORLDS.values(), ids=WORLDS)
def test_world_size(overrides: list[str], world_size: int, expected: str | None, tmp_path: Path) -> None:
    problems = check_world(load_recipe(write_recipe(tmp_path), overrides), {}, world_size)
    assert len(problems) == (expected is not None)
    assert expected is None or problems[0].startswith(expected)
