"""Generation with onnxruntime and numpy alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import tiny
from odd import export_over_bytes, make_grouped, make_model
from together import written_together
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lm import huge_pages, runtime
from lm.batch import Batch
from lm.runtime import Generator, PromptTooLong, Unloadable, ask_for_exact_products
from lm.sampling import Sampling, held_back
from lm.text import Request

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=[make_model, make_grouped], ids=["latent", "grouped"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model over bytes, exported."""
    return export_over_bytes(tmp_path_factory.mktemp("int8"), request.param)


def test_equal_seeds_write_equal_text_and_others_other(folder: Path) -> None:
    generator = Generator(folder)
    texts = [write(generator, "light", 30, Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_text_is_that_of_a_loop_without_a_cache(folder: Path) -> None:
    generator = Generator(folder)
    expected = generator.tokenizer.decode(greedy(generator, generator.tokenizer.encode("sea").ids, 12))
    written = write(generator, "sea", 12, GREEDY)
    # What is still an incomplete character at the end is not written.
    assert written
    assert expected.startswith(written)


@pytest.mark.parametrize("spin", [False, True])
def test_threads_wait_awake_only_where_that_is_asked_for_and_write_the_same(folder: Path, spin: bool) -> None:
    generator = Generator(folder, spin=spin)
    options = generator.session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spin))
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert write(generator, "sea", 12, GREEDY) == write(Generator(folder), "sea", 12, GREEDY)


@pytest.mark.parametrize(("least", "calls"), [(0, 1), (1 << 40, 0)])
def test_large_weights_are_moved_to_huge_pages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, least: int, calls: int
) -> None:
    expected = write(Generator(folder), "sea", 12, GREEDY)
    monkeypatch.setattr(runtime, "_LARGE", least)
    with (
        mock.patch("lm.huge_pages.collapse", wraps=huge_pages.collapse) as moved,
        mock.patch("lm.huge_pages.join") as joined,
    ):
        assert write(Generator(folder), "sea", 12, GREEDY) == expected
    assert moved.call_count == joined.call_count == calls


def test_a_prompt_that_is_read_in_pieces_ends_in_the_same_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(folder)
    prompt = "and it came to pass in those days"
    whole = write(generator, prompt, 12, GREEDY)
    monkeypatch.setattr("lm.batch.PIECE", 8)
    run, sizes = generator.run, list[int]()
    monkeypatch.setattr(generator, "run", lambda ids, *rest, **more: sizes.append(ids.size) or run(ids, *rest, **more))
    assert write(generator, prompt, 12, GREEDY) == whole
    assert sizes[:6] == [8, 8, 8, 8, 2, 1]


def test_a_text_may_be_dropped_between_the_pieces_of_its_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.batch.PIECE", 8)
    generator = Generator(folder)
    expected = write(generator, "a" * 40, 5, GREEDY)
    batch, text = Batch(generator, 1), generator.text(Request("a" * 40, 5, GREEDY))
    batch.add(text)
    assert [batch.step(), batch.step()] == [[], []]
    batch.drop(text)
    assert batch.step() == []
    # What was half read is gone on with.
    assert "".join(generator.generate(Request("a" * 40, 5, GREEDY), batch)) == expected


def test_it_stops_where_the_models_positions_end(folder: Path) -> None:
    generator = Generator(folder)
    assert generator.context == 64
    # "a" * 60 and the token that begins it leave room for three.
    assert [ending(generator, "a" * 60, length) for length in (2, 3, 4)] == ["length", "length", "context"]
    with pytest.raises(PromptTooLong, match="the prompt has 65 tokens, and the model reads at most 64"):
        write(generator, "a" * 64, 1)


def linked(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).symlink_to(file)
    return to


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_it_ends_at_any_token_that_ends_texts_or_turns(folder: Path, tmp_path: Path, where: str) -> None:
    generator = Generator(folder)
    assert generator.ends == {tiny.VOCAB - 1}
    tokens = greedy(generator, [256, *b"sea"], 12)
    end = next(place for place in range(3, 12) if tokens[place] not in tokens[:place])
    config = json.loads((linked(folder, tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / where).write_text(json.dumps({**config, "eos_token_id": [tiny.VOCAB - 1, tokens[end]]}))
    ended = Generator(tmp_path)
    assert ended.ends == {tiny.VOCAB - 1, tokens[end]}
    assert ending(ended, "sea", 12) == "end of text"
    assert write(ended, "sea", 12, GREEDY) == generator.tokenizer.decode(tokens[:end])


def test_a_prompt_of_tokens_is_read_as_it_is_and_an_empty_one_begins_a_text(folder: Path, tmp_path: Path) -> None:
    generator = Generator(folder)
    assert write(generator, (256, *b"sea"), 9, GREEDY) == write(generator, "sea", 9, GREEDY)
    assert write(generator, tuple(b"sea"), 9, GREEDY) != write(generator, "sea", 9, GREEDY)
    assert write(generator, (), 9, GREEDY) == write(generator, (256,), 9, GREEDY)


def test_the_text_is_that_of_all_tokens_and_no_prompt_is_cut(folder: Path, tmp_path: Path) -> None:
    # Each token a word, the first of a text without the space before it; saved as after a call that cuts texts.
    words = {f"▁w{index}": index for index in range(tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="▁w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.enable_truncation(4)
    (linked(folder, tmp_path) / "tokenizer.json").unlink()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    generator = Generator(tmp_path)
    prompt = [tiny.VOCAB - 1, *range(20)]
    tokens = greedy(generator, prompt, 6)
    assert write(generator, " ".join(f"w{index}" for index in range(20)), 6, GREEDY) == "".join(
        f" w{t}" for t in tokens
    )
    assert write(generator, tuple(prompt), 6, GREEDY) == "".join(f" w{token}" for token in tokens)
    answer = Request(tuple(prompt), 6, GREEDY, is_answer=True)
    assert "".join(generator.generate(answer)) == " ".join(f"w{token}" for token in tokens)


def greedy(generator: Generator, ids: list[int], count: int) -> list[int]:
    """Returns the tokens that come after ``ids`` without a cache."""
    ids = list(ids)
    for _ in range(count):
        logits = generator.run(np.array([ids], np.int64), generator.new_cache())
        ids.append(int(logits[0, -1].argmax()))
    return ids[-count:]


def test_a_text_begins_and_ends_as_the_config_says_whatever_the_tokenizer_adds(folder: Path, tmp_path: Path) -> None:
    generator = Generator(folder)
    plain = write(generator, "light", 12, GREEDY)
    shutil.copytree(folder, tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other/tokenizer.json").read_text())
    (tmp_path / "other/tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    assert write(Generator(tmp_path / "other"), "light", 12, GREEDY) == plain
    config = json.loads((folder / "config.json").read_text())
    ids = generator.tokenizer.encode("light").ids
    logits = generator.run(np.array([ids], np.int64), generator.new_cache())
    # The likeliest token after the prompt, named as an end that is not the beginning.
    config["eos_token_id"] = int(logits[0, -1].argmax())
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    assert ending(Generator(tmp_path / "other"), "light", 12) == "end of text"


def write(generator: Generator, *request: Any) -> str:
    return "".join(generator.generate(Request(*request)))


def ending(generator: Generator, prompt: str, max_new_tokens: int, *more: Any) -> str:
    pieces = generator.generate(Request(prompt, max_new_tokens, *(more or (GREEDY,))))
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return str(end.value.ending)


PROMPTS = [
    Request("light", 30, Sampling(seed=3)),
    Request("in the beginning was the night; ", 9, GREEDY),
    Request("a" * 60, 40, Sampling(seed=4, temperature=1.5)),
    Request("", 25, Sampling(top_p=0.9, repetition_penalty=1.2), ("t",)),
]


def test_texts_side_by_side_are_those_of_each_alone(folder: Path) -> None:
    generator = Generator(folder)
    texts, endings = zip(*written_together(generator, PROMPTS), strict=True)
    assert list(texts) == ["".join(generator.generate(request)) for request in PROMPTS]
    assert (endings[1].ending, endings[2].ending) == ("length", "context")


def test_of_a_prompt_the_last_tokens_logits_alone_are_computed_where_no_others_are_wanted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(folder)
    ids = np.array([[256, *b"light"], [256, *b"night"]])
    whole, last = (generator.run(ids, generator.new_cache(2), last=last) for last in (False, True))
    assert last.shape == (2, 1, generator.vocab_size)
    np.testing.assert_allclose(last[:, 0], whole[:, -1], atol=1e-5)
    run, sizes = generator.run, list[int]()

    def note(*what: Any, **how: Any) -> Any:
        logits = run(*what, **how)
        sizes.append(logits.shape[1])
        return logits

    monkeypatch.setattr(generator, "run", note)
    write(generator, "light", 3, GREEDY, (), 0)
    assert sizes == [1, 1, 1]


def test_what_ends_a_text_may_stand_in_a_prompt_that_is_told_with_it(folder: Path) -> None:
    generator = Generator(folder)
    plain = write(generator, "light", 12, GREEDY)
    told = "".join(generator.generate(Request("light", 12, GREEDY, ("ligh",), echo=True)))
    assert "ligh" not in plain
    assert told == f"light{plain}"


def test_what_a_text_has_in_common_with_the_last_one_is_not_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(folder)
    fresh = [write(generator, prompt, 8, GREEDY) for prompt in ("light and night", "light and day")]
    lengths: list[int] = []
    run = generator.run
    monkeypatch.setattr(
        generator, "run", lambda ids, *more, **named: lengths.append(ids.shape[1]) or run(ids, *more, **named)
    )
    held = Batch(generator, 1)
    first = "".join(generator.generate(Request("light and night", 8, GREEDY), held))
    turned = "".join(generator.generate(Request("light and day", 8, GREEDY), held))
    assert [first, turned] == fresh
    # One token begins the text, and "light and " is ten.
    assert lengths[0] == 16
    assert [length for length in lengths[1:] if length > 1] == [3]
    again = "".join(generator.generate(Request("light and day", 8, GREEDY), held))
    assert again == fresh[1]


def test_a_cache_grows_without_losing_a_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(folder)
    whole = write(generator, "light", 40, GREEDY)
    monkeypatch.setattr("lm.cache._GROWTH", 7)
    cache = generator.new_cache()
    generator.run(np.array([[256, *b"light"]]), cache)
    assert cache.capacity == 7
    assert write(generator, "light", 40, GREEDY) == whole


def test_no_copy_of_the_cache_is_made_for_a_token(folder: Path) -> None:
    generator = Generator(folder)
    cache = generator.new_cache()
    generator.run(np.array([[256, *b"light"]]), cache)
    buffers = {name: (buffer, buffer.copy()) for name, buffer in cache._buffers.items()}
    generator.run(np.array([[65]]), cache)
    for name, (buffer, before) in buffers.items():
        assert cache._buffers[name] is buffer
        rows = (before != buffer).any(axis=(0, 2) if buffer.ndim == 3 else (0, 1, 3))
        assert rows.nonzero()[0].tolist() == [6]


def test_a_run_is_ended_between_two_of_its_operators(folder: Path) -> None:
    generator = Generator(folder)
    generator.stop()
    with pytest.raises(Exception, match="terminate"):
        write(generator, "light", 1)


@pytest.mark.parametrize(
    ("told", "asked"),
    [
        ("flags : fpu sse4_2 avx2", True),
        ("flags : fpu avx2 avx512f avx512_vnni", False),
        ("flags : fpu avx2 avx_vnni", False),
        ("flags : fpu avx512f amx_int8", False),
        (None, True),
    ],
)
def test_exact_products_are_asked_for_where_those_of_8_bits_overflow(
    told: str | None, asked: bool, tmp_path: Path
) -> None:
    options, cpu = onnxruntime.SessionOptions(), tmp_path / "cpuinfo"
    if told is not None:
        cpu.write_text(told)
    ask_for_exact_products(options, cpu)
    try:
        found = options.get_session_config_entry("session.x64quantprecision")
    except Exception:
        # onnxruntime's own, of a key that was not set.
        found = "0"
    assert found == str(int(asked))


def test_a_link_to_weights_that_are_gone_is_a_fault_of_the_model(folder: Path, tmp_path: Path) -> None:
    weights = linked(folder, tmp_path) / "model.onnx.data"
    weights.unlink()
    weights.symlink_to(tmp_path / "gone")
    with pytest.raises(Unloadable, match=r"model\.onnx: damaged, or not what its name says"):
        Generator(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json", "generation_config.json"])
def test_a_damaged_file_is_named_in_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    (linked(folder, tmp_path) / name).unlink(missing_ok=True)
    (tmp_path / name).write_bytes(b'{"cut": "sho')
    with pytest.raises(Unloadable, match=rf"{name}: damaged, or not what its name says \(.+\)$") as told:
        Generator(tmp_path)
    assert "\n" not in str(told.value)


def test_it_needs_no_torch(folder: Path) -> None:
    program = (
        f"import sys; from pathlib import Path; from lm.runtime import Generator; Generator(Path({str(folder)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; sys.exit('torch' in sys.modules)"], cwd=tiny.ROOT, check=False
    )
    assert done.returncode == 0


def test_it_stops_before_the_first_of_several_strings_and_tells_no_half_of_one(folder: Path) -> None:
    generator = Generator(folder)
    whole = write(generator, "light", 30, Sampling(seed=3))
    assert len(whole) > 12
    stops = (whole[9:12], whole[6:9], "never there")
    pieces = list(generator.generate(Request("light", 30, Sampling(seed=3), stops)))
    told = "".join(pieces)
    assert told == whole[: min(whole.index(stop) for stop in stops[:2])]
    assert ending(generator, "light", 30, Sampling(seed=3), stops) == "stop"
    # The beginning of a string that does not come after all is told at the end.
    assert write(generator, "light", 30, Sampling(seed=3), (f"{whole[-2:]}x", "y" * 99)) == whole


@pytest.mark.parametrize(
    ("text", "stops", "held"), [("abc", ("cd",), 1), ("abc", ("bcd", "cx"), 2), ("abc", ("x",), 0), ("", ("ab",), 0)]
)
def test_what_may_become_a_stop_is_held_back(text: str, stops: tuple[str, ...], held: int) -> None:
    assert held_back(text, stops) == held


def shares(sampling: Sampling, text: list[int]) -> list[float]:
    logits = np.log(np.array([0.1, 0.6, 0.25, 0.05], np.float32))
    random = np.random.default_rng(0)
    drawn = [sampling.draw(logits, np.array(text, np.int64), random) for _ in range(4000)]
    return list(np.bincount(drawn, minlength=4) / 4000)


def test_sampling_keeps_to_the_likeliest_and_to_their_shares() -> None:
    assert shares(Sampling(1.0, top_k=2), []) == pytest.approx([0, 0.6 / 0.85, 0.25 / 0.85, 0], abs=0.03)
    assert shares(Sampling(1.0, top_k=0), []) == pytest.approx([0.1, 0.6, 0.25, 0.05], abs=0.03)
    # 0.6 is not enough, with 0.25 it is.
    assert shares(Sampling(1.0, top_k=0, top_p=0.7), []) == pytest.approx([0, 0.6 / 0.85, 0.25 / 0.85, 0], abs=0.03)
    assert shares(Sampling(1.0, top_k=3, top_p=0.01), []) == [0, 1, 0, 0]
    assert shares(Sampling(0.0), []) == [0, 1, 0, 0]


@pytest.mark.parametrize("sampling", [Sampling(1, 0), Sampling(0.7, 0), Sampling(1, 0, 0.9), Sampling(1.5, 2000, 0.5)])
@pytest.mark.parametrize("spread", [0.01, 2.5, 9])
def test_of_a_large_vocabulary_a_token_is_drawn_by_its_share(sampling: Sampling, spread: float) -> None:
    generator = np.random.default_rng(0)
    for seed in range(50):
        logits = (generator.standard_normal(5000) * spread).astype(np.float32)
        order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
        shares = np.exp((logits[order] - logits.max()).astype(np.float64) / sampling.temperature)
        shares /= shares.sum()
        if sampling.top_p < 1:
            shares = shares[: np.searchsorted(np.cumsum(shares), sampling.top_p) + 1]
        expected = np.random.default_rng(seed).choice(order[: len(shares)], p=shares / shares.sum())
        assert sampling.draw(logits, np.array([], np.int64), np.random.default_rng(seed)) == expected


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_large_vocabulary_is_not_sorted_for_each_token(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sort, sorted_ = np.argsort, list[int]()

    def note(array: Any, **how: Any) -> Any:
        sorted_.append(len(array))
        return sort(array, **how)

    monkeypatch.setattr(np, "argsort", note)
    logits = (np.random.default_rng(0).standard_normal(150_000) * 9).astype(np.float32)
    random = np.random.default_rng(1)
    for _ in range(20):
        Sampling(1, 0, top_p).draw(logits, np.array([], np.int64), random)
    assert sorted_
    assert max(sorted_) < 5000


@pytest.mark.parametrize("count", [10, 5000])
def test_nothing_is_drawn_where_a_logit_is_no_number(count: int) -> None:
    logits = np.zeros(count, np.float32)
    logits[3] = np.nan
    for sampling in (Sampling(1, 0, 0.9), Sampling(0)):
        with pytest.raises(ValueError, match="a logit is no number"):
            sampling.draw(logits, np.array([], np.int64), np.random.default_rng(0))


def test_what_is_there_already_is_less_likely() -> None:
    # log 0.6 x 3 is below log 0.25.
    assert shares(Sampling(0.0, repetition_penalty=3.0), [1, 1]) == [0, 0, 1, 0]
    logits = np.array([2.0, 1.5, -1.0], np.float32)
    draw = Sampling(0.0, repetition_penalty=2.0).draw
    assert draw(logits, np.array([0]), np.random.default_rng(0)) == 1
    assert logits.tolist() == [2.0, 1.5, -1.0]


def test_what_was_written_is_less_likely_once_or_for_each_time_and_what_was_given_is_not() -> None:
    logits = np.array([2.0, 1.5, 1.4, -1.0], np.float32)

    def drawn(text: list[int], given: int, **how: Any) -> int:
        return Sampling(0.0, **how).draw(logits, np.array(text), np.random.default_rng(0), given)

    assert drawn([0, 0], 0, presence_penalty=0.3) == 0
    assert drawn([0, 0], 0, frequency_penalty=0.3) == 1
    assert drawn([0], 0, presence_penalty=0.6) == drawn([0], 0, frequency_penalty=0.6) == 1
    assert drawn([0], 1, presence_penalty=0.6) == drawn([0, 0], 2, frequency_penalty=0.6) == 0
    # 1 was given, 0 was written.
    assert drawn([1, 0], 1, presence_penalty=0.6) == 1
    assert drawn([0, 1, 2], 0, presence_penalty=4.0) == 3
    assert drawn([2], 0, presence_penalty=-0.7) == drawn([2, 2], 0, frequency_penalty=-0.4) == 2
    assert logits.tolist() == [2.0, 1.5, np.float32(1.4), -1.0]


def test_a_bias_makes_single_tokens_likelier_and_no_others() -> None:
    assert shares(Sampling(1.0, 0, bias=((1, -100.0),)), []) == pytest.approx([0.25, 0, 0.625, 0.125], abs=0.03)
    assert shares(Sampling(0.0, bias=((3, 100.0),)), []) == [0, 0, 0, 1]
    even = tuple((token, float(-np.log(share))) for token, share in enumerate((0.1, 0.6, 0.25, 0.05)))
    assert shares(Sampling(1.0, 0, bias=even), []) == pytest.approx([0.25] * 4, abs=0.03)
