"""Where `import` puts a run, and what it says where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from largeformer import cli

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few weights, without a tokenizer."""
    folder = tmp_path_factory.mktemp("hub")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, max_position_embeddings=32)).save_pretrained(folder)
    return folder


REFUSED = {
    "a file in the way": ("file", [], "--output file cannot be made"),
    "below a file": ("file/run", [], "--output file/run cannot be made"),
    "no place for folders": ("/proc/run", [], "--output /proc/run cannot be made"),
    "no tokenizer there": ("run", ["tokenizer.model=missing.model"], "tokenizer.model missing.model: there is no such file"),
    "another folder": ("run", ["run.output_dir=elsewhere"], "run.output_dir elsewhere is another folder than --output run"),
}


@pytest.mark.parametrize(("output", "overrides", "sentence"), REFUSED.values(), ids=REFUSED)
def test_an_output_that_does_not_go(
    output: str,
    overrides: list[str],
    sentence: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert cli.main(["import", "--from", str(source), "-o", output, *overrides]) == 2
    told = capfd.readouterr().err
    assert f"error: {sentence}" in told and "Traceback" not in told
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path.name != "run"]


@pytest.mark.parametrize("named", ["run", "./run", "{here}/run"])
def test_the_output_may_be_named_twice(named: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["import", "--from", str(source), "-o", "run", f"run.output_dir={named.format(here=tmp_path)}"]) == 0
    assert (tmp_path / "run" / "import" / "manifest.json").exists()
