"""The card: every number from a report, and an example that runs as written."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import odd
import onnx
import pytest
import tiny
from huggingface_hub import ModelCard
from tokenizers import Tokenizer

from lm import onnx_model
from lm.hugging_face_config import config_to_json
from lm.model import LanguageModel
from lm.quantization import PLANS
from tasks.card import figures, text
from tasks.card.evidence import Evidence, Report
from tasks.card.params import CardParams
from tasks.errors import BadInput

CORPUS = {
    "sources": [
        {
            "name": "kjv",
            "licence": "public domain",
            "sha256": "ab" * 32,
            "records": {"in": 1234, "kept": 1200, "rejected": 34},
            "documents": {"in": 77, "out": 70, "duplicated": 7},
            "bytes": {"out": 98765},
        }
    ],
    "splits": {"test": {"documents": 5, "bytes": 4321, "groups": 2, "group_names": ["Ruth", "Jonah"]}},
}


PARAMS = CardParams(name="lm", licence="mit", language=["en"], intended_use="none", out_of_scope="all")


def evidence_of(**reports: dict[str, Any]) -> Evidence:
    """Returns evidence with these reports, and no other."""
    names = ("corpus", "manifest", "config", "train", "audit", "quantization", "evaluation")
    made = {name: Report(Path("nowhere.json")) for name in names}
    for name, content in reports.items():
        made[name].content = content
    return Evidence(**made, curve=[], hashes={})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("carded")
    tiny.write_params(folder, **tiny.ALONE, train__seq_len=64, train__global_batch=4)
    tiny.write_shards(folder)
    tiny.write_champion(folder)
    (folder / "data/corpus").mkdir()
    (folder / "data/corpus/report.json").write_text(json.dumps(CORPUS))
    for name in ("train", "quantize", "evaluate", "card"):
        code, output = tiny.run(name, folder)
        assert code == 0, output
    return folder


def _card(project: Path) -> str:
    return (project / "models/card/README.md").read_text()


def test_the_hub_reads_the_card_and_its_evaluation(project: Path) -> None:
    card = ModelCard.load(project / "models/card/README.md")
    evaluation = json.loads((project / "models/evaluation.json").read_text())
    results = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    assert results == {
        f"bits per byte ({kind})": evaluation["models"][kind]["bits_per_byte"]["value"] for kind in ("float", "int8")
    }
    assert card.data.license == "mit"
    assert card.data.language == ["en"]


def test_numbers_come_from_the_reports(project: Path) -> None:
    card = _card(project)
    train = json.loads((project / "models/train.json").read_text())
    assert f"| parameters, total | {train['parameters']:,} |" in card
    assert "| kjv | public domain | 34 of 1,234 | 7 | 70 | 98,765 |" in card
    assert "Ruth, Jonah" in card
    evaluation = json.loads((project / "models/evaluation.json").read_text())
    assert f"{evaluation['baselines']['xz']['bits_per_byte']['value']:.3f}" in card
    relative = evaluation["gate"]["relative_loss"]
    assert f"{relative['value']:+.4f} [{relative['low']:+.4f}, {relative['high']:+.4f}]" in card


@pytest.mark.parametrize(
    ("there", "titles", "bits"),
    [
        (["rounded", "post_training"], "rounded alone | post-training | INT8", "1.200 | 1.300 | 1.400"),
        # INT8 itself is what the others would be.
        (["rounded"], "rounded alone | INT8", "1.200 | 1.400"),
        ([], "INT8", "1.400"),
    ],
)
def test_each_step_from_float_to_int8_has_its_column(there: list[str], titles: str, bits: str) -> None:
    measured = {"float": 1.1, "rounded": 1.2, "post_training": 1.3, "int8": 1.4}
    models = {
        step: {"bits_per_byte": {"value": value, "low": None, "high": None}}
        if step in [*there, "float", "int8"]
        else None
        for step, value in measured.items()
    }
    card = text.body(evidence_of(evaluation={"models": models}), PARAMS)
    assert f"|  | float | {titles} |\n" in card
    assert f"| bits per byte | 1.100 | {bits} |\n" in card
    # And what it is stands above.
    assert ("*Rounded alone* is" in card) == ("rounded" in there)
    assert ("*Post-training* is" in card) == ("post_training" in there)


def test_a_passed_gate_stands_in_the_card_with_its_reasons_and_no_warning(project: Path) -> None:
    card = _card(project)
    gate = json.loads((project / "models/evaluation.json").read_text())["gate"]
    assert gate["passed"]
    assert "**Refused.**" not in card
    assert "The gate: passed." in card
    for check in gate["checks"]:
        assert f"| passed | {check['reason']} |" in card


def test_a_refused_models_card_says_so_at_the_top_and_shows_the_champion() -> None:
    champion = {"version": "lm@v1.2.0", "bits_per_byte": {"value": 1.5, "low": 1.4, "high": 1.6}}
    checks = [
        {"name": "int8_against_float", "passed": True, "reason": "INT8 is close to float"},
        {"name": "against_champion", "passed": False, "reason": "lm@v1.2.0 stays the champion"},
    ]
    card = text.body(
        evidence_of(evaluation={"gate": {"passed": False, "checks": checks}, "champion": champion}), PARAMS
    )
    top = card[: card.index("## How to run it")]
    assert "> **Refused.**" in top
    assert "> - lm@v1.2.0 stays the champion" in top
    assert "INT8 is close to float" not in top
    assert "The gate: **refused**." in top
    assert "| against the champion | **refused** | lm@v1.2.0 stays the champion |" in card
    assert "| the champion, lm@v1.2.0 (INT8) | 1.500 [1.400, 1.600] |" in card


def test_names_from_the_data_are_shown_and_write_nothing_into_the_card() -> None:
    names = ["__init__.md", "~~x~~", "x |\n\n## Gate\n\npassed <script>a</script> ![](http://elsewhere/y.png)"]
    corpus = {"splits": {"test": {"documents": 5, "bytes": 4321, "groups": 2, "group_names": names}}}
    card = text.body(evidence_of(corpus=corpus), PARAMS)
    assert card.count("\n## Gate\n") == 1
    shown = r"\_\_init\_\_.md, \~\~x\~\~, x \| ## Gate passed \<script>a\</script> !\[](http://elsewhere/y.png)"
    assert f"| test | 5 | 4,321 | {shown} |" in card


def test_of_a_large_test_split_the_card_says_how_many_documents_were_measured() -> None:
    drawn = evidence_of(evaluation={"documents": 1200, "documents_in_split": 98765, "bytes": 4321987})
    assert "On 1,200 of 98,765 documents (4,321,987 bytes) of the test split" in text.body(drawn, PARAMS)
    whole = evidence_of(evaluation={"documents": 1200, "documents_in_split": 1200, "bytes": 4321987})
    assert "On 1,200 documents (4,321,987 bytes) of the test split" in text.body(whole, PARAMS)


def test_a_dense_model_that_went_on_from_a_checkpoint_claims_nothing_of_experts_fine_tuning_or_what_was_read() -> None:
    evidence = evidence_of(
        config=config_to_json(odd.make_grouped().config),
        train={"started_from": "v1.3.0", "expert_imbalance": 1.0, "valid_loss_before": 3.25},
        quantization={"scheme": "weight-only-8", "plan": "blockwise-8-wide", "asked": "auto", "fine_tuned": False},
        audit={"float_products": []},
    )
    card = text.body(evidence, PARAMS)
    assert "expert" not in card
    assert "| validation loss before the first step (nats a token) | 3.2500 |" in card
    assert "none of whose groups this training has read (what v1.3.0 had read before" in card
    assert "What it knows comes from v1.3.0 and from its corpus" in card
    assert "knows nothing else" not in card
    assert "| left in float on purpose | none |" in card
    assert "one scale a block of 64 inputs. Activations: signed 8 bits, one scale a block of as many. No fine-" in card
    assert "quantization-aware-training" not in text.front_matter(evidence, PARAMS)


def test_a_mixture_from_scratch_that_was_fine_tuned_says_so() -> None:
    evidence = evidence_of(
        config=config_to_json(odd.make_model().config),
        train={"expert_imbalance": 1.25},
        quantization={"scheme": "qat", "plan": "per-token-8", "objective": "text", "fine_tuned": True},
        audit={"float_products": ["lm_head"]},
    )
    card = text.body(evidence, PARAMS)
    assert "| busiest expert's tokens over the mean's | 1.25 |" in card
    assert "none of whose groups was trained on." in card
    assert "It writes like its corpus and knows nothing else" in card
    assert "| left in float on purpose | `lm_head` |" in card
    assert "- quantization-aware-training" in text.front_matter(evidence, PARAMS)


def test_the_audits_figures_stand_in_the_card(project: Path) -> None:
    audit = json.loads((project / "models/int8/audit.json").read_text())
    quantization = _card(project).partition("\n## Quantization\n")[2].partition("\n## ")[0]
    told = re.search(r"^Operators, ([\d,]+) in all: (.*)\.$", quantization, re.MULTILINE)
    assert told
    counts = {name: int(count) for name, count in re.findall(r"`(\w+)` (\d+)", told[2])}
    assert counts == audit["operators"]
    assert told[1] == f"{sum(audit['operators'].values()):,}"
    rows = re.findall(r"^\| `(\w+)`, ([\d,]+) in all \| (.+) \| ([\d,]+) \|", quantization, re.MULTILINE)
    stored = [(kind, int(whole.replace(",", "")), what, int(size.replace(",", ""))) for kind, whole, what, size in rows]
    assert {(kind, whole) for kind, whole, *_ in stored} == {*audit["bytes_by_type"].items()}
    for kind, whole in audit["bytes_by_type"].items():
        assert sum(size for other, *_, size in stored if other == kind) == whole
    sizes = {weight["name"]: weight["bytes"] for weight in audit["weights"]}
    in_float = {what: size for kind, _, what, size in stored if kind == "float32"}
    assert in_float["products left in float"] == sizes["model.layers.1.mlp.gate.weight"]
    assert in_float["turns of what `down_proj` reads"] == sizes["turn_48"] + sizes["turn_16"]
    assert in_float["rotations by position"] == sizes["rotations.cos"] + sizes["rotations.sin"]
    assert in_float["weights of norms"] == sum(size for name, size in sizes.items() if "norm.weight" in name)
    assert in_float["scales"] == sum(size for name, size in sizes.items() if name.endswith(".scales"))
    assert "embedding left in float" not in in_float


def test_an_embedding_in_float_is_told_apart_from_norms_and_products() -> None:
    weights = [
        {"name": "model.embed_tokens.weight", "type": "float32", "shape": [257, 32], "bytes": 32_896},
        {"name": "model.norm.weight", "type": "float32", "shape": [32], "bytes": 128},
        {"name": "lm_head.weight", "type": "float32", "shape": [32, 257], "bytes": 32_896},
    ]
    audit = {
        "operators": {"MatMul": 1},
        "bytes_by_type": {"float32": 65_920},
        "float_products": ["lm_head.weight"],
        "weights": weights,
    }
    card = text.body(evidence_of(audit=audit), PARAMS)
    for what, size in (("embedding", "32,896"), ("weights of norms", "128"), ("products", "32,896")):
        assert re.search(rf"^\| `float32`, 65,920 in all \| {what}[^|]* \| {size} \|", card, re.MULTILINE)


@pytest.mark.parametrize(
    ("make", "changes"),
    [(odd.make_model, {}), (odd.make_grouped, {}), (odd.make_grouped, {"head_dim": 20})],
    ids=["latents", "heads", "heads filled up"],
)
def test_the_card_says_how_wide_the_graphs_cache_is(
    make: Callable[..., LanguageModel], changes: dict[str, int], tmp_path: Path
) -> None:
    model = make(**changes)
    onnx_model.export(model, PLANS["per-token-8"], tmp_path / "model.onnx")
    inputs = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.input
    of_layer = [value for value in inputs if re.fullmatch(r"past_0(\..*)?", value.name)]
    # All axes but the batch's and that of the tokens.
    numbers = sum(
        math.prod(axis.dim_value for axis in value.type.tensor_type.shape.dim if not axis.dim_param)
        for value in of_layer
    )
    card = text.body(evidence_of(config=config_to_json(model.config)), PARAMS)
    assert f"| cache a token and layer (numbers) | {numbers} |" in card


def test_a_configuration_that_is_no_models_is_named() -> None:
    config = {**config_to_json(odd.make_grouped().config), "head_dim": 15}
    told = r"models/float: config\.json: .*head_dim is 15; .*Run the stage 'train' again\."
    with pytest.raises(BadInput, match=told):
        text.body(evidence_of(config=config), PARAMS)


def test_steps_that_were_left_out_stand_in_the_card() -> None:
    steps = {"steps": 12, "skipped_steps": 4, "overflowed_steps": 2}
    card = text.body(evidence_of(train=steps), PARAMS)
    assert "| steps left out, whose gradient was not finite | 4 |" in card
    assert "| steps left out, whose gradient fp16 could not hold | 2 |" in card
    assert "left out" not in text.body(evidence_of(train={"steps": 12, "skipped_steps": 0}), PARAMS)


def test_the_card_says_from_how_much_text_tokens_were_predicted() -> None:
    # A checkpoint that has more positions than it was trained further on.
    config = config_to_json(odd.make_grouped(max_position_embeddings=8192).config)
    card = text.body(evidence_of(config=config, evaluation={"context": 256}), PARAMS)
    assert "Each token is predicted from at most 256 before it." in card
    assert "It attends to at most 8,192 tokens" in card


def test_the_card_says_how_much_text_the_baselines_have_read() -> None:
    card = text.body(evidence_of(evaluation={"baselines": {"trained_on_bytes": 2**26}}), PARAMS)
    assert "The first two have read the last 67,108,864 bytes of the training split:" in card
    assert "| `xz -9` primed with that text |" in card


def test_one_document_has_no_interval_to_show() -> None:
    report = Report(Path("nowhere.json"))
    report.content = {"loss": {"value": 1.5, "low": None, "high": None}}
    assert report.interval("loss") == "1.500"


def test_the_figures_are_there(project: Path) -> None:
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", _card(project)):
        assert (project / "models/card" / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (project / "models/card").iterdir()} == {"README.md", "architecture.png", "curve.png"}


def test_the_architecture_says_how_many_experts_of_what_size_there_are() -> None:
    latent, grouped, gated = (
        figures._experts_text(config_to_json(make().config))
        for make in (odd.make_model, odd.make_grouped_mixture, odd.make_gated_mixture)
    )
    assert latent == "8 experts of 22, 3 a token\n+ 2 shared; sigmoid router with balancing bias"
    assert grouped == "9 experts of 22, 3 a token\nsoftmax router"
    assert gated == "9 experts of 22, 3 a token\n+ 1 shared of 38, gated; softmax router"


def test_a_second_card_has_the_same_bytes(project: Path) -> None:
    before = tiny.files_of(project / "models/card")
    assert tiny.run("card", project)[0] == 0
    assert tiny.files_of(project / "models/card") == before


def test_the_example_of_the_card_runs_as_written(project: Path, tmp_path: Path) -> None:
    program = re.search(r"```python\n(.*?)```", _card(project), re.DOTALL)
    assert program
    (tmp_path / "example.py").write_text(program[1])

    def run(*prompt: str, folder: Path = project / "models/int8") -> "subprocess.CompletedProcess[str]":
        # Only these three packages may be imported, whatever else is installed.
        guard = (
            "import sys, runpy\n"
            "class Guard:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.split('.')[0] in ('torch', 'transformers', 'lm', 'tasks', 'flows'):\n"
            "            raise ImportError(name)\n"
            "sys.meta_path.insert(0, Guard())\n"
            f"sys.argv = ['example.py', *{prompt!r}]\n"
            f"runpy.run_path({str(tmp_path / 'example.py')!r}, run_name='__main__')\n"
        )
        return subprocess.run([sys.executable, "-c", guard], cwd=folder, capture_output=True, text=True, check=False)

    done = run("in the beginning")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("in the beginning")
    assert len(done.stdout) > len("in the beginning\n")
    assert len(run().stdout) > 10
    # Whatever the tokenizer was saved with.
    shutil.copytree(project / "models/int8", tmp_path / "padding")
    tokenizer = Tokenizer.from_file(str(tmp_path / "padding/tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(tmp_path / "padding/tokenizer.json"))
    assert run("in the beginning", folder=tmp_path / "padding").stdout == done.stdout
    # What ends a text stands in the way to generate: here every token does.
    generation = tmp_path / "padding/generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [*range(tokenizer.get_vocab_size())]}))
    assert run("in the beginning", folder=tmp_path / "padding").stdout == "in the beginning\n"
    refused = run("in the beginning " * 100)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert re.fullmatch(
        r"The prompt has \d+ tokens; the model reads at most \d+, its answer included\.\n", refused.stderr
    )
    assert set(re.findall(r"^(?:from|import) (\w+)", program[1], re.MULTILINE)) == {
        "json",
        "pathlib",
        "sys",
        "numpy",
        "onnxruntime",
        "tokenizers",
    }


def test_what_no_report_holds_is_not_assessed(tmp_path: Path) -> None:
    tiny.write_params(tmp_path)
    code, output = tiny.run("card", tmp_path)
    assert code == 0, output
    card = _card(tmp_path)
    assert "| parameters, total | not assessed |" in card
    assert "fine-tun" not in card
    assert "float not assessed, INT8 not assessed" in card
    assert not re.search(r"\bNone\b|\bnan\b", card)
    ModelCard.load(tmp_path / "models/card/README.md")
