"""The processes of a run: one, or as many as torchrun or Slurm have started."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdeit.train import peers
from fastdeit.train.peers import Peers


@dataclass(frozen=True)
class World:
    """Which process of how many this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine: the GPU's number

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agreed(self, value: Any) -> Any:
        """The main process's value, in all."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def same_buffers(self, model: nn.Module) -> None:
        """Gives all processes the main one's buffers: BatchNorm's statistics are of what each has seen."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Calls function in the main process; its result there, None elsewhere. An error that a user can mend is raised in all."""
        result, failure = None, None
        if self.main:
            try:
                result = function()
            except (ValueError, OSError, ImportError) as error:
                failure = error
        failure = self.agreed(failure)
        if failure is not None:
            raise failure
        return result

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    @property
    def peers(self) -> Peers | None:
        """The watch over the other processes; None where there are none."""
        return _peers if self.size > 1 else None


SINGLE = World()
_peers: Peers | None = None  # while the processes are connected


def started_world() -> World:
    """What torchrun's environment says, or Slurm's; one process without either.

    Raises:
        ValueError: the environment has one of its variables and lacks another, or holds no numbers.
    """
    try:
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
        if "SLURM_PROCID" in os.environ and int(os.environ["SLURM_NTASKS"]) > 1:
            return World(
                int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_LOCALID"])
            )
    except KeyError as error:
        raise ValueError(
            f"environment: {error.args[0]} is missing beside the other variables of the launcher"
        ) from None
    except ValueError as error:
        raise ValueError(f"environment: RANK, WORLD_SIZE and the like must be numbers ({error})") from None
    return SINGLE


@contextlib.contextmanager
def joined(world: World, device_type: str) -> Iterator[World]:
    """Connects the processes: NCCL between GPUs, gloo between CPUs. Of one process there is nothing to connect.

    Raises:
        ValueError: the launcher does not say where the main process listens.
        ConnectionError: the processes do not reach each other.
    """
    if world.size == 1 or dist.is_initialized():
        yield world
        return
    device = None  # NCCL's: told of it, it need not guess where a barrier is to wait
    if device_type == "cuda":
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    address = os.environ.get("MASTER_ADDR") or _slurm_address()
    port = os.environ.get("MASTER_PORT") or "29500"
    global _peers
    try:
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            init_method=f"tcp://{address}:{port}" if "TORCHELASTIC_RUN_ID" not in os.environ else "env://",
            rank=world.rank,
            world_size=world.size,
            device_id=device,
        )
        _peers = peers.start(world.rank, world.size, address, int(port))
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {world.rank} of {world.size} has not reached the others at {address}:{port}, where all are to meet: "
            f"{(str(error).strip().splitlines() or [type(error).__name__])[0]}"
        ) from error
    try:
        yield world
    finally:
        _peers.end()
        _peers = None
        dist.destroy_process_group()


def _slurm_address() -> str:
    """The first machine of the job."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ValueError("environment: MASTER_ADDR is missing, and so is SLURM_JOB_NODELIST to take it from")
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return names.stdout.split()[0]
