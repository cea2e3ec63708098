"""Where the files that come with largeformer are: recipes and DeepSpeed configs, found by path or by bare name, and batch scripts.

In a source tree they lie in `launch/recipes/`, `ds_configs/` and `launch/slurm/` beside the package; an installed wheel carries the
same folders inside it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from largeformer.errors import BadInputError

_PACKAGE = Path(__file__).resolve().parent.parent
_RECIPE_FOLDERS = (_PACKAGE.parent / "launch" / "recipes", _PACKAGE / "_shipped" / "recipes")
_DEEPSPEED_FOLDERS = (_PACKAGE.parent / "ds_configs", _PACKAGE / "_shipped" / "ds_configs")
_BATCH_FOLDERS = (_PACKAGE.parent / "launch" / "slurm", _PACKAGE / "_shipped" / "slurm")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with largeformer."""
    return _named_files(_RECIPE_FOLDERS, ".yaml")


def shipped_deepspeed() -> dict[str, Path]:
    """Name -> file of every DeepSpeed config that comes with largeformer."""
    return _named_files(_DEEPSPEED_FOLDERS, ".json")


def batch_script(name: str) -> str:
    """The text of a shipped SLURM batch script: `pretrain`, `pipeline` or `array_sweep`."""
    return _named_files(_BATCH_FOLDERS, ".sbatch")[name].read_text()


def find_recipe(path_or_name: str) -> Path:
    """The recipe's file: a path, or the name of a shipped one (`quickstart`). Raises BadInputError where there is none."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path.is_dir():
        raise BadInputError(f"recipe {path_or_name} is a folder: name the YAML file in it")
    shipped = shipped_recipes()
    if path.parent == Path() and path.stem in shipped and path.suffix in ("", ".yaml"):
        return shipped[path.stem]
    raise BadInputError(f"there is no recipe {path_or_name}{_choices(path.stem, shipped)}")


def find_deepspeed(path_or_name: str, beside: Path | None = None) -> Path:
    """The DeepSpeed config: a path from here, a path from the folder `beside`, or a shipped one (`zero1`,
    `ds_configs/zero1.json`). Raises BadInputError where there is none."""
    path = Path(path_or_name)
    for candidate in (path, *([beside / path] if beside is not None else [])):
        if candidate.is_file():
            return candidate
    shipped = shipped_deepspeed()
    if path.parent in (Path(), Path("ds_configs")) and path.stem in shipped and path.suffix in ("", ".json"):
        return shipped[path.stem]
    raise BadInputError(f"deepspeed {path_or_name}: there is no such file{_choices(path.stem, shipped)}")


def find_run_recipe(source: Path) -> tuple[Path, Path | None]:
    """The resolved recipe (`config.yaml`) that belongs to a run folder, a stage folder or a checkpoint, and the run folder.

    The run folder is None for a checkpoint that stands alone, copied out of its run.
    """
    if not source.exists():
        raise BadInputError(f"--from {source}: there is no such folder; give a run, a stage or a checkpoint folder")
    here = source.resolve()
    if here.parent.name == "checkpoints":  # run/stage/checkpoints/step_00000100
        stages = [here.parent.parent]
    elif here.name == "checkpoints":
        stages = [here.parent]
    else:
        stages = [here / "pretrain", here / "import", here]
    for stage in stages:
        if (stage / "config.yaml").is_file() and (stage / "checkpoints").is_dir():
            return stage / "config.yaml", stage.parent
    if (here / "config.yaml").is_file():
        return here / "config.yaml", None
    raise BadInputError(f"--from {source}: no trained stage with its config.yaml is there; give a folder that pretrain has written")


def _named_files(folders: Iterable[Path], suffix: str) -> dict[str, Path]:
    """The files of the first folder that exists, by name without suffix."""
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))}


def _choices(name: str, shipped: Iterable[str]) -> str:
    names = sorted(shipped)
    nearest = difflib.get_close_matches(name, names, n=1)
    return (f"; did you mean {nearest[0]}?" if nearest else "") + f" (shipped: {', '.join(names)})"
