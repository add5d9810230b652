"""The page in gradio: what stands on it, and what happens when something is pressed.

Visitors share the model, whose questions wait in one queue, and nothing else.
"""

import html
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import torch
from starlette.middleware import Middleware

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor
from modeling_vreflection.decoding_vreflection import LATENT_FEEDBACK

from ..errors import InputError
from ..glyphsearch import draw_chain
from ..glyphsearch.likeness import unlike_note
from ..inference.attention_maps import offered_sources
from .answering import answer_each_way
from .frames import FrameStore
from .guard import Page, RequestGuard
from .in_browser import HIDE_ANSWER, REMEMBER_PLACE, SHOW_ANSWER
from .overlay import Frame, draw_frames
from .texts import EMBEDDED_NOTES, HEADER, HINT, NOTES, READING, caption_of
from .uploaded_picture import MAX_BYTES, open_upload
from .uploads import Uploads, private_folder
from .zero_gpu import on_gpu


STYLE = Path(__file__).with_name("style.css")
MAX_LATENT_STEPS = 16
MAX_QUESTION = 1000
# Before the field scrolls; a question of that length takes fewer on a phone.
QUESTION_LINES = 60
# Scenes of the split that no training has seen, each with a question for the end of a chain.
EXAMPLE_SEEDS = (3, 7, 11, 12, 23, 40)
# Seconds: every half hour, delete uploads and heatmaps older than an hour.
CLEANING = (1800, 3600)
WAITING_VISITORS = 32
EMPTY = "(an empty answer)"
# Uploads are checked while an answer is written; a large picture takes some 600 MB for that moment.
CHECKS_AT_ONCE = 4
# Sessions of which gradio keeps what stands in the fields, at most some 100 KB each.
MAX_SESSIONS = 1000


def build_page(
    model: VReflectionForConditionalGeneration, processor: VReflectionProcessor, embedded: bool = False
) -> Page:
    """Builds the page, which `launch_page` starts; about the `embedded` checkpoint it says what was measured."""

    def decode(*asked):
        # In one function what needs the GPU; nothing that goes in or comes out holds the model or lives on a GPU.
        yield from answer_each_way(model, processor, *asked)

    uploads = Uploads(private_folder().name)
    with Page(uploads, analytics_enabled=False, title="V-Reflection", delete_cache=CLEANING) as page:
        gr.HTML(HEADER, elem_id="header")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=5, min_width=320):
                picture, ask, asked = add_inputs(model)
            with gr.Column(scale=6, min_width=320):
                outputs = add_outputs()
        notes = NOTES.format(reading=READING[offered_sources(model.config)[0]]) + (EMBEDDED_NOTES if embedded else "")
        gr.Markdown(notes, elem_id="notes")
        add_events(on_gpu(decode), unlike_note if embedded else lambda _: None, picture, ask, asked, *outputs)
    uploads.examples.update(picture.keep_in_cache)
    # Attention is read by hooks on the one model, so one question at a time, and none beside the queue.
    return page.queue(default_concurrency_limit=1, max_size=WAITING_VISITORS, api_open=False)


def add_inputs(model: VReflectionForConditionalGeneration) -> tuple[gr.Image, gr.Button, list[gr.Component]]:
    """Adds the fields that a visitor fills in: the picture, the button, and the others in the order of `answer_each_way`."""
    defaults = model.reflection_options()
    examples = [[scene.image, asked.text] for scene, asked in (draw_chain("test", seed) for seed in EXAMPLE_SEEDS)]
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
            max_lines=QUESTION_LINES,
            scale=5,
            min_width=280,
            elem_id="question",
        )
        ask = gr.Button("Ask", variant="primary", scale=1, min_width=96, elem_id="ask")
    zeroed = gr.Checkbox(
        label="Zero the latents",
        value=False,
        info="Asks once more, with zeros in place of every latent: does the answer break?",
        elem_id="zero-latents",
    )
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
            value=defaults.reflect is True,
            info="Otherwise the model decides.",
            elem_id="always-reflect",
        )
    return picture, ask, [question, latent_steps, latent_feedback, always, zeroed]


def add_outputs() -> list[gr.Component]:
    """Adds and returns the hint that stands there first, and what is shown instead of it once something was asked.

    These are the column of all others, the three answers, and the heatmap with its slider and caption.
    """
    hint = gr.HTML(HINT, elem_id="hint")
    with gr.Column(visible=False, elem_id="results") as results:
        with gr.Row(elem_id="answers", equal_height=True):
            field = {"max_lines": 12, "interactive": False, "min_width": 110}
            answer = gr.Textbox(label="With latent steps", elem_id="answer", **field)
            broken = gr.Textbox(label="Latents zeroed", elem_id="zeroed", visible=False, **field)
            plain = gr.Textbox(label="Plain backbone", elem_id="plain", **field)
        heatmap, step, caption = add_heatmap()
    return [hint, results, answer, broken, plain, heatmap, step, caption]


def add_heatmap() -> tuple[gr.Image, gr.Slider, gr.HTML]:
    """Adds and returns the heatmap, its slider and its caption."""
    heatmap = gr.Image(
        label="Where it looks",
        format="webp",
        height=400,
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="heatmap",
    )
    step = gr.Slider(
        0,
        1,
        0,
        step=1,
        label="All looks, or one latent step",
        interactive=True,
        visible=False,
        buttons=[],
        elem_id="step",
    )
    caption = gr.HTML(elem_id="caption")
    return heatmap, step, caption


def add_events(decode, note_about, picture, ask, asked, *outputs) -> None:
    """Adds what happens when something is pressed, moved or uploaded.

    `decode` is `answer_each_way` with the model, `note_about` a picture is what stands beside its answer; the fields are those of the functions above.
    """
    hint, results, answer, broken, plain, heatmap, step, caption = outputs
    frames = FrameStore()

    def answer_question(payload, text, count, fed_back, begin, zero, request: gr.Request) -> Iterator[dict]:
        with errors_on_page():
            opened = open_upload(payload["path"], payload["orig_name"])
            check_options(text, count, fed_back)
            frames.put(request.session_hash, [])
            answer_field = gr.Textbox("", info=note_about(opened) or "")
            yield {
                **{hint: gr.HTML(visible=False), results: gr.Column(visible=True), answer: answer_field, plain: ""},
                **{
                    broken: gr.Textbox("", visible=bool(zero)),
                    heatmap: None,
                    step: gr.Slider(visible=False),
                    caption: "",
                },
            }
            for progress in decode(opened, text.strip(), int(count), fed_back, begin, bool(zero)):
                if progress.maps is None:
                    yield {answer: progress.answer}
                elif progress.plain is not None:
                    yield {plain: progress.plain}
                elif progress.zeroed is not None:
                    yield {broken: progress.zeroed}
                else:  # the maps have just come
                    drawn = draw_frames(opened, progress.maps)
                    frames.put(request.session_hash, drawn)
                    yield {answer: progress.answer or EMPTY, **show_frames(drawn)}
            yield {plain: progress.plain or EMPTY, **({broken: progress.zeroed or EMPTY} if zero else {})}

    def show_frames(drawn: list[Frame]) -> dict:
        if not drawn:
            return {caption: caption_of(None)}
        slider = gr.Slider(maximum=len(drawn) - 1, value=0, visible=True)
        return {step: slider, **show_frame(drawn[0])}

    def show_frame(frame: Frame) -> dict:
        return {heatmap: frame.image, caption: caption_of(frame)}

    def show_step(number, request: gr.Request) -> dict:
        with errors_on_page():
            return show_frame(frames.get(request.session_hash, number))

    askings = [ask.click, asked[0].submit, asked[-1].input]
    gr.on(askings, js=REMEMBER_PLACE, api_visibility="private")
    answer.change(None, answer, js=SHOW_ANSWER, api_visibility="private")
    # While an answer comes, asking again is ignored; the switch isn't, or its place would belie the answer.
    asking = [
        gr.on(
            triggers,
            answer_question,
            [picture, *asked],
            outputs,
            preprocess=False,  # gradio's own opens the picture, and has no words for a broken one
            show_progress="minimal",
            show_progress_on=[heatmap],
            trigger_mode=mode,
            api_visibility="private",
        )
        for triggers, mode in ((askings[:-1], "once"), (askings[-1:], "always_last"))
    ]
    step.input(
        show_step,
        step,
        [heatmap, caption],
        preprocess=False,
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
    )
    picture.change(None, outputs=[hint, results], js=HIDE_ANSWER, cancels=asking, api_visibility="private")
    checked = picture.upload(
        check_upload,
        picture,
        preprocess=False,
        show_progress="hidden",
        concurrency_limit=CHECKS_AT_ONCE,
        api_visibility="private",
    )
    checked.failure(lambda: None, outputs=picture, queue=False, api_visibility="private")


def launch_page(page: Page, **options) -> str:
    """Starts the page in the background, without telemetry or a tunnel, and returns its address; see gradio's `launch`."""
    theme = gr.themes.Default(
        primary_hue="violet",
        neutral_hue="slate",
        radius_size="lg",
        font=["ui-sans-serif", "system-ui", "sans-serif"],  # none is fetched from anywhere
        font_mono=["ui-monospace", "monospace"],
    ).set(checkbox_border_color="*neutral_500", checkbox_border_color_dark="*neutral_400")
    _, address, _ = page.launch(
        theme=theme,
        css_paths=STYLE,
        footer_links=[],
        max_file_size=MAX_BYTES,
        state_session_capacity=MAX_SESSIONS,
        app_kwargs={"middleware": [Middleware(RequestGuard, uploads=page.uploads)]},
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        quiet=True,
        prevent_thread_lock=True,
        **options,
    )
    return address


@contextmanager
def errors_on_page() -> Iterator[None]:
    """Turns wrong pictures and settings into messages on the page."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise gr.Error("This picture takes more memory than the GPU has. Try a smaller one.") from error
    except ValueError as error:  # InputError, and what `generate` says of options that don't fit the checkpoint
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def check_upload(payload: dict) -> None:
    """Says at once what is wrong with an upload, not only when a question is asked."""
    with errors_on_page():
        open_upload(payload["path"], payload["orig_name"])


def check_options(question: str, latent_steps: float | None, latent_feedback: str) -> None:
    """Checks what the page's own fields wouldn't let through."""
    if not isinstance(question, str) or not question.strip():
        raise InputError("Ask a question about the picture.")
    if len(question) > MAX_QUESTION:
        raise InputError(f"The question has {len(question)} characters; this page takes up to {MAX_QUESTION}.")
    if latent_steps not in range(1, MAX_LATENT_STEPS + 1):  # nothing at all, where somebody emptied the field
        raise InputError(f"Latent steps are a whole number from 1 to {MAX_LATENT_STEPS}.")
    if latent_feedback not in LATENT_FEEDBACK:
        raise InputError(f"Feedback is one of {', '.join(LATENT_FEEDBACK)}.")
