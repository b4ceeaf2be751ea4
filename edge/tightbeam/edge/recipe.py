"""The recipe: one YAML file that says what a training run is, checked before anything starts.

Every section refuses unknown keys and every field says its unit. A recipe is frozen: the resolved one, with
its overrides applied, is what the run folder keeps. Two hashes follow from it: `sha256` over everything, and
`numbers_sha256` over what decides the trained weights, which is what a resumed run must share.
Nothing heavy is imported here.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tightbeam.common.addresses import check_address
from tightbeam.common.settings.sections import Section, checked_section
from tightbeam.common.settings.yaml_text import read_mapping
from tightbeam.edge.modes.registry import MODES, recipe_modes, spec_of

__all__ = [
    "AdapterSection",
    "Address",
    "CacheSection",
    "CodecName",
    "Codecs",
    "CutText",
    "DataSection",
    "ModeName",
    "ModelSection",
    "OutputSection",
    "Recipe",
    "SideSection",
    "TrainSection",
    "load_recipe",
    "recipe_from_mapping",
]

CodecName = Literal["auto", "fp32", "bf16", "int8", "int5", "int4", "int8s", "int5s", "int4s"]
Address = Annotated[str, AfterValidator(check_address)]


def _some_blocks_here(cut: str) -> str:
    if not any(map(int, cut.split(":"))):
        raise ValueError(f"{cut} leaves no block at the edge, so there is nothing to train")
    return cut


def _known_mode(mode: str) -> str:
    known = [repr(name) for name in recipe_modes()]
    if repr(mode) not in known:
        expected = f"{', '.join(known[:-1])} or {known[-1]}"
        raise PydanticCustomError("literal_error", "should be {expected}", {"expected": expected})
    return mode


ModeName = Annotated[str, AfterValidator(_known_mode)]
CutText = Annotated[str, Field(pattern=r"^\d+:\d+$"), AfterValidator(_some_blocks_here)]


class ModelSection(Section):
    """Which backbone, and how the edge's own part of it runs."""

    cloud: Address = Field(description="Address of the cloud, host:port.")
    identity: Path | None = Field(default=None, description="Folder with this edge's certificate and key.")
    insecure: bool = Field(default=False, description="Connect without TLS; only for loopback.")
    fingerprint: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="Refuse any other backbone; `tightbeam doctor` shows it.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Number format of the edge's blocks; auto is what the cloud's card says."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="Where the edge's blocks run; auto takes CUDA, then MPS, then CPU."
    )
    local_path: Path | None = Field(
        default=None,
        description="Checkpoint of the same fingerprint to take edge weights from; else a download.",
    )


class Codecs(Section):
    """Which codec carries each of the four tensors of a step; `auto` changes no bit (see docs/recipes.md)."""

    activations_up: CodecName = Field(default="auto", description="Bottom to trunk, forward.")
    activations_down: CodecName = Field(default="auto", description="Trunk to top, forward.")
    gradients_up: CodecName = Field(default="auto", description="Top to trunk, backward.")
    gradients_down: CodecName = Field(default="auto", description="Trunk to bottom, backward.")

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: object) -> object:
        """Accept one name for all four, `activations/gradients` or these two as keys for two each."""
        if isinstance(value, str) and "/" in value:
            activations, _, gradients = value.partition("/")
            value = {"activations": activations, "gradients": gradients}
        if isinstance(value, str):
            return dict.fromkeys(cls.model_fields, value)
        if not isinstance(value, Mapping):
            return value
        full = dict(value)
        for kind in ("activations", "gradients"):
            if kind in full:
                both = full.pop(kind)
                full = {f"{kind}_up": both, f"{kind}_down": both} | full
        return full


class AdapterSection(Section):
    """Which PEFT method is trained on the edge's blocks."""

    method: str = Field(default="lora", description="Name of a PEFT method, such as lora, ia3, loha, oft.")
    r: int | None = Field(default=None, ge=1, description="Rank; PEFT's default for the method if left out.")
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="Scale of the update (LoRA: update * alpha / r); PEFT's default if left out.",
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="Share of adapter inputs dropped in training, 0 to 1."
    )
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear",
        description="Layers that get an adapter: all-linear (never the output head) or ends of module names.",
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of the method's PEFT config, such as use_dora: true.",
    )


class DataSection(Section):
    """Which examples, and how a text becomes tokens and labels."""

    train: Path = Field(description="Training file, JSONL or CSV; relative to where the command runs.")
    eval: Path | None = Field(default=None, description="Evaluation file; see also eval_fraction.")
    format: Literal["auto", "messages", "prompt", "instruction", "text"] = Field(
        default="auto", description="Shape of a record; auto tells it by the keys of the first one."
    )
    max_length: int = Field(
        default=1024, ge=2, description="Longest example, tokens; longer ones are cut at the end."
    )
    answer_only: bool = Field(default=True, description="Learn the answer's tokens only, not the question's.")
    eval_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the training file held out for evaluation when eval is not given.",
    )
    shuffle_seed: int = Field(
        default=0, ge=0, description="Seed of the order of examples and of the held-out share."
    )

    @model_validator(mode="after")
    def _one_eval(self) -> Self:
        if self.eval is not None and self.eval_fraction > 0:
            raise ValueError("eval and eval_fraction exclude each other: give one of them")
        return self


class TrainSection(Section):
    """How the adapter is trained. Steps are optimizer steps unless a name says otherwise."""

    epochs: float | None = Field(
        default=None, gt=0, description="Passes over the training data; or give steps."
    )
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps in all; or give epochs.")
    batch_size: int = Field(
        default=4, ge=1, description="Examples per micro-batch: what crosses in one step."
    )
    gradient_accumulation: int = Field(default=1, ge=1, description="Micro-batches per optimizer step.")
    lr: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    warmup_steps: int = Field(default=0, ge=0, description="Optimizer steps from rate 0 to lr.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear",
        description="How the rate goes on after warm-up: to 0 at the last step, or constant.",
    )
    max_grad_norm: float = Field(default=1.0, ge=0, description="Longest gradient, L2 norm; 0 does not clip.")
    seed: int = Field(default=0, ge=0, description="Seed of adapter initialisation and dropout.")
    eval_every: int = Field(
        default=0, ge=0, description="Optimizer steps between evaluations; 0 is start and end only."
    )
    checkpoint_every: int = Field(
        default=50, ge=0, description="Optimizer steps between checkpoints; 0 is at the end only."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints to keep.")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of torch; its own choice if left out."
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default_factory=list, description="Trackers that get losses, speed, bytes, money and joules."
    )

    freeze_bottom_after: float | str | None = Field(
        default=None,
        description="When a ushape run freezes its bottom and goes on as top: epochs, `N steps`, or auto.",
    )
    max_mb: float | None = Field(
        default=None,
        gt=0,
        description="Most that the steps may move, 10^6 wire bytes; the run freezes or stops before it.",
    )

    noise: float = Field(
        default=0.0,
        ge=0,
        description="Gaussian noise on what a frozen trunk gave, in its own standard deviations; keeps a top "
        "from learning few texts by heart.",
    )

    @field_validator("freeze_bottom_after")
    @classmethod
    def _known_freeze(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, str) and not re.fullmatch(r"auto|[1-9]\d* steps?", value):
            raise ValueError("should be a number of epochs, `N steps`, or auto")
        if isinstance(value, float | int) and value <= 0:
            raise ValueError("should be more than 0 epochs; mode top trains no bottom at all")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps (null takes a key away)")
        return self


class CacheSection(Section):
    """Where activations that cross once are kept, sealed, for the epochs to come."""

    enabled: bool = Field(
        default=True, description="Keep them; else they cross in every epoch, though no bottom is trained."
    )
    dir: Path | None = Field(
        default=None, description="Folder, which runs may share one after another; the run's own if left out."
    )
    max_gb: float = Field(
        default=20.0,
        gt=0,
        description="Most disk space, 10^9 bytes; what does not fit crosses in every epoch.",
    )


class SideSection(Section):
    """The side network of mode `side`."""

    taps: int = Field(
        default=8, ge=0, description="Inner hidden states that the ladder reads; 0 builds no ladder."
    )
    width: int = Field(default=192, ge=1, description="Width of the ladder; a multiple of twice its heads.")
    heads: int = Field(default=4, ge=1, description="Attention heads of the ladder.")
    adapt_bottom: bool = Field(
        default=True,
        description="Give the bottom blocks the adapter too; its change goes around the trunk.",
    )


class OutputSection(Section):
    """Where the run's files go: `<dir>/<name>/`."""

    dir: Path = Field(default=Path("runs"), description="Folder of runs.")
    name: str = Field(
        description="Name of this run: letters, digits, dot, dash, underscore.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    report: bool = Field(default=True, description="Write report.html at the end.")


class Recipe(Section):
    """One training run, complete and checked."""

    model: ModelSection
    cut: CutText = Field(description="k:m, the first k and the last m blocks stay at the edge.")
    mode: ModeName = Field(default="ushape", description="How training uses the trunk: see docs/modes.md.")
    codec: Codecs = Field(default_factory=Codecs, description="How tensors become bytes.")
    adapter: AdapterSection = Field(default_factory=AdapterSection, description="What is trained.")
    data: DataSection
    train: TrainSection
    cache: CacheSection = Field(default_factory=CacheSection, description="Activations kept at the edge.")
    side: SideSection = Field(default_factory=SideSection, description="The side network of mode side.")
    output: OutputSection

    @model_validator(mode="after")
    def _freezable(self) -> Self:
        if self.train.freeze_bottom_after is not None and not MODES[self.mode].freezes_as:
            names = " and ".join(spec.name for spec in MODES.values() if spec.freezes_as)
            raise ValueError(f"train.freeze_bottom_after is for mode {names}, not {self.mode}")
        frozen_bottom = spec_of(self).frozen_bottom
        if frozen_bottom and self.cut.endswith(":0"):
            raise ValueError(f"a frozen bottom leaves the top blocks to train, and cut {self.cut} has none")
        if self.train.noise and not frozen_bottom:
            raise ValueError("train.noise is for mode top, and for ushape with train.freeze_bottom_after")
        return self

    @field_validator("codec", mode="before")
    @classmethod
    def _known_codec_shape(cls, value: object) -> object:
        if not isinstance(value, str | Mapping | Codecs):
            raise ValueError("should be one codec name, or names for activations and gradients")
        return value

    @property
    def run_folder(self) -> Path:
        """`<output.dir>/<output.name>`."""
        return self.output.dir / self.output.name

    def resolved(self) -> dict[str, Any]:
        """Plain data of the whole recipe, defaults included; paths with forward slashes on every system."""
        plain: dict[str, Any] = _plain(self.model_dump())
        return plain

    def resolved_yaml(self) -> str:
        """YAML that `load_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """Hex digest over the whole resolved recipe."""
        return _digest(self.resolved())

    def numbers(self) -> dict[str, Any]:
        """Give the part that decides the trained weights: no addresses, paths or checkpoint intervals."""
        plain = self.resolved()
        for key in ("cloud", "identity", "insecure", "local_path"):
            del plain["model"][key]
        for key in ("train", "eval"):  # data are known by their content
            del plain["data"][key]
        for key in ("eval_every", "checkpoint_every", "keep_checkpoints", "threads", "report_to"):
            del plain["train"][key]
        if self.train.freeze_bottom_after is None:
            del plain["train"]["max_mb"]  # then it says when a run stops, not what it learns
        for key in ("dir", "max_gb"):
            del plain["cache"][key]
        del plain["output"]
        return plain

    def numbers_sha256(self) -> str:
        """Hex digest over `numbers()`: a run may be resumed when this agrees."""
        return _digest(self.numbers())


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides such as `train.lr=1e-4`.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or a key or value is wrong; the message names the
            dotted key and the line, or the `--set` that brought it.

    """
    mapping, lines = read_mapping(path, "recipe", "recipes/")
    return recipe_from_mapping(mapping, overrides=overrides, origin=str(path), lines=lines)


def recipe_from_mapping(
    mapping: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    origin: str = "recipe",
    lines: Mapping[str, int] | None = None,
) -> Recipe:
    """Check plain data as a recipe; `lines` says at which line of `origin` a dotted key stands."""
    return checked_section(Recipe, mapping, overrides=overrides, origin=origin, lines=lines, cure=_CURE)


_CURE = "docs/recipes.md lists every key."


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
