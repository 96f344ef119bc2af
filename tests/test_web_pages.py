"""report.html of a run and `fastdeit explain --html`: self-contained, and a browser shows them."""

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastdeit import web_page
from fastdeit.commands.cli import main
from fastdeit.train.mistakes import confusion, thumbnail
from fastdeit.train.report import write_results
from fastdeit.train.report_page import PAGE, write_page
from fastdeit.train.reporting import write_curves

CPU = torch.device("cpu")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CLASSES = ("cat", "dog & co", "<b>owl</b>")


class Fixed(nn.Module):
    """Logits that are the image's first three values."""

    def forward(self, images):
        return images.flatten(1)[:, :3]


@pytest.fixture
def report_page(tmp_path, small_config) -> Path:
    """The page of a run of three epochs on six images, two of them mistakes."""
    images = torch.zeros(6, 1, 16, 16)
    for i, predicted in enumerate((0, 1, 2, 0, 1, 0)):
        images[i, 0, 0, predicted] = 2.0 + i
    batches = [(images[:4], torch.tensor([0, 1, 2, 1])), (images[4:], torch.tensor([1, 2]))]
    counts, mistakes = confusion(Fixed(), batches, 3, small_config, CPU)
    history = [
        dict(epoch=i, train_loss=1.0 - i / 4, val_loss=1.0, top1_both=50.0, images_per_second=100.0 + i, data_wait=0.1)
        for i in range(3)
    ]
    columns = {"last epoch": {"loss": 0.5, "class": 60.0, "distillation": 65.0, "softmax": 66.0, "both": 66.67}}
    pairs = {("ground truth", "teacher"): 0.1, ("ground truth", "class"): 0.25, ("teacher", "class"): 0.125}
    results = write_results(tmp_path, small_config.as_dict(), "CPU", columns, 90.0, pairs, [0.1, 0.9])
    write_curves(tmp_path / "curves.png", history, 90.0)
    write_page(tmp_path, small_config, results, history, CLASSES, counts, mistakes)
    return tmp_path / PAGE


def pictures(text: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:[^,]+,([^"]+)"', text)]


def test_confusion_counts_and_keeps_the_surest_mistakes(small_config):
    images = torch.zeros(3, 1, 16, 16)
    images[0, 0, 0, 1], images[1, 0, 0, 2], images[2, 0, 0, 0] = 1.0, 9.0, 3.0
    model = Fixed().train()
    counts, mistakes = confusion(model, [(images, torch.tensor([0, 0, 0]))], 3, small_config, CPU, keep=1)
    assert counts.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]] and model.training
    [surest] = mistakes
    assert (surest.position, surest.truth, surest.predicted) == (1, 0, 2)
    assert surest.confidence == pytest.approx(images[1].flatten()[:3].softmax(0).max().item())


def test_a_thumbnail_has_the_pixels_before_normalisation(small_config):
    levels = torch.arange(256, dtype=torch.float32).view(1, 16, 16) / 255
    config = small_config.replace(mean=[0.3], std=[0.35])
    with Image.open(io.BytesIO(thumbnail((levels - 0.3) / 0.35, config))) as image:
        assert list(image.tobytes()) == list(range(256)) and image.mode == "L"


def test_the_report_is_one_file_with_every_part(report_page):
    text = report_page.read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', text) and "<script" not in text
    assert len(pictures(text)) == 3 + 2  # curves, matrix and speed; a thumbnail a mistake
    assert "2 of 6 validation images" in text and "66.67" in text and "0.900" in text
    assert "&lt;b&gt;owl&lt;/b&gt;, taken for cat (100%)" in text and "dog &amp; co, taken for cat" in text
    assert text.index("owl") < text.index("dog &amp; co, taken")  # the surest first
    for title in ("Who disagrees with whom", "Confusion matrix", "Speed"):
        assert f"<h2>{title}</h2>" in text
    assert "Of both heads together. Each row has the shares" in text


def test_cells_are_escaped_and_marked_rows_shaded():
    text = web_page.table(["a", "b"], [["<", "1"], ["x", "2"]], good=[True, False])
    assert text.count("<tr") == 3 and '<tr class="good"><td>&lt;</td>' in text


def test_explain_writes_the_same_table(tmp_path, capsys):
    page = tmp_path / "explain.html"
    options = ["--device", "cpu", "--on-gpu", "--amp", "bfloat16", "--html", str(page)]
    assert main(["explain", "deit_tiny_distilled_patch16_224", *options]) == 0
    printed, text = capsys.readouterr().out, page.read_text()
    rows = printed.splitlines()[2:-1]
    assert (
        text.count("<tr") == len(rows) + 1 and text.count('class="good"') == sum("  fused" in row for row in rows) > 0
    )
    assert printed.splitlines()[-1] in text and 'src="' not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (on Debian: apt install chromium)")
def test_a_browser_shows_the_report(report_page, tmp_path):
    screenshot = tmp_path / "page.png"
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1100,2400",
        f"--user-data-dir={tmp_path}/b",
    )
    command = [CHROMIUM, *options, f"--screenshot={screenshot}", report_page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(screenshot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels.max(2) < 80).sum() > 2000, "no text"
    assert (pixels[..., 2] > pixels[..., 0] + 60).sum() > 2000, "no picture: the confusion matrix is blue"
