"""`fastdeit shrink-data`: a folder of smaller JPEG files, made once, that later epochs decode faster."""

import argparse
import os
import sys
from pathlib import Path

from fastdeit.train.extras import check_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="the images: SRC/train/CLASS/ and SRC/val/CLASS/")
    parser.add_argument("target", metavar="DST", help="folder to write; the same command continues an interrupted run")
    parser.add_argument(
        "--short-side",
        type=int,
        default=256,
        metavar="N",
        help="shorter side in pixels; smaller images are copied (default: 256)",
    )
    parser.add_argument("--quality", type=int, default=90, metavar="N", help="JPEG quality, 1 to 100 (default: 90)")
    parser.add_argument("--val", action="store_true", help="shrink validation images too; by default they are copied")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="images processed at the same time (default: number of cores)"
    )
    parser.add_argument(
        "--max-image-megapixels", type=float, metavar="N", help="a larger image counts as unreadable (default: 500)"
    )


def run(args: argparse.Namespace) -> int:
    check_extras()
    from tqdm import tqdm

    from fastdeit.train.image_files import MAX_MEGAPIXELS
    from fastdeit.train.shrinking import Shrinking, shrink
    from fastdeit.train.signals import Stopped, StopRequest

    threads = len(os.sched_getaffinity(0)) if args.threads is None else args.threads
    if threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {threads}")
    limit = MAX_MEGAPIXELS if args.max_image_megapixels is None else args.max_image_megapixels
    options = Shrinking(args.short_side, args.quality, args.val, limit)
    source, target = Path(args.source), Path(args.target)
    with StopRequest().listening() as stop, tqdm(desc="images", unit="image", disable=None) as bar:
        steps = shrink(source, target, options, threads)
        for report in steps:  # which has images: an empty class is an error
            bar.total = report.total
            bar.update(report.done - bar.n)
            if stop.number is not None:
                steps.close()
                stopped = Stopped(stop.number, f"{target} has {report.done} images; the same command goes on")
                print(f"fastdeit shrink-data: {stopped}", file=sys.stderr)
                return stopped.exit_code
    for message in report.unreadable:
        print(f"unreadable image, left out: {message}", file=sys.stderr)
    print(report)
    if report.unreadable:
        return 1
    print(f"fastdeit train --data {target} ...")
    return 0
