"""What happens to a whole batch, on the device: normalisation, random erasing, mixup and CutMix, and the loss's targets."""

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from fastdeit.train.config import Config


class BatchAugmentation:
    """timm's random erasing and mixup on batches as `TrainLoader` gives them.

    All randomness is drawn from the generators that `seed_step` seeds, which is to be called before: then a batch depends on
    (seed, step, rank) and its images alone.

    Args:
        config: of the run.
        num_classes: of the data set.
        device: of the batches.
    """

    def __init__(self, config: Config, num_classes: int, device: torch.device) -> None:
        self.config = config
        self.num_classes = num_classes
        self.mean = torch.tensor(config.mean, device=device).view(-1, 1, 1) * 255
        self.std = torch.tensor(config.std, device=device).view(-1, 1, 1) * 255
        self.erasing = None
        if config.reprob:
            self.erasing = RandomErasing(
                config.reprob, mode=config.remode, max_count=config.recount, device=str(device)
            )
        self.mixup = None
        if config.mixes:
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                cutmix_minmax=config.cutmix_minmax,
                prob=config.mixup_prob,
                switch_prob=config.mixup_switch_prob,
                mode=config.mixup_mode,
                label_smoothing=config.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, classes: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32, and targets: soft ones (B, classes) with mixup or bce_loss, else classes (B,) as they were.

        Args:
            images: (B, C, H, W) uint8; float images are taken as normalised, and changed in place.
            classes: (B,) int64.
            epoch: counted from 0; mixup_off_epoch depends on it.
        """
        c = self.config
        if images.dtype == torch.uint8:
            images = images.float().sub_(self.mean).div_(self.std)
        if self.erasing is not None:
            images = self.erasing(images)
        targets = classes
        if self.mixup is not None:
            self.mixup.mixup_enabled = not (c.mixup_off_epoch and epoch >= c.mixup_off_epoch)
            images, targets = self.mixup(images, classes)
        elif c.bce_loss:
            targets = mixup_target(classes, self.num_classes, smoothing=c.smoothing)
        if c.bce_target_thresh is not None:
            targets = (targets > c.bce_target_thresh).to(targets.dtype)
        return images, targets
