"""Run by test_distributed.py, once per rank of two: every check_* below in order, over gloo on the CPU, kernels interpreted."""

import copy
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastdeit
from fastdeit import backends, testing


def accelerated(depth=1, **options):
    """The same model on both ranks."""
    torch.manual_seed(0)
    sizes = dict(img_size=32, embed_dim=64, num_heads=2, depth=depth, num_classes=5, init_values=0.3)
    model = timm.create_model("deit_tiny_distilled_patch16_224", **sizes, **options)
    return fastdeit.accelerate(model)


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def own(x):
    """This rank's half of the batch."""
    return x.chunk(2)[dist.get_rank()]


def gradients(model):
    return {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in model.named_parameters()
    }


def of_one_process(model, x):
    """The mean over both halves, summed as accumulating sums them; the factor 1/2 is exact."""
    model = copy.deepcopy(model)
    for half in x.chunk(2):
        (model(half).sum() / 2).backward()
    return gradients(model)


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), f"{name}: off by {(got[name] - gradient).abs().max():.3e}"


def check_ddp_gives_the_gradients_of_one_process():
    model, x = accelerated(), images()
    expected = of_one_process(model, x)
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        wrapped = DistributedDataParallel(copy.deepcopy(model), **options)
        wrapped(own(x)).sum().backward()
        assert_same_bits(gradients(wrapped.module), expected)
        assert not why_not_fused(wrapped.module)


def check_ddp_accumulates_without_synchronising():
    model, x = accelerated(), images(4)
    wrapped = DistributedDataParallel(model)
    quarters = x.chunk(4)
    first, second = quarters[dist.get_rank()], quarters[2 + dist.get_rank()]
    expected = copy.deepcopy(model)
    for part in quarters[0], quarters[2]:
        (expected(part).sum() / 2).backward()
    other = copy.deepcopy(model)
    for part in quarters[1], quarters[3]:
        (other(part).sum() / 2).backward()
    with wrapped.no_sync():
        wrapped(first).sum().backward()
    wrapped(second).sum().backward()
    ranks = zip(gradients(expected).items(), gradients(other).values(), strict=True)
    assert_same_bits(gradients(model), {name: a + b for (name, a), b in ranks})


def check_ddp_replicas_stay_equal_while_drop_path_differs():
    model = accelerated(drop_path_rate=0.3).train()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-2)
    torch.manual_seed(dist.get_rank())
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(own(images())).sum().backward()
        optimizer.step()
    for parameter in model.parameters():
        both = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(both, parameter.detach())
        assert torch.equal(*both)


def sharded():
    model = accelerated(depth=2)
    plain = copy.deepcopy(model)
    plain.blocks.register_forward_hook(lambda *_: None)  # block by block, as a model of sharded blocks runs
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh), plain


def check_sharded_blocks_give_the_gradients_of_one_process():
    model, plain = sharded()
    x = images()
    expected = of_one_process(plain, x)
    out = model(own(x))
    assert torch.equal(out, plain(own(x)))
    out.sum().backward()
    assert_same_bits(gradients(model), expected)


def why_not_fused(model):
    rows = fastdeit.explain(model).as_dict().items()
    return {name: row["reason"] for name, row in rows if not row["fused"] and "no fused class" not in row["reason"]}


def check_explain_says_that_sharded_blocks_run_one_by_one():
    model, _ = sharded()
    before = list(model.parameters())
    assert why_not_fused(model) == {"": "block 0 is a FSDPBlock"}
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def check_a_sharded_model_is_not_swapped():
    model, _ = sharded()
    for function in (fastdeit.accelerate, fastdeit.restore):
        with pytest.raises(RuntimeError, match=r"at run time \(fully_shard and parametrize do that\)"):
            function(model)


def main(rank: int, folder: Path) -> None:
    backends.set_backend("triton")
    testing.cache_interpreter_builtins()
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    outcomes = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                outcomes[name] = check()
            except Exception:
                outcomes[name] = traceback.format_exc()
            (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
