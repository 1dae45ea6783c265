"""`gem chat`: a conversation with a model on the terminal, as small as it can be."""

from __future__ import annotations

import sys

from rich.console import Console

from gem.config.use import GenerateSettings
from gem.data.prompts import PromptError
from gem.errors import UserError
from gem.model.opened import OpenedModel, open_model
from gem.model.run_text import as_in_run
from gem.rollout.sample import roll_out
from gem.terminal.text import visible


def chat(model: str, settings: GenerateSettings, console: Console) -> None:
    """Reads questions from standard input until it ends; /new forgets what was said, /quit ends.

    The oldest turns are forgotten where the conversation would no longer fit the model's context.
    """
    settings = as_in_run(model, settings, console, system_prompt="")
    opened = open_model(model, settings)
    console.print(f"Loading {opened.name}", highlight=False)
    policy, form = opened.policy(settings.device, settings.dtype)
    console.print("/new begins again, /quit ends", highlight=False)
    said: list[tuple[str, str]] = []
    turn = 0
    while (question := _question()) is not None:
        if question == "/new":
            said = []
            continue
        if not question.strip():
            continue
        said.append(("user", question))
        try:
            said = fitting(said, opened, settings.max_completion_length)
            prompt = form.prompt_ids(tuple(said))
        except UserError as error:  # the conversation goes on
            console.print(f"Warning: {error}", highlight=False)
            said.pop()
            continue
        rollout = roll_out(policy, form, [prompt], settings, seed=settings.seed, step=turn, batch_size=1)
        answer = rollout.texts[0]
        said.append(("assistant", answer))
        turn += 1
        print(visible(answer), flush=True)


def fitting(said: list[tuple[str, str]], opened: OpenedModel, room: int) -> list[tuple[str, str]]:
    """The newest turns that fit the context with `room` tokens after them; a question and its answer go together."""
    while opened.context is not None and len(opened.form.prompt_ids(tuple(said))) + room > opened.context:
        if len(said) < 3:
            raise PromptError(
                f"the question does not fit the model's context of {opened.context} tokens: shorten it, or lower "
                "--max-completion-length"
            )
        said = said[2:]
    return said


def _question() -> str | None:
    """One line; None at its end or /quit."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError("chat: standard input is not UTF-8 text; convert it first") from error
    text = line.rstrip("\r\n")
    return None if not line or text == "/quit" else text
