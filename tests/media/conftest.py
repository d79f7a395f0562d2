"""Transformers' processors for pictures, sound and video, as the reference of the media tests."""

from __future__ import annotations

import types
import warnings

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
