"""Checkpoints on disk: their layout, writing, reading, and the settings that go with them."""
