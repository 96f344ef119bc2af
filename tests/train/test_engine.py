"""The step: keyed randomness, distillation, the moving average, and the stop at a loss that is not finite."""

import copy
from unittest import mock

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from fastdeit.train import engine, sampling
from fastdeit.train.config import Config
from fastdeit.train.datasets import load_data
from fastdeit.train.distributed import World
from fastdeit.train.engine import Trainer, create_criterion
from fastdeit.train.evaluation import evaluate
from fastdeit.train.models import create_student
from fastdeit.train.monitor import NonFiniteLossError
from fastdeit.train.sampling import eval_loader

CPU = torch.device("cpu")


def make_trainer(config):
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).eval().requires_grad_(False)
    return Trainer(config, create_student(config, 3, CPU), teacher, load_data(config).train, 3)


@pytest.fixture
def trainer(small_config):
    return make_trainer(small_config)


def weights(module):
    return copy.deepcopy(module.state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_epoch_gives_the_same_bits_whatever_was_drawn_before(small_config):
    ends = []
    for before in (1, 2):
        trainer = make_trainer(small_config)
        torch.manual_seed(before)
        loss = trainer.train_epoch(0, mock.Mock())
        ends.append((loss, weights(trainer.model)))
    assert ends[0][0] == ends[1][0] and same(ends[0][1], ends[1][1])


def test_another_seed_gives_other_weights(small_config, trainer):
    other = make_trainer(small_config.replace(seed=1))
    other.model.load_state_dict(trainer.model.state_dict())
    for t in (trainer, other):
        t.train_epoch(0, mock.Mock())
    assert not same(weights(trainer.model), weights(other.model))


def test_a_step_is_the_recipe_written_out(small_config):
    """One update of loss (1 - a) CE(class head, labels) + a CE(distillation head, teacher's argmax) by AdamW."""
    config = small_config.replace(
        mixup=0.0, cutmix=0.0, smoothing=0.0, drop_path=0.0, batch_size=96, warmup_epochs=0, distillation_alpha=0.3
    )
    trainer = make_trainer(config)
    by_hand = copy.deepcopy(trainer.model).train()
    optimizer = torch.optim.AdamW(
        [
            dict(
                params=[p for n, p in by_hand.named_parameters() if p.ndim <= 1 or "token" in n or "pos" in n],
                weight_decay=0,
            ),
            dict(
                params=[p for n, p in by_hand.named_parameters() if p.ndim > 1 and "token" not in n and "pos" not in n]
            ),
        ],
        lr=config.lr * 96 / config.lr_base_size,
        weight_decay=config.weight_decay,
    )
    trainer.batches.set_epoch(0)
    batch = next(iter(trainer.loader))
    sampling.seed_step(config.seed, 0)
    images, classes = trainer.augment(*batch, 0)
    class_logits, distillation_logits = by_hand(images)
    labels = trainer.criterion.teacher_model(images).argmax(1)
    loss = 0.7 * nn.functional.cross_entropy(class_logits, classes) + 0.3 * nn.functional.cross_entropy(
        distillation_logits, labels
    )
    loss.backward()
    optimizer.step()
    assert trainer.train_epoch(0, mock.Mock()) == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(trainer.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_teacher_sees_the_mixed_images_and_stays_as_it_is(small_config):
    trainer = make_trainer(small_config)
    before = weights(trainer.criterion.teacher_model)
    seen = []
    trainer.criterion.teacher_model.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].clone()))
    trainer.model.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].clone()))
    trainer.train_epoch(0, mock.Mock())
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert same(weights(trainer.criterion.teacher_model), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(trainer, bad):
    real = trainer.criterion.forward
    losses = []

    def forward(*args):
        losses.append(real(*args))
        return losses[-1] * (bad if len(losses) == 3 else 1)

    trainer.criterion.forward = forward
    kept = []
    trainer.ema.update = lambda model, step: kept.append(weights(model))
    with pytest.raises(NonFiniteLossError, match=rf"the loss is {bad} at step 2 \(epoch 0\); the last finite one was"):
        trainer.train_epoch(0, mock.Mock())
    assert trainer.last_loss == losses[1].item() and trainer.step == 2
    assert same(weights(trainer.model), kept[-1])


def test_a_gradient_is_clipped_to_the_norm(small_config):
    trainer = make_trainer(small_config.replace(clip_grad=1e-3))
    norms = []
    step = trainer.optimizer.step

    def recording_step():
        norms.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item())
        step()

    trainer.optimizer.step = recording_step
    trainer.train_epoch(0, mock.Mock())
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)


@pytest.mark.parametrize(
    "changes, kind",
    [
        (dict(), SoftTargetCrossEntropy),
        (dict(mixup=0.0, cutmix=0.0), LabelSmoothingCrossEntropy),
        (dict(mixup=0.0, cutmix=0.0, smoothing=0.0), nn.CrossEntropyLoss),
    ],
)
def test_the_criterion_follows_mixup_and_smoothing(changes, kind):
    criterion = create_criterion(Config(**changes), nn.Identity())
    assert type(criterion.base_criterion) is kind and criterion.distillation_type == "hard"


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distilling_into_the_class_token_takes_its_logits_for_both_terms(kind):
    config = Config(
        mixup=0.0, cutmix=0.0, smoothing=0.0, distil_class_token=True, distillation_type=kind, distillation_alpha=0.3
    )
    logits, teacher, classes = torch.randn(4, 5), torch.randn(4, 5), torch.arange(4)
    loss = create_criterion(config, lambda images: teacher)(None, logits, classes)
    log_probs, log_teacher = logits.log_softmax(1), teacher.log_softmax(1)
    distillation = (
        nn.functional.cross_entropy(logits, teacher.argmax(1))
        if kind == "hard"
        else nn.functional.kl_div(log_probs, log_teacher, reduction="sum", log_target=True) / logits.numel()
    )
    torch.testing.assert_close(loss, 0.7 * nn.functional.cross_entropy(logits, classes) + 0.3 * distillation)


def test_a_state_continues_where_it_was_taken(small_config, trainer):
    trainer.train_epoch(0, mock.Mock())
    other = make_trainer(small_config)
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for t in (trainer, other):
        t.train_epoch(1, mock.Mock())
    assert same(weights(trainer.model), weights(other.model))
    assert same(weights(trainer.ema.module), weights(other.ema.module)) and trainer.step == other.step == 6


def test_accuracy_counts_every_image_once(small_config):
    """24 images in batches of 32, then of 5; a model that always says class 1 is right for a third."""
    data = load_data(small_config)

    class AlwaysOne(nn.Module):
        def forward(self, images):
            return nn.functional.one_hot(torch.ones(len(images), dtype=torch.long), 3).float()

    for batch_size in (32, 5):
        results = evaluate(AlwaysOne(), eval_loader(data.val, batch_size, 0, False), small_config, CPU)
        assert results["top1"] == pytest.approx(100 / 3)
        assert results["loss"] == pytest.approx((2 * 1.5514447 + 0.5514447) / 3, rel=1e-6)  # log(e + 2) - [class is 1]


def test_evaluation_leaves_the_mode_as_it_was(small_config, trainer):
    loader = eval_loader(load_data(small_config).val, 8, 0, False)
    for training in (True, False):
        trainer.model.train(training)
        evaluate(trainer.model, loader, small_config, CPU)
        assert trainer.model.training is training


def test_the_peak_is_that_of_all_processes_together(small_config, monkeypatch):
    monkeypatch.setattr(engine, "peak_flops", lambda device: 1e12)
    monkeypatch.setattr(Trainer, "_parallel", lambda self, model: model)  # without a process group
    config = small_config.replace(distillation_type="none")
    model, data = create_student(config, 3, CPU), load_data(config).train
    assert Trainer(config, model, None, data, 3).meter.peak == 1e12
    assert Trainer(config, model, None, data, 3, World(rank=1, size=2)).meter.peak == 2e12
