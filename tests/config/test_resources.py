"""Files are found by path, beside the recipe, and by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from largeformer.config.resources import find_deepspeed, find_recipe, find_run_recipe, shipped_deepspeed, shipped_recipes
from largeformer.errors import BadInputError


def test_what_is_shipped() -> None:
    assert {"quickstart", "gpt2-125m", "llama-1b", "llama-8b", "llama-70b"} <= set(shipped_recipes())
    offload = {"zero2_offload_cpu", "zero3_offload_cpu", "zero3_offload_nvme"}
    assert set(shipped_deepspeed()) == {"zero0", "zero1", "zero2", "zero3"} | offload


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_recipe_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == shipped_recipes()["quickstart"]
    (tmp_path / name).write_text("")
    assert find_recipe(name) == Path(name), "a file here goes before a shipped one"


@pytest.mark.parametrize("name", ["zero1", "zero1.json", "ds_configs/zero1.json"])
def test_deepspeed_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_deepspeed(name) == shipped_deepspeed()["zero1"]


@pytest.mark.parametrize("name", ["elsewhere/zero1.json", "zero1.yaml", "zero9"])
def test_other_deepspeed_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match=rf"deepspeed {name}: there is no such file.*\(shipped: zero0, zero1,"):
        find_deepspeed(name)


def test_recipe_of_a_run(tmp_path: Path) -> None:
    """From the run, its stage, the checkpoints or one of them: the stage's recipe; a checkpoint on its own has its own."""
    stage = tmp_path / "run" / "pretrain"
    step = stage / "checkpoints" / "step_00000100"
    step.mkdir(parents=True)
    (step / "config.yaml").write_text("")
    with pytest.raises(BadInputError, match="no trained stage"):
        find_run_recipe(stage)
    (stage / "config.yaml").write_text("")
    for source in (tmp_path / "run", stage, step.parent, step):
        assert find_run_recipe(source) == (stage / "config.yaml", tmp_path / "run")
    alone = step.rename(tmp_path / "copied")
    assert find_run_recipe(alone) == (alone / "config.yaml", None)
    with pytest.raises(BadInputError, match="there is no such folder"):
        find_run_recipe(tmp_path / "none")
