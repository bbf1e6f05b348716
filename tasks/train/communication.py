"""How the processes of a training reach each other: ``train.communication`` as the variables that NCCL and gloo read.

Sources: NCCL's user guide, "Environment Variables"; torch's documentation of ``torch.distributed``, "Common
environment variables" and "Logging".
"""

import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import psutil

from tasks import paths
from tasks.errors import BadParameter
from tasks.section import Section, operational

_INFINIBAND = Path("/sys/class/infiniband")
# Whose value matters to whoever reads the log of a slow or a hanging training.
_TOLD = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_DEBUG")

Algorithm = Literal["auto", "ring", "tree", "nvls", "nvlstree", "collnetdirect", "collnetchain"]


class CommunicationParams(Section):
    """The network between the processes. The defaults set nothing: what the environment has already stays in force."""

    # Names of network interfaces, separated by commas; each machine takes those of them that it has.
    interface: str | None = operational(default=None, min_length=1)
    # auto, on, off, or the names of adapters (`mlx5_0,mlx5_1:1`).
    infiniband: str = operational(default="auto", min_length=1)
    # Decides the order of sums, so it is part of a version's identity.
    algorithm: Algorithm = "auto"
    timeout_seconds: float | None = operational(default=None, gt=0, le=1e7)
    debug: Literal["off", "info", "detail"] = operational(default="off")


def environment(
    params: CommunicationParams, device: str, interfaces: Collection[str], adapters: Collection[str]
) -> dict[str, str]:
    """Returns the variables that ``params`` ask for on a machine with these network interfaces and adapters.

    Raises :class:`BadParameter` when the machine lacks what they name, or when nothing would read it.
    """
    if device == "cpu":
        for name, value in (("infiniband", params.infiniband), ("algorithm", params.algorithm)):
            if value != "auto":
                raise _wrong(name, f"is {value}, which only NCCL reads, and train.device is cpu. Set it to auto.")
    set_to: dict[str, str] = {}
    if params.interface is not None:
        found = _those_here("interface", params.interface, interfaces, "network interface")
        # torch's CPU side meets over gloo on GPUs too.
        set_to["GLOO_SOCKET_IFNAME"] = ",".join(found)
        if device == "cuda":
            # NCCL takes prefixes unless told otherwise: eth1 would also be eth10.
            set_to["NCCL_SOCKET_IFNAME"] = "=" + ",".join(found)
    if params.infiniband == "off":
        set_to["NCCL_IB_DISABLE"] = "1"
    elif params.infiniband == "on":
        if not adapters:
            raise _wrong("infiniband", f"is on, but this machine has no adapter in {_INFINIBAND}. Set it to auto.")
        set_to["NCCL_IB_DISABLE"] = "0"
    elif params.infiniband != "auto":
        found = _those_here("infiniband", params.infiniband, adapters, "InfiniBand adapter")
        set_to |= {"NCCL_IB_DISABLE": "0", "NCCL_IB_HCA": "=" + ",".join(found)}
    if params.algorithm != "auto":
        # Of the sums alone: asked for all, NCCL ends where a gather knows no tree.
        set_to["NCCL_ALGO"] = f"allreduce:{params.algorithm}"
    if params.debug != "off":
        if device == "cuda":
            set_to["NCCL_DEBUG"] = "INFO"
        set_to |= {"TORCH_DISTRIBUTED_DEBUG": params.debug.upper(), "TORCH_CPP_LOG_LEVEL": "INFO"}
    return set_to


def environment_here(params: CommunicationParams, device: str) -> dict[str, str]:
    """Returns :func:`environment` for this machine."""
    adapters = sorted(path.name for path in _INFINIBAND.iterdir()) if _INFINIBAND.is_dir() else []
    return environment(params, device, sorted(psutil.net_if_addrs()), adapters)


def address_here(params: CommunicationParams) -> str | None:
    """Returns the IPv4 address of the interface that ``params`` name, or None: that of the host name."""
    names = [] if params.interface is None else _names(params.interface)
    for name in names:
        for address in psutil.net_if_addrs().get(name, []):
            if address.family == socket.AF_INET:
                return str(address.address)
    return None


def in_force(params: CommunicationParams, variables: Mapping[str, str]) -> str:
    """Returns the timeout, and the settings of NCCL and gloo among ``variables``, as one line; empty without any."""
    set_to = [f"{name}={variables[name]}" for name in sorted(variables) if name.startswith(_TOLD)]
    if params.timeout_seconds is not None:
        set_to.insert(0, f"timeout_seconds={params.timeout_seconds:g}")
    return " ".join(set_to)


def _those_here(key: str, asked: str, there: Collection[str], kind: str) -> list[str]:
    # Machines of one training may call the same network by different names. A port follows an adapter's colon.
    found = [name for name in _names(asked) if name.partition(":")[0] in there]
    if not found:
        have = ", ".join(there) or "none"
        raise _wrong(key, f"is {asked}, but this machine has no such {kind} (it has: {have}). Name one of those.")
    return found


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def _wrong(key: str, what: str) -> BadParameter:
    return BadParameter(f"{paths.PARAMS}: train.communication.{key} {what}")
