"""`lineage`: the artifacts of a run as a tree, each below the one that it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from largeformer.artifact import Artifact, is_set_aside, read_status
from largeformer.errors import BadInputError
from largeformer.stages.common.tables import table_console

_SHOWN = {
    "outcome": "{}",
    "parameters": "{:,} parameters",
    "perplexity": "perplexity {:.3f}",
    "bits_per_byte": "{:.4f} bits/byte",
    "val_loss": "validation loss {:.4f}",
    "val_bits_per_byte": "{:.4f} bits/byte",
}

_COMPARED = ("perplexity", "bits_per_byte", "val_loss", "val_bits_per_byte")
"""Of a stage whose model was measured beside the others', these are told as they were measured there."""


@dataclass(frozen=True)
class Node:
    """One stage of the run. `below`: the stage of this run that it is drawn under, the last of its parents to have been made; `others`: its
    further parents, by name; those that lie in no folder of the run by their identity."""

    artifact: Artifact
    below: str | None
    others: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.artifact.path.name


def run(folder: Path, *, as_json: bool = False) -> int:
    """Print the tree of `folder`. Raises BadInputError where it is no run, or none of its stages has finished."""
    found = nodes(folder)
    if as_json:
        rows = [
            {"name": node.name, "kind": node.artifact.kind, "identity": node.artifact.identity, "parents": node.artifact.parents}
            for node in found
        ]
        print(json.dumps({"run": str(folder), "artifacts": rows}, indent=2))
        return 0
    tree = Tree(Text(str(folder), style="bold"))
    drawn: dict[str, Tree] = {}
    for node in found:
        drawn[node.name] = drawn.get(node.below or "", tree).add(_label(node))
    console = table_console()
    console.print(tree)
    status = read_status(folder) or {}
    if status.get("status") in ("failed", "requeue"):
        told = f"{status['status']} in {status.get('stage')}: {status.get('error') or status.get('reason')}"
        console.print(Text(told, style="yellow"))
    return 0


def nodes(folder: Path) -> list[Node]:
    """The finished stages of a run, parents before children."""
    if not folder.is_dir():
        raise BadInputError(f"{folder} is no folder: name a run's output folder")
    held = [artifact for path in sorted(folder.iterdir()) if path.is_dir() and (artifact := Artifact.read(path)) is not None]
    held = [artifact for artifact in held if not is_set_aside(artifact.path)]
    if not held:
        raise BadInputError(f"no stage has finished in {folder}: name a run's output folder, such as run.output_dir of the recipe")
    order = _ordered(held)
    names = {artifact.identity: artifact.path.name for artifact in order}
    place = {artifact.path.name: number for number, artifact in enumerate(order)}
    found = []
    for artifact in order:
        parents = list(dict.fromkeys(artifact.parents.values()))
        here = sorted((names[identity] for identity in parents if identity in names), key=place.__getitem__)
        away = [f"{kind} {identity}" for kind, identity in artifact.parents.items() if identity not in names]
        found.append(Node(artifact, here[-1] if here else None, (*here[:-1], *away)))
    return found


def _ordered(held: list[Artifact]) -> list[Artifact]:
    by_identity: Mapping[str, Artifact] = {artifact.identity: artifact for artifact in held}
    order: list[Artifact] = []

    def visit(artifact: Artifact, under_way: tuple[str, ...]) -> None:
        if artifact in order or artifact.identity in under_way:
            return
        for identity in artifact.parents.values():
            if identity in by_identity:
                visit(by_identity[identity], (*under_way, artifact.identity))
        order.append(artifact)

    for artifact in held:
        visit(artifact, ())
    return order


def _label(node: Node) -> Text:
    label = Text(node.name, style="bold")
    kind = node.artifact.kind
    label.append(f"  {node.artifact.identity}" + (f"  ({kind})" if kind != node.name else ""), style="dim")
    figures = list(_figures(node.artifact.metrics))
    if figures:
        label.append("\n" + ", ".join(figures), style="not bold")
    others = [other for other in node.others if not other.startswith("prepare")]
    if others:
        label.append(f"\nalso made from {', '.join(others)}", style="not bold dim")
    return label


def _figures(metrics: Mapping[str, Any]) -> list[str]:
    quality = metrics.get("quality", {})
    shown = {name: form for name, form in _SHOWN.items() if not (quality and name in _COMPARED)}
    told = [form.format(metrics[name]) for name, form in shown.items() if isinstance(metrics.get(name), int | float | str)]
    if metrics.get("sparsity"):
        told.append(f"{metrics['sparsity']['overall']:.1%} zeros")
    if quality:
        beside = f" ({quality['perplexity_increase']:+.2%} beside {quality['reference']})" if quality["kl"] else ""
        told.append(f"perplexity {quality['perplexity']:.3f}{beside}, {quality['bits_per_byte']:.4f} bits/byte")
    formats = metrics.get("formats")
    if isinstance(formats, Mapping):
        told.append(" ".join(formats))
    return told
