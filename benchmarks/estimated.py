"""What kernels take on the GPU at hand beside what `fastdeit kernels` estimates: `python -m fastdeit.benchmarks.estimated`.

DeiT-S and DeiT-B, 256 images, inference and a training step, under autocast and in bf16; of each kernel's launches the median. A
kernel far off its estimate says which constant of docs/instruction-stream.md is wrong, or what the model leaves out.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastdeit.aot import catalog, report, workloads
from fastdeit.aot.devices import DEVICES
from fastdeit.benchmarks.full_model import Model
from fastdeit.benchmarks.profile_step import kernel_times
from fastdeit.benchmarks.report.roofline_table import table

NAMES = {"S": "deit_small_distilled_patch16_224", "B": "deit_base_distilled_patch16_224"}
PRECISIONS = ("autocast", "bf16")
Times = Mapping[tuple[str, str, str], float]  # (model, precision, kernel) -> microseconds of a launch


def measured(models: tuple[str, ...], device: torch.device, toy: bool = False) -> dict[tuple[str, str, str], float]:
    """The median time of each kernel's launches; on a CPU of each operation's."""
    found = {}
    for name in models:
        for precision in PRECISIONS:
            batch = 2 if toy else workloads.BATCH
            model = Model(NAMES[name], batch, device, toy, bf16=precision == "bf16")
            times: dict[str, list[float]] = {}
            for call in (model.infer, model.train):
                for kernel, microseconds in kernel_times(call, device):
                    times.setdefault(kernel, []).append(microseconds)
            found |= {(name, precision, kernel): statistics.median(each) for kernel, each in times.items()}
    return found


def compared(times: Times, arch: int) -> Iterator[dict[str, Any]]:
    """A row for each kernel that runs by default in DeiT-S and DeiT-B, `measured` being None where it was not launched.

    Configurations that were not put on record with the Triton at hand are compiled.
    """
    known = report.read_committed()
    for entry in report.entries((arch,)):
        launches = workloads.launches_of(entry.row, arch)
        if not launches:
            continue
        resources = known.get(catalog.row_key(entry.row, arch)) or catalog.compile_config(entry.row, arch)
        estimates = workloads.estimates(entry.row, arch, resources)
        kernel = entry.row.kernel.__name__
        # Of a LayerNorm's configurations the label says under which precision it is launched; the other kernels have one.
        precision = "bf16" if kernel.startswith("layer_norm") and entry.row.label.endswith(" bf16") else "autocast"
        for launch in launches:
            expected, took = estimates[launch.model], times.get((launch.model, precision, kernel))
            yield {
                "kernel": kernel,
                "DeiT": launch.model,
                "precision": precision,
                "bound": expected.bound,
                "estimated, µs": expected.microseconds,
                "measured, µs": "-" if took is None else took,
                "measured / estimated": "-" if took is None else took / expected.microseconds,
                "floor / measured, %": "-" if took is None else 100 * expected.floor / took,
            }


def main(arguments: list[str] | None = None) -> int:
    """Prints the table. 2 where there is no GPU and --toy was not asked for."""
    parser = argparse.ArgumentParser(prog="fastdeit.benchmarks.estimated", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--toy", action="store_true", help="a tiny model on the CPU, estimates of sm_90: shows that it runs"
    )
    toy = parser.parse_args(arguments).toy
    if not toy and not torch.cuda.is_available():
        print("estimated: a measurement needs a CUDA device; --toy shows on a CPU that it runs", file=sys.stderr)
        return 2
    arch = 90 if toy else int("{}{}".format(*torch.cuda.get_device_capability()))
    if arch not in DEVICES:
        print(f"no device stands for sm_{arch} in the estimates; there are {', '.join(f'sm_{a}' for a in DEVICES)}")
        return 0
    times = measured(("S",) if toy else workloads.MODELS, torch.device("cpu" if toy else "cuda"), toy)
    print(f"Estimated for {DEVICES[arch].name}, {workloads.BATCH} images of 224 pixels.\n")
    print(table([*compared(times, arch)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
