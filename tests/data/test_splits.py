from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from largeformer.config.data import DataConfig
from largeformer.data.indexed import IndexedWriter
from largeformer.data.splits import Samples, build_splits, held_out_streams
from largeformer.data.tokenization.tokenizer import MockTokenizer
from largeformer.data.windows import Windows
from largeformer.errors import BadInputError
from tests.distributed import RankContext

VOCAB, EOD, SEQ = 1000, 2, 16
TOKENIZER = MockTokenizer(VOCAB, eod=EOD)


def write_source(prefix: Path, documents: int, seed: int) -> Path:
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, VOCAB, EOD) as writer:
        for _ in range(documents):
            writer.add(random.integers(3, VOCAB, random.integers(1, 60)))
    return prefix


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, float]]:
    folder = tmp_path_factory.mktemp("sources")
    return [(write_source(folder / "0-a", 60, 1), 3.0), (write_source(folder / "1-b", 90, 2), 1.0)]


def data_of(split: str, *own: str | None) -> DataConfig:
    """As many sources as there are splits of their own, None for those without."""
    return DataConfig.model_validate({"split": split, "sources": [{"path": "text", "split": one} for one in own or (None,)]})


def tokens(samples: Samples | None, count: int) -> list[list[int]]:
    assert samples is not None
    return [samples[i]["tokens"].tolist() for i in range(count)]


def one_epoch(source: tuple[Path, float], blend_share: float) -> int:
    """The number of training samples for which a source that gives `blend_share` of them is read once."""
    (stream,) = held_out_streams(data_of("80,10,10"), [source], TOKENIZER, "train")
    samples = (len(stream) - 1) // SEQ
    return samples if blend_share == 1.0 else int(0.98 * samples / blend_share)  # a blend asks for a little more of each source


@pytest.mark.parametrize("train", [40, None], ids=["part of an epoch", "one epoch"])
@pytest.mark.parametrize("number", [1, 2], ids=["one source", "two sources"])
def test_samples_are_those_of_megatrons_builder(sources, tmp_path: Path, number: int, train: int | None) -> None:  # type: ignore[no-untyped-def]
    counts = (train or one_epoch(sources[0], [1.0, 0.75][number - 1]), 5, 5)
    chosen = sources[:number]
    built = build_splits(data_of("80,10,10", *[None] * number), SEQ, TOKENIZER, chosen, counts, 77, tmp_path)
    config = GPTDatasetConfig(
        random_seed=77,
        sequence_length=SEQ,
        blend=([str(path) for path, _ in chosen], [weight for _, weight in chosen] if number > 1 else None),
        split="80,10,10",
        tokenizer=TOKENIZER,  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    reference = BlendedMegatronDatasetBuilder(GPTDataset, list(counts), lambda: True, config).build()
    for ours, theirs, count in zip((built.train, built.valid, built.test), reference, counts, strict=True):
        assert ours is not None and len(ours) >= count
        assert tokens(ours, count) == tokens(theirs, count)


def test_a_sample_is_consecutive_tokens_and_its_labels_are_the_next(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    train = build_splits(data_of("1,0,0"), SEQ, TOKENIZER, sources[:1], (20, 0, 0), 1, tmp_path).train
    assert train is not None
    for i in range(20):
        sample = train[i]
        assert sample["labels"][:-1].tolist() == sample["tokens"][1:].tolist()
        assert sample["loss_mask"].tolist() == [1.0] * SEQ
        assert sample["tokens"].dtype == sample["labels"].dtype == np.int64 and sample["loss_mask"].dtype == np.float32


def test_each_epoch_is_every_sample_once_in_an_order_of_its_own(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Megatron-core would shuffle all epochs together."""
    data = data_of("1,0,0")
    (stream,) = held_out_streams(data, sources[:1], TOKENIZER, "train")
    epoch = (len(stream) - 1) // SEQ
    read = tokens(build_splits(data, SEQ, TOKENIZER, sources[:1], (5 * epoch, 0, 0), 5, tmp_path).train, 5 * epoch)
    orders = [tuple(map(tuple, read[i * epoch : (i + 1) * epoch])) for i in range(5)]
    assert len(set(orders)) == 5 and len({tuple(sorted(order)) for order in orders}) == 1
    assert len(set(orders[0])) == epoch
    again = tokens(build_splits(data, SEQ, TOKENIZER, sources[:1], (5 * epoch, 0, 0), 6, tmp_path).train, epoch)
    assert again != read[:epoch], "another seed is another order"


def test_a_split_shorter_than_a_sample_is_repeated(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "0-a", VOCAB, EOD) as writer:
        writer.add([5, 6, 7])
    train = build_splits(data_of("1,0,0"), SEQ, TOKENIZER, [(tmp_path / "0-a", 1.0)], (7, 0, 0), 1, tmp_path / "cache").train
    assert train is not None
    for row in tokens(train, 7):
        assert "".join(map(str, row)) in "5672" * 10


def test_sources_may_have_splits_of_their_own(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The second one validates, and no more."""
    data = data_of("90,0,10", None, "0,1,0")
    built = build_splits(data, SEQ, TOKENIZER, sources, (30, 30, 5), 1, tmp_path)
    (first,) = held_out_streams(data, sources, TOKENIZER, "train")
    (second,) = held_out_streams(data, sources, TOKENIZER, "valid")
    (whole,) = held_out_streams(data_of("0,1,0"), sources[1:], TOKENIZER, "valid")
    assert second.tolist() == whole.tolist()
    for samples, stream in ((built.train, first), (built.valid, second)):
        for row in tokens(samples, 30):
            counts, there = np.bincount(row, minlength=VOCAB), np.bincount(stream, minlength=VOCAB)
            assert (counts <= there).all()


@pytest.mark.parametrize("vocab_size", [VOCAB, 70_000], ids=["uint16", "int32"])
def test_reading_is_what_megatrons_dataset_reads(tmp_path: Path, vocab_size: int) -> None:
    """Window by window, over documents of one id, of many windows, and empty ones."""
    random, prefix = np.random.default_rng(3), tmp_path / "0-a"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for length in [0, 1, 1, 200, 0, 3, 16, 17, 15, 64, 0]:
        builder.add_document(random.integers(3, vocab_size, length), [length])
    builder.finalize(f"{prefix}.idx")
    tokenizer = MockTokenizer(vocab_size, eod=EOD)
    train = build_splits(data_of("1,0,0"), SEQ, tokenizer, [(prefix, 1.0)], (19, 0, 0), 1, tmp_path / "cache").train
    assert isinstance(train, Windows) and train.windows == (317 - 1) // SEQ
    for i in range(train.windows):
        theirs = GPTDataset.__getitem__(train, i)
        assert train[i]["tokens"].tolist() == theirs["tokens"].tolist() and train[i]["labels"].tolist() == theirs["labels"].tolist()


def test_windows_survive_pickling_without_their_file(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    train = build_splits(data_of("1,0,0"), SEQ, TOKENIZER, sources[:1], (20, 0, 0), 1, tmp_path).train
    expected = tokens(train, 20)
    assert tokens(pickle.loads(pickle.dumps(train)), 20) == expected


def test_one_epoch_reads_every_token_of_the_split_once(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = DataConfig(split="50,25,25")
    (stream,) = held_out_streams(data, sources[:1], TOKENIZER, "valid")
    whole = (len(stream) - 1) // SEQ
    valid = build_splits(data, SEQ, TOKENIZER, sources[:1], (0, whole, 0), 5, tmp_path).valid
    read = np.bincount(np.concatenate(tokens(valid, whole)), minlength=VOCAB)
    there = np.bincount(stream, minlength=VOCAB)
    assert (read <= there).all() and there.sum() - read.sum() <= SEQ


@pytest.mark.parametrize(
    ("weights", "count"),
    [([1.0, 0.001, 0.001], 80), ([1.0, 0.01, 0.01], 10), ([0.98, 0.01, 0.005, 0.005], 40), ([1.0] + [0.001] * 10, 320)],
    ids=["two tiny", "two small", "three small", "ten tiny"],
)
def test_sources_of_tiny_weights_leave_the_others_enough(tmp_path: Path, weights: list[float], count: int) -> None:
    sources = [(write_source(tmp_path / f"{i}-a", 30, i), weight) for i, weight in enumerate(weights)]
    built = build_splits(data_of("80,10,10", *[None] * len(weights)), SEQ, TOKENIZER, sources, (count, count, 0), 1, tmp_path / "cache")
    for samples in (built.train, built.valid):
        assert samples is not None and len(samples) == count
        drawn = np.bincount([int(samples[i]["dataset_id"]) for i in range(count)], minlength=len(weights))
        assert drawn.sum() == count and np.abs(drawn - count * np.array(weights) / sum(weights))[1:].max() <= 1


def test_the_blend_keeps_its_weights(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    train = build_splits(data_of("1,0,0", None, None), SEQ, TOKENIZER, sources, (400, 0, 0), 1, tmp_path).train
    assert train is not None
    from_first = sum(int(train[i]["dataset_id"]) == 0 for i in range(400))
    assert abs(from_first - 300) <= 1


def test_a_split_that_is_not_asked_for_is_not_built(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    built = build_splits(data_of("100,0,0", None, None), SEQ, TOKENIZER, sources, (10, 0, 0), 1, tmp_path)
    assert built.train is not None and built.valid is None and built.test is None


def test_a_split_without_documents_is_bad_input_and_no_endless_loop(tmp_path: Path) -> None:
    prefix = write_source(tmp_path / "0-small", 2, 1)
    with pytest.raises(BadInputError) as caught:
        build_splits(DataConfig(split="96,2,2"), SEQ, TOKENIZER, [(prefix, 1.0)], (10, 4, 4), 1, tmp_path / "cache")
    assert len(caught.value.problems) == 2
    assert "leaves the valid split without a document (2 in all)" in caught.value.problems[0]
    with pytest.raises(BadInputError, match="test split without a document"):
        held_out_streams(DataConfig(split="96,2,2"), [(prefix, 1.0)], TOKENIZER)


def test_a_source_too_small_for_a_split_is_left_out_of_it(tmp_path: Path) -> None:
    small, large = write_source(tmp_path / "0-small", 2, 1), write_source(tmp_path / "1-large", 50, 2)
    built = build_splits(data_of("80,10,10", None, None), SEQ, TOKENIZER, [(small, 1.0), (large, 1.0)], (10, 6, 0), 1, tmp_path / "cache")
    assert len(tokens(built.train, 10)) == 10 and len(tokens(built.valid, 6)) == 6


def test_indices_are_reused_until_the_data_changes(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data, cache = DataConfig(split="80,10,10"), tmp_path / "cache"
    prefix = write_source(tmp_path / "0-a", 60, 1)
    first = tokens(build_splits(data, SEQ, TOKENIZER, [(prefix, 1.0)], (20, 5, 5), 7, cache).train, 20)
    (folder,) = cache.iterdir()
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = tokens(build_splits(data, SEQ, TOKENIZER, [(prefix, 1.0)], (20, 5, 5), 7, cache).train, 20)
    assert again == first
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    write_source(prefix, 50, 9)  # the same names, other text
    changed = tokens(build_splits(data, SEQ, TOKENIZER, [(prefix, 1.0)], (20, 5, 5), 7, cache).train, 20)
    fresh = tokens(build_splits(data, SEQ, TOKENIZER, [(prefix, 1.0)], (20, 5, 5), 7, tmp_path / "other").train, 20)
    assert changed == fresh != first


def test_an_interrupted_build_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, prefix, cache = DataConfig(split="80,10,10"), write_source(tmp_path / "0-a", 60, 1), tmp_path / "cache"
    save, saved = np.save, []

    def full_disk(path: str, *args: object, **options: object) -> None:
        saved.append(path)
        if len(saved) == 3:  # the last of the files of one split
            Path(path).write_bytes(b"half")
            raise OSError("no space left")
        save(path, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            build_splits(data, SEQ, TOKENIZER, [(prefix, 1.0)], (20, 5, 5), 7, cache)
    after = build_splits(data, SEQ, TOKENIZER, [(prefix, 1.0)], (20, 5, 5), 7, cache)
    fresh = build_splits(data, SEQ, TOKENIZER, [(prefix, 1.0)], (20, 5, 5), 7, tmp_path / "other")
    assert tokens(after.train, 20) == tokens(fresh.train, 20)


def test_mock_samples_depend_on_seed_split_and_position_alone() -> None:
    def build(seed: int, counts: tuple[int, int, int] = (10, 10, 0)) -> list[list[list[int]]]:
        built = build_splits(DataConfig(), SEQ, TOKENIZER, [], counts, seed, Path("unused"), mock=True)
        assert built.test is None
        return [tokens(built.train, 10), tokens(built.valid, 10)]

    train, valid = build(1)
    assert build(1, (50, 20, 0)) == [train, valid]
    different = {tuple(row) for row in train + valid + build(2)[0]}
    assert len(different) == 30
    assert all(0 <= i < VOCAB for row in train for i in row)


def build_on_ranks(ranks: RankContext, sources: list[tuple[Path, float]], cache: Path) -> list[list[int]]:
    assert torch.distributed.is_initialized()
    built = build_splits(data_of("80,10,10", *[None] * len(sources)), SEQ, TOKENIZER, sources, (60, 10, 10), 3, cache)
    return tokens(built.train, 60) + tokens(built.valid, 10) + tokens(built.test, 10)


@pytest.mark.parametrize("number", [1, 2], ids=["one source", "two sources"])
def test_all_ranks_see_the_samples_of_one_process(ranks, sources, tmp_path: Path, number: int) -> None:  # type: ignore[no-untyped-def]
    chosen = sources[:number]
    built = build_splits(data_of("80,10,10", *[None] * number), SEQ, TOKENIZER, chosen, (60, 10, 10), 3, tmp_path / "one")
    expected = tokens(built.train, 60) + tokens(built.valid, 10) + tokens(built.test, 10)
    assert ranks(2).run(build_on_ranks, chosen, tmp_path / "two") == [expected, expected]
    assert len(list((tmp_path / "two").iterdir())) == 1


def refused_on_ranks(ranks: RankContext, sources: list[tuple[Path, float]], scores: Path, cache: Path) -> str:
    sampling = {"type": "curriculum", "difficulty": "loss", "scores": str(scores)}
    data = DataConfig.model_validate({"sources": [{"path": "text"}], "split": "80,10,10", "sampling": sampling})
    with pytest.raises(BadInputError) as refusal:
        build_splits(data, SEQ, TOKENIZER, sources, (60, 10, 10), 3, cache)
    return str(refusal.value)


def test_all_ranks_end_where_the_order_cannot_be_made(ranks, sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for _ in range(2):  # also where an earlier failure is written there
        told = ranks(2).run(refused_on_ranks, sources[:1], tmp_path / "nowhere", tmp_path / "cache")
        assert all("data.sampling.scores" in sentence for sentence in told)
    built = ranks(2).run(build_on_ranks, sources[:1], tmp_path / "cache")
    assert built[0] == built[1]


class Bomb:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._trace,)


def poison_each_index(ranks: RankContext, sources: list[tuple[Path, float]], cache: Path, trace: Path) -> int:
    build_on_ranks(ranks, sources, cache)
    arrays = sorted(cache.rglob("*.npy"))
    for array in arrays:
        content = array.read_bytes()
        array.write_bytes(pickle.dumps(Bomb(trace)))
        with pytest.raises(BadInputError, match=r"remove .* and it is made anew"):
            build_on_ranks(ranks, sources, cache)
        array.write_bytes(content)
    return len(arrays)


@pytest.mark.parametrize("number", [1, 2], ids=["one source", "two sources"])
def test_nothing_runs_that_is_hidden_among_the_indices(ranks, sources, tmp_path: Path, number: int) -> None:  # type: ignore[no-untyped-def]
    (poisoned,) = ranks(1).run(poison_each_index, sources[:number], tmp_path / "cache", tmp_path / "trace")
    assert poisoned > 6
    assert not (tmp_path / "trace").exists()
