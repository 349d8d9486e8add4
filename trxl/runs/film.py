"""An episode as a GIF, and whether a file can be written at all."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from trxl.config import ConfigError

FRAME_MILLISECONDS = 100
CAPTION_PIXELS = 18
LEAST_PIXELS = 160  # of a picture's width and height, for the caption to fit below it


def with_caption(pixels: np.ndarray, text: str) -> Image.Image:
    """A picture (height, width, 3), a small one enlarged, with a line of text below it."""
    enlarged = max(1, LEAST_PIXELS // min(pixels.shape[:2]))
    pixels = pixels.repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    height, width, _ = pixels.shape
    picture = Image.new("RGB", (width, height + CAPTION_PIXELS))
    picture.paste(Image.fromarray(pixels))
    ImageDraw.Draw(picture).text((4, height + 3), text, fill="white")
    return picture


def write_gif(path: Path, frames: list[Image.Image]) -> None:
    """Writes pictures as a film that starts over at its end."""
    first, *others = [frame.quantize(64) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=FRAME_MILLISECONDS, loop=0)


def check_writable(key: str, path: Path, suffix: str) -> None:
    """Raises a ConfigError where the file has another ending or can't be written."""
    if path.suffix.lower() != suffix:
        raise ConfigError(f"{key}: {path} must end in {suffix}")
    there = path.exists()
    try:
        open(path, "ab").close()
    except OSError as error:
        raise ConfigError(f"{key}: can't write to {path}: {error.strerror}") from error
    if not there:
        path.unlink()
