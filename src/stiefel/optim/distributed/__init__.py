"""Matrix optimizers on parameters that several ranks hold."""
