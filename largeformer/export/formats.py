"""The formats by name: what each needs, how it is written, and who opens it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from largeformer.compression.schemes import Given, Scheme
from largeformer.config.data import TokenizerConfig
from largeformer.config.export import ExportConfig, ExportFormat, ThresholdsConfig
from largeformer.config.schema import ModelConfig
from largeformer.errors import BadInputError
from largeformer.export import gate
from largeformer.export.clients import OnnxClient, TransformersClient
from largeformer.export.compressed_tensors import Compressed, Quantization
from largeformer.export.gate import Client
from largeformer.export.huggingface import Encoder, Plain, SpecialIds, write_configs, write_weights
from largeformer.export.streaming import StoredTensors
from largeformer.export.tokenizer import write_tokenizer
from largeformer.models.hf_config import architecture
from largeformer.models.hf_mapping import rows, shapes

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """What is exported. `given`: scales that calibration found, by Hugging Face's module names; empty: they follow from the weights.

    `tokenizer`: its file; None where tokens are mock.
    """

    source: StoredTensors
    model: ModelConfig
    tokens: TokenizerConfig
    config: ExportConfig
    ids: SpecialIds
    tokenizer: Path | None = None
    given: Mapping[str, Given] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.tokens.vocab_size

    @property
    def stored(self) -> torch.dtype:
        return self.source.dtype("embedding.word_embeddings.weight")

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
    """`check` raises BadInputError before anything is written; `opened` yields one client after another, one in memory at a time."""

    needs: tuple[str, ...]
    check: Callable[[Job], object]
    write: Callable[[Job, Path], None]
    opened: Callable[[Job, Path], Iterator[Opened]]


def chosen(job: Job) -> list[ExportFormat]:
    """The recipe's formats, each of them possible. Raises BadInputError with all that stands in the way."""
    if job.config.formats is None:
        return [name for name in ("hf", "hf-int8", "onnx") if not _problems(name, job, by_default=True)]
    problems = [problem for name in job.config.formats for problem in _problems(name, job)]
    if problems:
        raise BadInputError(list(dict.fromkeys(problems)))
    return list(dict.fromkeys(job.config.formats))


def _problems(name: ExportFormat, job: Job, by_default: bool = False) -> list[str]:
    missing = [library for library in FORMATS[name].needs if find_spec(library) is None]
    if missing:
        sentence = f"export to {name} needs {' and '.join(missing)}: install them with pip install 'largeformer[export]'"
        if by_default:
            raise BadInputError(sentence)
        return [sentence]
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
    yield Opened("model", TransformersClient(folder), gate.EXACT if job.dtype.itemsize >= job.stored.itemsize else gate.NARROWER)


def _integers(scheme: Callable[[ExportConfig], Scheme], thresholds: ThresholdsConfig) -> Format:
    """A Hugging Face folder whose linear layers are integers."""

    def encoder(job: Job) -> Compressed:
        if architecture(job.model).style != "llama":
            raise BadInputError(
                "a Hugging Face GPT-2 has Conv1D layers, which compressed-tensors does not know; onnx holds it in integers: leave this one "
                "out of export.formats"
            )
        theirs = shapes(rows(job.model, "llama"), job.model, job.vocab_size)
        return Compressed(Quantization(scheme(job.config), job.config.keep_float, job.given), job.dtype, theirs)

    def write(job: Job, folder: Path) -> None:
        made = encoder(job)
        _write_hf(job, folder, made, made.config())

    def opened(job: Job, folder: Path) -> Iterator[Opened]:
        about = {"integer_layers": len(encoder(job).modules), "float_layers": encoder(job).ignored}
        yield Opened("model", TransformersClient(folder), thresholds, about)

    return Format(("transformers", "compressed_tensors"), encoder, write, opened)


def _write_onnx(job: Job, folder: Path) -> None:
    from largeformer.export import onnx

    plain = onnx.plain_twin(job.source, job.model, job.vocab_size)
    file = onnx.write_float(plain, job.model, folder)
    del plain
    reduce = job.config.reduce_range
    onnx.write_int8(file, job.config.onnx_keep_float, reduce if reduce is not None else not onnx.has_vnni())


def _open_onnx(job: Job, folder: Path) -> Iterator[Opened]:
    from largeformer.export import onnx

    yield Opened("model", OnnxClient(folder / onnx.FLOAT), gate.SAME_FLOATS)
    file = folder / onnx.INT8
    products, planned = onnx.count_products(file), set(job.config.onnx_keep_float)
    scales = onnx.bad_scales(file)
    wrong = [f"{name} holds a scale that is not finite and above 0" for name in scales]
    if products["float"] > len(planned) or not products["integer"]:
        wrong.append(f"{products['float']} products with weights are left in float, export.onnx_keep_float names {len(planned)}")
    about = {"integer_products": products["integer"], "float_products": products["float"], "wrong": wrong}
    yield Opened("model_int8", OnnxClient(file), gate.INT8, about)


FORMATS: dict[ExportFormat, Format] = {
    "hf": Format(("transformers",), lambda job: architecture(job.model), _write_hf, _open_hf),
    "hf-int8": _integers(lambda config: Scheme(bits=8, activations="token", symmetric=config.symmetric), gate.INT8),
    "hf-w8a16": _integers(lambda config: Scheme(bits=8, symmetric=config.symmetric), gate.INT8),
    "hf-int4": _integers(lambda config: Scheme(bits=4, group_size=config.group_size, symmetric=config.symmetric), gate.INT4),
    "onnx": Format(("onnx", "onnxscript", "onnxruntime"), lambda job: None, _write_onnx, _open_onnx),
}
