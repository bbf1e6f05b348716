"""What metadata of GGUF tell, and what they have no key for."""

import pytest

from lm.gguf_config import told_ends
from lm.gguf_metadata import further_ends


@pytest.mark.parametrize(
    ("ends", "told", "untold"),
    [
        ([0], (None, None), []),
        ([0, 1, 0, 9], (1, None), []),
        ([2, 0], (None, 2), []),
        ([0, 2, 1], (1, 2), []),
        ([1, 3], (1, 3), []),
        # What it knows by its name needs no key where there are too few.
        ([0, 4, 1, 3], (1, 3), []),
        ([0, 4, 1, 3, 5], (1, 3), [5]),
    ],
)
def test_what_ends_a_text_takes_the_keys_that_llama_cpp_has_for_it(
    ends: list[int], told: tuple[int | None, int | None], untold: list[int]
) -> None:
    names = ["<eos>", "<a>", "<|eom_id|>", "<b>", "<|im_end|>", "<c>"]
    assert further_ends(ends, 0, names) == (*told, untold)
    keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    there = {key: end for key, end in zip(keys, told, strict=True) if end is not None}
    assert told_ends(there, len(names)) == [end for end in told if end is not None]
    assert told_ends(there, 1) == []
