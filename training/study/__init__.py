"""`vreflection-train study`: the paper's ablations in miniature, and whether the latents matter."""
