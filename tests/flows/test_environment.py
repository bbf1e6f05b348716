"""What is recorded of the machine and the packages, and how two records are compared."""

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flows import environment
from flows.environment import Difference, Environment, Processes, Processor

if TYPE_CHECKING:
    from versioned import Versioned

HERE = Environment(
    python="3.11.7", system="Linux x86_64", libc="glibc 2.36",
    cpu=Processor(model="one", flags=("avx2", "fma"), cores=2), gpus=(), driver=None,
    packages={"torch": "2.13.0+cpu", "numpy": "2.4.0", "pytest": "9.0"},
    stages={"train": Processes(world_size=2, threads_per_process=1)}, variables={}, lock_sha256="a",
)  # fmt: skip


def test_a_record_is_equal_to_itself() -> None:
    assert environment.compare(HERE, HERE) == ()
    assert environment.compare(Environment.model_validate_json(HERE.model_dump_json()), HERE) == ()


def test_each_fact_that_differs_is_named() -> None:
    other = HERE.model_copy(
        update={
            "cpu": Processor(model="another", flags=("avx2", "avx512f"), cores=2),
            "gpus": ("NVIDIA A100", "NVIDIA A100"),
            "driver": "580.1",
            "packages": {"torch": "2.13.0+cu130", "numpy": "2.4.0"},
            "stages": {"train": Processes(world_size=8, threads_per_process=1)},
            "variables": {"MKL_CBWR": "COMPATIBLE"},
        }
    )
    assert environment.compare(HERE, other) == (
        Difference(fact="cpu.model", recorded="one", here="another"),
        Difference(fact="cpu.flags", recorded="avx2, fma", here="avx2, avx512f"),
        Difference(fact="gpus", recorded="none", here="NVIDIA A100, NVIDIA A100"),
        Difference(fact="driver", recorded="none", here="580.1"),
        # That pytest is missing there changes nothing.
        Difference(fact="packages.torch", recorded="2.13.0+cpu", here="2.13.0+cu130"),
        Difference(fact="stages.train.world_size", recorded="2", here="8"),
        Difference(fact="variables.MKL_CBWR", recorded="none", here="COMPATIBLE"),
    )
    assert str(environment.compare(HERE, other)[0]) == "cpu.model: one recorded, another here"


def test_a_tool_is_what_tests_alone_name() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    needed = " ".join(project["dependencies"])
    assert set(project["optional-dependencies"]["test"]) >= environment.TOOLS
    assert not [name for name in environment.TOOLS if re.search(rf"\b{name}\b", needed)]


def test_a_stage_that_was_computed_elsewhere_is_compared_by_its_own_facts() -> None:
    aten = "variables.ATEN_CPU_CAPABILITY"
    recorded = HERE.model_copy(update={"computed": {"train": {aten: "avx2", "cpu.model": "another"}, "shard": None}})
    assert environment.compare(recorded, HERE) == (
        Difference(fact=f"train: {aten}", recorded="avx2", here="none"),
        Difference(fact="train: cpu.model", recorded="another", here="one"),
    )
    there = HERE.model_copy(
        update={"variables": {"ATEN_CPU_CAPABILITY": "avx2"}, "cpu": HERE.cpu.model_copy(update={"model": "another"})}
    )
    # The same for the stage; other ones than those of the publication, in which the rest was computed, if anything was.
    assert [one.fact for one in environment.compare(recorded, there)] == ["cpu.model", aten]
    assert [one.fact for one in environment.compare(recorded, there, ["train", "shard"])] == ["cpu.model", aten]
    assert environment.compare(recorded, there, ["train"]) == ()
    assert recorded.unknown == ("shard",)
    assert Environment.model_validate(environment.content(recorded)) == recorded
    assert "computed" not in environment.content(HERE)


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_what_is_recorded_here(versioned: "Versioned", monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    around = {name: os.environ[name] for name in environment.VARIABLES if os.environ.get(name)}
    monkeypatch.setenv(name, "AVX2")
    found = environment.record(versioned.root)
    assert found.python == sys.version.split()[0]
    assert found.cpu.model
    assert found.cpu.cores >= 1
    # The lock file names it as 0, installed is another one.
    assert set(found.packages) == {"ruamel.yaml"}
    assert found.packages["ruamel.yaml"] != "0"
    assert found.stages["train"] == Processes(world_size=2, threads_per_process=1)
    assert set(found.stages) == {"train", "quantize"}
    assert found.variables == {**around, name: "AVX2"}
    recorded = environment.recorded(versioned.root, "lm@v1.0.0")
    assert recorded is not None
    assert [one.fact for one in environment.compare(recorded, found)] == [f"variables.{name}"]


@pytest.mark.parametrize("content", [None, "{", '{"python": "3.11"}'])
def test_a_record_that_cannot_be_read_is_none(versioned: "Versioned", content: str | None) -> None:
    file = versioned.root / environment.FILE
    file.unlink() if content is None else file.write_text(content)
    versioned.commit("lm@v1.1.0")
    assert environment.recorded(versioned.root, "lm@v1.1.0") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu sse4_2 fma avx512_vnni amx_bf16 vmx\n"
            "processor\t: 1\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu\n",
            ("Intel(R) Xeon(R)", ("amx_bf16", "avx512_vnni", "fma", "sse4_2")),
        ),
        (
            "processor\t: 0\nFeatures\t: fp asimd asimddp sve bf16 crc32\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n",
            ("0x41 0xd4f", ("asimd", "asimddp", "bf16", "sve")),
        ),
    ],
)
def test_the_cpu_of_x86_and_of_arm(tmp_path: Path, text: str, expected: tuple[str, tuple[str, ...]]) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    found = environment._processor(file)
    assert (found.model, found.flags) == expected


def test_the_table_of_gpus() -> None:
    # As `nvidia-smi --query-gpu=name,driver_version --format=csv,noheader` prints it.
    assert environment._parse_gpus("NVIDIA H200, 580.65.06\nNVIDIA H200, 580.65.06\n") == (
        ("NVIDIA H200", "NVIDIA H200"), "580.65.06",
    )  # fmt: skip
    assert environment._parse_gpus("No devices were found\n") == ((), None)
