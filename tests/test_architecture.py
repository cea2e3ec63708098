"""The house rules as tests: imports go one way, two libraries have one door each, files stay readable, imports are harmless.

Each rule is a function over source text, so that the tests at the end can show it a sinner and see it complain.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "largeformer"

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"artifact", "layout"}),
    frozenset({"config"}),
    frozenset({"parallel"}),
    frozenset({"models", "data", "tracking"}),
    frozenset({"checkpoint", "evaluation", "compression"}),
    frozenset({"training", "export", "planning", "launching"}),
    frozenset({"stages"}),
    frozenset({"commands"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
COMMON = "largeformer.stages.common."
DOORS = {"parallel_state": "parallel/groups.py", "deepspeed.initialize": "training/engine.py"}
HEAVY = {"torch", "deepspeed", "megatron", "wandb", "transformers", "numpy", "tensorboard"}
LIGHT_ROOMS = {"errors", "artifact", "layout", "config", "commands", "cli", "__main__"}
LONGEST_FILE, LONGEST_FUNCTION = 320, 66  # lines: "about 300" and "about 60", with a tenth to spare


def floor_of(room: str) -> int:
    floors = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"largeformer/{room} stands on no floor: add it to FLOORS, and to docs/design.md"
    return floors[0]


def module_name(path: Path) -> str:
    """`largeformer/config/load.py` -> `largeformer.config.load`; a package's `__init__.py` is the package."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported anywhere in `tree`, lazily or for types alone too. `package` resolves dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def wrong_imports(source: str, module: str, package: str) -> list[str]:
    """Imports of `module` that run upward, or sideways into another room of the same floor."""
    room = module.split(".")[1]
    wrong = []
    for line, name in imported_names(ast.parse(source), package):
        if not name.startswith("largeformer.") or name == "largeformer.__version__":
            continue
        other = name.split(".")[1]
        if other != room and floor_of(other) >= floor_of(room):
            wrong.append(f"{module}:{line} imports {name}: {other} does not stand below {room}")
        if module.startswith(COMMON) and name.startswith("largeformer.stages.") and not name.startswith(COMMON):
            wrong.append(f"{module}:{line} imports {name}: what stages share knows no stage")
    return wrong


def wrong_doors(source: str, path: str) -> list[str]:
    """Uses of `parallel_state` or `deepspeed.initialize` outside their one file. `path` is relative to the package."""
    tree = ast.parse(source)
    names = [(line, name) for line, name in imported_names(tree, "largeformer.x")]
    names += [(node.lineno, ast.unparse(node)) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [
        f"{path}:{line} uses {name}: only {home} may use {door}"
        for door, home in DOORS.items()
        for line, name in names
        if path != home and f".{door}." in f".{name}."
    ]


def too_long(source: str, path: str) -> list[str]:
    found = [f"{path} has {lines} lines"] if (lines := len(source.splitlines())) > LONGEST_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                found.append(f"{path}:{node.lineno} {node.name} has {length} lines")
    return found


def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_imports_go_one_way() -> None:
    wrong = []
    for module, path in modules().items():
        if module != "largeformer":
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            wrong += wrong_imports(path.read_text(), module, package)
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_imports_nothing() -> None:
    assert not list(imported_names(ast.parse((PACKAGE / "__init__.py").read_text()), "largeformer"))


def test_each_library_has_one_door() -> None:
    wrong = [problem for path in modules().values() for problem in wrong_doors(path.read_text(), path.relative_to(PACKAGE).as_posix())]
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_readable() -> None:
    long = [problem for path in modules().values() for problem in too_long(path.read_text(), path.relative_to(REPOSITORY).as_posix())]
    assert not long, "\n".join(long)


IMPORT_ALL = """
import importlib, json, os, sys, threading
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
dist = sys.modules.get("torch.distributed")
cuda = sys.modules.get("torch.cuda")
print(json.dumps({
    "loaded": sorted({name.split(".")[0] for name in sys.modules}),
    "files": os.listdir("."),
    "group": bool(dist and dist.is_available() and dist.is_initialized()),
    "cuda": bool(cuda and cuda.is_initialized()),
    "environ": sorted(set(os.environ) - set(json.loads(sys.argv[2]))),
    "threads": [thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()],
}))
"""


def import_all(names: list[str], folder: Path) -> dict[str, object]:
    """Import `names` in a fresh process that sees no GPU and no launcher, in an empty folder; what it left behind."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    work = folder / "work"
    work.mkdir()
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(names), json.dumps(sorted(environ))]
    done = subprocess.run(command, cwd=work, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_light_rooms_import_nothing_heavy(tmp_path: Path) -> None:
    light = [name for name in modules() if [*name.split("."), ""][1] in LIGHT_ROOMS and not name.endswith("__main__")]
    assert set(import_all(light, tmp_path)["loaded"]) & HEAVY == set()  # type: ignore[call-overload]


def test_every_module_imports_without_a_gpu_and_without_side_effects(tmp_path: Path) -> None:
    names = [name for name in modules() if not name.endswith("__main__") and name != "largeformer.training.engine"]
    left = import_all(names, tmp_path)
    assert left["files"] == []
    assert left["group"] is False
    assert left["cuda"] is False
    assert left["threads"] == []
    assert [name for name in left["environ"] if name in {"RANK", "WORLD_SIZE", "MASTER_ADDR", "DS_ACCELERATOR"}] == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("largeformer.config.load", "from largeformer.models import gpt", id="upward"),
        pytest.param("largeformer.config.load", "def f():\n    from largeformer.models.gpt import build", id="upward, lazily"),
        pytest.param("largeformer.config.load", "if TYPE_CHECKING:\n    from largeformer.stages import prepare", id="upward, for types"),
        pytest.param("largeformer.models.gpt", "from largeformer.data.loader import Batches", id="sideways"),
        pytest.param("largeformer.models.gpt", "from ..data import loader", id="sideways, by dots"),
        pytest.param("largeformer.models.gpt", "from largeformer import training", id="by the package"),
        pytest.param("largeformer.models.gpt", "importlib.import_module('largeformer.stages.bench')", id="by import_module"),
        pytest.param("largeformer.layout", "import largeformer.artifact", id="single modules of one floor"),
        pytest.param("largeformer.stages.common.world", "from largeformer.stages import prepare", id="a stage, from what stages share"),
    ],
)
def test_wrong_import_is_seen(module: str, source: str) -> None:
    assert wrong_imports(source, module, module.rpartition(".")[0])


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("largeformer.models.gpt", "from largeformer.parallel.groups import ParallelGroups", id="downward"),
        pytest.param("largeformer.models.gpt", "from largeformer.models.layers import norm", id="own room"),
        pytest.param("largeformer.models.gpt", "from . import layers", id="own room, by dots"),
        pytest.param("largeformer.cli", "from largeformer import __version__", id="the version"),
        pytest.param("largeformer.tracking.wandb", "import wandb", id="a library of the same name"),
    ],
)
def test_right_import_passes(module: str, source: str) -> None:
    assert not wrong_imports(source, module, module.rpartition(".")[0])


@pytest.mark.parametrize(
    "source",
    [
        "from megatron.core import parallel_state",
        "from megatron.core.parallel_state import get_tensor_model_parallel_group",
        "import megatron.core.parallel_state as groups",
        "megatron.core.parallel_state.destroy_model_parallel()",
        "deepspeed.initialize(model=model)",
        "from deepspeed import initialize",
    ],
)
def test_wrong_door_is_seen(source: str) -> None:
    assert wrong_doors(source, "training/trainer.py")


def test_long_code_is_seen() -> None:
    assert too_long("x = 1\n" * (LONGEST_FILE + 1), "a.py")
    assert too_long("def f():\n" + "    x = 1\n" * LONGEST_FUNCTION, "a.py")
    assert not too_long("def f():\n" + "    x = 1\n" * (LONGEST_FUNCTION - 1), "a.py")


def test_a_room_on_no_floor_is_refused() -> None:
    with pytest.raises(AssertionError, match="stands on no floor"):
        floor_of("attic")
