"""The configuration: shipped files, overrides, and what is refused."""

import pytest

from fastdeit.train.config import FIELDS, Config, config_from, load_config, shipped_configs


def test_the_default_is_shipped_and_resolves():
    assert "digits" in shipped_configs()
    assert load_config().data == "digits"


def test_an_unset_field_has_the_recipes_default():
    """facebookresearch/deit's main.py."""
    config = Config()
    assert (config.opt, config.opt_eps, config.opt_betas, config.weight_decay) == ("adamw", 1e-8, [0.9, 0.999], 0.05)
    assert (config.lr, config.warmup_epochs, config.warmup_lr, config.min_lr) == (5e-4, 5, 1e-6, 1e-5)
    assert (config.mixup, config.cutmix, config.smoothing, config.reprob) == (0.8, 1.0, 0.1, 0.25)
    assert (config.distillation_alpha, config.distillation_tau, config.drop_path) == (0.5, 1.0, 0.1)


def test_the_learning_rate_scales_with_the_batch():
    assert Config(batch_size=1024).scaled_lr == pytest.approx(1e-3)
    assert Config(batch_size=1024, lr_base_size=0).scaled_lr == 5e-4


def test_overrides_are_read_as_yaml():
    config = load_config("digits", {"lr": "1e-3", "aa": "null", "model_kwargs": "{depth: 2}", "scale": "[0.5, 1]"})
    assert (config.lr, config.aa, config.model_kwargs, config.scale) == (1e-3, None, {"depth": 2}, [0.5, 1.0])


def test_overrides_of_strings_are_taken_as_they_are():
    config = load_config(
        "digits", {"output": "010", "name": "[a]", "distillation_type": "none", "teacher_model": "null"}
    )
    assert (config.output, config.name, config.teacher_model) == ("010", "[a]", None)


def test_a_file_is_a_configuration(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 7\nwarmup_epochs: 2\n")
    assert load_config(str(tmp_path / "mine.yaml")).epochs == 7


def test_a_file_states_what_differs_from_its_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: deit_small_distilled\nlr: 1e-3\n")
    (tmp_path / "longer.yaml").write_text("base: mine.yaml\nepochs: 400\n")
    mine, longer = (load_config(str(tmp_path / name)) for name in ("mine.yaml", "longer.yaml"))
    assert mine == load_config("deit_small_distilled").replace(lr=1e-3, name="mine")
    assert longer == mine.replace(epochs=400, name="longer")


def test_bases_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match=r"base: .*a\.yaml -> .*b\.yaml -> .*a\.yaml is a circle"):
        load_config(str(tmp_path / "a.yaml"))


def test_a_base_that_is_not_there_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("base: deit_bas\n")
    with pytest.raises(ValueError, match=r"'deit_bas' is neither a file nor one of .*; did you mean deit_base"):
        load_config(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("content", [b"epochs: [1", b"\x00\xff"])
def test_a_file_that_is_no_yaml_is_named_in_a_line(content, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"^config: .*a\.yaml is not YAML: [^\n]+$"):
        load_config(str(tmp_path / "a.yaml"))


def test_a_run_continues_from_its_own_arguments(tmp_path):
    import yaml

    config = load_config("deit3_small")
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(config.as_dict()))
    assert load_config(str(tmp_path / "args.yaml")) == config


def test_plain_values_round_trip():
    config = load_config()
    assert config_from(config.as_dict()) == config


def test_an_unknown_field_is_refused_with_the_closest():
    with pytest.raises(ValueError, match="unknown field epoch; did you mean epochs"):
        config_from({"epoch": 3})


def test_an_unknown_configuration_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"'nothing' is neither a file nor one of .*digits"):
        load_config("nothing")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("epochs", "many", "epochs: expected an integer, got 'many'"),
        ("epochs", 2.5, "epochs: expected an integer, got 2.5"),
        ("epochs", 0, "epochs: expected a value at least 1, got 0"),
        ("lr", float("nan"), "lr: expected a value more than 0, got nan"),
        ("accelerate", "perhaps", "accelerate: expected true or false"),
        ("drop_path", 1.5, "drop_path: expected a value from 0 to 1"),
        ("distillation_type", "warm", "distillation_type: expected one of none, soft, hard"),
        ("precision", "fp8", "precision: expected one of auto, fp32, bf16"),
        ("memory", "least", "memory: expected one of usual, lean, got 'least'"),
        ("epochs", float("inf"), "epochs: expected an integer, got inf"),
        ("scale", [0.9, 0.5], r"scale: expected \[low, high\] with 0 < low <= high"),
        ("std", [0.2, 0, 0.2], "std: expected values from 1e-6 to 1000"),
        ("opt_betas", [0.9, 1], "opt_betas: expected values from 0 to less than 1"),
        ("repeated_aug", 0, "repeated_aug: expected a value at least 1"),
        ("mixup_mode", "image", "mixup_mode: expected one of batch, pair, elem"),
        ("crop_mode", "middle", "crop_mode: expected one of center, squash, border"),
        ("cutmix_minmax", [0.5], r"cutmix_minmax: expected 2 value\(s\)"),
        ("mean", [0.5], r"mean: expected 3 value\(s\)"),
        ("lr", 0.0, "lr: expected a value more than 0, got 0.0"),
        ("weight_decay", -0.05, "weight_decay: expected a value at least 0, got -0.05"),
        ("drop_path", -0.1, "drop_path: expected a value from 0 to 1, got -0.1"),
        ("scale", [0.0, 1.0], r"scale: expected \[low, high\] with 0 < low"),
        ("cutmix_minmax", [0.2, 1.5], r"cutmix_minmax: expected \[low, high\] with .* high <= 1"),
        ("mean", [-2000.0, 0.5, 0.5], "mean: expected values from -1000 to 1000"),
        ("opt_betas", [-0.1, 0.9], "opt_betas: expected values from 0 to less than 1"),
        ("in_chans", 2, "in_chans: expected one of 1, 3, got 2"),
        ("model_kwargs", [1], "model_kwargs: expected a mapping"),
    ],
)
def test_a_bad_value_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        config_from({field: value})


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(batch_size=63), "batch_size: mixup pairs"),
        (dict(epochs=5), "warmup_epochs: expected less than epochs"),
        (dict(teacher_model=None), "teacher_model: distillation_type hard needs a teacher"),
        (dict(teacher_epochs=3, teacher_checkpoint="x"), "teacher_checkpoint: contradicts teacher_epochs"),
        (dict(three_augment=True), "three_augment: takes the place of aa, which is rand"),
        (dict(bce_target_thresh=0.0), "bce_target_thresh: binary targets are those of bce_loss"),
        (
            dict(bce_loss=True, bce_target_thresh=0.0),
            "smoothing: with bce_target_thresh 0.0 every smoothed target may become 1",
        ),
        (dict(pretrained=True, finetune="x"), "finetune: contradicts pretrained"),
        (dict(mixup=0, cutmix=0, mixup_off_epoch=3), "mixup_off_epoch: nothing is mixed"),
        (dict(distillation_type="soft", teacher_cache="x"), "teacher_cache: holds the teacher's classes"),
        (dict(teacher_cache="x", teacher_epochs=2), "teacher_cache: contradicts teacher_epochs"),
        (dict(distillation_type="none", distil_class_token=True), "distil_class_token: has no effect without"),
        (dict(model_kwargs=dict(num_classes=3)), "model_kwargs: num_classes is set by"),
        (dict(model_kwargs=dict(img_size=32)), "model_kwargs: img_size is set by"),
        (dict(model_kwargs=dict(pretrained=True)), "model_kwargs: pretrained is set by"),
        (dict(model_kwargs=dict(depths=[2, 1e9])), "model_kwargs: depths: expected numbers of at most 100000"),
        (
            dict(bce_loss=True, smoothing=0.2, bce_target_thresh=0.09),
            "smoothing: with bce_target_thresh 0.09 every smoothed",
        ),
        (
            dict(distillation_type="none", teacher_model=None, teacher_cache="x"),
            "teacher_cache: .* distillation_type none makes no use; expected hard",
        ),
    ],
)
def test_contradictory_fields_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        config_from(values)


def test_an_odd_batch_is_no_fault_where_nothing_is_mixed():
    assert config_from(dict(batch_size=63, mixup=0, cutmix=0)).batch_size == 63


def test_every_field_has_help():
    assert all(field.metadata.get("help") for field in FIELDS.values())
