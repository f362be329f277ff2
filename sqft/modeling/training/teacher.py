"""A teacher's predictions at the labels of examples: made once before training, kept in files, given to each batch."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.checkpoints.model_spec import ModelSpec
from sqft.data.collators import Collator
from sqft.data.encoding import IGNORED, Example
from sqft.errors import StageError
from sqft.kernels.finite import all_finite
from sqft.modeling.loading import load_model
from sqft.modeling.training.checkpoints import is_complete, seal
from sqft.modeling.training.loss import CompletionLoss, Prediction, predict
from sqft.modeling.training.trainer import Collate
from sqft.utils.distributed import Processes
from sqft.utils.files import write_json
from sqft.utils.progress import Track
from sqft.utils.resources import free_what_is_unused
from sqft.utils.text import human_size

log = logging.getLogger("sqft")
SHAPE = "shape.json"


class Predictions:
    """A teacher's predictions, in files of a folder that are mapped into memory.

    Args:
        places: where the labels of each example are among all labels.
        folder: holds the files, which are made if they are not there.
    """

    def __init__(self, places: Mapping[Example, slice], folder: Path) -> None:
        self.places = places
        shape = json.loads((folder / SHAPE).read_text())
        labels, outcomes, tokens = shape["labels"], shape["outcomes"], shape["tokens"]
        self.probabilities = _mapped(folder / "probabilities", (labels, outcomes), torch.float32)
        self.tokens = _mapped(folder / "tokens", (labels, tokens), torch.int32) if tokens else None

    def write(self, start: int, prediction: Prediction) -> int:
        """Keep the prediction of the labels from number `start` on; return the number of the label after them.

        Raises:
            StageError: when it is not finite.
        """
        if not all_finite(prediction.probabilities):
            raise StageError("finetune.teacher: its logits are not finite; use float32")
        stop = start + len(prediction.probabilities)
        self.probabilities[start:stop] = prediction.probabilities
        if self.tokens is not None and prediction.tokens is not None:
            self.tokens[start:stop] = prediction.tokens
        return stop

    def of(self, examples: Iterable[Example]) -> dict[str, Tensor]:
        """Return the predictions at the labels of some examples, one after the other, as `CompletionLoss` takes them.

        Raises:
            StageError: for an example that the teacher has not read.
        """
        try:
            places = [self.places[example] for example in examples]
        except KeyError:
            raise StageError("finetune.teacher: training draws an example that the teacher has not read") from None
        found = {"probabilities": self.probabilities, "tokens": self.tokens}
        return {name: torch.cat([kept[p] for p in places]) for name, kept in found.items() if kept is not None}


def _mapped(file: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(file), shared=True, size=shape[0] * shape[1], dtype=dtype).view(shape)


class TaughtCollator:
    """Collates rows of examples, or of packed examples, and adds the teacher's predictions at their labels."""

    def __init__(self, collate: Collate, predictions: Predictions) -> None:
        self.collate, self.predictions = collate, predictions

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        examples = [one for row in rows for one in ([row] if isinstance(row, Example) else row)]
        return self.collate(rows) | self.predictions.of(examples)


@dataclass(frozen=True)
class Teacher:
    """A model to make predictions with.

    Args:
        spec: how it is loaded.
        temperature: its logits are divided by it.
        top_k: how many tokens are kept of each prediction; None keeps all.
        vocabulary: tokens that the student knows.
        batch_size: examples that it reads at once.
        chunk: labels whose logits are computed at once; None computes those of a batch.
        precision: name of a torch dtype, of the computation.
        device: where it runs.
    """

    spec: ModelSpec
    temperature: float
    top_k: int | None
    vocabulary: int
    batch_size: int
    chunk: int | None
    precision: str
    device: str

    def predictions(self, examples: Iterable[Example], folder: Path, processes: Processes, track: Track) -> Predictions:
        """Return the teacher's predictions at the labels of all examples; equal examples are read once.

        They are made unless the folder has them from an earlier attempt, and the teacher is freed before this returns.

        Args:
            examples: token sequences with labels.
            folder: for the files; all processes see it.
            processes: each reads a part of the examples.
            track: the progress display.

        Raises:
            ModelError: when the teacher cannot be loaded.
            StageError: when the disk has no room, or the logits are not the teacher's head's where there are chunks.
        """
        # The longest first: what does not fit into memory shows at once.
        ordered = sorted(dict.fromkeys(examples), key=lambda example: -len(example.input_ids))
        places, start = {}, 0
        for example in ordered:
            stop = start + sum(label != IGNORED for label in example.labels[1:])
            places[example], start = slice(start, stop), stop
        if processes.share("kept" if processes.is_main and is_complete(folder) else ""):
            log.info("the teacher's predictions are those of an earlier attempt")
        else:
            self._make(places, folder, processes, track)
            free_what_is_unused()
        return Predictions(places, folder)

    def _make(self, places: Mapping[Example, slice], folder: Path, processes: Processes, track: Track) -> None:
        """Load the teacher, let it predict every label, and seal the folder; see `predictions`."""
        model, tokenizer = load_model(self.spec)
        known = min(self.vocabulary, len(model.get_input_embeddings().weight))
        loss = CompletionLoss(model.to(self.device), self.chunk)
        ordered = list(places)
        if self.chunk:
            loss.check_head(torch.tensor([ordered[0].input_ids[:64]], device=model.device))
        if processes.is_main:
            _prepare(folder, places[ordered[-1]].stop, known, self.top_k)
        collate, dtype = Collator(tokenizer.pad_token_id), getattr(torch, self.precision)
        starts = range(processes.rank * self.batch_size, len(ordered), processes.count * self.batch_size)
        with processes.process_group(self.device):
            processes.barrier()
            kept = Predictions(places, folder)
            for first in track(starts, "the teacher reads", len(starts)):
                examples = ordered[first : first + self.batch_size]
                batch = {name: tensor.to(self.device) for name, tensor in collate(examples).items()}
                at = places[examples[0]].start
                with torch.autocast(torch.device(self.device).type, dtype, enabled=dtype != torch.float32):
                    for logits in loss.logits(**batch):
                        at = kept.write(at, predict(logits[:, :known], self.temperature, self.top_k))
            processes.barrier()
            if processes.is_main:
                seal(folder)


def _prepare(folder: Path, labels: int, known: int, top_k: int | None) -> None:
    """Make the files for the predictions of some labels, with all the room that they take, and no content as yet.

    Args:
        folder: is made anew.
        labels: their number.
        known: tokens that are predicted.
        top_k: how many of them are kept; None keeps all.

    Raises:
        StageError: when the disk has no room for them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokens = 0 if top_k is None or top_k >= known else top_k
    outcomes = tokens + 1 if tokens else known
    try:
        for name, columns in (("probabilities", outcomes), ("tokens", tokens)):
            if columns:
                with (folder / name).open("wb") as file:
                    # A mapped file that only finds out while it is written that the disk is full ends the process.
                    size = 4 * labels * columns
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    else:  # macOS
                        file.truncate(size)
    except OSError as error:
        shutil.rmtree(folder)
        raise StageError(
            f"finetune.teacher: predictions at {labels:,} labels need {human_size(4 * labels * (outcomes + tokens))} "
            f"in {folder}: {error.strerror}; lower finetune.teacher.top_k, or make room"
        ) from None
    write_json(folder / SHAPE, {"labels": labels, "outcomes": outcomes, "tokens": tokens})


def check_same_tokens(student: Any, teacher: Any, path: Path) -> None:
    """Check that every token of the student's tokenizer has the same id in that of the teacher, which is at `path`.

    Raises:
        StageError: naming a token that has another id, or none.
    """
    ids, known = student.get_vocab(), teacher.get_vocab()
    differing = [token for token, index in sorted(ids.items(), key=lambda item: item[1]) if known.get(token) != index]
    if differing:
        token = differing[0]
        there = f"has it as {known[token]}" if token in known else "does not have it"
        raise StageError(
            f"finetune.teacher: token {ids[token]} of the model is {token!r}, and {path} {there} "
            f"({len(differing):,} of {len(ids):,} tokens differ); a teacher must have the model's own vocabulary: "
            'name one of the same family, or "dense"'
        )
