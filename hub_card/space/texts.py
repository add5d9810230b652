"""What the page says."""

from .overlay import Frame, scale_background


HEADER = """
<h1>V-Reflection</h1>
<p>A vision-language model that looks again while it thinks. Before it answers it takes a few <em>latent steps</em>, which
are fed vectors instead of words. Pick a picture, ask, and see where it looks.</p>
"""

HINT = """
<p>Press <b>Ask</b>: here come the answer, and on the picture each of the model's looks, numbered in their order. Then switch
<b>Zero the latents</b> on, and the same question is also answered with zeros in place of what the model saw.</p>
"""

# What the map of a source shows; the key is one of `SOURCES`.
READING = {
    "dac": "how the attention of DAC, a small cross-attention module, spreads over the picture when the model's state at "
    "that step queries it",
    "llm": "how the language model's own attention from that step, averaged over layers and heads, spreads over the picture",
}

NOTES = """
**The map** shows {reading}. The picture is clear where a step looks and veiled elsewhere. Successive steps that share
half of their attention are one look, and its box is the smallest that holds half of it. It says where the model attends. It doesn't
say that the answer depends on it.

**Zero the latents** asks the same model the same, and feeds zeros wherever it would feed a latent. If the answer stays, it didn't
depend on the latents.

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
    """The lines under the map: its colour scale, and the looks if it shows them; for no frame at all why there is none."""
    if frame is None:
        return f"<p>{NO_REFLECTION}</p>"
    legend = (
        f'<div class="legend"><b>{frame.name}</b><span class="scale">0 %'
        f'<i style="background: {scale_background(frame.picture)}"></i>{frame.most * 100:.3g} % on one patch</span></div>'
    )
    lines = []
    for number, looks in enumerate(frame.looks, 1):
        for look in looks:
            steps = f"step {look.steps[0]}" if len(look.steps) == 1 else f"steps {look.steps[0]} to {look.steps[-1]}"
            which = f"reflection {number}, " if len(frame.looks) > 1 else ""
            lines.append(f"<li>{which}{steps}: {look.inside:.0%} in the box, {look.outside:.0%} elsewhere</li>")
    return legend + (f'<ol class="looks">{"".join(lines)}</ol>' if lines else "")
