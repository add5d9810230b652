"""From messages with pictures and boxes to model inputs."""

from collections.abc import Sequence

import torch
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, TextKwargs
from transformers.tokenization_utils_base import AddedToken

from .parts_vreflection import read_path, rendered_reflections
from .pictures_vreflection import open_pictures


LATENT_TOKENS = ("<|sovt|>", "<|lvr|>", "<|eovt|>")

THINK_TOKENS = ("<think>", "</think>")

# The backbones' conversation format. A reflection is rendered in the turn that follows the last question and dropped from
# earlier ones: what was seen there is gone. So are the thoughts (`reasoning_content`) of a backbone that thinks in words,
# whose prompt opens them; the reflection comes behind them. `{% generation %}` marks what the assistant says, for the loss.
# Text is joined before it is escaped, for a token's name may be spread over parts.
CHAT_TEMPLATE = """\
{%- set system = __SYSTEM__ -%}
{%- set thinks = __THINKS__ -%}
{%- macro plain(text) -%}
    {{- text __ESCAPES__ -}}
{%- endmacro -%}
{%- if tools -%}
    {{- raise_exception("This model has not learned to call tools: leave `tools` out.") -}}
{%- endif -%}
{%- if documents -%}
    {{- raise_exception("The chat template has no place for `documents`: put their text into a message.") -}}
{%- endif -%}
{%- set last = namespace(question=-1) -%}
{%- for message in messages if message.role == 'user' -%}
    {%- set last.question = last.question + 1 -%}
{%- endfor -%}
{%- set turn = namespace(question=-1) -%}
{%- if system and messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set turn.question = turn.question + 1 -%}
    {%- elif message.role not in ('system', 'assistant') -%}
        {{- raise_exception("A message's role is 'system', 'user' or 'assistant', not '" + message.role + "'.") -}}
    {%- endif -%}
    {%- if message.tool_calls -%}
        {{- raise_exception("This model has not learned to call tools: a message can't hold `tool_calls`.") -}}
    {%- endif -%}
    {%- if message.reasoning_content and not thinks -%}
        {{- raise_exception("This model has not learned to think in words: a message can't hold `reasoning_content`.") -}}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- set thoughts = thinks and turn.question == last.question -%}
        {{- '<think>\\n' if thoughts -}}
        {%- generation -%}
            {%- if thoughts -%}
                {{- plain(message.reasoning_content) + '\\n' if message.reasoning_content -}}
                {{- '</think>\\n\\n' -}}
            {%- endif -%}
            {%- if message.content is string -%}
                {{- plain(message.content) -}}
            {%- else -%}
                {%- set run = namespace(text='') -%}
                {%- for part in message.content -%}
                    {%- if part.type == 'reflection' -%}
                        {%- if turn.question == last.question -%}
                            {{- plain(run.text) + '__SEGMENT__' -}}
                            {%- set run.text = '' -%}
                        {%- endif -%}
                    {%- elif part.type == 'text' -%}
                        {%- set run.text = run.text + part.text -%}
                    {%- else -%}
                        {{- raise_exception("An assistant's content part is 'text' or 'reflection', not '" + part.type + "'.") -}}
                    {%- endif -%}
                {%- endfor -%}
                {{- plain(run.text) -}}
            {%- endif -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- elif message.content is string -%}
        {{- plain(message.content) + '<|im_end|>' -}}
    {%- else -%}
        {%- set run = namespace(text='') -%}
        {%- for part in message.content -%}
            {%- if part.type in ('image', 'image_url') -%}
                {%- if part.min_pixels or part.max_pixels or part.resized_height or part.resized_width -%}
                    {{- raise_exception("A picture can't be sized by its content part: set the image processor's `size`.") -}}
                {%- endif -%}
                {%- set run.text = run.text + '<|vision_start|><|image_pad|><|vision_end|>' -%}
            {%- elif part.type == 'text' -%}
                {%- set run.text = run.text + part.text -%}
            {%- else -%}
                {{- raise_exception("A content part of a user is 'text' or 'image', not '" + part.type + "'.") -}}
            {%- endif -%}
        {%- endfor -%}
        {{- plain(run.text) + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n' if thinks else '') -}}
{%- endif -%}
"""
# Arguments of the stock processors, of `forward` and of `generate` that come with videos or audio.
OTHER_MEDIA = ("videos", "audio", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
# Of `from_pretrained`, where a file of the Hub is and how to get it.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# U+2060, invisible: put into a token's name where text holds it, so that it isn't the token.
WORD_JOINER = "\u2060"


def build_chat_template(
    latent_tokens: tuple[str, str, str] = LATENT_TOKENS,
    num_latent_tokens: int = 8,
    system: str | None = None,
    thinks: bool = False,
) -> str:
    """The Jinja template for these token names and this number of slots.

    Text can't write a latent token: a word joiner, which is invisible, breaks its name up.

    Args:
        latent_tokens (`tuple[str, str, str]`, *optional*): Names of the start, slot and end token.
        num_latent_tokens (`int`, *optional*): S.
        system (`str`, *optional*): What a conversation without a system turn begins with.
        thinks (`bool`, *optional*): Whether answers begin with thoughts in words.
    """
    start, slot, end = latent_tokens
    escapes = "".join(f" | replace('{name}', '{name[:2]}{WORD_JOINER}{name[2:]}')" for name in latent_tokens)
    segment = start + slot * num_latent_tokens + end
    template = CHAT_TEMPLATE.replace("__ESCAPES__", escapes).replace("__SEGMENT__", segment)
    return template.replace("__SYSTEM__", repr(system or "")).replace("__THINKS__", str(thinks).lower())


class ReflectionProcessorMixin:
    r"""
    A backbone's image processor and tokenizer, with reflections in the chat template and boxes besides the text. No videos;
    comes before the backbone's class.

    Messages may hold, in the assistant's answer to the last question, a part
    `{"type": "reflection", "box": [x0, y0, x1, y1], "image_index": 0}`: corners as fractions of the image's sides, origin
    at the top left, and which of the conversation's images they lie in (the first, if left out). A path has `boxes` instead
    of `box`, 1 to S of them in the order of looking, and one `image_index` for all or a list with one for each.

    Args:
        image_processor (`Qwen2VLImageProcessor`): The image processor.
        tokenizer (`Qwen2Tokenizer`): The tokenizer, with the three latent tokens.
        chat_template (`str`, *optional*): A Jinja template, see `build_chat_template`.
        latent_start_token (`str`, *optional*, defaults to `"<|sovt|>"`): Name of the token that opens a segment.
        num_latent_tokens (`int`, *optional*): S, the latent steps of a reflection, as the chat template renders them and
            the model's config says. Only boxes need it.

    Attributes:
        system_message (`str`): What the backbone's conversations without a system turn begin with; `None` for nothing.
    """

    system_message: str | None = None

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        latent_start_token=LATENT_TOKENS[0],
        num_latent_tokens: int | None = None,
        **kwargs,
    ):
        self.latent_start_token = latent_start_token
        self.num_latent_tokens = num_latent_tokens
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        # Past the backbone's own constructor: its video processor alone would need torchvision.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_backbone(
        cls,
        pretrained_model_name_or_path,
        latent_tokens: tuple[str, str, str] = LATENT_TOKENS,
        num_latent_tokens: int = 8,
        **kwargs,
    ) -> "ReflectionProcessorMixin":
        """Makes a processor from a stock folder or Hub id; see the model's `from_backbone`."""
        # Prompts are padded on the left; given here, the side is saved with the tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, padding_side="left", **kwargs)
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in latent_tokens], True)
        stock_template = tokenizer.chat_template
        if stock_template is None:
            stock_template = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)[0].get("chat_template")
        thinks = rf"assistant\n{THINK_TOKENS[0]}" in str(stock_template)  # the prompt opens them
        return cls(
            AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            tokenizer,
            build_chat_template(latent_tokens, num_latent_tokens, cls.system_message, thinks),
            latent_tokens[0],
            num_latent_tokens,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "ReflectionProcessorMixin":
        """`ProcessorMixin.from_pretrained`; a folder whose processor doesn't say S takes it from its config.json."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.num_latent_tokens is None:
            options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            try:
                config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **options)
            except OSError:  # a repository of the Hub without a model
                config = {}
            processor.num_latent_tokens = config.get("num_latent_tokens")
        return processor

    @property
    def think_end_token_id(self) -> int | None:
        """Id of `</think>`, where answers begin with thoughts in words."""
        thinks = "set thinks = true" in str(self.chat_template)
        return self.tokenizer.convert_tokens_to_ids(THINK_TOKENS[1]) if thinks else None

    def __call__(self, images=None, text=None, boxes: Sequence | None = None, videos=None, audio=None, **kwargs):
        """Prepares text and images, as the backbone's processor does, and boxes.

        Args:
            images: One image or (nested) lists of them: whatever `open_picture` opens.
            text (`str` or `list[str]`): Rendered conversations.
            boxes (`list`, *optional*): For a text, or for each of several, a list with one item a reflection segment:
                `[x0, y0, x1, y1]` in [0, 1], or a message's reflection part, whose `image_index` counts within the text.

        Returns:
            `BatchFeature`: The usual keys, and with boxes `boxes` (G, S, 5), `int64`, a line for each latent step: the
            corners of its box in 1/65,536 of the image's sides, rounded inwards so that a box that ends on a patch's edge
            stays there, then the image's index within the batch. Of K boxes step k has the k-th, and all after it the last.

        Raises:
            ValueError: A picture that can't be opened, by name; a box that is no box, naming sample and box; a part with
                unknown keys, with both or neither of `box` and `boxes`, or with more than S boxes; another number of boxes
                than segments; boxes and no `num_latent_tokens`; videos, audio, and arguments that neither the tokenizer nor
                the image processor has.
        """
        refuse_other_media(videos=videos, audio=audio)
        if unknown := [name for name in kwargs if name not in self._known_arguments]:
            raise ValueError(
                f"Neither the tokenizer nor the image processor has an argument `{unknown[0]}`, so that it would be ignored."
            )
        of_steps = None
        if boxes is not None:
            texts, boxes = ([text], [boxes]) if isinstance(text, str) else (text, boxes)
            of_steps = self._boxes_of_steps(texts, boxes)
        inputs = super().__call__(images=open_pictures(images), text=text, **kwargs)
        if of_steps is not None:
            of_steps = torch.tensor(of_steps, dtype=torch.long).reshape(-1, self.num_latent_tokens, 5)
            inputs["boxes"] = of_steps.numpy() if kwargs.get("return_tensors") == "np" else of_steps
        return inputs

    def apply_chat_template(self, conversation, *args, processor_kwargs: dict | None = None, **kwargs):
        """`ProcessorMixin.apply_chat_template`, which also hands the boxes of the rendered reflections on."""
        processor_kwargs = dict(processor_kwargs or {})
        refuse_other_media(**kwargs)
        refuse_other_media(**processor_kwargs)
        single = isinstance(conversation[0], dict)
        for messages in [conversation] if single else conversation:
            refuse_other_parts(messages)
            self._refuse_special_tokens(messages)
        boxes = [rendered_reflections(messages) for messages in ([conversation] if single else conversation)]
        if kwargs.get("tokenize") and any(boxes):
            processor_kwargs["boxes"] = boxes[0] if single else boxes
        return super().apply_chat_template(conversation, *args, processor_kwargs=processor_kwargs, **kwargs)

    def _refuse_special_tokens(self, messages: list[dict]):
        """Raises a `ValueError` where a message's text holds a token's name that the tokenizer would interpret."""
        # The template itself breaks the latent tokens' names up.
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        tokens = [name for name in tokens if f"replace('{name}'" not in str(self.chat_template)]
        tokens += [] if self.think_end_token_id is None else THINK_TOKENS
        for number, message in enumerate(messages):
            text = message.get("content") or ""
            if not isinstance(text, str):  # a name may be spread over parts
                text = "".join(part.get("text") or "" for part in text if part.get("type") == "text")
            text = (message.get("reasoning_content") or "") + text
            for name in tokens:
                if name in text:
                    raise ValueError(
                        f"Message {number} ({message.get('role')}) holds {name} at character {text.index(name)} of its text, "
                        "which is a special token and can't be written: take it out, or break it up."
                    )

    @property
    def _known_arguments(self) -> set[str]:
        """What the tokenizer and the image processor take, and `ProcessorMixin` itself."""
        of_images = getattr(self.image_processor.valid_kwargs, "__annotations__", {})
        own = set(ProcessingKwargs.__annotations__) - {"videos_kwargs", "audio_kwargs"} | {"common_kwargs"}
        return own | {*TextKwargs.__annotations__, *ImagesKwargs.__annotations__, *of_images}

    def _boxes_of_steps(self, texts: list[str], boxes: Sequence) -> list[list[list[int]]]:
        """For each reflection S lines x0, y0, x1, y1, image; see `__call__`."""
        if len(boxes) != len(texts):
            raise ValueError(f"`boxes` must hold a list for each of the {len(texts)} texts, got {len(boxes)}.")
        reflections, first_image = [], 0
        for sample, (text, sample_boxes) in enumerate(zip(texts, boxes)):
            images, segments = text.count(self.image_token), text.count(self.latent_start_token)
            if len(sample_boxes) != segments:
                raise ValueError(f"Sample {sample} has {segments} reflection segments, but {len(sample_boxes)} boxes.")
            for number, item in enumerate(sample_boxes):
                part = item if isinstance(item, dict) else {"box": item}
                path = read_path(part, images, self.num_latent_tokens, number, f" of sample {sample}")
                path += path[-1:] * (self.num_latent_tokens - len(path))
                reflections.append([[*corners, first_image + image] for *corners, image in path])
            first_image += images
        return reflections


def refuse_other_media(**kwargs):
    """Raises a `ValueError` where one of `OTHER_MEDIA` is given."""
    for name in OTHER_MEDIA:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"V-Reflection looks at pictures: pass `images`, not `{'audio' if name == 'audio' else 'videos'}`."
            )


def refuse_other_parts(messages: list[dict]):
    """Raises a `ValueError` where a message holds a video or audio, before anything of it is loaded or fetched."""
    for number, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else ():
            kind = str(part.get("type"))
            if "video" in kind or "audio" in kind:
                raise ValueError(
                    f"Message {number} ({message.get('role')}) holds a part of type {kind!r}, and V-Reflection looks at "
                    "pictures: pass a video's frames as pictures."
                )


class VReflectionProcessor(ReflectionProcessorMixin, Qwen2_5_VLProcessor):
    """The processor of V-Reflection on Qwen2.5-VL; see [`ReflectionProcessorMixin`]."""

    system_message = "You are a helpful assistant."


class VReflectionQwen3VLProcessor(ReflectionProcessorMixin, Qwen3VLProcessor):
    """The processor of V-Reflection on Qwen3-VL; see [`ReflectionProcessorMixin`]."""


for processor_class in (VReflectionProcessor, VReflectionQwen3VLProcessor):
    processor_class.register_for_auto_class("AutoProcessor")
