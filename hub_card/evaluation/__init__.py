"""Measuring a checkpoint: GlyphSearch, the paper's benchmarks, other latents than its own."""
