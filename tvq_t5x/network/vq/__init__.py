"""Vector-quantized attention: codebooks, compressed cache, and attention of blocks and tokens."""
