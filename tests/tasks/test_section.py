"""params.yaml: what is wrong with it is one line, whatever it is."""

from pathlib import Path

import pytest

from tasks.errors import BadParameter
from tasks.params import Params, read
from tasks.section import parse_yaml, validate

ROOT = Path(__file__).parent.parent.parent
DEFAULT = (ROOT / "params.yaml").read_bytes()


def with_sources(listed: str, twice: bool = False) -> bytes:
    """The default file with other sources, written as YAML in one line."""
    before, _, rest = DEFAULT.partition(b"  sources:")
    after = rest[rest.index(b"\ningest:") :]
    if twice:
        listed = f"[{', '.join([listed[1:-1]] * 2)}]"
    return before + f"  sources: {listed}\n".encode() + after


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [", "this is not YAML"),
        (b"train: 1\ntrain: 2\n", "this is not YAML"),
        (b"caf\xe9: 1\n", "not YAML in UTF-8"),
        (b"train: \x00\n", "this is not YAML"),
        (b"- a\n", "expected sections"),
        (
            b"train: {}\n",
            "yaml: collect, ingest, .* and flow are missing; add them; train: seed, .* are missing; add them$",
        ),
        (DEFAULT.replace(b"retries: {train: 2", b"retries: {train: -2"), "flow.retries.train: .*greater than or equal"),
        *(
            (
                DEFAULT.replace(b"  branch: nightly", f"  branch: {name}".encode()),
                f"yaml: publish.branch: .*{name!r} is no name for a branch of Git; take letters, .* as in nightly$",
            )
            for name in ("a..b", "night.lock", "nights/", "a//b", "HEAD", "two words", "nights/.hidden")
        ),
        (DEFAULT.replace(b"\nevaluate:", b"\nevalute:"), "evalute: unknown key"),
        (
            DEFAULT.replace(b"  learning_rate", b"  lerning_rate", 1),
            "train.lerning_rate: unknown key; .* `learning_rate`[?]$",
        ),
        (
            DEFAULT.replace(b"    hidden_size", b"    hiden_size"),
            "train.model.hiden_size: .* did you mean `hidden_size`[?]$",
        ),
        # The family alone was changed: what is left are keys of another one, however like this one's they look.
        (
            DEFAULT.replace(b"model_type: deepseek_v3", b"model_type: llama"),
            "train.model: .*head_dim.* are missing; add them; .*qk_nope_head_dim, qk_rope_head_dim, v_head_dim.*"
            " and routed_scaling_factor are keys of deepseek_v3 and deepseek_v2; remove them; .*"
            "num_nextn_predict_layers: unknown key; it is a key of deepseek_v3, remove it$",
        ),
        (DEFAULT.replace(b"qk_rope_head_dim: 16", b"qk_rope_head_dim: 15"), "yaml: train.model: qk_rope_head_dim is"),
        # Keys of other families.
        (
            DEFAULT.replace(b"    n_routed_experts", b"    num_experts: 8\n    n_routed_experts"),
            "train.model.num_experts: unknown key; it is a key of qwen2_moe and qwen3_moe, remove it$",
        ),
        # Of a kind that describes several families, those are named that know the key.
        *(
            (
                DEFAULT.replace(b"    n_routed_experts", b"    " + line + b"\n    n_routed_experts"),
                f"train.model.{line.partition(b':')[0].decode()}: unknown key; it is a key of {families}, remove it$",
            )
            for line, families in (
                (b"shared_expert_intermediate_size: 8", "qwen2_moe"),
                (b"mlp_bias: true", "llama"),
                (b"attention_bias: true", "llama, qwen3 and qwen3_moe"),
            )
        ),
        (
            DEFAULT.replace(b"    kv_lora_rank", b"    head_dim: 16\n    num_key_value_heads: 2\n    kv_lora_rank"),
            "train.model: head_dim and num_key_value_heads are keys of llama, qwen2, qwen3, qwen2_moe and qwen3_moe; ",
        ),
        (
            DEFAULT.replace(b"    n_routed_experts: 8", b"    num_experts: 8"),
            "train.model.num_experts: unknown key; did you mean `n_routed_experts`[?]$",
        ),
        (
            DEFAULT.replace(b"    kv_lora_rank", b"    head_dim: 16\n    kv_lora_rank"),
            "train.model.head_dim: unknown key; ",
        ),
        (
            DEFAULT.replace(b"_layers: 4 ", b"_layers: 0 "),
            "train.model.num_hidden_layers: .* greater than or equal to 1",
        ),
        (DEFAULT.replace(b"model_type: deepseek_v3", b"model_type: gpt2"), "train.model.model_type: .* found 'gpt2'$"),
        (DEFAULT.replace(b"model_type: deepseek_v3", b"# "), "train.model.model_type: missing; add it$"),
        (
            DEFAULT.replace(b"    seed: 468", b"    sede: 468"),
            "ingest.split.sede: unknown key; did you mean `seed`[?]$",
        ),
        (DEFAULT.replace(b"text_field", b"text_feld"), "collect.sources.0.text_feld: unknown key; .* `text_field`[?]$"),
        (
            DEFAULT.replace(b"\n  seed:", b"\n  xyzzy: 1\n  seed:", 1),
            "xyzzy: unknown key; remove it or mend its spelling$",
        ),
        (with_sources("[]"), "collect.sources: no source is left; .* for example - {name: notes, uri: texts, "),
        (with_sources(""), "collect.sources: no source is left"),
        (with_sources("[texts]"), "collect.sources.0: keys with values are needed here, found 'texts'$"),
        (
            with_sources(f"{{name: {'a' * 200}}}"),
            "collect.sources: input should be a valid list, found {'name': 'a{90}…$",
        ),
        (
            with_sources("[{name: a/b, uri: t, format: txt, licence: x}]"),
            "sources.0.name: the name 'a/b' cannot be that",
        ),
        (
            with_sources("[{name: é, uri: t, format: txt, licence: x}]"),
            "use up to 100 lowercase letters, digits, - and _",
        ),
        (with_sources(f"[{{name: {'a' * 101}, uri: t, format: txt, licence: x}}]"), "use up to 100 lowercase letters"),
        (with_sources('[{name: "a\\n", uri: t, format: txt, licence: x}]'), "cannot be that of a folder"),
        (
            with_sources('[{name: a, uri: "t\\0", format: txt, licence: x}]'),
            "sources.0.uri: 't\\\\x00' holds a line break",
        ),
        (with_sources("[{name: a, uri: t, format: txt}]"), "collect.sources.0.licence: missing; add it"),
        (with_sources("[{name: a, uri: t, format: csv, licence: x}]"), "source 'a': format csv needs text_field"),
        (with_sources("[{name: a, uri: t, format: txt, licence: x}]", twice=True), "two sources share the name a"),
        (DEFAULT.replace(b"    valid: 0.05", b"    valid: 0.97"), "leave nothing to train on"),
        (DEFAULT.replace(b"  seed: 1 ", b"  seed: 9999999999999999999999 ", 1), "seed: "),
        # Longer than a timedelta, which the processes would have met.
        (
            DEFAULT.replace(b"hang_timeout_seconds: 600.0", b"hang_timeout_seconds: 1.0e+15"),
            "train.hang_timeout_seconds: .*less than or equal to 10000000.* quantize.hang_timeout_seconds: .*less than",
        ),
        (
            DEFAULT.replace(b" stop_seconds: 20.0", b" stop_seconds: 0.0"),
            "train.stop_seconds: .*greater than 0.* quantize.stop_seconds: .*greater than 0",
        ),
        (
            DEFAULT.replace(b" timeout_seconds: null", b" timeout_seconds: 1.0e+15"),
            "train.communication.timeout_seconds: .*less than or equal to 10000000",
        ),
    ],
)
def test_a_faulty_file_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(BadParameter, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_missing_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="cannot be read"):
        read(tmp_path)
    with pytest.raises(BadParameter, match="no such file"):
        read(tmp_path / "params.yaml")


def test_the_default_file_is_valid_and_every_knob_has_a_comment() -> None:
    read(ROOT / "params.yaml")
    bare = [
        line
        for line in DEFAULT.decode().splitlines()
        if line.strip() and "#" not in line and not line.rstrip().endswith(":") and 'licence: "text' not in line
    ]
    assert not bare, bare


GROUPED = {"num_key_value_heads": 2, "head_dim": 16, "rope_scaling": None, "tie_word_embeddings": True}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v2"])
def test_the_default_model_becomes_each_family_as_its_comment_says(family: str) -> None:
    content = parse_yaml(DEFAULT, Path("params.yaml"))
    model = content["train"]["model"]
    model["model_type"] = family
    if family == "deepseek_v2":
        model["norm_topk_prob"] = False
    else:
        names = list(model)
        for first, last in (("q_lora_rank", "v_head_dim"), ("first_k_dense_replace", "num_nextn_predict_layers")):
            for name in names[names.index(first) : names.index(last) + 1]:
                del model[name]
        model |= GROUPED
    if family in ("qwen2_moe", "qwen3_moe"):
        del model["intermediate_size"]
        model |= EXPERTS
    if family == "qwen2_moe":
        model["shared_expert_intermediate_size"] = 128
    assert validate(Params, content, Path("params.yaml")).train.model is not None
