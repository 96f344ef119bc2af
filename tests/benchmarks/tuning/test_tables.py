"""The tables that tuning prints: what is chosen, and that what is printed is what the kernels then look up."""

import itertools

import pytest
import torch

from fastdeit.benchmarks.tuning import cases as tuning_cases
from fastdeit.benchmarks.tuning import tables as tuning_tables
from fastdeit.kernels.attention.config import Shapes
from fastdeit.kernels.gemm import config as gemm_config
from fastdeit.kernels.gemm import fused_mlp
from fastdeit.kernels.gemm.config import CUBLAS, Gemm, Measured, Tile, around, select_gemm
from fastdeit.kernels.norm import layer_norm


def result(tokens=197, group="g", **microseconds) -> dict:
    """A finished case; keywords are parts, with the time of each configuration."""
    rows = [
        dict(part=part.replace("_", " "), config=config, median_us=time, present=False)
        for part, times in microseconds.items()
        for config, time in times.items()
    ]
    return dict(case="c", group=group, tokens=tokens, call={}, rows=rows)


def test_the_layer_norm_table_is_what_is_looked_up(monkeypatch):
    wanted = layer_norm.Config(num_warps=2, backward_programs_per_sm=7)
    text = tuning_tables.table("layer_norm", [result(group="768", config={repr(wanted): 1.0, "Config(1, 1)": 2.0})])
    configs = eval(text.split("CONFIGS = ")[1], {"Config": layer_norm.Config})
    before = layer_norm.select_config(768, 90)
    monkeypatch.setattr(layer_norm, "CONFIGS", configs)
    layer_norm.select_config.cache_clear()
    found = [layer_norm.select_config(768, 90), layer_norm.select_config(768, 80)]
    layer_norm.select_config.cache_clear()
    assert found == [wanted, before]


def test_a_group_shares_the_choice_with_the_least_geometric_mean():
    results = [result(config={"a": 1.0, "b": 2.0, "c": 0.1}), result(config={"a": 9.0, "b": 4.0})]
    assert tuning_tables.choices(results) == {"g": {"config": "b"}}  # c did not run everywhere


def test_one_kernel_backward_up_to_the_first_length_where_two_are_faster():
    two = dict(dq_pointers={"x": 10.0, "y": 9.0}, dkv_pointers={"x": 10.0, "y": 8.0})  # 7 together
    faster, slower = dict(whole={"w": 6.5}), dict(whole={"w": 7.5})
    results = [
        result(256, **two, **faster),
        result(197, **two, **slower),
        result(50, **two, **faster),
        result(577, **two),
    ]
    assert tuning_tables.one_program_tokens(results) == 50


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
    for direction, (ours, baseline) in (("backward", backward), ("forward", forward)):
        case = result(config={"a": ours, "b": ours + 1}) | dict(case=f"attention {direction}")
        case["rows"].append(dict(part="baseline", candidate="SDPA flash", median_us=baseline))
        cases.append(case | dict(call=dict(head_dim=64, tokens=197, batch_heads=12)))
    shapes = tuple(Shapes(64, range(193, 209), range(6, 24), each) for each in gradients)
    printed = str(tuning_tables.hand_overs(cases))
    assert eval(printed, {"Shapes": Shapes}) == ({90: shapes} if shapes else {})


OURS = Gemm("tma", Tile(128, 128))
WIDE = Gemm("triton", Tile(64, 128, num_warps=8))


def gemm_result(M, *, epilogue="activation", cases=1, **microseconds) -> dict:
    """A product's case: each kernel's first quartile, median and third quartile."""
    kernels = dict(library=CUBLAS, ours=OURS, wide=WIDE)
    rows = [
        dict(part="gemm", config=repr(kernels[name]), first_quartile_us=q1, median_us=q2, third_quartile_us=q3)
        for name, (q1, q2, q3) in microseconds.items()
    ]
    call = dict(M=M, N=3072, K=768, dtype="torch.bfloat16", epilogue=epilogue, cases=cases)
    return dict(case="c", group="g", tokens=198, call=call, rows=rows)


def put_in(text: str, monkeypatch) -> dict:
    """The table as if it had been copied into the file."""
    namespace = dict(vars(gemm_config))
    exec(text, namespace)
    monkeypatch.setattr(gemm_config, "GEMMS", namespace["GEMMS"])
    gemm_config._select.cache_clear()
    return namespace["GEMMS"]


@pytest.fixture(autouse=True)
def _forget_choices():
    yield
    gemm_config._select.cache_clear()


LIBRARY = (9.0, 10.0, 11.0)


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        (dict(ours=(7.0, 8.0, 8.9)), OURS),
        (dict(ours=(7.0, 8.0, 9.1)), CUBLAS),  # within noise
        (dict(ours=(7.0, 8.0, 8.9), wide=(6.0, 7.0, 8.0)), WIDE),
        (dict(ours=(12.0, 13.0, 14.0)), CUBLAS),
    ],
)
def test_the_gemm_table_names_what_was_faster_beyond_noise(times, winner, monkeypatch):
    put_in(tuning_tables.table("mlp", [gemm_result(50688, library=LIBRARY, **times)]), monkeypatch)
    assert select_gemm(50688, 3072, 768, torch.bfloat16, "activation", 90) == winner
    for other in (dict(M=around(50688).stop), dict(dtype=torch.float16), dict(epilogue="derivative"), dict(arch=80)):
        call = dict(M=50688, N=3072, K=768, dtype=torch.bfloat16, epilogue="activation", arch=90) | other
        assert select_gemm(**call) is CUBLAS


def test_a_product_is_ours_only_where_every_stream_gains():
    faster, slower = dict(ours=(1.0, 2.0, 3.0)), dict(ours=(10.0, 12.0, 13.0))
    group = [gemm_result(198, epilogue="residual", cases=2, library=LIBRARY, **each) for each in (faster, slower)]
    assert tuning_tables.faster_than(CUBLAS, group[:1]) == repr(OURS)
    assert tuning_tables.faster_than(CUBLAS, group) is None
    assert "Measured(" not in tuning_tables.table("mlp", group[:1]).split("GEMMS:")[1].split("= {")[1]  # one is missing


def test_neighbouring_ranges_become_one_and_what_was_not_measured_now_stays(monkeypatch):
    far = Measured(range(10, 20), 192, 192, torch.float16, "residual", WIDE)
    before = Measured(range(50, 405504), 3072, 768, torch.bfloat16, "activation", WIDE)
    monkeypatch.setattr(gemm_config, "GEMMS", {80: (far,), 90: (before,)})
    faster = dict(library=LIBRARY, ours=(1.0, 2.0, 3.0))
    results = [gemm_result(50688, **faster), gemm_result(12672, **faster), gemm_result(198, library=LIBRARY)]
    tables = put_in(tuning_tables.table("mlp", results), monkeypatch)
    assert tables[80] == (far,)
    assert [(entry.rows, entry.gemm) for entry in tables[90]] == [
        (range(50, 99), WIDE),
        (range(396, 6336), WIDE),
        (range(6336, 101376), OURS),
        (range(101376, 405504), WIDE),
    ]


@pytest.mark.parametrize(("third_quartile", "ours"), [(8.9, True), (9.1, False)])
def test_the_whole_mlp_table_names_what_was_faster_beyond_noise(third_quartile, ours, monkeypatch):
    config = fused_mlp.candidates(90)[0]
    far = fused_mlp.Measured(range(10, 20), 768, torch.float16, "mlp", config)
    monkeypatch.setattr(fused_mlp, "FUSED_MLPS", {80: (far,)})
    rows = [
        dict(part="whole", config=repr(c), first_quartile_us=q1, median_us=q2, third_quartile_us=q3)
        for c, (q1, q2, q3) in ((None, LIBRARY), (config, (7.0, 8.0, third_quartile)))
    ]
    call = dict(M=50688, hidden=768, dtype="torch.bfloat16", form="mlp", cases=1)
    text = tuning_tables.table("mlp", [dict(case="c", group="g", tokens=198, call=call, rows=rows)])
    namespace = dict(vars(fused_mlp))
    exec(text.split("# kernels/gemm/fused_mlp.py")[1], namespace)
    entry = fused_mlp.Measured(around(50688), 768, torch.bfloat16, "mlp", config)
    assert namespace["FUSED_MLPS"] == {80: (far,)} | ({90: (entry,)} if ours else {})


def test_the_batches_that_are_tuned_speak_for_every_number_of_rows_between():
    ranges = sorted((around(198 * batch) for batch in tuning_cases.GEMM_BATCHES), key=lambda rows: rows.start)
    assert all(first.stop == second.start for first, second in itertools.pairwise(ranges))
    assert ranges[0].start <= 197 and ranges[-1].stop > 1024 * 198
