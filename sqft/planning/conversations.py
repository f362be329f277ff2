"""Try a recipe's conversations in the model's chat template, before any work begins. No torch, no tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from sqft.checkpoints.chat_template import StoredTemplate
from sqft.data.chat_template import ChatTemplate
from sqft.data.chats import NO_TEMPLATE, last_answer, learnt
from sqft.data.records import Record
from sqft.errors import DataError

Use = Literal["completion", "all", "asked"]
"""What a data set is for: training on completions or on everything, or asking for the last answer."""

TRIED = 20
"""Conversations of a data set that are tried whatever their form; after them, one of each form."""


class ConversationCheck:
    """Tries conversations in a model's chat template.

    Args:
        stored: the template as its files have it.
    """

    def __init__(self, stored: StoredTemplate) -> None:
        self.template = ChatTemplate(stored.sources, stored.tokens, stored.specials)
        self.chat = self.template.chat()

    def notes(self, records: Sequence[Record], use: Use) -> Iterator[str]:
        """Yield what a user should know of the conversations among some records.

        Raises:
            DataError: naming a record that the template rejects, or an argument that it does not read.
        """
        chats = [record for record in records if "messages" in record]
        if chats and not self.template.sources:
            raise DataError(f"{chats[0].location}: {NO_TEMPLATE}")
        rewrites = endless = closes = hides = False
        for record in _of_each_form(chats):
            try:
                self.check_arguments(record.get("chat_template_kwargs", {}))
                if use == "asked":
                    self.chat.prompt(record, last_answer(record))
                elif use == "all":
                    self.chat.whole(record)
                else:
                    before, turns = "", list(self.chat.turns(record))
                    hides |= len(turns) < len(learnt(record))
                    for turn in turns:
                        rewrites |= not turn.prompt.startswith(before)
                        endless |= turn.end is None
                        closes |= turn.closes > 0
                        before = turn.text
            except DataError as error:
                raise DataError(f"{record.location}: {error}") from None
        if any("tools" in record for record in chats) and not self.template.reads_tools():
            yield "the chat template does not read tools, so the model does not see them"
        if self.template.writes_the_date():
            yield (
                "the chat template writes today's date, so what is learnt and asked depends on the day; artifacts of "
                "another day are reused"
            )
        if hides:
            yield (
                "the chat template writes nothing of some of the assistant's turns (tool calls or reasoning that it "
                "does not know), so they are not learnt"
            )
        if rewrites:
            yield "one example for each assistant turn: the chat template rewrites earlier turns"
        if closes:
            yield "the generation prompt opens a block of reasoning, and what is learnt closes it"
        if endless:
            yield "the chat template ends an assistant turn with no special token, so the model will not learn to stop"

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Check that the template reads every argument that it is given.

        Raises:
            DataError: naming one that it does not read.
        """
        known = self.template.variables()
        if known is not None and (strange := sorted(arguments.keys() - set(known))):
            has = f"it reads {', '.join(known)}" if known else "it reads none"
            raise DataError(f"the chat template has no argument '{strange[0]}'; {has}")


def _of_each_form(records: Sequence[Record]) -> Iterator[Record]:
    """Yield the first records, and of the others one for each form that a template may treat in its own way.

    A form is how a conversation begins and ends, which messages follow one another, and what stands beside them.
    """
    seen = set()
    for number, record in enumerate(records):
        kinds = [
            (message["role"], *sorted(message), "</think>" in str(message.get("content")))
            for message in record["messages"]
        ]
        beside = "tools" in record, bool(learnt(record)), str(record.get("chat_template_kwargs"))
        form = kinds[0], kinds[-1], frozenset(pairwise(kinds)), *beside
        if number < TRIED or form not in seen:
            yield record
        seen.add(form)
