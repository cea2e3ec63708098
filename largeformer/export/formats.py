"""The formats by name: what each needs, how it is written, and who opens it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from largeformer.compression.pruning.sparsity import Readable
from largeformer.compression.quantization.description import Description
from largeformer.compression.quantization.schemes import Scheme
from largeformer.config.data import TokenizerConfig
from largeformer.config.export import ExportConfig, ExportFormat, ThresholdsConfig
from largeformer.config.schema import ModelConfig
from largeformer.errors import BadInputError
from largeformer.export import gate
from largeformer.export.clients import OnnxClient, TransformersClient
from largeformer.export.compressed_tensors import Compressed, Quantization
from largeformer.export.gate import Client
from largeformer.export.huggingface import Encoder, Plain, SpecialIds, write_configs, write_weights
from largeformer.export.own import OwnClient, write_own
from largeformer.export.streaming import StoredTensors
from largeformer.export.tokenizer import write_tokenizer
from largeformer.export.written import hugging_face_weights, onnx_weights
from largeformer.models.hf_config import architecture
from largeformer.models.hf_mapping import rows, shapes

_DEFAULTS: tuple[ExportFormat, ...] = ("hf", "hf-int8", "onnx")
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """What is exported. `quantized`: what a stage `quantize` says of the checkpoint; None: scales follow from the weights.

    `recipe`: all of it, as YAML. `tokenizer`: its file; None where tokens are mock.
    """

    source: StoredTensors
    model: ModelConfig
    tokens: TokenizerConfig
    config: ExportConfig
    ids: SpecialIds
    recipe: str = ""
    tokenizer: Path | None = None
    quantized: Description | None = None

    @property
    def vocab_size(self) -> int:
        return self.tokens.vocab_size

    @property
    def stored(self) -> torch.dtype:
        return self.source.dtype("embedding.word_embeddings.weight")

    @property
    def exactness(self) -> ThresholdsConfig:
        """What floats in `dtype` are held to. Of two bytes the one dtype does not hold the other's numbers."""
        return gate.EXACT if torch.promote_types(self.dtype, self.stored) == self.dtype else gate.NARROWER

    @property
    def dtype(self) -> torch.dtype:
        return self.stored if self.config.dtype == "auto" else FLOATS[self.config.dtype]


@dataclass(frozen=True)
class Opened:
    """An export in its client, and what it is held to. `about`: further figures for the manifest."""

    name: str
    client: Client
    thresholds: ThresholdsConfig
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """`holds` raises BadInputError for a shape that the format does not know, `check` for whatever else stands in its way, both before
    anything is written; `opened` yields one client after another, one in memory at a time; `written` the weights that the files hold, by
    what `opened` calls them."""

    needs: tuple[str, ...]
    holds: Callable[[ModelConfig], object]
    check: Callable[[Job], object]
    write: Callable[[Job, Path], None]
    opened: Callable[[Job, Path], Iterator[Opened]]
    written: Callable[[Job, Path], Iterator[tuple[str, Readable]]]


def chosen(job: Job) -> list[ExportFormat]:
    """The recipe's formats, each of them possible; by default those that can hold the model's shape. Raises BadInputError with all that
    stands in the way."""
    formats = job.config.formats or tuple(name for name in _defaults(job) if not _misfits(name, job.model))
    problems = [problem for name in formats for problem in _problems(name, job)]
    if problems:
        raise BadInputError(list(dict.fromkeys(problems)))
    return list(dict.fromkeys(formats))


def _defaults(job: Job) -> tuple[ExportFormat, ...]:
    if job.quantized is None:
        return _DEFAULTS
    return ("hf", _format_of(job.quantized.scheme), "onnx")


def _format_of(scheme: Scheme) -> ExportFormat:
    if scheme.bits == 4:
        return "hf-int4"
    formats: dict[str | None, ExportFormat] = {"token": "hf-int8", "tensor": "hf-int8-static", None: "hf-w8a16"}
    return formats[scheme.activations]


def _misfits(name: ExportFormat, model: ModelConfig) -> list[str]:
    try:
        FORMATS[name].holds(model)
    except BadInputError as error:
        return [f"export to {name}: {problem}" for problem in error.problems]
    return []


def library_problems(config: ExportConfig, model: ModelConfig) -> list[str]:
    """A sentence for each of the recipe's formats, by default of those that can hold the shape, whose libraries are not installed: before
    there is a model. They are looked for, not imported."""
    formats = config.formats or tuple(name for name in _DEFAULTS if not _misfits(name, model))
    return [problem for name in dict.fromkeys(formats) for problem in _missing(name)]


def _missing(name: ExportFormat) -> list[str]:
    missing = [library for library in FORMATS[name].needs if find_spec(library) is None]
    if not missing:
        return []
    return [f"export to {name} needs {' and '.join(missing)}: install them with pip install 'largeformer[export]'"]


def _problems(name: ExportFormat, job: Job) -> list[str]:
    if missing := _missing(name):
        return missing
    if misfits := _misfits(name, job.model):
        return misfits
    try:
        FORMATS[name].check(job)
    except BadInputError as error:
        return [f"export to {name}: {problem}" for problem in error.problems]
    return []


def _write_hf(job: Job, folder: Path, encoder: Encoder | None = None, quantization: Mapping[str, Any] | None = None) -> None:
    shard = int(job.config.max_shard_gb * 1e9)
    write_weights(job.source, job.model, job.vocab_size, encoder or Plain(job.dtype), folder, shard)
    write_configs(job.model, job.vocab_size, job.dtype, job.ids, folder, quantization)
    if job.tokenizer is not None:
        write_tokenizer(job.tokenizer, job.tokens, job.model.seq_length, folder)


def _open_hf(job: Job, folder: Path) -> Iterator[Opened]:
    yield Opened("model", TransformersClient(folder), job.exactness)


def _written_hf(job: Job, folder: Path) -> Iterator[tuple[str, Readable]]:
    yield "model", hugging_face_weights(folder, job.model)


def _has_linear_layers(model: ModelConfig) -> None:
    """Raises BadInputError where Hugging Face has the model in other layers."""
    if architecture(model).style != "llama":
        raise BadInputError(
            "a Hugging Face GPT-2 has Conv1D layers, which compressed-tensors does not know; onnx holds it in integers: leave this one "
            "out of export.formats"
        )


def _integers(scheme: Callable[[ExportConfig], Scheme], thresholds: ThresholdsConfig) -> Format:
    """A Hugging Face folder whose linear layers are integers."""

    def encoder(job: Job) -> Compressed:
        theirs = shapes(rows(job.model, "llama"), job.model, job.vocab_size)
        return Compressed(_quantization(scheme(job.config), job), job.dtype, theirs)

    def write(job: Job, folder: Path) -> None:
        made = encoder(job)
        _write_hf(job, folder, made, made.config())

    def opened(job: Job, folder: Path) -> Iterator[Opened]:
        about = {"integer_layers": len(encoder(job).modules), "float_layers": encoder(job).ignored}
        yield Opened("model", TransformersClient(folder), thresholds, about)

    return Format(("transformers", "compressed_tensors"), _has_linear_layers, encoder, write, opened, _written_hf)


def _quantization(scheme: Scheme, job: Job) -> Quantization:
    """As a stage `quantize` has calibrated it, where the weights of this format are those of its scheme; else round to nearest."""
    found = job.quantized
    if found is None or found.scheme.bits != scheme.bits or (scheme.activations and not found.scheme.symmetric):
        return Quantization(scheme, _kept_together(job))
    scheme = replace(scheme, group_size=found.scheme.group_size, symmetric=found.scheme.symmetric)
    return Quantization(scheme, tuple(dict.fromkeys([*found.ignore, *_kept_together(job)])), found.given)


def _kept_together(job: Job) -> tuple[str, ...]:
    """`export.keep_float`, and what clients compute as one with a layer that it names: queries, keys and values; gate and up."""
    named = dict.fromkeys(job.config.keep_float)
    for row in rows(job.model, "llama"):
        fused = [name.removesuffix(".weight") for name in row.theirs if name.endswith("_proj.weight")]
        if any(name in named for name in fused):
            named |= dict.fromkeys(fused)
    return tuple(named)


def _onnx_keep_float(job: Job) -> tuple[str, ...]:
    """Those that the recipe names, and those that a stage `quantize` left out of 8-bit products."""
    left_out = job.quantized.ignore if job.quantized is not None and job.quantized.scheme.activations else ()
    return tuple(dict.fromkeys([*job.config.onnx_keep_float, *left_out]))


def _onnx_scales(job: Job) -> dict[str, torch.Tensor]:
    """Those of a stage `quantize` whose integers ONNX holds as well: of eight bits, without zero points or groups."""
    found = job.quantized
    if found is None or found.scheme.bits != 8 or not found.scheme.symmetric or found.scheme.group_size is not None:
        return {}
    return {module: given.scale for module, given in found.given.items()}


def _check_onnx(job: Job) -> None:
    """Raises BadInputError for a layer that the model does not have. The twin that is written names every shape's as a Llama's."""
    weights = shapes(rows(job.model, "llama"), job.model, job.vocab_size)
    layers = [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]
    unknown = [name for name in job.config.onnx_keep_float if name not in (*layers, "lm_head")]
    if unknown:
        raise BadInputError(
            f"export.onnx_keep_float names {', '.join(unknown)}; this model's linear layers are named as {', '.join(layers[:3])}, lm_head"
        )


def _write_onnx(job: Job, folder: Path) -> None:
    from largeformer.export import onnx

    plain = onnx.plain_twin(job.source, job.model, job.vocab_size)
    file = onnx.write_float(plain, job.model, folder)
    del plain
    reduce = job.config.reduce_range if job.config.reduce_range is not None else not onnx.has_vnni()
    onnx.write_int8(file, _onnx_keep_float(job), reduce, {} if reduce else _onnx_scales(job))


def _open_onnx(job: Job, folder: Path) -> Iterator[Opened]:
    from largeformer.export import onnx

    yield Opened("model", OnnxClient(folder / onnx.FLOAT), gate.SAME_FLOATS)
    file = folder / onnx.INT8
    products, planned = onnx.count_products(file), _onnx_keep_float(job)
    scales = onnx.bad_scales(file)
    wrong = [f"{name} holds a scale that is not finite and above 0" for name in scales]
    if products["float"] > len(planned) or not products["integer"]:
        wrong.append(f"{products['float']} products with weights are left in float, and {len(planned)} layers were to be")
    about = {"integer_products": products["integer"], "float_products": products["float"], "wrong": wrong}
    yield Opened("model_int8", OnnxClient(file), gate.INT8, about)


def _write_own(job: Job, folder: Path) -> None:
    dtype = None if job.config.dtype == "auto" else job.dtype
    write_own(job.source, job.model, dtype, job.recipe, job.tokenizer, folder, int(job.config.max_shard_gb * 1e9))


def _open_own(job: Job, folder: Path) -> Iterator[Opened]:
    yield Opened("model", OwnClient(folder), job.exactness)


def _written_onnx(job: Job, folder: Path) -> Iterator[tuple[str, Readable]]:
    from largeformer.export import onnx

    for name, file in (("model", onnx.FLOAT), ("model_int8", onnx.INT8)):
        yield name, onnx_weights(folder / file, folder / onnx.FLOAT, job.model)


def _written_own(job: Job, folder: Path) -> Iterator[tuple[str, Readable]]:
    yield "model", StoredTensors.of_folder(folder)


FORMATS: dict[ExportFormat, Format] = {
    "hf": Format(("transformers",), architecture, lambda job: None, _write_hf, _open_hf, _written_hf),
    "hf-int8": _integers(lambda config: Scheme(bits=8, activations="token", symmetric=config.symmetric), gate.INT8),
    "hf-int8-static": _integers(lambda config: Scheme(bits=8, activations="tensor", symmetric=config.symmetric), gate.INT8),
    "hf-w8a16": _integers(lambda config: Scheme(bits=8, symmetric=config.symmetric), gate.INT8),
    "hf-int4": _integers(lambda config: Scheme(bits=4, group_size=config.group_size, symmetric=config.symmetric), gate.INT4),
    "onnx": Format(("onnx", "onnxscript", "onnxruntime"), lambda model: None, _check_onnx, _write_onnx, _open_onnx, _written_onnx),
    "largeformer": Format((), lambda model: None, lambda job: None, _write_own, _open_own, _written_own),
}
