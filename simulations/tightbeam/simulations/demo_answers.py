"""A split model that answers: one greedy answer, or the loss on a file, with an adapter of choice."""

import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tightbeam.edge import connect
from tightbeam.edge.data import IGNORED, collate, load_dataset

__all__ = ["AnswerModel"]

_ANSWER_TOKENS = 16
_BATCH = 8


class AnswerModel:
    """A connected split model, bottom and top in this process. Context manager.

    The model is typed Any: transformers gives models their `generate` at run time only.
    """

    def __init__(self, address: str, identity: Path, model: str, cut: str) -> None:
        local = Path(model) if Path(model).is_dir() else None
        self._cloud = connect(address, identity=identity)
        try:
            self._model: Any = self._cloud.load_model(cut, local_path=local)
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
        except BaseException:
            self._cloud.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cloud.close()

    def wear(self, adapter: Path, name: str) -> None:
        """Use this adapter (a folder in PEFT's format) from now on."""
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 for a property under its former name.
            warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(str(adapter), name)
                self._model.set_adapter(name)
            else:
                self._model = PeftModel.from_pretrained(self._model, str(adapter), name)
        self._model.eval()

    @torch.no_grad()
    def answer(self, question: str) -> str:
        """Return the greedy answer in one line, cut at a few words."""
        inputs = self._tokenizer(self._prompt(question), return_tensors="pt", add_special_tokens=False)
        inputs = inputs.to(self._model.device)
        output = self._model.generate(
            **inputs, max_new_tokens=_ANSWER_TOKENS, do_sample=False, use_cache=False
        )
        tokens = output[0][inputs["input_ids"].shape[1] :]
        return " ".join(str(self._tokenizer.decode(tokens, skip_special_tokens=True)).split())

    def _prompt(self, question: str) -> str:
        if self._tokenizer.chat_template is None:
            return f"{question}\n"
        turns = [{"role": "user", "content": question}]
        return str(self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    @torch.no_grad()
    def loss(self, file: Path) -> float:
        """Mean loss over the learned tokens of a file, nats: what training reports as evaluation."""
        examples = load_dataset(file, self._tokenizer).examples
        pad = self._tokenizer.pad_token_id
        total, learned = 0.0, 0
        for start in range(0, len(examples), _BATCH):
            batch = collate(examples[start : start + _BATCH], pad if isinstance(pad, int) else 0)
            batch = {name: tensor.to(self._model.device) for name, tensor in batch.items()}
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(self._model(**batch, use_cache=False).loss) * count
            learned += count
        return total / learned
