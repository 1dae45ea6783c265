"""How a question or a chat becomes the model's prompt, by its chat template or a plain format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from gem.config.settings import DIRECT_SYSTEM_PROMPT, TextSettings
from gem.data.answers import AnswerFinder, answer_finders
from gem.data.limits import time_limit
from gem.errors import UserError

# (role, content) of each message. A prompt is one question or the messages of a chat up to the answer.
Conversation = tuple[tuple[str, str], ...]
Prompt = str | Conversation
ROLES = ("system", "user", "assistant", "tool")


class PromptError(UserError):
    """The model's chat template does not take a prompt; the message has no place, which the row's reader knows."""


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], **arguments: Any) -> str:
    """The messages by the chat template. A template is a program of the model's maker: it may raise, or never end."""
    try:
        with time_limit("the chat template"):
            return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"model: its chat template ({template_file(tokenizer)}) has an error of syntax in line {error.lineno}: "
            f"{_words(error)}; correct it, or remove it for a plain format"
        ) from error
    except (RecursionError, MemoryError) as error:
        raise PromptError(f"the model's chat template failed: {type(error).__name__}") from error
    except UserError as error:  # the time limit
        raise PromptError(f"{error}; correct {template_file(tokenizer)}") from error
    except Exception as error:  # what a program of others raises
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise PromptError(
            f"the model's chat template does not take it (messages of {roles}): {_words(error)}; correct the messages"
        ) from error


def template_file(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where the chat template stands, as far as it is known."""
    folder = Path(str(tokenizer.name_or_path or "."))
    found = next((n for n in ("chat_template.jinja", "tokenizer_config.json") if (folder / n).is_file()), None)
    return str(folder / found) if found else "of the tokenizer"


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclass(frozen=True)
class TextFormat:
    """How a question becomes the model's prompt, which tokens end an answer, and where a final answer is in a text."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str
    end_of_turn: int  # closes an answer that is given
    end_tokens: tuple[int, ...]  # every one of these ends a completion
    finders: tuple[AnswerFinder, ...]
    marker: str
    chain_of_thought: bool

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of system prompt and question or chat, up to where the answer begins.

        A system message within the prompt takes the place of the format's own.
        """
        messages = (("user", prompt),) if isinstance(prompt, str) else prompt
        if self.system_prompt and messages[0][0] != "system":
            messages = (("system", self.system_prompt), *messages)
        if self.tokenizer.chat_template:
            return tuple(self.tokenizer.encode(self._render(messages), add_special_tokens=False))
        # The beginning-of-text token, where the tokenizer has one; an end token it may append is not part of a prompt.
        first = [t for t in self.tokenizer.encode("") if t != self.tokenizer.eos_token_id][:1]
        return tuple(first + self.tokenizer.encode(_plain_chat(messages), add_special_tokens=False))

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Token ids of a whole answer, closed by the end-of-turn token."""
        return (*self.tokenizer.encode(answer, add_special_tokens=False), self.end_of_turn)

    def _render(self, messages: Conversation) -> str:
        try:
            return self._template(messages)
        except PromptError:
            # Some templates (Gemma's) raise on a system message: its text then opens the question.
            if len(messages) < 2 or messages[0][0] != "system":
                raise
            (_, system), (role, first), *rest = messages
            return self._template(((role, f"{system}\n\n{first}"), *rest))

    def _template(self, messages: Conversation) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return render(self.tokenizer, chat, add_generation_prompt=True)


def _plain_chat(messages: Conversation) -> str:
    """The format of a tokenizer without chat template, up to where the answer begins."""
    before = {"system": "", "user": "Question: ", "assistant": "Answer:\n", "tool": "Result: "}
    after = {"system": "\n\n"}
    return "".join(f"{before[role]}{text}{after.get(role, chr(10))}" for role, text in messages) + "Answer:\n"


def text_format(tokenizer: PreTrainedTokenizerBase, settings: TextSettings) -> TextFormat:
    """The format of this tokenizer: its chat template, or "Question: ... Answer:" where it has none.

    Without chain of thought the system prompt is one that asks for the answer alone. A model may name more end tokens:
    `gem.model.load.end_token_ids`.
    """
    end = _template_end_token(tokenizer)
    if end is None:
        end = tokenizer.eos_token_id
    if end is None:
        raise UserError("model: its tokenizer names no end token (eos_token), so answers cannot be closed")
    return TextFormat(
        tokenizer,
        settings.system_prompt if settings.chain_of_thought else DIRECT_SYSTEM_PROMPT,
        end_of_turn=end,
        end_tokens=(end,),
        finders=answer_finders(settings.answer_span, settings.answer_marker),
        marker=settings.answer_marker,
        chain_of_thought=settings.chain_of_thought,
    )


def _template_end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the chat template puts after an assistant's answer (<|im_end|>, <|eot_id|>, ...)."""
    if not tokenizer.chat_template:
        return None
    answer = "GEM ANSWER"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        after = render(tokenizer, messages).rpartition(answer)[2]
    except PromptError as error:
        raise UserError(f"model: {template_file(tokenizer)}: one question and its answer: {error}") from error
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((t for t in tokenizer.encode(after, add_special_tokens=False) if t in special), None)
