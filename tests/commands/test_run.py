"""`fastdeit run`: scripts that use timm's public calls as timm's and DeiT's own do, unedited, on accelerated models."""

import os
import subprocess
import sys

import pytest
import timm
import timm.models
import torch
from timm.models import create_model as create_model_imported_before

from fastdeit.commands.cli import main
from fastdeit.commands.run_hosts import made_models

SIZES = "img_size=32, embed_dim=64, num_heads=2, depth=2, num_classes=3"

# The calls of timm's train.py, in its order.
TRAIN = f"""
import argparse, sys
import torch
from timm import create_model
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, distribute_bn, init_distributed_device
from torch.nn.parallel import DistributedDataParallel
from beside import IMAGES

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--output")
    args = parser.parse_args()
    args.device = "cpu"
    device = init_distributed_device(args)
    model = create_model(args.model, pretrained=False, {SIZES})
    model.set_grad_checkpointing(enable=True)
    model.to(device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, layer_decay=0.9)
    ema = ModelEmaV3(model, decay=0.5)
    wrapped = DistributedDataParallel(model) if args.distributed else model
    loss = SoftTargetCrossEntropy()(wrapped(IMAGES), torch.eye(3))
    NativeScaler(device="cpu")(loss, optimizer, parameters=model.parameters())
    ema.update(model)
    if args.rank == 0:
        CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=args.output).save_checkpoint(0, 1.0)
    # In one piece: two processes write to one pipe.
    print(" ".join((str(args.rank), type(model).__module__, type(ema.module.blocks[0]).__module__)) + "\\n", end="")
    if args.distributed:
        torch.distributed.destroy_process_group()

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path):
    """script(source): a file with that source."""

    def write(source, name="script.py"):
        (tmp_path / name).write_text(source)
        return str(tmp_path / name)

    return write


@pytest.fixture
def train(script):
    script("import torch\nIMAGES = torch.randn(3, 3, 32, 32)", "beside.py")
    return script(TRAIN, "train.py")


def assert_stock_timm_loads(folder):
    options = dict(img_size=32, embed_dim=64, num_heads=2, depth=2, num_classes=3)
    model = timm.create_model("deit_tiny_patch16_224", **options, checkpoint_path=str(folder / "last.pth.tar"))
    assert "fastdeit" not in type(model).__module__
    saved = torch.load(folder / "last.pth.tar", weights_only=False)
    assert model.state_dict().keys() == saved["state_dict"].keys()
    assert all(torch.equal(t, saved["state_dict_ema"][name]) for name, t in model.state_dict().items())


def test_a_training_script_of_timms_calls_runs_accelerated(train, tmp_path, capsys):
    assert main(["run", train, "--model", "deit_tiny_patch16_224", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == "0 fastdeit.nn.vision_transformer fastdeit.nn.block\n"
    assert "deit_tiny_patch16_224 is accelerated: 12 of its modules" in err
    assert_stock_timm_loads(tmp_path)


def test_under_torchrun(train, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "fastdeit", "run", train, "--model", "deit_tiny_patch16_224", "--output", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    names = "fastdeit.nn.vision_transformer fastdeit.nn.block"
    assert sorted(result.stdout.splitlines()) == [f"0 {names}", f"1 {names}"]
    assert result.stderr.count("is accelerated") == 1
    assert_stock_timm_loads(tmp_path)


@pytest.mark.parametrize(
    "imported",
    [
        "import timm; create_model = timm.create_model",
        "import timm.models; create_model = timm.models.create_model",
        "from timm.models import create_model",
        "from timm.models import *",
        "from timm.models._factory import create_model",
    ],
)
def test_wherever_create_model_is_imported_from(script, imported, capsys):
    source = f"{imported}\nprint(type(create_model('deit_tiny_patch16_224', {SIZES})).__module__)"
    assert main(["run", script(source)]) == 0
    assert capsys.readouterr().out == "fastdeit.nn.vision_transformer\n"


def test_evaluation_features_and_what_timm_creates_itself(script, capsys):
    """validate.py and benchmark.py: a checkpoint loaded afterwards, features, a teacher that timm's task makes."""
    source = f"""
import timm, torch
from timm.models import load_checkpoint
import timm.task
plain = timm.models.vision_transformer.VisionTransformer({SIZES})
torch.save(plain.state_dict(), __file__ + ".pth")
model = timm.create_model("deit_tiny_patch16_224", {SIZES}).eval()
load_checkpoint(model, __file__ + ".pth")
x = torch.randn(2, 3, 32, 32)
with torch.inference_mode():
    assert torch.equal(model(x), plain.eval()(x))
features = timm.create_model("deit_tiny_patch16_224", features_only=True, out_indices=(0, 1), {SIZES})
assert len(features(x)) == 2 and sum("fastdeit" in type(m).__module__ for m in features.modules()) >= 10
assert timm.task.distillation.create_model is timm.create_model
convnet = timm.create_model("resnet18", num_classes=3)
assert not any("fastdeit" in type(m).__module__ for m in convnet.modules())
"""
    assert main(["run", script(source)]) == 0, capsys.readouterr().err


def test_a_model_that_a_script_registers_is_accelerated_inside(script, capsys):
    """As DeiT's main.py: classes of its own, with a forward of their own, in a file beside it."""
    script(
        f"""
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
class Distilled(VisionTransformer):
    def forward(self, x):
        return 2 * super().forward(x)
@register_model
def of_the_script(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    return Distilled({SIZES})
""",
        "models_beside.py",
    )
    source = """
from timm.models import create_model
import models_beside
model = create_model("of_the_script")
print(type(model).__name__, type(model.blocks[1]).__module__)
"""
    assert main(["run", script(source)]) == 0
    assert capsys.readouterr().out == "Distilled fastdeit.nn.block\n"


def test_a_model_to_be_scripted_stays_timms(script, capsys):
    source = f"""
import timm, torch
model = timm.create_model("deit_tiny_patch16_224", scriptable=True, {SIZES})
torch.jit.script(model)
"""
    assert main(["run", script(source)]) == 0
    assert "deit_tiny_patch16_224 stays timm's, since it is to be scripted" in capsys.readouterr().err


def test_a_model_made_inside_set_scriptable_stays_timms(script, capsys):
    source = f"""
import timm, torch
from timm.layers import set_scriptable
with set_scriptable(True):
    model = timm.create_model("deit_tiny_patch16_224", {SIZES})
torch.jit.script(model)
"""
    assert main(["run", script(source)]) == 0
    assert "deit_tiny_patch16_224 stays timm's, since it is to be scripted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [["--", "--x"], ["a", "--", "--x", "--", "y"], ["--help", "--version"], ["", "--x", ""], ["-m", "run"], []]
)
def test_the_script_gets_what_comes_after_it_as_it_is(script, capsys, given):
    path = script("import sys; print(sys.argv[1:])")
    assert main(["run", path, *given]) == 0
    assert capsys.readouterr().out.strip() == str(given)


def test_a_module_runs_as_python_m_runs_it(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "package").mkdir()
    script("import sys; print(__name__, __spec__.name, sys.argv[1:], sys.path[0])", "package/tool.py")
    monkeypatch.chdir(tmp_path)
    before = (sys.argv, list(sys.path))
    assert main(["run", "-m", "package.tool", "--help", "-m", "--", "x"]) == 0
    assert capsys.readouterr().out == "__main__ package.tool ['--help', '-m', '--', 'x'] \n"
    assert (sys.argv, sys.path) == before


def test_nothing_of_timm_stays_changed(script):
    assert main(["run", script("import timm")]) == 0
    for module in (timm, timm.models, timm.models._factory):
        assert module.create_model is create_model_imported_before


@pytest.mark.parametrize(
    ("source", "code"), [("import sys; sys.exit(7)", 7), ("raise SystemExit", None), ("exit('no')", "no")]
)
def test_the_scripts_exit_code_is_the_commands(script, source, code):
    with pytest.raises(SystemExit) as stop:
        main(["run", script(source)])
    assert stop.value.code == code


def test_the_scripts_errors_keep_their_traceback(script, capsys):
    path = script("def fail():\n    raise ValueError('of the script')\nfail()")
    assert main(["run", path]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("ValueError: of the script\n")
    assert f'File "{path}", line 2, in fail' in err and "run_command" not in err and "runpy" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.py"], "SCRIPT: there is no file 'nowhere.py'"),
        (["-m", "nowhere"], "SCRIPT: there is no module 'nowhere'"),
        (["-m", "no.where"], "SCRIPT: there is no module 'no.where'"),
    ],
)
def test_a_script_that_is_not_there_is_named(capsys, argv, message):
    assert main(["run", *argv]) == 2
    assert message in capsys.readouterr().err


OTHERS = """
import sys
assert not {"open_clip", "transformers", "vit_pytorch"} & set(sys.modules)
from torchvision.models import VisionTransformer
from vit_pytorch import ViT, SimpleViT
from transformers import AutoModelForImageClassification, ViTConfig
models = [
    VisionTransformer(16, 8, 1, 1, hidden_dim=32, mlp_dim=48),
    ViT(image_size=16, patch_size=8, num_classes=5, dim=32, depth=1, heads=1, mlp_dim=48),
    SimpleViT(image_size=16, patch_size=8, num_classes=5, dim=32, depth=1, heads=1, mlp_dim=48),
    AutoModelForImageClassification.from_config(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1)),
]
models[3].save_pretrained("saved")
models.append(AutoModelForImageClassification.from_pretrained("saved"))
models.append(AutoModelForImageClassification.from_pretrained("saved", output_loading_info=True)[0])
import open_clip
sizes = dict(vision_cfg=dict(image_size=16, patch_size=8, width=64, layers=1), text_cfg=dict(width=64, heads=1, layers=1))
models.append(open_clip.CLIP(embed_dim=8, **sizes))
for model in models:
    print(type(model).__name__, any(type(part).__module__.startswith("fastdeit.nn") for part in model.modules()))
"""


def test_models_of_other_libraries_are_accelerated_where_they_are_made(script, tmp_path):
    for library in ("open_clip", "torchvision", "vit_pytorch", "transformers"):
        pytest.importorskip(library, reason=f"needs {library}")
    command = [sys.executable, "-m", "fastdeit", "run", script(OTHERS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False)
    assert done.stdout.split("\n")[:-1] == [
        "VisionTransformer True",
        "ViT True",
        "SimpleViT True",
        *["ViTForImageClassification True"] * 3,
        "CLIP True",
    ], done.stderr
    assert done.stderr.count("is accelerated: ") == 7


def test_other_libraries_have_their_constructors_back():
    vit = pytest.importorskip("torchvision.models.vision_transformer", reason="needs torchvision").VisionTransformer
    own, made = vit.__init__, []
    with made_models(made.append):
        model = vit(16, 8, 1, 1, hidden_dim=32, mlp_dim=48)
        assert vit.__init__ is not own
    assert vit.__init__ is own and made == [model]
