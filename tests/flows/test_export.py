"""Exporting: what others load, what is told, and what is refused."""

import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import odd
import onnx
import pytest
import tiny
import torch
from rich.console import Console
from safetensors.torch import load_file
from texts import write_trained_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows import runs
from flows.export import Request, export
from lm import gguf_file, hugging_face, text
from lm.gguf_tokenizer import PIECES
from lm.runtime import Generator
from lm.sampling import Sampling
from tasks.errors import BadInput, DiskFull, UserMistake

if TYPE_CHECKING:
    from conftest import Project

SIZE = 330
IDS = {"vocab_size": SIZE, "bos_token_id": SIZE - 1, "eos_token_id": SIZE - 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an untrained float model, an INT8 one over bytes, and a card."""
    root = tmp_path_factory.mktemp("project")
    tiny.write_params(root, card__name="tiny-lm", card__licence="cc0-1.0")
    (root / "models/float").mkdir(parents=True)
    write_trained_tokenizer(root / "tokenizer.json", PIECES["llama-bpe"], SIZE)
    hugging_face.save(odd.make_grouped(**IDS), root / "tokenizer.json", root / "models/float")
    odd.export_over_bytes(root / "models/int8", odd.make_grouped)
    # Beside it what its fine-tuning began with, which nobody is given.
    odd.export_over_bytes(root / "models/int8/post_training", odd.make_grouped)
    (root / "models/card").mkdir()
    (root / "models/card/README.md").write_text("# tiny-lm\n")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project"))


def exported(root: Path, to: str, output: Path | None = None, type_: str | None = None) -> Path:
    return export(root, Request(to, output, type_), Console(quiet=True), Console(quiet=True))


def shipped(root: Path) -> dict[str, bytes]:
    """Returns the files of the INT8 model that others are given."""
    files = tiny.files_of(root / "models/int8")
    return {name: content for name, content in files.items() if not name.startswith("post_training/")}


@pytest.mark.parametrize(("to", "type_"), [("gguf", None), ("hf", None), ("onnx", None), ("onnx", "standard")])
def test_the_next_export_takes_the_place_of_the_last_and_all_may_read_it(
    root: Path, to: str, type_: str | None
) -> None:
    first = exported(root, to, type_=type_)
    files = {path: path.read_bytes() for path in [first, *first.rglob("*")] if path.is_file()}
    assert exported(root, to, type_=type_) == first
    assert {path: path.read_bytes() for path in files} == files
    (root / "plain").touch()
    usual = (root / "plain").stat().st_mode
    assert {path: path.stat().st_mode for path in files} == dict.fromkeys(files, usual)


def test_gguf_holds_the_float_model_under_the_cards_name(root: Path) -> None:
    path = exported(root, "gguf")
    assert path == root / ".overnight/export/tiny-lm-f16.gguf"
    fields = gguf.GGUFReader(path).fields
    assert fields["general.name"].contents() == "tiny-lm"
    assert fields["general.license"].contents() == "cc0-1.0"
    assert gguf_file.load(path).config == hugging_face.load(root / "models/float").config


def test_what_ends_a_text_and_llama_cpp_does_not_learn_of_is_told(root: Path) -> None:
    generation = root / "models/float/generation_config.json"
    for ends, told in (([SIZE - 1, 5, 6], ""), ([SIZE - 1, 5, 6, 7], "llama.cpp will not stop at (.")):
        generation.write_text(json.dumps({"eos_token_id": ends}))
        err = io.StringIO()
        export(root, Request("gguf"), Console(quiet=True), Console(file=err, width=40))
        assert err.getvalue() == (told and f"A GGUF file names three tokens that end a text; {told}\n")
    generation.write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(BadInput, match=r"generation_config\.json: eos_token_id is '</s>'; a whole number, or a list"):
        exported(root, "gguf")


def test_hf_is_a_folder_that_transformers_loads_with_its_card(root: Path) -> None:
    folder = exported(root, "hf", root / "shared")
    text = "the deep 12"
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert ids == Tokenizer.from_file(str(root / "models/float/tokenizer.json")).encode(text).ids
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    assert (folder / "README.md").read_text() == "# tiny-lm\n"


def test_a_checkpoint_in_16_bits_comes_out_as_it_went_in(root: Path) -> None:
    theirs, ours = root / "theirs", root / "models/float"
    model = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.bfloat16)
    model.save_pretrained(theirs, max_shard_size="30KB")
    # Cut as a large model's is.
    (ours / "model.safetensors").unlink()
    loaded = hugging_face.load(theirs)
    hugging_face.save_weights(loaded.config, hugging_face.held_by(loaded), ours, bytes_a_file=60_000)
    folder = exported(root, "hf", type_="bf16")
    assert folder == root / ".overnight/export/hf-bf16"
    before, after = weights_of(theirs), weights_of(folder)
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in before)
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    # Without being told which.
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert again.dtype == torch.bfloat16
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert {path.name for path in folder.iterdir()} >= {path.name for path in ours.iterdir()}


def test_routers_corrections_keep_their_32_bits(root: Path) -> None:
    ours = root / "models/float"
    hugging_face.save(odd.make_model(**IDS), root / "tokenizer.json", ours)
    before, after = weights_of(ours), weights_of(exported(root, "hf", type_="f16"))
    kept = {name for name in before if after[name].dtype == torch.float32}
    assert kept == {name for name in before if name.endswith("e_score_correction_bias")} != set()
    assert all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in before)


def test_what_f16_cannot_hold_is_named(root: Path) -> None:
    model = hugging_face.load(root / "models/float")
    with torch.no_grad():
        model.lm_head.weight[3] = 70_000.0
    hugging_face.save(model, root / "tokenizer.json", root / "models/float")
    with pytest.raises(BadInput, match=r"models/float: lm_head\.weight has numbers beyond 65,504, .*bf16 holds"):
        exported(root, "hf", type_="f16")
    assert not any(path.is_file() for path in (root / ".overnight").rglob("*"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_onnx_is_a_folder_that_the_runtime_loads_and_a_card_is_no_must(root: Path) -> None:
    shutil.rmtree(root / "models/card")
    folder = exported(root, "onnx")
    assert folder == root / ".overnight/export/onnx"
    assert tiny.files_of(folder) == shipped(root)
    assert Generator(folder, threads=1).context == 64


def test_a_standard_graph_is_one_that_the_runtime_loads_too_with_what_it_needs(root: Path) -> None:
    folder = exported(root, "onnx", None, "standard")
    assert folder == root / ".overnight/export/onnx-standard"
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    assert {node.domain for node in nodes} == {""}
    # The audit is of the operators that ship.
    assert tiny.files_of(folder).keys() - {"README.md"} == shipped(root).keys() - {"audit.json"}
    asked = text.Request("In the", 8, Sampling(temperature=0.0))
    written = ["".join(Generator(place, threads=1).generate(asked)) for place in (folder, root / "models/int8")]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("gguff"), "--to: there is no format 'gguff'; choose one of gguf, hf, onnx."),
        (Request("gguf", type="q4"), "--type: there is no type 'q4'; choose one of f32, f16, bf16, q8_0."),
        (Request("hf", type="q8_0"), "--type: there is no type 'q8_0'; choose one of f32, bf16, f16."),
        (Request("onnx", type="f16"), "--type: there is no type 'f16'; choose one of onnxruntime, standard."),
        (Request("gguf", Path("full")), "full: a folder; name a file in it with --output."),
        (
            Request("gguf", Path("full/file")),
            "full/file: already there; remove it, or name another file with --output.",
        ),
        (
            Request("onnx", Path("full")),
            "full: not an empty folder. Name one that is empty, or not there yet, with --output.",
        ),
        (
            Request("hf", Path("full/file")),
            "full/file: not an empty folder. Name one that is empty, or not there yet, with --output.",
        ),
        (Request("gguf", Path("full/file/x.gguf")), "full/file: File exists."),
        *(
            (Request(to, Path(place)), f"{place}: in {folder}/, where runs write; name another place with --output.")
            for to, place, folder in (
                ("onnx", "models/int8/inside", "models"),
                ("hf", "data/raw/inside", "data"),
                ("gguf", "full/../models/x.gguf", "models"),
                ("gguf", "link/x.gguf", "models"),
            )
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    root: Path, monkeypatch: pytest.MonkeyPatch, request_: Request, message: str
) -> None:
    monkeypatch.chdir(root)
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    Path("link").symlink_to("models/int8")
    before = tiny.files_of(root)
    with pytest.raises(UserMistake) as refused:
        export(root, request_, Console(quiet=True), Console(quiet=True))
    assert str(refused.value) == message
    assert tiny.files_of(root) == before


@pytest.mark.parametrize("to", ["gguf", "hf", "onnx"])
def test_before_there_is_a_model(root: Path, to: str) -> None:
    shutil.rmtree(root / "models")
    with pytest.raises(BadInput, match=r"no such file\. Run `overnight run` first; it makes the "):
        exported(root, to)
    told = (
        rf"^models/{'int8' if to == 'onnx' else 'float'}: not there yet: run a-run \(process \d+\) is at work and makes"
    )
    with runs.attempt(root, "a-run"), pytest.raises(BadInput, match=told):
        exported(root, to)


@pytest.mark.parametrize(
    ("to", "file"),
    [
        ("gguf", "float/model.safetensors"),
        ("hf", "float/config.json"),
        ("hf", "float/model.safetensors"),
        ("onnx", "int8/model.onnx"),
    ],
)
def test_a_damaged_model_is_named_and_leaves_nothing(root: Path, to: str, file: str) -> None:
    (root / "models" / file).write_bytes(b"damaged")
    with pytest.raises(BadInput, match=f"models/{file}: "):
        exported(root, to)
    assert not any(path.is_file() for path in (root / ".overnight").rglob("*"))


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0], ids=["before the tensors", "inside them", "at the end"])
@pytest.mark.parametrize(("to", "type_"), [("gguf", "f32"), ("hf", None), ("hf", "bf16")])
def test_a_full_disk_leaves_nothing(root: Path, small_disk: Any, to: str, type_: str | None, share: float) -> None:
    whole = exported(root, to, root / "whole", type_)
    size = whole.stat().st_size if to == "gguf" else (whole / "model.safetensors").stat().st_size
    # A disk has whole pages of 4 KiB: at the end, less than one is missing.
    small_disk(root / "disk", max(1, int(size * share) // 4096) * 4)
    with pytest.raises(DiskFull, match=r"disk/copy: the disk is full"):
        exported(root, to, root / "disk/copy", type_)
    assert list((root / "disk").iterdir()) == []


def test_a_tokenizer_of_another_kind_is_refused(root: Path) -> None:
    tiny.write_tokenizer(root / "models/float/tokenizer.json")
    with pytest.raises(BadInput, match=r"models/float/tokenizer\.json: it cuts texts as none of the ways"):
        exported(root, "gguf")


def test_the_command_says_where_it_lies(project: "Project", made: Path) -> None:
    shutil.copytree(made / "models", project.root / "models", dirs_exist_ok=True)
    done = project.overnight("export", "--to", "gguf", "--output", "out/model.gguf", "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out/model.gguf  ")
    assert gguf_file.load(project.root / "out/model.gguf").config.vocab_size == SIZE
    again = project.overnight("export", "--to", "gguf", "--output", "out/model.gguf")
    assert again.returncode == 2
    assert again.stderr == "error: out/model.gguf: already there; remove it, or name another file with --output.\n"
