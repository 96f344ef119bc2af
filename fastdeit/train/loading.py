"""Training batches on their way from the data set to the device: workers, slots of shared memory, copies ahead of the step."""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from fastdeit.train.batched_images import BatchedImages
from fastdeit.train.config import Config
from fastdeit.train.copying import HostBatch, copied, copied_ahead
from fastdeit.train.device_decoding import DeviceDecoding, create_device_decoder
from fastdeit.train.device_stage import DeviceStage, check_decoded_on_device, why_augmented_on_cpu, why_not_batched
from fastdeit.train.encoded_images import COLUMNS, EncodedImages
from fastdeit.train.error_passing import ErrorPassingLoader
from fastdeit.train.image_files import UnreadableImageError
from fastdeit.train.image_pipeline import ImagePipeline
from fastdeit.train.ring import Batch as RingBatch
from fastdeit.train.ring import Ring, Ticket
from fastdeit.train.sampling import EpochBatches, KeyedDataset, Sample, derive_seed, seed_sample
from fastdeit.train.transform_errors import TransformError, described

Batch = tuple[Tensor, Tensor]


class TrainLoader:
    """Batches of (images (B, C, H, W), classes (B,)) on device, in the order of `batches`, whose epoch is set before each pass.

    Images are uint8 that `BatchAugmentation` normalises, or float32 that are normalised: on a GPU flips, augmentation and
    normalisation are passes of `fastdeit.ops.augment` over the batch. The values do not depend on that. On a GPU the next batch is
    copied from page-locked memory, on a stream of its own, while a step computes. The same batches come for any number of workers.

    Images that cannot be read are named on stderr, once each, and replaced; more than max_bad_images of them stop the run.

    Args:
        dataset: `Images` or `ArrayDataset`; another of (image, class), map-style; or a stream, whose batches are in its reader's
            order and which can start at the beginning of an epoch only.
        batches: of this rank.

    Raises:
        ValueError: fewer images than one batch, or images that `decode_on: device` is not for.
        ImportError: the device's decoder does not work.

    A pass raises TransformError that names image, epoch, position and option where a transform fails, and a batch's positions where
    its augmentation on the device does.
    """

    def __init__(self, dataset: Dataset, batches: EpochBatches, config: Config, device: torch.device) -> None:
        if batches.length < batches.batch_size * batches.world_size:
            whole = batches.batch_size * batches.world_size
            raise ValueError(f"batch_size: {whole} is more than the {batches.length} training images")
        self.batches = batches
        self.device = device
        self.max_bad_images = config.max_bad_images
        self.unreadable: dict[str, None] = {}
        self.streams = isinstance(dataset, IterableDataset)
        self.ring: Ring | None = None
        self.decoding: DeviceDecoding | None = None
        check_decoded_on_device(config, dataset, device)
        on_device = config.decode_on == "device"
        options: dict[str, Any] = dict(
            num_workers=config.workers, prefetch_factor=config.prefetch if config.workers else None
        )
        source: Any
        if self.streams:
            source = KeyedStream(dataset, batches)
            self.worker_seeds = torch.Generator()  # from which PyTorch draws those that readers shuffle by
            options |= dict(batch_size=batches.batch_size, drop_last=True, generator=self.worker_seeds)
        elif why_not_batched(dataset) is None:
            planned = why_augmented_on_cpu(config, dataset, device) is None
            size = (config.img_size, config.img_size)
            pipeline = ImagePipeline(dataset.transform, size, dataset.mode, config.resize, planned)
            self.ring = Ring(
                batches.batch_size,
                (*size, pipeline.channels),
                pipeline.layers,
                config.workers,
                config.prefetch,
                pinned=device.type == "cuda",
                columns=COLUMNS if on_device else 0,
            )
            self.finish = DeviceStage(config, pipeline.planner, device)
            source = (EncodedImages if on_device else BatchedImages)(
                dataset, pipeline, self.ring, batches.seed, config.max_bad_images
            )
            if on_device:
                self.decoding = DeviceDecoding(create_device_decoder(config, device), source, device)
            # A key of the sampler is a batch's list of keys.
            options |= dict(
                sampler=batches, batch_size=None, persistent_workers=config.workers > 0, collate_fn=as_it_is
            )
        else:
            source = KeyedDataset(dataset, batches.seed, config.max_bad_images)
            options |= dict(batch_sampler=batches, persistent_workers=config.workers > 0)  # keys come with each batch
        if self.ring is None:
            options |= dict(pin_memory=device.type == "cuda", collate_fn=collate)
        self.loader = ErrorPassingLoader(source, **options)

    def __len__(self) -> int:
        return len(self.batches)

    def close(self) -> None:
        """Ends the workers, which a loader of another image size takes the place of. Not to be called within a pass."""
        self.loader._iterator = None

    def __iter__(self) -> Iterator[Batch]:
        if self.streams and self.batches.first_batch:
            raise ValueError(
                f"data: a stream starts at the beginning of an epoch only, not at batch {self.batches.first_batch}; "
                "resume from a checkpoint that was written at the end of an epoch"
            )
        if self.streams:
            b = self.batches
            self.worker_seeds.manual_seed(derive_seed("stream workers", b.seed, b.epoch, b.rank))
        ahead = copied_ahead if self.device.type == "cuda" else copied
        given = 0
        for tensors in ahead(self.host_batches(), self.device):
            yield tensors if self.ring is None else self._finished(tensors, self.batches.first_batch + given)
            given += 1
        if given < len(self):
            raise ValueError(
                f"data: the stream ended after {given} of {len(self)} batches of epoch {self.batches.epoch}"
            )

    def _finished(self, tensors: tuple[Tensor, ...], batch: int) -> Batch:
        """The epoch's batch of that number, processed on the device. Raises TransformError that names its images' positions."""
        try:
            return self.finish(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            b, positions = self.batches, self.batches.positions(batch)
            raise TransformError(
                f"augment_on: the augmentation of a batch fails on {self.device}: {described(error)} "
                f"(seed {b.seed}, epoch {b.epoch}, positions {positions[0]} to {positions[-1]})"
            ) from error

    def host_batches(self) -> Iterator[HostBatch]:
        """The epoch's batches in the loader's memory, before they are copied to the device: until the next one is asked for."""
        iterator = iter(self.loader)
        for _ in range(len(self)):
            try:
                made = next(iterator)
            except StopIteration:
                return
            if self.ring is None:
                images, classes, unreadable = made
                batch = HostBatch((images, classes))
            else:
                unreadable = made.unreadable
                check = functools.partial(self.ring.check, made)
                slot = self.ring.read(made)
                decoded = None if self.decoding is None else functools.partial(self.decoded, slot, made)
                batch = HostBatch(slot.tensors(), check, decoded)
            self._report(unreadable)
            yield batch

    def decoded(self, slot: RingBatch, ticket: Ticket) -> tuple[Tensor, ...]:
        """What the device decodes of a batch that workers left encoded."""
        assert self.decoding is not None
        tensors, unreadable = self.decoding(slot, ticket)
        self._report(unreadable)
        return tensors

    def _report(self, unreadable: Sequence[str]) -> None:
        for message in unreadable:
            if message not in self.unreadable:
                self.unreadable[message] = None
                print(f"unreadable image, replaced by the next: {message}", file=sys.stderr, flush=True)
        if len(self.unreadable) > self.max_bad_images:
            raise UnreadableImageError(
                f"data: {len(self.unreadable)} images cannot be read, max_bad_images is {self.max_bad_images}; the last: "
                f"{list(self.unreadable)[-1]}"
            )


class KeyedStream(IterableDataset):
    """A `Stream` of (image, class) whose random transforms depend on seed, epoch, rank, worker and place in the worker's share."""

    def __init__(self, dataset: IterableDataset, batches: EpochBatches) -> None:
        self.dataset = dataset
        self.batches = batches

    def __iter__(self) -> Iterator[Sample]:
        batches, worker = self.batches, get_worker_info()
        seed = derive_seed("stream", batches.seed, batches.rank, worker.id if worker else 0)
        self.dataset.start(batches.epoch, seed + batches.epoch)
        iterator, position = iter(self.dataset), 0
        while True:
            seed_sample(seed, batches.epoch, position)
            try:
                image, label = next(iterator)
            except StopIteration:
                return
            except TransformError as error:
                raise TransformError(f"{error} (epoch {batches.epoch}, position {position} of its process)") from error
            yield Sample(image, label, ())
            position += 1


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """Images, classes, and what could not be read: uint8 images by timm's collate, others by PyTorch's."""
    pairs = [(sample.image, sample.label) for sample in samples]
    images, classes = (fast_collate if samples[0].image.dtype == torch.uint8 else default_collate)(pairs)
    return images, classes, [message for sample in samples for message in sample.unreadable]


def as_it_is(made: Any) -> Any:
    return made
