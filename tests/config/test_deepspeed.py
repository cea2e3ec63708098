"""The DeepSpeed dict: filled from the recipe, refused where the two disagree, and understood by DeepSpeed itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from largeformer.config.deepspeed import ZeroConfig, deepspeed_problems, load_deepspeed, resolve_deepspeed
from largeformer.config.deepspeed_keys import REFUSED, SECTIONS, TOP_LEVEL
from largeformer.config.load import load_recipe
from largeformer.config.resources import shipped_deepspeed, shipped_recipes
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from tests.config.recipes import write_recipe

WORLDS = {"compress": 1, "quickstart": 2, "gpt2-125m": 8, "llama-1b": 8, "llama-8b": 16, "llama-70b": 128}


def recipe_with(folder: Path, raw: dict[str, Any] | str, *overrides: str) -> Recipe:
    """The small recipe beside a DeepSpeed config `ds.json`, which is not checked yet."""
    (folder / "ds.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return load_recipe(write_recipe(folder), [f"deepspeed={folder / 'ds.json'}", *overrides], with_deepspeed=False)


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


NVME = {"device": "nvme", "nvme_path": "auto"}
# name: (the JSON, overrides of the recipe, the problems, each after the name of the file)
BAD: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "unknown key": (zero(1) | {"gradient_cliping": 1.0}, [], ["unknown key gradient_cliping; did you mean gradient_clipping?"]),
    "unknown key of ZeRO": (zero(1, overlap_com=True), [], ["unknown key zero_optimization.overlap_com; did you mean overlap_comm?"]),
    "unknown key of offload": (
        zero(2, offload_optimizer={"device": "cpu", "pinned_memory": True}),
        [],
        ["unknown key zero_optimization.offload_optimizer.pinned_memory; did you mean pin_memory?"],
    ),
    "an optimizer": (zero(1) | {"optimizer": {"type": "Adam"}}, [], ["optimizer is refused, because the recipe owns it"]),
    "a removed feature": (zero(1) | {"amp": {"enabled": True}}, [], ["amp is refused, because DeepSpeed has removed it"]),
    "a sum for a mean": (zero(1) | {"gradient_allreduce_op": "sum"}, [], ["gradient_allreduce_op is refused, because the loss is a mean"]),
    "no gradient norm": (zero(1, compute_grad_norm=False), [], ["zero_optimization.compute_grad_norm is refused, because clipping"]),
    "ZeRO as a switch": ({"zero_optimization": True}, [], ["zero_optimization is true, which should be a section of keys"]),
    "stage 4": (zero(4), [], ["zero_optimization.stage is 4, which should be 0, 1, 2 or 3"]),
    "stage true": ({"zero_optimization": {"stage": True}}, [], ["zero_optimization.stage is true, which should be 0, 1, 2 or 3"]),
    "offload to disk": (
        zero(3, offload_optimizer={"device": "disk"}),
        [],
        ["zero_optimization.offload_optimizer.device is 'disk', which is none of none, cpu, nvme"],
    ),
    "micro batch": (
        zero(1) | {"train_micro_batch_size_per_gpu": 4},
        [],
        ["train_micro_batch_size_per_gpu is 4, but in the recipe train.micro_batch_size is 2"],
    ),
    "global batch": (zero(1) | {"train_batch_size": 16}, [], ["train_batch_size is 16, but in the recipe train.global_batch_size is 8"]),
    "accumulation": (
        zero(1) | {"gradient_accumulation_steps": 4},
        [],
        ["gradient_accumulation_steps is 4, but in the recipe train.global_batch_size / (train.micro_batch_size x data parallel) is 2"],
    ),
    "clipping": (zero(1) | {"gradient_clipping": 0.5}, [], ["gradient_clipping is 0.5, but in the recipe optimizer.clip_grad is 1.0"]),
    "precision": (
        zero(1) | {"fp16": {"enabled": True}, "bf16": {"enabled": False}},
        [],
        [
            "bf16.enabled is false, but in the recipe train.precision is bf16",
            "fp16.enabled is true, but in the recipe train.precision is bf16",
        ],
    ),
    "loss scale": (
        zero(1) | {"fp16": {"enabled": True, "initial_scale_power": 12}},
        ["train.precision=fp16"],
        ["fp16.initial_scale_power is 12, but in the recipe train.initial_loss_scale_power is 16"],
    ),
    "delayed gradient update": (
        zero(1) | {"bf16": {"enabled": True, "immediate_grad_update": False}},
        [],
        ["bf16.immediate_grad_update false fails with accumulation in fp32"],
    ),
    "ZeRO 3 under a pipeline": (zero(3), ["parallel.pipeline_model_parallel_size=2"], ["ZeRO stage 3 reduces gradients in every backward"]),
    "overlap under a pipeline": (
        zero(1, overlap_comm=True),
        ["parallel.pipeline_model_parallel_size=2"],
        ["zero_optimization.overlap_comm true leaves gradients unreduced with parallel.pipeline_model_parallel_size 2"],
    ),
    "what checkpoints would scramble": (
        zero(2, round_robin_gradients=True),
        [],
        ["zero_optimization.round_robin_gradients is refused, because checkpoints would get one parameter's state for another's"],
    ),
    "gradients scaled before they are reduced": (
        zero(2) | {"prescale_gradients": True},
        [],
        ["prescale_gradients true does not go with ZeRO stage 2"],
    ),
    "modules gathered whole": (
        zero(3, stage3_module_granularity_threshold=1000),
        [],
        ["zero_optimization.stage3_module_granularity_threshold is refused, because modules that are gathered whole fail"],
    ),
    "a part of the optimizer on the GPU": (
        zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        [],
        ["zero_optimization.offload_optimizer.ratio is refused, because what stays on the GPU would train at a constant rate"],
    ),
    "masters that are not float32": (
        zero(2) | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
        [],
        [
            "bf16.bf16_master_weights_and_grads is refused, because masters and moments are float32",
            "bf16.bf16_optimizer_states is refused, because masters and moments are float32",
        ],
    ),
    "bf16 without ZeRO": ({}, [], ["ZeRO stage 0 does not train train.precision bf16 correctly"]),
    "offload without ZeRO": (
        zero(0, offload_optimizer={"device": "cpu"}),
        ["train.precision=fp32"],
        ["offload_optimizer to cpu needs ZeRO stage 1 or above, not 0"],
    ),
    "NVMe without ZeRO 3": (zero(2, offload_optimizer=NVME), [], ["offload_optimizer to nvme needs ZeRO stage 3, not 2"]),
    "parameters without ZeRO 3": (zero(2, offload_param={"device": "cpu"}), [], ["offload_param to cpu needs ZeRO stage 3, not 2"]),
    "GPU optimizer on the CPU": (
        zero(2, offload_optimizer={"device": "cpu"}),
        ["optimizer.backend=deepspeed_fused"],
        ["offload_optimizer to cpu updates on the CPU, where optimizer.backend deepspeed_fused cannot run"],
    ),
    "gradients scaled before they are scattered": (
        zero(3, reduce_scatter=False) | {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
        [],
        [
            "prescale_gradients true does not go with ZeRO stage 3",
            "gradient_predivide_factor 2.0 does not go with ZeRO stage 3",
        ],
    ),
    "three at once": (
        zero(2, stage3_max_live_parameter=1) | {"gradient_clipping": 0.1},
        ["parallel.pipeline_model_parallel_size=2"],
        [
            "unknown key zero_optimization.stage3_max_live_parameter; did you mean stage3_max_live_parameters?",
            "gradient_clipping is 0.1, but in the recipe optimizer.clip_grad is 1.0",
            "ZeRO stage 2 reduces gradients in every backward",
        ],
    ),
}


@pytest.mark.parametrize(("raw", "overrides", "expected"), BAD.values(), ids=BAD)
def test_bad_config_is_told_whole(raw: dict[str, Any], overrides: list[str], expected: list[str], tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, raw, *overrides)
    with pytest.raises(BadInputError) as caught:
        resolve_deepspeed(recipe, load_deepspeed(recipe), 2)
    problems = caught.value.problems
    assert len(problems) == len(expected), problems
    for problem, sentence in zip(problems, expected, strict=True):
        assert problem.removeprefix(f"{recipe.deepspeed}: ").startswith(sentence)


FILES = {
    "malformed": ('{\n  "steps_per_print": 1\n  "aio": {}\n}', r"ds\.json, line 3 column 3, is not valid JSON"),
    "a key twice": ('{"aio": {"block_size": 1, "block_size": 2}}', 'key "block_size" stands twice: keep one'),
    "not a number": ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
    "a list": ("[]", "holds a list, not an object"),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES)
def test_bad_file(text: str, expected: str, tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, text)
    with pytest.raises(BadInputError, match=expected):
        load_deepspeed(recipe)


def test_missing_counts_as_auto(tmp_path: Path) -> None:
    """What the recipe owns reaches DeepSpeed whether the JSON says "auto", the same number, or nothing."""
    full = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }
    forms = [zero(1), zero(1) | full, zero(1) | {key: "auto" for key in full}]
    resolved = [resolve_deepspeed(recipe_with(tmp_path, form), form, 2) for form in forms]
    assert resolved[0] == resolved[1] == resolved[2]
    assert {key: resolved[0][key] for key in ("train_batch_size", "gradient_accumulation_steps")} == {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
    }


SETTINGS: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {
    "bf16 accumulates in fp32": (zero(1), [], {"bf16.immediate_grad_update": True, "data_types.grad_accum_dtype": "fp32"}),
    "fp32 says nothing of it": (zero(1), ["train.precision=fp32"], {"bf16": {"enabled": False}, "data_types.grad_accum_dtype": None}),
    "fp16 scales as the recipe says": (
        zero(1),
        ["train.precision=fp16", "train.loss_scale_window=7", "train.min_loss_scale=4"],
        {
            "fp16": {
                "enabled": True,
                "loss_scale": 0.0,
                "initial_scale_power": 16,
                "loss_scale_window": 7,
                "hysteresis": 2,
                "min_loss_scale": 4,
            }
        },
    ),
    "no overlap unless asked for, at stage 3 too": (zero(3), [], {"zero_optimization.overlap_comm": False}),
    "overlap when asked for": (zero(2, overlap_comm=True), [], {"zero_optimization.overlap_comm": True}),
    "a bucket that is given stays": (zero(1, reduce_bucket_size=5000), [], {"zero_optimization.reduce_bucket_size": 5000}),
    "SGD under ZeRO": (zero(1), ["optimizer.type=sgd"], {"zero_allow_untested_optimizer": True}),
    "Adam under ZeRO": (zero(1), [], {"zero_allow_untested_optimizer": None, "zero_force_ds_cpu_optimizer": None}),
    "offload": (zero(2, offload_optimizer={"device": "cpu"}), [], {"zero_force_ds_cpu_optimizer": True}),
    "offload with PyTorch's Adam": (
        zero(2, offload_optimizer={"device": "cpu"}),
        ["optimizer.backend=torch"],
        {"zero_force_ds_cpu_optimizer": False},
    ),
    "offload of SGD": (zero(2, offload_optimizer={"device": "cpu"}), ["optimizer.type=sgd"], {"zero_force_ds_cpu_optimizer": False}),
    "swap folder": (
        zero(3, offload_optimizer=NVME),
        ["run.output_dir=runs/swapping"],
        {"zero_optimization.offload_optimizer.nvme_path": "runs/swapping/nvme_swap"},
    ),
    "swap folder that is given": (
        zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/scratch"}),
        [],
        {"zero_optimization.offload_optimizer.nvme_path": "/scratch"},
    ),
    "auto that nobody owns is DeepSpeed's default": (
        zero(1) | {"communication_data_type": "auto", "aio": {"block_size": "auto", "queue_depth": 4}},
        [],
        {"communication_data_type": None, "aio": {"queue_depth": 4}},
    ),
    "what switches nothing on": (zero(1) | {"optimizer": "auto", "compile": {"enabled": False}}, [], {"optimizer": None, "compile": None}),
}


@pytest.mark.parametrize(("raw", "overrides", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_open_settings_are_filled(raw: dict[str, Any], overrides: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    before = copy.deepcopy(raw)
    resolved = resolve_deepspeed(recipe_with(tmp_path, raw, *overrides), raw, 2)
    assert {key: _at(resolved, key) for key in expected} == expected
    assert raw == before, "the JSON as read must not change"


def test_bucket_is_no_larger_than_the_model(tmp_path: Path) -> None:
    """Under a pipeline ZeRO 1 allocates the bucket: half the layers, one of the two embeddings, rounded up."""
    one = resolve_deepspeed(recipe_with(tmp_path, zero(1)), zero(1), 1)
    two = resolve_deepspeed(recipe_with(tmp_path, zero(1), "parallel.pipeline_model_parallel_size=2"), zero(1), 2)
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 192 + 2 * 64
    assert one["zero_optimization"]["reduce_bucket_size"] == _up(2 * 256 * 64 + 4 * layer + 64, 1024)
    assert two["zero_optimization"]["reduce_bucket_size"] == _up(256 * 64 + 2 * layer + 64, 1024)
    large = load_recipe("llama-70b")
    assert resolve_deepspeed(large, zero(1), 128)["zero_optimization"]["reduce_bucket_size"] == 500_000_000


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
@pytest.mark.parametrize("config", sorted(shipped_deepspeed()))
def test_every_shipped_pair(name: str, config: str) -> None:
    """A shipped recipe takes every shipped config, but ZeRO 0 in bf16 and ZeRO 2/3 under a pipeline; those are refused."""
    stage, world_size, overrides = int(config[4]), WORLDS[name], [f"deepspeed=ds_configs/{config}.json"]
    pipeline = load_recipe(name).parallel.pipeline_model_parallel_size
    if (stage == 0 and load_recipe(name).train.precision == "bf16") or (stage > 1 and pipeline > 1):
        with pytest.raises(BadInputError, match=f"{config}.json: ZeRO stage {stage} "):
            load_recipe(name, overrides)
        if stage > 1:
            return
        overrides.append("train.precision=fp32")
    recipe = load_recipe(name, overrides)
    resolved = resolve_deepspeed(recipe, load_deepspeed(recipe), world_size)
    zero_config = ZeroConfig.of(resolved)
    assert "auto" not in json.dumps(resolved)
    assert (zero_config.stage, zero_config.offload_optimizer) == (stage, config.rpartition("_")[2] if "offload" in config else "none")
    micro_batches = resolved["gradient_accumulation_steps"] * recipe.layout(world_size).data
    assert micro_batches * recipe.train.micro_batch_size == recipe.train.global_batch_size


@pytest.mark.parametrize("config", sorted(shipped_deepspeed()))
def test_deepspeed_reads_what_is_resolved(config: str) -> None:
    """DeepSpeed's own parser takes the dict, checks the batch arithmetic and sees the values that were meant."""
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = load_recipe("quickstart", [f"deepspeed={config}", "train.precision=fp32", "optimizer.clip_grad=0.5"])
    read = DeepSpeedConfig(resolve_deepspeed(recipe, load_deepspeed(recipe), 1))
    assert read.train_batch_size == 16 and read.gradient_accumulation_steps == 4 and read.gradient_clipping == 0.5
    assert int(read.zero_optimization_stage) == int(config[4])
    assert not read.bfloat16_config.enabled and not read.float16_config.enabled
    assert read.zero_config.overlap_comm is False or config == "zero0"
    if "nvme" in config:
        assert (
            str(read.zero_config.offload_optimizer.nvme_path)
            == str(read.zero_config.offload_param.nvme_path)
            == ("runs/quickstart/nvme_swap")
        )


def test_tables_of_keys_are_deepspeeds() -> None:
    """Every key that DeepSpeed's own classes know is either known here or refused with a reason, and none is made up."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    for section, model in models.items():
        theirs = {field.alias or name for name, field in model.model_fields.items()}
        refused = {key.removeprefix(f"{section}.") for key in REFUSED if key.rpartition(".")[0] == section}
        removed = set(_REMOVED_ZERO_CONFIG_KEYS) if section == "zero_optimization" else set()
        assert SECTIONS[section] | (refused - removed) == theirs, section
        assert not SECTIONS[section] & refused
    assert SECTIONS["aio"] == set(AIO_DEFAULT_DICT)
    assert not TOP_LEVEL & set(REFUSED)
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED) and set(_REMOVED_ZERO_CONFIG_KEYS) <= {
        key.rpartition(".")[2] for key in REFUSED
    }
    named = {value for value in vars(constants).values() if isinstance(value, str)}
    for key in ("train_batch_size", "gradient_clipping", "prescale_gradients", "dump_state", "zero_force_ds_cpu_optimizer"):
        assert key in named and key in TOP_LEVEL


def test_shipped_configs_leave_the_recipe_its_numbers() -> None:
    for name, path in shipped_deepspeed().items():
        raw = json.loads(path.read_text())
        assert raw["train_batch_size"] == raw["train_micro_batch_size_per_gpu"] == raw["gradient_clipping"] == "auto", name
        assert raw["gradient_accumulation_steps"] == raw["bf16"]["enabled"] == raw["fp16"]["enabled"] == "auto", name
        assert deepspeed_problems(load_recipe("quickstart", ["train.precision=fp32"]), raw) == []


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _up(count: int, grain: int) -> int:
    return (count + grain - 1) // grain * grain
