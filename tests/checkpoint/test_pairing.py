"""The drafter of a model: where it is looked for and in which order, what is passed over, what is refused, and that it
is packed once."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from support.gguf_model import DRAFTER, save_tiny, tiny_text

from iolite.checkpoint import packing
from iolite.checkpoint.convert import Beside, to_gguf
from iolite.checkpoint.drafter import find_drafter, load_drafter, write_folder
from iolite.checkpoint.drafter_packing import bytes_needed
from iolite.checkpoint.gguf_drafter import DrafterSource, drafter_shapes, write_drafter
from iolite.checkpoint.hub import nano_folder
from iolite.checkpoint.pairing import (
    AUTO,
    Pair,
    Unpaired,
    drafter_ids,
    find_pair,
    load_pair,
    named_drafter,
    published_drafter,
)
from iolite.checkpoint.source import open_source
from iolite.config import SLIDING
from iolite.errors import CheckpointError, ConfigError, DownloadError, IoliteError, UsageError
from iolite.quant.linear import QuantLinear
from iolite.text.tokenizer import Tokenizer

WIDTH = tiny_text("published").hidden_size
MATRICES = 4 * 5 + 3
OTHER = WIDTH + 64


def random_drafter(width: int = WIDTH, **changes: object) -> DrafterSource:
    text = dataclasses.replace(tiny_text("published"), **(DRAFTER | changes))  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(5)
    shapes = drafter_shapes(text, width)
    weights = {name: torch.randn(shape, generator=rng).bfloat16() for name, shape in shapes.items()}
    return DrafterSource("tiny", text, width, lambda: Tokenizer.from_folder(nano_folder()), shapes, weights.__getitem__)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a folder and in GGUF files; drafters that fit it (fits/, q4_0.gguf, ...) and that do not."""
    shelf = tmp_path_factory.mktemp("shelf")
    source = open_source(str(save_tiny(shelf / "model", "published")))
    for kind in ("q8_0", "q4_0"):
        to_gguf(source, shelf / f"model-{kind}.gguf", kind, Beside(embedders=False))
    fitting, wide = random_drafter(), random_drafter(OTHER)
    write_folder(shelf / "fits", fitting)
    write_folder(shelf / "wide", wide)
    write_folder(shelf / "vocabulary", random_drafter(vocab_size=2000))
    write_folder(shelf / "window", random_drafter(sliding_window=32))
    write_folder(shelf / "heads", random_drafter(num_key_value_heads=8))
    for kind in ("bf16", "q8_0", "q4_0"):
        write_drafter(shelf / f"{kind}.gguf", fitting, kind)
    write_drafter(shelf / "wide.gguf", wide, "q8_0")
    return shelf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def put(shelf: Path, cache: Path) -> Callable[[str, Path], Path]:
    """Puts something of the shelf in another place, without copying weights."""

    def put(what: str, where: Path) -> Path:
        where.parent.mkdir(parents=True, exist_ok=True)
        if (shelf / what).is_dir():
            shutil.copytree(shelf / what, where, copy_function=lambda a, b: Path(b).symlink_to(a))
        else:
            where.symlink_to(shelf / what)
        return where

    return put


@pytest.fixture
def put_in_cache(put: Callable[[str, Path], Path], cache: Path) -> Callable[[str, str, str], Path]:
    """Puts something of the shelf into the cache under an id, as a folder or as a file in it."""

    def put_in(what: str, name: str, inner: str = "") -> Path:
        snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / ("a" * 40)
        put(what, snapshot / inner if inner else snapshot)
        return snapshot

    return put_in


def auto(name: Path | str) -> Pair | Unpaired:
    return find_pair(open_source(str(name)), str(name), AUTO)


def found(name: Path | str) -> Path:
    """The file that auto takes."""
    pair = auto(name)
    assert isinstance(pair, Pair), pair.note
    assert pair.source.backbone_hidden_size == WIDTH
    return pair.source.files[0]


# The order


def test_places_of_a_folder_in_their_order(put, put_in_cache, tmp_path):
    """Each place is looked at when what comes before it is gone."""
    model = put("model", tmp_path / "gemma-4-12B-it-int4")
    places = [
        put("fits", model / "drafter"),
        put("fits", model / "assistant"),
        put("q4_0.gguf", model / "anything.gguf"),
        put("q4_0.gguf", model / "MTP" / "else.gguf"),
        put("fits", tmp_path / "gemma-4-12B-it-int4-assistant"),
        put_in_cache("fits", "google/gemma-4-12B-it-assistant"),
    ]
    for place in places:
        path = found(model)
        assert path in (place, place / "model.safetensors")
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
    assert isinstance(auto(model), Unpaired)


def test_the_note_says_where(put, put_in_cache, tmp_path, monkeypatch):
    model = put("model", tmp_path / "m")
    put("fits", model / "drafter")
    assert auto(model).note == f"the drafter is drafter/ in {model}"
    put("model-q4_0.gguf", tmp_path / "g" / "g.gguf")
    put("q8_0.gguf", tmp_path / "g" / "mtp" / "d.gguf")
    assert auto(tmp_path / "g" / "g.gguf").note == f"the drafter is mtp/d.gguf in {tmp_path / 'g'}"
    put_in_cache("model", "me/mine")
    put_in_cache("fits", "Me/Mine-Assistant")
    assert auto("me/mine").note == "the drafter is Me/Mine-Assistant in the Hugging Face cache"
    monkeypatch.chdir(model)
    assert auto(".").note == "the drafter is drafter/ in ."


def test_of_several_files_the_one_in_the_models_format(put, tmp_path):
    """Then Q8_0, then any; but one that is named after the model goes before all."""
    for kind in ("q4_0", "q8_0"):
        put(f"model-{kind}.gguf", tmp_path / kind / "model.gguf")
        for drafter in ("bf16", "q4_0", "q8_0"):
            put(f"{drafter}.gguf", tmp_path / kind / "MTP" / f"{'acb'[len(drafter) % 3]}-{drafter}.gguf")
        assert found(tmp_path / kind / "model.gguf").resolve().name == f"{kind}.gguf"
    model = tmp_path / "q4_0"
    next(model.glob("MTP/*-q4_0.gguf")).unlink()
    assert found(model / "model.gguf").resolve().name == "q8_0.gguf"
    put("bf16.gguf", model / "mtp-model.gguf")
    assert found(model / "model.gguf").resolve().name == "bf16.gguf"
    (model / "mtp-model.gguf").unlink()
    next(model.glob("MTP/*-q8_0.gguf")).unlink()
    assert found(model / "model.gguf").resolve().name == "bf16.gguf"


def test_a_model_in_parts_looks_above_its_own_folder(put, tmp_path, shelf, monkeypatch):
    """Repositories have a folder for each format that comes in parts; the drafter lies beside these."""
    model = put("model-q8_0.gguf", tmp_path / "repository" / "Q8_0" / "model-00001-of-00002.gguf")
    put("q4_0.gguf", tmp_path / "repository" / "mtp-model.gguf")
    assert isinstance(auto(model), Unpaired)  # it is whole
    source = open_source(str(model))
    parts = [model, model.with_name("model-00002-of-00002.gguf")]
    monkeypatch.setattr(type(source), "files", property(lambda self: parts))
    assert find_pair(source, str(model), AUTO).note == f"the drafter is mtp-model.gguf in {tmp_path / 'repository'}"


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("google/gemma-4-12B-it", ["google/gemma-4-12B-it-assistant"]),
        ("me/mine", ["me/mine-assistant"]),
        ("me/gemma-4-12b-it-poems", ["me/gemma-4-12b-it-poems-assistant"]),
        ("google/gemma-4-12B", ["google/gemma-4-12B-assistant"]),
        (
            "google/gemma-4-12B-it-qat-w4a16-ct",
            [
                "google/gemma-4-12B-it-qat-w4a16-ct-assistant",
                "google/gemma-4-12B-it-qat-q4_0-unquantized-assistant",
                "google/gemma-4-12B-it-assistant",
            ],
        ),
        (
            "unsloth/gemma-4-12b-it-GGUF:Q4_0",
            [
                "unsloth/gemma-4-12b-it-GGUF-assistant",
                "unsloth/gemma-4-12B-it-assistant",
                "google/gemma-4-12B-it-assistant",
            ],
        ),
        ("./gemma-4-12b-it-UD-Q4_K_XL.gguf", ["google/gemma-4-12B-it-assistant"]),
        ("gemma-4-12B-it-BF16-00001-of-00002.gguf", ["google/gemma-4-12B-it-assistant"]),
        ("./my-model", []),
        ("nano", []),
    ],
)
def test_ids_of_drafters(name, ids, cache):
    assert drafter_ids(name) == ids


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("google/gemma-4-12B-it", "google/gemma-4-12B-it-assistant"),
        ("unsloth/gemma-4-12b-it-qat-GGUF", "google/gemma-4-12B-it-qat-q4_0-unquantized-assistant"),
        ("gemma-4-12b-it-Q4_0.gguf", "google/gemma-4-12B-it-assistant"),
        ("google/gemma-4-12B", None),
        ("me/mine", None),
        ("nano", None),
    ],
)
def test_published_drafters(name, published, cache):
    assert published_drafter(name) == published


def test_a_hostile_name_is_read_in_one_go(cache):
    """An expression that went back and forth over it would not end."""
    for word in ("_0", "-q4_0", "_q4", "_l", "-00001-of-00002"):
        assert drafter_ids("gemma-4-12b-it-q4" + word * 5000 + "!") == []


def test_ids_in_their_order_and_spelling(put_in_cache):
    name = "unsloth/gemma-4-12b-it-qat-GGUF"
    put_in_cache("model-q4_0.gguf", name, "gemma-4-12b-it-qat-Q4_0.gguf")
    assert isinstance(auto(name), Unpaired)
    for repository in (
        "google/Gemma-4-12b-it-assistant",
        "Unsloth/gemma-4-12B-it-assistant",
        "google/gemma-4-12B-it-qat-q4_0-unquantized-assistant",
    ):
        put_in_cache("fits", repository)
        assert auto(name).note == f"the drafter is {repository} in the Hugging Face cache"


# What is passed over


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("wide", f"the drafter is for hidden states of {OTHER}, but the model has {WIDTH}"),
        ("wide.gguf", f"the drafter is for hidden states of {OTHER}, but the model has {WIDTH}"),
        ("vocabulary", "the drafter is for a vocabulary of 2000, but the model has "),
        ("window", "in a window of 32, but the model has 16"),
        ("heads", "for sliding attention over 8 key-value heads, but the model has "),
    ],
)
def test_what_does_not_fit_is_passed_over_and_an_error_when_asked_for(put, shelf, tmp_path, what, fault):
    model = put("model", tmp_path / "m")
    put(what, model / ("mtp-a.gguf" if what.endswith(".gguf") else "drafter"))
    first = auto(model)
    assert isinstance(first, Unpaired)
    assert fault in first.note and str(model) in first.note
    put("fits", tmp_path / "m-assistant")
    second = auto(model)
    assert isinstance(second, Pair)
    assert fault in second.note and second.where == str(tmp_path / "m-assistant")
    with pytest.raises(UsageError) as error:
        find_pair(open_source(str(model)), str(model), str(shelf / what))
    assert fault in str(error.value) and error.value.hint


def test_layers_that_the_model_does_not_have(put, tmp_path, cache):
    """A drafter with full layers, for a model that has sliding ones only."""
    model = put("model", tmp_path / "m")
    put("fits", model / "drafter")
    source = open_source(str(model))
    text = dataclasses.replace(source.config.text, layer_types=(SLIDING,) * source.config.text.num_hidden_layers)
    source.config = dataclasses.replace(source.config, text=text)
    pair = find_pair(source, str(model), AUTO)
    assert isinstance(pair, Unpaired)
    assert "3 sliding and 1 full layers, but the model 6 sliding and 0 full layers" in pair.note


def test_damaged_drafters_are_passed_over_and_other_damaged_files_are_not_spoken_of(put, tmp_path, shelf, cache):
    model = put("model", tmp_path / "m")
    (model / "drafter").mkdir()
    (model / "drafter" / "model.safetensors").write_bytes((shelf / "fits" / "model.safetensors").read_bytes()[:-9])
    whole = (shelf / "q8_0.gguf").read_bytes()
    for name, data in {"mtp-cut": whole[:-9], "mtp-start": whole[:7], "notes": b"hello, this is no GGUF file"}.items():
        (model / f"{name}.gguf").write_bytes(data)
    shutil.copytree(shelf / "fits", model / "assistant")
    (model / "assistant" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    pair = auto(model)
    assert isinstance(pair, Unpaired)
    assert [reason.partition(" in ")[0] for reason in pair.passed] == [
        "drafter/",
        "assistant/",
        "mtp-cut.gguf",
        "mtp-start.gguf",
    ]
    assert "only a part of drafter is there" in pair.passed[0]
    assert "model_type is 'llama'" in pair.passed[1]
    assert "notes.gguf" not in pair.note
    put("fits", tmp_path / "m-assistant")
    assert found(model) == tmp_path / "m-assistant" / "model.safetensors"


def test_half_a_download_is_passed_over(put, put_in_cache, tmp_path):
    model = put("model", tmp_path / "gemma-4-12B-it")
    snapshot = put_in_cache("fits", "google/gemma-4-12B-it-assistant")
    (snapshot / "model.safetensors").unlink()
    pair = auto(model)
    assert isinstance(pair, Unpaired)
    assert "google/gemma-4-12B-it-assistant in the Hugging Face cache: only a part of" in pair.note


def test_nothing_at_all(put, put_in_cache, tmp_path):
    model = put("model", tmp_path / "m")
    assert auto(model).note == (
        f"no drafter was found in {model} (drafter/, assistant/, GGUF files, MTP/) nor as {model}-assistant"
    )
    put_in_cache("model", "google/gemma-4-12B-it")
    assert auto("google/gemma-4-12B-it").note == (
        "no drafter was found in google/gemma-4-12B-it (drafter/, assistant/, GGUF files, MTP/) nor as "
        "google/gemma-4-12B-it-assistant in the Hugging Face cache "
        "(iolite pull google/gemma-4-12B-it-assistant fetches one)"
    )


def test_looking_imports_no_torch(put, tmp_path):
    model = put("model", tmp_path / "m")
    code = (
        "import sys; from iolite.checkpoint.pairing import AUTO, find_pair, named_drafter; "
        "from iolite.checkpoint.source import open_source; name = sys.argv[1]; "
        "print(named_drafter(name), find_pair(open_source(name), name, AUTO).note); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True, capture_output=True)


# Just one


@pytest.fixture
def ask(shelf: Path, cache: Path) -> Callable[[Path | str], Pair | Unpaired]:
    return lambda asked: find_pair(open_source(str(shelf / "model")), str(shelf / "model"), str(asked))


def test_one_that_is_asked_for(ask, shelf, put, put_in_cache, tmp_path, monkeypatch):
    for name in ("fits", "q4_0.gguf"):
        assert ask(shelf / name).where == str(shelf / name)
    assert find_pair(open_source(str(shelf / "model")), "m", shelf / "fits").where == str(shelf / "fits")
    put_in_cache("fits", "me/some-assistant")
    assert ask("Me/Some-Assistant").where == "Me/Some-Assistant"
    for kind in ("bf16", "q4_0", "q8_0"):
        put_in_cache(f"{kind}.gguf", "me/drafters-GGUF", f"MTP/gemma-4-12B-it-{kind.upper()}-MTP.gguf")
    pair = ask("me/drafters-GGUF:q4_0")
    assert pair.where == "gemma-4-12B-it-Q4_0-MTP.gguf in me/drafters-GGUF:q4_0"
    assert pair.source.scheme == "int4"
    assert ask("me/drafters-GGUF").where == "gemma-4-12B-it-Q8_0-MTP.gguf in me/drafters-GGUF"
    put("bf16.gguf", tmp_path / "some" / "x-bf16.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~/some", "~/some:bf16"):
        assert ask(name).source.scheme is None


@pytest.mark.parametrize(
    ("asked", "kind", "fault", "hint"),
    [
        ("gone", DownloadError, "there is no drafter 'gone'", "use auto, a folder"),
        ("none/of/that", DownloadError, "there is no drafter", "use auto"),
        ("\0", DownloadError, "there is no drafter", "use auto"),
        ("me/gone", DownloadError, "me/gone is not on this machine", "iolite pull me/gone"),
        ("me/gone:Q4_0", DownloadError, "me/gone:Q4_0 is not on this machine", "hf download me/gone"),
        ("me/half", DownloadError, "me/half is only partly on this machine", "iolite pull me/half"),
        ("nano", UsageError, "nano is a model, not a drafter", "often called"),
        ("SHELF/model", UsageError, "model is a model, not a drafter", "often called"),
        ("SHELF/model-q4_0.gguf", UsageError, "is a model, not a drafter", "often called"),
        ("me/model-GGUF", UsageError, "me/model-GGUF is a model, not a drafter", "often called"),
        ("me/model-GGUF:Q4_0", UsageError, "me/model-GGUF:Q4_0 is a model, not a drafter", "often called"),
        ("me/drafter-GGUF:Q8_0", CheckpointError, "me/drafter-GGUF:Q8_0 holds no drafter Q8_0", "use auto"),
        ("SHELF/fits/config.json", CheckpointError, "is a file", "give the folder"),
        ("SHELF/empty", CheckpointError, "empty holds no drafter", "use auto"),
        ("SHELF/mmproj.gguf", ConfigError, "mmproj.gguf holds embedders", "Gemma 4"),
        ("SHELF/other", ConfigError, "model_type is 'llama'", "Gemma 4"),
        ("SHELF/wide.gguf", UsageError, f"hidden states of {OTHER}, but the model has {WIDTH}", "trained for"),
    ],
)
def test_what_is_refused(ask, put_in_cache, put, shelf, tmp_path, asked, kind, fault, hint):
    place = tmp_path / "shelf"
    for name in ("model", "fits", "model-q4_0.gguf", "wide.gguf"):
        put(name, place / name)
    to_gguf(open_source(str(shelf / "model")), tmp_path / "m.gguf", "bf16", Beside())
    (tmp_path / "mmproj-m.gguf").rename(place / "mmproj.gguf")
    (place / "empty").mkdir()
    (place / "other").mkdir()
    (place / "other" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (place / "other" / "model.safetensors").touch()
    (put_in_cache("fits", "me/half") / "model.safetensors").unlink()
    put_in_cache("model-q4_0.gguf", "me/model-GGUF", "model-Q4_0.gguf")
    put_in_cache("q4_0.gguf", "me/drafter-GGUF", "mtp-Q4_0.gguf")
    with pytest.raises(kind, match=fault) as error:
        ask(asked.replace("SHELF", str(place)))
    assert hint in error.value.hint


@pytest.mark.parametrize("name", ["fits", "q8_0.gguf"])
def test_a_drafter_in_a_models_place(shelf, name, cache):
    with pytest.raises(IoliteError) as error:
        open_source(str(shelf / name))
    assert "name the model that it drafts for" in error.value.hint


def test_drafters_that_commands_may_take_for_models(shelf, put, put_in_cache, tmp_path):
    assert named_drafter(str(shelf / "fits")) == shelf / "fits"
    assert named_drafter(str(shelf / "wide.gguf")) == shelf / "wide.gguf"
    put("q4_0.gguf", tmp_path / "some" / "gemma-MTP.gguf")
    assert named_drafter(str(tmp_path / "some")) == tmp_path / "some" / "gemma-MTP.gguf"
    snapshot = put_in_cache("fits", "me/some-assistant")
    assert named_drafter("ME/some-assistant") == snapshot
    put("model-q4_0.gguf", tmp_path / "some" / "gemma.gguf")
    models = ("model", "model-q4_0.gguf", "fits/config.json", "gone")
    for name in (*(str(shelf / name) for name in models), "nano", "me/gone", str(tmp_path / "some"), "\0"):
        assert named_drafter(name) is None, name


# Packed once


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of packed weights that small drafters use too."""
    monkeypatch.setattr(packing, "SMALL", 0)
    monkeypatch.setenv("IOLITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.fixture
def packed_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that were packed, as it happens."""
    from iolite.checkpoint import drafter

    found: list[str] = []
    true = drafter.quantise_named

    def noted(name, weight, format):
        found.append(name)
        return true(name, weight, format)

    monkeypatch.setattr(drafter, "quantise_named", noted)
    return found


def assert_same(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("name", ["fits", "q4_0.gguf"])
def test_packed_once_and_mapped_afterwards(shelf, name, scheme, kept, packed_names):
    wanted = load_drafter(shelf / name, scheme, dtype=torch.float32)
    assert sum(isinstance(module, QuantLinear) for module in wanted.modules()) == MATRICES
    packed_names.clear()
    pair, steps = Pair(find_drafter(shelf / name), "there"), []
    assert_same(load_pair(pair, scheme, dtype=torch.float32, progress=lambda *step: steps.append(step)), wanted)
    assert len(packed_names) == (MATRICES if name == "fits" else 0)  # a quantised file's matrices keep their format
    assert [step[:2] for step in steps] == [(i, 48) for i in range(48)]
    packed_names.clear()
    written = {path: path.stat().st_mtime_ns for path in kept.rglob("*") if path.is_file()}
    assert sorted(path.name for path in written) == ["config.json", "model.safetensors"]
    assert_same(load_pair(pair, scheme, dtype=torch.float32), wanted)
    assert written == {path: path.stat().st_mtime_ns for path in kept.rglob("*") if path.is_file()}
    assert packed_names == []
    size = sum(find_drafter(next(kept.iterdir())).sizes.values())
    assert size <= bytes_needed(pair.source, scheme) < 1.1 * size


def test_every_scheme_and_every_change_of_the_file_is_kept_apart(shelf, kept, tmp_path, packed_names):
    shutil.copytree(shelf / "fits", tmp_path / "d")
    for scheme in ("int4", "int8"):
        load_pair(Pair(find_drafter(tmp_path / "d"), ""), scheme, dtype=torch.float32)
    assert len(list(kept.iterdir())) == 2
    write_folder(
        tmp_path / "d",
        dataclasses.replace(random_drafter(), weight=lambda name: torch.ones(random_drafter().shapes[name]).bfloat16()),
    )
    ones = load_pair(Pair(find_drafter(tmp_path / "d"), ""), "int8", dtype=torch.float32)
    assert len(list(kept.iterdir())) == 3
    assert torch.equal(ones.model.norm.weight, torch.ones(DRAFTER["hidden_size"]))


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "other"])
def test_what_is_not_whole_is_packed_again(shelf, kept, packed_names, damage):
    pair = Pair(find_drafter(shelf / "fits"), "")
    wanted = load_pair(pair, "int4", dtype=torch.float32)
    (folder,) = kept.iterdir()
    if damage == "other":  # a drafter of another shape, whole in itself
        write_folder(folder, random_drafter(OTHER), "int4")
    else:
        (folder / damage).write_bytes((folder / damage).read_bytes()[:-3])
    packed_names.clear()
    assert_same(load_pair(pair, "int4", dtype=torch.float32), wanted)
    assert len(packed_names) == MATRICES


def test_without_room_it_is_packed_in_memory(shelf, kept, capsys, monkeypatch):
    usage = shutil.disk_usage(shelf)._replace(free=1000)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage)
    pair = Pair(find_drafter(shelf / "fits"), "")
    assert_same(load_pair(pair, "int4", dtype=torch.float32), load_drafter(shelf / "fits", "int4", dtype=torch.float32))
    assert "note: the packed drafter is not kept: " in capsys.readouterr().err
    assert not list(kept.rglob("*.safetensors"))


def test_what_needs_no_packing_is_not_kept(shelf, kept, tmp_path):
    write_folder(tmp_path / "packed", find_drafter(shelf / "fits"), "int8")
    for name, scheme in ((shelf / "fits", None), (tmp_path / "packed", "int4"), (shelf / "q8_0.gguf", None)):
        network = load_pair(Pair(find_drafter(name), ""), scheme, dtype=torch.float32)
        assert_same(network, load_drafter(name, scheme, dtype=torch.float32))
    assert not kept.exists()


def test_small_drafters_are_packed_again(shelf, kept, monkeypatch):
    monkeypatch.setattr(packing, "SMALL", 128 << 20)
    load_pair(Pair(find_drafter(shelf / "fits"), ""), "int4", dtype=torch.float32)
    load_pair(Pair(random_drafter(), ""), "int4", dtype=torch.float32)  # one that lies in no file
    assert not kept.exists()


def test_weights_that_cannot_be_packed(shelf, kept, tmp_path):
    bad = random_drafter()
    nan = dataclasses.replace(bad, weight=lambda name: torch.full(bad.shapes[name], float("nan")).bfloat16())
    write_folder(tmp_path / "bad", nan)
    with pytest.raises(CheckpointError, match="cannot quantise"):
        load_pair(Pair(find_drafter(tmp_path / "bad"), ""), "int4", dtype=torch.float32)
    assert not [path for path in kept.rglob("*") if path.is_file()]
