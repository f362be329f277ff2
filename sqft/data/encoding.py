"""Records become token sequences with labels: {prompt, completion}, {messages} or {text}."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from sqft.data.chat_tokens import chat_of, tokens_of, turn_tokens
from sqft.data.chats import OPENED, UNWRITTEN, Chat, last_answer, learnt
from sqft.data.records import locate_errors
from sqft.errors import DataError

IGNORED = -100
"""The label of a token that does not contribute to the loss."""

LossOn = Literal["completion", "all"]
"""Which tokens contribute to the loss; of a {text} record, always all."""

Truncation = Literal["left", "right", "drop"]
"""Where an example that is too long is cut, or that it is left out."""


class Prompt(NamedTuple):
    """The tokens that generation starts from, the text that is compared with what it adds, and the token that ends that
    (None: the tokenizer's end of sequence).

    What is generated up to `marker` is reasoning. Where `reasons`, generation starts inside a block of it.
    """

    ids: list[int]
    completion: str
    end: int | None = None
    marker: str = ""
    reasons: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and their labels: a label is the token itself, or `IGNORED`.

    `answers` of it are learnt; `ends` are the tokens that end them, where they are learnt too; `cut` tokens were left
    out, and with them the beginnings of `lost` answers.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    answers: int = 0
    ends: tuple[int, ...] = ()
    cut: int = 0
    lost: int = 0


class _Answer(NamedTuple):
    """Where an answer lies in a sequence, and whether its last token ends it."""

    begin: int
    end: int
    ended: bool


class _Sequence(NamedTuple):
    """Token ids, their labels, and the answers among them, before anything is cut."""

    ids: list[int]
    labels: list[int]
    answers: list[_Answer]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A data set as examples; `sizes` says how many each record gave, in their order. `rewritten` records gave several
    since the chat template writes a turn in another way once more turns follow; of `unwritten` turns it writes nothing,
    so they are not learnt. `dropped` examples were too long, and are left out."""

    examples: list[Example]
    sizes: list[int]
    rewritten: int
    unwritten: int = 0
    dropped: int = 0

    @property
    def records(self) -> int:
        return len(self.sizes)

    @property
    def truncated(self) -> int:
        """How many examples were cut."""
        return sum(example.cut > 0 for example in self.examples)

    @property
    def tokens_cut(self) -> int:
        return sum(example.cut for example in self.examples)

    @property
    def answers(self) -> int:
        """How many completions and assistant's turns are learnt."""
        return sum(example.answers for example in self.examples)

    @property
    def ends(self) -> Counter[int]:
        """The tokens that end answers and are learnt, and how many answers each ends."""
        return Counter(end for example in self.examples for end in example.ends)

    def note(self) -> str | None:
        """Return what became of conversations, and of all of it, where that may surprise."""
        said = []
        if not self.examples and self.dropped:
            said.append(f"nothing of it is learnt: all {self.dropped} examples are too long, and left out")
        if self.rewritten:
            said.append(
                f"{self.rewritten} of {self.records} conversations are one example for each assistant turn: the chat "
                "template rewrites earlier turns, or the tokenizer joins the prompt's end with the answer"
            )
        if lost := sum(example.lost for example in self.examples):
            said.append(f"{lost} answers were cut away, from examples longer than max_length")
        if self.unwritten:
            said.append(f"turns of the assistant that are not learnt: {self.unwritten}, each since {UNWRITTEN}")
        return "; ".join(said) or None

    def warning(self) -> str | None:
        """Return how many examples do not teach to stop; None when all do."""
        endless = sum(example.answers > 0 and not example.ends for example in self.examples)
        if not endless:
            return None
        return (
            f"{endless} of {len(self.examples)} examples hold no end of turn to learn, so that the model will not "
            "learn to stop: the answer was cut to max_length, or no special token ends it"
        )


@dataclass(frozen=True)
class Tokenization:
    """How records become examples: the tokenizer, the length of the longest example, which tokens carry loss, and what
    becomes of a longer example."""

    tokenizer: Any
    max_length: int
    loss_on: LossOn
    truncation: Truncation = "left"

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer's chat template."""
        return chat_of(self.tokenizer)

    def encode(self, records: Sequence[dict[str, Any]]) -> Encoded:
        """Encode every record.

        Raises:
            DataError: naming a record that has no token to learn from, or that the chat template rejects; or when
                every example is left out.
        """
        encoded = self.encode_part(records)
        self.check_some_left(encoded)
        return encoded

    def check_some_left(self, encoded: Encoded) -> None:
        """Check that not every example is left out.

        Raises:
            DataError: saying what to change.
        """
        if encoded.dropped and not encoded.examples:
            other = "" if self.truncation == "left" else ', or set finetune.truncation to "left"'
            raise DataError(
                f"all {encoded.dropped} examples are longer than max_length ({self.max_length} tokens), and truncation "
                f'"{self.truncation}" leaves nothing of them to learn; raise finetune.max_length{other}'
            )

    def encode_part(self, records: Sequence[dict[str, Any]]) -> Encoded:
        """Encode records that are not all there is to learn: every example may be left out.

        Raises:
            DataError: naming a record that has no token to learn from, or that the chat template rejects.
        """
        examples: list[Example] = []
        sizes: list[int] = []
        rewritten = unwritten = dropped = 0
        for number, record in enumerate(records, 1):
            with locate_errors(record, number):
                sequences = self._sequences(record)
                if not any(label != IGNORED for sequence in sequences for label in sequence.labels[1:]):
                    raise DataError("there is no token to learn from (is the completion empty?)")
            kept = self._fit_all(sequences)
            examples += kept
            sizes.append(len(kept))
            dropped += len(sequences) - len(kept)
            if "messages" in record:
                rewritten += len(sequences) > 1
                if self.loss_on == "completion":
                    unwritten += len(learnt(record)) - sum(len(sequence.answers) for sequence in sequences)
        return Encoded(examples, sizes, rewritten, unwritten, dropped)

    def encode_record(self, record: dict[str, Any]) -> list[Example]:
        """Encode one record.

        A {text} record is split into as many examples as it takes: only the last one ends in an end-of-sequence
        token, and nothing is cut. A {prompt, completion} record is one example. Its parts are tokenized separately, so
        that the prompt of evaluation is the prefix of the training example. A conversation is one example as long as
        the chat template writes each turn's history as inference sees it, else a new example begins with that turn.

        A longer example is cut as `truncation` says, or left out; so is one of which the cut leaves nothing to learn.
        Cut at the left, where only completions carry loss, a last completion that is longer than `max_length` keeps
        its beginning, and the token that predicts it.

        Raises:
            DataError: when the chat template rejects the conversation, or a finished turn does not fit its prompt.
        """
        return self._fit_all(self._sequences(record))

    def _sequences(self, record: dict[str, Any]) -> list[_Sequence]:
        """Return a record as token sequences, of which those of a {text} record alone are no longer than allowed."""
        if "messages" in record:
            return [self._whole(record)] if self.loss_on == "all" else self._turns(record)
        if "prompt" in record:
            return [self._completion(record)]
        ids = _with_end(_tokenize_start(record["text"], self.tokenizer), self.tokenizer)
        pieces = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        if len(pieces) > 1 and len(pieces[-1]) == 1:  # no token before it predicts it
            pieces.pop()
        return [_Sequence(piece, piece, []) for piece in pieces]

    def _completion(self, record: dict[str, Any]) -> _Sequence:
        prompt = _tokenize_prompt(record["prompt"], self.tokenizer)
        completion = self.tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
        # An empty completion stays empty: an end-of-sequence token alone would teach to answer nothing.
        completion = _with_end(completion, self.tokenizer) if completion else []
        ids = prompt + completion
        labels = ids if self.loss_on == "all" else [IGNORED] * len(prompt) + completion
        ended = bool(completion) and completion[-1] == self.tokenizer.eos_token_id
        return _Sequence(ids, labels, [_Answer(len(prompt), len(ids), ended)] if completion else [])

    def _turns(self, record: dict[str, Any]) -> list[_Sequence]:
        """Return the turns of a conversation that are learnt, those with the same history in one sequence."""
        done: list[_Sequence] = []
        for turn in self.chat.turns(record):
            prompt, answer, learnt = turn_tokens(self.tokenizer, record, turn)
            labels = [token if learns else IGNORED for token, learns in zip(answer, learnt, strict=True)]
            if not done or prompt[: len(done[-1].ids)] != done[-1].ids:
                done.append(_Sequence([], [], []))
            last = done[-1]
            between = [IGNORED] * (len(prompt) - len(last.ids))
            written = [_Answer(len(prompt), len(prompt) + len(answer), turn.end is not None)] if answer else []
            done[-1] = _Sequence(prompt + answer, [*last.labels, *between, *labels], last.answers + written)
        return done

    def _whole(self, record: dict[str, Any]) -> _Sequence:
        """Return a whole conversation, all of which is learnt but the turns that are switched off."""
        text, skipped = self.chat.whole(record)
        ids = tokens_of(self.tokenizer, text)
        labels = list(ids)
        for turn in skipped:
            begin, end = (len(tokens_of(self.tokenizer, part)) for part in (turn.prompt, turn.text))
            labels[begin:end] = [IGNORED] * (end - begin)
        return _Sequence(ids, labels, [_Answer(0, len(ids), bool(self.chat.ends_of(text)))])

    def _fit_all(self, sequences: Sequence[_Sequence]) -> list[Example]:
        """Return sequences as examples, without those that are left out."""
        return [example for sequence in sequences if (example := self._fit(sequence)) is not None]

    def _fit(self, sequence: _Sequence) -> Example | None:
        """Return a sequence as an example of at most `max_length` tokens; None when it is too long and left out."""
        ids, labels, answers = sequence
        cut = max(0, len(ids) - self.max_length)
        start = _left_cut(labels, cut) if self.truncation == "left" else 0
        stop = start + self.max_length
        learns = any(label != IGNORED for label in labels[start + 1 : stop])
        if cut and (self.truncation == "drop" or not learns):
            return None
        first = start + 1 if self.loss_on == "completion" else 0
        kept = [a for a in answers if first <= a.begin < stop and a.end > start + 1]
        ends = tuple(ids[answer.end - 1] for answer in kept if answer.ended and answer.end <= stop)
        lost = len(answers) - len(kept)
        return Example(tuple(ids[start:stop]), tuple(labels[start:stop]), len(kept), ends, cut, lost)


def _left_cut(labels: Sequence[int], cut: int) -> int:
    """Return how many tokens to cut at the left, of `cut` that are too many: fewer where a last answer that is longer
    than all that may stay would lose its beginning, or the token that predicts it."""
    begins = [i for i in range(1, len(labels)) if labels[i] != IGNORED and labels[i - 1] == IGNORED]
    return min(cut, begins[-1] - 1) if begins else cut


def encode_prompts(records: Sequence[dict[str, Any]], tokenizer: Any) -> list[Prompt]:
    """Encode the prompt of every record, as `encode_prompt` does.

    Raises:
        DataError: naming a record that has no prompt or no completion.
    """
    prompts, chat = [], chat_of(tokenizer)
    for number, record in enumerate(records, 1):
        with locate_errors(record, number):
            prompts.append(encode_prompt(record, tokenizer, chat))
    return prompts


def encode_prompt(record: dict[str, Any], tokenizer: Any, chat: Chat | None = None) -> Prompt:
    """Return the tokens that generation starts from, at least one, and the completion to compare with.

    Of a conversation that is its last assistant turn, as the chat template writes it, without special tokens.

    Raises:
        DataError: for a {text} record, which has no completion, or a conversation without a prompt.
    """
    if "messages" in record:
        return _encode_last_turn(record, tokenizer, chat or chat_of(tokenizer))
    if "prompt" not in record:
        raise DataError("a {text} record has no completion to compare with; use {prompt, completion} or {messages}")
    ids = _tokenize_prompt(record["prompt"], tokenizer)
    return Prompt(ids, record["completion"].removesuffix(tokenizer.eos_token or ""))


def _encode_last_turn(record: dict[str, Any], tokenizer: Any, chat: Chat) -> Prompt:
    index = last_answer(record)
    ids = tokens_of(tokenizer, chat.prompt(record, index))
    try:
        turn = chat.turn(record, index)
    except DataError:  # it could not be trained on, but it can be asked
        return Prompt(ids, record["messages"][index].get("content") or "")
    marker = chat.marker(record, index, turn)
    answer = tokens_of(tokenizer, turn.answer.rpartition(marker)[2] if marker else turn.answer)
    text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    end = tokenizer.convert_tokens_to_ids(turn.end) if turn.end else None
    return Prompt(ids, text, end, marker, bool(OPENED.search(turn.prompt)))


def truncate_prompts(prompts: Sequence[Prompt], window: int, max_new_tokens: int) -> tuple[list[Prompt], int]:
    """Cut prompts at the left, as in training, so that `max_new_tokens` more fit into a window of `window` tokens.

    Returns the prompts and how many of them were cut.

    Raises:
        DataError: when `max_new_tokens` leaves no room for any prompt.
    """
    if (room := window - max_new_tokens) < 1:
        raise DataError(
            f"max_new_tokens {max_new_tokens} leaves no room for a prompt: the model's window is {window} tokens; "
            "lower max_new_tokens"
        )
    cut = sum(len(prompt.ids) > room for prompt in prompts)
    return [prompt._replace(ids=prompt.ids[-room:]) for prompt in prompts], cut


def _tokenize_start(text: str, tokenizer: Any) -> list[int]:
    """Tokenize a text with the tokenizer's own special tokens, without an end-of-sequence token that it appends."""
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    return ids[:-1] if ids and added[-1] and ids[-1] == tokenizer.eos_token_id else ids


def _tokenize_prompt(text: str, tokenizer: Any) -> list[int]:
    """Tokenize a prompt; an empty one becomes the token that begins a sequence."""
    if ids := _tokenize_start(text, tokenizer):
        return ids
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise DataError("the prompt is empty, and the tokenizer has no token to start from; give a prompt")
    return [start]


def _with_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Append the end-of-sequence token, unless the text itself ends in one or the tokenizer has none."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
