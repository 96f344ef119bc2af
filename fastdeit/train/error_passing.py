"""PyTorch's DataLoader, except that an error of the data set arrives from a worker as it was raised.

PyTorch puts the worker's traceback into the error's message, and raises another error for those that it cannot reconstruct.
"""

import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from fastdeit.train import workers
from fastdeit.train.signals import ignore_in_worker
from fastdeit.train.transform_errors import described


class ErrorPassingLoader(DataLoader):
    """DataLoader of a data set, map-style or a stream, whose errors are raised between batches in this process.

    Its workers leave signals to this process; one that dies raises WorkerDiedError.

    Args:
        dataset, collate_fn, options: DataLoader's.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] = default_collate, **options: Any) -> None:
        guarded = _GuardedStream(dataset) if isinstance(dataset, IterableDataset) else _Guarded(dataset)
        super().__init__(guarded, collate_fn=_Collate(collate_fn), worker_init_fn=ignore_in_worker, **options)

    def __iter__(self) -> Iterator[Any]:
        for batch in workers.batches_of(workers.start(super().__iter__)):
            if isinstance(batch, _Raised):
                raise batch.error
            yield batch


class _Raised:
    """An error in place of the sample or batch that was to be made."""

    def __init__(self, error: Exception) -> None:
        try:
            pickle.loads(pickle.dumps(error))
            self.error = error
        except Exception:
            self.error = RuntimeError(described(error))


class _Guarded(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except Exception as error:
            return _Raised(error)

    def __len__(self) -> int:
        return len(self.dataset)


class _GuardedStream(IterableDataset):
    def __init__(self, dataset: IterableDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.dataset
        except Exception as error:
            yield from itertools.repeat(_Raised(error))  # a batch that is not full might be dropped

    def __len__(self) -> int:
        return len(self.dataset)


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        if isinstance(samples, _Raised):  # of a data set of whole batches
            return samples
        raised = next((sample for sample in samples if isinstance(sample, _Raised)), None)
        try:
            return raised or self.collate(samples)
        except Exception as error:
            return _Raised(error)
