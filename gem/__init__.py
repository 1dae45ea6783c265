"""Few-shot alignment of language models by their own token entropies.

    import gem

    result = gem.train("HuggingFaceTB/SmolLM2-135M-Instruct", pairs, output_dir="runs/first", preset="safe")
    rows = gem.score(str(result.model_dir), prompts, num_generations=8, best=True)

Importing this does nothing yet: torch and transformers are imported with the first function that is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gem.api import calibrate, evaluate, generate, score, train
    from gem.errors import UserError

__all__ = ["UserError", "calibrate", "evaluate", "generate", "score", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gem' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module("gem.errors" if name == "UserError" else "gem.api"), name)
    except ModuleNotFoundError as error:
        from gem.errors import missing_package

        if words := missing_package(error):
            raise ImportError(f"gem.{name}: {words}") from error
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
