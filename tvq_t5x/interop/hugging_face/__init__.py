"""Files that go into an exported folder: there they are the code of a Hugging Face model.

Nothing of this package imports them, and they import nothing of it.
"""
