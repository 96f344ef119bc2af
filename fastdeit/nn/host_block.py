"""The fused forward that the blocks of other libraries have in common."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastdeit.blocks import spec
from fastdeit.blocks.call_rules import why_not_all_fused_call
from fastdeit.blocks.checklist import BlockVerdict, judge_block
from fastdeit.blocks.fused_module import FusedModule
from fastdeit.blocks.snapshot import looked_at
from fastdeit.plan.block import planned_block


class HostBlock(FusedModule):
    """Mixed into a host's block in front of its class. It runs the host's forward where it does not run fused.

    A derived class says with `describe_parts` where the host keeps its parts, and with `why_not_arguments` what else of a call
    sends it back. Values that the host reads outside its modules, such as in a config, belong there: they are read at each call.

    Attributes:
        memory: what is saved for backward, as in `fastdeit.nn.Block`.
        tokens_name: the host's name for the argument (B, N, C).
        keep: how many of the tokens that enter it gives, None for all.
    """

    covers_parts = True
    memory = "usual"
    tokens_name = "x"
    keep: ClassVar[int | None] = None

    def describe_parts(self) -> spec.Block:
        """The block as data.

        Raises:
            AttributeError, KeyError, ValueError: this version of the host keeps its parts elsewhere.
        """
        raise NotImplementedError

    def describe(self) -> spec.Block:
        try:
            return self.describe_parts()
        except (AttributeError, KeyError, ValueError) as error:
            library = self.source.__module__.partition(".")[0]
            beyond = f"this version of {library} keeps its parts elsewhere: {error}"
            return spec.Block(self, self.source, (), beyond=beyond)

    def judge(self, description: spec.Block) -> BlockVerdict:
        return judge_block(description)

    def why_not_arguments(self, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
        """Why a call with these arguments beside the tokens runs the host's code."""
        if any(value is not None for value in args):
            return "it is called with more than its tokens, such as a mask"
        for name, value in kwargs.items():
            if value is not None and value is not False:
                return f"it is called with {name}"
        return None

    def why_not_fused(self, *args: Any, **kwargs: Any) -> str | None:
        """Why `forward` would run the host's code, None if it would run the kernels."""
        x, args, kwargs = self._tokens(args, kwargs)
        description, verdict = self._looked_at()
        return self.why_not_arguments(args, kwargs) or why_not_all_fused_call(description, verdict, x)

    def note(self) -> str | None:
        """What of it is called where it runs fused, None if nothing is."""
        _, verdict = self._looked_at()
        if (reason := next(filter(None, verdict.parts), None)) is not None:
            return f"a part of it is called: {reason}"
        reason = next(filter(None, verdict.called), None)
        return None if reason is None else f"its projections are called: {reason}"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, HostBlock):  # a bound method that someone kept from before `restore`
            return type(self).forward(self, *args, **kwargs)
        x, others, named = self._tokens(args, kwargs)
        answer = self._looked_at()
        if self.why_not_arguments(others, named) is not None or why_not_all_fused_call(*answer, x) is not None:
            return super().forward(*args, **kwargs)
        return self.finish(planned_block(self, answer, self.enter(x, others, named), self.keep))

    def enter(self, x: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The tokens that enter the block, from a call's."""
        return x

    def finish(self, tokens: Tensor) -> Any:
        """What the host returns of the block's output."""
        return tokens

    def _looked_at(self) -> tuple[spec.Block, BlockVerdict]:
        return looked_at(self)

    def _tokens(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
        """The tokens, None if they were not given, and the other arguments."""
        if args:
            return args[0], args[1:], kwargs
        return kwargs.get(self.tokens_name), (), {k: v for k, v in kwargs.items() if k != self.tokens_name}
