"""The programs that open an export: transformers, onnxruntime."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


class TransformersClient:
    """`AutoModelForCausalLM` on the CPU, in float32; integers become floats there, activations are rounded as the folder says."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        with _alone():
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        self.model.generation_config.eos_token_id = None  # what is compared goes on past the end of a document

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with _alone():  # integers become floats in the first call
            return self.model(tokens, use_cache=False).logits.float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        with _alone():
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0)
        return made[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def tokenizer_ids(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """What the folder's tokenizer makes of each text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=10**9)
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Within, the libraries see no other rank and no terminal. compressed-tensors would share its work with ranks that wait elsewhere,
    and hang; progress bars go to stderr, each for a moment."""
    is_initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        dist.is_initialized = is_initialized


class OnnxClient:
    """onnxruntime on the CPU. The cache goes back in as it came out."""

    def __init__(self, file: Path, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._empty = {
            value.name: np.zeros([1, value.shape[1], 0, value.shape[3]], dtype=np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self._inputs = {value.name for value in self.session.get_inputs()}

    def advance(self, tokens: np.ndarray, cache: dict[str, np.ndarray] | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """int64[b, s] -> logits float32[b, s, v] and the cache with these tokens added."""
        b, s = tokens.shape
        cache = cache or {name: np.repeat(empty, b, axis=0) for name, empty in self._empty.items()}
        past = next(iter(cache.values())).shape[2]
        feed = {
            "input_ids": tokens,
            "attention_mask": np.ones((b, past + s), dtype=np.int64),
            "position_ids": np.tile(np.arange(past, past + s), (b, 1)),
            **cache,
        }
        logits, *present = self.session.run(None, {name: value for name, value in feed.items() if name in self._inputs})
        return logits, dict(zip(cache, present, strict=True))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """In two steps, so that the cache is part of what is compared."""
        ids = tokens.numpy()
        half = -(-ids.shape[1] // 2)
        first, cache = self.advance(ids[:, :half])
        second, _ = self.advance(ids[:, half:], cache)
        return torch.from_numpy(np.concatenate([first, second], axis=1))

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        logits, cache = self.advance(np.array([prompt], dtype=np.int64))
        made = [int(logits[0, -1].argmax())]
        while len(made) < count:
            logits, cache = self.advance(np.array([made[-1:]], dtype=np.int64), cache)
            made.append(int(logits[0, -1].argmax()))
        return made
