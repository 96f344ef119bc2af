"""`fastdeit explain MODEL`: what of a timm model runs fused, and why the rest does not."""

import argparse
import contextlib
import json

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a timm model name, such as deit_tiny_distilled_patch16_224")
    parser.add_argument("--device", help="where it would run (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the parameters (default: %(default)s)"
    )
    parser.add_argument("--amp", choices=("float16", "bfloat16"), help="explain what runs under autocast to this dtype")
    parser.add_argument("--train", action="store_true", help="explain training mode rather than evaluation")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave these modules timm's")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="add launches and memory traffic of a forward pass of N images"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    import timm

    from fastdeit.patching import accelerate, explain

    if not timm.is_model(args.model):
        raise ValueError(f"MODEL: timm has no model named {args.model!r}{_suggestion(timm, args.model)}")
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device: expected a device such as cpu, cuda or cuda:1, got {args.device!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {args.device} was given, but PyTorch sees no CUDA device")
    model = timm.create_model(args.model).train(args.train).to(device, DTYPES[args.dtype])
    accelerate(model, exclude=args.exclude)
    with torch.autocast(device.type, DTYPES[args.amp]) if args.amp else contextlib.nullcontext():
        report = explain(model, batch_size=args.batch_size)
    print(json.dumps(report.as_dict(), indent=2) if args.json else report)
    return 0


def _suggestion(timm, name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f"; close to it: {', '.join(close)}" if close else ""
