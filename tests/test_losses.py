"""DistillationLoss as facebookresearch/deit defines and calls it, and DistillationCrossEntropy, also inside timm's tasks."""

import warnings
from unittest import mock

import pytest
import timm
import timm.loss
import timm.task
import torch
import torch.nn.functional as F
from torch import nn

from fastdeit import backends, losses
from fastdeit.losses import DistillationCrossEntropy, DistillationLoss
from fastdeit.testing import assert_as_accurate_as_eager, kernel_device

DEVICE = kernel_device()
KINDS = ["none", "soft", "hard"]
CLASSES = 11


class Teacher(nn.Module):
    """Batch normalisation and a projection: in train mode it would answer otherwise, and change itself."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        self.seen = dict(grad=torch.is_grad_enabled(), autocast=torch.is_autocast_enabled(x.device.type))
        return self.head(self.norm(x))


def deit(criterion, teacher, kind, alpha, tau, inputs, outputs, labels):
    """What facebookresearch/deit's DistillationLoss computes."""
    outputs, dist_outputs = outputs
    base = criterion(outputs, labels)
    if kind == "none":
        return base
    with torch.no_grad():
        t = teacher(inputs)
    if kind == "soft":
        student = F.log_softmax(dist_outputs / tau, dim=1)
        kd = F.kl_div(student, F.log_softmax(t / tau, dim=1), reduction="sum", log_target=True)
        kd = kd * (tau * tau) / dist_outputs.numel()
    else:
        kd = F.cross_entropy(dist_outputs, t.argmax(dim=1))
    return base * (1 - alpha) + kd * alpha


def soft_labels():
    return torch.softmax(3 * torch.randn(5, CLASSES), dim=1).to(DEVICE)


def index_labels():
    return torch.randint(CLASSES, (5,), device=DEVICE)


def student_outputs(dtype=torch.float32):
    return [torch.randn(5, CLASSES, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2)]


def double(x):
    return x.double() if x.is_floating_point() else x


class Custom(nn.Module):
    def forward(self, outputs, labels):
        return (outputs.softmax(1) - F.one_hot(labels, CLASSES)).square().sum()


FUSED = {
    "soft targets": (timm.loss.SoftTargetCrossEntropy(), soft_labels),
    "label smoothing": (timm.loss.LabelSmoothingCrossEntropy(0.1), index_labels),
    "cross-entropy": (nn.CrossEntropyLoss(), index_labels),
    "cross-entropy of soft targets": (nn.CrossEntropyLoss(), soft_labels),
    "smoothed cross-entropy": (nn.CrossEntropyLoss(label_smoothing=0.1), index_labels),
    "binary": (nn.BCEWithLogitsLoss(), soft_labels),
    "timm's binary": (timm.loss.BinaryCrossEntropy(), soft_labels),
    "timm's binary of indices": (timm.loss.BinaryCrossEntropy(smoothing=0.0), index_labels),
}
hooked = nn.CrossEntropyLoss()
hooked.register_forward_hook(lambda module, args, output: 2 * output)
hooked_before = nn.CrossEntropyLoss()
hooked_before.register_forward_pre_hook(lambda module, args: (2 * args[0], args[1]))
replaced = nn.CrossEntropyLoss()
replaced.forward = lambda outputs, labels: outputs.sum()
weights = torch.linspace(0.5, 2, CLASSES, device=DEVICE)
NOT_FUSED = {
    "class weights": (nn.CrossEntropyLoss(weight=weights), index_labels),
    "an ignored class": (nn.CrossEntropyLoss(ignore_index=3), index_labels),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), index_labels),
    "smoothing of soft targets": (nn.CrossEntropyLoss(label_smoothing=0.1), soft_labels),
    "weighted binary": (nn.BCEWithLogitsLoss(weight=weights), soft_labels),
    "positive weights": (nn.BCEWithLogitsLoss(pos_weight=weights), soft_labels),
    "a sum of binary losses": (nn.BCEWithLogitsLoss(reduction="sum"), soft_labels),
    "timm's weighted binary": (timm.loss.BinaryCrossEntropy(weight=weights), soft_labels),
    "timm's positive weights": (timm.loss.BinaryCrossEntropy(pos_weight=weights), soft_labels),
    "a threshold": (timm.loss.BinaryCrossEntropy(target_threshold=0.2), soft_labels),
    "summed classes": (timm.loss.BinaryCrossEntropy(sum_classes=True), soft_labels),
    "dense smoothing": (timm.loss.BinaryCrossEntropy(smoothing=0.1, smooth_dense=True), soft_labels),
    "smoothed indices": (timm.loss.BinaryCrossEntropy(smoothing=0.1), index_labels),
    "nothing but smoothing": (nn.CrossEntropyLoss(label_smoothing=1.0), index_labels),
    "labels with a gradient": (timm.loss.SoftTargetCrossEntropy(), lambda: soft_labels().requires_grad_()),
    "another class": (Custom(), index_labels),
    "a subclass": (type("Mine", (nn.CrossEntropyLoss,), {})(), index_labels),
    "a hook": (hooked, index_labels),
    "a hook before it": (hooked_before, index_labels),
    "a forward of its own": (replaced, index_labels),
    "a function": (F.cross_entropy, index_labels),
}


@pytest.fixture
def fused_bases():
    """The base of every call of the op."""
    bases = []

    def counted(*args, **options):
        bases.append(options.get("base", "cross_entropy"))
        return real(*args, **options)

    real = losses.distillation_cross_entropy
    with mock.patch.object(losses, "distillation_cross_entropy", counted):
        yield bases


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [*FUSED, *NOT_FUSED])
def test_is_deits_loss(case, kind, fused_bases):
    criterion, labels = (FUSED | NOT_FUSED)[case]
    if isinstance(criterion, nn.Module):
        criterion = criterion.double()
    teacher, labels = Teacher().to(DEVICE).double(), double(labels())
    inputs, outputs = torch.randn(5, 6, device=DEVICE, dtype=torch.float64), student_outputs(torch.float64)
    loss = DistillationLoss(criterion, teacher, kind, 0.3, 2.5)
    got = loss(inputs, outputs, labels)
    expected = deit(criterion, teacher.eval(), kind, 0.3, 2.5, inputs, outputs, labels)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, outputs, allow_unused=True) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)
    if case in FUSED:
        assert len(fused_bases) == 1 and fused_bases != ["none"]
    else:
        assert fused_bases == ([] if kind == "none" else ["none"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["soft targets", "label smoothing", "binary", "class weights"])
def test_the_kernels_are_as_accurate_as_deit(case, kind):
    criterion, labels = (FUSED | NOT_FUSED)[case]
    if isinstance(criterion, nn.Module):
        criterion = criterion.float()
    labels = labels()
    t = torch.randn(5, CLASSES, device=DEVICE)

    def fused(z, d):
        return DistillationLoss(criterion, Fixed(t), kind, 0.3, 2.5)(None, (z, d), labels)

    def eager(z, d):
        as_z = lambda x: x.to(z.dtype) if x.is_floating_point() else x  # noqa: E731
        base = criterion.double() if z.dtype == torch.float64 and isinstance(criterion, nn.Module) else criterion
        result = deit(base, lambda _: as_z(t), kind, 0.3, 2.5, None, (z, d), as_z(labels))
        criterion.float()
        return result

    outputs = [x.detach() for x in student_outputs()]
    frozen = (1,) if kind == "none" else ()
    assert_as_accurate_as_eager(fused, eager, *outputs, frozen=frozen, largest_intermediate=10.0)


class Fixed(nn.Module):
    """A teacher whose answer is known."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, inputs):
        return self.logits


# ---- the teacher


def test_the_teacher_is_and_stays_in_eval_mode():
    teacher = Teacher().train()
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "hard", 0.5, 1.0)
    assert not teacher.training
    loss.train()
    assert not teacher.training and not teacher.norm.training and loss.training


def test_the_teacher_runs_without_gradient_and_unchanged():
    teacher = Teacher().to(DEVICE)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 0.5, 1.0)
    inputs = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    loss(inputs, student_outputs(), index_labels()).backward()
    assert teacher.seen["grad"] is False and inputs.grad is None
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("enabled", [False, True])
def test_the_teacher_runs_under_the_callers_autocast(enabled):
    teacher = Teacher().to(DEVICE)
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "hard", 0.5, 1.0)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=enabled):
        loss(torch.randn(5, 6, device=DEVICE), student_outputs(), index_labels())
    assert teacher.seen["autocast"] is enabled


def test_the_teacher_sees_the_students_inputs():
    teacher = mock.Mock(return_value=torch.randn(5, CLASSES, device=DEVICE))
    inputs = torch.randn(5, 6)
    DistillationLoss(nn.CrossEntropyLoss(), teacher, "hard", 0.5, 1.0)(inputs, student_outputs(), index_labels())
    teacher.assert_called_once_with(inputs)


def test_without_distillation_no_teacher_is_needed_or_run():
    teacher = mock.Mock()
    for given in (None, teacher):
        DistillationLoss(nn.CrossEntropyLoss(), given, "none", 0.5, 1.0)(None, student_outputs()[0], index_labels())
    teacher.assert_not_called()


# ---- calls and constructors


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_one_output_with_distillation_is_an_error(kind):
    loss = DistillationLoss(nn.CrossEntropyLoss(), Teacher(), kind, 0.5, 1.0)
    with pytest.raises(ValueError, match="the model must return a pair"):
        loss(torch.randn(5, 6), torch.randn(5, CLASSES), torch.randint(CLASSES, (5,)))


def test_deits_training_loop_runs_with_one_import_changed():
    """As its main.py builds the loss and its engine.py calls it, over timm's distilled model with mixup."""
    student = small_student().to(DEVICE)
    teacher = timm.create_model("resnet18", num_classes=CLASSES).to(DEVICE)
    teacher.eval()
    mixup_fn = timm.data.Mixup(
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        prob=1.0,
        switch_prob=0.5,
        mode="batch",
        label_smoothing=0.1,
        num_classes=CLASSES,
    )
    criterion = timm.loss.SoftTargetCrossEntropy()
    criterion = DistillationLoss(criterion, teacher, "hard", 0.5, 1.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    samples, targets = torch.randn(4, 3, 32, 32, device=DEVICE), torch.randint(CLASSES, (4,), device=DEVICE)
    samples, targets = mixup_fn(samples, targets)
    criterion.train()
    values = []
    for _ in range(4):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            outputs = student(samples)
            loss = criterion(samples, outputs, targets)
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.dtype == torch.float32 and values[-1] < values[0]


def test_state_dict_names_are_deits():
    loss = DistillationLoss(nn.CrossEntropyLoss(weight=weights), Teacher(), "hard", 0.5, 1.0)
    assert {k.split(".")[0] for k in loss.state_dict()} == {"base_criterion", "teacher_model"}


def test_ignored_labels_are_ignored_by_a_criterion_in_a_function():
    criterion, labels, outputs = nn.CrossEntropyLoss(), index_labels(), student_outputs()
    labels[2] = -100
    loss = DistillationLoss(lambda *a: criterion(*a), Teacher().to(DEVICE), "none", 0.5, 1.0)
    assert torch.equal(loss(None, outputs, labels), criterion(outputs[0], labels))


def test_a_label_out_of_range_is_named_by_the_debug_switch():
    loss = DistillationLoss(nn.CrossEntropyLoss(), Teacher().to(DEVICE), "hard", 0.5, 1.0, check_indices=True)
    labels = index_labels()
    labels[3] = CLASSES
    with pytest.raises(
        IndexError, match=rf"target: expected class indices in \[0, {CLASSES}\), got {CLASSES} in row 3"
    ):
        loss(torch.randn(5, 6, device=DEVICE), student_outputs(), labels)


@pytest.mark.parametrize(
    "criterion, labels",
    [
        (timm.loss.SoftTargetCrossEntropy(), index_labels),
        (timm.loss.LabelSmoothingCrossEntropy(0.1), soft_labels),
        (nn.BCEWithLogitsLoss(), index_labels),
    ],
)
def test_labels_that_the_criterion_refuses_are_refused(criterion, labels):
    outputs, labels = student_outputs()[0], labels()
    with pytest.raises(Exception) as refused:
        criterion(outputs, labels)
    with pytest.raises(refused.type):
        DistillationLoss(criterion, None, "none", 0.5, 1.0)(None, outputs, labels)


def test_outputs_of_more_dimensions_are_the_criterions():
    outputs, labels = torch.randn(5, CLASSES, 2), torch.softmax(torch.randn(5, CLASSES, 2), dim=1)
    loss = DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0)
    assert torch.equal(loss(None, outputs, labels), F.cross_entropy(outputs, labels))


@pytest.mark.parametrize("case", ["soft targets", "class weights"])
def test_compiles_to_one_graph(case):
    criterion, labels = (FUSED | NOT_FUSED)[case]
    if isinstance(criterion, nn.Module):
        criterion = criterion.float()
    loss = DistillationLoss(criterion, Teacher().to(DEVICE), "hard", 0.5, 1.0)
    call = torch.randn(5, 6, device=DEVICE), tuple(student_outputs()), labels()
    torch.compiler.reset()
    with backends.use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(*call), loss(*call)
        for a, b in zip(*(torch.autograd.grad(x, call[1]) for x in (got, expected)), strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(got, expected)


# ---- DistillationCrossEntropy


def test_the_module_is_the_op():
    outputs, labels, t = student_outputs(), soft_labels(), torch.randn(5, CLASSES, device=DEVICE)
    options = dict(kind="soft", alpha=0.2, tau=3.0, reduction="sum", base="binary_cross_entropy", soft_divisor="batch")
    got = DistillationCrossEntropy(**options)(outputs, labels, t)
    assert torch.equal(got, losses.distillation_cross_entropy(*outputs, labels, t, **options))


def test_one_output_serves_both_terms():
    z, labels, t = student_outputs()[0], index_labels(), torch.randn(5, CLASSES, device=DEVICE)
    got = DistillationCrossEntropy("hard", 0.25)(z, labels, t)
    torch.testing.assert_close(got, 0.75 * F.cross_entropy(z, labels) + 0.25 * F.cross_entropy(z, t.argmax(1)))


def test_cached_labels_serve_as_the_teacher():
    outputs, labels, t = student_outputs(), index_labels(), torch.randn(5, CLASSES, device=DEVICE)
    loss = DistillationCrossEntropy(label_smoothing=0.1)
    assert torch.equal(loss(outputs, labels, t), loss(outputs, labels, t.argmax(1).to(torch.int16)))


def test_without_a_base_the_second_of_a_pair_is_distilled_alone():
    outputs, t = student_outputs(), torch.randn(5, CLASSES, device=DEVICE)
    got = DistillationCrossEntropy("hard", base="none")(outputs, None, t)
    torch.testing.assert_close(got, F.cross_entropy(outputs[1], t.argmax(1)))


@pytest.mark.parametrize("check_indices", [False, True])
def test_the_debug_switch_reaches_the_op(check_indices):
    with mock.patch.object(losses, "distillation_cross_entropy") as op:
        DistillationCrossEntropy(check_indices=check_indices)(student_outputs(), index_labels(), index_labels())
    assert op.call_args.kwargs["check_indices"] is check_indices


def test_repr_shows_the_options():
    text = repr(DistillationCrossEntropy("soft", tau=3.0))
    assert "kind='soft'" in text and "tau=3.0" in text
    assert "distillation_type='none'" in repr(DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0))


# ---- timm's training tasks


def small_student():
    model = timm.models.deit.VisionTransformerDistilled(
        img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=1, num_classes=CLASSES
    )
    model.set_distilled_training(True)
    model.pretrained_cfg = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    return model.train()


class FusedTokenDistillation(timm.task.TokenDistillationTask):
    """timm's task with its two criteria in one pass."""

    def forward(self, input, target):
        outputs = self.trainable_module(input)
        with torch.no_grad():
            teacher = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        loss = DistillationCrossEntropy(
            self.distill_type, self.distill_loss_weight, self.temperature, soft_divisor="batch"
        )
        return {"loss": loss(outputs, target, teacher), "output": outputs[0]}


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_stands_in_for_the_criteria_of_timms_token_distillation_task(kind):
    student, teacher = small_student().to(DEVICE), small_student().to(DEVICE)
    options = dict(distill_type=kind, task_loss_weight=0.7, temperature=3.0, device=DEVICE, verbose=False)
    tasks = [
        make(student, teacher, nn.CrossEntropyLoss(), **options)
        for make in (timm.task.TokenDistillationTask, FusedTokenDistillation)
    ]
    images, labels = torch.randn(4, 3, 32, 32, device=DEVICE), torch.randint(CLASSES, (4,), device=DEVICE)
    gradients = []
    for task in tasks:
        student.zero_grad()
        task(images, labels)["loss"].backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
    torch.testing.assert_close(*gradients)


def test_serves_as_the_criterion_of_timms_classification_task():
    model = small_student().to(DEVICE)
    model.set_distilled_training(False)
    images, labels = torch.randn(4, 3, 32, 32, device=DEVICE), torch.randint(CLASSES, (4,), device=DEVICE)
    criteria = timm.loss.LabelSmoothingCrossEntropy(0.1), DistillationCrossEntropy("none", label_smoothing=0.1)
    timms, ours = (
        timm.task.ClassificationTask(model, criterion, device=DEVICE, verbose=False)(images, labels)["loss"]
        for criterion in criteria
    )
    torch.testing.assert_close(ours, timms)


@pytest.mark.parametrize(
    "outputs, error, message",
    [
        (3, ValueError, "got 3 outputs"),
        (1, ValueError, "got 1 outputs"),
        (0, ValueError, "got 0 outputs"),
        ({"logits": 1}, TypeError, "got dict"),
        (None, TypeError, "got NoneType"),
        ("mixed", TypeError, "got a pair with int"),
    ],
)
@pytest.mark.parametrize("kind", ["none", "hard"])
def test_outputs_that_are_no_pair_are_named(outputs, error, message, kind):
    logits = student_outputs()[0].detach()
    if isinstance(outputs, int):
        outputs = (logits,) * outputs
    outputs = (logits, 5) if outputs == "mixed" else outputs
    expected = rf"outputs: expected a \(B, C\) tensor or a pair of them, .*, {message}"
    with pytest.raises(error, match=expected):
        DistillationLoss(nn.CrossEntropyLoss(), lambda x: logits, kind, 0.5, 1.0)(None, outputs, index_labels())
    with pytest.raises(error, match=expected):
        DistillationCrossEntropy(kind)(outputs, index_labels(), logits)
