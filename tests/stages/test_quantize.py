"""`quantize` as a user runs it: what was calibrated is what is exported, at any layout, and what is refused leaves everything as it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from largeformer import cli
from largeformer.compression.quantization.description import Description, as_integers, read_description
from largeformer.compression.quantization.schemes import rounded
from largeformer.config.load import load_recipe
from largeformer.config.schema import ModelConfig, Recipe
from largeformer.data.tokenization.sentencepiece import SentencePieceTokenizer
from largeformer.export.streaming import StoredTensors
from largeformer.models.hf_config import hugging_face_config
from largeformer.models.hf_mapping import rows, to_hugging_face
from largeformer.stages.common.weights import find_source
from largeformer.stages.quality import _Model
from tests.benchmarks import quantization as benchmark
from tests.recipes import GPT2, TINY
from tests.stages.test_end_to_end import ROOT, start
from tests.stages.test_export import write_recipe
from tests.stages.test_prune import cut_by_another_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
CALIBRATION = "quantize.calibration.samples=6"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in which a model was trained, at pipeline parallel 2."""
    recipe = write_recipe(tmp_path_factory.mktemp("quantize"), parallel={"pipeline_model_parallel_size": 2})
    done = start("pretrain", "-c", str(recipe), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    return tmp_path / "run"  # type: ignore[return-value]


def quantize(run: Path, *overrides: str) -> int:
    return cli.main(["quantize", "--from", str(run), CALIBRATION, *overrides])


def export(run: Path, *formats: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each format, exported from the stage `quantize`."""
    assert cli.main(["export", "--from", str(run / "quantize"), f"export.formats=[{', '.join(formats)}]"]) == 0
    return {name: load_file(run / "export" / name / "model.safetensors") for name in formats}


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "quantize" / "manifest.json").read_text())["metrics"]  # type: ignore[no-any-return]


def description(run: Path) -> Description:
    (checkpoint,) = (run / "quantize" / "checkpoints").glob("step_*")
    found = read_description(checkpoint)
    assert found is not None
    return found


def test_round_to_nearest_is_what_export_writes_by_itself(copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert quantize(copy) == 0
    told = capfd.readouterr().out
    assert "w8a8 by rtn: perplexity" in told and "the linear layers furthest off" in told
    found = metrics(copy)
    assert found["integer_layers"] == 28 and found["float_layers"] == []
    assert 0 < found["kl"] < 1e-3 and abs(found["perplexity_increase"]) < 0.01 and found["perplexity"] != found["perplexity_before"]
    table = json.loads((copy / "quantize" / "layers.json").read_text())
    assert len(table) == 28 and found["worst_error"] == max(row["relative_error"] for row in table.values())
    calibrated = export(copy, "hf-int8")["hf-int8"]
    shutil.rmtree(copy / "export")
    shutil.move(copy / "quantize", tmp_path / "elsewhere")
    assert cli.main(["export", "--from", str(copy), "export.formats=[hf-int8]"]) == 0
    alone = load_file(copy / "export" / "hf-int8" / "model.safetensors")
    assert calibrated.keys() == alone.keys() and all(torch.equal(calibrated[name], alone[name]) for name in alone)


@pytest.mark.parametrize("lost", ["quantization.safetensors", "quantization.json"])
def test_a_stage_without_its_scales_is_no_finished_one(copy: Path, lost: str, capfd: pytest.CaptureFixture[str]) -> None:
    """So is one that was trained with rounding, and stopped before its scales were found."""
    settings = ["parallel.pipeline_model_parallel_size=1", "quantize.evaluation_tokens=256"]
    assert quantize(copy, *settings) == 0
    before = description(copy)
    (copy / "quantize" / lost).unlink()
    assert cli.main(["export", "--from", str(copy / "quantize"), "export.formats=[hf]"]) == 2
    assert "quantize" in capfd.readouterr().err and not (copy / "export").exists()
    assert quantize(copy, *settings) == 0
    assert "the scales are found anew" in capfd.readouterr().out
    after = description(copy)
    assert after.given.keys() == before.given.keys()
    assert all(torch.equal(after.given[name].scale, before.given[name].scale) for name in before.given)


@pytest.mark.slow
def test_static_scales_reach_the_client_and_fused_layers_share_theirs(copy: Path) -> None:
    assert quantize(copy, "quantize.scheme=w8a8_static", "quantize.observer=percentile", "quantize.smoothquant={alpha: 0.5}") == 0
    found = export(copy, "hf", "hf-int8-static", "hf-int8")
    static, given = found["hf-int8-static"], description(copy).given
    for module, one in given.items():
        assert torch.equal(static[f"{module}.input_scale"], one.input_scale) and torch.equal(static[f"{module}.weight_scale"], one.scale)
    layer = "model.layers.2"
    attention = {static[f"{layer}.self_attn.{name}_proj.input_scale"].item() for name in "qkv"}
    feed_forward = {static[f"{layer}.mlp.{name}_proj.input_scale"].item() for name in ("gate", "up")}
    assert len(attention) == len(feed_forward) == 1 and attention != feed_forward
    config = json.loads((copy / "export" / "hf-int8-static" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is False
    assert "input_activations" in json.dumps(config) and f"{layer}.mlp.up_proj.input_scale" not in found["hf-int8"]
    norms = [name for name in found["hf"] if "layernorm" in name]
    assert all((found["hf"][name] != 1).any() for name in norms), "smoothing lies in the norms"


def test_static_scales_are_measured_in_the_dtype_that_is_exported(copy: Path) -> None:
    settings = ["quantize.scheme=w8a8_static", "train.precision=bf16", "quantize.evaluation_tokens=256"]
    assert quantize(copy, "parallel.pipeline_model_parallel_size=1", *settings) == 0
    described = description(copy).given
    assert len(described) == 28
    for module, given in described.items():
        assert given.input_scale is not None and torch.equal(given.input_scale.bfloat16().float(), given.input_scale), module


@pytest.mark.slow
def test_gptq_is_exported_as_it_was_rounded(copy: Path) -> None:
    assert quantize(copy, "quantize.scheme=w4a16", "quantize.method=gptq", "quantize.group_size=16", "quantize.symmetric=false") == 0
    found, described = export(copy, "hf", "hf-int4"), description(copy)
    assert described.scheme.group_size == 16 and not described.scheme.symmetric and len(described.given) == 28
    for module, given in described.given.items():
        weight = found["hf"][f"{module}.weight"]
        torch.testing.assert_close(rounded(weight, given, described.scheme), weight, rtol=1e-6, atol=1e-8)
        assert found["hf-int4"][f"{module}.weight_scale"].shape == (len(weight), weight.shape[1] // 16)
    parity = json.loads((copy / "export" / "manifest.json").read_text())["metrics"]["formats"]["hf-int4"]["parity"]["model"]
    assert parity["max_logit_difference"] < 1e-4, "the folder holds the very model of the stage"


@pytest.mark.slow
def test_onnx_holds_the_integers_that_gptq_has_found(copy: Path) -> None:
    pytest.importorskip("onnxruntime")
    from onnx import load, numpy_helper

    from largeformer.export.onnx import linear_matrices

    assert quantize(copy, "quantize.method=gptq", "quantize.evaluation_tokens=256") == 0
    # CPUs without VNNI saturate in eight bits: only the integers are compared here.
    arguments = ["export.formats=[hf-int8, onnx]", "export.reduce_range=false", "export.thresholds={max_kl: 9, max_perplexity_increase: 9}"]
    assert cli.main(["export", "--from", str(copy / "quantize"), *arguments, "export.thresholds.max_logit_difference=9"]) == 0
    theirs, folder = load_file(copy / "export" / "hf-int8" / "model.safetensors"), copy / "export" / "onnx"
    held = {one.name: numpy_helper.to_array(one) for one in load(str(folder / "model_int8.onnx")).graph.initializer}
    matrices = linear_matrices(folder / "model.onnx")
    for module in description(copy).given:
        integers, scale = held[f"{matrices[module]}_quantized"], held[f"{matrices[module]}_scale"]
        assert torch.equal(torch.tensor(integers.T), theirs[f"{module}.weight"]), module
        assert torch.equal(torch.tensor(scale), theirs[f"{module}.weight_scale"][:, 0]), module


@pytest.mark.slow
def test_layers_beyond_the_threshold_stay_floats_everywhere(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    assert quantize(copy) == 0
    table = json.loads((copy / "quantize" / "layers.json").read_text())
    errors = sorted((row["relative_error"] for row in table.values()), reverse=True)
    assert not any(row["kept"] for row in table.values())
    threshold = (errors[1] + errors[2]) / 2
    assert quantize(copy, f"quantize.error_threshold={threshold}", "quantize.keep_float=[model.layers.0.self_attn.q_proj]", "--fresh") == 0
    ignored = set(description(copy).ignore)
    qkv = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert qkv < ignored and {name for name, row in table.items() if row["relative_error"] > threshold} <= ignored
    assert set(metrics(copy)["float_layers"]) == ignored
    assert f"{len(ignored)} of" in capfd.readouterr().out
    assert cli.main(["export", "--from", str(copy / "quantize"), "export.formats=[hf-int8, onnx]"]) == 0
    config = json.loads((copy / "export" / "hf-int8" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == ignored | {"lm_head"}
    formats = json.loads((copy / "export" / "manifest.json").read_text())["metrics"]["formats"]
    assert formats["onnx"]["parity"]["model_int8"]["float_products"] == len(ignored)


@pytest.mark.slow
def test_a_finished_stage_is_kept_and_another_setting_is_refused(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert quantize(copy) == 0
    written = (copy / "quantize" / "quantization.json").stat().st_mtime_ns
    assert quantize(copy) == 0
    assert (copy / "quantize" / "quantization.json").stat().st_mtime_ns == written
    assert quantize(copy, "quantize.scheme=w8a16") == 2
    assert "quantize.scheme was w8a8, is w8a16" in capfd.readouterr().err
    assert quantize(copy, "quantize.scheme=w8a16", "--fresh") == 0
    assert (copy / "quantize.old-1" / "quantization.json").exists() and metrics(copy)["scheme"] == "w8a16"
    assert "hf-w8a16" in export(copy, "hf-w8a16")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8_static", "w4a16"])
def test_two_ranks_find_the_integers_of_one(run: Path, tmp_path: Path, scheme: str) -> None:
    """The model was trained at pipeline parallel 2; at that layout the ranks read other text here, the other world splits tensors."""
    settings = [CALIBRATION, f"quantize.scheme={scheme}", "quantize.smoothquant={alpha: 0.5}", "quantize.group_size=32"]
    made: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in (("one", 1), ("TP2", 2), ("PP2", 1)):
        copied = tmp_path / name / "run"
        shutil.copytree(run, copied, ignore=shutil.ignore_patterns("cache"))
        layout = [f"parallel.tensor_model_parallel_size={tensor}", f"parallel.pipeline_model_parallel_size={2 if name == 'PP2' else 1}"]
        if name == "one":
            assert cli.main(["quantize", "--from", str(copied), *settings, *layout]) == 0
        else:
            done = start("quantize", "--from", str(copied), *settings, *layout, ranks=2)
            assert done.returncode == 0, done.stderr[-3000:]
        made[name] = _integers(copied)
    for name in ("TP2", "PP2"):
        equal = total = 0
        for key, tensor in made["one"].items():
            if tensor.dtype == torch.int8:
                steps = (made[name][key].int() - tensor.int()).abs()
                assert steps.max() <= 1
                equal, total = equal + int((steps == 0).sum()), total + steps.numel()
            else:
                torch.testing.assert_close(made[name][key], tensor, rtol=1e-5, atol=1e-6)
        assert equal >= 0.999 * total > 0


def _integers(run: Path) -> dict[str, torch.Tensor]:
    """Those of the stage, by its own weights and scales, and these."""
    (checkpoint,) = (run / "quantize" / "checkpoints").glob("step_*")
    stored, described = StoredTensors.of_checkpoint(checkpoint), description(run)
    recipe = load_recipe(str(checkpoint / "config.yaml"), [])
    weights = to_hugging_face({name: stored.read(name) for name in stored.names}, recipe.model)
    made = {}
    for module, given in described.given.items():
        grouped = weights[f"{module}.weight"].unflatten(1, (given.scale.shape[1], -1))
        made[module] = (grouped / given.scale[..., None]).round().clamp(*described.scheme.range).to(torch.int8)
        made |= {f"{module}.{part}": getattr(given, part) for part in ("scale", "input_scale") if getattr(given, part) is not None}
    return made


BAD = {
    "group size": (
        ["quantize.scheme=w4a16", "quantize.group_size=48"],
        "quantize.group_size 48 does not divide 64, the inputs of 24 layers such as model.layers.0.self_attn.q_proj: choose a divisor, or "
        "list them in quantize.keep_float",
    ),
    "group size, beside layers that stay floats": (
        ["quantize.scheme=w4a16", "quantize.group_size=64", "quantize.keep_float=[model.layers.0.mlp.down_proj]"],
        "quantize.group_size 64 does not divide 96, the inputs of 3 layers such as model.layers.1.mlp.down_proj",
    ),
    "unknown layer": (["quantize.keep_float=[model.layers.9.mlp.up_proj]"], "quantize.keep_float names model.layers.9.mlp.up_proj"),
    "unknown scheme": (["quantize.scheme=w2"], "quantize.scheme is 'w2', which is none of w8a8"),
    "asymmetric with activations": (["quantize.symmetric=false"], "quantize.symmetric false does not go with quantize.scheme w8a8"),
    "no text": (["quantize.calibration.text=empty.txt"], "the calibration text has 0 tokens"),
    "text that is not there": (["quantize.calibration.text=nowhere.txt"], "calibration.text nowhere.txt cannot be read"),
    "text that another tokenizer cut": (
        ["quantize.calibration.text=others"],
        "calibration.text others was cut by another tokenizer (2222)",
    ),
    "taught without training": (
        ["quantize.distill={}"],
        "quantize.distill teaches a training, and quantize.method rtn is none: set it to qat",
    ),
    "observer of the weights": (["quantize.method=qat", "quantize.weight_observer=mse"], "does not go with quantize.method qat"),
}


@pytest.mark.parametrize(("overrides", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_exits_with_2_and_leaves_everything(
    overrides: list[str], sentence: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    cut_by_another_tokenizer(copy / "prepare", tmp_path / "others")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file() and path.name != "status.json"}
    assert quantize(copy, "parallel.pipeline_model_parallel_size=1", *overrides) == 2
    error = capfd.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert before.items() <= {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}.items()
    assert not (copy / "quantize" / "manifest.json").exists()


SHARDS_OF_GROUPS = ["quantize.method=qat", "quantize.scheme=w4a16", "quantize.group_size=32", "parallel.tensor_model_parallel_size=2"]
SHARDS_SENTENCE = "quantize.group_size 32 does not divide 48, the inputs of model.layers.0.mlp.down_proj on one of 2 tensor-parallel ranks"


def test_groups_that_do_not_fit_a_shard() -> None:
    from largeformer.errors import BadInputError
    from largeformer.stages.quantize_checks import check

    def recipe(*overrides: str) -> Recipe:
        return load_recipe("quickstart", ["model.ffn_hidden_size=96", "model.hidden_size=64", *SHARDS_OF_GROUPS, *overrides])

    with pytest.raises(BadInputError, match=SHARDS_SENTENCE):
        check(recipe())
    kept = [f"model.layers.{layer}.mlp.down_proj" for layer in range(recipe().model.num_layers)]
    check(recipe(f"quantize.keep_float=[{', '.join(kept)}]"))


@pytest.mark.slow
def test_groups_that_do_not_fit_a_shard_end_with_2_and_leave_everything(copy: Path) -> None:
    alone = "parallel.pipeline_model_parallel_size=1"
    assert quantize(copy, alone) == 0
    before = {path: path.stat().st_mtime_ns for path in (copy / "quantize").rglob("*") if path.is_file()}
    done = start("quantize", "--from", str(copy), CALIBRATION, alone, *SHARDS_OF_GROUPS, "--fresh", ranks=2)
    assert SHARDS_SENTENCE in done.stderr and "Traceback (most" not in done.stdout
    assert done.returncode == 2, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (copy / "quantize").rglob("*") if path.is_file()} == before


def test_layers_that_stay_floats_may_be_of_any_size(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = [f"model.layers.{layer}.mlp.down_proj" for layer in range(4)]
    settings = ["quantize.scheme=w4a16", "quantize.group_size=64", "quantize.evaluation_tokens=256", "quantize.error_threshold=10"]
    assert quantize(copy, *settings, f"quantize.keep_float=[{', '.join(kept)}]") == 0
    assert metrics(copy)["float_layers"] == kept
    table = json.loads((copy / "quantize" / "layers.json").read_text())
    assert len(table) == 28 and [name for name, row in table.items() if row["kept"]] == kept
    assert f"4 of 28 stay floats: {', '.join(kept)}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["quantize.scheme=w4a16", "quantize.group_size=32", "quantize.symmetric=false", "quantize.error_threshold=10"], "hf-int4"),
        (["quantize.scheme=w8a8_static"], "hf-int8-static"),
    ],
    ids=["zero points", "input scales"],
)
def test_the_report_counts_what_the_folder_holds(copy: Path, settings: list[str], name: str) -> None:
    assert quantize(copy, *settings, "quantize.evaluation_tokens=256", "parallel.pipeline_model_parallel_size=1") == 0
    (checkpoint,) = (copy / "quantize" / "checkpoints").glob("step_*")
    recipe = load_recipe(str(checkpoint / "config.yaml"), [])
    source = find_source(recipe, checkpoint)
    held = export(copy, name)[name]
    assert _Model("quantize", recipe, source).bytes == sum(
        tensor.nbytes for key, tensor in held.items() if not key.endswith("weight_shape")
    )


def test_text_is_written_as_the_integers_compute(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["quantize.scheme=w8a16", "quantize.evaluation_tokens=256", "parallel.pipeline_model_parallel_size=1"]
    assert quantize(copy, *settings) == 0
    coarse = {name: replace(given, scale=40 * given.scale) for name, given in description(copy).given.items()}
    replace(description(copy), given=coarse).write(copy / "quantize")
    (checkpoint,) = (copy / "quantize" / "checkpoints").glob("step_*")
    recipe, stored = load_recipe(str(checkpoint / "config.yaml"), []), StoredTensors.of_checkpoint(checkpoint)
    whole = as_integers(stored, description(copy), recipe.model)
    state = {name: (whole if name in whole.names else stored).read(name) for name in stored.names}
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hugging_face_config(recipe.model, recipe.tokenizer.vocab_size))).eval()
    twin.load_state_dict(to_hugging_face(state, recipe.model))
    tokenizer = SentencePieceTokenizer((copy / "prepare" / "tokenizer.model").read_bytes())
    prompt = torch.tensor([tokenizer.encode("def load(")])
    made = twin.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eod)
    texts = []
    for name in ("pretrain", "quantize"):
        capfd.readouterr()
        greedy = ["--temperature", "0", "--max-new-tokens", "8"]
        assert cli.main(["generate", "--from", str(copy / name), "--prompt", "def load(", *greedy]) == 0
        texts.append(capfd.readouterr().out.removesuffix("\n"))
    assert texts[1] == "def load(" + tokenizer.decode(made[0, prompt.shape[1] :].tolist()) != texts[0]


@pytest.mark.slow
def test_samples_are_scored_as_the_integers_compute(copy: Path, tmp_path: Path) -> None:
    """The stage's checkpoint, rounded to nearest, still holds the floats that it was given."""
    settings = ["quantize.scheme=w4a16", "quantize.group_size=32", "quantize.evaluation_tokens=256", "quantize.error_threshold=10"]
    assert quantize(copy, "parallel.pipeline_model_parallel_size=1", *settings) == 0
    many = ["train.micro_batch_size=128", "train.global_batch_size=128"]
    for name in ("pretrain", "quantize"):
        assert cli.main(["evaluate", "--from", str(copy / name), "--scores", str(tmp_path / name), *many]) == 0
    floats, integers = (
        np.concatenate([np.load(path) for path in sorted((tmp_path / name).glob("*.npy"))]) for name in ("pretrain", "quantize")
    )
    np.testing.assert_allclose(integers, floats, rtol=0.05)
    assert (integers != floats).mean() > 0.9


FRESHLY_REFUSED = {
    "no text": BAD["text that is not there"],
    "no text to train beside": (["quantize.method=qat", *BAD["text that is not there"][0]], BAD["text that is not there"][1]),
    "group size": BAD["group size"],
}


@pytest.mark.slow
def test_what_is_refused_leaves_the_finished_stage_where_it_is(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also scales that are not finite, which show late."""
    monkeypatch.chdir(tmp_path)
    alone = "parallel.pipeline_model_parallel_size=1"
    assert quantize(copy, alone) == 0
    before = {path: path.stat().st_mtime_ns for path in (copy / "quantize").rglob("*") if path.is_file()}

    def refused(sentence: str, *overrides: str) -> None:
        assert quantize(copy, alone, *overrides, "--fresh") == 2
        assert sentence in capfd.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in (copy / "quantize").rglob("*") if path.is_file()} == before
        assert not (copy / "quantize.old-1").exists()

    for overrides, sentence in FRESHLY_REFUSED.values():
        refused(sentence, *overrides)
    _break_scales(monkeypatch)
    refused("a scale must be finite and above 0", "quantize.scheme=w8a16")


def test_weights_that_are_not_finite_are_bad_input(copy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    _break_scales(monkeypatch)
    assert quantize(copy) == 2
    assert "weight_scale holds nan: a scale must be finite and above 0" in capfd.readouterr().err
    assert not (copy / "quantize" / "checkpoints").exists()


def _break_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    from largeformer.compression.quantization import layers as quantization

    original = quantization.weight_scales

    def broken(*arguments: Any) -> Any:
        given = original(*arguments)
        given.scale[0] = float("nan")
        return given

    monkeypatch.setattr(quantization, "weight_scales", broken)


@pytest.mark.slow
def test_a_gpt2_becomes_integers_in_onnx_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    recipe = write_recipe(tmp_path, model=GPT2, quantize={"calibration": {"samples": 4}, "smoothquant": {"projections": True}})
    assert cli.main(["pretrain", "-c", str(recipe)]) == 0
    assert cli.main(["quantize", "-c", str(recipe), "quantize.scheme=w4a16", "quantize.group_size=32"]) == 2
    assert "quantize.scheme w4a16 cannot be exported for a model of this shape" in capfd.readouterr().err
    stages = "run.stages=[prepare, pretrain, quantize, export]"
    quick = ["quantize.evaluation_tokens=256", "quality.tokens=256", "quality.shapes=[[1, 8]]", "quality.rounds=1"]
    assert cli.main(["run", "-c", str(recipe), stages, "export.formats=[hf, onnx]", *quick]) == 0
    found = metrics(tmp_path / "run")
    assert found["quality"]["kl"] == pytest.approx(found["kl"], rel=1e-3) and found["kl"] > 0, "both are of the integers"
    formats = json.loads((tmp_path / "run" / "export" / "manifest.json").read_text())["metrics"]["formats"]
    assert formats["hf"]["parity"]["model"]["max_logit_difference"] < 1e-4
    assert formats["onnx"]["parity"]["model_int8"]["float_products"] == 0


QAT = [
    "quantize.method=qat",
    "quantize.train={train_iters: 3, eval_interval: 3}",
    "quantize.optimizer={lr: 1.0e-3, lr_decay_style: constant}",
]


@pytest.mark.slow
def test_training_with_rounding_goes_on_and_is_exported(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Stopped after two of three steps; its validation is of the rounded model, and the export agrees with the stage's own comparison."""
    arguments = [*QAT, "quantize.scheme=w4a16", "quantize.group_size=32", "parallel.pipeline_model_parallel_size=1"]
    stopped = "quantize.train={train_iters: 3, eval_interval: 3, exit_iteration: 2}"
    assert quantize(copy, *arguments, stopped) == 0
    assert not (copy / "quantize" / "manifest.json").exists()
    assert quantize(copy, *arguments) == 0
    assert "resumed" in capfd.readouterr().out
    found = metrics(copy)
    assert (found["steps"], found["outcome"], found["method"]) == (3, "finished", "qat")
    assert found["perplexity"] != found["perplexity_before"]
    written = export(copy, "hf", "hf-int4")
    assert "model.layers.0.mlp.up_proj.weight_packed" in written["hf-int4"]
    kl = json.loads((copy / "export" / "manifest.json").read_text())["metrics"]["formats"]["hf-int4"]["parity"]["model"]["kl"]
    assert kl > 1e-6, "hf holds the floats that were trained, and the other their integers"


TAUGHT = "quantize.distill={temperature: 2.0, alpha: 0.6}"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [{}, GPT2], ids=["llama", "gpt2"])
def test_what_is_taught_by_its_own_floats_trains_without_dropout(tmp_path: Path, architecture: dict[str, Any]) -> None:
    """Before the first step it says what they say."""
    dropping = {**architecture, "num_layers": 2, "hidden_dropout": 0.3, "attention_dropout": 0.3}
    assert cli.main(["pretrain", "-c", str(write_recipe(tmp_path, model=dropping, train={"log_interval": 1}))]) == 0
    run = tmp_path / "run"
    names = [name for row in rows(load_recipe(run / "pretrain" / "config.yaml").model, "llama") for name in row.theirs]
    linear = [name.removesuffix(".weight") for name in names if name.endswith("_proj.weight")]
    settings = ["quantize.scheme=w8a8", f"quantize.keep_float=[{', '.join(linear)}]", "train.log_interval=1", *QAT, TAUGHT]
    assert quantize(run, *settings) == 0
    first, *_ = (json.loads(line) for line in (run / "quantize" / "metrics.jsonl").read_text().splitlines() if "kd_loss" in line)
    assert abs(first["kd_loss"]) < 1e-6


@pytest.mark.slow
def test_training_with_rounding_is_taught_by_the_floats(run: Path, tmp_path: Path) -> None:
    """Nothing is to be learnt at first of a teacher that is the model itself, and the rounded one is off; alike at every layout."""
    names = [name for row in rows(load_recipe(run / "pretrain" / "config.yaml").model, "llama") for name in row.theirs]
    linear = [name.removesuffix(".weight") for name in names if name.endswith("_proj.weight")]
    cases = {
        "floats": (1, [f"quantize.keep_float=[{', '.join(linear)}]"]),
        "rounded": (1, []),
        "TP2": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
        "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    }
    found = {}
    for name, (ranks, settings) in cases.items():
        copied = tmp_path / name / "run"
        shutil.copytree(run, copied, ignore=shutil.ignore_patterns("cache"))
        alone = ["parallel.pipeline_model_parallel_size=1", "train.log_interval=1", "quantize.scheme=w4a16", "quantize.group_size=16"]
        done = start("quantize", "--from", str(copied), CALIBRATION, *alone, *QAT, TAUGHT, *settings, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = [json.loads(line) for line in (copied / "quantize" / "metrics.jsonl").read_text().splitlines()]
        found[name] = [row for row in found[name] if "kd_loss" in row]
        for row in found[name]:
            assert row["loss"] == pytest.approx(0.6 * row["kd_loss"] + 0.4 * row["ce_loss"], rel=1e-6)
    assert abs(found["floats"][0]["kd_loss"]) < 1e-6 < 1e-5 < found["rounded"][0]["kd_loss"]
    for name in ("TP2", "PP2"):
        assert [row["kd_loss"] for row in found[name]] == pytest.approx([row["kd_loss"] for row in found["rounded"]], rel=1e-2), name


METHODS = {
    "qat": [*QAT, "quantize.scheme=w4a16", "quantize.group_size=16"],
    "gptq, smoothed": ["quantize.scheme=w8a8", "quantize.method=gptq", "quantize.smoothquant={projections: true}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_pruned_weights_stay_zero(copy: Path, settings: list[str]) -> None:
    alone = "parallel.pipeline_model_parallel_size=1"
    pruning = ["prune.method=magnitude", 'prune.pattern="2:4"']
    assert cli.main(["prune", "--from", str(copy), alone, *pruning]) == 0
    assert cli.main(["quantize", "--from", str(copy / "prune"), CALIBRATION, alone, *settings]) == 0
    assert metrics(copy)["sparsity"]["overall"] >= 0.5
    integers = {name: tensor for name, tensor in _integers(copy).items() if tensor.dtype == torch.int8}
    for tensor in integers.values():
        assert ((tensor.flatten(1) != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()


@pytest.mark.slow
def test_training_with_rounding_at_another_layout(run: Path, tmp_path: Path) -> None:
    losses = {}
    layouts = {
        "PP2": (2, ["parallel.pipeline_model_parallel_size=2", "deepspeed=ds_configs/zero1.json"]),
        "TP2": (
            2,
            ["parallel.pipeline_model_parallel_size=1", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        ),
        "ZeRO 3": (2, ["parallel.pipeline_model_parallel_size=1", "deepspeed=ds_configs/zero3.json"]),
        "one": (1, ["parallel.pipeline_model_parallel_size=1"]),
    }
    for name, (ranks, layout) in layouts.items():
        copied = tmp_path / name / "run"
        shutil.copytree(run, copied, ignore=shutil.ignore_patterns("cache"))
        settings = [CALIBRATION, *QAT, "quantize.scheme=w8a8_static", "quantize.smoothquant={alpha: 0.5}", *layout]
        done = start("quantize", "--from", str(copied), *settings, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[name] = metrics(copied)["val_loss"]
        assert not (copied / "quantize" / "smoothed").exists()
    assert all(loss == pytest.approx(losses["one"], rel=1e-3) for loss in losses.values()), losses


def test_a_chosen_row_of_the_benchmark_brings_what_it_starts_from() -> None:
    every = list(benchmark.settings(ModelConfig.model_validate(TINY["model"]), 2))
    assert [setting.folder for setting in benchmark.chosen(every, "after 2 steps")] == ["floats", "floats-w4a16"]
    assert [setting.folder for setting in benchmark.chosen(every, "GPTQ")] == ["gptq", "gptq-order"]


@pytest.mark.slow
def test_the_benchmark_goes_on_after_a_setting_that_fails(tmp_path: Path) -> None:
    """From a teacher whose schedule and width suit neither the further steps nor groups of 128."""
    wsd = {"lr": 1.0e-3, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 1}
    assert start("pretrain", "-c", str(write_recipe(tmp_path, optimizer=wsd))).returncode == 0  # a world in here would be the others' too
    out = tmp_path / "figures"
    arguments = [
        str(out),
        "--from",
        str(tmp_path / "run"),
        "--further",
        "2",
        "--only",
        "2 steps",
        "quantize.evaluation_tokens=256",
        CALIBRATION,
    ]

    def figures() -> tuple[int, list[dict[str, Any]]]:
        done = subprocess.run([sys.executable, "-m", "tests.benchmarks.quantization", *arguments], cwd=ROOT, check=False)
        return done.returncode, json.loads((out / "quantization.json").read_text())

    in_the_way = out / "qat" / "quantize" / "manifest.json"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("{")
    code, (failed, taught, floats, nearest) = figures()
    assert code == 1 and "exit code 2" in failed["failed"] and failed["name"] in (out / "quantization.md").read_text()
    assert taught["figures"]["float_layers"] == 0
    assert floats["figures"]["mean_error"] is None and floats["figures"]["float_layers"] == 28
    assert nearest["figures"]["float_layers"] == 0 and nearest["figures"]["integer_layers"] == 28, "the control is rounded"
    assert nearest["figures"]["perplexity_before"] == pytest.approx(floats["figures"]["perplexity"], rel=1e-6)
    in_the_way.unlink()
    code, (qat, *others) = figures()
    assert code == 0 and others == [taught, floats, nearest]
    assert qat["figures"]["perplexity_before"] == floats["figures"]["perplexity_before"] and qat["figures"]["float_layers"] == 0
    assert (out / "quantization.md").read_text().count("\n") == 6
