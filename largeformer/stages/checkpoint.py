"""Looking at checkpoints without training: list, verify, inspect, and whole tensors out of shards. One process."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from largeformer.errors import BadInputError
from largeformer.stages.common.tables import table_console

if TYPE_CHECKING:
    from largeformer.checkpoint.format import Place, Tensors

GIB = 2**30


def show_list(source: Path, as_json: bool) -> int:
    """One row a checkpoint, stage by stage, the oldest first. Sizes of files are compared, their contents are not."""
    from largeformer.checkpoint.verify import quick_problems

    rows = [_row(path, quick_problems(path)) for path in _all(source)]
    if as_json:
        print(json.dumps({"checkpoints": rows}, indent=2))
        return 0
    table = Table("stage", "step", "samples", "tokens", "val_loss", "size", "layout", "files", box=None, pad_edge=False)
    table.columns[-1].overflow = "fold"
    for row in rows:
        number = ["-" if row[key] is None else f"{row[key]:,}" for key in ("samples", "tokens")]
        loss = "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        state = "complete" if not row["problems"] else f"damaged: {row['problems'][0]}"
        table.add_row(Text(row["stage"]), f"{row['step']:,}", *number, loss, _size(row["bytes"]), row["layout"] or "-", Text(state))
    table_console().print(table)
    return 0


def verify(source: Path, as_json: bool) -> int:
    """Read every file of every checkpoint under `source`. Returns 1 where any is damaged."""
    from largeformer.checkpoint.verify import checkpoint_problems

    found = {path: checkpoint_problems(path) for path in _all(source)}
    if as_json:
        rows = [{"checkpoint": str(path), "valid": not problems, "problems": problems} for path, problems in found.items()]
        print(json.dumps({"checkpoints": rows}, indent=2))
    for path, problems in found.items() if not as_json else ():
        print(f"{_stage(path)}/{path.name}: {'valid' if not problems else 'DAMAGED'}")
        for problem in problems:
            print(f"    {problem}")
    return 1 if any(found.values()) else 0


def inspect(source: Path, as_json: bool) -> int:
    """What one checkpoint says of itself, and its tensors as its headers describe them."""
    from largeformer.training.checkpointing import read_state

    path = _valid(source, hashes=False)
    record = read_state(path)
    tensors = {part: list(held) for part, held in _parts(path).items()}
    weights = sum(_count(place) for place in tensors["weights"])
    if as_json:
        described = {part: [_described(place) for place in places] for part, places in tensors.items()}
        print(json.dumps({"checkpoint": str(path), "parameters": weights, **record, "tensors": described}, indent=2))
        return 0
    print(f"{path}: {weights:,} parameters")
    for key in ("layout", "progress", "optimizer", "loss_scaler", "validation", "early_stopping", "wandb_run_id", "versions"):
        value = record.get(key)
        shown = "  ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else value
        print(f"  {key:<15}{shown or '-'}")
    for name in record["extra"]:
        print(f"  extra          {name}")
    for part, places in tensors.items():
        print(f"  {part}: {len(places)} tensors, {_size(sum(place.nbytes for place in places))}")
        for place in places:
            print(f"    {place.name:<78} {str(place.dtype).removeprefix('torch.'):<9} {list(place.shape)}")
    return 0


def convert(source: Path, output: Path, masters: bool, max_shard_gib: float) -> int:
    """Write the whole tensors into the folder `output`, one in memory at a time. The folder appears when it is complete."""
    if output.exists():
        raise BadInputError(f"--output {output} is there already: name a folder that is not, or move it away")
    path = _valid(source, below="" if masters else "weights/")
    wanted = _wanted(_parts(path), masters)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise BadInputError(f"--output {output} cannot be made ({error.strerror}): name a folder that may be written to") from None
    try:
        count = _write_shards(temporary, wanted, max_shard_gib * GIB)
        for text in ("config.yaml", "state.json"):
            shutil.copyfile(path / text, temporary / text)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    kind = "float32 masters" if masters else "weights"
    print(f"{output}: {len(wanted)} tensors ({kind} of {path.name}) in {count} file{'s' if count > 1 else ''}")
    return 0


def _all(source: Path) -> list[Path]:
    from largeformer.checkpoint.commit import stages_with_checkpoints

    return [path for found in stages_with_checkpoints(source) for path in reversed(found)]


def _stage(checkpoint: Path) -> str:
    """The name of the folder of the stage that saved it."""
    return checkpoint.absolute().parent.parent.name


def _valid(source: Path, hashes: bool = True, below: str = "") -> Path:
    from largeformer.checkpoint.verify import find

    found = find(source, hashes, below)
    for refused in found.refused:
        Console(stderr=True, soft_wrap=True).print(f"{refused}; using {found.checkpoint.name} instead", markup=False, highlight=False)
    return found.checkpoint


def _parts(path: Path) -> dict[str, Tensors]:
    from largeformer.training.checkpointing import open_tensors
    from largeformer.training.state import OPTIMIZER, WEIGHTS

    return {part: open_tensors(path, part) for part in (WEIGHTS, OPTIMIZER)}


def _wanted(parts: dict[str, Tensors], masters: bool) -> list[tuple[str, Place, Tensors]]:
    """(name, stored tensor, where it is stored), largest dtype first. Float32 weights are their own masters."""
    stored = {
        place.name.removeprefix("master."): (place, parts["optimizer"]) for place in parts["optimizer"] if place.name.startswith("master.")
    }
    weights = {place.name: (place, parts["weights"]) for place in parts["weights"]}
    chosen = {**weights, **stored} if masters else weights
    return sorted(((name, *entry) for name, entry in chosen.items()), key=lambda entry: (-entry[1].dtype.itemsize, entry[0]))


def _write_shards(folder: Path, wanted: list[tuple[str, Place, Tensors]], max_bytes: float) -> int:
    """`model.safetensors`, or numbered files and the index that says which tensor is where. Returns how many."""
    from largeformer.export.streaming import Entry, ShardedWriter

    entries = [Entry(name, place.dtype, tuple(place.shape)) for name, place, _ in wanted]
    with ShardedWriter(folder, entries, int(max_bytes)) as writer:
        for name, place, held in wanted:
            writer.append(name, held.whole(place))
    return len(list(folder.glob("*.safetensors")))


def _row(path: Path, problems: list[str]) -> dict[str, Any]:
    from largeformer.checkpoint.commit import step_of
    from largeformer.checkpoint.manifest import DamagedError, read_manifest
    from largeformer.training.checkpointing import read_state

    row: dict[str, Any] = {
        "stage": _stage(path),
        "step": step_of(path),
        "checkpoint": str(path),
        "samples": None,
        "tokens": None,
        "val_loss": None,
        "layout": None,
    }
    try:
        size = sum(digest.size for digest in read_manifest(path).values())
    except DamagedError:
        size = 0
    try:
        record = read_state(path)
        layout = record["layout"]
        row |= {"samples": record["progress"]["samples"], "tokens": record["progress"]["tokens"]}
        row |= {"val_loss": record["validation"].get("val_loss")}
        if layout:  # none where the model was imported, or changed without training
            row |= {"layout": f"TP{layout['tensor']} PP{layout['pipeline']} on {layout['world_size']}"}
    except (BadInputError, KeyError, TypeError, AttributeError):
        problems = problems or [f"{path / 'state.json'} cannot be read"]
    return {**row, "bytes": size, "problems": problems}


def _described(place: Place) -> dict[str, Any]:
    return {"name": place.name, "dtype": str(place.dtype).removeprefix("torch."), "shape": list(place.shape)}


def _size(count: float) -> str:
    units = ("B", "KiB", "MiB", "GiB")
    power = min(int(math.log2(count) // 10), 3) if count else 0
    return f"{count / 2 ** (10 * power):,.{1 if power else 0}f} {units[power]}"


def _count(place: Place) -> int:
    return place.nbytes // place.dtype.itemsize
