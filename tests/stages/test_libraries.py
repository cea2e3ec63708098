"""Libraries that the last stages need are asked for before the first begins."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from largeformer import cli
from largeformer.artifact import Artifact
from largeformer.compression.quantization import schemes
from largeformer.config.load import load_recipe
from largeformer.errors import BadInputError
from largeformer.export import formats
from largeformer.stages.common.libraries import check_libraries
from tests.recipes import GPT2
from tests.stages.test_zeros import write_recipe

REMEDY = "pip install 'largeformer[export]'"
Lacking = Callable[..., None]


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Lacking:
    """`lacking(*libraries)`: they are not installed."""

    def without(*libraries: str) -> None:
        for module in (formats, schemes):
            monkeypatch.setattr(module, "find_spec", lambda name: None if name in libraries else find_spec(name))

    return without


def chain(folder: Path, *last: Any, **sections: Any) -> Path:
    return write_recipe(folder, run={"output_dir": str(folder / "run"), "stages": ["prepare", "pretrain", *last]}, **sections)


MISSING: dict[str, tuple[list[Any], dict[str, Any], tuple[str, ...], list[str]]] = {
    "of a format": (["export"], {"export": {"formats": ["hf"]}}, ("transformers",), ["export to hf needs transformers"]),
    "of an entry's format": (
        [{"export": {"formats": ["onnx"]}}],
        {},
        ("onnx", "onnxruntime"),
        ["export to onnx needs onnx and onnxruntime"],
    ),
    "of the default formats": (["export"], {"export": {"formats": None}}, ("onnx",), ["export to onnx needs onnx"]),
    "of integers": (["quantize", "export"], {}, ("compressed_tensors",), ["quantization needs", "export to hf-int8 needs"]),
}


@pytest.mark.parametrize(("last", "sections", "libraries", "sentences"), MISSING.values(), ids=MISSING)
def test_a_library_that_a_later_stage_needs_is_told_first(
    last: list[Any],
    sections: dict[str, Any],
    libraries: tuple[str, ...],
    sentences: list[str],
    lacking: Lacking,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    lacking(*libraries)
    assert cli.main(["run", "-c", str(chain(tmp_path, *last, **sections))]) == 2
    error = capfd.readouterr().err
    assert all(sentence in error for sentence in [*sentences, REMEDY])
    assert not (tmp_path / "run" / "prepare").exists()


def finish(run: Path, recipe: Path, *names: str) -> None:
    for name in names:
        Artifact(name, run / name, name).write()
        (run / name / "config.yaml").write_text(recipe.read_text())


def test_only_stages_that_are_still_to_do_are_asked(lacking: Lacking, tmp_path: Path) -> None:
    lacking("transformers", "compressed_tensors", "onnx")

    def asked(recipe: Path, fresh: bool = False) -> bool:
        try:
            check_libraries(load_recipe(str(recipe), []), fresh=fresh)
        except BadInputError:
            return True
        return False

    recipe, run = chain(tmp_path, "quantize", "export"), tmp_path / "run"
    assert not asked(chain(tmp_path / "training"))
    assert not asked(chain(tmp_path / "gpt2", "export", model=GPT2, export={"formats": ["largeformer"]}))
    finish(run, recipe, "prepare", "quantize", "export")
    assert asked(recipe), "what comes before is still to do"
    finish(run, recipe, "pretrain")
    assert not asked(recipe) and asked(recipe, fresh=True)
    tree = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**tree, "quantize": {"scheme": "w8a16"}}))
    assert asked(recipe), "its section has changed"
