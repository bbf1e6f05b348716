"""The section ``train`` of ``params.yaml``."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from lm.config import Architecture, LatentArchitecture, ModelConfig, without_further
from lm.hugging_face_config import architecture_of
from lm.layer_names import adaptable, chosen, is_stack
from tasks import init, paths
from tasks.errors import BadParameter
from tasks.exchange_params import Compression, DilocoParams, ExchangeParams
from tasks.mesh import check_fits, check_tokens
from tasks.section import Section, validate
from tasks.train.communication import CommunicationParams
from tasks.training_params import TrainingParams

_MOST_NAMED = 4


def checkpoint_inputs() -> list[Path]:
    """Returns the files that a checkpoint depends on, besides parameters and code.

    Raises :class:`tasks.errors.BadInput` where ``models/init`` is not what ``train.init`` says.
    """
    return [paths.MANIFEST, *([] if init.checkpoint() is None else [paths.INIT_RECORD])]


def check_depths(model: LatentArchitecture, seq_len: int) -> None:
    """Raises ValueError where a window of so many tokens has none as far ahead as ``model`` is to predict."""
    if model.num_nextn_predict_layers >= seq_len:
        raise ValueError(
            f"num_nextn_predict_layers {model.num_nextn_predict_layers} predicts further ahead than a window of "
            f"seq_len {seq_len} has tokens; lower it, or raise seq_len"
        )


def _differences(asked: Architecture, there: Architecture) -> str:
    """Returns what ``asked`` is and ``there`` is not, the first few; nothing where they are the same."""
    one, two = asked.model_dump(), there.model_dump()
    other = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    # Of another family all else is other too.
    named = ["model_type"] if "model_type" in other else other[:_MOST_NAMED]
    return ", ".join(f"{name} {_told(one.get(name))} (there {_told(two.get(name))})" for name in named)


def _told(value: object) -> object:
    return "null" if value is None else value


class LoraParams(Section):
    """Low-rank factors beside frozen weights: see :mod:`lm.low_rank`."""

    rank: int = Field(ge=1)
    # What the factors' product counts for, times rank.
    alpha: float = Field(gt=0)
    # Patterns of layers' names, whole (model.layers.0.self_attn.q_proj) or the last part (q_proj).
    targets: tuple[str, ...] = Field(strict=False, min_length=1)
    # Whether models/float/adapter keeps the factors too, as the peft library reads them.
    keep_adapter: bool


class TrainParams(TrainingParams):
    """Training from scratch, or on from the model that ``init`` names."""

    init: str = Field(default=init.SCRATCH, min_length=1)
    seq_len: int = Field(ge=2, le=2**24)
    # None: that of the model that training starts from.
    model: Annotated[Architecture, Field(discriminator="model_type")] | None
    compression: Compression = "none"
    compression_rank: int = Field(default=4, ge=1)
    diloco: DilocoParams = DilocoParams()
    communication: CommunicationParams = CommunicationParams()
    compile: bool = False
    # What the loss of multi-token prediction counts for; 0 leaves its layers out.
    mtp_loss_weight: float = Field(default=0.3, ge=0)
    # None: all weights are trained.
    lora: LoraParams | None = None

    @property
    def exchange(self) -> ExchangeParams:
        return ExchangeParams(compression=self.compression, rank=self.compression_rank, diloco=self.diloco)

    @property
    def compiles(self) -> bool:
        return self.compile

    @property
    def trains_mtp(self) -> bool:
        """Whether layers of multi-token prediction are trained where the model has them; LoRA leaves them out."""
        return self.mtp_loss_weight > 0 and self.lora is None

    @property
    def architecture(self) -> Architecture | None:
        """What ``model`` describes, without what is not trained."""
        return self.model if self.model is None or self.trains_mtp else without_further(self.model)

    def misfit(self, start: ModelConfig | None) -> str | None:
        """Returns what is told of parameters that the model to start from does not fit, None where it fits all.

        ``start`` None: there is no version in production yet to start from, or training starts from scratch.
        """
        if start is None:
            if self.model is None:
                return (
                    "train.model is null, and no version is promoted yet that training could start from. Describe a "
                    "model, or name a checkpoint in train.init."
                )
            if self.lora is not None:
                return (
                    "train.lora adapts a model that is there, and no version is promoted yet. Set lora: null until one "
                    "is, or name a checkpoint in train.init."
                )
            return None
        there = architecture_of(start) if self.trains_mtp else without_further(architecture_of(start))
        if self.architecture is not None and (told := _differences(self.architecture, there)):
            return (
                f"train.model is not the model that train.init names: {told}. Set model: null to take that one, or "
                "init: scratch to train this one."
            )
        try:
            check_fits(self.layout, there)
            if isinstance(there, LatentArchitecture):
                check_depths(there, self.seq_len)
        except ValueError as error:
            return f"train: {error}."
        if self.seq_len > start.max_position_embeddings:
            return (
                f"train.seq_len {self.seq_len} is more than the {start.max_position_embeddings} positions of the model "
                "that train.init names. Lower it to that."
            )
        if self.lora is not None and isinstance(there, LatentArchitecture) and there.has_bias and self.bias_update_rate:
            return (
                f"train.bias_update_rate is {self.bias_update_rate:g}, and train.lora leaves all but its factors as "
                "they are, the routers' biases too. Set bias_update_rate: 0.0."
            )
        return None if self.lora is None else self._misfit_of_factors(self.lora, there)

    def _misfit_of_factors(self, lora: LoraParams, there: Architecture) -> str | None:
        try:
            adapted = chosen(adaptable(there), lora.targets)
        except ValueError as error:
            return f"train.lora.targets: {error}."
        mesh = self.layout
        # Those of experts lie over `expert` already; along their rank, which comes next, torch cuts in equal parts.
        if mesh.expert > 1 and lora.rank % mesh.shard and (experts := [name for name in adapted if is_stack(name)]):
            return (
                f"train.lora.rank {lora.rank} does not divide over mesh.shard {mesh.shard}, as it must with "
                f"mesh.expert above 1 where experts are adapted ({experts[0]}). Change one of them, or leave experts "
                "out of targets."
            )
        return None

    def on(self, processes: int) -> "TrainParams":
        """Returns the same training on so many processes, as torchrun has found them.

        Raises :class:`BadParameter` when they are not ``world_size`` and the training is not elastic, or when it
        cannot be cut so.
        """
        if processes == self.world_size:
            return self
        if not self.elastic:
            raise BadParameter(
                f"{paths.PARAMS}: train.world_size is {self.world_size}, and {processes} processes were started. "
                f"Set it to {processes}, or train.elastic to true."
            )
        return validate(TrainParams, {**self.model_dump(), "world_size": processes}, paths.PARAMS, "train")

    @model_validator(mode="after")
    def _the_group_is_patient_enough(self) -> Self:
        seconds = self.communication.timeout_seconds
        # The heartbeat knows more than the group, so it has to be the first to lose patience.
        if seconds is not None and seconds <= self.hang_timeout_seconds:
            raise ValueError(
                f"communication.timeout_seconds {seconds:g} is not above hang_timeout_seconds "
                f"{self.hang_timeout_seconds:g}; raise it, or lower that one"
            )
        return self

    @model_validator(mode="after")
    def _torch_outlives_what_it_tells(self) -> Self:
        plain = self.layout.is_replicated and self.compression == "none" and not self.diloco.inner_steps
        # torch 2.13: DDP's logger takes the wrapper that checks collectives for gloo's group itself (SIGSEGV).
        if self.communication.debug == "detail" and self.device == "cpu" and self.world_size > 1 and plain:
            raise ValueError(
                "communication.debug detail ends torch where it averages whole gradients on CPUs; set it to info"
            )
        return self

    @model_validator(mode="after")
    def _what_is_kept_can_be_seen(self) -> Self:
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "activation_checkpointing selective keeps products that compile hides from it; set it to full or none, "
                "or compile to false"
            )
        return self

    @model_validator(mode="after")
    def _there_is_a_model(self) -> Self:
        if self.model is None and self.init == init.SCRATCH:
            raise ValueError("model is null, but init: scratch needs one; describe it, or name a checkpoint in init")
        return self

    @model_validator(mode="after")
    def _windows_are_long_enough(self) -> Self:
        if isinstance(self.architecture, LatentArchitecture):
            check_depths(self.architecture, self.seq_len)
        return self

    @model_validator(mode="after")
    def _lora_fits(self) -> Self:
        if self.lora is None:
            return self
        if self.init == init.SCRATCH:
            raise ValueError("lora adapts a model that is there, and init: scratch has none; name a checkpoint in init")
        return self

    @model_validator(mode="after")
    def _the_compression_fits(self) -> Self:
        if self.compression == "none" or (self.compression == "int8" and self.diloco.inner_steps):
            return self
        if not self.layout.is_replicated:
            raise ValueError(
                f"compression {self.compression} takes whole gradients, and the mesh cuts them; set compression to "
                "none, or every axis of mesh but replicate to 1"
            )
        if self.diloco.inner_steps:
            raise ValueError(
                f"compression {self.compression} is of the gradients of each step, and with diloco none are exchanged; "
                "set compression to int8 or none, or diloco.inner_steps to 0"
            )
        if self.elastic:
            raise ValueError(
                f"compression {self.compression} leaves each process an error of its own, which another world_size "
                "cannot take over; set elastic to false or compression to none"
            )
        return self

    @model_validator(mode="after")
    def _diloco_fits(self) -> Self:
        every, mesh = self.diloco.inner_steps, self.layout
        if not every:
            return self
        if mesh.replicate * mesh.shard != self.world_size:
            raise ValueError(
                "diloco takes replicas that are whole or cut by shard; set every axis of mesh but replicate and shard "
                "to 1, or diloco.inner_steps to 0"
            )
        if mesh.replicate == 1:
            raise ValueError(
                "diloco exchanges between replicas, and mesh makes one; raise world_size, or set diloco.inner_steps "
                "to 0"
            )
        for name in ("validate_every", "checkpoint_every"):
            if (steps := getattr(self, name)) % every:
                raise ValueError(
                    f"{name} {steps} is not a multiple of diloco.inner_steps {every}, after which alone the replicas "
                    f"are equal; make it {max(1, steps // every) * every}"
                )
        if self.elastic:
            raise ValueError(
                "diloco leaves each replica moments of its own, which another world_size cannot take over; set elastic "
                "to false or diloco.inner_steps to 0"
            )
        return self

    @model_validator(mode="after")
    def _the_windows_fit_the_mesh(self) -> Self:
        check_tokens(self.layout, self.seq_len)
        return self

    @model_validator(mode="after")
    def _the_model_fits_the_mesh(self) -> Self:
        # That of a checkpoint is looked at when it has been read.
        if self.architecture is not None:
            check_fits(self.layout, self.architecture)
        return self
