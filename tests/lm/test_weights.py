"""Weights that are read where they are needed, and written one file after the other."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from odd import make_grouped, make_grouped_mixture, make_model
from safetensors.torch import load_file, save_file

from lm import hugging_face
from lm.hugging_face_layout import copies_of, pieces_of
from lm.model import LanguageModel
from lm.weights import Region, drawn, fill, held_by, on_meta, whole_region

MAKERS = [make_grouped, make_grouped_mixture, make_model]
Make = Callable[..., LanguageModel]


def regions(shape: Iterable[int]) -> list[Region]:
    """Halves, thirds and a middle of each dimension, in any combination of three."""
    parts = [
        [slice(0, -(-size // 2)), slice(-(-size // 3), size), slice(size // 4, size // 4 + max(1, size // 2))]
        for size in shape
    ]
    return [tuple(own[number] for own in parts) for number in range(3)] + [
        tuple(own[(number + place) % 3] for place, own in enumerate(parts)) for number in range(3)
    ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is read of a checkpoint's files: names, and how many numbers."""
    found: list[tuple[str, int]] = []
    read = hugging_face._Files.read

    def noted(self: hugging_face._Files, name: str, region: Region) -> torch.Tensor:
        value = read(self, name, region)
        found.append((name, value.numel()))
        return value

    monkeypatch.setattr(hugging_face._Files, "read", noted)
    return found


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_of_a_checkpoint_no_more_is_read_than_is_wanted(
    make: Make, stored: torch.dtype, asked: list[tuple[str, int]], tokenizer_file: Path, tmp_path: Path
) -> None:
    hugging_face.save(make(), tokenizer_file, tmp_path, bytes_a_file=60_000)
    for file in tmp_path.glob("*.safetensors"):
        save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file)
    expected = hugging_face.load(tmp_path).state_dict()
    asked.clear()
    model, weights = hugging_face.opened(tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    names = []
    for name, read in weights:
        names.append(name)
        for region in regions(expected[name].shape):
            asked.clear()
            part = read(region)
            assert part.dtype == torch.float32
            assert torch.equal(part, expected[name][region]), (name, region)
            assert sum(numbers for _, numbers in asked) == part.numel(), (name, region)
    assert sorted(names) == sorted(
        expected.keys() - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    )


def test_of_the_experts_those_of_others_are_not_touched(
    asked: list[tuple[str, int]], tokenizer_file: Path, tmp_path: Path
) -> None:
    hugging_face.save(make_grouped_mixture(), tokenizer_file, tmp_path)
    for name, read in hugging_face.opened(tmp_path)[1]:
        if name.endswith(".mlp.experts.gate_up_proj"):
            asked.clear()
            read((slice(3, 5), slice(0, 10), slice(0, 4)))
            # The first rows are of the gates.
            assert {part.split("experts.")[1] for part, _ in asked} == {f"{index}.gate_proj.weight" for index in (3, 4)}


@pytest.mark.parametrize("make", MAKERS)
def test_a_model_on_meta_differs_from_another_in_its_weights_alone(make: Make) -> None:
    config = make().config
    bare, plain = on_meta(config), LanguageModel(config)
    plain.initialize(5)
    assert bare.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.is_meta for parameter in bare.parameters())
    for name, buffer in plain.named_buffers():
        assert torch.equal(bare.get_buffer(name), buffer), name
    fill(bare, drawn(on_meta(config), 5))
    for name, value in plain.state_dict().items():
        assert torch.equal(bare.state_dict()[name], value), name
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(bare(ids), plain(ids))


def test_tied_weights_stay_one(tokenizer_file: Path, tmp_path: Path) -> None:
    hugging_face.save(make_grouped(tie_word_embeddings=True), tokenizer_file, tmp_path)
    loaded = hugging_face.load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        *((make, {}) for make in MAKERS),
        *((make_model, {"num_nextn_predict_layers": 2, "tie_word_embeddings": tied}) for tied in (False, True)),
    ],
)
def test_a_model_is_written_file_by_file_from_tensors_that_are_asked_for_once(
    make: Make, changes: dict[str, Any], tmp_path: Path
) -> None:
    model, files = make(**changes), []
    asked: dict[str, list[str]] = {"one": [], "other": []}

    def whole_of(who: str) -> Callable[[str], torch.Tensor]:
        def whole(name: str) -> torch.Tensor:
            asked[who].append(name)
            # What is there of earlier files when this one is asked for.
            files.append(len(list(tmp_path.glob("*.safetensors"))))
            return held_by(model)(name) if who == "one" else held_by(model)(name).to("meta")

        return whole

    hugging_face.save_weights(model.config, whole_of("one"), tmp_path, bytes_a_file=60_000)
    # Some files are of one tensor, a stack.
    assert files == sorted(files)
    assert len(set(files)) > 2
    written = tiny.files_of(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    own = model.state_dict()
    expected = {piece.name: piece.of(own[name]) for name, pieces in pieces_of(model).items() for piece in pieces}
    expected |= {copy: own[source] for copy, source in copies_of(model).items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert len(set(asked["one"])) == len(asked["one"])
    # The other processes give what they have, in the same order.
    hugging_face.save_weights(model.config, whole_of("other"), None, bytes_a_file=60_000)
    assert asked["other"] == asked["one"]
    assert tiny.files_of(tmp_path) == written


def test_what_is_read_is_a_tensor_of_its_own(tokenizer_file: Path, tmp_path: Path) -> None:
    # A view would keep all of it in memory.
    hugging_face.save(make_grouped(), tokenizer_file, tmp_path)
    for weights in (drawn(on_meta(make_grouped().config), 1), hugging_face.opened(tmp_path)[1]):
        for name, read in weights:
            shape = make_grouped().state_dict()[name].shape
            whole, part = read(whole_region(shape)), read((slice(1, 2), *whole_region(shape[1:])))
            assert part.untyped_storage().nbytes() == part.numel() * 4
            assert torch.equal(part, whole[1:2])


def test_a_weight_that_nothing_gives_is_named() -> None:
    model = on_meta(make_grouped().config)
    with pytest.raises(ValueError, match=r"no weights for model\.norm\.weight, nor for 0 others"):
        fill(model, (pair for pair in drawn(model, 1) if pair[0] != "model.norm.weight"))
