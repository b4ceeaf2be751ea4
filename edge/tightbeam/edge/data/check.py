"""What `tightbeam data check` shows: a file's counts, and its first examples with what is learned of them."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tightbeam.edge.data.examples import IGNORED, Dataset, Example, load_dataset
from tightbeam.edge.data.limits import Limits

__all__ = ["DataCheck", "check_file"]


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What `tightbeam data check` shows of a file."""

    dataset: Dataset
    token_lengths: list[int]  # per example, ascending
    num_learned_tokens: int
    samples: list[list[tuple[str, bool]]]  # runs of text of the first examples, and whether they are learned

    def render(self) -> str:
        """Plain text; what is learned stands in `[[ ]]`."""
        lengths, data = self.token_lengths, self.dataset
        shortest, median, longest = lengths[0], lengths[len(lengths) // 2], lengths[-1]
        share = self.num_learned_tokens / sum(lengths)
        lines = [
            f"{data.path}: {len(lengths)} examples, read as {data.record_format}",
            f"tokens per example: shortest {shortest}, median {median}, longest {longest}",
            f"tokens in all: {sum(lengths)}, of which {self.num_learned_tokens} are learned ({share:.0%})",
            *data.warnings(),
        ]
        for example, sample in zip(data.examples, self.samples, strict=False):
            text = "".join(f"[[{run}]]" if learned else run for run, learned in sample)
            lines += ["", f"line {example.line}, learned text in [[ ]]:", text]
        return "\n".join(lines)


def check_file(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    n: int = 2,
    *,
    limits: Limits | None = None,
    record_format: str = "auto",
    max_length: int = 1024,
    answer_only: bool = True,
) -> DataCheck:
    """Tokenise a file as training would and show its first `n` examples with their label mask.

    Raises `DataError` as training does, also for what is over the `limits`.
    """
    dataset = load_dataset(
        path, tokenizer, record_format=record_format, max_length=max_length, answer_only=answer_only
    )
    if limits is not None:
        limits.check(dataset.path, dataset.examples)
    return DataCheck(
        dataset=dataset,
        token_lengths=sorted(len(example.input_ids) for example in dataset.examples),
        num_learned_tokens=sum(example.num_learned for example in dataset.examples),
        samples=[_runs(example, tokenizer) for example in dataset.examples[:n]],
    )


def _runs(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        learned = label != IGNORED
        if not runs or runs[-1][1] != learned:
            runs.append(([], learned))
        runs[-1][0].append(token)
    return [(str(tokenizer.decode(tokens)), learned) for tokens, learned in runs]
