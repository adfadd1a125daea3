"""What the hardware at hand computes by instructions of its own."""

from __future__ import annotations

import platform

import torch


def has_vnni() -> bool:
    """Whether this CPU multiplies 8-bit integers without intermediate saturation (VNNI); true on other than x86."""
    return not _on_x86() or torch.cpu._is_vnni_supported()


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
    if _on_x86():
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _on_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")
