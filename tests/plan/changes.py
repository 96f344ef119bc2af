"""Changes to an accelerated model that its next call must see."""

import copy

import torch
from torch import nn

import fastdeit


class LoRA(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(192, 4).cuda(), nn.Linear(4, layer.out_features).cuda()

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def replaced_data(parameter):
    parameter.data = parameter.data.clone()


def transposed_data(parameter):
    parameter.data = parameter.data.t()


def own_forward(module):
    module.forward = lambda x, forward=module.forward: forward(x)


def hidden_hook(module):
    module._forward_hooks = type(module._forward_hooks)()
    module.register_forward_hook(lambda *_: None)


CHANGES = {
    "a hook on a projection": lambda m: m.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None),
    "a hook before a block": lambda m: m.blocks[1].register_forward_pre_hook(lambda *_: None),
    "a backward hook on an Identity": lambda m: m.blocks[1].ls1.register_full_backward_hook(lambda *_: None),
    "a hook on the container": lambda m: m.blocks.register_forward_hook(lambda *_: None),
    "a hook on inactive dropout": lambda m: m.pos_drop.register_forward_hook(lambda *_: None),
    "a hook on what does nothing": lambda m: m.norm_pre.register_forward_hook(lambda *_: None),
    "a hook in another dictionary": lambda m: hidden_hook(m.blocks[1].attn.qkv),
    "LoRA": lambda m: setattr(m.blocks[1].attn, "qkv", LoRA(m.blocks[1].attn.qkv)),
    "a forward on the instance": lambda m: own_forward(m.blocks[1].attn.proj),
    "a parametrization": lambda m: nn.utils.parametrize.register_parametrization(
        m.blocks[1].mlp.fc2, "weight", nn.Identity()
    ),
    "another parameter": lambda m: setattr(m.blocks[1].norm1, "weight", nn.Parameter(torch.ones(192, device="cuda"))),
    "another position embedding": lambda m: setattr(m, "pos_embed", nn.Parameter(m.pos_embed.detach().clone())),
    "other data": lambda m: replaced_data(m.blocks[1].norm1.weight),
    "other data of the patch embedding": lambda m: replaced_data(m.patch_embed.proj.weight),
    "other data of the final norm": lambda m: replaced_data(m.norm.bias),
    "other data of a head": lambda m: replaced_data(m.head_dist.weight),
    "a hook on a head": lambda m: m.head.register_forward_hook(lambda *_: None),
    "a hook before the heads": lambda m: m.head_drop.register_forward_hook(lambda *_: None),
    "a hook on the norm of pooled tokens": lambda m: m.fc_norm.register_forward_hook(lambda *_: None),
    "LoRA at a head": lambda m: setattr(m, "head", LoRA(m.head)),
    "another head": lambda m: (
        setattr(m, "head", nn.Linear(192, 10).cuda()) or setattr(m, "head_dist", nn.Linear(192, 10).cuda())
    ),
    "no head": lambda m: m.reset_classifier(0),
    "an excluded head": lambda m: fastdeit.accelerate(m, exclude="head"),
    "active dropout before the heads": lambda m: setattr(m.head_drop, "p", 0.1) or m.head_drop.train(),
    "a method of its own": lambda m: setattr(m, "forward_head", m.forward_head),
    "the same data transposed": lambda m: transposed_data(m.blocks[1].attn.proj.weight),
    "weights in bf16": lambda m: m.blocks.bfloat16(),
    "one weight in bf16": lambda m: m.blocks[1].mlp.fc1.bfloat16(),
    "train()": lambda m: m.train(),
    "another class": lambda m: setattr(m.blocks[1].mlp.fc1, "__class__", type("Other", (nn.Linear,), {})),
    "another block": lambda m: m.blocks.__setitem__(1, copy.deepcopy(m.blocks[0])),
    "one block less": lambda m: m.blocks.__delitem__(1),
    "attention not fused": lambda m: setattr(m.blocks[1].attn, "fused_attn", False),
    "another epsilon": lambda m: setattr(m.blocks[1].norm1, "eps", 1e-3),
    "active dropout": lambda m: setattr(m.blocks[1].attn.attn_drop, "p", 0.1) or m.blocks[1].attn.attn_drop.train(),
    "a pool over all tokens": lambda m: setattr(m, "global_pool", "avg"),
    "memory": lambda m: fastdeit.accelerate(m, memory="lean"),
    "an excluded part": lambda m: fastdeit.accelerate(m, exclude="blocks.1.attn"),
    "restore": fastdeit.restore,
}
