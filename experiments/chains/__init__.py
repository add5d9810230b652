"""When latents work: chains of looks, the arms that are compared, and the embedded checkpoint."""
