"""What the compiled code of a configuration did when it was executed on a CPU (docs/compiled-code.md): counts and errors.

Made by `fastdeit.testing.ptx`, kept in resources.json.
"""

from dataclasses import dataclass, field, fields
from typing import Any

SECTOR = 32  # bytes


@dataclass(frozen=True)
class Accesses:
    """Memory accesses, and the fewest transactions that could have made them.

    Attributes:
        loaded, ideal_loaded: sectors of global memory that loads move.
        copied, ideal_copied: the same of copies to shared memory (cp.async), which bypass the L1 cache.
        stored, ideal_stored: the same of stores.
        wavefronts, ideal_wavefronts: of loads, stores and copies of shared memory; wgmma's and tensor copies' are not among them.
        tensor_bytes: moved by tensor copies, within the tensors.
    """

    loaded: int = 0
    ideal_loaded: int = 0
    copied: int = 0
    ideal_copied: int = 0
    stored: int = 0
    ideal_stored: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    tensor_bytes: int = 0

    def __add__(self, other: "Accesses") -> "Accesses":
        return Accesses(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def sector_ratio(self) -> float:
        """Sectors over the ideal."""
        return _ratio(self.loaded + self.copied + self.stored, self._ideal_sectors)

    @property
    def l2_ratio(self) -> float:
        """Bytes that the L2 cache moves over the ideal, tensor copies included: L1 serves a sector that is loaded again."""
        ideal = SECTOR * self._ideal_sectors + self.tensor_bytes
        return _ratio(ideal + SECTOR * (self.copied - self.ideal_copied + self.stored - self.ideal_stored), ideal)

    @property
    def _ideal_sectors(self) -> int:
        return self.ideal_loaded + self.ideal_copied + self.ideal_stored

    @property
    def wavefront_ratio(self) -> float:
        """Wavefronts over the ideal."""
        return _ratio(self.wavefronts, self.ideal_wavefronts)


def _ratio(found: int, ideal: int) -> float:
    return found / ideal if ideal else 1.0


@dataclass(frozen=True)
class Execution:
    """The launches of one configuration in one case of `fastdeit.testing.ptx.cases`.

    Attributes:
        case: its name.
        rms_error, eager_rms_error: of the case's output or gradient that comes closest to its limit, relative to float64: the
            kernels' and PyTorch's. 0 where the results have the reference's bits.
        share_of_limit: the first over what the numerics contract allows.
        instructions: class -> warps that executed one of it, in PTX before the assembler.
        once, loop: accesses outside and inside the kernel's loops.
    """

    case: str
    rms_error: float
    eager_rms_error: float
    share_of_limit: float
    instructions: dict[str, int] = field(default_factory=dict)
    once: Accesses = field(default_factory=Accesses)
    loop: Accesses = field(default_factory=Accesses)

    @property
    def accesses(self) -> Accesses:
        return self.once + self.loop

    @staticmethod
    def from_dict(facts: dict[str, Any]) -> "Execution":
        """The inverse of `dataclasses.asdict`."""
        return Execution(**{**facts, "once": Accesses(**facts["once"]), "loop": Accesses(**facts["loop"])})
