"""largeformer's own folder: whole tensors under our global names, the recipe and the tokenizer, for whatever reads safetensors.

model.safetensors (or shards and their index)  config.yaml  tokenizer.model or tokenizer.json
README.md                                                                             (`export/card.py`)

Every shape of ours fits. `largeformer import` takes it, and what `checkpoint convert` writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from largeformer.artifact import write_atomically
from largeformer.config.load import load_recipe
from largeformer.config.schema import ModelConfig, Recipe
from largeformer.data.tokenization.tokenizer import copy_tokenizer
from largeformer.errors import BadInputError
from largeformer.export.huggingface import finite
from largeformer.export.onnx import plain_twin
from largeformer.export.streaming import PART_BYTES, Entry, ShardedWriter, StoredTensors
from largeformer.models.hf_mapping import SAME, rows, shapes

CONFIG = "config.yaml"


def write_own(
    source: StoredTensors, model: ModelConfig, dtype: torch.dtype | None, recipe: str, tokenizer: Path | None, folder: Path, max_bytes: int
) -> None:
    """Write the weights in `dtype` (None: as they are stored), one in memory at a time. recipe: YAML. Raises BadInputError where one is not
    finite."""
    names = [row.ours for row in rows(model, "llama")]
    entries = [Entry(name, dtype or source.dtype(name), source.shape(name)) for name in names]
    with ShardedWriter(folder, entries, max_bytes) as writer:
        for entry in entries:
            _write_in_parts(source.read(entry.name), model, entry, writer)
    write_atomically(folder / CONFIG, recipe.encode())
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder / tokenizer.name)


def _write_in_parts(tensor: torch.Tensor, model: ModelConfig, entry: Entry, writer: ShardedWriter) -> None:
    """A function of its own: the last part would keep the tensor in memory while the next is read."""
    for (part,) in SAME.cut_in_parts(tensor, model, PART_BYTES // tensor.element_size()):
        writer.append(entry.name, finite(entry.name, part.to(entry.dtype)))


def is_own(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def recipe_of(folder: Path) -> Recipe:
    """Raises BadInputError where it cannot be read."""
    return load_recipe(str(folder / CONFIG), with_deepspeed=False)


def read_own(weights: StoredTensors, model: ModelConfig, vocab_size: int) -> dict[str, torch.Tensor]:
    """All tensors of a model of this shape. Raises BadInputError for those that are missing, unknown or of another size."""
    table = rows(model, "llama")
    theirs, known = shapes(table, model, vocab_size), {row.ours for row in table}
    if unknown := [name for name in weights.names if name not in known]:
        raise BadInputError(f"{weights.folder} holds {', '.join(unknown[:3])}, which has no place in the model of its {CONFIG}")
    state = {row.ours: weights.read(row.ours) for row in table}
    wrong = [row.ours for row in table if state[row.ours].numel() != sum(math.prod(theirs[name]) for name in row.theirs)]
    if wrong:
        raise BadInputError(f"{weights.folder} holds {wrong[0]} of shape {list(state[wrong[0]].shape)}, which is not its {CONFIG}'s")
    return state


class OwnClient:
    """The folder's model in plain PyTorch, float32, on one process: its shape is what the folder's own recipe says."""

    def __init__(self, folder: Path) -> None:
        recipe = recipe_of(folder)
        self.model = plain_twin(StoredTensors.of_folder(folder), recipe.model, recipe.tokenizer.vocab_size)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)  # type: ignore[no-any-return]

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        ids = list(prompt)
        while len(ids) < len(prompt) + count:
            ids.append(int(self.logits(torch.tensor([ids]))[0, -1].argmax()))
        return ids[len(prompt) :]
