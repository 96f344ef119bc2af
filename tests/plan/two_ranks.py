"""Run by test_two_processes.py, once per rank of two, each with a fake device of its own: steps under DistributedDataParallel.

Gradients are zeros there, so each bucket is filled with the rank's number plus one before gloo sums it over the ranks.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastdeit.blocks import spans
from fastdeit.plan.planned import Plans
from fastdeit.plan.training import TrainingPlan
from fastdeit.testing import fake_cuda
from tests.plan.events import KINDS, precision
from tests.plan.models import build, images

# By step the batch of each rank. Where one rank alone has fewer images, as in an epoch's last step, it runs op by op and records
# while the other repeats its plan.
BATCHES = [(4, 4)] * 3 + [(4, 2)] * 2 + [(2, 4)] * 2 + [(2, 2)]


def launched():
    return sum(fake_cuda.counts()[kind] for kind in KINDS)


def main(rank: int, folder: Path) -> None:
    spans.MOST_REDUCED_GRADIENTS = 2 << 20
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    with fake_cuda.moved_data():
        steps = run(rank)
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps({"steps": steps, "errors": fake_cuda.errors()}))


def run(rank: int) -> list[dict]:
    """Of each step: plans recorded and repeated, the buckets' parameters, how far backward was when each reduction began, and the
    values of all gradients."""
    model = build(depth=6).train()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=2, gradient_as_bucket_view=True)
    seen, done = [], {"recorded": 0, "repeated": 0}
    count(Plans, "record_training", done, "recorded")
    count(TrainingPlan, "__call__", done, "repeated")
    place = {id(parameter): i for i, parameter in enumerate(model.parameters())}

    def reduce(_, bucket):
        seen.append((launched(), [place[id(parameter)] for parameter in bucket.parameters()]))
        own = torch.full(bucket.buffer().shape, rank + 1.0)
        bucket.buffer().copy_(own)
        reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return reduced.then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, reduce)
    steps = []
    for batches in BATCHES:
        x = images(model, batches[rank])
        wrapped.zero_grad(set_to_none=True)
        seen.clear()
        before = dict(done)
        with precision(torch.bfloat16):
            outputs = wrapped(x)
        loss = sum(output.sum() for output in outputs)
        start = launched()
        loss.backward()
        end = launched()
        values = [parameter.grad.cpu() for parameter in model.parameters()]
        steps.append(
            {kind: done[kind] - before[kind] for kind in done}
            | {
                "buckets": [parameters for _, parameters in seen],
                "begun": [(at - start) / (end - start) for at, _ in seen],
                "gradients": sorted({value for each in values for value in each.unique().tolist()}),
            }
        )
    return steps


def count(owner, name, done, kind):
    method = getattr(owner, name)

    def counted(*args):
        done[kind] += 1
        return method(*args)

    setattr(owner, name, counted)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
