"""Rows from model libraries, made from a tiny config; nothing is downloaded."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .base import MISSES, NO_SAMPLES, Architecture, Claim, regress, uncovered
from .layers import mlp, vectors

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
WORDS, LENGTH = 5, 4
TEXT = {"vocab_size": WORDS, "max_position_embeddings": 8, "pad_token_id": 0}
# Made afresh at the start of training: no dropout, so that a step can be taken twice.
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def of_transformers(config: str, model: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**settings))

    return build


def text(B: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, WORDS, (B, LENGTH))}


def images(side: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda B: {"pixel_values": torch.randn(B, 3, side, side)}


def unet() -> nn.Module:
    UNet = import_module("diffusers").UNet2DModel
    return UNet(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def noisy(B: int) -> dict[str, Tensor]:
    return {"sample": torch.randn(B, 1, 8, 8), "timestep": torch.randint(100, (B,))}


def adapted() -> nn.Module:
    peft = import_module("peft")
    model = peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0", "2"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:  # past the start, at which it is zero
            nn.init.normal_(p)
    return model


def bert(
    name: str, config: str, model: str, claims: dict[str, Claim], backpack: Any = (), **settings: Any
) -> Architecture:
    build = of_transformers(config, model, **{**SMALL, **TEXT, **STILL, "num_labels": 3, **settings})
    claims = {"*position_embeddings.weight": NO_SAMPLES, **claims}
    return Architecture(name, build, text, claims, dict(backpack), needs="transformers")


def vision(name: str, claims: dict[str, Claim], inputs: Any, build: Callable[[], nn.Module]) -> Architecture:
    return Architecture(name, build, inputs, claims, needs="transformers")


CALLS = Claim("approximation", "every call counts as a sample of its own")
NO_FACTORS = uncovered("no factors for")
SHARED = uncovered("a weight is shared between transformer.wte, lm_head")

ROWS = [
    bert("bert", "BertConfig", "BertForSequenceClassification", {}),
    bert(
        "albert",
        "AlbertConfig",
        "AlbertForSequenceClassification",
        {"*layer_norm.*": CALLS, "*attention.LayerNorm.*": CALLS},
        {"*albert_layers*": MISSES},
        embedding_size=6,
        num_hidden_layers=3,
        classifier_dropout_prob=0.0,
    ),
    Architecture(
        "gpt2",
        of_transformers(
            "GPT2Config",
            "GPT2LMHeadModel",
            vocab_size=WORDS,
            n_positions=8,
            bos_token_id=0,
            eos_token_id=0,
            n_embd=8,
            n_layer=1,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        text,
        {"*wte.weight": SHARED, "*wpe.weight": NO_SAMPLES},
        needs="transformers",
    ),
    Architecture(
        "llama",
        of_transformers(
            "LlamaConfig", "LlamaForCausalLM", **SMALL, **TEXT, num_key_value_heads=1, attn_implementation="eager"
        ),
        text,
        needs="transformers",
        dtype=torch.float32,
    ),
    vision(
        "vit",
        {"*_token": NO_FACTORS, "*position_embeddings": NO_FACTORS},
        images(8),
        of_transformers(
            "ViTConfig", "ViTForImageClassification", **SMALL, **STILL, image_size=8, patch_size=4, num_labels=3
        ),
    ),
    vision(
        "swin",
        {"*relative_position_bias_table": NO_FACTORS},
        images(16),
        of_transformers(
            "SwinConfig",
            "SwinForImageClassification",
            image_size=16,
            patch_size=2,
            embed_dim=4,
            depths=[1, 2],
            num_heads=[1, 2],
            window_size=2,
            drop_path_rate=0.0,
            num_labels=3,
        ),
    ),
    Architecture("unet2d", unet, noisy, loss=regress, needs="diffusers", brute=False),
    Architecture("lora_peft", adapted, vectors(4), needs="peft"),
]
