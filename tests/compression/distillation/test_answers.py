"""Written answers against the teacher itself, and against the formula over the top k and one outcome for all others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from largeformer.compression.distillation import answers
from largeformer.compression.distillation.answers import AnswerReader, AnswerWriter, WrittenAnswer, claim, index, most_probable
from largeformer.compression.distillation.figures import Figures
from largeformer.compression.distillation.loss import Answer, DistillationLoss, LiveAnswer
from largeformer.config.distill import DistillConfig
from largeformer.errors import BadInputError
from largeformer.layout import Layout
from largeformer.models.losses import HeadLoss, Share
from largeformer.parallel.batch import Batch
from tests.compression.distillation.test_loss import Ranks, divergence_of, inputs
from tests.distributed import RankContext, RankPool
from tests.one_process import relative_difference

VOCAB, PADDED = 37, 40


def share_of(ranks: RankContext) -> tuple[Share, slice]:
    size = PADDED // ranks.world_size
    start = ranks.rank * size
    return Share(start, size, min(max(VOCAB - start, 0), size), dist.group.WORLD), slice(start, start + size)


def loss_with(ranks: RankContext, answer: Answer, divergence: str) -> list[Any]:
    """The loss and the gradient of the hidden states."""
    config = DistillConfig(divergence=divergence, alpha=1.0)  # type: ignore[arg-type]
    hidden, _, weight, _, labels, token_weights = inputs(VOCAB, PADDED)
    _, rows = share_of(ranks)
    hidden.requires_grad_()
    groups = Ranks(Layout(ranks.world_size, tensor=ranks.world_size), ranks.rank, None)
    loss_of = DistillationLoss(config, lambda: answer, Figures((), groups)).next()
    loss = HeadLoss.apply(hidden, weight[rows], labels, token_weights, VOCAB, 8, groups.tensor, True, None, loss_of)
    loss.backward()
    dist.all_reduce(hidden.grad)
    assert hidden.grad is not None
    return [loss.item(), hidden.grad.tolist()]


def written(ranks: RankContext, top_k: int, divergence: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Loss and gradient by what is written down and live; and what is written down."""
    _, teachers, _, teachers_weight, _, _ = inputs(VOCAB, PADDED)
    share, rows = share_of(ranks)
    live = LiveAnswer(teachers, teachers_weight[rows], 3.0)
    kept = most_probable(live.log_probabilities(slice(None), torch.empty(0), share), top_k, share)
    return loss_with(ranks, WrittenAnswer(*kept), divergence), loss_with(ranks, live, divergence), [part.tolist() for part in kept]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_with_the_whole_vocabulary_it_is_the_teacher_itself(divergence: str, tensor: int, ranks: Callable[[int], RankPool]) -> None:
    for (loss, gradient), (live_loss, live_gradient), _ in ranks(tensor).run(written, VOCAB, divergence):
        assert loss == pytest.approx(live_loss, rel=1e-5)
        assert relative_difference(torch.tensor(gradient), torch.tensor(live_gradient)) < 1e-5


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_the_top_k_and_one_outcome_for_all_others(divergence: str, tensor: int, ranks: Callable[[int], RankPool]) -> None:
    k, t = 5, 3.0
    hidden, teachers, weight, teachers_weight, _, token_weights = (tensor_.double() for tensor_ in inputs(VOCAB, PADDED))
    hidden.requires_grad_()
    p = (teachers @ teachers_weight[:VOCAB].t() / t).softmax(-1)
    q = (hidden @ weight[:VOCAB].t() / t).softmax(-1)
    best, ids = p.topk(k, dim=1)

    def with_rest(probabilities: torch.Tensor) -> torch.Tensor:
        top = probabilities.gather(1, ids)
        return torch.cat([top, 1 - top.sum(dim=1, keepdim=True)], dim=1)

    expected = (t * t * divergence_of(with_rest(p), with_rest(q), divergence) * token_weights).sum()
    expected.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    for (loss, gradient), _, (kept_ids, kept, rest) in ranks(tensor).run(written, k, divergence):
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert relative_difference(torch.tensor(gradient), hidden.grad) < 1e-5
        assert kept_ids == ids.tolist()
        np.testing.assert_allclose(np.exp(kept), best.numpy(), rtol=1e-5)
        np.testing.assert_allclose(np.exp(rest), 1 - best.sum(dim=1).numpy(), rtol=1e-5)


def batch_of(samples: tuple[int, ...]) -> Batch:
    nothing = torch.zeros(len(samples), 3, dtype=torch.int64)
    return Batch(nothing, nothing, nothing.float(), nothing, samples)


def fill(folder: Path, samples: tuple[int, ...], precision: str = "fp32") -> None:
    """Sample n says the ids 2^17 + n, and probabilities that tell sample and place."""
    writer = AnswerWriter(folder, precision)
    numbers = torch.tensor(samples)[:, None, None]
    places = torch.arange(3)[None, :, None]
    ids = (2**17 + numbers).expand(-1, 3, 2)
    values = -(numbers + places / 4.0).expand(-1, 3, 2).float()
    writer.add(samples, ids, values, values[..., 0])
    writer.flush()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_any_micro_batch_finds_its_samples(precision: str, tmp_path: Path) -> None:
    claim(tmp_path, {"teacher": "a"})
    fill(tmp_path, (0, 2, 4), precision)
    fill(tmp_path, (1, 3), precision)
    reader = AnswerReader(tmp_path, index(tmp_path))
    reader.begin([batch_of((3, 4)), batch_of((0,))])
    first, second = reader.answer(), reader.answer()
    assert isinstance(first, WrittenAnswer) and isinstance(second, WrittenAnswer)
    # in the order [s, b]
    assert first.ids[:, 0].tolist() == [2**17 + n for n in (3, 4, 3, 4, 3, 4)]
    assert first.log_probabilities_[:, 1].tolist() == [-3.0, -4.0, -3.25, -4.25, -3.5, -4.5]
    assert first.log_probabilities_.dtype == torch.float32
    assert second.rest.tolist() == [0.0, -0.25, -0.5]


def test_what_was_being_written_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    claim(tmp_path, {"teacher": "a"})
    fill(tmp_path, (0, 1))
    host, gone = socket.gethostname(), subprocess.Popen(["true"])
    gone.wait()
    theirs = [tmp_path / "mine.tmp", tmp_path / f"answers_000000000003_00000.{host}-{os.getpid()}.tmp"]
    for path in (*theirs, tmp_path / f"answers_000000000002_00000.{host}-{gone.pid}.tmp"):
        path.write_bytes(b"half")
    claim(tmp_path, {"teacher": "a"})
    assert sorted(index(tmp_path)) == [0, 1]
    assert sorted(tmp_path.glob("*.tmp")) == sorted(theirs)


def test_two_students_may_write_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second claims the folder, and writes the same samples, while the first writes."""
    claim(tmp_path, {"teacher": "a"})
    save, pid = answers.save_file, os.getpid()

    def second(*arguments: Any) -> None:
        save(*arguments)
        with monkeypatch.context() as other:
            other.setattr(answers, "save_file", save)
            other.setattr(os, "getpid", lambda: pid + 1)
            claim(tmp_path, {"teacher": "a"})
            fill(tmp_path, (0, 1))

    monkeypatch.setattr(answers, "save_file", second)
    fill(tmp_path, (0, 1))
    assert sorted(index(tmp_path)) == [0, 1] and not list(tmp_path.glob("*.tmp"))


def test_what_another_layout_writes_leaves_a_reader_its_samples(tmp_path: Path) -> None:
    """Files of other samples that begin alike, or of fewer, come between a student's look and its reading."""
    claim(tmp_path, {"teacher": "a"})
    for samples in ((0, 2, 4, 6), (1, 3, 5, 7)):
        fill(tmp_path, samples)
    reader = AnswerReader(tmp_path, index(tmp_path))
    for samples in ((0, 1, 2, 3), (4, 5), (1,)):
        fill(tmp_path, samples)
    reader.begin([batch_of(tuple(range(8)))])
    assert reader.answer().ids[:8, 0].tolist() == [2**17 + n for n in range(8)]  # type: ignore[union-attr]
    assert sorted(index(tmp_path)) == list(range(8))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        pytest.param(lambda folder: None, "teacher was a, is b", id="another teacher"),
        pytest.param(lambda folder: (folder / "identity.json").unlink(), "holds answers without identity.json", id="nobody's"),
        pytest.param(lambda folder: (folder / "identity.json").write_text("{"), "cannot be read", id="broken"),
    ],
)
def test_answers_of_another_are_refused(spoil: Callable[[Path], Any], sentence: str, tmp_path: Path) -> None:
    claim(tmp_path, {"teacher": "a"})
    fill(tmp_path, (0,))
    spoil(tmp_path)
    with pytest.raises(BadInputError, match=sentence):
        claim(tmp_path, {"teacher": "b"})
    assert list(tmp_path.glob("*.safetensors"))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    claim(tmp_path, {"teacher": "a"})
    (tmp_path / "answers_000000000000_00000.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(BadInputError, match=r"answers_000000000000_00000\.safetensors cannot be read"):
        index(tmp_path)
