"""What reflections cost in decoding, beside the stock Qwen2.5-VL of the same weights (Tab. 3e)."""
