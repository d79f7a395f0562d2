"""A whole model folder of the embedded model's sizes with random weights: all that `iolite.load` needs."""

from __future__ import annotations

import shutil
from pathlib import Path

from iolite.checkpoint.folder import save_folder
from iolite.config import GenerationConfig, ProcessorConfig
from iolite.model.unified import Unified
from iolite.text.tokenizer import Tokenizer
from iolite.train.nano.recipe import TEMPLATE, initialise_, nano_config
from iolite.train.nano.tokenizer import train_tokenizer

_WORDS = "the red circle is a blue square and what number do you see in the picture please answer the question"


def random_folder(folder: Path) -> Path:
    """Writes the folder and returns it."""
    train_tokenizer([_WORDS] * 3, 800, folder)
    config = nano_config(Tokenizer.from_folder(folder))
    model = Unified(config)
    initialise_(model)
    generation = GenerationConfig(
        eos_token_ids=config.eos_token_ids, suppress_tokens=(config.eoi_token_id, config.eoa_token_id)
    )
    processor = ProcessorConfig(
        image_max_soft_tokens=3,
        video_max_soft_tokens=3,
        num_frames=4,
        audio_seq_length=50,  # two seconds at once, so that cutting is cheap to test
        image_budgets=None,
        transcribe_prompt="Transcribe the speech.",
    )
    save_folder(folder, model, config, generation=generation, processor=processor)
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")
    return folder
