"""The options of a run: dataclasses, filled from a YAML file and `--set key=value`, checked key by key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml

from bimos.errors import BimosError
from bimos.options import build

if TYPE_CHECKING:
    from bimos.methods.base import MethodConfig

# For whoever names no text: prose as WikiText is typeset, the web, chat. WikiText-103's split for training has no article of the test.
DEFAULT_DATA = "Salesforce/wikitext:wikitext-103-raw-v1:0.75,allenai/c4:en:0.2,HuggingFaceTB/smoltalk:all:0.05"
MOST = 10**15  # of a budget, in tokens or minutes
DEFAULT_MINUTES = 60.0  # for whoever gives no budget


@dataclasses.dataclass
class InitialiseConfig:
    """Stage 1: signs and scales that fit the teacher's weights, weighted by what its linears see."""

    sequences: int = 128  # calibration sequences behind the input statistics
    activation_aware: bool = True  # hand the statistics to the method; False: it sees the weights alone
    refit: bool | None = None  # first refit each linear to the teacher's answers on the student's inputs; null: if the method is trained


@dataclasses.dataclass
class BlocksConfig:
    """Stage 2: reconstruct each decoder block from the student's own inputs."""

    enabled: bool | None = None  # null: if the method is trained
    tokens: int = 65_536  # calibration tokens, streamed through every block
    epochs: int = 2
    batch_size: int = 2  # sequences
    lr_latent: float = 6.0e-3
    lr_scale: float = 1.0e-3
    lr_router: float = 1.0e-3
    share: float = 0.4  # of a budget given in minutes; more where even a start on a few sequences takes longer


@dataclasses.dataclass
class DistillConfig:
    """Stage 3: end-to-end distillation from the teacher's logits and hidden states."""

    enabled: bool | None = None  # null: if the method is trained
    batch_size: int = 2  # sequences a step
    accumulate: int = 1  # steps whose gradients are added up
    lr_latent: float | None = None  # null: what the method says, 7e-4 for most
    lr_scale: float = 8.0e-4
    lr_router: float = 3.0e-5
    expert_share: float = 0.1  # of what the gradients of a layer's scaling experts differ by; 1: as they are
    train: Literal["all", "scales"] = "all"  # `scales`: latents stay as they are
    train_norms: bool = True
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1.0e-8  # of AdamW, beside the size of gradients of a loss that is a mean over tokens
    weight_decay: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1  # share of the stage
    clip: float = 1.0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: moments in 8 bits, by blocks of 256 (2110.02861); torchao's
    latents: Literal["float32", "bfloat16"] = "float32"  # bfloat16: rounded stochastically behind every step; torchao's
    checkpointing: bool = False  # activations inside the student's blocks are computed again for gradients, not kept
    temperature: float = 1.0
    hidden_weight: float = 0.0  # of the sum over layers of the MSE of hidden states, per sequence as in the paper: 10
    relative_weight: float = 0.0  # of the mean over layers of the error of hidden states relative to their norm
    teacher: Literal["live", "cached"] = "live"
    int8_teacher: bool = (
        True  # products of teacher and head in whole numbers if faster: int8 with AVX-512 and no AMX, int16 with AVX2 alone
    )
    top_k: int = 64  # logits a token in the cache
    distinct_tokens: int | None = None  # then the same text again; None: ever new text
    checkpoint_minutes: float = 5.0
    report_to: str = "none"  # tensorboard, trackio: as in transformers.TrainingArguments


@dataclasses.dataclass
class LossConfig:
    """What any method's distillation loss may have besides; see `bimos.training.losses`."""

    dad: bool = False  # Deviation-Aware Distillation (2402.11960): tokens of which teacher or student is unsure count more
    dad_gamma: float = 0.1  # the teacher's entropy to this power, the student's to 1 less it
    dad_lambda: float = 0.1  # of the deviation-aware term, beside the distillation loss


@dataclasses.dataclass
class RunConfig:
    """Everything that determines a run of `bimos quantize` besides the model."""

    method: str = "binarymos"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the method
    data: str = DEFAULT_DATA
    sequence_length: int = 512
    seed: int = 0
    tokens: int | None = None  # of stage 3
    minutes: float | None = None  # of all stages
    embedding_bits: Literal[8, 16] = 8
    low_memory: bool = False  # of the teacher, one block in memory at a time; without distillation
    skip: list[str] = dataclasses.field(default_factory=list)  # linears to leave alone, by the end of their name
    initialise: InitialiseConfig = dataclasses.field(default_factory=InitialiseConfig)
    blocks: BlocksConfig = dataclasses.field(default_factory=BlocksConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> Self:
        """Raises BimosError naming `source` on an unknown key or a value of the wrong type."""
        run = build(cls, values, source)
        run.check()
        return run

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Raises BimosError: no such file, not YAML, or not this config."""
        return cls.from_dict(read_yaml(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def settled(self, method: MethodConfig) -> Self:
        """The config with every null decided that means "if the method is trained" or "what the method says".

        Raises:
            BimosError: what it comes to is no run.
        """
        trained = method.trained
        if self.tokens is not None and self.distill.enabled is None and not trained:
            raise BimosError(f"method '{self.method}' is not trained: leave out --tokens, or set distill.enabled=true")
        sections: dict[str, Any] = {}
        for name, key in (("initialise", "refit"), ("blocks", "enabled"), ("distill", "enabled")):
            section = getattr(self, name)
            wanted = trained and not (name == "distill" and self.low_memory)
            sections[name] = dataclasses.replace(section, **{key: decided(getattr(section, key), wanted)})
        if self.distill.lr_latent is None:
            sections["distill"] = dataclasses.replace(sections["distill"], lr_latent=method.lr_latent())
        run = dataclasses.replace(self, **sections)
        run.check()
        return run

    def check(self) -> None:
        """Raises BimosError on values that no run can have."""
        for name in ("tokens", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MOST:
                raise BimosError(f"a budget of {value} {name} is none; give --{name} a positive, finite number, at most {MOST:.0e}")
        if self.tokens is not None and self.minutes is not None:
            raise BimosError("give a budget in --tokens or in --minutes, not both")
        for words, (must, holds) in _RANGES.items():
            for name in words.split():
                section, _, key = name.rpartition(".")
                value = getattr(getattr(self, section) if section else self, key)
                if value is not None and not (math.isfinite(value) and holds(value)):
                    raise BimosError(f"{name}={value}: must be {must}")
        if self.tokens is not None and self.distill.enabled is False:
            raise BimosError(f"tokens={self.tokens} are the budget of distillation, which is off; set blocks.tokens, or give --minutes")
        if self.low_memory and (self.distill.enabled or self.tokens is not None):
            raise BimosError("low_memory goes block by block, distillation trains the whole model: leave out tokens and distill.enabled")
        if self.distill.teacher == "cached" and self.tokens is None and self.distill.distinct_tokens is None:
            raise BimosError("distill.teacher=cached: say how much text to cache, with --set distill.distinct_tokens=N or --tokens N")
        if not 0 <= self.seed < 2**32:
            raise BimosError(f"seed={self.seed}: must be from 0 to 2**32 - 1")
        if self.distill.teacher == "cached" and self.distill.temperature != 1:
            raise BimosError(
                "distill.teacher=cached holds log-probabilities at temperature 1; set distill.temperature=1 or distill.teacher=live"
            )
        if self.distill.teacher == "cached" and (self.distill.hidden_weight or self.distill.relative_weight):
            raise BimosError("distill.teacher=cached holds logits only; set hidden_weight and relative_weight to 0 or distill.teacher=live")


def decided(value: bool | None, trained: bool) -> bool:
    """An option that may be left to the method."""
    return trained if value is None else value


_POSITIVE = """sequence_length initialise.sequences blocks.tokens blocks.epochs blocks.batch_size
    distill.batch_size distill.accumulate distill.top_k distill.distinct_tokens distill.temperature"""
_NOT_NEGATIVE = """blocks.lr_latent blocks.lr_scale blocks.lr_router distill.lr_latent distill.lr_scale distill.lr_router
    distill.weight_decay distill.clip distill.hidden_weight distill.relative_weight distill.checkpoint_minutes loss.dad_lambda
    distill.epsilon"""
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    _POSITIVE: ("positive", lambda value: value > 0),
    _NOT_NEGATIVE: ("0 or more", lambda value: value >= 0),
    "loss.dad_gamma distill.expert_share": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "blocks.share distill.warmup distill.beta1 distill.beta2": ("from 0 to below 1", lambda value: 0 <= value < 1),
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping as a dict. Raises BimosError: missing, unreadable, not a mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BimosError(f"cannot read config file '{path}': {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise BimosError(f"config file '{path}' is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BimosError(f"config file '{path}' must be a mapping of keys to values")
    return values


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """`values` with `--set` assignments such as `distill.lr_latent=1e-3` applied. Raises BimosError on bad syntax."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise BimosError(f"--set {assignment}: write key=value, for example distill.lr_latent=1e-3")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        *parents, key = path.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise BimosError(f"--set {assignment}: '{parent}' is a value, not a section")
        target[key] = value
    return values
