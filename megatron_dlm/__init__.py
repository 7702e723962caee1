"""Pretrain autoregressive and diffusion language models side by side on Megatron Core."""

__version__ = "0.1.0"
