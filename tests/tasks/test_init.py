"""Training that goes on from a checkpoint: how it comes into the project, what is kept of it, and what is refused."""

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from odd import make_gated_mixture, make_grouped, make_model, write_checkpoint
from safetensors.torch import load_file, save_file
from texts import write_trained_tokenizer
from tokenizers import Tokenizer

from lm import gguf_write, hugging_face
from lm.gguf_tokenizer import PIECES
from lm.model import LanguageModel
from lm.runtime import Generator
from tasks import init, paths
from tasks.collect.init import collect_init
from tasks.digest import digest_of
from tasks.errors import BadInput, BadParameter, UserMistake
from tasks.evaluate.texts import documents
from tasks.section import read_section
from tasks.shard.params import ShardParams
from tasks.shard.shard import shard
from tasks.shards import Shards, read_manifest
from tasks.train import start
from tasks.train.params import TrainParams

# What is computed here beside a training's is in fp32.
CHECKPOINT = {
    "train__init": "given", "train__model": None, "train__precision": "fp32", "train__world_size": 1,
    "shard__vocab_size": None,
}  # fmt: skip


@pytest.fixture
def corpus(project: Path) -> Path:
    """A project with a little text, in which training starts from the checkpoint in `given`."""
    tiny.write_params(
        project, **CHECKPOINT, quantize__world_size=1, train__learning_rate=1e-6, quantize__scheme="dynamic"
    )
    for split, count in (("train", 40), ("valid", 8), ("test", 8)):
        folder = project / paths.CORPUS / split
        folder.mkdir(parents=True)
        rows = [f"The {index}th day: light, and the name <|endoftext|> in it. " * 3 for index in range(count)]
        pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), folder / "part-00000.parquet")
    return project


@pytest.fixture
def brought(corpus: Path) -> Path:
    """That project, with the checkpoint collected and the shards written."""
    write_checkpoint(corpus / "given")
    collect_init("given")
    shard(read_section("shard", ShardParams), init.checkpoint())
    return corpus


@pytest.mark.parametrize("make", [make_grouped, make_gated_mixture])
def test_a_training_goes_on_from_a_checkpoint_and_keeps_what_belongs_to_it(
    corpus: Path, make: Callable[..., LanguageModel]
) -> None:
    model = write_checkpoint(corpus / "given", make)
    # As a model has it with several templates.
    (corpus / "given/additional_chat_templates").mkdir()
    (corpus / "given/additional_chat_templates/rag.jinja").write_text("{{ documents }}")
    collect_init("given")
    for stage in ("shard", "train", "quantize"):
        code, output = tiny.run(stage, corpus)
        assert code == 0, output
    trained = hugging_face.load(paths.FLOAT)
    assert (trained.config.max_position_embeddings, trained.config.window) == (64, 16)
    for name, tensor in model.state_dict().items():
        # Twelve steps at a tiny rate: near where it began, and not there any more.
        assert 0 < (trained.state_dict()[name] - tensor).abs().max() < 1e-3, name
    for folder in (paths.FLOAT, paths.INT8):
        templates = ("chat_template.jinja", "additional_chat_templates/rag.jinja")
        for name in ("tokenizer.json", *templates, "tokenizer_config.json", "generation_config.json"):
            assert (folder / name).read_bytes() == (corpus / "given" / name).read_bytes()
    report = json.loads(paths.TRAIN_REPORT.read_text())
    assert report["started_from"] == "given"
    windows = Shards(paths.SHARDS, read_manifest(), "valid").reader(16)
    count = min(len(windows), read_section("train", TrainParams).validation_windows)
    read = windows.batch(np.arange(count) * len(windows) // count).astype(np.int64)
    with torch.no_grad():
        assert report["valid_loss_before"] == pytest.approx(float(model.loss(torch.from_numpy(read))), abs=1e-4)
    assert report["valid_loss_before"] != report["valid_loss"]
    generator = Generator(paths.INT8, threads=1)
    assert (generator.context, generator.window) == (64, 16)


def test_shards_are_written_in_the_checkpoint_s_tokens(brought: Path) -> None:
    manifest = read_manifest()
    assert (manifest.vocab_size, manifest.bos_token_id) == (tiny.VOCAB, tiny.VOCAB - 1)
    assert paths.TOKENIZER.read_bytes() == (brought / "given/tokenizer.json").read_bytes()
    # The name of a special token in a text is text: one token begins each document.
    (entry,) = manifest.of_split("test")
    assert entry.tokens == entry.bytes + entry.documents


@pytest.mark.parametrize("bos", [tiny.VOCAB - 1, 7])
def test_a_document_ends_as_the_checkpoint_ends_texts(bos: int, corpus: Path) -> None:
    eos = tiny.VOCAB - 1
    write_checkpoint(corpus / "given", bos_token_id=bos, eos_token_id=eos)
    collect_init("given")
    manifest = shard(read_section("shard", ShardParams), init.checkpoint())
    shards = Shards(paths.SHARDS, manifest, "test")
    # The beginning of the next one is the end where a checkpoint has one token for both.
    end = [eos] if bos != eos else []
    measured = documents(shards, manifest)
    assert measured.learned is None
    for (tokens, size), (text, text_size) in zip(shards.documents(), measured.tokens, strict=True):
        assert (tokens[0], len(tokens)) == (bos, 1 + size + len(end))
        # An end has no bytes, and the champion's tokenizer may have none.
        assert (text.tolist() + end, text_size) == (tokens.tolist(), size)


def test_collecting_copies_what_changed_and_keeps_what_has_gone(corpus: Path) -> None:
    def state() -> str | None:
        found = collect_init("given")
        return found and found.state

    write_checkpoint(corpus / "given")
    (corpus / "given/notes.bin").write_text("not part of the checkpoint")
    assert [state(), state()] == ["new", "unchanged"]
    assert not (paths.INIT / "notes.bin").exists()
    (corpus / "given/chat_template.jinja").write_text("{{ other }}")
    assert [state(), state()] == ["changed", "unchanged"]
    (paths.INIT / "config.json").unlink()
    assert state() == "changed"
    shutil.rmtree(corpus / "given")
    told = collect_init("given")
    assert told is not None
    assert told.notice == "train.init: given has gone; its copy in models/init is still used"
    assert init.checkpoint() == paths.INIT
    assert collect_init("previous") is collect_init("scratch") is None


def with_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Writes the weights in ``folder`` again with other tensors; None leaves one out."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def with_entry(file: str, key: str, value: object, folder: Path) -> None:
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), key: value}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "train.init: 'given' is neither scratch nor previous, and there is no"),
        (lambda folder: (folder / "config.json").unlink(), "given: config.json: no such file. Mend the folder"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "given: tokenizer.json: no such file"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"given: pytorch_model\.bin: a pickle",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "given: config.json: not JSON"),
        (
            lambda folder: (folder / "merges.txt").symlink_to("/etc/passwd"),
            "merges.txt: a link to /etc/passwd, outside",
        ),
        *(
            (
                functools.partial(with_entry, file, key, value),
                rf"given: {file}: {key} is {re.escape(repr(value))}; a whole",
            )
            for file, key, value in (
                ("generation_config.json", "eos_token_id", "</s>"),
                ("generation_config.json", "eos_token_id", [256, None]),
                ("generation_config.json", "bos_token_id", True),
                ("config.json", "eos_token_id", [256, "2"]),
            )
        ),
        (
            lambda folder: with_weights(folder, **{"model.norm.weight": None}),
            r"given: model\.safetensors: without model\.norm\.weight, .*\. Mend the folder, or name another in train",
        ),
        (
            lambda folder: with_weights(folder, more=torch.zeros(2)),
            r"given: model\.safetensors: a llama of this config\.json has no more\. Mend",
        ),
        (
            lambda folder: with_weights(folder, **{"model.norm.weight": torch.zeros(3)}),
            r"given: model\.safetensors: model\.norm\.weight is \[3\]; config\.json makes it",
        ),
        (lambda folder: cut(folder / "model.safetensors"), r"given: model\.safetensors: damaged, or no safetensors"),
    ],
)
def test_a_folder_that_holds_no_checkpoint_is_refused_before_it_is_copied(
    spoil: Callable[[Path], Any], said: str, corpus: Path
) -> None:
    write_checkpoint(corpus / "given")
    spoil(corpus / "given")
    with pytest.raises(UserMistake, match=said):
        collect_init("given")
    assert not paths.INIT.exists()


def test_a_checkpoint_that_has_become_unusable_leaves_the_one_that_is_there(corpus: Path) -> None:
    write_checkpoint(corpus / "given")
    collect_init("given")
    before = tiny.files_of(paths.INIT)
    (corpus / "given/chat_template.jinja").write_text("{{ other }}")
    cut(corpus / "given/model.safetensors")
    with pytest.raises(BadInput, match=r"given: model\.safetensors: damaged"):
        collect_init("given")
    assert tiny.files_of(paths.INIT) == before


def test_torch_is_imported_for_a_new_checkpoint_alone(corpus: Path) -> None:
    write_checkpoint(corpus / "given")
    look = (
        "import sys; from tasks.collect.init import collect_init; collect_init('given'); print('torch' in sys.modules)"
    )
    found = [subprocess.run([sys.executable, "-c", look], capture_output=True, text=True).stdout for _ in range(2)]
    assert found == ["True\n", "False\n"]


def test_a_folder_of_the_hub_s_cache_is_a_checkpoint(corpus: Path) -> None:
    snapshot, blobs = corpus / "models--given/snapshots/0123abcd", corpus / "models--given/blobs"
    write_checkpoint(snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    found = collect_init("models--given/snapshots/0123abcd")
    assert found is not None
    assert found.state == "new"
    assert not any(file.is_symlink() for file in paths.INIT.iterdir())


def test_a_gguf_model_in_several_files_is_brought_anew_when_one_of_them_changes(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    _, folder = gguf_files.make_checkpoint(tmp_path / "source")
    first, *others = gguf_files.split(gguf_files.written(folder), corpus / "given.gguf")
    states = [collect_init(first.name) for _ in range(2)]
    content = bytearray(others[-1].read_bytes())
    content[gguf.GGUFReader(others[-1]).tensors[0].data_offset] ^= 1
    others[-1].write_bytes(content)
    states.append(collect_init(first.name))
    assert [report and report.state for report in states] == ["new", "unchanged", "changed"]
    others[-1].unlink()
    with pytest.raises(BadInput, match=rf"{first.name}: it is the first of 3 parts, and {others[-1].name} is missing"):
        collect_init(first.name)


def test_a_file_is_no_folder(corpus: Path) -> None:
    (corpus / "given").touch()
    with pytest.raises(BadInput, match=r"given: damaged, or no GGUF file .*Name another file in train.init"):
        collect_init("given")


def test_a_pickle_is_refused_by_its_name(corpus: Path) -> None:
    (corpus / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    told = r"pytorch_model\.bin: a pickle, which can run code when it is read\. Convert it to safetensors, and name"
    with pytest.raises(BadInput, match=told):
        collect_init("pytorch_model.bin")


def test_a_gguf_file_is_unpacked_into_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    size = 330
    model = make_grouped(vocab_size=size, bos_token_id=size - 1, eos_token_id=size - 1)
    (tmp_path / "source").mkdir()
    write_trained_tokenizer(tmp_path / "tokenizer.json", PIECES["llama-bpe"], size)
    hugging_face.save(model, tmp_path / "tokenizer.json", tmp_path / "source")
    (tmp_path / "source/chat_template.jinja").write_text("{{ messages[0].content }}\n")
    ends = [size - 1, 7, 5]
    (tmp_path / "source/generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    gguf_write.write(tmp_path / "source", corpus / "given.gguf", "f32", {})

    first, again = (collect_init("given.gguf") for _ in range(2))
    assert first is not None
    assert again is not None
    assert (first.state, again.state) == ("new", "unchanged")
    assert init.read().unpacked == digest_of(corpus / "given.gguf")
    assert (paths.INIT / "chat_template.jinja").read_text() == "{{ messages[0].content }}\n"
    assert json.loads((paths.INIT / "generation_config.json").read_text())["eos_token_id"] == ends
    unpacked, written = (load_file(folder / "model.safetensors") for folder in (paths.INIT, tmp_path / "source"))
    assert unpacked.keys() == written.keys()
    assert all(torch.equal(unpacked[name], tensor) for name, tensor in written.items())
    ids, expected = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Light, 1234 lights.", add_special_tokens=False).ids
        for folder in (paths.INIT, tmp_path / "source")
    )
    assert ids == expected
    tiny.write_params(corpus, **{**CHECKPOINT, "train__init": "given.gguf"})
    for stage in ("shard", "train"):
        code, output = tiny.run(stage, corpus)
        assert code == 0, output


def check() -> Path | None:
    return start.check(read_section("train", TrainParams), read_manifest())


def test_what_contradicts_the_checkpoint_is_named(brought: Path) -> None:
    assert check() == paths.INIT
    other = {**tiny.LLAMA, "model_type": "llama"}
    cases = [
        ({"train__seq_len": 65}, "train.seq_len 65 is more than the 64 positions"),
        ({"train__model": other}, r"head_dim|hidden_size 32 \(there 42\)"),
        ({"train__model": tiny.QWEN3_MOE}, r"names: model_type qwen3_moe \(there llama\)\. Set model: null"),
        ({"train__init": "other"}, "it holds what train.init called 'given', and params.yaml says 'other'"),
    ]
    for changes, said in cases:
        tiny.write_params(brought, **{**CHECKPOINT, **changes})
        with pytest.raises(UserMistake, match=said):
            check()
    tiny.write_params(brought, **{**CHECKPOINT, "shard__vocab_size": 300})
    with pytest.raises(BadParameter, match=r"shard\.vocab_size is 300, and the tokenizer .* has 257 tokens"):
        shard(read_section("shard", ShardParams), init.checkpoint())


def test_weights_that_do_not_fit_end_before_a_process_starts(brought: Path) -> None:
    tensors = load_file(paths.INIT / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, paths.INIT / "model.safetensors")
    with pytest.raises(BadInput, match=r"models/init/model\.safetensors: not what was brought"):
        check()
    init.write_record(paths.INIT, init.read())
    with pytest.raises(BadInput, match=r"models/init: model\.safetensors: without model\.norm\.weight"):
        check()
    code, output = tiny.run("train", brought)
    assert code == 2
    assert "without model.norm.weight" in tiny.error_line(output)


def test_weights_that_are_not_finite_are_told_before_the_first_step(corpus: Path) -> None:
    write_checkpoint(corpus / "given")
    place = corpus / "given/model.safetensors"
    weights = load_file(place)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, place, {"format": "pt"})
    collect_init("given")
    shard(read_section("shard", ShardParams), init.checkpoint())
    code, output = tiny.run("train", corpus)
    assert code == 2, output
    assert tiny.error_line(output) == (
        "models/init: the validation loss of its weights is not finite (nan), before the first step. Start from "
        "another checkpoint (train.init)."
    )


def test_shards_of_another_tokenizer_are_refused(brought: Path) -> None:
    write_checkpoint(brought / "given", make_model)
    text = (brought / "given/tokenizer.json").read_text()
    (brought / "given/tokenizer.json").write_text(text + "\n")
    collect_init("given")
    with pytest.raises(BadInput, match=r"not the tokenizer that made data/shards\. Rerun 'shard'"):
        check()


def test_a_tokenizer_that_changes_the_text_is_refused(corpus: Path) -> None:
    write_checkpoint(corpus / "given")
    content = json.loads((corpus / "given/tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (corpus / "given/tokenizer.json").write_text(json.dumps(content))
    collect_init("given")
    with pytest.raises(BadInput, match="8 of 8 documents of the valid split come back changed"):
        shard(read_section("shard", ShardParams), init.checkpoint())


@pytest.mark.parametrize("changes", [{}, {"train__mtp_loss_weight": 0.0}, {"train__lora": {"rank": 2}}])
def test_layers_that_predict_further_tokens_are_whole_where_they_are_to_be_trained(
    changes: dict[str, Any], corpus: Path
) -> None:
    write_checkpoint(corpus / "given", lambda **ids: make_model(**ids, num_nextn_predict_layers=1))
    file = corpus / "given/model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.3.eh_proj.weight"]
    save_file(tensors, file)
    tiny.write_params(corpus, **CHECKPOINT, **changes)
    if changes:
        collect_init("given")
        # What lies there by now is to be trained.
        tiny.write_params(corpus, **CHECKPOINT)
    told = r"without model\.layers\.3\.eh_proj\.weight, which .*\. Mend the folder, or set train\.mtp_loss_weight: 0 to"
    with pytest.raises(BadInput, match=told):
        collect_init("given")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(corpus: Path) -> None:
    write_checkpoint(corpus / "given", vocab_size=250, bos_token_id=1, eos_token_id=2)
    collect_init("given")
    told = r"it has 257 tokens, and config\.json's vocab_size is 250: the model knows no 'ú' \(250\), 'û' \(251\), "
    with pytest.raises(
        BadInput, match=told + r"'ü' \(252\) and 4 more\. Where no text needs them, remove them from it"
    ):
        shard(read_section("shard", ShardParams), init.checkpoint())


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_in_the_files_of_older_releases_is_told_with_what_writes_the_newer_one(
    name: str, corpus: Path
) -> None:
    write_checkpoint(corpus / "given")
    (corpus / "given/tokenizer.json").rename(corpus / "given" / name)
    told = rf"tokenizer\.json: no such file; .* There is {name}, of which transformers, .* writes it: AutoTokenizer\."
    with pytest.raises(BadInput, match=told):
        collect_init("given")
    (corpus / "given" / name).unlink()
    with pytest.raises(BadInput, match=r"tokenizer\.json: no such file; [^.]*\. Mend the folder"):
        collect_init("given")


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_an_end_of_texts_that_the_tokenizer_does_not_have_is_refused(name: str, corpus: Path) -> None:
    # The embedding has a row for it.
    write_checkpoint(corpus / "given", **{name: tiny.VOCAB + 3})
    collect_init("given")
    with pytest.raises(BadInput, match=rf"tokenizer\.json: it has no token 260, which is config\.json's {name}"):
        shard(read_section("shard", ShardParams), init.checkpoint())


def test_without_a_version_in_production_previous_is_from_scratch(project: Path) -> None:
    tiny.write_params(project, train__init="previous")
    tiny.write_shards(project)
    with pytest.raises(BadInput, match=r"models/init/init\.json: no such file"):
        check()
    paths.INIT.mkdir(parents=True)
    init.write_record(paths.INIT, init.Init(init="previous"))
    assert check() is None
    tiny.write_params(project, train__init="previous", train__model=None)
    with pytest.raises(BadParameter, match=r"train\.model is null, and no version is promoted yet"):
        check()
    tiny.write_params(project, train__model=None)
    with pytest.raises(BadParameter, match="train: model is null, but init: scratch needs one"):
        check()


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (init.Init(init="/srv/models/Qwen3-0.6B/"), "Qwen3-0.6B"),
        (init.Init(init="given.gguf"), "given.gguf"),
        (init.Init(init="previous", version="lm@v1.3.0"), "lm@v1.3.0"),
        (init.Init(init=".."), ".."),
    ],
)
def test_a_report_names_a_checkpoint_and_not_where_it_lay(record: init.Init, name: str) -> None:
    assert record.name == name
