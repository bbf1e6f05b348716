"""Checkpoints in FP8, as DeepSeek-V3 and Qwen3 are published."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from odd import make_grouped, make_grouped_mixture, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from lm import fp8, hugging_face
from lm.model import LanguageModel

Tensors = dict[str, torch.Tensor]
# What stays as it is in published checkpoints.
_KEPT = ("norm.weight", "embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "e_score_correction_bias")


def rounded(tensors: Tensors, block: tuple[int, int], scale_type: torch.dtype = torch.float32) -> Tensors:
    """Returns the tensors with their matrices in FP8, written out block by block."""
    found: Tensors = {}
    for name, weight in tensors.items():
        if name.endswith(_KEPT) or weight.dim() != 2:
            found[name] = weight.bfloat16()
            continue
        rows, columns = (-(-size // of_block) for size, of_block in zip(weight.shape, block, strict=True))
        scales, small = torch.zeros(rows, columns), torch.zeros_like(weight, dtype=torch.float8_e4m3fn)
        for row in range(rows):
            for column in range(columns):
                place = (
                    slice(row * block[0], (row + 1) * block[0]),
                    slice(column * block[1], (column + 1) * block[1]),
                )
                scales[row, column] = (weight[place].abs().max() / 448).to(scale_type).float()
                small[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
        found[name], found[f"{name}_scale_inv"] = small, scales.to(scale_type)
    return found


def write(
    model: LanguageModel,
    tokenizer: Path,
    folder: Path,
    block: tuple[int, int],
    scale_type: torch.dtype = torch.float32,
) -> Tensors:
    """Writes ``model`` in FP8, its scales in a file of their own; returns what lies there."""
    hugging_face.save(model, tokenizer, folder)
    tensors = rounded(load_file(folder / "model.safetensors"), block, scale_type)
    (folder / "model.safetensors").unlink()
    write_weights(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def write_weights(folder: Path, tensors: Tensors) -> None:
    names = {True: "model-00001-of-00002.safetensors", False: "model-00002-of-00002.safetensors"}
    for scales, file in names.items():
        save_file(
            {name: tensor for name, tensor in tensors.items() if name.endswith("_scale_inv") == scales},
            folder / file,
            metadata={"format": "pt"},
        )
    index = {"metadata": {}, "weight_map": {name: names[name.endswith("_scale_inv")] for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(params=[make_model, make_grouped, make_grouped_mixture], ids=["latent", "grouped", "mixture"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    made: LanguageModel = request.param()
    return made


@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_block_is_multiplied_by_its_scale(
    model: LanguageModel, tokenizer_file: Path, tmp_path: Path, scale_type: torch.dtype
) -> None:
    # Sizes that do not divide: the last blocks are smaller.
    block = (32, 20)
    tensors = write(model, tokenizer_file, tmp_path, block, scale_type)
    assert hugging_face.check(tmp_path) == model.config
    loaded = hugging_face.load(tmp_path)
    on_disk = hugging_face.state_to_layout(loaded.state_dict())
    quantized = 0
    for name, weight in on_disk.items():
        if name not in tensors:
            continue
        assert weight.dtype == torch.float32
        if (scales := tensors.get(f"{name}_scale_inv")) is None:
            assert torch.equal(weight, tensors[name].float()), name
            continue
        quantized += 1
        for row in range(weight.shape[0]):
            for column in range(0, weight.shape[1], 7):
                scale = scales[row // block[0], column // block[1]].float()
                assert weight[row, column] == tensors[name][row, column].float() * scale
    assert quantized > 10
    # It is the model, but for the rounding: three bits behind the point.
    for name, before in model.state_dict().items():
        error = (loaded.state_dict()[name] - before).abs().max()
        assert error <= before.abs().max() * 2**-4, name


@pytest.mark.parametrize("make", [make_model, make_grouped, make_grouped_mixture], ids=["latent", "grouped", "mixture"])
def test_transformers_reads_the_same_from_it(
    make: Callable[..., LanguageModel], tokenizer_file: Path, tmp_path: Path
) -> None:
    # It takes no blocks of which the last is smaller.
    block = (2, 2)
    model = make()
    write(model, tokenizer_file, tmp_path, block)
    ids = torch.arange(24).reshape(2, 12)
    ours = hugging_face.load(tmp_path).eval()
    asked = FineGrainedFP8Config(weight_block_size=block, dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=asked, experts_implementation="eager"
    )
    # What lies there in 16 bits stays so, whatever it is asked for.
    theirs = theirs.float().eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_is_trained_from_it_is_saved_unquantized(tokenizer_file: Path, tmp_path: Path) -> None:
    for name in ("origin", "trained"):
        (tmp_path / name).mkdir()
    write(make_grouped(), tokenizer_file, tmp_path / "origin", (16, 16))
    hugging_face.save(hugging_face.load(tmp_path / "origin"), tokenizer_file, tmp_path / "trained", tmp_path / "origin")
    assert "quantization_config" not in json.loads((tmp_path / "trained/config.json").read_text())
    with safe_open(tmp_path / "trained/model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if name.endswith(fp8.scale_name(""))]  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118


WEIGHT = "model.layers.0.self_attn.o_proj.weight"


def _without_scales(tensors: Tensors) -> None:
    del tensors[f"{WEIGHT}_scale_inv"]


def _with_other_blocks(tensors: Tensors) -> None:
    tensors[f"{WEIGHT}_scale_inv"] = torch.ones(1, 1)


def _with_whole_numbers(tensors: Tensors) -> None:
    tensors[f"{WEIGHT}_scale_inv"] = tensors[f"{WEIGHT}_scale_inv"].to(torch.int32)


def _with_a_norm(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    tensors["model.norm.weight_scale_inv"] = torch.tensor(1.0)


def _with_scales_of_nothing(tensors: Tensors) -> None:
    tensors[WEIGHT] = tensors[WEIGHT].bfloat16()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without_scales, f"00002-of-00002.safetensors: {WEIGHT} is F8_E4M3, and there is no {WEIGHT}_scale_inv"),
        (_with_other_blocks, rf"{WEIGHT}_scale_inv is \[1, 1\]; blocks of 16 x 16 make it \[3, 6\]"),
        (_with_whole_numbers, rf"{WEIGHT}_scale_inv is I32; scales of BF16, F16, F32, F64 are read"),
        (_with_a_norm, "model.norm.weight is F8_E4M3 and no matrix; matrices alone have blocks"),
        (_with_scales_of_nothing, f"of this config.json has no {WEIGHT}_scale_inv"),
    ],
)
def test_scales_that_do_not_fit_are_named(
    change: Callable[[Tensors], None], said: str, tokenizer_file: Path, tmp_path: Path
) -> None:
    tensors = write(make_grouped(), tokenizer_file, tmp_path, (16, 16))
    change(tensors)
    write_weights(tmp_path, tensors)
    for read in (hugging_face.check, hugging_face.load):
        with pytest.raises(hugging_face.Unusable, match=said):
            read(tmp_path)


def test_fp8_whose_blocks_nobody_names_is_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    write(make_grouped(), tokenizer_file, tmp_path, (16, 16))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(hugging_face.Unusable, match="is F8_E4M3; weights of floating point are needed"):
        hugging_face.check(tmp_path)


def test_a_tied_head_is_passed_over_with_its_scales(tokenizer_file: Path, tmp_path: Path) -> None:
    model = make_grouped(tie_word_embeddings=True)
    tensors = write(model, tokenizer_file, tmp_path, (16, 16))
    head = rounded({"head.weight": model.lm_head.weight.detach()}, (16, 16))
    write_weights(tmp_path, {**tensors, **{f"lm_{name}": tensor for name, tensor in head.items()}})
    assert hugging_face.load(tmp_path).config == model.config


def test_of_a_matrix_no_more_is_read_than_the_blocks_around_what_is_wanted(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, tokenizer_file: Path, tmp_path: Path
) -> None:
    write(model, tokenizer_file, tmp_path, (8, 16))
    expected = hugging_face.load(tmp_path).state_dict()
    widened, numbers = fp8.widened, [0]

    def noted(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
        numbers[0] += weight.numel()
        return widened(weight, scales, block)

    monkeypatch.setattr(fp8, "widened", noted)
    seen = 0
    for name, read in hugging_face.opened(tmp_path)[1]:
        *stack, rows, columns = expected[name].shape if expected[name].dim() > 1 else (0, 0)
        if rows < 15 or columns < 17:
            continue
        for region in (
            (slice(rows // 3, rows), slice(0, columns)),
            (slice(9, 15), slice(15, 17)),
            (slice(rows - 3, rows), slice(columns - 1, columns)),
        ):
            every = (*(slice(1, 2) for _ in stack), *region)
            numbers[0] = 0
            assert torch.equal(read(every), expected[name][every]), (name, every)
            if name.endswith("q_proj.weight") and region[0] == slice(9, 15):
                # Two blocks side by side.
                assert numbers[0] == 8 * 32
                seen += 1
    assert seen
