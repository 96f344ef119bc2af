"""`fastdeit tune`: without a GPU the whole flow runs on tiny shapes, with kernels interpreted."""

import json

import pytest
import torch

from fastdeit import cli
from fastdeit.benchmarks import timing, tune, tuning_cases
from fastdeit.kernels import layer_norm, mlp
from fastdeit.kernels.attention_config import Shapes, Tiles
from fastdeit.kernels.mlp import Config


def toy(op, folder, *more) -> int:
    return cli.main(["tune", op, "--toy", "--out", str(folder), *more])


def table(out: str, header: str) -> list[str]:
    lines = out.split(header)[1].splitlines()[1:]
    return [line for line in lines[: lines.index("")] if not line.startswith("#")]


def result(tokens=197, group="g", **microseconds) -> dict:
    """A finished case; keywords are parts, with the time of each configuration."""
    rows = [
        dict(part=part.replace("_", " "), config=config, median_us=time, present=False)
        for part, times in microseconds.items()
        for config, time in times.items()
    ]
    return dict(case="c", group=group, tokens=tokens, rows=rows)


def test_finished_cases_are_not_measured_again(tmp_path, capsys, monkeypatch):
    assert toy("mlp", tmp_path) == 0
    first = capsys.readouterr().out
    (line,) = table(first, "# mlp.py, select_config")
    assert isinstance(eval(line.removeprefix("return "), {"Config": Config}), Config)

    file = tmp_path / "tune_mlp.jsonl"
    whole = file.read_text()
    rows = json.loads(whole.splitlines()[0])["rows"]
    assert all(row["status"] == "ok" and row["median_us"] > 0 for row in rows) and len(rows) >= 2
    file.write_text(whole + '{"case": "stopped in')
    monkeypatch.setattr(timing, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert toy("mlp", tmp_path) == 0
    assert capsys.readouterr().out == first
    assert file.read_text() == whole


def test_the_layer_norm_table_is_what_is_looked_up(monkeypatch):
    wanted = layer_norm.Config(num_warps=2, backward_programs_per_sm=7)
    text = tune._table("layer_norm", [result(group="768", config={repr(wanted): 1.0, "Config(1, 1)": 2.0})])
    configs = eval(text.split("CONFIGS = ")[1], {"Config": layer_norm.Config})
    before = layer_norm.select_config(768, 90)
    monkeypatch.setattr(layer_norm, "CONFIGS", configs)
    layer_norm.select_config.cache_clear()
    found = [layer_norm.select_config(768, 90), layer_norm.select_config(768, 80)]
    layer_norm.select_config.cache_clear()
    assert found == [wanted, before]


def test_another_environment_is_measured_anew(tmp_path, capsys, monkeypatch):
    case = next(tuning_cases.cases("mlp", True))
    monkeypatch.setattr(tuning_cases, "cases", lambda *_: [case])
    assert toy("mlp", tmp_path) == 0
    environment = timing.environment()
    monkeypatch.setattr(timing, "environment", lambda: environment | {"gpu": "another"})
    assert toy("mlp", tmp_path) == 0
    assert len((tmp_path / "tune_mlp.jsonl").read_text().splitlines()) == 2


def test_attention_is_tuned_in_every_form(tmp_path, capsys):
    assert toy("attention", tmp_path) == 0
    handed_over, whole, *tiles, keys = table(capsys.readouterr().out, "# attention_config.py")
    assert eval(handed_over.removeprefix("HANDED_OVER = ")) == {}  # nothing to compare with at toy size
    assert set(eval(whole.removeprefix("WHOLE_BACKWARD_TOKENS = "))) == {90, 100}
    for line in tiles:
        entries = eval(line.removeprefix("return "), {"Tiles": Tiles})
        assert len(entries) == 3 and all(isinstance(entry, Tiles) for entry in entries)
    assert len(tiles) == 2 and isinstance(eval(keys.removeprefix("return "), {"Tiles": Tiles}), Tiles)
    _, backward = map(json.loads, (tmp_path / "tune_attention.jsonl").read_text().splitlines())
    parts = {row["part"] for row in backward["rows"]}
    assert parts == {"whole", *(f"{entry} {form}" for entry in ("dq", "dkv") for form in ("pointers", "descriptors"))}


def test_time_that_is_over_leaves_the_cases_for_later(tmp_path, capsys):
    assert toy("all", tmp_path, "--seconds", "1e-9") == 0
    out = capsys.readouterr().out
    assert "6 cases are left: the same command goes on with them" in out
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_candidate_is_not_timed(monkeypatch):
    right = mlp.activation_forward
    monkeypatch.setattr(mlp, "activation_forward", lambda z, a, c: right(z, a, c) * (1.1 if c.num_warps == 1 else 1.0))
    rows = tune._measure(next(tuning_cases.cases("mlp", True)), float("inf"), toy=True)
    status = {"num_warps=1)" in row["config"]: row for row in rows}
    assert status[False]["status"] == "ok"
    assert status[True]["status"].startswith("wrong: result 0") and status[True]["median_us"] is None


@pytest.mark.parametrize("op", tune.OPS)
def test_the_present_choice_is_among_the_candidates_of_every_shape(op):
    cases = list(tuning_cases.cases(op, toy=False))
    assert len(cases) >= 3
    for case in cases:
        labels = [candidate.label for candidate in case.candidates]
        assert len(set(labels)) == len(labels) >= 10
        present = [candidate.part for candidate in case.candidates if candidate.present]
        assert len(present) == (2 if "backward" in case.name else 1)  # dq and dkv are entries of their own


def test_a_group_shares_the_choice_with_the_least_geometric_mean():
    results = [result(config={"a": 1.0, "b": 2.0, "c": 0.1}), result(config={"a": 9.0, "b": 4.0})]
    assert tune._choices(results) == {"g": {"config": "b"}}  # c did not run everywhere


def test_one_kernel_backward_up_to_the_first_length_where_two_are_faster():
    two = dict(dq_pointers={"x": 10.0, "y": 9.0}, dkv_pointers={"x": 10.0, "y": 8.0})  # 7 together
    faster, slower = dict(whole={"w": 6.5}), dict(whole={"w": 7.5})
    results = [
        result(256, **two, **faster),
        result(197, **two, **slower),
        result(50, **two, **faster),
        result(577, **two),
    ]
    assert tune._whole_tokens(results) == 50


def test_a_faster_peer_asks_for_a_hand_over():
    case = result(config={"a": 3.0, "b": 2.0})
    for row in case["rows"]:
        row |= dict(candidate=row["config"], status="ok", present=row["config"] == "a")
    case["rows"].append(dict(part="peer", candidate="SDPA flash", median_us=1.0))
    assert "0.67x the present choice's time, 2.00x SDPA flash's: hand over" in tune._summary(case)


@pytest.mark.parametrize(
    "forward, backward, gradients",
    [
        ((2.0, 3.0), (5.0, 6.0), []),
        ((3.0, 2.0), (5.0, 7.0), [False]),
        ((2.0, 3.0), (8.0, 6.0), [True]),
        ((3.0, 2.0), (8.0, 6.0), [False, True]),
    ],
)
def test_the_table_hands_over_what_a_peer_does_faster(forward, backward, gradients):
    cases = []
    for direction, (ours, peer) in (("backward", backward), ("forward", forward)):
        case = result(config={"a": ours, "b": ours + 1}) | dict(case=f"attention {direction}")
        case["rows"].append(dict(part="peer", candidate="SDPA flash", median_us=peer))
        cases.append(case | dict(call=dict(head_dim=64, tokens=197, batch_heads=12)))
    shapes = tuple(Shapes(64, range(193, 209), range(6, 24), each) for each in gradients)
    printed = str(tune._hand_overs(cases))
    assert eval(printed, {"Shapes": Shapes}) == ({90: shapes} if shapes else {})


def test_without_a_gpu_it_says_what_it_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "mlp", "--out", str(tmp_path)]) == 2
    assert "tuning needs a CUDA device; --toy" in capsys.readouterr().err


def test_bad_arguments_are_named(tmp_path, capsys):
    assert toy("mlp", tmp_path, "--seconds", "0") == 2
    assert "--seconds: expected a positive number, got 0.0" in capsys.readouterr().err
    (tmp_path / "tune_mlp.jsonl").write_text("[]\n")
    assert toy("mlp", tmp_path) == 2
    assert "tune_mlp.jsonl: expected what fastdeit tune wrote" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["tune", "softmax"])
    assert "softmax" in capsys.readouterr().err
