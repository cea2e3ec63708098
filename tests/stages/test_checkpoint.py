"""Checkpoints as a user meets them: of a run that is started by the command line, damaged, gone on with, looked at and converted. And what
must not be: a secret that is kept, a command that is hidden in a file and runs.
"""

from __future__ import annotations

import json
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from largeformer import cli
from largeformer.checkpoint.commit import begin, commit
from largeformer.checkpoint.manifest import Digest, read_manifest, write_manifest
from largeformer.stages.checkpoint import _valid
from largeformer.training.checkpointing import first_state
from tests.checkpoint.test_format import Bomb
from tests.checkpoint.test_layouts import State, recipe_at, train_and_save
from tests.commands import run_command
from tests.distributed import RankPool
from tests.recipes import TINY

Ranks = Callable[[int], RankPool]
ROOT = Path(__file__).parents[2]
SECRETS = {
    name: f"canary-{name.lower()}-5f0c9d2ab71e44c8a3b6"[:40].ljust(40, "0")
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DATABASE_PASSWORD", "SLURM_JWT")
}


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    (done,) = run_command(*arguments, environ={**SECRETS, "WANDB_MODE": "offline"})
    return done


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, each saved behind the training and validated, of which two and the best are kept."""
    folder = tmp_path_factory.mktemp("checkpoint-stage")
    library = Path(json.__file__).parent.parent
    tree = {
        **TINY,
        "run": {"name": "tiny", "output_dir": str(folder / "run")},
        "tokenizer": {"vocab_size": 500},
        "data": {"sources": [{"path": str(library / name / "*.py")} for name in ("json", "email")], "split": "80,10,10"},
        "train": {**TINY["train"], "precision": "bf16", "train_iters": 8, "eval_interval": 1, "eval_iters": 1, "exit_iteration": 4},
        "checkpoint": {"save_interval": 1, "keep_last": 2, "keep_best": 1, "async_save": True},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    done = start("pretrain", "-c", str(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe.parent / "run"


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "pretrain" / "events.jsonl").read_text().splitlines()]


def newest(run: Path) -> Path:
    return run / "pretrain" / "checkpoints" / "step_00000004"


def printed(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """What `largeformer checkpoint ...` prints; with --json, what that says."""
    capfd.readouterr()
    assert cli.main(["checkpoint", *arguments]) == code
    out = capfd.readouterr().out
    return json.loads(out) if "--json" in arguments else out


def test_saved_behind_the_training(run: Path) -> None:
    """Losses fall, so that the best are the newest: two are left. Each was told with the time that it took, and that it cost."""
    saved = [event for event in events(run) if event["event"] == "saved"]
    assert [event["step"] for event in saved] == [1, 2, 3, 4]
    assert all(event["seconds"] > 0 and event["blocked_s"] > 0 for event in saved)
    assert sorted(path.name for path in newest(run).parent.iterdir()) == ["latest", "step_00000003", "step_00000004"]
    state = json.loads((newest(run) / "state.json").read_text())
    assert state["progress"] == {"step": 4, "skipped": 0, "samples": 16, "tokens": state["progress"]["tokens"]}
    assert state["validation"]["step"] == 4 and state["wandb_run_id"] and state["extra"]["guards"] is not None
    assert yaml.safe_load((newest(run) / "config.yaml").read_text())["optimizer"]["lr"] == 1.0e-3


def test_no_secret_is_in_any_file(run: Path) -> None:
    """Checkpoints, resolved recipe, logs, TensorBoard and W&B files, status."""
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "state.json", "events.jsonl", "status.json", "latest"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert [name for name, value in SECRETS.items() if value.encode() in content] == [], path


def test_list(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = printed(capfd, "list", str(run), "--json")["checkpoints"]
    assert [(row["step"], row["samples"], row["layout"], row["problems"]) for row in rows] == [
        (3, 12, "TP1 PP1 on 1", []),
        (4, 16, "TP1 PP1 on 1", []),
    ]
    lines = printed(capfd, "list", str(run)).splitlines()
    assert lines[0].split() == ["stage", "step", "samples", "tokens", "val_loss", "size", "layout", "files"]
    assert len(lines) == 3 and lines[2].split()[:2] == ["pretrain", "4"] and lines[2].rstrip().endswith("complete")


def untrained(folder: Path, stage: str = "import") -> Path:
    """A checkpoint such as an import leaves: of no layout."""
    temporary, contents = begin(folder / stage / "checkpoints", 0), {"state.json": first_state(), "weights": b"x"}
    for name, held in contents.items():
        (temporary / name).write_bytes(held)
    return commit(temporary, {name: Digest.of(held) for name, held in contents.items()})


def test_list_of_what_was_not_trained_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    untrained(tmp_path)
    (row,) = printed(capfd, "list", str(tmp_path), "--json")["checkpoints"]
    assert (row["layout"], row["problems"]) == (None, [])
    assert printed(capfd, "list", str(tmp_path)).splitlines()[1].split()[-2:] == ["-", "complete"]


def test_verify_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(untrained(tmp_path))
    assert printed(capfd, "verify", ".") == "import/step_00000000: valid\n"


def test_a_name_with_brackets_is_shown_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In the table, whole where nothing says how wide it may be, and where another checkpoint is used instead."""
    folder = tmp_path / ("deep" * 40) / "exp[/1]"
    damaged = untrained(folder, stage="s[red]")
    (damaged / "weights").unlink()
    told = "".join(line.strip() for line in printed(capfd, "list", str(folder)).splitlines()[1:])
    assert told.startswith("s[red]") and f"{damaged.name}/weights" in told and "[/1]" in told, told
    commit(begin(folder / "s[red]" / "checkpoints", 1), {"[/foo]": Digest.of(b"x")})
    untrained(folder, stage="s[red]")
    assert _valid(folder / "s[red]").name == "step_00000000"
    assert "[/foo]" in capfd.readouterr().err


def test_inspect(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = printed(capfd, "inspect", str(run), "--json")
    weights = {tensor["name"]: tensor for tensor in found["tensors"]["weights"]}
    assert weights["embedding.word_embeddings.weight"] == {
        "name": "embedding.word_embeddings.weight",
        "dtype": "bfloat16",
        "shape": [500, 64],
    }
    masters = [tensor for tensor in found["tensors"]["optimizer"] if tensor["name"].startswith("master.")]
    assert len(masters) == len(weights) and {tensor["dtype"] for tensor in masters} == {"float32"}
    assert found["parameters"] == sum(torch.Size(tensor["shape"]).numel() for tensor in weights.values())
    text = printed(capfd, "inspect", str(run))
    assert f"step_00000004: {found['parameters']:,} parameters" in text and "torch " in text


def test_convert(run: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """PyTorch's distributed checkpoint reads the shards; the consolidated files say the same."""
    said = printed(capfd, "convert", str(run), "-o", str(tmp_path / "model"))
    assert "step_00000004) in 1 file" in said
    whole = load_file(tmp_path / "model" / "model.safetensors")
    state = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(newest(run) / "weights")), no_dist=True)
    assert whole.keys() == {place["name"] for place in printed(capfd, "inspect", str(run), "--json")["tensors"]["weights"]}
    assert all(torch.equal(whole[name], tensor) for name, tensor in state.items())
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_convert_float32_in_many_files(run: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed(capfd, "convert", str(newest(run)), "-o", str(tmp_path / "fp32"), "--weights", "fp32", "--max-shard-gib", "0.0003")
    index = json.loads((tmp_path / "fp32" / "model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / "fp32" / name) for name in set(index["weight_map"].values())}
    assert len(files) > 1 and all(path.stat().st_size < 0.0003 * 2**30 + 10_000 for path in (tmp_path / "fp32").glob("*.safetensors"))
    printed(capfd, "convert", str(newest(run)), "-o", str(tmp_path / "bf16"))
    for name, rounded in load_file(tmp_path / "bf16" / "model.safetensors").items():
        master = files[index["weight_map"][name]][name]
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), rounded)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for held in files.values() for tensor in held.values())


def test_convert_shards_of_two_ranks(ranks: Ranks, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two tensor-parallel ranks that pad the vocabulary: the whole tensors are those that were gathered in memory."""
    world_size, layout = recipe_at("TP2", "fp32")
    state: State = ranks(world_size).run(train_and_save, layout, tmp_path)[0][0]
    printed(capfd, "convert", str(tmp_path), "-o", str(tmp_path / "whole"), "--weights", "fp32")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert whole.keys() == state.masters.keys()
    assert all(torch.equal(whole[name], master) for name, master in state.masters.items())


def test_convert_does_not_overwrite(run: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert cli.main(["checkpoint", "convert", str(run), "-o", str(tmp_path / "there")]) == 2
    assert "is there already" in capfd.readouterr().err
    assert cli.main(["checkpoint", "inspect", str(tmp_path / "nowhere")]) == 2
    assert "holds no checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("place", ["file/whole", "/proc/whole"])
def test_convert_to_where_nothing_can_be_made(
    place: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert cli.main(["checkpoint", "convert", str(run), "-o", place]) == 2
    assert f"error: --output {place} cannot be made" in capfd.readouterr().err


@pytest.mark.parametrize("size", ["inf", "nan"])
def test_convert_in_files_of_no_size(size: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "convert", str(run), "-o", str(tmp_path / "whole"), "--max-shard-gib", size]) == 2
    assert "Invalid value for '--max-shard-gib'" in capfd.readouterr().err and not (tmp_path / "whole").exists()


FILES = ["weights/rank_00000.safetensors", "optimizer/rank_00000.safetensors", "random/rank_00000.safetensors", "state.json", "config.yaml"]


def poison(path: Path, trace: Path) -> None:
    """A pickle in the place of a file, or an object's tag in YAML."""
    if path.suffix == ".yaml":
        path.write_text(f"run: !!python/object/apply:os.system ['touch {trace}']\n")
    else:
        path.write_bytes(pickle.dumps(Bomb(trace)))


@pytest.mark.parametrize("name", FILES)
def test_nothing_runs_that_is_hidden_in_a_file(run: Path, tmp_path: Path, name: str) -> None:
    """Also where the sums were made to fit, as who has written the file can do."""
    from largeformer.errors import BadInputError
    from largeformer.training.checkpointing import open_tensors, random_states, read_state

    checkpoint, trace = tmp_path / "step_00000004", tmp_path / "trace"
    subprocess.run(["cp", "-r", str(newest(run)), str(checkpoint)], check=True)
    poison(checkpoint / name, trace)
    assert cli.main(["checkpoint", "verify", str(checkpoint)]) == 1
    write_manifest(checkpoint, {**read_manifest(checkpoint), name: Digest.of((checkpoint / name).read_bytes())})
    assert cli.main(["checkpoint", "verify", str(checkpoint)]) == 0
    for part in ("weights", "optimizer"):
        if name.startswith(part):
            with pytest.raises(BadInputError, match="no safetensors file"):
                open_tensors(checkpoint, part)
    if name == "state.json":
        with pytest.raises(BadInputError, match="cannot be read"):
            read_state(checkpoint)
    if name.startswith("random"):
        with pytest.raises(BadInputError, match="cannot be read"):
            random_states(checkpoint, 0)
    if name == "config.yaml":
        assert cli.main(["generate", "--from", str(checkpoint), "--prompt", "x"]) == 2
    assert not trace.exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told_and_the_one_before_goes_on(recipe: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The last test of this run: it goes on from step 3, over the damaged step 4, to the end."""
    damaged = newest(run) / "optimizer" / "rank_00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (newest(run).parent / "latest").write_text("garbage")
    (row,) = [row for row in printed(capfd, "verify", str(run), "--json", code=1)["checkpoints"] if not row["valid"]]
    assert row["checkpoint"] == str(newest(run)) and str(damaged) in row["problems"][0]
    assert "pretrain/step_00000004: DAMAGED" in printed(capfd, "verify", str(run), code=1)
    done = start("pretrain", "-c", str(recipe), "train.exit_iteration=null")
    assert done.returncode == 0, done.stdout + done.stderr
    told = {event["event"]: event for event in events(run) if event["event"] in ("checkpoint damaged", "resumed")}
    assert told["resumed"]["checkpoint"] == "step_00000003" and told["resumed"]["step"] == 3
    assert (
        told["checkpoint damaged"]["checkpoint"] == "step_00000004" and "optimizer/rank_00000" in told["checkpoint damaged"]["reasons"][0]
    )
    names = {path.name for path in newest(run).parent.iterdir()}
    assert {"step_00000004.damaged", "step_00000007", "step_00000008", "latest"} <= names
    assert (newest(run).parent / "latest").read_text() == "step_00000008\n"
