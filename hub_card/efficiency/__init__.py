"""What reflecting costs at inference, beside the stock Qwen2.5-VL: `vreflection efficiency`."""
