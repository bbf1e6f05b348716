"""train.communication becomes the variables that NCCL and gloo read, or one line that says why not."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny

from tasks import inputs
from tasks.errors import BadParameter
from tasks.section import read_section
from tasks.train.communication import CommunicationParams, address_here, environment, environment_here, in_force
from tasks.train.params import TrainParams

INTERFACES, ADAPTERS = ["eth0", "eth1", "lo"], ["mlx5_0", "mlx5_1"]


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        ({}, "cpu", {}),
        ({}, "cuda", {}),
        ({"interface": "eth1"}, "cpu", {"GLOO_SOCKET_IFNAME": "eth1"}),
        ({"interface": "eth1"}, "cuda", {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}),
        ({"interface": "ib0, eth1,lo"}, "cpu", {"GLOO_SOCKET_IFNAME": "eth1,lo"}),
        ({"infiniband": "off"}, "cuda", {"NCCL_IB_DISABLE": "1"}),
        ({"infiniband": "on"}, "cuda", {"NCCL_IB_DISABLE": "0"}),
        ({"infiniband": "mlx5_1:1"}, "cuda", {"NCCL_IB_DISABLE": "0", "NCCL_IB_HCA": "=mlx5_1:1"}),
        ({"algorithm": "tree"}, "cuda", {"NCCL_ALGO": "allreduce:tree"}),
        ({"debug": "info"}, "cpu", {"TORCH_DISTRIBUTED_DEBUG": "INFO", "TORCH_CPP_LOG_LEVEL": "INFO"}),
        (
            {"debug": "detail"},
            "cuda",
            {"NCCL_DEBUG": "INFO", "TORCH_DISTRIBUTED_DEBUG": "DETAIL", "TORCH_CPP_LOG_LEVEL": "INFO"},
        ),
    ],
)
def test_each_setting_is_a_variable(changes: dict[str, Any], device: str, expected: dict[str, str]) -> None:
    assert environment(CommunicationParams(**changes), device, INTERFACES, ADAPTERS) == expected


@pytest.mark.parametrize(
    ("changes", "device", "adapters", "reason"),
    [
        (
            {"interface": "eth7"},
            "cpu",
            ADAPTERS,
            "interface is eth7, but this machine has no such network interface (it has: eth0, eth1, lo). Name one",
        ),
        ({"infiniband": "mlx4_0"}, "cuda", ADAPTERS, "no such InfiniBand adapter (it has: mlx5_0, mlx5_1)"),
        ({"infiniband": "mlx4_0"}, "cuda", [], "no such InfiniBand adapter (it has: none)"),
        ({"infiniband": "on"}, "cuda", [], "infiniband is on, but this machine has no adapter in "),
        ({"infiniband": "off"}, "cpu", [], "infiniband is off, which only NCCL reads, and train.device is cpu."),
        ({"algorithm": "ring"}, "cpu", [], "algorithm is ring, which only NCCL reads, and train.device is cpu."),
    ],
)
def test_what_the_machine_lacks_is_one_line(
    changes: dict[str, Any], device: str, adapters: list[str], reason: str
) -> None:
    with pytest.raises(BadParameter) as refused:
        environment(CommunicationParams(**changes), device, INTERFACES, adapters)
    assert str(refused.value).startswith("params.yaml: train.communication.")
    assert reason in str(refused.value)


def test_this_machine_has_the_interfaces_that_it_has() -> None:
    (loopback,) = [name for name in psutil.net_if_addrs() if name.startswith("lo")]
    params = CommunicationParams(interface=loopback)
    assert environment_here(params, "cpu") == {"GLOO_SOCKET_IFNAME": loopback}
    assert address_here(params) == "127.0.0.1"
    assert address_here(CommunicationParams()) is None


def test_the_log_names_what_is_in_force() -> None:
    variables = {"NCCL_ALGO": "tree", "HOME": "/", "GLOO_SOCKET_IFNAME": "lo"}
    assert in_force(CommunicationParams(), variables) == "GLOO_SOCKET_IFNAME=lo NCCL_ALGO=tree"
    assert in_force(CommunicationParams(timeout_seconds=900.0), {"HOME": "/"}) == "timeout_seconds=900"
    assert in_force(CommunicationParams(), {"HOME": "/"}) == ""


def test_a_group_that_loses_patience_before_the_heartbeat_is_refused(tmp_path: Path) -> None:
    tiny.write_params(tmp_path, train__communication__timeout_seconds=600.0)
    with pytest.raises(BadParameter) as refused:
        read_section("train", TrainParams, tmp_path / "params.yaml")
    assert "communication.timeout_seconds 600 is not above hang_timeout_seconds 600; raise it" in str(refused.value)


def test_what_ends_torch_is_refused(tmp_path: Path) -> None:
    tiny.write_params(tmp_path, train__communication__debug="detail")
    with pytest.raises(BadParameter, match=r"communication\.debug detail ends torch .* on CPUs; set it to info"):
        read_section("train", TrainParams, tmp_path / "params.yaml")


# Where it is not asked for: test_train's killed training.
@pytest.mark.parametrize(("debug", "mesh"), [("info", {}), ("detail", {"shard": 2})], ids=str)
def test_torch_s_own_log_is_printed_where_it_is_asked_for(debug: str, mesh: dict[str, int], tmp_path: Path) -> None:
    tiny.write_params(tmp_path, train__steps=2, train__communication__debug=debug, train__mesh=mesh)
    tiny.write_shards(tmp_path)
    process = tiny.stage("train", tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    # That of each rank, which is a fork, and not of the launcher alone.
    assert all(f"[rank{rank}]:[I" in output for rank in (0, 1)), output
    assert ("Running collective" in output) is (debug == "detail")
    assert "UserWarning" not in output, output


def test_only_the_algorithm_is_part_of_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = []
    for changes in ({}, {"interface": "lo", "debug": "info", "timeout_seconds": 900.0}, {"algorithm": "tree"}):
        tiny.write_params(tmp_path, **{f"train__communication__{name}": value for name, value in changes.items()})
        keys.append(inputs.key("train", read_section("train", TrainParams), []))
    assert keys[0] == keys[1] != keys[2]


def test_an_interface_that_is_not_there_ends_the_stage_before_it_starts(tmp_path: Path) -> None:
    tiny.write_params(tmp_path, train__communication__interface="nowhere0")
    tiny.write_shards(tmp_path)
    code, output = tiny.run("train", tmp_path)
    assert code == 2
    assert tiny.error_line(output).startswith(
        "params.yaml: train.communication.interface is nowhere0, but this machine "
    )
