"""ONNX files for onnxruntime: fp32, and integers made of it.

    model.onnx        float32, from the plain twin (`export/twin.py`)
    model_int8.onnx   weights int8 for each output channel, activations uint8 with a scale taken at run time; embedding rows int8

Inputs, outputs and file names are those of Hugging Face's Optimum. Above 2 GB, which a protobuf file cannot hold, the weights lie beside
the graph in `model.onnx.data`.
"""

from __future__ import annotations

import logging
import platform
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from largeformer.config.schema import ModelConfig
from largeformer.errors import BadInputError
from largeformer.export.huggingface import finite
from largeformer.export.streaming import StoredTensors
from largeformer.export.twin import CachedGPT
from largeformer.models.hf_mapping import rows
from largeformer.models.plain import PlainGPT

FLOAT, INT8 = "model.onnx", "model_int8.onnx"
_LARGEST_INLINE = 1_800_000_000
_TRANSPOSED = "_transposed"
_FLOAT_PRODUCTS = {"MatMul", "Gemm", "FusedMatMul"}
_INTEGER_PRODUCTS = {"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm"}


def plain_twin(source: StoredTensors, model: ModelConfig, vocab_size: int) -> PlainGPT:
    """The model in plain PyTorch, float32, with the checkpoint's weights, read one tensor at a time."""
    plain = PlainGPT(model, vocab_size).eval()
    held = dict(plain.named_parameters())
    with torch.no_grad():
        for row in rows(model, "llama"):
            tensor = source.read(row.ours)
            for name, part in zip(row.theirs, row.form.cut(tensor, model), strict=True):
                if held[name].shape != part.shape:
                    raise BadInputError(f"{source.folder} holds {row.ours} of shape {list(tensor.shape)}, which is not this model's")
                held[name].copy_(finite(row.ours, part.float()))
    return plain


def write_float(plain: PlainGPT, model: ModelConfig, folder: Path) -> Path:
    """Write `model.onnx`. Batch, sequence and cache are of any length; the positions end at model.seq_length."""
    twin = CachedGPT(plain, model).eval()
    layers, heads, size = range(model.num_layers), model.query_groups, model.head_dim
    cache = [(torch.zeros(2, heads, 3, size), torch.zeros(2, heads, 3, size)) for _ in layers]
    example = (torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64), torch.arange(3, 8).expand(2, 5), cache)
    past = {0: "batch", 2: "past"}
    axes = ({0: "batch", 1: "sequence"}, {0: "batch", 1: "total"}, {0: "batch", 1: "sequence"}, [(past, past) for _ in layers])
    names = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value"))]
    with _quietly(), torch.no_grad():
        program = torch.onnx.export(
            twin,
            example,
            dynamo=True,
            dynamic_shapes=axes,
            input_names=names,
            output_names=["logits", *(f"present.{i}.{kind}" for i in layers for kind in ("key", "value"))],
            verbose=False,
        )
        assert program is not None, "with dynamo the program is returned"
        size_of_weights = sum(parameter.numel() * 4 for parameter in plain.parameters())
        program.save(str(folder / FLOAT), external_data=size_of_weights > _LARGEST_INLINE)
    return folder / FLOAT


def write_int8(float_file: Path, keep_float: Sequence[str], reduce_range: bool, scales: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write `model_int8.onnx` beside the float file. `keep_float`: linear layers whose product stays float, by module name.

    reduce_range: weights of seven bits, for CPUs whose 8-bit products saturate in 16 bits (no VNNI). scales: [o, 1] of modules whose
    integers of eight bits are to be these; of others they follow from the weights' extremes.
    """
    assert not (scales and reduce_range), "scales of eight bits do not go with seven"
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = float_file.with_name(INT8)
    source = onnx.load(str(float_file))
    external = float_file.with_name(f"{FLOAT}.data").exists()
    products = _linear_products(source.graph)
    unknown = sorted(set(keep_float) - set(products.values()))
    if unknown:
        raise BadInputError(f"export.onnx_keep_float names {', '.join(unknown)}; layers are named as {next(iter(products.values()))}")
    excluded = [name for name, module in products.items() if module in keep_float]
    _own_matrix(source.graph, excluded)
    with _quietly(), tempfile.TemporaryDirectory(dir=float_file.parent, prefix=".int8-") as temporary:
        between = Path(temporary) / INT8
        quantize_dynamic(
            source,
            str(between),
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
            use_external_data_format=external,
        )
        made = onnx.load(str(between))
        _take_scales(made.graph, source.graph, {products[name]: name for name in products if name not in excluded}, scales or {})
        _quantize_embedding(made.graph)
        onnx.save(made, str(file), save_as_external_data=external, location=f"{INT8}.data")
    return file


def count_products(file: Path) -> dict[str, int]:
    """Products with weights in the graph as onnxruntime runs it: `integer`, and `float` ones that were left."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".optimised-") as temporary:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(temporary) / "graph.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    products = [node for node in graph.node if len(node.input) > 1 and node.input[1] in weights]
    return {
        "integer": sum(node.op_type in _INTEGER_PRODUCTS for node in graph.node),
        "float": sum(node.op_type in _FLOAT_PRODUCTS for node in products),
    }


def bad_scales(file: Path) -> list[str]:
    """Scales in the graph that are not finite or not above 0."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(file))
    found = []
    for initializer in model.graph.initializer:
        if initializer.name.endswith("_scale"):
            scale = numpy_helper.to_array(initializer)
            if not (np.isfinite(scale) & (scale > 0)).all():
                found.append(initializer.name)
    return found


def linear_matrices(float_file: Path) -> dict[str, str]:
    """Module -> the matrix [i, o] that its product is with, in the float file."""
    import onnx

    graph = onnx.load(str(float_file), load_external_data=False).graph
    products = _linear_products(graph)
    return {products[node.name]: node.input[1] for node in graph.node if node.name in products}


def has_vnni() -> bool:
    """Whether this CPU multiplies 8-bit integers without saturating: VNNI or AMX on x86, always on Arm."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


def _linear_products(graph: Any) -> dict[str, str]:
    """Node -> module (`model.layers.0.mlp.up_proj`) of the products with weights."""
    found = {}
    for node in graph.node:
        if node.op_type == "MatMul":
            stack = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
            modules = [name.strip("'\" []") for name in stack.split(",")]
            linear = [name for name in modules if name.endswith(("_proj", "lm_head"))]
            if linear:
                found[node.name] = linear[-1].removeprefix("plain.")
    return found


def _own_matrix(graph: Any, excluded: Sequence[str]) -> None:
    """A head that is tied to the embedding multiplies by a transpose of it; the quantizer asks for a matrix that lies there."""
    from onnx import numpy_helper

    tables = {initializer.name: initializer for initializer in graph.initializer}
    transposes = {node.output[0]: node for node in graph.node if node.op_type == "Transpose" and node.input[0] in tables}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in transposes and node.name not in excluded:
            transpose = transposes[node.input[1]]
            name = f"{transpose.input[0]}{_TRANSPOSED}"
            matrix = np.ascontiguousarray(numpy_helper.to_array(tables[transpose.input[0]]).T)
            graph.initializer.append(numpy_helper.from_array(matrix, name))
            node.input[1] = name
            graph.node.remove(transpose)


def _take_scales(made: Any, floats: Any, nodes: Mapping[str, str], scales: Mapping[str, torch.Tensor]) -> None:
    """Replace the integers and scales of modules in the graph `made`: the quantizer divides by 127 what GPTQ has put on a grid of 127.5,
    and would round it once more. nodes: module -> node of its product."""
    from onnx import numpy_helper

    matrices = {node.name: node.input[1] for node in floats.node if node.op_type == "MatMul"}
    weights, held = ({initializer.name: initializer for initializer in graph.initializer} for graph in (floats, made))
    for module, scale in scales.items():
        if module in nodes:
            matrix = matrices[nodes[module]]
            assert not numpy_helper.to_array(held[f"{matrix}_zero_point"]).any(), "weights are symmetric"
            row = scale.float().numpy().reshape(1, -1)
            integers = np.rint(np.clip(numpy_helper.to_array(weights[matrix]) / row, -128, 127)).astype(np.int8)
            for name, array in ((f"{matrix}_quantized", integers), (f"{matrix}_scale", row[0])):
                assert list(held[name].dims) == list(array.shape), f"{name} is {list(held[name].dims)}"
                held[name].CopyFrom(numpy_helper.from_array(array, name))


def _quantize_embedding(graph: Any) -> None:
    """Rows of the embedding as int8 with a scale each: as much of the file as a layer, or more, and nothing but a look-up.

    A tied head has them already, as columns.
    """
    from onnx import helper, numpy_helper

    node = next(node for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids")
    held = {initializer.name: initializer for initializer in graph.initializer}
    name = node.input[0]
    head = f"{name}{_TRANSPOSED}"
    if f"{head}_quantized" in held:
        made = [
            helper.make_node("Gather", [f"{head}_quantized", "input_ids"], ["embedded_columns"], axis=1),
            helper.make_node("Transpose", ["embedded_columns"], ["embedded_rows"], perm=[1, 2, 0]),
            helper.make_node("Gather", [f"{head}_scale", "input_ids"], ["embedded_scales_flat"], axis=0),
            helper.make_node("Unsqueeze", ["embedded_scales_flat", "embedded_last_axis"], ["embedded_scales"]),
        ]
        graph.initializer.append(numpy_helper.from_array(np.array([-1]), "embedded_last_axis"))
    else:
        table = numpy_helper.to_array(held[name])
        scale = (np.maximum(np.abs(table).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127).astype(np.float32)
        integers = np.clip(np.rint(table / scale), -127, 127).astype(np.int8)
        graph.initializer.extend([numpy_helper.from_array(integers, f"{name}_quantized"), numpy_helper.from_array(scale, f"{name}_scale")])
        made = [
            helper.make_node("Gather", [f"{name}_quantized", "input_ids"], ["embedded_rows"], axis=0),
            helper.make_node("Gather", [f"{name}_scale", "input_ids"], ["embedded_scales"], axis=0),
        ]
    made += [
        helper.make_node("Cast", ["embedded_rows"], ["embedded_floats"], to=1),  # 1: float32
        helper.make_node("Mul", ["embedded_floats", "embedded_scales"], list(node.output)),
    ]
    position = list(graph.node).index(node)
    graph.node.remove(node)
    for number, new in enumerate(made):
        graph.node.insert(position + number, new)
    if not any(name in other.input for other in graph.node):
        graph.initializer.remove(held[name])


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter tells of every operator of torchvision that is not there, the quantizer of a preparation that ours needs not."""
    loggers = [logging.getLogger(), logging.getLogger("torch.onnx")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
