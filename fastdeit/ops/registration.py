"""One description of an op, and the two ways of running it that are made from it.

Eager calls run an autograd.Function that goes straight to the launchers. While PyTorch traces (`torch.compile`, `torch.export`, any
dispatch mode), and for tensor subclasses, the ops `fastdeit::<name>_forward` and `fastdeit::<name>_backward` run, registered with
torch.library: their schemas, fakes and autograd come from the same functions.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdeit import backends
from fastdeit.ops.first_derivative import first_derivative_only
from fastdeit.ops.flop_counting import add_to_counters

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "SymInt",
    int | None: "SymInt?",
    bool: "bool",
    str: "str",
    str | None: "str?",
    torch.dtype: "ScalarType",
}


class Op:
    """A differentiable op behind its argument checks: call it with `forward`'s arguments, by position, to get its outputs.

    The caller has checked the arguments: they are valid, and the op's `why_reference` is None for them.

    Args:
        name: of the op in `torch.ops.fastdeit`, before `_forward` and `_backward`.
        outputs: names of what the caller gets. Of the first, backward always gets the gradient, zeros if there is none; of the
            others it may be None.
        made: names of what forward makes for backward alone.
        saved: a NamedTuple class, what backward reads.
        forward: (*tensors, *options, *, saves) -> (outputs, made), each a tensor or None. Tensors and options are annotated, and
            tensors come first. Without `saves` there is no backward, and `made` is not read. No two results may share memory, and
            none with an input.
        save: (inputs, outputs, made, needs) -> saved. It only chooses, since a registered op may not return its inputs. `needs`
            says of each input whether its gradient is needed.
        backward: (grads of the outputs, saved, options, grad_dtypes) -> grads of the tensors. `grad_dtypes` has the dtype of each,
            None where it is not needed. No two of them may share memory, and none with a gradient that it was given.
        fake: (*tensors, *options) -> (outputs, made) as forward gives them with `saves`, without data.
        fake_backward: (saved, grad_dtypes) -> grads of the tensors, without data. By default each is contiguous.
        added: the first two tensors are added, once the second is multiplied by these fields of saved. Where all of them are None
            and both gradients have one dtype they are one tensor, and backward is asked for the first alone.
        passed_on: the tensor that is added to the first output, whose gradient it gets. Backward is not asked for it.
        constant: outputs that have no gradient.
        flops: formulas for PyTorch's FLOP counter, (*tensors, *options) of forward and (grads, saved, options, grad_dtypes) of
            backward, in which shapes stand for tensors.
    """

    def __init__(
        self,
        name: str,
        *,
        outputs: Sequence[str],
        made: Sequence[str] = (),
        saved: Any,
        forward: Callable[..., Any],
        save: Callable[..., Any],
        backward: Callable[..., Any],
        fake: Callable[..., Any],
        fake_backward: Callable[..., Any] | None = None,
        added: Sequence[str] | None = None,
        passed_on: str | None = None,
        constant: Sequence[str] = (),
        flops: tuple[Callable[..., int], Callable[..., int]] | None = None,
    ):
        self._outputs, self._made, self._saved = len(outputs), len(made), saved
        self._forward, self._save, self._backward = forward, save, backward
        self._fake, self._fake_backward = fake, fake_backward
        parameters = [p for p in inspect.signature(forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        arguments = {p.name: _SCHEMA_TYPES[p.annotation] for p in parameters}
        tensors = [argument for argument, kind in arguments.items() if kind.startswith("Tensor")]
        self._tensors, self._no_options = len(tensors), (None,) * (len(arguments) - len(tensors))
        self._added = None if added is None else [saved._fields.index(field) for field in added]
        self._passed_on = None if passed_on is None else tensors.index(passed_on)
        self._constant = [outputs.index(output) for output in constant]
        self._apply = self._make_function(name).apply
        self._register(name, arguments, tensors, outputs)
        self._registered_forward = getattr(torch.ops.fastdeit, f"{name}_forward").default
        self._registered_backward = getattr(torch.ops.fastdeit, f"{name}_backward").default
        both = self._registered_forward.overloadpacket, self._registered_backward.overloadpacket
        self._flops = None if flops is None else dict(zip(both, self._formulas(*flops), strict=True))

    def __call__(self, *inputs: Any) -> tuple[Tensor | None, ...]:
        tensors = inputs[: self._tensors]
        saves = backends.wants_gradient(*tensors)
        if backends.registered_path(*tensors):
            if self._flops is not None:
                add_to_counters(self._flops)
            return tuple(map(_or_none, self._registered_forward(*inputs, saves)[: self._outputs]))
        return self._apply(*inputs) if saves else self._forward(*inputs, saves=False)[0]

    # ---- what both ways have in common

    def _remember(self, ctx, inputs, results, saved) -> None:
        """Saves on ctx what backward needs. Of a single result PyTorch makes the gradient where there is none."""
        ctx.save_for_backward(*saved)
        ctx.options = inputs[self._tensors :]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[: self._tensors]]
        if len(results) > 1:
            ctx.set_materialize_grads(False)
            ctx.first = results[0].shape, results[0].dtype

    def _gradients(self, ctx, grads, saved, backward) -> Sequence[Tensor | None]:
        """Gradients of the tensors, by `backward`, which eager and traced calls share."""
        if grads[0] is None:
            shape, dtype = ctx.first
            grads = (_first_tensor(saved).new_zeros(shape, dtype=dtype), *grads[1:])
        needed = zip(ctx.dtypes, ctx.needs_input_grad, strict=False)
        all_dtypes = [dtype if needs else None for dtype, needs in needed]
        if self._added is None and self._passed_on is None:
            return backward(grads, saved, ctx.options, all_dtypes)
        dtypes = list(all_dtypes)
        shared = self._added is not None and dtypes[0] is not None and dtypes[0] == dtypes[1]
        shared = shared and all(saved[field] is None for field in self._added)
        if shared:
            dtypes[1] = None
        if self._passed_on is not None:
            dtypes[self._passed_on] = None
        input_grads = list(backward(grads, saved, ctx.options, dtypes))
        if shared:
            input_grads[1] = input_grads[0]
        if self._passed_on is not None and all_dtypes[self._passed_on] is not None:
            input_grads[self._passed_on] = grads[0].to(all_dtypes[self._passed_on])
        return input_grads

    # ---- eager

    def _make_function(self, name: str) -> type[torch.autograd.Function]:
        def forward(ctx, *inputs):
            # There a reshaped tensor is no view; one that a Function returns may not be changed in place.
            with torch._C._AutoDispatchBelowADInplaceOrView():
                outputs, made = self._forward(*inputs, saves=True)
            self._remember(ctx, inputs, outputs, self._save(inputs, outputs, made, ctx.needs_input_grad))
            if self._constant:
                ctx.mark_non_differentiable(*(outputs[i] for i in self._constant if outputs[i] is not None))
            return outputs

        @first_derivative_only
        def backward(ctx, *grads):
            saved = self._saved._make(ctx.saved_tensors)
            grads = tuple(g if g is None else g.resolve_neg() for g in grads)  # launchers read memory, not the bit
            return *self._gradients(ctx, grads, saved, self._backward), *self._no_options

        functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"fastdeit_{name}", (torch.autograd.Function,), functions)

    # ---- registered: a result may be neither None nor an input, so an empty bool tensor stands for None

    def _register(self, name: str, arguments: dict[str, str], tensors: list[str], outputs: Sequence[str]) -> None:
        given = [f"{kind} {argument}" for argument, kind in arguments.items()]
        results = ", ".join(["Tensor"] * (self._outputs + self._made))
        schema = f"({', '.join([*given, 'bool saves'])}) -> ({results})"
        options = dict(mutates_args=(), schema=schema)
        forward = torch.library.custom_op(f"fastdeit::{name}_forward", self._run_forward, **options)
        forward.register_fake(self._run_fake)
        forward.register_autograd(self._autograd_backward, setup_context=self._setup_context)

        grads = [f"Tensor? d_{output}" for output in outputs] + [f"Tensor? {field}" for field in self._saved._fields]
        grads += [f"ScalarType? d_{tensor}_dtype" for tensor in tensors] + [f"SymInt[] {t}_shape" for t in tensors]
        grads += [f"{kind} option_{argument}" for argument, kind in arguments.items() if argument not in tensors]
        options = dict(mutates_args=(), schema=f"({', '.join(grads)}) -> Tensor[]")
        backward = torch.library.custom_op(f"fastdeit::{name}_backward", self._run_backward, **options)
        backward.register_fake(self._run_fake_backward)

    def _run_forward(self, *inputs):
        *inputs, saves = inputs
        outputs, made = self._forward(*inputs, saves=saves)
        return self._results(outputs, made, saves)

    def _run_fake(self, *inputs):
        *inputs, saves = inputs
        return self._results(*self._fake(*inputs), saves)

    def _results(self, outputs, made, saves):
        return _tensors((*outputs, *(made if saves else (None,) * self._made)), like=outputs[0])

    def _setup_context(self, ctx, inputs, output):
        *inputs, saves = inputs
        without = (*output[self._outputs :], *(output[i] for i in self._constant))
        ctx.mark_non_differentiable(*without)
        results = [_or_none(t) for t in output]
        outputs, made = results[: self._outputs], results[self._outputs :]
        tensors = inputs[: self._tensors]
        needs = ctx.needs_input_grad
        self._remember(ctx, inputs, output, self._save(inputs, outputs, made, needs) if saves else tensors)
        ctx.shapes, ctx.saves = [() if t is None else t.shape for t in tensors], saves

    def _autograd_backward(self, ctx, *grads):
        saved = ctx.saved_tensors
        if not ctx.saves:  # traced without gradients, and trained nevertheless
            inputs = (*saved, *ctx.options)
            results = [_or_none(t) for t in self._registered_forward(*inputs, True)]
            saved = self._save(inputs, results[: self._outputs], results[self._outputs :], ctx.needs_input_grad)

        def backward(grads, saved, options, grad_dtypes):
            return map(_or_none, self._registered_backward(*grads, *saved, *grad_dtypes, *ctx.shapes, *options))

        input_grads = self._gradients(ctx, grads[: self._outputs], self._saved._make(saved), backward)
        return *input_grads, *self._no_options, None

    def _run_backward(self, *arguments):
        grads, saved, grad_dtypes, _, options = self._split(arguments)
        return list(_tensors(self._backward(grads, saved, options, grad_dtypes), like=_first_tensor((*grads, *saved))))

    def _run_fake_backward(self, *arguments):
        grads, saved, grad_dtypes, shapes, _ = self._split(arguments)
        like = _first_tensor((*grads, *saved))
        if self._fake_backward is not None:
            return list(_tensors(self._fake_backward(saved, grad_dtypes), like=like))
        each = zip(shapes, grad_dtypes, strict=True)
        input_grads = (None if dtype is None else like.new_empty(shape, dtype=dtype) for shape, dtype in each)
        return list(_tensors(input_grads, like=like))

    def _formulas(self, forward: Callable[..., int], backward: Callable[..., int]) -> tuple[Callable[..., int], ...]:
        """Formulas as PyTorch calls them: with the registered ops' arguments and the shape of what they return."""

        def of_forward(*arguments, out_shape=None):
            return forward(*arguments[:-1])

        def of_backward(*arguments, out_shape=None):
            grads, saved, grad_dtypes, _, options = self._split(arguments)
            return backward(grads, saved, options, grad_dtypes)

        return of_forward, of_backward

    def _split(self, arguments):
        """The registered backward's arguments, split: grads of the outputs, saved, grad_dtypes, shapes of the tensors, options."""
        parts, start = [], 0
        for size in (self._outputs, len(self._saved._fields), self._tensors, self._tensors):
            parts.append(arguments[start : start + size])
            start += size
        grads, saved, grad_dtypes, shapes = parts
        return grads, self._saved._make(saved), grad_dtypes, shapes, arguments[start:]


def _tensors(results, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0, dtype=torch.bool) if t is None else t for t in results)


def _or_none(tensor: Tensor) -> Tensor | None:
    return None if tensor.dtype is torch.bool else tensor


def _first_tensor(tensors: Sequence[Tensor | None]) -> Tensor:
    return next(t for t in tensors if t is not None)
