"""What layers are computed in: the type that a recipe's ``autocast`` names, where the device has it."""

from __future__ import annotations

import platform

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 by instructions of its own, rather than by emulation.

    On an x86 CPU these are AVX512-BF16 or AMX. Without, torch 2.13 emulates: a training step of ResNet-20 in bfloat16
    took ten times as long as one in float32 where there is AVX2 alone.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        asked = getattr(torch.get_device_module(device), "is_bf16_supported", None)
        return asked is None or asked()  # Apple's does not say
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computed_in(asked: str, device: torch.device) -> torch.dtype:
    """The type that layers are computed in on ``device``: ``asked`` (a name of torch's), or float32 where the device
    would but emulate bfloat16."""
    dtype = getattr(torch, asked)
    return torch.float32 if dtype == torch.bfloat16 and not has_bfloat16(device) else dtype
