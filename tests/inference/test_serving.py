"""The server of docs/serve.md, on the loopback interface."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import fastdeit
from tests.inference.conftest import SMALL, make_model

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
_SECONDS = 120  # for the server to start


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """What the server loads, beside the server's script; it sees images of different colours as different."""
    torch.manual_seed(0)
    made = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL).eval()
    with torch.no_grad():
        made.patch_embed.proj.weight.mul_(20)
        for head in (made.head, made.head_dist):
            head.weight.normal_()
    fast = fastdeit.optimize_for_inference(made, images="uint8")
    fast.save(tmp_path_factory.mktemp("serve") / "deit.safetensors")
    fast.folder = tmp_path_factory.getbasetemp() / "serve0"
    return fast


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def address(model):
    pytest.importorskip("litserve")
    (script,) = re.findall(r"^```python.*?\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    port = _free_port()
    assert script.count("port=8000") == script.count('accelerator="auto"') == 1
    script = script.replace("port=8000", f"port={port}").replace('accelerator="auto"', 'accelerator="cpu"')
    (model.folder / "serve.py").write_text(script)
    with (model.folder / "log").open("wb") as log:
        # The server's workers are processes of their own, which outlive it: all of them are one group.
        command = [sys.executable, "serve.py"]
        server = subprocess.Popen(command, cwd=model.folder, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, model.folder / "log")
        yield f"http://127.0.0.1:{port}/predict"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


def _wait_for(address, server, log):
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def _ask(address, image):
    data = io.BytesIO()
    image.save(data, "png")
    body = json.dumps({"image": base64.b64encode(data.getvalue()).decode()}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_answers_are_the_models_one_by_one_and_in_batches(model, address):
    torch.manual_seed(0)
    colours = torch.randint(0, 256, (12, 3)).tolist()
    images = [Image.new("RGB", (56, 40), tuple(colour)) for colour in colours]
    expected = model(torch.stack(list(map(model.image_transform(), images)))).float().softmax(-1)
    answers = [None] * len(images)

    def ask(index):
        answers[index] = _ask(address, images[index])

    ask(0)
    threads = [threading.Thread(target=ask, args=(index,)) for index in range(1, len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer, probabilities in zip(answers, expected, strict=True):
        # In a batch of another size a product on a CPU may sum in another order.
        assert answer["probability"] == pytest.approx(probabilities.max().item(), rel=0.05)
        assert probabilities[answer["class"]].item() == pytest.approx(probabilities.max().item(), rel=0.05)
    found = sorted(answer["probability"] for answer in answers)
    assert found[-1] > 1.2 * found[0]  # so that answers to others' images would be noticed


def test_what_is_no_image_is_an_error_and_the_server_goes_on(address):
    request = urllib.request.Request(address, b'{"image": "AAAA"}', {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=60)
    assert 0 <= _ask(address, Image.new("RGB", (33, 65), (250, 10, 10)))["class"] < 10


def test_a_model_that_does_not_know_its_images_says_so(model):
    fast = fastdeit.optimize_for_inference(make_model())
    fast.preprocessing = fast.preprocessing._replace(crop_pct=None)
    with pytest.raises(ValueError, match="model: does not say how images are resized and normalised"):
        fast.image_transform()
    assert model.image_transform()(Image.new("RGB", (50, 40))).dtype == torch.uint8
