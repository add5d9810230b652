"""Time and memory of decoding and of training, beside the stock class and trl's trainer."""
