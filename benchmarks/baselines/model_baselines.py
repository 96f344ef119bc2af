"""Whole models of other libraries with timm's weights, so that they give timm's logits."""

import torch
from torch import Tensor, nn

from fastdeit.benchmarks.baselines.op_baselines import imported


def hf_deit(model: nn.Module) -> nn.Module:
    """Hugging Face's DeiT with the weights of timm's distilled DeiT, in its dtype, on its device, in evaluation mode.

    Raises:
        NotInstalled: there is no transformers.
        ValueError: the model is not a distilled DeiT, or transformers' parameters are named otherwise than in version 5.
    """
    config_class = imported("transformers", "DeiTConfig")
    model_class = imported("transformers", "DeiTForImageClassificationWithTeacher")
    if not hasattr(model, "head_dist"):
        raise ValueError(f"model: expected a distilled DeiT, got {type(model).__name__}")
    block = model.blocks[0]
    config = config_class(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act="gelu",
        layer_norm_eps=block.norm1.eps,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        num_labels=model.num_classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    parameter = next(model.parameters())
    theirs = model_class(config).to(parameter.device, parameter.dtype).eval()
    weights = hf_weights(model.state_dict(), len(model.blocks))
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    missing = [name for name in missing if "mask_token" not in name]
    if missing or unexpected:
        raise ValueError(
            f"transformers: expected the parameter names of version 5, it lacks or adds {[*missing, *unexpected][:3]}"
        )
    return theirs


class HfDeit:
    """`hf_deit`, made when it is first called: images -> logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.theirs: nn.Module | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.theirs is None:
            self.theirs = hf_deit(self.model)
        return self.theirs(images).logits


def hf_weights(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """timm's state_dict by transformers' names; the packed projection of queries, keys and values in three."""
    found = {
        "deit.embeddings.cls_token": weights["cls_token"],
        "deit.embeddings.distillation_token": weights["dist_token"],
        "deit.embeddings.position_embeddings": weights["pos_embed"],
    }
    whole = {
        "patch_embed.proj": "deit.embeddings.patch_embeddings.projection",
        "norm": "deit.layernorm",
        "head": "cls_classifier",
        "head_dist": "distillation_classifier",
    }
    for block in range(depth):
        there = f"deit.layers.{block}"
        whole |= {
            f"blocks.{block}.norm1": f"{there}.layernorm_before",
            f"blocks.{block}.attn.proj": f"{there}.attention.o_proj",
            f"blocks.{block}.norm2": f"{there}.layernorm_after",
            f"blocks.{block}.mlp.fc1": f"{there}.mlp.fc1",
            f"blocks.{block}.mlp.fc2": f"{there}.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            parts = torch.chunk(weights[f"blocks.{block}.attn.qkv.{kind}"], 3)
            found |= {f"{there}.attention.{name}_proj.{kind}": p for name, p in zip("qkv", parts, strict=True)}
    return found | {f"{b}.{kind}": weights[f"{a}.{kind}"] for a, b in whole.items() for kind in ("weight", "bias")}
