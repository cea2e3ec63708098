"""The samples of one source: Megatron-core's dataset of one epoch, read straight from the mapped file. `s` sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from largeformer.data.indexed import bin_path
from largeformer.data.sampling import Order, ShuffledEpochs

Sample = dict[str, npt.NDArray[np.generic]]


class Windows(GPTDataset):  # type: ignore[misc]
    """The documents of one split of one source, shuffled and joined, cut every s tokens: one epoch of Megatron-core's index files,
    and the order in which it is read, epoch after epoch.

    Megatron-core's own epochs are shuffled together: of three, the first third of its samples holds some documents twice and others
    never. Here each epoch is every window once. Only where a split is shorter than one sample are its copies joined, as there.
    """

    def __init__(self, dataset: IndexedDataset, documents: range, count: int, split: Split, config: GPTDatasetConfig) -> None:
        """count: samples that will be asked for; there is no end to them."""
        tokens = int(dataset.sequence_lengths[documents.start : documents.stop].sum(dtype=np.int64))
        whole = tokens > config.sequence_length
        name = Path(dataset.path_prefix).name
        super().__init__(dataset, name, np.array(documents, dtype=np.int32), None if whole else count, split, config)
        self.tokens = tokens
        self._count = count
        # Plain arrays: a slice of a memmap costs several times that of an array.
        self._borders, self._joined = np.asarray(self.sample_index), np.asarray(self.document_index)
        self._itemsize = np.dtype(dataset.index.dtype).itemsize
        self._ids: npt.NDArray[np.integer] | None = None
        self.order: Order = ShuffledEpochs(self.windows, self.seed, np.asarray(self.shuffle_index))

    @property
    def windows(self) -> int:
        """Samples of one epoch."""
        return len(self.sample_index) - 1

    @property
    def seed(self) -> tuple[int, ...]:
        return (self.config.random_seed, *self.dataset_path.encode(), self.index_split.value)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        ids = self.read(self.order(index))
        return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": np.ones(len(ids) - 1, dtype=np.float32)}

    def read(self, window: int) -> npt.NDArray[np.int64]:
        """int64[s + 1]: the ids of a window and the one after it. A window keeps its number in every epoch."""
        first, skip, last, end = self._borders[window : window + 2].ravel().tolist()
        ids, index, size = self._mapped(), self.dataset.index, self._itemsize
        pieces = []
        for place in range(
            first, last + 1
        ):  # Plain numbers: most windows have few documents, and an array operation costs as much as a read.
            document = self._joined.item(place)
            begin = index.sequence_pointers.item(document) // size
            stop = begin + (end + 1 if place == last else index.sequence_lengths.item(document))
            pieces.append(ids[begin + skip : stop])
            skip = 0
        read = np.concatenate(pieces, dtype=np.int64)
        assert len(read) == self.config.sequence_length + 1, f"window {window} of {self.dataset_path} has {len(read)} ids"
        return read

    def _mapped(self) -> npt.NDArray[np.integer]:
        if self._ids is None:
            path = bin_path(Path(self.dataset.path_prefix))
            self._ids = np.memmap(path, dtype=self.dataset.index.dtype, mode="r").view(np.ndarray)
        return self._ids

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_ids": None}  # a mapping is made anew in each process; pickled it would be the whole file
