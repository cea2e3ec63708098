"""What a stage `quantize` says of its weights, beside its checkpoints, for `export` to write the integers that were calibrated.

folder/quantization.json           scheme, layers that stay floats, the checkpoint that is meant, the other file's hash
folder/quantization.safetensors    float32, by Hugging Face's modules: `*.weight_scale` [o, g], `*.weight_zero_point`, `*.input_scale` [1]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from largeformer.artifact import Artifact, write_atomically
from largeformer.compression.pruning.sparsity import Readable, View, linear_weights
from largeformer.compression.quantization.schemes import Given, Scheme, rounded
from largeformer.config.schema import ModelConfig
from largeformer.errors import BadInputError
from largeformer.models.hf_mapping import rows

JSON, TENSORS = "quantization.json", "quantization.safetensors"
_WEIGHT = ".weight"
_SCALE, _ZERO, _INPUT = ".weight_scale", ".weight_zero_point", ".input_scale"


@dataclass(frozen=True)
class Description:
    """`ignore`: linear layers of the Transformer that stay floats. `given`: the scales of all others. `checkpoint`: its name."""

    scheme: Scheme
    method: str
    ignore: tuple[str, ...]
    given: Mapping[str, Given]
    checkpoint: str

    def write(self, folder: Path) -> None:
        """The tensors first: what the JSON names is there."""
        content = save(_tensors(self.given))
        write_atomically(folder / TENSORS, content)
        about: dict[str, Any] = {
            "scheme": asdict(self.scheme),
            "method": self.method,
            "ignore": list(self.ignore),
            "checkpoint": self.checkpoint,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_atomically(folder / JSON, (json.dumps(about, indent=2) + "\n").encode())


def as_integers(stored: Readable, described: Description, model: ModelConfig) -> View:
    """The weights of linear layers as the integers stand for them, by our names; those that stay floats as they are."""
    table = {row.ours: row for row in rows(model, "llama")}

    def read(name: str) -> torch.Tensor:
        row = table[name]
        parts = zip(row.theirs, row.form.cut(stored.read(name), model), strict=True)
        return row.form.join(tuple(one(theirs.removesuffix(_WEIGHT), part) for theirs, part in parts), model)

    def one(module: str, part: torch.Tensor) -> torch.Tensor:
        given = described.given.get(module)
        if given is None:
            return part.float()
        zero_point = given.zero_point.cpu() if given.zero_point is not None else None
        return rounded(part, Given(given.scale.cpu(), zero_point), described.scheme)

    return View(linear_weights(stored), read)


def check_scales(given: Mapping[str, Given]) -> None:
    """Raises BadInputError for a scale that is none."""
    for name, tensor in _tensors(given).items():
        wrong = ~torch.isfinite(tensor) if name.endswith(_ZERO) else ~(torch.isfinite(tensor) & (tensor > 0))
        if wrong.any():
            raise BadInputError(
                f"{name} holds {tensor[wrong][0].item()}: a scale must be finite and above 0; quantize a checkpoint from before the model "
                "diverged, or name the layer in quantize.keep_float"
            )


def read_description(checkpoint: Path) -> Description | None:
    """What the checkpoint's stage says of it; None where it says nothing, or speaks of another checkpoint. Raises BadInputError where the
    files are damaged, or lost: a stage `quantize` whose training has ended has a manifest, and until its scales are found no more."""
    folder = checkpoint.parent.parent
    if not (folder / JSON).exists():
        made_by = Artifact.read(folder)
        if made_by is not None and made_by.kind == "quantize":
            raise BadInputError(
                f"{folder} holds no {JSON}, so that its scales were lost or not found yet: run quantize again, which finds them"
            )
        return None
    try:
        about = json.loads((folder / JSON).read_text())
        content = (folder / TENSORS).read_bytes()
        if hashlib.sha256(content).hexdigest() != about["sha256"]:
            raise ValueError(f"{TENSORS} is not what was written")
        found = Description(Scheme(**about["scheme"]), about["method"], tuple(about["ignore"]), _given(load(content)), about["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{folder} does not say how its weights were quantized ({error}): copy the whole stage, or quantize again"
        ) from None
    return found if found.checkpoint == checkpoint.name else None


def _tensors(given: Mapping[str, Given]) -> dict[str, torch.Tensor]:
    parts = {_SCALE: "scale", _ZERO: "zero_point", _INPUT: "input_scale"}
    held = {f"{module}{suffix}": getattr(one, part) for module, one in given.items() for suffix, part in parts.items()}
    # Copies: the library refuses tensors that share memory, as fused layers' input scales do.
    return {name: tensor.float().cpu().clone().contiguous() for name, tensor in held.items() if tensor is not None}


def _given(tensors: Mapping[str, torch.Tensor]) -> dict[str, Given]:
    modules = [name.removesuffix(_SCALE) for name in tensors if name.endswith(_SCALE)]
    return {
        module: Given(tensors[module + _SCALE], tensors.get(module + _ZERO), tensors.get(module + _INPUT)) for module in sorted(modules)
    }
