"""Transformers' processors for pictures, sound and video, as the reference of the media tests."""

from __future__ import annotations

import types

import pytest


@pytest.fixture(scope="session")
def reference() -> types.SimpleNamespace:
    """Transformers' `image` and `video` processor classes and `audio` feature extractor class for the model."""
    import support  # makes torchvision importable beside a CPU torch
    from transformers.models.gemma4_unified import (
        feature_extraction_gemma4_unified,
        image_processing_gemma4_unified,
        video_processing_gemma4_unified,
    )

    assert support.import_torchvision
    return types.SimpleNamespace(
        image=image_processing_gemma4_unified.Gemma4UnifiedImageProcessor,
        video=video_processing_gemma4_unified.Gemma4UnifiedVideoProcessor,
        audio=feature_extraction_gemma4_unified.Gemma4UnifiedAudioFeatureExtractor,
    )
