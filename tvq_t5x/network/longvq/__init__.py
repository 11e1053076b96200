"""LongVQ: gated attention to quantized keys, with a state-space layer inside."""
