"""How a question or a chat becomes the model's prompt, by its chat template or a plain format."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gem.config.settings import DIRECT_SYSTEM_PROMPT, TextSettings
from gem.data.answers import AnswerFinder, answer_finders
from gem.errors import UserError

# (role, content) of each message. A prompt is one question or the messages of a chat up to the answer.
Conversation = tuple[tuple[str, str], ...]
Prompt = str | Conversation
ROLES = ("system", "user", "assistant", "tool")


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
        except Exception:
            # Some templates (Gemma's) raise on a system message: its text then opens the question.
            if len(messages) < 2 or messages[0][0] != "system":
                raise
            (_, system), (role, first), *rest = messages
            return self._template(((role, f"{system}\n\n{first}"), *rest))

    def _template(self, messages: Conversation) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


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
    after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)[2]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((t for t in tokenizer.encode(after, add_special_tokens=False) if t in special), None)
