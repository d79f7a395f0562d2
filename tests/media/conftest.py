"""What media tests share: Transformers' processors as the reference, and an encoder of sounds."""

from __future__ import annotations

import io
import types
import warnings

import numpy as np
import pytest


@pytest.fixture(scope="session")
def reference() -> types.SimpleNamespace:
    """Transformers' `image` and `video` processor classes and `audio` feature extractor class for the model.

    torchvision is built against CUDA; beside a CPU build of torch it fails while it registers shape functions for its
    own operators. Those are not needed here, so registration skips them.
    """
    torch = pytest.importorskip("torch")
    register_fake = torch.library.register_fake

    def skip_torchvision(op: object, *args: object, **kwargs: object) -> object:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = skip_torchvision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("torchvision", reason="the reference's resize needs torchvision", exc_type=Exception)
            name = "transformers.models.gemma4_unified."
            image = pytest.importorskip(name + "image_processing_gemma4_unified", reason="no Transformers")
            video = pytest.importorskip(name + "video_processing_gemma4_unified", reason="no Transformers")
            audio = pytest.importorskip(name + "feature_extraction_gemma4_unified", reason="no Transformers")
    finally:
        torch.library.register_fake = register_fake
    return types.SimpleNamespace(
        image=image.Gemma4UnifiedImageProcessor,
        video=video.Gemma4UnifiedVideoProcessor,
        audio=audio.Gemma4UnifiedAudioFeatureExtractor,
    )


def tone(rate: int, seconds: float, channels: int = 1, hertz: float = 440.0) -> np.ndarray:
    """A sine of amplitude 0.5, float32 [channels, samples], the same in all channels."""
    t = np.arange(round(rate * seconds)) / rate
    return np.tile((0.5 * np.sin(2 * np.pi * hertz * t)).astype(np.float32), (channels, 1))


def encode_audio(samples: np.ndarray, rate: int, container: str, codec: str, layout: str) -> bytes:
    """float32 [channels, samples] as a file, through PyAV."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        output.mux([*stream.encode(frame), *stream.encode(None)])
    return buffer.getvalue()
