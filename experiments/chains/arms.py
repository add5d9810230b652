"""The arms: what an answer holds, what fills the slots in training, which losses there are, how the model decodes."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Phase:
    """A part of an arm's training.

    `slots`: `"bcm"`, Z_T; `"dac"`, Z_S in a second pass, without gradients for BCM; `None`, the slot token's own embedding.
    """

    share: float = 1.0  # of the steps
    slots: str | None = None
    lambda_bcm: float = 0.0  # of L_BCM, Eq. 2
    lambda_feat: float = 0.0  # of L_feat, Eq. 5
    lambda_attn: float = 0.0  # of L_attn, Eq. 4
    attention_target: str = "box"  # or "teacher"
    reflecting_rows: float = 1.0  # share of the rows with a reflection


PATH = (Phase(slots="bcm", lambda_feat=1.0, lambda_attn=0.1),)
MIXED = (replace(PATH[0], reflecting_rows=0.5),)
# The paper's two stages, with its weights; as many steps of each.
TWO_STAGES = (
    Phase(share=0.5, slots="bcm", lambda_bcm=0.1),
    Phase(share=0.5, slots="dac", lambda_feat=0.1, lambda_attn=0.1, attention_target="teacher"),
)


@dataclass(frozen=True)
class Arm:
    """One way to train on the rows. `decodings`: feedback of the latent steps, of which the first is the arm's own."""

    title: str
    # "glyph"; "slots glyph"; "boundaries glyph", a reflection without slots; "names" or "boxes" of all shapes of the path.
    answer: str = "slots glyph"
    phases: tuple[Phase, ...] = PATH
    decodings: tuple[str, ...] = ("dac",)
    patch_positions: str = "sincos"
    whole_path: bool = True  # a box a step; otherwise the last shape's box for all
    jitter: float = 0.0  # how far a box's sides are moved, at most, in sides of the box
    share_of_scenes: float = 1.0

    @property
    def plain_rows(self) -> bool:
        """Whether some of the rows have no reflection."""
        return any(phase.reflecting_rows < 1 for phase in self.phases)


PLAIN = Arm("", phases=(Phase(),), decodings=("text",))
PATH_ARM = Arm("path")
MAIN_ARMS = {
    "path": PATH_ARM,
    "sft": replace(PLAIN, title="SFT", answer="glyph"),
    "names": replace(PLAIN, title="words: each shape's name and glyph", answer="names"),
}
ARMS = {
    **MAIN_ARMS,
    "path_without_positions": replace(PATH_ARM, title="path, `patch_positions: none`", patch_positions="none"),
    "one_box": replace(PATH_ARM, title="one box", whole_path=False, decodings=("dac", "hidden")),
    "two_stages": replace(
        PATH_ARM, title="the paper's two stages", phases=TWO_STAGES, whole_path=False, decodings=("hidden", "dac")
    ),
    "filler": replace(PLAIN, title="filler: slots without latents", answer="slots glyph", decodings=("filler",)),
    "boundaries": replace(PLAIN, title="boundary tokens alone", answer="boundaries glyph"),
    "boxes": replace(PLAIN, title="words: each shape's box", answer="boxes"),
    "path_jitter_10": replace(PATH_ARM, title="path, boxes jittered by 10 %", jitter=0.1),
    "path_jitter_30": replace(PATH_ARM, title="path, boxes jittered by 30 %", jitter=0.3),
    "path_half": replace(PATH_ARM, title="path, half of the rows without a reflection", phases=MIXED),
    "path_quarter": replace(
        PATH_ARM,
        title="path, a quarter of the rows without a reflection",
        phases=(replace(PATH[0], reflecting_rows=0.75),),
    ),
    "path_then_half": replace(
        PATH_ARM,
        title="path, from the middle on half of the rows without a reflection",
        phases=tuple(replace(phase, share=0.5) for phase in PATH + MIXED),
    ),
    **{
        f"{name}_{denominator}": replace(
            arm, title=f"{arm.title}, 1/{denominator} of the rows", share_of_scenes=1 / denominator
        )
        for denominator in (2, 4, 8)
        for name, arm in MAIN_ARMS.items()
    },
}
