"""Training data: readers, mixing, measuring without a model, and what a data set holds."""
