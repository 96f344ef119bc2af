"""What people type: every wrong value is one line that names the field, what was given and what is allowed, without a traceback."""

import pytest
import torch

from fastdeit.commands import cli
from fastdeit.train.config import FIELDS, Config, load_config
from fastdeit.train.device import select_device

NUMBERS = [name for name, field in FIELDS.items() if any(kind in str(field.type) for kind in ("int", "float"))]
TINY = "{patch_size: 8, embed_dim: 32, num_heads: 1, depth: 1}"


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
@pytest.mark.parametrize("name", FIELDS)
def test_an_empty_text_is_no_value_of_any_field(name, text):
    with pytest.raises(ValueError, match=rf"^{name}: got an empty text; is a variable not set\?"):
        load_config("digits", {name: text})


@pytest.mark.parametrize(
    "name", [name for name in FIELDS if "str" in str(FIELDS[name].type) and "dict" not in str(FIELDS[name].type)]
)
@pytest.mark.parametrize("text", ["", "a\0b"])
def test_an_empty_text_in_a_file_is_refused(tmp_path, name, text):
    (tmp_path / "a.yaml").write_text(f'{name}: "{text!r}"'.replace("'", "").replace("\\x00", "\\0"))
    with pytest.raises(ValueError, match=rf"^{name}: expected (a text|one of)"):
        load_config(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--data", ""],
        ["train", "--resume", ""],
        ["train", "--config", ""],
        ["train", "--output", " "],
        ["cache-teacher", "--labels", ""],
        ["eval", "--checkpoint", ""],
        ["eval", "--checkpoint", "x", "--labels", ""],
        ["eval", "--checkpoint", "x", "--data", ""],
        ["eval", "--checkpoint", "x", "--device", ""],
        ["predict", "--checkpoint", "", "x"],
        ["explain", ""],
    ],
)
def test_an_empty_option_is_not_the_default(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 2
    assert "got an empty text; is a variable not set?" in capsys.readouterr().err


def test_an_empty_image_is_refused(small_checkpoint, capsys):
    assert cli.main(["predict", "--checkpoint", str(small_checkpoint), ""]) == 2
    assert "IMAGE: expected a path, got an empty text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", [".nan", "nan", ".inf", "-.inf", "1e400", "-1.5e300", "99999999999999999999999", "true"]
)
@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_nan_infinite_or_beyond_all_use(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        load_config("digits", {name: value})


@pytest.mark.parametrize("name", [name for name in FIELDS if "list" in str(FIELDS[name].type)])
@pytest.mark.parametrize("value", [".nan", ".inf", "1e300", "true"])
def test_no_number_of_a_list_is_either(name, value):
    length = 1 if name in ("mean", "std") else 2
    with pytest.raises(ValueError, match=rf"^{name}: expected "):
        load_config("digits", {name: f"[{', '.join([value] * length)}]"})


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("scale", "[0.5, 1.5]", r"expected \[low, high\] with 0 < low <= high <= 1"),
        ("cutmix_minmax", "[0.8, 0.2]", r"expected \[low, high\] with 0 <= low <= high <= 1"),
        ("workers", "100000", "expected at most 1024, got 100000"),
        ("threads", "1000000", "expected at most 4096"),
        ("img_size", "100000", "expected at most 4096"),
        ("crop_pct", "1.0e-9", "expected at least .*, which resizes images to 16384 pixels, got 1e-09"),
        ("std", "[0]", "expected values from 1e-6 to 1000"),
        ("model_kwargs", "{depth: 1, depth: 2}", "'depth' is given twice"),
        ("model_kwargs", "{1: 2}", "expected names of arguments, got 1"),
        ("model_kwargs", "{depth: 1.0e+9}", "depth: expected numbers of at most 100000, got 1000000000.0"),
        ("model_kwargs", "{init_values: .nan}", "init_values: expected numbers"),
        ("teacher_kwargs", "{num_classes: 3}", "num_classes is set by a field or by the data"),
        ("model_kwargs", "{depth: ", "is not YAML"),
    ],
)
def test_values_out_of_range_say_what_is_allowed(field, value, message):
    with pytest.raises(ValueError, match=rf"^{field}: .*{message}"):
        load_config("digits", {field: value})


def test_a_key_given_twice_in_a_file_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 3\nlr: 1\nepochs: 4\n")
    with pytest.raises(ValueError, match=r"config: .*'epochs' is given twice .*line 3"):
        load_config(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("kwargs: &k {a: 1}\nx: {<<: *k, a: 2}\n")
    with pytest.raises(ValueError, match="unknown field kwargs, x"):  # what is merged may be overridden
        load_config(str(tmp_path / "b.yaml"))


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", ".", "a/b", "x/", "n" * 201, "é" * 101])
def test_a_run_stays_inside_runs(name):
    with pytest.raises(ValueError, match=r"name: expected the name of a folder in runs/, without /"):
        load_config("digits", {"name": name})


@pytest.mark.parametrize("device", ["meta", "mps", "xla", "xpu", "cuda:-1", "cuda:0", "cpu:1", "CPU", "text"])
def test_a_device_that_cannot_train_is_refused(device):
    if device == "cuda:0" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"device: (expected cpu, cuda or cuda:N, got|cuda:0 is not there)"):
        select_device(Config(device=device))


@pytest.mark.parametrize(
    "kwargs",
    [
        "{patch_size: 0}",
        "{patch_size: -1}",
        "{patch_size: [8]}",
        "{patch_size: text}",
        "{embed_dim: 0}",
        "{embed_dim: -8}",
        "{num_heads: 0}",
        "{num_heads: 7}",
        "{depth: -1}",
        "{depth: a}",
        "{mlp_ratio: -1}",
        "{act_layer: nonsense}",
        "{norm_layer: 3}",
        "{reg_tokens: -1}",
        "{pretrained_cfg: 3}",
        "{pretrained_cfg: x}",
        "{class_token: false}",
        "{proj_drop_rate: 2}",
        "{checkpoint_path: /none}",
    ],
)
def test_arguments_that_timm_or_torch_choke_on_are_named(kwargs, capsys):
    assert cli.main(["train", "--dry-run", "--model-kwargs", kwargs]) == 2
    err = capsys.readouterr().err
    assert "fastdeit train: model and model_kwargs: timm.create_model('deit_tiny_distilled_patch16_224', **{" in err
    assert "failed: " in err and "Traceback" not in err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--teacher-kwargs", "{depth: -1}"], "teacher_model and teacher_kwargs: timm.create_model('regnety_002'"),
        (["--teacher-model", "text"], "teacher_model: timm has no model 'text'"),
        (["--opt", "adahessian"], "opt: adahessian needs more of a step than gradients"),
        (["--opt", "null"], "opt: timm cannot make 'null'"),
        (["--aa", "rand-m9-x1"], "aa: timm cannot make 'rand-m9-x1'"),
        (
            ["--three-augment", "--aa", "null", "--simple-random-crop", "--interpolation", "random"],
            "interpolation: simple_random",
        ),
    ],
)
def test_what_timm_does_not_have_is_one_line(options, message, capsys):
    assert cli.main(["train", "--dry-run", "--model-kwargs", TINY, *options]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_random_interpolation_is_bilinear_in_evaluation():
    from fastdeit.train.transforms import eval_transform

    assert [str(step) for _, step in eval_transform(Config(interpolation="random")).steps] == [
        str(step) for _, step in eval_transform(Config(interpolation="bilinear")).steps
    ]
