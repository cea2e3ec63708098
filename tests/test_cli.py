"""The command line as a user and a launcher meet it: exit codes, where messages go, and how little it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from largeformer import cli, stages
from largeformer.errors import BadInputError
from tests.config.recipes import write_recipe

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "deepspeed", "megatron", "wandb", "transformers", "numpy")


def run(*arguments: str, environ: Mapping[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m largeformer ...` in a process of its own, without launcher variables but those given."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_ID")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return subprocess.run(
        [sys.executable, "-m", "largeformer", *arguments],
        env={**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **(environ or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def ranked(rank: int, world_size: int = 2) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": 29500}
    return {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


LIGHT = {
    "plan": ["plan", "-c", "quickstart", "--gpu", "cpu"],
    "help": ["--help"],
    "help of a stage": ["pretrain", "--help"],
    "dry run": ["pretrain", "-c", "quickstart", "--dry-run"],
}


@pytest.mark.parametrize("arguments", LIGHT.values(), ids=LIGHT)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys; from largeformer.cli import main; code = main(sys.argv[1:]); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_help_names_every_stage() -> None:
    text = run("--help").stdout
    for stage in ("prepare", "pretrain", "evaluate", "generate", "run", "parity", "bench", "doctor", "plan", "submit", "report", "sync"):
        assert f" {stage} " in text


BAD = {
    "no stage": ([], "Usage: largeformer"),
    "unknown stage": (["pretrian"], "No such command 'pretrian'"),
    "unknown flag": (["pretrain", "-c", "quickstart", "--frsh"], "No such option: --frsh"),
    "no recipe": (["pretrain"], "Missing option '--config' / '-c'"),
    "no such recipe": (["pretrain", "-c", "nowhere.yaml"], "error: there is no recipe nowhere.yaml"),
    "bad value": (["prepare", "-c", "quickstart", "optimizer.lr=.nan"], "error: optimizer.lr is nan, which should be a finite number"),
    "world that does not fit": (
        ["pretrain", "-c", "quickstart", "--dry-run", "--world-size", "3"],
        "error: train.global_batch_size 16 is not a multiple of train.micro_batch_size 4 x data parallel 3 = 12",
    ),
    "world of nobody": (["pretrain", "-c", "quickstart", "--dry-run", "--world-size", "0"], "Invalid value for '--world-size'"),
    "world size alone": (["pretrain", "-c", "quickstart", "--world-size", "2"], "error: --world-size 2 belongs to --dry-run"),
    "ranks that do not fit": (["bench", "-c", "quickstart", "--nproc", "3"], "error: train.global_batch_size 16 is not a multiple"),
    "layout that does not fit": (
        ["parity", "-c", "quickstart", "--nproc", "3", "parallel.tensor_model_parallel_size=2"],
        "error: world size 3 does not fit: parallel.tensor_model_parallel_size 2",
    ),
    "nothing to generate from": (["generate", "--prompt", "x"], "error: neither a recipe nor a run is given"),
    "no such run": (["evaluate", "--from", "runs/none"], "error: --from runs/none: there is no such folder"),
    "sampling out of range": (["generate", "-c", "quickstart", "--prompt", "x", "--top-p", "2"], "error: generate.top_p is 2.0, which"),
    "submit: world that does not fit": (
        ["submit", "-c", "quickstart", "--nodes", "3", "--dry-run"],
        "error: train.global_batch_size 16 is not a multiple of train.micro_batch_size 4 x data parallel 3",
    ),
    "submit: no time": (["submit", "-c", "quickstart", "--time", "soon", "--dry-run"], "error: --time soon is no time limit of SLURM"),
    "submit: stage": (["submit", "-c", "quickstart", "--stage", "export", "--dry-run"], "error: --stage export has no batch script"),
    "submit: output": (
        ["submit", "-c", "quickstart", "run.output_dir=/dev/null/x", "--dry-run"],
        "error: run.output_dir /dev/null/x: /dev/null is not a folder that may be written to",
    ),
    "prepare: output": (
        ["prepare", "-c", "quickstart", "run.output_dir=/dev/null/x"],
        "error: run.output_dir /dev/null/x: /dev/null is not a folder that may be written to",
    ),
    "run: output": (
        ["run", "-c", "quickstart", "run.output_dir=/dev/null/x"],
        "error: run.output_dir /dev/null/x: /dev/null is not a folder that may be written to",
    ),
    "pretrain: output": (
        ["pretrain", "-c", "quickstart", "run.output_dir=/dev/null/x"],
        "error: run.output_dir /dev/null/x: /dev/null is not a folder that may be written to",
    ),
    "no hostfile": (["doctor", "--hostfile", "nowhere"], "error: hostfile nowhere cannot be read"),
    "doctor's override": (["doctor", "run.seed=1"], "error: override 'run.seed=1' has no recipe to change"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_exits_with_2(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    out, err = capfd.readouterr()
    assert message in (out if not arguments else err)
    assert "Traceback" not in err


UNFIT = ["run.stages=[prepare, pretrain, distill, {distill: {name: distill-2}}]", "distill.train={global_batch_size: 12}"]
CHAINS = {
    "submit": ["submit", "-c", "quickstart", "--nodes", "2", "--stage", "run", "--dry-run", *UNFIT],
    "dry run": ["run", "-c", "quickstart", "--dry-run", "--world-size", "2", *UNFIT],
}
_UNFIT = "train.global_batch_size 12 is not a multiple of train.micro_batch_size 4 x data parallel 2"


@pytest.mark.parametrize("arguments", CHAINS.values(), ids=CHAINS)
def test_a_stage_that_does_not_fit_the_world_is_refused_with_its_run(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Once, and with what else is wrong; the recipe's own stage alone is fine."""
    assert cli.main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: in distill: {_UNFIT}")
    assert cli.main([*arguments, "train.global_batch_size=12"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {_UNFIT}")
    assert cli.main([*arguments, "distill.train.global_batch_size=24"]) == 0
    alone = [{"run": "pretrain"}.get(argument, argument) for argument in arguments]
    assert cli.main(alone) == 0


CALIBRATED = {
    "prune": ["prune.calibration.samples=3"],
    "quantize": ["quantize.calibration.samples=3"],
    "neither": ["prune={importance: weight, calibration: {samples: 3}}"],
}


@pytest.mark.parametrize(("stage", "settings"), CALIBRATED.items(), ids=CALIBRATED)
def test_fewer_windows_to_calibrate_on_than_ranks(
    stage: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pipeline ranks read text there too: before the pretraining, not after it."""
    monkeypatch.chdir(tmp_path)
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    chain = ["run", "-c", "quickstart", "run.stages=[prepare, pretrain, prune, quantize]", *layout, *settings]
    assert cli.main([*chain, "--dry-run", "--world-size", "4"]) == 0
    assert cli.main([*chain, "--dry-run", "--world-size", "8"]) == (0 if stage == "neither" else 2)
    if stage == "neither":
        return
    told = f"error: in {stage}: {stage}.calibration.samples 3 is fewer than the 4 data-parallel ranks"
    assert capfd.readouterr().err.startswith(told)
    for name, value in ranked(0, 8).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("largeformer.stages.prepare.run_or_wait", lambda *_, **__: pytest.fail("the first stage has begun"))
    assert cli.main(chain) == 2 and capfd.readouterr().err.startswith(told)
    assert not list(tmp_path.glob("runs/*/*"))


def test_exit_code_reaches_the_shell(tmp_path: Path) -> None:
    """Five mistakes: five lines on stderr, nothing on stdout, exit code 2."""
    mistakes = ["model.num_layer=1", "run.seed=-1", "optimizer.lr=.nan", "parallel.pipeline_model_parallel_size=3", "train.fp8=true"]
    done = run("pretrain", "-c", "quickstart", *mistakes, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 5 and all(line.startswith("error: ") for line in lines)


def test_only_rank_0_speaks() -> None:
    arguments = ("pretrain", "-c", "nowhere.yaml")
    first, second = run(*arguments, environ=ranked(0)), run(*arguments, environ=ranked(1))
    assert first.returncode == second.returncode == 2
    assert "no recipe nowhere.yaml" in first.stderr and second.stderr == second.stdout == ""
    # A rank that cannot know its place says so itself: no other may have the same trouble.
    assert "no recipe nowhere.yaml" in run(*arguments, environ={"RANK": "1"}).stderr


@pytest.mark.parametrize("spelling", ["--local_rank=1", "--local-rank=1"])
def test_launcher_option_before_the_stage(spelling: str) -> None:
    """As `deepspeed --module largeformer pretrain ...` starts a rank; rank 0 of two prints the layout of two."""
    done = run(spelling, "pretrain", "-c", "quickstart", "--dry-run", environ=ranked(0))
    assert done.returncode == 0 and "# Layout: world size 2 = tensor 1 x pipeline 1 x data 2" in done.stdout
    assert run(spelling, "pretrain", "-c", "quickstart", "--dry-run", environ=ranked(1)).stdout == ""


def test_dry_run_of_the_largest() -> None:
    done = run("pretrain", "-c", "launch/recipes/llama-70b.yaml", "--dry-run", "--world-size", "128")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout.partition("# DeepSpeed\n")[2])["gradient_accumulation_steps"] == 512


def test_version() -> None:
    assert run("--version").stdout.startswith("largeformer 0.")


class Stage(SimpleNamespace):
    """A stage in the place of the real one: keeps what it is called with, returns or raises what it is told."""

    def run(self, *arguments: Any, **options: Any) -> Any:
        self.called = (arguments, options)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    run_or_wait = run


def stage(monkeypatch: pytest.MonkeyPatch, name: str, outcome: Any = None) -> Stage:
    stand_in = Stage(outcome=outcome)
    monkeypatch.setattr(stages, name, stand_in, raising=False)
    monkeypatch.setitem(sys.modules, f"largeformer.stages.{name}", stand_in)
    return stand_in


OUTCOMES = {
    "an artifact": (object(), 0, ""),
    "asked to stop early": (None, 0, ""),
    "stopped by a signal": (75, 75, ""),
    "bad input": (BadInputError(["the first", "the second"]), 2, "error: the first\nerror: the second\n"),
    "a failure": (RuntimeError("the disk is full"), 1, "RuntimeError: the disk is full"),
    "interrupted": (KeyboardInterrupt(), 130, ""),
}


@pytest.mark.parametrize(("outcome", "code", "message"), OUTCOMES.values(), ids=OUTCOMES)
def test_outcome_of_a_stage(
    outcome: Any, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stage(monkeypatch, "pretrain", outcome)
    assert cli.main(["pretrain", "-c", "quickstart"]) == code
    error = capfd.readouterr().err
    assert message in error
    assert error.count("Traceback (most recent call last)") == (code == 1)


def test_a_stage_may_exit_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    stage(monkeypatch, "pretrain", SystemExit(75))
    with pytest.raises(SystemExit) as caught:
        cli.main(["pretrain", "-c", "quickstart"])
    assert caught.value.code == 75


@pytest.mark.parametrize(("command", "module"), [("prepare", "prepare"), ("pretrain", "pretrain"), ("run", "pipeline")])
def test_flags_and_overrides_reach_the_stage(command: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = stage(monkeypatch, module, object())
    assert cli.main([command, "run.seed=5", "-c", "quickstart", "optimizer.lr=1e-2", "--fresh"]) == 0
    (recipe,), options = stand_in.called
    own = {"append": False} if command == "prepare" else {}
    assert (recipe.run.seed, recipe.optimizer.lr, options) == (5, 0.01, {"fresh": True, **own})


@pytest.mark.parametrize(
    ("command", "arguments", "ranks"),
    [
        ("parity", [], 2),
        ("parity", ["parallel.pipeline_model_parallel_size=4"], 4),
        ("parity", ["--nproc", "1"], 1),
        ("bench", [], 1),
        ("bench", ["--nproc", "4", "parallel.tensor_model_parallel_size=2"], 4),
    ],
)
def test_ranks_to_start(command: str, arguments: list[str], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = stage(monkeypatch, command)
    assert cli.main([command, "-c", "quickstart", *arguments]) == 0
    assert stand_in.called[0][1] == ranks


def test_generate_from_a_run_that_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipe and output folder come from the run, also where its DeepSpeed config has stayed behind; flags come last."""
    folder = tmp_path / "moved" / "pretrain"
    (folder / "checkpoints").mkdir(parents=True)
    Path(write_recipe(folder)).rename(folder / "config.yaml")
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("zero1", "gone.json"))
    stand_in = stage(monkeypatch, "generate")
    flags = ["--max-new-tokens", "9", "--temperature", "0", "--top-k", "3", "--top-p", "0.5", "--seed", "4"]
    assert cli.main(["generate", "--from", str(folder), "--prompt", "def main(", *flags, "generate.seed=1"]) == 0
    recipe, source, prompt, sampling = stand_in.called[0]
    assert (recipe.run.output_dir, source, prompt) == (str(tmp_path / "moved"), folder, "def main(")
    assert sampling.model_dump() == {"max_new_tokens": 9, "temperature": 0.0, "top_k": 3, "top_p": 0.5, "seed": 4}


def test_evaluate_and_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, doctor = stage(monkeypatch, "evaluate"), stage(monkeypatch, "doctor", 1)
    assert cli.main(["evaluate", "-c", "quickstart"]) == 0
    assert evaluate.called[0][1] is None
    assert cli.main(["doctor", "--json"]) == 1
    assert doctor.called[0] == (None, True, None)
    assert cli.main(["doctor", "-c", "quickstart"]) == 1
    assert doctor.called[0][0].run.name == "quickstart" and doctor.called[0][1] is False
