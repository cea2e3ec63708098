"""How difficult a source's windows are, and the order of a curriculum over them. `s` sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from largeformer.config.sampling import CurriculumSampling
from largeformer.data.sampling import Curriculum, EasiestFirst, Order, competence
from largeformer.data.windows import Windows
from largeformer.errors import BadInputError

Scores = npt.NDArray[np.floating]


def document_length(windows: Windows) -> Scores:
    """The mean, over a window's tokens, of the length of the document that each belongs to: float64[windows], in tokens."""
    lengths = np.asarray(windows.dataset.sequence_lengths)[windows.document_index].astype(np.float64)
    ends = np.cumsum(lengths)
    # The sum of these lengths up to a token of the joined stream is linear inside a document.
    borders = np.arange(windows.windows + 1) * float(windows.config.sequence_length)
    up_to = np.interp(borders, np.concatenate([[0.0], ends]), np.concatenate([[0.0], np.cumsum(lengths**2)]))
    return np.diff(up_to) / windows.config.sequence_length  # type: ignore[no-any-return]


def rarity(windows: Windows) -> Scores:
    """The mean of -ln p(token), p its share of the source's training tokens: float64[windows] (Platanios et al. 2019, section 3).

    Reads every token twice.
    """
    counts = np.zeros(windows.config.tokenizer.vocab_size, dtype=np.int64)
    for window in range(windows.windows):
        counts += np.bincount(windows.read(window)[:-1], minlength=len(counts))
    surprise = -np.log(np.maximum(counts, 1) / counts.sum())
    return np.array([surprise[windows.read(window)[:-1]].mean() for window in range(windows.windows)])


MEASURES: dict[str, Callable[[Windows], Scores]] = {"length": document_length, "rarity": rarity}


def order_windows(sources: Sequence[Windows], counts: Sequence[float], sampling: CurriculumSampling, cache: Path) -> None:
    """Give each source the order of the curriculum. `counts`: the samples that it gives to the whole training."""
    for windows, count in zip(sources, counts, strict=True):
        windows.order = _order(_scores(windows, sampling, cache), sampling, max(1, round(count * sampling.span)), windows.seed)


def _order(scores: Scores, sampling: CurriculumSampling, span: int, seed: tuple[int, ...]) -> Order:
    if sampling.pacing == "sorted":
        return EasiestFirst(np.argsort(scores, kind="stable"))
    return Curriculum(scores, competence(sampling.pacing, sampling.start, sampling.steps), span, seed)


def _scores(windows: Windows, sampling: CurriculumSampling, cache: Path) -> Scores:
    """float[windows]; measured once for all ranks, or read from the folder that is given."""
    if sampling.scores is not None:
        return _read_scores(Path(sampling.scores).expanduser() / f"{windows.dataset_path}.npy", windows)
    kept = cache / f"{windows.dataset_path}-{sampling.difficulty}.npy"
    if not kept.is_file():
        np.save(kept, MEASURES[sampling.difficulty](windows))
    return np.load(kept, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]


def _read_scores(path: Path, windows: Windows) -> Scores:
    try:
        scores = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInputError(f"data.sampling.scores {path} cannot be read as a .npy file ({error}): make it anew") from error
    if scores.shape != (windows.windows,) or not np.issubdtype(scores.dtype, np.floating) or not np.isfinite(scores).all():
        raise BadInputError(
            f"data.sampling.scores {path} holds {scores.dtype}{list(scores.shape)}; {windows.dataset_path} has {windows.windows} training "
            "samples in an epoch, and each needs one finite number: score these data with this model.seq_length, data.split and run.seed"
        )
    return scores  # type: ignore[no-any-return]
