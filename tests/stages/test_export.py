"""`export` and `import` as a user runs them: a trained run, its folders, the gate's verdict, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from largeformer import cli
from largeformer.config.load import load_recipe
from largeformer.data.tokenization.sentencepiece import SentencePieceTokenizer
from largeformer.export.streaming import StoredTensors
from tests.recipes import GPT2, TINY, python_sources
from tests.stages.test_end_to_end import start, status

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
FORMATS = ("hf", "hf-int8", "hf-int4")


def write_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """A recipe over the sources of Python's `email` package, of which two steps are trained."""
    tree: dict[str, Any] = {
        **TINY,
        "run": {"name": "tiny", "output_dir": str(folder / "run"), "stages": ["prepare", "pretrain", "export"]},
        "tokenizer": {"vocab_size": 500},
        "data": {"sources": python_sources("email")},
        "train": {**TINY["train"], "train_iters": 2, "eval_interval": 2, "eval_iters": 1},
        "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False},
        "export": {"formats": [*FORMATS, "largeformer"], "group_size": 32, "gate_tokens": 256},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    """The run folder after `largeformer run`."""
    done = start("run", "-c", str(recipe))
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Iterator[Path]:
    """The run, elsewhere, without its export."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export", "cache"))
    return tmp_path / "run"  # type: ignore[return-value]


def test_the_manifest_holds_lineage_and_parity(run: Path) -> None:
    assert status(run) == "finished"
    manifest = json.loads((run / "export" / "manifest.json").read_text())
    assert manifest["parents"]["pretrain"] == json.loads((run / "pretrain" / "manifest.json").read_text())["identity"]
    assert sorted(path.name for path in (run / "export").iterdir()) == sorted([*FORMATS, "largeformer", "config.yaml", "manifest.json"])
    exact, own, int8 = (manifest["metrics"]["formats"][name]["parity"]["model"] for name in ("hf", "largeformer", "hf-int8"))
    for found in (exact, own):
        assert found["tokens"] == 256 and found["max_logit_difference"] <= 1e-4 and found["same_continuation"] is True
    assert 0 < int8["kl"] < 0.05 and int8["integer_layers"] == 7 * TINY["model"]["num_layers"]
    assert all(manifest["metrics"]["formats"][name]["tokenizer_agreement"] == 1.0 for name in FORMATS)
    card = (run / "export" / "hf" / "README.md").read_text()
    assert manifest["parents"]["pretrain"] in card and "perplexity of the export" in card


@pytest.mark.slow
def test_transformers_generates_what_we_generate(run: Path) -> None:
    folder = run / "export" / "hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    prompt = "def __init__(self):\n    "
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    ours = start("generate", "--from", str(run), "--prompt", prompt, "--temperature", "0", "--max-new-tokens", "12")
    # An untrained model writes bytes that are no text, which the two libraries show differently.
    as_we_write = SentencePieceTokenizer((folder / "tokenizer.model").read_bytes()).decode(made)
    assert ours.stdout.removesuffix("\n") == prompt + as_we_write


def test_a_finished_export_is_not_done_again(run: Path, recipe: Path) -> None:
    before = (run / "export" / "hf" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["export", "-c", str(recipe)]) == 0
    assert (run / "export" / "hf" / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_in_the_way_is_left_alone_or_set_aside(run: Path, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copy / "export" / "hf").mkdir(parents=True)
    (copy / "export" / "hf" / "mine.txt").write_text("kept")
    arguments = ["export", "--from", str(copy), "export.formats=[hf]"]
    assert cli.main(arguments) == 2
    assert "is not empty (hf)" in capfd.readouterr().err
    assert (copy / "export" / "hf" / "mine.txt").read_text() == "kept"
    assert cli.main([*arguments, "--fresh"]) == 0
    assert (copy / "export.old-1" / "hf" / "mine.txt").exists() and (copy / "export" / "hf" / "config.json").exists()


def test_an_export_that_was_stopped_before_its_manifest_is_made_again(run: Path, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By a stop between the names of the formats and the manifest."""
    shutil.copytree(run / "export", copy / "export")
    (copy / "export" / "manifest.json").unlink()
    (copy / "export" / "hf" / "model.safetensors").unlink()
    arguments = ["export", "--from", str(copy)]
    assert cli.main([*arguments, "export.group_size=16"]) == 2
    assert "is not empty (hf, hf-int4, hf-int8, largeformer)" in capfd.readouterr().err, "another recipe's is left alone"
    assert cli.main(arguments) == 0
    assert (copy / "export" / "hf" / "model.safetensors").exists() and (copy / "export" / "manifest.json").exists()
    assert not (copy / "export.old-1").exists()


@pytest.mark.slow
def test_formats_get_their_names_once_nothing_is_left_to_do(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    from largeformer.errors import BadInputError
    from largeformer.stages import export as stage

    def stopped(folder: Path, *_: Any) -> None:
        assert (folder / "model_int8.onnx").exists()
        raise BadInputError("stopped")

    monkeypatch.setattr(stage, "onnx_latency", stopped)
    assert cli.main(["export", "--from", str(copy), "export.formats=[onnx]"]) == 2
    assert sorted(path.name for path in (copy / "export").iterdir()) == ["config.yaml", "onnx.unfinished", "reference.unfinished"]


BAD = {
    "unknown format": (
        ["export.formats=[gguf]"],
        "export.formats[0] is 'gguf', which is none of hf, hf-int8, hf-int8-static, hf-w8a16, hf-int4, onnx, largeformer",
    ),
    "no format": (["export.formats=[]"], "export.formats is empty"),
    "group size": (["export.formats=[hf-int4]", "export.group_size=48"], "export.group_size 48 does not divide"),
    "asymmetric": (["export.formats=[hf-int8]", "export.symmetric=false"], "set export.symmetric to true"),
    "no such layer": (["export.formats=[hf-int8]", "export.keep_float=[head]"], "export.keep_float names head"),
}


@pytest.mark.parametrize(("overrides", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_exits_with_2_and_writes_nothing(
    overrides: list[str], sentence: str, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", "--from", str(copy), *overrides]) == 2
    assert sentence in capfd.readouterr().err
    assert not (copy / "export").exists()


def test_a_gpt2_whose_heads_were_pruned_is_refused_where_its_format_has_no_such_shape(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two heads of 16 in a width of 64: the default formats leave it out."""
    recipe = str(write_recipe(tmp_path, model={**GPT2, "num_layers": 2}))
    assert cli.main(["pretrain", "-c", recipe]) == 0
    assert cli.main(["prune", "-c", recipe, "prune={importance: weight, num_attention_heads: 2}"]) == 0
    export = ["export", "-c", recipe, "--from", str(tmp_path / "run" / "prune"), "export.formats=[hf, largeformer]"]
    assert cli.main(export) == 2
    error = capfd.readouterr().err
    assert "export to hf: a Hugging Face GPT-2 has heads of hidden_size / num_attention_heads" in error and "Traceback" not in error
    assert not (tmp_path / "run" / "export").exists()


def test_an_export_too_far_from_its_source_fails_and_is_left_aside(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "--from", str(copy), "export.formats=[hf-int8]"]
    assert cli.main([*arguments, "export.thresholds.max_kl=1e-12"]) == 1
    error = capfd.readouterr().err
    assert "hf-int8: model: kl is" in error and "Traceback" not in error
    assert status(copy) == "failed"
    assert (copy / "export" / "hf-int8.unfinished" / "parity.json").exists()
    assert not (copy / "export" / "manifest.json").exists() and not (copy / "export" / "hf-int8").exists()
    assert cli.main(arguments) == 0  # what was left is no obstacle
    assert sorted(path.name for path in (copy / "export").iterdir()) == ["config.yaml", "hf-int8", "manifest.json"]


def test_the_gate_sees_a_wrong_export(copy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Two rows of one matrix change places between the writer and the client."""
    from largeformer.export import formats

    original = formats.write_weights

    def swapped(*arguments: Any) -> int:
        size = original(*arguments)
        path = arguments[4] / "model.safetensors"
        tensors = load_file(path)
        rows = tensors["model.layers.1.mlp.up_proj.weight"]
        rows[[0, 1]] = rows[[1, 0]]
        save_file(tensors, path, {"format": "pt"})
        return size

    monkeypatch.setattr(formats, "write_weights", swapped)
    assert cli.main(["export", "--from", str(copy), "export.formats=[hf]"]) == 1
    assert "hf: model: logit_difference is" in capfd.readouterr().err


@pytest.mark.slow
def test_two_ranks_export_what_one_exports(run: Path, copy: Path) -> None:
    """Both ranks hold the source; rank 0 writes, the other waits; the checkpoint's layout is another as well."""
    result = start("export", "--from", str(copy), "parallel.tensor_model_parallel_size=2", ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    for name in FORMATS:
        assert (copy / "export" / name / "model.safetensors").read_bytes() == (run / "export" / name / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_sixteen_bits_there_and_back(copy: Path, tmp_path: Path, dtype: str, stored: torch.dtype) -> None:
    """Folders in 16 bits pass the gate in their clients; what is imported from one is exported again bit for bit."""
    assert cli.main(["export", "--from", str(copy), f"export.dtype={dtype}", "export.formats=[hf, hf-int8, largeformer]"]) == 0
    first = copy / "export"
    held = load_file(first / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {stored}
    assert transformers.AutoModelForCausalLM.from_pretrained(first / "hf", dtype="auto").dtype == stored
    integers = load_file(first / "hf-int8" / "model.safetensors")
    assert {tensor.dtype for tensor in integers.values()} == {stored, torch.int8}
    for name in ("hf", "largeformer"):
        imported = tmp_path / name
        assert cli.main(["import", "--from", str(first / name), "-o", str(imported)]) == 0
        shutil.copytree(copy / "prepare", imported / "prepare")
        assert cli.main(["export", "--from", str(imported), "export.formats=[hf]"]) == 0
        again = load_file(imported / "export" / "hf" / "model.safetensors")
        assert again.keys() == held.keys() and all(torch.equal(again[key], held[key]) for key in held)


@pytest.mark.slow
def test_import_is_the_way_back(run: Path, tmp_path: Path) -> None:
    imported = tmp_path / "imported"
    assert cli.main(["import", "--from", str(run / "export" / "hf"), "-o", str(imported)]) == 0
    arguments = ["--prompt", "def __init__(", "--temperature", "0", "--max-new-tokens", "12"]
    ours, theirs = (start("generate", "--from", str(folder), *arguments) for folder in (run, imported))
    assert theirs.returncode == 0, theirs.stderr
    assert ours.stdout == theirs.stdout


def test_biases_of_queries_keys_and_values_alone_there_and_back(tmp_path: Path) -> None:
    """A Llama with a zero for the output's; as a Qwen2 it would be read with Qwen2's tokenizer, whatever lies in its folder."""
    formats = {"formats": ["hf", "hf-int8"]}
    recipe = write_recipe(tmp_path, model={**TINY["model"], "add_qkv_bias": True}, export=formats, optimizer={"lr": 0.05})
    done = start("run", "-c", str(recipe))
    assert done.returncode == 0, done.stderr[-3000:]
    stored, output = StoredTensors.of_folder(tmp_path / "run" / "export" / "hf"), "model.layers.0.self_attn.o_proj.bias"
    assert stored.read("model.layers.0.self_attn.q_proj.bias").abs().max() > 0.01 and not stored.read(output).any()
    assert cli.main(["import", "--from", str(tmp_path / "run" / "export" / "hf"), "-o", str(tmp_path / "back")]) == 0
    model = load_recipe(str(tmp_path / "back" / "import" / "config.yaml")).model
    assert (model.add_qkv_bias, model.add_bias_linear) == (True, False)
    was, back = ("run/pretrain/checkpoints/step_00000002", "back/import/checkpoints/step_00000000")
    assert StoredTensors.of_checkpoint(tmp_path / back).names == StoredTensors.of_checkpoint(tmp_path / was).names


@pytest.mark.parametrize("made_by", ["export", "convert"])
def test_our_own_folder_is_imported_as_it_was(run: Path, tmp_path: Path, made_by: str) -> None:
    folder = run / "export" / "largeformer"
    if made_by == "convert":
        folder = tmp_path / "converted"
        assert cli.main(["checkpoint", "convert", str(run), "-o", str(folder), "--max-shard-gib", "0.0001"]) == 0
    else:
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md",
            "config.yaml",
            "model.safetensors",
            "parity.json",
            "tokenizer.model",
        ]
    assert cli.main(["import", "--from", str(folder), "-o", str(tmp_path / "imported")]) == 0
    trained, imported = (
        StoredTensors.of_checkpoint(stage / "checkpoints" / f"step_0000000{step}")
        for stage, step in ((run / "pretrain", 2), (tmp_path / "imported" / "import", 0))
    )
    assert set(trained.names) == set(imported.names)
    assert all(torch.equal(trained.read(name), imported.read(name)) for name in trained.names)
    before, after = (load_recipe(str(stage / "config.yaml")) for stage in (run / "pretrain", tmp_path / "imported" / "import"))
    assert after.model == before.model and after.tokenizer.vocab_size == before.tokenizer.vocab_size
    tokenizer = tmp_path / "imported" / "import" / "tokenizer.model"
    assert tokenizer.exists() if made_by == "export" else after.tokenizer.model is None


def test_an_import_is_what_its_weights_and_tokenizer_are(run: Path, tmp_path: Path) -> None:
    """Two trainings of one model have files of one size: what is built on the one must not be taken for built on the other."""
    other = tmp_path / "other"
    shutil.copytree(run / "export" / "hf", other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    manifests = []
    for number, source in enumerate([run / "export" / "hf", run / "export" / "hf", other]):
        assert cli.main(["import", "--from", str(source), "-o", str(tmp_path / f"imported {number}")]) == 0
        manifests.append(json.loads((tmp_path / f"imported {number}" / "import" / "manifest.json").read_text()))
    first, again, trained = (manifest["identity"] for manifest in manifests)
    assert first == again != trained
    prepared = json.loads((run / "prepare" / "manifest.json").read_text())["metrics"]
    assert [manifest["metrics"]["tokenizer_sha256"] for manifest in manifests] == 3 * [prepared["tokenizer_sha256"]]


def test_an_import_that_is_refused_leaves_everything_as_it_was(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bad source, or a recipe that does not go, must cost neither the import that is there nor the next attempt."""
    source, imported = str(run / "export" / "hf"), tmp_path / "imported"
    assert cli.main(["import", "--from", source, "-o", str(imported), "model.hidden_size=128"]) == 2
    assert not (imported / "import").exists() and not (imported / "import.unfinished").exists()
    assert cli.main(["import", "--from", source, "-o", str(imported)]) == 0
    before = (imported / "import" / "manifest.json").read_bytes()
    bad = tmp_path / "bad"
    shutil.copytree(run / "export" / "hf", bad)
    break_config(bad, num_hidden_layers=9)
    for arguments in (["--from", source], ["--from", str(bad), "--fresh"], ["--from", source, "--fresh", "model.hidden_size=128"]):
        assert cli.main(["import", *arguments, "-o", str(imported)]) == 2
    assert (imported / "import" / "manifest.json").read_bytes() == before
    assert [path.name for path in imported.iterdir() if path.is_dir()] == ["import"]
    assert cli.main(["import", "--from", source, "-o", str(imported), "--fresh"]) == 0
    assert (imported / "import.old-1" / "manifest.json").read_bytes() == before


def test_a_copy_of_the_weights_beside_them_is_not_read(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As some publish one in another layout; and an index says which files are meant."""
    source = tmp_path / "hf"
    shutil.copytree(run / "export" / "hf", source)
    save_file({"layers.0.attention.wk.weight": torch.zeros(2, 2)}, source / "consolidated.safetensors")
    assert cli.main(["import", "--from", str(source), "-o", str(tmp_path / "alone")]) == 0
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}))
    assert cli.main(["import", "--from", str(source), "-o", str(tmp_path / "indexed")]) == 0
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}))
    assert cli.main(["import", "--from", str(source), "-o", str(tmp_path / "lost")]) == 2
    assert "names model-00002-of-00002.safetensors, which is not there" in capfd.readouterr().err


def test_a_layer_that_stays_float_keeps_those_that_clients_fuse_with_it(copy: Path) -> None:
    kept = "export.keep_float=[lm_head, model.layers.1.self_attn.k_proj]"
    assert cli.main(["export", "--from", str(copy), "export.formats=[hf-int8]", kept]) == 0
    settings = json.loads((copy / "export" / "hf-int8" / "config.json").read_text())["quantization_config"]
    assert set(settings["ignore"]) == {"lm_head", *(f"model.layers.1.self_attn.{part}_proj" for part in "qkv")}


def test_logits_that_no_disk_holds(copy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    assert cli.main(["export", "--from", str(copy), "export.formats=[hf]"]) == 2
    error = capfd.readouterr().err
    assert "for logits cannot be had" in error and "Traceback" not in error
    assert not list((copy / "export").glob("*reference*"))


def test_the_gate_reads_no_more_than_it_is_told(copy: Path) -> None:
    """Though the model's windows are longer."""
    assert cli.main(["export", "--from", str(copy), "export.formats=[hf]", "export.gate_tokens=12"]) == 0
    parity = json.loads((copy / "export" / "manifest.json").read_text())["metrics"]["formats"]["hf"]["parity"]["model"]
    assert parity["tokens"] == 12 and parity["max_logit_difference"] < 1e-4


def reshape(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))


BAD_OWN_FOLDERS: dict[str, tuple[Any, str]] = {
    "another width": (lambda f: reshape(f, "ffn_hidden_size: 96", "ffn_hidden_size: 128"), "which is not its config.yaml's"),
    "fewer layers": (lambda f: reshape(f, "num_layers: 4", "num_layers: 3"), "which has no place in the model of its config.yaml"),
    "more layers": (lambda f: reshape(f, "num_layers: 4", "num_layers: 5"), "holds no decoder.layers.4."),
    "another vocabulary": (lambda f: reshape(f, "vocab_size: 500", "vocab_size: 499"), "has 500 ids, and the model rows for 499"),
    "more rows": (lambda f: reshape(f, "vocab_size: 500", "vocab_size: 501"), "which is not its config.yaml's"),
}


@pytest.mark.parametrize(("harm", "sentence"), BAD_OWN_FOLDERS.values(), ids=BAD_OWN_FOLDERS)
def test_an_own_folder_that_cannot_be_imported(
    run: Path, tmp_path: Path, harm: Any, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(run / "export" / "largeformer", folder)
    harm(folder)
    assert cli.main(["import", "--from", str(folder), "-o", str(tmp_path / "imported")]) == 2
    assert sentence in capfd.readouterr().err
    assert not list((tmp_path / "imported").glob("import/checkpoints/step_*"))


@pytest.mark.slow
def test_training_goes_on_from_an_import(run: Path, tmp_path: Path) -> None:
    """A step of next to no size leaves the weights that were imported; those of a new model are elsewhere."""
    imported = tmp_path / "imported"
    overrides = [f"data.sources=[{{path: '{Path(json.__file__).parent.parent / 'email' / '*.py'}'}}]", "data.split='80,10,10'"]
    overrides += ["train.train_iters=1", "train.eval_iters=1", "train.global_batch_size=2", "tracking.wandb.mode=disabled"]
    overrides += ["optimizer.lr=1.0e-9", "optimizer.min_lr=0"]
    assert cli.main(["import", "--from", str(run / "export" / "hf"), "-o", str(imported), *overrides]) == 0
    done = start("pretrain", "-c", str(imported / "import" / "config.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (
        StoredTensors.of_checkpoint(imported / stage / "checkpoints" / f"step_0000000{step}")
        for stage, step in (("import", 0), ("pretrain", 1))
    )
    assert set(before.names) == set(after.names)
    for name in before.names:
        torch.testing.assert_close(after.read(name), before.read(name), rtol=0, atol=1e-7)


def break_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def without_end(folder: Path) -> None:
    """A tokenizer.json alone, of which no file says what ends a text."""
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    break_config(folder, eos_token_id=None)


def padded(folder: Path, rows: int) -> None:
    """As Qwen2 and others are: the embedding made larger, with rows that no id of the tokenizer has."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], 0.01 * torch.randn(rows - len(tensors[name]), tensors[name].shape[1])])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    break_config(folder, vocab_size=rows)


def import_here(source: Path, run: Path, *arguments: str) -> None:
    """Into a run folder whose recipe has a text and is short."""
    overrides = [f"data.sources=[{{path: '{Path(json.__file__).parent.parent / 'email' / '*.py'}'}}]", "data.split='80,10,10'"]
    overrides += ["train.train_iters=1", "train.eval_iters=1", "train.global_batch_size=2"]
    overrides += ["tracking.wandb.mode=disabled", "export.formats=[hf]", "export.gate_tokens=256"]
    assert cli.main(["import", "--from", str(source), "-o", str(run), *arguments, *overrides]) == 0


def import_padded(run: Path, folder: Path, kind: str) -> Path:
    """The run folder of an import of 512 rows for 500 ids."""
    source, imported = folder / "hf", folder / "imported"
    shutil.copytree(run / "export" / "hf", source)
    padded(source, 512)
    if kind == "huggingface":
        (source / "tokenizer.model").unlink()
        (source / "tokenizer_config.json").write_text("{}")  # as GPT-2 has it; config.json names the id
    import_here(source, imported)
    return imported


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_a_model_with_more_rows_than_its_tokenizer_has_ids(run: Path, tmp_path: Path, kind: str) -> None:
    tokens = load_recipe(str(import_padded(run, tmp_path, kind) / "import" / "config.yaml")).tokenizer
    assert (tokens.type, tokens.vocab_size, tokens.unused_ids) == (kind, 512, 12)
    assert tokens.eod_token == (None if kind == "sentencepiece" else "</s>")


def add_a_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["added_tokens"].append({**definition["added_tokens"][-1], "id": 500, "content": "<|im_end|>", "special": True})
    path.write_text(json.dumps(definition))


@pytest.mark.parametrize("command", ["prune", "quantize", "export", "evaluate"])
def test_an_import_alone_has_no_text(run: Path, tmp_path: Path, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    import_here(run / "export" / "hf", tmp_path / "imported")
    imported = tmp_path / "imported"
    assert cli.main([command, "--from", str(imported)]) == 2
    assert "is an import, which brings no text: prepare some" in capfd.readouterr().err
    assert cli.main(["prepare", "-c", str(imported / "import" / "config.yaml")]) == 0
    assert cli.main([command, "--from", str(imported), "prune.calibration.samples=2", "quantize.calibration.samples=2"]) == 0


def nobody_says_what_ends(folder: Path) -> None:
    for file in ("tokenizer_config.json", "generation_config.json", "config.json"):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if not key.startswith("eos_token")}))


TWO_FILES: dict[str, tuple[Any, str, int]] = {
    "alike": (lambda f: None, "sentencepiece", 12),
    "the JSON has more ids": (add_a_token, "huggingface", 11),
    "more ids than rows": (lambda f: (add_a_token(f), break_config(f, vocab_size=500)), "sentencepiece", 0),
    "no name for the end": (lambda f: (add_a_token(f), nobody_says_what_ends(f)), "sentencepiece", 12),
    "the JSON is broken": (lambda f: (f / "tokenizer.json").write_text('{"model": [1]}'), "sentencepiece", 12),
    "no SentencePiece model": (lambda f: (f / "tokenizer.model").write_text("dG9rZW4= 0"), "huggingface", 12),
    "no JSON": (lambda f: (f / "tokenizer.json").write_text("{}"), "sentencepiece", 12),
}


@pytest.mark.parametrize("name", TWO_FILES)
def test_of_two_tokenizers_the_one_with_all_ids(run: Path, tmp_path: Path, name: str) -> None:
    change, kind, unused = TWO_FILES[name]
    source = tmp_path / "hf"
    shutil.copytree(run / "export" / "hf", source)
    if unused:
        padded(source, 512)
    change(source)
    import_here(source, tmp_path / "imported")
    tokens = load_recipe(str(tmp_path / "imported" / "import" / "config.yaml")).tokenizer
    assert (tokens.type, tokens.vocab_size - tokens.unused_ids, tokens.unused_ids) == (kind, 512 - unused if unused else 500, unused)


def test_the_tokenizer_with_all_ids_is_taken_where_the_recipe_names_the_end(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(run / "export" / "hf", source)
    padded(source, 512)
    add_a_token(source)
    nobody_says_what_ends(source)
    import_here(source, tmp_path / "imported", "tokenizer.eod_token=</s>")
    tokens = load_recipe(str(tmp_path / "imported" / "import" / "config.yaml")).tokenizer
    assert (tokens.type, tokens.eod_token, tokens.unused_ids) == ("huggingface", "</s>", 11)


@pytest.mark.parametrize("template", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_is_written_as_where_the_model_comes_from(run: Path, tmp_path: Path, template: str) -> None:
    """Also where its chain has prepared a text of its own, and by way of our own folder."""
    source, imported = tmp_path / "hf", tmp_path / "imported"
    shutil.copytree(run / "export" / "hf", source)
    (source / "tokenizer.model").unlink()
    said: dict[str, Any] = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "mask_token": "<none>"}
    chat = "{{ bos_token }}{% for message in messages %}{{ message.content }}</s>{% endfor %}"
    if template == "chat_template.jinja":
        (source / template).write_text(chat)
    else:
        said["chat_template"] = chat
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **said}))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9]}))
    import_here(source, imported)
    for command in ("prepare", "export"):
        assert cli.main([command, "-c", str(imported / "import" / "config.yaml"), "export.formats=[hf, largeformer]"]) == 0
    messages = [{"role": "user", "content": "def f(x):"}, {"role": "assistant", "content": "return x"}]
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, imported / "export" / "hf"))
    written = ours.apply_chat_template(messages)["input_ids"]
    assert written == theirs.apply_chat_template(messages)["input_ids"]
    assert [written[0], written[-1]] == theirs.convert_tokens_to_ids(["<s>", "</s>"])
    assert len(ours) == 500, "a token that the vocabulary has not is not named"
    assert transformers.GenerationConfig.from_pretrained(imported / "export" / "hf").eos_token_id == [2, 7, 9], "our end of a text first"
    assert json.loads((imported / "export" / "hf" / "config.json").read_text())["eos_token_id"] == 2
    assert cli.main(["import", "--from", str(imported / "export" / "largeformer"), "-o", str(tmp_path / "again")]) == 0
    kept = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (imported / "prepare", tmp_path / "again" / "import")]
    assert kept == [{"bos_token": "<s>", "mask_token": "<none>", "chat_template": chat, "eos_token_id": [7, 2, 9]}] * 2


def test_our_folder_beside_a_sentencepiece_model(run: Path, tmp_path: Path) -> None:
    """What it says of a chat is for us alone: transformers cannot open it, and is not asked to."""
    source, imported = tmp_path / "hf", tmp_path / "imported"
    shutil.copytree(run / "export" / "hf", source)
    (source / "tokenizer.json").unlink()
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    import_here(source, imported)
    for command in ("prepare", "export"):
        assert cli.main([command, "-c", str(imported / "import" / "config.yaml"), "export.formats=[hf, largeformer]"]) == 0
    formats = json.loads((imported / "export" / "manifest.json").read_text())["metrics"]["formats"]
    assert {name: made.get("tokenizer_agreement") for name, made in formats.items()} == {"hf": 1.0, "largeformer": None}
    assert json.loads((imported / "export" / "largeformer" / "tokenizer_config.json").read_text())["eos_token_id"] == [2, 7]


ENDS: dict[str, tuple[dict[str, Any], Any]] = {
    "several": ({"generation_config.json": [7, 2]}, [2, 7]),
    "another one": ({"generation_config.json": 7}, [2, 7]),
    "the same": ({"generation_config.json": 2, "config.json": [2, 7]}, 2),
    "an empty list in the one": ({"generation_config.json": [], "config.json": [7, 2]}, [2, 7]),
    "none in the one": ({"generation_config.json": None, "config.json": [7, 2]}, [2, 7]),
    "beyond the vocabulary": ({"generation_config.json": [2, 9, 99999]}, [2, 9]),
    "garbage": ({"generation_config.json": ["</s>", -1, 9.5]}, 2),
    "nobody": ({"generation_config.json": None, "config.json": None}, 2),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_an_answer(run: Path, tmp_path: Path, name: str) -> None:
    """Also where the text was prepared before a second import said something else."""
    files, expected = ENDS[name]
    source, imported = tmp_path / "hf", tmp_path / "run"
    shutil.copytree(run / "export" / "hf", source)
    import_here(source, imported)
    recipe = ["-c", str(imported / "import" / "config.yaml")]
    assert cli.main(["prepare", *recipe]) == 0
    for file, given in files.items():
        content = json.loads((source / file).read_text())
        (source / file).write_text(json.dumps({**content, "eos_token_id": given}))
    import_here(source, imported, "--fresh")
    assert cli.main(["export", *recipe, "--from", str(imported / "import")]) == 0
    assert json.loads((imported / "export" / "hf" / "generation_config.json").read_text())["eos_token_id"] == expected


@pytest.mark.parametrize(
    ("file", "said"), [("tokenizer_config.json", {"chat_template": "{{ messages }}"}), ("generation_config.json", {"eos_token_id": [2, 7]})]
)
def test_what_clients_are_told_makes_another_import(run: Path, tmp_path: Path, file: str, said: dict[str, Any]) -> None:
    source = tmp_path / "hf"
    shutil.copytree(run / "export" / "hf", source)

    def identity() -> str:
        import_here(source, tmp_path / "run", "--fresh")
        return json.loads((tmp_path / "run" / "import" / "manifest.json").read_text())["identity"]  # type: ignore[no-any-return]

    before = identity()
    (source / file).write_text(json.dumps(json.loads((source / file).read_text()) | said))
    assert identity() != before == json.loads((tmp_path / "run" / "import.old-1" / "manifest.json").read_text())["identity"]


@pytest.mark.slow
def test_rows_that_no_id_has_stay_through_every_stage(run: Path, tmp_path: Path) -> None:
    imported = import_padded(run, tmp_path, "huggingface")
    for command in ("prepare", "pretrain", "evaluate", "export"):
        done = start(command, "-c", str(imported / "import" / "config.yaml"))
        assert done.returncode == 0, done.stderr[-3000:]
    assert start("generate", "--from", str(imported), "--prompt", "def", "--max-new-tokens", "5").returncode == 0
    config = json.loads((imported / "export" / "hf" / "config.json").read_text())
    manifest = json.loads((imported / "export" / "manifest.json").read_text())
    assert config["vocab_size"] == 512 and manifest["metrics"]["formats"]["hf"]["tokenizer_agreement"] == 1.0


BAD_FOLDERS: dict[str, tuple[Any, str]] = {
    "another architecture": (lambda f: break_config(f, model_type="bert"), "model_type is 'bert'; what can be imported: gpt2, llama"),
    "scaled positions": (lambda f: break_config(f, rope_scaling={"type": "linear"}), "rope_scaling is {'type': 'linear'}"),
    "another shape": (lambda f: break_config(f, intermediate_size=128), "has the shape [96, 64]; this model's is [128, 64]"),
    "pickles": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "holds its weights as pickles"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "another vocabulary": (lambda f: break_config(f, vocab_size=499), "has 500 ids, and the model rows for 499"),
    "no vocabulary": (lambda f: break_config(f, vocab_size=None), "config.json says vocab_size None"),
    "no heads": (lambda f: break_config(f, num_attention_heads=0, head_dim=None), "a size that is no number above 0"),
    "biases that are not there": (lambda f: break_config(f, attention_bias=True), "self_attn.q_proj.bias is missing"),
    "more rows": (lambda f: break_config(f, vocab_size=501), "has the shape [500, 64]; this model's is [501, 64]"),
    "no end of a text": (without_end, "tokenizer.eod_token, which is null: name what ends a document"),
}


@pytest.mark.parametrize(("harm", "sentence"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_folder_that_cannot_be_imported(run: Path, tmp_path: Path, harm: Any, sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(run / "export" / "hf", folder)
    harm(folder)
    assert cli.main(["import", "--from", str(folder), "-o", str(tmp_path / "imported")]) == 2
    assert sentence in capfd.readouterr().err
    assert not list((tmp_path / "imported").glob("import/checkpoints/step_*"))


@pytest.mark.slow
def test_gpt2_with_onnx(tmp_path: Path) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    recipe = write_recipe(tmp_path, model={**GPT2, "num_layers": 2}, export={"formats": None})
    done = start("run", "-c", str(recipe))
    assert done.returncode == 0, done.stderr[-3000:]
    formats = json.loads((tmp_path / "run" / "export" / "manifest.json").read_text())["metrics"]["formats"]
    assert list(formats) == ["hf", "onnx"]  # compressed-tensors does not know the layers of a GPT-2
    assert formats["onnx"]["parity"]["model_int8"]["float_products"] == 0
    assert formats["onnx"]["parity"]["model"]["same_continuation"] is True
    for file in ("model", "model_int8"):
        assert f"onnx/{file}: {(recipe.parent / 'run' / 'export' / 'onnx' / f'{file}.onnx').stat().st_size / 1e6:.1f} MB" in done.stdout
    refused = start("export", "-c", str(recipe), "export.formats=[hf-int8]", f"run.output_dir={tmp_path / 'run'}", "--fresh")
    assert refused.returncode == 2 and "Conv1D" in refused.stderr
    assert (tmp_path / "run" / "export" / "manifest.json").exists(), "what is there is untouched"
