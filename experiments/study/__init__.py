"""The paper's ablations, and the tests that it lacks, with the tiny model on GlyphSearch."""
