"""The configuration of a run: one dataclass, read from YAML, overridden field by field, checked before anything is loaded."""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastdeit.train.config_checks import check_config
from fastdeit.train.yaml_reading import read_yaml


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata=dict(help=text))


@dataclass(frozen=True)
class Config:
    """What a run depends on. Names are timm's and facebookresearch/deit's where they have one; defaults are DeiT's recipe.

    All but FREE_FIELDS decide the result.
    """

    name: str = _help("name of the run, and of its folder under runs/", "run")
    output: str | None = _help("run folder; by default a new one under runs/", None)
    seed: int = _help("seed of initial weights, order, augmentation, mixup and drop path", 0)
    epochs: int = _help("passes over the training images", 300)
    batch_size: int = _help("images per update, over all processes", 64)

    data: str = _help(
        "`digits`, a folder with train/CLASS/ and val/CLASS/, or a set of timm's: hfds/, hfids/, wds/, tfds/ or torch/NAME",
        "digits",
    )
    data_dir: str | None = _help("folder of a data set of timm's, or where it is downloaded to", None)
    data_download: bool = _help("download a data set of timm's that is not in data_dir", False)
    train_split: str = _help("the split of a timm data set to train on", "train")
    val_split: str = _help("the split of a timm data set to evaluate on", "validation")
    input_key: str | None = _help("column of the images in a timm data set; by default the reader's choice", None)
    target_key: str | None = _help("column of the classes in a timm data set; by default the reader's choice", None)
    num_classes: int | None = _help(
        "number of classes; needed for a timm set that does not give it, checked for others", None
    )
    max_bad_images: int = _help("unreadable images that are reported and replaced; one more stops the run", 100)
    max_image_megapixels: float = _help("images with more pixels, in millions, count as unreadable", 500.0)
    img_size: int = _help("height and width of the model's input, in pixels", 224)
    img_size_schedule: list[list[Any]] | None = field(
        default=None,
        metadata=dict(
            help="sizes of training images by first epoch, [[0, 128], [100, 224]], the last one img_size; a third number is the "
            "grad_accum_steps from there on"
        ),
    )
    in_chans: int = _help("1 for grey images, 3 for colour", 3)
    mean: list[float] = field(
        default_factory=lambda: [0.485, 0.456, 0.406],
        metadata=dict(help="subtracted from each channel of images in [0, 1]"),
    )
    std: list[float] = field(
        default_factory=lambda: [0.229, 0.224, 0.225], metadata=dict(help="each channel is divided by it")
    )
    interpolation: str = _help(
        "resampling of images: nearest, bilinear, bicubic, or random (bilinear in evaluation)", "bicubic"
    )
    crop_pct: float = _help("share of the resized image that evaluation's crop keeps", 0.875)
    crop_mode: str = _help("how evaluation crops: center, squash (no aspect ratio kept) or border (padded)", "center")
    decoder: str = _help(
        "decodes JPEG files: nvimgcodec, simplejpeg, torchvision or pillow; auto takes the first that is installed",
        "auto",
    )
    resize: str = _help(
        "resizes training images: pillow, as timm does, or torch, faster and a little different", "pillow"
    )
    decode_on: str = _help(
        "where training images are decoded and resized: cpu, or device, by nvJPEG; with resize torch; pixels differ a little",
        "cpu",
    )
    augment_on: str = _help(
        "where flips, auto-augmentation and colour jitter run: cpu, device, or auto (a GPU if there is one); same images",
        "auto",
    )
    workers: int = _help("processes that load data; results do not depend on it", 0)
    prefetch: int = _help("batches that each worker loads ahead", 2)

    scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata=dict(help="area of random crops, relative to the image")
    )
    ratio: list[float] = field(
        default_factory=lambda: [3 / 4, 4 / 3], metadata=dict(help="width to height of random crops")
    )
    repeated_aug: int = _help(
        "how often an image is repeated in an epoch, each time augmented anew; the epoch keeps its length", 3
    )
    simple_random_crop: bool = _help(
        "resize, pad by 4 and crop, in place of scale and ratio (DeiT III on ImageNet-21k)", False
    )
    three_augment: bool = _help("DeiT III's one of grey, solarized, blurred, in place of aa", False)
    hflip: float = _help("probability of a horizontal flip", 0.5)
    vflip: float = _help("probability of a vertical flip", 0.0)
    color_jitter: float = _help("strength of colour jitter; without effect beside auto-augmentation", 0.0)
    aa: str | None = _help("timm's auto-augmentation policy, such as rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1")
    aa_schedule: list[list[Any]] | None = field(
        default=None,
        metadata=dict(
            help="auto-augmentation policies by first epoch, [[0, rand-m1-inc1], [60, rand-m9-inc1]], the last one aa"
        ),
    )
    color_jitter_prob: float | None = _help("probability of colour jitter; by default every image", None)
    grayscale_prob: float = _help("probability of an image without colour", 0.0)
    gaussian_blur_prob: float = _help("probability of a blurred image", 0.0)
    reprob: float = _help("probability of random erasing", 0.25)
    remode: str = _help("what random erasing writes: const, rand or pixel", "pixel")
    recount: int = _help("most regions that random erasing takes from an image", 1)
    mixup: float = _help("mixup's alpha; 0 is off", 0.8)
    cutmix: float = _help("CutMix's alpha; 0 is off", 1.0)
    mixup_prob: float = _help("probability that a batch is mixed", 1.0)
    mixup_switch_prob: float = _help("probability of CutMix rather than mixup where both are on", 0.5)
    mixup_mode: str = _help("mix by batch, pair or elem(ent)", "batch")
    mixup_off_epoch: int = _help("stop mixing at this epoch; 0 mixes to the end", 0)
    cutmix_minmax: list[float] | None = field(
        default=None, metadata=dict(help="smallest and largest side of CutMix's region, in place of cutmix")
    )
    smoothing: float = _help("label smoothing", 0.1)
    bce_loss: bool = _help("binary cross-entropy per class in place of cross-entropy (DeiT III)", False)
    bce_target_thresh: float | None = _help(
        "with bce_loss, targets above it become 1 and others 0; DeiT III has 0", None
    )

    model: str = _help("timm's name of the model to train", "deit_base_distilled_patch16_224")
    model_kwargs: dict[str, Any] = field(default_factory=dict, metadata=dict(help="arguments of timm.create_model"))
    pretrained: bool = _help("start from timm's pretrained weights", False)
    finetune: str | None = _help("start from these weights, of any resolution and with any classes", None)
    finetune_new_head: bool = _help("start the heads anew, for other classes than those of finetune's weights", False)
    drop: float = _help("dropout", 0.0)
    drop_path: float = _help("rate of stochastic depth in the last block", 0.1)
    drop_path_uniform: bool = _help("the same rate in every block (DeiT III), rather than rising from 0", False)
    drop_path_mode: str = _help(
        "mask: stochastic depth computes all samples and masks; skip: each branch runs on the samples that are kept alone",
        "mask",
    )
    accelerate: bool = _help("use the fused kernels where they run", True)

    distillation_type: str = _help("none, soft or hard", "hard")
    distillation_alpha: float = _help("weight of the distillation term", 0.5)
    distillation_tau: float = _help("temperature of soft distillation", 1.0)
    distil_class_token: bool = _help("distil into the class head, for models without a distillation token", False)
    teacher_model: str | None = _help("timm's name of the teacher", "regnety_160.deit_in1k")
    teacher_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata=dict(help="arguments of timm.create_model for the teacher")
    )
    teacher_checkpoint: str | None = _help(
        "the teacher's weights, a safetensors file; by default timm's pretrained ones", None
    )
    teacher_cache: str | None = _help("file of labels from fastdeit cache-teacher, in place of the teacher", None)
    teacher_epochs: int = _help("train the teacher first, for this many epochs", 0)
    teacher_lr: float = _help("the teacher's learning rate, scaled as lr is", 5e-4)

    opt: str = _help("timm's name of the optimizer", "adamw")
    opt_eps: float = _help("the optimizer's epsilon", 1e-8)
    opt_betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata=dict(help="the optimizer's betas"))
    lr: float = _help("learning rate for lr_base_size images per update, to which it is scaled linearly", 5e-4)
    lr_base_size: int = _help("images per update that lr is meant for; 0 takes lr as it is", 512)
    weight_decay: float = _help("weight decay of matrices; none for biases, norms, tokens and positions", 0.05)
    layer_decay: float | None = _help("each layer's learning rate relative to the next one's", None)
    clip_grad: float | None = _help("largest norm, value or ratio of the gradient, by clip_mode", None)
    clip_mode: str = _help("clip by norm, value or agc (adaptively, relative to the weights)", "norm")
    grad_accum_steps: int = _help("equal parts that a process splits its batch into, to save memory", 1)
    memory: str = _help(
        "what accelerated blocks save for backward: usual, or lean: less, for one more GEMM per block", "usual"
    )
    grad_checkpointing: bool = _help("save no activations within a block and recompute them in backward", False)
    sched: str = _help("timm's name of the learning-rate schedule", "cosine")
    sched_on_updates: bool = _help("a new learning rate each update rather than each epoch", False)
    warmup_epochs: int = _help("epochs of linear warm-up at the start", 5)
    warmup_lr: float = _help("learning rate at the start of warm-up", 1e-6)
    min_lr: float = _help("learning rate at the end", 1e-5)
    model_ema_decay: float = _help("decay of the weights' moving average; 0 is off", 0.99996)
    model_ema_warmup: bool = _help("let the moving average's decay grow to its value (timm's warm-up)", False)

    tensorboard: bool = _help("write event files for TensorBoard into the run folder", False)
    wandb: str | None = _help("project of Weights & Biases to report to", None)

    eval_every: int = _help("evaluate after every N epochs, and after the last one", 1)
    eval_ema: str = _help(
        "evaluate the moving average after the last epoch, or at each evaluation: last or each", "last"
    )
    checkpoint_minutes: float = _help("save the state within an epoch every N minutes; 0 is off", 10.0)
    checkpoint_steps: int = _help("save the state within an epoch every N updates; 0 is off", 0)
    keep_best: int = _help("number of best epochs whose weights are kept", 1)

    compile: bool = _help("compile the model with torch.compile", False)
    cuda_graphs: bool = _help("record the training step as a CUDA graph and replay it, where it can be recorded", False)
    precision: str = _help("auto (bf16 on a GPU, else fp32), bf16, fp16 or fp32", "auto")
    device: str | None = _help("device to use; by default a GPU if there is one, else the CPU", None)
    threads: int | None = _help("CPU threads; sums, hence the last bits, depend on it", None)

    @property
    def scaled_lr(self) -> float:
        """The peak learning rate: lr * batch_size / lr_base_size."""
        return self.lr * self.batch_size / self.lr_base_size if self.lr_base_size else self.lr

    @property
    def mixes(self) -> bool:
        return (self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None) and self.mixup_prob > 0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> "Config":
        return dataclasses.replace(self, **changes)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
_TYPES = typing.get_type_hints(Config)
FREE_FIELDS = (
    "output",
    "augment_on",
    "workers",
    "prefetch",
    "max_bad_images",
    "max_image_megapixels",
    "tensorboard",
    "wandb",
    "eval_every",
    "eval_ema",
    "checkpoint_minutes",
    "checkpoint_steps",
    "keep_best",
    "cuda_graphs",
)  # a run may be resumed with others


def shipped_configs() -> list[str]:
    """Names that `load_config` takes besides files."""
    return sorted(p.name.removesuffix(".yaml") for p in files("fastdeit.train").joinpath("configs").iterdir())


def load_config(source: str = "digits", overrides: dict[str, Any] | None = None) -> Config:
    """Loads and checks the shipped configuration or YAML file `source`, with `overrides` (strings are read as YAML).

    A file whose `base` names another configuration, shipped or beside it, states only what differs from that one.

    Raises:
        ValueError: no such configuration, an unknown field, a value of the wrong type or out of range, or fields that contradict
            each other.
    """
    values = _read(source, Path(), ())
    given = {}
    for name, value in (overrides or {}).items():
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{name}: got an empty text; is a variable not set? (null says that there is none)")
        try:
            given[name] = read_yaml(value) if _is_yaml(name, value) else value
        except ValueError as error:
            raise ValueError(f"{name}: {value!r} is not YAML: {error}") from None
    return config_from({**values, **given})


def _read(source: str, folder: Path, above: tuple[str, ...]) -> dict[str, Any]:
    """The fields that source and its bases set. folder is where relative names start, above are those that led here."""
    path = folder / source
    if source in shipped_configs():
        path = files("fastdeit.train").joinpath("configs", f"{source}.yaml")
    elif not path.is_file():
        close = difflib.get_close_matches(source, shipped_configs(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"config: {source!r} is neither a file nor one of {', '.join(shipped_configs())}{hint}")
    if str(path) in above:
        raise ValueError(f"base: {' -> '.join([*above, str(path)])} is a circle")
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"config: {source} is not YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"config: {source} holds a {type(values).__name__}, expected `field: value` lines")
    base = values.pop("base", None)
    inherited = _read(str(base), Path(str(path)).parent, (*above, str(path))) if base is not None else {}
    name = {"name": Path(str(path)).stem}  # a run is called after the configuration asked for
    return {**inherited, **name, **values}


def config_from(values: dict[str, Any]) -> Config:
    """A checked Config of plain values, as YAML and checkpoints hold them. Raises ValueError as `load_config`."""
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        close = [match for name in unknown for match in difflib.get_close_matches(str(name), FIELDS, n=1)]
        hint = f"; did you mean {', '.join(close)}?" if close else f"; fields are {', '.join(FIELDS)}"
        raise ValueError(f"config: unknown field {', '.join(map(str, unknown))}{hint}")
    config = Config(**{name: _coerce(name, value) for name, value in values.items()})
    check_config(config)
    return config


def with_options(config: Config, **changes: Any) -> Config:
    """config with the fields that a command's options give, those that are not None; checked as `load_config` does."""
    return config_from({**config.as_dict(), **{name: value for name, value in changes.items() if value is not None}})


def _is_yaml(name: str, value: Any) -> bool:
    """Whether an override is text to be read as YAML: not that of a string field, where 010 is a name, but for null."""
    if not isinstance(value, str) or _TYPES.get(name) is str:
        return False
    return _TYPES.get(name) != str | None or value == "null"


_EXPECTED: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[float]: "a list of numbers such as [0.5, 1.0]",
    dict[str, Any]: "a mapping such as {depth: 6}",
    list[list[Any]]: "a list of lists such as [[0, 128], [100, 224]]",
}


def _coerce(name: str, value: Any) -> Any:
    """value as the field's type; YAML 1.1 reads 1e-3 as a string."""
    annotation = _TYPES[name]
    options = typing.get_args(annotation) if type(None) in typing.get_args(annotation) else (annotation,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    try:
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
        if kind is str and not isinstance(value, dict | list | bool | None):
            return str(value)
        if kind == list[float]:
            values = value if isinstance(value, list | tuple) else [value]
            if not any(isinstance(v, bool) for v in values):
                return [float(v) for v in values]
        if kind == list[list[Any]] and isinstance(value, list | tuple):
            if all(isinstance(entry, list | tuple) for entry in value):
                return [list(entry) for entry in value]
        if kind == dict[str, Any] and isinstance(value, dict):
            return dict(value)
        if kind is bool and isinstance(value, bool):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name}: expected {_EXPECTED[kind if kind in _EXPECTED else str]}, got {value!r}")
