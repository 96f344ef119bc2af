"""`fastdeit verify MODEL`: compares every accelerated layer with its library's, and on a GPU times both."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdeit.commands import explain as explain_command
from fastdeit.commands import named_model, precision_costs
from fastdeit.commands.explain import DTYPES
from fastdeit.inference.architecture import STREAM
from fastdeit.verification import KINDS, Layer, Pair, outputs_of, upstream_of, wanted_gradients

SECONDS_TO_SET_UP = 60.0  # of one candidate; the first call of a kernel compiles it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=named_model.HELP)
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights of that model, loaded as timm loads them"
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="number of classes of the checkpoint (default: the model's)"
    )
    parser.add_argument("--img-size", type=int, metavar="N", help="pixels per side (default: the model's)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images (default: 32 on a GPU, 2 elsewhere)")
    parser.add_argument("--device", help="device to use (default: cuda if there is one, else cpu)")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--amp", choices=("float16", "bfloat16"), help="dtype of autocast (default on a GPU: bfloat16)"
    )
    precision.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the parameters, without autocast (default on a CPU: float32)"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="modules that keep their library's implementation",
    )
    precision.add_argument(
        "--precision",
        choices=tuple(STREAM),
        help="report the error of optimize_for_inference in this precision, instead of comparing accelerated layers",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="with --precision: images to calibrate with and to report on, at most 512 (default: random, not representative)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 if a layer does not keep the contract.

    Raises:
        ValueError: an argument that does not fit, or too little memory.
    """
    device = explain_command.device(args.device)
    if args.precision is not None:
        return precision_costs.run(args, _model(args).to(device).eval())
    if args.images is not None:
        raise ValueError("--images: is for --precision, which was not given")
    amp = args.amp or ("bfloat16" if device.type == "cuda" and args.dtype is None else None)
    batch = (32 if device.type == "cuda" else 2) if args.batch_size is None else args.batch_size
    for option, value in (("batch-size", batch), ("img-size", args.img_size), ("num-classes", args.num_classes)):
        if value is not None and value < 1:
            raise ValueError(f"--{option}: expected a positive number, got {value}")
    torch.manual_seed(0)
    model = _model(args).to(device, DTYPES[args.dtype or "float32"]).eval()
    side = args.img_size or named_model.image_side(model)
    images = torch.randn(batch, 3, side, side).to(device, DTYPES[args.dtype or "float32"])
    setting = f"{args.model}, {batch} images of {side} pixels on {_described(device)}, " + (
        f"autocast to {amp}" if amp else args.dtype or "float32"
    )
    try:
        pair = Pair(model, images, DTYPES[amp] if amp else None, args.exclude)
        layers = pair.verify()
        if not args.json:  # the verdict first: times take longer
            print(as_text(setting, layers, _owner(args.model)), flush=True)
        timings = timed(pair) if device.type == "cuda" else []
    except torch.OutOfMemoryError:
        raise ValueError(f"--batch-size: {batch} images do not fit into the memory of {device}") from None
    if args.json:
        print(json.dumps(as_dict(setting, layers, timings), indent=2))
    elif timings:
        print("\n" + times_as_text(timings, _owner(args.model)))
    return int(any(layer.failure for layer in layers))


def _owner(name: str) -> str:
    """The name of the library whose implementation the model is compared with."""
    return "stock" if named_model.is_path(name) else "timm"


def _model(args: argparse.Namespace) -> nn.Module:
    from timm.models import load_checkpoint

    if named_model.is_path(args.model):
        for option, value in (("checkpoint", args.checkpoint), ("num-classes", args.num_classes)):
            if value is not None:
                raise ValueError(f"--{option}: for timm's models; let {args.model} return the model as you want it")
        return named_model.make(args.model)
    explain_command.check_model_name(args.model)
    options = {"num_classes": args.num_classes, "img_size": args.img_size}
    model = named_model.make(args.model, **{name: value for name, value in options.items() if value is not None})
    if args.checkpoint is not None:
        if not args.checkpoint.is_file():
            raise ValueError(f"--checkpoint: there is no file {str(args.checkpoint)!r}")
        try:
            load_checkpoint(model, str(args.checkpoint))
        except RuntimeError as error:  # what load_state_dict says of keys and shapes
            raise ValueError(f"--checkpoint: {args.checkpoint} does not fit {args.model}: {error}") from None
        except Exception as error:  # what is raised depends on the format and on where the file ends
            raise ValueError(f"--checkpoint: {args.checkpoint} cannot be read: {error!r}") from error
    return model


def _described(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def timed(pair: Pair) -> list[dict[str, Any]]:
    """The whole model and the first module of each kind, inference and training, by the method of `fastdeit bench`.

    Training is forward and backward, without an optimizer.
    """
    from fastdeit.benchmarks.timing import measure

    first = {row.kind: row for row in reversed(pair.rows) if row.fused and row.name in pair.calls}
    found = []
    for row in sorted(first.values(), key=pair.rows.index):
        for work in ("inference", "training"):
            candidates = {
                "timm": _work(pair, pair.timms.get_submodule(row.name), row.name, work),
                "fastdeit": _work(pair, pair.accelerated.get_submodule(row.name), row.name, work),
            }
            call = pair.calls[row.name]
            rows = measure(candidates, lambda call=call: _copied(call.args), candidate_seconds=SECONDS_TO_SET_UP)
            timing: dict[str, Any] = {"name": row.name, "kind": row.kind, "work": work}
            for result in rows:
                timing[result.candidate] = {
                    "status": result.status,
                    "us": result.median_us,
                    "peak_mib": result.peak_mib,
                    "launches": result.launches,
                    "timed_by": result.timed_by,
                }
            found.append(timing)
    return found


def _copied(args: tuple) -> tuple:
    return tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)


def _work(pair: Pair, module: nn.Module, name: str, work: str):
    kwargs = pair.calls[name].kwargs
    upstream: list[Tensor] = []

    def inference(*args):
        with torch.no_grad(), pair.autocast():
            return outputs_of(module(*args, **kwargs))

    def training(*args):
        if name:  # images require no gradient
            args = tuple(a.detach().requires_grad_() if _is_float(a) else a for a in args)
        with torch.enable_grad(), pair.autocast():
            outputs = outputs_of(module(*args, **kwargs))
        if not upstream:  # made at the first call, before a graph is captured
            upstream.extend(upstream_of(output, index) for index, output in enumerate(outputs))
        wanted = list(wanted_gradients(module, args).values())
        return torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)

    return inference if work == "inference" else training


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def as_dict(setting: str, layers: list[Layer], timings: list[dict[str, Any]]) -> dict[str, Any]:
    """All that was found, for JSON: errors are relative to the largest value of a tensor."""
    found = []
    for layer in layers:
        errors = {
            kind: {
                which: {"fastdeit": error.fused, "timm": error.eager, "allowed": error.limit}
                for which, error in zip(("max", "rms"), both, strict=True)
            }
            for kind, both in layer.errors.items()
        }
        row = layer.row
        found.append({**row._asdict(), "errors": errors, "holds": not layer.failure, "failure": layer.failure})
    holds = not any(layer.failure for layer in layers)
    return {"setting": setting, "holds": holds, "layers": found, "timings": timings}


def as_text(setting: str, layers: list[Layer], owner: str = "timm") -> str:
    """A table of errors, and what they come to. owner: whose implementation the fused one is compared with."""
    whose = "timm's" if owner == "timm" else owner
    heads = [f"{kind}{which}" for kind in KINDS for which in ("", f", {whose}")]
    lines = [("module", "kind", "runs", *heads, "of allowed", "contract")]
    for layer in layers:
        row = layer.row
        errors = [
            f"{error:.1e}"
            for kind in KINDS
            for error in (layer.errors[kind][0][:2] if kind in layer.errors else (float("nan"),) * 2)
        ]
        verdict = "FAILS" if layer.failure else "holds"
        runs = "fused" if row.fused else whose
        lines.append((row.name or "(the model)", row.kind, runs, *errors, f"{layer.share_of_limit:.0%}", verdict))
    parts = [setting, "Largest errors against float64, over the largest value of each tensor:", "", _table(lines)]
    failed = [layer for layer in layers if layer.failure]
    parts += [""] + [f"{layer.row.name or '(the model)'}: {layer.failure}" for layer in failed]
    fused = [layer.row for layer in layers if layer.row.fused]
    if not fused:
        reasons = sorted({layer.row.reason.split(": ")[-1] for layer in layers})
        parts.append(
            f"Nothing runs fused here ({'; '.join(reasons)}): every layer is {whose} code, "
            f"so this compares {owner} with itself, and there is nothing to time. On an NVIDIA GPU the kernels are checked."
        )
    if failed:
        parts.append(f"The contract FAILS in {len(failed)} of {len(layers)} modules.")
    else:
        parts.append(f"The contract holds in all {len(layers)} modules, {len(fused)} of which run fused.")
    return "\n".join(parts)


def times_as_text(timings: list[dict[str, Any]], owner: str = "timm") -> str:
    """A table of times, memory and launches."""
    heads = ("module", "work", f"{owner} us", "fastdeit us", "speed-up", f"{owner} MiB", "fastdeit MiB", "launches")
    return _table([heads, *(_timing_line(timing) for timing in timings)])


def _timing_line(timing: dict[str, Any]) -> tuple[str, ...]:
    both = timing["timm"], timing["fastdeit"]
    name = timing["name"] or "(the model)"
    missing = [f"{who}: {timing[who]['status']}" for who in ("timm", "fastdeit") if not timing[who]["us"]]
    if missing:
        return (name, timing["work"], "; ".join(missing), *[""] * 5)
    times = [result["us"] for result in both]
    memory = ["" if result["peak_mib"] is None else f"{result['peak_mib']:.1f}" for result in both]
    launches = " / ".join(str(result["launches"] or "?") for result in both)
    speed_up = f"{times[0] / times[1]:.2f}"
    return (name, timing["work"], *(f"{us:.1f}" for us in times), speed_up, *memory, launches)


def _table(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines = [lines[0], tuple("-" * width for width in widths), *lines[1:]]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
