"""Sets that timm reads with libraries that are stood in for here: timm's own readers run, on real images."""

import importlib.util
import inspect
import io
import itertools
import random
import re
import sys
import tarfile
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.torch_version import TorchVersion

from fastdeit.train.config import Config
from fastdeit.train.datasets import SETS_SINCE, load_data
from fastdeit.train.loading import TrainLoader
from fastdeit.train.sampling import EpochBatches, eval_loader

OLD_TIMM = TorchVersion(timm.__version__) < SETS_SINCE
pytestmark = pytest.mark.skipif(OLD_TIMM, reason="fastdeit refuses these sets with this version of timm")
CPU = torch.device("cpu")
TRAIN, VAL = 40, 11
FEATURES = {"image": object(), "label": SimpleNamespace(names=[f"class {i}" for i in range(4)])}


def picture(number):
    """An image that tells its number, however it is cropped."""
    return Image.new("RGB", (20, 20), (number, number, number))


def encoded(number):
    file = io.BytesIO()
    picture(number).save(file, "png")
    return file.getvalue()


def numbers(split):
    return range(TRAIN) if split.startswith("train") else range(100, 100 + VAL)


def module(name, **content):
    made = ModuleType(name)
    vars(made).update(content)
    return made


class Arrow:
    """A map-style set of Hugging Face's `datasets`."""

    _fingerprint = "f00d"
    info = SimpleNamespace(features=FEATURES, splits=None)

    def __init__(self, split):
        self.numbers = numbers(split)

    def cast_column(self, column, feature):
        assert column in FEATURES and feature == {"decode": False}
        return self

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        number = self.numbers[index]
        return {"image": {"bytes": encoded(number), "path": f"{number}.png"}, "label": number % 4}


class Streamed:
    """A stream of Hugging Face's `datasets`; also of TensorFlow's, whose methods return it as well."""

    num_shards = 4

    def __init__(self, split, decoded=picture):
        self.numbers, self.decoded, self.seed, self.epoch, self.endless = list(numbers(split)), decoded, None, 0, False

    def shuffle(self, buffer_size=None, seed=None):
        self.seed = (self.seed or 0) + seed
        return self

    def set_epoch(self, epoch):
        self.epoch = epoch

    def repeat(self):
        self.endless = True
        return self

    def with_options(self, options):
        return self

    def prefetch(self, size):
        return self

    def __iter__(self):
        order = list(self.numbers)
        if self.seed is not None:
            random.Random(self.seed + self.epoch).shuffle(order)
        for number in itertools.cycle(order) if self.endless else order:
            yield {"image": self.decoded(number), "label": number % 4}


def hugging_face(calls):
    SplitInfo = type("SplitInfo", (SimpleNamespace,), {})

    def load_dataset(name, split, cache_dir):
        calls.append((name, split, cache_dir))
        return Arrow(split)

    def load_dataset_builder(name, cache_dir):
        calls.append((name, cache_dir))
        splits = {s: SplitInfo(num_examples=len(numbers(s))) for s in ("train", "validation")}
        info = SimpleNamespace(features=FEATURES, splits=splits)
        return SimpleNamespace(info=info, as_streaming_dataset=lambda split: Streamed(split))

    def split_dataset_by_node(stream, rank, world_size):
        stream.numbers = stream.numbers[rank::world_size]
        return stream

    return {
        "datasets": module(
            "datasets", load_dataset=load_dataset, load_dataset_builder=load_dataset_builder, Image=dict
        ),
        "datasets.distributed": module("datasets.distributed", split_dataset_by_node=split_dataset_by_node),
        "datasets.splits": module("datasets.splits", SplitInfo=SplitInfo),
    }


def tensorflow(calls):
    def builder(name, data_dir):
        calls.append((name, data_dir))
        splits = {s: SimpleNamespace(num_examples=len(numbers(s)), num_shards=1) for s in ("train", "validation")}
        info = SimpleNamespace(features=FEATURES, splits=splits)

        def as_dataset(split, shuffle_files, decoders, read_config):
            assert set(decoders) == {"image"}
            stream = Streamed(split if isinstance(split, str) else split[0], lambda n: np.asarray(picture(n)))
            if not isinstance(split, str):
                stream.numbers = stream.numbers[split[1] :: split[2]]
            return stream.shuffle(seed=read_config["shuffle_seed"]) if shuffle_files else stream

        return SimpleNamespace(info=info, as_dataset=as_dataset)

    threading = SimpleNamespace(private_threadpool_size=0, max_intra_op_parallelism=0)
    return {
        "tensorflow": module(
            "tensorflow",
            config=SimpleNamespace(set_visible_devices=lambda *a: None),
            data=SimpleNamespace(Options=lambda: SimpleNamespace(threading=threading)),
            distribute=SimpleNamespace(InputContext=dict),
        ),
        "tensorflow_datasets": module(
            "tensorflow_datasets",
            builder=builder,
            ReadConfig=dict,
            as_numpy=lambda stream: stream,
            even_splits=lambda split, n, drop_remainder=False: [(split, i, n) for i in range(n)],
            decode=SimpleNamespace(make_decoder=lambda: lambda f: lambda **kwargs: kwargs),
        ),
    }


def webdataset(calls):
    class Pipeline:
        def __init__(self, *stages):
            self.stages, self.count = stages, None

        def with_epoch(self, count):
            made = Pipeline(*self.stages)
            made.count = count
            return made

        def once(self):
            source = iter(self.stages[0])
            for stage in self.stages[1:]:
                source = stage.run(source) if hasattr(stage, "run") else stage(source)
            return source

        def __iter__(self):
            if self.count is None:
                return self.once()
            return itertools.islice(itertools.chain.from_iterable(self.once() for _ in itertools.count()), self.count)

    def samples(handler):
        def read(source):
            for shard in source:
                with tarfile.open(shard["url"]) as tar:
                    files = [(m.name, tar.extractfile(m).read()) for m in tar]
                for (image_name, image), (_, label) in zip(files[::2], files[1::2], strict=True):
                    yield {"__key__": image_name, "png": image, "cls": label}

        return read

    def shuffled(source, size, initial, rng):
        found = list(source)
        rng.shuffle(found)
        return iter(found)

    def rename(image, target):
        return lambda source: ({"image": s["jpg"], "target": s["target"]} for s in source)

    def expand_urls(text):
        calls.append(text)
        name, last, suffix = re.fullmatch(r"(.*)\{0\.\.(\d)\}(.*)", text).groups()
        return [f"{name}{i}{suffix}" for i in range(int(last) + 1)]

    first = {"getfirst": lambda sample, keys: next(sample[k] for k in keys.split(";") if k in sample)}
    return {
        "webdataset": module(
            "webdataset",
            PipelineStage=object,
            DataPipeline=Pipeline,
            SimpleShardList=lambda urls: [{"url": url} for url in urls],
            tarfile_to_samples=samples,
            shuffle=lambda bufsize, initial, rng: lambda source: shuffled(source, bufsize, initial, rng),
            map=lambda function, handler: lambda source: map(function, source),
            rename=rename,
        ),
        "webdataset.filters": module("webdataset.filters", _shuffle=shuffled, **first),
        "webdataset.shardlists": module("webdataset.shardlists", expand_urls=expand_urls),
        "webdataset.tariterators": module(
            "webdataset.tariterators", base_plus_ext=None, url_opener=None, tar_file_expander=None, valid_sample=None
        ),
    }


LIBRARIES = dict(hfds=hugging_face, hfids=hugging_face, tfds=tensorflow, wds=webdataset)


@pytest.fixture
def make_set(tmp_path, monkeypatch):
    """By timm's prefix, a configuration of a set of 40 and 11 images, and what was asked of its library."""
    for split in ("train", "val"):
        for shard in range(4):
            with tarfile.open(tmp_path / f"{split}-{shard}.tar", "w") as tar:
                for number in list(numbers(split))[shard::4]:
                    for suffix, content in (("png", encoded(number)), ("cls", str(number % 4).encode())):
                        member = tarfile.TarInfo(f"{number}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))

    def make(prefix, **changes):
        calls = []
        for name, made in LIBRARIES[prefix](calls).items():
            monkeypatch.setitem(sys.modules, name, made)
        monkeypatch.delitem(sys.modules, f"timm.data.readers.reader_{prefix}", raising=False)
        own = (
            dict(train_split=f"train-{{0..3}}.tar|{TRAIN}", val_split="val-{0..3}.tar", num_classes=4)
            if prefix == "wds"
            else {}
        )
        plain = dict(mean=[0.0] * 3, std=[1 / 255] * 3, img_size=16, aa=None, scale=[1.0, 1.0], ratio=[1.0, 1.0])
        plain |= dict(repeated_aug=1, batch_size=8, data_dir=str(tmp_path), mixup=0.0, cutmix=0.0)
        return Config(data=f"{prefix}/some/Set", **{**plain, **own, **changes}), calls

    yield make
    for prefix in LIBRARIES:  # they hold the stand-ins
        sys.modules.pop(f"timm.data.readers.reader_{prefix}", None)


def training(config, epoch=0, rank=0, ranks=1, dataset=None):
    """The numbers and classes of an epoch's images, batch by batch."""
    dataset = dataset or load_data(config).train
    batches = EpochBatches(len(dataset), config.batch_size // ranks, config.seed, rank, ranks)
    batches.set_epoch(epoch)
    loader = TrainLoader(dataset, batches, config, CPU)
    return [(images[:, 0, 8, 8].tolist(), classes.tolist()) for images, classes in loader]


def validation(config, rank=0, ranks=1):
    val = load_data(config).val
    found = [
        number for images, _ in eval_loader(val, 4, config.workers, False, rank, ranks) for number in images[:, 0, 8, 8]
    ]
    return [round(number.item()) for number in found]


@pytest.mark.parametrize(
    "prefix, asked",
    [
        ("hfds", [("some/Set", split, "ROOT") for split in ("train", "validation")]),
        ("hfids", [("some/Set", "ROOT")] * 2),
        ("tfds", [("some/Set", "ROOT")] * 2),
        ("wds", ["train-{0..3}.tar", "val-{0..3}.tar"]),
    ],
)
def test_the_library_is_asked_for_the_set(make_set, tmp_path, prefix, asked):
    config, calls = make_set(prefix)
    data = load_data(config)
    assert calls == [
        tuple(v.replace("ROOT", str(tmp_path)) for v in call) if isinstance(call, tuple) else call for call in asked
    ]
    assert (len(data.train), len(data.val)) == (TRAIN, VAL if prefix != "wds" else 0)  # a split of wds need not tell
    assert data.classes == (tuple("0123") if prefix == "wds" else tuple(FEATURES["label"].names))


@pytest.mark.parametrize("prefix", LIBRARIES)
def test_timms_factory_is_called_with_arguments_that_it_has(make_set, monkeypatch, prefix):
    config, _ = make_set(prefix, input_key="image", seed=3)
    create, calls = timm.data.create_dataset, []

    def recording(*args, **kwargs):
        calls.append(inspect.signature(create).bind(*args, **kwargs).arguments)
        return create(*args, **kwargs)

    monkeypatch.setattr(timm.data, "create_dataset", recording)
    load_data(config)
    train, val = calls
    assert (train["name"], train["root"], train["batch_size"]) == (config.data, config.data_dir, 8)
    assert (train["split"], val["split"]) == (config.train_split, config.val_split)
    assert (train["is_training"], val["is_training"]) == (True, False)
    assert train["seed"] == val["seed"] and train["kwargs"] == {"input_key": "image", "target_key": None}


@pytest.mark.parametrize("prefix", LIBRARIES)
@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_of_a_set_comes_with_its_class(make_set, prefix, workers):
    config, _ = make_set(prefix, workers=workers)
    found = training(config)
    assert len(found) == TRAIN // 8
    assert all(int(n) % 4 == label for pixels, labels in found for n, label in zip(pixels, labels, strict=True))
    if workers == 0 or prefix == "hfds":  # readers fill up the last batch of each worker
        assert sorted(n for pixels, _ in found for n in pixels) == list(numbers("train"))
    if workers == 0 or prefix != "hfids":  # whose stand-in does not share a stream among workers
        assert sorted(validation(config)) == list(numbers("val"))


@pytest.mark.parametrize("prefix", ["hfids", "tfds", "wds"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_a_stream_depends_on_none_before(make_set, prefix, workers):
    """So that a run resumes at an epoch's beginning with the batches that it would have had."""
    config, _ = make_set(prefix, workers=workers)
    dataset = load_data(config).train
    for epoch in (0, 1):
        torch.manual_seed(epoch)
        through = training(config, epoch, dataset=dataset)
    torch.manual_seed(99)
    assert training(config, 1) == through
    assert training(config, 0) != through


@pytest.mark.parametrize("prefix", ["hfids", "tfds", "wds"])
def test_processes_share_a_stream(make_set, monkeypatch, prefix):
    """In training each takes as many batches as one of them would; in evaluation each image is counted once."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    seen, counted = [], []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        config, _ = make_set(prefix)
        batches = training(config, rank=rank, ranks=2)
        assert [len(labels) for _, labels in batches] == [4] * (TRAIN // 8)
        seen += [n for pixels, _ in batches for n in pixels]
        counted += validation(config, rank, 2)
    assert sorted(counted) == list(numbers("val"))
    if prefix != "tfds":  # whose stand-in does not share files
        assert sorted(seen) == list(numbers("train"))


def test_a_stream_is_not_repeated(make_set):
    with pytest.raises(ValueError, match="repeated_aug: wds/some/Set is a stream"):
        load_data(make_set("wds", repeated_aug=3)[0])
    with pytest.raises(ValueError, match="num_classes: wds/some/Set does not say how many classes it has"):
        load_data(make_set("wds", num_classes=None)[0])
    assert load_data(make_set("wds", num_classes=40)[0]).classes[-1] == "39"


@pytest.mark.parametrize(
    "prefix, package",
    [("hfds", "datasets"), ("hfids", "datasets"), ("wds", "webdataset"), ("tfds", "tensorflow-datasets")],
)
def test_a_missing_library_is_named_with_how_to_install_it(monkeypatch, prefix, package):
    if prefix == "tfds":
        monkeypatch.setitem(sys.modules, "tensorflow", module("tensorflow"))
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ImportError, match=rf"data: {prefix}/x needs the package {package}: pip install {package}"):
        load_data(Config(data=f"{prefix}/x", repeated_aug=1))


def test_a_timm_whose_readers_are_older_is_named_with_how_to_replace_it(monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.30")
    with pytest.raises(
        ImportError, match=r"data: hfds/x needs timm 1\.0\.31 or newer, this is 1\.0\.30: pip install -U timm"
    ):
        load_data(Config(data="hfds/x", repeated_aug=1))
