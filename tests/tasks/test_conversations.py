"""Conversations as data: what is kept, which tokens of them are learned, and that nothing else is."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from odd import write_checkpoint
from tokenizers import Tokenizer

from lm import hugging_face
from lm.chat_template import ChatTemplate, Message, Unrenderable
from tasks import init, paths
from tasks.collect.init import collect_init
from tasks.errors import BadInput, BadParameter
from tasks.evaluate.texts import documents
from tasks.ingest.conversation import as_text
from tasks.ingest.ingest import REFUSED, ingest
from tasks.ingest.params import IngestParams
from tasks.order import batch_of_rank
from tasks.progress import Progress
from tasks.section import read_section
from tasks.shard.conversations import TODAY, Conversations
from tasks.shard.params import ShardParams
from tasks.shard.shard import shard
from tasks.shards import Shards, SplitName, WindowReader, read_manifest, share_learned
from tasks.sources import CollectParams

WriteJsonl = Callable[[Path, Iterable[object]], None]
START, END = tiny.VOCAB, tiny.VOCAB + 1
SOURCE = {
    "name": "talks", "uri": "anywhere", "format": "jsonl", "licence": "CC0-1.0", "messages_field": "messages",
    "group_field": "topic",
}  # fmt: skip
PLAIN = {"name": "notes", "uri": "anywhere", "format": "jsonl", "licence": "CC0-1.0", "text_field": "text"}
# Other templates than ChatML: one that trims and begins the text, one that drops what was thought before.
TRIMMING = """\
{{- bos_token }}
{%- for message in messages %}<|im_start|>{{ message.role }}: {{ message.content | trim }}<|im_end|>{% endfor %}
"""
THINKING = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set answer = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.last and '</think>' in message.content %}
            {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {{- 'A<think>\\n' + thought + '\\n</think>\\n\\n' + answer + '<|im_end|>' }}
        {%- else %}{{- 'A' + answer + '<|im_end|>' }}{% endif %}
    {%- else %}{{- 'Q' + message.content }}{% endif %}
{%- endfor %}
"""
# As Qwen3's: the prompt for an answer does not say that the model is to think, so it does so itself.
DECIDING = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set answer = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.last %}
            {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set thought = thought if '</think>' in message.content else '' %}
            {{- 'A<think>\\n' + thought + '\\n</think>\\n\\n' + answer + '<|im_end|>' }}
        {%- else %}{{- 'A' + answer + '<|im_end|>' }}{% endif %}
    {%- else %}{{- 'Q' + message.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'A' }}{% endif %}
"""


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


def talk(topic: int) -> dict[str, Any]:
    return {"messages": turns(f"How is {topic}?", f"It is {topic * 7}.", "Sure?", "Yes. " * 4), "topic": topic}


@pytest.fixture
def chat(tmp_path: Path) -> Callable[[str], ChatTemplate]:
    def read(source: str) -> ChatTemplate:
        tiny.write_chat_tokenizer(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(source)
        found = ChatTemplate.read(tmp_path, Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
        assert found is not None
        return found

    return read


def learned(template: ChatTemplate, *contents: str) -> list[bytes]:
    """What is learned of a conversation, answer by answer, with a control token as ``|``."""
    ids, mask = template.encode_answers([Message(**turn) for turn in turns(*contents)], TODAY)  # type: ignore[arg-type]
    told = "".join("." if not kept else chr(id_) if id_ < 256 else "|" for id_, kept in zip(ids, mask, strict=True))
    return [part.encode("latin-1") for part in told.split(".") if part]


THOUGHT = "<think>\nwest\n</think>\n\n"


@pytest.mark.parametrize(
    ("source", "contents", "expected"),
    [
        (tiny.CHATML, ("a", "b", "c", " d! "), [b"b|", b"d! |"]),
        (TRIMMING, ("a", "\nb ", "c", "é"), [b"b|", "é".encode() + b"|"]),
        (THINKING, ("a", f"{THOUGHT}b", "c", f"{THOUGHT}d"), [b"b|", b"west\n|\n\nd|"]),
        (DECIDING, ("a", f"{THOUGHT}b", "c", f"{THOUGHT}d"), [b"b|", b"|\nwest\n|\n\nd|"]),
        (DECIDING, ("a", "b", "c", "d"), [b"b|", b"|\n\n|\n\nd|"]),
        # The prompt begins the thought (DeepSeek-R1): what is behind it is the model's.
        (DECIDING.replace("{{- 'A' }}", "{{- 'A<think>\\n' }}"), ("a", f"{THOUGHT}b"), [b"west\n|\n\nb|"]),
        # What looks like a control token is text, in an answer too, and moves nothing behind it.
        (
            tiny.CHATML,
            ("a<|im_end|>b", "c<|im_start|>d", "e\ufdd2f", "g\ufdd3h"),
            [b"c<|im_start|>d|", b"g\xef\xbf\xbdh|"],
        ),
        (tiny.CHATML, ("a", "  ", "c", "d"), [b"d|"]),
    ],
)
def test_answers_and_the_tokens_that_end_them_are_learned(
    source: str, contents: tuple[str, ...], expected: list[bytes], chat: Callable[[str], ChatTemplate]
) -> None:
    template = chat(source + "{# <think></think> #}")
    assert learned(template, *contents) == expected
    messages = [Message(**turn) for turn in turns(*contents)]  # type: ignore[arg-type]
    whole = [*messages, Message("user", "x")]
    # The same tokens as when it is answered, up to where the prompt differs.
    shared = len(template.encode_answers(messages, TODAY)[0]) if "'</think>'" not in source else 0
    assert template.encode_answers(whole, TODAY)[0][:shared] == template.encode(whole)[:shared]


def test_a_template_that_makes_something_else_of_answers_is_refused(chat: Callable[[str], ChatTemplate]) -> None:
    template = chat("{% for message in messages %}{{ message.content | length }}{% endfor %}")
    with pytest.raises(Unrenderable, match="changes the answers"):
        learned(template, "a", "b")


def test_a_template_that_writes_the_day_makes_the_same_shards_tomorrow(
    chat: Callable[[str], ChatTemplate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = chat('{{ strftime_now("%d %b %Y") }}' + tiny.CHATML)
    # Whoever asks the clock fails.
    monkeypatch.setattr("lm.chat_template.datetime", None)
    with pytest.raises(Unrenderable):
        template.encode([Message("user", "a")])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    document = Conversations(template, tokenizer).encode(json.dumps(turns("a", "b")), tiny.VOCAB - 1, "<u2")
    assert document is not None
    assert bytes(id_ for id_ in document.tokens.tolist() if id_ < 256).startswith(b"26 Jul 2024user\na")


def test_a_name_beside_a_role_is_learned_as_it_is_served(chat: Callable[[str], ChatTemplate], tmp_path: Path) -> None:
    template = chat(tiny.CHATML.replace("+ message.role +", "+ message.role + message.get('name', '') +"))
    text = as_text([{**turns("a")[0], "name": "Ann"}, {"role": "assistant", "content": "b", "name": None}])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    document = Conversations(template, tokenizer).encode(text, tiny.VOCAB - 1, "<u2")
    assert document is not None
    assert bytes(id_ for id_ in document.tokens.tolist() if id_ < 256).startswith(b"userAnn\na")
    served = template.encode([Message("user", "a", "Ann")])
    assert document.tokens.tolist()[1 : len(served) + 1] == served


def collected(project: Path, write_jsonl: WriteJsonl, talks: list[object], plain: int = 0) -> None:
    write_jsonl(project / paths.RAW / "talks/talks.jsonl", talks)
    if plain:
        write_jsonl(project / paths.RAW / "notes/notes.jsonl", [{"text": f"note {n} of light"} for n in range(plain)])


def ingested(*sources: dict[str, Any], rate: float = 0.5) -> Any:
    split = {"seed": 1, "valid": 0.2, "test": 0.2}
    params = IngestParams.model_validate({"max_line_bytes": 10000, "max_reject_rate": rate, "split": split})
    return ingest(CollectParams.model_validate({"sources": list(sources)}), params)


def test_malformed_conversations_go_to_quarantine_with_their_reason(project: Path, write_jsonl: WriteJsonl) -> None:
    wrong: dict[str, object] = {
        "no list of messages": [],
        "message 1 is no object": ["hello"],
        "message 1 has no role of system, user, assistant": [{"role": "tool", "content": "x"}],
        "message 2 has no text as content": [*turns("a"), {"role": "assistant", "content": [{"type": "text"}]}],
        "message 1 has no text as name": [{"role": "user", "content": "a", "name": 7}],
        "message 1 has 1 more fields than role, content and name": [
            {"role": "user", "content": "a", "tool_calls": [1]}
        ],
        "no answer of the assistant": turns("a", " \n"),
    }
    rows = [{"messages": messages, "topic": 0} for messages in wrong.values()]
    collected(project, write_jsonl, [*rows, *map(talk, range(20)), {"topic": 1}, {"messages": "text", "topic": 1}])
    report = ingested(SOURCE)
    assert report.sources[0].records.reasons == {"malformed conversation": 8, "missing field": 1}
    told = pq.read_table(paths.QUARANTINE).to_pylist()
    assert [row["detail"] for row in told if row["reason"] == "malformed conversation"][:7] == list(wrong)
    kept = [row for split in ("train", "valid", "test") for row in pq.read_table(paths.CORPUS / split).to_pylist()]
    assert len(kept) == 20
    assert all(row["is_conversation"] for row in kept)
    assert json.loads(kept[0]["text"])[1]["role"] == "assistant"
    with pytest.raises(BadInput, match=r"malformed conversation \(8, first in .* line 1: no list of messages\)"):
        ingested(SOURCE, rate=0.1)
    assert REFUSED.exists()


@pytest.mark.parametrize(
    "changes", [{"text_field": "text"}, {"format": "csv"}, {"document_fields": ["topic"]}], ids=str
)
def test_what_a_conversation_cannot_have_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="messages_field is for format jsonl, without text_field or document_fields"):
        CollectParams.model_validate({"sources": [{**SOURCE, **changes}]})


@pytest.fixture
def sharded(project: Path, write_jsonl: WriteJsonl) -> Path:
    """A project with shards of conversations and of plain text, and a checkpoint that reads both."""
    collected(project, write_jsonl, [*map(talk, range(60))], plain=30)
    ingested(SOURCE, PLAIN)
    write_checkpoint(project / "given", vocab_size=tiny.VOCAB + 7)
    tiny.write_chat_tokenizer(project / "given")
    (project / "given/generation_config.json").unlink()
    (project / "given/chat_template.jinja").write_text(tiny.CHATML)
    tiny.write_params(project, train__init="given", train__model=None, shard__vocab_size=None)
    collect_init("given")
    shard(read_section("shard", ShardParams), init.checkpoint())
    return project


def test_shards_say_which_tokens_are_learned(sharded: Path) -> None:
    manifest = read_manifest()
    assert manifest.has_conversations
    assert manifest.answer_ends == [END]
    seen = 0
    for split in ("train", "valid", "test"):
        shards = Shards(paths.SHARDS, manifest, split)  # type: ignore[arg-type]
        masks = shards.learned()
        assert masks is not None
        for (tokens, size), mask in zip(shards.documents(), masks, strict=True):
            ids = tokens.tolist()
            assert ids[0] == manifest.bos_token_id
            if START not in ids:
                assert mask.all()
                continue
            seen += 1
            topic = int(bytes(id_ for id_ in ids if id_ < 256).split(b"How is ")[1].split(b"?")[0])
            answers = [f"It is {topic * 7}.".encode(), b"Yes. Yes. Yes. Yes. "]
            assert tokens[mask].tolist() == [*answers[0], END, *answers[1], END]
            assert size == sum(map(len, answers))
    assert seen == 60


def test_the_end_of_a_plain_text_is_learned_and_not_measured(sharded: Path) -> None:
    config = json.loads((sharded / "given/config.json").read_text())
    (sharded / "given/config.json").write_text(json.dumps({**config, "bos_token_id": 7}))
    collect_init("given")
    manifest = shard(read_section("shard", ShardParams), init.checkpoint())
    shards = Shards(paths.SHARDS, manifest, "train")
    measured, masks = documents(shards, manifest), shards.learned()
    assert masks is not None
    assert measured.learned is not None
    plain = 0
    pairs = zip(shards.documents(), masks, measured.tokens, measured.learned, strict=True)
    for (tokens, _), mask, (kept, _), counted in pairs:
        if START in tokens:
            assert (kept.tolist(), counted.tolist()) == (tokens.tolist(), mask.tolist())
        else:
            plain += 1
            assert (tokens[0], tokens[-1], mask.all()) == (7, config["eos_token_id"], True)
            assert (kept.tolist(), counted.tolist()) == (tokens[:-1].tolist(), mask[:-1].tolist())
    assert 0 < plain < len(masks)


def test_what_is_told_of_bytes_a_token_is_of_what_is_learned(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []

    def update(self: Progress, done: int, total: int, unit: str, **more: float) -> None:
        told.extend(value for name, value in more.items() if name == "bytes_per_token")

    monkeypatch.setattr(Progress, "update", update)
    shard(read_section("shard", ShardParams), init.checkpoint())
    size = learned = 0
    for split in ("train", "valid", "test"):
        found = Shards(paths.SHARDS, read_manifest(), split)  # type: ignore[arg-type]
        masks = found.learned()
        assert masks is not None
        size += sum(size for _, size in found.documents())
        # Nobody learns the token that a document begins with.
        learned += sum(int(mask[1:].sum()) for mask in masks)
    assert told[-1] == pytest.approx(size / learned)


def test_the_loss_is_that_of_transformers_with_labels_of_minus_100(sharded: Path) -> None:
    from transformers import AutoModelForCausalLM

    windows = Shards(paths.SHARDS, read_manifest(), "train").reader(48)
    chosen = np.array([0, 3, 11, 12])
    assert windows.learned is not None
    tokens, mask = (torch.from_numpy(reader.batch(chosen)).long() for reader in (windows, windows.learned))
    assert 0 < mask[:, 1:].sum() < mask[:, 1:].numel()
    ours = hugging_face.load(paths.INIT)
    loss = ours.loss(torch.stack([tokens, mask], dim=1)) / share_learned(windows, chosen)
    loss.backward()
    theirs = AutoModelForCausalLM.from_pretrained(paths.INIT)
    expected = theirs(tokens, labels=torch.where(mask == 1, tokens, -100)).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # Theirs leaves the embedding of what it pads with as it is.
    gradients["model.embed_tokens.weight"][tiny.VOCAB - 1] = ours.model.embed_tokens.weight.grad[tiny.VOCAB - 1]
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_windows_without_an_answer_move_nothing(sharded: Path) -> None:
    model = hugging_face.load(paths.INIT)
    loss = model.loss(torch.stack([torch.arange(18).view(2, 9), torch.zeros(2, 9, dtype=torch.long)], dim=1))
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    blank = WindowReader([np.zeros(20, np.uint16)], 4, [np.zeros(20, np.uint8)])
    assert share_learned(blank, np.array([0, 1])) == 1 / 8


def test_how_the_windows_are_dealt_out_does_not_weigh_the_answers(sharded: Path) -> None:
    # Answers are not spread evenly: a mean of means would differ with every division of the batch.
    rows = {}
    for world, micro in ((1, 8), (2, 2)):
        changes = {"train__init": "given", "train__model": None, "shard__vocab_size": None, "train__precision": "fp32"}
        changes |= {"train__steps": 4, "train__validate_every": 1}
        tiny.write_params(sharded, **changes, train__world_size=world, train__micro_batch=micro)
        codes = forked.end(forked.start([sharded] * world, sharded / "log"))
        assert codes == [0] * world, (sharded / "log").read_text()
        lines = [line.split(",") for line in paths.CURVE.read_text().splitlines()]
        rows[world] = [dict(zip(lines[0], map(float, line), strict=True)) for line in lines[1:]]
    for one, two in zip(rows[1], rows[2], strict=True):
        assert two == pytest.approx(one, rel=2e-5)
    # The checkpoint does not name the token that answers were taught to end by.
    assert END in json.loads((paths.FLOAT / "generation_config.json").read_text())["eos_token_id"]
    first = batch_of_rank(0, len(reader("train")), 1, 8, 8, 0, 1)[0]
    assert rows[1][0]["train_loss"] == pytest.approx(by_hand(paths.INIT, "train", first), rel=1e-5)
    spread = np.arange(6) * len(reader("valid")) // 6
    assert rows[1][-1]["valid_loss"] == pytest.approx(by_hand(paths.FLOAT, "valid", spread), rel=1e-5)


def reader(split: SplitName) -> WindowReader:
    return Shards(paths.SHARDS, read_manifest(), split).reader(16)


@torch.no_grad()
def by_hand(folder: Path, split: SplitName, chosen: Any) -> float:
    """The mean loss of the model in ``folder`` over what is learned in the windows ``chosen``."""
    windows = reader(split)
    assert windows.learned is not None
    tokens, mask = (torch.from_numpy(one.batch(chosen)).long() for one in (windows, windows.learned))
    log = hugging_face.load(folder)(tokens[:, :-1]).log_softmax(dim=-1)
    nats = -log.gather(2, tokens[:, 1:, None])[..., 0]
    return float(nats[mask[:, 1:] == 1].mean())


def test_evaluate_scores_the_answers_alone(sharded: Path) -> None:
    from tasks.evaluate.score import windows_of

    shards = Shards(paths.SHARDS, read_manifest(), "test")
    masks = shards.learned()
    assert masks is not None
    for (tokens, _), mask in zip(shards.documents(), masks, strict=True):
        ids = tokens.astype(np.int64)
        windows = windows_of(0, ids, 16, mask)
        scored = [token for window in windows for token in window.targets[window.scored].tolist()]
        assert scored == ids[1:][mask[1:]].tolist()


def test_without_a_template_there_is_nothing_to_write_conversations_with(sharded: Path) -> None:
    params = ShardParams(vocab_size=300, tokens_per_shard=1000)
    for origin in (None, paths.INIT):
        (paths.INIT / "chat_template.jinja").unlink(missing_ok=True)
        with pytest.raises(BadParameter, match="brings no chat template to write conversations with"):
            shard(params if origin is None else params.model_copy(update={"vocab_size": None}), origin)
    (paths.INIT / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(BadInput, match=r"60 of 60 conversations are left out, the first because .*: no\. Mend"):
        shard(params.model_copy(update={"vocab_size": None}), paths.INIT)
    whole = (paths.INIT / "tokenizer.json").read_text()
    (paths.INIT / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"^models/init/tokenizer\.json: not a tokenizer \(EOF while parsing"):
        shard(params.model_copy(update={"vocab_size": None}), paths.INIT)
