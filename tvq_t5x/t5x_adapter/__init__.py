"""What T5X needs besides the model object: an optimizer and a trainer. Imports T5X."""
