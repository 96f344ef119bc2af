"""Full models: residual additions run in the next LayerNorm kernel, and tokens that no head reads are not computed."""

import functools
from typing import Any, ClassVar, NamedTuple, cast

import torch
from timm.models import deit, vision_transformer
from torch import Tensor, nn

from fastdeit.blocks.adapters.timm import describe_trunk
from fastdeit.blocks.call_rules import why_global_hook, why_not_plain_call, why_not_trunk_call
from fastdeit.blocks.checklist import TrunkVerdict, judge_trunk, why_called
from fastdeit.blocks.embedding import blank_image, embed, why_not_embedding, why_not_embedding_call
from fastdeit.blocks.fused_module import FUSED_CLASSES, FusedModule
from fastdeit.blocks.heads import Logits, head_parameters, run_heads, why_not_heads
from fastdeit.blocks.run import dropped_out, run_trunk
from fastdeit.blocks.snapshot import looked_at
from fastdeit.blocks.spans import Span, trunk_spans
from fastdeit.blocks.spec import Trunk
from fastdeit.plan.planned import planned
from fastdeit.plan.surroundings import why_parts_called


class _Verdict(NamedTuple):
    """What the modules of a model allow.

    Attributes:
        trunk: of what is between tokens and heads.
        embedding: why timm's code makes the tokens, None if one op may.
        heads: why timm's code reads them, None if ops may.
    """

    trunk: TrunkVerdict
    embedding: str | None
    heads: str | None


_Answer = tuple[Trunk, _Verdict]  # what `looked_at` gives for one of these models


class FusedTrunk(FusedModule):
    """The forward of both models. `forward_features` and `forward_intermediates` stay timm's.

    `_made_tokens`, `_before_blocks` and `_blocks_in_turn` are what timm's code does where an op does not take its place; a drop-in
    for a model that does it otherwise overrides them.
    """

    describe = describe_trunk
    head_names: ClassVar[tuple[str, ...]] = ("head",)

    def judge(self, description: Trunk) -> _Verdict:
        model = cast(nn.Module, self)
        return _Verdict(judge_trunk(description), why_not_embedding(model), why_not_heads(model, self.head_names))

    def why_not_fused(self, tokens: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        """Why `forward` would run the blocks one by one, None if it would carry the residual through them.

        Args:
            tokens: (B, N, C), what enters the first block.
        """
        verdict = _looked_at(self)[1].trunk
        return (
            _why_masked(attn_mask, is_causal)
            or why_not_plain_call(tokens)
            or verdict.model
            or why_global_hook()
            or verdict.norm
            or verdict.block
            or why_not_trunk_call(verdict, tokens)
        )

    def why_not_embedded(self, images: Tensor | None = None) -> str | None:
        """Why timm's code would make the tokens, None if one op would.

        Args:
            images: (B, 3, H, W); by default of the size that the model was made for.
        """
        images = blank_image(self) if images is None else images
        if images is None:
            return f"patch_embed is a {type(self.patch_embed).__name__}"
        verdict, embedding, _ = _looked_at(self)[1]
        reason = why_not_plain_call(images) or verdict.model or why_global_hook() or embedding
        return reason or why_not_embedding_call(self, images)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not isinstance(self, FusedTrunk):  # a bound method that someone kept from before `restore`
            return type(self).forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
        if _why_masked(attn_mask, is_causal) is None:
            answer = _looked_at(self)
            made: Any = self._planned(answer, x)  # two tensors in distilled training: timm's annotation says one too
            if made is not None:
                return made if _reads_tokens(answer) else self.forward_head(made)
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)

    def _planned(self, answer: _Answer, x: Tensor) -> Logits | None:
        """The logits, or the prefix tokens where the heads are called, from a plan where there is one.

        None where timm's code runs the whole trunk.
        """
        run = functools.partial(self._logits if _reads_tokens(answer) else self._prefix_tokens, answer)
        called, spans = functools.partial(self._why_called, answer), functools.partial(self._spans, answer)
        return planned(self, answer, run, x, called, spans)

    def _why_called(self, answer: _Answer) -> str | None:
        """Why `_prefix_tokens` calls modules."""
        description, (verdict, embedding, _) = answer
        for name in ("pos_drop", "patch_drop", "norm_pre"):
            if why_called(getattr(self, name)) is not None:
                embedding = embedding or f"{name} is called"
        return verdict.model or embedding or verdict.norm or verdict.block or why_parts_called(description, verdict)

    def _logits(self, answer: _Answer, x: Tensor) -> Logits | None:
        """What the heads give of `_prefix_tokens`."""
        tokens = self._prefix_tokens(answer, x)
        return None if tokens is None else run_heads(cast(nn.Module, self), self.head_names, tokens)

    def _prefix_tokens(self, answer: _Answer, x: Tensor) -> Tensor | None:
        """The tokens that the heads read, at least, for images x (B, 3, H, W); None where timm's code runs the whole trunk."""
        description, (verdict, embedding, _) = answer
        if (why_not_plain_call(x) or verdict.model or why_global_hook()) is not None:
            return None
        model = cast(nn.Module, self)
        fused = embedding is None and why_not_embedding_call(model, x) is None
        tokens = self._before_blocks(embed(model, x) if fused else self._made_tokens(x))
        reason = why_not_plain_call(tokens) or verdict.norm or verdict.block or why_not_trunk_call(verdict, tokens)
        return self._blocks_in_turn(tokens) if reason is not None else run_trunk(description, verdict, tokens)

    def _spans(self, answer: _Answer, x: Tensor) -> list[Span] | None:
        """Spans that together compute what `_planned` gives of x, where one op makes the tokens."""
        (description, (verdict, embedding, _)), model = answer, cast(nn.Module, self)
        if (embedding or why_not_embedding_call(model, x)) is not None:
            return None
        parameters: list[Tensor] = [p for p in model._parameters.values() if p is not None]
        parameters += model.get_submodule("patch_embed").parameters()
        first = Span(lambda images: (self._before_blocks(embed(model, images)),), parameters)
        last = None
        if _reads_tokens(answer):
            last = Span(
                lambda tokens: _each(run_heads(model, self.head_names, tokens)), head_parameters(model, self.head_names)
            )
        return trunk_spans(description, verdict, first, last)

    def _made_tokens(self, x: Tensor) -> Tensor:
        return self._pos_embed(self.patch_embed(x))

    def _before_blocks(self, tokens: Tensor) -> Tensor:
        return dropped_out(self.norm_pre, dropped_out(self.patch_drop, tokens))

    def _blocks_in_turn(self, tokens: Tensor) -> Tensor:
        return self.norm(self.blocks(tokens))


def _looked_at(model: Any) -> _Answer:  # no cast: each call of a planned model passes here
    return looked_at(model)


def _reads_tokens(answer: _Answer) -> bool:
    """Whether ops read the tokens in the place of the heads. A compiler is given the heads, whose products it may fuse."""
    return answer[1].heads is None and not torch.compiler.is_compiling()


def _each(logits: Logits) -> tuple[Tensor, ...]:
    return logits if isinstance(logits, tuple) else (logits,)


def _why_masked(attn_mask: Tensor | None, is_causal: bool) -> str | None:
    return "an attention mask" if attn_mask is not None or is_causal else None


def _init_with_fused_parts(source: type[nn.Module]):
    @functools.wraps(source.__init__)
    def __init__(self, *args, **kwargs):
        source.__init__(self, *args, **kwargs)
        for part in self.modules():
            part.__class__ = FUSED_CLASSES.get(type(part), type(part))

    return __init__


class VisionTransformer(FusedTrunk, vision_transformer.VisionTransformer, source=vision_transformer.VisionTransformer):
    """timm's VisionTransformer (Dosovitskiy et al. 2021; DeiT, Touvron et al. 2021) with timm's constructor.

    `forward` takes (B, 3, H, W) and returns (B, num_classes). One op makes the tokens. Each residual addition is made in the
    LayerNorm kernel after it, also from block to block. With token pooling the last block computes the prefix tokens alone, since
    the head reads no others.
    """

    __init__ = _init_with_fused_parts(vision_transformer.VisionTransformer)


class VisionTransformerDistilled(FusedTrunk, deit.VisionTransformerDistilled, source=deit.VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (Touvron et al. 2021, section 4), class and distillation token; as `VisionTransformer`."""

    head_names = ("head", "head_dist")
    __init__ = _init_with_fused_parts(deit.VisionTransformerDistilled)
