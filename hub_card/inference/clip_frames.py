"""Frames of a clip as pictures, in their order: a model of pictures looks at a moving one frame by frame."""

import math
from pathlib import Path

from PIL import Image

from modeling_vreflection.pictures_vreflection import PictureError, open_picture

from ..errors import InputError


# Each frame is a picture of the prompt, and all of them are in memory at once.
MAX_FRAMES = 32
MAX_FPS = 1000
# Seconds that a clip may lack at its end: containers round.
SLACK = 1.0


def read_frames(path: str | Path, fps: float = 1.0, max_frames: int = MAX_FRAMES) -> list[tuple[float, Image.Image]]:
    """Reads frames of a clip at equal distances in time.

    Of each span of 1/fps seconds the first frame is taken; where the clip has fewer frames a second than `fps`, all of them are.

    Args:
        path (`str` or `Path`): A file that FFmpeg reads; nothing is fetched.
        fps (`float`, *optional*, defaults to 1): Frames a second of the clip's time.
        max_frames (`int`, *optional*, defaults to 32): Refuses a clip that gives more; they aren't thinned out in silence.

    Returns:
        `list[tuple[float, Image.Image]]`: For each frame its second, counted from the first frame, and the picture of
        `open_picture`, upright.

    Raises:
        InputError: A file that is missing, damaged or ends too early, or holds no frames; `fps` that isn't above 0, or above
            1000; more than `max_frames` frames; PyAV is not installed.
    """
    if not 0 < fps <= MAX_FPS:
        raise InputError(f"frames a second must be above 0 and at most {MAX_FPS}, got {fps:g}")
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a file")
    try:
        import av
    except ImportError as error:
        raise InputError(f"{path}: PyAV, which reads clips, can't be imported ({error}): pip install av") from error

    frames, first, last_span, end = [], None, -1, 0.0
    try:
        # The whole path, for FFmpeg takes what stands before a colon for a protocol. A playlist's addresses it doesn't follow.
        with av.open(str(path.resolve()), metadata_errors="replace") as container:
            if not container.streams.video:
                raise InputError(f"{path}: holds no moving picture")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if frame.time is None:
                    raise InputError(f"{path}: its frames have no times; convert it, to MP4 for example")
                first = frame.time if first is None else first
                second = frame.time - first
                end = max(end, second + float((frame.duration or 0) * frame.time_base))
                if frame.is_corrupt:
                    raise InputError(f"{path}: damaged at {second:.2f} s")
                span = math.floor(second * fps + 1e-6)
                if span <= last_span:
                    continue
                if len(frames) == max_frames:
                    raise InputError(
                        f"{path}: more than {max_frames} frames at {fps:g} a second, which is the most; take fewer a second, "
                        "or cut the clip"
                    )
                last_span = span
                picture = frame.to_image().rotate(frame.rotation, expand=True)
                frames.append((second, open_picture(picture, f"{path}, frame at {second:.2f} s")))
            length = float((stream.duration or 0) * stream.time_base)
            if not length and len(container.streams) == 1:  # Matroska has one duration for all streams
                length = (container.duration or 0) / av.time_base
    except (av.FFmpegError, PictureError) as error:
        known = isinstance(error, PictureError)
        raise InputError(str(error) if known else f"{path}: damaged, or no clip ({error.strerror})") from error
    if not frames:
        raise InputError(f"{path}: holds no frames")
    if end < length - SLACK:
        raise InputError(f"{path}: damaged, it ends after {end:.2f} of its {length:.2f} s")
    return frames
