"""What the page says."""

from .overlay import Frame, colour_stops


HEADER = """
<h1>V-Reflection</h1>
<p>A vision-language model that looks again while it thinks. Before it answers it takes a few <em>latent steps</em>, which
are fed vectors instead of words. Pick a picture, ask, and see where each step looks.</p>
"""

# What the map of a source shows; the key is one of `SOURCES`.
READING = {
    "dac": "how the attention of DAC, a small cross-attention module, spreads over the picture when the model's state at "
    "that step queries it",
    "llm": "how the language model's own attention from that step, averaged over layers and heads, spreads over the picture",
}

NOTES = """
**The map** shows {reading}. It says where the model attends. It doesn't say that the answer depends on it.

**The plain backbone** is the same model, asked the same without any latent step.
"""

# Measured in docs/results.md.
EMBEDDED_NOTES = """
**This checkpoint** has a few million parameters and knows nothing but scenes like the examples. Each of them asks for the end of
a chain of three shapes. The first latent step nearly always looks at the first shape, the second at the next one, and the others
at the last. Its answers need the latents: with zeros, noise or another picture's in their place they are right by chance alone. Its
plain answer is nonsense, which is no evidence for the latents: its last training had a reflection in every answer.
"""

NO_REFLECTION = (
    "The model answered without a reflection, so there is no map. The options below can make it begin with one."
)


def caption_of(frame: Frame | None) -> str:
    """The line under the map, with its colour scale; for no frame at all it says why."""
    if frame is None:
        return f"<p>{NO_REFLECTION}</p>"
    colours = ", ".join(colour_stops())
    return (
        f'<div class="legend"><b>{frame.name}</b><span class="scale">0 %<i style="background: linear-gradient(90deg, '
        f'{colours})"></i>{frame.most * 100:.0f} % on one patch</span></div>'
    )
