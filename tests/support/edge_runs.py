"""Small complete training runs: a byte tokenizer, a random Llama, data files, and a `load` for them.

Run as a script it trains one recipe, slowly enough to be killed in the middle.
"""

import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tightbeam.common.accounts.rows import StepBytes, StepRow
from tightbeam.edge.recipe import Recipe, load_recipe, recipe_from_mapping
from tightbeam.edge.training.recipe_run import LoadedModel, TrainResult, train_recipe

__all__ = [
    "CHATML",
    "Steps",
    "byte_tokenizer",
    "quiet",
    "tiny_llama",
    "tiny_loader",
    "tiny_recipe",
    "train_tiny",
    "write_jsonl",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, and five special ones: small, lossless, made on the spot."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocab = {
        token: number for number, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random Llama of four blocks for the byte tokenizer."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 261,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return LlamaForCausalLM(LlamaConfig(**(shape | changes)))


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    """A run of 20 optimizer steps over 23 short examples; `changes` are sections merged over it."""
    data = write_jsonl(
        folder / "train.jsonl",
        [{"prompt": f"{n} + 1 =", "completion": f"{n + 1}" + "!" * (n % 5)} for n in range(23)],
    )
    base: dict[str, Any] = {
        "model": {"cloud": "localhost:50051"},
        "cut": "1:1",
        "adapter": {"r": 2, "alpha": 4, "dropout": 0.1},
        "data": {"train": str(data)},
        "train": {"steps": 20, "batch_size": 3, "lr": 1e-2, "checkpoint_every": 5, "threads": 1},
        "output": {"dir": str(folder / "runs"), "name": "run"},
    }
    for name, section in changes.items():
        base[name] = {**base[name], **section} if isinstance(section, dict) and name in base else section
    return recipe_from_mapping(base)


class Steps:
    """Stands where the wire's meter does: reports two rows a step, and lets a test act then."""

    def __init__(self, act: Callable[[int], None] = lambda step: None) -> None:
        self.num_drained = 0
        self._act = act

    def drain(self) -> Sequence[StepRow]:
        """Rows of one step; `act` hears how many steps there were."""
        self.num_drained += 1
        self._act(self.num_drained)
        moved = StepBytes(payload_up_bytes=90, payload_down_bytes=80, wire_up_bytes=100, wire_down_bytes=88)
        return [
            StepRow(
                run="run",
                step=self.num_drained,
                kind=kind,
                tokens=7,
                segments=1,
                bytes=moved,
                cloud_flops=1000,
            )
            for kind in ("forward", "backward")
        ]


def tiny_loader(
    steps: Steps | None = None, model: PreTrainedModel | None = None, closed: list[bool] | None = None
) -> Callable[[Recipe], LoadedModel]:
    """A `load` for `train_recipe` that needs no network."""

    def load(recipe: Recipe) -> LoadedModel:
        return LoadedModel(
            model=model or tiny_llama(),
            tokenizer=byte_tokenizer(),
            close=lambda: closed.append(True) if closed is not None else None,
            steps=steps,
            name="tiny-llama",
            fingerprint="ab" * 32,
        )

    return load


def quiet() -> tuple[Console, io.StringIO]:
    """A console that is no terminal, and what it printed."""
    text = io.StringIO()
    return Console(file=text, force_terminal=False, width=200), text


def train_tiny(
    recipe: Recipe, act: Callable[[int], None] = lambda step: None, *, resume: bool = False
) -> TrainResult:
    """Train without a word."""
    return train_recipe(recipe, load=tiny_loader(Steps(act)), resume=resume, console=quiet()[0])


if __name__ == "__main__":
    train_tiny(load_recipe(sys.argv[1]), lambda step: time.sleep(0.05))
