"""`import`: a folder of Hugging Face's, or our own, becomes the first checkpoint of a run: to be generated from, trained on or compressed.

RUN/import/checkpoints/step_00000000/    the weights under our names, in their dtype, and config.yaml
RUN/import/tokenizer.model               copied, where the folder has one, with what it says of chats and special tokens
RUN/import/config.yaml, manifest.json    a recipe of this shape, with everything else at its default

All of it is made in `import.unfinished`, and gets its name at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largeformer.artifact import Artifact, identity_hash, library_versions, sync_folder, write_atomically
from largeformer.config.data import TokenizerConfig
from largeformer.config.load import load_recipe, recipe_yaml
from largeformer.config.schema import ModelConfig, Recipe
from largeformer.config.source import to_yaml
from largeformer.data.tokenization.tokenizer import (
    copy_tokenizer,
    json_in,
    load_tokenizer,
    said_of,
    tokenizer_file,
    tokenizer_of_any_size,
)
from largeformer.errors import BadInputError
from largeformer.stages.common.claim import holds_results, set_aside
from largeformer.stages.common.world import reporting

if TYPE_CHECKING:
    import torch

    from largeformer.export.streaming import StoredTensors

STAGE = "import"
_UNFINISHED = f"{STAGE}.unfinished"
_TOKENIZERS = {"tokenizer.model": "sentencepiece", "tokenizer.json": "huggingface"}
_PRECISIONS = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


@dataclass(frozen=True)
class _Held:
    """What a folder says of its model. described: what makes it what it is. tokens: the recipe's section `tokenizer`, as far as it is
    known. state: reads all tensors, under our names."""

    described: Mapping[str, Any]
    architecture: str
    model: ModelConfig
    tokens: Mapping[str, Any]
    state: Callable[[StoredTensors], Mapping[str, torch.Tensor]]


def run(source: Path, output: Path, overrides: Sequence[str] = (), *, fresh: bool = False) -> Artifact:
    """Import the folder `source` into the run folder `output`. `overrides` change the recipe that is made (not the model's shape, but for
    `model.seq_length` where positions are rotated). Raises BadInputError with everything that our model cannot hold; what was imported
    before is then where it was."""
    from largeformer.export.own import is_own

    held = _held_by_us(source) if is_own(source) else _held_by_hugging_face(source)
    folder, made = output / STAGE, output / _UNFINISHED
    if holds_results(folder) and not fresh:
        raise BadInputError(f"{folder} is not empty: choose another --output, or pass --fresh to set it aside")
    weights = _open(source)
    try:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
    except OSError as error:
        raise BadInputError(f"--output {output} cannot be made ({error.strerror}): name a folder that may be written to") from None
    try:
        recipe = _recipe(held, weights, source, folder, made, overrides)
        with reporting(recipe, STAGE):
            return _import(held, weights, recipe, source, folder, made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _import(held: _Held, weights: StoredTensors, recipe: Recipe, source: Path, folder: Path, made: Path) -> Artifact:
    """Write everything in `made`, and give it the name `folder`; what is there is set aside."""
    parameters, checksums = _write_checkpoint(held.state(weights), recipe, made)
    metrics = {"architecture": held.architecture, "parameters": parameters, **_tokenizer_metrics(recipe, made)}
    model, tokenizer = recipe.model.model_dump(mode="json", exclude={"attention_backend"}), recipe.tokenizer.model_dump(exclude={"model"})
    told = {"said": said} if (said := said_of(made)) else {}
    read_as = {"model": model, "tokenizer": tokenizer, "tokenizer_sha256": metrics.get("tokenizer_sha256"), **told}
    identity = identity_hash({"stage": STAGE, "config": held.described, "weights": checksums, **read_as})
    artifact = Artifact(STAGE, made, identity, metrics=metrics, versions=library_versions(("torch", "safetensors"))).write()
    if folder.exists() and any(folder.iterdir()):
        set_aside(folder)
    made.rename(folder)
    sync_folder(folder.parent)
    print(f"imported {parameters:,} parameters into {folder}", flush=True)
    if recipe.tokenizer.model is None:
        print(f"{source} has no tokenizer that we read ({' or '.join(_TOKENIZERS)}): give one as tokenizer.model of the recipe")
    return replace(artifact, path=folder)


def _held_by_us(source: Path) -> _Held:
    from largeformer.export.own import read_own, recipe_of

    recipe = recipe_of(source)
    model, tokens = recipe.model, recipe.tokenizer.model_dump(mode="json", exclude={"model"})
    described = {"model": model.model_dump(mode="json"), "tokenizer": tokens}
    return _Held(described, "largeformer", model, tokens, lambda weights: read_own(weights, model, recipe.tokenizer.vocab_size))


def _held_by_hugging_face(source: Path) -> _Held:
    from largeformer.models.hf_config import model_of
    from largeformer.models.hf_mapping import from_hugging_face

    config = _read_config(source)
    model, vocab_size = model_of(config), config.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise BadInputError(f"{source / 'config.json'} says vocab_size {vocab_size}: name the number of rows of the embedding there")

    def state(weights: StoredTensors) -> Mapping[str, torch.Tensor]:
        return from_hugging_face({name: weights.read(name) for name in weights.names}, model, vocab_size)

    return _Held(config, (config.get("architectures") or [config["model_type"]])[0], model, {"vocab_size": vocab_size}, state)


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read ({error}): name a folder that save_pretrained has written") from None
    if not isinstance(config, dict):
        raise BadInputError(f"{path} holds no JSON object: name a folder that save_pretrained has written")
    return config


def _open(source: Path) -> StoredTensors:
    from largeformer.export.streaming import StoredTensors

    if not any(source.glob("*.safetensors")) and any(source.glob("*.bin")):
        raise BadInputError(
            f"{source} holds its weights as pickles (.bin), which may run code when they are opened: save the model again with "
            "save_pretrained(folder, safe_serialization=True), and import that"
        )
    return StoredTensors.of_folder(source)


def _recipe(held: _Held, weights: StoredTensors, source: Path, folder: Path, made: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe of the imported shape, for the import that will be in `folder`; written to `made`, where its tokenizer lies too."""
    from largeformer.parallel.device import machine_problems

    named = held.tokens.get("eod_token") or any(override.startswith("tokenizer.eod_token=") for override in overrides)
    model, name = held.model, _tokenizer_name(source, held.tokens["vocab_size"], bool(named))
    tokenizer = dict(held.tokens) if name is None else _tokenizer_section(source, name, held.tokens, folder)
    precision = _PRECISIONS.get(str(weights.dtype(weights.names[0])), "fp32")
    if machine_problems(precision, 0):  # what the weights are stored in, this machine cannot compute in; float32 holds their numbers
        precision = "fp32"
    tree = {
        "run": {"name": folder.parent.name, "output_dir": str(folder.parent)},
        "model": model.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "train": {"precision": precision, "micro_batch_size": 1, "global_batch_size": 8, "train_iters": 1000},
        "optimizer": {"lr": 1.0e-5},
        "checkpoint": {"load": str(folder)},
    }
    draft = made / "config.yaml"
    write_atomically(draft, to_yaml(tree).encode())
    recipe = load_recipe(str(draft), list(overrides), with_deepspeed=False)
    if Path(recipe.run.output_dir).absolute() != folder.parent.absolute():
        raise BadInputError(
            f"run.output_dir {recipe.run.output_dir} is another folder than --output {folder.parent}, where the run will be: leave it out"
        )
    same = recipe.model.model_copy(update={"seq_length": model.seq_length, "attention_backend": model.attention_backend})
    if same != model or (recipe.model.seq_length != model.seq_length and model.position_embedding == "learned"):
        raise BadInputError("the overrides change the shape of the model, which its weights have: leave out what begins with model.")
    if name is None and (given := recipe.tokenizer.model) is not None and not Path(given).is_file():
        raise BadInputError(f"tokenizer.model {given}: there is no such file; name the model's own tokenizer, or leave it out")
    if name is not None:
        recipe = recipe.model_copy(update={"tokenizer": _with_unused_ids(source / name, recipe.tokenizer)})
        copy_tokenizer(source / name, made / name)
    write_atomically(draft, recipe_yaml(recipe).encode())
    return recipe


def _tokenizer_name(source: Path, rows: int, end_is_named: bool) -> str | None:
    """Of two files the SentencePiece model, unless the other one has more ids: tokens that a chat is written with are often added there
    alone. None where there is none. rows: of the model's embedding. end_is_named: the recipe says what ends a text."""
    there = [name for name in _TOKENIZERS if (source / name).is_file()]
    return there[-1] if len(there) == len(_TOKENIZERS) and _json_is_fuller(source, rows, end_is_named) else next(iter(there), None)


def _json_is_fuller(source: Path, rows: int, end_is_named: bool) -> bool:
    """Whether `tokenizer.json` has further ids and a name for what ends a text, or `tokenizer.model` is no SentencePiece model; in neither
    case more ids than the model has rows."""
    from sentencepiece import SentencePieceProcessor

    highest = max(_names_by_id(json_in(source / "tokenizer.json")), default=-1)
    if not 0 <= highest < rows:
        return False
    try:
        size = SentencePieceProcessor(model_proto=(source / "tokenizer.model").read_bytes()).vocab_size()
    except (OSError, RuntimeError):
        return True
    return highest >= size and (end_is_named or _end_of_text(source) is not None)


def _tokenizer_section(source: Path, name: str, known: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe's section `tokenizer`, for the tokenizer of the imported folder, which will lie in `folder`."""
    section = {**known, "type": _TOKENIZERS[name], "model": str(folder / name)}
    if name == "tokenizer.json" and section.get("eod_token") is None:
        section["eod_token"] = _end_of_text(source)
    return section


def _with_unused_ids(path: Path, tokens: TokenizerConfig) -> TokenizerConfig:
    """`tokens`, for a model that may have more rows than the tokenizer in `path` ids: many are made larger, to divide well. Raises
    BadInputError where it has fewer."""
    size = tokenizer_of_any_size(path, tokens.model_copy(update={"unused_ids": 0})).vocab_size
    if size > tokens.vocab_size:
        raise BadInputError(
            f"tokenizer {path} has {size} ids, and the model rows for {tokens.vocab_size}: it is another model's; put its own in its place"
        )
    return tokens.model_copy(update={"unused_ids": tokens.vocab_size - size})


def _end_of_text(source: Path) -> str | None:
    """The name of the token that ends a text: as `tokenizer_config.json` gives it, else that of the id in the model's configuration. None
    where neither does."""
    token = json_in(source / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
        return token
    names = _names_by_id(json_in(source / "tokenizer.json"))
    for file in ("generation_config.json", "config.json"):
        given = json_in(source / file).get("eos_token_id")
        named = [names[i] for i in (given if isinstance(given, list) else [given]) if i in names]
        if named:
            return named[0]
    return None


def _names_by_id(definition: Mapping[str, Any]) -> dict[int, str]:
    """The tokens of a tokenizer.json; its vocabulary may also be a list of pieces with their scores. Empty where it is something else."""
    try:
        vocabulary = (definition.get("model") or {}).get("vocab") or {}
        pieces = vocabulary.items() if isinstance(vocabulary, dict) else ((row[0], i) for i, row in enumerate(vocabulary))
        return {i: piece for piece, i in pieces} | {token["id"]: token["content"] for token in definition.get("added_tokens") or []}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        return {}


def _tokenizer_metrics(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Which tokenizer was copied, as `prepare` tells it; nothing where none was."""
    path = folder / tokenizer_file(recipe.tokenizer)
    return {"tokenizer_sha256": load_tokenizer(path, recipe.tokenizer).unique_identifiers["sha256"]} if path.exists() else {}


def _write_checkpoint(state: Mapping[str, torch.Tensor], recipe: Recipe, folder: Path) -> tuple[int, dict[str, str]]:
    """Commit the weights as a checkpoint at step 0. Returns the number of parameters, and the SHA-256 of each file of weights: unlike the
    recipe beside them they name no path, so the same folder comes to the same wherever it is imported."""
    from largeformer.checkpoint.commit import begin, commit
    from largeformer.checkpoint.format import Block
    from largeformer.checkpoint.manifest import read_manifest
    from largeformer.training.checkpointing import Contents, first_state, write_contents

    places = [Block(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape)).place for name, tensor in state.items()]
    texts = {"state.json": first_state(), "config.yaml": recipe_yaml(recipe).encode()}
    temporary = begin(folder / "checkpoints", 0)
    contents = Contents(0, {"weights": places}, [], texts)
    checkpoint = commit(temporary, *write_contents(temporary, contents, (("weights", tensor) for tensor in state.values())))
    checksums = {name: digest.sha256 for name, digest in read_manifest(checkpoint).items() if name.startswith("weights/")}
    return sum(tensor.numel() for tensor in state.values()), checksums
