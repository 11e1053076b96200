"""The network: layers, mixers, the stack, and decoding with a state of constant size."""
