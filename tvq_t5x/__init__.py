"""Transformer-VQ: linear-time attention over vector-quantized keys, for T5X and one machine."""

__version__ = '0.1.0'
