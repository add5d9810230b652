"""The page in gradio: what stands on it, and what happens when something is pressed.

Visitors share the model, whose questions wait in one queue, and nothing else.
"""

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import torch
from PIL import Image

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor
from modeling_vreflection.generation_vreflection import LATENT_FEEDBACK

from ..errors import InputError
from ..glyphsearch import draw_question
from .answering import Progress, answer_twice, shown_source
from .overlay import Frame, draw_frames
from .texts import EMBEDDED_NOTES, HEADER, NOTES, READING, caption_of
from .upload import MAX_BYTES, open_upload
from .zero_gpu import on_gpu


Decoder = Callable[[Image.Image, str, int, str, bool], Iterator[Progress]]

STYLE = Path(__file__).with_name("style.css")
MAX_LATENT_STEPS = 16
MAX_QUESTION = 1000
# Scenes of the split that no training has seen, each with one question.
EXAMPLE_SEEDS = (3, 7, 11, 12, 23, 40)
# Of seconds: how often old uploads are looked for, and when one is old.
CLEANING = (1800, 3600)
WAITING_VISITORS = 32


def build_page(
    model: VReflectionForConditionalGeneration, processor: VReflectionProcessor, embedded: bool = False
) -> gr.Blocks:
    """Builds the page; `launch` starts it.

    Args:
        model (`VReflectionForConditionalGeneration`): The model.
        processor (`VReflectionProcessor`): Its processor.
        embedded (`bool`, *optional*, defaults to `False`): Whether this is the embedded checkpoint, about which the page
            says what was measured.
    """
    decode = make_decoder(model, processor)
    source = shown_source(model)
    defaults = model.reflection_options()
    examples = [[scene.image, asked.text] for scene, asked in (draw_question("test", seed) for seed in EXAMPLE_SEEDS)]

    with gr.Blocks(analytics_enabled=False, title="V-Reflection", delete_cache=CLEANING) as page:
        gr.HTML(HEADER, elem_id="header")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=5, min_width=320):
                picture = gr.Image(
                    examples[0][0],
                    label="Picture",
                    sources=["upload", "clipboard"],
                    type="filepath",
                    image_mode=None,
                    format="png",  # what the model sees of an example is exactly what was drawn
                    height=290,
                    buttons=[],
                    elem_id="picture",
                )
                with gr.Row(elem_id="asking"):
                    question = gr.Textbox(
                        examples[0][1],
                        label="Question",
                        max_length=MAX_QUESTION,
                        max_lines=4,
                        scale=5,
                        elem_id="question",
                    )
                    ask = gr.Button("Ask", variant="primary", scale=1, min_width=96, elem_id="ask")
                gr.Examples(
                    examples,
                    [picture, question],
                    label="Or one of these, with its question",
                    visible_columns=[0],
                    elem_id="examples",
                    api_visibility="private",
                )
                with gr.Accordion("Latent steps and feedback", open=False, elem_id="options"):
                    latent_steps = gr.Slider(
                        1,
                        MAX_LATENT_STEPS,
                        min(max(defaults.latent_steps, 1), MAX_LATENT_STEPS),
                        step=1,
                        label="Latent steps",
                        info=f"This checkpoint was trained with {model.config.num_latent_tokens}.",
                        elem_id="latent-steps",
                    )
                    latent_feedback = gr.Radio(
                        LATENT_FEEDBACK if model.config.has_dac else LATENT_FEEDBACK[:1],
                        value=defaults.latent_feedback,
                        label="Feedback",
                        info="What a step is fed: the model's own hidden state, or what DAC finds for it in the picture.",
                        elem_id="latent-feedback",
                    )
                    always = gr.Checkbox(
                        label="Always begin with a reflection",
                        info="Otherwise the model decides.",
                        elem_id="always-reflect",
                    )
            with gr.Column(scale=6, min_width=320):
                with gr.Row(elem_id="answers", equal_height=True):
                    answer = gr.Textbox(
                        label="With latent steps", max_lines=12, interactive=False, min_width=140, elem_id="answer"
                    )
                    plain = gr.Textbox(
                        label="Plain backbone", max_lines=12, interactive=False, min_width=140, elem_id="plain"
                    )
                heatmap = gr.Image(
                    label="Where it looks",
                    format="webp",
                    height=400,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="heatmap",
                )
                step = gr.Slider(
                    1, 2, 1, step=1, label="Latent step", interactive=True, visible=False, buttons=[], elem_id="step"
                )
                caption = gr.HTML(elem_id="caption")
        notes = NOTES.format(reading=READING[source]) + (EMBEDDED_NOTES if embedded else "")
        gr.Markdown(notes, elem_id="notes")
        frames = gr.State([])  # a visitor's own, dropped an hour after the tab is closed

        def answer_question(payload, text, count, fed_back, begin) -> Iterator[dict]:
            with told():
                opened = open_payload(payload)
                check_options(text, count, fed_back)
                yield {answer: "", plain: "", heatmap: None, step: gr.Slider(visible=False), caption: "", frames: []}
                drawn = None
                for progress in decode(opened, text.strip(), int(count), fed_back, begin):
                    if progress.maps is None:
                        yield {answer: progress.answer}
                        continue
                    if drawn is None:
                        drawn = draw_frames(opened, progress.maps)
                        yield {answer: progress.answer or "(an empty answer)", **show_frames(drawn)}
                    if progress.plain is not None:
                        yield {plain: progress.plain}
                if not progress.plain:
                    yield {plain: "(an empty answer)"}

        def show_frames(drawn: list[Frame]) -> dict:
            if not drawn:
                return {caption: caption_of(None)}
            last = len(drawn)  # shown first: from its state the answer goes on
            slider = gr.Slider(maximum=max(last, 2), value=last, visible=last > 1)
            return {frames: drawn, step: slider, **show_step(last, drawn)}

        def show_step(number: int, drawn: list[Frame]) -> dict:
            frame = drawn[int(number) - 1]
            return {heatmap: frame.image, caption: caption_of(frame)}

        gr.on(
            [ask.click, question.submit],
            answer_question,
            [picture, question, latent_steps, latent_feedback, always],
            [answer, plain, heatmap, step, caption, frames],
            preprocess=False,  # gradio's own opens the picture, and has no words for a broken one
            show_progress="minimal",
            show_progress_on=[heatmap],
            api_visibility="private",
        )
        step.input(
            show_step,
            [step, frames],
            [heatmap, caption],
            queue=False,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )
        checked = picture.upload(
            check_upload,
            picture,
            preprocess=False,
            show_progress="hidden",
            concurrency_limit=WAITING_VISITORS,  # nobody's upload waits for an answer
            api_visibility="private",
        )
        checked.failure(lambda: None, outputs=picture, queue=False, api_visibility="private")
    # Attention is read by hooks on the one model, so one question at a time.
    return page.queue(default_concurrency_limit=1, max_size=WAITING_VISITORS)


def launch(page: gr.Blocks, **options) -> str:
    """Starts the page in the background, without telemetry or a tunnel, and returns its address.

    Args:
        page (`gr.Blocks`): From `build_page`.
        options: Of gradio's `launch`.
    """
    theme = gr.themes.Default(
        primary_hue="violet",
        neutral_hue="slate",
        radius_size="lg",
        font=["ui-sans-serif", "system-ui", "sans-serif"],  # none is fetched from anywhere
        font_mono=["ui-monospace", "monospace"],
    )
    settings = {
        "theme": theme,
        "css_paths": STYLE,
        "footer_links": [],
        "max_file_size": MAX_BYTES,
        "share": False,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "quiet": True,
        "prevent_thread_lock": True,
    }
    return page.launch(**settings | options)[1]


def make_decoder(model: VReflectionForConditionalGeneration, processor: VReflectionProcessor) -> Decoder:
    """What needs the GPU, in one function; neither what goes in nor what comes out holds the model or anything on a GPU."""

    def decode(picture, question, latent_steps, latent_feedback, always_reflect):
        yield from answer_twice(model, processor, picture, question, latent_steps, latent_feedback, always_reflect)

    return on_gpu(decode)


@contextmanager
def told() -> Iterator[None]:
    """Turns what a visitor can mend into a message on the page."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise gr.Error("This picture takes more memory than the GPU has. Try a smaller one.") from error
    except ValueError as error:  # InputError, and what `generate` says of options that don't fit the checkpoint
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def open_payload(payload: dict | None) -> Image.Image:
    """Opens what the picture's field holds; gradio has checked that the path is an upload's."""
    if not payload or not payload.get("path"):
        raise InputError("Pick a picture first.")
    path = Path(payload["path"])
    return open_upload(path, payload.get("orig_name") or path.name)


def check_upload(payload: dict | None) -> None:
    """Says at once what is wrong with an upload, not only when a question is asked."""
    with told():
        open_payload(payload)


def check_options(question: str, latent_steps: float | None, latent_feedback: str) -> None:
    """Checks what the page's own fields wouldn't let through."""
    if not question or not question.strip():
        raise InputError("Ask a question about the picture.")
    if len(question) > MAX_QUESTION:
        raise InputError(f"The question has {len(question)} characters; this page takes up to {MAX_QUESTION}.")
    if latent_steps not in range(1, MAX_LATENT_STEPS + 1):  # nothing at all, where somebody emptied the field
        raise InputError(f"Latent steps are a whole number from 1 to {MAX_LATENT_STEPS}.")
    if latent_feedback not in LATENT_FEEDBACK:
        raise InputError(f"Feedback is one of {', '.join(LATENT_FEEDBACK)}.")
