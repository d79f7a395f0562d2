"""A picture, from whatever holds it, to the patches that the model reads.

`decode_image` gives uint8 RGB [H, W, 3]; `image_patches` resizes it to the token budget and cuts it into patches, one
soft token each. Sizes, resize and order are those of Transformers' `Gemma4UnifiedImageProcessor`, to the pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from iolite.errors import MediaError
from iolite.media import child, worker
from iolite.media.fetch import Source, label_of, read_source
from iolite.media.limits import DEFAULT_LIMITS, Limits


@dataclass(frozen=True)
class Patches:
    """The patches of one picture, one soft token each, in raster order (left to right, then down).

    pixels: float32 [n, patch_size² * 3] in [0, 1], each patch flattened as (row, column, RGB).
    positions: int64 [n, 2], (x = column, y = row) of each patch in the grid.
    grid: (rows, columns); n = rows * columns.
    """

    pixels: np.ndarray
    positions: np.ndarray
    grid: tuple[int, int]


def decode_image(
    source: Source | Image.Image | np.ndarray,
    *,
    limits: Limits = DEFAULT_LIMITS,
    media_root: Path | None = None,
    allow_urls: bool = False,
) -> np.ndarray:
    """A picture as uint8 RGB [H, W, 3]: upright by its EXIF, transparency on white, the first frame of an animation.

    source: a path, a data: URI or bytes in any format of Pillow's (`child.IMAGE_FORMATS`), decoded in a child process;
        or a PIL image; or a uint8 array [H, W] or [H, W, 1 | 3 | 4 channels]. The last two are decoded already.
    media_root, allow_urls: see `fetch.read_source`. Raises MediaError.
    """
    if isinstance(source, Image.Image):
        return _from_pil(source, limits)
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    data = read_source(source, kind="image", limits=limits, media_root=media_root, allow_urls=allow_urls)
    label = label_of(source, "image")
    answers = list(worker.decode("image", data, limits, label=label, room=3 * limits.max_pixels))
    if len(answers) != 1 or answers[0][1].ndim != 3 or answers[0][1].shape[2] != 3 or not answers[0][1].size:
        raise worker.media_error("image", label, limits, "unreadable", {})
    return answers[0][1]


def _from_pil(image: Image.Image, limits: Limits) -> np.ndarray:
    try:
        child.check_pixels(image.width, image.height, limits.max_pixels)
        return np.array(child.to_rgb(image))
    except child.Refused as refused:
        raise worker.media_error("image", "the picture", limits, refused.code, refused.values) from None
    except (OSError, ValueError, SyntaxError):  # a file that the caller opened and Pillow has not read yet
        raise worker.media_error("image", "the picture", limits, "unreadable", {}) from None


def _from_array(array: np.ndarray, limits: Limits) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise MediaError(
            f"an array of {array.dtype} {list(array.shape)} is not a picture",
            "give uint8 [height, width], or [height, width, channels] with 1, 3 or 4 channels",
        )
    grey = array.reshape(array.shape[:2]) if channels == 1 else array
    return _from_pil(Image.fromarray(grey), limits)


def resized_shape(height: int, width: int, *, max_soft_tokens: int, patch_size: int = 48) -> tuple[int, int]:
    """The (height, width) in pixels to which a picture is resized: whole patches, at most `max_soft_tokens` of them.

    The aspect ratio is kept as far as whole patches allow, and small pictures grow. A picture so long and thin that
    one side would be less than a patch gets one row (or column) of patches, the whole budget long.
    Source: `get_aspect_ratio_preserving_size` of Transformers 5.23.
    """
    assert min(height, width, max_soft_tokens) > 0
    scale = math.sqrt(max_soft_tokens * patch_size**2 / (height * width))
    rows = math.floor(scale * height / patch_size)
    columns = math.floor(scale * width / patch_size)
    if rows == 0 and columns == 0:
        # Only a budget of one token gets here, where a square's side comes out a rounding error below one patch.
        # Transformers refuses it; the JAX implementation takes one patch, and so do we.
        rows = columns = 1
    elif rows == 0:
        rows, columns = 1, max_soft_tokens
    elif columns == 0:
        rows, columns = max_soft_tokens, 1
    return rows * patch_size, columns * patch_size


def image_patches(image: np.ndarray, *, max_soft_tokens: int, patch_size: int = 48) -> Patches:
    """Resize uint8 RGB [H, W, 3] to the budget and cut it into patches; n <= `max_soft_tokens`."""
    assert image.dtype == np.uint8, image.dtype
    assert image.ndim == 3 and image.shape[2] == 3, image.shape
    height, width = resized_shape(*image.shape[:2], max_soft_tokens=max_soft_tokens, patch_size=patch_size)
    if image.shape[:2] != (height, width):
        image = _resize(image, height, width)
    rows, columns = height // patch_size, width // patch_size
    cut = image.reshape(rows, patch_size, columns, patch_size, 3).swapaxes(1, 2)  # [rows, columns, patch, patch, 3]
    pixels = cut.reshape(rows * columns, patch_size**2 * 3).astype(np.float32) * np.float32(1 / 255)
    y, x = np.divmod(np.arange(rows * columns, dtype=np.int64), columns)
    return Patches(pixels, np.stack([x, y], axis=1), (rows, columns))


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialias on uint8. Pillow's bicubic, and torch's on floats, are up to 19 levels away from this."""
    import torch

    batch = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]  # [1, 3, H, W]
    resized = torch.nn.functional.interpolate(batch, size=(height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
